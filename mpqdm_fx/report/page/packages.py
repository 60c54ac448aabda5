"""Whether what a page is made with is installed."""

import importlib.util
import logging

__all__ = ["can_render", "renders"]

logger = logging.getLogger(__name__)

_PACKAGES = ("matplotlib", "jinja2")


def renders() -> bool:
    """Whether what a page is made with is installed."""
    return not _absent()


def _absent() -> list[str]:
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def can_render() -> bool:
    """Whether a page can be made now; if not, one line in the log says how."""
    if absent := _absent():
        logger.warning(
            'no report is written, %s is not installed: pip install "mpqdm-fx[report]", then '
            "mpqdm-fx report DIR", " and ".join(absent),
        )  # fmt: skip
    return not absent
