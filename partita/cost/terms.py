"""Cost terms of operators before any choice, labelled with factors.

The terms are work, reductions, halos, moves and stored variables. `cost_terms(graph)` runs once. A
choice then only divides: work indexed by factors f, g that are split n_f and n_g ways costs 1/(n_f
n_g) of the whole. So a search over thousands of choices is a few array operations
(`cost.evaluate`), and equal operators, the repeated blocks of a network, share one evaluation
(`OperatorTerms.digest`).

Light instructions are fused as XLA fuses them (`cost.fusion`): a kernel reads the operands that it
does not compute, and writes its result.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

from partita.cost.backends import compiler_of
from partita.cost.collectives import DEFAULT, Exchange, new_exchanges
from partita.cost.fusion import (
    EXPENSIVE,
    FREE,
    Fusion,
    fusion,
    kernel_reads,
    unwritten_products,
)
from partita.cost.joined import NONE_JOINED, joined_kernels
from partita.cost.operator_terms import Halo, Move, OperatorTerms, Reduction, StoredVariable, Work
from partita.cost.partial import (
    Factors,
    Gradient,
    gradients,
    keeps_elements,
    moved_sums,
    reduced_factors,
    summed_leaves,
    waiting_sums,
)
from partita.cost.sums import loop_sums
from partita.cost.work import dense_ratio, group_factors
from partita.graph.flat import (
    EDGE_KERNELS,
    HEAVY,
    LIBRARY_CALLS,
    PRODUCTS,
    Reader,
    readers_of,
    transposes,
)
from partita.graph.operator_graph import (
    ITEMSIZE,
    Instruction,
    Label,
    OperatorGraph,
    Phase,
    Use,
    constant_tensors,
    operand_labels,
    read_labels,
)
from partita.machine import FULL_FLOAT32, Backend
from partita.plans.layout import compute_copies, gathering_passes, is_accelerated, update_families

OP_CLASS = {
    "dot_general": "dot",
    "convolution": "conv",
    "fused_attention": "attention",
    "recurrence": "dot",
    "gather": "gather",
    "scatter": "gather",
    "reduce": "reduce",
    "reduce_window": "reduce",
    "select_and_scatter": "reduce",
    "sort": "sort",
}

FEWEST_FLOPS = 64
FEWEST_BYTES = 256
"""A light kernel below both is left out."""
SMALLEST_ACTIVATION = 64
"""Bytes: smaller values that the backward pass reads are left out."""


@dataclass
class Terms:
    """The terms of every operator, and the moves between different operators."""

    operators: list[OperatorTerms]
    edges: list[Move]


def cost_terms(graph: OperatorGraph, backend: Backend = DEFAULT) -> Terms:
    """The cost terms of a graph, compiled as a backend does."""
    collector = _Collector(graph, backend)
    collector.add_work()
    collector.add_gradient_sums()
    collector.add_reductions_and_halos()
    collector.add_moves()
    collector.add_variables()
    collector.add_activations()
    terms = collector.terms
    for number, operator in enumerate(graph.operators):
        own_terms = terms.operators[number]
        own_terms.factors = operator.factors
        own_terms.name = operator.name
        key = repr(own_terms.key(graph, number))
        own_terms.digest = sha256(key.encode()).hexdigest()[:16]
    return terms


KINDS = {
    "reduce_window": "pooling",
    "select_and_scatter": "gradient of pooling",
    "scatter": "scatter",
    "dynamic_update_slice": "scatter",
    "transpose": "transpose",
    "concatenate": "concatenate",
}
"""Root of a kernel -> its kind for a fit, where that is not its class."""
TRANSCENDENTAL = EXPENSIVE - {"divide", "remainder", "reduce", "gather"}


def kind_of(
    graph: OperatorGraph,
    root: Instruction,
    members: Sequence[int],
) -> str:
    """The kind of a kernel for a fit, its class or finer: libraries have a loop for each kind."""
    if root.name == "convolution":
        if transposes(root):
            return "convolution for a kernel"
        is_dilated = any(window.base > 1 for _, window in root.windows)
        return "dilated convolution" if is_dilated else "conv"
    kind = KINDS.get(root.name) or OP_CLASS.get(root.name, "elementwise")
    names = {graph.instructions[i].name for i in members}
    if kind == "elementwise" and not names.isdisjoint(TRANSCENDENTAL):
        return "transcendental"
    return kind


def _split(label: Label) -> Factors:
    """The factors of a label."""
    return tuple(factor for factor in label if factor >= 0)


class _Collector:
    """Adds the terms of a graph, kind by kind, to their operators."""

    def __init__(self, graph: OperatorGraph, backend: Backend) -> None:
        self.graph = graph
        self.compiler = compiler_of(backend)
        self.fills_gradients = self.compiler.buffers.filled_gradients
        self.terms = Terms([OperatorTerms() for _ in graph.operators], [])
        rules = self.compiler.fusion_rules
        self.fused = fusion(graph, rules)
        self.unwritten: frozenset[int] = frozenset()
        """Results of products whose readers these compute."""
        if rules.writes_after_products:
            self.unwritten = unwritten_products(graph, self.fused)
        self.constants = constant_tensors(graph)
        self.read = {t for instruction in graph.instructions for t in instruction.operands}
        self.variables = {a.tensor for a in graph.arguments if a.role != "batch"}
        self.frozen = {a.tensor for a in graph.arguments if a.result == a.tensor}
        self.families = update_families(graph)
        """Tensor of an update -> its parameter."""
        self.parameter_of = _gradient_parameters(graph, self.families)
        """Gradient -> its parameter."""
        self.moved_sums = moved_sums(graph) if self.compiler.joins_collectives else {}
        self.exchanged: set[tuple[int, Exchange]] = set()
        """Exchanges that have a term, with their tensors."""

    def _is_constant(self, instruction: Instruction) -> bool:
        """Whether an instruction depends on no argument."""
        return all(tensor in self.constants for tensor in instruction.results)

    # ---- work

    def add_work(self) -> None:
        """Adds every kernel, in parts if it is fused across operators."""
        joined = NONE_JOINED
        if self.compiler.joins_kernels:
            joined = joined_kernels(self.graph, self.fused)
        for root, kernel in self.fused.kernels.items():
            instruction = self.graph.instructions[root]
            if root in joined.biases or instruction.name in (
                "while",
                "case",
                "if",
                "optimization_barrier",
                *FREE,
            ):
                continue
            if self._is_constant(instruction):
                continue
            outside = {
                tensor: readers
                for tensor, readers in kernel_reads(self.graph, self.fused)[root].items()
                if (root, tensor) not in joined.saved and tensor not in self.unwritten
            }
            for operator, members in self._members_by_operator(root, kernel).items():
                is_part = root in joined.parts or root not in members
                launches = not (is_part and self.compiler.joins_kernels)
                self._add_kernel(root, operator, members, outside, launches)

    def _members_by_operator(self, root: int, kernel: Sequence[int]) -> dict[int, list[int]]:
        """Operator -> its instructions in a kernel.

        Instructions that depend on no argument, for a mask say, belong to the root's operator:
        every device computes the part that its readers need.
        """
        members: dict[int, list[int]] = defaultdict(list)
        for i in kernel:
            source = root if self._is_constant(self.graph.instructions[i]) else i
            operator = self.graph.owner[source]
            if operator >= 0:
                members[operator].append(i)
        return members

    def _add_kernel(
        self,
        root: int,
        operator: int,
        members: list[int],
        outside: dict[int, list[Reader]],
        launches: bool,
    ) -> None:
        """Adds an operator's part of a kernel. `outside` are the kernel's reads from memory."""
        graph = self.graph
        instruction = graph.instructions[root]
        traffic = self._traffic(root, members, outside)
        bytes_by_factors: dict[Factors, int] = defaultdict(int)
        for nbytes, factors in traffic.values():
            bytes_by_factors[factors] += nbytes
        flops = 0.0
        flops_by_space: dict[Factors, float] = {}
        groups: Factors = ()
        for i in members:
            member = graph.instructions[i]
            labels = [
                *operand_labels(graph, i),
                *(graph.labels[tensor] for tensor in member.results),
            ]
            member_flops = member.flops
            if self.fills_gradients:
                member_flops *= dense_ratio(member)
            if member_flops:
                flops += member_flops
                if not self._is_constant(member):
                    space = tuple(dict.fromkeys(f for label in labels for f in label if f >= 0))
                    flops_by_space[space] = flops_by_space.get(space, 0.0) + member_flops
            if member.batch_groups > 1:
                groups = group_factors(labels)
        is_small = flops < FEWEST_FLOPS and sum(bytes_by_factors.values()) < FEWEST_BYTES
        if is_small and instruction.name not in HEAVY:
            return
        if flops_by_space:
            space = max(flops_by_space, key=lambda factors: flops_by_space[factors])
        else:
            space = max(bytes_by_factors, key=len, default=())
        largest_result = max(instruction.results, key=lambda tensor: graph.tensors[tensor].nbytes)
        work = Work(
            OP_CLASS.get(instruction.name, "elementwise"),
            self._dtype(instruction, largest_result),
            flops,
            space,
            tuple(sorted((nbytes, factors) for factors, nbytes in bytes_by_factors.items())),
            instruction.trips,
            instruction.phase,
            kind_of(graph, instruction, members),
            instruction.batch_groups,
            groups,
            _bytes_of(traffic, self.variables),
            _bytes_of(traffic, self.frozen),
            _bytes_of(traffic, instruction.results if root in members else ()),
            launches,
        )
        self.terms.operators[operator].work.append(work)

    def _dtype(self, instruction: Instruction, result: int) -> str:
        """The dtype that a kernel computes in: of its result, of a product its widest operand."""
        dtype = self.graph.tensors[result].dtype
        if instruction.name in PRODUCTS and is_accelerated(self.graph):
            operands = [self.graph.tensors[tensor] for tensor in instruction.operands[:2]]
            dtype = max(operands, key=lambda tensor: ITEMSIZE.get(tensor.dtype, 4)).dtype
        if dtype == "float32" and instruction.full_precision:
            return FULL_FLOAT32
        return dtype

    def _traffic(
        self,
        root: int,
        members: list[int],
        outside: dict[int, list[Reader]],
    ) -> dict[int, tuple[int, Factors]]:
        """Tensor -> bytes of it that instructions of a kernel move, and the factors that index it.

        The kernel reads some from memory and writes its result.
        """
        graph = self.graph
        traffic: dict[int, tuple[int, Factors]] = {}
        for i in members:
            instruction = graph.instructions[i]
            labels = operand_labels(graph, i)
            for position, tensor in enumerate(instruction.operands):
                is_read = (i, position) in outside.get(tensor, ())
                if is_read and graph.tensors[tensor].shape:
                    nbytes = self._bytes_read(instruction, tensor)
                    traffic[tensor] = (nbytes, _split(labels[position]))
            if i == root:
                for tensor in self._written(instruction):
                    traffic[tensor] = (graph.tensors[tensor].nbytes, _split(graph.labels[tensor]))
        if root in members and graph.instructions[root].name == "select_and_scatter":
            self._add_positions(root, traffic)
        return traffic

    def _add_positions(self, root: int, traffic: dict[int, tuple[int, Factors]]) -> None:
        """Adds what the gradient of pooling by maximum moves besides its operands and its result.

        XLA:GPU makes three kernels of it (SelectAndScatterExpander). One writes zeros. One writes
        the maxima and an index per dim for each. One reads the indices, and for each of them reads
        and writes the element to which it adds a gradient.
        """
        if not self.compiler.buffers.late_positions:
            return
        source = self.graph.instructions[root].operands[1]
        maxima = self.graph.tensors[source]
        indices = len(maxima.shape) * ITEMSIZE["int32"] * maxima.size
        read, _ = traffic.get(source, (0, ()))
        factors = _split(operand_labels(self.graph, root)[1])
        traffic[source] = read + 3 * maxima.nbytes + 2 * indices, factors

    def _written(self, instruction: Instruction) -> list[int]:
        """The results of a kernel without scratch memory, which nothing reads."""
        if len(instruction.results) == 1:
            return [tensor for tensor in instruction.results if tensor not in self.unwritten]
        return [tensor for tensor in instruction.results if tensor in self.read]

    def _bytes_read(self, instruction: Instruction, operand: int) -> int:
        """Bytes of an operand that an instruction reads, without those that it leaves out."""
        nbytes = self.graph.tensors[operand].nbytes
        if instruction.name in EDGE_KERNELS:
            return self._bytes_read_by_edges(instruction, operand)
        if instruction.name in ("gather", "dynamic_slice", "slice"):
            result_bytes = sum(self.graph.tensors[tensor].nbytes for tensor in instruction.results)
            return min(nbytes, 2 * result_bytes)
        return nbytes

    def _bytes_read_by_edges(self, instruction: Instruction, operand: int) -> int:
        """Bytes of an operand that a kernel over edges reads: for some a row for every edge."""
        tensor = self.graph.tensors[operand]
        positions = EDGE_KERNELS[instruction.name]
        is_by_edge = any(instruction.operands[position] == operand for position in positions)
        if not is_by_edge or not tensor.size:
            return tensor.nbytes
        ids = self.graph.tensors[instruction.operands[2]]
        rows = math.prod(tensor.shape[: len(ids.shape)])
        return max(tensor.nbytes, ids.size * tensor.nbytes // rows)

    # ---- reductions and halos

    def add_gradient_sums(self) -> None:
        """Adds the all-reduces of gradients that devices add up first."""
        for gradient in gradients(self.graph):
            reduction = Reduction(
                "all_reduce",
                self.graph.tensors[gradient.result].nbytes,
                _split(self.graph.labels[gradient.result]),
                gradient.reduced,
                1,
                "backward",
                self.parameter_of.get(gradient.result, -1),
                together=True,
                waiting_nbytes=self._waiting_nbytes(gradient.result),
            )
            self.terms.operators[gradient.operator].reductions.append(reduction)

    def _waiting_nbytes(self, tensor: int) -> int:
        """Bytes of the gradient in which the sum of a tensor waits for the last microbatch, or its
        share of them if several sums meet there; 0 if it does not wait.
        """
        gradient = waiting_sums(self.graph).get(tensor, -1)
        if gradient < 0:
            return 0
        nbytes = self.graph.tensors[gradient].nbytes
        summands = summed_leaves(self.graph, gradient)
        return nbytes // len(summands) if tensor in summands else nbytes

    def add_reductions_and_halos(self) -> None:
        """Adds the communication of every instruction."""
        partial_sums = {tensor for g in gradients(self.graph) for tensor in g.leaves}
        partial_sums |= self.moved_sums.keys()
        for i, instruction in enumerate(self.graph.instructions):
            operator = self.graph.owner[i]
            if operator < 0 or instruction.rule is None or self._is_constant(instruction):
                continue
            labels = operand_labels(self.graph, i)
            reduced = reduced_factors(instruction, labels)
            if reduced and partial_sums.isdisjoint(instruction.results):
                self._add_reductions(operator, instruction, reduced)
            self._add_halos(operator, i)

    def _add_reductions(
        self,
        operator: int,
        instruction: Instruction,
        reduced: Factors,
    ) -> None:
        is_sum = len(instruction.results) == 1 or instruction.name in LIBRARY_CALLS
        kind = "all_reduce" if is_sum else "all_gather"
        after_loop = loop_sums(self.graph) if self.compiler.leaves_loops else {}
        for result in instruction.results:
            summed = tuple(f for f in reduced if f not in self.graph.labels[result])
            if not summed:
                # Of the results of fused attention, only the gradient of a bias is a sum.
                continue
            if is_sum and result not in readers_of(self.graph):
                # The work space of a kernel is a result that nothing reads.
                continue
            tensor = result
            trips = instruction.trips
            if result in after_loop:
                tensor = after_loop[result].tensor
                trips //= after_loop[result].trips
            value = self.graph.tensors[tensor]
            nbytes = value.nbytes
            if kind == "all_reduce":
                nbytes = min(nbytes, value.size * self.compiler.sum_itemsize(self.graph, tensor))
            reduction = Reduction(
                kind,
                nbytes,
                _split(self.graph.labels[tensor]),
                summed,
                trips,
                instruction.phase,
                self.parameter_of.get(tensor, -1),
                together=kind == "all_reduce" and self.compiler.folds(instruction),
                waiting_nbytes=self._waiting_nbytes(result),
            )
            self.terms.operators[operator].reductions.append(reduction)

    def _add_halos(
        self,
        operator: int,
        number: int,
    ) -> None:
        instruction = self.graph.instructions[number]
        for exchange in new_exchanges(self.graph, number, self.compiler, self.exchanged):
            operand = instruction.operands[exchange.operand]
            reader = (number, exchange.operand)
            nbytes = self.compiler.moved_bytes(self.graph, operand, [reader])
            rows = self.graph.tensors[operand].shape[exchange.dim]
            halo = Halo(
                nbytes // rows,
                rows,
                tuple(factor for factor in _split(exchange.label) if factor != exchange.factor),
                exchange.factor,
                exchange.window,
                instruction.trips,
                instruction.phase,
            )
            self.terms.operators[operator].halos.append(halo)

    # ---- moves

    def add_moves(self) -> None:
        """Adds every read under another label than the tensor's."""
        batch = {a.tensor for a in self.graph.arguments if a.role == "batch"}
        added: set[tuple[int, int]] = set()
        for gradient in gradients(self.graph):
            added.update((tensor, gradient.operator) for tensor in gradient.leaves)
            self._add_gradient_moves(gradient)
        origins = _origins(self.graph)
        shared = self._shared_reads()
        for use in self.graph.uses:
            is_free = use.tensor in self.constants or use.tensor in batch
            if (use.tensor, use.operator) in added or is_free or self.graph.home[use.tensor] < 0:
                continue
            move = self._move(use, *origins.get(use.tensor, (1, "forward")))
            if use.tensor in self.moved_sums:
                move = self._with_sum(move)
            elif use in shared:
                move = replace(move, joined=use.tensor, share=shared[use])
            self._add_move(move)

    def _with_sum(self, move: Move) -> Move:
        """The move of a value that is a partial sum where it is computed."""
        total = self.moved_sums[move.tensor]
        none = (-1,) * len(total.reduced)
        return replace(
            move,
            nbytes=self.graph.tensors[move.tensor].nbytes,
            source=(*move.source, *total.reduced),
            target=(*move.target, *none),
            sums=len(total.reduced),
            scatters=self.compiler.scatters,
            joined=total.joined,
            share=total.share,
        )

    def _shared_reads(self) -> dict[Use, int]:
        """Use -> number of products that read its tensor alike (query, key and value), if several.

        The tensor is resharded once for all of them.
        """
        if not self.compiler.joins_collectives:
            return {}
        graph = self.graph
        alike: dict[tuple[object, ...], list[Use]] = defaultdict(list)
        for use in graph.uses:
            is_product = graph.operators[use.operator].kind == "dot"
            if not is_product or use.operator == graph.home[use.tensor]:
                continue
            factors = [graph.factors[factor] for factor in use.label if factor >= 0]
            dims = tuple((factor.kind, factor.size) for factor in factors)
            alike[use.tensor, dims].append(use)
        shared = {}
        for uses in alike.values():
            operators = {use.operator for use in uses}
            if 1 < len(operators) == len(uses):
                shared.update(dict.fromkeys(uses, len(uses)))
        return shared

    def _add_move(self, move: Move) -> None:
        if move.home == move.reader:
            self.terms.operators[move.home].moves.append(move)
        else:
            self.terms.edges.append(move)

    def _move(
        self,
        use: Use,
        trips: int,
        phase: Phase,
    ) -> Move:
        """The move of a read. `trips` and `phase` are those of the tensor's producer."""
        first_reader = min(i for i, _ in use.instructions)
        return Move(
            use.tensor,
            self.compiler.moved_bytes(self.graph, use.tensor, use.instructions),
            self.graph.home[use.tensor],
            self.graph.labels[use.tensor],
            use.operator,
            use.label,
            trips,
            phase,
            self.graph.instructions[first_reader].phase,
        )

    def _add_gradient_moves(self, gradient: Gradient) -> None:
        """Adds the moves of partial sums to the operator that adds them up.

        The operator's own partial sums do not move where they are split alike, and partial over the
        same factors.
        """
        labels = read_labels(self.graph)
        read_of = {
            tensor: (i, position)
            for i in gradient.additions
            for position, tensor in enumerate(self.graph.instructions[i].operands)
        }
        for tensor, reduced in gradient.leaves.items():
            home = self.graph.home[tensor]
            source = self.graph.labels[tensor]
            target = labels.get(read_of[tensor], source)
            is_own = home == gradient.operator
            if is_own and source == target and reduced == gradient.reduced:
                continue
            sums = max(len(reduced), len(gradient.reduced))
            move = Move(
                tensor,
                self.graph.tensors[tensor].nbytes,
                home,
                (*source, *_padded(reduced, sums)),
                gradient.operator,
                (*target, *_padded(gradient.reduced, sums)),
                1,
                "backward",
                "backward",
                sums,
            )
            self._add_move(move)

    # ---- memory

    def add_variables(self) -> None:
        """Adds parameters with their slots, and the bytes of all other arguments."""
        graph = self.graph
        slots: dict[int, int] = defaultdict(int)
        for argument in graph.arguments:
            if argument.role == "optimizer" and argument.tensor in self.families:
                parameter = self.families[argument.tensor]
                slots[parameter] += graph.tensors[argument.tensor].nbytes
        for argument in graph.arguments:
            home = graph.home[argument.tensor]
            tensor = graph.tensors[argument.tensor]
            label = graph.labels[argument.tensor]
            if home < 0 or not tensor.shape:
                continue
            if argument.role == "parameter":
                slot_bytes = slots[argument.tensor]
                variable = StoredVariable(
                    argument.path,
                    argument.tensor,
                    tensor.shape,
                    label,
                    tensor.nbytes,
                    slot_bytes,
                    3 * tensor.nbytes + 2 * slot_bytes,
                    self._gathered_bytes(argument.tensor),
                    self._added_bytes(argument.tensor),
                    gathering_passes(graph)[argument.tensor],
                )
                self.terms.operators[home].stored.append(variable)
            elif argument.tensor not in self.families:
                self.terms.operators[home].resident.append((tensor.nbytes, _split(label)))

    def _added_bytes(self, parameter: int) -> int:
        """Bytes that adding the gradient of a microbatch to the sum of all reads and writes.

        An addition reads the gradient, in the dtype in which it was computed, and the sum, and
        writes the sum. A product that adds its result to the sum only reads the sum as well.
        """
        sum_bytes = self.graph.tensors[parameter].nbytes
        source = self.gradient_sources.get(parameter, -1)
        if source < 0:
            return 3 * sum_bytes
        if source in self.added_products:
            return sum_bytes
        return self.graph.tensors[source].nbytes + 2 * sum_bytes

    @cached_property
    def gradient_sources(self) -> dict[int, int]:
        """Parameter -> its gradient, before changes of shape and dtype."""
        sources = {}
        for i in self.graph.instructions:
            for tensor in i.results:
                parameter = self.parameter_of.get(tensor, -1)
                if parameter >= 0 and not keeps_elements(self.graph, i):
                    sources[parameter] = tensor
        return sources

    @cached_property
    def added_products(self) -> set[int]:
        """Gradients that their product adds to another value of the same dtype.

        Products of one operand are merged: each adds a slice of the result.
        """
        if not self.compiler.fusion_rules.adds_in_products:
            return set()
        sources = set(self.gradient_sources.values())
        products = []
        for i in self.graph.instructions:
            if i.name == "dot_general" and i.results[0] in sources:
                products.append(i)
        readers: Counter[int] = Counter()
        for product in products:
            readers.update(set(product.operands))
        tensors = self.graph.tensors
        added = set()
        for product in products:
            (result,) = product.results
            has_dtype = tensors[result].dtype == tensors[self.parameter_of[result]].dtype
            if has_dtype and all(readers[operand] == 1 for operand in product.operands):
                added.add(result)
        return added

    def _gathered_bytes(self, parameter: int) -> int:
        """Bytes of a parameter when it is gathered for readers other than its update."""
        if is_accelerated(self.graph) and parameter in compute_copies(self.graph):
            return self.graph.tensors[compute_copies(self.graph)[parameter][1]].nbytes
        readers = [
            (i, position)
            for i, position in readers_of(self.graph).get(parameter, ())
            if i >= 0 and self.graph.instructions[i].phase != "update"
        ]
        return self.compiler.moved_bytes(self.graph, parameter, readers)

    def add_activations(self) -> None:
        """Adds the forward values that the backward pass reads to their operators."""
        graph = self.graph
        for tensor in _forward_activations(graph, self.fused):
            activation = (graph.tensors[tensor].nbytes, _split(graph.labels[tensor]))
            self.terms.operators[graph.home[tensor]].activations.append(activation)


