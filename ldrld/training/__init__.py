"""The training loop, the engine of CUDA graphs, the teacher's logits, metrics."""
