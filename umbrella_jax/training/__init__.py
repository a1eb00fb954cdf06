"""The step, what trains in it, and the loop around it; takes any iterator of `Batch`."""
