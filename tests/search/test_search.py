"""Search: its budget is kept to the call, the budget of one sample is that sample, and more of it finds better ones."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler
from PIL import Image
from tiny import tiny_clip, tiny_pipeline

from pipeline.cli import runner, search
from pipeline.diffusion.exact_denoiser import ExactDenoiser
from pipeline.diffusion.guidance import InputError, interval
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.search import search
from pipeline.search.search import (
    SEARCH_METHODS,
    advance_paths,
    calls_of_sample,
    find_best,
    search_steps,
)
from pipeline.search.verifiers import LikelihoodVerifier
from pipeline.serving.png_metadata import read_png
from pipeline.serving.requests import Request


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
    found = find_best(pipe, "red heart", 8, LikelihoodVerifier(4), method, steps=4, seed=5)
    assert torch.equal(found.x_0, plain[0]) and found.calls == sum(rows) == 8


@pytest.mark.parametrize("method", ["random", "paths"])
@pytest.mark.parametrize("verifier", [LikelihoodVerifier(2), Brightness()])
@pytest.mark.parametrize("budget", [60, 200])
def test_no_budget_is_overdrawn_and_every_call_is_counted(pipe, method, verifier, budget):
    rows = counted(pipe)
    found = find_best(pipe, "red heart", budget, verifier, method, steps=4)
    assert found.calls == sum(rows) <= budget
    assert budget - found.calls < 8 + 3 * verifier.calls, "another candidate would not have fitted"
    assert found.curve[-1] == (found.calls, pytest.approx(found.scores.max().item()))


def test_the_best_of_several_is_returned_first(pipe, monkeypatch):
    monkeypatch.setattr(find_best, "BATCH", 4)  # ten candidates are three batches
    found = find_best(pipe, "red heart", 80, Brightness(), steps=4, seed=3)
    alone = torch.stack(
        [
            pipe("red heart", seed=3 + i, num_inference_steps=4, output_type="latent").images[0]
            for i in range(10)
        ]
    )
    assert torch.allclose(
        found.scores, alone.flatten(1).mean(1).sort(descending=True).values, atol=1e-5
    )
    assert torch.equal(found.x_0, found.candidates[0]) and found.scores.isfinite().all()
    scores = [score for _, score in found.curve]
    assert scores == sorted(scores) and [calls for calls, _ in found.curve] == [
        8 * (i + 1) for i in range(10)
    ]


def test_paths_go_where_the_verifier_points_and_copies_part_again():
    """Half of a set is bright, half is dark, and the exact denoiser draws either as often as the other."""
    scheduler = DDPMScheduler(prediction_type="sample", timestep_spacing="trailing")
    images = torch.tensor([0.5, -0.5]).repeat(8)[:, None, None, None] + 0.1 * torch.randn(
        16, 3, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    pipe = tiny_pipeline(scheduler=scheduler, caption_length=8)
    pipe.unet = ExactDenoiser(images, scheduler)
    independent, found = (
        find_best(pipe, "red heart", 20 * 24, Brightness(), method, w=0.0, steps=20)
        for method in SEARCH_METHODS
    )
    assert independent.scores.mean().abs() < 0.3 and found.scores.min() > 0.3
    assert found.calls == independent.calls == 480
    assert (
        len({int((images - x).square().flatten(1).sum(1).argmin()) for x in found.candidates}) > 1
    )


def test_calls_are_two_where_guided_and_one_elsewhere(pipe):
    assert [calls_of_sample(pipe, w, 10) for w in (2.0, 0.0, -1.0)] == [20, 10, 10]
    assert 10 < calls_of_sample(pipe, interval(2.0, 0.5, 0.9), 10) < 20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"budget": 7}, "the budget is 7 network calls, expected 8 or more"),
        ({"method": "luck"}, "expected one of random, paths"),
        ({"method": "paths", "eta": 0}, "eta is 0, expected more for method paths"),
        ({"w": [1.0, 2.0]}, "w has 2 values for 1 prompts"),
    ],
)
def test_what_cannot_be_searched_is_refused(pipe, change, says):
    with pytest.raises(InputError, match=says):  # before anything is drawn
        search_steps(
            pipe, "red heart", **{"budget": 100, "verifier": Brightness(), "steps": 4} | change
        )


def test_what_cannot_judge_is_refused_before_anything_is_drawn(pipe):
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(
        InputError, match="the scheduler is DDIMScheduler, expected pipeline.scheduler's"
    ):
        search_steps(pipe, "red heart", 100, LikelihoodVerifier(2), steps=4)


def test_paths_that_stay_together_are_refused(pipe):
    """DDIM's own eta is 0."""
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    with pytest.raises(
        InputError, match="eta is None, expected more for method paths: .* by DDIMScheduler"
    ):
        find_best(pipe, "red heart", 100, Brightness(), "paths", steps=6)
    assert (
        len(find_best(pipe, "red heart", 100, Brightness(), "paths", steps=6, eta=1.0).candidates)
        > 1
    )


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, LMSDiscreteScheduler])
def test_paths_of_a_scheduler_that_remembers_other_rows_are_refused(pipe, kind):
    pipe.scheduler = kind()
    with pytest.raises(
        InputError, match=f"{kind.__name__} remembers the steps before, .* use random"
    ):
        find_best(pipe, "red heart", 100, Brightness(), "paths", steps=6)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_what_is_no_seed_is_refused_by_both_methods(pipe, seed):
    for method in ("random", "paths"):
        with pytest.raises(InputError, match="expected a whole number from 0"):
            find_best(pipe, "red heart", 100, Brightness(), method, steps=4, seed=seed)


