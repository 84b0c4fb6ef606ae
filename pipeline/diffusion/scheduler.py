"""The noise process of the lecture, forwards and backwards, as a diffusers scheduler.

Numbers in brackets are the equations of docs/equations.md. Library time counts 0 … T-1, the
lecture's 1 … T. The clean image is library time -1, where abar = 1. All variances are per
dimension.
"""

import itertools
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

NOISE_FLOOR = 1e-3  # (6): a chain that starts above this abar starts from an image, not from noise


def linear(T: int, start: float, end: float) -> Tensor:
    """Grow beta evenly (Ho et al. 2020)."""
    return torch.linspace(start, end, T, dtype=torch.float64)


def scaled_linear(T: int, start: float, end: float) -> Tensor:
    """Grow sqrt(beta) evenly (latent diffusion)."""
    return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2


def squaredcos_cap_v2(T: int, start: float, end: float) -> Tensor:
    """Let abar fall like a squared cosine, with beta up to 0.999 (Nichol & Dhariwal 2021)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def sigmoid(T: int, start: float, end: float) -> Tensor:
    """Let beta follow a logistic curve from start to end (GeoDiff, Xu et al. 2022)."""
    return torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (end - start) + start


def zero_terminal_snr(beta: Tensor) -> Tensor:
    """Shift and stretch sqrt(abar) to abar_T = 0, keeping abar_1 (Lin et al. 2024, algorithm 1)."""
    sqrt_abar = (1 - beta).cumprod(0).sqrt()
    sqrt_abar = (sqrt_abar - sqrt_abar[-1]) * sqrt_abar[0] / (sqrt_abar[0] - sqrt_abar[-1])
    abar = torch.cat([torch.ones(1, dtype=beta.dtype), sqrt_abar**2])
    return 1 - abar[1:] / abar[:-1]


def upcast(x: Tensor) -> Tensor:
    """Return x in its own dtype, at least float32: the dtype of all arithmetic here."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sqrt(factor: Tensor) -> Tensor:
    """Return the correctly rounded square root; torch's own may be off by one bit on a CPU."""
    if factor.device.type != "cpu":
        return factor.sqrt()
    return factor.double().sqrt().to(factor.dtype)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    f.__name__: f for f in (linear, scaled_linear, squaredcos_cap_v2, sigmoid)
}
# Every scheduler of diffusers computes these.
STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


