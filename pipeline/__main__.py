"""The command line `direct-jump COMMAND ...`, the same as `python -m pipeline COMMAND ...`."""

import importlib
import sys

COMMANDS = {  # command: (module with main(argv), what it does)
    "sample": ("pipeline.cli.sample", "generate images for a prompt"),
    "train": ("train_text2img", "train or fine-tune a model"),
    "train-autoencoder": (
        "pipeline.cli.train_autoencoder",
        "train the autoencoder of a latent diffusion model",
    ),
    "app": ("app", "serve the demo"),
    "search": (
        "pipeline.cli.search",
        "spend more network calls on one prompt, keep the best image",
    ),
    "evaluate": ("pipeline.cli.evaluate", "measure how well samples match their captions"),
    "sweep": ("pipeline.cli.sweep", "measure what sampling parameters change"),
    "emoji": ("pipeline.cli.emoji", "write an embedded emoji dataset as an image folder"),
    "push": ("pipeline.cli.push", "upload a run or a saved pipeline to the Hub"),
    "pull": ("pipeline.cli.pull", "download a model from the Hub, without code"),
    "export": ("pipeline.cli.export", "write a run for git, or as one file for other programs"),
    "space": ("pipeline.cli.space", "upload the demo as a Space"),
}


def usage() -> str:
    """Return the list of commands."""
    lines = [f"  {name:19}{summary}" for name, (_, summary) in COMMANDS.items()]
    return (
        "usage: direct-jump COMMAND ...\n\n" + "\n".join(lines) + "\n\ndirect-jump COMMAND --help"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        problem = f"unknown command {arguments[0]!r}" if arguments else "no command given"
        print(f"error: {problem}\n{usage()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[arguments[0]]
    return importlib.import_module(module).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
