"""Verifiers: the model's own score is the likelihood's, CLIP's is CLIP's own, and each asks the network what it says."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_clip, tiny_pipeline, tiny_text
from transformers import CLIPImageProcessorPil, CLIPModel

from pipeline.diffusion import losses
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.search.verifiers import ClipVerifier, LikelihoodVerifier

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
        caption = encoder_hidden_states[:, 0, 0].long()[:, None]
        share = (-(away**2).sum(-1) / (2 * spread)).softmax(1)
        share = torch.where(
            caption < 0, share, torch.eye(2, dtype=x.dtype)[caption.clamp(min=0)[:, 0]]
        )
        return ((share[..., None] * x_0).sum(1).reshape(x_t.shape),)


def mixture(T=1000):
    """A pipeline of that network, as far as a verifier asks for one."""
    scheduler = DDPMScheduler(
        num_train_timesteps=T,
        prediction_type="sample",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    states = lambda caption: torch.full((1, 1, 1), float(caption), dtype=torch.float64)
    encode = lambda prompt, negative_prompt: (states(int(prompt)), states(-1))
    return SimpleNamespace(scheduler=scheduler, unet=Mixture(scheduler), encode_prompt=encode)


def test_the_score_is_the_log_likelihood_ratio_of_a_gaussian_mixture():
    """Exactly log p(x | c) - log p(x), within the Monte-Carlo error of 4,000 pairs of timestep and noise."""
    generator = torch.Generator().manual_seed(0)
    x = (
        MEANS[[0, 0, 1]]
        + VARIANCE**0.5 * torch.randn(3, 2, generator=generator, dtype=torch.float64)
    ).reshape(3, 2, 1, 1)
    densities = (
        -((x.flatten(1)[:, None] - MEANS) ** 2).sum(-1) / (2 * VARIANCE)
    ).exp()  # but for one factor
    exact = (densities[:, 0] / densities.mean(1)).log()
    found = [LikelihoodVerifier(pairs=1000, seed=seed)(mixture(), "0", x) for seed in range(4)]
    error = torch.stack(found).std(0) / 2
    assert exact.abs().max() > 1, "there is something to tell"
    assert ((torch.stack(found).mean(0) - exact).abs() < 4 * error + 0.05).all()


def test_a_pair_for_every_timestep_is_the_bounds_own_sum():
    """Each t = 2 ... T once with the weight of (12), the decoder's beside them; ranges of noise levels share them out."""
    scheduler = DDPMScheduler(num_train_timesteps=10, beta_end=0.99)
    t, noises, weights = LikelihoodVerifier(pairs=9).plan(scheduler, (2,))
    assert t.tolist() == [*range(1, 10), 0] and noises.shape == (10, 2)
    one = torch.zeros(1, dtype=torch.float64)
    expected = [float(losses.kl_noise_weight(scheduler, k, k - 1, one)) for k in range(1, 10)]
    assert weights[:-1].tolist() == pytest.approx(expected)
    level = (1 - scheduler.abar(torch.arange(10), one)).sqrt()
    low, high = (int(((level > a) & (level <= b))[1:].sum()) for a, b in ((0, 0.7), (0.7, 1)))
    parts = [
        LikelihoodVerifier(pairs=low, levels=(0, 0.7)),
        LikelihoodVerifier(pairs=high, levels=(0.7, 1)),
    ]
    assert torch.equal(
        LikelihoodVerifier(pairs=9, weight="steps").plan(scheduler, (2,))[2], weights[:-1]
    )
    assert sorted(torch.cat([part.plan(scheduler, (2,))[0] for part in parts]).tolist()) == list(
        range(10)
    )
    assert [part.calls for part in parts] == [2 * (low + 1), 2 * high]


@pytest.fixture
def pipe():
    return tiny_pipeline(scheduler=DDPMScheduler(clip_sample=False), w=1.5, caption_length=8)


@pytest.fixture
def x_0():
    return 0.5 * torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def outputs(pipe, x_0, t, eps):
    """The network's predictions for the empty caption and for "red heart", and x_t."""
    x_t = pipe.scheduler.add_noise(x_0, eps.expand_as(x_0), t)
    states = [
        pipe.encode_prompt([text] * len(x_0), negative_prompt="")[0] for text in ("", "red heart")
    ]
    with torch.no_grad():
        return [
            pipe.unet(x_t, t, encoder_hidden_states=s, return_dict=False)[0] for s in states
        ], x_t


def test_even_weights_compare_the_training_losses(pipe, x_0):
    """(13) of the empty caption less (13) of the caption, summed over the dimensions."""
    verifier, gaps = LikelihoodVerifier(pairs=3, weight="even"), []
    for t, eps, weight in zip(*verifier.plan(pipe.scheduler, x_0.shape[1:]), strict=True):
        (empty, told), _ = outputs(pipe, x_0, int(t), eps)
        loss = [
            losses.training_loss(pipe.scheduler, out, x_0, eps, t[None]) for out in (empty, told)
        ]
        gaps.append((loss[0] - loss[1]) * x_0[0].numel())
        assert float(weight) == pytest.approx(1 / 3)
    torch.testing.assert_close(
        verifier(pipe, "red heart", x_0), torch.stack(gaps).mean(0), rtol=1e-3, atol=1e-3
    )


