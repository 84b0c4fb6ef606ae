"""`python benchmarks/sampling.py [--model RUN]`: the cost of an image, and cheaper ways to sample.

Ours and the stock StableDiffusionPipeline sample with the same network, caption states, noise,
steps and precision. The bound is the network's calls alone. Then recall shows what fewer or cheaper
calls are worth on training captions.
"""

import argparse
import contextlib
import copy
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import points, ratios, spread, table, target
from pipeline import TextToImagePipeline
from pipeline.config import DEFAULT, load_file
from pipeline.data.image_ops import as_uint8
from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion.guidance import interval
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.text_to_image import noise_level
from pipeline.evaluation.evaluate import load_run
from pipeline.evaluation.retrieval import recall_summary
from pipeline.hardware import has_bf16
from pipeline.models.build import (
    build_autoencoder,
    build_pipeline,
    build_unet,
    parameter_count,
)
from pipeline.models.loading import load_pipeline
from pipeline.models.locate import default_model
from pipeline.models.text_encoders import load_text_encoder

LEVEL = 1 / 255
MARGIN = 0.05  # of recall@5: the most that a way to sample may lose and count as no worse
SEED = 2000  # not one that chooses or reports w elsewhere
BATCH = 32
SOLVERS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)


def load_or_build(model: str | None, config: str) -> tuple[TextToImagePipeline, str]:
    """Return the pipeline of a run, or of a configuration with random weights; and what it is."""
    model = model or default_model(finished=True)
    if model is not None:
        pipe = load_pipeline(model)
        name = f"`{model}`"
    else:
        chosen = load_file(config)
        tokenizer, encoder = load_text_encoder(chosen.model.text_encoder)
        torch.manual_seed(0)
        vae = build_autoencoder(chosen.model)
        unet = build_unet(chosen, encoder.config.hidden_size, vae).eval()
        pipe = build_pipeline(chosen, unet, tokenizer, encoder, None, vae)
        name = f"random weights in the shape of `{config}`"
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    millions = parameter_count(list(pipe.unet.parameters())) / 1e6
    shape = f"{side} x {side} x {pipe.unet.config.in_channels}"
    return pipe, f"{name}: {millions:.1f} M weights, {shape}"


def stock_pipeline(pipe: TextToImagePipeline) -> StableDiffusionPipeline:
    """Return diffusers' pipeline and DDPM scheduler around the same network and autoencoder."""
    # The constructor does not rewrite the settings of this scheduler.
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False)
    parts = {"text_encoder": None, "tokenizer": None, "unet": pipe.unet, "scheduler": scheduler}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    stock = StableDiffusionPipeline(pipe.vae or PatchAutoencoder(1), **parts)
    stock.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    return stock


def autocast(bf16: bool) -> contextlib.AbstractContextManager:
    """Return the context that a pipeline is called in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


class Contenders:
    """Ours, stock's and the bare network calls for one batch of the same states and noise."""

    def __init__(self, pipe: TextToImagePipeline, batch: int, steps: int, w: float, bf16: bool):
        self.pipe = pipe
        self.stock = stock_pipeline(pipe)
        self.batch = batch
        self.w = w
        self.bf16 = bf16
        self.captions, self.empty = pipe.encode_prompt([f"a red heart {i}" for i in range(batch)])
        size = pipe.unet.config.sample_size
        shape = (batch, pipe.unet.config.in_channels, size, size)
        self.x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.request = {
            "prompt_embeds": self.captions,
            "negative_prompt_embeds": self.empty,
            "num_inference_steps": steps,
            "latents": self.x_T,
            "output_type": "np",
        }
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(steps)
        self.timesteps = scheduler.timesteps

    def generators(self) -> list[torch.Generator]:
        """Return a generator an image."""
        return [torch.Generator().manual_seed(i) for i in range(self.batch)]

    def call_ours(self, w=None) -> np.ndarray:
        """Return images (B, H, W, 3) in [0, 1] by this project's pipeline."""
        w = self.w if w is None else w
        with autocast(self.bf16):
            return self.pipe(**self.request, w=w, generator=self.generators()).images

    def call_stock(self) -> np.ndarray:
        """Return images (B, H, W, 3) in [0, 1] by diffusers' pipeline."""
        scale = 1 + self.w
        generators = self.generators()
        with autocast(self.bf16):
            call = {"guidance_scale": scale, "generator": generators}
            return self.stock(**self.request, **call).images

    @torch.no_grad()
    def call_network(self, doubled: bool = True) -> None:
        """Make the network's calls and nothing else."""
        times = 2 if doubled else 1
        x = self.x_T.repeat(times, 1, 1, 1)
        states = torch.cat([self.empty, self.captions][-times:])
        with autocast(self.bf16):
            for t in self.timesteps:
                self.pipe.unet(x, t, encoder_hidden_states=states, return_dict=False)

    def half_guided(self) -> tuple[Callable, float]:
        """Return guidance in the middle half of the plan, and the share of guided steps."""
        return middle_half(self.pipe.scheduler, self.timesteps, self.w)


