"""Captioned rows from a folder of images."""

import csv
import json
from collections.abc import Iterable, Sequence
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
# Endings of a caption's file beside its image.
CAPTION_SUFFIXES = (".txt", ".caption")


def open_image_folder(
    source: Path, split: str, caption_column: str | Sequence[str] | None, held_out: str | None
) -> Rows:
    """Return the images of one split of a folder, with their captions.

    Captions come from `metadata.jsonl` or `metadata.csv` (`caption` or `text`, or
    `caption_column`), else from `name.txt` or `name.caption` beside `name.png`, else from file
    names.
    """
    folder = split_folder(source, split, held_out)
    listing = find_listing(folder)
    above = find_listing(source)
    if above and not listing:
        raise DataError(
            f"{above} is not beside the images of {folder}. Move it there, with file names "
            "relative to that folder."
        )
    if listing:
        rows, notes = listed_rows(folder, listing, caption_column)
    elif caption_column is None:
        rows, notes = unlisted_rows(folder)
    else:
        raise DataError(
            f"caption_column {caption_column!r} needs {' or '.join(LISTINGS)} in {folder}. "
            "Add one, or leave caption_column out."
        )
    if not rows:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{folder} has no images. Give a folder with files ending in {suffixes}.")
    files = [row["image"]["path"] if row["image"] else None for row in rows]
    stamp = digest([(row, file_stat(path)) for row, path in zip(rows, files, strict=True)])
    table = datasets.Dataset.from_list(rows, features=ROW_FEATURES)
    return Rows(table, identity_row, stamp, str(folder), tuple(notes))


def split_folder(source: Path, split: str, held_out: str | None) -> Path:
    """Return the folder of a split: `source/split`, or for train `source` if it has no splits."""
    if not source.is_dir():
        raise DataError(
            f"No image folder at {source}. Give a folder of captioned images, a .parquet file, a "
            "folder of them, or a Hub id like user/name."
        )
    if (source / split).is_dir():
        return source / split
    children = list(source.iterdir())
    known = sorted(p.name for p in children if p.is_dir() and not p.name.startswith("."))
    has_images = any(p.suffix.lower() in IMAGE_SUFFIXES or p.name in LISTINGS for p in children)
    if split == "train" and has_images and not {"test", "validation", held_out} & set(known):
        return source
    raise DataError(explain_missing_split(str(source), split, ", ".join(known) or "no folders"))


def find_listing(folder: Path) -> Path | None:
    """Return the listing of a folder's images, None if it has none."""
    paths = [folder / name for name in LISTINGS]
    return next((path for path in paths if path.is_file()), None)


def visible_files(folder: Path) -> dict[str, Path]:
    """Return all files below a folder by relative name, sorted, without hidden ones."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: path for name, path in files.items() if "/." not in f"/{name}"}


def image_files(files: dict[str, Path]) -> dict[str, Path]:
    """Return those files that are images by their ending."""
    return {name: path for name, path in files.items() if path.suffix.lower() in IMAGE_SUFFIXES}


def listed_rows(
    folder: Path, listing: Path, caption_column: str | Sequence[str] | None
) -> tuple[list[dict], list[str]]:
    """Return (rows, notes) of a folder in the order of its listing."""
    entries = LISTINGS[listing.name](listing)
    if not entries:
        return [], []
    known = {key for entry in entries if isinstance(entry, dict) for key in entry}
    columns = find_columns(listing, known, caption_column)
    rows = [listed_row(listing, line, entry, columns) for line, entry in enumerate(entries, 1)]
    unlisted = image_files(visible_files(folder)).keys() - {row["name"] for row in rows}
    return rows, count_note(unlisted, f"images have no row in {listing}")


def unlisted_rows(folder: Path) -> tuple[list[dict], list[str]]:
    """Return (rows, notes) of a folder, captions from text files or, without any, file names."""
    files = visible_files(folder)
    images = image_files(files)
    texts = {}
    for name, path in images.items():
        candidates = [path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
        text = next((candidate for candidate in candidates if candidate.is_file()), None)
        if text:
            texts[name] = text
    if texts:
        rows = [text_row(name, path, texts.get(name)) for name, path in images.items()]
        kinds = " or ".join(CAPTION_SUFFIXES)
        uncaptioned = images.keys() - texts.keys()
        return rows, count_note(uncaptioned, f"images have no {kinds} beside them: no caption")
    below = next((path for path in files.values() if path.name in LISTINGS), None)
    if below:
        raise DataError(
            f"{below} is below {folder}, where listings are not read. Move it to {folder}, with "
            "file names relative to that folder."
        )
    rows = [
        as_row(name, image_on_disk(path), [path.stem.replace("_", " ")])
        for name, path in images.items()
    ]
    example = next((row["captions"][0] for row in rows if row["captions"]), "")
    absent = f"no {' or '.join(LISTINGS)} and no {' or '.join(CAPTION_SUFFIXES)} files"
    return rows, [f"{absent}: captions are the file names, e.g. {example!r}"]


def count_note(names: Iterable[str], fact: str) -> list[str]:
    """Return one note with the number of names and the first of them, none for no names."""
    ordered = sorted(names)
    return [f"{len(ordered)} {fact}, e.g. {printable(ordered[0])}"] if ordered else []


def read_jsonl(path: Path) -> list[dict | BrokenRow]:
    """Return the objects of a JSON-lines file, with the reason in place of an invalid line."""
    entries: list[dict | BrokenRow] = []
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                entry = BrokenRow(f"expected an object, got {entry!r:.60}")
        # The line is not JSON, or not UTF-8.
        except ValueError as error:
            entry = BrokenRow(str(error))
        entries.append(entry)
    return entries


def read_csv(path: Path) -> list[dict | BrokenRow]:
    """Return the rows of a CSV file with a header, empty cells as None.

    A row with too many cells is replaced by the reason.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            entries = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"Cannot read {path}: {error}. Save it as UTF-8 CSV with a header."
        ) from error
    too_wide = BrokenRow("it has more cells than the header: quote a caption with commas in it")
    return [
        too_wide if None in entry else {key: value or None for key, value in entry.items()}
        for entry in entries
    ]


# The names are those of Hugging Face's image folders.
LISTINGS = {"metadata.jsonl": read_jsonl, "metadata.csv": read_csv}


def listed_row(listing: Path, line: int, entry: dict | BrokenRow, columns: tuple[str, ...]) -> dict:
    """Return one row from an entry of a listing."""
    folder = listing.parent
    where = f"{listing.name}:{line}"
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
    captions = [entry.get(column) for column in columns]
    metadata = {key: value for key, value in entry.items() if key not in columns}
    return as_row(name, image_on_disk(path), captions, metadata=metadata)


def text_row(name: str, path: Path, text: Path | None) -> dict:
    """Return one row from an image and the text file beside it, if any."""
    if text is None:
        return as_row(name, image_on_disk(path), [])
    try:
        return as_row(name, image_on_disk(path), [text.read_text(encoding="utf-8-sig")])
    except UnicodeDecodeError:
        return as_row(name, None, [], f"{text.name} is not UTF-8")


def image_on_disk(path: Path) -> dict:
    """Return a file as `datasets` represents an image."""
    return {"path": str(path), "bytes": None}
