"""Captioned images by row, prepared once by `Dataset.map` into a memory-mapped Arrow file.

A stream is too long for that: its first rows represent it here, and `streaming.py` reads it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Self

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config import DataConfig
from pipeline.data.emoji.embedded import EMBEDDED_SETS, write_embedded
from pipeline.data.fingerprint import digest
from pipeline.data.image_ops import DECODE_VERSION, DECODER_THREADS, decoder_pool, prepare_rows
from pipeline.data.map_cache import cache_file, cached_map, read_arrays
from pipeline.data.sources import open_rows
from pipeline.data.sources.rows import (
    ROW_FEATURES,
    UNREADABLE,
    BrokenRow,
    DataError,
    Rows,
    identity_row,
    read_image_bytes,
    retry_on_network_error,
    with_image_bytes,
)
from pipeline.hardware import available_cores
from pipeline.randomness import Slots, caption_choice

# Broken rows that a report names.
REPORTED_ROWS = 5
# Rows that represent a stream.
PREVIEW_ROWS = 512
PREPARED_FEATURES = datasets.Features(
    {
        **{name: feature for name, feature in ROW_FEATURES.items() if name != "image"},
        "pixels": datasets.Value("binary"),
        "side": datasets.Value("int32"),
        "hash": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class DatasetReport:
    """Summary of a source: its number of rows, the broken ones as (name, reason), and notes."""

    source: str
    rows: int
    broken: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        usable = self.rows - len(self.broken)
        lines = [f"{self.source}: {usable} of {self.rows} images usable", *self.notes]
        if self.broken:
            kinds = Counter(re.split("[:,]", reason)[0] for _, reason in self.broken)
            counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
            lines.append(f"{len(self.broken)} broken rows: {counts}")
        lines += [f"  skipped {name}: {reason}" for name, reason in self.broken[:REPORTED_ROWS]]
        if len(self.broken) > REPORTED_ROWS:
            lines.append(f"  skipped {len(self.broken) - REPORTED_ROWS} more")
        return "\n".join(lines)


class Images(Sequence):
    """Pixels on disk: uint8 (3, H, W) for an integer row, (B, 3, H, W) for several rows."""

    def __init__(self, dataset: datasets.Dataset, resolution: int) -> None:
        self.dataset = dataset.with_format("arrow")
        self.shape = (len(dataset), 3, resolution, resolution)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        if isinstance(rows, int) or (isinstance(rows, Tensor) and rows.ndim == 0):
            return self[[int(rows)]][0]
        index = [int(row) for row in rows]
        return read_arrays(self.dataset, "pixels", index, np.uint8, self.shape[1:])


@dataclass(frozen=True)
class CaptionedImages:
    """N images, the captions of each (`alternatives`, at least one), and their metadata.

    `fingerprint` is a digest of pixels and captions and `pixels` of the pixels alone; neither
    depends on file names.
    """

    images: Images
    alternatives: list[list[str]]
    metadata: list[dict]
    fingerprint: str
    pixels: str
    report: DatasetReport

    def __len__(self) -> int:
        return len(self.alternatives)

    @property
    def captions(self) -> list[str]:
        """The first caption of each row."""
        return [captions[0] for captions in self.alternatives]

    @property
    def all_captions(self) -> list[str]:
        """The captions of all rows in turn, (M,), as `first` and `counts` index them."""
        return list(itertools.chain.from_iterable(self.alternatives))

    @functools.cached_property
    def counts(self) -> Tensor:
        """The number of captions of each row, (N,)."""
        return torch.tensor([len(captions) for captions in self.alternatives])

    @functools.cached_property
    def first(self) -> Tensor:
        """The index of each row's first caption in `all_captions`, (N,)."""
        return self.counts.cumsum(0) - self.counts

    def caption_rows(self, seed: int, step: int, slots: Slots, rows: Tensor) -> Tensor:
        """Return which of `all_captions` the examples at `slots` use, (B,), given their rows."""
        return self.first[rows] + caption_choice(seed, step, slots, self.counts[rows])

    def with_caption_lengths(self, tokenizer: PreTrainedTokenizerBase, length: int) -> Self:
        """Return the same images with caption lengths in the report: tokens, and cut captions."""
        distinct = sorted(set(self.all_captions))
        encoded = tokenizer(distinct, truncation=False, verbose=False).input_ids
        tokens = [len(ids) for ids in encoded]
        cut = [caption for caption, n in zip(distinct, tokens, strict=True) if n > length]
        note = f"captions of {format_range(tokens)} tokens"
        if cut:
            note += f"; {len(cut)} of {len(distinct)} are cut at {length}, e.g. {cut[0]!r:.200}"
        report = dataclasses.replace(self.report, notes=(*self.report.notes, note))
        return dataclasses.replace(self, report=report)


