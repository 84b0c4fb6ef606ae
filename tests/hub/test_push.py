"""A push is one commit of what other users need; it fails early, and the next push completes it."""

import json
import shutil
import subprocess
import sys

import pytest
from hub_stub import LOST
from hub_world import CANARY, ROOT, commit_count, full_disk
from huggingface_hub import ModelCard
from tiny import tiny_pipeline

from pipeline import TextToImagePipeline, load_pipeline
from pipeline.config import Config, HubConfig, ModelConfig
from pipeline.hub import model_card
from pipeline.hub import push as push_module
from pipeline.hub.client import HubError
from pipeline.models import loading
from pipeline.runs.folder import IMAGES_FOLDER

FILES = {
    "README.md",
    "captions.py",
    "guidance.py",
    "hub_format.py",
    "images/prompt-0.png",
    "images/prompt-1.png",
    "images/samples.png",
    "images/training.png",
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
}


def test_push_is_one_commit_of_exactly_what_users_need(hub, pushed):
    assert commit_count(hub, pushed) == 1
    assert set(hub.files("models", pushed)) == FILES
    index = json.loads(hub.files("models", pushed)["model_index.json"])
    assert index["_class_name"] == ["pipeline", "TextToImagePipeline"]
    assert index["scheduler"] == ["scheduler", "DDPMScheduler"]


