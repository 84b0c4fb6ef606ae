"""`python benchmarks/guidance.py [--model RUN]`: APG and CFG rescale beside plain guidance (17).

Rescale (Lin et al. 2305.08891, (15), (16)) gives the guided prediction the standard deviation of
the conditional one. APG (Sadat et al. 2410.02416) bounds the difference of the two x_0 predictions
and drops its part along the conditional one. Recall is measured at several w.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import points, table
from pipeline import TextToImagePipeline
from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion.guidance import guide
from pipeline.diffusion.losses import network_target
from pipeline.evaluation.evaluate import load_run
from pipeline.evaluation.samples import generate_batch
from pipeline.models.locate import default_model

SEED = 3000
BATCH = 32
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(out_c: Tensor, out_u: Tensor, w: Tensor) -> Tensor:
    """Apply (17)."""
    return guide(out_c, out_u, w)


class Rescale:
    """(15), (16) of 2305.08891: x_cfg std(x_c) / std(x_cfg) of each image, mixed with x_cfg."""

    def __init__(self, phi: float = 0.7):
        self.phi = phi

    def __call__(self, out_c: Tensor, out_u: Tensor, w: Tensor) -> Tensor:
        """Return the guided prediction (B, ...)."""
        guided = guide(out_c, out_u, w)
        dims = tuple(range(1, out_c.ndim))
        rescaled = guided * out_c.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return self.phi * rescaled + (1 - self.phi) * guided


class Apg:
    """2410.02416 on x_0, for one call.

    momentum: of the difference. r: the bound of its norm. eta: how much of its parallel part stays.
    """

    def __init__(self, r: float = 15.0, momentum: float = -0.5, eta: float = 0.0):
        self.r = r
        self.momentum = momentum
        self.eta = eta
        self.average = 0.0

    def __call__(self, x_0_c: Tensor, x_0_u: Tensor, w: Tensor) -> Tensor:
        """Return the guided x_0 (B, ...)."""
        dims = tuple(range(1, x_0_c.ndim))
        self.average = x_0_c - x_0_u + self.momentum * self.average
        size = self.average.square().sum(dims, keepdim=True).sqrt()
        difference = self.average * (self.r / size.clamp(min=1e-12)).clamp(max=1)
        along = x_0_c / x_0_c.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-12)
        parallel = (difference * along).sum(dims, keepdim=True) * along
        return guide(x_0_c, x_0_c - (difference - parallel) - self.eta * parallel, w)


# A rule has a state, so every call gets a new one.
RULES: dict[str, Callable[[], Rule]] = {"plain": lambda: plain, "rescale": Rescale, "APG": Apg}


class Guided(TextToImagePipeline):
    """The pipeline with another rule than (17), which passes equal predictions unchanged."""

    rule: Rule = staticmethod(plain)

    def _predict(self, x_t, t, captions, empty, w, unet_kwargs) -> tuple[Tensor, Tensor]:
        # At w = 1 no prediction is skipped.
        predictions = super()._predict(x_t, t, captions, empty, torch.ones_like(w), unet_kwargs)
        if not isinstance(self.rule, Apg):
            guided = self.rule(*predictions, w)
            return guided, guided
        scheduler = self.scheduler
        x_0_c, x_0_u = (scheduler.predict_x_0(out, t, x_t) for out in predictions)
        x_0 = self.rule(x_0_c, x_0_u, w)
        guided = network_target(scheduler, x_0, scheduler.predict_eps(x_0, x_t, t), t)
        return guided, guided


def measure_ranks(
    folder: Path, captions: int, ws: list[float], steps: int
) -> dict[tuple[str, float], Tensor]:
    """Return the ranks of samples of some training captions by (rule, w), from the same noise."""
    _config, extractor, references, pipe = load_run(folder)
    settings = {name: pipe.config[name] for name in ("caption_length", "caption_dropout", "w")}
    guided = Guided(**pipe.components, **settings)
    guided.set_progress_bar_config(disable=True)
    rows = evenly_spaced(captions, references.n_train)
    prompts = references.captions_of(rows)
    found = {}
    for name, make in RULES.items():
        for w in ws:
            images = []
            for start in range(0, len(prompts), BATCH):
                guided.rule = make()
                call = {"w": w, "seed": SEED + start, "num_inference_steps": steps}
                images.append(generate_batch(guided, prompts[start : start + BATCH], **call))
            features = extractor.features(torch.cat(images))
            found[name, w] = references.ranks(features, rows)
    return found


def main(argv: list[str] | None = None) -> None:
    """Compare the rules and write their section."""
    parser = bench.parser(__doc__)
    parser.add_argument(
        "--model", help="a run's folder (default: the newest run, else pretrained/emoji)"
    )
    parser.add_argument("--captions", type=int, default=128, help="training captions to sample")
    parser.add_argument("--w", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--steps", type=int, default=20)
    args = bench.parse(parser, argv)
    if args.quick:
        args.captions = 6
        args.steps = 2
    bench.prepare()
    model = args.model or default_model(finished=True)
    if model is None:
        print("There is no run to measure. Run make train, or pass --model RUN.")
        return
    ranks = measure_ranks(Path(model), args.captions, args.w, args.steps)

    def recall(name: str, w: float, at: int) -> float:
        return float((ranks[name, w] <= at).double().mean())

    rows = []
    better = []
    for w in args.w:
        for name in RULES:
            row = [f"{w:g}", name]
            for at in (1, 5):
                interval = bench.paired(ranks[name, w] <= at, ranks["plain", w] <= at)
                row += [f"{recall(name, w, at):.1%}", points(interval)]
            if name != "plain" and interval[1] > 0:
                better.append(f"{name} at w = {w:g}")
            rows.append(row)
    best = {name: max(args.w, key=lambda w: recall(name, w, 5)) for name in RULES}
    at_best = []
    for name, w in best.items():
        if name != "plain":
            interval = bench.paired(ranks[name, w] <= 5, ranks["plain", best["plain"]] <= 5)
            at_best.append(f"{name} at w = {w:g}: {points(interval)}")

    def plot(axes) -> str:
        for name in RULES:
            axes.plot(args.w, [100 * recall(name, w, 5) for w in args.w], "o-", label=name)
        axes.set(xlabel="w", ylabel="recall@5, %", xscale="log")
        axes.legend()
        return "recall@5 by rule and w"

    apg = Apg()
    against = "against plain, points (95 %)"
    bench.publish(
        args,
        __file__,
        argv,
        "Guidance",
        f"`{model}`, {args.captions} training captions, {args.steps} steps; rescale with phi = "
        f"{Rescale().phi:g}; APG with r = {apg.r:g}, momentum {apg.momentum:g}, eta = {apg.eta:g}. "
        "Paired bootstrap against plain guidance at the same w.",
        table(["w", "rule", "recall@1", against, "recall@5", against], rows),
        f"Better than plain guidance by the interval of recall@5: {', '.join(better) or 'none'}. "
        f"Each rule at its best w against plain at its own ({best['plain']:g}), chosen on these "
        f"samples: {'; '.join(at_best)}.",
        bench.figure(args, "guidance", plot),
    )


if __name__ == "__main__":
    main()
