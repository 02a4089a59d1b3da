"""A plan as the compiler of its machine makes it: memory, collectives, FLOPs, beside the plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from partita.capture.jax_functions import Captured
from partita.cost.collectives import collectives
from partita.cost.memory import memory
from partita.cost.work import local_flops
from partita.errors import MemoryBudgetError
from partita.execute.compiled_work import work_of
from partita.execute.compilers.compiled_pieces import CompiledPieces, compile_pieces
from partita.execute.compilers.family import program_compiler
from partita.execute.compilers.request import request_of
from partita.execute.compilers.run import (
    CompiledProgram,
    ProgramMemory,
    ProgramTooLarge,
    compile_program,
)
from partita.execute.emitted import collectives_of
from partita.execute.hlo import HloModule
from partita.execute.staged import in_pieces
from partita.execute.staged_verify import planned_collectives, planned_peaks, planned_piece
from partita.execute.verification import Traffic, compared_traffic
from partita.graph.rematerialize import rematerialized
from partita.machine import Machine
from partita.plans.adapt import fit_mesh
from partita.plans.check import check
from partita.plans.layout import layout_of
from partita.plans.pipeline import is_one_program
from partita.plans.plan import Plan
from partita.simulation.simulate import predicted
from partita.units import format_bytes, format_flops, format_seconds


@dataclass(frozen=True)
class CompiledPlan:
    """A plan beside its compiled program. Bytes, FLOPs and seconds of one device and step.

    A plan in pieces has the memory of its fullest device group. Its arguments are the variables,
    the batch, sums of gradients and values of microbatches. FLOPs, collectives and kernels are
    those of one device of every group together.
    """

    plan: str
    """Name of the plan."""
    machine: str
    compiler: str
    version: str
    """Of the compiler and of JAX."""
    memory: ProgramMemory
    """By the compiler."""
    planned_peak_bytes: float
    capacity_bytes: int
    """Memory of a device."""
    traffic: tuple[Traffic, ...]
    """Collectives by kind and by layer."""
    flops: float
    planned_flops: float
    product_flops: float
    """FLOPs of matrix products, convolutions and attention."""
    fusions: int
    """Kernels that the compiler fused."""
    estimated_seconds: float | None
    """The compiler's own estimate of its kernels without transfers, None without one."""
    compile_seconds: float
    groups: tuple[tuple[float | None, int], ...] = ()
    """(planned, compiled) peak bytes of a device of every device group, for a plan in pieces."""

    @property
    def fits(self) -> bool:
        """Whether a device has the memory that the program needs."""
        return self.memory.peak <= self.capacity_bytes

    def check_fits(self) -> None:
        """MemoryBudgetError for a program that needs more memory than a device has."""
        if not self.fits:
            peak = self.memory.peak
            sentence = _needs(self.plan, self.machine, peak, self.capacity_bytes)
            raise MemoryBudgetError(sentence, peak / max(1.0, self.planned_peak_bytes))

    def to_json(self) -> dict[str, Any]:
        """The figures for a JSON file."""
        values = asdict(self)
        values["memory"]["peak"] = self.memory.peak
        return {**values, "fits": self.fits}

    def rows(self) -> list[tuple[str, str, str]]:
        """(figure, planned, compiled), as text."""
        rows = [
            (
                "peak memory",
                format_bytes(self.planned_peak_bytes),
                format_bytes(self.memory.peak),
            ),
            ("  arguments", "", format_bytes(self.memory.arguments)),
            ("  temporaries", "", format_bytes(self.memory.temporaries)),
            *self._program_rows(),
            *self._group_rows(),
            ("work", format_flops(self.planned_flops), format_flops(self.flops)),
        ]
        for traffic in self.traffic:
            kind = traffic.kind.replace("_", "-")
            rows.append((kind, format_bytes(traffic.planned), format_bytes(traffic.emitted)))
            for path, planned, emitted in traffic.layers:
                layer = f"  {path or '(no layer)'}"
                rows.append((layer, format_bytes(planned), format_bytes(emitted)))
        rows.append(("fused kernels", "", str(self.fusions)))
        if self.estimated_seconds is not None:
            seconds = format_seconds(self.estimated_seconds)
            rows.append(("kernels, by the compiler's estimate", "", seconds))
        return rows

    def _program_rows(self) -> list[tuple[str, str, str]]:
        """The memory of the program itself, where it takes any."""
        return [("  program", "", format_bytes(self.memory.code))] if self.memory.code else []

    def _group_rows(self) -> list[tuple[str, str, str]]:
        rows = []
        for number, (planned, compiled) in enumerate(self.groups):
            planned_text = "" if planned is None else format_bytes(planned)
            rows.append((f"  device group {number}", planned_text, format_bytes(compiled)))
        return rows

    def __str__(self) -> str:
        lines = [f"{self.plan} for {self.machine}, compiled by {self.compiler} ({self.version})"]
        for figure, planned, compiled in self.rows():
            lines.append(f"  {figure}: {planned + ' planned, ' if planned else ''}{compiled}")
        return "\n".join(lines)


