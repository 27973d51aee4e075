"""A Slurm of one machine on loopback, for tests: `python tests/slurm_cluster.py COMMAND …` runs a command in it.

Needs Debian's packages `slurm-wlm` and `munge`. Its configuration, keys, state and logs lie in a temporary folder, its
daemons are children of this process under the user who calls it, and listen on 127.0.0.1; nothing is left behind.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
NODE = "node1"

CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={grace}
SlurmdTimeout=5
InactiveLimit=0
MinJobAge=600
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=16000 State=UNKNOWN
PartitionName=long Nodes={node} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes={node} PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs of Slurm and Munge that are not installed here."""
    return [program for program in PROGRAMS if not shutil.which(program, path=PATH)]


def until(what: Callable[[], object], seconds: float = 60, name: str = "") -> object:
    """Wait until a function returns something true, and return it; TimeoutError, naming it, after some seconds."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := what():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{name or what}: not within {seconds:.0f} seconds")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """The daemons munged, slurmctld and slurmd; partitions `long` and, before which jobs of `long` give way, `urgent`.

    folder: for everything that they write.  grace: seconds between SIGTERM and SIGKILL for a job that gives way.
    """

    def __init__(self, folder: Path, grace: int = 2):
        self.folder, self.daemons = folder, {}
        self.conf = folder / "slurm.conf"
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.conf)}
        host = socket.gethostname().split(".")[0]
        ports = free_ports(2)
        self.conf.write_text(CONFIG.format(folder=folder, user=getpass.getuser(), host=host, ports=ports, node=NODE,
                                           grace=grace))
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _daemon(self, *words: str) -> None:
        log = open(self.folder / f"{words[0]}.out", "ab")
        self.daemons[words[0]] = subprocess.Popen(words, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()

    def __call__(self, *words: object) -> str:
        """Call a program of Slurm; returns its standard output."""
        got = subprocess.run([*map(str, words)], env=self.env, capture_output=True, text=True)
        if got.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: {got.stderr}")
        return got.stdout

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs."""
        at = lambda name: f"{self.folder}/munge.{name}"
        self._daemon("munged", "--foreground", "--force", "--key-file", at("key"), "--socket", at("socket"),
                     "--pid-file", at("pid"), "--log-file", at("log"), "--seed-file", at("seed"))
        until(Path(at("socket")).exists, name="munged")
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        self.start_node()

    def start_node(self) -> None:
        """Start the node's daemon and wait until the node takes jobs."""
        self._daemon("slurmd", "-D", "-f", str(self.conf), "-N", NODE)
        until(lambda: self.node_state() in ("idle", "mix", "alloc"), 60, f"{NODE} in {self.folder}")

    def node_state(self) -> str:
        """The node's state, such as idle, alloc, drain or down*; empty while the controller does not answer."""
        got = subprocess.run(["sinfo", "-h", "-N", "-o", "%t", "-p", "long"], env=self.env, capture_output=True,
                             text=True)
        return got.stdout.strip()

    def kill_node(self) -> None:
        """Kill the node's daemon, as a crash would."""
        self.daemons["slurmd"].kill()
        self.daemons.pop("slurmd").wait()

    def jobs(self, partition: str = "long") -> dict[str, str]:
        """The jobs of a partition that are not over: number -> state, such as PENDING."""
        lines = self("squeue", "-h", "-p", partition, "-o", "%A %T").splitlines()
        return dict(line.split() for line in lines)

    def preempt(self) -> None:
        """Let an urgent job take the whole node for a moment."""
        number = self("sbatch", "--parsable", "-p", "urgent", "-c", "2", "-o", "/dev/null", "--wrap", "true").strip()
        until(lambda: number not in self.jobs("urgent"), 60, "the urgent job")

    def stop(self) -> None:
        """Cancel all jobs, end the daemons."""
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--user", getpass.getuser()], env=self.env, capture_output=True)
            try:
                until(lambda: not self.jobs() and not self.jobs("urgent"), 20)
            except (TimeoutError, RuntimeError):
                pass
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in reversed(self.daemons.values()):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextmanager
def cluster(grace: int = 2) -> Iterator[Cluster]:
    """A running Slurm, see `Cluster`; RuntimeError if it is not installed."""
    if programs := missing():
        raise RuntimeError(f"{', '.join(programs)} not found: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)
        made = Cluster(Path(folder), grace)
        try:
            made.start()
            yield made
        finally:
            made.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    with cluster() as slurm:
        sys.exit(subprocess.run(sys.argv[1:] or ["sinfo"], env=slurm.env).returncode)
