"""Captioned images by row, with the states of their captions, and the order in which epochs show them.

The rows of any source (`sources.py`) become one HF dataset, prepared once by `Dataset.map` into raw pixels in a
memory-mapped Arrow file. A stream is too long for that: its first rows stand for it here, and `stream.py` reads it.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.emoji.catalogue import SETS
from pipeline.data.emoji.writer import write_emoji
from pipeline.data.fingerprint import digest
from pipeline.data.image_ops import DECODE_VERSION, DECODER_THREADS, decoder_pool, prepare_rows
from pipeline.data.map_cache import cache_file, cached_map
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
from pipeline.randomness import caption_choice

REPORTED_ROWS = 5  # broken rows named in a report
PREVIEW_ROWS = 512  # rows that stand for a stream


@dataclass(frozen=True)
class DatasetReport:
    """What a source held: how many rows are usable, which are not, and what was noticed."""

    source: str
    rows: int
    broken: tuple[tuple[str, str], ...] = ()  # (name, reason)
    notes: tuple[str, ...] = ()

    def __str__(self):
        lines = [
            f"{self.source}: {self.rows - len(self.broken)} of {self.rows} images usable",
            *self.notes,
        ]
        if self.broken:
            kinds = Counter(re.split("[:,]", reason)[0] for _, reason in self.broken).most_common()
            lines.append(
                f"{len(self.broken)} broken rows: {', '.join(f'{count} x {kind}' for kind, count in kinds)}"
            )
        lines += [f"  skipped {name}: {reason}" for name, reason in self.broken[:REPORTED_ROWS]]
        more = len(self.broken) - REPORTED_ROWS
        return "\n".join(lines + ([f"  skipped {more} more"] if more > 0 else []))


class Images(Sequence):
    """The pixels of a prepared data set, read from disk by row: uint8 (3, H, W) by an integer, (B, 3, H, W) by many."""

    def __init__(self, dataset: datasets.Dataset, resolution: int):
        self.dataset, self.shape = (
            dataset.with_format("arrow"),
            (len(dataset), 3, resolution, resolution),
        )

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        one = isinstance(rows, int) or (isinstance(rows, Tensor) and rows.ndim == 0)
        index = [int(rows)] if one else [int(row) for row in rows]
        pixels = b"".join(self.dataset[index]["pixels"].to_pylist()) if index else b""
        batch = torch.from_numpy(
            np.frombuffer(bytearray(pixels), np.uint8).reshape(len(index), *self.shape[1:])
        )
        return batch[0] if one else batch


@dataclass(frozen=True)
class CaptionedImages:
    """N images with their captions and metadata; `fingerprint` is of pixels and captions, `pixels` of those
    alone, whatever the files are called.

    `alternatives` are the captions of each row, one at least.
    """

    images: Images
    alternatives: list[list[str]]
    metadata: list[dict]
    fingerprint: str
    pixels: str
    report: DatasetReport

    def __len__(self):
        return len(self.alternatives)

    @property
    def captions(self) -> list[str]:
        """The first caption of each row."""
        return [captions[0] for captions in self.alternatives]

    @property
    def all_captions(self) -> list[str]:
        """The captions of all rows in turn, (M,) in the order of `first` and `counts`."""
        return list(itertools.chain.from_iterable(self.alternatives))

    @functools.cached_property
    def counts(self) -> Tensor:
        """How many captions each row has, (N,)."""
        return torch.tensor([len(captions) for captions in self.alternatives])

    @functools.cached_property
    def first(self) -> Tensor:
        """Where each row's captions begin in `all_captions`, (N,)."""
        return self.counts.cumsum(0) - self.counts

    def caption_rows(
        self, seed: int, step: int, slots: Sequence[int] | Tensor, rows: Tensor
    ) -> Tensor:
        """Which of `all_captions` the examples at `slots` have, (B,) for the rows (B,)."""
        return self.first[rows] + caption_choice(seed, step, slots, self.counts[rows])

    def with_caption_lengths(self, tokenizer, length: int) -> "CaptionedImages":
        """The same images, with the lengths of their captions in the report: tokens, and how many are cut at `length`."""
        distinct = sorted(set(self.all_captions))
        tokens = [
            len(ids) for ids in tokenizer(distinct, truncation=False, verbose=False).input_ids
        ]
        cut = [caption for caption, count in zip(distinct, tokens, strict=True) if count > length]
        note = f"captions of {format_range(tokens)} tokens"
        note += (
            f"; {len(cut)} of {len(distinct)} are cut at {length}, e.g. {cut[0]!r:.200}"
            if cut
            else ""
        )
        report = dataclasses.replace(self.report, notes=(*self.report.notes, note))
        return dataclasses.replace(self, report=report)


