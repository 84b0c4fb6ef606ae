"""Settings: everything wrong is named at once, nothing unknown passes, and a saved configuration reads back the same."""

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.config import (
    DEFAULT,
    Config,
    ConfigError,
    TrainConfig,
    differences,
    explained,
    flatten,
    load,
    plain,
    read_yaml,
)

CONFIGS = sorted(Path(__file__).parent.parent.joinpath("configs").glob("*.yaml"))


def yaml_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_of_the_project_loads_and_is_a_difference_from_the_defaults(path):
    config, dry_run = load(["--config", str(path)])
    assert not dry_run
    assert config.problems() == []
    given = flatten(read_yaml(str(path)))
    defaults = flatten(plain(dataclasses.asdict(Config())))
    repeated = [k for k, v in given.items() if v == defaults[k] and k != "name"]
    assert repeated in (
        [],
        ["data.source"],
        ["data.resolution"],
        ["data.source", "data.resolution"],
    )
    assert path.read_text().startswith("#"), "a config opens with its lab note"


def test_every_setting_is_explained_in_the_help(capsys):
    words = explained()
    assert words.keys() == flatten(dataclasses.asdict(Config())).keys()
    with pytest.raises(SystemExit):
        load(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"without --config it is {DEFAULT}" in told
    for name in ("data.source", "train.weighting", "hub.token"):
        assert f"--{name}" in told and words[name] in told
    assert words["train.weighting"].endswith("one of simple, min_snr, velocity, min_velocity, x_0")
    assert words["diffusion.beta_end"] == "beta_T; of a new model 0.02"


def test_the_command_line_overrides_the_file(tmp_path):
    path = yaml_file(tmp_path, "name: a\ntrain: {lr: 1e-4, steps: 7}\n")
    config, dry_run = load(["--config", path, "--train.lr", "3e-4", "--dry_run"])
    assert (config.train.lr, config.train.steps, dry_run) == (3e-4, 7, True)


def test_the_default_file_is_read_when_none_is_named():
    assert load([])[0] == load(["--config", DEFAULT])[0]


def test_a_configuration_reads_back_as_it_was_written(tmp_path):
    path = yaml_file(
        tmp_path,
        "train: {weighting: min_velocity, gamma: 5, betas: [0.9, 0.95]}\n"
        "model: {patch_size: 4, channels: [64, 96], attention: [true, false]}\n",
    )
    config = load(["--config", path])[0]
    assert load(["--config", yaml_file(tmp_path, config.to_yaml())])[0] == config
    assert config.model.channels == (64, 96)


@pytest.mark.parametrize(
    ("written", "read"), [("text", "text"), ("[short, long]", ("short", "long")), ("null", None)]
)
def test_a_caption_column_is_a_name_or_several(tmp_path, written, read):
    for argv in (
        ["--data.caption_column", written],
        ["--config", yaml_file(tmp_path, f"data: {{caption_column: {written}}}")],
    ):
        config = load(argv)[0]
        assert config.data.caption_column == read
        assert load(["--config", yaml_file(tmp_path, config.to_yaml())])[0] == config


def test_all_range_errors_come_at_once_with_their_names(tmp_path):
    path = yaml_file(
        tmp_path,
        "train: {lr: -1, batch_size: 0, steps: 0, clip: .nan, weighting: other}\n"
        "data: {caption_dropout: 1.5, missing_caption: drop, crop: top, caption_column: [a, a],\n"
        "  shuffle_buffer: 0, streaming: true, split: 'train[:9]', held_out: 'train[9:]'}\n"
        "model: {channels: [50], whitening: 0}\n"
        "diffusion: {beta_schedule: lineer, beta_end: 1.0}\n",
    )
    with pytest.raises(ConfigError) as error:
        load(["--config", path])
    lines = str(error.value).splitlines()
    names = (
        "train.lr",
        "train.batch_size",
        "train.steps",
        "train.clip",
        "train.weighting",
        "data.caption_dropout",
        "data.missing_caption",
        "data.crop",
        "data.caption_column",
        "data.shuffle_buffer",
        "data.split",
        "data.held_out",
        "model.channels",
        "model.whitening",
        "model.attention",
        "diffusion.beta_schedule",
        "diffusion.beta_end",
    )
    for name in names:
        assert sum(name in line.split(", got")[0] for line in lines) >= 1, name
    assert "data.caption_dropout must be in [0, 1], got 1.5" in lines


def test_a_pretrained_models_caption_length_is_its_own(tmp_path):
    path = yaml_file(tmp_path, "model: {pretrained: some/model}\ndata: {caption_length: 32}\n")
    with pytest.raises(
        ConfigError, match="data.caption_length is the pretrained model's own: leave it out"
    ):
        load(["--config", path])


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("train.lrr", "train.lr"),
        ("data.captions_dropout", "data.caption_dropout"),
        ("lr", "train.lr"),
        ("train.batchsize", "train.batch_size"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(tmp_path, wrong, nearest):
    message = f"unknown setting {wrong!r}: did you mean {nearest!r}?"
    with pytest.raises(ConfigError) as on_the_command_line:
        load([f"--{wrong}", "3"])
    assert message in str(on_the_command_line.value)
    *groups, key = wrong.split(".")
    with pytest.raises(ConfigError) as in_a_file:
        load(
            [
                "--config",
                yaml_file(tmp_path, f"{groups[0]}: {{{key}: 3}}" if groups else f"{key}: 3"),
            ]
        )
    assert message in str(in_a_file.value)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--train.lr", "fast"], "train.lr"),
        (["--train.steps", "2.5"], "train.steps"),
        (["--config", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["--train.warmup", "100000"], "train.warmup must be in [0, train.steps"),
        (
            ["--train.batch_size", "6", "--train.accumulation", "4"],
            "train.batch_size must be a multiple of train.accumulation (4), got 6",
        ),
        (["--data.resolution", "30"], "data.resolution must be a multiple of 16"),
        (
            ["--train.weighting", "min_snr", "--train.gamma", "null"],
            "train.gamma must be a number above 0",
        ),
        (
            [
                "--diffusion.rescale_betas_zero_snr",
                "true",
                "--diffusion.prediction_type",
                "epsilon",
            ],
            "SNR = 0",
        ),
        (
            [
                "--diffusion.rescale_betas_zero_snr",
                "true",
                "--train.weighting",
                "simple",
                "--train.gamma",
                "null",
            ],
            "train.weighting must be velocity, min_velocity or x_0 with diffusion.rescale_betas_zero_snr, got simple",
        ),
        (["--name", "../x"], "name must be one folder's name, got '../x'"),
        (["--sample.w", "[.inf]"], "sample.w and sample.default_w must be finite numbers"),
        (["--sample.seed", "-1"], "sample.seed must be in [0, "),
        (
            ["--sample.eta", "0", "--diffusion.variance_type", "fixed_large"],
            "sample.eta must be 1 with diffusion.variance_type",
        ),
        (
            ["--model.patch_size", "3", "--data.resolution", "60"],
            "model.patch_size must be a power of two, got 3",
        ),
        (
            ["--train.lr_schedule", "cosine"],
            "train.decay_share are used by flat_then_linear only, not by",
        ),
        (
            ["--train.lr_schedule", "cosine", "--train.lr_end", "0", "--train.decay_share", "0.2"],
            "train.lr_end and",
        ),
        (
            ["--data.shuffle_buffer", "5"],
            "data.shuffle_buffer is used while data.streaming is on only: leave it out",
        ),
        (
            ["--diffusion.beta_schedule", "squaredcos_cap_v2", "--diffusion.beta_end", "0.01"],
            "not by squaredcos_cap_v2: leave them out",
        ),
    ],
)
def test_bad_values_are_named(argv, says):
    with pytest.raises(ConfigError, match=r".*") as error:
        load(argv)
    assert says in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="YAML|setting: value"):
        load(["--config", yaml_file(tmp_path, text)])


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_learning_rate_is_accepted_exactly_when_it_is_finite_and_positive(lr):
    complained = any("train.lr " in p for p in TrainConfig(lr=lr).problems())
    assert complained == (not (math.isfinite(lr) and lr > 0))


