"""Write docs/cli.md: the `--help` of every command. `tests/test_docs.py` holds the file against the code."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from repvgg_deploy.cli.main import main

PAGE = Path(__file__).with_name("cli.md")


def make_page() -> str:
    """The page as Markdown."""
    runner = CliRunner()
    parts = ["# Command line\n\nMade by `docs/make_cli.py` from the commands' own `--help`.\n"]
    for name in ("", *sorted(main.commands)):
        arguments = [name, "--help"] if name else ["--help"]
        text = runner.invoke(main, arguments, prog_name="repvgg-deploy", terminal_width=100).output
        parts.append(f"## repvgg-deploy {name}".rstrip() + f"\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
