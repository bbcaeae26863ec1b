"""The steps of a benchmark: cases are opened, measured side by side batch by batch, compared, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from repvgg_deploy.benchmark.cases import Case, OpenedCase
from repvgg_deploy.benchmark.measure import Label, Measurement, MeasureOptions, measure
from repvgg_deploy.benchmark.names import ENGINES
from repvgg_deploy.benchmark.opening import open_case
from repvgg_deploy.benchmark.record import (
    SCHEMA_NAME,
    SCHEMA_VERSION,
    Record,
    check_record,
    describe_measurement,
    describe_ratio,
)
from repvgg_deploy.benchmark.roofline import Ceiling, RooflinePoint, measure_ceiling
from repvgg_deploy.benchmark.workloads import require_sound
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.staging import scratch_folder
from repvgg_deploy.graphs.cost import ELEMENT_BYTES
from repvgg_deploy.hardware.machine import GpuLoad, describe_identity, finish_machine, record_machine
from repvgg_deploy.nets.cards import require_baseline
from repvgg_deploy.progress import SILENT, Progress


class OpenAll(Protocol):
    """Opens cases that are not open yet; those of `baseline` stay open beside them."""

    def __call__(self, cases: Sequence[Case], baseline: str | None = None) -> list[OpenedCase]:
        """The opened cases in the order of the cases."""


@dataclass(frozen=True)
class Group:
    """What is measured side by side: cases at one batch size, and the baseline that each is compared with."""

    key: str
    cases: tuple[Case, ...]
    batch: int
    baseline: str | None = None

    def all_cases(self) -> tuple[Case, ...]:
        """The cases with the baseline: once for each way in which one of them runs."""
        if self.baseline is None:
            return self.cases
        twins = [replace(case, model=self.baseline, form="deploy") for case in self.cases]
        return tuple(dict.fromkeys((*self.cases, *twins)))


@dataclass(frozen=True)
class BenchRequest:
    """The request for a benchmark; `roofline` has the machine's ceilings measured as well."""

    name: str
    groups: tuple[Group, ...]
    options: MeasureOptions = field(default_factory=MeasureOptions)
    roofline: bool = False


def run_benchmark(
    request: BenchRequest,
    progress: Progress = SILENT,
    earlier: Record | None = None,
    save: Callable[[Record], None] = lambda _: None,
) -> Record:
    """The record of all groups of a request.

    Args:
        request: what is measured.
        progress: receives a note for each model that is opened and each group, and the step `measuring` of each group.
        earlier: the record of a run that was stopped; its groups are not measured again.
        save: given the record after every group, so that a stopped run loses one group at most.

    Raises:
        DeployError: any error that the user can fix.
        VerificationError: a model gives NaN or Inf; its group is not measured.

    Example:
        >>> from repvgg_deploy import run_benchmark
        >>> from repvgg_deploy.benchmark.cases import Case
        >>> from repvgg_deploy.benchmark.run import BenchRequest, Group
        >>> group = Group("batch 1", (Case("net.pth", backend="torch-cpu"),), batch=1)
        >>> record = run_benchmark(BenchRequest("mine", (group,)))
        >>> record["results"][0]["batch"]
        1
    """
    for group in request.groups:
        if group.baseline is not None:
            require_baseline(group.baseline)
    record = earlier if earlier is not None else _new_record(request)
    if earlier is not None:
        _require_same(earlier, request)
    done = {result["group"] for result in record["results"]}
    ceilings = {key: Ceiling(**values) for key, values in record["ceilings"].items()}
    load = GpuLoad()
    with _open_cases(progress) as open_all:
        for number, group in enumerate(request.groups, 1):
            if group.key in done:
                progress.note(f"{group.key}: measured before")
                continue
            opened_cases = open_all(_with_precisions(group, open_all))
            progress.note(
                f"[{number}/{len(request.groups)}] {group.key}: {len(opened_cases)} models at batch {group.batch}"
            )
            workloads = [opened_case.at_batch(group.batch) for opened_case in opened_cases]
            require_sound(workloads)
            # Before and after: a ceiling that was measured in a slow moment of the machine would be none.
            if request.roofline:
                _raise_ceilings(ceilings, opened_cases, progress)
            load.clear()
            measurements = measure(workloads, request.options, progress, watch=load.read)
            if request.roofline:
                _raise_ceilings(ceilings, opened_cases, progress)
            # Before the next group takes memory of its own.
            del workloads
            record = _add_group(record, group, opened_cases, measurements, ceilings, load.summary())
            del opened_cases
            save(record)
    return check_record(record)


def _new_record(request: BenchRequest) -> Record:
    return {
        "schema": SCHEMA_NAME,
        "version": SCHEMA_VERSION,
        "name": request.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": record_machine(),
        "method": _method(request),
        "ceilings": {},
        "results": [],
        "ratios": [],
    }


def _require_same(earlier: Record, request: BenchRequest) -> None:
    """Raise DeployError unless the new measurements can go into the same record as `earlier`.

    Raises:
        DeployError: the benchmark, its options, the machine or a version differs.
    """
    elsewhere = "write to another file with -o"
    if earlier["name"] != request.name:
        raise DeployError(f"the earlier result is called {earlier['name']!r}, not {request.name!r}", elsewhere)
    if earlier["method"] != _method(request):
        raise DeployError("the earlier result was measured with other options", elsewhere)
    before, now = (describe_identity(machine) for machine in (earlier["machine"], record_machine()))
    for what, value in now.items():
        if before.get(what) != value:
            raise DeployError(
                f"the earlier result was measured with {what} {before.get(what) or 'unknown'}, here it is {value}",
                elsewhere,
            )


