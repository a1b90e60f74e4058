"""How models of many architectures call their blocks: calibrate gives what whole passes, block by block, give."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from aqlm_tensor import AQLMTensor, calibrate, quantize_
from aqlm_tensor.blocks import find_blocks, linears_of, members
from aqlm_tensor.calibration.activations import PLACES, Activations
from aqlm_tensor.calibration.block_calls import Batch, BlockCalls
from tests.models import config
from tests.test_blocks import Decoder, batches

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP: dict[str, Any] = {**SMALL, "intermediate_size": 64}
GROUPED: dict[str, Any] = {**MLP, "num_key_value_heads": 2}
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def token_ids(count: int = 3) -> list[Batch]:
    return [torch.randint(3, 59, (2, 12)) for _ in range(count)]


def padded() -> list[Batch]:
    """Batches of two lengths with masks; what the blocks get differs from batch to batch."""
    found: list[Batch] = []
    for length in (12, 9, 12):
        ids = torch.randint(3, 59, (2, length))
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        projection_dim=32,
    )
    text = tf.Qwen2Config(**GROUPED, pad_token_id=0)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    )


def with_images() -> list[Batch]:
    found: list[Batch] = []
    for _ in range(3):
        ids = torch.randint(3, 59, (2, 14))
        ids[:, 2:6] = 60
        found.append({"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)})
    return found


def to_and_from(count: int = 3) -> list[Batch]:
    ids = [(torch.randint(3, 60, (2, 10)), torch.randint(3, 60, (2, 7))) for _ in range(count)]
    return [{"input_ids": source, "decoder_input_ids": target} for source, target in ids]


SLIDING = {**GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


class Encoder(nn.Module):
    """torch's own blocks; the attention reads its weights without calling layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 4, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens))


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Batch]], str]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), padded, "LlamaDecoderLayer"),
    "gpt-neox": (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**MLP)), token_ids, "GPTNeoXLayer"),
    "gpt-j": (lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=4)), padded, "GPTJBlock"),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
        padded,
        "BloomBlock",
    ),
    "opt": (
        lambda: tf.OPTForCausalLM(tf.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)),
        token_ids,
        "OPTDecoderLayer",
    ),
    "gemma": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SLIDING)), padded, "Gemma3DecoderLayer"),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**MLP)), padded, "BertLayer"),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
        to_and_from,
        "T5Block",
    ),
    "llava": (llava, with_images, "Qwen2DecoderLayer"),
    "torch": (Encoder, token_ids, "TransformerEncoderLayer"),
}


def by_hand(model: nn.Module, data: list[Batch], scheme: str) -> None:
    for block in find_blocks(model):
        chosen = members(linears_of([block]))
        quantize_(model, config(scheme, step="prepare"), chosen)
        for batch in data:
            model(batch) if isinstance(batch, Tensor) else model(**batch)
        quantize_(model, config(scheme, step="convert"), chosen)


