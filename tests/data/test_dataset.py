"""Prepared datasets: broken rows, reports, indexing and fingerprints."""

import numpy as np
import pytest
import torch
from datasets_on_disk import encode_image, load_images, save_image, write_listing
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import dataset, image_ops
from pipeline.data.emoji import writer
from pipeline.data.sources import rows as rows_module
from pipeline.data.sources.rows import DataError, fetch_image_bytes


def test_load_split_reads_an_emoji_folder(tmp_path):
    folder = writer.write_emoji(tmp_path / "shapes", "shapes", size=16)
    images = load_images(folder, "test", 16, cache_dir=tmp_path)
    assert (
        len(images) == 6
        and images.captions[0] == "green heart"
        and images.metadata[0]["factors"]["color"] == "green"
    )
    with Image.open(folder / "test" / images.metadata[3]["file_name"]) as image:
        assert (images.images[3].permute(1, 2, 0).numpy() == np.asarray(image)).all()


def test_prepare_images_skips_and_names_broken_files(load, tmp_path):
    """A text, an empty file, cut PNG and JPEG files, one of which ends a plain iteration; the good ones stay."""
    folder = tmp_path / "set"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name, content in [
        ("text.png", b"not a image"),
        ("empty.png", b""),
        ("cut.png", encode_image(noise)[:3000]),
        ("cut.jpg", encode_image(noise, "JPEG")[:2000]),
    ]:
        (folder / name).write_bytes(content)
    save_image(folder / "good.png")
    images = load()
    assert images.captions == ["good"] and len(images.images) == 1
    assert reasons(images).keys() == {"text.png", "empty.png", "cut.png", "cut.jpg"}
    assert (
        "cannot identify" in reasons(images)["text.png"]
        and "truncated" in reasons(images)["cut.jpg"]
    )
    assert "1 of 5 images usable" in str(images.report) and "skipped cut.png: " in str(
        images.report
    )


def test_prepare_images_refuses_too_many_broken_rows(load, tmp_path):
    folder = tmp_path / "set"
    for i in range(19):
        save_image(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"")
    assert len(load(max_broken=0.05)) == 19
    (folder / "worse.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"skipped bad.png: (.|\n)*2 of 21 rows are broken, at most 5% may be"
    ):
        load(max_broken=0.05)


def test_dataset_report_names_five_rows_and_counts_all():
    reasons = ["cut: at 7", "cut: at 9", "no text, got 3", "cut: at 1", "gone", "gone", "cut: at 2"]
    report = dataset.DatasetReport(
        "x", 9, tuple((f"{i}.png", reason) for i, reason in enumerate(reasons))
    )
    assert str(report).count("skipped") == 6 and str(report).endswith("skipped 2 more")
    assert "7 broken rows: 4 x cut, 2 x gone, 1 x no text\n" in str(report)


def test_dataset_notes_report_sizes_and_duplicates(load, tmp_path):
    for name, color, size in [
        ("a", "red", (8, 20)),
        ("b", "red", (50, 40)),
        ("c", "blue", (6, 9)),
        ("d", "blue", (8, 8)),
        ("e", "green", (100, 30)),
    ]:
        save_image(tmp_path / "set" / f"{name}.png", color, size)
    report = str(load().report)
    assert "shorter sides of 6 to 40 (median 8) pixels; 1 are below 8 and are enlarged\n" in report
    assert report.endswith("2 images are the same as an earlier one, e.g. b.png as a.png")
    save_image(tmp_path / "one" / "a.png")
    (tmp_path / "one" / "a.txt").write_text("a")
    assert str(load(tmp_path / "one").report).endswith(
        "1 of 1 images usable\nshorter sides of 8 pixels"
    )


def test_with_caption_lengths_counts_tokens_and_cut_captions(load, tmp_path, tokenizer):
    """[CLS] and [SEP] count, as they do in what the encoder reads."""
    for name in ("cat", "red_heart", "green_cat_face", "red"):
        save_image(tmp_path / "set" / f"{name}.png")
    images = load()
    assert "captions of 3 to 5 (median 4) tokens" in str(
        images.with_caption_lengths(tokenizer, 5).report
    )
    cut = str(images.with_caption_lengths(tokenizer, 4).report)
    assert "captions of 3 to 5 (median 4) tokens; 1 of 4 are cut at 4, e.g. 'green cat face'" in cut
    assert "tokens" not in str(images.report)


