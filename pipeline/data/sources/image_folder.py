"""Captioned rows from a folder of images."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import datasets

from pipeline.data.fingerprint import digest
from pipeline.data.sources.rows import (
    ROW_FEATURES,
    BrokenRow,
    DataError,
    Rows,
    as_row,
    explain_missing_split,
    file_stat,
    find_columns,
    identity_row,
    printable,
)

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}
)
CAPTION_SUFFIXES = (".txt", ".caption")  # a caption's file beside its picture


# ---- image folders


def open_image_folder(
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
            f"{folder} holds no images: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    stamp = digest(
        [(row, file_stat(row["image"]["path"] if row["image"] else None)) for row in rows]
    )
    return Rows(
        datasets.Dataset.from_list(rows, features=ROW_FEATURES),
        identity_row,
        stamp,
        str(folder),
        tuple(notes),
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
    pictures = any(
        p.suffix.lower() in IMAGE_SUFFIXES or p.name in LISTINGS for p in source.iterdir()
    )
    if split == "train" and pictures and not {"test", "validation", held_out} & set(known):
        return source
    raise DataError(explain_missing_split(str(source), split, ", ".join(known) or "no folders"))


def folder_rows(
    folder: Path, caption_column: str | Sequence[str] | None
) -> tuple[list[dict], list[str]]:
    """(rows, notes) of one folder: a row an image, sorted by name, or as metadata.jsonl or metadata.csv lists them."""
    everything = sorted(folder.rglob("*"))
    paths = [p for p in everything if p.suffix.lower() in IMAGE_SUFFIXES]
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
    beside = {
        name: [path.with_suffix(kind) for kind in CAPTION_SUFFIXES] for name, path in files.items()
    }
    texts = {
        name: next(p for p in known if p.is_file())
        for name, known in beside.items()
        if any(p.is_file() for p in known)
    }
    rows = [caption_file_row(name, path, texts) for name, path in files.items()]
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
        places = f"no {' or '.join(LISTINGS)} and no {' or '.join(CAPTION_SUFFIXES)} files"
        return rows, [f"{places}: captions are the file names, e.g. {example!r}"]
    lacking = sorted(files.keys() - texts.keys())
    kinds = " or ".join(CAPTION_SUFFIXES)
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
    return as_row(
        name, image_on_disk(path), [entry.get(column) for column in columns], metadata=metadata
    )


def caption_file_row(name: str, path: Path, texts: dict[str, Path]) -> dict:
    """One row from an image, its caption from the text beside it or, where no image has any, from its own name."""
    if not texts:
        return as_row(name, image_on_disk(path), [path.stem.replace("_", " ")])
    try:
        return as_row(
            name,
            image_on_disk(path),
            [texts[name].read_text(encoding="utf-8-sig")] if name in texts else [],
        )
    except UnicodeDecodeError:
        return as_row(name, None, [], f"{texts[name].name} is not UTF-8")


def image_on_disk(path: Path) -> dict:
    """An image that is a file, as `datasets` has it."""
    return {"path": str(path), "bytes": None}
