"""The option `--gate`: what a result must measure, and what is printed of it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from mpqdm_fx.cli.panels import RUN
from mpqdm_fx.cli.streams import complain, say
from mpqdm_fx.report.export_metrics import EXPORTED
from mpqdm_fx.report.gates import METRICS, Verdict, catalogue

__all__ = ["GateOption", "MetricsOption", "end_with_gates", "print_gates", "with_gates"]

GateOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC>=NUMBER",
        help="What must be measured, for example x0_sqnr>=20, 'ms<=40' or bytes<=2MB; repeat it "
        f"for more. Exit status 1 if one fails. Metrics: {', '.join(METRICS)}.",
        rich_help_panel=RUN,
    ),
]


def _print_catalogue(wanted: bool) -> None:
    if wanted:
        console = Console()
        say(console, "Metrics of --gate: name, direction, unit, meaning\n")
        say(console, catalogue())
        say(console, "\nOf an exported pipeline they are of\n")
        lines = (f"  {name:<25} {meaning}" for name, meaning in EXPORTED.items())
        say(console, "\n".join(lines))
        say(console, "\nUnits of bytes: B, kB, MB, GB, KiB, MiB, GiB; of ms also s; of a share %.")
        raise typer.Exit


MetricsOption = Annotated[
    bool,
    typer.Option(
        "--metrics",
        is_eager=True,
        callback=_print_catalogue,
        help="List all metrics and exit.",
        rich_help_panel=RUN,
    ),
]


def with_gates(numbers: Mapping[str, Any], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What `--json` prints: a command's numbers, and its gates where there are some.

    Args:
        numbers: The command's own.
        verdicts: Of `gates.judge`.
    """
    if not verdicts:
        return dict(numbers)
    records = [verdict.to_dict() for verdict in verdicts]
    return {**numbers, "gates": records, "passed": all(verdict.passed for verdict in verdicts)}


def print_gates(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Print what was wanted and measured; nothing without gates.

    Args:
        console: Where to print it.
        verdicts: Of `gates.judge`.
    """
    from mpqdm_fx.report.evaluation_tables import gate_table

    if verdicts:
        console.print(gate_table(verdicts))


def end_with_gates(verdicts: Sequence[Verdict], what: object) -> None:
    """End the command with status 1 and one line on standard error if a gate failed.

    Args:
        verdicts: Of `gates.judge`.
        what: What was judged.

    Raises:
        typer.Exit: A gate failed.
    """
    failed = [str(verdict.gate) for verdict in verdicts if not verdict.passed]
    if failed:
        complain(f"error: {what}: not reached: {', '.join(failed)}")
        raise typer.Exit(code=1)
