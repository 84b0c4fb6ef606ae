"""What the web page does, without the page: checked requests, pictures that carry their settings, the lecture's panels.

Whatever takes long is a generator, so that its reader can stop it between two network calls.
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

SWEEP_WS = (-1.0, 0.0, 1.0, 2.0, 4.0, 8.0)  # the w of "what w does"
VERIFIER = LikelihoodVerifier(
    pairs=8
)  # what chooses among the candidates of a request that thinks longer
MAX_EXACT_VALUES = (
    2**27
)  # colour values of the pictures that the exact denoiser knows, 10,922 pictures of 64 x 64: 0.5 GB
DEADLINE = 120.0  # seconds of one request
PREVIEW_INTERVAL = 0.2  # seconds between two previews
STRIP_COLUMNS = 8  # of a film strip


@dataclass(frozen=True)
class Frame:
    """How far a request is: previews of x_0 (15), or at the end the pictures, with what it has cost."""

    images: list[PIL.Image.Image]
    step: int  # of a search, network calls
    steps: int
    calls: int  # network calls, a doubled one is two, summed over the pictures
    seconds: float
    found: SearchState | None = None  # by a search
    discarded: list[PIL.Image.Image] = dataclasses.field(
        default_factory=list
    )  # at its end, best first

    @property
    def last(self) -> bool:
        """Are these the pictures?"""
        return self.step == self.steps if self.found is None else self.found.last


def exclusive(draw: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """A generator of Studio's, each step of which has the networks to itself.

    Gradio's Stop frees the page at once, and the step that it interrupts goes on in its thread: the next request waits for it.
    Between steps nothing is held, so that one that is left and never closed is in nobody's way.
    """

    @functools.wraps(draw)
    def steps(self, *args, **kwargs):
        with contextlib.closing(draw(self, *args, **kwargs)) as found:
            while True:
                with self.turn:
                    one = next(found, None)
                if one is None:
                    return
                yield one

    return steps


class InferenceSession:
    """A pipeline with the picture set it is compared to, drawing what requests ask for, one step of one request at a time.

    pipe: None leaves the exact denoiser of the set alone. `source` names the set; it is read when first needed.
    """

    def __init__(self, pipe: TextToImagePipeline | None, name: str, source: DataConfig):
        self.network, self.name, self.source, self.turn = pipe, name, source, threading.Lock()

    # -- the models

    @functools.cached_property
    def identity(self) -> str:
        """The name with digits of the network's weights: what draws a picture again."""
        return (
            self.name
            if self.network is None
            else model_identity(self.name, weights_digest(self.network.unet))
        )

    @functools.cached_property
    def set(self) -> tuple[CaptionedImages, CaptionedImages | None]:
        """The training pictures and the held-out ones."""
        return load_splits(self.source)

    @functools.cached_property
    def exact(self) -> TextToImagePipeline:
        """The pipeline with E[x_0 | x_t] of the training pictures for its network (`exact.py`)."""
        pipe, (train, _held_out), rows = self.network, self.set, self.rows
        if pipe is None:
            tokenizer, encoder = load_text_encoder("minilm")
            scheduler = DDPMScheduler(prediction_type="sample", timestep_spacing="trailing")
            shared = {"text_encoder": encoder, "tokenizer": tokenizer, "caption_length": 16}
        else:
            scheduler = pipe.scheduler
            shared = {
                name: getattr(pipe, name)
                for name in ("text_encoder", "tokenizer", "vae", "whitening")
            }
            shared |= {name: pipe.config[name] for name in ("caption_length", "w")}
        parts = (as_float(train.images[some].to(self.device)) for some in rows.split(64))
        x_0 = torch.cat([some if pipe is None else pipe.encode(some) for some in parts])
        exact = TextToImagePipeline(ExactDenoiser(x_0, scheduler), scheduler, **shared)
        states = lambda texts: exact.encode_prompt(texts, do_classifier_free_guidance=False)[0]
        captions = torch.cat([states(self.known[i : i + 64]) for i in range(0, len(rows), 64)])
        exact.unet = ExactDenoiser(x_0, scheduler, captions, states([""]))
        return exact

    @property
    def rows(self) -> Tensor:
        """The training pictures that the exact denoiser knows: all, of a large set so many, evenly spread."""
        return evenly_spaced(
            max(MAX_EXACT_VALUES // (3 * self.source.resolution**2), 1), len(self.set[0])
        )

    @functools.cached_property
    def known(self) -> list[str]:
        """The captions of the pictures that the exact denoiser knows."""
        captions = self.set[0].captions
        return [captions[row] for row in self.rows]

    @property
    def device(self) -> torch.device:
        """Where it draws: the network's device, the CPU where there is none."""
        return torch.device("cpu") if self.network is None else self.network.device

    @property
    def pipe(self) -> TextToImagePipeline:
        """The pipeline that draws: the network's, or the exact one where there is none."""
        return self.network or self.exact

    @property
    def T(self) -> int:
        """The number of timesteps."""
        return len(self.pipe.scheduler)

    def chosen(self, denoiser: str, *prompts: str) -> TextToImagePipeline:
        """The pipeline of a denoiser's name, once it can draw these prompts."""
        if denoiser not in DENOISERS:
            raise InputError(
                f"denoiser is {quoted(denoiser)}, expected one of {', '.join(DENOISERS)}"
            )
        if denoiser == "network" and self.network is not None:
            return self.network
        captions = set(self.known)
        for prompt in map(normalize, prompts):
            if prompt and prompt not in captions:
                near = difflib.get_close_matches(prompt, captions, 3, 0.3)
                raise InputError(
                    f"the exact denoiser knows the {len(captions)} names of its pictures and nothing else, and "
                    f"{quoted(prompt)} is none of them: try {', '.join(near or sorted(captions)[:3])}"
                )
        return self.exact

    # -- drawing

    @exclusive
    def create(self, request: Request, denoiser: str = "network") -> Iterator[Frame]:
        """The pictures of a request, previews first; picture i draws from seed + i."""
        pipe = self.chosen(denoiser, request.prompt, request.negative_prompt)
        if request.think > 1:
            yield from self._searched(pipe, denoiser, request)
            return
        signatures = [self._signature(request, denoiser, i) for i in range(request.images)]
        yield from self._drawn(
            pipe,
            signatures,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or None,
            w=request.weight,
            num_inference_steps=request.steps,
            eta=request.eta,
            seed=request.seed,
            num_images_per_prompt=request.images,
        )

    @exclusive
    def sweep(self, request: Request, denoiser: str = "network") -> Iterator[Frame]:
        """One picture for each w of SWEEP, all from the same noise."""
        pipe, n = self.chosen(denoiser, request.prompt, request.negative_prompt), len(SWEEP_WS)
        signatures = [
            self._signature(dataclasses.replace(request, w=w, images=1), denoiser) for w in SWEEP_WS
        ]
        yield from self._drawn(
            pipe,
            signatures,
            prompt=[request.prompt] * n,
            negative_prompt=request.negative_prompt or None,
            w=list(SWEEP_WS),
            num_inference_steps=request.steps,
            eta=request.eta,
            generator=[torch.Generator().manual_seed(request.seed) for _ in range(n)],
        )

    def _searched(self, pipe, denoiser: str, request: Request) -> Iterator[Frame]:
        """The frames of a search, the best picture in the last one, and beside it the others with what draws each alone."""
        budget, seen = (
            request.think * calls_of_sample(pipe, request.weight, request.steps),
            0.0,
        )
        stages = search_steps(
            pipe,
            request.prompt,
            budget,
            VERIFIER,
            negative_prompt=request.negative_prompt or None,
            w=request.weight,
            steps=request.steps,
            eta=request.eta,
            seed=request.seed,
        )
        for _, found, calls, seconds in timed_steps(stages, pipe.unet):
            if not found.last and seconds - seen < PREVIEW_INTERVAL:
                continue
            images, seen, discarded = to_images(pipe, found.candidates), seconds, []
            if found.last:
                alone = [
                    dataclasses.replace(request, think=1, seed=request.seed + i)
                    for i in found.order.tolist()
                ]
                for image, own in zip(images, [request, *alone[1:]], strict=True):
                    image.info["parameters"] = self._signature(own, denoiser)
                images, discarded = images[:1], images[1:]
            yield Frame(images, found.calls, found.total, calls, seconds, found, discarded)

    def _signature(self, request: Request, denoiser: str, image: int = 0) -> str:
        """What a picture carries, which draws it again."""
        model = self.identity if denoiser == "network" else self.name
        return json.dumps(png_parameters(request, denoiser, model, image), ensure_ascii=False)

    def _drawn(self, pipe, signatures: list[str], **call) -> Iterator[Frame]:
        """The frames of one call, the pictures of the last one signed."""
        steps, seen = pipe.denoise(**call), 0.0
        total = pipe.num_timesteps  # asked once: the next request's call has another
        for i, step, calls, seconds in timed_steps(steps, pipe.unet):
            last = i == total
            if not last and seconds - seen < PREVIEW_INTERVAL:
                continue
            images, seen = to_images(pipe, step.x_t if last else current_x_0(step)), seconds
            for image, own in zip(images, signatures if last else [], strict=last):
                image.info["parameters"] = own
            yield Frame(images, i, total, calls, seconds)

    @exclusive
    def backward(self, request: Request, denoiser: str = "network") -> Iterator[list[tuple]]:
        """The film strip of one picture so far: (t, x_t, x_0 of (15)) at COLUMNS timesteps, t in the lecture's count."""
        pipe, strip = self.chosen(denoiser, request.prompt, request.negative_prompt), []
        kept = set(
            torch.linspace(1, request.steps, min(STRIP_COLUMNS, request.steps))
            .round()
            .long()
            .tolist()
        )
        steps = pipe.denoise(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            w=request.weight,
            seed=request.seed,
            num_inference_steps=request.steps,
            eta=request.eta,
        )
        for i, step, _calls, _seconds in timed_steps(steps, pipe.unet):
            if i in kept:
                strip.append(
                    (
                        int(step.s) + 1,
                        to_images(pipe, step.x_t)[0],
                        to_images(pipe, current_x_0(step))[0],
                    )
                )
                yield list(strip)

    # -- the lecture, panel by panel

    def named(self, caption: str) -> Tensor:
        """The picture of a caption (1, 3, H, W) in [-1, 1], trained on or held out."""
        for split in filter(None, self.set):
            if caption in split.captions:
                return as_float(split.images[split.captions.index(caption)][None])
        raise InputError(
            f"picture is {quoted(caption)}, expected one of the set's {sum(map(len, filter(None, self.set)))} names"
        )

    @torch.no_grad()
    def forward(
        self, x_0: Tensor, t: int, seed: int, caption: str = ""
    ) -> dict[str, PIL.Image.Image]:
        """A picture (1, 3, H, W) noised to the lecture's t, by (5) and by t steps of (1), and what each denoiser makes of it.

        The keys name the panels. `caption` is what the denoisers are told of the picture, "" nothing; the exact one is not told
        of a picture that it does not know.
        """
        pipe, generator = self.pipe, torch.Generator().manual_seed(seed)
        with self.turn:
            scheduler, z = pipe.scheduler, pipe.encode(x_0.to(pipe.device))
            noise = lambda: torch.randn(z.shape, generator=generator).to(z)
            jump, chain = scheduler.add_noise(z, noise(), t - 1), z
            for k in range(t):
                chain = scheduler.add_noise_step(chain, noise(), k)
            panels = {"x_0": z, "(5) the jump": jump, "(1) the chain": chain}
            for denoiser in DENOISERS if self.network is not None else ("exact",):
                unknown = denoiser == "exact" and normalize(caption) not in (*self.known, "")
                chosen, told = self.chosen(denoiser), "" if unknown else caption
                states, _ = chosen.encode_prompt(told)
                output = chosen.unet(jump, t - 1, encoder_hidden_states=states, return_dict=False)[
                    0
                ]
                name = f"(15) x̂_0, {denoiser}" + (", not told" if unknown else "")
                panels[name] = scheduler.clip(scheduler.predict_x_0(output, t - 1, jump))
            return {name: to_images(pipe, x)[0] for name, x in panels.items()}

    def curves(self) -> dict[str, list[float]]:
        """beta_t, abar_t, the SNR and the posterior's variance by the lecture's t = 1 … T, with their equations' numbers."""
        scheduler, one = self.pipe.scheduler, torch.zeros(1, dtype=torch.float64)
        t = torch.arange(self.T)
        abar, (_mean, variance) = scheduler.abar(t, one), scheduler.posterior(one, one, t, t - 1)
        found = {
            "β_t (1)": 1 - abar / scheduler.abar(t - 1, one),
            "ᾱ_t (4)": abar,
            "SNR = ᾱ_t / (1 - ᾱ_t)": scheduler.snr(t, one),
            "β̃_t (9)": variance,
        }
        return {name: values.flatten().tolist() for name, values in found.items()}

    @functools.cached_property
    def _counting(self):
        """A tokenizer of its own: one that two threads share forgets in one how the other wants its captions padded."""
        return copy.deepcopy(self.pipe.tokenizer)

    @property
    def tokens(self) -> Callable[[str | None], str]:
        """`counted` of a prompt; whoever keeps it keeps no network."""
        return functools.partial(describe_tokens, self._counting, self.pipe.config.caption_length)


def describe_tokens(tokenizer, length: int | None, prompt: str | None) -> str:
    """How many tokens a prompt has, and what is cut off it for a caption of a length (None is the tokenizer's own)."""
    ids = tokenizer(
        normalize((prompt or "")[:MAX_PROMPT_CHARACTERS]), add_special_tokens=False, verbose=False
    ).input_ids
    room = (length or tokenizer.model_max_length) - tokenizer.num_special_tokens_to_add()
    cut = f"; left out: {tokenizer.decode(ids[room:])}" if len(ids) > room else ""
    return f"{len(ids)} of {room} tokens{cut}"


@contextlib.contextmanager
def count_calls(network: torch.nn.Module) -> Iterator[list[int]]:
    """The number of pictures in each call of a network, while this is open."""
    calls = []
    hook = network.register_forward_hook(lambda _network, args, _out: calls.append(len(args[0])))
    try:
        yield calls
    finally:
        hook.remove()


def timed_steps(
    steps: Iterator[Step | SearchState], network
) -> Iterator[tuple[int, Step | SearchState, int, float]]:
    """The steps of a sampling loop or a search, counted from 1, with the network's calls and the seconds so far.

    InputError at the deadline.
    """
    began, calls = time.monotonic(), 0
    for i in itertools.count(1):
        with count_calls(
            network
        ) as own:  # open for this step alone: between two of them others may draw
            step = next(steps, None)
        if step is None:
            return
        calls, seconds = calls + sum(own), time.monotonic() - began
        if seconds > DEADLINE:
            raise InputError(
                f"this took longer than the {DEADLINE:g} s that one request may: ask for fewer steps"
            )
        yield i, step, calls, seconds


def to_images(pipe: TextToImagePipeline, x: Tensor) -> list[PIL.Image.Image]:
    """What the network draws (B, c, h, w) as pictures."""
    return pipe.image_processor.postprocess(pipe.decode(x), output_type="pil")


# ---- files that people drop on the page


def load_uploaded_image(path: str | Path, resolution: int) -> Tensor:
    """A dropped picture (1, 3, resolution, resolution) in [-1, 1]; InputError where it is none."""
    content = read_upload(path, ("PNG", "JPEG"))
    try:
        pixels = decode(content, resolution)
    except (
        OSError,
        SyntaxError,
        ValueError,
    ) as error:  # what Pillow says to a picture that breaks off
        raise InputError("the picture is damaged, expected a whole one: save it again") from error
    return as_float(torch.from_numpy(pixels.copy())[None])
