"""DoRA (Liu et al., 2024) on AQLM weights, without making them dense.

DoRA scales each row of W + s B A to a learned magnitude, for which every forward pass needs the row norms of the sum.
PEFT computes them from the dense weight and a dense B A, [O, I] both. Here they come from the expansion

    |w + s b A|^2 = |w|^2 + 2 s b . (A w) + s^2 b (A A^T) b^T      for each row w of W and b of B

in which |w|^2 does not change during training and A W^T is one more product with the codes, of r rows.
"""

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_tensor.tensor import AQLMTensor

__all__ = ["AQLMDoraLayer"]


class AQLMDoraLayer(DoraLinearLayer):
    """PEFT's magnitude vector, with the norms computed from codes.

    Attributes:
        weight: the magnitudes, [O].
        squared_norms: |w|^2 of each row of the base layer's weight, [O] float32, not saved.
    """

    squared_norms: Tensor
    weight: nn.Parameter
    _computed_for: tuple

    def prepare(self, weight: AQLMTensor) -> None:
        """Compute the norms of the weight's rows [O, I]."""
        norms = weight.dequantize().float().square().sum(1)
        self.register_buffer("squared_norms", norms, persistent=False)
        self._computed_for = _state(weight)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What DoRA adds to the output of the base layer, for x [..., I]; with dropout there is no `base_result`."""
        weight = base_layer.weight
        if not isinstance(weight, AQLMTensor):
            return super().forward(
                x,
                lora_A=lora_A,
                lora_B=lora_B,
                scaling=scaling,
                base_layer=base_layer,
                base_result=base_result,
                adapter_name=adapter_name,
            )
        if not torch.compiler.is_compiling() and (
            self._computed_for != _state(weight) or self.squared_norms.dtype != torch.float32
        ):
            self.prepare(weight)
        norm = self._norm(weight, lora_A.weight.detach(), lora_B.weight.detach(), scaling)
        factor = (self.weight / norm.to(self.weight.dtype)).view(1, -1)
        if base_result is None:
            product = F.linear(x.to(weight.dtype), weight).to(x.dtype)
        else:
            product = base_result if base_layer.bias is None else base_result - base_layer.bias
        return (factor - 1) * product + factor * lora_B(lora_A(x)) * scaling

    @torch.no_grad()
    def _norm(self, weight: AQLMTensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        """Row norms [O] of W + s B A in float32; a constant for the gradient (section 4.3 of the paper)."""
        cross = F.linear(down.to(weight.dtype), weight).float()  # A W^T, [r, O]
        down, up = down.float(), up.float()
        squared = self.squared_norms + (2 * scaling) * (up * cross.T).sum(1)
        squared = squared + scaling**2 * ((up @ (down @ down.T)) * up).sum(1)
        return squared.clamp_min(0).sqrt()


def _state(weight: AQLMTensor) -> tuple:
    """Changes whenever the values may have: another tensor, or a write in place."""
    return tuple((part.data_ptr(), 0 if part.is_inference() else part._version) for part in weight.parts())