def decoded(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.dequantize() for name, value in model.named_parameters() if isinstance(value, AQLMTensor)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_calibrate_equals_whole_passes(name: str) -> None:
    build, data_of, block = ARCHITECTURES[name]
    torch.manual_seed(0)
    one = build().eval()
    other, data = copy.deepcopy(one), data_of()
    report = calibrate(one, config("1x4g4"), data)
    with torch.no_grad():
        by_hand(other, data, "1x4g4")
    assert type(find_blocks(one)[0]).__name__ == block
    ours, theirs = decoded(one), decoded(other)
    assert len(ours) == len(report.layers) >= 8
    # a rounding difference in an input may choose another code now and then
    same = [float((ours[key] - theirs[key]).abs().max()) < 1e-4 for key in theirs]
    assert len(same) == len(ours)
    assert sum(same) >= len(same) - 1


def test_each_batch_gets_its_own_masks() -> None:
    """If every batch used the arguments of the first, padded and unpadded ones would be mixed up."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).eval()
    data = padded()
    blocks = list(find_blocks(model))
    with torch.no_grad():
        calls = BlockCalls(model, blocks, data, device=torch.device("cpu"))
        for number, batch in enumerate(data):
            assert not isinstance(batch, Tensor)
            states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
            assert torch.equal(calls.inputs[number], states[0])
            torch.testing.assert_close(calls.run(0, number, states[0]), states[1])


def test_equal_arguments_are_kept_once() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).eval()
    with torch.no_grad():
        calls = BlockCalls(model, list(find_blocks(model)), token_ids(), device=torch.device("cpu"))
    tables = [call[1]["position_embeddings"][0] for batch in calls._arguments for call in batch]
    assert len(tables) == 6
    assert all(table is tables[0] for table in tables)


def test_hooks_are_gone_and_forwards_their_own() -> None:
    model = Decoder()
    with torch.no_grad():
        BlockCalls(model, list(model.blocks), batches(), device=torch.device("cpu"))
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.parametrize("place", PLACES)
def test_where_inputs_are_kept_changes_nothing(place: Any, tmp_path: Path) -> None:
    model, data = Decoder(), batches()
    plain = copy.deepcopy(model)
    calibrate(plain, config(), data)
    calibrate(model, config(), data, keep_inputs=place, work_dir=tmp_path)
    assert all(torch.equal(value, decoded(plain)[name]) for name, value in decoded(model).items())
    assert not list(tmp_path.glob("inputs.*")), "files of activations are gone at the end"


def test_activations_on_disk_are_on_disk(tmp_path: Path) -> None:
    kept = Activations("disk", torch.device("cpu"), tmp_path)
    tensors = [torch.randn(2, 3, 4).bfloat16(), torch.randn(5)]
    for tensor in tensors:
        kept.append(tensor)
    assert len(list(tmp_path.glob("inputs.*/*"))) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, tensors, strict=True))
    del kept
    assert not list(tmp_path.iterdir())


def test_unknown_place_and_batch_types_are_refused() -> None:
    with pytest.raises(ValueError, match="'device', 'cpu', 'disk', got 'attic'"):
        calibrate(Decoder(), config(), batches(), keep_inputs="attic")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="got list: pass a list of such batches"):
        calibrate(Decoder(), config(), [[1, 2, 3]])  # pyright: ignore[reportArgumentType]
    for unfit in (iter(batches()), torch.stack(batches())):
        with pytest.raises(TypeError, match="make a list of it first"):
            calibrate(Decoder(), config(), unfit)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a batch without any values"):
        calibrate(Decoder(), config(), [*batches(), torch.zeros(0, 16, dtype=torch.int64)])


class Leaking(Decoder):
    """Gives the later blocks something that the first one computed."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            (x,) = block(x, x.mean((0, 1)))
        return self.head(x)


class Changing(Decoder):
    """Changes the hidden state between blocks."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            (x,) = block(2 * x, torch.zeros(32))
        return self.head(x)


class Short(Decoder):
    """Leaves out its last block."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in list(self.blocks)[:-1]:
            (x,) = block(x, torch.zeros(32))
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Leaking(), "depends on what earlier blocks compute"),
        (Changing(), "block 1 .* is not called in order with the output"),
        (Short(), "did not call all"),
    ],
)
def test_models_that_are_no_plain_sequence_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(model, config(), batches())
    assert not decoded(model)


def test_blocks_in_other_containers_are_found() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict(
                {str(index): nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for index in (0, 1)}
            )

    model = Stack()
    assert list(find_blocks(model)) == list(model.layers.values())
    sequence = nn.Sequential(nn.Embedding(4, 8), *(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)))
    assert [type(block).__name__ for block in find_blocks(sequence)] == ["TransformerEncoderLayer"] * 3
    sequence = nn.Sequential(
        nn.Linear(4, 8), *(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)), nn.Linear(8, 4)
    )
    assert list(find_blocks(sequence)) == list(sequence)[1:-1]
    backbone = nn.Sequential(nn.Linear(4, 8), Stack())
    assert list(find_blocks(nn.Sequential(backbone, nn.Linear(8, 2)))) == list(backbone[1].layers.values())  # pyright: ignore
    inner = nn.ModuleList(Stack() for _ in range(2))
    assert find_blocks(nn.Sequential(inner)) is inner


def test_conv1d_says_what_to_do() -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT))
    with pytest.raises(ValueError, match="Conv1D.* have to become nn.Linear"):
        calibrate(model, config(), token_ids())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("place", PLACES)
def test_one_block_at_a_time_on_the_gpu(place: Any) -> None:
    torch.manual_seed(0)
    model, data = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).eval(), padded()
    on_cpu = copy.deepcopy(model)
    report = calibrate(model, config("1x4g4"), data, device="cuda", keep_inputs=place)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert report.run is not None
    assert set(report.run.peak_memory_bytes) == {"host", "capture", "calibrate", "quantize", "propagate"}
    expected = calibrate(on_cpu, config("1x4g4"), data)
    for ours, theirs in zip(report.layers, expected.layers, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=0.2)
