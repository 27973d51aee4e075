"""One student for a user's images, from the folder to the report: `ldrld distill`.

Training is `ldrld.experiments.runner.run`, so everything that holds for a run holds here: a record, checkpoints,
a finished run is not repeated. Results lie in one folder, which this module creates and remembers in `distill.json`.
"""
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldrld import losses, models
from ldrld.core import paths
from ldrld.core.files import sha256_of, write_whole
from ldrld.core.provenance import default_device
from ldrld.data.own_images import OwnImages, own_images
from ldrld.data.registry import registered
from ldrld.experiments.config import Pretrained, RunConfig, file_of, name_of, network_in, pretrained
from ldrld.experiments.model_cards import checked_weights
from ldrld.experiments.records import Record
from ldrld.experiments.runner import run
from ldrld.losses.base import LossBase
from ldrld.models.evaluation import logits_of
from ldrld.models.weights import WeightsError
from ldrld.training.recipes import usual_sgd

__all__ = ["PROFILE", "Request", "Distilled", "distill"]

PROFILE = "distill"  # folder of the records
MEMORY = "distill.json"  # the settings of a folder, and the hashes of the pages in it
CHANCE = 2  # a teacher from a file below this many times chance has other classes, or saw other images
FEW_CLASSES = 12  # up to here LDRLD compares all classes, see nbs/paper/open_questions/depth_classes
Say = Callable[[str], object]


@dataclass(frozen=True)
class Request:
    """What to train, on which images."""

    data: Path  # folder of images, see `ldrld.data.own_images`
    out: Path  # folder of the results, new or from the same request
    teacher: str  # a file of weights, or the name of a network, which is trained with cross-entropy first
    student: str  # name in `ldrld.models`
    method: str = "ldrld"  # name in `ldrld.losses`, of a loss that needs a teacher
    loss_args: dict[str, Any] = field(default_factory=dict)  # hyper-parameters of the loss; the defaults otherwise
    epochs: int = 30  # the student's passes over the training images
    teacher_epochs: int | None = None  # of a teacher that is trained here; None: the student's
    size: tuple[int, int] = (32, 32)  # height and width in pixels
    holdout: float = 0.2  # fraction of every class that is held out, where the folder has no test images
    baseline: bool = False  # whether the student is also trained without a teacher
    teacher_network: str | None = None  # network in the teacher's file; None: one of ldrld's, recognized by its weights
    recipe: str | None = None  # learning-rate schedule; None: onecycle, or deit for networks of timm
    batch_size: int = 64  # images per step
    lr: float | None = None  # the student's learning rate; None: the usual one of its network, as for the teacher
    seed: int = 0  # of the initial weights, data order and augmentation
    flip: bool = True  # whether training images are flipped at random; not for letters and digits


class Distilled(NamedTuple):
    """What `distill` made, by "student", "teacher" and, if requested, "baseline"."""

    request: Request
    own: OwnImages  # the images, and the files they come from
    config: RunConfig  # the student's
    records: dict[str, Record]  # of the networks that were trained here
    networks: dict[str, nn.Module]  # with their stored weights, in evaluation mode
    logits: dict[str, Tensor]  # (test images, classes) float32, computed from the stored weights
    weights: dict[str, Path]  # files of weights


def settings_of(request: Request) -> dict[str, Any]:
    """The settings that a folder of results remembers: all but `baseline`, which may be added later, and places."""
    given = json.loads(json.dumps(asdict(request), default=str))
    teacher = Path(request.teacher).expanduser()
    given["teacher"] = sha256_of(teacher) if teacher.is_file() else request.teacher
    return {name: value for name, value in given.items() if name not in ("baseline", "data", "out")}


def check_folder(request: Request) -> None:
    """ValueError for a folder of results that holds anything else, or other settings, or a page that was edited since.

    Settings may change as long as nothing was trained with them.
    """
    out, source = request.out.resolve(), request.data.expanduser().resolve()
    if out == source or source in out.parents:
        raise ValueError(f"--out {out}: lies in the folder of images, {source}; choose a folder outside")
    memory = out / MEMORY
    if not memory.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out}: exists, and `ldrld distill` did not make it; choose a new folder")
        return
    try: before = json.loads(memory.read_text(encoding="utf-8"))
    except ValueError: raise ValueError(f"{memory}: damaged; choose another --out") from None
    now, then = settings_of(request), before["settings"]
    begun = any(out.glob("runs/*/checkpoint.pt")) or any(out.glob(f"data/runs/{PROFILE}/*.json"))
    if begun and (other := [name for name in now if now[name] != then.get(name)]):
        said = ", ".join(f"{name} was {then.get(name)!r}, now {now[name]!r}" for name in other)
        raise ValueError(f"--out {out}: holds results with other settings ({said}); choose another folder")
    for page, digest in before["pages"].items():
        if (out / page).exists() and sha256_of(out / page) != digest:
            raise ValueError(f"{out / page}: was edited since it was written; move it away, and call again")


