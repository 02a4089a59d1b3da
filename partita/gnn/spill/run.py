"""Training steps that run operator by operator within a budget of device memory, as a memory plan says.

A model's stages become pieces (`pieces.Piece`): dense products, cut by rows, and aggregations, cut by columns; neighbours by rows become
one, whose inner tables are made again backward. A stage without pieces is one operator on all. Tables lie in tiles, of a range of rows and a
range of columns: the tensors of the plan. Where the budget is smaller, tiles are. Each piece is an operator forward and one backward, which
computes the piece again by itself; the last one is both, with the loss between.

What a plan saves lies in a temporary file ($TMPDIR), or, for an accelerator, in memory of the host that it copies from and to by itself (JAX's
memory kind `pinned_host`); features are read from where the graph has them. The graph's edges, weights and the optimizer's state are always on the
device. Counted are arrays and what XLA says its programs need; not what a kernel takes inside.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from partita.errors import GraphError
from partita.gnn.data.graph import Graph
from partita.gnn.kernels.bridge import step_options
from partita.gnn.nn.pieces import Piece, by_rows
from partita.gnn.prepare import data_of
from partita.gnn.runs import TrainingRun
from partita.gnn.spill.plan import MemoryPlan, Operator, Work, lru, planned
from partita.gnn.step import (
    StepState,
    build_metrics,
    logs_of,
    loss_sum,
    metric_counts,
    state_of,
    store_state,
    zero_counts,
)

FINENESS = (1, 2, 4, 8, 16)
"""Into how many columns tables may be cut, and into twice as many rows; 1 is not at all."""

PLACES = 16
"""Tables are cut until so many times what the largest operator reads and writes has place: its scratch, and what waits."""

NARROW = 4
"""Columns that a tile has at least."""


Cuts = tuple[tuple[slice, ...], tuple[slice, ...]]
"""Rows and columns of tiles."""


@dataclass(frozen=True)
class Group:
    """Pieces that are one operator, each with the number of its stage; tables have names of the whole model."""

    by: str
    pieces: tuple[tuple[int, Piece], ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def linear(self) -> bool:
        return all(piece.linear for _, piece in self.pieces)


@dataclass(frozen=True)
class Table:
    """How a table is cut: its shape, and where its tiles begin and end."""

    shape: tuple[int, ...]
    dtype: Any
    rows: tuple[slice, ...]
    columns: tuple[slice, ...]

    def tiles(self, by: str, k: int) -> list[tuple[int, int]]:
        """The tiles that hold the k-th range of rows or of columns, or all."""
        rows = [k] if by == "rows" else range(len(self.rows))
        columns = [k] if by == "columns" else range(len(self.columns))
        return [(r, c) for r in rows for c in columns]

    def part(self, by: str, k: int) -> Any:
        """Shape and type of what these tiles are together."""
        if len(self.rows) == len(self.columns) == 1:
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        size = lambda part: part.stop - part.start
        height = size(self.rows[k]) if by == "rows" else self.shape[0]
        return jax.ShapeDtypeStruct(
            (height, size(self.columns[k]) if by == "columns" else self.shape[1]), self.dtype
        )

    def cuts(self, by: str) -> Cuts:
        """Where the tiles of a range begin and end in it."""
        every = (slice(None),)
        return every if by == "rows" else self.rows, every if by == "columns" else self.columns


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """What adds up from operator to operator: other variables after the step, gradients, loss, what the metrics count."""

    others: list[Any]
    total: list[Any]
    loss: Any
    counts: list[Any]

    def changed(self, others: dict[int, Any]) -> Carry:
        return replace(self, others=[others.get(k, v) for k, v in enumerate(self.others)])

    def judged(self, loss: Any, counts: list[Any]) -> Carry:
        return replace(
            self,
            loss=self.loss + loss,
            counts=[a + b for a, b in zip(self.counts, counts, strict=True)],
        )

    def learned(self, used: list[int], grads: list[Any]) -> Carry:
        more = dict(zip(used, grads, strict=True))
        return replace(
            self, total=[v + more[k] if k in more else v for k, v in enumerate(self.total)]
        )


@dataclass(frozen=True)
class Job:
    """What is done with every range of a group, of this number: `function(size, carry, ...)`. Tables are (one that is cut alike, name)."""

    what: str
    group: int
    function: Callable[..., Any]
    reads: Sequence[tuple[str, str]]
    writes: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """An operator as it is run: its program, the first row or column, the tiles that it reads and writes, and how they lie in each table."""

    program: Any
    first: Any
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    read: tuple[Cuts, ...] = ()
    written: tuple[Cuts, ...] = ()


@dataclass(frozen=True)
class Passage:
    """A way through a model: the work, how its operators run, and where tiles of the features are in them."""

    work: Work
    runs: dict[str, Run]
    features: dict[str, tuple[slice, slice]]


@dataclass(frozen=True)
class Followed:
    """What following a plan gave: the carry at its end, rows of the model's output if they were asked for, bytes and seconds of copies, seconds of operators."""

    carry: Carry
    rows: list[np.ndarray]
    moved: int
    copying: float
    seconds: dict[str, float]


