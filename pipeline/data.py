"""Captioned images by row, and everything random about a training step as a function of (seed, step, slot).

The rows of any source (`sources.py`) become one HF dataset, prepared once by `Dataset.map` into raw pixels in a
memory-mapped Arrow file. A stream is too long for that: its first rows stand for it here, and `stream.py` reads it.
"""

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
import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets.fingerprint import Hasher
from torch import Tensor

from pipeline import emoji, sources
from pipeline.config import DataConfig
from pipeline.sources import BrokenRow, DataError, digest, normalize, printable

VERSION = 2  # of the prepared pixels: raise it when `decode` changes, so that caches are not reused
MAX_PIXELS = 64_000_000  # a 48 KB file can claim 400 megapixels
SHOWN = 5  # broken rows named in a report
PREVIEW = 512  # rows that stand for a stream
ENCODED = 16  # captions that the encoder reads at once while a stream runs
KEPT_BYTES = 2**28  # of caption states that are kept while a stream runs
CLIP = ("clip", "clip_text_model")  # text encoders that read padding, as Stable Diffusion uses them


@dataclass(frozen=True)
class Report:
    """What a source held: how many rows are usable, which are not, and what was noticed."""

    source: str
    rows: int
    broken: tuple[tuple[str, str], ...] = ()  # (name, reason)
    notes: tuple[str, ...] = ()

    def __str__(self):
        lines = [f"{self.source}: {self.rows - len(self.broken)} of {self.rows} images usable", *self.notes]
        if self.broken:
            kinds = Counter(re.split("[:,]", reason)[0] for _, reason in self.broken).most_common()
            lines.append(f"{len(self.broken)} broken rows: {', '.join(f'{count} x {kind}' for kind, count in kinds)}")
        lines += [f"  skipped {name}: {reason}" for name, reason in self.broken[:SHOWN]]
        more = len(self.broken) - SHOWN
        return "\n".join(lines + ([f"  skipped {more} more"] if more > 0 else []))


class Images(Sequence):
    """The pixels of a prepared data set, read from disk by row: uint8 (3, H, W) by an integer, (B, 3, H, W) by many."""

    def __init__(self, dataset: datasets.Dataset, resolution: int):
        self.dataset, self.shape = dataset.with_format("arrow"), (len(dataset), 3, resolution, resolution)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        one = isinstance(rows, int) or (isinstance(rows, Tensor) and rows.ndim == 0)
        index = [int(rows)] if one else [int(row) for row in rows]
        pixels = b"".join(self.dataset[index]["pixels"].to_pylist()) if index else b""
        batch = torch.from_numpy(np.frombuffer(bytearray(pixels), np.uint8).reshape(len(index), *self.shape[1:]))
        return batch[0] if one else batch


@dataclass(frozen=True)
class CaptionedImages:
    """N images with their captions and metadata; `fingerprint` is of pixels and captions, whatever the files are called.

    `alternatives` are the captions of each row, one at least.
    """

    images: Images
    alternatives: list[list[str]]
    metadata: list[dict]
    fingerprint: str
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
        return self.first[rows] + caption_choice(seed, step, slots, self.counts[rows])

    def measured(self, tokenizer, length: int) -> "CaptionedImages":
        """The same images, with the lengths of their captions in the report: tokens, and how many are cut at `length`."""
        distinct = sorted(set(self.all_captions))
        tokens = [len(ids) for ids in tokenizer(distinct, truncation=False, verbose=False).input_ids]
        cut = [caption for caption, count in zip(distinct, tokens, strict=True) if count > length]
        note = f"captions of {spread(tokens)} tokens"
        note += f"; {len(cut)} of {len(distinct)} are cut at {length}, e.g. {cut[0]!r:.200}" if cut else ""
        report = dataclasses.replace(self.report, notes=(*self.report.notes, note))
        return dataclasses.replace(self, report=report)


# ---- reading


