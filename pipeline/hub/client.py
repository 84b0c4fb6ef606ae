"""Call the Hub: commits, retries, and errors in plain words."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors import SafetensorError

from pipeline.data.sources.rows import TRANSIENT_STATUS, one_line
from pipeline.diffusion.hub_format import commit_operations
from pipeline.models.trusted import ModelError

RETRY_WAITS = (1, 4, 16)  # seconds before each new attempt of a push
CONFLICT_STATUS = 412  # somebody has just committed
STATUS_PROBLEMS = {
    401: "there is no valid token. Run `hf auth login` or set HF_TOKEN",
    403: "this account cannot write there. Use your own repository and a token with write access",
    404: "there is no such repository. Check its name",
}

Result = TypeVar("Result")


class HubError(ValueError):
    """A push, or a check before it, that failed."""

    exit_code = 1


def commit_folder(api: HfApi, folder: Path, repo: str, kind: str, message: str) -> str:
    """Upload a folder in one commit and return the repository's address; no change, no commit.

    huggingface_hub's own `upload_folder` may split a folder over several commits.
    """

    def commit() -> None:
        operations = commit_operations(api, repo, folder, kind)
        api.create_commit(repo, operations, commit_message=message, repo_type=kind)

    with no_progress_outside_a_terminal():
        with_retries(commit)
    return f"{api.endpoint}/{'spaces/' if kind == 'space' else ''}{repo}"


@contextlib.contextmanager
def no_progress_outside_a_terminal() -> Iterator[None]:
    """Hide the client's progress bars where each of their steps would be a line."""
    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def is_transient(error: BaseException) -> bool:
    """Return whether a request may succeed later: no answer, a busy Hub, or a commit in between."""
    if not isinstance(error, HfHubHTTPError):
        return True
    status = error.response.status_code
    return status in TRANSIENT_STATUS or status == CONFLICT_STATUS


def with_retries(request: Callable[[], Result]) -> Result:
    """Return what a request to the Hub returns, after retries of transient errors.

    A commit whose answer was lost is not made twice, if each attempt compares with the Hub first.
    When a file does not get through, the client raises a RuntimeError. It comes as the HTTP error
    behind it, or as a ConnectionError.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            return request()
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) else None
            cause = cause or error
            if wait is None or not is_transient(cause):
                if isinstance(cause, HTTPError):
                    raise cause from error
                raise ConnectionError(one_line(cause)) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn an error of this machine's disk into a HubError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HubError(
            f"{action} failed: {one_line(error)}. Check disk space and permissions, then retry."
        ) from error


@contextlib.contextmanager
def upload_errors(action: str, hint: str = "") -> Iterator[None]:
    """Turn an error of the Hub's client while it writes into a HubError without a token in it.

    action: what failed, such as "pushing to USER/NAME". hint: what to do afterwards, a sentence.
    """
    try:
        yield
    except (HubError, ModelError):
        raise
    except (LocalTokenNotFoundError, HTTPError, OSError, ValueError) as error:
        problem = f"{action} failed: {upload_problem(error)}."
        raise HubError(f"{problem} {hint}" if hint else problem) from error


def upload_problem(error: Exception) -> str:
    """Return what an error of the Hub's client while it writes means, without the final period."""
    message = one_line(error).rstrip(".")
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Run `hf auth login` or set HF_TOKEN"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reply = " ".join((error.server_message or "").split()).rstrip(".")[:200]
        other = "the Hub is busy. Try again later" if is_transient(error) else "the Hub rejected it"
        problem = f"status {status}, {STATUS_PROBLEMS.get(status, other)}"
        return f"{problem}. The Hub's message: {reply}" if reply else problem
    if isinstance(error, HTTPError | ConnectionError):
        return f"no answer ({type(error).__name__}: {message}). Check the connection, then retry"
    if isinstance(error, OSError):
        return f"{message}. Check disk space and permissions, then retry"
    return f"the Hub rejected it: {message}"  # such as the metadata of a README
