"""The commands `bench` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from repvgg_deploy.cli.options import FiniteRange, json_option, path_argument
from repvgg_deploy.cli.progress import show_progress
from repvgg_deploy.errors import DeployError, ThresholdError

if TYPE_CHECKING:
    from repvgg_deploy.benchmark.record import Record
    from repvgg_deploy.benchmark.run import BenchRequest


_SECONDS = FiniteRange(min=0)


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, metavar="N", help="Images a run; repeat."
)
@click.option("--baseline", metavar="NAME", help="A net to compare with, run in the same way: resnet50, …, vgg16.")
@click.option("--backend", metavar="NAME", help="onnxruntime-cpu, torch-cuda, tensorrt, …; by default the file's own.")
@click.option(
    "--precision", metavar="P", help="fp32, fp16, int8; torch bf16, torch and engines tf32. By default the file's own."
)
@click.option("--form", type=click.Choice(["deploy", "training", "both"]), default="deploy", show_default=True)
@click.option("--mode", type=click.Choice(["eager", "compiled", "cuda-graph"]), default="eager", help="Of torch.")
@click.option("--channels-last", is_flag=True, help="NHWC in memory, of torch.")
@click.option("--transfers", is_flag=True, help="Count the copies to and from the GPU.")
@click.option("--streams", type=click.IntRange(min=1), default=1, show_default=True, help="Of an engine.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Of the CPU; the backend's choice by default.")
@click.option("--warmup", type=_SECONDS, default=0.2, show_default=True, metavar="S", help="Seconds that do not count.")
@click.option("--duration", type=_SECONDS, default=3.0, show_default=True, metavar="S", help="Seconds each at least.")
@click.option("--iterations", type=click.IntRange(min=1), default=10, show_default=True, help="Runs each at least.")
@click.option("--roofline", is_flag=True, help="Measure the machine's ceilings, and the share that is reached.")
@click.option("--profile", is_flag=True, help="Time every layer of a graph or an engine.")
@click.option("--input", "source", type=(click.Choice(["jpeg"]), click.Path(path_type=Path)), metavar="jpeg DIR",
              help="Measure from the files in DIR on, stage by stage.")  # fmt: skip
@click.option("--suite", type=click.Path(path_type=Path), metavar="FILE", help="A sweep; see bench/suites.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the result; a suite that was stopped goes on.")  # fmt: skip
@click.option("--min-images-per-sec", type=float, metavar="R", help="Fail where a model is slower.")
@click.option("--min-ratio", type=float, metavar="R", help="Fail where a ratio to the baseline is lower.")
@json_option
def bench(
    models: tuple[str, ...],
    output: Path | None,
    min_images_per_sec: float | None,
    min_ratio: float | None,
    source: tuple[str, Path] | None,
    profile: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Throughput and latency of models, measured side by side.

    MODEL is an engine, an ONNX graph, a checkpoint, or the name of an architecture, which gets seeded weights. All
    models take turns; the ratio to the baseline comes with its confidence interval. docs/method.md says how.
    """
    if bool(models) == (options["suite"] is not None):
        raise click.UsageError("give models, or --suite FILE")
    if min_ratio is not None and options["baseline"] is None and options["suite"] is None:
        raise click.UsageError("--min-ratio needs --baseline")
    if source is not None:
        _bench_files(models, source[1], options, as_json)
        return
    if profile:
        _profile(models, options, as_json)
        return
    record = _measure(models, output, options)
    if as_json:
        from repvgg_deploy.cli import output as report

        report.print_json(record)
    else:
        _print_record(record)
    _require(record, min_images_per_sec, min_ratio)


def _measure(models: tuple[str, ...], output: Path | None, options: dict[str, Any]) -> Record:
    from repvgg_deploy.benchmark.record import read_record, write_record
    from repvgg_deploy.benchmark.run import run_benchmark
    from repvgg_deploy.benchmark.suites import load_suite

    if output is not None and output.is_dir():
        raise DeployError(f"{output} is a directory", "give the name of the file to write: -o result.json")
    suite = options["suite"]
    request = load_suite(suite) if suite is not None else _request(models, options)
    earlier = read_record(output) if suite is not None and output is not None and output.is_file() else None

    def save(record: Record) -> None:
        if output is not None:
            write_record(record, output)

    with show_progress() as progress:
        return run_benchmark(request, progress, earlier, save)