def load_splits(config: DataConfig, again: bool = False) -> tuple[CaptionedImages, CaptionedImages | None]:
    """The training split and the held-out one, if any, of a source; a named emoji set is written first.

    Of a stream they are the first rows, PREVIEW at most. again: whether files that could not be read are tried anew; a run that
    goes on, and what measures it, keeps the pictures that it began with.
    """
    if config.source in emoji.SETS:
        folder = Path(config.cache) / f"{config.source}-{config.resolution}"
        written = emoji.write(folder, name=config.source, size=config.resolution)
        config = dataclasses.replace(config, source=str(written))
    held_out = dataclasses.replace(config, crop="center")  # what is measured is the same whatever is trained on
    return read(config, config.split, again), read(held_out, config.held_out, again) if config.held_out else None


def load_images(source: str | Path, split: str = "train", resolution: int = 64, cache_dir: str | Path | None = None,
                **settings) -> CaptionedImages:  # fmt: skip
    """The images of one split of a source at resolution x resolution, with their captions.

    `settings` are DataConfig's others. Unreadable rows are skipped and reported; more than a share `max_broken` of them is a
    DataError.
    """
    cache = str(cache_dir or datasets.config.HF_DATASETS_CACHE)
    return read(DataConfig(str(source), resolution=resolution, cache=cache, **settings), split)


def read(config: DataConfig, split: str, again: bool = True) -> CaptionedImages:
    """One split, prepared."""
    rows = sources.open_rows(config, split)
    return prepare(preview(rows) if config.streaming else rows, config, again)


def preview(rows: sources.Rows) -> sources.Rows:
    """The first PREVIEW rows of a stream, in memory: what is known of it before it is read."""
    found = sources.retried(lambda: [sources.fetched(rows.read(example, number))
                                     for number, example in enumerate(rows.table.take(PREVIEW))], rows.name)  # fmt: skip
    if not found:
        raise DataError(f"{rows.name} has no rows: expected images with captions")
    files = [hashlib.blake2b(row["image"]["bytes"]).hexdigest() if row["image"] else "" for row in found]
    stamp = digest([row | {"image": file} for row, file in zip(found, files, strict=True)])
    table = datasets.Dataset.from_list(found, features=sources.FEATURES)
    return sources.Rows(table, sources.same, stamp, f"{rows.name}, the first {len(found)} rows of a stream", rows.notes)


# ---- pixels


def prepare(rows: sources.Rows, config: DataConfig, again: bool = True) -> CaptionedImages:
    """Decode a table's images once, keep them in the cache by stamp and resolution, and leave the broken rows out.

    Rows without a caption get the empty one, or are left out too (`missing_caption`).
    """
    key = digest("pixels", VERSION, rows.stamp, config.resolution, *([] if config.crop == "center" else [config.crop]))
    features = datasets.Features({
        "name": datasets.Value("string"), "captions": datasets.List(datasets.Value("string")),
        "problem": datasets.Value("string"), "metadata": datasets.Value("string"), "pixels": datasets.Value("binary"),
        "side": datasets.Value("int32"), "hash": datasets.Value("string")})  # fmt: skip
    kept = cache_file(config.cache, "images", key)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of a machine's processes; the others read what it has written
    if again and first and Path(kept).is_file() and readable_again(datasets.Dataset.from_file(kept), rows):
        Path(kept).unlink()
    prepared = rows.table.map(
        prepare_row, with_indices=True, fn_kwargs={"read": rows.read, "resolution": config.resolution, "crop": config.crop},
        remove_columns=rows.table.column_names, features=features, new_fingerprint=key,
        cache_file_name=kept, writer_batch_size=64, desc="Preparing images")  # fmt: skip
    problems, captions = prepared["problem"][:], prepared["captions"][:]
    broken = tuple((name, problem) for name, problem in zip(prepared["name"], problems, strict=True) if problem)
    lacking = {i for i, texts in enumerate(captions) if not texts and not problems[i]}
    left_out = lacking if config.missing_caption == "skip" else set()
    good = [i for i, problem in enumerate(problems) if not problem and i not in left_out]
    chosen = prepared.select(good)
    notes = [*rows.notes, *noticed(chosen, config.resolution)] if good else list(rows.notes)
    if lacking:
        notes.append(f"{len(lacking)} images have " + ("no caption and are left out" if left_out else "an empty caption"))
    report = Report(rows.name, len(problems), broken, tuple(notes))
    if len(broken) > config.max_broken * len(problems) or not good:
        raise DataError(f"{report}\n{len(broken)} of {len(problems)} rows are broken, at most {config.max_broken:.0%} may be: "
                        "repair or remove them" if broken else f"{report}\nno row is left: data.missing_caption: empty keeps "
                        "images without a caption")  # fmt: skip
    images = Images(chosen.select_columns("pixels"), config.resolution)
    alternatives = [captions[i] or [""] for i in good]
    fingerprint = digest(images.shape, alternatives, chosen["hash"][:])
    return CaptionedImages(images, alternatives, [json.loads(m) for m in chosen["metadata"]], fingerprint, report)


