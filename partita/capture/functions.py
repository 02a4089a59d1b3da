"""A call of any jittable training step, taken apart: which leaves are the state that a step replaces, which the batch, which static.

A step may return its new state (plain JAX, Optax, Linen, Equinox) or change its arguments in place (NNX): the arguments' leaves
are looked at again after the call. An argument that comes back, with the same structure and shapes, is state; what leads
with the batch size is batch; other arrays are read and never change. Leaves that are no arrays are static.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from partita.capture.jax_functions import Captured, Leaf, capture_step
from partita.errors import CaptureError

SCALARS = (bool, int, float, complex)


@dataclass(frozen=True)
class Call:
    """The arguments of one call: leaves in order, those that are arrays told from those that are static."""

    tree: Any
    leaves: tuple[Any, ...]
    dynamic: tuple[int, ...]
    """Positions of the leaves that are arrays."""
    paths: tuple[str, ...]
    """Per leaf, its path from the argument's name on: `params/dense/kernel`."""
    argument: tuple[int, ...]
    """Per leaf, the argument it is in."""

    @property
    def arrays(self) -> list[Any]:
        return [self.leaves[i] for i in self.dynamic]

    @property
    def key(self) -> Any:
        """Equal for two calls that one compiled step can serve. Static leaves that cannot be hashed are told apart by identity."""
        dynamic = set(self.dynamic)
        static = [(i, _hashable(x)) for i, x in enumerate(self.leaves) if i not in dynamic]
        return self.tree, tuple(static), tuple((np.shape(x), str(_dtype(x))) for x in self.arrays)

    def with_arrays(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) of this call with other arrays in it."""
        leaves = list(self.leaves)
        for i, x in zip(self.dynamic, arrays, strict=True):
            leaves[i] = x
        return jax.tree.unflatten(self.tree, leaves)


def call_of(
    function: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    static: Sequence[int] = (),
    scalars: bool = False,
) -> Call:
    """A call taken apart. `static` are positions of arguments that are static; `scalars`: so are Python numbers."""
    named = _names(function, len(args))
    leaves, tree = jax.tree_util.tree_flatten_with_path((tuple(args), dict(kwargs)))
    paths, argument, dynamic = [], [], []
    for i, (path, leaf) in enumerate(leaves):
        inner = jax.tree_util.keystr(path[2:], simple=True, separator="/")
        place = path[1].idx if path[0].idx == 0 else path[1].key
        name = named[place] if isinstance(place, int) else place
        paths.append(f"{name}/{inner.removesuffix('/value')}" if inner else str(name))
        argument.append(
            place if isinstance(place, int) else len(args) + sorted(kwargs).index(place)
        )
        if _is_array(leaf) or isinstance(leaf, SCALARS) and not scalars and place not in static:
            if place in static:
                continue
            dynamic.append(i)
    return Call(tree, tuple(x for _, x in leaves), tuple(dynamic), tuple(paths), tuple(argument))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _is_value(leaf: Any) -> bool:
    """Whether a leaf of a traced result is an array or a number."""
    return _is_array(leaf) or isinstance(leaf, (*SCALARS, jax.core.Tracer))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _names(function: Any, count: int) -> list[str]:
    """What the function calls its first positional arguments."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else f"arg{i}" for i in range(count)]


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = _dtype(leaf)
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def raw(leaf: Any) -> Any:
    """An array as the captured step takes it: of a typed random key, its data."""
    if jnp.issubdtype(_dtype(leaf), jax.dtypes.prng_key):
        return (
            jax.eval_shape(jax.random.key_data, leaf)
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else jax.random.key_data(leaf)
        )
    return leaf


def _wrapped(leaf: Any, like: Any) -> Any:
    """The reverse of `raw`: `leaf` as an array of the kind of `like`."""
    dtype = _dtype(like)
    return (
        jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))
        if jnp.issubdtype(dtype, jax.dtypes.prng_key)
        else leaf
    )


@dataclass
class Roles:
    """What the arrays of a call are, and where the new state is among what the step gives back. Positions count the arrays."""

    state: tuple[int, ...]
    others: tuple[int, ...]
    outputs: int = 0
    """Leaves of the result that are not new state."""
    tree: Any = None
    """Structure of the result."""
    places: list[tuple[str, Any]] = field(default_factory=list)
    """Per leaf of the result: ("output", n), ("state", n) or ("static", value)."""
    in_place: frozenset[int] = frozenset()
    """Positions in `state` of what the step changed in its arguments."""


