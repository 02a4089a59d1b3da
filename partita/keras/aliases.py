"""Names under which Keras is imported: `partita.keras.layers`, and in scripts `tensorflow.keras`.

A module imported under an alias is the module itself, not a copy: classes are the same under any
name. `tensorflow.keras` and `tf_keras` are served only in a script that `partita run` runs.
"""

from __future__ import annotations

import functools
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
from pathlib import Path

TENSORFLOW_KERAS = "keras._tf_keras.keras"
"""Keras 3 under the names that TensorFlow has for it."""


def _always() -> bool:
    return True


class Alias(MetaPathFinder, Loader):
    """Imports `alias` and the modules below it as `target` and the modules below that.

    `serves` tells whether the running import is to be served.
    """

    def __init__(self, alias: str, target: str, serves: Callable[[], bool] = _always) -> None:
        self.alias = alias
        self.target = target
        self.serves = serves
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.alias and not fullname.startswith(self.alias + "."):
            return None
        if not self.serves() or not self._exists(fullname):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def _exists(self, fullname: str) -> bool:
        name = self._target_name(fullname)
        try:
            return name in sys.modules or find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    def _target_name(self, fullname: str) -> str:
        return self.target + fullname[len(self.alias) :]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = importlib.import_module(self._target_name(spec.name))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        # The import system has put its own spec here; the module gets back its first one.
        assert module.__spec__ is not None
        module.__spec__ = self._specs.pop(module.__spec__.name)


class TensorFlow(types.ModuleType):
    """Stands in for TensorFlow where it is not installed: it has `keras`, and refuses all else."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name == "keras":
            return importlib.import_module(TENSORFLOW_KERAS)
        if name == "__version__":
            return f"2.0.0+keras.{importlib.import_module('keras').__version__}"
        raise AttributeError(
            f"tensorflow.{name} is missing: TensorFlow is not installed, and only tensorflow.keras "
            "is served in its place, by Keras 3. Install it with: pip install tensorflow"
        )


class _TensorFlowFinder(MetaPathFinder, Loader):
    """Imports the stand-in for TensorFlow, for the user's own files."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != "tensorflow" or not _importer_is_user_code():
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        self.say("TensorFlow is not installed: tensorflow.keras is Keras 3, on JAX")
        return TensorFlow(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _importer_is_user_code() -> bool:
    """Whether the running import is in a file of the user's: libraries must see no TensorFlow."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "importlib" not in file and file != __file__:
            return not os.path.abspath(file).startswith(_library_folders(tuple(sys.path)))
        frame = frame.f_back
    return True


@functools.cache
def _library_folders(search_path: tuple[str, ...]) -> tuple[str, ...]:
    """The folders of installed packages: those of this interpreter, and those of the search path
    that say what is installed in them."""
    folders = [sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")]
    for entry in search_path:
        if entry and any(Path(entry).glob("*.dist-info")):
            folders.append(os.path.abspath(entry))
    return tuple(folder + os.sep for folder in folders)


@contextmanager
def tensorflow_names(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `tensorflow.keras` and `tf_keras` are Keras 3 for the user's own files.

    TensorFlow itself is used where it is installed.
    """
    finders: list[MetaPathFinder] = [Alias("tf_keras", TENSORFLOW_KERAS, _importer_is_user_code)]
    served = ["tf_keras"]
    if find_spec("tensorflow") is None:
        _let_keras_look_for_tensorflow()
        finders += [_TensorFlowFinder(say), Alias("tensorflow.keras", TENSORFLOW_KERAS)]
        served.append("tensorflow")
    sys.meta_path[:0] = finders
    before = set(sys.modules)
    try:
        yield
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in finders]
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in served:
                del sys.modules[name]


def _let_keras_look_for_tensorflow() -> None:
    """Makes Keras look for TensorFlow, which it does once, before a module of that name exists."""
    from keras.src.utils import module_utils

    _ = module_utils.tensorflow.available
