"""Kernels that XLA:GPU delays: gradients of parameters, and repeated forward values."""

from collections import defaultdict
from dataclasses import replace

import jax
import keras
import pytest

from partita.capture.jax_functions import Leaf, capture_step
from partita.capture.program import capture_program
from partita.cost.backends import compiler_of
from partita.cost.backends.gpu import PROGRAM_SHARE
from partita.cost.delayed import (
    KERNELS_PER_COLLECTIVE,
    Delay,
    delayed_by_repetitions,
    delayed_kernels,
    delayed_reductions,
    gather_times,
    independent_times,
    joined_repetitions,
    late_gradients,
)
from partita.cost.fusion import kernel_reads
from partita.cost.gathered import is_moved
from partita.cost.laid_out_fusion import fused_under
from partita.cost.memory import memory
from partita.cost.terms import cost_terms
from partita.graph.flat import PRODUCTS
from partita.graph.operator_graph import constant_tensors, first_backward, producers
from partita.graph.rematerialize import rematerialized
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of
from partita.search.rematerialization import groupings

GPU = load("h100:4")


@pytest.fixture(scope="module")
def graph():
    """A convolution, group normalization of its 32 x 32 x 16 images, and a softmax."""
    image = keras.Input((32, 32, 4))
    x = keras.layers.Conv2D(16, 3, padding="same")(image)
    x = keras.layers.GroupNormalization(4, name="groups")(x)
    x = keras.layers.Activation("relu")(x)
    x = keras.layers.Conv2D(8, 1, activation="softmax", name="classes")(x)
    model = keras.Model(image, x)
    model.compile("sgd", "mse")
    return capture_program(model, 16, target=GPU.target).graph


def delayed(graph, baseline):
    plan = BASELINES[baseline](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules)
    read_by = kernel_reads(graph, fused)
    return {
        root: {*read_by[root], *read_by.get(first, ())}
        for root, first in delayed_reductions(graph, layout, fused).items()
    }


def test_a_reduction_of_a_reduction_reads_the_whole_operand(graph):
    shapes = defaultdict(set)
    for root, tensors in delayed(graph, "one device").items():
        name = graph.instructions[root].path.split("/")[-1]
        shapes[name] |= {graph.tensors[tensor].shape for tensor in tensors}
    assert (16, 32, 32, 4, 4) in shapes["groups"]
    assert (16, 32, 32, 8) in shapes["classes"]


def test_a_reduction_that_devices_sum_is_not_delayed(graph):
    assert not delayed(graph, "data parallel")


def test_values_wait_for_delayed_reductions(graph, monkeypatch):
    plan = BASELINES["one device"](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    course = memory(graph, plan.mesh, layout, GPU.backend).course
    monkeypatch.setattr("partita.cost.lifetimes.delayed_kernels", lambda *_: {})
    in_program_order = memory(graph, plan.mesh, replace(layout), GPU.backend).course
    images = 4 * 16 * 32 * 32 * 16
    assert (course - in_program_order).max() >= images


@pytest.fixture(scope="module")
def perceptron():
    """Four residual blocks of two products each."""
    x = vectors = keras.Input((64,))
    for block in range(4):
        wide = keras.layers.Dense(256, activation="relu", name=f"up_{block}")(x)
        x = x + keras.layers.Dense(64, name=f"down_{block}")(wide)
    model = keras.Model(vectors, x)
    model.compile("adam", "mse")
    return capture_program(model, 4096, target=GPU.target).graph


def weight_gradients(graph, plan):
    """Block of a delayed product -> the instruction at which it runs."""
    layout = layout_of(graph, plan)
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules)
    delays = delayed_kernels(graph, layout, plan.mesh, fused)
    assert all(root < delay.time for root, delay in delays.items())
    products = [root for root in delays if graph.instructions[root].name == "dot_general"]
    return {graph.instructions[root].path.split("/")[-1]: delays[root].time for root in products}


def test_weight_gradients_wait_for_the_last_sums_of_the_backward_pass(perceptron):
    plan = BASELINES["tensor parallel"](perceptron, GPU.name, mesh_of(GPU))
    times = weight_gradients(perceptron, plan)
    assert KERNELS_PER_COLLECTIVE == 5
    # The backward pass sums the inputs' gradients of up_3, up_2 and up_1. The last sum takes the
    # three gradients before it, five kernels with their updates. The one before takes the rest,
    # and block 0 follows all sums.
    before, last = sorted(set(times.values()))
    assert {name for name, time in times.items() if time == last} == {"up_1", "down_1", "up_2"}
    assert {name for name, time in times.items() if time == before} == {"down_2", "up_3", "down_3"}
    assert times.keys() == {"up_1", "down_1", "up_2", "down_2", "up_3", "down_3"}


