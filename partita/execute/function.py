"""A JAX training step that runs by a plan, called like the function that it wraps.

The first call of every new set of shapes is captured, planned, compiled and checked. Later sets
of shapes use the first plan, fitted to them. A call moves the state to the plan's shardings if it
is elsewhere, and puts the batch there every time.
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
import jax.core

from partita.capture.functions import Call, CapturedCall, call_of, capture_call
from partita.capture.jax_functions import Captured
from partita.capture.targets import CaptureTarget
from partita.errors import CaptureError, MemoryBudgetError, PartitaError
from partita.execute import members
from partita.execute.devices import return_freed_memory
from partita.execute.process_arrays import digest
from partita.execute.processes import alone, same
from partita.execute.program import RunnableStep, runnable_step
from partita.execute.steps import StepRunner, settled
from partita.execute.verify import Verification, Verifier, check_compiled
from partita.management.contract import Manager
from partita.management.managers import ManageOptions, ManagerFactory, new_manager
from partita.plans.adapt import fit_plan
from partita.plans.pipeline import is_pipeline
from partita.plans.plan import Plan
from partita.units import is_whole_number

Planner = Callable[..., Plan]
"""Captured step -> plan. A MemoryBudgetError as second argument asks for a plan that needs less
memory than the one that the compiler refused."""
MANY_SHAPES = 5
"""Shapes of batches from which a program is said to compile often."""
REFUSALS = 3
"""Maximum number of plans that the compiler refuses before Partita gives up."""


def shapes_sentence(name: str, count: int) -> str:
    """A sentence once a program has been compiled for many shapes of batches; else ""."""
    if count != MANY_SHAPES:
        return ""
    return (
        f"'{name}' has had batches of {count} shapes, and each is compiled anew. Pad batches to a "
        "few lengths, and leave out a smaller last one."
    )


def positions_of(static_argnums: Any) -> tuple[int, ...]:
    """The positions of static arguments, of one number or several, as for `jax.jit`."""
    try:
        given = (static_argnums,) if is_whole_number(static_argnums) else tuple(static_argnums)
    except TypeError:
        given = (static_argnums,)
    if not all(is_whole_number(position) for position in given):
        raise PartitaError(
            f"static_argnums={static_argnums!r} are no positions of arguments: give a whole number "
            "or a tuple of them, as for jax.jit."
        )
    return given


def is_split(plan: Plan) -> bool:
    """Whether a plan differs from a run on one device."""
    return plan.is_split or is_pipeline(plan)


def compiled_in_turn(
    captured: Captured,
    plan: Plan,
    planner: Planner,
    check: Callable[[RunnableStep, Any], Verification],
    warn: Callable[[str], None],
    donate: bool = True,
) -> tuple[RunnableStep | None, Any, Plan, Verification | None]:
    """(planned step, its program, the plan, its verification) of the first plan that fits.

    A plan fits if the compiler's memory figure does. The planned step is None for a plan that
    amounts to one device, unless processes were lost or came back: all go on with planned steps
    then. Raises a MemoryBudgetError after `REFUSALS` new plans.
    """
    for refusals in range(REFUSALS + 1):
        if not is_split(plan) and not members.generation():
            return None, None, plan, None
        planned = runnable_step(captured, plan, donate=donate)
        program = planned.compile()
        try:
            verified = check(planned, program)
        except MemoryBudgetError as error:
            if error.excess is None or refusals == REFUSALS:
                raise
            plan = planner(captured, error)
            problem = str(error).split(". Use")[0]
            warn(f"{problem}. Planned again within that limit.")
        else:
            return_freed_memory(verified.peak_bytes, verified.capacity_bytes)
            return planned, program, plan, verified
    raise AssertionError("the loop returns or raises")


def same_everywhere(
    captured: Captured,
    plan: Plan,
    values: Any,
) -> None:
    """Compares the step, the plan, and the weights and batch of processes that train together.

    Called before they compile a step. Raises a ProcessError for a difference.
    """
    if alone():
        return
    same(
        "Training steps",
        digest(f"{captured.graph}{captured.graph.instructions}"),
        "Run the same script with the same arguments in all processes.",
    )
    same(
        "Plans",
        digest(str(plan)),
        "Give all processes the same plan.",
    )
    same(
        "Weights and batch of the first step",
        digest(values),
        "Read the same batches in all processes, and seed random numbers: "
        "keras.utils.set_random_seed(0).",
    )


def no_manager(options: ManageOptions | None = None) -> Manager | None:
    """A manager for a training that asks for one."""
    return None if options is None else new_manager(options, None)


@dataclass
class Session:
    """Defaults of a command that runs a script, for all steps that the script makes parallel."""

    planner: Planner
    say: Callable[[str], None]
    started: list[Any] = field(default_factory=list)
    """Steps and models that the script itself made parallel."""
    target: CaptureTarget | None = None
    """The platform to capture steps for, by default that of the local devices."""
    manage: ManagerFactory = no_manager
    """Gives a new manager for a training; None without --manage."""
    verifier: Verifier = check_compiled
    """Checks each compiled step before it runs."""


_sessions: list[Session] = []


@contextmanager
def running(session: Session) -> Iterator[Session]:
    """A block in which `current()` is this session."""
    _sessions.append(session)
    try:
        yield session
    finally:
        _sessions.remove(session)


def current() -> Session | None:
    """The session of the command that runs this script, if there is one."""
    return _sessions[-1] if _sessions else None


def session_manager() -> Manager | None:
    """A new manager for a training, if the command that runs this script manages it."""
    session = current()
    return session.manage() if session is not None else None


@dataclass(frozen=True)
class _Compiled:
    """The program for one set of shapes."""

    call: CapturedCall
    planned: RunnableStep | None
    """None if the step runs on one device, as JAX runs it."""
    program: Any


class ParallelStep:
    """A training step that is split over devices.

    `plan` is the plan of the first call, and `steps` the compiled steps for inspection.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        planner: Planner,
        *,
        static_argnums: int | Sequence[int] = (),
        donate: bool | None = None,
        say: Callable[[str], None] | None = None,
        target: CaptureTarget | None = None,
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function = function
        self.planner = planner
        self.static = positions_of(static_argnums)
        self.say = say
        self.target = target
        self._donate = donate
        self._numbers_static = False
        self.runner = StepRunner(self.name)
        self.runner.manager = session_manager()
        self.verified: Verification | None = None
        """The compiler's figures of the first planned step."""
        self._last_start: float | None = None
        self._intervals: deque[float] = deque(maxlen=1000)
        """Time from one call to the next one, seconds."""

    @property
    def name(self) -> str:
        """Name of the wrapped function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def plan(self) -> Plan | None:
        """The plan of the first call, or the one that a manager has changed it for."""
        return self.runner.plan

    @property
    def steps(self) -> dict[Any, _Compiled]:
        """The compiled steps, by what distinguishes calls."""
        return self.runner.steps

    @property
    def step_seconds(self) -> float | None:
        """Measured seconds per step; None before the second call.

        The median time from one call to the next one of the same shapes.
        """
        return median(self._intervals) if self._intervals else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, step = self._step(args, kwargs)
        start = time.perf_counter()
        if self._last_start is not None:
            self._intervals.append(start - self._last_start)
        self._last_start = start
        if step.planned is None and not step.call.roles.in_place:
            return step.program(*args, **kwargs)
        state, batch = step.call.split(call)
        if step.planned is None:
            outputs, state = settled(step.program(state, batch))
        else:
            try:
                outputs, state = self.runner.attempt(
                    state, lambda state: self.runner.run(call.key, state, batch)
                )
            except TypeError:
                self._check_values(args, kwargs)
                raise
        step.call.update_in_place(call, args, kwargs, state)
        return step.call.result(outputs, state)

    def _check_values(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """PartitaError inside a transformation of JAX: a compiled step cannot be traced."""
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise PartitaError(
                f"The parallel step '{self.name}' is called inside jax.jit, grad, vmap or scan, "
                "and it is compiled already. Transform the function first, and give the result to "
                "partita.parallelize."
            )

    def prepare(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Plan:
        """The plan for calls like this one, after compilation and check.

        Arrays may be shapes.
        """
        self._step(args, kwargs or {})
        assert self.plan is not None
        return self.plan

    def donates(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        in_place: bool,
    ) -> bool:
        """Whether a step consumes the old state.

        By the `donate` argument, else by the function's own `jax.jit`, else if it is possible.
        """
        if self._donate is not None:
            return self._donate
        if not in_place and hasattr(self.function, "trace"):
            infos = self.function.trace(*args, **kwargs).args_info
            donated = jax.tree.map(lambda info: info.donated, infos)
            return any(jax.tree.leaves(donated))
        return in_place or not hasattr(self.function, "lower")

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        return call_of(
            self.function,
            args,
            kwargs,
            self.static,
            self._numbers_static,
        )

    def _step(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Call, _Compiled]:
        """The call, and the program for its shapes."""
        call = self._call(args, kwargs)
        step = self.steps.get(call.key)
        if step is None:
            with self.runner.compiling():
                step = self._compile(call, args, kwargs)
            self._last_start = None
            sentence = shapes_sentence(self.name, len(self.steps) + 1)
            if sentence:
                self._say(sentence)
            # The capture may have made numbers static, which changes the call's key.
            call = self._call(args, kwargs)
            self.steps[call.key] = step
        return call, step

    def _compile(
        self,
        call: Call,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> _Compiled:
        captured_call = self._capture(call, args, kwargs)
        captured = captured_call.captured
        in_place = bool(captured_call.roles.in_place)
        plan = self._plan(captured)
        donate = self.donates(args, kwargs, in_place)
        state, batch = captured_call.split(call)
        same_everywhere(captured, plan, (state, batch))

        def verify(planned: RunnableStep, program: Any) -> Verification:
            session = current()
            verifier = session.verifier if session is not None else check_compiled
            return verifier(planned, program, state, batch)

        planned, program, plan, verified = compiled_in_turn(
            captured,
            plan,
            self.planner,
            verify,
            self._say,
            donate,
        )
        if self.plan is None:
            self.runner.plan = plan
            self.verified = verified
            for line in str(verified or "").splitlines():
                self._say(line)
        if planned is None and in_place:
            program = jax.jit(captured.text.call, donate_argnums=0 if donate else ())
        elif planned is None:
            program = self._plain_program(call)
        return _Compiled(captured_call, planned, program)

    def _plan(self, captured: Captured) -> Plan:
        """The first call's plan, fitted to the captured step; for the first call, a new plan."""
        if self.plan is None:
            return self.planner(captured)
        return fit_plan(self.plan, captured.graph)

    def _plain_program(self, call: Call) -> Callable[..., Any]:
        """The function under `jax.jit`: its own one, or a new one."""
        if hasattr(self.function, "lower"):
            return self.function
        return jax.jit(self.function, static_argnums=self._static_arguments(call))

    def _capture(
        self,
        call: Call,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> CapturedCall:
        """The captured call.

        Python numbers are arrays as under `jax.jit`, unless the step cannot be traced with them.
        """
        try:
            return capture_call(self.function, call, self.target)
        except CaptureError:
            static_call = call_of(
                self.function,
                args,
                kwargs,
                self.static,
                True,
            )
            if static_call.dynamic == call.dynamic:
                raise
            try:
                captured_call = capture_call(self.function, static_call, self.target)
            except CaptureError:
                captured_call = None
            # Raises the first error: the second one speaks of a call that the user did not make.
            if captured_call is None:
                raise
            self._numbers_static = True
            return captured_call

    def _static_arguments(self, call: Call) -> tuple[int, ...]:
        """Positions of arguments without an array in them."""
        dynamic = {call.argument[i] for i in call.dynamic}
        arrayless = [position for position in call.argument if position not in dynamic]
        return tuple(sorted({*self.static, *arrayless}))

    def _say(self, line: str) -> None:
        if self.say is not None:
            self.say(line)
