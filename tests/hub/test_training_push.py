"""Training checks the account first, pushes last, and the same command tries again."""

import pytest
import yaml
from hub_world import CANARY
from huggingface_hub import ModelCard
from PIL import Image

from pipeline.config import HubConfig, load_file

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(place, bert, tmp_path):
    """The file of a run of two steps on four squares."""
    squares = tmp_path / "squares" / "train"
    squares.mkdir(parents=True)
    for name in ("red", "green", "blue", "white"):
        Image.new("RGB", (16, 16), name).save(squares / f"{name}.png")
    values = {
        "name": "trained",
        "output": str(tmp_path / "runs"),
        "hub": {"repo_id": "trained"},
        "data": {
            "source": str(squares.parent),
            "held_out": None,
            "resolution": 16,
            "caption_length": 8,
            "cache": str(tmp_path / "cache"),
        },
        "model": {
            "patch_size": 2,
            "channels": [32],
            "attention": [True],
            "heads": 4,
            "text_in_time": False,
            "text_encoder": str(bert),
        },
        "diffusion": {"prediction_type": "sample", "num_train_timesteps": 100, "beta_end": 0.2},
        "train": {"steps": 2, "batch_size": 2, "threads": 1},
        "sample": {"prompts": ["red"], "w": [1], "default_w": 1, "steps": 2},
    }
    (tmp_path / "trained.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "trained.yaml"


def test_train_checks_first_and_pushes_last(hub, owner, settings, tmp_path):
    def train(*options):
        owner(
            "from accelerate.state import AcceleratorState\n"
            "AcceleratorState._reset_state(reset_partial_state=True)"
        )
        return owner.command("train", "--config", settings, *options)

    folder = tmp_path / "runs" / "trained"
    code, output = train("--hub.repo_id", "somebody/else")
    assert code == 2 and "somebody/else failed: status 403" in output, output
    assert not folder.exists(), "nothing was begun"
    hub.faults += [("POST", "/commit/", 403)]
    code, output = train("--hub.token", CANARY)
    assert code == 1 and f"`direct-jump push {folder} trained`" in output
    assert (folder / "pipeline" / "model_index.json").is_file()
    code, output = train("--hub.private", "true")
    assert code == 0 and output.endswith(f"Pushed to {hub.endpoint}/tester/trained")
    files = hub.files("models", "tester/trained")
    needed = {"README.md", "images/samples.png", "images/prompt-0.png", "training_config.yaml"}
    assert needed < files.keys()
    widget = ModelCard(files["README.md"].decode()).data.widget
    assert widget == [{"text": "red", "output": {"url": "images/prompt-0.png"}}]
    assert load_file(folder / "config.yaml").hub == HubConfig("trained")