def compile_captured(captured: Captured, plan: Plan, machine: Machine) -> CompiledPlan:
    """A captured step under a plan, compiled for a machine that need not be here.

    Raises a CompilerError if there is no compiler or if it gives up, a PlanError for a plan that
    cannot run, and a MemoryBudgetError if the compiler itself refuses a program as too large.
    """
    check(plan, captured.graph)
    step = None if is_one_program(plan) else in_pieces(captured, plan)
    if step is None:
        planned_peak = _planned_peak(captured, plan, machine)
    else:
        planned_peak = predicted(captured.graph, machine, fit_mesh(plan, machine)).memory.peak
    target = program_compiler(machine).target(machine)
    try:
        if step is None:
            program = compile_program(request_of(captured, plan, target))
            return _compared(captured, plan, machine, program, planned_peak)
        return _compared_pieces(compile_pieces(step, target), machine, planned_peak)
    except ProgramTooLarge as error:
        sentence = _needs(plan.name, machine.name, error.needed_bytes, machine.memory_bytes)
        raise MemoryBudgetError(sentence, error.needed_bytes / max(1.0, planned_peak)) from None


def _planned_peak(captured: Captured, plan: Plan, machine: Machine) -> float:
    """The predicted peak memory of a device for a plan that is one program, bytes."""
    graph = rematerialized(captured.graph, plan.recompute)
    layout = layout_of(graph, plan)
    backend = machine.backend
    return memory(graph, plan.mesh, layout, backend, device_bytes=machine.memory_bytes).peak


def _compared(
    captured: Captured,
    plan: Plan,
    machine: Machine,
    program: CompiledProgram,
    planned_peak: float,
) -> CompiledPlan:
    """A compiled program beside its plan."""
    graph = rematerialized(captured.graph, plan.recompute)
    layout = layout_of(graph, plan)
    module = HloModule.of(program.text)
    work = work_of(module)
    expected = collectives(graph, plan.mesh, layout, machine.backend)
    return CompiledPlan(
        plan=plan.name,
        machine=machine.name,
        compiler=program.compiler,
        version=program.version,
        memory=program.memory,
        planned_peak_bytes=planned_peak,
        capacity_bytes=machine.memory_bytes,
        traffic=compared_traffic(expected, collectives_of(module)),
        flops=work.flops,
        planned_flops=local_flops(graph, plan.mesh, layout, machine.backend),
        product_flops=work.product_flops,
        fusions=work.fusions,
        estimated_seconds=program_compiler(machine).seconds_of(work.cycles, machine),
        compile_seconds=program.seconds,
    )


def _compared_pieces(pieces: CompiledPieces, machine: Machine, planned_peak: float) -> CompiledPlan:
    """Compiled pieces beside their plan."""
    step = pieces.step
    backend = machine.backend
    numbers = range(len(step.cut.pieces))
    peaks = pieces.peaks()
    fullest = max(peaks, key=lambda peak: peak.nbytes)
    planned = planned_peaks(step, machine) or [None] * len(peaks)
    work = pieces.work()
    planned_flops = 0.0
    for number in numbers:
        graph, place = planned_piece(step, number)
        flops = local_flops(graph, place.mesh, place.layout, backend)
        planned_flops += flops * step.runs(number)
    first = pieces.programs[0]
    return CompiledPlan(
        plan=step.plan.name,
        machine=machine.name,
        compiler=first.compiler,
        version=first.version,
        memory=ProgramMemory(fullest.values, fullest.results, fullest.temporaries, aliased=0),
        planned_peak_bytes=planned_peak,
        capacity_bytes=machine.memory_bytes,
        traffic=compared_traffic(planned_collectives(step, numbers, backend), pieces.collectives()),
        flops=work.flops,
        planned_flops=planned_flops,
        product_flops=work.product_flops,
        fusions=work.fusions,
        estimated_seconds=program_compiler(machine).seconds_of(work.cycles, machine),
        compile_seconds=sum(program.seconds for program in pieces.programs),
        groups=tuple(zip(planned, (peak.nbytes for peak in peaks), strict=True)),
    )


def _needs(plan: str, machine: str, needed_bytes: float, capacity_bytes: int) -> str:
    return (
        f"The plan '{plan}' needs {format_bytes(needed_bytes)} of memory on every device of "
        f"'{machine}' by the compiler's count, and a device has {format_bytes(capacity_bytes)}. "
        "Use a smaller batch, more devices, or a plan that splits variables (ZeRO-3)."
    )
