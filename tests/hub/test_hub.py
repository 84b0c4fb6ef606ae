"""Sharing by the real client and a Hub stand-in: each stranger is a process without this package, with caches of its own."""

import contextlib
import dataclasses
import json
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import httpx
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from hub_stub import LOST, HubStub
from huggingface_hub import ModelCard
from PIL import Image
from tiny import WIDTH, tiny_pipeline, tiny_text, tiny_unet
from torch.distributed.elastic.utils.distributed import get_free_port

from pipeline.config import (
    Config,
    DataConfig,
    HubConfig,
    LoraConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    load_file,
)
from pipeline.diffusion import hub_format
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.hub import client, figures, model_card
from pipeline.hub import push as push_module
from pipeline.hub.client import HubError, with_retries
from pipeline.hub.export import export, pull
from pipeline.hub.push import assemble_repository, check_push, require_public_base
from pipeline.models import build, loading, lora, trusted
from pipeline.models.loading import load_pipeline
from pipeline.runs.folder import IMAGES_FOLDER, RunFolder

ROOT = Path(__file__).parents[2]
CANARY = "hf_canary_Jq3xT"
REQUEST = "'red heart', w=1.0, seed=7, num_inference_steps=2, output_type='np'"
HOSTILE = (
    "a: |\n---\n",
    "<script>alert(1)</script>",
    "```\n# not a heading",
    'it\'s "quoted" {braces}',
    "red heart",
)
LISTENER = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    said, done = io.StringIO(), True
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            exec(json.loads(line), globals())
        except BaseException:
            traceback.print_exc()
            done = False
    print(json.dumps([done, said.getvalue()]), flush=True)
"""
PICKLE = pickle.dumps(SimpleNamespace(w=1.0))
FIRST = {"share": 0.25, "interval": [0.2, 0.3], "n": 400}
BOTH = {"first": FIRST, "first_five": FIRST}
METRICS = {
    "w": 1.0,
    "num_inference_steps": 50,
    "by_seed": {"0": {"train": BOTH, "seam_ratio": 1}},
    "free_prompt_copies": {"0": FIRST},
    "references": {"chance": {"first": 0.01, "first_five": 0.05}, "ceiling": BOTH},
}


class Process:
    """A Python of its own that runs one piece of code after another; what it printed is returned, what it broke on is raised."""

    def __init__(self, env, cwd, *flags):
        cwd.mkdir()
        self.cwd, self.heard = cwd, []
        with open(cwd / "stderr.txt", "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *flags, "-c", LISTENER],
                cwd=cwd,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __call__(self, code):
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, (self.cwd / "stderr.txt").read_text()[-3000:]
        done, said = json.loads(line)
        self.heard.append(said)
        assert done, said[-3000:]
        return said

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def world():
    """The Hub of these tests, with one account."""
    with HubStub(token=CANARY) as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def owner(world, place):
    """A process with this package, logged in."""
    process = Process(
        world.env(place / "owner-home", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"), place / "owner"
    )
    process(
        "import os, sys, numpy as np\nfrom pathlib import Path\nfrom huggingface_hub import constants\n"
        "import train_text2img\nfrom pipeline import hub, loading, safe, sample\n"
        "from pipeline.config import Config, HubConfig\n"
        "from pipeline.text_to_image import TextToImagePipeline\nhub.WAITS = (0.1, 0.1, 0.1)"
    )
    yield process
    process.close()


@pytest.fixture(scope="module")
def run(place):
    """The folder of a finished run: patches, whitened captions, pictures, measurements, and what must not be shared."""
    run = RunFolder(place / "runs" / "tiny")
    run.create()
    recipe = DDPMScheduler(
        beta_schedule="sigmoid", prediction_type="sample", timestep_spacing="trailing"
    )  # make train's
    pipe = tiny_pipeline(
        patch_size=2, scheduler=recipe, w=1.0, caption_length=8, caption_dropout=0.1
    )
    pipe.register_modules(whitening=CaptionWhitening(WIDTH))
    pipe.save_pretrained(run.pipeline)
    config = Config(
        name="tiny",
        output=str(place / "runs"),
        data=DataConfig("emoji-small", resolution=16),
        sample=SampleConfig(prompts=("red heart", HOSTILE[0]), w=(0.0, 1.0), default_w=1.0),
    )
    run.config.write_text(config.to_yaml())
    run.log(step=6, loss=0.5)
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(
        run.samples / "000006.png"
    )
    Image.new("RGB", (8, 8)).save(run.figures / "training.png")
    (run.checkpoints / "optimizer.safetensors").write_bytes(b"secret")
    (run.pipeline / "notes.py").write_text("private = 1")
    (run.pipeline / "unet" / "optimizer.bin").write_bytes(b"secret")
    model_card.write_card(
        config, run, pipe, SimpleNamespace(report="emoji-small: 425 of 425 images usable"), 60.0
    )
    (run.folder / "metrics.json").write_text(json.dumps(METRICS))
    model_card.refresh_card(run.folder)
    return run


@pytest.fixture(scope="module")
def expected(run):
    """What the run's pipeline draws here (1, H, W, 3)."""
    pipe = loading.load_from_folder(run.pipeline)
    pipe.set_progress_bar_config(disable=True)
    return eval(f"pipe({REQUEST}).images", {"pipe": pipe})


@pytest.fixture(scope="module")
def pushed(world, owner, run):
    """That run on the Hub; the push's exit code is printed last."""
    assert owner(f"print(hub.main(['push', {str(run.folder)!r}, 'tester/tiny']))").endswith(
        "tester/tiny\n0\n"
    )
    return "tester/tiny"


@pytest.fixture(scope="module")
def stranger(world, place, pushed):
    """A process that has never heard of this package, with the pushed pipeline as `pipe`, trusted at the second try."""
    process = Process(world.env(place / "stranger-home"), place / "stranger", "-P")
    process(f"""
import importlib.util, sys, diffusers, numpy as np, torch
from diffusers import DiffusionPipeline
assert importlib.util.find_spec("pipeline") is None
try:
    DiffusionPipeline.from_pretrained({pushed!r})
except ValueError as error:
    refusal = str(error)
untrusted = [name for name in sys.modules if name.startswith("diffusers_modules")]
pipe = DiffusionPipeline.from_pretrained({pushed!r}, trust_remote_code=True, use_safetensors=True)""")
    yield process
    process.close()


def drawn(process, pipe="pipe"):
    """What a process draws for the request of these tests."""
    process(
        f"{pipe}.set_progress_bar_config(disable=True)\nnp.save('drawn.npy', {pipe}({REQUEST}).images)"
    )
    return np.load(process.cwd / "drawn.npy")


def close(a, b):
    np.testing.assert_allclose(
        a, b, rtol=0, atol=1e-4
    )  # another process may use another number of threads


def refused(process, code):
    """The one sentence of the ValueError that a piece of code ends in."""
    said = process(
        f"try:\n    {code}\nexcept ValueError as error:\n    print('refused:', error)\nelse:\n    print('accepted')"
    )
    assert "refused: " in said, said
    return said.split("refused: ")[1]


