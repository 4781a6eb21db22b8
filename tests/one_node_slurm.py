"""A SLURM cluster of one node, this machine, for tests: no systemd, nothing outside a folder.

Needs root and Debian's packages ``slurm-wlm`` and ``munge``.
"""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
TIMEOUT = 60  # seconds for a daemon to answer


def missing() -> str | None:
    """Why there can be no cluster here."""
    without = [name for name in PROGRAMS if shutil.which(name) is None]
    if without:
        return f"no {', '.join(without)}: SLURM is not installed"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [made.getsockname()[1] for made in sockets]
    for made in sockets:
        made.close()
    return ports


def _wait_for(what: str, command: list[str], environment: dict[str, str], logs: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while True:
        asked = subprocess.run(command, env=environment, capture_output=True, text=True)
        if asked.returncode == 0 and what in asked.stdout:
            return
        if time.monotonic() > end:
            said = "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in logs.glob("*.log"))
            raise RuntimeError(f"{command}: {asked.stdout}{asked.stderr}\n{said}")
        time.sleep(0.2)


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons, and end them.

    Yields:
        The environment in which SLURM's commands, and so ``scanlm``, find this cluster.
    """
    munge = pwd.getpwnam("munge")
    keys = folder / "munge"
    keys.mkdir(parents=True)
    (keys / "key").write_bytes(os.urandom(128))
    (keys / "key").chmod(0o400)
    for parent in (keys, *keys.parents):  # munged wants its folders closed, and to get there
        if parent == keys:
            parent.chmod(0o755)
        elif os.stat(parent).st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(os.stat(parent).st_mode | 0o011)
    for path in (keys, keys / "key"):
        os.chown(path, munge.pw_uid, munge.pw_gid)
    host = socket.gethostname().partition(".")[0]
    controller, node = _free_ports(2)
    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(
        f"""ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={keys}/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=2000
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE
"""
    )
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    munged = ["munged", "--foreground", f"--socket={keys}/socket", f"--key-file={keys}/key"]
    munged += [f"--{name}-file={keys}/{name}" for name in ("pid", "seed", "log")]
    # munged must run as the owner of its key
    daemons = [
        (["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", *munged], "munge"),
        (["slurmctld", "-D", "-f", str(configuration)], "slurmctld"),
        (["slurmd", "-D", "-f", str(configuration), "-N", host], "slurmd"),
    ]
    started = []
    try:
        for command, name in daemons:
            with (folder / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if name == "munge":
                encode = ["munge", f"--socket={keys}/socket", "-n"]
                _wait_for("MUNGE:", encode, environment, folder)
        _wait_for("idle", ["sinfo", "-h", "-o", "%t"], environment, folder)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
