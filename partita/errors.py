"""What Partita raises when the user is wrong: one clear sentence that says what was given, what is needed and what to
write instead. A mistake of ours is an assertion, never one of these."""


class PartitaError(Exception):
    """A mistake that the user can mend; catch this one to catch them all."""


class MachineError(PartitaError):
    """A machine that is described wrongly, is not known, or cannot do what is asked of it."""


class PlanError(PartitaError):
    """A plan that does not fit its graph or its machine."""


class CaptureError(PartitaError):
    """A program that cannot be captured."""


class MemoryBudgetError(PartitaError):
    """A plan, or every plan, that needs more memory than the machine has.

    `excess` is how many times its predicted peak a plan needs by the compiler's account; None where no compiler was asked.
    """

    def __init__(self, sentence: str, excess: float | None = None) -> None:
        super().__init__(sentence)
        self.excess = excess


class ProcessError(PartitaError):
    """Processes that train together do not: one has not come, or does something else."""


class LostProcessError(ProcessError):
    """A process that trained with this one is gone."""


class GraphError(PartitaError):
    """A graph to train on that is wrong in itself, or a file that does not hold one."""
