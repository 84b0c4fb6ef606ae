"""The web page: `python app.py [--model RUN_OR_ID] [--host 0.0.0.0] [--port 7860]`.

It draws prompts, shows what w does and walks through the lecture's equations; `pipeline.serving` does the work, and every
request is checked there, because a browser or a script may send anything.
"""

import argparse
import contextlib
import functools
import inspect
import logging
import os
import random
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it when it is imported
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")

import gradio as gr
from fastapi.exceptions import RequestValidationError
from gradio.components.plot import PlotData
from gradio.processing_utils import encode_plot_to_base64
from matplotlib.figure import Figure  # pyplot would keep every figure it makes
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from pipeline.cli.runner import run_cli
from pipeline.diffusion.guidance import InputError
from pipeline.hub.model_card import ATTRIBUTION, inline_code
from pipeline.models.locate import default_model
from pipeline.serving.model_store import ModelStore
from pipeline.serving.png_metadata import MAX_UPLOAD_BYTES, read_png, same_model
from pipeline.serving.requests import (
    DENOISERS,
    MAX_IMAGES,
    MAX_PROMPT_CHARACTERS,
    MAX_SEARCH_BUDGET,
    MAX_SEED,
    MAX_STEPS_PER_REQUEST,
    Request,
    parse_number,
    parse_text,
)
from pipeline.serving.session import (
    STRIP_COLUMNS,
    SWEEP_WS,
    Frame,
    InferenceSession,
    load_uploaded_image,
)

log = logging.getLogger("app")

EXAMPLES = (
    "red heart",
    "green cat",
    "hot dog",
    "cat face",
    "woman astronaut",
    "blue apple",
    "rocket",
    "purple dog face",
    "red apple",
    "two hearts",
    "snowman",
    "yellow star",
)
QUEUE = 20  # requests that may wait; more hear "Queue is full"
SESSIONS = 200  # browsers and scripts whose components Gradio remembers, 150 kB each; no event here needs more than its inputs
BODY = MAX_UPLOAD_BYTES + 100_000  # bytes of one HTTP request
AGE, ROUND = 3600, 600  # seconds that a file of the page is kept, and between two looks at them
DRAWING = threading.Lock()  # matplotlib is not made for threads
THEME = gr.themes.Soft(
    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
CSS = """
.gradio-container { max-width: 1080px !important; margin: auto; }
#title h1 { margin-bottom: 0; }
.pixels img { image-rendering: pixelated; }
#gallery .caption-label { display: none; }
.strip, .strip .grid-wrap { min-height: 0 !important; height: auto !important; max-height: none !important; }
@media (max-width: 640px) {
  .strip .grid-container { grid-template-columns: repeat(3, 1fr) !important; }
  .tab-wrapper, .tab-container { height: auto !important; flex-wrap: wrap; }
}
"""
QUIET = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
}  # events of the page alone
GUIDANCE = (
    "w as in the lecture: (1 + w) ε(c) - w ε(∅). -1 ignores the prompt, 0 follows it unguided; "
    "elsewhere this is called s = 1 + w"
)


# ---- what every answer has in common


