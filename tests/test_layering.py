"""A module imports only from its own layer and those below, and using the package loads nothing heavy unasked."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {"aqlm_tensor": "aqlm_tensor", "aqlm_tensor.kernels": "kernels", "aqlm_tensor.integrations": "integrations"}

# From the bottom up. A module belongs to the longest name here that it equals or starts with; "aqlm_tensor" alone is
# the package's lazy index of public names.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("aqlm_tensor.scheme", "aqlm_tensor.ranks"),
    ("aqlm_tensor.codes",),
    ("aqlm_tensor.kernels",),
    ("aqlm_tensor.quantizer",),
    (
        "aqlm_tensor.tensor",
        "aqlm_tensor.tensor_copies",
        "aqlm_tensor.tensor_distributed",
        "aqlm_tensor.tensor_experts",
        "aqlm_tensor.tensor_ops",
        "aqlm_tensor.tensor_views",
    ),
    ("aqlm_tensor.linear",),
    ("aqlm_tensor.fusion",),
    ("aqlm_tensor.decode_graph",),
    ("aqlm_tensor.checkpoint_io",),
    ("aqlm_tensor.checkpoint_config",),
    ("aqlm_tensor.checkpoint",),
    ("aqlm_tensor.config",),
    ("aqlm_tensor.targets",),
    ("aqlm_tensor.handler", "aqlm_tensor.training"),
    (
        "aqlm_tensor.api",
        "aqlm_tensor.blocks",
        "aqlm_tensor.calibration",
        "aqlm_tensor.pv",
    ),
    (
        "aqlm_tensor.pv.adam",
        "aqlm_tensor.pv.config",
        "aqlm_tensor.pv.graph",
        "aqlm_tensor.pv.report",
        "aqlm_tensor.pv.rows",
    ),
    ("aqlm_tensor.pv.codes", "aqlm_tensor.pv.layers", "aqlm_tensor.pv.loss"),
    (
        "aqlm_tensor.calibration.activations",
        "aqlm_tensor.calibration.block_calls",
        "aqlm_tensor.calibration.experts",
        "aqlm_tensor.calibration.report",
        "aqlm_tensor.calibration.work_folder",
    ),
    ("aqlm_tensor.pv.state", "aqlm_tensor.pv.trained"),
    ("aqlm_tensor.calibration.finetune", "aqlm_tensor.pv.sharded"),
    ("aqlm_tensor.pv.checks", "aqlm_tensor.pv.passes", "aqlm_tensor.pv.tuning"),
    ("aqlm_tensor.calibration.block_run",),
    (
        "aqlm_tensor.calibration.calibrate",
        "aqlm_tensor.calibration.memory_model",
        "aqlm_tensor.calibration.time_model",
        "aqlm_tensor.calibration.allocation",
        "aqlm_tensor.calibration.sensitivity",
    ),
    ("aqlm_tensor",),
    ("aqlm_tensor.integrations", "aqlm_tensor.hf_model", "aqlm_tensor.evaluate"),
    ("aqlm_tensor.calibration.sources", "aqlm_tensor.calibration.self_generation"),
    ("aqlm_tensor.cli.output",),
    ("aqlm_tensor.cli.arguments", "aqlm_tensor.cli.prepare", "aqlm_tensor.cli.report"),
    ("aqlm_tensor.cli.fit",),
    ("aqlm_tensor.cli.evaluation", "aqlm_tensor.cli.plot", "aqlm_tensor.cli.progress"),
    ("aqlm_tensor.cli.saved_report", "aqlm_tensor.cli.tune"),
    ("aqlm_tensor.cli.estimate", "aqlm_tensor.cli.quantize", "aqlm_tensor.cli.run", "aqlm_tensor.cli.tables"),
    ("aqlm_tensor.cli",),
)


def _modules() -> dict[str, str]:
    """Source of every module of the package by its name."""
    sources = {}
    for package, folder in FOLDERS.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            name = ".".join((package, *path.relative_to(REPOSITORY / folder).with_suffix("").parts))
            sources[name.removesuffix(".__init__")] = path.read_text()
    return sources


def _imports(source: str, name: str, known: set[str]) -> set[str]:
    """Names of this package's modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = name.split(".")[: -node.level]
                base = ".".join([*parent, *([base] if base else [])])
            # `from package import module` names a module, `from module import function` does not
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return {module for module in found if module in known}


def _layer(module: str) -> int:
    """Index of the module's layer."""
    places = {entry: index for index, layer in enumerate(LAYERS) for entry in layer}
    matching = [
        entry for entry in places if module == entry or (entry != "aqlm_tensor" and module.startswith(entry + "."))
    ]
    assert matching, f"{module} has no place in LAYERS: add it where it belongs"
    return places[max(matching, key=len)]


def _violations(sources: dict[str, str]) -> list[str]:
    return [
        f"{module} imports {imported}, which is above it"
        for module, source in sources.items()
        if module != "aqlm_tensor"  # the index imports lazily what it names
        for imported in sorted(_imports(source, module, set(sources)))
        if _layer(imported) > _layer(module)
    ]


def test_modules_import_only_from_below() -> None:
    assert _violations(_modules()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("aqlm_tensor.scheme", "import aqlm_tensor.codes"),
        ("aqlm_tensor.kernels.ops", "def f():\n    from aqlm_tensor.tensor import AQLMTensor"),
        ("aqlm_tensor.kernels.ops", "from aqlm_tensor import tensor"),
        ("aqlm_tensor.kernels.ops", "from ..tensor import AQLMTensor"),
        ("aqlm_tensor.kernels.registry", "from aqlm_tensor import AQLMTensor"),
        ("aqlm_tensor.quantizer.layer", "from aqlm_tensor.tensor import AQLMTensor"),
        ("aqlm_tensor.tensor", "from aqlm_tensor.config import AQLMWeightConfig"),
        ("aqlm_tensor.api", "import aqlm_tensor.cli.app as cli"),
    ],
)
def test_the_layer_test_can_fail(module: str, source: str) -> None:
    sources = _modules()
    assert module in sources
    sources[module] = source
    assert len(_violations(sources)) == 1


def test_a_new_module_needs_a_place() -> None:
    with pytest.raises(AssertionError, match="brand_new has no place in LAYERS"):
        _layer("aqlm_tensor.brand_new")


HEAVY = ("numba", "triton", "cuda", "transformers", "peft", "accelerate", "aqlm", "typer", "rich", "matplotlib", "gguf")

REPORT = f"""
import json, sys
before = set(sys.modules)
{{program}}
loaded = set(sys.modules) - before
print(json.dumps([name for name in {HEAVY!r} if name in loaded]))
"""


def _heavy_modules_of(program: str, given: str = "import torch, torchao.utils, torchao.quantization") -> list[str]:
    """Heavy modules that a program loads in a new process, beyond those that `given` loads."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", given + REPORT.format(program=program)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_tensor_loads_nothing_heavy() -> None:
    assert (
        _heavy_modules_of("import aqlm_tensor; aqlm_tensor.AQLMTensor; aqlm_tensor.quantize_; aqlm_tensor.load") == []
    )


def test_importing_the_package_does_not_even_load_torch() -> None:
    program = "import aqlm_tensor; import sys; assert 'torch' not in sys.modules"
    assert _heavy_modules_of(program, given="") == []


def test_the_import_test_can_fail() -> None:
    pytest.importorskip("numba", reason="needs something heavy to load")
    assert _heavy_modules_of("import numba", given="") == ["numba"]
