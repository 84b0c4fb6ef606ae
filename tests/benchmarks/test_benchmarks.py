"""The benchmarks run, hold ours against the peers they name, and write down how."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tiny import WORDS, tiny_pipeline, tiny_text

from benchmarks import bench, growth, guidance, ladder, muon, sampling, scheduler, training
from pipeline import config
from pipeline.data.emoji import writer
from pipeline.diffusion.guidance import guide

ROOT = Path(__file__).parents[2]
TINY = """
data: {source: SOURCE, resolution: 16, cache: CACHE}
model: {patch_size: 2, channels: [32, 32], attention: [false, true], heads: 4, text_encoder: ENCODER}
diffusion: {prediction_type: sample}
train: {steps: 6, batch_size: 2, lr: 1e-3, weighting: min_velocity, gamma: 5, threads: 1}
"""


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The benchmarks take every core; the tests beside them on this machine shall not wait for that."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _n: None)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """28 coloured shapes of 16 x 16, some held out."""
    return writer.write_emoji(tmp_path_factory.mktemp("shapes") / "set", "shapes", size=16)


@pytest.fixture(scope="module")
def tiny_config(shapes):
    path, encoder, text = shapes.parent / "tiny.yaml", shapes.parent / "encoder", TINY
    for part in tiny_text(length=16, width=64):
        part.save_pretrained(encoder)
    for name, place in {
        "SOURCE": shapes,
        "CACHE": shapes.parent / "cache",
        "ENCODER": encoder,
    }.items():
        text = text.replace(name, str(place))
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A run's folder around a network that was never trained."""
    folder = tmp_path_factory.mktemp("run")
    tiny_pipeline(sample_size=16, caption_length=8, caption_dropout=0.1).save_pretrained(
        folder / "pipeline"
    )
    source = config.DataConfig(
        source=str(shapes), resolution=16, cache=str(shapes.parent / "cache")
    )
    (folder / "config.yaml").write_text(config.Config(name="tiny", data=source).to_yaml())
    return folder


def written(module, tmp_path, *argv) -> str:
    """What a benchmark's smallest form writes, which names its command."""
    document = tmp_path / "docs" / "benchmarks.md"
    module.main(["--quick", "--output", str(document), *map(str, argv)])
    text = document.read_text()
    name = module.__name__.split(".")[-1]
    assert (
        f"<!-- {name}: generated -->" in text
        and f"Command: `python benchmarks/{name}.py --quick" in text
    )
    for picture in re.findall(r"\]\((figures/[\w.-]+)\)", text):
        assert (document.parent / picture).is_file()
    return text


# ---- what they share


def test_calls_take_turns():
    seen = []
    seconds = bench.in_turns({name: lambda name=name: seen.append(name) for name in "AB"}, 3)
    assert "".join(seen) == "AB" + "AB" * 3 and [len(some) for some in seconds.values()] == [3, 3]


def test_paired_interval_is_that_of_a_mean():
    """For many normal differences the bootstrap's interval is mean ± 1.96 sd / sqrt(n); a constant one has no width."""
    apart = np.random.default_rng(0).normal(0.3, 2.0, 4000)
    theirs = np.random.default_rng(1).normal(0, 50, 4000)  # what pairs share does not widen it
    mean, low, high = bench.paired(theirs + apart, theirs)
    half = 1.96 * apart.std() / len(apart) ** 0.5
    assert np.allclose(
        [mean, low, high], [apart.mean(), apart.mean() - half, apart.mean() + half], atol=0.1 * half
    )
    assert bench.paired([1, 0, 1], [0, -1, 0]) == (1, 1, 1)


def test_a_section_with_a_heading_is_put_at_the_end_once(tmp_path):
    for body in ("old", "new"):
        bench.put(tmp_path / "new" / "b.md", "<!-- x -->", "<!-- /x -->", body, "## Heading\n\n")
    assert (
        tmp_path / "new" / "b.md"
    ).read_text() == "# Benchmarks\n\n## Heading\n\n<!-- x -->\nnew\n<!-- /x -->\n"


