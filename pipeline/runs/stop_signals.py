"""Signals that ask a run to stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """A request to stop that came where there is nothing to save yet."""


class StopSignals:
    """Has anybody asked this process to stop? SIGTERM, SIGINT, SIGUSR1, SIGHUP, or a launcher's death; a second SIGINT kills.

    A closed terminal's SIGHUP is none where nohup has it ignored; what is said to it afterwards is dropped, and is no error.

    `bool(stop)` is the poll, `stop.exit_code` 143, 130 or 0; use it as a context manager, which puts the handlers back.
    While `at_once(where)` is open a request raises Stopped instead of waiting for the poll.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    ORPHAN = "the launcher is gone"
    LAUNCHERS = (
        "ACCELERATE_",
        "TORCHELASTIC_",
    )  # what accelerate launch and torchrun set; a shell may go, and the run goes on

    def __init__(self):
        self.reason, self.exit_code, self.parent, self.where, self.over = (
            "",
            0,
            os.getppid(),
            "",
            threading.Event(),
        )
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __enter__(self):
        heard = (
            n for n in self.SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN
        )
        self.before = {number: signal.signal(number, self.handle) for number in heard}
        if any(name.startswith(self.LAUNCHERS) for name in os.environ):
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def raise_on_stop(self, where: str) -> Iterator[None]:
        """Raise Stopped at a request, also at one that has come already: for work that leaves nothing to save.

        where: the words for when that is, such as "before the first step".
        """
        self.where = where
        try:
            self._raise()
            yield
        finally:
            self.where = ""

    def handle(self, number, _frame):
        if self.reason and number == signal.SIGINT:
            os._exit(130)
        for fd in (
            fd for fd in self.terminals if not os.isatty(fd)
        ):  # closed: writing to it is an error
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), fd)
        self.reason = self.reason or signal.Signals(number).name
        self.exit_code = self.exit_code or (130 if number == signal.SIGINT else 143)
        self._raise()

    def _raise(self) -> None:
        if self.where and self.reason:
            raise Stopped(f"Stopped ({self.reason}) {self.where}")

    def _watch(self) -> None:
        """Ask for a stop when the launcher is gone: the system tells its children nothing."""
        while not self.over.wait(0.5):
            if os.getppid() != self.parent:
                self.exit_code, self.reason = self.exit_code or 143, self.reason or self.ORPHAN
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def __bool__(self):
        return bool(self.reason)
