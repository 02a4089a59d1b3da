"""Shardings of all tensors under a plan, and the reads that need another sharding.

The only place where labels and choices become shardings. The cost model, the annotated program and
the comparison with the compiler all read the same `Layout`, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import NamedTuple

from partita.graph.clones import BARRIER
from partita.graph.flat import HEAVY, Reader, readers_of
from partita.graph.operator_graph import (
    CONDITIONALS,
    Argument,
    IdentityKey,
    Instruction,
    Label,
    Loop,
    OperatorGraph,
    per_graph,
    producers,
)
from partita.plans.plan import Mesh, Plan, Storage, is_accelerator, is_gpu, placed_slice

Sharding = tuple[tuple[int, ...], ...]
"""Per dim of a tensor, the mesh axes (by index) that split it, major to minor."""
Assignment = dict[int, tuple[int, ...]]
"""Factor -> the mesh axes that split it, in mesh order."""


@dataclass(frozen=True)
class Read:
    """A tensor that some readers need under another sharding than its own."""

    tensor: int
    operator: int
    target: Sharding
    readers: tuple[Reader, ...]
    after: int = -1
    """A gradient before which the reshard does not begin, -1 for none: a stored parameter is
    gathered again for the backward pass, so that the first copy need not stay in memory."""


@dataclass(frozen=True)
class Layout:
    """Shardings of all tensors under a plan."""

    shardings: tuple[Sharding, ...]
    """Per tensor."""
    reads: tuple[Read, ...]
    """Reads under another sharding than the tensor's own."""
    assignments: tuple[Assignment, ...]
    """Per operator."""
    host: frozenset[int] = frozenset()
    """Offloaded optimizer slots, before and after the update: tensors in the memory of the host."""

    @cached_property
    def targets(self) -> dict[Reader, Sharding]:
        """Reader -> the sharding under which it reads, where that is not the tensor's."""
        return {reader: read.target for read in self.reads for reader in read.readers}


def label_sharding(label: Label, assignment: Mapping[int, tuple[int, ...]]) -> Sharding:
    """The sharding of a tensor with this label: per dim the axes of its factor."""
    return tuple(assignment.get(factor, ()) for factor in label)


