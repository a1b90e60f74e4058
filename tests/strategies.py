"""What tests are run on: hypothesis strategies for schemes and cases, and the tensors a case stands for.

A `Case` is a small, printable description (scheme, sizes, dtype, kind of values, memory layout, seed); `build` makes
its tensors, always the same ones. Hypothesis draws and shrinks the description, never the numbers.

    @given(case=cases())
    def test_something(case): operands = build(case)

`cases(...)` takes fixed choices for any field, for example `cases(schemes=st.just(AQLMScheme.parse("2x8")))`.
`LARGE_CASES` are named cases beyond the strategy's size limit, for parametrize.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from hypothesis import strategies as st
from torch import Tensor

from aqlm_tensor.scheme import AQLMScheme

__all__ = [
    "DTYPES",
    "LARGE_CASES",
    "LARGE_SCHEMES",
    "VALUES",
    "Case",
    "Encoding",
    "Layout",
    "Operands",
    "Values",
    "build",
    "cases",
    "random_parts",
    "schemes",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CODEBOOK_ELEMENTS = 1 << 20
MAX_WEIGHTS = 1 << 15

# normal      Gaussian data; the only kind the normwise bound speaks of
# exact       small integers and powers of two: float32 arithmetic makes no error in whatever order, so none is allowed
# positive    no cancellation, so that rounding errors of a long float32 sum add up
# wide        magnitudes spread over many powers of ten; float16 results overflow
# subnormal   codebook entries below the smallest normal number
# zero        x, codebooks and bias are zero
# nonfinite   some rows of x hold NaN or infinities
# bad_entry   one codebook entry is NaN
Values = Literal["normal", "exact", "positive", "wide", "subnormal", "zero", "nonfinite", "bad_entry"]
VALUES: tuple[Values, ...] = ("normal", "exact", "positive", "wide", "subnormal", "zero", "nonfinite", "bad_entry")

# contiguous  as it comes
# sliced      a window of a larger tensor: odd storage offset, rows farther apart than they are long
# transposed  the last two dimensions swapped in memory
# expanded    one row repeated with stride 0 (of x; other tensors are sliced)
Layout = Literal["contiguous", "sliced", "transposed", "expanded"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "sliced", "transposed", "expanded")

# signed      wrapped at 2^(N-1), as official files have it
# unsigned    plain indices, where the storage type holds them
# mixed       each code one or the other
Encoding = Literal["signed", "unsigned", "mixed"]
ENCODINGS: tuple[Encoding, ...] = ("signed", "unsigned", "mixed")


@dataclass(frozen=True)
class Case:
    """One reproducible problem.

    Attributes:
        scheme: codebooks and groups.
        out_groups: out_features / H; a multiple of `partitions`.
        in_groups: in_features / G.
        rows: M, rows of x.
        dtype: of x, codebooks, scales and bias.
        partitions: row partitions with codebooks of their own; 0 for codebooks without that dimension.
        values: what the numbers look like.
        bias: whether there is one.
        x_layout: memory layout of x (and of the gradient).
        codes_layout: memory layout of codes, codebooks and scales.
        encoding: how indices are stored.
        seed: of all random numbers.
    """

    scheme: AQLMScheme
    out_groups: int
    in_groups: int
    rows: int
    dtype: torch.dtype = torch.float32
    partitions: int = 0
    values: Values = "normal"
    bias: bool = False
    x_layout: Layout = "contiguous"
    codes_layout: Layout = "contiguous"
    encoding: Encoding = "signed"
    seed: int = 0

    @property
    def out_features(self) -> int:
        """O."""
        return self.out_groups * self.scheme.out_group_size

    @property
    def in_features(self) -> int:
        """I."""
        return self.in_groups * self.scheme.in_group_size


@dataclass(frozen=True)
class Operands:
    """The tensors of a case.

    Attributes:
        case: where they come from.
        x: [M, I].
        grad: [M, O], a gradient to the output of the linear, with the same kind of values as x.
        codes: [O/H, I/G, K].
        codebooks: [K, 2^N, H, G] or [P, K, 2^N, H, G].
        scales: [O/H, 1, 1, 1].
        bias: [O] or None.
    """

    case: Case
    x: Tensor
    grad: Tensor
    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    bias: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, codebooks, scales), as AQLMTensor and the ops take them."""
        return self.codes, self.codebooks, self.scales

    def to(self, device: str | torch.device) -> Self:
        """The same operands on a device; layouts other than contiguous survive only on the CPU."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("x", "grad", "codes", "codebooks", "scales", "bias")
            if getattr(self, name) is not None
        }
        return replace(self, **moved)


def build(case: Case) -> Operands:
    """The tensors of a case, on the CPU; the same case always gives the same ones."""
    generator = torch.Generator().manual_seed(case.seed)
    scheme = case.scheme
    lead = (case.partitions,) if case.partitions else ()
    codes = _codes(case, generator)
    x = _activations(case, (case.rows, case.in_features), generator)
    grad = _activations(case, (case.rows, case.out_features), generator)
    codebooks = _entries(case, (*lead, *scheme.codebooks_shape), generator)
    scales = _scales(case, generator)
    bias = _bias(case, generator) if case.bias else None
    return Operands(
        case,
        _lay_out(x, case.x_layout),
        _lay_out(grad, case.x_layout),
        _lay_out(codes, case.codes_layout),
        _lay_out(codebooks, case.codes_layout),
        _lay_out(scales, case.codes_layout),
        bias,
    )


def random_parts(
    scheme: str | AQLMScheme,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    partitions: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, codebooks, scales) of a Gaussian weight [out_features, in_features]; for tests that need just one."""
    scheme = AQLMScheme.parse(scheme)
    assert scheme.why_not(out_features, in_features) is None
    out_groups, in_groups, _ = scheme.codes_shape(out_features, in_features)
    return build(Case(scheme, out_groups, in_groups, 0, dtype, partitions, seed=seed)).parts


