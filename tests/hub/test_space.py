"""A Space serves one commit of a model, and is not made if it could not start."""

import contextlib
import json
import re
import subprocess
import sys
import time
from importlib.metadata import requires

import httpx
import pytest
import yaml
from hub_world import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.distributed.elastic.utils.distributed import get_free_port

from pipeline.hub import space
from pipeline.hub.client import HubError
from pipeline.hub.space import (
    ZERO_GPU,
    push_space,
    required_gradio,
    space_readme,
    space_requirements,
)

COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def test_space_readme_has_metadata_that_the_hub_takes():
    files = ["images/a.png", "model_index.json", "images/two hearts.png"]
    readme = space_readme("tester/tiny", "0" * 40, files)
    metadata = yaml.safe_load(readme.split("---\n")[1])
    assert metadata["title"] == "tiny" and metadata["models"] == ["tester/tiny"]
    assert metadata["sdk"] == "gradio" and (ROOT / metadata["app_file"]).is_file()
    assert {metadata["colorFrom"], metadata["colorTo"]} <= COLOURS
    assert metadata["license"] == "apache-2.0" and len(metadata["emoji"]) == 1
    assert len(metadata["short_description"]) <= 60
    assert metadata["suggested_hardware"] == ZERO_GPU
    assert metadata["python_version"] in ("3.12.12", "3.10.13")  # all that ZeroGPU has
    assert metadata["startup_duration_timeout"] == "1h"
    preloaded = "tester/tiny images/a.png,model_index.json " + "0" * 40
    assert metadata["preload_from_hub"] == [preloaded]
    assert metadata["thumbnail"].endswith("/tester/tiny/resolve/" + "0" * 40 + "/images/a.png")
    assert "`tester/tiny` at commit `" + "0" * 40 in readme


def test_space_readme_pins_the_gradio_that_is_required():
    pinned = re.search(r"^gradio==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert required_gradio() == pinned
    assert f"sdk_version: {pinned}\n" in space_readme("a/b", "0" * 40, [])


def test_space_requirements_agree_with_what_the_builder_adds():
    """The builder adds gradio[oauth,mcp] and brings torch."""
    lines = [Requirement(line) for line in space_requirements().splitlines() if line[:1] != "#"]
    ours = {canonicalize_name(line.name): line.specifier for line in lines}
    assert not ours["torch"]
    for extra in ("oauth", "mcp"):
        for text in requires("gradio"):
            theirs = Requirement(text)
            pin = str(ours.get(canonicalize_name(theirs.name), "")).removeprefix("==")
            if pin and (theirs.marker is None or theirs.marker.evaluate({"extra": extra})):
                assert theirs.specifier.contains(pin), (text, pin)


def test_push_space_names_both_ways_out_of_a_402(hub, owner, pushed):
    argv = ("tester/no-pro", "--model", pushed)
    code, output = owner.command("space", *argv, "--hardware", "cpu-basic")
    assert code == 1 and "402" in output
    assert f"--hardware {ZERO_GPU}" in output and "https://huggingface.co/pro" in output
    assert ("spaces", "tester/no-pro") not in hub.repos


def test_push_space_refuses_to_run_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "PROJECT_ROOT", tmp_path)
    with pytest.raises(HubError, match=str(tmp_path)):
        push_space("tester/space", "tester/tiny")


def test_push_space_refuses_what_could_not_start(hub, owner, pushed):
    index = json.loads(hub.files("models", pushed)["model_index.json"])
    flux = json.dumps(index | {"_class_name": "FluxPipeline"}).encode()
    hub.add("tester/flux", {"model_index.json": flux})
    hub.add("tester/nothing", {"README.md": b""})
    for model, culprit in (
        ("tester/flux", "FluxPipeline"),
        ("tester/nothing", "tester/nothing has no model_index.json"),
    ):
        message = owner.error(f"push_space('tester/broken', {model!r})")
        assert message.startswith("ModelError: ") and culprit in message
    assert ("spaces", "tester/broken") not in hub.repos


def test_push_space_warns_of_a_private_model(hub, owner, pushed):
    hub.add("tester/hidden", hub.files("models", pushed), private=True)
    code, output = owner.command(
        "space", "tester/hidden-demo", "--model", "tester/hidden", "--private"
    )
    assert code == 0 and output.endswith("/spaces/tester/hidden-demo")
    assert "tester/hidden is private or gated" in output and "HF_TOKEN" in output
    assert hub.repos["spaces", "tester/hidden-demo"].private


@pytest.mark.slow
def test_push_space_serves_the_commit_it_is_pinned_to(hub, owner, place, pushed):
    code, output = owner.command("space", "tester/demo", "--model", pushed)
    assert code == 0 and output.endswith("/spaces/tester/demo")
    files = hub.files("spaces", "tester/demo")
    revision = hub.repos["models", pushed].refs["main"]
    assert files["model.txt"].decode() == f"{pushed}@{revision}\n"
    assert re.fullmatch("[0-9a-f]{40}", revision)
    readme = files["README.md"].decode()
    (preload,) = yaml.safe_load(readme.split("---\n")[1])["preload_from_hub"]
    name, preloaded, commit = preload.split(" ")
    assert (name, commit) == (pushed, revision)
    assert "unet/diffusion_pytorch_model.safetensors" in preloaded.split(",")
    assert not [path for path in preloaded.split(",") if path.endswith(".py")]
    assert files["requirements.txt"].decode() == space_requirements()
    needed = {"app.py", "pipeline/hub/push.py", "pipeline/hub/model_card_template.md"}
    assert needed | {"LICENSE", "NOTICE", "requirements.txt"} < files.keys()
    assert not [path for path in files if "test" in path]
    for path, content in files.items():
        (place / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (place / "space" / path).write_bytes(content)
    hub.requests.clear()
    assert "Model: `tiny`" in served_config(hub, place)
    asked = {path for _, path in hub.requests if "/resolve/" in path}
    assert asked and all(f"/resolve/{revision}/" in path for path in asked)
    assert not [path for path in asked if path.endswith(".py")]


def served_config(hub, place):
    """Start the app of the folder `space` as a Space does and return its Gradio config."""
    host = "127.0.0.2"  # as the Space's environment says
    port = get_free_port()
    direct = f"127.0.0.1,{host}"
    settings = {"GRADIO_SERVER_NAME": host, "GRADIO_SERVER_PORT": str(port)}
    env = hub.env(place / "space-home", **settings, NO_PROXY=direct, no_proxy=direct)
    with subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=place / "space",
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        config = ""
        deadline = time.monotonic() + 90
        try:
            while not config and time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(httpx.ConnectError):
                    config = httpx.get(f"http://{host}:{port}/config", trust_env=False).text
                time.sleep(0.2)
        finally:
            process.terminate()
            output = process.communicate()[0]
    return config or output
