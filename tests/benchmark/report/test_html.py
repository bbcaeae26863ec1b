"""Plots, page and Markdown table, from results that are made up here so that their figures are known."""

from __future__ import annotations

import html
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.records import make_record
from PIL import Image

from repvgg_deploy.benchmark.record import (
    check_record,
    write_record,
)
from repvgg_deploy.benchmark.report.html import render_page
from repvgg_deploy.benchmark.report.plots import Plot, draw_plots, family_of
from repvgg_deploy.benchmark.report.tables import (
    name_machine,
    render_markdown,
    summarize,
    tabulate_paper,
    tabulate_ratios,
    tabulate_results,
)
from repvgg_deploy.cli.main import main


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return check_record(make_record())


@pytest.fixture(scope="module")
def plots(record: dict[str, Any]) -> list[Plot]:
    return draw_plots([record])


@pytest.mark.slow
def test_every_kind_of_plot_is_drawn(plots: list[Plot]) -> None:
    names = {plot.name for plot in plots}
    assert names == {
        "accuracy_torch-cpu_fp32_b1",
        "accuracy_torch-cpu_fp32_b8",
        "throughput_torch-cpu_fp32",
        "latency_torch-cpu_fp32",
        "ratio_torch-cpu",
        "fused_over_training",
        "roofline_cpu_fp32",
    }


@pytest.mark.slow
def test_plots_are_pictures_that_name_the_models(plots: list[Plot]) -> None:
    for plot in plots:
        with Image.open(io.BytesIO(plot.png)) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 500
        # Something is drawn, and most of the page stays white.
        assert 0.005 < (pixels < 200).mean() < 0.3
        assert plot.svg.startswith("<?xml")
        assert "A2" in plot.svg or plot.name == "fused_over_training"


@pytest.mark.slow
def test_the_same_results_give_the_same_files(record: dict[str, Any], plots: list[Plot]) -> None:
    assert draw_plots([record]) == plots


@pytest.mark.slow
def test_the_page_has_every_result_and_escapes_names(record: dict[str, Any], plots: list[Plot]) -> None:
    page = render_page([record], plots, "ResNet-50")
    assert "made &lt;up&gt;" in page
    assert "made <up>" not in page
    assert page.count("<img") == page.count("data:image/png;base64,") == 7
    for row in tabulate_results(record).rows:
        assert all(f">{cell}</td>" in page for cell in row if not set("&<>'") & set(cell))


def test_the_summary_and_the_table_come_before_the_plots_and_the_details_after(
    record: dict[str, Any], plots: list[Plot]
) -> None:
    page = render_page([record], plots, "ResNet-50")
    order = [page.index(text) for text in (summarize(record, "ResNet-50")[0], ">Throughput<", "<img", ">Results<")]
    assert order == sorted(order)


def test_every_table_and_plot_names_the_processor(record: dict[str, Any], plots: list[Plot]) -> None:
    machine = name_machine(record)
    assert record["machine"]["cpu"]["model"] in machine
    page = render_page([record], [], "ResNet-50")
    captions = re.findall(r"<caption>(.*?)</caption>", page)
    assert len(captions) >= 5
    assert all(html.escape(record["machine"]["cpu"]["model"]) in caption for caption in captions)
    assert all(machine in plot.title for plot in plots)
    assert len({plot.title for plot in plots}) == len(plots)


def test_a_gpu_is_named_where_the_backend_ran_on_it(record: dict[str, Any]) -> None:
    machine = {**record["machine"], "gpus": [{"name": "NVIDIA L4"}]}
    assert name_machine({**record, "machine": machine}, ["tensorrt"]) == "NVIDIA L4"
    assert "NVIDIA L4" not in name_machine({**record, "machine": machine}, ["torch-cpu"])


def test_unstable_results_are_marked_beside_the_model(record: dict[str, Any]) -> None:
    first, *others = record["results"]
    shaky = {**record, "results": [{**first, "unstable": True, "warnings": ["busy"]}, *others]}
    table = tabulate_results(shaky)
    assert table.columns[:2] == ("model", "unstable")
    assert table.rows[0][:2] == (first["model"], "unstable")
    assert re.search(r"\d\* \(", render_markdown([shaky], "ResNet-50"))
    assert any("unstable" in line for line in summarize(shaky, "ResNet-50"))


@pytest.mark.slow
def test_the_accuracy_axis_of_int8_says_that_it_is_fp32s(record: dict[str, Any], plots: list[Plot]) -> None:
    int8 = {**record, "results": [{**r, "precision": "int8"} for r in record["results"]]}
    (plot, *_) = (plot for plot in draw_plots([int8]) if plot.name.startswith("accuracy"))
    assert "that of INT8 is not measured here" in plot.svg
    (plot, *_) = (plot for plot in plots if plot.name.startswith("accuracy"))
    assert "INT8" not in plot.svg


