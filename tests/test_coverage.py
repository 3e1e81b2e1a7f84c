"""benchmarks/coverage.py: its page from made-up rows, its check, and a dozen public models."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import greedyprune
from greedyprune.surgery.cut import masked

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))
import coverage_models  # noqa: E402


def script() -> ModuleType:
    """The script as a module; `import coverage` could be the measurer of tests' coverage."""
    spec = importlib.util.spec_from_file_location("coverage_script", FOLDER / "coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_computed_from_the_rows() -> None:
    handled = {
        "name": "timm/one", "stage": "done", "verdict": "passes", "parameters": 1000, "gap": 1e-16,
        "left": 0.25, "flops_left": 0.5, "layers_seconds": 2.0, "select_seconds": 1.0,
        "groups": 3, "in_groups": 3, "layers": 4, "theirs": {"left": 0.5, "flops_left": 0.5},
        "refused": [["its units are the model's output", 1, "head: its units are | it"]],
    }  # fmt: skip
    stopped = {
        "name": "transformers/two", "stage": "find_layers", "verdict": "stopped",
        "error": "not done after 9 s",
    }  # fmt: skip
    broken = {"name": "timm/three", "stage": "build", "verdict": "stopped", "error": "no such size"}
    text = "\n".join(script().page([handled, stopped, broken], 4))
    assert "3 of 4 models have been measured so far." in text
    assert "| timm/three | not built | build | no such size |" in text
    assert "| select, prune, run and pass | 1 of 2 (50%) | 1 of 2 (50%) |" in text
    assert "over the 1 models that both handle | 0.250 | 0.500 |" in text
    assert "(1 where one fails) | 0.500 | 0.707 |" in text
    assert "The slowest `layers`: 2.0 s, timm/one." in text
    assert (
        "| 1 | 1 | its units are the model's output | timm/one, head: its units are \\| it |"
        in text
    )
    assert "| transformers/two | stopped | find_layers | not done after 9 s |" in text


def test_the_check_sees_a_missing_unit() -> None:
    """It compares up to rounding, and says where nothing could be seen."""
    coverage = script()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2))
    inputs = torch.randn(8, 5)
    selection = greedyprune.select(model.eval(), inputs, size=0.5)

    def compared(change: float, gain: float) -> tuple[str, float, list[str]]:
        full, small = masked(model, selection), greedyprune.prune(model, selection)
        with torch.no_grad():
            small[2].weight[0, 0] += change
            for part in (full, small):
                part[4].weight *= gain
        found: tuple[str, float, list[str]] = coverage.compared(full, small, inputs, selection)
        return found

    tolerance = coverage.TOLERANCE["float64"]
    precision, gap, unseen = compared(0, 1)
    assert precision == "float64" and gap <= tolerance and not unseen
    assert compared(1e-4, 1)[1] > tolerance
    assert compared(0, 0)[2] == ["0", "2"]  # a gain of 0 hides all units


def dozen(library: str, tmp_path: Path) -> None:
    """All models of a library among the dozen pass."""
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(FOLDER / "coverage.py"), "--dozen", "--models", f"{library}/*"]
    paths = ["--rows", str(rows), "--page", str(tmp_path / "page.md")]
    subprocess.run([*command, *paths], check=True)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    names = [name for name in coverage_models.DOZEN if name.startswith(library)]
    assert {row["name"]: row.get("verdict") for row in found} == dict.fromkeys(names, "passes")


@pytest.mark.timeout(600)
def test_public_models_of_transformers(tmp_path: Path) -> None:
    for library in ("transformers", "torch_pruning"):
        pytest.importorskip(library)
    dozen("transformers", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_public_models_of_images(library: str, tmp_path: Path) -> None:
    for needed in ("timm", "torchvision", "torch_pruning"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    dozen(library, tmp_path)
