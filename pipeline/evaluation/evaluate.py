"""How well a run draws what its captions say: retrieval and KID by an ImageNet network, copies, seams, with 95 % intervals.

A drawing is judged by the rank of its caption's own picture among all pictures of the set, by centred cosine of pooled
features. `python -m pipeline.evaluation RUN` writes `RUN/metrics.json` and the card anew; what it has drawn is kept, so it can
be stopped. `--more` adds slower measures, `--sweep` what each knob of sampling does.
"""

import argparse
import copy
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm

from pipeline.config import Config, DiffusionConfig, load_file
from pipeline.data import dataset
from pipeline.data.dataset import as_float
from pipeline.data.emoji import recolour
from pipeline.data.sources.rows import digest
from pipeline.diffusion import losses
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation import retrieval
from pipeline.evaluation.feature_extractor import NAME, Judge
from pipeline.evaluation.retrieval import (
    EvaluationError,
    augment,
    centred,
    copy_rate,
    copy_threshold,
    retrieval_ranks,
    summary,
)
from pipeline.hub import model_card
from pipeline.models import build, loading
from pipeline.runs import results
from pipeline.runs.folder import IMAGES, INDEX, Run, RunError, replace
from pipeline.search.verifiers import Clip, clip_scores

STRIDE = 1_000_000  # image i of seed s is drawn from s * STRIDE + i: no two seeds share a draw
WS = (0.0, 1.0, 2.0)
FLOAT32 = "-float32"  # at the end of an identity, where drawings are not computed in bf16
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    NAME: Judge,
    "inception-v3": retrieval.inception,
}  # of features
DIVERSE = (24, 4)  # captions, seeds


@dataclass
class Bank:
    """All pictures of a set, training rows first, as the judge sees them."""

    images: Tensor  # uint8 (N, 3, H, W)
    captions: list[str]
    metadata: list[dict]
    n_train: int
    train: Tensor  # (M, 3, H, W) all that was trained on, variations too: what can be copied
    features: Tensor  # (D, 1280) of the different pictures
    own: Tensor  # (N,) which of them each row is

    @classmethod
    def of(cls, see: Callable[[Tensor], Tensor], splits: list[dataset.CaptionedImages]) -> "Bank":
        """The bank of a training split and, maybe, a held-out one, as the judge sees it; variations are left out."""
        kept = [
            [i for i, metadata in enumerate(split.metadata) if not metadata.get("variation")]
            for split in splits
        ]
        images = torch.cat([split.images[some] for split, some in zip(splits, kept, strict=True)])
        rows, own = retrieval.distinct(images)
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
        similarity = centred(self.features, self.features) @ centred(self.features, self.features).T
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
        return summary(
            retrieval_ranks(self.features[self.own[sibling]], self.features, self.own[held])
        )


def measure(
    judge: Judge, bank: Bank, images: Tensor, rows: Tensor, threshold: float, patch: int
) -> dict:
    """What drawings (M, 3, H, W) of the captions of some rows of the bank are worth."""
    features = judge.features(images)
    ranks = retrieval_ranks(features, bank.features, bank.own[rows])
    where = lambda some: summary(ranks[torch.isin(rows, some)])
    found, held = {"train": summary(ranks[rows < bank.n_train])}, rows >= bank.n_train
    if held.any():
        found["held_out"] = summary(ranks[held]) | {
            "copies": copy_rate(images[held], bank.train, threshold)
        }
        found["grids"] = {name: where(some) for name, some in bank.grids().items()}
    if len(rows) >= retrieval.LEAST:
        found["distances"] = {NAME: {"kid": retrieval.kid(bank.features[bank.own[rows]], features)}}
    return found | {
        "seam_ratio": retrieval.seam_ratio(images, patch) / retrieval.seam_ratio(bank.images, patch)
    }


def references(judge: Judge, bank: Bank, threshold: float) -> dict:
    """What the numbers are read against: chance, a lightly augmented real picture, a sibling, the real held-out picture."""
    n, rows = len(bank.features), torch.arange(len(bank.captions))
    held = rows[bank.n_train :]
    found = {
        "pictures": n,
        "captions": len(rows),
        "chance": {"first": 1 / n, "first_five": min(5 / n, 1)},
        "ceiling": summary(
            retrieval_ranks(judge.features(augment(bank.images)), bank.features, bank.own)
        ),
    }
    if len(held):
        found["real_held_out_copies"] = copy_rate(
            bank.images[bank.n_train :], bank.train, threshold
        )
        found["siblings"] = {"held_out": bank.sibling_baseline(held)} | {
            name: bank.sibling_baseline(some) for name, some in bank.grids().items()
        }
    return found


