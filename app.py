"""The demo: `python app.py [--model RUN_OR_ID] [--host 0.0.0.0] [--port 7860]`.

This file has the components and their wiring. `pipeline/serving/` validates and answers requests.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

# Gradio and diffusers read these when they are imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
if "SPACE_ID" in os.environ:
    importlib.import_module("spaces")  # must come before anything that uses CUDA

import gradio as gr

from pipeline.cli.runner import run_cli
from pipeline.models.locate import default_model
from pipeline.serving.endpoints import Endpoints
from pipeline.serving.errors import report_errors
from pipeline.serving.model_store import ModelStore
from pipeline.serving.plots import plot_schedule
from pipeline.serving.requests import (
    DENOISERS,
    MAX_IMAGES,
    MAX_PROMPT_CHARACTERS,
    MAX_SEARCH_BUDGET,
    MAX_SEED,
    MAX_STEPS_PER_REQUEST,
    parse_integer,
)
from pipeline.serving.server import require_free_address, serve
from pipeline.serving.session import STRIP_COLUMNS, SWEEP_WS, InferenceSession
from pipeline.serving.temp_files import delete_on_sigterm, temporary_cache
from pipeline.serving.zero_gpu import on_gpu

MAX_STEPS = 250
MAX_DATASET_CAPTIONS = 1000  # held-out captions in the list of images
QUEUE_SIZE = 20  # later requests are answered with "Queue is full"
# Events of the browser alone.
PRIVATE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# Model calls run one at a time. Their values are validated by the endpoints, not by the components.
MODEL_CALL: dict[str, Any] = {
    "preprocess": False,
    "concurrency_id": "model",
    "concurrency_limit": 1,
}
GALLERY: dict[str, Any] = {
    "show_label": False,
    "format": "png",
    "buttons": ["download", "fullscreen"],
}
PLOT: dict[str, Any] = {"show_label": False, "format": "png"}
GUIDANCE_FORMULA = "(1 + w) ε(c) - w ε(∅), equation (17)"


def build_demo(store: ModelStore) -> gr.Blocks:
    """Build the demo of a model, or of the checkpoints of a running training."""
    session = store.session()
    endpoints = Endpoints(store)
    with gr.Blocks(title=f"Direct Jump · {store.name}", analytics_enabled=False) as demo:
        about = f"Text-to-image diffusion from the equations. {store.describe()}"
        gr.Markdown(f"# Direct Jump\n{about}", elem_id="title")
        checkpoint = checkpoint_slider(store, demo)
        with gr.Tab("Create"):
            create_tab(endpoints, session, checkpoint)
        with gr.Tab("What w does"):
            sweep_tab(endpoints, session, checkpoint)
        with gr.Tab("Walk the equations"):
            walk_tab(endpoints, session, checkpoint)
        with gr.Tab("About"):
            gr.Markdown(store.card())
    demo.queue(max_size=QUEUE_SIZE, api_open=False, default_concurrency_limit=1)
    return demo


# ---- shared components


def prompt_box(value: str, label: str = "Prompt", **options: Any) -> gr.Textbox:
    """Return a prompt field."""
    return gr.Textbox(value, label=label, max_length=MAX_PROMPT_CHARACTERS, **options)


def slider(
    low: float, high: float, value: float, step: float, label: str, **options: Any
) -> gr.Slider:
    """Return a slider from low to high."""
    return gr.Slider(low, high, value=value, step=step, label=label, **options)


def steps_slider(session: InferenceSession, most: int, **options: Any) -> gr.Slider:
    """Return a slider of denoising steps, with at most the model's timesteps."""
    most = min(most, session.T)
    return slider(1, most, min(50, most), 1, "Steps", **options)


def denoiser_radio() -> gr.Radio:
    """Return the choice between the trained network and the exact denoiser."""
    info = "exact: the ideal denoiser of the dataset. It only knows the dataset's captions."
    return gr.Radio(list(DENOISERS), value=DENOISERS[0], label="Denoiser", info=info)


