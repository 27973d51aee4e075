"""Losses on features inside the networks."""
