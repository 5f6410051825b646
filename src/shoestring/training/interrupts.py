"""Ctrl-C and SIGTERM as a wish that the loop looks at: the run ends at a whole step, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "stop_requests"]


class StopRequest:
    """Whether someone asked the run to stop."""

    asked = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take the first SIGINT or SIGTERM as a request; a second one interrupts at once. Handlers are put back."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
