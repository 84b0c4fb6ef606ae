"""Short digests of values and of network weights."""

import hashlib

import torch


def weights_digest(network: torch.nn.Module) -> str:
    """16 hexadecimal digits of a network's class and weights."""
    seen = hashlib.blake2b(type(network).__name__.encode(), digest_size=8)
    for name, value in network.state_dict().items():
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        seen.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return seen.hexdigest()


def digest(*parts: object) -> str:
    """16 hexadecimal digits that depend on all parts and on nothing else."""
    return hashlib.blake2b(
        repr(parts).encode("utf-8", "backslashreplace"), digest_size=8
    ).hexdigest()
