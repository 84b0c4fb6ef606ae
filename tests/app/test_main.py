"""The demo's command line, and the demo as a process of its own."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from demo_client import call, create, fetch_image, gallery_pixels, web
from serving_data import last, pixels
from torch.distributed.elastic.utils.distributed import get_free_port

import app
from pipeline.config import Config
from pipeline.serving.model_store import ModelStore
from pipeline.serving.requests import Request
from pipeline.serving.server import require_free_address

ROOT = Path(__file__).parents[2]


def refusal(capsys, *argv):
    """Return the one line that the command prints for bad input."""
    assert app.main(list(argv)) == 2
    _out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--port", "70000"), "70000"),
        (("--port", "-1"), "-1"),
        (("--port", "0"), "got 0"),
        (("--host", "no such host"), "--host no such host"),
        (("--host", "." * 300), "." * 300),
        (("--host", "192.0.2.1", "--port", "80"), f"port 80 ([Errno {errno.EADDRNOTAVAIL}]"),
        (("--port", "taken"), f"[Errno {errno.EADDRINUSE}]"),
    ],
)
def test_main_refuses_an_address_before_it_loads_a_model(tmp_path, capsys, argv, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        argv = [port if value == "taken" else value for value in argv]
        assert words in refusal(capsys, "--model", str(tmp_path / "nothing"), *argv)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_require_free_address_accepts_this_machine(host):
    require_free_address(host, None)


def test_main_reports_a_missing_model_in_one_line(tmp_path, capsys):
    missing = str(tmp_path / "nothing")
    assert missing in refusal(capsys, "--model", missing)


def test_main_reports_a_run_without_a_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(Config().to_yaml())
    assert f"{run} has no checkpoint" in refusal(capsys, "--model", str(run))


def test_card_has_neither_front_matter_nor_images(store):
    text = store.card()
    assert "card text" in text
    assert "CC-BY" in text
    assert "license: other" not in text
    assert "y.png" not in text


def test_card_loads_no_images_from_other_servers(tmp_path):
    words = (
        "![a](https://x.example/1.png) ![b][ref] ![ref] <img src='https://x.example/2.png'> "
        "<IMG\nSRC=3> kept\n\n[ref]: https://x.example/4.png"
    )
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n{words}")
    text = ModelStore(tmp_path).card()
    assert "kept" in text
    assert "![" not in text
    assert "<img" not in text.lower()
    assert "license: mit" not in text


# ---- a process of its own

# Hides the packages of requirements-dev.txt, except those that runtime packages need as well.
RUNTIME_ONLY = """
import importlib.machinery, re, sys
names = re.findall(r"^([\\w-]+)==", open("requirements-dev.txt").read(), re.M)
dev = {name.lower() for name in names} - {"gradio_client", "httpx", "packaging", "pyarrow"}
class Others(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in dev else super().find_spec(name, path, target)
default = importlib.machinery.PathFinder
sys.meta_path = [Others if finder is default else finder for finder in sys.meta_path]
import app
sys.exit(app.main(sys.argv[1:]))
"""


@contextlib.contextmanager
def own_process(model, files, **settings):
    """Run the demo without development packages and network: (address, process).

    settings: of its environment.
    """
    port = get_free_port()
    nowhere = "http://127.0.0.1:9"
    env = {**os.environ, "GRADIO_TEMP_DIR": str(files), "no_proxy": "127.0.0.1"}
    env |= {"http_proxy": nowhere, "https_proxy": nowhere}
    for name in ("HF_HUB_OFFLINE", "GRADIO_ANALYTICS_ENABLED"):  # set by conftest
        env.pop(name)
    env |= settings
    command = [sys.executable, "-c", RUNTIME_ONLY, "--model", str(model), "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as process:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(httpx.ConnectError):
                    web.get(f"http://127.0.0.1:{port}")
                    break
                time.sleep(0.2)
            else:
                process.terminate()
                pytest.fail(process.communicate()[0])
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.terminate()
            process.stdout.close()


@pytest.mark.slow
def test_main_serves_with_runtime_requirements_and_no_network(store, tmp_path):
    """It deletes its files when it is terminated."""
    with own_process(store.model, tmp_path) as (url, process):
        assert "Direct Jump" in web.get(url).text
        assert create(url)[1] == "complete"
        assert list(tmp_path.glob("direct-jump-*"))
        process.terminate()
        assert process.wait(20) == 143
        assert not list(tmp_path.glob("direct-jump-*"))


@pytest.mark.slow
def test_create_survives_a_full_disk(store, tmp_path):
    resource = pytest.importorskip("resource")
    with own_process(store.model, tmp_path) as (url, process):
        before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        # No file may have more than 64 bytes.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (64, before[1]))
        try:
            status, event, data = create(url, seed=99)
        finally:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
        assert (status, event) == (200, "error")
        assert str(tmp_path) not in json.dumps(data)
        assert create(url, seed=99)[1] == "complete"


@pytest.mark.slow
def test_main_draws_on_zero_gpu(store, tmp_path):
    """The stand-in forks, pickles, and takes the weights from the main process."""
    log = tmp_path / "log.jsonl"
    settings = {"SPACE_ID": "tester/demo", "SPACES_LOG": str(log)}
    settings["PYTHONPATH"] = str(ROOT / "tests" / "support" / "zero_gpu")
    with own_process(store.model, tmp_path, **settings) as (url, _process):
        status, event, (gallery, *_) = create(url, w=2.0)
        assert (status, event) == (200, "complete")
        image = fetch_image(gallery[0])
        assert json.loads(image.info["parameters"])["model"] == store.session().identity
        expected = last(store.session().create(Request("red heart", w=2.0, steps=4, seed=7)))
        assert np.array_equal(pixels([image]), pixels(expected.images))
        panels = call(url, "forward", "red heart", 500, 0, False, None, 0)[2][0]
        there = store.session().forward(store.session().find_image("red heart"), 500, 0)
        assert np.array_equal(gallery_pixels(panels), pixels(there.values()))
        _, event, data = create(url, steps=0)
        assert event == "error" and "steps" in data["error"]
    launch, *calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert set(launch["bound"]) == {"create", "sweep", "forward", "backward"}
    assert [entry["call"] for entry in calls] == ["create", "forward", "create"]
