"""Work that a checkpoint keeps while it is unfinished: sums over the data, and greedy steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from .checkpoint import Batch, Checkpoint, MarkDigest, checked_read, file_name
from .files import read_tensors, write_tensors

FORMAT = "greedyprune-checkpoint-2"
SECONDS = 20.0  # the least time between two writes of unfinished work, or
SHARE = 20  # this many times as long as the last write took
B = TypeVar("B", bound=Batch)


class Holder(Protocol):
    """Sums that grow batch by batch."""

    def state(self) -> dict[str, Tensor]:
        """The sums by name."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Sets the sums to what `state` returned."""


class Tensors(SimpleNamespace):
    """Named tensors that are added to in place."""

    def state(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(state[name])


class Pass:
    """One pass over the data whose sums are kept as they grow.

    A resumed pass skips the batches that its sums contain; those batches must come again in the
    same order.
    """

    def __init__(self, checkpoint: Checkpoint[Any], name: str) -> None:
        self.done, self._file = 0, None
        self._seen = MarkDigest()
        self._holders: Sequence[Holder] = ()
        self._clock = _Clock()
        if checkpoint.folder is None:
            return
        file = f"pass-{file_name(name)}-{checkpoint.ranks.rank}.safetensors"
        self._file = checkpoint.folder / file
        if self._file.is_file():
            self._state, header = checked_read(read_tensors, self._file, FORMAT, "sums")
            self.done, self._mark = int(header["done"]), header["mark"]

    def hold(self, *holders: Holder) -> None:
        """Keeps these sums from now on, after setting them to what an earlier run kept."""
        self._holders = holders
        if self.done:
            states: list[dict[str, Tensor]] = [{} for _ in holders]
            for key, tensor in self._state.items():
                i, _, name = key.partition(".")
                states[int(i)][name] = tensor
            for holder, state in zip(holders, states, strict=True):
                holder.restore(state)
            self._state = {}

    def contains(self, mark: str) -> bool:
        """Do the sums contain the next batch, which has this mark?

        ValueError where the batches so far are not those in the sums.
        """
        if self._file is None:
            return False
        if self._seen.count == self.done:
            self._check()
        self._seen.add(mark)
        return self._seen.count <= self.done

    def added(self) -> None:
        """Says that the sums contain the batch now; writes them from time to time."""
        if self._file is not None and self._holders and self._clock.due():
            self._save()

    def end(self) -> None:
        """Says that no batch is left."""
        if self._seen.count <= self.done:
            self._check()
        self.added()

    def new(self, batches: Iterable[B]) -> Iterator[B]:
        """The batches that the sums do not contain yet."""
        for batch in batches:
            if not self.contains("" if self._file is None else batch.mark):
                yield batch
                self.added()
        self.end()

    def _check(self) -> None:
        if self.done and (self._seen.count < self.done or self._seen.digest != self._mark):
            raise ValueError(
                f"checkpoint: the first {self.done} batches are not those of {str(self._file)!r}, "
                "expected the same data in the same order: give a shuffled loader a generator with "
                "a seed, or take another folder"
            )

    def _save(self) -> None:
        assert self._file is not None
        state = {
            f"{i}.{name}": tensor
            for i, holder in enumerate(self._holders)
            for name, tensor in holder.state().items()
        }
        header = {"format": FORMAT, "done": str(self._seen.count), "mark": self._seen.digest}
        with self._clock:
            write_tensors(self._file, state, header)


class Steps:
    """Results of one layer's greedy steps, each computed once even over several runs.

    They lie in numbered segments. A resumed run reads them in order, while its steps are the same.
    """

    def __init__(self, checkpoint: Checkpoint[Any], name: str) -> None:
        self._checkpoint, self._name = checkpoint, file_name(name)
        self._unread: list[tuple[str, Tensor]] = []  # of the segment that is being read
        self._repeated: list[tuple[str, Tensor]] = []  # of that segment, and asked for again
        self._unwritten: list[tuple[str, Tensor]] = []
        self._segment, self._segments, self._clock = 0, 0, _Clock()
        if checkpoint.folder is None:
            return
        while self._file(self._segments + 1).is_file():
            self._segments += 1
        self._segments = checkpoint.ranks.from_rank(0, "steps", self._segments)

    def once(self, label: str, compute: Callable[[], Tensor]) -> Tensor:
        """compute(), or its result in an earlier run whose steps so far had the same labels."""
        if self._checkpoint.folder is None:
            return compute()
        if not self._unread and self._segment < self._segments:
            self._read()
        if self._unread:
            known, value = self._unread.pop(0)
            if known == label:
                self._repeated.append((known, value))
                return value
            self._forget()  # steps can differ on another kind of processor
        value = compute()
        self._unwritten.append((label, value.cpu().clone()))
        self._checkpoint.keep_data()
        if self._checkpoint.ranks.rank == 0 and self._clock.due():
            self._segment = self._segments = self._segment + 1
            labels = json.dumps([label for label, _ in self._unwritten])
            tensors = {str(i): value for i, (_, value) in enumerate(self._unwritten)}
            with self._clock:
                write_tensors(
                    self._file(self._segment), tensors, {"format": FORMAT, "labels": labels}
                )
            self._unwritten = []
        return value

    def _read(self) -> None:
        self._segment += 1
        results: list[tuple[str, Tensor]] = []
        if self._checkpoint.ranks.rank == 0:
            file = self._file(self._segment)
            tensors, header = checked_read(read_tensors, file, FORMAT, "steps")
            labels = json.loads(header["labels"])
            results = [(label, tensors[str(i)]) for i, label in enumerate(labels)]
        self._unread = self._checkpoint.ranks.from_rank(0, f"steps {self._segment}", results)
        self._repeated = []

    def _forget(self) -> None:
        """Drops this and later segments' results, but for those that were asked for again."""
        self._unread, self._unwritten, self._repeated = [], self._repeated, []
        for segment in range(self._segments, self._segment - 1, -1):
            if self._checkpoint.ranks.rank == 0:
                self._file(segment).unlink(missing_ok=True)
        self._segment = self._segments = self._segment - 1

    def _file(self, segment: int) -> Path:
        assert self._checkpoint.folder is not None
        return self._checkpoint.folder / f"steps-{self._name}-{segment}.safetensors"


class _Clock:
    """Says when to write again; the time inside `with` is that of a write."""

    def __init__(self) -> None:
        self._last, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(SECONDS, SHARE * self._cost)

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._last = time.monotonic()
        self._cost = self._last - self._begun
