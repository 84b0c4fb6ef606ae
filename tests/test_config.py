"""Settings: one error lists every problem, unknown names are refused, a saved file reads back."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.config import (
    DEFAULT,
    DIFFUSERS_FLAGS,
    AutoencoderConfig,
    Config,
    ConfigError,
    TrainConfig,
    differences,
    flatten,
    help_texts,
    load,
    read_yaml,
    validate,
)

CONFIGS = sorted(Path(__file__).parent.parent.joinpath("configs").glob("*.yaml"))


def yaml_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_load_reads_presets_that_differ_from_defaults(path):
    kind = AutoencoderConfig if path.stem == "autoencoder" else Config
    config, dry_run = load(["--config", str(path)], kind)
    assert not dry_run
    assert config.problems() == []
    values, defaults = flatten(config.to_dict()), flatten(kind().to_dict())
    given = flatten(read_yaml(str(path))).keys()
    repeated = {key for key in given if values[key] == defaults[key]}
    assert repeated <= {"name", "data.source", "data.resolution"}
    assert path.read_text().startswith("#"), "a config opens with its lab note"


def test_help_texts_cover_every_setting(capsys):
    texts = help_texts()
    assert texts.keys() == flatten(Config().to_dict()).keys()
    assert all(texts.values())
    with pytest.raises(SystemExit):
        load(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert DEFAULT in printed
    for name in ("data.source", "train.weighting", "hub.token"):
        assert f"--{name}" in printed
        assert texts[name].split()[0] in printed
    assert "simple, min_snr, velocity, min_velocity, x_0" in texts["train.weighting"]
    assert "0.02" in texts["diffusion.beta_end"]


def test_load_prints_a_config_that_it_reads_again(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        load(["--train.steps", "70", "--print_config"])
    assert not end.value.code
    again = load(["--config", yaml_file(tmp_path, capsys.readouterr().out)])[0]
    assert again == load(["--train.steps", "70"])[0]


def test_load_lets_the_command_line_override_the_file(tmp_path):
    path = yaml_file(tmp_path, "name: a\ntrain: {lr: 1e-4, steps: 7}\n")
    config, dry_run = load(["--config", path, "--train.lr", "3e-4", "--dry_run"])
    assert (config.train.lr, config.train.steps, dry_run) == (3e-4, 7, True)


def test_load_reads_the_default_file():
    assert load([])[0] == load(["--config", DEFAULT])[0]


def test_to_yaml_is_read_back_by_load(tmp_path):
    path = yaml_file(
        tmp_path,
        "train: {weighting: min_velocity, gamma: 5, betas: [0.9, 0.95]}\n"
        "model: {patch_size: 4, channels: [64, 96], attention: [true, false]}\n",
    )
    config = load(["--config", path])[0]
    assert load(["--config", yaml_file(tmp_path, config.to_yaml())])[0] == config
    assert config.model.channels == (64, 96)


def test_to_yaml_leaves_out_what_a_base_model_brings(tmp_path):
    config = load(["--config", "configs/sd15-lora.yaml"])[0]
    text = config.to_yaml()
    assert config.model.pretrained in text
    assert not any(name in text for name in ("text_encoder", "channels", "caption_length"))
    assert load(["--config", yaml_file(tmp_path, text)])[0] == config


@pytest.mark.parametrize(
    ("written", "read"), [("text", "text"), ("[short, long]", ("short", "long")), ("null", None)]
)
def test_load_takes_one_or_several_caption_columns(tmp_path, written, read):
    for argv in (
        ["--data.caption_column", written],
        ["--config", yaml_file(tmp_path, f"data: {{caption_column: {written}}}")],
    ):
        config = load(argv)[0]
        assert config.data.caption_column == read
        assert load(["--config", yaml_file(tmp_path, config.to_yaml())])[0] == config


def test_load_reports_every_problem_at_once(tmp_path):
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
        assert any(name in line.split(", got")[0] for line in lines), name
    (dropout,) = [line for line in lines if "data.caption_dropout" in line]
    assert "1.5" in dropout


def test_load_refuses_a_caption_length_beside_a_base_model(tmp_path):
    path = yaml_file(tmp_path, "model: {pretrained: some/model}\ndata: {caption_length: 32}\n")
    with pytest.raises(ConfigError, match=r"data\.caption_length"):
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
def test_load_suggests_the_nearest_setting(tmp_path, wrong, nearest):
    section, _, key = wrong.rpartition(".")
    file = yaml_file(tmp_path, f"{section}: {{{key}: 3}}" if section else f"{key}: 3")
    for argv in ([f"--{wrong}", "3"], ["--config", file]):
        with pytest.raises(ConfigError) as error:
            load(argv)
        assert repr(wrong) in str(error.value)
        assert repr(nearest) in str(error.value)


@pytest.mark.parametrize("flag", DIFFUSERS_FLAGS)
def test_load_names_the_counterpart_of_a_diffusers_flag(flag):
    settings = {name for name in help_texts() if f"`{name}" in DIFFUSERS_FLAGS[flag]}
    assert settings or flag == "resume_from_checkpoint"
    for argv in ([f"--{flag}", "3"], [f"--train.{flag}", "3"], [f"--{flag}"]):
        with pytest.raises(ConfigError) as error:
            load(argv)
        assert all(name in str(error.value) for name in settings)


@pytest.mark.parametrize(
    ("flag", "text", "taken"),
    [
        ("sample.prompts", "a red circle, landscape", ("a red circle, landscape",)),
        ("sample.w", "7.5", (7.5,)),
        ("lora.targets", "to_q", ("to_q",)),
    ],
)
def test_load_takes_one_value_as_a_list_of_one(flag, text, taken):
    more = ["--config", "configs/sd15-lora.yaml", f"--{flag}", text]
    assert flatten(load(more)[0].to_dict())[flag] == taken


ZERO_SNR = ["--diffusion.rescale_betas_zero_snr", "true"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--train.lr", "fast"], ["train.lr", "fast"]),
        (["--train.steps", "2.5"], ["train.steps", "2.5"]),
        (["--train.steps", "true"], ["train.steps", "true"]),
        (["--data.flip", "maybe"], ["data.flip", "maybe"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--train.warmup", "100000"], ["train.warmup", "100000"]),
        (
            ["--train.batch_size", "6", "--train.accumulation", "4"],
            ["train.batch_size", "train.accumulation (4)", "6"],
        ),
        (["--data.resolution", "30"], ["data.resolution", "16", "30"]),
        (["--train.weighting", "min_snr", "--train.gamma", "null"], ["train.gamma", "min_snr"]),
        ([*ZERO_SNR, "--diffusion.prediction_type", "epsilon"], ["prediction_type", "epsilon"]),
        (
            [*ZERO_SNR, "--train.weighting", "simple", "--train.gamma", "null"],
            ["train.weighting", "simple"],
        ),
        (["--name", "../x"], ["name", "../x"]),
        (["--sample.w", "[.inf]"], ["sample.w", "inf"]),
        (["--sample.seed", "-1"], ["sample.seed", "-1"]),
        (
            ["--sample.eta", "0", "--diffusion.variance_type", "fixed_large"],
            ["sample.eta", "fixed_large"],
        ),
        (["--model.patch_size", "3", "--data.resolution", "60"], ["model.patch_size", "3"]),
        (["--train.lr_schedule", "cosine"], ["train.decay_share", "flat_then_linear"]),
        (
            ["--train.lr_schedule", "cosine", "--train.lr_end", "0", "--train.decay_share", "0.2"],
            ["train.lr_end", "flat_then_linear"],
        ),
        (["--data.shuffle_buffer", "5"], ["data.shuffle_buffer", "data.streaming"]),
        (
            ["--diffusion.beta_schedule", "squaredcos_cap_v2", "--diffusion.beta_end", "0.01"],
            ["squaredcos_cap_v2", "diffusion.beta_end"],
        ),
    ],
)
def test_load_names_the_bad_setting_and_its_value(argv, named):
    with pytest.raises(ConfigError) as error:
        load(argv)
    assert all(word in str(error.value) for word in named)


def test_load_reads_no_as_a_precision_and_as_a_truth_value(tmp_path):
    path = yaml_file(tmp_path, "train: {precision: no}\ndata: {flip: no}\n")
    for argv in (["--config", path], ["--train.precision", "no", "--data.flip", "no"]):
        config = load(argv)[0]
        assert (config.train.precision, config.data.flip) == ("no", False)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words"])
def test_load_refuses_a_file_that_is_no_mapping(tmp_path, text):
    with pytest.raises(ConfigError, match="run.yaml"):
        load(["--config", yaml_file(tmp_path, text)])


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_train_config_accepts_positive_finite_learning_rates(lr):
    try:
        TrainConfig(lr=lr)
    except ValueError:
        assert not (math.isfinite(lr) and lr > 0)
    else:
        assert math.isfinite(lr) and lr > 0


def test_differences_name_settings_that_are_not_free():
    old = Config()
    new = dataclasses.replace(
        old, seed=3, train=dataclasses.replace(old.train, lr=1e-3, log_every=7)
    )
    assert differences(old, new, ("train.log_every",)) == [
        "seed was 0 and is now 3",
        "train.lr was 0.0001 and is now 0.001",
    ]
    assert differences(old, new, ("train", "seed")) == []


# The token is saved nowhere, so it does not come back.
KEYS = sorted(help_texts().keys() - {"hub.token"})
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
def test_load_accepts_or_refuses_any_value_of_any_setting(tmp_path, key, value):
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
        assert str(refused)  # that it is refused is one of two good ends  # noqa: PT017
    else:
        assert config.problems() == []
        assert load(["--config", yaml_file(tmp_path, config.to_yaml())])[0] == config


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12))
def test_load_accepts_or_refuses_any_flag(name):
    try:
        load([f"--train.{name}", "1"])
    except ConfigError as refused:
        assert str(refused)  # noqa: PT017
    else:
        assert f"train.{name}" in KEYS


@pytest.mark.parametrize("last", [("--config", "FILE"), ("--config=FILE",)])
def test_load_finds_the_config_flag_anywhere(tmp_path, last):
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


def test_load_refuses_a_repeated_key(tmp_path):
    """PyYAML keeps the last one, and all else of the first is lost."""
    (tmp_path / "a.yaml").write_text("train: {lr: 0.5}\nseed: 1\ntrain: {steps: 9}")
    with pytest.raises(ConfigError, match="'train'"):
        load(["--config", str(tmp_path / "a.yaml")])


def test_validate_allows_unused_settings_of_saved_runs():
    tree = {"data": {"shuffle_buffer": 5}}
    assert validate(tree, saved=True).data.shuffle_buffer == 5
    with pytest.raises(ConfigError, match=r"data\.shuffle_buffer"):
        validate(tree)


def test_to_yaml_and_to_dict_leave_the_token_out():
    config = validate({"hub": {"repo_id": "someone/model", "token": "hf_secret"}})
    assert config.hub.token == "hf_secret"
    assert "hf_secret" not in config.to_yaml() + json.dumps(config.to_dict()) + repr(config)
