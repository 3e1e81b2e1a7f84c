"""Real data: a trained network on MNIST. Skipped without $GREEDYPRUNE_DATA."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune import Loss

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from mnist_mlp import binary, evenly, read_mnist  # noqa: E402
from training import train  # noqa: E402

pytestmark = pytest.mark.data


@pytest.fixture(scope="module", params=["mse", "cross_entropy"])
def trained(request: pytest.FixtureRequest, mnist_folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    images, digits = read_mnist(mnist_folder, "train")
    samples = 2000 if request.param == "mse" else 1000
    index = evenly(digits, samples)
    assert digits[index].bincount().tolist() == [samples // 10] * 10
    inputs = images[index]
    if request.param == "mse":
        targets, loss, outputs = binary(digits[index]), nn.functional.mse_loss, 1
    else:
        targets, loss, outputs = digits[index], nn.functional.cross_entropy, 10
    model = nn.Sequential(nn.Linear(784, 1500), nn.ReLU(), nn.Linear(1500, outputs))
    train(model, (inputs, targets), loss, 500, lr=0.02)
    return model, inputs, targets


OPTIONS = [
    {"steps": 40},
    {"size": 0.03},
    {"steps": 15, "objective": Loss(batch_size=256)},
    pytest.param({"steps": 150}, marks=pytest.mark.slow),
    pytest.param({"size": 0.1}, marks=pytest.mark.slow),
    pytest.param({"steps": 40, "objective": Loss(batch_size=256)}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_picks_are_the_float64_references(
    trained: tuple[nn.Module, Tensor, Tensor], options: dict[str, object]
) -> None:
    model, inputs, targets = trained
    selection = greedyprune.select(model, (inputs, targets), backend="cpu", **options)
    expected = greedyprune.select(model, (inputs, targets), backend="reference", **options)
    assert selection.order.tolist() == expected.order.tolist()
    torch.testing.assert_close(selection.losses, expected.losses, rtol=1e-9, atol=0)
    if expected.gap is not None:
        torch.testing.assert_close(selection.gap, expected.gap, rtol=1e-6, atol=0)
    if expected.bound is not None:
        assert (selection.losses <= selection.bound).all()
    small = greedyprune.prune(model, selection)
    kind = nn.functional.mse_loss if targets.dim() == 2 else nn.functional.cross_entropy
    with torch.no_grad():
        loss = kind(small(inputs), targets)
    torch.testing.assert_close(loss.double(), selection.losses[-1], rtol=1e-5, atol=0)


def test_gram_and_columns_agree(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    """All the ways to squared error give the same path."""
    model, inputs, targets = trained
    if targets.dim() == 1:
        pytest.skip("squared error only")
    paths = []
    for limit in (None, 1500 * 1500 * 8, 10**6):  # columns; streamed Gram; streamed columns
        selection = greedyprune.select(model, (inputs, targets), steps=100, memory_limit=limit)
        paths.append(selection.order.tolist())
    assert paths[0] == paths[1] == paths[2]


def test_the_example(mnist_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "mnist_mlp.py"]
    sizes = ["--units", "300", "--samples", "1000", "--iterations", "60", "--steps", "20"]
    folders = ["--data", mnist_folder.parent.parent, "--out", tmp_path]
    done = subprocess.run(
        [*command, *sizes, "--tune", "20", *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "greedy + tuning" in done.stdout
    assert (tmp_path / "mnist_mlp.png").stat().st_size > 10_000
    missing = subprocess.run([*command, "--data", tmp_path], capture_output=True, text=True)
    assert missing.returncode != 0
    assert "--data: no train-images-idx3-ubyte.gz" in missing.stderr
