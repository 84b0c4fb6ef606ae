"""The study of search averages over all choices, and samples what `find_best` finds."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from tiny import tiny_pipeline
from tiny_run import normal

from benchmarks import bench
from benchmarks import search as study
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation import evaluate
from pipeline.search.search import find_best
from pipeline.search.verifiers import LIKELIHOOD_WEIGHTS, LikelihoodVerifier


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_best_of_n_is_the_mean_over_all_choices(n):
    values = normal(5, 6)
    scores = normal(5, 6, seed=1)
    best = []
    for some in itertools.combinations(range(6), n):
        chosen = scores[:, some].argmax(1, keepdim=True)
        best.append(values[:, some].gather(1, chosen)[:, 0])
    torch.testing.assert_close(study.best_of(values, scores, n), torch.stack(best).mean(0))


def test_rank_correlation_is_spearmans():
    a = normal(4, 8)
    b = normal(4, 8, seed=1)
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert study.rank_correlation(a, b).tolist() == pytest.approx(expected)


def test_bootstrap_is_the_normal_interval_of_many_values():
    values = normal(400)
    mean, low, high = study.bootstrap(values)
    half = 1.96 * float(values.std()) / 20
    assert mean == pytest.approx(float(values.mean()))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_score_of_cached_differences_is_the_verifiers_own():
    pipe = tiny_pipeline(caption_length=8)
    verifier = LikelihoodVerifier(4)
    x_0 = normal(3, 3, 8, 8).float()
    differences = verifier.differences(pipe, "red heart", x_0).T[:, None]
    weights = verifier.plan(pipe.scheduler, x_0.shape[1:])[2]
    for weight in LIKELIHOOD_WEIGHTS:
        own = LikelihoodVerifier(4, weight=weight)(pipe, "red heart", x_0)
        found = study.score(differences, weights, weight)[:, 0].float()
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    assert study.spaced(16, 4).tolist() == [2, 6, 10, 14]
    assert study.spaced(4, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_run_study_samples_what_find_best_finds(run, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "has_bf16", lambda device: False)
    monkeypatch.setattr(bench, "RESAMPLES", 200)
    document = tmp_path / "docs" / "benchmarks.md"
    document.parent.mkdir()
    document.write_text("# Before\n\n<!-- search -->\nold\n<!-- /search -->\n\n# After\n")
    arguments = [str(run), "--quick", "--w", "1", "--docs", str(document.parent)]
    assert study.main(arguments) == 0
    text = document.read_text()
    command = f"python benchmarks/search.py {run} --quick --w 1 --docs"
    assert text.startswith(f"# Before\n\n<!-- search -->\n`{command}")
    assert text.endswith("\n<!-- /search -->\n\n# After\n")
    assert "old" not in text
    assert "8 training and 6 held out captions, w = 1, 10 steps, one image = 20 network" in text
    assert "| more steps | 4× | 80 |" in text
    assert "| random, 4 pairs, bound | 4× | 60 |" in text
    assert (document.parent / "figures" / "search.png").is_file()

    (cached,) = (run / "search").iterdir()
    *_, references, pipe = evaluate.load_run(run)
    caption = references.captions[0]
    verifier = LikelihoodVerifier(4)
    found = find_best(pipe, caption, 4 * (20 + 10), verifier, w=1.0, steps=10, seed=0)
    files = [f"candidate-{k}.safetensors" for k in range(4)]
    x_0 = torch.stack([load_file(cached / name)["x_0"][0] for name in files])
    torch.testing.assert_close(x_0[found.order], found.candidates, atol=1e-3, rtol=0)
    differences = [load_file(cached / f"pairs4-{name}")["differences"][0] for name in files]
    weights = verifier.plan(pipe.scheduler, x_0.shape[1:])[2]
    scores = torch.stack(differences) @ weights
    atol = 1e-2 * float(scores.abs().max())
    torch.testing.assert_close(scores[found.order].float(), found.scores, rtol=1e-2, atol=atol)

    def refuse(*_args, **_kwargs):
        raise AssertionError("it samples again")

    def lines(text):
        return [line for line in text.splitlines() if "minutes this time" not in line]

    monkeypatch.setattr(TextToImagePipeline, "denoise", refuse)
    monkeypatch.setattr(LikelihoodVerifier, "differences", refuse)
    assert study.main(arguments) == 0
    assert lines(document.read_text()) == lines(text)


def test_main_reports_bad_input_in_one_line(tmp_path, capsys):
    assert study.main([str(tmp_path / "nothing")]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert study.main([str(tmp_path), "--candidates", "0"]) == 2
    assert "--candidates 0" in capsys.readouterr().err
