"""Export: turns trained weights into something that runs without PyTorch. Run `python -m export.trt --help`."""
