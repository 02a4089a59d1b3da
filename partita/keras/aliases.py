"""Names under which Keras is imported: `partita.keras.layers` is `keras.layers`; in a script that `partita run` runs, `tensorflow.keras` too.

A module found under an alias is the module itself, not a copy: classes are the same whatever they are imported by.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

TENSORFLOW_KERAS = "keras._tf_keras.keras"
"""Keras 3 under the names that TensorFlow has for it."""
LIBRARIES = tuple(sysconfig.get_path(key) + os.sep for key in ("stdlib", "purelib", "platlib"))


class Alias(MetaPathFinder, Loader):
    """Finds `alias` and all below it as `target` and what is below that. `mine` says whether an import is to be served."""

    def __init__(self, alias: str, target: str, mine: Callable[[], bool] = lambda: True) -> None:
        self.alias, self.target, self.mine = alias, target, mine
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.alias and not fullname.startswith(self.alias + "."):
            return None
        return (
            ModuleSpec(fullname, self, is_package=True)
            if self.mine() and self._exists(fullname)
            else None
        )

    def _exists(self, fullname: str) -> bool:
        name = self._name(fullname)
        try:
            return name in sys.modules or find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    def _name(self, fullname: str) -> str:
        return self.target + fullname[len(self.alias) :]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = importlib.import_module(self._name(spec.name))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        assert (
            module.__spec__ is not None
        )  # the import system has put its own here; the module keeps the one that it had
        module.__spec__ = self._specs.pop(module.__spec__.name)


class TensorFlow(types.ModuleType):
    """Stands for TensorFlow where it is not installed: it has `keras`, and says so of everything else."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name == "keras":
            return importlib.import_module(TENSORFLOW_KERAS)
        if name == "__version__":
            return f"2.0.0+keras.{importlib.import_module('keras').__version__}"
        raise AttributeError(
            f"tensorflow.{name} is not there: TensorFlow is not installed, and only tensorflow.keras is served in its place, by Keras 3. "
            "Install it with: pip install tensorflow"
        )


class _Stand(MetaPathFinder, Loader):
    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        return (
            ModuleSpec(fullname, self, is_package=True)
            if fullname == "tensorflow" and _of_the_script()
            else None
        )

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        self.say("TensorFlow is not installed: tensorflow.keras is Keras 3, on JAX")
        return TensorFlow(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _of_the_script() -> bool:
    """Whether the running import is one of the user's own files: a library that looks for TensorFlow must not find this."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "importlib" not in name and name != __file__:
            return not os.path.abspath(name).startswith(LIBRARIES)
        frame = frame.f_back
    return True


@contextmanager
def tensorflow_spelling(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `tensorflow.keras` and `tf_keras` are Keras 3 for the user's own files; TensorFlow itself is used where it is installed."""
    finders: list[MetaPathFinder] = [Alias("tf_keras", TENSORFLOW_KERAS, _of_the_script)]
    if find_spec("tensorflow") is None:
        from keras.src.utils import module_utils

        _ = (
            module_utils.tensorflow.available
        )  # Keras looks once: from here on there is a module of that name
        finders += [_Stand(say), Alias("tensorflow.keras", TENSORFLOW_KERAS)]
    sys.meta_path[:0] = finders
    before = set(sys.modules)
    try:
        yield
    finally:
        sys.meta_path[:] = [f for f in sys.meta_path if f not in finders]
        served = ("tf_keras", "tensorflow") if len(finders) > 1 else ("tf_keras",)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in served:
                del sys.modules[name]
