"""The directory of one running cluster: sockets, secret, cluster TOML and logs, private to the user.

Without a given directory each run gets its own under <tmp>/atoll-<uid>/, removed at the end. Whoever runs a cluster
holds a lock on `lock` in it, so that what a killed launcher left behind can be told from a running cluster and is
removed by the next start. A given directory is kept: only sockets, addresses and the secret are removed from it.
"""

import fcntl
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from deploy.local import mps

LOCK = "lock"
LOGS = "logs"
MPS = "mps"  # pipes of its daemon, where processes share a card
SECRET_NBYTES = 32
_TRANSIENT = ("*.sock", "*.url", "secret", "*.tmp")


@dataclass(frozen=True, slots=True)
class RunDir:
    """An opened, locked directory. `temporary`: it is removed at the end."""

    path: Path
    temporary: bool
    lock_fd: int

    @property
    def cluster_file(self) -> Path:
        """The TOML that every process of this run reads."""
        return self.path / "cluster.toml"

    def log_file(self, name: str) -> Path:
        """Where the output of one process goes."""
        return self.path / LOGS / f"{name}.log"

    def write_secret(self) -> None:
        """A new random secret, readable by the owner only."""
        write_secret(self.path)

    def close(self) -> None:
        """Remove what must not outlive the run and give the lock up; idempotent."""
        remove_leftovers(self.path, temporary=self.temporary)
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            object.__setattr__(self, "lock_fd", -1)


def open_run_dir(requested: Path | None) -> RunDir:
    """Make, clean and lock the directory. Raises ConfigError when it is not private or another cluster runs in it."""
    try:
        return _open_given(requested.absolute()) if requested else _open_temporary()
    except OSError as exc:
        raise ConfigError(f"run directory {exc.filename}: {exc.strerror}") from exc


def remove_leftovers(path: Path, *, temporary: bool) -> None:
    """Stop its MPS, then remove a temporary directory, or only the transient files of a kept one; idempotent."""
    mps.stop(path / MPS)
    if temporary:
        shutil.rmtree(path, ignore_errors=True)
        return
    for pattern in _TRANSIENT:
        for file in path.glob(pattern):
            file.unlink(missing_ok=True)


def write_secret(directory: Path) -> None:
    """A new random secret in `directory`, readable by the owner only."""
    write_atomically(directory / "secret", secrets.token_hex(SECRET_NBYTES) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, mode 0600: a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    temporary.replace(path)


def _open_given(path: Path) -> RunDir:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private(path)
    fd = _try_lock(path)
    if fd is None:
        raise ConfigError(f"another cluster is running in {path}")
    remove_leftovers(path, temporary=False)
    (path / LOGS).mkdir(exist_ok=True)
    return RunDir(path, temporary=False, lock_fd=fd)


def _open_temporary() -> RunDir:
    base = Path(tempfile.gettempdir()) / f"atoll-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    require_private(base)
    # one start at a time here: a directory that was made but not yet locked would look like a leftover
    base_fd = os.open(base / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(base_fd, fcntl.LOCK_EX)
        for old in base.iterdir():
            if old.is_dir() and (fd := _try_lock(old)) is not None:
                remove_leftovers(old, temporary=True)
                os.close(fd)
        path = Path(tempfile.mkdtemp(prefix="run-", dir=base))
        (path / LOGS).mkdir()
        fd = _try_lock(path)
        if fd is None:
            raise ConfigError(f"{path} was locked by somebody else")
        return RunDir(path, temporary=True, lock_fd=fd)
    finally:
        os.close(base_fd)


def _try_lock(path: Path) -> int | None:
    fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def require_private(path: Path) -> None:
    """Raises ConfigError unless the directory is ours and nobody else may look into it."""
    status = path.lstat()
    if path.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"run directory {path} must be yours alone (owned by you, mode 0700)")
