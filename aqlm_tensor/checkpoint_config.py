"""The quantization_config of a checkpoint: the scheme of each layer, as the official code and Transformers write it.

The base fields hold the commonest scheme; layers that differ are listed in the "aqlm_tensor" entry, which other readers
ignore. Layers that stay dense are listed with and without ".weight", since readers differ in what they compare with.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqlm_tensor.checkpoint_io import CONFIG_NAME, read_json
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["SCHEME_FIELDS", "CheckpointConfig", "parse_section", "quantization_config", "read_config"]

FORMAT_VERSION = 1
SCHEME_FIELDS = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")


@dataclass(frozen=True)
class CheckpointConfig:
    """What config.json says about the quantization.

    Attributes:
        base: the scheme of every quantized layer that is not in `schemes`.
        schemes: layers with a scheme of their own, by name in the checkpoint.
        dense: names of linear layers that are not quantized (both spellings in the file mean the same).
        model: the whole of config.json.
    """

    base: AQLMScheme
    schemes: dict[str, AQLMScheme]
    dense: frozenset[str]
    model: Mapping[str, Any]

    def scheme_of(self, fqn: str) -> AQLMScheme:
        """The scheme of a quantized layer."""
        return self.schemes.get(fqn, self.base)


def read_config(folder: str | Path) -> CheckpointConfig:
    """The quantization of a checkpoint folder, from its config.json.

    Raises:
        ValueError: if the file is missing, not of an AQLM checkpoint, or has an unknown format version.
    """
    path = Path(folder) / CONFIG_NAME
    model = read_json(path)
    return parse_section(model.get("quantization_config"), str(path), model)


def parse_section(section: Any, where: str, model: Mapping[str, Any]) -> CheckpointConfig:
    """Read a quantization_config.

    Args:
        section: as in config.json.
        where: what to call it in errors.
        model: the config around it.

    Raises:
        ValueError: if it is not of an AQLM checkpoint, incomplete, or has an unknown format version.
    """
    if not isinstance(section, dict) or section.get("quant_method") != "aqlm":
        found = section.get("quant_method") if isinstance(section, dict) else None
        raise ValueError(f"{where} is not of an AQLM checkpoint: its quant_method is {found!r}, not 'aqlm'")
    missing = [field for field in SCHEME_FIELDS if field not in section]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)} in its quantization_config")
    ours = section.get("aqlm_tensor", {})
    version = ours.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(f"{where} has format_version {version!r}, this library reads {FORMAT_VERSION}: upgrade it")
    try:
        base = AQLMScheme(*(section[field] for field in SCHEME_FIELDS))
        schemes = {fqn: AQLMScheme.parse(text) for fqn, text in ours.get("schemes", {}).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} describes no valid scheme: {error}") from None
    dense = frozenset(name.removesuffix(".weight") for name in section.get("linear_weights_not_to_quantize") or ())
    return CheckpointConfig(base, schemes, dense, model)


def quantization_config(schemes: Mapping[str, AQLMScheme], dense: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of config.json.

    Args:
        schemes: the scheme of each quantized layer, by name in the checkpoint; at least one.
        dense: names of the linear layers that are not quantized.
    """
    base = Counter(schemes.values()).most_common(1)[0][0]
    return {
        "quant_method": "aqlm",
        **{field: getattr(base, field) for field in SCHEME_FIELDS},
        "linear_weights_not_to_quantize": [name for fqn in dense for name in (fqn, f"{fqn}.weight")],
        "aqlm_tensor": {
            "format_version": FORMAT_VERSION,
            "schemes": {fqn: str(scheme) for fqn, scheme in schemes.items() if scheme != base},
        },
    }
