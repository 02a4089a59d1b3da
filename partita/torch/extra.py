"""The packages of the extra `partita[torch]`, imported at their first use.

So `import partita.torch` works everywhere, and a missing package is named in one sentence.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from partita.errors import PartitaError


class Package:
    """A package that is imported when an attribute of it is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            # Tools that look at a module ask for these; they are no reason to import a package.
            raise AttributeError(attribute)
        try:
            package = import_module(self._name)
        except ModuleNotFoundError as error:
            if error.name != self._name:
                raise
            raise PartitaError(
                f"PyTorch modules need {self._name}, which is not installed. Install the extra: "
                "pip install 'partita[torch]'."
            ) from None
        except (AttributeError, ImportError) as error:
            raise PartitaError(
                f"{self._name} does not work with the installed packages ({error}). Install the "
                "versions of the extra: pip install 'partita[torch]'."
            ) from error
        return getattr(package, attribute)
