"""Who may import whom: the rooms of the house and the floors they stand on."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "app": 5,
    "train_text2img": 5,
    "cli": 4,
    **dict.fromkeys(("evaluation", "serving"), 3),
    **dict.fromkeys(("training", "search", "hub"), 2),
    **dict.fromkeys(("data", "models"), 1),
    **dict.fromkeys(("config", "randomness", "hardware", "runs", "diffusion"), 0),
}
# `pipeline` itself names the public classes and the commands, which it imports on use.
FRONT_DOORS = ("pipeline/__init__.py", "pipeline/__main__.py")


def module_name(path: Path) -> str:
    """Return the dotted name of a file: pipeline.data.sources, app."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for path in sorted(
        [*ROOT.glob("pipeline/**/*.py"), ROOT / "app.py", ROOT / "train_text2img.py"]
    )
    if path.relative_to(ROOT).as_posix() not in FRONT_DOORS
}


def room(module: str) -> str:
    """Return the folder, or the single file, that a module lies in."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" else parts[0]


def imports(module: str) -> set[str]:
    """Return our modules that a file imports anywhere in it, by statement or by importlib."""
    path = FILES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            named |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return (named & FILES.keys()) - {module}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down_or_stay_in_their_folder(module):
    own = room(module)
    wrong = {
        name for name in imports(module) if room(name) != own and FLOORS[room(name)] >= FLOORS[own]
    }
    assert not wrong


def test_imports_form_no_circle():
    graph = {module: imports(module) for module in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_diffusion_imports_siblings_by_relative_names():
    """diffusers finds the files that travel by `from .name import`, and follows no other form."""
    for path in ROOT.glob("pipeline/diffusion/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, path
                assert not node.level or (node.module and "." not in node.module), path
                assert not (node.module or "").startswith("pipeline"), path
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("pipeline") for alias in node.names), path


def test_every_room_stands_on_a_floor():
    assert {room(module) for module in FILES if module != "pipeline"} == FLOORS.keys()
