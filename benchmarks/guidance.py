"""`python benchmarks/guidance.py [--model RUN]`: APG and CFG rescale beside plain guidance (17), judged at several w.

Rescale (Lin et al. 2305.08891, (15), (16)) gives the guided prediction the conditional one's standard deviation; APG (Sadat et
al. 2410.02416) bounds the difference of the two x_0 predictions and drops its part along the conditional one.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import points, table
from pipeline.data import sampler
from pipeline.diffusion import losses
from pipeline.diffusion.guidance import guide
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation import evaluate, retrieval, samples
from pipeline.models import locate

SEED = 3000
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(out_c: Tensor, out_u: Tensor, w: Tensor) -> Tensor:
    """(17)."""
    return guide(out_c, out_u, w)


class Rescale:
    """(15), (16) of 2305.08891: x_cfg by std(x_c) / std(x_cfg), each image's, mixed with x_cfg by phi."""

    def __init__(self, phi: float = 0.7):
        self.phi = phi

    def __call__(self, out_c: Tensor, out_u: Tensor, w: Tensor) -> Tensor:
        """(B, ...)."""
        guided, dims = guide(out_c, out_u, w), tuple(range(1, out_c.ndim))
        rescaled = guided * out_c.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return self.phi * rescaled + (1 - self.phi) * guided


class Apg:
    """2410.02416 on x_0, for one call: momentum of the difference, a bound `r` on its norm, and eta of its parallel part."""

    def __init__(self, r: float = 15.0, momentum: float = -0.5, eta: float = 0.0):
        self.r, self.momentum, self.eta, self.average = r, momentum, eta, 0.0

    def __call__(self, x_0_c: Tensor, x_0_u: Tensor, w: Tensor) -> Tensor:
        """(B, ...)."""
        dims = tuple(range(1, x_0_c.ndim))
        self.average = x_0_c - x_0_u + self.momentum * self.average
        size = self.average.square().sum(dims, keepdim=True).sqrt()
        difference = self.average * (self.r / size.clamp(min=1e-12)).clamp(max=1)
        along = x_0_c / x_0_c.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-12)
        parallel = (difference * along).sum(dims, keepdim=True) * along
        return guide(x_0_c, x_0_c - (difference - parallel) - self.eta * parallel, w)


RULES: dict[str, Callable[[], Rule]] = {
    "plain": lambda: plain,
    "rescale": Rescale,
    "APG": Apg,
}  # made anew for every call


class Guided(TextToImagePipeline):
    """The pipeline with a rule in (17)'s place; the two predictions are made by two calls."""

    rule: Rule = staticmethod(plain)

    def _predict(self, x_t, t, captions, empty, w, *rest) -> Tensor:
        ask = super()._predict
        out_c, out_u = (
            ask(x_t, t, captions, empty, torch.full_like(w, only), *rest) for only in (0.0, -1.0)
        )
        if not isinstance(self.rule, Apg):
            return self.rule(out_c, out_u, w)
        scheduler = self.scheduler
        x_0 = self.rule(*(scheduler.predict_x_0(out, t, x_t) for out in (out_c, out_u)), w)
        return losses.network_target(scheduler, x_0, scheduler.predict_eps(x_0, x_t, t), t)


def judged(
    folder: Path, captions: int, ws: list[float], steps: int, batch: int
) -> dict[tuple[str, float], Tensor]:
    """The ranks of the drawings of some training captions, by rule and w, from the same noise."""
    _config, judge, bank, pipe = evaluate.load_run(folder)
    kept = {name: pipe.config[name] for name in ("caption_length", "caption_dropout", "w")}
    guided = Guided(**pipe.components, **kept)
    guided.set_progress_bar_config(disable=True)
    rows = sampler.evenly_spaced(captions, bank.n_train)
    prompts, found = bank.captions_of(rows), {}
    for name, make in RULES.items():
        for w in ws:
            images = []
            for start in range(0, len(prompts), batch):
                guided.rule = make()
                images.append(
                    samples.generate_batch(
                        guided,
                        prompts[start : start + batch],
                        w=w,
                        seed=SEED + start,
                        num_inference_steps=steps,
                    )
                )
            found[name, w] = retrieval.retrieval_ranks(
                judge.features(torch.cat(images)), bank.features, bank.own[rows]
            )
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = bench.parser(__doc__)
    parser.add_argument(
        "--model", help="a run's folder (default: the newest run, else pretrained/emoji)"
    )
    parser.add_argument("--captions", type=int, default=128, help="training captions to judge on")
    parser.add_argument("--w", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--steps", type=int, default=20)
    args = bench.parse(parser, argv)
    if args.quick:
        args.captions, args.steps = 6, 2
    bench.prepare()
    model = args.model or locate.default_model(finished=True)
    if model is None:
        print("There is no run to judge, so guidance is not compared: make train, or --model RUN.")
        return
    ranks = judged(Path(model), args.captions, args.w, args.steps, 32)
    lines, adopted = [], []
    for w in args.w:
        for name in RULES:
            summary = retrieval.recall_summary(ranks[name, w])
            top, five = (bench.paired(ranks[name, w] <= n, ranks["plain", w] <= n) for n in (1, 5))
            if name != "plain" and five[1] > 0:
                adopted.append(f"{name} at w = {w:g}")
            lines.append(
                [
                    f"{w:g}",
                    name,
                    f"{summary['first']['share']:.1%}",
                    points(top),
                    f"{summary['first_five']['share']:.1%}",
                    points(five),
                ]
            )
    best = {name: max(args.w, key=lambda w: int((ranks[name, w] <= 5).sum())) for name in RULES}
    tops = [
        f"{name} at w = {w:g}: {points(bench.paired(ranks[name, w] <= 5, ranks['plain', best['plain']] <= 5))}"
        for name, w in best.items()
        if name != "plain"
    ]
    head = [
        "w",
        "rule",
        "first",
        "against plain, points (95 %)",
        "first five",
        "against plain, points (95 %)",
    ]

    def draw(axes) -> str:
        for name in RULES:
            axes.plot(
                args.w,
                [100 * float((ranks[name, w] <= 5).double().mean()) for w in args.w],
                "o-",
                label=name,
            )
        axes.set(xlabel="w", ylabel="own picture among the first five, %", xscale="log")
        axes.legend()
        return "first five by rule and w"

    apg = Apg()
    bench.publish(
        args,
        __file__,
        bench.command_line(argv),
        "Guidance",
        f"`{model}`, {args.captions} training captions, {args.steps} steps; rescale with phi = {Rescale().phi:g}; APG with "
        f"r = {apg.r:g}, momentum {apg.momentum:g}, eta = {apg.eta:g}. Paired bootstrap against plain guidance at the same w.",
        table(head, lines),
        f"Better than plain guidance by the interval of the first five: {', '.join(adopted) or 'none'}. Each rule at its best w "
        f"against plain at its own ({best['plain']:g}), chosen on these drawings: {'; '.join(tops)}.",
        bench.figure(args, "guidance", draw),
    )


if __name__ == "__main__":
    main()
