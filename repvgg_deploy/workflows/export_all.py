"""`export --all`: a checkpoint in every precision, the graphs side by side, and a card that says what they are."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.graphs.simplification import SimplificationCheck
from repvgg_deploy.images.labelled import list_labelled_images
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.runtime.model import open_model
from repvgg_deploy.workflows.export import Finish, check_possible, export_prepared, peak_bytes
from repvgg_deploy.workflows.export_request import ExportRequest
from repvgg_deploy.workflows.export_result import CheckpointExportResult
from repvgg_deploy.workflows.export_stages import prepare
from repvgg_deploy.workflows.model_card import CARD, CardInput, write_card
from repvgg_deploy.workflows.side_by_side import Agreement, Speed, Speeds, compare_accuracy, measure_speeds
from repvgg_deploy.workflows.versions import installed_versions

if TYPE_CHECKING:
    from repvgg_deploy.engine import Backend


@dataclass(frozen=True)
class ExportAllRequest:
    """The request that `export_all` takes.

    Attributes:
        base: as for one export; its precision does not count, and its `int8` is needed.
        validation: labelled images that the accuracy of all graphs is measured on.
    """

    base: ExportRequest
    validation: Path | None = None

    def one(self, precision: Precision, output: Path) -> ExportRequest:
        """The request for one precision."""
        int8 = self.base.int8 if precision is Precision.INT8 else None
        return replace(self.base, precision=precision, int8=int8, output=output)


COLUMNS = ("precision", "top-1 %", "top-5 %", "agreement %", "MB", "images/s", "p50 ms", "note")


@dataclass(frozen=True)
class ExportAllRow:
    """One precision: what was written, and how it compares with the others; `bytes` and `sha256` are the graph's."""

    result: CheckpointExportResult
    bytes: int
    sha256: str
    agreement: Agreement
    speed: Speed

    def to_dict(self) -> dict[str, Any]:
        """One entry of `precisions`."""
        return {
            "onnx": str(self.result.onnx),
            "engine": None if self.result.plan is None else str(self.result.plan),
            "parity": {stage: parity.to_dict() for stage, parity in self.result.parity.items()},
            "bytes": self.bytes,
            "sha256": self.sha256,
            "top1": self.agreement.top1,
            "top5": self.agreement.top5,
            "agreement": self.agreement.agreement,
            "images_per_sec": self.speed.images_per_sec,
            "latency_ms_p50": self.speed.latency_ms,
            "speed_note": self.speed.note,
        }

    def show(self) -> tuple[str, ...]:
        """A row of the table of precisions, under `COLUMNS`; a dash stands for what was not measured."""
        figures = (
            (self.agreement.top1, 2), (self.agreement.top5, 2), (self.agreement.agreement, 2), (self.bytes / 1e6, 2),
            (self.speed.images_per_sec, 1), (self.speed.latency_ms, 2),
        )  # fmt: skip
        shown = ("–" if value is None else f"{value:,.{digits}f}" for value, digits in figures)
        return (str(self.result.precision), *shown, self.speed.note)


@dataclass(frozen=True)
class ExportAllResult:
    """What `export_all` wrote; `images` says in words what the graphs were compared on."""

    rows: dict[Precision, ExportAllRow]
    card: Path
    images: str
    speeds: Speeds
    seconds: float
    peak_bytes: int
    tools: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> CheckpointExportResult:
        """The result in FP32: what it says of the checkpoint holds for all."""
        return self.rows[Precision.FP32].result

    @property
    def results(self) -> tuple[CheckpointExportResult, ...]:
        """The results, one per precision."""
        return tuple(row.result for row in self.rows.values())

    def to_dict(self) -> dict[str, Any]:
        """The object that `export --all --json` prints."""
        first = self.first
        return {
            "arch": first.arch,
            "layout": first.checkpoint.layout,
            "form": first.checkpoint.form,
            "sha256": first.checkpoint.sha256,
            "parameters": first.parameters,
            "assumed": first.choices,
            "precisions": {str(precision): row.to_dict() for precision, row in self.rows.items()},
            "compared_on": self.images,
            "speed": {
                "backend": self.speeds.backend,
                "batch": self.speeds.batch,
                "cpu": self.speeds.cpu,
                "duration_s": self.speeds.duration_s,
            },
            "model_card": str(self.card),
            "tools": self.tools,
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
        }


