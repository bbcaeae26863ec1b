"""Results for people (tables) and for machines (one JSON object)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from repvgg_deploy.quantization.layer_report import LayerRow
    from repvgg_deploy.workflows.export_request import ExportResult

_PIPE_WIDTH = 160


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, and nothing else."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; numbers to the right. In a pipe it is plain text that no terminal's width cuts."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) or row[index] in ("", "–") for row in rows)
        table.add_column(name, justify="right" if numeric and rows else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(_format(value)) for value in row))
    console().print(table)


def print_fields(values: Mapping[str, Any]) -> None:
    """One `name value` a line on stdout; what is None is left out."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if value not in (None, "", [], {}):
            print(f"{name.replace('_', ' '):{width}}  {_describe(value)}")


def print_export(result: ExportResult, layers: bool) -> None:
    """What an export wrote, and how every stage compares with the one before."""
    rows = [
        [stage, p.images, p.max_abs, p.relative, f"{p.cosine:.8f}", f"{p.top1_agreement:.1%}"]
        for stage, p in result.parity.items()
    ]
    print_table(["stage", "images", "max abs", "relative", "cosine", "top-1 agreement"], rows)
    if result.rounding is not None:
        r = result.rounding
        print(f"fp16: {r.subnormal:,} of {r.values:,} weights are subnormal, {r.flushed_to_zero:,} became zero")
    if result.quantization is not None:
        q = result.quantization
        kept = [row.name for row in q.layers if row.kept_float]
        print(f"int8: recipe {q.recipe}, {q.calibrated_on}; kept in float: {', '.join(kept) or 'nothing'}")
        if layers:
            print_layers(q.layers)
    size = result.onnx.stat().st_size / 1e6
    print(f"{result.onnx}  {size:.1f} MB, {result.arch}, {result.seconds:.1f} s")
    if result.engine is not None:
        plan = result.onnx.parent / result.engine.plan.name
        print(f"{plan}  {plan.stat().st_size / 1e6:.1f} MB, {result.engine.side.label}")


def print_layers(layers: Sequence[LayerRow]) -> None:
    """One row a quantized layer; signal-to-noise ratios in dB."""
    columns = ["layer", "scale", "saturated", "weights dB", "activations dB", "output dB", "removed", "kept float"]
    table = [
        [
            row.name,
            "" if row.scale is None else f"{row.scale:.4g}",
            "" if row.saturation is None else f"{row.saturation:.3%}",
            "" if row.weights_db is None else f"{row.weights_db:.1f}",
            "" if row.activations_db is None else f"{row.activations_db:.1f}",
            f"{row.output_db:.1f}",
            row.removed_columns,
            "yes" if row.kept_float else "",
        ]
        for row in layers
    ]
    print_table(columns, table)


def _describe(value: Any) -> str:
    """A value in one line: `name value, …` of a mapping, without what it does not know; the items of a list."""
    if isinstance(value, Mapping):
        known = {k: v for k, v in value.items() if v not in (None, "", [], {})}
        return ", ".join(f"{k.replace('_', ' ')} {_describe(v)}" for k, v in known.items())
    if isinstance(value, list):
        if any(isinstance(item, Mapping) for item in value):
            return "; ".join(map(_describe, value))
        return ", ".join(map(str, value))
    return _format(value)


def console() -> Console:
    """The console of stdout: the terminal's own width, or a fixed one in a pipe."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:,.8g}"
    return str(value)
