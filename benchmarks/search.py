"""`python benchmarks/search.py runs/emoji [--quick]`: does more compute at inference draw better pictures?

How often a caption's own picture is first and among the first five by the ImageNet judge, which no verifier sees, against the
budget in network calls: search with the model's own likelihood, paths, and at equal calls more denoising steps or a random pick.
Candidates are drawn and judged once and every budget is computed from them; all of it is kept under RUN/search, so the study
can be stopped. Intervals are of 95 %, by a paired bootstrap over captions. Writes a table and a figure into docs/.
"""

import argparse
import hashlib
import json
import math
import operator
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
from pipeline import hardware
from pipeline.data import image_ops, sampler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation import evaluate, retrieval, samples
from pipeline.evaluation.feature_extractor import FeatureExtractor
from pipeline.evaluation.reference_set import ReferenceSet
from pipeline.evaluation.samples import SEED_STRIDE
from pipeline.search import search
from pipeline.search.verifiers import LIKELIHOOD_WEIGHTS, LikelihoodVerifier

APART = 100  # caption p's candidates are drawn from seeds p * APART, p * APART + 1, ...
QUICK = {
    "captions": 8,
    "held_out": 8,
    "candidates": 4,
    "steps": 10,
    "pairs": 4,
    "multiples": [1, 2, 4],
}
BASELINES = {
    "a random pick": ":",
    "more steps": "-.",
    "oracle: the judge picks": "--",
}  # and how their lines are drawn
EDGES = (operator.attrgetter("low"), operator.attrgetter("high"))  # of a Rate
BANDS = ((0.0, 0.5), (0.5, 0.9), (0.9, 1.0))  # of noise levels


