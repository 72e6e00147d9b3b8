"""Ctrl-C and SIGTERM: at once, or, while something must not be cut in two, when that is done."""

import os
import signal
from types import FrameType

_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interrupt:
    """Handles both signals once it is installed. A second one, or one outside of `with interrupt:`, acts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._deferring = False

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
        again, self.signal = self.requested, signal.Signals(number)
        if again:
            os._exit(self.exit_code)
        if not self._deferring:
            raise KeyboardInterrupt