def drawn(pipe: TextToImagePipeline, prompts: list[str], **call) -> Tensor:
    """Pictures uint8 (B, 3, H, W) of one call; the network computes in bf16 where the machine does, as in training."""
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=build.has_bf16(pipe.device)):
        images = pipe(prompts, output_type="pt", **call).images
    return dataset.as_uint8(images.cpu())


def draw(
    pipe: TextToImagePipeline,
    prompts: list[str],
    w,
    seed: int,
    steps: int,
    path: Path,
    batch: int,
    advance: Callable[[int], object] | None = None,
    **call,
) -> Tensor:
    """Pictures uint8 (N, 3, H, W), prompt i from its own seed; kept in `path`, which is read if it is there.

    advance(n) is told of every n pictures, in the place of a progress bar.
    """

    def compute() -> dict[str, Tensor]:
        parts = []
        starts = tqdm(
            range(0, len(prompts), batch),
            path.stem,
            unit="batch",
            dynamic_ncols=True,
            disable=advance is not None,
        )
        for start in starts:
            options = call | {"w": w, "seed": seed * STRIDE + start, "num_inference_steps": steps}
            parts.append(drawn(pipe, prompts[start : start + batch], **options))
            if advance is not None:
                advance(len(parts[-1]))
        return {"images": torch.cat(parts)}

    return retrieval.cached(path, compute)["images"]


def kept(
    cache: str, what: str, network: str, images: Tensor, compute: Callable[[], Tensor]
) -> Tensor:
    """A statistic of real pictures by a network, computed once for the same pixels."""
    key = digest(
        tuple(images.shape), hashlib.blake2b(images.numpy().tobytes(), digest_size=8).hexdigest()
    )
    path = Path(dataset.cache_file(cache, f"{what}-{network}", key)).with_suffix(".safetensors")
    return retrieval.cached(path, lambda: {what: compute()})[what]


def drawings(folder: Path, model: str, steps: int, what: str, w: float, seed: int) -> Path:
    """Where pictures of one call are kept."""
    return folder / "evaluation" / f"{model}-{steps}" / f"{what}-w{w:g}-seed{seed}.safetensors"


def identity(pipe: TextToImagePipeline, bank: Bank) -> str:
    """What drawings of a bank's captions depend on beside the call: the pipeline's networks and settings, and the captions."""
    networks = {
        name: dataset.weights_digest(part)
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }
    process = sorted(
        (name, str(value))
        for name, value in pipe.scheduler.config.items()
        if not name.startswith("_")
    )
    drawn_by = digest(
        sorted(networks.items()), type(pipe.scheduler).__name__, process, pipe.config.caption_length
    )
    rounded = "" if build.has_bf16(pipe.device) else FLOAT32  # as `drawn` computes
    return f"{drawn_by[:8]}-{digest(bank.captions)[:8]}{rounded}"


def record(folder: Path, model: str, **found) -> dict:
    """metrics.json with these results beside those that it holds of the same `identity`; those of others go, also where only the
    precision differs, which is told.
    """
    path = folder / "metrics.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get("model", model) != model and known["model"].removesuffix(
        FLOAT32
    ) == model.removesuffix(FLOAT32):
        print(
            f"{path} was of the same model by a machine of another precision: its results are replaced",
            file=sys.stderr,
        )
    result = (known if known.get("model") == model else {}) | found | {"model": model}
    replace(path, json.dumps(result, indent=1))
    return json.loads(json.dumps(result))


def finished(folder: Path) -> tuple[Config, Judge, Bank, TextToImagePipeline]:
    """A finished run, or a saved pipeline with its config.yaml, on the fastest device, and all that judges it, on the CPU."""
    run = Run(folder)
    if not (run.drawable or (folder / INDEX).is_file()):
        raise EvaluationError(
            f"{folder} holds no finished pipeline, expected {folder / 'pipeline' / INDEX}: "
            "train first"
        )
    config, judge = load_file(run.config), Judge()
    see = lambda images: kept(
        config.data.cache, "features", NAME, images, lambda: judge.features(images)
    )
    bank = Bank.of(see, [split for split in dataset.load_splits(config.data) if split is not None])
    pipe = loading.load(str(folder)).to(loading.pick_device(None, double=True))
    pipe.set_progress_bar_config(disable=True)
    return config, judge, bank, pipe


