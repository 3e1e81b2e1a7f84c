"""benchmarks/coverage.py: its page from made-up rows, its check, and a dozen public models."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))


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
    text = "\n".join(script().page([handled, stopped]))
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
    """Also one that changes the output by a ten-thousandth."""
    coverage = script()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    other = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    other.load_state_dict(model.state_dict())
    inputs = torch.randn(8, 5)
    precision, gap = coverage.compared(copy.deepcopy(model), copy.deepcopy(other), inputs)
    assert precision == "float64" and gap <= coverage.TOLERANCE["float64"]
    with torch.no_grad():
        other[2].weight[:, 0] += 1e-4
    assert coverage.compared(model, other, inputs)[1] > coverage.TOLERANCE["float64"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dozen_public_models(tmp_path: Path) -> None:
    models = importlib.import_module("coverage_models")
    try:
        models.import_torchvision()
    except ImportError:
        pytest.skip("needs torchvision")
    for library in ("timm", "transformers", "torch_pruning"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(FOLDER / "coverage.py"), "--dozen", "--rows", str(rows)]
    subprocess.run([*command, "--page", str(tmp_path / "page.md")], check=True)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["name"]: row.get("verdict") for row in found} == dict.fromkeys(
        models.DOZEN, "passes"
    )
