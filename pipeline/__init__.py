"""Text-to-image diffusion written from the equations."""

import importlib

_HOME = {
    "DDPMScheduler": "scheduler",
    "TextToImagePipeline": "text_to_image",
    "PatchAutoencoder": "patches",
    "CaptionWhitening": "captions",
    "ExactDenoiser": "exact",
    "interval": "guidance",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    """The public names, imported on first use, so that `import pipeline` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})