@contextlib.contextmanager
def full_disk():
    """Here a write past 4096 bytes fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def code_of(card):
    """The Python of a card, one piece after another."""
    return re.findall(r"```python\n(.*?)```", card, re.S)


def commits(world, name, kind="models"):
    return len(world.repos[kind, name].commits) - 1  # but the one that made it


# ---- the five steps: push, a stranger's load, the stranger's own push, another stranger's load, and what each holds


def test_a_push_is_one_commit_of_what_a_stranger_needs_and_nothing_else(world, pushed, run):
    assert commits(world, pushed) == 1
    assert sorted(world.files("models", pushed)) == sorted(
        [
            "README.md",
            "captions.py",
            "guidance.py",
            "images/prompt-0.png",
            "images/prompt-1.png",
            "images/samples.png",
            "images/training.png",
            "hub_format.py",
            "metrics.json",
            "model_index.json",
            "pipeline.py",
            "scheduler/scheduler.py",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "training_config.yaml",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "vae/patches.py",
            "whitening/captions.py",
            "whitening/config.json",
            "whitening/diffusion_pytorch_model.safetensors",
        ]
    )
    index = json.loads(world.files("models", pushed)["model_index.json"])
    assert index["_class_name"] == ["pipeline", "TextToImagePipeline"] and index["scheduler"] == [
        "scheduler",
        "DDPMScheduler",
    ]


def test_a_stranger_loads_it_once_it_is_trusted_and_draws_the_same(stranger, expected):
    stranger("assert 'trust_remote_code' in refusal and untrusted == []")
    stranger(
        "assert type(pipe.scheduler).__module__.startswith('diffusers_modules'), type(pipe.scheduler)"
    )
    close(drawn(stranger), expected)


def test_the_parts_load_as_stock_classes_without_any_code(stranger, pushed):
    stranger(f"""
for name in ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"):
    scheduler = getattr(diffusers, name).from_pretrained({pushed!r}, subfolder="scheduler")
    assert scheduler.config.timestep_spacing == "trailing" and scheduler.config.num_train_timesteps == 1000
diffusers.UNet2DConditionModel.from_pretrained({pushed!r}, subfolder="unet", use_safetensors=True)
own = pipe.scheduler
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
pipe("red heart", num_inference_steps=2)
pipe.scheduler = own""")


def test_the_lines_of_the_card_run(world, stranger, pushed):
    lines = code_of(world.files("models", pushed)["README.md"].decode())
    assert len(lines) == 2
    stranger("kept = pipe\n" + "\n".join(lines) + "\nassert picture.size == (16, 16)\npipe = kept")


def test_the_stock_schedulers_that_the_card_says_fit_are_those_that_draw():
    sentence = re.search(
        r"stock schedulers .*?:", hub_format.usage_snippet("a/b", False, "cat", 1.0), re.S
    )[0]
    own = DDPMScheduler(
        num_train_timesteps=100, beta_end=0.2, prediction_type="sample", timestep_spacing="trailing"
    )
    pipe, refused = tiny_pipeline(), set()
    for name in set(own._compatibles) - {"DPMSolverSDEScheduler"}:  # which needs torchsde
        pipe.scheduler = getattr(diffusers, name).from_config(own.config)
        try:
            pipe("red heart", num_inference_steps=2)
        except (ValueError, NotImplementedError):
            refused.add(name)
    named = {
        "EDM's": {"EDMEulerScheduler"},
        "PNDM": {"PNDMScheduler"},
        "KDPM2": {"KDPM2DiscreteScheduler"},
        "ancestral": {"EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"},
    }
    assert refused == set().union(*(kinds for word, kinds in named.items() if word in sentence))


def test_a_strangers_own_push_is_the_same_and_loads_again(world, place, stranger, pushed, expected):
    stranger("pipe.push_to_hub('tester/fork')")
    original, fork = (world.files("models", name) for name in (pushed, "tester/fork"))
    assert {"pipeline.py", "guidance.py", "hub_format.py", "vae/patches.py"} < fork.keys()
    changed = {path for path, content in fork.items() if original[path] != content}
    assert changed <= {"README.md", "tokenizer/tokenizer.json"}, (
        "a tokenizer's files remember how it last padded"
    )
    assert ModelCard(fork["README.md"].decode()).data.library_name == "diffusers"
    assert "pipe('a cat', w=1, seed=0)" in fork["README.md"].decode(), (
        "its own w, and no picture that it may not know"
    )
    other = Process(world.env(place / "other-home"), place / "other", "-P")
    other(
        "import numpy as np\nfrom diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('tester/fork', trust_remote_code=True)"
    )
    close(drawn(other), expected)
    other(
        "pipe.push_to_hub('tester/fork')\npipe.save_pretrained('saved', push_to_hub=True, repo_id='tester/fork')"
    )
    other.close()
    assert commits(world, "tester/fork") == 2, "the second time nothing had changed"
    loading.load_from_folder(place / "other" / "saved")


def test_what_diffusers_cannot_load_is_as_the_readme_says(stranger, pushed):
    stranger(f"""
from huggingface_hub import constants, snapshot_download
def outcome(model, **options):
    try:
        return type(DiffusionPipeline.from_pretrained(model, trust_remote_code=True, **options)).__name__
    except Exception as error:
        return type(error).__name__
assert outcome({pushed!r}, scheduler=diffusers.DDIMScheduler()) == "ValueError"
folder, constants.HF_HUB_OFFLINE = snapshot_download({pushed!r}), True
try:
    offline = outcome({pushed!r}), outcome(folder)
finally:
    constants.HF_HUB_OFFLINE = False
assert offline == ("OfflineModeIsEnabled", "TextToImagePipeline"), offline""")


def test_diffusers_cannot_import_code_from_a_repository_with_a_dot_in_its_name(
    world, stranger, pushed
):
    world.add("tester/tiny.two", world.files("models", pushed))
    said = stranger(
        "try:\n    DiffusionPipeline.from_pretrained('tester/tiny.two', trust_remote_code=True)\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    assert "ModuleNotFoundError" in said and "diffusers_modules.local.tester--tiny" in said
    assert (
        Config(hub=HubConfig("tester/tiny.two"))
        .problems()[0]
        .startswith("hub.repo_id must have no dot")
    )


def test_no_file_of_a_saved_pipeline_tells_where_it_was(run, tmp_path):
    loading.load_from_folder(run.pipeline).save_pretrained(tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert str(run.pipeline).encode() not in path.read_bytes(), path
    assert "local" not in (tmp_path / "tokenizer" / "tokenizer_config.json").read_text()


# ---- Stable Diffusion's parts


@pytest.fixture(scope="module")
def stable(owner, place):
    """A pipeline of Stable Diffusion's parts on the Hub."""
    tokenizer, encoder = tiny_text("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=0.5,
        ).eval()
    scheduler = DDPMScheduler(clip_sample=False, steps_offset=1)
    TextToImagePipeline(
        tiny_unet(4, text=False), scheduler, encoder, tokenizer, vae, w=3.0
    ).save_pretrained(place / "stable")
    owner(f"hub.push({str(place / 'stable')!r}, 'tester/stable')")
    return "tester/stable"


