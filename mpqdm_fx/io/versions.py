"""Versions that go into every artefact and report."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["FIRST_SEALED", "FORMAT", "FORMAT_VERSION", "versions"]

FORMAT = "mpqdm_fx"
FORMAT_VERSION = 3
FIRST_SEALED = 3
"""Older manifests list weights and config.json alone, with neither digest nor proof."""

_PACKAGES = ("mpqdm-fx", "torch", "torchao", "diffusers", "executorch")


def versions() -> dict[str, str]:
    """Installed versions of this package and of what it stands on."""
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed
