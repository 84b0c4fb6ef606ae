"""Start the demo's web server."""

import socket
from typing import Any

import gradio as gr
from fastapi.exceptions import RequestValidationError
from starlette.responses import PlainTextResponse

from pipeline.serving.png_metadata import MAX_UPLOAD_BYTES
from pipeline.serving.theme import CSS, THEME

MAX_BODY_BYTES = MAX_UPLOAD_BYTES + 100_000
# Gradio remembers 150 kB for each browser or script, but events here only need their inputs.
MAX_SESSIONS = 200


def serve(
    demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, **options: Any
) -> tuple:
    """Launch the demo with limits on every request; options and result are those of `launch`."""
    return demo.launch(
        server_name=host,
        server_port=port,
        share=False,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        max_file_size=MAX_UPLOAD_BYTES,
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={
            "max_body_size": MAX_BODY_BYTES,
            "exception_handlers": {RequestValidationError: refuse_malformed_body},
        },
        theme=THEME,
        css=CSS,
        footer_links=["api", "settings"],
        **options,
    )


async def refuse_malformed_body(_request: object, _error: Exception) -> PlainTextResponse:
    """Answer 422; FastAPI's own answer quotes the body and fails on half a surrogate pair."""
    return PlainTextResponse('The body must be {"data": [...]}.', 422)


def require_free_address(host: str, port: int | None) -> None:
    """Raise ValueError if nothing can listen there; without a port Gradio finds a free one."""
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {port}.")
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM)
        family, *_, address = addresses[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:  # UnicodeError for malformed host names
        given = f"--host {host}" if port is None else f"--host {host} --port {port}"
        raise ValueError(
            f"The demo cannot listen on {given} ({error}). Choose a free port of this machine."
        ) from error
