"""The parts of `bench/int8.py`: one module per command, and what they share."""