def middle_half(scheduler: DDPMScheduler, timesteps: Tensor, w: float) -> tuple[Callable, float]:
    """Return guidance between the noise levels of a plan's quartiles, and the share it guides."""
    levels = [noise_level(scheduler, t) for t in timesteps]
    n = len(timesteps)
    low = levels[n - 1 - n // 4]
    high = levels[n // 4]
    return interval(w, low, high), sum(low <= level <= high for level in levels) / n


def measure_speed(
    pipe: TextToImagePipeline, batches: list[int], steps: int, repeats: int, w: float
) -> tuple[str, list[str]]:
    """Return the table of time per image, and what it says of the goals.

    k is the cost of a doubled network call over a single one.
    """
    rows = []
    goals = []
    for bf16 in dict.fromkeys([False, has_bf16(torch.device("cpu"))]):
        for batch in batches:
            some = Contenders(pipe, batch, steps, w, bf16)
            difference = float(np.abs(some.call_ours() - some.call_stock()).max())
            # In bf16, stock's noise is in the network's dtype and ours in the sample's.
            if not bf16 and difference > LEVEL:
                raise AssertionError(
                    f"ours and stock differ by {255 * difference:.2f}/255 at batch {batch}, "
                    "expected at most 1/255"
                )
            guided, share = some.half_guided()
            calls = {
                "ours": some.call_ours,
                "stock": some.call_stock,
                "bare": some.call_network,
                "single": lambda some=some: some.call_network(doubled=False),
                "half": lambda some=some, guided=guided: some.call_ours(guided),
            }
            seconds = bench.in_turns(calls, repeats)
            k = median(ratios(seconds["bare"], seconds["single"]))
            best = k / (share * k + 1 - share)
            bound = ratios(seconds["bare"], seconds["ours"])
            stock = ratios(seconds["stock"], seconds["ours"])
            faster = ratios(seconds["ours"], seconds["half"])
            case = f"{'bf16' if bf16 else 'float32'}, batch {batch}"
            row = [case, spread(seconds["ours"], ".1f", 1000 / batch), spread(stock), spread(bound)]
            row += [f"{k:.2f}", f"{spread(faster)} of {best:.2f}"]
            rows.append([*row, "-" if bf16 else f"{255 * difference:.2f}/255"])
            gain = f"the interval's share of what k allows, {case}"
            goals.append(target(f"share of the bound, {case}", median(bound), 0.95))
            goals.append(target(f"stock / ours, {case}", median(stock), 1))
            goals.append(target(gain, median(faster) / best, 0.9))
    head = ["", "ours, ms an image", "stock / ours", "bare calls / ours", "k"]
    head += ["guidance in half the steps: speed-up", "largest pixel difference"]
    return table(head, rows), goals


# ---- cheaper sampling


def with_parts(pipe: TextToImagePipeline, **parts) -> TextToImagePipeline:
    """Return the pipeline with some parts replaced."""
    settings = {name: pipe.config[name] for name in ("caption_length", "caption_dropout", "w")}
    made = TextToImagePipeline(**{**pipe.components, **parts}, **settings)
    made.set_progress_bar_config(disable=True)
    return made


def with_scheduler(pipe: TextToImagePipeline, kind: type, **changes) -> TextToImagePipeline:
    """Return the pipeline with another scheduler of the same noise process."""
    own = pipe.scheduler
    names = ("num_train_timesteps", "prediction_type", "clip_sample", "timestep_spacing")
    settings = {name: own.config[name] for name in names}
    # Stock solvers do not have every beta schedule.
    settings["trained_betas"] = own.betas.tolist()
    if kind in SOLVERS:
        # They clip x_0 by thresholding.
        settings |= {"thresholding": own.config.clip_sample, "sample_max_value": 1.0}
    return with_parts(pipe, scheduler=kind.from_config(own.config, **settings | changes))


def ways_to_sample(
    pipe: TextToImagePipeline, w: float, steps: int
) -> dict[str, tuple[TextToImagePipeline, dict, bool]]:
    """Return by name a pipeline, its call's arguments, and whether it runs in bf16.

    The others are compared with the first.
    """
    bf16 = has_bf16(torch.device("cpu"))
    half = with_parts(pipe, unet=copy.deepcopy(pipe.unet).bfloat16())
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    middle, _ = middle_half(pipe.scheduler, scheduler.timesteps, w)
    few = max(steps * 3 // 10, 1)
    fewer = max(steps // 5, 1)
    in_all = {"num_inference_steps": steps}
    in_few = {"num_inference_steps": few}
    ways = {
        f"{steps} ancestral steps": (pipe, in_all, bf16),
        "the same in float32": (pipe, in_all, False),
        "the same, bf16 weights": (half, in_all, False),
        "guidance in the middle half": (pipe, in_all | {"w": middle}, bf16),
    }
    for eta in (1, 0.5, 0):
        ways[f"{few} steps, eta = {eta}"] = (pipe, in_few | {"eta": eta}, bf16)
    for spacing in ("linspace", "leading"):
        spaced = with_scheduler(pipe, type(pipe.scheduler), timestep_spacing=spacing)
        ways[f"{few} steps, {spacing}"] = (spaced, in_few, bf16)
    for kind in (DDIMScheduler, *SOLVERS):
        name = kind.__name__.removesuffix("Scheduler").removesuffix("Multistep")
        call = {"num_inference_steps": fewer}
        ways[f"{fewer} steps, {name}"] = (with_scheduler(pipe, kind), call, bf16)
    solver = with_scheduler(pipe, SOLVERS[0])
    ways[f"{few} steps, DPMSolver, middle half"] = (solver, in_few | {"w": middle}, bf16)
    return {
        name: (made, {"w": w} | call, in_bf16)
        for name, (made, call, in_bf16) in ways.items()
        if bf16 or "bf16" not in name
    }


def measure_ways(
    folder: Path, captions: int, w: float, steps: int, args: argparse.Namespace
) -> tuple[str, str, str]:
    """Return the table of ways to sample, the goal and the figure.

    All ways sample a batch before the next one.
    """
    _config, extractor, references, pipe = load_run(folder)
    rows = evenly_spaced(captions, references.n_train)
    prompts = references.captions_of(rows)
    ways = ways_to_sample(pipe, w, steps)
    images = {name: [] for name in ways}
    seconds = {name: [] for name in ways}
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        for name, (made, call, bf16) in ways.items():
            began = time.perf_counter()
            # "leading" warns that it does not start from pure noise.
            with autocast(bf16), warnings.catch_warnings(action="ignore"):
                found = made(some, seed=SEED + start, output_type="pt", **call).images
            seconds[name].append(time.perf_counter() - began)
            images[name].append(as_uint8(found))
    ranks = {
        name: references.ranks(extractor.features(torch.cat(some)), rows)
        for name, some in images.items()
    }
    first = next(iter(ways))
    lines = []
    equal = {}
    places = {}
    for name, found in ranks.items():
        faster = ratios(seconds[first], seconds[name])
        summary = recall_summary(found)
        by_rank = (summary.recall_at_1.value, summary.recall_at_5.value)
        at_1, at_5 = (bench.paired(found <= n, ranks[first] <= n) for n in (1, 5))
        if at_5[1] >= -MARGIN and name != first:
            equal[name] = median(faster)
        places[name] = (median(faster), by_rank[1])
        line = [name, spread(faster), f"{by_rank[0]:.1%}", points(at_1)]
        lines.append([*line, f"{by_rank[1]:.1%}", points(at_5)])
    difference = "difference, points (95 %)"
    head = ["way to sample", "speed-up", "recall@1", difference, "recall@5", difference]
    best = max(equal, key=equal.get, default=first)
    what = (
        f"fastest way that loses at most {100 * MARGIN:g} points of recall@5, by the whole interval"
    )
    goal = target(f"{what} ({best})", equal.get(best, 1.0), 3)
    figure = bench.figure(args, "sampling", lambda axes: plot_ways(places, axes))
    return table(head, lines), goal, figure


def plot_ways(places: dict[str, tuple[float, float]], axes) -> str:
    """Plot every way at its (speed-up, recall@5); the others are compared with the first."""
    for n, (name, (x, y)) in enumerate(places.items()):
        # There are ten colours.
        axes.plot(x, 100 * y, "o^"[n // 10 % 2], label=name)
    axes.set(xlabel=f"speed-up against {next(iter(places))}", ylabel="recall@5, %")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return "recall@5 against speed"


def main(argv: list[str] | None = None) -> None:
    """Measure and write the section."""
    parser = bench.parser(__doc__)
    add = parser.add_argument
    add("--model", help="a run's folder (default: the newest run, else pretrained/emoji)")
    add("--config", default=DEFAULT, help="the shape of the random weights")
    add("--batch", type=int, nargs="+", default=[1, 4, 16])
    add("--steps", type=int, default=25, help="of the timed calls")
    add("--repeats", type=int, default=5)
    add("--w", type=float, default=1.0)
    add("--captions", type=int, default=192, help="training captions for recall; 0 for none")
    args = bench.parse(parser, argv)
    if args.quick:
        args.batch = [1, 2]
        args.steps = 4
        args.repeats = 2
        args.captions = min(args.captions, 6)
    bench.prepare()
    pipe, name = load_or_build(args.model, args.config)
    timed, goals = measure_speed(pipe, args.batch, args.steps, args.repeats, args.w)
    largest = max(args.batch)
    some = Contenders(pipe, largest, 2, args.w, has_bf16(pipe.device))
    case = f"batch {largest} in {'bf16' if some.bf16 else 'float32'}"
    paragraphs = [
        f"{name}; w = {args.w:g}; the timed calls take {args.steps} steps. Medians of "
        f"{args.repeats} turns with minimum and maximum; k is a doubled call's time over a single "
        "one's.",
        timed,
        "\n".join(goals),
        f"What limits it, at {case}, by torch's profiler: {bench.profile_call(some.call_ours)}.",
    ]
    model = args.model or default_model(finished=True)
    if args.captions and model is not None:
        steps = 8 if args.quick else 50
        rows, goal, figure = measure_ways(Path(model), args.captions, args.w, steps, args)
        paragraphs += [
            f"Cheaper ways to sample {args.captions} training captions, {BATCH} at a time, which "
            f"every way samples before the next {BATCH}; paired with the first row.",
            rows,
            goal,
            figure,
        ]
    bench.publish(args, __file__, argv, "Sampling", *paragraphs)


if __name__ == "__main__":
    main()
