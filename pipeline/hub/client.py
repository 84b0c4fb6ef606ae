"""Calls to the Hub: retries, and errors in plain words."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # HTTPError: of its own HTTP client
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
)
from safetensors import SafetensorError

from pipeline.data.sources.rows import one_line
from pipeline.diffusion.hub_format import commit_operations
from pipeline.models.trusted import ModelError

RETRY_WAITS = (1, 4, 16)  # seconds before a push is tried again


class HubError(ValueError):
    """A push or a check before it that failed: what happened, and how to go on."""

    exit_code = 1


def commit_folder(api: HfApi, folder: Path, repo: str, kind: str, message: str) -> str:
    """Upload a folder's files in one commit (`changes`) and return the repository's address; files as they are there make none.

    huggingface_hub's own `upload_folder` may make several commits of a folder.
    """
    with_retries(
        lambda: api.create_commit(
            repo, commit_operations(api, repo, folder, kind), commit_message=message, repo_type=kind
        )
    )
    return f"{api.endpoint}/{'spaces/' if kind == 'space' else ''}{repo}"


def is_transient(answer: int) -> bool:
    """Whether the Hub, which gave this answer, may give another one later."""
    return answer in (408, 412, 429) or answer >= 500


def with_retries(request: Callable):
    """What a request to the Hub returns, made again where no answer came, the Hub is busy or somebody has just committed.

    A commit whose answer was lost is not made twice: every try asks anew what is there already. Where a file does not get
    through the client raises RuntimeError, which comes as the answer that it had, or as ConnectionError.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            return request()
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
            cause = (
                error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            )
            answer = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            if wait is None or not (answer is None or is_transient(answer)):
                raise (
                    cause if isinstance(cause, HTTPError) else ConnectionError(one_line(cause))
                ) from error
            time.sleep(wait)


# ---- what the disk and the Hub say, and the command line


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Whatever this machine's disk says, in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HubError(
            f"{what} failed ({one_line(error)}), expected room, and leave to read and write: mend that and try "
            "again"
        ) from error


@contextlib.contextmanager
def upload_errors(what: str, repo_id: str, cure: str = "") -> Iterator[None]:
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
            if is_transient(status)
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
        if isinstance(error, HubError | ModelError):
            raise
        said = " ".join(str(error).split()).rstrip(
            "."
        )  # of a README that the Hub will not take, say
        raise HubError(
            f"{what} {repo_id} was refused ({said}), expected no objection: change what it names{cure}"
        ) from error
