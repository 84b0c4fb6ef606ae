"""What the repository says about itself is so."""

import ast
import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from tiny import tiny_pipeline

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "pipeline").glob("*.py"))
ALLOWED = {  # what a module may import of ours; evaluation imports sweep for its command line alone
    "scheduler": set(),
    "guidance": set(),
    "patches": set(),
    "captions": set(),
    "config": set(),
    "run": set(),
    "muon": set(),
    "layout": set(),
    "variations": set(),
    "emoji": {"variations"},
    "losses": {"scheduler"},
    "exact": {"scheduler"},
    "measures": {"data", "losses", "patches", "scheduler"},
    "judge": {"measures"},
    "text_to_image": {"captions", "guidance", "layout"},
    "safe": {"layout", "run"},
    "sources": {"captions", "config"},
    "randomness": set(),
    "data": {"captions", "config", "emoji", "machine", "randomness", "sources"},
    "stream": {"config", "data", "randomness", "sources"},
    "latents": {"data"},
    "verifiers": {"guidance", "losses", "scheduler", "text_to_image"},
    "search": {"guidance", "loading", "sample", "text_to_image", "verifiers"},
    "models": {"captions", "config", "patches", "run", "scheduler", "text_to_image"},
    "optim": {"config", "models", "muon"},
    "machine": set(),
    "parts": {
        "config",
        "data",
        "hub",
        "latents",
        "losses",
        "models",
        "patches",
        "randomness",
        "scheduler",
        "stream",
        "text_to_image",
    },
    "trackers": {"config", "run", "sources"},
    "report": set(),
    "request": {"guidance"},
    "loading": {"config", "models", "run", "safe", "text_to_image"},
    "sample": {"data", "loading", "request", "scheduler"},
    "card": {
        "config",
        "data",
        "emoji",
        "exact",
        "layout",
        "report",
        "run",
        "safe",
        "text_to_image",
    },
    "evaluation": {
        "card",
        "config",
        "data",
        "judge",
        "loading",
        "losses",
        "measures",
        "models",
        "report",
        "run",
        "scheduler",
        "sources",
        "sweep",
        "text_to_image",
        "variations",
        "verifiers",
    },
    "sweep": {
        "config",
        "data",
        "evaluation",
        "guidance",
        "judge",
        "measures",
        "run",
        "scheduler",
        "search",
        "text_to_image",
    },
    "hub": {
        "card",
        "config",
        "layout",
        "loading",
        "models",
        "run",
        "safe",
        "sources",
        "text_to_image",
    },
    "serving": {
        "captions",
        "config",
        "data",
        "emoji",
        "exact",
        "guidance",
        "hub",
        "loading",
        "models",
        "request",
        "run",
        "safe",
        "scheduler",
        "search",
        "text_to_image",
        "verifiers",
    },
}
SOURCES = [*MODULES, ROOT / "train_text2img.py", ROOT / "app.py"]


def imports(path):
    """The names of our modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ("pipeline" if node.level else "")
                + ("." if node.level and node.module else "")
                + (node.module or "")
            )
            found |= (
                {f"{base}.{alias.name}" for alias in node.names} if base == "pipeline" else {base}
            )
    return {name.split(".")[1] for name in found if name.startswith("pipeline.")} | (
        found & {"train_text2img", "app"}
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    found = imports(path)
    assert not found & {"train_text2img", "app"}
    if path.stem in ALLOWED:
        assert found <= ALLOWED[path.stem]


def test_importing_the_package_costs_nothing():
    code = "import sys, pipeline; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_nothing_is_unpickled_or_evaluated(path):
    tree = ast.parse(path.read_text())
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, keywords = ast.unparse(call.func), {k.arg: k.value for k in call.keywords}
        assert name not in ("eval", "exec", "yaml.load", "pickle.load", "pickle.loads"), name
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        assert ast.unparse(keywords.get("trust_remote_code", ast.Constant(False))) == "False"
    assert "import pickle" not in path.read_text()


def defined(path, name):
    return any(
        isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name
        for n in ast.walk(ast.parse(path.read_text()))
    )


def test_every_equation_has_its_function_and_its_test():
    rows = [
        line
        for line in (ROOT / "docs" / "equations.md").read_text().splitlines()
        if line.startswith("| (")
    ]
    assert {int(n) for row in rows for n in re.findall(r"^\| \((\d+)\)", row)} == {*range(1, 20)}
    for row in rows:
        places = re.findall(r"`([\w/.]+\.py)::(\w+)`", row)
        assert len(places) == 2, row
        for file, name in places:
            assert defined(ROOT / file, name), f"{file} has no {name}"


def test_the_readmes_table_names_what_exists():
    rows = re.findall(r"\| `(\w+)\.(\w+)` \| `(\w+)` \|", (ROOT / "README.md").read_text())
    assert len(rows) == 4
    for module, function, test in rows:
        assert defined(ROOT / "pipeline" / f"{module}.py", function)
        assert any(defined(path, test) for path in (ROOT / "tests").glob("test_*.py")), test


def test_the_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:pipeline|configs|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"`?make (\w+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def test_every_link_of_the_documents_leads_to_a_file_and_a_heading_that_are_there():
    links, documents = (
        0,
        [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")],
    )
    for document in (*documents, *(ROOT / "pretrained").rglob("*.md")):
        for target, anchor in re.findall(
            r"\]\(((?!\w+:)[^)#\s]*)#?([^)\s]*)\)", document.read_text()
        ):
            place = document.parent / target if target else document
            assert place.exists(), (document, target)
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.M) if anchor else []
            assert not anchor or anchor in {
                re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings
            }, anchor
            links += 1
    assert links > 20


@pytest.mark.parametrize(
    ("version", "says"), [((3, 10, 9), "is Python 3.10.9, expected 3.11 or newer"), (None, "")]
)
def test_an_old_python_is_told_before_anything_is_installed(version, says, tmp_path):
    """A stand-in answers with its version and makes no environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    old = (
        ""
        if version is None
        else f"import sys; sys.version_info, sys.version = {version}, {'.'.join(map(str, version))!r}; "
    )
    python = tmp_path / "python3"
    asked, made = (
        f'[ "$1" = -c ] && exec {sys.executable} -c "{old}$2"',
        "mkdir -p .venv/bin && touch .venv/bin/python",
    )
    python.write_text(f"#!/bin/sh\n{asked}\n{made}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "PYTHON=./python3", ".venv/bin/python"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0, (tmp_path / ".venv").exists()) == (
        (True, False) if says else (False, True)
    ), done.stderr
    assert says in done.stderr


