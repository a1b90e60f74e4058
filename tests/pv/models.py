"""A small language model whose tuning takes a second, its quantized copy and its data."""

import copy

import torch
from torch import Tensor, nn

from aqlm_tensor import AQLMTensor, PVConfig, quantize_
from aqlm_tensor.blocks import in_blocks
from tests.models import config

__all__ = ["QUICK", "Decoder", "batches", "codes", "divergence", "prepared"]

QUICK = PVConfig(epochs=3, lr=1e-2, steps_per_round=6, validation=0.25)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Decoder(nn.Module):
    """A language model whose logits depend on its blocks strongly enough to see what quantizing does."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(32, 40, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(count: int = 12) -> list[Tensor]:
    return [torch.randint(40, (4, 16)) for _ in range(count)]


def prepared(scheme: str = "2x3g8") -> tuple[Decoder, Decoder, list[Tensor]]:
    """(quantized, dense, batches)."""
    dense = Decoder().eval()
    model = copy.deepcopy(dense)
    quantize_(model, config(scheme), in_blocks(model))
    return model, dense, batches()


def divergence(model: nn.Module, dense: nn.Module, data: list[Tensor]) -> float:
    """Of the model's distributions from the dense one's, in float64, without any code of the library."""
    with torch.no_grad():
        pairs = [(dense(batch).double().log_softmax(-1), model(batch).double().log_softmax(-1)) for batch in data]
    return float(torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in pairs]).mean())


def codes(model: nn.Module) -> list[Tensor]:
    return [p.codes.clone() for p in model.parameters() if isinstance(p, AQLMTensor)]
