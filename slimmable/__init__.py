"""Slimmable networks: one set of weights that runs at several widths."""