def image_strip(label: str, columns: int, elem_id: str) -> gr.Gallery:
    """Return a row of small images, which wraps on a phone."""
    layout = {"columns": columns, "object_fit": "contain", "elem_classes": "pixels strip"}
    return gr.Gallery(label=label, elem_id=elem_id, **layout, **GALLERY)


def start_and_stop(label: str, elem_id: str) -> tuple[gr.Button, gr.Button]:
    """Return a start button, and a stop button that replaces it while a request runs."""
    start = gr.Button(label, variant="primary", elem_id=elem_id)
    stop = gr.Button("Stop", variant="stop", visible=False, elem_id=f"stop-{elem_id}")
    return start, stop


def connect_generate(
    prompt: gr.Textbox,
    buttons: tuple[gr.Button, gr.Button],
    function: Callable,
    inputs: list,
    outputs: list,
) -> None:
    """Run an endpoint when its prompt is submitted or its start button clicked.

    The endpoint's name is that of the function. Stop ends it between two network calls.
    """
    start, stop = buttons

    def show_buttons(running: bool) -> Callable:
        return lambda: (gr.Button(visible=not running), gr.Button(visible=running))

    started = gr.on(
        [prompt.submit, start.click], show_buttons(True), None, [start, stop], **PRIVATE
    )
    options = {"show_progress": "minimal", "api_name": function.__name__, **MODEL_CALL}
    generated = started.then(on_gpu(function), inputs, outputs, **options)
    stopped = stop.click(None, cancels=[generated], **PRIVATE)
    for ended in (generated.success, generated.failure, stopped.then):
        ended(show_buttons(False), None, [start, stop], **PRIVATE)


def checkpoint_slider(store: ModelStore, demo: gr.Blocks) -> gr.Slider:
    """Return the slider of a running training's checkpoints, hidden if there is one model."""
    first, last, newest_step = store.step_range()
    with gr.Group(visible=store.follows):
        info = "The nearest saved checkpoint is used."
        checkpoint = slider(first, last, newest_step, 1, "Checkpoint (step)", info=info)
        newest = gr.Checkbox(True, label="Follow the newest")

    def refresh(value: object, follow: bool) -> gr.Slider:
        first, last, newest_step = store.step_range()
        if follow:
            return gr.Slider(minimum=first, maximum=last, value=newest_step)
        if value is None:  # the visitor has just emptied the number
            return gr.Slider(minimum=first, maximum=last)
        step = parse_integer("checkpoint", value, 0, MAX_SEED)
        # Gradio refuses a value outside the range, such as that of a deleted checkpoint.
        return gr.Slider(minimum=first, maximum=last, value=min(max(step, first), last))

    if store.follows:
        triggers = [gr.Timer(5).tick, demo.load]
        inputs = [checkpoint, newest]
        gr.on(triggers, report_errors(refresh), inputs, checkpoint, preprocess=False, **PRIVATE)
    return checkpoint


# ---- tabs