def forward_activations(graph: OperatorGraph, backend: Backend) -> list[int]:
    """The forward values of operators that kernels of the backward pass read from memory."""
    return _forward_activations(graph, fusion(graph, compiler_of(backend).fusion_rules))


def _forward_activations(graph: OperatorGraph, fused: Fusion) -> list[int]:
    read_later: set[int] = set()
    for root, read in kernel_reads(graph, fused).items():
        if graph.instructions[root].phase == "backward":
            read_later.update(read)
    in_memory = (fused.written(graph) & read_later) - constant_tensors(graph)
    tensors = []
    for instruction in graph.instructions:
        if instruction.phase != "forward" or instruction.name in FREE:
            continue
        for tensor in instruction.results:
            is_large = graph.tensors[tensor].nbytes > SMALLEST_ACTIVATION
            if tensor in in_memory and is_large and graph.home[tensor] >= 0:
                tensors.append(tensor)
    return tensors


def _bytes_of(traffic: Mapping[int, tuple[int, Factors]], tensors: Collection[int]) -> int:
    """Bytes of some tensors in a kernel's traffic."""
    return sum(nbytes for tensor, (nbytes, _) in traffic.items() if tensor in tensors)


def _padded(factors: Factors, length: int) -> Factors:
    return (*factors, *[-1] * (length - len(factors)))