def test_a_stable_diffusion_loads_in_stock_diffusers_and_ours_lies_beside_it(
    world, stable, stranger, place
):
    pipe = loading.load_from_folder(place / "stable")
    scheduler = pipe.scheduler
    assert pipe.is_stable_diffusion()
    for other in (
        {"clip_sample": True},
        {"steps_offset": 0},
        {"variance_type": "fixed_large"},
    ):  # which it would change, or draw
        pipe.scheduler = DDPMScheduler.from_config(scheduler.config, **other)
        assert not pipe.is_stable_diffusion()
    assert not [
        path for path in world.files("models", "tester/stable") if re.fullmatch(r".+/.+\.py", path)
    ]
    text = world.files("models", "tester/stable")["README.md"].decode()
    assert "pipe('a cat', guidance_scale=4)" in text and "pipe('a cat', w=3, seed=0)" in text
    joint = "'a cat', num_inference_steps=2, guidance_scale=2.0, output_type='np', generator=torch.Generator().manual_seed(0)"
    stranger(f"""
before = {{name for name in sys.modules if name.startswith("diffusers_modules")}}
stock = DiffusionPipeline.from_pretrained("tester/stable", use_safetensors=True)
assert before == {{name for name in sys.modules if name.startswith("diffusers_modules")}}, "no remote code"
assert type(stock) is diffusers.StableDiffusionPipeline and type(stock.scheduler) is diffusers.DDPMScheduler
ours = DiffusionPipeline.from_pretrained("tester/stable", custom_pipeline="tester/stable", trust_remote_code=True)
assert type(ours).__name__ == "TextToImagePipeline" and ours.config.w == 3.0
for name, pipeline in (("stock", stock), ("ours", ours)):
    pipeline.set_progress_bar_config(disable=True)
    np.save(name + ".npy", pipeline({joint}).images)""")
    stock, ours = (np.load(stranger.cwd / f"{name}.npy") for name in ("stock", "ours"))
    close(stock, ours)
    again = loading.load_from_folder(place / "stable")
    assert type(again.scheduler) is DDPMScheduler and again.config.w == 3.0
    again.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="that is no pure noise"):
        close(eval(f"pipe({joint}).images", {"pipe": again, "torch": torch}), stock)


def test_what_stable_diffusion_would_draw_otherwise_keeps_our_index():
    pipe = tiny_pipeline("clip", text=False)
    assert not pipe.is_stable_diffusion(), "pixels"
    assert json.loads(pipe.to_json_string())["_class_name"] == ["pipeline", "TextToImagePipeline"]


# ---- our own loader


def test_a_model_of_the_hub_is_drawn_with_by_its_name_alone(owner, pushed, expected):
    owner(f"np.save('drawn.npy', (pipe := hub.load({pushed!r}))({REQUEST}).images)")
    close(np.load(owner.cwd / "drawn.npy"), expected)
    said = owner(
        f"print(sample.main([{pushed!r}, 'red heart', '--steps', '2', '--device', 'cpu', '-o', 'cat.png']))"
    )
    assert said.endswith("cat.png\n0\n") and (owner.cwd / "cat.png").is_file()
    owner(
        f"loaded = TextToImagePipeline.from_pretrained({pushed!r})\nassert type(loaded.vae).__module__ == 'pipeline.diffusion.patches'\n"
        f"assert loaded.name_or_path == {pushed!r}"
    )


@pytest.fixture(scope="module")
def half(world, place):
    """A model of the Hub whose weights are fp16 alone."""
    folder = place / "half"
    tiny_pipeline(w=1.0).save_pretrained(folder, variant="fp16")
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    world.add("tester/half", files)
    return "tester/half"


def test_a_variant_is_downloaded_where_it_is_asked_for(owner, half):
    owner(
        "pipe = TextToImagePipeline.from_pretrained('tester/half', variant='fp16', use_safetensors=True)\n"
        "assert pipe('cat', seed=0, num_inference_steps=2, output_type='np').images.shape == (1, 8, 8, 3)"
    )


def test_a_variant_alone_is_said_to_be_one(owner, half, place):
    assert "half has its weights as fp16 alone" in refused(
        owner, f"hub.load({str(place / 'half')!r})"
    )
    said = refused(owner, "hub.load('tester/half')")
    assert "tester/half has its weights as fp16 alone" in said and "variance" not in said, said
    assert "from_pretrained('tester/half', variant='fp16') loads it" in said


def test_a_push_has_the_variant_and_the_shards_that_were_saved(world, owner, half):
    owner(
        f"pipe = TextToImagePipeline.from_pretrained({half!r}, variant='fp16', use_safetensors=True)\n"
        "pipe.save_pretrained('shards', variant='fp16', max_shard_size='100KB', push_to_hub=True, repo_id='tester/shards')\n"
        "pipe.push_to_hub('tester/variant', variant='fp16', private=True)"
    )
    assert (
        world.repos["models", "tester/variant"].private
        and not world.repos["models", "tester/shards"].private
    )
    kept = {
        path.relative_to(owner.cwd / "shards").as_posix()
        for path in (owner.cwd / "shards").rglob("*")
        if path.is_file()
    }
    assert kept == world.files("models", "tester/shards").keys() - {"README.md"}
    assert (
        len(
            [
                name
                for name in kept
                if name.startswith("unet/") and ".fp16" in name and name.endswith(".safetensors")
            ]
        )
        > 1
    )
    owner(
        "pipe.push_to_hub('tester/shards', max_shard_size='100KB')\n"
        "pipe.push_to_hub('tester/shards')"
    )  # whose weights an index of those shards would hide
    now = world.files("models", "tester/shards").keys()
    assert {name for name in now - kept if name.startswith("unet/")} == {
        "unet/diffusion_pytorch_model.safetensors"
    }
    assert kept < now and "README.md" in now, "the variant is another model's"
    files = world.files("models", "tester/variant")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files
    assert files["README.md"].count(b"use_safetensors=True, variant='fp16')") == 2
    assert "as fp16 alone" in refused(owner, "hub.space('tester/broken', 'tester/variant')")
    assert "a pickle may run code" in refused(
        owner, "pipe.push_to_hub('tester/variant', safe_serialization=False)"
    )


def test_a_model_whose_weights_are_missing_or_pickled_is_not_pushed(world, owner, place):
    tiny_pipeline(w=1.0).save_pretrained(place / "pickled", safe_serialization=False)
    assert "has no safetensors, expected them" in refused(
        owner, f"hub.push({str(place / 'pickled')!r}, 'tester/pickled')"
    )
    assert ("models", "tester/pickled") not in world.repos


def test_what_is_no_finished_model_is_told_before_the_hub_hears_of_it(
    world, owner, adapter, run, tmp_path
):
    unfinished, damaged = tmp_path / "unfinished", tmp_path / "damaged"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text(Config(name="unfinished").to_yaml())
    shutil.copytree(run.folder, damaged)
    (damaged / model_card.TRAINING_FACTS).write_text("{")
    (damaged / IMAGES_FOLDER / "samples.png").write_bytes(bytes(5000))
    world.requests.clear()
    for source, code, words in (
        (tmp_path / "mistyped", 2, "mistyped does not exist, expected the folder of a run"),
        (unfinished, 2, "its training has not finished: run the training command again"),
        (adapter.adapter, 1, "is an adapter without its run, expected a run's folder"),
        (damaged, 2, f"{model_card.TRAINING_FACTS} is damaged"),
    ):
        said = owner(f"print(hub.main(['push', {str(source)!r}, 'tester/never']))")
        assert (
            words in said
            and said.startswith("error: ")
            and said.endswith(f"\n{code}\n")
            and said.count("\n") == 2
        ), said
        assert "is complete" not in said
    assert world.requests == []
    with (
        full_disk(),
        pytest.raises(HubError, match=r"gathering .* failed \(.*[Tt]oo large.*\), expected room"),
    ):
        push_module.push(damaged / "pipeline", "tester/never")


