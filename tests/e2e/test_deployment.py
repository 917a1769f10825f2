"""`atoll up` through the suite that systemd and Slurm go through, too (`make test-systemd test-slurm`)."""

import os
import signal
import subprocess

from tests.deployment import PROMPTS, TWO_HOSTS, completions, drains, serves, survives_a_kill
from tests.e2e.harness import Cluster


class Launcher:
    """The local launcher as a `Deployment`."""

    def __init__(self, cluster):
        self._cluster = cluster

    def try_sh(self, script):
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def url(self):
        return self._cluster.url

    def pid_of(self, name):
        role, index = name.split("-")
        for process in self._cluster.get("/cluster")["processes"]:
            if (process["role"], process["index"]) == (role, int(index)):
                return process["pid"]
        return 0

    def kill(self, name):
        os.kill(self.pid_of(name), signal.SIGKILL)

    def stop(self):
        self._cluster.popen.send_signal(signal.SIGTERM)
        self._cluster.popen.wait(30)


def test_local_launcher():
    with Cluster("--cluster", str(TWO_HOSTS), "--local", "--port", "0") as cluster:
        launcher = Launcher(cluster)
        expected = completions(launcher)
        assert len(expected) == len(PROMPTS)
        serves(launcher, expected)
        survives_a_kill(launcher, "expert-12", expected)
        drains(launcher, expected)
