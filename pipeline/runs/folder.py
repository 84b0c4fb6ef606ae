"""A run's folder: checkpoints that are whole or absent, its log, its lock, and requests to stop."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

INDEX, ADAPTER = "model_index.json", "pytorch_lora_weights.safetensors"  # diffusers' own names
SHARED_CONFIG = "training_config.yaml"  # a run's config.yaml, in what is shared of it
IMAGES = "images"  # the folder of a card's pictures
MANIFEST = "manifest.json"
ROOM = 1.2  # of the last checkpoint's size, that must be free before the next is written


class RunError(RuntimeError):
    """Something about a run's folder that the user has to decide."""

    exit_code = 2


class SaveError(RunError):
    """A checkpoint that could not be saved; those before it are whole."""

    exit_code = 1


class Diverged(RunError):
    """A training whose numbers are no longer finite; its last checkpoint is whole."""

    exit_code = 1


class Stopped(KeyboardInterrupt):
    """A request to stop that came where there is nothing to save yet."""


class Run:
    """One run's folder: `config.yaml metrics.jsonl samples/ checkpoints/ pipeline/ figures/ README.md`, lora/ for pipeline/."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.checkpoints, self.samples = self.folder / "checkpoints", self.folder / "samples"
        self.pipeline, self.figures = self.folder / "pipeline", self.folder / "figures"
        self.metrics, self.config = self.folder / "metrics.jsonl", self.folder / "config.yaml"
        self.card, self.adapter = self.folder / "README.md", self.folder / "lora"
        self.torn: set[int] = set()  # the steps of checkpoints that were found damaged

    @property
    def finished(self) -> bool:
        """Has the training come to its end? The card is the last thing that it leaves."""
        return self.card.is_file() and self.drawable

    @property
    def drawable(self) -> bool:
        """Did it leave a pipeline, or an adapter, to draw with?"""
        return self.adapted or (self.pipeline / INDEX).is_file()

    @property
    def adapted(self) -> bool:
        """Did it end in an adapter of another model, instead of a pipeline?"""
        return (self.adapter / ADAPTER).is_file()

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
                remove(stale)
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
            sync(self.checkpoints)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(new, ignore_errors=True)
            raise SaveError(
                f"the checkpoint of step {step} could not be saved in {self.checkpoints} ({error}); those of steps "
                f"{self.steps() or 'none'} are whole: make room, then run the same command"
            ) from error
        self.torn.discard(step)
        found = self.steps(step)  # a later one is torn, or of another plan
        kept = [n for n in found if n not in self.torn][-keep:]
        for old in (n for n in found if n not in kept):
            remove(self.checkpoints / str(old))
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
        if free < ROOM * last:
            raise SaveError(
                f"{self.checkpoints} has {free:,} bytes free, expected {ROOM * last:,.0f} for a checkpoint: make "
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
            "files": {name: describe(path) for name, path in files.items()},
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (
            *files.values(),
            new / MANIFEST,
            *(p for p in new.rglob("*") if p.is_dir()),
            new,
        ):
            sync(path)

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
            if not (damage := verify(folder)):
                return folder
            self.torn.add(step)
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

    def drawn(self) -> list[tuple[int, Path]]:
        """The steps that samples were drawn at, each with its picture, the newest last; other files in the folder are none."""
        return sorted(
            (int(path.stem), path) for path in self.samples.glob("*.png") if path.stem.isdecimal()
        )

    def rewind(self, step: int) -> None:
        """Forget what was logged and drawn after `step`: those steps are about to be repeated."""
        kept = [json.dumps(record) for record in self.history() if record["step"] <= step]
        replace(self.metrics, "".join(line + "\n" for line in kept))
        for drawn, path in self.drawn():
            if drawn > step:
                path.unlink()


def describe(path: Path) -> dict:
    """A file's size in bytes and sha256, as the manifest keeps them."""
    with open(path, "rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def manifest(folder: Path) -> dict:
    """What a checkpoint's manifest says: its step, the facts given to `save`, and its files."""
    return json.loads((folder / MANIFEST).read_text())


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint, "" where every file is as its manifest says."""
    try:
        files = manifest(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if describe(path) != wanted:
            return f"{name} is not what was written"
    return ""


def sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete what is no longer needed, a folder or a file; what cannot be deleted is told, and in nobody's way."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} is no longer needed and cannot be deleted: {error}", stacklevel=2)


def replace(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    new = path.with_name(f".{path.name}.tmp")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """A result's folder, by `write(folder)` beside it: the one before stays until the new one is whole."""
    new, old = (target.with_name(f".{kind}-{target.name}") for kind in ("new", "old"))
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    write(new)
    for path in (*new.rglob("*"), new):
        sync(path)
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def save_state(folder: Path, name: str, tree: dict) -> None:
    """A tree of dicts, lists, tensors and plain values as `name.safetensors` and `name.json`; nothing is pickled."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(node, path):
        if isinstance(node, torch.Tensor):
            tensors[path] = node.detach().to("cpu", copy=True).contiguous()
            return {"tensor": path}
        if isinstance(node, dict):
            return {"dict": [[key, strip(value, f"{path}.{key}")] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {"list": [strip(value, f"{path}.{i}") for i, value in enumerate(node)]}
        return {"value": node}

    description = strip(tree, name)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(description))


def load_state(folder: Path, name: str) -> dict:
    """What `save_state` wrote; tuples come back as lists."""
    tensors = load_file(folder / f"{name}.safetensors")

    def fill(node):
        ((kind, value),) = node.items()
        if kind == "dict":
            return {key: fill(item) for key, item in value}
        return (
            [fill(item) for item in value]
            if kind == "list"
            else tensors[value]
            if kind == "tensor"
            else value
        )

    return fill(json.loads((folder / f"{name}.json").read_text()))


class StopRequest:
    """Has anybody asked this process to stop? SIGTERM, SIGINT, SIGUSR1, SIGHUP, or a launcher's death; a second SIGINT kills.

    A closed terminal's SIGHUP is none where nohup has it ignored; what is said to it afterwards is dropped, and is no error.

    `bool(stop)` is the poll, `stop.exit_code` 143, 130 or 0; use it as a context manager, which puts the handlers back.
    While `at_once(where)` is open a request raises Stopped instead of waiting for the poll.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    ORPHAN = "the launcher is gone"
    LAUNCHERS = (
        "ACCELERATE_",
        "TORCHELASTIC_",
    )  # what accelerate launch and torchrun set; a shell may go, and the run goes on

    def __init__(self):
        self.reason, self.exit_code, self.parent, self.where, self.over = (
            "",
            0,
            os.getppid(),
            "",
            threading.Event(),
        )
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __enter__(self):
        heard = (
            n for n in self.SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN
        )
        self.before = {number: signal.signal(number, self.handle) for number in heard}
        if any(name.startswith(self.LAUNCHERS) for name in os.environ):
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """Raise Stopped at a request, also at one that has come already: for work that leaves nothing to save.

        where: the words for when that is, such as "before the first step".
        """
        self.where = where
        try:
            self._raise()
            yield
        finally:
            self.where = ""

    def handle(self, number, _frame):
        if self.reason and number == signal.SIGINT:
            os._exit(130)
        for fd in (
            fd for fd in self.terminals if not os.isatty(fd)
        ):  # closed: writing to it is an error
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), fd)
        self.reason = self.reason or signal.Signals(number).name
        self.exit_code = self.exit_code or (130 if number == signal.SIGINT else 143)
        self._raise()

    def _raise(self) -> None:
        if self.where and self.reason:
            raise Stopped(f"Stopped ({self.reason}) {self.where}")

    def _watch(self) -> None:
        """Ask for a stop when the launcher is gone: the system tells its children nothing."""
        while not self.over.wait(0.5):
            if os.getppid() != self.parent:
                self.exit_code, self.reason = self.exit_code or 143, self.reason or self.ORPHAN
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def __bool__(self):
        return bool(self.reason)
