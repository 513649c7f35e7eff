"""Imports between the pack's folders run one way, and no two files import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each room may import from those named behind it; core.py and files/ stand under all of them.
ROOMS = {
    "files": (),
    "core": (),
    "remap": ("files", "fp8"),
    "fp8": ("files", "core"),
    "scene": ("files", "core", "fp8"),
    "worldstereo": ("files", "core", "remap", "fp8", "scene"),
    "loaders": ("files", "core", "remap", "fp8", "scene", "worldstereo"),
    "comfy_nodes": ("files", "core", "remap", "fp8", "scene", "worldstereo", "loaders"),
    "nodes": ("files", "core", "comfy_nodes"),
}


def room_of(module: str) -> str:
    return module.split(".")[0]


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """The pack's modules that a file imports when it is imported itself, by their names from the pack's root."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            for name in node.names:
                path = [*base, *(node.module.split(".") if node.module else []), name.name]
                while path and not (ROOT.joinpath(*path).with_suffix(".py").is_file() or ROOT.joinpath(*path).is_dir()):
                    path.pop()
                if path:
                    found.add(".".join(path))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_those_under_it(room):
    for file in files_of(room):
        for module in imports_of(file):
            assert room_of(module) in (room, *ROOMS[room]), f"{module_of(file)} imports {module}"


def test_no_file_imports_one_that_imports_it():
    graph = {module_of(file): imports_of(file) for room in ROOMS for file in files_of(room)}
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' → '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for other in graph.get(module, ()):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_the_check_itself_sees_imports():
    assert "scene.cameras" in imports_of(ROOT / "worldstereo" / "conditioning.py")
    assert "files.text" in imports_of(ROOT / "files" / "regular.py")


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "core"])
def test_public_functions_have_type_hints_and_say_what_they_do(room):
    for file in files_of(room):
        for function in ast.parse(file.read_text("utf-8")).body:
            if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
                continue
            where = f"{module_of(file)}.{function.name}"
            arguments = [*function.args.args, *function.args.kwonlyargs]
            missing = [argument.arg for argument in arguments if argument.annotation is None]
            assert not missing and function.returns is not None, (
                f"{where} has no type hint for {missing or 'its result'}"
            )
            assert ast.get_docstring(function), f"{where} has no docstring"


def test_one_module_makes_the_checkout_importable():
    """For the tests, the benchmarks, the demo and the command line alike."""
    others = [path for path in ROOT.rglob("*.py") if ".dev" not in path.parts and path != Path(__file__)]
    found = [path.name for path in others if "submodule_search_locations" in path.read_text("utf-8")]
    assert found == ["standalone.py"]
