"""Settings of the whole process, changed and put back by several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager


class WhileAnyThread:
    """A context that changes a setting of the whole process while any thread is inside.

    The first thread that enters makes the change and the last one that leaves takes it back. If
    each thread did both, one that leaves late would put back what another had changed.

    change: gives a context that makes the change and takes it back
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._current: AbstractContextManager[object] | None = None
        self._inside, self._lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._current = self._change()
                self._current.__enter__()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                assert self._current is not None
                self._current.__exit__(None, None, None)
