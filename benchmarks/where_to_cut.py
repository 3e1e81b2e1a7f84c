"""Inner units, the residual stream, or both: what to cut in a transformer at equal FLOPs?

    python benchmarks/where_to_cut.py --data DIR [--flops 0.5 0.25] [--seeds 0 1 2]
    python benchmarks/where_to_cut.py --data DIR --attention [--kept 0.5 0.25]
    python benchmarks/where_to_cut.py --data DIR --feed-forward [--kept 0.67]

DIR or DIR/MNIST/raw has MNIST's IDX files. Trains two small transformers, about twelve minutes on
one core, and keeps them in --out: a vision transformer on MNIST, and a causal language model of the
characters in the source files of Python's standard library. Then prunes them to a share of their
FLOPs. The layers that are cut are the inner ones (attention heads and feed-forward units), the
residual stream, or both. They keep the same share of their units, or sizes from a Budget, by the
layers' own errors or with five trials for each layer. Prints, for each seed of the samples to
select on, the accuracy or the loss on held-out data after `prune` and after `refit`.

With --attention, only the attention is cut: whole heads, or the dimensions inside all heads. Both
leave the same FLOPs at the same share. With --feed-forward, only the feed-forward parts are cut, at
equal parameters.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import greedyprune

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from mnist_mlp import read_mnist

CONTEXT = 64  # characters of a sequence
SYMBOLS = 128  # ASCII
TRIALS = 5  # for each layer


class Block(nn.Module):
    """Attention and a feed-forward part, each with a LayerNorm before it and a shortcut around."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.head_size, self.causal = width // heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head_size))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """Takes images, or where causal the symbols of a text."""

    def __init__(
        self, embedding: nn.Module, places: int, width: int, outputs: int, causal: bool
    ) -> None:
        super().__init__()
        self.embedding, self.causal = embedding, causal
        self.places = nn.Parameter(0.02 * torch.randn(1, places, width))
        self.blocks = nn.Sequential(*[Block(width, 8, causal) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) if self.causal else self.embedding(x).flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(x + self.places))
        return self.head(x if self.causal else x.mean(1))


@dataclass(frozen=True)
class Task:
    """A network and its data: inputs and targets. It is selected on `samples` training inputs.

    result: from a network's outputs and the targets to the figure of the table, as text
    """

    title: str
    model: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    iterations: int
    batch: int
    samples: int
    result: Callable[[Tensor, Tensor], str]


def images_task(folder: Path) -> Task:
    def part(name: str) -> tuple[Tensor, Tensor]:
        images, digits = read_mnist(folder, name)
        return images.unflatten(1, (1, 28, 28)), digits

    return Task(
        "vision transformer on MNIST: test accuracy",
        lambda: Transformer(nn.Conv2d(1, 96, 7, 7), 16, 96, 10, causal=False),
        part("train"), part("t10k"), iterations=2500, batch=128, samples=1024,
        result=lambda logits, digits: f"{float((logits.argmax(1) == digits).float().mean()):.2%}",
    )  # fmt: skip


def text_task() -> Task:
    """Every tenth file is held out; the test has 2048 of the sequences in these files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))

    def part(chosen: Sequence[Path]) -> tuple[Tensor, Tensor]:
        text = b"".join(file.read_text("utf-8").encode("ascii", "replace") for file in chosen)
        symbols = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        count = (len(symbols) - 1) // CONTEXT
        inputs, following = symbols[: count * CONTEXT], symbols[1 : count * CONTEXT + 1]
        return inputs.view(count, CONTEXT), following.view(count, CONTEXT)

    inputs, following = part(files[9::10])
    some = torch.linspace(0, len(inputs) - 1, 2048).long()
    return Task(
        "language model of Python's source code: held-out loss of a character, in nats",
        lambda: Transformer(nn.Embedding(SYMBOLS, 128), CONTEXT, 128, SYMBOLS, causal=True),
        part([file for i, file in enumerate(files) if i % 10 != 9]),
        (inputs[some], following[some]), iterations=2500, batch=32, samples=512,
        result=lambda logits, following: f"{loss_of(logits, following).item():.3f}",
    )  # fmt: skip


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def trained(task: Task, file: Path) -> nn.Module:
    """The network from `file`, or else trained by AdamW and written there."""
    torch.manual_seed(0)
    model = task.model()
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, task.iterations, pct_start=0.1)
    for _ in tqdm(range(task.iterations), file.stem):
        some = torch.randint(len(task.train[0]), (task.batch,))
        loss = loss_of(model(task.train[0][some]), task.train[1][some])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.eval()


@torch.no_grad()
def tested(model: nn.Module, task: Task) -> str:
    inputs, targets = task.test
    return task.result(torch.cat([model(part) for part in inputs.split(512)]), targets)


def kinds_of(model: nn.Module, example: Tensor) -> dict[str, dict[str, int]]:
    """For each kind of cut the layers, by name, with their numbers of units."""
    table = greedyprune.layers(model, example)
    return {
        "inner units": {name: layer.units for name, layer in table.items() if not layer.kind},
        "the stream": {name: layer.units for name, layer in table.items() if layer.kind},
        "both": {name: layer.units for name, layer in table.items()},
    }


def sizes_at(share: float, units: Mapping[str, int]) -> dict[str, int]:
    return {name: max(1, round(share * count)) for name, count in units.items()}


