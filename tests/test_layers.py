"""The architecture's layers: a file imports only from rows above its own.

"Above" is earlier in `ROWS`. Files of one folder may import each other, except passes, which never
do. Imports inside functions run later but couple just as much, so each is listed with its reason.
"""

import re
import sys
from pathlib import Path

import pytest
from source_tree import imports, modules

ROWS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        [
            {"errors"},
            {"io", "numerics"},
            {"records"},  # what was asked and decided
            {"graph"},
            {"passes.base"},
            {"capture", "run", "passes"},
            {"calibration", "split"},
            {"bits"},
            {"sweep"},
            {"model"},  # what quantizing returns; backends and reports read it
            {"backends", "distill", "report", "digits"},
            {"component", "sources"},
            {"api"},
            {"parity", "pipelines"},  # one model in all its forms; several models
            {"jobs"},  # what a command does, as functions
            {"cli", "testing", "exports"},
            {"__init__"},
            {"__main__"},
        ],
    )
)

#: Files that are copied into exported folders: they run where this package is not installed.
COPIED = {
    "mpqdm_fx.pipelines.runner",
    "mpqdm_fx.pipelines.program_files",
    "mpqdm_fx.pipelines.medium",
    "mpqdm_fx.pipelines.picture_files",
    "mpqdm_fx.pipelines.sound_files",
    "mpqdm_fx.io.expansion",
    "mpqdm_fx.io.sealed",
    "mpqdm_fx.io.classes",
    "mpqdm_fx.backends.kernel_library",
    "mpqdm_fx.calibration.conventions",
    "mpqdm_fx.calibration.schedules",
    "mpqdm_fx.errors",
    *(name for name in modules() if name.startswith("mpqdm_fx.pipelines.loops.")),
}

#: (importer, imported package or module) of imports inside functions, and why they are there.
LAZY = {
    ("graph.qdq", "backends.ao"): "importing torch.ao registers the quantized_decomposed ops, and "
    "one module holds all torch.ao imports",
    ("backends.lower", "backends"): "executorch and torch.ao are loaded only by those who lower to "
    "them",
    ("pipelines.programs", "backends"): "the same: `import mpqdm_fx` brings export_pipeline",
    ("parity.verify", "backends"): "the same, and `import mpqdm_fx` brings verify",
    ("sources.denoisers", "backends"): "executorch is loaded only where a .pte is run",
    ("__init__", "exports"): "`mpqdm-fx --help` answers, and signals are handled, before torch is "
    "loaded",
    ("__init__", "io.versions"): "and `mpqdm-fx --version` too",
    ("cli", ""): "`mpqdm-fx --help` answers without loading torch",
}


def _short(module: str) -> str:
    return module.removeprefix("mpqdm_fx").removeprefix(".") or "__init__"


def _package(module: str) -> str:
    return _short(module).partition(".")[0]


def _row(module: str) -> int:
    own = _short(module)
    rows = [index for index, row in enumerate(ROWS) if own in row]
    rows = rows or [index for index, row in enumerate(ROWS) if _package(module) in row]
    assert rows, f"{module} is in no row of the architecture: give it one in tests/test_layers.py"
    return rows[0]


def test_the_table_of_the_design_has_the_same_packages_in_the_same_order():
    text = (Path(__file__).parents[1] / "DESIGN.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    told = [name for line in table for name in re.findall(r"`([\w.]+)`", line)]
    assert sorted(told) == sorted(name for row in ROWS for name in row)
    rows = [next(index for index, row in enumerate(ROWS) if name in row) for name in told]
    assert rows == sorted(rows)


def _own(lazy: bool):
    return [i for i in imports() if i.lazy is lazy and i.imported.startswith("mpqdm_fx")]


@pytest.mark.parametrize("module", modules())
def test_every_module_has_a_row(module):
    _row(module)


def test_there_are_imports_to_judge():
    assert len(_own(lazy=False)) > 50
    assert len(_own(lazy=True)) > 3


def test_imports_come_from_rows_above_or_the_same_folder():
    wrong = [
        f"{i.importer}:{i.line} imports {i.imported}"
        for i in _own(lazy=False)
        if _row(i.imported) >= _row(i.importer) and _package(i.importer) != _package(i.imported)
    ]
    assert not wrong


def _is_pass(module: str) -> bool:
    package, _, name = module.rpartition(".")
    own = module in modules() and ".passes" in package
    return own and name not in ("base", "pipelines", "registry") and modules()[module].stem == name


def test_no_modules_import_one_another_in_a_circle():
    waiting = {name: {i.imported for i in _own(False) if i.importer == name} for name in modules()}
    for needs in waiting.values():
        needs &= waiting.keys()
    while free := [name for name, needs in waiting.items() if not needs]:
        for name in free:
            del waiting[name]
        for needs in waiting.values():
            needs.difference_update(free)
    assert waiting == {}, f"circles among {sorted(waiting)}"


def test_passes_never_import_one_another():
    wrong = [
        f"{i.importer}:{i.line} imports {i.imported}"
        for i in imports()
        if _is_pass(i.importer) and _is_pass(i.imported)
    ]
    assert not wrong


def _reason(importer: str, imported: str) -> tuple[str, str] | None:
    for key in LAZY:
        belongs = key[0] in (_short(importer), _package(importer))
        if belongs and f"{_short(imported)}.".startswith(key[1]):
            return key
    return None


def test_every_import_inside_a_function_has_its_reason_and_every_reason_its_import():
    found = {(i.importer, i.imported, i.line): _reason(i.importer, i.imported) for i in _own(True)}
    unexplained = [f"{who}:{line} {what}" for (who, what, line), key in found.items() if not key]
    assert not unexplained
    assert set(LAZY) - set(found.values()) == set(), "reasons without an import"


def test_numerics_import_only_torch_and_the_standard_library():
    allowed = {"torch", *sys.stdlib_module_names}
    wrong = {
        (i.importer, i.imported)
        for i in imports()
        if _package(i.importer) == "numerics"
        and i.imported.partition(".")[0] not in allowed
        and not i.imported.startswith(("mpqdm_fx.numerics", "mpqdm_fx.errors"))
    }
    assert not wrong


def test_one_module_holds_all_imports_of_torch_ao():
    holders = {i.importer for i in imports() if i.imported.startswith(("torch.ao", "torchao"))}
    assert holders == {"mpqdm_fx.backends.ao"}


def test_only_backends_import_executorch():
    holders = {i.importer for i in imports() if i.imported.partition(".")[0] == "executorch"}
    assert all(_package(holder) == "backends" or holder in COPIED for holder in holders)


def test_the_files_of_exported_folders_import_nothing_of_the_package_but_each_other():
    own = {i.imported for i in imports() if i.importer in COPIED}
    assert {name for name in own if name.startswith("mpqdm_fx")} <= COPIED


def test_hypothesis_stays_in_the_testing_package():
    holders = {i.importer for i in imports() if i.imported.partition(".")[0] == "hypothesis"}
    assert holders
    assert all(_package(holder) == "testing" for holder in holders)
