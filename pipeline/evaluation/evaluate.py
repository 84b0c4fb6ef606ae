"""Measure a run's samples: retrieval, KID, copies and seams, with 95 % intervals.

Retrieval ranks all real images by their similarity to a sample, the centred cosine of pooled
features; the caption's own image should be first. Results go to metrics.json and to the run's
card. Samples are cached, so an interrupted evaluation resumes.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from pipeline.hub.model_card import TRAINING_FACTS, refresh_card
from pipeline.models.build import build_scheduler
from pipeline.models.loading import load_pipeline
from pipeline.runs.files import replace_text
from pipeline.runs.folder import IMAGES_FOLDER, MODEL_INDEX, RunFolder
from pipeline.runs.results import (
    Chance,
    Choice,
    ClipScore,
    Distances,
    ExtraMetrics,
    FrechetDistance,
    HeldOutRecall,
    Metrics,
    Recall,
    References,
    SeedResult,
)
from pipeline.search.verifiers import ClipVerifier, clip_scores

DEFAULT_WS = (0.0, 1.0, 2.0)
CHOOSE_SEED = 1000
CHOOSE_ON = 96  # training captions
FEATURE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    FEATURE_NETWORK: FeatureExtractor,
    "inception-v3": load_inception,
}
SPLIT_IMAGES = 64  # of each split, for denoising errors
DIVERSITY_CAPTIONS = 24
DIVERSITY_SEEDS = 4


def load_run(folder: Path) -> tuple[Config, FeatureExtractor, ReferenceSet, TextToImagePipeline]:
    """Load a finished run, or a saved pipeline with its config.yaml, and its real images.

    The pipeline is on the fastest device, all else on the CPU.
    """
    run = RunFolder(folder)
    if not (run.has_model or (folder / MODEL_INDEX).is_file()):
        raise EvaluationError(
            f"{folder} has no finished pipeline: {folder / 'pipeline' / MODEL_INDEX} does not "
            "exist. Train first."
        )
    config = load_file(run.config)
    extractor = FeatureExtractor()

    def extract(images: Tensor) -> Tensor:
        """Return cached features of real images."""
        cache = config.data.cache
        compute = lambda: extractor.features(images)  # noqa: E731
        return cached_statistic(cache, "features", FEATURE_NETWORK, images, compute)

    splits = [split for split in load_splits(config.data) if split is not None]
    references = ReferenceSet.from_splits(extract, splits)
    pipe = load_pipeline(str(folder)).to(pick_device(None, double=True))
    pipe.set_progress_bar_config(disable=True)
    return config, extractor, references, pipe


def update_metrics(folder: Path, model: str, **parts) -> Metrics:
    """Write these results to metrics.json and to the card of a finished run; return the file.

    Earlier results of the same model identity stay. Those of another one are replaced, with a
    message if only the precision differs.
    """
    path = folder / "metrics.json"
    metrics = Metrics(model)
    if path.is_file():
        known = Metrics.from_json(json.loads(path.read_text(encoding="utf-8")))
        if known.model == model:
            metrics = known
        elif known.model.removesuffix(FLOAT32_SUFFIX) == model.removesuffix(FLOAT32_SUFFIX):
            message = f"{path} was measured in another precision: its results are replaced"
            print(message, file=sys.stderr)
    metrics = replace(metrics, **parts)
    replace_text(path, json.dumps(metrics.to_json(), indent=1))
    # A run without a card is still in training: a card would declare it finished.
    if (folder / TRAINING_FACTS).is_file() and RunFolder(folder).card.is_file():
        refresh_card(folder)
    return metrics


def measure_samples(
    extractor: FeatureExtractor,
    references: ReferenceSet,
    images: Tensor,
    rows: Tensor,
    threshold: float,
    patch: int,
) -> SeedResult:
    """Measure samples (M, 3, H, W) of the captions of some rows (M,) of the reference set."""
    features = extractor.features(images)
    ranks = retrieval_ranks(features, references.features, references.own[rows])
    held_out = None
    grids = {}
    hidden = rows >= references.n_train
    if hidden.any():
        recall = recall_summary(ranks[hidden])
        copies = copy_rate(images[hidden], references.train, threshold)
        held_out = HeldOutRecall(**vars(recall), copies=copies)
        for name, some in references.grids().items():
            grids[name] = recall_summary(ranks[torch.isin(rows, some)])
    distances = {}
    if len(rows) >= MIN_SAMPLES:
        real = references.features[references.own[rows]]
        distances[FEATURE_NETWORK] = Distances(kid(real, features))
    seams = seam_ratio(images, patch) / seam_ratio(references.images, patch)
    return SeedResult(recall_summary(ranks[~hidden]), seams, held_out, grids, distances)


def reference_metrics(
    extractor: FeatureExtractor, references: ReferenceSet, threshold: float
) -> References:
    """Measure what recall is compared with: chance, augmented real images, and siblings."""
    n = len(references.features)
    captions = len(references.captions)
    features = extractor.features(augment(references.images))
    ceiling = recall_summary(retrieval_ranks(features, references.features, references.own))
    copies = None
    siblings = {}
    if captions > references.n_train:
        held_out = torch.arange(references.n_train, captions)
        copies = copy_rate(references.images[held_out], references.train, threshold)
        for name, rows in {"held_out": held_out, **references.grids()}.items():
            siblings[name] = references.sibling_baseline(rows)
    chance = Chance(1 / n, min(5 / n, 1))
    return References(n, captions, chance, ceiling, copies, siblings)


def feature_distances(
    name: str,
    references: ReferenceSet,
    images: Tensor,
    cache: str,
    network: nn.Module | None = None,
) -> Distances:
    """Return KID and Fréchet distance of samples (N, 3, H, W) of all captions by a network.

    The Fréchet distance compares the samples of one half of the captions with the real images of
    the other half, and its `real` the real images of both halves.

    network: the loaded network of this name, if there is one.
    """
    network = network or FEATURE_NETWORKS[name]()
    real_images = references.images

    def extract() -> Tensor:
        """Return the features of the real images."""
        return extract_features(network, real_images)

    real = cached_statistic(cache, "features", name, real_images, extract)
    a, b = random_halves(len(real))

    def between_halves() -> Tensor:
        """Return the Fréchet distance between the real images of both halves."""
        return torch.tensor(frechet_distance(real[a], real[b]))

    of_real = cached_statistic(cache, "halves", name, real_images, between_halves)
    features = extract_features(network, images)
    frechet = FrechetDistance(frechet_distance(features[a], real[b]), float(of_real), len(a))
    return Distances(kid(real, features), frechet)


def clip_score(
    name: str, verifier: ClipVerifier, references: ReferenceSet, images: Tensor
) -> ClipScore:
    """Return the CLIP scores of samples (N, 3, H, W) of all captions and of the real images."""
    scores = clip_scores(verifier, images, references.captions)
    real = clip_scores(verifier, references.images, references.captions)
    model = Path(name).name if Path(name).exists() else name
    return ClipScore(model, bootstrap_mean(scores), bootstrap_mean(real))


def extra_metrics(
    extractor: FeatureExtractor,
    references: ReferenceSet,
    pipe: TextToImagePipeline,
    generate: Callable[[Tensor, float, int], Tensor],
    ws: Sequence[float],
) -> ExtraMetrics:
    """Measure denoising errors, bits/dim of held-out images, and diversity at several w.

    generate(rows, w, seed) returns samples of the captions of some rows.
    """
    # A stock scheduler has no equations: its noise process is measured by ours.
    if not isinstance(pipe.scheduler, DDPMScheduler):
        pipe = copy.copy(pipe)
        pipe.register_modules(scheduler=build_scheduler(DiffusionConfig(), pipe.scheduler))
    n = len(references.captions)
    n_train = references.n_train
    rows = {"train": evenly_spaced(SPLIT_IMAGES, n_train)}
    if n > n_train:
        rows["held_out"] = evenly_spaced(SPLIT_IMAGES, n, n_train)
    splits = {
        name: (references.images[some], references.captions_of(some)) for name, some in rows.items()
    }
    errors = denoising_errors(pipe, splits)
    bits = None
    if n > n_train and model_space(pipe) in PIXEL_SPACES:
        images = references.images[n_train:]
        terms = likelihood_bound(pipe, images, references.captions[n_train:])
        values = {"model": sum(terms.values()), **terms, **file_bits(images)}
        bits = {name: bootstrap_mean(value) for name, value in values.items()}
    some = evenly_spaced(DIVERSITY_CAPTIONS, n_train)
    by_w = {}
    for w in ws:
        seeds = range(DIVERSITY_SEEDS)
        features = torch.stack([extractor.features(generate(some, w, seed)) for seed in seeds])
        by_w[f"{w:g}"] = bootstrap_mean(diversity(features, references.features))
    return ExtraMetrics(errors, by_w, bits)


@torch.no_grad()
def denoise_real_images(
    extractor: FeatureExtractor,
    references: ReferenceSet,
    pipe: TextToImagePipeline,
    rows: Tensor,
    t: int,
    w: float,
    seed: int,
    steps: int,
    batch: int = 32,
) -> tuple[int, Recall]:
    """Return the timestep and the recall of samples that start at t from their own noised image.

    This shows what is lost below t. The timesteps are those of a plan of `steps` from t down.
    EvaluationError for a scheduler that cannot start on the way.
    """
    if not isinstance(pipe.scheduler, DDPMScheduler):
        raise EvaluationError(
            f"This model's scheduler is {type(pipe.scheduler).__name__}, but only DDPMScheduler "
            "can start from real images. Leave --from-real out."
        )
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    timesteps = [k for k in scheduler.timesteps.tolist() if k <= t]
    if not timesteps:
        raise EvaluationError(
            f"A plan of {steps} steps has no timestep up to {t}. Pass more --steps, or a larger t."
        )
    generator = torch.Generator().manual_seed(seed)
    images = []
    for n, some in enumerate(rows.split(batch)):
        x_0 = pipe.encode(as_float(references.images[some]).to(pipe.device))
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        call = {
            "w": w,
            "seed": seed * SEED_STRIDE + 1 + n * batch,
            "timesteps": timesteps,
            "latents": scheduler.add_noise(x_0, eps, timesteps[0]),  # (5)
        }
        images.append(generate_batch(pipe, references.captions_of(some), **call))
    features = extractor.features(torch.cat(images))
    ranks = retrieval_ranks(features, references.features, references.own[rows])
    return timesteps[0], recall_summary(ranks)


def evaluate_from_real(
    folder: Path,
    timesteps: Sequence[int],
    ws: Sequence[float] = (),
    *,
    choose_seed: int | None = None,
    choose_on: int | None = None,
    steps: int = 50,
    batch: int = 32,
) -> Iterator[tuple[int, Recall]]:
    """Yield `denoise_real_images` of `choose_on` training captions for each of the timesteps.

    ws: one w, or none for the model's own.
    """
    if len(ws) > 1:
        raise EvaluationError(f"--from-real takes one --w, got {len(ws)}.")
    _config, extractor, references, pipe = load_run(folder)
    w = ws[0] if ws else pipe.config.w
    rows = evenly_spaced(choose_on or CHOOSE_ON, references.n_train)
    seed = CHOOSE_SEED if choose_seed is None else choose_seed
    for t in timesteps:
        yield denoise_real_images(extractor, references, pipe, rows, t, w, seed, steps, batch)


def evaluate(
    folder: Path,
    ws: Sequence[float] = DEFAULT_WS,
    seeds: Sequence[int] = (0,),
    *,
    choose_seed: int | None = None,
    choose_on: int | None = None,
    steps: int = 50,
    batch: int = 32,
    more: bool = False,
    features: Sequence[str] = (),
    clip: str | None = None,
) -> Metrics:
    """Choose w on `choose_on` training captions with one seed, then measure all captions' samples.

    Every seed of `seeds` samples each caption once. The result is all of metrics.json.

    more: also `extra_metrics`, and the Fréchet distance. features: other networks for distances.
    clip: the folder or Hub id of a CLIP model.
    """
    if len(ws) == 1 and (choose_seed is not None or choose_on is not None):
        raise EvaluationError(
            f"--choose-seed and --choose-on have no effect with one --w ({ws[0]:g}). "
            "Leave them out, or pass several w."
        )
    choose_seed = CHOOSE_SEED if choose_seed is None else choose_seed
    if len(ws) > 1 and choose_seed in seeds:
        raise EvaluationError(
            f"Seed {choose_seed} is in both --choose-seed and --seeds. Choosing w on a reported "
            "seed biases the result."
        )
    # What is misspelt or not installed is refused before the first sample.
    clip_model = None if clip is None else ClipVerifier(clip)
    names = [FEATURE_NETWORK, *features] if more else features
    networks = {name: FEATURE_NETWORKS[name]() for name in dict.fromkeys(names)}
    config, extractor, references, pipe = load_run(folder)
    model = samples_identity(pipe, references)
    # Without patches, no grid should show: 4 is as good as any.
    patch = config.model.patch_size or 1
    patch = patch if patch > 1 else 4
    threshold = copy_threshold(references.images[: references.n_train])

    def generate(prompts: list[str], what: str, w: float, seed: int) -> Tensor:
        """Return cached samples (N, 3, H, W)."""
        path = samples_file(folder, model, steps, what, w, seed)
        return generate_samples(pipe, prompts, w, seed, steps, path, batch)

    def measure(images: Tensor, rows: Tensor) -> SeedResult:
        return measure_samples(extractor, references, images, rows, threshold, patch)

    some = evenly_spaced(choose_on or CHOOSE_ON, references.n_train)
    by_w = {}
    if len(ws) > 1:
        for w in ws:
            prompts = references.captions_of(some)
            images = generate(prompts, f"choice{len(some)}", w, choose_seed)
            by_w[w] = measure(images, some)
    w = max(by_w, key=lambda w: by_w[w].train.recall_at_5.k) if by_w else ws[0]

    rows = torch.arange(len(references.captions))
    open_prompts = [prompt for prompt in OPEN_PROMPTS if prompt not in references.captions]
    by_seed = {}
    copies = {}
    for seed in seeds:
        images = generate(references.captions, "all", w, seed)
        result = measure(images, rows)
        distances = dict(result.distances)
        for name, network in networks.items():
            cache = config.data.cache
            distances[name] = feature_distances(name, references, images, cache, network)
        scores = None if clip_model is None else clip_score(clip, clip_model, references, images)
        by_seed[seed] = replace(result, distances=distances, clip=scores)
        images = generate(open_prompts, f"free-{digest(open_prompts)[:8]}", w, seed)
        copies[seed] = copy_rate(images, references.train, threshold)
        if seed == seeds[0]:
            save_contact_sheet(images, open_prompts, folder / IMAGES_FOLDER / "free.png")
    parts = {}
    if more:

        def generate_rows(some: Tensor, w: float, seed: int) -> Tensor:
            return generate(references.captions_of(some), f"some{len(some)}", w, seed)

        extra = extra_metrics(extractor, references, pipe, generate_rows, ws)
        parts["more"] = replace(extra, num_inference_steps=steps)
    return update_metrics(
        folder,
        model,
        w=w,
        num_inference_steps=steps,
        seeds=list(seeds),
        by_seed=by_seed,
        free_prompt_copies=copies,
        choice=Choice(choose_seed, len(some), by_w),
        references=reference_metrics(extractor, references, threshold),
        **parts,
    )
