"""Requests to stop a run: signals, a closed terminal, a launcher that died."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self


class Stopped(KeyboardInterrupt):
    """A request to stop at a point where there is nothing to save."""


class StopSignals:
    """Record requests to stop: SIGTERM, SIGINT, SIGUSR1, SIGHUP, or the death of the launcher.

    As a context manager it installs its handlers and restores the previous ones. `bool(stop)` polls
    for a request; `stop.exit_code` is then 143 or 130, otherwise 0. Inside `raise_on_stop`, a
    request raises Stopped at once. A second SIGINT ends the process immediately. SIGHUP is ignored
    under nohup; after one, output to the closed terminal goes to the null device.
    """

    # Windows has neither SIGUSR1 nor SIGHUP.
    SIGNALS = tuple(
        getattr(signal, name)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
        if hasattr(signal, name)
    )
    # accelerate launch and torchrun set variables with these prefixes. Only their death ends a run:
    # without them the parent is a shell, which may exit first.
    LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_")

    def __init__(self) -> None:
        self.reason = ""
        self.exit_code = 0
        self.parent = os.getppid()
        self._where = ""
        self._closed = threading.Event()
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __enter__(self) -> Self:
        self._previous = {}
        for number in self.SIGNALS:
            under_nohup = signal.getsignal(number) == signal.SIG_IGN
            if number.name != "SIGHUP" or not under_nohup:
                self._previous[number] = signal.signal(number, self.handle)
        if any(name.startswith(self.LAUNCHERS) for name in os.environ):
            threading.Thread(target=self._watch_launcher, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return bool(self.reason)

    @contextlib.contextmanager
    def raise_on_stop(self, where: str) -> Iterator[None]:
        """Raise Stopped on a request, past or future, while this context is open.

        where: the point in time for the message, such as "before the first step".
        """
        self._where = where
        try:
            self._raise_if_requested()
            yield
        finally:
            self._where = ""

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Record the request; restore output if the terminal is gone."""
        if self.reason and number == signal.SIGINT:
            os._exit(130)
        for fd in self._terminals:
            # Writing to a closed terminal would be an error.
            if not os.isatty(fd):
                with open(os.devnull, "w") as null_device:
                    os.dup2(null_device.fileno(), fd)
        self.reason = self.reason or signal.Signals(number).name
        self.exit_code = self.exit_code or (130 if number == signal.SIGINT else 143)
        self._raise_if_requested()

    def _raise_if_requested(self) -> None:
        if self._where and self.reason:
            raise Stopped(f"Stopped ({self.reason}) {self._where}")

    def _watch_launcher(self) -> None:
        """Request a stop when the launcher has died, which sends its children no signal."""
        while not self._closed.wait(0.5):
            if os.getppid() != self.parent:
                self.exit_code = self.exit_code or 143
                self.reason = self.reason or "the launcher is gone"
                os.kill(os.getpid(), signal.SIGTERM)
                return
