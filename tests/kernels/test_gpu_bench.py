"""benchmarks/gpu_bench.py on the emulated GPU: that it runs and checks what it should."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu_bench


@pytest.fixture(autouse=True)
def on_the_host(emulated_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "DEVICE", torch.device("cpu"))


def test_every_kernel_runs(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_bench.small()
    assert "every kernel ran" in capsys.readouterr().out


def test_every_case_is_checked_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "timed", lambda work, seconds=1.0: (work(), 0.5)[1])
    monkeypatch.setattr(gpu_bench, "CANDIDATES", ((70, 16, 5, 1.0), (40, 16, 9, None)))
    monkeypatch.setattr(gpu_bench, "UNITS", 24)
    monkeypatch.setattr(gpu_bench, "SAMPLES", {"mse": 130, "cross_entropy": 90})
    monkeypatch.setattr(gpu_bench, "compiled_candidates", gpu_bench.torch_candidates)  # slow
    rows: list[gpu_bench.Row] = []
    rates = {"exponentials/s": 1e9, "float64 products, operations/s": 1e9}
    gpu_bench.bench_candidates(rows, rates)
    gpu_bench.bench_gram(rows)
    gpu_bench.bench_select(rows)
    text = gpu_bench.markdown(rows, rates, "a machine")
    assert text.count("| greedyprune") == 9
    assert len({row.case for row in rows}) == 7

    wrong = gpu_bench.candidates("cross_entropy", 70, 16, 5)
    with pytest.raises(AssertionError):
        gpu_bench.check_candidates(wrong, torch.zeros(16, dtype=torch.float64))