def test_spreads_and_goals_say_what_they_saw():
    assert bench.spread([3, 1, 2], ".1f") == "2.0 (1.0 to 3.0)"
    assert bench.ratios([2, 9], [1, 3]) == [2, 3]
    assert "**met**" in bench.target("x", 2, 2) and "**not met**" in bench.target("x", 1.99, 2)
    assert "**met**" in bench.target("x", 0.4, 0.5, at_least=False)
    assert "**not met**" in bench.target("x", 0.6, 0.5, at_least=False)


def test_a_section_is_replaced_and_the_rest_stays(tmp_path):
    args = bench.parser("").parse_args(["--output", str(tmp_path / "new" / "b.md")])
    for script, words in (("a.py", "old"), ("b.py", r"kept \1"), ("a.py", "new")):
        bench.publish(args, script, ["--n", "1 2"], script, words)
    text = args.output.read_text()
    assert (
        "old" not in text
        and text.index("new") < text.index(r"kept \1")
        and text.count("## a.py") == 1
    )
    assert "Command: `python benchmarks/a.py --n '1 2'`" in text


def test_quick_numbers_stay_out_of_the_document():
    assert bench.parse(bench.parser(""), []).output == bench.DOCUMENT
    assert bench.parse(bench.parser(""), ["--quick"]).output == bench.QUICK


def test_rows_become_a_table():
    assert bench.table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


# ---- each of them


def test_ours_and_stock_draw_the_same_pixels_and_the_bound_is_the_networks_calls():
    pipe = tiny_pipeline(sample_size=16, patch_size=2, caption_length=8)
    some, rows = sampling.Contenders(pipe, 2, 5, 2.0, bf16=False), []
    assert np.abs(some.ours() - some.stocks()).max() < sampling.LEVEL
    assert np.abs(some.ours() - some.ours(w=0)).max() > sampling.LEVEL
    hook = pipe.unet.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    for call in (some.ours, some.stocks, some.bare):
        call()
    assert rows == [4] * 15
    rows.clear()
    guided, share = some.half()
    some.ours(guided)
    hook.remove()
    assert len(rows) == 5 and rows.count(4) / 5 == share


def test_sampling(run, tmp_path):
    text = written(sampling, tmp_path, "--model", run)
    assert text.count("| 8 ancestral steps |") == 1 and "| 1 steps, UniPC |" in text
    assert "float32, batch 2" in text and "What limits it" in text


def test_sampling_refuses_other_pixels(monkeypatch):
    pipe = tiny_pipeline(sample_size=16, caption_length=8)
    monkeypatch.setattr(sampling.Contenders, "stocks", lambda self: 1 - self.ours())
    with pytest.raises(AssertionError, match="ours and stock differ"):
        sampling.speed(pipe, [1], 2, 1, 1.0)


def test_scheduler(run, tmp_path):
    text = written(scheduler, tmp_path, "--model", run)
    assert "| 4,096 |" in text and "share of sampling, batch 1" in text


def test_rescale_is_diffusers():
    c, u = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for phi in (0.0, 0.7, 1.0):
        theirs = rescale_noise_cfg(u + 3 * (c - u), c, phi)
        assert torch.allclose(guidance.Rescale(phi)(c, u, torch.tensor(2.0)), theirs, atol=1e-5)


