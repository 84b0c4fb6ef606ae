"""The demo's back end: images for checked requests, and the lecture's panels.

Everything that takes long is a generator. Its reader can stop it between two network calls.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.dataset import CaptionedImages, load_splits
from pipeline.data.fingerprint import weights_digest
from pipeline.data.image_ops import as_float, decode
from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion.captions import normalize
from pipeline.diffusion.exact_denoiser import ExactDenoiser
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import Step, TextToImagePipeline
from pipeline.models.text_encoders import load_text_encoder
from pipeline.search.search import SearchState, calls_of_sample, current_x_0, search_steps
from pipeline.search.verifiers import LikelihoodVerifier
from pipeline.serving.png_metadata import model_identity, png_parameters, read_upload
from pipeline.serving.requests import DENOISERS, MAX_PROMPT_CHARACTERS, Request, quoted

EXAMPLES = (
    *("red heart", "green cat", "hot dog", "cat face", "woman astronaut", "blue apple", "rocket"),
    *("purple dog face", "red apple", "two hearts", "snowman", "yellow star"),
)
SWEEP_WS = (-1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
VERIFIER = LikelihoodVerifier(pairs=8)
# Colour values of the images that the exact denoiser knows: 10,922 images of 64 x 64 take 0.5 GB.
MAX_EXACT_VALUES = 2**27
DEADLINE = 120.0  # seconds for one request
PREVIEW_INTERVAL = 0.2  # seconds
STRIP_COLUMNS = 8
ENCODE_BATCH_SIZE = 64


@dataclass(frozen=True)
class Frame:
    """The state of a request: previews of x_0 (15), or in the last frame the images."""

    images: list[PIL.Image.Image]
    step: int  # network calls in a search
    steps: int
    calls: int  # network calls of all images; a guided step makes two
    seconds: float
    search: SearchState | None = None
    # The other candidates of a finished search, best first.
    discarded: list[PIL.Image.Image] = dataclasses.field(default_factory=list)

    @property
    def last(self) -> bool:
        """Whether the request is finished."""
        return self.step == self.steps if self.search is None else self.search.last


def exclusive(generate: Callable[..., Any]) -> Callable[..., Iterator]:
    """Wrap a generator method of a session so that it holds the session's lock during each step.

    Gradio's Stop frees the queue at once, but the interrupted step still runs in its thread. The
    lock makes the next request wait for it. An abandoned generator holds nothing.
    """

    @functools.wraps(generate)
    def locked(self: "InferenceSession", *args: object, **kwargs: object) -> Iterator:
        with contextlib.closing(generate(self, *args, **kwargs)) as items:
            while True:
                with self.lock:
                    item = next(items, None)
                if item is None:
                    return
                yield item

    return locked


class InferenceSession:
    """A pipeline and its dataset. It serves many requests, but runs one step at a time.

    trained: None leaves the exact denoiser of the dataset. data: read when first needed.
    """

    def __init__(self, trained: TextToImagePipeline | None, name: str, data: DataConfig):
        self.trained = trained
        self.name = name
        self.data = data
        self.lock = threading.Lock()

    # ---- models and data

    @functools.cached_property
    def identity(self) -> str:
        """The model's name and the digits of its weights, which reproduce an image."""
        if self.trained is None:
            return self.name
        return model_identity(self.name, weights_digest(self.trained.unet))

    @functools.cached_property
    def splits(self) -> tuple[CaptionedImages, CaptionedImages | None]:
        """The training images and the held-out images."""
        return load_splits(self.data)

    @functools.cached_property
    def exact(self) -> TextToImagePipeline:
        """The pipeline whose network is the exact E[x_0 | x_t] of the training images."""
        pipe = self.trained
        shared: dict[str, Any]
        if pipe is None:
            tokenizer, encoder = load_text_encoder("minilm")
            scheduler = DDPMScheduler(prediction_type="sample", timestep_spacing="trailing")
            shared = {"text_encoder": encoder, "tokenizer": tokenizer, "caption_length": 16}
        else:
            scheduler = pipe.scheduler
            components = ("text_encoder", "tokenizer", "vae", "whitening")
            shared = {name: getattr(pipe, name) for name in components}
            shared |= {name: pipe.config[name] for name in ("caption_length", "w")}
        device = torch.device("cpu") if pipe is None else pipe.device
        latents = []
        for rows in self.exact_rows.split(ENCODE_BATCH_SIZE):
            images = as_float(self.splits[0].images[rows].to(device))
            latents.append(images if pipe is None else pipe.encode(images))
        x_0 = torch.cat(latents)
        shared |= {"unet": ExactDenoiser(x_0, scheduler), "scheduler": scheduler}
        exact = TextToImagePipeline(**shared)

        def encode(texts: list[str]) -> Tensor:
            return exact.encode_prompt(texts, do_classifier_free_guidance=False)[0]

        starts = range(0, len(x_0), ENCODE_BATCH_SIZE)
        known = self.known_captions
        captions = torch.cat([encode(known[i : i + ENCODE_BATCH_SIZE]) for i in starts])
        exact.unet = ExactDenoiser(x_0, scheduler, captions, encode([""]))
        return exact

    @property
    def exact_rows(self) -> Tensor:
        """The rows of the training images that the exact denoiser knows, evenly spaced."""
        most = MAX_EXACT_VALUES // (3 * self.data.resolution**2)
        return evenly_spaced(max(most, 1), len(self.splits[0]))

    @functools.cached_property
    def known_captions(self) -> list[str]:
        """The captions that the exact denoiser knows."""
        captions = self.splits[0].captions
        return [captions[row] for row in self.exact_rows]

    def example_prompts(self) -> list[str]:
        """Return example prompts; without a trained model only those that the exact one knows."""
        if self.trained is not None:
            return list(EXAMPLES)
        known = sorted(self.known_captions)
        return [example for example in EXAMPLES if example in known] or known[:8]

    def default_prompt(self) -> str:
        """Return a prompt that every denoiser here knows."""
        known = self.known_captions
        return next((example for example in EXAMPLES if example in known), known[0])

    def prepare(self) -> None:
        """Read the dataset and compute the digest and the exact denoiser, which are kept.

        ZeroGPU takes the weights from the main process when the demo is launched.
        """
        _ = self.identity, self.splits, self.exact

    @property
    def pipe(self) -> TextToImagePipeline:
        """The trained pipeline, or the exact one if there is none."""
        return self.trained or self.exact

    @property
    def T(self) -> int:
        """The number of timesteps."""
        return len(self.pipe.scheduler)

    def select_pipeline(self, denoiser: str, *prompts: str) -> TextToImagePipeline:
        """Return a denoiser's pipeline; InputError if it cannot handle the prompts."""
        if denoiser not in DENOISERS:
            raise InputError(f"denoiser must be {' or '.join(DENOISERS)}, got {quoted(denoiser)}.")
        if denoiser == "network" and self.trained is not None:
            return self.trained
        captions = set(self.known_captions)
        for prompt in map(normalize, prompts):
            if prompt and prompt not in captions:
                similar = difflib.get_close_matches(prompt, captions, 3, 0.3)
                raise InputError(
                    f"The exact denoiser only knows its {len(captions)} captions, got "
                    f"{quoted(prompt)}. Try {', '.join(similar or sorted(captions)[:3])}."
                )
        return self.exact

    def token_counter(self) -> Callable[[str | None], str]:
        """Return `describe_tokens` for this model's tokenizer, without a reference to a network."""
        # A tokenizer shared by two threads confuses their padding settings.
        tokenizer = copy.deepcopy(self.pipe.tokenizer)
        return functools.partial(describe_tokens, tokenizer, self.pipe.config["caption_length"])

    # ---- generation

    @exclusive
    def create(self, request: Request, denoiser: str = "network") -> Iterator[Frame]:
        """Yield previews and then the images of a request; image i uses seed + i."""
        pipe = self.select_pipeline(denoiser, request.prompt, request.negative_prompt)
        if request.think > 1:
            yield from self._search(pipe, denoiser, request)
            return
        parameters = [self._parameters(request, denoiser, i) for i in range(request.images)]
        call = denoise_options(request) | {"num_images_per_prompt": request.images}
        yield from self._sample(pipe, parameters, call)

    @exclusive
    def sweep(self, request: Request, denoiser: str = "network") -> Iterator[Frame]:
        """Yield previews and then one image for each w of SWEEP_WS, all from the same noise."""
        pipe = self.select_pipeline(denoiser, request.prompt, request.negative_prompt)
        alone = [dataclasses.replace(request, w=w, images=1) for w in SWEEP_WS]
        parameters = [self._parameters(each, denoiser) for each in alone]
        generators = [torch.Generator().manual_seed(request.seed) for _ in SWEEP_WS]
        call = denoise_options(request) | {"seed": None, "generator": generators}
        call |= {"prompt": [request.prompt] * len(SWEEP_WS), "w": list(SWEEP_WS)}
        yield from self._sample(pipe, parameters, call)

    def _sample(
        self, pipe: TextToImagePipeline, parameters: list[str], call: dict[str, Any]
    ) -> Iterator[Frame]:
        """Yield the frames of one `denoise` call; the last images carry their parameters."""
        steps = pipe.denoise(**call)
        total = pipe.num_timesteps  # read now, because the next request changes it
        previewed = 0.0
        for i, step, calls, seconds in timed_steps(steps, pipe.unet):
            if i == total:
                images = to_images(pipe, step.x_t)
                for image, text in zip(images, parameters, strict=True):
                    image.info["parameters"] = text
            elif seconds - previewed < PREVIEW_INTERVAL:
                continue
            else:
                images = to_images(pipe, current_x_0(step))
            previewed = seconds
            yield Frame(images, i, total, calls, seconds)

    def _search(
        self, pipe: TextToImagePipeline, denoiser: str, request: Request
    ) -> Iterator[Frame]:
        """Yield the frames of a search; the last one has the best image and the others."""
        budget = request.think * calls_of_sample(pipe, request.weight, request.steps)
        call = denoise_options(request)
        call["steps"] = call.pop("num_inference_steps")
        states = search_steps(pipe, call.pop("prompt"), budget, VERIFIER, **call)
        previewed = 0.0
        for _, state, calls, seconds in timed_steps(states, pipe.unet):
            if not state.last and seconds - previewed < PREVIEW_INTERVAL:
                continue
            images = to_images(pipe, state.candidates)
            discarded = []
            if state.last:
                images[0].info["parameters"] = self._parameters(request, denoiser)
                for image, i in zip(images[1:], state.order.tolist()[1:], strict=True):
                    alone = dataclasses.replace(request, think=1, seed=request.seed + i)
                    image.info["parameters"] = self._parameters(alone, denoiser)
                discarded = images[1:]
                images = images[:1]
            previewed = seconds
            yield Frame(images, state.calls, state.total, calls, seconds, state, discarded)

    def _parameters(self, request: Request, denoiser: str, image: int = 0) -> str:
        """Return the JSON that reproduces an image."""
        model = self.identity if denoiser == "network" else self.name
        return json.dumps(png_parameters(request, denoiser, model, image), ensure_ascii=False)

    # ---- the lecture's panels

    @exclusive
    def backward(self, request: Request, denoiser: str = "network") -> Iterator[list[tuple]]:
        """Yield the film strip of one image so far: (t, x_t, x_0 of (15)), t as in the lecture."""
        pipe = self.select_pipeline(denoiser, request.prompt, request.negative_prompt)
        columns = torch.linspace(1, request.steps, min(STRIP_COLUMNS, request.steps))
        shown = set(columns.round().long().tolist())
        steps = pipe.denoise(**denoise_options(request))
        strip = []
        for i, step, _calls, _seconds in timed_steps(steps, pipe.unet):
            if i in shown:
                x_t = to_images(pipe, step.x_t)[0]
                x_0 = to_images(pipe, current_x_0(step))[0]
                strip.append((int(step.s) + 1, x_t, x_0))
                yield list(strip)

    def find_image(self, caption: str) -> Tensor:
        """Return the image (1, 3, H, W) of a caption, in [-1, 1]; InputError if there is none."""
        splits = [split for split in self.splits if split is not None]
        for split in splits:
            if caption in split.captions:
                return as_float(split.images[split.captions.index(caption)][None])
        total = sum(map(len, splits))
        raise InputError(f"picture must be one of {total} captions, got {quoted(caption)}.")

    @torch.no_grad()
    def forward(
        self, x_0: Tensor, t: int, seed: int, caption: str = ""
    ) -> dict[str, PIL.Image.Image]:
        """Return the panels of an image noised to t, and every denoiser's prediction, by name.

        x_0: (1, 3, H, W). t: as in the lecture. caption: the denoisers' caption of the image; the
        exact one gets none if it does not know the caption.
        """
        pipe = self.pipe
        generator = torch.Generator().manual_seed(seed)
        with self.lock:
            scheduler = pipe.scheduler
            z = pipe.encode(x_0.to(pipe.device))

            def noise() -> Tensor:
                return torch.randn(z.shape, generator=generator).to(z)

            jump = scheduler.add_noise(z, noise(), t - 1)
            chain = z
            for k in range(t):
                chain = scheduler.add_noise_step(chain, noise(), k)
            panels = {"x_0": z, "(5) direct jump": jump, "(1) chain": chain}
            for denoiser in DENOISERS if self.trained is not None else ("exact",):
                known = ["", *self.known_captions]
                unknown = denoiser == "exact" and normalize(caption) not in known
                predictor = self.select_pipeline(denoiser)
                states, _ = predictor.encode_prompt("" if unknown else caption)
                call = {"encoder_hidden_states": states, "return_dict": False}
                output = predictor.unet(jump, t - 1, **call)[0]
                name = f"(15) x̂_0, {denoiser}" + (", no caption" if unknown else "")
                panels[name] = scheduler.clip(scheduler.predict_x_0(output, t - 1, jump))
            return {name: to_images(pipe, x)[0] for name, x in panels.items()}

    def schedule_curves(self) -> dict[str, list[float]]:
        """Return beta_t, abar_t, the SNR and the posterior variance for t = 1 … T, by name."""
        scheduler = self.pipe.scheduler
        one = torch.zeros(1, dtype=torch.float64)
        t = torch.arange(self.T)
        abar = scheduler.abar(t, one)
        curves = {
            "β_t (1)": 1 - abar / scheduler.abar(t - 1, one),
            "ᾱ_t (4)": abar,
            "SNR = ᾱ_t / (1 - ᾱ_t)": scheduler.snr(t, one),
            "β̃_t (9)": scheduler.posterior(one, one, t, t - 1)[1],
        }
        return {name: values.flatten().tolist() for name, values in curves.items()}


