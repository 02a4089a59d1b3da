"""Steps in pieces equal the step on one device: stages, microbatches, places, rematerialization."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from jax.extend.mlir import ir
from keras import layers

import partita
from partita.capture import stablehlo
from partita.capture.barriers import BARRIER
from partita.capture.functions import call_of, capture_call
from partita.capture.jax_functions import Captured
from partita.capture.keras_models import ModelVariables, capture_model
from partita.capture.targets import CaptureTarget
from partita.cost import early_sums
from partita.cost.memory import memory
from partita.cost.partial import unsummed, waiting_sums
from partita.errors import PlanError
from partita.execute.devices import detect
from partita.execute.dispatch import TransferAction, changed_meanings, joint_updates
from partita.execute.program import runnable_step
from partita.execute.staged import StagedStep, in_pieces
from partita.execute.staged_verify import (
    check_staged,
    place_peaks,
    planned_peaks,
    planned_piece,
    transfer_bytes,
)
from partita.machine import host, load
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.pipeline import is_one_program
from partita.plans.plan import Axis, Mesh, Plan
from partita.plans.schema import SCHEDULES
from partita.search.find import mesh_of
from partita.simulation import stage_memory
from partita.simulation.pipelined import PipelinedStep

FLOOR = 1e-3
"""Differences are relative to the largest value of a variable, and at least to this."""


def stages_plan(graph, stages: Sequence[int | None], **more) -> Plan:
    """A plan that places each operator on a slice of axis a, or on all."""
    count = max((stage for stage in stages if stage is not None), default=0) + 1
    choices = {
        operator.name: {} if stage is None else {"a": f"at({stage})"}
        for operator, stage in zip(graph.operators, stages, strict=True)
    }
    return Plan(graph.name, "host", Mesh.of((count,)), choices, batch_size=graph.batch_size, **more)


def halves(graph) -> list[int]:
    count = len(graph.operators)
    return [int(2 * n >= count) for n in range(count)]


def halves_apart(graph, **more) -> Plan:
    return stages_plan(graph, halves(graph), **more)


def in_two_microbatches(graph) -> Plan:
    return halves_apart(graph, microbatches=2)


def first_apart(graph, **more) -> Plan:
    """The first operator on a stage of its own."""
    return stages_plan(graph, [int(n > 0) for n in range(len(graph.operators))], **more)


def compiled(outputs, inputs, **more) -> keras.Model:
    model = keras.Model(inputs, outputs)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, **more)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def mlp(dropout: bool = False, **more) -> keras.Model:
    x = inputs = keras.Input((16,))
    for n in range(3):
        x = layers.Dense(16, activation="relu", name=f"d{n}")(x)
        if dropout:
            x = layers.Dropout(0.3, name=f"drop{n}")(x)
    return compiled(layers.Dense(8, name="out")(x), inputs, **more)


def tied() -> keras.Model:
    inputs = keras.Input((4,), dtype="int32")
    embedding = layers.ReversibleEmbedding(8, 16, name="embedding")
    x = layers.Dense(16, activation="relu", name="dense")(embedding(inputs))
    return compiled(embedding(x, reverse=True), inputs)


def towers() -> keras.Model:
    inputs = keras.Input((16,))
    left = right = layers.Dense(16, activation="relu", name="stem")(inputs)
    for n in range(2):
        left = layers.Dense(16, activation="relu", name=f"left{n}")(left)
        right = layers.Dense(16, activation="tanh", name=f"right{n}")(right)
    outputs = layers.Dense(8, name="head")(layers.Concatenate()([left, right]))
    return compiled(outputs, inputs)


def normalized() -> keras.Model:
    """A residual sum, normalized for two layers."""
    x = inputs = keras.Input((16,))
    x = x + layers.Dense(16, activation="relu", name="first")(x)
    normal = layers.LayerNormalization(name="norm")(x)
    x = x + layers.Dense(16, name="left")(normal) * layers.Dense(16, name="right")(normal)
    return compiled(layers.Dense(8, name="out")(x), inputs)


def residual(dtype: str = "float32") -> keras.Model:
    """Three residual blocks with gates, on two tokens."""
    inputs = keras.Input((16,))
    x = layers.Dense(8, name="stem", dtype=dtype)(layers.Reshape((2, 8), dtype=dtype)(inputs))
    for n in range(3):
        y = layers.LayerNormalization(name=f"norm{n}", dtype=dtype)(x)
        gate = layers.Dense(64, activation="sigmoid", name=f"gate{n}", dtype=dtype)(y)
        y = layers.Dense(64, name=f"up{n}", dtype=dtype)(y) * gate
        x = x + layers.Dense(8, name=f"down{n}", dtype=dtype)(y)
    return compiled(
        layers.Dense(8, name="out", dtype=dtype)(layers.Flatten(dtype=dtype)(x)), inputs
    )


def batch(model: keras.Model, count: int = 8):
    rng = np.random.default_rng(0)
    if model.input.dtype == "int32":
        tokens = rng.integers(0, 8, (count, 4)).astype("int32")
        return tokens, np.roll(tokens, -1, 1)
    x = rng.normal(size=(count, 16)).astype("float32")
    return x, rng.integers(0, 8, count).astype("int32")


def values_of(model: keras.Model, captured: Captured):
    variables = [v for group in ModelVariables.of(model).groups() for v in group]
    values = [np.array(variable.value) for variable in variables]
    return jax.tree.unflatten(jax.tree.structure(captured.state), values)


def difference(ours, theirs) -> float:
    largest = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, "f8"), np.asarray(b, "f8")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return math.inf
        largest = max(largest, float(np.abs(a - b).max() / max(np.abs(b).max(), FLOOR)))
    return largest


def compare(model: keras.Model, plan_of: Callable[..., Plan], steps: int = 2):
    """(the staged step, the largest difference of any variable or log after two steps)."""
    keras.utils.set_random_seed(1)
    data = batch(model)
    captured = capture_model(model, data)
    step = runnable_step(captured, plan_of(captured.graph))
    assert isinstance(step, StagedStep)
    one = jax.jit(captured.text.call)
    theirs = values_of(model, captured)
    ours = step.place_state(theirs)
    logs = their_logs = None
    for _ in range(steps):
        logs, ours = step.step(ours, step.place_batch(data))
        their_logs, theirs = one(theirs, data)
    return step, difference((logs, ours), (their_logs, theirs))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_stages_in_four_microbatches_equal_one_device(schedule: str):
    model, plan_of = (normalized, first_apart) if schedule == "gpipe" else (mlp, halves_apart)
    step, largest = compare(
        model(), lambda graph: plan_of(graph, microbatches=4, schedule=schedule)
    )
    assert len(step.cut.pieces) == 6
    assert largest < 1e-5


@pytest.mark.parametrize(
    ("target", "phases"),
    [("", ["forward", "backward", "update"]), ("cuda", ["backward", "update"])],
)
def test_microbatches_on_one_device_are_gradient_accumulation(target: str, phases: list[str]):
    def plan(graph):
        whole = stages_plan(graph, [None] * len(graph.operators), microbatches=2, target=target)
        return replace(whole, mesh=Mesh(()))

    step, largest = compare(mlp(), plan)
    assert [piece.phase for piece in step.cut.pieces] == phases
    assert largest < 1e-5


def test_a_normalization_between_stages_runs_where_one_value_crosses():
    model = normalized()
    captured = capture_model(model, batch(model))
    graph = captured.graph
    plan = first_apart(graph, microbatches=2)
    simulated = PipelinedStep.of(graph, host(2, 1 << 30), plan)
    # Forward the residual sum crosses, backward its gradient: 4 samples of 16 values.
    assert [(edge.phase, sent.nbytes) for edge, sent in simulated.transfers.items()] == [
        ("forward", 4 * 16 * 4),
        ("backward", 4 * 16 * 4),
    ]
    of_norm = [a.tensor for a in graph.arguments if "norm" in a.path]
    assert {simulated.cut.homes[t] for t in of_norm} == {1}
    iteration = 4
    assert transfer_bytes(in_pieces(captured, plan)) == 2 * 2 * 4 * 16 * 4 + iteration


def test_the_gradient_of_a_bias_is_computed_where_the_bias_moved():
    """The sum with the bias belongs to the later stage, and runs on the earlier one."""
    tokens = keras.Input((4,), dtype="int32")
    x = layers.Embedding(8, 16)(tokens)
    x = x + layers.Dense(16, name="first")(x)
    normal = layers.LayerNormalization(name="norm")(x)
    x = x + layers.MultiHeadAttention(2, 8)(normal, normal)
    model = compiled(layers.Dense(8, name="out")(x), tokens)
    captured = capture_model(model, batch(model), CaptureTarget.of("cuda"))
    graph = captured.graph
    first = [operator.name for operator in graph.operators].index("norm")
    stages = [int(n >= first) for n in range(len(graph.operators))]
    step = in_pieces(captured, stages_plan(graph, stages, microbatches=2))
    maker = step.cut.maker()
    bias = next(a for a in graph.arguments if a.path == "first/bias")
    assert step.cut.homes[bias.tensor] == 0
    for piece in step.cut.pieces:
        if piece.phase == "update":
            arrays = [t for t in piece.reads if t in maker and graph.tensors[t].shape]
            assert {step.cut.pieces[maker[t]].place for t in arrays} == {piece.place}


def test_one_stage_without_microbatches_is_one_program():
    graph = capture_model(mlp(), batch(mlp())).graph
    plan = stages_plan(graph, [0] * len(graph.operators))
    assert is_one_program(plan)
    assert not is_one_program(replace(plan, microbatches=2))
    assert not is_one_program(halves_apart(graph))


def test_the_global_norm_splits_one_update_in_two():
    step, largest = compare(mlp(global_clipnorm=0.1), in_two_microbatches)
    assert len(step.cut.pieces) == 7
    assert largest < 1e-5


def test_gradients_that_keras_accumulates_are_those_of_whole_batches():
    step, largest = compare(mlp(gradient_accumulation_steps=2), in_two_microbatches)
    assert len(step.cut.pieces) == 6
    assert largest < 1e-5


def test_scalars_that_several_places_of_one_device_read_are_kept():
    def plan(graph):
        return stages_plan(graph, [None, 0, 0, 1])

    model = mlp()
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=64.0)
    model.compile(scaled, model.loss)
    _, largest = compare(model, plan)
    assert largest < 1e-5


def test_gradients_of_tied_weights_are_sent_once_per_step():
    def plan(graph):
        return halves_apart(graph, microbatches=4)

    step, largest = compare(tied(), plan)
    weight = next(a for a in step.cut.flow.graph.arguments if "embedding" in a.path)
    sent = [
        action
        for action in step.dispatch.actions
        if isinstance(action, TransferAction)
        and step.cut.flow.graph.tensors[action.source.tensor]
        == step.cut.flow.graph.tensors[weight.tensor]
    ]
    assert len(sent) == 2  # the weight, and the other stage's part of its gradient
    assert largest < 1e-5


def test_rematerialized_dropout_draws_the_same_mask():
    def plan(graph):
        names = [operator.name for operator in graph.operators]
        recompute = ((names[0], names[1]),)
        return halves_apart(graph, recompute=recompute)

    step, largest = compare(mlp(dropout=True), plan)
    repeated = {
        k
        for piece in step.cut.pieces
        if piece.phase == "backward"
        for k in piece.statements
        if step.cut.flow.instruction(k).name == "dot_general"
        and step.cut.flow.instruction(k).phase == "forward"
    }
    assert repeated
    assert largest < 1e-6


def rematerialized_blocks(graph, inner: str, first: str) -> Plan:
    """A plan for GPUs that computes the blocks of `residual` again."""
    runs = tuple((f"{first}{n}", f"down{n}") for n in range(3))
    plan = BASELINES[inner](graph, "host", Mesh.of((1 if inner == "one device" else 2,)))
    return replace(plan, microbatches=2, recompute=runs, target="cuda")


@pytest.mark.parametrize("inner", ["one device", "data parallel", "ZeRO-3"])
def test_runs_that_wait_for_gradients_equal_one_device(inner: str):
    step, largest = compare(residual(), lambda graph: rematerialized_blocks(graph, inner, "up"))
    assert largest < 1e-5
    assert len(products_before_copies(step)) == 3


@pytest.mark.parametrize("inner", ["one device", "data parallel", "ZeRO-3"])
def test_a_block_that_is_computed_again_stores_its_input_and_waits_for_a_gradient(inner: str):
    model = residual(dtype="mixed_bfloat16")
    captured = capture_model(model, batch(model), CaptureTarget.of("cuda"))
    step = in_pieces(captured, rematerialized_blocks(captured.graph, inner, "norm"))
    flow = step.cut.flow
    (backward,) = (piece for piece in step.cut.pieces if piece.phase == "backward")
    stored = [t for t in backward.reads if t in flow.producer]
    shapes = [flow.graph.tensors[t].shape for t in stored]
    assert shapes.count((4, 2, 8)) == 3  # the inputs of the blocks
    assert (4, 2, 64) not in shapes
    # The last block waits for the products of the head, and others for those of later blocks.
    assert products_before_copies(step) == [2, 10, 18]


def test_copies_and_gradients_read_one_gather_that_waits_for_a_gradient():
    model = residual(dtype="mixed_bfloat16")
    captured = capture_model(model, batch(model), CaptureTarget.of("cuda"))
    step = in_pieces(captured, rematerialized_blocks(captured.graph, "ZeRO-3", "norm"))
    number = [piece.phase for piece in step.cut.pieces].index("backward")
    flow, (_, place) = step.cut.flow, planned_piece(step, number)
    gathers = [read for read in place.layout.reads if flow.is_variable(read.tensor)]
    assert len({(read.tensor, read.target) for read in gathers}) == len(gathers)
    # The last block and the head have fewer products before them than a gather takes.
    planned = [read.tensor for read in gathers if read.after >= 0]
    wide = [t for t in planned if sorted(flow.graph.tensors[t].shape) == [8, 64]]
    assert len(wide) == 6
    barriers = operations_of_backward_piece(step, BARRIER)
    waiting = [kind for barrier in barriers for kind in barrier.operands]
    assert waiting.count("tensor<8x64xbf16>") == 2 and waiting.count("tensor<64x8xbf16>") == 2
    # XLA drops a gradient that nothing reads behind its barrier, and the wait with it.
    assert all(barrier.readers - {"func.return"} for barrier in barriers)


@pytest.mark.parametrize("is_again", [False, True])
@pytest.mark.parametrize("inner", ["ZeRO-3", "tensor parallel with sequence"])
def test_the_texts_of_pieces_with_waits_are_valid(inner: str, is_again: bool):
    """Reshards, random bits and tied weights are read by copies and by others."""
    tokens = keras.Input((4,), dtype="int32")
    embedding = layers.ReversibleEmbedding(8, 16, dtype="mixed_bfloat16")
    x = embedding(tokens)
    for _ in range(2):
        y = layers.RMSNormalization(dtype="mixed_bfloat16")(x)
        y = layers.Dense(32, activation="gelu", dtype="mixed_bfloat16")(y)
        x = x + layers.Dropout(0.1)(layers.Dense(16, dtype="mixed_bfloat16")(y))
    model = compiled(embedding(x, reverse=True), tokens)
    captured = capture_model(model, batch(model), CaptureTarget.of("cuda"))
    graph = captured.graph
    mesh = Mesh.of((2, 2, 2))
    inside = BASELINES[inner](graph, "host", Mesh(mesh.axes[1:]))
    choices = {
        operator.name: {"a": f"at({stage})", **inside.choices[operator.name]}
        for operator, stage in zip(graph.operators, halves(graph), strict=True)
    }
    plan = replace(inside, mesh=mesh, choices=choices, microbatches=2)
    if is_again:
        names = [operator.name for operator in graph.operators]
        ends = (0, halves(graph).index(1), len(names))
        runs = tuple((names[first], names[end - 1]) for first, end in itertools.pairwise(ends))
        plan = replace(plan, recompute=runs)
    step = in_pieces(captured, check(plan, graph))
    for number in range(len(step.cut.pieces)):
        step.text(number)  # verified when it is written


def test_products_of_a_piece_wait_for_sums_of_slices(monkeypatch: pytest.MonkeyPatch):
    """ZeRO sums each microbatch's gradients, which XLA:GPU would delay to the end of the pass."""
    monkeypatch.setattr(early_sums, "COMBINED_BYTES", 1)
    monkeypatch.setattr(early_sums, "WAITING_PRODUCTS", 0)
    model = residual(dtype="mixed_bfloat16")
    captured = capture_model(model, batch(model), CaptureTarget.of("cuda"))
    waiting = {}
    for inner in ("data parallel", "ZeRO-3"):
        plan = replace(rematerialized_blocks(captured.graph, inner, "norm"), recompute=())
        waiting[inner] = len(operations_of_backward_piece(in_pieces(captured, plan), BARRIER))
    assert waiting["data parallel"] == 0  # the update sums what the microbatches have added up
    assert waiting["ZeRO-3"] > 3


