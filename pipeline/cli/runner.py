"""What the command lines share."""

import sys
from collections.abc import Callable


def run_cli(main: Callable[[], int], said: str) -> int:
    """The exit code of a command line; of one that Ctrl-C stops 130, and a word on what is left."""
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\nstopped: {said}", file=sys.stderr)
        return 130
