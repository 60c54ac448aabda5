"""The table of settings knows every setting of every UNet, and of transformers, of diffusers."""

import importlib
import inspect
import pkgutil

import diffusers
import pytest
import torch
from diffusers import ModelMixin, UNetControlNetXSModel
from diffusers.models import unets
from zoo_more_unets import OTHER_UNETS
from zoo_transformers import TRANSFORMERS
from zoo_unets import UNETS_1D, UNETS_2D, UNETS_2D_CONDITION

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.sources.config_fields import CLASSES, FIELDS, INNER, check_fields, inputs_of_field
from mpqdm_fx.sources.example_inputs import ModelInputs
from mpqdm_fx.sources.transformer_inputs import TRANSFORMER_FIELDS

#: Holds modules for other UNets; it has no forward of its own.
PARTS = {"MotionAdapter"}


def unet_classes():
    classes = {"UNetControlNetXSModel": UNetControlNetXSModel}
    for info in pkgutil.iter_modules(unets.__path__, f"{unets.__name__}."):
        if "flax" in info.name:
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            is_local = isinstance(value, type) and value.__module__ == info.name
            if is_local and issubclass(value, ModelMixin) and name not in PARTS:
                classes[name] = value
    return classes


UNETS = unet_classes()
MODELS = UNETS | {name: getattr(diffusers, name) for name in TRANSFORMER_FIELDS}
SETTINGS = {
    name: [setting for setting in inspect.signature(unet.__init__).parameters if setting != "self"]
    for name, unet in MODELS.items()
}


def test_the_table_has_the_unet_classes_of_diffusers_and_its_transformers():
    assert set(CLASSES) == set(MODELS)
    assert len(UNETS) >= 12


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_gives_inputs_that_forward_takes_or_is_inside(name):
    arguments = inspect.signature(MODELS[name].forward).parameters
    for setting in SETTINGS[name]:
        inputs = inputs_of_field(name, setting)
        assert inputs is not None, f"{name} has a setting {setting}: say what it does"
        assert all(argument.partition(".")[0] in arguments for argument in inputs), (
            setting,
            inputs,
        )


def test_the_table_has_no_setting_that_no_class_has():
    known = {setting for settings in SETTINGS.values() for setting in settings}
    assert {*FIELDS, *INNER} <= known
    assert all(set(fields) <= set(SETTINGS[name]) for name, fields in CLASSES.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_setting_that_nobody_knows_is_refused_by_name(name):
    known = dict.fromkeys(SETTINGS[name], None)
    check_fields(name, known | {"_class_name": name})
    with pytest.raises(ConfigError, match=f"{name} has a setting 'depth_cond_dim'"):
        check_fields(name, known | {"depth_cond_dim": None})


def test_a_class_without_a_row_is_refused_by_name():
    with pytest.raises(ConfigError, match="Flux2Transformer2DModel"):
        check_fields("Flux2Transformer2DModel", {})


KNOWN = [case for case in TRANSFORMERS if case.name.partition("/")[0] in TRANSFORMER_FIELDS]
CASES = {
    case.name: case for case in (*UNETS_1D, *UNETS_2D, *UNETS_2D_CONDITION, *OTHER_UNETS, *KNOWN)
}
#: What no config asks for, but a caller may give.
OPTIONAL = {
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "encoder_attention_mask",
    "conditioning_scale",
}


def leaves(value, name=""):
    """Tensors of nested dicts, by dotted name."""
    if isinstance(value, dict):
        tensors = {}
        for key, entry in value.items():
            tensors |= leaves(entry, f"{name}.{key}" if name else key)
        return tensors
    return {name: value} if isinstance(value, torch.Tensor) else {}


def small_inputs(case):
    model = case.model()
    config = dict(model.config)
    if config.get("sample_size", 0) == 65536:
        config["sample_size"] = 16  # a short sound
    inputs = ModelInputs(class_name=type(model).__name__, config=config)
    return model, inputs.example()


def replaced(call, name, value):
    first, _, rest = name.partition(".")
    return {**call, first: replaced(call[first], rest, value) if rest else value}


def flipped(value):
    """Another value of the same kind."""
    if value.dtype == torch.int64:
        return value.roll(1, 0) + 1 if value.ndim == 1 else (value + 1) % 2
    return 1 - value if bool(((value == 0) | (value == 1)).all()) else 0.5 * value.flip(0) + 0.3


@pytest.mark.parametrize("name", CASES)
def test_every_input_of_the_table_changes_what_the_model_predicts(name):
    case = CASES[name]
    model, call = small_inputs(case)
    required = {key for key in leaves(case.inputs(2, 500)) if key.partition(".")[0] not in OPTIONAL}
    unread = {key for key, value in call.items() if value is None}  # the class wants to be told
    assert required - unread <= {*leaves(call), "timestep"}
    with torch.no_grad():
        right = model(**call, return_dict=False)[0] if name != "UVit2DModel" else model(**call)
        for key, value in leaves(call).items():
            changed = replaced(call, key, flipped(value))
            output = (
                model(**changed, return_dict=False)[0]
                if name != "UVit2DModel"
                else model(**changed)
            )
            assert not torch.equal(output, right), f"{key} does not reach the model"
