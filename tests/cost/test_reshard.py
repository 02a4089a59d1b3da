"""Steps of a reshard equal those of Shardy's pass, on all small pairs and on random larger ones."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partita.cost.reshard import ReshardStep, Sharding, emitted_steps, reshard_steps, step_bytes

Reshard = tuple[tuple[int, ...], tuple[int, ...], Sharding, Sharding]
"""Global shape, axis sizes, source, target."""
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def shardings(rank: int, axes: int) -> list[Sharding]:
    """Every way to split `rank` dims over some of the axes, in every order."""
    return [
        tuple(order[start:stop] for start, stop in itertools.pairwise((0, *cuts, count)))
        for count in range(axes + 1)
        for order in itertools.permutations(range(axes), count)
        for cuts in itertools.combinations_with_replacement(range(count + 1), rank - 1)
    ]


@st.composite
def reshards(draw, primes=(2, 3, 5), max_rank=4, max_axes=4) -> Reshard:
    rank = draw(st.integers(1, max_rank))
    sizes = tuple(draw(st.lists(st.sampled_from(primes), min_size=1, max_size=max_axes)))

    def sharding() -> Sharding:
        order = draw(st.permutations(range(len(sizes))))
        dims = [draw(st.integers(0, rank)) for _ in order]  # dim == rank: the axis is not used
        return tuple(
            tuple(axis for axis, place in zip(order, dims, strict=True) if place == dim)
            for dim in range(rank)
        )

    source, target = sharding(), sharding()
    shape = tuple(
        math.lcm(*(math.prod(sizes[axis] for axis in side[dim]) for side in (source, target)))
        * draw(st.sampled_from((1, 2, 3, 30)))
        for dim in range(rank)
    )
    return shape, sizes, source, target


# ---- Shardy's pass


def shardy_steps(cases: list[Reshard]) -> list[list[tuple[str, Sharding]]]:
    """Per case, the kind and result of each collective of Shardy's pass.

    Permutes to the same sharding are left out.
    """
    import jax
    from jax.extend.mlir import ir, passmanager
    from jax.extend.mlir.dialects import sdy

    def text(sharding: Sharding) -> str:
        return (
            "["
            + ", ".join("{" + ", ".join(f'"{axis}"' for axis in axes) + "}" for axes in sharding)
            + "]"
        )

    meshes: dict[tuple[int, ...], str] = {}
    functions = []
    for number, (shape, sizes, source, target) in enumerate(cases):
        mesh = meshes.setdefault(sizes, f"@mesh{len(meshes)}")
        kind = f"tensor<{'x'.join(map(str, shape))}xf32>"
        functions.append(
            f"func.func @f{number}"
            f"(%x: {kind} {{sdy.sharding = #sdy.sharding<{mesh}, {text(source)}>}}) -> {kind} {{"
            f" %y = sdy.reshard %x <{mesh}, {text(target)}> : {kind} return %y : {kind} }}"
        )
    lines = []
    for sizes, mesh in meshes.items():
        axes = ", ".join(f'"{axis}"={size}' for axis, size in enumerate(sizes))
        lines.append(f"sdy.mesh {mesh} = <[{axes}]>")

    def read(attribute) -> Sharding:
        dims = [
            sdy.DimensionShardingAttr(dim)
            for dim in sdy.TensorShardingAttr(attribute).dimension_shardings
        ]
        axes = [[sdy.AxisRefAttr(axis) for axis in dim.axes] for dim in dims]
        assert all(axis.sub_axis_info is None for dim in axes for axis in dim), (
            "prime axes are never cut"
        )
        return tuple(tuple(int(axis.name) for axis in dim) for dim in axes)

    program = jax.jit(lambda x: x).lower(0.0).compiler_ir()
    assert program is not None
    with program.context:  # it knows every dialect
        module = ir.Module.parse("\n".join(lines + functions))
        passmanager.PassManager.parse("builtin.module(func.func(sdy-reshard-to-collectives))").run(
            module.operation
        )
        found = []
        for function in (op for op in module.body.operations if op.operation.name == "func.func"):
            before = cases[len(found)][2]
            steps = []
            for op in (op.operation for op in function.regions[0].blocks[0]):
                if (
                    op.name != "func.return"
                    and (result := read(op.attributes["out_sharding"])) != before
                ):
                    steps.append((op.name.removeprefix("sdy."), result))
                    before = result
            found.append(steps)
    return found


def check_against_shardy(cases: list[Reshard]) -> None:
    for case, theirs in zip(cases, shardy_steps(cases), strict=True):
        shape, sizes, source, target = case
        ours = [(step.kind, step.result) for step in reshard_steps(source, target, sizes, shape)]
        end = theirs[-1][1] if theirs else source
        if end != target:  # Shardy itself stops short; never on equal axes
            assert len(set(sizes)) > 1, case
            ours = ours[: len(theirs)]
        assert ours == theirs, case


SMALL_MESHES = [(2,), (2, 2), (2, 3), (2, 2, 2), (2, 2, 3), (3, 2, 2), (2, 3, 5)]


@pytest.mark.parametrize(
    ("rank", "sizes"),
    [*itertools.product((1, 2), SMALL_MESHES), *itertools.product((3,), SMALL_MESHES[:5])],
)
def test_steps_of_every_small_pair_equal_shardys(rank, sizes):
    shape = (2 * math.prod(sizes),) * rank
    every = shardings(rank, len(sizes))
    check_against_shardy([(shape, sizes, source, target) for source in every for target in every])


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(st.lists(reshards(), min_size=1, max_size=25))
def test_steps_of_random_reshards_equal_shardys(cases):
    check_against_shardy(cases)


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(st.lists(reshards(primes=(2,), max_axes=7), min_size=1, max_size=20))
def test_steps_of_random_reshards_over_equal_axes_equal_shardys(cases):
    check_against_shardy(cases)


RARE: list[Reshard] = [
    # an axis that the target has elsewhere is gathered along with others, and not sliced again
    ((60, 5), (2, 5, 3, 3), ((1, 2, 0), ()), ((3,), (1,))),
    # slicing ahead of an all-to-all uses up the room of the dim it leads to
    ((6, 2, 60), (2, 2, 3, 3, 2), ((), (1,), (0,)), ((0, 3), (4,), ())),
    # what enters and what leaves cannot replace each other: their sizes differ
    ((900,), (3, 5, 2, 2), ((0, 2, 1),), ((3,),)),
    # Shardy stops four steps short, and a plain third round would not be enough
    (
        (90, 45, 600, 90),
        (3, 2, 5, 5, 3, 3, 2),
        ((5, 4), (2,), (1, 6), ()),
        ((6, 3), (0, 5), (2, 1), (4,)),
    ),
]


@pytest.mark.parametrize("case", RARE)
def test_rare_turns_are_taken_as_shardy_takes_them(case):
    check_against_shardy([case])
    shape, sizes, source, target = case
    assert reshard_steps(source, target, sizes, shape)[-1].result == target


def test_a_reshard_that_a_third_round_does_not_finish_is_gathered_and_sliced_anew():
    shape, sizes, source, target = RARE[-1]
    *_, gather, cut = reshard_steps(source, target, sizes, shape)
    assert gather == ReshardStep("all_gather", (3, 6), ((), *target[1:]))
    assert cut == ReshardStep("all_slice", (), target)


# ---- laws


@settings(max_examples=1000, deadline=None)
@given(reshards(max_axes=9))
def test_steps_lead_from_source_to_target_and_each_changes_something(case):
    shape, sizes, source, target = case
    for steps in (
        reshard_steps(source, target, sizes, shape),
        emitted_steps(source, target, sizes, shape),
    ):
        path = [source, *(step.result for step in steps)]
        assert path[-1] == target
        assert all(before != after for before, after in itertools.pairwise(path))
        for before, step in zip(path, steps, strict=False):
            local, after = (
                math.prod(sizes[axis] for axes in held for axis in axes)
                for held in (before, step.result)
            )
            group = math.prod(sizes[axis] for axis in step.axes)
            if step.kind == "all_slice":
                assert step.axes == () and after > local
            elif step.kind == "all_gather":
                assert local == after * group
            else:
                assert local == after and group > 1


@given(reshards())
def test_a_sharding_that_stays_costs_nothing(case):
    _, sizes, source, _ = case
    assert reshard_steps(source, source, sizes) == ()


@given(reshards())
def test_dropping_axes_from_the_end_is_one_gather_and_adding_them_is_free(case):
    shape, sizes, sharding, _ = case
    bare = tuple(() for _ in sharding)
    if sharding == bare:
        return
    (gather,) = reshard_steps(sharding, bare, sizes, shape)
    assert gather == ReshardStep("all_gather", tuple(sorted(itertools.chain(*sharding))), bare)
    assert step_bytes(gather, sharding, shape, 4, sizes) == 4 * math.prod(shape)
    (cut,) = reshard_steps(bare, sharding, sizes, shape)
    assert cut == ReshardStep("all_slice", (), sharding)
    assert step_bytes(cut, bare, shape, 4, sizes) == 0


# ---- worked by hand


def test_an_axis_moves_to_another_dim_by_one_all_to_all():
    (step,) = reshard_steps(((0,), ()), ((), (0,)), (2,))
    assert step == ReshardStep("all_to_all", (0,), ((), (0,)))
    assert step_bytes(step, ((0,), ()), (6, 8), 4, (2,)) == 3 * 8 * 4


def test_two_axes_change_places_by_one_permute_over_both():
    steps = reshard_steps(((0,), (1,)), ((1,), (0,)), (2, 2))
    assert steps == (ReshardStep("collective_permute", (0, 1), ((1,), (0,))),)
    assert step_bytes(steps[0], ((0,), (1,)), (8, 8), 4, (2, 2)) == 4 * 4 * 4


def test_a_permute_spans_only_the_axes_whose_place_changes():
    # axis 0 stays the major digit of dim 0 and axis 3 the only one of dim 1; 1 and 2 change places
    (step,) = reshard_steps(((0, 1, 2), (3,)), ((0, 2, 1), (3,)), (2, 2, 2, 2))
    assert (step.kind, step.axes) == ("collective_permute", (1, 2))


def test_a_permute_over_unequal_axes_moves_the_one_in_the_middle_too():
    # axis 0 stays second of three, but its stride in the block number goes from 3 to 2
    permute = reshard_steps(((1, 0),), ((2, 0),), (2, 2, 3))[1]
    assert permute == ReshardStep("collective_permute", (0, 1, 2), ((2, 0, 1),))


def test_the_middle_axis_is_brought_to_the_end_carried_over_and_the_rest_gathered():
    before, after = ((0, 1, 2), ()), ((), (1,))
    steps = reshard_steps(before, after, (2, 2, 2))
    assert steps == (
        ReshardStep("collective_permute", (1, 2), ((0, 2, 1), ())),
        ReshardStep("all_to_all", (1,), ((0, 2), (1,))),
        ReshardStep("all_gather", (0, 2), ((), (1,))),
    )
    path = (before, *(step.result for step in steps))
    costs = [
        step_bytes(step, held, (8, 8), 1, (2, 2, 2))
        for held, step in zip(path, steps, strict=False)
    ]
    assert costs == [8, 8, 32]  # 64 elements: an eighth, an eighth, and the gathered half


def test_a_dim_is_sliced_ahead_of_an_all_to_all_only_where_it_divides():
    source, target = ((0,), ()), ((), (0, 1))
    assert reshard_steps(source, target, (2, 2), (8, 8)) == (
        ReshardStep("all_slice", (), ((0, 1), ())),
        ReshardStep("all_to_all", (0, 1), target),
    )
    assert reshard_steps(source, target, (2, 2), (2, 8))[0] == ReshardStep(
        "all_slice", (), ((0,), (1,))
    )


def test_a_gather_along_two_dims_is_emitted_as_two_and_costs_both():
    source, bare, sizes = ((0,), (1,)), ((), ()), (2, 3)
    assert reshard_steps(source, bare, sizes) == (ReshardStep("all_gather", (0, 1), bare),)
    first, second = emitted_steps(source, bare, sizes)
    assert first == ReshardStep("all_gather", (1,), ((0,), ()))
    assert second == ReshardStep("all_gather", (0,), bare)
    assert step_bytes(first, source, (6, 6), 1, sizes) == 18
    assert step_bytes(second, first.result, (6, 6), 1, sizes) == 36


def test_an_uneven_dim_is_padded():
    step = ReshardStep("all_gather", (0,), ((), (1,)))
    assert step_bytes(step, ((0,), (1,)), (5, 5), 4, (2, 2)) == 5 * 3 * 4
    move = ReshardStep("all_to_all", (0,), ((), (0,)))
    assert step_bytes(move, ((0,), ()), (5, 5), 4, (2,)) == 3 * 5 * 4


def test_a_composite_axis_that_would_be_cut_is_refused():
    with pytest.raises(
        ValueError, match=r"cuts mesh axis 0 \(4\) into sub-axes. Use axes of prime size"
    ):
        reshard_steps(((0,), ()), ((1,), ()), (4, 2))


def test_shardy_stops_short_on_some_unequal_meshes_and_we_do_not():
    shape, sizes, source, target = (12, 12, 12), (2, 2, 3), ((), (1, 0), (2,)), ((), (2, 0), (1,))
    (theirs,) = shardy_steps([(shape, sizes, source, target)])
    assert theirs[-1][1] == ((), (0, 2), (1,))
    assert reshard_steps(source, target, sizes, shape)[-1] == ReshardStep(
        "collective_permute", (0, 2), target
    )


# ---- compiled programs

EMITTED = """
import collections, json, math, re, sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from partita.cost.reshard import emitted_steps, step_bytes

