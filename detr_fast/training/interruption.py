"""SIGTERM and Ctrl-C: at the first a run finishes its step and saves, at the second it ends at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interruption:
    """The signal that has come, if any."""

    signal_number: int | None = None

    @property
    def exit_code(self) -> int:
        """Return 128 + signal, as a shell reports it; 0 where none has come."""
        return 0 if self.signal_number is None else 128 + self.signal_number


@contextmanager
def deferred_interruption() -> Iterator[Interruption]:
    """Only note the first signal that comes inside; let the second act as if it had not been caught."""
    interruption = Interruption()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        interruption.signal_number = number
        signal.signal(number, signal.SIG_DFL)

    for number in before:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