def load_splits(
    config: DataConfig, retry_failed: bool = False
) -> tuple[CaptionedImages, CaptionedImages | None]:
    """Return the training and held-out splits; an embedded dataset is written first.

    `retry_failed` reads files again that could not be read before. A resumed run and its
    evaluation leave it off, to keep the images that the run began with.
    """
    if config.source in EMBEDDED_SETS:
        written = write_embedded(config.source, config.cache, config.resolution)
        config = dataclasses.replace(config, source=str(written))
    train = load_split(config, config.split, retry_failed)
    if not config.held_out:
        return train, None
    # Measurements use the same pixels whatever crop is trained on.
    centred = dataclasses.replace(config, crop="center")
    return train, load_split(centred, config.held_out, retry_failed)


def load_kept(config: DataConfig, retry_failed: bool = False) -> CaptionedImages | None:
    """Return the images of `data.keep`, None without it: prepared as those of `data.source`."""
    if config.keep is None:
        return None
    own = {"split": "train", "held_out": None, "keep": None}
    # These name parts of data.source.
    theirs = dict.fromkeys(("subset", "revision", "image_column", "caption_column"))
    kept = dataclasses.replace(config, source=config.keep.source, **own, **theirs)
    return load_splits(kept, retry_failed)[0]


def concatenate(first: CaptionedImages, second: CaptionedImages) -> CaptionedImages:
    """Return the rows of two datasets of one resolution in turn, with both reports."""
    tables = [first.images.dataset, second.images.dataset]
    notes = (*first.report.notes, *str(second.report).splitlines())
    return CaptionedImages(
        Images(datasets.concatenate_datasets(tables), first.images.shape[-1]),
        first.alternatives + second.alternatives,
        first.metadata + second.metadata,
        digest(first.fingerprint, second.fingerprint),
        digest(first.pixels, second.pixels),
        dataclasses.replace(first.report, notes=notes),
    )


def load_split(config: DataConfig, split: str, retry_failed: bool = True) -> CaptionedImages:
    """Return one split, prepared; of a stream, its first PREVIEW_ROWS rows."""
    rows = open_rows(config, split)
    return prepare_images(preview_rows(rows) if config.streaming else rows, config, retry_failed)


def preview_rows(rows: Rows) -> Rows:
    """Return the first PREVIEW_ROWS rows of a stream, in memory."""

    def read() -> list[dict]:
        examples = enumerate(rows.table.take(PREVIEW_ROWS))
        return [with_image_bytes(rows.read(example, number)) for number, example in examples]

    preview = retry_on_network_error(read, rows.name)
    require_rows(preview, rows.name)
    hashed = [row | {"image": image_digest(row["image"])} for row in preview]
    table = datasets.Dataset.from_list(preview, features=ROW_FEATURES)
    name = f"{rows.name}, the first {len(preview)} rows of a stream"
    return Rows(table, identity_row, digest(hashed), name, rows.notes)


def image_digest(image: dict | None) -> str:
    """Return a digest of an image's file, "" if it was not read."""
    if image is None or image["bytes"] is None:
        return ""
    return hashlib.blake2b(image["bytes"]).hexdigest()


def require_rows(rows: Sized, source: str) -> None:
    """Raise DataError for a source without rows."""
    if not len(rows):
        raise DataError(f"{source} has no rows. Give a source with captioned images.")