def readable_again(prepared: datasets.Dataset, rows: sources.Rows) -> bool:
    """Can any file be read now that could not be when a table was prepared?"""
    for i, problem in enumerate(prepared["problem"]):
        if problem.startswith(sources.UNREAD):
            with contextlib.suppress(BrokenRow):
                sources.content_now(rows.read(rows.table[i], i)["image"])
                return True
    return False


def prepare_row(example: dict, number: int, read, resolution: int, crop: str = "center") -> dict:
    """One row with its image as raw RGB bytes, (3, resolution, resolution), or with the problem that keeps it out.

    `side` is the shorter side of the picture as it was. Where a random crop lies is a function of the file's content, the same
    at every start, in every order and in a stream.
    """
    row, pixels, side = read(example, number), b"", 0
    image, problem = row.pop("image"), row.pop("problem")
    if not problem:
        try:
            content = sources.content_now(image)
            picture, place = upright(content), 0.5 if crop == "center" else anywhere(content)
            side, pixels = min(picture.size), square(picture, resolution, place).tobytes()
        except BrokenRow as error:
            problem = str(error)
        except Exception as error:  # broken files make Pillow's decoders raise every kind; all are reported
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
    seen = hashlib.blake2b(pixels, digest_size=8).hexdigest()
    return row | {"pixels": pixels, "problem": printable(problem), "side": side, "hash": seen}


