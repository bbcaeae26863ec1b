"""`python -m repvgg_deploy`."""

from repvgg_deploy.cli import main

main()
