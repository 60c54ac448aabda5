"""Every UNet of diffusers, changed at run time, is loaded as it was saved or refused."""

import pytest
from changed_unets import CHANGES, REFUSED, assert_same_or_refused
from model_zoo import UNETS


@pytest.mark.matrix
@pytest.mark.parametrize("change", [None, *CHANGES], ids=lambda c: getattr(c, "__name__", "none"))
@pytest.mark.parametrize("case", UNETS, ids=lambda case: case.name)
def test_a_changed_unet_loads_with_the_same_bits_or_is_refused(case, change, tmp_path):
    model = case.model()
    if change is not None:
        change(model)
    loaded = assert_same_or_refused(model, case.inputs(2, 500), tmp_path / "model")
    assert loaded or getattr(change, "__name__", "none") in REFUSED
