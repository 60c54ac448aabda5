"""What a user types wrong, and what is printed then: one table for the test and the page of it.

`python tests/cli/wrong_calls.py` writes docs/wrong_calls.md; a test compares page, table and what
the command line prints.
"""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["CALLS", "PAGE", "WrongCall", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "wrong_calls.md"


@dataclass(frozen=True)
class WrongCall:
    """A command line that cannot work.

    Attributes:
        fault: What is wrong with it.
        typed: The words behind `mpqdm-fx`.
        printed: The line on standard error, behind `error: `.
    """

    fault: str
    typed: str
    printed: str


#: Typed in a folder with a tiny `pipeline`, `out` that was made of its UNet, `grid.png`, `own.py`.
CALLS = (
    WrongCall(
        "A command misspelt",
        "quantise digits",
        "No such command 'quantise'. Did you mean 'quantize'? See mpqdm-fx --help",
    ),
    WrongCall(
        "No model",
        "quantize",
        "Missing argument 'MODEL'; see mpqdm-fx quantize --help",
    ),
    WrongCall(
        "An option misspelt",
        "quantize digits --weigths 3",
        "No such option: --weigths (Possible options: --weight-bytes, --weight-storage, "
        "--weights); see mpqdm-fx quantize --help",
    ),
    WrongCall(
        "More bits than eight",
        "quantize digits --weights 9",
        "--weights 9: give an integer from 1 to 8 (every level is an int8 value; for an "
        "average between two give --effective-bits)",
    ),
    WrongCall(
        "An average of bits as bits",
        "quantize digits --weights 3.5",
        "--weights 3.5: a weight has whole bits; for that average give --effective-bits "
        "3.5; see mpqdm-fx quantize --help",
    ),
    WrongCall(
        "A number that is none",
        "quantize digits --steps many",
        "--steps many: give a valid integer; see mpqdm-fx quantize --help",
    ),
    WrongCall(
        "No steps",
        "quantize digits --steps 0",
        "--steps 0: give a number greater than or equal to 1; see mpqdm-fx quantize --help",
    ),
    WrongCall(
        "A backend that is none",
        "quantize digits --backend tflite",
        "--backend tflite: choose one of 'torch_ao', 'xnnpack', 'lowbit', 'packed'; see mpqdm-fx "
        "quantize --help",
    ),
    WrongCall(
        "Own kernels for a backend that has none",
        "quantize digits --kernels memory",
        "--kernels memory: xnnpack has no own kernels; choose --backend lowbit or leave kernels "
        "out",
    ),
    WrongCall(
        "An activation mode that the backend does not run",
        "quantize digits --activation-mode timestep",
        "xnnpack does not run --activation-mode timestep; choose --activation-mode "
        "measured or static or dynamic or --backend packed",
    ),
    WrongCall(
        "Activations that phones do not run",
        "quantize digits --activations 4",
        "XNNPACK runs activations of 8 bits, not 4; choose --activations 8 or --backend packed",
    ),
    WrongCall(
        "Two budgets",
        "quantize digits --effective-bits 3 --weight-bytes 900000",
        "give --effective-bits or --weight-bytes, not both",
    ),
    WrongCall(
        "A budget where bits are fixed",
        "quantize digits --allocation uniform --effective-bits 3",
        "--effective-bits is a budget for --allocation measured, not for 'uniform'",
    ),
    WrongCall(
        "A budget that holds nothing",
        "quantize pipeline --subfolder unet --backend packed -o new --effective-bits 1",
        "--effective-bits 1.0 cannot hold these layers even at 1 bit a weight: the "
        "smallest that can is --effective-bits 1.1756 (codes, scales, layers of fixed bits "
        "or in float)",
    ),
    WrongCall(
        "An override without bits",
        "quantize digits --override mid_block",
        "--override 'mid_block': write PATTERN=BITS (1 to 8), PATTERN=A8 or PATTERN=W4A8 "
        "for activations, or PATTERN=float",
    ),
    WrongCall(
        "An override that matches nothing",
        "quantize pipeline --subfolder unet --backend packed -o new --override 'mid=4'",
        "--override 'mid' matches no layer; nearest names: time_embedding.linear_1, "
        "time_embedding.linear_2, class_embedding",
    ),
    WrongCall(
        "A model of the Hugging Face Hub",
        "quantize runwayml/stable-diffusion-v1-5 --subfolder unet",
        "'runwayml/stable-diffusion-v1-5' is neither a bundled model (digits) nor a "
        "folder; if it is one of the Hugging Face Hub, download it: hf download "
        "runwayml/stable-diffusion-v1-5 --local-dir stable-diffusion-v1-5; then give "
        "stable-diffusion-v1-5, for a pipeline with --subfolder unet",
    ),
    WrongCall(
        "A model that is not there",
        "quantize sd15",
        "'sd15' is neither a bundled model (digits) nor a folder; give a diffusers model "
        "folder, a pipeline folder with --subfolder unet, or a function, module:function",
    ),
    WrongCall(
        "A file in place of a function of it",
        "quantize own.py",
        "'own.py' is a file; give the folder that it lies in, or the function of a .py "
        "file that returns the model: own.py:function",
    ),
    WrongCall(
        "A pipeline without the part",
        "quantize pipeline -o new",
        "pipeline is a pipeline folder; say which part to quantize, e.g. --subfolder unet",
    ),
    WrongCall(
        "A part that the pipeline has not",
        "quantize pipeline --subfolder vae -o new",
        "pipeline/vae/config.json does not exist",
    ),
    WrongCall(
        "A result in place of a model",
        "quantize out -o new",
        "out was written by mpqdm-fx quantize; give the float model that it was made of",
    ),
    WrongCall(
        "The model's own folder as output",
        "quantize pipeline --subfolder unet -o pipeline",
        "--output pipeline: what is read, pipeline, is this folder, or one lies in the "
        "other; give another folder",
    ),
    WrongCall(
        "A result that is there",
        "quantize pipeline --subfolder unet --backend packed -o out",
        "out holds a result; give another folder, or say that it may be replaced (--overwrite)",
    ),
    WrongCall(
        "A folder with other files as output",
        "quantize digits --backend packed -o .",
        "--output .: this is the current folder, or holds it, and it is replaced as a "
        "whole; start from another folder, or give another name",
    ),
    WrongCall(
        "A size that is none",
        "quantize digits --max-memory much",
        "--max-memory 'much': write a size such as 4GiB, 500MB or 1000000",
    ),
    WrongCall(
        "A model of a function, without calls",
        "quantize own.py:model -o new",
        "own.py:model is a function, and it is not known what its model is called with; "
        "give calls with --inputs module:function",
    ),
    WrongCall(
        "A function that is not there",
        "quantize own.py:net --inputs own.py:calls -o new",
        "MODEL own.py:net: own.py has no function 'net'; it has tiny_unet, unet_calls, "
        "model, calls, other_names, broken",
    ),
    WrongCall(
        "Calls of a module that is not there",
        "doctor pipeline --subfolder unet --inputs nowhere:calls",
        "--inputs nowhere:calls: there is no module 'nowhere' on Python's path; give a "
        "file, path/to/file.py:function, or set PYTHONPATH",
    ),
    WrongCall(
        "Calls that the model does not take",
        "plan pipeline --subfolder unet --inputs own.py:other_names",
        "--inputs own.py:other_names: call 0 has (image), and UNet2DModel takes (sample, "
        "timestep, class_labels, return_dict): missing a required argument: 'sample'",
    ),
    WrongCall(
        "Calls that fail",
        "trace pipeline --subfolder unet --inputs own.py:broken",
        "--inputs own.py:broken: it failed: ZeroDivisionError: division by zero (own.py:16)",
    ),
    WrongCall(
        "Calls held out of none",
        "quantize digits --held-out 3 -o new",
        "--held-out counts calls of --inputs; give these too, or leave it out",
    ),
    WrongCall(
        "A time that is none",
        "distill out --budget soon -o new",
        "--budget 'soon': write a time such as 90s, 5m or 1.5h",
    ),
    WrongCall(
        "A float model to distill",
        "distill pipeline -o new",
        "pipeline has no mpqdm.json: it was not written by mpqdm-fx quantize",
    ),
    WrongCall(
        "A kind of picture that is not written",
        "sample out -o grid.gif",
        "--output grid.gif: give a name that ends in .png or .jpg or .jpeg or .webp",
    ),
    WrongCall(
        "A picture that is there",
        "sample out -o grid.png",
        "--output grid.png: it is there; give another name, or say that it may be replaced "
        "(--overwrite)",
    ),
    WrongCall(
        "A program where there is none",
        "sample out --from pte -o new.png",
        "out has no unet.pte; quantize with --backend xnnpack",
    ),
    WrongCall(
        "Evaluating what is not there",
        "evaluate nowhere",
        "nowhere is not a folder; give one that mpqdm-fx quantize wrote",
    ),
    WrongCall(
        "A file in place of a folder",
        "inspect out/mpqdm.json",
        "out/mpqdm.json is not a folder; give one that mpqdm-fx quantize wrote",
    ),
    WrongCall(
        "Exporting a part in place of the pipeline",
        "export pipeline/unet -o new",
        "pipeline/unet is no pipeline folder: model_index.json is missing; give a folder "
        "written by save_pretrained of a diffusers pipeline",
    ),
    WrongCall(
        "A size of pictures that is none",
        "export pipeline --size big -o new",
        "--size 'big': write HEIGHTxWIDTH, for example 512x512, or the samples of a sound",
    ),
    WrongCall(
        "Where to solve, and nothing to be solved",
        "export pipeline --float --device cuda -o new",
        "--float and --device: nothing is quantized with --float; leave one of the two out",
    ),
    WrongCall(
        "Settings for a folder that has its own",
        "doctor out --weights 3",
        "--weights: out was written by mpqdm-fx quantize, and its own program is judged; leave the "
        "option out, or give the float model",
    ),
    WrongCall(
        "An export that starts from what is no export's run",
        "export pipeline --start-from out -o new",
        "out holds no run of an export: export.json is missing; give the folder that an export "
        "kept its run in",
    ),
    WrongCall(
        "A run that is kept in what is replaced",
        "export pipeline --keep-run new/run -o new",
        "--keep-run 'new/run': it lies in --output new; give another folder",
    ),
)


def page() -> str:
    """The table as a page."""
    head = (
        "# Calls that cannot work, and what they print\n\n"
        "Written by `python tests/cli/wrong_calls.py`. Each ends with exit status 2, one line on\n"
        "standard error and nothing on the disk. `pipeline` is a pipeline's folder, `out` one of\n"
        "`mpqdm-fx quantize`, `own.py` a file with functions of one's own.\n"
    )
    parts = [
        f"## {call.fault}\n\n    $ mpqdm-fx {call.typed}\n    error: {call.printed}\n"
        for call in CALLS
    ]
    return "\n".join([head, *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
