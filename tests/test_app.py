"""The web page as visitors, scripts and attackers meet it: a real server, the real client, a real browser."""

import contextlib
import gc
import io
import json
import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client
from PIL import Image, PngImagePlugin
from tiny import tiny_pipeline
from torch.distributed.elastic.utils.distributed import get_free_port

import app
from pipeline.config import Config, DataConfig
from pipeline.search import search
from pipeline.serving import session
from pipeline.serving.model_store import ModelStore
from pipeline.serving.png_metadata import read_png
from pipeline.serving.requests import Request

ROOT = Path(__file__).parent.parent
FIELDS = (
    "prompt",
    "negative_prompt",
    "w",
    "steps",
    "eta",
    "images",
    "seed",
    "randomise",
    "low",
    "high",
    "denoiser",
    "checkpoint",
    "think",
)
GOOD = dict(
    zip(FIELDS, ("red heart", "", 1.0, 4, 1.0, 1, 7, False, 0.0, 1.0, "network", 0, 1), strict=True)
)
web = httpx.Client(
    limits=httpx.Limits(max_keepalive_connections=0)
)  # a connection each, but the certificates are read once


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A tiny model beside the settings that it was trained with, on three squares."""
    folder = tmp_path_factory.mktemp("page")
    for name, color in {"red heart": "red", "green heart": "green", "blue circle": "blue"}.items():
        (folder / "squares" / "train").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), color).save(folder / "squares" / "train" / f"{name}.png")
    tiny_pipeline(caption_length=8, caption_dropout=0.1, w=1.0).save_pretrained(folder / "tiny")
    data = DataConfig(
        source=str(folder / "squares"), held_out=None, resolution=8, cache=str(folder / "cache")
    )
    (folder / "tiny" / "config.yaml").write_text(Config(name="tiny", data=data).to_yaml())
    (folder / "tiny" / "README.md").write_text(
        "---\nlicense: other\n---\n# Tiny\n<script>1</script> ![x](y.png) card text"
    )
    return ModelStore(folder / "tiny")


@contextlib.contextmanager
def served(shelf):
    """(address, Gradio's app, the folder of its files) of a server of a model."""
    with app.own_files() as files:
        demo = app.build_demo(shelf)
        server, address, _share = app.serve(demo, prevent_thread_lock=True, quiet=True)
        yield address.rstrip("/"), server, Path(files)
        demo.close()


@pytest.fixture(scope="module")
def server(shelf):
    with served(shelf) as found:
        yield found


@pytest.fixture(scope="module")
def url(server):
    """The address of a server of that model."""
    return server[0]


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def call(url, name, *data, client=None):
    """A raw request to an endpoint: (HTTP status, last event's name, its data)."""
    client = client or web
    body = json.dumps({"data": list(data)})  # json writes NaN and Infinity, as scripts do
    begun = client.post(
        f"{url}/gradio_api/call/{name}",
        content=body,
        headers={"content-type": "application/json"},
        timeout=60,
    )
    if begun.status_code != 200:
        return begun.status_code, None, None
    heard = client.get(f"{url}/gradio_api/call/{name}/{begun.json()['event_id']}", timeout=60).text
    events = re.findall(r"event: (\w+)\ndata: (.*)\n", heard)
    return 200, events[-1][0], json.loads(events[-1][1])


def sent(url, component, trigger, *data):
    """What the page itself sends: (HTTP status, the answer's data) of the event of a component, found by its label or its id."""
    config = web.get(f"{url}/config").json()
    (target,) = (
        c["id"]
        for c in config["components"]
        if component in (c["props"].get("elem_id"), c["props"].get("label"))
    )
    (found,) = (d["id"] for d in config["dependencies"] if [target, trigger] in d["targets"])
    asked = {"fn_index": found, "data": list(data), "session_hash": "a page"}
    answer = web.post(f"{url}/gradio_api/run/predict", json=asked, timeout=60)
    return answer.status_code, answer.json().get("data")


def image_of(url, entry):
    """The picture behind a gallery's entry."""
    return Image.open(io.BytesIO(web.get(entry["image"]["url"]).content))


# ---- one request, three ways


def test_page_client_and_python_give_the_same_pixels(url, shelf, tmp_path):
    asked = GOOD | {"negative_prompt": "blue", "w": 2.0, "eta": 0.5, "images": 2}
    expected = pixels(
        shelf.studio()
        .network(
            "red heart",
            negative_prompt="blue",
            w=2.0,
            num_inference_steps=4,
            eta=0.5,
            seed=7,
            num_images_per_prompt=2,
        )
        .images
    )
    status, event, (gallery, said, seed, curve, discarded) = call(url, "create", *asked.values())
    assert (status, event, seed, curve, discarded) == (200, "complete", 7, None, [])
    assert np.array_equal(pixels([image_of(url, entry) for entry in gallery]), expected)
    assert [entry["caption"] for entry in gallery] == ["red heart, seed 7", "red heart, seed 8"]
    assert re.fullmatch(r"\d+\.\d s · 16 network calls · seed 7", said)
    client = Client(url, verbose=False, download_files=tmp_path)
    gallery, *_ = client.predict(**asked, api_name="/create")
    assert np.array_equal(pixels([Image.open(entry["image"]) for entry in gallery]), expected)
    request, denoiser, model = read_png(gallery[0]["image"], T=1000)
    assert (denoiser, model) == ("network", shelf.studio().identity)
    assert request == Request("red heart", "blue", w=2.0, steps=4, eta=0.5, images=2, seed=7)


def test_the_readmes_script_draws(url, tmp_path):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert "http://127.0.0.1:7860" in code
    code = code.replace("http://127.0.0.1:7860", url) + "print(len(pictures), seed)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("1 7\n"), done.stdout + done.stderr


def test_the_endpoints_are_named_and_described(url):
    found = web.get(f"{url}/gradio_api/info").json()["named_endpoints"]
    assert set(found) == {"/create", "/sweep", "/forward", "/backward"}
    assert [p["parameter_name"] for p in found["/create"]["parameters"]] == list(FIELDS)
    assert all(endpoint["description"] for endpoint in found.values())


def test_a_randomised_seed_is_told_and_draws_the_same_again(url):
    _, _, (first, _, seed, *_) = call(url, "create", *(GOOD | {"randomise": True}).values())
    _, _, (again, *_) = call(url, "create", *(GOOD | {"seed": seed}).values())
    assert np.array_equal(pixels([image_of(url, first[0])]), pixels([image_of(url, again[0])]))


def test_the_sweep_and_the_walk_answer(url, shelf):
    _, event, (gallery, said, pair) = call(url, "sweep", "red heart", 3, 2, "network", 0)
    assert event == "complete" and [entry["caption"] for entry in gallery] == [
        f"w = {w:g}" for w in session.SWEEP_WS
    ]
    followed, ignored = (image_of(url, gallery[session.SWEEP_WS.index(w)]) for w in (0, -1))
    assert "20 network calls" in said and not np.array_equal(pixels([followed]), pixels([ignored]))
    assert np.array_equal(
        pixels([image_of(url, {"image": entry}) for entry in pair]), pixels([followed, ignored])
    )
    studio, seen = shelf.studio(), []
    for tell, told in ((False, ""), (True, "red heart")):
        _, event, (panels,) = call(url, "forward", "red heart", 500, 0, tell, None, 0)
        expected = studio.forward(studio.named("red heart"), 500, 0, told)
        assert event == "complete" and [entry["caption"] for entry in panels] == list(expected)
        seen.append(pixels([image_of(url, entry) for entry in panels]))
        assert np.array_equal(seen[-1], pixels(expected.values()))
    assert not np.array_equal(*seen), "the checkbox changes what is made of it"
    _, event, (noisy, clean) = call(url, "backward", "red heart", 1.0, 20, 1.0, 0, "exact", 0)
    assert event == "complete" and len(noisy) == len(clean) == session.STRIP_COLUMNS


def test_thinking_longer_answers_with_the_curve_and_the_discarded(url, shelf):
    asked = GOOD | {"steps": 20, "think": 6}
    _, event, (gallery, said, _seed, curve, discarded) = call(url, "create", *asked.values())
    assert event == "complete" and re.fullmatch(
        r"the best of 4 · \d+\.\d s · 232 network calls · seed 7", said
    )
    network = shelf.studio().network
    found = search.find_best(
        network, "red heart", 6 * 40, session.VERIFIER, w=1.0, steps=20, eta=1.0, seed=7
    )
    shown = pixels([image_of(url, entry) for entry in [*gallery, *discarded]])
    assert np.array_equal(shown, pixels(session.to_images(network, found.candidates)))
    scores = [float(entry["caption"]) for entry in discarded]
    assert scores == pytest.approx(found.scores[1:].tolist(), rel=1e-3), (
        "each its own, to four digits"
    )
    assert curve["plot"].startswith("data:image/png")


def reused(url, content):
    """What the page makes of a dropped PNG: its settings, and a word where another model drew it."""
    (path,) = web.post(f"{url}/gradio_api/upload", files={"files": ("drawn.png", content)}).json()
    dropped = {"path": path, "meta": {"_type": "gradio.FileData"}}
    status, (*settings, said) = sent(
        url, "Reuse the settings of a PNG from this page", "upload", dropped, 0
    )
    assert status == 200
    return settings, said


def test_a_dropped_picture_tells_every_setting(url):
    drew = GOOD | {
        "prompt": "green heart",
        "negative_prompt": "red heart",
        "w": 3.5,
        "steps": 9,
        "eta": 0.5,
        "images": 2,
        "seed": 123,
        "low": 0.2,
        "high": 0.8,
        "denoiser": "exact",
    }
    _, event, (gallery, *_) = call(url, "create", *drew.values())
    assert event == "complete"
    settings, said = reused(url, web.get(gallery[0]["image"]["url"]).content)
    assert settings == [drew[name] for name in (*FIELDS[:10], "think", "denoiser")] and not said


def test_a_dropped_picture_of_a_checkpoint_with_the_same_weights_is_this_models(url, shelf):
    digits = shelf.studio().identity.removeprefix("tiny ")
    for model, other in ((f"tiny at step 560 {digits}", False), ("tiny (00000000)", True)):
        text, content = PngImagePlugin.PngInfo(), io.BytesIO()
        text.add_text(
            "parameters",
            json.dumps(vars(Request("blue circle")) | {"denoiser": "network", "model": model}),
        )
        Image.new("RGB", (8, 8)).save(content, "PNG", pnginfo=text)
        _settings, said = reused(url, content.getvalue())
        assert (f"`{model}` drew that picture" in said) == other, said


# ---- requests that cannot be drawn

BAD = [
    ({"steps": 3.7}, "steps is 3.7"),
    ({"steps": True}, "steps is True"),
    ({"steps": 0}, "steps is 0"),
    ({"steps": None}, "steps is None"),
    ({"steps": 10**400}, "steps is 1000"),
    ({"w": float("nan")}, "w is "),
    ({"w": float("inf")}, "w is "),
    ({"w": "2"}, "w is"),
    ({"w": [2]}, "w is"),
    ({"prompt": {"a": 1}}, "prompt is"),
    ({"prompt": None}, "prompt is None"),
    ({"prompt": ["red"]}, "prompt is"),
    ({"prompt": "x" * 501}, "501 characters"),
    ({"seed": None}, "seed is None"),
    ({"seed": -1}, "seed is -1"),
    ({"images": 1000}, "images is 1000"),
    ({"images": 4, "steps": 1000}, "network steps"),
    ({"eta": -0.1}, "eta is -0.1"),
    ({"low": 0.9, "high": 0.1}, "interval"),
    ({"think": 0}, "think is 0"),
    ({"think": "4"}, "think is '4'"),
    ({"think": 4, "images": 2}, "expected 1 of either"),
    ({"think": 16, "steps": 65}, "network steps"),
    ({"denoiser": {}}, "denoiser is"),
    ({"denoiser": "../etc"}, "denoiser is"),
    ({"prompt": "purple", "denoiser": "exact"}, "is none of them"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda x: str(x)[:40])
def test_a_bad_request_is_told_what_is_wrong_with_it(url, change, message):
    status, event, said = call(url, "create", *(GOOD | change).values())
    assert (status, event) == (200, "error")
    assert message in json.dumps(said), said
    assert call(url, "create", *GOOD.values())[1] == "complete"


def test_a_prompt_comes_back_without_its_markup(url):
    """The page shows a message as HTML."""
    _, event, said = call(
        url, "create", *(GOOD | {"prompt": "<b>red</b>", "denoiser": "exact"}).values()
    )
    assert event == "error" and "‹b›red‹/b›" in said["error"] and "<" not in said["error"]


@pytest.mark.parametrize(
    "data, event, words",
    [
        ([], "error", '{"error": null}'),
        (["red heart"], "error", '{"error": null}'),
        ([*GOOD.values(), 1, 2, 3], "complete", "red heart, seed 7"),
        ([None] * 13, "error", "prompt is None, expected a text"),
        ([{}] * 13, "error", "prompt is {}, expected a text"),
    ],
)
def test_missing_and_surplus_arguments_are_no_server_error(url, data, event, words):
    """Too few are told nothing, as any error of Gradio's own."""
    status, heard, said = call(url, "create", *data)
    assert (status, heard) == (200, event)
    assert words in json.dumps(said), said
    assert call(url, "create", *GOOD.values())[1] == "complete"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"data": 7}', b'{"data": null}', b"\xff\xfe", b'{"data": "\\ud83d"}'],
)
def test_what_is_no_request_is_no_server_error(url, body):
    got = web.post(
        f"{url}/gradio_api/call/create", content=body, headers={"content-type": "application/json"}
    )
    assert got.status_code < 500, got.text


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("sweep", ("red heart", 3, 171, "network", 0), "6 pictures of 171 steps"),
        (
            "forward",
            ("red heart", 1001, 0, False, None, 0),
            "t is 1001, expected a whole number from 1 to 1000",
        ),
        ("forward", ("purple", 5, 0, False, None, 0), "expected one of the set"),
        (
            "forward",
            (
                "red heart",
                5,
                0,
                False,
                {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
                0,
            ),
            '{"error": null}',
        ),
        ("backward", ("red heart", 1.0, 20, 1.0, 0.5, "network", 0), "seed is 0.5"),
    ],
)
def test_bad_requests_to_the_other_endpoints(url, name, data, message):
    status, event, said = call(url, name, *data)
    assert (status, event) == (200, "error")
    assert message in json.dumps(said)
    assert "root:" not in json.dumps(said)


