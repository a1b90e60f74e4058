"""AQLMTensor: an AQLM-quantized weight that behaves like the dense matrix it stands for.

It wraps exactly the three tensors of an AQLM checkpoint (codes, codebooks, scales) and reports the shape, dtype and
device of the dense weight. `nn.Linear` stays `nn.Linear`: only its weight changes type. Multiplications run on the
codes (`aqlm_tensor.tensor_ops`, `aqlm_tensor.tensor_views`); anything that codes cannot express raises and
names the remedy, usually `dequantize()`.

Shapes: O out_features, I in_features, H out_group_size, G in_group_size, K codebooks of 2^N entries, P partitions,
E experts.
"""

import math
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from aqlm_tensor.codes import check_codes
from aqlm_tensor.kernels import ops, registry
from aqlm_tensor.scheme import AQLMScheme

if TYPE_CHECKING:
    from aqlm_tensor.quantizer.solver import SolverConfig

__all__ = ["FLOATS", "AQLMTensor", "Orientation"]

Orientation = Literal["matrix", "transposed", "row", "flat"]


class AQLMTensor(TorchAOBaseTensor):
    """A weight [O, I], stored as sums of codebook entries.

    weight[o, i] = scales[o // H] * sum over k of codebooks[k, codes[o // H, i // G, k], o % H, i % G]

    Tensor attributes:
        codes: [O/H, I/G, K], int8 for up to 8 bits, int16 beyond; the low N bits are the index of the entry.
        codebooks: [K, 2^N, H, G], or [P, K, 2^N, H, G] for P equal row partitions with codebooks of their own;
            float32, float16 or bfloat16, which is also the dtype of the tensor.
        scales: [O/H, 1, 1, 1], in the codebooks' dtype.

    Non-tensor attributes:
        orientation: "matrix" for [O, I], "transposed" for its transposed view [I, O], "row" for a single row [I],
            "flat" for `view(-1)`, which only dequantizes and views back.

    With a leading dimension E on all three tensors it is a stack [E, O, I] of expert weights.

    Args:
        codes: as above, taken as it is (never copied or changed). Or an AQLMTensor alone, which makes it an
            `nn.Parameter`: accelerate rebuilds a parameter that it moved as `type(old)(moved, requires_grad=...)`.
        codebooks: as above.
        scales: as above.
        orientation: as above.
        requires_grad: False, unless an error is wanted.

    Raises:
        TypeError: for something that is not a tensor, or a wrong dtype.
        ValueError: for shapes, devices or group counts that do not belong together.
    """

    tensor_data_names = ["codes", "codebooks", "scales"]
    tensor_attribute_names = []
    optional_tensor_attribute_names = ["orientation"]

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    orientation: Orientation

    def __new__(
        cls,
        codes: Tensor,
        codebooks: Tensor | None = None,
        scales: Tensor | None = None,
        orientation: Orientation = "matrix",
        *,
        requires_grad: bool = False,
    ) -> Self:
        """Validate the three tensors and wrap them."""
        if isinstance(codes, cls) and codebooks is None:
            return cast("Self", nn.Parameter(codes, requires_grad=requires_grad))
        codes, codebooks, scales = _check_parts(codes, codebooks, scales)
        shape = (*codes.shape[:-3], *ops.weight_shape(codes, codebooks))
        strides = _contiguous_strides(shape)
        if orientation == "transposed":
            shape = (*shape[:-2], shape[-1], shape[-2])
            strides = (*strides[:-2], strides[-1], strides[-2])
        elif orientation == "row":
            if shape[:-1] != (1,):
                raise ValueError(f"only a single row can have orientation 'row', got a weight of shape {shape}")
            shape, strides = shape[1:], strides[1:]
        elif orientation == "flat":
            shape, strides = (math.prod(shape),), (1,)
        elif orientation != "matrix":
            raise ValueError(f"orientation must be 'matrix', 'transposed', 'row' or 'flat', got {orientation!r}")
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=codebooks.dtype, device=codes.device, requires_grad=False
        )
        self.codes = codes
        self.codebooks = codebooks
        self.scales = scales
        self.orientation = orientation
        return self.requires_grad_(requires_grad)

    def __init__(
        self,
        codes: Tensor,
        codebooks: Tensor | None = None,
        scales: Tensor | None = None,
        orientation: Orientation = "matrix",
        *,
        requires_grad: bool = False,
    ) -> None:
        super().__init__()

    @classmethod
    def from_hp(
        cls,
        weight: Tensor,
        scheme: str | AQLMScheme,
        *,
        hessian: Tensor | None = None,
        solver: "SolverConfig | None" = None,
        seed: int = 0,
        codebook_dtype: torch.dtype | None = None,
    ) -> Self:
        """Quantize a high-precision weight.

        Minimises tr((W - What) X^T X (W - What)^T); without a Hessian, the plain squared error.

        Args:
            weight: [O, I], floating point; left unchanged.
            scheme: for example "2x8g8".
            hessian: X^T X of the layer's inputs, [I, I], or None (data-free).
            solver: the effort to spend; None for the defaults.
            seed: of the random initialisation; the same seed gives the same codes.
            codebook_dtype: dtype of codebooks, scales and so of the result; None keeps the weight's.

        Raises:
            ValueError: for non-finite values, shapes that do not fit, or an unknown scheme.
            TypeError: for a weight that is not floating point.
        """
        from aqlm_tensor.quantizer.layer import quantize_layer
        from aqlm_tensor.quantizer.solver import SolverConfig

        dtype = codebook_dtype or weight.dtype
        quantize: Any = torch.compiler.disable(quantize_layer)
        result = quantize(
            weight,
            AQLMScheme.parse(scheme),
            hessian=hessian,
            solver=solver or SolverConfig(),
            seed=seed,
            dtype=dtype,
        )
        return cls(result.codes, result.codebooks.to(dtype), result.scales.to(dtype))

    @property
    def scheme(self) -> AQLMScheme:
        """Codebooks and groups, for example 2x8g8."""
        return ops.scheme_of(self.codebooks)

    @property
    def partitions(self) -> int:
        """P, the number of equal row partitions with codebooks of their own."""
        return self.codebooks.shape[-5] if self.codebooks.dim() - self.codes.dim() == 2 else 1

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, codebooks and scales included; nan if empty."""
        if self.numel() == 0:
            return float("nan")
        return 8 * sum(part.numel() * part.element_size() for part in self.parts()) / self.numel()

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, codebooks, scales)."""
        return self.codes, self.codebooks, self.scales

    def dequantize(self) -> Tensor:
        """The dense weight of the same shape, dtype and device, each element rounded once."""
        if self.codes.dim() == 3:
            dense = ops.dequantize(*self.parts())
        elif self.codes.shape[0] == 0:
            dense = self.codebooks.new_empty(0, *ops.weight_shape(self.codes, self.codebooks))
        else:
            dense = torch.stack([ops.dequantize(*expert) for expert in self.experts()])
        if self.orientation == "transposed":
            return dense.mT
        if self.orientation == "flat":
            return dense.reshape(-1)
        return dense[0] if self.orientation == "row" else dense

    def experts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(codes, codebooks, scales) of each expert of a stack [E, O, I]."""
        return list(zip(*(part.unbind(0) for part in self.parts()), strict=True))

    def check_codes(self) -> None:
        """Raise ValueError unless every stored code denotes an entry of its codebook; reads all codes."""
        check_codes(self.codes, self.scheme.nbits_per_codebook)

    def invalidate_cache(self) -> None:
        """Forget what kernels derived from codes and codebooks; needed only after writing to their `.data`."""
        registry.invalidate(self.codes)
        registry.invalidate(self.codebooks)

    def requires_grad_(self, requires_grad: bool = True) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Accept False only: a gradient to the packed weight as a whole does not exist.

        Raises:
            RuntimeError: for True, naming `trainable`.
        """
        if requires_grad:
            raise RuntimeError(
                "an AQLMTensor cannot require a gradient: its codes are discrete. As a parameter write "
                "`nn.Parameter(w, requires_grad=False)`. To train codebooks and scales use "
                "`with aqlm_tensor.trainable(model): ...`; to train adapters, or for load_state_dict(..., assign=True) "
                "into a model made for training, call `model.requires_grad_(False)` first."
            )
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in cls._ATEN_OP_TABLE[cls]:
            # in inference mode, where nothing above takes composite ops apart
            result = func.decompose(*args, **kwargs) if torch.is_inference_mode_enabled() else NotImplemented
            if result is not NotImplemented:
                return result
            raise NotImplementedError(
                f"{func} is not defined on an AQLMTensor: call `.dequantize()` first to work on the dense weight"
            )
        if func is not torch.ops.aten.detach.default and any(_would_lose_gradient(arg) for arg in args):
            raise RuntimeError(
                f"{func} works below autograd, where the gradient to codebooks and scales would get lost: call it on "
                "`.detach()`, or compute with the three tensors"
            )
        if func.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference():
            with torch.inference_mode(False):  # a view of an ordinary tensor is one, too
                return super().__torch_dispatch__(func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def share_memory_(self) -> Self:
        """Move the inner tensors to shared memory, in place."""
        for part in self.parts():
            part.share_memory_()
        return self

    def extra_repr(self) -> str:
        """What `nn.Linear` shows of its weight, as torchao's tensors do."""
        bits = self.bits_per_weight
        bits = f"{bits:.3f}" if isinstance(bits, float) else str(bits)  # symbolic while torch.compile traces
        return f"scheme={self.scheme}, bits_per_weight={bits}"

    def _quantization_type(self) -> str:
        return self.extra_repr()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        orientation = "" if self.orientation == "matrix" else f", orientation={self.orientation!r}"
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, {self.extra_repr()}, dtype={self.dtype}, "
            f"device={self.device}{orientation})"
        )

    @classmethod
    def __tensor_unflatten__(
        cls, tensor_data_dict: dict[str, Tensor], tensor_attributes: dict[str, Any], outer_size: Any, outer_stride: Any
    ) -> Self:
        """Wrap inner tensors again, for torch.compile: with its own symbols for the outer sizes, not new products."""
        codes, codebooks, scales = (tensor_data_dict[name] for name in cls.tensor_data_names)
        self = torch.Tensor._make_wrapper_subclass(
            cls, outer_size, strides=outer_stride, dtype=codebooks.dtype, device=codes.device, requires_grad=False
        )
        self.codes, self.codebooks, self.scales = codes, codebooks, scales
        self.orientation = tensor_attributes["orientation"]
        return self

    def _stable_hash_for_caching(self) -> str:
        """Key of torch.compile's on-disk cache: everything the handlers' Python code may branch on."""
        inner = [
            (name, str(part.dtype), tuple(part.shape), part.stride(), str(part.device), part.requires_grad)
            for name, part in zip(self.tensor_data_names, self.parts(), strict=True)
        ]
        return repr((type(self).__qualname__, version("aqlm-tensor"), self.orientation, inner))


