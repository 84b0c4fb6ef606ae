"""Generate samples for captions and cache them on disk."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from pipeline.data.fingerprint import digest, weights_digest
from pipeline.data.image_ops import as_uint8
from pipeline.data.map_cache import cache_file
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation.reference_set import ReferenceSet
from pipeline.hardware import has_bf16

SEED_STRIDE = 1_000_000  # image i of seed s is drawn from s * STRIDE + i: no two seeds share a draw
FLOAT32_SUFFIX = "-float32"  # at the end of an identity, where drawings are not computed in bf16


def generate_batch(pipe: TextToImagePipeline, prompts: list[str], **call) -> Tensor:
    """Pictures uint8 (B, 3, H, W) of one call; the network computes in bf16 where the machine does, as in training."""
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=has_bf16(pipe.device)):
        images = pipe(prompts, output_type="pt", **call).images
    return as_uint8(images.cpu())


def generate_samples(
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
            options = call | {
                "w": w,
                "seed": seed * SEED_STRIDE + start,
                "num_inference_steps": steps,
            }
            parts.append(generate_batch(pipe, prompts[start : start + batch], **options))
            if advance is not None:
                advance(len(parts[-1]))
        return {"images": torch.cat(parts)}

    return cached_tensors(path, compute)["images"]


def cached_statistic(
    cache: str, what: str, network: str, images: Tensor, compute: Callable[[], Tensor]
) -> Tensor:
    """A statistic of real pictures by a network, computed once for the same pixels."""
    key = digest(
        tuple(images.shape), hashlib.blake2b(images.numpy().tobytes(), digest_size=8).hexdigest()
    )
    path = Path(cache_file(cache, f"{what}-{network}", key)).with_suffix(".safetensors")
    return cached_tensors(path, lambda: {what: compute()})[what]


def samples_file(folder: Path, model: str, steps: int, what: str, w: float, seed: int) -> Path:
    """Where pictures of one call are kept."""
    return folder / "evaluation" / f"{model}-{steps}" / f"{what}-w{w:g}-seed{seed}.safetensors"


def samples_identity(pipe: TextToImagePipeline, bank: ReferenceSet) -> str:
    """What drawings of a bank's captions depend on beside the call: the pipeline's networks and settings, and the captions."""
    networks = {
        name: weights_digest(part)
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
    rounded = "" if has_bf16(pipe.device) else FLOAT32_SUFFIX  # as `drawn` computes
    return f"{drawn_by[:8]}-{digest(bank.captions)[:8]}{rounded}"


def save_contact_sheet(images: Tensor, prompts: list[str], path: Path, columns: int = 5) -> None:
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


# ---- kept


def cached_tensors(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from a file, or computed and kept there for the next time; a kill leaves the file whole or absent."""
    if path.is_file():
        return load_file(path)
    found, new = compute(), path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, new)
    new.rename(path)
    return found
