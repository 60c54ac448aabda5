import inspect
import json
import shutil

import pytest
from rich.console import Console
from small import tiny_unet
from typer.testing import CliRunner

from mpqdm_fx.cli import app as cli
from mpqdm_fx.cli.boundary import tell
from mpqdm_fx.cli.options import activation_mode_of
from mpqdm_fx.cli.streams import say
from mpqdm_fx.cli.usage import USAGE_ERROR
from mpqdm_fx.errors import MPQError
from mpqdm_fx.io.folders import seal_folder
from mpqdm_fx.io.sealed import seal


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from diffusers import DDIMScheduler

    root = tmp_path_factory.mktemp("pipeline")
    tiny_unet().save_pretrained(root / "unet")
    DDIMScheduler().save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "DDIMPipeline"}))
    return root


def invoked(places, *arguments):
    typed = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.app, typed, obj=places, standalone_mode=False)


def run(*arguments):
    """Run the command line as `main` does; return exit status and all that was printed."""
    places = {}
    result = invoked(places, *arguments)
    if isinstance(result.exception, MPQError | USAGE_ERROR):
        refusal = tell(result.exception, places)
        return refusal.status, refusal.line
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    status = result.return_value or result.exit_code
    return status, result.stdout if status == 0 else result.output


@pytest.fixture(scope="module")
def quantized_folder(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "[red]out"  # no markup, whatever prints it
    options = ["--weights", 3, "--backend", "packed", "--trajectories", 2, "--steps", 3]
    options += ["--allocation", "uniform", "--refinements", 0]
    status, text = run(
        "quantize", model_folder, "--subfolder", "unet", *options, "--samples", 4,
        "--override", "mid_block.attentions.*=5", "--output", output,
    )  # fmt: skip
    assert status == 0, text
    assert f"written to {output}\n" in text
    assert "ms a step" in text
    assert "dB, " in text
    assert max(map(len, text.splitlines()[:5])) <= 80
    return output


def test_quantize_leaves_packed_weights_config_scheduler_and_a_grid(quantized_folder):
    names = {path.name for path in quantized_folder.iterdir()}
    assert names == {
        "config.json",
        "graph.json.xz",
        "model.safetensors",
        "mpqdm.json",
        "parity.json",
        "parity.safetensors",
        "proof.safetensors",
        "recipe.json",
        "report.html",
        "report.json",
        "samples.png",
        "scheduler",
        "source.json",
        "summary.json",
    }
    assert (quantized_folder / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_counts_every_parameter_of_the_model(quantized_folder):
    summary = json.loads((quantized_folder / "summary.json").read_text())
    parameters = sum(parameter.numel() for parameter in tiny_unet().parameters())
    assert sum(summary["parameters"].values()) == parameters
    assert summary["float32_bytes"] == 4 * parameters
    assert summary["remarks"] == []


def test_inspect_prints_every_layer(quantized_folder, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    status, text = run("inspect", quantized_folder, "--json")
    assert status == 0
    layers = {layer["name"]: layer for layer in json.loads(text)["layers"]}
    assert layers["mid_block.attentions.0.to_q"]["mean_bits"] == 5
    assert layers["mid_block.resnets.0.conv1"]["mean_bits"] == 3
    assert layers["conv_in"]["reason"] == "first layer"
    status, text = run("inspect", quantized_folder)
    assert status == 0
    assert {*layers} <= set(text.split())  # whole names: a pipe has no width
    assert "effective bits" in text
    assert run("inspect", quantized_folder, "--sort", "BYTES", "--top", 2)[0] == 0


def test_inspect_names_a_damaged_summary(quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "copy")
    (folder / "summary.json").write_text("{")
    status, text = run("inspect", folder)
    assert status == 2
    assert "summary.json is truncated or damaged" in text


@pytest.mark.parametrize("form", ["packed", "float", "auto"])
def test_sample_writes_a_picture_that_depends_on_the_seed_alone(quantized_folder, tmp_path, form):
    pictures = []
    for seed in (0, 0, 1):
        picture = tmp_path / "[red]grid.png"
        options = ["--num", 4, "--steps", 2, "--seed", seed, "--from", form, "--overwrite"]
        status, text = run("sample", quantized_folder, *options, "--output", picture)
        assert status == 0, text
        assert f"4 images written to {picture}\n" in text
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_evaluate_measures_against_the_float_model(quantized_folder):
    status, text = run("evaluate", quantized_folder, "--num", 4, "--steps", 2, "--json")
    assert status == 0
    assert json.loads(text)["epsilon_sqnr"] > 5


def test_verify_passes_on_what_quantize_wrote_and_keeps_all_numbers(quantized_folder, tmp_path):
    output = tmp_path / "new" / "verify.json"
    status, text = run("verify", quantized_folder, "--output", output)
    assert status == 0, text
    assert "mid_block.attentions.0.to_q" in output.read_text()
    ladder = json.loads(output.read_text())
    assert ladder["passed"] is True
    assert [rung["name"] for rung in ladder["rungs"]] == ["float", "quantized"]
    for part in ("quantized", "lowest layers", "alone", "note: there is no unet.pte"):
        assert part in text


def test_verify_exits_with_one_where_a_layer_falls_short(quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "[red]out")
    thresholds = json.loads((folder / "parity.json").read_text())
    nodes = thresholds["rungs"]["quantized"]["nodes"]
    nodes["mid_block.resnets.0.conv1@0 convolution 0"] = [59.5, "inf"]
    (folder / "parity.json").write_text(json.dumps(seal(thresholds)))
    seal_folder(folder)
    status, text = run("verify", folder)
    assert status == 1
    named = "rung `quantized` falls short: mid_block.resnets.0.conv1: convolution [1, 24, 4, 4]"
    assert named in text
    assert "wanted are 58.5 dB" in text
    result = invoked({}, "verify", folder, "--store", "--json")
    assert (result.exit_code, json.loads(result.stdout)["passed"]) == (0, True)
    assert f"thresholds stored in {folder}\n" in result.stderr


def test_verify_without_thresholds_is_an_error_with_the_remedy(quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "out")
    (folder / "parity.json").unlink()
    seal_folder(folder)
    status, text = run("verify", folder)
    assert (status, "holds no thresholds" in text, "--store" in text) == (2, True, True)
    assert not (folder / "parity.json").exists()


def test_trace_explain_says_in_words_what_was_found(model_folder):
    options = ["trace", model_folder, "--subfolder", "unet", "--explain"]
    status, text = run(*options)
    assert status == 0
    assert text.startswith("UNet2DModel is traced, bit-equal to the model (")
    assert "layers can be quantized, of " in text
    assert "TraceReport" not in text
    status, text = run(*options, "--json")
    report = json.loads(text)
    assert (status, report["ok"], report["model_class"]) == (0, True, "UNet2DModel")


def test_trace_gives_its_graph_as_json(model_folder):
    status, text = run("trace", model_folder, "--subfolder", "unet", "--json")
    assert status == 0
    graph = json.loads(text)
    assert graph["modules"]["conv_in"]
    assert {"placeholder", "output"} <= {node[1] for node in graph["nodes"]}


@pytest.mark.parametrize(
    ("name", "start"), [("a.jpg", b"\xff\xd8\xff"), ("a.WEBP", b"RIFF"), ("a.png", b"\x89PNG")]
)
def test_a_picture_has_the_file_type_that_was_asked_for(quantized_folder, tmp_path, name, start):
    picture = tmp_path / name
    options = ["sample", quantized_folder, "--num", 2, "--steps", 1, "-o", picture]
    status, text = run(*options, "--json")
    assert status == 0, text
    assert picture.read_bytes().startswith(start)
    result = json.loads(text)
    assert (result["output"], result["images"], result["from"]) == (str(picture), 2, "packed")
    before = picture.read_bytes()
    status, text = run(*options)
    assert (status, "(--overwrite)" in text) == (2, True)
    assert picture.read_bytes() == before
    assert run(*options, "--overwrite")[0] == 0


def test_plan_foretells_what_a_dry_run_of_quantize_does_and_both_write_nothing(
    model_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = [model_folder, "--subfolder", "unet", "--weights", 3, "--trajectories", 4, "--json"]
    planned = run("plan", *options)
    dry = run("quantize", *options, "--dry-run", "-o", tmp_path / "new")
    assert (planned[0], dry[0]) == (0, 0), dry[1]
    planned, dry = json.loads(planned[1]), json.loads(dry[1])
    assert dry.pop("free_bytes") > 0  # of the disk of --output, which a plan has not
    measured = {"seconds", "stages", "row_seconds"}
    measured |= {name for name in planned if name.endswith("_seconds")}
    assert planned["stages"].keys() == dry["stages"].keys()
    assert {k: v for k, v in planned.items() if k not in measured} == {
        k: v for k, v in dry.items() if k not in measured
    }
    assert planned["seconds"] == pytest.approx(sum(planned["stages"].values()))
    for stage in ("tracing", "sensitivities", "lowering", "comparing forms", "measuring"):
        assert planned["stages"][stage] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "nowhere"], "neither a bundled model"),
        (["quantize", "{pipeline}"], "--subfolder unet"),
        (["trace", "{pipeline}", "--subfolder", "unet", "--variant", "fp16"], "no --variant"),
        (["quantize", "digits", "--weights", 9], "--weights 9: give an integer from 1 to 8"),
        (
            ["quantize", "digits", "--allocation", "best"],
            "choose one of 'measured', 'omq', 'uniform'",
        ),
        (["quantize", "digits", "--backend", "tflite"], "choose one of"),
        (
            ["quantize", "digits", "--activation-mode", "late"],
            "'static', 'timestep', 'dynamic', 'float'",
        ),
        (
            ["quantize", "digits", "--activation-mode", "timestep"],
            "--activation-mode measured or static or dynamic",
        ),
        (["quantize", "digits", "--activation-mode", "timestep"], "--backend packed"),
        (["quantize", "digits", "--activations", 6], "activations of 8 bits, not 6"),
        (
            ["quantize", "digits", "--activation-mode", "dynamic", "--backend", "torch_ao"],
            "--backend xnnpack or lowbit or packed",
        ),
        (["quantize", "digits", "--override", "conv_in"], "PATTERN=BITS"),
        (["quantize", "digits", "--override", "conv_in=W4A"], "PATTERN=W4A8"),
        (["quantize", "digits", "--override", "conv_in=W9A8"], "PATTERN=BITS (1 to 8)"),
        (["quantize", "digits", "--override", "convin=W4A8"], "nearest names: conv_in"),
        (["sample", "{pipeline}", "--from", "pte"], "not written by mpqdm-fx"),
        (["inspect", "{pipeline}"], "mpqdm.json"),
        (["evaluate", "nowhere"], "nowhere"),
        (["verify", "nowhere"], "nowhere is not a folder"),
        (["verify", "{pipeline}"], "mpqdm.json"),
    ],
)
def test_bad_input_gets_one_clear_error_and_nothing_is_written(
    model_folder, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    status, text = run(*[str(a).replace("{pipeline}", str(model_folder)) for a in arguments])
    assert status == 2
    assert message in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "backend", "activations", "mode"),
    [
        ("auto", "xnnpack", 8, "dynamic"),
        ("auto", "torch_ao", 8, "static"),
        ("auto", "packed", 8, "static"),
        ("auto", "lowbit", 8, "dynamic"),
        ("auto", "lowbit", 4, "dynamic"),  # which is then refused for its bits
        ("auto", "packed", 4, "static"),
        ("static", "xnnpack", 8, "static"),
    ],
)
def test_auto_takes_dynamic_ranges_where_the_backend_has_kernels_for_them(
    text, backend, activations, mode
):
    assert activation_mode_of(text, backend=backend, activations=activations) == mode


def test_a_text_is_printed_as_it_is_and_in_one_line():
    console = Console(width=10, color_system="truecolor", force_terminal=True)
    with console.capture() as printed:
        say(console, f"written to /tmp/[red]x[/]/{'long ' * 9}name: 12")
    assert printed.get() == f"written to /tmp/[red]x[/]/{'long ' * 9}name: 12\n"


def test_quantize_plan_and_export_have_the_options_of_the_settings():
    quantize, plan, export = (
        inspect.signature(command).parameters for command in (cli.quantize, cli.plan, cli.export)
    )
    settings = {"weights", "activations", "activation_mode", "allocation", "propagation", "levels"}
    for options in (quantize, plan, export):
        assert settings | {"rounding", "refinements", "override"} <= set(options)
        assert "config" not in options
        assert options["activation_mode"].default == "auto"
    assert {"weight_bytes", "effective_bits", "seed"} <= set(quantize) & set(export) & set(plan)
    assert [options["weights"].default for options in (quantize, plan, export)] == [4, 4, 8]


def test_main_prints_one_line_and_exits_with_two(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mpqdm-fx", "inspect", "nowhere"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("error: nowhere")