def test_ratios_of_the_baseline_to_itself_are_left_out(record: dict[str, Any]) -> None:
    table = tabulate_ratios(record)
    assert table is not None
    rows = table.rows
    assert not any(row[0].split()[0] == row[1].split()[0] == "ResNet-50" for row in rows)


def test_the_markdown_table_has_speeds_and_ratios(record: dict[str, Any]) -> None:
    table = render_markdown([record], "ResNet-50").splitlines()
    assert table[0] == "| model | torch-cpu fp32, batch 1 | torch-cpu fp32, batch 8 |"
    assert len({line.count("|") for line in table[:6]}) == 1
    a0 = next(line for line in table if line.startswith("| RepVGG-A0"))
    speed, ratio = (float(x) for x in re.search(r"\| ([\d.]+) \(([\d.]+),", a0).groups())  # type: ignore[union-attr]
    assert speed == pytest.approx(250, rel=0.02)
    assert ratio == pytest.approx(3.0, rel=0.02)


def test_the_markdown_says_what_fusing_gains(record: dict[str, Any]) -> None:
    lines = render_markdown([record], "ResNet-50").splitlines()
    header = lines.index("| fused / training form | torch-cpu fp32, batch 1 | torch-cpu fp32, batch 8 |")
    first = lines[header + 2].split("|")
    assert first[1].strip() == "RepVGG-A0"
    assert float(first[2].split()[0]) == pytest.approx(7 / 4, rel=0.02)


def test_the_papers_column_stands_beside_torchs_speed(record: dict[str, Any]) -> None:
    table = tabulate_paper(record)
    assert table is not None
    rows = table.rows
    assert [row[0] for row in rows] == ["RepVGG-A0", "ResNet-50", "RepVGG-A2", "RepVGG-B1g4"]
    assert rows[0][3:] == ("3,256", "4.53")


@pytest.mark.parametrize(
    ("model", "family"),
    [("RepVGG-B1g4", "RepVGG-B"), ("RepVGG-A0", "RepVGG-A"), ("ResNet-50", "ResNet"), ("x.onnx", "x.onnx")],
)
def test_models_are_told_apart_by_family(model: str, family: str) -> None:
    assert family_of(model) == family


@pytest.fixture
def result_file(record: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    write_record(record, path)
    return path


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "occupy", "message"),
    [("plots", Path.touch, "cannot write to"), ("page.html", Path.mkdir, "page.html is a directory")],
)
def test_where_page_or_plots_cannot_be_written_neither_is(
    name: str, occupy: Callable[[Path], None], message: str, result_file: Path, tmp_path: Path
) -> None:
    occupy(tmp_path / name)
    done = report(result_file, "-o", tmp_path / "page.html", "--plots", tmp_path / "plots")
    assert done.exit_code == 1
    assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "result.json"])


def test_a_baseline_that_no_ratio_has_is_an_error(result_file: Path, tmp_path: Path) -> None:
    done = report(result_file, "-o", tmp_path / "page.html", "--baseline", "nonesuch")
    assert done.exit_code == 1
    assert "they have ratios to: RepVGG-A0, ResNet-50" in done.stderr


@pytest.mark.slow
def test_without_matplotlib_the_error_says_what_to_install(result_file: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from repvgg_deploy.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "report", str(result_file), "-o", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: matplotlib is not installed")


@pytest.mark.slow
def test_the_largest_and_smallest_figures_and_the_oddest_names_that_are_read_are_drawn_too() -> None:
    record = make_record()
    for number, result in enumerate(record["results"]):
        result["model"] += r" $\frac{<script>&|%s_^#"
        size = (1e18, 1e-8)[number % 2]
        result |= {"images_per_sec": size, "top1": (0.0, 100.0)[number % 2]}
        result["latency_ms"] |= {"p50": min(size, 1e12)}
        if result["roofline"] is not None:
            result["roofline"] |= {"tflops": size, "flops_per_byte": size}
    for number, ratio in enumerate(record["ratios"]):
        ratio |= dict.fromkeys(("low", "ratio", "high"), (1e18, 1e-8)[number % 2])
    record["machine"]["cpu"]["model"] = "$_CPU"
    assert len(draw_plots([check_record(record)])) == 7
    assert "<script>" not in render_page([record], [], "ResNet-50")
    assert render_markdown([record], "ResNet-50")
