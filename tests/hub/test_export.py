"""Exports and pulled models appear complete or not at all."""

import shutil

import pytest
from hub_world import full_disk

from pipeline.hub.client import HubError
from pipeline.hub.export import export, pull, require_new_folder
from pipeline.models import trusted
from pipeline.runs.folder import RunFolder


@pytest.mark.parametrize("command", ["pull", "export"])
def test_atomic_folder_leaves_nothing_behind(command, run, tmp_path, monkeypatch):
    monkeypatch.setattr(trusted, "download_model", lambda model: run.pipeline)

    def make(folder):
        return pull("tester/tiny", folder) if command == "pull" else export(run.folder, folder)

    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match=f"{tmp_path}/file/new failed: .*File exists"):
        make(tmp_path / "file" / "new")
    with full_disk(), pytest.raises(HubError, match=f"{tmp_path}/new failed: .*too large"):
        make(tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
    assert make(tmp_path / "new").is_dir()
    told = [path for path in (tmp_path / "new").rglob("*.*") if path.is_file()]
    leaks = [path for path in told if str(run.folder.parent).encode() in path.read_bytes()]
    assert not leaks


def test_require_new_folder_refuses_a_taken_name(tmp_path):
    require_new_folder(tmp_path / "new")
    with pytest.raises(HubError, match=str(tmp_path)):
        require_new_folder(tmp_path)


def test_export_needs_a_finished_run(run, tmp_path):
    with pytest.raises(HubError, match=f"{tmp_path} is not a finished run"):
        export(tmp_path, tmp_path / "new")
    resumed = RunFolder(tmp_path / "resumed")
    shutil.copytree(run.folder, resumed.folder)
    (resumed.folder / "training.json").unlink()
    resumed.card.unlink()
    if not resumed.finished:
        with pytest.raises(HubError, match=f"{resumed.folder} is being trained"):
            export(resumed.folder, tmp_path / "new")
