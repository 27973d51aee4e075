"""The explorers: what they compute and draw, and that a control draws the figure again."""

import io
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ldrld import LDRLD, adw_weights, losses
from ldrld.results import explorers
from ldrld.results.explorers import draw_image, draw_run, draw_weights, image_of, pair_table, steps, time_left, watch


@pytest.fixture(scope="module")
def logits():
    return explorers.recorded()


class Shown:
    """A display that keeps what was shown in it."""

    def __init__(self):
        self.images = []

    def update(self, image, raw):
        assert raw
        self.images.append(image)


@pytest.fixture
def displayed(monkeypatch):
    """What is displayed, and the display of a figure."""
    everything, shown = [], Shown()

    def display(what, raw=False, display_id=False):
        everything.append(what)
        if not raw:
            return None
        shown.update(what, raw)
        return shown

    monkeypatch.setattr(explorers, "display", display)
    return everything, shown


def row(epoch, seconds=1.0):
    return {"epoch": epoch, "seconds": seconds, "train_accuracy": 50.0, "test_accuracy": 40.0, "terms": {"ce": 1.0}}


def size_of(image):
    return Image.open(io.BytesIO(image["image/png"])).size


def test_half_of_the_weight_is_found_by_adding_up():
    weights = adw_weights(5, dtype=torch.float64)
    n, flat = explorers.pairs_for_half(weights), weights.flatten().sort(descending=True).values
    assert flat[:n].sum() >= weights.sum() / 2 > flat[: n - 1].sum()


@pytest.mark.parametrize("depth", [2, 5, 10])
def test_pairs_add_up_to_the_term_of_the_loss(logits, depth):
    z_s, z_t, y = logits.z_s[3], logits.z_t[3], logits.labels[3:4]
    pairs = pair_table(z_s, z_t, depth, temperature=2.0)
    term = LDRLD(depth=depth, temperature=2.0).terms(z_s[None], z_t[None], y)["pairs"].item()
    assert len(pairs) == depth * (depth - 1) / 2
    assert np.isclose(term, 10.5 * 4 / (len(pairs) + 1) * pairs["loss"].sum())
    two_way = (z_t[[pairs["i"][0], pairs["j"][0]]] / 2).softmax(0)[0].item()
    assert np.isclose(pairs["teacher"][0], two_way) and (pairs["student"] >= 0.5).all()


def test_a_step_in_the_direction_shown_lowers_the_loss(logits):
    z_s, z_t, label = logits.z_s[9], logits.z_t[9], int(logits.labels[9])
    for name, direction in steps(z_s, z_t, label).items():
        loss = losses.build(name.lower())
        value = lambda z, loss=loss: loss(z[None], z_t[None], torch.tensor([label]))
        assert value(z_s + 0.01 * direction) < value(z_s)
        assert direction.abs().sum().item() == pytest.approx(1)


def test_images_of_the_menu_are_confused_by_the_student_alone(logits):
    for label, image in explorers.confused(logits, most=5):
        name = logits.classes[int(logits.labels[image])]
        assert label.startswith(f"{image}: {name}, not ") and logits.classes[int(logits.z_t[image].argmax())] == name


def test_networks_without_logits_are_named():
    with pytest.raises(FileNotFoundError, match="no logits of resnet110"):
        explorers.recorded(teacher="resnet110")


@pytest.mark.parametrize("depth", [2, 10])
def test_figures_say_what_they_show(logits, depth):
    figures = [draw_weights(depth, epsilon=0.0, weighting="irw"), draw_image(logits, 9, depth, temperature=1.0)]
    figures.append(draw_run([row(1), row(2)], 3, "KD", earlier=[[row(1)]]))
    texts = [f"d = {depth}, ε = 0", f"labelled “apple”, d = {depth}", "KD: accuracy and loss"]
    for figure, said in zip(figures, texts):
        image = image_of(figure)
        assert said in image["text/plain"] and min(size_of(image)) > 250


def test_extreme_settings_can_be_drawn(logits):
    """Sliders reach weights that are all zero, and a student that has the teacher's logits."""
    assert image_of(draw_weights(delta=0.0))["image/png"]
    same = logits._replace(z_s=logits.z_t)
    assert image_of(draw_image(same, 9))["image/png"]


def test_the_time_left_is_that_of_the_remaining_epochs():
    assert time_left([row(1, 2.0), row(2, 2.0), row(3, 90.0)], 10) == timedelta(seconds=14)
    assert time_left([row(1)], 1) == timedelta()


def test_a_batch_shows_the_figure_alone(logits, displayed, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    explorers.explore(partial(draw_image, logits), depth=(2, 10))
    (image,) = displayed[0]
    assert "d = 7" in image["text/plain"]


def test_a_slider_draws_the_figure_again(displayed, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "explore.ipynb")
    explorers.explore(draw_weights, depth=(2, 10), epsilon=(0.0, 5.0, 0.1))
    everything, shown = displayed
    depth, epsilon = everything[0].children
    assert (depth.description, depth.value, epsilon.description, epsilon.value) == ("d", 7, "ε", 1.5)
    depth.value = 4
    assert [image["text/plain"][:21] for image in shown.images] == ["Pair weights (adw) at"] * 2
    assert "d = 4" in shown.images[1]["text/plain"] and shown.images[0] != shown.images[1]


def test_a_run_is_drawn_after_every_epoch(displayed):
    progress = []
    rows = watch((row(epoch) for epoch in (1, 2, 3)), 3, "CE", report=lambda *said: progress.append(said))
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    assert progress == [(epoch, timedelta(seconds=3 - epoch)) for epoch in (1, 2, 3)]
    said = [image["text/plain"].split("after ")[1] for image in displayed[1].images]
    assert said == [f"{epoch} of 3 epochs" for epoch in (1, 2, 3)]


def test_the_button_trains_again(displayed, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "explore.ipynb")
    monkeypatch.setattr(explorers, "digits_run", lambda method, epochs: (row(k + 1) for k in range(epochs)))
    explorers.explore_training("KD", epochs=2)
    everything, shown = displayed
    (method, epochs, button), (bar, note) = (line.children for line in everything[0].children)
    assert (bar.value, bar.max, note.value, button.disabled) == (2, 2, "epoch 2/2, 0:00:00 left", False)
    method.value, epochs.value = "DKD", 3
    button.click()
    assert bar.value == bar.max == 3 and "DKD" in shown.images[-1]["text/plain"]


def test_a_student_learns_digits():
    epochs = list(explorers.digits_run("LDRLD", epochs=4))
    assert len(epochs) == 4 and epochs[-1]["test_accuracy"] > 2 * epochs[0]["test_accuracy"]
