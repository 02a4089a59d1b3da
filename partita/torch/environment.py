"""PyTorch's operations as JAX's: torchax, its gaps closed, and operators named by module.

torchax 0.0.13 differs from PyTorch in silence. Mended here: running statistics of batch
normalizations, gradients through `torch.detach` and `torch.no_grad`, derivatives where a function
is not smooth (`derivatives`), extremes along a dim, real Fourier transforms, grouped transposed
convolutions, attention to nothing, embeddings and their bags, classes out of range, some losses,
distances and norms, average pooling, antialiased and folded images (`images`), searches, random
numbers (`noise`), matrices (`matrices`), Fourier transforms (`signals`), tensors made without a
device or moved to another one. Refused here: custom backward functions, gradients by PyTorch,
generators, `tensor.data`, and changes in place that another tensor would show, because JAX's arrays
share no memory.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import functools
import math
import operator
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from partita.capture.names import MODULE_SCOPE
from partita.errors import CaptureError
from partita.torch import alignments, images, matrices, noise, signals
from partita.torch.derivatives import DERIVATIVES, absolute, largest, power_base
from partita.torch.extra import Package
from partita.torch.recurrent import CELLS, network

if TYPE_CHECKING:
    import torch
    import torch.nn.modules.batchnorm as torch_norms
    import torch.utils._pytree as torch_tree
    import torch.utils.hooks as torch_hooks
    import torchax.ops.jtorch as torchax_functions
    import torchax.tensor as torchax
    from torch.nn.modules import module as torch_modules
    from torchax.tensor import Environment, Tensor
else:
    torch = Package("torch")
    torch_modules = Package("torch.nn.modules.module")
    torch_norms = Package("torch.nn.modules.batchnorm")
    torch_tree = Package("torch.utils._pytree")
    torch_hooks = Package("torch.utils.hooks")
    torchax = Package("torchax.tensor")
torchax_functions = Package("torchax.ops.jtorch")


AUTOCAST_IGNORED = (
    "torch.autocast has no effect on the step: weights and inputs decide the precision. Call "
    "module.bfloat16() instead."
)
LONGEST_DIRECT = 25
"""Rows up to which PyTorch computes Euclidean distances from differences."""
HOOK_IGNORED = (
    "{} is not called: JAX computes the gradients. Change the forward pass or the loss instead."
)


@functools.cache
def environment() -> Environment:
    """torchax's environment, in which modules are traced, with its gaps closed."""
    completed: Any = _environment_class()()
    # Otherwise PyTorch pins the memory of batches and places modules on an accelerator that it
    # cannot use: DataLoader(pin_memory=True), DataParallel and torch.compile would fail.
    # `torch.jax` is there once torchax is imported.
    torch.jax.is_available = lambda: False
    power = completed._ops[torch.ops.aten.pow].func
    derivatives = DERIVATIVES | {"pow": lambda x, y: power(power_base(x, y), y)}
    for operation, function in (*_replacements(), *_with_derivatives(derivatives)):
        completed.override_op_definition(operation, function)
    for operation in (torch.ops.aten.cummax, torch.ops.aten.cummin):
        run = completed._ops[operation].func
        completed.override_op_definition(operation, functools.partial(_running_extreme, run))
    return completed


def _environment_class() -> type:
    """torchax's class of environments, whose gaps are closed: made here, so that this module can be
    imported without torchax."""

    class Completed(torchax.Environment):
        """An environment that differs from PyTorch nowhere in silence, as far as is known."""

        def __init__(self) -> None:
            super().__init__()
            self.read_attributes: set[tuple[int, str]] = set()
            """Attributes without a value of the step that were read while it was traced last, by
            the id of their module."""
            self.contents: list[tuple[Any, Any]] = []
            """Attributes of modules, and dicts and lists in them, with copies from before a step
            was traced; none once the changes were looked at."""
            self.outer: list[weakref.ref[torch.Tensor]] = []
            """Tensors of PyTorch that were read while a step was traced."""
            self.stand_ins: dict[int, Tensor] = {}
            """Tensors of the step, by the id of the module's parameter or buffer."""

        def _should_use_torchax_tensor(self, device: Any) -> bool:
            return device is None or super()._should_use_torchax_tensor(device)

        def get_and_rotate_prng_key(self, generator: Any = None) -> Any:
            if generator is not None:
                raise CaptureError(
                    "The forward pass draws from a generator of PyTorch, which stays as it is in a "
                    "compiled step. Remove generator=, and give the step a seed."
                )
            return super().get_and_rotate_prng_key()

        def _get_op_or_decomp(self, func: Any) -> Any:
            try:
                return super()._get_op_or_decomp(func)
            except torchax.OperatorNotFound:
                out_of_place = _out_of_place(func)
                if out_of_place is None:
                    raise
                # `dispatch` gives its values to the target.
                return super()._get_op_or_decomp(out_of_place)

        def _to_copy(self, the_tensor: Any, new_dtype: Any, new_device: Any) -> Any:
            # A step runs on the devices of its plan: moves to others have no effect.
            device = None if is_traced(the_tensor) else new_device
            return super()._to_copy(the_tensor, new_dtype, device)

        def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
            name = _name_of(func)
            args, kwargs = _with_stand_ins(self.stand_ins, args, kwargs or {})
            args, kwargs = _prepared(func, name, *_on_jax(name, args, kwargs))
            answer = _answer(func, name)
            if answer is not None and is_traced(args[0]):
                return answer(*args, **kwargs)
            call = _Call(name, args, kwargs)
            try:
                result = super().dispatch(func, types, *_in_order(name, args, kwargs))
            except torchax.OperatorNotFound:
                if call.traced or not isinstance(func, torch._ops.OpOverload):
                    raise
                result = self.to_xla(_run_by_torch(func, args, kwargs))
            return call.noted(result)

    return Completed