def denoise_options(request: Request) -> dict[str, Any]:
    """Return the arguments of `pipe.denoise` for one image of a request."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or None,
        "w": request.weight,
        "num_inference_steps": request.steps,
        "eta": request.eta,
        "seed": request.seed,
    }


def describe_tokens(tokenizer, length: int | None, prompt: str | None) -> str:  # noqa: ANN001
    """Return how many tokens a prompt has, and the text that does not fit.

    length: the tokens of a caption; None is the tokenizer's own limit.
    """
    text = normalize((prompt or "")[:MAX_PROMPT_CHARACTERS])
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    limit = (length or tokenizer.model_max_length) - tokenizer.num_special_tokens_to_add()
    cut = f"; left out: {tokenizer.decode(ids[limit:])}" if len(ids) > limit else ""
    return f"{len(ids)} of {limit} tokens{cut}"


def timed_steps(
    steps: Iterator[Step] | Iterator[SearchState], network: torch.nn.Module
) -> Iterator[tuple]:
    """Yield (i, step, network calls so far, seconds so far), i from 1; InputError at the deadline.

    A call on n images counts n times.
    """
    start = time.monotonic()
    calls = 0

    def count(_network: torch.nn.Module, args: tuple, _output: object) -> None:
        nonlocal calls
        calls += len(args[0])

    for i in itertools.count(1):
        # Registered for one step only, because other requests may run between two steps.
        with network.register_forward_hook(count):
            step = next(steps, None)
        if step is None:
            return
        seconds = time.monotonic() - start
        if seconds > DEADLINE:
            raise InputError(f"The request took longer than {DEADLINE:g} s. Use fewer steps.")
        yield i, step, calls, seconds


def to_images(pipe: TextToImagePipeline, x: Tensor) -> list[PIL.Image.Image]:
    """Return the decoded images of latents (B, c, h, w)."""
    images: Any = pipe.image_processor.postprocess(pipe.decode(x), output_type="pil")
    return images


def load_uploaded_image(path: str | Path, resolution: int) -> Tensor:
    """Return an uploaded image (1, 3, resolution, resolution) in [-1, 1]; InputError otherwise."""
    content = read_upload(path, ("PNG", "JPEG"))
    try:
        pixels = decode(content, resolution)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow, for a truncated file
        raise InputError("The image is damaged. Save it again.") from error
    return as_float(torch.from_numpy(pixels.copy())[None])
