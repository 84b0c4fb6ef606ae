"""Fixtures of the data tests: sources on disk, and a tokenizer of a few words."""

import pytest
from datasets_on_disk import encode_image, load_images, squares, write_parquet
from diffusers import AutoencoderKL
from PIL import Image
from tiny import seeded, tiny_text

from pipeline.config import DataConfig
from pipeline.data.streaming import Stream


@pytest.fixture
def load(tmp_path):
    """Load `tmp_path/set` or another source, with an own cache and no limit on broken rows."""
    (tmp_path / "set").mkdir()

    def call(source=None, **options):
        options = {"resolution": 8, "cache_dir": tmp_path / "cache", "max_broken": 1.0} | options
        return load_images(source or tmp_path / "set", **options)

    return call


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """35 images whose red is their number, in five shards."""
    folder = tmp_path_factory.mktemp("table")
    for i in range(5):
        write_parquet(folder / f"train-{i:05d}-of-00005.parquet", squares(7 * i, 7 * i + 7))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """A WordPiece tokenizer of five words."""
    return tiny_text(length=16, words=("red", "heart", "cat", "green", "face"))[0]


@pytest.fixture
def stream(table, tmp_path):
    """Open streams of the table or another source, closed after the test."""
    opened = []

    def call(source=table, seed=0, process=0, processes=1, **settings):
        defaults = {"resolution": 4, "shuffle_buffer": 4, "cache": str(tmp_path / "cache")}
        config = DataConfig(str(source), streaming=True, **defaults | settings)
        opened.append(Stream(config, seed, process, processes))
        return opened[-1]

    yield call
    for one in opened:
        one.close()


@pytest.fixture
def ramps(load, tmp_path):
    """Three images of 16 x 16 that get darker from one side to the other."""
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90).resize((16, 16))
    for i in range(3):
        shade = ramp.point(lambda value, i=i: min(255, value + 40 * i))
        (tmp_path / "set" / f"ramp {i}.png").write_bytes(encode_image(shade))
    return load(resolution=16)


@pytest.fixture
def vae():
    """A small AutoencoderKL of random weights."""
    return seeded(lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
