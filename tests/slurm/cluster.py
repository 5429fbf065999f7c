"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, without systemd or cgroups. Needs root."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 400
"""Timeout in seconds of whatever a test waits for."""
NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
CONF = """
ClusterName=tests
# Lightning derives the port of a job's processes from its number.
FirstJobId={job}
SlurmUser=root
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
# A requeued job waits until its credential has expired, by default two minutes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
# Seconds between SIGTERM and SIGKILL.
KillWait=10
MailProg=/bin/true
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 RealMemory=1000 Gres=gpu:4
PartitionName=tests Nodes={nodes} Default=YES
"""


def missing() -> str | None:
    """Why SLURM cannot run here, or None if it can."""
    if os.geteuid() != 0:
        return "its daemons need root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(absent)} not found; tests/slurm/setup installs SLURM" if absent else None


def wait_for(condition: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {limit} seconds"
        time.sleep(0.3)


def clean_environment() -> dict[str, str]:
    """This process's environment without variables that jobs would read: of make, another SLURM and W&B."""
    others = ("MAKE", "MFLAGS", "SLURM", "SBATCH", "WANDB")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)}


class Cluster:
    """A running cluster; `stop` ends its jobs and daemons."""

    def __init__(self) -> None:
        # Short, since the path of a socket has a maximum length.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {**clean_environment(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []
        (self.folder / "key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "key").chmod(0o400)
        (self.folder / "state").mkdir()
        conf = CONF.format(
            folder=self.folder,
            host=socket.gethostname(),
            job=1000 + secrets.randbelow(8000),
            nodes=f"n[1-{len(NODES)}]",
            ports=_free_ports(1 + len(NODES)),
        )
        (self.folder / "slurm.conf").write_text(conf)
        # SLURM only counts these files; jobs do not open them.
        for number in range(4):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-3]\n")
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        sock = self.folder / "munge.sock"
        files = [f"--{name}-file={self.folder / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={sock}", *files)
        wait_for(sock.exists, "munged")
        self._daemon("slurmctld", "-D", "-i")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        try:
            wait_for(self._idle, "two idle nodes", 60)
        except AssertionError as error:
            daemons = "\n".join(path.read_text() for path in self.folder.glob("*.log"))
            raise AssertionError(f"{error}\n{self('sinfo', '-R', check=False)}\n{daemons}") from None

    def _idle(self) -> bool:
        return self("sinfo", "--noheader", "--format=%D %t", check=False).strip() == "2 idle"

    def _daemon(self, *command: str) -> None:
        """Start a daemon that ends with this process, for whatever reason that ends."""
        log = (self.folder / f"{command[0]}.log").open("ab")
        with log:
            self.daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", *command],
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def __call__(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command and return its output."""
        ran = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        assert ran.returncode == 0 or not check, ran.stderr + ran.stdout
        return ran.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        line = self("scontrol", "show", "job", "--oneliner", number)
        return dict(field.split("=", 1) for field in line.split() if "=" in field)

    def has_ended(self, number: str) -> bool:
        return self.job(number)["JobState"] in ENDED

    def ended(self, number: str) -> dict[str, str]:
        """Wait for the end of a job and return its fields."""
        wait_for(lambda: self.has_ended(number), f"the end of job {number}")
        return self.job(number)

    def stop(self) -> None:
        if len(self.daemons) > 1:
            self("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            wait_for(lambda: not self("squeue", "--noheader", check=False), "the end of all jobs")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder)


def _free_ports(count: int) -> list[int]:
    """Consecutive ports that nobody listens on."""
    for first in range(26817, 36817, count):
        ports = [*range(first, first + count)]
        sockets = [socket.socket() for _ in ports]
        try:
            for sock, port in zip(sockets, ports, strict=True):
                sock.bind(("127.0.0.1", port))
            return ports
        except OSError:
            continue
        finally:
            for sock in sockets:
                sock.close()
    raise AssertionError("no free ports")
