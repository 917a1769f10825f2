"""What is sent on one link over UCX: messages, and rows in device memory beside them. `ucx_arrivals` says how."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from common.transport.base import Handler, Hello, Ticket
from common.transport.buffers import Buffer
from common.transport.port import CANCELED, IN_PROGRESS, NO_RESOURCE, UNREACHABLE, Foreign
from common.transport.reactor import KIND_MESSAGE, KIND_SHIFT
from common.transport.ucx_arrivals import KIND_ROWS, KIND_WITH_ROWS, SEQUENCE_MASK, UcxArrivals
from common.wire.header import HEADER_NBYTES, Header

if TYPE_CHECKING:
    from common.transport.device import DeviceBlock, DeviceRows
    from common.transport.ucx_plane import DataPlane
    from common.transport.volley import Ended, Part, Question, Volley


log = logging.getLogger(__name__)


class UcxMessages(UcxArrivals):
    """A link that moves messages by its endpoint, once a subclass has one."""

    def __init__(
        self, plane: "DataPlane", mine: Hello, peer: Hello, handler: Handler, sender: int
    ) -> None:
        super().__init__(plane, mine, peer, handler, sender)
        self._to: Foreign = None  # the port's name of the endpoint
        self._is_met = False
        self._new_header()

    def _transmit(self, buffer: Buffer, landing: "DeviceRows | None") -> None:
        rows, tag = buffer.rows, self._next_tag()
        if rows is None:
            self._send_message(buffer, tag)
            return
        if rows.block.owner is not None:  # they are where the peer wants them
            send = partial(self._send_message, buffer, tag)
        elif HEADER_NBYTES + buffer.nbytes <= self._port.max_head:
            send = partial(self._send_with_rows, buffer, tag, landing)
        else:
            head = KIND_ROWS << KIND_SHIFT | tag, 0, 0
            send = partial(self._send_rows, rows.retain(), *head, landing)
            self._send_message(buffer, tag)
        if rows.fence is None:
            send()
        else:
            rows.fence.then(send)

    def _next_tag(self) -> int:
        """Of the next message, without the kind."""
        counts = self._credits
        number = counts.sent
        counts.sent = (number + 1) & SEQUENCE_MASK
        return counts.tag | number

    def _send_message(self, buffer: Buffer, tag: int) -> None:
        """Nothing is raised: a closed link says what is lost by itself."""
        ended = partial(self._sent, buffer)
        nbytes = HEADER_NBYTES + buffer.nbytes
        status = CANCELED
        if self._endpoint is not None:  # the link may have closed within `post`
            tag |= KIND_MESSAGE << KIND_SHIFT
            status = self._port.send(self._to, buffer.address, nbytes, tag, ended)
        if status == IN_PROGRESS:
            self._reactor.kick()
        else:
            ended(status)

    def post_landed(self, header: Header, rows: "DeviceRows") -> bool:
        credits = self._credits
        if (
            not self._is_met or self._endpoint is None or self._queue or credits.available == 0
            or rows.block.owner is not self
        ):  # fmt: skip
            return False
        header.rows_nbytes = header.payload_nbytes = rows.nbytes
        header.landed, header.credits = 1, credits.owed
        header.pack_into(self._header.data)
        credits.collect()
        credits.available -= 1
        tag = KIND_MESSAGE << KIND_SHIFT | self._next_tag()
        ended = partial(self._header_sent, self._header)
        status = self._port.send(self._to, self._header_at, HEADER_NBYTES, tag, ended)
        if status == IN_PROGRESS:  # UCX has yet to read it
            self._new_header()
            self._reactor.kick()
        elif status < 0:
            self._lost("send", status)
        return True

    def _new_header(self) -> None:
        """Memory for one that has no payload's."""
        self._header = np.empty(HEADER_NBYTES, np.uint8)
        self._header_at: int = self._header.ctypes.data

    def _header_sent(self, packed: npt.NDArray[np.uint8], status: int) -> None:
        del packed
        self._done(status)

    def _done(self, status: int) -> None:
        if status < 0:
            self._lost("send", status)

    def _send_with_rows(self, buffer: Buffer, tag: int, landing: "DeviceRows | None") -> None:
        """The device has written the rows of this message."""
        rows = buffer.rows
        assert rows is not None, "a message without rows apart"
        tag |= KIND_WITH_ROWS << KIND_SHIFT
        head = tag, buffer.address, HEADER_NBYTES + buffer.nbytes
        self._send_rows(rows.retain(), *head, landing)
        buffer.headroom_busy = False  # the port has a copy
        buffer.release()

    def _send_rows(
        self, rows: "DeviceRows", tag: int, head: int, head_nbytes: int,
        landing: "DeviceRows | None",
    ) -> None:  # fmt: skip
        """Takes over a reference."""
        if self._endpoint is None:  # closed before the device had written them
            rows.release()
            return
        ended = partial(self._rows_sent, rows)
        shared, place = self.share(rows.block), (0, 0, None)
        if landing is not None and shared is not None:
            place = landing.address, landing.nbytes, self.share(landing.block)
        status = self._port.send_rows(
            self._to, tag, head, head_nbytes, rows.address, rows.nbytes, rows.on_device, shared, *place, ended
        )  # fmt: skip
        if status == IN_PROGRESS:
            self._reactor.kick()
        else:
            ended(status)

    def take(self, volley: "Volley", question: "Question") -> Ticket | None:
        number, target, num_rows, num_pairs, place, nbytes, tail, where, wanted = question
        credits, block = self._credits, volley.block
        if (
            not self._is_met or self._queue or credits.available == 0 or self._endpoint is None
            or HEADER_NBYTES + len(tail) > self._port.max_head
            or (block.offer and not self._pool.hands_on)
        ):  # fmt: skip
            return None
        credits.available -= 1
        answer = self._answer_number() if wanted else 0
        block.retain()
        tag = KIND_WITH_ROWS << KIND_SHIFT | self._next_tag()
        fields = (
            self._to, tag, number, target, num_rows, num_pairs, credits.collect(), answer, place, nbytes, where, wanted,
            tail,
        )  # fmt: skip
        return self, fields, answer

    def send_together(self, volley: "Volley", tickets: Sequence[Ticket]) -> list[Ticket]:
        block, landings, going, calls = volley.block, volley.landings, [], []
        for ticket in tickets:
            link = cast("UcxMessages", ticket[0])
            if link._endpoint is None:  # closed before
                block.release()
            else:
                going.append(ticket)
                calls.append(partial(link._rows_sent, block))
        if not going:
            return []
        places = block.address, self.share(block), 0, None
        if landings is not None:
            places = *places[:2], landings.address, self.share(landings)
        parts = [fields for _, fields, _ in going]
        statuses = self._port.send_together(
            volley.template, not block.on_host, *places, parts, calls
        )
        self._reactor.kick()
        failed = []
        for ticket, status, ended in zip(going, statuses, calls, strict=True):
            if status == NO_RESOURCE and block.offer:
                block.release()
                failed.append(ticket)
            elif status != IN_PROGRESS:
                ended(status)
        return failed

    def send_copy(self, ticket: Ticket, part: "Part") -> None:
        """The number, the credit and those returned are the message's already."""
        _, tag, *_, credits, answer, _, _, _, _, _ = ticket[1]
        header, payload = part.header, part.payload
        assert payload.rows is not None, "a part without rows"
        header.rows_nbytes, header.credits, header.answer = payload.rows.nbytes, credits, answer
        header.payload_nbytes = payload.rows.nbytes + payload.nbytes
        header.pack_into(payload.view)
        payload.headroom_busy = True
        send = partial(self._send_with_rows, payload.retain(), tag, part.landing)
        payload.rows.fence.then(send)

    @property
    def counts(self) -> object:
        """See `Link.counts`."""
        return self._credits

    def forwarded(
        self, landing: "DeviceRows | None", answer: int, ended: "Ended", block: "DeviceBlock | None"
    ) -> None:
        """See `Link.forwarded`."""
        rows = None if block is None else block.retain()
        ended.call = self._done if rows is None else partial(self._rows_sent, rows)
        self.expect((self, (), answer), landing)

    def share(self, block: "DeviceBlock") -> Foreign:
        """What a neighbour needs to reach rows: the key to all of their block, made once; of another's, its offer."""
        if block.offer:
            return block.offer
        if block.shared is None and self._is_met:
            block.shared = self._port.share(block.address, block.capacity, not block.on_host)
        return block.shared

    def _sent(self, buffer: Buffer, status: int) -> None:
        buffer.headroom_busy = False
        buffer.release()
        if status < 0:
            self._lost("send", status)

    def _rows_sent(self, rows: "DeviceRows | DeviceBlock", status: int) -> None:
        if status == UNREACHABLE:  # so the peer has read nothing, and will not
            rows.release()
            if self._pool.hands_on:
                log.warning("%s cannot read rows of others: copied from now on", self.peer.process)
                self._pool.hands_on = False
        else:
            self._let_go(rows, status)
        if status < 0:
            self._lost("send", status)