def _request(models: tuple[str, ...], options: dict[str, Any]) -> BenchRequest:
    from repvgg_deploy.benchmark.cases import Entry
    from repvgg_deploy.benchmark.measure import MeasureOptions
    from repvgg_deploy.benchmark.run import BenchRequest, Group

    forms = ("training", "deploy") if options["form"] == "both" else (options["form"],)
    names = ("backend", "precision", "mode", "channels_last", "transfers", "streams", "threads")
    how = {name: options[name] for name in names}
    entries = tuple(Entry(model=model, form=form, **how) for model in models for form in forms)
    measured = MeasureOptions(
        warmup_s=options["warmup"], min_duration_s=options["duration"], min_iterations=options["iterations"]
    )
    groups = tuple(Group(f"batch {n}", entries, n, options["baseline"]) for n in options["batches"] or (1,))
    return BenchRequest("bench", groups, measured, options["roofline"])


def _print_record(record: Record) -> None:
    from repvgg_deploy.cli import output as report

    columns = ["model", "form", "backend", "precision", "batch", "images/s", "p50 ms", "p90", "p99", "compute", "note"]
    rows = [
        [
            r["model"], r["form"], f"{r['backend']} {r['backend_version']}", r["precision"], r["batch"],
            _digits(r["images_per_sec"]), *(_digits(r["latency_ms"][p]) for p in ("p50", "p90", "p99")),
            _digits(r["compute_ms"]), ", ".join(filter(None, [r["mode"], "unstable" if r["unstable"] else ""])),
        ]
        for r in record["results"]
    ]  # fmt: skip
    if len({r.get("input") for r in record["results"]}) > 1:
        columns.insert(4, "input")
        for row, result in zip(rows, record["results"], strict=True):
            row.insert(4, result.get("input") or "–")
    report.print_table(columns, rows)
    points = [[r["model"], r["batch"], r["precision"], r["roofline"]] for r in record["results"] if r["roofline"]]
    if points:
        click.echo()
        columns = ["model", "batch", "precision", "TFLOP/s", "attainable", "share", "bound by"]
        report.print_table(
            columns,
            [
                [m, b, p, _digits(x["tflops"]), _digits(x["attainable_tflops"]), f"{x['share']:.0%}", x["bound"]]
                for m, b, p, x in points
            ],
        )
    if record["ratios"]:
        click.echo()
        columns = ["model", "form", "baseline", "precision", "batch", "ratio", "95 % interval"]
        report.print_table(
            columns,
            [
                [
                    r["model"], r["form"],
                    r["baseline"] + (" (training form)" if r["baseline_form"] == "training" else ""),
                    r["precision"], r["batch"], f"{r['ratio']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}",
                ]
                for r in record["ratios"]
            ],
        )  # fmt: skip


def _digits(value: float) -> float:
    """Four significant digits, for a table."""
    return float(f"{value:.4g}")


def _require(record: Record, min_images_per_sec: float | None, min_ratio: float | None) -> None:
    baselines = {ratio["baseline"] for ratio in record["ratios"]}
    slow = [
        r for r in record["results"]
        if min_images_per_sec is not None and r["model"] not in baselines and r["images_per_sec"] < min_images_per_sec
    ]  # fmt: skip
    if slow:
        worst = min(slow, key=lambda r: float(r["images_per_sec"]))
        raise ThresholdError(
            f"{worst['model']} at batch {worst['batch']} does {worst['images_per_sec']:.1f} images/s,"
            f" below the {min_images_per_sec:g} asked for",
            "look for other load on the machine, and at the note in the table",
        )
    if min_ratio is None:
        return
    compared = [r for r in record["ratios"] if r["model"] != r["baseline"]]
    if not compared:
        raise ThresholdError("no ratio to the baseline was measured", "no model runs as the baseline does")
    least = min(compared, key=lambda r: float(r["ratio"]))
    if least["ratio"] < min_ratio:
        raise ThresholdError(
            f"{least['model']} at batch {least['batch']} is {least['ratio']:.3f} times as fast as {least['baseline']},"
            f" below the {min_ratio:g} asked for",
            "look for other load on the machine, and at the interval in the table",
        )


