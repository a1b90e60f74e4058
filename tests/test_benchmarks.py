"""The benchmarks' README says what the results say, and names files that exist; the scripts can be imported."""

import csv
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(script: Path) -> ModuleType:
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load(BENCHMARKS / "tables.py")


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("benchmark_*.py")), ids=lambda script: script.stem)
def test_scripts_find_what_they_use(script: Path) -> None:
    assert callable(load(script).main)


def test_tables_are_written_from_the_results(tables: ModuleType) -> None:
    written = [readme.read_text(encoding="utf-8") for readme in tables.READMES]
    assert list(map(tables.rendered, written)) == written, "run python -P benchmarks/tables.py"
    assert set(re.findall(r"<!-- (\w+) -->", "".join(written))) == {*tables.TABLES, "end"}


def test_a_changed_number_is_found(tables: ModuleType) -> None:
    written = tables.READMES[1].read_text(encoding="utf-8")
    changed = re.sub(r"\*\*\d", "**7", written, count=1)
    assert changed != written
    assert tables.rendered(changed) == written


def test_every_result_is_told_of_and_every_file_exists() -> None:
    written = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"results/([\w.-]+\.(?:csv|json|png))", written))
    assert named == {file.name for file in (BENCHMARKS / "results").iterdir() if file.name not in UNNAMED}


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "results").glob("*.csv")), ids=lambda file: file.stem)
def test_every_row_says_where_it_comes_from(file: Path) -> None:
    with file.open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert rows
    for row in rows:
        assert None not in row.values(), row
        assert all(row[column] for column in ("date", "device", "versions")), row
        assert row["commit"] or "official" in file.stem, row  # code that is not ours has none of ours


UNNAMED = {"cpu_linear_2026-11-22.png", "cpu_input_grad_2026-11-22.png"}  # "plot beside it"