def test_a_product_of_a_piece_waits_for_a_sum_beside_one_of_the_update(
    monkeypatch: pytest.MonkeyPatch,
):
    """Gradients of normalizations are summed after all microbatches, those of kernels before."""
    kernels_of_a_group = 2 * 8 * 64
    monkeypatch.setattr(early_sums, "COMBINED_BYTES", kernels_of_a_group)
    monkeypatch.setattr(early_sums, "WAITING_PRODUCTS", 0)
    model = residual(dtype="mixed_bfloat16")
    captured = capture_model(model, batch(model), CaptureTarget.of("cuda"))
    plan = replace(rematerialized_blocks(captured.graph, "ZeRO-3", "norm"), recompute=())
    barriers = operations_of_backward_piece(in_pieces(captured, plan), BARRIER)
    sums = [kind for one in barriers for kind in list(one.operands)[1:]]
    assert sums.count("tensor<64x8xbf16>") == 3


def test_the_memory_of_a_piece_knows_the_sums_that_its_products_wait_for(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(early_sums, "COMBINED_BYTES", 1)
    monkeypatch.setattr(early_sums, "WAITING_PRODUCTS", 0)
    waiting: list[int] = []

    def counted(graph, mesh, layout, *others):
        waiting.append(len(early_sums.early_sums(graph, layout, mesh)))
        return memory(graph, mesh, layout, *others)

    monkeypatch.setattr(stage_memory, "memory", counted)
    model = residual(dtype="mixed_bfloat16")
    graph = capture_model(model, batch(model), CaptureTarget.of("cuda")).graph
    machine = load("h100:2")
    most = {}
    for inner in ("data parallel", "ZeRO-3"):
        waiting.clear()
        plan = rematerialized_blocks(graph, inner, "norm")
        plan = replace(plan, mesh=mesh_of(machine))
        assert PipelinedStep.of(graph, machine, plan).peak_bytes > 0
        most[inner] = max(waiting)
    assert most["data parallel"] == 0
    assert most["ZeRO-3"] > 3


def test_copies_that_only_another_run_reads_move_with_that_run():
    inputs = keras.Input((16,))
    x = layers.Conv1D(4, 3, padding="same", name="stem")(layers.Reshape((4, 4))(inputs))
    mean = layers.GlobalAveragePooling1D(keepdims=True)(x)
    gated = x * layers.Dense(4, activation="sigmoid", name="gate")(mean)
    y = layers.Conv1DTranspose(8, 3, activation="silu", padding="same", name="second")(gated)
    model = compiled(layers.Dense(8, name="out")(layers.Flatten()(y)), inputs)
    captured = capture_model(model, batch(model), CaptureTarget.of("cuda"))
    plan = BASELINES["one device"](captured.graph, "host", Mesh.of((1,)))
    runs = (("gate", "gate"), ("second", "second"))
    plan = replace(plan, microbatches=2, recompute=runs, target="cuda")
    step = in_pieces(captured, check(plan, captured.graph))
    for number in range(len(step.cut.pieces)):
        step.text(number)  # verified when it is written


class Operation(NamedTuple):
    """An operation of a text."""

    name: str
    operands: dict[str, bool]
    """Type of an operand -> whether it is an argument."""
    readers: set[str]
    """Names of the operations that read its first result."""


def operations_of_backward_piece(step, *names: str) -> list[Operation]:
    """The operations of the backward piece with these names, in order."""
    number = [piece.phase for piece in step.cut.pieces].index("backward")
    operations = []
    with stablehlo.context():
        module = stablehlo.parse(step.text(number).mlir_module_serialized)
        for op in stablehlo.main_block(module):
            if op.operation.name in names:
                operands = {str(v.type): isinstance(v.owner, ir.Block) for v in op.operands}
                readers = {use.owner.operation.name for use in op.operation.results[0].uses}
                operations.append(Operation(op.operation.name, operands, readers))
    return operations


def products_before_copies(step) -> list[int]:
    """For every barrier of a stored activation, the products before it."""
    counts = []
    products = 0
    for one in operations_of_backward_piece(step, BARRIER, "stablehlo.dot_general"):
        if one.name != BARRIER:
            products += 1
        elif any(is_argument and "4x2x8x" in kind for kind, is_argument in one.operands.items()):
            counts.append(products)
    return counts


@pytest.mark.parametrize("stem", [0, None], ids=["placed", "on all slices"])
def test_towers_on_devices_of_their_own_equal_one_device(stem: int | None):
    def plan(graph):
        names = [operator.name for operator in graph.operators]
        place = {"l": 0, "r": 1}
        return stages_plan(graph, [place.get(name[0], stem) for name in names])

    step, largest = compare(towers(), plan)
    assert {piece.place for piece in step.cut.pieces} == ({0, 1} if stem == 0 else {0, 1, 2})
    assert largest == 0


@pytest.mark.parametrize("inner", ["data parallel", "tensor parallel", "ZeRO-1", "ZeRO-3"])
def test_stages_of_two_devices_equal_one_device(inner: str):
    def plan(graph):
        mesh = Mesh((Axis("a", 2), Axis("b", 2)))
        inside = BASELINES[inner](graph, "host", Mesh(mesh.axes[1:]))
        staged = halves_apart(graph, microbatches=2)
        choices = {
            name: {**staged.choices[name], **inside.choices[name]} for name in staged.choices
        }
        return replace(staged, mesh=mesh, choices=choices, storage=inside.storage)

    step, largest = compare(mlp(), plan)
    assert largest < 1e-5
    traffic = {t.kind: t for t in check_staged(step, step.program).traffic}
    assert all(t.planned == t.emitted for t in traffic.values())
    gradients = 4 * (3 * (16 * 16 + 16) + 16 * 8 + 8)
    loss_and_accuracy = 2 * (4 + 4)  # for each of two microbatches
    if inner != "tensor parallel":
        assert len(step.partial_sums) == 8
        assert traffic["all_reduce"].emitted == gradients + loss_and_accuracy
    # Each device gathers the new variables from their slices.
    assert ("all_gather" in traffic) == inner.startswith("ZeRO")


def largest_features() -> keras.Model:
    inputs = keras.Input((16,))
    x = layers.ZeroPadding2D(1)(layers.Reshape((4, 4, 1))(inputs))
    x = layers.Conv2D(8, 3, activation="tanh", name="image")(x)
    return compiled(layers.Dense(8, name="out")(layers.GlobalMaxPooling2D()(x)), inputs)


def test_maxima_are_computed_again_with_the_values_that_are_compared_with_them():
    """A value that is computed again may be rounded differently, and then equals no maximum."""

    def plan(graph):
        operators = [operator.name for operator in graph.operators]
        return stages_plan(graph, [0] * len(operators), recompute=((operators[0], operators[0]),))

    step, largest = compare(largest_features(), plan)
    assert largest < 1e-5
    flow = step.cut.flow
    (backward,) = (piece for piece in step.cut.pieces if piece.phase == "backward")
    repeated = [flow.instruction(k) for k in backward.statements if flow.classes[k] == "forward"]
    maxima = [one for one in repeated if one.name == "reduce" and not one.adds]
    assert len(maxima) == 1 and set(maxima[0].results).isdisjoint(backward.reads)


def convolutions() -> keras.Model:
    x = inputs = keras.Input((16,))
    x = layers.Reshape((4, 4, 1))(x)
    x = layers.Conv2D(4, 3, padding="same", name="image")(x)
    x = layers.BatchNormalization(name="norm")(x)
    return compiled(layers.Dense(8, name="out")(layers.Flatten()(x)), inputs)


def recurrent() -> keras.Model:
    inputs = keras.Input((16,))
    x = layers.LSTM(8, name="lstm", unroll=True)(layers.Reshape((4, 4))(inputs))
    return compiled(layers.Dense(8, name="out")(x), inputs)


def in_bfloat16() -> keras.Model:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        return mlp()
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("model_of", [mlp, tied, normalized, convolutions, recurrent, in_bfloat16])
def test_the_gradients_that_wait_for_the_last_microbatch_are_those_planned(model_of):
    captured = capture_model(model := model_of(), batch(model))
    inside = BASELINES["data parallel"](captured.graph, "host", Mesh.of((2,)))
    step = in_pieces(captured, replace(inside, microbatches=2))
    assert step.partial_sums
    graph, layout = step.cut.flow.graph, step.layout
    planned = {value for value in waiting_sums(graph) if unsummed(graph, layout, [value])}
    assert step.partial_sums.keys() == planned


@pytest.mark.parametrize("model_of", [tied, recurrent, in_bfloat16])
def test_sums_of_added_or_converted_gradients_are_sent_once_per_step(model_of):
    def plan(graph):
        inside = BASELINES["data parallel"](graph, "host", Mesh.of((2,)))
        return replace(inside, microbatches=2)

    keras.utils.set_random_seed(0)
    model = model_of()
    step, largest = compare(model, plan)
    assert largest < (0.02 if model_of is in_bfloat16 else 1e-5)
    (sums,) = check_staged(step, step.program).traffic
    gradients = sum(4 * math.prod(v.shape) for v in model.trainable_variables)
    loss_and_accuracy = 2 * (4 + 4)  # for each of two microbatches
    assert sums.kind == "all_reduce"
    assert sums.planned == sums.emitted == gradients + loss_and_accuracy


def test_passes_in_one_piece_sum_gradients_once_per_step():
    """On accelerators both passes are one piece, which has the partial sums and the outputs."""

    def plan(graph):
        inside = BASELINES["data parallel"](graph, "host", Mesh.of((2,)))
        return replace(inside, microbatches=2, target="cuda")

    step, largest = compare(mlp(), plan)
    assert len(step.cut.pieces) == 2 and len(step.partial_sums) == 8
    assert step.explicit_results  # the loss and the metrics
    assert largest < 1e-5


def test_a_stage_stores_its_own_variables_and_the_compiler_counts_them():
    model = mlp()
    captured = capture_model(model, batch(model))
    graph = captured.graph
    step = runnable_step(captured, halves_apart(graph, microbatches=2))
    assert isinstance(step, StagedStep)
    stored = [0, 0]
    for argument, value in step.dispatch.state.items():
        stored[value.place] += graph.tensors[argument].nbytes
    peaks = place_peaks(step, step.program)
    whole = sum(graph.tensors[a.tensor].nbytes for a in graph.arguments if a.role != "batch")
    assert sum(stored) == whole and min(stored) > whole / 4
    assert all(peak > nbytes for peak, nbytes in zip(peaks, stored, strict=True))
    planned = planned_peaks(step, detect(2))
    assert np.array(planned) / peaks == pytest.approx(1, abs=0.25)
    verified = check_staged(step, step.program)
    assert verified.peak_bytes == max(peaks)
    assert "between device groups:" in str(verified)
    # Two microbatches of 4 samples: activations of 16 floats forward, their gradients back.
    assert transfer_bytes(step) >= 2 * 2 * 4 * 16 * 4


# ------------------------------------------------------------------------------------ JAX steps


def jax_step(parameters, momentum, x, y):
    def loss(parameters):
        hidden = jnp.tanh(x @ parameters["first"])
        errors = jnp.mean((hidden @ parameters["last"] - y) ** 2, 1)
        return jnp.mean(errors), errors

    (value, errors), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9))
    updates, momentum = optimizer.update(gradients, momentum)
    return optax.apply_updates(parameters, updates), momentum, value, errors


