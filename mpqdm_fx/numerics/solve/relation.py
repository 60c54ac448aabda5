"""How pixels of a feature map relate to one another, and how two such patterns differ.

Time-smoothed relation distillation (TRD, MPQ-DM, arXiv 2412.11549): features of consecutive
denoising steps are averaged, each pixel's channels normalised, and the softmax of a pixel's
similarities to all others is compared between teacher and student. Its memory variant (MTRD,
MPQ-DMv2, arXiv 2507.04290) compares the similarities to a queue of the teacher's pixels instead.
The papers' released code takes no gradient through the student's features; here it does.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.errors import ConfigError

__all__ = ["feature_distance", "pixels", "relation_divergence"]


def pixels(feature: Tensor, index: Tensor | None = None) -> Tensor:
    """Unit vectors of a feature map's pixels.

    Args:
        feature: [B, C, H, W], or tokens [B, N, C].
        index: Which pixels to keep, int64 [P]; None keeps all.

    Returns:
        float32 [B, P, C], each row of length 1 (or 0, if the pixel is).

    Raises:
        ConfigError: The feature has another rank.
    """
    if feature.ndim == 4:
        rows = feature.flatten(2).transpose(1, 2)
    elif feature.ndim == 3:
        rows = feature
    else:
        raise ConfigError(
            f"a relation needs features [B, C, H, W] or [B, N, C], not {tuple(feature.shape)}"
        )
    if index is not None:
        rows = rows[:, index]
    return functional.normalize(rows.float(), dim=-1)


def relation_divergence(
    student: Tensor, teacher: Tensor, temperature: float, memory: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence of the student's relations from the teacher's, mean over rows.

    Args:
        student: Unit pixels [B, P, C].
        teacher: Unit pixels of the same places; constant.
        temperature: Similarities are divided by it before the softmax, positive.
        memory: Unit pixels [M, C] to compare with; None compares pixels of one image with each
            other, the student's with the student's and the teacher's with the teacher's.

    Returns:
        A number, at least 0; 0 for equal relations.

    Raises:
        ConfigError: `temperature` is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature!r}: give a positive number")
    teacher = teacher.detach()
    if memory is None:
        student_map, teacher_map = student @ student.mT, teacher @ teacher.mT
    else:
        student_map, teacher_map = student @ memory.detach().mT, teacher @ memory.detach().mT
    log_student = (student_map / temperature).log_softmax(-1)
    log_teacher = (teacher_map / temperature).log_softmax(-1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.sum(-1).mean()


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of features as a share of the teacher's energy (BitsFusion's control term).

    Args:
        student: Any shape.
        teacher: The same shape; constant.
    """
    teacher = teacher.detach()
    energy = teacher.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (student - teacher).square().mean() / energy
