"""What `report_to` names beside metrics.jsonl: accelerate's trackers, none of which may end a training."""

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from pipeline.config import Config, flatten
from pipeline.data.sources.rows import one_line
from pipeline.runs.stop_signals import Stopped


class Trackers:
    """What `report_to` names; one that fails once, on its network say, is told and left, and training goes on."""

    PICTURES = ("tensorboard", "wandb", "swanlab")  # those whose log_images takes a batch of them

    def __init__(self, accelerator: Accelerator, config: Config):
        self.accelerator, self.open = accelerator, config.report_to is not None
        self.ask(lambda: accelerator.init_trackers(config.name, config=tracked_settings(config)))

    def ask(self, request) -> None:
        """Do something with the trackers, if there are any."""
        try:
            if self.open:
                request()
        except Exception as error:  # every tracker has errors of its own
            self.open = False
            tqdm.write(
                f"report_to has failed ({type(error).__name__}: {one_line(error)}): training goes on without"
            )

    def log(self, step: int, record: dict) -> None:
        """Send a record's numbers, those by timestep under a name each."""
        flat = {name.replace(".", "/"): value for name, value in flatten(record).items()}
        self.ask(lambda: self.accelerator.log(flat, step=step))

    def show(self, step: int, path: Path) -> None:
        """Send a picture of samples, where there is one and the tracker takes pictures."""

        def pictured(tracker):
            pixels = np.asarray(Image.open(path).convert("RGB"))[None]
            more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=step, **more)

        for tracker in self.accelerator.trackers if path.is_file() else ():
            if tracker.name in self.PICTURES:
                self.ask(lambda tracker=tracker: pictured(tracker))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Where training ends or is stopped, have them send what they still hold, and the processes part."""
        if kind is not None and not issubclass(kind, Stopped):
            return
        for tracker in self.accelerator.trackers:
            self.ask(tracker.finish)
        self.accelerator.state.destroy_process_group()


def tracked_settings(config: Config) -> dict:
    """Every setting but the token by its dotted name, as numbers and text: all that TensorBoard's table of them takes."""
    flat = flatten(config.to_dict())
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in flat.items()
    }
