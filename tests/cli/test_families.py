"""Families of models on the command line: each is quantized and loads again, or is refused before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf

from tests.cli.commands import QUICK, run

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP: dict[str, Any] = {**SMALL, "intermediate_size": 128}
GROUPED: dict[str, Any] = {**MLP, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}
VISION: dict[str, Any] = {"depth": 3, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4}


def qwen2_vl() -> Any:
    text = {**GROUPED, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=VISION))  # pyright: ignore


MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**MLP)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, d_model=64, num_layers=1, num_heads=4)),
    "classifier": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**GROUPED)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SMALL)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**EXPERTS, head_dim=16)),
    "llama4": lambda: tf.Llama4ForCausalLM(tf.Llama4TextConfig(**EXPERTS, head_dim=16)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**EXPERTS)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**MAMBA)),
    "qwen2_vl": qwen2_vl,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    np.save(root / "ids.npy", np.random.default_rng(0).integers(3, 60, 1000))
    return root


def dense(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        MODELS[name]().save_pretrained(folder / name)
    return folder / name


LANGUAGE, STAY = "only causal language models are handled here", "of the weights in the model's blocks would stay dense"
REFUSED = {
    "bert": ([], LANGUAGE),
    "t5": ([], LANGUAGE),
    "classifier": ([], LANGUAGE),
    "gpt_oss": ([], STAY),
    "llama4": ([], STAY),
    "mixtral --bits": (["--bits", "3", "--schemes", "1x4g8,2x4g8"], STAY),
    "mixtral --no-blockwise": (["--no-blockwise"], STAY),
    "mixtral --tune": (["--tune", "pv"], "--tune cannot tune stacks of experts"),
    "falcon --tune": (["--tune", "pv"], "query_key_value is a FalconLinear, of which only"),
    "falcon --finetune": (["--finetune"], "query_key_value is a FalconLinear, of which only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(folder: Path, tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    model = dense(folder, case.split()[0])
    result = run("quantize", model, tmp_path / "out", *QUICK, "--data", folder / "ids.npy", *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "calibrati" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_no_scheme_fits_stays_dense_and_is_told(folder: Path, tmp_path: Path) -> None:
    """Mamba's dt_proj reads 4 inputs here; in a larger model it sees no data, since its weight is used directly."""
    data = ("--data", folder / "ids.npy")
    result = run("quantize", dense(folder, "mamba"), tmp_path / "out", *QUICK, *data)
    assert result.exit_code == 0, result.output
    assert "stay dense: backbone.layers.0.mixer.dt_proj (in_features 4 is not a multiple" in result.stderr
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text(encoding="utf-8"))
    assert list(report["skipped"]) == [f"backbone.layers.{index}.mixer.dt_proj" for index in (0, 1)]
    assert run("eval", tmp_path / "out", *data, "--seqlen", "50").exit_code == 0


def test_a_model_that_sees_is_quantized_on_text_and_keeps_its_processor(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dense(folder, "qwen2_vl"), tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text('{"patch_size": 4}', encoding="utf-8")
    data = ("--data", folder / "ids.npy")
    result = run("quantize", tmp_path / "dense", tmp_path / "out", *QUICK, *data, "--json")
    assert result.exit_code == 0, result.output
    assert {layer["fqn"].rpartition(".layers.")[0] for layer in json.loads(result.stdout)["layers"]} == {
        "model.language_model"
    }
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert run("eval", tmp_path / "out", *data, "--seqlen", "50").exit_code == 0


def test_a_mixture_of_experts_is_evaluated(folder: Path, tmp_path: Path) -> None:
    data = ("--data", folder / "ids.npy")
    result = run("quantize", dense(folder, "mixtral"), tmp_path / "out", "--scheme", "1x4g8", *QUICK[2:], *data)
    assert result.exit_code == 0, result.output
    evaluated = run("eval", tmp_path / "out", *data, "--seqlen", "50")
    assert evaluated.exit_code == 0, evaluated.output
