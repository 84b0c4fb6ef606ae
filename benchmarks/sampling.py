"""`python benchmarks/sampling.py [--model RUN]`: what a picture costs, beside stock diffusers and the bare network calls.

Ours and stock StableDiffusionPipeline draw with the same network, caption states, noise, steps and precision; the bound is the
network's calls alone. Then what fewer or cheaper calls are worth, judged on training captions by pipeline.evaluation.
"""

import copy
import functools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import points, ratios, spread, table, target
from pipeline import hardware
from pipeline.config import DEFAULT, load_file
from pipeline.data import image_ops, sampler
from pipeline.diffusion.guidance import interval
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.text_to_image import TextToImagePipeline, noise_level
from pipeline.evaluation import evaluate, retrieval
from pipeline.models import build, loading, locate, text_encoders

LEVEL = 1 / 255
MARGIN = 0.05  # of the first-five rate: what is lost at most where a way to draw counts as no worse
SEED = 2000  # of the judged drawings: neither of those that choose or report w elsewhere


def opened(model: str | None, config: str) -> tuple[TextToImagePipeline, str]:
    """The pipeline of a run or the newest one, else of a configuration with random weights; and what it is."""
    model = model or locate.default_model(finished=True)
    if model is not None:
        pipe, name = loading.load_pipeline(model), f"`{model}`"
    else:
        chosen = load_file(config)
        tokenizer, encoder = text_encoders.load_text_encoder(chosen.model.text_encoder)
        torch.manual_seed(0)
        unet = build.build_unet(chosen, encoder.config.hidden_size).eval()
        pipe, name = (
            build.build_pipeline(chosen, unet, tokenizer, encoder, None),
            f"random weights in the shape of `{config}`",
        )
    pipe.set_progress_bar_config(disable=True)
    side, weights = (
        pipe.unet.config.sample_size,
        build.parameter_count(list(pipe.unet.parameters())),
    )
    return (
        pipe,
        f"{name}: {weights / 1e6:.1f} M weights, {side} x {side} x {pipe.unet.config.in_channels}",
    )


def stock(pipe: TextToImagePipeline) -> StableDiffusionPipeline:
    """diffusers' own pipeline and DDPM scheduler around the same network and autoencoder; it draws from caption states."""
    plain = DDPMScheduler(
        steps_offset=1, clip_sample=False
    )  # what its constructor does not rewrite
    theirs = StableDiffusionPipeline(
        pipe.vae or PatchAutoencoder(1),
        None,
        None,
        pipe.unet,
        plain,
        None,
        None,
        requires_safety_checker=False,
    )
    theirs.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def precision(bf16: bool):
    """The context that a pipeline is called in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


class Contenders:
    """Ours, stock's and the bare network calls for one batch of the same states and noise; pictures (B, H, W, 3) in [0, 1]."""

    def __init__(self, pipe: TextToImagePipeline, batch: int, steps: int, w: float, bf16: bool):
        self.pipe, self.theirs, self.bf16, self.batch = pipe, stock(pipe), bf16, batch
        self.captions, self.empty = pipe.encode_prompt([f"a red heart {i}" for i in range(batch)])
        c, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
        self.x_T = torch.randn(batch, c, size, size, generator=torch.Generator().manual_seed(0))
        self.request = {
            "prompt_embeds": self.captions,
            "negative_prompt_embeds": self.empty,
            "num_inference_steps": steps,
            "latents": self.x_T,
            "output_type": "np",
        }
        self.w, scheduler = w, copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(steps)
        self.timesteps = scheduler.timesteps

    def generators(self) -> list[torch.Generator]:
        """One an image."""
        return [torch.Generator().manual_seed(i) for i in range(self.batch)]

    def ours(self, w=None) -> np.ndarray:
        """By this project's pipeline."""
        with precision(self.bf16):
            return self.pipe(
                **self.request, w=self.w if w is None else w, generator=self.generators()
            ).images

    def stocks(self) -> np.ndarray:
        """By diffusers' pipeline."""
        with precision(self.bf16):
            return self.theirs(
                **self.request, guidance_scale=1 + self.w, generator=self.generators()
            ).images

    @torch.no_grad()
    def bare(self, doubled: bool = True) -> None:
        """The network's calls and nothing else."""
        times = 2 if doubled else 1
        x, states = self.x_T.repeat(times, 1, 1, 1), torch.cat([self.empty, self.captions][-times:])
        with precision(self.bf16):
            for t in self.timesteps:
                self.pipe.unet(x, t, encoder_hidden_states=states, return_dict=False)

    def half(self) -> tuple[Callable, float]:
        """Guidance in the middle half of the plan, and the share of the steps that it guides."""
        return middle_half(self.pipe.scheduler, self.timesteps, self.w)


