"""Exceptions for mistakes of the user.

A message states the problem, then the fix. Our own mistakes are assertions instead.
"""

INTERRUPTED = 130
"""Exit code of a command, a script or a process that Ctrl-C has ended."""


class PartitaError(Exception):
    """Base of all exceptions that Partita raises for mistakes of the user."""

    _keras_call_info_injected = True
    """Keras adds the call of its layer to other errors, in paragraphs and colours."""


class MachineError(PartitaError):
    """A machine that is unknown, wrongly described, or too small for the request."""


class PlanError(PartitaError):
    """A plan that does not fit its graph or its machine."""


class CaptureError(PartitaError):
    """A program that cannot be captured."""


class MemoryBudgetError(PartitaError):
    """A plan, or all plans, that need more memory than the machine has."""

    def __init__(self, sentence: str, excess: float | None = None) -> None:
        """`excess`: the compiler's peak over the predicted peak, None without compiler."""
        super().__init__(sentence)
        self.excess = excess


class CompilerError(PartitaError):
    """A compiler that is missing, does not know a machine, or does not compile a program."""


class ProcessError(PartitaError):
    """Training processes that disagree: one is missing, or does something else."""


class LostProcessError(ProcessError):
    """A training process that disappeared."""

    exit_code = 75
    """Exit code of a process that stops because another one is lost."""


class GraphError(PartitaError):
    """A graph for training that is inconsistent, or a file that holds none."""
