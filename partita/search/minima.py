"""The least of an array, for compiled code.

LLVM makes no vector instructions of a minimum over a loop, and a conditional store of a minimum in
its place. So a minimum has four parts here, and loops over arrays write minima into other arrays.
"""

import numpy as np
from numba import njit


@njit(cache=True, fastmath={"nnan", "nsz"})
def least_of(values):
    """The least of an array, infinite without entries."""
    whole = len(values) // 4 * 4
    first = second = third = fourth = np.inf
    for i in range(0, whole, 4):
        first = min(first, values[i])
        second = min(second, values[i + 1])
        third = min(third, values[i + 2])
        fourth = min(fourth, values[i + 3])
    for i in range(whole, len(values)):
        first = min(first, values[i])
    return min(min(first, second), min(third, fourth))