def middle_half(
    scheduler: DDPMScheduler, timesteps: torch.Tensor, w: float
) -> tuple[Callable, float]:
    """Guidance between the noise levels of a plan's quartiles, and the share of the steps that it guides."""
    levels, n = [noise_level(scheduler, t) for t in timesteps], len(timesteps)
    lo, hi = levels[n - 1 - n // 4], levels[n // 4]
    return interval(w, lo, hi), sum(lo <= level <= hi for level in levels) / n


def speed(
    pipe: TextToImagePipeline, batches: list[int], steps: int, repeats: int, w: float
) -> tuple[str, list[str]]:
    """The table of time per image, with the cost k of the doubled call, and what it says of the goals."""
    rows, goals = [], []
    for bf16 in dict.fromkeys([False, hardware.has_bf16(torch.device("cpu"))]):
        for batch in batches:
            some = Contenders(pipe, batch, steps, w, bf16)
            apart = float(np.abs(some.ours() - some.stocks()).max())
            if (
                not bf16 and apart > LEVEL
            ):  # bf16: stock draws its noise in the network's dtype, ours in the sample's
                raise AssertionError(
                    f"ours and stock differ by {255 * apart:.2f}/255 at batch {batch}, expected 1/255 at most"
                )
            guided, share = some.half()
            seconds = bench.in_turns(
                {
                    "ours": some.ours,
                    "stock": some.stocks,
                    "bare": some.bare,
                    "single": lambda: some.bare(doubled=False),
                    "half": lambda: some.ours(guided),
                },
                repeats,
            )
            k = median(ratios(seconds["bare"], seconds["single"]))
            bound = ratios(seconds["bare"], seconds["ours"])
            theirs, faster = (
                ratios(seconds["stock"], seconds["ours"]),
                ratios(seconds["ours"], seconds["half"]),
            )
            best, case = (
                k / (share * k + 1 - share),
                f"{'bf16' if bf16 else 'float32'}, batch {batch}",
            )
            rows.append(
                [
                    case,
                    spread(seconds["ours"], ".1f", 1000 / batch),
                    spread(theirs),
                    spread(bound),
                    f"{k:.2f}",
                    f"{spread(faster)} of {best:.2f}",
                    f"{255 * apart:.2f}/255" if not bf16 else "-",
                ]
            )
            goals += [
                target(f"share of the bound, {case}", median(bound), 0.95),
                target(f"stock / ours, {case}", median(theirs), 1),
                target(
                    f"the interval's share of what k allows, {case}", median(faster) / best, 0.9
                ),
            ]
    head = [
        "",
        "ours, ms an image",
        "stock / ours",
        "bare calls / ours",
        "k",
        "guidance in half the steps: speed-up",
        "largest pixel difference",
    ]
    return table(head, rows), goals


# ---- cheaper sampling, judged


def cheaper(
    pipe: TextToImagePipeline, w: float, steps: int
) -> dict[str, tuple[TextToImagePipeline, dict, bool]]:
    """Ways to draw, by name: a pipeline, its call's arguments, whether in bf16. The first is what the others are held against."""
    parts, kept = (
        pipe.components,
        {name: pipe.config[name] for name in ("caption_length", "caption_dropout", "w")},
    )
    own, bf16 = pipe.scheduler, hardware.has_bf16(torch.device("cpu"))

    def by(kind, **changes):
        # trained_betas: stock solvers do not know every beta schedule; thresholding at 1: how they clip x_0
        same = ("num_train_timesteps", "prediction_type", "clip_sample", "timestep_spacing")
        changes = (
            {name: own.config[name] for name in same}
            | {"trained_betas": own.betas.tolist()}
            | changes
        )
        changes |= (
            {"thresholding": own.config.clip_sample, "sample_max_value": 1.0}
            if kind in SOLVERS
            else {}
        )
        made = TextToImagePipeline(
            **{**parts, "scheduler": kind.from_config(own.config, **changes)}, **kept
        )
        made.set_progress_bar_config(disable=True)
        return made

    half = TextToImagePipeline(**{**parts, "unet": copy.deepcopy(pipe.unet).bfloat16()}, **kept)
    half.set_progress_bar_config(disable=True)
    scheduler = copy.deepcopy(own)
    scheduler.set_timesteps(steps)
    middle, _ = middle_half(own, scheduler.timesteps, w)
    few, fewer = max(steps * 3 // 10, 1), max(steps // 5, 1)
    ways = {
        f"{steps} ancestral steps": (pipe, {"num_inference_steps": steps}, bf16),
        "the same in float32": (pipe, {"num_inference_steps": steps}, False),
        "the same, bf16 weights": (half, {"num_inference_steps": steps}, False),
        "guidance in the middle half": (pipe, {"num_inference_steps": steps, "w": middle}, bf16),
    }
    for eta in (1, 0.5, 0):
        ways[f"{few} steps, eta = {eta}"] = (pipe, {"num_inference_steps": few, "eta": eta}, bf16)
    for spacing in ("linspace", "leading"):
        ways[f"{few} steps, {spacing}"] = (
            by(type(own), timestep_spacing=spacing),
            {"num_inference_steps": few},
            bf16,
        )
    for kind in (DDIMScheduler, *SOLVERS):
        name = kind.__name__.removesuffix("Scheduler").removesuffix("Multistep")
        ways[f"{fewer} steps, {name}"] = (by(kind), {"num_inference_steps": fewer}, bf16)
    ways[f"{few} steps, DPMSolver, middle half"] = (
        by(SOLVERS[0]),
        {"num_inference_steps": few, "w": middle},
        bf16,
    )
    return {
        name: (made, {"w": w} | call, wide)
        for name, (made, call, wide) in ways.items()
        if bf16 or "bf16" not in name
    }


SOLVERS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)


def judged(
    folder: Path, captions: int, w: float, steps: int, batch: int, doc
) -> tuple[str, list[str], str]:
    """The table of judged ways to draw, what it says of the goal, and its figure. All ways draw a batch before the next."""
    _config, judge, bank, pipe = evaluate.load_run(folder)
    rows = sampler.evenly_spaced(captions, bank.n_train)
    prompts, ways = bank.captions_of(rows), cheaper(pipe, w, steps)
    images, seconds = {name: [] for name in ways}, {name: [] for name in ways}
    for start in range(0, len(prompts), batch):
        for name, (made, call, bf16) in ways.items():
            began = time.perf_counter()
            with (
                precision(bf16),
                warnings.catch_warnings(action="ignore"),
            ):  # leading: that it starts from no pure noise
                drawn = made(
                    prompts[start : start + batch], seed=SEED + start, output_type="pt", **call
                ).images
            seconds[name].append(time.perf_counter() - began)
            images[name].append(image_ops.as_uint8(drawn))
    ranks = {
        name: retrieval.retrieval_ranks(
            judge.features(torch.cat(some)), bank.features, bank.own[rows]
        )
        for name, some in images.items()
    }
    first = next(iter(ways))
    lines, equal, places = [], {}, {}
    for name, found in ranks.items():
        faster, summary = ratios(seconds[first], seconds[name]), retrieval.recall_summary(found)
        top, five = (bench.paired(found <= n, ranks[first] <= n) for n in (1, 5))
        if five[1] >= -MARGIN and name != first:
            equal[name] = median(faster)
        places[name] = (median(faster), summary["first_five"]["share"])
        lines.append(
            [
                name,
                spread(faster),
                f"{summary['first']['share']:.1%}",
                points(top),
                f"{summary['first_five']['share']:.1%}",
                points(five),
            ]
        )
    head = [
        "way to draw",
        "speed-up",
        "first",
        "difference, points (95 %)",
        "first five",
        "difference, points (95 %)",
    ]
    best = max(equal, key=equal.get, default=first)
    goal = target(
        f"fastest way whose first five are at most {100 * MARGIN:g} points fewer, by the whole interval ({best})",
        equal.get(best, 1.0),
        3,
    )
    return (
        table(head, lines),
        [goal],
        bench.figure(doc, "sampling", functools.partial(plot, places)),
    )


def plot(places: dict[str, tuple[float, float]], axes) -> str:
    """Every way at its (speed-up, share of first fives); the first is what the others are compared with."""
    for n, (name, (x, y)) in enumerate(places.items()):
        axes.plot(x, 100 * y, "o^"[n // 10 % 2], label=name)  # ten colours
    axes.set(
        xlabel=f"speed-up against {next(iter(places))}",
        ylabel="own picture among the first five, %",
    )
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return "judged quality against speed"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = bench.parser(__doc__)
    parser.add_argument(
        "--model",
        help="a run's folder or a saved pipeline's (default: the newest run, else pretrained/emoji)",
    )
    parser.add_argument("--config", default=DEFAULT, help="the shape of the random weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=25, help="of the timed calls")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--w", type=float, default=1.0)
    parser.add_argument(
        "--captions", type=int, default=192, help="training captions to judge on; 0 judges nothing"
    )
    args = bench.parse(parser, argv)
    if args.quick:
        args.batch, args.steps, args.repeats, args.captions = [1, 2], 4, 2, min(args.captions, 6)
    bench.prepare()
    pipe, name = opened(args.model, args.config)
    timed, goals = speed(pipe, args.batch, args.steps, args.repeats, args.w)
    some = Contenders(pipe, max(args.batch), 2, args.w, hardware.has_bf16(pipe.device))
    limits = (
        f"What limits it, at batch {max(args.batch)} in {'bf16' if some.bf16 else 'float32'}, by torch's profiler: "
        f"{bench.where(some.ours)}."
    )
    paragraphs = [
        f"{name}; w = {args.w:g}; the timed calls take {args.steps} steps. Medians of {args.repeats} turns, with the "
        "least and the greatest; k is a doubled call's time over a single one's.",
        timed,
        "\n".join(goals),
        limits,
    ]
    model = args.model or locate.default_model(finished=True)
    if args.captions and model is not None:
        rows, goals, picture = judged(
            Path(model), args.captions, args.w, 8 if args.quick else 50, 32, args
        )
        paragraphs += [
            f"Cheaper ways to draw {args.captions} training captions, 32 at a time, which every way draws before "
            "the next 32: own picture first and among the first five, by the judge; paired against the first row.",
            rows,
            "\n".join(goals),
            picture,
        ]
    bench.publish(args, __file__, bench.command_line(argv), "Sampling", *paragraphs)


if __name__ == "__main__":
    main()