def test_no_code_of_a_model_is_downloaded_or_run(world, owner, pushed, place):
    evil = f"open({str(place / 'ran')!r}, 'w')\n".encode()
    files = world.files("models", pushed)
    world.add(
        "mallory/same",
        {path: evil if path.endswith(".py") else content for path, content in files.items()}
        | {"unet/extra.bin": PICKLE},
    )
    world.requests.clear()
    owner(
        "pipe = hub.load('mallory/same')\nassert type(pipe.scheduler).__module__ == 'pipeline.diffusion.scheduler'"
    )
    assert not [path for _, path in world.requests if path.endswith((".py", ".bin"))]
    owner("print(hub.main(['pull', 'mallory/same', 'pulled']))")
    assert not [
        path for path in (owner.cwd / "pulled").rglob("*") if path.suffix in (".py", ".bin")
    ]
    owner("hub.load('pulled')")
    assert not (place / "ran").exists()
    assert "choose another" in owner("assert hub.main(['pull', 'mallory/same', 'pulled']) == 1")
    owner(
        "from huggingface_hub import snapshot_download\n"
        "assert (Path(snapshot_download('mallory/same')) / 'pipeline.py').exists()\n"
        "hub.pull('mallory/same', Path('again'))\nhub.push('mallory/same', 'tester/republished')"
    )
    names = lambda folder: {path.relative_to(folder) for path in folder.rglob("*")}
    assert names(owner.cwd / "again") == names(owner.cwd / "pulled"), (
        "whatever other tools have put into the cache"
    )
    assert (
        world.files("models", "tester/republished")["pipeline.py"]
        == (ROOT / "pipeline" / "text_to_image.py").read_bytes()
    )


def test_a_folder_that_cannot_be_written_is_one_sentence_and_leaves_nothing(
    owner, pushed, run, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(trusted, "download_model", lambda model: run.pipeline)
    for make in (
        lambda folder: pull("tester/tiny", folder),
        lambda folder: export(run.folder, folder),
    ):
        with pytest.raises(
            HubError,
            match=r"making .*/file/new failed .*File exists.*, expected room, and leave to",
        ):
            make(tmp_path / "file" / "new")
        with (
            full_disk(),
            pytest.raises(HubError, match=r"making .*/new failed \(.*too large.*\), expected room"),
        ):
            make(tmp_path / "new")
        assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
        assert make(tmp_path / "new").is_dir()
        shutil.rmtree(tmp_path / "new")


def adapter_of(base, pipe, folder):
    """The run of an adapter of a base, which a pipeline holds."""
    run = RunFolder(folder)
    run.create()
    config = Config(
        name=folder.name,
        output=str(folder.parent),
        data=DataConfig("emoji-small", resolution=16),
        model=ModelConfig(pretrained=base),
        train=TrainConfig(method="lora"),
        sample=SampleConfig(default_w=1.5),
    )
    run.config.write_text(config.to_yaml())
    network = lora.add_adapter(pipe.unet, LoraConfig(rank=2, alpha=5))
    with torch.no_grad():
        for weight in build.trainable_parameters(network):
            weight.normal_(generator=torch.Generator().manual_seed(weight.numel()))
    lora.save_adapter(network, run.adapter)
    model_card.write_card(
        config,
        run,
        pipe,
        SimpleNamespace(report="425 images"),
        60.0,
        base_model=base,
        base_model_relation="adapter",
    )
    return run


@pytest.fixture(scope="module")
def adapter(pushed, place):
    """The run of an adapter of the pushed model."""
    pipe = tiny_pipeline(patch_size=2, w=1.0, caption_length=8, caption_dropout=0.1)
    return adapter_of(pushed, pipe, place / "runs" / "adapter")


def test_an_adapter_is_pushed_alone_and_drawn_with_on_its_base(
    world, owner, pushed, adapter, expected
):
    assert owner(f"print(hub.main(['push', {str(adapter.folder)!r}, 'tester/adapter']))").endswith(
        "tester/adapter\n0\n"
    )
    files = world.files("models", "tester/adapter")
    assert set(files) >= {"pytorch_lora_weights.safetensors", "README.md", "training_config.yaml"}
    assert not [name for name in files if name.endswith(".py") or name.startswith("unet/")]
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (pushed, "adapter")
    owner("adapted = loading.load('tester/adapter')")
    with_it = drawn(owner, "adapted")
    owner("adapted.unload_lora_weights()")
    close(drawn(owner, "adapted"), expected)
    assert np.abs(with_it - expected).max() > 1e-2


def test_an_adapter_is_not_pushed_over_a_pipeline(world, owner, pushed, adapter):
    """Whoever loads that name would get the pipeline still, whatever its new card says; it is told before training too."""
    commits, says = (
        len(world.repos["models", pushed].commits),
        "tester/tiny holds a pipeline (model_index.json), expected a",
    )
    assert says in refused(owner, f"hub.push({str(adapter.folder)!r}, {pushed!r})")
    config = f"Config(hub=HubConfig({pushed!r}), model=ModelConfig(pretrained={pushed!r}), train=TrainConfig(method='lora'))"
    owner("from pipeline.config import ModelConfig, TrainConfig")
    assert says in refused(owner, f"hub.check({config})")
    assert len(world.repos["models", pushed].commits) == commits


def test_the_lines_of_the_card_of_an_adapter_run(
    world, owner, stranger, stable, pushed, adapter, place
):
    owner(f"hub.push({str(adapter.folder)!r}, 'tester/adapter')")
    (lines,) = code_of(world.files("models", "tester/adapter")["README.md"].decode())
    assert "w=1.5" in lines
    owner(f"{lines}\nassert picture.size == (16, 16) and pipe.get_list_adapters()")
    then = lines[
        lines.index("pipe.load_lora_weights") :
    ]  # what comes before, as the card of the base says
    stranger(
        f"{then}\nassert picture.size == (16, 16) and pipe.get_list_adapters()\npipe.unload_lora_weights()"
    )
    pinned = f"{stable}@{world.repos['models', stable].refs['main']}"
    run = adapter_of(
        pinned, loading.load_from_folder(place / "stable"), place / "runs" / "of-stable"
    )
    owner(f"hub.push({str(run.folder)!r}, 'tester/of-stable')")
    readme = world.files("models", "tester/of-stable")["README.md"].decode()
    (lines,) = code_of(readme)
    assert "guidance_scale=2.5" in lines and ModelCard(readme).data.base_model == stable
    stranger(
        f"kept = pipe\n{lines}\nassert type(pipe) is diffusers.StableDiffusionPipeline and pipe.get_list_adapters()\n"
        "pipe = kept"
    )


@pytest.fixture(scope="module")
def local(place):
    """The run of an adapter of the pushed model as `ship` leaves one in a folder, without its text encoder."""
    for part in tiny_text():
        part.save_pretrained(place / "bert")
    base, pipe = place / "base", tiny_pipeline(patch_size=2, caption_length=8)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(base)
    (base / "config.yaml").write_text(
        Config(name="base", model=ModelConfig(text_encoder=str(place / "bert"))).to_yaml()
    )
    return adapter_of(str(base), pipe, place / "runs" / "local")


def pushed_on(owner, base, run):
    """What a push of an adapter says, on a base of the Hub or on its own."""
    named = "" if base is None else f", '--base', {base!r}"
    return owner(
        f"print(hub.main(['push', {str(run.folder)!r}, 'tester/{run.folder.name}-on'{named}]))"
    )


def test_the_lines_of_the_card_of_an_adapter_of_a_folder_run(local):
    (lines,) = code_of(local.card.read_text())
    exec(lines, there := {})
    assert there["picture"].size == (16, 16) and there["pipe"].get_list_adapters()


def test_an_adapter_is_not_pushed_on_a_model_that_it_does_not_fit(
    world, owner, pushed, adapter, local, place
):
    files = world.files("models", pushed)
    settings, name = (
        json.loads(files["unet/config.json"]),
        "unet/diffusion_pytorch_model.safetensors",
    )
    changed = lambda **more: files | {"unet/config.json": json.dumps(settings | more).encode()}
    world.add("tester/wide", changed(block_out_channels=[8, 32]))
    world.add("tester/bare", changed(down_block_types=["DownBlock2D"] * 2))
    world.add("tester/lone", {"pytorch_lora_weights.safetensors": b""})
    for base, code, words in (
        ("gone", 2, "tester/gone is not on the Hub"),
        ("lone", 2, "tester/lone holds no model_index.json"),
        (
            "wide",
            1,
            r"fit tester/wide, whose \S+attn1\.to_\w is \(32, 32\), expected \(16, 16\): name the model that .*/base,",
        ),
        (
            "bare",
            1,
            r"fit tester/bare, whose down_blocks\.1\.attentions\S+ is missing, expected \(16, 16\)",
        ),
    ):
        said = pushed_on(owner, f"tester/{base}", local)
        assert re.search(words, said) and said.endswith(f"\n{code}\n"), said
        assert "warning" not in said and "is complete" not in said, said
    assert ("models", "tester/local-on") not in world.repos
    world.add("tester/other", files | {name: files[name][:-4] + b"1234"})
    said = pushed_on(owner, "tester/other", local)
    assert (
        f"warning: tester/other has other weights than {place / 'base'}, which the adapter was trained on"
        in said
    ), said
    assert f"tester/other cannot be compared with {pushed}" in pushed_on(
        owner, "tester/other", adapter
    )


def test_an_adapter_of_a_folder_is_pushed_with_the_name_of_its_base_on_the_hub(
    world, owner, pushed, local, run, place, tmp_path
):
    base = place / "base"
    said = pushed_on(owner, None, local)
    assert (
        f"the adapter is one of {base}, expected one of a model of the Hub" in said
        and said.endswith("1\n")
    )
    said = pushed_on(owner, pushed, local)
    assert said.endswith("0\n") and "warning" not in said, said
    files = world.files("models", "tester/local-on")
    assert (
        ModelCard(files["README.md"].decode()).data.base_model == pushed
        and str(base).encode() not in files["README.md"]
    )
    assert yaml.safe_load(files["training_config.yaml"])["model"]["pretrained"] == pushed
    owner("loading.load('tester/local-on')")
    local = Config(
        model=ModelConfig(pretrained=str(tmp_path)),
        train=TrainConfig(method="lora"),
        hub=HubConfig("tester/x"),
    )
    with pytest.raises(HubError, match=f"the adapter is one of {tmp_path}"):
        check_push(local)
    require_public_base("a/b@v1"), require_public_base("a/b@v1", ["a/b"])
    with pytest.raises(HubError, match="is no run of an adapter, got --base a/b: leave it out"):
        assemble_repository(run.folder, tmp_path / "new", "a/b")


def test_a_folder_that_is_gone_does_not_become_a_name_of_the_hub(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    config, made = Config(name="x", data=DataConfig("data/mine")), RunFolder(tmp_path / "x")
    made.create()
    made.config.write_text(config.to_yaml())
    model_card.write_card(
        config,
        made,
        loading.load_from_folder(run.pipeline),
        SimpleNamespace(report=""),
        1.0,
        base_model="data/mine",
    )
    (tmp_path / "data" / "mine").rmdir()
    data = model_card.read_card(made.folder, "a/b").data
    assert data.datasets is None and data.base_model is None
    assert model_card.build_card(config, model_card.training_facts("", 1.0)).data.datasets == [
        "data/mine"
    ], "nothing was noted of it"


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: [mit, other]\n---\n", "mit, other"),
        ("---\nlicense: mit\nmodel-index: [{}]\n---\n", "mit"),
        ("---\na: [\n---\n", None),
        ("# no metadata", None),
        (None, None),
    ],
)
def test_a_card_of_somebody_else_that_is_damaged_ends_nothing(readme, licence, tmp_path):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert model_card.license_of(str(tmp_path)) == licence
    made = model_card.build_card(
        Config(), model_card.training_facts("", 1.0, base_model="a/b@v1", base_license=licence)
    )
    assert (
        made.data.license == {"mit": "mit"}.get(licence, "other") and made.data.base_model == "a/b"
    )
    assert f"it: {f'`{licence}`' if licence else 'see'}" in made.text.replace("for them", "it")


