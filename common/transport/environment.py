"""The environment of UCX, set by us and written to the log: one function, called before UCX is loaded.

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
# One host with GPUs: rows go by cuda_ipc (cuda_copy where a process has no GPU), the rest as above. Tables of a
# block of 128 tokens are 8 KiB and should go at once: a rendezvous for them costs a round trip. What UCX can take along
# with an announcement of rows (64 KiB here, tables of 1,000 tokens) is what each of its transports can, `self` too.
_LOCAL_CUDA = {
    "UCX_TLS": "tcp,self,cuda_copy,cuda_ipc",
    "UCX_NET_DEVICES": "lo",
    "UCX_RNDV_THRESH": "16k",
    "UCX_TCP_TX_SEG_SIZE": "64k",
    "UCX_TCP_RX_SEG_SIZE": "64k",
    "UCX_SELF_SEG_SIZE": "64k",
}
# Across hosts UCX chooses (rc, cuda_ipc, tcp ...), but never that shared queue.
_REMOTE = {"UCX_TLS": "^sm"}
# Whoever chooses shared memory all the same: UCX_MM_FIFO_SIZE must be equal in every process of a host, since a sender
# finds its slot in the receiver's queue with its own size (1024 on routers only: every link died after 256 messages).


def set_ucx_environment(
    *, local: bool, device: str = "cpu", net_device: str = "",
    environ: MutableMapping[str, str] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Set what the user left unset; returns the UCX variables in force, sorted.

    `local`: every process of the cluster runs on this host. `device`: where rows lie, "cpu" or "cuda". `net_device`:
    the NIC of a rail, which wins over what a parent process set.
    """
    target = os.environ if environ is None else environ
    here = _LOCAL if device == "cpu" else _LOCAL_CUDA
    wanted = {**_ALWAYS, **(here if local else _REMOTE)}
    for name, value in wanted.items():
        target.setdefault(name, value)
    if net_device:
        target["UCX_NET_DEVICES"] = net_device
    force = {name: target[name] for name in sorted(target) if name.startswith("UCX_")}
    log.info("UCX environment: %s", " ".join(f"{name}={value}" for name, value in force.items()))
    return force
