"""How a model is found, loaded and shared: `python -m pipeline.hub push RUN USER/NAME`, `pull`, `ship`, `space`.

What is pushed is the layout of `pipeline.layout`, always with its text encoder, in one commit; what is loaded goes through
`pipeline.safe`. Tokens come from HF_TOKEN or `hf auth login`, and are never printed.
"""

import argparse
import contextlib
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import CommitOperationAdd, HfApi, RepoCard, SpaceCardData
from huggingface_hub.errors import (  # HTTPError: of its own HTTP client
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file as load_tensors

from pipeline.config import Config, load_file, repository_problems
from pipeline.data.sources.rows import one_line
from pipeline.diffusion.hub_format import FILE, changes, plain_card
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.hub import model_card
from pipeline.models import build, loading, trusted
from pipeline.runs.folder import (
    ADAPTER,
    IMAGES,
    INDEX,
    SHARED_CONFIG,
    Run,
    describe,
    load_state,
    verify,
)

ROOT = Path(__file__).parent.parent
PINNED = "model.txt"  # a Space's model, USER/NAME@COMMIT
SHARD = "9MB"  # of weights in one file, where `ship` makes it
WAITS = (1, 4, 16)  # seconds before a push is tried again
SPACE = ("app.py", "requirements.txt", "LICENSE", "NOTICE", "pipeline/*.py")


class HubError(ValueError):
    """A push or a check before it that failed: what happened, and how to go on."""


def newest(
    root: str | Path = "runs",
    shipped: str | Path = "pretrained/emoji",
    pinned: str | Path = PINNED,
    finished: bool = False,
) -> Path | str | None:
    """What draws where nobody names a model: the one that a Space is pinned to, the run that was last written to and can be
    drawn with, the shipped model, else None. finished: whether a run has to be, or may have checkpoints alone.
    """
    if Path(pinned).is_file():
        return Path(pinned).read_text(encoding="utf-8").strip()
    found = [
        run
        for run in map(Run, Path(root).glob("*"))
        if (run.finished if finished else run.drawable or run.steps())
    ]
    if found:
        return max(
            found, key=lambda run: run.metrics.stat().st_mtime if run.metrics.exists() else 0
        ).folder
    return Path(shipped) if (Path(shipped) / INDEX).is_file() else None


def load(model: str | Path) -> TextToImagePipeline:
    """The pipeline of a finished run's folder, of a saved pipeline's or of the Hub's `user/name[@revision]`.

    It comes from safetensors alone and with no code of its own. One that was saved without its text encoder gets the one that
    the config.yaml beside it names. ValueError says what is wrong.
    """
    return loading.load(str(model))


def load_checkpoint(run: Run, step: int) -> TextToImagePipeline:
    """The pipeline of a run's checkpoint, with the averaged weights; ValueError where the checkpoint is damaged."""
    folder, config = run.checkpoints / str(step), load_file(run.config)
    if damage := verify(folder):
        raise ValueError(f"checkpoint {folder} cannot be used: {damage}")
    base = None if config.model.pretrained is None else load(config.model.pretrained)
    tokenizer, encoder = (
        (base.tokenizer, base.text_encoder)
        if base
        else build.text_encoder(config.model.text_encoder)
    )
    if config.train.method == "lora":
        unet, whitening = build.adapt(base.unet, config.lora), base.whitening
    else:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
        whitening = build.saved_whitening(folder)
    average = build.moving_average(unet, config.train.ema)
    average.load_state_dict(load_state(folder, "trainer")["ema"])
    average.copy_to(build.trainable(unet))
    return build.pipeline(config, unet.eval(), tokenizer, encoder, whitening, base)


# ---- push


def check(config: Config) -> None:
    """Try all that the push at a run's end will need, before any time is spent: the account, the repository, the card.

    It makes the repository where there is none. HubError says what is missing; without `hub.repo_id` there is nothing to try.
    """
    if config.hub.repo_id is None:
        return
    api, dry = HfApi(token=config.hub.token), model_card.build(config, model_card.facts("", 0.0))
    if config.train.method == "lora":
        shareable(config.model.pretrained)
    with told("hub.repo_id", config.hub.repo_id):
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(
                "the token of this machine may only read, expected one that may write: make one at "
                "https://huggingface.co/settings/tokens and `hf auth login`"
            )
        repo = api.create_repo(
            config.hub.repo_id, private=config.hub.private, exist_ok=True
        ).repo_id
        if config.train.method == "lora":
            of_its_own(api, repo)
        api.preupload_lfs_files(
            repo, [CommitOperationAdd("README.md", str(dry).encode())]
        )  # asks, and sends nothing
        dry.validate()


def publish(config: Config, run: Run) -> int:
    """Push a finished run where its settings say, and tell its address; the exit code, 1 where the push failed."""
    if config.hub.repo_id is None:
        return 0
    try:
        print(
            f"Pushed to {push(run.folder, config.hub.repo_id, private=config.hub.private, token=config.hub.token)}"
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def push(
    source: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    base: str | None = None,
) -> str:
    """Upload the model of a run or of a saved pipeline in one commit, and return its address; none where nothing has changed.

    base: of an adapter, the Hub's name of the model that it was trained from, where its settings name a folder.
    ValueError says what is wrong with the source, and then nothing is sent; HubError what went wrong with the Hub and which
    command tries again: the source is as complete as it was.
    """
    if problems := repository_problems("the repository", repo_id):
        raise HubError("; ".join(problems))
    options = f"{' --private' if private else ''}{f' --base {base}' if base else ''}"
    again = f"`python -m pipeline.hub push {shlex.quote(str(source))} {repo_id}{options}`"
    with on_disk(f"gathering {source}"), tempfile.TemporaryDirectory() as scratch:
        folder, api = Path(scratch), HfApi(token=token)
        front = assemble(source, folder, base, token)
        front(repo_id)  # a card that cannot be made is told before the Hub hears of it
        with told("the push", repo_id, f"; {source} is complete, push it again with {again}"):
            repo = patiently(
                lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            )
            if (folder / ADAPTER).is_file():
                patiently(lambda: of_its_own(api, repo))
            (folder / "README.md").write_text(front(repo), encoding="utf-8")
            return commit(api, folder, repo, "model", f"Upload {Path(source).resolve().name}")


def commit(api: HfApi, folder: Path, repo: str, kind: str, message: str) -> str:
    """Upload a folder's files in one commit (`changes`) and return the repository's address; files as they are there make none.

    huggingface_hub's own `upload_folder` may make several commits of a folder.
    """
    patiently(
        lambda: api.create_commit(
            repo, changes(api, repo, folder, kind), commit_message=message, repo_type=kind
        )
    )
    return f"{api.endpoint}/{'spaces/' if kind == 'space' else ''}{repo}"


def busy(answer: int) -> bool:
    """Whether the Hub, which gave this answer, may give another one later."""
    return answer in (408, 412, 429) or answer >= 500


def patiently(request: Callable):
    """What a request to the Hub returns, made again where no answer came, the Hub is busy or somebody has just committed.

    A commit whose answer was lost is not made twice: every try asks anew what is there already. Where a file does not get
    through the client raises RuntimeError, which comes as the answer that it had, or as ConnectionError.
    """
    for wait in (*WAITS, None):
        try:
            return request()
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
            cause = (
                error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            )
            answer = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            if wait is None or not (answer is None or busy(answer)):
                raise (
                    cause if isinstance(cause, HTTPError) else ConnectionError(one_line(cause))
                ) from error
            time.sleep(wait)


def of_its_own(api: HfApi, repo: str) -> None:
    """HubError where the repository for an adapter holds a pipeline, which whoever loads it would still get."""
    if api.file_exists(repo, INDEX):
        raise HubError(
            f"{repo} holds a pipeline ({INDEX}), expected a repository of its own for an adapter: choose another"
        )


def settled(run: Run) -> None:
    """HubError where a run is trained on after its first end: its model and its settings are of different steps."""
    if run.config.is_file() and run.drawable and not run.finished:
        raise HubError(
            f"{run.folder} is being trained on, expected a finished run: let the training command come to its end"
        )


def shareable(base: str, of_hub: list[str] | None = None) -> None:
    """HubError where nobody else could load an adapter's base, a folder of this machine; of_hub: what was the Hub's."""
    name = base.partition("@")[0]
    if not (model_card.published(name) if of_hub is None else name in of_hub):
        raise HubError(
            f"the adapter is one of {base}, expected one of a model of the Hub, which whoever gets it has: push that "
            "model, then the adapter by `python -m pipeline.hub push` with --base USER/NAME"
        )


def fitting(run: Run, base: str, token: str | None = None) -> None:
    """HubError where an adapter does not fit a model of the Hub; one whose weights are not those it was trained on is told."""
    trained_on = load_file(run.config).model.pretrained
    settings, there = trusted.network_of(base, token)
    with torch.device("meta"):
        layers = dict(UNet2DConditionModel.from_config(settings).named_modules())
    tensors = load_tensors(run.adapter / ADAPTER)
    for name in (name for name in tensors if ".lora_B." in name):
        layer = name.removeprefix("unet.").partition(".lora_")[0]
        wanted = (len(tensors[name]), *tensors[name.replace(".lora_B.", ".lora_A.")].shape[1:])
        found = tuple(layers[layer].weight.shape) if layer in layers else "missing"
        if found != wanted:
            raise HubError(
                f"the adapter does not fit {base}, whose {layer} is {found}, expected {wanted}: name the model that "
                f"it was trained on, {trained_on}, or a push of it"
            )
    here = {}
    if Path(trained_on).is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            assemble_pipeline(loading.folder(trained_on), Path(scratch))
            here = {
                path.name: describe(path)["sha256"]
                for path in Path(scratch).glob("unet/*.safetensors")
            }
    if base != trained_on and here != there:
        what = "has other weights than" if here else "cannot be compared with"
        print(
            f"warning: {base} {what} {trained_on}, which the adapter was trained on, and may draw otherwise",
            file=sys.stderr,
        )


def assemble(
    source: str | Path, target: Path, base: str | None = None, token: str | None = None
) -> Callable[[str], str]:
    """What a repository holds, made in an empty folder: a pipeline with its code and text encoder, or an adapter.

    Files that are complete as they lie are linked, so that no weights are copied. base: as for `push`. What is returned is its
    card, by the repository's name. ValueError where a stranger could not draw with it.
    """
    run = Run(source)
    for place in (Path(source), Path(source).parent):  # a run's pipeline/ may be named too
        settled(Run(place))
    if base is not None and not run.adapted:
        raise HubError(f"{source} is no run of an adapter, got --base {base}: leave it out")
    if run.adapted:
        folder, stock = run.adapter, False
        if base is None:
            known = (
                trusted.read(run.folder / model_card.FACTS)
                if (run.folder / model_card.FACTS).is_file()
                else {}
            )
            shareable(load_file(run.config).model.pretrained, known.get("of_hub"))
        else:
            shareable(base)
            fitting(run, base, token)
        for path in folder.glob("*.safetensors"):
            (target / path.name).symlink_to(path.resolve())
    else:
        folder = loading.folder(str(source))
        if not (folder / INDEX).is_file():
            raise HubError(
                f"{source} is an adapter without its run, expected a run's folder or a saved pipeline's: pass that"
            )
        stock = assemble_pipeline(folder, target, with_code=Path(source).is_dir())
    notes = next(
        (place for place in (folder, folder.parent) if (place / "config.yaml").is_file()), folder
    )
    for path in (folder / SHARED_CONFIG, notes / "config.yaml", notes / "metrics.json"):
        if path.is_file():
            shutil.copyfile(path, target / {"config.yaml": SHARED_CONFIG}.get(path.name, path.name))
    if base is not None:
        (target / SHARED_CONFIG).write_text(
            model_card.on_base(load_file(run.config), base).to_yaml(), encoding="utf-8"
        )
    for path in (notes / IMAGES).glob("*.png"):
        (target / IMAGES).mkdir(exist_ok=True)
        shutil.copyfile(path, target / IMAGES / path.name)
    if (notes / model_card.FACTS).is_file() and (notes / "config.yaml").is_file():
        return lambda repo: str(model_card.read(notes, repo, base))
    if (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(encoding="utf-8")
        return lambda repo: text
    w = trusted.own(trusted.read(target / INDEX)).get("w", 0.0)
    return lambda repo: str(plain_card(repo, stock, w))


def assemble_pipeline(folder: Path, target: Path, with_code: bool = True) -> bool:
    """A saved pipeline as a stranger can load it, in an empty folder; whether its index is Stable Diffusion's.

    with_code: whether the code that lies in the folder may go along; the cache of the Hub's models may hold anybody's.
    """
    raw, code = trusted.read(folder / INDEX), folder / f"{FILE}.py"
    trusted.refuse_pickles(folder, trusted.own(raw))
    parts = [
        part
        for part, value in trusted.own(raw).items()
        if part in trusted.PARTS and value[0] is not None
    ]
    if {"text_encoder", "tokenizer"} <= set(parts) and with_code and code.is_file():
        files = [
            folder / INDEX,
            code,
            *(folder / f"{name}.py" for name in get_relative_imports(code)),
        ]
        files += [
            path
            for part in parts
            for kind in (*trusted.FILES, f"{raw[part][0]}.py")
            for path in (folder / part).glob(kind)
        ]
        for path in files:
            place = target / path.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(path.resolve())
    else:
        pipe = loading.load_folder(folder)
        if pipe.text_encoder is None:
            raise HubError(
                f"{folder} has no text encoder, expected one in what is shared: put the config.yaml beside it that "
                "names it"
            )
        pipe.save_pretrained(target)
    return trusted.of_stable_diffusion(target)


# ---- ship, pull, space


def ship(source: str | Path, folder: Path) -> Path:
    """A run's model for a git repository: bf16 weights in shards, no code, the text encoder left to the config.yaml beside it.

    `load` supplies that encoder, from its pip package by its hash or from the Hub; `push` adds it, and the code.
    """
    vacant(folder)
    run = Run(source)
    if not (run.config.is_file() and (run.pipeline / INDEX).is_file()):
        raise HubError(
            f"{source} is no finished run, expected {run.pipeline / INDEX} and {run.config}: train first"
        )
    settled(run)
    pipe = load(source)
    pipe.unet.to(torch.bfloat16)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    with whole(folder) as new:
        pipe.save_pretrained(new, safe_serialization=True, max_shard_size=SHARD)
        for code in new.rglob("*.py"):
            code.unlink()
        for path in (run.config, run.folder / model_card.FACTS):
            shutil.copyfile(path, new / path.name)
        shutil.copytree(run.folder / IMAGES, new / IMAGES)
        model_card.refresh(new, str(folder), shipped=True)
    return folder


def pull(model: str, folder: Path) -> Path:
    """A copy of a model of the Hub in a new folder, to draw with: no code, no pickles."""
    vacant(folder)
    source = trusted.download(model)
    with whole(folder) as new:
        for path in trusted.downloaded(source):
            (new / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, new / path.relative_to(source))
    return folder


def vacant(folder: Path) -> None:
    """HubError where a new folder's name is taken."""
    if folder.exists():
        raise HubError(f"{folder} exists, expected the name of a new folder: choose another")


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name once it is whole; HubError where it cannot be written."""
    with on_disk(f"making {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            new = Path(scratch) / folder.name
            new.mkdir()
            yield new
            new.rename(folder)


def space(repo_id: str, model: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload this project's page as a Space that draws with one commit of a model of the Hub; the address of the Space."""
    if problems := repository_problems("the Space", repo_id):
        raise HubError("; ".join(problems))
    name, revision, hidden = trusted.revision_of(model, token)
    api = HfApi(token=token)
    with told("the Space", repo_id), tempfile.TemporaryDirectory() as scratch:
        repo = patiently(
            lambda: (
                api.create_repo(
                    repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
                ).repo_id
            )
        )
        folder = Path(scratch)
        for path in (path for pattern in SPACE for path in ROOT.glob(pattern)):
            (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.relative_to(ROOT))
        (folder / PINNED).write_text(f"{name}@{revision}\n", encoding="utf-8")
        (folder / "README.md").write_text(front_page(name, revision), encoding="utf-8")
        address = commit(api, folder, repo, "space", f"Serve {name} at {revision[:7]}")
    if hidden:
        print(
            f"{name} is not for everybody: the Space needs a secret HF_TOKEN that may read it, {address}/settings"
        )
    return address


def front_page(model: str, revision: str) -> str:
    """The README of a Space: this project's front matter, with the model that it draws with."""
    ours = RepoCard.load(ROOT / "README.md").data.to_dict()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    data = SpaceCardData(
        **ours
        | {
            "title": model.rpartition("/")[2],
            "models": [model],
            "tags": ["text-to-image", "diffusion"],
            "python_version": python,
            "suggested_hardware": "cpu-basic",
        }
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {model}\n\nThe page of Direct Jump for `{model}` at commit `{revision}`.\n"


# ---- what the disk and the Hub say, and the command line


@contextlib.contextmanager
def on_disk(what: str) -> Iterator[None]:
    """Whatever this machine's disk says, in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HubError(
            f"{what} failed ({one_line(error)}), expected room, and leave to read and write: mend that and try "
            "again"
        ) from error


@contextlib.contextmanager
def told(what: str, repo_id: str, cure: str = "") -> Iterator[None]:
    """Whatever the Hub's client says about writing to a repository, in one sentence without a token in it."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(
            f"{what} {repo_id} needs a token and there is none, expected one that may write: `hf auth login`, or set "
            f"HF_TOKEN{cure}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "there is no valid token: `hf auth login`, or set HF_TOKEN",
            403: f"this account may not write to {repo_id}: name a repository of your own, with a token that may write",
            404: f"there is no {repo_id}: check its name",
        }
        other = (
            "the Hub is busy: try again later"
            if busy(status)
            else "the Hub will not have it: see what it says"
        )
        reason = reasons.get(status, other)
        says = f" ({' '.join(error.server_message.split())[:200]})" if error.server_message else ""
        raise HubError(
            f"{what} {repo_id} got the answer {status}, expected 200: {reason}{says}{cure}"
        ) from error
    except (HTTPError, ConnectionError) as error:
        raise HubError(
            f"{what} {repo_id} got no answer ({type(error).__name__}: {one_line(error)}), expected the Hub's: connect "
            f"and try again{cure}"
        ) from error
    except OSError as error:
        raise HubError(
            f"{what} {repo_id} failed ({one_line(error)}), expected leave to read and to send: mend that"
            f"{cure}"
        ) from error
    except ValueError as error:
        if isinstance(error, HubError | trusted.ModelError):
            raise
        said = " ".join(str(error).split()).rstrip(
            "."
        )  # of a README that the Hub will not take, say
        raise HubError(
            f"{what} {repo_id} was refused ({said}), expected no objection: change what it names{cure}"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 1 not done, 2 a model that is not what was named; each is told in one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.hub",
        description="Share models through the Hugging Face Hub.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pushing = commands.add_parser("push", help="upload a run or a saved pipeline")
    pushing.add_argument(
        "source", metavar="RUN_OR_PATH", help="a run's folder (runs/NAME) or a saved pipeline's"
    )
    pushing.add_argument(
        "--base",
        metavar="USER/NAME",
        help="of an adapter: the name on the Hub of the model that it adapts",
    )
    pulling = commands.add_parser("pull", help="download a model, without code")
    pulling.add_argument("model", metavar="USER/NAME[@REVISION]")
    pulling.add_argument("folder", type=Path, help="a new folder")
    shipping = commands.add_parser(
        "ship", help="make a run's model small enough for a git repository"
    )
    shipping.add_argument("source", metavar="RUN", help="a finished run's folder (runs/NAME)")
    shipping.add_argument("folder", type=Path, help="a new folder")
    showing = commands.add_parser("space", help="upload this project's page as a Space of a model")
    showing.add_argument(
        "--model",
        required=True,
        metavar="USER/NAME[@REVISION]",
        help="what it draws with, at that commit",
    )
    for command in (pushing, showing):
        command.add_argument(
            "repo_id", metavar="USER/NAME", help="where to; it is made where there is none"
        )
        command.add_argument(
            "--private", action="store_true", help="make it private, where it has to be made"
        )
    args = parser.parse_args(argv)
    try:
        if args.command == "push":
            print(push(args.source, args.repo_id, private=args.private, base=args.base))
        elif args.command == "ship":
            print(ship(args.source, args.folder))
        elif args.command == "pull":
            print(pull(args.model, args.folder))
        else:
            print(space(args.repo_id, args.model, private=args.private))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, HubError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(
        loading.stoppable(main, "a commit is whole or not there, and the same command tries again")
    )
