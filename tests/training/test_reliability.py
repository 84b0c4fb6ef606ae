"""Nothing is lost: kills at any moment, torn files, numbers that are not finite, dead ranks (docs/reliability.md)."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from test_train import (  # noqa: F401
    ROOT,
    alike,
    arguments,
    command,
    config,
    encoder,
    images,
    killed_after,
    log,
    same,
    script,
    started,
    train,
    wait_for,
    weights,
    whole,
    written,
)
from torch.distributed.elastic.utils.distributed import get_free_port

import train_text2img
from pipeline import randomness
from pipeline.config import load_file
from pipeline.data import dataset, sampler
from pipeline.runs.folder import RunFolder
from pipeline.runs.state_files import load_state

KILLS = int(os.environ.get("KILLS", "3"))  # 25 for the whole loop
QUICK = (
    "--train.save_every",
    "1",
    "--train.validate_every",
    "6",
    "--sample.every",
    "12",
    "--train.keep",
    "2",
    "--train.steps",
    "36" if KILLS > 3 else "12",
)  # nearly always in a save


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_bytes_of_one_left_alone(
    config, started, tmp_path
):
    """Case 1: SIGKILL at random moments, saves among them; the same command goes on each time."""
    train(config, tmp_path / "alone", *QUICK)
    moments, kills, out = random.Random(0), 0, tmp_path / "killed"
    metrics = out / "tiny" / "metrics.jsonl"
    while kills < KILLS:
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        process, said = started(script, arguments(config, out, *QUICK))
        wait_for(
            lambda: (
                not process.is_alive()
                or (metrics.exists() and metrics.read_text().count("\n") > lines)
            )
        )
        time.sleep(moments.random() * 0.1)
        process.kill()
        process.join()
        if (
            process.exitcode != -signal.SIGKILL
        ):  # it had come to its end: start anew, so that every kill hits a run at work
            assert process.exitcode == 0, said.read_text()
            assert same(weights(out / "tiny"), weights(tmp_path / "alone" / "tiny"))
            shutil.rmtree(out)
            continue
        kills += 1
    train(config, out, *QUICK)
    assert same(weights(out / "tiny"), weights(tmp_path / "alone" / "tiny"))
    assert log(out / "tiny") == log(tmp_path / "alone" / "tiny")
    assert not list((out / "tiny" / "checkpoints").glob(".tmp-*"))


def test_a_checkpoint_torn_in_any_file_is_passed_over_for_the_one_before(whole, tmp_path):
    """Cases 10 and 11: each file cut, emptied and gone in turn."""
    run = tmp_path / "tiny"
    shutil.copytree(whole[0], run)
    newest = run / "checkpoints" / "6"
    files = [p for p in sorted(newest.rglob("*")) if p.is_file()]
    assert {"manifest.json", "trainer.safetensors", "trainer.json", "config.json"} <= {
        p.name for p in files
    }
    for file in files:
        kept = file.read_bytes()
        for damage in (
            lambda: file.write_bytes(kept[: len(kept) // 2]),
            lambda: file.write_bytes(b""),
            file.unlink,
        ):
            damage()
            with pytest.warns(UserWarning, match="6 is skipped"):
                assert RunFolder(run).newest().name == "4", file
            file.write_bytes(kept)
    assert RunFolder(run).newest().name == "6"


def test_a_run_whose_newest_checkpoint_is_torn_ends_in_the_same_bytes(whole, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(whole[0], run)
    shutil.rmtree(run / "pipeline")
    (run / "checkpoints" / "6" / "trainer.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="6 is skipped"):
        assert "going on from step 4" in train(run / "config.yaml", tmp_path).stdout
    assert same(weights(run), weights(whole[0]))


def test_a_run_killed_while_it_leaves_its_results_leaves_them_the_next_time(whole, tmp_path):
    """The card is written last: without it the run is not finished, whatever else lies there."""
    run = tmp_path / "tiny"
    shutil.copytree(whole[0], run)
    (run / "README.md").unlink()
    (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    assert "is its card" in train(run / "config.yaml", tmp_path).stdout
    assert (run / "README.md").exists() and same(weights(run), weights(whole[0]))


# ---- numbers that are not finite


class Broken:
    """The loss of chosen examples of chosen steps is nan: what a bad picture or an overflow does."""

    def __init__(self, monkeypatch, spoilt):
        self.real, self.spoilt = train_text2img.batch_loss, spoilt
        monkeypatch.setattr(train_text2img, "batch_loss", self)

    def __call__(self, unet, parts, config, step, slots):
        each = self.real(unet, parts, config, step, slots)
        bad = torch.tensor([self.spoilt(step, int(slot)) for slot in slots])
        return each * torch.where(bad, torch.nan, 1.0)


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    config, tmp_path, monkeypatch, capsys
):
    """Case 16: the log says how often; the other steps are taken."""
    bad = [1, 3]
    Broken(monkeypatch, lambda step, slot: step == 2 and slot in bad)
    done = train(config, tmp_path, "--train.lr_schedule", "constant")
    shown, _ = dataset.load_splits(load_file(config).data)
    rows, t = (
        sampler.batch_indices(0, 2, 4, len(shown)).tolist(),
        randomness.timesteps(0, 2, torch.arange(4), 4, 100).tolist(),
    )
    named = "; ".join(f"{shown.metadata[rows[slot]]['file_name']} at t = {t[slot]}" for slot in bad)
    assert [line for line in done.stdout.splitlines() if "is skipped" in line] == [
        f"step 3 is skipped: no finite loss for {named}"
    ]
    records = log(tmp_path / "tiny")
    assert [r["loss"] for r in records if "loss" in r][2] is None and len(
        [r for r in records if r.get("loss")]
    ) == 5
    assert all(value.isfinite().all() for value in weights(tmp_path / "tiny").values())
    two, four = (
        RunFolder(tmp_path / "tiny").checkpoints
        / str(n)
        / "unet"
        / "diffusion_pytorch_model.safetensors"
        for n in (2, 4)
    )
    assert two.read_bytes() != four.read_bytes()
    last = [
        line
        for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
        if '"skipped"' in line
    ][-1]
    assert '"skipped": 1' in last and "NaN" not in last


def test_a_skipped_step_leaves_weights_average_and_moments_as_they_were(
    config, tmp_path, monkeypatch
):
    Broken(monkeypatch, lambda step, slot: step >= 2)
    done = train(config, tmp_path, "--train.max_skipped", "99")
    assert done.stdout.count("is skipped") == 4
    run = RunFolder(tmp_path / "tiny")
    checkpoints = [
        run.checkpoints / n / "unet" / "diffusion_pytorch_model.safetensors"
        for n in ("2", "4", "6")
    ]
    assert len({path.read_bytes() for path in checkpoints}) == 1
    averages = [
        load_state(run.checkpoints / n, "trainer")["ema"]["shadow_params"] for n in ("2", "4", "6")
    ]
    assert all(
        torch.equal(a, b) for later in averages[1:] for a, b in zip(averages[0], later, strict=True)
    )
    moments = [
        [
            value
            for state in load_state(run.checkpoints / n, "trainer")["optimizer"]["state"].values()
            for value in state.values()
        ]
        for n in ("2", "4", "6")
    ]
    assert moments[0] and all(
        torch.equal(a, b) for later in moments[1:] for a, b in zip(moments[0], later, strict=True)
    )


def test_too_many_in_a_row_end_the_run_and_keep_its_last_checkpoint(config, tmp_path, monkeypatch):
    Broken(monkeypatch, lambda step, slot: step >= 3)
    done = train(config, tmp_path, "--train.max_skipped", "2", check=False)
    assert (
        done.returncode == 1
        and "2 steps in a row, up to step 5, had no finite gradient" in done.stderr
    )
    assert (
        "lower train.lr (now 0.001) in a run of another --name" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert RunFolder(tmp_path / "tiny").newest().name == "4"


def test_a_full_disk_ends_the_run_in_one_sentence_and_the_run_goes_on_later(
    config, tmp_path, monkeypatch
):
    """Case 14, by a save that the system refuses."""
    from pipeline.runs import files as files_module
    from pipeline.runs.files import sync_to_disk

    real, full = sync_to_disk, {"now": False}

    def sync(path):
        if full["now"] and path.name == "trainer.safetensors" and ".tmp-4" in str(path):
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(files_module, "sync_to_disk", sync)
    full["now"] = True
    done = train(config, tmp_path, check=False)
    assert (
        done.returncode == 1
        and "No space left on device" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert "those of steps [2] are whole: make room, then run the same command" in done.stderr
    full["now"] = False
    assert "going on from step 2" in train(config, tmp_path).stdout


# ---- launchers and ranks


def test_a_killed_launcher_leaves_no_orphan(config, tmp_path):
    """Case 4: the training process hears nothing of it, notices, saves and ends within 10 s."""
    launch = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--cpu",
        *command(
            config,
            tmp_path,
            "--train.steps",
            "100000",
            "--train.save_every",
            "100000",
            "--train.validate_every",
            "100000",
            "--sample.every",
            "100000",
        )[1:],
    ]
    launcher = subprocess.Popen(
        launch, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text())
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert children
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert gone and not alive
    assert RunFolder(tmp_path / "tiny").newest() is not None


@pytest.mark.slow
def test_when_one_of_two_ranks_dies_the_other_ends(config, tmp_path):
    """Case 21."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *command(
            config,
            tmp_path,
            "--train.steps",
            "100000",
            "--train.save_every",
            "5",
            "--train.validate_every",
            "100000",
            "--sample.every",
            "100000",
        )[1:],
    ]
    launcher = subprocess.Popen(
        launch,
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 7)
    both = [
        p
        for p in psutil.Process(launcher.pid).children(recursive=True)
        if "train_text2img.py" in " ".join(p.cmdline())
    ]
    assert len(both) == 2
    both[1].kill()
    assert launcher.wait(timeout=60) != 0
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in both)
    assert RunFolder(tmp_path / "tiny").newest() is not None


