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
    add(
        "--w",
        dest="ws",
        type=float,
        nargs="+",
        help="one guidance weight, or several (default: 0 1 2)",
    )
    add("--seeds", type=int, nargs="+", help="each samples every caption once (default: 0)")
    add("--choose-seed", type=int, help="the seed that w is chosen on (default: 1000)")
    add("--choose-on", type=positive_int, help="training captions to choose w on (default: 96)")
    add("--steps", type=positive_int, help="denoising steps (default: 50)")
    add("--batch", type=positive_int, help="images a call (default: 32)")
    add(
        "--more",
        action="store_true",
        default=None,
        help="also Fréchet distance, error by timestep, bits/dim of held-out images, diversity",
    )
    add(
        "--features",
        nargs="+",
        choices=list(FEATURE_NETWORKS),
        metavar="NETWORK",
        help=f"also KID and Fréchet distance in features of {', '.join(FEATURE_NETWORKS)}",
    )
    add("--clip", metavar="PATH_OR_ID", help="also the CLIP score of this model")
    add("--alignment", action="store_true", default=None, help="also the alignment score")
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
    args = vars(build_parser().parse_args(argv))
    # What is not given has its default in evaluate().
    given = {name: value for name, value in args.items() if value is not None}
    run = given.pop("run")
    timesteps = given.pop("from_real", None)

    def command() -> None:
        if timesteps is None:
            print(evaluate(run, **given))
            return
        unused = ", ".join(given.keys() & {"seeds", "more", "features", "clip", "alignment"})
        if unused:
            raise EvaluationError(f"--from-real does not use {unused}. Leave it out.")
        for t, recall in evaluate_from_real(run, timesteps, **given):
            print(f"from t = {t}: {recall}")

    return run_cli(command, "samples are cached. Run the same command to resume.")
