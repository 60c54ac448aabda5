"""Type a command into this process, as a shell would start it."""

import pytest

from mpqdm_fx.cli import app as cli
from mpqdm_fx.cli.boundary import run


def typed(monkeypatch, capsys, *arguments, app=cli.app):
    """Run `main`; return exit status, standard output and standard error."""
    monkeypatch.setattr("sys.argv", ["mpqdm-fx", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(app)
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err
