"""Captioned rows from parquet, WebDataset, `save_to_disk` or a dataset on the Hub."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import config as datasets_config
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import constants

from pipeline.config import DataConfig
from pipeline.data.fingerprint import digest
from pipeline.data.sources.rows import (
    CAPTION_COLUMNS,
    NETWORK_ERRORS,
    DataError,
    Rows,
    as_row,
    explain_missing_split,
    file_stat,
    find_columns,
    one_line,
)

# A file's ending -> the builder of `datasets` that reads it.
TABLE_SUFFIXES = {".parquet": "parquet", ".tar": "webdataset"}
# The types of a column with file names, and of one with files.
PATH_TYPES = ("string", "large_string")
BYTES_TYPES = ("binary", "large_binary")


def open_table(config: DataConfig, split: str) -> Rows:
    """Return one split of a table, its images not decoded; downloaded unless `config.streaming`.

    DataError lists the splits and columns there are, or says that the dataset is unknown or that
    the Hub is out of reach.
    """
    try:
        table, content = load_saved(config, split) or load_built(config, split)
    except DataError:
        raise
    except (*NETWORK_ERRORS, OSError, ValueError, DatasetsError) as error:
        raise DataError(explain_load_error(config, error)) from error
    if table.features is None:
        raise DataError(
            f"The columns of {config.source} are unknown before it is read. Convert it to parquet, "
            "WebDataset or an image folder."
        )
    image = find_image_column(config, table.features)
    classes = {
        name: [label.replace("_", " ") for label in feature.names]
        for name, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    wanted = config.caption_column
    notes = []
    if wanted is None and len(classes) == 1 and not set(CAPTION_COLUMNS) & set(table.features):
        (wanted,) = classes
        notes.append(f"no caption column: captions are the class names of the column {wanted!r}")
    captions = find_columns(config.source, table.features, wanted)
    files = []
    if value_type(table.features[image]) in PATH_TYPES and not config.streaming:
        files = [(path, file_stat(path)) for path in table[image][:]]
    table = table.select_columns([image, *(name for name in captions if name != image)])
    table = table.cast_column(image, datasets.Image(decode=False))
    hub_id = None if Path(config.source).exists() else config.source
    classes = {name: classes[name] for name in captions if name in classes}
    read = functools.partial(
        table_row, image=image, captions=captions, hub_id=hub_id, classes=classes
    )
    stamp = digest(content, split, image, captions, *files, *classes.items())
    return Rows(table, read, stamp, f"{config.source} ({split})", tuple(notes))


def saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` of a Dataset or a DatasetDict wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def load_saved(config: DataConfig, split: str) -> tuple[Any, str] | None:
    """Return one split of what `save_to_disk` wrote, and what its content depends on; else None.

    A Dataset is the split `train`.
    """
    folder = Path(config.source)
    if not saved_dataset(folder):
        return None
    saved = datasets.load_from_disk(folder)
    splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    rows = {str(name): len(table) for name, table in splits.items()}
    require_split(rows, config.source, split)
    parts = [
        splits[part.splitname].select(range(part.from_, part.to))
        for part in datasets.ReadInstruction.from_spec(split).to_absolute(rows)
    ]
    table = datasets.concatenate_datasets(parts)
    files = [(str(path), file_stat(str(path))) for path in sorted(folder.rglob("*"))]
    return table.to_iterable_dataset() if config.streaming else table, digest(*files)


def load_built(config: DataConfig, split: str) -> tuple[Any, str]:
    """Return one split of a file, a folder of files or a Hub id, and what it depends on."""
    builder = open_builder(config)
    require_revision(builder, config)
    known = builder.info.splits or builder.config.data_files or ()
    require_split(known, config.source, split)
    if config.streaming:
        return builder.as_streaming_dataset(split=split), str(builder.cache_dir)
    builder.download_and_prepare()
    return builder.as_dataset(split=split), str(builder.cache_dir)


def open_builder(config: DataConfig) -> datasets.DatasetBuilder:
    """Return the builder of a file, a folder of files, or a Hub id.

    Downloads from the Hub go to the user's own cache.
    """
    source = Path(config.source)
    if not source.exists():
        return datasets.load_dataset_builder(config.source, config.subset, revision=config.revision)
    options = {"name": config.subset, "cache_dir": str(Path(config.cache) / "tables")}
    if source.is_file():
        options["data_files"] = {"train": str(source)}
        return datasets.load_dataset_builder(TABLE_SUFFIXES[source.suffix.lower()], **options)
    return datasets.load_dataset_builder(str(source.absolute()), **options)


def require_revision(builder: datasets.DatasetBuilder, config: DataConfig) -> None:
    """Raise DataError if an offline cache may hold another revision than the requested one."""
    if isinstance(builder, Cache) and not str(builder.hash).startswith(config.revision or ""):
        raise DataError(
            f"The Hub is out of reach, and the cached commit {builder.hash} of {config.source} may "
            f"not be revision {config.revision!r}. Connect, or set data.revision to that commit."
        )


def require_split(known: Iterable[str], source: str, split: str) -> None:
    """Raise DataError for a split, such as `train[:95%]+test`, that a dataset does not have."""
    known = list(known)
    names = [part.split("[")[0].strip() for part in split.split("+")]
    unknown = [name for name in names if name not in known]
    if unknown:
        available = ", ".join(known) or "none"
        raise DataError(explain_missing_split(source, ", ".join(unknown), available))


def explain_load_error(config: DataConfig, error: BaseException) -> str:
    """Return one message on why a table cannot be opened."""
    source = repr(config.source)
    if isinstance(error, DatasetNotFoundError):
        return (
            f"{source} is neither a dataset on the Hub nor a path ({one_line(error)}). Check "
            "data.source and data.revision, or run `hf auth login` if it is private."
        )
    if isinstance(error, ConnectionError):
        return (
            f"Dataset {source} is not cached, and the Hub is out of reach ({one_line(error)}). "
            "Connect once to download it, or give a folder on disk."
        )
    return f"Cannot read {source}: {one_line(error.__cause__ or error)}"


def find_image_column(config: DataConfig, features: datasets.Features) -> str:
    """Return the name of the column of images; DataError lists the columns if it is not clear."""
    candidates = [name for name, feature in features.items() if is_image_feature(feature)]
    wanted = config.image_column
    if wanted is None and len(candidates) == 1:
        return candidates[0]
    if wanted and wanted in features:
        plain_type = value_type(features[wanted])
        if wanted in candidates or plain_type in (*BYTES_TYPES, *PATH_TYPES):
            return wanted
    got = f"no image column {wanted!r}" if wanted else f"{len(candidates)} image columns"
    columns = ", ".join(f"{name} (images)" if name in candidates else name for name in features)
    raise DataError(f"{config.source} has {got}. Choose data.image_column from: {columns}.")


def is_image_feature(feature: object) -> bool:
    """Return whether a column holds images as `datasets` or other tools write them."""
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    return isinstance(feature, datasets.Image)


def value_type(feature: object) -> str | None:
    """Return the type of a column's plain values, None if it has none."""
    return getattr(feature, "dtype", None)


