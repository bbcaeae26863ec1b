"""One module per command: what the command line and a Python caller ask for."""
