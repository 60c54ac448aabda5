import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.digits.dataset import load_digits_split, shift_randomly


def test_held_out_digits_are_stratified_and_in_no_training_set():
    split = load_digits_split()
    assert split.held_out_labels.bincount().tolist() == [36] * 10
    assert len(split.train_labels) + len(split.held_out_labels) == 1797
    assert len(split.held_out_indices.unique()) == 360
    distances = torch.cdist(split.held_out_images.flatten(1), split.train_images.flatten(1))
    assert distances.amin() > 0.1  # load_digits holds no duplicates across the split


def test_split_is_the_same_at_every_call_whatever_the_global_seed():
    torch.manual_seed(1)
    first = load_digits_split()
    torch.manual_seed(2)
    second = load_digits_split()
    assert torch.equal(first.held_out_indices, second.held_out_indices)
    assert torch.equal(first.train_images, second.train_images)


def test_images_are_16_by_16_within_minus_one_and_one():
    split = load_digits_split()
    assert split.train_images.shape == (1437, 1, 16, 16)
    assert split.train_images.amin() == -1
    assert split.train_images.amax() == 1


@given(seed=st.integers(0, 2**31), count=st.integers(1, 5))
def test_every_shifted_image_is_one_of_the_nine_shifts(seed, count):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 6, 5, generator=generator) * 2 - 1
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    shifted = shift_randomly(images, generator)
    assert shifted.shape == images.shape
    for index in range(count):
        candidates = [
            padded[index, :, down : down + 6, right : right + 5]
            for down in range(3)
            for right in range(3)
        ]
        assert any(torch.equal(shifted[index], candidate) for candidate in candidates)
