"""What a batch does when processes die, disks are full and files change.

The short form dies a few times, at chosen moments. The campaign is the long form, `make campaign`: it kills more than
fifty processes at chosen and at random moments of complete batches, in local processes and in notebooks, and takes up
to an hour. Both end with records, weights, tables and figures that are bit-identical to those of an undisturbed run.
"""

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import deaths
from commands import ldrld
from deaths import Death

from ldrld.batch import leftovers
from ldrld.batch.scheduler import execute_runs
from ldrld.cli.app import end
from ldrld.core import paths
from ldrld.core.files import reserve, write_whole
from ldrld.experiments import published
from ldrld.experiments.catalog import EXPERIMENTS
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.model_cards import wrong_teachers
from ldrld.experiments.profiles import Profile
from ldrld.experiments.records import invented, lock_of, save_record
from ldrld.results import front_page, manifest, statistics, tables
from ldrld.results.figures import save_figure
from ldrld.training import checkpoint
from ldrld.training.teacher import mapped

ROOT = Path(__file__).parent.parent
YAML = """
data: handwritten digits
dataset: digits
pairs: [[resnet14, resnet8]]
teacher: {recipe: onecycle, epochs: 2, lr: 0.1}
student: {recipe: onecycle, epochs: 2, lr: 0.1}
seeds: [0, 1]
"""
ONLY = ("--only", "same_architecture", "--only", "probability_gap")  # a table, two figures, and logits that they need
TOY = Profile(
    name="toy",
    data="nothing",
    dataset="digits",
    pairs=(("resnet14", "resnet8"),),
    teacher=dict(recipe="onecycle", epochs=2, lr=0.1),
    student=dict(recipe="onecycle", epochs=2, lr=0.1),
)
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


# ---- processes that die ---------------------------------------------------------------------------------------------

# a training of two epochs that keeps everything, its table and its figure: once undisturbed, then in forked processes
# until one survives
ATTEMPTS = """
import multiprocessing, os, sys
import matplotlib.pyplot as plt
import pandas as pd
from ldrld.experiments.config import RunConfig
from ldrld.experiments.runner import run
from ldrld.results.figures import save_figure
from ldrld.results.tables import save_table

def attempt(out):
    os.environ["LDRLD_OUT"] = out
    config = RunConfig(dataset="digits", model="resnet8", recipe="onecycle", epochs=2, lr=0.1, train_share=0.1)
    record = run(config, "bench-small", keep=("weights", "logits"), report=None)
    table = pd.DataFrame([row["terms"] for row in record.history])
    save_table(table, "terms", "Loss terms", "bench-small", table)
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.plot(table["ce"])
    save_figure(fig, "terms", "Loss terms", "bench-small")

def code_of(out):
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(out,))
    process.start()
    process.join()
    return process.exitcode

faults = os.environ.pop("FAULTS")
attempt(sys.argv[1])
os.environ["FAULTS"] = faults
codes = [code_of(sys.argv[2])]
while codes[-1] == -9: codes.append(code_of(sys.argv[2]))
print(codes)
"""
MOMENTS = (
    Death(r"checkpoint\.pt$", "in"),
    Death(r"checkpoint\.pt$", "after"),
    Death(r"\.safetensors$", "in"),
    Death(r"teachers/.*\.md$", "before"),
    Death(r"\.npz$", "whole"),
    Death(r"runs/[\w-]+/[\w-]+\.json$", "in"),
    Death(r"runs/[\w-]+/[\w-]+\.json$", "after"),
    Death(r"\.csv$", "in"),
    Death(r"\.svg$", "in"),
)


@linux
def test_killed_while_anything_is_written_it_ends_the_same(tmp_path):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    env = {**os.environ, **deaths.environment(tmp_path, MOMENTS)}
    command = [sys.executable, "-c", ATTEMPTS, str(undisturbed), str(out)]
    got = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert got.stdout.splitlines() == [str([-9] * len(MOMENTS) + [0])], got.stdout + got.stderr
    assert deaths.happened(tmp_path) == {death.name for death in MOMENTS}
    found = deaths.results(out)
    assert found == deaths.results(undisturbed) and len(found) == 10, list(found)
    assert not [path for path in deaths.leftovers(out) if path.suffix != ".tmp"]


