"""Open a dataset's rows: an image folder, a table, or a dataset on the Hub."""

import re
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data.sources.image_folder import IMAGE_SUFFIXES, LISTINGS, open_image_folder
from pipeline.data.sources.rows import DataError, Rows
from pipeline.data.sources.table import TABLE_SUFFIXES, open_table

DATASET_ID = re.compile(r"[\w.-]+/[\w.-]+")


# ---- which source


def open_rows(config: DataConfig, split: str) -> Rows:
    """The rows of one split of `config.source`: a folder of images, a table on disk, or a data set of the Hub."""
    try:
        return find_source(config, split)
    except PermissionError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(config.source):
            raise  # such as the Hub's cache
        raise DataError(
            f"cannot read {error.filename} of data.source {config.source} ({error.strerror}), expected leave to read "
            "it: chmod -R u+rX, say"
        ) from error


def find_source(config: DataConfig, split: str) -> Rows:
    """What `open_rows` opens."""
    source = Path(config.source)
    local = source.exists()
    if not (is_table(source, split) if local else DATASET_ID.fullmatch(config.source)):
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
        return open_image_folder(source, split, config.caption_column, config.held_out)
    for name in (
        ("revision", "subset")[: source.is_file() + 1] if local else ()
    ):  # a folder may have subsets, by its README.md
        if getattr(config, name) is not None:
            raise DataError(
                f"data.{name} has no meaning for {source}, which is on disk: leave it out"
            )
    return open_table(config, split)


def is_table(source: Path, split: str) -> bool:
    """Is this a parquet or WebDataset file, or a folder of them?

    It is no such folder where a listing of pictures lies in it, or its split's own folder holds pictures and no table.
    """
    if source.is_file():
        return source.suffix.lower() in TABLE_SUFFIXES
    kinds = lambda folder, *patterns: {
        path.suffix.lower() for pattern in patterns for path in folder.glob(pattern)
    }
    listed = any(
        (folder / name).is_file() for folder in (source, source / split) for name in LISTINGS
    )
    inside = kinds(source / split, "*")
    pictured = bool(inside & IMAGE_SUFFIXES) and not inside & TABLE_SUFFIXES.keys()
    return bool(kinds(source, "*", "*/*") & TABLE_SUFFIXES.keys()) and not (listed or pictured)
