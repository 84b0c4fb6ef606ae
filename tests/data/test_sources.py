"""Tables hold what a folder of the same images holds, on disk and on the Hub, and what cannot be read is one sentence."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hub_stub import HubStub, Repo
from huggingface_hub import constants
from PIL import Image

from pipeline.data import dataset, sources
from pipeline.data.sources import rows as rows_module
from pipeline.data.sources.rows import (
    READ_WAITS,
    DataError,
    as_row,
    retry_on_network_error,
    with_image_bytes,
)
from pipeline.data.sources.table import table_row

ROOT = Path(__file__).parents[2]


def png(i=0, size=(8, 8)):
    """A plain picture whose red is i."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (i, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, rows, **columns):
    """A parquet file as `datasets` writes it: {"image": bytes or None, ...} a row, strings unless `columns` say otherwise."""
    columns = (
        {"image": datasets.Image()}
        | {name: datasets.Value("string") for name in rows[0] if name != "image"}
        | columns
    )
    packed = [
        row | {"image": row["image"] and {"bytes": row["image"], "path": None}} for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(packed, features=datasets.Features(columns)).to_parquet(path)
    return path


def squares(start, stop):
    return [{"image": png(i), "text": f"square {i}"} for i in range(start, stop)]


@pytest.fixture
def load(tmp_path):
    """load_images with a cache of the test's own."""
    return lambda source, **options: dataset.load_images(
        source, **{"resolution": 8, "cache_dir": tmp_path / "cache"} | options
    )


def reds(images):
    return images.images[:][:, 0, 0, 0].tolist()


# ---- on disk


def test_a_parquet_file_holds_what_a_folder_of_the_same_images_holds(load, tmp_path):
    path = write(tmp_path / "squares.parquet", squares(0, 5))
    (tmp_path / "folder").mkdir()
    for i in range(5):
        (tmp_path / "folder" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "folder" / f"{i}.txt").write_text(f"square {i}")
    table, folder = load(path), load(tmp_path / "folder")
    assert table.captions == folder.captions == [f"square {i}" for i in range(5)] and reds(
        table
    ) == reds(folder) == [*range(5)]
    assert table.fingerprint == folder.fingerprint
    assert "5 of 5 images usable" in str(table.report) and table.metadata[3] == {
        "file_name": "row 3"
    }


def test_a_folder_of_shards_has_the_splits_of_its_names_and_slices_of_them(load, tmp_path):
    for i in range(2):
        write(tmp_path / "set" / f"train-0000{i}-of-00002.parquet", squares(3 * i, 3 * i + 3))
    write(tmp_path / "set" / "test-00000-of-00001.parquet", squares(6, 8))
    assert reds(load(tmp_path / "set")) == [*range(6)] and reds(
        load(tmp_path / "set", split="test")
    ) == [6, 7]
    assert reds(load(tmp_path / "set", split="train[:50%]")) == [0, 1, 2]
    assert reds(load(tmp_path / "set", split="train[4:]+test")) == [4, 5, 6, 7]
    with pytest.raises(DataError, match="has no rows: expected images with captions"):
        load(tmp_path / "set", split="train[5:3]")
    with pytest.raises(DataError, match=r"has no split 'validation': it has \[?'?t\w+'?, t\w+"):
        load(tmp_path / "set", split="validation[:3]")


def test_a_webdataset_is_a_table_too(load, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for i in range(4):
            for name, content in ((f"{i}.png", png(i)), (f"{i}.txt", f"square {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    images = load(tmp_path / "shard.tar", caption_column="txt")
    assert images.captions == [f"square {i}" for i in range(4)] and reds(images) == [*range(4)]


def test_a_table_that_changed_is_read_anew(load, tmp_path):
    assert reds(load(write(tmp_path / "a.parquet", squares(0, 3)))) == [0, 1, 2]
    assert reds(load(write(tmp_path / "a.parquet", squares(5, 9)))) == [5, 6, 7, 8]


def test_images_that_another_tool_wrote_are_found(load, tmp_path):
    """Bytes and path without the metadata of `datasets`."""
    image = pa.array([{"bytes": png(7), "path": "seven.png"}])
    pa.parquet.write_table(
        pa.table({"picture": image, "caption": ["seven"]}), tmp_path / "plain.parquet"
    )
    images = load(tmp_path / "plain.parquet")
    assert (
        images.captions == ["seven"]
        and reds(images) == [7]
        and images.metadata == [{"file_name": "seven.png"}]
    )
    pa.parquet.write_table(
        pa.table({"raw": [png(9)], "caption": ["nine"]}), tmp_path / "raw.parquet"
    )
    assert reds(load(tmp_path / "raw.parquet", image_column="raw")) == [9]
    large = pa.table(
        {
            "raw": pa.array([png(3)], pa.large_binary()),
            "caption": pa.array(["three"], pa.large_string()),
        }
    )
    pa.parquet.write_table(large, tmp_path / "large.parquet")
    assert reds(load(tmp_path / "large.parquet", image_column="raw")) == [3]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_pictures_may_be_named_by_path(kind, load, tmp_path):
    (tmp_path / "four.png").write_bytes(png(4))
    named = pa.table({"file": pa.array([str(tmp_path / "four.png")], kind), "caption": ["four"]})
    pa.parquet.write_table(named, tmp_path / "named.parquet")
    assert reds(load(tmp_path / "named.parquet", image_column="file")) == [4]


def test_a_table_among_pictures_does_not_make_a_table_of_their_folder(load, tmp_path):
    for i in range(3):
        (tmp_path / "set" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "train" / f"{i}.png").write_bytes(png(i))
    write(tmp_path / "set" / "all.parquet", squares(5, 9))
    assert reds(load(tmp_path / "set")) == [0, 1, 2]
    write(tmp_path / "table" / "data" / "train.parquet", squares(5, 9))
    for name in ("a.png", "assets/b.png", "assets/c.png"):
        (tmp_path / "table" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "table" / name).write_bytes(png())
    assert reds(load(tmp_path / "table")) == [5, 6, 7, 8]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "text": "one"}'
    )
    write(tmp_path / "set" / "train" / "train.parquet", squares(5, 9))
    assert reds(load(tmp_path / "set")) == [1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"image_column": "mask", "caption_column": "title"},
            "no caption column 'title': it has caption, height, image, mask; name",
        ),
        (
            {"image_column": "mask", "caption_column": ("caption", "title", "x")},
            "no caption column 'title' or 'x'",
        ),
        (
            {},
            "has 2 columns of images: it has image (images), mask (images), caption, height; name one of them",
        ),
        (
            {"image_column": "photo"},
            "has no column of images 'photo': it has image (images), mask (images)",
        ),
        ({"image_column": "height"}, "has no column of images 'height'"),
        ({"revision": "main"}, "data.revision has no meaning for"),
        ({"image_column": "image", "split": "test"}, "has no split 'test': it has train"),
        ({"image_column": "image", "subset": "large"}, "data.subset has no meaning for"),
    ],
)
def test_what_a_table_lacks_is_said_with_what_it_has(settings, says, load, tmp_path):
    row = {"image": png(), "mask": None, "caption": "a", "height": 8}
    path = write(
        tmp_path / "two.parquet", [row], mask=datasets.Image(), height=datasets.Value("int64")
    )
    with pytest.raises(DataError) as error:
        load(path, **settings)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("/etc/passwd", False),
        ("mine.png", False),
        ("http://10.0.0.1/x.png", False),
        ("hf://datasets/other/set@a1/x.png", False),
        ("hf://datasets/tester/set-of-mine/x.png", False),
        ("file:///etc/x.png::hf://datasets/other/x/a.zip", False),
        ("hf://datasets/tester/set@a1/x.png", True),
        ("zip://x.png::hf://datasets/tester/set@a1/a.zip", True),
        (f"{constants.HF_HUB_CACHE}/datasets--tester--set/snapshots/a1/x.png", True),
        (f"{constants.HF_HUB_CACHE}/../../../../../../../../etc/passwd", False),
    ],
)
def test_a_table_of_the_hub_names_no_other_files(path, good):
    """Else a stranger's table could have a private picture trained on, and pushed with the model."""
    picture = {"image": {"bytes": None, "path": path}, "text": "a"}
    row = table_row(picture, 0, "image", ("text",), within="tester/set")
    assert (
        row["problem"] == ("" if good else "its file is outside the data set")
        and (row["image"] is not None) == good
    )
    assert table_row(picture, 0, "image", ("text",))["problem"] == "", (
        "a table on disk is its owner's"
    )
    inside = table_row(
        {"image": {"bytes": b"x", "path": path}, "text": "a"},
        0,
        "image",
        ("text",),
        within="tester/set",
    )
    assert inside["problem"] == ""


