"""The experiment of examples/mnist_pretraining.py, on generated images."""

import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import mnist_pretraining  # noqa: E402
from pretraining_figure import Curve, Panel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = 300
SMALL = ["--quick", "--units", "64", "--samples", "50", "100", "200", "--steps", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IDX files of generated images: a prototype for each digit, with noise."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("mnist")
    digits = rng.permutation(IMAGES).astype(np.uint8) % 10
    prototypes = rng.integers(0, 128, (10, 28, 28))
    images = (prototypes[digits] + rng.integers(0, 128, (IMAGES, 28, 28))).astype(np.uint8)
    for name, content in (("images-idx3", images), ("labels-idx1", digits)):
        header = struct.pack(">BBBB", 0, 0, 8, content.ndim)
        sizes = struct.pack(f">{content.ndim}i", *content.shape)
        (path / f"train-{name}-ubyte").write_bytes(header + sizes + content.tobytes())
    return path


def rows_of(out: Path) -> dict[str, list[str]]:
    """From a row's first columns (the training and the iteration) to its results, but seconds."""
    header, *lines = (out / "mnist_pretraining.csv").read_text().splitlines()
    assert header.endswith("steps,iteration,dense_loss,dense_accuracy,pruned_loss,pruned_accuracy,"
                           "kept,seconds")  # fmt: skip
    rows = [line.split(",") for line in lines]
    assert len({tuple(row[:8]) for row in rows}) == len(rows)
    return {",".join(row[:8]): row[8:13] for row in rows}


def run_main(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *options: str) -> int:
    """Runs `main`; returns how many networks it pruned."""
    pruned = []
    measure = mnist_pretraining.measure

    def counting_measure(*args: object) -> object:
        pruned.append(args)
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(mnist_pretraining, "measure", counting_measure)
        patch.setattr(sys, "argv", ["", "--data", str(folder), "--out", str(out), *SMALL, *options])
        mnist_pretraining.main()
    return len(pruned)


def test_a_killed_run_resumes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--iterations", "20", "--every", "20", "--seeds", "0"]
    assert run_main(monkeypatch, folder, tmp_path / "whole", *options) == 2 * 3 * 2
    whole = rows_of(tmp_path / "whole")
    assert "passes the dense" in capsys.readouterr().out
    picture = tmp_path / "whole" / "mnist_pretraining_quick.png"
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000

    out = tmp_path / "killed"
    script = [sys.executable, EXAMPLES / "mnist_pretraining.py", "--data", folder, "--out", out]
    process = subprocess.Popen([*script, *SMALL, *options], stderr=subprocess.DEVNULL)
    path = out / "mnist_pretraining.csv"
    while not path.is_file() or path.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with path.open("rb+") as file:  # as if it was killed in the middle of a line
        file.truncate(path.stat().st_size - 10)
    complete_rows = path.read_text().count("\n") - 1
    assert run_main(monkeypatch, folder, out, *options) == len(whole) - complete_rows
    resumed = rows_of(out)
    assert resumed.keys() == whole.keys()
    for key, values in whole.items():
        np.testing.assert_allclose([*map(float, resumed[key])], [*map(float, values)], rtol=1e-4)
    assert run_main(monkeypatch, folder, out, *options) == 0
    other_options = [*options, "--steps", "10", "--network", "standard"]
    assert run_main(monkeypatch, folder, out, *other_options) == 3 * 2


def test_pruning_leaves_the_training_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--iterations", "40", "--samples", "100", "--seeds", "0"]
    run_main(monkeypatch, folder, tmp_path / "often", *options, "--every", "10")
    run_main(monkeypatch, folder, tmp_path / "once", *options, "--every", "40")
    often, once = rows_of(tmp_path / "often"), rows_of(tmp_path / "once")
    assert len(often) == 10 and len(once) == 4
    assert all(often[key] == values for key, values in once.items())


def test_bad_input(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=f"--samples: found 400, there are {IMAGES} images"):
        run_main(monkeypatch, folder, tmp_path, "--samples", "400")
    (tmp_path / "mnist_pretraining.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="expected network,units"):
        run_main(monkeypatch, folder, tmp_path)


def test_lines_and_growth() -> None:
    """On curves of pruned networks that reach an accuracy of 0.9 after 100 log m iterations."""
    iterations = range(0, 1001, 50)
    curves = []
    for m in (100, 300, 1000):
        dense = [t / 1000 * (0.94 if m > 100 else 1) for t in iterations]
        pruned = [min(0.95, 0.9 * t / (100 * np.log(m))) for t in iterations]
        curves.append(Curve(m, list(iterations), dense, pruned))
    panel = Panel("", curves)
    assert panel.level == 0.95
    level, best = panel.lines
    assert [m for m, _ in best.points] == [300, 1000]
    assert best.fit is None
    assert np.isnan(panel.mean(100, best.points))
    assert level.fit is not None
    assert level.fit.log.b == pytest.approx(100 * 0.95 / 0.9, rel=0.1)
    lower, _ = Panel("", curves, wanted=0.45).lines
    assert [round(at) for _, at in lower.points] == pytest.approx(
        [50 * np.log(m) for m in (100, 300, 1000)], abs=1
    )
    assert Curve(100, [0, 10, 20], [0.5, 0.8, 1.0], [0.7, 0.9, 0.9]).caught_up == pytest.approx(15)
