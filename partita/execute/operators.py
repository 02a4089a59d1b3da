"""Measures operators: each as a program of its own at the shape that one device computes, forward and backward.

What is timed is cut out of the captured text: the operator's own instructions with the types of their local parts, no
collectives. All devices compute it at once, so that what they share is shared while it is measured. Programs are timed in turns,
as a step runs through them, so that one does not find its own data still in the cache. Equal operators are measured once, and
every time is kept in a file for the next plan.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend.mlir import ir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partita.capture import stablehlo
from partita.capture.instructions import convolution_dims, convolution_window
from partita.capture.jax_functions import Captured, Text
from partita.cost.evaluate import Assignment, local_key, roofline_features
from partita.cost.moves import Placement
from partita.cost.partial import read_labels
from partita.cost.terms import cost_terms
from partita.execute.calibrate import file_of, key_of
from partita.execute.processes import from_first, is_first, meet
from partita.graph.operator_graph import OperatorGraph, constant_tensors
from partita.machine import Machine, fitted_times
from partita.machine.times import OperatorKey
from partita.plans.layout import label_sharding, operator_assignments
from partita.plans.plan import Mesh as PlanMesh
from partita.plans.plan import Plan

ROUNDS = 5
"""Times that each program is run, after one to warm up; the median counts."""
AT_ONCE = 1 << 30
"""Bytes of operands and results of the programs that are timed in turns."""


class NotLocal(Exception):
    """An operator that cannot be cut out at this split: a loop shared with others, a window split in space, an uneven part."""


@dataclass(frozen=True)
class Part:
    """A program of one operator: bytecode of its module, its operands and results, and its text to be known by."""

    bytecode: bytes
    operands: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    text: str
    replaced: Mapping[int, int]
    """Operands whose place is taken by a result, as a variable's by its new value: as in a step, they are donated."""

    @property
    def nbytes(self) -> int:
        return sum(
            int(np.prod(s.shape)) * s.dtype.itemsize for s in (*self.operands, *self.results)
        )


@dataclass
class Asked:
    """An operator at one split, to be measured: its parts, the roofline's seconds by class, and whether it reads rows of its neighbours."""

    operator: str
    key: OperatorKey
    parts: tuple[Part, ...]
    features: Mapping[str, float]
    reaches: bool = False

    @property
    def devices(self) -> int:
        return self.key[1]

    @property
    def nbytes(self) -> int:
        return self.devices * sum(p.nbytes for p in self.parts)

    @property
    def text(self) -> str:
        """What its time is kept under: the programs, and how many devices run them at once."""
        return sha256(
            "\n".join([str(self.devices), *(p.text for p in self.parts)]).encode()
        ).hexdigest()[:24]


def measured_operators(
    captured: Captured,
    machine: Machine,
    plans: Sequence[Plan],
    report: Callable[[int, int], None] | None = None,
) -> Machine:
    """The machine with the times of the operators of these plans, as far as they can be cut out, and a fit to all ever measured.

    `report` is told how many of how many programs have been compiled and timed. Several processes call this together: all time at once,
    and what process 0 finds holds for all.
    """
    known = dict(machine.times.seconds) if machine.times is not None else {}
    path = file_of_operators(machine)
    records: dict[str, Any] = json.loads(
        from_first("times of operators", lambda: json.dumps(load(path, key_of(machine.devices))))
    )
    asked = list(_asked(captured, machine, plans, known))
    new = {a.text: a for a in asked if a.text not in records}
    waiting, done = sorted(new.values(), key=lambda a: a.devices), 0
    while waiting:
        chunk: list[Asked] = []
        nbytes = 0
        while waiting and (
            not chunk
            or waiting[0].devices == chunk[0].devices
            and nbytes + waiting[0].nbytes < AT_ONCE
        ):
            chunk.append(waiting.pop(0))
            nbytes += chunk[-1].nbytes
        mine = _timed(chunk, chunk[0].devices)
        for a, seconds in zip(
            chunk,
            json.loads(from_first("times of operators", lambda mine=mine: json.dumps(mine))),
            strict=True,
        ):
            if seconds is not None:
                records[a.text] = {
                    "model": captured.graph.name,
                    "operator": a.operator,
                    "digest": a.key[0],
                    "seconds": seconds,
                    "features": dict(a.features),
                }
        done += len(chunk)
        if report is not None:
            report(done, len(new))
    if new and is_first():
        _save(path, key_of(machine.devices), records)
    here = _likely([(a, records[a.text]["seconds"]) for a in asked if a.text in records], known)
    known |= {a.key: seconds for a, seconds in here}
    if not records:
        return machine
    times = fitted_times(records.values())
    off: dict[str, list[float]] = {}
    for a, seconds in here:
        off.setdefault(a.key[0], []).append(seconds / times.fitted_seconds(a.features))
    own = dict(machine.times.corrections) if machine.times is not None else {}
    own |= {digest: median(ratios) for digest, ratios in off.items()}
    return replace(machine, times=replace(times, seconds=known, corrections=own))


