"""What each knob of sampling does: quality against alignment, one knob changed at a time from one base.

`direct-jump sweep RUN w=0,1,2,4 steps=10,25,50` writes `RUN/images/sweep.png`, metrics.json and the card.
Every point's pictures are kept, so that a sweep goes on where it was stopped.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion import guidance as guidance_module
from pipeline.diffusion.guidance import Weight
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import prepare_extra_step_kwargs
from pipeline.evaluation.distances import MIN_SAMPLES, kid
from pipeline.evaluation.evaluate import load_run, update_metrics
from pipeline.evaluation.feature_extractor import FEATURE_NETWORK, FeatureExtractor
from pipeline.evaluation.reference_set import ReferenceSet
from pipeline.evaluation.retrieval import EvaluationError, recall_summary, retrieval_ranks
from pipeline.evaluation.samples import generate_samples, samples_file, samples_identity
from pipeline.runs.folder import IMAGES_FOLDER, RunFolder
from pipeline.search.search import calls_of_sample

WHOLE_INTERVAL = (0.0, 1.0)  # the guidance interval that is all noise levels
SWEEP_WEIGHTS = (
    "averaged",
    "raw",
)  # the pipeline's, and those that the newest checkpoint trains on with


@dataclass(frozen=True)
class Point:
    """One way to draw."""

    w: float
    steps: int
    eta: float | None  # None where the scheduler takes none
    interval: tuple[float, float] = WHOLE_INTERVAL  # noise levels at which there is guidance
    weights: str = "averaged"

    @property
    def guidance(self) -> Weight:
        """The w of a call."""
        return (
            self.w
            if self.interval == WHOLE_INTERVAL
            else guidance_module.interval(self.w, *self.interval)
        )

    @property
    def name(self) -> str:
        """What its pictures' file says beside w and seed; nothing for what plain evaluation draws."""
        eta = "" if self.eta in (None, 1) else f"-eta{self.eta:g}"
        return eta + (
            "" if self.interval == WHOLE_INTERVAL else "-interval{:g}-{:g}".format(*self.interval)
        )


def _interval(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(":"))
    guidance_module.interval(0.0, low, high)  # which refuses what is none
    return low, high


