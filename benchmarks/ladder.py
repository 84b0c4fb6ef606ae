"""`python benchmarks/ladder.py [--minutes 20] [--seeds 0 1 2] [--rungs NAME …]`: from diffusers' recipe to ours, a change a rung.

Every rung is a run of train_text2img.py for so many minutes of steps, judged as it goes: minutes to own picture among the first
five for 40 % of the training captions, and how many held-out combinations come first. The peer is denoising-diffusion-pytorch's
classifier-free guidance, captions as classes, on the same pictures, threads, precision and minutes, in two widths:
`pip install --no-deps --target data/peers denoising-diffusion-pytorch einops tqdm`.

The same command goes on where it was stopped; what a rung has found is kept in docs/ladder.json, and the table is of all that was
found on the same machine in the same way. `--dry-run` prints the runs.
"""

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

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import table, target
from pipeline import hardware
from pipeline.config import load, load_file
from pipeline.data import dataset, sampler
from pipeline.data.fingerprint import digest
from pipeline.evaluation import evaluate, feature_extractor, reference_set, retrieval, samples
from pipeline.models import loading
from pipeline.runs.files import replace_text
from pipeline.runs.folder import RunFolder

CONFIG = "configs/emoji-small.yaml"
DIFFUSERS = {  # the text-to-image example's recipe, on the network's own shape; captions are cached, as the trainer always does
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
RUNGS = {  # each changes the one before
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
PEERS = {
    f"{PEER}-{width}": width for width in (64, 32)
}  # its example's width; and a quarter of the weights, so more steps
START = "the example's recipe with --use_ema, captions cached; our dropout of captions (0.1) and warm-up of the average"
GOAL = 0.4  # of the training captions, own picture among the first five
CHECKS = 8  # checkpoints of a run
SEED = 4000
RESULTS = "ladder.json"  # beside the document


def overrides(rung: str) -> dict:
    """The settings of a rung over CONFIG."""
    names = list(RUNGS)
    return DIFFUSERS | {
        k: v for name in names[: names.index(rung) + 1] for k, v in RUNGS[name].items()
    }


def command(
    rung: str, seed: int, folder: Path, steps: int, more: tuple[str, ...] = ()
) -> list[str]:
    """The training command of a rung; its arguments are checked by `settings.load`."""
    every = max(steps // CHECKS, 1)
    options = overrides(rung) | {
        "name": f"{rung}-s{seed}",
        "output": folder,
        "seed": seed,
        "train.steps": steps,
        "train.save_every": every,
        "train.keep": CHECKS + 2,
        "train.validate_every": steps,
        "train.log_every": every,
        "sample.every": steps,
    }
    options["train.warmup"] = min(options["train.warmup"], steps)
    return [
        "train_text2img.py",
        "--config",
        CONFIG,
        *(f"--{name}={value}" for name, value in options.items()),
        *more,
    ]


def steps_in(minutes: float, rung: str, folder: Path) -> int:
    """How many steps fit in so many minutes, by the script's own dry run."""
    plan = [sys.executable, *command(rung, 0, folder, 100, ("--dry_run",))]
    done = subprocess.run(plan, stdout=subprocess.PIPE, text=True, check=True)
    return max(int(60 * minutes / float(re.search(r"images, ([\d.]+) s each", done.stdout)[1])), 1)


def minutes_to_goal(checks: list[tuple[float, float]]) -> float | None:
    """When the share reached GOAL, between the two checks (minutes, share) around it; None where it did not."""
    for (before, low), (after, high) in pairwise([(0.0, 0.0), *checks]):
        if high >= GOAL:
            return before + (after - before) * (GOAL - low) / (high - low)
    return None


def shares(pipe, judge, bank, rows: torch.Tensor, steps: int) -> dict[str, float]:
    """How often some rows' drawings have their own picture first, and among the first five."""
    images = [
        samples.generate_batch(
            pipe, bank.captions_of(some), w=1.0, seed=SEED + 32 * n, num_inference_steps=steps
        )
        for n, some in enumerate(rows.split(32))
    ]
    ranks = retrieval.retrieval_ranks(
        judge.features(torch.cat(images)), bank.features, bank.own[rows]
    )
    return {
        name: share["share"]
        for name, share in retrieval.recall_summary(ranks).items()
        if name != "median_rank"
    }


def way(args) -> dict:
    """What results have to share to stand in one table."""
    return {
        "minutes": args.minutes,
        "captions": args.captions,
        "steps": args.steps,
        "machine": bench.machine(),
    }


def results(path: Path) -> list[dict]:
    """All that was found so far, a result a rung, seed and way."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def known(args) -> list[dict]:
    """What was found in this way."""
    return [one for one in results(args.output.parent / RESULTS) if one["way"] == way(args)]


def once(rung: str, seed: int, args) -> None:
    """Run a rung, or the peer, and keep what it found, unless that is known; its checkpoints, which are gigabytes, go then."""
    if any((one["rung"], one["seed"]) == (rung, seed) for one in known(args)):
        return
    found = peer(PEERS[rung], seed, args) if rung in PEERS else climb(rung, seed, args)
    path = args.output.parent / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(
        path,
        json.dumps(
            [*results(path), {"rung": rung, "seed": seed, **found, "way": way(args)}], indent=1
        ),
    )
    shutil.rmtree(RunFolder(args.folder / f"{rung}-s{seed}").checkpoints, ignore_errors=True)


def climb(rung: str, seed: int, args) -> dict:
    """One run of a rung, trained and judged."""
    run = RunFolder(args.folder / f"{rung}-s{seed}")
    plan = (
        run.folder / "ladder-steps"
    )  # a run that was stopped goes on with the steps that it began with
    if not plan.is_file():
        run.folder.mkdir(parents=True, exist_ok=True)
        plan.write_text(str(steps_in(args.minutes, rung, args.folder)))
    subprocess.run(
        [sys.executable, *command(rung, seed, args.folder, int(plan.read_text()))], check=True
    )
    config, judge, bank, pipe = evaluate.load_run(run.folder)
    rows, held = (
        torch.linspace(0, bank.n_train - 1, args.captions).long(),
        torch.arange(bank.n_train, len(bank.captions)),
    )
    log = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    clock = {line["step"]: line["seconds"] / 60 for line in log if "seconds" in line}
    at_end, checks = shares(pipe, judge, bank, rows, args.steps)["first_five"], []
    for step in (
        run.steps() if at_end >= GOAL else []
    ):  # where the end is below it, what was before does not matter
        made = loading.load_checkpoint(run, step)
        made.set_progress_bar_config(disable=True)
        checks.append((clock[step], shares(made, judge, bank, rows, args.steps)["first_five"]))
        if checks[-1][1] >= GOAL:
            break
    return {
        "images": config.train.steps * config.train.batch_size,
        "minutes": minutes_to_goal(checks),
        "first_five": at_end,
        "held_out": shares(pipe, judge, bank, held, args.steps)["first"],
        "taken": max(clock.values()),
    }


# ---- the peer


def installed(folder: Path) -> Path:
    """classifier_free_guidance.py where the peer was installed; an error where it was not."""
    path = folder / "denoising_diffusion_pytorch" / "classifier_free_guidance.py"
    if not path.is_file():
        raise SystemExit(
            f"error: {path} does not exist: pip install --no-deps --target {folder} {PEER} einops tqdm"
        )
    return path


def loaded(folder: Path):
    """The peer by its file's path: its package imports torchvision."""
    path = installed(folder)
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location("classifier_free_guidance", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer(width: int, seed: int, args) -> dict:
    """The peer with its trainer's own settings (Adam 1e-4, batch 16, an average of decay 0.995 every 10 steps, which warms up as
    diffusers' does), judged at its better scale.
    """
    from diffusers.training_utils import EMAModel

    bench.prepare()
    hardware.keep_freed_memory()
    config, module = load_file(CONFIG), loaded(args.peers)
    judge, images = feature_extractor.FeatureExtractor(), dataset.load_splits(config.data)
    bank = reference_set.ReferenceSet.of(
        judge.features, [split for split in images if split is not None]
    )
    x, classes = bank.images[: bank.n_train].float() / 255, torch.arange(bank.n_train)
    torch.manual_seed(seed)
    network = module.Unet(dim=width, num_classes=bank.n_train)
    diffusion = module.GaussianDiffusion(
        network, image_size=config.data.resolution, sampling_timesteps=args.steps
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema, bf16 = EMAModel(network.parameters(), decay=0.995), hardware.has_bf16(torch.device("cpu"))
    rows, step, spent = torch.linspace(0, bank.n_train - 1, args.captions).long(), 0, 0.0
    while spent < 60 * args.minutes:
        began = time.perf_counter()
        some = sampler.batch_indices(seed, step, 16, len(x))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = diffusion(x[some], classes=classes[some])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            ema.step(network.parameters())
        spent += time.perf_counter() - began
    at_end = judged_peer(diffusion, ema, judge, bank, rows, bf16)
    return {
        "images": 16 * step,
        "minutes": args.minutes if at_end >= GOAL else None,
        "first_five": at_end,
        "held_out": None,
        "taken": spent / 60,
    }


@torch.no_grad()
def judged_peer(diffusion, ema, judge, bank, rows: torch.Tensor, bf16: bool) -> float:
    """The peer's first five with its averaged weights, at the better of a mild and its default guidance."""
    weights, found = list(diffusion.model.parameters()), []
    ema.store(weights)
    ema.copy_to(weights)
    diffusion.eval()
    for scale in (2.0, 6.0):  # w = 1, and the package's default
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            images = torch.cat(
                [diffusion.sample(classes=some, cond_scale=scale) for some in rows.split(32)]
            )
        features = judge.features(2 * images.float().clamp(0, 1) - 1)
        found.append(
            float(
                (retrieval.retrieval_ranks(features, bank.features, bank.own[rows]) <= 5)
                .double()
                .mean()
            )
        )
    ema.restore(weights)
    diffusion.train()
    return max(found)


# ---- the table


def precision() -> str:
    """What `train.precision: auto` is here."""
    return "bf16" if hardware.has_bf16(torch.device("cpu")) else "float32"


def row(rung: str, change: str, found: list[dict], minutes: float) -> list[str]:
    """A rung's line: its seeds, every seed's minutes, means with the least and the greatest."""
    over = lambda key: [one[key] for one in found if one[key] is not None]
    spread = lambda values: f" ({min(values):.0%} to {max(values):.0%})" if len(values) > 1 else ""
    shown = lambda values: f"{mean(values):.0%}{spread(values)}" if values else "-"
    taken = [
        f"{one['minutes']:.1f}" if one["minutes"] is not None else f"not in {minutes:g}"
        for one in found
    ]
    seeds = ", ".join(str(one["seed"]) for one in found)
    clock = ", ".join(f"{one['taken']:.0f}" if "taken" in one else "?" for one in found)
    return [
        rung,
        change,
        seeds,
        f"{mean(over('images')):,.0f}",
        clock,
        ", ".join(taken),
        shown(over("first_five")),
        shown(over("held_out")),
    ]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = bench.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="of training, each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    names = [*RUNGS, *PEERS]
    parser.add_argument(
        "--rungs", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--captions", type=int, default=96, help="training captions that every check draws"
    )
    parser.add_argument("--steps", type=int, default=20, help="of a drawing")
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"))
    parser.add_argument(
        "--peers", type=Path, default=Path("data/peers"), help="where the peer was installed"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the runs and their time, and check their settings",
    )
    args = bench.parse(parser, argv)
    args.folder /= f"{args.minutes:g}-minutes-{digest(bench.machine())[:8]}"  # a run of another way is not gone on with
    if args.dry_run or args.quick:
        for rung in (rung for rung in args.rungs if rung in RUNGS):
            load(command(rung, args.seeds[0], args.folder, 100)[1:])
            changes = (
                " ".join(f"{name}={value}" for name, value in RUNGS[rung].items())
                or "diffusers' recipe"
            )
            print(
                f"{rung}: {changes}\n  python {' '.join(command(rung, args.seeds[0], args.folder, 100))}"
            )
        print(
            f"{len(args.rungs) * len(args.seeds)} runs of {args.minutes:g} minutes: "
            f"{len(args.rungs) * len(args.seeds) * args.minutes / 60:.1f} hours of training, and their judging"
        )
        return
    there = {(one["rung"], one["seed"]) for one in known(args)}
    if any(
        rung in PEERS and (rung, seed) not in there for rung in args.rungs for seed in args.seeds
    ):
        installed(args.peers)  # where it is not, that is said before hours of training
    for seed in args.seeds:
        for rung in args.rungs:
            once(rung, seed, args)
    done = sorted(known(args), key=lambda one: one["seed"])
    found = {name: [one for one in done if one["rung"] == name] for name in names}
    found, lines = {name: some for name, some in found.items() if some}, []
    for rung, some in found.items():
        change = ", ".join(f"{name} {value}" for name, value in RUNGS.get(rung, {}).items())
        change = change or (
            f"width {PEERS[rung]}, captions as classes, in pixels" if rung in PEERS else START
        )
        lines.append(row(rung, change, some, args.minutes))
    head = [
        "rung",
        "change",
        "seeds",
        "images",
        "minutes taken",
        f"minutes to {GOAL:.0%}, each seed",
        "first five at the end",
        "held-out first",
    ]
    goals = []
    if (theirs := [rung for rung in found if rung in PEERS]) and (
        ours := [rung for rung in found if rung in RUNGS]
    ):
        rate = lambda rung: mean(one["first_five"] for one in found[rung])
        best = max(theirs, key=rate)  # where it has none at all, one picture is counted
        goals = [
            target(
                f"{ours[-1]}'s first five over {best}'s",
                rate(ours[-1]) / max(rate(best), 1 / args.captions),
                2,
            )
        ]
    said = (
        f"Each run has as many steps as fit in {args.minutes:g} minutes by one timed step, the peer as fit by the clock; "
        f"{CONFIG}'s data; {args.captions} training captions in {args.steps} steps, w = 1, averaged weights, {precision()}. "
        "Brackets hold the lowest and the highest seed; a row of one or two is a lead. Minutes taken are the clock's, "
        "whatever else ran. A row's change comes on top of those of all rungs before it, measured or not, bf16 where the "
        "machine has it. What encoding anew at every step costs is in the section on training."
    )
    bench.publish(
        args,
        __file__,
        bench.command_line(argv),
        "Ladder",
        said,
        table(head, lines),
        "\n".join(goals),
    )


if __name__ == "__main__":
    main()
