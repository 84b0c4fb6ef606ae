"""Runs as one file: diffusers' converters, loaders and pipelines are the oracles."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from finetuning import quiet, sample, stable_diffusion
from hub_world import make_adapter_run
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline import TextToImagePipeline
from pipeline.__main__ import main
from pipeline.config import Config
from pipeline.models.loading import load_pipeline
from pipeline.runs.folder import ADAPTER_FILE, RunFolder

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def v_scheduler():
    """Return a scheduler of a model that predicts v on a chain of zero terminal SNR."""
    return DDIMScheduler(
        **BETAS,
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny Stable Diffusion that predicts v."""
    folder = tmp_path_factory.mktemp("sd") / "base"
    stable_diffusion(v_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """The run of an adapter of `base`; its alpha is 5 and its rank 2."""
    pipe = load_pipeline(base)
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    return make_adapter_run(str(base), pipe, folder)


def finished_run(pipe, folder):
    """Return the run of a whole model."""
    run = RunFolder(folder)
    run.create()
    run.config.write_text(Config(name=folder.name).to_yaml())
    pipe.save_pretrained(run.pipeline)
    run.card.write_text("")
    return run


def export(run, file, *options):
    assert main(["export", str(run.folder), str(file), *options]) == 0
    return file


def test_export_single_file_of_an_adapter_matches_kohya(adapted, base, tmp_path):
    file = export(adapted, tmp_path / "lora.safetensors")
    written = load_file(file)
    expected = convert_state_dict_to_kohya(load_file(adapted.adapter / ADAPTER_FILE))
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        # diffusers writes the rank, 2, as alpha, and would sample at another scale.
        assert torch.equal(written[name], torch.tensor(5) if "alpha" in name else weight)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["ss_zero_terminal_snr"] == "True"


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, TextToImagePipeline])
def test_export_single_file_of_an_adapter_loads_alike(kind, adapted, base, tmp_path):
    file = export(adapted, tmp_path / "lora.safetensors")
    options = {"safety_checker": None} if kind is StableDiffusionPipeline else {}
    pipe = quiet(kind.from_pretrained(base, **options))
    plain = sample(pipe)
    pipe.load_lora_weights(str(file))
    expected = sample(quiet(load_pipeline(adapted.folder)))
    assert np.abs(sample(pipe) - expected).max() < 1e-4
    assert np.abs(plain - expected).max() > 1e-3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_export_single_file_of_a_model_samples_alike(method, adapted, base, tmp_path):
    if method == "lora":
        run, options = adapted, ["--merge"]
    else:
        run, options = finished_run(load_pipeline(base), tmp_path / "full"), []
    file = export(run, tmp_path / "model.safetensors", *options)
    pipe = StableDiffusionPipeline.from_single_file(str(file), config=str(base))
    mine = quiet(load_pipeline(run.folder))
    assert np.abs(sample(quiet(pipe)) - sample(mine)).max() < 1e-4
    names = load_file(file)
    assert names["v_pred"].numel() == names["ztsnr"].numel() == 0


def test_original_checkpoint_has_stable_diffusions_names(base, tmp_path):
    """Names that other programs look for, from the published file of Stable Diffusion 1."""
    run = finished_run(quiet(TextToImagePipeline.from_pipe(stable_diffusion())), tmp_path / "full")
    names = load_file(export(run, tmp_path / "model.safetensors"))
    assert not {"v_pred", "ztsnr"} & names.keys()
    assert {
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.decoder.up.1.upsample.conv.weight",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    } <= names.keys()


def test_export_single_file_refuses_what_has_no_such_form(adapted, run, tmp_path, capsys):
    taken = tmp_path / "taken.safetensors"
    taken.write_text("")
    own = tmp_path / "own.safetensors"
    for source, target, options, words in [
        (run.folder, own, [], "Stable Diffusion 1"),
        (tmp_path, own, [], f"{tmp_path} is not a finished run"),
        (adapted.folder, taken, [], f"{taken} exists"),
        (adapted.folder, tmp_path / "new", ["--merge"], "--merge"),
    ]:
        assert main(["export", str(source), str(target), *options]) == 1
        assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [taken]
