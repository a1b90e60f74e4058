"""`aqlm-tensor estimate`: the memory, disk and time that quantizing a model will take, from its config alone."""

from typing import Any

import torch

from aqlm_tensor import AQLMWeightConfig
from aqlm_tensor.calibration.activations import PLACES, Place
from aqlm_tensor.calibration.memory_model import MemoryEstimate, estimate_memory
from aqlm_tensor.calibration.report import Phase
from aqlm_tensor.calibration.time_model import estimate_seconds
from aqlm_tensor.cli.arguments import parse_dtype
from aqlm_tensor.cli.fit import find_fit
from aqlm_tensor.cli.output import UsageError, emit, print_json, usage
from aqlm_tensor.cli.progress import tuning, windows_at_once
from aqlm_tensor.hf_model import ModelSource, find_model, language_model, quiet

__all__ = ["run"]


def run(
    model_path: str,
    scheme: str,
    *,
    gguf_file: str | None,
    nsamples: int,
    seqlen: int,
    finetune: bool,
    keep_inputs: Place,
    dtype: str,
    processes: int,
    as_json: bool,
) -> None:
    """Print what `quantize` with the same options will take; see `aqlm-tensor estimate --help`."""
    if keep_inputs not in PLACES:
        raise UsageError(f"--keep-inputs {keep_inputs!r} is unknown: choose one of {', '.join(PLACES)}")
    with usage():
        config = AQLMWeightConfig(scheme, on_incompatible="skip")
        model = _shapes(find_model(model_path, gguf_file), parse_dtype(dtype))
        find_fit(model, [config], stacks_too=True)
        tokens, at_once = nsamples * seqlen, seqlen * (1 if finetune else windows_at_once(nsamples, seqlen))
        shared: dict[str, Any] = {"tokens": tokens, "batch_tokens": at_once, "processes": processes}
        estimate = estimate_memory(model, config, **shared, finetune=finetune, keep_inputs=keep_inputs)
        seconds = estimate_seconds(model, config, **shared, finetune=tuning(nsamples) if finetune else None)
    if as_json:
        sizes = {"host": estimate.host, "work_dir": estimate.work_dir, "result": estimate.result}
        print_json({"device": estimate.device, "device_peak": estimate.peak, **sizes, "seconds_on_h100": seconds})
    else:
        _print(estimate, seconds, processes)


def _shapes(source: ModelSource, dtype: Any) -> Any:
    """The model without values."""
    if source.kind == "aqlm":
        raise ValueError(f"{source} is quantized already: pass the dense model")
    with quiet(), torch.device("meta"):
        config, auto = language_model(source)
        if dtype == "auto":
            dtype = torch.float32 if source.kind == "gguf" else config.dtype or torch.float32
        return auto.from_config(config, dtype=dtype)


def _print(estimate: MemoryEstimate, seconds: dict[Phase, float], processes: int) -> None:
    if processes > 1:
        emit(f"for each of {processes} processes, what they send each other not counted:")
    for phase, size in estimate.device.items():
        emit(f"on the device, {phase + ':':<12} {size / 1e9:8.2f} GB")
    emit(f"on the device, at most:     {estimate.peak / 1e9:8.2f} GB")
    emit(f"model and inputs in CPU memory: {estimate.host / 1e9:4.2f} GB")
    emit(f"work folder on disk:        {estimate.work_dir / 1e9:8.2f} GB")
    emit(f"quantized model on disk:    {estimate.result / 1e9:8.2f} GB")
    phases = ", ".join(f"{phase} {took:.0f}" for phase, took in seconds.items())
    where = "on one H100: " if processes == 1 else "on an H100 each:"
    emit(f"{where:<26} {sum(seconds.values()):9.0f} s ({phases})")
