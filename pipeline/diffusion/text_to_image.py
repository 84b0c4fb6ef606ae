"""From a prompt to an image: captions, the sampling loop (16) under guidance (17), decoding."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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

from .captions import last_hidden_states, normalize, simplify
from .guidance import InputError, Weight, guide, prompt_weights, shift_weight, w_from_guidance_scale
from .hub_format import HubFormat

logger = logging.get_logger(__name__)

VAE_BATCH_SIZE = 8  # images that a VAE encodes or decodes at once
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# diffusers' names for what a callback may change, and the fields of Step that hold it.
CALLBACK_TENSORS = {
    "latents": "x_t",
    "prompt_embeds": "captions",
    "negative_prompt_embeds": "empty",
}


@dataclass
class Step:
    """One transition of the sampling loop; the loop continues with whatever its reader writes here.

    t: the timestep left, 0-d. s: the timestep reached, 0-d; -1 is the clean image. x_t: (B, c, h,
    w) at s. x_0_hat: (B, c, h, w), (15), or None from schedulers without one. captions, empty: (B,
    L, D).
    """

    t: Tensor
    s: Tensor
    x_t: Tensor
    x_0_hat: Tensor | None
    captions: Tensor
    empty: Tensor | None
    w: Weight


class TextToImagePipeline(HubFormat, DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Images of captions, by diffusion in pixels (`vae=None`), patches or latents of a VAE.

    LoRA files load and save as in Stable Diffusion: `load_lora_weights`, `fuse_lora`,
    `unload_lora_weights`.

    whitening: CaptionWhitening, or None where the network takes the text encoder's states as they
    are. caption_length: tokens that every caption is padded or cut to; None is the tokenizer's own
    length. caption_dropout: the rate used in training; None is unknown. simplify_captions: whether
    captions are read in lower case, without articles and punctuation. w: the default guidance of a
    call.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    # Offloading finds a module's device by its parameters, and this one has none.
    _exclude_from_cpu_offload: ClassVar = ["whitening"]
    _optional_components: ClassVar = ["text_encoder", "tokenizer", "vae", "whitening"]
    _callback_tensor_inputs: ClassVar = list(CALLBACK_TENSORS)

    unet: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    vae: Any
    whitening: Any

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
        simplify_captions: bool = False,
        w: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            whitening=whitening,
        )
        self.register_to_config(
            caption_length=caption_length,
            caption_dropout=caption_dropout,
            simplify_captions=simplify_captions,
            w=w,
        )
        levels = 1 if vae is None else len(self.vae.config.block_out_channels)
        self.vae_scale_factor = 2 ** (levels - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = shift_weight(w, 1)
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def load_lora_into_text_encoder(
        cls, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Load a text encoder's layers of a LoRA file, if it has any: diffusers warns if not."""
        if any(name.startswith(f"{cls.text_encoder_name}.") for name in state_dict):
            super().load_lora_into_text_encoder(state_dict, *args, **kwargs)

    @property
    def guidance_scale(self) -> Weight:
        """Return s = 1 + w of the last call; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of transitions of the call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call stops after this step; a callback may set it."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

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
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        w: Weight | None = None,
        seed: int | None = None,
        timesteps: list[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images; `denoise` documents what decides them.

        output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent" (B, c, h,
        w), undecoded. callback_on_step_end(pipe, i, t, tensors), or one of diffusers' own
        callbacks, runs after every step with the tensors that callback_on_step_end_tensor_inputs
        names. It returns a dict of those it changed.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        names = callback_on_step_end_tensor_inputs
        self.check_inputs(
            prompt, None, None, None, prompt_embeds, output_type=output_type, callback_tensors=names
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
            step: Any = None  # a plan has at least one timestep
            progress: Any = self.progress_bar  # whose arguments diffusers does not annotate
            with progress(total=self.num_timesteps) as bar:
                for i, step in enumerate(steps):
                    if callback_on_step_end is not None:
                        self._run_callback(step, i, callback_on_step_end, names)
                    bar.update()
                    if self.interrupt:
                        break
            images: Any = step.x_t if output_type == "latent" else self.decode(step.x_t)
        finally:
            self.maybe_free_model_hooks()
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _run_callback(
        self, step: Step, i: int, callback: Callable[..., dict[str, Any]], names: Sequence[str]
    ) -> None:
        """Call diffusers' callback, then write what it changed to the step."""
        scale = self._guidance_scale
        before: Any = scale.clone() if isinstance(scale, Tensor) else None
        tensors = {name: getattr(step, CALLBACK_TENSORS[name]) for name in names}
        changed = callback(self, i, step.t, tensors) or {}
        for name, field in CALLBACK_TENSORS.items():
            old = getattr(step, field)
            new = changed.get(name, old)
            if old is not None and new is not None and new.shape != old.shape:
                raise InputError(
                    f"the callback returned {name} of shape {tuple(new.shape)} for "
                    f"{tuple(old.shape)}. Keep one row per image; `_guidance_scale` sets w."
                )
            setattr(step, field, new)
        # `+=` changes a tensor in place.
        if self._guidance_scale is not scale or not (before is None or before.equal(scale)):
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
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[Step]:
        """The sampling loop (16), one `Step` at a time; a bad request raises InputError at once.

        w: the weight of (17), a number, one per prompt or a function of the noise level.
        guidance_scale is 1 + w; neither means the pipeline's own. eta: from 0 (deterministic) to 1
        (ancestral), for schedulers that take it (19). seed: image i gets a CPU generator of seed +
        i. generator: a list has one per image; a single one serves all images jointly, as in
        diffusers. Without seed and generator the noise is new, whatever `torch.manual_seed` was
        called with. negative_prompt replaces the empty caption. latents: x_T (B, c, h, w) of unit
        variance. prompt_embeds: caption states (B, L, D) instead of a prompt.
        cross_attention_kwargs: `scale` scales LoRA layers, in the network and in the text encoder.
        """
        self.check_unet()
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            num_images_per_prompt,
            guidance_scale,
            w,
        )
        weight: Weight = self.config["w"] if w is None else w
        if guidance_scale is not None:
            weight = w_from_guidance_scale(guidance_scale)
        prompts = count_prompts(prompt, prompt_embeds)
        B = prompts * num_images_per_prompt
        device = self._execution_device
        scheduler = self.prepare_scheduler(num_inference_steps, timesteps, device)
        # Every noise level now: a function that fails at a later one is a bad request too.
        weights = [weights_at(weight, prompts, scheduler, t) for t in scheduler.timesteps]
        guided = any(w_t.any() for w_t in weights)
        generator = make_generators(B, seed, generator)
        step_kwargs = prepare_extra_step_kwargs(scheduler, generator, eta)
        x_t = self.prepare_latents(B, height, width, device, generator, latents)
        x_t = x_t * scheduler.init_noise_sigma
        # A callback may start to guide later, so encode the empty caption wherever it is at hand.
        has_empty = negative_prompt_embeds is not None or (
            prompt_embeds is None and self.text_encoder is not None
        )
        lora_scale = (cross_attention_kwargs or {}).get("scale")
        with scaled_lora(self.text_encoder, lora_scale):
            captions, empty = self.encode_prompt(
                prompt,
                device,
                num_images_per_prompt,
                guided or has_empty,
                negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
            )
        if guided and self.config["caption_dropout"] == 0:
            logger.warning(
                "This model was trained without caption dropout, so its unconditional prediction "
                "is meaningless. Keep w at 0."
            )
        self._guidance_scale = shift_weight(weight, 1)
        self._num_timesteps = len(scheduler.timesteps)
        self._interrupt = False
        unet_kwargs = {}
        if cross_attention_kwargs is not None:
            unet_kwargs["cross_attention_kwargs"] = cross_attention_kwargs
        return self._steps(
            scheduler, x_t, captions, empty, weight, prompts, step_kwargs, unet_kwargs
        )

    @torch.no_grad()
    def _steps(
        self,
        scheduler: Any,
        x_t: Tensor,
        captions: Tensor,
        empty: Tensor | None,
        w: Weight,
        prompts: int,
        step_kwargs: dict[str, Any],
        unet_kwargs: dict[str, Any],
    ) -> Iterator[Step]:
        """x_s = mean(x_t, x_0_hat) + sqrt(variance) z for every (t, s) of the plan, (16)."""
        timesteps = scheduler.timesteps
        plan = zip(timesteps, [*timesteps[1:], timesteps.new_tensor(-1)], strict=True)
        dtype = self.unet.dtype  # read once: diffusers searches all modules for it
        for t, s in plan:
            w_t = weights_at(w, prompts, scheduler, t).to(x_t)
            w_t = w_t.repeat_interleave(len(x_t) // prompts)
            x_in = scheduler.scale_model_input(x_t, t).to(dtype)
            eps_c, eps_u = self._predict(x_in, t, captions, empty, w_t, unet_kwargs)
            eps_hat = guide(eps_c.to(x_t.dtype), eps_u.to(x_t.dtype), w_t)  # (17)
            out = scheduler.step(eps_hat, t, x_t, **step_kwargs)  # (15), (8), (9), (16)
            x_0_hat = getattr(out, "pred_original_sample", None)
            step = Step(t, s, out.prev_sample, x_0_hat, captions, empty, w)
            yield step
            x_t, captions, empty, w = step.x_t, step.captions, step.empty, step.w

    def _predict(
        self,
        x_t: Tensor,
        t: Tensor,
        captions: Tensor,
        empty: Tensor | None,
        w: Tensor,
        unet_kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Predict (B, ...) with and without captions; zero where (17) multiplies it by zero.

        One network call covers the conditional rows (w != -1) and the unconditional ones (w != 0).
        """
        c = (w != -1).nonzero().flatten()
        u = (w != 0).nonzero().flatten()
        states = captions
        if len(u):
            if empty is None:
                raise InputError(
                    "guidance needs the empty caption. Pass negative_prompt_embeds, or w=0."
                )
            states = torch.cat([empty[u], captions[c]])
        rows = x_t[torch.cat([u, c])]
        states = states.to(x_t.dtype)
        out = self.unet(rows, t, encoder_hidden_states=states, return_dict=False, **unet_kwargs)[0]
        zero = out.new_zeros(len(x_t), *out.shape[1:])
        eps_u, eps_c = out.split([len(u), len(c)])
        return zero.index_copy(0, c, eps_c), zero.index_copy(0, u, eps_u)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, c, h, w) of images (B, 3, H, W) in [-1, 1], the inverse of `decode`.

        Those of an AutoencoderKL are its posterior's mode, or a sample of it by the standard normal
        `noise` (B, c, h, w).
        """
        if self.vae is None:
            return images
        # A VAE's activations are hundreds of times as large as its latents, hence the batches.
        batches = images.to(self.vae.dtype).split(VAE_BATCH_SIZE)
        outputs = [self.vae.encode(batch) for batch in batches]
        if hasattr(outputs[0], "latents"):
            z = torch.cat([out.latents for out in outputs])
        else:
            z = torch.cat([out.latent_dist.mode() for out in outputs])
            if noise is not None:
                z = z + torch.cat([out.latent_dist.std for out in outputs]) * noise.to(z)
        return (z.to(images.dtype) - self._vae_shift()) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1] of latents (B, c, h, w), the same without a VAE."""
        if self.vae is None:
            return x
        z = x / self.vae.config.scaling_factor + self._vae_shift()
        batches = z.to(self.vae.dtype).split(VAE_BATCH_SIZE)
        images = [self.vae.decode(batch, return_dict=False)[0] for batch in batches]
        return torch.cat(images).to(x.dtype)

    def _vae_shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0

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
        """States (B, L, D) of the captions, and of negative_prompt or the empty caption.

        Each prompt has num_images_per_prompt consecutive rows. The second tensor is None without
        guidance.
        """
        self.check_inputs(
            prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
        )
        prompts = count_prompts(prompt, prompt_embeds)
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self._caption_states(as_list(prompt or ""), device)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        elif negative_prompt_embeds is None:
            negatives = as_list(negative_prompt or "")
            negatives = negatives * prompts if len(negatives) == 1 else negatives
            length = prompt_embeds.shape[1]
            negative_prompt_embeds = self._caption_states(negatives, device, length)
        prompt_embeds = prompt_embeds.to(device)
        if negative_prompt_embeds is not None:
            if negative_prompt_embeds.shape != prompt_embeds.shape:
                raise InputError(
                    "negative_prompt_embeds must have the shape of prompt_embeds, "
                    f"{tuple(prompt_embeds.shape)}, got "
                    f"{tuple(negative_prompt_embeds.shape)}. Encode both with encode_prompt."
                )
            negative_prompt_embeds = negative_prompt_embeds.to(device)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(
                num_images_per_prompt, dim=0
            )
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    @torch.no_grad()
    def _caption_states(
        self, captions: list[str], device: torch.device, length: int | None = None
    ) -> Tensor:
        """States (B, L, D) of captions, whitened where the model needs it; L <= length."""
        if self.tokenizer is None or self.text_encoder is None:
            raise InputError(
                f"this pipeline has no text encoder to read {captions} with. Load it with "
                "pipeline.load_pipeline, or pass prompt_embeds and negative_prompt_embeds."
            )
        read = simplify if self.config["simplify_captions"] else normalize
        captions = [read(caption) for caption in captions]
        length = self._caption_length(captions, length)
        states = last_hidden_states(captions, self.tokenizer, self.text_encoder, length, device)
        return states if self.whitening is None else self.whitening(states)

    def _caption_length(self, captions: list[str], limit: int | None = None) -> int:
        """The number of tokens of each caption; a caption that is longer is cut, with a warning."""
        longest = self.tokenizer.model_max_length
        length = self.config["caption_length"] or min(limit or longest, longest)
        if length > 2**20:
            raise InputError(
                f"caption_length is None and the tokenizer's model_max_length is {length}. "
                "Build the pipeline with a caption_length."
            )
        available = length - self.tokenizer.num_special_tokens_to_add()
        for ids in self.tokenizer(captions, add_special_tokens=False, verbose=False).input_ids:
            if len(ids) > available:
                logger.warning(
                    f"A prompt has {len(ids)} tokens, of which {available} fit. Left out: "
                    f"{self.tokenizer.decode(ids[available:])}"
                )
        return length

    def check_unet(self) -> None:
        """Raise InputError for a UNet that takes more than latents, a timestep and captions."""
        unet = self.unet.config
        if unet.get("time_cond_proj_dim") is not None:
            raise InputError(
                "the UNet takes its guidance with the timestep (time_cond_proj_dim), as LCM's "
                "distillation makes it. Use diffusers' own pipeline."
            )
        channels = getattr(self.vae and self.vae.config, "latent_channels", unet["out_channels"])
        if unet["in_channels"] != channels:
            raise InputError(
                f"the UNet takes {unet['in_channels']} channels and the latents have {channels}, "
                "as in inpainting, depth and InstructPix2Pix models. Use diffusers' own pipeline."
            )

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: Weight | None = None,
        w: Weight | None = None,
        output_type: str = "pil",
        callback_tensors: Sequence[str] = (),
    ) -> None:
        """Raise InputError for a request that no scheduler could fulfil."""
        for first, second, a, b in [
            ("negative_prompt", "negative_prompt_embeds", negative_prompt, negative_prompt_embeds),
            ("w", "guidance_scale = 1 + w", w, guidance_scale),
        ]:
            if a is not None and b is not None:
                raise InputError(f"{first} and {second} exclude each other. Leave one out.")
        if (prompt is None) == (prompt_embeds is None):
            raise InputError("Pass either a prompt or prompt_embeds.")
        for name, texts in [("prompt", prompt), ("negative_prompt", negative_prompt)]:
            if texts is not None:
                check_texts(name, as_list(texts))
        length = self.config["caption_length"]
        if prompt_embeds is not None and (
            prompt_embeds.ndim != 3
            or len(prompt_embeds) == 0
            or (length is not None and prompt_embeds.shape[1] != length)
        ):
            raise InputError(
                f"prompt_embeds must be (prompts, {length or 'tokens'}, width), got "
                f"{tuple(prompt_embeds.shape)}. Encode the captions with encode_prompt."
            )
        prompts = count_prompts(prompt, prompt_embeds)
        if isinstance(negative_prompt, list) and len(negative_prompt) != prompts:
            raise InputError(
                f"negative_prompt has {len(negative_prompt)} texts for {prompts} prompts. "
                f"Pass {prompts} texts or a single one."
            )
        for name, weight in [("w", w), ("guidance_scale", guidance_scale)]:
            if weight is not None and not callable(weight):
                prompt_weights(weight, prompts, name=name)
        if not is_int(num_images_per_prompt) or num_images_per_prompt < 1:
            raise InputError(
                "num_images_per_prompt must be a whole number from 1, got "
                f"{num_images_per_prompt!r}."
            )
        f = self.vae_scale_factor
        for name, side in [("height", height), ("width", width)]:
            if side is not None and (not is_int(side) or side < 1 or side % f):
                raise InputError(f"{name} must be a multiple of {f}, got {side!r}.")
        if output_type not in OUTPUT_TYPES:
            raise InputError(
                f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}."
            )
        unknown = set(callback_tensors) - set(self._callback_tensor_inputs)
        if unknown:
            raise InputError(
                f"callback_on_step_end_tensor_inputs knows {', '.join(CALLBACK_TENSORS)}, "
                f"got {sorted(unknown)}."
            )

    def prepare_scheduler(
        self, num_inference_steps: int, timesteps: list[int] | None, device: torch.device
    ) -> Any:
        """A copy of the scheduler with its plan made: calls cannot disturb each other."""
        if not hasattr(self.scheduler, "init_noise_sigma"):
            raise InputError(
                f"{type(self.scheduler).__name__} has no init_noise_sigma: flow matching does not "
                "fit. Use a scheduler of noise as in (5), such as DDPM, DDIM or DPMSolverMultistep."
            )
        scheduler = copy.deepcopy(self.scheduler)
        kind = type(scheduler).__name__
        if timesteps is None:
            # Our scheduler's length may be that of trained_betas.
            T = (
                len(scheduler)
                if hasattr(scheduler, "__len__")
                else scheduler.config.num_train_timesteps
            )
            if not is_int(num_inference_steps) or not 1 <= num_inference_steps <= T:
                raise InputError(
                    f"num_inference_steps must be a whole number from 1 to {T}, "
                    f"got {num_inference_steps!r}."
                )
            plan = {"num_inference_steps": num_inference_steps}
        else:
            if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
                raise InputError(f"{kind} takes no timesteps. Pass num_inference_steps.")
            plan = {"timesteps": timesteps}
        try:
            scheduler.set_timesteps(**plan, device=device)
        except ValueError as error:
            raise InputError(f"{kind} cannot plan {plan}: {error}") from error
        return scheduler

    def prepare_latents(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        device: torch.device,
        generator: Generator | list[Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """x_T (batch_size, c, h, w) of unit variance, sampled or given, in at least float32."""
        size = self.unet.config.sample_size
        h, w = size if isinstance(size, tuple | list) else (size, size)
        h = h if height is None else height // self.vae_scale_factor
        w = w if width is None else width // self.vae_scale_factor
        shape = (batch_size, self.unet.config.in_channels, h, w)
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            # Always sampled in float32: a seed gives the same x_T in every dtype.
            latents = randn_tensor(shape, generator, device, torch.float32)
        if tuple(latents.shape) != shape:
            raise InputError(f"latents must have the shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device, dtype)


def is_int(n: object) -> bool:
    """Whether n is an int and not a bool."""
    return isinstance(n, int) and not isinstance(n, bool)


def is_number(x: object) -> bool:
    """Whether x is an int or a float and not a bool."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def as_list(texts: str | list[str]) -> list[str]:
    """A single text as a list of one."""
    return [texts] if isinstance(texts, str) else texts


def count_prompts(prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> int:
    """The number of prompts, given as texts or as states."""
    if prompt is None:
        return 0 if prompt_embeds is None else len(prompt_embeds)
    return len(as_list(prompt))


def check_texts(name: str, texts: object) -> None:
    """Raise InputError for anything but a non-empty list of Unicode texts."""
    if not isinstance(texts, list) or not texts or not all(isinstance(x, str) for x in texts):
        raise InputError(f"{name} must be a text or a non-empty list of texts, got {texts!r}.")
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"{name} {text!r} contains a lone surrogate. Pass valid Unicode text.")


def noise_level(scheduler: Any, t: Tensor) -> float:
    """Return the noise level sqrt(1 - abar_t) of x_t by (5), at the nearest timestep."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(
            f"w is a function of the noise level, which {type(scheduler).__name__} does not "
            "provide. Pass a number."
        )
    abar = scheduler.alphas_cumprod
    nearest = min(max(round(float(t)), 0), len(abar) - 1)
    return float((1 - abar[nearest]).sqrt())


def weights_at(w: Weight, prompts: int, scheduler: Any, t: Tensor) -> Tensor:
    """The weight of each prompt (prompts,) at a timestep, float64."""
    return prompt_weights(w, prompts, noise_level(scheduler, t) if callable(w) else None)


def make_generators(
    B: int, seed: int | None, generator: Generator | list[Generator] | None
) -> Generator | list[Generator]:
    """Return `generator` as it is, or one generator per image with seed + i or a fresh seed."""
    if seed is not None and generator is not None:
        raise InputError("seed and generator exclude each other. Leave one out.")
    if isinstance(generator, list | tuple):
        if len(generator) != B:
            raise InputError(f"{B} images need {B} generators, got {len(generator)}.")
        return list(generator)
    if generator is not None:
        return generator
    if seed is not None and (not is_int(seed) or not 0 <= seed < 2**63 - B):
        raise InputError(f"seed must be a whole number from 0 to {2**63 - B - 1}, got {seed!r}.")
    generators = [Generator() for _ in range(B)]
    for i, each in enumerate(generators):
        if seed is None:
            each.seed()
        else:
            each.manual_seed(seed + i)
    return generators


def scaled_lora(encoder: PreTrainedModel | None, scale: float | None) -> contextlib.ExitStack:
    """Scale a text encoder's LoRA layers until the context ends, as Stable Diffusion does."""
    stack = contextlib.ExitStack()
    if encoder is not None and scale is not None and USE_PEFT_BACKEND:
        scale_lora_layers(encoder, scale)
        stack.callback(unscale_lora_layers, encoder, scale)
    return stack


def prepare_extra_step_kwargs(
    scheduler: Any, generator: Generator | list[Generator] | None, eta: float | None
) -> dict[str, Any]:
    """Return the keyword arguments of the scheduler's step, or InputError for its eta."""
    parameters = inspect.signature(scheduler.step).parameters
    kwargs: dict[str, Any] = {}
    if "generator" in parameters:
        kwargs["generator"] = generator
    if "use_clipped_model_output" in parameters:
        # Otherwise diffusers' DDIM steps with the noise of the x_0 before it was clipped.
        kwargs["use_clipped_model_output"] = True
    if eta is None:
        return kwargs
    kind = type(scheduler)
    if "eta" not in parameters:
        raise InputError(f"{kind.__name__} takes no eta, got {eta}. Leave it out.")
    if not is_number(eta) or not 0 <= eta <= 1:
        raise InputError(
            f"eta must be a number from 0 (deterministic) to 1 (ancestral), got {eta!r}."
        )
    # A scheduler keeps settings in its config that it does not read.
    reads_variance = "variance_type" in inspect.signature(kind.__init__).parameters
    if eta != 1 and reads_variance and scheduler.config.variance_type.startswith("fixed_large"):
        raise InputError(
            f"eta must be 1 with variance_type={scheduler.config.variance_type!r}, got {eta}. "
            "Leave it out."
        )
    return kwargs | {"eta": eta}
