"""What a user would write in plain torch, each in the best form that we know of.

Candidates, one greedy step: candidate by candidate, vectorised, compiled, by matrix products
(squared error only). Whole greedy loops: vectorised, matrix-vector, on the Gram matrix. Then the
checks that they and greedyprune say the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from greedyprune.data.losses import Criterion
from greedyprune.kernels import reference

CHUNKS = (1, 4, 16, 64, 256, 1024)
LARGEST = 2**28  # bytes of one temporary: the best chunks are far smaller
LAYOUTS = ("outputs last", "samples last")


@dataclass(frozen=True)
class Candidates:
    """One greedy step: candidate j has the outputs base + phi_j.

    features: (N, m); outgoing: (N, C), times N and the step's 1 / k; base: (m, C); all float32
    targets: (m,) int64 for cross_entropy, else (m, C)
    """

    kind: str
    features: Tensor
    outgoing: Tensor
    base: Tensor
    targets: Tensor

    def first(self, units: int) -> Candidates:
        return replace(self, features=self.features[:units], outgoing=self.outgoing[:units])


@dataclass(frozen=True)
class Layer:
    """A hidden layer on its data: as Candidates, with the bias (C,).

    outgoing: (N, C) float64, times N, as greedyprune has it
    """

    kind: str
    features: Tensor
    outgoing: Tensor
    bias: Tensor
    targets: Tensor

    def nothing(self) -> Tensor:
        """The outputs of no unit at all, (m, C)."""
        return torch.zeros(self.features.shape[1], len(self.bias))

    def candidates(self, z: Tensor, k: int) -> Candidates:
        """Those of step k, where the units picked so far add up to z (m, C)."""
        base = self.bias + z / k
        outgoing = (self.outgoing / k).float()
        return Candidates(self.kind, self.features, outgoing, base, self.targets)


@dataclass(frozen=True)
class Form:
    """How to vectorise: where the outputs' dimension lies, and how many units at a time.

    "outputs last" is (units, m, C), as a model returns them; "samples last" is (units, C, m), which
    is faster where there are few classes.
    """

    layout: str
    chunk: int


def by_candidate(p: Candidates) -> Tensor:
    """One evaluation of the loss for each candidate (Ye et al. 2020)."""
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mse": functional.mse_loss,
        "bce_with_logits": functional.binary_cross_entropy_with_logits,
        "cross_entropy": functional.cross_entropy,
    }
    loss = losses[p.kind]
    # Not a list of small tensors: each would be put into the room that the last outputs left, the
    # next outputs would no longer fit there, and the heap would grow by as much for each candidate.
    found = torch.empty(len(p.features))
    for j, (h, w) in enumerate(zip(p.features, p.outgoing, strict=True)):
        found[j] = loss(torch.addcmul(p.base, h[:, None], w), p.targets)
    return found


Part = Callable[[Tensor, Tensor], Tensor]


def part_of(p: Candidates, layout: str) -> Part:
    """The losses (n,) of n candidates, from their features (n, m) and outgoing weights (n, C)."""
    base = p.base - p.targets if p.kind == "mse" else p.base
    targets = p.targets
    if layout == "samples last":
        base = base.T.contiguous()
        targets = targets if targets.dim() == 1 else targets.T.contiguous()

    def losses(outputs: Tensor) -> Tensor:
        if p.kind == "mse":
            return outputs.square_().mean((1, 2))
        if p.kind == "bce_with_logits":
            each = functional.binary_cross_entropy_with_logits(
                outputs, targets.expand_as(outputs), reduction="none"
            )
            return each.mean((1, 2))
        labels = targets.repeat(len(outputs))
        if layout == "samples last":
            labels = targets.expand(len(outputs), -1)
        else:
            outputs = outputs.flatten(0, 1)
        each = functional.cross_entropy(outputs, labels, reduction="none")
        return each.view(-1, len(targets)).mean(1)

    def part(h: Tensor, w: Tensor) -> Tensor:
        if layout == "samples last":
            return losses(torch.addcmul(base, h[:, None, :], w[:, :, None]))
        return losses(torch.addcmul(base, h[:, :, None], w[:, None, :]))

    return part


def in_chunks(p: Candidates, part: Part, chunk: int) -> Tensor:
    pieces = zip(p.features.split(chunk), p.outgoing.split(chunk), strict=True)
    return torch.cat([part(h, w) for h, w in pieces])


def vectorised(p: Candidates, form: Form) -> Tensor:
    return in_chunks(p, part_of(p, form.layout), form.chunk)


def best_form(p: Candidates, layouts: tuple[str, ...] = LAYOUTS) -> Form:
    """The fastest layout and chunk size here, by trying them all on some of the units."""
    timed = []
    one = 4 * p.base.numel()  # bytes of a candidate's outputs
    some = max(1, LARGEST // one)
    for layout in layouts:
        for chunk in CHUNKS:
            if chunk > 1 and (chunk * one > LARGEST or chunk > len(p.features)):
                break
            form = Form(layout, chunk)
            trial = p.first(max(some, chunk))
            vectorised(trial.first(chunk), form)
            start = time.perf_counter()
            vectorised(trial, form)
            timed.append(((time.perf_counter() - start) / len(trial.features), form))
    return min(timed, key=lambda each: each[0])[1]


def compiled(p: Candidates, chunks: list[int]) -> tuple[Callable[[], Tensor], Form]:
    """torch.compile of the vectorised form: the fastest of these chunk sizes and both layouts.

    Chunk sizes must divide the number of units.
    """
    timed = []
    for form in [Form(layout, chunk) for layout in LAYOUTS for chunk in chunks]:
        torch._dynamo.reset()
        part = torch.compile(part_of(p, form.layout), dynamic=False)
        in_chunks(p, part, form.chunk)  # compiles
        start = time.perf_counter()
        in_chunks(p, part, form.chunk)
        timed.append((time.perf_counter() - start, form, part))
    _, form, part = min(timed, key=lambda each: each[0])
    return lambda: in_chunks(p, part, form.chunk), form


def by_products(p: Candidates) -> Tensor:
    """Squared error: |r + phi_j|^2 = |r|^2 + 2 <r, phi_j> + |phi_j|^2, two passes over h."""
    assert p.kind == "mse"
    r = p.base - p.targets
    along = ((p.features @ r) * p.outgoing).sum(1)
    norms = torch.linalg.vector_norm(p.features, dim=1).square() * p.outgoing.square().sum(1)
    return (r.square().sum() + 2 * along + norms) / r.numel()


def greedy_vectorised(layer: Layer, steps: int, form: Form) -> list[int]:
    """README eq. 1 as it stands: every candidate's outputs in every step."""
    z, order = layer.nothing(), []
    for k in range(1, steps + 1):
        i = int(vectorised(layer.candidates(z, k), form).argmin())
        order.append(i)
        z += layer.features[i][:, None] * layer.outgoing[i].float()
    return order


