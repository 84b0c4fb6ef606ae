"""The measures measure what they say: against brute force, closed forms and other libraries."""

import math

import numpy as np
import pytest
import scipy
import torch
from test_feature_extractor import pictures
from tiny import tiny_clip, tiny_pipeline
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from pipeline.data import image_ops
from pipeline.diffusion.exact_denoiser import ExactDenoiser
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.evaluation import (
    distances,
    image_quality,
    likelihood,
    reference_set,
    retrieval,
    samples,
)
from pipeline.evaluation.retrieval import EvaluationError
from pipeline.search import verifiers

F64 = torch.float64
BETA = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETA)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_a_picture_of_the_bank_ranks_itself_first_and_its_opposite_last():
    bank = torch.eye(6)
    own = torch.arange(6)
    assert retrieval.retrieval_ranks(bank, bank, own).tolist() == [1] * 6
    mean = bank.mean(0)
    assert retrieval.retrieval_ranks(mean - (bank - mean), bank, own).tolist() == [6] * 6


def test_ties_count_against():
    """At the mean, every picture is as similar as the own one, which is then last."""
    bank = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert retrieval.retrieval_ranks(torch.zeros(1, 2), bank, torch.tensor([2])).tolist() == [4]
    assert retrieval.retrieval_ranks(
        torch.tensor([[1.0, 0]]), bank, torch.tensor([2])
    ).tolist() == [3]


def test_the_rank_is_of_similarities_centred_on_the_bank():
    """A shift of everything by the same vector changes no rank, as it would without centring."""
    generator = torch.Generator().manual_seed(0)
    bank, seen = torch.randn(40, 8, generator=generator), torch.randn(30, 8, generator=generator)
    own = torch.randint(40, (30,), generator=generator)
    moved = retrieval.retrieval_ranks(seen + 100, bank + 100, own)
    assert moved.tolist() == retrieval.retrieval_ranks(seen, bank, own).tolist()
    assert len(moved.unique()) > 10


def test_identical_pictures_are_one():
    a, b, c = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8)
    rows, own = reference_set.distinct_images(torch.stack([a, b, a, c, b]))
    assert rows.tolist() == [0, 1, 3]
    assert own.tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 20), (10, 20), (19, 20), (20, 20), (280, 467)])
def test_wilson_bounds_are_where_the_score_test_turns(k, n):
    """The bounds p are the roots of |k/n - p| = z sqrt(p (1 - p) / n), the definition of the interval."""
    low, high = retrieval.wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for p in (low, high):
        assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_shares_of_nothing_are_refused(k, n):
    with pytest.raises(EvaluationError, match=f"k={k}, n={n}"):
        retrieval.wilson_interval(k, n)


def test_seams_show_where_squares_are_shifted_against_each_other():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(64, 3, 32, 32, generator=generator) - 0.5
    assert image_quality.seam_ratio(noise, 4) == pytest.approx(
        1, abs=0.02
    )  # 500,000 gradients, no grid
    steps = 0.3 * torch.randn(64, 3, 8, 8, generator=generator).repeat_interleave(
        4, 2
    ).repeat_interleave(4, 3)
    expected = 1 + 2 * 0.3**2 / (2 / 12)  # variances: the step's difference over the noise's
    assert image_quality.seam_ratio((noise * 0.5 + steps * 0.5), 4) == pytest.approx(
        expected, rel=0.05
    )
    assert image_quality.seam_ratio(noise * 0.5 + steps.roll((2, 2), (2, 3)) * 0.5, 4) < 1


def test_copies_are_found_however_they_are_moved_and_other_pictures_are_not():
    train = pictures(
        ["cat face", "hot dog", "red heart", "rocket", "banana", "snowman", "tiger", "key"], 60
    )
    train = torch.nn.functional.pad(train, [2] * 4, value=255)  # so that a move loses nothing
    threshold = image_quality.copy_threshold(train)
    moved = train.roll(1, 3)
    assert image_quality.copy_distances(moved, train).diagonal().amax() < 1e-3
    assert image_quality.copy_rate(moved, train, threshold)["k"] == len(train)
    others = pictures(["green heart", "pizza", "house", "bicycle"], 64)
    assert image_quality.copy_rate(others, train, threshold)["k"] == 0
    assert 0.05 < threshold < 0.4


def test_augmentation_changes_little_and_is_seeded():
    images = pictures(["cat face", "hot dog"], 64)
    a, b = image_quality.augment(images), image_quality.augment(images)
    assert torch.equal(a, b)
    assert not torch.equal(a, image_quality.augment(images, seed=1))
    assert a[:, :, :2, :2].mean() > 0.9  # what comes in from outside is white


