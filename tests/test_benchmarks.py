"""The benchmarks' README says what the results say, and names files that exist."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


UNNAMED = {"cpu_linear_2026-11-22.png", "cpu_input_grad_2026-11-22.png"}  # "plot beside it"
