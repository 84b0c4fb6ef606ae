"""What a run leaves, and who can read it."""

import json
import re
import shutil
import time
from os import utime

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from finetuning import quiet
from PIL import Image
from safetensors.torch import load_file
from training_runs import UNET_FILE, log, same, weights

from pipeline import TextToImagePipeline
from pipeline.config import load_file as load_config
from pipeline.hub import client, export, model_card
from pipeline.models import loading, locate
from pipeline.runs.folder import RunFolder
from pipeline.serving.model_store import ModelStore
from pipeline.training.task import TrainingTask


def sample(pipe):
    return np.asarray(quiet(pipe)("red", w=1.0, seed=0, num_inference_steps=3).images[0])


def test_train_leaves_a_pipeline_card_samples_and_log(finished):
    run, done = finished
    assert (run / "pipeline" / "model_index.json").exists()
    assert (run / "pipeline" / "scheduler" / "scheduler_config.json").exists()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4", "6"]
    samples = sorted((run / "samples").iterdir())
    assert [path.name for path in samples] == ["000004.png", "000006.png"]
    assert Image.open(samples[-1]).size == (2 * 16, 2 * 16)
    assert (run / "figures" / "training.png").stat().st_size > 5000
    assert "library_name: diffusers" in (run / "README.md").read_text()
    assert [line["step"] for line in log(run)] == [1, 2, 3, 3, 4, 5, 6, 6]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            assert min(line["grad_norm"], line["images_per_s"], line["memory_gib"]) > 0
    shown = re.findall(r"loss ([\d.]+), gradient \S+, [\d.]+ images/s, ", done.stderr)[-1]
    assert shown == f"{lines[-2]['loss']:.4f}"
    assert "direct-jump sample" in done.stdout
    count = sum(value.numel() for value in weights(run).values())
    assert f"{count:,} weights to train; a new run" in done.stdout


def test_train_saves_a_pipeline_and_a_loadable_unet(finished):
    run, _ = finished
    folder = run / "pipeline"
    pipe = quiet(TextToImagePipeline.from_pretrained(folder, use_safetensors=True))
    assert pipe(["red"], seed=0, num_inference_steps=2).images[0].size == (16, 16)
    assert pipe.config.caption_dropout == 0.1
    task = TrainingTask.build(load_config(run / "config.yaml"), torch.device("cpu"))
    for captions, states in (
        (task.images.captions, task.caption_states),
        ([""], task.empty_caption),
        (task.held_out.captions, task.held_out_states),
    ):
        assert torch.allclose(pipe.encode_prompt(captions)[0], states, atol=1e-4)
    checkpoint = run / "checkpoints" / "6" / "unet"
    last = UNet2DConditionModel.from_pretrained(checkpoint, use_safetensors=True).state_dict()
    average = weights(run)
    assert any(not average[name].equal(value) for name, value in last.items())


def test_load_checkpoint_uses_the_averaged_weights(finished):
    run, _ = finished
    pipe = loading.load_checkpoint(RunFolder(run), 6)
    assert same(pipe.unet.state_dict(), weights(run))
    assert np.array_equal(sample(pipe), sample(loading.load_pipeline(run)))


def test_export_writes_a_small_model_that_samples(finished, tmp_path):
    exported = export.export(finished[0], tmp_path / "new" / "exported")
    index = json.loads((exported / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert not list(exported.rglob("*.py"))
    assert not list(exported.rglob("*.bin"))
    stored = load_file(exported / UNET_FILE)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    for name, value in weights(finished[0]).items():
        torch.testing.assert_close(stored[name].float(), value, rtol=2**-8, atol=0)
    card = (exported / "README.md").read_text()
    assert "license: other" in card
    assert str(exported) in card
    assert "images/samples.png" in card
    assert "trust_remote_code" not in card
    assert "trust_remote_code" in str(model_card.read_card(exported, "user/name"))
    (exported / "notes.md").write_text("## Looked at\n\nreds are red")
    model_card.refresh_card(exported)
    assert "## Looked at\n\nreds are red\n\n## Limits" in (exported / "README.md").read_text()
    images = [sample(loading.load_pipeline(model)).astype(int) for model in (exported, finished[0])]
    assert abs(images[0] - images[1]).max() < 30  # bf16 weights sample about the same
    with pytest.raises(client.HubError, match=exported.name):
        export.export(finished[0], exported)
    with pytest.raises(client.HubError, match=tmp_path.name):
        export.export(tmp_path, tmp_path / "more")


def test_model_store_follows_a_run_in_progress(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("pipeline"))
    store = ModelStore(run)
    assert store.follows
    assert store.steps() == [2, 4, 6]
    assert store.session().name == "run at step 6"
    assert store.session(3).name in ("run at step 2", "run at step 4")
    states = [store.session(step).trained.unet.state_dict() for step in (2, 6)]
    assert not same(*states)
    shutil.rmtree(run / "checkpoints" / "6")
    assert store.session().name == "run at step 4"
    (run / "checkpoints" / "2" / "unet" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelStore(run).session(2)


def test_model_store_follows_a_resumed_run(finished, tmp_path):
    """The pipeline of its first end is still there."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    assert not ModelStore(run).follows
    (run / "README.md").unlink()  # as the second training does
    assert ModelStore(run).steps() == [2, 4, 6]


def test_default_model_is_the_newest_run(finished, tmp_path):
    assert locate.default_model(tmp_path, tmp_path / "exported") is None
    for name, age in {"old": 100, "new": 1}.items():
        shutil.copytree(finished[0], tmp_path / name)
        then = time.time() - age
        utime(tmp_path / name / "metrics.jsonl", (then, then))
    (tmp_path / "empty").mkdir()
    assert locate.default_model(tmp_path) == tmp_path / "new"
    (tmp_path / "new" / "README.md").unlink()
    assert locate.default_model(tmp_path) == tmp_path / "new"
    assert locate.default_model(tmp_path, finished=True) == tmp_path / "old"
