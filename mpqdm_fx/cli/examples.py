"""Two examples for each command, at the end of its help."""

from collections.abc import Mapping

__all__ = ["EXAMPLES", "epilog_of"]

EXAMPLES: Mapping[str, tuple[str, str]] = {
    "quantize": (
        "mpqdm-fx quantize digits --weights 4 -o out",
        "mpqdm-fx quantize sd15 --subfolder unet --effective-bits 3.5 -o out --dry-run",
    ),
    "distill": (
        "mpqdm-fx distill out --budget 5m -o distilled",
        "mpqdm-fx distill out --budget 1h --resume -o distilled",
    ),
    "export": (
        "mpqdm-fx export sd15 --size 512x512 -o exported",
        "mpqdm-fx export sd15 --weights 4 --prompts prompts.txt -o exported",
    ),
    "pareto": (
        "mpqdm-fx pareto digits --bits 2,3,4 -o pareto",
        "mpqdm-fx pareto digits --bits 2,2.5,3 --pick 'x0_sqnr>=20' -o pareto",
    ),
    "plan": (
        "mpqdm-fx plan digits --weights 2",
        "mpqdm-fx plan sd15 --subfolder unet --max-memory 4GiB",
    ),
    "sample": (
        "mpqdm-fx sample out --num 16 --seed 1 -o grid.png",
        "mpqdm-fx sample out --from float -o float.png",
    ),
    "evaluate": (
        "mpqdm-fx evaluate out",
        "mpqdm-fx evaluate out --gate 'x0_sqnr>=20' --gate 'bytes<=2MB' --json",
    ),
    "report": (
        "mpqdm-fx report out",
        "mpqdm-fx report out -o report.html --overwrite",
    ),
    "compare": (
        "mpqdm-fx compare out distilled",
        "mpqdm-fx compare w2 w3 w4 -o compare.html",
    ),
    "verify": (
        "mpqdm-fx verify out",
        "mpqdm-fx verify out -o verify.json",
    ),
    "trace": (
        "mpqdm-fx trace digits --explain",
        "mpqdm-fx trace digits --passes drop-dropout,split-skip-concat --print-after all",
    ),
    "passes": (
        "mpqdm-fx passes",
        "mpqdm-fx passes --json",
    ),
    "doctor": (
        "mpqdm-fx doctor digits",
        "mpqdm-fx doctor out --max-delegates 1",
    ),
    "inspect": (
        "mpqdm-fx inspect out",
        "mpqdm-fx inspect out --json",
    ),
}
"""By command."""


def epilog_of(command: str) -> str:
    """What stands at the end of a command's help; typer makes lines of paragraphs."""
    lines = EXAMPLES.get(command, ())
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines)]) if lines else ""
