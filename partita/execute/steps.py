"""The step runner that Keras's `fit` and `parallelize` share: it places the state, runs the program
of a step, and asks a manager between steps (`management.contract`).
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from partita.errors import CompilerError, LostProcessError
from partita.execute import members
from partita.execute.devices import detect
from partita.execute.process_arrays import is_local, is_of_group, put, replicated, whole
from partita.execute.processes import check_losses, exchanged, is_first, together
from partita.execute.program import runnable_step
from partita.execute.rejoining import (
    Handover,
    Results,
    wait_for_handover,
    with_bytes,
    write_handover,
)
from partita.execute.shares import check_shares, shares_step
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.management.contract import Manager, PlanFor
from partita.management.program_table import ProgramTable
from partita.plans.adapt import fit_plan
from partita.plans.plan import Plan

Result = TypeVar("Result")
PERIOD = 0.002
"""Time between two looks for the launcher's word, seconds."""


def settled(values: Any) -> Any:
    """The values; on a CPU, after they are computed.

    A CPU device is a thread of one pool. Programs with collectives that overlap take all threads
    and wait for each other until XLA ends the process (observed with jax 0.10.2 within 100 steps,
    with `keras.distribution` too).

    Raises:
        CompilerError: XLA:CPU gathered the operand of a Fourier transform into a layout that it
            does not transform (jaxlib 0.10.2). Programs of a plan avoid it.
    """
    if jax.default_backend() != "cpu":
        return values
    try:
        return jax.block_until_ready(values)
    except jax.errors.JaxRuntimeError as error:
        if "fft_thunk" not in str(error):
            raise
        raise CompilerError(
            "XLA:CPU cannot transform split values outside a training step (FFT). Give the weights "
            "to a model on one device: set_weights(model.get_weights()) or load_state_dict."
        ) from error


def ignore_state(state: Any) -> None:
    """Takes no note of a state."""


class LiveGroup:
    """The group of live processes, for managers."""

    @property
    def alive(self) -> tuple[int, ...]:
        return members.alive()

    @property
    def is_first(self) -> bool:
        return is_first()

    def devices_of(self, processes: Sequence[int]) -> int:
        """Number of devices of some processes."""
        return sum(device.process_index in processes for device in jax.devices())

    def exchanged(self, name: str, value: str) -> list[str]:
        """The values of all live processes."""
        return exchanged(name, value)

    def has_news(self) -> bool:
        """Whether a loss is reported that this process has not left yet."""
        return bool(members.news())

    def leave_lost(self, seconds: float) -> dict[int, str]:
        """Goes on without the processes that are newly lost."""
        end = time.monotonic() + seconds
        while not members.news() and members.board() is not None and time.monotonic() < end:
            time.sleep(PERIOD)
        return {loss.process: loss.cause for loss in members.leave()}

    def returned(self) -> int:
        """Number of all losses and returns, if the last ones are returns that are not followed."""
        return members.returned()

    def alive_after(self, number: int) -> tuple[int, ...]:
        """The live processes once a number of losses and returns is followed."""
        return members.alive_after(number)


