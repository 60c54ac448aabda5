"""What is public is documented, and what is declared exists."""

import ast
import importlib
import inspect

import pytest
from source_tree import modules, tree

import mpqdm_fx


def _public_definitions(node: ast.AST, prefix: str = ""):
    """Yield (name, node) of public classes, functions and methods."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not child.name.startswith("_"):
                yield prefix + child.name, child
                if isinstance(child, ast.ClassDef):
                    yield from _public_definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _public_definitions(child, prefix)


@pytest.mark.parametrize("module", modules())
def test_every_module_says_what_it_is_for(module):
    docstring = ast.get_docstring(tree(module))
    assert docstring, f"{module} has no docstring"
    first = docstring.splitlines()[0]
    assert first.endswith((".", ":", "?")), f"{module}: the first line is no sentence: {first!r}"


@pytest.mark.parametrize("module", modules())
def test_every_public_name_is_documented(module):
    undocumented = [
        name
        for name, node in _public_definitions(tree(module))
        if not (ast.get_docstring(node) or _is_override(module, name) or _is_overload(node))
    ]
    assert not undocumented, f"{module}: no docstring on {undocumented}"


def _is_overload(node: ast.AST) -> bool:
    """Tell whether a function is a signature alone; what it does stands at the one behind it."""
    return any(ast.unparse(entry) == "overload" for entry in getattr(node, "decorator_list", ()))


def _is_override(module: str, name: str) -> bool:
    """Tell whether a method has its documentation from a base class."""
    owner, _, method = name.rpartition(".")
    if not owner:
        return False
    value = importlib.import_module(module)
    for part in owner.split("."):
        value = getattr(value, part)
    return any(getattr(getattr(base, method, None), "__doc__", None) for base in value.__mro__[1:])


@pytest.mark.parametrize("module", [m for m in modules() if not m.endswith("__main__")])
def test_every_declared_name_exists(module):
    loaded = importlib.import_module(module)
    missing = [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)]
    assert not missing


def test_the_front_door_is_short_and_complete():
    source = inspect.getsource(mpqdm_fx)
    assert len(source.splitlines()) <= 60
    verbs = {"trace", "prepare", "convert", "lower", "quantize", "save", "load", "MPQConfig"}
    assert verbs <= set(mpqdm_fx.__all__)
    assert list(mpqdm_fx.__all__) == sorted(mpqdm_fx.__all__)


@pytest.mark.parametrize("name", mpqdm_fx.__all__)
def test_every_public_name_of_the_package_is_documented(name):
    docstring = inspect.getdoc(getattr(mpqdm_fx, name))
    assert docstring
    # dataclasses without a docstring get their signature as one
    assert not docstring.startswith(f"{name}(")


@pytest.mark.parametrize("module", modules())
def test_the_library_never_prints(module):
    calls = [
        node.lineno
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "sys.stdout.write"}
    ]
    if module == "mpqdm_fx.cli.streams":  # where the results of commands go through
        assert len(calls) == 1
        return
    assert not calls, f"{module} prints in lines {calls}; use logging"


def test_pass_classes_and_files_have_matching_names():
    from laws import discover_passes

    from mpqdm_fx.passes import name_of

    for cls in discover_passes():
        assert cls.__module__.rpartition(".")[2] == name_of(cls).replace("-", "_")
