"""Readers of models: `slimmable.load` and `slimmable.load_slimclr`."""

READERS = {}
