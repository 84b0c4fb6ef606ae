"""LoRA adapters: add, save, load."""

from pathlib import Path
from typing import Any

import peft
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from pipeline.config import ConfigError, LoraConfig
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.runs.folder import ADAPTER_FILE


def add_adapter(network: UNet2DConditionModel, lora: LoraConfig) -> UNet2DConditionModel:
    """Freeze the network and add trainable low-rank adapters, which at first change nothing.

    Their weights come from torch's global generator. ConfigError for unknown target layers.
    """
    network.requires_grad_(False)
    names = [name for name, _ in network.named_modules()]
    unknown = [
        target
        for target in lora.targets
        if not any(f".{name}".endswith(f".{target}") for name in names)
    ]
    if unknown:
        last_parts = {name.rpartition(".")[2] for name in names}
        known = sorted(part for part in last_parts if part and not part.isdigit())
        raise ConfigError(
            f"lora.targets has {', '.join(unknown)}, but no layer has such a name. "
            f"Choose from {', '.join(known)}."
        )
    alpha: Any = lora.alpha or lora.rank  # peft takes floats too
    try:
        network.add_adapter(
            peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets))
        )
    except ValueError as error:  # peft cannot adapt layers of this kind
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"lora.targets {', '.join(lora.targets)} cannot be adapted: {reason}"
        ) from error
    return network


def save_adapter(network: UNet2DConditionModel, folder: Path) -> None:
    """Save the adapters with rank and alpha as diffusers does: pytorch_lora_weights.safetensors."""
    state = peft.get_peft_model_state_dict(network)
    # Weights that trained channels last are stored in the usual order.
    layers: dict[str, Any] = {name: weight.contiguous() for name, weight in state.items()}
    metadata = network.peft_config["default"].to_dict()
    TextToImagePipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
    )


def load_adapter_weights(network: UNet2DConditionModel, folder: Path) -> None:
    """Load saved adapters into a network that has the same adapters."""
    saved = load_file(folder / ADAPTER_FILE)
    state = {name.removeprefix("unet."): weight for name, weight in saved.items()}
    peft.set_peft_model_state_dict(network, state)
