"""The tables of FlexFlow and OptCNN beside Partita's: simulated time and traffic of plans.

A `Case` is one cell of the papers' tables. `run` captures the network without values, makes the
plans, simulates a step of each, and returns a `Row`. Networks are those of `bench.networks`,
machines the presets: two from data sheets, to which nothing is fitted, and `k80-flat`, whose links
have the rate of one published data-parallel step.

The papers count bytes on links. A ring of n devices sends 2 (n-1)/n times the operand of an
all-reduce, (n-1)/n times the result of an all-gather or the operand of a reduce-scatter or
all-to-all, and the operand of a permute once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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
from partita.plans.pipeline import is_one_program
from partita.plans.plan import Plan
from partita.search.find import capacity, find, find_placed, mesh_of
from partita.simulation.simulate import simulate

FLEXFLOW = ("alexnet", "inception-v3", "resnet-101", "rnntc", "rnnlm", "nmt")
OPTCNN = ("lenet", "alexnet", "vgg16", "inception-v3")
COUNTS = (4, 8, 16, 32, 64)
OPTCNN_BATCH = 32
DATA_PARALLEL = "data parallel"
EXPERT = "expert"
FOUND = "found"
OPTCNN_PLAN = "OptCNN's"


@dataclass(frozen=True)
class Case:
    """One cell of a table: a network on some devices of a machine. `batch` is per device."""

    paper: str
    network: str
    machine: str
    devices: int
    batch: int


@dataclass(frozen=True)
class Figures:
    """One plan of a row.

    `seconds` are of the simulated step, `additive_seconds` of the search's sum. `sent_bytes` on
    links and `kernel_seconds` are of all devices, `peak_bytes` of one.
    """

    seconds: float
    additive_seconds: float
    sent_bytes: float
    kernel_seconds: float
    peak_bytes: int
    fits: bool
    """Whether `peak_bytes` fit a device."""


@dataclass(frozen=True)
class Row:
    """The result of a case, with the published figures (`paper`) if there are any."""

    case: Case
    parameters: int
    operators: int
    capture_seconds: float
    search_seconds: float = 0.0
    gap: float | None = None
    plans: Mapping[str, Figures] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    """OptCNN's VGG-16 claim: traffic of the first dense layer, by sample and by parameter, bytes.
    """
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
    ("nmt", "k80-flat", 64): {
        "seconds": {EXPERT: 2.6, FOUND: 1.1},
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
"""(network, machine, devices) -> figures of FlexFlow (arXiv 1807.05358, section 8) or OptCNN (arXiv
1802.04924, section 6)."""


def cases(
    only: str | None = None,
    machine: str | None = None,
    devices: int | None = None,
) -> list[Case]:
    """The papers' cells, then the two large transformers.

    `only`, `machine` (a name that `load` accepts) and `devices` restrict them. Cases of one capture
    follow each other.
    """
    if only is not None and only not in NETWORKS:
        raise PartitaError(
            f"'{only}' is not a network of the papers: use one of {', '.join(NETWORKS)}."
        )
    selected = []
    for case in _all_cases(only, machine):
        is_network = not only or case.network == only
        is_count = not devices or case.devices == devices
        if is_network and is_count and case.devices <= load(case.machine).devices:
            selected.append(case)
    if not selected:
        counts = ", ".join(map(str, COUNTS))
        raise PartitaError(
            f"The tables have no cell of {only or 'any network'} on {devices or 'any number of'} "
            f"devices of {machine or 'the clusters'}: use {counts} devices, up to the size of the "
            "machine."
        )
    return sorted(selected, key=lambda case: (case.paper, case.network, case.batch * case.devices))


def _all_cases(only: str | None, machine: str | None) -> Iterator[Case]:
    for cluster in [machine] if machine else ["k80-cluster", "k80-flat", "p100-cluster"]:
        limit = load(cluster).devices
        for network in FLEXFLOW:
            for count in COUNTS:
                if count <= limit:
                    yield Case(
                        "FlexFlow",
                        network,
                        cluster,
                        count,
                        NETWORKS[network].batch,
                    )
        if only == "rnnlm-2":
            yield Case(
                "FlexFlow",
                only,
                cluster,
                4,
                NETWORKS[only].batch,
            )
    cluster = machine or "p100-cluster"
    for network in OPTCNN:
        for count in (4, 8, 16):
            yield Case("OptCNN", network, cluster, count, OPTCNN_BATCH)
    yield Case("OptCNN", "vgg16", cluster, 2, OPTCNN_BATCH)
    for network, preset, count in (("llama", "dgx-h100:8", 64), ("gpt3", "dgx-a100:128", 1024)):
        yield Case(
            "",
            network,
            machine or preset,
            count,
            NETWORKS[network].batch,
        )


@lru_cache(maxsize=1)
def _captured(network: str, batch: int, target: str) -> tuple[OperatorGraph, float]:
    start = time.perf_counter()
    graph = capture_program(model(network), batch, target=target).graph
    return graph, time.perf_counter() - start


def run(case: Case) -> Row:
    """The row of one case: captured, planned and simulated.

    The papers' networks are captured for a CPU, whose program is nearest to those of their time.
    Their space is FlexFlow's, with placed operators. The large transformers are captured for their
    machine, and their space has stages and microbatches.
    """
    machine = load(case.machine).with_devices(case.devices)
    target = "cpu" if case.paper else machine.target
    graph, capture_seconds = _captured(case.network, case.batch * case.devices, target)
    row = Row(
        case,
        graph.parameter_count,
        len(graph.operators),
        capture_seconds,
        paper=PAPER.get((case.network, case.machine, case.devices), {}),
    )
    start = time.perf_counter()
    try:
        result = find_placed(graph, machine) if case.paper else find(graph, machine, stages=True)
    except MemoryBudgetError as error:
        return replace(
            row,
            search_seconds=time.perf_counter() - start,
            note=str(error),
        )
    row = replace(
        row,
        search_seconds=time.perf_counter() - start,
        gap=result.gap,
    )
    mesh = mesh_of(machine)
    plans = {
        DATA_PARALLEL: result.baselines[DATA_PARALLEL][0],
        EXPERT: expert(graph, machine.name, mesh, NETWORKS[case.network].family),
    }
    if case.network == "vgg16" and case.devices == 4:
        plans[OPTCNN_PLAN] = optcnn_vgg16(
            graph,
            machine.name,
            mesh,
        )
    plans[FOUND] = result.plan
    layers = {}
    if case.network == "vgg16" and case.devices == 2:
        by_parameter = one_weird_trick(graph, machine.name, mesh)
        layers = {
            "by sample": sent_bytes(graph, machine, plans[DATA_PARALLEL], "fc1"),
            "by parameter": sent_bytes(graph, machine, by_parameter, "fc1"),
        }
    figures = {name: figures_of(graph, machine, plan) for name, plan in plans.items()}
    return replace(row, plans=figures, layers=layers)


def figures_of(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
) -> Figures:
    """Predicted time and traffic of one plan."""
    timeline = simulate(graph, machine, plan)
    additive_seconds = timeline.seconds
    kernel_seconds = plan.devices * timeline.by_kind().get("compute", 0.0)
    if is_one_program(plan):
        additive_seconds = predict(graph, machine, plan).seconds
        traffic = sent_bytes(graph, machine, plan)
    else:
        # Traffic of stages is known as operands, by stage.
        traffic = float(timeline.total_traffic)
        kernel_seconds /= timeline.groups
    return Figures(
        seconds=timeline.seconds,
        additive_seconds=additive_seconds,
        sent_bytes=traffic,
        kernel_seconds=kernel_seconds,
        peak_bytes=timeline.peak_bytes,
        fits=timeline.peak_bytes <= capacity(machine),
    )


def sent_bytes(
    graph: OperatorGraph, machine: Machine, plan: Plan, layer: str | None = None
) -> float:
    """Bytes on links of all devices in a step, or of one layer's collectives only."""
    layout = layout_of(graph, plan)
    total = 0.0
    for collective in collectives(graph, plan.mesh, layout, machine.backend):
        if layer is None or graph.operators[collective.operator].name == layer:
            group = math.prod(plan.mesh.sizes[axis] for axis in collective.axes)
            total += collective.total * on_links(collective.kind, group)
    return total * plan.devices


def on_links(kind: str, group: int) -> float:
    """Bytes that each device of a group sends per byte of a collective.

    >>> on_links("all_reduce", 4), on_links("all_gather", 4), on_links("collective_permute", 4)
    (1.5, 0.75, 1.0)
    """
    if kind == "collective_permute":
        return 1.0
    passes = 2 if kind == "all_reduce" else 1
    return passes * (group - 1) / group
