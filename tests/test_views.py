"""The strong view of a batch: the bytes of torchvision's operations image by image, with few kernels and no waiting."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldrld.losses.logits.strong_view import (
    COVER,
    HALF,
    RANGES,
    Numbers,
    changed,
    covered,
    fixed,
    numbers,
    operations,
    planned,
    strong_view,
)

CPU = torch.device("cpu")


def reference(images, generator, changes=2):
    """Image by image with torchvision, as it was before; draws in the same order."""
    n, _, height, width = images.shape
    known = list(operations().values())
    which = torch.randint(len(known), (n, changes), generator=generator).tolist()
    strength = torch.rand(n, changes, generator=generator).tolist()
    size, centre = 0.5 * torch.rand(n, generator=generator), torch.rand(n, 2, generator=generator)
    altered = []
    for image, drawn, shares in zip(images, which, strength):
        for k, share in zip(drawn, shares):
            low, high, alter = known[k]
            image = alter(image, low + (high - low) * share)
        altered.append(image)
    side = size * width

    def within(middle, length):
        start = (middle * length - side / 2).clamp(min=0).floor()[:, None]
        at = torch.arange(length)
        return (at >= start) & (at < start + side[:, None])

    square = within(centre[:, 0], height)[:, :, None] & within(centre[:, 1], width)[:, None, :]
    return torch.where(square[:, None], torch.tensor(COVER, dtype=torch.uint8).view(3, 1, 1), torch.stack(altered))


def images_of(kind, n, height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, height, width), dtype=torch.uint8, generator=g)
    if kind == "smooth":
        coarse = 255 * torch.rand(n, 3, 4, 4, generator=g)
        x = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").byte()
    elif kind == "two values":
        x = x // 200 * 80
    elif kind == "gray":
        x = x[:, :1].repeat(1, 3, 1, 1)
    elif kind == "one colour":
        x = x[:, :, :1, :1].repeat(1, 1, height, width)
    elif kind == "mostly white":
        x[torch.rand(x.shape, generator=g) < 0.8] = 255
    elif kind == "nearly black":
        x = x // 128
    return x


KINDS = ("noise", "smooth", "two values", "gray", "one colour", "mostly white", "nearly black")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (28, 28), (16, 12), (33, 47), (64, 64)])
def test_bytes_of_two_operations(kind, size):
    """7 kinds, 5 sizes and 2 seeds of 64 images: 4,480 images."""
    for seed in (0, 1):
        x = images_of(kind, 64, *size, seed)
        made = strong_view(x, torch.Generator().manual_seed(seed))
        assert made.dtype == torch.uint8 and torch.equal(made, reference(x, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", RANGES)
def test_bytes_of_every_operation(name):
    low, high, alter = operations()[name]
    shares = [i / 39 for i in range(40)]
    for kind in KINDS:
        for height, width in ((32, 32), (20, 31)):
            x = images_of(kind, 40, height, width)
            (plan,) = planned([[list(RANGES).index(name)]] * 40, [[share] for share in shares], height, width, CPU)
            made = changed(x.float(), plan, fixed(height, width, CPU))
            wanted = torch.stack([alter(image, low + (high - low) * share) for image, share in zip(x, shares)])
            assert torch.equal(made, wanted.float())


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (2, 9), (3, 3), (3, 1)])
def test_images_without_an_inside(size):
    x = images_of("noise", 64, *size)
    assert torch.equal(strong_view(x, torch.Generator().manual_seed(3)), reference(x, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("changes", [0, 1, 3, 5])
def test_other_numbers_of_changes(changes):
    x = images_of("smooth", 32, 32, 32)
    made = strong_view(x, torch.Generator().manual_seed(5), changes)
    assert torch.equal(made, reference(x, torch.Generator().manual_seed(5), changes))


def test_a_large_image():
    """Ranks of 300 × 300 pixels are spread with large steps; rounding must not reach the next value."""
    x, equalize = images_of("smooth", 6, 300, 300), operations()["Equalize"][2]
    (plan,) = planned([[list(RANGES).index("Equalize")]] * 6, [[0.5]] * 6, 300, 300, CPU)
    made = changed(x.float(), plan, fixed(300, 300, CPU))
    assert torch.equal(made, torch.stack([equalize(image, 0) for image in x]).float())


def test_steps_of_ranks_are_rounded_as_whole_numbers():
    """What is added before rounding, against exact arithmetic, for every step and rank of images up to 800 × 800."""
    for step in (1, 2, 3, 4, 7, 16, 197, 256, 1001, 2509):
        ranks = torch.arange(256 * step, dtype=torch.float32)
        made = (ranks * torch.tensor(float(step)).reciprocal() + HALF).floor()
        assert torch.equal(made, ((torch.arange(256 * step) + step // 2) // step).float())


def test_images_in_any_memory_format_and_of_any_number():
    x = images_of("noise", 9, 32, 32)
    made = strong_view(x, torch.Generator().manual_seed(0))
    assert torch.equal(strong_view(x.to(memory_format=torch.channels_last), torch.Generator().manual_seed(0)), made)
    assert torch.equal(
        strong_view(x[:, :, :, ::2], torch.Generator().manual_seed(0)),
        strong_view(x[:, :, :, ::2].contiguous(), torch.Generator().manual_seed(0)),
    )
    assert strong_view(x[:0], torch.Generator()).shape == (0, 3, 32, 32)
    one = strong_view(x[:1], torch.Generator().manual_seed(0))
    assert torch.equal(one, reference(x[:1], torch.Generator().manual_seed(0)))


def test_the_images_are_unchanged_and_inference_does_no_harm():
    x = images_of("noise", 8, 24, 24)
    before = x.clone()
    fixed.cache_clear()
    with torch.inference_mode():
        made = strong_view(x, torch.Generator().manual_seed(0))
    assert torch.equal(x, before) and torch.equal(strong_view(x, torch.Generator().manual_seed(0)), made)


class Counter(TorchDispatchMode):
    """Operations that compute something, and whether one of them reads a value on the host."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_few_kernels_and_no_host_read():
    x = images_of("noise", 64, 32, 32)
    strong_view(x, torch.Generator().manual_seed(0))
    with Counter() as counter:
        strong_view(x, torch.Generator().manual_seed(0))
    draws = {"aten::randint", "aten::rand"}
    assert len([name for name in counter.names if name not in draws]) <= 67
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::equal"} & set(counter.names)
    assert strong_view(x.to("meta"), torch.Generator().manual_seed(0)).shape == x.shape  # where nothing can be read


def test_what_changes_nothing():
    assert numbers("Identity", 0.3, 32) == numbers("Rotate", 30, 32) == numbers("Sharpness", 0.5, 2) == Numbers()
    square = covered(np.float32([0.0, 0.5]), np.float32([[0.5, 0.5], [0.0, 1.0]]), 32, 24)
    assert not square[0].any() and square[1, 0, :12, 18:].all() and square[1].sum() == 12 * 6