class Command:
    """`ldrld` in a process of its own, with a folder of its own, which is sent a signal once it trains."""

    def __init__(self, place, *words):
        self.place, self.words = place, words
        env = {**os.environ, **deaths.environment(place), "LDRLD_OUT": str(place / "out"), "COLUMNS": "200"}
        self.process = subprocess.Popen([sys.executable, "-m", "ldrld", *words], cwd=ROOT, env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=deaths.hears_signals)

    def trains(self):
        assert self.process.poll() is None, self.process.communicate()
        return list(self.place.glob("out/runs/*/checkpoint.pt")) or list(self.place.glob("out/data/runs/*/*.json"))

    def stopped_by(self, number):
        """The exit code, and what was said on standard error."""
        assert deaths.until(self.trains)
        self.process.send_signal(number)
        err = self.process.communicate(timeout=120)[1]
        return self.process.returncode, err

    def left(self):
        return deaths.alive(self.place)


@linux
def test_stopped_by_a_signal_it_says_what_to_call_and_leaves_no_process(tmp_path):
    """Ctrl-C on a run, SIGTERM to a batch with a worker."""
    (tmp_path / "toy.yaml").write_text(YAML)
    run = ("run", "dataset=digits", "model=resnet8", "recipe=onecycle", "epochs=300", "lr=0.1")
    batch = ("reproduce", "--profile", str(tmp_path / "toy.yaml"), *ONLY, "--no-notebooks", "--jobs", "1")
    both = Command(tmp_path / "run", *run), Command(tmp_path / "batch", *batch)
    for command, number, expected in zip(both, (signal.SIGINT, signal.SIGTERM), (130, 143)):
        code, err = command.stopped_by(number)
        assert code == expected and "Traceback" not in err, err
        assert "call again to resume" in err and f"ldrld {' '.join(command.words)}" in err, err
        assert deaths.until(lambda: not command.left(), 30), command.left()  # noqa: B023


# ---- full and read-only disks ---------------------------------------------------------------------------------------


@pytest.fixture
def little_room():
    """No file may become larger than 50,000 bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_does_not_fit_leaves_the_earlier_one_and_one_line(tmp_path, little_room):
    path = tmp_path / "record.json"
    write_whole(path, "earlier")
    with pytest.raises(OSError, match=r"record\.json cannot be written; it needs 60,000 bytes, [\d,]+ are") as told:
        write_whole(path, "x" * 60_000)
    assert "\n" not in str(told.value) and path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_does_not_fit_is_told_in_one_line(tmp_path, little_room):
    """torch's own message is "unexpected pos"."""
    import torch

    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"optimizer": {"state": torch.zeros(10)}}, [{"epoch": 1}])
    with pytest.raises(OSError, match=r"checkpoint\.pt cannot be written; it needs 4"):
        checkpoint.save(path, {"optimizer": {"state": torch.zeros(100_000)}}, [{"epoch": 1}, {"epoch": 2}])
    assert checkpoint.epochs_trained(path) == 1


def test_a_teachers_table_that_does_not_fit_is_refused_before_it_is_mapped(tmp_path, little_room):
    """Else the process ends with SIGBUS, without a word."""
    with pytest.raises(OSError, match=r"logits-1\.bin cannot be written; it needs 2,020,000 bytes"):
        mapped(tmp_path / "logits-1.bin", (10_000, 101))
    assert not (tmp_path / "logits-1.bin").exists()


def test_a_teachers_table_is_reserved(tmp_path, monkeypatch):
    table = mapped(tmp_path / "logits-1.bin", (10_000, 101))
    table[7] = 1
    assert (tmp_path / "logits-1.bin").stat().st_blocks * 512 >= 2_020_000
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 0))
    assert (mapped(tmp_path / "logits-1.bin", (10_000, 101))[7] == 1).all(), "its space is there already"
    with pytest.raises(OSError, match="needs 2,020,000 bytes, 0 are free") as told:
        mapped(tmp_path / "logits-2.bin", (10_000, 101))
    assert told.value.errno == errno.ENOSPC and not (tmp_path / "logits-2.bin").exists()


def test_a_file_system_that_cannot_reserve_gets_a_sparse_file(tmp_path, monkeypatch):
    def never(*given):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", never)
    reserve(tmp_path / "table.bin", 10**6)
    assert (tmp_path / "table.bin").stat().st_size == 10**6


def test_a_place_that_cannot_be_written_to_is_told_in_one_line(tmp_path):
    """A file is where a folder should be: unlike a read-only folder, this stops the superuser, too."""
    (tmp_path / "data").write_text("no folder")
    words = ("dataset=digits", "model=resnet8", "recipe=onecycle", "epochs=1", "lr=0.1", "--out", tmp_path / "data")
    got = ldrld("run", *words)
    assert got.returncode == 1 and got.stderr.startswith("disk: ") and len(got.stderr.splitlines()) == 1, got.stderr


