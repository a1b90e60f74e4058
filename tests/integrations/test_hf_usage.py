"""What users do with a loaded model: pipelines, generation, training adapters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import AQLMTensor, trainable
from tests.models import config
from tests.tiny_llama import TEXT, write_dense

from .official import FAMILIES, write_pair

# PEFT asks for what Transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized Llama with a tokenizer, made and saved with Transformers' own functions."""
    dense = write_dense(tmp_path_factory.mktemp("dense"))
    saved = tmp_path_factory.mktemp("aqlm")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config("2x4g8")).save_pretrained(saved)
    AutoTokenizer.from_pretrained(dense).save_pretrained(saved)
    return saved


@pytest.fixture
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_pipeline(folder: Path) -> None:
    generator = transformers.pipeline("text-generation", model=str(folder))
    assert isinstance(generator.model.model.layers[0].mlp.up_proj.weight, AQLMTensor)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    answer = generator("the cat sat", **options)[0]["generated_text"]
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    dense = transformers.pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert answer == dense("the cat sat", **options)[0]["generated_text"]


@pytest.mark.usefixtures("_private_cache")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.full)])
def test_generate_with_a_static_cache_compiled(name: str, backend: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES[name])
    tokens = torch.arange(3, 13).view(2, 5)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False}
    models: Any = (AutoModelForCausalLM.from_pretrained(path) for path in (pair.aqlm, pair.dense))
    model, dense = models
    expected = dense.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, **options, cache_implementation="static"), expected)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    assert torch.equal(model.generate(tokens, **options, cache_implementation="static"), expected)


def test_generate_may_compile_by_itself(folder: Path) -> None:
    quantizer: Any = AutoModelForCausalLM.from_pretrained(folder).hf_quantizer
    assert quantizer.is_compileable
    assert quantizer.is_trainable


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(folder: Path, reentrant: bool) -> None:
    tokens = torch.arange(3, 17).view(2, 7)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = lora(AutoModelForCausalLM.from_pretrained(folder)).train()
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
    assert any(bool(gradient.any()) for gradient in gradients[0].values())


def test_trainer(folder: Path, tmp_path: Path) -> None:
    """Trainer refuses a quantized model without adapters, trains one with them, and leaves the codes alone."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        logging_steps=5, save_strategy="no", use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[0, :640].view(-1, 16)
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="quantized"):
        transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    before = [weight.codes.clone() for weight in model.parameters() if isinstance(weight, AQLMTensor)]
    trainer = transformers.Trainer(model=lora(model), args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0], losses
    after = [weight.codes for weight in model.parameters() if isinstance(weight, AQLMTensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_trainer_of_codebooks_and_scales(folder: Path, tmp_path: Path) -> None:
    """Inside `trainable` Trainer needs no adapters, and its checkpoints are AQLM checkpoints."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], save_steps=2, use_cpu=True, seed=0,
        disable_tqdm=True,
    )  # fmt: skip
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[0, :320].view(-1, 16)
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model(tokens[:1]).logits
    with trainable(model):
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert isinstance(loaded.model.layers[0].mlp.up_proj.weight, AQLMTensor)
    after = loaded(tokens[:1]).logits
    assert torch.equal(after, model.eval()(tokens[:1]).logits)
    assert not torch.allclose(after, before, atol=1e-3)
