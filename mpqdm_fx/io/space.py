"""Free space of disks: what is known to be written is refused where it cannot be held."""

import shutil
from pathlib import Path

from mpqdm_fx.errors import ConfigError

__all__ = ["check_space", "existing_folder", "free_bytes", "lack_of_space"]


def free_bytes(output: str | Path) -> int:
    """Bytes that are free where a folder is to appear.

    Args:
        output: The folder, which need not be there. Of a link, the result appears where it leads
            to, and an unfinished run lies beside it: both disks count, that with more space alone.
    """
    output = Path(output)
    places = {existing_folder(path.parent) for path in (output, output.resolve())}
    return max(shutil.disk_usage(place).free for place in places)


def lack_of_space(output: str | Path, needed: int) -> str | None:
    """What is said where a disk does not hold what is to be written; None where it does.

    Args:
        output: The folder.
        needed: Bytes.
    """
    free = free_bytes(output)
    if free >= needed:
        return None
    return (
        f"{needed / 2**20:,.1f} MiB are needed there, and the disk has {free / 2**20:,.1f} MiB "
        f"left ({needed} and {free} bytes); free some, or give another disk"
    )


def check_space(output: str | Path, needed: int, name: str = "output") -> None:
    """Refuse a disk that cannot hold what is known to be written.

    Args:
        output: Folder to appear.
        needed: Bytes that are written at least, there or beside it.
        name: What the folder is called, for the message.

    Raises:
        ConfigError: Less is free; says how much of both.
    """
    if lack := lack_of_space(output, needed):
        raise ConfigError(f"{name}={str(output)!r}: {lack}")


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above that is there.

    Args:
        folder: It.
    """
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
