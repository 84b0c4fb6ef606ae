"""`direct-jump evaluate`: measure a run's samples."""

import argparse
import sys
from pathlib import Path

from pipeline.data.sampler import evenly_spaced
from pipeline.evaluation.evaluate import (
    DEFAULT_WS,
    FEATURE_NETWORKS,
    denoise_real_images,
    evaluate,
    load_run,
)
from pipeline.evaluation.retrieval import EvaluationError
from pipeline.hub.model_card import TRAINING_FACTS, refresh_card
from pipeline.runs.folder import RunError, RunFolder
from pipeline.runs.results import format_proportion, format_results

DEFAULT_OPTIONS = {
    "seeds": [0],
    "choose_seed": 1000,
    "choose_on": 96,
    "on": 256,
}  # of the command line's


def check_arguments(args: argparse.Namespace) -> None:
    """EvaluationError for counts below 1, and for options that what is asked for does not use."""
    for name in ("steps", "batch", "on", "choose_on"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise EvaluationError(
                f"--{name.replace('_', '-')} is {value}, expected 1 or more: leave it out"
            )
    real, mode = (
        bool(args.from_real),
        "--from-real" if args.from_real else "--sweep" if args.sweep else None,
    )
    on, several = args.on is not None, len(args.seeds or []) > 1
    choosing = {
        "--choose-on": args.choose_on is not None,
        "--choose-seed": args.choose_seed is not None,
    }
    if mode is None:
        unused = ["--on"] if on else []
        if not unused and len(args.w or []) == 1 and any(choosing.values()):
            given = " and ".join(name for name, value in choosing.items() if value)
            raise EvaluationError(
                f"{given} means nothing with one --w, expected several to choose from: leave it out"
            )
    else:
        given = {
            "--sweep": real and args.sweep,
            "--more": args.more,
            "--features": args.features,
            "--clip": args.clip,
            "--seeds": real and args.seeds,
            "a second --seeds": several and not real,
            "--on": real and on,
            "a second --w": real and len(args.w or []) > 1,
            **{name: value and not real for name, value in choosing.items()},
        }
        unused = [name for name, value in given.items() if value]
    if unused:
        beside = f"beside {mode}" if mode else "without --sweep"
        raise EvaluationError(
            f"{' and '.join(unused)} means nothing {beside}, expected it alone: leave it out"
        )


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="direct-jump evaluate",
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
    )
    parser.add_argument(
        "run", type=Path, help="a run's folder, or a saved pipeline's with its config.yaml"
    )
    parser.add_argument(
        "--w",
        type=float,
        nargs="+",
        help="guidance to choose from (default: 0 1 2), or one to use; of --sweep and --from-real the one that "
        "they start from (default: the model's own)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="each draws every caption once, and reports (default: 0)",
    )
    parser.add_argument(
        "--choose-seed", type=int, help="the seed that w is chosen on (default: 1000)"
    )
    parser.add_argument(
        "--choose-on", type=int, help="how many training captions w is chosen on (default: 96)"
    )
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    parser.add_argument(
        "--batch", type=int, default=32, help="pictures that are drawn at once (default: 32)"
    )
    parser.add_argument(
        "--from-real",
        type=int,
        nargs="+",
        metavar="T",
        help="instead: start from the real pictures of the --choose-on captions, noised to each of these "
        "timesteps, and see where on the way quality is lost",
    )
    parser.add_argument(
        "--more",
        action="store_true",
        help="also: Fréchet distance, error by timestep, bits per dimension of held-out pictures, diversity",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        default=[],
        choices=list(FEATURE_NETWORKS),
        metavar="NETWORK",
        help=f"also: KID and Fréchet distance by these feature networks, of {', '.join(FEATURE_NETWORKS)}",
    )
    parser.add_argument("--clip", metavar="PATH_OR_ID", help="also: the CLIP score by this model")
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="KNOB=A,B",
        help="instead: draw --on captions with one knob changed at a time, such as w=0,1,2,4 steps=10,25,50 "
        "eta=0,1 interval=0:1,0.3:0.9 weights=averaged,raw; goes on where it was stopped",
    )
    parser.add_argument(
        "--on", type=int, help="how many captions each point of a sweep draws (default: 256)"
    )
    args = parser.parse_args(argv)
    ws = args.w or list(DEFAULT_WS)
    from pipeline.evaluation.sweep import sweep

    try:
        check_arguments(args)
        vars(args).update(
            {name: value for name, value in DEFAULT_OPTIONS.items() if getattr(args, name) is None}
        )
        if args.from_real:
            _config, judge, bank, pipe = load_run(args.run)
            w = args.w[0] if args.w else pipe.config.w
            rows = evenly_spaced(args.choose_on, bank.n_train)
            for t in args.from_real:
                found = denoise_real_images(
                    judge, bank, pipe, rows, t, w, args.choose_seed, args.steps, args.batch
                )
                first, five = (
                    format_proportion(found["first"]),
                    format_proportion(found["first_five"]),
                )
                print(f"from t = {found['t']}: first {first}, first five {five}")
            return 0
        if args.sweep:
            result = sweep(
                args.run, args.sweep, args.w, args.seeds[0], args.on, args.steps, args.batch
            )
        else:
            result = evaluate(
                args.run,
                ws,
                args.seeds,
                args.choose_seed,
                args.choose_on,
                args.steps,
                args.batch,
                deep=args.more,
                features=args.features,
                clip=args.clip,
            )
        print(format_results(result))
        if (args.run / TRAINING_FACTS).is_file() and RunFolder(
            args.run
        ).card.is_file():  # a run that is trained on has none
            refresh_card(args.run)
    except (
        ValueError,
        RunError,
        OSError,
    ) as error:  # of ours, of diffusers' for a call that it cannot make
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
