"""The Trainer of transformers at all widths."""
