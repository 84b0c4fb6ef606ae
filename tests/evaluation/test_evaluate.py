"""What is measured of a run is what it drew, and what was drawn is drawn once."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from test_feature_extractor import judge  # noqa: F401
from tiny import tiny_clip, tiny_pipeline, tiny_unet
from torch import nn

from pipeline import config
from pipeline.cli import evaluate
from pipeline.data import dataset, image_ops
from pipeline.data.emoji import writer
from pipeline.diffusion import text_to_image
from pipeline.diffusion.exact_denoiser import ExactDenoiser
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.evaluation import distances, evaluate, retrieval, samples
from pipeline.evaluation.feature_extractor import FEATURE_NETWORK
from pipeline.evaluation.reference_set import ReferenceSet
from pipeline.hub import model_card
from pipeline.models import build
from pipeline.runs.folder import RunFolder

ONE = ["--steps", "2", "--batch", "16"]  # w
STEPS = [*ONE, "--choose-on", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return writer.write_emoji(tmp_path_factory.mktemp("shapes") / "set", "shapes", size=16)


@pytest.fixture(scope="module")
def bank(judge, folder):
    cache = folder.parent / "cache"
    return ReferenceSet.of(
        judge,
        [
            dataset.load_images(folder, split=s, resolution=16, cache_dir=cache)
            for s in ("train", "test")
        ],
    )


@pytest.fixture(scope="module")
def untrained(folder):
    """A run's folder around a network that was never trained."""
    run = folder.parent / "run"
    tiny_pipeline(sample_size=16, caption_length=8).save_pretrained(run / "pipeline")
    source = config.DataConfig(
        source=str(folder), resolution=16, cache=str(folder.parent / "cache")
    )
    (run / "config.yaml").write_text(config.Config(name="tiny", data=source).to_yaml())
    return run


@pytest.fixture
def run(untrained, tmp_path):
    """A copy of it; the data that were prepared for it are shared."""
    return shutil.copytree(untrained, tmp_path, dirs_exist_ok=True)


def measured_apart(judge, bank) -> float:
    """The KID of noise in the pictures' place."""
    noise = torch.randint(
        256, bank.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    found = evaluate.measure_samples(judge, bank, noise, torch.arange(len(bank.captions)), 0.1, 4)
    return found["distances"][FEATURE_NETWORK]["kid"]["value"]


def test_the_bank_ranks_its_own_pictures_first(judge, bank):
    rows = torch.arange(len(bank.captions))
    found = evaluate.measure_samples(judge, bank, bank.images, rows, 0.1, 4)
    assert found["train"]["first"]["share"] == found["held_out"]["first"]["share"] == 1
    assert found["seam_ratio"] == pytest.approx(1)
    assert found["distances"][FEATURE_NETWORK]["kid"]["value"] < 0 < measured_apart(judge, bank), (
        "the bias of pairs of one with itself"
    )
    assert {name: grid["first"]["n"] for name, grid in found["grids"].items()} == {
        "circles": 2,
        "hearts": 2,
        "squares": 2,
    }


def test_a_sibling_differs_in_one_factor_and_is_never_first(bank):
    held = range(bank.n_train, len(bank.captions))
    for row in held:
        color, shape = bank.captions[row].rsplit(" ", 1)
        siblings = [bank.captions[i].rsplit(" ", 1) for i in bank.siblings(row)]
        assert {s for _, s in siblings} == {shape}
        assert color not in {c for c, _ in siblings}
    assert (
        Counter(bank.captions[i].rsplit(" ", 1)[1] for i in bank.siblings(bank.n_train))["heart"]
        == 10
    )
    baseline = bank.sibling_baseline(torch.tensor(held))
    assert baseline["first"]["k"] == 0
    assert baseline["first"]["n"] == 6


def test_siblings_share_all_factors_but_one():
    rows = [
        ("man", "cook"),
        ("woman", "cook"),
        ("man", "judge"),
        ("woman", "judge"),
        ("person", "cook"),
    ]
    metadata = [{"grid": "roles", "factors": {"gender": g, "role": r}} for g, r in rows]
    metadata[1:1] = [{"grid": None, "factors": {}}]
    bank = ReferenceSet(
        torch.empty(0), [""] * 6, metadata, 5, torch.empty(0), torch.empty(0), torch.arange(6)
    )
    assert bank.siblings(5) == [0, 2]  # the cooks; judges differ in two factors
    assert bank.siblings(1) == []


def test_an_evaluation_goes_on_where_it_stopped(run, bank, monkeypatch, capsys):
    """What chooses w are at w = 1 the real pictures, so that w = 1 it is."""
    calls, draw = [], text_to_image.TextToImagePipeline.__call__

    def counted(self, prompts, **options):
        calls.append((options["w"], options["seed"], len(prompts)))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        if calls[-1][:2] == (1, 1000_000_000):
            return SimpleNamespace(
                images=bank.images[[bank.captions.index(prompt) for prompt in prompts]] / 255
            )
        return draw(self, prompts, **options)

    monkeypatch.setattr(text_to_image.TextToImagePipeline, "__call__", counted)
    command, stop_at = [str(run), "--w", "0", "1", "--seeds", "0", "3", *STEPS], 3
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    assert calls == [(0, 1000_000_000, 5), (1, 1000_000_000, 5), (1, 0, 16)]
    calls.clear()
    stop_at = None
    assert evaluate.main(command) == 0
    assert [c[1] for c in calls] == [
        0,
        16,
        0,
        16,
        3_000_000,
        3_000_016,
        3_000_000,
        3_000_016,
    ]  # all, then free; no choice
    first = json.loads((run / "metrics.json").read_text())
    calls.clear()
    assert evaluate.main(command) == 0
    assert not calls
    assert json.loads((run / "metrics.json").read_text()) == first
    assert first["by_seed"]["0"] != first["by_seed"]["3"]
    assert first["references"]["chance"] == {"first": 1 / 28, "first_five": 5 / 28}
    assert "held-out combinations: first" in capsys.readouterr().out
    assert Image.open(run / "images" / "free.png").size == (
        825,
        660,
    )  # five columns of the 20 prompts


def test_drawings_are_another_samplers_no_more(run, monkeypatch):
    """What a change of the sampler, or of the free prompts, draws is drawn anew."""
    drawn, real = [], samples.generate_batch
    counted = lambda pipe, prompts, **call: (
        drawn.append(len(prompts)) or real(pipe, prompts, **call)
    )
    monkeypatch.setattr(samples, "generate_batch", counted)
    command, settings = (
        [str(run), "--w", "0", *ONE],
        run / "pipeline" / "scheduler" / "scheduler_config.json",
    )
    measure = lambda: (drawn.clear(), evaluate.main(command), sum(drawn))[1:]
    assert measure() == (0, 28 + 20) and measure() == (0, 0)
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"timestep_spacing": "leading"})
    )
    assert measure() == (0, 28 + 20)
    monkeypatch.setattr(evaluate.variations, "FREE", evaluate.variations.FREE[:3])
    assert measure() == (0, 3)


