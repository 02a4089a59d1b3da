"""Reads a StableHLO module: calls inlined, Shardy's rules on every instruction, layer paths, phases, FLOPs, loops.

The numbering of values is the contract of the whole project: `walk` visits a module in one fixed order, here to number
the tensors of an OperatorGraph and in `execute.annotate` to find them again in a fresh parse of the same text.

All that touches MLIR's Python bindings and JAX's dialect registry is in this file and in `execute.annotate`.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax._src.interpreters import (
    mlir as jax_mlir,
)  # the only way to a context with every dialect registered
from jax.extend.mlir import deserialize_portable_artifact, ir, passmanager
from jax.extend.mlir.dialects import sdy

from partita.errors import CaptureError
from partita.graph.operator_graph import Instruction, Loop, Phase, Rule, Tensor, Window

OPAQUE = {
    "reduce",
    "reduce_window",
    "scatter",
    "select_and_scatter",
    "sort",
    "map",
    "all_reduce",
    "reduce_scatter",
    "custom_call",
}
"""Instructions whose regions only say how two elements combine."""

DTYPES = {
    "i1": "bool",
    "i4": "int4",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "ui4": "int4",
    "ui8": "uint8",
    "ui16": "uint16",
    "ui32": "uint32",
    "ui64": "uint64",
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "f64": "float64",
    "complex<f32>": "complex64",
    "complex<f64>": "complex128",
}

TRANSCENDENTAL = {
    "exponential",
    "exponential_minus_one",
    "log",
    "log_plus_one",
    "logistic",
    "power",
    "sqrt",
    "rsqrt",
    "cbrt",
    "tanh",
    "sine",
    "cosine",
    "tan",
    "atan2",
    "erf",
    "erf_inv",
}
FREE = {
    "constant",
    "iota",
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "bitcast_convert",
    "slice",
    "concatenate",
    "pad",
    "reverse",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "get_tuple_element",
    "tuple",
    "return",
    "optimization_barrier",
    "copy",
    "while",
    "case",
    "if",
    "sort",
    "custom_call",
    "create_token",
    "dynamic_reshape",
    "get_dimension_size",
}


def context() -> ir.Context:
    """An MLIR context that knows StableHLO, CHLO and Shardy."""
    return jax_mlir.make_ir_context()


def parse(source: bytes) -> ir.Module:
    """A fresh module from the bytes that `prepare` made, in the current context. Edit only what this returned."""
    return ir.Module.parse(source)


def run(module: ir.Module, pipeline: str) -> None:
    passmanager.PassManager.parse(pipeline).run(module.operation)


def main_block(module: ir.Module) -> ir.Block:
    for op in module.body:
        if (
            op.operation.name == "func.func"
            and ir.StringAttr(op.operation.attributes["sym_name"]).value == "main"
        ):
            return op.operation.regions[0].blocks[0]
    raise CaptureError("The program has no function 'main': export it with jax.export.")


def walk(block: ir.Block) -> Iterator[Any]:
    """Every operation of a block in program order, the bodies of loops and branches before what follows them."""
    for op in block:
        operation = op.operation
        yield operation
        if short(operation.name) not in OPAQUE:
            for region in operation.regions:
                for inner in region.blocks:
                    yield from walk(inner)


def numbered(block: ir.Block) -> tuple[list[Any], list[Any]]:
    """The values and operations of a block and of all inside it, in the order in which `read` numbers tensors and instructions."""
    values: dict[Any, None] = dict.fromkeys(block.arguments)
    operations: list[Any] = []

    def visit(block: ir.Block) -> None:
        for op in block:
            operation = op.operation
            name = short(operation.name)
            values.update(dict.fromkeys(operation.operands))
            if name == "return":
                continue
            values.update(dict.fromkeys(operation.results))
            operations.append(operation)
            if name in ("while", "case", "if"):
                for region in operation.regions:
                    for inner in region.blocks:
                        values.update(dict.fromkeys(inner.arguments))
                        visit(inner)

    visit(block)
    return list(values), operations


def short(name: str) -> str:
    return name.split(".", 1)[1]


# ------------------------------------------------------------------------------------------------- inlining of calls


CALLS = {"func.call": "callee", "stablehlo.composite": "decomposition"}
"""Instructions that stand for a function, and the attribute that names it."""


def inline_calls(module: ir.Module) -> None:
    """Replaces every call, and every composite (JAX's `top_k` is one), by the body that it names, with the caller's name before the callee's.

    MLIR's own `inline` pass leaves the calls of jitted helpers standing (no inliner interface is registered for them),
    and Shardy's rules stop at a call.
    """
    functions = {
        ir.StringAttr(op.operation.attributes["sym_name"]).value: op.operation
        for op in module.body
        if op.operation.name == "func.func"
    }

    def visit(operations: list[Any]) -> None:
        for operation in operations:
            if operation.name in CALLS:
                visit(
                    _expand(
                        operation,
                        functions[
                            ir.FlatSymbolRefAttr(operation.attributes[CALLS[operation.name]]).value
                        ],
                    )
                )
            elif short(operation.name) not in OPAQUE:
                for region in operation.regions:
                    for block in region.blocks:
                        visit([op.operation for op in block])

    visit([op.operation for op in main_block(module)])
    for name, function in functions.items():
        if name != "main":
            function.erase()


def _expand(call: Any, function: Any) -> list[Any]:
    """Puts a copy of the function's body in place of the call; returns the copied operations."""
    body = function.regions[0].blocks[0]
    known = dict(zip(body.arguments, call.operands, strict=True))
    prefix, point, copies = location_name(call), ir.InsertionPoint(call), []
    for op in body:
        source = op.operation
        if source.name == "func.return":
            for result, value in zip(call.results, source.operands, strict=True):
                result.replace_all_uses_with(known.get(value, value))
        else:
            copy = source.clone(point)
            _rewire(copy, known, prefix)
            known.update(zip(source.results, copy.results, strict=True))
            copies.append(copy)
    call.erase()
    return copies


def _rewire(operation: Any, known: dict[Any, Any], prefix: str) -> None:
    for position, operand in enumerate(operation.operands):
        if operand in known:
            operation.operands[position] = known[operand]
    operation.location = ir.Location.name(f"{prefix}/{location_name(operation)}")
    for region in operation.regions:
        for block in region.blocks:
            for inner in block:
                _rewire(inner.operation, known, prefix)


def location_name(operation: Any) -> str:
    """The name that JAX gave an instruction, e.g. `jit(train_step)/jvp(conv1)/conv_general_dilated`; '' if it gave none."""
    match = re.match(r'loc\("((?:[^"\\]|\\.)*)"', str(operation.location))
    return match.group(1) if match else ""


# ---------------------------------------------------------------------------------------------- names: path and phase

_NOISE = re.compile(
    r"^(jit|vmap|pmap|custom_jvp_call|custom_vjp_call|remat\d?|xla_call|cond|scan)(\(.*\))?$"
    r"|^(while|body|call_exported|closed_call|checkpoint|rematted_computation|branch_\d+_fun|custom_jvp_call|custom_vjp_call|fori_loop.*)$|->"
)
_WRAP = re.compile(r"^(transpose|jvp|vmap|remat|checkpoint|linearize)\((.*)\)$")


def split_name(name: str) -> list[str]:
    """The parts of a name between slashes that are not inside brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(name):
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            parts.append(name[start:position])
            start = position + 1
    return [*parts, name[start:]]


def layer_path(name: str) -> str:
    """The layer path in a location name: wrappers of transformations unwrapped, jitted helpers and the primitive dropped."""
    kept: list[str] = []
    for position, part in enumerate(split_name(name)[:-1]):
        while match := _WRAP.match(part):
            part = match.group(2)
        if part and not (position == 0 and part.startswith("jit(")) and not _NOISE.search(part):
            kept += [p for p in part.split("/") if p]
    return "/".join(kept)


def phase_of(name: str) -> Phase:
    return "backward" if "transpose(" in name else "forward" if "jvp(" in name else "update"


# ------------------------------------------------------------------------------------------------------------ reading


def _sink_constants(block: ir.Block, region_values: set[Any] | None) -> None:
    """Copies constants into the loop bodies that use them.

    A loop that captures a value gets it as an extra carried value when it becomes HLO, and then no longer has as many values
    as shardings.
    """
    inside: set[Any] = set(block.arguments)
    for op in list(block):
        operation = op.operation
        if region_values is not None:
            for position, operand in enumerate(operation.operands):
                if operand not in inside and not isinstance(operand.owner, ir.Block):
                    source = operand.owner.operation
                    if source.name == "stablehlo.constant":
                        operation.operands[position] = source.clone(
                            ir.InsertionPoint(operation)
                        ).results[0]
        inside.update(operation.results)
        if short(operation.name) not in OPAQUE:
            for region in operation.regions:
                for inner in region.blocks:
                    _sink_constants(inner, inside)


@dataclass
class Program:
    """What `read` found: the flat program, before instructions are grouped into operators."""

    tensors: list[Tensor] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(portable: bytes) -> bytes:
    """The module with calls inlined and constants split per use, as MLIR bytecode: the text that is planned and run.

    Not as a portable artifact: writing one hoists constants out of loops again.
    """
    with context(), ir.Location.unknown():
        module = deserialize_portable_artifact(portable)
        inline_calls(module)
        run(module, "builtin.module(cse)")
        _fold_transposes(module)
        _fold_sums(module)
        run(module, "builtin.module(sdy-constant-or-scalar-splitter)")
        _plain_constants(module)
        _sink_constants(main_block(module), None)
        return serialize(module)


def _fold_transposes(module: ir.Module) -> None:
    """Products whose result is only read transposed become the product with its sides exchanged.

    XLA does so too, but not where a collective comes in between, as it does for the weight gradient of a product: there it leaves an
    optimizer that reads the sum column by column (seen on jax 0.10.2, CPU: a tenth of the memory's bandwidth).
    """
    for operation in list(walk(main_block(module))):
        if operation.name != "stablehlo.transpose":
            continue
        source = operation.operands[0].owner
        if isinstance(source, ir.Block) or source.operation.name != "stablehlo.dot_general":
            continue
        dot = source.operation
        batch, contracted = _dot_dims(dot, "lhs")
        rank, free = (
            len(operation.results[0].type.shape),
            len(dot.operands[0].type.shape) - len(batch) - len(contracted),
        )
        exchanged = [
            *range(len(batch)),
            *range(len(batch) + free, rank),
            *range(len(batch), len(batch) + free),
        ]
        once = sum(1 for _ in dot.results[0].uses) == 1
        if (
            not once
            or "algorithm" in dot.attributes
            or list(ir.DenseI64ArrayAttr(operation.attributes["permutation"])) != exchanged
        ):
            continue
        attributes = dict(dot.attributes.items())
        numbers = re.sub(
            "lhs|rhs",
            lambda side: "rhs" if side.group() == "lhs" else "lhs",
            str(dot.attributes["dot_dimension_numbers"]),
        )
        attributes["dot_dimension_numbers"] = ir.Attribute.parse(numbers)
        if "precision_config" in attributes:
            attributes["precision_config"] = ir.ArrayAttr.get(
                list(ir.ArrayAttr(attributes["precision_config"]))[::-1]
            )
        made = ir.Operation.create(
            dot.name,
            results=[operation.results[0].type],
            operands=list(dot.operands)[::-1],
            attributes=attributes,
            loc=dot.location,
            ip=ir.InsertionPoint(dot),
        )
        operation.results[0].replace_all_uses_with(made.results[0])
        operation.erase()
        dot.erase()


def _fold_sums(module: ir.Module) -> None:
    """Sums over dims of size 1 become reshapes, reshapes of reshapes one, and products that are widened to be added have wide results.

    JAX writes the gradient of a bias as a sum, a reshape and a sum over nothing, and that of a weight kept in float32 as a product in bfloat16
    that is converted. Where a weight is used more than once, such gradients are added up: then the addition reads them directly, so that
    they can be added before they are summed over devices (`graph.sums`), and not rounded in between.
    """
    for operation in list(walk(main_block(module))):
        if operation.name == "stablehlo.reduce":
            _reduce_as_reshape(operation)
        elif operation.name == "stablehlo.reshape":
            _reshape_once(operation)
        elif operation.name == "stablehlo.convert":
            _widen(operation)


def _reduce_as_reshape(reduce: Any) -> None:
    shapes = [list(v.type.shape) for v in (*reduce.operands[:1], *reduce.results)]
    start = reduce.operands[-1].owner
    if (
        len(reduce.results) > 1
        or math.prod(shapes[0]) != math.prod(shapes[1])
        or not _adds(reduce, "reduce")
        or isinstance(start, ir.Block)
    ):
        return
    if start.operation.name != "stablehlo.constant" or np.any(
        np.asarray(ir.DenseElementsAttr(start.operation.attributes["value"]))
    ):
        return
    at = ir.InsertionPoint(reduce)
    made = ir.Operation.create(
        "stablehlo.reshape",
        results=[reduce.results[0].type],
        operands=[reduce.operands[0]],
        loc=reduce.location,
        ip=at,
    )
    reduce.results[0].replace_all_uses_with(made.results[0])
    reduce.erase()
    _reshape_once(made)


def _reshape_once(reshape: Any) -> None:
    source = reshape.operands[0].owner
    if not isinstance(source, ir.Block) and source.operation.name == "stablehlo.reshape":
        reshape.operands[0] = source.operation.operands[0]
        if not list(source.operation.results[0].uses):
            source.operation.erase()
    if reshape.operands[0].type == reshape.results[0].type:
        reshape.results[0].replace_all_uses_with(reshape.operands[0])
        reshape.erase()


def _widen(convert: Any) -> None:
    source, readers = convert.operands[0].owner, list(convert.results[0].uses)
    if (
        isinstance(source, ir.Block)
        or source.operation.name != "stablehlo.dot_general"
        or "algorithm" in source.operation.attributes
    ):
        return
    dot, (narrow, wide) = (
        source.operation,
        (DTYPES.get(str(v.type.element_type)) for v in (convert.operands[0], convert.results[0])),
    )
    once = len(list(dot.results[0].uses)) == len(readers) == 1
    added = (
        once
        and readers[0].owner.name == "stablehlo.add"
        and phase_of(location_name(readers[0].owner)) == "backward"
    )
    if added and narrow in ("bfloat16", "float16") and wide == "float32":
        made = ir.Operation.create(
            dot.name,
            results=[convert.results[0].type],
            operands=list(dot.operands),
            attributes=dict(dot.attributes.items()),
            loc=dot.location,
            ip=ir.InsertionPoint(dot),
        )
        convert.results[0].replace_all_uses_with(made.results[0])
        convert.erase()
        dot.erase()


def _plain_constants(module: ir.Module) -> None:
    """Turns the `sdy.constant` that the splitter leaves back into StableHLO's, which can be serialised."""
    for operation in list(walk(main_block(module))):
        if operation.name == "sdy.constant":
            at = ir.InsertionPoint(operation)
            if "complex" in str(
                operation.results[0].type
            ):  # MLIR's Python cannot hold the value of one
                text = operation.get_asm(print_generic_op_form=True)
                plain = ir.Operation.parse(text.replace("sdy.constant", "stablehlo.constant", 1))
                at.insert(plain)
            else:
                attributes = {"value": operation.attributes["value"]}
                types = [operation.results[0].type]
                plain = ir.Operation.create(
                    "stablehlo.constant",
                    results=types,
                    attributes=attributes,
                    loc=operation.location,
                    ip=at,
                )
            operation.results[0].replace_all_uses_with(plain.results[0])
            operation.erase()


def serialize(module: ir.Module) -> bytes:
    buffer = io.BytesIO()
    module.operation.write_bytecode(buffer)
    return buffer.getvalue()


def read(source: bytes) -> Program:
    """The flat program of prepared bytes: tensors, instructions with rules, loops, inputs and outputs."""
    with context(), ir.Location.unknown():
        module = parse(source)
        run(module, "builtin.module(func.func(sdy-populate-op-sharding-rules))")
        reader = _Reader()
        block = main_block(module)
        reader.program.inputs = [reader.tensor(a) for a in block.arguments]
        reader.block(block, 1)
        return reader.program


class _Reader:
    def __init__(self) -> None:
        self.program = Program()
        self.ids: dict[Any, int] = {}
        self.constants: dict[int, int] = {}

    def tensor(self, value: Any) -> int:
        found = self.ids.get(value)
        if found is None:
            found = self.ids[value] = len(self.program.tensors)
            kind = value.type
            if isinstance(kind, ir.RankedTensorType):
                element = str(kind.element_type)
                dtype = DTYPES.get(element, "float8" if element.startswith("f8") else element)
                self.program.tensors.append(Tensor(tuple(kind.shape), dtype))
            else:
                self.program.tensors.append(Tensor((), "token"))
        return found

    def block(self, block: ir.Block, trips: int) -> list[int]:
        """Reads a block; returns the tensors that its terminator yields."""
        yielded: list[int] = []
        for op in block:
            operation = op.operation
            name = short(operation.name)
            if name == "return":
                yielded = [self.tensor(v) for v in operation.operands]
                if operation.name == "func.return":
                    self.program.outputs = yielded
                continue
            self.instruction(operation, name, trips)
        return yielded

    def instruction(self, operation: Any, name: str, trips: int) -> None:
        program = self.program
        operands = tuple(self.tensor(v) for v in operation.operands)
        full = location_name(operation)
        if name == "constant":
            self._note_constant(operation)
        index = len(program.instructions)
        results = tuple(self.tensor(v) for v in operation.results)
        rule = _rule(
            operation,
            name,
            [program.tensors[t] for t in operands],
            [program.tensors[t] for t in results],
        )
        flops = _flops(
            operation,
            name,
            [program.tensors[t] for t in operands],
            [program.tensors[t] for t in results],
        )
        windows, groups = _windows(operation, name, rule), _number(operation, "batch_group_count")
        program.instructions.append(
            Instruction(
                name,
                layer_path(full),
                phase_of(full),
                operands,
                results,
                rule,
                flops,
                trips,
                windows,
                groups,
                _adds(operation, name),
            )
        )
        if name == "while":
            self._while(operation, index, operands, results, trips)
        elif name in ("case", "if"):
            # Branches yield the results: one of them runs. Each is read; a branch's tensors are tied to the results.
            first = len(program.instructions)
            branches = [self.block(b, trips) for region in operation.regions for b in region.blocks]
            carried = tuple(
                (r, r, y, r) for branch in branches for r, y in zip(results, branch, strict=True)
            )
            program.loops.append(Loop(index, carried, (first, len(program.instructions)), 1))

    def _while(
        self,
        operation: Any,
        index: int,
        operands: tuple[int, ...],
        results: tuple[int, ...],
        trips: int,
    ) -> None:
        program = self.program
        condition, body = (region.blocks[0] for region in operation.regions)
        count = self._trip_count(condition, body, operands)
        if count is None:
            program.notes.append(
                f"The trip count of a loop in '{program.instructions[index].path}' is unknown; it is costed once."
            )
        first = len(program.instructions)
        before = [self.tensor(a) for a in condition.arguments]
        self.block(condition, trips * (count or 1))
        inside = [self.tensor(a) for a in body.arguments]
        after = self.block(body, trips * (count or 1))
        carried = [
            (o, i, y, r) for o, i, y, r in zip(operands, inside, after, results, strict=True)
        ]
        carried += [(o, b, b, r) for o, b, r in zip(operands, before, results, strict=True)]
        program.loops.append(
            Loop(index, tuple(carried), (first, len(program.instructions)), count or 1)
        )

    def _note_constant(self, operation: Any) -> None:
        count = _count(operation)
        if count is not None:
            self.constants[len(self.program.tensors)] = count

    def _trip_count(
        self, condition: ir.Block, body: ir.Block, operands: tuple[int, ...]
    ) -> int | None:
        """N of a loop `i = start; while i < N: i += 1` as JAX writes scan and fori_loop, else None."""
        arguments: list[Any] = list(condition.arguments)
        limits: dict[Any, int] = {}
        for op in condition:
            operation = op.operation
            count = _count(operation) if operation.name == "stablehlo.constant" else None
            if count is not None:
                limits[operation.results[0]] = count
            if operation.name == "stablehlo.compare":
                left, right = operation.operands
                if left in arguments:
                    start = self.constants.get(operands[arguments.index(left)])
                    limit = limits.get(right)
                    if limit is None and right in arguments:
                        limit = self.constants.get(operands[arguments.index(right)])
                    if limit is None and right in self.ids:
                        limit = self.constants.get(self.ids[right])
                    if start is not None and limit is not None:
                        return max(0, limit - start)
        return None


# ------------------------------------------------------------------------------------------------------------ details


def _count(constant: Any) -> int | None:
    """The value of a constant that is one whole number."""
    kind = constant.results[0].type
    if list(kind.shape) or str(kind.element_type) not in ("i32", "i64", "ui32"):
        return None
    return int(np.asarray(ir.DenseElementsAttr(constant.attributes["value"])).item())


def _rule(operation: Any, name: str, operands: list[Tensor], results: list[Tensor]) -> Rule | None:
    if "sdy.sharding_rule" in operation.attributes:
        r = sdy.OpShardingRuleAttr(operation.attributes["sdy.sharding_rule"])
        maps = lambda ms: tuple(  # noqa: E731
            tuple(
                tuple(sdy.DimMappingAttr(d).factor_indices)
                for d in sdy.TensorMappingAttr(m).dim_mappings
            )
            for m in ms
        )
        rule = Rule(
            tuple(r.factor_sizes),
            maps(r.operand_mappings),
            maps(r.result_mappings),
            tuple(r.reduction_factors),
            tuple(r.permutation_factors),
            tuple(r.need_replication_factors),
        )
        if name == "select_and_scatter":
            return _select_rule(operation, operands, rule)
        return _scatter_rule(operation, operands, rule) if name == "scatter" else rule
    shaped = [t for t in operands + results if t.shape]
    if name not in FREE and shaped and all(t.shape == shaped[0].shape for t in shaped):
        # CHLO's element-wise functions, which Shardy meets only after they have been expanded.
        label = tuple((d,) for d in range(len(shaped[0].shape)))
        side = lambda ts: tuple(label if t.shape else () for t in ts)  # noqa: E731
        return Rule(shaped[0].shape, side(operands), side(results))
    if name == "iota":
        return Rule(results[0].shape, (), (tuple((d,) for d in range(len(results[0].shape))),))
    return None


def _select_rule(operation: Any, operands: list[Tensor], rule: Rule) -> Rule:
    """The rule of the backward pass of pooling by maximum: split where windows do not overlap, whole elsewhere.

    Shardy names the dims of operand and source apart. Where every window is as long as its stride, a part of the source belongs
    to a part of the operand, and they are one factor; elsewhere XLA would exchange halos of both, back and forth.
    """
    windows = _pooling(operation, operands[0].shape)
    merged, whole = {}, set(rule.gathered) | set(rule.halo)
    for d, (window, wide, narrow) in enumerate(
        zip(windows, rule.operands[0], rule.operands[1], strict=True)
    ):
        aligned = (
            window.step == window.reach
            and window.low == 0
            and window.size == window.count * window.step
        )
        if wide != narrow and aligned and operands[1].shape[d] > 1:
            merged[wide[0]] = narrow[0]
            whole -= {wide[0], narrow[0]}
    side = lambda mapping: tuple(tuple(merged.get(f, f) for f in dim) for dim in mapping)  # noqa: E731
    return dataclasses.replace(
        rule,
        operands=tuple(side(m) for m in rule.operands),
        results=tuple(side(m) for m in rule.results),
        halo=tuple(merged.values()),
        gathered=tuple(sorted(whole)),
    )


def _scatter_rule(operation: Any, operands: list[Tensor], rule: Rule) -> Rule:
    """The rule of a scatter, whose scattered dims must stay whole where there is but one index.

    XLA's partitioner writes the wrong rows there if the operand has just been split (seen on jax 0.10.2, CPU: `x.at[5].set(v)`
    with x constrained to be split by rows); with two indices or more it is right.
    """
    indices, updates = (len(operands) - 1) // 2, len(operands) - 1
    scattered = re.search(
        r"scatter_dims_to_operand_dims = \[([\d, ]*)\]",
        str(operation.attributes["scatter_dimension_numbers"]),
    )
    if scattered is None or operands[indices].size > len(scattered.group(1).split(",")):
        return rule
    updated = {f for dim in rule.operands[updates] for f in dim}
    kept_whole = tuple(
        f for dim in rule.operands[0] for f in dim if f not in updated and f not in rule.gathered
    )
    return dataclasses.replace(rule, gathered=rule.gathered + kept_whole)


def _flops(operation: Any, name: str, operands: list[Tensor], results: list[Tensor]) -> float:
    """FLOPs by XLA's own counting (HloCostAnalysis): products as 2, element-wise as 1, transcendentals and moves as 0."""
    if name == "dot_general":
        return (
            2.0
            * results[0].size
            * math.prod(operands[0].shape[d] for d in _dot_dims(operation, "lhs")[1])
        )
    if name == "convolution":
        return _convolution(operation, operands, results)
    if name == "reduce":
        outer = sum(r.size for r in results)
        return float(sum(o.size for o in operands[: len(results)]) - outer)
    if name == "reduce_window":
        window = math.prod(ir.DenseI64ArrayAttr(operation.attributes["window_dimensions"]))
        return float(sum(r.size for r in results) * (window - 1))
    if name == "select_and_scatter":
        window = math.prod(ir.DenseI64ArrayAttr(operation.attributes["window_dimensions"]))
        return float(operands[1].size * window)
    if name == "scatter":
        return float(operands[-1].size)
    if name in FREE or name in TRANSCENDENTAL or name.startswith("rng"):
        return 0.0
    return float(results[0].size) if results else 0.0


def _dot_dims(operation: Any, side: str) -> tuple[list[int], list[int]]:
    """The batching and the contracting dims of one side ("lhs", "rhs") of a product."""
    text = str(operation.attributes["dot_dimension_numbers"])
    found = (
        re.search(rf"{side}_{kind}_dimensions = \[([\d, ]*)\]", text)
        for kind in ("batching", "contracting")
    )
    batching, contracting = ([int(d) for d in m.group(1).split(",")] if m else [] for m in found)
    return batching, contracting


def convolution_dims(operation: Any) -> dict[str, list[int]]:
    """The dims of a convolution: 'lhs', 'rhs', 'out', each listed as batch/output, feature/input, then spatial."""
    text = str(operation.attributes["dimension_numbers"])
    match = re.search(r"\[([^\]]*)\]x\[([^\]]*)\]->\[([^\]]*)\]", text)
    assert match, text
    found = {}
    for key, letters, group in (("lhs", "bf", 1), ("rhs", "oi", 2), ("out", "bf", 3)):
        parts = [p.strip() for p in match.group(group).split(",")]
        spatial = [parts.index(str(s)) for s in range(len(parts) - 2)]
        found[key] = [parts.index(letters[0]), parts.index(letters[1]), *spatial]
    return found


def convolution_window(operation: Any, rank: int) -> list[tuple[int, int, int, int, int]]:
    """Per spatial dim: stride, padding low, padding high, dilation of the input, dilation of the kernel."""

    def array(key: str, default: int) -> list[int]:
        return (
            list(ir.DenseI64ArrayAttr(operation.attributes[key]))
            if key in operation.attributes
            else [default] * rank
        )

    padding = np.zeros((rank, 2), np.int64)
    if "padding" in operation.attributes:
        padding = np.asarray(ir.DenseIntElementsAttr(operation.attributes["padding"])).reshape(
            -1, 2
        )
    strides, lhs, rhs = (
        array("window_strides", 1),
        array("lhs_dilation", 1),
        array("rhs_dilation", 1),
    )
    return [
        (strides[i], int(padding[i, 0]), int(padding[i, 1]), lhs[i], rhs[i]) for i in range(rank)
    ]


def _convolution(operation: Any, operands: list[Tensor], results: list[Tensor]) -> float:
    dims = convolution_dims(operation)
    lhs, rhs, out = operands[0].shape, operands[1].shape, results[0].shape
    valid = 1
    for s, (stride, low, _, base, dilation) in enumerate(
        convolution_window(operation, len(dims["lhs"]) - 2)
    ):
        position = (
            np.arange(out[dims["out"][2 + s]])[:, None] * stride
            - low
            + np.arange(rhs[dims["rhs"][2 + s]]) * dilation
        )
        size = lhs[dims["lhs"][2 + s]]
        valid *= int(
            ((position % base == 0) & (position >= 0) & (position < (size - 1) * base + 1)).sum()
        )
    batch_groups = _number(operation, "batch_group_count")
    return (
        2.0
        * valid
        * (out[dims["out"][0]])
        * out[dims["out"][1]]
        * rhs[dims["rhs"][1]]
        * max(1, lhs[dims["lhs"][0]] // batch_groups // max(1, out[dims["out"][0]]))
    )


def _adds(operation: Any, name: str) -> bool:
    """Whether elements that meet in a result are added up."""
    if name not in ("reduce", "reduce_window", "scatter", "select_and_scatter"):
        return True
    return [op.operation.name for op in operation.regions[-1].blocks[0]] == [
        "stablehlo.add",
        "stablehlo.return",
    ]


def _number(operation: Any, key: str) -> int:
    return int(operation.attributes[key]) if key in operation.attributes else 1


def _windows(operation: Any, name: str, rule: Rule | None) -> tuple[tuple[int, Window], ...]:
    """Per factor that moves a window over a dim of operand 0: how it moves.

    A convolution's positions are those of its result, or, in a weight gradient, those of its second operand: there every element of the
    result is one place of the window.
    """
    if rule is None or name not in ("convolution", "reduce_window", "select_and_scatter"):
        return ()
    shape = tuple(operation.operands[0].type.shape)
    found: dict[int, Window] = {}
    if name == "convolution":
        dims = convolution_dims(operation)
        kernel, out = list(operation.operands[1].type.shape), list(operation.results[0].type.shape)
        for s, (stride, low, _, base, dilation) in enumerate(
            convolution_window(operation, len(dims["lhs"]) - 2)
        ):
            at, rhs, to = dims["lhs"][2 + s], dims["rhs"][2 + s], dims["out"][2 + s]
            for f in rule.operands[0][at][:1]:
                if f in rule.results[0][to][:1]:
                    found[f] = Window(
                        shape[at], out[to], stride, low, (kernel[rhs] - 1) * dilation + 1, base
                    )
                elif f in rule.operands[1][rhs][:1]:
                    found[f] = Window(
                        shape[at], kernel[rhs], dilation, low, (out[to] - 1) * stride + 1, base
                    )
    else:
        for mapped, window in zip(rule.operands[0], _pooling(operation, shape), strict=True):
            for f in mapped[:1]:
                if f in rule.halo:
                    found[f] = window
    return tuple(sorted(found.items()))


def _pooling(operation: Any, shape: Sequence[int]) -> list[Window]:
    """Per dim of operand 0, the window of a reduce_window or select_and_scatter."""

    def array(key: str) -> list[int]:
        return (
            list(ir.DenseI64ArrayAttr(operation.attributes[key]))
            if key in operation.attributes
            else [1] * len(shape)
        )

    padding = np.zeros((len(shape), 2), np.int64)
    if "padding" in operation.attributes:
        padding = np.asarray(ir.DenseIntElementsAttr(operation.attributes["padding"])).reshape(
            -1, 2
        )
    found = []
    sizes, steps, bases, dilations = (
        array(k)
        for k in ("window_dimensions", "window_strides", "base_dilations", "window_dilations")
    )
    for n, size, step, base, dilation, (low, high) in zip(
        shape, sizes, steps, bases, dilations, padding, strict=True
    ):
        reach = (size - 1) * dilation + 1
        count = ((n - 1) * base + 1 + int(low) + int(high) - reach) // step + 1
        found.append(Window(n, count, step, int(low), reach, base))
    return found
