"""Steps captured for a platform that is not here: its kernels, their splits, their local calls."""

import json
import lzma
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import pytest
from keras import layers

import partita
from partita.capture import targets
from partita.capture.jax_functions import Leaf, Signature, graph_of
from partita.capture.mosaic import grid_of
from partita.capture.prepare import prepare_text
from partita.capture.reader import read
from partita.capture.targets import CaptureTarget, choices_for
from partita.cost.terms import cost_terms
from partita.errors import CaptureError, PlanError
from partita.execute.annotate import annotate
from partita.execute.program import planned_step
from partita.machine import load
from partita.planning import best_plan, predict_plan, resolve_plan
from partita.plans.check import check
from partita.plans.layout import layout_of
from partita.plans.plan import Mesh, Plan

DATA = Path(__file__).parent.parent / "data"
TEXTS = json.loads(lzma.decompress((DATA / "h100_steps.json.xz").read_bytes()))
"""StableHLO of the steps of small Keras models, as jax 0.11.2 and keras 3.15.1 lowered them on an
H100, batch 16; attention has 4 heads of 64 elements and 128 positions."""
ROLES = {"0": "parameter", "1": "state", "2": "optimizer", "3": "state"}


def stored_graph(name):
    """The graph of a stored text."""
    main = re.search(r"func.func public @main.*", TEXTS[name])[0]
    paths = re.findall(r'%arg\d+: tensor<[^>]*> loc\("([^"]*)"', main)
    state = [Leaf(path, ROLES[path[6]]) for path in paths if path.startswith("state")]
    batch = [Leaf(path, "batch") for path in paths if path.startswith("data")]
    signature = Signature(tuple(state), tuple(batch), tuple(range(len(paths))))
    target = CaptureTarget("cuda")
    return graph_of(prepare_text(TEXTS[name], "cuda"), signature, name, 16, target)


def kernels(graph):
    """The kernels of libraries in a graph."""
    names = ("fused_attention", "recurrence", "custom_call")
    return [instruction for instruction in graph.instructions if instruction.name in names]


@pytest.mark.parametrize("name", TEXTS)
def test_a_step_lowered_on_a_gpu_is_read_and_planned(name):
    graph = stored_graph(name)
    machine = load("h100:4")
    split = predict_plan(graph, machine, resolve_plan("dp", graph, machine))
    alone = predict_plan(graph, machine, resolve_plan("one", graph, machine))
    assert split.flops < alone.flops
    assert graph.notes == ()


def test_attention_is_one_operator_without_scores():
    graph = stored_graph("mha_bf16_causal")
    forward, backward = kernels(graph)
    batch, heads, positions, depth = 16, 4, 128, 64
    assert forward.flops == 4 * batch * heads * positions * positions * depth / 2
    assert backward.flops == 2.5 * forward.flops
    scores = batch * heads * positions * positions
    assert max(tensor.size for tensor in graph.tensors) < scores
    [number] = [n for n, o in enumerate(graph.operators) if o.kind == "attention"]
    factors = {
        graph.factors[f].name: graph.factors[f].size for f in graph.operators[number].factors
    }
    assert factors == {"S": batch, "A": heads}
    work = [w for w in cost_terms(graph).operators[number].work if w.op_class == "attention"]
    array = 2 * batch * heads * positions * depth
    statistics = 4 * batch * heads * positions
    assert sorted(sum(nbytes for nbytes, _ in w.traffic) for w in work) == [
        4 * array + statistics,
        8 * array + statistics,
    ]


def test_without_a_causal_mask_attention_computes_twice_as_much():
    causal, _ = kernels(stored_graph("mha_bf16_causal"))
    whole, _ = kernels(stored_graph("mha_bf16"))
    assert whole.flops == 2 * causal.flops


def test_a_recurrent_layer_is_split_by_its_batch():
    graph = stored_graph("bilstm")
    forward, backward = kernels(graph)
    batch, steps, inputs, hidden = 16, 20, 32, 32
    assert forward.flops == 2 * (2 * batch * steps * 4 * hidden * (inputs + hidden))
    assert backward.flops == 2 * forward.flops
    plan = resolve_plan("dp", graph, load("h100:4"))
    layout = layout_of(graph, plan)
    stored = backward.operands[8]
    assert layout.shardings[stored] == ((0, 1),)
    sums = [r for terms in cost_terms(graph).operators for r in terms.reductions]
    assert any(r.nbytes == 4 * graph.tensors[backward.results[3]].size for r in sums)


