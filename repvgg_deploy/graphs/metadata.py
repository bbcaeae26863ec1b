"""Where a graph comes from, as its `metadata_props`."""

from __future__ import annotations

import json
from collections.abc import Mapping

import repvgg_deploy
from repvgg_deploy.artifacts import Precision, Preprocessing, Provenance
from repvgg_deploy.errors import GraphError

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
        GraphError: the metadata are this tool's, and damaged.
    """
    values = {k.removeprefix(METADATA_PREFIX): v for k, v in properties.items() if k.startswith(METADATA_PREFIX)}
    known = {"version", "sha256", "arch", "layout", "form", "precision", "tools", "preprocessing", "class_names"}
    if not {"sha256", "arch", "precision"} <= values.keys():
        return None
    try:
        return Provenance(
            sha256=values["sha256"],
            arch=values["arch"],
            layout=values.get("layout", ""),
            form=values.get("form", ""),
            precision=Precision(values["precision"]),
            preprocessing=Preprocessing.from_json(values["preprocessing"]) if "preprocessing" in values else None,
            class_names=tuple(json.loads(values["class_names"])) if "class_names" in values else None,
            tools=json.loads(values.get("tools", "{}")),
            extra={key: json.loads(value) for key, value in values.items() if key not in known},
        )
    except (ValueError, TypeError, KeyError) as error:
        raise GraphError(f"the graph's metadata are damaged ({error})", "export it again") from error
