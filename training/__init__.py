"""Training: procedural worlds, data, the stages of Causal Forcing, the loop, evaluation. Run `python -m training
--help`."""
