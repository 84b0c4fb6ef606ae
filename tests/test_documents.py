"""What the documents say is so: tables, links, commands, code."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_pipeline

from pipeline.__main__ import COMMANDS, main
from pipeline.config import DIFFUSERS_FLAGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("pretrained/**/*.md")]
TESTS = sorted(ROOT.glob("tests/**/test_*.py"))
SOURCES = sorted([*ROOT.glob("pipeline/**/*.py"), ROOT / "train_text2img.py", ROOT / "app.py"])


def definitions(path: Path) -> set[str]:
    """Return the names of all functions and classes in a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_equations_table_names_existing_functions_and_tests():
    table = (ROOT / "docs/equations.md").read_text().splitlines()
    rows = [line for line in table if line.startswith("| (")]
    numbers = {int(n) for row in rows for n in re.findall(r"^\| \((\d+)\)", row)}
    assert numbers == {*range(1, 20)}
    for row in rows:
        places = re.findall(r"`([\w/.]+\.py)::(\w+)`", row)
        assert len(places) == 2, row
        for file, name in places:
            assert name in definitions(ROOT / file), row


def test_readme_equations_name_existing_functions_and_tests():
    rows = re.findall(r"\| `(\w+)\.(\w+)` \| `(\w+)` \|", README)
    assert len(rows) == 4
    tests = {name for path in TESTS for name in definitions(path)}
    for module, function, test in rows:
        assert function in definitions(ROOT / f"pipeline/diffusion/{module}.py")
        assert test in tests


def test_reliability_table_names_every_case_and_existing_tests():
    text = (ROOT / "docs/reliability.md").read_text()
    cases = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.M)]
    assert sorted(cases) == list(range(1, 61))
    tests = {name for path in TESTS for name in definitions(path)}
    for row in re.findall(r"^\| (?:\d+|[a-e]) \|.*$", text, re.M):
        proof = row.split("|")[-2].strip()
        assert {name.strip("`") for name in proof.split(", ")} <= tests, row


def test_migrating_lists_the_flags_of_diffusers():
    rows = re.findall(r"^\| `--(\w+)` \| (.*) \|$", (ROOT / "docs/migrating.md").read_text(), re.M)
    assert dict(rows) == DIFFUSERS_FLAGS


def heading_anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(document):
    for target, anchor in re.findall(r"\]\(((?!\w+:)[^)#\s]*)#?([^)\s]*)\)", document.read_text()):
        place = document.parent / target if target else document
        assert place.exists(), target
        if anchor:
            assert anchor in heading_anchors(place)


def test_every_document_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    for document in ROOT.glob("docs/*.md"):
        assert document.name == "README.md" or f"]({document.name})" in index


def test_documents_name_existing_files_and_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        if document.name in ("lab-notes.md", "migrating.md"):
            continue  # which name what was
        text = document.read_text()
        for name in re.findall(r"`((?:pipeline|configs|tests|docs|examples)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), (document.name, name)
        for target in re.findall(r"`?make ([a-z-]+)\b", text):
            if document.name in ("README.md", "CONTRIBUTING.md", "install.md"):
                assert re.search(rf"^{target}:", makefile, re.M), (document.name, target)


def test_readme_python_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (model,) = re.findall(r'load_pipeline\("([^"]+)"', code)
    tiny_pipeline().save_pretrained(tmp_path / model, safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    exec(code + "print(image.size)", {"__name__": "__main__"})
    output = capsys.readouterr().out
    assert output.endswith("(8, 8)\n")
    assert output.count("torch.Size([1, 3, 8, 8])") == 2 * 50


@pytest.mark.parametrize("command", COMMANDS)
def test_main_prints_the_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code
    assert "usage:" in capsys.readouterr().out


def test_main_lists_its_commands_and_refuses_others(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {command} " in listed for command in COMMANDS)
    assert main(["smaple"]) == 2
    assert "smaple" in capsys.readouterr().err
    assert main([]) == 2


def test_documents_name_existing_commands():
    for document in DOCUMENTS:
        for command in re.findall(r"^direct-jump ([a-z]+)", document.read_text(), re.M):
            assert command in COMMANDS, document


def test_importing_the_package_imports_nothing_else():
    code = "import sys, pipeline; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_unpickle_and_evaluate_nothing(path):
    tree = ast.parse(path.read_text())
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        assert name not in ("eval", "exec", "yaml.load", "pickle.load", "pickle.loads")
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        assert ast.unparse(keywords.get("trust_remote_code", ast.Constant(False))) == "False"
    assert "import pickle" not in path.read_text()


@pytest.mark.parametrize(("version", "supported"), [((3, 10, 9), False), (None, True)])
def test_makefile_refuses_an_old_python(version, supported, tmp_path):
    """A stand-in for python3 answers with a version and creates no environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    patch = ""
    if version is not None:
        text = ".".join(map(str, version))
        patch = f"import sys; sys.version_info, sys.version = {version}, {text!r}; "
    python = tmp_path / "python3"
    check = f'[ "$1" = -c ] && exec {sys.executable} -c "{patch}$2"'
    python.write_text(f"#!/bin/sh\n{check}\nmkdir -p .venv/bin && touch .venv/bin/python\n")
    python.chmod(0o755)
    command = ["make", "PYTHON=./python3", ".venv/bin/python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == supported, done.stderr
    assert (tmp_path / ".venv").exists() == supported
    assert supported or "3.10.9" in done.stderr


def test_no_file_names_a_path_of_one_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.splitlines()]
    # Outside a git checkout every file of the tree counts.
    files = files or [p for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts]
    for path in files:
        if path.suffix in (".png", ".safetensors", ".pyc") or not path.is_file():
            continue
        found = re.search(r"(?<![\w.])/(?:home|root|Users|work|tmp)/\w+", path.read_text())
        assert not found, f"{path.relative_to(ROOT)}: {found}"