def failure(error: Exception) -> gr.Error:
    """What the visitor hears: the mistake in the request, or an id under which the log has the rest."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, InputError):
        told = f"{error}.".replace("<", "‹").replace(">", "›")  # the page shows it as HTML
        return gr.Error(told, title="Not drawn", print_exception=False)
    name = secrets.token_hex(4)
    log.exception("error %s", name, exc_info=error)
    return gr.Error(
        f"Something broke on this side. The log has it under {name}.", print_exception=False
    )


def answering(function):
    """`function`, a plain one or a generator, whose errors are told as `failure` does."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def answer(*args, **kwargs):
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                raise failure(error) from None
    else:

        @functools.wraps(function)
        def answer(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                raise failure(error) from None

    return answer


class BodyLimit:
    """ASGI middleware: a request with more than `limit` bytes gets 413, whatever its header says."""

    def __init__(self, app, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size, begun = 0, False
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.limit:
            return await self.refuse(send)

        async def counted():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message if size <= self.limit else {"type": "http.disconnect"}

        async def answered(message):
            nonlocal begun
            if size <= self.limit or begun:
                begun = True
                await send(message)

        try:
            await self.app(scope, counted, answered)
        except Exception:  # what the reader of a body that broke off says
            if size <= self.limit or begun:
                raise
        if size > self.limit and not begun:
            await self.refuse(send)

    async def refuse(self, send):
        """The answer 413."""
        body = f"the request is larger than {self.limit} bytes".encode()
        headers = [
            (b"content-type", b"text/plain"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


# ---- the page


def build_demo(shelf: ModelStore) -> gr.Blocks:
    """The page of a model, or of the checkpoints of a run in progress."""
    studio = shelf.studio()
    with gr.Blocks(title=f"Direct Jump · {shelf.name}", analytics_enabled=False) as demo:
        gr.Markdown(
            f"# Direct Jump\nText-to-image diffusion from the equations. {about_model(shelf, studio)}",
            elem_id="title",
        )
        checkpoint = checkpoints(shelf, demo)
        with gr.Tab("Create"):
            create_tab(shelf, studio, checkpoint)
        with gr.Tab("What w does"):
            sweep_tab(shelf, studio, checkpoint)
        with gr.Tab("Walk the equations"):
            walk_tab(shelf, studio, checkpoint)
        with gr.Tab("About"):
            gr.Markdown(card(shelf))
    demo.queue(max_size=QUEUE, api_open=False, default_concurrency_limit=1)
    return demo


def about_model(shelf: ModelStore, studio: InferenceSession) -> str:
    """One line on what draws here."""
    if studio.network is None:
        return (
            "**No trained model is here yet**, so the exact denoiser of the embedded emoji draws: it knows its pictures by "
            "name and nothing else. `make train` makes a model in minutes."
        )
    return f"Model: `{inline_code(shelf.name)}`."


def model_options() -> gr.Radio:
    """The switch between network and exact denoiser."""
    return gr.Radio(
        list(DENOISERS),
        value=DENOISERS[0],
        label="Denoiser",
        info="exact: the perfect denoiser of the picture set, which can draw nothing else",
    )


def checkpoints(shelf: ModelStore, demo: gr.Blocks) -> gr.Slider:
    """The slider over a run's checkpoints, which follows the newest; hidden where there is one model."""
    steps = shelf.steps()
    with gr.Group(visible=shelf.follows):
        slider = gr.Slider(
            *ends(steps),
            value=max(steps, default=0),
            step=1,
            label="Checkpoint (step)",
            info="the nearest one that is kept is used",
        )
        newest = gr.Checkbox(True, label="Follow the newest")

    def refresh(value, follow):
        found = shelf.steps()
        first, last = ends(
            found
        )  # a value below first, of a checkpoint that is gone, would be refused
        value = (
            max(found, default=0)
            if follow
            else parse_number("checkpoint", value, 0, MAX_SEED, True, [])
        )
        if value is None:  # an emptied box stays so
            return gr.Slider(minimum=first, maximum=last)
        return gr.Slider(minimum=first, maximum=last, value=min(max(value, first), last))

    if shelf.follows:
        gr.on(
            [gr.Timer(5).tick, demo.load],
            answering(refresh),
            [slider, newest],
            slider,
            preprocess=False,
            **QUIET,
        )
    return slider


def ends(steps: list[int]) -> tuple[int, int]:
    """A slider's two ends over some steps; gradio wants them apart."""
    first, last = min(steps, default=0), max([*steps, 1])
    return (first if first < last else 0), last


def steps_slider(studio: InferenceSession, most: int, **layout) -> gr.Slider:
    """How many denoising steps, no more than the model has timesteps."""
    return gr.Slider(
        1, min(most, studio.T), value=min(50, studio.T), step=1, label="Steps", **layout
    )


def create_tab(shelf: ModelStore, studio: InferenceSession, checkpoint: gr.Slider) -> None:
    """Prompt in, pictures out, with everything that decides them."""
    default = studio.pipe.config.w
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            prompt = gr.Textbox(
                "",
                label="Prompt",
                placeholder="red heart",
                autofocus=True,
                elem_id="prompt",
                max_length=MAX_PROMPT_CHARACTERS,
            )
            counter = gr.Markdown("", elem_id="tokens")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
            w = gr.Slider(-1, 10, value=default, step=0.25, label="w, guidance", info=GUIDANCE)
            with gr.Row():
                images = gr.Slider(1, MAX_IMAGES, value=1, step=1, label="Pictures", min_width=120)
                steps = steps_slider(studio, 250, min_width=120)
            think = gr.Slider(
                1,
                MAX_SEARCH_BUDGET,
                value=1,
                step=1,
                label="Think longer",
                elem_id="think",
                info="1 is off; at n, as many network calls as n pictures take go to drawing several and keeping "
                "the one the model itself finds likeliest for the prompt; judging takes calls too, so that "
                "2 still draws one",
            )
            with gr.Row():
                seed = gr.Number(
                    0,
                    label="Seed",
                    info="picture i draws its noise from seed + i",
                    min_width=120,
                    elem_id="seed",
                )
                randomise = gr.Checkbox(
                    True,
                    label="Randomise",
                    info="a new seed each time; it is shown here",
                    min_width=120,
                )
            with gr.Accordion("More", open=False):
                eta = gr.Slider(
                    0,
                    1,
                    value=1,
                    step=0.05,
                    label="η",
                    info="1 is ancestral sampling (16), 0 DDIM (19)",
                )
                negative = gr.Textbox(
                    "",
                    label="Negative prompt",
                    info="guided away from, in the empty caption's place",
                    max_length=MAX_PROMPT_CHARACTERS,
                )
                with gr.Row():
                    low = gr.Slider(
                        0, 1, value=0, step=0.05, label="Guide from noise level", min_width=120
                    )
                    high = gr.Slider(
                        0, 1, value=1, step=0.05, label="to noise level", min_width=120
                    )
                denoiser = model_options()
                dropped = gr.File(
                    label="Reuse the settings of a PNG from this page",
                    file_types=[".png"],
                    height=100,
                )
        with gr.Column(scale=6, min_width=300):
            gallery = gr.Gallery(
                label="Pictures",
                show_label=False,
                format="png",
                columns=2,
                fit_columns=False,
                height=540,
                elem_id="gallery",
                elem_classes="pixels",
                buttons=["download", "fullscreen"],
            )
            status = gr.Markdown("", elem_id="status")
            with gr.Accordion("What thinking longer found", visible=False) as thought:
                curve = gr.Plot(
                    label="Best score against network calls",
                    show_label=False,
                    format="png",
                    elem_id="curve",
                )
                gr.Markdown(
                    "Discarded, best first, with their scores: log p(x | c) - log p(x) in nats, as the model has it."
                )
                discarded = strip("Discarded candidates", 4, "discarded")
            known = set(studio.known) if studio.network is None else None
            shown = [[e] for e in EXAMPLES if known is None or e in known]
            gr.Examples(
                shown or [[c] for c in sorted(known)[:8]],
                prompt,
                label="Examples",
                examples_per_page=len(EXAMPLES),
            )

    @answering
    def create(
        prompt,
        negative_prompt,
        w,
        steps,
        eta,
        images,
        seed,
        randomise,
        low,
        high,
        denoiser,
        checkpoint,
        think,
    ):
        """Draw pictures of a prompt: (pictures, status, seed, curve, discarded). w as in the lecture, s = 1 + w; eta 1
        ancestral, 0 DDIM; think n spends as many network calls as n pictures take on one, the best by the model's own judgement:
        the curve is that of its score against the calls, and the discarded are the other candidates.
        """
        studio = shelf.studio(checkpoint)
        seed = random.randrange(2**31) if randomise is True else seed
        request = Request.read(
            {
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "w": w,
                "steps": steps,
                "eta": eta,
                "images": images,
                "seed": seed,
                "low": low,
                "high": high,
                "think": think,
            },
            studio.T,
        )
        for frame in studio.create(request, denoiser):
            shown = frame.images
            if frame.last:  # told to who cannot see them
                shown = [
                    (image, f"{request.prompt or '∅'}, seed {request.seed + i}")
                    for i, image in enumerate(shown)
                ]
            yield shown, progress(frame, request.seed), request.seed, *thoughts(frame)

    @answering
    def reuse(path, checkpoint):
        studio = shelf.studio(checkpoint)
        request, drew, model = read_png(path, studio.T)
        other = f"`{inline_code(model[:80])}` drew that picture; `{inline_code(studio.identity)}` draws another one."
        return (
            request.prompt,
            request.negative_prompt,
            request.w,
            request.steps,
            request.eta,
            request.images,
            request.seed,
            False,
            request.low,
            request.high,
            request.think,
            drew,
            "" if model == studio.name or same_model(model, studio.identity) else other,
        )

    inputs = [
        prompt,
        negative,
        w,
        steps,
        eta,
        images,
        seed,
        randomise,
        low,
        high,
        denoiser,
        checkpoint,
        think,
    ]
    clicked(
        [prompt.submit, go.click],
        go,
        stop,
        create,
        inputs,
        [gallery, status, seed, curve, discarded],
        "create",
    )
    think.change(
        lambda n: gr.Accordion(visible=isinstance(n, int | float) and n > 1),
        think,
        thought,
        preprocess=False,
        **QUIET,
    )
    prompt.change(answering(studio.tokens), prompt, counter, trigger_mode="always_last", **QUIET)
    settings = [
        prompt,
        negative,
        w,
        steps,
        eta,
        images,
        seed,
        randomise,
        low,
        high,
        think,
        denoiser,
    ]
    dropped.upload(reuse, [dropped, checkpoint], [*settings, status], **QUIET)


def clicked(triggers, go: gr.Button, stop: gr.Button, function, inputs, outputs, name: str) -> None:
    """`function` on any of the triggers, one model call at a time on the whole page; `stop` takes the place of `go` meanwhile
    and ends it between two network calls.
    """
    begun = gr.on(
        triggers,
        lambda: (gr.Button(visible=False), gr.Button(visible=True)),
        None,
        [go, stop],
        **QUIET,
    )
    drawing = begun.then(
        function,
        inputs,
        outputs,
        preprocess=False,
        show_progress="minimal",
        api_name=name,
        concurrency_id="model",
        concurrency_limit=1,
    )
    stopped = stop.click(None, cancels=[drawing], **QUIET)
    for ended in (drawing.success, drawing.failure, stopped.then):
        ended(
            lambda: (gr.Button(visible=True), gr.Button(visible=False)), None, [go, stop], **QUIET
        )


def progress(frame: Frame, seed: int | None = None) -> str:
    """What a request has cost so far."""
    done = (
        ""
        if frame.last
        else f"{'step' if frame.found is None else 'call'} {frame.step} of {frame.steps} · "
    )
    if frame.last and frame.found is not None:
        n = len(frame.found.candidates)
        done = (
            f"the best of {n} · "
            if n > 1
            else "one picture, since a second and judging both take more · "
        )
    used = "" if seed is None else f" · seed {seed}"
    return f"{done}{frame.seconds:.1f} s · {frame.calls} network calls{used}"


def thoughts(frame: Frame) -> tuple:
    """The curve of a search so far, and at its end the candidates that it discarded with their scores."""
    if frame.found is None or not frame.found.curve:
        return None, []
    figure = Figure(figsize=(5, 2.2), layout="constrained")
    ax = figure.subplots()
    ax.plot(*zip(*frame.found.curve, strict=True), "o-", color="#4f46e5", drawstyle="steps-post")
    ax.set(xlabel="network calls", ylabel="best score, nats")
    scores = frame.found.scores[1:].tolist()
    return drawn(figure), [
        (image, f"{score:.4g}") for image, score in zip(frame.discarded, scores, strict=False)
    ]


def drawn(figure: Figure) -> PlotData:
    """A figure as gr.Plot shows it; Gradio itself would draw those of several visitors at once."""
    with DRAWING:
        return PlotData(type="matplotlib", plot=encode_plot_to_base64(figure))


def strip(label: str, columns: int, name: str) -> gr.Gallery:
    """Small pictures in a row, in several on a phone."""
    return gr.Gallery(
        label=label,
        show_label=False,
        format="png",
        columns=columns,
        object_fit="contain",
        elem_id=name,
        elem_classes="pixels strip",
        buttons=["download", "fullscreen"],
    )


def sweep_tab(shelf: ModelStore, studio: InferenceSession, checkpoint: gr.Slider) -> None:
    """The same noise under six w."""
    gr.Markdown(f"The same noise at w = {', '.join(f'{w:g}' for w in SWEEP_WS)}. {GUIDANCE}.")
    with gr.Row():
        prompt = gr.Textbox(
            label="Prompt",
            value=known_caption(studio),
            scale=4,
            min_width=200,
            max_length=MAX_PROMPT_CHARACTERS,
        )
        seed = gr.Number(0, label="Seed", scale=1, min_width=100)
        steps = steps_slider(studio, MAX_STEPS_PER_REQUEST // len(SWEEP_WS), scale=2, min_width=140)
    with gr.Row():
        go = gr.Button("Draw all six", variant="primary", elem_id="sweep")
        stop = gr.Button("Stop", variant="stop", visible=False)
    gallery = strip("One noise, six w", len(SWEEP_WS), "sweep-gallery")
    status = gr.Markdown("")
    slider = gr.ImageSlider(
        label="conditional (w = 0) | unconditional (w = -1)",
        format="png",
        height=300,
        elem_classes="pixels",
        interactive=False,
        buttons=[],
    )
    denoiser = model_options()

    @answering
    def sweep(prompt, seed, steps, denoiser, checkpoint):
        """Draw a prompt at w = -1, 0, 1, 2, 4 and 8 from the same noise: (pictures, status, the pair of w = 0 and w = -1)."""
        studio = shelf.studio(checkpoint)
        request = Request.read(
            {"prompt": prompt, "seed": seed, "steps": steps}, studio.T, rows=len(SWEEP_WS)
        )
        for frame in studio.sweep(request, denoiser):
            labelled = [
                (image, f"w = {w:g}") for w, image in zip(SWEEP_WS, frame.images, strict=True)
            ]
            pair = (frame.images[SWEEP_WS.index(0)], frame.images[SWEEP_WS.index(-1)])
            yield labelled, progress(frame), pair if frame.last else gr.skip()

    inputs = [prompt, seed, steps, denoiser, checkpoint]
    clicked([prompt.submit, go.click], go, stop, sweep, inputs, [gallery, status, slider], "sweep")


def known_caption(studio: InferenceSession) -> str:
    """A prompt to begin with that every denoiser here can draw."""
    captions = studio.known
    return next((e for e in EXAMPLES if e in captions), captions[0])


def walk_tab(shelf: ModelStore, studio: InferenceSession, checkpoint: gr.Slider) -> None:
    """The lecture's equations on a picture: forwards, and back again."""
    captions = studio.known + (studio.set[1].captions[:1000] if studio.set[1] else [])
    T, curves = studio.T, studio.curves()
    gr.Markdown(
        "### Forwards: the direct jump (5) and the chain (1)\nBoth give x_t the same distribution. Beside them, what "
        "each denoiser takes the picture for, (15): where the network agrees with the exact one it has memorised, where "
        "it departs from it, it generalises."
    )
    with gr.Row():
        picture = gr.Dropdown(
            captions,
            value=known_caption(studio),
            label="Picture of the set",
            scale=3,
            min_width=200,
        )
        t = gr.Slider(1, T, value=max(T // 4, 1), step=1, label="t", scale=3, min_width=200)
        seed = gr.Number(0, label="Seed", scale=1, min_width=100)
    tell = gr.Checkbox(False, label="Tell the denoisers the caption")
    with gr.Accordion("Or a picture of your own", open=False):
        upload = gr.File(
            label="PNG or JPEG, 2 MB at most", file_types=[".png", ".jpg", ".jpeg"], height=100
        )
    noise = gr.Button("Noise it", variant="primary", elem_id="noise")
    panels = strip("x_0, x_t and what is made of it", 5, "forward-gallery")
    plot = gr.Plot(
        plot_curves(curves, t.value),
        label="The schedule",
        show_label=False,
        format="png",
        elem_id="schedule",
    )
    gr.Markdown(
        "### Backwards: the film strip of (16)\nFrom noise to a picture by x_s = mean(x_t, x̂_0) + √variance · z."
    )
    with gr.Row():
        prompt = gr.Textbox(
            label="Prompt",
            value=known_caption(studio),
            scale=3,
            min_width=200,
            max_length=MAX_PROMPT_CHARACTERS,
        )
        w = gr.Slider(
            -1, 10, value=studio.pipe.config.w, step=0.25, label="w", scale=2, min_width=140
        )
        steps = steps_slider(studio, 250, scale=2, min_width=140)
        eta = gr.Slider(0, 1, value=1, step=0.05, label="η", scale=1, min_width=160)
    denoiser = model_options()
    with gr.Row():
        go = gr.Button("Walk back", variant="primary", elem_id="walk")
        stop = gr.Button("Stop", variant="stop", visible=False)
    gr.Markdown("x\\_t")
    noisy = strip("x_t", STRIP_COLUMNS, "strip")
    gr.Markdown("x̂\\_0, the current prediction (15)")
    clean = strip("x̂_0", STRIP_COLUMNS, "strip-clean")

    @answering
    def forward(picture, t, seed, tell, upload, checkpoint):
        """Noise a picture to t and denoise it once: the panels x_0, (5), (1) and (15), with their names."""
        studio, problems = shelf.studio(checkpoint), []
        t = parse_number("t", t, 1, studio.T, True, problems)
        seed = parse_number("seed", seed, 0, MAX_SEED, True, problems)
        name = parse_text("picture", picture, problems)
        if problems:
            raise InputError("; ".join(problems))
        x_0 = (
            load_uploaded_image(upload["path"], studio.source.resolution)
            if upload
            else studio.named(name)
        )
        told = name if tell is True and not upload else ""
        return [(image, label) for label, image in studio.forward(x_0, t, seed, told).items()]

    @answering
    def backward(prompt, w, steps, eta, seed, denoiser, checkpoint):
        """Draw a prompt and show the way: the strips of x_t and of x_0, each picture with its t."""
        studio = shelf.studio(checkpoint)
        request = Request.read(
            {"prompt": prompt, "w": w, "steps": steps, "eta": eta, "seed": seed}, studio.T
        )
        for strip in studio.backward(request, denoiser):
            yield (
                [(x_t, f"t = {t}") for t, x_t, _ in strip],
                [(x_0, f"t = {t}") for t, _, x_0 in strip],
            )

    noise.click(
        forward,
        [picture, t, seed, tell, upload, checkpoint],
        panels,
        preprocess=False,
        api_name="forward",
        concurrency_id="model",
        concurrency_limit=1,
    )
    plotted = answering(
        lambda t: gr.skip() if t is None else plot_curves(curves, t)
    )  # None is the number's emptied box
    t.change(plotted, t, plot, trigger_mode="always_last", preprocess=False, **QUIET)
    clicked(
        [prompt.submit, go.click],
        go,
        stop,
        backward,
        [prompt, w, steps, eta, seed, denoiser, checkpoint],
        [noisy, clean],
        "backward",
    )


def plot_curves(curves: dict[str, list[float]], t: int) -> PlotData:
    """The schedule's four curves, each of T values, with one t marked."""
    T, problems = min(map(len, curves.values())), []
    t = parse_number("t", t, 1, T, True, problems)
    if problems:
        raise InputError(problems[0])
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    for ax, (name, values) in zip(figure.subplots(1, 4), curves.items(), strict=True):
        ax.plot(range(1, T + 1), values, color="#4f46e5")
        ax.plot([t], [values[t - 1]], "o", color="#be185d")
        ax.set_title(f"{name}\n{values[t - 1]:.3g} at t = {t}", fontsize=10)
        if name.startswith("SNR"):
            ax.set_yscale("log")
    return drawn(figure)


def card(shelf: ModelStore) -> str:
    """The model's card, without its front matter and its pictures, and whose the embedded data is."""
    text = re.sub(r"\A---\n.*?\n---\n", "", shelf.card(), flags=re.S)
    text = re.sub(
        r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])?|<img\b[^>]*>|<Gallery />", "", text, flags=re.I
    )  # nobody else's pictures
    return f"{text}\n\n---\nDirect Jump is Apache-2.0. {ATTRIBUTION}"


# ---- its files


def tidy(folder: str, before: float) -> None:
    """Delete the files under a folder that were last changed before a time, and the folders within it that this leaves empty."""
    for path, _folders, names in os.walk(folder, topdown=False):
        old = os.stat(path).st_ctime < before  # of a younger one the file may be still to come
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # an upload's first name
                file = os.path.join(path, name)
                if os.lstat(file).st_ctime < before:
                    os.remove(file)
        if old and path != folder and not os.listdir(path):
            os.rmdir(path)


def tidying(folder: str, over: threading.Event) -> None:
    """`tidy` in rounds until it is over; an error is logged and the next round tries again."""
    while not over.wait(ROUND):
        try:
            tidy(folder, time.time() - AGE)
        except Exception:
            log.exception("the page's old files in %s were not all deleted", folder)


@contextlib.contextmanager
def own_files() -> Iterator[str]:
    """Have Gradio keep its files in a folder of this page's own, tidied while it is open and then deleted.

    Its usual one is that of every Gradio app of the machine. It is asked for when a page is built.
    """
    parent, over = os.environ.get("GRADIO_TEMP_DIR"), threading.Event()
    if parent:
        os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="direct-jump-", dir=parent or None, ignore_cleanup_errors=True
    ) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        threading.Thread(target=tidying, args=(folder, over), daemon=True).start()
        try:
            yield folder
        finally:
            over.set()
            os.environ.pop("GRADIO_TEMP_DIR")
            if parent is not None:
                os.environ["GRADIO_TEMP_DIR"] = parent


# ---- the server


async def not_a_request(_request, _error: Exception) -> PlainTextResponse:
    """What a body of the wrong form is told; FastAPI's own answer quotes it, and fails on half a surrogate pair."""
    return PlainTextResponse('the body is not what this API takes, expected {"data": [...]}', 422)


def try_address(host: str, port: int | None) -> None:
    """ValueError where nothing can listen there; without a port Gradio looks for a free one."""
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(
            f"--port is {port}, expected 1 to 65535: leave it out for 7860 or the next free one"
        )
    try:
        family, *_, address = socket.getaddrinfo(
            host.strip("[]"), port or 0, type=socket.SOCK_STREAM
        )[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: what can be no name
        raise ValueError(
            f"--host {host} {'' if port is None else f'--port {port} '}cannot be listened to ({error}), expected an "
            "address of this machine and a free port that you may open: choose others"
        ) from error


def serve(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, **options):
    """Start the page's server."""
    kwargs = {
        "middleware": [Middleware(BodyLimit, limit=BODY)],
        "exception_handlers": {RequestValidationError: not_a_request},
    }
    return demo.launch(
        server_name=host,
        server_port=port,
        share=False,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        max_file_size=MAX_UPLOAD_BYTES,
        state_session_capacity=SESSIONS,
        app_kwargs=kwargs,
        theme=THEME,
        css=CSS,
        footer_links=["api", "settings"],
        **options,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line: serves until it is stopped; 2 is bad input, told in one sentence."""
    parser = argparse.ArgumentParser(
        prog="python app.py", description="Serve the web page of a model.", allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        help="a run's folder, a saved pipeline's, or a model of the Hub, user/name[@revision] "
        "(default: the newest run, else pretrained/emoji, else the exact denoiser)",
    )
    parser.add_argument(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1",  # a Space sets it
        help="0.0.0.0 lets other machines in (default: 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, help="default: 7860, or the next free one")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one, else cpu)")
    args = parser.parse_args(argv)
    try:
        try_address(args.host, args.port)
        shelf = ModelStore(args.model or default_model(), args.device)
        with own_files() as folder:
            demo = build_demo(shelf)
            # SIGTERM leaves no files either; Gradio's own way out would wait for open pages
            signal.signal(
                signal.SIGTERM,
                lambda *_: (shutil.rmtree(folder, ignore_errors=True), os._exit(143)),
            )
            serve(demo, args.host, args.port)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, "no page was served yet"))
