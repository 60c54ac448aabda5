"""Peak memory of exporting one large text encoder: loaded whole, and read from its files.

    python benchmarks/encoder_memory.py --directory encoder
    python benchmarks/encoder_memory.py --directory encoder --layers 4 --forms stored

A T5 encoder of random weights (24 layers of T5-large's width: 345 M parameters; 12: 187 M) in
bfloat16 shards is quantized and lowered in a process of its own for each form. Bytes are above what
the process took when everything was imported; `anonymous` leaves out pages of files, which the
system takes back when it needs them. The programs of both forms must be the same bytes.
"""

import argparse
import gc
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from transformers import T5Config, T5EncoderModel

from mpqdm_fx import MPQConfig, RunOptions
from mpqdm_fx.backends.xnnpack.lower import lower_methods
from mpqdm_fx.io.allocator import large_blocks_returned
from mpqdm_fx.pipelines import stored_encoders
from mpqdm_fx.pipelines.encoder_memory import encoder_peak
from mpqdm_fx.pipelines.folder import load_encoder
from mpqdm_fx.pipelines.parts import MaskedTextEncoder, Part
from mpqdm_fx.pipelines.programs import quantize_part, write_programs

WIDTH, FEED_FORWARD, VOCABULARY = 1024, 2816, 32128
FORMS = ("whole", "stored")
_STATUS = Path("/proc/self/status")
_IMPORTED = (XnnpackPartitioner, lower_methods)  # what is loaded before anything is measured


def write_encoder(folder: Path, layers: int) -> None:
    """Random weights in bfloat16, in shards of 20 MB."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=64, d_ff=FEED_FORWARD, num_layers=layers,
        num_heads=WIDTH // 64, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5EncoderModel(config).eval().to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20MB")


def example(rows: int, tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Token numbers, half of them padding."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[:, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def export_encoder(folder: Path, form: str, rows: int, tokens: int) -> dict[str, Any]:
    """Load, quantize and lower; peaks of each stage."""
    torch.set_num_threads(1)
    before, stages = _bytes("VmRSS"), dict[str, Any]()
    generator = torch.Generator().manual_seed(0)
    stored_encoders.LARGE = 0  # whatever --layers is
    with large_blocks_returned(form == "stored"):
        with _peaks(stages, "load", before):
            encoder = load_encoder(folder, "T5EncoderModel", None, stored=form == "stored")
        module = MaskedTextEncoder(encoder).eval()
        part = Part(name="text_encoder", module=module, outputs=("states",), sized=False)
        calls = [example(rows, tokens, generator), example(1, tokens, generator)]
        config = MPQConfig(activation_mode="dynamic")
        with _peaks(stages, "quantize", before):
            judged = quantize_part(part, calls, config, bound=-300, run=RunOptions())
        program = folder / f"{form}.pte"
        with _peaks(stages, "lower", before):
            write_programs(part, judged.quantized, {None: example(1, tokens, generator)}, program)
    return {
        "parameters": part.parameters,
        "float32_bytes": 4 * part.parameters,
        "foretold_bytes": encoder_peak(encoder, tokens) if form == "stored" else None,
        "program_bytes": program.stat().st_size,
        "program": hashlib.sha256(program.read_bytes()).hexdigest(),
        "sqnr_db": judged.sqnr_db,
        "stages": stages,
    }


@contextmanager
def _peaks(stages: dict[str, Any], name: str, before: int) -> Iterator[None]:
    """Peak of a stage, and the most anonymous bytes that were seen 50 times a second."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := current
    anonymous, through, start = [_bytes("RssAnon")], threading.Event(), time.perf_counter()

    def watch() -> None:
        while not through.wait(0.02):
            anonymous[0] = max(anonymous[0], _bytes("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    through.set()
    watcher.join()
    stages[name] = {
        "peak_bytes": _bytes("VmHWM") - before,
        "anonymous_bytes": anonymous[0] - before,
        "left_bytes": _bytes("VmRSS") - before,
        "seconds": time.perf_counter() - start,
    }
    print(name, stages[name], file=sys.stderr, flush=True)


def _bytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Write the encoder if it is not there, export each form in a process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4, help="prompts to calibrate on")
    parser.add_argument("--tokens", type=int, default=32, help="of a prompt")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        facts = export_encoder(options.directory, options.form, options.rows, options.tokens)
        print(json.dumps(facts))
        return
    if not (options.directory / "config.json").is_file():
        write_encoder(options.directory, options.layers)
    results = {form: _apart(form) for form in options.forms}
    for form, result in results.items():
        whole = result["float32_bytes"]
        print(f"{form}: {result['parameters']:,} parameters, program {result['program_bytes']:,}")
        for name, stage in result["stages"].items():
            shares = (f"{stage[key] / whole:.2f}" for key in ("peak_bytes", "anonymous_bytes"))
            peak, anonymous = shares
            print(f"  {name}: {stage['peak_bytes']:,} bytes, {peak} of its float32 bytes "
                  f"({anonymous} anonymous), {stage['seconds']:.0f} s")  # fmt: skip
    same = len({result["program"] for result in results.values()}) == 1
    print("the programs are the same bytes" if same else "THE PROGRAMS DIFFER")
    path = options.directory / "encoder_memory.json"
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _apart(form: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--form", form]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
