"""Views and concatenations of an AQLMTensor equal those of the dense weight, or raise."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import AQLMTensor
from tests.tensor.weights import as_aqlm, random_weight

# what codes can express for every view of a 2x8g8 weight whose sizes are multiples of 8
ALWAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "[8:16]": lambda w: w[8:16],
    "[-16:-8]": lambda w: w[-16:-8],
    "[..., 8:24]": lambda w: w[..., 8:24],
    "[..., :8, 16:]": lambda w: w[..., :8, 16:],
    "[1000:]": lambda w: w[1000:],
    "[16:8]": lambda w: w[16:8],
    "[:]": lambda w: w[:],
    "[...]": lambda w: w[...],
    "narrow": lambda w: w.narrow(-1, 8, 16),
    "split": lambda w: w.split(8, -2)[1],
    "split uneven": lambda w: w.split([8, w.shape[-1] - 8], -1)[1],
    "split remainder": lambda w: w.split(w.shape[-1] - 8, -1)[1],
    "split whole": lambda w: w.split(1000)[0],
    "chunk": lambda w: w.chunk(2, -2)[1],
    "tensor_split": lambda w: w.tensor_split(2, -1)[1],
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(-1, -2),
    "swapaxes": lambda w: w.swapaxes(-2, -1),
    "movedim": lambda w: w.movedim(-1, -2),
    "permute": lambda w: w.permute(*range(w.dim() - 2), -1, -2),
    "twice transposed": lambda w: w.mT.mT,
    "transposed slice": lambda w: w.mT[..., 8:16],
    "view": lambda w: w.view(w.shape),
    "view -1": lambda w: w.view(*w.shape[:-1], -1),
    "reshape": lambda w: w.reshape(w.shape),
    "detach": lambda w: w.detach(),
    "alias": lambda w: torch.ops.aten.alias(w),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "expert": lambda w: w[1] if w.dim() == 3 else w,
    "expert unbound": lambda w: w.unbind()[-1] if w.dim() == 3 else w,
    "experts in steps": lambda w: w[::2] if w.dim() == 3 else w,
}


@pytest.mark.parametrize("name", ALWAYS)
@pytest.mark.parametrize("transposed", [False, True], ids=["matrix", "transposed"])
@pytest.mark.parametrize("partitions", [0, 1, 4])
@pytest.mark.parametrize("experts", [0, 3])
def test_views(name: str, transposed: bool, partitions: int, experts: int) -> None:
    w = random_weight(partitions=partitions, experts=experts)
    w = as_aqlm(w.mT) if transposed else w
    expected = ALWAYS[name](w.dequantize())
    view = ALWAYS[name](w)
    assert type(view) is AQLMTensor
    assert view.shape == expected.shape
    assert torch.equal(view.dequantize(), expected)
    if name not in ("clone", "contiguous") and view.numel():
        assert view.codes.untyped_storage().data_ptr() == w.codes.untyped_storage().data_ptr(), "not a view"


@pytest.mark.parametrize("transposed", [False, True], ids=["matrix", "transposed"])
@pytest.mark.parametrize("experts", [0, 3])
def test_views_in_inference_mode(transposed: bool, experts: int) -> None:
    """Composite ops arrive whole there, and a view of an ordinary tensor is to be an ordinary tensor."""
    outside = random_weight(experts=experts)
    with torch.inference_mode():
        inside = random_weight(experts=experts)
        for made in (outside, inside):
            w = as_aqlm(made.mT) if transposed else made
            assert w.is_inference() == (made is inside)
            for function in ALWAYS.values():
                assert torch.equal(as_aqlm(function(w)).dequantize(), function(w.dequantize()))
            assert as_aqlm(w.to(torch.bfloat16)).dtype == torch.bfloat16


@given(data=st.data(), out_group=st.sampled_from([1, 2, 4]), partitions=st.sampled_from([0, 2, 3]))
def test_slices_on_and_off_group_borders(data: st.DataObject, out_group: int, partitions: int) -> None:
    w = random_weight(AQLMScheme(1, 4, 8, out_group), 24, 48, partitions=partitions)
    dim = data.draw(st.sampled_from([0, 1]))
    start, stop = sorted(data.draw(st.integers(0, w.shape[dim])) for _ in range(2))
    group = (out_group, 8)[dim]
    window = (slice(None),) * dim + (slice(start, stop),)
    if start % group == 0 and stop % group == 0:
        assert torch.equal(w[window].dequantize(), w.dequantize()[window])
    else:
        with pytest.raises(ValueError, match=f"start and stop must be multiples of {group} and step 1; call `.dequ"):
            w[window]


@given(data=st.data())
def test_split_then_cat_is_the_same_weight(data: st.DataObject) -> None:
    w = random_weight("2x4g8", 24, 64, partitions=data.draw(st.sampled_from([0, 2, 3, 4])))
    dim = data.draw(st.sampled_from([0, 1]))
    unit = (1, 8)[dim]
    cuts = sorted(data.draw(st.lists(st.integers(0, w.shape[dim] // unit), max_size=4)))
    sizes = [unit * (b - a) for a, b in zip([0, *cuts], [*cuts, w.shape[dim] // unit], strict=True)]
    pieces = w.split(sizes, dim)
    assert [piece.shape[dim] for piece in pieces] == sizes
    assert torch.equal(torch.cat(pieces, dim).dequantize(), w.dequantize())


@given(groups=st.lists(st.integers(0, 9), min_size=1, max_size=4), transposed=st.booleans())
def test_cat_of_different_weights_partitions(groups: list[int], transposed: bool) -> None:
    weights = [random_weight("1x3g4o2", 2 * n, 16, seed=seed) for seed, n in enumerate(groups)]
    dense = [w.dequantize() for w in weights]
    joined = torch.cat([w.t() for w in weights], dim=1).t() if transposed else torch.cat([*weights])
    assert torch.equal(as_aqlm(joined).dequantize(), torch.cat(dense))
    assert as_aqlm(joined).partitions <= max(1, sum(groups))


def test_equal_parts_need_no_more_partitions_than_weights() -> None:
    q, k, v = (random_weight(seed=seed) for seed in range(3))
    assert as_aqlm(torch.cat([q, k, v])).partitions == 3
    assert as_aqlm(torch.cat([q, q[:8], q[8:]])).partitions == 1


def test_cat_along_inputs_needs_the_same_codebooks() -> None:
    w = random_weight()
    assert torch.equal(torch.cat([w, w[:, :8]], 1).dequantize(), torch.cat([w.dequantize(), w.dequantize()[:, :8]], 1))
    with pytest.raises(ValueError, match="only with identical codebooks and scales"):
        torch.cat([w, random_weight(seed=1)], 1)


def test_stacking_experts() -> None:
    weights = [random_weight(partitions=2, seed=seed) for seed in range(3)]
    stack = torch.stack([*weights])
    dense = torch.stack([w.dequantize() for w in weights])
    assert torch.equal(stack.dequantize(), dense)
    assert torch.equal(torch.cat([stack, stack[:1]]).dequantize(), torch.cat([dense, dense[:1]]))
    assert torch.equal(
        torch.cat([stack, random_weight(experts=3, seed=9, partitions=2)], 1)[1].dequantize()[:32], dense[1]
    )
    assert torch.equal(weights[0].unsqueeze(0).dequantize()[0], dense[0])


INDICES: dict[str, Callable[[Tensor], Tensor]] = {
    "list": lambda w: w[[2, 0, 2]],
    "tensor": lambda w: w[torch.tensor([-1, 1])],
    "none": lambda w: w[torch.tensor([], dtype=torch.long)],
    "mask": lambda w: w[torch.arange(len(w)) % 2 == 0],
    "index_select": lambda w: w.index_select(0, torch.tensor([2, 1])),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("experts", [0, 3])
def test_rows_and_experts_by_index_are_copies(name: str, experts: int) -> None:
    w = random_weight(experts=experts)
    some = as_aqlm(INDICES[name](w))
    assert torch.equal(some.dequantize(), INDICES[name](w.dequantize()))
    assert some.codes.untyped_storage().data_ptr() != w.codes.untyped_storage().data_ptr()


def test_rows() -> None:
    w = random_weight(partitions=4)
    assert torch.equal(w[-1].dequantize(), w.dequantize()[-1])
    assert torch.equal(torch.stack([row.dequantize() for row in w]), w.dequantize())
    assert torch.equal(w[5].unsqueeze(0).dequantize(), w.dequantize()[5:6])
    assert torch.equal(w[5][8:16].dequantize(), w.dequantize()[5, 8:16])
    assert torch.equal(w.t()[:, 5].dequantize(), w.dequantize()[5])


W = random_weight()

WRONG: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "step": (ValueError, "step 1; call", lambda: W[::2]),
    "off the group": (ValueError, "multiples of 8", lambda: W[:, 4:]),
    "one column": (ValueError, "cannot select one index along in_features", lambda: W[:, 3]),
    "one element": (ValueError, "cannot select one index", lambda: W[0, 0]),
    "row of wide groups": (ValueError, "along out_features", lambda: random_weight("1x4g8o2")[0]),
    "row beyond": (IndexError, "index 32 is out of bounds for dimension 0 with size 32", lambda: W[32]),
    "dimension beyond": (IndexError, "out of range", lambda: W.narrow(2, 0, 1)),
    "flatten columns": (ValueError, r"cannot view an AQLMTensor of shape \(64, 32\)", lambda: W.t().view(-1)),
    "other view": (ValueError, "cannot view", lambda: W.view(64, 32)),
    "permuted experts": (ValueError, "only swap its last two", lambda: random_weight(experts=2).permute(1, 0, 2)),
    "unsqueeze": (ValueError, "cannot unsqueeze", lambda: W[:, :, None]),
    "indexed columns": (ValueError, "one list, mask or 1-D tensor for its rows", lambda: W[:, [0, 1]]),
    "mask of elements": (ValueError, "one list, mask or 1-D tensor", lambda: W[torch.ones(32, 64, dtype=torch.bool)]),
    "rows of partitions": (ValueError, "only those of a matrix with one set", lambda: random_weight(partitions=2)[[0]]),
    "rows of a transpose": (ValueError, "cannot be indexed", lambda: W.t()[[0]]),
    "index_select columns": (ValueError, "takes dimension 0", lambda: W.index_select(1, torch.tensor([0]))),
    "negative split": (ValueError, "split_size must be positive", lambda: W.split(-1)),
    "split sum": (ValueError, r"split sizes \[8, 8\] do not add up to 32", lambda: W.split([8, 8])),
    "cat dense": (TypeError, "cannot concatenate AQLMTensors with dense", lambda: torch.cat([W, torch.zeros(8, 64)])),
    "cat schemes": (ValueError, "different schemes", lambda: torch.cat([W, random_weight("1x8g8")])),
    "cat dtypes": (ValueError, "different schemes, dtypes", lambda: torch.cat([W, W.half()])),
    "cat views": (ValueError, "or views", lambda: torch.cat([W, random_weight(out_features=64, in_features=32).t()])),
    "cat shapes": (ValueError, "cannot concatenate shapes", lambda: torch.cat([W, W[:, :8]])),
}


@pytest.mark.parametrize(("error", "message", "call"), WRONG.values(), ids=WRONG)
def test_refuses(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_views_write_through() -> None:
    w, other = random_weight(), random_weight(seed=1)
    same_books = AQLMTensor(other.codes, w.codebooks.clone(), w.scales.clone())
    before = w.dequantize()
    w[8:16].copy_(same_books[8:16])
    expected = torch.cat([before[:8], same_books.dequantize()[8:16], before[16:]])
    assert torch.equal(w.dequantize(), expected)
    w[:, 8:16] = same_books[:, 8:16]
    assert torch.equal(w.dequantize()[:, 8:16], same_books.dequantize()[:, 8:16])
    experts = random_weight(experts=3, seed=5)
    untouched = experts.dequantize()
    experts[1].copy_(other)
    assert torch.equal(experts.dequantize()[1], other.dequantize())
    assert torch.equal(experts.dequantize()[::2], untouched[::2])
    fused = random_weight(partitions=4, seed=6)
    untouched = fused.dequantize()
    fused[8:16].copy_(random_weight(out_features=8, seed=7))
    assert torch.equal(fused.dequantize()[8:16], random_weight(out_features=8, seed=7).dequantize())
    assert torch.equal(fused.dequantize()[16:], untouched[16:])


@pytest.mark.parametrize(
    "target",
    [
        lambda w: w[8:16],
        lambda w: w.detach()[8:16],
        lambda w: w[:16][8:16],
        lambda w: w.t()[:, 8:16].t(),
        lambda w: torch.nn.Parameter(w, requires_grad=False).data.narrow(0, 8, 8),
    ],
)
def test_writing_other_codebooks_to_a_part_is_refused(target: Callable[[AQLMTensor], Tensor]) -> None:
    w = random_weight()
    before = w.dequantize()
    with pytest.raises(ValueError, match="codebooks the rest shares"):
        target(w).copy_(random_weight(seed=1)[8:16])
    assert torch.equal(w.dequantize(), before)


def test_writing_other_scales_to_some_inputs_is_refused() -> None:
    w = random_weight()
    with pytest.raises(ValueError, match="scales the rest shares"):
        w[:, :8].copy_(AQLMTensor(w.codes, w.codebooks, w.scales * 2)[:, :8])
    fused = random_weight(partitions=4)
    with pytest.raises(ValueError, match="codebooks the rest shares"):  # two partitions are no view of the four
        fused[:16].copy_(random_weight(out_features=16, partitions=2, seed=1))
