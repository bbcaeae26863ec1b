"""`--junit`: the report of a limit that is met, of one that is missed, and of a command that fails."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.small_nets import make_net, name_in_layout

from repvgg_deploy.cli.junit import JUnitSuite, to_xml, write_junit
from repvgg_deploy.cli.main import main
from repvgg_deploy.errors import DeployError, ImageError, LimitCheck, ThresholdError

QUICK = ["--duration", "0.05", "--iterations", "2", "--warmup", "0"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def cases(path: Path) -> dict[str, str]:
    """`passed`, `failure` or `error` of every test case in a report, whose counts must be right."""
    (suite,) = ElementTree.parse(path).getroot()
    found = {}
    for case in suite.findall("testcase"):
        kinds = [kind for kind in ("failure", "error") if case.find(kind) is not None]
        found[case.get("name", "")] = kinds[0] if kinds else "passed"
    for name, kind in (("failures", "failure"), ("errors", "error")):
        assert int(suite.get(name, "")) == list(found.values()).count(kind)
    assert int(suite.get("tests", "")) == len(found)
    return found


@pytest.mark.slow
def test_eval_reports_its_limit_met_and_missed(checkpoint_file: Path, image_folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "reports" / "eval.xml"
    command = ["eval", checkpoint_file, "--data", image_folder, "--size", 32, "--junit", report]
    assert run(*command).exit_code == 0
    assert cases(report) == {"eval": "passed"}
    gate = "checkpoint.pth: top-1 in percent, --min-top1"
    assert run(*command, "--min-top1", 0).exit_code == 0
    assert cases(report) == {"eval": "passed", gate: "passed"}
    assert run(*command, "--min-top1", 101).exit_code == 3
    assert cases(report) == {"eval": "passed", gate: "failure"}
    failure = ElementTree.parse(report).getroot().find(".//failure")
    assert failure is not None
    assert failure.get("message", "").endswith(" %, below --min-top1 101")
    assert "limit 101" in (failure.text or "")
    assert "hint: " in (failure.text or "")


@pytest.mark.slow
def test_verify_reports_every_limit_and_prints_its_values_when_one_is_missed(
    checkpoint_file: Path, tmp_path: Path
) -> None:
    other, report = tmp_path / "other.pth", tmp_path / "verify.xml"
    torch.save(name_in_layout(make_net(seed=4), "official"), other)
    command = ["verify", checkpoint_file, other, "--size", 32, "--junit", report, "--json"]
    missed = run(*command, "--max-relative", 1e9, "--max-abs", 1e-3, "--max-disagreement", 100)
    assert missed.exit_code == 3
    value = json.loads(missed.stdout)
    assert (value["schema"], value["exit_status"]) == ("repvgg-deploy/verify", 3)
    assert value["max_abs"] > 1e-3
    assert value["error"] in missed.stderr
    assert cases(report) == {
        "verify": "passed",
        "relative difference, --max-relative": "passed",
        "largest difference of a logit, --max-abs": "failure",
        "other top-1 classes in percent, --max-disagreement": "passed",
    }
    # The default tolerance is no limit of the user's: the command has failed, and still says by how much.
    beyond = run(*command)
    assert beyond.exit_code == 1
    assert json.loads(beyond.stdout)["relative"] > 1e-4
    assert cases(report) == {"verify": "passed", "relative difference, by default for fp32": "failure"}


@pytest.mark.slow
@pytest.mark.usefixtures("short_turns")
def test_bench_reports_one_case_per_model_and_batch(checkpoint_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "bench.xml"
    command = ["bench", checkpoint_file, "--backend", "torch-cpu", "--batch", "1,2", *QUICK, "--junit", report]
    assert run(*command, "--min-images-per-sec", 1e12).exit_code == 3
    found = cases(report)
    assert found.pop("bench") == "passed"
    assert sorted(found.values()) == ["failure", "failure"]
    assert [name for name in found if "batch 2: images/s, --min-images-per-sec" in name]


def test_export_reports_every_comparison_and_an_error(checkpoint_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "export.xml"
    command = ["export", checkpoint_file, "-o", tmp_path, "--size", 32, "--engine", "none", "--junit", report]
    assert run(*command).exit_code == 0
    what = "relative difference from the stage before"
    assert cases(report) == {
        "export": "passed",
        f"checkpoint.fp32.onnx: fused, {what}": "passed",
        f"checkpoint.fp32.onnx: onnx, {what}": "passed",
    }
    assert run(*command, "--act", "relu", "--labels", tmp_path / "none.txt").exit_code == 1
    assert cases(report) == {"export": "error"}


def test_a_command_that_fails_leaves_a_report_with_an_error(image_folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "eval.xml"
    result = run("eval", tmp_path / "none.pth", "--data", image_folder, "--min-top1", 1, "--junit", report)
    assert result.exit_code == 1
    assert cases(report) == {"eval": "error"}
    assert "there is no file" in report.read_text()


def test_wrong_usage_that_the_command_finds_is_in_the_report(tmp_path: Path) -> None:
    report = tmp_path / "verify.xml"
    assert run("verify", "a.pth", "b.pth", "--count", 3, "--junit", report).exit_code == 2
    assert cases(report) == {"verify": "error"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--no-such-option", 3], "No such option"),
        (["--batch", "many"], "'many' is not a valid integer"),
        (["--quiet", "--verbose"], "exclude each other"),
        (["--min-top1"], "requires an argument"),
        ([], "Missing option '--data'"),
    ],
)
def test_wrong_usage_that_the_parser_finds_is_in_the_report(wrong: list[object], message: str, tmp_path: Path) -> None:
    report = tmp_path / "eval.xml"
    data = [] if not wrong else ["--data", tmp_path]
    result = run("eval", tmp_path / "net.pth", *data, "--junit", report, *wrong)
    assert result.exit_code == 2
    assert message in result.stderr
    assert cases(report) == {"eval": "error"}
    error = ElementTree.parse(report).getroot().find(".//error")
    assert error is not None
    assert message in error.get("message", "")
    assert error.get("type") == "WrongUsageError"
    assert "eval --help" in (error.text or "")


def test_wrong_usage_is_in_the_report_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "eval.xml"
    monkeypatch.setenv("REPVGG_DEPLOY_EVAL_JUNIT", str(report))
    assert run("eval", "--no-such-option").exit_code == 2
    assert cases(report) == {"eval": "error"}


def test_a_file_of_options_that_cannot_be_read_is_in_the_report(tmp_path: Path) -> None:
    report = tmp_path / "export.xml"
    assert run("export", "net.pth", "--config", tmp_path / "none.toml", "--junit", report).exit_code == 2
    assert cases(report) == {"export": "error"}
    assert "cannot read --config" in report.read_text()


def test_wrong_usage_without_a_report_to_write_stays_wrong_usage(tmp_path: Path) -> None:
    for junit in ([], ["--junit"], ["--junit", ""]):
        assert run("eval", "--no-such-option", *junit).exit_code == 2
    assert run("inspect", "--junit", tmp_path / "report.xml").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_does_not_hide_why_the_command_failed(tmp_path: Path) -> None:
    wrong = run("eval", "--no-such-option", "--junit", tmp_path)
    assert wrong.exit_code == 2
    assert "is a folder" in wrong.stderr
    assert "No such option" in wrong.stderr
    failed = run("eval", tmp_path / "none.pth", "--data", tmp_path, "--junit", tmp_path)
    assert failed.exit_code == 1
    assert "is a folder" in failed.stderr
    assert "there is no file" in failed.stderr


def test_a_report_that_cannot_be_written_is_an_error_and_an_earlier_one_stays(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="is a folder"):
        write_junit(tmp_path, JUnitSuite("eval", 1.0))
    report = tmp_path / "report.xml"
    write_junit(report, JUnitSuite("eval", 1.0))
    before = report.read_bytes()
    with pytest.raises(DeployError, match="cannot write"):
        write_junit(report / "report.xml", JUnitSuite("bench", 1.0))
    assert report.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.xml"]


def test_what_xml_cannot_hold_is_replaced_and_markup_is_escaped() -> None:
    text = 'a\x00\x1b[31m<b> & "c"\ud800\ufffe é 漢'
    suite = JUnitSuite("eval", 0.5, ImageError(text), (LimitCheck(text, float("nan"), 1.0, ThresholdError("<&>")),))
    (read,) = ElementTree.fromstring(ElementTree.tostring(to_xml(suite), encoding="utf-8"))
    first, second = read.findall("testcase")
    error, failure = first.find("error"), second.find("failure")
    assert error is not None
    assert failure is not None
    assert error.get("message") == 'a??[31m<b> & "c"?? é 漢'
    assert (failure.get("message"), failure.text) == ("<&>", "<&>\nvalue nan, limit 1")
