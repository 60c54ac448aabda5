"""A graph is compared with its model on the same kernels, and a difference is named."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone uses
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from trace_helpers import calls, randn

from mpqdm_fx.capture.diagnose import CaptureError
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.difference import attention_kernels, same_bits


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        return self.attention(x, x, x, need_weights=False)[0]


def layer(norm_first: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)


@pytest.mark.parametrize("build", [Attends, lambda: layer(False), lambda: layer(True)])
def test_attention_with_a_fast_path_is_traced_and_equals_the_model_without_it(build):
    model, x = build().eval(), randn(2, 7, 16)
    gm = trace(model, (x,))
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), next(attention_kernels()):
        assert same_bits(gm(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), rtol=0, atol=2e-6)


def test_output_projection_of_attention_is_a_layer():
    assert calls(trace(Attends().eval(), (randn(2, 7, 16),))) == ["inside", "attention.out_proj"]


class Pinned(nn.Module):
    """Asks for the plain products of attention, which no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.inside(x).unflatten(-1, (4, 16)).transpose(1, 2)
        with sdpa_kernel([SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, q, q)


def test_attention_with_a_kernel_of_its_own_choice_is_traced():
    model, x = Pinned().eval(), randn(2, 33, 64)
    gm = trace(model, (x,))
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        assert same_bits(gm(x), model(x))


class Otherwise(nn.Module):
    """Computes something else while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = 2.0 if torch.compiler.is_exporting() else 3.0
        return self.body[1](self.body[0](x) * factor)


def test_a_difference_names_its_size_the_node_and_the_module():
    with pytest.raises(
        CaptureError, match=r"differs from the model's by .* first at node"
    ) as caught:
        trace(Otherwise().eval(), (randn(2, 4),))
    reason = caught.value.refusal.reason
    assert "node mul (aten.mul.Tensor) of the model itself by" in reason
    assert caught.value.refusal.suggestion == "please report this model"


def test_a_model_that_keeps_state_is_told_so():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.count = nn.Linear(4, 4), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return self.linear(x) * self.count

    with pytest.raises(TraceError, match="each call changes count"):
        trace(Counts().eval(), (randn(2, 4),))
