"""The pieces of a step as the compiler of a machine makes them.

A piece that runs once per microbatch counts that many times. Memory is followed over the actions of
a step (`execute.piece_memory`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from partita.execute.compiled_work import CompiledWork, work_of
from partita.execute.compilers.base import CompileTarget
from partita.execute.compilers.request import device_sums_request_of, piece_request_of
from partita.execute.compilers.run import CompiledProgram, compile_programs
from partita.execute.emitted import Emitted, collectives_of
from partita.execute.hlo import HloModule
from partita.execute.piece_memory import PieceBytes, PlacePeak, compiled_peaks
from partita.execute.staged import StepInPieces


@dataclass(frozen=True)
class CompiledPieces:
    """The compiled pieces of a step. Sums are those of one device of every place together."""

    step: StepInPieces
    programs: tuple[CompiledProgram, ...]
    """Per piece."""
    device_sums: tuple[CompiledProgram, ...]
    """The sums over devices of gradients, once per step."""

    def peaks(self) -> list[PlacePeak]:
        """Per place the peak memory of a device."""
        pieces = []
        for program in self.programs:
            memory = program.memory
            working = memory.temporaries + memory.code
            pieces.append(PieceBytes(working, memory.outputs - memory.aliased))
        return compiled_peaks(self.step, pieces)

    def work(self) -> CompiledWork:
        """The work of a step; its fusions are those of all programs."""
        total = CompiledWork(0.0, 0.0, 0, 0.0)
        for number, module in enumerate(self._modules):
            work = work_of(module)
            runs = self.step.runs(number)
            total = CompiledWork(
                flops=total.flops + work.flops * runs,
                product_flops=total.product_flops + work.product_flops * runs,
                fusions=total.fusions + work.fusions,
                cycles=total.cycles + work.cycles * runs,
            )
        return total

    def collectives(self) -> list[Emitted]:
        """The collectives of a step, inside places."""
        result = []
        for number, module in enumerate(self._modules):
            for collective in collectives_of(module):
                trips = collective.trips * self.step.runs(number)
                result.append(replace(collective, trips=trips))
        for program in self.device_sums:
            result += collectives_of(HloModule.of(program.text))
        return result

    @cached_property
    def _modules(self) -> list[HloModule]:
        return [HloModule.of(program.text) for program in self.programs]


def compile_pieces(step: StepInPieces, target: CompileTarget) -> CompiledPieces:
    """The pieces of a step, compiled for devices that need not be here.

    Raises the errors of `compile_program`.
    """
    numbers = range(len(step.cut.pieces))
    requests = [piece_request_of(step, n, target) for n in numbers]
    for number in numbers:
        if step.device_sums_of(number):
            requests.append(device_sums_request_of(step, number, target))
    programs = compile_programs(requests)
    count = len(numbers)
    return CompiledPieces(step, tuple(programs[:count]), tuple(programs[count:]))
