"""SolverConfig: how much work the layer solver does; the scheme says what is stored, this how hard to look for it."""

import math
from dataclasses import dataclass, fields

__all__ = ["SolverConfig"]


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """Effort and stopping rule of `quantize_layer`; every field is JSON-able.

    Attributes:
        max_rounds: rounds of codebook update and code search after the initialisation, at most (0 keeps the
            initialisation). More rounds lower the error; time grows in proportion.
        relative_tolerance: stop when a round lowers the weighted error by less than this fraction of it (0 to 1).
        kmeans_iterations: iterations of k-means per codebook in the initialisation; a single codebook gets twice as
            many, without data eight times (on the CPU only with up to 256 entries).
        conjugate_gradient_steps: least-squares steps per codebook update; each costs about as much as a product of the
            weight with the Hessian.
        beam_width: codes of one codebook kept when two codebooks are searched jointly. Codebooks of up to 256 entries
            ignore it: all pairs are tried.
        damping: added to the diagonal of the Hessian while the first codes are chosen with error feedback, half as a
            fraction of its mean diagonal, half of each entry. It keeps the factorisation of a singular Hessian defined,
            and much of it trusts later groups less to make up for the errors of earlier ones.

    Raises:
        ValueError: if a field is out of its range.
        TypeError: if a field has the wrong type.
    """

    max_rounds: int = 12
    relative_tolerance: float = 0.0005
    kmeans_iterations: int = 8
    conjugate_gradient_steps: int = 8
    beam_width: int = 8
    damping: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{field.name} must be a number, got {value!r} of type {type(value).__name__}")
            if field.type is int and not isinstance(value, int):
                raise TypeError(f"{field.name} must be an int, got {value!r}")
        for name, low in (
            ("max_rounds", 0),
            ("kmeans_iterations", 0),
            ("conjugate_gradient_steps", 1),
            ("beam_width", 1),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.relative_tolerance < 1:
            raise ValueError(f"relative_tolerance must be in [0, 1), got {self.relative_tolerance}")
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"damping must be positive and finite, got {self.damping}")