def test_differences_name_key_old_and_new_and_leave_out_what_is_free():
    old = Config()
    new = dataclasses.replace(
        old, seed=3, train=dataclasses.replace(old.train, lr=1e-3, log_every=7)
    )
    assert differences(old, new, ("train.log_every",)) == [
        "seed was 0 and is now 3",
        "train.lr was 0.0001 and is now 0.001",
    ]
    assert differences(old, new, ("train", "seed")) == []


KEYS = sorted(flatten(plain(dataclasses.asdict(Config()))))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(KEYS), ANYTHING)
def test_any_value_of_any_setting_is_a_configuration_or_one_clear_error(tmp_path, key, value):
    """Whatever YAML can say: it is taken or refused as a ConfigError, and never a traceback."""
    *sections, name = key.split(".")
    tree = {name: value}
    for section in reversed(sections):
        tree = {section: tree}
    path = tmp_path / "any.yaml"
    path.write_bytes(yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))
    try:
        config, _ = load(["--config", str(path)])
    except ConfigError as refused:
        assert str(refused)  # noqa: PT017  # that it is refused is one of two good ends
    else:
        assert (
            config.problems() == []
            and load(["--config", yaml_file(tmp_path, config.to_yaml())])[0] == config
        )


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12))
def test_any_flag_is_known_or_refused(name):
    try:
        load([f"--train.{name}", "1"])
    except ConfigError as refused:
        assert str(refused)  # noqa: PT017
    else:
        assert f"train.{name}" in KEYS


@pytest.mark.parametrize("last", [("--config", "FILE"), ("--config=FILE",)])
def test_the_command_line_overrides_a_file_wherever_that_is_named(tmp_path, last):
    (tmp_path / "a.yaml").write_text("train: {steps: 7, lr: 0.5}")
    config, _ = load(
        [
            "--train.steps",
            "9",
            *(word.replace("FILE", str(tmp_path / "a.yaml")) for word in last),
            "--seed",
            "3",
        ]
    )
    assert (config.train.steps, config.train.lr, config.seed) == (9, 0.5, 3)


def test_a_file_that_sets_something_twice_is_refused(tmp_path):
    """PyYAML keeps the last one, and all else of the first is lost."""
    (tmp_path / "a.yaml").write_text("train: {lr: 0.5}\nseed: 1\ntrain: {steps: 9}")
    with pytest.raises(ConfigError, match="'train' is there twice, expected once"):
        load(["--config", str(tmp_path / "a.yaml")])
