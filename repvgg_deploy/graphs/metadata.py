"""Where a graph comes from, as its `metadata_props`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

import repvgg_deploy
from repvgg_deploy.artifacts import Precision, Preprocessing, Provenance
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.files.typed_values import Line, convert, parse_json

METADATA_PREFIX = "repvgg_deploy."


def make_metadata(provenance: Provenance) -> dict[str, str]:
    """The provenance as the `metadata_props` of a graph: every key begins with `repvgg_deploy.`."""
    values: dict[str, str] = {
        "version": repvgg_deploy.__version__,
        "sha256": provenance.sha256,
        "arch": provenance.arch,
        "layout": provenance.layout,
        "form": provenance.form,
        "precision": str(provenance.precision),
        "tools": json.dumps(provenance.tools, sort_keys=True),
    }
    if provenance.preprocessing is not None:
        values["preprocessing"] = provenance.preprocessing.to_json()
    if provenance.class_names is not None:
        values["class_names"] = json.dumps(list(provenance.class_names), ensure_ascii=False)
    values |= {key: json.dumps(value, sort_keys=True) for key, value in provenance.extra.items()}
    return {METADATA_PREFIX + key: value for key, value in values.items()}


def read_metadata(properties: Mapping[str, str]) -> Provenance | None:
    """The inverse of `make_metadata`; None for a graph that this tool did not make.

    Raises:
        GraphError: the metadata are this tool's, and damaged; the message names the entry.
    """
    texts = {k.removeprefix(METADATA_PREFIX): v for k, v in properties.items() if k.startswith(METADATA_PREFIX)}
    if not {"sha256", "arch", "precision"} <= texts.keys():
        return None
    texts.pop("version", None)
    try:
        preprocessing = Preprocessing.from_json(texts.pop("preprocessing")) if "preprocessing" in texts else None
        values = {key: value if key in _TEXTS else _parse(key, value) for key, value in texts.items()}
        known = convert(values, _Known, _NAME, _HINT)
    except DeployError as error:
        raise GraphError(error.message, error.hint) from error
    extra = {key: value for key, value in values.items() if key not in _FIELDS}
    return Provenance(
        known.sha256,
        known.arch,
        known.layout,
        known.form,
        known.precision,
        preprocessing,
        known.class_names,
        known.tools,
        extra,
    )


@dataclass(frozen=True)
class _Known:
    """The entries that a reader depends on."""

    sha256: Line
    arch: Line
    precision: Precision
    layout: Line = ""
    form: Line = ""
    class_names: tuple[str, ...] | None = None
    tools: dict[str, str] = field(default_factory=dict)
    classes: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None


_TEXTS = ("sha256", "arch", "layout", "form", "precision")
_FIELDS = (*_TEXTS, "class_names", "tools")
_NAME, _HINT = "the graph's metadata", "export it again"


def _parse(key: str, text: str) -> object:
    return parse_json(text.encode("utf-8", "surrogatepass"), f"{_NAME}: {key!r:.80}", _HINT)
