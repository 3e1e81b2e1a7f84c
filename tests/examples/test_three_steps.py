"""The examples that pre-train, prune and fine-tune convolutional networks; on generated images."""

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import greedyprune

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import cifar  # noqa: E402
import cifar_cnn  # noqa: E402
import imagenet_cnn  # noqa: E402
from results_table import Cell, Result, read_results  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of CIFAR-10's layout: 24 images a training file, 500 in the test file."""
    folder = tmp_path_factory.mktemp("cifar")
    (folder / "cifar-10-batches-py").mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (500 if name == "test_batch" else 24, 3072), dtype=np.uint8)
        batch = {b"data": pixels, b"labels": rng.integers(10, size=len(pixels)).tolist()}
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))
    return folder


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cifar.NETWORKS, "tiny", lambda: cifar.resnet((1, 1), (8, 8)))


def run_cifar(folder: Path, out: Path, *options: str) -> dict[Cell, Result]:
    """Runs examples/cifar_cnn.py on the tiny network; `options` override the ones given here."""
    sizes = ["--images", "100", "--iterations", "6", "--prune-at", "0", "6", "--tune", "3"]
    rest = ["--networks", "tiny", "--every", "2", "--select-images", "50", "--layer-tune", "1"]
    cifar_cnn.main(["--data", str(folder), "--out", str(out), "--quick", *sizes, *rest, *options])
    return read_results(out / "cifar_cnn.csv")


def test_results_are_those_of_the_saved_networks(cifar_folder: Path, tmp_path: Path) -> None:
    results = run_cifar(cifar_folder, tmp_path)
    assert [(cell.pretrained, cell.prune, cell.keep) for cell in results] == [
        (0, "none", 1.0), (0, "imitation", 0.5), (6, "none", 1.0), (6, "imitation", 0.5),
    ]  # fmt: skip
    held_out = cifar.read_cifar(cifar_folder, "test")
    dense = cifar.NETWORKS["tiny"]()
    for cell, result in results.items():
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        checkpoint = torch.load(folder / f"{cell.pretrained:05}.pt", weights_only=True)
        dense.load_state_dict(checkpoint["model"])
        if cell.prune == "none":
            assert result.accuracy == pytest.approx(cifar.accuracy(dense.eval(), held_out))
            unpruned = result
        else:
            assert result.params < unpruned.params and result.flops < unpruned.flops
        name = f"{cell.pretrained:05}-{cell.prune}-{cell.keep:g}-{cell.tune}.safetensors"
        small = greedyprune.load_pruned(folder / name, lambda: cifar.NETWORKS["tiny"]()).eval()
        assert cifar.accuracy(small, held_out) == pytest.approx(result.tuned)
        assert sum(p.numel() for p in small.parameters()) == result.params
        if cell.prune == "imitation":
            assert small[3].conv1.out_channels == 4
    assert (tmp_path / "cifar_cnn.png").stat().st_size > 10_000


def test_layer_by_layer_by_the_loss(cifar_folder: Path, tmp_path: Path) -> None:
    results = run_cifar(cifar_folder, tmp_path, "--prune-at", "6", "--prune", "none", "loss")
    assert [(cell.prune, cell.keep) for cell in results] == [("none", 1.0), ("loss", 0.05)]
    dense, small = results.values()
    assert small.params < dense.params / 2  # the images are noise, so few units are enough


