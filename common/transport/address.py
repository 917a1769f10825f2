"""Addresses of control sockets: `tcp://host:port` and `unix:/path`, and the sockets behind them."""

import contextlib
import os
import socket
import stat
from dataclasses import dataclass

from common.errors import ConfigError

_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address; `path` is empty for tcp."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises ConfigError for anything but the two forms."""
        if text.startswith("unix:/"):
            return cls(path=text[len("unix:") :])
        if text.startswith("tcp://"):
            host, _, port = text[len("tcp://") :].rpartition(":")
            if host and port.isdecimal() and int(port) < 1 << 16:
                return cls(host=host.strip("[]"), port=int(port))
        raise ConfigError(f"address {text!r} is neither tcp://host:port nor unix:/absolute/path")


class BoundSocket:
    """A listening socket; `close` also removes a Unix socket's file, unless a successor has replaced it."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self.sock = sock
        self.address = address
        self._inode = os.stat(address.path).st_ino if address.path else 0

    def close(self) -> None:
        """Stop listening; idempotent."""
        self.sock.close()
        if self._inode:
            with contextlib.suppress(OSError):
                if os.stat(self.address.path).st_ino == self._inode:
                    os.unlink(self.address.path)
            self._inode = 0


def bind(address: Address) -> BoundSocket:
    """Listen on `address`; port 0 takes any free one. Raises ConfigError when that is impossible."""
    try:
        return _bind_unix(address) if address.path else _bind_tcp(address)
    except OSError as exc:
        raise ConfigError(f"cannot listen on {address}: {exc.strerror or exc}") from exc


def _bind_unix(address: Address) -> BoundSocket:
    _remove_stale(address.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        mask = os.umask(0o177)  # the file must never exist with wider permissions, not even briefly
        try:
            sock.bind(address.path)
        finally:
            os.umask(mask)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return BoundSocket(sock, address)


def _remove_stale(path: str) -> None:
    """Remove the socket file of a killed predecessor; one that still listens keeps it."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        except OSError:
            pass  # alive but busy: bind will say that the address is in use


def _bind_tcp(address: Address) -> BoundSocket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address.host, address.port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return BoundSocket(sock, Address(host=address.host, port=sock.getsockname()[1]))


def tune_tcp(sock: socket.socket) -> None:
    """No Nagle; a peer whose host vanished is noticed after about `5 s` instead of two hours."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000)
