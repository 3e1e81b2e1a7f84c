"""Several processes that select as one, over torch.distributed.

Before every exchange, each rank sends a code that names the exchange. A rank on which an error was
raised reports the error instead. So all ranks raise the error, and none waits for another.
Inside a loop of small exchanges, the code travels in the same message as the numbers.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
# Up to so many ranks and bytes (of all ranks together), gathering costs less than a ring reduction.
GATHER_RANKS = 8
GATHER_BYTES = 2**20
HEAD = 3  # numbers at the start of a frame: failures, and the code with its square
# A matrix is summed in panels of at most so many rows and entries.
PANEL_ROWS = 512
PANEL_ENTRIES = 2**23


class Ranks:
    """The processes of a group, each with `rank` of `size`; without a group, this one alone.

    A sum has the same bits on every rank: torch's backends add up each entry on one rank, and small
    tensors are gathered and added up on every rank in the order of the ranks.
    """

    def __init__(self, group: Any = None) -> None:
        self.rank, self.size, self._group = 0, 1, group
        self._broken = False  # nothing more can be exchanged
        self._frame: Tensor | None = None  # what is exchanged inside a loop
        if group is None:
            return
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        config = distributed.get_backend_config(group)
        self._device = torch.device("cpu")
        if "cpu" not in config:
            self._device = torch.device("cuda", torch.cuda.current_device())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises an error of one rank on all ranks; no rank leaves before the others."""
        try:
            yield
            if self.size > 1:
                self._meet("the end")
        except BaseException as error:
            if self.size > 1 and not self._broken:
                self._fail(error)
            raise

    @contextmanager
    def loop(self, count: int) -> Iterator[None]:
        """Makes a sum of at most `count` numbers one message, of fixed length, with its code.

        For loops of small sums, where the number of messages decides the time.
        """
        if self.size == 1:
            yield
            return
        frame = torch.zeros(HEAD + count, dtype=torch.float64, device=self._device)
        self._meet(f"a loop with {count}")
        self._frame = frame
        yield  # after an error the frame stays: the others are in the loop, too
        self._meet("the end of the loop")
        self._frame = None

    def sum(self, what: str, *tensors: Tensor) -> None:
        """Adds up each tensor over the ranks, in place."""
        if self.size == 1:
            return
        what = f"{what} {[tuple(tensor.shape) for tensor in tensors]}"
        numbers = sum(tensor.numel() for tensor in tensors)
        if self._frame is not None and numbers <= len(self._frame) - HEAD:
            self._meet(what, tensors)
            return
        copies = [self._on_device(tensor) for tensor in tensors]  # may fail: before the ranks meet
        self._meet(what)
        for tensor, copy in zip(tensors, copies, strict=True):
            self._reduce(copy)
            if copy is not tensor:
                tensor.copy_(copy)

    def sum_numbers(self, what: str, *numbers: float) -> list[float]:
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64)
        self.sum(what, totals)
        return [float(total) for total in totals]

    def sum_upper(self, what: str, matrix: Tensor, owner: int | None = None) -> None:
        """Adds up a square matrix over the ranks: the blocks on and above its diagonal.

        owner: the only rank that needs the sum; None: all do
        """
        if self.size == 1:
            return
        height = max(1, min(PANEL_ROWS, len(matrix), PANEL_ENTRIES // len(matrix)))
        device = matrix.device if matrix.is_cuda else self._device
        buffer = torch.empty(height * len(matrix), dtype=matrix.dtype, device=device)
        self._meet(f"{what} {tuple(matrix.shape)}")
        for i in range(0, len(matrix), height):
            rows = matrix[i : i + height, i:]
            total = buffer[: rows.numel()].view(rows.shape)
            total.copy_(rows)
            self._reduce(total, owner)
            rows.copy_(total)

    def gather(self, what: str, value: T) -> list[T]:
        """Every rank's value (small: it is pickled), in their order."""
        if self.size == 1:
            return [value]
        self._meet(what)
        values: list[Any] = [None] * self.size
        with self._exchanging():
            distributed.all_gather_object(values, value, self._group)
        return values

    def agree(self, what: str, value: bool) -> bool:
        """Is it true on every rank?"""
        return all(self.gather(what, value))

    def parts(self, what: str, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor; those may differ in length."""
        if self.size == 1:
            return [tensor]
        lengths = self.gather(f"{what}, length", len(tensor))
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:], device=self._device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        self._meet(f"{what} {tuple(padded.shape)}")
        with self._exchanging():
            distributed.all_gather(parts, padded, self._group)
        return [
            part[:length].to(tensor.device) for part, length in zip(parts, lengths, strict=True)
        ]

    def joined(self, what: str, tensor: Tensor, dim: int = 0) -> Tensor:
        """Every rank's tensor, one after the other along a dimension."""
        if self.size == 1:
            return tensor
        return torch.cat(self.parts(what, tensor.movedim(dim, 0))).movedim(0, dim)

    def from_rank(self, source: int, what: str, value: Any) -> Any:
        """One rank's value (pickled), on all of them."""
        if self.size == 1:
            return value
        self._meet(what)
        values: list[Any] = [value if self.rank == source else None]
        with self._exchanging():
            sender = distributed.get_global_rank(self._group, source)
            distributed.broadcast_object_list(values, sender, self._group, device=self._device)
        return values[0]

    def on_first(self, what: str, compute: Callable[[], T]) -> T:
        """Computes on the first rank, and returns its result on all; the others wait."""
        result: T = self.from_rank(0, what, compute() if self.rank == 0 else None)
        return result

    def owner(self, i: int) -> int:
        """The rank that does the i-th of several pieces of work."""
        return i % self.size

    def each(
        self, names: Sequence[str], compute: Callable[[str], T],
        keep: Callable[[str, T], T] = lambda _, result: result,
    ) -> dict[str, T]:  # fmt: skip
        """compute(name) on the owner of each name, then keep(name, result) on all ranks."""
        results: dict[str, T] = {}
        for start in range(0, len(names), self.size):
            turn = names[start : start + self.size]  # one for each rank
            result = compute(turn[self.rank]) if self.rank < len(turn) else None
            for i, name in enumerate(turn):
                results[name] = keep(name, self.from_rank(i, f"layer {name!r}", result))
        return results

    def memory(self, limit: int, shared: bool = False) -> int:
        """The least that any rank may use; shared: the ranks of a machine share `limit`."""
        if self.size == 1:
            return limit
        machines = self.gather("machine", platform.node())
        sharers = machines.count(machines[self.rank]) if shared else 1
        return min(self.gather("memory", limit // sharers))

    def _on_device(self, tensor: Tensor) -> Tensor:
        """The tensor, contiguous, on a device that the group's backend takes."""
        return (tensor if tensor.is_cuda else tensor.to(self._device)).contiguous()

    def _reduce(self, tensor: Tensor, owner: int | None = None) -> None:
        with self._exchanging():
            if owner is None:
                distributed.all_reduce(tensor, group=self._group)
            else:
                receiver = distributed.get_global_rank(self._group, owner)
                distributed.reduce(tensor, receiver, group=self._group)

    def _meet(self, what: str, carried: Sequence[Tensor] = ()) -> None:
        """Returns once all ranks are about to do the same; else raises on all of them.

        carried: tensors that are added up in the same message, inside a loop
        """
        failed, same = self._exchange_codes(zlib.crc32(what.encode()) >> 12, carried)
        if failed:
            self._broken = True
            reports = self._reports(None)
            rank, (kind, text) = next((i, report) for i, report in enumerate(reports) if report)
            raise kind(f"rank {rank}: {text}")
        if not same:
            self._broken = True
            doing = self._reports(what)
            other = next(i for i, action in enumerate(doing) if action != doing[0])
            raise RuntimeError(
                f"process_group: found rank 0 at {doing[0]!r} and rank {other} at {doing[other]!r},"
                " expected the same model, arguments and instruction set on all ranks"
            )

    def _fail(self, error: BaseException) -> None:
        """Tells all ranks, in place of the next exchange, what was raised on this one."""
        kind = next((k for k in (ValueError, TypeError) if isinstance(error, k)), RuntimeError)
        text = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
        try:
            self._exchange_codes(None)
            self._broken = True
            self._reports((kind, text))
        except RuntimeError:
            pass  # no other rank is left; this one raises its own error

    def _exchange_codes(
        self, code: int | None, carried: Sequence[Tensor] = ()
    ) -> tuple[bool, bool]:
        """Has any rank failed, and is the code (20 bits) the same on all ranks?

        code: None: this rank failed
        """
        frame = self._frame
        if frame is None:
            frame = torch.empty(HEAD, dtype=torch.float64, device=self._device)
        frame[HEAD:] = 0
        head = [1, 0, 0] if code is None else [0, code, code * code]
        frame[:HEAD] = torch.tensor(head, dtype=torch.float64)
        ends = list(accumulate((tensor.numel() for tensor in carried), initial=HEAD))
        parts = [frame[i:j] for i, j in pairwise(ends)]
        for part, tensor in zip(parts, carried, strict=True):
            part.copy_(tensor.flatten())
        with self._exchanging():
            self._sum_frame(frame)
        for part, tensor in zip(parts, carried, strict=True):
            tensor.copy_(part.view_as(tensor))
        failed, total, squares = (int(number) for number in frame[:HEAD].tolist())
        return failed > 0, total**2 == self.size * squares  # only for equal codes (Cauchy-Schwarz)

    def _sum_frame(self, frame: Tensor) -> None:
        if self.size > GATHER_RANKS or self.size * frame.nbytes > GATHER_BYTES:
            distributed.all_reduce(frame, group=self._group)
            return
        rows = [torch.empty_like(frame) for _ in range(self.size)]
        distributed.all_gather(rows, frame, self._group)
        frame.copy_(rows[0])
        for row in rows[1:]:
            frame += row

    def _reports(self, report: object) -> list[Any]:
        reports: list[Any] = [None] * self.size
        with self._exchanging():
            distributed.all_gather_object(reports, report, self._group)
        return reports

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._broken = True
            if not isinstance(error, RuntimeError):
                raise
            raise RuntimeError(
                f"process_group: rank {self.rank} of {self.size} lost the others; the output of "
                f"the rank that stopped says why ({error})"
            ) from error


ALONE = Ranks()


def ranks_of(process_group: object) -> Ranks:
    """The ranks that the argument `process_group` of `select` means."""
    ready = distributed.is_available() and distributed.is_initialized()
    if process_group is None:
        group = distributed.group.WORLD if ready else None
    elif ready and isinstance(process_group, distributed.ProcessGroup):
        group = process_group
    elif ready and process_group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this process is not in it, expected a group that has it")
    else:
        raise TypeError(
            f"process_group: found {type(process_group).__name__}, expected a group of "
            "torch.distributed, or None"
        )
    if group is None or distributed.get_world_size(group) == 1:
        return ALONE
    return Ranks(group)
