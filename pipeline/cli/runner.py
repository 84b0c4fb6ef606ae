"""What every command line shares: messages and exit codes."""

import sys
from collections.abc import Callable

from pipeline.runs.folder import RunError


def run_cli(command: Callable[[], int | None], interrupted: str) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    A ValueError, RunError or OSError becomes one message on stderr; its `exit_code`, if it has
    one, is returned.
    interrupted: what Ctrl-C leaves behind, for the message.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        print(f"\nstopped: {interrupted}", file=sys.stderr)
        return 130
    except (ValueError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
