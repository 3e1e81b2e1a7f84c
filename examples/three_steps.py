"""What the convolutional examples share: pre-training, pruning and fine-tuning that can resume.

They run on one process, or on several that torchrun starts. Then training is torch's
DistributedDataParallel, each process brings a part of the images to a selection, and rank 0 writes
the files.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import rich
import torch
import torch.distributed as dist
from results_table import METHODS, Cell, Result, append_result, picture, read_results, tables
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import greedyprune

T = TypeVar("T")
Data = tuple[Tensor, Tensor]
SHOWN = 50  # iterations between two displays of the loss; each one waits for the GPU


@dataclass(frozen=True)
class Training:
    """What all trainings of a network have in common.

    batches: a function from a first iteration to the batches from there on: images and labels on
        the network's device
    every: iterations between checkpoints
    """

    batches: Callable[[int], Iterator[Data]]
    seed: int
    weight_decay: float
    every: int
    compiled: bool


@dataclass(frozen=True)
class Task:
    """What an example provides for one pre-training.

    dense: a function that returns the untrained network on its device, the same one in every call
    data: images and labels to select on
    test: a function from a network to its accuracy on held-out images
    layer_tune: for "loss", the iterations of fine-tuning after each layer
    folder: where the networks and checkpoints are saved
    """

    dense: Callable[[], nn.Module]
    data: Data
    training: Training
    test: Callable[[nn.Module], float]
    layer_tune: int
    folder: Path


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the command-line arguments that the examples share."""
    add = parser.add_argument
    add("--prune", nargs="+", choices=METHODS, default=["none", "imitation"], help="how")
    add("--size", type=float, default=0.5, help="for imitation: the share of units that is kept")
    add("--select-images", type=int, default=1024, help="training images to select on")
    add("--tune", type=int, default=2500, help="iterations of fine-tuning")
    add("--layer-tune", type=int, default=100, help="for loss: iterations after each layer")
    add("--every", type=int, default=1000, help="iterations between checkpoints")
    add("--device", default="auto", help="cpu, cuda or cuda:1, say")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Waits until every process is here; then all can read the files that rank 0 has written."""
    if dist.is_initialized():
        dist.barrier()


def by_rank_0(function: Callable[[], T]) -> T:
    """Calls the function on rank 0, and returns its result on every rank."""
    if not dist.is_initialized():
        return function()
    found = [function() if rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def start(device: str) -> torch.device:
    """The device to use ("auto": a GPU where there is one). Joins the processes of torchrun."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type == "cuda":
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", found.index or 0)))
        torch.cuda.set_device(found)
        torch.backends.cudnn.benchmark = True
    if "LOCAL_RANK" in os.environ:
        # A long timeout: the other ranks wait while rank 0 works alone.
        dist.init_process_group(
            "nccl" if found.type == "cuda" else "gloo", timeout=timedelta(hours=12)
        )
    return found


def write(content: dict[str, Any], file: Path) -> None:
    """Writes a file completely or not at all: an interrupted run leaves the old file or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def train(
    model: nn.Module, by: Training, iterations: int, lr: float, title: str,
    until: int | None = None, file: Path | None = None,
) -> float:  # fmt: skip
    """SGD with a learning rate along a cosine from `lr` to 0; returns the seconds of all parts.

    It stops at iteration `until`. It writes checkpoints to `file`, also when it stops, and resumes
    from there. Each iteration seeds the random numbers anew, so an interrupted run ends exactly
    like one that was not interrupted.
    """
    until = iterations if until is None else until
    where = next(model.parameters()).device
    mixed = where.type == "cuda" and torch.cuda.is_bf16_supported()
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=by.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, iterations))
    parts: dict[str, Any] = {"model": model, "optimiser": optimiser, "schedule": schedule}
    first, before = 0, 0.0
    if file is not None and file.is_file():
        kept = torch.load(file, map_location=where, weights_only=True)
        first, before = kept["iteration"], kept["seconds"]
        for name, part in parts.items():
            part.load_state_dict(kept[name])
    if first > until:
        raise SystemExit(f"{file}: found {first} iterations, expected at most {until}")
    network = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    forward: Callable[[Tensor], Any] = network
    if by.compiled and file is not None:  # compiling takes a minute, too long for a short training
        torch.compiler.reset()  # after many networks of other shapes, torch would stop compiling
        forward = torch.compile(network)
    begun, following = time.perf_counter(), by.batches(first)
    steps = tqdm(
        range(first, until), title, until, initial=first, mininterval=5,
        disable=rank() > 0 or first == until,
    )  # fmt: skip
    for i in steps:
        torch.manual_seed((1000 * rank() + by.seed) * 10**9 + i)
        images, labels = next(following)
        with torch.autocast(where.type, torch.bfloat16, enabled=mixed):
            outputs = logits_of(forward(images.contiguous(memory_format=torch.channels_last)))
            loss = functional.cross_entropy(outputs, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if i % SHOWN == 0:
            steps.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if file is not None and rank() == 0 and ((i + 1) % by.every == 0 or i + 1 == until):
            seconds = before + time.perf_counter() - begun
            states = {name: part.state_dict() for name, part in parts.items()}
            write({**states, "iteration": i + 1, "seconds": seconds}, file)
    barrier()
    model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return before + time.perf_counter() - begun


def logits_of(outputs: Any) -> Tensor:
    """The output of a network, or the logits in the output of a Hugging Face model."""
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def image_for(model: nn.Module, task: Task) -> Tensor:
    return task.data[0][:1].to(next(model.parameters()).device)


def flops(model: nn.Module, image: Tensor) -> int:
    """Of one image; a multiplication with an addition is two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def part_of(data: Data) -> Data:
    """This process's part of the data to select on: so many images in a row."""
    if not dist.is_initialized():
        return data
    images, labels = (tensor.tensor_split(dist.get_world_size()) for tensor in data)
    return images[rank()], labels[rank()]


