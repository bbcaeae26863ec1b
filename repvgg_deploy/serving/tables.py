"""Predictions as Arrow tables, for Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from repvgg_deploy.errors import DeployError


def import_pyarrow() -> ModuleType:
    """The module `pyarrow`, with `pyarrow.parquet`.

    Raises:
        DeployError: the package is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DeployError(
            "pyarrow is not installed, which Parquet files need", "pip install 'repvgg-deploy[serve]'"
        ) from error
    module: ModuleType = pyarrow
    return module


def prediction_schema() -> Any:
    """The columns of a table of predictions; those that were not requested are null."""
    arrow = import_pyarrow()
    floats = arrow.list_(arrow.float32())
    return arrow.schema(
        [
            ("path", arrow.string()),
            ("classes", arrow.list_(arrow.int32())),
            ("names", arrow.list_(arrow.string())),
            ("scores", floats),
            ("logits", floats),
            ("features", floats),
            ("error", arrow.string()),
        ]
    )


def make_table(rows: Iterable[Mapping[str, Any]]) -> Any:
    """A table of predictions as `Prediction.to_dict` gives them."""
    texts = [{name: as_text(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
    return import_pyarrow().Table.from_pylist(texts, schema=prediction_schema())


def as_text(name: str) -> str:
    """A file's name with what is not UTF-8 in it as escapes, since Parquet and CSV hold text only."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