sizes, shape = (2, 2, 2), (48, 96, 144)
mesh = jax.make_mesh(sizes, ("0", "1", "2"), axis_types=(AxisType.Auto,) * 3)
def place(sharding):
    return NamedSharding(mesh, PartitionSpec(*(tuple(map(str, axes)) for axes in sharding)))

PATTERN = r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)\\("
for source, target in eval(sys.argv[1]):
    dims = shape[: len(source)]
    path, planned = [source], collections.Counter()
    for step in emitted_steps(source, target, sizes, dims):
        if step.kind != "all_slice":
            planned[step.kind.replace("_", "-"), step_bytes(step, path[-1], dims, 4, sizes)] += 1
        path.append(step.result)

    def walk(x):
        x = x * 2
        for sharding in path:
            x = jax.lax.with_sharding_constraint(x, place(sharding))
        return jnp.sin(x)

    argument = jax.ShapeDtypeStruct(dims, jnp.float32, sharding=place(source))
    text = jax.jit(walk).lower(argument).compile().as_text()
    emitted = collections.Counter()
    for line in text.splitlines():
        if found := re.search(PATTERN, re.sub(r"/\\*.*?\\*/", "", line)):
            parts = re.findall(r"f32\\[([\\d,]*)\\]", found[1])
            emitted[found[2], sum(4 * math.prod(map(int, part.split(","))) for part in parts)] += 1
    assert emitted == planned, (source, target, planned, emitted)
"""


def test_the_compiler_emits_the_pinned_steps():
    cases = [
        (((0, 1), ()), ((), ())),
        (((0,), (1,)), ((), ())),
        (((2, 0), (1,)), ((), ())),
        (((0, 1), ()), ((), (0, 1))),
        (((0,), (1,)), ((1,), (0,))),
        (((0,), ()), ((1,), ())),
        (((0,), ()), ((), (0, 1))),
        (((0, 1, 2), (), ()), ((), (1,), ())),
        (((0,), (1,), ()), ((), (2,), (0,))),
        (((0,), (1,), ()), ((), (), (1, 0))),
    ]
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
    }
    ran = subprocess.run(
        [sys.executable, "-c", EMITTED, repr(cases)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