def create_tab(endpoints: Endpoints, session: InferenceSession, checkpoint: gr.Slider) -> None:
    """Add the tab that generates images."""
    narrow: dict[str, Any] = {"min_width": 120}
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            prompt = prompt_box("", placeholder="red heart", autofocus=True, elem_id="prompt")
            tokens = gr.Markdown("", elem_id="tokens")
            with gr.Row():
                buttons = start_and_stop("Generate", "generate")
            info = "How closely to follow the prompt. The guidance scale elsewhere is 1 + w."
            w = slider(-1, 10, session.pipe.config["w"], 0.25, "Guidance (w)", info=info)
            with gr.Row():
                images = slider(1, MAX_IMAGES, 1, 1, "Images", **narrow)
                steps = steps_slider(session, MAX_STEPS, **narrow)
            info = (
                "At n, samples several candidates with the network calls of n images and returns "
                "the one that the model finds likeliest. 1 is off."
            )
            options = {"info": info, "elem_id": "budget"}
            budget = slider(1, MAX_SEARCH_BUDGET, 1, 1, "Search budget", **options)
            with gr.Row():
                info = "Image 2 uses seed + 1, and so on."
                seed = gr.Number(0, label="Seed", info=info, elem_id="seed", **narrow)
                info = "Use a new seed every time, and show it."
                randomise = gr.Checkbox(True, label="Randomise", info=info, **narrow)
            with gr.Accordion("More", open=False):
                info = "1 is ancestral sampling (16), 0 is DDIM (19)."
                eta = slider(0, 1, 1, 0.05, "η", info=info)
                info = "What the image should not show."
                negative = prompt_box("", label="Negative prompt", info=info)
                with gr.Row():
                    low = slider(0, 1, 0, 0.05, "Guidance from noise level", **narrow)
                    high = slider(0, 1, 1, 0.05, "Guidance to noise level", **narrow)
                denoiser = denoiser_radio()
                label = "Restore the settings of a PNG"
                png = gr.File(label=label, file_types=[".png"], height=100, elem_id="restore")
        with gr.Column(scale=6, min_width=300):
            layout = {"columns": 2, "fit_columns": False, "height": 540, "elem_classes": "pixels"}
            gallery = gr.Gallery(label="Images", elem_id="gallery", **layout, **GALLERY)
            status = gr.Markdown("", elem_id="status")
            with gr.Accordion("Search", visible=False) as search:
                label = "Best score against network calls"
                curve = gr.Plot(label=label, elem_id="curve", **PLOT)
                gr.Markdown(
                    "The discarded candidates, best first, with their scores: the model's "
                    "log p(x | c) - log p(x) in nats."
                )
                discarded = image_strip("Discarded candidates", 4, "discarded")
            rows = [[example] for example in session.example_prompts()]
            gr.Examples(rows, prompt, label="Examples", examples_per_page=len(rows))

    sampling = [prompt, negative, w, steps, eta, images, seed]
    inputs = [*sampling, randomise, low, high, denoiser, checkpoint, budget]
    outputs = [gallery, status, seed, curve, discarded]
    connect_generate(prompt, buttons, endpoints.create, inputs, outputs)
    restored = [*sampling, low, high, budget, denoiser, randomise, status]
    png.upload(endpoints.restore_settings, [png, checkpoint], restored, **PRIVATE)

    def show_search(n: object) -> gr.Accordion:
        return gr.Accordion(visible=isinstance(n, int | float) and n > 1)

    budget.change(show_search, budget, search, preprocess=False, **PRIVATE)
    count = report_errors(session.token_counter())
    prompt.change(count, prompt, tokens, trigger_mode="always_last", **PRIVATE)


def sweep_tab(endpoints: Endpoints, session: InferenceSession, checkpoint: gr.Slider) -> None:
    """Add the tab that shows the same noise at six w."""
    ws = ", ".join(f"{w:g}" for w in SWEEP_WS)
    gr.Markdown(
        f"The same noise at w = {ws}. The prediction is {GUIDANCE_FORMULA}: w = -1 ignores the "
        "prompt and w = 0 is unguided. The guidance scale elsewhere is 1 + w."
    )
    with gr.Row():
        prompt = prompt_box(session.default_prompt(), scale=4, min_width=200)
        seed = gr.Number(0, label="Seed", scale=1, min_width=100)
        most = MAX_STEPS_PER_REQUEST // len(SWEEP_WS)
        steps = steps_slider(session, most, scale=2, min_width=140)
    with gr.Row():
        buttons = start_and_stop("Generate all six", "sweep")
    gallery = image_strip("One noise, six w", len(SWEEP_WS), "sweep-gallery")
    status = gr.Markdown("")
    label = "conditional (w = 0) | unconditional (w = -1)"
    options = {"format": "png", "height": 300, "interactive": False, "buttons": []}
    pair = gr.ImageSlider(label=label, elem_classes="pixels", **options)
    denoiser = denoiser_radio()

    inputs = [prompt, seed, steps, denoiser, checkpoint]
    connect_generate(prompt, buttons, endpoints.sweep, inputs, [gallery, status, pair])


