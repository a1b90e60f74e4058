"""AQLMWeightConfig: what `quantize_` does to a layer; the presets; and torchao's registration of it.

The config is a torchao `AOBaseConfig`, so `torchao.quantization.quantize_` and `FqnToConfig` accept it, too. Its fields
are JSON-able through torchao's `config_to_dict` and `config_from_dict`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig

from aqlm_tensor.quantizer.solver import SolverConfig
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import FLOATS

__all__ = [
    "AQLMWeightConfig",
    "SolverConfig",
    "aqlm_1x8",
    "aqlm_1x16",
    "aqlm_1x16g16",
    "aqlm_2x8",
    "aqlm_4x8",
    "aqlm_8x8",
]


@dataclass
class AQLMWeightConfig(AOBaseConfig):
    """Quantize the weights of linear layers to AQLM.

    Attributes:
        scheme: codebooks and groups, for example "2x8g8" (two codebooks of 8 bits over groups of 8 inputs).
        step: None quantizes at once. "prepare" attaches observers that collect X^T X of each layer's inputs while you
            run your data through the model; "convert" then quantizes with what they saw.
        solver: the effort spent on each layer.
        seed: of the random initialisation; the same seed gives the same codes.
        codebook_dtype: dtype of codebooks and scales (float32, float16 or bfloat16), which becomes the weight's; None
            keeps the weight's own.
        on_incompatible: "raise" or "skip" (leave dense) a layer whose sizes the groups do not divide, or that would
            become no smaller than dense.
        on_unobserved: at "convert", "raise", "skip" (leave dense) or quantize "data_free" a layer that saw no data.
            If no layer saw any, that is always an error.

    Raises:
        ValueError: for an unknown scheme or option, naming the accepted ones.
        TypeError: for a field of the wrong type.
    """

    quant_method: ClassVar[str] = "aqlm"  # by which Transformers finds the quantizer for a config that it is given

    scheme: str
    step: Literal["prepare", "convert"] | None = field(default=None, kw_only=True)
    solver: SolverConfig = field(default_factory=SolverConfig, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    codebook_dtype: torch.dtype | None = field(default=None, kw_only=True)
    on_incompatible: Literal["raise", "skip"] = field(default="raise", kw_only=True)
    on_unobserved: Literal["raise", "skip", "data_free"] = field(default="raise", kw_only=True)

    def __post_init__(self) -> None:
        self.scheme = str(AQLMScheme.parse(self.scheme))
        _check_choice("step", self.step, (None, "prepare", "convert"))
        _check_choice("on_incompatible", self.on_incompatible, ("raise", "skip"))
        _check_choice("on_unobserved", self.on_unobserved, ("raise", "skip", "data_free"))
        if not isinstance(self.solver, SolverConfig):
            raise TypeError(f"solver must be a SolverConfig, got {type(self.solver).__name__}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        if self.codebook_dtype is not None and self.codebook_dtype not in FLOATS:
            raise ValueError(
                f"codebook_dtype must be None, float32, float16 or bfloat16 (of torch), got {self.codebook_dtype!r}"
            )


def _check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def aqlm_1x16(**fields: Any) -> AQLMWeightConfig:
    """1x16g8: one codebook of 65536 entries, 2 bits a weight; the most accurate and the slowest to decode.

    Takes the other fields of `AQLMWeightConfig` as keywords. Its codebook occupies 1 MB per layer (16-bit entries).
    """
    return AQLMWeightConfig("1x16g8", **fields)


def aqlm_2x8(**fields: Any) -> AQLMWeightConfig:
    """2x8g8: two codebooks of 256 entries, 2 bits a weight, fast to decode.

    Takes the other fields of `AQLMWeightConfig` as keywords.
    """
    return AQLMWeightConfig("2x8g8", **fields)


def aqlm_1x8(**fields: Any) -> AQLMWeightConfig:
    """1x8g8: one codebook of 256 entries, 1 bit a weight. Takes the other fields of `AQLMWeightConfig` as keywords."""
    return AQLMWeightConfig("1x8g8", **fields)


def aqlm_4x8(**fields: Any) -> AQLMWeightConfig:
    """4x8g8: four codebooks of 256 entries, 4 bits a weight.

    Takes the other fields of `AQLMWeightConfig` as keywords.
    """
    return AQLMWeightConfig("4x8g8", **fields)


def aqlm_8x8(**fields: Any) -> AQLMWeightConfig:
    """8x8g32: eight codebooks of 256 entries over groups of 32 inputs, 2 bits a weight.

    Takes the other fields of `AQLMWeightConfig` as keywords.
    """
    return AQLMWeightConfig("8x8g32", **fields)


def aqlm_1x16g16(**fields: Any) -> AQLMWeightConfig:
    """1x16g16: one codebook of 65536 entries over groups of 16 inputs, 1 bit a weight.

    Takes the other fields of `AQLMWeightConfig` as keywords.
    """
    return AQLMWeightConfig("1x16g16", **fields)


# torchao's `config_from_dict` finds classes by name in these modules only
ALLOWED_AO_MODULES.add(__name__)