def _method(request: BenchRequest) -> dict[str, Any]:
    return asdict(request.options)


def _with_precisions(group: Group, open_all: OpenAll) -> tuple[Case, ...]:
    """All cases of the group; the baseline's are run as the models turn out to run once they are open."""
    group = replace(group, cases=tuple(_with_own_plan(case, group.batch) for case in group.cases))
    if group.baseline is None:
        return group.cases
    known = []
    for case, opened_case in zip(group.cases, open_all(group.cases, group.baseline), strict=True):
        label = opened_case.label
        if label.precision == "unknown":
            raise DeployError(
                f"{case.model} does not say its precision, so no baseline can have the same",
                "give --precision, or leave --baseline out",
            )
        how = replace(case, backend=label.backend, precision=label.precision, build=opened_case.build)
        how = replace(how, input_type=label.input_type or case.input_type)
        known.append(replace(how, size=_square(case, label)))
    twins = replace(group, cases=tuple(known)).all_cases()[len(dict.fromkeys(known)) :]
    return (*group.cases, *(twin for twin in twins if twin not in known))


def _with_own_plan(case: Case, batch: int) -> Case:
    """`case` with a plan for `batch` alone, where one has to be built: kernels are chosen for one batch of a range."""
    if case.backend not in ENGINES or case.build is not None:
        return case
    from repvgg_deploy.engine.options import BuildOptions

    return replace(case, build=BuildOptions(batch_range=(batch, batch, batch)))


def _is_for_one_batch(case: Case) -> bool:
    return case.build is not None and case.build.batch_range[0] == case.build.batch_range[2]


def _square(case: Case, label: Label) -> int | None:
    """The size at which a baseline runs like `case`."""
    if label.size is None or label.size[0] == label.size[1]:
        return None if label.size is None else label.size[0]
    raise DeployError(
        f"{case.model} takes {label.size[0]}x{label.size[1]} pixels, but the baselines take square images",
        "leave --baseline out",
    )


@contextmanager
def _open_cases(progress: Progress) -> Iterator[OpenAll]:
    """A function that opens cases, and closes those that are not requested again.

    A baseline stays open, unless it is a plan for one batch: the next batch has another.
    """
    opened: dict[Case, OpenedCase] = {}
    with scratch_folder() as folder:

        def open_all(cases: Sequence[Case], baseline: str | None = None) -> list[OpenedCase]:
            for case in [case for case in opened if case not in cases]:
                if case.model != baseline or _is_for_one_batch(case):
                    opened.pop(case).close()
            for case in cases:
                if case not in opened:
                    how = (case.precision, case.backend, f"{case.size} px" if case.size else None)
                    progress.note(" ".join(("opening", case.model, case.form, *filter(None, how))))
                    opened[case] = open_case(case, folder)
            return [opened[case] for case in cases]

        try:
            yield open_all
        finally:
            for opened_case in opened.values():
                opened_case.close()


def _device(opened_case: OpenedCase) -> str:
    return "cpu" if opened_case.label.backend.endswith("-cpu") else "cuda"


def _raise_ceilings(ceilings: dict[str, Ceiling], opened_cases: Sequence[OpenedCase], progress: Progress) -> None:
    """Measure the ceiling of every precision once more, and keep the best that was seen."""
    labels = [(opened_case.label.precision, _device(opened_case)) for opened_case in opened_cases]
    for precision, device in dict.fromkeys(label for label in labels if label[0] in ELEMENT_BYTES):
        progress.note(f"measuring the ceiling of {device} {precision}")
        found, key = measure_ceiling(precision, device), f"{device} {precision}"
        ceilings[key] = found.best_of(ceilings.get(key, found))


def _add_group(
    record: Record,
    group: Group,
    opened_cases: Sequence[OpenedCase],
    measurements: Sequence[Measurement],
    ceilings: dict[str, Ceiling],
    load: list[dict[str, Any]],
) -> Record:
    results: list[Record] = []
    ratios: list[Record] = []
    for opened_case, measurement in zip(opened_cases, measurements, strict=True):
        point = _roofline(opened_case, measurement, ceilings)
        results.append(describe_measurement(measurement, group.key, opened_case.parameters, opened_case.top1, point))
        ratios += [
            describe_ratio(measurement, other, measurement.ratio_to(other), group.key)
            for theirs, other in zip(opened_cases, measurements, strict=True)
            if theirs.build == opened_case.build and _is_baseline(group, measurement, other)
        ]
    return {
        **record,
        "machine": finish_machine(record["machine"], group.key, load),
        "ceilings": {key: asdict(ceiling) for key, ceiling in ceilings.items()},
        "results": [*record["results"], *results],
        "ratios": [*record["ratios"], *ratios],
    }


def _is_baseline(group: Group, measurement: Measurement, other: Measurement) -> bool:
    """Whether `measurement` is compared with `other`: its own training form, or the group's baseline."""
    mine, theirs = measurement.label, other.label
    if mine.conditions != theirs.conditions:
        return False
    if mine.model == theirs.model:
        return mine.form == "deploy" and theirs.form == "training"
    return group.baseline is not None and theirs.model == require_baseline(group.baseline).name


def _roofline(
    opened_case: OpenedCase, measurement: Measurement, ceilings: dict[str, Ceiling]
) -> dict[str, float | str] | None:
    ceiling = ceilings.get(f"{_device(opened_case)} {opened_case.label.precision}")
    if ceiling is None or opened_case.cost is None:
        return None
    seconds = measurement.compute.p50 / 1e3
    return RooflinePoint.of(opened_case.cost(measurement.label.batch), seconds, ceiling).to_dict()