class MemoryRun(TrainingRun):
    """The training step of a built model on a graph within `budget` bytes. `data` is the graph's data without features."""

    def __init__(self, model: Any, graph: Graph, budget: int) -> None:
        data = jax.device_put(replace(data_of(graph), x=None))
        state = state_of(model)
        self.digest = graph.digest
        mro = type(model).__mro__
        first = next((c for c in mro if "call" in vars(c) or "stages" in vars(c)), None)
        if first is None or "stages" not in vars(first):
            raise GraphError(
                f"{type(model).__name__} has a call of its own, and a memory plan runs a model's stages: give it stages() beside call, or leave out memory."
            )
        self.model, self.graph, self.features, self.data, self.budget = (
            model,
            graph,
            graph.features,
            data,
            budget,
        )
        self.stages = model.stages()
        self.like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
        self.measured = False
        self.last: Followed | None = None
        self.host = host_of(jax.local_devices()[0])
        self.begin = jax.jit(self._carry)
        self.fineness, self.passage = self._fitted()
        self.passages: dict[str, tuple[Passage, MemoryPlan]] = {}
        self.plan: MemoryPlan = planned(self.work, budget, 1e10)
        self.lru = lru(self.work, budget)

    @property
    def work(self) -> Work:
        return self.passage.work

    # -------------------------------------------------------------------------------------------------------------- the model

    def _groups(self, training: bool) -> tuple[list[Group], list[list[int]], dict[str, Any]]:
        """The model's operators forward, which trainable variables each uses, and the shapes of tables."""
        shapes: dict[str, Any] = {"x0": jax.ShapeDtypeStruct(self.features.shape, jnp.float32)}
        found: list[tuple[int, Piece]] = []
        used: list[list[int]] = []
        owners: dict[int, int] = {}
        for i, stage in enumerate(self.stages):
            pieces = (
                stage.pieces(shapes[f"x{i}"].shape[-1], training)
                if hasattr(stage, "pieces")
                else None
            )
            if pieces is None:
                pieces = [
                    Piece(
                        "whole",
                        ("x",),
                        ("y",),
                        lambda graph, column, x, stage=stage: (stage(x, graph, training),),
                    )
                ]
            if i == len(self.stages) - 1 and pieces[-1].by == "columns":
                pieces = [
                    replace(p, writes=tuple("last" if t == "y" else t for t in p.writes))
                    for p in pieces
                ]
                pieces = [*pieces, by_rows("last", "y", lambda x: x)]
            name = lambda t, i=i: f"x{i}" if t == "x" else f"x{i + 1}" if t == "y" else f"{t}.{i}"
            for piece in pieces:
                piece = replace(
                    piece,
                    reads=tuple(map(name, piece.reads)),
                    writes=tuple(map(name, piece.writes)),
                )
                group = Group(piece.by, ((i, piece),), piece.reads, piece.writes)
                run = lambda t, o, g, *x, group=group: self._run(
                    group, t, o, g, 0, dict(zip(group.reads, x, strict=True))
                )
                program, (written, changed) = jax.make_jaxpr(run, return_shape=True)(
                    self.like[0], self.like[1], self.data.block, *(shapes[t] for t in piece.reads)
                )
                shapes |= zip(piece.writes, written, strict=True)
                inner = program.jaxpr
                read = {id(v) for v in inner.outvars} | {
                    id(v) for e in inner.eqns for v in e.invars
                }
                used.append([k for k in range(len(self.like[0])) if id(inner.invars[k]) in read])
                for k in changed:
                    if owners.setdefault(k, i) != i:
                        raise GraphError(
                            f"Stages {owners[k]} and {i} both change {self.model.non_trainable_variables[k].path}, and a memory plan runs stages by "
                            "themselves: give each stage layers of its own, or leave out memory."
                        )
                found.append((i, piece))
        jax.eval_shape(
            lambda data, y: build_metrics(self.model, data, y),
            self.data,
            shapes[f"x{len(self.stages)}"],
        )
        return *_grouped(found, used), shapes

    def _run(
        self,
        group: Group,
        trainable: Any,
        others: Any,
        graph: Any,
        column: Any,
        tables: dict[str, Any],
    ) -> Any:
        """(tables written, other variables that changed by their number). Each piece begins from the variables of the step's begin."""
        model, changed, tables = self.model, {}, dict(tables)
        pairs = [
            *zip(model.trainable_variables, trainable, strict=True),
            *zip(model.non_trainable_variables, others, strict=True),
        ]
        for _, piece in group.pieces:
            with keras.StatelessScope(state_mapping=pairs) as scope:
                before = [scope.get_current_value(v) for v in model.non_trainable_variables]
                results = piece.function(graph, column, *(tables[t] for t in piece.reads))
            tables.update(zip(piece.writes, results, strict=True))
            for k, variable in enumerate(model.non_trainable_variables):
                if (value := scope.get_current_value(variable)) is not before[k]:
                    changed[k] = value
        return [tables[t] for t in group.writes], changed

    def _penalty(self, trainable: Any) -> Any:
        with keras.StatelessScope(
            state_mapping=list(zip(self.model.trainable_variables, trainable, strict=True))
        ):
            return sum(self.model.losses, start=jnp.zeros(()))

    # ----------------------------------------------------------------------------------------------------------- operators

    def _tables(
        self, groups: list[Group], shapes: dict[str, Any], fineness: int
    ) -> dict[str, Table]:
        """How every table is cut: by rows where an operator is, by columns where one is."""
        found = {}
        for name, shape in shapes.items():
            touching = [g for g in groups if name in g.reads + g.writes]
            if not touching:
                continue
            grains = [piece.grain for g in touching if g.by == "columns" for _, piece in g.pieces]
            height, width = shape.shape[0], math.prod(shape.shape[1:])
            rows = columns = 1
            if fineness > 1:
                rows = 2 * fineness if any(g.by == "rows" for g in touching) else 1
                columns = fineness if grains else 1
            grain = math.lcm(*grains) if grains else 1
            step = math.ceil(max(width / columns, min(NARROW, width)) / grain) * grain
            found[name] = Table(
                shape.shape,
                shape.dtype,
                _ranges(height, math.ceil(height / rows)),
                _ranges(width, step),
            )
        return found

    def _fitted(self) -> tuple[int, Passage]:
        """(fineness, the training step), cut as little as leaves place for more than its largest operator."""
        groups, _, shapes = self._groups(True)
        room = self.budget - self._fixed()
        options = FINENESS if any(g.by != "whole" for g in groups) else FINENESS[:1]
        for fineness in options:
            tables = self._tables(groups, shapes, fineness)
            largest = max(
                sum(_bytes(tables[t].part(g.by, 0)) for t in g.reads + g.writes) for g in groups
            )
            guess = 2 * sum(map(_bytes, shapes.values())) if fineness == 1 else PLACES * largest
            if fineness < options[-1] and guess > room:
                continue
            passage = self._passage("train", fineness)
            if fineness == options[-1] or passage.work.least() <= self.budget:
                return fineness, passage
        raise AssertionError

    def _fixed(self) -> int:
        trainable, others, optimizer = self.like
        return sum(map(_bytes, jax.tree.leaves((self.data, others, others)))) + 2 * sum(
            map(_bytes, jax.tree.leaves((trainable, optimizer, trainable)))
        )

    def _passage(self, kind: str, fineness: int) -> Passage:
        """Every operator compiled, and what they need, of a step that trains ('train'), of one that only judges ('judge') or predicts ('predict')."""
        groups, used, shapes = self._groups(kind == "train")
        tables = self._tables(groups, shapes, fineness)
        operators: list[Operator] = []
        runs: dict[str, Run] = {}
        sizes: dict[str, int] = {}
        features: dict[str, tuple[slice, slice]] = {}
        programs: dict[Any, tuple[Any, int]] = {}
        carry = jax.eval_shape(self._carry, *self.like[:2])

        def tiles(table: str, name: str, by: str, k: int) -> list[str]:
            """Names of tiles of a table, or of another that is cut as it is."""
            found, at = [], tables[table]
            for r, c in at.tiles(by, k):
                found.append(f"{name}[{r},{c}]")
                sizes[found[-1]] = (
                    _bytes(at.part("rows", r))
                    * _bytes(at.part("columns", c))
                    // _bytes(at.part("whole", 0))
                )
                if name == "x0":
                    features[found[-1]] = at.rows[r], at.columns[c]
            return found

        for job in self._jobs(kind, groups, used):
            group = groups[job.group]
            ranges = self._cuts(group, tables)
            for k, part in (
                reversed(list(enumerate(ranges))) if job.what == "backward" else enumerate(ranges)
            ):
                key = job.what, job.group, part.stop - part.start
                given, made = (
                    [tables[t].part(group.by, k) for t, _ in names]
                    for names in (job.reads, job.writes)
                )
                read, written = (
                    tuple(n for t, name in names for n in tiles(t, name, group.by, k))
                    for names in (job.reads, job.writes)
                )
                cuts = [
                    tuple(tables[t].cuts(group.by) for t, _ in names)
                    for names in (job.reads, job.writes)
                ]
                if key not in programs:
                    program: Any = (
                        jax.jit(
                            _apart(job.function, key[2]),
                            donate_argnums=0,
                            compiler_options=step_options(),
                        )
                        .lower(
                            carry,
                            *self.like[:2],
                            self.data,
                            jax.ShapeDtypeStruct((), jnp.int32),
                            *given,
                        )
                        .compile()
                    )
                    programs[key] = program, _scratch(program, sum(map(_bytes, given + made)))
                program, inside = programs[key]
                joined, split = (
                    sum(_bytes(x) for x, at in zip(*both, strict=True) if _tiled(at))
                    for both in zip((given, made), cuts, strict=True)
                )
                if job.what == "predict":
                    inside += sum(_bytes(tables[t].part(group.by, k)) for t in group.writes)
                family = f"{job.what} {job.group}"
                name = family + (f"[{k}]" if len(ranges) > 1 else "")
                operators.append(
                    Operator(name, read, written, max(inside + joined, split), family=family)
                )
                runs[name] = Run(program, np.int32(part.start), read, written, *cuts)
        if kind == "train":
            update: Any = (
                jax.jit(self.model.optimizer.stateless_apply)
                .lower(self.like[2], self.like[0], self.like[0])
                .compile()
            )
            operators.append(Operator("update", (), (), _scratch(update, 0)))
            runs["update"] = Run(update, None, (), ())
        return Passage(Work(tuple(operators), sizes, self._fixed()), runs, features)

    def _jobs(self, kind: str, groups: list[Group], used: list[list[int]]) -> Iterator[Job]:
        """What is done with the groups of a step of this kind, in order: forward, the end, and where it trains backward."""
        same = lambda tables: [(t, t) for t in tables]
        last = len(groups) - 1
        for i, group in enumerate(groups[:-1]):
            forward = lambda size, *given, group=group: self._forward(group, *given)
            yield Job("forward", i, forward, same(group.reads), same(group.writes))
        end = groups[last]
        if kind != "train":
            yield Job(
                kind,
                last,
                lambda size, *given: self._end(kind, end, size, *given),
                same(end.reads),
                [],
            )
            return
        learns: set[str] = set()  # tables that have a gradient
        for group, weights in zip(groups, used, strict=True):
            if weights or learns & set(group.reads):
                learns |= set(group.writes)
        wanted = [t for t in end.reads if t in learns]
        gradient = {t: f"d{t}" for t in wanted}  # how the sum so far is called
        turn = lambda size, *given, wanted=wanted: self._turn(end, used[last], wanted, size, *given)
        yield Job("turn", last, turn, same(end.reads), [(t, gradient[t]) for t in wanted])
        for i in reversed(range(last)):
            group = groups[i]
            if not learns & set(group.writes):
                continue
            wanted = [t for t in group.reads if t in learns]
            known = [] if group.linear and not used[i] else [*group.reads]
            above = [(t, gradient[t]) for t in group.writes]
            sums = [(t, gradient[t]) for t in wanted if t in gradient]
            gradient |= {t: gradient[t] + "+" if t in gradient else f"d{t}" for t in wanted}
            if not wanted and not used[i]:
                continue
            back = lambda size, *given, group=group, i=i, wanted=wanted, known=known, sums=sums: (
                self._backward(group, used[i], wanted, known, [t for t, _ in sums], *given)
            )
            yield Job(
                "backward",
                i,
                back,
                [*same(known), *above, *sums],
                [(t, gradient[t]) for t in wanted],
            )

    def _cuts(self, group: Group, tables: dict[str, Table]) -> Sequence[slice]:
        """The ranges that an operator runs on one after the other."""
        table = tables[(group.reads + group.writes)[0]]
        return (
            table.rows
            if group.by == "rows"
            else table.columns
            if group.by == "columns"
            else (slice(0, 0),)
        )

    def _at(self, group: Group, graph: Any, first: Any) -> tuple[Any, Any]:
        """(the graph as a range of rows sees it, the first column)."""
        return (replace(graph, first=first.reshape(1)), 0) if group.by == "rows" else (graph, first)

    def _forward(
        self,
        group: Group,
        carry: Carry,
        trainable: Any,
        others: Any,
        data: Any,
        first: Any,
        *given: Any,
    ) -> Any:
        """(carry, tables written)."""
        known = dict(zip(group.reads, given, strict=True))
        written, changed = self._run(
            group, trainable, others, *self._at(group, data.block, first), known
        )
        return carry.changed(changed), written

    def _part(self, group: Group, data: Any, first: Any, size: int) -> Any:
        """Labels and training mask of a range of rows."""
        if group.by != "rows":
            return data
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, first, size)
        return replace(data, labels=cut(data.labels), masks={"train": cut(data.masks["train"])})

    def _end(
        self,
        kind: str,
        group: Group,
        size: int,
        carry: Carry,
        trainable: Any,
        others: Any,
        data: Any,
        first: Any,
        *given: Any,
    ) -> Any:
        """(carry with loss and metrics added, nothing), or for 'predict' (carry, rows of the model's output)."""
        known = dict(zip(group.reads, given, strict=True))
        (y,), _ = self._run(group, trainable, others, *self._at(group, data.block, first), known)
        if kind == "predict":
            return carry, [y]
        part = self._part(group, data, first, size)
        value = loss_sum(self.model, y, part, "train") / data.masks["train"].sum()
        return carry.judged(value, metric_counts(self.model, y, part, "train")), []

    def _turn(
        self,
        group: Group,
        used: list[int],
        wanted: list[str],
        size: int,
        carry: Carry,
        trainable: Any,
        others: Any,
        data: Any,
        first: Any,
        *given: Any,
    ) -> Any:
        """Forward, loss, metrics and backward: (carry, gradients of tables)."""
        known = dict(zip(group.reads, given, strict=True))
        part = self._part(group, data, first, size)

        def loss(weights: Any, some: dict[str, Any]) -> Any:
            (y,), changed = self._run(
                group,
                _replaced(trainable, used, weights),
                others,
                *self._at(group, data.block, first),
                known | some,
            )
            return loss_sum(self.model, y, part, "train") / data.masks["train"].sum(), (
                y,
                changed,
            )

        (value, (y, changed)), (grads, slopes) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            [trainable[k] for k in used], {t: known[t] for t in wanted}
        )
        carry = (
            carry.changed(changed)
            .judged(value, metric_counts(self.model, y, part, "train"))
            .learned(used, grads)
        )
        return carry, [slopes[t] for t in wanted]

    def _backward(
        self,
        group: Group,
        used: list[int],
        wanted: list[str],
        reads: list[str],
        sums: list[str],
        carry: Carry,
        trainable: Any,
        others: Any,
        data: Any,
        first: Any,
        *given: Any,
    ) -> Any:
        """(carry, gradients of tables), added to what other operators gave. Given are tables read, gradients of those written, sums so far."""
        known, given = dict(zip(reads, given, strict=False)), given[len(reads) :]
        above, before = (
            list(given[: len(group.writes)]),
            dict(zip(sums, given[len(group.writes) :], strict=True)),
        )
        known = known or {t: jnp.zeros_like(above[0]) for t in group.reads}  # of no influence

        def run(weights: Any, some: dict[str, Any]) -> Any:
            return self._run(
                group,
                _replaced(trainable, used, weights),
                others,
                *self._at(group, data.block, first),
                known | some,
            )[0]

        _, back = jax.vjp(run, [trainable[k] for k in used], {t: known[t] for t in wanted})
        grads, slopes = back(above)
        return carry.learned(used, grads), [
            slopes[t] + before[t] if t in before else slopes[t] for t in wanted
        ]

    # ------------------------------------------------------------------------------------------------------------- the step

    def _carry(self, trainable: Any, others: Any) -> Carry:
        """What a step begins with: the penalty and its gradients."""
        value, grads = jax.value_and_grad(self._penalty)(trainable)
        others = [jnp.array(v, copy=True) for v in others]
        return Carry(others, grads, value, zero_counts(self.model))

    def serves(self, graph: Graph) -> bool:
        """Whether this run is of an equal graph."""
        unchanged = self.graph is graph or self.graph.digest == self.digest
        return self.digest == graph.digest and unchanged

    def state(self) -> StepState:
        return state_of(self.model)

    def store(self, state: StepState) -> None:
        store_state(self.model, state)

    def train(self, state: StepState) -> tuple[dict[str, Any], StepState]:
        """(logs, state after), as the compiled step gives them."""
        self.last = found = self._followed(self.passage, self.plan, state, self.data)
        trainable, optimizer = self.passage.runs["update"].program(
            state[2], found.carry.total, state[0]
        )
        return logs_of(self.model, found.carry.loss, found.carry.counts), StepState(
            trainable, found.carry.others, optimizer
        )

    def _followed(self, passage: Passage, plan: MemoryPlan, state: Any, data: Any) -> Followed:
        """Does what a plan says, but for the update."""
        trainable, others = state[:2]
        carry, held, rows, seconds, moved, copying = (
            self.begin(trainable, others),
            {},
            [],
            {},
            0,
            0.0,
        )
        for action in plan.actions:
            name, began = action.name, time.perf_counter()
            if action.what == "drop":
                held.pop(name).delete()
            elif action.what == "load":
                held[name] = self._loaded(passage, name)
            elif action.what == "save":
                self.host.save(name, held[name])
            elif name != "update":
                run = passage.runs[name]
                carry, written = run.program(
                    carry, trainable, others, data, run.first, *_joined(run, held)
                )
                jax.block_until_ready((carry, written))
                if run.writes:
                    held.update(
                        zip(run.writes, jax.block_until_ready(_split(run, written)), strict=True)
                    )
                else:
                    rows += map(np.asarray, written)
                del written
                seconds[name] = time.perf_counter() - began
            if action.what in ("load", "save"):
                moved += held[name].nbytes
                copying += time.perf_counter() - began
        return Followed(carry, rows, moved, copying, seconds)

    def after_epoch(self, epochs_left: int) -> None:
        """Makes a plan that may run forward operators again, by the seconds measured in the first step."""
        if not epochs_left or self.measured or self.last is None or not self.last.moved:
            return
        self.measured, last = True, self.last
        families: dict[str, list[float]] = {}
        for o in self.work.operators:
            if o.family.startswith("forward"):
                families.setdefault(o.family, []).append(last.seconds[o.name])
        seconds = {
            family: statistics.median(found) for family, found in families.items()
        }  # the first of them compiles
        work = replace(
            self.work,
            operators=tuple(replace(o, seconds=seconds.get(o.family)) for o in self.work.operators),
        )
        self.passage = replace(self.passage, work=work)
        self.plan = planned(work, self.budget, last.moved / max(last.copying, 1e-9))

    def evaluate(self, state: StepState, mask: str) -> dict[str, Any]:
        """Loss and metrics of a mask without dropout, within the budget too."""
        masks = self.data.masks | {"train": self.data.masks[mask]}
        data = replace(self.data, masks=masks)
        carry = self._followed(*self._judging("judge"), state, data).carry
        return logs_of(self.model, carry.loss, carry.counts)

    def predict(self, state: StepState) -> np.ndarray:
        """float32 [vertices, classes]: the model's output, within the budget too."""
        return np.concatenate(self._followed(*self._judging("predict"), state, self.data).rows)

    def _judging(self, kind: str) -> tuple[Passage, MemoryPlan]:
        if kind not in self.passages:
            passage = self._passage(kind, self.fineness)
            self.passages[kind] = passage, planned(passage.work, self.budget, 1e10)
        return self.passages[kind]

    @property
    def moved(self) -> int:
        """Bytes between host and device in the last step."""
        return 0 if self.last is None else self.last.moved

    def facts(self) -> dict[str, Any]:
        """In bytes: what all needs, what was given, the least possible; traffic of an epoch as planned, as it was, and of the cache; if the plan is exact."""
        return {
            "need": self.work.need(),
            "budget": self.budget,
            "least": self.work.least(),
            "traffic": self.plan.traffic,
            "moved": self.moved,
            "lru_traffic": self.lru.traffic,
            "operators": len(self.work.operators),
            "again": sum(a.what == "again" for a in self.plan.actions),
            "exact": self.plan.exact,
        }

    def _loaded(self, passage: Passage, name: str) -> Any:
        place = passage.features.get(name)
        loaded = (
            self.host.load(name)
            if place is None
            else jnp.array(np.asarray(self.features[place], np.float32), copy=True)
        )
        return jax.block_until_ready(loaded)


