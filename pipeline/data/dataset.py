"""Captioned images by row, with the states of their captions, and the order in which epochs show them.

The rows of any source (`sources.py`) become one HF dataset, prepared once by `Dataset.map` into raw pixels in a
memory-mapped Arrow file. A stream is too long for that: its first rows stand for it here, and `stream.py` reads it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets.fingerprint import Hasher
from torch import Tensor

from pipeline import randomness
from pipeline.config import DataConfig
from pipeline.data.emoji import catalogue
from pipeline.data.sources.rows import (
    FEATURES,
    UNREAD,
    BrokenRow,
    DataError,
    Rows,
    content_now,
    digest,
    fetched,
    one_line,
    open_rows,
    printable,
    retried,
    same,
)
from pipeline.diffusion.captions import last_states, normalize
from pipeline.hardware import cores

VERSION = 2  # of the prepared pixels: raise it when `decode` changes, so that caches are not reused
MAX_PIXELS = 64_000_000  # a 48 KB file can claim 400 megapixels
SHOWN = 5  # broken rows named in a report
PREVIEW = 512  # rows that stand for a stream
ENCODED = 16  # captions that the encoder reads at once while a stream runs
THREADS = 8  # that prepare pictures, at most
MAKING, ABANDONED = (
    ".making-",
    3600,
)  # where a table is made; after so many seconds without a write nobody makes it any more
PIECE = 1024  # captions' states that are copied at once
KEPT_BYTES = 2**28  # of caption states that are kept while a stream runs


@dataclass(frozen=True)
class Report:
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
        lines += [f"  skipped {name}: {reason}" for name, reason in self.broken[:SHOWN]]
        more = len(self.broken) - SHOWN
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
    report: Report

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

    def chosen(self, seed: int, step: int, slots: Sequence[int] | Tensor, rows: Tensor) -> Tensor:
        """Which of `all_captions` the examples at `slots` have, (B,) for the rows (B,)."""
        return self.first[rows] + randomness.caption_choice(seed, step, slots, self.counts[rows])

    def measured(self, tokenizer, length: int) -> "CaptionedImages":
        """The same images, with the lengths of their captions in the report: tokens, and how many are cut at `length`."""
        distinct = sorted(set(self.all_captions))
        tokens = [
            len(ids) for ids in tokenizer(distinct, truncation=False, verbose=False).input_ids
        ]
        cut = [caption for caption, count in zip(distinct, tokens, strict=True) if count > length]
        note = f"captions of {spread(tokens)} tokens"
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
    if config.source in catalogue.SETS:
        folder = Path(config.cache) / f"{config.source}-{config.resolution}"
        written = catalogue.write(folder, name=config.source, size=config.resolution)
        config = dataclasses.replace(config, source=str(written))
    held_out = dataclasses.replace(
        config, crop="center"
    )  # what is measured is the same whatever is trained on
    return read(config, config.split, again), read(
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
    return read(DataConfig(str(source), resolution=resolution, cache=cache, **settings), split)


def read(config: DataConfig, split: str, again: bool = True) -> CaptionedImages:
    """One split, prepared."""
    rows = open_rows(config, split)
    return prepare(preview(rows) if config.streaming else rows, config, again)


def preview(rows: Rows) -> Rows:
    """The first PREVIEW rows of a stream, in memory: what is known of it before it is read."""
    found = retried(
        lambda: [
            fetched(rows.read(example, number))
            for number, example in enumerate(rows.table.take(PREVIEW))
        ],
        rows.name,
    )
    if not found:
        raise DataError(f"{rows.name} has no rows: expected images with captions")
    files = [
        hashlib.blake2b(row["image"]["bytes"]).hexdigest() if row["image"] else "" for row in found
    ]
    stamp = digest([row | {"image": file} for row, file in zip(found, files, strict=True)])
    table = datasets.Dataset.from_list(found, features=FEATURES)
    return Rows(
        table, same, stamp, f"{rows.name}, the first {len(found)} rows of a stream", rows.notes
    )


# ---- pixels


def prepare(rows: Rows, config: DataConfig, again: bool = True) -> CaptionedImages:
    """Decode a table's images once, keep them in the cache by stamp and resolution, and leave the broken rows out.

    Rows without a caption get the empty one, or are left out too (`missing_caption`).
    """
    key = digest(
        "pixels",
        VERSION,
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
    outdated = lambda known: again and first and readable_again(known, rows)
    with decoders(min(cores(), THREADS)) as pool:
        work = functools.partial(
            prepare_rows, pool=pool, read=rows.read, resolution=config.resolution, crop=config.crop
        )
        prepared = made_once(
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
    notes = [*rows.notes, *noticed(chosen, config.resolution)] if good else list(rows.notes)
    if lacking:
        notes.append(
            f"{len(lacking)} images have "
            + ("no caption and are left out" if left_out else "an empty caption")
        )
    report = Report(rows.name, len(problems), broken, tuple(notes))
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


def decoders(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads that decode pictures. Pillow's list of formats is filled before: threads that fill it together may miss one."""
    PIL.Image.init()
    return concurrent.futures.ThreadPoolExecutor(threads, "decode")