def test_a_damaged_table_is_one_sentence(load, tmp_path):
    path = write(tmp_path / "cut.parquet", squares(0, 9))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match="cannot read .*cut.parquet") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["set", "elsewhere"])
def test_a_source_that_may_not_be_read_is_one_sentence(load, tmp_path, monkeypatch, place):
    """Of files elsewhere, such as the Hub's cache, the error is another's to tell."""

    def refuse(source, split):
        raise PermissionError(13, "Permission denied", str(tmp_path / place / "metadata.jsonl"))

    (tmp_path / "set").mkdir()
    monkeypatch.setattr(sources, "is_table", refuse)
    kind, says = (
        (DataError, "cannot read .*expected leave to read it")
        if place == "set"
        else (PermissionError, "denied")
    )
    with pytest.raises(kind, match=says):
        load(tmp_path / "set")


def test_settings_of_tables_are_refused_for_a_folder_of_images(load, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(png())
    for settings in (
        {"subset": "x"},
        {"revision": "v1"},
        {"image_column": "image"},
        {"streaming": True},
    ):
        with pytest.raises(
            DataError,
            match=f"data.{next(iter(settings))} has no meaning for .*set, which is no table",
        ):
            load(tmp_path / "set", **settings)


def test_rows_that_cannot_be_used_are_named_and_the_others_stay(load, tmp_path):
    rows = [
        *squares(0, 2),
        {"image": None, "text": "nothing"},
        {"image": b"not a picture", "text": "text"},
        *squares(2, 3),
    ]
    images = load(write(tmp_path / "some.parquet", rows), max_broken=0.5)
    assert reds(images) == [0, 1, 2]
    found = dict(images.report.broken)
    assert found["row 2"] == "it has no image" and "cannot identify" in found["row 3"]


# ---- captions


def test_a_list_or_several_columns_are_a_rows_captions_and_empty_ones_are_none(load, tmp_path):
    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    rows = [
        {"image": png(0), "short": "a", "long": ["a  b", "c"]},
        {"image": png(1), "short": None, "long": ["d"]},
        {"image": png(2), "short": " ", "long": None},
        {"image": png(3), "short": "e", "long": ["", " "]},
    ]
    path = write(tmp_path / "both.parquet", rows, short=text, long=texts)
    images = load(path, caption_column=("short", "long"))
    assert images.alternatives == [["a", "a b", "c"], ["d"], [""], ["e"]] and images.captions == [
        "a",
        "d",
        "",
        "e",
    ]
    assert images.all_captions == ["a", "a b", "c", "d", "", "e"]
    assert "1 images have an empty caption" in str(images.report)
    assert "0 to 3 (median 1) captions an image" in str(images.report)
    assert load(path, caption_column="long").alternatives == [["a b", "c"], ["d"], [""], [""]]


def test_images_without_a_caption_can_be_left_out(load, tmp_path):
    rows = [{"image": png(i), "text": text} for i, text in enumerate(["a", None, "", " \t", "b"])]
    path = write(tmp_path / "some.parquet", rows)
    assert reds(load(path, max_broken=0)) == [*range(5)], (
        "by default they are unconditional examples"
    )
    images = load(path, missing_caption="skip", max_broken=0)
    assert reds(images) == [0, 4] and "3 images have no caption and are left out" in str(
        images.report
    )
    with pytest.raises(
        DataError,
        match="no row is left: data.missing_caption: empty keeps images without a caption",
    ):
        load(write(tmp_path / "none.parquet", rows[1:4]), missing_caption="skip")


@pytest.mark.parametrize("value", [float("nan"), 3.5, True, {"en": "a"}])
def test_a_column_that_holds_no_text_is_named_with_the_row(value, load, tmp_path):
    image = pa.array([{"bytes": png(), "path": None}])
    pa.parquet.write_table(pa.table({"image": image, "caption": [value]}), tmp_path / "odd.parquet")
    with pytest.raises(
        DataError, match="skipped row 0: its caption must be text or a list of texts, got"
    ):
        load(tmp_path / "odd.parquet")


# ---- the Hub, by the real client in a process of its own


PRELUDE = """
import json, sys
from pipeline import data, stream
from pipeline.config import DataConfig
from pipeline.sources import DataError

def config(source="tester/squares", **settings):
    return DataConfig(source, **{"held_out": None, "resolution": 8, "cache": sys.argv[1], "shuffle_buffer": 4} | settings)

def load(**settings):
    images, held_out = data.load_splits(config(**settings))
    return [images.captions, held_out and held_out.captions, str(images.report)]

def refused(**settings):
    try:
        return f"read {load(**settings)}"
    except DataError as error:
        return str(error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with tester/squares: two training shards, a test split, and an older revision v1 of two rows."""
    folder, repo = tmp_path_factory.mktemp("squares"), Repo()
    shard = lambda rows: (write(folder / "some.parquet", rows).read_bytes(), True)
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


NAMES = [f"square {i}" for i in range(12)]


def test_a_hub_id_is_loaded_by_split_revision_and_slice(online):
    assert (
        online["whole"][:2] == [NAMES[:10], NAMES[10:]]
        and "tester/squares (train): 10 of 10" in online["whole"][2]
    )
    assert online["v1"][0] == NAMES[:2] and online["slice"][:2] == [NAMES[:3], NAMES[3:5]]


def test_a_stream_of_a_busy_hub_has_every_row_once_an_epoch_and_goes_on_where_it_was(online):
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
        ("id", "there is no data set 'tester/nothing' on the Hub"),
        ("revision", "Revision 'v9' doesn't exist"),
        ("split", "has no split 'validation': it has t"),
        ("held_out", "has no split 'dev': it has t"),
        ("caption", "has no caption column 'title': it has image, text"),
        ("image", "no column of images 'photo': it has image"),
        ("subset", "BuilderConfig 'large' not found"),
        ("local", "no image folder at nowhere"),
    ],
)
def test_what_the_hub_lacks_is_one_sentence(wrong, says, online):
    assert says in online[wrong] and "\n" not in online[wrong] and "Traceback" not in online[wrong]


