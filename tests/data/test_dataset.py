"""Prepared datasets: broken rows, reports, indexing and fingerprints."""

import numpy as np
import pytest
import torch
from datasets_on_disk import encode_image, load_images, reasons, reds, save_image, write_listing
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import dataset, image_ops
from pipeline.data.emoji import writer
from pipeline.data.sources import rows as rows_module
from pipeline.data.sources.rows import DataError


def test_load_split_reads_an_emoji_folder(tmp_path):
    folder = writer.write_emoji(tmp_path / "shapes", "shapes", size=16)
    images = load_images(folder, "test", 16, cache_dir=tmp_path)
    assert len(images) == 6
    assert images.captions[0] == "green heart"
    assert images.metadata[0]["factors"]["color"] == "green"
    with Image.open(folder / "test" / images.metadata[3]["file_name"]) as image:
        assert (images.images[3].permute(1, 2, 0).numpy() == np.asarray(image)).all()


def test_prepare_images_skips_and_names_broken_files(load, tmp_path):
    """A text, an empty file, truncated PNG and JPEG files; the good image stays."""
    folder = tmp_path / "set"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (folder / "text.png").write_bytes(b"not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(encode_image(noise)[:3000])
    (folder / "cut.jpg").write_bytes(encode_image(noise, "JPEG")[:2000])
    save_image(folder / "good.png")
    images = load()
    assert images.captions == ["good"]
    assert len(images.images) == 1
    assert reasons(images).keys() == {"text.png", "empty.png", "cut.png", "cut.jpg"}
    assert "cannot identify" in reasons(images)["text.png"]
    assert "truncated" in reasons(images)["cut.jpg"]
    assert "1 of 5 images usable" in str(images.report)
    assert "skipped cut.png: " in str(images.report)


def test_prepare_images_refuses_too_many_broken_rows(load, tmp_path):
    folder = tmp_path / "set"
    for i in range(19):
        save_image(folder / f"square {i}.png")
    (folder / "bad.png").write_bytes(b"")
    assert len(load(max_broken=0.05)) == 19
    (folder / "worse.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"skipped bad.png: (.|\n)*2 of 21 rows .*\(5%\)"):
        load(max_broken=0.05)


def test_dataset_report_names_five_rows_and_counts_all():
    reasons = ["cut: at 7", "cut: at 9", "no text, got 3", "cut: at 1", "gone", "gone", "cut: at 2"]
    broken = tuple((f"{i}.png", reason) for i, reason in enumerate(reasons))
    report = str(dataset.DatasetReport("x", 9, broken))
    assert report.count("skipped") == 6
    assert report.endswith("skipped 2 more")
    assert "7 broken rows: 4 x cut, 2 x gone, 1 x no text\n" in report


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
    assert report.endswith("2 images are duplicates, e.g. b.png of a.png")


def test_dataset_notes_are_short_for_uniform_images(load, tmp_path):
    save_image(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("a")
    assert str(load().report).endswith("1 of 1 images usable\nshorter sides of 8 pixels")


def test_with_caption_lengths_counts_tokens_and_cut_captions(load, tmp_path, tokenizer):
    """[CLS] and [SEP] count, as they do in what the encoder reads."""
    for name in ("cat", "red_heart", "green_cat_face", "red"):
        save_image(tmp_path / "set" / f"{name}.png")
    images = load()
    note = "captions of 3 to 5 (median 4) tokens"
    assert note in str(images.with_caption_lengths(tokenizer, 5).report)
    cut = str(images.with_caption_lengths(tokenizer, 4).report)
    assert f"{note}; 1 of 4 are cut at 4, e.g. 'green cat face'" in cut
    assert "tokens" not in str(images.report)


def test_load_splits_keeps_the_images_a_run_began_with(tmp_path, monkeypatch):
    """An image that becomes readable would change the data of a resumed run."""
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "set" / "train" / name)
    config = DataConfig(
        str(tmp_path / "set"),
        held_out=None,
        resolution=8,
        cache=str(tmp_path / "cache"),
        max_broken=0.9,
    )
    real = rows_module.fetch_image_bytes

    def stale(image):
        if image["path"].endswith("b.png"):
            raise OSError(116, "Stale file handle")
        return real(image)

    with monkeypatch.context() as broken:
        broken.setattr(rows_module, "fetch_image_bytes", stale)
        started = dataset.load_splits(config, retry_failed=True)[0]
    assert started.captions == ["a"]
    assert dataset.load_splits(config)[0].fingerprint == started.fingerprint
    assert dataset.load_splits(config, retry_failed=True)[0].captions == ["a", "b"]


def test_any_failure_readable_reads_a_file_that_came_back(load, tmp_path):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "set" / name)
    (tmp_path / "set" / "b.png").rename(tmp_path / "away.png")
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "away.png")
    (tmp_path / "away.png").rename(tmp_path / "unmounted.png")
    images = load()
    assert images.captions == ["a"]
    assert reasons(images)["b.png"].startswith("its file cannot be read: [Errno 2]")
    (tmp_path / "unmounted.png").rename(tmp_path / "away.png")
    assert load().captions == ["a", "b"]


