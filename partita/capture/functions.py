"""A call of any jittable training step, taken apart into state, batch and static arguments.

A step may return its new state (plain JAX, Optax, Linen, Equinox) or change its arguments in place
(NNX): the leaves of the arguments are read again after the call. An argument that comes back, with
the same structure and shapes, is state. Arrays that lead with the batch size are the batch; other
arrays never change. Leaves that are no arrays are static.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from partita.capture.jax_functions import Captured, Leaf, capture_step, reason
from partita.capture.targets import CaptureTarget, choices_for
from partita.errors import CaptureError

SCALARS = (bool, int, float, complex)


@dataclass(frozen=True)
class Call:
    """The arguments of one call, as leaves in order."""

    tree: Any
    leaves: tuple[Any, ...]
    dynamic: tuple[int, ...]
    """Positions of the leaves that are arrays. The others are static."""
    paths: tuple[str, ...]
    """Per leaf, its path from the argument's name on: `params/dense/kernel`."""
    argument: tuple[int, ...]
    """Per leaf, the number of its argument."""

    @property
    def arrays(self) -> list[Any]:
        """The leaves that are arrays."""
        return [self.leaves[i] for i in self.dynamic]

    @property
    def key(self) -> Any:
        """Equal for two calls that one compiled step can serve.

        Static leaves that cannot be hashed are compared by identity.
        """
        dynamic = set(self.dynamic)
        static = tuple(
            (i, _hashable(leaf)) for i, leaf in enumerate(self.leaves) if i not in dynamic
        )
        return self.tree, static, tuple(_signature(array) for array in self.arrays)

    def with_arrays(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) of this call with other arrays in it."""
        leaves = list(self.leaves)
        for i, array in zip(self.dynamic, arrays, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(self.tree, leaves)


def call_of(
    function: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    static: Sequence[int] = (),
    scalars: bool = False,
) -> Call:
    """A call taken apart.

    `static` are positions of static arguments. With `scalars`, Python numbers are static as well.
    """
    names = _argument_names(function, len(args))
    keywords = sorted(kwargs)
    leaves, tree = jax.tree_util.tree_flatten_with_path((tuple(args), dict(kwargs)))
    paths = []
    arguments = []
    dynamic = []
    for i, (path, leaf) in enumerate(leaves):
        inner = jax.tree_util.keystr(path[2:], simple=True, separator="/")
        is_positional = path[0].idx == 0
        if is_positional:
            argument = path[1].idx
            name = names[argument]
        else:
            name = path[1].key
            argument = len(args) + keywords.index(name)
        paths.append(f"{name}/{inner.removesuffix('/value')}" if inner else str(name))
        arguments.append(argument)
        is_static = is_positional and argument in static
        is_number = isinstance(leaf, SCALARS) and not scalars
        if not is_static and (_is_array(leaf) or is_number):
            dynamic.append(i)
    return Call(
        tree,
        tuple(leaf for _, leaf in leaves),
        tuple(dynamic),
        tuple(paths),
        tuple(arguments),
    )


def _argument_names(function: Any, count: int) -> list[str]:
    """The names of a function's first positional arguments."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unnamed = [f"arg{i}" for i in range(len(names), count)]
    return [*names[:count], *unnamed]


# ---- leaves


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _is_value(leaf: Any) -> bool:
    """Whether a leaf of a traced result is an array or a number."""
    return _is_array(leaf) or isinstance(leaf, (*SCALARS, jax.core.Tracer))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)


