"""Captioned rows, whatever source they come from: an image, captions, and what is wrong with them.

A row is a dict: image ({"bytes", "path"} or None), name, captions (a list), problem ("" for a
usable row) and metadata (JSON).
"""

import errno
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from pipeline.diffusion.captions import normalize

# The last is WebDataset's.
CAPTION_COLUMNS = ("caption", "text", "txt")
# HTTPError is the client's own, also for refused connections.
NETWORK_ERRORS = (ConnectionError, TimeoutError, HTTPError)
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
# Seconds before each new attempt; the Hub's client has already retried for 23 seconds.
READ_WAITS = (2, 8, 30, 60)
UNREADABLE = "its file cannot be read"
ROW_FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "name": datasets.Value("string"),
        "captions": datasets.List(datasets.Value("string")),
        "problem": datasets.Value("string"),
        "metadata": datasets.Value("string"),
    }
)


class DataError(ValueError):
    """Data that cannot be trained on; the message says what to do."""


class Unreachable(DataError):
    """Data that the network does not provide now; the same command may succeed later."""

    exit_code = 1


class Unavailable(OSError):
    """A file that cannot be read, however often it is requested."""


class BrokenRow(ValueError):
    """The reason why one row cannot be used."""


@dataclass(frozen=True)
class Rows:
    """A source's table with `read(example, number)`, which returns a row.

    `stamp` changes with the content; `notes` are sentences for the report.
    """

    table: Any
    """Dataset or IterableDataset"""
    read: Callable[[dict, int], dict]
    stamp: str
    name: str
    notes: tuple[str, ...] = ()


def printable(name: str) -> str:
    """Return a file name that can be printed and stored, whatever bytes it has."""
    return name.encode("utf-8", "backslashreplace").decode()


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def read_captions(values: Iterable[Any]) -> list[str]:
    """Return the captions in a row's caption columns, normalized, without empty ones.

    Raises BrokenRow for anything but text, lists of texts and None.
    """
    captions = []
    for value in values:
        if value is None:
            continue
        texts: list[Any] = value if isinstance(value, list) and value else [value]
        if not all(isinstance(text, str) for text in texts):
            raise BrokenRow(f"its caption must be text or a list of texts, got {value!r:.60}")
        captions += [normalize(text) for text in texts]
    return [caption for caption in captions if caption]


def find_columns(
    where: object, known: Iterable[str], wanted: str | Sequence[str] | None
) -> tuple[str, ...]:
    """Return the names of the caption columns; DataError lists the columns if one is missing."""
    known = sorted(known)
    if wanted is None:
        columns = tuple(name for name in CAPTION_COLUMNS if name in known)[:1]
        missing = [] if columns else list(CAPTION_COLUMNS)
    else:
        columns = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        missing = [name for name in columns if name not in known]
    if missing:
        raise DataError(
            f"{where} has no caption column {' or '.join(map(repr, missing))}. Choose "
            f"data.caption_column from its columns: {', '.join(known) or 'none'}."
        )
    return columns


def as_row(
    name: str,
    image: dict | None,
    captions: Iterable[Any],
    problem: str = "",
    metadata: dict | None = None,
) -> dict:
    """Return a row; what is wrong with its captions or file name becomes its problem."""
    texts = []
    try:
        texts = read_captions(captions)
    except BrokenRow as error:
        problem = str(error)
    else:
        path = (image or {}).get("path") or ""
        if printable(path) != path:
            texts = []
            image = None
            problem = "its file name is not valid UTF-8"
    return {
        "image": image,
        "name": printable(name),
        "captions": texts,
        "problem": printable(problem),
        "metadata": json.dumps({"file_name": name} | (metadata or {})),
    }


def identity_row(row: dict, number: int) -> dict:
    """Return a copy of an example that is already a row."""
    return {**row}


def fetch_image_bytes(image: dict) -> bytes:
    """Return the file of an image, wherever it is.

    Raises ConnectionError if the network may provide it later, Unavailable if it will not.
    """
    if image["bytes"] is not None:
        return image["bytes"]
    if "://" not in image["path"]:
        return Path(image["path"]).read_bytes()
    try:
        opened: Any = fsspec.open(image["path"], "rb")
        with opened as file:
            return file.read()
    except (FileNotFoundError, *NETWORK_ERRORS):
        raise
    # Every file system raises errors of its own; some of aiohttp's have an HTTP status.
    except Exception as error:
        status = getattr(error, "status", None)
        connection_failed = type(error).__module__.startswith("aiohttp") or (
            isinstance(error, OSError) and error.errno != errno.EACCES
        )
        transient = connection_failed if status is None else status in TRANSIENT_STATUS
        kind = ConnectionError if transient else Unavailable
        raise kind(one_line(error)) from error


def read_image_bytes(image: dict) -> bytes:
    """Return the file of an image; BrokenRow starting with UNREADABLE if it cannot be read now."""
    try:
        return fetch_image_bytes(image)
    except (OSError, *NETWORK_ERRORS) as error:
        raise BrokenRow(f"{UNREADABLE}: {one_line(error)}") from error


def with_image_bytes(row: dict) -> dict:
    """Return a row with its image's file; one that is missing or unavailable is its problem."""
    if row["problem"] or row["image"]["bytes"] is not None:
        return row
    try:
        return row | {"image": row["image"] | {"bytes": fetch_image_bytes(row["image"])}}
    except FileNotFoundError as error:
        return row | {"image": None, "problem": f"its file does not exist: {one_line(error)}"}
    except (PermissionError, IsADirectoryError, Unavailable) as error:
        return row | {"image": None, "problem": f"{UNREADABLE}: {one_line(error)}"}


def explain_missing_split(source: str, split: str, known: str) -> str:
    """Return the message for a split of `data.split` or `data.held_out` that does not exist."""
    return (
        f"{source} has no split {split!r}, only {known}. Set --data.split and --data.held_out; "
        "--data.held_out null trains without a held-out split."
    )


def file_stat(path: str | None) -> tuple[int, int] | None:
    """Return size and modification time of a file, None if there is none."""
    if not path:
        return None
    try:
        stat = Path(path).stat()
    # ValueError: a name that no file can have.
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns


def retry_on_network_error(
    attempt: Callable[[], list], source: str, wait: Callable[[float], object] = time.sleep
) -> list:
    """Return `attempt()`, called again after each of READ_WAITS while the network fails.

    Raises Unreachable after the last attempt. Rejected requests (missing files, no access) and
    unreadable files are a DataError at once.
    """
    waits = iter(READ_WAITS)
    while True:
        try:
            return attempt()
        except DataError:
            raise
        except NETWORK_ERRORS as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and status not in TRANSIENT_STATUS:
                raise DataError(f"Cannot read {source}: {one_line(error)}") from error
            seconds = next(waits, None)
            if seconds is None:
                raise Unreachable(
                    f"Cannot read {source} in {len(READ_WAITS) + 1} attempts ({one_line(error)}). "
                    "Run the same command later; it resumes from the latest checkpoint."
                ) from error
            wait(seconds)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(f"Cannot read {source}: {one_line(error)}") from error
