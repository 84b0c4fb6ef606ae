"""A dataset of coloured shapes, a run around an untrained network, and emoji by caption."""

from pathlib import Path

import numpy as np
import torch
from datasets_on_disk import render_emoji
from tiny import tiny_pipeline

from pipeline.config import Config, DataConfig
from pipeline.data.emoji import catalogue, writer


def shapes_dataset(folder: Path) -> Path:
    """Write 28 coloured shapes of 16 x 16, six of them held out, as an image folder."""
    return writer.write_emoji(folder, "shapes", size=16)


def untrained_run(folder: Path, dataset: Path) -> Path:
    """Write a finished run on a dataset around a tiny network that was never trained."""
    pipe = tiny_pipeline(sample_size=16, caption_length=8, caption_dropout=0.1)
    pipe.save_pretrained(folder / "pipeline")
    data = DataConfig(source=str(dataset), resolution=16, cache=str(dataset.parent / "cache"))
    (folder / "config.yaml").write_text(Config(name="tiny", data=data).to_yaml())
    return folder


def emoji_images(captions: list[str], size: int = 72) -> torch.Tensor:
    """Return emoji by their captions, uint8 (N, 3, size, size)."""
    paths = {emoji.caption: emoji.path for emoji in catalogue.catalogue()}
    images = [np.array(render_emoji(paths[caption], size)) for caption in captions]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return standard normal values in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