def test_a_picture_elsewhere_on_the_machine_is_not_read(url, tmp_path_factory):
    """Only what was uploaded is; this one would be drawn."""
    path = tmp_path_factory.mktemp("elsewhere") / "picture.png"
    Image.new("RGB", (16, 16), "red").save(path)
    upload = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    status, event, _said = call(url, "forward", "red heart", 5, 0, False, upload, 0)
    assert (status, event) == (200, "error")


def test_a_huge_body_is_refused_before_it_is_read(url):
    body = json.dumps({"data": ["x" * 50_000_000]}).encode()
    try:
        got = web.post(f"{url}/gradio_api/call/create", content=body)
        assert got.status_code == 413
    except httpx.WriteError:  # the server has closed the connection while it was still being told
        pass
    streamed = web.post(
        f"{url}/gradio_api/call/create", content=(b"x" * 100_000 for _ in range(30))
    )
    assert streamed.status_code == 413
    assert call(url, "create", *GOOD.values())[1] == "complete"


def test_a_dropped_file_that_is_deleted_meanwhile_is_told(server):
    url, _server, files = server
    content = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(content, "PNG")
    (path,) = web.post(
        f"{url}/gradio_api/upload", files={"files": ("a.png", content.getvalue())}
    ).json()
    upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert (
        files in Path(path).parents
        and call(url, "forward", "", 5, 0, False, upload, 0)[1] == "complete"
    )
    Path(path).unlink()
    _, event, said = call(url, "forward", "", 5, 0, False, upload, 0)
    assert (
        event == "error"
        and "the file is no longer here, expected one dropped within the hour" in said["error"]
    )


