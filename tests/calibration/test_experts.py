"""calibrate on mixtures of experts: what each expert saw, the rule for those that saw little, stacks in and out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import FqnToConfig

from aqlm_tensor import AQLMTensor, FinetuneConfig, calibrate
from aqlm_tensor.calibration.experts import ExpertObserver, completed, find_stacks, one_by_one
from aqlm_tensor.calibration.report import Progress
from aqlm_tensor.cli.report import error_table
from aqlm_tensor.hf_model import find_model, load_model, save_model
from aqlm_tensor.quantizer.hessian import HessianAccumulator
from tests.calibration.test_block_calls import GROUPED, token_ids
from tests.calibration.test_calibrate import Killed, assert_same
from tests.models import config

FIRST = "model.layers.0.mlp.experts"


def mixtral(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes)).eval()


def sums_by_hand(model: Any, data: list[Any]) -> dict[tuple[str, int], Tensor]:
    """X^T X of each expert of the first block, from what its module was called with."""
    experts = model.get_submodule(FIRST)
    found: dict[tuple[str, int], Tensor] = {}

    def watch(module: Any, args: tuple[Any, ...]) -> None:
        hidden, chosen, _ = args
        for expert in range(4):
            x = hidden[(chosen == expert).any(-1)]
            gate, up = F.linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
            middle = module.act_fn(gate) * up
            for name, rows in (("gate_up_proj", x), ("down_proj", middle)):
                key = (f"{FIRST}.{name}", expert)
                found[key] = found.get(key, torch.zeros(rows.shape[1], rows.shape[1])) + rows.T @ rows

    handle = experts.register_forward_pre_hook(watch)
    for batch in data:
        model(batch)
    handle.remove()
    return found


def test_the_observer_sees_what_each_expert_gets() -> None:
    model, data = mixtral(), token_ids()
    stacks, _ = find_stacks(model, config("1x4g4"), [model.model.layers[0]])
    assert [stack.fqn for stack in stacks] == [f"{FIRST}.gate_up_proj", f"{FIRST}.down_proj"]
    assert [stack.partitions for stack in stacks] == [2, 1]
    observer = ExpertObserver(stacks)
    assert observer.first == {f"{FIRST}.gate_up_proj"}
    with torch.no_grad():
        with one_by_one(stacks), observer:
            for batch in data:
                model(batch)
        expected = sums_by_hand(model, data)
    for (fqn, expert), total in expected.items():
        torch.testing.assert_close(observer.seen[fqn][expert].value(), total, rtol=1e-4, atol=1e-6)
    assert sum(one.tokens for one in observer.seen[f"{FIRST}.down_proj"]) == 3 * 24 * 2
    assert model.config._experts_implementation != "eager"


def test_stacks_are_quantized_expert_by_expert_and_the_model_runs() -> None:
    model, data = mixtral(), token_ids()
    dense = copy.deepcopy(model)
    report = calibrate(model, config("1x4g4"), data)
    experts = model.get_submodule(FIRST)
    assert isinstance(experts.gate_up_proj, AQLMTensor)
    assert experts.gate_up_proj.shape == (4, 128, 32)
    assert len(report.layers) == 2 * (4 + 4 + 4)
    by_name = {layer.fqn: layer for layer in report.layers}
    assert sum(by_name[f"{FIRST}.down_proj.{expert}"].tokens for expert in range(4)) == 3 * 24 * 2
    for layer in report.layers:
        assert 0 < layer.relative_error < 0.6
    weight = dense.get_parameter(f"{FIRST}.down_proj")[2]
    error = float(((weight - experts.down_proj.dequantize()[2]).square().sum() / weight.square().sum()).detach())
    assert by_name[f"{FIRST}.down_proj.2"].weight_error == pytest.approx(error, 1e-4)  # pyright: ignore
    model.set_experts_implementation("eager")
    model(data[0])


def test_data_lowers_the_error_on_what_experts_see() -> None:
    """Against the same stacks with X^T X of other tokens: what was seen has to matter."""
    model, data = mixtral(), token_ids(8)
    sums = sums_by_hand(model, data)
    dense, other = copy.deepcopy(model), copy.deepcopy(model)
    calibrate(model, config("1x4g8"), data)
    calibrate(other, config("1x4g8"), [torch.full((2, 12), 5)])

    def error(one: Any, name: str, expert: int) -> float:
        weight = dense.get_parameter(f"{FIRST}.{name}")[expert]
        difference = weight - one.get_parameter(f"{FIRST}.{name}").dequantize()[expert]
        return float((difference @ sums[f"{FIRST}.{name}", expert] * difference).sum().detach())

    places = [(name, expert) for name in ("gate_up_proj", "down_proj") for expert in range(4)]
    assert sum(error(model, *place) for place in places) < 0.9 * sum(error(other, *place) for place in places)


def accumulators(*counts: int) -> list[HessianAccumulator]:
    found = []
    for count in counts:
        one = HessianAccumulator(8)
        one.add(torch.randn(count, 8) * torch.arange(1, 9))
        found.append(one)
    return found


def test_experts_that_saw_little_are_completed() -> None:
    enough, little, nothing = accumulators(20, 2, 0)
    seen = [enough, little, nothing]
    total = enough.value() + little.value()
    assert torch.equal(completed(seen, 0, reads_input=True)[0], enough.value())  # pyright: ignore
    hessian, tokens = completed(seen, 1, reads_input=True)
    assert tokens == 2
    assert hessian is not None
    torch.testing.assert_close(hessian, little.value() + total * 6 / 22)
    torch.testing.assert_close(completed(seen, 2, reads_input=True)[0], total * 8 / 22)
    power = float(total.trace()) / (22 * 8)
    torch.testing.assert_close(
        completed(seen, 1, reads_input=False)[0], little.value() + 6 * power * torch.eye(8), rtol=1e-5, atol=1e-5
    )
    assert completed(accumulators(0, 0), 0, reads_input=True) == (None, 0)


def test_completion_helps_on_tokens_that_were_not_seen() -> None:
    from aqlm_tensor.quantizer.layer import quantize_layer
    from aqlm_tensor.scheme import AQLMScheme

    torch.manual_seed(0)
    mixing = torch.randn(32, 32) / torch.arange(1, 33).sqrt()
    weight, fresh = torch.randn(64, 32), torch.randn(2000, 32) @ mixing
    little, others = HessianAccumulator(32), HessianAccumulator(32)
    little.add(torch.randn(4, 32) @ mixing)
    others.add(torch.randn(500, 32) @ mixing)
    errors = []
    for hessian in (little.value(), completed([little, others], 0, reads_input=True)[0]):
        result = quantize_layer(weight, AQLMScheme.parse("1x4g4"), hessian=hessian)
        rebuilt = AQLMTensor(result.codes, result.codebooks, result.scales).dequantize()
        errors.append(float((fresh @ (weight - rebuilt).T).square().sum()))
    assert errors[1] < 0.8 * errors[0]


def test_killed_among_the_experts_and_resumed(tmp_path: Path) -> None:
    model, data = mixtral(), token_ids()
    whole = copy.deepcopy(model)
    tuning = FinetuneConfig(epochs=2)
    calibrate(whole, config("1x4g4"), data, finetune=tuning)
    assert isinstance(whole.get_parameter(f"{FIRST}.down_proj"), AQLMTensor), "fine-tuning puts the stack back"
    for stop in (7, 11, 19):
        options: dict[str, Any] = {"finetune": tuning, "work_dir": tmp_path / str(stop)}

        def kill(progress: Progress, stop: int = stop) -> None:
            if progress.done == stop:
                raise Killed

        with pytest.raises(Killed):
            calibrate(copy.deepcopy(model), config("1x4g4"), data, on_progress=kill, **options)
        resumed = copy.deepcopy(model)
        calibrate(resumed, config("1x4g4"), data, **options, resume=True)
        assert_same(resumed, whole)


def test_true_sequential_takes_experts_last() -> None:
    one, other = mixtral(), mixtral()
    data = token_ids()
    report = calibrate(one, config("1x4g4"), data, true_sequential=True)
    assert [layer.fqn.split(".")[-2] for layer in report.layers[4:12]] == ["gate_up_proj"] * 4 + ["down_proj"] * 4
    calibrate(other, config("1x4g4"), data)
    # attention is quantized when the experts' inputs are measured
    name = f"{FIRST}.down_proj"
    assert not torch.equal(one.get_parameter(name).codes, other.get_parameter(name).codes)


def test_a_scheme_per_layer_names_the_stacks_it_takes() -> None:
    model = mixtral()
    names = {f"{FIRST}.down_proj": config("1x4g4"), "re:.*q_proj": config("2x4g4")}
    report = calibrate(model, FqnToConfig(names), token_ids())  # pyright: ignore[reportArgumentType]
    assert {layer.fqn.rsplit(".", 1)[0] for layer in report.layers if "experts" in layer.fqn} == {f"{FIRST}.down_proj"}
    assert type(model.get_parameter(f"{FIRST}.gate_up_proj")) is nn.Parameter


def test_transposed_stacks_stay_dense_and_are_listed() -> None:
    model = mixtral()
    model.set_experts_implementation("eager")  # which does not look at the mark
    model.get_submodule(FIRST).is_transposed = True
    report = calibrate(model, config("1x4g4"), token_ids())
    assert "codes cannot express" in report.skipped[f"{FIRST}.down_proj"]
    assert isinstance(model.get_parameter("model.layers.1.mlp.experts.down_proj"), AQLMTensor)


class Batched(nn.Module):
    """Experts that are multiplied all at once."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.expert_stack = nn.Parameter(torch.randn(2, 32, 32))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.linear(x) + torch.einsum("bsi,eoi->bso", x, self.expert_stack)


