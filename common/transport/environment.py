"""The environment of UCX, set by us per role and written to the log: one function, called before UCX is loaded.

UCX reads most variables when a context is made and a few (its log level) when the library is loaded, and importing
`ucxx` sets some itself; so a parent that imports ucxx before it forks must call this before that import.
"""

import logging
import os
from collections.abc import MutableMapping

log = logging.getLogger(__name__)

# With endpoint error handling UCX drops shared memory unless UCX_MM_ERROR_HANDLING=y (for whoever chooses it);
# keepalive notices a dead peer when neither the control socket nor a TCP lane does.
_ALWAYS = {
    "UCX_MM_ERROR_HANDLING": "y",
    "UCX_KEEPALIVE_INTERVAL": "1s",
    # UCX calls every refused reconnection to a killed peer an error, on stdout; what matters we report ourselves
    "UCX_LOG_LEVEL": "fatal",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}
# One host without GPUs: TCP on loopback only, since several interfaces slow UCX down and every worker listens on each.
# Not shared memory, although it is faster when polling: all peers write into ONE receive queue, and a peer killed
# between taking a slot and filling it stops that queue for good, for every peer (seen in 1 of about 12 kill -9 under
# load: the survivor spins and receives nothing from anyone, new peers included).
# Sleeping between messages, as here, it costs little: round trip and CPU per round trip in us, 2 shared cores,
#                      8 KiB       16 KiB      64 KiB       1 MiB
#   sm                 48 / 30    113 / 64    138 / 76     414 / 372
#   tcp as shipped     80 / 45    214 / 117   341 / 179   2545 / 1221
#   tcp as set here    76 / 40     87 / 47    165 / 88    1223 / 621
_LOCAL = {
    "UCX_TLS": "tcp,self",
    "UCX_NET_DEVICES": "lo",
    "UCX_RNDV_THRESH": "256k",
    "UCX_TCP_TX_SEG_SIZE": "256k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
}
# Across hosts UCX chooses (rc, cuda_ipc, tcp ...), but never that shared queue.
_REMOTE = {"UCX_TLS": "^sm"}
# Only with shared memory: a router hears from every expert of its node, and at 256 peers the default receive queue of
# 256 slots made a scatter-gather four times slower. 8 MiB where set, so on routers only.
_ROUTER = {"UCX_MM_FIFO_SIZE": "1024"}


def set_ucx_environment(
    *, router: bool, local: bool, environ: MutableMapping[str, str] | None = None
) -> dict[str, str]:
    """Set what the user left unset; returns the UCX variables in force, sorted.

    `local`: every process of the cluster runs on this host and no payload lies in GPU memory.
    """
    target = os.environ if environ is None else environ
    wanted = {**_ALWAYS, **(_LOCAL if local else _REMOTE), **(_ROUTER if router else {})}
    for name, value in wanted.items():
        target.setdefault(name, value)
    force = {name: target[name] for name in sorted(target) if name.startswith("UCX_")}
    log.info("UCX environment: %s", " ".join(f"{name}={value}" for name, value in force.items()))
    return force