def table_row(
    example: dict,
    number: int,
    image: str,
    captions: tuple[str, ...],
    hub_id: str | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> dict:
    """Return one row of a table; one of a Hub dataset may not refer to files outside it.

    classes: the names of the classes in each caption column of labels; label -1 is no caption.
    """
    content = example[image]
    texts = [example[column] for column in captions]
    for i, column in enumerate(captions):
        if classes and column in classes and texts[i] is not None:
            texts[i] = classes[column][texts[i]] if texts[i] >= 0 else None
    if content is None or (content["bytes"] is None and not content["path"]):
        return as_row(f"row {number}", None, texts, "it has no image")
    name = Path(content["path"]).name if content["path"] else f"row {number}"
    if hub_id and content["bytes"] is None and not is_inside_dataset(content["path"], hub_id):
        return as_row(name, None, texts, "its file is outside the dataset")
    return as_row(name, content, texts)


def is_inside_dataset(path: str, hub_id: str) -> bool:
    """Return whether a file belongs to a Hub dataset, on the Hub or in the caches.

    A table from the Hub may name any file on this machine and any URL.
    """
    if "://" in path:
        own_url = rf"hf://datasets/{re.escape(hub_id)}[@/]"
        return re.match(own_url, path.rpartition("::")[2]) is not None
    caches = (
        datasets_config.HF_DATASETS_CACHE,
        datasets_config.DOWNLOADED_DATASETS_PATH,
        constants.HF_HUB_CACHE,
    )
    return any(Path(path).resolve().is_relative_to(Path(cache).resolve()) for cache in caches)
