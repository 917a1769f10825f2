"""The control socket's handshake and its sealed frames, without I/O: bytes in, bytes out.

    dialler                                             listener
    CHALLENGE  nonce and claims of the dialler    ──►
                                                  ◄──   RESPONSE   proof, nonce and claims of the listener
    PROOF      proof of the dialler               ──►
    sealed frames both ways; the first carries what the transport needs (facts, window, worker address)

A handshake frame is ``magic 4 | version u16 | type u8 | 0 u8 | length u32 | body``, at most 4 KiB: nobody has proved
anything yet. Claims are JSON: process, node, pid, model, epoch, wire, data. A proof is HMAC-SHA256 under the cluster
secret over a label and the transcript (both sides' nonces and claims), so that neither side's proof can be reflected
or replayed. A sealed frame is ``length u32 | sequence u64 | mac 32 | JSON``; the MAC covers all of it under one key per
direction, derived from the secret and the transcript.

Both sides compare the other's claims with their own *after* its proof, so both report the same mismatch. REFUSE (a
sentence) is sent before closing for what only one side can know; it is not authenticated and only ever shown.
"""

import hashlib
import hmac
import struct
from enum import IntEnum
from typing import Any, TypeVar

import orjson

from common.errors import AuthError, WireError
from common.ids import ProcessId, Role
from common.transport.base import Hello

PROTOCOL_VERSION = 1
NONCE_NBYTES = 32
MAX_HANDSHAKE_NBYTES = 4096

_MAGIC = b"ATOL"
_PREFIX = struct.Struct("<4sHBBI")
_SEAL = struct.Struct("<IQ")
_MAC_NBYTES = 32
SEAL_NBYTES = _SEAL.size + _MAC_NBYTES
_PROOF_NBYTES = 32

_T = TypeVar("_T")


class _Type(IntEnum):
    CHALLENGE = 1
    RESPONSE = 2
    PROOF = 3
    REFUSE = 4


def check_claims(mine: Hello, peer: Hello) -> None:
    """Raise AuthError unless both sides agree on model, placement epoch and wire."""
    for name in ("model", "epoch", "wire"):
        ours, theirs = getattr(mine, name), getattr(peer, name)
        if ours != theirs:
            raise AuthError(f"{peer.process} has {name} {theirs}, {mine.process} has {ours}")


