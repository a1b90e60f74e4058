"""Small models that the tests quantize, and a solver that does as little as possible."""

from typing import Any

import torch
from torch import Tensor, nn

from aqlm_tensor import AQLMWeightConfig, SolverConfig

__all__ = ["QUICK", "Attention", "TiedLM", "config", "mlp"]

QUICK = SolverConfig(max_rounds=1, kmeans_iterations=1)


def config(scheme: str = "2x4g8", **fields: object) -> AQLMWeightConfig:
    """An AQLMWeightConfig with the quick solver."""
    return AQLMWeightConfig(scheme, solver=QUICK, **fields)  # pyright: ignore[reportArgumentType]


def mlp() -> Any:
    """Three linear layers "0", "2", "4" of different shapes, all divisible by 8."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96, bias=False), nn.ReLU(), nn.Linear(96, 64))


class Attention(nn.Module):
    """q, k and v read one input, o another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))


class TiedLM(nn.Module):
    """Embedding, two layers with one weight, and a head tied to the embedding, as Transformers models expose it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 128)
        self.first = nn.Linear(128, 64)
        self.second = nn.Linear(128, 64)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.up(self.embedding(tokens)))
        return self.head(self.norm(self.first(hidden) + self.second(hidden)))
