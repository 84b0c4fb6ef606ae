"""Requests to a running demo, as scripts, browsers and attackers send them."""

import contextlib
import io
import json
import re
from pathlib import Path

import httpx
from PIL import Image
from serving_data import pixels

import app
from pipeline.serving.server import serve
from pipeline.serving.temp_files import temporary_cache

# The parameters of /create, and a good request.
GOOD = {
    "prompt": "red heart",
    "negative_prompt": "",
    "w": 1.0,
    "steps": 4,
    "eta": 1.0,
    "images": 1,
    "seed": 7,
    "randomise": False,
    "low": 0.0,
    "high": 1.0,
    "denoiser": "network",
    "checkpoint": 0,
    "think": 1,
}
JSON_HEADERS = {"content-type": "application/json"}
# One connection per request, but the certificates are only read once.
web = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))


@contextlib.contextmanager
def served(store):
    """Serve a store's demo: (address, Gradio's app, the folder of its files)."""
    with temporary_cache() as files:
        demo = app.build_demo(store)
        server, address, _share = serve(demo, prevent_thread_lock=True, quiet=True)
        yield address.rstrip("/"), server, Path(files)
        demo.close()


def call(url, name, *data):
    """Send a raw request to an endpoint: (HTTP status, name of the last event, its data)."""
    # Python's json writes NaN and Infinity, as scripts do.
    body = json.dumps({"data": list(data)})
    address = f"{url}/gradio_api/call/{name}"
    answer = web.post(address, content=body, headers=JSON_HEADERS, timeout=60)
    if answer.status_code != 200:
        return answer.status_code, None, None
    text = web.get(f"{address}/{answer.json()['event_id']}", timeout=60).text
    events = re.findall(r"event: (\w+)\ndata: (.*)\n", text)
    return 200, events[-1][0], json.loads(events[-1][1])


def create(url, **changes):
    """Send a good /create request with changes, as `call` does."""
    return call(url, "create", *(GOOD | changes).values())


def trigger(url, elem, event, *data):
    """Send what the browser sends for a component's event: (HTTP status, data)."""
    config = web.get(f"{url}/config").json()
    names = ("elem_id", "label")
    (target,) = (
        c["id"] for c in config["components"] if elem in [c["props"].get(name) for name in names]
    )
    (index,) = (d["id"] for d in config["dependencies"] if [target, event] in d["targets"])
    body = {"fn_index": index, "data": list(data), "session_hash": "browser"}
    answer = web.post(f"{url}/gradio_api/run/predict", json=body, timeout=60)
    return answer.status_code, answer.json().get("data")


def upload(url, content):
    """Upload a file and return it as a request names it."""
    (path,) = web.post(f"{url}/gradio_api/upload", files={"files": ("a.png", content)}).json()
    return file_data(path)


def file_data(path):
    """Return a file as a request names it."""
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def fetch_image(entry):
    """Return the image behind an entry of a gallery."""
    return Image.open(io.BytesIO(web.get(entry["image"]["url"]).content))


def gallery_pixels(entries):
    """Return the pixels of a gallery."""
    return pixels([fetch_image(entry) for entry in entries])
