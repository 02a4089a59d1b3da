"""Measured seconds of operators, at the shapes that one device computes.

An operator's program is cut out of the captured text: its own instructions, forward or backward,
with the types of their local parts and without collectives. All devices run it at once, as they
share memory and cores in a step. Programs take turns, so none finds its own data in the cache.

Equal operators are measured once. A file stores the times for later plans.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

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
from partita.cost.terms import cost_terms
from partita.errors import MachineError
from partita.execute.calibrate import check_cache, file_of, key_of
from partita.execute.processes import from_first, is_first, meet
from partita.files import schema
from partita.files.checksums import checksum, sealed
from partita.files.reading import FileKind, read_json
from partita.files.writing import write_text
from partita.graph.operator_graph import OperatorGraph, constant_tensors, read_labels
from partita.machine import Machine, fitted_times
from partita.machine.times import OperatorKey
from partita.plans.layout import label_sharding, operator_assignments
from partita.plans.pipeline import is_pipeline, stage_plan
from partita.plans.plan import Mesh as PlanMesh
from partita.plans.plan import Plan

ROUNDS = 5
"""Timed runs of a program, after one to warm up. The median of the settled ones counts."""
MOST_ROUNDS = 12
"""Timed runs while less than `SETTLED_RUNS` of some program are settled, at most."""
SETTLED_RUNS = 3
FEW_PAGES = 64
"""Pages that the system may clear in a settled run, beyond the fewest in a run."""
OPERATORS_FILE = FileKind(
    "a file of operator times",
    "delete the file: it is measured again",
    MachineError,
    by_hand=False,
    most_bytes=2**30,
)
_RECORD = schema.table(
    {
        "model": schema.text(),
        "operator": schema.text(),
        "digest": schema.text(),
        "seconds": schema.number(1e-12, 1e6),
        "features": schema.mapping(schema.number(0, 1e6)),
    }
)
_CONTENT = sealed(
    schema.table({"key": schema.plain, "operators": schema.mapping(_RECORD)}), required=True
)
CHUNK_BYTES = 1 << 30
"""Operands and results of the programs that take turns, bytes."""
LOOPS = ("while", "case", "if")

LocalTensor = tuple[int, tuple[int, ...]]
"""A tensor's number and its shape on one device."""


class NotLocal(Exception):
    """An operator that cannot be cut out at this split.

    Reasons: a loop shared with other operators, a window split in space, an uneven part.
    """


@dataclass(frozen=True)
class Part:
    """A program of one operator, forward or backward."""

    bytecode: bytes
    """The serialized module."""
    operands: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    text: str
    """The module's text, which identifies the program."""
    replaced: Mapping[int, int]
    """Donated operand -> the result that takes its memory, as a variable's new value does."""

    @property
    def nbytes(self) -> int:
        """Size of operands and results, bytes."""
        total = 0
        for shape in (*self.operands, *self.results):
            total += int(np.prod(shape.shape)) * shape.dtype.itemsize
        return total


@dataclass
class Request:
    """An operator at one split, to be measured."""

    operator: str
    key: OperatorKey
    parts: tuple[Part, ...]
    features: Mapping[str, float]
    """The roofline's seconds, by class."""
    reaches: bool = False
    """Whether the operator reads rows of neighbouring devices."""

    @property
    def devices(self) -> int:
        """Number of devices that run the programs at once."""
        return self.key[1]

    @property
    def nbytes(self) -> int:
        """Size of operands and results on all devices, bytes."""
        return self.devices * sum(part.nbytes for part in self.parts)

    @property
    def text(self) -> str:
        """The key of the time in the file: a digest of the device count and the programs."""
        texts = [str(self.devices)]
        texts += [part.text for part in self.parts]
        return sha256("\n".join(texts).encode()).hexdigest()[:24]


