"""Captioned rows from a folder of images."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import datasets

from pipeline.data.fingerprint import digest
from pipeline.data.sources.names import REPEATS_FOLDER, class_captions, name_caption
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
# Images that Pillow cannot read without a plugin.
UNREADABLE_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw"}
)
# Keys of a listing under which an image's file may be.
FILE_KEYS = ("file_name", "file", "image")
# Endings of a caption's file beside its image.
CAPTION_SUFFIXES = (".txt", ".caption")


def open_image_folder(
    source: Path, split: str, caption_column: str | Sequence[str] | None, held_out: str | None
) -> Rows:
    """Return the images of one split of a folder, with their captions.

    Captions come from `metadata.jsonl`, `metadata.csv` or `captions.json` (`caption` or `text`, or
    `caption_column`), else from `name.txt` or `name.caption` beside `name.png`, else from class
    folders, else from file names.
    """
    folder = split_folder(source, split, held_out)
    files = visible_files(folder)
    listing = find_listing(folder)
    above = find_listing(source)
    if above and not listing:
        raise DataError(
            f"{above} is not beside the images of {folder}. Move it there, with file names "
            "relative to that folder."
        )
    if listing:
        rows, notes = listed_rows(files, listing, caption_column)
    elif caption_column is None:
        rows, notes = unlisted_rows(folder, files)
    else:
        raise DataError(
            f"caption_column {caption_column!r} needs {' or '.join(LISTINGS)} in {folder}. "
            "Add one, or leave caption_column out."
        )
    unreadable = with_suffix(files, UNREADABLE_SUFFIXES).keys() - {row["name"] for row in rows}
    fact = "images are of kinds that cannot be read here (convert them to JPEG or PNG)"
    notes += count_note(unreadable, fact)
    if not rows:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        found = "".join(f" {note}." for note in notes)
        raise DataError(
            f"{folder} has no images. Give a folder with files ending in {suffixes}.{found}"
        )
    paths = [row["image"]["path"] if row["image"] else None for row in rows]
    stamp = digest([(row, file_stat(path)) for row, path in zip(rows, paths, strict=True)])
    table = datasets.Dataset.from_list(rows, features=ROW_FEATURES)
    return Rows(table, identity_row, stamp, str(folder), tuple(notes))


def split_folder(source: Path, split: str, held_out: str | None) -> Path:
    """Return the folder of a split: `source/split`, or for train `source` if it has no splits."""
    if not source.is_dir():
        raise DataError(
            f"No image folder at {source}. Give a folder or .zip of captioned images, a .parquet "
            "file, a folder of them, or a Hub id like user/name."
        )
    if (source / split).is_dir():
        return source / split
    children = [path for path in source.iterdir() if not path.name.startswith(".")]
    known = sorted(path.name for path in children if path.is_dir())
    # Class folders may lie at the top level.
    candidates = [*children, *(path for name in known for path in (source / name).iterdir())]
    kinds = IMAGE_SUFFIXES | UNREADABLE_SUFFIXES
    has_images = any(p.suffix.lower() in kinds or p.name in LISTINGS for p in candidates)
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


def with_suffix(files: dict[str, Path], suffixes: frozenset[str]) -> dict[str, Path]:
    """Return those files that have one of some endings, in lower or upper case."""
    return {name: path for name, path in files.items() if path.suffix.lower() in suffixes}


def listed_rows(
    files: dict[str, Path], listing: Path, caption_column: str | Sequence[str] | None
) -> tuple[list[dict], list[str]]:
    """Return (rows, notes) of a folder's files in the order of its listing."""
    entries = LISTINGS[listing.name](listing)
    if not entries:
        return [], []
    known = {key for entry in entries if isinstance(entry, dict) for key in entry}
    columns = find_columns(listing, known, caption_column)
    rows = [listed_row(listing, line, entry, columns) for line, entry in enumerate(entries, 1)]
    unlisted = with_suffix(files, IMAGE_SUFFIXES).keys() - {row["name"] for row in rows}
    return rows, count_note(unlisted, f"images have no row in {listing}")


def unlisted_rows(folder: Path, files: dict[str, Path]) -> tuple[list[dict], list[str]]:
    """Return (rows, notes) of a folder, captions from text files or, without any, from names."""
    images = with_suffix(files, IMAGE_SUFFIXES)
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
    return named_rows(folder, images) if images else ([], [])


def named_rows(folder: Path, images: dict[str, Path]) -> tuple[list[dict], list[str]]:
    """Return (rows, notes) of images with the names of class folders or of files as captions.

    DataError if names such as IMG_0001 carry no caption.
    """
    captions = class_captions(images)
    kind = "folder" if captions else "file"
    captions = captions or {name: name_caption(path.stem) for name, path in images.items()}
    nameless = [name for name, caption in captions.items() if not caption]
    if nameless:
        example = Path(nameless[0]).name
        fix = json.dumps({example: "a caption"})
        raise DataError(
            f"{len(nameless)} of {len(images)} images in {folder} have no caption: file names such "
            f"as {printable(example)} carry none. Write captions.json there ({fix}), or put a .txt "
            "file beside each image, or sort the images into folders named by what they show."
        )
    example = printable(next(iter(captions.values())))
    absent = f"no {' or '.join(LISTINGS)} and no {' or '.join(CAPTION_SUFFIXES)} files"
    notes = [f"{absent}: captions are the {kind} names, e.g. {example!r}"]
    parents = (PurePosixPath(name).parent.name for name in images)
    repeated = next(filter(REPEATS_FOLDER.fullmatch, parents), None)
    if repeated and kind == "folder":
        notes.append(f"folders such as {repeated} ask for repeats: each image is used once instead")
    rows = [as_row(name, image_on_disk(path), [captions[name]]) for name, path in images.items()]
    return rows, notes


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


def read_captions_json(path: Path) -> list[dict | BrokenRow]:
    """Return the entries of {file: caption} or of a list of {"file_name": ..., "caption": ...}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict | list):
            raise ValueError(f"got {content!r:.60}")
    # The file is not JSON, or not UTF-8.
    except ValueError as error:
        fix = 'Write {"a.png": "a caption"}, in UTF-8.'
        raise DataError(f"Cannot read {path}: {error}. {fix}") from error
    if isinstance(content, dict):
        return [{"file_name": name, "caption": caption} for name, caption in content.items()]
    return [
        entry if isinstance(entry, dict) else BrokenRow(f"expected an object, got {entry!r:.60}")
        for entry in content
    ]


# The first two are those of Hugging Face's image folders.
LISTINGS = {
    "metadata.jsonl": read_jsonl,
    "metadata.csv": read_csv,
    "captions.json": read_captions_json,
}


def listed_row(listing: Path, line: int, entry: dict | BrokenRow, columns: tuple[str, ...]) -> dict:
    """Return one row from an entry of a listing."""
    folder = listing.parent
    where = f"{listing.name}:{line}"
    if isinstance(entry, BrokenRow):
        return as_row(where, None, [], str(entry))
    name = next((entry[key] for key in FILE_KEYS if key in entry), None)
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
