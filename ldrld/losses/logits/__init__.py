"""Losses on logits, and those that need no teacher."""
