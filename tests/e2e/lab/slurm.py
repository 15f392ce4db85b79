"""A Slurm of one node with pretend GPUs, reached over SSH on loopback: to SkyPilot a cluster like any other."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Mapping
from pathlib import Path

from tests.e2e.lab.namespace import Namespace
from tests.servers.ports import free_ports

NAME = "lab"
GPU = "a100"
"""What Slurm calls the GPUs; SkyPilot's names match it in any case of letters."""

# https://slurm.schedmd.com/slurm.conf.html; config_overrides: the node has what is written here, not what it has.
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmdPort={slurmd}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.pid
SlurmdSpoolDir={run}/slurmd
StateSaveLocation={run}/slurmctld
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
KillWait={kill_wait_s}
NodeName={host} NodeAddr=127.0.0.1 CPUs=512 Boards=1 SocketsPerBoard=1 CoresPerSocket=512 ThreadsPerCore=1 \
RealMemory=4000000 Gres=gpu:{gpu}:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES DefaultTime=1-00:00:00 MaxTime=1-00:00:00 State=UP
"""
# https://man.openbsd.org/sshd_config; SetEnv: what a job of this cluster starts from.
SSHD = """\
Port {ssh}
ListenAddress 127.0.0.1
PidFile none
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/id.pub .ssh/authorized_keys
PermitRootLogin yes
StrictModes no
UsePAM no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
SetEnv {environ}
"""


class Slurm:
    """The cluster; its daemons end with the namespace."""

    def __init__(self, inside: Namespace, folder: Path, *, gpus: int, kill_wait_s: int = 30) -> None:
        self._inside = inside
        self._folder = folder
        self._host = socket.gethostname().split(".")[0]
        self._gpus = gpus
        self._kill_wait_s = kill_wait_s
        self.ports = free_ports("slurmctld", "slurmd", "ssh")

    def start(self, environ: Mapping[str, str]) -> None:
        """`environ` is what commands over SSH start with, and so what jobs do."""
        run = self._folder / "run"
        for name in ("slurmctld", "slurmd"):
            (run / name).mkdir(parents=True)
        self._configure(run)
        self._munge(run)
        self._inside.run("slurmctld")
        self._inside.run("slurmd", "-N", self._host)
        self._ssh(environ)
        self._inside.wait_for("sinfo", "--noheader", "--format=%t", says="idle")

    def ssh_config(self) -> str:
        """What SkyPilot reads as `~/.slurm/config`."""
        lines = [f"Host {NAME}", "HostName 127.0.0.1", f"Port {self.ports['ssh']}", "User root"]
        return "\n    ".join([*lines, f"IdentityFile {self._folder / 'id'}"]) + "\n"

    def jobs(self) -> dict[str, str]:
        """Job ids of what is pending or running, and the names they have."""
        listed = self._inside.run("squeue", "--noheader", "--format=%i %j").stdout
        return dict(line.split(maxsplit=1) for line in listed.splitlines())

    def cancel(self, job: str) -> None:
        """What a preemption is here: SIGTERM to the job's processes, SIGKILL after `kill_wait_s`."""
        self._inside.run("scancel", job)

    def _configure(self, run: Path) -> None:
        devices = self._folder / "gpu"
        last = self._gpus - 1
        make = f'for i in $(seq 0 {last}); do mknod "{devices}$i" c 1 3; done'
        hosts = f"grep -qw {self._host} /etc/hosts || echo 127.0.0.1 {self._host} >>/etc/hosts"
        self._inside.run("sh", "-c", f"mkdir -p /etc/slurm /run/sshd; {hosts}; {make}")
        conf = CONF.format(
            host=self._host, run=run, gpu=GPU, gpus=self._gpus, kill_wait_s=self._kill_wait_s, **self.ports
        )
        gres = f"NodeName={self._host} Name=gpu Type={GPU} File={devices}[0-{last}]\n"
        for name, text in {"slurm.conf": conf, "gres.conf": gres}.items():
            (self._folder / name).write_text(text)
            self._inside.run("cp", self._folder / name, f"/etc/slurm/{name}")

    def _munge(self, run: Path) -> None:
        """Slurm's credentials; the daemon refuses to run with files that others can write."""
        key = self._folder / "munge.key"
        self._inside.run("dd", "if=/dev/urandom", f"of={key}", "bs=1024", "count=1", "status=none")
        key.chmod(0o400)
        command = ["munged", "--force", f"--key-file={key}", f"--socket={run}/munge.socket"]
        command += [f"--pid-file={run}/munged.pid", f"--log-file={run}/munged.log", f"--seed-file={run}/seed"]
        self._inside.run(*command)

    def _ssh(self, environ: Mapping[str, str]) -> None:
        for name in ("id", "host_key"):
            self._inside.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._folder / name)
        words = " ".join(shlex.quote(f"{name}={value}") for name, value in environ.items())
        conf = self._folder / "sshd_config"
        conf.write_text(SSHD.format(folder=self._folder, environ=words, **self.ports))
        self._inside.run("/usr/sbin/sshd", "-f", conf)