def _likely(
    found: Sequence[tuple[Asked, float]], known: Mapping[OperatorKey, float]
) -> list[tuple[Asked, float]]:
    """What was measured, without parts that read rows of their neighbours and took longer than the whole operator.

    Alone they have zeros in place of those rows, and are then not always the program that they are in a step: XLA:CPU computes some gradients of convolutions over few
    rows without its library, fifty times as slowly.
    """
    whole = {a.key[:2]: seconds for a, seconds in found if set(a.key[2]) <= {1}}
    whole |= {key[:2]: seconds for key, seconds in known.items() if set(key[2]) <= {1}}
    return [
        (a, seconds)
        for a, seconds in found
        if not a.reaches or seconds <= whole.get(a.key[:2], seconds)
    ]


def _asked(
    captured: Captured, machine: Machine, plans: Sequence[Plan], known: Mapping[Any, float]
) -> Iterator[Asked]:
    """The operators of the plans that are not known yet, each once."""
    graph = captured.graph
    found = cost_terms(graph, machine.backend)
    seen = set(known)
    with stablehlo.context(), ir.Location.unknown():
        cutter = Cutter(stablehlo.parse(captured.text.mlir_module_serialized), graph)
        for plan in plans:
            placement = Placement(machine, plan.mesh)
            for o, assignment in enumerate(operator_assignments(graph, plan)):
                own = found.operators[o]
                key = local_key(own, placement, assignment)
                if key in seen or not own.work:
                    continue
                seen.add(key)
                try:
                    parts = cutter.parts(o, assignment, plan.mesh)
                except (NotLocal, ir.MLIRError, ValueError, TypeError):
                    continue
                reaches = any(assignment.get(h.split) for h in own.halos)
                yield Asked(
                    graph.operators[o].name,
                    key,
                    parts,
                    roofline_features(own, placement, assignment),
                    reaches,
                )


class Cutter:
    """Cuts operators out of a program at their local shapes."""

    def __init__(self, module: ir.Module, graph: OperatorGraph) -> None:
        self.graph = graph
        self.module = module  # values live as long as it does
        self.values, self.operations = stablehlo.numbered(stablehlo.main_block(module))
        self.seen = read_labels(graph)
        self.free = constant_tensors(graph)
        self.maker = {t: i for i, x in enumerate(graph.instructions) for t in x.results}
        self.readers: dict[int, list[int]] = {}
        for i, x in enumerate(graph.instructions):
            for t in x.operands:
                self.readers.setdefault(t, []).append(i)
        self.outputs = set(graph.outputs)
        self.renewed = {a.tensor: a.result for a in graph.arguments if a.result is not None}
        self.ids = {value: t for t, value in enumerate(self.values)}
        self.owned: list[list[int]] = [[] for _ in graph.operators]
        owners, self.shared = _owners(graph)
        for i, o in enumerate(owners):
            if o >= 0:
                self.owned[o].append(i)

    def parts(self, operator: int, assignment: Assignment, mesh: PlanMesh) -> tuple[Part, ...]:
        """The forward and the backward (with the update) program of an operator under an assignment; NotLocal where there is none."""
        if operator in self.shared:
            raise NotLocal
        forward = [i for i in self.owned[operator] if self.graph.instructions[i].phase == "forward"]
        later = [i for i in self.owned[operator] if self.graph.instructions[i].phase != "forward"]
        found = [
            _Cut(self, assignment, mesh).part(members) for members in (forward, later) if members
        ]
        return tuple(part for part in found if part is not None)