def anywhere(content: bytes) -> float:
    """A number in [0, 1), uniform over contents."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) / 2**32


def noticed(table: datasets.Dataset, resolution: int) -> list[str]:
    """What stands out in usable rows: their sizes, several captions, pictures that come again."""
    sides, names, counts = table["side"][:], table["name"][:], [len(captions) for captions in table["captions"]]
    small = sum(side < resolution for side in sides)
    notes = [f"shorter sides of {spread(sides)} pixels" + (f"; {small} are below {resolution} and are enlarged" if small else "")]
    if max(counts) > 1:
        notes.append(f"{spread(counts)} captions an image, of which every step draws one")
    first = {}
    again = [(i, first[seen]) for i, seen in enumerate(table["hash"]) if first.setdefault(seen, i) != i]
    if again:
        i, j = again[0]
        notes.append(f"{len(again)} pictures are the same as an earlier one, e.g. {names[i]} as {names[j]}")
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
        raise BrokenRow(f"cannot identify it as a picture: {len(content)} bytes in no format that Pillow reads") from error
    with opened as picture:
        if math.prod(picture.size) > MAX_PIXELS:
            raise BrokenRow(f"too large: {picture.width} x {picture.height} pixels are more than the limit of {MAX_PIXELS:,}")
        picture.load()
        return on_white(PIL.ImageOps.exif_transpose(picture))


def square(picture: PIL.Image.Image, resolution: int, place: float = 0.5) -> np.ndarray:
    """A square of a picture as uint8 (3, resolution, resolution), from the left or upper end (place 0) to the other."""
    side = min(picture.size)
    left, top = int((picture.width - side) * place), int((picture.height - side) * place)
    cut = picture.crop((left, top, left + side, top + side))  # resize(box=...) would read beyond the box
    return np.asarray(cut.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Any picture as 8-bit RGB: what is transparent becomes white, 16-bit greys are scaled."""
    if picture.mode.startswith("I"):  # convert() would clip at 255
        grey = np.asarray(picture).astype(np.float64).clip(0, 65535) / 257
        return PIL.Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise BrokenRow("floating-point pixels have no agreed range: save the picture with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def cache_file(cache_dir: str | Path | None, what: str, key: str) -> str:
    """Where a prepared table is kept; `cache_dir` None means beside the Hub's data sets."""
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "direct-jump"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{what}-{key}.arrow")


# ---- caption states


@torch.no_grad()
def caption_states(captions: list[str], tokenizer, text_encoder, length: int) -> Tensor:
    """The encoder's last hidden states (B, length, D), float32 on the CPU; zero where padded, save for CLIP."""
    device = next(text_encoder.parameters()).device
    tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(device)
    if text_encoder.config.model_type in CLIP:
        return text_encoder(tokens.input_ids).last_hidden_state.float().cpu()
    mask = tokens.attention_mask
    return (text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state * mask[..., None]).float().cpu()


def encode_captions(captions: list[str], tokenizer, text_encoder, length: int, cache_dir: str | Path | None = None,
                    device: torch.device | None = None) -> Tensor:  # fmt: skip
    """The states (N, length, D) of captions, each distinct one encoded once and cached by encoder, length and caption.

    Where any is new, the encoder goes to `device`, and stays there. Warns when captions are longer than `length` tokens and are
    cut.
    """
    captions = [normalize(caption) for caption in captions]
    distinct = sorted(set(captions))
    key = digest("states", VERSION, distinct, length, encoder_digest(text_encoder), Hasher.hash(tokenizer.get_vocab()))
    encode = lambda batch: encode_batch(batch["caption"], tokenizer, text_encoder.to(device or text_encoder.device), length)
    encoded = datasets.Dataset.from_dict({"caption": distinct}).map(
        encode, batched=True, batch_size=64, new_fingerprint=key, cache_file_name=cache_file(cache_dir, "states", key),
        features=datasets.Features({"caption": datasets.Value("string"), "tokens": datasets.Value("int64"),
                                    "states": datasets.Value("binary")}), desc="Encoding captions")  # fmt: skip
    long = [c for c, tokens in zip(encoded["caption"], encoded["tokens"], strict=True) if tokens > length]
    if long:
        warnings.warn(f"{len(long)} of {len(distinct)} captions are longer than {length} tokens and are cut, e.g. {long[0]!r}",
                      stacklevel=2)  # fmt: skip
    row = {caption: i for i, caption in enumerate(distinct)}
    states = np.frombuffer(bytearray(b"".join(encoded["states"])), np.float32).reshape(len(distinct), length, -1)
    return torch.from_numpy(states)[[row[caption] for caption in captions]]


def encode_batch(captions: list[str], tokenizer, text_encoder, length: int) -> dict:
    """States as bytes, and how many tokens each caption would have uncut."""
    states = caption_states(captions, tokenizer, text_encoder, length)
    tokens = [len(ids) for ids in tokenizer(captions, truncation=False, verbose=False).input_ids]
    return {"states": [s.numpy().tobytes() for s in states], "tokens": tokens}


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
            states = caption_states(some + [""] * (ENCODED - len(some)), self.tokenizer, self.text_encoder, self.length)
            found |= {caption: state.clone() for caption, state in zip(some, states, strict=False)}
        for caption in captions:
            self.kept[caption] = found[caption]
            self.kept.move_to_end(caption)
        room = KEPT_BYTES // found[captions[0]].nbytes
        while len(self.kept) > room:
            self.kept.popitem(last=False)
        return torch.stack([found[caption] for caption in captions])


def encoder_digest(text_encoder: torch.nn.Module) -> str:
    """16 hexadecimal digits of an encoder's class and weights."""
    seen = hashlib.blake2b(type(text_encoder).__name__.encode(), digest_size=8)
    for name, value in text_encoder.state_dict().items():
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        seen.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return seen.hexdigest()


# ---- randomness: a function of (seed, step, slot), slot = position in the global batch


def randomness(seed: int, step: int, slot: int, what: str) -> torch.Generator:
    """The CPU generator of one decision about one example, whatever was drawn before or beside it.

    torch's generator keeps 32 bits of its seed, so two of some 100,000 streams may coincide; no two of a step are related.
    """
    value = hashlib.blake2b(f"{what} {seed} {step} {slot}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(value, "little"))


def noise(seed: int, step: int, slots: Sequence[int] | Tensor, shape: Sequence[int], what: str = "noise") -> Tensor:
    """eps of the examples at `slots`, (B, *shape), standard normal; another purpose draws other noise."""
    return torch.stack([torch.randn(*shape, generator=randomness(seed, step, int(slot), what)) for slot in slots])


def uniform(seed: int, step: int, slots: Sequence[int] | Tensor, what: str) -> Tensor:
    """One number in [0, 1) for each of `slots`, (B,) float64."""
    draws = [torch.rand((), dtype=torch.float64, generator=randomness(seed, step, int(slot), what)) for slot in slots]
    return torch.stack(draws)


def timesteps(seed: int, step: int, slots: Sequence[int] | Tensor, global_batch: int, T: int) -> Tensor:
    """t of the examples at `slots`, (B,) in 0..T-1: uniform for each, and one in every 1/global_batch of the range for all."""
    stratum = torch.randperm(global_batch, generator=randomness(seed, step, 0, "strata"))[torch.as_tensor(slots)]
    share = (stratum + uniform(seed, step, slots, "t")) / global_batch
    return (share * T).long().clamp(max=T - 1)  # the division may round up to 1


def keep_caption(seed: int, step: int, slots: Sequence[int] | Tensor, p: float) -> Tensor:
    """Which examples keep their caption, (B,) bool: each loses it with probability p (14)."""
    return uniform(seed, step, slots, "dropout") >= p


def caption_choice(seed: int, step: int, slots: Sequence[int] | Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """Which of its `counts` captions each example has, (B,) in 0..counts-1: uniform, drawn anew every step."""
    counts = torch.as_tensor(counts)
    return (uniform(seed, step, slots, "caption") * counts).long().minimum(counts - 1)  # the product may round up


def flips(seed: int, step: int, slots: Sequence[int] | Tensor) -> Tensor:
    """Which examples are shown mirrored, left for right, (B,) bool: half of them."""
    return uniform(seed, step, slots, "flip") < 0.5


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of one epoch, (n,)."""
    return torch.randperm(n, generator=randomness(seed, epoch, 0, "order"))


def batch_indices(seed: int, step: int, batch_size: int, n: int, start_slot: int = 0,
                  slots: Sequence[int] | Tensor | None = None) -> Tensor:  # fmt: skip
    """The rows of the examples at `slots` (None: from start_slot on) of a step's batch, (B,); every epoch is a new order of n.

    Batches run on across the ends of epochs, so n may be smaller than the batch. Raises DataError for n < 1.
    """
    if n < 1:
        raise DataError(f"a batch needs at least one image, got {n}")
    slots = range(start_slot, batch_size) if slots is None else slots
    places = [divmod(step * batch_size + int(slot), n) for slot in slots]
    return torch.tensor([int(permutation(seed, epoch, n)[place]) for epoch, place in places], dtype=torch.long)
