"""One reader: format, version, digest, keys and types, each refused with file, field and remedy."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.schema import Format, Ratio, Strict, Whole, plain, read_as, read_listed, validated
from mpqdm_fx.io.sealed import Entry, SealedFolder, seal


@dataclass(frozen=True, kw_only=True)
class Layer:
    name: str
    bits: Annotated[int, Field(ge=1)] = 4
    sqnr_db: Ratio = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        if self.name == "none":
            raise ConfigError("no layer is called so")


class Stored(Strict):
    stored_as: ClassVar[Format] = Format(
        name="layers", noun="file of layers", oldest=2, newest=4, sealed_from=3
    )

    format: str
    version: int
    layers: tuple[Annotated[Layer, Whole(lacking=("note",))], ...]


LAYER = {"name": "conv", "bits": 3, "sqnr_db": "inf", "note": "wide"}


def content(version: Any = 2, **changes: Any) -> dict[str, Any]:
    return {"format": "layers", "version": version, "layers": [LAYER], **changes}


@pytest.mark.parametrize("data", [content(2), seal(content(3)), seal(content(4))])
def test_a_file_is_read_as_the_records_of_which_it_was_made(tmp_path, data):
    (tmp_path / "layers.json").write_text(json.dumps(data))
    read = read_as(Stored, tmp_path / "layers.json")
    assert read.layers == (Layer(name="conv", bits=3, sqnr_db=float("inf"), note="wide"),)
    folder = SealedFolder(
        tmp_path, {"layers.json": Entry.of(tmp_path / "layers.json").to_dict()}, "manifest"
    )
    assert read_listed(Stored, folder, "layers.json") == read
    assert plain(vars(read.layers[0])) == LAYER


def test_only_what_older_files_lack_may_be_missing():
    older = {key: value for key, value in LAYER.items() if key != "note"}
    assert validated(Stored, content(layers=[older]), "file").layers[0].note == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "is no file of layers"),
        (content(format="others"), "is no file of layers"),
        (content("2"), "format version '2'"),
        (content(5), "reads up to 4; update"),
        (content(1), "format version 1, this package reads from 2 on"),
        (content(3), "digest"),
        (seal(content(3)) | {"layers": []}, "digest"),
        (content(other=1), "is damaged: other: Extra"),
        (content(layers=[{**LAYER, "other": 1}]), r"layers\.0\.other: Unexpected"),
        (content(layers=[{"name": "conv", "sqnr_db": 1.0}]), r"layers\.0\.bits: Field required"),
        (content(layers=[{**LAYER, "bits": 0}]), r"layers\.0\.bits: .*greater"),
        (content(layers=[{**LAYER, "bits": True}]), r"layers\.0\.bits: .*integer"),
        (content(layers=[{**LAYER, "bits": "3"}]), r"layers\.0\.bits: .*integer"),
        (content(layers=[{**LAYER, "name": "none"}]), r"layers\.0: no layer is called so"),
    ],
)
def test_what_does_not_fit_is_refused_with_file_field_and_remedy(data, message):
    with pytest.raises(ArtifactError, match=rf"^file .*{message}") as refusal:
        validated(Stored, data, "file", fix="write it anew")
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith(("; write it anew", "; update mpqdm-fx"))