def test_the_interval_of_a_mean_is_students_where_that_holds():
    """400 normal values: the bootstrap's bounds are Student's within a tenth of the interval."""
    values = 3 + 2 * normal(400)
    found = retrieval.bootstrap_mean(values)
    exact = scipy.stats.t.interval(0.95, 399, loc=values.mean(), scale=values.std() / 20)
    assert found["mean"] == pytest.approx(values.mean().item()) and found["n"] == 400
    assert found["interval"] == pytest.approx(exact, abs=0.1 * (exact[1] - exact[0]))


# ---- distances


def kernel_distance(x, y):
    """The unbiased squared mean discrepancy under (x . y / D + 1)^3, pair by pair."""
    k = lambda a, b: (float(a @ b) / len(a) + 1) ** 3
    inside = [k(s[i], s[j]) for s in (x, y) for i in range(len(s)) for j in range(len(s)) if i != j]
    across = [k(a, b) for a in x for b in y]
    return 2 * np.mean(inside) - 2 * np.mean(across)


def test_kid_is_the_mean_discrepancy_pair_by_pair():
    x, y = normal(20, 5), 0.3 + 1.5 * normal(20, 5, seed=1)
    found = distances.kid(x, y)
    assert found["value"] == pytest.approx(kernel_distance(x, y), rel=1e-9) and found["n"] == 20
    assert found["interval"] == pytest.approx(
        [found["value"] - 1.96 * found["error"], found["value"] + 1.96 * found["error"]]
    )
    assert distances.kid(x, y) == found


def test_kid_of_one_set_with_itself_is_about_nothing():
    """All that is left is the bias of pairs of a picture with itself, below 0."""
    x = normal(200, 4)
    found, apart = (
        distances.kid(x, x)["value"],
        distances.kid(x, 1 + normal(200, 4, seed=1))["value"],
    )
    assert -0.1 * apart < found < 0


def test_the_error_of_kid_is_its_spread_over_data_sets():
    found = [
        distances.kid(normal(64, 3, seed=i), 0.7 + normal(64, 3, seed=1000 + i)) for i in range(60)
    ]
    spread = np.std([f["value"] for f in found], ddof=1)
    assert np.mean([f["error"] ** 2 for f in found]) ** 0.5 == pytest.approx(
        spread, rel=0.3
    )  # 60 spreads: 9 %


def test_kid_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    distances.kid(normal(8, 2), normal(8, 2, seed=1))
    assert torch.equal(torch.rand(1), first)