def test_the_readmes_tree_and_contributing_name_every_module():
    (tree,) = re.findall(
        r"^pipeline/ +((?:[a-z_]+\s+)+)configs/", (ROOT / "README.md").read_text(), re.M
    )
    assert sorted(tree.split()) == sorted(path.stem for path in MODULES if path.stem != "__init__")
    (alone,) = re.findall(
        r"Import direction: `([a-z_, ]+)`\s+import nothing", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert set(alone.split(", ")) == {name for name, allowed in ALLOWED.items() if not allowed}


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    """As it stands, in a folder that holds a model of that name; in this process, since a new one spends seconds on imports."""
    text = (ROOT / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    (model,) = re.findall(r'hub.load\("([^"]+)"', code)
    tiny_pipeline().save_pretrained(tmp_path / model, safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    exec(code + "print(picture.size)", {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert said.endswith("(8, 8)\n") and said.count("torch.Size([1, 3, 8, 8])") == 2 * 50


def test_the_readmes_modules_answer_for_help(monkeypatch, capsys):
    """Each `python -m pipeline.x` of the README is a command line; in this process, since a new one spends seconds on imports."""
    modules = sorted(
        set(re.findall(r"python -m (pipeline\.\w+)", (ROOT / "README.md").read_text()))
    )
    assert "pipeline.sample" in modules
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    for module in modules:
        with (
            warnings.catch_warnings(action="ignore", category=RuntimeWarning),
            pytest.raises(SystemExit) as end,
        ):
            runpy.run_module(module, run_name="__main__")
        assert not end.value.code and "usage:" in capsys.readouterr().out, module


def test_no_file_holds_a_path_of_one_machine():
    folders = ("pipeline", "tests", "benchmarks", "configs", "docs", ".ci")
    places = [ROOT.glob("*"), *((ROOT / name).rglob("*") for name in folders)]
    for path in (
        path
        for place in places
        for path in place
        if path.is_file() and path.suffix not in (".pyc", ".png")
    ):
        found = re.search(r"(?<![\w.])/(?:home|root|Users|work|tmp)/\w+", path.read_text())
        assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_the_front_matter_is_a_spaces():
    """By the keys and values that the Hub takes."""
    matter = yaml.safe_load((ROOT / "README.md").read_text().split("---\n")[1])
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert matter["sdk"] == "gradio" and (ROOT / matter["app_file"]).is_file() and matter["title"]
    assert {matter["colorFrom"], matter["colorTo"]} <= colors and len(
        matter["short_description"]
    ) <= 60
    assert matter["license"] == "apache-2.0" and len(matter["emoji"]) == 1


def test_the_space_pins_the_gradio_that_is_required():
    required = re.search(r"^gradio==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert f"sdk_version: {required}\n" in (ROOT / "README.md").read_text()


def test_the_reliability_table_has_every_case_once_and_names_tests_that_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    cases = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.M)]
    assert sorted(cases) == list(range(1, 61))
    existing = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    rows = [line for line in text.splitlines() if re.match(r"\| (\d+|[a-e]) \|", line)]
    for row in rows:
        proof = row.split("|")[-2].strip()
        assert {name.strip("`") for name in proof.split(", ")} <= existing, row


def test_requirements_are_above_the_floors_that_security_asks_for():
    floors = {
        "diffusers": (0, 42),
        "transformers": (5, 3),
        "torch": (2, 10),
        "gradio": (6, 31),
        "pillow": (12, 2),
    }
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    for name, floor in floors.items():
        assert tuple(map(int, pins[name].split(".")))[:2] >= floor, name
        installed = tuple(map(int, re.findall(r"\d+", importlib.metadata.version(name))))[:2]
        assert installed >= floor, name
