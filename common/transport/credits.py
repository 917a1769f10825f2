"""Credits of one link: who may still send, and what must be returned. Pure: counts in, decisions out.

A sender starts with as many credits as the receiver's window and spends one per data message. The receiver owes a
credit once it is done with a message and returns what it owes on any header going the other way, or in a message of
its own when half the window is owed. That threshold cannot deadlock: a sender without credit has its whole window
spent, and of those messages at most half are owed silently; the others are still held and will be owed later.

Invariant, per direction: available + in flight + held by the receiver + owed + on the way back == window.
"""

from common.errors import WireError


class CreditRules:
    """Both directions of one link, in messages. Where the counts are kept is for whoever derives from it.

    `answers` is the number of the last place for an answer, which asks for no credit.
    """

    send_window: int
    receive_window: int
    available: int
    owed: int
    answers: int
    _unreturned: int
    _return_at: int

    def __init__(self, send_window: int, receive_window: int) -> None:
        """`send_window` is what the peer grants, `receive_window` what this side grants; both at least 1."""
        if send_window < 1 or receive_window < 1:
            raise ValueError(f"windows must be at least 1, not {send_window} and {receive_window}")
        self.send_window = send_window
        self.receive_window = receive_window
        self.available = send_window  # messages that may be sent now
        self.owed = 0  # messages done with, not yet returned
        self.answers = 0
        self._unreturned = 0  # messages received and not yet returned: held or owed
        self._return_at = max(1, receive_window // 2)

    def __repr__(self) -> str:
        return f"<Credits [{self.available}/{self.send_window} available | {self.owed} owed]>"

    def take(self) -> bool:
        """Spend a credit for one message; False when there is none."""
        if self.available == 0:
            return False
        self.available -= 1
        return True

    def granted(self, count: int) -> None:
        """The peer returned `count` credits. Raises WireError when that is more than were spent."""
        self.available += count
        if self.available > self.send_window:
            raise WireError(
                f"peer returned {self.available - self.send_window} more credits than it was sent messages"
            )

    @property
    def is_spent(self) -> bool:
        """Whether the peer has no credit for another data message."""
        return self._unreturned >= self.receive_window

    def arrived(self) -> None:
        """A data message arrived. Raises WireError when the peer had no credit for it."""
        if self.is_spent:
            raise WireError(f"peer sent more messages than its window of {self.receive_window}")
        self._unreturned += 1

    def freed(self) -> bool:
        """One received message is done with; True when its credit should not wait for a header going the other way."""
        self.owed += 1
        return self.is_due

    @property
    def is_due(self) -> bool:
        """Whether what is owed should not wait any longer."""
        return self.owed >= self._return_at

    def collect(self) -> int:
        """What is owed, to be put on an outgoing header; nothing is owed afterwards."""
        count, self.owed = self.owed, 0
        self._unreturned -= count
        return count


class Credits(CreditRules):
    """Counts that nobody else reads."""
