"""Versions that go into every artefact and report."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["FORMAT", "FORMAT_VERSION", "versions"]

FORMAT = "mpqdm_fx"
FORMAT_VERSION = 3

_PACKAGES = ("mpqdm-fx", "torch", "torchao", "diffusers", "executorch")


def versions() -> dict[str, str]:
    """Installed versions of this package and of what it stands on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