def made_once(
    path: Path,
    table: datasets.Dataset,
    function: Callable,
    outdated: Callable[[datasets.Dataset], bool] = lambda known: False,
    **options,
) -> datasets.Dataset:
    """`table.map(function, batched=True, **options)`, kept in a file of the cache: read where it is there, whole and not
    `outdated`, else made.

    It is made in a folder beside it, of which nothing is left where that fails, and gets its name when it is on the disk.
    """
    if (found := readable(path, len(table))) is not None and not outdated(found):
        return found
    for old in path.parent.glob(f"{MAKING}*"):  # of a process that was killed
        with contextlib.suppress(OSError):  # it is just being finished, or another user's
            if (
                time.time() - max(file.stat().st_mtime for file in (old, *old.iterdir()))
                > ABANDONED
            ):
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=MAKING, dir=path.parent) as scratch:
        new = Path(scratch) / path.name
        table.map(function, batched=True, cache_file_name=str(new), **options)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    return datasets.Dataset.from_file(str(path))


def readable(path: Path, rows: int) -> datasets.Dataset | None:
    """A kept table with so many rows; None where there is none, or a damaged one, which is told."""
    if not path.is_file():
        return None
    try:
        found = datasets.Dataset.from_file(str(path))
        damage = "" if len(found) == rows else f"it has {len(found)} rows, expected {rows}"
    except (OSError, ValueError) as error:  # of pyarrow: a file that breaks off
        if getattr(error, "errno", None):  # of the system
            raise
        damage = one_line(error)
    if not damage:
        return found
    warnings.warn(f"{path} is damaged ({damage}) and is made again", stacklevel=2)
    return None


def readable_again(prepared: datasets.Dataset, rows: Rows) -> bool:
    """Can any file be read now that could not be when a table was prepared?"""
    for i, problem in enumerate(prepared["problem"]):
        if problem.startswith(UNREAD):
            with contextlib.suppress(BrokenRow):
                content_now(rows.read(rows.table[i], i)["image"])
                return True
    return False


def prepare_rows(
    examples: dict[str, list], numbers: list[int], pool: concurrent.futures.Executor, **how
) -> dict[str, list]:
    """`prepare_row` of some rows, several at a time: Pillow decodes and resizes beside Python's lock."""
    singles = [
        dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)
    ]
    rows = list(pool.map(functools.partial(prepare_row, **how), singles, numbers))
    return {name: [row[name] for row in rows] for name in rows[0]}


def prepare_row(example: dict, number: int, read, resolution: int, crop: str = "center") -> dict:
    """One row with its image as raw RGB bytes, (3, resolution, resolution), or with the problem that keeps it out.

    `side` is the shorter side of the picture as it was. Where a random crop lies is a function of the file's content, the same
    at every start, in every order and in a stream.
    """
    row, pixels, side = read(example, number), b"", 0
    image, problem = row.pop("image"), row.pop("problem")
    if not problem:
        try:
            content = content_now(image)
            picture, place = upright(content), 0.5 if crop == "center" else anywhere(content)
            side, pixels = min(picture.size), square(picture, resolution, place).tobytes()
        except BrokenRow as error:
            problem = str(error)
        except (
            Exception
        ) as error:  # broken files make Pillow's decoders raise every kind; all are reported
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
    seen = hashlib.blake2b(pixels, digest_size=8).hexdigest()
    return row | {"pixels": pixels, "problem": printable(problem), "side": side, "hash": seen}


