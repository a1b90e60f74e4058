"""`aqlm-tensor inspect`, `kernels`, `--version`: what is in a checkpoint, what multiplies with it, on what machine."""

import itertools
import math
import platform
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from aqlm_tensor import checkpoint
from aqlm_tensor.calibration.report import versions
from aqlm_tensor.cli.arguments import parse_device, parse_dtype, parse_rows
from aqlm_tensor.cli.output import UsageError, emit, note, phase, print_json, usage
from aqlm_tensor.kernels import crossovers, registry
from aqlm_tensor.kernels import measure as measuring
from aqlm_tensor.kernels.registry import Problem
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["inspect", "kernels", "machine"]


def machine() -> None:
    """Print what a bug report needs to say."""
    for name, version in versions().items():
        emit(f"{name} {version}")
    emit(platform.platform())
    for index in range(torch.cuda.device_count()):
        emit(torch.cuda.get_device_name(index))


def inspect(path: Path, *, as_json: bool) -> None:
    """Print the weights of a checkpoint folder; see `aqlm-tensor inspect --help`."""
    if not path.is_dir():
        raise UsageError(f"{str(path)!r} is not a folder: pass the folder of a checkpoint")
    weights = sorted(checkpoint.inspect(path), key=lambda info: _natural(info.name))
    rows = [_row(info) for info in weights]
    totals = _totals(weights)
    if as_json:
        print_json({"folder": str(path), "weights": rows, "totals": totals})
        return
    _emit_table(
        ("weight", "shape", "scheme", "dtype", "bits/weight", "MB"),
        [
            (
                row["name"],
                "x".join(map(str, row["shape"])),
                row["scheme"] or "dense",
                row["dtype"],
                f"{row['bits_per_weight']:.3f}",
                f"{row['bytes'] / 1e6:.3f}",
            )
            for row in rows
        ],
    )
    for scheme, total in totals.items():
        emit(
            f"{scheme}: {total['tensors']} weights, {total['parameters'] / 1e6:.2f} M parameters, "
            f"{total['bits_per_weight']:.3f} bits each, {total['bytes'] / 1e6:.1f} MB"
        )


def _emit_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as they need to be: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for first, *others in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        emit("  ".join([first.ljust(widths[0]), *cells]))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _row(info: checkpoint.TensorInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "shape": list(info.shape),
        "scheme": str(info.scheme) if info.scheme else None,
        "dtype": str(info.dtype).removeprefix("torch."),
        "bits_per_weight": info.bits_per_weight,
        "bytes": info.nbytes,
    }


def _totals(weights: list[checkpoint.TensorInfo]) -> dict[str, dict[str, float]]:
    """Tensors, parameters, bytes and bits per weight of each scheme, of the dense ones and of all."""
    tensors, parameters, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for info in weights:
        for key in (str(info.scheme) if info.scheme else "dense", "all"):
            tensors[key] += 1
            parameters[key] += math.prod(info.shape)
            nbytes[key] += info.nbytes
    return {
        key: {
            "tensors": tensors[key],
            "parameters": parameters[key],
            "bytes": nbytes[key],
            "bits_per_weight": 8 * nbytes[key] / max(1, parameters[key]),
        }
        for key in sorted(tensors, key=lambda key: (key == "all", key))
    }


def kernels(
    scheme: str,
    rows: str,
    *,
    in_features: int,
    out_features: int,
    dtype: str,
    device: str,
    explain: bool,
    measure: bool,
    as_json: bool,
) -> None:
    """Print which kernel runs a product; see `aqlm-tensor kernels --help`."""
    with usage():
        parsed = AQLMScheme.parse(scheme)
        reason = parsed.why_not(out_features, in_features)
    if reason is not None:
        raise UsageError(f"--scheme {scheme} does not fit a {out_features}x{in_features} weight: {reason}")
    target, float_type = parse_device(device), parse_dtype(dtype, auto=False)
    counts = parse_rows(rows)
    if measure:
        _measure(parsed, float_type, target)
    answers = []
    for count in counts:
        problem = Problem("linear", parsed, count, in_features, out_features, 1, float_type, target)
        table = [
            {"kernel": kernel.name, "option": kernel.option or None, "reason": reason}
            for kernel, reason in registry.explain(problem)
        ]
        chosen = next((row["kernel"] for row in table if row["reason"] is None), None)
        answers.append({"rows": count, "chosen": chosen, "kernels": table})
    if as_json:
        print_json({"scheme": str(parsed), "shape": [out_features, in_features], "answers": answers})
        return
    emit(f"{parsed}, weight {out_features}x{in_features}, {dtype} on {target}")
    for answer, following in itertools.zip_longest(answers, answers[1:]):
        emit(f"{answer['rows']} rows: {answer['chosen'] or 'no kernel'}")
        if explain and (following is None or answer["kernels"] != following["kernels"]):  # once for equal neighbours
            for row in answer["kernels"]:
                emit(f"    {row['kernel']}: {_verdict(row, answer['chosen'])}")


def _measure(scheme: AQLMScheme, dtype: torch.dtype, device: torch.device) -> None:
    """Measure crossovers, store them and use them from now on."""
    with phase(f"timing kernels for {scheme} in {str(dtype).removeprefix('torch.')} on {device}"), usage():
        path = crossovers.store(device, measuring.measure([scheme], dtype, device))
    registry.refresh()
    note(f"stored in {path}")


def _verdict(row: dict[str, Any], chosen: str | None) -> str:
    option = row["option"]
    if row["kernel"] == chosen:
        return f"runs, since {option} is allowed; it {registry.OPTIONS[option]}" if option else "runs"
    return row["reason"] or f"could run, but {chosen} comes before it"