def feed_forward(policy, is_split):
    """Two residual blocks of a normalization and two products, the first split in two or not."""
    x = vectors = keras.Input((64, 64))
    for block in range(2):
        normed = keras.layers.LayerNormalization(name=f"norm_{block}", dtype=policy)(x)
        wide = keras.layers.Dense(256, name=f"up_{block}", dtype=policy)(normed)
        if is_split:
            gate, wide = keras.ops.split(wide, 2, -1)
            wide = wide * gate
        wide = keras.ops.gelu(wide)
        x = x + keras.layers.Dense(64, name=f"down_{block}", dtype=policy)(wide)
    model = keras.Model(vectors, x)
    model.compile("sgd", "mse")
    graph = capture_program(model, 64, target=GPU.target).graph
    plan = BASELINES["tensor parallel"](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules, plan.mesh)
    return graph, layout, delayed_kernels(graph, layout, plan.mesh, fused)


def test_gradients_of_a_normalization_that_are_joined_alone_are_delayed():
    graph, _, delays = feed_forward("mixed_bfloat16", is_split=False)
    late = [graph.instructions[root] for root in delays]
    assert [x.path for x in late if x.name == "reduce"].count("norm_1") == 2


def test_gradients_that_devices_exchange_are_not_delayed():
    """Those of a fused weight: of each slice, devices compute columns and store rows."""
    graph, layout, delays = feed_forward("float32", is_split=True)
    source = producers(graph)
    moved = {source.get(read.tensor, -1) for read in layout.reads if is_moved(layout, read)}
    products = [i for i in moved if i >= 0 and graph.instructions[i].name == "dot_general"]
    assert any(graph.instructions[i].path == "up_1" for i in products)
    assert delays.keys().isdisjoint(products)


def test_gradients_of_one_joined_sum_are_not_delayed(perceptron):
    plan = BASELINES["data parallel"](perceptron, GPU.name, mesh_of(GPU))
    assert not weight_gradients(perceptron, plan)


def test_delays_stop_at_the_memory_of_a_device(perceptron):
    plan = BASELINES["tensor parallel"](perceptron, GPU.name, mesh_of(GPU))
    layout = layout_of(perceptron, plan)
    delayed = memory(perceptron, plan.mesh, layout, GPU.backend)
    in_order = memory(perceptron, plan.mesh, layout, GPU.backend, device_bytes=1)
    work_space = 32 << 20
    between = (delayed.peak + in_order.peak) / 2 - work_space
    limited = memory(
        perceptron, plan.mesh, layout, GPU.backend, device_bytes=between / PROGRAM_SHARE
    )
    assert in_order.peak < limited.peak < delayed.peak


def zero_delays(graph, combined_bytes, is_limited):
    """(times of gathers, delays) of a plan that stores slices of variables."""
    plan = BASELINES["ZeRO-3"](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules)
    gathers = gather_times(graph, layout, combined_bytes)
    return gathers, delayed_kernels(graph, layout, plan.mesh, fused, gathers, is_limited)


def test_gradients_of_stored_weights_wait_for_the_next_gather(perceptron):
    gathers, delays = zero_delays(perceptron, 0, is_limited=False)
    products = [root for root in delays if perceptron.instructions[root].name == "dot_general"]
    # The last block's: the gather for its input's gradient begins after the gradient before.
    assert products
    for root in products:
        assert delays[root].time == min(time for time in gathers if time > root)


def test_gradients_of_stored_weights_wait_for_the_last_sums_of_normalizations():
    """The scheduler begins at the end of the step, so the last collectives take them first."""
    x = vectors = keras.Input((64,))
    for block in range(6):
        x = keras.layers.Dense(64, use_bias=False, name=f"dense_{block}")(x)
        x = keras.layers.Activation("relu")(keras.layers.BatchNormalization()(x))
    model = keras.Model(vectors, x)
    model.compile("adam", "mse")
    graph = capture_program(model, 4096, target=GPU.target).graph
    gathers, delays = zero_delays(graph, 0, is_limited=False)
    times = {
        graph.instructions[root].path: delay.time
        for root, delay in delays.items()
        if graph.instructions[root].name == "dot_general"
    }
    assert len(times) == 5
    assert min(times.values()) > max(gathers)


