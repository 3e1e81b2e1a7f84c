"""Several processes train a network together, and prune it together.

    torchrun --nproc-per-node=4 examples/distributed_prune.py
    torchrun --nproc-per-node=8 examples/distributed_prune.py --data DIR --units 10000 --steps 200

Each process has its own part of scikit-learn's digits, or of MNIST (DIR as for mnist_mlp.py).
Training is torch's DistributedDataParallel. All processes get the same Selection, and one process
with all the data would get it, too: with --check, the first process selects once more by itself,
and compares. With --checkpoint FOLDER, a job that was killed resumes. The processes use GPUs and
NCCL where there are GPUs, else gloo. Without torchrun there is one process.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import rich
import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import greedyprune
from greedyprune import Selection

Data = tuple[Tensor, Tensor]
Row = tuple[
    str, nn.Module, float, float, float
]  # name, network, accuracy on the training and the held-out data, seconds


def start() -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and this process's device."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return dist.get_rank(), dist.get_world_size(), device


def read(folder: Path | None) -> tuple[Data, Data]:
    """Images (m, pixels) in [0, 1] and digits (m,): the training data and the held-out data."""
    if folder is not None:
        from mnist_mlp import read_mnist

        return read_mnist(folder, "train"), read_mnist(folder, "t10k")
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.data).float() / 16
    digits = torch.from_numpy(found.target).long()
    return (images[:1400], digits[:1400]), (images[1400:], digits[1400:])


def train(model: nn.Module, data: Data, iterations: int, rank: int) -> float:
    """SGD with batches of 128 samples on each process; returns the seconds."""
    begun = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(rank)
    for _ in range(iterations):
        at = torch.randint(len(data[0]), (128,))
        optimizer.zero_grad()
        functional.cross_entropy(model(data[0][at]), data[1][at]).backward()
        optimizer.step()
    return time.perf_counter() - begun


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The accuracy over the data of all processes."""
    model.eval()
    right = (model(data[0]).argmax(1) == data[1]).sum().double()
    counts = torch.stack([right, torch.tensor(len(data[1])).to(right)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def show(rows: list[Row], processes: int) -> None:
    title = f"{processes} process{'es' if processes > 1 else ''}"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("network", "units", "params", "accuracy", "held out", "s"):
        table.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for name, model, seen, unseen, seconds in rows:
        units = next(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
        params = sum(p.numel() for p in model.parameters())
        table.add_row(
            name, f"{units}", f"{params:,}", f"{seen:.2%}", f"{unseen:.2%}", f"{seconds:.2f}"
        )
    rich.print(table)


def compare(
    model: nn.Module, data: Data, steps: int, found: Selection, group: dist.ProcessGroup | None
) -> None:
    """Compares the selection of all processes with that of one process on all the data."""
    begun = time.perf_counter()
    alone = greedyprune.select(model, data, steps=steps, process_group=group)
    same = "the same picks" if torch.equal(alone.order, found.order) else "OTHER PICKS"
    apart = float((alone.losses / found.losses - 1).abs().max())
    print(f"one process by itself: {same}, losses within {apart:.1g}, "
          f"{time.perf_counter() - begun:.2f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files; else the digits")
    parser.add_argument("--units", type=int, default=1024, help="hidden units before pruning")
    parser.add_argument("--steps", type=int, default=60, help="greedy steps")
    parser.add_argument("--iterations", type=int, default=400, help="of training")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from after a kill")
    parser.add_argument("--check", action="store_true", help="select by one process, too")
    args = parser.parse_args()

    rank, processes, device = start()
    whole, held_out = ((x.to(device), y.to(device)) for x, y in read(args.data))
    own, unseen = ((x[rank::processes], y[rank::processes]) for x, y in (whole, held_out))
    torch.manual_seed(0)  # the same network on every process
    model = nn.Sequential(
        nn.Linear(whole[0].shape[1], args.units), nn.ReLU(), nn.Linear(args.units, 10)
    ).to(device)
    trained = model if processes == 1 else DistributedDataParallel(model)
    seconds = train(trained, own, args.iterations, rank)
    rows: list[Row] = [("dense", model, accuracy(model, own), accuracy(model, unseen), seconds)]

    begun = time.perf_counter()
    selection = greedyprune.select(
        trained, own, steps=args.steps, loss="cross_entropy", checkpoint=args.checkpoint
    )
    seconds = time.perf_counter() - begun
    small = greedyprune.prune(trained, selection)
    rows.append(("greedy", small, accuracy(small, own), accuracy(small, unseen), seconds))
    tuned = small if processes == 1 else DistributedDataParallel(small)
    seconds = train(tuned, own, args.iterations // 4, rank)
    rows.append(("greedy + tuning", small, accuracy(small, own), accuracy(small, unseen), seconds))
    first = dist.new_group([0]) if dist.is_initialized() else None  # a group of one process
    if rank == 0:
        show(rows, processes)
        if args.check:
            order = [torch.cat([t[r::processes] for r in range(processes)]) for t in whole]
            compare(model, (order[0], order[1]), args.steps, selection, first)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
