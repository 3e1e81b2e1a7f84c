"""`select` and `refit` of ImageNet-size networks, in forward passes over the same images.

    python benchmarks/large.py [--network resnet50] [--images 1024] [--batch 32] [--size 0.5]
        [--refit] [--memory-limit GIB]

The networks have random weights. The images are noise in which neighbouring pixels are alike.
Prints the seconds of a forward pass over all images, of `select` and of `refit`, their ratios, and
the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import greedyprune


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """Convolutions of these kernel sizes and widths, each with its norm, and a shortcut.

    Source: He et al. 2016, arXiv:1512.03385; the stride is that of the 3 x 3 convolution.
    """

    def __init__(
        self, inputs: int, widths: tuple[int, ...], kernels: tuple[int, ...], stride: int
    ) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList(map(nn.BatchNorm2d, widths))
        width, strides = (
            inputs,
            [stride if i == kernels.index(3) else 1 for i in range(len(kernels))],
        )
        for outputs, kernel, step in zip(widths, kernels, strides, strict=True):
            self.convs.append(conv(width, outputs, kernel, step))
            width = outputs
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != width:
            self.shortcut = nn.Sequential(conv(inputs, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inside = x
        for i, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            inside = norm(convolution(inside))
            inside = functional.relu(inside) if i + 1 < len(self.convs) else inside
        return functional.relu(inside + self.shortcut(x))


def resnet(depths: tuple[int, ...], bottleneck: bool, stem: nn.Module, classes: int) -> nn.Module:
    layers, inputs = [stem], 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        widths: tuple[int, ...] = (width, width)
        kernels: tuple[int, ...] = (3, 3)
        if bottleneck:
            widths, kernels = (width, width, 4 * width), (1, 3, 1)
        for i in range(depth):
            layers.append(Block(inputs, widths, kernels, 2 if stage and not i else 1))
            inputs = widths[-1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet50() -> nn.Module:
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    )  # fmt: skip
    return resnet((3, 4, 6, 3), True, stem, 1000)


def resnet34() -> nn.Module:
    """For CIFAR: without the strides of the stem."""
    stem = nn.Sequential(conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
    return resnet((3, 4, 6, 3), False, stem, 10)


def plain(widths: tuple[int | None, ...], kernels: tuple[int, ...], side: int) -> nn.Module:
    """Convolutions of these widths, each with a ReLU, and pooling at None; then three Linears."""
    layers, inputs, sizes = list[nn.Module](), 3, iter(kernels)
    for width in widths:
        if width is None:
            layers.append(nn.MaxPool2d(3 if kernels[0] > 3 else 2, 2))
            continue
        kernel = next(sizes)
        layers += [nn.Conv2d(inputs, width, kernel, 4 if kernel > 5 else 1, kernel // 2), nn.ReLU()]
        inputs = width
    layers += [nn.Flatten(), nn.Linear(inputs * side * side, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))


def alexnet() -> nn.Module:
    """Krizhevsky 2014, arXiv:1404.5997."""
    return plain((64, None, 192, None, 384, 256, 256, None), (11, 5, 3, 3, 3), 6)


def vgg16() -> nn.Module:
    """Simonyan and Zisserman 2015, arXiv:1409.1556."""
    stages = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
    widths = [each for width, depth in stages for each in (*[width] * depth, None)]
    return plain(tuple(widths), (3,) * 13, 7)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (resnet50, 224),
    "resnet34": (resnet34, 32),
    "alexnet": (alexnet, 224),
    "vgg16": (vgg16, 224),
}


def images_of(count: int, size: int) -> Tensor:
    noise = torch.randn(count, 3, size, size)
    return 5 * functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--network", choices=NETWORKS, default="resnet50")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=float, default=0.5)
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--memory-limit", type=float, help="of select and refit, GiB")
    args = parser.parse_args()
    torch.manual_seed(0)
    limit = args.memory_limit and int(args.memory_limit * 2**30)
    make, side = NETWORKS[args.network]
    model = make().eval()
    data = list(images_of(args.images, side).split(args.batch))
    with torch.no_grad():
        model(data[0])
        start = time.perf_counter()
        for batch in data:
            model(batch)
        forward = time.perf_counter() - start
    print(f"{args.network}, {args.images} images, {len(data)} batches: forward {forward:.1f} s")
    start = time.perf_counter()
    selection = greedyprune.select(model, data, size=args.size, memory_limit=limit, progress=False)
    seconds = time.perf_counter() - start
    print(f"select {seconds:.1f} s, {seconds / forward:.2f} forward passes", flush=True)
    if args.refit:
        start = time.perf_counter()
        greedyprune.refit(model, selection, data, memory_limit=limit, progress=False)
        seconds = time.perf_counter() - start
        print(f"refit {seconds:.1f} s, {seconds / forward:.2f} forward passes")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
