"""AQLMWeightConfig: validation, presets, and the round trip through torchao's JSON."""

import json

import pytest
import torch
from torchao.core.config import config_from_dict, config_to_dict

import aqlm_tensor
from aqlm_tensor import AQLMWeightConfig, SolverConfig


@pytest.mark.parametrize(
    ("preset", "scheme"),
    [
        ("aqlm_1x16", "1x16g8"),
        ("aqlm_2x8", "2x8g8"),
        ("aqlm_1x8", "1x8g8"),
        ("aqlm_4x8", "4x8g8"),
        ("aqlm_8x8", "8x8g32"),
        ("aqlm_1x16g16", "1x16g16"),
    ],
)
def test_presets_name_their_scheme_and_pass_fields_on(preset: str, scheme: str) -> None:
    config = getattr(aqlm_tensor, preset)(seed=7, on_incompatible="skip")
    assert (config.scheme, config.seed, config.on_incompatible) == (scheme, 7, "skip")


def test_round_trip_through_torchao_json() -> None:
    config = AQLMWeightConfig(
        "3x8", step="prepare", solver=SolverConfig(max_rounds=2), seed=5, codebook_dtype=torch.bfloat16
    )
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"scheme": "2y8"}, ValueError, "'2y8'.*KxN"),
        ({"scheme": 28}, TypeError, "int"),
        ({"scheme": "2x17"}, ValueError, "1 to 16"),
        ({"scheme": "2x8", "step": "observe"}, ValueError, "'prepare', 'convert'.*'observe'"),
        ({"scheme": "2x8", "on_incompatible": "ignore"}, ValueError, "'raise', 'skip'"),
        ({"scheme": "2x8", "on_unobserved": "ignore"}, ValueError, "'data_free'"),
        ({"scheme": "2x8", "solver": {"max_rounds": 1}}, TypeError, "SolverConfig"),
        ({"scheme": "2x8", "seed": 1.5}, TypeError, "1.5"),
        ({"scheme": "2x8", "codebook_dtype": torch.float64}, ValueError, "float64"),
    ],
)
def test_bad_fields_name_value_and_choice(fields: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AQLMWeightConfig(**fields)