def test_drawings_are_known_again_by_another_process(bank):
    """diffusers notes which settings are defaults in an order of its own in each process."""
    found = []
    for noted in (["beta_start", "beta_end"], ["beta_end", "beta_start"]):
        pipe = tiny_pipeline(caption_length=8)
        pipe.scheduler._internal_dict = FrozenDict(
            dict(pipe.scheduler.config) | {"_use_default_values": noted}
        )
        found.append(samples.samples_identity(pipe, bank))
    assert found[0] == found[1]
    pipe.unet = tiny_unet(seed=1)
    assert samples.samples_identity(pipe, bank) != found[0]


@pytest.mark.parametrize("chosen", ["bf16", "no"])
def test_drawings_are_computed_in_the_precision_of_training(chosen, monkeypatch, tmp_path):
    pipe, seen = tiny_pipeline(caption_length=8), set()
    monkeypatch.setattr(evaluate.models, "has_bf16", lambda device: chosen == "bf16")
    pipe.unet.conv_in.register_forward_hook(lambda net, args, out: seen.add(out.dtype))
    drawn = samples.generate_samples(
        pipe, ["red", "blue"], 1.0, 0, 2, tmp_path / "images.safetensors", 2
    )
    assert seen == {torch.bfloat16 if chosen == "bf16" else torch.float32} and drawn.shape == (
        2,
        3,
        8,
        8,
    )


def test_w_is_not_reported_on_the_seed_that_chose_it(run, capsys):
    assert evaluate.main([str(run), "--seeds", "1000", *STEPS]) == 2
    assert "seed 1000 chooses w" in capsys.readouterr().err


