"""What the integration with PEFT changes, and what it leaves alone."""

import subprocess
import sys

import peft
import pytest
from peft.tuners.tuners_utils import BaseTuner

from aqlm_tensor.integrations.peft_lora import register
from tests.integrations.peft_twins import PISSA, adapted, aqlm_llama, dense_twin, lora_config, q_proj, trained

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses what Transformers deprecates


def test_layers_say_what_they_are() -> None:
    model = trained()
    assert peft.get_model_status(model).quantization_backend == "aqlm"
    assert "scheme=2x4g8" in repr(q_proj(model))


def test_adapters_of_transformers_itself() -> None:
    model = aqlm_llama()
    model.add_adapter(lora_config())
    assert type(q_proj(model)).__name__ == "AQLMLinear"


def test_registering_twice_changes_nothing() -> None:
    inject = BaseTuner.inject_adapter
    register()
    assert BaseTuner.inject_adapter is inject


def test_dense_models_are_not_affected() -> None:
    model = adapted(dense_twin(aqlm_llama()), lora_config(**PISSA))
    assert type(q_proj(model)) is peft.tuners.lora.Linear
    assert not hasattr(q_proj(model), "aqlm_initial")


ALONE = """
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from aqlm_tensor import AQLMWeightConfig, SolverConfig, quantize_
{integration}
for config, merge in (
    (LoraConfig(target_modules=["0"]), True),
    (LoraConfig(target_modules=["0"], use_dora=True), False),
    (LoraConfig(target_modules=["0"], init_lora_weights="pissa"), False),
    (VeraConfig(target_modules=["0"], r=2), False),
):
    model = nn.Sequential(nn.Linear(64, 128))
    quantize_(model, AQLMWeightConfig("2x4g8", solver=SolverConfig(max_rounds=1, kmeans_iterations=1)))
    try:
        adapted = get_peft_model(model, config)
        adapted.merge_adapter() if merge else None
        print("works")
    except (ValueError, NotImplementedError) as error:
        print(type(error).__name__)
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("integration", "expected"),
    [
        ("", ["ValueError", "NotImplementedError", "NotImplementedError", "ValueError"]),
        ("import aqlm_tensor.integrations.hf", ["works"] * 4),
    ],
    ids=["PEFT alone", "with the integration"],
)
def test_what_the_integration_is_for(integration: str, expected: list[str]) -> None:
    program = ALONE.format(integration=integration)
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.split() == expected