class FileHost:
    """Arrays by their names in a temporary file."""

    def __init__(self) -> None:
        self.file: Any = tempfile.TemporaryFile(prefix="partita-", buffering=0)  # noqa: SIM115 (open as long as the model lives)
        self.places: dict[str, int] = {}
        self.like: dict[str, Any] = {}
        self.end = 0

    def save(self, name: str, array: jax.Array) -> None:
        """Writes over what had the name before, which was of the same shape."""
        if name not in self.places:
            self.places[name], self.end = self.end, self.end + array.nbytes
        self.like[name] = array.shape, array.dtype
        self.file.seek(self.places[name])
        np.asarray(array).tofile(self.file)

    def load(self, name: str) -> jax.Array:
        shape, dtype = self.like[name]
        self.file.seek(self.places[name])
        return jnp.array(np.fromfile(self.file, dtype, math.prod(shape)).reshape(shape), copy=True)


class PinnedHost:
    """Arrays by their names in memory of the host that a device copies from and to by itself."""

    KIND = "pinned_host"

    def __init__(self) -> None:
        self.kept: dict[str, jax.Array] = {}

    def save(self, name: str, array: jax.Array) -> None:
        self.kept[name] = jax.block_until_ready(
            jax.device_put(array, array.sharding.with_memory_kind(self.KIND))
        )

    def load(self, name: str) -> jax.Array:
        kept = self.kept[name]
        return jax.device_put(kept, kept.sharding.with_memory_kind("device"))