def test_an_interrupted_run_resumes(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is interrupted every few iterations gives the same bits, and repeats no work."""
    expected = run_cifar(cifar_folder, tmp_path / "whole")
    calls, augmented = itertools.count(1), cifar.augmented

    def interrupting(images: Tensor) -> Tensor:
        if next(calls) % 4 == 0:
            raise KeyboardInterrupt
        return augmented(images)

    monkeypatch.setattr(cifar_cnn, "augmented", interrupting)
    for attempts in itertools.count():
        try:
            results = run_cifar(cifar_folder, tmp_path / "parts")
            break
        except KeyboardInterrupt:
            assert attempts < 20
    assert attempts > 4
    assert results.keys() == expected.keys()
    for cell, result in results.items():
        assert (result.accuracy, result.tuned) == (expected[cell].accuracy, expected[cell].tuned)
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        other = load_file(tmp_path / "parts" / file.relative_to(tmp_path / "whole"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in load_file(file).items())
    calls_before = next(calls)
    assert run_cifar(cifar_folder, tmp_path / "parts") == results
    assert next(calls) == calls_before + 1  # the complete run trained nothing


def test_batches_continue_from_any_iteration() -> None:
    images = torch.arange(10.0)[:, None, None, None].expand(-1, 3, 32, 32)
    batches = cifar_cnn.batches_of((images, torch.arange(10)), seed=3, size=4)
    labels = [y.tolist() for _, y in itertools.islice(batches(0), 8)]
    assert [y.tolist() for _, y in itertools.islice(batches(3), 5)] == labels[3:]
    for first, second in zip(labels[::2], labels[1::2], strict=True):
        assert len({*first, *second}) == 8  # no image twice in a pass


def test_bad_input(cifar_folder: Path, tmp_path: Path) -> None:
    run_cifar(cifar_folder, tmp_path, "--prune-at", "4", "--prune", "none")
    with pytest.raises(SystemExit, match=r"found 4 iterations, expected at most 2"):
        run_cifar(cifar_folder, tmp_path, "--prune-at", "2", "--prune", "none")
    with pytest.raises(SystemExit):
        run_cifar(cifar_folder, tmp_path, "--prune-at", "7")


def test_networks_have_the_published_sizes() -> None:
    """torchvision's mobilenet_v2 with ten classes, and ResNet-34 with a 3x3 first convolution."""
    sizes = {"mobilenetv2": 3_504_872 - 1_281_000 + 12_810, "resnet34": 21_282_122}
    for name, size in sizes.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in cifar.NETWORKS[name]().parameters()) == size
    images = torch.randn(40, 3, 32, 32)
    model = cifar.mobilenetv2(0.25).eval()
    layers = [name for name in greedyprune.layers(model, images[:1]) if name[0] == "4"]
    selection = greedyprune.select(model, (images, torch.arange(40) % 10), layers=layers)
    assert greedyprune.prune(model, selection)(images).shape == (40, 10)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ImageFolder's layout, and a network of transformers for its three classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, name in itertools.product(("train", "val"), ("cat", "dog", "owl")):
        (folder / part / name).mkdir(parents=True)
        for i in range(12 if part == "train" else 20):
            pixels = rng.integers(0, 200, 3) + rng.integers(0, 56, (20 + i, 30, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{i}.png")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, std=3)
            nn.init.normal_(module.bias, std=3)
    images = imagenet_cnn.Folder(folder / "val", 32)
    with torch.no_grad():  # without this, the network puts all images into one class
        outputs = model.eval()(torch.stack([image for image, _ in images])).logits
        model.classifier[1].bias -= outputs.mean(0)
    model.save_pretrained(folder / "tiny")
    return folder


IMAGENET = ["--quick", "--batch", "8", "--tune", "3", "--resolution", "32", "--select-images", "16",
            "--workers", "0", "--every", "2", "--device", "cpu"]  # fmt: skip


def test_two_processes(image_folder: Path, tmp_path: Path) -> None:
    """torchrun over gloo: each process trains on its part; one selects, and both prune the same."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    options = ["--data", image_folder, "--weights", image_folder / "tiny", "--out", tmp_path]
    options += [*IMAGENET, "--prune", "none", "imitation", "loss"]
    process = subprocess.run(
        [*command, EXAMPLES / "imagenet_cnn.py", *options],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    results = read_results(tmp_path / "imagenet_cnn.csv")
    args = imagenet_cnn.arguments([*map(str, options)])
    held_out, cpu = imagenet_cnn.Folder(image_folder / "val", 32), torch.device("cpu")
    (_, task), *_ = imagenet_cnn.tasks_of(args)
    dense = task.dense()
    selection = greedyprune.select(dense, task.data, objective="imitation", size=0.5)
    networks = {"none": dense, "imitation": greedyprune.prune(dense, selection)}
    assert [cell.prune for cell in results] == [*networks, "loss"]
    for small, result in zip(networks.values(), results.values(), strict=False):
        assert result.params == sum(p.numel() for p in small.parameters())
        accuracy = imagenet_cnn.accuracy(small, held_out, args, cpu)
        assert result.accuracy == pytest.approx(accuracy, abs=1e-4)
