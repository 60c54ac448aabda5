"""Public test kit: hypothesis strategies for weights, plans and graphs, and assertions on passes.

Needs the extra `mpqdm-fx[test]` (hypothesis). Strategies draw structure (shapes, families, seeds),
not thousands of floats, and shrink toward small and plain.

Example:
    ```python
    from hypothesis import given
    from mpqdm_fx.testing import assert_modified_is_honest, graphs

    @given(graphs())
    def test_my_pass_tells_the_truth(case):
        assert_modified_is_honest(MyPass(), case.graph_module)
    ```
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as _error:  # pragma: no cover - depends on the installation
    raise ImportError("mpqdm_fx.testing needs hypothesis: pip install 'mpqdm-fx[test]'") from _error

from mpqdm_fx.testing.asserts import (
    assert_input_untouched,
    assert_modified_is_honest,
    assert_same_function,
    count,
    digest,
)
from mpqdm_fx.testing.graphs import KINDS, Block, GraphSpec, RandomGraph, build_graph, graphs
from mpqdm_fx.testing.weights import FAMILIES, bit_plans, bit_vectors, make_weight, weights

__all__ = [
    "FAMILIES",
    "KINDS",
    "Block",
    "GraphSpec",
    "RandomGraph",
    "assert_input_untouched",
    "assert_modified_is_honest",
    "assert_same_function",
    "bit_plans",
    "bit_vectors",
    "build_graph",
    "count",
    "digest",
    "graphs",
    "make_weight",
    "weights",
]
