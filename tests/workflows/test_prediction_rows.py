"""Files of predictions that are damaged or made by others, where `predict --resume` finds them."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from helpers.damage import UNREADABLE

from repvgg_deploy.errors import DeployError
from repvgg_deploy.workflows.prediction_files import Journal, check_format, count_errors, encode_row

IDENTITY = {"model": "0" * 64}
ROWS = [{"path": f"{n}.png", "classes": [1, n], "names": None, "scores": [0.5, 0.25]} for n in range(3)]
WRONG = (
    {}, {"path": 1}, {"path": "a"}, {"path": "a", "error": 3}, {"path": "a", "error": "e", "classes": [1]},
    {"path": "a", "classes": 5, "scores": [0.5]}, {"path": "a", "classes": [1], "scores": [0.5]},
    {"path": "a", "classes": [1, 2], "scores": [0.5]}, {"path": "a", "classes": [-1, 2], "scores": [0.5, 0.5]},
    {"path": "a", "classes": [1, 2**40], "scores": [0.5, 0.5]}, {"path": "a", "classes": [1, 2], "scores": [0.5, "x"]},
    {"path": "a", "classes": [1, 2], "scores": [10**30, 0.5]}, {"path": "a", "classes": [1, 2], "scores": [1e300, 0.5]},
    {"path": "a", "classes": [1, 2], "scores": [float("nan"), 0.5]}, {"path": "a", "names": [1, 2]},
    {"path": "a", "classes": [1, 2], "scores": [0.5, 0.5], "logits": [0.5]}, {"path": "a", "x": []}, [], None, 7,
)  # fmt: skip


def journal_of(tmp_path: Path, *lines: bytes) -> Path:
    path = tmp_path / "rows.csv.partial"
    path.write_bytes(encode_row({"run": IDENTITY}) + b"".join(lines))
    return path


def resume(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "rows.csv", IDENTITY, resume=True)


def test_whole_rows_are_taken_and_a_half_written_one_is_cut_off(tmp_path: Path) -> None:
    lines = [encode_row(row) for row in ROWS]
    path = journal_of(tmp_path, *lines, b'{"path": "3.p')
    journal = resume(tmp_path)
    assert list(journal.lines(row["path"] for row in ROWS)) == lines
    journal.close()
    assert path.read_bytes().endswith(lines[-1])


@pytest.mark.parametrize("row", WRONG, ids=repr)
def test_row_that_no_run_wrote_is_an_error_and_the_file_stays(tmp_path: Path, row: object) -> None:
    path = journal_of(tmp_path, encode_row(ROWS[0]), json.dumps(row).encode() + b"\n", encode_row(ROWS[1]))
    before = path.read_bytes()
    with pytest.raises(DeployError, match=r"rows\.csv\.partial is damaged") as caught:
        resume(tmp_path)
    assert "leave --resume out" in caught.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", UNREADABLE[1:], ids=lambda content: repr(content[:8]))
def test_line_that_is_no_row_is_an_error(tmp_path: Path, content: bytes) -> None:
    journal_of(tmp_path, encode_row(ROWS[0]), content + b"\n")
    with pytest.raises(DeployError, match="is damaged: line 3 is not a row"):
        resume(tmp_path)


def test_line_longer_than_any_row_is_not_read_as_a_whole(tmp_path: Path) -> None:
    path = journal_of(tmp_path)
    with path.open("r+b") as file:
        # A hole: it takes no room on the disk, and would take all of it in memory.
        file.truncate(1 << 40)
    with pytest.raises(DeployError, match="a line that is longer than any row"):
        resume(tmp_path)
    path.write_bytes(b"another file, without the end of a line")
    with pytest.raises(DeployError, match="another model or with other options"):
        resume(tmp_path)
    assert path.read_bytes().startswith(b"another file")


@pytest.mark.parametrize("again", [True, False])
def test_link_or_pipe_in_the_place_of_the_journal_is_not_written_to(tmp_path: Path, again: bool) -> None:
    path, kept = tmp_path / "rows.csv.partial", tmp_path / "kept"
    kept.write_bytes(b"kept")
    path.symlink_to(kept)
    with pytest.raises(DeployError, match="cannot write"):
        Journal(tmp_path / "rows.csv", IDENTITY, resume=again)
    assert kept.read_bytes() == b"kept"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DeployError, match="is a pipe or a device"):
        Journal(tmp_path / "rows.csv", IDENTITY, resume=again)


def test_pipe_in_the_place_of_the_output_is_refused_before_any_work(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.csv")
    with pytest.raises(DeployError, match="is a pipe or a device"):
        check_format(tmp_path / "rows.csv")


@pytest.mark.parametrize("name", ["x" * 300 + ".csv", "x" * 249 + ".csv", "a\0b.csv", "y/" * 3000 + "rows.csv"])
def test_output_that_no_file_can_be_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DeployError, match="cannot write"):
        check_format(tmp_path / name)


def test_link_to_itself_or_to_nothing_is_replaced_by_the_output(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").symlink_to("rows.csv")
    (tmp_path / "rows.jsonl").symlink_to("nowhere")
    for name in ("rows.csv", "rows.jsonl"):
        check_format(tmp_path / name)


def test_row_of_another_kind_than_those_found_is_an_error(tmp_path: Path) -> None:
    journal_of(tmp_path, encode_row({"path": "0.png", "classes": [4], "scores": [0.5]}))
    journal = resume(tmp_path)
    with pytest.raises(DeployError, match="is not of this run"):
        journal.append(ROWS[1:])
    journal.close()


def refusal(path: Path) -> str:
    """Why a run of one image does not take `path` for its output."""
    try:
        found = count_errors(path, ["0.png"])
    except DeployError as error:
        return error.message
    return "it has other rows" if found is None else ""


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("content", UNREADABLE, ids=lambda content: repr(content[:8]))
def test_output_that_is_not_readable_is_one_error_or_written_anew(tmp_path: Path, ending: str, content: bytes) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    assert refusal(path).startswith((f"{path} cannot be read", "it has other rows"))


def test_table_of_another_shape_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for content in ('path,error\n"' + "x" * csv.field_size_limit() + '"\n', "a,b\n1,2\n", "path\n\0\n\n"):
        path.write_text(content)
        assert refusal(path).startswith((f"{path} cannot be read", "it has other rows"))


def test_table_that_claims_to_unpack_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = arrow.table({"path": ["x" * (8 << 20)], "error": [None]})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DeployError, match="claim to unpack"):
        count_errors(path, ["0.png"])