def measured_operators(
    captured: Captured,
    machine: Machine,
    plans: Sequence[Plan],
    report: Callable[[int, int], None] | None = None,
) -> Machine:
    """The machine with times of the plans' operators, and a fit to all times of the file.

    Operators that cannot be cut out stay without a time. `report` gets the number of timed
    programs and their total. Several processes call this together and measure at the same time;
    the results of process 0 count for all.
    """
    times = machine.times
    seconds_of = {} if times is None else dict(times.seconds)
    path = file_of_operators(machine)
    file_key = key_of(machine.devices)
    text = from_first("times of operators", lambda: json.dumps(load(path, file_key)))
    records: dict[str, Any] = json.loads(text)
    requests = list(_requests(captured, machine, plans, seconds_of))
    unmeasured = {request.text: request for request in requests if request.text not in records}
    if unmeasured:
        from_first("cache of operators", lambda: check_cache(path))
    _measure(
        list(unmeasured.values()),
        captured.graph.name,
        records,
        report,
    )
    if unmeasured and is_first():
        save(path, file_key, records)
    answered = [
        (request, records[request.text]["seconds"])
        for request in requests
        if request.text in records
    ]
    plausible = _plausible(answered, seconds_of)
    seconds_of |= {request.key: seconds for request, seconds in plausible}
    if not records:
        return machine
    fit = fitted_times(records.values())
    ratios_of: dict[str, list[float]] = {}
    for request, seconds in plausible:
        ratio = seconds / fit.fitted_seconds(request.features)
        ratios_of.setdefault(request.key[0], []).append(ratio)
    corrections = {} if times is None else dict(times.corrections)
    corrections |= {digest: median(ratios) for digest, ratios in ratios_of.items()}
    fit = replace(
        fit,
        seconds=seconds_of,
        corrections=corrections,
    )
    return replace(machine, times=fit)


def _measure(
    requests: Sequence[Request],
    model: str,
    records: dict[str, Any],
    report: Callable[[int, int], None] | None,
) -> None:
    """Times the requests and adds a record for each that compiles."""
    done = 0
    for chunk in _chunks(requests):
        local_times = _timed(chunk, chunk[0].devices)
        local_text = json.dumps(local_times)
        text = from_first("times of operators", lambda text=local_text: text)
        for request, seconds in zip(chunk, json.loads(text), strict=True):
            if seconds is None:
                continue
            records[request.text] = {
                "model": model,
                "operator": request.operator,
                "digest": request.key[0],
                "seconds": seconds,
                "features": dict(request.features),
            }
        done += len(chunk)
        if report is not None:
            report(done, len(requests))