def share_for(flops: float, units: Mapping[str, int], model: nn.Module, example: Tensor) -> float:
    """The largest share of the units that fits, by bisection; 0 where no share fits."""
    single = greedyprune.select(
        model, (example,), layers=list(units), size=1, objective="imitation", progress=False
    )
    assert single.costs is not None
    cost = single.costs["flops"]
    low, high = 0.0, 1.0
    if cost.at(sizes_at(low, units)) > flops * cost.dense:
        return 0.0
    for _ in range(20):
        share = (low + high) / 2
        fits = cost.at(sizes_at(share, units)) <= flops * cost.dense
        low, high = (share, high) if fits else (low, share)
    return low


def cells(
    task: Task, model: nn.Module, layers: list[str], size: Mapping[str, int] | greedyprune.Budget,
    seeds: Sequence[int],
) -> list[str]:  # fmt: skip
    """The share of the FLOPs that is left, and the figures after `prune` and after `refit`."""
    results: list[tuple[str, str]] = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(task.train[0]), generator=rng)[: task.samples]
        data = (task.train[0][some],)
        # Trials then compare probabilities.
        loss = "cross_entropy" if getattr(size, "trials", 0) else "auto"
        selection = greedyprune.select(
            model, data, layers=layers, size=size, objective="imitation", loss=loss, progress=False
        )
        small = greedyprune.prune(model, selection)
        refitted = greedyprune.refit(model, selection, data, progress=False)
        results.append((tested(small, task), tested(refitted, task)))
        flops = selection.change("flops") or (0, 0)
    return [
        f"{flops[1] / flops[0]:.3f}",
        *(", ".join(column) for column in zip(*results, strict=True)),
    ]


def rows(
    task: Task, model: nn.Module, targets: Sequence[float], seeds: Sequence[int]
) -> Iterator[list[str]]:
    example = task.train[0][:8]
    for flops, (kind, units) in itertools.product(targets, kinds_of(model, example).items()):
        share = share_for(flops, units, model, example)
        if not share:
            yield [kind, "one unit of each layer is too much", f"more than {flops:g}", "", ""]
            continue
        sizes = sizes_at(share, units)
        yield [kind, f"{share:.2f} of each layer", *cells(task, model, [*units], sizes, seeds)]
        for trials in (0, TRIALS * len(units)) if len(units) > 1 else ():
            budget = greedyprune.Budget(flops=flops, trials=trials)
            name = "from a `Budget`" + " with trials" * bool(trials)
            yield [kind, name, *cells(task, model, [*units], budget, seeds)]


def attention_rows(
    task: Task, model: nn.Module, shares: Sequence[float], seeds: Sequence[int]
) -> Iterator[list[str]]:
    table = greedyprune.layers(model, task.train[0][:8])
    heads = {name: layer.units for name, layer in table.items() if name.endswith("qkv")}
    inside = {name: layer.units for name, layer in table.inside_heads.items()}
    for share in shares:
        for kind, units in (("whole heads", heads), ("dimensions inside heads", inside)):
            sizes = sizes_at(share, units)
            yield [kind, f"{share:g} of each", *cells(task, model, [*units], sizes, seeds)]


def feed_forward_rows(
    task: Task, model: nn.Module, shares: Sequence[float], seeds: Sequence[int]
) -> Iterator[list[str]]:
    table = greedyprune.layers(model, task.train[0][:8])
    units = {name: layer.units for name, layer in table.items() if name.endswith("fc1")}
    for share in shares:
        sizes = sizes_at(share, units)
        yield [
            "feed-forward",
            f"{share:g} of each layer",
            *cells(task, model, [*units], sizes, seeds),
        ]
        cost = greedyprune.select(
            model, (task.train[0][:8],), layers=[*units], size=1, objective="imitation",
            progress=False,
        ).costs  # fmt: skip
        assert cost is not None
        left = cost["params"].at(sizes) / cost["params"].dense
        for trials in (0, TRIALS * len(units)):
            budget = greedyprune.Budget(params=left, trials=trials)
            name = "from a `Budget`" + " with trials" * bool(trials)
            yield ["feed-forward", name, *cells(task, model, [*units], budget, seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--networks", nargs="+", default=["vision", "language"])
    parser.add_argument("--flops", type=float, nargs="+", default=[0.5, 0.25], help="shares left")
    parser.add_argument("--attention", action="store_true", help="heads, or dimensions inside")
    parser.add_argument("--feed-forward", action="store_true", help="only feed-forward units")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.25], help="of these units")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the networks")
    args = parser.parse_args()
    tasks = {"vision": images_task(args.data), "language": text_task()}
    models = [trained(tasks[name], args.out / f"where_{name}.pt") for name in args.networks]
    for name, model in zip(args.networks, models, strict=True):
        task = tasks[name]
        print(f"\n{task.title} (dense: {tested(model, task)})\n")
        print("| cut | sizes | FLOPs left | `select`, then `prune` | `select`, then `refit` |")
        print("| --- | --- | --- | --- | --- |")
        printed = rows(task, model, args.flops, args.seeds)
        if args.attention or args.feed_forward:
            of_part = attention_rows if args.attention else feed_forward_rows
            printed = of_part(task, model, args.kept, args.seeds)
        for row in printed:
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
