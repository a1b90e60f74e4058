"""quantize_layer on a GPU: as good as on the CPU, the same bits every time, whatever precision products are allowed."""

import pytest
import torch

from aqlm_tensor.quantizer.hessian import HessianAccumulator
from aqlm_tensor.quantizer.layer import QuantizedLayer, quantize_layer
from aqlm_tensor.quantizer.solver import SolverConfig
from aqlm_tensor.scheme import AQLMScheme
from tests.quantizer.test_layer import correlated_inputs, decode, random_weight, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SOLVER = SolverConfig(max_rounds=4, kmeans_iterations=4)


def solve(text: str, device: str, *, data: bool, rows: int = 96) -> QuantizedLayer:
    inputs = correlated_inputs(192, 300)
    hessian = (inputs.T @ inputs).to(device) if data else None
    return quantize_layer(random_weight(rows, 192).to(device), AQLMScheme.parse(text), hessian=hessian, solver=SOLVER)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("text", ["1x8g8", "2x8g8", "3x4g4o2", "2x9g8", "1x12g8", "2x6g64o2"])
def test_as_good_as_on_the_cpu(text: str, data: bool) -> None:
    gpu, cpu = solve(text, "cuda", data=data), solve(text, "cpu", data=data)
    assert gpu.codes.is_cuda
    assert gpu.error == pytest.approx(cpu.error, rel=0.03, abs=1e-6)
    inputs = correlated_inputs(192, 300)
    on_cpu = QuantizedLayer(gpu.codes.cpu(), gpu.codebooks.cpu(), gpu.scales.cpu(), gpu.errors, gpu.error)
    quantized = decode(on_cpu, AQLMScheme.parse(text))
    true_error = relative_error(random_weight(96, 192), quantized, inputs.T @ inputs if data else None)
    assert gpu.error == pytest.approx(true_error, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("text", ["2x8g8", "2x9g8"])
def test_same_bits_every_time(text: str) -> None:
    first, second = (solve(text, "cuda", data=True, rows=700) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codebooks, second.codebooks)
    assert first.errors == second.errors


def test_reduced_precision_of_products_is_not_used() -> None:
    weight, inputs = random_weight(96, 192).cuda(), correlated_inputs(192, 300).cuda()

    def quantized() -> QuantizedLayer:
        seen = HessianAccumulator(192, "cuda")
        seen.add(inputs)
        return quantize_layer(weight, AQLMScheme.parse("2x8g8"), hessian=seen.value(), solver=SOLVER)

    usual = quantized()
    torch.set_float32_matmul_precision("medium")
    try:
        again = quantized()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(usual.codes, again.codes)
