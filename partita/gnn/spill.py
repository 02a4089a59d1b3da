"""Training steps that run layer by layer within a budget of device memory, as a memory plan says.

Each stage of a model (a layer and its dropout) is one operator forward and one backward, which computes the stage again by itself. What a
plan saves lies in files of a temporary folder ($TMPDIR); features are read from where the graph has them. The graph's edges, weights and
the optimizer's state are always on the device. Counted are arrays and what XLA says its programs need; not what a kernel takes inside.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from partita.errors import GraphError
from partita.gnn.memory import MemoryPlan, Operator, Work, lru, planned


class Planned:
    """The training step of a built model on a graph within `budget` bytes. `data` is the graph's data without features."""

    def __init__(self, model: Any, graph: Any, data: Any, state: Any, budget: int) -> None:
        mro = type(model).__mro__
        first = next((c for c in mro if "call" in vars(c) or "stages" in vars(c)), None)
        if first is None or "stages" not in vars(first):
            raise GraphError(
                f"{type(model).__name__} has a call of its own, and a memory plan runs a model's stages: give it stages() beside call, or leave out memory."
            )
        self.model, self.graph, self.features, self.data, self.budget = model, graph, graph.features, data, budget
        self.stages = model.stages()
        self.moved, self.seconds, self.copied = 0, {}, [0.0, 0]
        self.measured = False
        self.judges = [
            jax.jit(lambda t, o, x, g, i=i: self._stage(i, t, o, x, g, training=False)[0]) for i in range(len(self.stages))
        ]
        self.folder = tempfile.TemporaryDirectory(prefix="partita-")
        self.work = self._compiled(state)
        self.plan: MemoryPlan = planned(self.work, budget, 1e10)
        self.lru = lru(self.work, budget)

    # ----------------------------------------------------------------------------------------------------------- operators

    def _stage(self, i: int, trainable: Any, others: Any, x: Any, graph: Any, training: bool = True) -> tuple[Any, Any]:
        """(rows, other variables after)."""
        model = self.model
        pairs = [
            *zip(model.trainable_variables, trainable, strict=True),
            *zip(model.non_trainable_variables, others, strict=True),
        ]
        with keras.StatelessScope(state_mapping=pairs) as scope:
            y = self.stages[i](x, graph, training)
        after = [
            v if (found := scope.get_current_value(k)) is None else found
            for k, v in zip(model.non_trainable_variables, others, strict=True)
        ]
        return y, after

    def _back(self, i: int, trainable: Any, others: Any, x: Any, dy: Any, total: Any, graph: Any) -> Any:
        """(gradients added to `total`, gradient of x; none of the features)."""
        if i == 0:
            grads = jax.vjp(lambda t: self._stage(i, t, others, x, graph)[0], trainable)[1](dy)[0]
            dx = None
        else:
            grads, dx = jax.vjp(lambda t, x: self._stage(i, t, others, x, graph)[0], trainable, x)[1](dy)
        return jax.tree.map(jnp.add, total, grads), dx

    def _loss(self, trainable: Any, y: Any, data: Any) -> Any:
        """(logs, gradient of y, gradients of the penalties)."""
        count = data.masks["train"].sum()
        value, dy = jax.value_and_grad(lambda y: self.model._summed_loss(y, data, "train") / count)(y)
        penalty, grads = jax.value_and_grad(self._penalty)(trainable)
        return {"loss": value + penalty, **self.model._judged(y, data, "train")}, dy, grads

    def _penalty(self, trainable: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(self.model.trainable_variables, trainable, strict=True))):
            return sum(self.model.losses, start=jnp.zeros(()))

    def _compiled(self, state: Any) -> Work:
        """Every operator compiled, and what they need."""
        trainable, others, optimizer = state
        graph, n = self.data.graph, len(self.stages)
        shapes: list[Any] = [jax.ShapeDtypeStruct(self.features.shape, jnp.float32)]
        self.programs, operators, sizes = {}, [], {"x0": _bytes(shapes[0])}

        def add(name: str, function: Any, reads: tuple[str, ...], writes: tuple[str, ...], *given: Any) -> Any:
            program: Any = jax.jit(function).lower(*given).compile()
            self.programs[name] = program
            operators.append(Operator(name, reads, writes, program.memory_analysis().temp_size_in_bytes))
            return jax.eval_shape(function, *given)

        for i in range(n):
            forward = lambda t, o, x, g, i=i: self._stage(i, t, o, x, g)
            y, _ = add(f"forward {i}", forward, (f"x{i}",), (f"x{i + 1}",), trainable, others, shapes[i], graph)
            shapes.append(y)
            sizes[f"x{i + 1}"] = sizes[f"d{i + 1}"] = _bytes(y)
        add("loss", self._loss, (f"x{n}",), (f"d{n}",), trainable, shapes[n], self.data)
        for i in reversed(range(n)):
            back = lambda t, o, x, dy, s, g, i=i: self._back(i, t, o, x, dy, s, g)
            reads, writes = (f"x{i}", f"d{i + 1}"), (f"d{i}",) if i else ()
            add(f"backward {i}", back, reads, writes, trainable, others, shapes[i], shapes[i + 1], trainable, graph)
        update = lambda o, g, t: self.model.optimizer.stateless_apply(o, g, t)
        add("update", update, (), (), optimizer, trainable, trainable)
        fixed = sum(map(_bytes, jax.tree.leaves((self.data, others)))) + 2 * sum(
            map(_bytes, jax.tree.leaves((trainable, optimizer, trainable)))
        )
        return Work(tuple(operators), sizes, fixed)

    # ------------------------------------------------------------------------------------------------------------- the step

    def step(self, state: Any, _: Any) -> Any:
        """(logs, state after), as the compiled step gives them. The first one measures; the plan of the others knows what running again costs."""
        trainable, before, optimizer = state
        others, grads, logs = before, None, None
        held: dict[str, Any] = {}
        self.moved = 0
        graph = self.data.graph
        for action in self.plan.actions:
            kind, _, number = action.name.partition(" ")
            began = time.perf_counter()
            if action.what == "load":
                held[action.name] = self._loaded(action.name)
            elif action.what == "save":
                np.save(self._file(action.name), np.asarray(held[action.name]))
                self.moved += held[action.name].nbytes
            elif action.what == "drop":
                held.pop(action.name).delete()
            elif kind == "forward":
                i = int(number)
                y, after = self.programs[action.name](
                    trainable, others if action.what == "run" else before, held[f"x{i}"], graph
                )
                others = after if action.what == "run" else others
                held[f"x{i + 1}"] = jax.block_until_ready(y)
                self.seconds[action.name] = time.perf_counter() - began
            elif kind == "loss":
                y = held[f"x{len(self.stages)}"]
                logs, held[f"d{len(self.stages)}"], grads = self.programs["loss"](trainable, y, self.data)
            elif kind == "backward":
                i = int(number)
                grads, dx = self.programs[action.name](trainable, before, held[f"x{i}"], held[f"d{i + 1}"], grads, graph)
                jax.block_until_ready(grads)
                if i:
                    held[f"d{i}"] = dx
            else:
                trainable, optimizer = self.programs["update"](optimizer, grads, trainable)
            if action.what in ("load", "save"):
                self.copied[0] += time.perf_counter() - began
        self.copied[1] += self.moved
        return logs, (trainable, others, optimizer)

    def replan(self) -> None:
        """A plan that may run forward operators again, by the seconds measured in the first step."""
        if self.measured or not self.moved:
            return
        self.measured = True
        operators = tuple(replace(o, seconds=self.seconds.get(o.name)) for o in self.work.operators)
        self.work = replace(self.work, operators=operators)
        self.plan = planned(self.work, self.budget, self.copied[1] / max(self.copied[0], 1e-9))

    def judged(self, state: Any, mask: str) -> dict[str, Any]:
        """Loss and metrics of a mask without dropout, one stage after the other."""
        trainable, others = state[:2]
        x = jnp.array(self.features, jnp.float32)
        for judge in self.judges:
            x = jax.block_until_ready(judge(trainable, others, x, self.data.graph))
        value = self.model._summed_loss(x, self.data, mask) / self.data.masks[mask].sum()
        return {"loss": value + self._penalty(trainable), **self.model._judged(x, self.data, mask)}

    def facts(self) -> dict[str, Any]:
        """In bytes: what all needs, what was given, the least possible; traffic of an epoch as planned, as it was, and of the cache; if the plan is exact."""
        return {
            "need": self.work.need(), "budget": self.budget, "least": self.work.least(), "traffic": self.plan.traffic, "moved": self.moved,
            "lru_traffic": self.lru.traffic, "again": sum(a.what == "again" for a in self.plan.actions), "exact": self.plan.exact,
        }  # fmt: skip

    def _loaded(self, name: str) -> Any:
        source = self.features if name == "x0" else np.load(self._file(name), mmap_mode="r")
        found = jax.block_until_ready(jnp.array(source, jnp.float32, copy=True))
        self.moved += found.nbytes
        return found

    def _file(self, name: str) -> Path:
        return Path(self.folder.name) / f"{name}.npy"


def _bytes(x: Any) -> int:
    return int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize
