"""The real images that samples are measured against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.dataset import CaptionedImages
from pipeline.evaluation.retrieval import centred_unit_vectors, recall_summary, retrieval_ranks
from pipeline.runs.results import Recall


@dataclass
class ReferenceSet:
    """All images of a dataset with their features, training rows first."""

    images: Tensor  # uint8 (N, 3, H, W)
    captions: list[str]
    metadata: list[dict]
    n_train: int
    train: Tensor  # uint8 (M, 3, H, W), all training images, variations included
    features: Tensor  # (D, 1280), of the distinct images
    own: Tensor  # (N,), the distinct image of each row

    @classmethod
    def from_splits(
        cls, extract: Callable[[Tensor], Tensor], splits: list[CaptionedImages]
    ) -> "ReferenceSet":
        """Build the set from a training split and maybe a held-out one; variations are left out.

        extract: images (N, 3, H, W) -> features (N, 1280).
        """
        parts = []
        captions = []
        metadata = []
        sizes = []
        for split in splits:
            rows = [i for i, entry in enumerate(split.metadata) if not entry.get("variation")]
            parts.append(split.images[rows])
            captions += [split.captions[i] for i in rows]
            metadata += [split.metadata[i] for i in rows]
            sizes.append(len(rows))
        images = torch.cat(parts)
        distinct, own = distinct_images(images)
        features = extract(images[distinct])
        return cls(images, captions, metadata, sizes[0], splits[0].images[:], features, own)

    def captions_of(self, rows: Tensor) -> list[str]:
        """Return the captions of some rows (M,)."""
        return [self.captions[i] for i in rows]

    def ranks(self, features: Tensor, rows: Tensor) -> Tensor:
        """Return the ranks (M,) of some rows' own images by similarity to features (M, 1280)."""
        return retrieval_ranks(features, self.features, self.own[rows])

    def grids(self) -> dict[str, Tensor]:
        """Return the held-out rows by factor grid."""
        rows: dict[str, list[int]] = {}
        for i in range(self.n_train, len(self.captions)):
            rows.setdefault(self.metadata[i].get("grid") or "no grid", []).append(i)
        return {name: torch.tensor(rows[name]) for name in sorted(rows)}

    def siblings(self, row: int) -> list[int]:
        """Return the training rows of the same grid that differ in exactly one factor."""
        entry = self.metadata[row]
        factors = entry.get("factors")
        if not factors:
            return []
        found = []
        for i, other in enumerate(self.metadata[: self.n_train]):
            others = other.get("factors") or {}
            if other.get("grid") != entry.get("grid") or others.keys() != factors.keys():
                continue
            if sum(others[name] != value for name, value in factors.items()) == 1:
                found.append(i)
        return found

    def sibling_baseline(self, rows: Tensor) -> Recall | None:
        """Return the recall of the most similar sibling's image; None if no row has siblings."""
        vectors = centred_unit_vectors(self.features, self.features)
        with_siblings = []
        nearest = []
        for row in rows.tolist():
            siblings = self.siblings(row)
            if siblings:
                similarity = vectors[self.own[siblings]] @ vectors[self.own[row]]
                with_siblings.append(row)
                nearest.append(siblings[int(similarity.argmax())])
        if not nearest:
            return None
        features = self.features[self.own[nearest]]
        return recall_summary(self.ranks(features, torch.tensor(with_siblings)))


def distinct_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first row of every distinct image, and each image's number among them (N,)."""
    numbers: dict[bytes, int] = {}
    first_rows = []
    own = []
    for row, image in enumerate(images):
        content = image.numpy().tobytes()
        if content not in numbers:
            numbers[content] = len(numbers)
            first_rows.append(row)
        own.append(numbers[content])
    return torch.tensor(first_rows), torch.tensor(own)
