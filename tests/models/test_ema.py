"""The moving average of the weights warms up."""

import torch

from pipeline.models.ema import build_ema


def test_build_ema_forgets_the_first_weights():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 100.0)
    ema = build_ema(network, 0.999)
    torch.nn.init.constant_(network.weight, 1.0)
    for _ in range(300):
        ema.step(network.parameters())
    # A plain decay of 0.999 would still be at 74.
    assert abs(ema.shadow_params[0].item() - 1) < 1e-2
