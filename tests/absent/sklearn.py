"""In the place of scikit-learn for processes that tests start: Keras imports it where it is installed."""

raise ImportError("scikit-learn is hidden from this process")
