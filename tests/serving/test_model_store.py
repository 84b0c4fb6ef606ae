"""The models of a demo: a saved pipeline, or the checkpoints of a running training."""

import gc
import shutil
import weakref

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from serving_data import last, pixels
from tiny import tiny_pipeline, tiny_text, tiny_unet

import app
from pipeline.config import Config, DataConfig, ModelConfig
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.models import ema, loading
from pipeline.runs.folder import RunFolder
from pipeline.runs.state_files import save_state
from pipeline.serving import model_store
from pipeline.serving.model_store import ModelStore
from pipeline.serving.requests import Request


def test_session_of_a_saved_pipeline_is_that_pipeline(tmp_path):
    tiny_pipeline(w=1.5, caption_length=8).save_pretrained(tmp_path / "model")
    store = ModelStore(tmp_path / "model")
    assert not store.follows
    assert store.steps() == []
    assert store.name == "model"
    assert store.session() is store.session(7)
    images = last(store.session().create(Request("red heart", w=1.5, steps=2, seed=3))).images
    expected = tiny_pipeline()("red heart", w=1.5, num_inference_steps=2, seed=3).images
    assert np.array_equal(pixels(images), pixels(expected))


def test_session_replaces_a_stock_scheduler_by_ours(tmp_path):
    """PNDM has no eta, no posterior and no single steps. Ours takes over its betas."""
    betas = {"beta_start": 0.001, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    stock = PNDMScheduler(skip_prk_steps=True, **betas)
    tiny_pipeline(caption_length=8, scheduler=stock).save_pretrained(tmp_path / "model")
    session = ModelStore(tmp_path / "model").session()
    assert np.allclose(session.schedule_curves()["ᾱ_t (4)"], stock.alphas_cumprod, rtol=1e-5)
    assert last(session.create(Request("red heart", steps=2, eta=0.5))).images
    assert "(1) chain" in session.forward(torch.zeros(1, 3, 8, 8), 3, 0)


def test_session_of_a_model_with_few_timesteps(data, tmp_path):
    """Its sample size is a pair, as some networks have it."""
    scheduler = DDPMScheduler(num_train_timesteps=20)
    pipe = tiny_pipeline(caption_length=8, scheduler=scheduler)
    pipe.unet.register_to_config(sample_size=(8, 8))
    pipe.save_pretrained(tmp_path / "model")
    session = ModelStore(tmp_path / "model").session()
    assert session.data.resolution == 8
    assert session.T == 20
    (tmp_path / "model" / "config.yaml").write_text(Config(data=data).to_yaml())
    blocks = app.build_demo(ModelStore(tmp_path / "model")).blocks.values()
    sliders = [block for block in blocks if getattr(block, "label", "") == "Steps"]
    assert [(slider.value, slider.maximum) for slider in sliders] == [(20, 20)] * 3


def test_session_of_a_model_without_its_dataset_uses_emoji(tmp_path):
    tiny_pipeline(caption_length=8).save_pretrained(tmp_path / "model")
    config = Config(data=DataConfig(source=str(tmp_path / "gone"), resolution=8))
    (tmp_path / "model" / "config.yaml").write_text(config.to_yaml())
    assert ModelStore(tmp_path / "model").session().data == DataConfig(resolution=8)


def test_card_is_not_that_of_an_unrelated_folder_above(tmp_path):
    tiny_pipeline(caption_length=8).save_pretrained(tmp_path / "mine")
    (tmp_path / "README.md").write_text("# the run's")
    assert "# mine" in ModelStore(tmp_path / "mine").card()
    (tmp_path / "config.yaml").write_text("")
    assert ModelStore(tmp_path / "mine").card().startswith("# the run's")


def test_session_reports_a_missing_model(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / "nothing")):
        ModelStore(tmp_path / "nothing").session()


def test_load_pipeline_adds_the_text_encoder_of_the_settings(tmp_path):
    pipe = tiny_pipeline(caption_length=8)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="red heart.*prompt_embeds"):
        loading.load_pipeline(tmp_path / "model")("red heart")
    (tmp_path / "model" / "config.yaml").write_text(Config().to_yaml())
    # The embedded all-MiniLM-L6-v2.
    encoder = loading.load_pipeline(tmp_path / "model").text_encoder
    assert encoder.config.hidden_size == 384


# ---- a running training


def save_checkpoints(run, *steps, keep=9):
    """Save checkpoints as training does, of other weights at each step."""
    for step in steps:
        network = tiny_unet(seed=step)
        state = {"ema": ema.build_ema(network, 0.99).state_dict()}

        def write(folder, network=network, state=state):
            network.save_pretrained(folder / "unet")
            save_state(folder, "trainer", state)

        run.save(step, write, keep)


@pytest.fixture
def run(data, tmp_path):
    """A run with checkpoints at steps 10 and 20."""
    run = RunFolder(tmp_path / "run")
    run.create()
    for part in tiny_text(length=8):
        part.save_pretrained(tmp_path / "encoder")
    model = ModelConfig(text_encoder=str(tmp_path / "encoder"))
    run.config.write_text(Config(name="run", model=model, data=data).to_yaml())
    save_checkpoints(run, 10, 20)
    return run


def before_first_load(monkeypatch, action):
    """Call `action` before the store loads its first checkpoint from now on."""
    load = model_store.load_checkpoint
    todo = [action]

    def load_after_action(*args):
        if todo:
            todo.pop()()
        return load(*args)

    monkeypatch.setattr(model_store, "load_checkpoint", load_after_action)


def test_session_releases_a_network_before_the_next_loads(run, monkeypatch):
    store = ModelStore(run.folder)
    demo = app.build_demo(store)
    network = weakref.ref(store.session().trained)
    assert network() is not None
    assert store.session().name == "run at step 20"
    alive = []

    def check():
        gc.collect()
        alive.append(network() is not None)

    before_first_load(monkeypatch, check)
    assert store.session(10).name == "run at step 10"
    assert store.session(12) is store.session(10)
    assert alive == [False]
    assert demo.fns, "the demo's functions hold no network either"


def test_session_replaces_a_checkpoint_deleted_meanwhile(run, monkeypatch):
    store = ModelStore(run.folder)
    before_first_load(monkeypatch, lambda: save_checkpoints(run, 30, keep=1))
    assert store.session(10).name == "run at step 30"
    shutil.rmtree(run.checkpoints)
    for step in (None, 30):
        with pytest.raises(InputError, match="^run has no checkpoint"):
            store.session(step)


def test_session_replaces_a_corrupt_newest_checkpoint(run, caplog):
    (run.checkpoints / "20" / "unet" / "config.json").write_text("{}")
    store = ModelStore(run.folder)
    assert store.session().name == store.session(20).name == "run at step 10"
    assert "config.json" in caplog.text
    (run.checkpoints / "10" / "trainer.json").unlink()
    with pytest.raises(InputError, match=r"run/checkpoints/10 .*trainer\.json") as refused:
        store.session()
    assert str(run.folder) not in str(refused.value)
