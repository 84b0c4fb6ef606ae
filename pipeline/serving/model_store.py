"""Load the models and checkpoints that the demo offers."""

import logging
import re
import threading
from pathlib import Path

from safetensors import SafetensorError

from pipeline.config import DataConfig, DiffusionConfig, load_file, setting_in
from pipeline.data.emoji.catalogue import SETS
from pipeline.data.emoji.embedded import attribution_of
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.hardware import pick_device
from pipeline.hub.model_card import inline_code
from pipeline.models.build import build_scheduler
from pipeline.models.loading import load_checkpoint, load_pipeline
from pipeline.models.trusted import download_model, parse_repo_id
from pipeline.runs.folder import MODEL_INDEX, SHARED_CONFIG_FILE, RunFolder
from pipeline.serving.requests import MAX_SEED, parse_integer
from pipeline.serving.session import InferenceSession

FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
CARD_IMAGE = re.compile(
    r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])?|<img\b[^>]*>|<Gallery />", re.IGNORECASE
)
log = logging.getLogger(__name__)


class ModelStore:
    """The models of a demo: one model, the checkpoints of a running training, or none.

    model: the folder of a run or of a saved pipeline, or `user/name[@revision]` on the Hub; None
    leaves the exact denoiser. device: None is the fastest.
    """

    def __init__(self, model: str | Path | None, device: str | None = None):
        self.device = pick_device(device, double=True)
        self.name = "the exact denoiser"
        self.model: Path | None = None
        self.run: RunFolder | None = None
        self.follows = False  # whether the model is the newest checkpoint of a running training
        self._loading = threading.Lock()
        self._loaded: tuple[int | None, InferenceSession] | None = None
        if model is None:
            return
        self.name = Path(str(model).partition("@")[0]).name
        if not Path(model).exists() and parse_repo_id(str(model)):
            model = download_model(str(model))
        self.model = Path(model)
        has_config = (self.model / "config.yaml").is_file()
        if has_config and not (self.model / MODEL_INDEX).is_file():
            self.run = RunFolder(self.model)
            # A run that is trained further has both a model and newer checkpoints.
            is_training = not self.run.finished
            self.follows = is_training and bool(self.run.steps() or not self.run.has_model)
        if self.follows and not self.steps():
            raise ValueError(f"{model} has no checkpoint yet. Wait until its training saves one.")

    def steps(self) -> list[int]:
        """Return the checkpoints of a running training, oldest first."""
        return self.run.steps() if self.run is not None and self.follows else []

    def step_range(self) -> tuple[int, int, int]:
        """Return a slider's two ends, which Gradio wants to differ, and the newest checkpoint."""
        steps = self.steps()
        first = min(steps, default=0)
        last = max([*steps, 1])
        return (first if first < last else 0), last, max(steps, default=0)

    def describe(self) -> str:
        """Return a sentence about the model in use."""
        if self.session().trained is None:
            return (
                "**There is no trained model yet**, so the exact denoiser of the embedded emoji "
                "answers. It only knows their captions. `make train` trains a model in minutes."
            )
        return f"Model: `{inline_code(self.name)}`."

    def session(self, step: int | None = None) -> InferenceSession:
        """Return the model's session, or that of the checkpoint nearest to a step, else the newest.

        A corrupt newest checkpoint is replaced by the previous one, as in training. InputError if
        no checkpoint can be read.
        """
        if not self.follows:
            return self._cached_session(None)
        wanted = MAX_SEED
        if step is not None:
            wanted = parse_integer("checkpoint", step, 0, MAX_SEED)
        corrupt = None
        reason = f"{self.name} has no checkpoint any more"
        for _ in range(2):  # training may delete a checkpoint while it is read
            steps = [s for s in self.steps() if s != corrupt]
            if not steps:
                break
            nearest = min(steps, key=lambda s: abs(s - wanted))
            try:
                return self._cached_session(nearest)
            except (OSError, ValueError, SafetensorError) as error:
                log.warning("step %d of %s: %s", nearest, self.name, error)
                corrupt = nearest if nearest == steps[-1] else None
                reason = str(error).replace(str(self.model), self.name)
        raise InputError(f"{reason.rstrip('.')}. Choose another one or wait for the next.")

    def _cached_session(self, step: int | None) -> InferenceSession:
        """Return the session of a checkpoint, or (None) of the one model."""
        with self._loading:
            if self._loaded is None or self._loaded[0] != step:
                self._loaded = None  # first, because memory may only hold one network
                self._loaded = (step, self._load(step))
            return self._loaded[1]

    def _load(self, step: int | None) -> InferenceSession:
        if self.model is None:
            return InferenceSession(None, self.name, DataConfig())
        if self.run is not None and step is not None:
            pipe = load_checkpoint(self.run, step).to(self.device)
            data = load_file(self.run.config).data
            return InferenceSession(pipe, f"{self.name} at step {step}", data)
        pipe = load_pipeline(self.model).to(self.device)
        if not isinstance(pipe.scheduler, DDPMScheduler):
            # The demo shows equations that stock schedulers do not have.
            pipe.register_modules(scheduler=build_scheduler(DiffusionConfig(), pipe.scheduler))
        pipe.set_progress_bar_config(disable=True)
        return InferenceSession(pipe, self.name, self._dataset_of(pipe, self.model))

    def _dataset_of(self, pipe: TextToImagePipeline, model: Path) -> DataConfig:
        """Return the model's own dataset if it is here, else an embedded one of its resolution."""
        folders = [model] if self.run else [model, model.parent]
        for config in (folder / "config.yaml" for folder in folders):
            if config.is_file():
                data = load_file(config).data
                if data.source in SETS or Path(data.source).is_dir():
                    return data
        size = pipe.unet.config.sample_size
        height = size if isinstance(size, int) else size[0]
        source = dataset_of_shared_model(model)
        return DataConfig(source=source, resolution=height * pipe.vae_scale_factor)

    def card(self) -> str:
        """Return the model card without front matter and images, and the data's attribution."""
        text = f"# {self.name}\n\nThere is no model card."
        if self.model is not None:
            # Without a config.yaml the folder above belongs to something else.
            of_run = (self.model.parent / "config.yaml").is_file()
            folders = [self.model, self.model.parent] if of_run else [self.model]
            cards = [folder / "README.md" for folder in folders]
            found = next((path for path in cards if path.is_file()), None)
            if found is not None:
                text = found.read_text(encoding="utf-8")
        # Images could be loaded from other servers.
        text = CARD_IMAGE.sub("", FRONT_MATTER.sub("", text))
        # The walk may show them, whatever the model was trained on.
        attribution = attribution_of(DataConfig().source)
        return f"{text}\n\n---\nDirect Jump is Apache-2.0. {attribution}"


def dataset_of_shared_model(folder: Path) -> str:
    """Return the embedded dataset that a shared model's settings name, or the default one.

    Settings from other users choose nothing else, in particular no folder of this machine.
    """
    source = setting_in(folder / SHARED_CONFIG_FILE, "data", "source")
    return source if isinstance(source, str) and source in SETS else DataConfig().source
