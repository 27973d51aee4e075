"""Losses around another loss on logits, which change its input."""
