"""Models are found by their names, without imports of torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.models.locate import default_model, resolve_model_folder
from pipeline.runs.folder import ADAPTER_FILE, MODEL_INDEX, RunFolder


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        (MODEL_INDEX, "."),
        (f"pipeline/{MODEL_INDEX}", "pipeline"),
        (ADAPTER_FILE, "."),
        (f"lora/{ADAPTER_FILE}", "lora"),
    ],
)
def test_resolve_model_folder_finds_runs_and_folders(file, folder, tmp_path):
    touch(tmp_path / file)
    assert resolve_model_folder(tmp_path) == tmp_path / folder
    assert resolve_model_folder(str(tmp_path)) == tmp_path / folder


def test_resolve_model_folder_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "unfinished" / "config.yaml")
    touch(tmp_path / "model.ckpt")
    for name, hint in (
        ("empty", "Pass the folder"),
        ("unfinished", "training command"),
        ("model.ckpt", "from_single_file"),
        ("mistyped", "does not exist"),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path / name} .*{hint}"):
            resolve_model_folder(tmp_path / name)


def test_resolve_model_folder_needs_no_torch():
    code = (
        "import sys\nfrom pipeline.models.locate import resolve_model_folder\n"
        "try:\n    resolve_model_folder('./mistyped')\n"
        "except ValueError:\n    print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_default_model_prefers_pin_then_run_then_shipped(tmp_path):
    places = {
        "root": tmp_path / "runs",
        "shipped": tmp_path / "shipped",
        "pinned": tmp_path / "model.txt",
    }
    assert default_model(**places) is None
    touch(places["shipped"] / MODEL_INDEX)
    assert default_model(**places) == places["shipped"]
    for seconds, name in ((200, "newer"), (100, "older")):
        run = RunFolder(places["root"] / name)
        run.create()
        run.log(step=1)
        touch(run.pipeline / MODEL_INDEX)
        os.utime(run.metrics, (seconds, seconds))
    assert default_model(**places) == places["root"] / "newer"
    assert default_model(**places, finished=True) == places["shipped"]
    touch(RunFolder(places["root"] / "older").card)
    assert default_model(**places, finished=True) == places["root"] / "older"
    touch(places["pinned"], "tester/tiny@main\n")
    assert default_model(**places) == "tester/tiny@main"
