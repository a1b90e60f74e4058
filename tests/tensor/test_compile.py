"""torch.compile and torch.export of models with AQLM weights."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from aqlm_tensor.tensor import AQLMTensor
from tests.tensor.weights import as_aqlm, random_weight, weight_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",  # torch.export's own code
)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled code of other tests or versions is never reused."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class MLP(nn.Module):
    """Gate, up and down projections; gate and up fused into one partitioned weight."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.gate_up = _linear(random_weight(out_features=128, partitions=2, dtype=dtype, seed=seed))
        self.down = _linear(random_weight("1x12g8", 64, 64, dtype=dtype, seed=seed + 1))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def _linear(weight: AQLMTensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype).requires_grad_(False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _graphs(function: Callable[..., Any], *args: Any) -> list[torch.fx.GraphModule]:
    """The graphs that torch.compile hands to its backend after AOTAutograd."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*args)
    return graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compiled_equals_eager(mode: str, dtype: torch.dtype) -> None:
    model, x = MLP(dtype), torch.randn(5, 64, dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for context in (torch.no_grad(), torch.inference_mode()):
        # rounding between two operations as in eager, or bfloat16 results differ without being wrong
        with context, inductor_config.patch(emulate_precision_casts=True):
            torch.testing.assert_close(compiled(x), model(x))


def test_the_graph_holds_the_op_and_no_dense_weight() -> None:
    model, x = MLP(), torch.randn(5, 64)
    with torch.no_grad():
        (graph,) = _graphs(model, x)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.aqlm_tensor.linear.default) == 2
    assert torch.ops.aqlm_tensor.dequantize.default not in calls
    dense = {weight_of(model.gate_up).shape, weight_of(model.down).shape}
    held = [node.meta["val"].shape for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert held
    assert not dense & set(held)
    assert not any(name for name, _ in graph.named_buffers())


def test_batches_change_without_recompiling() -> None:
    model = MLP()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(2, 64))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows in (3, 7, 64, 2, 33):
                x = torch.randn(rows, 64)
                torch.testing.assert_close(compiled(x), model(x))


def test_weights_of_one_kind_share_a_graph() -> None:
    @torch.compile(fullgraph=True)
    def linear(x: Tensor, w: AQLMTensor) -> Tensor:
        return F.linear(x, w)

    x = torch.randn(3, 64)
    linear(x, random_weight())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            w = random_weight(seed=seed)
            torch.testing.assert_close(linear(x, w), F.linear(x, w))
    # another scheme, another view: another graph, and the right one
    square = random_weight("1x4g16", 64, 64)
    torch.testing.assert_close(linear(x, square), F.linear(x, square))
    torch.testing.assert_close(linear(x, as_aqlm(square.t())), x @ square.dequantize())


def test_changed_weights_are_seen() -> None:
    model, other, x = MLP(), MLP(seed=7), torch.randn(5, 64)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(x), other(x))
        model.down.weight = MLP(seed=9).down.weight
        other.down.weight = model.down.weight
        torch.testing.assert_close(compiled(x), other(x))


def test_gradients() -> None:
    model = MLP()
    compiled = torch.compile(model, fullgraph=True)
    grads = []
    for function in (model, compiled):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        function(x).square().sum().backward()
        grads.append(x.grad)
    # the compiled activation rounds differently: elements that cancel differ by more than their own last digits
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6 * float(grads[0].abs().max()))


OPERATIONS: dict[str, Callable[[Tensor, AQLMTensor, AQLMTensor], Tensor]] = {
    "matmul": lambda x, w, e: x @ w.t(),
    "left": lambda x, w, e: w @ x.t(),
    "addmm": lambda x, w, e: torch.addmm(x.new_ones(32), x, w.t()),
    "bmm": lambda x, w, e: torch.bmm(x.expand(3, -1, -1), e.mT),
    "slices": lambda x, w, e: F.linear(x[:, :16], w[8:16, :16]),
    "row": lambda x, w, e: w[3].dequantize(),
    "cat": lambda x, w, e: F.linear(x, torch.cat([w, e[0]])),
    "cast": lambda x, w, e: F.linear(x.bfloat16(), w.to(torch.bfloat16)),
    "dequantize": lambda x, w, e: w.dequantize(),
    "autocast": lambda x, w, e: _autocast(x, w),
}


def _autocast(x: Tensor, w: AQLMTensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x, w)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_in_a_graph(name: str) -> None:
    arguments = torch.randn(4, 64), random_weight(), random_weight(experts=3)
    compiled = torch.compile(OPERATIONS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), OPERATIONS[name](*arguments))


def test_export_with_dynamic_batch() -> None:
    model, x = MLP().eval(), torch.randn(5, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert sum(node.target == torch.ops.aqlm_tensor.linear.default for node in exported.graph.nodes) == 2
    x = torch.randn(9, 64)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_a_compiled_model_is_cast_and_moved() -> None:
    model, x = MLP(), torch.randn(5, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        weight = weight_of(model.down)
        model.to(torch.bfloat16)
        assert weight_of(model.down) is weight
        torch.testing.assert_close(compiled(x.bfloat16()), model(x.bfloat16()), rtol=2**-6, atol=2**-6)
    model.to("meta")
    assert weight_of(model.down).is_meta


def test_the_cache_key_tells_weights_apart() -> None:
    square = random_weight(out_features=64)
    kinds = [
        square,
        square.t(),
        square.bfloat16(),
        random_weight(),
        random_weight("1x8g8", 64),
        random_weight(out_features=64, partitions=2),
        random_weight(out_features=64, experts=1),
        AQLMTensor(square.codes.mT.contiguous().mT, square.codebooks, square.scales),
    ]
    keys = {as_aqlm(w)._stable_hash_for_caching() for w in kinds}
    assert len(keys) == len(kinds)
    assert random_weight(seed=5)._stable_hash_for_caching() == random_weight()._stable_hash_for_caching()


PROGRAM = """
import sys, torch
from torch.nn import functional as F
import aqlm_tensor.tensor
from aqlm_tensor.kernels import registry
w, x = torch.load(sys.argv[1], weights_only=True)
y = torch.compile(lambda x, w: F.linear(x, w), fullgraph=True)(x, w)
assert torch.equal(y, F.linear(x, w))
torch.save(y, sys.argv[2])
"""


def test_a_second_process_reuses_the_disk_cache_rightly(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
    x = torch.randn(3, 64)
    for name, w in (("a", random_weight(out_features=64)), ("b", random_weight(out_features=64, seed=1).t())):
        torch.save((w, x), tmp_path / name)
        arguments = [sys.executable, "-P", "-c", PROGRAM, tmp_path / name, tmp_path / "y"]
        subprocess.run(arguments, env=environment, check=True, timeout=300, cwd=tmp_path)
        torch.testing.assert_close(torch.load(tmp_path / "y"), x @ w.dequantize().t())
