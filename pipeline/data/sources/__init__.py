"""Open a dataset's rows: an image folder, a zip of one, a table, or a dataset on the Hub."""

import dataclasses
import re
import tempfile
import zipfile
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data.fingerprint import digest
from pipeline.data.sources.image_folder import IMAGE_SUFFIXES, LISTINGS, open_image_folder
from pipeline.data.sources.rows import DataError, Rows, file_stat
from pipeline.data.sources.table import TABLE_SUFFIXES, open_table, saved_dataset

DATASET_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_rows(config: DataConfig, split: str) -> Rows:
    """Return the rows of one split of `config.source`; DataError if it cannot be used."""
    source = Path(config.source)
    try:
        if source.suffix.lower() == ".zip" and source.is_file():
            source = unzip(source, Path(config.cache))
            config = dataclasses.replace(config, source=str(source))
        local = source.exists()
        if is_table(source, split) if local else DATASET_ID.fullmatch(config.source):
            # A folder of tables may define subsets in its README.md.
            has_subsets = source.is_dir() and not saved_dataset(source)
            unused = ["revision"] if has_subsets else ["revision", "subset"]
            require_unset(config, unused if local else [], "is on disk")
            return open_table(config, split)
        unused = ["subset", "revision", "image_column", "streaming"]
        require_unset(config, unused, "is not a table (a parquet file, a folder of them, a Hub id)")
        return open_image_folder(source, split, config.caption_column, config.held_out)
    except PermissionError as error:
        # Other files, such as the Hub's cache, have errors of their own.
        if error.filename is None or not Path(error.filename).is_relative_to(source):
            raise
        raise DataError(
            f"Cannot read {error.filename} of data.source {source}: {error.strerror}. Allow it, "
            "e.g. by chmod -R u+rX."
        ) from error


def unzip(archive: Path, cache: Path) -> Path:
    """Return the folder with an archive's content, which is unpacked into the cache once."""
    folder = cache / "unzipped" / digest(str(archive.absolute()), file_stat(str(archive)))
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            try:
                with zipfile.ZipFile(archive) as opened:
                    opened.extractall(Path(scratch) / "new")
            except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
                raise DataError(f"Cannot unzip {archive}: {error}. Pack it again.") from error
            try:
                (Path(scratch) / "new").rename(folder)
            except OSError:
                # Another process was faster.
                if not folder.is_dir():
                    raise
    # macOS packs its own files beside the content, which often is one folder.
    inside = [path for path in folder.iterdir() if path.name not in ("__MACOSX", ".DS_Store")]
    is_wrapped = len(inside) == 1 and inside[0].is_dir()
    if is_wrapped and any(path.is_dir() or path.name in LISTINGS for path in inside[0].iterdir()):
        return inside[0]
    return folder


def require_unset(config: DataConfig, names: list[str], reason: str) -> None:
    """Raise DataError if one of the settings is set for a source that does not use it."""
    given = [f"data.{name}" for name in names if getattr(config, name) not in (None, False)]
    if given:
        raise DataError(f"Remove {' and '.join(given)}: {config.source} {reason}.")


def is_table(source: Path, split: str) -> bool:
    """Return whether a path is a parquet or WebDataset file, a folder of them, or a saved dataset.

    It is not one if it has a listing of images, or if its folder for the split has images and no
    table.
    """
    if source.is_file():
        return source.suffix.lower() in TABLE_SUFFIXES
    if saved_dataset(source):
        return True
    folders = (source, source / split)
    if any((folder / name).is_file() for folder in folders for name in LISTINGS):
        return False
    in_split = {path.suffix.lower() for path in (source / split).glob("*")}
    if in_split & IMAGE_SUFFIXES and not in_split & TABLE_SUFFIXES.keys():
        return False
    paths = [*source.glob("*"), *source.glob("*/*")]
    return any(path.suffix.lower() in TABLE_SUFFIXES for path in paths)
