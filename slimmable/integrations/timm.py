"""timm's training programs at all widths."""
