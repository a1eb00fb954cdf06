"""A training run: `train`, its rehearsal and its resumption."""
