"""Weights and images for `golden/networks.json`: the same on every machine, and drawn from no random generator.

The values in that file were computed in float64 with RepDistiller's own model definitions (HobbitLong/RepDistiller,
`models/`, the code behind b84f547) on what `fill` and `images` give, in training mode, so that every batch norm
normalises with the batch. Make it anew only if these two functions change, and again with that code, not with ours.
"""

import torch


def spread(shape, k: int) -> torch.Tensor:
    """Numbers in [-0.5, 0.5) without visible order: squares modulo a prime."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    return ((7919 * i * i + 104_729 * i + 15_485_863 * k) % 1_000_003).double().div(1_000_003).sub(0.5).view(shape)


@torch.no_grad()
def fill(model):
    """Give every parameter of `model`, in the order of its state dict, a fixed value in float64."""
    parameters = dict(model.double().named_parameters())
    for k, name in enumerate(name for name in model.state_dict() if name in parameters):
        value = parameters[name]
        values = spread(value.shape, k)
        if value.ndim == 1:
            values = values + (1 if "bias" not in name else 0)
        value.copy_(values)
    return model


def images(side: int = 32) -> torch.Tensor:
    """Two images, (2, 3, side, side), in float64."""
    return 4 * spread((2, 3, side, side), 10_007)


def summary(stages, preact, pooled, logits) -> dict:
    """A few numbers that stand for what a forward pass gave: of each map the mean size and the entry in the middle."""
    two = lambda t: [t.abs().mean().item(), t.flatten()[t.numel() // 2 + 1].item()]
    return {
        "stages": [two(t) for t in stages],
        "preact": [two(t) for t in preact],
        "pooled": two(pooled),
        "logits": logits[0, :3].tolist(),
    }
