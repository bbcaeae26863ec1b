"""How every command of this program looks and ends: options in groups, examples, one result, one place for errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from repvgg_deploy.cli import progress
from repvgg_deploy.cli.junit import JUnitSuite, write_junit
from repvgg_deploy.cli.progress import Verbosity
from repvgg_deploy.cli.signals import end_on_signals
from repvgg_deploy.cli.standard_output import OutputError, checked_output
from repvgg_deploy.cli.startup import silence_libraries
from repvgg_deploy.errors import DeployError, LimitCheck, ThresholdError
from repvgg_deploy.files.printable import dump_json, printable
from repvgg_deploy.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])

GROUPS = (
    "Input", "Preprocessing", "Decoding", "INT8", "Graph", "Engine", "Backend", "Cluster", "Measuring", "Verification",
    "Limits", "Output",
)  # fmt: skip
"""The order of the groups of options in every help text."""

EXIT_FAILED, EXIT_USAGE, EXIT_LIMIT = 1, 2, 3

# Of an error or a hint, in characters: names in a file may be of any length.
_LONGEST = 2000


@dataclass(frozen=True)
class Outcome:
    """What a command has found out.

    Attributes:
        values: the object that `--json` prints, without `schema` and `version`.
        show: prints the same to stdout, for people.
        failure: an error that is reported once the values are printed, such as a limit that was missed.
        schema: the name of the object's schema; the command's own by default.
        checks: what was held to a limit, for `--junit`; a missed one is `failure` as well.
    """

    values: Mapping[str, Any]
    show: Callable[[], None]
    failure: DeployError | None = None
    schema: str = ""
    checks: tuple[LimitCheck, ...] = ()


@dataclass
class Session:
    """What holds for the whole run of the program; the running command fills it in."""

    as_json: bool = False
    verbosity: Verbosity = Verbosity.NORMAL


def option_group(title: str, *options: Callable[[F], F]) -> Callable[[F], F]:
    """A decorator that gives a command these options, which its help shows together under `title`.

    `title` is one of `GROUPS`. The options keep their order; a second decorator of the same title adds to the first.
    """
    if title not in GROUPS:
        raise ValueError(f"{title!r} is not one of {GROUPS}")

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
            command.__click_params__[-1].group = title  # type: ignore[attr-defined]
        return command

    return decorate


class Command(click.Command):
    """A command that returns an `Outcome`; `examples` are lines of shell that end its help."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.examples = tuple(examples)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; wrong usage is reported to `--junit` too, if that option can be found."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            path = self._find_junit(ctx, given)
            if path is not None:
                _write_junit_of_failure(path, JUnitSuite(str(ctx.info_name), 0.0, _explain_usage(error, ctx)))
            raise

    def _find_junit(self, ctx: click.Context, args: list[str]) -> Path | None:
        """The value of `--junit` in a command line that has some other fault, or in the environment."""
        option = next((option for option in self.get_params(ctx) if option.name == "junit"), None)
        if option is None:
            return None
        parser = self.make_parser(ctx)
        parser.ignore_unknown_options = True
        resilient, ctx.resilient_parsing = ctx.resilient_parsing, True
        try:
            # In this mode the parser stops at a fault, and gives what it has read before.
            values, _, _ = parser.parse_args(args)
            path, _ = option.consume_value(ctx, values)
        finally:
            ctx.resilient_parsing = resilient
        return Path(path) if isinstance(path, str) and path else None

    def invoke(self, ctx: click.Context) -> None:
        """Run the command, print what it returns, and raise the failure that it returns."""
        session = ctx.ensure_object(Session)
        session.as_json = bool(ctx.params.pop("as_json", False))
        outcome = self._run(ctx, ctx.params.pop("junit", None))
        if not session.as_json:
            outcome.show()
            if outcome.failure is not None:
                raise outcome.failure
            return
        name, values = outcome.schema or str(ctx.info_name), dict(outcome.values)
        if outcome.failure is None:
            print_object(name, values)
            return
        print_object(name, {**values, **_describe(outcome.failure)})
        raise _ReportedError(outcome.failure)

    def _run(self, ctx: click.Context, junit: Path | None) -> Outcome:
        """What the command returns; whether it does, or fails on the way, `junit` is written."""
        start = time.perf_counter()
        try:
            self._prepare(ctx)
            outcome = super().invoke(ctx)
            if not isinstance(outcome, Outcome):
                raise TypeError(f"the command {ctx.info_name} returns {type(outcome).__name__}, not an Outcome")
        except Exception as error:
            failure = _explain(error)
            if junit is not None:
                told = _explain_usage(error, ctx) if isinstance(error, click.UsageError) else failure
                suite = JUnitSuite(str(ctx.info_name), time.perf_counter() - start, told)
                _write_junit_of_failure(junit, suite)
            if failure is error:
                raise
            raise failure from error
        if junit is not None:
            suite = JUnitSuite(str(ctx.info_name), time.perf_counter() - start, outcome.failure, outcome.checks)
            write_junit(junit, suite)
        return outcome

    def _prepare(self, ctx: click.Context) -> None:
        quiet, verbose = ctx.params.pop("quiet", False), ctx.params.pop("verbose", False)
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose exclude each other.", ctx)
        session = ctx.ensure_object(Session)
        session.verbosity = Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL
        before_run = ctx.meta.get("repvgg_deploy.before_run")
        if before_run is not None:
            before_run()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, one section per group."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                rows.setdefault(getattr(parameter, "group", ""), []).append(record)
        order = [*(group for group in GROUPS if group in rows), ""]
        for group in order:
            with formatter.section(group or ("Other" if len(order) > 1 else "Options")):
                formatter.write_dl(rows[group])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, as they are."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class WrongUsageError(DeployError):
    """A command was called wrongly, for `--junit`, which names the type of an error."""


