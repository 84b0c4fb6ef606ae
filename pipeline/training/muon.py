"""Muon (Jordan et al. 2024): orthogonalized momentum for matrices, AdamW for all other weights.

A convolution's weight (out, in, h, w) counts as the matrix (out, in h w); `torch.optim.Muon` takes
2-D weights only. Matrices of one shape are orthogonalized together, in bf16, or in float32 where a
processor only emulates bf16.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# sigma -> a sigma + b sigma^3 + c sigma^5 drives singular values towards 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# The first and last weights of a network connect pixels, not hidden features.
EDGE_LAYERS = ("conv_in", "conv_out")


def muon_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the trainable matrices between hidden features, of at least two rows and columns."""
    return [
        weight
        for name, weight in network.named_parameters()
        if weight.requires_grad
        and weight.ndim >= 2
        and min(as_matrix(weight).shape) > 1
        and name.split(".")[0] not in EDGE_LAYERS
    ]


def as_matrix(weight: Tensor) -> Tensor:
    """Return a view of a weight (out, ...) as a matrix (out, n), its columns in memory order."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.view(len(weight), -1)


def orthogonalize(stack: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return matrices (B, m, n) with singular values near 1 (0.7 to 1.2), by Newton-Schulz."""
    if stack.shape[1] > stack.shape[2]:
        return orthogonalize(stack.mT, dtype).mT
    a, b, c = NEWTON_SCHULZ
    x = (stack / stack.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.AdamW):
    """AdamW, except that `matrices` move along their orthogonalized momentum.

    At one learning rate their steps have AdamW's size, a root mean square of 0.2 (Liu et al. 2025).
    `matrix_lr` None means `lr`. `dtype` is the precision of the orthogonalization: a CPU without
    bf16 emulates it 50 times as slowly as float32. A step consumes the gradients of the matrices:
    they are None afterwards.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        matrix_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        matrix_lr = lr if matrix_lr is None else matrix_lr
        groups = [
            {"params": list(matrices), "momentum": momentum, "lr": matrix_lr},
            {"params": list(others), "momentum": None},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr, betas, weight_decay=weight_decay, fused=True)
        self.dtype = dtype
        # Only the fused kernel skips an overflow by itself; for the matrices GradScaler must do it.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step of both kinds."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["momentum"] is not None:
                self._step_matrices(group)
        super().step()
        return loss

    def _step_matrices(self, group: dict) -> None:
        """Set w to (1 - lr decay) w - lr 0.2 sqrt(max(m, n)) orthogonalize(nesterov)."""
        by_shape = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape[as_matrix(weight).shape].append(weight)
        for shape, weights in by_shape.items():
            momenta = torch.stack([self._nesterov(weight, group["momentum"]) for weight in weights])
            directions = orthogonalize(momenta, self.dtype)
            for weight, direction in zip(weights, directions, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                as_matrix(weight).add_(direction, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _nesterov(self, weight: nn.Parameter, beta: float) -> Tensor:
        """Update a weight's momentum, drop its gradient, and return the look-ahead as a matrix."""
        state = self.state[weight]
        if not state:  # AdamW's loader expects a step in every state
            state["step"] = torch.zeros(())
            state["momentum"] = torch.zeros_like(weight)
        state["step"] += 1
        momentum = state["momentum"]
        gradient: Any = weight.grad
        momentum.lerp_(gradient, 1 - beta)
        # In the memory format of the weight, whatever the gradient's is.
        ahead = torch.lerp(gradient, momentum, beta, out=torch.empty_like(weight))
        weight.grad = None
        return as_matrix(ahead)