def attention_model(length=64, heads=8, depth=16, **options):
    """A compiled model of one attention layer."""
    tokens = keras.Input((length, heads * depth))
    attention = layers.MultiHeadAttention(heads, depth, dtype="bfloat16", **options)
    hidden = attention(tokens, tokens, use_causal_mask=True)
    model = keras.Model(tokens, layers.Dense(4, dtype="float32")(hidden))
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize(
    ("target", "depth", "count"),
    [
        ("cuda", 16, 2),
        ("cuda:8.0", 16, 2),
        ("cuda:7.0", 16, 0),
        ("cuda:8.0", 136, 0),
        ("cuda", 136, 2),
        ("cuda", 20, 0),
        ("tpu", 16, 0),
        ("cpu", 16, 0),
    ],
)
def test_keras_chooses_attention_as_on_the_target(target, depth, count):
    """cuDNN needs compute capability 8.0, and heads of at most 128 (256 from 9.0 on) elements, a
    multiple of 8."""
    graph = partita.capture_program(attention_model(depth=depth), 4, target=target).graph
    assert graph.target == target
    assert len(kernels(graph)) == count


def test_a_capture_leaves_keras_and_jax_as_they_were():
    before = (jax.devices, jax.default_backend, jax.default_backend())
    with pytest.raises(ZeroDivisionError), choices_for(CaptureTarget("cuda")):
        assert (jax.default_backend(), jax.devices()[0].platform) == ("gpu", "gpu")
        raise ZeroDivisionError
    assert (jax.devices, jax.default_backend, jax.default_backend()) == before
    assert targets.cudnn_attention.check_compute_capability("8.0") is False
    assert not kernels(partita.capture_program(attention_model(), 4).graph)


def test_lstms_for_cuda_are_cudnn_layers():
    inputs = keras.Input((10, 8))
    hidden = layers.Bidirectional(layers.LSTM(16))(layers.LSTM(12, return_sequences=True)(inputs))
    model = keras.Model(inputs, layers.Dense(2)(hidden))
    model.compile("sgd", "mse")
    assert len(kernels(partita.capture_program(model, 6, target="cuda").graph)) == 4
    assert not kernels(partita.capture_program(model, 6, target="tpu").graph)


def test_an_lstm_in_bfloat16_is_a_loop_because_jax_has_no_cudnn_layer_for_it():
    inputs = keras.Input((10, 8))
    model = keras.Model(inputs, layers.LSTM(16, dtype="mixed_bfloat16")(inputs))
    model.compile("sgd", "mse")
    assert not kernels(partita.capture_program(model, 6, target="cuda").graph)


# ---- local calls


def annotated(captured, choice, mesh):
    """The text of a captured step, whose attention is split by a choice and nothing else."""
    graph = captured.graph
    choices = {o.name: choice if o.kind == "attention" else {} for o in graph.operators}
    plan = check(Plan(graph.name, "h100", mesh, choices), graph)
    source = captured.text.mlir_module_serialized
    return annotate(source, graph, mesh, layout_of(graph, plan))


def test_split_attention_is_called_on_local_samples_and_heads():
    captured = partita.capture_program(attention_model(), 4, target="cuda")
    mesh = Mesh.of((2, 4))
    text = str(
        captured.text.of(
            captured.text, annotated(captured, {"a": "S", "b": "A"}, mesh)
        ).mlir_module()
    )
    assert text.count("sdy.manual_computation") == 2
    assert text.count(r"\22dimensions\22: [\222\22, \222\22, \2264\22, \2264\22]") == 2
    assert re.search(
        r"@__cudnn\$fmhaSoftmax\(.*tensor<2x64x2x16xbf16>.*-> \(tensor<2x2x64x16", text
    )


