"""`python benchmarks/ladder.py [--minutes 20] [--seeds 0 1 2] [--rungs NAME …]`: recipe by steps.

From diffusers' recipe to ours, one change a rung. Every rung is a run of train_text2img.py for a
number of minutes. The ladder reports the minutes until recall@5 reaches 40 % on training captions,
and recall@1 on held-out combinations. The peer is denoising-diffusion-pytorch's classifier-free
guidance, with captions as classes, on the same images, threads, precision and minutes, in two
widths: `pip install --no-deps --target data/peers denoising-diffusion-pytorch einops tqdm`.

The same command resumes. Results are saved in docs/ladder.json, and the table has all results of
this machine with these settings. `--dry-run` prints the runs.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import table, target
from pipeline import TextToImagePipeline, hardware
from pipeline.config import load, load_file
from pipeline.data.dataset import load_splits
from pipeline.data.fingerprint import digest
from pipeline.data.sampler import batch_indices
from pipeline.evaluation.evaluate import load_run
from pipeline.evaluation.feature_extractor import FeatureExtractor
from pipeline.evaluation.reference_set import ReferenceSet
from pipeline.evaluation.retrieval import recall_summary
from pipeline.evaluation.samples import generate_batch
from pipeline.models.loading import load_checkpoint
from pipeline.runs.files import replace_text
from pipeline.runs.folder import RunFolder
from pipeline.runs.results import Recall

CONFIG = "configs/emoji-small.yaml"
# The text-to-image example's recipe on our network's shape, with cached captions.
DIFFUSERS = {
    "model.patch_size": "null",
    "model.whitening": "null",
    "model.time_embedding_dim": "null",
    "model.norm_groups": 32,
    "model.text_in_time": False,
    "model.time_scale_shift": False,
    "diffusion.prediction_type": "epsilon",
    "diffusion.beta_schedule": "linear",
    "train.precision": "no",
    "train.batch_size": 16,
    "train.optimizer": "adamw",
    "train.lr": 1e-4,
    "train.matrix_lr": "null",
    "train.lr_schedule": "constant",
    "train.lr_end": 0.0,
    "train.warmup": 0,
    "train.weighting": "simple",
    "train.gamma": "null",
    "train.ema": 0.9999,
}
# Each changes the one before.
RUNGS = {
    "diffusers": {},
    "bf16": {"train.precision": "auto"},
    "patches": {"model.patch_size": 4},
    "x_0": {"diffusion.prediction_type": "sample"},
    "weight": {"train.weighting": "min_velocity", "train.gamma": 5},
    "ema-decay": {
        "train.ema": 0.99,
        "train.lr": 8e-4,
        "train.lr_schedule": "flat_then_linear",
        "train.lr_end": 0.02,
        "train.warmup": 50,
    },
    "captions": {
        "model.text_in_time": True,
        "model.time_scale_shift": True,
        "model.time_embedding_dim": 512,
        "model.whitening": 0.02,
    },
    "sigmoid": {"diffusion.beta_schedule": "sigmoid", "model.norm_groups": 8},
    "muon": {"train.optimizer": "muon", "train.matrix_lr": 4e-3, "train.batch_size": 64},
}
PEER = "denoising-diffusion-pytorch"
# Its example's width, and a quarter of its weights, for more steps.
PEERS = {f"{PEER}-{width}": width for width in (64, 32)}
START = (
    "the example's recipe with --use_ema, captions cached; our caption dropout (0.1) and "
    "EMA warm-up"
)
GOAL = 0.4  # recall@5 of training captions
CHECKPOINTS = 8  # of a run
SEED = 4000
RESULTS = "ladder.json"  # beside the document


def overrides(rung: str) -> dict:
    """Return the settings of a rung over CONFIG."""
    settings = dict(DIFFUSERS)
    for name, changes in RUNGS.items():
        settings |= changes
        if name == rung:
            return settings
    raise KeyError(rung)


def training_command(rung: str, seed: int, folder: Path, steps: int, *more: str) -> list[str]:
    """Return the training command of a rung."""
    every = max(steps // CHECKPOINTS, 1)
    options = overrides(rung) | {
        "name": f"{rung}-s{seed}",
        "output": folder,
        "seed": seed,
        "train.steps": steps,
        "train.save_every": every,
        "train.keep": CHECKPOINTS + 2,
        "train.validate_every": steps,
        "train.log_every": every,
        "sample.every": steps,
    }
    options["train.warmup"] = min(options["train.warmup"], steps)
    settings = [f"--{name}={value}" for name, value in options.items()]
    return ["train_text2img.py", "--config", CONFIG, *settings, *more]


def steps_in(minutes: float, rung: str, folder: Path) -> int:
    """Return how many steps fit in some minutes, by the script's own dry run."""
    command = [sys.executable, *training_command(rung, 0, folder, 100, "--dry_run")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = float(re.search(r"images, ([\d.]+) s each", done.stdout)[1])
    return max(int(60 * minutes / seconds), 1)


def minutes_to_goal(checks: list[tuple[float, float]]) -> float | None:
    """Return when recall@5 reached GOAL, interpolated between checks (minutes, recall@5)."""
    for (before, low), (after, high) in pairwise([(0.0, 0.0), *checks]):
        if high >= GOAL:
            return before + (after - before) * (GOAL - low) / (high - low)
    return None


def measure_recall(
    pipe: TextToImagePipeline,
    extractor: FeatureExtractor,
    references: ReferenceSet,
    rows: torch.Tensor,
    steps: int,
) -> Recall:
    """Return the recall of samples of some rows' captions."""
    images = []
    for n, some in enumerate(rows.split(32)):
        call = {"w": 1.0, "seed": SEED + 32 * n, "num_inference_steps": steps}
        images.append(generate_batch(pipe, references.captions_of(some), **call))
    features = extractor.features(torch.cat(images))
    return recall_summary(references.ranks(features, rows))


def setup(args: argparse.Namespace) -> dict:
    """Return what results must share to stand in one table."""
    settings = {"minutes": args.minutes, "captions": args.captions, "steps": args.steps}
    return settings | {"machine": bench.machine()}


def read_results(path: Path) -> list[dict]:
    """Return all results so far, one a rung, seed and setup."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def known_results(args: argparse.Namespace) -> list[dict]:
    """Return the results with this setup."""
    results = read_results(args.output.parent / RESULTS)
    return [result for result in results if result["way"] == setup(args)]


def run_once(rung: str, seed: int, args: argparse.Namespace) -> None:
    """Run a rung or the peer and save its result, unless it is known; delete its checkpoints."""
    if any((result["rung"], result["seed"]) == (rung, seed) for result in known_results(args)):
        return
    found = run_peer(PEERS[rung], seed, args) if rung in PEERS else run_rung(rung, seed, args)
    path = args.output.parent / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    results = [*read_results(path), {"rung": rung, "seed": seed, **found, "way": setup(args)}]
    replace_text(path, json.dumps(results, indent=1))
    # Gigabytes.
    checkpoints = RunFolder(args.folder / f"{rung}-s{seed}").checkpoints
    shutil.rmtree(checkpoints, ignore_errors=True)


def run_rung(rung: str, seed: int, args: argparse.Namespace) -> dict:
    """Train one run of a rung and measure it."""
    run = RunFolder(args.folder / f"{rung}-s{seed}")
    # A run that resumes keeps its number of steps.
    plan = run.folder / "ladder-steps"
    if not plan.is_file():
        run.folder.mkdir(parents=True, exist_ok=True)
        plan.write_text(str(steps_in(args.minutes, rung, args.folder)))
    command = training_command(rung, seed, args.folder, int(plan.read_text()))
    subprocess.run([sys.executable, *command], check=True)
    config, extractor, references, pipe = load_run(run.folder)
    rows = torch.linspace(0, references.n_train - 1, args.captions).long()
    held_out = torch.arange(references.n_train, len(references.captions))
    log = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    minutes = {line["step"]: line["seconds"] / 60 for line in log if "seconds" in line}

    def measure(pipe: TextToImagePipeline, rows: torch.Tensor) -> Recall:
        return measure_recall(pipe, extractor, references, rows, args.steps)

    at_end = measure(pipe, rows).recall_at_5.value
    checks = []
    # If the end is below the goal, earlier checkpoints do not matter.
    for step in run.steps() if at_end >= GOAL else []:
        checkpoint = load_checkpoint(run, step)
        checkpoint.set_progress_bar_config(disable=True)
        recall = measure(checkpoint, rows).recall_at_5.value
        checks.append((minutes[step], recall))
        if recall >= GOAL:
            break
    return {
        "images": config.train.steps * config.train.batch_size,
        "minutes": minutes_to_goal(checks),
        "recall@5": at_end,
        "held_out": measure(pipe, held_out).recall_at_1.value,
        "taken": max(minutes.values()),
    }


# ---- the peer


def peer_file(folder: Path) -> Path:
    """Return the peer's classifier_free_guidance.py; exit with an error if it is not installed."""
    path = folder / "denoising_diffusion_pytorch" / "classifier_free_guidance.py"
    if not path.is_file():
        install = f"pip install --no-deps --target {folder} {PEER} einops tqdm"
        raise SystemExit(f"error: {path} does not exist. Run {install}.")
    return path


def load_peer(folder: Path) -> ModuleType:
    """Load the peer by its file's path, because its package imports torchvision."""
    path = peer_file(folder)
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location("classifier_free_guidance", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_peer(width: int, seed: int, args: argparse.Namespace) -> dict:
    """Train the peer with its trainer's own settings and measure it at its better scale.

    They are Adam 1e-4, batch 16, and an EMA of decay 0.995 every 10 steps, with diffusers' warm-up.
    """
    from diffusers.training_utils import EMAModel

    bench.prepare()
    hardware.keep_freed_memory()
    config = load_file(CONFIG)
    module = load_peer(args.peers)
    extractor = FeatureExtractor()
    splits = [split for split in load_splits(config.data) if split is not None]
    references = ReferenceSet.from_splits(extractor.features, splits)
    n = references.n_train
    x = references.images[:n].float() / 255
    classes = torch.arange(n)
    torch.manual_seed(seed)
    network = module.Unet(dim=width, num_classes=n)
    options = {"image_size": config.data.resolution, "sampling_timesteps": args.steps}
    diffusion = module.GaussianDiffusion(network, **options)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMAModel(network.parameters(), decay=0.995)
    bf16 = hardware.has_bf16(torch.device("cpu"))
    rows = torch.linspace(0, n - 1, args.captions).long()
    step = 0
    spent = 0.0
    while spent < 60 * args.minutes:
        start = time.perf_counter()
        some = batch_indices(seed, step, 16, n)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = diffusion(x[some], classes=classes[some])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            ema.step(network.parameters())
        spent += time.perf_counter() - start
    at_end = peer_recall(diffusion, ema, extractor, references, rows, bf16)
    return {
        "images": 16 * step,
        "minutes": args.minutes if at_end >= GOAL else None,
        "recall@5": at_end,
        "held_out": None,
        "taken": spent / 60,
    }


@torch.no_grad()
def peer_recall(
    diffusion: torch.nn.Module,
    ema,
    extractor: FeatureExtractor,
    references: ReferenceSet,
    rows: torch.Tensor,
    bf16: bool,
) -> float:
    """Return the peer's recall@5 with averaged weights, at the better of two guidance scales."""
    weights = list(diffusion.model.parameters())
    ema.store(weights)
    ema.copy_to(weights)
    diffusion.eval()
    recalls = []
    # w = 1, and the package's default.
    for scale in (2.0, 6.0):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            parts = [diffusion.sample(classes=some, cond_scale=scale) for some in rows.split(32)]
        features = extractor.features(2 * torch.cat(parts).float().clamp(0, 1) - 1)
        recalls.append(recall_summary(references.ranks(features, rows)).recall_at_5.value)
    ema.restore(weights)
    diffusion.train()
    return max(recalls)


# ---- the table


def table_row(rung: str, results: list[dict], minutes: float) -> list[str]:
    """Return a rung's line: minutes of every seed, and means with minimum and maximum."""
    changes = ", ".join(f"{name} {value}" for name, value in RUNGS.get(rung, {}).items())
    if rung in PEERS:
        changes = f"width {PEERS[rung]}, captions as classes, in pixels"

    def percent(key: str) -> str:
        values = [result[key] for result in results if result[key] is not None]
        if not values:
            return "-"
        spread = f" ({min(values):.0%} to {max(values):.0%})" if len(values) > 1 else ""
        return f"{mean(values):.0%}{spread}"

    to_goal = [
        f"not in {minutes:g}" if result["minutes"] is None else f"{result['minutes']:.1f}"
        for result in results
    ]
    taken = [f"{result['taken']:.0f}" if "taken" in result else "?" for result in results]
    return [
        rung,
        changes or START,
        ", ".join(str(result["seed"]) for result in results),
        f"{mean(result['images'] for result in results):,.0f}",
        ", ".join(taken),
        ", ".join(to_goal),
        percent("recall@5"),
        percent("held_out"),
    ]


def goal_line(found: dict[str, list[dict]], captions: int) -> str:
    """Return whether our last rung reaches twice the better peer's recall@5; empty without both."""
    theirs = [rung for rung in found if rung in PEERS]
    ours = [rung for rung in found if rung in RUNGS]
    if not theirs or not ours:
        return ""

    def recall(rung: str) -> float:
        return mean(result["recall@5"] for result in found[rung])

    best = max(theirs, key=recall)
    # A peer without any hit counts as one hit.
    ratio = recall(ours[-1]) / max(recall(best), 1 / captions)
    return target(f"{ours[-1]}'s recall@5 over {best}'s", ratio, 2)


def print_runs(args: argparse.Namespace) -> None:
    """Print the runs and their time, and check their settings."""
    for rung in (rung for rung in args.rungs if rung in RUNGS):
        command = training_command(rung, args.seeds[0], args.folder, 100)
        load(command[1:])
        changes = " ".join(f"{name}={value}" for name, value in RUNGS[rung].items())
        print(f"{rung}: {changes or 'the recipe of diffusers'}\n  python {' '.join(command)}")
    n = len(args.rungs) * len(args.seeds)
    hours = n * args.minutes / 60
    print(f"{n} runs of {args.minutes:g} minutes: {hours:.1f} hours of training, and measuring")


def main(argv: list[str] | None = None) -> None:
    """Run the ladder and write its section."""
    names = [*RUNGS, *PEERS]
    parser = bench.parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=20, help="of training, each run")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rungs", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    add("--captions", type=int, default=96, help="training captions of every check")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--folder", type=Path, default=Path("runs/ladder"))
    add("--peers", type=Path, default=Path("data/peers"), help="where the peer is installed")
    add("--dry-run", action="store_true", help="print the runs and their time, check settings")
    args = bench.parse(parser, argv)
    # Runs with another setup are not resumed.
    args.folder /= f"{args.minutes:g}-minutes-{digest(bench.machine())[:8]}"
    if args.dry_run or args.quick:
        print_runs(args)
        return
    done = {(result["rung"], result["seed"]) for result in known_results(args)}
    missing = [(rung, seed) for rung in args.rungs for seed in args.seeds]
    if any(rung in PEERS and (rung, seed) not in done for rung, seed in missing):
        # A missing package is reported before hours of training.
        peer_file(args.peers)
    for seed in args.seeds:
        for rung in args.rungs:
            run_once(rung, seed, args)
    results = sorted(known_results(args), key=lambda result: result["seed"])
    found = {name: [result for result in results if result["rung"] == name] for name in names}
    found = {name: some for name, some in found.items() if some}
    head = ["rung", "change", "seeds", "images", "minutes taken"]
    head += [f"minutes to {GOAL:.0%}, each seed", "recall@5 at the end", "held-out recall@1"]
    precision = "bf16" if hardware.has_bf16(torch.device("cpu")) else "float32"
    bench.publish(
        args,
        __file__,
        argv,
        "Ladder",
        f"Each run has as many steps as fit in {args.minutes:g} minutes by one timed step, the "
        f"peer as fit by the clock; {CONFIG}'s data; {args.captions} training captions in "
        f"{args.steps} steps, w = 1, averaged weights, {precision}. Brackets hold the lowest and "
        "the highest seed; a row of one or two seeds is preliminary. Minutes taken are the "
        "clock's, whatever else ran. A row's change adds to those of all rungs before it, "
        "measured or not, with bf16 if the machine has it. The section on training has the cost "
        "of encoding at every step.",
        table(head, [table_row(rung, some, args.minutes) for rung, some in found.items()]),
        goal_line(found, args.captions),
    )


if __name__ == "__main__":
    main()