def prepare_images(rows: Rows, config: DataConfig, retry_failed: bool = True) -> CaptionedImages:
    """Return a table's images, decoded once; broken rows are left out.

    Rows without a caption get the empty one or are left out (`missing_caption`). DataError if more
    rows than `max_broken` are broken or none is left.
    """
    require_rows(rows.table, rows.name)
    prepared = prepare_table(rows, config, retry_failed)
    problems = prepared["problem"][:]
    captions = prepared["captions"][:]
    named = zip(prepared["name"], problems, strict=True)
    broken = tuple((name, problem) for name, problem in named if problem)
    good = [i for i, problem in enumerate(problems) if not problem]
    uncaptioned = sum(not captions[i] for i in good)
    notes = list(rows.notes)
    if config.missing_caption == "skip":
        good = [i for i in good if captions[i]]
    usable = prepared.select(good)
    if good:
        notes += dataset_notes(usable, config.resolution)
    if uncaptioned:
        left_out = config.missing_caption == "skip"
        treatment = "no caption and are left out" if left_out else "an empty caption"
        notes.append(f"{uncaptioned} images have {treatment}")
    report = DatasetReport(rows.name, len(problems), broken, tuple(notes))
    if len(broken) > config.max_broken * len(problems):
        raise DataError(
            f"{report}\n{len(broken)} of {len(problems)} rows are broken, more than "
            f"data.max_broken allows ({config.max_broken:.0%}). Repair or remove them."
        )
    if not good:
        raise DataError(
            f"{report}\nNo usable row is left. Repair the broken ones, or use images without a "
            "caption: data.missing_caption: empty."
        )
    images = Images(usable.select_columns("pixels"), config.resolution)
    alternatives = [captions[i] or [""] for i in good]
    hashes = usable["hash"][:]
    return CaptionedImages(
        images,
        alternatives,
        metadata=[json.loads(text) for text in usable["metadata"]],
        fingerprint=digest(images.shape, alternatives, hashes),
        pixels=digest(images.shape, hashes),
        report=report,
    )


def prepare_table(rows: Rows, config: DataConfig, retry_failed: bool) -> datasets.Dataset:
    """Return all rows of a table with decoded pixels, cached by (stamp, resolution, crop)."""
    options = [] if config.crop == "center" else [config.crop]
    key = digest("pixels", DECODE_VERSION, rows.stamp, config.resolution, *options)
    # Only the first process of a machine prepares again; the others read what it has written.
    retry = retry_failed and os.environ.get("LOCAL_RANK", "0") == "0"
    with decoder_pool(min(available_cores(), DECODER_THREADS)) as pool:
        return cached_map(
            cache_file(config.cache, "images", key),
            rows.table,
            prepare_rows,
            is_outdated=lambda cached: retry and any_failure_readable(cached, rows),
            fn_kwargs={
                "pool": pool,
                "read": rows.read,
                "resolution": config.resolution,
                "crop": config.crop,
            },
            with_indices=True,
            batch_size=64,
            writer_batch_size=64,
            features=PREPARED_FEATURES,
            remove_columns=rows.table.column_names,
            new_fingerprint=key,
            desc="Preparing images",
        )


def any_failure_readable(prepared: datasets.Dataset, rows: Rows) -> bool:
    """Return whether a file that could not be read during preparation can be read now."""
    for i, problem in enumerate(prepared["problem"]):
        if problem.startswith(UNREADABLE):
            with contextlib.suppress(BrokenRow):
                read_image_bytes(rows.read(rows.table[i], i)["image"])
                return True
    return False


def dataset_notes(table: datasets.Dataset, resolution: int) -> list[str]:
    """Return notes on usable rows: image sizes, several captions, duplicate images."""
    sides = table["side"][:]
    size_note = f"shorter sides of {format_range(sides)} pixels"
    small = sum(side < resolution for side in sides)
    if small:
        size_note += f"; {small} are below {resolution} and are enlarged"
    notes = [size_note]
    counts = [len(captions) for captions in table["captions"]]
    if max(counts) > 1:
        notes.append(f"{format_range(counts)} captions an image, of which every step uses one")
    names = table["name"][:]
    first: dict[str, str] = {}
    duplicates = []
    for name, content_hash in zip(names, table["hash"], strict=True):
        if content_hash in first:
            duplicates.append(f"{name} of {first[content_hash]}")
        else:
            first[content_hash] = name
    if duplicates:
        notes.append(f"{len(duplicates)} images are duplicates, e.g. {duplicates[0]}")
    return notes


def format_range(values: list[int]) -> str:
    """Return the minimum, maximum and median of some numbers, in words."""
    low = min(values)
    high = max(values)
    if low == high:
        return str(low)
    return f"{low} to {high} (median {sorted(values)[len(values) // 2]})"