def test_zeros_and_positions_of_pooling_run_beside_a_sum_that_has_room():
    """The scheduler takes kernels first that follow more collectives, as gradients of weights."""
    image = keras.Input((16, 16, 4))
    x = keras.layers.MaxPooling2D(2)(keras.layers.Conv2D(8, 3, use_bias=False)(image))
    for _ in range(3):
        x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
        x = keras.layers.Activation("relu")(keras.layers.BatchNormalization()(x))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(x))
    model.compile("sgd", "mse")
    graph = capture_program(model, 64, target=GPU.target).graph
    names = [instruction.name for instruction in graph.instructions]
    scatter = names.index("select_and_scatter")
    products = [i for i, name in enumerate(names) if name in PRODUCTS]

    def time(delays, baseline="data parallel"):
        plan = BASELINES[baseline](graph, GPU.name, mesh_of(GPU))
        layout = layout_of(graph, plan)
        fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules)
        return independent_times(graph, layout, fused, delays, [scatter])[scatter]

    last = time({})
    assert first_backward(graph) < last < scatter
    full = {i: Delay(last, frozenset()) for i in products[:KERNELS_PER_COLLECTIVE]}
    assert first_backward(graph) < time(full) < last
    busy = {n: Delay(n, frozenset()) for n in range(len(names))}
    assert time(busy, "one device") == scatter


def test_weight_gradients_wait_for_gathers_of_gradients():
    """The last convolution's waits for the gather of the gradient before it."""
    x = image = keras.Input((8, 8, 4))
    for _ in range(3):
        x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
        x = keras.layers.AveragePooling2D(2, 1, padding="same")(x)
    model = keras.Model(image, x)
    model.compile("sgd", "mse")
    graph = capture_program(model, 64, target=GPU.target).graph
    plan = BASELINES["tensor parallel"](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules)
    delays = delayed_kernels(graph, layout, plan.mesh, fused)
    names = [x.name if x.phase == "backward" else "" for x in graph.instructions]
    last = names.index("convolution")
    gathered = names.index("reduce_window", last)
    assert {root: delay.time for root, delay in delays.items()} == {last: gathered}


def test_gathers_that_are_combined_begin_after_all_their_gradients(perceptron):
    single, _ = zero_delays(perceptron, 0, is_limited=False)
    pairs, _ = zero_delays(perceptron, 2 * 64 * 256 * 4, is_limited=False)
    assert len(single) == 4
    assert pairs == single[1::2]


def test_limited_delays_end_at_the_next_gather(perceptron):
    gathers, delays = zero_delays(perceptron, 0, is_limited=True)
    assert delays
    for root, delay in delays.items():
        assert delay.time <= min(time for time in gathers if time > root)


def test_offloaded_slots_delay_nothing(perceptron):
    plan = BASELINES["tensor parallel"](perceptron, GPU.name, mesh_of(GPU))
    parameters = tuple({a.parameter for a in perceptron.arguments if a.parameter})
    assert not weight_gradients(perceptron, replace(plan, offload=parameters))


@pytest.fixture(scope="module")
def classifier():
    """A dense layer of 64 classes, its softmax and its loss."""
    x = keras.Input((32,))
    model = keras.Model(x, keras.layers.Dense(64, activation="softmax", name="classes")(x))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return capture_program(model, 256, target=GPU.target).graph


def delayed_losses(graph, baseline):
    """Delays of kernels of the forward pass."""
    plan = BASELINES[baseline](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules)
    delays = delayed_kernels(graph, layout, plan.mesh, fused)
    return [delay for root, delay in delays.items() if graph.instructions[root].phase == "forward"]


def test_a_summed_loss_reads_its_logits_at_the_end_of_the_backward_pass(classifier):
    last = max(i for i, x in enumerate(classifier.instructions) if x.phase == "backward")
    losses = delayed_losses(classifier, "data parallel")
    assert {loss.time for loss in losses} == {last}
    shapes = {classifier.tensors[tensor].shape for loss in losses for tensor in loss.reads}
    assert (256, 64) in shapes


def test_a_loss_of_probabilities_reads_their_logits():
    """They are stored for the accuracy. The loss divides them by their sum: (a / b) / c."""
    x = keras.Input((32,))
    model = keras.Model(x, keras.layers.Dense(64, activation="softmax")(x))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    graph = capture_program(model, 256, target=GPU.target).graph
    reads = {tensor for loss in delayed_losses(graph, "data parallel") for tensor in loss.reads}
    assert sum(graph.tensors[tensor].shape == (256, 64) for tensor in reads) == 2


def test_forward_values_that_nothing_reads_are_no_loss(perceptron):
    """Signs of activations, which rematerialized runs compute again for the backward pass."""
    runs = groupings(perceptron, cost_terms(perceptron, GPU.backend))[-1]
    graph = rematerialized(perceptron, runs)
    (loss,) = delayed_losses(graph, "data parallel")
    bias = (64,)
    assert {graph.tensors[tensor].shape for tensor in loss.reads} - {bias} == {(4096, 64)}


@pytest.mark.parametrize("baseline", ["one device", "tensor parallel"])
def test_a_loss_whose_scalar_no_devices_sum_is_not_delayed(classifier, baseline):
    assert not delayed_losses(classifier, baseline)


