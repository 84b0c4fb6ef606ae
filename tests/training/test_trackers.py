"""Trackers get the curves and no secrets, and never end a training."""

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm.auto import tqdm
from training_runs import train

from pipeline.runs.folder import RunFolder


def test_trackers_send_curves_and_settings_without_token(config, tmp_path):
    train(config, tmp_path, "--report_to", "tensorboard", "--hub.token", "hf_canary")
    files = [path for path in (tmp_path / "tiny").rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".safetensors"]
    assert not [path for path in files if b"hf_canary" in path.read_bytes()]
    curves, shown = {}, []
    for folder in {path.parent for path in files if "tfevents" in path.name}:
        events = EventAccumulator(str(folder)).Reload()
        for name in events.Tags()["scalars"]:
            curves[name] = [event.step for event in events.Scalars(name)]
        for name in events.Tags()["images"]:
            shown += [image.step for image in events.Images(name) if image.width == 32]
    assert curves["loss"] == curves["lr"] == [1, 2, 3, 4, 5, 6]
    for name in ("train_loss", "held_out_loss", "train_x_0_error/6"):
        assert curves[name] == [3, 6]
    assert shown == [4, 6]
    settings = [path.read_text() for path in files if path.name == "hparams.yml"]
    assert "train.lr: 0.001" in "".join(settings)


def test_tensorboard_log_survives_a_run_named_like_its_result(config, tmp_path):
    """The result replaces runs/NAME/pipeline."""
    train(config, tmp_path, "--report_to", "tensorboard", "--name", "pipeline")
    run = tmp_path / "pipeline"
    events = list(run.rglob("*tfevents*"))
    assert events
    assert all(path.is_relative_to(run / "logs") for path in events)


@pytest.mark.parametrize("method", ["init_trackers", "log"])
def test_trackers_report_a_failure_once(method, config, tmp_path, monkeypatch):
    def fail(*_args, **_more):
        raise TimeoutError("no answer\nfrom it")

    messages = []
    monkeypatch.setattr(Accelerator, method, fail)
    monkeypatch.setattr(tqdm, "write", messages.append)
    train(config, tmp_path, "--report_to", "tensorboard")
    (message,) = messages
    assert "TimeoutError: no answer from it" in message
    assert RunFolder(tmp_path / "tiny").finished
