"""Metrics of a run: the content of metrics.json, as JSON and as text.

JSON keys are the fields' names, apart from recall@1 and recall@5. `Metrics.from_json` also reads
the keys of files that were written before these names.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import AliasChoices, Field, TypeAdapter


def _json_names(name: str, *others: str) -> Any:
    """Return the JSON key of a field, and other keys that are read as well."""
    return Field(serialization_alias=name, validation_alias=AliasChoices(name, *others))


_RECALL_AT_1 = _json_names("recall@1", "recall_at_1", "first")
_RECALL_AT_5 = _json_names("recall@5", "recall_at_5", "first_five")


@dataclass(frozen=True)
class Proportion:
    """A proportion k / n with its 95 % interval."""

    value: Annotated[float, _json_names("value", "share")]
    interval: tuple[float, float]
    k: int
    n: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({low:.0%} to {high:.0%} of {self.n})"


@dataclass(frozen=True)
class CopyRate(Proportion):
    """The proportion of images within `threshold` of a training image."""

    threshold: float


@dataclass(frozen=True)
class Mean:
    """A mean over n values with its 95 % interval."""

    value: Annotated[float, _json_names("value", "mean")]
    interval: tuple[float, float]
    n: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} ({low:.2f} to {high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How often a caption's own image ranks first, and among the first five."""

    recall_at_1: Annotated[Proportion, _RECALL_AT_1]
    recall_at_5: Annotated[Proportion, _RECALL_AT_5]
    median_rank: float | None = None

    def __str__(self) -> str:
        return f"recall@1 {self.recall_at_1}, recall@5 {self.recall_at_5}"


@dataclass(frozen=True, kw_only=True)
class HeldOutRecall(Recall):
    """Recall of held-out captions, and how many of their samples copy a training image."""

    copies: CopyRate


@dataclass(frozen=True)
class Kid:
    """A kernel distance with its standard error and 95 % interval."""

    value: float
    error: float
    interval: tuple[float, float]
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance of n samples to n real images, and that of n other real images."""

    value: float
    real: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.1f} (real images: {self.real:.1f}), n = {self.n}"


@dataclass(frozen=True)
class Distances:
    """Distances between samples and real images in the features of one network."""

    kid: Kid
    frechet: FrechetDistance | None = None


@dataclass(frozen=True)
class ClipScore:
    """The mean scores of samples and of the real images by a CLIP, or by another dual encoder."""

    model: str
    samples: Annotated[Mean, _json_names("samples", "drawn")]
    real: Mean


@dataclass(frozen=True)
class SeedResult:
    """Metrics of the samples of one seed; `grids` holds held-out captions by factor grid."""

    train: Recall
    seam_ratio: float
    held_out: HeldOutRecall | None = None
    grids: dict[str, Recall] = field(default_factory=dict)
    distances: dict[str, Distances] = field(default_factory=dict)
    clip: ClipScore | None = None
    alignment: ClipScore | None = None

    def lines(self) -> Iterator[str]:
        """Yield the text, a line a metric."""
        yield f"training captions: {self.train}; seams {self.seam_ratio:.2f} of real"
        if self.held_out is not None:
            yield f"  held-out combinations: {self.held_out}; copies {self.held_out.copies}"
        for name, recall in self.grids.items():
            yield f"    {name}: {recall}"
        for name, found in self.distances.items():
            frechet = f"; Fréchet distance ({name}) {found.frechet}" if found.frechet else ""
            yield f"  KID ({name}) {found.kid}{frechet}"
        if self.clip is not None:
            scores = f"{self.clip.samples}, real images: {self.clip.real}"
            yield f"  CLIP score ({self.clip.model}) {scores}"
        if self.alignment is not None:
            yield f"  alignment {self.alignment.samples}, real images: {self.alignment.real}"


@dataclass(frozen=True)
class Choice:
    """The seed and the number of training captions that w was chosen on, and the metrics by w."""

    seed: int
    captions: int
    by_w: dict[float, SeedResult]


@dataclass(frozen=True)
class Chance:
    """Recall of a random ranking."""

    recall_at_1: Annotated[float, _RECALL_AT_1]
    recall_at_5: Annotated[float, _RECALL_AT_5]


@dataclass(frozen=True)
class References:
    """What recall is compared with: chance, lightly augmented real images, and siblings."""

    images: Annotated[int, _json_names("images", "pictures")]
    captions: int
    chance: Chance
    ceiling: Recall
    real_held_out_copies: CopyRate | None = None
    siblings: dict[str, Recall | None] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Yield the text, a line a reference."""
        chance = f"recall@1 {self.chance.recall_at_1:.2%}, recall@5 {self.chance.recall_at_5:.2%}"
        yield f"chance: {chance}; lightly augmented real images: {self.ceiling}"
        if self.siblings.get("held_out") is not None:
            yield f"a sibling's image: {self.siblings['held_out']}"
        if self.real_held_out_copies is not None:
            yield f"real held-out images: copies {self.real_held_out_copies}"


