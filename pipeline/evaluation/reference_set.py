"""The real images that samples are measured against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.dataset import CaptionedImages
from pipeline.evaluation.retrieval import centred_unit_vectors, recall_summary, retrieval_ranks


@dataclass
class ReferenceSet:
    """All pictures of a set, training rows first, as the judge sees them."""

    images: Tensor  # uint8 (N, 3, H, W)
    captions: list[str]
    metadata: list[dict]
    n_train: int
    train: Tensor  # (M, 3, H, W) all that was trained on, variations too: what can be copied
    features: Tensor  # (D, 1280) of the different pictures
    own: Tensor  # (N,) which of them each row is

    @classmethod
    def of(cls, see: Callable[[Tensor], Tensor], splits: list[CaptionedImages]) -> "ReferenceSet":
        """The bank of a training split and, maybe, a held-out one, as the judge sees it; variations are left out."""
        kept = [
            [i for i, metadata in enumerate(split.metadata) if not metadata.get("variation")]
            for split in splits
        ]
        images = torch.cat([split.images[some] for split, some in zip(splits, kept, strict=True)])
        rows, own = distinct_images(images)
        pairs = [
            (split.captions[i], split.metadata[i])
            for split, some in zip(splits, kept, strict=True)
            for i in some
        ]
        captions, metadata = [caption for caption, _ in pairs], [found for _, found in pairs]
        return cls(
            images, captions, metadata, len(kept[0]), splits[0].images[:], see(images[rows]), own
        )

    def captions_of(self, rows: Tensor) -> list[str]:
        """The captions of some rows (M,)."""
        return [self.captions[i] for i in rows]

    def grids(self) -> dict[str, Tensor]:
        """The held-out rows by factor grid."""
        held = range(self.n_train, len(self.captions))
        names = sorted({self.metadata[i].get("grid") or "no grid" for i in held})
        return {
            name: torch.tensor(
                [i for i in held if (self.metadata[i].get("grid") or "no grid") == name]
            )
            for name in names
        }

    def siblings(self, row: int) -> list[int]:
        """Training rows of the same grid that differ from a row in exactly one factor."""
        mine = self.metadata[row]
        same = lambda other: (
            other.get("grid") == mine.get("grid")
            and other["factors"].keys() == mine["factors"].keys()
        )
        apart = lambda other: sum(other["factors"][k] != v for k, v in mine["factors"].items())
        if not mine.get("factors"):
            return []
        return [
            i
            for i, other in enumerate(self.metadata[: self.n_train])
            if same(other) and apart(other) == 1
        ]

    def sibling_baseline(self, rows: Tensor) -> dict | None:
        """How the most similar sibling's picture, handed in unchanged, would rank; None where no row has siblings."""
        similarity = (
            centred_unit_vectors(self.features, self.features)
            @ centred_unit_vectors(self.features, self.features).T
        )
        best = [
            (
                int(row),
                max(found, key=lambda i, row=row: float(similarity[self.own[row], self.own[i]])),
            )
            for row in rows
            if (found := self.siblings(int(row)))
        ]
        if not best:
            return None
        held, sibling = torch.tensor(best).T
        return recall_summary(
            retrieval_ranks(self.features[self.own[sibling]], self.features, self.own[held])
        )


def distinct_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, own): the first row of every different picture, and which of those each picture (N, 3, H, W) is."""
    seen: dict[bytes, int] = {}
    own = torch.tensor([seen.setdefault(image.numpy().tobytes(), len(seen)) for image in images])
    rows = torch.tensor([int((own == i).nonzero()[0]) for i in range(len(seen))])
    return rows, own