def test_an_adapter_of_what_is_on_another_machine_is_refused(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (tmp_path / "training_config.yaml").write_text("model: {pretrained: /srv/model}")
    with pytest.raises(
        trusted.ModelError,
        match="is an adapter of '/srv/model', expected one of a model of the Hub",
    ):
        loading.load_pipeline(str(tmp_path))


def test_a_revision_stays_what_it_was(world, owner, pushed):
    files = world.files("models", pushed)
    old = world.add("mallory/moving", files)
    index = json.loads(files["model_index.json"]) | {"w": 9.0}
    world.repos["models", "mallory/moving"].add_commit(
        {
            path: (
                json.dumps(index).encode() if path == "model_index.json" else content,
                path.endswith(".safetensors"),
            )
            for path, content in files.items()
        },
        "stronger",
        "main",
    )
    assert (
        owner(
            f"print(*(hub.load('mallory/moving' + at).config.w for at in ('', '@{old}', '@main')))"
        )
        == "9.0 1.0 9.0\n"
    )
    said = owner(
        f"print(TextToImagePipeline.from_pretrained('mallory/moving', revision={old!r}).config.w)"
    )
    assert said.endswith("1.0\n"), said
    assert owner(
        f"print(hub.main(['space', 'tester/old-page', '--model', 'mallory/moving@{old}']))"
    ).endswith("page\n0\n")
    assert (
        world.files("spaces", "tester/old-page")["model.txt"].decode() == f"mallory/moving@{old}\n"
    )


def test_a_model_in_the_cache_needs_no_network(world, owner, pushed):
    world.requests.clear()
    owner(
        f"constants.HF_HUB_OFFLINE = True\ntry:\n    hub.load({pushed!r})\nfinally:\n    constants.HF_HUB_OFFLINE = False"
    )
    assert world.requests == []


INDEX = {
    "_class_name": ["pipeline", "TextToImagePipeline"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["scheduler", "DDPMScheduler"],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scheduler": ["my_scheduler", "MyScheduler"]},
            "its scheduler is 'MyScheduler' of 'my_scheduler', expected a class of",
        ),
        (
            {"scheduler": ["scheduler", "PatchAutoencoder"]},
            "its scheduler is 'PatchAutoencoder' of 'scheduler'",
        ),
        ({"unet": ["os", "system"]}, "its unet is 'system' of 'os'"),
        ({"unet": ["diffusers", "__name__"]}, "its unet is '__name__' of 'diffusers'"),
        (
            {"unet": ["diffusers", "DiffusionPipeline"]},
            "its unet is 'DiffusionPipeline' of 'diffusers'",
        ),
        ({"unet": ["diffusers.utils", "load_image"]}, "its unet is"),
        (
            {"text_encoder": ["transformers", "pipeline"]},
            "its text_encoder is 'pipeline' of 'transformers'",
        ),
        ({"text_encoder": "transformers"}, "its text_encoder is"),
        ({"unet": None}, "names no unet, expected both unet and scheduler"),
        (
            {"_class_name": "FluxPipeline"},
            "is a FluxPipeline, expected a TextToImagePipeline or a StableDiffusionPipeline",
        ),
        ({"_class_name": []}, "expected a TextToImagePipeline"),
        ({"_class_name": None}, "this model is a None"),
        ({"w": "strong"}, "has w 'strong', expected numbers"),
        ({"_text_to_image": {"scheduler": ["os", "system"]}}, "its scheduler is 'system' of 'os'"),
    ],
)
def test_an_index_may_name_known_classes_only(change, message):
    assert trusted.validate_index(INDEX)["scheduler"] == [
        "pipeline.diffusion.scheduler",
        "DDPMScheduler",
    ]
    with pytest.raises(trusted.ModelError, match=re.escape(message)):
        trusted.validate_index(INDEX | change)


