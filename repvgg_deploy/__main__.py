"""`python -m repvgg_deploy`."""

from repvgg_deploy.cli.main import main

main()
