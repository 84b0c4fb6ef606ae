"""Muon against torch's own on 2-D weights, and against the definition of orthogonality."""

import pytest
import torch
from tiny import tiny_unet
from torch import nn

from pipeline.training.muon import Muon, as_matrix, muon_parameters, orthogonalize


def gradients(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 32, 128), (2, 128, 32), (1, 64, 64)])
def test_orthogonalize_keeps_directions_and_equalizes_values(shape, dtype):
    (stack,) = gradients(shape)
    found = orthogonalize(stack, dtype)
    assert found.dtype == dtype
    found = found.double()
    u, _, vh = torch.linalg.svd(stack.double(), full_matrices=False)
    # The singular values of `found` along those of the stack.
    along = (u.mT @ found @ vh.mT).diagonal(dim1=1, dim2=2)
    assert along.quantile(0.1) > 0.6 and along.max() < 1.3
    assert (found - (u * along[:, None]) @ vh).norm() < 0.05 * found.norm()


def test_orthogonalize_of_zeros_is_zero():
    assert not orthogonalize(torch.zeros(2, 4, 8)).any()


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (torch.contiguous_format, torch.bfloat16),
        (torch.channels_last, torch.bfloat16),
        (torch.channels_last, torch.float32),
    ],
)
def test_muon_steps_as_torchs_on_flattened_weights(layout, dtype):
    """torch.optim.Muon takes matrices only: it gets a convolution as (out, in h w)."""
    shapes = [(16, 24), (32, 8), (16, 8, 3, 3), (16, 8, 3, 3)]
    ours = [
        nn.Parameter(w.contiguous(memory_format=layout) if w.ndim == 4 else w)
        for w in gradients(*shapes)
    ]
    theirs = [nn.Parameter(w.detach().clone().flatten(1)) for w in ours]
    start = [w.detach().clone() for w in ours]
    mine = Muon(ours, [], lr=0.1, weight_decay=0.2, dtype=dtype)
    stock = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        for a, b, gradient in zip(ours, theirs, gradients(*shapes, seed=step + 1), strict=True):
            a.grad, b.grad = gradient.contiguous(), gradient.flatten(1)
        mine.step()
        stock.step()
        assert all(weight.grad is None for weight in ours)
    for a, b, first in zip(ours, theirs, start, strict=True):
        moved = (a - first).flatten(1)
        # In bf16 and another order of summation.
        assert (moved - (b - first.flatten(1))).norm() < 0.03 * moved.norm()
        assert moved.norm() > 0.1


def test_muon_steps_vectors_as_adamw():
    start, gradient = gradients((7,), (7,))
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    both = [
        Muon([], [weights[0]], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3),
        torch.optim.AdamW([weights[1]], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, fused=True),
    ]
    for _ in range(3):
        for weight, optimizer in zip(weights, both, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(*weights) and not torch.equal(weights[0], start)


def test_muon_parameters_are_hidden_matrices():
    network = tiny_unet()
    chosen = {id(weight) for weight in muon_parameters(network)}
    named = {name: id(weight) in chosen for name, weight in network.named_parameters()}
    assert named["down_blocks.0.resnets.0.conv1.weight"] and named["time_embedding.linear_1.weight"]
    assert not named["conv_in.weight"] and not named["conv_out.weight"]
    assert (
        not named["down_blocks.0.resnets.0.conv1.bias"]
        and not named["down_blocks.0.resnets.0.norm1.weight"]
    )
    network.conv_in.requires_grad_(False)
    network.mid_block.requires_grad_(False)
    assert all(weight.requires_grad for weight in muon_parameters(network))


def test_as_matrix_is_a_view():
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=layout)
        as_matrix(weight).zero_()
        assert not weight.any()


def test_muon_skips_an_overflow_of_the_scaler():
    """In fp16 GradScaler skips a step with a gradient that is not finite, also of matrices."""

    def trained(overflow):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        optimizer = Muon(
            [network[1].weight], [network[0].weight, network[0].bias, network[1].bias], lr=0.01
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            scaler.scale(network(torch.ones(2, 8)).square().sum()).backward()
            if step == 1:
                if not overflow:
                    optimizer.zero_grad()
                    continue
                network[1].weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return list(network.parameters()), scaler.get_scale()

    (ours, lowered), (wanted, unchanged) = trained(True), trained(False)
    assert lowered == 2.0
    assert unchanged == 4.0
    assert all(
        a.isfinite().all() and torch.allclose(a, b, atol=1e-6)
        for a, b in zip(ours, wanted, strict=True)
    )