def test_a_warm_cache_is_enough_without_a_network_and_a_cold_one_is_one_sentence(offline, online):
    assert offline["warm"][:2] == online["whole"][:2] and offline["pinned"][0] == online["whole"][0]
    assert "may not be revision 'v1': connect, or make data.revision that commit" in offline["v1"]
    assert (
        "'tester/other' is neither here nor in the cache, and the Hub is out of reach"
        in offline["cold"]
    )
    assert "\n" not in offline["cold"]


# ---- files that cannot be had, and a network that fails


class Answer(Exception):
    """What aiohttp raises, with the status of the answer."""

    def __init__(self, status=None):
        super().__init__(f"the answer is {status}")
        self.status = status


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (Answer(403), "its file cannot be read: the answer is 403"),
        (Answer(503), None),
        (OSError(104, "reset"), None),
        (EOFError("cut short"), "its file cannot be read: cut short"),
        (OSError(13, "no"), "its file cannot be read: [Errno 13] no"),
        (FileNotFoundError("gone"), "its file does not exist: gone"),
        (ConnectionError("down"), None),
        (ImportError("install aiohttp"), "its file cannot be read: install aiohttp"),
    ],
)
def test_a_file_that_will_never_come_is_its_rows_problem_and_a_network_that_fails_is_not(
    error, problem, monkeypatch
):
    def opened(*_):
        raise error

    monkeypatch.setattr(rows_module.fsspec, "open", opened)
    row = as_row("x", {"path": "https://somewhere/x.png", "bytes": None}, ["x"])
    if problem is None:
        with pytest.raises(ConnectionError):
            with_image_bytes(row)
    else:
        assert (
            with_image_bytes(row)["problem"] == problem and with_image_bytes(row)["image"] is None
        )


