"""Packages of drawings: downloaded once, checked, and looked up by code point or by name."""

import dataclasses
import shutil

import numpy as np
import pytest
from emoji_packages import disc, pack, pack_icons, pack_images, pack_tags

from pipeline.data.emoji import packages
from pipeline.data.emoji.catalogue import EmojiError, catalogue
from pipeline.data.emoji.packages import IconSet, ImageFiles
from pipeline.data.emoji.styles import STYLES

HALF = '<rect width="16" height="32" fill="red"/>'


@pytest.fixture
def named():
    return {entry.caption: entry for entry in catalogue()}


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Put a script on PATH as the only npm, and return a function that writes it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("sh", "cp"):
        (folder / program).symlink_to(shutil.which(program))
    monkeypatch.setenv("PATH", str(folder))

    def write(script):
        (folder / "npm").write_text(f"#!{folder}/sh\n{script}\n")
        (folder / "npm").chmod(0o755)

    return write


def icons_of(package, folder):
    return IconSet(packages.fetch_archive(package, folder))


def test_fetch_archive_downloads_a_package_once(tmp_path, npm):
    package = pack(tmp_path / "registry", "@some/emoji", {"a.json": b"{}"})
    npm(f'echo "$@" >> {tmp_path}/calls; cp {tmp_path}/registry/*.tgz "$4"')
    for _ in range(2):
        archive = packages.fetch_archive(package, tmp_path / "cache")
    assert archive == tmp_path / "cache" / "some-emoji-1.0.0.tgz"
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("pack ") and call.endswith(" @some/emoji@1.0.0")
    assert list((tmp_path / "cache").iterdir()) == [archive]


def test_fetch_archive_refuses_another_digest(tmp_path):
    package = pack(tmp_path, "emoji", {"a.json": b"{}"})
    other = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(EmojiError, match=f"emoji@1.0.0.*{package.sha256}.*{'0' * 64}"):
        packages.fetch_archive(other, tmp_path)


def test_fetch_archive_says_what_is_missing_without_npm(tmp_path, npm):
    with pytest.raises(EmojiError, match=r"npm.*fluent-emoji-3d@1\.1\.0.*Node.*emoji-3d-1\.1\.0"):
        packages.fetch_archive(STYLES["3d"], tmp_path)


@pytest.mark.parametrize(
    ("script", "reason"), [("echo ENOTFOUND >&2; exit 1", "ENOTFOUND"), ("exit 0", "no reason")]
)
def test_fetch_archive_reports_why_npm_failed(tmp_path, npm, script, reason):
    npm(script)
    with pytest.raises(EmojiError, match=rf"noto@1\.2\.9.*{reason}.*network"):
        packages.fetch_archive(STYLES["noto"], tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_keys_of_an_icon_set_use_its_code_points(tmp_path, named):
    icons = {"animal": disc("red"), "keycap-hash": disc("red"), "wolf": disc("red")}
    chars = {"1f98a": "animal", "0023-20e3": "keycap-hash"}
    package = pack_icons(tmp_path, "coded", icons, chars)
    entries = [named["fox"], named["keycap #"], named["wolf"]]
    keys = icons_of(package, tmp_path).keys_of(entries)
    assert keys == {named["fox"].emoji: "animal", named["keycap #"].emoji: "keycap-hash"}


def test_keys_of_an_icon_set_without_code_points_use_names(tmp_path, named):
    """An icon belongs to the emoji that it is named after, and to none if two match as well."""
    icons = dict.fromkeys(("pinata", "cricket-game", "robot-face", "keycap"), disc("red"))
    aliases = {"cricket": {"parent": "cricket-game"}, "robot": {"parent": "robot-face"}}
    package = pack_icons(tmp_path, "named", icons, aliases=aliases)
    captions = ("piñata", "cricket", "cricket game", "robot", "keycap #", "keycap *", "fox")
    keys = icons_of(package, tmp_path).keys_of([named[caption] for caption in captions])
    assert keys == {
        named["piñata"].emoji: "pinata",
        named["cricket game"].emoji: "cricket-game",
        named["robot"].emoji: "robot",
    }


def test_draw_renders_icons_at_any_size(tmp_path):
    aliases = {"right": {"parent": "left", "hFlip": True}}
    package = pack_icons(tmp_path, "half", {"left": HALF}, aliases=aliases)
    icons = icons_of(package, tmp_path)
    for size in (24, 100):
        left = np.asarray(icons.draw("left", size))
        assert left.shape == (size, size, 4)
        assert left[0, 0].tolist() == [255, 0, 0, 255]
        assert left[0, -1, 3] == 0
        np.testing.assert_array_equal(np.asarray(icons.draw("right", size)), left[:, ::-1])


def test_draw_centres_an_icon_that_is_no_square(tmp_path):
    package = pack_icons(tmp_path, "wide", {"bar": '<rect width="32" height="16"/>'})
    icons = icons_of(package, tmp_path)
    icons.icons["bar"]["height"] = 16
    alpha = np.asarray(icons.draw("bar", 32))[:, 0, 3]
    assert alpha.nonzero()[0].tolist() == list(range(8, 24))


def test_image_files_are_found_by_code_points(tmp_path, named):
    colors = {"1f98a": "#ff0000", "2764-fe0f": "#00ff00"}
    archive = packages.fetch_archive(pack_images(tmp_path, "files", colors), tmp_path)
    files = ImageFiles(archive)
    keys = files.keys_of([named["fox"], named["red heart"], named["wolf"]])
    assert set(keys) == {named["fox"].emoji, named["red heart"].emoji}
    heart = np.asarray(files.draw(keys[named["red heart"].emoji], 24))
    assert heart.shape == (24, 24, 4)
    assert heart[12, 12].tolist() == [0, 255, 0, 255]


def test_load_tags_ignores_variation_selectors(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "TAGS", pack_tags(tmp_path, {"❤️": ["love"], "🦊": []}))
    assert packages.load_tags(tmp_path) == {"2764": ["love"], "1f98a": []}