def host_of(device: Any) -> FileHost | PinnedHost:
    """Where a plan's arrays go from a device. A CPU's memory is the host's own, so beyond it is the disk."""
    kinds = (
        []
        if device.platform == "cpu"
        else [memory.kind for memory in device.addressable_memories()]
    )
    return PinnedHost() if PinnedHost.KIND in kinds else FileHost()


def _grouped(
    found: list[tuple[int, Piece]], used: list[list[int]]
) -> tuple[list[Group], list[list[int]]]:
    """Neighbours that are cut by rows as one, and the trainable variables that each uses."""
    together: list[list[int]] = []
    for n, (_, piece) in enumerate(found):
        if together and piece.by == "rows" == found[n - 1][1].by:
            together[-1].append(n)
        else:
            together.append([n])
    groups = []
    for members in together:
        pieces = [found[n] for n in members]
        inner = [t for _, p in pieces for t in p.writes]
        later = {t for _, p in found[members[-1] + 1 :] for t in p.reads} | set(found[-1][1].writes)
        reads = dict.fromkeys(t for _, p in pieces for t in p.reads if t not in inner)
        groups.append(
            Group(
                pieces[0][1].by, tuple(pieces), tuple(reads), tuple(t for t in inner if t in later)
            )
        )
    return groups, [sorted({k for n in members for k in used[n]}) for members in together]