def _owners(graph: OperatorGraph) -> tuple[list[int], set[int]]:
    """Per instruction its operator, and the operators that share a loop.

    A loop goes whole to the operator whose instructions it holds, and to none if they are of several.
    """
    found, shared = list(graph.owner), set()
    for loop in graph.loops:
        inside = range(*loop.body)
        owners = {graph.owner[i] for i in (loop.instruction, *inside)} - {-1}
        found[loop.instruction] = next(iter(owners)) if len(owners) == 1 else -1
        shared |= owners if len(owners) > 1 else set()
        for i in inside:
            found[i] = -1
    return found, shared


class _Cut:
    """One program being cut out: values of the original by tensor and sharding, as values of the new function."""

    def __init__(self, cutter: Cutter, assignment: Assignment, mesh: PlanMesh) -> None:
        self.cutter, self.assignment, self.sizes = cutter, assignment, mesh.sizes
        self.made: dict[tuple[int, tuple[int, ...]], Any] = {}
        self.operands: list[tuple[int, tuple[int, ...]]] = []

    def shape(self, tensor: int, label: Sequence[int]) -> tuple[int, ...]:
        """The part of a tensor that a device has when it is labelled so."""
        local = []
        for size, axes in zip(
            self.cutter.graph.tensors[tensor].shape,
            label_sharding(tuple(label), self.assignment),
            strict=True,
        ):
            ways = int(np.prod([self.sizes[a] for a in axes], initial=1))
            if size % ways:
                raise NotLocal
            local.append(size // ways)
        return tuple(local)

    def part(self, members: Sequence[int]) -> Part | None:
        graph, cutter = self.cutter.graph, self.cutter
        inside = set(members)
        module = ir.Module.parse("module { func.func public @main() { return } }")
        function = next(iter(module.body)).operation
        self.block = function.regions[0].blocks[0]
        end = list(self.block)[0].operation
        self.point = ir.InsertionPoint(end)
        for i in members:
            if not all(t in cutter.free for t in graph.instructions[i].results):
                self.copy(i)
        results = [
            t
            for i in members
            for t in graph.instructions[i].results
            if t in self.local
            and (t in cutter.outputs or any(r not in inside for r in cutter.readers.get(t, ())))
        ]
        if not results:
            return None
        values = [self.local[t] for t in results]
        ir.Operation.create("func.return", operands=values, ip=self.point)
        end.erase()
        kinds = [a.type for a in self.block.arguments], [v.type for v in values]
        function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(*kinds))
        module.operation.verify()
        shapes = [
            tuple(
                jax.ShapeDtypeStruct(
                    tuple(ir.RankedTensorType(kind).shape), np.dtype(graph.tensors[t].dtype)
                )
                for kind, t in zip(side, ts, strict=True)
            )
            for side, ts in zip(kinds, ([t for t, _ in self.operands], results), strict=True)
        ]
        place = {t: n for n, t in enumerate(results)}
        replaced = {
            n: place[new]
            for n, (t, _) in enumerate(self.operands)
            for new in [cutter.renewed.get(t, -1)]
            if new in place and shapes[0][n] == shapes[1][place[new]]
        }
        return Part(stablehlo.serialize(module), shapes[0], shapes[1], str(module), replaced)

    @property
    def local(self) -> dict[int, Any]:
        """Tensor -> its value in the new function, as its own operator has it."""
        return {
            t: v
            for (t, shape), v in self.made.items()
            if shape == self.shape(t, self.cutter.graph.labels[t])
        }

    def value(self, tensor: int, label: Sequence[int]) -> Any:
        """The value of a tensor as it is read: made inside, a constant, or an operand."""
        graph = self.cutter.graph
        key = (tensor, self.shape(tensor, label))
        if key not in self.made:
            maker = self.cutter.maker.get(tensor, -1)
            made = maker >= 0 and tensor in self.cutter.free
            if made and not any(graph.tensors[t].shape for t in graph.instructions[maker].operands):
                self.copy(maker, label)
            else:
                kind = self.kind(self.cutter.values[tensor].type, key[1])
                self.made[key] = self.block.add_argument(kind, ir.Location.unknown())
                self.operands.append(key)
        return self.made[key]

    def copy(self, i: int, wanted: Sequence[int] | None = None) -> None:
        """Copies an instruction, after its operands, with local types; a constant is made as it is `wanted`."""
        graph, source = self.cutter.graph, self.cutter.operations[i]
        x = graph.instructions[i]
        labels = [self.cutter.seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)]
        operands = [self.value(t, label) for t, label in zip(x.operands, labels, strict=True)]
        copy = source.clone(self.point)
        for position, value in enumerate(operands):
            copy.operands[position] = value
        for t, result in zip(x.results, copy.results, strict=True):
            shape = self.shape(t, graph.labels[t] if wanted is None else wanted)
            result.set_type(self.kind(result.type, shape))
            self.made[t, shape] = result
        if x.name in ("while", "case", "if"):
            for region, whole in zip(copy.regions, source.regions, strict=True):
                for block, original in zip(region.blocks, whole.blocks, strict=True):
                    self.body(block, original)
        _localise(copy)

    def body(self, block: Any, original: Any) -> None:
        """Gives all that is inside a copied loop or branch its local types."""
        labels, ids = self.cutter.graph.labels, self.cutter.ids
        for value, source in zip(block.arguments, original.arguments, strict=True):
            value.set_type(self.kind(value.type, self.shape(ids[source], labels[ids[source]])))
        for op, source in zip(block, original, strict=True):
            copy = op.operation
            for value, was in zip(copy.results, source.operation.results, strict=True):
                value.set_type(self.kind(value.type, self.shape(ids[was], labels[ids[was]])))
            if stablehlo.short(copy.name) in ("while", "case", "if"):
                raise NotLocal  # a loop in a loop
            _localise(copy)

    @staticmethod
    def kind(whole: Any, shape: Sequence[int]) -> Any:
        return ir.RankedTensorType.get(list(shape), ir.RankedTensorType(whole).element_type)


