"""SIGTERM as an exception, like Ctrl-C, so that whatever was started is ended first."""
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Terminated", "terminable"]


class Terminated(KeyboardInterrupt):
    """SIGTERM: a command or batch ends what it started before it ends itself."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, but only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None: raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try: yield
    finally: signal.signal(signal.SIGTERM, before)
