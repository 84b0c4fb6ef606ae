"""Datasets on the Hub, read by the real client in a process of its own."""

import json
import subprocess
import sys

import pytest
from datasets_on_disk import squares, write_parquet
from hub_stub import HubStub, Repo
from training_runs import ROOT


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with tester/squares: two training shards, a test split, and an older revision v1 of two rows."""
    folder, repo = tmp_path_factory.mktemp("squares"), Repo()
    shard = lambda rows: (write_parquet(folder / "some.parquet", rows).read_bytes(), True)
    repo.add_commit({"data/train-00000-of-00001.parquet": shard(squares(0, 2))}, "first", "main")
    repo.refs["v1"] = repo.refs["main"]
    repo.add_commit(
        {
            "data/train-00000-of-00002.parquet": shard(squares(0, 5)),
            "data/train-00001-of-00002.parquet": shard(squares(5, 10)),
            "data/test-00000-of-00001.parquet": shard(squares(10, 12)),
        },
        "second",
        "main",
    )
    with HubStub() as server:
        server.repos["datasets", "tester/squares"] = server.repos["datasets", "tester/other"] = repo
        server.home = tmp_path_factory.mktemp("home")
        yield server


def client(hub, code, **env):
    """What the code prints as JSON, run with the Hub's address in the environment."""
    command = [sys.executable, "-c", PRELUDE + code, str(hub.home / "cache")]
    done = subprocess.run(
        command, env=hub.env(hub.home, **env), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def online(hub):
    """One process that reads the Hub, which is busy twice."""
    hub.faults += [
        ("GET", r"/resolve/.*train-00000.*parquet", 503),
        ("GET", r"/resolve/.*train-00001.*parquet", 429),
    ]
    found = client(
        hub,
        """
source = stream.Stream(config(streaming=True), seed=1)
captions = [c for batch in (source.take(5), source.take(5)) for c, in batch.alternatives]
state, after = source.state_dict(), [c for c, in source.take(10).alternatives]
source.load_state_dict(json.loads(json.dumps(state)))
again = [c for c, in source.take(10).alternatives]
source.close()
print(json.dumps({
    "stream": captions, "after": after, "again": again, "preview": load(streaming=True),
    "v1": load(revision="v1"), "whole": load(held_out="test"), "slice": load(split="train[:30%]", held_out="train[30%:50%]"),
    "id": refused(source="tester/nothing"), "split": refused(split="validation"), "held_out": refused(held_out="dev"),
    "caption": refused(caption_column="title"), "image": refused(image_column="photo"), "revision": refused(revision="v9"),
    "subset": refused(subset="large"), "local": refused(source="nowhere")}))
""",
        HF_HUB_OFFLINE="0",
    )
    assert hub.faults == []
    return found


@pytest.fixture(scope="module")
def offline(hub, online):
    """Another process, without a network, after the first."""
    commit = hub.repos["datasets", "tester/squares"].refs["main"]
    return client(
        hub,
        f"""
print(json.dumps({{"warm": load(held_out="test"), "pinned": load(revision="{commit}"), "v1": refused(revision="v1"),
                   "cold": refused(source="tester/other")}}))
""",
        HF_HUB_OFFLINE="1",
    )


def test_load_splits_reads_hub_splits_revisions_and_slices(online):
    assert (
        online["whole"][:2] == [NAMES[:10], NAMES[10:]]
        and "tester/squares (train): 10 of 10" in online["whole"][2]
    )
    assert online["v1"][0] == NAMES[:2] and online["slice"][:2] == [NAMES[:3], NAMES[3:5]]


def test_stream_of_a_busy_hub_has_every_row_and_resumes(online):
    assert (
        sorted(online["stream"]) == sorted(NAMES[:10]) == sorted(online["after"])
        and online["stream"] != NAMES[:10]
    )
    assert online["again"] == online["after"]
    assert (
        online["preview"][0] == NAMES[:10]
        and "the first 10 rows of a stream: 10 of 10" in online["preview"][2]
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("id", "there is no dataset 'tester/nothing' on the Hub"),
        ("revision", "Revision 'v9' doesn't exist"),
        ("split", "has no split 'validation': it has t"),
        ("held_out", "has no split 'dev': it has t"),
        ("caption", "has no caption column 'title': it has image, text"),
        ("image", "no column of images 'photo': it has image"),
        ("subset", "BuilderConfig 'large' not found"),
        ("local", "no image folder at nowhere"),
    ],
)
def test_open_table_names_what_the_hub_does_not_have(wrong, says, online):
    assert says in online[wrong] and "\n" not in online[wrong] and "Traceback" not in online[wrong]


def test_open_table_works_offline_with_a_warm_cache_only(offline, online):
    assert offline["warm"][:2] == online["whole"][:2] and offline["pinned"][0] == online["whole"][0]
    assert "may not be revision 'v1': connect, or make data.revision that commit" in offline["v1"]
    assert (
        "'tester/other' is neither here nor in the cache, and the Hub is out of reach"
        in offline["cold"]
    )
    assert "\n" not in offline["cold"]
