"""Datasets on the Hub, read by the real client in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets_on_disk import squares, write_parquet
from hub_stub import HubStub, Repo

ROOT = Path(__file__).parents[3]
NAMES = [f"square {i}" for i in range(12)]
PRELUDE = """
import json, sys
from pipeline.config import DataConfig
from pipeline.data.dataset import load_splits
from pipeline.data.sources.rows import DataError
from pipeline.data.streaming import Stream

def config(source="tester/squares", **settings):
    defaults = {"held_out": None, "resolution": 8, "cache": sys.argv[1], "shuffle_buffer": 4}
    return DataConfig(source, **defaults | settings)

def load(**settings):
    images, held_out = load_splits(config(**settings))
    return [images.captions, held_out and held_out.captions, str(images.report)]

def refused(**settings):
    try:
        return f"read {load(**settings)}"
    except DataError as error:
        return str(error)
"""
ONLINE = """
stream = Stream(config(streaming=True), seed=1)
first = [c for batch in (stream.take(5), stream.take(5)) for c, in batch.alternatives]
state = stream.state_dict()
second = [c for c, in stream.take(10).alternatives]
stream.load_state_dict(json.loads(json.dumps(state)))
again = [c for c, in stream.take(10).alternatives]
stream.close()
print(json.dumps({
    "stream": first,
    "after": second,
    "again": again,
    "preview": load(streaming=True),
    "v1": load(revision="v1"),
    "whole": load(held_out="test"),
    "slice": load(split="train[:30%]", held_out="train[30%:50%]"),
    "id": refused(source="tester/nothing"),
    "split": refused(split="validation"),
    "held_out": refused(held_out="dev"),
    "caption": refused(caption_column="title"),
    "image": refused(image_column="photo"),
    "revision": refused(revision="v9"),
    "subset": refused(subset="large"),
    "local": refused(source="nowhere"),
}))
"""
OFFLINE = """
print(json.dumps({
    "warm": load(held_out="test"),
    "pinned": load(revision="COMMIT"),
    "v1": refused(revision="v1"),
    "cold": refused(source="tester/other"),
}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with tester/squares: two training shards, a test split, and v1 with two rows."""
    folder = tmp_path_factory.mktemp("squares")

    def shard(start, stop):
        return write_parquet(folder / "some.parquet", squares(start, stop)).read_bytes(), True

    repo = Repo()
    repo.add_commit({"data/train-00000-of-00001.parquet": shard(0, 2)}, "first", "main")
    repo.refs["v1"] = repo.refs["main"]
    files = {
        "data/train-00000-of-00002.parquet": shard(0, 5),
        "data/train-00001-of-00002.parquet": shard(5, 10),
        "data/test-00000-of-00001.parquet": shard(10, 12),
    }
    repo.add_commit(files, "second", "main")
    with HubStub() as server:
        server.repos["datasets", "tester/squares"] = repo
        server.repos["datasets", "tester/other"] = repo
        server.home = tmp_path_factory.mktemp("home")
        yield server


def client(hub, code, **env):
    """Return what the code prints as JSON, run with the Hub's address in the environment."""
    command = [sys.executable, "-c", PRELUDE + code, str(hub.home / "cache")]
    done = subprocess.run(
        command, env=hub.env(hub.home, **env), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def online(hub):
    """The results of one process that reads the Hub, which is busy twice."""
    hub.faults += [
        ("GET", r"/resolve/.*train-00000.*parquet", 503),
        ("GET", r"/resolve/.*train-00001.*parquet", 429),
    ]
    results = client(hub, ONLINE, HF_HUB_OFFLINE="0")
    assert hub.faults == []
    return results


@pytest.fixture(scope="module")
def offline(hub, online):
    """The results of another process, without a network, after the first."""
    commit = hub.repos["datasets", "tester/squares"].refs["main"]
    return client(hub, OFFLINE.replace("COMMIT", commit), HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_load_splits_reads_hub_splits_revisions_and_slices(online):
    assert online["whole"][:2] == [NAMES[:10], NAMES[10:]]
    assert "tester/squares (train): 10 of 10" in online["whole"][2]
    assert online["v1"][0] == NAMES[:2]
    assert online["slice"][:2] == [NAMES[:3], NAMES[3:5]]


@pytest.mark.slow
def test_stream_of_a_busy_hub_has_every_row_and_resumes(online):
    assert sorted(online["stream"]) == sorted(NAMES[:10]) == sorted(online["after"])
    assert online["stream"] != NAMES[:10]
    assert online["again"] == online["after"]
    assert online["preview"][0] == NAMES[:10]
    assert "the first 10 rows of a stream: 10 of 10" in online["preview"][2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "values"),
    [
        ("id", ["'tester/nothing'", "on the Hub"]),
        ("revision", ["'v9'"]),
        ("split", ["'validation', only t"]),
        ("held_out", ["'dev', only t"]),
        ("caption", ["'title'", ": image, text"]),
        ("image", ["'photo'", ": image"]),
        ("subset", ["'large'"]),
        ("local", ["nowhere"]),
    ],
)
def test_open_table_names_what_the_hub_does_not_have(wrong, values, online):
    message = online[wrong]
    assert all(value in message for value in values)
    assert not message.startswith("read ")
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.slow
def test_open_table_works_offline_with_a_warm_cache_only(offline, online, hub):
    assert offline["warm"][:2] == online["whole"][:2]
    assert offline["pinned"][0] == online["whole"][0]
    assert "'v1'" in offline["v1"]
    assert hub.repos["datasets", "tester/squares"].refs["main"] in offline["v1"]
    assert "'tester/other' is not cached" in offline["cold"]
    assert "\n" not in offline["cold"]