def gaussian(n, mean, deviation, seed):
    """n points whose sample mean and covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return x * torch.tensor(deviation, dtype=F64) + torch.tensor(mean, dtype=F64)


def test_frechet_distance_of_known_gaussians():
    """|mu - mu'|^2 + sum (sigma - sigma')^2 where the covariances commute."""
    x, y = gaussian(50, [0, 1, 2], [1, 2, 3], 0), gaussian(50, [1, 1, 0], [2, 2, 0.5], 1)
    assert distances.frechet_distance(x, y) == pytest.approx(1 + 4 + 1 + 0 + 2.5**2, rel=1e-6)
    assert distances.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_points_than_dimensions():
    """tr (S S')^(1/2) is the nuclear norm of the product of the centred points."""
    x, y = normal(20, 64), 0.5 + normal(20, 64, seed=1)
    a, b = (x - x.mean(0)) / 19**0.5, (y - y.mean(0)) / 19**0.5
    both = a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    assert distances.frechet_distance(x, y) == pytest.approx(
        ((x.mean(0) - y.mean(0)).square().sum() + both).item(), rel=1e-5
    )


@pytest.mark.parametrize("distance", [distances.kid, distances.frechet_distance])
@pytest.mark.parametrize(("n", "m"), [(8, 9), (3, 3)])
def test_sets_of_other_sizes_are_not_compared(distance, n, m):
    with pytest.raises(
        EvaluationError, match=rf"\({n}, 2\) and \({m}, 2\), expected twice the same"
    ):
        distance(normal(n, 2), normal(m, 2))


def test_halves_are_disjoint_equal_and_the_same_every_time():
    a, b = distances.random_halves(11)
    assert len(a) == len(b) == 5 and len({*a.tolist(), *b.tolist()}) == 10
    assert torch.equal(distances.random_halves(11)[0], a)


def test_any_network_gives_features():
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    found = distances.extract_features(nn.Flatten(), images, batch=2)
    assert found.dtype == torch.float32 and torch.equal(found, images.flatten(1).float())


def test_inception_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(retrieval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="pip install torch-fidelity"):
        distances.load_inception()


# ---- what the network knows


class Gaussian(nn.Module):
    """E[x_0 | x_t] of data N(0, var), in the network's place; `calls` counts them."""

    dtype, device, calls = torch.float64, torch.device("cpu"), 0

    def __init__(self, var):
        super().__init__()
        self.var, self.abar = var, torch.tensor(ABAR)

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        self.calls += 1
        a = self.abar[t].reshape(-1, 1, 1, 1)
        return (a.sqrt() * self.var * x_t / (a * self.var + 1 - a),)


def pipeline_of(network, vae=None):
    """The pipeline with something else in its network's place, which predicts x_0."""
    pipe = tiny_pipeline(scheduler=DDPMScheduler(prediction_type="sample"))
    pipe.unet, pipe.vae = network, vae
    return pipe


def test_errors_are_the_gaussian_denoisers_by_split_in_one_call_each():
    """Denoised as N(0, 0.04), data N(0, v) has the error (1 - c sqrt(abar))^2 v + c^2 (1 - abar); eps's is SNR times that."""
    pipe, var = pipeline_of(Gaussian(0.04)), {"train": 0.04, "held_out": 0.01}
    splits = {
        name: (normal(40, 3, 8, 8, seed=9 + i) * v**0.5, ["red heart"] * 40)
        for i, (name, v) in enumerate(var.items())
    }
    found = likelihood.denoising_errors(pipe, splits)
    assert found["timesteps"] == list(range(50, 1000, 100)) and pipe.unet.calls == 10
    for name, v in var.items():
        a = ABAR[found["timesteps"]]
        c = a**0.5 * 0.04 / (a * 0.04 + 1 - a)
        error = (1 - c * a**0.5) ** 2 * v + c**2 * (1 - a)
        assert found[name]["x_0"] == pytest.approx(error, rel=0.06)  # 7,680 squares: 1.6 %
        assert np.array(found[name]["eps"]) == pytest.approx(
            a / (1 - a) * np.array(found[name]["x_0"]), rel=1e-6
        )


def test_bound_sums_the_divergences_of_the_whole_chain_from_some_of_them():
    """Data N(0, var): each divergence is (SNR(s) - SNR(t)) mmse(t) / 2, and -log p(x_0 | x_1) has a Gaussian's mean."""
    var, N = 0.04, 60
    found = likelihood.likelihood_bound(
        pipeline_of(Gaussian(var)),
        normal(N, 3, 8, 8) * var**0.5,
        ["red"] * N,
        levels=None,
        batch=50,
    )
    snr, mmse = ABAR / (1 - ABAR), var * (1 - ABAR) / (ABAR * var + 1 - ABAR)
    steps = ((snr[:-1] - snr[1:]) * mmse[1:] / 2).sum() / math.log(2)
    beta_tilde = (1 - ABAR[0]) / (1 - ABAR[1]) * BETA[1]
    decoder = (mmse[0] / beta_tilde + math.log(2 * math.pi * beta_tilde)) / 2 / math.log(2)
    prior = (ABAR[-1] * var - ABAR[-1] - math.log(1 - ABAR[-1])) / 2 / math.log(2)
    assert likelihood.timestep_importance(DDPMScheduler()).sum() == pytest.approx(1)
    for name, expected in (("steps", steps), ("decoder", decoder), ("prior", prior)):
        values = found[name]
        error = values.std().item() / N**0.5
        assert values.shape == (N,) and values.mean().item() == pytest.approx(
            expected, abs=4 * error
        )
    assert found["steps"].std() / N**0.5 < 0.02 * steps, "a tolerance that tells nothing"


@pytest.mark.parametrize("patch_size", [None, 2])
def test_bound_of_a_picture_that_the_network_knows_is_its_last_bin(patch_size):
    """One picture is all there is: no divergence, and of the decoder the Gaussian's mass within half a level."""
    image = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    vae = None if patch_size is None else PatchAutoencoder(patch_size)
    x_0 = (
        image_ops.as_float(image) if vae is None else vae.encode(image_ops.as_float(image)).latents
    )
    pipe = pipeline_of(None, vae)
    pipe.unet = ExactDenoiser(x_0, pipe.scheduler)
    found = likelihood.likelihood_bound(pipe, image, ["red heart"], strata=5)
    beta_tilde, value = (1 - ABAR[0]) / (1 - ABAR[1]) * BETA[1], 100 / 127.5 - 1
    inside = math.erf(1 / 255 / (2 * beta_tilde) ** 0.5)
    assert found["steps"].item() == 0
    assert found["decoder"].item() == pytest.approx(-math.log2(inside), rel=1e-5)
    prior = (ABAR[-1] * (value**2 - 1) - math.log1p(-ABAR[-1])) / 2 / math.log(2)
    assert found["prior"].item() == pytest.approx(prior, rel=1e-5)


def test_latents_have_no_bits_of_pixels():
    assert likelihood.model_space(pipeline_of(Gaussian(1.0))) == "pixels"
    assert likelihood.model_space(pipeline_of(Gaussian(1.0), PatchAutoencoder(2))) == "patches"
    scaled = pipeline_of(Gaussian(1.0), PatchAutoencoder(2, scaling_factor=0.5))
    with pytest.raises(ValueError, match="'latents'"):
        likelihood.likelihood_bound(scaled, torch.zeros(1, 3, 8, 8), ["red"], strata=1)


def test_lossless_files_cannot_beat_noise_and_need_little_for_nothing():
    """No code can take less than 8 bits for a uniform byte, in the mean; one colour takes a header."""
    noise = torch.randint(
        256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    plain = torch.full((4, 3, 64, 64), 7, dtype=torch.uint8)
    for bits, name in (
        (likelihood.file_bits(noise), "noise"),
        (likelihood.file_bits(plain), "plain"),
    ):
        assert set(bits) == {"png", "webp"}
        for values in bits.values():
            assert (
                values.shape == (4,)
                and ((values > 8) & (values < 8.5) if name == "noise" else values < 0.2).all()
            )


# ---- drawings and their captions


def test_diversity_is_the_mean_distance_of_pairs():
    bank = torch.cat([torch.eye(4), -torch.eye(4)])  # its mean is 0
    e = torch.eye(4)
    draws = torch.stack(
        [torch.stack([e[0], e[0], e[0]]), torch.stack([e[0], e[1], -e[0]])]
    )  # 2 seeds of 3 captions
    assert image_quality.diversity(draws, bank).tolist() == pytest.approx([0, 1, 2])
    features, moved = normal(5, 7, 4), 3 * normal(4)
    unit = features / features.norm(dim=-1, keepdim=True)
    pairs = [1 - (unit[i] * unit[j]).sum(-1) for i in range(5) for j in range(i)]
    found = image_quality.diversity(features + moved, bank + moved)
    torch.testing.assert_close(found, torch.stack(pairs).mean(0))
    with pytest.raises(EvaluationError, match="1 drawings a caption"):
        image_quality.diversity(features[:1], bank)


def test_clip_scores_are_the_models_own_logits_whatever_the_batch(tmp_path):
    """100 times the logit of (image, caption) over the model's scale, one at a time; 0 for what points away."""
    captions, positive = ["cat", "a very long caption of many words", "dog", "sun", "hot dog"], []
    images = pictures(["cat face", "hot dog", "red heart", "rocket", "banana"])
    for sign in (1, -1):
        folder = tiny_clip(tmp_path / str(sign), sign)
        found = verifiers.clip_scores(verifiers.ClipVerifier(folder), images, captions, batch=2)
        network, processor = (
            CLIPModel.from_pretrained(folder).eval(),
            CLIPProcessor.from_pretrained(folder),
        )
        for i, caption in enumerate(captions):
            picture = images[i].permute(1, 2, 0).numpy()
            with torch.no_grad():
                seen = network(
                    **processor(
                        text=[caption], images=[picture], truncation=True, return_tensors="pt"
                    )
                )
            logit = (100 * seen.logits_per_image / network.logit_scale.exp()).item()
            assert found[i].item() == pytest.approx(max(logit, 0), abs=1e-3)
        positive += (found > 0).tolist()
    assert sum(positive) == len(captions), "with one sign or the other"


def test_what_is_kept_is_computed_once_and_never_in_part(tmp_path):
    path, calls = tmp_path / "new" / "kept.safetensors", []

    def compute():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"a": torch.arange(3)}

    with pytest.raises(KeyboardInterrupt):
        samples.cached_tensors(path, compute)
    assert not path.exists()
    for _ in range(2):
        assert samples.cached_tensors(path, compute)["a"].tolist() == [0, 1, 2]
    assert len(calls) == 2
