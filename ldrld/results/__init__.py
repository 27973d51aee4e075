"""Tables, figures and verdicts from records."""
