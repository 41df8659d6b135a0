"""What the wrapper costs, measured against the optimizer that it wraps: ``python -m
gmixout_optim.bench``."""