class StepRunner:
    """Runs the steps of one training.

    Args:
        name: The training's name in messages.
        owns_state: Whether arrays of a state may be freed once they are moved: nobody else has
            them.
        on_state: Called with each state whose arrays live on: the moved one before a step, the new
            one after it.
    """

    def __init__(
        self,
        name: str,
        owns_state: bool = False,
        on_state: Callable[[Any], None] = ignore_state,
    ) -> None:
        self.name = name
        self.group = LiveGroup()
        self.manager: Manager | None = None
        self.plan: Plan | None = None
        self.step = 0
        self.compile_seconds = 0.0
        self.steps: dict[Any, Any] = {}
        """By shapes of state and batch: values with a planned step and its program (`planned`,
        `program`); None where the step runs without a plan."""
        self.others: dict[Hashable, Callable[[Any, Any], tuple[Any, Any]]] = {}
        """Evaluations, by key: `(state, batch) -> (outputs, state)`. A manager counts and repeats
        them as steps."""
        self.keeps_batches = False
        """Whether arrays of a batch are kept for a loss without a copy: new ones, and slices in
        order of arrays that `fit` trains on."""
        self.metrics_group: int | None = None
        """The part of a state that metrics are in; None where a process that was started again
        cannot be taken in."""
        self.results = Results()
        """Of the steps so far, for a process that is started again."""
        self._handover: Handover | None = None
        """Where this process is taken in, if it was started again."""
        self.running: Any = None
        """The entry of `steps` that ran last: the state is on its mesh."""
        self._running_key: Any = None
        self._owns_state = owns_state
        self._on_state = on_state
        self._state: Any = None
        """The state that the last step returned, placed as the plan says."""
        self.table = ProgramTable()
        """Steps for losses and plans that may come, and for shares: see `prepare`."""
        self._outdated: set[Any] = set()
        """Keys of steps that are to be compiled for a new plan."""
        self._earlier: dict[Any, list[Any]] = {}
        """Key -> entries of `steps` for earlier plans."""
        self._shared: dict[int, tuple[Any, Any]] = {}
        """Identity of an entry of `steps` -> (the entry, the same for shares)."""
        self._shares: tuple[int, ...] | None = None

    def forget_state(self) -> None:
        """Has the state placed again at the next step: others have moved it."""
        self._state = None

    def is_placed(self, state: Any) -> bool:
        """Whether a state is the one that the last step returned."""
        return state is not None and state is self._state

    # --------------------------------------------------------------------------------------- steps

    def attempt(self, state: Any, function: Callable[[Any], Result]) -> Result:
        """`function(state)`, called again with a recovered state after a loss that the manager
        repairs."""
        while True:
            try:
                return function(state)
            except LostProcessError as error:
                if self.manager is None:
                    raise
                state = self.manager.lost(self, state, error)

    def run(self, key: Hashable, state: Any, batch: Any) -> tuple[Any, Any]:
        """(outputs, state) of the next step of the training, with its manager."""
        manager = self.manager
        if manager is None:
            return self.execute(key, state, batch)
        check_losses("a step")
        manager.before_step(self, key, state, batch)
        start = time.perf_counter()
        outputs, state = self.execute(key, state, batch)
        seconds = time.perf_counter() - start
        self.step += 1
        if members.has_returns() and self.metrics_group is not None:
            self.results.add(outputs, jax.tree.leaves(state[self.metrics_group]))
        manager.after_step(self, key, state, batch, seconds)
        return outputs, state

    def execute(self, key: Hashable, state: Any, batch: Any) -> tuple[Any, Any]:
        """(outputs, state) of a step, without a manager."""
        if key in self.others:
            return self.others[key](state, batch)
        step = self._with_shares(key)
        start = time.perf_counter()
        placed_batch = step.planned.place_batch(batch)
        with together("a step"), uninterrupted():
            if not self.is_placed(state) or step is not self.running:
                state = self._placed(unshared(state, batch), step)
                self._on_state(state)
            outputs, state = step.program(state, placed_batch)
            self.running = step
            self._running_key = key
            self._state = state
            self._on_state(state)
        with together("a step"):
            outputs, state = settled((outputs, state))
        members.finish_step(time.perf_counter() - start)
        return outputs, state

    def _placed(self, state: Any, step: Any) -> Any:
        """The state with the shardings of a step. What the last step returned stays."""
        leaves, tree = jax.tree.flatten(state)
        shardings = jax.tree.leaves(step.planned.state_shardings)
        here: dict[int, Any] = {}
        if step is self.running:
            here = {id(x): x for x in jax.tree.leaves(self._state)}
        moved = []
        for leaf, sharding in zip(leaves, shardings, strict=True):
            if id(leaf) in here:
                moved.append(leaf)
                continue
            new = put(leaf, sharding)
            if self._owns_state:
                _free(leaf, new)
            moved.append(new)
        return jax.tree.unflatten(tree, moved)

    # --------------------------------------------------------------------------------------- plans

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Inside, a step is compiled, and its time is noted."""
        start = time.perf_counter()
        yield
        self.compile_seconds = time.perf_counter() - start

    def graph(self, key: Hashable) -> OperatorGraph:
        """The captured step for a key."""
        return self.steps[key].planned.captured.graph

    def machine(self, devices: int | None = None) -> Machine:
        """The machine of all live devices, or of some."""
        return detect(devices or len(members.devices()))

    def is_evaluation(self, key: Hashable) -> bool:
        """Whether a step evaluates or predicts."""
        return key in self.others

    def change(self, plan: Plan) -> None:
        """Trains by another plan, for all live devices, from the next step on."""
        self.table.keep(lambda key: key[0] == "plan")
        self._begin(plan)

    def _begin(self, plan: Plan) -> None:
        """Has all steps compiled for a plan, at their next use."""
        self.plan = plan
        self._shares = None
        self._outdated = {key for key, step in self.steps.items() if step is not None}

    def change_members(self, plan_for: PlanFor) -> None:
        """Trains by a new plan after a loss, for all live devices, from the next step on."""
        steps = [step for step in self.steps.values() if step is not None]
        if self.plan is None or not steps:
            self.plan = None
            return
        # Their programs are for devices that are gone.
        self._earlier.clear()
        self._shared.clear()
        lost, generation = members.lost(), members.generation()
        self.table.keep(lambda key: key[0] == "loss" and key[2:] == (lost, generation))
        self._begin(self._plan_without_lost(plan_for, len(members.devices())))
        self._state = None
        if self.running is not None:
            self.running = self._compiled(self._running_key)

    @property
    def host_is_idle(self) -> bool:
        """Whether a compilation beside a step is free: devices are not the host's cores."""
        return jax.default_backend() != "cpu"

    def prepare(self, key: Hashable, plan_for: PlanFor, beside: bool = False) -> None:
        """Compiles a step for the loss of any one other process, now or beside the training."""
        step = self.steps.get(key)
        if self.plan is None or step is None:
            return
        for process in members.alive():
            if process == members.index():
                continue
            devices = members.devices(without=process)
            plan = self._plan_without_lost(plan_for, len(devices))
            state = "loss", key, members.lost() | {process}, members.generation() + 1
            compiled = partial(_compiled_step, step, plan, devices)
            if beside:
                self.table.begin(state, compiled)
            else:
                self.table.make(state, compiled)

    def prepare_plan(self, key: Hashable, plan: Plan) -> None:
        """Compiles a step for another plan of all live devices, beside the training."""
        step = self._compiled(key)
        if plan == self.plan:
            return
        compiled = partial(_compiled_step, step, plan, members.devices())
        self.table.begin(_plan_state(key, plan), compiled)

    def _plan_without_lost(self, plan_for: PlanFor, devices: int) -> Plan:
        """The plan for fewer devices, by the step with the largest batch."""
        assert self.plan is not None
        steps = [step for step in self.steps.values() if step is not None]
        graphs = [step.planned.captured.graph for step in steps]
        largest = max(graphs, key=lambda graph: graph.batch_size)
        return plan_for(largest, self.plan, devices)

    def _compiled(self, key: Hashable) -> Any:
        """The compiled step for a key, under the plan."""
        step = self.steps[key]
        if key not in self._outdated:
            return step
        assert self.plan is not None
        captured = step.planned.captured
        plan = fit_plan(self.plan, captured.graph)
        others = self._earlier.setdefault(key, [])
        known = self._known(key, plan, captured)
        if known is None:
            with self.compiling():
                planned = runnable_step(captured, plan, donate=step.planned.donates)
                known = replace(step, planned=planned, program=planned.compile())
        self._earlier[key] = [other for other in (*others, step) if other is not known]
        self.steps[key] = known
        self._outdated.discard(key)
        return known

    def _known(self, key: Hashable, plan: Plan, captured: Any) -> Any:
        """The compiled step of a plan that ran before or is ready for a loss; None without one."""
        for_loss = self.table.get(("loss", key, members.lost(), members.generation()))
        for_plan = self.table.get(_plan_state(key, plan))
        for step in (for_loss, for_plan, *self._earlier[key]):
            if step is None or step.planned.plan != plan or step.planned.captured is not captured:
                continue
            if set(step.planned.mesh.devices.flat) <= set(members.devices()):
                return step
        return None

    # -------------------------------------------------------------------------------------- shares

    def device_processes(self, key: Hashable) -> tuple[int, ...]:
        """The process of each device of a step's mesh."""
        mesh = self._compiled(key).planned.mesh
        return tuple(device.process_index for device in mesh.devices.flat)

    def has_shares(self, key: Hashable) -> bool:
        """Whether the step for a key is compiled for shares."""
        return id(self._compiled(key)) in self._shared

    def prepare_shares(self, key: Hashable) -> int:
        """Compiles the step for a key for any shares; the number of microbatches."""
        step = self._compiled(key)
        known = self.table.get(("shares", id(step)))
        if known is None:
            with self.compiling():
                known = _compiled_shares(step)
        self._shared[id(step)] = known
        return known[1].planned.sums.part_count

    def begin_shares(self, key: Hashable) -> bool:
        """Has `prepare_shares` compiled beside the training; whether that is done."""
        step = self._compiled(key)
        self.table.begin(("shares", id(step)), partial(_compiled_shares, step))
        return self.table.is_done(("shares", id(step)))

    def change_shares(self, shares: Sequence[int] | None) -> None:
        """Gives each device its number of microbatches from the next step on."""
        self._shares = None if shares is None else tuple(shares)

    def _with_shares(self, key: Hashable) -> Any:
        """The step for a key: for shares, if there are any and it is compiled for them."""
        step = self._compiled(key)
        if self._shares is None or id(step) not in self._shared:
            return step
        _, shared = self._shared[id(step)]
        if shared.planned.shares != self._shares:
            shared = replace(shared, planned=shared.planned.with_shares(self._shares))
            self._shared[id(step)] = step, shared
        return shared

    # ------------------------------------------------------------------------------------- returns

    @property
    def can_grow(self) -> bool:
        """Whether a process that was started again can be taken in."""
        return self.metrics_group is not None and len(self.results.numbers) == self.step

    def grow(self, event: int, plan: Plan, leaves: Sequence[np.ndarray]) -> None:
        """Trains with all processes that are there after a number of events, from this state on."""
        members.follow(event)
        if is_first():
            write_handover(Handover(event, self.step, plan, self.results, leaves))
        self.change_members(lambda graph, before, devices: plan)
        self.meet_others()

    def meet_others(self) -> None:
        """Waits for the processes that train from now on together."""
        exchanged("grown", "")
        members.note_taken_in()

    def repeated(self, state: Any) -> tuple[Any, Any] | None:
        """(outputs, state) of a step that the others have made, with their metrics; None at the
        step at which they take this process in."""
        if self._handover is None:
            self._handover = wait_for_handover()
        results = self._handover.results
        if self.step == self._handover.step:
            return None
        assert self.metrics_group is not None
        groups = list(state)
        tree = jax.tree.structure(groups[self.metrics_group])
        metrics = results.metrics[self.step]
        # Keras makes some metrics in the first step.
        if tree.num_leaves == len(metrics):
            groups[self.metrics_group] = jax.tree.unflatten(tree, metrics)
        outputs = results.numbers[self.step]
        self.step += 1
        return outputs, tuple(groups)

    def join(self, state: Any) -> Any:
        """The state of the others; from here on this process trains with them."""
        handover = self._handover
        assert handover is not None
        self.plan = handover.plan
        self.results = handover.results
        self._handover = None
        members.follow(handover.event)
        return with_bytes(state, handover.leaves)

    # ---------------------------------------------------------------------------------------- host

    def leaves(self, state: Any) -> list[Any]:
        """The arrays of a state, in order."""
        return jax.tree.leaves(state)

    def with_leaves(self, state: Any, leaves: Sequence[Any]) -> Any:
        """A state of the same structure with other arrays."""
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def own_copy(self, leaf: Any) -> np.ndarray | None:
        """A copy of an array that this process has whole; None for another one."""
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            return None
        if is_local(leaf):
            return np.array(leaf)
        if is_of_group(leaf) or not leaf.is_fully_replicated:
            return None
        return np.array(leaf.addressable_data(0))

    def batch_copy(self, batch: Any) -> Any:
        """A batch in host memory, to be run again: arrays of JAX, and those of Keras's arrays, as
        they are."""

        def kept(x: Any) -> Any:
            is_kept = self.keeps_batches and isinstance(x, np.ndarray) and x.flags.c_contiguous
            return x if is_kept or is_constant(x) else np.array(x)

        return jax.tree.map(kept, batch)

    def to_host(self, state: Any) -> list[np.ndarray]:
        """Copies of the leaves of a state in host memory; all processes call it together."""
        leaves = jax.tree.leaves(state)
        split = [x for x in leaves if not is_local(x) and not is_of_group(x)]
        split = [x for x in split if not x.is_fully_replicated]
        with together("a snapshot"):
            gathered = {id(x): replicated(x) for x in split}
            copies = []
            for leaf in leaves:
                if is_of_group(leaf):
                    copies.append(whole(leaf))
                else:
                    copies.append(self.own_copy(gathered.get(id(leaf), leaf)))
            return copies


