"""`aqlm-tensor eval` and `aqlm-tensor generate`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aqlm_tensor import evaluate as measure
from aqlm_tensor.calibration.sources import TextFile
from aqlm_tensor.cli.arguments import held_out, held_out_tokens, open_model
from aqlm_tensor.cli.output import UsageError, bar, emit, note, print_json

__all__ = ["evaluate", "generate", "perplexity_with_bar"]


def evaluate(
    model_path: str, data: Path, seqlen: int, *, gguf_file: str | None, dtype: str, device: str, as_json: bool
) -> None:
    """Print the perplexity of a model on a text; see `aqlm-tensor eval --help`."""
    source = held_out(data)
    model, tokenizer = open_model(model_path, gguf_file, dtype, device, needs_tokenizer=isinstance(source, TextFile))
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and seqlen > longest:
        raise UsageError(f"--seqlen {seqlen} is longer than the model's context: choose 2 to {longest}")
    tokens = held_out_tokens(source, tokenizer, model)
    result = perplexity_with_bar(model, tokens, seqlen)
    if as_json:
        print_json({"model": model_path, "data": str(data), "seqlen": seqlen, **asdict(result)})
        return
    emit(
        f"{result.windows} windows of {min(seqlen, len(tokens))} tokens, {result.predicted} tokens predicted, "
        f"{result.dropped} left over at the end, {result.seconds:.1f} s"
    )
    emit(f"perplexity: {result.perplexity:.4f}")


def perplexity_with_bar(model: Any, tokens: Any, seqlen: int) -> measure.Perplexity:
    """`evaluate.perplexity` with a progress bar."""
    with bar("evaluating", len(measure.windows(tokens, seqlen)), "windows") as shown:
        return measure.perplexity(
            model, tokens, seqlen, on_window=lambda done, _, value: shown.update(done, f"perplexity {value:.2f}")
        )


def generate(
    model_path: str,
    prompt: str,
    max_new_tokens: int,
    *,
    gguf_file: str | None,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Answer a prompt, token by token; see `aqlm-tensor generate --help`."""
    if not prompt.strip():
        raise UsageError("--prompt is empty: say something")
    model, tokenizer = open_model(model_path, gguf_file, dtype, device)
    streamer = None
    if not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = measure.generate(model, tokenizer, prompt, max_new_tokens=max_new_tokens, streamer=streamer)
    if as_json:
        print_json({"prompt": prompt, **asdict(result), "tokens_per_second": result.tokens_per_second})
        return
    sys.stdout.flush()
    note(f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s after the first")
