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
from pipeline.evaluation import distances, image_quality, likelihood, samples
from pipeline.evaluation.alignment import AlignmentModel
from pipeline.evaluation.feature_extractor import (
    FEATURE_NETWORK,
    FeatureExtractor,
    extract_features,
)
from pipeline.evaluation.reference_set import ReferenceSet
from pipeline.evaluation.retrieval import EvaluationError, bootstrap_mean, recall_summary
from pipeline.evaluation.samples import SEED_STRIDE, cached_statistic
from pipeline.hardware import pick_device
from pipeline.hub.model_card import TRAINING_FACTS, refresh_card
from pipeline.models.build import build_scheduler
from pipeline.models.loading import load_pipeline
from pipeline.runs import results
from pipeline.runs.files import replace_text
from pipeline.runs.folder import IMAGES_FOLDER, MODEL_INDEX, RunFolder
from pipeline.runs.results import Metrics, Recall, SeedResult
from pipeline.search.verifiers import ClipVerifier, clip_scores

DEFAULT_WS = (0.0, 1.0, 2.0)
CHOOSE_SEED = 1000
CHOOSE_ON = 96  # training captions
FEATURE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    FEATURE_NETWORK: FeatureExtractor,
    "inception-v3": distances.load_inception,
}
DIVERSITY_SAMPLES = (24, 4)  # captions, seeds


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
        key = (config.data.cache, "features", FEATURE_NETWORK)
        return cached_statistic(*key, images, lambda: extractor.features(images))

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
    suffix = samples.FLOAT32_SUFFIX
    metrics = Metrics(model)
    if path.is_file():
        known = Metrics.from_json(json.loads(path.read_text(encoding="utf-8")))
        if known.model == model:
            metrics = known
        elif known.model.split(suffix)[0] == model.split(suffix)[0]:
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
    ranks = references.ranks(features, rows)
    hidden = rows >= references.n_train
    held_out = None
    grids = {}
    if hidden.any():
        copies = image_quality.copy_rate(images[hidden], references.train, threshold)
        held_out = results.HeldOutRecall(**vars(recall_summary(ranks[hidden])), copies=copies)
        for name, some in references.grids().items():
            grids[name] = recall_summary(ranks[torch.isin(rows, some)])
    by_network = {}
    if len(rows) >= distances.MIN_SAMPLES:
        kid = distances.kid(references.features[references.own[rows]], features)
        by_network[FEATURE_NETWORK] = results.Distances(kid)
    real_seams = image_quality.seam_ratio(references.images, patch)
    seams = image_quality.seam_ratio(images, patch) / real_seams
    return SeedResult(recall_summary(ranks[~hidden]), seams, held_out, grids, by_network)


def reference_metrics(
    extractor: FeatureExtractor, references: ReferenceSet, threshold: float
) -> results.References:
    """Measure what recall is compared with: chance, augmented real images, and siblings."""
    n = len(references.features)
    rows = torch.arange(len(references.captions))
    held_out = rows[references.n_train :]
    features = extractor.features(image_quality.augment(references.images))
    ceiling = recall_summary(references.ranks(features, rows))
    chance = results.Chance(1 / n, min(5 / n, 1))
    if not len(held_out):
        return results.References(n, len(rows), chance, ceiling)
    images = references.images[held_out]
    copies = image_quality.copy_rate(images, references.train, threshold)
    groups = {"held_out": held_out, **references.grids()}
    siblings = {name: references.sibling_baseline(some) for name, some in groups.items()}
    return results.References(n, len(rows), chance, ceiling, copies, siblings)


def feature_distances(
    name: str,
    references: ReferenceSet,
    images: Tensor,
    cache: str,
    network: nn.Module | None = None,
) -> results.Distances:
    """Return KID and Fréchet distance of samples (N, 3, H, W) of all captions by a network.

    The Fréchet distance compares the samples of one half of the captions with the real images of
    the other half, and its `real` the real images of both halves.

    network: the loaded network of this name, if there is one.
    """
    network = network or FEATURE_NETWORKS[name]()

    def of_real(what: str, compute: Callable[[], Tensor]) -> Tensor:
        return cached_statistic(cache, what, name, references.images, compute)

    real = of_real("features", lambda: extract_features(network, references.images))
    features = extract_features(network, images)
    a, b = distances.random_halves(len(real))
    frechet = distances.frechet_distance
    between_halves = of_real("halves", lambda: torch.tensor(frechet(real[a], real[b])))
    value = frechet(features[a], real[b])
    found = results.FrechetDistance(value, float(between_halves), len(a))
    return results.Distances(distances.kid(real, features), found)


def clip_score(
    name: str, verifier: ClipVerifier, references: ReferenceSet, images: Tensor
) -> results.ClipScore:
    """Return the CLIP scores of samples (N, 3, H, W) of all captions and of the real images."""
    scores = [clip_scores(verifier, x, references.captions) for x in (images, references.images)]
    model = Path(name).name if Path(name).exists() else name
    return results.ClipScore(model, *map(bootstrap_mean, scores))


def alignment_score(
    model: AlignmentModel, references: ReferenceSet, images: Tensor
) -> results.ClipScore:
    """Return the alignment of samples (N, 3, H, W) of all captions and of the real images."""
    scores = [model.score(x, references.captions) for x in (images, references.images)]
    return results.ClipScore("alignment", *map(bootstrap_mean, scores))


