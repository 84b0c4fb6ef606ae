"""`python benchmarks/search.py RUN [--quick]`: does more compute at inference give better images?

Recall@1 and recall@5 by the feature extractor, which no verifier sees, against the budget in
network calls: search with the model's own likelihood, and at equal calls more denoising steps or a
random candidate. Candidates are sampled and scored once, and every budget is computed from them.
All of it is cached under RUN/search, so the study can resume. Intervals are 95 %, by a paired
bootstrap over captions. Writes a table and a figure into docs/.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from pipeline import TextToImagePipeline
from pipeline.data.image_ops import as_uint8
from pipeline.data.sampler import evenly_spaced
from pipeline.evaluation.evaluate import load_run
from pipeline.evaluation.feature_extractor import FeatureExtractor
from pipeline.evaluation.reference_set import ReferenceSet
from pipeline.evaluation.retrieval import EvaluationError, centred_unit_vectors
from pipeline.evaluation.samples import SEED_STRIDE, cached_tensors, samples_identity
from pipeline.hardware import has_bf16
from pipeline.search.search import calls_of_sample
from pipeline.search.verifiers import LIKELIHOOD_WEIGHTS, LikelihoodVerifier

CAPTION_STRIDE = 100  # caption p's candidates use the seeds p * CAPTION_STRIDE, + 1, ...
QUICK = {
    "captions": 8,
    "held_out": 8,
    "candidates": 4,
    "steps": 10,
    "pairs": 4,
    "multiples": [1, 2, 4],
}
RANDOM = "a random candidate"
MORE_STEPS = "more steps"
ORACLE = "oracle: the best by the measure"
BASELINES = {RANDOM: ":", MORE_STEPS: "-.", ORACLE: "--"}  # their line styles
BANDS = ((0.0, 0.5), (0.5, 0.9), (0.9, 1.0))  # of noise levels
RECALLS = {"recall@1": 1, "recall@5": 5}


@dataclass
class Study:
    """A model, P captions, and the folder that caches their candidates."""

    pipe: TextToImagePipeline
    extractor: FeatureExtractor
    references: ReferenceSet
    rows: Tensor  # (P,)
    folder: Path
    w: float
    steps: int
    seed: int
    batch: int

    @property
    def prompts(self) -> list[str]:
        """The P captions."""
        return self.references.captions_of(self.rows)

    @property
    def calls(self) -> int:
        """The network calls of one plain image."""
        return calls_of_sample(self.pipe, self.w, self.steps)

    def cached(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the result of `compute`, from the disk if it is there."""

        def contiguous() -> dict[str, Tensor]:
            return {key: value.contiguous() for key, value in compute().items()}

        return cached_tensors(self.folder / f"{name}.safetensors", contiguous)

    def measure(self, x_0: Tensor) -> dict[str, Tensor]:
        """Return uint8 images (P, 3, H, W) of x_0, their ranks, and similarity to their own."""
        images = self.pipe.image_processor.postprocess(self.pipe.decode(x_0), output_type="pt")
        images = as_uint8(images.cpu())
        features = self.extractor.features(images)
        references = self.references.features
        own = centred_unit_vectors(references, references)[self.references.own[self.rows]]
        similarity = (centred_unit_vectors(features, references) * own).sum(1)
        ranks = self.references.ranks(features, self.rows)
        return {"images": images, "rank": ranks, "similarity": similarity}

    def batched(self, name: str, compute: Callable[[slice], Tensor]) -> Tensor:
        """Return `compute` of all captions, a batch at a time, in the precision of training."""
        device = self.pipe.device
        starts = range(0, len(self.rows), self.batch)
        bar = tqdm(starts, desc=name, unit="batch", dynamic_ncols=True)
        bf16 = has_bf16(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return torch.cat([compute(slice(start, start + self.batch)) for start in bar])

    def sample(self, name: str, candidate: int, steps: int) -> dict[str, Tensor]:
        """Return one candidate of every caption by plain sampling, measured, with its x_0."""
        first = self.seed * SEED_STRIDE + candidate
        seeds = [first + CAPTION_STRIDE * p for p in range(len(self.rows))]

        def generate(part: slice) -> Tensor:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            call = {"w": self.w, "num_inference_steps": steps, "output_type": "latent"}
            return self.pipe(self.prompts[part], generator=generators, **call).images

        def compute() -> dict[str, Tensor]:
            x_0 = self.batched(name, generate)
            return {"x_0": x_0, **self.measure(x_0)}

        return self.cached(name, compute)

    def differences(self, name: str, x_0: Tensor, verifier: LikelihoodVerifier) -> Tensor:
        """Return the verifier's differences of one candidate of each caption, (P, M)."""

        def compute(part: slice) -> Tensor:
            return verifier.differences(self.pipe, self.prompts[part], x_0[part]).T

        cached = self.cached(name, lambda: {"differences": self.batched(name, compute)})
        return cached["differences"]


# ---- measures


def best_of(values: Tensor, scores: Tensor, n: int) -> Tensor:
    """Return the value (P,) of the best scored of n of K candidates, the mean over all choices.

    values, scores: (P, K).
    """
    K = scores.shape[1]
    odds = [math.comb(K - 1 - rank, n - 1) / math.comb(K, n) for rank in range(K)]
    order = scores.argsort(1, descending=True)
    return values.double().gather(1, order) @ torch.tensor(odds, dtype=torch.float64)


def bootstrap(values: Tensor) -> tuple[float, float, float]:
    """Return the mean of (P,) with its 95 % interval over captions."""
    return bench.paired(values, torch.zeros_like(values))


def rank_correlation(scores: Tensor, others: Tensor) -> Tensor:
    """Return Spearman's correlation (P,) of two scores (P, K) of the same K candidates."""
    a, b = (x.argsort(1).argsort(1).double() - (x.shape[1] - 1) / 2 for x in (scores, others))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def score(differences: Tensor, weights: Tensor, weight: str, pairs: Tensor | None = None) -> Tensor:
    """Return scores (P, K) by some pairs (all) from differences (P, K, M + 1), weights (M + 1,)."""
    M = len(weights) - 1
    pairs = torch.arange(M) if pairs is None else pairs
    own = weights[pairs] * M / len(pairs)
    if weight == "even":
        own = torch.full((len(pairs),), 1 / len(pairs), dtype=torch.float64)
    found = differences[..., pairs].double() @ own
    if weight == "bound":
        found = found + weights[-1] * differences[..., -1].double()
    return found


def spaced(M: int, m: int) -> Tensor:
    """Return m of M strata, evenly spaced."""
    return (torch.arange(m) * M // m) + M // m // 2


# ---- the study


def run_study(study: Study, candidates: int, pairs: int, multiples: list[int]) -> dict:
    """Return recalls (P,) of every method at every budget, and the verifiers' correlations."""
    few = max(pairs // 4, 1)
    names = [f"candidate-{k}" for k in range(candidates)]
    sampled = [study.sample(name, k, study.steps) for k, name in enumerate(names)]
    ranks = torch.stack([one["rank"] for one in sampled], 1)
    similarity = torch.stack([one["similarity"] for one in sampled], 1)

    def differences(what: str, verifiers: list[LikelihoodVerifier]) -> Tensor:
        parts = zip(names, sampled, verifiers, strict=True)
        return torch.stack(
            [study.differences(f"{what}-{name}", one["x_0"], v) for name, one, v in parts], 1
        )

    scheduler = study.pipe.scheduler
    verifier = LikelihoodVerifier(pairs)
    t, _, weights = verifier.plan(scheduler, sampled[0]["x_0"].shape[1:])
    common = differences(f"pairs{pairs}", [verifier] * candidates)
    lines = []

    def add(method: str, multiple: int, calls: int, recalls: Callable[[Tensor], Tensor], of=ranks):
        """Add a line; recalls: hits like `of` -> (P,)."""
        values = {name: recalls(of <= at) for name, at in RECALLS.items()}
        lines.append({"method": method, "multiple": multiple, "calls": calls, "values": values})

    for multiple in multiples:
        budget = multiple * study.calls
        add(RANDOM, multiple, study.calls, lambda hits: hits.double().mean(1))
        if multiple > 1:
            steps = min(multiple * study.steps, scheduler.config.num_train_timesteps)
            longer = study.sample(f"steps-{steps}", 0, steps)["rank"]
            calls = calls_of_sample(study.pipe, study.w, steps)
            add(MORE_STEPS, multiple, calls, torch.Tensor.double, longer)
        for weight in LIKELIHOOD_WEIGHTS:
            for m in dict.fromkeys((pairs, few)):
                each = study.calls + LikelihoodVerifier(m, weight=weight).calls
                n = min(max(budget // each, 1), candidates)
                scores = score(common, weights, weight, spaced(pairs, m))
                calls = n * each if n > 1 else study.calls
                add(
                    f"random, {m} pairs, {weight}",
                    multiple,
                    calls,
                    lambda hits, scores=scores, n=n: best_of(hits, scores, n),
                )
        n = min(multiple, candidates)
        add(
            ORACLE,
            multiple,
            n * study.calls,
            lambda hits, n=n: best_of(hits, -ranks.double(), n),
        )

    # Does a verifier order the candidates as the measure does?
    level = (1 - scheduler.abar(t, torch.zeros(1, dtype=torch.float64))).sqrt()[:-1]
    own_pairs = [LikelihoodVerifier(few, seed=1000 + k) for k in range(candidates)]
    own = differences(f"own{few}", own_pairs)
    own_weights = [one.plan(scheduler, sampled[0]["x_0"].shape[1:])[2] for one in own_pairs]
    correlations = {}
    for weight in LIKELIHOOD_WEIGHTS:
        for m in (m for m in (1, 2, 4, 8, 16, 32, 64) if m <= pairs):
            scores = score(common, weights, weight, spaced(pairs, m))
            correlations[f"{weight}, {m} pairs"] = rank_correlation(scores, similarity)
        for low, high in BANDS if weight != "bound" else ():
            inside = ((level >= low) & (level <= high)).nonzero().flatten()
            if len(inside):
                scores = score(common, weights, weight, inside)
                name = f"{weight}, {len(inside)} pairs of noise levels {low:g} to {high:g}"
                correlations[name] = rank_correlation(scores, similarity)
        alone = [score(own[:, [k]], own_weights[k], weight) for k in range(candidates)]
        name = f"{weight}, {few} pairs, each candidate under its own t and noises"
        correlations[name] = rank_correlation(torch.cat(alone, 1), similarity)
    correlations["the decoder's term alone"] = rank_correlation(common[..., -1], similarity)
    held_out = study.rows >= study.references.n_train
    return {"lines": lines, "correlations": correlations, "held_out": held_out}


@dataclass(frozen=True)
class Rate:
    """A recall, and its difference to a random candidate's at the same captions (95 %)."""

    value: float
    difference: tuple[float, float, float]

    def __str__(self) -> str:
        middle, low, high = (f"{100 * x:+.1f}" for x in self.difference)
        return f"{self.value:.1%} ({middle}: {low} to {high})"


def split_rows(found: dict) -> dict[str, Tensor]:
    """Return which captions (P,) are in each split."""
    splits = {"training": ~found["held_out"], "held out": found["held_out"]}
    return {name: some for name, some in splits.items() if some.any()}


def rates(found: dict) -> list[dict]:
    """Return the lines of `run_study` with a Rate for every split and recall."""
    plain = found["lines"][0]["values"]
    lines = []
    for line in found["lines"]:
        by_split = {}
        for split, some in split_rows(found).items():
            by_split[split] = {
                name: Rate(float(values[some].mean()), bootstrap((values - plain[name])[some]))
                for name, values in line["values"].items()
            }
        lines.append(line | {"rates": by_split})
    return lines


def report(study: Study, found: dict, command: str, seconds: float) -> str:
    """Return the section of docs/benchmarks.md."""
    splits = split_rows(found)
    counts = " and ".join(f"{int(some.sum())} {name}" for name, some in splits.items())
    precision = "bf16" if has_bf16(study.pipe.device) else "float32"
    rows = []
    for line in rates(found):
        cells = [rate for by_name in line["rates"].values() for rate in by_name.values()]
        rows.append([line["method"], f"{line['multiple']}×", line["calls"], *cells])
    heads = [f"{split}: {name}" for split in splits for name in RECALLS]
    first = found["lines"][0]["values"]["recall@1"]
    choice = []
    for name, some in splits.items():
        always = int((first[some] == 1).sum())
        never = int((first[some] == 0).sum())
        choice.append(
            f"of {int(some.sum())} {name} captions, all candidates of {always} rank first, and "
            f"none of {never}"
        )
    correlations = []
    for name, values in found["correlations"].items():
        intervals = [bootstrap(values[some]) for some in splits.values()]
        cells = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in intervals]
        correlations.append([name, *cells])
    parts = [
        f"`{command}`; {counts} captions, w = {study.w:g}, {study.steps} steps, one image = "
        f"{study.calls} network calls. {bench.machine()}, {precision}; {seconds / 60:.0f} minutes "
        "this time.",
        "Recall; in brackets, in points, the difference to a random candidate at the same captions "
        "with its 95 % interval.",
        bench.table(["method", "budget", "calls used", *heads], rows),
        f"What there is to choose: {'; '.join(choice)}.",
        "Does a verifier order a caption's candidates as their similarity to the caption's own "
        "image does? Spearman's correlation, the mean over captions with its 95 % interval.",
        bench.table(["verifier", *splits], correlations),
    ]
    return "\n\n".join(parts)


def plot(lines: list[dict], path: Path) -> None:
    """Plot recall against the budget, a line a method, with the difference's interval shaded."""
    splits = list(lines[0]["rates"])
    methods = list(dict.fromkeys(line["method"] for line in lines))
    multiples = sorted({line["multiple"] for line in lines})
    searches = [method for method in methods if method not in BASELINES]
    colours = {method: f"C{i}" for i, method in enumerate(searches)}
    figure = Figure(figsize=(5 * len(splits), 8), layout="constrained")
    axes = figure.subplots(2, len(splits), squeeze=False)
    for row, name in zip(axes, RECALLS, strict=True):
        for ax, split in zip(row, splits, strict=True):
            for method in methods:
                points = [line for line in lines if line["method"] == method]
                x = [point["multiple"] for point in points]
                some = [point["rates"][split][name] for point in points]
                y = [100 * rate.value for rate in some]
                colour = colours.get(method, "black")
                style = {"color": colour, "linestyle": BASELINES.get(method, "-")}
                ax.plot(x, y, marker="o", markersize=3, label=method, **style)
                if method in colours:
                    plain = [rate.value - rate.difference[0] for rate in some]
                    pairs = list(zip(plain, some, strict=True))
                    low = [100 * (base + rate.difference[1]) for base, rate in pairs]
                    high = [100 * (base + rate.difference[2]) for base, rate in pairs]
                    ax.fill_between(x, low, high, alpha=0.08, color=colour)
            ax.set_xscale("log", base=2)
            ax.set(title=f"{split} captions", xlabel="budget, × one image", ylabel=f"{name}, %")
            ax.set(xticks=multiples, xticklabels=multiples)
            ax.grid(alpha=0.2)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def load_study(args: argparse.Namespace) -> Study:
    """Load the run and choose its captions."""
    if not 1 <= args.candidates <= CAPTION_STRIDE or args.captions < 1 or min(args.multiples) < 1:
        raise EvaluationError(
            f"--candidates {args.candidates}, --captions {args.captions} and --multiples "
            f"{args.multiples} must be at least 1, and --candidates at most {CAPTION_STRIDE}."
        )
    _config, extractor, references, pipe = load_run(args.run)
    n_train = references.n_train
    hidden = len(references.captions) - n_train
    held_out = hidden if args.held_out is None else args.held_out
    rows = [evenly_spaced(args.captions, n_train), n_train + evenly_spaced(held_out, hidden)]
    rows = torch.cat(rows)
    w = pipe.config.w if args.w is None else args.w
    captions = json.dumps(references.captions_of(rows)).encode()
    digest = hashlib.sha256(captions).hexdigest()[:8]
    model = samples_identity(pipe, references)
    folder = args.run / "search" / f"{model}-{digest}-steps{args.steps}-w{w:g}-seed{args.seed}"
    settings = (rows, folder, w, args.steps, args.seed, args.batch)
    return Study(pipe, extractor, references, *settings)


def main(argv: list[str] | None = None) -> int:
    """Run the study and write its section; 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/search.py", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("run", type=Path, help="a run's folder, or a saved pipeline with config.yaml")
    add("--captions", type=int, default=64, help="training captions, evenly spaced")
    add("--held-out", type=int, help="held-out captions (default: all)")
    add("--candidates", type=int, default=8, help="samples of each caption")
    add("--multiples", type=int, nargs="+", default=[1, 2, 4, 8], help="budgets, in plain samples")
    add("--steps", type=int, default=20, help="of a plain sample")
    add("--pairs", type=int, default=16, help="of the likelihood; a quarter is tried as well")
    add("--w", type=float, help="guidance weight (default: the model's own)")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=32)
    add("--quick", action="store_true", help="only check that it runs; writes no docs by default")
    add("--docs", type=Path, help="the folder of benchmarks.md and figures/ (default: docs/)")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    docs = args.docs or (None if args.quick else bench.ROOT / "docs")
    start = time.monotonic()
    try:
        study = load_study(args)
        found = run_study(study, args.candidates, args.pairs, args.multiples)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = f"python benchmarks/search.py {shlex.join(bench.command_line(argv))}"
    section = report(study, found, command, time.monotonic() - start)
    print(section)
    if docs:
        plot(rates(found), docs / "figures" / "search.png")
        head = "## Inference-time compute\n\n![Recall against the budget](figures/search.png)\n\n"
        bench.put(docs / "benchmarks.md", "<!-- search -->", "<!-- /search -->", section, head)
    return 0


if __name__ == "__main__":
    sys.exit(main())