def test_save_pretrained_hides_where_the_model_was(run, tmp_path):
    loading.load_from_folder(run.pipeline).save_pretrained(tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert str(run.pipeline).encode() not in path.read_bytes(), path
    assert "local" not in (tmp_path / "tokenizer" / "tokenizer_config.json").read_text()


def test_push_hides_where_things_lay_here(hub, owner, pushed, adapter, local_adapter, place):
    """The settings of these runs have absolute paths, in `output` at least."""
    owner(f"push({str(adapter.folder)!r}, 'tester/hiding')")
    owner(f"push({str(local_adapter.folder)!r}, 'tester/hiding-base', base={pushed!r})")
    for name in (pushed, "tester/hiding", "tester/hiding-base"):
        for path, content in hub.files("models", name).items():
            assert str(place).encode() not in content, (name, path)
        assert b"emoji-small" in hub.files("models", name)["training_config.yaml"]


def test_push_refuses_pickled_weights(hub, owner, place):
    source = place / "pickled"
    tiny_pipeline(w=1.0).save_pretrained(source, safe_serialization=False)
    message = owner.error(f"push({str(source)!r}, 'tester/pickled')")
    assert message.startswith(f"ModelError: {source} has no safetensors for its unet")
    assert ("models", "tester/pickled") not in hub.repos


def test_push_refuses_unfinished_models_before_any_request(hub, owner, adapter, run, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text(Config(name="unfinished").to_yaml())
    corrupt = tmp_path / "corrupt"
    shutil.copytree(run.folder, corrupt)
    (corrupt / model_card.TRAINING_FACTS).write_text("{")
    (corrupt / IMAGES_FOLDER / "samples.png").write_bytes(bytes(5000))
    hub.requests.clear()
    for source, code, culprit in (
        (tmp_path / "mistyped", 2, f"{tmp_path / 'mistyped'} does not exist"),
        (unfinished, 2, f"{unfinished} has no pipeline/model_index.json"),
        (adapter.adapter, 1, f"{adapter.adapter} is an adapter without its run"),
        (corrupt, 2, f"{corrupt / model_card.TRAINING_FACTS} is corrupt"),
    ):
        found, output = owner.command("push", source, "tester/never")
        assert found == code
        assert output.startswith(f"error: {culprit}")
        assert output.count("\n") == 0 and "complete" not in output
    assert hub.requests == []
    with full_disk(), pytest.raises(HubError, match=r"gathering .*[Tt]oo large"):
        push_module.push(corrupt / "pipeline", "tester/never")


def test_push_adds_the_text_encoder_of_the_settings(hub, owner, place, bert):
    folder = place / "bare"
    pipe = tiny_pipeline(caption_length=8)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder"] == [None, None]
    bare = TextToImagePipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="load_pipeline"):
        bare("red heart")
    with pytest.raises(ValueError, match="load_pipeline"):
        bare.push_to_hub("tester/bare")
    message = owner.error(f"push({str(folder)!r}, 'tester/bare')")
    assert message.startswith(f"HubError: {folder} has no text encoder")
    config = Config(name="bare", model=ModelConfig(text_encoder=str(bert)))
    (folder / "config.yaml").write_text(config.to_yaml())
    image = load_pipeline(folder)("red heart", num_inference_steps=2).images[0]
    assert image.size == (8, 8)
    owner(f"push({str(folder)!r}, 'tester/bare')")
    owner("assert load_pipeline('tester/bare').text_encoder is not None")
    assert "text_encoder/model.safetensors" in hub.files("models", "tester/bare")


def test_commit_folder_prints_no_progress_outside_a_terminal(hub, owner, run):
    """The client's bars would leave empty lines in a log."""
    hub.lfs.clear()
    # Loading a model hides them for the whole process.
    owner("from huggingface_hub import utils\nutils.enable_progress_bars()")
    code, output = owner.command("push", run.folder, "tester/silent")
    assert (code, output) == (0, f"{hub.endpoint}/tester/silent")
    owner("assert not utils.are_progress_bars_disabled()")


# ---- check_push, before training


def test_check_push_tries_account_and_repository(hub, owner):
    owner(
        "check_push(Config())\n"
        "check_push(Config(hub=HubConfig('tester/checked', private=True)))\n"
        "check_push(Config(hub=HubConfig('checked')))"
    )
    assert hub.repos["models", "tester/checked"].private
    assert hub.files("models", "tester/checked") == {}
    hub.add("somebody/old", {"README.md": b"theirs"})
    for repo_id, token, culprit in (
        ("tester/checked", "hf_wrong", "status 401"),
        ("tester/checked", "hf_reader", "can only read"),
        ("somebody/new", None, "somebody/new failed: status 403"),
        ("somebody/old", None, "somebody/old failed: status 403"),
    ):
        config = f"Config(hub=HubConfig({repo_id!r}, token={token!r}))"
        message = owner.error(f"check_push({config})")
        assert message.startswith("HubError: ") and culprit in message, message


def test_push_needs_a_token_from_somewhere(hub, owner, run):
    config = f"Config(hub=HubConfig('tester/own-token', private=True, token={CANARY!r}))"
    owner("token = os.environ.pop('HF_TOKEN')")
    try:
        check = "check_push(Config(hub=HubConfig('tester/no-token')))"
        assert "there is no token. Run `hf auth login`" in owner.error(check)
        assert "status 401" in owner.error(f"push({str(run.folder)!r}, 'tester/no-token')")
        owner(f"assert publish({config}, RunFolder({str(run.folder)!r})) == 0")
    finally:
        owner("os.environ['HF_TOKEN'] = token")
    assert commit_count(hub, "tester/own-token") == 1, "the settings' own token is enough"
    assert hub.repos["models", "tester/own-token"].private


NAMES = ("a/b/c", "a/no space", "-x", "a/b--c", "a/x.git", "a/v1.0", "", "a/ü")


@pytest.mark.parametrize("name", NAMES)
def test_hub_config_refuses_impossible_names(name):
    (problem,) = Config(hub=HubConfig(name)).problems()
    assert problem.startswith("hub.repo_id must")
    assert repr(name) in problem and "\n" not in problem


# ---- the Hub refuses, is busy, or is left in the middle


@pytest.mark.slow
def test_push_survives_a_busy_hub_and_a_lost_answer(hub, owner, run):
    hub.faults += [
        ("PUT", "/_lfs/", 503),
        ("POST", "/preupload/", 503),
        ("POST", "/commit/", 412),
        ("POST", "/commit/", LOST),
    ]
    hub.lfs.clear()
    for _ in range(2):  # the second push changes nothing
        assert owner.command("push", run.folder, "tester/busy", "--private")[0] == 0
        assert hub.faults == []
        assert commit_count(hub, "tester/busy") == 1
    assert hub.repos["models", "tester/busy"].private


def test_push_that_fails_gives_the_command_to_retry(hub, owner, run):
    hub.faults += [("POST", "/commit/", 500)] * 4
    code, output = owner.command("push", run.folder, "tester/failed")
    assert code == 1 and hub.faults == []
    assert output.endswith(f"`direct-jump push {run.folder} tester/failed`.")
    assert "Traceback" not in output
    assert hub.files("models", "tester/failed") == {}
    loading.load_from_folder(run.pipeline)


def test_push_reports_a_file_that_does_not_get_through(hub, owner, run):
    """The client wraps the Hub's answer in a RuntimeError of its own."""
    hub.lfs.clear()
    hub.faults += [("PUT", "/_lfs/", 400)] * 50
    try:
        code, output = owner.command("push", run.folder, "tester/stuck")
    finally:
        hub.faults.clear()
    assert code == 1 and "Traceback" not in output
    assert "status 400" in output and "injected fault" in output
    assert output.endswith("tester/stuck`.")
    assert hub.files("models", "tester/stuck") == {}


@pytest.mark.slow
def test_push_that_is_killed_is_complete_after_the_next(hub, owner, place, run, pushed):
    hub.lfs.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "push", str(run.folder), "tester/killed"],
        cwd=ROOT,
        env=hub.env(place / "killed-home"),
        stderr=subprocess.PIPE,
        text=True,
    )
    hub.watch = lambda method, path: process.kill() if method == "PUT" else None
    try:
        errors = process.communicate(timeout=60)[1]
    finally:
        hub.watch = None
    assert process.returncode == -9, errors
    assert hub.files("models", "tester/killed") == {}
    owner(f"push({str(run.folder)!r}, 'tester/killed')")
    found = hub.files("models", "tester/killed")
    wanted = hub.files("models", pushed)
    assert commit_count(hub, "tester/killed") == 1
    assert found.keys() == wanted.keys()
    assert all(found[path] == wanted[path] for path in found if path != "README.md")
    assert ModelCard(found["README.md"].decode()).data.pipeline_tag == "text-to-image"