@dataclass
class Study:
    """A model, P captions, and the folder that keeps what was drawn of them."""

    pipe: TextToImagePipeline
    judge: FeatureExtractor
    bank: ReferenceSet
    rows: Tensor  # (P,) of the bank
    folder: Path
    w: float
    steps: int
    seed: int
    batch: int

    @property
    def prompts(self) -> list[str]:
        return [self.bank.captions[row] for row in self.rows]

    @property
    def call(self) -> dict:
        return {
            "w": self.w,
            "num_inference_steps": self.steps,
            "eta": None,
            "negative_prompt": None,
        }

    @property
    def one(self) -> int:
        """The network calls of one plain picture."""
        return search.calls_of_sample(self.pipe, self.w, self.steps)

    def seeds(self, first: int, n: int = 1) -> list[int]:
        """The seeds of candidates first ... first + n - 1 of every caption, (P n)."""
        return [
            self.seed * SEED_STRIDE + APART * p + first + k
            for p in range(len(self.rows))
            for k in range(n)
        ]

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, from the disk where it has been made."""
        make_whole = lambda: {key: value.contiguous() for key, value in make().items()}
        return samples.cached_tensors(self.folder / f"{name}.safetensors", make_whole)

    def judged(self, x_0: Tensor) -> dict[str, Tensor]:
        """Pictures uint8 (P, 3, H, W) of what was drawn (P, c, h, w), the rank of their own, and their similarity to it."""
        images = self.pipe.image_processor.postprocess(self.pipe.decode(x_0), output_type="pt")
        images = image_ops.as_uint8(images.cpu())
        features, own = self.judge.features(images), self.bank.own[self.rows]
        ranks = retrieval.retrieval_ranks(features, self.bank.features, own)
        centre = retrieval.centred_unit_vectors(self.bank.features, self.bank.features)[own]
        similarity = (retrieval.centred_unit_vectors(features, self.bank.features) * centre).sum(1)
        return {"images": images, "rank": ranks, "similarity": similarity}

    def batched(self, what: str, make: Callable[[slice], Tensor], size: int) -> Tensor:
        """`make` over all captions, `size` at a time, in the precision of training."""
        bf16 = hardware.has_bf16(self.pipe.device)
        with torch.no_grad(), torch.autocast(self.pipe.device.type, torch.bfloat16, enabled=bf16):
            starts = tqdm(
                range(0, len(self.rows), size), desc=what, unit="batch", dynamic_ncols=True
            )
            return torch.cat([make(slice(i, i + size)) for i in starts])

    def drawn(self, name: str, first: int, steps: int) -> dict[str, Tensor]:
        """Candidate `first` of every caption by plain sampling, judged; `x_0` beside it."""

        def make():
            seeds = self.seeds(first)
            some = lambda part: (
                self.pipe(
                    self.prompts[part],
                    generator=[torch.Generator().manual_seed(s) for s in seeds[part]],
                    output_type="latent",
                    **self.call | {"num_inference_steps": steps},
                ).images
            )
            x_0 = self.batched(name, some, self.batch)
            return {"x_0": x_0, **self.judged(x_0)}

        return self.kept(name, make)

    def differences(self, name: str, x_0: Tensor, verifier: LikelihoodVerifier) -> Tensor:
        """What a verifier's pairs say of one candidate of each caption, (P, M)."""
        some = lambda part: verifier.differences(self.pipe, self.prompts[part], x_0[part]).T
        return self.kept(name, lambda: {"differences": self.batched(name, some, self.batch)})[
            "differences"
        ]

    def paths(self, n: int, verifier: LikelihoodVerifier) -> dict[str, Tensor]:
        """The best of n paths of each caption, judged."""
        name, seeds, size = (
            f"paths-{n}-{verifier.pairs}-{verifier.weight}",
            self.seeds(0, n),
            max(self.batch // n, 1),
        )

        def some(part: slice) -> Tensor:
            prompts = self.prompts[part]
            own = seeds[part.start * n : part.start * n + len(prompts) * n]
            for found in search.advance_paths(
                self.pipe, prompts, n, verifier, own, self.call, self.batch
            ):  # noqa: B007
                pass
            x_0, scores, _calls = found
            return x_0[torch.arange(len(prompts)) * n + scores.argmax(1)]

        return self.kept(name, lambda: self.judged(self.batched(name, some, size)))


# ---- measures


def best_of(values: Tensor, scores: Tensor, n: int) -> Tensor:
    """The mean value (P,) of the best scored of n candidates, over all choices of n of the K drawn ones, (P, K)."""
    K = scores.shape[1]
    odds = torch.tensor(
        [math.comb(K - 1 - r, n - 1) / math.comb(K, n) for r in range(K)], dtype=torch.float64
    )
    return values.double().gather(1, scores.argsort(1, descending=True)) @ odds


def bootstrap(values: Tensor) -> tuple[float, float, float]:
    """The mean of (P,) with its 95 % interval over captions."""
    return bench.paired(values, torch.zeros_like(values))


def rank_correlation(scores: Tensor, others: Tensor) -> Tensor:
    """Spearman's correlation of two orders of the same K candidates, (P,) of (P, K)."""
    a, b = (x.argsort(1).argsort(1).double() - (x.shape[1] - 1) / 2 for x in (scores, others))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def score(differences: Tensor, weights: Tensor, weight: str, pairs: Tensor | None = None) -> Tensor:
    """Scores (P, K) by some of a Likelihood's pairs (all), from its differences (P, K, M + 1) and weights (M + 1,)."""
    M = len(weights) - 1
    pairs = torch.arange(M) if pairs is None else pairs
    own = (
        torch.full((len(pairs),), 1 / len(pairs), dtype=torch.float64)
        if weight == "even"
        else weights[pairs] * M / len(pairs)
    )
    found = differences[..., pairs].double() @ own
    return found + weights[-1] * differences[..., -1].double() if weight == "bound" else found


def spaced(M: int, m: int) -> Tensor:
    """m of M strata, evenly."""
    return (torch.arange(m) * M // m) + M // m // 2


# ---- the study


def measured(
    study: Study, candidates: int, pairs: int, multiples: list[int], guides: list[str]
) -> dict:
    """Every method at every budget: values (P,) of rank 1 and rank 5, and the diagnostics."""
    few, names = max(pairs // 4, 1), [f"candidate-{k}" for k in range(candidates)]
    drawn = [study.drawn(name, k, study.steps) for k, name in enumerate(names)]
    ranks, similarity = (
        torch.stack([one[key] for one in drawn], 1) for key in ("rank", "similarity")
    )
    verifier = LikelihoodVerifier(pairs)
    judge = lambda what, of: torch.stack(
        [
            study.differences(f"{what}-{name}", one["x_0"], of(k))
            for k, (name, one) in enumerate(zip(names, drawn, strict=True))
        ],
        1,
    )
    apart = lambda k: LikelihoodVerifier(few, seed=1000 + k)
    common, own = judge(f"pairs{pairs}", lambda k: verifier), judge(f"own{few}", apart)
    shape = drawn[0]["x_0"].shape[1:]
    t, _, weights = verifier.plan(study.pipe.scheduler, shape)
    hits = {"first": ranks <= 1, "first five": ranks <= 5}
    by = lambda values: {name: values(hit) for name, hit in hits.items()}
    kept = lambda one: {
        "first": (one["rank"] <= 1).double(),
        "first five": (one["rank"] <= 5).double(),
    }
    plain, lines = by(lambda hit: hit.double().mean(1)), []

    def add(method: str, multiple: int, calls: int, values: dict[str, Tensor]) -> None:
        lines.append({"method": method, "multiple": multiple, "calls": calls, "values": values})

    for multiple in multiples:
        budget, longer = (
            multiple * study.one,
            min(multiple * study.steps, study.pipe.scheduler.config.num_train_timesteps),
        )
        add("a random pick", multiple, study.one, plain)
        if multiple > 1:
            drawn_longer = study.drawn(f"steps-{longer}", 0, longer)
            add(
                "more steps",
                multiple,
                search.calls_of_sample(study.pipe, study.w, longer),
                kept(drawn_longer),
            )
        for weight in LIKELIHOOD_WEIGHTS:
            for m in dict.fromkeys((pairs, few)):
                each = study.one + LikelihoodVerifier(m, weight=weight).calls
                n = min(max(budget // each, 1), candidates)
                scores = score(common, weights, weight, spaced(pairs, m))
                add(
                    f"random, {m} pairs, {weight}",
                    multiple,
                    n * each if n > 1 else study.one,
                    by(lambda hit, n=n, scores=scores: best_of(hit, scores, n)),
                )
        for guide in (LikelihoodVerifier(few, weight=weight) for weight in guides):
            each = search.calls_of_path(study.pipe, guide, study.call)
            n = budget // each
            values = kept(study.paths(n, guide)) if n > 1 else plain
            add(
                f"paths, {few} pairs, {guide.weight}",
                multiple,
                n * each if n > 1 else study.one,
                values,
            )
        n = min(multiple, candidates)
        add(
            "oracle: the judge picks",
            multiple,
            n * study.one,
            by(lambda hit, n=n: best_of(hit, -ranks.double(), n)),
        )

    alike = lambda scores: rank_correlation(scores, similarity)
    level, told = (
        (1 - study.pipe.scheduler.abar(t, torch.zeros(1, dtype=torch.float64))).sqrt()[:-1],
        {},
    )
    for weight in LIKELIHOOD_WEIGHTS:
        for m in (m for m in (1, 2, 4, 8, 16, 32, 64) if m <= pairs):
            told[f"{weight}, {m} pairs"] = alike(score(common, weights, weight, spaced(pairs, m)))
        for low, high in BANDS if weight != "bound" else ():
            inside = ((level >= low) & (level <= high)).nonzero().flatten()
            if len(inside):
                told[f"{weight}, {len(inside)} pairs of noise levels {low:g} to {high:g}"] = alike(
                    score(common, weights, weight, inside)
                )
        alone = [
            score(own[:, [k]], apart(k).plan(study.pipe.scheduler, shape)[2], weight)
            for k in range(candidates)
        ]
        told[f"{weight}, {few} pairs, each candidate under its own t and noises"] = alike(
            torch.cat(alone, 1)
        )
    told["the decoder's term alone"] = alike(common[..., -1])
    return {"lines": lines, "plain": plain, "told": told, "held": study.rows >= study.bank.n_train}


@dataclass(frozen=True)
class Rate:
    """A share of captions, and how far it is from a random pick's at the same captions, with the 95 % interval of that."""

    share: float
    apart: float
    low: float
    high: float


def rates(found: dict) -> list[dict]:
    """The lines of `measured` with a Rate for every split and kind of hit in the place of their values."""
    splits = {"training": ~found["held"], "held out": found["held"]}
    splits = {name: some for name, some in splits.items() if some.any()}
    rate = lambda values, plain: Rate(float(values.mean()), *bootstrap(values - plain))
    return [
        line
        | {
            "rates": {
                name: {
                    hit: rate(values[some], found["plain"][hit][some])
                    for hit, values in line["values"].items()
                }
                for name, some in splits.items()
            }
        }
        for line in found["lines"]
    ]


def report(study: Study, found: dict, command: str, seconds: float) -> str:
    """The section of docs/benchmarks.md."""
    lines = rates(found)
    splits = {name: found["held"] == (name == "held out") for name in lines[0]["rates"]}
    counts = " and ".join(f"{int(some.sum())} {name}" for name, some in splits.items())
    bf16 = hardware.has_bf16(study.pipe.device)
    out = [
        f"`{command}`; {counts} captions, w = {study.w:g}, {study.steps} steps, one picture = {study.one} network calls. "
        f"{bench.machine()}, {'bf16' if bf16 else 'float32'}; {seconds / 60:.0f} minutes this time.",
        "",
        "Share of captions whose own picture the judge puts first, and among the first five; in brackets, in points, the "
        "difference to a random pick at the same captions with its 95 % interval.",
        "",
    ]
    heads = [f"{name}: {hit}" for name in splits for hit in found["plain"]]
    out += [
        f"| method | budget | calls used | {' | '.join(heads)} |",
        "|---" * (3 + len(heads)) + "|",
    ]
    shown = lambda rate: (
        f"{rate.share:.1%} ({100 * rate.apart:+.1f}: {100 * rate.low:+.1f} to {100 * rate.high:+.1f})"
    )
    for line in lines:
        cells = [shown(rate) for hits in line["rates"].values() for rate in hits.values()]
        out.append(
            f"| {line['method']} | {line['multiple']}× | {line['calls']} | {' | '.join(cells)} |"
        )
    first, choice = found["plain"]["first"], []
    for name, some in splits.items():
        always, never = (int((first[some] == share).sum()) for share in (1, 0))
        choice.append(
            f"of {int(some.sum())} {name} captions {always} have all of their candidates first, {never} none"
        )
    out += [
        "",
        f"What there is to choose: {'; '.join(choice)}.",
        "",
        "Does a verifier order the candidates of a caption as the judge's similarity to the caption's own picture does? "
        "Spearman's correlation, mean over captions with its 95 % interval.",
        "",
        f"| verifier | {' | '.join(splits)} |",
        "|---" * (1 + len(splits)) + "|",
    ]
    for name, values in found["told"].items():
        cells = [
            "{:+.3f} ({:+.3f} to {:+.3f})".format(*bootstrap(values[some]))
            for some in splits.values()
        ]
        out.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(out)


def plot(lines: list[dict], path: Path) -> None:
    """Rates against the budget, one line a method, the interval of the difference shaded around searches."""
    splits, methods = list(lines[0]["rates"]), list(dict.fromkeys(line["method"] for line in lines))
    multiples = sorted({line["multiple"] for line in lines})
    colour = {method: f"C{i}" for i, method in enumerate(m for m in methods if m not in BASELINES)}
    figure = Figure(figsize=(5 * len(splits), 8), layout="constrained")
    axes = figure.subplots(2, len(splits), squeeze=False)
    for row, hit in zip(axes, lines[0]["rates"][splits[0]], strict=True):
        for ax, name in zip(row, splits, strict=True):
            for method in methods:
                mine = [one for one in lines if one["method"] == method]
                x, some = (
                    [one["multiple"] for one in mine],
                    [one["rates"][name][hit] for one in mine],
                )
                style = {
                    "color": colour.get(method, "black"),
                    "linestyle": BASELINES.get(method, "-"),
                }
                ax.plot(
                    x,
                    [100 * rate.share for rate in some],
                    marker="o",
                    markersize=3,
                    label=method,
                    **style,
                )
                if method in colour:
                    edges = (
                        [100 * (rate.share - rate.apart + edge(rate)) for rate in some]
                        for edge in EDGES
                    )
                    ax.fill_between(x, *edges, alpha=0.08, color=colour[method])
            ax.set_xscale("log", base=2)
            ax.set(title=f"{name} captions", xlabel="budget, × one picture", ylabel=f"{hit}, %")
            ax.set(xticks=multiples, xticklabels=multiples)
            ax.grid(alpha=0.2)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/search.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "run", type=Path, help="a run's folder, or a saved pipeline's with its config.yaml"
    )
    parser.add_argument(
        "--captions", type=int, default=64, help="training captions, evenly over the set"
    )
    parser.add_argument("--held-out", type=int, help="held-out captions (default: all)")
    parser.add_argument("--candidates", type=int, default=8, help="pictures drawn of each caption")
    parser.add_argument(
        "--multiples", type=int, nargs="+", default=[1, 2, 4, 8], help="budgets, in plain samples"
    )
    parser.add_argument("--steps", type=int, default=20, help="of a plain sample")
    parser.add_argument(
        "--pairs",
        type=int,
        default=16,
        help="of the likelihood; a quarter of them is tried as well",
    )
    parser.add_argument(
        "--paths",
        nargs="+",
        choices=LIKELIHOOD_WEIGHTS,
        default=["bound"],
        help="the weights that guide paths",
    )
    parser.add_argument("--w", type=float, help="guidance (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small one, to see that it runs; writes docs only where told to",
    )
    parser.add_argument(
        "--docs", type=Path, help="where benchmarks.md and figures/ are (default: docs/)"
    )
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    docs = args.docs or (None if args.quick else bench.ROOT / "docs")
    began = time.monotonic()
    try:
        if not 1 <= args.candidates <= APART or args.captions < 1 or min(args.multiples) < 1:
            raise retrieval.EvaluationError(
                f"--candidates is {args.candidates}, --captions {args.captions}, --multiples {args.multiples}, expected 1 "
                f"or more of each, and {APART} candidates at most: leave them out"
            )
        _config, judge, bank, pipe = evaluate.load_run(args.run)
        held = len(bank.captions) - bank.n_train
        shown = sampler.evenly_spaced(args.captions, bank.n_train)
        hidden = bank.n_train + sampler.evenly_spaced(
            held if args.held_out is None else args.held_out, held
        )
        rows, w = torch.cat([shown, hidden]), pipe.config.w if args.w is None else args.w
        captions = hashlib.sha256(
            json.dumps([bank.captions[row] for row in rows]).encode()
        ).hexdigest()[:8]
        name = f"{samples.samples_identity(pipe, bank)}-{captions}-steps{args.steps}-w{w:g}-seed{args.seed}"
        study = Study(
            pipe,
            judge,
            bank,
            rows,
            args.run / "search" / name,
            w,
            args.steps,
            args.seed,
            args.batch,
        )
        found = measured(study, args.candidates, args.pairs, args.multiples, args.paths)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = f"python benchmarks/search.py {shlex.join(bench.command_line(argv))}"
    section = report(study, found, command, time.monotonic() - began)
    print(section)
    if docs:
        plot(rates(found), docs / "figures" / "search.png")
        head = "## Inference-time compute\n\n![Rates against the budget](figures/search.png)\n\n"
        bench.put(docs / "benchmarks.md", "<!-- search -->", "<!-- /search -->", section, head)
    return 0


if __name__ == "__main__":
    sys.exit(main())