def ranked(said, job):
    """One of several processes, as a launcher starts them: the script in a folder, with its place among them."""
    rank, world, port, folder, argv = job
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    os.chdir(folder)
    script(said, argv)


def together(started, *jobs, function=ranked):
    """What processes of (folder, argv) each ended with and said; when one fails the others have two seconds, as by launchers."""
    port = get_free_port()
    ranks = [
        started(function, (rank, len(jobs), port, folder, argv))
        for rank, (folder, argv) in enumerate(jobs)
    ]
    processes = [process for process, _ in ranks]
    wait_for(lambda: any(p.exitcode for p in processes) or not any(p.is_alive() for p in processes))
    for process in processes:
        process.join(2)
        process.kill()
        process.join()
    return [(process.exitcode, said.read_text()) for process, said in ranks]


def test_two_ranks_go_on_in_the_same_bytes(config, started, tmp_path):
    """Each with its own losses since the last line of the log, of one step where the run is killed."""
    more = ("--train.precision", "no", "--train.log_every", "3")
    for out in (tmp_path / "whole", tmp_path):
        if out == tmp_path:
            killed_after(4, tmp_path / "whole" / "tiny", tmp_path)
        done = together(started, *[(ROOT, arguments(config, out, *more))] * 2)
        assert [code for code, _ in done] == [0, 0], done
    assert "going on from step 4" in done[0][1] and "process(es), now" not in done[0][1]
    runs_of = [tmp_path / "whole" / "tiny", tmp_path / "tiny"]
    assert same(*map(weights, runs_of)) and log(runs_of[0]) == log(runs_of[1])


