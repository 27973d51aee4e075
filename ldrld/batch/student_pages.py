"""The pages of `ldrld distill`: a report with its tables and figures, a model card, and the student's weights."""
import shlex
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from torch import nn

from ldrld import __version__, models
from ldrld.batch.distillation import CHANCE, PROFILE, Distilled, remember
from ldrld.bench.deployment import latency, macs, parameters
from ldrld.core.files import write_whole
from ldrld.results import student_report

__all__ = ["write_pages", "command_of"]

WEIGHTS, REPORT, CARD, FOLDER = "student.safetensors", "report.md", "model_card.md", "report"


def command_of(made: Distilled) -> str:
    """The command that repeats a distillation."""
    r = made.request
    words = ["ldrld", "distill", "--data", str(r.data), "--teacher", r.teacher, "--student", r.student]
    words += ["--out", str(r.out), "--method", r.method, "--epochs", str(r.epochs), "--seed", str(r.seed)]
    words += ["--image-size", f"{r.size[0]}x{r.size[1]}", "--batch-size", str(r.batch_size)]
    optional = {"--teacher-epochs": r.teacher_epochs, "--teacher-network": r.teacher_network, "--recipe": r.recipe,
                "--lr": r.lr}
    words += [word for name, value in optional.items() if value is not None for word in (name, str(value))]
    words += [word for name, value in r.loss_args.items() for word in ("--set", f"{name}={value}")]
    if r.holdout != 0.2: words += ["--holdout", str(r.holdout)]
    if not r.flip: words.append("--no-flip")
    if r.baseline: words.append("--baseline")
    return shlex.join(words)


def as_markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, whose cells are text already; a class may contain a bar."""
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
    return "\n".join([line(table.columns), "|" + "---|" * len(table.columns), *map(line, table.to_numpy())])


def costs(made: Distilled) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Parameters, multiply-accumulates and bytes of teacher and student, and their latencies."""
    size, networks = made.request.size, {who: made.networks[who] for who in ("teacher", "student")}
    rows = [{"network": who, "name": name, "parameters": parameters(networks[who]), "MACs": macs(networks[who], size),
             "bytes": stored(networks[who])} for who, name in names_of(made).items() if who in networks]
    return pd.DataFrame(rows), latency(networks, size)


def stored(network: nn.Module) -> int:
    """Bytes of a network's weights in half precision, as the student's are stored."""
    return sum(2 * value.numel() for value in network.state_dict().values())


def names_of(made: Distilled) -> dict[str, str]:
    """The registered name of each network that there is."""
    assert made.config.teacher is not None
    names = {"teacher": made.config.teacher.model, "student": made.config.model, "baseline": made.config.model}
    return {who: name for who, name in names.items() if who in made.networks}


def tables_of(made: Distilled) -> dict[str, pd.DataFrame]:
    """Every table of a report, by the name of its file."""
    images, logits, pair = made.own.images, made.logits, {who: made.logits[who] for who in ("teacher", "student")}
    cost, times = costs(made)
    left_out = pd.DataFrame(list(made.own.unreadable.items()), columns=["file", "reason"])
    splits = pd.DataFrame({"file": [*made.own.train_files, *made.own.test_files]})
    splits["split"] = ["training"] * len(made.own.train_files) + ["test"] * len(made.own.test_files)
    return {
        "comparison": student_report.comparison(logits, images.test_labels),
        "by_class": student_report.by_class(logits, images.test_labels, images.classes),
        "confusions": student_report.confusions(pair, images.test_labels, images.classes),
        "differences": student_report.differences(pair, images.test_labels, images.classes, made.own.test_files),
        "reliability": student_report.reliability_table(logits, images.test_labels),
        "curves": student_report.learning_curves(made.records),
        "cost": cost,
        "latency": times,
        "images": splits,
        "left_out": left_out,
    }


