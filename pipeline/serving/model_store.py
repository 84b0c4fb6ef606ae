"""Load the models and checkpoints that the demo offers."""

import logging
import threading
from pathlib import Path

from safetensors import SafetensorError

from pipeline.config import DataConfig, DiffusionConfig, load_file, setting_in
from pipeline.data.emoji.catalogue import SETS
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.hardware import pick_device
from pipeline.models import trusted
from pipeline.models.build import build_scheduler
from pipeline.models.loading import load_checkpoint, load_pipeline
from pipeline.models.trusted import parse_repo_id
from pipeline.runs.folder import MODEL_INDEX, SHARED_CONFIG_FILE, RunFolder
from pipeline.serving.requests import MAX_SEED, parse_number
from pipeline.serving.session import InferenceSession

log = logging.getLogger(__name__)


class ModelStore:
    """The models that a page offers: one, the checkpoints of a run in progress, or (None) the exact denoiser alone.

    model: the folder of a run or of a saved pipeline, or the Hub's `user/name[@revision]`. device: None is the fastest.
    """

    def __init__(self, model: str | Path | None, device: str | None = None):
        self.device = pick_device(device, double=True)
        self.name = (
            "the exact denoiser" if model is None else Path(str(model).partition("@")[0]).name
        )
        if model is not None and not Path(model).exists() and parse_repo_id(str(model)):
            model = trusted.download_model(str(model))
        self.model, self.run, self._kept, self._loading = model, None, {}, threading.Lock()
        if (
            model is not None
            and (Path(model) / "config.yaml").is_file()
            and not (Path(model) / MODEL_INDEX).is_file()
        ):
            self.run = RunFolder(model)
            self.follows = not self.run.finished and bool(
                self.run.steps() or not self.run.has_model
            )  # one may be trained on
        else:
            self.follows = False
        if self.follows and not self.steps():
            raise ValueError(
                f"{model} has no checkpoint yet, expected one at the least: wait until it has saved its first"
            )

    def steps(self) -> list[int]:
        """The checkpoints of the run that is followed, oldest first."""
        return self.run.steps() if self.follows else []

    def studio(self, step: int | None = None) -> InferenceSession:
        """What draws: the one model, or the checkpoint nearest to a step (None is the newest).

        The one before a newest that is torn takes its place, as in training; InputError where no checkpoint can be read.
        """
        if not self.follows:
            return self._studio(None)
        wanted = (
            MAX_SEED
            if step is None
            else parse_number("checkpoint", step, 0, MAX_SEED, True, problems := [])
        )
        if step is not None and problems:
            raise InputError(problems[0])
        torn, why = None, f"{self.name} has no checkpoint any more"
        for _ in range(2):  # training may delete one while it is read
            steps = [s for s in self.steps() if s != torn]
            if not steps:
                break
            nearest = min(steps, key=lambda s: abs(s - wanted))
            try:
                return self._studio(nearest)
            except (OSError, ValueError, SafetensorError) as error:
                log.warning("step %d of %s: %s", nearest, self.name, error)
                torn, why = (
                    nearest if nearest == steps[-1] else None,
                    str(error).replace(str(self.run.folder), self.name),
                )
        raise InputError(
            f"{why}, expected one that is whole: choose another, or wait until the next is saved"
        )

    def _studio(self, step: int | None) -> InferenceSession:
        """The studio of a checkpoint, or (None) of the one model; it is kept until another is asked for, as there may be room
        for one network alone.
        """
        with self._loading:
            if step not in self._kept:
                self._kept.clear()
                self._kept[step] = self._loaded(step)
            return self._kept[step]

    def _loaded(self, step: int | None) -> InferenceSession:
        if self.model is None:
            return InferenceSession(None, self.name, DataConfig())
        if step is not None:
            pipe = load_checkpoint(self.run, step).to(self.device)
            return InferenceSession(
                pipe, f"{self.name} at step {step}", load_file(self.run.config).data
            )
        pipe = load_pipeline(self.model).to(self.device)
        if not isinstance(
            pipe.scheduler, DDPMScheduler
        ):  # the page shows the lecture's equations, and a stock one has none
            pipe.register_modules(scheduler=build_scheduler(DiffusionConfig(), pipe.scheduler))
        pipe.set_progress_bar_config(disable=True)
        places = (
            [self.run.config]
            if self.run
            else [Path(self.model) / "config.yaml", Path(self.model).parent / "config.yaml"]
        )
        known = [load_file(path).data for path in places if path.is_file()]
        known = [
            config for config in known if config.source in SETS or Path(config.source).is_dir()
        ]
        size = pipe.unet.config.sample_size
        resolution = (size if isinstance(size, int) else size[0]) * pipe.vae_scale_factor
        return InferenceSession(
            pipe,
            self.name,
            known[0]
            if known
            else DataConfig(dataset_of_shared_model(Path(self.model)), resolution=resolution),
        )

    def card(self) -> str:
        """The model card, Markdown; a word on the exact denoiser where there is none."""
        if self.model is not None:
            folder = Path(self.model)
            of_run = (
                folder.parent / "config.yaml"
            ).is_file()  # any other folder above is somebody else's
            for path in (folder / "README.md", *([folder.parent / "README.md"] if of_run else [])):
                if path.is_file():
                    return path.read_text(encoding="utf-8")
        return f"# {self.name}\n\nThere is no model card."


def dataset_of_shared_model(folder: Path) -> str:
    """The embedded set that a shared model was trained on, by the settings that came with it; the default one if on none.

    A stranger's settings choose nothing else here, least of all a folder of this machine.
    """
    source = setting_in(folder / SHARED_CONFIG_FILE, "data", "source")
    return source if isinstance(source, str) and source in SETS else DataConfig().source
