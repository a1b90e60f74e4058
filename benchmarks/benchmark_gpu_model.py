"""How fast does a whole language model generate on an NVIDIA GPU: dense, official AQLM (aqlm 1.1.7) and this library.

    python -P benchmarks/benchmark_gpu_model.py
    python -P benchmarks/benchmark_gpu_model.py --layers 8 --candidates dense "2x8g8, fused" --measures step

A Transformers Llama of the shape of Llama-3-8B with random weights, batch 1, bfloat16. One model serves all candidates:
its linear layers are replaced in place. Measured are

    step            one decode step at a context of 128 tokens, captured as one CUDA graph, eager code
    decode graph    the same of torch.compile(fullgraph=True), by aqlm_tensor.DecodeGraph; and 128 new tokens after 128
                    by its `generate`
    generate        128 new tokens after 128 by Transformers' `generate` with a static cache, compiled automatically
    first token     the forward pass of a prompt of 128 (also the fastest of 30) and of 2048 tokens, eager
    memory          the most that torch allocated in all of that, weights included

Speed does not depend on the values of the weights; correctness of the layers is checked by benchmark_gpu_linear.py.
Writes a CSV file to benchmarks/results/.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from aqlm_tensor import DecodeGraph

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from harness import RESULTS, gpu_clocks, provenance, write_csv
from providers.models import CANDIDATES, convert

PROMPT = 128
NEW_TOKENS = 128
LONG_PROMPT = 2048
MEASURES = {  # and the columns of each
    "first token": ("first_token_128_ms", "first_token_128_fastest_ms", "first_token_2048_ms"),
    "step": ("step_tokens_per_s",),
    "decode graph": ("compiled_step_tokens_per_s", "decode_graph_generate_tokens_per_s"),
    "generate": ("generate_tokens_per_s",),
}


def make_model(layers: int) -> Any:
    """A Llama of 8B shape with so many layers, random weights, on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def times_of(call: Callable[[], Any], rounds: int) -> list[float]:
    """Wall seconds of a call and the GPU work it starts, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


def prompt_of(tokens: int) -> Tensor:
    """Random token ids [1, tokens]."""
    return torch.randint(1, 128256, (1, tokens), device="cuda")


def first_tokens(model: Any) -> tuple[float, ...]:
    """Milliseconds to the first token after a short prompt, in the median and at best, and after a long one.

    A short prompt waits for the host, and the speed of a shared host changes by a factor of two within a second: the
    best of many says what our code costs it, the median what one had that day.
    """
    times = []
    for tokens, rounds in ((PROMPT, 30), (LONG_PROMPT, 5)):
        call = partial(model, prompt_of(tokens), use_cache=True, logits_to_keep=1)
        times.append(times_of(lambda call=call: call().logits.argmax(-1), rounds))
    short, long = times
    return 1e3 * statistics.median(short), 1e3 * min(short), 1e3 * statistics.median(long)


def time_steps(replay: Callable[[], Any], cache: Any) -> float:
    """Seconds of one captured decode step, from PROMPT tokens on."""
    times = []
    for _ in range(5):
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(NEW_TOKENS - 1):
            replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / (NEW_TOKENS - 1))
    return statistics.median(times[1:])


def prepare_decode_graph(model: Any, *, compile: bool) -> Callable[[], tuple[float, ...]]:  # noqa: A002 - torch's word
    """Compile and capture; what then times tokens per second of a captured step, and of `generate` with it."""
    torch.compiler.reset()
    decoder = DecodeGraph(model, max_length=PROMPT + NEW_TOKENS, compile=compile)
    prompt = prompt_of(PROMPT)

    def run() -> None:
        decoder.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)

    run()

    def timed() -> tuple[float, ...]:
        assert decoder.replay is not None
        return 1 / time_steps(decoder.replay, decoder.cache), NEW_TOKENS / statistics.median(times_of(run, 3))

    return timed


def prepare_generate(model: Any) -> Callable[[], tuple[float, ...]]:
    """Compile; what then times tokens per second of Transformers' `generate` for NEW_TOKENS after PROMPT tokens."""
    torch.compiler.reset()
    model.__dict__.pop("_compiled_call", None)
    prompt = prompt_of(PROMPT)

    def run() -> None:
        model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static")

    run()
    return lambda: (NEW_TOKENS / statistics.median(times_of(run, 3)),)


def settle() -> float:
    """Free what is left of the candidate before; GiB of memory that the weights take."""
    gc.collect()  # layers that were replaced refer to themselves
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def prepare(model: Any, measures: Sequence[str]) -> dict[str, Callable[[], tuple[float, ...]]]:
    """What measures each quantity, by the names of its parts; compiling and capturing is done, and takes minutes."""
    ready: dict[str, Callable[[], tuple[float, ...]]] = {}
    if "first token" in measures:
        ready["first token"] = lambda: first_tokens(model)
    if "step" in measures:
        ready["step"] = prepare_decode_graph(model, compile=False)
    if "decode graph" in measures:
        ready["decode graph"] = prepare_decode_graph(model, compile=True)
    if "generate" in measures:  # last, since the others forget what is compiled
        ready["generate"] = prepare_generate(model)
    return ready


def measure(ready: dict[str, Callable[[], tuple[float, ...]]], console: Console) -> dict[str, Any]:
    """One candidate's results: tokens per second, milliseconds, GiB."""
    result: dict[str, Any] = {}
    for name, columns in MEASURES.items():
        values = ready[name]() if name in ready else ("",) * len(columns)
        for column, value in zip(columns, values, strict=False):
            result[column] = round(value, 2) if isinstance(value, float) else value
        console.print(f"  {[f'{column} {result[column]}' for column in columns]}")
    result["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def main() -> None:
    """Run the benchmark named by the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), help=f"of {', '.join(CANDIDATES)}")
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_model.csv")
    parser.add_argument("--profile", type=Path, help="also write the kernels of one eager step there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is available to torch")
    console = Console(width=110)
    torch.manual_seed(0)
    model = make_model(arguments.layers)
    results: list[dict[str, Any]] = []
    for candidate in arguments.candidates:
        console.print(candidate)
        reason = convert(model, candidate)
        if reason is not None:
            console.print(f"  left out: {reason}")
            continue
        with torch.inference_mode(False), torch.no_grad():
            weights = {"weights_GiB": round(settle(), 2)}
            line = weights | measure(prepare(model, arguments.measures), console)
            if arguments.profile:
                profile(model, candidate, arguments.profile)
        results.append({"candidate": candidate, "layers": arguments.layers, **line, "clocks": gpu_clocks()})
        write_csv(arguments.output, results, provenance(["torch", "transformers", "aqlm-tensor"]))
    show(results, console)


def profile(model: nn.Module, candidate: str, path: Path) -> None:
    """Append the GPU time of each kernel in one eager decode step to a file."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    token = prompt_of(1)
    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        model(token, use_cache=False)
    with path.open("a") as file:
        file.write(f"{candidate}\n{profiler.key_averages().table(sort_by='cuda_time_total', row_limit=25)}\n")


def show(results: list[dict[str, Any]], console: Console) -> None:
    """The results as a table."""
    columns = [name for name in results[0] if name not in ("layers", "clocks")]
    table = Table(*(name.replace("_", " ") for name in columns))
    for line in results:
        table.add_row(*(str(line[name]) for name in columns))
    console.print(table)


if __name__ == "__main__":
    main()