def _signature(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype."""
    return np.shape(leaf), str(_dtype(leaf))


def _hashable(value: Any) -> Any:
    """The value, or its identity if it cannot be hashed."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf after JAX has converted it."""
    dtype = _dtype(leaf)
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def _is_typed_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys."""
    return jnp.issubdtype(_dtype(leaf), jax.dtypes.prng_key)


def _is_key(shape: Any) -> bool:
    """Whether this is a random key: a typed one, or the two words of an old one."""
    return _is_typed_key(shape) or (shape.dtype == np.uint32 and shape.shape == (2,))


def raw(leaf: Any) -> Any:
    """An array in the form that the captured step takes: a typed random key becomes its data."""
    if not _is_typed_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _wrapped(leaf: Any, like: Any) -> Any:
    """The reverse of `raw`: `leaf` as an array of the kind of `like`."""
    if not _is_typed_key(like):
        return leaf
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))


def _in_order(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments, as `Call.argument` numbers them."""
    return [*args, *(kwargs[name] for name in sorted(kwargs))]


# ---- captured calls


@dataclass
class Roles:
    """The roles of a call's arrays, and the places of the new state in the result.

    Positions count the arrays.
    """

    state: tuple[int, ...]
    others: tuple[int, ...]
    outputs: int = 0
    """Number of leaves of the result that are not new state."""
    tree: Any = None
    """Structure of the result."""
    places: list[tuple[str, Any]] = field(default_factory=list)
    """Per leaf of the result: ("output", n), ("state", n) or ("static", value)."""
    in_place: frozenset[int] = frozenset()
    """Positions in `state` of the arrays that the step changes in its arguments."""


@dataclass(frozen=True)
class CapturedCall:
    """A captured step, callable as its own function is called."""

    captured: Captured
    call: Call
    roles: Roles

    def split(self, call: Call) -> tuple[list[Any], list[Any]]:
        """The arrays of a call of the same kind as (state, batch)."""
        arrays = [raw(array) for array in call.arrays]
        state = [arrays[i] for i in self.roles.state]
        batch = [arrays[i] for i in self.roles.others]
        return state, batch

    def result(self, outputs: Sequence[Any], state: Sequence[Any]) -> Any:
        """The return value of the function."""
        arrays = self.call.arrays
        leaves = []
        for kind, place in self.roles.places:
            if kind == "static":
                leaves.append(place)
            elif kind == "state":
                leaves.append(_wrapped(state[place], arrays[self.roles.state[place]]))
            else:
                leaves.append(outputs[place])
        return jax.tree.unflatten(self.roles.tree, leaves)

    def update_in_place(
        self,
        call: Call,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        state: Sequence[Any],
    ) -> None:
        """Puts the new state into the arguments that a step of NNX changes in place."""
        if not self.roles.in_place:
            return
        from flax import nnx

        arrays = call.arrays
        changed = set()
        for n in self.roles.in_place:
            position = self.roles.state[n]
            arrays[position] = _wrapped(state[n], arrays[position])
            changed.add(call.argument[call.dynamic[position]])
        old_arguments = _in_order(args, kwargs)
        new_arguments = _in_order(*call.with_arrays(arrays))
        for number, (old, new) in enumerate(zip(old_arguments, new_arguments, strict=True)):
            if number in changed:
                nnx.update(old, nnx.state(new))


def capture_call(
    function: Callable[..., Any],
    call: Call,
    target: CaptureTarget | None = None,
) -> CapturedCall:
    """The training step `function` as an OperatorGraph, for calls like this one. Nothing is run.

    `target` is the platform that will run the step, by default that of the local devices.
    CaptureError if it cannot be traced, or has no state.
    """
    if target is None:
        target = CaptureTarget.local()
    name = getattr(function, "__name__", type(function).__name__)
    shapes = [_shape(array) for array in call.arrays]
    with choices_for(target):
        roles = _traced_roles(function, call, shapes, name)
    if not roles.state:
        raise CaptureError(
            f"The step '{name}' returns none of its arguments, so it has no state to train. "
            "Return the new parameters with the structure and shapes of the old ones, as in: "
            "params, opt_state, loss = step(params, opt_state, batch)."
        )
    paths = [call.paths[i] for i in call.dynamic]
    batch_size = _batch_size(call, shapes, roles)
    inputs = []
    for i in roles.others:
        shape = shapes[i].shape
        is_batch = bool(shape) and shape[0] == batch_size and not _is_key(shapes[i])
        inputs.append(Leaf(paths[i], "batch" if is_batch else "state"))
    captured = capture_step(
        _plain_step(function, call, roles),
        [raw(shapes[i]) for i in roles.state],
        [raw(shapes[i]) for i in roles.others],
        [paths[i] for i in roles.state],
        name,
        batch_size,
        inputs,
        target,
    )
    return CapturedCall(captured, call, roles)


def _plain_step(
    function: Callable[..., Any],
    call: Call,
    roles: Roles,
) -> Callable[..., Any]:
    """`function` as a step from (state, batch) to (outputs, new state)."""

    def step(state: Sequence[Any], batch: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        arrays: list[Any] = [None] * len(call.dynamic)
        for i, array in zip((*roles.state, *roles.others), (*state, *batch), strict=True):
            arrays[i] = array
        traced = _trace(function, call, arrays)
        new_state: list[Any] = [None] * len(roles.state)
        for n in roles.in_place:
            new_state[n] = traced.after[roles.state[n]]
        outputs: list[Any] = []
        for (kind, place), leaf in zip(roles.places, traced.leaves, strict=True):
            if kind == "state":
                new_state[place] = raw(leaf)
            elif kind == "output":
                outputs.append(leaf)
        return outputs, new_state

    return step


# ---- roles


@dataclass(frozen=True)
class _Traced:
    """A traced call of the function."""

    result: Any
    leaves: list[Any]
    """Of the result."""
    tree: Any
    """Of the result."""
    after: list[Any]
    """The call's arrays after the call."""
    in_place: list[int]
    """Positions of the arrays that the call has replaced in its arguments."""


def _trace(
    function: Callable[..., Any],
    call: Call,
    arrays: Sequence[Any],
) -> _Traced:
    """Calls the function with traced arrays."""
    before = [_wrapped(array, like) for array, like in zip(arrays, call.arrays, strict=True)]
    args, kwargs = call.with_arrays(before)
    result = function(*args, **kwargs)
    argument_leaves = jax.tree.leaves((args, kwargs))
    after = [argument_leaves[i] for i in call.dynamic]
    in_place = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old is not new]
    leaves, tree = jax.tree.flatten(result)
    return _Traced(
        result,
        leaves,
        tree,
        [raw(array) for array in after],
        in_place,
    )


def _traced_roles(
    function: Callable[..., Any],
    call: Call,
    shapes: Sequence[jax.ShapeDtypeStruct],
    name: str,
) -> Roles:
    """The roles of a call's arrays, from a trace of the function.

    CaptureError if it cannot be traced.
    """
    roles: list[Roles] = []

    def look(arrays: Sequence[Any]) -> list[Any]:
        roles.append(_roles(call, shapes, _trace(function, call, arrays)))
        return []

    try:
        jax.eval_shape(look, [raw(shape) for shape in shapes])
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"The step '{name}' cannot be captured: {reason(error)}") from error
    return roles[0]