def test_an_emptied_number_box_is_no_error(url):
    for n, visible in ((None, False), (1, False), (2, True), (99, True), ("4", False)):
        status, data = sent(url, "think", "change", n)
        assert status == 200 and data[0]["visible"] is visible


def test_an_error_of_ours_is_told_by_its_number_alone(url, shelf, monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(shelf.studio().network.unet, "forward", broken)
    status, event, said = call(url, "create", *GOOD.values())
    assert (status, event) == (200, "error") and "secret" not in json.dumps(said)
    number = re.search(r"under (\w{8})", json.dumps(said))[1]
    assert number in caplog.text and "a secret of the server" in caplog.text
    monkeypatch.undo()
    assert call(url, "create", *GOOD.values())[1] == "complete"


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
def test_files_and_other_servers_are_out_of_reach(url, path):
    got = web.get(f"{url}/gradio_api/{path}")
    assert got.status_code in (400, 401, 403, 404), got.text[:100]


def test_nothing_is_monitored_shared_or_reported(url):
    config = web.get(f"{url}/config").json()
    assert config["analytics_enabled"] is False and config["show_error"] is False
    assert web.get(f"{url}/monitoring").status_code >= 400
    hosts = set(re.findall(r"https?://([\w.-]+)", web.get(url).text))
    assert not {h for h in hosts if "googleapis" in h or "gstatic" in h}, hosts


def test_it_listens_to_this_machine_alone(url):
    """On Linux all of 127.0.0.0/8 is this machine: what listens everywhere hears a call to its second address."""
    port = int(url.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_checkpoint_that_is_gone_is_not_asked_for(tmp_path, monkeypatch):
    """A slider refuses a value below its least, at every tick of its timer."""
    shelf, steps = ModelStore(None), [100, 200]
    shelf.follows = True
    monkeypatch.setattr(shelf, "steps", lambda: steps)
    with gr.Blocks() as demo:
        app.checkpoints(shelf, demo)
    (listener,) = (fn for fn in demo.fns.values() if fn.name == "refresh")
    (timer,) = (block for block in demo.blocks.values() if isinstance(block, gr.Timer))
    assert (timer._id, "tick") in listener.targets and timer.active and 0 < timer.value <= 60
    assert "load" in {trigger for _, trigger in listener.targets}
    refresh = listener.fn
    value = lambda *given: (found := refresh(*given), (found.minimum, found.value))[1]
    assert "value" not in refresh(None, False).constructor_args and value(None, True) == (
        100,
        200,
    ), "an emptied box stays so"
    assert value(100, False) == (100, 100)
    steps[:] = [250]  # alone: its two ends must not be the same
    assert (
        value(100, False) == (0, 100)
        and value(100, True) == (0, 250)
        and app.ends(steps) == (0, 250)
    )
    steps[:] = [500, 600]
    assert (
        value(100, False) == (500, 500)
        and value(100, True) == (500, 600)
        and value(550, False) == (500, 550)
    )


# ---- many at once


def test_an_abandoned_request_frees_the_model_within_a_second(url):
    long = GOOD | {"steps": 1000}
    with httpx.Client() as client:
        event = client.post(
            f"{url}/gradio_api/call/create", json={"data": list(long.values())}
        ).json()["event_id"]
        with client.stream("GET", f"{url}/gradio_api/call/create/{event}") as stream:
            next(stream.iter_lines())  # it draws
    began = time.monotonic()
    assert call(url, "create", *GOOD.values())[1] == "complete"
    assert time.monotonic() - began < 2


def test_a_request_after_stop_counts_its_own_calls_alone(url, shelf, monkeypatch):
    """Stop frees the queue's place at once; what its request was drawing goes on in its thread until the next preview."""
    monkeypatch.setattr(session, "PREVIEW_INTERVAL", 1.0)
    network = shelf.studio().network.unet
    slow = network.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    config = web.get(f"{url}/config").json()
    (index,) = (d["id"] for d in config["dependencies"] if d["api_name"] == "create")
    asked = {
        "fn_index": index,
        "data": list((GOOD | {"steps": 200}).values()),
        "session_hash": "left",
    }
    begun = web.post(f"{url}/gradio_api/queue/join", json=asked).json()
    with web.stream("GET", f"{url}/gradio_api/queue/data?session_hash=left", timeout=60) as stream:
        next(
            line for line in stream.iter_lines() if "process_generating" in line
        )  # 20 more calls until its next preview
        with ThreadPoolExecutor() as threads:
            stopped = threads.submit(
                web.post, f"{url}/gradio_api/cancel", json=asked | begun, timeout=60
            )
            _, event, (_gallery, said, *_) = call(url, "create", *GOOD.values())
            assert stopped.result().status_code == 200
    slow.remove()
    assert event == "complete" and "· 8 network calls ·" in said


def test_a_full_queue_leaves_the_schedules_plot_alone(url, shelf):
    body = json.dumps({"data": list(GOOD.values())})
    with shelf.studio().turn:  # nobody draws
        answers = [
            web.post(
                f"{url}/gradio_api/call/create",
                content=body,
                headers={"content-type": "application/json"},
            )
            for _ in range(app.QUEUE + 2)
        ]
        assert answers[-1].status_code == 503, "Queue is full"
        status, data = sent(url, "t", "change", 250)
    assert status == 200 and data[0]["plot"].startswith("data:image/png")
    assert sent(url, "t", "change", None) == (200, [{"__type__": "update"}]), "of an emptied box"
    assert sent(url, "t", "change", 1001)[0] == 500, "refused"
    for answer in answers[:-1]:
        if answer.status_code == 200:
            web.get(f"{url}/gradio_api/call/create/{answer.json()['event_id']}", timeout=60)


def test_plots_are_drawn_one_at_a_time(shelf, monkeypatch):
    """matplotlib is not made for threads."""
    draw, inside, most = app.encode_plot_to_base64, [], []

    def watched(figure):
        inside.append(1)
        most.append(len(inside))
        plot = draw(figure)
        inside.pop()
        return plot

    monkeypatch.setattr(app, "encode_plot_to_base64", watched)
    curves = shelf.studio().curves()
    with ThreadPoolExecutor(4) as threads:
        plots = list(threads.map(lambda t: app.plot_curves(curves, t), (1, 500, 1000, 1)))
    assert most == [1] * 4 and plots[0] == plots[3] != plots[1]


def test_the_oldest_of_many_sessions_is_forgotten(shelf, monkeypatch):
    monkeypatch.setattr(app, "SESSIONS", 3)
    with served(shelf) as (url, server, _files):
        for seed in range(5):
            assert call(url, "create", *(GOOD | {"seed": seed}).values())[1] == "complete"
        assert len(server.state_holder.session_data) == 3


@pytest.mark.slow
def test_fifty_clients_at_once_get_their_own_pictures_or_hear_that_the_queue_is_full(url, shelf):
    answers, guard = {}, threading.Lock()

    def visitor(seed):
        answer = call(url, "create", *(GOOD | {"seed": seed, "steps": 12}).values())
        with guard:
            answers[seed] = answer

    threads = [threading.Thread(target=visitor, args=(seed,)) for seed in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == 50
    drawn = {seed: data for seed, (_, event, data) in answers.items() if event == "complete"}
    assert app.QUEUE <= len(drawn) < 50
    for seed, (gallery, _said, told, *_) in drawn.items():
        own = shelf.studio().network("red heart", w=1.0, num_inference_steps=12, seed=seed).images
        assert told == seed and np.array_equal(pixels([image_of(url, gallery[0])]), pixels(own))
    for seed in answers.keys() - drawn.keys():
        status, event, data = answers[seed]
        assert status == 503 or (event == "error" and "full" in json.dumps(data)), answers[seed]
    assert call(url, "create", *GOOD.values())[1] == "complete"


@pytest.mark.slow
def test_memory_stays_where_it_is(url):
    def resident():
        gc.collect()
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    for i in range(80):
        assert call(url, "create", *(GOOD | {"seed": i}).values())[1] == "complete"
        if i == 20:
            before = resident()
    assert resident() < 1.1 * before


# ---- files


def test_old_files_of_the_page_are_deleted_and_their_folders_with_them(server):
    url, _server, files = server
    before = set(files.rglob("*"))
    assert call(url, "create", *(GOOD | {"seed": 4711}).values())[1] == "complete"
    old = [path for path in files.rglob("*") if path not in before]
    assert len(old) >= 2, "a picture in its folder"
    now = time.time()
    app.tidy(str(files), now - 60)
    assert all(path.exists() for path in old), "young ones stay"
    time.sleep(0.05)
    (files / "empty").mkdir()
    (files / "new").mkdir()
    (files / "new" / "image.png").write_bytes(b"1")
    app.tidy(str(files), now + 0.02)
    assert not any(path.exists() for path in old)
    assert {path.name for path in files.rglob("*")} == {"empty", "new", "image.png"}, (
        "a folder's file may be still to come"
    )
    app.tidy(str(files), time.time() + 1)
    assert files.is_dir() and not list(files.iterdir())
    assert call(url, "create", *(GOOD | {"seed": 4711}).values())[1] == "complete"


def test_an_error_of_one_round_is_not_the_last_round(tmp_path, monkeypatch, caplog):
    rounds, tidy, over = [], app.tidy, threading.Event()

    def failing(folder, before):
        rounds.append(before)
        if len(rounds) == 1:
            raise OSError("the disk is away")
        tidy(folder, before)
        over.set()

    (tmp_path / "old").write_text("")
    monkeypatch.setattr(app, "tidy", failing)
    monkeypatch.setattr(app, "ROUND", 0.01)
    monkeypatch.setattr(app, "AGE", -1)
    with caplog.at_level(logging.ERROR):
        app.tidying(str(tmp_path), over)
    assert len(rounds) == 2 and not list(tmp_path.iterdir()) and "the disk is away" in caplog.text


def test_the_pages_folder_is_its_own_and_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr(app, "ROUND", 0.01)
    monkeypatch.setattr(app, "AGE", -1)
    with app.own_files() as folder:
        theirs, ours = tmp_path / "shared" / "theirs.png", Path(folder) / "ours.png"
        for path in (theirs, ours):
            path.write_text("")
        deadline = time.monotonic() + 20
        while ours.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (
            not ours.exists()
            and os.environ["GRADIO_TEMP_DIR"] == folder
            and Path(folder).parent == tmp_path / "shared"
        )
    assert list((tmp_path / "shared").iterdir()) == [theirs] and os.environ[
        "GRADIO_TEMP_DIR"
    ] == str(tmp_path / "shared")


# ---- the command line


@pytest.mark.parametrize(
    "given, message",
    [
        (("--port", "70000"), "--port is 70000, expected 1 to 65535: leave it out"),
        (("--port", "-1"), "--port is -1, expected 1 to 65535: leave it out"),
        (("--port", "0"), "--port is 0, expected 1 to 65535: leave it out"),
        (("--host", "no such host"), "--host no such host cannot be listened to ("),
        (("--host", "." * 300), "cannot be listened to ("),
        (
            ("--host", "192.0.2.1", "--port", "80"),
            "--host 192.0.2.1 --port 80 cannot be listened to ([Errno 99]",
        ),
        (("--port", "taken"), "cannot be listened to ([Errno 98] Address already in use"),
    ],
)
def test_an_address_that_cannot_be_listened_to_is_said_before_a_model_is_loaded(
    tmp_path, capsys, given, message
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [str(taken.getsockname()[1]) if value == "taken" else value for value in given]
        assert app.main(["--model", str(tmp_path / "nothing"), *given]) == 2
    _out, err = capsys.readouterr()
    assert err.count("\n") == 1 and message in err and err.startswith("error: ")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_an_address_of_this_machine_is_fine(host):
    app.try_address(host, None)


def test_a_model_that_is_not_there_is_said_in_one_sentence(tmp_path, capsys):
    assert app.main(["--model", str(tmp_path / "nothing")]) == 2
    _out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "does not exist, expected" in err


def test_a_run_without_a_checkpoint_is_said_in_one_sentence(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(Config().to_yaml())
    assert app.main(["--model", str(tmp_path / "run")]) == 2
    assert "has no checkpoint yet, expected one at the least: wait" in capsys.readouterr()[1]


def test_the_page_shows_the_card_as_text(shelf):
    text = app.card(shelf)
    assert (
        "license: other" not in text
        and "y.png" not in text
        and "card text" in text
        and "CC-BY" in text
    )


RUNTIME_ONLY = """
import importlib.machinery, re, sys
dev = {name.lower() for name in re.findall(r"^([\\w-]+)==", open("requirements-dev.txt").read(), re.M)} - {"httpx"}
class Others(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in dev else super().find_spec(name, path, target)
sys.meta_path = [Others if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import app
sys.exit(app.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def alone(shelf, tmp_path_factory):
    """(address, process, its folder of files) of a page that has the runtime requirements alone and no network but itself."""
    port = get_free_port()
    files, nowhere = tmp_path_factory.mktemp("files"), "http://127.0.0.1:9"
    env = {
        **os.environ,
        "GRADIO_TEMP_DIR": str(files),
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "127.0.0.1",
    }
    for name in ("HF_HUB_OFFLINE", "GRADIO_ANALYTICS_ENABLED"):  # conftest's
        env.pop(name)
    command = [sys.executable, "-c", RUNTIME_ONLY, "--model", str(shelf.model), "--port", str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
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
            yield f"http://127.0.0.1:{port}", process, files
        finally:
            process.terminate()
            process.stdout.close()


def test_the_page_starts_with_the_runtime_requirements_alone_and_without_a_network(alone):
    url, _, _ = alone
    assert "Direct Jump" in web.get(url).text
    assert call(url, "create", *GOOD.values())[1] == "complete"


def test_a_full_disk_is_an_error_and_not_the_end(alone):
    url, process, files = alone
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(
        process.pid, resource.RLIMIT_FSIZE, (64, before[1])
    )  # no file may have more than 64 bytes
    try:
        status, event, said = call(url, "create", *(GOOD | {"seed": 99}).values())
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
    assert (status, event) == (200, "error") and str(files) not in json.dumps(said)
    assert call(url, "create", *(GOOD | {"seed": 99}).values())[1] == "complete"


def test_a_page_that_is_ended_takes_its_files_with_it(alone):
    _url, process, files = alone
    assert list(files.glob("direct-jump-*"))
    process.terminate()
    assert process.wait(20) == 143 and not list(files.glob("direct-jump-*"))


# ---- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.goto(url)
    page.locator("#prompt textarea").wait_for()
    yield page
    page.close()


@needs_browser
def test_enter_draws_a_picture(page):
    page.keyboard.type("red heart")  # the prompt has the focus
    page.keyboard.press("Enter")
    page.locator("#gallery img").first.wait_for()
    page.locator("#status", has_text="network calls").wait_for()
    page.locator("#generate").wait_for(state="visible")
    assert "2 of 6 tokens" in page.locator("#tokens").inner_text()


@needs_browser
def test_the_keyboard_alone_is_enough(page):
    """From the prompt onwards by Tab, sliders by arrows, buttons by Space, tabs by Enter."""

    def tab_to(selector, key="Tab"):
        for _ in range(60):
            page.keyboard.press(key)
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        pytest.fail(f"{selector} is not reached by {key}")

    page.keyboard.type("red heart")
    tab_to("#generate")
    tab_to("input[type=range]")
    before = page.evaluate("document.activeElement.value")
    page.keyboard.press("ArrowRight")
    assert float(page.evaluate("document.activeElement.value")) == float(before) + 0.25
    tab_to("#generate", "Shift+Tab")
    page.keyboard.press("Space")
    page.locator("#gallery img").first.wait_for()
    page.locator("#generate").wait_for(state="visible")
    page.locator("#prompt textarea").focus()
    tab_to("[role=tab]", "Shift+Tab")
    while "What w does" not in page.evaluate("document.activeElement.innerText"):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.locator("#sweep").wait_for()


@needs_browser
def test_stop_ends_the_drawing_and_the_page_goes_on(page):
    page.locator("#prompt textarea").fill("red heart")
    page.get_by_label("Steps").first.fill("250")
    page.get_by_label("Pictures").first.fill("4")
    page.locator("#generate").click()
    page.locator("#stop").click()
    page.locator("#generate").wait_for(state="visible")
    page.get_by_label("Steps").first.fill("2")
    page.locator("#generate").click()
    page.wait_for_function(
        "/^\\d+\\.\\d s/.test(document.querySelector('#status').innerText)"
    )  # without "step 3 of"


@needs_browser
def test_thinking_longer_shows_its_curve_and_can_be_stopped(page):
    page.locator("#prompt textarea").fill("red heart")
    assert not page.locator("#discarded").is_visible()
    think, steps = (
        page.get_by_label("number input for Think longer"),
        page.get_by_label("number input for Steps").first,
    )
    think.fill("16")
    steps.fill("64")
    steps.press("Tab")
    page.locator("#generate").click()
    page.locator("#stop").click()
    page.locator("#generate").wait_for(state="visible")
    think.fill("6")
    steps.fill("20")
    steps.press("Tab")
    page.locator("#generate").click()
    page.locator("#status", has_text="the best of 4").wait_for()
    page.locator("#curve img").wait_for()
    page.locator("#discarded img").nth(2).wait_for()


@needs_browser
def test_a_dropped_picture_brings_its_settings_back(page, url, tmp_path):
    settings = GOOD | {
        "prompt": "green heart",
        "seed": 123,
        "steps": 9,
        "w": 3.5,
        "eta": 0.5,
        "low": 0.2,
        "high": 0.8,
        "denoiser": "exact",
    }
    _, _, (gallery, *_) = call(url, "create", *settings.values())
    (tmp_path / "drawn.png").write_bytes(web.get(gallery[0]["image"]["url"]).content)
    page.get_by_text("More").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "drawn.png")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'green heart'")
    assert page.locator("#seed input").input_value() == "123"
    assert page.get_by_label("number input for Steps").first.input_value() == "9"
    for label, value in {
        "w, guidance": "3.5",
        "η": "0.5",
        "Guide from noise level": "0.2",
        "to noise level": "0.8",
    }.items():
        assert page.get_by_label(f"number input for {label}").first.input_value() == value, label
    assert page.get_by_role("radio", name="exact").first.is_checked()
    page.locator("#generate").click()
    page.locator("#status", has_text="seed 123").wait_for()


@needs_browser
def test_a_dropped_picture_of_another_model_is_told_apart(page, tmp_path):
    drew = vars(Request("blue circle")) | {"denoiser": "network", "model": "![<b>](x)"}
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", json.dumps(drew))
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=text)
    page.get_by_text("More").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "theirs.png")
    page.locator("#status", has_text="![‹b›](x) drew that picture; tiny (").wait_for()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'blue circle'")


@needs_browser
def test_the_sweep_shows_six_pictures(page):
    page.get_by_role("tab", name="What w does").click()
    page.locator("#sweep").click()
    page.locator("#sweep-gallery img").nth(5).wait_for()
    assert (
        page.locator(
            "#sweep-gallery .grid-container img, #sweep-gallery .thumbnail-item img"
        ).count()
        >= 6
    )


@needs_browser
def test_the_walk_shows_its_panels(page):
    page.get_by_role("tab", name="Walk the equations").click()
    page.locator("#noise").click()
    page.locator("#forward-gallery img").nth(4).wait_for()
    page.locator("#walk").click()
    page.locator("#strip img").nth(7).wait_for()


@needs_browser
def test_the_schedules_plot_is_there_and_follows_the_arrow_keys(page):
    page.get_by_role("tab", name="Walk the equations").click()
    plot = page.locator("#schedule img")
    before = plot.get_attribute("src")
    page.get_by_label("range slider for t", exact=True).focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "before => document.querySelector('#schedule img').src != before", arg=before
    )


@needs_browser
def test_a_picture_is_told_to_who_cannot_see_it(page):
    page.locator("#prompt textarea").fill("<i>red</i>")
    page.get_by_label("Randomise").uncheck()
    page.locator("#generate").click()
    page.locator("#gallery img[alt='<i>red</i>, seed 0']").first.wait_for()
    assert not page.locator("#gallery i").count()


@needs_browser
def test_markup_in_a_prompt_stays_text(page):
    page.get_by_text("More").click()
    page.get_by_role("radio", name="exact").first.check()  # which quotes what it does not know
    page.locator("#prompt textarea").fill('<img src=x onerror="document.title=1">')
    page.locator("#prompt textarea").press("Enter")
    page.get_by_text("‹img src=x").first.wait_for()
    page.wait_for_timeout(500)
    assert page.title().startswith("Direct Jump") and not page.locator("img[src='x']").count()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, url, scheme):
    page = browser.new_page(
        viewport={"width": 375, "height": 800}, color_scheme=scheme, has_touch=True
    )
    page.goto(url)
    page.locator("#prompt textarea").wait_for()
    for tab in ("Create", "What w does", "Walk the equations", "About"):
        button = page.get_by_role("tab", name=tab)
        if not button.is_visible():
            page.locator(".overflow-menu button").first.click()
            button = page.get_by_role("button", name=tab)
        button.click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, tab
    page.close()


def test_a_card_brings_nobody_elses_pictures(tmp_path):
    words = (
        "![a](https://x.example/1.png) ![b][ref] ![ref] <img src='https://x.example/2.png'> <IMG\nSRC=3> kept\n\n"
        "[ref]: https://x.example/4.png"
    )
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n{words}")
    said = app.card(ModelStore(tmp_path))
    assert (
        "kept" in said
        and "![" not in said
        and "<img" not in said.lower()
        and "license: mit" not in said
    )
