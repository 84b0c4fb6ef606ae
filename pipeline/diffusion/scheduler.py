"""The noise process of the lecture, forwards and backwards, as a diffusers scheduler.

Numbers in brackets are the equations of docs/equations.md. Library time counts 0 … T-1, the lecture's 1 … T; the clean
image is library time -1, where abar = 1. All variances are per dimension.
"""

import itertools
import math
import operator
import warnings
from typing import ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

NOISE_FLOOR = 1e-3  # (6): a chain that starts above this abar starts from an image, not from noise


def linear(T: int, start: float, end: float) -> Tensor:
    """beta grows evenly (Ho et al. 2020)."""
    return torch.linspace(start, end, T, dtype=torch.float64)


def scaled_linear(T: int, start: float, end: float) -> Tensor:
    """sqrt(beta) grows evenly (latent diffusion)."""
    return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2


def squaredcos_cap_v2(T: int, start: float, end: float) -> Tensor:
    """abar falls like a squared cosine, whatever the range; beta is capped at 0.999 (Nichol & Dhariwal 2021)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def sigmoid(T: int, start: float, end: float) -> Tensor:
    """beta follows a logistic curve from start to end (GeoDiff, Xu et al. 2022)."""
    return torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (end - start) + start


def root(factor: np.floating | Tensor) -> float | Tensor:
    """The square root of a factor, in its own precision."""
    return factor.sqrt() if isinstance(factor, Tensor) else float(np.sqrt(factor))


def one(t: int | Tensor) -> int | Tensor:
    """A single timestep as an int, several as they are."""
    return t if isinstance(t, Tensor) and t.ndim else operator.index(t)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x, or float32 where that is less."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """x in the dtype that arithmetic runs in: its own, at least float32."""
    return x.to(wide_dtype(x))


BETA_SCHEDULES = {f.__name__: f for f in (linear, scaled_linear, squaredcos_cap_v2, sigmoid)}
STOCK_BETA_SCHEDULES = (
    "linear",
    "scaled_linear",
    "squaredcos_cap_v2",
)  # which every scheduler of diffusers computes
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


def zero_terminal_snr(beta: Tensor) -> Tensor:
    """Shift and stretch sqrt(abar) so that abar_T = 0 and abar_1 stays (Lin et al. 2024, algorithm 1)."""
    sqrt_abar = (1 - beta).cumprod(0).sqrt()
    sqrt_abar = (sqrt_abar - sqrt_abar[-1]) * sqrt_abar[0] / (sqrt_abar[0] - sqrt_abar[-1])
    abar = torch.cat([torch.ones(1, dtype=beta.dtype), sqrt_abar**2])
    return 1 - abar[1:] / abar[:-1]


def tensors(mean: Tensor, variance: np.floating | Tensor) -> tuple[Tensor, Tensor]:
    """Both as tensors of one dtype."""
    return mean, torch.as_tensor(variance, dtype=mean.dtype, device=mean.device)


class DDPMScheduler(SchedulerMixin, ConfigMixin):
    """q(x_t | x_0) forwards, p(x_s | x_t) backwards, for any s < t. Configuration keys and defaults are diffusers' own.

    Every method takes a timestep as an int, a 0-d tensor or one per example (B,). Arithmetic runs in the sample's dtype
    but never below float32; what a network or a loop takes next (x_t, v, x_s) comes back in the sample's dtype. For a
    single timestep the factors are numbers, not tensors: on small images a step costs what its tensor operations cost to start.
    """

    _compatibles: ClassVar = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    # -- forwards ------------------------------------------------------------------------------------------------

    def abar(self, t: int | Tensor, like: Tensor) -> Tensor:
        """(4) abar_t = product of alpha_1 … alpha_t, shaped to multiply `like` (B, ...); t = -1 gives 1."""
        return torch.as_tensor(self._factor(t, like), dtype=wide_dtype(like), device=like.device)

    def _factor(self, t: int | Tensor, like: Tensor) -> np.floating | Tensor:
        """`abar`, but where t is one timestep a number of the same precision, which costs no tensor operations."""
        key = (like.device, wide_dtype(like))
        if key not in self._tables:
            self._tables[key] = self._abar.to(*key), self._abar.to(key[1]).numpy()
        table, numbers = self._tables[key]
        if not isinstance(t, Tensor) or (t.ndim == 0 and t.device.type == "cpu"):
            self._check_range(t := operator.index(t))
            return numbers[t + 1]
        try:
            abar_t = table.index_select(0, t.to(like.device).reshape(-1) + 1)
        except IndexError:
            self._check_range(int(t.min())), self._check_range(int(t.max()))
            raise
        return abar_t.reshape(-1, *[1] * (like.ndim - 1)) if t.ndim else abar_t.reshape(())

    def snr(self, t: int | Tensor, like: Tensor) -> Tensor:
        """Signal to noise ratio abar / (1 - abar) of x_t, from (5)."""
        abar_t = self.abar(t, like)
        return abar_t / (1 - abar_t)

    def add_noise_step(
        self, x_s: Tensor, noise: Tensor, t: int | Tensor, s: int | Tensor | None = None
    ) -> Tensor:
        """(1) x_t = sqrt(alpha) x_s + sqrt(1 - alpha) eps, one step of the chain; s = t - 1 unless given."""
        alpha = self._factor(t, x_s) / self._factor(t - 1 if s is None else s, x_s)
        x_t = root(alpha) * wide(x_s)
        x_t += root(1 - alpha) * wide(noise)
        return x_t.to(x_s.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """(5) the direct jump x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps."""
        abar_t = self._factor(timesteps, original_samples)
        x_t = root(abar_t) * wide(original_samples)
        x_t += root(1 - abar_t) * wide(noise)  # in place: a large batch is a matter of memory
        return x_t.to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022)."""
        abar_t = self._factor(timesteps, sample)
        v = root(abar_t) * wide(noise)
        v -= root(1 - abar_t) * wide(sample)
        return v.to(sample.dtype)

    # -- backwards -----------------------------------------------------------------------------------------------

    def predict_x_0(self, model_output: Tensor, t: int | Tensor, x_t: Tensor) -> Tensor:
        """(15) x_0 from the network's prediction, unclipped; ValueError for epsilon where abar_t = 0."""
        abar_t, out, x_t = self._factor(t, x_t), wide(model_output), wide(x_t)
        if self.config.prediction_type == "sample":
            return out
        if self.config.prediction_type == "v_prediction":
            return root(abar_t) * x_t - root(1 - abar_t) * out
        if self.ends_without_signal and torch.as_tensor(abar_t == 0).any():
            raise ValueError(
                f"prediction_type='epsilon' cannot give x_0 at t={t}: abar_t = 0 there. "
                "Train and sample with v_prediction or sample."
            )
        return (x_t - root(1 - abar_t) * out) / root(abar_t)

    def predict_eps(self, x_0: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """(5), rearranged for the noise: eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
        abar_t = self._factor(t, x_t)
        return (wide(x_t) - root(abar_t) * wide(x_0)) / root(1 - abar_t)

    def posterior(
        self, x_0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(8), (9) mean (B, ...) and variance of q(x_s | x_t, x_0), s < t; the lecture's mu~ and beta~ at s = t - 1."""
        return tensors(*self._posterior(x_0, x_t, t, s))

    def _posterior(
        self, x_0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor
    ) -> tuple[Tensor, np.floating | Tensor]:
        abar_t, abar_s = self._factor(t, x_t), self._factor(s, x_t)
        alpha = abar_t / abar_s  # alpha_t when s = t - 1
        x_0_part = root(abar_s) * (1 - alpha) / (1 - abar_t)
        x_t_part = root(alpha) * (1 - abar_s) / (1 - abar_t)
        return x_0_part * wide(x_0) + x_t_part * wide(x_t), (1 - abar_s) / (1 - abar_t) * (
            1 - alpha
        )

    def transition(
        self, x_0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor, eta: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(x_s | x_t): (10) with the configured variance at eta = 1, (19) below it; ValueError for other
        eta, and for any but 1 where the variance is no posterior's.
        """
        return tensors(*self._transition(x_0, x_t, t, s, eta))

    def _transition(
        self, x_0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor, eta: float
    ) -> tuple[Tensor, np.floating | Tensor]:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1] (0 is DDIM, 1 is ancestral), got {eta}")
        if eta != 1 and self.config.variance_type.startswith("fixed_large"):
            raise ValueError(
                f"eta={eta} needs variance_type='fixed_small', got {self.config.variance_type!r}: "
                "(19) interpolates the posterior's own variance"
            )
        mean, variance = self._posterior(x_0, x_t, t, s)
        if self.config.variance_type.startswith("fixed_large"):
            abar_t, abar_s = self._factor(t, x_t), self._factor(s, x_t)
            variance = (1 - abar_t / abar_s) * (abar_s != 1)  # the clean image gets no noise
        if eta != 1:
            variance = eta**2 * variance
            abar_s = self._factor(s, x_t)
            mean = root(abar_s) * wide(x_0) + root(1 - abar_s - variance) * self.predict_eps(
                x_0, x_t, t
            )
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
        """(16) x_s from x_t and the network's prediction, with the clipped x_0 of (15) beside it.

        s is `previous_timestep`, or what follows `timestep` in the plan of `set_timesteps`; the step to the clean image
        (s = -1) returns the mean. `eta` in [0, 1] leads from DDIM to ancestral sampling (19). One normal draw a step,
        in the dtype of `model_output`; none where nothing random is left. Stock diffusers pipelines hand over their own
        `eta`, 0 unless told otherwise.
        """
        t = one(timestep)
        s = self._following(t) if previous_timestep is None else one(previous_timestep)
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the sample's shape {tuple(sample.shape)}, got "
                f"{tuple(model_output.shape)}; learned variances are not implemented"
            )
        beyond = s >= (t.to(s.device) if isinstance(s, Tensor) and isinstance(t, Tensor) else t)
        if eta > 0 and (beyond if isinstance(beyond, bool) else beyond.any()):
            raise ValueError(
                f"previous_timestep must lie before timestep where eta is above 0, got {s} and {t}"
            )
        x_0 = self.clip(self.predict_x_0(model_output, t, sample))
        mean, variance = self._transition(x_0, wide(sample), t, s, eta)
        if eta > 0 and (s >= 0 if isinstance(s, int) else (s >= 0).any()):
            z = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            mean += root(variance) * z
        out = mean.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(*out) if return_dict else out

    def clip(self, x_0: Tensor) -> Tensor:
        """x_0 kept in the images' range: by a dynamic threshold (Saharia et al. 2022), a clamp, or not at all."""
        if self.config.thresholding:
            size = torch.quantile(
                x_0.abs().flatten(1), self.config.dynamic_thresholding_ratio, dim=1
            )
            size = size.clamp(min=1, max=self.config.sample_max_value).reshape(
                -1, *[1] * (x_0.ndim - 1)
            )
            return x_0.clamp(-size, size) / size
        if self.config.clip_sample:
            return x_0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_0

    # -- the plan ------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Plan the timesteps of a sampling run: so many, spaced as configured, or these, in decreasing order."""
        T = len(self)
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("pass either num_inference_steps or timesteps, got both")
        if timesteps is None:
            plan = self._spaced(self._count(num_inference_steps))
        else:
            plan = [operator.index(t) for t in timesteps]
            if not plan or any(a <= b for a, b in itertools.pairwise(plan)):
                raise ValueError(f"timesteps must be in decreasing order, got {list(timesteps)}")
        if plan[0] >= T or plan[-1] < 0:
            cure = (
                ""
                if timesteps is not None
                else "; take fewer steps, or another steps_offset or timestep_spacing"
            )
            raise ValueError(
                f"timesteps must lie in [0, {T - 1}] (num_train_timesteps is {T}), "
                f"got {plan[0]} … {plan[-1]}{cure}"
            )
        if timesteps is None and self._abar[plan[0] + 1] > NOISE_FLOOR >= self._abar[-1]:
            warnings.warn(
                f"{len(plan)} steps spaced {self.config.timestep_spacing!r} start at t={plan[0]}, where "
                f"abar = {self._abar[plan[0] + 1]:.2g}: that is no pure noise. timestep_spacing='trailing' "
                "starts at the last timestep.",
                stacklevel=2,
            )
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(plan)
        self.timesteps = torch.tensor(plan, dtype=torch.int64, device=device)
        self._next = dict(zip(plan, [*plan[1:], -1], strict=True))

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """The timestep s that sampling goes to from t: the plan's next, t - 1 without a plan, -1 at the end."""
        return torch.as_tensor(
            self._following(timestep),
            device=timestep.device if isinstance(timestep, Tensor) else None,
        )

    def _following(self, timestep: int | Tensor) -> int | Tensor:
        t = one(timestep)
        if self._next is None:
            return t - 1
        try:
            if isinstance(t, int):
                return self._next[t]
            following = [self._next[each] for each in t.reshape(-1).tolist()]
        except KeyError as error:
            raise ValueError(
                f"timestep {error} is not in the plan of set_timesteps ({len(self.timesteps)} timesteps "
                f"from {int(self.timesteps[0])} to {int(self.timesteps[-1])}); pass previous_timestep= "
                "to step between any two"
            ) from None
        return torch.tensor(following, device=t.device).reshape(t.shape)

    def _count(self, n) -> int:
        T = len(self)
        whole = isinstance(n, int | np.integer) and not isinstance(n, bool)
        if not whole or not 1 <= n <= T:
            raise ValueError(
                f"num_inference_steps must be a whole number from 1 to {T} (num_train_timesteps), "
                f"got {n!r}"
            )
        return int(n)

    def _spaced(self, n: int) -> list[int]:
        T = len(self)
        if self.config.timestep_spacing == "linspace":
            plan = np.linspace(0, T - 1, n).round()[::-1] if n > 1 else np.array([T - 1])
        elif self.config.timestep_spacing == "leading":
            plan = np.arange(n)[::-1] * (T // n) + self.config.steps_offset
        else:
            plan = np.round(np.arange(T, 0, -T / n)[:n]) - 1
        return plan.astype(int).tolist()

    # -- diffusers' surface --------------------------------------------------------------------------------------

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
    ):
        for name, value, known in [
            ("beta_schedule", beta_schedule, BETA_SCHEDULES),
            ("variance_type", variance_type, VARIANCE_TYPES),
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
        ]:
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if trained_betas is not None:
            beta = torch.as_tensor(trained_betas, dtype=torch.float64)
        else:
            beta = BETA_SCHEDULES[beta_schedule](num_train_timesteps, beta_start, beta_end)
        given = (
            f"beta_start={beta_start}, beta_end={beta_end}"
            if trained_betas is None
            else "trained_betas"
        )
        if not len(beta):
            raise ValueError(
                f"num_train_timesteps must be at least 1, got {num_train_timesteps}"
                if trained_betas is None
                else "trained_betas must be at least 1 beta, got none"
            )
        if (
            not ((beta > 0) & (beta < 1))[:-1].all() or not 0 < beta[-1] <= 1
        ):  # beta_T = 1: zero terminal SNR
            raise ValueError(
                f"every beta must lie in (0, 1), got {beta.min():.3g} … {beta.max():.3g} "
                f"from {given}"
            )
        if rescale_betas_zero_snr and len(beta) < 2:
            raise ValueError(
                "rescale_betas_zero_snr needs at least 2 timesteps, got 1: no signal at the last leaves none at all"
            )
        if (
            beta_schedule not in STOCK_BETA_SCHEDULES and trained_betas is None
        ):  # so that stock schedulers take it from this config
            defaults = [
                name
                for name in self.config.get("_use_default_values", [])
                if name != "trained_betas"
            ]
            self.register_to_config(trained_betas=beta.tolist(), _use_default_values=defaults)
        if rescale_betas_zero_snr:
            beta = zero_terminal_snr(beta)
        abar = (1 - beta).cumprod(0)
        abar = torch.where(
            abar > 0, abar.clamp(min=torch.finfo(torch.float32).tiny), abar
        )  # float32 keeps what is not 0
        self._abar = torch.cat([torch.ones(1, dtype=torch.float64), abar])  # [t + 1] is abar at t
        self.ends_without_signal = bool(self._abar[-1] == 0)
        self._tables: dict = {}
        self._next: dict[int, int] | None = None
        self.betas, self.alphas, self.alphas_cumprod = (
            beta.float(),
            (1 - beta).float(),
            self._abar[1:].float(),
        )
        self.init_noise_sigma = 1.0
        self.custom_timesteps, self.num_inference_steps = False, None
        self.timesteps = torch.arange(len(beta) - 1, -1, -1)
        self.variance_type = variance_type
        self._warn(beta, trained=trained_betas is not None)

    def _warn(self, beta: Tensor, trained: bool) -> None:
        config, last = self.config, float(self._abar[-1])
        if last == 0 and config.prediction_type == "epsilon":
            warnings.warn(
                "zero terminal SNR with prediction_type='epsilon': at the last timestep abar = 0 and the "
                "noise says nothing about x_0; use v_prediction or sample.",
                stacklevel=4,
            )
        if (
            config.thresholding
            and config.sample_max_value is not None
            and config.sample_max_value <= 1
        ):
            what = (
                "is a plain clamp"
                if config.sample_max_value == 1
                else "clamps to it and divides by it"
            )
            warnings.warn(
                f"thresholding=True with sample_max_value={config.sample_max_value} {what}, and is no "
                "dynamic threshold; sample_max_value=None sets no maximum.",
                stacklevel=4,
            )
        if last > NOISE_FLOOR and not trained:
            scale = 1.01 * math.log(NOISE_FLOOR) / math.log(last)
            start, end = scale * config.beta_start, scale * config.beta_end
            cure = "no range of betas below 1 ends in noise; take more timesteps or rescale_betas_zero_snr=True"
            if end < 1 and config.beta_schedule != "squaredcos_cap_v2":
                cure = f"beta_start={start:.3g}, beta_end={end:.3g} end below {NOISE_FLOOR:g}"
            warnings.warn(
                f"the chain ends at abar = {last:.3g}, which is no pure noise: with {len(beta)} timesteps "
                f"{cure}.",
                stacklevel=4,
            )

    def _check_range(self, t: int) -> None:
        if not -1 <= t < len(self._abar) - 1:
            raise ValueError(f"timestep must be in [-1, {len(self._abar) - 2}], got {t}")

    def _get_variance(self, t: int) -> Tensor:
        like = torch.zeros(1)
        return self.transition(like, like, t, self.previous_timestep(t))[1]

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: this family needs no scaling."""
        return sample

    def __len__(self) -> int:
        return len(self._abar) - 1  # num_train_timesteps, or the number of trained_betas