def _localise(operation: Any) -> None:
    """Gives an instruction the attributes that its local types ask for."""
    name = stablehlo.short(operation.name)
    shape = lambda value: list(ir.RankedTensorType(value.type).shape)  # noqa: E731
    numbers = lambda key: list(ir.DenseI64ArrayAttr(operation.attributes[key]))  # noqa: E731
    if name == "constant" and "complex" in str(operation.results[0].type):
        raise NotLocal  # MLIR's Python cannot hold its value
    if name == "constant":
        value, kind = ir.DenseElementsAttr(operation.attributes["value"]), operation.results[0].type
        if shape(operation.results[0]) != list(ir.RankedTensorType(value.type).shape):
            if not value.is_splat:
                raise NotLocal
            operation.attributes["value"] = ir.DenseElementsAttr.get_splat(
                kind, value.get_splat_value()
            )
    elif name == "slice":
        start, stride, size, into = (
            numbers("start_indices"),
            numbers("strides"),
            shape(operation.operands[0]),
            shape(operation.results[0]),
        )
        start = [
            max(0, min(b, n - (r - 1) * s - 1))
            for b, n, r, s in zip(start, size, into, stride, strict=True)
        ]
        operation.attributes["start_indices"] = ir.DenseI64ArrayAttr.get(start)
        limits = [b + (r - 1) * s + 1 for b, r, s in zip(start, into, stride, strict=True)]
        operation.attributes["limit_indices"] = ir.DenseI64ArrayAttr.get(limits)
    elif name == "dynamic_slice":
        operation.attributes["slice_sizes"] = ir.DenseI64ArrayAttr.get(shape(operation.results[0]))
    elif name == "gather":
        sizes = [
            min(a, b)
            for a, b in zip(numbers("slice_sizes"), shape(operation.operands[0]), strict=True)
        ]
        operation.attributes["slice_sizes"] = ir.DenseI64ArrayAttr.get(sizes)
    elif name == "convolution":
        _pad_convolution(operation)


