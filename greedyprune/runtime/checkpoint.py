"""A folder that keeps what a call of `select` has computed, so that the same call can go on.

call-0.json              the call's model, arguments and first batch; one file for each rank
data-0.json              the number of batches in a pass and a digest of them
layer-NAME.safetensors   a finished layer
pass-NAME-0.safetensors  sums over the data, and how many batches they contain (resume.py)
steps-NAME-1.safetensors results of greedy steps that each take a pass over the data (resume.py)

Every file is written whole or not at all (files.py). Unfinished work is written so rarely that
writing takes at most a twentieth of the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from .distributed import ALONE, Ranks
from .files import read_json, write_json
from .fingerprint import difference

OURS = ("call-", "data-", "layer-", "pass-", "steps-", "memory.", "sizes.", ".call-", ".lock")
Layer = TypeVar("Layer")
Value = TypeVar("Value")


class Batch(Protocol):
    """A batch of data that can be recognised."""

    @property
    def mark(self) -> str:
        """A digest of the batch's shapes, dtypes and a sample of its numbers."""


class Batches(Protocol):
    """The data, as data/batches.py has them."""

    started: bool  # that pass has begun
    watch: Callable[[Iterator[Any]], Iterator[Any]] | None  # sees every batch of a pass

    @property
    def once(self) -> bool:
        """Is it an iterator, which has one pass?"""

    def repeat(self) -> None:
        """Makes every pass read the batches in the same order."""

    def __iter__(self) -> Iterator[Any]: ...