def remember(request: Request, pages: Sequence[Path] = ()) -> None:
    """Note the settings, and the hashes of the pages, so that a later call overwrites no page that was edited."""
    out = request.out.resolve()
    hashes = {page.relative_to(out).as_posix(): sha256_of(page) for page in pages}
    write_whole(out / MEMORY, json.dumps({"settings": settings_of(request), "pages": hashes}, indent=1) + "\n")


@contextmanager
def results_in(folder: Path) -> Iterator[None]:
    """Context in which records, weights and checkpoints go to a folder."""
    before = os.environ.get("LDRLD_OUT")
    os.environ["LDRLD_OUT"] = str(folder.resolve())
    try: yield
    finally:
        if before is None: del os.environ["LDRLD_OUT"]
        else: os.environ["LDRLD_OUT"] = before


def checked_method(request: Request, classes: int) -> dict[str, Any]:
    """The hyper-parameters of the loss. ValueError for a loss that needs no teacher, or deploys more than a student."""
    args = dict(request.loss_args)
    if request.method == "ldrld" and "depth" not in args and classes <= FEW_CLASSES: args["depth"] = classes
    loss = losses.build(request.method, **args)
    if not loss.needs_teacher:
        others = [name for name in losses.available("logits") if losses.needs_teacher(name)]
        raise ValueError(f"--method {request.method}: needs no teacher, so nothing would be distilled; choose one of "
                         f"{', '.join(others)}")
    if type(loss).deployed is not LossBase.deployed:
        raise ValueError(f"--method {request.method}: deploys more than the student's network, which a report of one "
                         "network cannot show; use `ldrld run`")
    return args


def recipe_of(request: Request, network: str) -> str:
    """The recipe of a network: the requested one, else AdamW for networks of timm, and SGD in one cycle for ours."""
    if request.recipe: return request.recipe
    return "onecycle" if models.returns_features(network) else "deit"


def network_of_file(request: Request, classes: Sequence[str]) -> str:
    """The network of a teacher's file. ValueError if it is unknown, or was trained for another number of classes."""
    path = Path(request.teacher).expanduser()
    if not path.is_file(): raise ValueError(f"--teacher {request.teacher}: no such file, and no network of this name")
    named = request.teacher_network and models.canonical(request.teacher_network)
    if named and not models.returns_features(named):
        loaded(path, named, len(classes))
        return named
    network, theirs = network_in(path)
    if named and named != network: raise ValueError(f"--teacher-network {named}: {path} holds {network}")
    if theirs != len(classes):
        names = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
        raise ValueError(f"--teacher {path}: {network} for {theirs} classes, but {request.data} has {len(classes)} "
                         f"({names}); a teacher must know the same classes, in alphabetical order: to train one here, "
                         f"say --teacher {network}")
    return network


def loaded(path: Path, network: str, classes: int) -> nn.Module:
    """A network of timm with the weights of a file that ldrld or timm wrote. ValueError if they do not fit."""
    model = models.build(network, classes)
    inner: Any = model  # timm's own files have no names of the wrapper around its networks
    try: return models.load_weights(model, path)
    except WeightsError: models.load_weights(inner.network, path)
    return model


def kept_teacher(path: Path, network: str, classes: int) -> Pretrained:
    """The teacher in a file, of which a copy is kept with the results."""
    if models.returns_features(network): return pretrained(path)
    copy = models.save_weights(loaded(path, network, classes), paths.work("teacher") / "weights.safetensors")
    teacher = Pretrained(model=network, sha256=sha256_of(copy))
    write_whole(paths.work(name_of(teacher)) / "weights", copy.read_bytes())
    return teacher


def is_network(name: str) -> bool:
    """Whether a teacher is the name of a network. ValueError for a file of that name, which could be meant as well."""
    path = Path(name).expanduser()
    if path.exists() or path.suffix or len(path.parts) > 1:
        try: models.canonical(name)
        except ValueError: return False
        if path.is_file():
            raise ValueError(f"--teacher {name}: a network and also a file here; for the file say ./{name}")
    return bool(network_named("--teacher", name))


