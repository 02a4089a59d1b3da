"""Reads a prepared module into a flat program.

The program lists tensors, instructions with rules and windows, loops, inputs and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jax.extend.mlir import ir

from partita.capture.custom_calls import call_name, target_of
from partita.capture.instructions import (
    adds,
    flops_of,
    full_precision,
    integer_attribute,
    integer_constant,
    rule_of,
    windows_of,
)
from partita.capture.names import layer_path, location_name, phase_of
from partita.capture.stablehlo import (
    DTYPES,
    context,
    inner_blocks,
    main_block,
    parse,
    run,
    short,
)
from partita.graph.operator_graph import CONDITIONALS, Instruction, Loop, Rule, Tensor


@dataclass
class Program:
    """A flat program, before instructions are grouped into operators."""

    tensors: list[Tensor] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replicated_calls: dict[str, str] = field(default_factory=dict)
    """Target of a custom call that cannot be split -> path of the first layer that calls it."""


def read(source: bytes) -> Program:
    """The flat program of prepared bytes."""
    with context(), ir.Location.unknown():
        module = parse(source)
        run(module, "builtin.module(func.func(sdy-populate-op-sharding-rules))")
        reader = _Reader()
        block = main_block(module)
        reader.program.inputs = [reader.tensor(argument) for argument in block.arguments]
        reader.block(block, 1)
        reader.note_replicated_calls()
        return reader.program


class _Reader:
    def __init__(self) -> None:
        self.program = Program()
        self.ids: dict[Any, int] = {}
        """Value -> tensor."""
        self.constants: dict[int, int] = {}
        """Tensor of an integer constant -> its value."""
        self.types: dict[Any, Tensor] = {}
        """MLIR type -> its shape and dtype."""
        self.shardy_rules: dict[Any, Rule] = {}
        """Attribute of an instruction -> the rule in it."""

    def tensor(self, value: Any) -> int:
        """The number of a value, which is new at its first use."""
        if value not in self.ids:
            self.ids[value] = len(self.program.tensors)
            kind = value.type
            if kind not in self.types:
                self.types[kind] = tensor_of(kind)
            self.program.tensors.append(self.types[kind])
        return self.ids[value]

    def block(self, block: ir.Block, trips: int) -> list[int]:
        """Reads a block that runs `trips` times. Returns the tensors that its terminator yields."""
        yielded: list[int] = []
        for op in block:
            operation = op.operation
            name = short(operation.name)
            if name != "return":
                self._instruction(operation, name, trips)
                continue
            yielded = [self.tensor(value) for value in operation.operands]
            if operation.name == "func.return":
                self.program.outputs = yielded
        return yielded

    def _instruction(
        self,
        operation: Any,
        name: str,
        trips: int,
    ) -> None:
        if name == "custom_call":
            name = call_name(operation)
        program = self.program
        number = len(program.instructions)
        operands = tuple(self.tensor(value) for value in operation.operands)
        results = tuple(self.tensor(value) for value in operation.results)
        if name == "constant":
            value = integer_constant(operation)
            if value is not None:
                self.constants[results[0]] = value
        operand_tensors = [program.tensors[tensor] for tensor in operands]
        result_tensors = [program.tensors[tensor] for tensor in results]
        rule = rule_of(operation, name, operand_tensors, result_tensors, self.shardy_rules)
        full_name = location_name(operation)
        instruction = Instruction(
            name,
            layer_path(full_name),
            phase_of(full_name),
            operands,
            results,
            rule,
            flops_of(operation, name, operand_tensors, result_tensors),
            trips,
            windows_of(operation, name, rule),
            integer_attribute(operation, "batch_group_count"),
            adds(operation, name),
            full_precision(operation),
        )
        program.instructions.append(instruction)
        if "call_target_name" in operation.attributes and rule is None:
            program.replicated_calls.setdefault(target_of(operation), instruction.path)
        if name == "while":
            self._while(operation, number)
        elif name in CONDITIONALS:
            self._branches(operation, number)

    def note_replicated_calls(self) -> None:
        """Adds one note on the custom calls that cannot be split."""
        calls = [
            f"'{call}' in '{path}'" if path else f"'{call}'"
            for call, path in self.program.replicated_calls.items()
        ]
        if calls:
            self.program.notes.append(
                f"Every device computes all of the custom calls that cannot be split: "
                f"{', '.join(calls)}."
            )

    def _branches(self, operation: Any, number: int) -> None:
        """Reads the branches of a case or an if, as a loop of one trip.

        One branch runs, and yields the results. All are read, and their tensors are tied to the
        results.
        """
        program = self.program
        instruction = program.instructions[number]
        first = len(program.instructions)
        carried = []
        for block in inner_blocks(operation):
            yielded = self.block(block, instruction.trips)
            for result, tensor in zip(instruction.results, yielded, strict=True):
                carried.append((result, result, tensor, result))
        body = (first, len(program.instructions))
        program.loops.append(Loop(number, tuple(carried), body, 1))

    def _while(self, operation: Any, number: int) -> None:
        """Reads the condition and the body of a loop."""
        program = self.program
        instruction = program.instructions[number]
        condition, body = (region.blocks[0] for region in operation.regions)
        count = self._trip_count(condition, instruction.operands)
        if count is None:
            program.notes.append(
                f"The trip count of a loop in '{instruction.path}' is unknown. "
                "Its cost is that of one trip."
            )
        trips = instruction.trips * (count or 1)
        first = len(program.instructions)
        condition_arguments = [self.tensor(argument) for argument in condition.arguments]
        self.block(condition, trips)
        body_arguments = [self.tensor(argument) for argument in body.arguments]
        yielded = self.block(body, trips)
        carried = list(
            zip(instruction.operands, body_arguments, yielded, instruction.results, strict=True)
        )
        for operand, argument, result in zip(
            instruction.operands,
            condition_arguments,
            instruction.results,
            strict=True,
        ):
            carried.append((operand, argument, argument, result))
        span = (first, len(program.instructions))
        program.loops.append(Loop(number, tuple(carried), span, count or 1))

    def _trip_count(self, condition: ir.Block, operands: tuple[int, ...]) -> int | None:
        """The trip count of a loop as JAX writes scan and fori_loop, else None.

        It is N of `i = start; while i < N: i += 1`, less the start.
        """
        operand_of: dict[Any, int] = dict(zip(condition.arguments, operands, strict=True))
        limits: dict[Any, int] = {}
        for op in condition:
            operation = op.operation
            if operation.name == "stablehlo.constant":
                value = integer_constant(operation)
                if value is not None:
                    limits[operation.results[0]] = value
            elif operation.name == "stablehlo.compare":
                left, right = operation.operands
                start = self._constant(operand_of.get(left))
                limit = limits.get(right)
                if limit is None:
                    limit = self._constant(operand_of.get(right))
                if limit is None:
                    limit = self._constant(self.ids.get(right))
                if start is not None and limit is not None:
                    return max(0, limit - start)
        return None

    def _constant(self, tensor: int | None) -> int | None:
        """The value of a tensor that is an integer constant, else None."""
        return None if tensor is None else self.constants.get(tensor)


def tensor_of(kind: Any) -> Tensor:
    """The shape and dtype of an MLIR type."""
    if not isinstance(kind, ir.RankedTensorType):
        return Tensor((), "token")
    element = str(kind.element_type)
    dtype = DTYPES.get(element, "float8" if element.startswith("f8") else element)
    return Tensor(tuple(kind.shape), dtype)