def _would_lose_gradient(w: Any) -> bool:
    if not isinstance(w, AQLMTensor) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return w.codebooks.requires_grad or w.scales.requires_grad


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))  # as torch has it for empty tensors
    return tuple(reversed(strides))


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check_parts(codes: Any, codebooks: Any, scales: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors; raises TypeError or ValueError unless they make a weight together."""
    for name, part in (("codes", codes), ("codebooks", codebooks), ("scales", scales)):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(part).__name__}")
    if codebooks.dtype not in FLOATS:
        raise TypeError(f"codebooks must be float32, float16 or bfloat16, got {codebooks.dtype}")
    if scales.dtype != codebooks.dtype:
        raise TypeError(f"scales are {scales.dtype} but codebooks are {codebooks.dtype}: cast one to the other's dtype")
    devices = {str(part.device) for part in (codes, codebooks, scales)}
    if len(devices) > 1:
        raise ValueError(f"codes, codebooks and scales lie on different devices {sorted(devices)}: move them to one")
    _check_shapes(codes, codebooks, scales)
    return codes, codebooks, scales


def _check_shapes(codes: Tensor, codebooks: Tensor, scales: Tensor) -> None:
    if codes.dim() not in (3, 4):
        raise ValueError(
            "codes must have shape [out_groups, in_groups, num_codebooks] (or a leading expert dimension), "
            f"got {tuple(codes.shape)}"
        )
    lead = codes.shape[:-3]
    if codebooks.dim() - codes.dim() not in (1, 2) or codebooks.shape[: len(lead)] != lead:
        raise ValueError(
            "codebooks must have shape [num_codebooks, 2^nbits, out_group, in_group] or [partitions, num_codebooks, "
            f"...], with codes' leading expert dimension if there is one; got {tuple(codebooks.shape)} for codes "
            f"{tuple(codes.shape)}"
        )
    num_codebooks, size, out_group, in_group = codebooks.shape[-4:]
    if size < 2 or size > 1 << 16 or size & (size - 1):
        raise ValueError(f"a codebook must have 2^nbits entries with nbits 1 to 16, got {size}")
    if min(num_codebooks, out_group, in_group) < 1:
        raise ValueError(f"codebooks must not be empty, got shape {tuple(codebooks.shape)}")
    if codes.shape[-1] != num_codebooks:
        raise ValueError(f"codes are for {codes.shape[-1]} codebooks, but there are {num_codebooks}")
    expected = torch.int8 if size <= 256 else torch.int16
    if codes.dtype != expected:
        raise TypeError(f"codes of codebooks with {size} entries must be {expected}, got {codes.dtype}")
    if scales.shape != (*codes.shape[:-2], 1, 1, 1):
        raise ValueError(f"scales must have shape {(*codes.shape[:-2], 1, 1, 1)}, got {tuple(scales.shape)}")
    partitions = codebooks.shape[-5] if codebooks.dim() - codes.dim() == 2 else 1
    if partitions < 1 or codes.shape[-3] % partitions:
        raise ValueError(f"{codes.shape[-3]} output groups cannot be split into {partitions} equal partitions")


from aqlm_tensor import (  # noqa: E402 - they register handlers on the class above
    tensor_copies,  # noqa: F401
    tensor_distributed,  # noqa: F401
    tensor_experts,  # noqa: F401
    tensor_ops,  # noqa: F401
    tensor_views,  # noqa: F401
)

torch.serialization.add_safe_globals([AQLMTensor])