def _codes(case: Case, generator: torch.Generator) -> Tensor:
    scheme = case.scheme
    shape = scheme.codes_shape(case.out_features, case.in_features)
    indices = torch.randint(0, scheme.codebook_size, shape, generator=generator)
    signed = torch.where(indices >= scheme.codebook_size // 2, indices - scheme.codebook_size, indices)
    storable = scheme.codebook_size - 1 <= torch.iinfo(scheme.codes_dtype).max
    if case.encoding == "signed" or not storable:
        stored = signed
    elif case.encoding == "unsigned":
        stored = indices
    else:
        stored = torch.where(torch.rand(shape, generator=generator) < 0.5, signed, indices)
    return stored.to(scheme.codes_dtype)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _integers(limit: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=generator).double()


def _spread(decades: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    exponents = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return _normal(shape, generator) * 10 ** (decades * exponents)


def _activations(case: Case, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    match case.values:
        case "zero":
            values = torch.zeros(shape, dtype=torch.float64)
        case "exact" | "subnormal":
            values = _integers(2, shape, generator)
        case "positive":
            values = torch.rand(shape, generator=generator, dtype=torch.float64)
        case "wide":
            values = _spread(2.5 if case.dtype == torch.float16 else 12, shape, generator)
        case _:
            values = _normal(shape, generator)
    values = values.to(case.dtype)
    if case.values == "nonfinite" and values.numel():
        for row in range(0, shape[0], 3):
            column = int(torch.randint(0, shape[1], (), generator=generator))
            values[row, column] = (float("nan"), float("inf"), float("-inf"))[row // 3 % 3]
    return values


def _entries(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    match case.values:
        case "zero":
            values = torch.zeros(shape, dtype=torch.float64)
        case "exact":
            values = _integers(3, shape, generator)
        case "positive":
            values = torch.rand(shape, generator=generator, dtype=torch.float64)
        case "wide":
            values = _spread(1 if case.dtype == torch.float16 else 12, shape, generator)
        case "subnormal":
            info = torch.finfo(case.dtype)
            values = _integers(5, shape, generator) * (info.smallest_normal * info.eps)
        case _:
            values = _normal(shape, generator)
    values = values.to(case.dtype)
    if case.values == "bad_entry":
        values.view(-1, shape[-1])[0, -1] = float("nan")  # entry 0, which padding is likeliest to look up
    return values


def _scales(case: Case, generator: torch.Generator) -> Tensor:
    shape = (case.out_groups, 1, 1, 1)
    match case.values:
        case "exact":
            values = 2 ** _integers(1, shape, generator)
        case "subnormal":
            values = torch.ones(shape, dtype=torch.float64)
        case "positive":
            values = torch.rand(shape, generator=generator, dtype=torch.float64)
        case _:
            values = _normal(shape, generator)  # scales are positive in practice; nothing says so
    return values.to(case.dtype)


def _bias(case: Case, generator: torch.Generator) -> Tensor:
    shape = (case.out_features,)
    match case.values:
        case "zero":
            values = torch.zeros(shape, dtype=torch.float64)
        case "exact":
            values = _integers(9, shape, generator)
        case "subnormal":
            info = torch.finfo(case.dtype)
            values = _integers(9, shape, generator) * (info.smallest_normal * info.eps)
        case "positive":
            values = torch.rand(shape, generator=generator, dtype=torch.float64)
        case _:
            values = _normal(shape, generator)
    return values.to(case.dtype)


def _lay_out(tensor: Tensor, layout: Layout) -> Tensor:
    """A tensor of the same shape, with the same values (but for "expanded"), in another memory layout."""
    if layout == "contiguous" or tensor.dim() < 2:
        return tensor
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and tensor.dim() == 2 and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape)
    wide = tensor.new_zeros([size + 2 for size in tensor.shape[:2]] + list(tensor.shape[2:]))
    window = wide[1:-1, 1:-1]
    return window.copy_(tensor)


@st.composite
def schemes(draw: st.DrawFn) -> AQLMScheme:
    """K 1..8, N 1..16, G 4..64, H 1..4 with at most 2^20 codebook elements; usual sizes are drawn most often."""
    nbits = draw(st.sampled_from((8, 8, 4, 1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16)))
    in_group = draw(st.sampled_from((8, 4, 16, 32, 64)) | st.integers(4, 64))
    out_group = draw(st.sampled_from((1, 1, 1, 2, 3, 4)))
    while (1 << nbits) * in_group * out_group > MAX_CODEBOOK_ELEMENTS:
        in_group, out_group = (8, out_group) if in_group > 8 else (in_group, 1)
    most = min(8, MAX_CODEBOOK_ELEMENTS // ((1 << nbits) * in_group * out_group))
    return AQLMScheme(draw(st.integers(1, most)), nbits, in_group, out_group)


_SCHEMES = schemes()
_DTYPES = st.sampled_from(DTYPES)
_VALUES: st.SearchStrategy[Values] = st.sampled_from(VALUES)
_ROWS = st.sampled_from((1, 2, 3, 0, 7, 8, 9, 17, 33))
_LAYOUTS: st.SearchStrategy[Layout] = st.sampled_from(LAYOUTS)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    schemes: st.SearchStrategy[AQLMScheme] = _SCHEMES,
    dtypes: st.SearchStrategy[torch.dtype] = _DTYPES,
    values: st.SearchStrategy[Values] = _VALUES,
    rows: st.SearchStrategy[int] = _ROWS,
    layouts: st.SearchStrategy[Layout] = _LAYOUTS,
    max_weights: int = MAX_WEIGHTS,
) -> Case:
    """Cases of at most `max_weights` weights; every argument narrows one field."""
    scheme = draw(schemes)
    partitions = draw(st.sampled_from((0, 0, 1, 2, 3)))
    if partitions * scheme.codebook_size * scheme.num_codebooks * scheme.in_group_size > 2 * MAX_CODEBOOK_ELEMENTS:
        partitions = 0
    unit = max(1, partitions)
    in_groups = draw(st.sampled_from((1, 2, 3, 4, 5, 8, 16, 31)) | st.integers(0, 40))
    most = max_weights // (unit * scheme.out_group_size * max(1, in_groups) * scheme.in_group_size)
    out_groups = draw(st.sampled_from((1, 2, 3, 5, 8, 16, 33, 64)) | st.integers(0, 70))
    return Case(
        scheme,
        unit * min(out_groups, max(1, most)),
        in_groups,
        draw(rows),
        draw(dtypes),
        partitions,
        draw(values),
        draw(st.booleans()),
        draw(layouts),
        draw(layouts),
        draw(st.sampled_from(ENCODINGS)),
        draw(st.integers(0, 3)),
    )


LARGE_SCHEMES = tuple(AQLMScheme.parse(text) for text in ("4x16g8", "2x16g16", "8x12g64", "16x8g8", "1x16g8o4"))

LARGE_CASES = {
    "square 2x8": Case(AQLMScheme(2, 8), 768, 96, 4),
    "one token 1x16": Case(AQLMScheme(1, 16), 1024, 64, 1, torch.bfloat16),
    "long sums 2x8": Case(AQLMScheme(2, 8), 40, 1376, 5),
    "long positive sums 1x8": Case(AQLMScheme(1, 8), 33, 1376, 3, values="positive"),
    "fused qkv 2x8": Case(AQLMScheme(2, 8), 3 * 192, 72, 9, torch.float16, partitions=3, bias=True),
    "8x8g32": Case(AQLMScheme(8, 8, 32), 512, 16, 3, torch.bfloat16, bias=True),
    "4x8 odd": Case(AQLMScheme(4, 8), 257, 37, 6, torch.float16),
    "2x12": Case(AQLMScheme(2, 12), 320, 40, 4),
    "1x16g16, wide input": Case(AQLMScheme(1, 16, 16), 64, 300, 2, torch.float16),
    "prefill 2x8": Case(AQLMScheme(2, 8), 96, 24, 300),
    **{f"large codebooks {scheme}": Case(scheme, 24, 6, 48, bias=True) for scheme in LARGE_SCHEMES},
}
