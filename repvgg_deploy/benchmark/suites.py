"""Suites: sweeps over models, backends, precisions and batches, written as TOML."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from repvgg_deploy.benchmark.cases import Case
from repvgg_deploy.benchmark.measure import MeasureOptions
from repvgg_deploy.benchmark.names import BACKENDS
from repvgg_deploy.benchmark.run import BenchRequest, Group
from repvgg_deploy.errors import DeployError

_SUITE_KEYS = {"name", "description", "roofline", "threads", "measure", "group"}
_GROUP_KEYS = {
    "models", "backends", "precisions", "forms", "modes", "channels_last", "batches", "baseline", "together",
    "transfers", "streams",
}  # fmt: skip
_TOGETHER = ("all", "model")


def load_suite(path: Path) -> BenchRequest:
    """The request that a suite file describes.

    A file has a `name`, the table `measure` (see `MeasureOptions`), `threads`, `roofline`, and any number of
    `[[group]]`: every combination of its `models`, `backends`, `precisions`, `forms`, `modes` and `channels_last` is
    a case. With `together = "all"` (the default) all cases of one batch size are measured side by side, with
    `"model"` only those of one model.

    Raises:
        DeployError: the file cannot be read, or has a key or value that is not known.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DeployError(f"cannot read the suite {path} ({error})", "bench/suites has examples") from error
    _require_known(values, _SUITE_KEYS, str(path))
    _require_known(values.get("measure", {}), {field.name for field in fields(MeasureOptions)}, f"{path}: measure")
    groups: list[Group] = []
    for table in values.get("group", ()):
        groups.extend(_read_groups(table, values.get("threads", 0), path))
    if not groups:
        raise DeployError(f"the suite {path} has no group", "bench/suites has examples")
    options = MeasureOptions(**values.get("measure", {}))
    return BenchRequest(values.get("name", path.stem), tuple(groups), options, values.get("roofline", False))


def _require_known(values: dict[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise DeployError(f"{where} has an unknown key {key!r}", f"known: {', '.join(sorted(known))}")


def _read_groups(table: dict[str, Any], threads: int, path: Path) -> Iterator[Group]:
    _require_known(table, _GROUP_KEYS, f"{path}: group")
    together = table.get("together", "all")
    if together not in _TOGETHER:
        raise DeployError(f"{path}: together = {together!r}", f"one of: {', '.join(_TOGETHER)}")
    if not table.get("models"):
        raise DeployError(f"{path}: a group has no models", 'models = ["A0", "resnet50"]')
    for backend in table.get("backends", ()):
        if backend not in BACKENDS:
            raise DeployError(f"{path}: no backend is called {backend!r}", f"one of: {', '.join(BACKENDS)}")
    sets = [[model] for model in table["models"]] if together == "model" else [table["models"]]
    for models, batch in itertools.product(sets, table.get("batches", [1])):
        cases = tuple(_cases(table, models, threads))
        yield Group(_key(table, models, batch, threads), cases, batch, table.get("baseline"))


def _cases(table: dict[str, Any], models: list[str], threads: int) -> Iterator[Case]:
    for model, backend, precision, form, mode, channels_last in itertools.product(
        models,
        table.get("backends", ["onnxruntime-cpu"]),
        table.get("precisions", ["fp32"]),
        table.get("forms", ["deploy"]),
        table.get("modes", ["eager"]),
        table.get("channels_last", [None]),
    ):
        yield Case(
            model=model,
            backend=backend,
            precision=precision,
            form=form,
            mode=mode,
            channels_last=channels_last,
            threads=threads,
            transfers=table.get("transfers", False),
            streams=table.get("streams", 1),
        )


def _key(table: dict[str, Any], models: list[str], batch: int, threads: int) -> str:
    """The name of a group in the results: what it consists of, so that a changed suite is measured anew."""
    parts = ["+".join(models)]
    names = ("backends", "precisions", "forms", "modes", "channels_last")
    parts += ["+".join(str(value) for value in table[name]) for name in names if name in table]
    parts += [f"{name} {table[name]}" for name in ("streams", "transfers", "baseline") if name in table]
    parts += [f"threads {threads}"] if threads else []
    return " ".join(parts) + f" batch {batch}"