def configured(request: Request, own: OwnImages) -> tuple[RunConfig, RunConfig]:
    """The run of the student, and of the same student without a teacher. ValueError for settings that do not fit."""
    classes = own.images.classes
    args = checked_method(request, len(classes))
    student, trained_here = network_named("--student", request.student), is_network(request.teacher)
    network = models.canonical(request.teacher) if trained_here else network_of_file(request, classes)
    for option, name in (("--teacher", network), ("--student", student)): check_size(option, name, own)
    shared: dict[str, Any] = {"dataset": own.images.name, "batch_size": request.batch_size, "seed": request.seed}
    run_of = {**shared, "model": student, "recipe": recipe_of(request, student), "epochs": request.epochs}
    if request.lr is not None: run_of["lr"] = request.lr
    plain = RunConfig(**run_of, loss="ce")
    recipe = recipe_of(request, network)
    of_teacher = {**shared, **usual_sgd(network, recipe), "model": network, "recipe": recipe, "loss": "ce",
                  "epochs": request.teacher_epochs or request.epochs}
    distilled = {**run_of, "loss": request.method, "loss_args": args}
    made = RunConfig.model_validate({**distilled, "teacher": of_teacher})
    remember(request)  # everything fits: the folder is made
    if trained_here: return made, plain
    kept = kept_teacher(Path(request.teacher).expanduser(), network, len(classes))
    return RunConfig(**distilled, teacher=kept), plain


def network_named(option: str, name: str) -> str:
    """The registered name of a network; the error names the option."""
    try: return models.canonical(name)
    except ValueError as error: raise ValueError(f"{option} {str(error).removeprefix('name=')}") from None


def check_size(option: str, network: str, own: OwnImages) -> None:
    """ValueError if a network cannot be built, or cannot take images of this size."""
    if why := models.lacking(network): raise ValueError(f"{option}: {why}")
    height, width = own.images.train_images.shape[1:3]
    model = models.build(network, len(own.images.classes)).eval()
    try:
        with torch.no_grad(): model(torch.zeros(2, 3, height, width))
    except RuntimeError as error:
        raise ValueError(f"--image-size {height}x{width}: {network} cannot take such images ({error}); 32 or 64 work "
                         "for every network of ldrld") from None


def evaluated(config: RunConfig, own: OwnImages, weights: dict[str, Path]) -> tuple[dict, dict]:
    """The networks with their stored weights, and their logits on the test images, by name."""
    assert config.teacher is not None
    names = {"teacher": config.teacher.model, "student": config.model, "baseline": config.model}
    networks, logits = {}, {}
    for who, path in weights.items():
        network = models.load_weights(models.build(names[who], len(own.images.classes)), path).to(default_device())
        networks[who] = network.eval()
        logits[who] = logits_of(network, own.images.test_images, own.images.mean, own.images.std).cpu()
    return networks, logits


def check_teacher(config: RunConfig, own: OwnImages, say: Say) -> None:
    """Report the accuracy of a teacher from a file before a student learns from it, with a warning near chance."""
    if not isinstance(config.teacher, Pretrained): return
    _, logits = evaluated(config, own, {"teacher": file_of(config.teacher)})
    right = (logits["teacher"].argmax(1) == own.images.test_labels).double().mean().item()
    say(f"teacher: {100 * right:.2f} % of the test images")
    if right < CHANCE / len(own.images.classes):
        say("  this is near chance: are these weights of a network trained on these classes, in alphabetical order, on "
            "images of this size, with the mean and deviation of the training images subtracted and divided by?")


def train(config: RunConfig, plain: RunConfig | None, say: Say) -> tuple[dict[str, Record], dict[str, Path]]:
    """Train what is not trained yet, the teacher first; records and files of weights by name."""
    keep, teacher = ("weights",), config.teacher
    records: dict[str, Record] = {}
    weights: dict[str, Path] = {}
    runs = {"teacher": teacher, "student": config, "baseline": plain}
    for who, wanted in runs.items():
        if isinstance(wanted, Pretrained): weights[who] = file_of(wanted)
        if not isinstance(wanted, RunConfig): continue
        records[who] = run(wanted, PROFILE, keep, say)
        weights[who] = checked_weights(name_of(wanted), PROFILE)
    return records, weights


def describe(own: OwnImages, say: Say) -> None:
    """Report what was read, and what could not be."""
    n, tests = len(own.train_files), len(own.test_files)
    say(f"{n} training and {tests} test images ({own.split}), {len(own.images.classes)} classes")
    for file, why in list(own.unreadable.items())[:5]: say(f"  left out: {file}: {why}")
    if own.unreadable: say(f"left out because they cannot be read: {len(own.unreadable)}")
    if own.repeated: say(f"{own.repeated} test images are also training images: accuracies will be too high")


def distill(
    request: Request,
    say: Say = print,
) -> Distilled:
    """Train a student, and its teacher where it is not a file; a second call with the same request resumes.

    ValueError, before anything is trained, for settings that do not fit the images or each other.
    """
    check_folder(request)
    own = own_images(request.data, request.size, request.holdout, request.flip)
    describe(own, say)
    with results_in(request.out), registered(own.images):
        config, plain = configured(request, own)
        check_teacher(config, own, say)
        records, weights = train(config, plain if request.baseline else None, say)
        networks, logits = evaluated(config, own, weights)
    return Distilled(request, own, config, records, networks, logits, weights)
