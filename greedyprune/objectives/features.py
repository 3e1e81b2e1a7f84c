"""A layer's activations on the data: kept in memory, or computed again in every pass.

`layer_features` runs the first pass, keeps what it can, and returns InMemory or Streamed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..data.losses import Target, Targets
from ..data.targets import joined, part_of
from ..graph.groups import Group
from ..kernels import ops
from ..kernels.products import FLOAT64_ENTRIES
from ..kernels.structs import Extent
from ..runtime.resume import Pass
from .job import Job
from .source import Block, RawTargets, Source, first_pass, largest_magnitude, no_samples


class LayerFeatures(ABC):
    """A layer's features on all samples, block by block.

    in_memory: does every rank keep its features in memory?
    moderate:  are all features far from float32's limits, on every rank?
    """

    def __init__(self, source: Source) -> None:
        self.source, self.group, self.criterion = source, source.group, source.criterion
        self.imitation, self.device = source.imitation, source.device
        self.outgoing, self.bias = source.outgoing, source.bias
        self.units, self.outputs = source.group.units, len(source.bias)
        self.ranks, self.backend = source.job.ranks, source.job.backend
        self.in_memory, self.moderate = False, True
        self.largest = 0.0  # the largest feature so far, in magnitude
        self.extent: Extent | None = None  # of all features, where they are in memory

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """All samples in blocks that are small in float64; each is valid until the next."""

    @property
    def bytes_held(self) -> int:
        """What the features in memory take."""
        return 0

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of Gram products: float32 only where the features can decide near ties."""
        return torch.float64

    def dense_outputs(self, features: Tensor) -> Tensor:
        return self.source.dense_outputs(features)

    def _check(self, largest: float) -> None:
        self.largest = max(self.largest, largest)
        self.source.check_magnitude(largest)

    def _small(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The same samples in smaller blocks."""
        # Larger on a GPU, where every block is a launch.
        entries = FLOAT64_ENTRIES if self.device.type == "cpu" else 8 * FLOAT64_ENTRIES
        size = max(64, entries // max(self.units, self.outputs))
        for block in blocks:
            samples = block.features.shape[1]
            for i in range(0, samples, size):
                features, target = block.features[:, i : i + size], block.target
                if samples > size:
                    target = target[i : i + size]
                    target = replace(target, mass=block.target.mass * target.samples / samples)
                yield Block(features, target)


class InMemory(LayerFeatures):
    """All features of this rank's samples.

    features: (N, m) float32 or float64 (on a GPU also of 16 bits)
    extent:   of the features, on the CPU
    target:   of all samples
    targets, output_shape: the data's own targets, and the model's output shape after the first
        dimension; for a custom loss
    """

    def __init__(
        self, source: Source, features: Tensor, target: Target, extent: Extent | None,
        targets: Any, output_shape: tuple[int, ...], largest: float, sample_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__(source)
        self.features, self.target, self.extent = features, target, extent
        self.targets, self.output_shape = targets, output_shape
        self.largest, self.sample_bytes = largest, sample_bytes

    @property
    def samples(self) -> int:
        return self.target.samples

    @property
    def bytes_held(self) -> int:
        return self.sample_bytes * self.samples

    @property
    def product_dtype(self) -> torch.dtype:
        rough = self.in_memory and self.backend == "cpu" and self.moderate
        return self.features.dtype if rough else torch.float64

    def blocks(self) -> Iterator[Block]:
        return self._small(self.whole())

    def whole(self) -> list[Block]:
        """All samples as one block."""
        return [Block(self.features, self.target)]

    def shuffle(self, order: Tensor) -> None:
        """Puts the samples in another order, (m,) int64; in place, a few units at a time."""
        order = order.to(self.device)
        height = max(1, FLOAT64_ENTRIES // max(1, len(order)))
        for i in range(0, self.units, height):
            rows = self.features[i : i + height]
            rows.copy_(rows[:, order])
        self.target = self.target[order]
        if self.targets is not None:
            self.targets = part_of(self.targets, order)


class Streamed(LayerFeatures):
    """Features that are computed again in every pass over the data.

    The first pass goes on where collecting stopped: first the blocks collected so far, then the
    rest of the data.

    resumed: the first pass, as a checkpoint keeps it
    width:   samples in the first batch
    """

    def __init__(
        self, source: Source, resumed: Pass, collected: list[Block], rest: Generator[Block],
        bytes_a_sample: int,
    ) -> None:  # fmt: skip
        super().__init__(source)
        self.resumed = resumed
        self._collected, self._rest = collected, rest
        self._first = True  # is the first pass still to come?
        self.sample_bytes, self.width = bytes_a_sample, collected[0].features.shape[1]
        self._total = 0  # samples in the first pass

    def release(self, limit: int) -> None:
        """Begins the first pass anew where the collected blocks take more than `limit` bytes."""
        held = sum(block.features.shape[1] for block in self._collected[:-1])  # the last: a batch
        if not self._first or self.source.job.batches.once or self.sample_bytes * held <= limit:
            return
        self._rest.close()
        self.resumed, self._collected = Pass(self.source.job.checkpoint, self.group.producer), []
        self._rest = first_pass(self.source, self.resumed)

    def close(self) -> None:
        """Takes the hook off the model where the first pass was not finished."""
        self._rest.close()

    def blocks(self) -> Iterator[Block]:
        partial = self._first and bool(self.resumed.done)  # the rest of a pass that had begun
        seen, buffer = 0, torch.empty(0)
        for block in self._small(self._pass()):
            rows = block.features
            seen += rows.shape[1]
            if self.backend != "cpu":
                self._check(largest_magnitude(rows))
                yield replace(block, features=rows.contiguous())
                continue
            if rows.stride(1) == 1:  # collected in the first pass
                extent = ops.measure_features(rows)
            else:  # a view of the model's own (b, N)
                if buffer.dim() < 2 or buffer.shape[1] < rows.shape[1]:
                    buffer = torch.empty(rows.shape, dtype=rows.dtype)
                extent = ops.collect_features(buffer, rows.T, 0)
                rows = buffer[:, : rows.shape[1]]
            self._check(float(extent.largest.max()))
            yield Block(rows, block.target, extent)
        if partial:
            return
        self._total = self._total or seen
        if seen != self._total:
            raise ValueError(
                f"data: a pass gave {seen} samples and the first {self._total}, expected the same "
                "samples in every pass"
            )

    def _pass(self) -> Iterator[Block]:
        if not self._first:
            batches = self.source.job.bar(self.source.job.batches, "activations")
            yield from (block for block, _, _ in self.source.run(batches) if block.target.samples)
            return
        self._first = False
        collected, self._collected = self._collected[::-1], []
        while collected:
            yield collected.pop()  # its memory can be reused after this
        yield from self._rest


def layer_features(job: Job, group: Group, *, imitation: bool, limit: int) -> InMemory | Streamed:
    """A layer's features: in memory where `limit` bytes hold them, else streamed.

    imitation: is the consumer's dense output the target, rather than the data's targets?

    Raises:
        ValueError: NaN or inf in weights or activations, outputs that do not fit the targets, or a
            custom loss whose features do not fit in memory
    """
    source = Source.of(job, group, imitation)
    resumed = Pass(job.checkpoint, group.producer)
    raw = RawTargets()
    blocks = first_pass(source, resumed, raw)
    try:
        features = _collected(source, resumed, blocks, raw, limit)
        _agree(features)
    except BaseException:
        blocks.close()  # takes the hook off
        raise
    return features


def _agree(features: InMemory | Streamed) -> None:
    """Asks all ranks whether they keep their features, and whether those are moderate."""
    kept = isinstance(features, InMemory)
    empty = not isinstance(features, InMemory) or not features.features.numel()
    moderate = empty or 1e-12 < features.largest < 1e12
    answers = features.ranks.gather("features", (kept, moderate))
    features.in_memory = all(kept for kept, _ in answers)
    features.moderate = all(moderate for _, moderate in answers)


def _collected(
    source: Source, resumed: Pass, blocks: Generator[Block], raw: RawTargets, limit: int
) -> InMemory | Streamed:
    """Keeps all features if `limit` allows, else leaves the rest to later passes."""
    first = next(blocks, None) or no_samples(source, raw)
    size = source.bytes_a_sample(first)
    if resumed.done:  # an earlier run kept sums, because the features do not fit
        return Streamed(source, resumed, [first], blocks, size)
    store = _Store(source, first, _capacity(source, first, size, limit))
    block: Block | None = first
    while block is not None:
        if store.filled + block.features.shape[1] > store.most:
            if source.criterion.kind == "custom":
                rest = sum(block.features.shape[1] for block in blocks)
                samples = store.filled + block.features.shape[1] + rest
                width = first.features.shape[1]
                raise source.too_large(size, samples, width, "a loss of your own")
            return Streamed(source, resumed, [*store.blocks(), block], blocks, size)
        store.append(block)
        block = next(blocks, None)
    target = store.targets.joined()
    targets = joined(raw.targets) if raw.targets else None
    return InMemory(
        source, store.features, target, store.extent, targets, raw.output_shape, store.largest,
        size,
    )  # fmt: skip


def _capacity(source: Source, first: Block, size: int, limit: int) -> tuple[int, int]:
    """How many samples memory is allocated for, and how many it may hold at most."""
    width = first.features.shape[1]
    most, expected = max(1, limit // size), width * len(source.job.batches)
    if expected - width >= most:  # a pass that can't be held as a whole is not held at all
        most = 0
    elif not expected and source.criterion.kind == "mse":
        # The length of the data is unknown, and the Gram matrix needs memory too.
        gram = -(-8 * source.group.units**2 // size)  # in samples
        most = most - gram if most >= gram else most // 2
    # Rows a multiple of 4 KiB apart would share a few sets of the cache, hence the odd 16. On a
    # GPU rows begin at multiples of 16 bytes.
    capacity = max(width, expected)
    rounded = capacity | 16 if source.job.backend == "cpu" else -(-capacity // 8) * 8
    return min(most, rounded), most


class _Store:
    """Features in one array that grows: room for `filled` samples and more."""

    def __init__(self, source: Source, first: Block, capacity: tuple[int, int]) -> None:
        self._source, (size, self.most) = source, capacity
        self._array = torch.empty(
            source.group.units, size, dtype=first.features.dtype, device=source.device
        )
        self.filled, self.largest = 0, 0.0
        self.extent: Extent | None = None
        self.targets = Targets(size)

    @property
    def features(self) -> Tensor:
        return self._array[:, : self.filled]

    def append(self, block: Block) -> None:
        start, end = self.filled, self.filled + block.features.shape[1]
        if end > self._array.shape[1]:  # the length of the data is unknown: double
            size = min(self.most, max(end, 2 * self._array.shape[1]))
            larger = self._array.new_empty(len(self._array), size)
            larger[:, :start] = self.features
            self._array = larger
        if self._source.job.backend == "cpu":
            self.extent = ops.collect_features(self._array, block.features.T, start, self.extent)
            largest = float(self.extent.largest.max())
        else:
            self._array[:, start:end] = block.features
            largest = largest_magnitude(block.features)
        self.largest = max(self.largest, largest)
        self._source.check_magnitude(largest)
        self.targets.append(block.target)
        self.filled = end

    def blocks(self) -> Iterator[Block]:
        """The stored features, in the blocks in which they were added."""
        start = 0
        for target in self.targets.blocks():
            yield Block(self._array[:, start : start + target.samples], target)
            start += target.samples
