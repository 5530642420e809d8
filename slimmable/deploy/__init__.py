"""Networks for other programs and devices: programs of one width, and one file that holds all widths."""
