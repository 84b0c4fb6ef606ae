"""The training script as a user runs it: subprocesses, real parts, tiny networks."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_text, tiny_unet

import train_text2img
from pipeline import config as config_module
from pipeline import randomness
from pipeline.config import ConfigError, TrainConfig, load
from pipeline.data import image_ops, sampler
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.losses import loss_weight
from pipeline.hub import client, export, push
from pipeline.models import loading, locate
from pipeline.models.ema import build_ema
from pipeline.runs.folder import RunFolder
from pipeline.runs.state_files import load_state, save_state
from pipeline.runs.stop_signals import StopSignals
from pipeline.serving.model_store import ModelStore

ROOT = Path(__file__).parents[2]
TINY = """
name: tiny
data: {source: SOURCE, held_out: HELD, resolution: 16, cache: CACHE}
model: {patch_size: 2, channels: [32, 32], attention: [false, true], heads: 4, whitening: 0.02, time_embedding_dim: 48,
        text_encoder: ENCODER}
diffusion: {prediction_type: sample, num_train_timesteps: 100, beta_end: 0.2}
train: {steps: 6, batch_size: 4, lr: 1e-3, lr_schedule: flat_then_linear, weighting: min_velocity, gamma: 5,
        log_every: 1, validate_every: 3, save_every: 2, keep: 9, threads: 1}
sample: {prompts: [red, blue], w: [0, 1], steps: 2, every: 4}
"""


COLOURS = (
    "red",
    "green",
    "blue",
    "white",
    "black",
    "grey",
    "pink",
    "brown",
    "orange",
    "purple",
    "yellow",
    "cyan",
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A text encoder of random weights that knows the captions of these tests; MiniLM's 90 MB would be most of a run's time."""
    folder = tmp_path_factory.mktemp("encoder")
    for part in tiny_text(length=16, words=(*COLOURS, "square", *map(str, range(12))), width=64):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve plain squares in an image folder, captions as file names, three of them held out."""
    folder = tmp_path_factory.mktemp("squares")
    for i, colour in enumerate(COLOURS):
        split = folder / ("test" if i >= 9 else "train")
        split.mkdir(exist_ok=True)
        pixels = np.full((16, 16, 3), (20 * i, 255 - 20 * i, 128), np.uint8)
        Image.fromarray(pixels).save(split / f"{colour}.png")
    return folder


def written(folder, images, encoder):
    """The settings of these tests in a folder, whose cache is there too."""
    path, text = folder / "tiny.yaml", TINY.replace("SOURCE", str(images)).replace("HELD", "test")
    path.write_text(text.replace("ENCODER", str(encoder)).replace("CACHE", str(folder / "cache")))
    return path


@pytest.fixture
def config(images, encoder, tmp_path):
    return written(tmp_path, images, encoder)


def arguments(config, out, *more):
    return ["--config", str(config), "--output", str(out), *more]


def command(config, out, *more):
    return [sys.executable, str(ROOT / "train_text2img.py"), *arguments(config, out, *more)]


def train(config, out, *more, check=True):
    """The script's main in this process: its exit code, what it printed, what it complained of."""
    said, complained, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            code = train_text2img.main(arguments(config, out, *more))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)
    done = subprocess.CompletedProcess(more, code, said.getvalue(), complained.getvalue())
    assert not check or code == 0, done.stdout + done.stderr
    return done


