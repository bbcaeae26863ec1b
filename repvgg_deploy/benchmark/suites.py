"""Suites: sweeps over models, backends, precisions and batches, written as TOML."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from repvgg_deploy.benchmark.cases import Case
from repvgg_deploy.benchmark.measure import MeasureOptions
from repvgg_deploy.benchmark.names import BACKENDS, MODES, PRECISIONS
from repvgg_deploy.benchmark.run import BenchRequest, Group
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.typed_values import convert, parse_toml, read_file

_EXAMPLES = "bench/suites has examples"

Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_SOME = msgspec.Meta(min_length=1, max_length=1000)


class _Measure(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The table `measure`; see `MeasureOptions`."""

    warmup_s: Seconds = 0.2
    min_iterations: Count = 10
    min_duration_s: Seconds = 3.0
    min_rounds: Count = 10
    slice_s: Seconds = 0.1
    pause_s: Seconds = 0.1
    settle_s: Seconds = 0.02


class _Group(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A table `[[group]]`; what is not given counts as its default, and is not named in the group's key."""

    models: Annotated[tuple[str, ...], _SOME]
    backends: Annotated[tuple[Literal[BACKENDS], ...], _SOME] = ("onnxruntime-cpu",)  # type: ignore[valid-type]
    precisions: Annotated[tuple[Literal[PRECISIONS], ...], _SOME] = ("fp32",)  # type: ignore[valid-type]
    forms: Annotated[tuple[Literal["training", "deploy"], ...], _SOME] = ("deploy",)
    modes: Annotated[tuple[Literal[MODES], ...], _SOME] = ("eager",)  # type: ignore[valid-type]
    channels_last: Annotated[tuple[bool, ...], _SOME] | None = None
    batches: Annotated[tuple[Count, ...], _SOME] = (1,)
    baseline: str | None = None
    together: Literal["all", "model"] = "all"
    transfers: bool = False
    streams: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1


class _Suite(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    group: Annotated[tuple[_Group, ...], _SOME]
    name: str | None = None
    description: str = ""
    roofline: bool = False
    threads: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    measure: _Measure = _Measure()


def load_suite(path: Path) -> BenchRequest:
    """The request that a suite file describes.

    A file has a `name`, the table `measure` (see `MeasureOptions`), `threads`, `roofline`, and any number of
    `[[group]]`: every combination of its `models`, `backends`, `precisions`, `forms`, `modes` and `channels_last` is
    a case. With `together = "all"` (the default) all cases of one batch size are measured side by side, with
    `"model"` only those of one model.

    Raises:
        DeployError: the file cannot be read, or has a key or value that is unknown.
    """
    name = f"the suite {path}"
    try:
        content = read_file(path, name, _EXAMPLES)
    except FileNotFoundError as error:
        raise DeployError(f"cannot read {name}: there is no such file", _EXAMPLES) from error
    values = parse_toml(content, name, _EXAMPLES)
    suite = convert(values, _Suite, name, _EXAMPLES)
    groups: list[Group] = []
    for table, given in zip(suite.group, values["group"], strict=True):
        groups.extend(_read_groups(table, given, suite.threads))
    options = MeasureOptions(**msgspec.structs.asdict(suite.measure))
    return BenchRequest(suite.name or path.stem, tuple(groups), options, suite.roofline)


def _read_groups(table: _Group, given: dict[str, Any], threads: int) -> Iterator[Group]:
    sets = [[model] for model in table.models] if table.together == "model" else [list(table.models)]
    for models, batch in itertools.product(sets, table.batches):
        cases = tuple(_cases(table, models, threads))
        yield Group(_key(given, models, batch, threads), cases, batch, table.baseline)


def _cases(table: _Group, models: list[str], threads: int) -> Iterator[Case]:
    layouts: tuple[bool | None, ...] = table.channels_last or (None,)
    for model, backend, precision, form, mode, channels_last in itertools.product(
        models, table.backends, table.precisions, table.forms, table.modes, layouts
    ):
        yield Case(
            model=model,
            backend=backend,
            precision=precision,
            form=form,
            mode=mode,
            channels_last=channels_last,
            threads=threads,
            transfers=table.transfers,
            streams=table.streams,
        )


def _key(given: dict[str, Any], models: list[str], batch: int, threads: int) -> str:
    """The name of a group in the results: what it consists of, so that a changed suite is measured anew."""
    parts = ["+".join(models)]
    names = ("backends", "precisions", "forms", "modes", "channels_last")
    parts += ["+".join(str(value) for value in given[name]) for name in names if name in given]
    parts += [f"{name} {given[name]}" for name in ("streams", "transfers", "baseline") if name in given]
    parts += [f"threads {threads}"] if threads else []
    return " ".join(parts) + f" batch {batch}"