def local_shape(
    shape: Sequence[int],
    sharding: Sharding,
    sizes: Sequence[int],
) -> tuple[int, ...]:
    """Shape of one device's shard. A dim that does not divide evenly is rounded up."""
    return tuple(
        -(-size // math.prod(sizes[axis] for axis in axes))
        for size, axes in zip(shape, sharding, strict=True)
    )


@lru_cache(maxsize=64)
def time_axes(mesh: Mesh) -> frozenset[int]:
    """The axes of a mesh that split samples over time (microbatches), not over devices.

    Nothing is sent along them.
    """
    return frozenset(number for number, axis in enumerate(mesh.axes) if axis.level < 0)


def over_devices(sharding: Sharding, mesh: Mesh) -> Sharding:
    """The part of a sharding that splits over devices."""
    time = time_axes(mesh)
    if not time:
        return sharding
    return tuple(tuple(a for a in axes if a not in time) for axes in sharding)


def operator_assignments(graph: OperatorGraph, plan: Plan) -> tuple[Assignment, ...]:
    """Per operator, the mesh axes that split each factor."""
    assignments = []
    for operator in graph.operators:
        factor_of = {graph.factors[f].name: f for f in operator.factors}
        assignment: Assignment = defaultdict(tuple)
        choice = plan.choices[operator.name]
        for number, axis in enumerate(plan.mesh.axes):
            if axis.name in choice and placed_slice(choice[axis.name]) is None:
                assignment[factor_of[choice[axis.name]]] += (number,)
        assignments.append(dict(assignment))
    return tuple(assignments)


def shard_bytes(graph: OperatorGraph, mesh: Mesh, layout: Layout) -> list[int]:
    """Per tensor the bytes of a device's shard."""
    nbytes = []
    for tensor, sharding in zip(graph.tensors, layout.shardings, strict=True):
        shards = math.prod(mesh.sizes[axis] for axes in sharding for axis in axes)
        nbytes.append(-(-tensor.nbytes // shards))
    return nbytes


@lru_cache(maxsize=1 << 16)
def spare_axes(
    shape: tuple[int, ...],
    sharding: Sharding,
    mesh: Mesh,
    outermost: int = 0,
) -> tuple[int, tuple[int, ...]] | None:
    """The dim of a tensor that its free mesh axes split furthest, and those axes; None if no dim.

    Free are the axes of the level `outermost` and inside it that do not appear in the tensor's
    sharding.
    """
    used = set(chain.from_iterable(sharding))
    best_ways = 1
    best: tuple[int, tuple[int, ...]] | None = None
    for dim, (size, axes) in enumerate(zip(shape, sharding, strict=True)):
        local_size = size // math.prod(mesh.sizes[axis] for axis in axes)
        spare = []
        ways = 1
        for axis, axis_size in enumerate(mesh.sizes):
            is_free = axis not in used and mesh.axes[axis].level >= outermost
            if is_free and local_size // ways % axis_size == 0:
                spare.append(axis)
                ways *= axis_size
        if ways > best_ways:
            best_ways = ways
            best = (dim, tuple(spare))
    return best


@per_graph
def update_families(graph: OperatorGraph) -> dict[int, int]:
    """Tensor -> the parameter (argument tensor) whose update it belongs to.

    A parameter is updated where its slots are stored. Its family is its slots, and all values of
    the update phase that are computed from them with the parameter's shape and label.
    """
    family = _parameters_and_slots(graph)
    updates = _updates(graph)
    computed = {tensor for update in updates for tensor in update.results}

    def extend(update: _Update, members: tuple[int, ...], candidates: tuple[int, ...]) -> None:
        parameters = {family[t] for t in members if t in family}
        if len(parameters) != 1:
            return
        (parameter,) = parameters
        shape = graph.tensors[parameter].shape
        for t in candidates:
            is_alike = update.is_elementwise and graph.tensors[t].shape == shape
            if t in computed and (is_alike or _same_layout(graph, t, parameter)):
                family.setdefault(t, parameter)

    for update in updates:
        extend(update, update.operands, update.results)
    for update in reversed(updates):
        extend(update, update.results, update.operands)
    return family


class _Update(NamedTuple):
    """An instruction of the update, or a result of a conditional behind its branches, with the
    values that they yield."""

    operands: tuple[int, ...]
    results: tuple[int, ...]
    is_elementwise: bool


def _updates(graph: OperatorGraph) -> list[_Update]:
    """The instructions of the update in program order; a conditional comes once per result."""
    conditional_at = {
        loop.body[1]: loop
        for loop in graph.loops
        if graph.instructions[loop.instruction].name in CONDITIONALS
    }
    updates = []
    for i, instruction in enumerate(graph.instructions):
        if i in conditional_at:
            updates += _branch_results(conditional_at[i])
        is_update = instruction.phase == "update" and instruction.trips == 1
        if is_update and instruction.name not in CONDITIONALS:
            is_elementwise = _is_elementwise(instruction)
            updates.append(_Update(instruction.operands, instruction.results, is_elementwise))
    return updates


def _is_elementwise(instruction: Instruction) -> bool:
    """Whether all operands of an instruction have the dims of its result."""
    rule = instruction.rule
    if rule is None or rule.reduction:
        return False
    return all(mapping == rule.results[0] for mapping in (*rule.operands, *rule.results))


def _branch_results(conditional: Loop) -> list[_Update]:
    yielded_for: dict[int, tuple[int, ...]] = defaultdict(tuple)
    for _, result, yielded, _ in conditional.carried:
        yielded_for[result] += (yielded,)
    return [_Update(yielded, (result,), False) for result, yielded in yielded_for.items()]


def _parameters_and_slots(graph: OperatorGraph) -> dict[int, int]:
    parameters = {a.path: a.tensor for a in graph.arguments}
    family = {a.tensor: a.tensor for a in graph.arguments if a.role == "parameter"}
    for argument in graph.arguments:
        if argument.role != "optimizer" or argument.parameter not in parameters:
            continue
        parameter = parameters[argument.parameter]
        if graph.labels[argument.tensor] == graph.labels[parameter]:
            family[argument.tensor] = parameter
    return family


def _same_layout(
    graph: OperatorGraph,
    left: int,
    right: int,
) -> bool:
    """Whether two tensors have equal labels and shapes."""
    if graph.labels[left] != graph.labels[right]:
        return False
    return graph.tensors[left].shape == graph.tensors[right].shape


def layout_of(graph: OperatorGraph, plan: Plan) -> Layout:
    """The layout of a graph under a plan. Plans with equal splits share one, which is cached."""
    return _layout_of(IdentityKey(graph), _Splits(plan))


class _Splits:
    """The part of a plan that decides a layout; equal by content."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        choices = tuple((name, *choice.items()) for name, choice in plan.choices.items())
        self.content = plan.mesh, choices, tuple(plan.storage.items()), tuple(plan.offload)

    def __hash__(self) -> int:
        return hash(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Splits) and self.content == other.content


@lru_cache(maxsize=4)
def _layout_of(key: IdentityKey[OperatorGraph], splits: _Splits) -> Layout:
    graph, plan = key.value, splits.plan
    builder = _LayoutBuilder(graph, plan)
    builder.read_in_updates()
    builder.read_uses()
    builder.read_gathered()
    builder.read_results()
    reads = []
    for needed, readers in builder.reads.items():
        read = Read(*needed, tuple(readers))
        reads += _gathered_again(graph, read) if read.tensor in builder.slices else [read]
    if is_gpu(graph.target):
        reads = _gathered_late(graph, reads, builder.slices)
    host = offloaded(graph, plan)
    return Layout(tuple(builder.shardings), tuple(reads), builder.assignments, host)


def offloaded(graph: OperatorGraph, plan: Plan) -> frozenset[int]:
    """The optimizer slots that a plan offloads, before and after the update."""
    tensors: set[int] = set()
    paths = set(plan.offload)
    for argument in graph.arguments:
        if argument.parameter in paths and argument.result is not None:
            tensors.update((argument.tensor, argument.result))
    return frozenset(tensors)


def layout_over(layout: Layout, mesh: Mesh, part: Mesh) -> Layout:
    """The layout of a mesh on a part of its axes: nothing is split over the others."""
    if part == mesh:
        return layout
    number = {mesh.index[axis.name]: n for n, axis in enumerate(part.axes)}

    def over(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(number[axis] for axis in axes if axis in number)

    def sharding_over(sharding: Sharding) -> Sharding:
        return tuple(over(axes) for axes in sharding)

    reads = tuple(replace(read, target=sharding_over(read.target)) for read in layout.reads)
    assignments = []
    for assignment in layout.assignments:
        assignments.append({factor: over(axes) for factor, axes in assignment.items()})
    return Layout(
        shardings=tuple(sharding_over(sharding) for sharding in layout.shardings),
        reads=reads,
        assignments=tuple(assignments),
    )


class _LayoutBuilder:
    """Collects shardings and reads of one layout."""

    def __init__(self, graph: OperatorGraph, plan: Plan) -> None:
        self.graph = graph
        self.assignments = operator_assignments(graph, plan)
        self.shardings = _label_shardings(graph, self.assignments)
        self.stored = _stored_parameters(graph, plan, self.assignments)
        self.family: Mapping[int, int] = self._families() if self.stored else {}
        self.gathered: dict[int, Sharding] = {}
        """Tensors stored under a storage's sharding -> the sharding that other readers need."""
        self.updates: list[int] = []
        """Instructions that compute values of stored families."""
        self.slices: set[int] = set()
        """Parameters in slices that accelerators gather for each pass, and their conversions."""
        self.reads: dict[tuple[int, int, Sharding], list[Reader]] = defaultdict(list)
        self.labelled: set[Reader] = set()
        """Readers with a target sharding of their own."""
        for use in graph.uses:
            self.labelled.update(use.instructions)
        self._extend_families()
        if is_accelerated(graph):
            self._convert_slices()

    def _families(self) -> Mapping[int, int]:
        """The families of the update, with conversions and additions of their gradients."""
        families = update_families(self.graph)
        if not is_accelerated(self.graph):
            return families
        return {**families, **passed_gradients(self.graph)}

    def _convert_slices(self) -> None:
        """Parameters are converted before they are gathered."""
        parameters = {a.tensor for a in self.graph.arguments if a.role == "parameter"}
        self.slices = parameters & self.gathered.keys()
        for parameter, (index, result) in compute_copies(self.graph).items():
            if parameter in self.slices:
                self.gathered[result] = self.shardings[result]
                self.shardings[result] = self.shardings[parameter]
                self.labelled.add((index, 0))
                self.slices.add(result)

    def _extend_families(self) -> None:
        arguments = {a.tensor: a for a in self.graph.arguments}
        producer = producers(self.graph)
        updates = set()
        for tensor, parameter in self.family.items():
            if parameter not in self.stored:
                continue
            storage, sharding = self.stored[parameter]
            if _is_stored_split(arguments.get(tensor), storage):
                self.gathered[tensor] = self.shardings[tensor]
                self.shardings[tensor] = sharding
            if tensor in producer:
                updates.add(producer[tensor])
        self.updates = sorted(updates)

    def read_in_updates(self) -> None:
        """Operands of updates come under the sharding of the storage."""
        for index in self.updates:
            instruction = self.graph.instructions[index]
            parameter = self._updated_parameter(instruction)
            target = self.stored[parameter][1]
            for position, tensor in enumerate(instruction.operands):
                is_relative = self.family.get(tensor, parameter) == parameter
                if not is_relative or not self._is_aligned(index, position, parameter):
                    continue
                if self.shardings[tensor] != target:
                    key = (tensor, self.graph.home[parameter], target)
                    self.reads[key].append((index, position))
                self.labelled.add((index, position))

    def _is_aligned(self, index: int, position: int, parameter: int) -> bool:
        """Whether an operand of an update has the dims of its parameter.

        A gradient may have labels of another operator, as of one that reads the parameter, too.
        """
        graph, instruction = self.graph, self.graph.instructions[index]
        tensor = instruction.operands[position]
        if _same_layout(graph, tensor, parameter):
            return True
        source = producers(graph).get(tensor, -1)
        is_gradient = tensor in self.family or (
            source >= 0 and graph.instructions[source].phase == "backward"
        )
        has_shape = graph.tensors[tensor].shape == graph.tensors[parameter].shape
        return is_gradient and has_shape and _is_elementwise(instruction)

    def _updated_parameter(self, instruction: Instruction) -> int:
        for tensor in instruction.results:
            if self.family.get(tensor) in self.stored:
                return self.family[tensor]
        raise AssertionError("an update computes a value of a stored family")

    def read_uses(self) -> None:
        """Uses come under the sharding of their own label."""
        updates = set(self.updates)
        for use in self.graph.uses:
            target = label_sharding(use.label, self.assignments[use.operator])
            if target == self.shardings[use.tensor]:
                continue
            readers = [reader for reader in use.instructions if reader[0] not in updates]
            if readers:
                self.reads[use.tensor, use.operator, target] += readers

    def read_gathered(self) -> None:
        """All other readers of stored tensors need them as the operator's choice splits them."""
        if not self.gathered:
            return
        updates = set(self.updates)
        for index, instruction in enumerate(self.graph.instructions):
            if index in updates:
                continue
            for position, tensor in enumerate(instruction.operands):
                if tensor not in self.gathered or (index, position) in self.labelled:
                    continue
                target = self.gathered[tensor]
                if target != self.shardings[tensor]:
                    key = (tensor, self.graph.owner[index], target)
                    self.reads[key].append((index, position))

    def read_results(self) -> None:
        """Results of the step return under the sharding of the argument that they replace."""
        positions = {tensor: position for position, tensor in enumerate(self.graph.outputs)}
        for argument in self.graph.arguments:
            if argument.result is None:
                continue
            target = self.shardings[argument.tensor]
            if self.shardings[argument.result] != target:
                key = (argument.result, self.graph.home[argument.tensor], target)
                self.reads[key].append((-1, positions[argument.result]))


def is_accelerated(graph: OperatorGraph) -> bool:
    """Whether a GPU or TPU runs the step.

    Their compilers gather a stored parameter once for each pass. XLA:CPU merges the gathers.
    """
    return is_accelerator(graph.target)


@per_graph
def compute_copies(graph: OperatorGraph) -> dict[int, tuple[int, int]]:
    """Parameter -> (instruction, result) of its conversion to a smaller dtype, in mixed precision.

    Only if nothing but the update reads the parameter itself.
    """
    parameters = {a.tensor for a in graph.arguments if a.role == "parameter"}
    copies: dict[int, tuple[int, int]] = {}
    others: set[int] = set()
    for index, instruction in enumerate(graph.instructions):
        for tensor in parameters.intersection(instruction.operands):
            result = instruction.results[0]
            if instruction.phase == "update":
                continue
            if _is_copy(graph, instruction, tensor) and tensor not in copies:
                copies[tensor] = (index, result)
            else:
                others.add(tensor)
    return {tensor: copy for tensor, copy in copies.items() if tensor not in others}


def _is_copy(graph: OperatorGraph, instruction: Instruction, parameter: int) -> bool:
    """Whether an instruction converts a parameter to a smaller dtype at its home."""
    if instruction.name != "convert" or instruction.trips != 1:
        return False
    result = instruction.results[0]
    is_smaller = graph.tensors[result].nbytes < graph.tensors[parameter].nbytes
    is_at_home = graph.home[result] == graph.home[parameter]
    return is_smaller and is_at_home and _same_layout(graph, result, parameter)


@per_graph
def passed_gradients(graph: OperatorGraph) -> dict[int, int]:
    """Gradient that conversions and additions make for one update alone -> its parameter."""
    families = update_families(graph)
    producer = producers(graph)
    gradients: dict[int, int] = {}
    waiting = [
        (tensor, families[instruction.results[0]])
        for instruction in graph.instructions
        if instruction.phase == "update" and instruction.results[0] in families
        for tensor in instruction.operands
        if tensor not in families
    ]
    while waiting:
        tensor, parameter = waiting.pop()
        source = graph.instructions[producer[tensor]] if tensor in producer else None
        if source is None or source.name not in ("convert", "add") or source.trips != 1:
            continue
        if graph.tensors[tensor].shape != graph.tensors[parameter].shape:
            continue
        results = {
            graph.instructions[i].results[0] if i >= 0 else -1 for i, _ in readers_of(graph)[tensor]
        }
        if all(parameter in (families.get(t), gradients.get(t)) for t in results):
            gradients[tensor] = parameter
            waiting += [(operand, parameter) for operand in source.operands]
    return gradients


PREFETCHED = 3
"""Products of the backward pass between the start of a gather and its reader, which hide it."""


@per_graph
def gathering_passes(graph: OperatorGraph) -> dict[int, int]:
    """Parameter -> number of passes of a step that gather it from slices, 1 or 2."""
    parameters = {a.tensor for a in graph.arguments if a.role == "parameter"}
    if not is_accelerated(graph):
        return dict.fromkeys(parameters, 1)
    copies = compute_copies(graph)
    passes = {}
    for parameter in parameters:
        gathered = copies[parameter][1] if parameter in copies else parameter
        readers = tuple(
            (i, position)
            for i, position in readers_of(graph).get(gathered, ())
            if i >= 0 and graph.instructions[i].phase != "update"
        )
        passes[parameter] = len(_gathered_again(graph, Read(parameter, -1, (), readers)))
    return passes


def prefetching_product(graph: OperatorGraph, reader: int, phase: str = "backward") -> int:
    """The product of a pass after which the gather for a reader begins, -1 for none."""
    product = reader
    for _ in range(PREFETCHED):
        if product >= 0:
            product = _earlier_products(graph)[phase][product]
    return product


def _gathered_again(graph: OperatorGraph, read: Read) -> list[Read]:
    """A read of a stored parameter, as two where the backward pass gathers it again."""
    backward = [
        (i, position)
        for i, position in read.readers
        if i >= 0 and graph.instructions[i].phase == "backward"
    ]
    others = tuple(reader for reader in read.readers if reader not in backward)
    if not backward or not others:
        return [read]
    product = prefetching_product(graph, min(backward)[0])
    if product < 0:
        return [read]
    again = replace(read, readers=tuple(backward), after=graph.instructions[product].results[0])
    return [replace(read, readers=others), again]


COMBINED_BYTES = 30 << 20
"""Bytes of a combined collective of XLA for accelerators (xla/service/collective_utils.h): gathers
or sums that wait together have as many, at least."""


def _gathered_late(graph: OperatorGraph, reads: list[Read], slices: Set[int]) -> list[Read]:
    """The reads of a step whose gathers of stored parameters wait for products of the forward pass.

    XLA:GPU would gather many at the start of the step, beside no product.
    """
    first = {
        read: min(read.readers)[0]
        for read in reads
        if read.tensor in slices and read.after < 0 and min(read.readers)[0] >= 0
    }
    after: dict[Read, int] = {}
    waited_for, nbytes = -1, COMBINED_BYTES
    for read in sorted(first, key=first.__getitem__):
        product = prefetching_product(graph, first[read], "forward")
        if product < 0:
            continue
        if nbytes >= COMBINED_BYTES:
            waited_for, nbytes = graph.instructions[product].results[0], 0
        nbytes += graph.tensors[read.tensor].nbytes
        after[read] = waited_for
    return [replace(read, after=after.get(read, read.after)) for read in reads]


@per_graph
def _earlier_products(graph: OperatorGraph) -> dict[str, tuple[int, ...]]:
    """Pass -> [instruction]: the last product of it on which the instruction depends, -1 for none.

    Adjacent barriers are one for the compiler: a rematerialized value waits for the gradient behind
    the first of them.
    """
    return {phase: _products_before(graph, phase) for phase in ("forward", "backward")}


def _products_before(graph: OperatorGraph, phase: str) -> tuple[int, ...]:
    producer = producers(graph)
    earlier: list[int] = []
    before = ""
    for index, instruction in enumerate(graph.instructions):
        last = earlier[-1] if before == instruction.name == BARRIER else -1
        before = instruction.name
        for tensor in instruction.operands:
            made_at = producer.get(tensor, index)
            if made_at < index:
                source = graph.instructions[made_at]
                is_product = source.name in HEAVY and source.phase == phase
                is_one = is_product and source.trips == 1
                last = max(last, made_at if is_one else earlier[made_at])
        earlier.append(last)
    return tuple(earlier)


def _label_shardings(graph: OperatorGraph, assignments: tuple[Assignment, ...]) -> list[Sharding]:
    """Per tensor, the sharding of its label."""
    # Few labels occur, and a search asks often: each is resolved once.
    resolved: dict[tuple[int, Label], Sharding] = {}
    shardings = []
    for home, label in zip(graph.home, graph.labels, strict=True):
        if (home, label) not in resolved:
            assignment = assignments[home] if home >= 0 else {}
            resolved[home, label] = label_sharding(label, assignment)
        shardings.append(resolved[home, label])
    return shardings


def _is_stored_split(argument: Argument | None, storage: Storage) -> bool:
    """Whether a member of a stored family has the storage's sharding outside the update too."""
    if argument is None or argument.role == "optimizer":
        return True
    return storage.zero == 3


def _stored_parameters(
    graph: OperatorGraph,
    plan: Plan,
    assignments: tuple[Assignment, ...],
) -> dict[int, tuple[Storage, Sharding]]:
    """Parameter tensor -> its storage, and the sharding of its update."""
    stored = {}
    for argument in graph.arguments:
        storage = plan.storage.get(argument.path)
        home = graph.home[argument.tensor]
        if storage is None or argument.role != "parameter" or home < 0:
            continue
        sharding = list(label_sharding(graph.labels[argument.tensor], assignments[home]))
        sharding[storage.dim] += tuple(plan.mesh.index[axis] for axis in storage.axes)
        stored[argument.tensor] = (storage, tuple(sharding))
    return stored
