"""A real two-node Slurm on this machine: munged, one slurmctld, two slurmd, each with its own spool and port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("node1", "node2")

# cred_expire: a requeued job waits that long (two minutes by default). SlurmdTimeout: a silent node counts as lost after it.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmdParameters=config_overrides
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
ReturnToService=2
JobRequeue=1
MpiDefault=none
SchedulerParameters=sched_interval=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no Slurm can be started here; empty when it can."""
    absent = [name for name in PROGRAMS if program(name) is None]
    if absent:
        return f"{', '.join(absent)} not found (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def program(name: str) -> str | None:
    """Its path; the daemons lie in /usr/sbin, which is not on everybody's PATH."""
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition: Callable[[], object], *, seconds: float, what: Callable[[], str], every: float = 0.3) -> None:
    """Poll until the condition holds. Raises TimeoutError with `what()`.

    every: seconds between two looks; a condition that asks Slurm starts a process each time, beside tests that compute.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s: {what()}")
        time.sleep(every)


class SlurmCluster:
    """Start with `start`, end with `stop`; `command` runs a Slurm client against it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.conf = root / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Raises TimeoutError with the daemons' logs when the nodes do not come up."""
        self.root.chmod(0o755)
        for name in ("state", *NODES):
            (self.root / name).mkdir()
        controller, first, second = free_ports(3)
        values = {
            "host": socket.gethostname(),
            "root": self.root,
            "controller": controller,
            "first": first,
            "second": second,
        }
        self.conf.write_text(CONFIG.format(**values))
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{kind}-file={self.root}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", *files)
        wait_for((self.root / "munge.socket").exists, seconds=300, what=self.logs)
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        wait_for(self.idle, seconds=300, what=self.logs, every=1.0)

    def _daemon(self, name: str, *words: str, key: str = "") -> None:
        output = (self.root / f"{key or name}.out").open("ab")
        command = [program(name) or name, *words]
        # a session of its own, so that stop() and kill_node() reach it and nothing else
        self.daemons[key or name] = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=self.environment,
            start_new_session=True,
        )

    def start_controller(self) -> None:
        self._daemon("slurmctld", "-D", "-f", str(self.conf))

    def stop_controller(self) -> None:
        """As when it is restarted: jobs run on, and nobody answers the clients."""
        controller = self.daemons.pop("slurmctld")
        controller.terminate()
        controller.wait(timeout=30)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, "-f", str(self.conf), key=node)

    def kill_node(self, node: str) -> None:
        """As if its plug were pulled: the daemon and everything that runs there."""
        self.daemons.pop(node).kill()
        for process in self.processes(node):
            os.kill(process, signal.SIGKILL)

    def processes(self, node: str) -> list[int]:
        """Everything that the daemon of `node` started for a job: the step managers and what runs below them."""
        wanted = (f"SLURM_CONF={self.conf}".encode(), f"SLURMD_NODENAME={node}".encode())
        found = set()
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if all(word in words for word in wanted):
                    found |= {int(entry.name), *_step_manager(int(entry.name))}
            except (OSError, ProcessLookupError):
                continue
        return sorted(found)

    def command(self, *words: str) -> str:
        """Standard output of a Slurm client."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout.split() == ["idle", "idle"]

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows about a job."""
        words = self.command("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The end of every daemon's log."""
        files = [*self.root.glob("*.log"), *self.root.glob("*.out")]
        return "\n".join(f"== {f.name}\n" + "\n".join(f.read_text(errors="replace").splitlines()[-15:]) for f in files)

    def stop(self) -> None:
        """End the jobs, then the daemons."""
        subprocess.run(["scancel", "--full", "-u", "root"], env=self.environment, timeout=60, check=False)
        for node in NODES:
            for process in self.processes(node):
                os.kill(process, signal.SIGKILL)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _step_manager(process: int) -> list[int]:
    """The slurmstepd above a process."""
    while process > 1:
        folder = Path("/proc") / str(process)
        if (folder / "cmdline").read_bytes().startswith(b"slurmstepd"):
            return [process]
        process = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return []