def anywhere(content: bytes) -> float:
    """A number in [0, 1), uniform over contents."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) / 2**32


def noticed(table: datasets.Dataset, resolution: int) -> list[str]:
    """What stands out in usable rows: their sizes, several captions, pictures that come again."""
    sides, names, counts = (
        table["side"][:],
        table["name"][:],
        [len(captions) for captions in table["captions"]],
    )
    small = sum(side < resolution for side in sides)
    notes = [
        f"shorter sides of {spread(sides)} pixels"
        + (f"; {small} are below {resolution} and are enlarged" if small else "")
    ]
    if max(counts) > 1:
        notes.append(f"{spread(counts)} captions an image, of which every step draws one")
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


def spread(values: list[int]) -> str:
    """The least, the middle and the largest of some numbers, in words."""
    low, middle, high = min(values), sorted(values)[len(values) // 2], max(values)
    return str(low) if low == high else f"{low} to {high} (median {middle})"


def decode(content: bytes, resolution: int) -> np.ndarray:
    """An image file as uint8 (3, resolution, resolution): upright, on white, its central square resized."""
    return square(upright(content), resolution)


def upright(content: bytes) -> PIL.Image.Image:
    """An image file as RGB, turned as its EXIF data says, on white."""
    try:
        opened = PIL.Image.open(io.BytesIO(content))
    except PIL.UnidentifiedImageError as error:  # which names an address in memory
        raise BrokenRow(
            f"cannot identify it as a picture: {len(content)} bytes in no format that Pillow reads"
        ) from error
    with opened as picture:
        if math.prod(picture.size) > MAX_PIXELS:
            raise BrokenRow(
                f"too large: {picture.width} x {picture.height} pixels are more than the limit of {MAX_PIXELS:,}"
            )
        picture.load()
        return on_white(PIL.ImageOps.exif_transpose(picture))


def square(picture: PIL.Image.Image, resolution: int, place: float = 0.5) -> np.ndarray:
    """A square of a picture as uint8 (3, resolution, resolution), from the left or upper end (place 0) to the other."""
    side = min(picture.size)
    left, top = int((picture.width - side) * place), int((picture.height - side) * place)
    cut = picture.crop(
        (left, top, left + side, top + side)
    )  # resize(box=...) would read beyond the box
    return np.asarray(cut.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)).transpose(
        2, 0, 1
    )


def on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Any picture as 8-bit RGB: what is transparent becomes white, 16-bit greys are scaled."""
    if picture.mode.startswith("I"):  # convert() would clip at 255
        grey = np.asarray(picture).astype(np.float64).clip(0, 65535) / 257
        return PIL.Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise BrokenRow(
            "floating-point pixels have no agreed range: save the picture with 8 or 16 bits"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return PIL.Image.alpha_composite(
            PIL.Image.new("RGBA", picture.size, "white"), picture
        ).convert("RGB")
    return picture.convert("RGB")


def as_float(images: Tensor) -> Tensor:
    """Images as floats in [-1, 1]: uint8 are scaled, floats are clipped."""
    return (
        images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float().clamp(-1, 1)
    )


def as_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded."""
    return (images * 255).round().to(torch.uint8)


def evenly(n: int, stop: int, start: int = 0) -> Tensor:
    """n of the rows start … stop - 1 at even distances, the first and the last among them; all where there are no more."""
    return torch.linspace(start, stop - 1, min(n, stop - start)).long()


def cache_file(cache_dir: str | Path | None, what: str, key: str) -> Path:
    """Where a prepared table is kept; `cache_dir` None means beside the Hub's data sets."""
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "direct-jump"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{what}-{key}.arrow"


# ---- caption states


def caption_states(captions: list[str], tokenizer, text_encoder, length: int) -> Tensor:
    """The states (B, length, D) of captions that are clean already, float32 on the CPU."""
    return (
        last_states(
            captions, tokenizer, text_encoder, length, next(text_encoder.parameters()).device
        )
        .float()
        .cpu()
    )


def encode_captions(
    captions: list[str],
    tokenizer,
    text_encoder,
    length: int,
    cache_dir: str | Path | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The states (N, length, D) of captions, each distinct one encoded once and cached by encoder, length and caption.

    Where any is new, the encoder goes to `device`, and stays there. What is longer than `length` tokens is cut, which
    `CaptionedImages.measured` tells.
    """
    captions = [normalize(caption) for caption in captions]
    distinct = sorted(set(captions))
    key = digest(
        "states",
        VERSION,
        distinct,
        length,
        weights_digest(text_encoder),
        Hasher.hash(tokenizer.get_vocab()),
    )

    def of_batch(batch: dict) -> dict:
        states = caption_states(
            batch["caption"], tokenizer, text_encoder.to(device or text_encoder.device), length
        )
        return {"states": [state.numpy().tobytes() for state in states]}

    encoded = made_once(
        cache_file(cache_dir, "states", key),
        datasets.Dataset.from_dict({"caption": distinct}),
        of_batch,
        batch_size=64,
        new_fingerprint=key,
        desc="Encoding captions",
        features=datasets.Features(
            {"caption": datasets.Value("string"), "states": datasets.Value("binary")}
        ),
    )
    row = {caption: i for i, caption in enumerate(distinct)}
    rows, table = (
        torch.tensor([row[caption] for caption in captions]),
        encoded.select_columns("states").with_format("arrow"),
    )
    pieces = (rows[start : start + PIECE] for start in range(0, len(rows), PIECE))
    states = None  # of 100,000 captions they are gigabytes: once, and no second time while they are gathered
    for start, some in enumerate(pieces):
        found = bytearray(b"".join(table[some.tolist()]["states"].to_pylist()))
        piece = torch.from_numpy(np.frombuffer(found, np.float32).reshape(len(some), length, -1))
        states = piece.new_empty(len(rows), *piece.shape[1:]) if states is None else states
        states[start * PIECE : start * PIECE + len(some)] = piece
    return states


class CaptionStates:
    """The states (B, length, D) of captions as they are asked for; the latest KEPT_BYTES of them are kept.

    The encoder always reads ENCODED captions at once, so that a caption's states do not depend on what else is asked for.
    """

    def __init__(self, tokenizer, text_encoder, length: int):
        self.tokenizer, self.text_encoder, self.length = tokenizer, text_encoder, length
        self.kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, length, D) float32 on the CPU."""
        found = {caption: self.kept[caption] for caption in captions if caption in self.kept}
        new = [caption for caption in dict.fromkeys(captions) if caption not in found]
        for start in range(0, len(new), ENCODED):
            some = new[start : start + ENCODED]
            states = caption_states(
                some + [""] * (ENCODED - len(some)), self.tokenizer, self.text_encoder, self.length
            )
            found |= {caption: state.clone() for caption, state in zip(some, states, strict=False)}
        for caption in captions:
            self.kept[caption] = found[caption]
            self.kept.move_to_end(caption)
        room = KEPT_BYTES // found[captions[0]].nbytes
        while len(self.kept) > room:
            self.kept.popitem(last=False)
        return torch.stack([found[caption] for caption in captions])


def weights_digest(network: torch.nn.Module) -> str:
    """16 hexadecimal digits of a network's class and weights."""
    seen = hashlib.blake2b(type(network).__name__.encode(), digest_size=8)
    for name, value in network.state_dict().items():
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        seen.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return seen.hexdigest()


# ---- the order of an epoch


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of one epoch, (n,)."""
    return torch.randperm(n, generator=randomness.generator(seed, epoch, 0, "order"))


def batch_indices(
    seed: int, step: int, batch_size: int, n: int, slots: Sequence[int] | Tensor | None = None
) -> Tensor:
    """The rows of the examples at `slots` (None: all) of a step's batch, (B,); every epoch is a new order of n.

    Batches run on across the ends of epochs, so n may be smaller than the batch. Raises DataError for n < 1.
    """
    if n < 1:
        raise DataError(f"a batch needs at least one image, got {n}")
    slots = range(batch_size) if slots is None else slots
    places = [divmod(step * batch_size + int(slot), n) for slot in slots]
    return torch.tensor(
        [int(permutation(seed, epoch, n)[place]) for epoch, place in places], dtype=torch.long
    )
