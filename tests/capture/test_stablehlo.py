"""Reading a program: names, phases, trip counts, FLOPs, windows, and equal graphs every time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from partita.capture.jax_functions import Leaf, Text, capture_step
from partita.capture.names import layer_path, phase_of, split_name
from partita.capture.prepare import prepare
from partita.capture.reader import read
from partita.errors import CaptureError
from partita.graph.operator_graph import Window

F32 = "float32"


def captured(loss, *shapes, batch=(8, 4)):
    """The graph of a step of gradient descent on `loss(*weights, data)`."""

    def step(state, data):
        value, slopes = jax.value_and_grad(lambda s: loss(*s, data))(state)
        return {"loss": value}, tuple(w - s for w, s in zip(state, slopes, strict=True))

    state = tuple(jax.ShapeDtypeStruct(s, F32) for s in shapes)
    leaves = [Leaf(f"w{i}", "parameter") for i in range(len(shapes))]
    return capture_step(step, state, jax.ShapeDtypeStruct(batch, F32), leaves, batch_size=batch[0])


@pytest.mark.parametrize(
    ("name", "path", "phase"),
    [
        ("jit(train_step)/jvp(conv1)/conv_general_dilated", "conv1", "forward"),
        ("jit(train_step)/transpose(jvp(block/dense))/dot_general", "block/dense", "backward"),
        ("jit(train_step)/jvp(bn)/jit(_var)/reduce_sum", "bn", "forward"),
        ("jit(train_step)/jvp(lstm)/while/body/closed_call/mul", "lstm", "forward"),
        ("jit(call)/call_exported/jit(train_step)/jvp(out)/dot_general", "out", "forward"),
        ("jit(train_step)/adam/mul", "adam", "update"),
    ],
)
def test_a_location_names_its_layer_and_phase(name, path, phase):
    assert layer_path(name) == path
    assert phase_of(name) == phase


def test_a_name_is_split_only_outside_brackets():
    assert split_name("a/jvp(b/c)/d") == ["a", "jvp(b/c)", "d"]


def test_calls_are_inlined_and_reading_again_gives_the_same_graph():
    helper = jax.jit(lambda x: jnp.tanh(x) * 2)

    def make():
        return captured(lambda w, x: helper(helper(x @ w)).sum(), (4, 6))

    program = make()
    text = program.text.mlir_module()
    assert "func.call" not in text and " call @" not in text
    assert program.graph == make().graph


def test_equal_instructions_are_one():
    graph = captured(lambda w, x: (jnp.exp(x @ w) + jnp.exp(x @ w)).sum(), (4, 6)).graph
    assert sum(x.name == "exponential" for x in graph.instructions) == 1


@pytest.mark.parametrize("loop", ["scan", "fori", "nested"])
def test_a_loop_counts_its_trips(loop):
    def loss(w, x):
        def once(h):
            return jnp.tanh(h @ w)

        if loop == "scan":
            h = jax.lax.scan(lambda h, _: (once(h), None), x, None, length=7)[0]
        elif loop == "fori":
            h = jax.lax.fori_loop(0, 7, lambda _, h: once(h), x)
        else:

            def inner(h):
                return jax.lax.scan(lambda g, _: (once(g), None), h, None, length=7)[0]

            h = jax.lax.scan(lambda h, _: (inner(h), None), x, None, length=3)[0]
        return h.sum()

    graph = captured(loss, (4, 4)).graph
    trips = {
        x.trips for x in graph.instructions if x.name == "dot_general" and x.phase == "forward"
    }
    assert trips == {21 if loop == "nested" else 7}
    assert graph.flops >= 2 * 8 * 4 * 4 * next(iter(trips))


def test_a_loop_of_unknown_length_is_noted():
    def loss(w, x):
        h = jax.lax.stop_gradient(
            jax.lax.while_loop(lambda h: h.sum() < 5, lambda h: h @ jnp.ones((4, 4)) + 1, x)
        )
        return (h @ w).sum()

    assert any("trip count" in note for note in captured(loss, (4, 2)).graph.notes)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [
        (1, "SAME", 1, 1),
        (2, "SAME", 1, 1),
        (2, "VALID", 1, 1),
        (1, "SAME", 2, 1),
        (1, "SAME", 1, 4),
    ],
)
def test_a_convolution_counts_as_the_compiler_counts(stride, padding, dilation, groups):
    def convolve(w, x):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    weights, images = (3, 3, 8 // groups, 16), (2, 12, 12, 8)
    graph = captured(lambda w, x: convolve(w, x).sum(), weights, batch=images).graph
    (counted,) = [
        x.flops for x in graph.instructions if x.name == "convolution" and x.phase == "forward"
    ]
    shape = jax.ShapeDtypeStruct
    compiled = (
        jax.jit(convolve)
        .lower(shape(weights, F32), shape(images, F32))
        .compile()
        .cost_analysis()["flops"]
    )
    assert counted == pytest.approx(compiled, rel=1e-3)


def test_the_windows_of_a_strided_convolution_forwards_and_backwards():
    def loss(w, x):
        y = jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (y * y).sum()

    graph = captured(loss, (7, 7, 3, 8), batch=(2, 16, 16, 3)).graph
    windows = {
        (x.phase, w) for x in graph.instructions if x.name == "convolution" for _, w in x.windows
    }
    assert ("forward", Window(16, 8, 2, 2, 7, 1)) in windows
    # The weight gradient: every element of the result is one place of the window.
    assert ("backward", Window(16, 8, 2, 2, 7, 1)) in windows


@pytest.mark.parametrize(
    ("einsum", "left", "right"),
    [
        ("bi,io->bo", (8, 16), (16, 32)),
        ("bti,ihk->bthk", (2, 3, 4), (4, 5, 6)),
        ("zti,zio->zto", (2, 3, 4), (2, 4, 5)),
        ("bi,io->ob", (8, 16), (16, 32)),
    ],
)
def test_products_that_are_only_read_transposed_exchange_their_sides(
    einsum: str, left: tuple, right: tuple
) -> None:
    def gradient(x, w):
        return jax.grad(
            lambda w: jnp.sum(jnp.einsum(einsum, x, w, precision=("highest", "default")) ** 3)
        )(w)

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=left).astype("float32"), rng.normal(size=right).astype("float32")
    exported = export.export(jax.jit(gradient))(x, w)
    source = prepare(exported.mlir_module_serialized, "cpu")
    names = [i.name for i in read(source).instructions]
    assert "transpose" not in names and names.count("dot_general") == 2
    assert np.allclose(Text.of(exported, source).call(x, w), gradient(x, w), rtol=1e-5)


def test_the_largest_values_and_fourier_transforms_are_read_and_run() -> None:
    def loss(w, x):
        largest, where = jax.lax.top_k(x @ w, 3)
        wave = jnp.fft.rfft(x @ w) * (1 + 2j)
        return jnp.sum(largest * jnp.take(w, where)[..., 0, :1]) + jnp.sum(jnp.abs(wave))

    program = captured(loss, (4, 6))
    assert {"sort", "fft"} <= {x.name for x in program.graph.instructions}
    w, x = (
        np.linspace(-1, 2, 24, dtype=F32).reshape(4, 6),
        np.linspace(0, 1, 32, dtype=F32).reshape(8, 4),
    )
    outputs, _ = jax.jit(program.text.call)((w,), x)
    np.testing.assert_allclose(outputs["loss"], loss(w, x), rtol=1e-5)


@pytest.mark.parametrize("form", ["rows", "stacked", "slices", "unrolled"])
def test_microbatches_are_split_by_their_samples(form):
    shape = (2, 6, 4) if form == "stacked" else (12, 4)

    def loss(w, x):
        one = lambda total, x: (total + jnp.sum((x @ w) ** 2), None)
        part = lambda i, total: one(total, jax.lax.dynamic_slice_in_dim(x, 6 * i, 6))[0]
        zero = jnp.zeros(())
        if form == "unrolled":
            return one(one(zero, x[:6])[0], x[6:])[0]
        if form == "slices":
            return jax.lax.fori_loop(0, 2, part, zero)
        return jax.lax.scan(one, zero, x.reshape(2, 6, 4))[0]

    graph = captured(loss, (4, 8), batch=shape).graph
    factors = [
        {graph.factors[f].name: graph.factors[f].size for f in o.factors} for o in graph.operators
    ]
    assert all(sizes["S"] == 6 and 8 in sizes.values() for sizes in factors)
    assert len(factors) == (2 if form == "unrolled" else 1)


def test_each_use_of_a_layer_in_a_difference_owns_its_products() -> None:
    def step(weights, batch):
        def loss(weights):
            with jax.named_scope("encoder"):
                one, other = (jnp.tanh(x @ weights[0]) @ weights[1] for x in batch)
            return jnp.mean((one - other) ** 2)

        return jax.tree.map(lambda w, g: w - g, weights, jax.grad(loss)(weights))

    weights = [jnp.ones((4, 8)), jnp.ones((8, 4))]
    leaves = [Leaf("hidden", "parameter"), Leaf("out", "parameter")]
    x = jnp.ones((16, 4))
    graph = capture_step(lambda w, b: (None, step(w, b)), weights, [x, x], leaves, "siamese").graph
    products = []
    for operator in graph.operators:
        names = [graph.instructions[index].name for index in operator.instructions]
        products.append(names.count("dot_general"))
    # The hidden layers have no gradient of the batch.
    assert sorted(products) == [2, 2, 3, 3]


def over_devices(devices: int):
    """A loss whose product is in a `shard_map` over a mesh of devices, with every collective."""
    mesh = jax.make_mesh((devices,), ("m",), axis_types=(AxisType.Auto,))

    def product(w, x):
        y = jax.lax.all_gather(x @ w, "m", axis=1, tiled=True)
        y = jax.lax.psum_scatter(y, "m", scatter_dimension=1, tiled=True)
        y = jax.lax.all_to_all(y, "m", 1, 1, tiled=True)
        y += jax.lax.ppermute(y, "m", [(0, 0)]) * (2 - 1j)
        y += jax.lax.ppermute(y, "m", [])
        return jnp.abs(y) + jax.lax.axis_index("m")

    split = jax.shard_map(
        product, mesh=mesh, in_specs=(P(), P("m")), out_specs=P("m"), check_vma=False
    )
    return lambda w, x: jnp.sum(split(w, x) ** 2)


def test_collectives_over_a_mesh_of_one_device_are_its_own_values() -> None:
    loss = over_devices(1)
    program = captured(loss, (4, 6))
    names = {instruction.name for instruction in program.graph.instructions}
    assert not {name for name in names if "all_" in name or "collective" in name or "_id" in name}
    w = np.linspace(-1, 2, 24, dtype=F32).reshape(4, 6)
    x = np.linspace(0, 1, 32, dtype=F32).reshape(8, 4)
    outputs, _ = jax.jit(program.text.call)((w,), x)
    np.testing.assert_allclose(outputs["loss"], loss(w, x), rtol=1e-5)


def test_a_step_over_several_devices_is_refused() -> None:
    with pytest.raises(CaptureError, match="split over 2 devices already, by shard_map, pmap or a"):
        captured(over_devices(2), (4, 6))