# ---- two batches in one folder --------------------------------------------------------------------------------------


def test_a_second_batch_says_that_another_process_runs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    config = RunConfig(dataset="digits", model="resnet8", recipe="onecycle", epochs=1)
    with lock_of(name_of(config)):
        outcomes = execute_runs([(config.model_dump(), ())], "quick", notebooks=False)
    end(outcomes, "quick")
    said = capsys.readouterr().out
    assert "0 done, 1 paused" in said and "1 paused: another process runs it" in said


# ---- what a killed process leaves -----------------------------------------------------------------------------------


def test_partial_files_of_every_writer_are_swept_and_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    places = [
        paths.records("toy") / "run.json",
        paths.records("toy") / "diverged" / "run.json",
        paths.records("toy") / "logits" / "run.npz",
        paths.tables("toy") / "table.csv",
        paths.figures("toy") / "figure.svg",
        paths.weights("toy") / "run.safetensors",
        paths.manifest("toy"),
        paths.work("run") / "checkpoint.pt",
    ]
    left = [place.with_name(f"{place.name}.{dead.pid}.tmp") for place in places]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
        os.utime(path, (time.time() - 120,) * 2)
    assert sorted(leftovers.sweep(TOY)) == sorted(left) and not any(path.exists() for path in left)
    given = [str(ROOT / path.relative_to(tmp_path)) for path in left]
    ignored = subprocess.run(["git", "-C", ROOT, "check-ignore", *given], capture_output=True, text=True)
    assert ignored.stdout.split() == given or not (ROOT / ".git").exists()


