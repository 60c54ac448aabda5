import pytest
import torch
from PIL import Image

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.report.images import save_grid, save_rows


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


def test_rows_stand_one_below_the_other_in_the_same_columns(tmp_path):
    rows = [
        ("float", torch.full((3, 1, 64, 64), -1.0)),
        ("quantized", torch.full((3, 1, 64, 64), 1.0)),
    ]
    picture = Image.open(save_rows(rows, tmp_path / "rows.png", columns=2))
    left = picture.width - 8 - 65  # the middle of the last of two columns
    column = [picture.getpixel((left + 32, y)) for y in range(picture.height)]
    assert column.count(0) == 64
    assert column.count(255) >= 64
    assert column.index(0) < len(column) - 1 - column[::-1].index(255)
    assert picture.height > 4 * 64  # the third image has a block of its own
    # labels are written left of the images, in both rows
    dark = [y for y in range(8, 8 + 2 * 66) for x in range(8, 70) if picture.getpixel((x, y)) < 128]
    assert min(dark) < 8 + 66 < max(dark)


def test_rows_of_other_shapes_are_refused(tmp_path):
    rows = [("float", torch.zeros(2, 1, 4, 4)), ("quantized", torch.zeros(3, 1, 4, 4))]
    with pytest.raises(ConfigError, match="quantized has"):
        save_rows(rows, tmp_path / "rows.png")


@pytest.mark.parametrize(("side", "shown"), [(8, 64), (16, 64), (64, 64), (128, 128)])
def test_small_images_are_enlarged_and_large_ones_left(tmp_path, side, shown):
    rows = [("float", torch.zeros(1, 1, side, side))]
    picture = Image.open(save_rows(rows, tmp_path / "rows.png"))
    row = [picture.getpixel((x, picture.height // 2)) for x in range(picture.width)]
    assert row.count(128) == shown
