"""A run's folder: checkpoints that are whole or absent, its log, its lock, and requests to stop."""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from pipeline.runs.checkpoints import CHECKPOINT_MANIFEST, describe_file, verify_checkpoint
from pipeline.runs.files import remove_if_possible, replace_text, sync_to_disk

MODEL_INDEX, ADAPTER_FILE = (
    "model_index.json",
    "pytorch_lora_weights.safetensors",
)  # diffusers' own names
SHARED_CONFIG_FILE = "training_config.yaml"  # a run's config.yaml, in what is shared of it
IMAGES_FOLDER = "images"  # the folder of a card's pictures
SPACE_PER_CHECKPOINT = (
    1.2  # of the last checkpoint's size, that must be free before the next is written
)


class RunError(RuntimeError):
    """Something about a run's folder that the user has to decide."""

    exit_code = 2


class SaveError(RunError):
    """A checkpoint that could not be saved; those before it are whole."""

    exit_code = 1


class Diverged(RunError):
    """A training whose numbers are no longer finite; its last checkpoint is whole."""

    exit_code = 1


class RunFolder:
    """One run's folder: `config.yaml metrics.jsonl samples/ checkpoints/ pipeline/ figures/ README.md`, lora/ for pipeline/."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.checkpoints, self.samples = self.folder / "checkpoints", self.folder / "samples"
        self.pipeline, self.figures = self.folder / "pipeline", self.folder / "figures"
        self.metrics, self.config = self.folder / "metrics.jsonl", self.folder / "config.yaml"
        self.card, self.adapter = self.folder / "README.md", self.folder / "lora"
        self.corrupt_steps: set[int] = set()  # the steps of checkpoints that were found damaged

    @property
    def finished(self) -> bool:
        """Has the training come to its end? The card is the last thing that it leaves."""
        return self.card.is_file() and self.has_model

    @property
    def has_model(self) -> bool:
        """Did it leave a pipeline, or an adapter, to draw with?"""
        return self.has_adapter or (self.pipeline / MODEL_INDEX).is_file()

    @property
    def has_adapter(self) -> bool:
        """Did it end in an adapter of another model, instead of a pipeline?"""
        return (self.adapter / ADAPTER_FILE).is_file()

    def create(self) -> None:
        """Make the folders; RunError where the place is taken by a file or cannot be written."""
        try:
            for folder in (self.checkpoints, self.samples, self.figures):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the run folder {self.folder}: {error.strerror}") from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; RunError while another one has it. The system frees it when a process dies.

        Whoever has it clears away what one that was killed had only half saved.
        """
        try:
            file = open(self.folder / ".lock", "a+")  # noqa: SIM115
        except OSError as error:
            raise RunError(
                f"cannot write in the run folder {self.folder}: {error.strerror}"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise RunError(
                    f"{self.folder} is in use by process {file.read().strip()}: "
                    "wait for it, or give this run another --name"
                ) from error
            except OSError as error:  # some network file systems have no locks
                warnings.warn(
                    f"{self.folder} cannot be locked ({error.strerror}): start no second run in it",
                    stacklevel=2,
                )
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            for stale in self.checkpoints.glob(".tmp-*"):
                remove_if_possible(stale)
            yield

    def save(self, step: int, write: Callable[[Path], None], keep: int, **facts) -> Path:
        """A checkpoint: `write(folder)` beside the target, hashes last, then a rename; older ones go only afterwards.

        SaveError where there is no room for it or it cannot be written: then nothing has changed.
        """
        target, new = self.checkpoints / str(step), self.checkpoints / f".tmp-{step}"
        shutil.rmtree(new, ignore_errors=True)
        self._check_room(step)
        try:
            self._fill(new, step, write, facts)
            if (
                target.exists()
            ):  # a torn one of the same step: a whole one would have been resumed from
                shutil.rmtree(target)
            new.rename(target)
            sync_to_disk(self.checkpoints)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(new, ignore_errors=True)
            raise SaveError(
                f"the checkpoint of step {step} could not be saved in {self.checkpoints} ({error}); those of steps "
                f"{self.steps() or 'none'} are whole: make room, then run the same command"
            ) from error
        self.corrupt_steps.discard(step)
        found = self.steps(step)  # a later one is torn, or of another plan
        kept = [n for n in found if n not in self.corrupt_steps][-keep:]
        for old in (n for n in found if n not in kept):
            remove_if_possible(self.checkpoints / str(old))
        return target

    def _check_room(self, step: int) -> None:
        """SaveError where the disk has no room for another checkpoint, of one step, of the last one's size."""
        steps = self.steps(step)
        last = (
            sum(
                p.stat().st_size
                for p in (self.checkpoints / str(steps[-1])).rglob("*")
                if p.is_file()
            )
            if steps
            else 0
        )
        free = shutil.disk_usage(self.checkpoints).free
        if free < SPACE_PER_CHECKPOINT * last:
            raise SaveError(
                f"{self.checkpoints} has {free:,} bytes free, expected {SPACE_PER_CHECKPOINT * last:,.0f} for a checkpoint: make "
                f"room, then run the same command, which goes on from step {steps[-1]}"
            )

    def _fill(self, new: Path, step: int, write: Callable[[Path], None], facts: dict) -> None:
        """Write a checkpoint's files, their manifest last, and have all of it on the disk."""
        new.mkdir()
        write(new)
        files = {str(p.relative_to(new)): p for p in sorted(new.rglob("*")) if p.is_file()}
        manifest = {
            "step": step,
            **facts,
            "files": {name: describe_file(path) for name, path in files.items()},
        }
        (new / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (
            *files.values(),
            new / CHECKPOINT_MANIFEST,
            *(p for p in new.rglob("*") if p.is_dir()),
            new,
        ):
            sync_to_disk(path)

    def steps(self, last: float = math.inf) -> list[int]:
        """The steps of all checkpoints, up to `last`, oldest first; other names in the folder are nobody's business."""
        if not self.checkpoints.is_dir():
            return []
        found = (
            int(p.name)
            for p in self.checkpoints.iterdir()
            if p.is_dir() and re.fullmatch("[1-9][0-9]*", p.name)
        )
        return sorted(step for step in found if step <= last)

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies, None where there is none; RunError if all that exist are damaged."""
        steps = self.steps()
        for step in reversed(steps):
            folder = self.checkpoints / str(step)
            if not (damage := verify_checkpoint(folder)):
                return folder
            self.corrupt_steps.add(step)
            warnings.warn(f"checkpoint {folder} is skipped: {damage}", stacklevel=2)
        if steps:
            raise RunError(
                f"every checkpoint in {self.checkpoints} is damaged ({len(steps)} of {len(steps)}): "
                "nothing was deleted; move the folder away to start anew"
            )
        return None

    def log(self, **record) -> None:
        """One line of metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict]:
        """The lines of metrics.jsonl; a last one cut short by a kill is left out."""
        if not self.metrics.exists():
            return []
        *whole, _cut = self.metrics.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole if line]

    def sample_files(self) -> list[tuple[int, Path]]:
        """The steps that samples were drawn at, each with its picture, the newest last; other files in the folder are none."""
        return sorted(
            (int(path.stem), path) for path in self.samples.glob("*.png") if path.stem.isdecimal()
        )

    def rewind(self, step: int) -> None:
        """Forget what was logged and drawn after `step`: those steps are about to be repeated."""
        kept = [json.dumps(record) for record in self.history() if record["step"] <= step]
        replace_text(self.metrics, "".join(line + "\n" for line in kept))
        for drawn, path in self.sample_files():
            if drawn > step:
                path.unlink()