def test_what_is_asked_of_the_hub_and_cannot_be_had_is_one_sentence(world, owner, pushed):
    files = world.files("models", pushed)
    index = json.loads(files["model_index.json"])
    world.add("mallory/private", files, private=True)
    world.add("mallory/gated", files, gated=True)
    world.add(
        "mallory/pickled",
        {
            path.replace(".safetensors", ".bin"): PICKLE
            if path.endswith(".safetensors")
            else content
            for path, content in files.items()
        },
    )
    world.add(
        "mallory/strange",
        files | {"model_index.json": json.dumps(index | {"scheduler": ["mine", "Mine"]}).encode()},
    )
    world.add("mallory/damaged", files | {"model_index.json": b"{"})
    world.add("mallory/empty", {"README.md": b"nothing"})
    for model, message in {
        "mallory/private": "is not on the Hub, or private and not yours, and no folder here: check the name, or `hf auth login`",
        "mallory/gated": "is gated and this account may not read it, expected its conditions to be accepted",
        "mallory/pickled": "has no safetensors, expected them, since a pickle may run code",
        "mallory/strange": "its scheduler is 'Mine' of 'mine', expected a class of diffusers, transformers or this package",
        "mallory/damaged": "is damaged",
        "mallory/empty": "holds no model_index.json, expected a saved diffusers pipeline",
        "mallory/nothing": "is not on the Hub",
        f"{pushed}@no-such-branch": "has no such revision, expected a branch",
        "mallory/no--name": "Cannot have -- or ..",
    }.items():
        said = refused(owner, f"hub.load({model!r})")
        assert message in said and said.count("\n") == 1, said
        assert refused(owner, f"TextToImagePipeline.from_pretrained({model!r})") == said
    world.add("mallory/busy", files)
    world.faults.append(("HEAD", "/mallory/busy/resolve/", 403))
    assert "nor in the cache, and the Hub cannot be reached: connect once" in refused(
        owner, "hub.load('mallory/busy')"
    )


def test_a_name_whose_first_part_is_a_folder_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trusted.parse_repo_id("runs/emoji") == ("runs/emoji", None)
    (tmp_path / "runs").mkdir()
    assert trusted.parse_repo_id("runs/emoji") is None and trusted.parse_repo_id(
        "runs/emoji@main"
    ) == (
        "runs/emoji",
        "main",
    )
    assert (
        trusted.parse_repo_id("/abs/path") is None
        and trusted.parse_repo_id("../x/y") is None
        and trusted.parse_repo_id("a/b/c") is None
    )


# ---- a pipeline without its text encoder


def test_a_shared_pipeline_always_has_its_text_encoder(world, owner, place):
    tokenizer, encoder = tiny_text()
    for part in (tokenizer, encoder):
        part.save_pretrained(place / "bert")
    pipe = tiny_pipeline(caption_length=8)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(place / "bare")
    assert json.loads((place / "bare" / "model_index.json").read_text())["text_encoder"] == [
        None,
        None,
    ]
    bare = TextToImagePipeline.from_pretrained(place / "bare")
    with pytest.raises(
        ValueError,
        match="no text encoder to read .* load it with pipeline.hub.load, which supplies",
    ):
        bare("red heart")
    with pytest.raises(
        ValueError,
        match="no text encoder, expected one in what is shared: load it with pipeline.hub.load",
    ):
        bare.push_to_hub("tester/bare")
    assert "put the config.yaml beside it" in refused(
        owner, f"hub.push({str(place / 'bare')!r}, 'tester/bare')"
    )
    config = Config(name="bare", model=ModelConfig(text_encoder=str(place / "bert")))
    (place / "bare" / "config.yaml").write_text(config.to_yaml())
    assert load_pipeline(place / "bare")("red heart", num_inference_steps=2).images[0].size == (
        8,
        8,
    )
    owner(
        f"hub.push({str(place / 'bare')!r}, 'tester/bare')\nassert hub.load('tester/bare').text_encoder is not None"
    )
    assert "text_encoder/model.safetensors" in world.files("models", "tester/bare")


# ---- the Hub says no, is busy, or is left in the middle


def test_what_a_push_needs_is_tried_before_training(world, owner, run):
    def check(repo_id, token=None):
        return refused(owner, f"hub.check(Config(hub=HubConfig({repo_id!r}, token={token!r})))")

    owner(
        "hub.check(Config())\nhub.check(Config(hub=HubConfig('tester/checked', private=True)))\n"
        "hub.check(Config(hub=HubConfig('checked')))"
    )
    assert (
        world.repos["models", "tester/checked"].private
        and world.files("models", "tester/checked") == {}
    )
    assert "got the answer 401, expected 200: there is no valid token: `hf auth login`" in check(
        "tester/checked", "hf_wrong"
    )
    assert "the token of this machine may only read, expected one that may write" in check(
        "tester/checked", "hf_reader"
    )
    assert "got the answer 403, expected 200: this account may not write to somebody/new" in check(
        "somebody/new"
    )
    world.add("somebody/old", {"README.md": b"theirs"})
    assert "this account may not write to somebody/old" in check("somebody/old")
    owner("kept = os.environ.pop('HF_TOKEN')")
    assert "needs a token and there is none, expected one that may write: `hf auth login`" in check(
        "tester/checked"
    )
    assert "there is no valid token" in refused(
        owner, f"hub.push({str(run.folder)!r}, 'tester/checked')"
    )
    told = f"Config(hub=HubConfig('tester/told', private=True, token={CANARY!r}))"  # the settings' own token is enough
    owner(
        f"from pipeline.run import Run\nassert hub.publish({told}, Run({str(run.folder)!r})) == 0"
    )
    assert commits(world, "tester/told") == 1 and world.repos["models", "tester/told"].private
    owner("os.environ['HF_TOKEN'] = kept")


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "tester/no space",
        "-x",
        "tester/a--b",
        "tester/x.git",
        "tester/v1.0",
        "",
        "tester/ü",
    ],
)
def test_a_repository_that_cannot_be_is_refused_with_all_other_settings(name):
    (problem,) = Config(hub=HubConfig(name)).problems()
    assert problem.startswith("hub.repo_id must") and repr(name) in problem and "\n" not in problem


