"""The units' activations on the data: kept in memory, or computed again for every pass."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Batches
from ..data.forward import check_finite, main_output, run_model, target_of
from ..data.losses import Criterion, Target, Targets
from ..graph.groups import Group
from ..kernels import backend as _backend
from ..kernels import ops
from ..kernels.products import FLOAT64_ENTRIES
from ..kernels.structs import Extent
from ..runtime.checkpoint import NOTHING, Checkpoint, Pass
from ..runtime.distributed import Ranks


@dataclass(frozen=True)
class Block:
    """Some samples: features (N, b), unit-major, and what their outputs are compared with.

    extent: of these features, where it is known
    """

    features: Tensor
    target: Target
    extent: Extent | None = None


class LayerData:
    """What the selection of one layer looks at.

    outgoing: (N, C) float64, the consumer's weights times N; bias: (C,) float64
    features: (N, m) float32 or float64 (on a GPU also of 16 bits), or None: computed again for
        every pass
    in_memory: are the features, on every rank?
    target:   of all samples, with `features`
    targets, output_shape: the data's own targets and the model's output shape after the first
        dimension, for a loss of the user's own
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        batches: Batches,
        criterion: Criterion,
        *,
        imitation: bool,
        backend: str,
        memory_limit: int,
        progress: Any,
        checkpoint: Checkpoint = NOTHING,
    ) -> None:
        self.resumed = Pass(checkpoint, group.producer)
        consumer = model.get_submodule(group.consumer)
        assert isinstance(consumer, nn.Linear)
        weight, bias = consumer.weight.detach(), consumer.bias
        check_finite(group.producer, model.get_submodule(group.producer))
        check_finite(group.consumer, consumer)
        device = torch.device("cpu")
        if backend == "cuda":
            device = _backend.cuda_device(batches.device)
        self.group, self.criterion, self.imitation = group, criterion, imitation
        self.units, self.device = group.units, device
        self._backend = backend
        self.outgoing = (weight.to(device, torch.float64).T * self.units).contiguous()
        self.bias = torch.zeros(weight.shape[0], dtype=torch.float64, device=device)
        if bias is not None:
            self.bias = bias.detach().to(device, torch.float64)
        self.features: Tensor | None = None
        self.extent: Extent | None = None  # with `features` on the CPU
        self.target: Target | None = None
        self.targets: Tensor | None = None
        self.output_shape: tuple[int, ...] = ()
        self.ranks, self.peers = batches.ranks, batches.peers
        self._model, self._consumer, self._batches = model, consumer, batches
        self._progress, self._limit = progress, memory_limit
        self._collected: list[Block] = []
        self._checkpoint, self._bytes = checkpoint, 0  # bytes a sample
        self._total = 0  # samples in the first pass
        self._largest = 0.0  # the largest feature, in magnitude
        self._unread: Generator[Block, None, None] | None = None
        blocks = self._first_pass()
        try:
            self._collect(blocks)
        except BaseException:
            blocks.close()  # takes the hook off
            raise
        self.in_memory, self._moderate = self._on_all_ranks()

    @property
    def outputs(self) -> int:
        return len(self.bias)

    @property
    def samples(self) -> int:
        assert self.target is not None
        return self.target.samples

    def blocks(self) -> Iterator[Block]:
        """All samples in blocks whose features and outputs are small in float64.

        A block is good until the next one is asked for.
        """
        store: Tensor | None = None
        for block in self._parts():
            rows = block.features
            if self.features is not None:
                yield block
            elif self._backend != "cpu":
                self._check_largest(_largest_of(rows))
                yield replace(block, features=rows.contiguous())
            else:
                if rows.stride(1) == 1:  # held for the first pass
                    extent = ops.measure_features(rows)
                else:  # a view of the model's own (b, N)
                    if store is None or store.shape[1] < rows.shape[1]:
                        store = torch.empty(rows.shape, dtype=rows.dtype)
                    extent = ops.collect_features(store, rows.T, 0)
                    rows = store[:, : rows.shape[1]]
                self._check_largest(float(extent.largest.max()))
                yield Block(rows, block.target, extent)

    def _parts(self) -> Iterator[Block]:
        entries = (
            FLOAT64_ENTRIES if self.device.type == "cpu" else 8 * FLOAT64_ENTRIES
        )  # each block is a launch or more
        size = max(64, entries // max(self.units, self.outputs))
        seen, some = 0, self._unread is not None and bool(self.resumed.done)
        for block in self._sources():
            samples = block.features.shape[1]
            seen += samples
            for i in range(0, samples, size):
                features, target = block.features[:, i : i + size], block.target
                if samples > size:
                    target = target[i : i + size]
                    target = replace(target, mass=block.target.mass * target.samples / samples)
                yield Block(features, target)
        if some:  # the rest of a pass that had begun
            return
        self._total = self._total or seen
        if seen != self._total:
            raise ValueError(
                f"data: a pass gave {seen} samples and the first {self._total}, expected the same "
                "samples in every pass"
            )

    @property
    def together(self) -> Ranks:
        return self.ranks if self.ranks.size > 1 else self.peers

    @property
    def bytes_held(self) -> int:
        """What the features take, with the targets and what squared error is computed from."""
        return 0 if self.features is None else self._bytes * self.features.shape[1]

    def make_room(self, limit: int) -> None:
        """Lets go of what is held for the first pass where that is more, and begins it anew."""
        held = sum(block.features.shape[1] for block in self._collected[:-1])  # the last: a batch
        if self._unread is None or self._batches.once or self._bytes * held <= limit:
            return
        self.close()
        self.resumed, self._collected = Pass(self._checkpoint, self.group.producer), []
        self._unread = self._first_pass()

    @property
    def product_dtype(self) -> torch.dtype:
        """What Gram products are computed in: float64 where nothing can be scored again.

        As without the features on some rank, on a GPU, and where the ranks share the units. Also
        where float32 could over- or underflow.
        """
        rough = self.in_memory and self._backend == "cpu" and self.peers.size == 1
        if self.features is None or not rough or not self._moderate:
            return torch.float64
        return self.features.dtype

    def shuffle(self, order: Tensor) -> None:
        """Puts the samples in another order, (m,) int64; in place, some units at a time."""
        assert self.features is not None and self.target is not None
        order = order.to(self.device)
        some = max(1, FLOAT64_ENTRIES // max(1, len(order)))
        for i in range(0, self.units, some):
            rows = self.features[i : i + some]
            rows.copy_(rows[:, order])
        self.target = self.target[order]
        if self.targets is not None and len(self.targets) == len(order):
            self.targets = self.targets[order]

    def whole(self) -> list[Block]:
        """All samples as one block; only where the features are in memory."""
        assert self.features is not None and self.target is not None
        return [Block(self.features, self.target)]

    def close(self) -> None:
        """Takes the hook off the model where a first pass was not finished."""
        if self._unread is not None:
            self._unread.close()
            self._unread = None

    def dense_outputs(self, features: Tensor) -> Tensor:
        """b + mean_j phi_j, (C, b) float64, for features (N, b)."""
        return self.bias[:, None] + self.outgoing.T @ features.double() / self.units

    def _on_all_ranks(self) -> tuple[bool, bool]:
        """Are the features in memory, and of moderate size?"""
        kept = self.features is not None
        some = self.features is not None and self.features.numel() > 0
        moderate = not some or 1e-12 < self._largest < 1e12
        known = self.together.gather("features", (kept, moderate))
        return all(kept for kept, _ in known), all(moderate for _, moderate in known)

    def _sources(self) -> Iterable[Block]:
        if self.features is not None:
            return self.whole()
        if self._unread is not None:  # the first pass goes on where collecting stopped
            collected, unread = self._collected, self._unread
            self._collected, self._unread = [], None
            return _chain(collected, unread)
        return self._stream()

    def _stream(self) -> Iterator[Block]:
        with self._capture() as captured:
            for batch in self._progress(self._batches, "activations"):
                yield self._block(batch, captured)[0]

    def _block(self, batch: Batch, captured: list[Tensor]) -> tuple[Block, Any]:
        """Runs the model on one batch."""
        captured.clear()
        outputs = run_model(self._model, batch)
        if len(captured) != 1:
            raise ValueError(
                f"layer {self.group.producer!r}: its consumer {self.group.consumer!r} ran "
                f"{len(captured)} times in one forward pass, expected once"
            )
        hidden = captured[0].detach()
        if hidden.itemsize < 4 and self._backend != "cuda":
            hidden = hidden.float()
        features = hidden.reshape(-1, self.units).to(self.device).T
        return Block(features, self._target_of(features, outputs, batch.targets)), outputs

    def _check_largest(self, largest: float) -> None:
        self._largest = max(self._largest, largest)
        if not math.isfinite(largest):
            raise ValueError(
                f"layer {self.group.producer!r}: NaN or inf in its activations on the data, "
                "expected finite numbers"
            )

    def _target_of(self, features: Tensor, outputs: object, targets: Tensor | None) -> Target:
        if self.imitation:
            dense = self.dense_outputs(features)
            if not dense.isfinite().all():
                self._check_largest(_largest_of(features))
            return self.criterion.target(dense.T, tuple(dense.T.shape))
        target = target_of(self.criterion, outputs, targets)
        if (target.outputs, target.samples) != (self.outputs, features.shape[1]):
            raise ValueError(
                f"layer {self.group.producer!r}: its consumer gives {self.outputs} outputs for "
                f"{features.shape[1]} samples, but the model {target.outputs} for {target.samples}"
            )
        return target.to(self.device)

    def _collect(self, blocks: Generator[Block, None, None]) -> None:
        """Keeps all features if `memory_limit` allows, else leaves the rest to later passes."""
        first = next(blocks, None) or self._none()
        if self.resumed.done:  # its sums had begun because the features do not fit
            self._collected, self._unread = [first], blocks
            return
        width, dtype = first.features.shape[1], first.features.dtype
        self._bytes = self.units * first.features.element_size()
        self._bytes += first.target.nbytes // max(1, width)
        if self.criterion.kind == "mse":  # the targets less the bias, sums and residuals
            self._bytes += 3 * 8 * self.outputs
        room = max(1, self._limit // self._bytes)
        expected = width * len(self._batches)
        if expected - width >= room:  # nothing is held for a first pass that can't hold it all
            room = 0
        elif not expected and self.criterion.kind == "mse":
            # Nothing tells how much is to come, and the Gram matrix needs room too.
            gram = -(-8 * self.units**2 // self._bytes)  # in samples
            room = room - gram if room >= gram else room // 2
        # The odd 16: rows a multiple of 4 KiB apart would share a few sets of the cache. On a GPU
        # rows begin at multiples of 16 bytes.
        capacity = max(width, expected)
        capacity = min(room, capacity | 16 if self._backend == "cpu" else -(-capacity // 8) * 8)
        store = torch.empty(self.units, capacity, dtype=dtype, device=self.device)
        filled = 0
        targets = Targets(capacity)
        block: Block | None = first
        while block is not None:
            end = filled + block.features.shape[1]
            if end > room:
                self._collected = [*_split(store[:, :filled], targets), block]
                self._unread, self.extent = blocks, None
                if self.criterion.kind == "custom":
                    raise ValueError(
                        f"memory_limit: {self._limit} bytes do not hold the features that a loss "
                        f"of your own needs: more than {end * self._bytes} bytes"
                    )
                return
            if end > store.shape[1]:  # unknown length: double, while that fits
                larger = torch.empty(
                    self.units, min(room, max(end, 2 * store.shape[1])), dtype=dtype,
                    device=self.device,
                )  # fmt: skip
                larger[:, :filled] = store[:, :filled]
                store = larger
            self._store(store, filled, block.features)
            targets.append(block.target)
            filled = end
            block = next(blocks, None)
        self.features = store[:, :filled]
        self.target = targets.joined()

    def _store(self, store: Tensor, at: int, features: Tensor) -> None:
        if self._backend == "cpu":
            self.extent = ops.collect_features(store, features.T, at, self.extent)
            self._check_largest(float(self.extent.largest.max()))
        else:
            store[:, at : at + features.shape[1]] = features
            self._check_largest(_largest_of(features))

    def _first_pass(self) -> Generator[Block, None, None]:
        raw: list[Tensor] = []
        with self._capture() as captured:
            for batch in self.resumed.new(self._progress(self._batches, "activations")):
                block, outputs = self._block(batch, captured)
                if self.criterion.kind == "custom":
                    self.output_shape = tuple(main_output(outputs).shape[1:])
                    assert batch.targets is not None
                    raw.append(batch.targets.to(self.device))
                yield block
        if raw:
            self.targets = torch.cat(raw)

    def _none(self) -> Block:
        """No samples; a batch that is not among those to come shows the shapes."""
        batch = self._batches.first()
        with self._capture() as captured:
            block, outputs = self._block(batch, captured)
        if self.criterion.kind == "custom":
            self.output_shape = tuple(main_output(outputs).shape[1:])
            assert batch.targets is not None
            self.targets = batch.targets[:0].to(self.device)
        return Block(block.features[:, :0], block.target.none())

    @contextmanager
    def _capture(self) -> Iterator[list[Tensor]]:
        """Collects the consumer's inputs while the model runs, without a trace left on it."""
        captured: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.append(args[0] if args else kwargs["input"])

        handle = self._consumer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield captured
        finally:
            handle.remove()


def _split(store: Tensor, targets: Targets) -> list[Block]:
    blocks, start = [], 0
    for target in targets.blocks():
        blocks.append(Block(store[:, start : start + target.samples], target))
        start += target.samples
    return blocks


def _chain(first: list[Block], rest: Iterator[Block]) -> Iterator[Block]:
    """Lets go of each of the first, whose memory is needed no longer then."""
    first.reverse()
    while first:
        yield first.pop()
    yield from rest


def _largest_of(features: Tensor) -> float:
    """In their order in memory, as torch is slow else."""
    features = features if features.is_contiguous() else features.T
    return float(torch.stack(torch.aminmax(features)).abs().max()) if features.numel() else 0.0