def test_the_decoders_term_is_the_difference_of_its_densities(pipe, x_0):
    verifier = LikelihoodVerifier(pairs=1)
    *_, eps = verifier.plan(pipe.scheduler, x_0.shape[1:])[1]
    both, x_t = outputs(pipe, x_0, 0, eps)
    variance = pipe.scheduler.posterior(x_0, x_0, 1, 0)[1]
    empty, told = (
        losses.decoder_nll(x_0, pipe.scheduler.predict_x_0(out, 0, x_t), variance, levels=None)
        for out in both
    )
    weights = verifier.plan(pipe.scheduler, x_0.shape[1:])[2]
    found = (weights[-1] * verifier.differences(pipe, "red heart", x_0)[-1]).float()
    torch.testing.assert_close(
        found, empty - told, rtol=1e-2, atol=1e-2 * float((empty - told).abs().max())
    )


def test_many_pairs_of_prompt_and_picture_are_judged_as_each_alone(pipe, x_0):
    prompts, verifier = ["red heart", "blue circle", "green cat"], LikelihoodVerifier(pairs=2)
    alone = torch.cat(
        [verifier(pipe, prompt, x[None]) for prompt, x in zip(prompts, x_0, strict=True)]
    )
    torch.testing.assert_close(verifier(pipe, prompts, x_0), alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(verifier(pipe, "red heart", x_0)[0], alone[0], rtol=1e-3, atol=1e-3)


def test_a_verifier_asks_the_network_as_often_as_it_says(pipe, x_0, tmp_path):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda _network, args: rows.append(len(args[0])))
    verifiers = [
        LikelihoodVerifier(3),
        LikelihoodVerifier(3, weight="even"),
        LikelihoodVerifier(3, levels=(0.5, 1.0)),
        ClipVerifier(tiny_clip(tmp_path)),
    ]
    for verifier in verifiers:
        rows.clear()
        assert verifier(pipe, "red heart", x_0).shape == (3,)
        assert sum(rows) == 3 * verifier.calls
    assert [verifier.calls for verifier in verifiers] == [8, 6, 6, 0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pairs": 0}, "pairs is 0, expected 1 or more"),
        ({"weight": "odd"}, "weight is 'odd', expected one of bound, steps, even"),
        ({"levels": (2, 3)}, "levels are 2 to 3, expected a range with a timestep's in it"),
    ],
)
def test_what_cannot_be_judged_by_is_refused(pipe, x_0, change, says):
    with pytest.raises(InputError, match=says):
        LikelihoodVerifier(**change)(pipe, "red heart", x_0)


def test_a_strangers_scheduler_has_no_bound(pipe, x_0):
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler()
    with pytest.raises(
        InputError, match="the scheduler is DDIMScheduler, expected pipeline.scheduler's"
    ):
        LikelihoodVerifier(2)(pipe, "red heart", x_0)


# ---- CLIP


def test_a_clip_score_is_the_cosine_of_clips_own_logits(tmp_path, x_0):
    pipe, clip, prompts = (
        tiny_pipeline(caption_length=8),
        ClipVerifier(tiny_clip(tmp_path)),
        ["red heart", "cat", "a very long red dog"],
    )
    model, processor = (
        CLIPModel.from_pretrained(tmp_path).eval(),
        CLIPImageProcessorPil.from_pretrained(tmp_path),
    )
    pictures = pipe.image_processor.postprocess(x_0, output_type="pil")
    tokens = tiny_text("clip")[0](prompts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(
            **tokens, pixel_values=processor(images=pictures, return_tensors="pt").pixel_values
        )
    logits = out.logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(clip(pipe, prompts, x_0), logits.diagonal(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        clip(pipe, "cat", x_0), logits[:, 1], rtol=1e-3, atol=1e-3
    )  # padded to another length


def test_each_of_many_candidates_is_scored_by_its_own_prompt(tmp_path):
    """More than are judged at once."""
    pipe, clip, prompts = (
        tiny_pipeline(caption_length=8),
        ClipVerifier(tiny_clip(tmp_path)),
        ["red heart", "cat", "dog"] * 6,
    )
    x_0 = torch.randn(18, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([clip(pipe, prompts[i], x_0[i : i + 1]) for i in range(18)])
    torch.testing.assert_close(clip(pipe, prompts, x_0), alone, rtol=1e-3, atol=1e-3)
    assert (alone[:3] - alone[3:6]).abs().max() > 1e-2  # pictures matter, too


def test_what_is_no_clip_model_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(
        InputError, match="cannot be loaded .* expected a CLIP model's folder or Hub id"
    ):
        ClipVerifier(tmp_path / "nothing")
    tiny_text()[1].save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="is a model of type 'bert', expected clip"):
        ClipVerifier(tmp_path / "bert")


def test_a_clip_model_whose_weights_are_cut_off_is_one_sentence(tmp_path):
    weights = tiny_clip(tmp_path / "clip") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="clip is no CLIP model: it cannot be loaded"):
        ClipVerifier(tmp_path / "clip")
