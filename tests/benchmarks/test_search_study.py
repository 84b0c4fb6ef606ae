"""The study of search: its expectations are averages over all choices, and what it draws is what `search` finds."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from test_evaluate import folder, run, untrained  # noqa: F401
from tiny import tiny_pipeline

from pipeline import hardware
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation import evaluate
from pipeline.search.search import find_best
from pipeline.search.verifiers import LIKELIHOOD_WEIGHTS, LikelihoodVerifier

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("search_study", ROOT / "benchmarks" / "search.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_the_best_of_n_is_the_mean_over_all_choices_of_n(n):
    values, scores = normal(5, 6), normal(5, 6, seed=1)
    choices = [torch.tensor(some) for some in itertools.combinations(range(6), n)]
    picked = [
        values[:, some].gather(1, scores[:, some].argmax(1, keepdim=True))[:, 0] for some in choices
    ]
    torch.testing.assert_close(study.best_of(values, scores, n), torch.stack(picked).mean(0))


def test_the_rank_correlation_is_spearmans():
    a, b = normal(4, 8), normal(4, 8, seed=1)
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert study.rank_correlation(a, b).tolist() == pytest.approx(expected)


def test_the_bootstrap_is_the_normal_interval_of_many_values():
    values = normal(400)
    mean, low, high = study.bootstrap(values)
    half = 1.96 * float(values.std()) / 20
    assert mean == pytest.approx(float(values.mean()))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_a_score_from_kept_differences_is_the_verifiers_own():
    pipe, verifier, x_0 = (
        tiny_pipeline(caption_length=8),
        LikelihoodVerifier(4),
        normal(3, 3, 8, 8).float(),
    )
    kept, weights = (
        verifier.differences(pipe, "red heart", x_0).T[:, None],
        verifier.plan(pipe.scheduler, x_0.shape[1:])[2],
    )
    for weight in LIKELIHOOD_WEIGHTS:
        own = LikelihoodVerifier(4, weight=weight)(pipe, "red heart", x_0)
        torch.testing.assert_close(
            study.score(kept, weights, weight)[:, 0].float(), own, rtol=1e-4, atol=1e-4
        )
    assert study.spaced(16, 4).tolist() == [2, 6, 10, 14] and study.spaced(4, 4).tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.slow
def test_the_study_draws_once_what_search_finds_and_writes_its_section(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    monkeypatch.setattr(study.bench, "DRAWS", 200)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "benchmarks.md").write_text(
        "# Before\n\n<!-- search -->\nold\n<!-- /search -->\n\n# After\n"
    )
    command = [str(run), "--quick", "--w", "1", "--paths", "bound", "even", "--docs", str(docs)]
    assert study.main(command) == 0
    text = (docs / "benchmarks.md").read_text()
    said = f"python benchmarks/search.py {run} --quick --w 1 --paths bound even --docs"
    assert text.startswith(f"# Before\n\n<!-- search -->\n`{said}")
    assert text.endswith("\n<!-- /search -->\n\n# After\n")
    assert (
        "old" not in text
        and "8 training and 6 held out captions, w = 1, 10 steps, one picture = 20 network calls"
        in text
    )
    assert "| more steps | 4× | 80 |" in text and "| random, 4 pairs, bound | 4× | 60 |" in text
    assert (
        "| paths, 1 pairs, bound | 4× | 64 |" in text
        and "| paths, 1 pairs, even | 4× | 78 |" in text
    )
    assert (docs / "figures" / "search.png").is_file()

    (kept,) = (run / "search").iterdir()
    *_, bank, pipe = evaluate.load_run(run)
    drawn = [load_file(kept / f"candidate-{k}.safetensors") for k in range(4)]
    found = find_best(
        pipe, bank.captions[0], 4 * (20 + 10), LikelihoodVerifier(4), w=1.0, steps=10, seed=0
    )
    together = torch.stack([one["x_0"][0] for one in drawn])
    torch.testing.assert_close(together[found.order], found.candidates, atol=1e-3, rtol=0)
    weights = LikelihoodVerifier(4).plan(pipe.scheduler, together.shape[1:])[2]
    judged = [
        load_file(kept / f"pairs4-candidate-{k}.safetensors")["differences"][0] for k in range(4)
    ]
    scores = torch.stack(judged) @ weights
    torch.testing.assert_close(
        scores[found.order].float(), found.scores, rtol=1e-2, atol=1e-2 * float(scores.abs().max())
    )

    def refused(*_args, **_kwargs):
        raise AssertionError("it is drawn again")

    monkeypatch.setattr(TextToImagePipeline, "denoise", refused)
    monkeypatch.setattr(LikelihoodVerifier, "differences", refused)
    assert study.main(command) == 0
    minutes = lambda said: [line for line in said.splitlines() if "minutes this time" not in line]
    assert minutes((docs / "benchmarks.md").read_text()) == minutes(text)


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert study.main([str(tmp_path / "nothing")]) == 2
    assert "holds no finished pipeline" in capsys.readouterr().err
    assert study.main([str(tmp_path), "--candidates", "0"]) == 2
    assert "--candidates is 0" in capsys.readouterr().err