def test_load_splits_keeps_the_images_a_run_began_with(tmp_path, monkeypatch):
    """One that can be read again would be other data."""
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "set" / "train" / name)
    config = DataConfig(
        str(tmp_path / "set"),
        held_out=None,
        resolution=8,
        cache=str(tmp_path / "cache"),
        max_broken=0.9,
    )
    real = fetch_image_bytes

    def stale(image):
        if image["path"].endswith("b.png"):
            raise OSError(116, "Stale file handle")
        return real(image)

    with monkeypatch.context() as broken:
        broken.setattr(rows_module, "fetch_image_bytes", stale)
        begun = dataset.load_splits(config, again=True)[0]
    assert (
        begun.captions == ["a"] and dataset.load_splits(config)[0].fingerprint == begun.fingerprint
    )
    assert dataset.load_splits(config, again=True)[0].captions == ["a", "b"]


def test_any_failure_readable_reads_a_file_that_came_back(load, tmp_path):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "set" / name)
    (tmp_path / "set" / "b.png").rename(tmp_path / "away.png")
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "away.png")
    (tmp_path / "away.png").rename(tmp_path / "unmounted.png")
    images = load()
    assert (
        images.captions == ["a"]
        and "its file cannot be read: [Errno 2] No such file" in reasons(images)["b.png"]
    )
    (tmp_path / "unmounted.png").rename(tmp_path / "away.png")
    assert load().captions == ["a", "b"]


def test_images_are_read_in_any_order_by_any_index(load, tmp_path):
    for i in range(5):
        save_image(tmp_path / "set" / f"{i}.png", (i, 0, 0))
    images = load().images
    assert images.shape == (5, 3, 8, 8) and len(images) == 5 and images[2].dtype == torch.uint8
    first = lambda batch: batch[:, 0, 0, 0].tolist()
    assert first(images[torch.tensor([4, 0, 4])]) == [4, 0, 4] == first(images[[4, 0, 4]])
    assert first(images[1:4]) == [1, 2, 3] and first(images[-2:]) == [3, 4]
    assert images[3].shape == (3, 8, 8) and int(images[3][0, 0, 0]) == 3 == int(
        images[torch.tensor(3)][0, 0, 0]
    )
    with pytest.raises(IndexError):
        images[5]


def test_prepare_images_decodes_again_when_a_file_changes(load, tmp_path, monkeypatch):
    calls, upright = [], image_ops.load_rgb
    monkeypatch.setattr(image_ops, "load_rgb", lambda *a: calls.append(1) or upright(*a))
    save_image(tmp_path / "set" / "a.png", "red")
    save_image(tmp_path / "set" / "b.png", "red")
    first, again = load(), load()
    assert len(calls) == 2 and first.fingerprint == again.fingerprint
    assert load(resolution=4).fingerprint != first.fingerprint and len(calls) == 4
    save_image(tmp_path / "set" / "a.png", "green")
    changed = load()
    assert (
        len(calls) == 6
        and changed.fingerprint != first.fingerprint
        and int(changed.images[0][0, 0, 0]) == 0
    )


def test_prepare_rows_keeps_order_across_threads(load, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "cores", lambda: 5)
    for i in range(150):
        save_image(tmp_path / "set" / f"{i:03d}.png", (i, 0, 0), size=(8, 8 + 40 * (i % 3)))
    found = load()
    assert found.images[:][:, 0, 0, 0].tolist() == [*range(150)] and found.captions == [
        f"{i:03d}" for i in range(150)
    ]


def test_fingerprint_is_of_pixels_and_captions_not_paths(load, tmp_path):
    """So that a run may go on where its data lies elsewhere."""
    save_image(tmp_path / "set" / "a.png")
    save_image(tmp_path / "copy" / "a.png")
    save_image(tmp_path / "other" / "b.png")
    fingerprints = [load(tmp_path / name).fingerprint for name in ("set", "copy", "other")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_caption_rows_are_captions_of_the_rows(load, tmp_path):
    several = {"a.png": ["one"], "b.png": ["two", "three"], "c.png": ["four", "five", "six"]}
    for name in several:
        save_image(tmp_path / "set" / name)
    write_listing(
        tmp_path / "set",
        *({"file_name": name, "caption": captions} for name, captions in several.items()),
    )
    images = load()
    rows, seen = torch.tensor([2, 0, 1, 2, 1]), [set() for _ in range(5)]
    for step in range(40):
        chosen = images.chosen(0, step, range(5), rows)
        for slot, caption in enumerate(chosen.tolist()):
            seen[slot].add(images.all_captions[caption])
    assert seen == [set(several["abc"[row] + ".png"]) for row in rows.tolist()]
