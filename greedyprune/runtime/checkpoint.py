"""What a call of `select` has found so far, in a folder, for the same call to go on from.

call-0.json            what the call is of: model, arguments, first batch; one for each rank
data-0.json            what all batches of a pass are known by
layer-NAME.safetensors a finished layer
pass-NAME-0.safetensors  the sums of a pass over the data, and how many batches are in them
steps-NAME-1.safetensors what steps found that take a pass each, in the order of the steps

Every file is complete or not there (files.py). What is left of a killed run is at most so old that
writing costs a twentieth of the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..data.batches import Batch, Batches
from .distributed import ALONE, Ranks
from .files import read_json, read_tensors, write_json, write_tensors
from .fingerprint import difference

if TYPE_CHECKING:
    from ..surgery.selection import LayerSelection

OURS = ("call-", "data-", "layer-", "pass-", "steps-", "memory.", "sizes.", ".call-", ".lock")
FORMAT = "greedyprune-checkpoint-1"
SECONDS = 20.0  # between two writes of what is not finished, or
SHARE = 20  # so many times as long as the last one took
SAMPLED = 4096  # entries of a tensor that a batch is known by


class Holder(Protocol):
    """Sums that grow batch by batch."""

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


class Tensors(SimpleNamespace):
    """Named ones that are added to in place."""

    def state(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(state[name])


class Checkpoint:
    """path: the folder; None: nothing is kept."""

    def __init__(
        self, path: str | PathLike[str] | None = None, about: Mapping[str, str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        if path is not None and not isinstance(path, (str, PathLike)):
            raise TypeError(
                f"checkpoint: found {type(path).__name__}, expected the path of a folder"
            )
        self.folder, self.ranks = None if path is None else Path(path), ranks
        self._layers: dict[str, LayerSelection] = {}
        self._data: list[Any] | None = None  # the number of batches and a digest of their marks
        self._batches: Batches | None = None
        self._lock: int | None = None
        if self.folder is None:
            return
        try:
            self._open({**(about or {})})
        except BaseException:
            self.close()
            raise

    def _open(self, about: dict[str, str]) -> None:
        from ..surgery.selection import Selection  # needs features, which need this module

        assert self.folder is not None
        ranks, found = self.ranks, dict[str, "LayerSelection"]()
        if ranks.rank == 0:
            self._enter(about)
            for part in self.folder.glob(".*.part"):  # a killed run's
                part.unlink(missing_ok=True)
            for file in sorted(self.folder.glob("layer-*.safetensors")):
                found |= _read(Selection.load, file).layers
        self._layers = ranks.from_rank(0, "finished layers", found)
        if ranks.rank > 0:
            self._enter(about)
        if self._data_file.is_file():
            self._data = _read(read_json, self._data_file)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Others may use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _data_file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"data-{self.ranks.rank}.json"

    @contextmanager
    def watching(self, batches: Batches, bar: Callable[..., Any]) -> Iterator[None]:
        """ValueError where the data are not those that an earlier run went through.

        Which takes reading them once; an iterator is read where nothing else needs it.
        """
        if self.folder is None:
            yield
            return
        known = self._data is not None
        batches.repeat()
        if known and not batches.once:
            self._check(bar(batches, "data as before"))
        batches.watch, self._batches = partial(self._watched, known), batches
        yield
        if known and batches.once and not batches.started:
            self._check(bar(batches, "data as before"))

    def _watched(self, known: bool, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of a pass; the first whole one is what the data are known by.

        known: from an earlier run; an iterator's only pass is compared with that
        """
        found, once = _Marks(), self._batches is not None and self._batches.once
        for batch in batches:
            if self._data is None or (known and once):
                found.add(mark_of(batch))
            yield batch
        if self._data is None:
            self._data = [found.count, found.digest]
        elif known and once:
            self._compare(found)

    def keep_data(self) -> None:
        """What is written from here on is of the data that were gone through."""
        if self.folder is None or self._data_file.is_file() or self._batches is None:
            return
        if self._data is None and not self._batches.once:  # no pass was watched
            deque(self._batches, maxlen=0)
        if self._data is not None:
            write_json(self._data_file, self._data)

    def _check(self, batches: Iterable[Batch]) -> None:
        found = _Marks()
        for batch in batches:
            found.add(mark_of(batch))
        self._compare(found)

    def _compare(self, found: _Marks) -> None:
        if self._data is not None and [found.count, found.digest] != self._data:
            raise ValueError(
                f"checkpoint: {str(self.folder)!r} is of other data, of {self._data[0]} batches, "
                f"found {found.count}; expected the same in the same order: give a shuffled loader "
                "a generator with a seed, or take another folder"
            )

    def finished(self, name: str) -> LayerSelection | None:
        return self._layers.get(name)

    def finish(self, name: str, layer: LayerSelection) -> LayerSelection:
        """Keeps a layer, and no longer what it was found with; returns it."""
        if self.folder is None or name in self._layers:
            return layer
        from ..surgery.selection import Selection

        self._layers[name] = layer
        self.keep_data()
        if self.ranks.rank == 0:
            Selection({name: layer}).save(self.folder / f"layer-{_plain(name)}.safetensors")
            for file in self.folder.glob(f"steps-{_plain(name)}-*.safetensors"):
                file.unlink(missing_ok=True)
        own = f"pass-{_plain(name)}-{self.ranks.rank}.safetensors"
        (self.folder / own).unlink(missing_ok=True)
        return layer

    def tidy(self) -> None:
        """Every layer is finished."""
        if self.folder is not None:
            for file in self.folder.glob(f"pass-*-{self.ranks.rank}.safetensors"):
                file.unlink(missing_ok=True)

    def number(self, name: str, compute: Callable[[], Any]) -> Any:
        """compute(), which JSON can hold, or what it gave in an earlier run."""
        if self.folder is None:
            return compute()
        file = self.folder / f"{name}.json"
        known = self.ranks.on_first(
            name, lambda: _read(read_json, file) if file.is_file() else None
        )
        if known is None:
            known = json.loads(json.dumps(compute()))  # as it will be read
            self.keep_data()
            if self.ranks.rank == 0:
                write_json(file, known)
        return known

    def _enter(self, about: dict[str, str]) -> None:
        """ValueError where the folder is of another call, or of none."""
        assert self.folder is not None
        file = self.folder / f"call-{self.ranks.rank}.json"
        about["ranks"] = str(self.ranks.size)
        if file.is_file():
            self._take()
            if differs := difference(_read(read_json, file), about):
                name, before, now = differs
                raise ValueError(
                    f"checkpoint: {str(self.folder)!r} is of another call, with {name} {before}, "
                    f"found {now}; expected the same or another folder"
                )
            return
        found = sorted(each.name for each in self.folder.glob("*"))
        own = f"-{self.ranks.rank}.safetensors"
        strange = [
            each for each in found
            if not each.startswith(OURS) or each.startswith(("layer-", "steps-"))
            or (each.startswith("pass-") and each.endswith(own))
        ]  # fmt: skip
        if strange or (self.folder.exists() and not self.folder.is_dir()):
            what = f"holds {strange[0]!r} and no {file.name!r}" if strange else "is no folder"
            raise ValueError(
                f"checkpoint: {str(self.folder)!r} {what}, expected a folder of its own"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        write_json(file, about)

    def _take(self) -> None:
        """ValueError where another process uses the folder; a killed one does no longer."""
        assert self.folder is not None
        if sys.platform == "win32":
            return
        import fcntl

        self._lock = os.open(self.folder / f".lock-{self.ranks.rank}", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its forks don't have it
        except (BlockingIOError, PermissionError):
            self.close()
            raise ValueError(
                f"checkpoint: {str(self.folder)!r} is used by another process, expected a folder "
                "for each call"
            ) from None
        except OSError:  # a file system without locks: nobody is told
            self.close()


NOTHING = Checkpoint()  # is kept


class _Marks:
    """What batches one after the other are known by."""

    def __init__(self) -> None:
        self.count, self._hash = 0, hashlib.blake2b(digest_size=8)

    def add(self, mark: str) -> None:
        self.count += 1
        self._hash.update(mark.encode())

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


class Pass:
    """One pass over the data, whose sums are kept as they grow.

    It goes on after the batches that are in them already, which must come again as they did.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.done, self._file = 0, None
        self._seen = _Marks()
        self._holders: Sequence[Holder] = ()
        self._clock = _Clock()
        if checkpoint.folder is None:
            return
        self._file = checkpoint.folder / f"pass-{_plain(name)}-{checkpoint.ranks.rank}.safetensors"
        if self._file.is_file():
            self._state, header = _read(read_tensors, self._file, FORMAT, "sums")
            self.done, self._mark = int(header["done"]), header["mark"]

    def hold(self, *holders: Holder) -> None:
        """These are the sums; from here on they are kept, and they get what was."""
        self._holders = holders
        if self.done:
            states: list[dict[str, Tensor]] = [{} for _ in holders]
            for key, tensor in self._state.items():
                i, _, name = key.partition(".")
                states[int(i)][name] = tensor
            for holder, state in zip(holders, states, strict=True):
                holder.restore(state)
            self._state = {}

    def has(self, mark: str) -> bool:
        """Is the next batch in the sums already? ValueError if it is not the one that was."""
        if self._file is None:
            return False
        if self._seen.count == self.done:
            self._check()
        self._seen.add(mark)
        return self._seen.count <= self.done

    def added(self) -> None:
        """It is now."""
        if self._file is not None and self._holders and self._clock.due():
            self._save()

    def end(self) -> None:
        """No batch is left."""
        if self._seen.count <= self.done:
            self._check()
        self.added()

    def new(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches that are not in the sums yet."""
        for batch in batches:
            if not self.has("" if self._file is None else mark_of(batch)):
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
    """What the steps of one layer found that take long; each once, also over several runs."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, _plain(name)
        self._known: list[tuple[str, Tensor]] = []  # of one file: yet to come
        self._again: list[tuple[str, Tensor]] = []  # and that came
        self._fresh: list[tuple[str, Tensor]] = []  # not written yet
        self._segment, self._segments, self._clock = 0, 0, _Clock()
        if checkpoint.folder is None:
            return
        while self._file(self._segments + 1).is_file():
            self._segments += 1
        self._segments = checkpoint.ranks.from_rank(0, "steps", self._segments)

    def once(self, label: str, compute: Callable[[], Tensor]) -> Tensor:
        """compute(), or what it gave in an earlier run, where the steps were the same."""
        if self._checkpoint.folder is None:
            return compute()
        if not self._known and self._segment < self._segments:
            self._read()
        if self._known:
            known, value = self._known.pop(0)
            if known == label:
                self._again.append((known, value))
                return value
            self._forget()  # on another kind of processor steps can differ
        value = compute()
        self._fresh.append((label, value.cpu().clone()))
        self._checkpoint.keep_data()
        if self._checkpoint.ranks.rank == 0 and self._clock.due():
            self._segment = self._segments = self._segment + 1
            labels = json.dumps([label for label, _ in self._fresh])
            tensors = {str(i): value for i, (_, value) in enumerate(self._fresh)}
            with self._clock:
                write_tensors(
                    self._file(self._segment), tensors, {"format": FORMAT, "labels": labels}
                )
            self._fresh = []
        return value

    def _read(self) -> None:
        self._segment += 1
        found: list[tuple[str, Tensor]] = []
        if self._checkpoint.ranks.rank == 0:
            tensors, header = _read(read_tensors, self._file(self._segment), FORMAT, "steps")
            labels = json.loads(header["labels"])
            found = [(label, tensors[str(i)]) for i, label in enumerate(labels)]
        self._known = self._checkpoint.ranks.from_rank(0, f"steps {self._segment}", found)
        self._again = []

    def _forget(self) -> None:
        """What did not come again."""
        self._known, self._fresh, self._again = [], self._again, []
        for segment in range(self._segments, self._segment - 1, -1):
            if self._checkpoint.ranks.rank == 0:
                self._file(segment).unlink(missing_ok=True)
        self._segment = self._segments = self._segment - 1

    def _file(self, segment: int) -> Path:
        assert self._checkpoint.folder is not None
        return self._checkpoint.folder / f"steps-{self._name}-{segment}.safetensors"


class _Clock:
    """When to write again; what is inside `with` is a write."""

    def __init__(self) -> None:
        self._last, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(SECONDS, SHARE * self._cost)

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._last = time.monotonic()
        self._cost = self._last - self._begun


def _read(read: Callable[..., Any], *args: object) -> Any:
    """A file; what is wrong with it names the argument that it is of."""
    try:
        return read(*args)
    except ValueError as error:
        raise ValueError(str(error).replace("path:", "checkpoint:", 1)) from None


def mark_of(batch: Batch) -> str:
    """What a batch is known by: shapes, types and some of its numbers."""
    digest = hashlib.blake2b(digest_size=8)

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            flat = value.detach().reshape(-1)
            stride = max(1, flat.numel() // SAMPLED)
            some = flat[::stride].cpu().contiguous()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            if some.numel():
                digest.update(some.view(torch.uint8).numpy().data)
        else:
            digest.update(repr(type(value)).encode())
        return value

    batch.map(of)
    return digest.hexdigest()


def _plain(name: str) -> str:
    """A layer's name as a part of a file's."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return "".join(c if c.isalnum() or c in "._" else "_" for c in name)[:60] + f"~{digest}"