# ---- reading


def load_splits(
    config: DataConfig, again: bool = False
) -> tuple[CaptionedImages, CaptionedImages | None]:
    """The training split and the held-out one, if any, of a source; a named emoji set is written first.

    Of a stream they are the first rows, PREVIEW at most. again: whether files that could not be read are tried anew; a run that
    goes on, and what measures it, keeps the pictures that it began with.
    """
    if config.source in SETS:
        folder = Path(config.cache) / f"{config.source}-{config.resolution}"
        written = write_emoji(folder, name=config.source, size=config.resolution)
        config = dataclasses.replace(config, source=str(written))
    held_out = dataclasses.replace(
        config, crop="center"
    )  # what is measured is the same whatever is trained on
    return load_split(config, config.split, again), load_split(
        held_out, config.held_out, again
    ) if config.held_out else None


def load_images(
    source: str | Path,
    split: str = "train",
    resolution: int = 64,
    cache_dir: str | Path | None = None,
    **settings,
) -> CaptionedImages:
    """The images of one split of a source at resolution x resolution, with their captions.

    `settings` are DataConfig's others. Unreadable rows are skipped and reported; more than a share `max_broken` of them is a
    DataError.
    """
    cache = str(cache_dir or datasets.config.HF_DATASETS_CACHE)
    return load_split(
        DataConfig(str(source), resolution=resolution, cache=cache, **settings), split
    )


def load_split(config: DataConfig, split: str, again: bool = True) -> CaptionedImages:
    """One split, prepared."""
    rows = open_rows(config, split)
    return prepare_images(preview_rows(rows) if config.streaming else rows, config, again)


def preview_rows(rows: Rows) -> Rows:
    """The first PREVIEW rows of a stream, in memory: what is known of it before it is read."""
    found = retry_on_network_error(
        lambda: [
            with_image_bytes(rows.read(example, number))
            for number, example in enumerate(rows.table.take(PREVIEW_ROWS))
        ],
        rows.name,
    )
    if not found:
        raise DataError(f"{rows.name} has no rows: expected images with captions")
    files = [
        hashlib.blake2b(row["image"]["bytes"]).hexdigest() if row["image"] else "" for row in found
    ]
    stamp = digest([row | {"image": file} for row, file in zip(found, files, strict=True)])
    table = datasets.Dataset.from_list(found, features=ROW_FEATURES)
    return Rows(
        table,
        identity_row,
        stamp,
        f"{rows.name}, the first {len(found)} rows of a stream",
        rows.notes,
    )


# ---- pixels


