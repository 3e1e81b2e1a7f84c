"""Models run as they are written: without torch.compile, autocast and attention's fast path."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..runtime.threads import WhileAnyThread


@WhileAnyThread
@contextmanager
def without_fast_code() -> Iterator[None]:
    """Compiled forwards run as they are written, and attention takes no fast path."""
    has_fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fast_path)


@contextmanager
def as_deployed() -> Iterator[None]:
    """Inside `evaluating`: compiled code, autocast and attention's fast path have effect again."""
    has_fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        with torch.compiler.set_stance("default"), AUTOCAST_WITHOUT_EFFECT.paused():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fast_path)


class _AutocastWithoutEffect:
    """Makes `with torch.autocast(...)` do nothing inside, in the threads that are inside.

    torch.autocast is patched while any thread is, so that the order in which they leave is no
    matter.
    """

    def __init__(self) -> None:
        self._threads, self._lock = Counter[int](), threading.Lock()
        self._paused = set[int]()
        self._own: tuple[Any, Any] = None, None

    def _is_inside(self) -> bool:
        thread = threading.get_ident()
        return thread in self._threads and thread not in self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """torch.autocast has effect again in this thread."""
        self._paused.add(threading.get_ident())
        try:
            yield
        finally:
            self._paused.discard(threading.get_ident())

    def __enter__(self) -> None:
        autocast: Any = torch.autocast
        with self._lock:
            if not self._threads:
                self._own = enter, leave = autocast.__enter__, autocast.__exit__

                def do_enter(context: Any) -> Any:
                    return context if self._is_inside() else enter(context)

                def do_leave(context: Any, *error: Any) -> Any:
                    return None if self._is_inside() else leave(context, *error)

                autocast.__enter__, autocast.__exit__ = do_enter, do_leave
            self._threads[threading.get_ident()] += 1

    def __exit__(self, *_: object) -> None:
        autocast: Any = torch.autocast
        with self._lock:
            self._threads[threading.get_ident()] -= 1
            self._threads += Counter()  # without the threads that have left
            if not self._threads:
                autocast.__enter__, autocast.__exit__ = self._own


AUTOCAST_WITHOUT_EFFECT = _AutocastWithoutEffect()
