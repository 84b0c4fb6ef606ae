"""The demo's HTTP API. Names, parameters and docstrings here are what clients see.

Values arrive unchecked, because a browser or a script may send anything.
"""

import dataclasses
import random
from collections.abc import Iterator

import gradio as gr

from pipeline.hub.model_card import inline_code
from pipeline.serving.errors import report_errors
from pipeline.serving.model_store import ModelStore
from pipeline.serving.plots import plot_search
from pipeline.serving.png_metadata import read_png, same_model
from pipeline.serving.requests import MAX_SEED, Request, parse_integer, parse_text
from pipeline.serving.session import SWEEP_WS, Frame, load_uploaded_image


class Endpoints:
    """Answers to the demo's requests, with the models of a store."""

    def __init__(self, store: ModelStore):
        self.store = store

    @report_errors
    def create(
        self,
        prompt: str,
        negative_prompt: str,
        w: float,
        steps: int,
        eta: float,
        images: int,
        seed: int,
        randomise: bool,
        low: float,
        high: float,
        denoiser: str,
        checkpoint: int,
        think: int,
    ) -> Iterator[tuple]:
        """Generate images of a prompt: (images, status, seed, curve, discarded).

        w is the guidance weight of the lecture; guidance_scale is 1 + w. eta is 1 for ancestral
        sampling, 0 for DDIM. think = n spends the network calls of n images on a search for one
        image, which the model itself scores: curve plots the best score against the calls,
        discarded has the other candidates.
        """
        session = self.store.session(checkpoint)
        if randomise is True:
            seed = random.randrange(2**31)
        raw = {"prompt": prompt, "negative_prompt": negative_prompt, "w": w, "steps": steps}
        raw |= {"eta": eta, "images": images, "seed": seed, "low": low, "high": high}
        raw |= {"think": think}
        request = Request.read(raw, session.T)
        for frame in session.create(request, denoiser):
            shown = frame.images
            if frame.last:
                # The captions are the images' alternative texts.
                name = request.prompt or "∅"
                shown = [(x, f"{name}, seed {request.seed + i}") for i, x in enumerate(shown)]
            status = f"{format_progress(frame)} · seed {request.seed}"
            yield shown, status, request.seed, *search_panels(frame)

    @report_errors
    def restore_settings(self, path: str, checkpoint: int) -> tuple:
        """Return the settings in a PNG, in the order of `Request`, the denoiser, and a message."""
        session = self.store.session(checkpoint)
        request, denoiser, model = read_png(path, session.T)
        message = ""
        if model != session.name and not same_model(model, session.identity):
            message = (
                f"`{inline_code(model[:80])}` generated that image. "
                f"`{inline_code(session.identity)}` will generate another one."
            )
        randomise = False
        return *dataclasses.astuple(request), denoiser, randomise, message

    @report_errors
    def sweep(
        self, prompt: str, seed: int, steps: int, denoiser: str, checkpoint: int
    ) -> Iterator[tuple]:
        """Generate a prompt at w = -1, 0, 1, 2, 4, 8 from the same noise: (images, status, pair).

        pair has the images of w = 0 and w = -1.
        """
        session = self.store.session(checkpoint)
        raw = {"prompt": prompt, "seed": seed, "steps": steps}
        request = Request.read(raw, session.T, rows=len(SWEEP_WS))
        for frame in session.sweep(request, denoiser):
            by_w = dict(zip(SWEEP_WS, frame.images, strict=True))
            labelled = [(image, f"w = {w:g}") for w, image in by_w.items()]
            pair = (by_w[0], by_w[-1]) if frame.last else gr.skip()
            yield labelled, format_progress(frame), pair

    @report_errors
    def forward(
        self, picture: str, t: int, seed: int, tell: bool, upload: dict | None, checkpoint: int
    ) -> list[tuple]:
        """Noise an image to t and predict x_0 from it: the panels with their names.

        picture is the caption of an image of the dataset; upload takes its place. tell passes the
        caption to the denoisers.
        """
        session = self.store.session(checkpoint)
        t = parse_integer("t", t, 1, session.T)
        seed = parse_integer("seed", seed, 0, MAX_SEED)
        caption = parse_text("picture", picture)
        if upload:
            x_0 = load_uploaded_image(upload["path"], session.data.resolution)
        else:
            x_0 = session.find_image(caption)
        told = caption if tell is True and not upload else ""
        panels = session.forward(x_0, t, seed, told)
        return [(image, name) for name, image in panels.items()]

    @report_errors
    def backward(
        self,
        prompt: str,
        w: float,
        steps: int,
        eta: float,
        seed: int,
        denoiser: str,
        checkpoint: int,
    ) -> Iterator[tuple]:
        """Generate an image of a prompt and show the way: (strip of x_t, strip of x_0)."""
        session = self.store.session(checkpoint)
        raw = {"prompt": prompt, "w": w, "steps": steps, "eta": eta, "seed": seed}
        request = Request.read(raw, session.T)
        for strip in session.backward(request, denoiser):
            noisy = [(x_t, f"t = {t}") for t, x_t, _ in strip]
            clean = [(x_0, f"t = {t}") for t, _, x_0 in strip]
            yield noisy, clean


def format_progress(frame: Frame) -> str:
    """Return how far a request is and what it has cost."""
    cost = f"{frame.seconds:.1f} s · {frame.calls} network calls"
    if not frame.last:
        unit = "step" if frame.search is None else "call"
        return f"{unit} {frame.step} of {frame.steps} · {cost}"
    if frame.search is None:
        return cost
    candidates = len(frame.search.candidates)
    found = f"best of {candidates}" if candidates > 1 else "budget too small for a second candidate"
    return f"{found} · {cost}"


def search_panels(frame: Frame) -> tuple:
    """Return the plot of a search so far, and at its end the discarded candidates with scores."""
    if frame.search is None or not frame.search.curve:
        return None, []
    scores = frame.search.scores[1:].tolist()
    captions = [f"{score:.4g}" for score in scores[: len(frame.discarded)]]
    return plot_search(frame.search), list(zip(frame.discarded, captions, strict=True))
