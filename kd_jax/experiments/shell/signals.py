"""Ctrl-C and SIGTERM: at once, or, while something must not be cut in two, when that is done."""

import os
import signal
import time
from types import FrameType

_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def end_at_once() -> None:
    """Lets Ctrl-C end a command without a traceback while it imports JAX, until `Interrupt` takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Interrupt:
    """Handles both signals once it is installed. One outside of `with interrupt:` acts at once, as does a second one.

    What comes within a second of the first is taken for the same, as `make` and a terminal may both pass it on.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._deferring = False
        self._since = 0.0

    def install(self) -> None:
        """From now on. A signal that is ignored, as a shell has it for background jobs, stays so."""
        for number in _SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def word(self) -> str:
        """`interrupted` or `terminated`."""
        return _SIGNALS[self.signal or signal.SIGINT]

    @property
    def exit_code(self) -> int:
        """130 or 143, as shells count."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> None:
        """From here on a signal is only noted."""
        self._deferring = True

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """From here on a signal acts at once; one that came meanwhile does so now."""
        self._deferring = False
        if self.requested and kind is None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() - self._since < 1:
                return
            os.write(2, b"kd_jax: stopped at once: what was trained since the last checkpoint is lost\n")
            os._exit(self.exit_code)
        self.signal, self._since = signal.Signals(number), time.monotonic()
        if not self._deferring:
            raise KeyboardInterrupt
