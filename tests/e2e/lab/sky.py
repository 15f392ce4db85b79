"""A SkyPilot client and API server with a home of their own, the controller of managed jobs within the server."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.lab import catalogs
from tests.e2e.lab.namespace import Namespace
from tests.e2e.lab.slurm import NAME
from tests.harness import ROOT, wait_until
from tests.servers.ports import free_ports

SKY = Path(sys.executable).with_name("sky")
JOB = """
select spot_job_id as job_id, name as job_name, task_id, status, recovery_count
from spot join job_info using (spot_job_id) where name = ? order by spot_job_id desc, task_id desc limit 1
"""
"""Of SkyPilot 0.14.1's `sky/jobs/state.py`."""
FOLDERS = ("workdir", "tmpdir")
ENABLE = """
from sky import check, global_user_state
from sky.clouds import cloud
# Else the first request finds that these have changed, looks for credentials, and disables what has none.
global_user_state.set_allowed_clouds(check._get_workspace_allowed_clouds("default"), "default")
for capability in cloud.CloudCapability:
    compute = capability is cloud.CloudCapability.COMPUTE
    global_user_state.set_enabled_clouds({clouds!r} if compute else [], capability, "default")
"""
CHOOSE = """
import json, sys
from sky import optimizer
from sky.utils import dag_utils
def chosen(path):
    dag = dag_utils.load_chain_dag_from_yaml(path, [("CHECKPOINTS", "gs://a-bucket/runs")])
    return [told(task) for task in optimizer.Optimizer.optimize(dag, quiet=True).tasks]
def told(task):
    best = task.best_resources
    where = {"infra": str(best.cloud).lower(), "region": best.region, "instance_type": best.instance_type}
    what = {"gpus": dict(best.accelerators), "spot": best.use_spot}
    return {**where, **what, "usd_per_h": best.get_cost(3600) * task.num_nodes}
print(json.dumps([chosen(path) for path in sys.argv[1:]]))
"""
STAND_INS = '''\
"""Read by every Python that SkyPilot starts here.

SkyPilot asks two public hosts whether the network is up before it believes that a machine is gone, and with no
internet would wait for ever. Here it asks its own API server. Of the server's daemons only the one that looks after
clusters runs: each of the others is a process that imports SkyPilot for nothing that is used here.
"""
import importlib.abc, importlib.machinery, os, sys

def ask_the_server(backend_utils):
    backend_utils._TEST_IP_LIST = [f"http://127.0.0.1:{os.environ['SKYPILOT_API_SERVER_LOCAL_PORT']}/api/health"]

def no_idle_daemons(daemons):
    needed = "skypilot-status-refresh-daemon"
    daemons.INTERNAL_REQUEST_DAEMONS = [each for each in daemons.INTERNAL_REQUEST_DAEMONS if each.id == needed]

CHANGES = {"sky.backends.backend_utils": ask_the_server, "sky.server.daemons": no_idle_daemons}

class Changed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            change(module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Changed())
'''


class Sky:
    """`sky`, as a person has it; its server ends with the namespace."""

    def __init__(self, inside: Namespace, folder: Path) -> None:
        self._inside = inside
        self._home = folder / "home"
        self._site = folder / "site"
        self._cluster = folder / "cluster"
        self._believed: tuple[str, ...] = ()
        inside.environ |= {
            "HOME": str(self._home),
            "PYTHONPATH": str(self._site),
            "SKYPILOT_API_SERVER_LOCAL_PORT": str(free_ports("api")["api"]),
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            "SKYPILOT_POD_MEMORY_GB_LIMIT": "6",  # it starts a controller of jobs for each GiB or so
        }

    def start(self, ssh_config: str) -> None:
        """The server answers, and knows the cluster."""
        self._site.mkdir()
        (self._site / "sitecustomize.py").write_text(STAND_INS)
        catalogs.write(self._home / ".sky" / "catalogs" / "v8")
        (self._home / ".slurm").mkdir()
        (self._home / ".slurm" / "config").write_text(ssh_config)
        for name in FOLDERS:
            (self._cluster / name).mkdir(parents=True)
        config = {
            "jobs": {"controller": {"consolidation_mode": True}},
            # Of the cluster: what would be shared by its nodes, and what is each node's own.
            "slurm": {"cluster_configs": {NAME: {name: str(self._cluster / name) for name in FOLDERS}}},
        }
        (self._home / ".sky" / "config.yaml").write_text(yaml.safe_dump(config))
        self.run("api", "start")
        self.run("check", "slurm")
        self.pretend("Slurm")

    def pretend(self, *clouds: str, checked: bool = False) -> None:
        """From now on SkyPilot believes that it has credentials for these and no others.

        A job that may run anywhere is tried there for ever: what cannot be rented must not be believed in meanwhile.
        `checked`: SkyPilot has looked for credentials since it was told the last time.
        """
        if checked or clouds != self._believed:
            self._inside.run(sys.executable, "-c", ENABLE.format(clouds=list(clouds)))
        self._believed = clouds

    def run(self, *words: str | Path, timeout_s: float = 900.0, check: bool = True) -> str:
        """A `sky` command to its end, and what it said."""
        done = self._inside.run(SKY, *words, cwd=ROOT, timeout_s=timeout_s, check=check)
        return done.stdout + done.stderr

    def chosen(self, files: Sequence[Path]) -> list[list[dict[str, Any]]]:
        """What SkyPilot's optimizer would rent for each task of each file; one process, because `import sky` is slow."""
        said = self._inside.run(sys.executable, "-c", CHOOSE, *files, cwd=ROOT, timeout_s=900).stdout
        found: list[list[dict[str, Any]]] = json.loads(said.splitlines()[-1])
        return found

    def job(self, name: str) -> dict[str, Any] | None:
        """The managed job of that name as its controller has it, its last task; None if there is none yet.

        Read where the controller writes it: each `sky jobs queue` takes seconds of CPU here and in the server, and many
        tests wait at once.
        """
        path = self._home / ".sky" / "spot_jobs.db"
        if not path.exists():
            return None
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as managed:
            managed.row_factory = sqlite3.Row
            row = managed.execute(JOB, (name,)).fetchone()
        return dict(row) if row else None

    def wait_for(self, name: str, *statuses: str, timeout_s: float = 600.0) -> str:
        """Wait until the managed job has one of the statuses; which."""

        def status() -> str | None:
            job = self.job(name)
            return job["status"] if job and job["status"] in statuses else None

        found: str = wait_until(status, f"{name} to be {statuses}", timeout_s=timeout_s, poll_s=1.0)
        return found
