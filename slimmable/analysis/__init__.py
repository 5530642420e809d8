"""Analysis: one run on fake tensors labels the channels, and the labels determine what each width keeps."""
