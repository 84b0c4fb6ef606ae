"""`data.keep`: a share of every batch comes from a second dataset."""

import shutil

import pytest
import torch
from PIL import Image
from training_runs import check_refused, killed_after, same, train, weights, write_images

from pipeline.config import ConfigError, load
from pipeline.data.latent_cache import LatentCache
from pipeline.training.task import TrainingTask


@pytest.fixture
def second(tmp_path):
    """Four squares in an image folder, with captions of their own."""
    (tmp_path / "second").mkdir()
    return write_images(tmp_path / "second", ("red", "white", "black", "grey"), 60, edge=2)


def keep(second, share=0.25):
    return ("--data.keep", f"{{source: {second}, share: {share}}}")


@pytest.mark.parametrize("model", ["pixels", "latents"])
def test_get_batch_takes_a_share_from_the_kept_images(config, tuning, second, model):
    file = config if model == "pixels" else tuning
    settings, _ = load(["--config", str(file), *keep(second, 0.5)])
    task = TrainingTask.build(settings, torch.device("cpu"))
    assert isinstance(task.latents, LatentCache) == (model == "latents")
    own = len(task.images) - 4
    rows = torch.cat([task.rows(step, range(4)) for step in range(2 * own)]).view(-1, 4)
    assert (rows < own).tolist() == [[True, True, False, False]] * 2 * own
    assert sorted(rows[:2, 2:].flatten().tolist()) == list(range(own, own + 4))
    batch = task.get_batch(0, torch.arange(4))
    captions = task.images.caption_rows(0, 0, range(4), rows[0])
    assert torch.equal(batch.captions, task.caption_states[captions])
    if model == "pixels":
        assert torch.equal(batch.x_0, task.encode_images(task.images, rows[0]))
    assert task.images.captions[own:] == ["black", "grey", "red", "white"]


@pytest.mark.slow
def test_resume_with_keep_ends_in_the_same_bytes(config, second, tmp_path):
    output = train(config, tmp_path / "through", *keep(second)).stdout
    assert f"{second}/train: 4 of 4 images usable" in output
    through = tmp_path / "through" / "tiny"
    run = killed_after(2, through, tmp_path)
    other_share = train(config, tmp_path, *keep(second, 0.5), check=False)
    check_refused(other_share, "data.keep.share", 0.25, 0.5)
    check_refused(train(config, tmp_path, check=False), "data.keep.source", second)
    shutil.copytree(second, tmp_path / "before")
    Image.new("RGB", (16, 16), "maroon").save(second / "train" / "grey.png")
    check_refused(train(config, tmp_path, *keep(second), check=False), "fingerprint", second)
    shutil.rmtree(second)
    shutil.move(tmp_path / "before", second)
    assert "resuming from step 2" in train(config, tmp_path, *keep(second)).stdout
    assert same(weights(run), weights(through))


@pytest.mark.parametrize(
    "more", [("--data.keep", "{source: x, share: 0.001}"), ("--data.streaming", "true")]
)
def test_load_refuses_keep_without_effect(more):
    with pytest.raises(ConfigError, match=r"data\.keep"):
        load(["--data.keep", "{source: x}", *more])
