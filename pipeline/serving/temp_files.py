"""Store the demo's uploads and images in a temporary folder of its own."""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator

CACHE_MAX_AGE = 3600  # seconds
CLEANUP_EVERY = 600  # seconds
log = logging.getLogger(__name__)


@contextlib.contextmanager
def temporary_cache() -> Iterator[str]:
    """Give Gradio a temporary folder, cleaned while it is open and deleted at the end.

    Build the demo inside, because Gradio reads GRADIO_TEMP_DIR then. Its default folder is shared
    by all Gradio apps of the machine.
    """
    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent:
        os.makedirs(parent, exist_ok=True)
    closed = threading.Event()
    with tempfile.TemporaryDirectory(
        prefix="direct-jump-", dir=parent or None, ignore_cleanup_errors=True
    ) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        threading.Thread(target=clean_regularly, args=(folder, closed), daemon=True).start()
        try:
            yield folder
        finally:
            closed.set()
            os.environ.pop("GRADIO_TEMP_DIR")
            if parent is not None:
                os.environ["GRADIO_TEMP_DIR"] = parent


def clean_regularly(folder: str, closed: threading.Event) -> None:
    """Delete old files every CLEANUP_EVERY seconds until `closed`; log errors and continue.

    gr.Blocks(delete_cache=...) leaves every file's folder behind and stops at the first error.
    """
    while not closed.wait(CLEANUP_EVERY):
        try:
            delete_older_files(folder, time.time() - CACHE_MAX_AGE)
        except Exception:
            log.exception("could not delete all old files in %s", folder)


def delete_older_files(folder: str, before: float) -> None:
    """Delete the files last changed before a time, and the folders that become empty."""
    for path, _folders, names in os.walk(folder, topdown=False):
        # A new empty folder may still be waiting for its file.
        is_old = os.stat(path).st_ctime < before
        for name in names:
            file = os.path.join(path, name)
            # Gradio renames an upload as soon as it is complete.
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(file).st_ctime < before:
                    os.remove(file)
        if is_old and path != folder and not os.listdir(path):
            os.rmdir(path)


def delete_on_sigterm(folder: str) -> None:
    """Delete the folder and exit on SIGTERM; Gradio's own exit waits for open browsers."""

    def terminate(*_: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(143)

    signal.signal(signal.SIGTERM, terminate)
