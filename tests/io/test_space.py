"""A disk that does not hold what is known to be written is refused; of a link, both may."""

import shutil

import pytest

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.space import check_space, free_bytes, lack_of_space


def test_of_a_link_both_disks_may_take_the_result(tmp_path, monkeypatch):
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "out").symlink_to(tmp_path / "large" / "out")
    used, small = shutil.disk_usage(tmp_path), tmp_path / "small"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: used._replace(free=0 if path == small else 100)
    )
    check_space(small / "out", 100)
    with pytest.raises(ConfigError, match=r"\(101 and 100 bytes\); free some"):
        check_space(small / "out", 101)


def test_the_space_that_there_is_suffices(tmp_path):
    check_space(tmp_path / "a" / "b", 1)
    with pytest.raises(ConfigError, match=r"has .* MiB left"):
        check_space(tmp_path / "a" / "b", 2**62)


def test_what_is_needed_and_free_is_said_in_bytes_too(tmp_path):
    free = free_bytes(tmp_path / "out")
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)
    assert lack_of_space(tmp_path / "out", 1) is None
    assert f"({2**62} and " in lack_of_space(tmp_path / "out", 2**62)
