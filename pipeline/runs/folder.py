"""A run's folder: its log, its lock, and checkpoints that are complete or absent."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
from safetensors import SafetensorError

from pipeline.runs.checkpoints import verify_checkpoint, write_manifest
from pipeline.runs.files import remove_if_possible, replace_text, sync_to_disk

# diffusers' own names.
MODEL_INDEX = "model_index.json"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
# A run's config.yaml under its name in a shared repository.
SHARED_CONFIG_FILE = "training_config.yaml"
# The folder of a model card's images.
IMAGES_FOLDER = "images"
# Free disk space required for a checkpoint, relative to the size of the last one.
SPACE_PER_CHECKPOINT = 1.2


class RunError(RuntimeError):
    """A problem with a run's folder that the user has to resolve."""

    exit_code = 2


class SaveError(RunError):
    """A checkpoint that could not be saved; the earlier ones are complete."""

    exit_code = 1


class Diverged(RunError):
    """A training with non-finite gradients; its last checkpoint is complete."""

    exit_code = 1


class RunFolder:
    """The files of one run, `runs/NAME`.

    config.yaml, metrics.jsonl, samples/, checkpoints/, figures/, README.md (the model card), and
    pipeline/, lora/ (an adapter) or autoencoder/.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.metrics = self.folder / "metrics.jsonl"
        self.card = self.folder / "README.md"
        self.samples = self.folder / "samples"
        self.checkpoints = self.folder / "checkpoints"
        self.figures = self.folder / "figures"
        self.pipeline = self.folder / "pipeline"
        self.adapter = self.folder / "lora"
        self.autoencoder = self.folder / "autoencoder"
        self.corrupt_steps: set[int] = set()

    @property
    def finished(self) -> bool:
        """Whether training has ended: the card is the last file it writes."""
        return self.card.is_file() and self.has_result

    @property
    def has_model(self) -> bool:
        """Whether there is a pipeline or an adapter to sample from."""
        return self.has_adapter or (self.pipeline / MODEL_INDEX).is_file()

    @property
    def has_result(self) -> bool:
        """Whether training has left a model to sample from, or an autoencoder."""
        return self.has_model or (self.autoencoder / "config.json").is_file()

    @property
    def has_adapter(self) -> bool:
        """Whether training ended in an adapter instead of a pipeline."""
        return (self.adapter / ADAPTER_FILE).is_file()

    def create(self) -> None:
        """Create the folders; RunError if a file is in the way or they cannot be written."""
        try:
            for folder in (self.checkpoints, self.samples, self.figures):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot create the run folder {self.folder}: {error.strerror}"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; RunError while another process holds it.

        The system releases the lock when a process dies; the next holder deletes checkpoints that
        such a process left incomplete.
        """
        owner = self.folder / ".pid"
        lock = filelock.FileLock(self.folder / ".lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            pid = owner.read_text() if owner.is_file() else "of another machine"
            raise RunError(
                f"{self.folder} is in use by process {pid}. Wait for it, or pass another --name."
            ) from error
        except OSError as error:
            if error.errno != errno.ENOLCK:
                message = f"cannot write to the run folder {self.folder}: {error.strerror}"
                raise RunError(message) from error
            warnings.warn(
                f"the file system of {self.folder} has no locks. Start no second run there.",
                stacklevel=2,
            )
        try:
            owner.write_text(str(os.getpid()))
            for stale in self.checkpoints.glob(".tmp-*"):
                remove_if_possible(stale)
            yield
        finally:
            lock.release()

    def save(self, step: int, write: Callable[[Path], None], keep: int, **facts: object) -> Path:
        """Save a checkpoint and return its folder; afterwards delete all but the last `keep`.

        `write(folder)` fills a temporary folder, which gets its name once all files and their
        hashes are on disk. facts: more values for its manifest. SaveError if it cannot be written;
        nothing has changed then.
        """
        target = self.checkpoints / str(step)
        new = self.checkpoints / f".tmp-{step}"
        shutil.rmtree(new, ignore_errors=True)
        self._check_disk_space(step)
        try:
            new.mkdir()
            write(new)
            write_manifest(new, {"step": step, **facts})
            # A checkpoint of the same step is corrupt: a complete one would have been resumed.
            if target.exists():
                shutil.rmtree(target)
            new.rename(target)
            sync_to_disk(self.checkpoints)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(new, ignore_errors=True)
            raise SaveError(
                f"cannot save the checkpoint of step {step} in {self.checkpoints}: {error}. The "
                f"checkpoints of steps {self.steps() or 'none'} are complete. Check disk space and "
                "permissions, then run the same command again."
            ) from error
        self.corrupt_steps.discard(step)
        # Later steps are corrupt or belong to another plan.
        found = self.steps(step)
        retained = [saved for saved in found if saved not in self.corrupt_steps][-keep:]
        for old in set(found) - set(retained):
            remove_if_possible(self.checkpoints / str(old))
        return target

    def _check_disk_space(self, step: int) -> None:
        steps = self.steps(step)
        if not steps:
            return
        files = (self.checkpoints / str(steps[-1])).rglob("*")
        needed = SPACE_PER_CHECKPOINT * sum(p.stat().st_size for p in files if p.is_file())
        free = shutil.disk_usage(self.checkpoints).free
        if free < needed:
            raise SaveError(
                f"a checkpoint needs {needed:,.0f} bytes in {self.checkpoints}, got {free:,} free. "
                f"Free disk space, then run the same command to resume from step {steps[-1]}."
            )

    def steps(self, last: float = math.inf) -> list[int]:
        """Return the steps of all checkpoints up to `last`, in order; other entries are ignored."""
        if not self.checkpoints.is_dir():
            return []
        folders = [path for path in self.checkpoints.iterdir() if path.is_dir()]
        steps = [int(path.name) for path in folders if re.fullmatch("[1-9][0-9]*", path.name)]
        return sorted(step for step in steps if step <= last)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, None without any; RunError if all are corrupt."""
        steps = self.steps()
        for step in reversed(steps):
            folder = self.checkpoints / str(step)
            damage = verify_checkpoint(folder)
            if not damage:
                return folder
            self.corrupt_steps.add(step)
            warnings.warn(f"skipping checkpoint {folder}: {damage}", stacklevel=2)
        if steps:
            raise RunError(
                f"all {len(steps)} checkpoints in {self.checkpoints} are corrupt. Nothing was "
                "deleted. Move the folder away to start again."
            )
        return None

    def log(self, **record: object) -> None:
        """Append a line to metrics.jsonl; a number that is not finite becomes null."""
        line = json.dumps(_read_line(json.dumps(record)))
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def history(self) -> list[dict]:
        """Return the lines of metrics.jsonl, without a last one that was cut short."""
        if not self.metrics.exists():
            return []
        *lines, _incomplete = self.metrics.read_text(encoding="utf-8").split("\n")
        return [_read_line(line) for line in lines if line]

    def sample_files(self) -> list[tuple[int, Path]]:
        """Return (step, image grid) of all samples, the newest last; other files are ignored."""
        images = self.samples.glob("*.png")
        return sorted((int(path.stem), path) for path in images if path.stem.isdecimal())

    def rewind(self, step: int) -> None:
        """Delete what was logged and sampled after `step`, since those steps are repeated."""
        lines = [json.dumps(record) for record in self.history() if record["step"] <= step]
        replace_text(self.metrics, "".join(line + "\n" for line in lines))
        for sampled, path in self.sample_files():
            if sampled > step:
                path.unlink()


def _read_line(line: str) -> dict:
    """Return a JSON object, with None for NaN and infinities, which are not JSON."""
    return json.loads(line, parse_constant=lambda _: None)
