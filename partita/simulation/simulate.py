"""Simulation of one step of a graph under a plan on a machine. The machine need not be at hand."""

from __future__ import annotations

from partita.cost.predict import Prediction
from partita.cost.terms import Terms, cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.graph.rematerialize import rematerialized
from partita.machine import Machine
from partita.plans.pipeline import is_pipeline, stage_axes
from partita.plans.plan import Plan
from partita.simulation.base import SimulatedStep
from partita.simulation.pipelined import PipelinedStep
from partita.simulation.placed import PlacedStep
from partita.simulation.timeline import Timeline
from partita.simulation.uniform import UniformStep


def simulated_step(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    terms: Terms | None = None,
) -> SimulatedStep:
    """The step of a checked plan. `terms` are the graph's on this machine's backend (computed if
    None, and for a graph with rematerialized operators).

    PlanError where a plan has microbatches or rematerialization and the machine's devices differ.
    """
    if plan.recompute and not is_pipeline(plan):
        graph = rematerialized(graph, plan.recompute)
        terms = None
    terms = terms or cost_terms(graph, machine.backend)
    if is_pipeline(plan):
        return PipelinedStep.of(graph, machine, plan, terms)
    if stage_axes(plan) or machine.kinds:
        return PlacedStep.of(graph, machine, plan, terms)
    return UniformStep(graph, machine, plan, terms)


def predicted(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    terms: Terms | None = None,
) -> Prediction:
    """The prediction of a simulated step: collectives that hide behind kernels cost no time."""
    return simulated_step(graph, machine, plan, terms).prediction()


def simulate(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    terms: Terms | None = None,
) -> Timeline:
    """The timeline of one step: tasks with start and length, waiting, memory and traffic of a
    device.
    """
    return simulated_step(graph, machine, plan, terms).timeline()
