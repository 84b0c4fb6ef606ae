"""The Hub stand-in against the real client, which cannot tell it from the Hub."""

import subprocess
import sys

import pytest
from hub_stub import LOST, HubStub

PRELUDE = """
import filecmp, os, pathlib, numpy, sys
from huggingface_hub import *
from huggingface_hub import errors
from safetensors.numpy import save_file
out = pathlib.Path(os.environ["HF_HOME"]).parent / "out"
(out / "unet").mkdir(parents=True, exist_ok=True)
weights = {"w": numpy.random.default_rng(0).random(3_000_000, "float32")}
save_file(weights, str(out / "unet/model.safetensors"))
(out / "README.md").write_text("---\\nlicense: mit\\n---\\n# héllo")
(out / "empty.txt").write_text("")
def raises(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind:
        return
    raise AssertionError(f"no {kind}")
"""


@pytest.fixture
def hub():
    with HubStub() as server:
        yield server


def client(hub, tmp_path, code, **env):
    """Run code in a process whose Hub this is."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env=hub.env(tmp_path / "home", **env),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_upload_folder_of_12_mb_comes_back_the_same(hub, tmp_path):
    hub.faults += [("PUT", "/_lfs/", 503)]
    client(
        hub,
        tmp_path,
        """
repo = create_repo("round-trip", exist_ok=True).repo_id
assert repo == "tester/round-trip" == create_repo(repo, exist_ok=True).repo_id
commit = upload_folder(repo_id=repo, folder_path=out)
back = pathlib.Path(snapshot_download(repo))
assert back.name == commit.oid
for name in ("unet/model.safetensors", "README.md", "empty.txt"):
    assert filecmp.cmp(out / name, back / name, shallow=False), name
assert upload_folder(repo_id=repo, folder_path=out).oid == commit.oid  # unchanged: no commit
""",
    )
    assert len(hub.files("models", "tester/round-trip")["unet/model.safetensors"]) > 10_000_000
    assert hub.faults == []
    assert sum(method == "PUT" for method, _ in hub.requests) == 2, "one of them failed"


def test_error_answers_become_the_clients_classes(hub, tmp_path):
    hub.add("other/private", {"a": b""}, private=True)
    hub.add("other/gated", {"a": b""}, gated=True)
    client(
        hub,
        tmp_path,
        """
create_repo("r")
raises(errors.RepositoryNotFoundError, model_info, "tester/none")
raises(errors.RepositoryNotFoundError, model_info, "other/private")
raises(errors.GatedRepoError, hf_hub_download, "other/gated", "a")
raises(errors.RevisionNotFoundError, model_info, "tester/r", revision="none")
raises(errors.EntryNotFoundError, hf_hub_download, "tester/r", "none.json")
raises(errors.HfHubHTTPError, create_repo, "r")
raises(errors.HfHubHTTPError, create_repo, "other/s")
for token in ("hf_wrong", "hf_reader"):
    raises(errors.HfHubHTTPError, create_repo, "s", token=token)
assert whoami(token="hf_reader")["auth"]["accessToken"]["role"] == "read"
(out / "README.md").write_text("---\\na:\\t b\\n---\\n")
raises(ValueError, upload_folder, repo_id="tester/r", folder_path=out)
""",
    )
    assert hub.files("models", "tester/r") == {}


def test_lost_answer_still_carries_out_the_request(hub, tmp_path):
    hub.faults += [("POST", "/commit/", LOST)]
    client(
        hub,
        tmp_path,
        """
repo = create_repo("r").repo_id
raises(errors.HTTPError, upload_file, path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=repo)
""",
    )
    assert hub.files("models", "tester/r") == {"x.txt": b"x"}


def test_commit_knows_branches_tags_pulls_and_stale_parents(hub, tmp_path):
    client(
        hub,
        tmp_path,
        """
api, repo = HfApi(), create_repo("r").repo_id
first = upload_folder(repo_id=repo, folder_path=out)
api.create_tag(repo, tag="v1")
api.create_branch(repo, branch="step-100")
api.delete_file("empty.txt", repo)
upload_file(path_or_fileobj=b"x", path_in_repo="a/b.txt", repo_id=repo, revision="step-100")
pull = upload_file(path_or_fileobj=b"x", path_in_repo="c.txt", repo_id=repo, create_pr=True)
assert pull.pr_num and "c.txt" not in list_repo_files(repo)
assert "empty.txt" in list_repo_files(repo, revision="v1")
assert "empty.txt" not in list_repo_files(repo)
assert "a/b.txt" in list_repo_files(repo, revision="step-100")
assert [f.path for f in api.get_paths_info(repo, ["unet", "README.md"])] == ["README.md", "unet"]
stale = {"path_or_fileobj": b"y", "path_in_repo": "y.txt", "parent_commit": first.oid}
raises(errors.HfHubHTTPError, upload_file, repo_id=repo, **stale)
""",
    )


@pytest.mark.slow
def test_push_to_hub_of_a_dataset_loads_again(hub, tmp_path):
    client(
        hub,
        tmp_path,
        """
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as Pillow
images = [Pillow.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
rows = {"image": images, "text": ["a red square", "a blue square"]}
features = Features({"image": Image(), "text": Value("string")})
Dataset.from_dict(rows, features).push_to_hub("tester/squares")
back = load_dataset("tester/squares", split="train")
assert back["text"] == rows["text"] and back[0]["image"].getpixel((0, 0)) == (255, 0, 0)
assert len(list(load_dataset("tester/squares", split="train", streaming=True))) == 2
""",
    )
