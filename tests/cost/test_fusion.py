"""Kernels of programs as deep as the largest networks."""

import jax
import jax.numpy as jnp

from partita.capture.program import capture_program
from partita.cost.backends.base import FusionRules
from partita.cost.fusion import fusion


def test_a_value_read_again_thousands_of_instructions_later_is_followed_to_its_readers():
    def step(w, x):
        shared = y = x * w + x
        for _ in range(1500):
            y = jnp.tanh(y) + 1.0
        return w - jnp.sum(y * shared)

    args = jax.ShapeDtypeStruct((), "float32"), jax.ShapeDtypeStruct((64, 64), "float32")
    graph = capture_program(step, args=args).graph
    assert len(graph.instructions) > 3000
    for duplicates in (False, True):
        rules = FusionRules(duplicates, cheap_elementwise=False)
        inside = {i for kernel in fusion(graph, rules).kernels.values() for i in kernel}
        assert {i for i, x in enumerate(graph.instructions) if x.name == "tanh"} <= inside


def test_only_a_compiler_with_fast_elementwise_instructions_computes_them_again():
    def step(w, x):
        y = jnp.exp(x * w)
        return w - jnp.sum(y, axis=0) * jnp.sum(jnp.transpose(y), axis=1), y @ y

    args = (jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((64, 64), "float32"))
    graph = capture_program(step, args=args).graph
    exponential = next(i for i, x in enumerate(graph.instructions) if x.name == "exponential")

    def copies(cheap):
        rules = FusionRules(duplicates=False, cheap_elementwise=cheap)
        return len(fusion(graph, rules).computed_in[exponential])

    assert copies(False) == 1
    assert copies(True) > 1