def extra_metrics(
    extractor: FeatureExtractor,
    references: ReferenceSet,
    pipe: TextToImagePipeline,
    generate: Callable[[Tensor, float, int], Tensor],
    ws: Sequence[float],
) -> results.ExtraMetrics:
    """Measure denoising errors, bits/dim of held-out images, and diversity at several w.

    generate(rows, w, seed) returns samples of the captions of some rows.
    """
    # A stock scheduler has no equations: its noise process is measured by ours.
    if not isinstance(pipe.scheduler, DDPMScheduler):
        pipe = copy.copy(pipe)
        pipe.register_modules(scheduler=build_scheduler(DiffusionConfig(), pipe.scheduler))
    n = len(references.captions)
    n_train = references.n_train
    rows = {"train": evenly_spaced(64, n_train)}
    bits = None
    if n > n_train:
        rows["held_out"] = evenly_spaced(64, n, n_train)
        if likelihood.model_space(pipe) in PIXEL_SPACES:
            images = references.images[n_train:]
            terms = likelihood.likelihood_bound(pipe, images, references.captions[n_train:])
            values = {"model": sum(terms.values()), **terms, **likelihood.file_bits(images)}
            bits = {name: bootstrap_mean(value) for name, value in values.items()}
    splits = {
        name: (references.images[some], references.captions_of(some)) for name, some in rows.items()
    }
    errors = likelihood.denoising_errors(pipe, splits)
    captions, seeds = DIVERSITY_SAMPLES
    some = evenly_spaced(captions, n_train)
    by_w = {}
    for w in ws:
        features = [extractor.features(generate(some, w, seed)) for seed in range(seeds)]
        apart = image_quality.diversity(torch.stack(features), references.features)
        by_w[f"{w:g}"] = bootstrap_mean(apart)
    return results.ExtraMetrics(errors, by_w, bits)


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
        name = type(pipe.scheduler).__name__
        raise EvaluationError(f"{name} cannot start from real images. Leave --from-real out.")
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
        x_t = scheduler.add_noise(x_0, eps, timesteps[0])  # (5)
        call = {"w": w, "seed": seed * SEED_STRIDE + 1 + n * batch, "timesteps": timesteps}
        prompts = references.captions_of(some)
        images.append(samples.generate_batch(pipe, prompts, latents=x_t, **call))
    features = extractor.features(torch.cat(images))
    return timesteps[0], recall_summary(references.ranks(features, rows))


def evaluate_from_real(
    folder: Path,
    timesteps: Sequence[int],
    *,
    ws: Sequence[float] = (),
    choose_seed: int = CHOOSE_SEED,
    choose_on: int = CHOOSE_ON,
    steps: int = 50,
    batch: int = 32,
) -> Iterator[tuple[int, Recall]]:
    """Yield `denoise_real_images` of `choose_on` training captions for each of the timesteps.

    ws: one w, or none for the model's own.
    """
    if len(ws) > 1:
        raise EvaluationError(f"--from-real takes one --w, got {len(ws)}.")
    _config, extractor, references, pipe = load_run(folder)
    rows = evenly_spaced(choose_on, references.n_train)
    w = ws[0] if ws else pipe.config["w"]
    call = {"w": w, "seed": choose_seed, "steps": steps, "batch": batch}
    for t in timesteps:
        yield denoise_real_images(extractor, references, pipe, rows, t, **call)


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
    alignment: bool = False,
) -> Metrics:
    """Choose w on `choose_on` training captions with one seed, then measure all captions' samples.

    Every seed of `seeds` samples each caption once. The result is all of metrics.json.

    more: also `extra_metrics`, and the Fréchet distance. features: other networks for distances.
    clip: the folder or Hub id of a CLIP model. alignment: also the alignment score.
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
    verifier = None if clip is None else ClipVerifier(clip)
    scorer = AlignmentModel.load() if alignment else None
    names = [FEATURE_NETWORK, *features] if more else features
    networks = {name: FEATURE_NETWORKS[name]() for name in dict.fromkeys(names)}
    config, extractor, references, pipe = load_run(folder)
    model = samples.samples_identity(pipe, references)
    # Without patches, no grid should show: 4 is as good as any.
    patch = config.model.patch_size or 1
    patch = patch if patch > 1 else 4
    threshold = image_quality.copy_threshold(references.images[: references.n_train])

    def generate(prompts: list[str], what: str, w: float, seed: int) -> Tensor:
        path = samples.samples_file(folder, model, steps, what, w, seed)
        return samples.generate_samples(pipe, prompts, w, seed, steps, path, batch)

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
        for name, network in networks.items():
            cache = config.data.cache
            found = feature_distances(name, references, images, cache, network)
            result.distances[name] = found
        if clip is not None and verifier is not None:
            result = replace(result, clip=clip_score(clip, verifier, references, images))
        if scorer is not None:
            result = replace(result, alignment=alignment_score(scorer, references, images))
        by_seed[seed] = result
        images = generate(open_prompts, f"free-{digest(open_prompts)[:8]}", w, seed)
        copies[seed] = image_quality.copy_rate(images, references.train, threshold)
        if seed == seeds[0]:
            samples.save_contact_sheet(images, open_prompts, folder / IMAGES_FOLDER / "free.png")
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
        choice=results.Choice(choose_seed, len(some), by_w),
        references=reference_metrics(extractor, references, threshold),
        **parts,
    )
