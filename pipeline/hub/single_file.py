"""Export a run as one file for other programs: kohya's keys or a whole checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.hub.client import HubError, disk_errors
from pipeline.hub.push import require_finished
from pipeline.models.loading import load_pipeline
from pipeline.runs.folder import ADAPTER_FILE, RunFolder

# diffusers' names of layers -> those of the original Stable Diffusion 1.
UNET_PLACES = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
UNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_PLACES = {
    f"{half}.{theirs}": f"{half}.{original}"
    for half in ("encoder", "decoder")
    for theirs, original in {
        "conv_norm_out.": "norm_out.",
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "mid_block.attentions.0.": "mid.attn_1.",
        "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
    }.items()
}
VAE_LAYERS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
}


def export_single_file(source: str | Path, file: Path, *, merge: bool = False) -> Path:
    """Write a finished run to a new file for ComfyUI, A1111 and kohya's scripts.

    A run of an adapter gives the adapter in kohya's keys; with merge, or for any other run, the
    file is a whole checkpoint. HubError if the run has no such form.
    """
    if file.exists():
        raise HubError(f"{file} exists. Choose the name of a new file.")
    run = RunFolder(source)
    if not (run.config.is_file() and run.has_model):
        raise HubError(f"{source} is not a finished run. Finish its training first.")
    require_finished(run)
    pipe = load_pipeline(source)
    if run.has_adapter and not merge:
        (trained,) = pipe.unet.peft_config.values()
        tensors = kohya_adapter(run, trained.lora_alpha)
        prediction = pipe.scheduler.config.prediction_type
        # diffusers takes no other tensors than adapters, so the marks of a checkpoint, `v_pred`
        # and `ztsnr`, are metadata here, under kohya's names.
        metadata = {
            "modelspec.prediction_type": prediction.removesuffix("_prediction"),
            "ss_zero_terminal_snr": str(has_zero_terminal_snr(pipe)),
        }
    else:
        if run.has_adapter:
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        tensors = original_checkpoint(pipe)
        metadata = {}
    with disk_errors(f"writing {file}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            new = Path(scratch) / file.name
            save_file(tensors, new, {"format": "pt"} | metadata)
            new.rename(file)
    return file


def kohya_adapter(run: RunFolder, alpha: float) -> dict[str, Tensor]:
    """Return a run's adapter in kohya's keys, with the alpha that it was trained with."""
    tensors = convert_state_dict_to_kohya(load_tensors(run.adapter / ADAPTER_FILE))
    for name in tensors:
        # diffusers writes the rank, which is the scale 1 whatever alpha was.
        if name.endswith(".alpha"):
            tensors[name] = torch.tensor(alpha)
    return tensors


def original_checkpoint(pipe: TextToImagePipeline) -> dict[str, Tensor]:
    """Return a pipeline's weights as in the original Stable Diffusion 1, with ComfyUI's marks.

    `v_pred` and `ztsnr` are empty tensors: the model predicts v, its chain ends at zero SNR.
    HubError for a model that does not have this format.
    """
    unet = pipe.unet
    if not pipe.is_stable_diffusion() or unet.config.use_linear_projection:
        raise HubError(
            "Only models in the format of Stable Diffusion 1 are written as a single file. "
            "Name a new folder instead, without a suffix."
        )
    parts = {
        "model.diffusion_model.": rename(unet.state_dict(), unet_places(unet), UNET_LAYERS),
        "first_stage_model.": rename(pipe.vae.state_dict(), vae_places(pipe.vae), VAE_LAYERS),
        "cond_stage_model.transformer.text_model.": {
            # Newer releases of transformers leave out the prefix.
            name.removeprefix("text_model."): weight
            for name, weight in pipe.text_encoder.state_dict().items()
        },
    }
    tensors = {
        prefix + name: weight.contiguous()
        for prefix, state in parts.items()
        for name, weight in state.items()
    }
    if pipe.scheduler.config.prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])
    if has_zero_terminal_snr(pipe):
        tensors["ztsnr"] = torch.tensor([])
    return tensors


def has_zero_terminal_snr(pipe: TextToImagePipeline) -> bool:
    """Return whether the scheduler rescales its chain to end in pure noise."""
    return bool(pipe.scheduler.config.get("rescale_betas_zero_snr"))


def unet_places(unet: UNet2DConditionModel) -> dict[str, str]:
    """Return the original places of a UNet's blocks, which are numbered through there."""
    places = dict(UNET_PLACES)
    n = 1  # input block 0 is conv_in
    block: Any
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            places[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{n}.0."
            places[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{n}.1."
            n += 1
        places[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{n}.0.op."
        n += 1
    n = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            places[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{n}.0."
            places[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{n}.1."
            n += 1
        upsampler = 2 if hasattr(block, "attentions") else 1
        places[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{n - 1}.{upsampler}."
    return places


def vae_places(vae: AutoencoderKL) -> dict[str, str]:
    """Return the original places of a VAE's blocks; those of the decoder are numbered backwards."""
    places = dict(VAE_PLACES)
    levels = len(vae.config["block_out_channels"])
    for i in range(levels):
        for half, block, place, sampler in (
            ("encoder", f"down_blocks.{i}", f"down.{i}", "downsample"),
            ("decoder", f"up_blocks.{i}", f"up.{levels - 1 - i}", "upsample"),
        ):
            for j in range(vae.config["layers_per_block"] + 1):
                places[f"{half}.{block}.resnets.{j}."] = f"{half}.{place}.block.{j}."
            places[f"{half}.{block}.{sampler}rs.0."] = f"{half}.{place}.{sampler}."
    return places


def rename(
    state: dict[str, Tensor], places: dict[str, str], layers: dict[str, str]
) -> dict[str, Tensor]:
    """Return the weights with the longest known prefix and the layer after it renamed."""
    renamed = {}
    for name, weight in state.items():
        prefix = max((place for place in places if name.startswith(place)), key=len, default="")
        layer, dot, rest = name.removeprefix(prefix).partition(".")
        renamed[places.get(prefix, "") + layers.get(layer, layer) + dot + rest] = weight
    return renamed
