"""Search: its score is the likelihood's own, its budget is kept to the call, and the budget of one sample is that sample."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_pipeline

from pipeline.exact import ExactDenoiser
from pipeline.guidance import InputError, interval
from pipeline.scheduler import DDPMScheduler
from pipeline.search import METHODS, Likelihood, calls_of_sample, search

MEANS, VARIANCE = torch.tensor([[0.4, -0.2], [-0.5, 0.3]], dtype=torch.float64), 0.05


class Mixture(torch.nn.Module):
    """The exact network of an even mixture of two Gaussians in two dimensions: a caption names one of them, none is both."""

    dtype = torch.float64

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        abar = self.scheduler.abar(t, x_t).reshape(-1)[0]
        x, spread = x_t.flatten(1), abar * VARIANCE + 1 - abar
        away = x[:, None] - abar.sqrt() * MEANS  # (N, 2, d)
        x_0 = MEANS + abar.sqrt() * VARIANCE / spread * away
        caption = int(encoder_hidden_states[0, 0, 0])
        share = (-(away**2).sum(-1) / (2 * spread)).softmax(1)
        if caption >= 0:
            share = torch.eye(2, dtype=x.dtype)[caption].expand_as(share)
        return ((share[..., None] * x_0).sum(1).reshape(x_t.shape),)


def mixture(T=1000):
    """A pipeline of that network, as far as a verifier asks for one."""
    scheduler = DDPMScheduler(num_train_timesteps=T, prediction_type="sample", timestep_spacing="trailing", clip_sample=False)
    states = lambda caption: torch.full((1, 1, 1), float(caption), dtype=torch.float64)
    encode = lambda prompt, negative_prompt: (states(int(prompt)), states(-1))
    return SimpleNamespace(scheduler=scheduler, unet=Mixture(scheduler), encode_prompt=encode)


def test_the_score_is_the_log_likelihood_ratio_of_a_gaussian_mixture():
    """Exactly log p(x | c) - log p(x), within the Monte-Carlo error of 4,000 pairs of timestep and noise."""
    generator = torch.Generator().manual_seed(0)
    x = (MEANS[[0, 0, 1]] + VARIANCE**0.5 * torch.randn(3, 2, generator=generator, dtype=torch.float64)).reshape(3, 2, 1, 1)
    densities = (-((x.flatten(1)[:, None] - MEANS) ** 2).sum(-1) / (2 * VARIANCE)).exp()  # but for one factor
    exact = (densities[:, 0] / densities.mean(1)).log()
    found = [Likelihood(pairs=1000, seed=seed)(mixture(), "0", x) for seed in range(4)]
    error = torch.stack(found).std(0) / 2
    assert exact.abs().max() > 1, "there is something to tell"
    assert ((torch.stack(found).mean(0) - exact).abs() < 4 * error + 0.05).all()


@pytest.fixture
def pipe():
    return tiny_pipeline(w=1.5, caption_length=8, caption_dropout=0.1)


def counted(pipe):
    """The pictures of each of its network's calls, as they come."""
    rows = []
    pipe.unet.register_forward_pre_hook(lambda _network, args: rows.append(len(args[0])))
    return rows


class Brightness:
    """A verifier that asks the network nothing."""

    calls = 0

    def __call__(self, pipe, prompt, x_0):
        return x_0.flatten(1).mean(1)


@pytest.mark.parametrize("method", ["random", "paths"])
def test_the_budget_of_one_sample_is_that_sample_bit_for_bit(pipe, method):
    plain = pipe("red heart", seed=5, num_inference_steps=4, output_type="latent").images
    rows = counted(pipe)
    found = search(pipe, "red heart", 8, Likelihood(4), method, steps=4, seed=5)
    assert torch.equal(found.x_0, plain[0]) and found.calls == sum(rows) == 8


@pytest.mark.parametrize("method", ["random", "paths"])
@pytest.mark.parametrize("verifier", [Likelihood(2), Brightness()])
@pytest.mark.parametrize("budget", [60, 200])
def test_no_budget_is_overdrawn_and_every_call_is_counted(pipe, method, verifier, budget):
    rows = counted(pipe)
    found = search(pipe, "red heart", budget, verifier, method, steps=4)
    assert found.calls == sum(rows) <= budget
    assert budget - found.calls < 8 + 3 * verifier.calls, "another candidate would not have fitted"
    assert found.curve[-1] == (found.calls, pytest.approx(found.scores.max().item()))


def test_the_best_of_several_is_returned_first(pipe):
    found = search(pipe, "red heart", 80, Brightness(), steps=4, seed=3)
    alone = torch.stack([pipe("red heart", seed=3 + i, num_inference_steps=4, output_type="latent").images[0] for i in range(10)])
    assert torch.allclose(found.scores, alone.flatten(1).mean(1).sort(descending=True).values, atol=1e-5)
    assert torch.equal(found.x_0, found.candidates[0]) and found.scores.isfinite().all()
    scores = [score for _, score in found.curve]
    assert scores == sorted(scores) and [calls for calls, _ in found.curve] == [8 * (i + 1) for i in range(10)]


def test_paths_go_where_the_verifier_points_and_copies_part_again():
    """Half of a set is bright, half is dark, and the exact denoiser draws either as often as the other."""
    scheduler = DDPMScheduler(prediction_type="sample", timestep_spacing="trailing")
    images = torch.tensor([0.5, -0.5]).repeat(8)[:, None, None, None] + 0.1 * torch.randn(
        16, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # fmt: skip
    pipe = tiny_pipeline(scheduler=scheduler, caption_length=8)
    pipe.unet = ExactDenoiser(images, scheduler)
    independent, found = (search(pipe, "red heart", 20 * 24, Brightness(), method, w=0.0, steps=20) for method in METHODS)
    assert independent.scores.mean().abs() < 0.3 and found.scores.min() > 0.3
    assert found.calls == independent.calls == 480
    assert len({int((images - x).square().flatten(1).sum(1).argmin()) for x in found.candidates}) > 1


def test_calls_are_two_where_guided_and_one_elsewhere(pipe):
    assert [calls_of_sample(pipe, w, 10) for w in (2.0, 0.0, -1.0)] == [20, 10, 10]
    assert 10 < calls_of_sample(pipe, interval(2.0, 0.5, 0.9), 10) < 20


@pytest.mark.parametrize(("change", "says"), [
    ({"budget": 7}, "the budget is 7 network calls, expected 8 or more"), ({"method": "luck"}, "expected one of random, paths"),
    ({"method": "paths", "eta": 0}, "eta is 0, expected more for method paths")])  # fmt: skip
def test_what_cannot_be_searched_is_refused(pipe, change, says):
    with pytest.raises(InputError, match=says):
        search(pipe, "red heart", **{"budget": 100, "verifier": Brightness(), "steps": 4} | change)
    with pytest.raises(InputError, match="pairs is 0"):
        Likelihood(0)