def _roles(
    call: Call,
    shapes: Sequence[jax.ShapeDtypeStruct],
    traced: _Traced,
) -> Roles:
    """The roles of a call's arrays.

    State are the arrays changed in place, and every argument that comes back whole somewhere in the
    result.
    """
    replaced_by = _replacements(call, shapes, traced)
    state = tuple(i for i in range(len(shapes)) if i in replaced_by or i in traced.in_place)
    others = tuple(i for i in range(len(shapes)) if i not in state)
    state_number = {spot: state.index(i) for i, spot in replaced_by.items()}
    places: list[tuple[str, Any]] = []
    outputs = 0
    for spot, leaf in enumerate(traced.leaves):
        if spot in state_number:
            places.append(("state", state_number[spot]))
        elif _is_value(leaf):
            places.append(("output", outputs))
            outputs += 1
        else:
            places.append(("static", leaf))
    in_place = frozenset(state.index(i) for i in traced.in_place)
    return Roles(
        state,
        others,
        outputs,
        traced.tree,
        places,
        in_place,
    )


def _replacements(
    call: Call,
    shapes: Sequence[jax.ShapeDtypeStruct],
    traced: _Traced,
) -> dict[int, int]:
    """Array -> the leaf of the result that replaces it.

    An argument is replaced by the first node of the result with its structure, shapes and dtypes. A
    single array may be a batch that looks like an output (reconstructed images). So it is only
    replaced if every argument before it is; and if it has dims, not after an output (the loss)
    that follows new state.
    """
    numbers = list(range(len(call.leaves)))
    arguments = _in_order(*jax.tree.unflatten(call.tree, numbers))
    position = {leaf: i for i, leaf in enumerate(call.dynamic)}
    nodes = [(first, *jax.tree.flatten(node)) for first, node in _subtrees(traced.result)]
    taken: set[int] = set()
    replaced_by: dict[int, int] = {}
    all_replaced = True
    for argument in arguments:
        leaves, tree = jax.tree.flatten(argument)
        offsets = [k for k, leaf in enumerate(leaves) if leaf in position]
        arrays = [position[leaves[k]] for k in offsets]
        if not arrays or not set(arrays).isdisjoint(traced.in_place):
            continue
        signatures = [(shapes[i].shape, str(shapes[i].dtype)) for i in arrays]
        candidates = nodes
        if len(arrays) == 1 and shapes[arrays[0]].shape and not _is_key(shapes[arrays[0]]):
            candidates = _before_outputs(nodes, taken)
        spots = None
        if len(arrays) > 1 or all_replaced:
            spots = _matching_spots(candidates, tree, offsets, signatures, taken)
        if spots is None:
            all_replaced = False
        else:
            taken.update(spots)
            replaced_by.update(zip(arrays, spots, strict=True))
    return replaced_by


