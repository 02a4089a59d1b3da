"""softmax(QK^T)V by the compilers of absent machines: are scores stored, what do splits emit?

    python benchmarks/attention.py --machines h100:4,tpu-v5e:4     # a minute
    python benchmarks/attention.py --machines host:2 --length 64   # without a compiler to install

A plain attention (products, softmax, product) with its gradients, without weights, split by samples,
by heads and by the positions of queries. A line per machine and split: the compiler's temporary
memory in units of one array of scores, and collective bytes, planned / emitted.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp

import partita
from partita.errors import PartitaError
from partita.graph.operator_graph import Operator, OperatorGraph
from partita.plans.plan import Plan
from partita.search.find import mesh_of

SAMPLES, HEADS, DEPTH = 4, 8, 32
ITEM_BYTES = 2


def attention(query: Any, key: Any, value: Any) -> Any:
    """Attention of [samples, heads, positions, depth] without a kernel of its own."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key) * DEPTH**-0.5
    weights = jax.nn.softmax(scores.astype(jnp.float32), -1).astype(query.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value)


def step(state: Any, batch: Any) -> tuple[Any, Any]:
    """A step that moves the inputs against their gradients."""

    def loss(inputs: Any) -> Any:
        return (attention(*inputs).astype(jnp.float32) ** 2).mean()

    value, gradients = jax.value_and_grad(loss)(batch)
    return state + value, gradients


def factor_of_size(graph: OperatorGraph, operator: Operator, size: int) -> str:
    """The first factor of an operator with a size: queries come before keys."""
    factors = [graph.factors[number] for number in operator.factors]
    return next(factor.name for factor in factors if factor.size == size)


def rows_of(machine_name: str, length: int) -> list[str]:
    """A line for every split."""
    machine = partita.load_machine(machine_name)
    array = jax.ShapeDtypeStruct((SAMPLES, HEADS, length, DEPTH), jnp.bfloat16)
    total = jax.ShapeDtypeStruct((), jnp.float32)
    captured = partita.capture_program(step, args=(total, (array,) * 3), target=machine.target)
    graph = captured.graph
    mesh = mesh_of(machine)
    score_bytes = ITEM_BYTES * SAMPLES * HEADS * length * length / machine.devices
    lines = []
    for split, size in (("samples", SAMPLES), ("heads", HEADS), ("positions", length)):
        choices = {
            operator.name: {axis.name: factor_of_size(graph, operator, size) for axis in mesh.axes}
            for operator in graph.operators
        }
        plan = Plan(graph.name, machine.name, mesh, choices, name=split)
        try:
            compiled = partita.compile_for(plan, captured, machine=machine)
        except PartitaError as error:
            lines.append(f"{machine_name:12} {split:10} {error}")
            continue
        temporaries = compiled.memory.temporaries / score_bytes
        traffic = ", ".join(
            f"{t.kind} {t.planned / 2**20:.2f} / {t.emitted / 2**20:.2f} MiB"
            for t in compiled.traffic
        )
        lines.append(
            f"{machine_name:12} {split:10} temporaries {temporaries:4.2f} x the scores; "
            f"{traffic or 'no collective'}"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", default="h100:4,tpu-v5e:4")
    parser.add_argument("--length", type=int, default=2048, help="positions")
    given = parser.parse_args()
    for machine in given.machines.split(","):
        for line in rows_of(machine, given.length):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
