"""Generate samples for captions, and cache them and statistics of real images on disk."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from pipeline.data.fingerprint import digest, weights_digest
from pipeline.data.image_ops import as_uint8
from pipeline.data.map_cache import cache_file
from pipeline.diffusion.guidance import Weight
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation.reference_set import ReferenceSet
from pipeline.hardware import has_bf16

SEED_STRIDE = 1_000_000  # image i of seed s uses seed s * SEED_STRIDE + i, so seeds share no noise
FLOAT32_SUFFIX = "-float32"  # of an identity, where samples are not computed in bf16


def generate_batch(pipe: TextToImagePipeline, prompts: list[str], **call) -> Tensor:
    """Return uint8 images (B, 3, H, W) of one call, in bf16 where training would use it."""
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=has_bf16(pipe.device)):
        output: Any = pipe(prompts, output_type="pt", **call)
    # The decoder of an AutoencoderKL returns them channels last.
    return as_uint8(output.images.cpu()).contiguous()


def generate_samples(
    pipe: TextToImagePipeline,
    prompts: list[str],
    w: Weight,
    seed: int,
    steps: int,
    path: Path,
    batch: int,
    advance: Callable[[int], object] | None = None,
    **call,
) -> Tensor:
    """Return uint8 images (N, 3, H, W), prompt i by its own seed; cached in `path`.

    advance(n) is called after every n images and replaces the progress bar.
    """

    def compute() -> dict[str, Tensor]:
        starts = range(0, len(prompts), batch)
        quiet = advance is not None
        parts = []
        for start in tqdm(starts, path.stem, unit="batch", dynamic_ncols=True, disable=quiet):
            options = {"w": w, "seed": seed * SEED_STRIDE + start, "num_inference_steps": steps}
            part = generate_batch(pipe, prompts[start : start + batch], **call, **options)
            parts.append(part)
            if advance is not None:
                advance(len(part))
        return {"images": torch.cat(parts)}

    return cached_tensors(path, compute)["images"]


def cached_tensors(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a file, or compute and save them; a killed process leaves no part."""
    if path.is_file():
        return load_file(path)
    tensors = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    save_file(tensors, partial)
    partial.rename(path)
    return tensors


def cached_statistic(
    cache: str, what: str, network: str, images: Tensor, compute: Callable[[], Tensor]
) -> Tensor:
    """Return a statistic of real images by a network, computed once for the same pixels."""
    pixels = hashlib.blake2b(images.numpy().tobytes(), digest_size=8).hexdigest()
    key = digest(tuple(images.shape), pixels)
    path = cache_file(cache, f"{what}-{network}", key).with_suffix(".safetensors")
    return cached_tensors(path, lambda: {what: compute()})[what]


def samples_file(folder: Path, model: str, steps: int, what: str, w: float, seed: int) -> Path:
    """Return the file that caches the images of one call."""
    return folder / "evaluation" / f"{model}-{steps}" / f"{what}-w{w:g}-seed{seed}.safetensors"


def samples_identity(pipe: TextToImagePipeline, references: ReferenceSet) -> str:
    """Return a digest of what samples depend on beside the call: model, captions, precision."""
    networks = {
        name: weights_digest(part)
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }
    config = pipe.scheduler.config.items()
    process = sorted((name, str(value)) for name, value in config if not name.startswith("_"))
    scheduler = type(pipe.scheduler).__name__
    model = digest(sorted(networks.items()), scheduler, process, pipe.config["caption_length"])
    precision = "" if has_bf16(pipe.device) else FLOAT32_SUFFIX
    return f"{model[:8]}-{digest(references.captions)[:8]}{precision}"


def save_contact_sheet(images: Tensor, prompts: list[str], path: Path, columns: int = 5) -> None:
    """Save uint8 images (N, 3, H, W) as one image, each above its prompt."""
    rows = math.ceil(len(prompts) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, image, prompt in zip(axes, images, prompts, strict=False):
        ax.imshow(image.permute(1, 2, 0).numpy())
        ax.set_xlabel(prompt, fontsize=8)
    for ax in figure.axes:
        ax.set(xticks=[], yticks=[], frame_on=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