def test_apg_is_diffusers():
    """Over the steps of one call, with its momentum."""
    generator = torch.Generator().manual_seed(0)
    mine, buffer = guidance.Apg(r=9.0, momentum=-0.5, eta=0.3), MomentumBuffer(-0.5)
    for _ in range(3):
        c, u = torch.randn(2, 3, 4, 8, 8, generator=generator)
        theirs = normalized_guidance(c, u, 2.0, buffer, 0.3, 9.0, use_original_formulation=True)
        assert torch.allclose(mine(c, u, torch.tensor(2.0)), theirs, atol=1e-5)
    free = guidance.Apg(r=float("inf"), momentum=0.0, eta=1.0)
    assert torch.allclose(free(c, u, torch.tensor(2.0)), guide(c, u, 2.0), atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_apg_that_changes_nothing_draws_the_plain_picture(prediction):
    """Whatever the network predicts: x_0 and back again."""
    pipe = tiny_pipeline(caption_length=8)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    guided = guidance.Guided(**pipe.components, caption_length=8)
    guided.set_progress_bar_config(disable=True)
    request = {"w": 2.0, "seed": 0, "num_inference_steps": 3, "output_type": "np"}
    expected = pipe(list(WORDS[:2]), **request).images
    for rule in (guidance.plain, guidance.Apg(r=float("inf"), momentum=0.0, eta=1.0)):
        guided.rule = rule
        assert np.abs(guided(list(WORDS[:2]), **request).images - expected).max() < 1e-3


def test_guidance(run, tmp_path):
    text = written(guidance, tmp_path, "--model", run, "--w", 1, 8)
    assert all(f"| 8 | {rule} |" in text for rule in guidance.RULES)


def test_training_and_muon(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SIDE", 256)
    text = written(training, tmp_path, "--config", tiny_config)
    assert "example, float32, cached" in text and "like for like, float32, batch 2" in text
    text = written(muon, tmp_path, "--config", tiny_config)
    assert (
        "| 2 | adamw |" in text
        and "| 2 | muon |" in text
        and "<!-- training: generated -->" in text
    )


def test_the_example_learns_from_what_the_trainer_learns_from(tiny_config):
    """The pictures' files hold the pixels that ours are trained on, and its step moves its own network only."""
    trainer = training.Trainer(training.configured(str(tiny_config), 2), bf16=False)
    image = trainer.parts.images.images[3]
    assert torch.allclose(
        training.transformed(training.encoded(image), 16), image.float() / 127.5 - 1
    )
    before = trainer.weights[0].clone()
    training.example(trainer.parts, trainer.config, bf16=False, cached=False)()
    assert torch.equal(trainer.weights[0], before)
    trainer.step()
    assert not torch.equal(trainer.weights[0], before)


def test_growth(tiny_config, tmp_path):
    """One point in a process of its own; reading is measured here, where a stream gives every row and keeps no epoch."""
    text = written(growth, tmp_path, "--config", tiny_config)
    assert "| 1 | 64 | 10 |" in text
    path = str(tmp_path / "some.parquet")
    growth.write(path, 128, 16)
    for streaming in (False, True):
        found = growth.read(path, 128, 16, streaming)
        assert found["peak"] >= found["before"] > 100 and found["seconds"][0] > 0


def test_every_section_of_the_document_can_be_written_anew():
    """Between marks on lines of their own, once each, in the order in which `bench.publish` looks for them."""
    marks = re.findall(
        r"^<!-- (\w+): (generated|end) -->$", (ROOT / bench.DOCUMENT).read_text(), re.M
    )
    assert [what for _, what in marks] == ["generated", "end"] * (len(marks) // 2)
    names = [name for name, _ in marks]
    assert names[::2] == names[1::2] and len(set(names)) == len(names) // 2
    assert set(names) == {
        "scheduler",
        "sampling",
        "guidance",
        "training",
        "growth",
        "muon",
        "ladder",
    }


def test_the_ladder_ends_in_the_shipped_recipe(tmp_path, capsys):
    free = {
        "name",
        "output",
        "sample.every",
        *(
            f"train.{name}"
            for name in ("steps", "keep", "log_every", "save_every", "validate_every")
        ),
    }
    shipped = config.load_file(ladder.CONFIG)
    last = config.load(ladder.command([*ladder.RUNGS][-1], 0, tmp_path, 560)[1:])[0]
    assert config.differences(shipped, last, tuple(free)) == []
    ladder.main(["--dry-run"])
    printed = capsys.readouterr().out
    assert (
        all(f"\n{rung}: " in "\n" + printed for rung in ladder.RUNGS)
        and "33 runs of 20 minutes: 11.0 hours" in printed
    )


def test_minutes_to_the_goal_are_between_the_checks_around_it():
    assert ladder.minutes_to_goal([(2.0, 0.2), (4.0, 0.6)]) == pytest.approx(3.0)
    assert ladder.minutes_to_goal([(2.0, 0.2), (4.0, 0.39)]) is None


def test_a_rung_that_is_done_is_not_run_again(tmp_path, monkeypatch):
    found = dict(
        enumerate(
            [
                {
                    "images": 320 * (i + 1),
                    "minutes": minutes,
                    "first_five": share,
                    "held_out": 0.1,
                    "taken": 20 + i,
                }
                for i, (minutes, share) in enumerate([(7.0, 0.5), (None, 0.3)])
            ]
        )
    )
    argv, left = (
        [
            "--rungs",
            "muon",
            "--seeds",
            "0",
            "1",
            "--folder",
            str(tmp_path),
            "--output",
            str(tmp_path / "b.md"),
        ],
        [],
    )

    def climb(rung, seed, args):
        left.append(args.folder / f"{rung}-s{seed}" / "checkpoints")
        (left[-1] / "10").mkdir(parents=True)
        return found.pop(seed)

    monkeypatch.setattr(ladder, "climb", climb)
    ladder.main(argv)
    assert (
        not found
        and [(path.exists(), path.parent.exists()) for path in left] == [(False, True)] * 2
    )
    elsewhere = json.loads((tmp_path / ladder.RESULTS).read_text())
    elsewhere += [
        one | {"rung": "bf16", "way": one["way"] | {"machine": "another"}} for one in elsewhere
    ]
    (tmp_path / ladder.RESULTS).write_text(json.dumps(elsewhere))
    ladder.main(argv)
    text = (tmp_path / "b.md").read_text()
    assert (
        "| 0, 1 | 480 | 20, 21 | 7.0, not in 20 | 40% (30% to 50%) | 10% (10% to 10%) |" in text
        and "| bf16 |" not in text
    )


def test_the_ladder_holds_its_last_rung_against_the_better_peer(tmp_path, monkeypatch):
    shares = {"x_0": 0.9, "muon": 0.4, f"{ladder.PEER}-64": 0.05, f"{ladder.PEER}-32": 0.1}
    result = lambda rung: {
        "images": 16,
        "minutes": None,
        "first_five": shares[rung],
        "held_out": None,
    }
    monkeypatch.setattr(ladder, "climb", lambda rung, seed, args: result(rung))
    monkeypatch.setattr(ladder, "peer", lambda width, seed, args: result(f"{ladder.PEER}-{width}"))
    monkeypatch.setattr(ladder, "installed", lambda folder: folder)
    argv = [
        "--seeds",
        "0",
        "--folder",
        str(tmp_path),
        "--output",
        str(tmp_path / "b.md"),
        "--rungs",
        *reversed(shares),
    ]
    ladder.main(argv)
    text = (tmp_path / "b.md").read_text()
    assert f"- muon's first five over {ladder.PEER}-32's: 4.00, the goal is ≥ 2: **met**." in text
    assert "| width 32, captions as classes, in pixels | 0 | 16 | ? | not in 20 | 10% | - |" in text


def test_the_peer_is_told_how_to_be_installed_before_anything_is_run(tmp_path, monkeypatch):
    run = []
    monkeypatch.setattr(ladder, "climb", lambda rung, seed, args: run.append(rung))
    argv = ["--folder", str(tmp_path), "--peers", str(tmp_path), "--output", str(tmp_path / "b.md")]
    with pytest.raises(SystemExit, match="pip install --no-deps"):
        ladder.main([*argv, "--rungs", "muon", f"{ladder.PEER}-32"])
    assert not run
