"""Nested training state as safetensors and JSON, without pickles."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_state(folder: Path, name: str, tree: dict) -> None:
    """Save dicts, lists, tensors and plain values as `name.safetensors` and `name.json`."""
    tensors: dict[str, torch.Tensor] = {}

    def describe(node: Any, path: str) -> dict:
        if isinstance(node, torch.Tensor):
            tensors[path] = node.detach().to("cpu", copy=True).contiguous()
            return {"tensor": path}
        if isinstance(node, dict):
            return {"dict": [[key, describe(node[key], f"{path}.{key}")] for key in node]}
        if isinstance(node, list | tuple):
            return {"list": [describe(item, f"{path}.{i}") for i, item in enumerate(node)]}
        return {"value": node}

    description = describe(tree, name)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(description))


def load_state(folder: Path, name: str) -> dict:
    """Return what `save_state` wrote; tuples become lists."""
    tensors = load_file(folder / f"{name}.safetensors")

    def restore(node: dict) -> Any:
        ((kind, value),) = node.items()
        if kind == "dict":
            return {key: restore(item) for key, item in value}
        if kind == "list":
            return [restore(item) for item in value]
        return tensors[value] if kind == "tensor" else value

    return restore(json.loads((folder / f"{name}.json").read_text()))
