import pytest
import torch
from PIL import Image

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.report.images import save_grid


def test_grid_shows_each_image_in_its_cell(tmp_path):
    images = torch.stack([torch.full((1, 2, 3), value) for value in (-1.0, 0.0, 1.0)])
    path = save_grid(images, tmp_path / "deep" / "grid.png", columns=2, zoom=1)
    picture = Image.open(path)
    assert picture.size == (2 * (3 + 1) + 1, 2 * (2 + 1) + 1)
    assert [picture.getpixel(at) for at in ((1, 1), (5, 1), (1, 4))] == [0, 128, 255]
    assert picture.getpixel((5, 4)) == picture.getpixel((0, 0))  # the empty cell is background


def test_values_outside_the_range_are_clipped_and_colours_kept(tmp_path):
    image = torch.tensor([5.0, -5.0, 0.0]).reshape(1, 3, 1, 1)
    picture = Image.open(save_grid(image, tmp_path / "grid.png", zoom=1))
    assert picture.getpixel((1, 1)) == (255, 0, 128)


def test_writing_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "grid.png"
    save_grid(torch.zeros(1, 1, 2, 2), path)
    save_grid(torch.zeros(4, 1, 2, 2), path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (2, 2, 2, 2), (2, 2)])
def test_what_is_no_image_is_refused(tmp_path, shape):
    with pytest.raises(ConfigError, match="save_grid"):
        save_grid(torch.zeros(shape), tmp_path / "grid.png")
