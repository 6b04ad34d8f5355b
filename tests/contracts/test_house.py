"""The house is kept: imports run one way, functions stay short, the public face is enough."""

from __future__ import annotations

import ast
import inspect
import json
import re
import typing
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

import cloister

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "cloister": ROOT / "sdk/cloister", "cloister_jupyter": ROOT / "jupyter_ext/cloister_jupyter",
    "cloister_kernels": ROOT / "kernels/cloister_kernels",
}
MOST_LINES, MOST_ARGUMENTS = 60, 8
PLAIN_LISTS = {"cloister.cli._parser"}  # of a command line's arguments


def modules() -> dict[str, ast.Module]:
    """Every module of ours by its name, parsed."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text("utf-8"))
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules of ours that `name` imports, for types or not, anywhere in it."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES) - {name}


def test_no_two_modules_import_each_other() -> None:
    graph = {name: imports(name) for name in MODULES}
    circles = {
        tuple(sorted((one, other))) for one, others in graph.items() for other in others
        if one in graph[other]
    }
    assert circles == set()


def test_a_private_module_is_imported_inside_its_package_only() -> None:
    outside = [
        (name, other) for name in MODULES for other in imports(name)
        if other.rpartition(".")[2].startswith("_")
        and not name.startswith(other.rpartition(".")[0])
    ]
    assert outside == []


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return [
        (f"{name}.{node.name}", node) for name, module in MODULES.items()
        for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_no_function_is_long_but_a_plain_list() -> None:
    long = {
        name: node.end_lineno - node.lineno + 1 for name, node in functions()
        if node.end_lineno - node.lineno + 1 > MOST_LINES and name not in PLAIN_LISTS
    }
    assert long == {}


def test_no_function_is_wide() -> None:
    wide = {}
    for name, node in functions():
        arguments = [each.arg for each in (
            *node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        # Whatever may take long is given its progress, too.
        count = len([each for each in arguments if each not in ("self", "cls", "progress")])
        if count > MOST_ARGUMENTS:
            wide[name] = count
    assert wide == {}


def test_the_public_names_are_sorted_documented_and_typed() -> None:
    assert cloister.__all__ == sorted(cloister.__all__)
    assert dir(cloister) == cloister.__all__
    for name in cloister.__all__:
        value = getattr(cloister, name)
        assert value.__doc__, name
        assert value.__module__.startswith("cloister"), name
        callables = [value] if inspect.isfunction(value) else [
            each for key, each in vars(value).items()
            if inspect.isfunction(each) and not key.startswith("_")
        ]
        for each in callables:
            assert each.__doc__, (name, each)
            signature = inspect.signature(each)
            assert signature.return_annotation is not inspect.Signature.empty, (name, each)
            for parameter in signature.parameters.values():
                if parameter.name not in ("self", "cls"):
                    assert parameter.annotation is not inspect.Parameter.empty, (name, each)
    with pytest.raises(AttributeError):
        cloister.surprise  # noqa: B018


def test_what_is_typed_at_the_face_can_be_had_when_it_runs() -> None:
    """The lazy names and those that type checkers see are the same."""
    tree = MODULES["cloister"]
    seen = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.If)
        for line in node.body if isinstance(line, ast.ImportFrom) for alias in line.names
    }
    assert seen == set(cloister.__all__)
    assert typing.TYPE_CHECKING is False


transform = TransformerManager().transform_cell  # `!` and `%` are no Python


def taught() -> dict[str, str]:
    """The Python that people read first, by where it stands."""
    found = {}
    readme = (ROOT / "README.md").read_text("utf-8")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)):
        found[f"README {number}"] = block
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        found[path.name] = "\n".join(
            transform("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code")
    return found


@pytest.mark.parametrize("place", taught())
def test_readme_and_notebooks_need_the_public_face_only(place: str) -> None:
    for node in ast.walk(ast.parse(taught()[place])):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("cloister"):
            assert node.module in PACKAGES, ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert not [each.name for each in node.names if each.name.startswith("cloister.")]
