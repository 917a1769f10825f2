"""The error tree: what a caller may do about a failure is in the type, what happened is in the sentence.

AtollError
├── Rejected            bad input; never retried, shown to whoever sent it (HTTP 4xx, exit code 2)
│   ├── ConfigError     the cluster description is wrong
│   ├── ModelError      the checkpoint cannot be served
│   └── Overloaded      a bound was reached (HTTP 429)
├── Retryable           the same call may work on another link or a little later
│   ├── LinkClosed      the peer is gone or the link was closed
│   └── DeadlineExceeded
└── Fatal               this link or process cannot go on
    ├── WireError       a frame that no correct peer sends
    └── AuthError       the peer could not prove that it knows the cluster secret, or speaks another protocol
"""


class AtollError(Exception):
    """Root of every error that Atoll raises on purpose."""


class Rejected(AtollError):  # noqa: N818  -- named after the decision, as the two below
    """The input is wrong; nothing was done."""


class ConfigError(Rejected):
    """The cluster description is wrong; the message names file and key."""


class ModelError(Rejected):
    """The checkpoint cannot be served; the message names the tensor or key."""


class Overloaded(Rejected):
    """A bound was reached; the message names it and its limit."""


class Retryable(AtollError):  # noqa: N818
    """The same call may succeed on another link or later."""


class LinkClosed(Retryable):
    """The link to a peer is closed; the message names the peer and why."""


class DeadlineExceeded(Retryable):
    """An answer did not come in time; the message names peer, layer and micro-batch."""


class Fatal(AtollError):  # noqa: N818
    """This link or process cannot go on."""


class WireError(Fatal):
    """A frame that no correct peer sends."""


class AuthError(Fatal):
    """The peer failed the handshake."""
