"""What a command found, as the JUnit XML that CI servers show beside the results of tests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from repvgg_deploy import __version__
from repvgg_deploy.errors import DeployError, LimitCheck, ThresholdError, VerificationError
from repvgg_deploy.files.staging import stage_files

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

# What XML 1.0 cannot hold, not even escaped: section 2.2, Char.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class JUnitSuite:
    """One run of a command.

    Attributes:
        command: its name.
        seconds: what it took.
        failure: why it failed, if it did.
        checks: what was held to a limit.
    """

    command: str
    seconds: float
    failure: Exception | None = None
    checks: tuple[LimitCheck, ...] = ()


def write_junit(path: Path, suite: JUnitSuite) -> None:
    """Write the run as JUnit XML: one test case for the command itself, and one for each limit.

    A missed limit or a failed comparison is a `failure`, anything else that ended the command an `error`. The file
    takes its place whole.

    Raises:
        DeployError: it cannot be written.
    """
    from xml.etree import ElementTree

    if path.is_dir():
        raise DeployError(f"--junit {path} is a folder", f"give the file to write: --junit {path / 'junit.xml'}")
    root = to_xml(suite)
    ElementTree.indent(root)
    with stage_files(path.absolute().parent, is_result=False) as staging:
        ElementTree.ElementTree(root).write(staging / path.name, encoding="utf-8", xml_declaration=True)


def to_xml(suite: JUnitSuite) -> Element:
    """The element `testsuites` of one run."""
    from xml.etree.ElementTree import Element, SubElement

    cases = list(_make_cases(suite))
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "time": f"{suite.seconds:.3f}",
    }
    root = Element("testsuites", {"name": "repvgg-deploy", **counts})
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    name = f"repvgg-deploy {suite.command}"
    element = SubElement(root, "testsuite", {"name": name, **counts, "skipped": "0", "timestamp": now})
    properties = SubElement(element, "properties")
    SubElement(properties, "property", {"name": "version", "value": __version__})
    element.extend(cases)
    return root


def _make_cases(suite: JUnitSuite) -> Iterable[Element]:
    # A limit that was missed has a test case of its own: the command itself has done its work.
    failures = [check.failure for check in suite.checks]
    own = None if suite.failure in failures else suite.failure
    yield _make_case(suite.command, suite.command, own, "", suite.seconds)
    for check in suite.checks:
        limit = "" if check.limit is None else f", limit {check.limit:.6g}"
        yield _make_case(suite.command, check.name, check.failure, f"value {check.value:.6g}{limit}")


def _make_case(command: str, name: str, failure: Exception | None, figures: str, seconds: float = 0.0) -> Element:
    from xml.etree.ElementTree import Element, SubElement

    case = Element(
        "testcase", {"classname": f"repvgg-deploy.{command}", "name": _clean(name), "time": f"{seconds:.3f}"}
    )
    if failure is not None:
        kind = "failure" if isinstance(failure, ThresholdError | VerificationError) else "error"
        found = SubElement(case, kind, {"message": _clean(str(failure)), "type": type(failure).__name__})
        hint = failure.hint if isinstance(failure, DeployError) else ""
        found.text = _clean("\n".join(filter(None, [str(failure), figures, hint and f"hint: {hint}"])))
    elif figures:
        SubElement(case, "system-out").text = figures
    return case


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