@dataclass(frozen=True)
class DenoisingErrors:
    """Mean squared errors of "eps" and "x_0" of both splits, one a timestep."""

    timesteps: list[int]
    train: dict[str, list[float]]
    held_out: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class ExtraMetrics:
    """The slower metrics: denoising errors, diversity by w, and bits/dim of held-out images."""

    errors: DenoisingErrors
    diversity: dict[str, Mean]
    bits_per_dimension: dict[str, Mean] | None = None
    num_inference_steps: int | None = None

    def lines(self) -> Iterator[str]:
        """Yield the text, a line a metric."""
        curves = {"training": self.errors.train, "held-out": self.errors.held_out}
        for kind in ("x_0", "eps"):
            rows = [curve[kind] for curve in curves.values() if curve]
            cells = zip(self.errors.timesteps, *rows, strict=True)
            text = ", ".join(
                f"t = {t} " + " and ".join(f"{x:.4f}" for x in row) for t, *row in cells
            )
            images = " and ".join(name for name, curve in curves.items() if curve)
            yield f"mean squared error of {kind} ({images} images): {text}"
        bits = self.bits_per_dimension
        if bits is not None:
            files = f"as PNG {bits['png']}, as lossless WebP {bits['webp']}"
            yield f"held-out images: at most {bits['model']} bits/dim by the bound; {files}"
        by_w = ", ".join(f"w = {w} {mean}" for w, mean in self.diversity.items())
        yield f"diversity, the mean feature distance between seeds: {by_w}"


@dataclass(frozen=True, kw_only=True)
class SweepPoint(Recall):
    """Quality and alignment at one setting of the sampler, and the network calls of one image."""

    at: dict[str, str] | str
    kid: Kid
    calls: int


@dataclass(frozen=True)
class Sweep:
    """The base and, by parameter, the points that differ from it in that parameter alone."""

    features: str
    captions: int
    seed: int
    base: SweepPoint
    curves: dict[str, list[SweepPoint]]

    def lines(self) -> Iterator[str]:
        """Yield the table, a line a point."""
        yield f"sweep over {self.captions} captions, seed {self.seed}:"
        settings = self.base.at.items() if isinstance(self.base.at, dict) else []
        rows = [(", ".join(f"{name} = {value}" for name, value in settings), self.base)]
        for parameter, points in self.curves.items():
            rows += [(f"{parameter} = {point.at}", point) for point in points]
        for at, point in rows:
            text = f"KID ({self.features}) {point.kid}, {Recall.__str__(point)}"
            yield f"  {at}: {text}, {point.calls} calls"


@dataclass(frozen=True)
class Metrics:
    """All of metrics.json: what `evaluate` and `sweep` measured of the model of one identity."""

    model: str
    w: float | None = None
    num_inference_steps: int | None = None
    seeds: list[int] = field(default_factory=list)
    by_seed: dict[int, SeedResult] = field(default_factory=dict)
    free_prompt_copies: dict[int, CopyRate] = field(default_factory=dict)
    choice: Choice | None = None
    references: References | None = None
    more: ExtraMetrics | None = None
    sweep: Sweep | None = None

    @classmethod
    def from_json(cls, tree: dict) -> Self:
        """Read the content of a metrics.json; ValueError if it has another shape."""
        return TypeAdapter(cls).validate_python(tree)

    def to_json(self) -> dict:
        """Return the content of metrics.json, without what was not measured."""
        return TypeAdapter(type(self)).dump_python(self, by_alias=True, exclude_none=True)

    def mean_recall(self, split: str, at: int) -> float | None:
        """Return recall@`at` of a split ("train" or "held_out"), the mean over seeds."""
        recalls = [getattr(result, split) for result in self.by_seed.values()]
        values = [getattr(recall, f"recall_at_{at}").value for recall in recalls if recall]
        return sum(values) / len(values) if values else None

    def __str__(self) -> str:
        lines = []
        if self.by_seed:
            lines.append(f"w = {self.w:g}, {self.num_inference_steps} steps")
        for seed, result in self.by_seed.items():
            first, *others = result.lines()
            copies = f"  free prompts: copies {self.free_prompt_copies[seed]}"
            lines += [f"seed {seed}: {first}", *others, copies]
        for part in (self.references, self.more, self.sweep):
            if part is not None:
                lines += part.lines()
        return "\n".join(lines)
