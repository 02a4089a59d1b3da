"""Split attention computes what whole attention does: a stand-in takes the place of cuDNN's kernel
in both programs, so that a CPU runs them."""

import json
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import ir

from partita.capture import stablehlo
from partita.capture.jax_functions import Leaf, Text, capture_step
from partita.capture.targets import CaptureTarget
from partita.execute import program
from partita.execute.annotate import annotate
from partita.execute.verify import compare_steps
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan

CALL = re.compile(
    r"stablehlo\.custom_call @__cudnn\$fmhaSoftmax(Backward)?\((.*?)\) (\{.*\}) : (.*)"
)
"""(is backward, operands, attributes, types) of a call of cuDNN's attention."""


def weights_of(scale, is_causal, q, k):
    """(weights [batch, head, query, key], logarithms of their sums)."""
    scores = scale * jnp.einsum("bqnd,bknd->bnqk", q, k)
    if is_causal:
        scores += np.triu(np.full(scores.shape[2:], -1e9, "float32"), 1)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    sums = jnp.log(jnp.sum(jnp.exp(scores - largest), axis=-1)) + largest[..., 0]
    return jnp.exp(scores - sums[..., None]), sums


def for_queries(q, *values):
    """Keys and values [batch, position, head, element], a head for each head of queries."""
    repeats = [jnp.stack([x] * (q.shape[2] // x.shape[2]), axis=3) for x in values]
    return [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in repeats]


def attention(scale, is_causal, q, k, v):
    """(weighted values [batch, head, position, element], logarithms of sums, no work space)."""
    q, k, v = (x.astype("float32") for x in (q, k, v))
    k, v = for_queries(q, k, v)
    weights, sums = weights_of(scale, is_causal, q, k)
    out = jnp.einsum("bnqk,bknd->bnqd", weights, v)
    return out.astype("bfloat16"), sums, jnp.zeros(0, "uint8")


def attention_gradients(scale, is_causal, q, k, v, sums, slopes, out):
    """Gradients [batch, head, position, element] of queries, keys and values."""
    q, k, v, slopes, out = (x.astype("float32") for x in (q, k, v, slopes, out))
    heads = k.shape[2]
    k, v = for_queries(q, k, v)
    weights, own_sums = weights_of(scale, is_causal, q, k)
    weights *= jnp.exp(own_sums - sums)[..., None]  # the sums of the forward pass count
    inner = jnp.einsum("bqnd,bknd->bnqk", slopes, v)
    inner -= jnp.einsum("bqnd,bqnd->bnq", slopes, out)[..., None]
    scaled = scale * weights * inner
    gradients = [
        jnp.einsum("bnqk,bknd->bnqd", scaled, k),
        jnp.einsum("bnqk,bqnd->bnkd", scaled, q),
        jnp.einsum("bnqk,bqnd->bnkd", weights, slopes),
    ]
    for n in (1, 2):
        shape = gradients[n].shape
        gradients[n] = gradients[n].reshape(shape[0], heads, -1, *shape[2:]).sum(axis=2)
    return *(g.astype("bfloat16") for g in gradients), jnp.zeros(0, "uint8")


def found(pattern, text):
    """The group of a pattern in a text."""
    match = re.search(pattern, text, re.S)
    assert match is not None, pattern
    return match[1]


def shape_of(text):
    """The shape of a tensor type's inner text, as "2x8xbf16"."""
    *dims, dtype = text.split("x")
    dtypes = {"bf16": "bfloat16", "f32": "float32"}
    return jax.ShapeDtypeStruct(tuple(map(int, dims)), dtypes[dtype])


def with_stand_ins(bytecode):
    """A program with functions in the place of cuDNN's attention."""
    functions = []

    def stand_in(match):
        is_backward, operands, attributes, types = match.groups()
        text = found(r'backend_config = "(.*?)"[,}]', attributes).replace(r"\22", '"')
        config = json.loads(text)["cudnn_fmha_backend_config"]
        reference = partial(
            attention_gradients if is_backward else attention,
            config["fmha_scale"],
            "CAUSAL" in config["mask_type"],
        )
        shapes = map(shape_of, re.findall(r"tensor<(.*?)>", types.split("->")[0]))
        name = f"stand_in_{len(functions)}"
        lowered = str(jax.jit(reference).lower(*shapes).compiler_ir("stablehlo"))
        body = found(r"func\.func public @main(.*\n  \})", lowered)
        functions.append(f"func.func private @{name}{body}\n")
        return f"func.call @{name}({operands}) : {types}"

    with stablehlo.context():
        text = CALL.sub(stand_in, str(stablehlo.parse(bytecode)))
        end = text.index("\n}") + 1
        return stablehlo.serialize(ir.Module.parse(text[:end] + "".join(functions) + text[end:]))


def step_of(weights, batch):
    """A step of attention with grouped queries and a mask."""

    def loss(weights):
        heads = (batch @ weights).reshape(4, 32, 16, 16)
        q, k, v = heads[:, :, :8], heads[:, :, 8:12], heads[:, :, 12:]
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return (out.astype("float32") ** 2).mean()

    value, slopes = jax.value_and_grad(loss)(weights)
    return {"loss": value}, weights - slopes


@pytest.mark.parametrize("choice", [{"a": "S", "b": "A"}, {"a": "A", "b": "S"}])
def test_split_attention_computes_what_whole_attention_does(choice, monkeypatch):
    weights = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    batch = jax.ShapeDtypeStruct((4, 32, 64), jnp.bfloat16)
    leaves = [Leaf("w", "parameter")]
    target = CaptureTarget.of("cuda")
    captured = capture_step(step_of, weights, batch, leaves, batch_size=4, target=target)
    graph = captured.graph
    choices = {o.name: choice if o.kind == "attention" else {} for o in graph.operators}
    plan = check(Plan(graph.name, "h100", Mesh.of((2, 4)), choices), graph)
    monkeypatch.setattr(program, "_check_platform", lambda graph, mesh: None)
    monkeypatch.setattr(program, "annotate", lambda *given: with_stand_ins(annotate(*given)))
    step = program.planned_step(captured, plan)
    runnable = Text.of(captured.text, with_stand_ins(captured.text.mlir_module_serialized))
    generator = np.random.default_rng(0)
    state = generator.normal(size=(64, 256)).astype(jnp.bfloat16)
    samples = generator.normal(size=(4, 32, 64)).astype(jnp.bfloat16)
    differences = compare_steps(replace(captured, text=runnable), step, state, samples)
    assert len(differences) == 2
    assert max(difference.relative for difference in differences) < 0.02
