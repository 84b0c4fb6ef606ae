"""Where captioned rows come from: a folder of images, or a table (parquet, WebDataset) on disk, on the Hub or as a stream.

Each source becomes `Rows`. A row is a dict: image ({"bytes", "path"} or None), name, captions (a list), problem ("" for a
good row) and metadata (JSON).
"""

import csv
import errno
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import fsspec
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import constants
from huggingface_hub.errors import (  # HTTPError: the client's own, of refused connections too
    HfHubHTTPError,
    HTTPError,
)

from pipeline.config import DataConfig
from pipeline.diffusion.captions import normalize

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}
)
TEXTS = (".txt", ".caption")  # a caption's file beside its picture
TABLES = {
    ".parquet": "parquet",
    ".tar": "webdataset",
}  # a file's ending -> the builder of `datasets` that reads it
CAPTION_COLUMNS = ("caption", "text")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NETWORK = (ConnectionError, TimeoutError, HTTPError)
BUSY = frozenset(
    {408, 429, 500, 502, 503, 504}
)  # answers of a Hub that may say something else later
WAITS = (
    2,
    8,
    30,
    60,
)  # seconds before each new attempt; the client has made six of its own in the 23 seconds before
UNREAD = "its file cannot be read"
PATHS = ("string", "large_string")  # the types of a column that names files
FEATURES = datasets.Features(
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


def digest(*parts: object) -> str:
    """16 hexadecimal digits that depend on all parts and on nothing else."""
    return hashlib.blake2b(
        repr(parts).encode("utf-8", "backslashreplace"), digest_size=8
    ).hexdigest()


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


def same(row: dict, number: int) -> dict:
    """A row that is one already, as a dict of its own."""
    return {**row}


def content(image: dict) -> bytes:
    """The file of an image, wherever it is; ConnectionError where a network may have it later, Unavailable where it will not."""
    if image["bytes"] is not None:
        return image["bytes"]
    if "://" not in image["path"]:
        return Path(image["path"]).read_bytes()
    try:
        with fsspec.open(image["path"], "rb") as file:
            return file.read()
    except (FileNotFoundError, *NETWORK):
        raise
    except Exception as error:  # every file system has errors of its own; some of aiohttp's have the answer's status
        answer = getattr(error, "status", None)
        broke_off = type(error).__module__.startswith("aiohttp") or (
            isinstance(error, OSError) and error.errno != errno.EACCES
        )
        later = broke_off if answer is None else answer in BUSY
        raise (ConnectionError if later else Unavailable)(one_line(error)) from error


def content_now(image: dict) -> bytes:
    """The file of an image; BrokenRow, which begins with UNREAD, where it cannot be read now: that says nothing about it."""
    try:
        return content(image)
    except (OSError, *NETWORK) as error:
        raise BrokenRow(f"{UNREAD}: {one_line(error)}") from error


def fetched(row: dict) -> dict:
    """A row whose image's file is read; one that is not there, or not for us, is the row's problem."""
    if row["problem"] or row["image"]["bytes"] is not None:
        return row
    try:
        return row | {"image": row["image"] | {"bytes": content(row["image"])}}
    except FileNotFoundError as error:
        return row | {"image": None, "problem": f"its file does not exist: {one_line(error)}"}
    except (PermissionError, IsADirectoryError, Unavailable) as error:
        return row | {"image": None, "problem": f"{UNREAD}: {one_line(error)}"}


# ---- which source


def open_rows(config: DataConfig, split: str) -> Rows:
    """The rows of one split of `config.source`: a folder of images, a table on disk, or a data set of the Hub."""
    try:
        return rows_of(config, split)
    except PermissionError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(config.source):
            raise  # such as the Hub's cache
        raise DataError(
            f"cannot read {error.filename} of data.source {config.source} ({error.strerror}), expected leave to read "
            "it: chmod -R u+rX, say"
        ) from error


def rows_of(config: DataConfig, split: str) -> Rows:
    """What `open_rows` opens."""
    source = Path(config.source)
    local = source.exists()
    if not (is_table(source, split) if local else HUB_ID.fullmatch(config.source)):
        unused = [
            name
            for name in ("subset", "revision", "image_column")
            if getattr(config, name) is not None
        ]
        if config.streaming or unused:
            names = " and ".join(f"data.{name}" for name in unused or ["streaming"])
            raise DataError(
                f"{names} has no meaning for {source}, which is no table: leave it out, or give a parquet file, "
                "a folder of them, or a Hub id"
            )
        return folder_of_images(source, split, config.caption_column, config.held_out)
    for name in (
        ("revision", "subset")[: source.is_file() + 1] if local else ()
    ):  # a folder may have subsets, by its README.md
        if getattr(config, name) is not None:
            raise DataError(
                f"data.{name} has no meaning for {source}, which is on disk: leave it out"
            )
    return table(config, split)


def is_table(source: Path, split: str) -> bool:
    """Is this a parquet or WebDataset file, or a folder of them?

    It is no such folder where a listing of pictures lies in it, or its split's own folder holds pictures and no table.
    """
    if source.is_file():
        return source.suffix.lower() in TABLES
    kinds = lambda folder, *patterns: {
        path.suffix.lower() for pattern in patterns for path in folder.glob(pattern)
    }
    listed = any(
        (folder / name).is_file() for folder in (source, source / split) for name in LISTINGS
    )
    inside = kinds(source / split, "*")
    pictured = bool(inside & SUFFIXES) and not inside & TABLES.keys()
    return bool(kinds(source, "*", "*/*") & TABLES.keys()) and not (listed or pictured)


# ---- image folders


def folder_of_images(
    source: Path, split: str, caption_column: str | Sequence[str] | None, held_out: str | None
) -> Rows:
    """The images of one split of a folder, with their captions.

    Captions come from `metadata.jsonl` or `metadata.csv` (`caption` or `text`, or `caption_column`), else from `name.txt` or
    `name.caption` beside `name.png`, else from file names.
    """
    folder = split_folder(source, split, held_out)
    for above in (source / name for name in LISTINGS if folder != source):
        if above.is_file() and not any((folder / name).is_file() for name in LISTINGS):
            raise DataError(
                f"{above} is not beside the images of {folder}: move it there, with file names as from there on"
            )
    rows, notes = folder_rows(folder, caption_column)
    if not rows:
        raise DataError(
            f"{folder} holds no images: expected files ending in {', '.join(sorted(SUFFIXES))}"
        )
    stamp = digest([(row, stat(row["image"]["path"] if row["image"] else None)) for row in rows])
    return Rows(
        datasets.Dataset.from_list(rows, features=FEATURES), same, stamp, str(folder), tuple(notes)
    )


def split_folder(source: Path, split: str, held_out: str | None) -> Path:
    """Where a split's images are: `source/split`, or `source` itself for train where no folder in it is a split's."""
    if not source.is_dir():
        raise DataError(
            f"no image folder at {source}: expected a folder of images with captions, a .parquet file, a folder "
            "of them, or a Hub id like user/name"
        )
    if (source / split).is_dir():
        return source / split
    known = sorted(p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    pictures = any(p.suffix.lower() in SUFFIXES or p.name in LISTINGS for p in source.iterdir())
    if split == "train" and pictures and not {"test", "validation", held_out} & set(known):
        return source
    raise DataError(no_split(str(source), split, ", ".join(known) or "no folders"))


def no_split(source: str, split: str, known: str) -> str:
    """What to say where a split that `data.split` or `data.held_out` names is not there."""
    return (
        f"{source} has no split {split!r}: it has {known}. Name the splits by --data.split and --data.held_out; "
        "--data.held_out null trains without a held-out one"
    )


def stat(path: str | None) -> tuple[int, int] | None:
    """Size and time of a file, None for what is none."""
    if not path:
        return None
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return found.st_size, found.st_mtime_ns


def folder_rows(
    folder: Path, caption_column: str | Sequence[str] | None
) -> tuple[list[dict], list[str]]:
    """(rows, notes) of one folder: a row an image, sorted by name, or as metadata.jsonl or metadata.csv lists them."""
    everything = sorted(folder.rglob("*"))
    paths = [p for p in everything if p.suffix.lower() in SUFFIXES]
    files = {p.relative_to(folder).as_posix(): p for p in paths}
    files = {
        name: p
        for name, p in files.items()
        if not any(part.startswith(".") for part in name.split("/"))
    }
    listing = next((folder / name for name in LISTINGS if (folder / name).is_file()), None)
    if listing:
        entries = LISTINGS[listing.name](listing)
        if not entries:
            return [], []
        columns = find_columns(
            listing, {key for e in entries if isinstance(e, dict) for key in e}, caption_column
        )
        rows = [listed_row(listing, i, entry, columns) for i, entry in enumerate(entries, 1)]
        unlisted = sorted(files.keys() - {row["name"] for row in rows})
        return rows, [
            f"{len(unlisted)} images have no row in {listing}, e.g. {printable(unlisted[0])}"
        ] if unlisted else []
    if caption_column is not None:
        raise DataError(
            f"caption_column {caption_column!r} needs {' or '.join(LISTINGS)} in {folder}, which has neither"
        )
    beside = {name: [path.with_suffix(kind) for kind in TEXTS] for name, path in files.items()}
    texts = {
        name: next(p for p in known if p.is_file())
        for name, known in beside.items()
        if any(p.is_file() for p in known)
    }
    rows = [beside_row(name, path, texts) for name, path in files.items()]
    below = [
        p
        for p in everything
        if p.name in LISTINGS and not any(x.startswith(".") for x in p.relative_to(folder).parts)
    ]
    if below and not texts:
        raise DataError(
            f"{below[0]} is below {folder}, where no listing is looked for: make one of it in {folder} itself, with "
            "file names as from there on"
        )
    if rows and not texts:
        example = next((row["captions"][0] for row in rows if row["captions"]), "")
        places = f"no {' or '.join(LISTINGS)} and no {' or '.join(TEXTS)} files"
        return rows, [f"{places}: captions are the file names, e.g. {example!r}"]
    lacking = sorted(files.keys() - texts.keys())
    kinds = " or ".join(TEXTS)
    notes = (
        [
            f"{len(lacking)} images have no {kinds} beside them: no caption, e.g. {printable(lacking[0])}"
        ]
        if lacking
        else []
    )
    return rows, notes


def read_jsonl(path: Path) -> list[dict | BrokenRow]:
    """The objects of a JSON-lines file; a line that is none comes as the reason."""
    entries = []
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entries.append(
                entry
                if isinstance(entry, dict)
                else BrokenRow(f"expected an object, got {entry!r:.60}")
            )
        except ValueError as error:  # not JSON, or not UTF-8
            entries.append(BrokenRow(str(error)))
    return entries


def read_csv(path: Path) -> list[dict | BrokenRow]:
    """The rows of a CSV file with a header, an empty cell as None; a row of too many cells comes as the reason."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            entries = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read ({error}): save it as UTF-8 CSV with a header"
        ) from error
    wide = BrokenRow("it has more cells than the header: quote a caption with commas in it")
    return [
        wide if None in entry else {key: value or None for key, value in entry.items()}
        for entry in entries
    ]


LISTINGS = {"metadata.jsonl": read_jsonl, "metadata.csv": read_csv}  # Hugging Face's image folders


def listed_row(listing: Path, line: int, entry: dict | BrokenRow, columns: tuple[str, ...]) -> dict:
    """One row from an entry of an image folder's listing."""
    folder, where = listing.parent, f"{listing.name}:{line}"
    if isinstance(entry, BrokenRow):
        return as_row(where, None, [], str(entry))
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        return as_row(where, None, [], f"its file_name must be text, got {name!r:.60}")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return as_row(name, None, [], "its file is outside the folder")
    if not path.is_file():
        return as_row(name, None, [], "its file does not exist")
    metadata = {key: value for key, value in entry.items() if key not in columns}
    return as_row(name, on_disk(path), [entry.get(column) for column in columns], metadata=metadata)


def beside_row(name: str, path: Path, texts: dict[str, Path]) -> dict:
    """One row from an image, its caption from the text beside it or, where no image has any, from its own name."""
    if not texts:
        return as_row(name, on_disk(path), [path.stem.replace("_", " ")])
    try:
        return as_row(
            name,
            on_disk(path),
            [texts[name].read_text(encoding="utf-8-sig")] if name in texts else [],
        )
    except UnicodeDecodeError:
        return as_row(name, None, [], f"{texts[name].name} is not UTF-8")


def on_disk(path: Path) -> dict:
    """An image that is a file, as `datasets` has it."""
    return {"path": str(path), "bytes": None}


# ---- tables: parquet and WebDataset files, on disk and on the Hub


def table(config: DataConfig, split: str) -> Rows:
    """One split of a table, of pictures that are not decoded yet; it is downloaded, unless `config.streaming`.

    DataError says which splits and columns there are, that the data set is unknown, or that the Hub is out of reach.
    """
    try:
        builder = open_builder(config)
        if isinstance(builder, Cache) and not builder.hash.startswith(config.revision or ""):
            raise DataError(
                f"the Hub is out of reach and the newest version of {config.source} in the cache is commit "
                f"{builder.hash}, which may not be revision {config.revision!r}: connect, or make data.revision "
                "that commit"
            )
        known = list(builder.info.splits or builder.config.data_files or ())
        unknown = [
            name
            for name in (part.split("[")[0].strip() for part in split.split("+"))
            if name not in known
        ]
        if unknown:
            raise DataError(no_split(config.source, ", ".join(unknown), ", ".join(known) or "none"))
        if config.streaming:
            found = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            found = builder.as_dataset(split=split)
    except DataError:
        raise
    except (*NETWORK, OSError, ValueError, DatasetsError) as error:
        raise DataError(why_not(config, error)) from error
    if found.features is None:
        raise DataError(
            f"the columns of {config.source} are not known before it is read, expected parquet, WebDataset or "
            "an image folder: convert it to one of them"
        )
    image = image_column(config, found.features)
    captions = find_columns(config.source, found.features, config.caption_column)
    by_path = kind_of(found.features[image]) in PATHS and not config.streaming
    files = [(path, stat(path)) for path in found[image][:]] if by_path else []
    found = found.select_columns([image, *(c for c in captions if c != image)])
    found = found.cast_column(image, datasets.Image(decode=False))
    within = None if Path(config.source).exists() else config.source
    read = functools.partial(table_row, image=image, captions=captions, within=within)
    name = f"{config.source} ({split})"
    return Rows(found, read, digest(str(builder.cache_dir), split, image, captions, *files), name)


def open_builder(config: DataConfig) -> datasets.DatasetBuilder:
    """The builder of `datasets` for a file, a folder of files, or a Hub id, whose downloads go to the user's own cache."""
    source = Path(config.source)
    if not source.exists():
        return datasets.load_dataset_builder(config.source, config.subset, revision=config.revision)
    kept = str(Path(config.cache) / "tables")
    if source.is_file():
        kind = TABLES[source.suffix.lower()]
        return datasets.load_dataset_builder(
            kind, config.subset, data_files={"train": str(source)}, cache_dir=kept
        )
    return datasets.load_dataset_builder(str(source.absolute()), config.subset, cache_dir=kept)


def why_not(config: DataConfig, error: BaseException) -> str:
    """One sentence on why a table cannot be opened."""
    source = repr(config.source)
    if isinstance(error, DatasetNotFoundError):
        return (
            f"there is no data set {source} on the Hub ({one_line(error)}) and no folder or file of that name here: "
            "check data.source and data.revision, or log in with `hf auth login` if it is private"
        )
    if isinstance(error, ConnectionError):
        return (
            f"data set {source} is neither here nor in the cache, and the Hub is out of reach ({one_line(error)}): "
            "connect once to download it, or give a folder on disk"
        )
    return f"cannot read {source}: {one_line(error.__cause__ or error)}"


def image_column(config: DataConfig, features: datasets.Features) -> str:
    """The name of the column of images; DataError lists the columns where it is not clear."""
    found = [name for name, feature in features.items() if is_image(feature)]
    wanted = config.image_column
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted in features and (
        is_image(features[wanted])
        or kind_of(features[wanted]) in ("binary", "large_binary", *PATHS)
    ):
        return wanted
    got = f"no column of images {wanted!r}" if wanted else f"{len(found) or 'no'} columns of images"
    columns = ", ".join(f"{name} (images)" if name in found else name for name in features)
    raise DataError(
        f"{config.source} has {got}: it has {columns}; name one of them with data.image_column"
    )


def is_image(feature: object) -> bool:
    """Does a column hold images: as `datasets` writes them, or bytes and path as other tools do?"""
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    )


def kind_of(feature: object) -> str | None:
    """The type of a column's plain values, None where it holds none."""
    return getattr(feature, "dtype", None)


def table_row(
    example: dict, number: int, image: str, captions: tuple[str, ...], within: str | None = None
) -> dict:
    """One row of a table; of a data set of the Hub, `within`, none whose picture is a file of something else."""
    picture = example[image]
    empty = picture is None or (picture["bytes"] is None and not picture["path"])
    name = f"row {number}" if empty or not picture["path"] else Path(picture["path"]).name
    problem = "it has no image" if empty else ""
    if within and not empty and picture["bytes"] is None and not belongs(picture["path"], within):
        problem = "its file is outside the data set"
    return as_row(
        name, None if problem else picture, [example[column] for column in captions], problem
    )


def belongs(path: str, source: str) -> bool:
    """Is a file one of a data set of the Hub, there or in the caches? Its tables may name any file and any URL."""
    if "://" in path:
        return (
            re.match(rf"hf://datasets/{re.escape(source)}[@/]", path.rpartition("::")[2])
            is not None
        )
    caches = (
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        constants.HF_HUB_CACHE,
    )
    return any(Path(path).resolve().is_relative_to(Path(cache).resolve()) for cache in caches)


# ---- what a network does


def retried(
    attempt: Callable[[], list], what: str, wait: Callable[[float], object] = time.sleep
) -> list:
    """What `attempt()` returns, called anew after each of WAITS while the network fails; then DataError.

    A Hub that says no (a file that is gone, no access) and files that cannot be read are a DataError at once.
    """
    waits = iter(WAITS)
    while True:
        try:
            return attempt()
        except DataError:
            raise
        except NETWORK as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code not in BUSY
            seconds = None if refused else next(waits, None)
            if seconds is None:
                tries = "" if refused else f" in {len(WAITS) + 1} attempts"
                kind = DataError if refused else Unreachable
                raise kind(
                    f"cannot read {what}{tries} ({one_line(error)}): run the same command again when that is mended, it "
                    "goes on from the newest checkpoint"
                ) from error
            wait(seconds)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(f"cannot read {what}: {one_line(error)}") from error
