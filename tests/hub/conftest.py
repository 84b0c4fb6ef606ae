"""One Hub, one account and one model on it for all tests of sharing.

The processes take seconds to start, so they live as long as the test session. Tests use
repositories of their own.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hub_stub import HubStub
from hub_world import CANARY, REQUEST, ROOT, Process, folder_files, make_adapter_run
from PIL import Image
from tiny import WIDTH, tiny_autoencoder, tiny_pipeline, tiny_text, tiny_unet

from pipeline import TextToImagePipeline
from pipeline.config import Config, DataConfig, ModelConfig, SampleConfig
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.hub import model_card
from pipeline.models import loading
from pipeline.runs.folder import RunFolder

OWNER_IMPORTS = """
import os, numpy as np
from pathlib import Path
from huggingface_hub import constants, snapshot_download
from pipeline import TextToImagePipeline, load_pipeline
from pipeline.__main__ import main
from pipeline.config import Config, HubConfig, ModelConfig, TrainConfig
from pipeline.hub import client
from pipeline.hub.export import pull
from pipeline.hub.push import check_push, publish, push
from pipeline.hub.space import push_space
from pipeline.runs.folder import RunFolder
client.RETRY_WAITS = (0.1, 0.1, 0.1)
"""
PROPORTION = {"value": 0.25, "interval": [0.2, 0.3], "k": 100, "n": 400}
RECALL = {"recall@1": PROPORTION, "recall@5": PROPORTION}
METRICS = {
    "model": "0123-4567",
    "w": 1.0,
    "num_inference_steps": 50,
    "seeds": [0],
    "by_seed": {"0": {"train": RECALL, "seam_ratio": 1.0}},
    "free_prompt_copies": {"0": PROPORTION | {"threshold": 0.1}},
    "references": {
        "images": 425,
        "captions": 425,
        "chance": {"recall@1": 0.01, "recall@5": 0.05},
        "ceiling": RECALL,
    },
}


@pytest.fixture(scope="session")
def metrics():
    """Metrics as the evaluation writes them, with a recall of 25 %."""
    return METRICS


@pytest.fixture(scope="session")
def hub():
    """The Hub of these tests, with one account."""
    with HubStub(token=CANARY) as server:
        yield server


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="session")
def owner(hub, place):
    """A process with this package, logged in."""
    process = Process(hub.env(place / "owner-home", PYTHONPATH=str(ROOT)), place / "owner")
    process(OWNER_IMPORTS)
    yield process
    process.close()


@pytest.fixture(scope="session")
def run(place):
    """A finished run with patches, whitening, images and metrics, and files that are not shared."""
    run = RunFolder(place / "runs" / "tiny")
    run.create()
    scheduler = DDPMScheduler(
        beta_schedule="sigmoid", prediction_type="sample", timestep_spacing="trailing"
    )
    pipe = tiny_pipeline(
        patch_size=2, scheduler=scheduler, w=1.0, caption_length=8, caption_dropout=0.1
    )
    pipe.register_modules(whitening=CaptionWhitening(WIDTH))
    pipe.save_pretrained(run.pipeline)
    config = Config(
        name="tiny",
        output=str(place / "runs"),
        data=DataConfig("emoji-small", resolution=16),
        sample=SampleConfig(prompts=("red heart", "a: |\n---\n"), w=(0.0, 1.0), default_w=1.0),
    )
    run.config.write_text(config.to_yaml())
    run.log(step=6, loss=0.5)
    samples = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    Image.fromarray(samples).save(run.samples / "000006.png")
    Image.new("RGB", (8, 8)).save(run.figures / "training.png")
    (run.checkpoints / "optimizer.safetensors").write_bytes(b"secret")
    (run.pipeline / "notes.py").write_text("private = 1")
    (run.pipeline / "unet" / "optimizer.bin").write_bytes(b"secret")
    images = SimpleNamespace(report="emoji-small: 425 of 425 images usable")
    model_card.write_card(config, run, pipe, images, 60.0)
    (run.folder / "metrics.json").write_text(json.dumps(METRICS))
    model_card.refresh_card(run.folder)
    return run


@pytest.fixture(scope="session")
def expected(run):
    """The image that the run's pipeline samples here, (1, H, W, 3)."""
    pipe = loading.load_from_folder(run.pipeline)
    pipe.set_progress_bar_config(disable=True)
    return eval(f"pipe({REQUEST}).images", {"pipe": pipe})


@pytest.fixture(scope="session")
def pushed(hub, owner, run):
    """The name of that run on the Hub."""
    code, output = owner.command("push", run.folder, "tester/tiny")
    assert code == 0, output
    assert output.endswith("/tester/tiny")
    return "tester/tiny"


@pytest.fixture(scope="session")
def outsider(hub, place, pushed):
    """A process without this package; `pipe` is the pushed pipeline, trusted at the second try."""
    process = Process(hub.env(place / "outsider-home"), place / "outsider", "-P")
    process(f"""
import importlib.util, sys, diffusers, numpy as np, torch
from diffusers import DiffusionPipeline
# An editable installation finds this package from anywhere.
editable = [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("__editable__")]
sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in editable]
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
assert importlib.util.find_spec("pipeline") is None
try:
    DiffusionPipeline.from_pretrained({pushed!r})
except ValueError as error:
    refusal = str(error)
untrusted = [name for name in sys.modules if name.startswith("diffusers_modules")]
options = {{"trust_remote_code": True, "use_safetensors": True}}
pipe = DiffusionPipeline.from_pretrained({pushed!r}, **options)""")
    yield process
    process.close()


@pytest.fixture(scope="session")
def stable(owner, place):
    """The name on the Hub of a tiny Stable Diffusion; its folder is `stable`."""
    tokenizer, encoder = tiny_text("clip")
    scheduler = DDPMScheduler(clip_sample=False, steps_offset=1)
    unet = tiny_unet(4, text=False)
    pipe = TextToImagePipeline(unet, scheduler, encoder, tokenizer, tiny_autoencoder(), w=3.0)
    pipe.save_pretrained(place / "stable")
    owner(f"push({str(place / 'stable')!r}, 'tester/stable')")
    return "tester/stable"


@pytest.fixture(scope="session")
def half(hub, place):
    """The name on the Hub of a model with fp16 weights only; its folder is `half`."""
    tiny_pipeline(w=1.0).save_pretrained(place / "half", variant="fp16")
    hub.add("tester/half", folder_files(place / "half"))
    return "tester/half"


@pytest.fixture(scope="session")
def bert(place):
    """The folder of a text encoder with its tokenizer."""
    for part in tiny_text():
        part.save_pretrained(place / "bert")
    return place / "bert"


@pytest.fixture(scope="session")
def adapter(pushed, place):
    """The run of an adapter of the pushed model."""
    pipe = tiny_pipeline(patch_size=2, w=1.0, caption_length=8, caption_dropout=0.1)
    return make_adapter_run(pushed, pipe, place / "runs" / "adapter")


@pytest.fixture(scope="session")
def local_adapter(place, bert):
    """The run of an adapter of the folder `base`, an export without its text encoder."""
    base = place / "base"
    pipe = tiny_pipeline(patch_size=2, caption_length=8)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(base)
    config = Config(name="base", model=ModelConfig(text_encoder=str(bert)))
    (base / "config.yaml").write_text(config.to_yaml())
    return make_adapter_run(str(base), pipe, place / "runs" / "local")
