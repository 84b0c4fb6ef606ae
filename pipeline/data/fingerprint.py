"""Short digests of values and of network weights."""

import hashlib

import torch


def weights_digest(network: torch.nn.Module) -> str:
    """Return 16 hexadecimal digits of a network's class and weights."""
    state = hashlib.blake2b(type(network).__name__.encode(), digest_size=8)
    for name, value in network.state_dict().items():
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def digest(*parts: object) -> str:
    """Return 16 hexadecimal digits that depend on all parts and on nothing else."""
    content = repr(parts).encode("utf-8", "backslashreplace")
    return hashlib.blake2b(content, digest_size=8).hexdigest()
