"""The shipped model is small, complete and honestly described, and a fresh clone loads it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from pipeline import TextToImagePipeline, load_pipeline
from pipeline import config as config_module
from pipeline.diffusion.guidance import InputError
from pipeline.hub import model_card
from pipeline.models import locate

SHIPPED = Path(__file__).parents[2] / locate.SHIPPED_MODEL


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline(SHIPPED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_export_fits_in_a_git_repository():
    ignored = {"evaluation", "search"}  # results of commands, which git leaves out
    paths = [path for path in SHIPPED.rglob("*") if ignored.isdisjoint(path.parts)]
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    assert max(sizes.values()) < 9.5e6 and sum(sizes.values()) < 42e6
    weights = [path for path in sizes if path.suffix == ".safetensors"]
    assert sum(sizes[path] for path in weights) < 40e6
    assert not [path for path in sizes if path.suffix in (".py", ".bin", ".pt")]
    shards = [path for path in weights if path.parent.name == "unet"]
    dtypes = {value.dtype for path in shards for value in load_file(path).values()}
    assert dtypes == {torch.bfloat16}


def test_default_model_of_a_fresh_clone_is_the_shipped_one(tmp_path):
    places = {"root": tmp_path, "pinned": tmp_path / "none"}
    assert locate.default_model(shipped=SHIPPED, **places) == SHIPPED


def test_load_pipeline_of_the_shipped_model_follows_prompts(pipe):
    red, blue = (
        np.asarray(pipe(prompt, seed=0, num_inference_steps=10).images[0]).astype(float)
        for prompt in ("red heart", "blue heart")
    )
    red_middle, blue_middle = (image[24:40, 24:40].mean((0, 1)) for image in (red, blue))
    assert red_middle[0] > red_middle[2] + 60 and blue_middle[2] > blue_middle[0] + 60
    assert red[0, 0].min() > 240, "on white"


def test_from_pretrained_alone_lacks_the_text_encoder():
    bare = TextToImagePipeline.from_pretrained(SHIPPED, use_safetensors=True)
    with pytest.raises(InputError, match="load_pipeline"):
        bare("red heart")


def test_refresh_card_would_not_change_the_shipped_card():
    text = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert text == str(model_card.read_card(SHIPPED, locate.SHIPPED_MODEL))


def test_card_of_the_shipped_model_has_its_facts():
    card = ModelCard((SHIPPED / "README.md").read_text())
    assert card.data.license == "cc-by-4.0" and "Twemoji" in card.text
    assert f"load_pipeline('{locate.SHIPPED_MODEL}')" in card.text
    config = config_module.load_file(SHIPPED / "config.yaml")
    assert f"{config.train.steps} steps of {config.train.batch_size} images" in card.text
    for name in ("samples", "free", "strips", "training"):
        assert f"({model_card.IMAGES_FOLDER}/{name}.png)" in card.text
    metrics = json.loads((SHIPPED / "metrics.json").read_text())
    (seed,) = metrics["by_seed"].values()
    for split in ("train", "held_out"):
        values = {r.metric_value for r in card.data.eval_results if r.dataset_split == split}
        for at in (1, 5):
            assert round(seed[split][f"recall@{at}"]["value"], 4) in values
