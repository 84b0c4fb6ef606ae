"""What drawings are measured by: ranks, shares, copies, seams, distances of feature sets, likelihood, errors, diversity.

Images are uint8 (N, 3, H, W) or floats in [-1, 1]; features (N, D) are what some network makes of them. Numbers in brackets
are the equations of docs/equations.md.
"""

import importlib.util
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.dataset import as_float
from pipeline.diffusion import losses
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler

LEAST = 4  # rows of a distance, whose error is read from halves
HALVES = 50  # random halves that an error is read from
RESAMPLES = 1000  # of a bootstrap
FILES = {
    "png": {"format": "PNG", "optimize": True},
    "webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
}


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked."""


def centred(features: Tensor, bank: Tensor) -> Tensor:
    """Unit vectors of features less the bank's mean, float64: their products are the judge's similarity."""
    return F.normalize(features.double() - bank.double().mean(0), dim=-1)


def retrieval_ranks(features: Tensor, bank: Tensor, own: Tensor) -> Tensor:
    """The rank of row own[i] of the bank (N, D) for features[i], (M,) from 1; ties count against."""
    similarity = centred(features, bank) @ centred(bank, bank).T
    return (similarity >= similarity.gather(1, own[:, None])).sum(1)


def distinct(images: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, own): the first row of every different picture, and which of those each picture (N, 3, H, W) is."""
    seen: dict[bytes, int] = {}
    own = torch.tensor([seen.setdefault(image.numpy().tobytes(), len(seen)) for image in images])
    rows = torch.tensor([int((own == i).nonzero()[0]) for i in range(len(seen))])
    return rows, own


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, k successes of n."""
    if not 0 <= k <= n or n < 1:
        raise EvaluationError(f"a share needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    middle, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    low, high = (middle - half) / (n + z * z), (middle + half) / (n + z * z)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def share(hits: Tensor) -> dict:
    """A share of (n,) booleans with its interval."""
    k, n = int(hits.sum()), len(hits)
    return {"share": k / n, "interval": list(wilson(k, n)), "k": k, "n": n}


def summary(ranks: Tensor) -> dict:
    """How often the own picture is first, and among the first five; the median rank."""
    return {
        "first": share(ranks <= 1),
        "first_five": share(ranks <= 5),
        "median_rank": float(ranks.double().median()),
    }


def augment(images: Tensor, seed: int = 0) -> Tensor:
    """Images (N, 3, H, W) as they might have been drawn: moved by up to 3 %, scaled by up to 5 %, noise of 0.05; [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x, n = as_float(images), len(images)
    scale = 1 + 0.05 * (2 * torch.rand(n, generator=generator) - 1)
    move = 0.06 * (2 * torch.rand(n, 2, generator=generator) - 1)  # the picture is 2 wide
    theta = torch.cat([torch.diag_embed(scale[:, None].expand(n, 2)), move[:, :, None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = 1 - F.grid_sample(
        1 - x, grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )  # white around
    return (moved + 0.05 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def copy_distances(images: Tensor, others: Tensor) -> Tensor:
    """How far images (M, 3, H, W) are from others (N, 3, H, W), (M, N): the root mean square between them at 16 x 16, the
    least over moves by up to 3 %. In units of [-1, 1], whatever an ImageNet network makes of them.
    """
    x, bank = as_float(images), F.interpolate(as_float(others), (16, 16), mode="area").flatten(1)
    (height, width), reach = x.shape[2:], round(0.03 * max(x.shape[2:]))
    padded, least = (
        F.pad(x, [reach] * 4, value=1.0),
        torch.full((len(x), len(bank)), torch.inf),
    )  # white around
    for top in range(2 * reach + 1):
        for left in range(2 * reach + 1):
            moved = padded[:, :, top : top + height, left : left + width]
            torch.minimum(
                least,
                torch.cdist(F.interpolate(moved, (16, 16), mode="area").flatten(1), bank),
                out=least,
            )
    return least / bank.shape[1] ** 0.5


def copy_threshold(images: Tensor) -> float:
    """The copy distance within which 95 % of lightly augmented images (N, 3, H, W) stay from their originals."""
    pairs = zip(augment(images, seed=1).split(64), images.split(64), strict=True)
    return float(
        torch.cat([copy_distances(mine, own).diagonal() for mine, own in pairs]).quantile(0.95)
    )


def copy_rate(images: Tensor, train: Tensor, threshold: float) -> dict:
    """The share of images (M, 3, H, W) nearer to a training image (N, 3, H, W) than the threshold."""
    return share(copy_distances(images, train).amin(1) < threshold) | {"threshold": threshold}


def seam_ratio(images: Tensor, patch: int) -> float:
    """Gradient energy at the borders of patch x patch squares over that inside them, of images (N, 3, H, W)."""
    if patch < 2:
        raise EvaluationError(f"patch is {patch}, expected 2 or more: single pixels have no seams")
    x, border, inside = as_float(images).double(), [], []
    for dim in (2, 3):
        energy = x.diff(dim=dim).square().movedim(dim, 0)
        at_border = torch.arange(1, x.shape[dim]) % patch == 0
        border.append(energy[at_border].flatten())
        inside.append(energy[~at_border].flatten())
    return float(torch.cat(border).mean() / torch.cat(inside).mean())


def mean(values: Tensor, seed: int = 0) -> dict:
    """The mean of values (n,) with the 95 % interval of a bootstrap over them."""
    values = values.double().flatten()
    rows = torch.randint(
        len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed)
    )
    low, high = (
        values[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
    return {"mean": float(values.mean()), "interval": [low, high], "n": len(values)}


# ---- distances between two sets of features


class Given(nn.Identity):
    """The network that torchmetrics asks for, where features (N, D) are known already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


@torch.no_grad()
def features(network: nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    """What any network (B, 3, H, W) -> (B, D) makes of images (N, 3, H, W): (N, D), float32 on the CPU."""
    return torch.cat([network(part).float().cpu() for part in images.split(batch)])


def inception() -> nn.Module:
    """Inception-v3 of the FID paper, uint8 (B, 3, H, W) -> (B, 2048), where torch-fidelity is installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise EvaluationError(
            "inception-v3 is not installed, expected torch-fidelity: pip install torch-fidelity torchvision, "
            "or use efficientnet-lite0"
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"]).eval()


def equally_many(real: Tensor, drawn: Tensor) -> int:
    """N of two feature sets (N, D); EvaluationError unless it is the same, and 4 or more."""
    if real.shape != drawn.shape or real.ndim != 2 or len(real) < LEAST:
        raise EvaluationError(
            f"features are {tuple(real.shape)} and {tuple(drawn.shape)}, expected twice the same (N, D) with "
            f"N >= {LEAST}: distances of sets are compared at equal N only"
        )
    return len(real)


def kid(real: Tensor, drawn: Tensor, seed: int = 0) -> dict:
    """The kernel distance of real and drawn features (N, D) (Binkowski et al. 2018), unbiased for independent sets.

    Drawings of the real pictures' own captions are not: they resemble theirs, which lowers it by up to 2/N of the kernel.
    `value` is the squared mean discrepancy of all of them under (x . y / D + 1)^3. `error` is its standard error by the
    delete-half jackknife, the deviation over random halves of both sets; `interval` is 1.96 errors to either side.
    """
    from torchmetrics.image.kid import KernelInceptionDistance  # here: its import takes a second

    n, found = equally_many(real, drawn), []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        torch.manual_seed(seed)  # torchmetrics draws its subsets from the global generator
        for subsets, size in ((1, n), (HALVES, n // 2)):
            metric = KernelInceptionDistance(
                Given(real.shape[1]), subsets=subsets, subset_size=size
            )
            metric.update(real.double(), real=True)
            metric.update(drawn.double(), real=False)
            found.append(metric.compute())
    (value, _), (_, error) = found
    return {
        "value": value.item(),
        "error": error.item(),
        "n": n,
        "interval": [(value - 1.96 * error).item(), (value + 1.96 * error).item()],
    }


def frechet(x: Tensor, y: Tensor) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) of features (N, D) and (N, D), Gaussians with their means and covariances.

    Biased upwards at small N: only values at the same N and D compare (Heusel et al. 2017).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    equally_many(x, y)
    metric = FrechetInceptionDistance(Given(x.shape[1]))
    metric.update(x.double(), real=True)
    metric.update(y.double(), real=False)
    return metric.compute().item()


def halves(n: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random halves of n rows, of equal size, the same ones every time."""
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return rows[: n // 2], rows[n // 2 : 2 * (n // 2)]


# ---- what the network knows of pictures


def _ask(pipe, x_t: Tensor, t: int | Tensor, states: Tensor) -> Tensor:
    """The network's prediction at x_t (B, c, h, w) for caption states (B, L, D), without guidance, float64."""
    inputs = x_t.to(pipe.unet.dtype), t
    return pipe.unet(*inputs, encoder_hidden_states=states.to(pipe.unet.dtype), return_dict=False)[
        0
    ].double()


def _seen(pipe, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """(x_0 (B, c, h, w) in float64, caption states (B, L, D)) of captioned images."""
    states = pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)[0]
    return pipe.encode(as_float(images).to(pipe.device)).double(), states


def space(pipe) -> str:
    """Where the network works: "pixels", "patches" (a permutation of pixels) or "latents"."""
    if pipe.vae is None:
        return "pixels"
    config = pipe.vae.config
    plain = (
        isinstance(pipe.vae, PatchAutoencoder)
        and config.scaling_factor == 1
        and not config.shift_factor
    )
    return "patches" if plain else "latents"


@torch.no_grad()
def errors(
    pipe, splits: dict[str, tuple[Tensor, list[str]]], grid: int = 10, seed: int = 0
) -> dict:
    """Mean squared errors of eps and of the unclipped x_0 (15) at `grid` timesteps, of each split's (images, captions).

    One network call a timestep judges all splits at once. One noise an image, the same at every timestep.
    """
    scheduler, T = pipe.scheduler, len(pipe.scheduler)
    seen = [_seen(pipe, images, captions) for images, captions in splits.values()]
    x_0, states = (torch.cat(part) for part in zip(*seen, strict=True))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed), dtype=x_0.dtype).to(
        x_0.device
    )
    plan = ((torch.arange(grid) + 0.5) * T / grid).long().unique().tolist()
    found = {"timesteps": plan} | {name: {"eps": [], "x_0": []} for name in splits}
    for t in plan:
        x_t = scheduler.add_noise(x_0, eps, t)
        x_0_hat = scheduler.predict_x_0(_ask(pipe, x_t, t, states), t, x_t)
        for kind, error in (
            ("eps", scheduler.predict_eps(x_0_hat, x_t, t) - eps),
            ("x_0", x_0_hat - x_0),
        ):
            parts = error.square().flatten(1).mean(1).split([len(part) for part, _ in seen])
            for name, part in zip(splits, parts, strict=True):
                found[name][kind].append(part.mean().item())
    return found


def importance(scheduler: DDPMScheduler) -> Tensor:
    """How often the bound asks library time t = 1 ... T - 1, (T - 1,), sums to 1: as log((1 - abar_t) / (1 - abar_{t-1})).

    To first order that is the divergence at t for data of unit variance and a perfect network. At even odds the few divergences
    next to the image, which are most of the sum, would be met by few images.
    """
    abar = scheduler.abar(torch.arange(len(scheduler)), torch.zeros(1, dtype=torch.float64))
    gain = ((1 - abar[1:]) / (1 - abar[:-1])).log()
    return gain / gain.sum()


@torch.no_grad()
def bound(
    pipe,
    images: Tensor,
    captions: list[str],
    strata: int = 32,
    seed: int = 0,
    batch: int = 32,
    levels: int | None = 256,
) -> dict[str, Tensor]:
    """The bound's terms on -log2 p(image | caption) in bits a colour value: prior, steps and decoder, each (N,).

    Of the T - 1 divergences (11) every image is asked one in each of `strata` parts of the chain, at a timestep of its own,
    drawn as often as `importance` says; the mean of divergence / importance estimates their sum without bias. ValueError for
    latents, whose bits are not the image's.
    """
    scheduler, T, generator = (
        pipe.scheduler,
        len(pipe.scheduler),
        torch.Generator().manual_seed(seed),
    )
    share = importance(scheduler)
    u = (
        torch.arange(strata) + torch.rand(len(images), strata, generator=generator)
    ).double() / strata
    plan, parts = 1 + torch.searchsorted(share.cumsum(0), u).clamp(max=T - 2), []
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        x_0, states = _seen(pipe, images[rows], captions[rows])

        def predicted(t: int | Tensor) -> tuple[Tensor, Tensor]:
            """(x_t, clipped x_0 by the network) for one fresh noise."""
            x_t = scheduler.add_noise(
                x_0, torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device), t
            )
            return x_t, scheduler.clip(scheduler.predict_x_0(_ask(pipe, x_t, t, states), t, x_t))

        steps = []
        for t in plan[rows].T.to(x_0.device):
            x_t, x_0_hat = predicted(t)
            steps.append(
                losses.kl(scheduler, x_0, x_0_hat, x_t, t, t - 1) / share.to(t.device)[t - 1]
            )
        variance = scheduler.posterior(x_0, x_0, 1, 0)[1]  # beta~_2, since beta~_1 = 0
        nats = {
            "prior": losses.prior(scheduler, x_0, T - 1),
            "steps": torch.stack(steps).mean(0),
            "decoder": losses.decoder(x_0, predicted(0)[1], variance, levels),
        }
        bits = lambda value, x_0=x_0: losses.bits_per_dimension(
            value, x_0[0].numel(), space(pipe)
        ).cpu()
        parts.append({name: bits(value) for name, value in nats.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def file_bits(images: Tensor) -> dict[str, Tensor]:
    """Bits a colour value that lossless files of uint8 images (N, 3, H, W) take, headers and all: (N,) by format."""

    def size(image: Tensor, options: dict) -> int:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, **options)
        return 8 * buffer.getbuffer().nbytes

    return {
        name: torch.tensor([size(image, options) / image.numel() for image in images])
        for name, options in FILES.items()
    }


# ---- drawings and their captions


def diversity(features: Tensor, bank: Tensor) -> Tensor:
    """How far apart drawings of one caption are: the mean over pairs of 1 - cosine, centred on a bank (M, D), (N,).

    features (S, N, D) are of S drawings of each of N captions. 0 where all seeds draw the same, 1 where they are unrelated.
    """
    S = len(features)
    if S < 2:
        raise EvaluationError(
            f"features are of {S} drawings a caption, expected 2 or more: draw with more seeds"
        )
    together = (
        centred(features, bank).sum(0).square().sum(-1)
    )  # S + the sum over ordered pairs of their cosine
    return 1 - (together - S) / (S * (S - 1))


# ---- kept


def cached(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from a file, or computed and kept there for the next time; a kill leaves the file whole or absent."""
    if path.is_file():
        return load_file(path)
    found, new = compute(), path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, new)
    new.rename(path)
    return found
