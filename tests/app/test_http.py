"""Requests that the demo refuses, and files that it does not give away."""

import json
import re
import socket
import time
from pathlib import Path

import gradio as gr
import httpx
import pytest
from demo_client import GOOD, JSON_HEADERS, call, create, file_data, trigger, upload, web
from serving_data import png_bytes

import app
from pipeline.serving.model_store import ModelStore
from pipeline.serving.server import MAX_BODY_BYTES
from pipeline.serving.temp_files import delete_older_files


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"steps": 3.7}, "3.7"),
        ({"steps": True}, "True"),
        ({"steps": 0}, "0"),
        ({"steps": None}, "None"),
        ({"steps": 10**400}, "10000"),
        ({"w": float("nan")}, ""),
        ({"w": float("inf")}, ""),
        ({"w": "2"}, "'2'"),
        ({"w": [2]}, "[2]"),
        ({"prompt": {"a": 1}}, "{'a': 1}"),
        ({"prompt": None}, "None"),
        ({"prompt": ["red"]}, "['red']"),
        ({"prompt": "x" * 501}, "501"),
        ({"seed": None}, "None"),
        ({"seed": -1}, "-1"),
        ({"images": 1000}, "1000"),
        ({"images": 4, "steps": 1000}, "4000"),
        ({"eta": -0.1}, "-0.1"),
        ({"low": 0.9, "high": 0.1}, "0.9 to 0.1"),
        ({"think": 0}, "0"),
        ({"think": "4"}, "'4'"),
        ({"images": 2, "think": 4}, "2"),
        ({"steps": 65, "think": 16}, "1040"),
        ({"denoiser": {}}, "{}"),
        ({"denoiser": "../etc"}, "../etc"),
        ({"prompt": "purple", "denoiser": "exact"}, "purple"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_create_refuses_a_bad_value_by_name(url, change, value):
    status, event, data = create(url, **change)
    assert (status, event) == (200, "error")
    name = "exact" if value == "purple" else next(iter(change))
    assert name in data["error"]
    assert value in data["error"]
    assert create(url)[1] == "complete"


def test_create_quotes_a_prompt_without_its_markup(url):
    """Gradio renders a message as HTML."""
    _, event, data = create(url, prompt="<b>red</b>", denoiser="exact")
    assert event == "error"
    assert "‹b›red‹/b›" in data["error"]
    assert "<" not in data["error"]


@pytest.mark.parametrize(
    ("data", "event", "words"),
    [
        # Gradio itself refuses too few arguments, without a message.
        ([], "error", '{"error": null}'),
        (["red heart"], "error", '{"error": null}'),
        ([*GOOD.values(), 1, 2, 3], "complete", "red heart, seed 7"),
        ([None] * 13, "error", "prompt must be a text, got None"),
        ([{}] * 13, "error", "prompt must be a text, got {}"),
    ],
)
def test_create_survives_missing_and_surplus_arguments(url, data, event, words):
    status, got, answer = call(url, "create", *data)
    assert (status, got) == (200, event)
    assert words in json.dumps(answer)
    assert create(url)[1] == "complete"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"data": 7}', b'{"data": null}', b"\xff\xfe", b'{"data": "\\ud83d"}'],
)
def test_refuse_malformed_body_is_no_server_error(url, body):
    address = f"{url}/gradio_api/call/create"
    answer = web.post(address, content=body, headers=JSON_HEADERS)
    assert answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("sweep", ("red heart", 3, 171, "network", 0), "1026"),
        ("forward", ("red heart", 1001, 0, False, None, 0), "t must be a whole number"),
        ("forward", ("purple", 5, 0, False, None, 0), "purple"),
        ("forward", ("red heart", 5, 0, False, file_data("/etc/passwd"), 0), '{"error": null}'),
        ("backward", ("red heart", 1.0, 20, 1.0, 0.5, "network", 0), "0.5"),
    ],
)
def test_endpoints_refuse_bad_values(url, name, data, words):
    status, event, answer = call(url, name, *data)
    assert (status, event) == (200, "error")
    assert words in json.dumps(answer)
    assert "root:" not in json.dumps(answer)


def test_forward_reads_uploaded_files_only(url, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png_bytes())
    status, event, _data = call(url, "forward", "red heart", 5, 0, False, file_data(path), 0)
    assert (status, event) == (200, "error")