def test_experts_that_cannot_be_watched_say_so() -> None:
    from tests.test_blocks import Decoder, batches

    model = Decoder(2)
    model.blocks = nn.ModuleList(Batched(nn.Linear(32, 32)) for _ in range(2))
    model.forward = lambda tokens: model.blocks[1](model.blocks[0](model.embedding(tokens)))
    with pytest.raises(ValueError, match="blocks.0.expert_stack saw no data"):
        calibrate(model, config("1x4g4"), batches())


def test_saved_as_checkpoints_of_the_family_are(tmp_path: Path) -> None:
    from tests.tiny_llama import write_dense

    model, data = mixtral(), token_ids()
    calibrate(model, config("1x4g4"), data)
    tokenizer = tf.AutoTokenizer.from_pretrained(write_dense(tmp_path / "llama"))
    save_model(model, tokenizer, tmp_path / "quantized")
    loaded, _ = load_model(find_model(tmp_path / "quantized"))
    with torch.no_grad():
        assert torch.equal(loaded(data[0]).logits, model(data[0]).logits)


def test_experts_share_a_column_of_the_table() -> None:
    report = calibrate(mixtral(), config("1x4g4"), token_ids())
    columns = [column.header for column in error_table(report).columns]
    assert columns == ["block", "q", "k", "v", "o", "gate_up", "down", "s"]