def test_a_busy_hub_and_a_lost_answer_still_make_one_commit_and_an_unchanged_model_none(
    world, owner, run
):
    world.faults += [
        ("PUT", "/_lfs/", 503),
        ("POST", "/preupload/", 503),
        ("POST", "/commit/", 412),
        ("POST", "/commit/", LOST),
    ]
    world.lfs.clear()
    push = f"print(hub.main(['push', {str(run.folder)!r}, 'tester/busy', '--private']))"
    assert owner(push).endswith("0\n") and world.faults == []
    assert commits(world, "tester/busy") == 1 and world.repos["models", "tester/busy"].private
    assert owner(push).endswith("0\n")
    assert commits(world, "tester/busy") == 1


def test_a_push_that_fails_says_how_to_do_it_again(world, owner, run):
    world.faults += [("POST", "/commit/", 500)] * 4
    said = owner(f"print(hub.main(['push', {str(run.folder)!r}, 'tester/failed']))")
    assert said.endswith(
        f"is complete, push it again with `direct-jump push {run.folder} tester/failed`\n1\n"
    ), said
    assert world.files("models", "tester/failed") == {} and "Traceback" not in said
    loading.load_from_folder(run.pipeline)


def test_a_file_that_does_not_get_through_is_one_sentence_with_the_command(world, owner, run):
    """The client wraps the Hub's answer in a RuntimeError of its own."""
    world.lfs.clear()
    world.faults += [("PUT", "/_lfs/", 400)] * 50
    said = owner(f"print(hub.main(['push', {str(run.folder)!r}, 'tester/stuck']))")
    world.faults.clear()
    assert (
        "got the answer 400, expected 200: the Hub will not have it: see what it says (injected fault)"
        in said
    ), said
    assert said.endswith("tester/stuck`\n1\n") and "Traceback" not in said
    assert world.files("models", "tester/stuck") == {}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("Xet: connection reset"),
            r"got no answer \(ConnectionError: Xet: connection reset\), expected the Hub's",
        ),
        (OSError("No space left"), r"failed \(No space left\), expected leave to read and to send"),
        (
            PermissionError("Xet: token expired"),
            r"failed \(Xet: token expired\), expected leave to read and to send",
        ),
    ],
)
def test_what_xet_raises_is_told_too(error, words, monkeypatch):
    """Its transfers need a service that no test has; its errors are RuntimeError and OSError."""
    monkeypatch.setattr(client, "RETRY_WAITS", (0, 0))
    asked = []

    def request():
        asked.append(1)
        raise error

    with pytest.raises(HubError, match=words), client.upload_errors("the push", "a/b"):
        with_retries(request)
    assert len(asked) == (3 if isinstance(error, RuntimeError) else 1)
    with (
        pytest.raises(trusted.ModelError, match=f"a/b could not be downloaded .{error}.,"),
        trusted.download_errors("a/b"),
    ):
        raise error


def test_a_push_that_is_killed_is_whole_after_the_next(world, owner, place, run, pushed):
    world.lfs.clear()
    command = [sys.executable, "-m", "pipeline", "push", str(run.folder), "tester/killed"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=world.env(place / "killed-home"), stderr=subprocess.PIPE, text=True
    )
    world.watch = lambda method, path: process.kill() if method == "PUT" else None
    try:
        said = process.communicate(timeout=60)[1]
    finally:
        world.watch = None
    assert process.returncode == -9, said
    assert world.files("models", "tester/killed") == {}
    owner(f"hub.push({str(run.folder)!r}, 'tester/killed')")
    here, there = world.files("models", "tester/killed"), world.files("models", pushed)
    assert here.keys() == there.keys() and commits(world, "tester/killed") == 1
    assert all(here[path] == there[path] for path in here if path != "README.md")
    assert ModelCard(here["README.md"].decode()).data.pipeline_tag == "text-to-image"


# ---- the training script


def test_training_checks_first_and_pushes_last(world, owner, place):
    (place / "squares" / "train").mkdir(parents=True)
    for name in ("red", "green", "blue", "white"):
        Image.new("RGB", (16, 16), name).save(place / "squares" / "train" / f"{name}.png")
    settings = {
        "name": "trained",
        "output": str(place / "trained"),
        "hub": {"repo_id": "trained"},
        "data": {
            "source": str(place / "squares"),
            "held_out": None,
            "resolution": 16,
            "caption_length": 8,
            "cache": str(place / "cache"),
        },
        "model": {
            "patch_size": 2,
            "channels": [32],
            "attention": [True],
            "heads": 4,
            "text_in_time": False,
            "text_encoder": str(place / "bert"),
        },
        "diffusion": {"prediction_type": "sample", "num_train_timesteps": 100, "beta_end": 0.2},
        "train": {"steps": 2, "batch_size": 2, "threads": 1},
        "sample": {"prompts": ["red"], "w": [1], "default_w": 1, "steps": 2},
    }
    (place / "trained.yaml").write_text(yaml.safe_dump(settings))
    for part in tiny_text():
        part.save_pretrained(place / "bert")
    train = lambda *more: owner(
        "from accelerate.state import AcceleratorState\nAcceleratorState._reset_state(reset_partial_state=True)\n"
        f"print('code', train_text2img.main(['--config', {str(place / 'trained.yaml')!r}, *{more!r}]))"
    )
    said = train("--hub.repo_id", "somebody/else")
    assert "may not write to somebody/else" in said and said.endswith("code 2\n")
    assert not (place / "trained").exists(), "nothing was begun"
    world.faults += [("POST", "/commit/", 403)]
    said = train("--hub.token", CANARY)
    assert f"push it again with `direct-jump push {place / 'trained' / 'trained'} trained`" in said
    assert (
        said.endswith("code 1\n")
        and (place / "trained" / "trained" / "pipeline" / "model_index.json").is_file()
    )
    said = train("--hub.private", "true")
    assert said.endswith(f"Pushed to {world.endpoint}/tester/trained\ncode 0\n"), (
        "the same command goes on"
    )
    files = world.files("models", "tester/trained")
    assert {
        "README.md",
        "images/samples.png",
        "images/prompt-0.png",
        "training_config.yaml",
    } < files.keys()
    assert ModelCard(files["README.md"].decode()).data.widget == [
        {"text": "red", "output": {"url": "images/prompt-0.png"}}
    ]
    assert load_file(place / "trained" / "trained" / "config.yaml").hub == HubConfig("trained")


# ---- the card


