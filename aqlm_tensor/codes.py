"""Codes as stored (signed integers) and as used (indices into a codebook).

Official files wrap indices to signed at 2^(N-1), also 12-bit codes inside int16; plain unsigned values occur in the
wild too. Both mean the same index: the low N bits.
"""

import torch
from torch import Tensor

__all__ = ["check_codes", "codes_to_indices", "indices_to_codes"]


def codes_to_indices(codes: Tensor, nbits: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Indices 0 to 2^nbits - 1 of stored codes: a new tensor of the same shape; the input is left alone.

    Args:
        codes: stored codes, int8 (nbits <= 8) or int16, any shape.
        nbits: bits per codebook index.
        dtype: integer type of the result, wide enough for 2^nbits - 1.
    """
    return codes.to(dtype).bitwise_and((1 << nbits) - 1)


def indices_to_codes(indices: Tensor, nbits: int) -> Tensor:
    """Stored codes of indices 0 to 2^nbits - 1, wrapped to signed at 2^(nbits - 1) as the official converter writes.

    Returns:
        A new int8 (nbits <= 8) or int16 tensor of the same shape; the input is left alone.

    Raises:
        ValueError: if an index is out of range.
    """
    if not indices.is_meta and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= 1 << nbits:
            raise ValueError(f"indices must lie in 0..{(1 << nbits) - 1} for {nbits}-bit codes, got {low}..{high}")
    wide = indices.to(torch.int32)
    signed = wide - ((wide >= 1 << (nbits - 1)).to(torch.int32) << nbits)
    return signed.to(torch.int8 if nbits <= 8 else torch.int16)


def check_codes(codes: Tensor, nbits: int) -> None:
    """Raise unless every stored code denotes one index, -2^(nbits-1) <= code < 2^nbits.

    Raises:
        ValueError: if a code lies outside, naming the range found and the one accepted.
    """
    if codes.is_meta or codes.numel() == 0:
        return
    low, high = (int(bound) for bound in codes.aminmax())
    if low < -(1 << (nbits - 1)) or high >= 1 << nbits:
        raise ValueError(
            f"codes out of range: found {low}..{high}, but {nbits}-bit codes lie in {-(1 << (nbits - 1))}.."
            f"{(1 << nbits) - 1}; were they made for another scheme?"
        )