def test_one_weight_may_come_as_a_list_or_a_tensor(pipe):
    plain = find_best(pipe, "red heart", 24, Brightness(), steps=4, w=2.0)
    for w in ([2.0], torch.tensor(2.0), torch.tensor([2.0])):
        assert torch.equal(
            find_best(pipe, "red heart", 24, Brightness(), steps=4, w=w).candidates,
            plain.candidates,
        )


@pytest.mark.parametrize("method", ["random", "paths"])
def test_a_search_can_be_watched_and_left_at_any_call(pipe, method):
    rows, verifier = counted(pipe), LikelihoodVerifier(2)
    stages = list(search_steps(pipe, "red heart", 200, verifier, method, steps=4))
    assert [stage.last for stage in stages] == [False] * (len(stages) - 1) + [True]
    calls = [stage.calls for stage in stages]
    assert (
        calls == sorted(calls)
        and calls[-1] == sum(rows)
        and {stage.total for stage in stages} == {calls[-1]}
    )
    most = max(after - before for before, after in itertools.pairwise(calls))
    n = len(stages[-1].candidates)
    assert most <= max(2 * n, search.CANDIDATES_PER_CHECK * verifier.calls), (
        "between two looks: a step of all, or a few judged"
    )
    before = sum(rows)
    left = search_steps(pipe, "red heart", 200, verifier, method, steps=4)
    next(left)
    left.close()
    assert sum(rows) == before + 2 * n


def test_paths_of_several_prompts_are_those_of_each(pipe):
    """Together they share the network's batches and nothing else."""
    call = {"w": 1.5, "num_inference_steps": 6, "eta": None, "negative_prompt": None}
    *_, (together, scores, calls) = advance_paths(
        pipe, ["red heart", "blue circle"], 3, Brightness(), [1, 2, 3, 4, 5, 6], call
    )
    alone = [
        find_best(pipe, prompt, 3 * 12, Brightness(), "paths", steps=6, seed=seed)
        for prompt, seed in (("red heart", 1), ("blue circle", 4))
    ]
    assert calls == sum(found.calls for found in alone) == 72
    for x_0, score, found in zip(together.split(3), scores, alone, strict=True):
        torch.testing.assert_close(x_0[found.order], found.candidates, atol=1e-4, rtol=0)
        torch.testing.assert_close(score[found.order], found.scores, atol=1e-4, rtol=0)


def test_a_negative_prompt_and_eta_reach_the_drawing(pipe):
    plain = pipe(
        "red heart",
        negative_prompt="blue",
        eta=0.5,
        seed=5,
        num_inference_steps=4,
        output_type="latent",
    ).images
    found = find_best(
        pipe, "red heart", 8, Brightness(), steps=4, seed=5, negative_prompt="blue", eta=0.5
    )
    assert torch.equal(found.x_0, plain[0]) and found.curve == [] and found.scores.isnan().all()


# ---- the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline(w=1.5, caption_length=8).save_pretrained(folder / "tiny")
    return folder / "tiny", tiny_clip(folder / "clip")


