"""How well a pruned network does on unseen images, for few to many calibration samples.

    python benchmarks/few_samples.py --data DIR [--samples 64 256 1024 4096]

DIR has CIFAR-10's Python batches. Prints, for `select` with `prune` and for `refit`, the squared
error of the outputs on test images, as a share of the dense outputs' variance, and the accuracy.
The first network has random weights and takes generated images: a Linear of 1152 inputs follows its
convolutions, so that least squares has fewer rows than unknowns. Half of all channels are kept (in
the ResNet-20 half of the inner ones).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import greedyprune

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar import kept, read_cifar

HELD_OUT = 10_000


def random_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 128, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, 10),
    ).eval()  # fmt: skip


def smooth_images(count: int) -> Tensor:
    return functional.interpolate(torch.randn(count, 3, 6, 6), (18, 18), mode="bicubic")


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(500)])


def row(
    name: str, model: nn.Module, images: Tensor, layers: list[str] | None, held_out: Tensor,
    accuracy: Callable[[Tensor], str],
) -> None:  # fmt: skip
    selection = greedyprune.select(
        model, (images,), size=0.5, layers=layers, objective="imitation", progress=False
    )
    dense = outputs_of(model, held_out)
    cells = []
    for small in (
        greedyprune.prune(model, selection),
        greedyprune.refit(model, selection, (images,), progress=False),
    ):
        outputs = outputs_of(small, held_out)
        share = float((outputs - dense).square().mean() / dense.var(0).mean())
        cells += [f"{share:.3f}", accuracy(outputs)]
    print("|", " | ".join([name, str(len(images)), *cells]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 256, 1024, 4096])
    args = parser.parse_args()
    print("| network | samples | error, prune | accuracy | error, refit | accuracy |")
    print("| --- | --- | --- | --- | --- | --- |")
    torch.manual_seed(0)
    model, held_out, images = random_cnn(), smooth_images(2000), smooth_images(max(args.samples))
    for count in args.samples:
        row("random CNN", model, images[:count], None, held_out, lambda outputs: "")
    images, _ = read_cifar(args.data, "train")
    held_out, labels = (part[:HELD_OUT] for part in read_cifar(args.data, "test"))
    images = images[torch.randperm(len(images))[: max(args.samples)]]

    def accuracy(outputs: Tensor) -> str:
        return f"{float((outputs.argmax(1) == labels).float().mean()):.2%}"

    for name in ("vgg", "resnet20"):
        model = kept(name).eval()
        modules = [module for module, _ in model.named_modules()]
        inner = [module for module in modules if module.endswith("conv1")] or None
        for count in args.samples:
            row(name, model, images[:count], inner, held_out, accuracy)


if __name__ == "__main__":
    main()
