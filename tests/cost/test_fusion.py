"""Kernels of programs as deep as the largest networks."""

import jax
import jax.numpy as jnp

from partita.capture.program import capture_program
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
    for duplicate in (False, True):
        inside = {i for kernel in fusion(graph, duplicate).kernels.values() for i in kernel}
        assert {i for i, x in enumerate(graph.instructions) if x.name == "tanh"} <= inside
