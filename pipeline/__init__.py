"""Text-to-image diffusion written from the equations."""

import importlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.diffusion.autoencoder import ConvAutoencoder
    from pipeline.diffusion.captions import CaptionWhitening
    from pipeline.diffusion.exact_denoiser import ExactDenoiser
    from pipeline.diffusion.guidance import interval
    from pipeline.diffusion.patches import PatchAutoencoder
    from pipeline.diffusion.scheduler import DDPMScheduler
    from pipeline.models.loading import TextToImagePipeline, load_pipeline

_MODULES = {
    "CaptionWhitening": "diffusion.captions",
    "ConvAutoencoder": "diffusion.autoencoder",
    "DDPMScheduler": "diffusion.scheduler",
    "ExactDenoiser": "diffusion.exact_denoiser",
    "PatchAutoencoder": "diffusion.patches",
    # models.loading also decides what the class may load.
    "TextToImagePipeline": "models.loading",
    "interval": "diffusion.guidance",
    "load_pipeline": "models.loading",
}
# Modules of version 0.1 that moved: `from pipeline import scheduler` still works in 0.2.
_MOVED = {
    "captions": "diffusion.captions",
    "exact": "diffusion.exact_denoiser",
    "guidance": "diffusion.guidance",
    "losses": "diffusion.losses",
    "patches": "diffusion.patches",
    "scheduler": "diffusion.scheduler",
    "text_to_image": "diffusion.text_to_image",
    "loading": "models.loading",
}
__all__ = [
    "CaptionWhitening",
    "ConvAutoencoder",
    "DDPMScheduler",
    "ExactDenoiser",
    "PatchAutoencoder",
    "TextToImagePipeline",
    "interval",
    "load_pipeline",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use; `import pipeline` alone imports nothing else."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name in _MOVED:
        moved = f"{__name__}.{_MOVED[name]}"
        warnings.warn(f"{__name__}.{name} is now {moved}", DeprecationWarning, stacklevel=2)
        return importlib.import_module(moved)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
