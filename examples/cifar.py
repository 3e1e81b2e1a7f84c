"""CIFAR-10 from the standard Python batches, and networks in their CIFAR form.

    python examples/cifar.py --data DIR [--network resnet20 | resnet34 | mobilenetv2 | vgg]

trains a network on DIR/cifar-10-batches-py and saves it in float16 next to this file. The networks:
a ResNet-20 (16-32-64 channels; He et al. 2016, section 4.2, with 1x1 convolutions where a shortcut
changes the size), a ResNet-34, a MobileNetV2, and a small VGG (eight convolutions of 24 to 192
channels, no shortcuts).
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], widths: tuple[int, ...], classes: int = 10) -> nn.Sequential:
    """A stage for each entry of `blocks` and `widths`; all but the first halve the image."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    ]  # fmt: skip
    width = widths[0]
    for stage, (count, wide) in enumerate(zip(blocks, widths, strict=True)):
        for i in range(count):
            layers.append(Block(width, wide, 2 if stage and not i else 1))
            width = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def resnet20() -> nn.Sequential:
    return resnet((3, 3, 3), (16, 32, 64))


def resnet34() -> nn.Sequential:
    """The form for CIFAR: the first convolution is 3x3, without pooling after it."""
    return resnet((3, 4, 6, 3), (64, 128, 256, 512))


def vgg() -> nn.Sequential:
    """Pairs of 3x3 convolutions and one Linear; pooling halves the image after each pair."""
    layers: list[nn.Module] = []
    width = 3
    for wide in (24, 48, 96, 192):
        for _ in range(2):
            convolution = nn.Conv2d(width, wide, 3, 1, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(wide), nn.ReLU()]
            width = wide
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class InvertedResidual(nn.Module):
    """A 1x1 convolution to more channels, a depthwise 3x3 one, and a 1x1 one back.

    With a shortcut around them where the input and the output have the same shape.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.ReLU6(), nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        ]  # fmt: skip
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


def mobilenetv2(width: float = 1.0) -> nn.Sequential:
    """Sandler et al. 2018, table 2, for CIFAR: the image is halved three times, not five times.

    width: a factor on the numbers of channels, which are rounded to multiples of eight
    """

    def wide(channels: int) -> int:
        return max(8, round(channels * width / 8) * 8)

    inputs = wide(32)
    layers: list[nn.Module] = [
        nn.Conv2d(3, inputs, 3, 1, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6()
    ]  # fmt: skip
    for expansion, channels, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):  # fmt: skip
        for i in range(count):
            layers.append(
                InvertedResidual(inputs, wide(channels), stride if i == 0 else 1, expansion)
            )
            inputs = wide(channels)
    last = max(1280, wide(1280))
    layers += [nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "resnet20": resnet20, "resnet34": resnet34, "mobilenetv2": mobilenetv2, "vgg": vgg,
}  # fmt: skip


def read_cifar(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (m, 3, 32, 32) float32, normalised, and labels (m,) of "train" or "test"."""
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    names = [f"data_batch_{i}" for i in range(1, 6)] if part == "train" else ["test_batch"]
    images, labels = [], []
    for name in names:
        if not (folder / name).is_file():
            raise SystemExit(f"--data: no cifar-10-batches-py/{name} in {folder}")
        with (folder / name).open("rb") as file:
            batch = pickle.load(file, encoding="bytes")
        images.append(torch.from_numpy(batch[b"data"]).view(-1, 3, 32, 32))
        labels += batch[b"labels"]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (torch.cat(images).float() / 255 - mean) / std, torch.tensor(labels)


def augmented(images: Tensor) -> Tensor:
    """Shifts each image by up to four pixels, and mirrors each with probability 1/2."""
    padded = functional.pad(images, (4, 4, 4, 4))
    where = images.device
    rows, columns = torch.randint(9, (2, len(images)), device=where)
    flip = torch.rand(len(images), device=where) < 0.5
    at = torch.arange(32, device=where)
    column = columns[:, None] + torch.where(flip[:, None], 31 - at, at)
    row = rows[:, None] + at
    index = torch.arange(len(images), device=where)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, row[:, :, None], column[:, None]].permute(0, 3, 1, 2)


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for part in torch.randperm(len(images))[: len(images) // size * size].split(size):
        yield augmented(images[part]), labels[part]


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float = 0.1, size: int = 128
) -> None:
    """SGD with momentum; the learning rate rises once and falls once."""
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = epochs * (len(data[0]) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2 * lr, steps, pct_start=0.2)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for inputs, labels in batches(*data, size):
            loss = functional.cross_entropy(
                model(inputs.contiguous(memory_format=torch.channels_last)), labels
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        mean = total / (len(data[0]) // size)
        print(f"epoch {epoch + 1}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
    model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    hits = [
        (model(x).argmax(1) == y).double().sum()
        for x, y in zip(data[0].split(500), data[1].split(500), strict=True)
    ]
    return float(sum(hits)) / len(data[0])


def kept(network: str = "resnet20") -> nn.Sequential:
    """A network that this script has trained and saved."""
    model = NETWORKS[network]()
    state = load_file(Path(__file__).with_name(f"{network}.safetensors"))
    model.load_state_dict({name: t.float() for name, t in state.items()}, strict=False)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file; NETWORK.safetensors beside this one")
    args = parser.parse_args()
    out = args.out or Path(__file__).with_name(f"{args.network}.safetensors")
    torch.manual_seed(args.seed)
    data, held_out = read_cifar(args.data, "train"), read_cifar(args.data, "test")
    model = NETWORKS[args.network]()
    train(model, data, args.epochs)
    state = {
        name: t.half().contiguous() for name, t in model.state_dict().items()
        if t.is_floating_point()
    }  # fmt: skip
    save_file(state, out)
    model.load_state_dict({name: t.float() for name, t in state.items()}, strict=False)
    print(f"{out}: test accuracy {accuracy(model, held_out):.2%}")


if __name__ == "__main__":
    main()
