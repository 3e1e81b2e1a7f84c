"""Where a layer's features come from: the model, run on the data, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..data.batches import Batch
from ..data.compared import compared
from ..data.forward import check_finite, hooked, main_output, run_model
from ..data.losses import Criterion, Target
from ..data.padding import counted
from ..data.targets import part_of
from ..graph.groups import Group
from ..graph.names import owner_of
from ..kernels import backend as backends
from ..kernels.structs import Extent
from ..runtime.resume import Pass
from .job import Job
from .memory import least_squares_bytes, refitted_units


@dataclass(frozen=True)
class Block:
    """Some samples: features (N, b), unit-major, and the targets of their outputs.

    extent: norms and largest magnitudes of these features, where they are known
    """

    features: Tensor
    target: Target
    extent: Extent | None = None


@dataclass(frozen=True)
class Source:
    """Where a layer's features come from: the model, run on the data.

    criterion: what the outputs are compared by; imitation: with the consumer's dense outputs?
    outgoing:  (N, C) float64, the consumer's weights times N; bias: (C,) float64
    device:    where the features go
    """

    job: Job
    group: Group
    criterion: Criterion
    imitation: bool
    outgoing: Tensor
    bias: Tensor
    device: torch.device

    @staticmethod
    def of(job: Job, group: Group, imitation: bool) -> Source:
        """ValueError where weights are not finite."""
        consumer = job.model.get_submodule(group.consumer)
        assert isinstance(consumer, nn.Linear)
        check_finite(group.producer, owner_of(job.model, group.producer))
        check_finite(group.consumer, consumer)
        device = torch.device("cpu")
        if job.backend == "cuda":
            device = backends.cuda_device(job.batches.device)
        weight = consumer.weight.detach().to(device, torch.float64)
        bias = torch.zeros(len(weight), dtype=torch.float64, device=device)
        if consumer.bias is not None:
            bias = consumer.bias.detach().to(device, torch.float64)
        criterion = Criterion("mse") if imitation else job.criterion
        outgoing = (weight.T * group.units).contiguous()
        return Source(job, group, criterion, imitation, outgoing, bias, device)

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[Block, Any, object]]:
        """For each batch its block, its targets as they came, and the model's outputs."""
        inputs: list[Tensor] = []

        def keep(_: str, value: Tensor) -> None:
            inputs.append(value)

        with hooked(self.job.model, [self.group.consumer], before=keep):
            for batch in batches:
                inputs.clear()
                outputs = run_model(self.job.model, batch)
                if len(inputs) != 1:
                    raise ValueError(
                        f"layer {self.group.producer!r}: its consumer {self.group.consumer!r} ran "
                        f"{len(inputs)} times in one forward pass, expected once"
                    )
                yield self._block(inputs[0].detach(), outputs, batch), batch.targets, outputs

    def _block(self, hidden: Tensor, outputs: object, batch: Batch) -> Block:
        if hidden.itemsize < 4 and self.job.backend != "cuda":
            hidden = hidden.float()
        features = hidden.reshape(-1, self.group.units).to(self.device).T
        if self.imitation:
            rows = counted(batch.padding.of(self.group.consumer), hidden.shape[:-1])
            features = _of_rows(features, None if rows is None else rows.flatten())
            return Block(features, self._dense_target(features))
        found = compared(self.criterion, outputs, batch)
        target, samples = found.target, features.shape[1]
        if found.rows is not None:
            features = _of_rows(features, found.rows)
        given = target.samples if found.rows is None else len(found.rows)
        if (target.outputs, given) != (len(self.bias), samples):
            raise ValueError(
                f"layer {self.group.producer!r}: its consumer gives {len(self.bias)} outputs for "
                f"{samples} samples, but the model {target.outputs} for {given}"
            )
        return Block(features, target.to(self.device))

    def _dense_target(self, features: Tensor) -> Target:
        dense = self.dense_outputs(features)
        if not dense.isfinite().all():
            self.check_magnitude(largest_magnitude(features))
        return self.criterion.target(dense.T, tuple(dense.T.shape))

    def dense_outputs(self, features: Tensor) -> Tensor:
        """b + mean_j phi_j, (C, b) float64, for features (N, b)."""
        return self.bias[:, None] + self.outgoing.T @ features.double() / self.group.units

    def check_magnitude(self, largest: float) -> None:
        """ValueError where the largest feature is NaN or infinite."""
        if not math.isfinite(largest):
            raise ValueError(
                f"layer {self.group.producer!r}: NaN or inf in its activations on the data, "
                "expected finite numbers"
            )

    def too_large(self, sample_bytes: int, samples: int, width: int, what: str) -> ValueError:
        """The error for features that do not fit in memory, where something needs all of them.

        sample_bytes: what a sample takes; samples: how many this rank has
        width: samples in the first batch; all batches but the last are taken to have as many
        """
        needed = sample_bytes * max(samples, width * (len(self.job.batches) - 1) + 1)
        if not len(self.job.batches) and self.criterion.kind == "mse":
            needed += 8 * self.group.units**2 + sample_bytes  # left free for the Gram matrix
        reserved = least_squares_bytes(refitted_units(self.job, self.group, self.imitation))
        return ValueError(
            f"memory_limit: found {self.job.memory_limit + reserved} bytes, but {what} needs all "
            f"features of layer {self.group.producer!r} and their targets in memory; expected at "
            f"least {needed + reserved} bytes, or fewer samples"
        )

    def bytes_a_sample(self, block: Block) -> int:
        """What one sample's features take, with its targets and what squared error needs."""
        size = self.group.units * block.features.element_size()
        size += block.target.nbytes // max(1, block.features.shape[1])
        if self.criterion.kind == "mse":  # the targets less the bias, sums and residuals
            size += 3 * 8 * len(self.bias)
        return size


@dataclass
class RawTargets:
    """For a custom loss: the targets as they came, and the model's output shape."""

    targets: list[Any] = field(default_factory=list)
    output_shape: tuple[int, ...] = ()

    def add(self, targets: Any, outputs: object, device: torch.device) -> None:
        self.output_shape = tuple(main_output(outputs).shape[1:])
        self.targets.append(
            tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, targets)
        )


def first_pass(source: Source, resumed: Pass, raw: RawTargets | None = None) -> Generator[Block]:
    batches = resumed.new(source.job.bar(source.job.batches, "activations"))
    for block, targets, outputs in source.run(batches):
        if raw is not None and source.criterion.kind == "custom":
            raw.add(targets, outputs, source.device)
        if block.target.samples:  # every position of a batch may be hidden
            yield block


def _of_rows(features: Tensor, rows: Tensor | None) -> Tensor:
    """The features (N, b) of some rows, (b,) bool; None: all."""
    return features if rows is None else features.T[rows.to(features.device)].T


def no_samples(source: Source, raw: RawTargets) -> Block:
    """A block of no samples, of the shapes that the first batch of another rank has."""
    [(block, targets, outputs)] = source.run([source.job.batches.first()])
    if source.criterion.kind == "custom":
        raw.add(part_of(targets, slice(0, 0)), outputs, source.device)
    return Block(block.features[:, :0], block.target.none())


def largest_magnitude(features: Tensor) -> float:
    """max |features|; 0 for none. The order in memory is followed, because torch is slow else."""
    features = features if features.is_contiguous() else features.T
    return float(torch.stack(torch.aminmax(features)).abs().max()) if features.numel() else 0.0
