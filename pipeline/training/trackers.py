"""Report to accelerate's trackers (`report_to`), none of which may end a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from tqdm.auto import tqdm

from pipeline.config import ConfigError, RunConfig, flatten
from pipeline.data.sources.rows import one_line
from pipeline.runs.stop_signals import Stopped

IMAGE_TRACKERS = ("tensorboard", "wandb", "swanlab")  # their log_images takes a batch of arrays


def check_tracker(name: str | None) -> None:
    """Raise ConfigError for a tracker that accelerate does not know or that is not installed."""
    known = [str(tracker.value) for tracker in LoggerType if tracker != LoggerType.ALL]
    if name and name not in known:
        raise ConfigError(f"report_to must be one of {', '.join(known)}, got {name!r}.")
    if name and name not in [str(tracker.value) for tracker in get_available_trackers()]:
        raise ConfigError(f"report_to {name!r} is not installed: pip install {name}")


class Trackers:
    """The trackers of a run. The first failure is printed and ends reporting, not training."""

    def __init__(self, accelerator: Accelerator, config: RunConfig):
        self.accelerator = accelerator
        self.open = config.report_to is not None
        self._try(lambda: accelerator.init_trackers(config.name, config=tracked_settings(config)))

    def _try(self, action: Callable[[], object]) -> None:
        if not self.open:
            return
        try:
            action()
        except Exception as error:  # every tracker has its own exceptions
            self.open = False
            reason = f"{type(error).__name__}: {one_line(error)}"
            tqdm.write(f"report_to failed ({reason}). Training continues without it.")

    def log(self, step: int, record: dict) -> None:
        """Send a record's numbers; nested names are joined by a slash."""
        flat = {name.replace(".", "/"): value for name, value in flatten(record).items()}
        self._try(lambda: self.accelerator.log(flat, step=step))

    def log_image(self, step: int, path: Path) -> None:
        """Send an image of samples, if it was written, to the trackers that take images."""
        if not path.is_file():
            return

        def send(tracker: Any) -> None:
            pixels = np.asarray(Image.open(path).convert("RGB"))[None]
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=step, **options)

        for tracker in self.accelerator.trackers:
            if tracker.name in IMAGE_TRACKERS:
                self._try(lambda tracker=tracker: send(tracker))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush the trackers and leave the process group when training ends or is stopped."""
        if kind is not None and not issubclass(kind, Stopped):
            return
        for tracker in self.accelerator.trackers:
            self._try(tracker.finish)
        self.accelerator.state.destroy_process_group()


def tracked_settings(config: RunConfig) -> dict:
    """Return all settings but the token by dotted name, as numbers and texts for TensorBoard."""
    plain = (bool, int, float, str)
    flat = flatten(config.to_dict())
    return {name: value if isinstance(value, plain) else str(value) for name, value in flat.items()}