def distances(
    name: str, bank: Bank, images: Tensor, cache: str, network: nn.Module | None = None
) -> dict:
    """KID and Fréchet distance between drawings (N, 3, H, W) of all captions and the real pictures, by a feature network.

    network: what `name` makes, where it is there already.
    The Fréchet distance is that of half the drawings from the other half's real pictures, `real` that of real pictures in
    the drawings' place.
    """
    network = network or NETWORKS[name]()
    real = kept(
        cache, "features", name, bank.images, lambda: retrieval.features(network, bank.images)
    )
    found, (a, b) = retrieval.features(network, images), retrieval.halves(len(real))
    apart = kept(
        cache,
        "halves",
        name,
        bank.images,
        lambda: torch.tensor(retrieval.frechet(real[a], real[b])),
    )
    frechet = {"value": retrieval.frechet(found[a], real[b]), "real": float(apart), "n": len(a)}
    return {"kid": retrieval.kid(real, found), "frechet": frechet}


def more(
    judge: Judge,
    bank: Bank,
    pipe: TextToImagePipeline,
    images_of: Callable[[Tensor, float, int], Tensor],
    ws: list[float],
) -> dict:
    """The slower measures: errors by timestep, bits a colour value of held-out pictures, diversity at several w.

    images_of(rows, w, seed) draws the captions of some rows.
    """
    n, held = len(bank.captions), torch.arange(bank.n_train, len(bank.captions))
    if not isinstance(
        pipe.scheduler, DDPMScheduler
    ):  # an adapter draws by its base's own, which has no equations
        pipe = copy.copy(pipe)
        pipe.register_modules(scheduler=build.noise_process(DiffusionConfig(), pipe.scheduler))
    splits = {"train": dataset.evenly(64, bank.n_train)} | (
        {"held_out": dataset.evenly(64, n, bank.n_train)} if len(held) else {}
    )
    pictures = {name: (bank.images[rows], bank.captions_of(rows)) for name, rows in splits.items()}
    found = {"errors": retrieval.errors(pipe, pictures)}
    if len(held) and retrieval.space(pipe) in losses.SPACES:
        terms = retrieval.bound(pipe, bank.images[held], bank.captions_of(held))
        bits = {"model": sum(terms.values())} | terms | retrieval.file_bits(bank.images[held])
        found["bits_per_dimension"] = {name: retrieval.mean(value) for name, value in bits.items()}
    captions, seeds = DIVERSE
    rows, found["diversity"] = dataset.evenly(captions, bank.n_train), {}
    for w in ws:
        features = torch.stack([judge.features(images_of(rows, w, seed)) for seed in range(seeds)])
        found["diversity"][f"{w:g}"] = retrieval.mean(retrieval.diversity(features, bank.features))
    return found


@torch.no_grad()
def from_real(
    judge: Judge,
    bank: Bank,
    pipe: TextToImagePipeline,
    rows: Tensor,
    t: int,
    w: float,
    seed: int,
    steps: int,
    batch: int = 32,
) -> dict:
    """How drawings of some rows rank that start at t, from their own picture noised by (5): what is lost below t.

    The timesteps are those of a plan of `steps` from t down; `batch` pictures are drawn at once. EvaluationError for schedulers
    that do not start on the way.
    """
    if not isinstance(pipe.scheduler, DDPMScheduler):
        raise EvaluationError(
            f"this model draws by {type(pipe.scheduler).__name__}, expected a DDPMScheduler to start from real "
            "pictures: leave --from-real out"
        )
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    plan = [k for k in scheduler.timesteps.tolist() if k <= t]
    if not plan:
        raise EvaluationError(
            f"a plan of {steps} steps has no timestep up to {t}: give more --steps, or start later"
        )
    generator, images = torch.Generator().manual_seed(seed), []
    for n, some in enumerate(rows.split(batch)):
        z = pipe.encode(as_float(bank.images[some]).to(pipe.device))
        x_t = scheduler.add_noise(z, torch.randn(z.shape, generator=generator).to(z), plan[0])
        images.append(
            drawn(
                pipe,
                bank.captions_of(some),
                w=w,
                seed=seed * STRIDE + 1 + n * batch,
                timesteps=plan,
                latents=x_t,
            )
        )
    return {"t": plan[0]} | summary(
        retrieval_ranks(judge.features(torch.cat(images)), bank.features, bank.own[rows])
    )