def _plan_state(key: Hashable, plan: Plan) -> Hashable:
    """The key in the table of programs of a step under another plan."""
    return "plan", key, json.dumps(plan.to_json())


def _compiled_step(step: Any, plan: Plan, devices: Sequence[Any]) -> Any:
    """A value like `step` with another plan on some devices, compiled."""
    captured = step.planned.captured
    plan = fit_plan(plan, captured.graph)
    planned = runnable_step(captured, plan, devices, donate=step.planned.donates)
    return replace(step, planned=planned, program=planned.compile())


def _compiled_shares(step: Any) -> tuple[Any, Any]:
    """The step, and a value like it for any shares, compiled and checked."""
    planned = step.planned
    devices = list(planned.mesh.devices.flat)
    shared = shares_step(planned.captured, planned.plan, devices, donate=planned.donates)
    program = shared.compile()
    check_shares(shared, program)
    return step, replace(step, planned=shared, program=program)


def unshared(state: Any, batch: Any) -> Any:
    """The state, with a copy of every array that it holds twice or that the batch holds too.

    A step frees the arrays of its old state. Weights that start as a target network's or as their
    own average are one array until the first step.
    """
    used = {id(x) for x in jax.tree.leaves(batch)}
    leaves, tree = jax.tree.flatten(state)
    for position, leaf in enumerate(leaves):
        if id(leaf) in used:
            leaves[position] = _copied(leaf)
        used.add(id(leaf))
    return jax.tree.unflatten(tree, leaves)


def _copied(leaf: Any) -> Any:
    """A copy of an array; other values get new arrays when they are placed."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if is_of_group(leaf):
        return np.array(whole(leaf))
    return jnp.copy(leaf)


def is_constant(array: Any) -> bool:
    """Whether nobody can change an array, nor the one that it shows."""
    if isinstance(array, jax.Array):
        return not array.is_deleted()
    while isinstance(array, np.ndarray) and not array.flags.writeable:
        array = array.base
    return isinstance(array, bytes | jax.Array)


def _free(old: Any, new: Any) -> None:
    """Frees an array that one device had whole, once it is split."""
    if not isinstance(old, jax.Array) or len(old.sharding.device_set) > 1:
        return
    if new.sharding.shard_shape(new.shape) != new.shape:
        old.delete()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, in which the state is donated and not yet replaced."""
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not callable(handler):
        yield
        return
    interrupts: list[Any] = []

    def remember(*arguments: Any) -> None:
        interrupts.append(arguments)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        handler(*interrupts[0])
