"""Runs that the tests of training share; they are read and copied, never changed."""

import pytest
from accelerate import Accelerator
from finetuning import FINETUNE, LORA, stable_diffusion
from training_runs import (  # noqa: F401
    COLOURS,
    encoder,
    started,
    train,
    write_config,
    write_images,
    write_template,
)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Twelve plain squares in an image folder, three of them held out."""
    folder = tmp_path_factory.mktemp("squares")
    return write_images(folder, COLOURS, 20, held_out=COLOURS[9:])


@pytest.fixture
def config(images, encoder, tmp_path):
    return write_config(tmp_path, images, encoder)


@pytest.fixture(scope="session")
def finished(images, encoder, tmp_path_factory):
    """The folder of an uninterrupted run, and the result of the command."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "tiny", train(write_config(folder, images, encoder), folder)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a base model, as a download from the Hub leaves one."""
    folder = tmp_path_factory.mktemp("sd") / "base"
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def edged(tmp_path_factory):
    """Eight squares with a black edge on the left, which shows in their mirror images."""
    return write_images(tmp_path_factory.mktemp("edged"), COLOURS[:8], 30, edge=4)


@pytest.fixture(scope="session")
def tuning(edged, base, tmp_path_factory):
    """The settings of a fine-tune of the base model."""
    folder = tmp_path_factory.mktemp("tuning")
    values = {"SOURCE": edged, "CACHE": folder / "cache", "BASE": base}
    return write_template(folder / "tuned.yaml", FINETUNE, values)


@pytest.fixture(scope="session")
def adapted(tuning, tmp_path_factory):
    """The folder of a LoRA run."""
    out = tmp_path_factory.mktemp("lora")
    train(tuning, out, *LORA)
    return out / "tuned"
