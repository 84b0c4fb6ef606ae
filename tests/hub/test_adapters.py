"""An adapter is pushed alone, to a repository of its own, with a base that other users can load."""

import json

import numpy as np
import pytest
import yaml
from hub_world import assert_same_images, make_adapter_run, python_blocks
from huggingface_hub import ModelCard

from pipeline.config import Config, HubConfig, ModelConfig, TrainConfig
from pipeline.hub.client import HubError
from pipeline.hub.push import assemble_repository, check_push, require_public_base
from pipeline.models import loading


def push_on(owner, base, run):
    """Push an adapter on a base on the Hub, or on its own base; return (exit code, output)."""
    options = [] if base is None else ["--base", base]
    return owner.command("push", run.folder, f"tester/{run.folder.name}-on", *options)


def test_push_of_an_adapter_loads_on_its_base(hub, owner, pushed, adapter, expected):
    code, output = owner.command("push", adapter.folder, "tester/adapter")
    assert code == 0 and output.endswith("/tester/adapter")
    files = hub.files("models", "tester/adapter")
    assert set(files) >= {"pytorch_lora_weights.safetensors", "README.md", "training_config.yaml"}
    assert not [name for name in files if name.endswith(".py") or name.startswith("unet/")]
    data = ModelCard(files["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation) == (pushed, "adapter")
    assert "lora" in data.tags
    owner("adapted = load_pipeline('tester/adapter')")
    adapted = owner.images("adapted")
    owner("adapted.unload_lora_weights()")
    assert_same_images(owner.images("adapted"), expected)
    assert np.abs(adapted - expected).max() > 1e-2


def test_require_adapter_repo_refuses_a_pipelines(hub, owner, pushed, adapter):
    """Loaders of that name would still get the pipeline; check_push says so before training."""
    commits = len(hub.repos["models", pushed].commits)
    message = owner.error(f"push({str(adapter.folder)!r}, {pushed!r})")
    assert message.startswith(f"HubError: {pushed} holds a pipeline")
    config = (
        f"Config(hub=HubConfig({pushed!r}), model=ModelConfig(pretrained={pushed!r}), "
        "train=TrainConfig(method='lora'))"
    )
    assert owner.error(f"check_push({config})") == message
    assert len(hub.repos["models", pushed].commits) == commits


def test_adapter_usage_of_the_card_runs(hub, owner, outsider, pushed, adapter):
    owner(f"push({str(adapter.folder)!r}, 'tester/adapter')")
    (code,) = python_blocks(hub.files("models", "tester/adapter")["README.md"].decode())
    assert "w=1.5" in code
    check = "assert image.size == (16, 16) and pipe.get_list_adapters()"
    owner(f"{code}\n{check}")
    # Without this package, the base is loaded as its own card says, and the rest is the same.
    rest = code[code.index("pipe.load_lora_weights") :]
    outsider(f"{rest}\n{check}\npipe.unload_lora_weights()")


def test_adapter_usage_for_a_stock_base_runs(hub, owner, outsider, stable, place):
    pinned = f"{stable}@{hub.repos['models', stable].refs['main']}"
    pipe = loading.load_from_folder(place / "stable")
    run = make_adapter_run(pinned, pipe, place / "runs" / "of-stable")
    owner(f"push({str(run.folder)!r}, 'tester/of-stable')")
    readme = hub.files("models", "tester/of-stable")["README.md"].decode()
    (code,) = python_blocks(readme)
    assert "guidance_scale=2.5" in code and ModelCard(readme).data.base_model == stable
    outsider("original = pipe")
    try:
        outsider(f"{code}\nassert image.size and pipe.get_list_adapters()")
        outsider("assert type(pipe) is diffusers.StableDiffusionPipeline")
    finally:
        outsider("pipe = original")


def test_adapter_usage_for_a_folder_runs(local_adapter):
    (code,) = python_blocks(local_adapter.card.read_text())
    names = {}
    exec(code, names)
    assert names["image"].size == (16, 16) and names["pipe"].get_list_adapters()


def test_check_adapter_shapes_names_the_layer(hub, owner, pushed, adapter, local_adapter, place):
    files = hub.files("models", pushed)
    config = json.loads(files["unet/config.json"])

    def add(name, **changes):
        hub.add(name, files | {"unet/config.json": json.dumps(config | changes).encode()})

    add("tester/wide", block_out_channels=[8, 32])
    add("tester/no-attention", down_block_types=["DownBlock2D"] * 2)
    hub.add("tester/lone", {"pytorch_lora_weights.safetensors": b""})
    for base, code, culprits in (
        ("tester/gone", 2, ["tester/gone"]),
        ("tester/lone", 2, ["tester/lone", "model_index.json"]),
        ("tester/wide", 1, ["attn1.to_", "(32, 32)", "(16, 16)", str(place / "base")]),
        ("tester/no-attention", 1, ["down_blocks.1.attentions", "missing", "(16, 16)"]),
    ):
        found, output = push_on(owner, base, local_adapter)
        assert found == code and base in output, output
        assert all(culprit in output for culprit in culprits), output
        assert "warning" not in output and "is complete" not in output


def test_check_adapter_shapes_warns_of_other_weights(hub, owner, pushed, adapter, local_adapter):
    files = hub.files("models", pushed)
    weights = "unet/diffusion_pytorch_model.safetensors"
    hub.add("tester/other", files | {weights: files[weights][:-4] + b"1234"})
    _, output = push_on(owner, "tester/other", local_adapter)
    assert "warning: tester/other has other weights than" in output
    _, output = push_on(owner, "tester/other", adapter)
    assert f"warning: tester/other cannot be compared with {pushed}" in output


def test_push_names_the_base_on_the_hub(hub, owner, pushed, local_adapter, run, place, tmp_path):
    base = place / "base"
    code, output = push_on(owner, None, local_adapter)
    assert code == 1 and f"base model {base} is not on the Hub" in output
    code, output = push_on(owner, pushed, local_adapter)
    assert code == 0 and "warning" not in output, output
    files = hub.files("models", "tester/local-on")
    assert ModelCard(files["README.md"].decode()).data.base_model == pushed
    assert str(base).encode() not in files["README.md"]
    assert yaml.safe_load(files["training_config.yaml"])["model"]["pretrained"] == pushed
    owner("load_pipeline('tester/local-on')")
    with pytest.raises(HubError, match=r"Leave out --base a/b"):
        assemble_repository(run.folder, tmp_path / "new", "a/b")


def test_require_public_base_refuses_folders(tmp_path):
    require_public_base("a/b@v1")
    require_public_base("a/b@v1", ["a/b"])
    with pytest.raises(HubError, match="a/b@v1"):
        require_public_base("a/b@v1", ["c/d"])
    config = Config(
        model=ModelConfig(pretrained=str(tmp_path)),
        train=TrainConfig(method="lora"),
        hub=HubConfig("tester/x"),
    )
    with pytest.raises(HubError, match=str(tmp_path)):
        check_push(config)
