"""The tables of FlexFlow and OptCNN beside ours: per network, cluster and device count, what plans are predicted to take and to send.

A `Case` is one cell of the papers' tables; `run` captures the network without values, makes the plans, simulates a step of each, and
returns a `Row`. Nothing here is fitted to the papers: the machines are the presets, the networks those of `bench.networks`.

The papers count the bytes that cross links. A ring of n devices sends 2 (n-1)/n times the operand of an all-reduce, (n-1)/n times the
result of an all-gather and the operand of a reduce-scatter or an all-to-all, and what a permute moves once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from partita.bench.networks import NETWORKS, model
from partita.bench.published import expert, one_weird_trick, optcnn_vgg16
from partita.capture.program import capture_program
from partita.cost.collectives import collectives
from partita.cost.predict import predict
from partita.errors import MemoryBudgetError, PartitaError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.layout import layout_of
from partita.plans.pipeline import runnable
from partita.plans.plan import Plan
from partita.search.find import capacity, find, mesh_of
from partita.simulation.simulate import simulate

FLEXFLOW = ("alexnet", "inception-v3", "resnet-101", "rnntc", "rnnlm", "nmt")
OPTCNN = ("lenet", "alexnet", "vgg16", "inception-v3")
COUNTS = (4, 8, 16, 32, 64)
OPTCNN_BATCH = 32
DATA_PARALLEL, EXPERT, FOUND, OPTCNN_PLAN = "data parallel", "expert", "found", "OptCNN's"


@dataclass(frozen=True)
class Case:
    """One cell of a table: a network on so many devices of a machine. `batch` is that of one device."""

    paper: str
    network: str
    machine: str
    devices: int
    batch: int


@dataclass(frozen=True)
class Figures:
    """One plan of a row: seconds of a simulated step, seconds as the search counts them, bytes on links and seconds of kernels of all devices."""

    seconds: float
    additive_seconds: float
    sent_bytes: float
    kernel_seconds: float
    peak_bytes: int
    fits: bool
    """Whether a device has so much memory."""


@dataclass(frozen=True)
class Row:
    """What a case came out as. `paper` are the published figures, where there are any."""

    case: Case
    parameters: int
    operators: int
    capture_seconds: float
    search_seconds: float = 0.0
    gap: float | None = None
    plans: Mapping[str, Figures] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    """OptCNN's VGG-16 claim: bytes that the first dense layer sends, by sample and by parameter."""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        plans = {name: vars(f) for name, f in self.plans.items()}
        return {
            **vars(self),
            "case": vars(self.case),
            "plans": plans,
            "paper": dict(self.paper),
            "layers": dict(self.layers),
        }


PAPER: Mapping[tuple[str, str, int], Mapping[str, Any]] = {
    ("nmt", "k80-cluster", 64): {
        "seconds": {DATA_PARALLEL: 1.9, EXPERT: 2.6, FOUND: 1.1},
        "gigabytes": {DATA_PARALLEL: 65.8, EXPERT: 24.2, FOUND: 12.1},
        "kernel_seconds": {DATA_PARALLEL: 35.7, EXPERT: 28.2, FOUND: 28.7},
    },
    ("inception-v3", "p100-cluster", 4): {"found_over_data_parallel": 1 / 0.88},
    ("inception-v3", "p100-cluster", 16): {"samples_per_second": 2208},
    ("rnntc", "p100-cluster", 16): {"samples_per_second": 5846},
    ("rnnlm", "p100-cluster", 16): {"samples_per_second": 3749},
    ("nmt", "p100-cluster", 16): {"samples_per_second": 3923},
    ("vgg16", "p100-cluster", 2): {"megabytes": {"by sample": 408, "by parameter": 32}},
}
"""(network, machine, devices) -> what FlexFlow (arXiv 1807.05358, section 8) or OptCNN (arXiv 1802.04924, section 6) reports."""