@dataclass(frozen=True)
class CapturedCall:
    """A captured step with what is needed to call it as its own function was called."""

    captured: Captured
    call: Call
    roles: Roles

    def split(self, call: Call) -> tuple[list[Any], list[Any]]:
        """The arrays of a call of the same kind as (state, batch)."""
        arrays = [raw(x) for x in call.arrays]
        return [arrays[i] for i in self.roles.state], [arrays[i] for i in self.roles.others]

    def result(self, outputs: Sequence[Any], state: Sequence[Any]) -> Any:
        """What the function would have returned."""
        values = {"output": outputs, "state": state}
        like = self.call.arrays
        leaves = []
        for kind, place in self.roles.places:
            if kind == "static":
                leaves.append(place)
            elif kind == "state":
                leaves.append(_wrapped(state[place], like[self.roles.state[place]]))
            else:
                leaves.append(values[kind][place])
        return jax.tree.unflatten(self.roles.tree, leaves)

    def update_in_place(
        self, call: Call, args: Sequence[Any], kwargs: dict[str, Any], state: Sequence[Any]
    ) -> None:
        """Puts the new state into the arguments that the step changes in place: those of a step of NNX's."""
        if not self.roles.in_place:
            return
        from flax import nnx

        arrays = call.arrays
        for n in self.roles.in_place:
            arrays[self.roles.state[n]] = _wrapped(state[n], arrays[self.roles.state[n]])
        changed = {call.argument[call.dynamic[self.roles.state[n]]] for n in self.roles.in_place}
        for place, (old, new) in enumerate(
            zip(_in_order(args, kwargs), _in_order(*call.with_arrays(arrays)), strict=True)
        ):
            if place in changed:
                nnx.update(old, nnx.state(new))


