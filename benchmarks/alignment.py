"""`python benchmarks/alignment.py`: train the alignment score's heads on half of the concepts.

It needs the dataset of `direct-jump emoji data/emoji-styles-128 --styles`. A hash of a concept's
name decides its half, and a role is one concept in all genders. Features are cached beside the
dataset, so a second run takes seconds. The results are of the other half.
"""

import argparse
import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from pipeline.data.emoji.recolour import COUNTS, PALETTE
from pipeline.data.fingerprint import digest
from pipeline.diffusion.captions import simplify
from pipeline.evaluation.alignment import AlignmentHeads, AlignmentModel, colour_histogram
from pipeline.evaluation.feature_extractor import FeatureExtractor, extract_features
from pipeline.evaluation.retrieval import bootstrap_mean
from pipeline.evaluation.samples import cached_tensors
from pipeline.models.text_encoders import load_text_encoder
from pipeline.runs.results import Mean

CHUNK = 320  # images, or captions, a cached file
NAMES = 5  # captions of an image
CONCEPTS_A_STEP = 96
IMAGES_A_CONCEPT = 4
TEMPERATURE = 0.07


def load_rows(data: Path, n: int) -> list[dict]:
    """Return n rows of all splits in a fixed random order, without counts and duplicates."""
    rows = []
    for split in ("train", "test"):
        for line in (data / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append(row | {"file": data / split / row["file_name"]})
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    return [
        row for row in shuffled if row["duplicate_of"] is None and row["variation"] not in COUNTS
    ][:n]


def is_trained_on(row: dict) -> bool:
    """Return whether the row's concept is in the half that trains the heads."""
    concept = row["factors"].get("role", row["concept"])
    return zlib.crc32(concept.encode()) % 2 == 0


def names_of(row: dict) -> list[str]:
    """Return up to five captions of a row, one of them with its style."""
    styled, *others = row["caption"]
    plain = [caption for caption in others if "style" not in caption]
    return list(dict.fromkeys(map(simplify, [styled, *plain[: NAMES - 1]])))


def in_colours(row: dict) -> list[str]:
    """Return a recoloured row's caption in each colour of the palette."""
    name = row["caption"][1].removeprefix(row["variation"])
    return [simplify(color + name) for color in PALETTE]


def read_images(rows: list[dict]) -> Tensor:
    """Return the images of rows, uint8 (N, 3, H, W)."""
    images = [np.array(Image.open(row["file"]).convert("RGB")) for row in rows]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def image_features(rows: list[dict], cache: Path) -> Tensor:
    """Return what the image head reads (N, D); the network's part is cached in chunks."""
    network = FeatureExtractor()
    parts = []
    for start in tqdm(range(0, len(rows), CHUNK), "image features", dynamic_ncols=True):
        some = rows[start : start + CHUNK]
        images = read_images(some)
        path = cache / f"images-{digest([str(row['file']) for row in some])}.safetensors"
        found = cached_tensors(path, lambda: {"x": extract_features(network, images)})["x"]
        parts.append(torch.cat([found, colour_histogram(images)], 1))
    return torch.cat(parts)


def caption_features(captions: list[str], cache: Path) -> Tensor:
    """Return what the caption head reads (M, D), cached in chunks."""
    model = AlignmentModel(None, None, *load_text_encoder("minilm"))
    parts = []
    for start in tqdm(range(0, len(captions), CHUNK), "caption features", dynamic_ncols=True):
        some = captions[start : start + CHUNK]
        path = cache / f"captions-{digest(some)}.safetensors"
        parts.append(cached_tensors(path, lambda: {"x": model.caption_features(some)})["x"])
    return torch.cat(parts)


def contrastive_loss(similarity: Tensor, positive: Tensor) -> Tensor:
    """Return the cross entropy of similarities (B, B) both ways; all of a row's positives share."""
    share = positive.float()
    rows = (similarity.log_softmax(1) * share).sum(1) / share.sum(1)
    columns = (similarity.log_softmax(0) * share).sum(0) / share.sum(0)
    return -(rows.mean() + columns.mean()) / 2


def train_heads(
    images: Tensor,
    captions: Tensor,
    own: Tensor,
    concepts: list[str],
    *,
    steps: int = 100,
    seed: int = 0,
    lr: float = 1e-3,
    **sizes,
) -> AlignmentHeads:
    """Train heads on images (N, D) and captions (M, D') and return them.

    own: the captions of each image (N, NAMES), filled with -1. concepts: of each image. A step has
    some concepts and a few images of each, so that other colours of a concept are its negatives.
    """
    groups: dict[str, list[int]] = {}
    for i, concept in enumerate(concepts):
        groups.setdefault(concept, []).append(i)
    rows_of = [torch.tensor(rows) for rows in groups.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = AlignmentHeads(images.shape[1], captions.shape[1], **sizes).train()
        heads.image.standardise(images)
        heads.caption.standardise(captions[own[:, 0]])
        scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
        optimizer = torch.optim.AdamW([*heads.parameters(), scale], lr=lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
        for _ in tqdm(range(steps), "training", dynamic_ncols=True):
            chosen = [rows_of[i] for i in torch.randperm(len(rows_of))[:CONCEPTS_A_STEP].tolist()]
            rows = torch.cat([g[torch.randperm(len(g))[:IMAGES_A_CONCEPT]] for g in chosen])
            n = (own[rows] >= 0).sum(1)
            names = own[rows].gather(1, (torch.rand(len(rows)) * n).long()[:, None])[:, 0]
            positive = (own[rows][:, None] == names[None, :, None]).any(-1)
            similarity = heads.image(images[rows]) @ heads.caption(captions[names]).T
            loss = contrastive_loss(similarity * scale.exp().clamp(max=100), positive)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return heads.eval()


def by_concept(values: Tensor, rows: list[dict]) -> Mean:
    """Return the mean over concepts of values (N,) of rows; images of a concept are no sample."""
    found: dict[str, list[float]] = {}
    for row, value in zip(rows, values.tolist(), strict=True):
        found.setdefault(row["concept"], []).append(value)
    return bootstrap_mean(torch.tensor([sum(some) / len(some) for some in found.values()]))


@torch.no_grad()
def recalls(heads: AlignmentHeads, rows: list[dict], images: Tensor, names: Tensor) -> list[Mean]:
    """Return recall@1 and recall@5 of each row's concept among names (M, D'), in sorted order."""
    concepts = sorted({simplify(row["concept"]) for row in rows})
    own = torch.tensor([concepts.index(simplify(row["concept"])) for row in rows])
    similarity = heads.image(images) @ heads.caption(names).T
    ranks = (similarity >= similarity.gather(1, own[:, None])).sum(1)
    return [by_concept((ranks <= k).float(), rows) for k in (1, 5)]


@torch.no_grad()
def colour_wins(heads: AlignmentHeads, rows: list[dict], images: Tensor, names: Tensor) -> Tensor:
    """Return the share of other colours (N,) that a row's own colour beats in its caption.

    names: caption features (N, colours, D').
    """
    similarity = (heads.caption(names) * heads.image(images)[:, None]).sum(-1)
    own = torch.tensor([list(PALETTE).index(row["variation"]) for row in rows])
    wins = similarity.gather(1, own[:, None]) > similarity
    return wins.sum(1) / (len(PALETTE) - 1)


def measure(heads: AlignmentHeads, rows: list[dict], images: Tensor, text) -> dict[str, str]:
    """Return the results of held-out rows by name; text(captions) returns caption features."""

    def select(condition) -> tuple[list[dict], Tensor]:
        found = [i for i, row in enumerate(rows) if condition(row)]
        return [rows[i] for i in found], images[found]

    drawn, x = select(lambda row: row["variation"] is None)
    concepts = sorted({simplify(row["concept"]) for row in drawn})
    first, five = recalls(heads, drawn, x, text(concepts))
    n = len(concepts)
    results = {
        f"recall@1 of {n} captions (chance {1 / n:.1%})": percent(first),
        f"recall@5 of {n} captions (chance {5 / n:.1%})": percent(five),
    }
    painted, x = select(lambda row: row["variation"] in PALETTE)
    names = text([name for row in painted for name in in_colours(row)])
    wins = colour_wins(heads, painted, x, names.view(len(painted), len(PALETTE), -1))
    results["right colour above another (chance 50 %)"] = percent(by_concept(wins, painted))
    top = by_concept((wins == 1).float(), painted)
    results[f"right colour above all others (chance {1 / len(PALETTE):.1%})"] = percent(top)
    for color in PALETTE:
        some = [i for i, row in enumerate(painted) if row["variation"] == color]
        if some:
            of_color = by_concept(wins[some], [painted[i] for i in some])
            results[f"{color} above another colour"] = percent(of_color)
    return results


def percent(mean: Mean) -> str:
    """Return a mean of shares with its interval and number of concepts."""
    low, high = mean.interval
    return f"{mean.value:.1%} ({low:.0%} to {high:.0%}), {mean.n} concepts"


def main(argv: list[str] | None = None) -> None:
    """Train, measure and save."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=Path("data/emoji-styles-128"))
    arguments.add_argument("--output", type=Path, default=Path("pretrained/alignment"))
    arguments.add_argument("--images", type=int, default=20_000, help="at most so many")
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=0)
    values = arguments.parse_args(argv)
    rows = load_rows(values.data, values.images)
    held_out = [not is_trained_on(row) for row in rows]
    texts = {name for row in rows for name in names_of(row)}
    for row, hidden in zip(rows, held_out, strict=True):
        texts.add(simplify(row["concept"]))
        if hidden and row["variation"] in PALETTE:
            texts.update(in_colours(row))
    # Captions of about the same length are padded little.
    captions = sorted(texts, key=lambda text: (len(text), text))
    number = {caption: i for i, caption in enumerate(captions)}
    cache = values.data.parent / "alignment"
    of_captions = caption_features(captions, cache)
    of_images = image_features(rows, cache)
    own = torch.full((len(rows), NAMES), -1)
    for i, row in enumerate(rows):
        names = [number[name] for name in names_of(row)]
        own[i, : len(names)] = torch.tensor(names)
    hidden = torch.tensor(held_out)
    concepts = [row["concept"] for row in rows if is_trained_on(row)]
    options = {"steps": values.steps, "seed": values.seed}
    heads = train_heads(of_images[~hidden], of_captions, own[~hidden], concepts, **options)
    some = [row for row in rows if not is_trained_on(row)]

    def text(names: list[str]) -> Tensor:
        return of_captions[[number[name] for name in names]]

    print(f"{len(concepts)} training images of {len(set(concepts))} concepts, {len(some)} held out")
    for name, value in measure(heads, some, of_images[hidden], text).items():
        print(f"| {name} | {value} |")
    heads.half().save_pretrained(values.output)


if __name__ == "__main__":
    main()
