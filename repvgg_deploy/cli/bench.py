"""The command `bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from repvgg_deploy.cli.command import Command, Outcome, option_group, show_progress
from repvgg_deploy.cli.config import config_options
from repvgg_deploy.cli.options import (
    PATH,
    flag,
    is_given,
    junit_option,
    output_options,
    preprocessing_options,
    take_preprocessing,
)
from repvgg_deploy.cli.startup import share_cores
from repvgg_deploy.cli.types import (
    BACKEND,
    BASELINE,
    PRECISION,
    FilePath,
    FiniteRange,
    ListOf,
    is_model_name,
    suggest_model,
)
from repvgg_deploy.errors import DeployError, LimitCheck, ThresholdError, first_failure

if TYPE_CHECKING:
    from repvgg_deploy.benchmark.record import Record
    from repvgg_deploy.benchmark.run import BenchRequest

_SECONDS = FiniteRange(min=0)
_LISTS = ("batch", "backend", "precision")
_PREPROCESSING = ("size", "resize", "mean", "std")
_ENTRY = ("backend", "precision", "form", "mode", "channels_last", "transfers", "streams", "threads")
_MEASURING = ("warmup", "duration", "iterations", "roofline")


@click.command(
    cls=Command,
    examples=(
        "repvgg-deploy bench net.fp16.plan --batch 1,8,128 --baseline resnet50",
        "repvgg-deploy bench A0 net.pth --backend onnxruntime-cpu --precision fp32,int8",
        "repvgg-deploy bench net.pth --form both --min-images-per-sec 100",
        "repvgg-deploy bench net.fp32.onnx --input jpeg images/ --size 192",
        "repvgg-deploy bench --suite bench/suites/cpu.toml -o cpu.json",
    ),
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@option_group(
    "Input",
    click.option("--form", type=click.Choice(["deploy", "training", "both"]), default="deploy",
                 help="Form of a checkpoint or an architecture."),
    click.option("--input", "source", type=(click.Choice(["jpeg"]), PATH), metavar="jpeg DIR",
                 help="Start from the image files in DIR, and time each stage."),
    click.option("--suite", type=PATH, metavar="FILE", help="Sweep to measure, in place of MODEL; see bench/suites."),
)  # fmt: skip
@config_options
@preprocessing_options
@option_group(
    "Backend",
    click.option("--backend", type=ListOf(BACKEND), multiple=True, metavar="NAME,…",
                 help="Backends: onnxruntime-cpu, torch-cuda, tensorrt, …  [default: the file's own]"),
    click.option("--precision", type=ListOf(PRECISION), multiple=True, metavar="P,…",
                 help="Precisions: fp32, fp16, int8; for torch bf16; for torch and engines tf32."
                      "  [default: the file's own]"),
    click.option("--mode", type=click.Choice(["eager", "compiled", "cuda-graph"]), default="eager",
                 help="How torch runs a model."),
    click.option("--channels-last/--channels-first", default=None,
                 help="NHWC or NCHW memory layout in torch.  [default: NHWC for fp16 and bf16 on a GPU]"),
    click.option("--transfers", is_flag=True, help="Include the copies to and from the GPU."),
    click.option("--streams", type=click.IntRange(min=1), default=1, metavar="N",
                 help="Concurrent CUDA streams (engines and torch on a GPU)."),
    click.option("--threads", type=click.IntRange(min=0), metavar="N",
                 help="CPU threads.  [default: the backend's choice]"),
)  # fmt: skip
@option_group(
    "Measuring",
    click.option("--batch", type=ListOf(click.IntRange(min=1)), multiple=True, metavar="N,…",
                 help="Batch sizes: 1,8 or --batch 1 --batch 8.  [default: 1]"),
    click.option("--baseline", type=BASELINE, metavar="NAME",
                 help="Model to compare with, run in the same way: resnet50, …, vgg16."),
    click.option("--warmup", type=_SECONDS, default=0.2, metavar="S", help="Seconds of warm-up."),
    click.option("--duration", type=_SECONDS, default=3.0, metavar="S", help="Shortest time per model, in seconds."),
    click.option("--iterations", type=click.IntRange(min=1), default=10, metavar="N", help="Fewest runs per model."),
    click.option("--roofline", is_flag=True, help="Also measure the machine's ceilings, and the share reached."),
    click.option("--profile", is_flag=True, help="Time each layer of one ONNX graph or engine instead."),
)  # fmt: skip
@option_group(
    "Limits",
    click.option("--min-images-per-sec", type=float, metavar="R", help="Smallest throughput of every model."),
    click.option("--min-ratio", type=float, metavar="R", help="Smallest ratio to the baseline."),
)
@option_group(
    "Output",
    click.option("-o", "--output", type=PATH, metavar="FILE",
                 help="Result file to write; a suite that was stopped continues from it."),
)  # fmt: skip
@junit_option
@output_options
def bench(models: tuple[str, ...], output: Path | None, **options: Any) -> Any:
    """Measure throughput and latency of models, side by side.

    MODEL is an engine, an ONNX graph, a checkpoint, or the name of an architecture, which gets seeded random weights.
    The models take turns, so that a slow moment of the machine slows all of them; the ratio to the baseline comes with
    its confidence interval. docs/method.md explains how.
    """
    for name in _LISTS:
        options[name] = tuple(dict.fromkeys(value for values in options[name] for value in values))
    _check_usage(models, output, options)
    if options["source"] is not None:
        return _bench_files(models, options)
    if options["profile"]:
        return _profile(models, options)
    from repvgg_deploy.cli.tables import print_record

    record = _measure(models, output, options)
    values = {name: value for name, value in record.items() if name not in ("schema", "version")}
    try:
        checks = _check_limits(record, options["min_images_per_sec"], options["min_ratio"])
    except DeployError as error:
        return Outcome(values, lambda: print_record(record), error)
    return Outcome(values, lambda: print_record(record), first_failure(checks), checks=checks)


def _check_usage(models: Sequence[str], output: Path | None, options: dict[str, Any]) -> None:
    """Refuse options that contradict each other or have no effect, and models that are neither files nor names.

    Raises:
        click.UsageError: with what was typed in its words.
    """
    if bool(models) == (options["suite"] is not None):
        raise click.UsageError("Give models, or --suite FILE.")
    if output is not None and output.is_dir():
        raise click.UsageError(f"-o {output} is a folder; give the file to write: -o {output / 'result.json'}.")
    alone = {"suite": "the suite says it", "source": "it is not used with --input", "profile": "--profile ignores it"}
    used = {
        "suite": ("min_images_per_sec", "min_ratio", "output"),
        "source": ("batch", "duration", *_PREPROCESSING),
        "profile": ("batch", "duration", "threads"),
    }
    for mode in (mode for mode in alone if options[mode]):
        others = (*_LISTS, *_ENTRY, *_MEASURING, *_PREPROCESSING, *alone, "baseline", "output")
        others += ("min_images_per_sec", "min_ratio")
        for other in (other for other in others if other not in (mode, *used[mode]) and is_given(other)):
            name = "--input" if other == "source" else flag(other)
            raise click.UsageError(f"{name} has no effect here: {alone[mode]}.")
    if not options["source"]:
        for name in filter(is_given, _PREPROCESSING):
            raise click.UsageError(f"{flag(name)} is for --input jpeg DIR.")
    if options["profile"] and (len(models) != 1 or len(options["batch"]) > 1):
        raise click.UsageError("--profile takes one model and one batch size.")
    if options["min_ratio"] is not None and options["baseline"] is None and options["suite"] is None:
        raise click.UsageError("--min-ratio needs --baseline NAME.")
    for model in models:
        _check_model(model)


def _check_model(model: str) -> None:
    if FilePath().convert(model, None, None).exists() or Path(model).suffix or "/" in model:
        return
    if model.isdecimal():
        raise click.UsageError(
            f"{model} is read as a model. For several batch sizes write --batch 1,{model} or repeat the option."
        )
    if not is_model_name(model):
        raise click.UsageError(f"{model!r} is neither a file nor an architecture. {suggest_model(model)}")


def _measure(models: tuple[str, ...], output: Path | None, options: dict[str, Any]) -> Record:
    from repvgg_deploy.benchmark.record import read_record, write_record
    from repvgg_deploy.benchmark.run import run_benchmark
    from repvgg_deploy.benchmark.suites import load_suite

    suite = options["suite"]
    request = load_suite(suite) if suite is not None else _request(models, options)
    earlier = read_record(output) if suite is not None and output is not None and output.is_file() else None

    def save(record: Record) -> None:
        if output is not None:
            write_record(record, output)

    with show_progress() as progress:
        return run_benchmark(request, progress, earlier, save)


def _request(models: tuple[str, ...], options: dict[str, Any]) -> BenchRequest:
    from repvgg_deploy.benchmark.cases import Case
    from repvgg_deploy.benchmark.measure import MeasureOptions
    from repvgg_deploy.benchmark.run import BenchRequest, Group

    forms = ("training", "deploy") if options["form"] == "both" else (options["form"],)
    how = {name: options[name] for name in ("mode", "channels_last", "transfers", "streams")}
    entries = tuple(
        Case(model=model, form=form, backend=backend, precision=precision, threads=options["threads"] or 0, **how)
        for model in models
        for form in forms
        for backend in options["backend"] or (None,)
        for precision in options["precision"] or (None,)
    )
    measured = MeasureOptions(
        warmup_s=options["warmup"], min_duration_s=options["duration"], min_iterations=options["iterations"]
    )
    groups = tuple(Group(f"batch {n}", entries, n, options["baseline"]) for n in options["batch"] or (1,))
    return BenchRequest("bench", groups, measured, options["roofline"])


def _check_limits(record: Record, min_images_per_sec: float | None, min_ratio: float | None) -> tuple[LimitCheck, ...]:
    """Every measured throughput and ratio beside its limit; the worst failures first.

    Raises:
        DeployError: there is a limit for ratios, and no ratio was measured.
    """
    checks: list[LimitCheck] = []
    baselines = {ratio["baseline"] for ratio in record["ratios"]}
    if min_images_per_sec is not None:
        measured = [r for r in record["results"] if r["model"] not in baselines]
        checks += [_check_speed(r, min_images_per_sec) for r in sorted(measured, key=lambda r: r["images_per_sec"])]
    if min_ratio is not None:
        compared = [r for r in record["ratios"] if r["model"] != r["baseline"]]
        if not compared:
            raise DeployError(
                "no ratio to the baseline was measured",
                "no model was measured with the baseline's batch size and precision",
            )
        checks += [_check_ratio(r, min_ratio) for r in sorted(compared, key=lambda r: r["ratio"])]
    return tuple(checks)


def _check_speed(result: dict[str, Any], least: float) -> LimitCheck:
    speed = float(result["images_per_sec"])
    failure = ThresholdError(
        f"{result['model']} at batch {result['batch']} reaches {speed:.1f} images/s,"
        f" below --min-images-per-sec {least:g}",
        "check the load of the machine, and the notes in the table",
    )
    name = f"{_label(result)}: images/s, --min-images-per-sec"
    return LimitCheck(name, speed, least, None if speed >= least else failure)


def _check_ratio(ratio: dict[str, Any], least: float) -> LimitCheck:
    value = float(ratio["ratio"])
    failure = ThresholdError(
        f"{ratio['model']} at batch {ratio['batch']} is {value:.3f} times as fast as {ratio['baseline']},"
        f" below --min-ratio {least:g}",
        "check the load of the machine, and the interval in the table",
    )
    name = f"{_label(ratio)}: ratio to {ratio['baseline']}, --min-ratio"
    return LimitCheck(name, value, least, None if value >= least else failure)


def _label(entry: dict[str, Any]) -> str:
    return ", ".join([entry["model"], entry["form"], entry["precision"], f"batch {entry['batch']}"])


def _profile(models: Sequence[str], options: dict[str, Any]) -> Outcome:
    from repvgg_deploy.benchmark.layer_profile import profile_engine, profile_graph
    from repvgg_deploy.cli.tables import print_profile
    from repvgg_deploy.files.kinds import file_kind

    path, batch = Path(models[0]), (options["batch"] or (1,))[0]
    with show_progress() as progress:
        progress.note(f"timing the layers of {path}")
        if file_kind(path) == "engine":
            profiled = profile_engine(path, batch, options["duration"])
        else:
            profiled = profile_graph(path, batch, options["threads"] or 0, options["duration"])
    return Outcome(profiled.to_dict(), lambda: print_profile(profiled), schema="profile")


def _bench_files(models: Sequence[str], options: dict[str, Any]) -> Outcome:
    share_cores()
    from repvgg_deploy.benchmark.from_files import measure_end_to_end
    from repvgg_deploy.cli.tables import print_end_to_end

    preprocessing, folder = take_preprocessing(options), options["source"][1]
    found = []
    with show_progress() as progress:
        for batch in options["batch"] or (1,):
            for model in models:
                progress.note(f"measuring {model} from files at batch {batch}")
                found.append(measure_end_to_end(Path(model), folder, batch, options["duration"], preprocessing))
    values = {"end_to_end": [result.to_dict() for result in found]}
    return Outcome(values, lambda: print_end_to_end(found), schema="end-to-end")
