"""Relations between pixels: a divergence with a gradient, zero where the relations agree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.solve.relation import feature_distance, pixels, relation_divergence

SEEDS = st.integers(0, 2**20)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=SEEDS, temperature=st.floats(0.05, 2))
def test_divergence_is_never_negative_and_zero_for_rotated_features(seed, temperature):
    student, teacher = drawn(seed, 2, 6, 3, 4), drawn(seed + 1, 2, 6, 3, 4)
    assert relation_divergence(pixels(student), pixels(teacher), temperature) >= 0
    # cosines do not see a rotation of the channels, nor the length of a pixel's vector
    rotation, _ = torch.linalg.qr(drawn(seed + 2, 6, 6))
    turned = 3 * torch.einsum("ij,bjhw->bihw", rotation, teacher)
    same = relation_divergence(pixels(turned), pixels(teacher), temperature)
    assert abs(float(same)) < 1e-4


def test_divergence_is_that_of_the_formula():
    student, teacher = drawn(0, 1, 4, 2, 2), drawn(1, 1, 4, 2, 2)

    def relations(feature):
        rows = torch.nn.functional.normalize(feature[0].flatten(1).T, dim=1)
        return torch.softmax(rows @ rows.T / 0.1, dim=1)

    p, q = relations(teacher), relations(student)
    expected = (p * (p / q).log()).sum() / 4
    divergence = relation_divergence(pixels(student), pixels(teacher), 0.1)
    assert torch.allclose(divergence, expected, rtol=1e-4)


def test_gradient_reaches_the_student_and_never_the_teacher():
    student = drawn(0, 2, 4, 3, 3).requires_grad_()
    teacher = drawn(1, 2, 4, 3, 3).requires_grad_()
    memory = pixels(drawn(2, 1, 4, 5, 1))[0].requires_grad_()
    loss = relation_divergence(pixels(student), pixels(teacher), 0.1)
    loss = loss + relation_divergence(pixels(student), pixels(teacher), 0.1, memory)
    (loss + feature_distance(student, teacher)).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert memory.grad is None


def test_chosen_pixels_are_those_of_the_index():
    feature = drawn(0, 2, 4, 3, 5)
    index = torch.tensor([0, 7, 14])
    assert torch.equal(pixels(feature, index), pixels(feature)[:, index])
    tokens = feature.flatten(2).transpose(1, 2)
    assert torch.equal(pixels(tokens), pixels(feature))


def test_wrong_ranks_and_temperatures_are_refused():
    with pytest.raises(ConfigError, match="features"):
        pixels(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="temperature"):
        relation_divergence(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), 0.0)
