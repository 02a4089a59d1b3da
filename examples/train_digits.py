"""An ordinary Keras script that knows nothing of Partita: a small CNN on scikit-learn's handwritten
digits.

    python examples/train_digits.py --epochs 3
    partita run --devices 4 examples/train_digits.py --epochs 3
"""

import argparse

import keras
from keras import layers
from sklearn.datasets import load_digits

parser = argparse.ArgumentParser(description="Train a small CNN on handwritten digits.")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch", type=int, default=64)
arguments = parser.parse_args()

keras.utils.set_random_seed(0)
digits = load_digits()
images, labels = (digits.images[..., None] / 16).astype("float32"), digits.target
train, test = slice(0, 1500), slice(1500, None)

model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.Conv2D(64, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(256, activation="relu"),
        layers.Dropout(0.3),
        layers.Dense(10, activation="softmax"),
    ]
)
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(
    images[train], labels[train], batch_size=arguments.batch, epochs=arguments.epochs, verbose=2
)
accuracy = model.evaluate(images[test], labels[test], verbose=0)[1]
print(f"accuracy on {len(labels[test])} digits that it has not seen: {accuracy:.1%}")
