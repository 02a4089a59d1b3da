"""The step on one microbatch of its batch, and whether its gradients can be averaged."""

from __future__ import annotations

from partita.capture.jax_functions import Captured
from partita.errors import PlanError
from partita.execute.piece_text import scalar_constants
from partita.plans.plan import Plan


def microbatch_of(captured: Captured, plan: Plan) -> Captured:
    """The step on one microbatch, captured again.

    PlanError if it has other operators than the step on the whole batch, or if its loss is not a
    mean over the samples.
    """
    if plan.microbatches == 1:
        return captured
    graph = captured.graph
    if captured.at_batch_size is None or not graph.batch_size:
        raise PlanError(
            f"The batch of {graph.name} has no samples to cut into {plan.microbatches} "
            "microbatches. Use a plan with 1 microbatch."
        )
    size = graph.batch_size // plan.microbatches
    part = captured.at_batch_size(size)
    names = [operator.name for operator in graph.operators]
    if [operator.name for operator in part.graph.operators] != names:
        raise PlanError(
            f"{graph.name} has other operators on batches of {size} than on batches of "
            f"{graph.batch_size}, so the plan does not say where they run. "
            "Use a plan with 1 microbatch."
        )
    if not _has_means(captured, part, plan.microbatches):
        raise PlanError(
            f"The loss of {graph.name} is not a mean over the samples: no number in the program "
            "depends on the size of the batch. The mean of microbatches would be another "
            "gradient. Divide the loss by the number of samples, or use a plan with 1 microbatch."
        )
    return part


def _has_means(whole: Captured, part: Captured, microbatches: int) -> bool:
    """Whether a number in the program is `microbatches` times larger or smaller for the whole
    batch than for a microbatch: the divisor of a mean.
    """
    of_whole = set(scalar_constants(whole.text.mlir_module_serialized))
    # A division by 1 is no longer in the program.
    of_part = {*scalar_constants(part.text.mlir_module_serialized), 1.0}
    for value in of_whole - of_part:
        for scaled in (value / microbatches, value * microbatches):
            if any(abs(scaled - other) <= 1e-5 * abs(other) for other in of_part):
                return True
    return False