def test_hostile_words_stay_words_in_a_card():
    prompts = tuple(HOSTILE)
    config = Config(
        name="x",
        data=DataConfig("some/set: |\n---\n<script>"),
        sample=SampleConfig(prompts=prompts),
    )
    known = model_card.training_facts(
        "data:\n```\n<script>\n---\n", 3600.0, base_model="a/b<script>\n---\n", base_license="|: x"
    )
    pictures = [f"prompt-{i}.png" for i in range(len(prompts))] + ["samples.png"]
    made = model_card.build_card(config, known, pictures, "tester/tiny", METRICS)
    read = ModelCard(str(made))
    assert [w["text"] for w in read.data.widget] == list(prompts)
    assert read.data.license == "|: x" and read.data.base_model is None, "no name of the Hub"
    assert (
        read.data.eval_results[0].dataset_name == config.data.source
        and read.data.eval_results[0].metric_value == 0.25
    )
    plain = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", read.text, flags=re.M | re.S)  # without code blocks
    assert "<script>" not in plain and "# not a heading" not in re.sub(r"`[^`\n]*`", "", plain)
    settings = yaml.safe_load(re.search(r"^(`{3,})yaml\n(.*?)^\1$", read.text, re.M | re.S)[2])
    assert settings["data"]["source"] == config.data.source
    for code in re.findall(r"```python\n(.*?)```", read.text, re.S):
        compile(code, "card", "exec")


def test_a_card_of_a_tuned_model_says_what_it_comes_from(run):
    known = model_card.training_facts(
        "",
        1.0,
        base_model="someone/stable",
        base_model_relation="adapter",
        base_license="creativeml-openrail-m",
    )
    made = model_card.build_card(load_file(run.config), known)
    assert (made.data.base_model, made.data.base_model_relation) == ("someone/stable", "adapter")
    assert (
        made.data.license == "creativeml-openrail-m"
        and "`someone/stable`, and its licence holds for them" in made.text
    )
    assert "There is no safety checker" in made.text
    assert (
        model_card.build_card(
            load_file(run.config), model_card.training_facts("", 1.0)
        ).data.license
        == "cc-by-4.0"
    )


def test_a_card_needs_neither_pictures_nor_measurements(run):
    made = model_card.build_card(Config(), model_card.training_facts("", 0.0))
    assert not {"widget", "model-index"} & made.data.to_dict().keys() and "Nothing yet" in made.text
    text = (run.folder / "README.md").read_text()
    assert (
        "<Gallery />" in text
        and f"from_pretrained('{run.pipeline}'" in text
        and "first 25.0%" in text
    )
    with (
        Image.open(run.folder / "images" / "prompt-1.png") as picture,
        Image.open(run.samples / "000006.png") as grid,
    ):
        assert np.array_equal(np.asarray(picture), np.asarray(grid)[16:, 16:])


def test_the_gallery_shows_only_what_was_drawn_at_the_default_w(run, tmp_path):
    """Its pictures stand above code that draws at that w."""
    made = RunFolder(tmp_path / "run")
    shutil.copytree(run.folder, made.folder)
    config = load_file(made.config)
    between = dataclasses.replace(config.sample, default_w=0.5)
    Image.new("RGB", (32, 32)).save(made.samples / "mine.png")
    figures.collect_images(dataclasses.replace(config, sample=between), made)
    assert sorted(path.name for path in (made.folder / "images").iterdir()) == [
        "samples.png",
        "training.png",
    ]
    assert (made.folder / "images" / "samples.png").read_bytes() == (
        made.samples / "000006.png"
    ).read_bytes()
    model_card.refresh_card(made.folder)
    text = made.card.read_text()
    assert (
        "<Gallery />" not in text
        and "widget" not in ModelCard(text).data.to_dict()
        and "(images/samples.png)" in text
    )


def test_a_card_needs_no_git(monkeypatch, tmp_path):
    assert model_card.git_commit() != "unknown" or not (ROOT / ".git").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert model_card.git_commit() == "unknown"


# ---- the Space


def test_a_space_that_could_not_start_is_not_made(world, owner, pushed):
    index = json.loads(world.files("models", pushed)["model_index.json"])
    world.add(
        "tester/flux",
        {"model_index.json": json.dumps(index | {"_class_name": "FluxPipeline"}).encode()},
    )
    world.add("tester/nothing", {"README.md": b""})
    for model, words in (
        ("tester/flux", "is a FluxPipeline, expected"),
        ("tester/nothing", "holds no model_index.json"),
    ):
        assert words in refused(owner, f"hub.space('tester/broken', {model!r})")
    assert ("spaces", "tester/broken") not in world.repos
    world.add("tester/hidden", world.files("models", pushed), private=True)
    said = owner(
        "print(hub.main(['space', 'tester/hidden-page', '--model', 'tester/hidden', '--private']))"
    )
    assert (
        "tester/hidden is not for everybody: the Space needs a secret HF_TOKEN" in said
        and said.endswith("hidden-page\n0\n")
    )
    assert world.repos["spaces", "tester/hidden-page"].private


def test_a_space_serves_the_model_that_it_is_pinned_to(world, owner, place, pushed):
    said = owner(f"print(hub.main(['space', 'tester/page', '--model', {pushed!r}]))")
    assert said.endswith("/spaces/tester/page\n0\n"), said
    files, revision = (
        world.files("spaces", "tester/page"),
        world.repos["models", pushed].refs["main"],
    )
    assert files["model.txt"].decode() == f"{pushed}@{revision}\n" and re.fullmatch(
        "[0-9a-f]{40}", revision
    )
    matter = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert (
        matter["models"] == [pushed] and matter["sdk"] == "gradio" and matter["app_file"] in files
    )
    assert (
        matter["sdk_version"]
        == re.search(r"^gradio==(\S+)", files["requirements.txt"].decode(), re.M)[1]
    )
    assert len(matter["short_description"]) <= 60 and matter["suggested_hardware"] == "cpu-basic"
    assert {"pipeline/hub/push.py", "LICENSE", "NOTICE"} < files.keys() and not [
        path for path in files if "test" in path
    ]
    for path, content in files.items():
        (place / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (place / "space" / path).write_bytes(content)
    port = get_free_port()
    world.requests.clear()
    host = "127.0.0.2"  # whatever the Space says
    direct = f"127.0.0.1,{host}"
    env = world.env(
        place / "space-home",
        GRADIO_SERVER_NAME=host,
        GRADIO_SERVER_PORT=str(port),
        NO_PROXY=direct,
        no_proxy=direct,
    )
    with subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=place / "space",
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            deadline, page = time.monotonic() + 60, ""
            while not page and time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(httpx.ConnectError):
                    page = httpx.get(f"http://{host}:{port}/config", trust_env=False).text
                time.sleep(0.2)
        finally:
            process.terminate()
            said = process.communicate()[0]
    assert "Model: `tiny`" in page, said
    asked = {path for _, path in world.requests if "/resolve/" in path}
    assert (
        asked
        and all(f"/resolve/{revision}/" in path for path in asked)
        and not [p for p in asked if p.endswith(".py")]
    )


def test_no_token_is_told_to_anybody(world, owner, stranger, place, run):
    assert "may not write to somebody/else" in refused(
        owner, f"hub.push({str(run.folder)!r}, 'somebody/else')"
    )
    assert CANARY not in "".join(owner.heard + stranger.heard)
    for path in (path for path in place.rglob("*") if path.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path
    for (kind, name), repo in world.repos.items():
        for tree in repo.commits.values():
            assert not [
                path for path, (content, _) in tree.items() if CANARY.encode() in content
            ], (kind, name)
    config = Config(hub=HubConfig("a/b", token=CANARY))
    assert CANARY not in f"{config}{config.to_yaml()}{config.to_dict()}"