def greedy_matrix_vector(layer: Layer, steps: int) -> list[int]:
    """README eq. 2 with one column of the Gram matrix a step, H @ h_i."""
    norm, beta = sums(layer)
    c, order = torch.zeros_like(norm), []
    for k in range(1, steps + 1):
        i = int((norm / 2 + c - k * beta).argmin())
        order.append(i)
        c += (layer.features @ layer.features[i]) * (layer.outgoing @ layer.outgoing[i])
    return order


def sums(layer: Layer) -> tuple[Tensor, Tensor]:
    """|phi_j|^2 and <phi_j, t> of README eq. 2, both (N,) float64."""
    norm = torch.linalg.vector_norm(layer.features, dim=1).square()
    norm = norm * layer.outgoing.square().sum(1)
    beta = ((layer.features @ (layer.targets - layer.bias)) * layer.outgoing).sum(1)
    return norm, beta


def gram_matrix(layer: Layer) -> Tensor:
    """G_ij = <phi_i, phi_j>, (N, N) float32."""
    outgoing = layer.outgoing.float()
    return (layer.features @ layer.features.T).mul_(outgoing @ outgoing.T)


def greedy_on_gram(
    gram: Tensor, norm: Tensor, beta: Tensor, steps: int, replacement: bool = True
) -> list[int]:
    """README eq. 2 on the whole Gram matrix, (N,) work a step."""
    base, c, order = norm / 2, torch.zeros_like(norm), []
    for k in range(1, steps + 1):
        i = int((base + c - k * beta).argmin())
        order.append(i)
        c += gram[i]
        if not replacement:
            base[i] = torch.inf
    return order


def same_losses(found: Tensor, ours: Tensor, rtol: float = 2e-5) -> None:
    """Both (N,): a baseline in float32 sums less carefully than the kernels."""
    torch.testing.assert_close(found.double(), ours, rtol=rtol, atol=0)


def same_picks(layer: Layer, found: list[int], ours: Tensor, rtol: float = 1e-4) -> int:
    """Both paths pick the same units, up to the first step that float32 can't decide.

    There the exact float64 losses of the two picks differ by less than `rtol`, and ours is the
    lower one. Returns the number of steps before it.
    """
    # The features of another batch size are rounded otherwise: that is all that `mine` may lose.
    path = ours[: len(found)].tolist()
    same = next((k for k, (a, b) in enumerate(zip(path, found, strict=True)) if a != b), len(found))
    if same < len(found):
        mine, theirs = exact_losses(layer, path[:same], [path[same], found[same]])
        assert mine <= theirs * (1 + 1e-6), (same, mine, theirs)
        assert theirs <= mine * (1 + rtol), (same, mine, theirs)
    return same


def exact_losses(layer: Layer, picked: list[int], units: list[int]) -> list[float]:
    """The float64 losses after picking one of `units` next, by the reference."""
    k = len(picked) + 1
    z = layer.outgoing[picked].T @ layer.features[picked].double()
    shape = (layer.features.shape[1], len(layer.bias))
    target = Criterion(layer.kind).target(layer.targets, shape)
    losses = reference.candidate_loss(
        layer.features, layer.outgoing, layer.bias.double()[:, None] + z / k, target,
        shrink=1 / k, units=torch.tensor(units),
    )  # fmt: skip
    return (losses / target.mass).tolist()