def biased_step(weights, batch):
    def loss(weights):
        q = batch @ weights["w"]
        heads = q.reshape(4, 32, 8, 16)
        out = jax.nn.dot_product_attention(
            heads, heads[:, :, :2], heads[:, :, 2:4], bias=weights["b"], implementation="cudnn"
        )
        return out.astype("float32").sum()

    value, slopes = jax.value_and_grad(loss)(weights)
    return {name: weights[name] - slopes[name] for name in weights}, value


def test_a_bias_of_all_samples_gets_its_gradient_from_all_devices():
    weights = {
        "w": jax.ShapeDtypeStruct((128, 128), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((1, 8, 32, 32), jnp.bfloat16),
    }
    batch = jax.ShapeDtypeStruct((4, 32, 128), jnp.bfloat16)
    captured = partita.capture_program(biased_step, args=(weights, batch), target="cuda")
    [forward, backward] = kernels(captured.graph)
    assert forward.rule.sizes[:3] == (4, 2, 4), "samples, heads of keys, heads of queries for each"
    assert backward.rule.reduction == (0, 2), "of the bias; of keys, if their heads were split"
    mesh = Mesh.of((2, 2))
    module = annotated(captured, {"a": "S", "b": "P"}, mesh)
    text = str(captured.text.of(captured.text, module).mlir_module())
    assert "dense<[[0, 2], [1, 3]]> : tensor<2x2xi64>" in text
    assert text.count("stablehlo.all_reduce") == 1


def plain_model():
    """A compiled model of one attention layer without a mask."""
    tokens = keras.Input((128, 256))
    attention = layers.MultiHeadAttention(2, 128, dtype="bfloat16", name="attention")
    model = keras.Model(tokens, attention(tokens, tokens))
    model.compile("sgd", "mse")
    return model


def test_splash_attention_on_tpus_runs_on_a_part_of_its_grid():
    captured = partita.capture_program(plain_model(), 4, target="tpu")
    forward, *backward = kernels(captured.graph)
    assert {forward.name, *(k.name for k in backward)} == {"fused_attention"}
    assert forward.flops == 4 * 4 * 2 * 128 * 128 * 128
    assert sum(kernel.flops for kernel in backward) == 3.5 * forward.flops
    mesh = Mesh.of((4, 2))
    module = annotated(captured, {"a": "S", "b": "A"}, mesh)
    text = str(captured.text.of(captured.text, module).mlir_module())
    assert text.count("sdy.manual_computation") == 3
    config = re.search(r'@tpu_custom_call.*?backend_config = "(.*?)"', text)[1]
    ranks = [3, 3, 4, 4, 4, 3, 3, 2, 3, 3, 3, 4, 4]
    grid = grid_of(config.replace(r"\22", '"'), ranks)
    assert grid.bounds == (1, 1, 1, 1), "samples, heads, blocks of queries, blocks of keys"
    assert grid.windows[2] == ((0,), (1,), (), ())
    assert re.search(r"@tpu_custom_call.*tensor<1x1x128x128xbf16>", text)


def test_products_run_in_tf32_unless_they_ask_for_full_precision():
    """NVIDIA's H100 does 495 TFLOP/s in TF32 and 67 in float32."""

    def step(weights, batch):
        def loss(weights):
            first, second = weights
            hidden = jnp.dot(batch, first)
            return (jnp.dot(hidden, second, precision="highest") ** 2).sum()

        value, slopes = jax.value_and_grad(loss)(weights)
        return [w - g for w, g in zip(weights, slopes, strict=True)], value

    weights = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * 2
    batch = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    graph = partita.capture_program(step, args=(weights, batch), target="cuda").graph
    machine = load("h100")
    products = [i for i in graph.instructions if i.name == "dot_general"]
    assert sorted(i.full_precision for i in products) == [False, False, True, True, True]
    rates = set()
    for operator in cost_terms(graph).operators:
        rates |= {machine.rate("dot", w.dtype) for w in operator.work if w.op_class == "dot"}
    engines = {e.dtype: e.rate for e in machine.device.engines if e.op_class == "dot"}
    assert rates == {engines["tf32"], engines["float32"]}


# ---- other custom calls


def test_a_call_with_its_own_rule_is_split_by_it():
    text = """
    func.func public @main(%x: tensor<8x4xf32>) -> tensor<8x6xf32> {
      %0 = stablehlo.custom_call @CustomSPMDPartitioning(%x) {sdy.sharding_rule =
        #sdy.op_sharding_rule<([i, j])->([i, k]) {i=8, j=4, k=6}, custom>}
        : (tensor<8x4xf32>) -> tensor<8x6xf32>
      return %0 : tensor<8x6xf32>
    }"""
    program = read(prepare_text(text, "cuda"))
    assert program.instructions[0].rule.results == (((0,), (2,)),)
    assert program.notes == []


def test_other_calls_are_replicated_and_named_in_one_note():
    text = """
    func.func public @main(%x: tensor<8xf32>) -> tensor<8xf32> {
      %0 = stablehlo.custom_call @first(%x) : (tensor<8xf32>) -> tensor<8xf32>
      %1 = stablehlo.custom_call @second(%0) : (tensor<8xf32>) -> tensor<8xf32>
      return %1 : tensor<8xf32>
    }"""
    program = read(prepare_text(text, "cuda"))
    assert [instruction.rule for instruction in program.instructions] == [None, None]
    assert program.notes == [
        "Every device computes all of the custom calls that cannot be split: 'first', 'second'."
    ]


# ---- bad input


def test_an_unknown_target_is_refused():
    with pytest.raises(CaptureError) as error:
        partita.capture_program(attention_model(), 4, target="gpu")
    assert str(error.value) == (
        "Cannot capture for the target 'gpu': it is no platform. Use one of cpu, cuda, tpu, or "
        "'cuda:8.0' for GPUs of compute capability 8.0."
    )


def test_a_program_for_cuda_is_not_run_on_a_cpu():
    captured = partita.capture_program(attention_model(), 4, target="cuda")
    plan = resolve_plan("one", captured.graph, load("h100:2"))
    with pytest.raises(PlanError) as error:
        planned_step(captured, plan)
    name = captured.graph.name
    assert str(error.value) == (
        f"'{name}' was captured for cuda, and the devices here are cpu: capture it with "
        "target='cpu' to run it here."
    )


def test_a_plan_of_another_platform_names_the_operators_that_differ():
    keras.backend.clear_session()
    cuda = partita.capture_program(attention_model(), 4, target="cuda").graph
    keras.backend.clear_session()
    cpu = partita.capture_program(attention_model(), 4, target="cpu").graph
    plan = best_plan(cuda, load("h100:2"))
    assert Plan.from_json(plan.to_json()).target == "cuda"
    with pytest.raises(PlanError) as error:
        check(plan, cpu)
    assert str(error.value) == (
        "The plan was made for another platform (cuda, not cpu): the model has no "
        "'multi_head_attention'; the plan has no choice for 'multi_head_attention:1', "
        "'multi_head_attention:2'. Plan again."
    )


def test_a_transposed_convolution_with_a_kernel_of_its_results_size_is_planned():
    def step(kernel, x):
        def loss(kernel):
            return jnp.mean(jax.lax.conv_transpose(x, kernel, (2, 2), "SAME") ** 2)

        return kernel - jax.grad(loss)(kernel)

    args = (jnp.ones((4, 4, 2, 3)), jnp.ones((8, 2, 2, 2)))
    assert partita.plan(step, args=args, machine="h100:2", stages=False).predicted["seconds"] > 0


def test_pads_that_add_nothing_and_slices_of_all_elements_are_dropped():
    text = """
    func.func public @main(%x: tensor<8xf32>, %zero: tensor<f32>) -> tensor<9xf32> {
      %0 = stablehlo.pad %x, %zero, low = [0], high = [0], interior = [0]
        : (tensor<8xf32>, tensor<f32>) -> tensor<8xf32>
      %1 = stablehlo.slice %0 [0:8] : (tensor<8xf32>) -> tensor<8xf32>
      %2 = stablehlo.pad %1, %zero, low = [1], high = [0], interior = [0]
        : (tensor<8xf32>, tensor<f32>) -> tensor<9xf32>
      return %2 : tensor<9xf32>
    }"""
    (instruction,) = read(prepare_text(text, "cuda")).instructions
    assert instruction.name == "pad" and instruction.operands == (0, 1)