def wait_for(done, seconds=60, every=0.01):
    """Poll until `done()` is true."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(every)


def script(said, argv):
    """The script's main as a process ends with it, what it says in a file."""
    with (
        open(said, "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        sys.exit(train_text2img.main(argv))


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """Calls a function in a process that is forked by one that has imported this module, which takes ten seconds.

    The function's first argument is the file for what it has to say, which is returned beside the process.
    """
    context, folder, numbers = (
        multiprocessing.get_context("forkserver"),
        tmp_path_factory.mktemp("said"),
        itertools.count(),
    )
    context.set_forkserver_preload(["test_train"])

    def start(function, argv):
        process = context.Process(target=function, args=(said := folder / str(next(numbers)), argv))
        process.start()
        return process, said

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        yield start


def weights(run):
    return load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def log(run):
    keys = ("step", "loss", "grad_norm", "lr", "train_loss", "held_out_loss")
    return [
        {k: record[k] for k in keys if k in record}
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]


def alike(a, b):
    """Whether two lines of logs are of one step at one rate, and what they measured is the same but for rounding."""
    measured = ("loss", "grad_norm", "train_loss", "held_out_loss")
    return (
        a.keys() == b.keys()
        and (a["step"], a.get("lr")) == (b["step"], b.get("lr"))
        and all(
            a[key] == b[key] or a[key] == pytest.approx(b[key], rel=5e-3)
            for key in measured
            if key in a
        )
    )


def killed_after(step, finished, out):
    """A copy of a finished run in another folder, as a kill after the checkpoint of a step would have left it."""
    run = out / finished.name
    shutil.copytree(finished, run)
    (run / "README.md").unlink()
    for result in ("pipeline", "lora"):
        shutil.rmtree(run / result, ignore_errors=True)
    for later in (run / "checkpoints").iterdir():
        if int(later.name) > step:
            shutil.rmtree(later)
    return run


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(images, encoder, tmp_path_factory):
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "tiny", train(written(folder, images, encoder), folder)


def test_a_run_leaves_a_pipeline_its_card_its_pictures_and_its_log(whole):
    run, done = whole
    assert (run / "pipeline" / "model_index.json").exists()
    assert (run / "pipeline" / "scheduler" / "scheduler_config.json").exists()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["000004.png", "000006.png"]
    assert Image.open(run / "samples" / "000006.png").size == (2 * 16, 2 * 16)
    assert (run / "figures" / "training.png").stat().st_size > 5000
    assert "library_name: diffusers" in (run / "README.md").read_text()
    assert [r["step"] for r in log(run)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert "direct-jump sample" in done.stdout


def test_the_saved_pipeline_draws_and_a_checkpoint_holds_a_loadable_unet(whole):
    from diffusers import UNet2DConditionModel

    from pipeline import TextToImagePipeline

    run, _ = whole
    pipe = TextToImagePipeline.from_pretrained(run / "pipeline", use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["red"], seed=0, num_inference_steps=2).images[0].size == (16, 16)
    assert pipe.config.caption_dropout == 0.1
    trained_on = train_text2img.prepare(
        config_module.load_file(run / "config.yaml"), None, torch.device("cpu")
    )
    for captions, states in (
        (trained_on.images.captions, trained_on.states),
        ([""], trained_on.empty),
        (trained_on.held_out.captions, trained_on.held_states),
    ):
        assert torch.allclose(pipe.encode_prompt(captions)[0], states, atol=1e-4), "whitened alike"
    saved = UNet2DConditionModel.from_pretrained(
        run / "checkpoints" / "6" / "unet", use_safetensors=True
    )
    average = weights(run)
    assert any(not average[k].equal(v) for k, v in saved.state_dict().items()), (
        "the pipeline holds the average"
    )


def test_a_checkpoint_draws_with_its_averaged_weights(whole):
    run, _ = whole
    pipe = loading.load_checkpoint(RunFolder(run), 6)
    assert same(pipe.unet.state_dict(), weights(run))
    pipe.set_progress_bar_config(disable=True)
    finished = loading.load_pipeline(run)
    finished.set_progress_bar_config(disable=True)
    drawn = [
        np.asarray(p("red", w=1.0, seed=0, num_inference_steps=3).images[0])
        for p in (pipe, finished)
    ]
    assert np.array_equal(*drawn)


def test_an_average_of_decay_zero_is_the_last_weights(whole, tmp_path):
    train(whole[0] / "config.yaml", tmp_path, "--train.ema", "0", "--train.steps", "2")
    for run, step, expected in ((tmp_path / "tiny", "2", True), (whole[0], "6", False)):
        last = load_file(
            run / "checkpoints" / step / "unet" / "diffusion_pytorch_model.safetensors"
        )
        assert (
            all(torch.allclose(last[name], value) for name, value in weights(run).items())
            == expected
        )


def test_checks_and_samples_see_the_average_and_training_goes_on_with_its_own_weights():
    network = tiny_unet().train()
    own, ema = (
        [weight.detach().clone() for weight in network.parameters()],
        build_ema(network, 0.9),
    )
    ema.shadow_params = [torch.full_like(weight, 0.5) for weight in own]
    with train_text2img.averaged(ema, network) as shown:
        assert not shown.training and all((weight == 0.5).all() for weight in shown.parameters())
    assert network.training and all(map(torch.equal, network.parameters(), own))


def test_a_shipped_model_is_small_and_draws_with_the_encoder_that_its_settings_name(
    whole, tmp_path
):
    shipped = export.export(whole[0], tmp_path / "new" / "shipped")
    index = json.loads((shipped / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert not list(shipped.rglob("*.py")) and not list(shipped.rglob("*.bin"))
    stored = load_file(shipped / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert all(
        torch.equal(value, stored[name].float())
        or torch.allclose(value, stored[name].float(), rtol=2**-8, atol=0)
        for name, value in weights(whole[0]).items()
    )
    card = (shipped / "README.md").read_text()
    assert (
        "license: other" in card
        and f"hub.load('{shipped}')" in card
        and "images/samples.png" in card
    )
    assert "trust_remote_code" not in card and "trust_remote_code" in str(
        push.card.read(shipped, "user/name")
    )
    (shipped / "notes.md").write_text("## Looked at\n\nreds are red")
    push.card.refresh(shipped)
    assert "## Looked at\n\nreds are red\n\n## Limits" in (shipped / "README.md").read_text()
    pipe, finished = loading.load_pipeline(shipped), loading.load_pipeline(whole[0])
    for model in (pipe, finished):
        model.set_progress_bar_config(disable=True)
    drawn = [
        np.asarray(p("red", w=1.0, seed=0, num_inference_steps=3).images[0]).astype(int)
        for p in (pipe, finished)
    ]
    assert abs(drawn[0] - drawn[1]).max() < 30, "bf16 weights draw about the same"
    with pytest.raises(client.HubError, match="exists, expected the name of a new folder"):
        export.export(whole[0], shipped)
    with pytest.raises(client.HubError, match="is no finished run"):
        export.export(tmp_path, tmp_path / "more")


def test_a_page_follows_a_run_in_progress(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run, ignore=shutil.ignore_patterns("pipeline"))
    shelf = ModelStore(run)
    assert shelf.follows and shelf.steps() == [2, 4, 6]
    assert shelf.session().name == "run at step 6" and shelf.session(3).name in (
        "run at step 2",
        "run at step 4",
    )
    assert not same(
        shelf.session(2).trained.unet.state_dict(), shelf.session().trained.unet.state_dict()
    )
    shutil.rmtree(run / "checkpoints" / "6")
    assert shelf.session().name == "run at step 4"
    (run / "checkpoints" / "2" / "unet" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be used: .*config.json is not what was written"):
        ModelStore(run).session(2)


def test_a_page_follows_a_run_that_is_trained_on(whole, tmp_path):
    """The pipeline of its first end lies there still."""
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    assert not ModelStore(run).follows
    (run / "README.md").unlink()  # as the second training does
    assert ModelStore(run).steps() == [2, 4, 6]


def test_the_newest_run_is_served(whole, tmp_path):
    assert locate.default_model(tmp_path, tmp_path / "shipped") is None
    for name, age in {"old": 100, "new": 1}.items():
        shutil.copytree(whole[0], tmp_path / name)
        then = time.time() - age
        os.utime(tmp_path / name / "metrics.jsonl", (then, then))
    (tmp_path / "empty").mkdir()
    assert locate.default_model(tmp_path) == tmp_path / "new"
    (tmp_path / "new" / "README.md").unlink()
    assert (
        locate.default_model(tmp_path) == tmp_path / "new"
        and locate.default_model(tmp_path, finished=True) == tmp_path / "old"
    )


@pytest.mark.parametrize(("more", "steps"), [((), 6), (("--train.steps", "4"), 4)])
def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(whole, more, steps):
    """Nor does one that asks for fewer steps."""
    run, _ = whole
    before = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    done = train(run / "config.yaml", run.parent, *more)
    assert f"is finished at step 6 of {steps}" in done.stdout
    assert {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    } == before


def test_an_average_lies_as_its_weights_do_after_a_resume(whole, tmp_path, monkeypatch):
    """A file's is contiguous, and torch adds up what lies otherwise tensor by tensor."""
    real, strides = EMAModel.step, []

    def step(ema, weights):
        strides.extend(
            (weight.stride(), mean.stride())
            for weight, mean in zip(weights, ema.shadow_params, strict=True)
        )
        return real(ema, weights)

    monkeypatch.setattr(EMAModel, "step", step)
    killed_after(4, whole[0], tmp_path)
    train(whole[0] / "config.yaml", tmp_path)
    assert strides and all(weight == mean for weight, mean in strides)


def test_every_process_goes_on_with_what_a_checkpoint_keeps_for_it(whole):
    assert len(load_state(whole[0] / "checkpoints" / "4", "trainer")["losses"]) == 1
    assert [
        train_text2img.of_rank(["a", "b"], SimpleNamespace(process_index=i)) for i in range(3)
    ] == ["a", "b", "a"]


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(config, accelerator):
    """The network of these tests in training, without a run."""
    chosen = config_module.load_file(config)
    return train_text2img.Trainer(
        chosen, accelerator, train_text2img.prepare(chosen, None, torch.device("cpu"))
    )


def test_an_older_checkpoint_whose_losses_are_those_of_one_process_is_gone_on_from(
    config, accelerator, tmp_path
):
    trainer = trainer_of(config, accelerator)
    trainer.step()
    state = trainer.state_dict()
    state["state"]["losses"] = state.pop("losses")[0]
    save_state(tmp_path, "trainer", state)
    losses, trainer.losses = trainer.losses, []
    trainer.resume(tmp_path)
    assert trainer.losses == losses and len(losses) == 1 and trainer.done == 1


def test_what_is_counted_goes_on_from_a_checkpoint(config, accelerator, tmp_path):
    """Steps, those that were skipped, the newest of these, which `train.max_skipped` ends, and the hours of earlier sittings."""
    trainer = trainer_of(config, accelerator)
    trainer.done, trainer.skipped, trainer.in_a_row = 7, 3, 2
    trainer.began -= 1000
    save_state(tmp_path, "trainer", trainer.state_dict())
    trainer.done, trainer.skipped, trainer.in_a_row, trainer.began = 0, 0, 0, time.monotonic()
    trainer.resume(tmp_path)
    assert (trainer.done, trainer.skipped, trainer.in_a_row) == (
        7,
        3,
        2,
    ) and 1000 < trainer.seconds < 1060


def test_an_overflow_lowers_the_scale_of_half_precision_and_moves_no_weight(
    config, accelerator, monkeypatch
):
    """By torch's own scaler, on a CPU and in float32; accelerate is told that it is half precision."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer, real = trainer_of(config, accelerator), train_text2img.batch_loss
    accelerator.native_amp = True
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    monkeypatch.setattr(
        train_text2img, "batch_loss", lambda *a: real(*a) * (math.inf if trainer.done == 1 else 1)
    )
    sound, scales, kept = [], [], []
    for _ in range(3):
        sound.append(trainer.step().sound)
        scales.append(accelerator.scaler.get_scale())
        kept.append([weight.detach().clone() for weight in trainer.weights])
    assert sound == [True, False, True] and scales == [4, 2, 2]
    assert [all(map(torch.equal, *pair)) for pair in itertools.pairwise(kept)] == [True, False]


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_resumed_from_a_checkpoint_ends_in_the_same_bytes(whole, tmp_path, step):
    run = killed_after(step, whole[0], tmp_path)
    done = train(run / "config.yaml", tmp_path)
    assert f"going on from step {step}" in done.stdout
    assert same(weights(run), weights(whole[0]))
    assert log(run) == log(whole[0])


def test_a_run_by_muon_resumes_in_the_same_bytes(config, tmp_path):
    more = ["--train.optimizer", "muon", "--model.norm_groups", "8"]
    train(config, tmp_path / "through", *more)
    through = tmp_path / "through" / "tiny"
    run = killed_after(2, through, tmp_path / "again")
    said = train(config, tmp_path / "again", *more).stdout
    assert "going on from step 2" in said and "learning rate" not in said
    assert same(weights(run), weights(through))
    train(config, tmp_path / "adamw", *more[2:])
    assert not same(weights(tmp_path / "adamw" / "tiny"), weights(through))


def test_a_finished_run_that_goes_on_is_unfinished_until_its_new_end(whole, tmp_path, monkeypatch):
    """Its first card must not pass for the second one's."""
    shutil.copytree(whole[0], tmp_path / "tiny")
    run, longer = tmp_path / "tiny", ("--train.steps", "8")
    for measured in ("metrics.json", "images/free.png", "images/sweep.png"):
        (run / measured).write_text("{}")
    monkeypatch.setattr(train_text2img, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(whole[0] / "config.yaml", tmp_path, *longer)
    monkeypatch.undo()
    assert RunFolder(run).newest().name == "8" and not RunFolder(run).finished
    for shared in (
        lambda: export.export(run, tmp_path / "shipped"),
        lambda: push.assemble_repository(run, tmp_path / "pushed"),
    ):
        with pytest.raises(
            client.HubError, match="tiny is being trained on, expected a finished run"
        ):
            shared()
    assert (
        "is its card"
        in train(whole[0] / "config.yaml", tmp_path, *longer, "--sample.prompts", "[red]").stdout
    )
    assert not same(weights(run), weights(whole[0])) and RunFolder(run).finished
    assert not {"metrics.json", "images/free.png", "images/sweep.png"} & {
        str(p.relative_to(run)) for p in run.rglob("*")
    }
    assert Image.open(run / "samples" / "000008.png").size == (16, 2 * 16), (
        "drawn anew: its prompts are others"
    )


@pytest.mark.parametrize("check", [1, 2])
def test_a_check_and_a_picture_that_a_stop_cut_short_are_made_up(
    whole, tmp_path, monkeypatch, check
):
    """After step 3, and after the last one, where nothing else is left to do."""
    real, asked = train_text2img.validate, []

    def validate(*arguments):
        asked.append(1)
        if len(asked) == check:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train_text2img, "validate", validate)
    done = train(whole[0] / "config.yaml", tmp_path, check=False)
    assert (
        done.returncode == 143 and f"Stopped (SIGTERM) after step {3 * check} of 6" in done.stdout
    )
    train(whole[0] / "config.yaml", tmp_path)
    assert log(tmp_path / "tiny") == log(whole[0]) and same(
        weights(tmp_path / "tiny"), weights(whole[0])
    )
    drawn = [
        {p.name: p.read_bytes() for p in (run / "samples").iterdir()}
        for run in (tmp_path / "tiny", whole[0])
    ]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("other", "stops"), [(0, False), (143, True)])
def test_every_process_hears_the_same_of_a_stop(other, stops):
    """A signal that comes while they ask each other is heard by all at the next step: else some would go on and some not."""
    stop = StopSignals()

    def gather(mine):
        if not other:
            stop.handle(signal.SIGTERM, None)
        return torch.cat([mine, torch.tensor([other])])

    two = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
    assert train_text2img.stopped(stop, two) == stops and stop.exit_code == 143
    assert train_text2img.stopped(stop, SimpleNamespace(num_processes=1))


def test_a_stop_is_heard_while_results_are_left_and_pushed(whole, tmp_path, monkeypatch):
    def stopped(*_args, **_options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    run = killed_after(6, whole[0], tmp_path)
    for place, name, when in (
        (train_text2img.card, "plot_strips", "after the last step"),
        (push, "publish", "before the model was pushed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopped)
            done = train(whole[0] / "config.yaml", tmp_path, check=False)
        assert (
            done.returncode == 143
            and f"Stopped (SIGTERM) {when}; run the same command to go on." in done.stdout
        )
    assert RunFolder(run).finished and same(weights(run), weights(whole[0]))


def test_a_longer_run_says_where_its_learning_rate_goes_on(config, tmp_path):
    more = ("--train.lr_schedule", "linear", "--train.lr", "0.002", "--train.warmup", "0")
    train(config, tmp_path, *more, "--train.steps", "2")
    said = train(config, tmp_path, *more, "--train.steps", "4").stdout
    assert "With 4 steps the schedule goes on at a learning rate of 0.001, where it was 0\n" in said
    assert [line["lr"] for line in log(tmp_path / "tiny") if "lr" in line] == pytest.approx(
        [2e-3, 1e-3, 1e-3, 5e-4]
    )


def test_what_lies_in_a_runs_folder_and_cannot_go_on_is_not_overwritten(whole, config, tmp_path):
    shutil.copytree(whole[0], tmp_path / "tiny", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "mine" / "tiny").mkdir(parents=True)
    (tmp_path / "mine" / "tiny" / "README.md").write_text("about something else")
    for out, says in (
        (tmp_path, "a model, and no checkpoint to go on from"),
        (tmp_path / "mine", "a README.md that no run has"),
    ):
        before = {path: path.read_bytes() for path in (out / "tiny").rglob("*") if path.is_file()}
        done = train(config, out, check=False)
        assert done.returncode == 2 and f"tiny holds {says}" in done.stderr
        assert all(path.read_bytes() == content for path, content in before.items())


def test_settings_of_a_run_that_no_longer_fit_are_said_to_be_the_runs(whole, tmp_path):
    run = killed_after(2, whole[0], tmp_path)
    text = run.joinpath("config.yaml").read_text()
    run.joinpath("config.yaml").write_text(text.replace("  warmup:", "  warm_up:"))
    done = train(whole[0] / "config.yaml", tmp_path, check=False)
    assert (
        done.returncode == 2
        and f"error: {run}/config.yaml, which the run was begun with, does not fit" in done.stderr
    )
    assert "(unknown setting 'train.warm_up': did you mean 'train.warmup'?)" in done.stderr


def test_fewer_steps_than_were_made_are_refused(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "tiny")
    RunFolder(tmp_path / "tiny").card.unlink()  # it was interrupted
    done = train(whole[0] / "config.yaml", tmp_path, "--train.steps", "4", check=False)
    assert (
        done.returncode == 2
        and "is at step 6 already, got train.steps 4: give at least 6" in done.stderr
    )
    assert not RunFolder(tmp_path / "tiny").finished


def test_a_resumed_run_reads_captions_by_its_own_whitening(whole):
    """The data's first rows may have changed since, above all a stream's."""
    chosen, _ = load(["--config", str(whole[0] / "config.yaml")])
    checkpoint = RunFolder(whole[0]).newest()
    kept = CaptionWhitening.from_pretrained(checkpoint / "whitening")
    other = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, whitening=0.5))
    matrix = lambda checkpoint: (
        train_text2img.prepare(other, checkpoint, torch.device("cpu")).pipe.whitening.matrix
    )
    assert torch.equal(matrix(checkpoint), kept.matrix) and not torch.allclose(
        matrix(None), kept.matrix
    )


def test_the_learning_rate_rises_stays_and_falls():
    shape = TrainConfig(
        steps=100, lr=2.0, lr_schedule="flat_then_linear", lr_end=0.1, decay_share=0.4, warmup=10
    )
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    schedule = train_text2img.lr_schedule(torch.optim.SGD([weight], shape.lr), shape)
    share = schedule.lr_lambdas[0]
    assert [share(step) for step in (0, 4, 9, 30, 60)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [share(step) for step in (70, 80, 100)] == pytest.approx(
        [0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1]
    )
    constant = dataclasses.replace(shape, lr_schedule="constant")
    (share,) = train_text2img.lr_schedule(torch.optim.SGD([weight], shape.lr), constant).lr_lambdas
    assert [share(step) for step in (0, 5, 10, 100)] == pytest.approx([0, 0.5, 1, 1])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_optimiser_is_as_configured(kind):
    chosen = TrainConfig(
        optimizer=kind,
        lr=0.3,
        matrix_lr=0.7 if kind == "muon" else None,
        betas=(0.8, 0.9),
        weight_decay=0.2,
    )
    groups = train_text2img.optimizer_of(tiny_unet(4, 8), chosen).param_groups
    assert [group["lr"] for group in groups] == ([0.7, 0.3] if kind == "muon" else [0.3])
    assert all(
        (tuple(group["betas"]), group["weight_decay"]) == ((0.8, 0.9), 0.2) for group in groups
    )


def test_the_logged_learning_rate_is_the_steps_own_and_its_gradient_is_clipped(config, tmp_path):
    more = (
        "--train.steps",
        "2",
        "--train.lr_schedule",
        "linear",
        "--train.weight_decay",
        "0",
        "--train.precision",
        "no",
    )
    for name, clip in (("free", "1.0"), ("held", "1e-14")):
        train(config, tmp_path / name, *more, "--train.clip", clip)
    assert [
        line["lr"] for line in log(tmp_path / "free" / "tiny") if "lr" in line
    ] == pytest.approx([1e-3, 5e-4])
    norms = [log(tmp_path / name / "tiny")[0]["grad_norm"] for name in ("free", "held")]
    assert norms[0] == norms[1] > 1e-14
    free, held = (
        load_file(
            RunFolder(tmp_path / name / "tiny").checkpoints
            / "2"
            / "unet"
            / "diffusion_pytorch_model.safetensors"
        )
        for name in ("free", "held")
    )
    chosen, _ = load(["--config", str(config)])
    first = train_text2img.prepare(chosen, None, torch.device("cpu")).unet.state_dict()
    moved = lambda weights: max(
        float((weights[name] - first[name]).abs().max()) for name in weights
    )
    assert (
        moved(held) < 1e-6 < 1e-4 < moved(free)
    )  # AdamW's eps 1e-8 is far above a gradient of norm 1e-14


def test_a_gpu_without_memory_for_the_samples_trains_on(config, tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    for module, name in (
        (train_text2img, "validate"),
        (train_text2img, "draw"),
        (train_text2img.card, "plot_run"),
        (train_text2img.card, "plot_strips"),
    ):
        monkeypatch.setattr(module, name, full)
    monkeypatch.setattr(train_text2img.tqdm, "write", (said := []).append)
    done = train(config, tmp_path, "--train.steps", "1")
    for what, line in zip(
        ("the check of step 1", "000001.png", "training.png", "strips.png"), said, strict=True
    ):
        advice = ": give fewer sample.prompts" if what in ("000001.png", "strips.png") else ""
        assert line.endswith(
            f"{what} is left out (CUDA out of memory. Tried to allocate 2.00 GiB.){advice}"
        )
    assert RunFolder(tmp_path / "tiny").finished and "000001.png" not in done.stdout


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), ": smaller"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), ": smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ": smaller"),
        (OSError(28, "No space left on device"), ""),
        (RuntimeError("a bug"), None),
    ],
)
def test_only_want_of_memory_or_room_is_spared(error, says, monkeypatch):
    monkeypatch.setattr(train_text2img.tqdm, "write", (said := []).append)
    expected = (
        pytest.raises(RuntimeError, match="a bug") if says is None else contextlib.nullcontext()
    )
    with expected, train_text2img.spared("x.png", ": smaller"):
        raise error
    assert said == ([] if says is None else [f"x.png is left out ({error}){says}"])


def test_a_step_that_wants_too_much_memory_is_one_sentence_and_resumable(
    config, tmp_path, monkeypatch
):
    real = train_text2img.batch_loss

    def full(unet, parts, config, step, slots):
        if step == 3 and config.train.accumulation == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return real(unet, parts, config, step, slots)

    monkeypatch.setattr(train_text2img, "batch_loss", full)
    done = train(config, tmp_path, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1 and "raise train.accumulation" in said[0]
    train(config, tmp_path, "--train.accumulation", "2")
    assert RunFolder(tmp_path / "tiny").finished


def test_a_request_to_stop_ends_a_drawing_within_a_step(whole, tmp_path):
    chosen = config_module.load_file(whole[0] / "config.yaml")
    chosen, pipe, calls = (
        dataclasses.replace(chosen, sample=dataclasses.replace(chosen.sample, steps=50)),
        loading.load_pipeline(whole[0]),
        [],
    )
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))

    class Asked:
        def __bool__(self):
            return len(calls) >= 3

    train_text2img.draw(pipe, chosen, tmp_path / "samples.png", Asked())
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def test_the_samples_are_a_column_a_prompt_and_a_row_a_w(whole, tmp_path):
    chosen, pipe = (
        config_module.load_file(whole[0] / "config.yaml"),
        loading.load_pipeline(whole[0]),
    )
    chosen = dataclasses.replace(
        chosen, sample=dataclasses.replace(chosen.sample, w=(0.0, 1.0, 4.0))
    )
    train_text2img.draw(pipe, chosen, tmp_path / "samples.png", False)
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    assert grid.shape == (3 * 16, 2 * 16, 3)
    for row, w in enumerate(chosen.sample.w):
        alone = pipe(list(chosen.sample.prompts), w=w, seed=0, num_inference_steps=2).images
        assert np.array_equal(grid[16 * row : 16 * (row + 1)], np.hstack(alone))


@pytest.mark.parametrize("line", ["loss", "train_loss"])
def test_a_disk_that_is_full_anywhere_is_one_sentence(line, config, tmp_path, monkeypatch):
    """A line of the log that is cut is the last one: the run may not go on after it."""
    log = RunFolder.log

    def full(self, **record):
        if line in record:
            raise OSError(28, "No space left on device", str(self.metrics))
        log(self, **record)

    monkeypatch.setattr(RunFolder, "log", full)
    done = train(config, tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        f"error: {tmp_path}/tiny/metrics.jsonl: No space left on device, expected room and leave to write"
        in done.stderr
    )


def test_a_file_that_is_missing_by_a_mistake_of_ours_keeps_its_traceback(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        RunFolder, "log", lambda *_args, **_record: Path("/no/such/file").read_text()
    )
    with pytest.raises(FileNotFoundError):
        train(config, tmp_path, check=False)


def test_how_often_it_logs_checks_and_saves_does_not_change_what_it_learns(whole, tmp_path):
    train(
        whole[0] / "config.yaml",
        tmp_path,
        "--train.log_every",
        "4",
        "--train.validate_every",
        "5",
        "--train.save_every",
        "5",
        "--sample.every",
        "2",
    )
    assert same(weights(tmp_path / "tiny"), weights(whole[0]))
    run = killed_after(2, whole[0], tmp_path / "resumed")
    train(
        run / "config.yaml",
        tmp_path / "resumed",
        "--train.log_every",
        "4",
        "--train.validate_every",
        "5",
        "--train.save_every",
        "3",
    )
    assert same(weights(run), weights(whole[0]))


def test_nothing_is_left_on_another_device(config, monkeypatch):
    """torch's meta device in a GPU's place: it computes no values, and refuses operands of two devices as a GPU does."""
    chosen, _ = load(["--config", str(config), "--data.flip", "true"])
    train_text2img.prepare(
        chosen, None, torch.device("cpu")
    )  # which leaves the captions' states in the cache
    parts = train_text2img.prepare(chosen, None, torch.device("meta"))
    assert (parts.states.device.type, parts.held_states.device.type, parts.empty.device.type) == (
        "cpu",
        "cpu",
        "meta",
    )
    each = train_text2img.batch_loss(parts.unet, parts, chosen, 0, torch.arange(4))
    assert each.shape == (4,) and each.device.type == "meta"
    monkeypatch.setattr(torch.Tensor, "item", lambda self: float(self.device.type == "meta"))
    found = train_text2img.validate(parts.unet, parts, chosen, stop=False)
    assert found["train_loss"] == found["held_out_loss"] == 1.0


def test_changed_pictures_are_refused_and_named(whole, images, tmp_path):
    run = killed_after(2, whole[0], tmp_path)
    mine = tmp_path / "squares"
    shutil.copytree(images, mine)
    text = (run / "config.yaml").read_text().replace(str(images), str(mine))
    (run / "config.yaml").write_text(text)
    (tmp_path / "mine.yaml").write_text(text)
    Image.new("RGB", (16, 16), "maroon").save(mine / "train" / "maroon.png")
    before = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    done = train(tmp_path / "mine.yaml", tmp_path, check=False)
    assert (
        done.returncode == 2
        and "was begun on other pictures or captions: the fingerprint of" in done.stderr
    )
    assert all(path.read_bytes() == content for path, content in before.items())
    (mine / "train" / "maroon.png").unlink()
    train(tmp_path / "mine.yaml", tmp_path)
    assert same(weights(run), weights(whole[0]))


def test_tensorboard_gets_the_curves_and_the_settings_without_the_token(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config, tmp_path, "--report_to", "tensorboard", "--hub.token", "hf_canary")
    written = [
        path
        for path in (tmp_path / "tiny").rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    ]
    assert not [path for path in written if b"hf_canary" in path.read_bytes()]
    curves, shown = {}, []
    for events in {path.parent for path in written if "tfevents" in path.name}:
        found = EventAccumulator(str(events)).Reload()
        curves |= {
            name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]
        }
        shown += [
            picture.step
            for name in found.Tags()["images"]
            for picture in found.Images(name)
            if picture.width == 32
        ]
    assert curves["loss"] == curves["lr"] == [1, 2, 3, 4, 5, 6]
    assert curves["train_loss"] == curves["held_out_loss"] == curves["train_x_0_error/6"] == [3, 6]
    assert shown == [4, 6]
    assert "train.lr: 0.001" in "".join(
        path.read_text() for path in written if path.name == "hparams.yml"
    )


@pytest.mark.parametrize("place", ["init_trackers", "log"])
def test_a_tracker_that_fails_is_told_once_and_training_goes_on(
    place, config, tmp_path, monkeypatch
):
    def out_of_reach(*_args, **_more):
        raise TimeoutError("no answer\nfrom it")

    monkeypatch.setattr(train_text2img.Accelerator, place, out_of_reach)
    monkeypatch.setattr(train_text2img.tqdm, "write", (said := []).append)
    train(config, tmp_path, "--report_to", "tensorboard")
    assert said == [
        "report_to has failed (TimeoutError: no answer from it): training goes on without"
    ]
    assert RunFolder(tmp_path / "tiny").finished


@pytest.mark.parametrize("flag", ["true", "false"])
def test_a_cpu_is_used_where_accelerate_is_told_to(flag, config, tmp_path, monkeypatch):
    def state(cpu, timeout):
        raise ConfigError(f"cpu {cpu}")

    monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    monkeypatch.setattr(train_text2img.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(train_text2img, "PartialState", state)
    assert train(config, tmp_path, check=False).stderr == f"error: cpu {flag == 'true'}\n"


def test_another_seed_learns_something_else(whole, tmp_path):
    train(whole[0] / "config.yaml", tmp_path, "--seed", "1")
    assert not same(weights(tmp_path / "tiny"), weights(whole[0]))


@pytest.mark.parametrize("dropout", [0, 1])
def test_the_loss_depends_on_captions_exactly_where_they_are_kept(config, dropout):
    """(14): a dropped caption is the empty one's row, whatever the caption's own states are."""
    chosen, _ = load(["--config", str(config), "--data.caption_dropout", str(dropout)])
    parts, slots = train_text2img.prepare(chosen, None, torch.device("cpu")), torch.arange(4)
    others = dataclasses.replace(parts, states=parts.states.flip(0).roll(1, 1))
    with torch.no_grad():
        a, b = (train_text2img.batch_loss(p.unet, p, chosen, 0, slots) for p in (parts, others))
    assert torch.equal(a, b) == bool(dropout) and torch.isfinite(a).all()


def test_the_loss_is_weighted_as_configured(whole):
    """The network predicts x_0, whose own weight is 1."""
    weighted = lambda *more: load(
        ["--config", str(whole[0] / "config.yaml"), "--train.weighting", *more]
    )[0]
    plain, clipped = (
        weighted("x_0", "--train.gamma", "null"),
        weighted("min_snr", "--train.gamma", "2"),
    )
    parts, slots = train_text2img.prepare(plain, None, torch.device("cpu")), torch.arange(4)
    with torch.no_grad():
        a, b = (
            train_text2img.batch_loss(parts.unet, parts, chosen, 0, slots)
            for chosen in (plain, clipped)
        )
    t = randomness.timesteps(0, 0, slots, 4, 100)
    torch.testing.assert_close(b, loss_weight(parts.scheduler, t, "min_snr", 2.0) * a)


def test_pictures_are_mirrored_as_drawn(whole):
    """Others in the place of these, which are plain."""
    chosen, _ = load(["--config", str(whole[0] / "config.yaml"), "--data.flip", "true"])
    parts, slots = train_text2img.prepare(chosen, None, torch.device("cpu")), torch.arange(4)
    pixels = torch.randint(
        256, (9, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    parts.images = dataclasses.replace(parts.images, images=pixels)
    shown, flip = pixels[sampler.batch_indices(0, 0, 4, 9)], randomness.flips(0, 0, slots)
    assert flip.any() and not flip.all()
    shown[flip] = shown[flip].flip(-1)
    x_0, _ = parts.examples(chosen, 0, slots)
    assert torch.equal(parts.pipe.decode(x_0), image_ops.as_float(shown))


def test_accumulated_micro_steps_are_one_batch(whole, tmp_path):
    """Slots belong to the global batch: two micro-steps of 2 see what one of 4 sees (sums differ by rounding)."""
    train(
        whole[0] / "config.yaml", tmp_path, "--train.accumulation", "2", "--train.precision", "no"
    )
    train(whole[0] / "config.yaml", tmp_path / "one", "--train.precision", "no")
    assert all(
        alike(a, b)
        for a, b in zip(log(tmp_path / "tiny"), log(tmp_path / "one" / "tiny"), strict=True)
    )


def test_changed_settings_are_refused_by_name(whole):
    done = train(whole[0] / "config.yaml", whole[0].parent, "--train.lr", "0.5", check=False)
    assert done.returncode == 2
    assert "train.lr was 0.001 and is now 0.5" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(whole, started, tmp_path, number, code):
    """Stopped somewhere in 2000 steps of a constant rate, then run two steps further: as if never stopped."""
    more = [
        "--train.lr_schedule",
        "constant",
        "--train.save_every",
        "5000",
        "--train.validate_every",
        "5000",
        "--sample.every",
        "5000",
    ]
    process, said = started(
        script, arguments(whole[0] / "config.yaml", tmp_path, *more, "--train.steps", "2000")
    )
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), seconds=120)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code, said.read_text()
    (stopped,) = (int(p.name) for p in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert (
        f"Stopped ({number.name}) after step {stopped} of 2000" in said.read_text()
        and "Traceback" not in said.read_text()
    )
    assert not (tmp_path / "tiny" / "pipeline").exists()
    resumed = train(whole[0] / "config.yaml", tmp_path, *more, "--train.steps", str(stopped + 2))
    assert f"going on from step {stopped}" in resumed.stdout
    train(whole[0] / "config.yaml", tmp_path / "through", *more, "--train.steps", str(stopped + 2))
    assert same(weights(tmp_path / "tiny"), weights(tmp_path / "through" / "tiny"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--train.lrr", "1"], "did you mean 'train.lr'?"),
        (["--data.source", "nowhere"], "nowhere"),
        (["--train.lr", "-1", "--train.steps", "0"], "train.steps must be at least 1, got 0"),
        (["--report_to", "tensorbord"], "report_to must be one of "),
        (["--report_to", "all"], "report_to must be one of "),
        (["--report_to", "wandb"], "report_to 'wandb' is not installed here: pip install wandb"),
        (["--name", ".."], "name must be one folder's name, got '..'"),
        (
            ["--data.caption_length", "17", "--data.source", "nowhere"],
            "data.caption_length must be at most 16, the text encoder's",
        ),
        (["--model.text_encoder", "nowhere/at-all", "--data.source", "nowhere"], "nowhere/at-all"),
        (
            ["--train.precision", "fp16"],
            "train.precision must be auto, no or bf16 on a CPU, got fp16",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(config, tmp_path, more, says):
    done = train(config, tmp_path / "bad", *more, check=False)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_the_command_line_exits_with_2_on_bad_input(config, tmp_path):
    done = subprocess.run(
        command(config, tmp_path, "--train.lrr", "1"), capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr == "error: unknown setting 'train.lrr': did you mean 'train.lr'?\n"
    )


def test_a_dry_run_says_what_would_happen_and_keeps_nothing(config, tmp_path):
    done = train(
        config, tmp_path / "dry", "--dry_run", "--model.text_encoder", "minilm"
    )  # the embedded one, as make train's
    assert "weights to train" in done.stdout and "6 steps of 4 images" in done.stdout
    assert not (tmp_path / "dry").exists()


def test_every_core_is_used_whatever_a_launcher_says(config, tmp_path, monkeypatch):
    """`accelerate launch` exports OMP_NUM_THREADS=1 on a CPU; the script undoes that."""
    used = []
    monkeypatch.setattr(
        train_text2img, "rehearse", lambda *_: used.append(torch.get_num_threads()) or 0
    )
    torch.set_num_threads(1)
    done = train(config, tmp_path, "--dry_run", "--train.threads", "null")
    assert used == [len(os.sched_getaffinity(0))] and f"{used[0]} CPU threads each" in done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
def test_the_script_keeps_freed_memory_so_that_a_step_costs_no_page_faults(
    config, started, tmp_path
):
    counts = []
    for argv in (arguments(config, tmp_path, "--dry_run"), None):
        process, said = started(page_faults, argv)
        process.join(60)
        counts.append(int(said.read_text()))
    assert counts[0] < 1000 < counts[1]


def page_faults(said, argv):
    """How often memory that has been freed must be fetched again, with what the script tells the system and without."""
    assert argv is None or train_text2img.main(argv) == 0
    for tensors in (3, 5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(tensors):
            torch.ones(2**24)
    said.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
