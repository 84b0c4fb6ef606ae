"""`direct-jump search`: spend network calls on one prompt."""

import argparse
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pipeline.cli.runner import run_cli
from pipeline.cli.sample import output_files, png_settings, save_image
from pipeline.hardware import pick_device
from pipeline.models.loading import load_pipeline
from pipeline.search.search import search_steps
from pipeline.search.verifiers import ClipVerifier, LikelihoodVerifier


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="direct-jump search",
        allow_abbrev=False,
        description="Spend network calls on one prompt and keep the best image.",
    )
    add = parser.add_argument
    add("model", metavar="RUN_OR_ID", help="a run's folder, a saved pipeline, or a Hub id")
    add("prompt", help='such as "a green cat"')
    add(
        "--budget",
        type=int,
        required=True,
        help="network calls, the verifier's included; a guided image of 50 steps takes 100",
    )
    add(
        "--verifier",
        default="likelihood",
        help="likelihood (the model's own, the default), or a CLIP model's folder or Hub id",
    )
    add("--pairs", type=int, default=16, help="of the likelihood, two calls each (default: 16)")
    add("--negative", default="", help="negative prompt, instead of the empty one")
    add("--w", type=float, help="guidance weight (default: the model's own)")
    add("--seed", type=int, default=0, help="candidate i uses seed + i (default: 0)")
    add("--steps", type=int, default=50, help="denoising steps (default: 50)")
    add("--eta", type=float, help="noise of a step, 0 to 1 (default: the scheduler's own)")
    add("--device", help="cpu, cuda, or mps with a CLIP verifier (default: the fastest)")
    out = {"dest": "out", "type": Path, "default": Path("best.png")}
    add("-o", "--out", "--output", help="the image's file (default: best.png)", **out)
    return parser


def search(args: argparse.Namespace) -> int:
    """Search, save the best image and print the curve; 0 done, 130 interrupted."""
    (output,) = output_files(args.out, 1)
    likelihood = args.verifier == "likelihood"
    verifier = LikelihoodVerifier(args.pairs) if likelihood else ClipVerifier(args.verifier)
    pipe = load_pipeline(args.model).to(pick_device(args.device, double=likelihood))
    options = {"w": args.w, "steps": args.steps, "eta": args.eta, "seed": args.seed}
    options["negative_prompt"] = args.negative or None
    states = search_steps(pipe, args.prompt, args.budget, verifier, **options)
    state = next(states)
    best = None
    with tqdm(total=state.total, unit="call", dynamic_ncols=True) as bar:
        try:
            for state in states:
                best = state.best or best
                bar.update(state.calls - bar.n)
            best = (int(state.order[0]), state.x_0)
        except KeyboardInterrupt:
            if best is None:
                raise
    number, x_0 = best
    images: Any = pipe.image_processor.postprocess(pipe.decode(x_0[None]), output_type="pil")
    seed = args.seed + number
    settings = png_settings(pipe, args.model, args)
    save_image(images[0], output, settings and settings | {"seed": seed})
    for calls, score in state.curve:
        print(f"{calls} network calls: best score {score:.4g}")
    n = len(state.curve) or len(state.candidates)
    print(f"{output}: the best of {n} by {state.calls} network calls; --seed {seed} samples it")
    return 0 if state.last else 130


def main(argv: list[str] | None = None) -> int:
    """Run a search; 0 done, 2 bad input, 130 interrupted, with the best so far if there is one."""
    args = build_parser().parse_args(argv)
    return run_cli(lambda: search(args), "no candidate was scored, and nothing was saved.")
