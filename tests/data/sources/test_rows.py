"""Captions of a row, files that cannot be read, and a network that fails."""

import math
import unicodedata

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets_on_disk import png, reasons, reds, save_image, write_listing, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sources import rows as rows_module
from pipeline.data.sources.rows import (
    READ_WAITS,
    DataError,
    Unreachable,
    as_row,
    retry_on_network_error,
    with_image_bytes,
)
from pipeline.diffusion.captions import normalize


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (None, ""),
        ("", ""),
        (" \t\n ", ""),
        (" a  b ", "a b"),
        ("Cafe\u0301", "Café"),
        ("a\x00b", "ab"),
        ("x\ud800y", "xy"),
        ("\u200fשלום 👩‍🍳", "\u200fשלום 👩‍🍳"),
        (["only"], "only"),
    ],
)
def test_read_captions_normalizes_and_none_is_empty(value, caption, load, tmp_path):
    save_image(tmp_path / "set" / "a.png")
    write_listing(tmp_path / "set", {"file_name": "a.png", "caption": value})
    assert load().captions == [caption]


@pytest.mark.parametrize("value", [math.nan, 3.5, 7, True, {"en": "a"}, [], ["a", None]])
def test_read_captions_reports_what_is_not_text(value, load, tmp_path):
    save_image(tmp_path / "set" / "a.png")
    save_image(tmp_path / "set" / "b.png")
    write_listing(
        tmp_path / "set",
        {"file_name": "a.png", "caption": value},
        {"file_name": "b.png", "caption": "b"},
    )
    images = load()
    assert images.captions == ["b"]
    assert reasons(images)["a.png"].endswith(f"got {value!r}")


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_normalize_is_nfc_and_idempotent(text):
    clean = normalize(text)
    assert clean == normalize(clean) == unicodedata.normalize("NFC", clean) == clean.strip()
    assert clean == normalize(unicodedata.normalize("NFD", text))
    clean.encode()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_as_row_makes_any_text_a_caption_to_tokenize(tokenizer, text):
    """Lone surrogates, which Python's JSON accepts, would be a TypeError in the tokenizer."""
    row = as_row("a.png", {"path": "a.png", "bytes": None}, [text])
    assert row["problem"] == ""
    assert row["captions"] == ([normalize(text)] if normalize(text) else [])
    tokenizer(row["captions"] or [""])


def test_read_captions_joins_lists_and_several_columns(load, tmp_path):
    rows = [
        {"image": png(0), "short": "a", "long": ["a  b", "c"]},
        {"image": png(1), "short": None, "long": ["d"]},
        {"image": png(2), "short": " ", "long": None},
        {"image": png(3), "short": "e", "long": ["", " "]},
    ]
    texts = datasets.List(datasets.Value("string"))
    path = write_parquet(tmp_path / "both.parquet", rows, long=texts)
    images = load(path, caption_column=("short", "long"))
    assert images.alternatives == [["a", "a b", "c"], ["d"], [""], ["e"]]
    assert images.captions == ["a", "d", "", "e"]
    assert images.all_captions == ["a", "a b", "c", "d", "", "e"]
    assert "1 images have an empty caption" in str(images.report)
    assert "0 to 3 (median 1) captions an image" in str(images.report)
    assert load(path, caption_column="long").alternatives == [["a b", "c"], ["d"], [""], [""]]


@pytest.mark.parametrize("value", [float("nan"), 3.5, True, {"en": "a"}])
def test_read_captions_names_the_row_of_a_table(value, load, tmp_path):
    image = pa.array([{"bytes": png(), "path": None}])
    pa.parquet.write_table(pa.table({"image": image, "caption": [value]}), tmp_path / "odd.parquet")
    with pytest.raises(DataError, match="skipped row 0: .*, got"):
        load(tmp_path / "odd.parquet")


def test_missing_caption_keeps_or_skips_images(load, tmp_path):
    rows = [{"image": png(i), "text": text} for i, text in enumerate(["a", None, "", " \t", "b"])]
    path = write_parquet(tmp_path / "some.parquet", rows)
    assert reds(load(path, max_broken=0)) == [*range(5)], "unconditional examples by default"
    images = load(path, missing_caption="skip", max_broken=0)
    assert reds(images) == [0, 4]
    assert "3 images have no caption and are left out" in str(images.report)
    with pytest.raises(DataError, match="missing_caption"):
        load(write_parquet(tmp_path / "none.parquet", rows[1:4]), missing_caption="skip")


class HttpError(Exception):
    """An error of aiohttp, which has the status of the response."""

    def __init__(self, status):
        super().__init__(f"the status is {status}")
        self.status = status


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (HttpError(403), "its file cannot be read: the status is 403"),
        (HttpError(503), None),
        (OSError(104, "reset"), None),
        (EOFError("cut short"), "its file cannot be read: cut short"),
        (OSError(13, "no"), "its file cannot be read: [Errno 13] no"),
        (FileNotFoundError("gone"), "its file does not exist: gone"),
        (ConnectionError("down"), None),
        (ImportError("install aiohttp"), "its file cannot be read: install aiohttp"),
    ],
)
def test_with_image_bytes_tells_lost_files_from_the_network(error, problem, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(rows_module.fsspec, "open", fail)
    row = as_row("x", {"path": "https://somewhere/x.png", "bytes": None}, ["x"])
    if problem is None:
        with pytest.raises(ConnectionError):
            with_image_bytes(row)
    else:
        result = with_image_bytes(row)
        assert result["problem"] == problem
        assert result["image"] is None


def test_with_image_bytes_reports_an_unreadable_file(tmp_path):
    row = with_image_bytes(as_row("x", {"path": str(tmp_path), "bytes": None}, ["x"]))
    assert row["problem"].startswith("its file cannot be read: [Errno 21]")
    assert row["image"] is None


def failing(*errors):
    """A function that raises the errors, one a call, and then returns [1]; and those left."""
    left = list(errors)

    def attempt():
        if left:
            raise left.pop(0)
        return [1]

    return attempt, left


def test_retry_on_network_error_waits_ever_longer():
    waited = []
    attempt, _ = failing(ConnectionError("reset"), TimeoutError("slow"))
    assert retry_on_network_error(attempt, "it", waited.append) == [1]
    assert tuple(waited) == READ_WAITS[:2]
    attempt, left = failing(*(ConnectionError(f"{i}") for i in range(9)))
    waited.clear()
    with pytest.raises(Unreachable, match=r"it in 5 attempts \(4\)"):
        retry_on_network_error(attempt, "it", waited.append)
    assert tuple(waited) == READ_WAITS == tuple(sorted(READ_WAITS))
    assert len(left) == 4


def test_retry_on_network_error_stops_at_other_errors():
    waited = []
    attempt, left = failing(ConnectionError("reset"), OSError("disk"), OSError("disk"))
    with pytest.raises(DataError, match="it: disk"):
        retry_on_network_error(attempt, "it", waited.append)
    assert tuple(waited) == READ_WAITS[:1]
    assert len(left) == 1
