"""The training loop: runtime, wrapping, optimizer, schedule, state, metrics, and `fit`."""
