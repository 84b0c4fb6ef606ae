"""The demo under load: the queue, Stop, many clients, memory."""

import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from demo_client import GOOD, JSON_HEADERS, create, gallery_pixels, served, trigger, web
from serving_data import pixels

import app
from pipeline.serving import plots, server, session


def test_create_abandoned_frees_the_model_within_seconds(url):
    body = {"data": list((GOOD | {"steps": 1000}).values())}
    with httpx.Client() as client:
        address = f"{url}/gradio_api/call/create"
        event = client.post(address, json=body).json()["event_id"]
        with client.stream("GET", f"{address}/{event}") as stream:
            next(stream.iter_lines())  # it has begun
    start = time.monotonic()
    assert create(url)[1] == "complete"
    assert time.monotonic() - start < 2


def test_create_after_stop_counts_only_its_own_calls(url, store, monkeypatch):
    """Stop frees the queue at once, but the interrupted step runs on in its thread."""
    monkeypatch.setattr(session, "PREVIEW_INTERVAL", 1.0)
    network = store.session().trained.unet
    slow = network.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    config = web.get(f"{url}/config").json()
    (index,) = (d["id"] for d in config["dependencies"] if d["api_name"] == "create")
    data = list((GOOD | {"steps": 200}).values())
    body = {"fn_index": index, "data": data, "session_hash": "left"}
    queued = web.post(f"{url}/gradio_api/queue/join", json=body).json()
    with web.stream("GET", f"{url}/gradio_api/queue/data?session_hash=left", timeout=60) as stream:
        # 20 more calls follow until its next preview.
        next(line for line in stream.iter_lines() if "process_generating" in line)
        with ThreadPoolExecutor() as threads:
            cancel = f"{url}/gradio_api/cancel"
            stopped = threads.submit(web.post, cancel, json=body | queued, timeout=60)
            _, event, (_gallery, text, *_) = create(url)
            assert stopped.result().status_code == 200
    slow.remove()
    assert event == "complete"
    assert "· 8 network calls ·" in text


def test_mark_timestep_works_while_the_queue_is_full(url, store):
    body = json.dumps({"data": list(GOOD.values())})
    address = f"{url}/gradio_api/call/create"
    with store.session().lock:  # no request can finish
        answers = [
            web.post(address, content=body, headers=JSON_HEADERS) for _ in range(app.QUEUE_SIZE + 2)
        ]
        assert answers[-1].status_code == 503, "the queue is full"
        status, data = trigger(url, "t", "change", 250)
    assert status == 200
    assert data[0]["plot"].startswith("data:image/png")
    assert trigger(url, "t", "change", None) == (200, [{"__type__": "update"}]), "an emptied number"
    assert trigger(url, "t", "change", 1001)[0] == 500, "out of range"
    for answer in answers[:-1]:
        if answer.status_code == 200:
            web.get(f"{address}/{answer.json()['event_id']}", timeout=60)


def test_to_plot_data_renders_one_figure_at_a_time(store, monkeypatch):
    render = plots.encode_plot_to_base64
    active = []
    most = []

    def watched(figure):
        active.append(1)
        most.append(len(active))
        plot = render(figure)
        active.pop()
        return plot

    monkeypatch.setattr(plots, "encode_plot_to_base64", watched)
    curves = store.session().schedule_curves()
    with ThreadPoolExecutor(4) as threads:
        timesteps = (1, 500, 1000, 1)
        found = list(threads.map(lambda t: plots.plot_schedule(curves, t), timesteps))
    assert most == [1] * 4
    assert found[0] == found[3] != found[1]


def test_serve_forgets_the_oldest_of_many_sessions(store, monkeypatch):
    monkeypatch.setattr(server, "MAX_SESSIONS", 3)
    with served(store) as (url, gradio_app, _files):
        for seed in range(5):
            assert create(url, seed=seed)[1] == "complete"
        assert len(gradio_app.state_holder.session_data) == 3


@pytest.mark.slow
def test_create_gives_fifty_clients_their_own_images(url, store):
    """Those that find the queue full are refused."""
    answers = {}
    guard = threading.Lock()

    def visit(seed):
        answer = create(url, seed=seed, steps=12)
        with guard:
            answers[seed] = answer

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == 50
    complete = {seed: data for seed, (_, event, data) in answers.items() if event == "complete"}
    assert app.QUEUE_SIZE <= len(complete) < 50
    pipe = store.session().trained
    for seed, (gallery, _text, used, *_) in complete.items():
        assert used == seed
        images = pipe("red heart", w=1.0, num_inference_steps=12, seed=seed).images
        assert np.array_equal(gallery_pixels(gallery), pixels(images))
    for seed in answers.keys() - complete.keys():
        status, event, data = answers[seed]
        refused = event == "error" and "full" in json.dumps(data)
        assert status == 503 or refused, answers[seed]
    assert create(url)[1] == "complete"


@pytest.mark.slow
def test_create_does_not_leak_memory(url):
    def resident():
        gc.collect()
        return psutil.Process().memory_info().rss

    for seed in range(80):
        assert create(url, seed=seed)[1] == "complete"
        if seed == 20:
            before = resident()
    assert resident() < 1.1 * before
