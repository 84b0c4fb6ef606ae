"""Captioned rows from parquet, WebDataset or a dataset on the Hub."""

import functools
import re
from pathlib import Path

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import constants

from pipeline.config import DataConfig
from pipeline.data.fingerprint import digest
from pipeline.data.sources.rows import (
    NETWORK_ERRORS,
    DataError,
    Rows,
    as_row,
    explain_missing_split,
    file_stat,
    find_columns,
    one_line,
)

TABLE_SUFFIXES = {
    ".parquet": "parquet",
    ".tar": "webdataset",
}  # a file's ending -> the builder of `datasets` that reads it
PATH_TYPES = ("string", "large_string")  # the types of a column that names files


# ---- tables: parquet and WebDataset files, on disk and on the Hub


def open_table(config: DataConfig, split: str) -> Rows:
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
            raise DataError(
                explain_missing_split(config.source, ", ".join(unknown), ", ".join(known) or "none")
            )
        if config.streaming:
            found = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            found = builder.as_dataset(split=split)
    except DataError:
        raise
    except (*NETWORK_ERRORS, OSError, ValueError, DatasetsError) as error:
        raise DataError(explain_load_error(config, error)) from error
    if found.features is None:
        raise DataError(
            f"the columns of {config.source} are not known before it is read, expected parquet, WebDataset or "
            "an image folder: convert it to one of them"
        )
    image = find_image_column(config, found.features)
    captions = find_columns(config.source, found.features, config.caption_column)
    by_path = value_type(found.features[image]) in PATH_TYPES and not config.streaming
    files = [(path, file_stat(path)) for path in found[image][:]] if by_path else []
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
        kind = TABLE_SUFFIXES[source.suffix.lower()]
        return datasets.load_dataset_builder(
            kind, config.subset, data_files={"train": str(source)}, cache_dir=kept
        )
    return datasets.load_dataset_builder(str(source.absolute()), config.subset, cache_dir=kept)


def explain_load_error(config: DataConfig, error: BaseException) -> str:
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


def find_image_column(config: DataConfig, features: datasets.Features) -> str:
    """The name of the column of images; DataError lists the columns where it is not clear."""
    found = [name for name, feature in features.items() if is_image_feature(feature)]
    wanted = config.image_column
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted in features and (
        is_image_feature(features[wanted])
        or value_type(features[wanted]) in ("binary", "large_binary", *PATH_TYPES)
    ):
        return wanted
    got = f"no column of images {wanted!r}" if wanted else f"{len(found) or 'no'} columns of images"
    columns = ", ".join(f"{name} (images)" if name in found else name for name in features)
    raise DataError(
        f"{config.source} has {got}: it has {columns}; name one of them with data.image_column"
    )


def is_image_feature(feature: object) -> bool:
    """Does a column hold images: as `datasets` writes them, or bytes and path as other tools do?"""
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    )


def value_type(feature: object) -> str | None:
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
    if (
        within
        and not empty
        and picture["bytes"] is None
        and not is_inside_dataset(picture["path"], within)
    ):
        problem = "its file is outside the data set"
    return as_row(
        name, None if problem else picture, [example[column] for column in captions], problem
    )


def is_inside_dataset(path: str, source: str) -> bool:
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
