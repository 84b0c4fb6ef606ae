"""From a prompt to an image: captions, the sampling loop of (16) under guidance (17), the picture."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import USE_PEFT_BACKEND, logging, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .captions import last_hidden_states, normalize
from .guidance import InputError, Weight, guide, prompt_weights, shift_weight, w_from_guidance_scale
from .hub_format import HubFormat

logger = logging.get_logger(__name__)

VAE_BATCH_SIZE = 8  # images that a VAE encodes or decodes at once
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class Step:
    """One transition of the sampling loop; what its reader writes to it, the loop goes on with."""

    t: Tensor  # the timestep left, 0-d
    s: Tensor  # the timestep reached, 0-d; -1 is the clean image
    x_t: Tensor  # (B, c, h, w) at s
    x_0_hat: Tensor | None  # (B, c, h, w), (15); None where the scheduler does not say
    captions: Tensor  # (B, L, D)
    empty: Tensor | None  # (B, L, D)
    w: Weight


class TextToImagePipeline(HubFormat, DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Images for captions, by a diffusion model in pixels (`vae=None`), in patches or in an autoencoder's latents.

    LoRA files go in and out as in Stable Diffusion: `load_lora_weights`, `fuse_lora`, `unload_lora_weights`.

    whitening: CaptionWhitening, or None where the network takes the text encoder's states as they are.
    caption_length: tokens every caption is padded or cut to; None is the tokenizer's own. caption_dropout: the rate that
    the network was trained with; None is unknown. w: the guidance used when a call names none.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _exclude_from_cpu_offload: ClassVar[list[str]] = [
        "whitening"
    ]  # it has no parameter, by which offloading finds a device
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "vae", "whitening"]
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    ]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vae: AutoencoderKL | AutoencoderTiny | ModelMixin | None = None,
        whitening: ModelMixin | None = None,
        caption_length: int | None = None,
        caption_dropout: float | None = None,
        w: float = 0.0,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            whitening=whitening,
        )
        self.register_to_config(caption_length=caption_length, caption_dropout=caption_dropout, w=w)
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale, self._num_timesteps, self._interrupt = shift_weight(w, 1), 0, False

    @property
    def guidance_scale(self) -> Weight:
        """diffusers' s = 1 + w of the call that runs, or of the last one; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """How many transitions the call makes."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call is to stop after this step; a callback sets `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: Weight | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        *,
        w: Weight | None = None,
        seed: int | None = None,
        timesteps: list[int] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw images; see `denoise` for what decides them.

        output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent" (B, c, h, w), undecoded.
        callback_on_step_end(pipe, i, t, tensors) is called after every step with the tensors that
        callback_on_step_end_tensor_inputs names, or one of diffusers' own callbacks, and returns a dict of those it changed.
        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(
                f"output_type is {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}: pass one of them"
            )
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = [
            k for k in callback_on_step_end_tensor_inputs if k not in self._callback_tensor_inputs
        ]
        if unknown:
            raise InputError(
                f"callback_on_step_end_tensor_inputs names {', '.join(unknown)}, expected some of "
                f"{', '.join(self._callback_tensor_inputs)}: leave the others out"
            )
        steps = self.denoise(
            prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            w=w,
            guidance_scale=guidance_scale,
            eta=eta,
            seed=seed,
            generator=generator,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        try:
            with self.progress_bar(total=self.num_timesteps) as bar:
                for i, step in enumerate(steps):
                    if callback_on_step_end is not None:
                        self._report(
                            step, i, callback_on_step_end, callback_on_step_end_tensor_inputs
                        )
                    bar.update()
                    if self.interrupt:
                        break
            x = step.x_t if output_type == "latent" else self.decode(step.x_t)
        finally:
            self.maybe_free_model_hooks()
        images = (
            x
            if output_type == "latent"
            else self.image_processor.postprocess(x, output_type=output_type)
        )
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _report(
        self, step: Step, i: int, callback: Callable, names: tuple[str, ...] | list[str]
    ) -> None:
        """Call diffusers' callback, and write what it changed to the step."""
        fields = {"latents": "x_t", "prompt_embeds": "captions", "negative_prompt_embeds": "empty"}
        scale = self._guidance_scale
        before = scale.clone() if isinstance(scale, Tensor) else scale
        changed = (
            callback(self, i, step.t, {name: getattr(step, fields[name]) for name in names}) or {}
        )
        for name, field in fields.items():
            had, new = getattr(step, field), changed.get(name, getattr(step, field))
            if had is not None and new is not None and new.shape != had.shape:
                raise InputError(
                    f"the callback gave {name} of shape {tuple(new.shape)}, expected {tuple(had.shape)}: a row an "
                    "image here, and `_guidance_scale` alone switches guidance"
                )
            setattr(step, field, new)
        in_place = isinstance(scale, Tensor) and not torch.equal(scale, before)  # by `+=`
        if self._guidance_scale is not scale or in_place:
            step.w = w_from_guidance_scale(self._guidance_scale)

    def denoise(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        w: Weight | None = None,
        guidance_scale: Weight | None = None,
        eta: float | None = None,
        seed: int | None = None,
        generator: Generator | list[Generator] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
    ) -> Iterator[Step]:
        """The sampling loop (16), one `Step` at a time, once the request has been checked.

        w: the weight of (17), a number, one per prompt or a function of the noise level; guidance_scale is 1 + w, and
        neither means the pipeline's own. eta: from 0 (deterministic) to 1 (ancestral), for schedulers that take it (19).
        seed: image i draws from its own seed + i on the CPU; a list of generators is one an image, a single one draws for
        all of them jointly, as diffusers does. Without either each image's noise is new, whatever `torch.manual_seed` was
        told. negative_prompt replaces the empty caption. latents: x_T (B, c, h, w) of
        unit variance. prompt_embeds: caption states (B, L, D) instead of a prompt. cross_attention_kwargs: scale is that of
        LoRA layers, in the network and in the text encoder. Bad requests raise InputError.
        """
        prompts = self._count(prompt, prompt_embeds)
        if not is_int(num_images_per_prompt) or num_images_per_prompt < 1:
            raise InputError(
                f"num_images_per_prompt is {num_images_per_prompt!r}, expected a whole number from 1: pass 1"
            )
        w, device = self._weight(w, guidance_scale, prompts), self._execution_device
        scheduler = self.prepare_scheduler(num_inference_steps, timesteps, device)
        plan_w = [weights_at(w, prompts, scheduler, t) for t in scheduler.timesteps]
        guided = any(bool((w_t != 0).any()) for w_t in plan_w)
        B = prompts * num_images_per_prompt
        generator = make_generators(B, seed, generator)
        step_kwargs = prepare_extra_step_kwargs(scheduler, generator, eta)
        x_t = self._noise(B, height, width, generator, latents, device) * scheduler.init_noise_sigma
        both = (
            guided
            or negative_prompt_embeds is not None
            or (prompt_embeds is None and self.text_encoder is not None)
        )
        with scaled_lora(self.text_encoder, (cross_attention_kwargs or {}).get("scale")):
            captions, empty = self.encode_prompt(
                prompt,
                device,
                num_images_per_prompt,
                both,
                negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
            )
        if guided and self.config.caption_dropout == 0:
            logger.warning(
                "This model was trained without caption dropout, so its unconditional prediction means nothing: "
                "w is best left at 0."
            )
        self._guidance_scale, self._num_timesteps, self._interrupt = (
            shift_weight(w, 1),
            len(scheduler.timesteps),
            False,
        )
        unet_kwargs = (
            {}
            if cross_attention_kwargs is None
            else {"cross_attention_kwargs": cross_attention_kwargs}
        )
        return self._steps(scheduler, x_t, captions, empty, w, prompts, step_kwargs, unet_kwargs)

    @torch.no_grad()
    def _steps(
        self, scheduler, x_t, captions, empty, w, prompts, step_kwargs, unet_kwargs
    ) -> Iterator[Step]:
        """x_{t-1} = mean(x_t, x_0_hat) + sqrt(variance) z for every t of the plan, (16) under (17)."""
        plan = zip(
            scheduler.timesteps,
            [*scheduler.timesteps[1:], scheduler.timesteps.new_tensor(-1)],
            strict=True,
        )
        dtype = self.unet.dtype  # asked once: diffusers walks through every module to tell
        for t, s in plan:
            w_t = weights_at(w, prompts, scheduler, t)
            w_t = w_t.repeat_interleave(len(x_t) // prompts).to(x_t)
            eps_hat = self._predict(
                scheduler.scale_model_input(x_t, t), t, captions, empty, w_t, dtype, unet_kwargs
            )  # (17)
            out = scheduler.step(eps_hat, t, x_t, **step_kwargs)  # (15), (8), (9), (16)
            step = Step(
                t,
                s,
                out.prev_sample,
                getattr(out, "pred_original_sample", None),
                captions,
                empty,
                w,
            )
            yield step
            x_t, captions, empty, w = step.x_t, step.captions, step.empty, step.w

    def _predict(
        self,
        x_t: Tensor,
        t: Tensor,
        captions: Tensor,
        empty: Tensor | None,
        w: Tensor,
        dtype: torch.dtype,
        unet_kwargs: dict,
    ) -> Tensor:
        """The guided prediction (B, ...): one network call on the conditional rows (w != -1) and the unconditional (w != 0)."""
        c, u = (w != -1).nonzero().flatten(), (w != 0).nonzero().flatten()
        if len(u) and empty is None:
            raise InputError(
                "there are no states of the empty caption to guide by: pass negative_prompt_embeds, or w=0"
            )
        states = torch.cat([empty[u], captions[c]]) if len(u) else captions
        out = self.unet(
            x_t[torch.cat([u, c])].to(dtype),
            t,
            encoder_hidden_states=states.to(dtype),
            return_dict=False,
            **unet_kwargs,
        )[0].to(x_t.dtype)
        eps_c = eps_u = out.new_zeros(len(x_t), *out.shape[1:])  # zero where its factor in (17) is
        return guide(
            eps_c.index_copy(0, c, out[len(u) :]), eps_u.index_copy(0, u, out[: len(u)]), w
        )

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, c, h, w) of images (B, 3, H, W) in [-1, 1], the inverse of `decode`; an AutoencoderKL's posterior's mode.

        noise: (B, c, h, w), standard normal; with it they are drawn from that posterior. ENCODED images at a time, since a VAE's
        activations are hundreds of times as large as its latents.
        """
        if self.vae is None:
            return images
        found, config = (
            [self.vae.encode(some) for some in images.to(self.vae.dtype).split(VAE_BATCH_SIZE)],
            self.vae.config,
        )
        z = torch.cat(
            [one.latents if hasattr(one, "latents") else one.latent_dist.mode() for one in found]
        )
        if noise is not None and hasattr(found[0], "latent_dist"):
            z = z + torch.cat([one.latent_dist.std for one in found]) * noise.to(z)
        return (
            z.to(images.dtype) - (getattr(config, "shift_factor", None) or 0)
        ) * config.scaling_factor

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1] of latents (B, c, h, w); without a VAE they are the same."""
        if self.vae is None:
            return x
        config = self.vae.config
        z = x / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        with torch.no_grad():
            parts = [
                self.vae.decode(some, return_dict=False)[0]
                for some in z.to(self.vae.dtype).split(VAE_BATCH_SIZE)
            ]
        return torch.cat(parts).to(x.dtype)

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """States (B, L, D) of the captions and of what they are guided away from: negative_prompt, else the empty caption.

        Each prompt has num_images_per_prompt rows, one after the other. The second is None without guidance.
        """
        prompts, device = self._count(prompt, prompt_embeds), device or self._execution_device
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise InputError(
                "negative_prompt and negative_prompt_embeds were both given, expected one: leave one out"
            )
        if prompt_embeds is None:
            prompt_embeds = self._caption_states(
                [prompt] if isinstance(prompt, str) else prompt, device
            )
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        elif negative_prompt_embeds is None:
            negative = "" if negative_prompt is None else negative_prompt
            negative = [negative] * prompts if isinstance(negative, str) else negative
            self._check_texts("negative_prompt", negative)
            if len(negative) != prompts:
                raise InputError(
                    f"negative_prompt has {len(negative)} texts for {prompts} prompts, expected one for each: "
                    f"pass {prompts} or a single text"
                )
            negative_prompt_embeds = self._caption_states(
                negative, device, "negative_prompt_embeds", prompt_embeds.shape[1]
            )
        if (
            negative_prompt_embeds is not None
            and negative_prompt_embeds.shape != prompt_embeds.shape
        ):
            raise InputError(
                f"negative_prompt_embeds is {tuple(negative_prompt_embeds.shape)}, expected the shape of "
                f"prompt_embeds, {tuple(prompt_embeds.shape)}: encode both alike"
            )
        prompt_embeds = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device).repeat_interleave(
                num_images_per_prompt, dim=0
            )
        return prompt_embeds, negative_prompt_embeds

    @torch.no_grad()
    def _caption_states(
        self,
        captions: list[str],
        device: torch.device,
        instead: str = "prompt_embeds",
        length: int | None = None,
    ) -> Tensor:
        """The states (B, L, D) of captions at one length L, whitened if the model was trained so; `instead` is what to pass where
        there is no text encoder.
        """
        if self.tokenizer is None or self.text_encoder is None:
            raise InputError(
                f"this pipeline has no text encoder to read {captions} with, expected one: load it with "
                f"pipeline.load_pipeline, which supplies the one that config.yaml names, or pass {instead}"
            )
        captions = [normalize(caption) for caption in captions]
        length = self._caption_length(captions, length)
        states = last_hidden_states(captions, self.tokenizer, self.text_encoder, length, device)
        return states if self.whitening is None else self.whitening(states)

    def _caption_length(self, captions: list[str], other: int | None = None) -> int:
        """L, having warned of every caption that is longer; `other`: that of the states that go with these, if any."""
        most = self.tokenizer.model_max_length
        length = self.config.caption_length or min(other or most, most)
        if length > 2**20:
            raise InputError(
                "caption_length is None and the tokenizer names no length either: build the pipeline with one"
            )
        room = length - self.tokenizer.num_special_tokens_to_add()
        for ids in self.tokenizer(captions, add_special_tokens=False, verbose=False).input_ids:
            if len(ids) > room:
                logger.warning(
                    f"A prompt has {len(ids)} tokens and {room} fit; left out: {self.tokenizer.decode(ids[room:])}"
                )
        return length

    def _count(self, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> int:
        """The number of prompts, of which there must be some, as texts or as states."""
        if (prompt is None) == (prompt_embeds is None):
            raise InputError(
                f"prompt and prompt_embeds were {'both' if prompt_embeds is not None else 'not'} given, "
                "expected exactly one of them: pass a text"
            )
        if prompt is None:
            self._check_states(prompt_embeds)
            return len(prompt_embeds)
        self._check_texts("prompt", [prompt] if isinstance(prompt, str) else prompt)
        return 1 if isinstance(prompt, str) else len(prompt)

    def _check_texts(self, name: str, texts: list[str]) -> None:
        """Refuse what is not a non-empty list of Unicode texts."""
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) for text in texts)
        ):
            raise InputError(
                f"{name} is {texts!r}, expected a text or a non-empty list of texts: pass 'a red heart', say"
            )
        broken = [text for text in texts if any("\ud800" <= letter <= "\udfff" for letter in text)]
        if broken:
            raise InputError(
                f"{name} {broken[0]!r} holds half a surrogate pair, expected Unicode text: decode it anew"
            )

    def _check_states(self, states: Tensor) -> None:
        """Refuse prompt_embeds that are not (B, L, D) at the length L that the model was trained with."""
        length = self.config.caption_length
        if (
            states.ndim != 3
            or not len(states)
            or (length is not None and states.shape[1] != length)
        ):
            raise InputError(
                f"prompt_embeds is {tuple(states.shape)}, expected (prompts, {length or 'tokens'}, width): "
                "encode the captions with encode_prompt"
            )

    def _weight(self, w: Weight | None, guidance_scale: Weight | None, prompts: int) -> Weight:
        """The lecture's w of a call, from w, from diffusers' guidance_scale = 1 + w, or from the pipeline."""
        if w is not None and guidance_scale is not None:
            raise InputError(
                f"w={w} and guidance_scale={guidance_scale} were both given, expected one: they mean the same, "
                "guidance_scale = 1 + w"
            )
        if guidance_scale is None:
            return self.config.w if w is None else w
        if not callable(guidance_scale):
            prompt_weights(guidance_scale, prompts, name="guidance_scale")
        return w_from_guidance_scale(guidance_scale)

    def prepare_scheduler(
        self, n: int, timesteps: list[int] | None, device: torch.device
    ) -> SchedulerMixin:
        """A copy of the scheduler with its plan made, so that calls cannot disturb each other."""
        if not hasattr(self.scheduler, "init_noise_sigma"):
            raise InputError(
                f"{type(self.scheduler).__name__} has no init_noise_sigma, expected a scheduler of noise as in (5), "
                "not of flow matching: DDPM, DDIM, PNDM, DPMSolverMultistep, …"
            )
        scheduler = copy.deepcopy(self.scheduler)
        T = (
            len(scheduler)
            if hasattr(scheduler, "__len__")
            else scheduler.config.num_train_timesteps
        )
        if timesteps is None and not (is_int(n) and 1 <= n <= T):
            raise InputError(
                f"num_inference_steps is {n!r}, expected a whole number from 1 to {T}: 50 is a good start"
            )
        if (
            timesteps is not None
            and "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters
        ):
            raise InputError(
                f"{type(scheduler).__name__} takes no timesteps, expected none: pass num_inference_steps"
            )
        name, value = ("num_inference_steps", n) if timesteps is None else ("timesteps", timesteps)
        try:
            scheduler.set_timesteps(**{name: value}, device=device)
        except ValueError as error:
            raise InputError(
                f"{name} is {value}, expected what {type(scheduler).__name__} can plan: {error}"
            ) from error
        return scheduler

    def _noise(
        self,
        B: int,
        height: int | None,
        width: int | None,
        generator,
        latents: Tensor | None,
        device,
    ) -> Tensor:
        """x_T (B, c, h, w) of unit variance, drawn or given, in at least float32."""
        size, f = self.unet.config.sample_size, self.vae_scale_factor
        h, w = size if isinstance(size, tuple | list) else (size, size)
        height, width = h * f if height is None else height, w * f if width is None else width
        for name, side in (("height", height), ("width", width)):
            if not is_int(side) or side < 1 or side % f:
                raise InputError(
                    f"{name} is {side!r}, expected a multiple of {f}: this model was trained at {h * f}x{w * f}"
                )
        shape = (B, self.unet.config.in_channels, height // f, width // f)
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(
                dtype
            )
        if tuple(latents.shape) != shape:
            raise InputError(
                f"latents is {tuple(latents.shape)}, expected {shape}: draw them in that shape"
            )
        return latents.to(device, dtype)


def is_int(n) -> bool:
    """Whether n is an int and not a bool."""
    return isinstance(n, int) and not isinstance(n, bool)


def noise_level(scheduler: SchedulerMixin, t: Tensor) -> float:
    """sqrt(1 - abar_t), the standard deviation of the noise in x_t by (5), at the table's nearest timestep."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(
            f"w is a function of the noise level, which {type(scheduler).__name__} does not tell: pass a number"
        )
    abar = scheduler.alphas_cumprod
    return float((1 - abar[min(max(round(float(t)), 0), len(abar) - 1)]).sqrt())


def weights_at(w: Weight, prompts: int, scheduler: SchedulerMixin, t: Tensor) -> Tensor:
    """The weight of each prompt (prompts,) at a timestep, float64."""
    return prompt_weights(w, prompts, noise_level(scheduler, t) if callable(w) else None)


def make_generators(
    B: int, seed: int | None, generator: Generator | list[Generator] | None
) -> Generator | list[Generator]:
    """Where B images draw their noise from: `generator` as it is, or one generator an image, seeded seed + i or afresh."""
    if seed is not None and generator is not None:
        raise InputError("seed and generator were both given, expected one: leave one out")
    if isinstance(generator, list | tuple) and len(generator) != B:
        raise InputError(
            f"generator has {len(generator)} generators for {B} images, expected one an image: pass {B}"
        )
    if generator is not None:
        return list(generator) if isinstance(generator, list | tuple) else generator
    if seed is not None and (not is_int(seed) or not 0 <= seed < 2**63 - B):
        raise InputError(
            f"seed is {seed!r}, expected a whole number from 0 to {2**63 - B - 1}: 0 is as good as any"
        )
    own = [Generator() for _ in range(B)]
    for i, g in enumerate(own):
        g.seed() if seed is None else g.manual_seed(seed + i)
    return own


@contextlib.contextmanager
def scaled_lora(encoder: PreTrainedModel | None, scale: float | None) -> Iterator[None]:
    """A text encoder whose LoRA layers count `scale` as much, as Stable Diffusion's pipeline scales them."""
    if encoder is None or scale is None or not USE_PEFT_BACKEND:
        yield
        return
    scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(encoder, scale)


def prepare_extra_step_kwargs(
    scheduler: SchedulerMixin, generator: Generator | list[Generator], eta: float | None
) -> dict:
    """What of generator and eta the scheduler's step takes, and what it needs; an eta that it does not take is refused."""
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in takes else {}
    if (
        "use_clipped_model_output" in takes
    ):  # diffusers' DDIM would step with the noise of the x_0 before it was clipped
        options["use_clipped_model_output"] = True
    if eta is None:
        return options
    if "eta" not in takes:
        raise InputError(f"{type(scheduler).__name__} takes no eta, expected none: leave it out")
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise InputError(
            f"eta is {eta!r}, expected a number from 0 (deterministic) to 1 (ancestral): pass 1 for (16)"
        )
    reads = (
        "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    )  # others keep what they do not read
    variance = scheduler.config.variance_type if reads else ""
    if eta != 1 and variance.startswith("fixed_large"):
        raise InputError(
            f"eta is {eta}, expected 1 with the scheduler's variance_type {variance}: leave it out"
        )
    return options | {"eta": eta}