def test_serve_limits_the_body_of_a_request(url):
    address = f"{url}/gradio_api/call/create"
    try:
        answer = web.post(address, content=b"x" * 50_000_000, headers=JSON_HEADERS)
        assert answer.status_code == 413
    except httpx.WriteError:
        # The server closed the connection before it had received everything.
        pass
    chunks = (b"x" * 100_000 for _ in range(MAX_BODY_BYTES // 100_000 + 2))
    assert web.post(address, content=chunks).status_code == 413
    files = {"files": ("a.png", b"x" * (MAX_BODY_BYTES + 1))}
    assert web.post(f"{url}/gradio_api/upload", files=files).status_code == 413
    assert create(url)[1] == "complete"


def test_forward_reports_an_upload_that_has_expired(server):
    url, _server, files = server
    uploaded = upload(url, png_bytes((16, 16)))
    path = Path(uploaded["path"])
    assert files in path.parents
    assert call(url, "forward", "", 5, 0, False, uploaded, 0)[1] == "complete"
    path.unlink()
    _, event, data = call(url, "forward", "", 5, 0, False, uploaded, 0)
    assert event == "error"
    assert "expired" in data["error"]


@pytest.mark.parametrize(
    ("value", "visible"), [(None, False), (1, False), (2, True), (99, True), ("4", False)]
)
def test_search_budget_shows_the_search_from_two(url, value, visible):
    status, data = trigger(url, "budget", "change", value)
    assert status == 200
    assert data[0]["visible"] is visible


def test_report_errors_shows_only_the_id_of_a_server_error(url, store, monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(store.session().trained.unet, "forward", broken)
    status, event, data = create(url)
    assert (status, event) == (200, "error")
    assert "secret" not in json.dumps(data)
    error_id = re.search(r"\b([0-9a-f]{8})\b", data["error"])[1]
    assert error_id in caplog.text
    assert "a secret of the server" in caplog.text
    monkeypatch.undo()
    assert create(url)[1] == "complete"


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd",
        "file=../../etc/passwd",
        "file=%2e%2e/%2e%2e/etc/passwd",
        "file=http://127.0.0.1/",
        "file=app.py",
        "proxy=http://127.0.0.1/",
    ],
)
def test_serve_gives_no_other_files_and_servers(url, path):
    answer = web.get(f"{url}/gradio_api/{path}")
    assert answer.status_code in (400, 401, 403, 404), answer.text[:100]


def test_serve_has_no_monitoring_analytics_or_fonts(url):
    config = web.get(f"{url}/config").json()
    assert config["analytics_enabled"] is False
    assert config["show_error"] is False
    assert web.get(f"{url}/monitoring").status_code >= 400
    hosts = set(re.findall(r"https?://([\w.-]+)", web.get(url).text))
    assert not {h for h in hosts if "googleapis" in h or "gstatic" in h}, hosts


def test_serve_listens_on_one_address_only(url):
    """On Linux all of 127.0.0.0/8 reaches a server that listens on every address."""
    port = int(url.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_checkpoint_slider_follows_the_saved_checkpoints(monkeypatch):
    """A slider refuses a value outside its range at every tick of its timer."""
    store = ModelStore(None)
    steps = [100, 200]
    store.follows = True
    monkeypatch.setattr(store, "steps", lambda: steps)
    with gr.Blocks() as demo:
        app.checkpoint_slider(store, demo)
    (listener,) = (fn for fn in demo.fns.values() if fn.name == "refresh")
    (timer,) = (block for block in demo.blocks.values() if isinstance(block, gr.Timer))
    assert (timer._id, "tick") in listener.targets
    assert timer.active
    assert 0 < timer.value <= 60
    assert "load" in {event for _, event in listener.targets}

    def refreshed(value, follow):
        slider = listener.fn(value, follow)
        return slider.minimum, slider.value

    assert "value" not in listener.fn(None, False).constructor_args, "an emptied number stays empty"
    assert refreshed(None, True) == (100, 200)
    assert refreshed(100, False) == (100, 100)
    steps[:] = [250]  # Gradio wants the ends of a slider to differ
    assert refreshed(100, False) == (0, 100)
    assert refreshed(100, True) == (0, 250)
    assert store.step_range() == (0, 250, 250)
    steps[:] = [500, 600]
    assert refreshed(100, False) == (500, 500)
    assert refreshed(100, True) == (500, 600)
    assert refreshed(550, False) == (500, 550)


def test_delete_older_files_keeps_the_demo_working(server):
    url, _server, files = server
    before = set(files.rglob("*"))
    assert create(url, seed=4711)[1] == "complete"
    created = [path for path in files.rglob("*") if path not in before]
    assert len(created) >= 2, "an image in a folder"
    delete_older_files(str(files), time.time() - 60)
    assert all(path.exists() for path in created)
    delete_older_files(str(files), time.time() + 1)
    assert files.is_dir()
    assert not list(files.iterdir())
    assert create(url, seed=4711)[1] == "complete"