def _with_stand_ins(stand_ins: Mapping[int, Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with tensors of the step in the place of a module's own."""
    leaves = torch_tree.tree_leaves((args, kwargs))
    if not any(id(leaf) in stand_ins for leaf in leaves):
        return args, kwargs
    return torch_tree.tree_map(lambda x: stand_ins.get(id(x), x), (args, kwargs))


def _prepared(func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with an index as torchax takes it, and with views as their gradients are."""
    if func == torch.Tensor.__getitem__:
        args = (args[0], _index(args[1]))
    if torch.is_grad_enabled() and not _is_in_place(name):
        return torch_tree.tree_map_only(torchax.View, _stopped, (args, kwargs))
    return args, kwargs


def _answer(func: Any, name: str) -> Callable[..., Any] | None:
    """The function that answers for a tensor of the step, where torchax is not asked."""
    if func == torch.Tensor.requires_grad.__get__:
        return _requires_gradient
    if func == torch.Tensor.data.__get__:
        return operator.attrgetter("data")
    if name == "requires_grad_" or func == torch.Tensor.requires_grad.__set__:
        return _switch_gradient
    return None


def _run_by_torch(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of PyTorch's own operation, which depends on no tensor of the step: a window, or a
    question about dtypes."""
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {**kwargs, "device": "cpu"}
    return func(*args, **kwargs)


class _Call:
    """A call of an operation, with the arrays of its tensors before it."""

    def __init__(self, name: str, args: Any, kwargs: Any) -> None:
        """CaptureError for an argument that was changed through another tensor."""
        self.name = name
        self.args = args
        self.leaves = torch_tree.tree_leaves((args, kwargs))
        self.traced = [leaf for leaf in self.leaves if is_traced(leaf)]
        self.tensors = [_owner(leaf) for leaf in self.traced]
        self.before = [tensor.jax() for tensor in self.tensors]
        self.target = args[0] if _is_in_place(name) and args else kwargs.get("out")
        for leaf in self.traced:
            _check_current(leaf)

    def noted(self, result: Any) -> Any:
        """The result as PyTorch gives it: changes in place, views and gradients are noted."""
        if is_traced(self.target) and self.name not in _SETTERS:
            position = [id(leaf) for leaf in self.traced].index(id(self.target))
            result = _written(self.name, self.target, result, self.before[position])
        for tensor, old in zip(self.tensors, self.before, strict=True):
            if tensor.jax() is not old:
                _note_change(tensor)
        _mark_views(self.name, self.args, result)
        if not torch.is_grad_enabled():
            return _without_gradients(result, self.traced, self.tensors, self.before)
        if any(map(_requires_gradient, self.leaves)) and not _is_new(self.name):
            torch_tree.tree_map_only(torch.Tensor, require_gradients, result)
        return result


def _replacements() -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Operations that torchax computes otherwise than PyTorch, or not at all, with others."""
    functional = torch.nn.functional
    yield torch.ops.aten.detach, _detach
    yield torch.ops.aten.detach.default, _detach
    yield functional.batch_norm, _batch_norm
    yield functional.embedding, _embedding
    yield functional.embedding_bag, _embedding_bag
    for attention in (functional, torch.ops.aten):
        yield attention.scaled_dot_product_attention, _attention
    for move in (torch.Tensor.cpu, torch.Tensor.cuda):
        yield move, _unmoved
    for loss in (functional.cross_entropy, functional.nll_loss):
        yield loss, functools.partial(_loss_of_classes, loss)
    yield torch.linalg.solve, _solve
    for loss in (functional.ctc_loss, torch.ctc_loss):
        yield loss, _alignment_loss
    yield functional.multilabel_margin_loss, _multilabel_margin_loss
    yield functional.gaussian_nll_loss, _gaussian_nll_loss
    yield torch.ops.aten.binary_cross_entropy, _binary_cross_entropy
    yield torch.cdist, _distances
    yield functional.pdist, _distances_of_pairs
    yield torch.dist, _distance
    yield torch.ops.aten.linalg_vector_norm, _vector_norm
    for pooling in ("avg_pool1d", "avg_pool2d", "avg_pool3d"):
        yield getattr(torch.ops.aten, pooling), _average_pooling
    for mode in images.FILTERS:
        operation = getattr(torch.ops.aten, f"_upsample_{mode}2d_aa")
        yield operation, functools.partial(_antialiased, mode)
    yield functional.fold, _fold
    yield torch.ops.aten._fft_c2r, _real_fourier
    yield torch.ops.aten.max.dim, functools.partial(_extreme, 1)
    yield torch.ops.aten.min.dim, functools.partial(_extreme, -1)
    yield torch.searchsorted, _searchsorted
    for take in (torch.take_along_dim, torch.Tensor.take_along_dim):
        yield take, _take_along
    yield torch.Tensor.new_tensor, _new_tensor
    yield torch.asarray, functools.partial(_as_array, torch.asarray)
    yield torch.ops.aten.mean, _mean
    yield torch.ops.aten.logcumsumexp, _running_logarithm
    yield torch.ops.aten.rrelu_with_noise, _leaky_at_random
    yield torch.Tensor.fill_diagonal_, _with_diagonal
    yield torch.repeat_interleave, _repeated
    for operation, function in {
        torch.angle: DERIVATIVES["angle"],
        torch.ops.aten._linalg_det: matrices.determinant,
        torch.ops.aten._linalg_slogdet: matrices.sign_and_logarithm,
        torch.logdet: matrices.log_determinant,
        torch.ops.aten.linalg_householder_product: matrices.reflections,
        torch.cov: matrices.covariance,
        torch.Tensor.cov: matrices.covariance,
        torch.ops.aten.adaptive_max_pool2d: images.adaptive_maximum,
        torch.ops.aten.adaptive_max_pool3d: images.adaptive_maximum,
    }.items():
        yield operation, functools.partial(_of_arrays, function)
    for transform in (torch.stft, torch.Tensor.stft):
        yield transform, functools.partial(_short_fourier, torch.stft)
    for inverse in (torch.istft, torch.Tensor.istft):
        yield inverse, _inverse_short_fourier
    yield torch.ops.aten.mT, functools.partial(_of_arrays, jnp.matrix_transpose)
    yield torch.ops.aten.max.default, functools.partial(_of_arrays, DERIVATIVES["amax"])
    yield torch.ops.aten.min.default, functools.partial(_of_arrays, DERIVATIVES["amin"])
    yield torch.normal, _normal
    yield torch.multinomial, _multinomial
    for name, draw in noise.FILLS.items():
        fill = functools.partial(_filled, draw)
        yield getattr(torch.Tensor, name), fill
        yield getattr(torch.ops.aten, name), fill
    for convolution in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d):
        yield convolution, functools.partial(_transposed_convolution, convolution)
    for kind in CELLS:
        yield getattr(torch, kind), functools.partial(_recurrent, kind)


def _with_derivatives(
    functions: Mapping[str, Callable[..., Any]],
) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """All operations of these names, with functions of arrays."""
    for name, function in functions.items():
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            if "out" not in overload:
                yield getattr(packet, overload), functools.partial(_of_arrays, function)


def _of_arrays(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A function of arrays as one of tensors."""
    args, kwargs = unwrapped((args, kwargs))
    return wrapped(function(*args, **kwargs))


def _unmoved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The tensor itself: a step runs on the devices of its plan."""
    return tensor


_ORDERS = {
    "arange": ("start", "end"),
    "rand": ("size",),
    "randn": ("size",),
    "randint": ("low", "high", "size"),
    "linear": ("input", "weight", "bias"),
    "linalg_det": ("A",),
    "linalg_slogdet": ("A",),
    "linalg_solve": ("A", "B"),
    "linalg_svd": ("A",),
}
"""Operations whose named arguments torchax takes for others or refuses -> the order of these."""


def _in_order(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments of an operation with those in `_ORDERS` by position."""
    named = [key for key in _ORDERS.get(name, ()) if key in kwargs]
    rest = {key: value for key, value in kwargs.items() if key not in named}
    return (*args, *(kwargs[key] for key in named)), rest


def _name_of(func: Any) -> str:
    """Name of a function or operation, without its namespace and overload."""
    name = func.name() if callable(getattr(func, "name", None)) else func.__name__
    return name.rpartition("::")[2].partition(".")[0]


def _out_of_place(func: Any) -> Any:
    """The operation that computes what another one writes into its target, as exp for exp_."""
    name = _name_of(func)
    is_in_place = isinstance(func, torch._ops.OpOverload) and name.endswith("_")
    return getattr(torch.ops.aten, name[:-1], None) if is_in_place else None


def _is_in_place(name: str) -> bool:
    """Whether an operation of this name writes into its first argument, as exp_."""
    return name.endswith("_") and not name.startswith("__")


def is_traced(value: Any) -> bool:
    """Whether a value is a torchax tensor or a view of one."""
    return isinstance(value, (torchax.Tensor, torchax.View))


def _on_jax(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with constants of PyTorch as torchax tensors, where they meet torchax tensors."""
    leaves = torch_tree.tree_leaves((args, kwargs))
    constants = [x for x in leaves if isinstance(x, torch.Tensor) and not is_traced(x)]
    environment().outer += map(weakref.ref, constants)
    if not constants or not any(is_traced(leaf) for leaf in leaves):
        return args, kwargs
    is_in_place = name.startswith("__i") if name.startswith("__") else name.endswith("_")
    if is_in_place and args and args[0] is constants[0]:
        raise CaptureError(
            f"The forward pass changes a constant of PyTorch in place ({name}), which a compiled "
            "step does not see. Register the tensor as a buffer, or make it inside forward."
        )

    def convert(tensor: Any) -> Any:
        return tensor if is_traced(tensor) else _constant(tensor)

    return torch_tree.tree_map_only(torch.Tensor, convert, (args, kwargs))


def _index(key: Any) -> Any:
    """An index as torchax takes it: ranges and NumPy's arrays as lists, which select copies."""

    def part_of(value: Any) -> Any:
        if isinstance(value, range):
            return list(value)
        if isinstance(value, np.ndarray):
            return value.tolist()
        is_constant = isinstance(value, torch.Tensor) and not is_traced(value)
        return _constant(value) if is_constant else value

    if isinstance(key, tuple):
        return tuple(map(part_of, key))
    are_numbers = isinstance(key, list) and all(isinstance(number, int) for number in key)
    is_row = are_numbers or isinstance(key, (range, np.ndarray))
    return (part_of(key),) if is_row else part_of(key)


def _constant(tensor: Any) -> Any:
    """A tensor of PyTorch as one of the step, with values that indices and repetitions can read."""
    with jax.ensure_compile_time_eval():
        return environment().to_xla(tensor)


# ------------------------------------------------------------------------------ changes in place

_SETTERS = ("retain_grad_", "copy_", "set_")
"""Changes in place that may leave the values as they are."""
# fmt: off
_VIEWS = frozenset((
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "transpose",
    "swapaxes", "swapdims", "movedim", "moveaxis", "permute", "t", "T", "mT", "H", "mH", "adjoint",
    "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "broadcast_tensors", "select",
    "slice", "narrow", "chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split",
    "unsafe_split_with_sizes", "hsplit", "vsplit", "dsplit", "tensor_split", "unbind", "diagonal",
    "unfold", "as_strided", "atleast_1d", "atleast_2d", "atleast_3d", "real", "imag", "conj",
    "_conj", "view_as_real", "view_as_complex", "detach", "alias", "asarray", "__get__",
))
# fmt: on
"""Operations whose results share the memory of their first argument in PyTorch."""


class _Memory:
    """The part of a memory that PyTorch would let a tensor share with others."""

    def __init__(self, whole: _Memory | None = None, split: object = None) -> None:
        self.whole = whole
        """That of the tensor of which this one is a view."""
        self.split = split
        """Stands for the operation that made views without a common element: this one is one."""
        self.is_old = False
        """Whether it was changed through another tensor, which the array of its own does not show.
        """
        self.views: weakref.WeakSet[_Memory] = weakref.WeakSet()
        if whole is not None:
            whole.views.add(self)

    def change(self) -> None:
        """Its tensor is changed in place."""
        for view in self.views:
            view.age()
        part = self
        while part.whole is not None:
            part.whole.is_old = True
            for view in part.whole.views:
                if view is not part and (part.split is None or view.split is not part.split):
                    view.age()
            part = part.whole

    def age(self) -> None:
        """It and its views are changed through another tensor."""
        self.is_old = True
        for view in self.views:
            view.age()


def _mark_views(name: str, args: Any, result: Any) -> None:
    """Notes in the results of a view which tensors PyTorch would change with them."""
    if not args or not is_traced(args[0]):
        return
    if name not in _VIEWS and not (name == "__getitem__" and _selects_view(args[1])):
        return
    base = _owner(args[0])
    leaves = [leaf for leaf in torch_tree.tree_leaves(result) if isinstance(leaf, torchax.Tensor)]
    views = [leaf for leaf in leaves if leaf is not base]
    split = object() if len(views) > 1 else None
    for view in views:
        _share(base, view, split)


def _selects_view(key: Any) -> bool:
    """Whether an index has no tensors but numbers, for which PyTorch takes those without dims."""
    parts = key if isinstance(key, tuple) else (key,)
    return all(
        (x.dim() == 0 and x.dtype in (torch.int8, torch.int16, torch.int32, torch.int64))
        if is_traced(x)
        else isinstance(x, (int, slice, type(None), type(...)))
        for x in parts
    )


def _share(base: Tensor, view: Tensor, split: object = None) -> None:
    """Notes that a tensor is a view of another one."""
    base._memory = getattr(base, "_memory", None) or _Memory()
    view._memory = _Memory(base._memory, split)


def _note_change(tensor: Any) -> None:
    """Notes that a tensor was changed in place."""
    memory = getattr(_owner(tensor), "_memory", None)
    if memory is not None:
        memory.change()


def _check_current(tensor: Any) -> None:
    """CaptureError if a tensor that is read was changed through another one."""
    memory = getattr(_owner(tensor), "_memory", None)
    if memory is not None and memory.is_old:
        raise CaptureError(
            "The forward pass changes a view in place and then reads its tensor, or the reverse, "
            "and JAX's arrays share no memory. Change the tensor itself by an index, y[0] = 1, or "
            "make a new one: y = y + 1."
        )


def _owner(tensor: Any) -> Tensor:
    """The tensor whose array a view shows."""
    return _owner(tensor.parent) if isinstance(tensor, torchax.View) else tensor


def _written(name: str, target: Any, result: Any, before: jax.Array) -> Any:
    """`result`, or `target` after it was given the values that torchax left in a copy.

    CaptureError if the operation is not one in place.
    """
    if _owner(target).jax() is not before:
        return result
    is_alike = isinstance(result, torch.Tensor) and result.shape == target.shape
    if result is target or not is_alike:
        raise CaptureError(
            f"The forward pass uses '{name}', which torchax does not do in place. Write the "
            "operation without the underscore or out=, and assign its result."
        )
    values = result.jax().astype(before.dtype)
    if isinstance(target, torchax.View):
        target.update(values)
    else:
        target._elem = values
    return target


# ------------------------------------------------------------------------------------- gradients


def _requires_gradient(value: Any) -> bool:
    """What `value.requires_grad` is in PyTorch."""
    if isinstance(value, torchax.View):
        return _requires_gradient(value.parent)
    return getattr(value, "_requires_gradient", False)


def require_gradients(value: Any, requires_grad: bool = True) -> None:
    """Sets what `value.requires_grad` is; a view follows its tensor, and integers have none."""
    if isinstance(value, torchax.Tensor) and value.dtype.is_floating_point:
        value._requires_gradient = requires_grad


def _switch_gradient(tensor: Any, requires_grad: bool = True) -> Any:
    """`tensor.requires_grad_()`: operations from here on have its gradient, or have none."""
    leaf = _owner(tensor)
    if requires_grad:
        leaf._elem = vars(leaf).pop("_differentiable", leaf._elem)
    elif _requires_gradient(leaf):
        leaf._differentiable = leaf._elem
        leaf._elem = jax.lax.stop_gradient(leaf._elem)
    require_gradients(leaf, requires_grad)
    return tensor


def _is_new(name: str) -> bool:
    """Whether a result of the operation requires no gradient, whatever its arguments do."""
    return name.startswith(("detach", "asarray", "new_")) or name.endswith("_like")


def _without_gradients(
    result: Any, given: Sequence[Any], tensors: Sequence[Tensor], before: Sequence[jax.Array]
) -> Any:
    """The result of an operation without its gradient; `tensors` of the `given` arguments that were
    changed in place keep the gradient that they had `before`."""
    for tensor, old in zip(tensors, before, strict=True):
        new = tensor.jax()
        is_alike = (new.shape, new.dtype) == (old.shape, old.dtype)
        if new is not old and is_alike:
            tensor._elem = _with_gradient_of(new, old)
    arguments = {id(argument) for argument in given}

    def stop(leaf: Any) -> Any:
        if not is_traced(leaf) or id(leaf) in arguments:
            return leaf
        if isinstance(leaf, torchax.View):
            leaf._has_no_gradient = True
            return leaf
        stopped = _tensor(jax.lax.stop_gradient(leaf.jax()))
        stopped._memory = getattr(leaf, "_memory", None)
        return stopped

    return torch_tree.tree_map_only(torch.Tensor, stop, result)


def _stopped(view: Any) -> Any:
    """A view; a tensor without a gradient for one that was made under `torch.no_grad()`."""
    if not getattr(view, "_has_no_gradient", False):
        return view
    tensor = _tensor(jax.lax.stop_gradient(view.jax()))
    _share(_owner(view), tensor)
    return tensor


@jax.custom_jvp
def _with_gradient_of(values: jax.Array, other: jax.Array) -> jax.Array:
    """The values, with the gradient that another array of their shape has."""
    return values


@_with_gradient_of.defjvp
def _jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    values, _ = primals
    return values, tangents[1]


def _tensor(values: jax.Array | jax.ShapeDtypeStruct) -> Tensor:
    return torchax.Tensor(values, environment())


def shape_tensor(array: jax.Array) -> Tensor:
    """A tensor with the shape and the dtype of an array, without values."""
    return _tensor(jax.ShapeDtypeStruct(array.shape, array.dtype))


def wrapped(tree: Any) -> Any:
    """A tree of JAX arrays as a tree of torchax tensors."""
    return environment().j2t_iso(tree)


def unwrapped(tree: Any) -> Any:
    """A tree of torchax tensors as a tree of JAX arrays."""

    def array_of(tensor: Any) -> jax.Array:
        _check_current(tensor)
        return tensor.jax()

    return torch_tree.tree_map_only(torch.Tensor, array_of, tree)


@contextmanager
def tracing(module: torch.nn.Module, key: Any) -> Iterator[None]:
    """Inside, operations on torchax tensors are JAX's, named by the submodule that calls them.

    Args:
        key: The random key of dropout and other noise.
    """
    attributes = [vars(child) for child in module.modules()]
    values = [value for names in attributes for value in names.values()]
    contents = attributes + [value for value in values if type(value) in (dict, list)]
    environment().contents[:] = [(container, container.copy()) for container in contents]
    with ExitStack() as stack:
        stack.enter_context(_refused_extensions())
        stack.enter_context(_ignored_features(module))
        stack.enter_context(named_scopes(module))
        stack.enter_context(environment())
        stack.enter_context(environment().override_property(prng=key))
        yield


@contextmanager
def standing_in(stand_ins: dict[int, Tensor]) -> Iterator[None]:
    """Inside, tensors of the step are used in the place of a module's own parameters and buffers,
    such as those in a list, by the id of the latter."""
    traced: Any = environment()
    traced.stand_ins = stand_ins
    try:
        yield
    finally:
        traced.stand_ins = {}


@contextmanager
def _ignored_features(module: torch.nn.Module) -> Iterator[None]:
    """Inside, features of PyTorch that do not change the step are named in a warning."""
    devices = ("cpu", "cuda")
    if any(torch.is_autocast_enabled(device) for device in devices):
        warnings.warn(AUTOCAST_IGNORED, stacklevel=2)
    for name, child in module.named_modules():
        if child._backward_hooks or child._backward_pre_hooks:
            warnings.warn(HOOK_IGNORED.format(f"The backward hook of '{name}'"), stacklevel=2)
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            warnings.warn(HOOK_IGNORED.format(f"The hook of '{name}'"), stacklevel=2)
    enter = torch.autocast.__enter__
    register = torch.Tensor.register_hook

    def enter_named(context: Any) -> Any:
        warnings.warn(AUTOCAST_IGNORED, stacklevel=2)
        return enter(context)

    def register_named(tensor: Any, hook: Any) -> Any:
        warnings.warn(HOOK_IGNORED.format("A hook on a tensor"), stacklevel=2)
        return register(tensor, hook)

    torch.autocast.__enter__ = enter_named
    torch.Tensor.register_hook = register_named
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter
        torch.Tensor.register_hook = register


# ------------------------------------------------------------------------------ names of modules


class _Scopes:
    """One open `jax.named_scope`: that of the innermost module that is running."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.running: list[str] = []
        self.open = ExitStack()

    def enter(self, child: torch.nn.Module, inputs: Any) -> None:
        outer = self.running[-1] if self.running else ""
        self.running.append(self.names.get(id(child), outer))
        self._switch()

    def leave(self, child: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        self.running.pop()
        self._switch()

    def _switch(self) -> None:
        self.open.close()
        if self.running:
            self.open.enter_context(jax.named_scope(MODULE_SCOPE + self.running[-1]))


@contextmanager
def named_scopes(module: torch.nn.Module) -> Iterator[None]:
    """Inside, each submodule of a module runs in a scope of its own path, `blocks.0.mlp.up`.

    A submodule with several paths is named by the first one.
    """
    names: dict[int, str] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        names.setdefault(id(child), name)
    scopes = _Scopes(names)
    before = torch_modules.register_module_forward_pre_hook(scopes.enter)
    after = torch_modules.register_module_forward_hook(scopes.leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        scopes.open.close()


# ------------------------------------------------------------------------------------ operations


def _detach(tensor: Tensor) -> Tensor:
    """`torch.detach`: the same values without a gradient."""
    return _tensor(jax.lax.stop_gradient(tensor.jax()))


def _recurrent(kind: str, inputs: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """`torch.lstm` and its like, by a loop over time; packed sequences unrolled."""
    if isinstance(args[2], (list, tuple)):
        return getattr(torch, kind)(inputs, *args)
    states, weights, has_biases, _, dropout, training, is_bidirectional, batch_first = args
    sequence = inputs.jax()

    def between(values: jax.Array) -> jax.Array:
        return torch.nn.functional.dropout(_tensor(values), dropout, training).jax()

    outputs, last = network(
        kind,
        jnp.swapaxes(sequence, 0, 1) if batch_first else sequence,
        [state.jax() for state in (states if kind == "lstm" else [states])],
        [weight.jax() for weight in weights],
        has_biases,
        2 if is_bidirectional else 1,
        between,
    )
    outputs = jnp.swapaxes(outputs, 0, 1) if batch_first else outputs
    return (_tensor(outputs), *map(_tensor, last))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, which updates the running statistics in place."""
    values = input.jax()
    others = [0, *range(2, values.ndim)]
    """All dims but the channels."""
    if training and values.size == values.shape[1]:
        raise ValueError(f"batch normalization of {list(values.shape)}: one value per channel")
    if training or running_mean is None or running_var is None:
        mean = jnp.mean(values, axis=others)
        variance = jnp.var(values, axis=others)
    else:
        mean = running_mean.jax()
        variance = running_var.jax()
    if training and running_mean is not None and running_var is not None:
        count = values.size // values.shape[1]
        unbiased = variance * count / max(1, count - 1)
        _move_average(running_mean, mean, momentum)
        _move_average(running_var, unbiased, momentum)
    shape = [1, -1, *[1] * (values.ndim - 2)]
    scale = jax.lax.rsqrt(variance + eps)
    result = (values - mean.reshape(shape)) * scale.reshape(shape)
    if weight is not None:
        result = result * weight.jax().reshape(shape)
    if bias is not None:
        result = result + bias.jax().reshape(shape)
    return _tensor(result.astype(values.dtype))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, which is 0 where a mask leaves nothing;
    torchax's is not a number."""
    attend = torchax_functions.scaled_dot_product_attention
    if attn_mask is None:
        return attend(query, key, value, **options)
    is_allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
    is_any = is_allowed.any(-1, keepdim=True)
    everything = torch.zeros_like(attn_mask) == 0 if attn_mask.dtype == torch.bool else 0.0
    mask = torch.where(is_any, attn_mask, everything)
    return torch.where(is_any, attend(query, key, value, mask, **options), 0.0)


def _check_embedding(kind: str, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    """CaptureError for options of embeddings that JAX lacks."""
    if max_norm is not None or scale_grad_by_freq:
        raise CaptureError(
            f"{kind} with max_norm or scale_grad_by_freq has no counterpart in JAX. Remove the "
            "option."
        )


def _rows(weight: Tensor, words: jax.Array) -> jax.Array:
    """The rows of a table; not a number for words out of range, where PyTorch raises."""
    count = weight.shape[0]
    return jnp.take(weight.jax(), jnp.where(words < 0, count, words), axis=0)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding`; torchax wraps negative words and ignores options."""
    _check_embedding("Embedding", max_norm, scale_grad_by_freq)
    words = input.jax()
    rows = _rows(weight, words)
    if padding_idx is not None:
        is_padding = (words == padding_idx % weight.shape[0])[..., None]
        rows = jnp.where(is_padding, jax.lax.stop_gradient(rows), rows)
    return _tensor(rows)


def _loss_of_classes(
    function: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """A loss of classes; not a number if one is out of range, where PyTorch raises."""
    places = (*input.shape[: input.dim() > 1], *input.shape[2:])
    if not target.is_floating_point() and target.shape != places:
        raise ValueError(
            f"outputs of {list(input.shape)} need classes of {list(places)}, and the targets are "
            f"of {list(target.shape)}"
        )
    loss = function(input, target, weight, size_average, ignore_index, *args, **kwargs)
    if target.is_floating_point():
        return loss
    classes = target.jax()
    count = input.shape[min(1, input.dim() - 1)]
    is_wrong = ((classes < 0) | (classes >= count)) & (classes != ignore_index)
    wrong = jnp.where(is_wrong, jnp.nan, 0).astype(loss.jax().dtype)
    return _tensor(loss.jax() + (wrong if loss.dim() else wrong.sum()))


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`torch.nn.functional.embedding_bag` of bags of equal length; torchax leaves out weights."""
    if offsets is not None or input.dim() != 2:
        raise CaptureError(
            "EmbeddingBag was given bags of several lengths (offsets). A compiled step has fixed "
            "shapes: give a tensor [bags, words], shorter bags filled up with padding_idx."
        )
    _check_embedding("EmbeddingBag", max_norm, scale_grad_by_freq)
    words = input.jax()
    rows = _rows(weight, words)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.jax()[..., None]
    is_word = jnp.ones(words.shape, bool)
    if padding_idx is not None:
        is_word = words != padding_idx % weight.shape[0]
    count = jnp.sum(is_word, axis=1)[:, None]
    if mode == "max":
        largest = jnp.max(jnp.where(is_word[..., None], rows, -jnp.inf), axis=1)
        return _tensor(jnp.where(count > 0, largest, 0).astype(rows.dtype))
    total = jnp.sum(jnp.where(is_word[..., None], rows, 0), axis=1)
    if mode == "mean":
        total = total / jnp.maximum(count, 1)
    return _tensor(total.astype(rows.dtype))


def _multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.multilabel_margin_loss`; PyTorch's formula in operations counts the
    places behind the first -1."""
    rows = jnp.atleast_2d(input.jax())
    labels = jnp.atleast_2d(target.jax())
    count = rows.shape[1]
    is_label = jnp.cumsum(labels == -1, axis=1) == 0
    of_labels = jnp.take_along_axis(rows, jnp.where(is_label, labels, 0), axis=1)
    is_target = jax.nn.one_hot(jnp.where(is_label, labels, count), count).any(axis=1)
    margins = jnp.maximum(0, 1 - of_labels[:, :, None] + rows[:, None, :])
    counts = is_label[:, :, None] & ~is_target[:, None, :]
    losses = jnp.where(counts, margins, 0).sum(axis=(1, 2)) / count
    return _reduced(_tensor(losses if input.dim() > 1 else losses[0]), reduction)


def _reduced(losses: Tensor, reduction: str | int) -> Tensor:
    """Losses by a reduction of PyTorch: its name, or its number in operations."""
    if reduction in ("none", 0):
        return losses
    return losses.mean() if reduction in ("mean", 1) else losses.sum()


def _alignment_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """`torch.nn.functional.ctc_loss`."""
    logarithms, labels, *given = unwrapped((log_probs, targets, input_lengths, target_lengths))
    is_single = logarithms.ndim == 2
    if is_single:
        logarithms = logarithms[:, None]
    sizes, counts = (jnp.atleast_1d(jnp.asarray(lengths)) for lengths in given)
    losses = alignments.alignment_losses(logarithms, labels, sizes, counts, blank)
    if zero_infinity:
        losses = jnp.where(jnp.isinf(losses), 0, losses)
    if reduction in ("mean", 1):
        losses = losses / jnp.maximum(counts, 1)
    return _reduced(_tensor(losses[0] if is_single else losses), reduction)


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Any,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.gaussian_nll_loss`, without its look at the variances: not a number
    for one below 0, where PyTorch raises."""
    var = var if isinstance(var, torch.Tensor) else var * torch.ones_like(input)
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    if var.shape not in (input.shape, (*input.shape[:-1], 1)):
        raise ValueError(f"variances of {list(var.shape)} for outputs of {list(input.shape)}")
    bounded = torch.where(var < 0, torch.nan, var.clamp(min=eps))
    var = var + (bounded - var).detach()
    losses = 0.5 * (var.log() + (input - target) ** 2 / var)
    return _reduced(losses + 0.5 * math.log(2 * math.pi) if full else losses, reduction)


LEAST_LOG = -100.0
"""Bound of the logarithms of a binary cross-entropy, as in PyTorch."""


def _bounded_log(shares: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.log(shares), LEAST_LOG)


@jax.custom_jvp
def _entropies(shares: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropies, with the gradient of PyTorch where a share is 0 or 1."""
    return -targets * _bounded_log(shares) - (1 - targets) * _bounded_log(1 - shares)


@_entropies.defjvp
def _entropies_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    shares, targets = primals
    by_share = (shares - targets) / jnp.maximum((1 - shares) * shares, 1e-12)
    by_target = _bounded_log(1 - shares) - _bounded_log(shares)
    return _entropies(shares, targets), by_share * tangents[0] + by_target * tangents[1]


def _binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    """`torch.nn.functional.binary_cross_entropy`; torchax has no gradient at 0 and 1."""
    losses = _tensor(_entropies(input.jax(), target.jax()))
    return _reduced(losses if weight is None else losses * weight, reduction)


def _length(differences: jax.Array, p: float) -> jax.Array:
    """The p-norm of the last dim, whose gradient is 0 where all differences are 0."""
    sizes = absolute(differences)
    if math.isinf(p):
        return sizes.max(axis=-1) if p > 0 else sizes.min(axis=-1)
    if p == 0:
        return (sizes != 0).sum(axis=-1).astype(sizes.dtype)
    powers = jnp.where(sizes > 0, jnp.where(sizes > 0, sizes, 1) ** p, 0).sum(axis=-1)
    return jnp.where(powers > 0, jnp.where(powers > 0, powers, 1) ** (1 / p), 0)


def _distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """`torch.cdist`; torchax has no gradient at 0 and other numbers for p = inf."""
    rows, columns = x1.jax(), x2.jax()
    if p != 2 or max(rows.shape[-2], columns.shape[-2]) <= LONGEST_DIRECT:
        return _tensor(_length(rows[..., :, None, :] - columns[..., None, :, :], p))
    squares = (rows**2).sum(-1)[..., :, None] + (columns**2).sum(-1)[..., None, :]
    squares = squares - 2 * rows @ jnp.matrix_transpose(columns)
    return _tensor(jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0))


def _distances_of_pairs(input: Tensor, p: float = 2.0) -> Tensor:
    """`torch.nn.functional.pdist`, as `_distances`."""
    first, second = np.triu_indices(input.shape[0], 1)
    rows = input.jax()
    return _tensor(_length(rows[first] - rows[second], p))


def _distance(input: Tensor, other: Tensor, p: float = 2.0) -> Tensor:
    """`torch.dist`, as `_distances`."""
    return _tensor(_length((input - other).jax().reshape(-1), p))


def _vector_norm(
    input: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """`torch.linalg.vector_norm`, whose gradient is 0 for zeros; torchax's is not a number."""
    values = (input if dtype is None else input.to(dtype)).jax()
    dims = range(values.ndim) if dim is None or dim == [] else np.atleast_1d(dim).tolist()
    dims = [d % max(1, values.ndim) for d in dims]
    others = [d for d in range(values.ndim) if d not in dims]
    shape = [values.shape[d] for d in others]
    result = _length(values.transpose(others + dims).reshape(*shape, -1), float(ord))
    return _tensor(jnp.expand_dims(result, sorted(dims)) if keepdim else result)


def _average_pooling(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d` and its like; torchax counts other elements for windows
    that begin in the padding and end outside of it."""
    values = input.jax()
    dims = len(kernel_size)
    outer = (1,) * (values.ndim - dims)
    strides = tuple(stride) or tuple(kernel_size)
    paddings = np.broadcast_to(padding, dims).tolist()
    beyond = []
    """Per dim, elements of the last window behind the padding; below 0 for a rest without one."""
    for size, window, step, pad in zip(
        values.shape[-dims:], kernel_size, strides, paddings, strict=True
    ):
        rest = size + 2 * pad - window
        last = math.ceil(rest / step) if ceil_mode else rest // step
        last -= ceil_mode and last * step >= size + pad
        beyond.append(last * step - rest)

    def sums(array: jax.Array, before: Sequence[int], after: Sequence[int]) -> jax.Array:
        zero = np.zeros((), array.dtype)
        pads = [(0, 0, 0)] * len(outer) + [(*ends, 0) for ends in zip(before, after, strict=True)]
        array = jax.lax.pad(array, zero, pads)
        windows = (*outer, *kernel_size)
        return jax.lax.reduce_window(array, zero, jax.lax.add, windows, (*outer, *strides), "VALID")

    ends = [pad + more for pad, more in zip(paddings, beyond, strict=True)]
    total = sums(values, paddings, ends)
    if divisor_override is not None:
        return _tensor((total / divisor_override).astype(values.dtype))
    sizes = values.shape[-dims:]
    if count_include_pad:
        sizes = [size + 2 * pad for size, pad in zip(sizes, paddings, strict=True)]
        paddings, ends = [0] * dims, beyond
    count = sums(jnp.ones((*outer, *sizes), values.dtype), paddings, ends)
    return _tensor((total / count).astype(values.dtype))


def _antialiased(
    mode: str,
    input: Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    *factors: Any,
    scale_factors: Sequence[float] | None = None,
) -> Tensor:
    """`torch.nn.functional.interpolate` with antialias=True, whose overloads torchax mixes up."""
    given: Any = scale_factors or factors or (None, None)
    if len(given) == 1:
        given = given[0] or (None, None)
    shape = input.shape[-2:]
    size = output_size or [int(old * by) for old, by in zip(shape, given, strict=True)]
    return _tensor(images.antialiased(mode, input.jax(), size, align_corners, given))


def _fold(
    input: Tensor,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Tensor:
    """`torch.nn.functional.fold`; torchax fails on paddings."""
    sizes = (output_size, kernel_size, dilation, padding, stride)
    pairs = [np.broadcast_to(size, 2).tolist() for size in sizes]
    columns = input.jax()
    result = images.folded(columns[None] if input.dim() == 2 else columns, *pairs)
    return _tensor(result[0] if input.dim() == 2 else result)


def _running_extreme(run: Any, input: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`torch.cummax` and its like by torchax's, with the gradient of the elements it finds."""
    values = input.jax()
    extremes, places = run(jax.lax.stop_gradient(values), dim % max(1, values.ndim))
    if values.ndim > 0:
        found = jnp.take_along_axis(values, places, dim)
        extremes = jnp.where(jnp.isnan(extremes), extremes, found)
    return _tensor(extremes), _tensor(places)


def _real_fourier(
    input: Tensor, dim: Sequence[int], normalization: int, last_dim_size: int
) -> Tensor:
    """`torch.fft.irfftn`; torchax takes the last size of several dims for even."""
    values = input.jax()
    sizes = [*(values.shape[d] for d in dim[:-1]), last_dim_size]
    norm = ("forward", "ortho", "backward")[normalization]
    return _tensor(jnp.fft.irfftn(values, sizes, tuple(dim), norm))


def _extreme(sign: int, input: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """`torch.max` along a dim, or `torch.min` with the sign -1."""
    values = input.jax()
    if values.ndim == 0:
        return input, _tensor(jnp.zeros((), int))
    dim = dim % values.ndim
    locate = jnp.argmax if sign > 0 else jnp.argmin
    place = locate(values, dim, keepdims=keepdim)
    if jnp.issubdtype(values.dtype, jnp.floating):
        result = sign * largest(sign * values, dim, False)
    else:
        result = jnp.max(values, dim) if sign > 0 else jnp.min(values, dim)
    return _tensor(jnp.expand_dims(result, dim) if keepdim else result), _tensor(place)


def _searchsorted(
    sorted_sequence: Tensor,
    input: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """`torch.searchsorted`; torchax takes no options."""
    rows = sorted_sequence.jax()
    if sorter is not None:
        rows = jnp.take_along_axis(rows, sorter.jax(), axis=-1)
    is_right = right or side == "right"
    values = input.jax() if isinstance(input, torch.Tensor) else jnp.asarray(input)
    find = functools.partial(jnp.searchsorted, side="right" if is_right else "left")
    if rows.ndim == 1:
        return _tensor(find(rows, values))
    found = jax.vmap(find)(rows.reshape(-1, rows.shape[-1]), values.reshape(-1, values.shape[-1]))
    return _tensor(found.reshape(values.shape))


def _new_tensor(input: Tensor, data: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """`new_tensor`; torchax makes one without values."""
    return torch.tensor(data, dtype=dtype or input.dtype)


def _as_array(
    run: Any, obj: Any, *, requires_grad: bool = False, copy: Any = None, **options: Any
) -> Any:
    """`torch.asarray`, which leaves out the gradient of a tensor."""
    if not is_traced(obj):
        return run(obj, **options)
    dtype = options.get("dtype")
    result = obj if dtype is None else obj.to(dtype)
    if copy:
        result = result.clone()
    return result if requires_grad else _detach(result)


def _mean(input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """`torch.mean`; torchax takes no dtype."""
    values = (input if dtype is None else input.to(dtype)).jax()
    all_dims = dim is None or dim == [] or values.ndim == 0
    return _tensor(jnp.mean(values, None if all_dims else dim, keepdims=keepdim))


def _running_logarithm(input: Tensor, dim: int) -> Tensor:
    """`torch.logcumsumexp`; torchax fails on dims below 0."""
    values = input.jax()
    return _tensor(jax.lax.cumlogsumexp(values, dim % values.ndim)) if values.ndim else input


def _repeated(
    input: Tensor, repeats: Any = None, dim: int | None = None, *, output_size: int | None = None
) -> Tensor:
    """`torch.repeat_interleave`; torchax takes no size of the output."""
    values, times = unwrapped((input, repeats))
    if times is None:
        values, times = jnp.arange(len(values)), values
    return _tensor(jnp.repeat(values, times, dim, total_repeat_length=output_size))


def _with_diagonal(input: Tensor, fill_value: float, wrap: bool = False) -> Tensor:
    """The result of `fill_diagonal_`, which PyTorch writes by a view of the diagonal."""
    first, *others = np.indices(input.shape)
    if wrap and input.dim() == 2:
        first = first % (input.shape[1] + 1)
    is_diagonal = np.logical_and.reduce([first == other for other in others])
    return _tensor(jnp.where(is_diagonal, fill_value, input.jax()).astype(input.jax().dtype))


def _leaky_at_random(
    input: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Tensor:
    """`torch.nn.functional.rrelu`."""
    values = input.jax()
    slopes: Any = (lower + upper) / 2
    if training:
        key = environment().get_and_rotate_prng_key(generator)
        slopes = jax.random.uniform(key, values.shape, values.dtype, lower, upper)
    return _tensor(jnp.where(values > 0, values, values * slopes))


def _short_fourier(
    run: Any,
    input: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    *args: Any,
    **options: Any,
) -> Tensor:
    """`torch.stft`, which writes a short window into a part of zeros."""
    if win_length is not None and win_length < n_fft:
        values = jnp.ones(win_length) if window is None else window.jax()
        window = _tensor(signals.centered(values, n_fft))
    return run(input, n_fft, hop_length or n_fft // 4, n_fft, window, *args, **options)


def _inverse_short_fourier(
    input: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> Tensor:
    """`torch.istft`; not a number where the windows are 0 and PyTorch raises."""
    values = jnp.ones(win_length or n_fft) if window is None else window.jax()
    is_half = input.shape[-2] != n_fft if onesided is None else onesided
    return _tensor(
        signals.waves(
            input.jax(),
            signals.centered(values, n_fft),
            hop_length or n_fft // 4,
            center,
            "ortho" if normalized else "backward",
            is_half,
            return_complex,
            length,
        )
    )


def _take_along(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """`torch.take_along_dim`, which refuses the indices of 32 bits that JAX makes."""
    return _tensor(jnp.take_along_axis(input.jax(), indices.jax(), dim))


def _normal(
    mean: Any = 0.0,
    std: Any = 1.0,
    size: Any = None,
    *,
    generator: Any = None,
    dtype: Any = None,
    **options: Any,
) -> Tensor:
    """`torch.normal` of tensors and numbers; it has no gradient."""
    mean, std = unwrapped((mean, std))
    shape = jnp.broadcast_shapes(jnp.shape(mean), jnp.shape(std)) if size is None else tuple(size)
    key = environment().get_and_rotate_prng_key(generator)
    result = _tensor(jax.lax.stop_gradient(noise.normal(key, shape, mean, std)))
    return result if dtype is None else result.to(dtype)


def _multinomial(
    input: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None
) -> Tensor:
    """`torch.multinomial`; torchax draws the same classes for all rows."""
    key = environment().get_and_rotate_prng_key(generator)
    return _tensor(noise.choices(key, input.jax(), num_samples, replacement))


def _filled(
    draw: Any, target: Tensor, *parameters: Any, generator: Any = None, **named: Any
) -> Tensor:
    """A tensor filled in place with random numbers of some parameters."""
    key = environment().get_and_rotate_prng_key(generator)
    given, named = unwrapped((parameters, named))
    target._elem = draw(key, tuple(target.shape), *given, **named).astype(target.jax().dtype)
    return target


def _solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    """`torch.linalg.solve`; torchax takes a square b for a batch of vectors."""
    matrices = a.jax()
    values = b.jax()
    is_vector = values.ndim == 1 or values.shape == matrices.shape[:-1]
    if is_vector:
        values = values[..., None]
    if left or is_vector:
        result = jnp.linalg.solve(matrices, values)
    else:
        turned = jnp.linalg.solve(jnp.matrix_transpose(matrices), jnp.matrix_transpose(values))
        result = jnp.matrix_transpose(turned)
    return _tensor(result[..., 0] if is_vector else result)


def _transposed_convolution(
    convolution: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """A transposed convolution, each group by itself: torchax mixes up their channels."""
    inputs = torch.chunk(input, groups, dim=-weight.dim() + 1)
    kernels = torch.chunk(weight, groups, dim=0)
    results = [
        convolution(part, kernel, None, stride, padding, output_padding, 1, dilation)
        for part, kernel in zip(inputs, kernels, strict=True)
    ]
    result = torch.cat(results, dim=-weight.dim() + 1)
    if bias is None:
        return result
    return result + bias.reshape(-1, *[1] * (weight.dim() - 2))


def _move_average(average: Tensor, value: jax.Array, momentum: float | Tensor) -> None:
    old = average.jax()
    share: Any = momentum.jax() if isinstance(momentum, torchax.Tensor) else momentum
    new = (1 - share) * old + share * jax.lax.stop_gradient(value)
    average._elem = new.astype(old.dtype)


def _normalized(forward: Any, module: Any, input: Tensor) -> Tensor:
    """`forward` of a batch normalization. With momentum=None, where PyTorch reads the number of
    batches in Python, averages of all batches."""
    averages = module.training and module.momentum is None and module.track_running_stats
    if not averages:
        return forward(module, input)
    module._check_input_dim(input)
    module.num_batches_tracked.add_(1)
    return torch.nn.functional.batch_norm(
        input,
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        True,
        1.0 / module.num_batches_tracked,
        module.eps,
    )


def _checkpointed(run: Any, *args: Any) -> Any:
    """The function of `torch.utils.checkpoint`, called with its inputs.

    The newer way calls it elsewhere, and here keeps the inputs for a tensor: none for one without a
    gradient.
    """
    return run(*args[1:]) if callable(run) else run.detach()


_DERIVATIVES = ("jacobian", "hessian", "vjp", "jvp", "vhp", "hvp")
"""Functions of torch.autograd.functional, which are zero without PyTorch's own gradients."""
_SIDES = ("input", "output")
"""Of a module, for which PyTorch sets up hooks on the backward pass."""


@contextmanager
def _refused_extensions() -> Iterator[None]:
    """Inside, custom backward functions, gradients by PyTorch, `tensor.data` and items set in views
    raise a CaptureError."""
    environment().read_attributes.clear()
    environment().outer.clear()
    replaced = _replaced_attributes()
    originals = [vars(owner).get(name) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(replaced, originals, strict=True):
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _replaced_attributes() -> Sequence[tuple[Any, str, Any]]:
    """(owner, name, other value) of attributes of PyTorch and torchax while a step is traced."""
    normalization: Any = torch_norms._BatchNorm
    functional = torch.nn.functional
    return (
        (normalization, "forward", _before(normalization.forward, _normalized)),
        (torch.nn.Module, "__getattribute__", _read_attribute),
        (
            functional,
            "handle_torch_function",
            _before(functional.handle_torch_function, _hand_over_all),
        ),
        (torchax.Tensor, "__setitem__", _before(torchax.Tensor.__setitem__, _set_item)),
        (torchax.Tensor, "flatten", torch.Tensor.flatten),
        (torchax.Tensor, "detach", torch.Tensor.detach),
        # torchax's own operations read it of a view, too, and set it
        (torchax.View, "_elem", property(torchax.View.jax, torchax.View.update)),
        # torchax's own converts the tensor itself
        (torchax.Tensor, "type_as", lambda tensor, other: tensor.to(other.dtype)),
        (torch.Tensor, "backward", _refuse_gradients),
        (torch.autograd, "backward", _refuse_gradients),
        (torch.autograd, "grad", _refuse_gradients),
        *((torch.autograd.functional, name, _refuse_gradients) for name in _DERIVATIVES),
        (torch.autograd.Function, "apply", classmethod(_refuse_function)),
        *((torch_hooks.BackwardHook, f"setup_{side}_hook", _unhooked) for side in _SIDES),
        (torchax.Tensor, "data", property(_read_data)),
        # a check of values, which raises in Python
        (torch.distributions.Distribution, "_validate_args", False),
        (torch.nn.init, "_no_grad_trunc_normal_", functools.partial(_filled, noise.truncated)),
    )


def _before(original: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function or method that calls `function` with the `original` that it replaces."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    return replacement


def _refuse_function(function: type, *args: Any, **kwargs: Any) -> Any:
    if function.__module__ == "torch.utils.checkpoint":
        return _checkpointed(*args)
    raise CaptureError(
        f"The custom backward of {function.__name__} (torch.autograd.Function) cannot be used "
        "in JAX. Write its forward pass with PyTorch's operations, which are differentiated."
    )


def _refuse_gradients(*args: Any, **kwargs: Any) -> Any:
    raise CaptureError(
        "The step computes gradients itself (backward, torch.autograd.grad or functional), "
        "which has no counterpart in JAX. Return the loss alone, or write the derivative as a "
        "formula."
    )


def _unhooked(hook: Any, values: Any) -> Any:
    """The values that a hook on the backward pass would be set up for."""
    return values


def _read_data(tensor: Any) -> Any:
    raise CaptureError(
        "tensor.data inside a forward pass has no counterpart in JAX. Write tensor.detach()."
    )


def _read_attribute(module: Any, name: str) -> Any:
    """An attribute of a module; one without a value of the step is noted."""
    try:
        value = object.__getattribute__(module, name)
    except AttributeError:
        environment().read_attributes.add((id(module), name))
        raise
    is_outer = value is None or isinstance(value, torch.Tensor) and not is_traced(value)
    if is_outer and name in object.__getattribute__(module, "__dict__"):
        environment().read_attributes.add((id(module), name))
    return value


def _hand_over_all(run: Any, function: Any, relevant: Any, *args: Any, **kwargs: Any) -> Any:
    """`handle_torch_function` with the weight of `l1_loss`, which PyTorch 2.10 leaves out."""
    if function is torch.nn.functional.l1_loss and relevant[2] is not None:
        kwargs["weight"] = relevant[2]
    return run(function, relevant, *args, **kwargs)


def _set_item(run: Any, tensor: Any, key: Any, value: Any) -> None:
    """`tensor[key] = value`, with the change noted."""
    _check_current(tensor)
    if isinstance(value, torch.Tensor) and not is_traced(value):
        value = environment().to_xla(value)
    before = tensor.jax()
    run(tensor, _index(key), value)
    _note_change(tensor)
    if not torch.is_grad_enabled():
        tensor._elem = _with_gradient_of(tensor.jax(), before)