def sheet(images: Tensor, prompts: list[str], path: Path, columns: int = 5) -> None:
    """Pictures uint8 (N, 3, H, W) with the prompt of each below it, as one picture."""
    rows = math.ceil(len(prompts) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.5 * rows), layout="constrained")
    for ax, image, prompt in zip(
        figure.subplots(rows, columns, squeeze=False).flat, images, prompts, strict=False
    ):
        ax.imshow(image.permute(1, 2, 0).numpy())
        ax.set_xlabel(prompt, fontsize=8)
    for ax in figure.axes:
        ax.set(xticks=[], yticks=[], frame_on=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def evaluate(
    folder: Path,
    ws: list[float],
    seeds: list[int],
    choose_seed: int,
    choose_on: int,
    steps: int,
    batch: int,
    *,
    deep: bool = False,
    features: list[str] = (),
    clip: str | None = None,
) -> dict:
    """Choose w on `choose_on` training captions with one seed, draw every caption with the others, write metrics.json.

    deep: also `more` and, by the judge, `distances`. features: other networks for those. clip: a CLIP model for its score.
    """
    if len(ws) > 1 and choose_seed in seeds:
        raise EvaluationError(
            f"seed {choose_seed} chooses w and may not report it: give other --seeds or --choose-seed"
        )
    clip = clip and (
        clip,
        Clip(clip),
    )  # what may be misspelt, or not installed, says so before anything is drawn
    by_name = {
        name: NETWORKS[name]() for name in dict.fromkeys([*([NAME] if deep else []), *features])
    }
    config, judge, bank, pipe = finished(folder)
    patch = config.model.patch_size or 1
    model = identity(pipe, bank)
    patch = patch if patch > 1 else 4  # without patches nothing should show at any grid
    place = lambda what, w, seed: drawings(folder, model, steps, what, w, seed)
    threshold = copy_threshold(bank.images[: bank.n_train])
    judged = lambda images, rows: measure(judge, bank, images, rows, threshold, patch)

    some = dataset.evenly(choose_on, bank.n_train)
    choice = {}
    for w in ws if len(ws) > 1 else []:
        path = place(f"choice{len(some)}", w, choose_seed)
        images = draw(pipe, bank.captions_of(some), w, choose_seed, steps, path, batch)
        choice[w] = judged(images, some)
    w = max(choice, key=lambda w: choice[w]["train"]["first_five"]["k"]) if choice else ws[0]
    rows, by_seed, copies, extra = torch.arange(len(bank.captions)), {}, {}, {}
    free = [prompt for prompt in recolour.FREE if prompt not in bank.captions]
    for seed in seeds:
        images = draw(pipe, bank.captions, w, seed, steps, place("all", w, seed), batch)
        by_seed[seed] = judged(images, rows)
        for name, by in by_name.items():
            by_seed[seed].setdefault("distances", {})[name] = distances(
                name, bank, images, config.data.cache, by
            )
        if clip:
            called, by = clip
            scores = {
                kind: retrieval.mean(clip_scores(by, some, bank.captions))
                for kind, some in (("drawn", images), ("real", bank.images))
            }
            by_seed[seed]["clip"] = {
                "model": Path(called).name if Path(called).exists() else called
            } | scores
        prompted = draw(
            pipe, free, w, seed, steps, place(f"free-{digest(free)[:8]}", w, seed), batch
        )
        copies[seed] = copy_rate(prompted, bank.train, threshold)
        if seed == seeds[0]:
            sheet(prompted, free, folder / IMAGES / "free.png")
    if deep:
        images_of = lambda rows, w, seed: draw(
            pipe, bank.captions_of(rows), w, seed, steps, place(f"some{len(rows)}", w, seed), batch
        )
        extra["more"] = more(judge, bank, pipe, images_of, ws) | {"num_inference_steps": steps}
    choices = {"seed": choose_seed, "captions": len(some), "by_w": choice}
    return record(
        folder,
        model,
        w=w,
        num_inference_steps=steps,
        seeds=seeds,
        by_seed=by_seed,
        free_prompt_copies=copies,
        choice=choices,
        references=references(judge, bank, threshold),
        **extra,
    )


DEFAULTS = {"seeds": [0], "choose_seed": 1000, "choose_on": 96, "on": 256}  # of the command line's


def check(args: argparse.Namespace) -> None:
    """EvaluationError for counts below 1, and for options that what is asked for does not use."""
    for name in ("steps", "batch", "on", "choose_on"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise EvaluationError(
                f"--{name.replace('_', '-')} is {value}, expected 1 or more: leave it out"
            )
    real, mode = (
        bool(args.from_real),
        "--from-real" if args.from_real else "--sweep" if args.sweep else None,
    )
    on, several = args.on is not None, len(args.seeds or []) > 1
    choosing = {
        "--choose-on": args.choose_on is not None,
        "--choose-seed": args.choose_seed is not None,
    }
    if mode is None:
        unused = ["--on"] if on else []
        if not unused and len(args.w or []) == 1 and any(choosing.values()):
            given = " and ".join(name for name, value in choosing.items() if value)
            raise EvaluationError(
                f"{given} means nothing with one --w, expected several to choose from: leave it out"
            )
    else:
        given = {
            "--sweep": real and args.sweep,
            "--more": args.more,
            "--features": args.features,
            "--clip": args.clip,
            "--seeds": real and args.seeds,
            "a second --seeds": several and not real,
            "--on": real and on,
            "a second --w": real and len(args.w or []) > 1,
            **{name: value and not real for name, value in choosing.items()},
        }
        unused = [name for name, value in given.items() if value]
    if unused:
        beside = f"beside {mode}" if mode else "without --sweep"
        raise EvaluationError(
            f"{' and '.join(unused)} means nothing {beside}, expected it alone: leave it out"
        )


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluation",
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
    )
    parser.add_argument(
        "run", type=Path, help="a run's folder, or a saved pipeline's with its config.yaml"
    )
    parser.add_argument(
        "--w",
        type=float,
        nargs="+",
        help="guidance to choose from (default: 0 1 2), or one to use; of --sweep and --from-real the one that "
        "they start from (default: the model's own)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="each draws every caption once, and reports (default: 0)",
    )
    parser.add_argument(
        "--choose-seed", type=int, help="the seed that w is chosen on (default: 1000)"
    )
    parser.add_argument(
        "--choose-on", type=int, help="how many training captions w is chosen on (default: 96)"
    )
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    parser.add_argument(
        "--batch", type=int, default=32, help="pictures that are drawn at once (default: 32)"
    )
    parser.add_argument(
        "--from-real",
        type=int,
        nargs="+",
        metavar="T",
        help="instead: start from the real pictures of the --choose-on captions, noised to each of these "
        "timesteps, and see where on the way quality is lost",
    )
    parser.add_argument(
        "--more",
        action="store_true",
        help="also: Fréchet distance, error by timestep, bits per dimension of held-out pictures, diversity",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        default=[],
        choices=list(NETWORKS),
        metavar="NETWORK",
        help=f"also: KID and Fréchet distance by these feature networks, of {', '.join(NETWORKS)}",
    )
    parser.add_argument("--clip", metavar="PATH_OR_ID", help="also: the CLIP score by this model")
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="KNOB=A,B",
        help="instead: draw --on captions with one knob changed at a time, such as w=0,1,2,4 steps=10,25,50 "
        "eta=0,1 interval=0:1,0.3:0.9 weights=averaged,raw; goes on where it was stopped",
    )
    parser.add_argument(
        "--on", type=int, help="how many captions each point of a sweep draws (default: 256)"
    )
    args = parser.parse_args(argv)
    ws = args.w or list(WS)
    from pipeline.evaluation import sweep

    try:
        check(args)
        vars(args).update(
            {name: value for name, value in DEFAULTS.items() if getattr(args, name) is None}
        )
        if args.from_real:
            _config, judge, bank, pipe = finished(args.run)
            w = args.w[0] if args.w else pipe.config.w
            rows = dataset.evenly(args.choose_on, bank.n_train)
            for t in args.from_real:
                found = from_real(
                    judge, bank, pipe, rows, t, w, args.choose_seed, args.steps, args.batch
                )
                first, five = results.percent(found["first"]), results.percent(found["first_five"])
                print(f"from t = {found['t']}: first {first}, first five {five}")
            return 0
        if args.sweep:
            result = sweep.sweep(
                args.run, args.sweep, args.w, args.seeds[0], args.on, args.steps, args.batch
            )
        else:
            result = evaluate(
                args.run,
                ws,
                args.seeds,
                args.choose_seed,
                args.choose_on,
                args.steps,
                args.batch,
                deep=args.more,
                features=args.features,
                clip=args.clip,
            )
        print(results.report(result))
        if (args.run / model_card.FACTS).is_file() and Run(
            args.run
        ).card.is_file():  # a run that is trained on has none
            model_card.refresh(args.run)
    except (
        ValueError,
        RunError,
        OSError,
    ) as error:  # of ours, of diffusers' for a call that it cannot make
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(
        loading.stoppable(main, "what is drawn is kept, and the same command goes on from there")
    )
