"""The model of cost: arithmetic, time on several devices, and bytes of logits, each against an independent count."""

from math import ceil

import numpy as np
import pytest
import torch

from ldrld import models
from ldrld.bench import scaling
from ldrld.bench.scaling import Device, Job, efficiency, hours, makespan, still_pays

JOB = Job(images=1000, batch=256, epochs=3, flops=2e9, gradient=4_000_000)
DEVICE = Device(flops=1e12, fixed=1e-3, latency=1e-5, bandwidth=1e9)


def test_forward_flops_are_those_of_the_layers():
    """Counted by hand with hooks, from the shapes that a real image has."""
    counted, network = [], models.build("MobileNetV1", 10).eval()

    def count(layer, inputs, output):
        per_output = layer.weight[0].numel()  # multiplications and additions for one number
        counted.append(2 * output.numel() * per_output)

    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    assert scaling.forward_flops("MobileNetV1", 10, 224) == sum(counted)
    alone, taught = (scaling.training_flops("MobileNetV1", t, 10, 224) for t in (None, "MobileNetV1"))
    assert alone == 3 * sum(counted) and taught == 4 * sum(counted)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n", [1, 3, 64])
def test_hours_are_the_sum_over_all_steps(n, overlap):
    exchange = 2 * (n - 1) * (1e-5 + 4_000_000 / n / 1e9)
    seconds = 0.0
    for images in [256, 256, 256, 232] * 3:
        compute = 1e-3 + ceil(images / n) * 2e9 / 1e12
        seconds += max(compute, exchange) if overlap else compute + exchange
    assert hours(n, JOB, DEVICE, overlap) == pytest.approx(seconds / 3600)


def test_the_last_batch_may_be_whole():
    assert hours(1, JOB._replace(images=512), DEVICE) == pytest.approx(3 * 2 * (1e-3 + 256 * 2e-3) / 3600)


def test_scaling_stops_paying_where_the_bill_is_a_quarter_higher():
    for overlap in (False, True):
        n = still_pays(JOB, DEVICE, overlap)
        assert efficiency(n, JOB, DEVICE, overlap) >= scaling.PAYS > efficiency(2 * n, JOB, DEVICE, overlap)
    free = Device(flops=1e12, latency=0.0, bandwidth=float("inf"))
    assert still_pays(JOB._replace(images=1024), free) == 64 and still_pays(JOB, free, most=5) == 4


def test_runs_of_a_table_wait_for_a_free_device():
    runs = [5.0, 4.0, 3.0, 3.0, 3.0]
    assert makespan(runs, 1) == 18 and makespan(runs, 2) == 10 and makespan(runs, 5) == makespan(runs, 64) == 5
    assert makespan([], 4) == 0


@pytest.mark.parametrize("classes, k", [(100, 7), (2**16, 3), (2**16 + 1, 3), (128_000, 64)])
def test_highest_logits_take_the_bytes_of_the_formula_and_keep_probabilities(tmp_path, classes, k):
    z = 4 * torch.randn(5, classes, generator=torch.Generator().manual_seed(k))
    z[0, -1] = 30  # the last class needs every bit of its number
    scaling.top_k_rows(z, k).tofile(tmp_path / "rows")
    assert (tmp_path / "rows").stat().st_size == scaling.top_k_bytes(5, k, classes)
    read = np.fromfile(tmp_path / "rows", scaling.top_k_type(k, classes))
    assert read["classes"][0, 0] == classes - 1
    kept = torch.from_numpy(np.exp(read["logits"].astype(float) - read["log_sum_exp"][:, None]))
    index = torch.from_numpy(read["classes"].astype(np.int64))
    torch.testing.assert_close(kept, z.double().softmax(1).gather(1, index), rtol=2e-2, atol=0)
    rest = 1 - kept.sum(1)
    torch.testing.assert_close(rest, z.double().softmax(1).scatter(1, index, 0).sum(1), rtol=0, atol=5e-3)
