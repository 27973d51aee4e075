"""Random generators that depend only on given numbers."""
import torch

__all__ = ["seeded"]


def seeded(
    *numbers: int,  # such as seed, epoch and call; their order matters
) -> torch.Generator:
    """A random generator on the CPU, seeded by these numbers alone, so a resumed training makes the same draws."""
    seed = 0
    for number in numbers: seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)
