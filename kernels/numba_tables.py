"""Tables of partial dot products in float32, and lookups in them by scalar loads.

A column of codes (an input group and a codebook) has a table [entry][lane] of the dot products of the group's inputs
with the codebook's entries; lanes are tokens. A row's code of that column chooses the entry that is added to its sum.
"""

from numba import njit

from aqlm_tensor.kernels.numba_codes import BLOCK_COLUMNS, BLOCK_ROWS
from aqlm_tensor.kernels.numba_parallel import OPTIONS
from aqlm_tensor.kernels.numba_sums import FLOAT
from aqlm_tensor.kernels.numba_vectors import (
    add,
    eight_of,
    float_at,
    fma,
    inner_fma,
    lanes_of,
    load,
    load_bits,
    load_each,
    prefetch,
    splat,
    splat_each,
    store,
    zeros,
)

__all__ = ["ENTRIES", "add_block", "add_columns", "build_table"]

_AHEAD = BLOCK_COLUMNS * BLOCK_ROWS  # bytes from the codes in use to those asked of memory
ENTRIES = 256  # of a table, whatever the number of bits, so that offsets are constants

# Compiled code. `zero` is the zero vector of the tokens' lanes, and carries their number in its type.


@njit(**OPTIONS)
def build_table(table, book, x, zero, size, group) -> None:  # noqa: ANN001
    """Table [entry][lane] of dot products of x [G][lane] with the entries of a book."""
    if lanes_of(zero) == 1:  # book [G][size]; entries are neighbours: 16 at a time
        for entry in range(0, size, 16):
            total = zeros(16)
            for i in range(group):
                value = splat(float_at(x + FLOAT * i), total)
                total = fma(value, load(book + FLOAT * (i * size + entry), total), total)
            store(table + FLOAT * entry, total)
        return
    entry_bytes, whole = FLOAT * lanes_of(zero), group // 8 * 8  # book [size][G]
    for first in range(0, whole, 8):
        values = load_each(x + first * entry_bytes, entry_bytes, eight_of(zero))
        for entry in range(size):
            total = load(table + entry * entry_bytes, zero) if first else zero
            weights = splat_each(book + FLOAT * (entry * group + first), FLOAT, values)
            store(table + entry * entry_bytes, inner_fma(total, weights, values))
    for i in range(whole, group):
        value = load(x + i * entry_bytes, zero)
        for entry in range(size):
            total = load(table + entry * entry_bytes, zero) if i else zero
            weight = splat(float_at(book + FLOAT * (entry * group + i)), zero)
            store(table + entry * entry_bytes, fma(weight, value, total))


@njit(**OPTIONS)
def add_columns(tables, codes, width, first, count, sums, rows, zero) -> None:  # noqa: ANN001
    """Add lookups of `count` columns to the sums of some rows.

    The columns are those from `first` on of a packed block of columns that is `width` wide, and `codes` are its first
    row's, which begins a block of rows.
    """
    for start in range(0, rows, BLOCK_ROWS):
        height = min(BLOCK_ROWS, rows - start)
        place = codes + start * width + first * height
        add_block(tables, place, height, count, sums + start * FLOAT * lanes_of(zero), height, zero)


@njit(**OPTIONS)
def add_block(tables, codes, pitch, columns, sums, rows, zero) -> None:  # noqa: ANN001
    """Add one lookup from each column's table to every row's sum; columns of codes are `pitch` bytes apart."""
    entry_bytes = FLOAT * lanes_of(zero)
    table_bytes, whole = ENTRIES * entry_bytes, columns // 4 * 4
    ahead = codes + _AHEAD
    for _ in range(0, rows // 4 * 4, 4):
        prefetch(ahead)
        ahead += 4 * columns
        totals = load(sums, zero), load(sums + entry_bytes, zero)
        others = load(sums + 2 * entry_bytes, zero), load(sums + 3 * entry_bytes, zero)
        table, place = tables, codes
        for _ in range(0, whole, 4):
            totals, others = _look_up_four_rows(totals, others, table, place, zero)
            totals, others = _look_up_four_rows(totals, others, table + table_bytes, place + pitch, zero)
            totals, others = _look_up_four_rows(totals, others, table + 2 * table_bytes, place + 2 * pitch, zero)
            totals, others = _look_up_four_rows(totals, others, table + 3 * table_bytes, place + 3 * pitch, zero)
            table, place = table + 4 * table_bytes, place + 4 * pitch
        for _ in range(whole, columns):
            totals, others = _look_up_four_rows(totals, others, table, place, zero)
            table, place = table + table_bytes, place + pitch
        store(sums, totals[0])
        store(sums + entry_bytes, totals[1])
        store(sums + 2 * entry_bytes, others[0])
        store(sums + 3 * entry_bytes, others[1])
        sums, codes = sums + 4 * entry_bytes, codes + 4
    for _ in range(rows // 4 * 4, rows):
        total = load(sums, zero)
        for column in range(columns):
            entry = tables + column * table_bytes + entry_bytes * load_bits(codes + column * pitch, 8)
            total = add(total, load(entry, zero))
        store(sums, total)
        sums, codes = sums + entry_bytes, codes + 1


@njit(**OPTIONS)
def _look_up_four_rows(totals, others, table, codes, zero):  # noqa: ANN001, ANN202
    """Add the entries that the four bytes at `codes` choose from a table, each to its row's total."""
    entry_bytes, word = FLOAT * lanes_of(zero), load_bits(codes, 32)
    first = add(totals[0], load(table + entry_bytes * (word & 255), zero))
    second = add(totals[1], load(table + entry_bytes * (word >> 8 & 255), zero))
    third = add(others[0], load(table + entry_bytes * (word >> 16 & 255), zero))
    return (first, second), (third, add(others[1], load(table + entry_bytes * (word >> 24), zero)))
