"""Real processes in a group of torch.distributed (gloo), for tests to run functions in."""

from __future__ import annotations

import datetime
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, multiprocessing

TIMEOUT = 60.0  # seconds that ranks wait for one another


class Raised(NamedTuple):
    """What a rank raised."""

    kind: str
    text: str
    where: str


class Team:
    """`size` processes; the first 2, 3, ... of them are groups of their own, and each by itself."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(size):
            parent, child = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, child), daemon=True)
            process.start()
            self.pipes.append(parent)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(rank, *args) on the first `size` ranks: what each returned, or a Raised."""
        for pipe in self.pipes[:size]:
            pipe.send((size, function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not pipe.poll(2 * TIMEOUT):
                self.close()
                raise AssertionError(f"rank {rank} of {size} hangs")
            answers.append(pipe.recv())
        return answers

    def results(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The same, where nothing may be raised."""
        answers = self.run(size, function, *args)
        for answer in answers:
            if isinstance(answer, Raised):
                raise AssertionError(answer.where)
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def group_of(size: int) -> Any:
    """The first `size` processes; of 1: this one, whichever it is."""
    return _GROUPS[size]


_GROUPS: dict[int, Any] = {}


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    for smaller in range(2, size + 1):
        _GROUPS[smaller] = distributed.new_group(list(range(smaller)))
    for only in range(size):
        group = distributed.new_group([only])
        if only == rank:
            _GROUPS[1] = group
    while True:
        try:
            _, function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(rank, *args))
        except BaseException as error:
            pipe.send(Raised(type(error).__name__, str(error), traceback.format_exc()))
