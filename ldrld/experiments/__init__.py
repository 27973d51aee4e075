"""Runs and their records, methods and profiles, the evidence plan, tuning, batches."""