def cases(
    only: str | None = None, machine: str | None = None, devices: int | None = None
) -> list[Case]:
    """The papers' cells, then the two large transformers; only those of a network, a machine (any that `load` knows) or a device count."""
    if only is not None and only not in NETWORKS:
        raise PartitaError(
            f"There is no network {only!r} to bench. There are {', '.join(NETWORKS)}."
        )
    found = []
    for cluster in [machine] if machine else ["k80-cluster", "p100-cluster"]:
        most = load(cluster).devices
        for network in FLEXFLOW:
            found += [
                Case("FlexFlow", network, cluster, n, NETWORKS[network].batch)
                for n in COUNTS
                if n <= most
            ]
        if only == "rnnlm-2":
            found.append(Case("FlexFlow", only, cluster, 4, NETWORKS[only].batch))
    cluster = machine or "p100-cluster"
    found += [Case("OptCNN", network, cluster, 4, OPTCNN_BATCH) for network in OPTCNN]
    found.append(Case("OptCNN", "vgg16", cluster, 2, OPTCNN_BATCH))
    for network, cluster, count in (("llama", "dgx-h100:8", 64), ("gpt3", "dgx-a100:128", 1024)):
        found.append(Case("", network, machine or cluster, count, NETWORKS[network].batch))
    kept = [
        c
        for c in found
        if (not only or c.network == only)
        and (not devices or c.devices == devices)
        and c.devices <= load(c.machine).devices
    ]
    if not kept:
        raise PartitaError(
            f"The papers' tables have no such cell: {only or 'any network'} on {devices or 'any number of'} devices of {machine or 'the clusters'}. "
            f"Counts are {', '.join(map(str, COUNTS))}, as far as the machine has devices."
        )
    return sorted(
        kept, key=lambda c: (c.paper, c.network, c.batch * c.devices)
    )  # cells of one capture follow each other


@lru_cache(maxsize=1)
def _captured(network: str, batch: int) -> tuple[OperatorGraph, float]:
    start = time.perf_counter()
    graph = capture_program(model(network), batch).graph
    return graph, time.perf_counter() - start


def run(case: Case) -> Row:
    """The row of one case: captured, planned and simulated."""
    graph, seconds = _captured(case.network, case.batch * case.devices)
    machine = load(case.machine).with_devices(case.devices)
    mesh = mesh_of(machine)
    row = Row(
        case,
        graph.parameter_count,
        len(graph.operators),
        seconds,
        paper=PAPER.get((case.network, case.machine, case.devices), {}),
    )
    start = time.perf_counter()
    try:
        result = find(graph, machine, stages=not case.paper)
    except MemoryBudgetError as error:
        return Row(
            **{**vars(row), "search_seconds": time.perf_counter() - start, "note": str(error)}
        )
    searched = time.perf_counter() - start
    plans = {
        DATA_PARALLEL: result.baselines[DATA_PARALLEL][0],
        EXPERT: expert(graph, machine.name, mesh, NETWORKS[case.network].family),
    }
    if case.network == "vgg16" and case.devices == 4:
        plans[OPTCNN_PLAN] = optcnn_vgg16(graph, machine.name, mesh)
    plans[FOUND] = result.plan
    layers = {}
    if case.network == "vgg16" and case.devices == 2:
        by_sample, by_parameter = plans[DATA_PARALLEL], one_weird_trick(graph, machine.name, mesh)
        layers = {
            "by sample": sent_bytes(graph, machine, by_sample, "fc1"),
            "by parameter": sent_bytes(graph, machine, by_parameter, "fc1"),
        }
    figures = {name: figures_of(graph, machine, plan) for name, plan in plans.items()}
    return Row(
        **{
            **vars(row),
            "search_seconds": searched,
            "gap": result.gap,
            "plans": figures,
            "layers": layers,
        }
    )


def figures_of(graph: OperatorGraph, machine: Machine, plan: Plan) -> Figures:
    """What one plan is predicted to take and send."""
    timeline = simulate(graph, machine, plan)
    kernels = plan.devices * timeline.by_kind().get("compute", 0.0)
    fits = timeline.peak_bytes <= capacity(machine)
    if not runnable(plan):  # what stages send is known by stage: operands, as in the table of plans
        return Figures(
            timeline.seconds,
            timeline.seconds,
            float(timeline.total_traffic),
            kernels / timeline.groups,
            timeline.peak_bytes,
            fits,
        )
    return Figures(
        timeline.seconds,
        predict(graph, machine, plan).seconds,
        sent_bytes(graph, machine, plan),
        kernels,
        timeline.peak_bytes,
        fits,
    )


def sent_bytes(
    graph: OperatorGraph, machine: Machine, plan: Plan, layer: str | None = None
) -> float:
    """Bytes that all devices together put on links in a step, or those of one layer's collectives."""
    sizes = plan.mesh.sizes
    total = 0.0
    for c in collectives(graph, plan.mesh, layout_of(graph, plan), machine.backend):
        if layer is None or graph.operators[c.operator].name == layer:
            total += c.total * on_links(c.kind, math.prod(sizes[a] for a in c.axes))
    return total * plan.devices


def on_links(kind: str, group: int) -> float:
    """What each device of a group sends for every byte that a collective is said to have.

    >>> on_links("all_reduce", 4), on_links("all_gather", 4), on_links("collective_permute", 4)
    (1.5, 0.75, 1.0)
    """
    if kind == "collective_permute":
        return 1.0
    return (2 if kind == "all_reduce" else 1) * (group - 1) / group