def test_machines_that_read_other_pictures_are_told_before_the_first_step(
    config, images, started, tmp_path
):
    shutil.copytree(images, tmp_path / "other")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "other" / "train" / "red.png")
    elsewhere = (
        "--data.source",
        str(tmp_path / "other"),
        "--data.cache",
        str(tmp_path / "cache of another"),
    )
    done = together(
        started, *((ROOT, arguments(config, tmp_path, *more)) for more in ((), elsewhere))
    )
    for code, said in done:
        assert (
            code == 2
            and "error: the processes read different pictures or captions in " in said
            and "Traceback" not in said
        )
    assert not list((tmp_path / "tiny" / "checkpoints").iterdir())


def test_a_machine_without_the_runs_folder_is_told(whole, started, tmp_path):
    """As two machines that share no disk: the second one's `output` is another folder, without the checkpoint."""
    (tmp_path / "second").mkdir()
    killed_after(4, whole[0], tmp_path)
    argv = arguments(whole[0] / "config.yaml", ".")
    code, said = together(started, (tmp_path, argv), (tmp_path / "second", argv))[1]
    assert code == 2 and "Traceback" not in said
    assert (
        "error: process 1 does not see tiny/checkpoints/4, expected `output` on a disk that all machines share"
        in said
    )


def unlucky(step, slot):
    """Whose loss is no number: in the seventh step, the second process's first example."""
    return step == 6 and slot == 1


def spoilt(said, job):
    """`ranked`, `unlucky`."""
    Broken(pytest.MonkeyPatch(), unlucky)  # of this process alone, which ends with it
    ranked(said, job)


@pytest.fixture(scope="module")
def two_and_one(images, encoder, started, tmp_path_factory):
    """Eight steps on two ranks and on one, of which the seventh has a loss that is no number: what the ranks said, both logs."""
    folder, more = (
        tmp_path_factory.mktemp("ranks"),
        ("--train.precision", "no", "--train.steps", "8"),
    )
    config = written(folder, images, encoder)
    done = together(started, *[(ROOT, arguments(config, folder, *more))] * 2, function=spoilt)
    assert [code for code, _ in done] == [0, 0], done
    with pytest.MonkeyPatch.context() as patch:
        Broken(patch, unlucky)
        train(config, folder / "one", *more)
    return "".join(said for _, said in done), log(folder / "tiny"), log(folder / "one" / "tiny")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(two_and_one):
    said, two, one = two_and_one
    assert "2 process(es)" in said and len(two) == len(one)
    before = [(a, b) for a, b in zip(two, one, strict=True) if a["step"] < 7]
    assert [a["step"] for a, _ in before] == [1, 2, 3, 3, 4, 5, 6, 6] and all(
        alike(a, b) for a, b in before
    )


@pytest.mark.slow
def test_two_ranks_skip_the_same_step(two_and_one):
    """Case 16 on two ranks: slot 1 is the second's alone, its nan stops both."""
    said, two, one = two_and_one
    assert said.count("step 7 is skipped: no finite loss for ") == 1
    skipped, after = (
        [next(a for a in lines if a["step"] == step and "loss" in a) for lines in (two, one)]
        for step in (7, 8)
    )
    assert all(line["grad_norm"] is None for line in skipped) and alike(*after)
