"""One link over UCX: it opens by an authenticated control socket, and closes.

`ucx_messages` sends on it, `ucx_arrivals` receives.
"""

import asyncio
import base64
import binascii
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from common.errors import AtollError, AuthError, LinkClosed, WireError
from common.transport.base import Handler, Hello, Link
from common.transport.control import Channel
from common.transport.link import LinkState
from common.transport.ucx_arrivals import SENDER_MASK, SENDER_SHIFT
from common.transport.ucx_messages import UcxMessages

if TYPE_CHECKING:
    from common.transport.ucx_plane import DataPlane

_FIRST_FRAME_S = 5.0  # how long an authenticated dialler may take to say what it needs


class UcxLink(UcxMessages):
    """One peer over UCX. Made when the peer is authenticated, opened when it told its worker's address."""

    def __init__(
        self, plane: "DataPlane", mine: Hello, peer: Hello, handler: Handler, sender: int,
        opened: asyncio.Future[Link] | None,
    ) -> None:  # fmt: skip
        super().__init__(plane, mine, peer, handler, sender)
        self._channel: Channel | None = None
        self._opening = opened  # the dialler's `connect` waits for it
        self._deadline: asyncio.TimerHandle | None = None  # the listener's, until the first frame

    # -- control

    def on_peer(self, channel: Channel, peer: Hello) -> None:
        """The handshake is done. The dialler speaks first."""
        self._channel = channel
        self._peer = peer
        self.has_data = self._mine.data and peer.data
        if self.has_data:
            self._neighbour = self._plane.new_neighbour(self._sender << SENDER_SHIFT)
        if self._opening is not None:
            self._send_init()  # and `connect` has a deadline of its own
        else:
            self._deadline = self._plane.loop.call_later(_FIRST_FRAME_S, self._too_late)

    def _too_late(self) -> None:
        self.close("no first frame came")

    def _send_init(self) -> None:
        assert self._channel is not None
        init: dict[str, Any] = {"facts": self._mine.facts, "window": self._limits.window}
        if self.has_data:
            init["sender"] = self._sender
            init["worker"] = base64.b64encode(self._reactor.address).decode()
            if self._neighbour is not None:
                init["neighbour"] = self._neighbour.offer()
        self._channel.send({"init": init})

    def on_frame(self, channel: Channel, frame: dict[str, Any]) -> None:
        """A sealed frame: the first opens the link."""
        if self.state is not LinkState.OPENING:
            self._take_control(frame)
            return
        facts = self._read_init(frame)
        if self._deadline is not None:
            self._deadline.cancel()
        if self._opening is None:
            self._send_init()
        self._opened(replace(self._peer, facts=facts))
        if self._opening is not None and not self._opening.done():
            self._opening.set_result(self)
        self._plane.opened(self)  # data may have overtaken the control socket

    def _read_init(self, frame: dict[str, Any]) -> dict[str, Any]:
        try:
            init = frame["init"]
            facts = init["facts"]
            self._set_windows(init["window"])
            if self.has_data:
                sender, worker = init["sender"], base64.b64decode(init["worker"], validate=True)
                if type(sender) is not int or not 0 < sender <= SENDER_MASK or not worker:
                    raise ValueError("sender or worker")
                self._credits.tag = sender << SENDER_SHIFT
                self._endpoint, self._to = self._reactor.endpoint(worker, self._endpoint_failed)
                self._meet(init.get("neighbour"))
            if not isinstance(facts, dict):
                raise TypeError("facts")
        except (KeyError, TypeError, ValueError, binascii.Error) as exc:
            raise WireError(f"{self._peer.process} sent a malformed first frame: {exc}") from exc
        return facts

    def _meet(self, offer: object) -> None:
        """Use what a peer on this host offers, where UCX can copy between the two memories."""
        self._reaches_here = any(name.startswith("cuda_ipc") for name in self.carriers())
        if self._neighbour is not None:
            if self._pool.polled and not self._reaches_here:
                offer = None
            endpoint, self._to = self._to, self._neighbour.meet(self._to, offer, self._credits)
            self._is_met = self._to != endpoint

    def on_lost(self, channel: Channel, error: AtollError) -> None:
        """The control socket is gone, and with it the link."""
        if self._opening is not None and not self._opening.done():
            known = isinstance(error, LinkClosed | AuthError)
            self._opening.set_exception(error if known else AuthError(str(error)))
        self._close(error if isinstance(error, LinkClosed) else LinkClosed(str(error)))

    def _send_control(self, frame: dict[str, Any]) -> None:
        if self._channel is None:
            raise LinkClosed(f"the link to {self._peer.process} has no control socket")
        self._channel.send(frame)

    def _endpoint_failed(self) -> None:
        self._plane.failed.append(self)

    def fail(self) -> None:
        """UCX says that the peer's worker is gone (noted by `_endpoint_failed`)."""
        self._close(LinkClosed(f"{self._peer.process} is gone: its UCX endpoint failed"))

    def carriers(self) -> tuple[str, ...]:
        """What UCX chose for this link, and "inbox/host" of a neighbour; empty without an endpoint."""
        chosen = () if self._endpoint is None else self._reactor.carriers(self._endpoint)
        return (*chosen, "inbox/host") if self._is_met else chosen

    # -- closing

    def _defer(self, call: Callable[[], None]) -> None:
        self._plane.loop.call_soon(call)

    def _detach(self, error: LinkClosed) -> None:
        if self._opening is not None and not self._opening.done():
            self._opening.set_exception(error)
        self._drop_receives()
        endpoint, self._endpoint, self._to = self._endpoint, None, None
        if endpoint is not None:
            self._reactor.close_endpoint(endpoint)
        if self._neighbour is not None:
            self._neighbour.close()
        if self._deadline is not None:
            self._deadline.cancel()
        self._plane.forget(self._sender)
        if self._channel is not None:
            self._channel.close(error)
