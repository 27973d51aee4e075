"""The paper's loss: relations, weights, the loss, its gradient in one pass, the GPU kernel, language models."""
