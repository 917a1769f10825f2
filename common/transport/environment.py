"""The environment of UCX, set by us per role and written to the log: one function, called before UCX is loaded.

UCX reads most variables when a context is made and a few (its log level) when the library is loaded, and importing
`ucxx` sets some itself; so a parent that imports ucxx before it forks must call this before that import.
"""

import logging
import os
from collections.abc import MutableMapping

log = logging.getLogger(__name__)

# With endpoint error handling UCX drops shared memory (and with it two thirds of the speed on one host) unless
# UCX_MM_ERROR_HANDLING=y; keepalive is what notices a dead shared-memory peer when the control socket does not.
_ALWAYS = {
    "UCX_MM_ERROR_HANDLING": "y",
    "UCX_KEEPALIVE_INTERVAL": "1s",
    "UCX_LOG_LEVEL": "error",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_RNDV_THRESH": "8192",
}
# One host without GPUs: shared memory, and TCP for what it cannot do (connection set-up) on loopback only, since
# several interfaces slow UCX down and every worker listens on each of them.
_LOCAL = {"UCX_TLS": "sm,self,tcp", "UCX_NET_DEVICES": "lo"}
# With 256 experts on one host the default receive FIFO of 256 slots makes a router's scatter-gather four times slower.
# A sender computes slots of the receiver's FIFO with its own size, so it must be the same in every process of a host:
# where only routers had 1024, every link died silently after 256 messages. 8 MiB of shared memory per process.
_LARGE = {"UCX_MM_FIFO_SIZE": "1024"}
LARGE_HOST = 64  # processes


def set_ucx_environment(
    *, num_processes: int, local: bool, environ: MutableMapping[str, str] | None = None
) -> dict[str, str]:
    """Set what the user left unset; returns the UCX variables in force, sorted.

    `num_processes` is how many the largest host of the cluster runs: the same number everywhere.
    `local`: every process of the cluster runs on this host and no payload lies in GPU memory.
    """
    target = os.environ if environ is None else environ
    wanted = {
        **_ALWAYS,
        **(_LOCAL if local else {}),
        **(_LARGE if num_processes > LARGE_HOST else {}),
    }
    for name, value in wanted.items():
        target.setdefault(name, value)
    force = {name: target[name] for name in sorted(target) if name.startswith("UCX_")}
    log.info("UCX environment: %s", " ".join(f"{name}={value}" for name, value in force.items()))
    return force
