"""Tests never reach for the network, and two of them at once share the machine."""

import os

LONG = (
    "train",
    "reliability",
    "app",
    "hub",
    "stream",
    "evaluation",
    "benchmarks",
    "finetune",
    "text_to_image",
    "sweep",
    "variations",
)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process waits at the end for one that another has just begun."""
    rank = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