def pruned(model: nn.Module, cell: Cell, task: Task) -> nn.Module:
    """The pruned model; for "none", `model` itself.

    "imitation": keeps the share `cell.keep` of the units in every layer, and refits the weights to
    imitate the dense network. "loss": the form of Ye et al. and of Wolfe et al., layer by layer.
    Each step draws 50 candidates at random and scores them by the network's loss on 128 images. A
    layer is done when this loss is at most the share `cell.keep` above the loss before the layer; a
    short fine-tuning follows.
    """
    if cell.prune == "none":
        return model
    if cell.prune == "imitation":
        selection = greedyprune.select(
            model, part_of(task.data), objective="imitation", size=cell.keep
        )
        return greedyprune.prune(model, selection)
    for name, layer in greedyprune.layers(model, image_for(model, task)).items():
        objective = greedyprune.Loss(candidates=min(50, layer.units), batch_size=128)
        selection = greedyprune.select(
            model, part_of(task.data), layers=name, objective=objective, tolerance=cell.keep,
            seed=cell.seed,
        )  # fmt: skip
        model = greedyprune.prune(model, selection)
        train(model, task.training, task.layer_tune, 0.01, f"tuning after {name}")
    return model


def timed(function: Callable[[], T]) -> tuple[T, float]:
    begun = time.perf_counter()
    return function(), time.perf_counter() - begun


def pretrained(cell: Cell, task: Task) -> tuple[nn.Module, float]:
    """The dense network after the cell's iterations of pre-training, and the seconds it took."""
    file = task.folder / f"{cell.pretrained:05}.pt"
    model = task.dense()
    if not by_rank_0(file.is_file):
        seconds = train(
            model, task.training, cell.schedule, 0.1, "pre-training", cell.pretrained,
            task.folder / "newest.pt",
        )  # fmt: skip
        if rank() == 0:
            write({"model": model.state_dict(), "seconds": seconds}, file)
        barrier()
    kept = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(kept["model"])
    return model.eval(), kept["seconds"]


def finish(cell: Cell, task: Task) -> Result:
    """Pre-trains, prunes and fine-tunes; steps that are already on the disk are not repeated."""
    dense, train_s = pretrained(cell, task)
    name = f"{cell.pretrained:05}-{cell.prune}-{cell.keep:g}"
    file = task.folder / f"{name}.safetensors"
    found = file.with_suffix(".json")
    if not by_rank_0(found.is_file):
        small, select_s = timed(lambda: pruned(dense, cell, task))
        accuracy, test_s = timed(lambda: task.test(small))
        if rank() == 0:
            greedyprune.save_pruned(small, file)
            about = {"accuracy": accuracy, "select_s": select_s, "test_s": test_s}
            found.write_text(json.dumps(about))
        barrier()
    small = greedyprune.load_pruned(file, task.dense)
    tuning = task.folder / f"{name}-{cell.tune}.pt"
    tune_s = train(small, task.training, cell.tune, 0.01, "fine-tuning", file=tuning)
    tuned = task.test(small)
    if rank() == 0:
        greedyprune.save_pruned(small, tuning.with_suffix(".safetensors"))
        tuning.unlink(missing_ok=True)
    return Result(
        tuned=tuned, tune_s=tune_s, train_s=train_s,
        params=sum(p.numel() for p in small.parameters()),
        flops=flops(small, image_for(small, task)), **json.loads(found.read_text()),
    )  # fmt: skip


def run(tasks: Iterable[tuple[Cell, Task]], file: Path) -> None:
    """Computes the cells that the CSV `file` does not have; prints a table and writes a figure."""
    for cell, task in tasks:
        if cell in by_rank_0(lambda: read_results(file)):
            continue
        result = finish(cell, task)
        if rank() == 0:
            append_result(file, cell, result)
            print(
                f"{cell.network}, {cell.images} images, {cell.pretrained} iterations, "
                f"{cell.prune}: {result.accuracy:.2%}, fine-tuned {result.tuned:.2%}",
                flush=True,
            )
    if rank() == 0:
        results = read_results(file)
        rich.print(*tables(results))
        picture(results).savefig(file.with_suffix(".png"), dpi=120)
        print(f"results: {file}, picture: {file.with_suffix('.png')}")
    if dist.is_initialized():
        dist.barrier()  # without it, torch may abort the last process to leave
        dist.destroy_process_group()
