"""Verifiers: the likelihood is the model's own, and a CLIP score is CLIP's own."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_clip, tiny_pipeline, tiny_text
from tiny_run import emoji_images
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from pipeline.diffusion import losses
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.search.verifiers import ClipVerifier, LikelihoodVerifier, clip_scores

MEANS = torch.tensor([[0.4, -0.2], [-0.5, 0.3]], dtype=torch.float64)
VARIANCE = 0.05


class Mixture(torch.nn.Module):
    """The exact network of an even mixture of two Gaussians in two dimensions.

    A caption names one of them; no caption is both.
    """

    dtype = torch.float64

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        abar = self.scheduler.abar(t, x_t).reshape(-1)[0]
        x = x_t.flatten(1)
        spread = abar * VARIANCE + 1 - abar
        away = x[:, None] - abar.sqrt() * MEANS  # (N, 2, d)
        x_0 = MEANS + abar.sqrt() * VARIANCE / spread * away
        caption = encoder_hidden_states[:, 0, 0].long()[:, None]
        both = (-(away**2).sum(-1) / (2 * spread)).softmax(1)
        one = torch.eye(2, dtype=x.dtype)[caption.clamp(min=0)[:, 0]]
        share = torch.where(caption < 0, both, one)
        return ((share[..., None] * x_0).sum(1).reshape(x_t.shape),)


def mixture():
    """A pipeline of that network, as far as a verifier needs one."""
    settings = {"prediction_type": "sample", "timestep_spacing": "trailing", "clip_sample": False}
    scheduler = DDPMScheduler(**settings)

    def states(caption):
        return torch.full((1, 1, 1), float(caption), dtype=torch.float64)

    def encode(prompt, negative_prompt):
        return states(int(prompt)), states(-1)

    return SimpleNamespace(scheduler=scheduler, unet=Mixture(scheduler), encode_prompt=encode)


def test_likelihood_verifier_scores_the_log_likelihood_ratio():
    """Exactly log p(x | c) - log p(x), within the Monte-Carlo error of 4,000 pairs."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    x = MEANS[[0, 0, 1]] + VARIANCE**0.5 * noise
    # Up to one factor.
    densities = (-((x[:, None] - MEANS) ** 2).sum(-1) / (2 * VARIANCE)).exp()
    exact = (densities[:, 0] / densities.mean(1)).log()
    assert exact.abs().max() > 1, "there is something to tell apart"
    candidates = x.reshape(3, 2, 1, 1)
    found = torch.stack(
        [LikelihoodVerifier(pairs=1000, seed=seed)(mixture(), "0", candidates) for seed in range(4)]
    )
    error = found.std(0) / 2
    assert ((found.mean(0) - exact).abs() < 4 * error + 0.05).all()


def test_plan_of_a_pair_a_timestep_is_the_bounds_own_sum():
    """Each t = 2 ... T has the weight of (12); ranges of noise levels share the timesteps out."""
    scheduler = DDPMScheduler(num_train_timesteps=10, beta_end=0.99)
    t, noises, weights = LikelihoodVerifier(pairs=9).plan(scheduler, (2,))
    assert t.tolist() == [*range(1, 10), 0]  # the decoder's is the last
    assert noises.shape == (10, 2)
    one = torch.zeros(1, dtype=torch.float64)
    expected = [float(losses.kl_noise_weight(scheduler, k, k - 1, one)) for k in range(1, 10)]
    assert weights[:-1].tolist() == pytest.approx(expected)
    steps = LikelihoodVerifier(pairs=9, weight="steps").plan(scheduler, (2,))[2]
    assert torch.equal(steps, weights[:-1])
    level = (1 - scheduler.abar(torch.arange(10), one)).sqrt()
    low, high = (int(((level > a) & (level <= b))[1:].sum()) for a, b in ((0, 0.7), (0.7, 1)))
    below = LikelihoodVerifier(pairs=low, levels=(0, 0.7))
    above = LikelihoodVerifier(pairs=high, levels=(0.7, 1))
    t = torch.cat([verifier.plan(scheduler, (2,))[0] for verifier in (below, above)])
    assert sorted(t.tolist()) == list(range(10))
    assert (below.calls, above.calls) == (2 * (low + 1), 2 * high)


@pytest.fixture
def pipe():
    return tiny_pipeline(scheduler=DDPMScheduler(clip_sample=False), w=1.5, caption_length=8)


@pytest.fixture
def x_0():
    return 0.5 * torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def outputs(pipe, x_0, t, eps):
    """The network's predictions for the empty caption and for "red heart", and x_t."""
    x_t = pipe.scheduler.add_noise(x_0, eps.expand_as(x_0), t)
    found = []
    for text in ("", "red heart"):
        states = pipe.encode_prompt([text] * len(x_0), negative_prompt="")[0]
        with torch.no_grad():
            found.append(pipe.unet(x_t, t, encoder_hidden_states=states, return_dict=False)[0])
    return *found, x_t


def test_even_weights_compare_the_training_losses(pipe, x_0):
    """(13) of the empty caption less (13) of the caption, summed over the dimensions."""
    verifier = LikelihoodVerifier(pairs=3, weight="even")
    gaps = []
    for t, eps, weight in zip(*verifier.plan(pipe.scheduler, x_0.shape[1:]), strict=True):
        empty, captioned, _ = outputs(pipe, x_0, int(t), eps)
        of_empty = losses.training_loss(pipe.scheduler, empty, x_0, eps, t[None])
        of_caption = losses.training_loss(pipe.scheduler, captioned, x_0, eps, t[None])
        gaps.append((of_empty - of_caption) * x_0[0].numel())
        assert float(weight) == pytest.approx(1 / 3)
    found = verifier(pipe, "red heart", x_0)
    torch.testing.assert_close(found, torch.stack(gaps).mean(0), rtol=1e-3, atol=1e-3)