def _chunks(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Requests of equal device counts, in lists of less than `CHUNK_BYTES` or of one request."""
    chunk: list[Request] = []
    nbytes = 0
    for request in sorted(requests, key=lambda request: request.devices):
        fits = nbytes + request.nbytes < CHUNK_BYTES
        if chunk and (request.devices != chunk[0].devices or not fits):
            yield chunk
            chunk = []
            nbytes = 0
        chunk.append(request)
        nbytes += request.nbytes
    if chunk:
        yield chunk


def _plausible(
    answered: Sequence[tuple[Request, float]],
    seconds_of: Mapping[OperatorKey, float],
) -> list[tuple[Request, float]]:
    """Measurements that a step would repeat.

    Parts that read neighbours' rows and took longer than the whole operator are left out. Alone,
    such a part has zeros for those rows, and is not always the program that it is in a step:
    XLA:CPU computes some gradients of convolutions over few rows without its library, 50 times
    slower.
    """
    whole: dict[Any, float] = {}
    for request, seconds in answered:
        if set(request.key[2]) <= {1}:
            whole[request.key[:2]] = seconds
    for key, seconds in seconds_of.items():
        if set(key[2]) <= {1}:
            whole[key[:2]] = seconds
    plausible = []
    for request, seconds in answered:
        limit = whole.get(request.key[:2], seconds)
        if not request.reaches or seconds <= limit:
            plausible.append((request, seconds))
    return plausible


def _requests(
    captured: Captured,
    machine: Machine,
    plans: Sequence[Plan],
    seconds_of: Mapping[Any, float],
) -> Iterator[Request]:
    """The plans' operators without a time, each once; those of pipelines on a microbatch."""
    graph = captured.graph
    terms = cost_terms(graph, machine.backend)
    keys = set(seconds_of)
    with stablehlo.context(), ir.Location.unknown():
        cutter = Cutter(stablehlo.parse(captured.text.mlir_module_serialized), graph)
        for plan in plans:
            plan = stage_plan(graph, plan) if is_pipeline(plan) else plan
            placement = Placement(machine, plan.mesh)
            for o, assignment in enumerate(operator_assignments(graph, plan)):
                operator_terms = terms.operators[o]
                key = local_key(
                    operator_terms,
                    placement,
                    assignment,
                )
                if key in keys or not operator_terms.work:
                    continue
                keys.add(key)
                try:
                    parts = cutter.parts(o, assignment, plan.mesh)
                except (NotLocal, ir.MLIRError, ValueError, TypeError):
                    continue
                yield Request(
                    graph.operators[o].name,
                    key,
                    parts,
                    roofline_features(operator_terms, placement, assignment),
                    any(assignment.get(halo.split) for halo in operator_terms.halos),
                )


class Cutter:
    """Cuts operators out of a program at their local shapes."""

    def __init__(self, module: ir.Module, graph: OperatorGraph) -> None:
        self.graph = graph
        self.module = module
        """Keeps the values alive."""
        self.values, self.operations = stablehlo.numbered(stablehlo.main_block(module))
        self.ids = {value: t for t, value in enumerate(self.values)}
        self.read_labels = read_labels(graph)
        self.constants = constant_tensors(graph)
        self.outputs = set(graph.outputs)
        self.renewed = {a.tensor: a.result for a in graph.arguments if a.result is not None}
        """Variable -> its new value."""
        self.producers: dict[int, int] = {}
        """Tensor -> the instruction that computes it."""
        self.readers: dict[int, list[int]] = {}
        """Tensor -> the instructions that read it."""
        for i, instruction in enumerate(graph.instructions):
            for t in instruction.results:
                self.producers[t] = i
            for t in instruction.operands:
                self.readers.setdefault(t, []).append(i)
        owners, self.shared = _owners(graph)
        self.members: list[list[int]] = [[] for _ in graph.operators]
        """Instructions of every operator."""
        for i, o in enumerate(owners):
            if o >= 0:
                self.members[o].append(i)

    def parts(
        self,
        operator: int,
        assignment: Assignment,
        mesh: PlanMesh,
    ) -> tuple[Part, ...]:
        """An operator's forward program, and its backward program with the update.

        Raises NotLocal if the operator cannot be cut out under the assignment.
        """
        if operator in self.shared:
            raise NotLocal
        forward: list[int] = []
        later: list[int] = []
        for i in self.members[operator]:
            phase = self.graph.instructions[i].phase
            if phase == "forward":
                forward.append(i)
            else:
                later.append(i)
        parts: list[Part] = []
        for members in (forward, later):
            if not members:
                continue
            part = _Cut(self, assignment, mesh).part(members)
            if part is not None:
                parts.append(part)
        return tuple(parts)


def _owners(graph: OperatorGraph) -> tuple[list[int], set[int]]:
    """The operator of every instruction (-1: none), and the operators that share a loop.

    A loop belongs to the operator of all its instructions, or to none if they have several.
    """
    owner_of = list(graph.owner)
    shared: set[int] = set()
    for loop in graph.loops:
        body = range(*loop.body)
        owners = {graph.owner[i] for i in (loop.instruction, *body)} - {-1}
        owner_of[loop.instruction] = next(iter(owners)) if len(owners) == 1 else -1
        if len(owners) > 1:
            shared |= owners
        for i in body:
            owner_of[i] = -1
    return owner_of, shared


class _Cut:
    """One program that is being cut out.

    `values` are those of the new function, by tensor and local shape.
    """

    def __init__(
        self,
        cutter: Cutter,
        assignment: Assignment,
        mesh: PlanMesh,
    ) -> None:
        self.cutter = cutter
        self.assignment = assignment
        self.sizes = mesh.sizes
        self.values: dict[LocalTensor, Any] = {}
        self.operands: list[LocalTensor] = []

    def shape(self, tensor: int, label: Sequence[int]) -> tuple[int, ...]:
        """Shape of a device's part of a tensor with this label."""
        sizes = self.cutter.graph.tensors[tensor].shape
        sharding = label_sharding(tuple(label), self.assignment)
        local_sizes = []
        for size, axes in zip(sizes, sharding, strict=True):
            count = int(np.prod([self.sizes[a] for a in axes], initial=1))
            if size % count:
                raise NotLocal
            local_sizes.append(size // count)
        return tuple(local_sizes)

    def part(self, members: Sequence[int]) -> Part | None:
        """The program of the instructions `members`; None if nothing reads its results."""
        module = ir.Module.parse("module { func.func public @main() { return } }")
        function = next(iter(module.body)).operation
        self.block = function.regions[0].blocks[0]
        end = list(self.block)[0].operation
        self.point = ir.InsertionPoint(end)
        for i in members:
            tensors = self.cutter.graph.instructions[i].results
            if not all(t in self.cutter.constants for t in tensors):
                self.copy(i)
        results = self._results(members)
        if not results:
            return None
        local = self._local()
        values = [local[t] for t in results]
        ir.Operation.create(
            "func.return",
            operands=values,
            ip=self.point,
        )
        end.erase()
        operand_types = [argument.type for argument in self.block.arguments]
        result_types = [value.type for value in values]
        function_type = ir.FunctionType.get(operand_types, result_types)
        function.attributes["function_type"] = ir.TypeAttr.get(function_type)
        module.operation.verify()
        operand_shapes = self._structs(operand_types, [t for t, _ in self.operands])
        result_shapes = self._structs(result_types, results)
        return Part(
            stablehlo.serialize(module),
            operand_shapes,
            result_shapes,
            str(module),
            self._replaced(results, operand_shapes, result_shapes),
        )

    def _results(self, members: Sequence[int]) -> list[int]:
        """Tensors of the instructions that others read or that the step returns."""
        inside = set(members)
        local = self._local()
        results = []
        for i in members:
            for t in self.cutter.graph.instructions[i].results:
                readers = self.cutter.readers.get(t, ())
                leaves = t in self.cutter.outputs or any(r not in inside for r in readers)
                if leaves and t in local:
                    results.append(t)
        return results

    def _structs(
        self,
        types: Sequence[Any],
        tensors: Sequence[int],
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of tensors with these local types."""
        structs = []
        for kind, t in zip(types, tensors, strict=True):
            shape = tuple(ir.RankedTensorType(kind).shape)
            dtype = np.dtype(self.cutter.graph.tensors[t].dtype)
            structs.append(jax.ShapeDtypeStruct(shape, dtype))
        return tuple(structs)

    def _replaced(
        self,
        results: Sequence[int],
        operand_shapes: Sequence[jax.ShapeDtypeStruct],
        result_shapes: Sequence[jax.ShapeDtypeStruct],
    ) -> dict[int, int]:
        """Operand -> the result that is its new value, if their local shapes are equal."""
        position_of = {t: n for n, t in enumerate(results)}
        replaced = {}
        for n, (t, _) in enumerate(self.operands):
            position = position_of.get(self.cutter.renewed.get(t, -1))
            if position is not None and operand_shapes[n] == result_shapes[position]:
                replaced[n] = position
        return replaced

    def _local(self) -> dict[int, Any]:
        """Tensor -> its value in the new function, with the operator's own split."""
        labels = self.cutter.graph.labels
        local = {}
        for (t, shape), value in self.values.items():
            if shape == self.shape(t, labels[t]):
                local[t] = value
        return local

    def value(self, tensor: int, label: Sequence[int]) -> Any:
        """The value of a tensor that is read with this label.

        A copied result, a constant, or a new operand.
        """
        key = (tensor, self.shape(tensor, label))
        if key in self.values:
            return self.values[key]
        producer = self.cutter.producers.get(tensor, -1)
        if producer >= 0 and tensor in self.cutter.constants and self._reads_scalars(producer):
            self.copy(producer, label)
        else:
            kind = self.kind(self.cutter.values[tensor].type, key[1])
            self.values[key] = self.block.add_argument(kind, ir.Location.unknown())
            self.operands.append(key)
        return self.values[key]

    def _reads_scalars(self, i: int) -> bool:
        """Whether an instruction reads scalars only."""
        graph = self.cutter.graph
        return not any(graph.tensors[t].shape for t in graph.instructions[i].operands)

    def copy(self, i: int, label: Sequence[int] | None = None) -> None:
        """Copies an instruction, after its operands, with local types.

        `label` is that of a constant's reader; other results have their own labels.
        """
        graph = self.cutter.graph
        source = self.cutter.operations[i]
        instruction = graph.instructions[i]
        operands = []
        for position, t in enumerate(instruction.operands):
            read_label = self.cutter.read_labels.get((i, position), graph.labels[t])
            operands.append(self.value(t, read_label))
        copy = source.clone(self.point)
        for position, value in enumerate(operands):
            copy.operands[position] = value
        for t, result in zip(instruction.results, copy.results, strict=True):
            shape = self.shape(t, graph.labels[t] if label is None else label)
            result.set_type(self.kind(result.type, shape))
            self.values[t, shape] = result
        if instruction.name in LOOPS:
            for region, source_region in zip(copy.regions, source.regions, strict=True):
                for block, original in zip(region.blocks, source_region.blocks, strict=True):
                    self.body(block, original)
        _localise(copy)

    def body(self, block: Any, original: Any) -> None:
        """Gives the instructions of a copied loop or branch their local types."""
        for value, source in zip(block.arguments, original.arguments, strict=True):
            self._set_local_type(value, source)
        for item, original_item in zip(block, original, strict=True):
            copy = item.operation
            for value, source in zip(copy.results, original_item.operation.results, strict=True):
                self._set_local_type(value, source)
            if stablehlo.short(copy.name) in LOOPS:
                # A loop in a loop.
                raise NotLocal
            _localise(copy)

    def _set_local_type(self, value: Any, source: Any) -> None:
        """Gives a copied value the local type of its source."""
        t = self.cutter.ids[source]
        shape = self.shape(t, self.cutter.graph.labels[t])
        value.set_type(self.kind(value.type, shape))

    @staticmethod
    def kind(whole: Any, shape: Sequence[int]) -> Any:
        """The type with another shape."""
        element_type = ir.RankedTensorType(whole).element_type
        return ir.RankedTensorType.get(list(shape), element_type)


def _localise(operation: Any) -> None:
    """Gives an instruction the attributes that fit its local types."""
    name = stablehlo.short(operation.name)
    attributes = operation.attributes
    if name == "constant":
        _localise_constant(operation)
    elif name == "slice":
        _localise_slice(operation)
    elif name == "dynamic_slice":
        sizes = _shape(operation.results[0])
        attributes["slice_sizes"] = ir.DenseI64ArrayAttr.get(sizes)
    elif name == "gather":
        whole_sizes = _integers(operation, "slice_sizes")
        operand_sizes = _shape(operation.operands[0])
        sizes = [min(a, b) for a, b in zip(whole_sizes, operand_sizes, strict=True)]
        attributes["slice_sizes"] = ir.DenseI64ArrayAttr.get(sizes)
    elif name == "convolution":
        _pad_convolution(operation)


def _shape(value: Any) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def _integers(operation: Any, attribute: str) -> list[int]:
    return list(ir.DenseI64ArrayAttr(operation.attributes[attribute]))


def _localise_constant(operation: Any) -> None:
    """Shrinks a constant of one value; NotLocal for others.

    MLIR's Python cannot represent a complex value.
    """
    result = operation.results[0]
    if "complex" in str(result.type):
        raise NotLocal
    value = ir.DenseElementsAttr(operation.attributes["value"])
    if _shape(result) == list(ir.RankedTensorType(value.type).shape):
        return
    if not value.is_splat:
        raise NotLocal
    local_value = ir.DenseElementsAttr.get_splat(result.type, value.get_splat_value())
    operation.attributes["value"] = local_value


def _localise_slice(operation: Any) -> None:
    """Moves a slice into its local operand: start and limits by the local result's size."""
    starts: list[int] = []
    limits: list[int] = []
    for start, stride, size, count in zip(
        _integers(operation, "start_indices"),
        _integers(operation, "strides"),
        _shape(operation.operands[0]),
        _shape(operation.results[0]),
        strict=True,
    ):
        span = (count - 1) * stride + 1
        local_start = max(0, min(start, size - span))
        starts.append(local_start)
        limits.append(local_start + span)
    operation.attributes["start_indices"] = ir.DenseI64ArrayAttr.get(starts)
    operation.attributes["limit_indices"] = ir.DenseI64ArrayAttr.get(limits)


def _pad_convolution(operation: Any) -> None:
    """Pads a convolution that is split in space to its part of the result.

    Zeros stand for the neighbours' rows. A convolution that is split by groups has one group per
    group of its local channels.
    """
    dims = convolution_dims(operation)
    values = (*operation.operands, *operation.results)
    lhs, rhs, out = (ir.RankedTensorType(value.type).shape for value in values)
    windows = convolution_window(operation, len(dims["lhs"]) - 2)
    padding = []
    for s, (step, low, high, base, dilation) in enumerate(windows, start=2):
        size = lhs[dims["lhs"][s]]
        window = rhs[dims["rhs"][s]]
        count = out[dims["out"][s]]
        span = (count - 1) * step + (window - 1) * dilation + 1
        need = span - ((size - 1) * base + 1)
        if need <= low + high < need + step:
            padding.append((low, high))
        else:
            padding.append((need // 2, need - need // 2))
    array = np.array(padding, np.int64)
    operation.attributes["padding"] = ir.DenseElementsAttr.get(array)  # pyright: ignore
    groups = ir.IntegerAttr(operation.attributes["feature_group_count"])
    if groups.value > 1:
        count = lhs[dims["lhs"][1]] // rhs[dims["rhs"][1]]
        operation.attributes["feature_group_count"] = ir.IntegerAttr.get(groups.type, count)


@dataclass
class _Program:
    """A compiled part with its arguments, and its timed runs."""

    request: int
    """Position in the requests."""
    part: Part
    run: Any
    values: list[Any]
    runs: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    """Seconds of a run, and pages that the system cleared for it."""

    def start(self) -> None:
        """Runs the program once. Results take the place of the donated arguments."""
        pages = _cleared_pages()
        start = time.perf_counter()
        results = jax.block_until_ready(self.run(*self.values))
        self.runs.append((time.perf_counter() - start, _cleared_pages() - pages))
        for operand, result in self.part.replaced.items():
            self.values[operand] = results[result]

    @property
    def settled(self) -> list[float]:
        """Seconds of the runs in memory that the process has already had, as a step's is.

        Memory is new in the first runs of a program, and clearing it may take longer than the
        program.
        """
        fewest = min(pages for _, pages in self.runs)
        return [seconds for seconds, pages in self.runs if pages <= fewest + FEW_PAGES]


def _cleared_pages() -> int:
    """Pages that the system has cleared for this process so far; 0 where it does not say."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _timed(requests: Sequence[Request], devices: int) -> list[float | None]:
    """Seconds of each operator, computed by all local devices at once.

    None if the compiler refuses a program, or if there is none.
    """
    local_devices = jax.local_devices()[: -(-devices // jax.process_count())]
    mesh = Mesh(np.array(local_devices), ("a",))
    meet()
    whole = NamedSharding(mesh, PartitionSpec())
    programs: list[_Program] = []
    refused: set[int] = set()
    for n, request in enumerate(requests):
        try:
            programs += [_compiled(n, part, whole) for part in request.parts]
        except (ValueError, RuntimeError, NotImplementedError):
            refused.add(n)
    empty = _empty_program(whole)
    for number in range(MOST_ROUNDS):
        if number >= ROUNDS and all(len(p.settled) >= SETTLED_RUNS for p in programs):
            break
        for program in programs:
            empty.start()
            program.start()
    start = median(empty.settled) if empty.runs else 0.0
    totals = [0.0] * len(requests)
    for program in programs:
        totals[program.request] += max(1e-7, median(program.settled) - start)
    times: list[float | None] = []
    for n, total in enumerate(totals):
        missing = n in refused or not requests[n].parts
        times.append(None if missing else total)
    return times


def _compiled(
    request: int,
    part: Part,
    whole: NamedSharding,
) -> _Program:
    """A part as a compiled program with arguments, run once."""
    values = []
    for shape in part.operands:
        number = 0.01 if np.issubdtype(shape.dtype, np.inexact) else 0
        array = np.full(shape.shape, number).astype(shape.dtype)
        values.append(jax.device_put(array, whole))
    jitted = jax.jit(
        _callable(part),
        donate_argnums=tuple(part.replaced),
        in_shardings=[whole] * len(values),  # type: ignore[arg-type]
        out_shardings=whole,
    )
    run = jitted.lower(*values).compile()
    program = _Program(request, part, run, values)
    program.start()
    program.runs.clear()
    return program


def _empty_program(whole: NamedSharding) -> _Program:
    """A program that computes nothing: the time to start one."""
    jitted = jax.jit(
        lambda x: x,
        in_shardings=whole,
        out_shardings=whole,
    )
    run = jitted.lower(np.float32(0)).compile()
    zero = jax.device_put(np.float32(0), whole)
    return _Program(-1, Part(b"", (), (), "", {}), run, [zero])


def _callable(part: Part) -> Callable[..., Any]:
    """The part as a function that `jax.jit` takes."""

    def like(*operands: Any) -> tuple[Any, ...]:
        return tuple(jax.numpy.zeros(shape.shape, shape.dtype) for shape in part.results)

    shell = export.export(jax.jit(like))(*part.operands)
    text = Text.of(shell, part.bytecode)
    kept = tuple(range(len(part.operands)))
    return dataclasses.replace(text, module_kept_var_idx=kept).call


def file_of_operators(machine: Machine) -> Path:
    """The file of operator times, beside the file of the machine's calibration."""
    path = file_of(key_of(machine.devices))
    name = re.sub(r"^machine-", "operators-", path.name)
    return path.with_name(name.replace(".toml", ".json"))


def load(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """Records of a file, by digest; none if they are of other devices or libraries."""
    if not path.exists():
        return {}
    content = read_json(path, OPERATORS_FILE, _CONTENT)
    return dict(content["operators"]) if content["key"] == dict(key) else {}


def save(
    path: Path,
    key: Mapping[str, Any],
    records: Mapping[str, Any],
) -> None:
    """Writes the records. A disk that has filled since `check_cache` costs the cache only."""
    lines = [f"  {json.dumps(text)}: {json.dumps(record)}" for text, record in records.items()]
    joined = ",\n".join(lines)
    seal = checksum({"key": dict(key), "operators": dict(records)})
    content = (
        f'{{"checksum": "{seal}",\n"key": {json.dumps(key)},\n"operators": {{\n{joined}\n}}}}\n'
    )
    with suppress(OSError):
        write_text(path, content)
