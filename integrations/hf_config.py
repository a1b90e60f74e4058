"""AqlmConfig: Transformers' quantization config for AQLM, with what plain Transformers would drop.

It takes the place of the class of the same name in Transformers. The base fields mean the same; `aqlm_tensor` holds the
schemes of layers that differ, and, for a dense model that is quantized while it loads, how to quantize it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Self

import transformers

from aqlm_tensor.checkpoint_config import SCHEME_FIELDS, CheckpointConfig, parse_section, quantization_config
from aqlm_tensor.config import AQLMWeightConfig, SolverConfig
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["AqlmConfig"]

_STORED = ("format_version", "schemes")
_ON_THE_FLY = ("solver", "seed", "on_incompatible")


class AqlmConfig(transformers.AqlmConfig):
    """How a model is, or is to be, quantized.

    Args:
        in_group_size: G, inputs per group.
        out_group_size: H, outputs per group.
        num_codebooks: K.
        nbits_per_codebook: N, bits per code.
        linear_weights_not_to_quantize: names of weights (or their layers) that stay dense.
        aqlm_tensor: "schemes", a dictionary from layer names to schemes such as "3x8g8" for layers that differ; and for
            quantizing a dense model while it loads "solver" (fields of SolverConfig), "seed" and "on_incompatible"
            ("raise" or "skip"), which are not saved.
        kwargs: ignored, as Transformers does.

    Raises:
        ValueError: for numbers that make no scheme, or unknown entries of `aqlm_tensor`.
    """

    def __init__(
        self,
        in_group_size: int = 8,
        out_group_size: int = 1,
        num_codebooks: int = 1,
        nbits_per_codebook: int = 16,
        linear_weights_not_to_quantize: list[str] | None = None,
        aqlm_tensor: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_group_size, out_group_size, num_codebooks, nbits_per_codebook, linear_weights_not_to_quantize, **kwargs
        )
        self.aqlm_tensor = dict(aqlm_tensor or {})
        unknown = sorted(set(self.aqlm_tensor) - {*_STORED, *_ON_THE_FLY})
        if unknown:
            raise ValueError(f"unknown entries {unknown} of aqlm_tensor: accepted are {[*_STORED, *_ON_THE_FLY]}")
        self.parsed()

    @classmethod
    def of(cls, config: Any) -> Self:
        """This class's form of an AQLMWeightConfig, of Transformers' own AqlmConfig, or of a dictionary.

        Raises:
            ValueError: for an AQLMWeightConfig of two steps, which needs data between them.
            TypeError: for anything else.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, AQLMWeightConfig):
            return cls._of_weight_config(config)
        if isinstance(config, transformers.AqlmConfig):
            config = config.to_dict()
        if not isinstance(config, Mapping):
            raise TypeError(f"an AQLM config, an AQLMWeightConfig or a dictionary is needed, got {config!r}")
        return cls(**config)

    @classmethod
    def _of_weight_config(cls, config: AQLMWeightConfig) -> Self:
        if config.step is not None:
            raise ValueError(
                f"step={config.step!r} needs data, and none is seen while a model loads: load the dense model and call "
                "`aqlm_tensor.quantize_` or `calibrate`"
            )
        if config.codebook_dtype is not None:
            raise ValueError("codebook_dtype cannot differ from the model's here: pass `dtype=` to from_pretrained")
        scheme = AQLMScheme.parse(config.scheme)
        options = {"solver": asdict(config.solver), "seed": config.seed, "on_incompatible": config.on_incompatible}
        return cls(**{field: getattr(scheme, field) for field in SCHEME_FIELDS}, aqlm_tensor=options)

    @classmethod
    def describing(cls, schemes: Mapping[str, AQLMScheme], dense: Iterable[str]) -> Self:
        """The config of a quantized model.

        Args:
            schemes: of each quantized layer, by name in the checkpoint; at least one.
            dense: names of its other linear layers.
        """
        return cls(**quantization_config(schemes, dense))

    def parsed(self) -> CheckpointConfig:
        """What the fields say, as the checkpoint reader understands it.

        Raises:
            ValueError: if they make no valid scheme.
        """
        return parse_section({**self.to_dict(), "quant_method": "aqlm"}, "the quantization_config", {})

    def weight_config(self, layer: str) -> AQLMWeightConfig:
        """How a dense layer is quantized while the model loads.

        Raises:
            ValueError: for an unknown option.
            TypeError: for a field of the wrong type.
        """
        options = {name: value for name, value in self.aqlm_tensor.items() if name in _ON_THE_FLY}
        solver = SolverConfig(**options.pop("solver", {}))
        return AQLMWeightConfig(str(self.parsed().scheme_of(layer)), solver=solver, **options)

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        fields = super().to_dict()
        stored = {name: value for name, value in fields.pop("aqlm_tensor", {}).items() if name in _STORED}
        return {**fields, "aqlm_tensor": stored} if stored else fields
