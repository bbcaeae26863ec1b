"""The program: `repvgg-deploy`, or `python -m repvgg_deploy`."""

from repvgg_deploy.cli.ending import QuickEnd
from repvgg_deploy.cli.signals import end_on_signals


def run() -> None:
    """Run the command line in this process."""
    ending = QuickEnd()
    # Before the imports, which take longer than some commands.
    end_on_signals()
    from repvgg_deploy.cli.main import main

    try:
        main()
    except SystemExit as end:
        ending.prepare(end.code)
        raise


if __name__ == "__main__":
    run()
