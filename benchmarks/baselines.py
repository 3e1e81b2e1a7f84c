"""What a user would write in plain torch, each in the fastest form known.

For the candidates of one greedy step there are four baselines: candidate by candidate, vectorised,
compiled, and by matrix products (squared error only). For whole greedy loops there are three:
vectorised, by matrix-vector products, and on the Gram matrix. The last functions check that the
baselines and greedyprune agree.
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
LARGEST = 2**28  # bytes of the largest temporary tensor; the fastest chunks are far smaller
LAYOUTS = ("outputs last", "samples last")


@dataclass(frozen=True)
class Candidates:
    """The candidates of one greedy step: with unit j, the outputs are base + phi_j.

    features: (N, m) float32
    outgoing: (N, C) float32, the consumer's weights times N / k in step k
    base: (m, C) float32, the outputs without a candidate
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
    """A hidden layer and its data. The fields are those of Candidates, except for two.

    outgoing: (N, C) float64, the consumer's weights times N, as in greedyprune
    bias: (C,)
    """

    kind: str
    features: Tensor
    outgoing: Tensor
    bias: Tensor
    targets: Tensor

    def nothing(self) -> Tensor:
        """The sum of no units: zeros (m, C)."""
        return torch.zeros(self.features.shape[1], len(self.bias))

    def candidates(self, z: Tensor, k: int) -> Candidates:
        """The candidates of step k; z: (m, C), the sum over the units picked so far."""
        base = self.bias + z / k
        outgoing = (self.outgoing / k).float()
        return Candidates(self.kind, self.features, outgoing, base, self.targets)


@dataclass(frozen=True)
class Form:
    """How to vectorise: the order of the dimensions, and how many units to compute at a time.

    "outputs last" is (units, m, C), the order of a model's outputs. "samples last" is (units, C,
    m), which is faster for few outputs.
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
    # A list of small tensors would make the heap grow: each would be allocated where the last
    # candidate's outputs were, and the next candidate's outputs would no longer fit there.
    found = torch.empty(len(p.features))
    for j, (h, w) in enumerate(zip(p.features, p.outgoing, strict=True)):
        found[j] = loss(torch.addcmul(p.base, h[:, None], w), p.targets)
    return found


Part = Callable[[Tensor, Tensor], Tensor]


def part_of(p: Candidates, layout: str) -> Part:
    """A function from the features (n, m) and outgoing weights (n, C) of n units to losses (n,)."""
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
    """The fastest layout and chunk size on this machine, from a trial of each on a few units."""
    timed = []
    one = 4 * p.base.numel()  # bytes of one candidate's outputs
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
    """torch.compile of the vectorised form, and the fastest of these chunk sizes and both layouts.

    The chunk sizes must divide the number of units.
    """
    timed = []
    for form in [Form(layout, chunk) for layout in LAYOUTS for chunk in chunks]:
        torch._dynamo.reset()
        part = torch.compile(part_of(p, form.layout), dynamic=False)
        in_chunks(p, part, form.chunk)  # the first call compiles
        start = time.perf_counter()
        in_chunks(p, part, form.chunk)
        timed.append((time.perf_counter() - start, form, part))
    _, form, part = min(timed, key=lambda each: each[0])
    return lambda: in_chunks(p, part, form.chunk), form


def by_products(p: Candidates) -> Tensor:
    """Squared error, in two passes over h: |r + phi_j|^2 = |r|^2 + 2 <r, phi_j> + |phi_j|^2."""
    assert p.kind == "mse"
    r = p.base - p.targets
    along = ((p.features @ r) * p.outgoing).sum(1)
    norms = torch.linalg.vector_norm(p.features, dim=1).square() * p.outgoing.square().sum(1)
    return (r.square().sum() + 2 * along + norms) / r.numel()


def greedy_vectorised(layer: Layer, steps: int, form: Form) -> list[int]:
    """eq. (1), literally: computes every candidate's outputs in every step."""
    z, order = layer.nothing(), []
    for k in range(1, steps + 1):
        i = int(vectorised(layer.candidates(z, k), form).argmin())
        order.append(i)
        z += layer.features[i][:, None] * layer.outgoing[i].float()
    return order


def greedy_matrix_vector(layer: Layer, steps: int) -> list[int]:
    """eq. (2); each step computes one column of the Gram matrix, H @ h_i."""
    norm, beta = sums(layer)
    c, order = torch.zeros_like(norm), []
    for k in range(1, steps + 1):
        i = int((norm / 2 + c - k * beta).argmin())
        order.append(i)
        c += (layer.features @ layer.features[i]) * (layer.outgoing @ layer.outgoing[i])
    return order


def sums(layer: Layer) -> tuple[Tensor, Tensor]:
    """|phi_j|^2 and <phi_j, t> of eq. (2), both (N,) float64."""
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
    """eq. (2) on the whole Gram matrix, in O(N) per step."""
    base, c, order = norm / 2, torch.zeros_like(norm), []
    for k in range(1, steps + 1):
        i = int((base + c - k * beta).argmin())
        order.append(i)
        c += gram[i]
        if not replacement:
            base[i] = torch.inf
    return order


def same_losses(found: Tensor, ours: Tensor, rtol: float = 2e-5) -> None:
    """Both (N,). The tolerance is for a baseline that sums in float32, as the kernels do not."""
    torch.testing.assert_close(found.double(), ours, rtol=rtol, atol=0)


def same_picks(layer: Layer, found: list[int], ours: Tensor, rtol: float = 1e-4) -> int:
    """Checks that both paths pick the same units, up to the first near tie.

    At a near tie float32 cannot decide: the float64 losses of the two picks differ by less than
    `rtol`. There our pick has to be the better one. Returns the number of steps before it.
    """
    # Features computed with another batch size are rounded differently: hence the 1e-6 below.
    path = ours[: len(found)].tolist()
    same = next((k for k, (a, b) in enumerate(zip(path, found, strict=True)) if a != b), len(found))
    if same < len(found):
        mine, theirs = exact_losses(layer, path[:same], [path[same], found[same]])
        assert mine <= theirs * (1 + 1e-6), (same, mine, theirs)
        assert theirs <= mine * (1 + rtol), (same, mine, theirs)
    return same


def exact_losses(layer: Layer, picked: list[int], units: list[int]) -> list[float]:
    """The reference's float64 losses after picking each of `units` next."""
    k = len(picked) + 1
    z = layer.outgoing[picked].T @ layer.features[picked].double()
    shape = (layer.features.shape[1], len(layer.bias))
    target = Criterion(layer.kind).target(layer.targets, shape)
    losses = reference.candidate_loss(
        layer.features, layer.outgoing, layer.bias.double()[:, None] + z / k, target,
        shrink=1 / k, units=torch.tensor(units),
    )  # fmt: skip
    return (losses / target.mass).tolist()