def walk_tab(endpoints: Endpoints, session: InferenceSession, checkpoint: gr.Slider) -> None:
    """Add the tab that applies the lecture's equations to one image, forwards and backwards."""
    held_out = session.splits[1]
    captions = list(session.known_captions)
    if held_out is not None:
        captions += held_out.captions[:MAX_DATASET_CAPTIONS]
    curves = session.schedule_curves()
    gr.Markdown(
        "### Forwards: the direct jump (5) and the chain (1)\nBoth give x_t the same distribution. "
        "Beside them is each denoiser's prediction of x_0 (15). Where the network agrees with the "
        "exact denoiser it has memorised. Where it differs it generalises."
    )
    with gr.Row():
        wide: dict[str, Any] = {"scale": 3, "min_width": 200}
        value = session.default_prompt()
        picture = gr.Dropdown(captions, value=value, label="Image of the dataset", **wide)
        t = slider(1, session.T, max(session.T // 4, 1), 1, "t", **wide)
        seed = gr.Number(0, label="Seed", scale=1, min_width=100)
    tell = gr.Checkbox(False, label="Give the denoisers the caption")
    with gr.Accordion("Or an image of your own", open=False):
        kinds = [".png", ".jpg", ".jpeg"]
        upload = gr.File(label="PNG or JPEG, up to 2 MB", file_types=kinds, height=100)
    noise = gr.Button("Add noise", variant="primary", elem_id="noise")
    panels = image_strip("x_0, x_t and the predictions", 5, "forward-gallery")
    figure = plot_schedule(curves, t.value)
    plot = gr.Plot(figure, label="The schedule", elem_id="schedule", **PLOT)
    gr.Markdown(
        "### Backwards: the film strip of (16)\n"
        "From noise to an image by x_s = mean(x_t, x̂_0) + √variance · z."
    )
    with gr.Row():
        prompt = prompt_box(session.default_prompt(), scale=3, min_width=200)
        w = slider(-1, 10, session.pipe.config["w"], 0.25, "w", scale=2, min_width=140)
        steps = steps_slider(session, MAX_STEPS, scale=2, min_width=140)
        eta = slider(0, 1, 1, 0.05, "η", scale=1, min_width=160)
    denoiser = denoiser_radio()
    with gr.Row():
        buttons = start_and_stop("Denoise", "walk")
    gr.Markdown("x\\_t")
    noisy = image_strip("x_t", STRIP_COLUMNS, "strip")
    gr.Markdown("x̂\\_0, the current prediction (15)")
    clean = image_strip("x̂_0", STRIP_COLUMNS, "strip-clean")

    inputs = [picture, t, seed, tell, upload, checkpoint]
    noise.click(on_gpu(endpoints.forward), inputs, panels, api_name="forward", **MODEL_CALL)

    def mark_timestep(t: object) -> object:
        if t is None:  # the visitor has just emptied the number
            return gr.skip()
        return plot_schedule(curves, t)

    options = {"trigger_mode": "always_last", "preprocess": False, **PRIVATE}
    t.change(report_errors(mark_timestep), t, plot, **options)
    inputs = [prompt, w, steps, eta, seed, denoiser, checkpoint]
    connect_generate(prompt, buttons, endpoints.backward, inputs, [noisy, clean])


# ---- command line


def main(argv: list[str] | None = None) -> int:
    """Serve the demo until it is stopped; 2 is bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="direct-jump app", description="Serve the demo of a model.", allow_abbrev=False
    )
    add = parser.add_argument
    default = "the newest run, else pretrained/emoji, else the exact denoiser"
    model = "a run, a saved pipeline, or user/name[@revision] on the Hub"
    add("--model", help=f"{model} (default: {default})")
    # A Space sets GRADIO_SERVER_NAME.
    host = os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    add("--host", default=host, help="0.0.0.0 lets other machines connect (default: %(default)s)")
    add("--port", type=int, help="default: 7860, or the next free port")
    add("--device", help="cpu or cuda (default: the fastest)")
    args = parser.parse_args(argv)

    def run() -> None:
        require_free_address(args.host, args.port)
        try:
            store = ModelStore(args.model or default_model(), args.device)
            if "SPACE_ID" in os.environ:
                store.session().prepare()
            with temporary_cache() as folder:
                delete_on_sigterm(folder)
                serve(build_demo(store), args.host, args.port)
        except OSError as error:
            raise ValueError(f"The demo cannot start: {error}.") from error

    return run_cli(run, "the demo did not start.")


if __name__ == "__main__":
    sys.exit(main())
