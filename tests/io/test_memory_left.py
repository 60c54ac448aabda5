"""What is left of memory is told by the machine or by the container, whichever has less."""

import subprocess
import sys

import pytest

from mpqdm_fx.io import allocator, memory
from mpqdm_fx.io.allocator import large_blocks_returned
from mpqdm_fx.io.memory import available_memory


@pytest.fixture
def told(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    return tmp_path


def test_the_machine_tells(told):
    assert available_memory() == 50 * 1024
    (told / "memory.max").write_text("max\n")
    assert available_memory() == 50 * 1024


def test_a_container_may_have_less_and_pages_of_files_do_not_count(told):
    (told / "memory.max").write_text("30000\n")
    (told / "memory.current").write_text("25000\n")
    (told / "memory.stat").write_text("anon 5000\nfile 20000\n")
    assert available_memory() == 25000


def test_where_nothing_is_told_nothing_is_known(told):
    (told / "meminfo").unlink()
    assert available_memory() is None


@pytest.mark.parametrize("wanted", [True, False])
def test_memory_is_usable_in_the_block_and_behind_it(wanted):
    with large_blocks_returned(wanted):
        block = bytearray(3 << 20)
    block[-1] = 7
    assert len(block) == 3 << 20
    assert block[-1] == 7


_FAULTS = """
import resource, sys
import torch
from mpqdm_fx.io.allocator import freed_memory_kept, large_blocks_returned

with large_blocks_returned(sys.argv[1] == "returned"), freed_memory_kept():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):  # tensors of 16 MiB, made and dropped, eight at a time
        tensors = [torch.ones(1 << 22) for _ in range(8)]
        del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(allocator._glibc() is None, reason="another C library")
def test_freed_memory_is_kept_for_what_comes_next_unless_it_has_to_be_returned():
    # processes of their own: what was in a heap before changes the counts
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", _FAULTS, how], text=True))
        for how in ("kept", "returned")
    )
    assert kept < returned / 4
