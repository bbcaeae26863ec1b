"""What is written beside the graphs of an export: a lock file, and a statement of how they were made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.progress import Progress
from repvgg_deploy.workflows.choices import list_settings
from repvgg_deploy.workflows.export import Finish, file_stem
from repvgg_deploy.workflows.lock import Lock, read_inputs, read_lock, require_artifact, require_settings, write_lock
from repvgg_deploy.workflows.provenance import Build, make_statement, write_statement
from repvgg_deploy.workflows.versions import installed_versions

if TYPE_CHECKING:
    from repvgg_deploy.workflows.export_request import ExportRequest
    from repvgg_deploy.workflows.export_result import CheckpointExportResult


@dataclass(frozen=True)
class RecordsRequest:
    """What is asked for beside the graphs.

    Attributes:
        options: those of the command, by name, as a lock file keeps them.
        labels: the file of class names, an input.
        lock: the lock file to write.
        expected: the lock file whose artifacts are made again.
        provenance: whether a statement is written.
    """

    options: Mapping[str, Any]
    labels: Path | None = None
    lock: Path | None = None
    expected: Path | None = None
    provenance: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        return self.lock is None and self.expected is None and not self.provenance

    def statement_path(self, request: ExportRequest, precisions: Sequence[Precision]) -> Path | None:
        """Where the statement goes, if one is written."""
        if not self.provenance:
            return None
        names = [file_stem(request.checkpoint), *([str(precisions[0])] if len(precisions) == 1 else [])]
        return request.output / ".".join([*names, "provenance.json"])


@contextmanager
def keep_records(
    records: RecordsRequest, request: ExportRequest, precisions: tuple[Precision, ...], progress: Progress
) -> Iterator[Finish | None]:
    """Yield what an export must call on its finished files, in their staging folder, before they take their places.

    That writes the records beside them, or raises. A lock file of another folder takes its place right after them.

    Raises:
        DeployError: an input is not the one of the lock file that is followed; nothing was done yet.
    """
    if records.is_empty:
        yield None
        return
    started, tools = datetime.now(UTC), installed_versions()
    progress.note("hashing the inputs")
    expected = None if records.expected is None else read_lock(records.expected)
    inputs = read_inputs(request, precisions, records.labels)
    if expected is not None and records.expected is not None:
        inputs.require_same(expected.inputs, records.expected)
    build = Build(records.options, inputs, tools, started)

    def finish(staging: Path, results: Sequence[CheckpointExportResult], lock_folder: Path | None) -> None:
        graphs = [staging / result.onnx.name for result in results]
        settings = list_settings(results[0].choices)
        if results[0].checkpoint.sha256 != inputs.checkpoint.sha256:
            raise DeployError(f"{request.checkpoint} was written to while it was exported", "run the export again")
        if expected is not None and records.expected is not None:
            require_settings(settings, expected, records.expected)
            for graph in graphs:
                require_artifact(graph, expected, records.expected, tools)
            progress.note(f"the graphs are those of {records.expected}, byte for byte")
        files = sorted(path for path in staging.iterdir() if path.is_file())
        statement = records.statement_path(request, precisions)
        if statement is not None:
            write_statement(make_statement(build, files), staging / statement.name)
        if records.lock is not None:
            hashes = {graph.name: hash_file(graph) for graph in graphs}
            lock = Lock(dict(records.options), inputs, settings, hashes, tools)
            write_lock(lock, (lock_folder or staging) / records.lock.name)

    if records.lock is None or records.lock.absolute().parent == request.output.absolute():
        yield lambda staging, results: finish(staging, results, None)
        return
    with stage_files(records.lock.absolute().parent, is_result=False) as folder:
        yield lambda staging, results: finish(staging, results, folder)
