"""The command line: the program `slimmable` and its commands."""
