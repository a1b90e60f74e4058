"""AQLM (Additive Quantization of Language Models) as an ordinary PyTorch tensor type.

Importing the package is cheap: torch and torchao load with the first public name that is used.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aqlm_tensor.api import QuantizationReport, quantize_
    from aqlm_tensor.calibration.allocation import Allocation
    from aqlm_tensor.calibration.calibrate import calibrate
    from aqlm_tensor.calibration.finetune import FinetuneConfig
    from aqlm_tensor.calibration.report import CalibrationReport
    from aqlm_tensor.calibration.self_generation import GeneratedData
    from aqlm_tensor.calibration.sensitivity import allocate
    from aqlm_tensor.calibration.sources import CalibrationData, calibration_data
    from aqlm_tensor.checkpoint import load, save
    from aqlm_tensor.config import (
        AQLMWeightConfig,
        SolverConfig,
        aqlm_1x8,
        aqlm_1x16,
        aqlm_1x16g16,
        aqlm_2x8,
        aqlm_4x8,
        aqlm_8x8,
    )
    from aqlm_tensor.decode_graph import DecodeGraph
    from aqlm_tensor.fusion import FusionReport, fuse_, unfuse_
    from aqlm_tensor.pv.config import PVConfig
    from aqlm_tensor.pv.tuning import tune_pv
    from aqlm_tensor.scheme import AQLMScheme
    from aqlm_tensor.tensor import AQLMTensor
    from aqlm_tensor.training import trainable

__version__ = version("aqlm-tensor")

_HOMES = {
    "AQLMScheme": "scheme",
    "AQLMTensor": "tensor",
    "AQLMWeightConfig": "config",
    "Allocation": "calibration.allocation",
    "CalibrationData": "calibration.sources",
    "CalibrationReport": "calibration.report",
    "DecodeGraph": "decode_graph",
    "FinetuneConfig": "calibration.finetune",
    "FusionReport": "fusion",
    "GeneratedData": "calibration.self_generation",
    "PVConfig": "pv.config",
    "QuantizationReport": "api",
    "SolverConfig": "config",
    "allocate": "calibration.sensitivity",
    "aqlm_1x16": "config",
    "aqlm_1x16g16": "config",
    "aqlm_1x8": "config",
    "aqlm_2x8": "config",
    "aqlm_4x8": "config",
    "aqlm_8x8": "config",
    "calibrate": "calibration.calibrate",
    "calibration_data": "calibration.sources",
    "fuse_": "fusion",
    "load": "checkpoint",
    "quantize_": "api",
    "save": "checkpoint",
    "trainable": "training",
    "tune_pv": "pv.tuning",
    "unfuse_": "fusion",
}

__all__ = [
    "AQLMScheme",
    "AQLMTensor",
    "AQLMWeightConfig",
    "Allocation",
    "CalibrationData",
    "CalibrationReport",
    "DecodeGraph",
    "FinetuneConfig",
    "FusionReport",
    "GeneratedData",
    "PVConfig",
    "QuantizationReport",
    "SolverConfig",
    "allocate",
    "aqlm_1x8",
    "aqlm_1x16",
    "aqlm_1x16g16",
    "aqlm_2x8",
    "aqlm_4x8",
    "aqlm_8x8",
    "calibrate",
    "calibration_data",
    "fuse_",
    "load",
    "quantize_",
    "save",
    "trainable",
    "tune_pv",
    "unfuse_",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first access (PEP 562) and, with it, the handler, ops and safe globals."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.handler")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
