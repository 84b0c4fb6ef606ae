"""Write the card of a trained autoencoder, with its reconstructions and its PSNR."""

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from torch import Tensor

from pipeline.config import AutoencoderConfig
from pipeline.data.dataset import CaptionedImages
from pipeline.data.emoji.embedded import attribution_of
from pipeline.data.latent_cache import restore_images
from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion.autoencoder import ConvAutoencoder
from pipeline.hub.model_card import (
    TRAINING_FACTS,
    card_license,
    training_facts,
)
from pipeline.models.build import parameter_count
from pipeline.runs.files import replace_text
from pipeline.runs.folder import IMAGES_FOLDER, RunFolder
from pipeline.runs.results import Mean

TEMPLATE = Path(__file__).with_name("autoencoder_card_template.md")
SHOWN_IMAGES = 8


def write_autoencoder_card(
    config: AutoencoderConfig,
    run: RunFolder,
    vae: ConvAutoencoder,
    images: CaptionedImages,
    held_out: CaptionedImages | None,
    results: dict[str, Mean],
    seconds: float,
) -> None:
    """Write the card of a finished run, its figure and its training.json.

    results: the PSNR in dB of images by what they are.
    """
    shown = images if held_out is None else held_out
    rows = evenly_spaced(SHOWN_IMAGES, len(shown))
    (run.folder / IMAGES_FOLDER).mkdir(exist_ok=True)
    figure = run.folder / IMAGES_FOLDER / "reconstructions.png"
    plot_reconstructions(vae, shown.images[rows], figure)
    facts = training_facts(str(images.report), seconds) | {
        "psnr": {name: vars(value) for name, value in results.items()},
        "weights": parameter_count(list(vae.parameters())),
    }
    replace_text(run.folder / TRAINING_FACTS, json.dumps(facts, indent=1))
    refresh_autoencoder_card(run.folder, config, str(run.autoencoder))


def refresh_autoencoder_card(folder: Path, config: AutoencoderConfig, model: str) -> None:
    """Write the card of a folder from its training.json; model: where the card loads it from."""
    facts = json.loads((folder / TRAINING_FACTS).read_text(encoding="utf-8"))
    source = config.data.source
    data = ModelCardData(
        license=card_license(bool(attribution_of(source)), None, None),
        library_name="diffusers",
        tags=["autoencoder", "image-feature-extraction"],
        model_name=config.name,
    )
    card = ModelCard.from_template(
        data,
        str(TEMPLATE),
        config=config,
        facts=facts,
        model=repr(model),
        folder=IMAGES_FOLDER,
        attribution=attribution_of(source),
    )
    replace_text(folder / "README.md", str(card))


def plot_reconstructions(vae: ConvAutoencoder, images: Tensor, path: Path) -> None:
    """Save uint8 images (N, 3, H, W) in a row, and below what the autoencoder makes of them."""
    rows = [images, restore_images(vae, images)]
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)