def prepare_images(rows: Rows, config: DataConfig, again: bool = True) -> CaptionedImages:
    """Decode a table's images once, keep them in the cache by stamp and resolution, and leave the broken rows out.

    Rows without a caption get the empty one, or are left out too (`missing_caption`).
    """
    key = digest(
        "pixels",
        DECODE_VERSION,
        rows.stamp,
        config.resolution,
        *([] if config.crop == "center" else [config.crop]),
    )
    features = datasets.Features(
        {
            "name": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
            "problem": datasets.Value("string"),
            "metadata": datasets.Value("string"),
            "pixels": datasets.Value("binary"),
            "side": datasets.Value("int32"),
            "hash": datasets.Value("string"),
        }
    )
    if not len(rows.table):
        raise DataError(f"{rows.name} has no rows: expected images with captions")
    path = cache_file(config.cache, "images", key)
    first = (
        os.environ.get("LOCAL_RANK", "0") == "0"
    )  # of a machine's processes; the others read what it has written
    outdated = lambda known: again and first and any_failure_readable(known, rows)
    with decoder_pool(min(available_cores(), DECODER_THREADS)) as pool:
        work = functools.partial(
            prepare_rows, pool=pool, read=rows.read, resolution=config.resolution, crop=config.crop
        )
        prepared = cached_map(
            path,
            rows.table,
            work,
            outdated,
            with_indices=True,
            batch_size=64,
            writer_batch_size=64,
            features=features,
            remove_columns=rows.table.column_names,
            new_fingerprint=key,
            desc="Preparing images",
        )
    problems, captions = prepared["problem"][:], prepared["captions"][:]
    broken = tuple(
        (name, problem) for name, problem in zip(prepared["name"], problems, strict=True) if problem
    )
    lacking = {i for i, texts in enumerate(captions) if not texts and not problems[i]}
    left_out = lacking if config.missing_caption == "skip" else set()
    good = [i for i, problem in enumerate(problems) if not problem and i not in left_out]
    chosen = prepared.select(good)
    notes = [*rows.notes, *dataset_notes(chosen, config.resolution)] if good else list(rows.notes)
    if lacking:
        notes.append(
            f"{len(lacking)} images have "
            + ("no caption and are left out" if left_out else "an empty caption")
        )
    report = DatasetReport(rows.name, len(problems), broken, tuple(notes))
    if len(broken) > config.max_broken * len(problems) or not good:
        raise DataError(
            f"{report}\n{len(broken)} of {len(problems)} rows are broken, at most {config.max_broken:.0%} may be: "
            "repair or remove them"
            if broken
            else f"{report}\nno row is left: data.missing_caption: empty keeps "
            "images without a caption"
        )
    images = Images(chosen.select_columns("pixels"), config.resolution)
    alternatives = [captions[i] or [""] for i in good]
    pixels = digest(images.shape, chosen["hash"][:])
    fingerprint = digest(images.shape, alternatives, chosen["hash"][:])
    metadata = [json.loads(text) for text in chosen["metadata"]]
    return CaptionedImages(images, alternatives, metadata, fingerprint, pixels, report)


def any_failure_readable(prepared: datasets.Dataset, rows: Rows) -> bool:
    """Can any file be read now that could not be when a table was prepared?"""
    for i, problem in enumerate(prepared["problem"]):
        if problem.startswith(UNREADABLE):
            with contextlib.suppress(BrokenRow):
                read_image_bytes(rows.read(rows.table[i], i)["image"])
                return True
    return False


def dataset_notes(table: datasets.Dataset, resolution: int) -> list[str]:
    """What stands out in usable rows: their sizes, several captions, pictures that come again."""
    sides, names, counts = (
        table["side"][:],
        table["name"][:],
        [len(captions) for captions in table["captions"]],
    )
    small = sum(side < resolution for side in sides)
    notes = [
        f"shorter sides of {format_range(sides)} pixels"
        + (f"; {small} are below {resolution} and are enlarged" if small else "")
    ]
    if max(counts) > 1:
        notes.append(f"{format_range(counts)} captions an image, of which every step draws one")
    first = {}
    again = [
        (i, first[seen]) for i, seen in enumerate(table["hash"]) if first.setdefault(seen, i) != i
    ]
    if again:
        i, j = again[0]
        notes.append(
            f"{len(again)} pictures are the same as an earlier one, e.g. {names[i]} as {names[j]}"
        )
    return notes


def format_range(values: list[int]) -> str:
    """The least, the middle and the largest of some numbers, in words."""
    low, middle, high = min(values), sorted(values)[len(values) // 2], max(values)
    return str(low) if low == high else f"{low} to {high} (median {middle})"
