"""What an AQLM format is: how many codebooks, how large, over which groups of weights.

A scheme is written ``KxNgGoH``: K codebooks of 2^N entries, each entry a tile of H outputs by G inputs.
``gG`` defaults to ``g8`` and ``oH`` to ``o1``; printing always shows ``g`` and shows ``o`` only when it is not 1.
"""

import re
from dataclasses import dataclass

import torch

__all__ = ["AQLMScheme"]

_PATTERN = re.compile(r"(\d+)x(\d+)(?:g(\d+))?(?:o(\d+))?", re.ASCII)
_MAX_NBITS = 16


@dataclass(frozen=True, order=True)
class AQLMScheme:
    """The shape of an additive quantization, independent of any particular layer.

    Attributes:
        num_codebooks: K, the entries summed for each group (at least 1).
        nbits_per_codebook: N, so that a codebook has 2^N entries (1 to 16).
        in_group_size: G, consecutive input features one entry covers (at least 1).
        out_group_size: H, consecutive output features one entry covers (at least 1).

    Raises:
        ValueError: if a field is out of its range.
        TypeError: if a field is not an int.
    """

    num_codebooks: int
    nbits_per_codebook: int
    in_group_size: int = 8
    out_group_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.nbits_per_codebook > _MAX_NBITS:
            raise ValueError(
                f"nbits_per_codebook must be 1 to {_MAX_NBITS} (codes are stored in at most 16 bits), "
                f"got {self.nbits_per_codebook}"
            )

    @classmethod
    def parse(cls, text: "str | AQLMScheme") -> "AQLMScheme":
        """Read ``KxN``, ``KxNgG`` or ``KxNgGoH``, for example ``"2x8g8"``; a scheme is returned as it is.

        Raises:
            ValueError: if the text is not of that form or a number is out of range.
            TypeError: if `text` is neither a string nor a scheme.
        """
        if isinstance(text, AQLMScheme):
            return text
        if not isinstance(text, str):
            raise TypeError(f"a scheme is a string such as '2x8g8' or an AQLMScheme, got {type(text).__name__}")
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"unknown scheme {text!r}: write KxN, KxNgG or KxNgGoH, K codebooks of N bits over groups of G inputs "
                "and H outputs, for example '2x8', '1x16g8' or '8x8g32'"
            )
        codebooks, nbits, in_group, out_group = match.groups()
        try:
            return cls(int(codebooks), int(nbits), int(in_group or 8), int(out_group or 1))
        except ValueError as error:
            raise ValueError(f"unknown scheme {text!r}: {error}") from None

    def __str__(self) -> str:
        out_group = f"o{self.out_group_size}" if self.out_group_size != 1 else ""
        return f"{self.num_codebooks}x{self.nbits_per_codebook}g{self.in_group_size}{out_group}"

    @property
    def codebook_size(self) -> int:
        """Entries per codebook, 2^N."""
        return 1 << self.nbits_per_codebook

    @property
    def codes_dtype(self) -> torch.dtype:
        """The storage type of codes: int8 up to 8 bits, int16 beyond."""
        return torch.int8 if self.nbits_per_codebook <= 8 else torch.int16

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Shape of the codes of an `out_features` x `in_features` weight: [out_groups, in_groups, K]."""
        return (out_features // self.out_group_size, in_features // self.in_group_size, self.num_codebooks)

    @property
    def codebooks_shape(self) -> tuple[int, int, int, int]:
        """Shape of one set of codebooks: [K, 2^N, out_group, in_group]."""
        return (self.num_codebooks, self.codebook_size, self.out_group_size, self.in_group_size)

    def why_not(self, out_features: int, in_features: int) -> str | None:
        """The reason why this scheme's groups do not divide such a weight, or None if they do."""
        if out_features % self.out_group_size:
            return f"out_features {out_features} is not a multiple of the scheme's out_group_size {self.out_group_size}"
        if in_features % self.in_group_size:
            return f"in_features {in_features} is not a multiple of the scheme's in_group_size {self.in_group_size}"
        return None

    def stored_bits(self, out_features: int, in_features: int, *, float_bits: int = 16, partitions: int = 1) -> int:
        """Bits that codes, codebooks and scales of such a weight occupy as stored.

        Codes count at their storage width (12-bit codes occupy 16). `float_bits` is the width of a codebook or scale
        element, `partitions` the number of row partitions with codebooks of their own.
        """
        out_groups, in_groups, codebooks = self.codes_shape(out_features, in_features)
        codes = out_groups * in_groups * codebooks * self.codes_dtype.itemsize * 8
        entries = partitions * codebooks * self.codebook_size * self.out_group_size * self.in_group_size
        return codes + (entries + out_groups) * float_bits

    def bits_per_weight(
        self, out_features: int, in_features: int, *, float_bits: int = 16, partitions: int = 1
    ) -> float:
        """Stored bits per weight of such a layer, codebooks and scales included; nan for an empty one."""
        weights = out_features * in_features
        if weights == 0:
            return float("nan")
        return self.stored_bits(out_features, in_features, float_bits=float_bits, partitions=partitions) / weights
