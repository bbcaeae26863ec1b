"""A graph's file is read whole, or refused with one error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from helpers.engine_graphs import small_onnx

from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.reading import read_graph

MARK = "TEXT"


def test_a_graph_is_read_as_it_is(tmp_path: Path) -> None:
    path = small_onnx(tmp_path)
    assert read_graph(path).SerializeToString(deterministic=True) == onnx.load(path).SerializeToString(
        deterministic=True
    )


def name_a_node(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = MARK


def name_an_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = MARK


def name_an_edge(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = MARK


def name_a_dimension(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = MARK


def name_metadata(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key=MARK, value="")


def name_the_producer(model: onnx.ModelProto) -> None:
    model.producer_name = MARK


@pytest.mark.parametrize(
    "give_a_name",
    [name_a_node, name_an_operator, name_an_edge, name_a_dimension, name_metadata, name_the_producer],
    ids=lambda function: function.__name__,
)
def test_text_that_is_not_utf8_is_an_error_wherever_it_is(
    give_a_name: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    path = small_onnx(tmp_path)
    model = onnx.load(path)
    give_a_name(model)
    path.write_bytes(model.SerializeToString().replace(MARK.encode(), b"T\xff\xfeT"))
    with pytest.raises(GraphError, match="names that are not UTF-8"):
        read_graph(path)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x08\x08", b"text", b"\x08\x08:\xff\xff\xff\xff\x0f"])
def test_what_is_no_graph_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError) as raised:
        read_graph(path)
    assert raised.value.hint


def test_a_missing_graph_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="cannot read"):
        read_graph(tmp_path / "net.onnx")