class Handshake:
    """One side of one handshake. `feed` until `peer` is set, then `seal` and `unseal` frames."""

    def __init__(
        self, secret: bytes, hello: Hello, *, dialling: bool, nonce: bytes, where: str,
        version: int = PROTOCOL_VERSION,
    ) -> None:  # fmt: skip
        """`nonce` is 32 fresh random bytes; `where` names the peer's address in errors."""
        if len(secret) < 16:
            raise AuthError(f"the cluster secret has {len(secret)} bytes, it needs at least 16")
        if len(nonce) != NONCE_NBYTES:
            raise ValueError(f"a nonce has {NONCE_NBYTES} bytes, not {len(nonce)}")
        self.peer: Hello | None = None  # set once the peer has proved itself and agrees
        self.refusal = b""  # to be sent before closing, after `feed` raised
        self._secret = secret
        self._mine = hello
        self._dialling = dialling
        self.where = where  # names the peer in errors, by its process once it has proved itself
        self._version = version
        self._claims = orjson.dumps({"nonce": nonce.hex(), **_claims(hello)})
        self._claimed: Hello | None = None
        self._transcript = b""
        self._listener_proof = b""
        self._keys = (b"", b"")  # to send with, to receive with
        self._num_sent = 0
        self._num_received = 0

    def start(self) -> bytes:
        """The dialler's first frame."""
        return self._frame(_Type.CHALLENGE, self._claims)

    def feed(self, data: bytearray) -> bytes:
        """Consume one frame from the front of `data` if it is complete; returns what to send.

        Raises AuthError; then `refusal`, if any, should be sent before closing.
        """
        if len(data) < _PREFIX.size:
            if not _MAGIC.startswith(data[:4]):
                raise AuthError(f"{self.where} does not speak this protocol")
            return b""
        magic, version, kind, zero, nbytes = _PREFIX.unpack_from(data)
        if magic != _MAGIC or zero != 0:
            raise AuthError(f"{self.where} does not speak this protocol")
        if version != self._version:
            self.refusal = self._frame(_Type.REFUSE, b"another protocol version")
            raise AuthError(
                f"{self.where} speaks protocol version {version}, "
                f"{self._mine.process} speaks {self._version}"
            )
        if nbytes > MAX_HANDSHAKE_NBYTES:
            raise AuthError(
                f"{self.where} sent a handshake frame of {nbytes} bytes, "
                f"the limit is {MAX_HANDSHAKE_NBYTES}"
            )
        if len(data) < _PREFIX.size + nbytes:
            return b""
        body = bytes(data[_PREFIX.size : _PREFIX.size + nbytes])
        del data[: _PREFIX.size + nbytes]
        return self._step(kind, body)

    def _step(self, kind: int, body: bytes) -> bytes:
        if kind == _Type.REFUSE:
            text = "".join(c for c in body[:200].decode("utf-8", "replace") if c.isprintable())
            raise AuthError(f"{self.where} refused {self._mine.process}: {text}")
        if self._dialling and kind == _Type.RESPONSE and self._claimed is None:
            return self._on_response(body)
        if not self._dialling and kind == _Type.CHALLENGE and self._claimed is None:
            return self._on_challenge(body)
        if not self._dialling and kind == _Type.PROOF and self._claimed is not None:
            return self._on_proof(body)
        raise AuthError(f"{self.where} sent a handshake frame out of order")

    def _on_challenge(self, body: bytes) -> bytes:
        self._claimed = _parse_claims(body, self.where)
        self._transcript = hashlib.sha256(body).digest() + hashlib.sha256(self._claims).digest()
        self._listener_proof = self._prove(b"atoll listener")
        return self._frame(_Type.RESPONSE, self._listener_proof + self._claims)

    def _on_response(self, body: bytes) -> bytes:
        proof, claims = body[:_PROOF_NBYTES], body[_PROOF_NBYTES:]
        self._claimed = _parse_claims(claims, self.where)
        self._transcript = hashlib.sha256(self._claims).digest() + hashlib.sha256(claims).digest()
        self._listener_proof = proof
        if not hmac.compare_digest(proof, self._prove(b"atoll listener")):
            self.refusal = self._frame(_Type.REFUSE, b"another cluster secret")
            raise self._wrong_secret(self._claimed)
        # the proof goes out even when the claims differ: only then can the listener name the mismatch too
        answer = self._frame(_Type.PROOF, self._prove(b"atoll dialler" + self._listener_proof))
        try:
            self._finish()
        except AuthError:
            self.refusal = answer
            raise
        return answer

    def _on_proof(self, body: bytes) -> bytes:
        assert self._claimed is not None
        if not hmac.compare_digest(body, self._prove(b"atoll dialler" + self._listener_proof)):
            self.refusal = self._frame(_Type.REFUSE, b"another cluster secret")
            raise self._wrong_secret(self._claimed)
        self._finish()
        return b""

    def _wrong_secret(self, claimed: Hello) -> AuthError:
        return AuthError(
            f"{claimed.process} at {self.where} does not have the cluster secret "
            f"of {self._mine.process}"
        )

    def _finish(self) -> None:
        assert self._claimed is not None
        check_claims(self._mine, self._claimed)
        session = self._prove(b"atoll session")
        down = hmac.digest(session, b"dialler to listener", "sha256")
        up = hmac.digest(session, b"listener to dialler", "sha256")
        self._keys = (down, up) if self._dialling else (up, down)
        self.peer = self._claimed
        self.where = f"{self.peer.process} ({self.where})"

    def _prove(self, label: bytes) -> bytes:
        return hmac.digest(self._secret, label + self._transcript, "sha256")

    def _frame(self, kind: _Type, body: bytes) -> bytes:
        return _PREFIX.pack(_MAGIC, self._version, kind, 0, len(body)) + body

    def seal(self, body: bytes) -> bytes:
        """The next sealed frame."""
        prefix = _SEAL.pack(len(body), self._num_sent)
        self._num_sent += 1
        return prefix + hmac.digest(self._keys[0], prefix + body, "sha256") + body

    def unseal(self, data: bytearray, max_nbytes: int) -> bytes | None:
        """Consume one sealed frame from the front of `data`; None while it is incomplete.

        Raises WireError for a frame above `max_nbytes`, out of sequence or with a wrong MAC.
        """
        if len(data) < SEAL_NBYTES:
            return None
        nbytes, sequence = _SEAL.unpack_from(data)
        if nbytes > max_nbytes:
            raise WireError(
                f"control frame of {nbytes} bytes from {self.where}, the limit is {max_nbytes}"
            )
        if len(data) < SEAL_NBYTES + nbytes:
            return None
        prefix, body = bytes(data[: _SEAL.size]), bytes(data[SEAL_NBYTES : SEAL_NBYTES + nbytes])
        mac = bytes(data[_SEAL.size : SEAL_NBYTES])
        if sequence != self._num_received or not hmac.compare_digest(
            mac, hmac.digest(self._keys[1], prefix + body, "sha256")
        ):
            raise WireError(
                f"control frame {sequence} from {self.where} was modified, replayed or lost"
            )
        del data[: SEAL_NBYTES + nbytes]
        self._num_received += 1
        return body


def _claims(hello: Hello) -> dict[str, Any]:
    return {
        "role": str(hello.process.role),
        "index": hello.process.index,
        "node": hello.node,
        "pid": hello.pid,
        "model": hello.model,
        "epoch": hello.epoch,
        "wire": hello.wire,
        "data": hello.data,
    }


def _parse_claims(body: bytes, where: str) -> Hello:
    """A Hello without facts; raises AuthError for anything that is not exactly a claim."""
    try:
        claims = orjson.loads(body)
        hello = Hello(
            ProcessId(Role(claims["role"]), _typed(claims, "index", int)),
            _typed(claims, "node", int),
            _typed(claims, "pid", int),
            _typed(claims, "model", str),
            _typed(claims, "epoch", int),
            _typed(claims, "wire", str),
            _typed(claims, "data", bool),
        )
        if len(bytes.fromhex(_typed(claims, "nonce", str))) != NONCE_NBYTES:
            raise ValueError("nonce")
    except (ValueError, KeyError, TypeError) as exc:
        raise AuthError(f"{where} sent a malformed handshake") from exc
    return hello


def _typed(claims: dict[str, Any], name: str, kind: type[_T]) -> _T:
    value = claims[name]
    if type(value) is not kind:
        raise TypeError(name)
    return value