def _in_order(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments, as `Call.argument` counts them."""
    return [*args, *(kwargs[k] for k in sorted(kwargs))]


def capture_call(function: Callable[..., Any], call: Call, name: str = "") -> CapturedCall:
    """The training step that `function` is, for calls like this one, as an OperatorGraph. Nothing is run."""
    name = name or getattr(function, "__name__", type(function).__name__)
    shapes = [_shape(x) for x in call.arrays]
    seen: dict[str, Any] = {}

    def run(arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        before = [_wrapped(x, like) for x, like in zip(arrays, call.arrays, strict=True)]
        args, kwargs = call.with_arrays(before)
        result = function(*args, **kwargs)
        after = [jax.tree.leaves((args, kwargs))[i] for i in call.dynamic]
        seen["changed"] = [
            i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old is not new
        ]
        seen["result"], seen["tree"] = jax.tree.flatten(result)
        seen["nodes"] = result
        seen["after"] = after = [raw(x) for x in after]
        return [raw(x) for x in seen["result"] if _is_value(x)], after

    roles: list[Roles] = []

    def look(arrays: Sequence[Any]) -> list[Any]:
        run(arrays)
        roles.append(_roles(call, shapes, seen, seen["changed"]))
        return []

    try:
        jax.eval_shape(look, [raw(s) for s in shapes])
    except Exception as error:
        text = str(error).strip().splitlines()
        raise CaptureError(
            f"The step '{name}' cannot be captured: {type(error).__name__}: {text[0] if text else ''}"
        ) from error
    role = roles[0]
    if not role.state:
        raise CaptureError(
            f"The step '{name}' gives none of its arguments back, so it has no state to train. Return the new parameters with the "
            "structure and shapes of the old ones, as in: params, opt_state, loss = step(params, opt_state, batch)."
        )

    def step(state: Sequence[Any], batch: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        arrays: list[Any] = [None] * len(call.dynamic)
        for i, x in zip((*role.state, *role.others), (*state, *batch), strict=True):
            arrays[i] = x
        run(arrays)
        new: list[Any] = [
            seen["after"][i] if n in role.in_place else None for n, i in enumerate(role.state)
        ]
        outputs: list[Any] = []
        for (kind, place), leaf in zip(role.places, seen["result"], strict=True):
            if kind == "state":
                new[place] = raw(leaf)
            elif kind == "output":
                outputs.append(leaf)
        return outputs, new

    path = lambda i: call.paths[call.dynamic[i]]
    size = _batch_size(call, shapes, role)
    state_shapes, batch_shapes = (
        [raw(shapes[i]) for i in group] for group in (role.state, role.others)
    )
    is_batch = [
        bool(shapes[i].shape) and shapes[i].shape[0] == size and not _is_key(shapes[i])
        for i in role.others
    ]
    captured = capture_step(
        step,
        state_shapes,
        batch_shapes,
        [path(i) for i in role.state],
        name,
        size,
        [
            Leaf(path(i), "batch" if b else "state")
            for i, b in zip(role.others, is_batch, strict=True)
        ],
    )
    return CapturedCall(captured, call, role)


def _is_key(shape: Any) -> bool:
    """Whether this is a random key: a typed one, or the two words of an old one."""
    return (
        jnp.issubdtype(shape.dtype, jax.dtypes.prng_key)
        or shape.dtype == np.uint32
        and shape.shape == (2,)
    )


def _roles(
    call: Call, shapes: Sequence[Any], seen: dict[str, Any], in_place: Sequence[int]
) -> Roles:
    """Which arrays are state: what is changed in place, and every argument that comes back whole somewhere in the result."""
    by_argument: dict[int, list[int]] = {}
    for i, leaf in enumerate(call.dynamic):
        by_argument.setdefault(call.argument[leaf], []).append(i)
    args, kwargs = jax.tree.unflatten(call.tree, list(range(len(call.leaves))))
    values = _in_order(args, kwargs)
    position = {leaf: i for i, leaf in enumerate(call.dynamic)}
    nodes = list(_subtrees(seen["nodes"]))
    taken: set[int] = set()
    found: dict[int, int] = {}
    """Array -> leaf of the result that replaces it."""
    complete = True  # whether every argument so far is state
    for _place, value in enumerate(values):
        leaves, tree = jax.tree.flatten(value)
        arrays = [position[n] for n in leaves if n in position]
        if not arrays or set(arrays) & set(in_place):
            continue
        wanted = [(shapes[i].shape, str(shapes[i].dtype)) for i in arrays]
        single = len(arrays) == 1 and not complete
        for first, node in nodes:
            own, node_tree = jax.tree.flatten(node)
            spots = [first + k for k, n in enumerate(leaves) if n in position]
            if single or node_tree != tree or taken & set(spots):
                continue
            given = [own[s - first] for s in spots]
            if (
                all(map(_is_value, given))
                and [(np.shape(x), str(_dtype(x))) for x in given] == wanted
            ):
                taken.update(spots)
                found.update(zip(arrays, spots, strict=True))
                break
        else:
            complete = False
    state = tuple(i for i in range(len(shapes)) if i in found or i in in_place)
    others = tuple(i for i in range(len(shapes)) if i not in found and i not in in_place)
    number = {spot: state.index(i) for i, spot in found.items()}
    places: list[tuple[str, Any]] = []
    outputs = 0
    for spot, leaf in enumerate(seen["result"]):
        if spot in number:
            places.append(("state", number[spot]))
        elif _is_value(leaf):
            places.append(("output", outputs))
            outputs += 1
        else:
            places.append(("static", leaf))
    return Roles(
        state, others, outputs, seen["tree"], places, frozenset(state.index(i) for i in in_place)
    )


def _subtrees(tree: Any, first: int = 0) -> Any:
    """Every node of a tree, outer first, with the position of its first leaf."""
    yield first, tree
    children = jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    if len(children) == 1 and children[0] is tree:
        return
    for child in children:
        yield from _subtrees(child, first)
        first += len(jax.tree.leaves(child))


def _batch_size(call: Call, shapes: Sequence[Any], roles: Roles) -> int:
    """Dim 0 of the last argument that is not state and no key: there the batch is."""
    for i in reversed(roles.others):
        last = call.argument[call.dynamic[i]]
        for j in roles.others:
            if (
                call.argument[call.dynamic[j]] == last
                and shapes[j].shape
                and not _is_key(shapes[j])
            ):
                return shapes[j].shape[0]
    return 0
