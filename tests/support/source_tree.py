"""The package's source as syntax trees, for the tests of its architecture."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mpqdm_fx

ROOT = Path(mpqdm_fx.__file__).parent


@dataclass(frozen=True)
class Import:
    """One import: who, what, where, and whether it runs when the importer is imported."""

    importer: str
    imported: str
    line: int
    lazy: bool


@functools.cache
def modules() -> dict[str, Path]:
    """Map every module's dotted name to its file."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


@functools.cache
def tree(module: str) -> ast.Module:
    """Return a module's syntax tree."""
    return ast.parse(modules()[module].read_text())


@functools.cache
def imports() -> tuple[Import, ...]:
    """Return all imports of all modules; those under TYPE_CHECKING never run and are left out."""
    return tuple(entry for module in modules() for entry in _imports(module, tree(module), False))


def _imports(module: str, node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        for name in _imported(child):
            yield Import(module, name, child.lineno, lazy)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(module, child, lazy or inside)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        base = node.module or ""
        # `from package import module` imports the module, `from module import name` does not
        full = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in modules() else base for name in full]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("import_module", "__import__")
    ):
        return [a.value for a in node.args if isinstance(a, ast.Constant)]
    return []