def test_a_program_without_a_backward_pass_delays_no_loss(classifier):
    forward = tuple(replace(x, phase="forward") for x in classifier.instructions)
    assert not delayed_losses(replace(classifier, instructions=forward), "data parallel")


@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_repeated_value_waits_for_the_gradient_that_reads_its_operand(has_gradients):
    def step(state, x):
        incoming = x @ (state[0] + jax.numpy.arange(128.0))
        repeated = x * x
        early = jax.numpy.einsum("bi,bj->ij", repeated, incoming)
        gradient = incoming * x
        return {}, (state[0] + early + jax.numpy.einsum("bi,bj->ij", repeated, gradient),)

    shape = jax.ShapeDtypeStruct
    arrays = (shape((128, 128), "float32"),), shape((256, 128), "float32")
    graph = capture_step(step, *arrays, [Leaf("w", "parameter")], batch_size=256).graph
    of = {x.operands: n for n, x in enumerate(graph.instructions) if x.name == "multiply"}
    repeated, gradient = sorted(of.values(), key=lambda n: len(set(graph.instructions[n].operands)))
    constants = constant_tensors(graph)
    phases = []
    for n, instruction in enumerate(graph.instructions):
        is_constant = constants.issuperset(instruction.results)
        is_backward = n != repeated and (has_gradients or is_constant)
        phases.append("backward" if is_backward else "forward")
    instructions = [
        replace(instruction, phase=phase)
        for instruction, phase in zip(graph.instructions, phases, strict=True)
    ]
    graph = replace(graph, instructions=tuple(instructions))
    fused = fused_under(
        graph,
        layout_of(graph, BASELINES["one device"](graph, GPU.name, mesh_of(GPU))),
        compiler_of(GPU.backend).fusion_rules,
    )
    assert repeated < gradient
    ends = {graph.instructions[repeated].results[0]: gradient} if has_gradients else {}
    assert joined_repetitions(graph, fused) == ends, "a constant begins no backward pass"
    early = min(n for n, x in enumerate(graph.instructions) if n > repeated and x.name in PRODUCTS)
    assert repeated < early < gradient
    delays = {early: Delay(gradient, frozenset(graph.instructions[early].operands))}
    assert delayed_by_repetitions(graph, fused, ends) == (delays if ends else {})


def late_paths(graph, tpu, plan_name):
    """Path of a product's layer -> the time of its delay on a TPU."""
    plan = BASELINES[plan_name](graph, tpu.name, mesh_of(tpu))
    layout = layout_of(graph, plan)
    fused = fused_under(graph, layout, compiler_of(tpu.backend).fusion_rules, plan.mesh)
    delays = late_gradients(graph, layout, fused)
    return {graph.instructions[root].path: delay.time for root, delay in delays.items()}


def test_gradients_that_no_devices_sum_run_with_their_updates_on_a_tpu():
    """As in programs compiled for a v5e: GPTs, LSTMs and convolutions, split by tensor."""
    tpu = load("tpu-v5e:4")
    features = keras.Input((64,))
    x = keras.layers.Dense(128, activation="relu", name="up")(features)
    model = keras.Model(features, keras.layers.Dense(64, name="down")(x))
    model.compile("adam", "mse")
    graph = capture_program(model, 16, target=tpu.target).graph
    late = late_paths(graph, tpu, "tensor parallel")
    assert sorted(late) == ["down", "up"]
    backward = [i for i, x in enumerate(graph.instructions) if x.phase == "backward"]
    assert set(late.values()) == {max(backward)}
    assert not late_paths(graph, tpu, "data parallel")


def test_gradients_of_weights_run_beside_the_next_gather_on_a_tpu():
    """ResNet50 split by tensor, compiled for a v5e, runs 51 of 55 gradients beside five
    gathers: those since the gather before."""
    tpu = load("tpu-v5e:4")
    image = keras.Input((16, 16, 4))
    x = keras.layers.Conv2D(64, 1, name="stem")(image)
    for i in range(3):
        y = keras.layers.Conv2D(16, 1, activation="relu", name=f"in{i}")(x)
        y = keras.layers.Conv2D(16, 3, padding="same", activation="relu", name=f"mid{i}")(y)
        y = keras.layers.Conv2D(64, 1, name=f"out{i}")(y)
        x = keras.layers.Activation("relu", name=f"sum{i}")(x + y)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, keras.layers.Dense(4, name="classes")(x))
    model.compile("adam", "mse")
    graph = capture_program(model, 8, target=tpu.target).graph
    late = late_paths(graph, tpu, "tensor parallel")
    beside_gather, at_end = sorted(set(late.values()))
    early = {path for path, time in late.items() if time == beside_gather}
    assert early == {"classes", "out2", "mid2", "in2"}
    assert graph.instructions[at_end + 1].phase != "backward"
