"""The compiled pieces of a step beside its plan: memory and traffic of the devices.

The compiler sees one piece at a time, so the memory of a place is followed over the actions of a
step (`execute.piece_memory`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from partita.cost.collectives import Collective, collectives, over_microbatches
from partita.cost.partial import summed_values
from partita.errors import MemoryBudgetError
from partita.execute.devices import detect
from partita.execute.dispatch import RunAction, changed_meanings, joint_updates
from partita.execute.emitted import emitted
from partita.execute.piece_memory import PieceBytes, compiled_peaks
from partita.execute.processes import alone, exchanged
from partita.execute.staged import PlaceLayout, StagedProgram, StagedStep, StepInPieces
from partita.execute.verification import Traffic, Verification, compared_traffic
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Backend, Machine
from partita.plans.adapt import fit_mesh
from partita.plans.layout import shard_bytes
from partita.plans.piece_graph import piece_graph, returned_reads
from partita.plans.pipeline import is_pipeline
from partita.simulation.pipelined import PipelinedStep
from partita.units import format_bytes


def check_staged(step: StagedStep, program: StagedProgram) -> Verification:
    """Peak memory and traffic of a compiled staged step.

    MemoryBudgetError if a place needs more memory than a local device has.
    """
    machine = detect(step.plan.mesh.size)
    peaks = place_peaks(step, program)
    fullest = max(range(len(peaks)), key=peaks.__getitem__)
    if machine.memory_bytes is not None and peaks[fullest] > machine.memory_bytes:
        raise MemoryBudgetError(
            f"The plan '{step.plan.name}' for {step.plan.graph} needs "
            f"{format_bytes(peaks[fullest])} of memory on the devices of group {fullest} by the "
            "compiler's count, and a device "
            f"has {format_bytes(machine.memory_bytes)}. Use more stages, more microbatches, or a "
            "plan that splits variables (ZeRO-3)."
        )
    notes = []
    planned = planned_peaks(step, machine)
    for number, peak in enumerate(peaks):
        pieces = sum(piece.place == number for piece in step.cut.pieces)
        figures = f"{format_bytes(peak)} per device"
        if planned:
            figures += f", {format_bytes(planned[number])} planned"
        notes.append(f"device group {number}: {pieces} pieces, {figures}")
    notes.append(f"between device groups: {format_bytes(transfer_bytes(step))} per step")
    notes += [*changed_meanings(step.cut, step.plan), *joint_updates(step.cut)]
    return Verification(
        peak_bytes=peaks[fullest],
        capacity_bytes=machine.memory_bytes,
        traffic=_traffic(step, program, machine.backend),
        compiled_flops=None,
        planned_flops=None,
        notes=tuple(notes),
    )


def planned_peaks(step: StepInPieces, machine: Machine) -> list[int]:
    """Per stage of a pipeline the simulated peak memory of a device in bytes; [] for others."""
    if not is_pipeline(step.plan):
        return []
    simulated = PipelinedStep.of(step.captured.graph, machine, fit_mesh(step.plan, machine))
    return [memory.peak.peak for memory in simulated.memories]


def place_peaks(step: StagedStep, program: StagedProgram) -> list[int]:
    """Per place the peak memory of a device in bytes, by the compiler and the order of actions.

    A process knows the pieces of its own places. The figures of the others come from them.
    """
    own = _own_peaks(step, program)
    if alone():
        return own
    peaks = [json.loads(text) for text in exchanged("peaks", json.dumps(own))]
    return [max(of_process) for of_process in zip(*peaks, strict=True)]


def _own_peaks(step: StagedStep, program: StagedProgram) -> list[int]:
    """Per place of this process the peak memory of a device in bytes; 0 for other places."""
    pieces: list[PieceBytes | None] = []
    for piece_program in program.programs:
        if piece_program is None:
            pieces.append(None)
            continue
        analysis = piece_program.memory_analysis()
        new_bytes = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        pieces.append(PieceBytes(analysis.temp_size_in_bytes, new_bytes))
    peaks = compiled_peaks(step, pieces)
    return [
        peak.nbytes if place.is_here else 0 for peak, place in zip(peaks, step.places, strict=True)
    ]


def transfer_bytes(step: StepInPieces) -> int:
    """Bytes that go from place to place in one step, of all devices."""
    total = 0
    for action in step.dispatch.actions:
        if not isinstance(action, RunAction):
            devices = step.layouts[action.target.place].mesh.size
            total += step.nbytes(action.target) * devices
    return total


def planned_collectives(
    step: StepInPieces, numbers: Sequence[int], backend: Backend
) -> list[Collective]:
    """The expected collectives of pieces, those of all their runs in a step.

    Gradients that stay partial over microbatches are summed once.
    """
    result = []
    for number in numbers:
        graph, place = planned_piece(step, number)
        gradients = step.cut.pieces[number].gives
        sums = {
            value: gradient
            for gradient in step.partial_sums.keys() & gradients
            for value in summed_values(graph, gradient)
        }
        nbytes = shard_bytes(graph, place.mesh, place.layout)
        of_one = collectives(graph, place.mesh, place.layout, backend)
        result += over_microbatches(of_one, sums, nbytes, lambda _, n=number: step.runs(n))
    return result


def planned_piece(step: StepInPieces, number: int) -> tuple[OperatorGraph, PlaceLayout]:
    """A piece as a graph, and its layout on its place."""
    piece = step.cut.pieces[number]
    place = step.layouts[piece.place]
    flow, runs = step.cut.flow, step.late_runs
    graph, layout = piece_graph(flow, piece, place.layout, step.cut.summed, (), runs)
    reads = (*layout.reads, *returned_reads(graph, place.layout))
    return graph, PlaceLayout(place.mesh, replace(layout, reads=reads))


def _traffic(step: StagedStep, program: StagedProgram, backend: Backend) -> tuple[Traffic, ...]:
    """Collectives inside places, the sums over a device of each place of this process."""
    numbers = [n for n, piece_program in enumerate(program.programs) if piece_program is not None]
    compiled = []
    for number in numbers:
        for collective in emitted(program.programs[number].as_text()):
            compiled.append(replace(collective, trips=collective.trips * step.runs(number)))
        if step.device_sums_of(number):
            compiled += emitted(step.device_sums(number).as_text())
    return compared_traffic(planned_collectives(step, numbers, backend), compiled)
