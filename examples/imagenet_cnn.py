"""Prunes and fine-tunes a trained network on ImageNet, or on images in folders like ImageNet's.

    torchrun --nproc-per-node 8 examples/imagenet_cnn.py --data DIR --weights resnet50/
    torchrun --nproc-per-node 8 examples/imagenet_cnn.py --data DIR --weights FILE.pth \\
        --network mobilenet_v2 --prune loss --tolerance 0.02

DIR has train/CLASS/IMAGE and val/CLASS/IMAGE; nothing is downloaded. --weights is a folder that
transformers' save_pretrained wrote (ResNetForImageClassification,
MobileNetV2ForImageClassification), or a file of torchvision's weights for --network, for which
torchvision has to be installed. Without --weights, a network of transformers is trained first;
--iterations 450000 is 90 passes over ImageNet, and --prune-at says at which iterations to prune.
For one process, replace torchrun by python. An interrupted run resumes with the same command, and
results that are already in --out/imagenet_cnn.csv are not computed again. Prints a table and writes
a figure.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image
from results_table import Cell
from three_steps import Data, Task, Training, logits_of, options, rank, run, start
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORKS = {
    "resnet50": transformers.ResNetConfig(),
    "resnet34": transformers.ResNetConfig(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3]
    ),
    "mobilenet_v2": transformers.MobileNetV2Config(tf_padding=False),
}  # with torchvision's names
QUICK = {"resolution": 64, "batch": 32, "select_images": 64, "tune": 20, "layer_tune": 2}


class Folder(Dataset[tuple[Tensor, int]]):
    """The images folder/CLASS/*, (3, side, side) float32, normalised, and their class numbers.

    images[i] is the middle of image i. images[i, seed] is a random part of it, of 8 to 100 % of the
    area, mirrored with probability 1/2 (Szegedy et al. 2015).
    """

    def __init__(self, folder: Path, side: int) -> None:
        self.side = side
        if not folder.is_dir():
            raise SystemExit(f"--data: no folder {folder}")
        self.classes = sorted(each.name for each in folder.iterdir() if each.is_dir())
        self.files = [
            (file, place)
            for place, name in enumerate(self.classes)
            for file in sorted((folder / name).iterdir())
        ]
        if not self.files:
            raise SystemExit(f"--data: no images at {folder}/CLASS/IMAGE")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int | tuple[int, str]) -> tuple[Tensor, int]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        file, label = self.files[index]
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        box = middle(*image.size) if seed is None else some_part(*image.size, random.Random(seed))
        image = image.resize((self.side, self.side), Image.Resampling.BILINEAR, box)
        if seed is not None and random.Random(seed + "mirrored").random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.asarray(image, np.float32) / 255 - MEAN) / STD
        return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1), label


def middle(width: int, height: int) -> tuple[float, float, float, float]:
    """The square in the middle, of 224/256 of the shorter side: left, top, right, bottom."""
    half = min(width, height) * 224 / 256 / 2
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


def some_part(width: int, height: int, rng: random.Random) -> tuple[float, float, float, float]:
    area = rng.uniform(0.08, 1) * width * height
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide, high = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    return left, top, left + wide, top + high


def network(args: argparse.Namespace, classes: int) -> nn.Module:
    """The network of --network, with the given weights or with new ones."""
    if args.weights is None:
        config = copy.deepcopy(NETWORKS[args.network])
        config.num_labels = classes
        return transformers.AutoModelForImageClassification.from_config(config)
    if args.weights.is_dir():
        model = transformers.AutoModelForImageClassification.from_pretrained(
            args.weights, local_files_only=True, dtype=torch.float32
        )
    else:
        import torchvision

        state = torch.load(args.weights, map_location="cpu", weights_only=True)
        model = torchvision.models.get_model(args.network, num_classes=classes)
        model.load_state_dict(state)
    return model


def batches_of(
    images: Folder, args: argparse.Namespace, device: torch.device
) -> Callable[[int], Iterator[Data]]:
    """A function from a first iteration to the batches from there on.

    Each pass over the images has its own order. Every process gets its part of each batch.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    size = min(args.batch, len(images))
    a_pass = len(images) // size

    def indices(first: int) -> Iterator[list[tuple[int, str]]]:
        for i in itertools.count(first):
            if i == first or i % a_pass == 0:
                rng = torch.Generator().manual_seed(args.seed * 10**6 + i // a_pass)
                order = torch.randperm(len(images), generator=rng).tolist()
            batch = order[i % a_pass * size :][:size]
            yield [(index, f"{args.seed} {i} {index}") for index in batch[rank() :: processes]]

    def batches(first: int) -> Iterator[Data]:
        for pixels, labels in DataLoader(
            images, batch_sampler=indices(first), num_workers=args.workers,
            pin_memory=device.type == "cuda",
        ):  # fmt: skip
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return batches


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Folder, args: argparse.Namespace, device: torch.device
) -> float:
    """The accuracy over all images; every process takes a part of them."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    mine = Subset(images, range(rank(), len(images), processes))
    hits = torch.zeros((), dtype=torch.float64, device=device)
    for pixels, labels in DataLoader(mine, 128, num_workers=args.workers):
        hits += (logits_of(model(pixels.to(device))).argmax(1) == labels.to(device)).sum()
    if dist.is_initialized():
        dist.all_reduce(hits)
    return hits.item() / len(images)


def tasks_of(args: argparse.Namespace) -> Iterator[tuple[Cell, Task]]:
    device = start(args.device)
    images, held_out = (Folder(args.data / part, args.resolution) for part in ("train", "val"))
    if images.classes != held_out.classes:
        raise SystemExit(f"--data: found other classes in {args.data}/val than in /train")

    def dense() -> nn.Module:
        torch.manual_seed(args.seed)
        return network(args, len(images.classes)).to(device).eval()

    rng = torch.Generator().manual_seed(args.seed)
    some = torch.randperm(len(images), generator=rng)[: args.select_images].tolist()
    pixels, labels = zip(*(images[index] for index in some), strict=True)
    data = torch.stack(pixels), torch.tensor(labels)
    outputs = logits_of(dense()(data[0][:1].to(device))).shape[1]
    if outputs != len(images.classes):
        raise SystemExit(
            f"--data: found {len(images.classes)} classes, expected the network's {outputs}"
        )
    compiled = device.type == "cuda" if args.compile is None else args.compile
    given = args.weights is not None and args.weights.is_dir()
    name = args.weights.resolve().name if given else args.network
    training = Training(
        batches_of(images, args, device), args.seed, args.weight_decay, args.every, compiled
    )
    task = Task(
        dense, data, training, lambda model: accuracy(model, held_out, args, device),
        args.layer_tune, args.out / f"{name}-{len(images)}-{args.iterations}-{args.seed}",
    )  # fmt: skip
    for at, prune in itertools.product(sorted(args.prune_at or [args.iterations]), args.prune):
        keep = {"none": 1.0, "imitation": args.size, "loss": args.tolerance}[prune]
        cell = Cell(name, len(images), args.seed, args.iterations, at, prune, keep, args.tune)
        yield cell, task


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--weights", type=Path, help="folder of transformers' or file of torchvision's")
    add("--network", choices=NETWORKS, default="resnet50")
    add(
        "--out",
        type=Path,
        default=Path("out/imagenet_cnn"),
        help="folder; a new one for other options",
    )
    add("--quick", action="store_true", help="few images of 64 pixels, a few iterations")
    add("--seed", type=int, default=0)
    add("--iterations", type=int, default=0, help="of pre-training")
    add("--prune-at", type=int, nargs="+",
        help="iterations of pre-training after which to prune; default: all")  # fmt: skip
    add("--batch", type=int, default=256, help="images of an iteration, over all processes")
    add("--resolution", type=int, default=224, help="pixels of a side")
    add("--weight-decay", type=float, default=1e-4)
    add("--workers", type=int, default=4, help="that read images, of each process")
    add("--tolerance", type=float, default=0.05,
        help="for loss: share of the loss; Wolfe et al.: 0.02 for MobileNetV2")  # fmt: skip
    options(parser)
    if parser.parse_known_args(given)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(given)
    if args.weights is None and args.iterations == 0:
        parser.error("--iterations: found 0 without --weights, expected one of them")
    if args.weights is not None and not args.weights.exists():
        parser.error(f"--weights: no file or folder {args.weights}")
    return args


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    run(tasks_of(args), args.out / "imagenet_cnn.csv")


if __name__ == "__main__":
    main()
