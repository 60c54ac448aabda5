"""Write what stands on the screen after every command: docs/screens/, from real terminals.

    .venv/bin/python tools/screens.py --work /tmp/screens

Every command runs in a pseudo-terminal of 80 and one of 120 columns, and with pipes. A terminal
emulator (pyte) makes of what was written what a user sees; of the line of progress, states are kept
that it had on the way. Results of long commands are kept in the work folder and made once a width.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyte
from terminal import drawn, in_pipes, in_terminal

REPOSITORY = Path(__file__).parents[1]
SCREENS = REPOSITORY / "docs" / "screens"
WIDTHS = (80, 120)
_LINES = 500  # a screen as high as the longest output
_STATES = 6  # of the line of progress that are shown


@dataclass(frozen=True)
class Screen:
    """A command whose screen is kept.

    Attributes:
        name: Name of its files.
        words: What is typed behind `mpqdm-fx`; `{width}` is that of the terminal, or `pipe`.
        status: Status that it ends with.
    """

    name: str
    words: str
    status: int = 0


_QUICK = "--trajectories 4 --steps 5 --samples 4"

SCREENS_OF: tuple[Screen, ...] = (
    Screen("help", "--help"),
    Screen("help-quantize", "quantize --help"),
    Screen("version", "--version"),
    Screen("typo", "quantise digits", status=2),
    Screen("trace", "trace digits --explain"),
    Screen("plan", f"plan digits --weights 4 {_QUICK}"),
    Screen("passes", "passes"),
    Screen("doctor", "doctor digits"),
    Screen("quantize", f"quantize digits --weights 4 --output out-{{width}} {_QUICK}"),
    Screen("quantize-again", "quantize digits --output out-{width}", status=2),
    Screen("inspect", "inspect out-{width} --sort sqnr --top 12"),
    Screen("verify", "verify out-{width}"),
    Screen("evaluate", "evaluate out-{width} --num 16 --steps 5"),
    Screen("gates", "evaluate out-{width} --num 16 --steps 5 --gate 'x0_sqnr>=90'", status=1),
    Screen("sample", "sample out-{width} --num 4 --steps 5 --output grid-{width}.png"),
    Screen("report", "report out-{width} --output page-{width}.html --samples 4"),
    Screen("distill", f"distill out-{{width}} --updates 5 --output trained-{{width}} {_QUICK}"),
    Screen("compare", "compare out-{width} trained-{width} --output compare-{width}.html"),
    Screen(
        "pareto",
        f"pareto digits --bits 3,4 --backend packed --num 16 --output pareto-{{width}} {_QUICK}",
    ),
    Screen("export", "export pipeline --output exported-{width} --trajectories 2 --steps 2"),
)


def standing(written: str, columns: int) -> str:
    """What stands on a terminal's screen at the end."""
    screen = pyte.Screen(columns, _LINES)
    pyte.Stream(screen).feed(written)
    lines = [line.rstrip() for line in screen.display]
    return "\n".join(lines).rstrip() + "\n"


def states(written: str) -> Iterator[str]:
    """Some of the states that the line of progress had, one a stage."""
    by_stage: dict[str, str] = {}
    for state in map(str.strip, drawn(written)[1:]):
        stage = re.match(r"\[\d+/\d+\] [a-z' ]*", state)
        if stage is not None:
            by_stage[stage[0]] = state
    lines = list(by_stage.values())
    yield from lines[:: max(1, len(lines) // _STATES)]


def main() -> None:
    """Run the commands and write their screens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder to run the commands in")
    parser.add_argument("--only", nargs="*", help="names of screens, by default all")
    parser.add_argument("--width", nargs="*", help="80, 120 or pipe, by default all")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    SCREENS.mkdir(exist_ok=True)
    failed = [
        f"{screen.name}, {width}: status {status}"
        for screen in SCREENS_OF
        if arguments.only is None or screen.name in arguments.only
        for width in (*WIDTHS, None)
        if arguments.width is None or str(width or "pipe") in arguments.width
        for status in (write(screen, width, arguments.work),)
        if status != screen.status
    ]
    sys.exit("\n".join(failed))


def write(screen: Screen, width: int | None, work: Path) -> int:
    """Run one command and write its screen; its status."""
    named = "pipe" if width is None else str(width)
    typed = screen.words.format(width=named)
    words = [sys.executable, "-m", "mpqdm_fx", *shlex.split(typed)]
    text = f"$ mpqdm-fx {typed}\n"
    if width is None:
        status, written, _ = in_pipes(words, folder=work, together=True)
        text += written
    else:
        status, raw = in_terminal(words, columns=width, folder=work)
        text += standing(raw, width)
        on_the_way = "\n".join(states(raw))
        text += f"\n(the line of progress, on the way)\n{on_the_way}\n" if on_the_way else ""
    path = SCREENS / f"{screen.name}-{named}.txt"
    path.write_text(text, encoding="utf-8")
    sys.stderr.write(f"{path.relative_to(REPOSITORY)}: status {status}\n")
    return status


if __name__ == "__main__":
    main()
