"""What each command shows to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from repvgg_deploy.cli.output import print_fields, print_table
from repvgg_deploy.files.printable import printable

if TYPE_CHECKING:
    from repvgg_deploy.benchmark.from_files import EndToEnd
    from repvgg_deploy.benchmark.layer_profile import Profile
    from repvgg_deploy.quantization.layer_report import LayerRow
    from repvgg_deploy.workflows.choices import Choices
    from repvgg_deploy.workflows.demo import DemoResult
    from repvgg_deploy.workflows.doctor import Row
    from repvgg_deploy.workflows.evaluate import Evaluation
    from repvgg_deploy.workflows.export_all import ExportAllResult
    from repvgg_deploy.workflows.export_result import CheckpointExportResult

__all__ = [
    "print_archs", "print_comparison", "print_demo", "print_description", "print_end_to_end", "print_evaluation",
    "print_export", "print_export_all", "print_fields", "print_parts", "print_profile", "print_record",
]  # fmt: skip


def print_export(result: CheckpointExportResult, layers: bool, images: str) -> None:
    """What an export wrote, and how every stage compares with the one before on `images`."""
    print(f"Each stage compared with the one before, on {printable(images)}:")
    rows = [
        [stage, p.images, p.max_abs, p.relative, f"{p.cosine:.8f}", f"{p.top1_agreement:.1f} %"]
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
        if q.full_range:
            print("int8: activations up to 255, for ONNX Runtime and OpenVINO; no engine can be built from it")
        if layers:
            print_layers(q.layers)
    size = result.onnx.stat().st_size / 1e6
    print(f"{printable(str(result.onnx), 5000)}  {size:.1f} MB, {result.arch}, {result.seconds:.1f} s")
    if result.engine is not None and result.plan is not None:
        plan = result.plan
        print(f"{printable(str(plan), 5000)}  {plan.stat().st_size / 1e6:.1f} MB, {result.engine.side.label}")
    print()
    _print_choices(result.choices)


def print_export_all(result: ExportAllResult, layers: bool) -> None:
    """The precisions side by side, the files, and what decided the settings."""
    from repvgg_deploy.workflows.export_all import COLUMNS

    print(f"Accuracy, and agreement with fp32, on {result.images};")
    speeds = result.speeds
    print(f"speed in {speeds.backend} at batch {speeds.batch}, {speeds.duration_s:g} s each, in turn:")
    print_table(COLUMNS, [row.show() for row in result.rows.values()])
    for one in result.results:
        if layers and one.quantization is not None:
            print_layers(one.quantization.layers)
        print(one.onnx)
        if one.engine is not None:
            print(one.onnx.parent / one.engine.plan.name)
    print(f"{result.card}  {result.first.arch}, {result.seconds:.1f} s")
    print()
    _print_choices(result.first.choices)


def print_description(description: Mapping[str, Any]) -> None:
    """What a file is."""
    from repvgg_deploy.workflows.choices import recorded_choices

    labels = {"flops": "multiply-adds", "flops_deploy": "multiply-adds deploy", "input_size": "height, width px"}
    provenance = description.get("provenance") or {}
    extra = provenance.get("extra")
    recorded = {**provenance, **extra, "extra": None} if isinstance(extra, Mapping) else dict(provenance)
    choices = description.get("assumed") or recorded_choices(recorded.get("assumed"))
    own = {name: value for name, value in description.items() if name not in ("assumed", "provenance")}
    print_fields({labels.get(name, name): value for name, value in own.items()})
    if recorded:
        print()
        labels = {"sha256": "checkpoint sha256", "version": "made by repvgg-deploy"}
        # The choices say all of the preprocessing, and what decided it.
        hidden = ("assumed", "preprocessing") if choices else ()
        print_fields({labels.get(name, name): value for name, value in recorded.items() if name not in hidden})
    if choices:
        print()
        _print_choices(choices)


def _print_choices(choices: Choices) -> None:
    """What no tensor tells, one setting per line, and what decided it."""
    from repvgg_deploy.workflows.choices import list_choices

    print_fields(list_choices(choices))


def print_layers(layers: Sequence[LayerRow]) -> None:
    """One row per quantized layer; signal-to-noise ratios in dB."""
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


def print_archs(rows: Sequence[dict[str, Any]]) -> None:
    """The table of cards."""
    columns = [
        "arch", "top-1 %", "params M", "deploy M", "FLOPs G", "deploy G", "size px", "groups", "blocks", "widths",
    ]  # fmt: skip
    table = [
        [
            row["arch"],
            "–" if row["top1"] is None else f"{row['top1']:.2f}",
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['parameters_deploy'] / 1e6:.2f}",
            f"{row['flops'] / 1e9:.2f}",
            f"{row['flops_deploy'] / 1e9:.2f}",
            row["input_size"],
            row["groups"],
            ",".join(map(str, row["blocks"])),
            ",".join(map(str, row["widths"])),
        ]
        for row in rows
    ]
    print_table(columns, table)


def print_comparison(values: Mapping[str, Any]) -> None:
    """How two models differ, without what cannot be told of their outputs."""
    agreement = values.get("top1_agreement")
    shown = {("top-1 agreement" if name == "top1_agreement" else name): value for name, value in values.items()}
    print_fields({**shown, "top-1 agreement": None if agreement is None else f"{agreement:.1f} %"})


def print_evaluation(result: Evaluation) -> None:
    """The accuracy of a model."""
    print_fields(
        {
            "model": result.model,
            "run by": f"{result.backend}, {result.precision}",
            "images": result.images,
            "left out": len(result.broken) or None,
            "top-1": f"{result.top1:.2f} %",
            "top-5": None if result.top5 is None else f"{result.top5:.2f} %",
            "speed": f"{result.images_per_sec:,.1f} images/s, decoding included",
        }
    )


def print_demo(result: DemoResult) -> None:
    """The forms of the demo model side by side."""
    rows = [
        [
            row.form,
            f"{row.backend} {row.precision}",
            f"{row.top1:.2f}",
            f"{row.images_per_sec:,.0f}",
            f"{row.ratio:.2f}",
            "" if row.relative is None else f"{row.relative:.1e}",
            "" if row.megabytes is None else f"{row.megabytes:.2f}",
        ]
        for row in result.rows
    ]
    print_table(["form", "run by", "top-1 %", "images/s", "x training", "relative error", "MB"], rows)
    click.echo(f"{result.images} synthetic images, batch {result.batch}, {result.seconds:.0f} s in all")
    for path in result.files:
        click.echo(path)


def print_parts(rows: Sequence[Row]) -> None:
    """What the parts of a machine can do, and what would make the others work."""
    words = {True: "yes", False: "no", None: ""}
    table = [[r.part, r.version, words[r.can_build], words[r.can_run], r.detail, r.missing] for r in rows]
    print_table(["part", "version", "builds", "runs", "what", "missing"], table)
    for row in rows:
        if row.hint:
            click.echo(f"{row.part}: {row.hint}")


def print_record(record: dict[str, Any]) -> None:
    """The results of a benchmark, the share of the machine's ceilings, and the ratios to the baseline."""
    results = record["results"]
    columns = [
        "model", "form", "backend", "precision", "batch", "images/s", "p50 ms", "p90 ms", "p99 ms", "compute ms",
        "note",
    ]  # fmt: skip
    rows = [
        [
            r["model"], r["form"], f"{r['backend']} {r['backend_version']}", r["precision"], r["batch"],
            _digits(r["images_per_sec"]), *(_digits(r["latency_ms"][p]) for p in ("p50", "p90", "p99")),
            _digits(r["compute_ms"]),
            ", ".join(filter(None, [r["mode"], "unstable" if r["unstable"] else "", *r.get("notes", ())])),
        ]
        for r in results
    ]  # fmt: skip
    if len({r.get("input") for r in results}) > 1:
        columns.insert(4, "input")
        for row, result in zip(rows, results, strict=True):
            row.insert(4, result.get("input") or "–")
    print_table(columns, rows, shorten=("model",))
    points = [[r["model"], r["batch"], r["precision"], r["roofline"]] for r in results if r["roofline"]]
    if points:
        click.echo()
        columns = ["model", "batch", "precision", "TFLOP/s", "attainable TFLOP/s", "share", "bound by"]
        rows = [
            [m, b, p, _digits(x["tflops"]), _digits(x["attainable_tflops"]), f"{x['share']:.0%}", x["bound"]]
            for m, b, p, x in points
        ]
        print_table(columns, rows, shorten=("model",))
    if record["ratios"]:
        click.echo()
        columns = ["model", "form", "baseline", "precision", "batch", "ratio", "95 % interval"]
        rows = [
            [
                r["model"], r["form"],
                r["baseline"] + (" (training form)" if r["baseline_form"] == "training" else ""),
                r["precision"], r["batch"], f"{r['ratio']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}",
            ]
            for r in record["ratios"]
        ]  # fmt: skip
        print_table(columns, rows, shorten=("model",))