class DDPMScheduler(SchedulerMixin, ConfigMixin):
    """q(x_t | x_0) forwards, p(x_s | x_t) backwards, for any s < t.

    Configuration keys and defaults are diffusers' own. Every method takes a timestep as an int, a
    0-d tensor or one per example (B,). Arithmetic runs in the sample's dtype, at least in float32.
    What a network or a loop takes next (x_t, v, x_s) comes back in the sample's dtype.
    """

    _compatibles: ClassVar = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    # -- forwards: torch's own square roots, which every trained model has seen --------------------

    def abar(self, t: int | Tensor, like: Tensor) -> Tensor:
        """(4) abar_t = product of alpha_1 … alpha_t, shaped to multiply `like` (B, ...).

        abar at t = -1 is 1. It is 0-d for a single timestep. ValueError outside [-1, T - 1].
        """
        key = (like.device, torch.promote_types(like.dtype, torch.float32))
        if key not in self._tables:
            self._tables[key] = self._abar.to(*key)
        t = torch.as_tensor(t, device=like.device)
        try:
            abar_t = self._tables[key].index_select(0, t.reshape(-1) + 1)
        except IndexError:
            raise ValueError(f"timestep must be in [-1, {len(self) - 1}], got {t}") from None
        return abar_t.reshape(-1, *[1] * (like.ndim - 1)) if t.ndim else abar_t.reshape(())

    def snr(self, t: int | Tensor, like: Tensor) -> Tensor:
        """Signal to noise ratio abar / (1 - abar) of x_t, from (5)."""
        abar_t = self.abar(t, like)
        return abar_t / (1 - abar_t)

    def add_noise_step(
        self, x_s: Tensor, noise: Tensor, t: int | Tensor, s: int | Tensor | None = None
    ) -> Tensor:
        """(1) x_t = sqrt(alpha) x_s + sqrt(1 - alpha) eps, one step of the chain from s = t - 1."""
        alpha = self.abar(t, x_s) / self.abar(t - 1 if s is None else s, x_s)
        x_t = alpha.sqrt() * upcast(x_s) + (1 - alpha).sqrt() * upcast(noise)
        return x_t.to(x_s.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """(5) the direct jump x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps."""
        abar_t = self.abar(timesteps, original_samples)
        x_t = abar_t.sqrt() * upcast(original_samples) + (1 - abar_t).sqrt() * upcast(noise)
        return x_t.to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022)."""
        abar_t = self.abar(timesteps, sample)
        v = abar_t.sqrt() * upcast(noise) - (1 - abar_t).sqrt() * upcast(sample)
        return v.to(sample.dtype)

    # -- backwards: correctly rounded square roots, for the same image on every CPU ----------------

    def predict_x_0(self, model_output: Tensor, t: int | Tensor, x_t: Tensor) -> Tensor:
        """(15) unclipped x_0 of the network's prediction; ValueError for epsilon at abar_t = 0."""
        abar_t = self.abar(t, x_t)
        out, x_t = upcast(model_output), upcast(x_t)
        if self.config["prediction_type"] == "sample":
            return out
        if self.config["prediction_type"] == "v_prediction":
            return sqrt(abar_t) * x_t - sqrt(1 - abar_t) * out
        if self.ends_without_signal and (abar_t == 0).any():
            raise ValueError(
                f"prediction_type='epsilon' cannot give x_0 at t={t}: abar_t = 0 there. "
                "Train and sample with v_prediction or sample."
            )
        return (x_t - sqrt(1 - abar_t) * out) / sqrt(abar_t)

    def predict_eps(self, x_0: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """(5), rearranged for the noise: eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
        abar_t = self.abar(t, x_t)
        return (upcast(x_t) - sqrt(abar_t) * upcast(x_0)) / sqrt(1 - abar_t)

    def posterior(
        self, x_0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and variance (B, 1, ...) of q(x_s | x_t, x_0), s < t: (7), (8) and (9).

        At s = t - 1 they are the lecture's mu~ and beta~. The variance is 0-d for a single pair of
        timesteps.
        """
        x_0, x_t = upcast(x_0), upcast(x_t)
        abar_t, abar_s = self.abar(t, x_t), self.abar(s, x_t)
        alpha = abar_t / abar_s  # the lecture's alpha_t when s = t - 1
        beta = 1 - alpha
        x_t_factor = sqrt(alpha) * (1 - abar_s) / (1 - abar_t)
        x_0_factor = sqrt(abar_s) * beta / (1 - abar_t)
        mean = x_0_factor * x_0 + x_t_factor * x_t  # (8)
        variance = (1 - abar_s) / (1 - abar_t) * beta  # (9)
        return mean, variance

    def transition(
        self, x_0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor, eta: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(x_s | x_t): (10) with the configured variance, or (19) at eta < 1.

        ValueError for eta outside [0, 1], and for eta below 1 with a fixed_large variance, which is
        no posterior's.
        """
        large = self.config["variance_type"].startswith("fixed_large")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1] (0 is DDIM, 1 is ancestral), got {eta}")
        if eta != 1 and large:
            raise ValueError(
                f"eta={eta} needs variance_type='fixed_small', got "
                f"{self.config['variance_type']!r}: (19) interpolates the posterior's own variance"
            )
        mean, variance = self.posterior(x_0, x_t, t, s)
        if eta == 1 and not large:
            return mean, variance
        abar_s = self.abar(s, x_t)
        if large:
            beta = 1 - self.abar(t, x_t) / abar_s
            return mean, beta * (abar_s != 1)  # the clean image gets no noise
        variance = eta**2 * variance
        eps = self.predict_eps(x_0, x_t, t)
        mean = sqrt(abar_s) * upcast(x_0) + sqrt(1 - abar_s - variance) * eps  # (19)
        return mean, variance

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float = 1.0,
        previous_timestep: int | Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """(16) x_s from x_t and the network's prediction, with the clipped x_0 of (15).

        s is `previous_timestep`, or what follows `timestep` in the plan of `set_timesteps`. The
        step to the clean image (s = -1) returns the mean. `eta` in [0, 1] leads from DDIM to
        ancestral sampling (19); stock diffusers pipelines pass their own `eta`, which defaults to
        0. A step samples one normal tensor in the dtype of `model_output`, or none where nothing is
        random.
        """
        t = torch.as_tensor(timestep, device=sample.device)
        s = self.previous_timestep(t) if previous_timestep is None else previous_timestep
        s = torch.as_tensor(s, device=sample.device)
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the sample's shape {tuple(sample.shape)}, got "
                f"{tuple(model_output.shape)}. Learned variances are not implemented."
            )
        if eta > 0 and (s >= t).any():
            raise ValueError(
                "previous_timestep must lie before timestep where eta is above 0, got "
                f"{s.tolist()} and {t.tolist()}"
            )
        x_0 = self.clip(self.predict_x_0(model_output, t, sample))  # (15)
        x_s, variance = self.transition(x_0, sample, t, s, eta)  # (8), (9), (19)
        if eta > 0 and (s >= 0).any():
            z = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            x_s = x_s + sqrt(variance) * upcast(z)  # (16)
        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(x_s, x_0) if return_dict else (x_s, x_0)

    def clip(self, x_0: Tensor) -> Tensor:
        """x_0 by a dynamic threshold (Saharia et al. 2022), by a clamp, or as it is."""
        if self.config["thresholding"]:
            ratio = self.config["dynamic_thresholding_ratio"]
            size = torch.quantile(x_0.abs().flatten(1), ratio, dim=1)
            size = size.clamp(min=1, max=self.config["sample_max_value"])
            size = size.reshape(-1, *[1] * (x_0.ndim - 1))
            return x_0.clamp(-size, size) / size
        if self.config["clip_sample"]:
            return x_0.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        return x_0

    # -- the plan ----------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Plan a sampling run: n timesteps, spaced as configured, or those given, decreasing."""
        T = len(self)
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("pass either num_inference_steps or timesteps, got both")
        if timesteps is None:
            plan = self._spaced_timesteps(num_inference_steps)
        else:
            plan = [operator.index(t) for t in timesteps]
            if not plan or any(a <= b for a, b in itertools.pairwise(plan)):
                raise ValueError(f"timesteps must be in decreasing order, got {list(timesteps)}")
        if plan[0] >= T or plan[-1] < 0:
            raise ValueError(
                f"timesteps must lie in [0, {T - 1}], got {plan[0]} … {plan[-1]}. Take fewer "
                "steps, or another steps_offset or timestep_spacing."
            )
        start = float(self._abar[plan[0] + 1])
        if timesteps is None and start > NOISE_FLOOR >= self._abar[-1]:
            warnings.warn(
                f"{len(plan)} steps spaced {self.config['timestep_spacing']!r} start at "
                f"t={plan[0]}, where abar = {start:.2g}: that is no pure noise. "
                "timestep_spacing='trailing' starts at the last timestep.",
                stacklevel=2,
            )
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(plan)
        self.timesteps = torch.tensor(plan, dtype=torch.int64, device=device)
        self._next = dict(zip(plan, [*plan[1:], -1], strict=True))

    def _spaced_timesteps(self, n: int | None) -> list[int]:
        T = len(self)
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n <= T:
            raise ValueError(
                f"num_inference_steps must be a whole number from 1 to {T} (num_train_timesteps), "
                f"got {n!r}"
            )
        n = int(n)
        if self.config["timestep_spacing"] == "linspace":
            plan = np.linspace(0, T - 1, n).round()[::-1] if n > 1 else np.array([T - 1])
        elif self.config["timestep_spacing"] == "leading":
            plan = np.arange(n)[::-1] * (T // n) + self.config["steps_offset"]
        else:
            plan = np.round(np.arange(T, 0, -T / n)[:n]) - 1
        return plan.astype(int).tolist()

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """The timestep s that follows t: the plan's next, t - 1 without a plan, -1 at the end.

        ValueError for a t that is not in the plan.
        """
        t = torch.as_tensor(timestep)
        if self._next is None:
            return t - 1
        try:
            following = [self._next[each] for each in t.reshape(-1).tolist()]
        except KeyError as error:
            raise ValueError(
                f"timestep {error} is not in the plan of set_timesteps ({len(self.timesteps)} "
                f"timesteps from {int(self.timesteps[0])} to {int(self.timesteps[-1])}). Pass "
                "previous_timestep to step between any two."
            ) from None
        return torch.tensor(following, device=t.device).reshape(t.shape)

    # -- diffusers' surface ------------------------------------------------------------------------

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float | None = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        for name, value, known in [
            ("beta_schedule", beta_schedule, BETA_SCHEDULES),
            ("variance_type", variance_type, VARIANCE_TYPES),
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
        ]:
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if trained_betas is None:
            source = f"num_train_timesteps={num_train_timesteps}, {beta_start=}, {beta_end=}"
            beta = BETA_SCHEDULES[beta_schedule](num_train_timesteps, beta_start, beta_end)
        else:
            source = "trained_betas"
            beta = torch.as_tensor(trained_betas, dtype=torch.float64)
        if len(beta) < 1 + rescale_betas_zero_snr:
            needed = (
                "rescale_betas_zero_snr needs 2" if rescale_betas_zero_snr else "a chain needs 1"
            )
            raise ValueError(f"{needed} timesteps or more, got {len(beta)} from {source}")
        # beta_T = 1 is allowed: that is zero terminal SNR.
        if not ((beta > 0) & (beta < 1))[:-1].all() or not 0 < beta[-1] <= 1:
            raise ValueError(
                f"every beta must lie in (0, 1), got {beta.min():.3g} … {beta.max():.3g} "
                f"from {source}"
            )
        if beta_schedule not in STOCK_BETA_SCHEDULES and trained_betas is None:
            # Stock schedulers that do not compute this schedule read its betas from the config.
            defaults = self.config.get("_use_default_values", [])
            defaults = [name for name in defaults if name != "trained_betas"]
            self.register_to_config(trained_betas=beta.tolist(), _use_default_values=defaults)
        if rescale_betas_zero_snr:
            beta = zero_terminal_snr(beta)
        abar = (1 - beta).cumprod(0)
        # What is above 0 stays above 0 in float32.
        abar = abar.clamp(min=torch.finfo(torch.float32).tiny).where(abar > 0, abar)
        self._abar = torch.cat([torch.ones(1, dtype=torch.float64), abar])  # [t + 1] is abar at t
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._next: dict[int, int] | None = None
        self.ends_without_signal = bool(abar[-1] == 0)
        self.betas = beta.float()
        self.alphas = (1 - beta).float()
        self.alphas_cumprod = abar.float()
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(len(beta) - 1, -1, -1)
        self.variance_type = variance_type
        self._warn(trained=trained_betas is not None)

    def _warn(self, trained: bool) -> None:
        """Warn of settings that are allowed and rarely meant."""
        config: dict[str, Any] = dict(self.config)
        last = float(self._abar[-1])
        found: list[str] = []
        if last == 0 and config["prediction_type"] == "epsilon":
            found.append(
                "zero terminal SNR with prediction_type='epsilon': abar = 0 at the last timestep "
                "and the noise says nothing about x_0; use v_prediction or sample."
            )
        maximum = config["sample_max_value"]
        if config["thresholding"] and maximum is not None and maximum <= 1:
            effect = "is a plain clamp" if maximum == 1 else "clamps to it and divides by it"
            found.append(
                f"thresholding=True with sample_max_value={maximum} {effect}, and is no "
                "dynamic threshold; sample_max_value=None sets no maximum."
            )
        if last > NOISE_FLOOR and not trained:
            scale = 1.01 * math.log(NOISE_FLOOR) / math.log(last)
            start, end = scale * config["beta_start"], scale * config["beta_end"]
            if end < 1 and config["beta_schedule"] != "squaredcos_cap_v2":
                fix = f"beta_start={start:.3g}, beta_end={end:.3g} end below {NOISE_FLOOR:g}"
            else:
                fix = "no betas below 1 suffice; take more timesteps or rescale_betas_zero_snr"
            found.append(
                f"the chain ends at abar = {last:.3g}, which is no pure noise: with {len(self)} "
                f"timesteps {fix}."
            )
        for warning in found:
            warnings.warn(warning, stacklevel=4)

    def _get_variance(self, t: int) -> Tensor:
        """The variance at t, under the private name that diffusers' own tests call."""
        like = torch.zeros(1)
        return self.transition(like, like, t, self.previous_timestep(t))[1]

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: this family needs no scaling."""
        return sample

    def __len__(self) -> int:
        return len(self._abar) - 1  # num_train_timesteps, or the number of trained_betas