def _apart(function: Any, size: int) -> Any:
    """The function for ranges of a size; each array that it gives is one of its own, which can be deleted alone."""

    def whole(carry: Carry, *given: Any) -> Any:
        carry, tiles = function(size, carry, *given)
        seen, apart = {id(x) for x in jax.tree.leaves(given)}, []
        for tile in tiles:
            apart.append(jnp.array(tile, copy=True) if id(tile) in seen else tile)
            seen.add(id(tile))
        return carry, apart

    return whole


def _tiled(at: Cuts) -> bool:
    return len(at[0]) * len(at[1]) > 1


def _joined(run: Run, held: dict[str, Any]) -> list[Any]:
    """The tables that an operator reads, of their tiles."""
    found, n = [], 0
    for at in run.read:
        tiles = [held[t] for t in run.reads[n : n + len(at[0]) * len(at[1])]]
        n += len(tiles)
        found.append(_concatenated(len(at[1]), tiles) if _tiled(at) else tiles[0])
    return found


def _split(run: Run, tables: Sequence[Any]) -> list[Any]:
    """The tiles of the tables that an operator writes."""
    found = []
    for at, table in zip(run.written, tables, strict=True):
        found += (
            _cut(tuple(tuple((s.start, s.stop) for s in cuts) for cuts in at), table)
            if _tiled(at)
            else [table]
        )
    return found


@partial(jax.jit, static_argnums=0)
def _concatenated(wide: int, tiles: list[Any]) -> Any:
    rows = [jnp.concatenate(tiles[i : i + wide], 1) for i in range(0, len(tiles), wide)]
    return jnp.concatenate(rows, 0)


@partial(jax.jit, static_argnums=0)
def _cut(at: Any, table: Any) -> list[Any]:
    rows, columns = at
    return [table[slice(*r), slice(*c)] for r in rows for c in columns]


def _replaced(values: Sequence[Any], at: Sequence[int], new: Sequence[Any]) -> list[Any]:
    found = list(values)
    for k, value in zip(at, new, strict=True):
        found[k] = value
    return found


def _ranges(size: int, step: int) -> tuple[slice, ...]:
    return tuple(slice(a, min(a + step, size)) for a in range(0, size, step))


def _scratch(program: Any, otherwise: int) -> int:
    """Bytes that a compiled program needs inside; `otherwise` where its compiler does not say."""
    found = program.memory_analysis()
    return otherwise if found is None else found.temp_size_in_bytes


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