def export_all(
    request: ExportAllRequest,
    progress: Progress = SILENT,
    simplification: SimplificationCheck | None = None,
    finish: Finish | None = None,
) -> ExportAllResult:
    """Write the graphs of a checkpoint in FP32, FP16 and INT8, and `MODEL_CARD.md`, as one set.

    All of them take their places together, once every precision has been verified, evaluated and timed. `finish` is
    called just before that; see `Finish`.

    Raises:
        DeployError: any error that the user can fix; nothing is written then.
    """
    start = time.perf_counter()
    base = request.base
    if base.int8 is None:
        raise DeployError("INT8 needs calibration images", "--calib DIR, a folder of a few hundred typical images")
    if base.graph.features is not None:
        raise DeployError("--all compares classes, and --features has none", "export each precision by itself")
    if request.validation is not None:
        list_labelled_images(request.validation)
    backend = check_possible(request.one(Precision.INT8, base.output), progress)
    with stage_files(base.output) as staging:
        results = _export_each(request, staging, backend, progress, simplification)
        models = {precision: open_model(result.onnx) for precision, result in results.items()}
        progress.note("comparing the graphs on the same images")
        agreements = compare_accuracy(models, request.validation, base.verify_data, progress)
        del models
        graphs = {precision: result.onnx for precision, result in results.items()}
        speeds = measure_speeds(graphs, base.graph.batch or 1, progress)
        rows = {
            precision: ExportAllRow(
                replace(result, onnx=base.output / result.onnx.name),
                result.onnx.stat().st_size,
                hash_file(result.onnx),
                agreements[precision],
                speeds.of[precision],
            )
            for precision, result in results.items()
        }
        result = ExportAllResult(
            rows=rows,
            card=base.output / CARD,
            images=_name_images(request, agreements[Precision.FP32].images),
            speeds=speeds,
            seconds=time.perf_counter() - start,
            peak_bytes=peak_bytes(),
            tools=installed_versions(),
        )
        write_card(_describe(result, base.checkpoint), staging / CARD)
        if finish is not None:
            finish(staging, result.results)
    return replace(result, seconds=time.perf_counter() - start)


def _export_each(
    request: ExportAllRequest,
    staging: Path,
    backend: Backend | None,
    progress: Progress,
    simplification: SimplificationCheck | None,
) -> dict[Precision, CheckpointExportResult]:
    """The graph in each precision, of a checkpoint that is read and fused once."""
    # INT8 needs the most of a net: it may synthesize its images from the training form.
    prepared, parity = prepare(request.one(Precision.INT8, staging), progress)
    if prepared.fused.spec.output_names != ("logits",):
        raise DeployError("--all compares classes, and this checkpoint has none", "export each precision by itself")

    def export_one(precision: Precision) -> CheckpointExportResult:
        check = simplification if precision is Precision.FP32 else None
        one = replace(prepared, request=request.one(precision, staging))
        with check or SimplificationCheck() as started:
            return export_prepared(lambda: (one, parity), backend, progress, started)

    return {precision: export_one(precision) for precision in Precision}


def _name_images(request: ExportAllRequest, count: int) -> str:
    folder = request.validation or request.base.verify_data
    return f"{count} synthetic images" if folder is None else f"{count} images of {folder}"


def _describe(result: ExportAllResult, checkpoint: Path) -> CardInput:
    speeds = result.speeds
    return CardInput(
        checkpoint=checkpoint.name,
        result=result.first,
        files=[(row.result.onnx.name, row.bytes, row.sha256) for row in result.rows.values()],
        columns=COLUMNS,
        rows=[row.show() for row in result.rows.values()],
        parities={str(precision): row.result.parity for precision, row in result.rows.items()},
        quantization=result.rows[Precision.INT8].result.quantization,
        images=result.images,
        speed=f"{speeds.backend}, batch {speeds.batch}, {speeds.duration_s:g} s each, in turn, on {speeds.cpu}",
        tools=result.tools,
    )