def test_images_are_read_in_any_order_by_any_index(load, tmp_path):
    for i in range(5):
        save_image(tmp_path / "set" / f"square {i}.png", (i, 0, 0))
    images = load().images

    def red(batch):
        return batch[:, 0, 0, 0].tolist()

    assert images.shape == (5, 3, 8, 8)
    assert len(images) == 5
    assert images[2].dtype == torch.uint8
    assert red(images[torch.tensor([4, 0, 4])]) == [4, 0, 4] == red(images[[4, 0, 4]])
    assert red(images[1:4]) == [1, 2, 3]
    assert red(images[-2:]) == [3, 4]
    assert images[5:].shape == (0, 3, 8, 8)
    assert images[3].shape == (3, 8, 8)
    assert int(images[3][0, 0, 0]) == 3 == int(images[torch.tensor(3)][0, 0, 0])
    with pytest.raises(IndexError):
        images[5]


def test_prepare_images_decodes_again_when_a_file_changes(load, tmp_path, monkeypatch):
    calls = []
    load_rgb = image_ops.load_rgb
    monkeypatch.setattr(image_ops, "load_rgb", lambda *a: calls.append(1) or load_rgb(*a))
    save_image(tmp_path / "set" / "a.png", "red")
    save_image(tmp_path / "set" / "b.png", "red")
    first = load()
    assert load().fingerprint == first.fingerprint
    assert len(calls) == 2
    assert load(resolution=4).fingerprint != first.fingerprint
    assert len(calls) == 4
    save_image(tmp_path / "set" / "a.png", "green")
    changed = load()
    assert len(calls) == 6
    assert changed.fingerprint != first.fingerprint
    assert int(changed.images[0][0, 0, 0]) == 0


def test_prepare_rows_keeps_order_across_threads(load, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "available_cores", lambda: 5)
    for i in range(150):
        save_image(tmp_path / "set" / f"square {i:03d}.png", (i, 0, 0), size=(8, 8 + 40 * (i % 3)))
    images = load()
    assert reds(images) == [*range(150)]
    assert images.captions == [f"square {i:03d}" for i in range(150)]


def test_fingerprint_is_of_pixels_and_captions_not_paths(load, tmp_path):
    """A run may resume where its data lies elsewhere."""
    save_image(tmp_path / "set" / "a.png")
    save_image(tmp_path / "copy" / "a.png")
    save_image(tmp_path / "other" / "b.png")
    one, copy, other = [load(tmp_path / name) for name in ("set", "copy", "other")]
    assert one.fingerprint == copy.fingerprint != other.fingerprint
    assert one.pixels == copy.pixels == other.pixels


def test_caption_rows_are_captions_of_the_rows(load, tmp_path):
    captions = {"a.png": ["one"], "b.png": ["two", "three"], "c.png": ["four", "five", "six"]}
    for name in captions:
        save_image(tmp_path / "set" / name)
    listing = [{"file_name": name, "caption": texts} for name, texts in captions.items()]
    write_listing(tmp_path / "set", *listing)
    images = load()
    rows = torch.tensor([2, 0, 1, 2, 1])
    seen = [set() for _ in rows]
    for step in range(40):
        indices = images.caption_rows(0, step, range(5), rows)
        for slot, index in enumerate(indices.tolist()):
            seen[slot].add(images.all_captions[index])
    assert seen == [set(listing[row]["caption"]) for row in rows.tolist()]