def test_differences_of_the_decoder_are_its_densities(pipe, x_0):
    verifier = LikelihoodVerifier(pairs=1)
    _, noises, weights = verifier.plan(pipe.scheduler, x_0.shape[1:])
    empty, captioned, x_t = outputs(pipe, x_0, 0, noises[-1])
    variance = pipe.scheduler.posterior(x_0, x_0, 1, 0)[1]
    of_empty, of_caption = (
        losses.decoder_nll(x_0, pipe.scheduler.predict_x_0(out, 0, x_t), variance, levels=None)
        for out in (empty, captioned)
    )
    expected = of_empty - of_caption
    found = (weights[-1] * verifier.differences(pipe, "red heart", x_0)[-1]).float()
    atol = 1e-2 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=atol)


def test_likelihood_verifier_scores_a_batch_as_each_alone(pipe, x_0):
    prompts = ["red heart", "blue circle", "green cat"]
    verifier = LikelihoodVerifier(pairs=2)
    pairs = zip(prompts, x_0, strict=True)
    alone = torch.cat([verifier(pipe, prompt, x[None]) for prompt, x in pairs])
    torch.testing.assert_close(verifier(pipe, prompts, x_0), alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(verifier(pipe, "red heart", x_0)[0], alone[0], rtol=1e-3, atol=1e-3)


def test_verifier_calls_the_network_as_often_as_it_says(pipe, x_0, tmp_path):
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
    ("change", "offending"),
    [({"pairs": 0}, "got 0"), ({"weight": "odd"}, "'odd'"), ({"levels": (2, 3)}, "2 to 3")],
)
def test_likelihood_verifier_refuses_bad_settings(pipe, x_0, change, offending):
    with pytest.raises(InputError, match=offending):
        LikelihoodVerifier(**change)(pipe, "red heart", x_0)


def test_plan_refuses_another_librarys_scheduler(pipe, x_0):
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(InputError, match="DDIMScheduler"):
        LikelihoodVerifier(2)(pipe, "red heart", x_0)


# ---- CLIP


def test_clip_verifier_is_the_cosine_of_clips_own_logits(tmp_path, x_0):
    pipe = tiny_pipeline(caption_length=8)
    clip = ClipVerifier(tiny_clip(tmp_path))
    prompts = ["red heart", "cat", "a very long red dog"]
    model = CLIPModel.from_pretrained(tmp_path).eval()
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    images = pipe.image_processor.postprocess(x_0, output_type="pil")
    pixels = processor(images=images, return_tensors="pt").pixel_values
    tokens = tiny_text("clip")[0](prompts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels)
    cosines = out.logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(clip(pipe, prompts, x_0), cosines.diagonal(), rtol=1e-4, atol=1e-5)
    # Padded to another length.
    torch.testing.assert_close(clip(pipe, "cat", x_0), cosines[:, 1], rtol=1e-3, atol=1e-3)


def test_clip_verifier_scores_each_by_its_own_prompt(tmp_path):
    """There are more candidates than one batch holds."""
    pipe = tiny_pipeline(caption_length=8)
    clip = ClipVerifier(tiny_clip(tmp_path))
    prompts = ["red heart", "cat", "dog"] * 6
    x_0 = torch.randn(18, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([clip(pipe, prompts[i], x_0[i : i + 1]) for i in range(18)])
    torch.testing.assert_close(clip(pipe, prompts, x_0), alone, rtol=1e-3, atol=1e-3)
    assert (alone[:3] - alone[3:6]).abs().max() > 1e-2, "images matter, too"


def test_clip_verifier_refuses_what_is_no_clip_model(tmp_path):
    with pytest.raises(InputError, match="nothing"):
        ClipVerifier(tmp_path / "nothing")
    tiny_text()[1].save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="'bert'"):
        ClipVerifier(tmp_path / "bert")


def test_clip_verifier_refuses_truncated_weights(tmp_path):
    weights = tiny_clip(tmp_path / "clip") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=str(tmp_path / "clip")):
        ClipVerifier(tmp_path / "clip")


def test_clip_scores_are_the_models_own_logits_in_any_batch(tmp_path):
    """100 times the logit of (image, caption) over the model's scale; 0 for what points away."""
    captions = ["cat", "a very long caption of many words", "dog", "sun", "hot dog"]
    images = emoji_images(["cat face", "hot dog", "red heart", "rocket", "banana"])
    positive = []
    for sign in (1, -1):
        folder = tiny_clip(tmp_path / str(sign), sign)
        found = clip_scores(ClipVerifier(folder), images, captions, batch=2)
        network = CLIPModel.from_pretrained(folder).eval()
        processor = CLIPProcessor.from_pretrained(folder)
        for i, caption in enumerate(captions):
            image = images[i].permute(1, 2, 0).numpy()
            pair = {"text": [caption], "images": [image]}
            with torch.no_grad():
                out = network(**processor(**pair, truncation=True, return_tensors="pt"))
            logit = (100 * out.logits_per_image / network.logit_scale.exp()).item()
            assert found[i].item() == pytest.approx(max(logit, 0), abs=1e-3)
        positive += (found > 0).tolist()
    assert sum(positive) == len(captions), "with one sign or the other"
