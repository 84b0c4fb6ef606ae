"""Nested training state as safetensors and JSON."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_state(folder: Path, name: str, tree: dict) -> None:
    """A tree of dicts, lists, tensors and plain values as `name.safetensors` and `name.json`; nothing is pickled."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(node, path):
        if isinstance(node, torch.Tensor):
            tensors[path] = node.detach().to("cpu", copy=True).contiguous()
            return {"tensor": path}
        if isinstance(node, dict):
            return {"dict": [[key, strip(value, f"{path}.{key}")] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {"list": [strip(value, f"{path}.{i}") for i, value in enumerate(node)]}
        return {"value": node}

    description = strip(tree, name)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(description))


def load_state(folder: Path, name: str) -> dict:
    """What `save_state` wrote; tuples come back as lists."""
    tensors = load_file(folder / f"{name}.safetensors")

    def fill(node):
        ((kind, value),) = node.items()
        if kind == "dict":
            return {key: fill(item) for key, item in value}
        return (
            [fill(item) for item in value]
            if kind == "list"
            else tensors[value]
            if kind == "tensor"
            else value
        )

    return fill(json.loads((folder / f"{name}.json").read_text()))
