"""A step cut into pieces: programs of one place and one phase, with the tensors between them.

A place is a pipeline stage, or the devices of operators that a plan pins to the same slices. The
cut needs no marks in the model. A statement runs where its operator is placed and when its class
says (`plans.phases`). A piece takes a statement unless two pieces would then wait for each other;
in that case a new piece begins. A pipeline has one piece per stage and phase; without
stages, both passes of a microbatch may be one piece (`is_whole_pass`). Clipping by the
global norm gets one more: the update of all stages but the last needs a norm of all.

Rematerialized forward statements are copied into the backward piece. As pieces are programs of
their own, XLA cannot merge the copies with the originals; for a GPU or TPU, `execute.late_copies`
keeps it from computing them early.

Not here: the text of a piece (`execute.piece_text`), devices and order (`execute.staged`),
memory (`simulation.stage_memory`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from partita.graph.rematerialize import compared_extremes
from partita.plans.borders import least_crossing
from partita.plans.phases import LIGHT, Class, DataFlow
from partita.plans.pipeline import (
    Place,
    is_pipeline,
    is_whole_pass,
    operator_places,
    rematerialized_runs,
)
from partita.plans.plan import Plan

PiecePhase = Literal["forward", "backward", "update"]


@dataclass(frozen=True)
class Piece:
    """The part of a step that one place runs in one go."""

    place: int
    phase: PiecePhase
    statements: tuple[int, ...]
    """In program order, copied ones included."""
    reads: tuple[int, ...]
    """Tensors that come from outside, its arguments in order."""
    gives: tuple[int, ...]
    """Tensors that other pieces read or the step returns, its results in order."""
    after: frozenset[int]
    """Pieces that it waits for, transitively."""

    @property
    def is_repeated(self) -> bool:
        """Whether it runs for every microbatch."""
        return self.phase != "update"


@dataclass(frozen=True)
class Cut:
    """A step as pieces."""

    flow: DataFlow
    places: tuple[Place, ...]
    pieces: tuple[Piece, ...]
    homes: dict[int, int]
    """Argument that is not of the batch -> the place that stores it."""
    runs: tuple[int, ...] = ()
    """[statement]: its rematerialized run, -1 for none."""

    @cached_property
    def argument_of(self) -> dict[int, int]:
        """Result -> the argument that it replaces, for state that changes."""
        return {
            a.result: a.tensor
            for a in self.flow.graph.arguments
            if a.result is not None and a.result not in self.flow.roles
        }

    @cached_property
    def carried(self) -> dict[int, int]:
        """Result of a repeated piece -> the argument that it replaces."""
        maker = self.maker()
        return {
            t: argument
            for t, argument in self.argument_of.items()
            if t in maker and self.pieces[maker[t]].is_repeated
        }

    @cached_property
    def summed(self) -> frozenset[int]:
        """Values of repeated pieces that the update reads, and that differ between microbatches:
        it reads their sums.
        """
        maker = self.maker()
        varying = self.flow.of_batch | self.flow.dependent(list(self.carried.values()))
        read = {t for piece in self.pieces if not piece.is_repeated for t in piece.reads}
        summed = set()
        for t in (read & varying & maker.keys()) - self.carried.keys():
            if self.pieces[maker[t]].is_repeated:
                summed.add(t)
        return frozenset(summed)

    def maker(self) -> dict[int, int]:
        """Tensor -> the piece that gives it."""
        return {t: n for n, piece in enumerate(self.pieces) for t in piece.gives}

    def readers(self) -> dict[int, list[int]]:
        """Tensor -> the pieces that read it."""
        readers: dict[int, list[int]] = defaultdict(list)
        for n, piece in enumerate(self.pieces):
            for t in piece.reads:
                readers[t].append(n)
        return readers

    def in_order(self) -> list[int]:
        """The pieces, each after those that it waits for."""
        numbers = range(len(self.pieces))
        return sorted(numbers, key=lambda n: (len(self.pieces[n].after), n))


def cut(flow: DataFlow, plan: Plan, nbytes: Sequence[int]) -> Cut:
    """The pieces of a step under a plan for its graph.

    `nbytes`: per tensor the bytes of a device for one microbatch.
    PlanError if the plan's microbatches cannot run in pieces.
    """
    places, place_of_operator = operator_places(flow.graph, plan)
    cutter = _Cutter(flow, plan, place_of_operator, nbytes)
    cutter.place_statements()
    cutter.assign_statements()
    pieces = cutter.pieces()
    return check(Cut(flow, tuple(places), tuple(pieces), cutter.homes, tuple(cutter.runs)))


def check(cut: Cut) -> Cut:
    """The cut, after a check of what execution relies on: every tensor that a piece reads is an
    argument or given by a piece that it waits for; every result of the step is given once; no
    piece waits for itself.
    """
    maker = cut.maker()
    given = [t for piece in cut.pieces for t in piece.gives]
    assert len(given) == len(set(given)), "a tensor is given twice"
    for n, piece in enumerate(cut.pieces):
        assert n not in piece.after, "a piece waits for itself"
        for t in piece.reads:
            assert t in cut.flow.roles or maker[t] in piece.after, "a tensor is read before"
    for t in cut.flow.graph.outputs:
        assert t in cut.flow.roles or t in maker, "a result is not computed"
    return cut


@dataclass
class _Draft:
    """A piece that takes statements."""

    place: int
    phase: PiecePhase
    statements: list[int] = field(default_factory=list)
    after: set[int] = field(default_factory=set)


class _Cutter:
    def __init__(
        self,
        flow: DataFlow,
        plan: Plan,
        place_of_operator: Sequence[int],
        nbytes: Sequence[int],
    ) -> None:
        self.flow = flow
        self.nbytes = nbytes
        self.microbatches = plan.microbatches
        self.outputs = frozenset(flow.graph.outputs)
        self.is_pipeline = is_pipeline(plan)
        self.place_of_operator = place_of_operator
        self.run_of = rematerialized_runs(flow.graph, plan)
        comparisons = compared_extremes(flow.graph)
        numbers = {one.instruction: k for k, one in enumerate(flow.statements)}
        self.compared = {numbers[i]: t for i, t in comparisons.items() if i in numbers}
        """Statement of a comparison -> the maxima that it reads, with the tensors between."""
        self.is_whole = is_whole_pass(plan)
        """Whether both passes of a microbatch are one piece."""
        self.classes: list[Class] = list(flow.classes)
        self.place: list[int] = []
        """[statement]: its place."""
        self.homes: dict[int, int] = {}
        self.drafts: list[_Draft] = []
        self.made_by: dict[int, int] = {}
        """Tensor -> draft."""

    # ------------------------------------------------------------------------------------- places

    def place_statements(self) -> None:
        """Gives every statement a place: its operator's, else that of its operands, else that of
        its readers.
        """
        flow = self.flow
        owners = [flow.owner(k) for k in range(len(flow.statements))]
        self.place = [self.place_of_operator[o] if o >= 0 else -1 for o in owners]
        while -1 in self.place:
            before = list(self.place)
            self._place_argument_readers()
            for k in range(len(self.place)):
                if self.place[k] < 0:
                    self.place[k] = max(self._places_before(k), default=-1)
            for k in reversed(range(len(self.place))):
                if self.place[k] < 0:
                    self.place[k] = max(self._places_after(k), default=-1)
            if self.place == before:
                last = max(self.place_of_operator, default=0)
                self.place = [last if place < 0 else place for place in self.place]
        self._place_argument_readers()
        self._place_own_updates()
        if self.is_pipeline:
            self._move_over_borders()
        self._sum_once_per_step()

    def _move_over_borders(self) -> None:
        """Moves light statements over the borders of stages so that fewest bytes cross, and
        variables that only they read with them, and then gradients of these variables.
        """
        if self._move_statements_over_borders():
            self._move_statements_over_borders()

    def _move_statements_over_borders(self) -> bool:
        """Whether variables moved with the statements."""
        places = least_crossing(self.flow, self.classes, self.place, self.nbytes, self.microbatches)
        if places == self.place:
            return False
        self.place = places
        read_at: dict[int, set[int]] = defaultdict(set)
        for k, statement_class in enumerate(self.classes):
            if statement_class in ("forward", "backward"):
                for t in self.flow.inputs[k]:
                    if self.flow.roles.get(t) == "parameter":
                        read_at[t].add(places[k])
        moved = {
            t: stages.pop()
            for t, stages in read_at.items()
            if len(stages) == 1 and stages != {self.homes[t]}
        }
        self._move_updates(moved)
        self._place_argument_readers()
        return bool(moved)

    def _move_updates(self, moved: Mapping[int, int]) -> None:
        """Moves the updates of variables and of their optimizer slots.

        `moved`: variable -> its new place. An instruction whose results only moved updates of one
        place read goes there too.
        """
        flow = self.flow
        arguments = flow.graph.arguments
        path_place = {a.path: moved[a.tensor] for a in arguments if a.tensor in moved}
        target: dict[int | None, int] = {}
        """New value of a variable or slot -> its place."""
        for argument in arguments:
            place = path_place.get(argument.parameter or argument.path)
            if place is not None:
                target[argument.result] = place
        to: dict[int, int] = {}
        """Moved statement -> its place."""
        for k in reversed(range(len(flow.statements))) if moved else ():
            if self.classes[k] != "update":
                continue
            makes = flow.statements[k].makes
            places = {to.get(r, -1) for t in makes for r in flow.readers.get(t, ())}
            places |= {target.get(t, -1) for t in makes if t in self.outputs}
            if len(places) == 1 and -1 not in places:
                to[k] = places.pop()
        for k, place in to.items():
            self.place[k] = place

    def _place_own_updates(self) -> None:
        """Puts the next value of state that depends on nothing else (a seed) where it is read."""
        flow = self.flow
        for argument in flow.graph.arguments:
            k = flow.producer.get(-1 if argument.result is None else argument.result)
            if argument.role != "state" or k is None:
                continue
            if flow.inputs[k] != (argument.tensor,):
                continue
            readers = [r for r in flow.readers[argument.tensor] if self.classes[r] != "copied"]
            places = {self.place[r] for r in readers if r != k}
            if len(places) == 1:
                self.place[k] = places.pop()

    def _place_argument_readers(self) -> None:
        """Homes of arguments: the place of their operator, else of their first reader."""
        flow = self.flow
        for argument in flow.graph.arguments:
            t = argument.tensor
            operator = flow.graph.home[t]
            readers = [k for k in flow.readers.get(t, ()) if self.classes[k] != "copied"]
            places = [self.place[k] for k in readers if self.place[k] >= 0]
            if argument.role == "batch":
                continue
            if operator >= 0:
                self.homes[t] = self.place_of_operator[operator]
            else:
                self.homes[t] = places[0] if places else 0

    def _places_before(self, statement: int) -> list[int]:
        """Places of the values that a statement reads."""
        flow = self.flow
        places = []
        for t in flow.statements[statement].reads:
            k = flow.producer.get(t)
            if k is None and flow.graph.tensors[t].shape:
                places.append(self.homes.get(t, -1))
            elif k is not None and self.classes[k] != "copied":
                places.append(self.place[k])
        return places

    def _places_after(self, statement: int) -> list[int]:
        """Places of a statement's readers."""
        makes = self.flow.statements[statement].makes
        return [self.place[r] for t in makes for r in self.flow.readers[t]]

    def _sum_once_per_step(self) -> None:
        """Moves sums of gradients from several places to the update.

        The gradients of tied weights: each place then adds up its own part over the microbatches,
        and sends it once per step.
        """
        flow = self.flow
        for k in reversed(range(len(flow.statements))):
            if self.classes[k] != "backward" or flow.instruction(k).name != "add":
                continue
            statement = flow.statements[k]
            readers = [r for t in statement.makes for r in flow.readers[t]]
            producers = [flow.producer[t] for t in statement.reads if t in flow.producer]
            of_update = all(self.classes[r] == "update" for r in readers)
            if of_update and len({self.place[p] for p in producers}) > 1:
                self.classes[k] = "update"

    # ------------------------------------------------------------------------------------- drafts

    def assign_statements(self) -> None:
        """Puts every statement that is not copied into a draft."""
        branches = None if self.is_pipeline else self._branches()
        open_drafts: dict[tuple[object, ...], int] = {}
        for k, statement in enumerate(self.flow.statements):
            phase = self.classes[k]
            if phase == "copied":
                continue
            if phase == "forward" and self.is_whole:
                phase = "backward"
            needs = self._needs(k)
            key: tuple[object, ...] = (self.place[k], phase)
            if branches is not None and phase != "update":
                crossings, urgent = branches
                key = (*key, crossings[k], urgent[k])
            draft = open_drafts.get(key, -1)
            if draft < 0 or any(draft in self.drafts[n].after for n in needs if n != draft):
                draft = len(self.drafts)
                open_drafts[key] = draft
                self.drafts.append(_Draft(self.place[k], phase))
            self._add(draft, k, needs - {draft})
            self.made_by.update(dict.fromkeys(statement.makes, draft))
        self._move_homes()
        self._give_copied_results()

    def _add(self, draft: int, statement: int, needs: set[int]) -> None:
        """Adds a statement to a draft, which then waits for the drafts `needs`."""
        new = set(needs)
        for n in needs:
            new |= self.drafts[n].after
        self.drafts[draft].statements.append(statement)
        if new <= self.drafts[draft].after:
            return
        self.drafts[draft].after |= new
        for other in self.drafts:
            if draft in other.after:
                other.after |= self.drafts[draft].after

    def _needs(self, statement: int) -> set[int]:
        """The drafts whose values a statement reads, also through copied statements."""
        needs = set()
        for t in self.flow.inputs[statement]:
            if t in self.made_by:
                needs.add(self.made_by[t])
        return needs

    def _inputs(
        self,
        tensors: Iterable[int],
        repeated: Iterable[int] = (),
        anew: Collection[int] = (),
    ) -> tuple[list[int], set[int]]:
        """(the tensors from which these are computed by copied statements, those statements).

        `repeated` are statements that are copied too, but for values that leave their run; those
        `anew` are copied in any case.
        """
        also = set(repeated)
        inputs: dict[int, None] = {}
        statements: set[int] = set()
        waiting = list(tensors)
        while waiting:
            t = waiting.pop()
            k = self.flow.producer.get(t)
            is_copied = k in anew or (k is not None and self.classes[k] == "copied")
            if k in also and not is_copied:
                is_copied = not self._leaves_run(k, t)
            if k is None or not is_copied:
                inputs[t] = None
            elif k not in statements:
                statements.add(k)
                waiting += self.flow.statements[k].reads
        return list(inputs), statements

    def _branches(self) -> tuple[list[int], list[bool]]:
        """(per statement the crossings between places before it in its phase, whether another place
        waits for it).

        Without microbatches, a piece ends where another place waits for its values, so branches run
        at the same time.
        """
        flow = self.flow
        count = len(flow.statements)
        crossings = [0] * count
        urgent = [False] * count
        for k, statement in enumerate(flow.statements):
            for t in statement.reads:
                p = flow.producer.get(t, -1)
                if p >= 0 and self.classes[p] == self.classes[k]:
                    step = int(self.place[p] != self.place[k])
                    crossings[k] = max(crossings[k], crossings[p] + step)
        for k in reversed(range(count)):
            for t in flow.statements[k].makes:
                for r in flow.readers[t]:
                    if self.classes[r] == self.classes[k]:
                        is_awaited = self.place[r] != self.place[k] or urgent[r]
                        urgent[k] = urgent[k] or is_awaited
        return crossings, urgent

    def _move_homes(self) -> None:
        """State is stored where its new value is computed."""
        for argument in self.flow.graph.arguments:
            draft = self.made_by.get(-1 if argument.result is None else argument.result)
            if draft is not None and argument.tensor in self.homes:
                self.homes[argument.tensor] = self.drafts[draft].place

    def _give_copied_results(self) -> None:
        """Results of the step by copied statements (the next iteration): of an update piece."""
        flow = self.flow
        argument_of = {a.result: a.tensor for a in flow.graph.arguments if a.result is not None}
        for t in dict.fromkeys(flow.graph.outputs):
            k = flow.producer.get(t, -1)
            if k < 0 or self.classes[k] != "copied":
                continue
            place = self.homes.get(argument_of.get(t, -1), 0)
            updates = [
                n for n, d in enumerate(self.drafts) if (d.place, d.phase) == (place, "update")
            ]
            if not updates:
                updates = [len(self.drafts)]
                self.drafts.append(_Draft(place, "update"))
            self.drafts[updates[-1]].statements.append(k)
            self.made_by[t] = updates[-1]

    # ------------------------------------------------------------------------------------- pieces

    def pieces(self) -> list[Piece]:
        """The drafts with their copied statements, arguments and results."""
        contents = [self._content(draft) for draft in self.drafts]
        read_by: dict[int, set[int]] = defaultdict(set)
        for n, (_, reads) in enumerate(contents):
            for t in reads:
                read_by[t].add(n)
        outputs = set(self.flow.graph.outputs)
        gives: list[list[int]] = [[] for _ in self.drafts]
        for t, n in sorted(self.made_by.items()):
            if t in outputs or read_by[t] - {n}:
                gives[n].append(t)
        pieces = []
        for n, (draft, (statements, reads)) in enumerate(zip(self.drafts, contents, strict=True)):
            pieces.append(
                Piece(
                    place=draft.place,
                    phase=draft.phase,
                    statements=tuple(statements),
                    reads=tuple(reads),
                    gives=tuple(gives[n]),
                    after=frozenset(draft.after),
                )
            )
        return pieces

    def _content(self, draft: _Draft) -> tuple[list[int], list[int]]:
        """(all statements of a draft, the tensors that it reads), both sorted."""
        own = set(draft.statements)
        makes = {t for k in own for t in self.flow.statements[k].makes}
        reads = {t for k in own for t in self.flow.statements[k].reads} - makes
        if draft.phase != "backward":
            inputs, copied = self._inputs(reads)
            return sorted(own | copied), sorted(set(inputs) - makes)
        repeated = self._rematerialized[draft.place]
        anew: set[int] = set()
        while True:
            inputs, copied = self._inputs(reads, repeated, anew)
            inner, light = self._with_light_repeated(draft.place, set(inputs) - makes)
            statements = own | copied | light
            extremes = self._extremes_of_copies(draft.place, statements, inner)
            if extremes <= anew:
                return sorted(statements), sorted(inner)
            anew |= extremes

    def _extremes_of_copies(self, place: int, statements: set[int], stored: set[int]) -> set[int]:
        """The statements between stored maxima and comparisons with values computed again.

        They have to be repeated: a copy may round differently, and would equal no stored maximum.
        """
        extremes: set[int] = set()
        for k, compared in self.compared.items():
            if k not in statements or compared.isdisjoint(stored):
                continue
            operands = set(self.flow.statements[k].reads) - compared
            makers = {self.flow.producer.get(t, -1) for t in operands}
            if any(n in statements and self.classes[n] == "forward" for n in makers):
                makers = {self.flow.producer[t] for t in compared}
                extremes |= {n for n in makers if self.place[n] == place}
        return extremes

    @cached_property
    def _rematerialized(self) -> dict[int, list[int]]:
        """Place -> the forward statements that its backward pass repeats."""
        repeated: dict[int, list[int]] = defaultdict(list)
        for k, run in enumerate(self.runs):
            if run >= 0:
                repeated[self.place[k]].append(k)
        return repeated

    @cached_property
    def runs(self) -> list[int]:
        """[statement]: the rematerialized run of a forward statement, -1 for none.

        It is that of its operator. The residual sum between two blocks belongs to the later one,
        and reads two values of the earlier one, which would both be stored. Such a light statement
        is in the run of its operands, if that stores no more bytes between the runs.
        """
        runs = []
        for k, statement_class in enumerate(self.classes):
            owner = self.flow.owner(k)
            is_forward = statement_class == "forward" and owner >= 0
            runs.append(self.run_of[owner] if is_forward else -1)
        for k in range(len(runs)):
            runs[k] = self._run_of_operands(k, runs)
        return runs

    def _run_of_operands(self, statement: int, runs: Sequence[int]) -> int:
        """The run of a statement: that of the operands which it alone reads from there, if its
        results are no larger, else its own."""
        own = runs[statement]
        if not self._is_light(statement, self.place[statement]):
            return own
        made_in: set[tuple[int, int]] = set()
        nbytes = -sum(self.nbytes[t] for t in self.flow.statements[statement].makes)
        for t in self.flow.inputs[statement]:
            k = self.flow.producer.get(t, -1)
            others = [r for r in self._forward_readers(t) if r != statement]
            if k >= 0 and all(runs[r] == runs[k] for r in others):
                made_in.add((self.place[k], runs[k]))
                nbytes += self.nbytes[t]
        if len(made_in) != 1 or nbytes < 0:
            return own
        ((place, run),) = made_in
        return run if run >= 0 and place == self.place[statement] else own

    def _forward_readers(self, tensor: int) -> list[int]:
        return [k for k in self.flow.readers[tensor] if self.classes[k] == "forward"]

    def _leaves_run(self, statement: int, tensor: int) -> bool:
        """Whether a forward value of a rematerialized run is read forward outside the run: it is
        stored, so that the next run starts from it.
        """
        run = self.runs[statement]
        return any(self.runs[reader] != run for reader in self._forward_readers(tensor))

    def _with_light_repeated(self, place: int, reads: set[int]) -> tuple[set[int], set[int]]:
        """(tensors to read, light forward statements to repeat) in place of the tensors `reads`.

        A light statement is repeated if its operands are read anyway, are smaller variables of the
        place, or are together no larger than its result, in a rematerialized run smaller. Its
        result is then not stored from the forward to the backward pass, and several results often
        come from the same operand.
        """
        statements: set[int] = set()
        has_changed = True
        while has_changed:
            has_changed = False
            for t in sorted(reads, reverse=True):
                k = self.flow.producer.get(t, -1)
                if k < 0 or not self._is_light(k, place):
                    continue
                operands, copied = self._inputs(self.flow.statements[k].reads)
                new = [u for u in operands if u not in reads]
                new = [u for u in new if not self._is_smaller_variable(u, t, place)]
                if self._are_smaller(new, t, or_equal=self.runs[k] < 0):
                    reads = (reads - {t}) | set(operands)
                    statements |= copied | {k}
                    has_changed = True
        return reads, statements

    def _are_smaller(self, operands: Sequence[int], tensor: int, or_equal: bool) -> bool:
        """Whether computed tensors take fewer bytes than another one, or as many."""
        if any(u not in self.flow.producer for u in operands):
            return False
        nbytes = sum(self.nbytes[u] for u in operands)
        return nbytes < self.nbytes[tensor] or (or_equal and nbytes == self.nbytes[tensor])

    def _is_light(self, statement: int, place: int) -> bool:
        is_here = self.classes[statement] == "forward" and self.place[statement] == place
        return is_here and self.flow.instruction(statement).name in LIGHT

    def _is_smaller_variable(self, variable: int, tensor: int, place: int) -> bool:
        is_here = self.homes.get(variable, -1) == place
        return is_here and self.nbytes[variable] <= self.nbytes[tensor]
