"""The model that the repository ships: small, whole, honest, and drawn with by a fresh clone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from pipeline import TextToImagePipeline
from pipeline import config as config_module
from pipeline.diffusion.guidance import InputError
from pipeline.models import loading, locate

SHIPPED = Path(__file__).parents[2] / "pretrained" / "emoji"
METRICS = json.loads((SHIPPED / "metrics.json").read_text())


@pytest.fixture(scope="module")
def pipe():
    pipe = loading.load_pipeline(SHIPPED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_fits_in_a_repository():
    made = {"evaluation", "search"}  # by who measures it: git leaves them out
    files = [path for path in SHIPPED.rglob("*") if path.is_file() and made.isdisjoint(path.parts)]
    sizes = {path.relative_to(SHIPPED): path.stat().st_size for path in files}
    assert max(sizes.values()) < 9.5e6 and sum(sizes.values()) < 42e6
    assert sum(size for path, size in sizes.items() if path.suffix == ".safetensors") < 40e6
    assert not [path for path in files if path.suffix in (".py", ".bin", ".pt")]
    shards = [
        path for path in files if path.parent.name == "unet" and path.suffix == ".safetensors"
    ]
    assert {value.dtype for path in shards for value in load_file(path).values()} == {
        torch.bfloat16
    }


def test_a_fresh_clone_draws_with_it_where_no_run_is_newer(tmp_path, pipe):
    assert locate.default_model(root=tmp_path, shipped=SHIPPED, pinned=tmp_path / "none") == SHIPPED
    red, blue = (
        np.asarray(pipe(prompt, seed=0, num_inference_steps=10).images[0]).astype(float)
        for prompt in ("red heart", "blue heart")
    )
    middle = [picture[24:40, 24:40].mean((0, 1)) for picture in (red, blue)]
    assert middle[0][0] > middle[0][2] + 60 and middle[1][2] > middle[1][0] + 60
    assert red[0, 0].min() > 240, "on white"


def test_without_our_loader_one_sentence_says_what_is_missing():
    bare = TextToImagePipeline.from_pretrained(SHIPPED, use_safetensors=True)
    with pytest.raises(InputError, match=r"no text encoder .* load it with pipeline\.hub\.load"):
        bare("red heart")


def test_its_card_says_what_was_measured_and_whose_the_pictures_are():
    card = ModelCard((SHIPPED / "README.md").read_text())
    assert card.data.license == "cc-by-4.0" and "Twemoji" in card.text
    shares = {result.metric_name: result.metric_value for result in card.data.eval_results}
    (seed,) = METRICS["by_seed"].values()
    for split, words in (("train", "training captions"), ("held_out", "held-out combinations")):
        measured = seed[split]["first"]["share"]
        assert any(
            value == round(measured, 4) and split.replace("_", "-") in name
            for name, value in shares.items()
        )
        assert f"{words}: first {measured:.1%}" in card.text
    assert "hub.load('pretrained/emoji')" in card.text
    config = config_module.load_file(SHIPPED / "config.yaml")
    assert f"{config.train.steps} steps of {config.train.batch_size} images" in card.text
    assert all(
        f"images/{name}.png" in card.text for name in ("samples", "free", "strips", "training")
    )
