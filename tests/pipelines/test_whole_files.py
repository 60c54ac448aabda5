"""What a runner writes appears whole, or the older file stays."""

import numpy as np
import pytest
from limits import small_files

from mpqdm_fx.pipelines.picture_files import Pictures
from mpqdm_fx.pipelines.program_files import RunnerError
from mpqdm_fx.pipelines.sound_files import Sounds

CODES = np.random.default_rng(0).integers(0, 255, (64, 64, 3))
MEDIA = {
    "drawn.png": (Pictures([(64, 64)], {}), CODES.astype(np.uint8)),
    "heard.wav": (Sounds([(4096,)], {"sampling_rate": 8000}), CODES.reshape(-1, 3).astype("<i2")),
}


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("name", MEDIA)
def test_a_file_that_is_cut_short_does_not_appear(tmp_path, name, older):
    medium, codes = MEDIA[name]
    path = tmp_path / name
    if older:
        medium.write(codes[:8], path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with small_files(), pytest.raises(RunnerError, match=f"{path} cannot be written.*too large"):
        medium.write(codes, path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    medium.write(codes, path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", MEDIA)
def test_of_a_link_the_file_it_leads_to_is_written(tmp_path, name):
    medium, codes = MEDIA[name]
    (tmp_path / name).symlink_to(f"far-{name}")
    medium.write(codes, tmp_path / name)
    assert (tmp_path / name).is_symlink()
    assert (tmp_path / f"far-{name}").stat().st_size > 1000