class Checkpoint(Generic[Layer]):
    """The finished work of one call, in memory and, with a path, in a folder.

    Args:
        path: the folder; None keeps nothing
        about: the call's model, data and arguments as texts by name; another call's is refused
        ranks: the processes that select together
        save: writes one finished layer: save(file, layer's name, layer)
        load: reads such a file: the layers in it by name

    Raises:
        TypeError, ValueError: no path, a folder of another call, of other files, a damaged file, or
            a folder that another process uses
    """

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        about: Mapping[str, str] | None = None,
        ranks: Ranks = ALONE,
        *,
        save: Callable[[Path, str, Layer], None] | None = None,
        load: Callable[[Path], Mapping[str, Layer]] | None = None,
    ) -> None:
        if path is not None and not isinstance(path, (str, PathLike)):
            raise TypeError(
                f"checkpoint: found {type(path).__name__}, expected the path of a folder"
            )
        self.folder, self.ranks = None if path is None else Path(path), ranks
        self._save, self._load = save, load
        self._layers: dict[str, Layer] = {}
        self._data: list[Any] | None = None  # the number of batches, and the digest of their marks
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
        assert self.folder is not None
        assert self._load is not None
        layers = dict[str, Layer]()
        if self.ranks.rank == 0:
            self._enter(about)
            for unfinished in self.folder.glob(".*.part"):  # of a run that was killed
                unfinished.unlink(missing_ok=True)
            for file in sorted(self.folder.glob("layer-*.safetensors")):
                layers |= checked_read(self._load, file)
        self._layers = self.ranks.from_rank(0, "finished layers", layers)
        if self.ranks.rank > 0:
            self._enter(about)
        if self._data_file.is_file():
            self._data = checked_read(read_json, self._data_file)

    def __enter__(self) -> Checkpoint[Layer]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _data_file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"data-{self.ranks.rank}.json"

    @contextmanager
    def watching(self, batches: Batches, bar: Callable[..., Any]) -> Iterator[None]:
        """Raises ValueError where the data differ from those that an earlier run read.

        The comparison reads the data once. An iterator is compared during its only pass, or at the
        end if nothing else has read it.
        """
        if self.folder is None:
            yield
            return
        resumed = self._data is not None
        batches.repeat()
        if resumed and not batches.once:
            self._check(bar(batches, "data as before"))
        batches.watch, self._batches = partial(self._watched, resumed), batches
        yield
        if resumed and batches.once and not batches.started:
            self._check(bar(batches, "data as before"))

    def _watched(self, resumed: bool, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on, and remembers the first whole pass or compares an iterator's only one.

        resumed: did an earlier run leave a digest to compare with?
        """
        digest, once = MarkDigest(), self._batches is not None and self._batches.once
        for batch in batches:
            if self._data is None or (resumed and once):
                digest.add(batch.mark)
            yield batch
        if self._data is None:
            self._data = digest.summary
        elif resumed and once:
            self._compare(digest)

    def keep_data(self) -> None:
        """Writes the digest of the data, before any result that depends on them is written."""
        if self.folder is None or self._data_file.is_file() or self._batches is None:
            return
        if self._data is None and not self._batches.once:  # no pass has come to its end yet
            deque(self._batches, maxlen=0)
        if self._data is not None:
            write_json(self._data_file, self._data)

    def _check(self, batches: Iterable[Batch]) -> None:
        digest = MarkDigest()
        for batch in batches:
            digest.add(batch.mark)
        self._compare(digest)

    def _compare(self, digest: MarkDigest) -> None:
        if self._data is not None and digest.summary != self._data:
            raise ValueError(
                f"checkpoint: {str(self.folder)!r} belongs to other data, of {self._data[0]} "
                f"batches, found {digest.count}; expected the same data in the same order: give a "
                "shuffled loader a generator with a seed, or take another folder"
            )

    def finished(self, name: str) -> Layer | None:
        """The layer of this name, if it is finished."""
        return self._layers.get(name)

    def finish(self, name: str, layer: Layer) -> Layer:
        """Keeps a finished layer, removes files of its unfinished work, and returns the layer."""
        if self.folder is None or name in self._layers:
            return layer
        assert self._save is not None
        self._layers[name] = layer
        self.keep_data()
        if self.ranks.rank == 0:
            self._save(self.folder / f"layer-{file_name(name)}.safetensors", name, layer)
            for file in self.folder.glob(f"steps-{file_name(name)}-*.safetensors"):
                file.unlink(missing_ok=True)
        sums = f"pass-{file_name(name)}-{self.ranks.rank}.safetensors"
        (self.folder / sums).unlink(missing_ok=True)
        return layer

    def tidy(self) -> None:
        """Removes this rank's sums, once every layer is finished."""
        if self.folder is not None:
            for file in self.folder.glob(f"pass-*-{self.ranks.rank}.safetensors"):
                file.unlink(missing_ok=True)

    def value(self, name: str, compute: Callable[[], Value]) -> Value:
        """compute(), a value that JSON can hold; the same value in every later run."""
        if self.folder is None:
            return compute()
        file = self.folder / f"{name}.json"
        known: Any = self.ranks.on_first(
            name, lambda: checked_read(read_json, file) if file.is_file() else None
        )
        if known is None:
            known = json.loads(json.dumps(compute()))  # as a later run will read it
            self.keep_data()
            if self.ranks.rank == 0:
                write_json(file, known)
        return known

    def _enter(self, about: dict[str, str]) -> None:
        """Raises ValueError if the folder belongs to another call, or holds other files."""
        assert self.folder is not None
        file = self.folder / f"call-{self.ranks.rank}.json"
        about["ranks"] = str(self.ranks.size)
        if file.is_file():
            self._take_lock()
            if differs := difference(checked_read(read_json, file), about):
                name, before, now = differs
                raise ValueError(
                    f"checkpoint: {str(self.folder)!r} belongs to another call, with {name} "
                    f"{before}, found {now}; expected the same or another folder"
                )
            return
        names = sorted(entry.name for entry in self.folder.glob("*"))
        sums = f"-{self.ranks.rank}.safetensors"
        foreign = [
            name for name in names
            if not name.startswith(OURS) or name.startswith(("layer-", "steps-"))
            or (name.startswith("pass-") and name.endswith(sums))
        ]  # fmt: skip
        if foreign or (self.folder.exists() and not self.folder.is_dir()):
            what = f"holds {foreign[0]!r} and no {file.name!r}" if foreign else "is not a folder"
            raise ValueError(
                f"checkpoint: {str(self.folder)!r} {what}, expected a folder for this call alone"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        write_json(file, about)

    def _take_lock(self) -> None:
        """Raises ValueError where another process uses the folder; a killed one holds no lock."""
        assert self.folder is not None
        if sys.platform == "win32":
            return
        import fcntl

        self._lock = os.open(self.folder / f".lock-{self.ranks.rank}", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forks do not inherit it
        except (BlockingIOError, PermissionError):
            self.close()
            raise ValueError(
                f"checkpoint: {str(self.folder)!r} is used by another process, expected a folder "
                "for each call"
            ) from None
        except OSError:  # a file system without locks: no other process can be told
            self.close()


NO_CHECKPOINT: Checkpoint[Any] = Checkpoint()


class MarkDigest:
    """The number of batches in a row and a digest of their marks."""

    def __init__(self) -> None:
        self.count, self._hash = 0, hashlib.blake2b(digest_size=8)

    def add(self, mark: str) -> None:
        self.count += 1
        self._hash.update(mark.encode())

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    @property
    def summary(self) -> list[Any]:
        return [self.count, self.digest]


def checked_read(read: Callable[..., Value], *args: object) -> Value:
    """read(*args); an error about the file's `path` becomes one about `checkpoint`."""
    try:
        return read(*args)
    except ValueError as error:
        raise ValueError(str(error).replace("path:", "checkpoint:", 1)) from None


def file_name(name: str) -> str:
    """A layer's name as a part of a file's name."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return "".join(c if c.isalnum() or c in "._" else "_" for c in name)[:60] + f"~{digest}"
