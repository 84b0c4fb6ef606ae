"""The command line: the pictures it draws, and one sentence for each mistake."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from pipeline.cli import runner, sample
from pipeline.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.models import loading, lora
from pipeline.serving.png_metadata import read_png
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


def refused(capsys, *arguments):
    """What the command line says to bad input: one sentence, exit status 2."""
    capsys.readouterr()
    assert sample.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_fresh_process_draws_what_the_pipeline_draws(run, output):
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "sample",
        run,
        "a green cat",
        "--w",
        "2",
        "--seed",
        "7",
        "--steps",
        "2",
        "--eta",
        "1",
        "--n",
        "1",
        "--device",
        "cpu",
        "-o",
        output,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n"
    image = tiny_pipeline(patch_size=2)(
        "a green cat", w=2.0, seed=7, num_inference_steps=2, eta=1.0
    ).images[0]
    difference = np.asarray(Image.open(output)).astype(int) - np.asarray(image).astype(int)
    assert np.abs(difference).max() <= 1  # the other process may use another number of threads


@pytest.mark.parametrize("model", [".", "pipeline"])
def test_a_run_or_its_pipeline_at_the_models_own_weight(run, output, model):
    assert (
        sample.main(
            [str(run / model), "red heart", "--steps", "2", "--device", "cpu", "-o", str(output)]
        )
        == 0
    )
    image = tiny_pipeline(patch_size=2)("red heart", w=1.0, seed=0, num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(Image.open(output)), np.asarray(image))


def test_several_pictures_have_numbers_and_seeds_that_count_up(run, output, capsys):
    arguments = [str(run), "red heart", "--steps", "2", "--device", "cpu"]
    assert sample.main([*arguments, "--n", "2", "--seed", "3", "-o", str(output)]) == 0
    assert capsys.readouterr().out == "".join(f"{output.with_stem(f'cat-{i}')}\n" for i in range(2))
    assert sample.main([*arguments, "--seed", "4", "-o", str(output)]) == 0
    second, alone = (
        np.asarray(Image.open(f)).astype(int) for f in (output.with_stem("cat-1"), output)
    )
    assert np.abs(second - alone).max() <= 1


def test_a_batch_is_saved_before_the_next_is_drawn(run, output, capsys, monkeypatch):
    drawn, real = [], TextToImagePipeline.__call__

    def counted(self, *args, **call):
        drawn.append(
            (call["num_images_per_prompt"], sorted(path.name for path in output.parent.iterdir()))
        )
        return real(self, *args, **call)

    monkeypatch.setattr(TextToImagePipeline, "__call__", counted)
    arguments = [
        str(run),
        "red heart",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--seed",
        "3",
        "-o",
        str(output),
    ]
    assert sample.main([*arguments, "--n", "3", "--batch", "2"]) == 0
    assert drawn == [(2, []), (1, ["cat-0.png", "cat-1.png"])]
    batched = [np.asarray(Image.open(output.with_stem(f"cat-{i}"))).astype(int) for i in range(3)]
    images = tiny_pipeline(patch_size=2)(
        "red heart", w=1.0, seed=3, num_images_per_prompt=3, num_inference_steps=2
    ).images
    assert max(np.abs(a - np.asarray(b)).max() for a, b in zip(batched, images, strict=True)) <= 1


def test_a_png_carries_what_draws_it_again_on_the_page(run, output):
    arguments = [
        str(run),
        "red héart",
        "--negative",
        "blue",
        "--w",
        "2",
        "--steps",
        "2",
        "--eta",
        "0.5",
        "--seed",
        "7",
        "--n",
        "2",
        "--device",
        "cpu",
        "-o",
        str(output),
    ]
    assert sample.main(arguments) == 0
    path = output.with_stem("cat-1")
    request, denoiser, model = read_png(path, 1000)
    assert (denoiser, request.seed, request.images) == ("network", 8, 1)
    studio = InferenceSession(loading.load_pipeline(str(run)), "tiny", DataConfig())
    assert model == studio.identity
    *_, frame = studio.create(request, denoiser)
    assert np.abs(np.asarray(frame.images[0]).astype(int) - np.asarray(Image.open(path))).max() <= 1


def test_ctrl_c_is_a_word_and_no_traceback(run, output, capsys, monkeypatch):
    def stop(*_args, **_call):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextToImagePipeline, "__call__", stop)
    assert (
        runner.run_cli(lambda: sample.main([str(run), "cat", "-o", str(output)]), "none is saved")
        == 130
    )
    assert capsys.readouterr().err == "\nstopped: none is saved\n"


def test_a_full_disk_is_one_sentence(run, output, capsys, monkeypatch):
    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert sample.main([str(run), "cat", "--steps", "2", "-o", str(output)]) == 2
    *_bar, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {output} cannot be written (No space left on device)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "num_inference_steps is 0, expected a whole number from 1 to 1000"),
        (["--w", "inf"], "w is inf, expected a finite number"),
        (["--eta", "2"], "eta is 2.0, expected a number from 0"),
        (["--seed", "-1"], "seed is -1, expected a whole number"),
        (["--n", "0"], "--n is 0, expected 1 or more"),
        (["--device", "abacus"], "--device is abacus, expected one that this machine has"),
        (["-o", "cat.txt"], "-o is cat.txt, expected a name that ends in one of .png"),
        (["-o", "no/such/cat.png"], "create no/such first"),
        (["--batch", "0"], "--batch is 0, expected 1 or more"),
        (["-o", "folder.png"], "-o is folder.png, which is there and no file that can be written"),
    ],
)
def test_bad_settings(run, output, capsys, arguments, message, monkeypatch):
    monkeypatch.chdir(output.parent)
    Path("folder.png").mkdir()
    assert message in refused(capsys, run, "cat", "--device", "cpu", "-o", output, *arguments)
    assert not output.exists()


def test_models_that_are_not_there(tmp_path, capsys, output):
    assert "does not exist, expected the folder of a run" in refused(
        capsys, tmp_path / "none", "cat", "-o", output
    )
    assert "neither a folder here nor in the cache" in refused(
        capsys, "someone/emoji", "cat", "-o", output
    )
    assert "holds no pipeline" in refused(capsys, tmp_path, "cat", "-o", output)
    (tmp_path / "config.yaml").write_text("name: unfinished\n")
    assert "its training has not finished" in refused(capsys, tmp_path, "cat", "-o", output)


@pytest.mark.parametrize("damage", ["missing", "cut", "cut encoder", "index"])
def test_a_damaged_model_is_one_sentence(tmp_path, capsys, output, damage):
    folder = tmp_path / "tiny"
    tiny_pipeline().save_pretrained(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "cut encoder":
        encoder = folder / "text_encoder" / "model.safetensors"
        encoder.write_bytes(encoder.read_bytes()[:1000])
    else:
        (folder / "model_index.json").write_text("{")
    assert f"{folder} cannot be loaded" in refused(capsys, folder, "cat", "-o", output)


def test_a_damaged_adapter_is_one_sentence(run, tmp_path, capsys, output):
    config = Config(
        name="mine",
        model=ModelConfig(pretrained=str(run / "pipeline")),
        train=TrainConfig(method="lora"),
    )
    pipe = tiny_pipeline(patch_size=2, w=1.0)
    lora.add_adapter(pipe.unet, LoraConfig(rank=2))
    lora.save_adapter(pipe.unet, tmp_path / "mine" / "lora")
    (tmp_path / "mine" / "config.yaml").write_text(config.to_yaml())
    assert sample.main([str(tmp_path / "mine"), "cat", "--steps", "2", "-o", str(output)]) == 0
    weights = tmp_path / "mine" / "lora" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{weights} cannot be loaded" in refused(capsys, tmp_path / "mine", "cat", "-o", output)


def test_a_misspelt_option_is_argparse_s_own_error(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        sample.main([str(run), "cat", "--stepz", "3"])
    assert "unrecognized arguments: --stepz" in capsys.readouterr().err
