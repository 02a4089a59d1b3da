"""A JAX training step that runs as planned: called like the function that it was made from.

The first call of every new set of shapes is captured, planned (or the first plan is fitted to it), compiled and checked. State
that is not where the plan wants it is moved there; the batch is put there at every call.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import jax

from partita.capture.functions import Call, CapturedCall, call_of, capture_call
from partita.capture.jax_functions import Captured
from partita.errors import CaptureError, MemoryBudgetError
from partita.execute.processes import alone, digest, put, same, together
from partita.execute.program import PlannedStep, planned_step
from partita.execute.verify import Verification, check_compiled
from partita.plans.adapt import fit_plan
from partita.plans.plan import Plan

Planner = Callable[..., Plan]
"""Captured step -> plan; with a MemoryBudgetError as second argument, the plan to try after one that the compiler refused."""
REFUSALS = 3
"""Plans that the compiler may refuse before giving up."""


def settled(values: Any) -> Any:
    """The values, on a CPU when they are done.

    There a device is a thread of one pool. Programs with collectives that overlap take all threads and wait for each other
    until XLA ends the process (seen on jax 0.10.2 within 100 steps, with `keras.distribution` too).
    """
    return jax.block_until_ready(values) if jax.default_backend() == "cpu" else values


def is_split(plan: Plan) -> bool:
    """Whether a plan does anything that one device does not."""
    return bool(plan.storage) or any(plan.choices.values())


def compiled_in_turn(
    captured: Captured,
    plan: Plan,
    planner: Planner,
    check: Callable[[PlannedStep, Any], Verification],
    warn: Callable[[str], None],
    donate: bool = True,
) -> tuple[PlannedStep | None, Any, Plan, Verification | None]:
    """(planned step, its program, the plan, what was verified): of the first plan that the compiler's account of memory allows.

    No planned step where the plan comes down to one device.
    """
    for refusals in range(REFUSALS + 1):
        if not is_split(plan):
            return None, None, plan, None
        planned = planned_step(captured, plan, donate=donate)
        program = planned.lower().compile()
        try:
            return planned, program, plan, check(planned, program)
        except MemoryBudgetError as error:
            if error.excess is None or refusals == REFUSALS:
                raise
            plan = planner(captured, error)
            warn(f"{str(error).split('. Use')[0]}. Planned again with that in mind.")
    raise AssertionError("the loop returns or raises")


def same_everywhere(captured: Captured, plan: Plan, values: Any) -> None:
    """Compares what processes that train together must have in common before they compile a step; ProcessError where they have not."""
    if alone():
        return
    same(
        "The training step",
        digest(f"{captured.graph}{captured.graph.instructions}"),
        "Run the same script, with the same arguments, in all.",
    )
    same("The plan", digest(str(plan)), "Give all of them the same plan.")
    hint = "Read the same batches in all of them, and draw what is random from a seed: keras.utils.set_random_seed(0)."
    same("What the first step reads (weights and batch)", digest(values), hint)


@dataclass
class Session:
    """What a command that runs a script wants of all that the script makes parallel, where the script itself does not say."""

    planner: Planner
    say: Callable[[str], None]
    started: list[Any] = field(default_factory=list)
    """What the script made parallel itself: steps, and how models train."""


_session: list[Session] = []


@contextmanager
def running(session: Session) -> Iterator[Session]:
    """Inside, `current()` is this session."""
    _session.append(session)
    try:
        yield session
    finally:
        _session.remove(session)


def current() -> Session | None:
    """The session of the command that runs this script, if there is one."""
    return _session[-1] if _session else None


@dataclass(frozen=True)
class _Compiled:
    call: CapturedCall
    planned: PlannedStep | None
    """None where the step runs on one device, as JAX runs it."""
    program: Any


class ParallelStep:
    """A training step split over devices. `plan` is what it does; `lower`-like inspection is in `steps`."""

    def __init__(
        self,
        function: Callable[..., Any],
        planner: Planner,
        *,
        static_argnums: Sequence[int] = (),
        donate: bool | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function, self.planner, self.static, self.say = (
            function,
            planner,
            tuple(static_argnums),
            say,
        )
        self._donate = donate
        self._numbers_static = False
        self.plan: Plan | None = None
        self.verified: Verification | None = None
        """What the compiler said of the first planned step."""
        self.steps: dict[Any, _Compiled] = {}
        self._placed: dict[int, Any] = {}
        """The leaves of the state that the last step gave back, by identity: they are where they belong."""
        self._began: float | None = None
        self._took: deque[float] = deque(maxlen=1000)

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def step_seconds(self) -> float | None:
        """Measured seconds per step: the median time from one call to the next one of the same shapes; None before the second."""
        return median(self._took) if self._took else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, step = self._step(args, kwargs)
        before, self._began = self._began, time.perf_counter()
        if before is not None:
            self._took.append(self._began - before)
        if step.planned is None and not step.call.roles.in_place:
            return step.program(*args, **kwargs)
        state, batch = step.call.split(call)
        if step.planned is not None:
            where = step.planned.state_shardings
            state = [
                x if id(x) in self._placed else put(x, s) for x, s in zip(state, where, strict=True)
            ]
            batch = step.planned.place_batch(batch)
        with together("a step"):
            outputs, state = settled(step.program(state, batch))
        self._placed = {id(x): x for x in state}
        step.call.update_in_place(call, args, kwargs, state)
        return step.call.result(outputs, state)

    def prepare(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Plan:
        """Plans, compiles and checks for calls like this one; arrays may be shapes. The plan."""
        self._step(args, kwargs or {})
        assert self.plan is not None
        return self.plan

    def donates(self, args: Sequence[Any], kwargs: dict[str, Any], in_place: bool) -> bool:
        """Whether the old state is gone after a step: as said, else as the function's own `jax.jit` says, else so if it can be."""
        if self._donate is not None:
            return self._donate
        if not in_place and hasattr(self.function, "trace"):
            return any(
                jax.tree.leaves(
                    jax.tree.map(
                        lambda info: info.donated, self.function.trace(*args, **kwargs).args_info
                    )
                )
            )
        return in_place or not hasattr(self.function, "lower")

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        return call_of(self.function, args, kwargs, self.static, self._numbers_static)

    def _step(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Call, _Compiled]:
        call = self._call(args, kwargs)
        found = self.steps.get(call.key)
        if found is None:
            found, self._began = self._compile(call, args, kwargs), None
            call = self._call(args, kwargs)
            self.steps[call.key] = found
        return call, found

    def _compile(self, call: Call, args: Sequence[Any], kwargs: dict[str, Any]) -> _Compiled:
        captured_call = self._capture(call, args, kwargs)
        captured, in_place = captured_call.captured, bool(captured_call.roles.in_place)
        plan = self.planner(captured) if self.plan is None else fit_plan(self.plan, captured.graph)
        donate = self.donates(args, kwargs, in_place)
        same_everywhere(captured, plan, call.arrays)
        planned, program, plan, verified = compiled_in_turn(
            captured, plan, self.planner, check_compiled, self._say, donate
        )
        if self.plan is None:
            self.plan, self.verified = plan, verified
            for line in str(verified or "").splitlines():
                self._say(line)
        if planned is None and in_place:
            program = jax.jit(captured.text.call, donate_argnums=0 if donate else ())
        elif planned is None:
            jitted = hasattr(self.function, "lower")
            program = (
                self.function
                if jitted
                else jax.jit(self.function, static_argnums=self._static_arguments(call))
            )
        return _Compiled(captured_call, planned, program)

    def _capture(self, call: Call, args: Sequence[Any], kwargs: dict[str, Any]) -> CapturedCall:
        """The captured call. Python numbers are arrays as under `jax.jit`, unless the step cannot be traced so."""
        try:
            return capture_call(self.function, call)
        except CaptureError:
            without = call_of(self.function, args, kwargs, self.static, True)
            if without.dynamic == call.dynamic:
                raise
            try:
                found = capture_call(self.function, without)
            except CaptureError:
                found = None
            if found is None:
                raise
            self._numbers_static = True
            return found

    def _static_arguments(self, call: Call) -> tuple[int, ...]:
        """Positions of arguments without an array in them."""
        dynamic = {call.argument[i] for i in call.dynamic}
        return tuple(sorted({*self.static, *(a for a in call.argument if a not in dynamic)}))

    def _say(self, line: str) -> None:
        if self.say is not None:
            self.say(line)