def test_a_picture_that_the_disk_does_not_give_is_its_rows_problem(tmp_path):
    row = with_image_bytes(as_row("x", {"path": str(tmp_path), "bytes": None}, ["x"]))
    assert row["problem"].startswith("its file cannot be read: [Errno 21]") and row["image"] is None


def failing(errors):
    """A function that raises some errors, one a call, and then returns [1]."""
    left = list(errors)

    def attempt():
        if left:
            raise left.pop(0)
        return [1]

    return attempt, left


def test_a_network_that_fails_is_asked_again_after_ever_longer_waits():
    waited = []
    attempt, _ = failing([ConnectionError("reset"), TimeoutError("slow"), OSError("disk")])
    with pytest.raises(DataError, match="cannot read it: disk"):
        retry_on_network_error(attempt, "it", waited.append)
    assert tuple(waited) == READ_WAITS[:2] and retry_on_network_error(
        failing([])[0], "it", waited.append
    ) == [1]
    attempt, left = failing([ConnectionError(f"{i}") for i in range(9)])
    waited.clear()
    with pytest.raises(
        DataError, match=r"cannot read it in 5 attempts \(4\): run the same command again"
    ):
        retry_on_network_error(attempt, "it", waited.append)
    assert tuple(waited) == READ_WAITS == tuple(sorted(READ_WAITS)) and len(left) == 4
