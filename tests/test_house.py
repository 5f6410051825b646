"""The house's rules, read off the source: imports point up, `__all__` is true, imports are cheap."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "shoestring"

# From the ground up; a room imports only from the rooms before it.
ROOMS = [
    "errors", "units", "hub", "quantization", "engine", "decoding", "streaming",
    "generation", "model", "inside_transformers",
    "evaluation", "training",
    "fastff", "transformer", "vision", "finetuning", "grounding",
    "audit", "serving", "learn", "cli",
]  # fmt: skip
CAPABILITIES = {"fastff", "transformer", "vision", "finetuning", "grounding"}
ENTRANCES = {"__init__", "__main__"}
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse((SOURCE / path).read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "shoestring":
                names = [f"shoestring.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("shoestring.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_up(path: Path) -> None:
    room = room_of(path)
    if room in ENTRANCES:
        return
    assert room in ROOMS, f"{room} has no place in the house"
    for other in imported_rooms(path) - {room, "_native", "__version__"}:
        assert ROOMS.index(other) < ROOMS.index(room), f"{path} imports {other}, which lies below it"
        assert not {room, other} <= CAPABILITIES, f"{path} imports the capability {other}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__main__.py"], ids=str)
def test_all_names_exist(path: Path) -> None:
    parts = [part.removesuffix(".py") for part in path.parts if part != "__init__.py"]
    try:
        module = importlib.import_module(".".join(["shoestring", *parts]))
    except ModuleNotFoundError as error:
        if error.name != "triton":  # kernels' modules alone may need it
            raise
        pytest.skip("Triton is not installed")
    names = getattr(module, "__all__", [])
    for name in names:
        assert hasattr(module, name), f"{path}: __all__ names {name}, which is not there"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_files_fit_in_the_head(path: Path) -> None:
    lines = (SOURCE / path).read_text().count("\n")
    assert lines <= 450, f"{path} has {lines} lines"
    assert ast.get_docstring(ast.parse((SOURCE / path).read_text())), f"{path} does not say what it is for"


def test_importing_is_cheap() -> None:
    program = (
        "import sys, time; began = time.perf_counter(); import shoestring; "
        "print(time.perf_counter() - began, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, torch, transformers = done.stdout.split()
    assert float(seconds) < 0.3
    assert (torch, transformers) == ("False", "False")
