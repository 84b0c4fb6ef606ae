"""Report errors to the demo's visitors without showing them the server."""

import contextlib
import functools
import inspect
import logging
import secrets
from collections.abc import Callable, Iterator

import gradio as gr

from pipeline.diffusion.guidance import InputError

log = logging.getLogger(__name__)


def report_errors(function: Callable) -> Callable:
    """Wrap a function or generator function so that visitors see its errors as `gr.Error`.

    An InputError keeps its message. Any other error is logged, and visitors only see its id.
    """
    if not inspect.isgeneratorfunction(function):
        return _gradio_errors()(function)

    @functools.wraps(function)
    def generate(*args: object, **kwargs: object) -> Iterator:
        with _gradio_errors():
            yield from function(*args, **kwargs)

    return generate


@contextlib.contextmanager
def _gradio_errors() -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except InputError as error:
        # Gradio renders the message as HTML.
        message = str(error).replace("<", "‹").replace(">", "›")
        raise gr.Error(message, title="Invalid request", print_exception=False) from None
    except Exception:
        error_id = secrets.token_hex(4)
        log.exception("error %s", error_id)
        message = f"The server failed. Its log has the details under {error_id}."
        raise gr.Error(message, print_exception=False) from None
