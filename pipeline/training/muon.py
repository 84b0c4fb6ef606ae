"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal, with AdamW for what is no matrix.

A convolution's weight (out, in, h, w) is the matrix (out, in h w); `torch.optim.Muon` takes 2-D weights alone. Those of one
shape are orthogonalised together, in bf16 or, where a processor only emulates that, in float32.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # sigma -> a sigma + b sigma^3 + c sigma^5, which drives singular values towards 1
NEWTON_SCHULZ_STEPS = 5
EDGE_LAYERS = (
    "conv_in",
    "conv_out",
)  # a network's first and last weights: no matrices between hidden features


def muon_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon steps: those between hidden features, with at least two rows and columns."""
    hidden = lambda name, weight: (
        weight.ndim >= 2
        and min(as_matrix(weight).shape) > 1
        and name.split(".")[0] not in EDGE_LAYERS
    )
    return [
        weight
        for name, weight in network.named_parameters()
        if weight.requires_grad and hidden(name, weight)
    ]


def as_matrix(weight: Tensor) -> Tensor:
    """A weight (out, ...) as a matrix (out, n): a view, its columns in the order in which a convolution's weights lie."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.view(len(weight), -1)


def orthogonalize(stack: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Matrices (B, m, n) with all their singular values near 1 (0.7 to 1.2), in a dtype, by Newton-Schulz iteration."""
    if stack.shape[1] > stack.shape[2]:
        return orthogonalize(stack.mT, dtype).mT
    a, b, c = NEWTON_SCHULZ
    x = (stack / stack.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.AdamW):
    """AdamW, but that `orthogonalised` weights move along their orthogonalised momentum.

    At one learning rate their steps have AdamW's size, 0.2 root mean square (Liu et al. 2025); `matrix_lr` None is `lr`.
    `dtype` is what they are orthogonalised in: a CPU without bf16 emulates it 50 times as slowly as it computes in float32.
    A step uses up the gradients of the orthogonalised weights: they are None afterwards.
    """

    def __init__(
        self,
        orthogonalised: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        matrix_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        groups = [
            {
                "params": list(orthogonalised),
                "momentum": momentum,
                "lr": lr if matrix_lr is None else matrix_lr,
            },
            {"params": list(others), "momentum": None},
        ]
        super().__init__(
            [group for group in groups if group["params"]],
            lr,
            betas,
            weight_decay=weight_decay,
            fused=True,
        )
        self.dtype = dtype
        self._step_supports_amp_scaling = (
            False  # the fused kernel skips an overflow itself, matrices cannot: GradScaler shall
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both kinds."""
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
        """w <- (1 - lr decay) w - lr 0.2 sqrt(max(m, n)) orthogonal(nesterov), and the gradient dropped."""
        shapes = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                shapes[as_matrix(weight).shape].append(weight)
        for shape, weights in shapes.items():
            nesterov = []
            for weight in weights:
                state = self.state[weight]
                if not state:  # AdamW's loader wants a step in every state
                    state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
                state["step"] += 1
                momentum = state["momentum"]
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                ahead = torch.lerp(
                    weight.grad, momentum, group["momentum"], out=torch.empty_like(weight)
                )
                nesterov.append(
                    as_matrix(ahead)
                )  # in the weight's own memory format, whatever its gradient's is
                weight.grad = None
            for weight, direction in zip(
                weights, orthogonalize(torch.stack(nesterov), self.dtype), strict=True
            ):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                as_matrix(weight).add_(direction, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
