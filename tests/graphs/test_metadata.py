"""What a graph says of itself: read back as it was written, and one error that names the entry where it is damaged."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.damage import UNREADABLE, Place, find, places, replaced, truncated, without, wrong_for

from repvgg_deploy.artifacts import Precision, Preprocessing, Provenance
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.graphs.metadata import METADATA_PREFIX, make_metadata, read_metadata

KNOWN = Provenance(
    "a" * 64, "RepVGG-A0", "official", "train", Precision.INT8, Preprocessing(), ("cat", "døg"), {"torch": "2.6"},
    {"classes": 2, "assumed": {"strides": {"value": [2, 2], "source": "assumed"}}},
)  # fmt: skip
PROPERTIES = make_metadata(KNOWN)
JSON = sorted(key for key in PROPERTIES if PROPERTIES[key][:1] in "[{" or key.endswith("classes"))
VALUES = json.loads(PROPERTIES[METADATA_PREFIX + "preprocessing"])
NEEDED = ("sha256", "arch", "precision")


def refused(properties: dict[str, str], *said: str) -> None:
    with pytest.raises(GraphError) as raised:
        read_metadata(properties)
    message = raised.value.message
    assert all(text in message for text in said), message
    assert message.isprintable()
    assert raised.value.hint


def test_metadata_read_back_as_they_were_written() -> None:
    assert read_metadata(PROPERTIES) == KNOWN
    assert read_metadata({**PROPERTIES, "another tool's": "{"}) == KNOWN
    assert read_metadata({"another tool's": "x"}) is None


@pytest.mark.parametrize("key", PROPERTIES)
def test_an_entry_may_be_missing(key: str) -> None:
    found = read_metadata({name: value for name, value in PROPERTIES.items() if name != key})
    if key.removeprefix(METADATA_PREFIX) in NEEDED:
        assert found is None, "without these nobody can tell that this tool made the graph"
    else:
        assert found is not None


@pytest.mark.parametrize("key", JSON)
def test_an_entry_that_is_no_json_is_named(key: str) -> None:
    name = key.removeprefix(METADATA_PREFIX)
    for content in [*UNREADABLE, *truncated(PROPERTIES[key].encode())[:-1]]:
        refused({**PROPERTIES, key: content.decode("latin-1")}, name)
    refused({**PROPERTIES, key: '"\ud800"'}, name)


@pytest.mark.parametrize("place", list(places(VALUES)), ids=lambda place: ".".join(map(str, place)))
def test_a_field_of_the_preprocessing_cannot_be_wrong(place: Place) -> None:
    key = METADATA_PREFIX + "preprocessing"
    if place == ("scale",):
        return
    for wrong in wrong_for(find(VALUES, place)):
        refused({**PROPERTIES, key: json.dumps(replaced(VALUES, place, wrong))}, "preprocessing")
    changed: Any = without(VALUES, place)
    if place in (("interpolation",), ("color_order",)):
        assert isinstance(Preprocessing.from_json(json.dumps(changed)), Preprocessing)
    else:
        with pytest.raises(DeployError, match=r"mean has . values and std .|missing"):
            Preprocessing.from_json(json.dumps(changed))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("precision", "fp99"), ("arch", "x\nerror: forged"), ("form", "\x1b[2J"), ("classes", '"many"'),
        ("classes", "-1"), ("classes", "1e400"), ("class_names", "3"), ("class_names", "[3]"), ("tools", "[]"),
        ("tools", '{"torch": 2}'), ("assumed", "NaN"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(key: str, value: str) -> None:
    refused({**PROPERTIES, METADATA_PREFIX + key: value}, key)
