"""How well a run draws what its captions say: retrieval and KID by an ImageNet network, copies, seams, with 95 % intervals.

A drawing is judged by the rank of its caption's own picture among all pictures of the set, by centred cosine of pooled
features. `direct-jump evaluate RUN` writes `RUN/metrics.json` and the card anew; what it has drawn is kept, so it can
be stopped. `--more` adds slower measures, `--sweep` what each knob of sampling does.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import Config, DiffusionConfig, load_file
from pipeline.data.dataset import load_splits
from pipeline.data.emoji.recolour import OPEN_PROMPTS
from pipeline.data.fingerprint import digest
from pipeline.data.image_ops import as_float
from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion.losses import PIXEL_SPACES
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation.distances import (
    MIN_SAMPLES,
    extract_features,
    frechet_distance,
    kid,
    load_inception,
    random_halves,
)
from pipeline.evaluation.feature_extractor import FEATURE_NETWORK, FeatureExtractor
from pipeline.evaluation.image_quality import (
    augment,
    copy_rate,
    copy_threshold,
    diversity,
    seam_ratio,
)
from pipeline.evaluation.likelihood import (
    denoising_errors,
    file_bits,
    likelihood_bound,
    model_space,
)
from pipeline.evaluation.reference_set import ReferenceSet
from pipeline.evaluation.retrieval import (
    EvaluationError,
    bootstrap_mean,
    recall_summary,
    retrieval_ranks,
)
from pipeline.evaluation.samples import (
    FLOAT32_SUFFIX,
    SEED_STRIDE,
    cached_statistic,
    generate_batch,
    generate_samples,
    samples_file,
    samples_identity,
    save_contact_sheet,
)
from pipeline.hardware import pick_device
from pipeline.models.build import build_scheduler
from pipeline.models.loading import load_pipeline
from pipeline.runs.files import replace_text
from pipeline.runs.folder import IMAGES_FOLDER, MODEL_INDEX, RunFolder
from pipeline.search.verifiers import ClipVerifier, clip_scores

DEFAULT_WS = (0.0, 1.0, 2.0)
FEATURE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    FEATURE_NETWORK: FeatureExtractor,
    "inception-v3": load_inception,
}  # of features
DIVERSITY_SAMPLES = (24, 4)  # captions, seeds


def measure_samples(
    judge: FeatureExtractor,
    bank: ReferenceSet,
    images: Tensor,
    rows: Tensor,
    threshold: float,
    patch: int,
) -> dict:
    """What drawings (M, 3, H, W) of the captions of some rows of the bank are worth."""
    features = judge.features(images)
    ranks = retrieval_ranks(features, bank.features, bank.own[rows])
    where = lambda some: recall_summary(ranks[torch.isin(rows, some)])
    found, held = {"train": recall_summary(ranks[rows < bank.n_train])}, rows >= bank.n_train
    if held.any():
        found["held_out"] = recall_summary(ranks[held]) | {
            "copies": copy_rate(images[held], bank.train, threshold)
        }
        found["grids"] = {name: where(some) for name, some in bank.grids().items()}
    if len(rows) >= MIN_SAMPLES:
        found["distances"] = {
            FEATURE_NETWORK: {"kid": kid(bank.features[bank.own[rows]], features)}
        }
    return found | {"seam_ratio": seam_ratio(images, patch) / seam_ratio(bank.images, patch)}


def reference_metrics(judge: FeatureExtractor, bank: ReferenceSet, threshold: float) -> dict:
    """What the numbers are read against: chance, a lightly augmented real picture, a sibling, the real held-out picture."""
    n, rows = len(bank.features), torch.arange(len(bank.captions))
    held = rows[bank.n_train :]
    found = {
        "pictures": n,
        "captions": len(rows),
        "chance": {"first": 1 / n, "first_five": min(5 / n, 1)},
        "ceiling": recall_summary(
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


def update_metrics(folder: Path, model: str, **found) -> dict:
    """metrics.json with these results beside those that it holds of the same `identity`; those of others go, also where only the
    precision differs, which is told.
    """
    path = folder / "metrics.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get("model", model) != model and known["model"].removesuffix(
        FLOAT32_SUFFIX
    ) == model.removesuffix(FLOAT32_SUFFIX):
        print(
            f"{path} was of the same model by a machine of another precision: its results are replaced",
            file=sys.stderr,
        )
    result = (known if known.get("model") == model else {}) | found | {"model": model}
    replace_text(path, json.dumps(result, indent=1))
    return json.loads(json.dumps(result))


def load_run(folder: Path) -> tuple[Config, FeatureExtractor, ReferenceSet, TextToImagePipeline]:
    """A finished run, or a saved pipeline with its config.yaml, on the fastest device, and all that judges it, on the CPU."""
    run = RunFolder(folder)
    if not (run.has_model or (folder / MODEL_INDEX).is_file()):
        raise EvaluationError(
            f"{folder} holds no finished pipeline, expected {folder / 'pipeline' / MODEL_INDEX}: "
            "train first"
        )
    config, judge = load_file(run.config), FeatureExtractor()
    see = lambda images: cached_statistic(
        config.data.cache, "features", FEATURE_NETWORK, images, lambda: judge.features(images)
    )
    bank = ReferenceSet.of(see, [split for split in load_splits(config.data) if split is not None])
    pipe = load_pipeline(str(folder)).to(pick_device(None, double=True))
    pipe.set_progress_bar_config(disable=True)
    return config, judge, bank, pipe


def feature_distances(
    name: str, bank: ReferenceSet, images: Tensor, cache: str, network: nn.Module | None = None
) -> dict:
    """KID and Fréchet distance between drawings (N, 3, H, W) of all captions and the real pictures, by a feature network.

    network: what `name` makes, where it is there already.
    The Fréchet distance is that of half the drawings from the other half's real pictures, `real` that of real pictures in
    the drawings' place.
    """
    network = network or FEATURE_NETWORKS[name]()
    real = cached_statistic(
        cache, "features", name, bank.images, lambda: extract_features(network, bank.images)
    )
    found, (a, b) = extract_features(network, images), random_halves(len(real))
    apart = cached_statistic(
        cache,
        "halves",
        name,
        bank.images,
        lambda: torch.tensor(frechet_distance(real[a], real[b])),
    )
    frechet = {"value": frechet_distance(found[a], real[b]), "real": float(apart), "n": len(a)}
    return {"kid": kid(real, found), "frechet": frechet}


def extra_metrics(
    judge: FeatureExtractor,
    bank: ReferenceSet,
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
        pipe.register_modules(scheduler=build_scheduler(DiffusionConfig(), pipe.scheduler))
    splits = {"train": evenly_spaced(64, bank.n_train)} | (
        {"held_out": evenly_spaced(64, n, bank.n_train)} if len(held) else {}
    )
    pictures = {name: (bank.images[rows], bank.captions_of(rows)) for name, rows in splits.items()}
    found = {"errors": denoising_errors(pipe, pictures)}
    if len(held) and model_space(pipe) in PIXEL_SPACES:
        terms = likelihood_bound(pipe, bank.images[held], bank.captions_of(held))
        bits = {"model": sum(terms.values())} | terms | file_bits(bank.images[held])
        found["bits_per_dimension"] = {name: bootstrap_mean(value) for name, value in bits.items()}
    captions, seeds = DIVERSITY_SAMPLES
    rows, found["diversity"] = evenly_spaced(captions, bank.n_train), {}
    for w in ws:
        features = torch.stack([judge.features(images_of(rows, w, seed)) for seed in range(seeds)])
        found["diversity"][f"{w:g}"] = bootstrap_mean(diversity(features, bank.features))
    return found


@torch.no_grad()
def denoise_real_images(
    judge: FeatureExtractor,
    bank: ReferenceSet,
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
            generate_batch(
                pipe,
                bank.captions_of(some),
                w=w,
                seed=seed * SEED_STRIDE + 1 + n * batch,
                timesteps=plan,
                latents=x_t,
            )
        )
    return {"t": plan[0]} | recall_summary(
        retrieval_ranks(judge.features(torch.cat(images)), bank.features, bank.own[rows])
    )


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
        ClipVerifier(clip),
    )  # what may be misspelt, or not installed, says so before anything is drawn
    by_name = {
        name: FEATURE_NETWORKS[name]()
        for name in dict.fromkeys([*([FEATURE_NETWORK] if deep else []), *features])
    }
    config, judge, bank, pipe = load_run(folder)
    patch = config.model.patch_size or 1
    model = samples_identity(pipe, bank)
    patch = patch if patch > 1 else 4  # without patches nothing should show at any grid
    place = lambda what, w, seed: samples_file(folder, model, steps, what, w, seed)
    threshold = copy_threshold(bank.images[: bank.n_train])
    judged = lambda images, rows: measure_samples(judge, bank, images, rows, threshold, patch)

    some = evenly_spaced(choose_on, bank.n_train)
    choice = {}
    for w in ws if len(ws) > 1 else []:
        path = place(f"choice{len(some)}", w, choose_seed)
        images = generate_samples(pipe, bank.captions_of(some), w, choose_seed, steps, path, batch)
        choice[w] = judged(images, some)
    w = max(choice, key=lambda w: choice[w]["train"]["first_five"]["k"]) if choice else ws[0]
    rows, by_seed, copies, extra = torch.arange(len(bank.captions)), {}, {}, {}
    free = [prompt for prompt in OPEN_PROMPTS if prompt not in bank.captions]
    for seed in seeds:
        images = generate_samples(pipe, bank.captions, w, seed, steps, place("all", w, seed), batch)
        by_seed[seed] = judged(images, rows)
        for name, by in by_name.items():
            by_seed[seed].setdefault("distances", {})[name] = feature_distances(
                name, bank, images, config.data.cache, by
            )
        if clip:
            called, by = clip
            scores = {
                kind: bootstrap_mean(clip_scores(by, some, bank.captions))
                for kind, some in (("drawn", images), ("real", bank.images))
            }
            by_seed[seed]["clip"] = {
                "model": Path(called).name if Path(called).exists() else called
            } | scores
        prompted = generate_samples(
            pipe, free, w, seed, steps, place(f"free-{digest(free)[:8]}", w, seed), batch
        )
        copies[seed] = copy_rate(prompted, bank.train, threshold)
        if seed == seeds[0]:
            save_contact_sheet(prompted, free, folder / IMAGES_FOLDER / "free.png")
    if deep:
        images_of = lambda rows, w, seed: generate_samples(
            pipe, bank.captions_of(rows), w, seed, steps, place(f"some{len(rows)}", w, seed), batch
        )
        extra["more"] = extra_metrics(judge, bank, pipe, images_of, ws) | {
            "num_inference_steps": steps
        }
    choices = {"seed": choose_seed, "captions": len(some), "by_w": choice}
    return update_metrics(
        folder,
        model,
        w=w,
        num_inference_steps=steps,
        seeds=seeds,
        by_seed=by_seed,
        free_prompt_copies=copies,
        choice=choices,
        references=reference_metrics(judge, bank, threshold),
        **extra,
    )
