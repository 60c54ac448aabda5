import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import flip

from mpqdm_fx.calibration.records import RecordedInputs
from mpqdm_fx.errors import ArtifactError, CalibrationError


def _calls(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(count)
    return [
        {
            "sample": torch.randn(2, 3, generator=generator),
            "timestep": torch.tensor([index]),
            "added": {"ids": torch.arange(index + 1), "pair": (torch.ones(1), torch.zeros(2))},
        }
        for index in range(count)
    ]


def _equal(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    return type(left) is type(right) and all(map(_equal, left, right))


@settings(max_examples=20)
@given(count=st.integers(0, 14), memory=st.integers(1, 600))
def test_what_went_in_comes_out_in_order_whatever_the_memory_limit(count, memory):
    records, calls = RecordedInputs(memory=memory), _calls(count)
    for call in calls:
        records.append(call)
    assert len(records) == count
    for _ in range(2):  # iterating again gives the same
        assert all(map(_equal, list(records), calls))


def test_beyond_the_limit_calls_move_to_shards_and_memory_stays_bounded(tmp_path):
    records = RecordedInputs(memory=4000, directory=tmp_path)
    for _ in range(10):
        records.append({"x": torch.zeros(300)})  # 1200 bytes each
    assert len(records.shards) == 2
    assert len(list(records)) == 10
    assert {path.parent.parent for path in records.shards} == {tmp_path}
    records = None  # and its folder goes with it
    assert list(tmp_path.iterdir()) == []


def test_two_records_in_one_folder_do_not_write_over_each_other(tmp_path):
    first, second = (RecordedInputs(memory=1, directory=tmp_path) for _ in range(2))
    first.append({"x": torch.zeros(3)})
    second.append({"x": torch.ones(3)})
    assert torch.equal(next(iter(first))["x"], torch.zeros(3))


def test_a_shard_that_was_changed_meanwhile_is_refused(tmp_path):
    records = RecordedInputs(memory=1, directory=tmp_path)
    records.append({"x": torch.zeros(3)})
    (shard,) = records.shards
    flip(shard, -1)
    with pytest.raises(ArtifactError, match=r"inputs-00000\.safetensors is corrupted"):
        list(records)
    shard.unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        list(records)


def test_recorded_tensors_do_not_follow_the_callers_buffer():
    records, buffer = RecordedInputs(), torch.zeros(3)
    records.append({"x": buffer})
    buffer.fill_(7)
    assert torch.equal(next(iter(records))["x"], torch.zeros(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_are_refused_by_name_and_leave_the_record_as_it_was(bad):
    records = RecordedInputs()
    with pytest.raises(CalibrationError, match=r"'sample'.*NaN or infinity"):
        records.append({"timestep": torch.tensor([1]), "sample": torch.tensor([bad])})
    assert len(records) == 0
