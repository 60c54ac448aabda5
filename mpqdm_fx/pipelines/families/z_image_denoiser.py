"""Z-Image's transformer as a program takes it: tensors of fixed shapes in the place of lists.

diffusers hands the transformer the tokens of a prompt, as many as there are, and the transformer
fills them up to a multiple of 32. Here a prompt has the rows of the longest one. Rows behind the
filled ones are masked wherever tokens are read, so what is predicted is the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mpqdm_fx.errors import ConfigError

__all__ = ["ZImageDenoiser"]

_PATCHES = "2-1"  # of two by two latents, of one picture: what the pipeline draws with
_PATCH = 2
_MULTIPLE = 32  # of tokens
_MASKED = -10000.0  # added to scores; its exponential is zero in float32


class ZImageDenoiser(nn.Module):
    """A `ZImageTransformer2DModel` with a batch axis; its layers have their own names.

    Args:
        model: The transformer, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        for name, child in model.named_children():
            self.add_module(name, child)
        self.x_pad_token = model.x_pad_token
        self.cap_pad_token = model.cap_pad_token
        places = model.rope_embedder
        tables = places.precompute_freqs_cis(places.axes_dims, places.axes_lens, places.theta)
        for axis, table in enumerate(tables):
            # real numbers: a program has no others
            self.register_buffer(f"cosines_{axis}", table.real.contiguous(), persistent=False)
            self.register_buffer(f"sines_{axis}", table.imag.contiguous(), persistent=False)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cap_feats: Tensor,
        cap_mask: Tensor,
        cap_attended: Tensor,
        attended: Tensor,
        start: Tensor,
    ) -> Tensor:
        """Predict the velocity, with the sign of Z-Image.

        Args:
            x: Latents, float [B, C, H, W].
            t: Times, 0 for noise and 1 for pictures, float [B].
            cap_feats: States of prompts, float [B, T, D].
            cap_mask: 1 where a row is of a prompt, else 0, float [B, T].
            cap_attended: 1 where a row is of a prompt or fills it up, else 0, float [B, T].
            attended: The same behind a 1 for every token of the picture, float [B, N + T].
            start: Place of the picture behind its prompt, int64 [B].

        Returns:
            float [B, C, H, W].

        Raises:
            ConfigError: The picture has more rows or columns than the model has places.
        """
        model: Any = self
        batch, channels, height, width = x.shape
        rows, columns = height // _PATCH, width // _PATCH
        time = model.t_embedder(t * model.config.t_scale)
        tokens = model.all_x_embedder[_PATCHES](_cut(x))
        filling = -rows * columns % _MULTIPLE
        if filling:
            pad = self.x_pad_token[None].expand(batch, filling, -1)
            tokens = torch.cat([tokens, pad], dim=1)
        turns = self._picture_turns(start, rows, columns, filling)
        for layer in model.noise_refiner:
            tokens = layer(tokens, None, turns, time)
        text, text_turns = self._refined_text(cap_feats, cap_mask, cap_attended)
        mask = (1 - attended) * _MASKED
        joined = torch.cat([tokens, text], dim=1)
        turns = torch.cat([turns, text_turns.expand(batch, -1, -1)], dim=1)
        for layer in model.layers:
            joined = layer(joined, mask, turns, time)
        joined = model.all_final_layer[_PATCHES](joined, c=time)
        return _joined(joined[:, : rows * columns], rows, columns, channels)

    def _refined_text(
        self, states: Tensor, mask: Tensor, attended: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of prompts, float [B, T, dim], and their rotations, complex [1, T, d / 2]."""
        model: Any = self
        text, here = model.cap_embedder(states), mask[..., None]
        text = text * here + self.cap_pad_token * (1 - here)
        length = text.shape[1]
        # the first place is that of what fills pictures up
        cosines, sines = (
            torch.cat(
                [
                    self._table(part, 0)[1 : length + 1],
                    *(self._table(part, axis)[:1].expand(length, -1) for axis in (1, 2)),
                ],
                dim=-1,
            )
            for part in ("cosines", "sines")
        )
        turns = torch.complex(cosines, sines)[None]
        for layer in model.context_refiner:
            text = layer(text, (1 - attended) * _MASKED, turns)
        return text, turns

    def _picture_turns(self, start: Tensor, rows: int, columns: int, filling: int) -> Tensor:
        """Rotations of a picture's tokens, complex [B, N, d / 2]."""
        for name, side, axis in (("rows", rows, 1), ("columns", columns, 2)):
            if side > len(self._table("cosines", axis)):
                raise ConfigError(
                    f"a picture of {side} {name} of tokens is larger than this transformer's "
                    f"axes_lens {list(self.config['axes_lens'])}; export smaller sizes"
                )
        parts, batch = [], start.shape[0]  # and not `len`, which fixes it
        for part in ("cosines", "sines"):
            first = nn.functional.embedding(start, self._table(part, 0))[:, None]
            down = self._table(part, 1)[:rows].repeat_interleave(columns, dim=0)
            across = self._table(part, 2)[:columns].repeat(rows, 1)
            inside = torch.cat([down, across], dim=-1)[None].expand(batch, -1, -1)
            turned = torch.cat([first.expand(-1, rows * columns, -1), inside], dim=-1)
            if filling:
                zeroth = [self._table(part, axis)[:1] for axis in (0, 1, 2)]
                still = torch.cat(zeroth, dim=-1)[None].expand(batch, filling, -1)
                turned = torch.cat([turned, still], dim=1)
            parts.append(turned)
        return torch.complex(*parts)

    def _table(self, part: str, axis: int) -> Tensor:
        table: Tensor = getattr(self, f"{part}_{axis}")
        return table


def _cut(x: Tensor) -> Tensor:
    """Pictures as tokens of two by two, channels last, [B, N, 4 C]."""
    batch, channels, height, width = x.shape
    rows, columns = height // _PATCH, width // _PATCH
    cut = x.reshape(batch, channels, rows, _PATCH, columns, _PATCH)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, channels * _PATCH**2)


def _joined(tokens: Tensor, rows: int, columns: int, channels: int) -> Tensor:
    """The pictures of tokens, [B, C, H, W]."""
    cut = tokens.reshape(tokens.shape[0], rows, columns, _PATCH, _PATCH, channels)
    joined = cut.permute(0, 5, 1, 3, 2, 4)
    return joined.reshape(tokens.shape[0], channels, rows * _PATCH, columns * _PATCH)