# ---- changed files --------------------------------------------------------------------------------------------------


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """Made-up records of a table, the table, a figure, and their hashes."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    for i, config in enumerate(EXPERIMENTS["same_architecture"].plan(TOY)["config"]):
        save_record(invented(config, 60 + i), "toy")
    table = statistics.summarise(statistics.collect("same_architecture", TOY), "same_architecture")
    tables.save_table(table, "same_architecture", "Toy", TOY)
    fig, ax = plt.subplots(figsize=(2, 2))
    ax.plot(table["mean"])
    save_figure(fig, "same_architecture", "Toy", TOY)
    plt.close(fig)
    manifest.update_manifest("toy", {})
    return tmp_path


NUMBER = rb"\d\.\d"
CHANGES = {  # where, and what is changed
    "Markdown": ("data/tables/toy/*.md", NUMBER),
    "LaTeX": ("data/tables/toy/*.tex", NUMBER),
    "CSV, last digit": ("data/tables/toy/*.csv", rb"\d(?=,)"),
    "SVG": ("figures/toy/*.svg", NUMBER),
    "PNG": ("figures/toy/*.png", rb"IDAT"),
    "caption": ("figures/toy/*.md", rb"Toy"),
    "seconds": ("data/runs/toy/*-kd-s0-*.json", rb'(?<="seconds": )\d'),
    "train_accuracy": ("data/runs/toy/*-kd-s0-*.json", rb'(?<="train_accuracy": )\d'),
    "best_epoch": ("data/runs/toy/*-kd-s0-*.json", rb'(?<="best_epoch": )\d'),
    "finished": ("data/runs/toy/*-kd-s0-*.json", rb'(?<="finished": "20)\d'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_any_changed_file_is_noticed_and_stays_so(reported, what):
    pattern, old = CHANGES[what]
    path = next(reported.glob(pattern))
    assert manifest.changed_results("toy") == []
    content = path.read_bytes()
    found = re.search(old, content)
    byte = content[found.end() - 1]
    path.write_bytes(content[: found.end() - 1] + bytes([byte + 1 if byte < ord("9") else byte - 1])
                     + content[found.end() :])
    (said,) = manifest.changed_results("toy")
    assert said.startswith(path.relative_to(reported).as_posix()) and "was changed" in said
    manifest.update_manifest("toy", manifest.stamps("toy"))
    assert manifest.changed_results("toy") == [said], "a report that does not make it again does not bless it"


def test_what_is_made_again_gets_its_new_hash_and_what_is_gone_is_missed(reported):
    before = manifest.stamps("toy")
    write_whole(paths.tables("toy") / "same_architecture.md", "made again")
    manifest.update_manifest("toy", before)
    assert manifest.changed_results("toy") == []
    (paths.figures("toy") / "same_architecture.svg").unlink()
    (said,) = manifest.changed_results("toy")
    assert "same_architecture.svg is missing" in said
    write_whole(paths.tables("toy") / "more.csv", "a\n1\n")
    assert manifest.not_in_manifest("toy") == ["data/tables/toy/more.csv"]


@pytest.mark.parametrize("content", ["", "half a line", "\0\1\2"])
def test_a_damaged_manifest_is_named(reported, content):
    paths.manifest("toy").write_text(content)
    if content == "": assert manifest.changed_results("toy") == [] and manifest.not_in_manifest("toy")
    else:
        with pytest.raises(ValueError, match=r"toy\.sha256, line 1: .* restore the file"): manifest.read_manifest("toy")


@pytest.mark.parametrize("folder", ["quick", "quick-repeated", "quick-tune", "small", "paper", "bench"])
def test_committed_results_have_their_hashes(folder):
    assert manifest.read_manifest(folder) and manifest.changed_results(folder) == []
    assert manifest.not_in_manifest(folder) == []


def test_a_changed_measurement_or_teacher_is_noticed(tmp_path, monkeypatch):
    for part in ("data/bench", "data/manifests", "data/teachers/quick"):
        shutil.copytree(ROOT / part, tmp_path / part)
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    measurement = next((tmp_path / "data/bench").glob("*/*.json"))
    measurement.write_text(measurement.read_text().replace('"load": ', '"load": 1', 1))
    assert any(measurement.name in line for line in manifest.changed_results("bench"))
    weights = next((tmp_path / "data/teachers/quick").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [weights.stem in line and "SHA-256" in line for line in wrong_teachers("quick")] == [True]


def test_a_changed_digit_in_the_readme_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = front_page.front_table().splitlines()[2]
    number = re.search(r"\d+\.\d\d", row)[0]
    assert front_page.wrong_on_front_page(text) == []
    (said,) = front_page.wrong_on_front_page(text.replace(row, row.replace(number, "12.34", 1)))
    assert row in said and "`make readme`" in said


@pytest.mark.parametrize("how", ["half", "empty", "binary", "one digit"])
def test_damaged_published_numbers_are_named(tmp_path, monkeypatch, how):
    shutil.copytree(paths.published(), tmp_path / "data" / "published")
    monkeypatch.setenv("LDRLD_ROOT", str(tmp_path))
    path = paths.published() / "results.csv"
    content = path.read_bytes()
    cut = content[: content.index(b"\n", len(content) // 2) + 1]
    changed = {"half": cut, "empty": b"", "binary": bytes(range(256)), "one digit": content.replace(b"75.61", b"75.62")}
    path.write_bytes(changed[how])
    with pytest.raises(ValueError, match=r"results\.csv \([\d,]+ bytes\) is not the file in SHA256SUMS") as told:
        published.load()
    assert "\n" not in str(told.value)


# ---- the campaign ---------------------------------------------------------------------------------------------------

RECORD, CARD, FIGURE = r"runs/[\w-]+/digits-[\w-]+\.json$", r"teachers/.*\.md$", r"figures/.*\.svg$"
TRAINED = (  # the process that writes dies, the one that started it, or all of them
    *(Death(r"checkpoint\.pt$", moment) for moment in ("before", "in", "whole", "after")),
    Death(r"checkpoint\.pt$", "in", "parent"),
    Death(r"checkpoint\.pt$", "after", "group"),
    *(Death(RECORD, moment) for moment in ("before", "in", "whole", "after")),
    Death(RECORD, "whole", "parent"),
    Death(RECORD, "after", "group"),
    *(Death(r"\.safetensors$", moment) for moment in ("in", "whole", "after")),
    *(Death(CARD, moment) for moment in ("in", "after")),
    *(Death(r"\.npz$", moment) for moment in ("in", "whole")),
)
REPORTED = (  # in both campaigns by notebooks
    *(Death(r"tables/.*\.csv$", moment) for moment in ("in", "whole", "after")),
    Death(r"tables/.*\.tex$", "in"),
    Death(r"tables/.*\.md$", "in", "group"),
    *(Death(FIGURE, moment) for moment in ("in", "whole", "after")),
    Death(r"figures/.*\.png$", "in", "parent"),
    *(Death(r"\.sha256$", moment) for moment in ("in", "after")),
)
AT_RANDOM = 8  # more of each kind, at random moments


class Campaign:
    """Calls of `reproduce` that are disturbed, in a folder of their own."""

    def __init__(self, folder: Path, notebooks: bool):
        self.folder, self.out, self.notebooks = folder, folder / "out", notebooks
        self.chosen = TRAINED if notebooks else (*TRAINED, *REPORTED)
        self.random = random.Random(notebooks)
        self.killed: list[str] = []  # at random moments: who
        deaths.environment(folder)
        (folder / "campaign.yaml").write_text(YAML)

    def call(self, chosen=(), kill_after: float | None = None) -> tuple[int, str]:
        """Call `reproduce` once; at random moments somebody is killed. Returns the exit code and what was said."""
        words = ["reproduce", "--profile", str(self.folder / "campaign.yaml"), *ONLY, "--out", str(self.out)]
        words += [] if self.notebooks else ["--no-notebooks"]
        env = {**os.environ, **deaths.environment(self.folder, chosen)}
        with open(self.folder / "said.txt", "w+") as said:
            process = subprocess.Popen([sys.executable, "-m", "ldrld", *words], cwd=ROOT, env=env, stdout=said,
                                       stderr=subprocess.STDOUT, start_new_session=True)
            if kill_after is not None and not deaths.until(lambda: process.poll() is not None, kill_after):
                self.kill(process.pid)
            code = process.wait(1800)
            assert deaths.until(lambda: not deaths.alive(self.folder), 120), f"left alive: {deaths.alive(self.folder)}"
            said.seek(0)
            return code, said.read()

    def kill(self, parent: int) -> None:
        """Kill the whole group, the parent, a worker or a kernel."""
        running = deaths.alive(self.folder)
        whom = {"group": [parent, *running], "parent": [parent]}
        for kind in ("worker", "kernel"):
            if numbers := sorted(number for number, other in running.items() if other == kind):
                whom[kind] = [self.random.choice(numbers)]
        who = self.random.choice(sorted(whom))
        if any([deaths.kill(number) for number in whom[who]]): self.killed.append(who)

    def carry_out(self) -> None:
        """Disturb the batch until every chosen death has happened, and enough at random."""
        for _ in range(80):
            waiting = [death for death in self.chosen if death.name not in deaths.happened(self.folder)]
            if not waiting and len(self.killed) >= AT_RANDOM: return
            ends_it = [death for death in waiting if death.who != "self"]
            armed = [death for death in waiting if death not in ends_it] + ends_it[:1]
            at_random = len(self.killed) < AT_RANDOM and self.random.random() < 0.6
            seconds = self.random.uniform(10, 60) if at_random else None
            code, _ = self.call(self.random.sample(armed, len(armed)), seconds)
            print(f"exit code {code}, {len(self.chosen) - len(waiting)} + {len(self.killed)} kills", flush=True)
            if not any((self.out / "runs").glob("*/checkpoint.pt")) and self.random.random() < 0.5: self.lose()
        raise AssertionError(f"these deaths did not happen: {waiting}")

    def lose(self) -> None:
        """Move half of the results away, so that there is something to make again."""
        for path in sorted(self.out.glob("data/runs/campaign/*.json")):
            if self.random.random() < 0.5: path.unlink()
        for path in sorted(self.out.glob("data/*/campaign/*.safetensors")): path.unlink()
        for path in sorted(self.out.glob("data/runs/campaign/logits/*")):
            if self.random.random() < 0.5: path.unlink()
        (self.out / "data/manifests/campaign.sha256").unlink(missing_ok=True)  # new records have new times


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of a batch that nobody disturbs."""
    campaign = Campaign(tmp_path_factory.mktemp("undisturbed") / "batch", notebooks=False)
    code, said = campaign.call()
    assert code == 0, said
    return deaths.results(campaign.out)


@linux
@pytest.mark.campaign
@pytest.mark.parametrize("notebooks", [False, True], ids=["local processes", "notebooks"])
def test_campaign(tmp_path, undisturbed, notebooks):
    campaign = Campaign(tmp_path / "batch", notebooks)
    begun = time.monotonic()
    campaign.carry_out()
    code, said = campaign.call()
    assert code == 0 and "0 paused, 0 failed" in said, said
    for path in deaths.leftovers(campaign.out): os.utime(path, (time.time() - 120,) * 2)
    code, said = campaign.call()
    assert code == 0 and deaths.leftovers(campaign.out) == [], said
    found = deaths.results(campaign.out)
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if found[name] != undisturbed[name]] == []
    checked = ldrld("verify", "--profile", campaign.folder / "campaign.yaml", "--out", campaign.out)
    assert "1 tables checked" in checked.stdout and checked.returncode == 0, checked.stdout
    kills = len(deaths.happened(campaign.folder)) + len(campaign.killed)
    print(f"\n{kills} SIGKILLs, {sorted(campaign.killed)} of them at random moments, {time.monotonic() - begun:.0f} s: "
          f"{len(found)} files, no difference")
    assert kills >= 26