def _pad_convolution(operation: Any) -> None:
    """Pads a convolution that is split in space so that it makes its part of the result; what it reads of its neighbours is zeros.

    One that is split by its groups has as many groups as it has channels left.
    """
    dims = convolution_dims(operation)
    lhs, rhs, out = (
        ir.RankedTensorType(v.type).shape for v in (*operation.operands, *operation.results)
    )
    padding = []
    for s, (step, low, high, base, dilation) in enumerate(
        convolution_window(operation, len(dims["lhs"]) - 2)
    ):
        size, window, count = (
            lhs[dims["lhs"][2 + s]],
            rhs[dims["rhs"][2 + s]],
            out[dims["out"][2 + s]],
        )
        need = (count - 1) * step + (window - 1) * dilation + 1 - ((size - 1) * base + 1)
        padding.append(
            (low, high) if need <= low + high < need + step else (need // 2, need - need // 2)
        )
    operation.attributes["padding"] = ir.DenseElementsAttr.get(np.array(padding, np.int64))  # pyright: ignore
    groups = ir.IntegerAttr(operation.attributes["feature_group_count"])
    if groups.value > 1:
        operation.attributes["feature_group_count"] = ir.IntegerAttr.get(
            groups.type, lhs[dims["lhs"][1]] // rhs[dims["rhs"][1]]
        )


def _timed(asked: Sequence[Asked], devices: int) -> list[float | None]:
    """Seconds of each operator, all devices here computing it at once; None where the compiler refuses a program."""
    mesh = Mesh(np.array(jax.local_devices()[: -(-devices // jax.process_count())]), ("a",))
    meet()
    whole = NamedSharding(mesh, PartitionSpec())

    def ready(part: Part) -> tuple[Part, Any, list[Any]]:
        values = [
            jax.device_put(
                np.full(s.shape, 0.01 if np.issubdtype(s.dtype, np.inexact) else 0).astype(s.dtype),
                whole,
            )
            for s in part.operands
        ]
        shardings: dict[str, Any] = {"in_shardings": [whole] * len(values), "out_shardings": whole}
        run = (
            jax.jit(_callable(part), donate_argnums=tuple(part.replaced), **shardings)
            .lower(*values)
            .compile()
        )
        _seconds(part, run, values)
        return part, run, values

    programs: list[tuple[int, Part, Any, list[Any]]] = []
    refused: set[int] = set()
    for n, a in enumerate(asked):
        try:
            programs += [(n, *ready(part)) for part in a.parts]
        except (ValueError, RuntimeError, NotImplementedError):
            refused.add(n)
    nothing = (
        jax.jit(lambda x: x, in_shardings=whole, out_shardings=whole).lower(np.float32(0)).compile()
    )
    zero = jax.device_put(np.float32(0), whole)
    empty = Part(b"", (), (), "", {})
    times: list[list[float]] = [[] for _ in programs]
    starts: list[float] = []
    for _ in range(ROUNDS):
        for n, (_, part, run, values) in enumerate(programs):
            starts.append(_seconds(empty, nothing, [zero]))
            times[n].append(_seconds(part, run, values))
    start = median(starts) if starts else 0.0
    found = [0.0] * len(asked)
    for (n, *_), taken in zip(programs, times, strict=True):
        found[n] += max(1e-7, median(taken) - start)
    return [
        None if n in refused or not asked[n].parts else seconds for n, seconds in enumerate(found)
    ]


def _seconds(part: Part, run: Any, values: list[Any]) -> float:
    """Seconds of one run; what it replaces of `values` is replaced."""
    start = time.perf_counter()
    results = jax.block_until_ready(run(*values))
    taken = time.perf_counter() - start
    for operand, result in part.replaced.items():
        values[operand] = results[result]
    return taken


def _callable(part: Part) -> Callable[..., Any]:
    """The part as a function that `jax.jit` takes."""

    def like(*operands: Any) -> tuple[Any, ...]:
        return tuple(jax.numpy.zeros(s.shape, s.dtype) for s in part.results)

    shell = export.export(jax.jit(like))(*part.operands)
    text = Text.of(shell, part.bytecode)
    return dataclasses.replace(text, module_kept_var_idx=tuple(range(len(part.operands)))).call


def file_of_operators(machine: Machine) -> Path:
    return file_of(key_of(machine.devices)).with_name(
        re.sub(r"^machine-", "operators-", file_of(key_of(machine.devices)).name).replace(
            ".toml", ".json"
        )
    )


def load(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured before, by text; nothing where the file is of other devices or libraries."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        dict(kept["operators"]) if isinstance(kept, dict) and kept.get("key") == dict(key) else {}
    )


def _save(path: Path, key: Mapping[str, Any], records: Mapping[str, Any]) -> None:
    """Keeps the file whole if two processes write at once; a disk that is full loses the cache and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(
            f"  {json.dumps(text)}: {json.dumps(record)}" for text, record in records.items()
        )
        fresh = path.with_suffix(".new")
        fresh.write_text(
            f'{{"key": {json.dumps(key)},\n"operators": {{\n{lines}\n}}}}\n', encoding="utf-8"
        )
        fresh.replace(path)
    except OSError:
        path.with_suffix(".new").unlink(missing_ok=True)
