"""A card is valid with or without images and metrics, and text from users stays text."""

import re
from types import SimpleNamespace

import pytest
import yaml
from hub_world import ROOT
from huggingface_hub import ModelCard

from pipeline.config import Config, DataConfig, KeepConfig, ModelConfig, SampleConfig, load_file
from pipeline.hub import model_card
from pipeline.hub.model_card import build_card, training_facts
from pipeline.models import loading
from pipeline.runs.folder import RunFolder

HOSTILE = (
    "a: |\n---\n",
    "<script>alert(1)</script>",
    "```\n# not a heading",
    'it\'s "quoted" {braces}',
    "{{ config.seed }} {% for x in y %}",
    "red heart",
)


def test_build_card_keeps_hostile_text_as_text(metrics):
    config = Config(
        name="x",
        data=DataConfig("some/set: |\n---\n<script>"),
        sample=SampleConfig(prompts=HOSTILE),
    )
    report = "data:\n```\n<script>\n{{ 6 * 7 }}\n---\n"
    base = {"base_model": "a/b<script>\n---\n", "base_license": "|: x"}
    images = [f"prompt-{i}.png" for i in range(len(HOSTILE))] + ["samples.png"]
    facts = training_facts(report, 3600.0, **base)
    read = ModelCard(str(build_card(config, facts, images, "tester/tiny", metrics)))
    assert [entry["text"] for entry in read.data.widget] == list(HOSTILE)
    assert read.data.license == "|: x"
    assert read.data.base_model is None, "it is no name on the Hub"
    (first, *_) = read.data.eval_results
    assert (first.dataset_name, first.metric_value) == (config.data.source, 0.25)
    without_blocks = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", read.text, flags=re.M | re.S)
    assert "<script>" not in without_blocks
    assert "# not a heading" not in re.sub(r"`[^`\n]*`", "", without_blocks)
    assert "{{ 6 * 7 }}" in read.text, "no template of a user is rendered"
    settings = re.search(r"^(`{3,})yaml\n(.*?)^\1$", read.text, re.M | re.S)[2]
    assert yaml.safe_load(settings)["data"]["source"] == config.data.source
    for code in re.findall(r"```python\n(.*?)```", read.text, re.S):
        compile(code, "card", "exec")


def test_build_card_names_the_base_model(run):
    config = load_file(run.config)
    facts = training_facts(
        "",
        1.0,
        base_model="someone/stable",
        base_model_relation="adapter",
        base_license="creativeml-openrail-m",
    )
    card = build_card(config, facts)
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/stable", "adapter")
    assert card.data.license == "creativeml-openrail-m"
    assert "come from `someone/stable`" in card.text and "`creativeml-openrail-m`." in card.text
    assert "no safety checker" in card.text
    assert build_card(config, training_facts("", 1.0)).data.license == "cc-by-4.0"


def test_build_card_needs_neither_images_nor_metrics(run):
    card = build_card(Config(), training_facts("", 0.0))
    assert not {"widget", "model-index"} & card.data.to_dict().keys()
    assert "![" not in card.text and "<Gallery />" not in card.text
    assert "\n\n\n" not in card.text


def test_build_card_shows_images_metrics_and_notes(run):
    text = (run.folder / "README.md").read_text()
    assert "<Gallery />" in text and "(images/samples.png)" in text
    assert f"from_pretrained('{run.pipeline}'" in text and "25.0%" in text
    assert text.endswith("\n") and "\n\n\n" not in text
    (run.folder / "notes.md").write_text("## Seen\n\nAll hearts are red.\n")
    try:
        assert "\n\n## Seen\n\nAll hearts are red.\n\n## " in str(
            model_card.read_card(run.folder, "a/b")
        )
    finally:
        (run.folder / "notes.md").unlink()