def jax_arguments():
    rng = np.random.default_rng(0)
    parameters = {
        "first": jnp.asarray(rng.normal(size=(4, 8)), "float32"),
        "last": jnp.asarray(rng.normal(size=(8, 2)), "float32"),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9))
    x = rng.normal(size=(8, 4)).astype("float32")
    return parameters, optimizer.init(parameters), x, rng.normal(size=(8, 2)).astype("float32")


def test_a_jax_step_returns_the_mean_loss_and_all_samples():
    arguments = jax_arguments()
    graph = capture_call(jax_step, call_of(jax_step, arguments, {})).captured.graph
    plan = halves_apart(graph, microbatches=4)
    step = partita.parallelize(jax_step, arguments, plan=plan)
    expected = jax_step(*arguments)
    result = step(*arguments)
    assert difference(result, expected) < 1e-5
    again = step(*result[:2], *arguments[2:])
    assert difference(again, jax_step(*expected[:2], *arguments[2:])) < 1e-5


def averaging_step(state, x, y):
    """A smaller step where the loss is above its average; no update reads the other state."""
    weights, average, seen, total, best, waited, peak = state

    def loss_of(weights):
        return jnp.mean((jnp.tanh(x @ weights[0]) @ weights[1] - y) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(weights)
    average = 0.9 * average + 0.1 * loss
    rate = 0.1 * jnp.minimum(1.0, average / loss)
    weights = [w - rate * g for w, g in zip(weights, gradients, strict=True)]
    seen = 0.5 * seen + 0.5 * loss
    waited = jnp.where(loss < best, 0, waited + 1)
    peak = 0.5 * peak + jnp.max(jnp.abs(x))
    best = jnp.minimum(best, loss)
    return (weights, average, seen, total + loss, best, waited, peak), loss


def test_state_that_follows_the_loss_follows_that_of_the_batch():
    _, _, x, y = jax_arguments()
    first, last = jax_arguments()[0].values()
    zero = jnp.float32(0)
    state = ([first, last], jnp.float32(0.5), zero, zero, zero, jnp.int32(3), zero)
    graph = capture_call(averaging_step, call_of(averaging_step, (state, x, y), {})).captured.graph
    plan = halves_apart(graph, microbatches=4)
    said: list[str] = []
    step = partita.parallelize(averaging_step, (state, x, y), plan=plan, say=said.append)
    expected = averaging_step(state, x, y)
    result, loss = step(state, x, y)
    assert difference((result[:-1], loss), (expected[0][:-1], expected[1])) < 1e-5
    assert result[5] == 4
    assert said[-1] == (
        "'state/6' changes with every microbatch, 4 times per step, and is no sum: other values "
        "than one device"
    )


def counting_step(state, x, y):
    """Counts samples, and divides its rate by their number."""
    weights, samples, total = state

    def loss_of(weights):
        return jnp.mean((jnp.tanh(x @ weights[0]) @ weights[1] - y) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(weights)
    samples = samples + x.shape[0]
    weights = [w - g / samples for w, g in zip(weights, gradients, strict=True)]
    return (weights, samples, total + x.shape[0] * loss), loss


@pytest.mark.parametrize("inner", [1, 2])
def test_a_counter_of_samples_counts_those_of_the_batch(inner: int):
    _, _, x, y = jax_arguments()
    first, last = jax_arguments()[0].values()
    state = ([first, last], jnp.int32(0), jnp.float32(0))
    graph = capture_call(counting_step, call_of(counting_step, (state, x, y), {})).captured.graph
    plan = halves_apart(graph, microbatches=2)
    plan = replace(plan, mesh=Mesh.of((2, inner)))
    step = partita.parallelize(counting_step, (state, x, y), plan=plan)
    expected = counting_step(state, x, y)
    result = step(state, x, y)
    assert result[0][1] == 8
    assert difference(result, expected) < 1e-5


def sum_step(weight, x):
    gradient = jax.grad(lambda w: jnp.sum((x @ w) ** 2))(weight)
    return weight - 0.01 * gradient


def mean_loss(weights, x, y):
    for weight in weights:
        x = jnp.tanh(x @ weight)
    return jnp.mean((x - y) ** 2)


def captured_step(optimizer, loss, weights):
    def step(state, x, y):
        weights, slots = state
        value, gradients = jax.value_and_grad(loss)(weights, x, y)
        updates, slots = optimizer.update(gradients, slots, weights)
        return value, (optax.apply_updates(weights, updates), slots)

    x = jax.ShapeDtypeStruct((8, 16), "float32")
    slots = jax.eval_shape(optimizer.init, weights)
    return capture_call(step, call_of(step, ((weights, slots), x, x), {})).captured


def test_an_update_of_all_variables_at_once_has_a_note():
    shape = jax.ShapeDtypeStruct((16, 16), "float32")
    captured = captured_step(optax.flatten(optax.adam(0.1)), mean_loss, [shape, shape])
    step = in_pieces(captured, stages_plan(captured.graph, [0, 1], microbatches=2))
    (note,) = joint_updates(step.cut)
    assert note.startswith(
        "the update reads gradients of device groups 0 and 1 in one instruction (concatenate), so "
        "group 1 stores the state that follows from it"
    )
    separate = captured_step(optax.adam(0.1), mean_loss, [shape, shape])
    step = in_pieces(separate, stages_plan(separate.graph, [0, 1], microbatches=2))
    assert joint_updates(step.cut) == ()


def test_layers_in_one_loop_have_no_stages():
    def loss(weights, x, y):
        x, _ = jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)
        return jnp.mean((x - y) ** 2)

    shape = jax.ShapeDtypeStruct((4, 16, 16), "float32")
    captured = captured_step(optax.sgd(0.1), loss, shape)
    (name,) = [operator.name for operator in captured.graph.operators]
    plan = stages_plan(captured.graph, [0], microbatches=2)
    in_two = replace(plan, mesh=Mesh.of((2,)))
    reason = rf"'{name}' computes 4 layers in one loop \(lax.scan\), which is one operator"
    with pytest.raises(PlanError, match=rf"Stage 1 of the plan has no operators.*{reason}"):
        check(in_two, captured.graph)
    with pytest.raises(PlanError, match=rf"the model has no 'first'.*{reason}"):
        check(replace(in_two, choices={"first": {"a": "at(0)"}}), captured.graph)


def test_a_sum_over_samples_is_refused():
    arguments = (jnp.ones((4, 2)), np.ones((8, 4), "float32"))
    graph = capture_call(sum_step, call_of(sum_step, arguments, {})).captured.graph
    plan = stages_plan(graph, [0] * len(graph.operators), microbatches=2)
    with pytest.raises(PlanError, match="is not a mean over the samples"):
        partita.parallelize(sum_step, arguments, plan=plan)


def test_an_output_without_a_rule_is_refused():
    def step(weight, x):
        gradient = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(weight)
        return weight - 0.01 * gradient, x.T @ x

    arguments = (jnp.ones((3, 2)), np.ones((8, 3), "float32"))
    graph = capture_call(step, call_of(step, arguments, {})).captured.graph
    plan = stages_plan(graph, [0] * len(graph.operators), microbatches=2)
    with pytest.raises(PlanError, match="Return its mean, return a value per sample"):
        partita.parallelize(step, arguments, plan=plan)


# ------------------------------------------------------------------------------------------ fit


def test_fit_trains_in_stages_with_a_ragged_last_batch():
    x, y = batch(mlp(), 22)
    lines = []
    losses = []
    for staged in (False, True):
        keras.utils.set_random_seed(0)
        model = mlp()
        if staged:
            graph = capture_model(model, (x[:8], y[:8])).graph
            plan = halves_apart(graph, microbatches=4)
            partita.parallelize(model, plan=plan, say=lines.append)
        history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
        losses.append([*history["loss"], *history["accuracy"], *model.evaluate(x, y, verbose=0)])
    assert np.allclose(*losses, rtol=1e-5)
    assert lines[-1] == (
        "a batch of 6 is not a multiple of 4 microbatches, so it runs in 3; use batches of a "
        "multiple of 4"
    )


def test_layers_that_see_a_microbatch_are_named_with_the_compilers_figures():
    x = inputs = keras.Input((16,))
    x = layers.Dense(16, name="d0")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.5, name="drop")(x)
    model = compiled(layers.Dense(8, name="out")(x), inputs)
    graph = capture_model(model, batch(model)).graph
    plan = halves_apart(graph, microbatches=4)
    pieces = in_pieces(capture_model(model, batch(model)), plan).cut
    statistics, draws = changed_meanings(pieces, plan)
    assert statistics == (
        "'norm' normalizes over a microbatch of 2, and updates its moving statistics 4 times per "
        "step"
    )
    assert draws.endswith(
        "draws anew for each microbatch: other numbers than one device, of the same distribution"
    )
    assert changed_meanings(pieces, replace(plan, microbatches=1)) == ()