def print_profile(profile: Profile) -> None:
    """The time of each layer, and what it does in that time."""
    columns = ["layer", "operator", "ms", "share", "GFLOP/s", "GB/s"]
    rows = [
        [
            layer.name, layer.operator, _digits(layer.milliseconds), f"{layer.share:.1%}",
            "–" if layer.cost is None else _digits(layer.cost.flops / layer.milliseconds / 1e6),
            "–" if layer.cost is None else _digits(layer.cost.bytes / layer.milliseconds / 1e6),
        ]
        for layer in profile.layers
    ]  # fmt: skip
    print_table(columns, rows, shorten=("layer",))


def print_end_to_end(found: Sequence[EndToEnd]) -> None:
    """Images per second of the whole way from the files, and of each stage by itself."""
    columns = ["model", "input", "batch", "images/s", "decode", "resize", "prepare", "transfer", "inference", "limit"]
    rows = [
        [
            r.model, r.input_type, r.batch, _digits(r.images_per_sec),
            *(_digits(r.stages[name]) if name in r.stages else "–" for name in columns[4:-1]), r.limit,
        ]
        for r in found
    ]  # fmt: skip
    print_table(columns, rows, ("model",), title="images/s of the whole, and of each stage by itself")


def _digits(value: float) -> float:
    """Four significant digits, for a table."""
    return float(f"{value:.4g}")
