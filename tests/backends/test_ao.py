"""One module talks to torch.ao and torchao; it keeps quiet about what is known, and only that."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import mpqdm_fx
from mpqdm_fx.backends import ao

PACKAGE = Path(mpqdm_fx.__file__).parent
DOOR = PACKAGE / "backends" / "ao.py"


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_quantization_stack(name: str) -> bool:
    return name.startswith(("torch.ao", "torchao"))


def type_checking_only(path: Path) -> set[str]:
    """Names imported under `if TYPE_CHECKING`: annotations, never loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    nodes = [inner for block in blocks for inner in ast.walk(block)]
    return {f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


def test_no_other_module_of_the_package_imports_torch_ao_or_torchao():
    files = [path for path in PACKAGE.rglob("*.py") if path != DOOR]
    offenders = {
        str(path.relative_to(PACKAGE)): names
        for path in files
        if (
            names := {
                name
                for name in imported_modules(path) - type_checking_only(path)
                if is_quantization_stack(name)
            }
        )
    }
    assert files
    assert not offenders
    assert any(is_quantization_stack(name) for name in imported_modules(DOOR))


def test_importing_the_door_loads_no_torchao_and_its_names_come_without_noise():
    program = (
        "import sys, mpqdm_fx.backends.ao as ao\n"
        "assert 'torchao' not in sys.modules\n"
        "assert ao.Quantizer.__name__ == 'Quantizer' and ao.prepare_pt2e and ao.convert_pt2e\n"
        "assert 'torchao' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ao.no_such_name


def test_quiet_holds_back_the_known_warnings_and_no_others():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with ao.quiet():
            warnings.warn(
                "torch.ao.quantization is deprecated and ...", DeprecationWarning, stacklevel=1
            )
            warnings.warn("something else is wrong", UserWarning, stacklevel=1)
        warnings.warn("torch.ao.quantization is deprecated again", DeprecationWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == [
        "something else is wrong",
        "torch.ao.quantization is deprecated again",
    ]


def test_engine_is_selected_for_the_block_only_whatever_happens():
    before = torch.backends.quantized.engine
    with ao.quantized_engine("fbgemm"):
        assert torch.backends.quantized.engine == "fbgemm"
    with pytest.raises(ValueError, match="inside"), ao.quantized_engine("qnnpack"):
        raise ValueError("inside")
    assert torch.backends.quantized.engine == before
