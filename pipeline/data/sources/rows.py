"""Where captioned rows come from: a folder of images, or a table (parquet, WebDataset) on disk, on the Hub or as a stream.

Each source becomes `Rows`. A row is a dict: image ({"bytes", "path"} or None), name, captions (a list), problem ("" for a
good row) and metadata (JSON).
"""

import errno
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import fsspec
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import (  # HTTPError: the client's own, of refused connections too
    HfHubHTTPError,
    HTTPError,
)

from pipeline.diffusion.captions import normalize

CAPTION_COLUMNS = ("caption", "text")
NETWORK_ERRORS = (ConnectionError, TimeoutError, HTTPError)
TRANSIENT_STATUS = frozenset(
    {408, 429, 500, 502, 503, 504}
)  # answers of a Hub that may say something else later
READ_WAITS = (
    2,
    8,
    30,
    60,
)  # seconds before each new attempt; the client has made six of its own in the 23 seconds before
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
    """Data that cannot be trained on, with what was found and what to do."""


class Unreachable(DataError):
    """Data that a network does not give now; the same command may find it later."""

    exit_code = 1


class Unavailable(OSError):
    """A file that will not be had, however often it is asked for."""


class BrokenRow(ValueError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class Rows:
    """A source's table, with the function that makes a row of one of its examples and of the example's number.

    `stamp` changes with the content. `notes` are what was noticed, a sentence each.
    """

    table: datasets.Dataset | datasets.IterableDataset
    read: Callable[[dict, int], dict]
    stamp: str
    name: str
    notes: tuple[str, ...] = ()


def printable(name: str) -> str:
    """A file name that can be printed and stored, whatever bytes it has."""
    return name.encode("utf-8", "backslashreplace").decode()


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- captions


def read_captions(values: Iterable[object]) -> list[str]:
    """The captions that a row's caption columns hold, without empty ones; [] where none says anything.

    Raises BrokenRow for anything but text, lists of texts and None.
    """
    captions = []
    for value in values:
        texts = value if isinstance(value, list) and value else [] if value is None else [value]
        if not all(isinstance(text, str) for text in texts):
            raise BrokenRow(f"its caption must be text or a list of texts, got {value!r:.60}")
        captions += [normalize(text) for text in texts]
    return [caption for caption in captions if caption]


def find_columns(
    where: object, known: Iterable[str], wanted: str | Sequence[str] | None
) -> tuple[str, ...]:
    """The names of the caption columns; DataError lists the columns if one is not among them."""
    known = sorted(known)
    if wanted is None:
        found = tuple(name for name in CAPTION_COLUMNS if name in known)[:1]
        lacking = [] if found else list(CAPTION_COLUMNS)
    else:
        found = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        lacking = [name for name in found if name not in known]
    if lacking:
        expected = " or ".join(map(repr, lacking))
        raise DataError(
            f"{where} has no caption column {expected}: it has {', '.join(known) or 'none'}; "
            "name one of them with data.caption_column"
        )
    return found


def as_row(
    name: str,
    image: dict | None,
    captions: Iterable[object],
    problem: str = "",
    metadata: dict | None = None,
) -> dict:
    """A row; what cannot be used of it becomes its problem."""
    try:
        texts = read_captions(captions)
        ((image or {}).get("path") or "").encode()
    except UnicodeEncodeError:
        texts, image, problem = [], None, "its file name is not valid UTF-8"
    except BrokenRow as error:
        texts, problem = [], str(error)
    return {
        "image": image,
        "name": printable(name),
        "captions": texts,
        "problem": printable(problem),
        "metadata": json.dumps({"file_name": name} | (metadata or {})),
    }


def identity_row(row: dict, number: int) -> dict:
    """A row that is one already, as a dict of its own."""
    return {**row}


def fetch_image_bytes(image: dict) -> bytes:
    """The file of an image, wherever it is; ConnectionError where a network may have it later, Unavailable where it will not."""
    if image["bytes"] is not None:
        return image["bytes"]
    if "://" not in image["path"]:
        return Path(image["path"]).read_bytes()
    try:
        with fsspec.open(image["path"], "rb") as file:
            return file.read()
    except (FileNotFoundError, *NETWORK_ERRORS):
        raise
    except Exception as error:  # every file system has errors of its own; some of aiohttp's have the answer's status
        answer = getattr(error, "status", None)
        broke_off = type(error).__module__.startswith("aiohttp") or (
            isinstance(error, OSError) and error.errno != errno.EACCES
        )
        later = broke_off if answer is None else answer in TRANSIENT_STATUS
        raise (ConnectionError if later else Unavailable)(one_line(error)) from error


def read_image_bytes(image: dict) -> bytes:
    """The file of an image; BrokenRow, which begins with UNREAD, where it cannot be read now: that says nothing about it."""
    try:
        return fetch_image_bytes(image)
    except (OSError, *NETWORK_ERRORS) as error:
        raise BrokenRow(f"{UNREADABLE}: {one_line(error)}") from error


def with_image_bytes(row: dict) -> dict:
    """A row whose image's file is read; one that is not there, or not for us, is the row's problem."""
    if row["problem"] or row["image"]["bytes"] is not None:
        return row
    try:
        return row | {"image": row["image"] | {"bytes": fetch_image_bytes(row["image"])}}
    except FileNotFoundError as error:
        return row | {"image": None, "problem": f"its file does not exist: {one_line(error)}"}
    except (PermissionError, IsADirectoryError, Unavailable) as error:
        return row | {"image": None, "problem": f"{UNREADABLE}: {one_line(error)}"}


def explain_missing_split(source: str, split: str, known: str) -> str:
    """What to say where a split that `data.split` or `data.held_out` names is not there."""
    return (
        f"{source} has no split {split!r}: it has {known}. Name the splits by --data.split and --data.held_out; "
        "--data.held_out null trains without a held-out one"
    )


def file_stat(path: str | None) -> tuple[int, int] | None:
    """Size and time of a file, None for what is none."""
    if not path:
        return None
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return found.st_size, found.st_mtime_ns


# ---- what a network does


def retry_on_network_error(
    attempt: Callable[[], list], what: str, wait: Callable[[float], object] = time.sleep
) -> list:
    """What `attempt()` returns, called anew after each of WAITS while the network fails; then DataError.

    A Hub that says no (a file that is gone, no access) and files that cannot be read are a DataError at once.
    """
    waits = iter(READ_WAITS)
    while True:
        try:
            return attempt()
        except DataError:
            raise
        except NETWORK_ERRORS as error:
            refused = (
                isinstance(error, HfHubHTTPError)
                and error.response.status_code not in TRANSIENT_STATUS
            )
            seconds = None if refused else next(waits, None)
            if seconds is None:
                tries = "" if refused else f" in {len(READ_WAITS) + 1} attempts"
                kind = DataError if refused else Unreachable
                raise kind(
                    f"cannot read {what}{tries} ({one_line(error)}): run the same command again when that is mended, it "
                    "goes on from the newest checkpoint"
                ) from error
            wait(seconds)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(f"cannot read {what}: {one_line(error)}") from error
