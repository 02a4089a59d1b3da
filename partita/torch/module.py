"""A PyTorch module as a pure function of its arrays, and its arrays as JAX's and back.

Arrays have the names of `module.state_dict()`. A tensor with several names (tied weights) is one
array under its first name. Trained are parameters that require a gradient; the others and the
buffers are state.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import copy
import operator
import random
import sys
import textwrap
import traceback
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from partita.capture.names import MODULE_SCOPE
from partita.errors import CaptureError, PartitaError
from partita.files.reading import short_reason
from partita.torch.environment import (
    environment,
    is_traced,
    require_gradients,
    shape_tensor,
    standing_in,
    tracing,
    unwrapped,
    wrapped,
)
from partita.torch.extra import Package

if TYPE_CHECKING:
    import torch
    import torchax
    from torch.nn.utils import stateless
else:
    torch = Package("torch")
    torchax = Package("torchax")
    stateless = Package("torch.nn.utils.stateless")

Arrays = dict[str, Any]
"""JAX arrays, or shapes, by the name of the tensor."""
LOSS_SCOPE = "loss"
VALUE_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
)
"""Errors of JAX where a value is needed that is not known while tracing."""
_PACKAGE = str(Path(__file__).parents[1])
_FOREIGN = ("torch", "torchax", "jax", "opt_einsum", "contextlib", "functools")
"""Modules whose lines say nothing about a user's program."""


@dataclass(frozen=True)
class Names:
    """The tensors of a module by their first names."""

    trained: tuple[str, ...]
    fixed: tuple[str, ...]
    """Buffers, and parameters without a gradient."""
    first: Mapping[str, str]
    """Every name -> the first name of its tensor."""


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _places(module: torch.nn.Module) -> Iterator[str]:
    """The names of a module's tensors without those by a second path to the same submodule."""
    for path, child in module.named_modules():
        for name, _ in child.named_parameters(path, recurse=False, remove_duplicate=False):
            yield name
        for name, _ in child.named_buffers(path, recurse=False, remove_duplicate=False):
            yield name


def names_of(module: torch.nn.Module) -> Names:
    """The names of a module's parameters and buffers."""
    trained = []
    fixed = []
    first: dict[str, str] = {}
    name_of: dict[int, str] = {}
    for name, tensor in _named_tensors(module):
        first[name] = name_of.setdefault(id(tensor), name)
        if first[name] == name:
            (trained if tensor.requires_grad else fixed).append(name)
    return Names(tuple(trained), tuple(fixed), first)


def arrays_of(module: torch.nn.Module, names: Sequence[str]) -> Arrays:
    """The named tensors of a module as JAX arrays; shapes for a module on the meta device."""
    tensors = dict(_named_tensors(module))
    return {name: _as_jax(name, tensors[name]) for name in names}


def _as_jax(name: str, tensor: torch.Tensor) -> Any:
    dtype = _jax_dtype(tensor.dtype)
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and dtype != jax.dtypes.canonicalize_dtype(dtype)
    if is_wide:
        raise CaptureError(
            f"The tensor '{name}' is {dtype}, which JAX computes with half the bits. Convert the "
            "module: module.float()."
        )
    if tensor.is_meta:
        return _shape(tensor)
    # A copy: JAX may share the memory of an array, and a step donates it.
    return jnp.array(to_numpy(tensor))


def _jax_dtype(dtype: torch.dtype) -> Any:
    """JAX's dtype of the same name."""
    return jnp.dtype(str(dtype).removeprefix("torch."))