def _profile(models: Sequence[str], options: dict[str, Any], as_json: bool) -> None:
    from repvgg_deploy.benchmark.layer_profile import profile_engine, profile_graph
    from repvgg_deploy.cli import output as report
    from repvgg_deploy.runtime.model import is_engine

    if options["suite"] is not None or len(models) != 1 or len(options["batches"]) > 1:
        raise click.UsageError("--profile takes one model and one batch size")
    path, batch = Path(models[0]), (options["batches"] or (1,))[0]
    if is_engine(path):
        profiled = profile_engine(path, batch, options["duration"])
    else:
        profiled = profile_graph(path, batch, options["threads"], options["duration"])
    if as_json:
        report.print_json(profiled.to_dict())
        return
    columns = ["layer", "operator", "ms", "share", "GFLOP/s", "GB/s"]
    rows = [
        [
            layer.name, layer.operator, _digits(layer.milliseconds), f"{layer.share:.1%}",
            "–" if layer.cost is None else _digits(layer.cost.flops / layer.milliseconds / 1e6),
            "–" if layer.cost is None else _digits(layer.cost.bytes / layer.milliseconds / 1e6),
        ]
        for layer in profiled.layers
    ]  # fmt: skip
    report.print_table(columns, rows)


def _bench_files(models: Sequence[str], folder: Path, options: dict[str, Any], as_json: bool) -> None:
    from repvgg_deploy.benchmark.from_files import measure_end_to_end
    from repvgg_deploy.cli import output as report

    if options["suite"] is not None:
        raise click.UsageError("--input takes models, no suite")
    found = [
        measure_end_to_end(Path(model), folder, batch, options["duration"])
        for batch in options["batches"] or (1,)
        for model in models
    ]
    if as_json:
        report.print_json({"end_to_end": [result.to_dict() for result in found]})
        return
    columns = ["model", "input", "batch", "images/s", "decode", "resize", "prepare", "transfer", "inference", "limit"]
    rows = [
        [
            r.model, r.input_type, r.batch, _digits(r.images_per_sec),
            *(_digits(r.stages[name]) if name in r.stages else "–" for name in columns[4:-1]), r.limit,
        ]
        for r in found
    ]  # fmt: skip
    report.print_table(columns, rows, title="images/s of the whole, and of each stage by itself")


@click.command(name="report")
@path_argument("results", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE.html")
@click.option("--plots", type=click.Path(path_type=Path), metavar="DIR", help="Also write the plots, PNG and SVG.")
@click.option("--baseline", default="ResNet-50", show_default=True, metavar="NAME", help="Of the ratios.")
@json_option
def report_(results: tuple[Path, ...], output: Path, plots: Path | None, baseline: str, as_json: bool) -> None:
    """An HTML page with tables and plots from results of `bench -o`.

    The page is one file. Beside it lies a Markdown table, FILE.md, for a README.
    """
    from repvgg_deploy.benchmark.record import read_record
    from repvgg_deploy.benchmark.report.html import write_report
    from repvgg_deploy.cli import output as report

    if output.suffix.lower() not in (".html", ".htm"):
        raise DeployError(f"{output} is no HTML file", "-o report.html")
    records = [read_record(path) for path in results]
    known = {ratio["baseline"] for record in records for ratio in record["ratios"]}
    asked = click.get_current_context().get_parameter_source("baseline") is not ParameterSource.DEFAULT
    if asked and baseline not in known:
        names = ", ".join(sorted(known)) or "none"
        raise DeployError(f"the results have no ratio to {baseline!r}", f"they have ratios to: {names}")
    written = write_report(records, output, plots, baseline)
    if as_json:
        report.print_json({"files": [str(path) for path in written]})
    else:
        for path in written:
            click.echo(str(path))