def test_write_card_notes_what_was_on_the_hub(run, tmp_path, monkeypatch):
    """A folder that is gone later does not become the name of a repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    config = Config(name="x", data=DataConfig("data/mine"))
    made = RunFolder(tmp_path / "x")
    made.create()
    made.config.write_text(config.to_yaml())
    pipe = loading.load_from_folder(run.pipeline)
    images = SimpleNamespace(report="")
    model_card.write_card(config, made, pipe, images, 1.0, base_model="data/mine")
    (tmp_path / "data" / "mine").rmdir()
    data = model_card.read_card(made.folder, "a/b").data
    assert data.datasets is None and data.base_model is None
    unnoted = build_card(config, training_facts("", 1.0))
    assert unnoted.data.datasets == ["data/mine"]


def test_build_card_credits_the_kept_images():
    config = Config(data=DataConfig("user/photos", keep=KeepConfig("emoji-small")))
    card = build_card(config, training_facts("", 1.0))
    assert card.data.datasets == ["user/photos"]
    assert "CC-BY" in card.text


def test_without_local_paths_keeps_public_names_only(tmp_path):
    folder = tmp_path / "ann" / "photos"
    config = Config(
        name="x",
        output=str(tmp_path / "runs"),
        data=DataConfig(
            f"{folder}/", cache=str(tmp_path / "cache"), keep=KeepConfig(str(tmp_path / "kept"))
        ),
        model=ModelConfig(pretrained=str(tmp_path / "sd"), text_encoder="someone/bert@v1"),
    )
    report = (
        f"{folder}/train: 58 of 60 images usable\n"
        f"2 images have no row in {folder}/train/metadata.csv, e.g. ann.png\n"
        f"2 broken rows: 2 x its file cannot be read\n"
        f"{tmp_path}/kept: 4 of 4 images usable\n"
        f"  skipped ann.png: its file cannot be read: '{tmp_path}/elsewhere'"
    )
    facts = training_facts(report, 1.0, base_model=str(tmp_path / "sd"))
    public, facts = model_card.without_local_paths(config, facts)
    told = f"{public.to_yaml()}{facts}{build_card(public, facts)}"
    assert str(tmp_path) not in told and "photos" not in told and "skipped ann" not in told
    assert public.model.text_encoder == "someone/bert@v1"
    assert "58 of 60 images usable\n2 images have no row in " in facts["images"]
    assert "2 x its file cannot be read" in facts["images"]


@pytest.mark.parametrize("source", ["emoji-small", "user/dataset"])
def test_without_local_paths_keeps_relative_names_in_texts(source):
    """`data`, the default folder of the cache, is also an ordinary word."""
    config = Config(data=DataConfig(source))
    facts = training_facts(f"data/{source}-64/train: 9 of 9 images usable, e.g. data", 1.0)
    assert model_card.without_local_paths(config, facts) == (config, facts)
    relative = Config(data=DataConfig("photos"))
    facts = training_facts("photos: 1 image, no-photos, photos/a.txt", 1.0)
    public, facts = model_card.without_local_paths(relative, facts)
    hidden = model_card.LOCAL_NAME
    assert public.data.source == hidden
    assert facts["images"] == f"{hidden}: 1 image, no-photos, {hidden}/a.txt"


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: [mit, other]\n---\n", "mit, other"),
        ("---\nlicense: mit\nmodel-index: [{}]\n---\n", "mit"),
        ("---\na: [\n---\n", None),
        ("# no metadata", None),
        (None, None),
    ],
)
def test_license_of_a_malformed_card_is_none(readme, licence, tmp_path):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert model_card.license_of(str(tmp_path)) == licence
    facts = training_facts("", 1.0, base_model="a/b@v1", base_license=licence)
    card = build_card(Config(), facts)
    assert card.data.license == ("mit" if licence == "mit" else "other")
    assert card.data.base_model == "a/b"
    sentence = "its licence applies to them" + (f": `{licence}`." if licence else ".")
    assert sentence in card.text


def test_git_commit_is_unknown_without_git(monkeypatch, tmp_path):
    assert model_card.git_commit() != "unknown" or not (ROOT / ".git").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert model_card.git_commit() == "unknown"


def test_code_block_cannot_be_ended_by_its_text():
    text = "```\n````\n# heading"
    block = model_card.code_block(text)
    assert block.splitlines()[0] == "`````text" and block.splitlines()[-1] == "`````"


def test_inline_code_is_one_line_without_backticks():
    assert model_card.inline_code("a\n`b` <i>") == "a 'b' ‹i›"