def test_the_command_saves_the_best_and_prints_the_curve(saved, tmp_path, capsys):
    model, clip = saved
    out, command = (
        tmp_path / "best.png",
        [str(model), "red heart", "--budget", "24", "--steps", "4", "--device", "cpu"],
    )
    settings = ["--negative", "blue", "--w", "2", "--eta", "0.5", "--seed", "3"]
    assert search.main([*command, *settings, "--verifier", str(clip), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" network")[0] for line in lines[:3]] == ["8", "16", "24"]
    (seed,) = re.fullmatch(
        rf"{out}: the best of 3 by 24 network calls; seed (\d) draws it alone", lines[3]
    ).groups()
    pipe = tiny_pipeline(w=1.5, caption_length=8)
    drawn = pipe(
        "red heart",
        negative_prompt="blue",
        w=2.0,
        eta=0.5,
        seed=3,
        num_images_per_prompt=3,
        num_inference_steps=4,
    ).images
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(drawn[int(seed) - 3]))
    request, _denoiser, _model = read_png(out, 1000)
    assert request == Request("red heart", "blue", w=2.0, steps=4, eta=0.5, seed=int(seed))
    assert search.main([*command, "--pairs", "2", "--method", "paths", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: the best of 1 by 8 network calls\n"
    with pytest.raises(InputError, match="carries no settings"):
        read_png(out, 1000)


class Stopping(Brightness):
    """A verifier that is interrupted at its n-th batch."""

    def __init__(self, n):
        self.left = n

    def __call__(self, pipe, prompt, x_0):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().__call__(pipe, prompt, x_0)


def test_a_search_that_is_stopped_keeps_the_best_so_far(saved, tmp_path, capsys, monkeypatch):
    out, command = (
        tmp_path / "best.png",
        [str(saved[0]), "red heart", "--steps", "4", "--device", "cpu"],
    )
    monkeypatch.setattr(find_best, "Clip", lambda name: Stopping(int(name)))
    assert search.main([*command, "--budget", "160", "--verifier", "3", "--out", str(out)]) == 130
    *_curve, last = capsys.readouterr().out.splitlines()
    (seed,) = re.fullmatch(
        rf"{out}: the best of 8 by \d+ network calls; seed (\d) draws it alone", last
    ).groups()
    images = tiny_pipeline(w=1.5, caption_length=8)(
        "red heart", seed=0, num_images_per_prompt=16, num_inference_steps=4
    ).images
    assert int(seed) == max(range(8), key=lambda i: np.asarray(images[i]).mean())
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(images[int(seed)]))
    out.unlink()
    code = runner.run_cli(
        lambda: search.main([*command, "--budget", "160", "--verifier", "1", "--out", str(out)]),
        "nothing",
    )
    assert code == 130 and not out.exists() and "stopped: nothing" in capsys.readouterr().err


def test_what_cannot_be_judged_is_the_worst(pipe):
    class Broken(Brightness):
        def __call__(self, pipe, prompt, x_0):
            scores = super().__call__(pipe, prompt, x_0)
            return torch.where(torch.arange(len(scores)) == 1, torch.nan, scores)

    for method in ("random", "paths"):
        found = find_best(pipe, "red heart", 40, Broken(), method, steps=4, w=2.0)
        assert (
            found.scores[-1] == -math.inf
            and found.scores[0].isfinite()
            and math.isfinite(found.curve[-1][1])
        ), method


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "7"], "the budget is 7 network calls, expected 8 or more"),
        (["--budget", "80", "--method", "luck"], "expected one of random, paths"),
        (["--budget", "80", "--pairs", "0"], "pairs is 0, expected 1 or more"),
        (
            ["--budget", "80", "--verifier", "no/such"],
            "no/such is no CLIP model: it cannot be loaded",
        ),
        (["--budget", "80", "--seed", "-1"], "seed is -1"),
        (
            ["--budget", "80", "--out", "best.txt"],
            "-o is best.txt, expected a name that ends in one of .png",
        ),
    ],
)
def test_bad_input_is_one_sentence(saved, capsys, arguments, says):
    assert (
        search.main([str(saved[0]), "red heart", "--steps", "4", "--device", "cpu", *arguments])
        == 2
    )
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in error