def _explain_usage(error: click.UsageError, ctx: click.Context) -> WrongUsageError:
    return WrongUsageError(error.format_message(), f"{ctx.command_path} --help")


def _write_junit_of_failure(path: Path, suite: JUnitSuite) -> None:
    """Write the report of a command that has failed: why it did is raised after this, and must not be hidden."""
    try:
        write_junit(path, suite)
    except DeployError as error:
        _report(error)


def show_progress() -> AbstractContextManager[Progress]:
    """Show notes and steps on standard error while the block runs, as the running command was asked to."""
    session = click.get_current_context().ensure_object(Session)
    return progress.show_progress(session.verbosity)


_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory")
"""What torch says; NumPy, Pillow and Python itself raise MemoryError."""


def _explain(error: Exception) -> Exception:
    """`error`, or one that a user can fix in its place where memory was too small, wherever that happened."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or any(words in said for words in _NO_MEMORY):
        return DeployError("there is too little memory for this", "a smaller batch, size or model, or more memory")
    return error


class _ReportedError(Exception):
    """A failure whose JSON object has been printed already."""

    def __init__(self, failure: DeployError) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Group(click.Group):
    """The one place that prints an error a user can fix; anything else keeps its traceback."""

    command_class = Command

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the program: in a process of its own, which signals end."""
        end_on_signals()
        silence_libraries()
        try:
            with checked_output():
                return super().__call__(*args, **kwargs)
        except OutputError as error:
            _report(DeployError(str(error), "free some space there, or give another file"))
            sys.exit(EXIT_FAILED)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note whether JSON is wanted, so that even wrong usage of a command is reported as such."""
        ctx.ensure_object(Session).as_json = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; end with the status that the command line's contract gives to each kind of failure."""
        try:
            return super().invoke(ctx)
        except _ReportedError as reported:
            _report(reported.failure)
            ctx.exit(_status(reported.failure))
        except DeployError as error:
            _report(error)
            if ctx.find_object(Session).as_json:  # type: ignore[union-attr]
                print_object("error", _describe(error))
            ctx.exit(_status(error))
        except click.UsageError as error:
            if ctx.find_object(Session).as_json:  # type: ignore[union-attr]
                hint = f"{error.ctx.command_path if error.ctx else ctx.command_path} --help"
                print_object("error", {"error": error.format_message(), "hint": hint, "exit_status": EXIT_USAGE})
            error.message = printable(error.message, _LONGEST)  # type: ignore[misc]
            raise


def _status(error: DeployError) -> int:
    return EXIT_LIMIT if isinstance(error, ThresholdError) else EXIT_FAILED


def _describe(error: DeployError) -> dict[str, Any]:
    return {"error": error.message, "hint": error.hint, "exit_status": _status(error)}


def _report(error: DeployError) -> None:
    click.echo(f"error: {printable(error.message, _LONGEST)}", err=True)
    if error.hint:
        click.echo(f"hint: {printable(error.hint, _LONGEST)}", err=True)


def print_object(name: str, values: Mapping[str, Any]) -> None:
    """One JSON object on stdout, of the schema `name` in docs/schemas."""
    from repvgg_deploy.cli.schemas import VERSIONS

    head = {"schema": f"repvgg-deploy/{name}", "version": VERSIONS[name]}
    click.echo(dump_json({**head, **dict(values)}, indent=2))
