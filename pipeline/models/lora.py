"""LoRA adapters: add, save, load."""

from pathlib import Path

import peft
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from pipeline.config import ConfigError, LoraConfig
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.runs.folder import ADAPTER_FILE


def add_adapter(network: UNet2DConditionModel, lora: LoraConfig) -> UNet2DConditionModel:
    """The network frozen, with low-rank adapters that train; their first product is zero. Weights from torch's generator."""
    network.requires_grad_(False)
    names = [name for name, _ in network.named_modules()]
    if unknown := [
        target
        for target in lora.targets
        if not any(f".{name}".endswith(f".{target}") for name in names)
    ]:
        known = sorted(
            {last for name in names if (last := name.rpartition(".")[2]) and not last.isdigit()}
        )
        raise ConfigError(
            f"lora.targets has {', '.join(unknown)}, which no layer's name ends in: take names from "
            f"{', '.join(known)}"
        )
    try:
        network.add_adapter(
            peft.LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=list(lora.targets)
            )
        )
    except ValueError as error:  # peft's, for names that no layer has
        raise ConfigError(
            f"lora.targets {', '.join(lora.targets)} cannot be adapted: {str(error).splitlines()[0]}"
        ) from error
    return network


def save_adapter(network: UNet2DConditionModel, folder: Path) -> None:
    """A network's adapters as `folder/pytorch_lora_weights.safetensors`, rank and alpha with them, as any diffusers loads it."""
    layers = {
        name: weight.contiguous()
        for name, weight in peft.get_peft_model_state_dict(network).items()
    }  # not channels last
    TextToImagePipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers,
        unet_lora_adapter_metadata=network.peft_config["default"].to_dict(),
    )


def load_adapter_weights(network: UNet2DConditionModel, folder: Path) -> None:
    """Put saved adapters into a network that has been adapted alike."""
    saved = load_file(folder / ADAPTER_FILE)
    peft.set_peft_model_state_dict(
        network, {name.removeprefix("unet."): value for name, value in saved.items()}
    )
