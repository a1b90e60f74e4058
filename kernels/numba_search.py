"""Inner loops of the layer solver on the CPU: exhaustive search over pairs of codes, and scatter of codebook gradients.

Costs are compared as 32-bit integers. LLVM vectorises an integer minimum (a float minimum with NaN rules it does not),
sums of integers are exact, and so every instruction set gives the same codes. Functions release the GIL; the caller
splits rows over threads, and rows do not interact.
"""

import numba
import numpy as np

__all__ = ["pair_argmin", "scatter_add"]

_LARGE = np.int32(2**31 - 1)


@numba.njit(nogil=True, cache=True)
def _fixed_point(costs: np.ndarray, factor: np.float32, limit: np.float32, out: np.ndarray) -> None:
    low = costs[0]
    for i in range(costs.shape[0]):
        low = min(low, costs[i])
    for i in range(costs.shape[0]):
        out[i] = np.int32(min((costs[i] - low) * factor, limit))


@numba.njit(nogil=True, cache=True)
def pair_argmin(
    first: np.ndarray, second: np.ndarray, pairs: np.ndarray, factor: np.float32, limit: np.float32, out: np.ndarray
) -> None:
    """out[r] = argmin over (i, l) of first[r, i] + second[r, l] + pairs[i, l] / factor, each row on its own.

    Args:
        first: costs of the first code, [R, S1] float32.
        second: costs of the second code, [R, S2] float32.
        pairs: interaction costs times `factor`, [S1, S2] int32.
        factor: fixed-point steps per unit of cost.
        limit: cap of a row's fixed-point costs; see `aqlm_tensor.quantizer.search.pair_table`.
        out: result, [R, 2] int64; of equal costs the lowest (i, l) wins.
    """
    rows, size = first.shape
    fixed_first = np.empty((4, size), np.int32)
    fixed_second = np.empty((4, second.shape[1]), np.int32)
    second0, second1, second2, second3 = fixed_second[0], fixed_second[1], fixed_second[2], fixed_second[3]
    best = np.empty(4, np.int32)
    arg = np.empty(4, np.int64)
    for start in range(0, rows, 4):  # four rows share each read of the pair table
        for lane in range(4):
            row = min(start + lane, rows - 1)
            _fixed_point(first[row], factor, limit, fixed_first[lane])
            _fixed_point(second[row], factor, limit, fixed_second[lane])
        best[:] = _LARGE
        arg[:] = 0
        for i in range(size):
            table = pairs[i]
            low0 = low1 = low2 = low3 = _LARGE
            for entry in range(table.shape[0]):
                value = table[entry]
                low0 = min(low0, np.int32(value + second0[entry]))
                low1 = min(low1, np.int32(value + second1[entry]))
                low2 = min(low2, np.int32(value + second2[entry]))
                low3 = min(low3, np.int32(value + second3[entry]))
            low0 = np.int32(low0 + fixed_first[0, i])
            low1 = np.int32(low1 + fixed_first[1, i])
            low2 = np.int32(low2 + fixed_first[2, i])
            low3 = np.int32(low3 + fixed_first[3, i])
            if low0 < best[0]:
                best[0], arg[0] = low0, i
            if low1 < best[1]:
                best[1], arg[1] = low1, i
            if low2 < best[2]:
                best[2], arg[2] = low2, i
            if low3 < best[3]:
                best[3], arg[3] = low3, i
        for lane in range(min(4, rows - start)):
            i = arg[lane]
            out[start + lane, 0] = i
            out[start + lane, 1] = np.argmin(pairs[i] + fixed_second[lane])


@numba.njit(nogil=True, cache=True)
def scatter_add(values: np.ndarray, indices: np.ndarray, out: np.ndarray) -> None:
    """out[indices[n]] += values[n], in order of n.

    Args:
        values: [N, D] float32.
        indices: [N] int64 rows of `out`.
        out: [S, D] float32, added to in place.
    """
    for n in range(indices.shape[0]):
        row = indices[n]
        for d in range(values.shape[1]):
            out[row, d] += values[n, d]