def _shape(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a tensor on the meta device, as JAX has it."""
    dtype = jax.dtypes.canonicalize_dtype(_jax_dtype(tensor.dtype))
    return jax.ShapeDtypeStruct(tuple(tensor.shape), dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array; 64-bit integers and floats become 32-bit ones, as in JAX."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else "sparse"
        raise CaptureError(f"A tensor is {kind}: give tensor.dequantize() or tensor.to_dense().")
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    array = tensor.numpy()
    check_whole_numbers(array)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


LARGEST_WHOLE = 2**31 - 1


def check_whole_numbers(array: np.ndarray) -> None:
    """CaptureError for whole numbers of more than 32 bits, which JAX would cut off."""
    is_wide = array.dtype in (np.int64, np.uint64) and array.size > 0
    largest = max(int(array.max()), -int(array.min()) - 1) if is_wide else 0
    if largest > LARGEST_WHOLE:
        raise CaptureError(
            f"A tensor has the whole number {largest:,}, and JAX computes with 32 bits. Give "
            f"numbers up to {LARGEST_WHOLE:,}, such as ids taken modulo the size of a table."
        )


def saved_dtype(array: Any, tensor: torch.Tensor) -> torch.dtype:
    """The dtype of an array in a state that has the names of a module: that of the module's own
    tensor, unless the forward pass replaced it by one of another dtype."""
    if array.dtype == jax.dtypes.canonicalize_dtype(_jax_dtype(tensor.dtype)):
        return tensor.dtype
    return torch.int64 if array.dtype == jnp.int32 else getattr(torch, str(array.dtype))


def to_torch(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """An array as a tensor on the CPU that owns its memory."""
    values = np.array(array)
    if values.dtype == jnp.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(values).to(dtype)


def as_batch(value: Any) -> Any:
    """A batch of a DataLoader with NumPy arrays in the place of tensors, shapes of meta tensors.

    CaptureError for anything but numbers.
    """
    if isinstance(value, torch.Tensor):
        return _shape(value) if value.is_meta else to_numpy(value)
    if isinstance(value, Mapping):
        # JAX sorts the keys of a dict, and a forward pass may go through its arguments.
        return OrderedDict((name, as_batch(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        items = [as_batch(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if value is None or isinstance(value, (bool, int, float, jax.Array, jax.ShapeDtypeStruct)):
        return value
    if isinstance(value, (np.ndarray, np.generic)) and _is_numeric(value.dtype):
        check_whole_numbers(np.asarray(value))
        return value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
    is_array = hasattr(value, "dtype")
    kind = f"an array of {value.dtype}" if is_array else f"a {type(value).__name__}"
    raise CaptureError(
        f"The batch contains {kind}: give tensors, arrays of numbers, or numbers, in tuples, "
        "lists or dicts."
    )


class Same:
    """An object, equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def mapped(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """A copy of a value with other tensors, in containers and attributes of objects too."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        items = [mapped(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        result = copy.copy(value) if isinstance(value, MutableMapping) else {}
        for name, item in value.items():
            result[name] = mapped(function, item)
        return result
    if not hasattr(value, "__dict__") or callable(value):
        return value
    result = copy.copy(value)
    for name, item in vars(value).items():
        object.__setattr__(result, name, mapped(function, item))
    return result


@jax.tree_util.register_pytree_node_class
class Outputs:
    """The outputs of a module as JAX arrays, with the objects that hold them."""

    def __init__(self, arrays: Sequence[Any], holder: Same) -> None:
        self.arrays = arrays
        self.holder = holder
        """Of the outputs with tensors that have shapes alone."""

    @classmethod
    def of(cls, outputs: Any) -> Outputs:
        """The outputs of a module that is traced."""
        arrays: list[Any] = []

        def noted(tensor: torch.Tensor) -> torch.Tensor:
            if not is_traced(tensor):
                return tensor
            arrays.append(unwrapped(tensor))
            return shape_tensor(arrays[-1])

        return cls(arrays, Same(mapped(noted, outputs)))

    def tree_flatten(self) -> tuple[Sequence[Any], Same]:
        return self.arrays, self.holder

    @classmethod
    def tree_unflatten(cls, holder: Same, arrays: Sequence[Any]) -> Outputs:
        return cls(arrays, holder)

    def with_tensors(self, tensor_of: Callable[[Any], torch.Tensor]) -> Any:
        """The outputs with tensors of the arrays."""
        arrays = iter(self.arrays)
        return mapped(lambda x: tensor_of(next(arrays)) if is_traced(x) else x, self.holder.value)


def _is_numeric(dtype: Any) -> bool:
    return dtype == np.bool_ or jnp.issubdtype(dtype, np.number)


def modes_of(module: torch.nn.Module) -> tuple[bool, ...]:
    """Per submodule, whether it is in train mode."""
    return tuple(child.training for child in module.modules())


TRACED = "traced"
"""Stands for tensors that a forward pass made while it was traced."""
DEEPEST = 9
"""Levels of containers whose contents are compared."""


def _frozen(value: Any, level: int = 0) -> Any:
    """A value that tells whether an attribute changed: of numbers, texts and containers their
    contents, of a tensor its version, of other objects which one it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value).__name__, value
    if isinstance(value, weakref.ref):
        return _frozen(value(), level)
    if is_traced(value):
        return TRACED
    if isinstance(value, (Mapping, list, tuple)) and level < DEEPEST:
        items = value.items() if isinstance(value, Mapping) else value
        return (type(value).__name__, *(_frozen(item, level + 1) for item in items))
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        return Same(value), _version_of(value)
    return Same(value)


def _version_of(tensor: torch.Tensor | None) -> int | None:
    """Tells whether a tensor was changed in place; None for one that does not tell it, or none."""
    return None if tensor is None or tensor.is_inference() else tensor._version


_UNREAD = frozenset(
    (
        "_parameters",
        "_buffers",
        "_non_persistent_buffers_set",
        "_flat_weights",
        "_flat_weight_refs",
    )
)
"""Attributes of modules that are arguments of a step (the last two of recurrent networks), or not
read by one."""
RECENT_KEYS = 2
"""Keys of settings that are kept: of train and of eval mode."""


class _Unchanged:
    """Tells quickly whether attributes are the objects that they were, with equal contents.

    A change may be none: an equal number can be another object.
    """

    def __init__(self, attributes: Sequence[dict[str, Any]]) -> None:
        self._empty: list[Any] = []
        self._full: list[tuple[Any, tuple[Any, ...]]] = []
        """Containers with their items."""
        self._tensors: list[tuple[torch.Tensor, int]] = []
        for values in attributes:
            self._full.append((values, _items(values)))
            for name, value in values.items():
                if name not in _UNREAD:
                    self._note(value, 0)

    def _note(self, value: Any, level: int) -> None:
        if isinstance(value, (Mapping, list, tuple)) and level < DEEPEST:
            if not value:
                self._empty.append(value)
                return
            self._full.append((value, _items(value)))
            for item in value.values() if isinstance(value, Mapping) else value:
                self._note(item, level + 1)
        elif isinstance(value, torch.Tensor) and not is_traced(value) and not value.is_inference():
            self._tensors.append((value, value._version))

    def holds(self) -> bool:
        """Whether no object and no content is another one."""
        if any(map(len, self._empty)):
            return False
        for container, items in self._full:
            now = _items(container)
            if len(now) != len(items) or not all(map(operator.is_, now, items)):
                return False
        return all(tensor._version == version for tensor, version in self._tensors)


def _items(container: Any) -> tuple[Any, ...]:
    """The items of a container, and the keys of a mapping."""
    return (*container, *container.values()) if isinstance(container, Mapping) else (*container,)


class SettingsKey:
    """The attributes of modules at one time: a key of compiled programs."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self._hash = hash(tuple(values.items()))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, SettingsKey) and self.values == other.values

    def __hash__(self) -> int:
        return self._hash


class Settings:
    """The attributes of modules and their submodules, hooks and submodules included.

    They are compiled into a step, so that another value needs another program.
    """

    def __init__(self, module: torch.nn.Module, loss: Any) -> None:
        self.modules = {"": module}
        if isinstance(loss, torch.nn.Module):
            self.modules[LOSS_SCOPE] = loss
        self._kept: dict[str, Any] = {}
        """By name, the value of attributes that the forward pass itself changes; None for one that
        it makes."""
        self._keys: list[tuple[_Unchanged, SettingsKey]] = []
        """Keys of late, as in train and in eval mode, with what tells whether they are right."""
        self._outer: dict[int, tuple[weakref.ref[torch.Tensor], int | None]] = {}
        """Tensors from elsewhere that a program read, such as those of a closure, with their
        versions, by id."""
        self._outer_changes = 0

    def key(self) -> SettingsKey:
        """The values now."""
        outer = {name: (ref, _version_of(ref())) for name, (ref, _) in self._outer.items()}
        if outer != self._outer:
            # A tensor that is gone was replaced.
            self._outer = {name: known for name, known in outer.items() if known[0]() is not None}
            self._outer_changes += 1
            self._keys.clear()
        for unchanged, key in self._keys:
            if unchanged.holds():
                return key
        named = self._named_modules()
        values = {
            _joined(path, attribute): _frozen(value)
            for path, child in named
            for attribute, value in vars(child).items()
            if attribute not in _UNREAD
        }
        values |= self._kept
        absent = [name for name, value in values.items() if value is None]
        for name in absent:
            del values[name]
        key = SettingsKey(values | {"": self._outer_changes})
        unchanged = _Unchanged([vars(child) for _, child in named])
        self._keys = [(unchanged, key), *self._keys[: RECENT_KEYS - 1]]
        return key

    def keep_changed(self, before: SettingsKey) -> list[str]:
        """Keeps the values `before` for attributes that have others now, and names them, but for
        those that hold tensors of the step and are not read before."""
        contents = environment().contents
        if not contents:
            return []
        self._take_outer()
        after = self.key()
        _restore_traced(contents)
        contents.clear()
        if after == before:
            return []
        now, old = after.values, before.values
        changed = [name for name in now | old if now.get(name) != old.get(name)]
        self._kept |= {name: old.get(name) for name in changed}
        self._keys.clear()
        read = self._names(environment().read_attributes)
        return [name for name in changed if now.get(name) != TRACED or name in read]

    def _take_outer(self) -> None:
        """Notes the tensors from elsewhere that the program which was traced last reads."""
        for ref in environment().outer:
            tensor = ref()
            if tensor is not None:
                self._outer[id(tensor)] = ref, _version_of(tensor)
        environment().outer.clear()

    def _names(self, attributes: set[tuple[int, str]]) -> set[str]:
        """Names of attributes that are given with the id of their module."""
        path_of = {id(child): path for path, child in self._named_modules()}
        return {
            _joined(path_of[number], attribute)
            for number, attribute in attributes
            if number in path_of
        }

    def _named_modules(self) -> list[tuple[str, torch.nn.Module]]:
        """All modules with their paths."""
        return [
            named
            for prefix, module in self.modules.items()
            for named in module.named_modules(prefix=prefix)
        ]


def _restore_traced(contents: Sequence[tuple[Any, Any]]) -> None:
    """Gives containers their contents from before a trace in the place of tensors of the step,
    which no other program can read."""
    for container, before in contents:
        if isinstance(container, list):
            if any(map(is_traced, container)):
                container[:] = before
            continue
        for name in [name for name, value in container.items() if is_traced(value)]:
            if name in before:
                container[name] = before[name]
            else:
                del container[name]


def _joined(path: str, attribute: str) -> str:
    """The name of an attribute of the module at a path."""
    return f"{path}.{attribute}" if path else attribute


class Versions:
    """Versions of a module's parameters and buffers, which tell whether any was written to or
    replaced.

    A submodule that is replaced replaces its parameters.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        # tensors made in inference mode have no version
        self._places = [
            (tensors, name)
            for child in module.modules()
            for tensors in (child._parameters, child._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and not tensor.is_inference()
        ]
        self._children = [
            (child._modules, name) for child in module.modules() for name in child._modules
        ]
        self._seen = self._now()

    def _now(self) -> list[Any]:
        tensors = [parameters.get(name) for parameters, name in self._places]
        children: list[Any] = [id(modules.get(name)) for modules, name in self._children]
        return children + [
            None if x is None else (id(x), x._version, x.requires_grad) for x in tensors
        ]

    def changed(self) -> bool:
        """Whether a parameter or buffer changed since the last call."""
        before = self._seen
        self._seen = self._now()
        return self._seen != before


# ----------------------------------------------------------------------------------------- calls


@dataclass(frozen=True)
class ModuleNetwork:
    """A module with its loss, as a function of its arrays."""

    module: torch.nn.Module
    loss: Any
    """(outputs, targets) -> loss; None for a module that returns its loss."""
    names: Names

    def loss_of(self, trained: Arrays, fixed: Arrays, key: Any, batch: Any) -> tuple[Any, Arrays]:
        """(the loss, the arrays that are fixed or changed) of one forward pass.

        A forward pass may change trained arrays too, under `torch.no_grad()`.
        """
        given = wrapped(batch)
        with explained(self.module), tracing(self.module, key), _warned(given):
            inputs, targets = self._split(given)

            def value_of(outputs: Any) -> Any:
                with jax.named_scope(MODULE_SCOPE + LOSS_SCOPE):
                    return self._value(outputs, targets)

            value, arrays = self._call(trained, fixed, inputs, value_of)
        changed = [name for name in trained if arrays[name] is not trained[name]]
        names = (*self.names.fixed, *changed)
        return unwrapped(value), {name: jax.lax.stop_gradient(arrays[name]) for name in names}

    def outputs_of(
        self, trained: Arrays, fixed: Arrays, key: Any, inputs: Any, settings: Any
    ) -> Outputs:
        """The module's outputs; programs are told apart by its `settings`."""
        with explained(self.module), tracing(self.module, key):
            return self._call(trained, fixed, wrapped(inputs), Outputs.of)[0]

    def _split(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, targets) of a batch; without a loss, all of it is input."""
        if self.loss is None:
            return batch, None
        if not isinstance(batch, tuple) or len(batch) != 2:
            given = f"{len(batch)} parts" if isinstance(batch, tuple) else type(batch).__name__
            raise CaptureError(
                f"A batch is a pair (inputs, targets), and this one has {given}. Give the inputs "
                "as a tuple or dict, or give loss=None and a module that returns its loss."
            )
        return batch

    def _call(
        self, trained: Arrays, fixed: Arrays, inputs: Any, finish: Callable[[Any], Any]
    ) -> tuple[Any, Arrays]:
        """(what `finish` makes of the outputs, the arrays afterwards).

        A loss may read the module's weights or call it again: in `finish`, it has the arrays.
        """
        tensors = wrapped({**trained, **fixed})
        for name in trained:
            require_gradients(tensors[name])
        every = {name: tensors[self.names.first[name]] for name in _places(self.module)}
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, dict):
            kwargs = inputs
        else:
            args = inputs if isinstance(inputs, tuple) else (inputs,)
        originals = dict(_named_tensors(self.module))
        stand_ins = {id(originals[name]): tensor for name, tensor in every.items()}
        # The module may change its buffers in place, or replace them: `every` then has the new.
        with (
            _without_new_buffers(self.module),
            stateless._reparametrize_module(self.module, every),
            standing_in(stand_ins),
        ):
            result = finish(self.module(*args, **kwargs))
        return result, unwrapped({name: every[name] for name in tensors})

    def _value(self, outputs: Any, targets: Any) -> Any:
        """The loss, a scalar tensor."""
        value: Any
        if self.loss is not None:
            value = self.loss(outputs, targets)
        elif isinstance(outputs, torch.Tensor):
            value = outputs
        else:
            value = getattr(outputs, "loss", None)
        source = "The module, without a loss function," if self.loss is None else "The loss"
        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            raise CaptureError(
                f"{source} returns no scalar tensor. Return the mean over the batch, or give "
                "a loss function of (outputs, targets)."
            )
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise CaptureError(
                f"{source} returns a number of {kind}, which has no gradient. Return a real number "
                "that is computed without argmax, rounding or comparisons."
            )
        return value


@contextmanager
def _without_new_buffers(module: torch.nn.Module) -> Iterator[None]:
    """Removes the buffers that a forward pass makes inside, and names them."""
    buffers = [
        (path, child, dict(child._buffers), set(child._non_persistent_buffers_set))
        for path, child in module.named_modules()
    ]
    yield
    made = []
    for path, child, before, unsaved in buffers:
        for name, tensor in child._buffers.items():
            if tensor is not None and before.get(name) is None:
                made.append(_joined(path, name))
        child._buffers.clear()
        child._buffers.update(before)
        child._non_persistent_buffers_set = unsaved
    if made:
        warnings.warn(
            f"The forward pass makes the buffers {', '.join(made)}, which the step makes anew each "
            "time. Register them with tensors before if they hold values from step to step.",
            stacklevel=2,
        )


@contextmanager
def _warned(batch: Any) -> Iterator[None]:
    """Inside, the effects of a forward pass that a compiled step does not repeat are named."""
    before = [tensor.jax() for tensor in _tensors_in(batch)]
    drawn = _random_states()
    yield
    after = [tensor.jax() for tensor in _tensors_in(batch)]
    if any(new is not old for new, old in zip(after, before, strict=True)):
        warnings.warn(
            "The forward pass changes its inputs in place, and the step leaves the batch as it is. "
            "Give each batch once, or make new tensors.",
            stacklevel=2,
        )
    if _random_states() != drawn:
        warnings.warn(
            "The forward pass draws random numbers by 'random' or 'numpy.random', which happens "
            "only when the step is compiled. Use torch.rand.",
            stacklevel=2,
        )


def _tensors_in(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_traced(leaf)]


def _random_states() -> tuple[Any, ...]:
    """States of the global random numbers of Python and NumPy."""
    _, numbers, place, *_ = np.random.get_state()
    return random.getstate(), numbers.tobytes(), place


@contextmanager
def leaks_explained(name: str) -> Iterator[None]:
    """Inside, a tensor of an earlier pass that a module called `name` reads is a CaptureError."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise CaptureError(
            f"'{name}' or its loss reads a tensor that an earlier pass left in a list, an object "
            "or a global variable. Hold it in a buffer, or make it anew in each pass."
        ) from error


def _line_of_user(error: Exception) -> str:
    """File, number and text of the innermost line outside PyTorch, JAX and Partita."""
    files = [Path(str(sys.modules[name].__file__)) for name in _FOREIGN]
    packages = [str(file.parent if file.stem == "__init__" else file) for file in files]
    line = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith((*packages, _PACKAGE)):
            text = textwrap.shorten(frame.line or "", 80, placeholder=" ...")
            line = f"{Path(frame.filename).name}:{frame.lineno}: {text}"
    return line


@contextmanager
def explained(module: torch.nn.Module) -> Iterator[None]:
    """Inside, errors of the user's program become a CaptureError that names their place."""
    name = type(module).__name__
    try:
        yield
    except PartitaError:
        raise
    except VALUE_ERRORS as error:
        place = f" ({_line_of_user(error)})" if _line_of_user(error) else ""
        raise CaptureError(
            f"The forward pass of '{name}' needs the value of a tensor in Python{place}, and a "
            "compiled step has none. Write torch.where in the place of branches, and keep shapes "
            "independent of values."
        ) from error
    except Exception as error:
        line = _line_of_user(error)
        place = f" ({line})" if line else ""
        is_missing = isinstance(error, (NotImplementedError, torchax.tensor.OperatorNotFound))
        advice = "Try the module and the loss on this batch in PyTorch"
        if any("_functorch" in file for file, *_ in traceback.extract_tb(error.__traceback__)):
            advice = "JAX's tensors have no torch.func (vmap, grad): write its result as a formula"
        elif is_missing:
            advice = "JAX or torchax lacks it: write it with other operations"
        raise CaptureError(
            f"The step of '{name}' fails in {_call_that_failed(module, error)}{place}: "
            f"{type(error).__name__}: {short_reason(str(error))}. {advice}."
        ) from error


def _call_that_failed(module: torch.nn.Module, error: Exception) -> str:
    """Name, class and inputs of the innermost submodule whose call failed; else the loss."""
    names = {id(child): name for name, child in module.named_modules()}
    place = "the loss or its gradient"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        called = frame.f_locals.get("self")
        if frame.f_code.co_name == "_call_impl" and id(called) in names:
            path = names[id(called)] or "the module"
            given = (*frame.f_locals["args"], *frame.f_locals["kwargs"].values())
            shapes = ", ".join(map(_shape_text, given)) or "nothing"
            place = f"{path} ({type(called).__name__}) of {shapes}"
    return place


def _shape_text(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
