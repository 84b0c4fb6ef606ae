"""`direct-jump sample`: the images it saves, and one line for each mistake."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from serving_data import pixels
from tiny import tiny_pipeline

from pipeline import TextToImagePipeline
from pipeline.cli import sample
from pipeline.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from pipeline.models import build, loading, lora
from pipeline.serving.png_metadata import read_png, same_model
from pipeline.serving.session import InferenceSession

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a tiny pipeline in it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tiny_pipeline(patch_size=2, w=1.0).save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture
def output(tmp_path):
    return tmp_path / "cat.png"


@pytest.fixture
def generate(run, output):
    """Run the command with two steps on the CPU: `generate("red heart", "--n", 2)`."""

    def command(prompt, *options, model=run):
        argv = [model, prompt, "--steps", 2, "--device", "cpu", "-o", output, *options]
        return sample.main([str(arg) for arg in argv])

    return command


def refusal(capsys, *argv):
    """Return the one line that the command prints for bad input."""
    capsys.readouterr()
    assert sample.main([str(arg) for arg in argv]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def difference(path, image):
    """Return the largest difference between a saved image and another one."""
    return np.abs(pixels([Image.open(path)]) - pixels([image])).max()


def test_sample_in_a_new_process_gives_the_pipelines_image(run, output):
    options = ["--w", "2", "--seed", "7", "--steps", "2", "--eta", "1", "--device", "cpu", "-o"]
    command = [sys.executable, "-m", "pipeline", "sample", run, "a green cat", *options, output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n"
    pipe = tiny_pipeline(patch_size=2)
    image = pipe("a green cat", w=2.0, seed=7, num_inference_steps=2, eta=1.0).images[0]
    # The other process may use another number of threads.
    assert difference(output, image) <= 1


@pytest.mark.parametrize("model", [".", "pipeline"])
def test_sample_takes_a_run_or_its_pipeline(run, output, generate, model):
    assert generate("red heart", model=run / model) == 0
    pipe = tiny_pipeline(patch_size=2)
    image = pipe("red heart", w=1.0, seed=0, num_inference_steps=2).images[0]
    assert difference(output, image) == 0


def test_sample_numbers_several_images_and_their_seeds(output, generate, capsys):
    files = [output.with_stem(f"cat-{i}") for i in range(2)]
    assert generate("red heart", "--n", 2, "--seed", 3) == 0
    assert capsys.readouterr().out == f"{files[0]}\n{files[1]}\n"
    assert generate("red heart", "--seed", 4) == 0
    assert difference(files[1], Image.open(output)) <= 1


def test_sample_saves_a_batch_before_the_next(output, generate, monkeypatch):
    batches = []
    real = TextToImagePipeline.__call__

    def record(self, *args, **call):
        saved = sorted(path.name for path in output.parent.iterdir())
        batches.append((call["num_images_per_prompt"], saved))
        return real(self, *args, **call)

    monkeypatch.setattr(TextToImagePipeline, "__call__", record)
    assert generate("red heart", "--seed", 3, "--n", 3, "--batch", 2) == 0
    assert batches == [(2, []), (1, ["cat-0.png", "cat-1.png"])]
    options = {"w": 1.0, "seed": 3, "num_images_per_prompt": 3, "num_inference_steps": 2}
    images = tiny_pipeline(patch_size=2)("red heart", **options).images
    for i, image in enumerate(images):
        assert difference(output.with_stem(f"cat-{i}"), image) <= 1


def test_sample_stores_what_reproduces_an_image_in_the_demo(run, output, generate):
    options = ["--negative", "blue", "--w", "2", "--eta", "0.5", "--seed", "7", "--n", "2"]
    assert generate("red héart", *options) == 0
    path = output.with_stem("cat-1")
    request, denoiser, model = read_png(path, 1000)
    assert (denoiser, request.seed, request.images) == ("network", 8, 1)
    session = InferenceSession(loading.load_pipeline(str(run)), "tiny", DataConfig())
    assert model == session.identity
    *_, frame = session.create(request, denoiser)
    assert difference(path, frame.images[0]) <= 1


def test_sample_takes_a_size_a_scheduler_and_an_adapter(output, tmp_path, generate):
    adapter = tiny_pipeline(patch_size=2)
    lora.add_adapter(adapter.unet, LoraConfig(rank=2, alpha=5))
    with torch.no_grad():
        for weight in build.trainable_parameters(adapter.unet):
            weight.normal_(generator=torch.Generator().manual_seed(weight.numel()))
    lora.save_adapter(adapter.unet, tmp_path / "mine")
    adapter.scheduler = DDIMScheduler.from_config(adapter.scheduler.config)
    size = {"height": 16, "width": 24}
    image = adapter("red heart", w=1.0, seed=0, num_inference_steps=2, **size).images[0]
    options = ["--height", 16, "--width", 24, "--scheduler", "DDIMScheduler", "--lora"]
    for path in (tmp_path / "mine", tmp_path / "mine" / "pytorch_lora_weights.safetensors"):
        assert generate("red heart", *options, path) == 0
        assert Image.open(output).size == (24, 16)
        assert difference(output, image) <= 1
    _, _, model = read_png(output, 1000)
    assert all(part in model for part in ("DDIMScheduler", "height 16", "width 24", "lora"))
    assert not same_model(model, model.partition(",")[0])


def test_sample_ends_without_traceback_on_ctrl_c(run, output, capsys, monkeypatch):
    def stop(*_args, **_call):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextToImagePipeline, "__call__", stop)
    assert sample.main([str(run), "cat", "-o", str(output)]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: ")


def test_save_image_reports_a_full_disk_in_one_line(output, generate, capsys, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert generate("cat") == 2
    *_bar, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {output} ")
    assert "No space left on device" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], ("steps", "0")),
        (["--w", "inf"], ("w", "inf")),
        (["--eta", "2"], ("eta", "2.0")),
        (["--seed", "-1"], ("seed", "-1")),
        (["--n", "0"], ("--n", "0")),
        (["--device", "abacus"], ("--device", "abacus")),
        (["-o", "cat.txt"], ("cat.txt", ".png")),
        (["-o", "no/such/cat.png"], ("no/such",)),
        (["--batch", "0"], ("--batch", "0")),
        (["--height", "15"], ("height", "15")),
        (["--scheduler", "UNet2DModel"], ("UNet2DModel", "DDIMScheduler")),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], ("FlowMatch", "DDIMScheduler")),
        (["--lora", "nowhere"], ("--lora", "nowhere")),
        (["-o", "folder.png"], ("folder.png",)),
    ],
    ids=lambda x: " ".join(x),
)
def test_sample_refuses_a_bad_option_by_name(run, output, capsys, options, words, monkeypatch):
    monkeypatch.chdir(output.parent)
    Path("folder.png").mkdir()
    error = refusal(capsys, run, "cat", "--device", "cpu", "-o", output, *options)
    assert all(word in error for word in words)
    assert not output.exists()


def test_sample_reports_a_missing_model_in_one_line(tmp_path, capsys, output):
    for model in (tmp_path / "none", "someone/emoji", tmp_path):
        assert str(model) in refusal(capsys, model, "cat", "-o", output)
    (tmp_path / "config.yaml").write_text("name: unfinished\n")
    assert "training" in refusal(capsys, tmp_path, "cat", "-o", output)


@pytest.mark.parametrize("damage", ["missing", "cut", "cut encoder", "index"])
def test_sample_reports_a_damaged_model_in_one_line(tmp_path, capsys, output, damage):
    folder = tmp_path / "tiny"
    tiny_pipeline().save_pretrained(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    encoder = folder / "text_encoder" / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "index":
        (folder / "model_index.json").write_text("{")
    else:
        file = weights if damage == "cut" else encoder
        file.write_bytes(file.read_bytes()[:1000])
    assert str(folder) in refusal(capsys, folder, "cat", "-o", output)


def test_sample_reports_a_damaged_adapter_in_one_line(run, tmp_path, capsys, output, generate):
    adapted = tmp_path / "mine"
    base = ModelConfig(pretrained=str(run / "pipeline"))
    config = Config(name="mine", model=base, train=TrainConfig(method="lora"))
    pipe = tiny_pipeline(patch_size=2, w=1.0)
    lora.add_adapter(pipe.unet, LoraConfig(rank=2))
    lora.save_adapter(pipe.unet, adapted / "lora")
    (adapted / "config.yaml").write_text(config.to_yaml())
    assert generate("cat", model=adapted) == 0
    weights = adapted / "lora" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(weights) in refusal(capsys, adapted, "cat", "-o", output)


def test_sample_leaves_misspelt_options_to_argparse(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        sample.main([str(run), "cat", "--stepz", "3"])
    assert "--stepz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["sample", "nowhere", "cat"], 2), (["sample", "--help"], 0), (["emoji", "--help"], 0)],
)
def test_main_answers_without_importing_torch(tmp_path, arguments, code):
    """A mistyped path and a question for help are answered at once."""
    program = f"""
import sys
from pipeline.__main__ import main
try:
    code = main({arguments!r})
except SystemExit as end:
    code = end.code
print(code, "torch" in sys.modules)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith(f"{code} False\n"), done.stdout + done.stderr
