"""The command `mpqdm-fx passes`: what runs on a graph, in running order."""

import json
import textwrap
from dataclasses import asdict

from mpqdm_fx.cli import options as opt
from mpqdm_fx.cli.streams import say

__all__ = ["passes"]


def passes(as_json: opt.JsonOption = False) -> None:
    """List the passes on graphs by stage, for `trace --passes`."""
    from mpqdm_fx.jobs.passes import pass_road

    console, road = opt.console(), pass_road()
    if as_json:
        console.print_json(json.dumps([asdict(stage) for stage in road]))
        return
    for stage in road:
        say(console, f"{stage.name}: {stage.meaning}")
        for name, line in stage.passes.items():
            text = f"  {name:<28} {line}"
            say(console, textwrap.fill(text, console.width, subsequent_indent=" " * 31))
