"""`direct-jump search`: spend network calls on one prompt."""

import argparse
import sys
from pathlib import Path

from tqdm.auto import tqdm

from pipeline.cli.sample import output_files, png_settings, save_image
from pipeline.hardware import pick_device
from pipeline.models.loading import load_pipeline
from pipeline.search.search import SEARCH_METHODS, search_steps
from pipeline.search.verifiers import ClipVerifier, LikelihoodVerifier

# ---- the command line


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    arguments = argparse.ArgumentParser(
        prog="direct-jump search",
        allow_abbrev=False,
        description="Spend network calls on one prompt, keep the best picture.",
    )
    arguments.add_argument(
        "model",
        metavar="RUN_OR_ID",
        help="a run's folder, a saved pipeline's, or a model of the Hub",
    )
    arguments.add_argument("prompt", help='what to draw, such as "a green cat"')
    arguments.add_argument(
        "--budget",
        type=int,
        required=True,
        help="network calls, the verifier's too; one guided picture of 50 steps takes 100",
    )
    arguments.add_argument(
        "--method", default="random", help=f"one of {', '.join(SEARCH_METHODS)} (default: random)"
    )
    arguments.add_argument(
        "--verifier",
        default="likelihood",
        help="likelihood (the model's own, the default), or a CLIP model's folder or Hub id",
    )
    arguments.add_argument(
        "--pairs",
        type=int,
        default=16,
        help="how closely likelihood looks: two calls each, and two more (default: 16)",
    )
    arguments.add_argument(
        "--negative", default="", help="what to keep away from, instead of the empty prompt"
    )
    arguments.add_argument("--w", type=float, help="guidance (default: the model's own)")
    arguments.add_argument(
        "--seed", type=int, default=0, help="candidate i draws its noise from seed + i (default: 0)"
    )
    arguments.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    arguments.add_argument(
        "--eta",
        type=float,
        help="1 draws new noise at every step, 0 none (default: the scheduler's own)",
    )
    arguments.add_argument(
        "--device", help="cpu, cuda, or mps for a CLIP verifier (default: the fastest there is)"
    )
    arguments.add_argument(
        "-o",
        "--out",
        "--output",
        dest="out",
        type=Path,
        default=Path("best.png"),
        help="the picture's file (default: best.png)",
    )
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Search, print the curve, save the best; 0 is done, 2 bad input, told in one sentence, 130 stopped with the best so far."""
    arguments, best, stopped = build_parser().parse_args(argv), None, False
    try:
        (output,) = output_files(arguments.out, 1)
        verifier = (
            LikelihoodVerifier(arguments.pairs)
            if arguments.verifier == "likelihood"
            else ClipVerifier(arguments.verifier)
        )
        double = isinstance(verifier, LikelihoodVerifier)
        pipe = load_pipeline(arguments.model).to(pick_device(arguments.device, double))
        stages = search_steps(
            pipe,
            arguments.prompt,
            arguments.budget,
            verifier,
            arguments.method,
            w=arguments.w,
            negative_prompt=arguments.negative or None,
            steps=arguments.steps,
            eta=arguments.eta,
            seed=arguments.seed,
        )
        with tqdm(unit="call", dynamic_ncols=True) as bar:
            try:
                for found in stages:
                    bar.total, best = found.total, found.best or best
                    bar.update(found.calls - bar.n)
            except KeyboardInterrupt:
                if best is None:
                    raise
                stopped = True
        number, x_0 = best if stopped else (int(found.order[0]), found.x_0)
        image = pipe.image_processor.postprocess(pipe.decode(x_0[None]), output_type="pil")[0]
        alone = (
            arguments.method == "random"
        )  # a path's copies have noise of their own, which no seed draws alone
        settings = png_settings(pipe, arguments.model, arguments) if alone else None
        save_image(image, output, settings and settings | {"seed": arguments.seed + number})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for calls, score in found.curve:
        print(f"{calls} network calls: best score {score:.4g}")
    judged = len(found.curve) if alone and found.curve else len(found.candidates)
    print(
        f"{output}: the best of {judged} by {found.calls} network calls"
        + (f"; seed {arguments.seed + number} draws it alone" if alone else "")
    )
    return 130 if stopped else 0
