"""Write docs/reference/commands.md from the command line itself.

python tools/commands.py
"""

from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from mpqdm_fx.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "commands.md"


def page() -> str:
    """The page's text: every command, its arguments and options."""
    command = typer.main.get_command(app)
    with typer.Context(command, info_name="mpqdm-fx") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="mpqdm-fx", title="Command line")
    return f"{text.strip()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
