"""A process of the same host as a link's peer: messages through shared memory, rows where they are (`neighbour.h`).

Each side makes the memory that it reads from and offers it with its first frame. The file has no name: the peer opens
it through /proc, and what it finds there proves that it is this file, not one of another process namespace. Who cannot
open it, or is on another host, goes on over UCX.
"""

import contextlib
import fcntl
import os
import secrets
import stat
from typing import Any

import torch

from common.transport.device import DeviceBlock, DeviceRows, NeighbourBlock, tensor_at
from common.transport.port import Foreign, LinkCounts, RowsPort

_PROOF_NBYTES = 16
_MAX_KNOWN = 256


class Neighbour:
    """This side's part of it. Closed with its link."""

    def __init__(self, port: RowsPort, sender: int, device: torch.device) -> None:
        """`sender`: the peer's number in its tags, in place. `device`: of rows."""
        self._port, self._device = port, device
        self._known: dict[tuple[int, int], NeighbourBlock] = {}
        self._proof = secrets.token_bytes(_PROOF_NBYTES)
        self._file = os.memfd_create("atoll-inbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._file, port.inbox_nbytes)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            os.pwrite(self._file, self._proof, 0)
            self._number = port.open_inbox(self._file, sender)
        except BaseException:
            os.close(self._file)
            raise

    def offer(self) -> dict[str, Any]:
        """For the peer's `meet`."""
        return {"pid": os.getpid(), "file": self._file, "proof": self._proof.hex()}

    def meet(self, to: Foreign, offer: object, counts: LinkCounts) -> Foreign:
        """What the port shall send to instead of the endpoint `to`: that again where the peer's memory is out of reach.

        `counts` are the link's.

        Raises ValueError and the like for an offer that no peer makes.
        """
        file = None
        if isinstance(offer, dict):
            proof = bytes.fromhex(offer["proof"])
            file = _open(int(offer["pid"]), int(offer["file"]), proof, self._port.inbox_nbytes)
        try:  # a peer that reaches our memory may send, whether we reach its or not
            return self._port.meet(self._number, to, -1 if file is None else file, counts)
        finally:
            if file is not None:
                os.close(file)

    def rows(
        self, link: object, offer: int, nbytes: int
    ) -> tuple[DeviceRows, DeviceRows | None] | None:
        """Rows that the peer offers, where they are, and where it wants those of the answer; None: receive them."""
        address, landing, landing_nbytes = self._port.reach_rows(offer)
        if not address:
            return None
        block = self._block(link, address, nbytes)
        block.offer = offer
        wanted = None
        if landing:
            wanted = DeviceRows(self._block(link, landing, landing_nbytes), 0, landing_nbytes)
        return DeviceRows(block, 0, nbytes), wanted

    def _block(self, link: object, address: int, nbytes: int) -> NeighbourBlock:
        """With one reference. The same memory comes again and again, and a view of it takes longer than a look-up."""
        block = self._known.get((address, nbytes))
        if block is not None and block.take_again():
            return block
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        block = NeighbourBlock(link, tensor_at(address, nbytes, self._device), self._returned)
        self._known[address, nbytes] = block
        return block

    def _returned(self, block: DeviceBlock) -> None:
        assert isinstance(block, NeighbourBlock), "a block of our own"
        offer, block.offer = block.offer, 0
        if offer:  # else a landing
            self._port.return_rows(offer)

    def close(self) -> None:
        """The link has closed its endpoint."""
        self._port.part(self._number)
        os.close(self._file)


def _open(pid: int, number: int, proof: bytes, nbytes: int) -> int | None:
    """A descriptor of the file that the peer has under `number`; None when it is out of reach."""
    with contextlib.suppress(OSError):
        file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        about = os.fstat(file)
        if (
            stat.S_ISREG(about.st_mode)
            and about.st_size == nbytes
            and os.pread(file, len(proof), 0) == proof
        ):
            return file
        os.close(file)
    return None
