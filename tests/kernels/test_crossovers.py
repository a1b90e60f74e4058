"""Measured crossovers: made by an injected timer, stored, read, and what the registry makes of them."""

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from aqlm_tensor.kernels import crossovers, measure, reference, registry
from aqlm_tensor.kernels.crossovers import Crossovers, Table
from aqlm_tensor.kernels.registry import Kernel, Problem
from aqlm_tensor.scheme import AQLMScheme

CPU = torch.device("cpu")
SCHEME = AQLMScheme(2, 8)
SIZES = (
    Crossovers(1 << 20, ((1, "few"), (64, "some"), (2048, "many"))),
    Crossovers(1 << 26, ((1, "few"), (2048, "many"))),
)
TABLE = Table("2026-01-01 on a test", {Table.key(SCHEME, torch.float32): SIZES})


def _stub(name: str, most_rows: int) -> Kernel:
    """A kernel for so many rows of x at most that runs the reference and notes its name."""
    module = types.ModuleType(f"tests.kernels.crossover_{name}")

    def linear(*operands: torch.Tensor) -> torch.Tensor:
        RAN.append(name)
        return reference.linear(*operands)  # type: ignore[arg-type]

    module.supports = lambda p: None if p.rows <= most_rows else f"{p.rows} rows are too many"  # type: ignore[attr-defined]
    module.linear = linear  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return Kernel(name, module.__name__)


