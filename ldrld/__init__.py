"""Local Dense Logit Relations for knowledge distillation. Importing this needs torch and nothing else."""
__version__ = "0.1.0"
