"""A pipeline loads from wherever it lies, with trusted classes only, or one error says why not."""

import numpy as np
import pytest
from tiny import tiny_pipeline

from pipeline import TextToImagePipeline, load_pipeline
from pipeline.config import Config
from pipeline.models import loading, trusted
from pipeline.models.trusted import ModelError
from pipeline.runs.folder import RunFolder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run with a saved pipeline."""
    folder = tmp_path_factory.mktemp("run")
    tiny_pipeline(w=2.0).save_pretrained(folder / "pipeline")
    return folder


def test_load_pipeline_takes_a_run_and_a_saved_folder(saved):
    request = {"seed": 0, "num_inference_steps": 2, "output_type": "np"}
    images = []
    for folder in (saved, saved / "pipeline", str(saved)):
        pipe = load_pipeline(folder)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.config.w == 2.0
        images.append(pipe("red heart", **request).images)
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])


def test_load_pipeline_registers_what_may_be_loaded():
    assert TextToImagePipeline.trusted is trusted


def test_load_from_folder_reports_a_corrupt_file(saved, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded"):
        loading.load_from_folder(tmp_path)


def test_load_with_adapter_refuses_a_base_on_another_machine(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (tmp_path / "training_config.yaml").write_text("model: {pretrained: /srv/model}")
    with pytest.raises(ModelError, match="'/srv/model'"):
        load_pipeline(str(tmp_path))


def test_load_checkpoint_refuses_a_corrupt_one(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()
    run.config.write_text(Config().to_yaml())
    (run.checkpoints / "10").mkdir()
    with pytest.raises(ValueError, match=str(run.checkpoints / "10")):
        loading.load_checkpoint(run, 10)