def _checked(kind: type, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not allowed(value := kind(text)):
            raise ValueError(text)
        return value

    return read


# What a knob's value is read by, and what it may be.
SWEEP_PARAMETERS: dict[str, tuple[Callable, str]] = {
    "w": (_checked(float, math.isfinite), "finite numbers, such as w=0,1,2,4"),
    "steps": (_checked(int, lambda n: n >= 1), "whole numbers from 1, such as steps=10,25,50"),
    "eta": (_checked(float, lambda eta: 0 <= eta <= 1), "numbers from 0 to 1, such as eta=0,1"),
    "interval": (_interval, "noise levels LOW:HIGH between 0 and 1, such as interval=0:1,0.3:0.9"),
    "weights": (
        _checked(str, SWEEP_WEIGHTS.__contains__),
        f"of {', '.join(SWEEP_WEIGHTS)}, such as weights=averaged,raw",
    ),
}


def parse_sweep(words: list[str]) -> dict[str, list]:
    """The values of each knob of `knob=a,b` words, in their order."""
    found: dict[str, list] = {}
    for word in words:
        knob, _, values = word.partition("=")
        if knob not in SWEEP_PARAMETERS or knob in found:
            raise EvaluationError(
                f"--sweep got {word!r}, expected each of {', '.join(SWEEP_PARAMETERS)} once at most: pass w=0,1,2,4"
            )
        parse, expected = SWEEP_PARAMETERS[knob]
        try:
            found[knob] = [parse(value) for value in values.split(",")]
        except ValueError as error:
            raise EvaluationError(f"--sweep got {word!r}, expected {expected}") from error
    return found


def point_label(value) -> str:
    """A knob's value as it is typed."""
    if isinstance(value, tuple):
        return ":".join(map(point_label, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def raw_weights(folder: Path) -> UNet2DConditionModel:
    """The network of the newest checkpoint, whose weights are not averaged."""
    newest = RunFolder(folder).newest()
    if newest is None or not (newest / "unet").is_dir():
        raise EvaluationError(
            f"{folder} holds no checkpoint of a network, expected one for weights=raw: leave that out"
        )
    return UNet2DConditionModel.from_pretrained(newest / "unet", use_safetensors=True).eval()


def sweep(
    folder: Path,
    words: list[str],
    w: list[float] | None,
    seed: int,
    on: int,
    steps: int,
    batch: int,
) -> dict:
    """Draw `on` captions, evenly spread, at every point; write metrics.json, its figure, and return all that the file holds."""
    values = parse_sweep(words)
    if w is not None and len(w) > 1:
        raise EvaluationError(
            f"--w is {w}, expected one number that the sweep starts from: pass the others as --sweep w=0,1"
        )
    _config, judge, bank, pipe = load_run(folder)
    eta = 1.0 if isinstance(pipe.scheduler, DDPMScheduler) else None
    base = Point(pipe.config.w if w is None else w[0], steps, eta)
    if "interval" in values and base.w in (0, -1):
        raise EvaluationError(
            f"interval limits guidance, expected some: at w = {base.w:g} there is none, so pass --w 2"
        )
    curves = {
        knob: [(point_label(value), replace(base, **{knob: value})) for value in some]
        for knob, some in values.items()
    }
    points = list(
        dict.fromkeys([base, *(point for curve in curves.values() for _, point in curve)])
    )

    rows = evenly_spaced(on, len(bank.captions))
    if len(rows) < MIN_SAMPLES:
        raise EvaluationError(
            f"{len(rows)} captions would be drawn, --on {on} of {len(bank.captions)}, expected "
            f"{MIN_SAMPLES} or more for the error of a KID: leave --on out"
        )
    prompts, what = (
        bank.captions_of(rows),
        "all" if len(rows) == len(bank.captions) else f"sweep{len(rows)}",
    )
    unets = {"averaged": pipe.unet}
    if any(point.weights == "raw" for point in points):
        unets["raw"] = raw_weights(folder).to(pipe.device)
    drawn_by, places, calls, found = {}, {}, {}, {}
    for name, pipe.unet in unets.items():
        drawn_by[name] = samples_identity(pipe, bank)
    for point in points:
        places[point] = samples_file(
            folder, drawn_by[point.weights], point.steps, what + point.name, point.w, seed
        )
        prepare_extra_step_kwargs(
            pipe.scheduler, None, point.eta
        )  # which refuses, before anything is drawn, what it does not take
        calls[point] = calls_of_sample(pipe, point.guidance, point.steps)
    left = sum(calls[point] * len(rows) for point in points if not places[point].is_file())
    with tqdm(total=left, desc=f"{len(points)} points", unit="call", dynamic_ncols=True) as bar:
        for point in points:
            pipe.unet = unets[point.weights]
            images = generate_samples(
                pipe,
                prompts,
                point.guidance,
                seed,
                point.steps,
                places[point],
                batch,
                lambda n, point=point: bar.update(n * calls[point]),
                eta=point.eta,
            )
            found[point] = measure_point(judge, bank, images, rows) | {"calls": calls[point]}
    result = {
        "features": FEATURE_NETWORK,
        "captions": len(rows),
        "seed": seed,
        "base": {"at": {knob: point_label(value) for knob, value in asdict(base).items()}}
        | found[base],
        "curves": {
            knob: [{"at": at} | found[point] for at, point in some] for knob, some in curves.items()
        },
    }
    (folder / IMAGES_FOLDER).mkdir(exist_ok=True)
    plot_sweep(result).savefig(folder / IMAGES_FOLDER / "sweep.png", dpi=110)
    return update_metrics(folder, drawn_by["averaged"], sweep=result)


def measure_point(
    judge: FeatureExtractor, bank: ReferenceSet, images: torch.Tensor, rows: torch.Tensor
) -> dict:
    """Quality and alignment of drawings (N, 3, H, W) of some rows of the bank: KID, first, first five."""
    features, own = judge.features(images), bank.own[rows]
    ranks = recall_summary(retrieval_ranks(features, bank.features, own))
    return {
        "kid": kid(bank.features[own], features),
        "first": ranks["first"],
        "first_five": ranks["first_five"],
    }


def plot_sweep(result: dict) -> Figure:
    """Quality against alignment: KID over the share of first-fives, a curve a knob, with 95 % intervals; the base is a star."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    ax = figure.subplots()
    place = lambda point: (point["first_five"]["share"], point["kid"]["value"])
    for knob, points in result["curves"].items():
        x, y = zip(*map(place, points), strict=True)
        wide = [
            [abs(point["first_five"]["interval"][i] - place(point)[0]) for point in points]
            for i in (0, 1)
        ]
        high = [1.96 * point["kid"]["error"] for point in points]
        bars = ax.errorbar(x, y, yerr=high, xerr=wide, marker="o", label=knob, elinewidth=0.6)
        for point in points:
            ax.annotate(
                point["at"],
                place(point),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color=bars.lines[0].get_color(),
            )
    ax.plot(*place(result["base"]), "k*", markersize=12, label="base", zorder=0)
    ax.set(
        xlabel="alignment: own picture among the first five",
        ylabel=f"quality: kid ({result['features']}), lower is better",
    )
    ax.legend()
    return figure
