"""Measure what sampling parameters change: one at a time from a base, quality against alignment.

A sweep writes images/sweep.png, metrics.json and the card. The samples of every point are cached,
so an interrupted sweep resumes.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from pipeline.evaluation.retrieval import EvaluationError, recall_summary
from pipeline.evaluation.samples import generate_samples, samples_file, samples_identity
from pipeline.runs.folder import IMAGES_FOLDER, RunFolder
from pipeline.runs.results import Metrics, Sweep, SweepPoint
from pipeline.search.search import calls_of_sample

WHOLE_INTERVAL = (0.0, 1.0)
SWEEP_WEIGHTS = ("averaged", "raw")  # the pipeline's, and those of the newest checkpoint


@dataclass(frozen=True)
class Point:
    """One setting of the sampler."""

    w: float
    steps: int
    eta: float | None  # None if the scheduler has none
    interval: tuple[float, float] = WHOLE_INTERVAL  # the noise levels with guidance
    weights: str = "averaged"

    @property
    def guidance(self) -> Weight:
        """The w of a call."""
        if self.interval == WHOLE_INTERVAL:
            return self.w
        return guidance_module.interval(self.w, *self.interval)

    @property
    def name(self) -> str:
        """The part of the file name beside w and seed; empty for what plain evaluation samples."""
        eta = "" if self.eta in (None, 1) else f"-eta{self.eta:g}"
        low, high = self.interval
        interval = "" if self.interval == WHOLE_INTERVAL else f"-interval{low:g}-{high:g}"
        return eta + interval


def _parse_interval(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(":"))
    # It raises for an invalid interval.
    guidance_module.interval(0.0, low, high)
    return low, high


def _always(_value: object) -> bool:
    return True


# How a parameter's value is read, which values are valid, and what the error says.
SWEEP_PARAMETERS: dict[str, tuple[Callable, Callable, str]] = {
    "w": (float, math.isfinite, "finite numbers, such as w=0,1,2,4"),
    "steps": (int, lambda n: n >= 1, "integers from 1, such as steps=10,25,50"),
    "eta": (float, lambda eta: 0 <= eta <= 1, "numbers from 0 to 1, such as eta=0,1"),
    "interval": (_parse_interval, _always, "LOW:HIGH in 0 to 1, such as interval=0:1,0.3:0.9"),
    "weights": (str, SWEEP_WEIGHTS.__contains__, "averaged or raw, such as weights=averaged,raw"),
}


def parse_sweep(words: list[str]) -> dict[str, list]:
    """Return the values of each parameter of `parameter=a,b` words, in their order."""
    found: dict[str, list] = {}
    for word in words:
        parameter, _, values = word.partition("=")
        if parameter not in SWEEP_PARAMETERS or parameter in found:
            names = ", ".join(SWEEP_PARAMETERS)
            raise EvaluationError(f"Cannot read {word!r}. Pass each of {names} at most once.")
        parse, is_valid, expected = SWEEP_PARAMETERS[parameter]
        try:
            found[parameter] = [parse(value) for value in values.split(",")]
        except ValueError:
            found[parameter] = []
        if not found[parameter] or not all(map(is_valid, found[parameter])):
            raise EvaluationError(f"Cannot read {word!r}. {parameter} takes {expected}.")
    return found


def point_label(value: object) -> str:
    """Return a parameter's value as it is typed."""
    if isinstance(value, tuple):
        return ":".join(map(point_label, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def raw_weights(folder: Path, device: torch.device) -> UNet2DConditionModel:
    """Load the network of the newest checkpoint, whose weights are not averaged."""
    newest = RunFolder(folder).newest()
    if newest is None or not (newest / "unet").is_dir():
        raise EvaluationError(f"{folder} has no checkpoint of a network. Leave weights=raw out.")
    network: Any = UNet2DConditionModel.from_pretrained(newest / "unet", use_safetensors=True)
    return network.eval().to(device)


def sweep(
    folder: Path,
    words: list[str],
    *,
    w: float | None = None,
    seed: int = 0,
    on: int = 256,
    steps: int = 50,
    batch: int = 32,
) -> Metrics:
    """Measure `on` captions, evenly spaced, at every point; return all of metrics.json.

    w, steps: those of the base, from which one parameter is changed at a time.
    """
    values = parse_sweep(words)
    _config, extractor, references, pipe = load_run(folder)
    eta = 1.0 if isinstance(pipe.scheduler, DDPMScheduler) else None
    base = Point(pipe.config["w"] if w is None else w, steps, eta)
    if "interval" in values and base.w in (0, -1):
        raise EvaluationError(f"interval has no effect at w = {base.w:g}. Pass --w 2.")
    curves = {
        parameter: [replace(base, **{parameter: value}) for value in some]
        for parameter, some in values.items()
    }
    points = list(dict.fromkeys([base, *(point for curve in curves.values() for point in curve)]))
    captions = len(references.captions)
    rows = evenly_spaced(on, captions)
    if len(rows) < MIN_SAMPLES:
        raise EvaluationError(
            f"A sweep needs {MIN_SAMPLES} or more captions for the error of its KIDs, got --on "
            f"{on} of {captions}. Leave --on out."
        )
    what = "all" if len(rows) == captions else f"sweep{len(rows)}"
    unets = {"averaged": pipe.unet}
    if any(point.weights == "raw" for point in points):
        unets["raw"] = raw_weights(folder, pipe.device)
    models = {}
    for name, unet in unets.items():
        pipe.unet = unet
        models[name] = samples_identity(pipe, references)
    files = {}
    calls = {}
    for point in points:
        model = models[point.weights]
        files[point] = samples_file(folder, model, point.steps, what + point.name, point.w, seed)
        # It raises, before the first sample, for an eta that the scheduler does not take.
        prepare_extra_step_kwargs(pipe.scheduler, torch.Generator(), point.eta)
        calls[point] = calls_of_sample(pipe, point.guidance, point.steps)
    left = sum(calls[point] * len(rows) for point in points if not files[point].is_file())
    measured = {}
    with tqdm(total=left, desc=f"{len(points)} points", unit="call", dynamic_ncols=True) as bar:
        for point in points:
            pipe.unet = unets[point.weights]
            images = generate_samples(
                pipe,
                references.captions_of(rows),
                point.guidance,
                seed,
                point.steps,
                files[point],
                batch,
                lambda n, point=point: bar.update(n * calls[point]),
                eta=point.eta,
            )
            result = measure_point(extractor, references, images, rows, calls[point])
            measured[point] = result
    labels = {parameter: point_label(value) for parameter, value in asdict(base).items()}
    result = Sweep(
        FEATURE_NETWORK,
        len(rows),
        seed,
        replace(measured[base], at=labels),
        {
            parameter: [
                replace(measured[point], at=point_label(getattr(point, parameter)))
                for point in curve
            ]
            for parameter, curve in curves.items()
        },
    )
    (folder / IMAGES_FOLDER).mkdir(exist_ok=True)
    plot_sweep(result).savefig(folder / IMAGES_FOLDER / "sweep.png", dpi=110)
    return update_metrics(folder, models["averaged"], sweep=result)


def measure_point(
    extractor: FeatureExtractor,
    references: ReferenceSet,
    images: torch.Tensor,
    rows: torch.Tensor,
    calls: int,
) -> SweepPoint:
    """Measure quality and alignment of samples (N, 3, H, W) of some rows; `at` is left empty."""
    features = extractor.features(images)
    recall = recall_summary(references.ranks(features, rows))
    distance = kid(references.features[references.own[rows]], features)
    return SweepPoint(**vars(recall), at="", kid=distance, calls=calls)


def plot_sweep(result: Sweep) -> Figure:
    """Plot KID over recall@5, a curve a parameter, with 95 % intervals; the base is a star."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    ax = figure.subplots()
    for parameter, points in result.curves.items():
        x = [point.recall_at_5.value for point in points]
        y = [point.kid.value for point in points]
        low = [point.recall_at_5.value - point.recall_at_5.interval[0] for point in points]
        high = [point.recall_at_5.interval[1] - point.recall_at_5.value for point in points]
        y_error = [1.96 * point.kid.error for point in points]
        style = {"marker": "o", "label": parameter, "elinewidth": 0.6}
        bars = ax.errorbar(x, y, xerr=[low, high], yerr=y_error, **style)
        text = {"fontsize": 8, "color": bars.lines[0].get_color()}
        for i, point in enumerate(points):
            where = {"xytext": (4, 4), "textcoords": "offset points"}
            ax.annotate(str(point.at), (x[i], y[i]), **where, **text)
    base = result.base
    star = {"markersize": 12, "label": "base", "zorder": 0}
    ax.plot(base.recall_at_5.value, base.kid.value, "k*", **star)
    quality = f"quality: KID ({result.features}), lower is better"
    ax.set(xlabel="alignment: recall@5", ylabel=quality)
    ax.legend()
    return figure
