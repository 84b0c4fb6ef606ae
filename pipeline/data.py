"""Captioned images by row, and everything random about a training step as a function of (seed, step, slot).

An image folder becomes one HF dataset of files and captions, prepared once by `Dataset.map` into raw pixels in a
memory-mapped Arrow file. Anything else that `datasets` can read joins at `prepare`, which wants only columns `image`
(`Image(decode=False)`), `name`, `caption`, `problem` and `metadata`.
"""

import functools
import hashlib
import io
import json
import math
import unicodedata
import warnings
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

from pipeline import emoji
from pipeline.config import DataConfig

VERSION = 1  # of the prepared pixels: raise it when `decode` changes, so that caches are not reused
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
CAPTION_COLUMNS = ("caption", "text")
MAX_PIXELS = 64_000_000  # a 48 KB file can claim 400 megapixels
SHOWN = 5  # broken rows named in a report
CLIP = ("clip", "clip_text_model")  # text encoders that read padding, as Stable Diffusion uses them


class DataError(ValueError):
    """Data that cannot be trained on, with what was found and what to do."""


class BrokenRow(ValueError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class Report:
    """What a source held: how many rows are usable, which are not, and what was noticed."""

    source: str
    rows: int
    broken: tuple[tuple[str, str], ...] = ()  # (name, reason)
    notes: tuple[str, ...] = ()

    def __str__(self):
        lines = [f"{self.source}: {self.rows - len(self.broken)} of {self.rows} images usable", *self.notes]
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
    """N images with a caption and metadata each; `fingerprint` is of the pixels and captions, whatever the files are called."""

    images: Images
    captions: list[str]
    metadata: list[dict]
    fingerprint: str
    report: Report

    def __len__(self):
        return len(self.captions)


# ---- captions


def normalize(caption: str) -> str:
    """A caption as it is encoded, in training and in inference: NFC, no control characters or lone surrogates, single spaces."""
    kept = "".join(c if unicodedata.category(c) not in ("Cc", "Cs") else " " if c.isspace() else "" for c in caption)
    return " ".join(unicodedata.normalize("NFC", kept).split())


def read_caption(value: object, name: str) -> str:
    """One caption from a metadata value: None is the empty caption, of several the row's name picks one.

    Raises BrokenRow for anything but text.
    """
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = value[int(digest(name), 16) % len(value)]
    if value is not None and not isinstance(value, str):
        raise BrokenRow(f"its caption must be text or a list of texts, got {value!r:.60}")
    return normalize(value or "")


def digest(*parts: object) -> str:
    """16 hexadecimal digits that depend on all parts and on nothing else."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


# ---- image folders


def load_splits(config: DataConfig) -> tuple[CaptionedImages, CaptionedImages | None]:
    """The training split and the held-out one, if any, of a folder, or of a named emoji set, which is written first."""
    source, size = config.source, config.resolution
    if source in emoji.SETS:
        source = emoji.write(Path(config.cache) / f"{source}-{size}", name=source, size=size)
    read = lambda split: load_images(source, split=split, resolution=size, cache_dir=config.cache, max_broken=config.max_broken)
    return read(config.split), read(config.held_out) if config.held_out else None


def load_images(source: str | Path, split: str = "train", resolution: int = 64, caption_column: str | None = None,
                cache_dir: str | Path | None = None, max_broken: float = 0.05) -> CaptionedImages:  # fmt: skip
    """The images of one split of a folder, at resolution x resolution, with their captions.

    Captions come from `metadata.jsonl` (`caption` or `text`, or `caption_column`), else from `name.txt` beside `name.png`,
    else from file names. Unreadable rows are skipped and reported; more than a share `max_broken` of them is a DataError.
    """
    folder = split_folder(Path(source), split)
    rows, notes = folder_rows(folder, caption_column)
    if not rows:
        raise DataError(f"{folder} holds no images: expected files ending in {', '.join(sorted(SUFFIXES))}")
    table = datasets.Dataset.from_list(rows, features=datasets.Features({
        "image": datasets.Image(decode=False), "name": datasets.Value("string"), "caption": datasets.Value("string"),
        "problem": datasets.Value("string"), "metadata": datasets.Value("string")}))  # fmt: skip
    stamp = digest([(row, stat(row["image"]["path"]) if row["image"] else None) for row in rows])
    return prepare(table, stamp, str(folder), resolution, notes, cache_dir, max_broken)


def split_folder(source: Path, split: str) -> Path:
    """Where a split's images are: `source/split`, or `source` itself for train where it has no train folder."""
    if not source.is_dir():
        raise DataError(f"no image folder at {source}: expected a folder of images with captions")
    if (source / split).is_dir():
        return source / split
    known = sorted(p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    pictures = any(p.suffix.lower() in SUFFIXES or p.name == "metadata.jsonl" for p in source.iterdir())
    if split == "train" and pictures and not {"test", "validation"} & set(known):
        return source
    raise DataError(f"{source} has no split {split!r}: it has {', '.join(known) or 'no folders'}")


def stat(path: str) -> tuple[int, int]:
    """Size and time of a file."""
    found = Path(path).stat()
    return found.st_size, found.st_mtime_ns


def folder_rows(folder: Path, caption_column: str | None) -> tuple[list[dict], list[str]]:
    """(rows, notes) of one folder: a row an image, sorted by name, or as metadata.jsonl lists them."""
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES]
    files = {p.relative_to(folder).as_posix(): p for p in paths}
    files = {name: p for name, p in files.items() if not any(part.startswith(".") for part in name.split("/"))}
    listing = folder / "metadata.jsonl"
    if listing.is_file():
        entries = read_jsonl(listing)
        if not entries:
            return [], []
        column = find_column(listing, [e for e in entries if isinstance(e, dict)], caption_column)
        rows = [listed_row(folder, i, entry, column) for i, entry in enumerate(entries, 1)]
        unlisted = sorted(files.keys() - {row["name"] for row in rows})
        return rows, [f"{len(unlisted)} images have no row in {listing}, e.g. {printable(unlisted[0])}"] if unlisted else []
    if caption_column is not None:
        raise DataError(f"caption_column {caption_column!r} needs {listing}, which does not exist")
    texts = {name: path.with_suffix(".txt") for name, path in files.items() if path.with_suffix(".txt").is_file()}
    rows = [beside_row(name, path, texts) for name, path in files.items()]
    lacking = sorted(files.keys() - texts.keys()) if texts else []
    return rows, [f"{len(lacking)} images have no .txt beside them: no caption, e.g. {printable(lacking[0])}"] if lacking else []


def read_jsonl(path: Path) -> list[dict | BrokenRow]:
    """The objects of a JSON-lines file; a line that is none comes as the reason."""
    entries = []
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entries.append(entry if isinstance(entry, dict) else BrokenRow(f"expected an object, got {entry!r:.60}"))
        except ValueError as error:  # not JSON, or not UTF-8
            entries.append(BrokenRow(str(error)))
    return entries


def find_column(listing: Path, entries: list[dict], wanted: str | None) -> str:
    """The name of the caption column; DataError lists the columns if it is not among them."""
    columns = sorted({key for entry in entries for key in entry})
    for name in [wanted] if wanted else CAPTION_COLUMNS:
        if name in columns:
            return name
    expected = repr(wanted) if wanted else " or ".join(map(repr, CAPTION_COLUMNS))
    raise DataError(f"{listing} has no caption column {expected}: it has {', '.join(columns) or 'none'}")


def listed_row(folder: Path, line: int, entry: dict | BrokenRow, column: str) -> dict:
    """One row from a line of metadata.jsonl."""
    where = f"metadata.jsonl:{line}"
    if isinstance(entry, BrokenRow):
        return as_row(where, None, None, str(entry))
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        return as_row(where, None, None, f"its file_name must be text, got {name!r:.60}")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return as_row(name, None, None, "its file is outside the folder")
    if not path.is_file():
        return as_row(name, None, None, "its file does not exist")
    return as_row(name, path, entry.get(column), metadata={k: v for k, v in entry.items() if k != column})


def beside_row(name: str, path: Path, texts: dict[str, Path]) -> dict:
    """One row from an image, its caption from the .txt beside it or, where no image has any, from its own name."""
    if not texts:
        return as_row(name, path, path.stem.replace("_", " "))
    try:
        return as_row(name, path, texts[name].read_text(encoding="utf-8") if name in texts else "")
    except UnicodeDecodeError:
        return as_row(name, None, None, f"{texts[name].name} is not UTF-8")


def printable(name: str) -> str:
    """A file name that can be printed and stored, whatever bytes it has."""
    return name.encode("utf-8", "backslashreplace").decode()


def as_row(name: str, path: Path | None, caption: object, problem: str = "", metadata: dict | None = None) -> dict:
    """A row of the table that `prepare` takes; a caption that is not text becomes its problem."""
    try:
        text = read_caption(caption, name)
        str(path).encode()
    except UnicodeEncodeError:
        text, path, problem = "", None, "its file name is not valid UTF-8"
    except BrokenRow as error:
        text, problem = "", str(error)
    return {"image": {"path": str(path), "bytes": None} if path else None, "name": printable(name), "caption": text,
            "problem": printable(problem), "metadata": json.dumps({"file_name": name} | (metadata or {}))}  # fmt: skip


# ---- pixels


def prepare(table: datasets.Dataset, stamp: str, source: str, resolution: int, notes: list[str],
            cache_dir: str | Path | None, max_broken: float) -> CaptionedImages:  # fmt: skip
    """Decode a table's images once, keep them in the cache under (stamp, resolution), and leave the broken rows out."""
    key = digest("pixels", VERSION, stamp, resolution)
    features = datasets.Features({name: feature for name, feature in table.features.items() if name != "image"})
    features["pixels"] = datasets.Value("binary")
    prepared = table.map(
        prepare_row, fn_kwargs={"resolution": resolution}, remove_columns=["image"], features=features, new_fingerprint=key,
        cache_file_name=cache_file(cache_dir, "images", key), writer_batch_size=64, desc="Preparing images")  # fmt: skip
    problems = prepared["problem"][:]
    good = [i for i, problem in enumerate(problems) if not problem]
    broken = tuple((name, problem) for name, problem in zip(prepared["name"], problems, strict=True) if problem)
    chosen = prepared.select(good)
    captions = chosen["caption"][:]
    empty = sum(not caption for caption in captions)
    notes = [*notes, f"{empty} images have an empty caption"] if empty else list(notes)
    report = Report(source, len(problems), broken, tuple(notes))
    if not good or len(broken) > max_broken * len(problems):
        raise DataError(f"{report}\n{len(broken)} of {len(problems)} rows are broken, at most {max_broken:.0%} may be: "
                        "repair or remove them")  # fmt: skip
    images = Images(chosen.select_columns("pixels"), resolution)
    return CaptionedImages(images, captions, [json.loads(m) for m in chosen["metadata"]], fingerprint(images, captions), report)


def prepare_row(row: dict, resolution: int) -> dict:
    """One row with its image as raw RGB bytes, (3, resolution, resolution), or with the problem that keeps it out."""
    pixels, problem, image = b"", row["problem"], row["image"]
    if not problem:
        try:
            content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            pixels = decode(content, resolution).tobytes()
        except Exception as error:  # broken files make Pillow's decoders raise every kind; all are reported
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
    return {"pixels": pixels, "problem": printable(problem)}


def decode(content: bytes, resolution: int) -> np.ndarray:
    """An image file as uint8 (3, resolution, resolution): upright, on white, its central square resized."""
    with PIL.Image.open(io.BytesIO(content)) as picture:
        if math.prod(picture.size) > MAX_PIXELS:
            raise BrokenRow(f"{picture.width} x {picture.height} pixels are more than the limit of {MAX_PIXELS:,}")
        picture.load()
        picture = on_white(PIL.ImageOps.exif_transpose(picture))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))  # resize(box=...) would read beyond the box
    return np.asarray(square.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)).transpose(2, 0, 1)


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


def fingerprint(images: Images, captions: list[str]) -> str:
    """16 hexadecimal digits of the pixels and captions, in their order."""
    seen = hashlib.blake2b(digest(images.shape, captions).encode(), digest_size=8)
    for start in range(0, len(images), 256):
        seen.update(images[start : start + 256].numpy())
    return seen.hexdigest()


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


def encode_captions(captions: list[str], tokenizer, text_encoder, length: int, cache_dir: str | Path | None = None) -> Tensor:
    """The states (N, length, D) of captions, each distinct one encoded once and cached by encoder, length and caption.

    Warns when captions are longer than `length` tokens and are cut.
    """
    captions = [normalize(caption) for caption in captions]
    distinct = sorted(set(captions))
    key = digest("states", VERSION, distinct, length, encoder_digest(text_encoder), Hasher.hash(tokenizer.get_vocab()))
    encode = lambda batch: encode_batch(batch["caption"], tokenizer, text_encoder, length)
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