def _origins(graph: OperatorGraph) -> dict[int, tuple[int, Phase]]:
    """Tensor of an instruction or a loop -> how often and in which phase it is computed."""
    origins: dict[int, tuple[int, Phase]] = {}
    for loop in graph.loops:
        for _, inside, _, _ in loop.carried:
            origins[inside] = (loop.trips, "forward")
    for instruction in graph.instructions:
        for tensor in instruction.results:
            origins[tensor] = (instruction.trips, instruction.phase)
    return origins


def _gradient_parameters(graph: OperatorGraph, families: dict[int, int]) -> dict[int, int]:
    """Backward tensor -> the parameter whose update reads it.

    The tensors are followed back through changes of shape.
    """
    producer = {tensor: x for x in graph.instructions for tensor in x.results}
    parameters: dict[int, int] = {}
    for update in graph.instructions:
        if update.phase != "update":
            continue
        roots = {families[tensor] for tensor in update.results if tensor in families}
        if len(roots) != 1:
            continue
        parameter = roots.pop()
        for operand in update.operands:
            tensor = operand
            while _is_gradient(graph, tensor, producer, families):
                parameters[tensor] = parameter
                if not keeps_elements(graph, producer[tensor]):
                    break
                tensor = producer[tensor].operands[0]
    return parameters


def _is_gradient(
    graph: OperatorGraph,
    tensor: int,
    producer: dict[int, Instruction],
    families: dict[int, int],
) -> bool:
    """Whether a tensor is an array of the backward pass."""
    if tensor not in producer or tensor in families:
        return False
    return producer[tensor].phase == "backward" and bool(graph.tensors[tensor].shape)
