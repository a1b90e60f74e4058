"""The fastest `generate` for one model on one GPU: every new token is one replay of a CUDA graph.

At 2 bits a decode step takes so little time on a GPU that starting it dominates: guards of torch.compile, a few
microseconds of Python for every quantized weight, the preparation of each step's inputs. `DecodeGraph` compiles the
step once (torch.compile, fullgraph), captures it in one CUDA graph together with a static cache, and lets Transformers'
own `generate` call the graph, so that sampling, stopping and streaming work as always. What it costs: batches of one
fixed size without padding, and memory for a cache of the full length.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DecodeGraph"]

_WARM_UPS = 2


class DecodeGraph:
    """Runs `generate` of a Transformers causal language model with captured decode steps.

    The model must not be changed or moved afterwards. The first `generate` compiles and captures, which takes about a
    minute for 32 layers; prompts are processed by the model itself.

    Args:
        model: on one CUDA GPU, with full attention in every layer.
        max_length: most tokens of a prompt and its continuation together; the cache is that long.
        batch_size: of every prompt.
        compile: whether to compile the step before it is captured.

    Raises:
        ValueError: if the model is not on a CUDA GPU or does not use a plain static cache.
    """

    def __init__(self, model: Any, *, max_length: int, batch_size: int = 1, compile: bool = True) -> None:  # noqa: A002
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        _require_cuda(model.device)
        self.model = model
        self.max_length = max_length
        self.cache: Any = StaticCache(config=model.config, max_cache_len=max_length)
        other = {type(layer).__name__ for layer in self.cache.layers if type(layer) is not StaticLayer}
        if other:
            raise ValueError(f"DecodeGraph needs full attention with a static cache in every layer, not {other}")
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
        self._forward = model.forward
        self._prepare = model.prepare_inputs_for_generation
        self._compiled = torch.compile(model.forward, fullgraph=True) if compile else model.forward
        self._prompt_is_done = False
        self._logits = torch.empty(0)
        self.replay: Callable[[], None] | None = None

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **options: Any) -> Any:
        """`model.generate`, with its options, on prompts [batch_size, tokens] of equal length.

        Raises:
            ValueError: for another batch size, padded prompts, or more tokens than the cache holds.
        """
        self._check(input_ids, max_new_tokens, options.get("attention_mask"))
        self.cache.reset()
        self._prompt_is_done = False
        model = self.model
        model.forward = self._step_or_prompt
        model.prepare_inputs_for_generation = self._inputs
        try:
            return model.generate(
                input_ids,
                max_new_tokens=max_new_tokens,
                past_key_values=self.cache,
                disable_compile=True,
                **options,
            )
        finally:
            del model.forward, model.prepare_inputs_for_generation

    def _check(self, input_ids: Tensor, max_new_tokens: int, mask: Tensor | None) -> None:
        batch, tokens = input_ids.shape
        if batch != self.token.shape[0]:
            raise ValueError(f"this DecodeGraph is for batches of {self.token.shape[0]}, got {batch} prompts")
        if tokens + max_new_tokens > self.max_length:
            raise ValueError(
                f"{tokens} and {max_new_tokens} new tokens exceed max_length={self.max_length}: make a longer one"
            )
        if mask is not None and not bool(mask.all()):
            raise ValueError("a DecodeGraph takes prompts without padding: group prompts of equal length")

    @functools.cached_property
    def _step_or_prompt(self) -> Callable[..., Any]:
        """Stands in for `model.forward`, with its signature."""

        @functools.wraps(self._forward)
        def forward(**inputs: Any) -> Any:
            if not self._prompt_is_done:
                self._prompt_is_done = True
                return self._forward(**inputs)
            self.token.copy_(inputs["input_ids"])
            self._run()
            return _output(self._logits, self.cache)

        return forward

    @functools.cached_property
    def _inputs(self) -> Callable[..., dict[str, Any]]:
        """Stands in for `model.prepare_inputs_for_generation`: a captured step computes positions and mask itself."""

        @functools.wraps(self._prepare)
        def prepare(input_ids: Tensor, *args: Any, **options: Any) -> dict[str, Any]:
            if self._prompt_is_done:
                return {"input_ids": input_ids[:, -1:]}
            return self._prepare(input_ids, *args, **options)

        return prepare

    def _run(self) -> None:
        if self.replay is None:
            self.replay = _capture(self._step, self._rewound())
        self.replay()

    def _step(self) -> None:
        self._logits = self._compiled(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits

    def _rewound(self) -> Callable[[], None]:
        """A function that makes the cache forget what was added since now; it is overwritten then."""
        lengths = [layer.cumulative_length.clone() for layer in self.cache.layers]

        def rewind() -> None:
            for layer, length in zip(self.cache.layers, lengths, strict=True):
                layer.cumulative_length.copy_(length)

        return rewind


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"DecodeGraph needs a model on a CUDA GPU, this one is on {device}")


def _output(logits: Tensor, cache: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # pyright: ignore[reportArgumentType]


def _capture(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of a step, as a function that replays it; the runs that prepare the capture are undone."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):  # compiles and loads kernels
            step()
            rewind()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
