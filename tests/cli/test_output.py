"""Tables at every width: no number, unit or note is ever cut, and no line is wider than the terminal."""

from __future__ import annotations

import pytest
from helpers.records import make_record

from repvgg_deploy.cli import output
from repvgg_deploy.cli.output import format_value, lay_out, print_fields, print_table, shorten_middle
from repvgg_deploy.cli.tables import print_archs, print_parts, print_record
from repvgg_deploy.workflows.doctor import Row

WIDTHS = (60, 80, 100, 120)

COLUMNS = ["model", "form", "backend", "precision", "batch", "images/s", "p50 ms", "p90 ms", "p99 ms", "note"]
NAMES = ["out/2026-11-28/resolution-192/net-with-a-long-name.int8.onnx", "ResNet-50"]
ROWS = [
    [name, "deploy", "onnxruntime-cpu 1.31.1", precision, batch, speed, "106.4", "109.7", "117.6", note]
    for name, precision, batch, speed, note in [
        (NAMES[0], "int8", "1", "9.342", "unstable"),
        (NAMES[1], "int8", "1", "35.99", "cuda-graph, 2 streams, with copies, unstable"),
        (NAMES[0], "int8", "128", "12,345.6", "unstable"),
    ]
]


def flat(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_but_names_is_cut_and_no_line_is_too_wide(width: int) -> None:
    lines = lay_out(COLUMNS, ROWS, width, shorten=("model",)).lines
    assert max(map(len, lines)) <= width
    text = flat(lines)
    for row in ROWS:
        assert all(cell in text for cell in row[1:])
        assert row[0] in text or f"{row[0][:5]}" in text
    assert all(title in text for title in COLUMNS)


def test_a_wide_terminal_and_a_pipe_get_one_line_per_row() -> None:
    for width in (None, 200):
        lines = lay_out(COLUMNS, ROWS, width, shorten=("model",)).lines
        assert len(lines) == 1 + len(ROWS)
        assert NAMES[0] in lines[1]


def test_what_all_rows_say_moves_above_and_the_rest_below() -> None:
    layout = lay_out(COLUMNS, ROWS, 60, shorten=("model",))
    above, header, first, second, *_ = layout.lines
    assert above == "form deploy, backend onnxruntime-cpu 1.31.1, precision int8,"
    assert layout.lines[layout.header].startswith("model")
    assert header == "p50 ms 106.4, p90 ms 109.7, p99 ms 117.6"
    assert first.split()[0] == "model"
    assert second.startswith("out/20")


def test_one_row_loses_no_column() -> None:
    lines = lay_out(COLUMNS, ROWS[:1], 60, shorten=("model",)).lines
    assert max(map(len, lines)) <= 60
    assert all(cell in flat(lines) for cell in ROWS[0][1:])


def test_a_name_keeps_its_beginning_and_its_end() -> None:
    assert shorten_middle("short.onnx", 20) == "short.onnx"
    shortened = shorten_middle(NAMES[0], 24)
    assert len(shortened) == 24
    assert shortened.startswith("out/2026")
    assert shortened.endswith("name.int8.onnx")


@pytest.mark.parametrize("width", WIDTHS)
def test_wide_characters_count_as_two(width: int) -> None:
    rows = [["模型" * 20 + f"{n}.onnx", "1.5", "ein Wort"] for n in range(2)]
    for line in lay_out(["model", "ms", "note"], rows, width, shorten=("model",)).lines:
        assert sum(2 if ord(character) > 0x2E80 else 1 for character in line) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_a_long_text_is_broken_between_words(width: int) -> None:
    missing = "the module loads no library: libnvinfer.so.11 is not on the path of the dynamic linker of this machine"
    lines = lay_out(["part", "builds", "missing"], [["tensorrt", "no", missing], ["gpu", "", ""]], width).lines
    assert max(map(len, lines)) <= width
    assert missing in flat(lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_the_commands_fit(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "terminal_width", lambda: width)
    record = make_record()
    print_record(record)
    arch = {
        "arch": "RepVGG-D2se", "top1": 83.55, "parameters": 133_330_000, "parameters_deploy": 120_380_000,
        "flops": 36_560_000_000, "flops_deploy": 34_000_000_000, "input_size": 320, "groups": 1,
        "blocks": [8, 14, 24, 1], "widths": [64, 160, 320, 640, 2560],
    }  # fmt: skip
    print_archs([arch, {**arch, "arch": "RepVGG-A0", "top1": None, "input_size": 224}])
    print_parts([Row("gpu", "", "none", can_run=False, missing="no NVIDIA driver is installed"), Row("cpu", "1", "x")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = flat(lines)
    for result in record["results"]:
        assert format_value(float(f"{result['images_per_sec']:.4g}")) in text
        assert format_value(float(f"{result['latency_ms']['p99']:.4g}")) in text
    assert "8,14,24,1" in text
    assert "no NVIDIA driver is installed" in text
    assert "…" not in text


def test_numbers_stand_on_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "ms", "share"], [["a", 1.5, "5.0%"], ["b", 1234.5, "55.0%"], ["c", "–", ""]])
    header, first, second, third = capsys.readouterr().out.splitlines()
    assert header == "name       ms  share"
    assert first == "a         1.5   5.0%"
    assert second == "b     1,234.5  55.0%"
    assert third == "c           –"


def test_fields_leave_out_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields({"arch": "A0", "class_names": None, "parity": {"relative": 1e-5, "images": 8}, "notes": []})
    assert capsys.readouterr().out == "arch    A0\nparity  relative 1e-05, images 8\n"


def test_values_and_names_from_a_file_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\nerror: forged\x1b[2J\u202e"
    tensor = {"name": hostile, "dtype": "float", "shape": [hostile, 1]}
    print_fields({hostile: hostile, "list": [hostile], "inputs": [tensor], "parts": {hostile: 1}})
    print_table(["name"], [[hostile]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert not [line for line in lines if line.startswith("error") or not line.isprintable()]
