"""Benchmarks of the loss, training and every method."""
