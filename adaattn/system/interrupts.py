"""Turn signals that ask a command to end into KeyboardInterrupt, but never inside a step that must be whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def raise_on_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, so that a command cleans up before it ends.

    A signal that is ignored stays ignored: `nohup` and background jobs of a shell rely on it.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


@contextmanager
def held() -> Iterator[None]:
    """Hold signals back until the block has ended, then deliver the first that came.

    Only the main thread gets KeyboardInterrupt, so in other threads there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {}

    def keep(number: int, frame: FrameType | None) -> None:
        came.append(number)

    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # None: it was not installed from Python
                before[number] = handler
                signal.signal(number, keep)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def surely(clean_up: Callable[[], None]) -> None:
    """Clean up with signals held back, also where one comes right before they are.

    Args:
        clean_up: it may be called twice, and then does nothing the second time.
    """
    try:
        with held():
            clean_up()
    except KeyboardInterrupt:
        with held():
            clean_up()
        raise
