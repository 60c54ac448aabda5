"""The documentation's pages: what they show runs, what they name is there."""

import ast
import contextlib
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
from kernel_package import kernels_installed
from typer.testing import CliRunner

import mpqdm_fx
from mpqdm_fx.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# a downloaded pipeline; tests/pipelines runs the same with a tiny one
ELSEWHERE = {"PIPELINE"}
# pages whose programs need the kernels' library
OWN_KERNELS = {"low_bit_kernels"}
# reports for other projects: their snippets are parts of programs
REPORTS = {"upstream.md"}
# what takes minutes on the page takes seconds here
SHORTER = {
    "quantize digits": "quantize digits --trajectories 4 --steps 4 --samples 4",
    "--budget 5m": "--updates 5",
    "--num 32": "--num 4",
    "seconds=300": "seconds=2",
}


def _blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(language, block) for language, block in found if language in languages]


def _commands(block: str) -> list[list[str]]:
    """The words after `mpqdm-fx` of each line that calls it."""
    lines = [line for line in block.splitlines() if "mpqdm-fx" in line]
    return [shlex.split(line.partition("mpqdm-fx ")[2]) for line in lines]


def _named(pages: list[Path]) -> list:
    return [pytest.param(page, id=page.relative_to(ROOT / "docs").as_posix()) for page in pages]


@pytest.mark.parametrize("page", _named([p for p in PAGES if _blocks(p, "python")]))
def test_the_python_of_a_page_compiles_and_imports_what_is_there(page):
    for _, block in _blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mpqdm_fx"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("page", _named([p for p in PAGES if _blocks(p, "bash")]))
def test_the_commands_of_a_page_have_the_options_that_it_types(page):
    group = typer.main.get_command(app)
    for _, block in _blocks(page, "bash"):
        for name, *words in _commands(block):
            command = group.commands[name]
            known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            typed = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert typed <= known, f"{name}: {sorted(typed - known)}"


def _shorter(block: str) -> str:
    for long, short in SHORTER.items():
        block = block.replace(long, short)
    return block


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The folder `out` that the tutorial begins with."""
    place = tmp_path_factory.mktemp("docs")
    block = _shorter("quantize digits --weights 4 --backend xnnpack")
    run = CliRunner().invoke(app, [*block.split(), "--output", str(place / "out")])
    assert run.exit_code == 0, run.output
    return place / "out"


@pytest.mark.matrix
@pytest.mark.xnnpack
@pytest.mark.parametrize(
    "page", _named([p for p in PAGES if _blocks(p, "python", "bash") and p.name not in REPORTS])
)
def test_every_block_of_a_page_runs_as_written(
    page, result, tmp_path, tmp_path_factory, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if page.stem != "tutorial":
        (tmp_path / "out").symlink_to(result, target_is_directory=True)
    kernels = tmp_path_factory.mktemp("kernels")
    with kernels_installed(kernels) if page.stem in OWN_KERNELS else contextlib.nullcontext():
        _run_blocks(page)


def _run_blocks(page):
    names: dict[str, object] = {}
    for language, block in _blocks(page, "python", "bash"):
        if language == "python":
            exec(compile(_shorter(block), str(page), "exec"), names)
            continue
        for words in _commands(_shorter(block)):
            if ELSEWHERE.isdisjoint(words):
                run = CliRunner().invoke(app, words)
                assert run.exit_code == 0, f"{' '.join(words)}\n{run.output}"


def test_the_menu_has_every_page_and_every_page_of_the_menu_is_there():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = set(re.findall(r"([\w/-]+\.md)", menu))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}


@pytest.mark.parametrize("page", _named(PAGES))
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.matrix
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="pip install -e '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    page = (tmp_path / "site" / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert "weight_bits" in page
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?:', page)


def test_the_page_of_commands_is_what_the_command_line_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    module = importlib.import_module("commands")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run tools/commands.py"


def test_the_tables_of_the_pages_are_those_of_the_measured_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    render = importlib.import_module("render")
    for page in render.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "<!-- rows: " in text
        assert render.rendered(text) == text, "run benchmarks/render.py"
    text = render.PAGES[0].read_text(encoding="utf-8")
    changed = text.replace("| W8A8 | rtn | 38", "| W8A8 | rtn | 39")
    assert render.rendered(changed) != changed


def test_the_reference_of_python_has_every_verb_where_it_is_written():
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    shown: set[str] = set()
    for section in text.split("\n::: ")[1:]:
        place, _, options = section.partition("\n")
        members = re.search(r"members: \[(.*)\]", options)
        names = members[1].split(", ") if members else []
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError:
            place, _, name = place.rpartition(".")
            module, names = importlib.import_module(place), [name]
        assert set(names) <= set(module.__all__), place
        shown |= set(names)
    verbs = {name for name in mpqdm_fx.__all__ if name.islower() and not name.startswith("_")}
    assert len(verbs) > 8
    assert verbs <= shown