RAN: list[str] = []


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Three kernels for the CPU, and a cache folder that is empty."""
    table = (_stub("few", 4), _stub("some", 64), _stub("many", 10**6))
    monkeypatch.setattr(registry, "KERNELS", (*table, Kernel("torch", reference.__name__, fast=False)))
    monkeypatch.delenv(registry.ENV_VARIABLE, raising=False)
    monkeypatch.setenv("AQLM_TENSOR_CACHE", str(tmp_path))
    monkeypatch.setattr(crossovers, "_sources", lambda device: ((device.type, crossovers.stored_path()),))
    registry.refresh()
    RAN.clear()
    yield
    registry.refresh()


def problem(rows: int, weights: int = 1 << 20) -> Problem:
    return Problem("linear", SCHEME, rows, 1024, weights // 1024, 1, torch.float32, CPU)


def chosen(rows: int, weights: int = 1 << 20) -> str:
    return next(kernel.name for kernel, reason in registry.explain(problem(rows, weights)) if reason is None)


def costs(table: dict[str, Callable[[int], float]]) -> measure.Timer:
    """A timer that runs the call once, and answers by the kernel that ran and its number of rows."""

    def timer(call: Callable[[int], torch.Tensor], copies: int) -> float:
        assert copies >= 1
        rows = call(0).shape[0]
        return table[RAN[-1]](rows)

    return timer


def test_stairs_and_the_nearest_size() -> None:
    assert [TABLE.fastest(SCHEME, torch.float32, 1 << 20, rows) for rows in (1, 2, 64, 65, 10**6)] == [
        *("few", "some", "some", "many", "many")
    ]
    assert TABLE.fastest(SCHEME, torch.float32, 1 << 22, 2) == "some"
    assert TABLE.fastest(SCHEME, torch.float32, 1 << 24, 2) == "many"
    assert TABLE.fastest(SCHEME, torch.float16, 1 << 20, 1) is None
    assert TABLE.fastest(AQLMScheme(1, 8), torch.float32, 1 << 20, 1) is None


def test_json_gives_the_table_back() -> None:
    assert Table.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE


@pytest.mark.usefixtures("kernels")
def test_without_a_table_the_order_decides() -> None:
    assert [chosen(rows) for rows in (1, 8, 100)] == ["few", "some", "many"]


@pytest.mark.usefixtures("kernels")
def test_the_registry_goes_by_a_stored_table() -> None:
    path = crossovers.store(CPU, TABLE)
    registry.refresh()
    assert path.is_file()
    assert [chosen(rows) for rows in (1, 8, 100)] == ["few", "some", "many"]
    assert [chosen(rows, 1 << 26) for rows in (1, 8, 100)] == ["few", "many", "many"]
    reasons = {kernel.name: reason for kernel, reason in registry.explain(problem(8, 1 << 26))}
    assert reasons["many"] is None
    assert reasons["few"] == "8 rows are too many"
    assert reasons["some"] == "slower than many as measured 2026-01-01 on a test"


@pytest.mark.usefixtures("kernels")
def test_a_kernel_that_cannot_run_or_is_gone_is_not_chosen() -> None:
    for name in ("few", "removed"):
        sizes = (Crossovers(1 << 20, ((2048, name),)),)
        crossovers.store(CPU, Table("", {Table.key(SCHEME, torch.float32): sizes}))
        registry.refresh()
        assert chosen(8) == "some"


@pytest.mark.usefixtures("kernels")
def test_other_schemes_are_kept() -> None:
    other = {Table.key(AQLMScheme(1, 16), torch.float16): SIZES}
    crossovers.store(CPU, TABLE)
    crossovers.store(torch.device("meta"), TABLE)
    crossovers.store(CPU, Table("later", other))
    tables = crossovers.load(crossovers.stored_path())
    assert tables == {"cpu": Table("later", TABLE.schemes | other), "meta": TABLE}


@pytest.mark.usefixtures("kernels")
def test_a_damaged_file_is_named_and_replaced() -> None:
    crossovers.stored_path().write_text("{")
    with pytest.raises(ValueError, match=r"crossovers\.json is damaged"):
        chosen(1)
    crossovers.store(CPU, TABLE)
    registry.refresh()
    assert chosen(8, 1 << 26) == "many"
    crossovers.stored_path().write_text('{"format_version": 99}')
    registry.refresh()
    assert chosen(8, 1 << 26) == "some"


@pytest.mark.usefixtures("kernels")
def test_measure_finds_where_kernels_cross() -> None:
    timer = costs({"few": lambda rows: rows, "some": lambda rows: 2 + rows / 16, "many": lambda rows: 5.0})
    table = measure.measure([SCHEME], torch.float32, CPU, shapes=[(64, 64)], rows=[1, 2, 4, 32, 128], timer=timer)
    (size,) = table.schemes[Table.key(SCHEME, torch.float32)]
    assert size == Crossovers(64 * 64, ((2, "few"), (32, "some"), (128, "many")))


@pytest.mark.usefixtures("kernels")
def test_a_kernel_keeps_its_place_unless_another_is_clearly_faster() -> None:
    some, many = (lambda rows: 1.1 if rows < 4 else 0.98), (lambda rows: 2.0 if rows < 16 else 0.5)
    timer = costs({"few": lambda _: 1.0, "some": some, "many": many})
    table = measure.measure([SCHEME], torch.float32, CPU, shapes=[(64, 64)], rows=[1, 4, 16], timer=timer)
    (size,) = table.schemes[Table.key(SCHEME, torch.float32)]
    assert size.kernels == ((4, "few"), (16, "many"))


@pytest.mark.usefixtures("kernels")
def test_shapes_that_do_not_fit_are_left_out() -> None:
    timer = costs(dict.fromkeys(("few", "some", "many"), lambda rows: 1.0))
    table = measure.measure([SCHEME], torch.float32, CPU, shapes=[(64, 60), (32, 64)], rows=[1], timer=timer)
    assert [size.weights for size in table.schemes[Table.key(SCHEME, torch.float32)]] == [32 * 64]


def test_nothing_to_choose_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        measure.measure([SCHEME], torch.float32, CPU, shapes=[(64, 64)])


def test_the_shipped_tables_name_kernels_that_exist() -> None:
    names = {kernel.name for kernel in registry.KERNELS}
    for table in crossovers.load(crossovers._SHIPPED).values():
        for sizes in table.schemes.values():
            for size in sizes:
                assert {name for _, name in size.kernels} <= names
                assert [most for most, _ in size.kernels] == sorted({most for most, _ in size.kernels})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_measure_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AQLM_TENSOR_CACHE", str(tmp_path))
    device = torch.device("cuda", torch.cuda.current_device())
    registry.refresh()
    table = measure.measure([SCHEME], torch.float16, device, shapes=[(512, 1024), (4096, 4096)], rows=[1, 16, 512])
    path = crossovers.store(device, table)
    registry.refresh()
    assert path.parent == tmp_path
    for size, shape in zip(table.schemes["2x8g8 16"], [(512, 1024), (4096, 4096)], strict=True):
        for rows in (1, 16, 512):
            asked = Problem("linear", SCHEME, rows, shape[1], shape[0], 1, torch.float16, device)
            found = next(kernel.name for kernel, reason in registry.explain(asked) if reason is None)
            assert found == size.fastest(rows)
    monkeypatch.undo()
    registry.refresh()
