"""The step on one microbatch of its batch, and whether its gradients can be averaged."""

from __future__ import annotations

from itertools import chain

from partita.capture.jax_functions import Captured
from partita.errors import PlanError
from partita.execute.piece_text import constant_operands, other_numbers
from partita.plans.phases import DataFlow, scalars_of_step
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


def numbers_of_step(
    whole: Captured, part: Captured, flow: DataFlow
) -> dict[tuple[int, int], float]:
    """(Statement of the step on a microbatch, operand) -> the number there on the whole batch, for
    scalars that change once per step: a counter of samples adds those of the batch.
    """
    once = scalars_of_step(flow)
    if whole is part or not once:
        return {}
    numbers = other_numbers(whole.text.mlir_module_serialized, part.text.mlir_module_serialized)
    return {place: number for place, number in numbers.items() if place[0] in once}


def _has_means(whole: Captured, part: Captured, microbatches: int) -> bool:
    """Whether an instruction has a number that is `microbatches` times larger or smaller for the
    whole batch than for a microbatch: the divisor of a mean.

    A program of other instructions for a microbatch counts as one: a division by 1 is left out.
    """
    of_whole = constant_operands(whole.text.mlir_module_serialized)
    of_part = constant_operands(part.text.mlir_module_serialized)
    if [len(numbers) for numbers in of_whole] != [len(numbers) for numbers in of_part]:
        return True
    numbers_of_whole = chain.from_iterable(numbers.values() for numbers in of_whole)
    numbers_of_part = chain.from_iterable(numbers.values() for numbers in of_part)
    for large, small in zip(numbers_of_whole, numbers_of_part, strict=True):
        if not isinstance(large, float):
            continue
        for scaled in (large / microbatches, large * microbatches):
            if large != small and abs(scaled - small) <= 1e-5 * abs(small):
                return True
    return False
