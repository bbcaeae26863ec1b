"""A mutation fuzzer of the command line: cases from a seed, each in a process of its own that is watched."""