def write_figures(made: Distilled, tables: dict[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Draw the figures; those that have nothing to show are left out."""
    images = made.own.images
    figures = {
        "curves": student_report.curves_figure(tables["curves"]),
        "reliability": student_report.reliability_figure(tables["reliability"]),
        "confusions": student_report.confusion_figure(made.logits["student"], images.test_labels, images.classes),
        "differences": student_report.difference_figure(tables["differences"], images.test_images),
    }
    written = []
    for name, figure in figures.items():
        if figure is None: continue
        written.append(folder / f"{name}.png")
        student_report.write_figure(figure, written[-1])
    return written


def summary(tables: dict[str, pd.DataFrame], names: dict[str, str]) -> pd.DataFrame:
    """The first table of the report, as text."""
    rows = []
    for _, line in tables["comparison"].iterrows():
        who = line["network"]
        note = {"teacher": "teacher", "student": "student, distilled", "baseline": "student, without a teacher"}[who]
        rows.append({"network": f"{names[who]} ({note})",
                     "accuracy, % [95 % interval]": f"{line['accuracy']:.2f} [{line['low']:.1f}, {line['high']:.1f}]",
                     "ECE, %": f"{line['ece']:.2f}", "NLL": f"{line['nll']:.3f}",
                     "top-1 agreement with the teacher, %": f"{line['agreement']:.2f}"})
    return pd.DataFrame(rows)


def cost_table(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Costs as text, a row per network: medians, with quartiles in brackets."""
    rows = []
    for _, line in tables["cost"].iterrows():
        row = {"network": f"{line['name']} ({line['network']})", "parameters": f"{line['parameters']:,}",
               "multiply-accumulates": f"{line['MACs'] / 1e6:,.1f} M",
               "weights in half precision": f"{line['bytes'] / 1e6:.2f} MB"}
        times = tables["latency"]
        for _, t in times[times["network"] == line["network"]].iterrows():
            row[f"ms, batch of {t['batch']}"] = f"{t['median']:.2f} [{t['q1']:.2f}, {t['q3']:.2f}]"
        rows.append(row)
    return pd.DataFrame(rows)


def caveats(made: Distilled, tables: dict[str, pd.DataFrame]) -> list[str]:
    """What a reader has to know before quoting a number: always one seed, and what is special here."""
    own, r = made.own, made.request
    said = [f"One seed ({r.seed}): another one gives another accuracy. The interval covers the choice of the "
            f"{len(own.test_files)} test images, not the seed."]
    if own.split.endswith("held out by ldrld"):
        said.append(f"The test images are {own.split}, at random; images of one scene or person may be on both sides.")
    if "teacher" not in made.records:
        said.append("The teacher is a file: whether it was trained on test images is not known. It sees images "
                    "normalised by the mean and deviation of the training images here, whatever it was trained with.")
        teacher = tables["comparison"].set_index("network").loc["teacher", "accuracy"]
        if teacher < CHANCE * 100 / len(own.images.classes):
            said.append(f"**The teacher reaches only {teacher:.1f} %, near chance**: it was probably trained on other "
                        "classes, on the same ones in another order, or on images prepared in another way.")
    if own.repeated: said.append(f"{own.repeated} test images are also training images, pixel for pixel.")
    if own.unreadable:
        said.append(f"Files left out because they cannot be read: {len(own.unreadable)} (`{FOLDER}/left_out.csv`).")
    return said


def against_baseline(made: Distilled) -> str:
    """The student with and without a teacher, on the same test images; empty if it was not trained without."""
    if "baseline" not in made.logits:
        return "The same student without distillation was not trained; `--baseline` adds it."
    labels = made.own.images.test_labels
    student, plain = (made.logits[who].argmax(1) == labels for who in ("student", "baseline"))
    gained, lost = int((student & ~plain).sum()), int((plain & ~student).sum())
    points = 100 * (gained - lost) / len(labels)
    return (f"Distillation against the same student without a teacher: {points:+.2f} points; of {len(labels)} test "
            f"images, {gained} are right only with distillation and {lost} only without. With one seed each, this is "
            "no test of significance.")


def settings_table(made: Distilled) -> pd.DataFrame:
    """The settings of every run, and its record."""
    rows = []
    for who, record in made.records.items():
        c = record.config
        loss = ", ".join([c.loss, *(f"{k} = {v}" for k, v in c.loss_args.items())])
        place = f"data/runs/{PROFILE}/{record.name}.json"
        rows.append({"run": who, "loss": loss, "recipe": c.recipe, "epochs": c.epochs, "learning rate": f"{c.lr:g}",
                     "batch size": c.batch_size, "seed": c.seed, "seconds": f"{record.seconds:.0f}",
                     "record": f"[{record.name}]({place})"})
    return pd.DataFrame(rows)


def figure_link(name: str, said: str, there: Sequence[str]) -> str:
    """A figure of the report in Markdown; empty if it was not drawn."""
    return f"![{said}]({FOLDER}/{name}.png)" if name in there else ""


def report_page(made: Distilled, tables: dict[str, pd.DataFrame], figures: Sequence[str]) -> str:
    """The report in Markdown."""
    own, names = made.own, names_of(made)
    n, apart, mistakes = len(own.test_files), tables["differences"], tables["confusions"]
    right = apart["right"].value_counts()
    count = lambda who: int(right.get(who, 0))
    largest = mistakes.head(10).rename(columns={"of": "images of the class", "student": "student's mistakes",
                                                "teacher": "teacher's"})
    differ = apart.drop(columns="index").head(10)
    parts: Iterable[str] = [
        f"# {names['student']} distilled from {names['teacher']}",
        f"{own.images.name.partition(':')[2]}: {len(own.train_files):,} training and {n:,} test images ({own.split}), "
        f"{len(own.images.classes)} classes, seen at {made.request.size[0]}×{made.request.size[1]} pixels.",
        as_markdown(summary(tables, names)),
        against_baseline(made),
        "All numbers are of the stored weights (half precision, computed in float32), on the test images.",
        "\n".join(f"- {line}" for line in caveats(made, tables)),
        "## Calibration",
        "A calibrated network is right as often as its confidence says; ECE is the mean distance from that.",
        figure_link("reliability", "Accuracy against confidence", figures),
        "## Training",
        figure_link("curves", "Accuracy and loss after each epoch", figures),
        "## Confusions",
        as_markdown(largest) if len(largest) else "The student makes no mistake on the test images.",
        figure_link("confusions", "Confusion matrix of the student", figures),
        "## Where student and teacher differ",
        f"On {len(apart)} of {n} test images. The student is right on {count('student')} of them, the teacher on "
        f"{count('teacher')}, neither on {count('neither')}. Those on which the student is surest:",
        as_markdown(differ) if len(differ) else "",
        figure_link("differences", "Test images on which student and teacher differ", figures),
        "## Cost",
        as_markdown(cost_table(tables)),
        f"Latency of a forward pass on {machine_of(made)}: median [quartiles] of "
        f"{int(tables['latency']['n'].iloc[0])} rounds.",
        "## Settings",
        as_markdown(settings_table(made)),
        f"```bash\n{command_of(made)}\n```",
        f"Weights: [{WEIGHTS}]({WEIGHTS}). [Model card]({CARD}). Tables in `{FOLDER}/`: "
        + ", ".join(f"[{name}]({FOLDER}/{name}.csv)" for name in tables) + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine_of(made: Distilled) -> str:
    """The machine that the networks run on, from the student's record."""
    machine = made.records["student"].machine
    return machine["gpu"] or f"{machine['processor']}, one thread"


HOW = """```python
import torch
from ldrld import models
from ldrld.data.image_files import read_image  # fits the image into the size, as in training

note = models.read_metadata("{weights}")
student = models.load_weights(models.build(note["model"], len(note["classes"])), "{weights}").eval()
pixels = torch.tensor(read_image("image.jpg", tuple(note["image_size"]))).permute(2, 0, 1)[None] / 255
mean, std = (torch.tensor(note[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
with torch.no_grad(): probabilities = student((pixels - mean) / std).softmax(1)[0]
print(note["classes"][probabilities.argmax()], probabilities.max())
```"""


def note_of(made: Distilled) -> dict[str, Any]:
    """What is stored with the student's weights, and heads its card: all that is needed to use them."""
    images = made.own.images
    return {"model": made.config.model, "classes": list(images.classes), "image_size": list(made.request.size),
            "mean": list(images.mean), "std": list(images.std), "record": made.records["student"].name}


def card_page(made: Distilled, tables: dict[str, pd.DataFrame]) -> str:
    """The model card in Markdown, with YAML front matter."""
    own, names, student = made.own, names_of(made), tables["comparison"].set_index("network").loc["student"]
    front = {**note_of(made), "teacher": names["teacher"], "method": made.config.loss,
             "accuracy": round(float(student["accuracy"]), 2), "ece": round(float(student["ece"]), 2),
             "data_fingerprint": own.images.fingerprint, "ldrld": __version__}
    weakest = tables["by_class"].sort_values("student", kind="stable").head(3)
    worst = ", ".join(f"{row['class']} {row['student']:.1f} %" for _, row in weakest.iterrows())
    limits = [
        f"It knows {len(own.images.classes)} classes and gives every image one of them, whatever it shows.",
        f"It was measured on {len(own.test_files)} test images ({own.split}); other cameras, places or times were "
        "not tested.",
        f"Weakest classes: {worst}.",
        f"Its confidences are off by {student['ece']:.1f} percentage points on average (ECE).",
        *caveats(made, tables),
    ]
    c = made.config
    args = ", ".join(f"{k} = {v}" for k, v in c.loss_args.items())
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, default_flow_style=None)}---",
        f"# {names['student']} for {own.images.name.partition(':')[2]}",
        f"An image classifier, trained by distillation (`{c.loss}`) from {names['teacher']} with ldrld {__version__}.",
        f"## Data\n\n{len(own.train_files):,} training and {len(own.test_files):,} test images ({own.split}), scaled "
        f"to cover {made.request.size[0]}×{made.request.size[1]} pixels and cropped in the middle; "
        f"{'random crops and horizontal flips' if own.images.flip else 'random crops'} in training. "
        f"Classes: {', '.join(own.images.classes)}.",
        f"## Settings\n\n{c.epochs} epochs, recipe `{c.recipe}`, learning rate {c.lr:g}, batch size {c.batch_size}, "
        f"seed {c.seed}; loss `{c.loss}` with {args}.",
        f"## Results\n\n{as_markdown(summary(tables, names))}\n\n{as_markdown(cost_table(tables))}\n\n"
        f"Details: [report]({REPORT}).",
        "## Limits\n\n" + "\n".join(f"- {line}" for line in limits),
        f"## Use\n\n{HOW.format(weights=WEIGHTS)}",
    ]
    return "\n\n".join(parts) + "\n"


def write_pages(made: Distilled) -> Path:
    """Write the student's weights, the report with its tables and figures, and the model card.

    Returns the report's path. Pages of an earlier call are written again; edited ones were refused by `distill`.
    """
    out = made.request.out.resolve()
    tables = tables_of(made)
    written = write_figures(made, tables, out / FOLDER)
    drawn = [path.stem for path in written]
    for name, table in tables.items():
        written.append(out / FOLDER / f"{name}.csv")
        write_whole(written[-1], table.to_csv(index=False))
    half = deepcopy(made.networks["student"]).cpu().half()
    written.append(models.save_weights(half, out / WEIGHTS, metadata=note_of(made)))
    for name, text in ((REPORT, report_page(made, tables, drawn)), (CARD, card_page(made, tables))):
        written.append(out / name)
        write_whole(written[-1], text)
    remember(made.request, written)
    return out / REPORT