def _before_outputs(
    nodes: Sequence[tuple[int, list[Any], Any]], taken: set[int]
) -> list[tuple[int, list[Any], Any]]:
    """The nodes of the result up to the first leaf behind new state that is none: all nodes while
    no new state is known."""
    if not taken:
        return list(nodes)
    end = min(taken)
    while end in taken:
        end += 1
    return [node for node in nodes if node[0] <= end]


def _matching_spots(
    nodes: Sequence[tuple[int, list[Any], Any]],
    tree: Any,
    offsets: Sequence[int],
    signatures: Sequence[tuple[tuple[int, ...], str]],
    taken: set[int],
) -> list[int] | None:
    """The leaves at `offsets` of the first node with this structure, these shapes and dtypes.

    None if there is none that is not taken. A node is (its first leaf, its leaves, its structure).
    """
    for first, leaves, node_tree in nodes:
        spots = [first + k for k in offsets]
        if node_tree != tree or not taken.isdisjoint(spots):
            continue
        values = [leaves[k] for k in offsets]
        if not all(map(_is_value, values)):
            continue
        if [_signature(value) for value in values] == signatures:
            return spots
    return None


def _subtrees(tree: Any, first: int = 0) -> Iterator[tuple[int, Any]]:
    """Every node of a tree, outer first, with the position of its first leaf."""
    yield first, tree
    children = jax.tree.leaves(tree, is_leaf=lambda node: node is not tree)
    if len(children) == 1 and children[0] is tree:
        return
    for child in children:
        yield from _subtrees(child, first)
        first += len(jax.tree.leaves(child))


def _batch_size(
    call: Call,
    shapes: Sequence[jax.ShapeDtypeStruct],
    roles: Roles,
) -> int:
    """Dim 0 of the batch, 0 without one: the last argument that is neither state nor a key."""
    argument_of = [call.argument[i] for i in call.dynamic]
    for i in reversed(roles.others):
        for j in roles.others:
            is_same_argument = argument_of[j] == argument_of[i]
            if is_same_argument and shapes[j].shape and not _is_key(shapes[j]):
                return shapes[j].shape[0]
    return 0
