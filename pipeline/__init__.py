"""Text-to-image diffusion written from the equations."""

import importlib

_MODULES = {
    "CaptionWhitening": "diffusion.captions",
    "DDPMScheduler": "diffusion.scheduler",
    "ExactDenoiser": "diffusion.exact_denoiser",
    "PatchAutoencoder": "diffusion.patches",
    "TextToImagePipeline": "models.loading",  # which also says what the class may load
    "interval": "diffusion.guidance",
    "load_pipeline": "models.loading",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    """Import a public name on first use; `import pipeline` alone imports nothing else."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
