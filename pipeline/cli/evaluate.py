"""`direct-jump evaluate`: measure how well samples match their captions."""

import argparse
from pathlib import Path

from pipeline.cli.runner import run_cli
from pipeline.evaluation.evaluate import FEATURE_NETWORKS, evaluate, evaluate_from_real
from pipeline.evaluation.retrieval import EvaluationError


def positive_int(text: str) -> int:
    """Read an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="direct-jump evaluate",
        allow_abbrev=False,
        description="Measure a run's samples, write metrics.json and update the card.",
    )
    add = parser.add_argument
    add("run", type=Path, help="a run's folder, or a saved pipeline with config.yaml")
    add("--w", type=float, nargs="+", help="one guidance weight, or several (default: 0 1 2)")
    add("--seeds", type=int, nargs="+", help="each samples every caption once (default: 0)")
    add("--choose-seed", type=int, help="the seed that w is chosen on (default: 1000)")
    add("--choose-on", type=positive_int, help="training captions to choose w on (default: 96)")
    add("--steps", type=positive_int, default=50, help="denoising steps (default: 50)")
    add("--batch", type=positive_int, default=32, help="images a call (default: 32)")
    add(
        "--more",
        action="store_true",
        help="also Fréchet distance, error by timestep, bits/dim of held-out images, diversity",
    )
    add(
        "--features",
        nargs="+",
        default=[],
        choices=list(FEATURE_NETWORKS),
        metavar="NETWORK",
        help=f"also KID and Fréchet distance in features of {', '.join(FEATURE_NETWORKS)}",
    )
    add("--clip", metavar="PATH_OR_ID", help="also the CLIP score of this model")
    add(
        "--from-real",
        type=int,
        nargs="+",
        metavar="T",
        help="instead: start from the real images of the --choose-on captions, noised to each of "
        "these timesteps; shows where quality is lost",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Evaluate a run and print the headline; 0 done, 2 bad input, 130 interrupted."""
    args = build_parser().parse_args(argv)
    ws = {} if args.w is None else {"ws": args.w}
    seeds = {} if args.seeds is None else {"seeds": args.seeds}
    choice = {"choose_seed": args.choose_seed, "choose_on": args.choose_on}
    sampling = {"steps": args.steps, "batch": args.batch}

    def command() -> None:
        if args.from_real is None:
            extra = {"more": args.more, "features": args.features, "clip": args.clip}
            print(evaluate(args.run, **ws, **seeds, **choice, **sampling, **extra))
            return
        if args.seeds or args.more or args.features or args.clip:
            raise EvaluationError("--from-real takes no --seeds, --more, --features or --clip.")
        for t, recall in evaluate_from_real(args.run, args.from_real, **ws, **choice, **sampling):
            print(f"from t = {t}: {recall}")

    return run_cli(command, "samples are cached. Run the same command to resume.")
