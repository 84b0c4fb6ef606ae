"""What the tests of sharing have in common: processes with their own caches, and small helpers."""

import contextlib
import json
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from hub_stub import HubStub

from pipeline.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
)
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.hub import model_card
from pipeline.models import build, lora
from pipeline.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
CANARY = "hf_canary_Jq3xT"  # the account's token, which must appear nowhere
REQUEST = "'red heart', w=1.0, seed=7, num_inference_steps=2, output_type='np'"
PICKLE = pickle.dumps(SimpleNamespace(w=1.0))
LISTENER = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    output, done = io.StringIO(), True
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            exec(json.loads(line), globals())
        except BaseException:
            traceback.print_exc()
            done = False
    print(json.dumps([done, output.getvalue()]), flush=True)
"""


class Process:
    """A Python process that runs pieces of code; it returns their output and raises on an error."""

    def __init__(self, env: dict[str, str], cwd: Path, *flags: str):
        cwd.mkdir()
        self.cwd = cwd
        self.outputs = []
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

    def __call__(self, code: str) -> str:
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, (self.cwd / "stderr.txt").read_text()[-3000:]
        done, output = json.loads(line)
        self.outputs.append(output)
        assert done, output[-3000:]
        return output

    def command(self, *argv: object) -> tuple[int, str]:
        """Run `direct-jump ARGV...` and return (exit code, output)."""
        output = self(f"print(main({[str(value) for value in argv]!r}))")
        *lines, code = output.splitlines()
        return int(code), "\n".join(lines)

    def error(self, code: str) -> str:
        """Return "TYPE: message" of the ValueError that a piece of code raises."""
        output = self(
            f"try:\n    {code}\n"
            "except ValueError as error:\n    print('raised', type(error).__name__ + ':', error)\n"
            "else:\n    print('nothing')"
        )
        assert "raised " in output, output
        return output.split("raised ")[1]

    def images(self, pipe: str = "pipe") -> np.ndarray:
        """Return what a pipeline of the process samples for REQUEST."""
        self(f"{pipe}.set_progress_bar_config(disable=True)")
        self(f"np.save('images.npy', {pipe}({REQUEST}).images)")
        return np.load(self.cwd / "images.npy")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def assert_same_images(a: np.ndarray, b: np.ndarray) -> None:
    """Compare images of two processes, which may use different numbers of threads."""
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@contextlib.contextmanager
def full_disk():
    """Make every write past 4096 bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def python_blocks(card: str) -> list[str]:
    """Return the Python of a card, one piece after another."""
    return re.findall(r"```python\n(.*?)```", card, re.S)


def commit_count(hub: HubStub, name: str, kind: str = "models") -> int:
    """Return the commits of a repository after the one that created it."""
    return len(hub.repos[kind, name].commits) - 1


def folder_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a folder by its relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def make_adapter_run(base: str, pipe: TextToImagePipeline, folder: Path) -> RunFolder:
    """Make the run of an adapter of a base model, which the pipeline holds."""
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
    images = SimpleNamespace(report="425 images")
    facts = {"base_model": base, "base_model_relation": "adapter"}
    model_card.write_card(config, run, pipe, images, 60.0, **facts)
    return run


# ---- promises of sharing, each checked in a test of its own and again with the code broken


def check_no_pickle_is_requested(hub: HubStub, owner: Process, pushed: str) -> str:
    """Loading a model that has code and a pickle requests neither; return the model's name."""
    name = f"mallory/same-{len(hub.repos)}"  # a new one, of which nothing is cached
    harmful = f"open({str(owner.cwd / 'ran')!r}, 'w')\n".encode()
    files = {
        path: harmful if path.endswith(".py") else content
        for path, content in hub.files("models", pushed).items()
    }
    hub.add(name, files | {"unet/extra.bin": PICKLE})
    hub.requests.clear()
    owner(f"pipe = load_pipeline({name!r})")
    owner("assert type(pipe.scheduler).__module__ == 'pipeline.diffusion.scheduler'")
    assert not [path for _, path in hub.requests if path.endswith((".py", ".bin"))]
    assert not (owner.cwd / "ran").exists()
    return name


def check_revision_is_kept(hub: HubStub, owner: Process, pushed: str) -> None:
    """A model loads at the commit that is named, not at the newest."""
    files = hub.files("models", pushed)
    old = hub.add("mallory/moving", files)
    index = json.loads(files["model_index.json"]) | {"w": 9.0}
    changed = files | {"model_index.json": json.dumps(index).encode()}
    tree = {path: (data, path.endswith(".safetensors")) for path, data in changed.items()}
    hub.repos["models", "mallory/moving"].add_commit(tree, "stronger", "main")
    for at, w in (("", 9.0), (f"@{old}", 1.0), ("@main", 9.0)):
        owner(f"assert load_pipeline('mallory/moving{at}').config.w == {w}")


def check_shards_are_replaced(hub: HubStub, owner: Process, pushed: str) -> None:
    """Weights in one file replace shards, whose index would win over them."""
    hub.repos.pop(("models", "tester/resharded"), None)
    owner(f"pipe = load_pipeline({pushed!r})")
    owner("pipe.push_to_hub('tester/resharded', max_shard_size='100KB')")
    shards = {name for name in hub.files("models", "tester/resharded") if "-of-" in name}
    assert [name for name in shards if name.startswith("unet/")]
    owner("pipe.push_to_hub('tester/resharded')")
    files = hub.files("models", "tester/resharded")
    assert "unet/diffusion_pytorch_model.safetensors" in files
    assert not [name for name in files if "-of-" in name or name.endswith(".index.json")]


def check_token_is_hidden(hub: HubStub, owner: Process, pushed: str) -> None:
    """The settings do not show the token that they hold."""
    owner(f"config = Config(hub=HubConfig('a/b', token={CANARY!r}))")
    owner("text = f'{config}{config.to_yaml()}{config.to_dict()}'")
    owner(f"assert {CANARY!r} not in text")