def test_what_starts_from_its_own_picture_is_as_good_as_the_chain_below(run, judge, bank):
    """The exact denoiser gives back the picture it can still see, and any picture where it sees none."""
    *_, pipe = evaluate.load_run(run)
    pipe.unet = ExactDenoiser(image_ops.as_float(bank.train), pipe.scheduler)
    rows = torch.arange(bank.n_train)
    low, high = (
        evaluate.denoise_real_images(judge, bank, pipe, rows, t, 0.0, 0, 50) for t in (19, 999)
    )
    assert (low["t"], high["t"]) == (19, 999)
    assert low["first"]["share"] == 1 and high["first"]["share"] < 0.5
    assert evaluate.denoise_real_images(judge, bank, pipe, rows, 999, 0.0, 0, 50, batch=5) == high
    with pytest.raises(
        retrieval.EvaluationError,
        match="a plan of 50 steps has no timestep up to 5: give more --steps",
    ):
        evaluate.denoise_real_images(judge, bank, pipe, rows, 5, 0.0, 0, 50)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--on", "0"], "--on is 0, expected 1 or more"),
        (["--choose-on", "0"], "--choose-on is 0, expected 1 or more"),
        (
            ["--sweep", "w=0,1", "--seeds", "0", "1", "--more"],
            "--more and a second --seeds means nothing beside --sweep",
        ),
        (["--on", "9"], "--on means nothing without --sweep"),
        (["--sweep", "w=0,1", "--choose-on", "9"], "--choose-on means nothing beside --sweep"),
        (["--from-real", "9", "--seeds", "5"], "--seeds means nothing beside --from-real"),
        (["--from-real", "9", "--w", "0", "1"], "a second --w means nothing beside --from-real"),
        (["--from-real", "9", "--sweep", "w=0,1"], "--sweep means nothing beside --from-real"),
    ],
)
def test_what_would_count_for_nothing_is_refused(run, capsys, arguments, says):
    assert evaluate.main([str(run), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_command_starts_from_real_pictures(run, capsys):
    assert (
        evaluate.main([str(run), "--from-real", "999", "19", "--w", "0", "--choose-on", "4"]) == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["from t = 999", "from t = 19"]


def test_an_unfinished_run_is_refused(tmp_path, capsys):
    RunFolder(tmp_path / "new").create()
    assert evaluate.main([str(tmp_path / "new")]) == 2
    assert "holds no finished pipeline" in capsys.readouterr().err


class Colours(nn.Module):
    """A feature network: the mean and the deviation of each colour, (B, 6); it counts the pictures that it was shown."""

    shown = 0

    def forward(self, images):
        Colours.shown += len(images)
        x = images.float() / 255
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


@pytest.fixture
def colours(monkeypatch):
    """A second network, Fréchet distances that see too little of the judge's features to take long, and few drawings."""
    frechet = distances.frechet_distance
    monkeypatch.setitem(evaluate.FEATURE_NETWORKS, "colours", Colours)
    monkeypatch.setattr(distances, "frechet_distance", lambda x, y: frechet(x[:, :16], y[:, :16]))
    monkeypatch.setattr(evaluate, "DIVERSITY_SAMPLES", (4, 2))
    monkeypatch.setattr(Colours, "shown", 0)


def test_more_measures_the_same_drawings_by_more_and_names_every_network(run, colours, capsys):
    command = [str(run), "--w", "1", *ONE]
    (run / model_card.TRAINING_FACTS).write_text(
        json.dumps(model_card.training_facts("28 images", 1.0) | {"model": str(run / "pipeline")})
    )
    assert evaluate.main(command) == 0
    assert not (run / "README.md").exists(), (
        "a card would pass for the end of a run that is trained on"
    )
    (run / "README.md").write_text("a card")
    plain = json.loads((run / "metrics.json").read_text())
    assert set(plain["by_seed"]["0"]["distances"]) == {FEATURE_NETWORK} and "more" not in plain
    assert "frechet" not in plain["by_seed"]["0"]["distances"][FEATURE_NETWORK]
    assert evaluate.main([*command, "--more", "--features", "colours"]) == 0
    found = json.loads((run / "metrics.json").read_text())
    assert {k: v for k, v in found["by_seed"]["0"].items() if k != "distances"} == {
        k: v for k, v in plain["by_seed"]["0"].items() if k != "distances"
    }
    for by in found["by_seed"]["0"]["distances"].values():
        assert (
            by["frechet"]["n"] == 14 and by["frechet"]["value"] > by["frechet"]["real"] > 0
        )  # an untrained network's
        assert by["kid"]["n"] == 28
    more = found["more"]
    assert set(more["errors"]) == {"timesteps", "train", "held_out"} and set(more["diversity"]) == {
        "1"
    }
    bits = {name: by["mean"] for name, by in more["bits_per_dimension"].items()}
    assert (
        bits["model"] == pytest.approx(bits["prior"] + bits["steps"] + bits["decoder"])
        and bits["model"] > bits["png"]
    )
    assert all(by["n"] == 6 for by in more["bits_per_dimension"].values())
    told = capsys.readouterr().out
    for line in (
        "kid (colours)",
        f"kid ({FEATURE_NETWORK})",
        f"Fréchet distance ({FEATURE_NETWORK})",
        "bits per dimension by the bound; as PNG",
    ):
        assert line in told
    assert (
        model_card.metrics_section(found) in told
        and model_card.metrics_section(found) in (run / "README.md").read_text()
    )
    assert evaluate.main(command) == 0
    assert json.loads((run / "metrics.json").read_text())["more"] == more, (
        "what still holds was lost"
    )
    tiny_unet(sample_size=16, seed=1).save_pretrained(run / "pipeline" / "unet")
    assert evaluate.main(command) == 0
    assert "more" not in json.loads((run / "metrics.json").read_text()), "it is of other weights"


def test_what_is_known_of_real_pictures_is_computed_once(run, colours, tmp_path, monkeypatch):
    _config, _judge, bank, _pipe = evaluate.load_run(run)
    frechet, pairs = distances.frechet_distance, []
    monkeypatch.setattr(
        distances, "frechet_distance", lambda x, y: pairs.append(len(x)) or frechet(x, y)
    )
    first = evaluate.feature_distances("colours", bank, bank.images, tmp_path)
    assert Colours.shown == 56 and pairs == [14, 14]
    assert first["frechet"]["value"] == pytest.approx(first["frechet"]["real"]), (
        "real pictures in the drawings' place"
    )
    again = evaluate.feature_distances("colours", bank, bank.images, tmp_path)
    assert again == first and Colours.shown == 56 + 28 and len(pairs) == 3
    bank.images[0, 0, 0, 0] ^= 1
    evaluate.feature_distances("colours", bank, bank.images, tmp_path)
    assert Colours.shown == 56 + 28 + 56, "other pictures have other statistics"


def test_a_network_that_is_not_there_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--features", "vgg"])
    assert f"choose from {FEATURE_NETWORK}, inception-v3" in capsys.readouterr().err.replace(
        "'", ""
    )


def test_a_clip_model_scores_drawings_beside_real_pictures(run, tmp_path, capsys):
    folder = tiny_clip(tmp_path / "tiny-clip")
    assert evaluate.main([str(run), "--w", "1", *ONE, "--clip", str(folder)]) == 0
    found = json.loads((run / "metrics.json").read_text())["by_seed"]["0"]["clip"]
    assert found["model"] == "tiny-clip" and found["drawn"]["n"] == found["real"]["n"] == 28
    assert "CLIP score (tiny-clip)" in capsys.readouterr().out


def test_what_is_misspelt_is_said_before_anything_is_drawn(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        samples, "generate_samples", lambda *_args, **_more: pytest.fail("it draws")
    )
    for more, says in (
        (["--clip", str(tmp_path / "none")], "is no CLIP model"),
        (["--features", "inception-v3"], "inception-v3 is not installed"),
        (
            ["--w", "1", "--choose-on", "9", "--choose-seed", "7"],
            "--choose-on and --choose-seed means nothing with one --w",
        ),
        (["--seeds", "1000"], "seed 1000 chooses w and may not report it"),
    ):
        assert evaluate.main([str(run), *more]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--seed", "3"])


def test_a_seed_that_chooses_nothing_may_report(run):
    assert evaluate.main([str(run), "--w", "1", *ONE, "--seeds", "1000"]) == 0
    assert list(json.loads((run / "metrics.json").read_text())["by_seed"]) == ["1000"]


def test_a_model_that_draws_by_a_stock_scheduler_is_measured_by_its_noise_process(
    run, colours, capsys
):
    """As an adapter's base does: its own scheduler draws, and has no equations."""
    pipe = TextToImagePipeline.from_pretrained(run / "pipeline")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(run / "pipeline")
    command = [str(run), "--w", "1", *ONE]
    assert evaluate.main([*command, "--more"]) == 0
    more = json.loads((run / "metrics.json").read_text())["more"]
    by_stock = more["errors"]["train"]["x_0"], more["bits_per_dimension"]["model"]["mean"]
    pipe.scheduler = build.build_scheduler(config.DiffusionConfig(), pipe.scheduler)
    pipe.save_pretrained(run / "pipeline")
    assert evaluate.main([*command, "--more"]) == 0
    again = json.loads((run / "metrics.json").read_text())["more"]
    assert by_stock == (
        again["errors"]["train"]["x_0"],
        again["bits_per_dimension"]["model"]["mean"],
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(run / "pipeline")
    assert evaluate.main([str(run), "--from-real", "500", "--steps", "2"]) == 2
    assert "this model draws by DDIMScheduler" in capsys.readouterr().err


def test_measurements_of_another_precision_are_replaced_and_that_is_told(tmp_path, capsys):
    evaluate.update_metrics(tmp_path, "abc-def", w=1.0)
    assert evaluate.update_metrics(tmp_path, "abc-def", sweep={}) == {
        "w": 1.0,
        "sweep": {},
        "model": "abc-def",
    }
    assert not capsys.readouterr().err
    assert evaluate.update_metrics(tmp_path, "abc-def-float32", w=2.0) == {
        "w": 2.0,
        "model": "abc-def-float32",
    }
    assert (
        "metrics.json was of the same model by a machine of another precision"
        in capsys.readouterr().err
    )
    evaluate.update_metrics(tmp_path, "another", w=2.0)
    assert not capsys.readouterr().err
