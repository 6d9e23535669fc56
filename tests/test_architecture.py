"""The house rules that a program can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_freeze

PACKAGE = Path(lightning_freeze.__file__).parent
TESTS = Path(__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("*.py"))

# values only
PURE = (
    "errors.py",
    "schedule/plan.py",
    "schedule/entries.py",
    "schedule/schedule.py",
    "schedule/stages.py",
    "schedule/conflicts.py",
    "schedule/freezing.py",
    "schedule/autofreeze.py",
)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE if PACKAGE in path.parents else TESTS).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def roots(tree: ast.AST) -> set[str]:
    return {module.split(".")[0] for module in imports(tree)}


def writes(tree: ast.AST, attribute: str) -> list[int]:
    """Lines that assign an attribute of anything, in whatever way Python has for it."""
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = list(node.targets)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        for target in targets:
            inside = ast.walk(target)
            if any(isinstance(n, ast.Attribute) and n.attr == attribute for n in inside):
                found.append(node.lineno)
        if isinstance(node, ast.Call):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else ""
            literal = [a.value for a in node.args if isinstance(a, ast.Constant)]
            by_name = isinstance(function, ast.Name) and function.id == "setattr"
            if called == f"{attribute}_" or (by_name and attribute in literal):
                found.append(node.lineno)
    return found


LIGHTNINGS = {"lightning", "pytorch_lightning", "lightning_fabric"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_one_file_of_the_callbacks_imports_lightning(path: Path) -> None:
    if name_of(path) != "callbacks/_lightning.py":
        assert not roots(tree_of(path)) & LIGHTNINGS
    if path.parent.name != "callbacks":
        assert "lightning_utilities" not in roots(tree_of(path))


def test_that_file_does_import_lightning_and_is_used() -> None:
    assert "lightning" in roots(tree_of(PACKAGE / "callbacks/_lightning.py"))
    module = "lightning_freeze.callbacks._lightning"
    assert len([path for path in SOURCES if module in imports(tree_of(path))]) >= 4


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_flags_room_writes_requires_grad(path: Path) -> None:
    if name_of(path) != "engine/flags.py":
        assert writes(tree_of(path), "requires_grad") == []


def test_the_flags_room_does_write_requires_grad() -> None:
    assert writes(tree_of(PACKAGE / "engine/flags.py"), "requires_grad")


@pytest.mark.parametrize(
    "code",
    [
        "p.requires_grad = True",
        "a, p.requires_grad = 1, True",
        "x = p.requires_grad = True",
        "p.requires_grad_(False)",
        "setattr(p, 'requires_grad', True)",
        "p.requires_grad |= True",
    ],
)
def test_the_search_for_writes_finds_each_way_to_write(code: str) -> None:
    assert writes(ast.parse(code), "requires_grad") == [1]
    assert writes(ast.parse("x = p.requires_grad"), "requires_grad") == []


@pytest.mark.parametrize("name", PURE)
def test_the_pure_modules_know_no_torch(name: str) -> None:
    assert not roots(tree_of(PACKAGE / name)) & {"torch", "lightning", "transformers"}


LIBRARIES = {"transformers", "timm", "torchvision"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_sources_of_models_import_a_model_library_and_only_inside_functions(
    path: Path,
) -> None:
    tree = tree_of(path)
    if name_of(path) == "model/load.py":
        assert not imported_at_the_top(tree) & LIBRARIES
    else:
        assert not roots(tree) & LIBRARIES


def imported_at_the_top(tree: ast.Module) -> set[str]:
    """What a file imports outside of its functions."""
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    found = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return {name for node in found if id(node) not in inside for name in roots_of(node)}


def roots_of(node: ast.stmt) -> set[str]:
    return roots(ast.Module([node], []))


def test_the_sources_of_models_do_import_them() -> None:
    assert roots(tree_of(PACKAGE / "model/load.py")) >= LIBRARIES
    code = "import timm\nif 1:\n    from torchvision import x\ndef f():\n    import transformers"
    assert imported_at_the_top(ast.parse(code)) == {"timm", "torchvision"}


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "helpers", "common", "misc")]


def has_match(call: ast.Call) -> bool:
    return any(keyword.arg == "match" for keyword in call.keywords)


def raises_calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if node.func.attr == "raises" and isinstance(owner, ast.Name) and owner.id == "pytest":
                yield node


@pytest.mark.parametrize("path", TEST_FILES, ids=name_of)
def test_every_raises_in_the_tests_says_what_it_matches(path: Path) -> None:
    assert [call.lineno for call in raises_calls(tree_of(path)) if not has_match(call)] == []


def test_the_search_for_raises_finds_one_without_match() -> None:
    bare, good = "with pytest.raises(ValueError): pass", "pytest.raises(E, match='x')"
    found = {call.lineno: has_match(call) for call in raises_calls(ast.parse(f"{bare}\n{good}"))}
    assert found == {1: False, 2: True}


@pytest.mark.parametrize("path", TEST_FILES, ids=name_of)
def test_no_two_tests_of_a_file_share_a_name(path: Path) -> None:
    names = [n.name for n in tree_of(path).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) == len(set(names))


def test_all_is_sorted_and_everything_in_it_is_there() -> None:
    listed = lightning_freeze.__all__
    assert listed == sorted(listed)
    assert len(listed) == len(set(listed))
    for name in listed:
        assert getattr(lightning_freeze, name).__doc__, name
    assert set(listed) <= set(dir(lightning_freeze))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ThawBackbone'"):
        _ = lightning_freeze.ThawBackbone


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in output.stdout.split()}


@pytest.mark.parametrize("name", ["freeze", "FreezeBackbone(), lightning_freeze.callbacks"])
def test_importing_the_package_loads_no_lightning_transformers_or_matplotlib(name: str) -> None:
    loaded = loaded_by(f"import lightning_freeze; lightning_freeze.{name}")
    assert "torch" in loaded
    assert not loaded & {*LIGHTNINGS, "transformers", "matplotlib", "rich"}


# lightning can't be imported beside a torchvision that lacks its operators (see conftest.py)
LIGHTNING = """
import torch
try:
    import torchvision
except ModuleNotFoundError:
    pass
except RuntimeError:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import lightning
"""
CALLBACKS = (
    "FreezeBackbone",
    "FrozenFeatureCache",
    "GradualFreeze",
    "GradualUnfreeze",
    "ReinitTopLayers",
    "TrainableParamAudit",
)


def test_importing_the_callbacks_loads_nothing_heavy_beside_lightning() -> None:
    names = ", ".join(CALLBACKS)
    alone = loaded_by(LIGHTNING)
    loaded = loaded_by(f"{LIGHTNING}\nfrom lightning_freeze import {names}") - alone
    assert {"lightning_freeze", "xxhash"} <= loaded
    assert not loaded & LIGHTNINGS
    heavy = {"jsonargparse", "transformers", "timm", "matplotlib", "rich", "yaml", "safetensors"}
    assert not loaded & heavy


def test_the_list_of_callbacks_is_whole() -> None:
    assert set(CALLBACKS) == set(lightning_freeze._CALLBACKS)


def test_every_error_is_a_freeze_error() -> None:
    from lightning_freeze import errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert len(kinds) >= 10
    assert all(issubclass(kind, errors.FreezeError) for kind in kinds)
    assert all(kind.__name__ in lightning_freeze.__all__ for kind in kinds)
    drawn = errors.__doc__ or ""
    assert all(kind.__name__ in drawn for kind in kinds)


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
