"""API keys: read once from a file, compared in constant time."""

import hashlib
import hmac
from pathlib import Path

from common.errors import ConfigError

_SCHEME = "Bearer "


class ApiKeys:
    """One or several keys; comparing digests makes the time depend neither on the key nor on where it differs."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, authorization: str) -> bool:
        """Whether an Authorization header carries one of the keys."""
        if not authorization.startswith(_SCHEME):
            return False
        offered = authorization.removeprefix(_SCHEME).strip()
        digest = hashlib.sha256(offered.encode(errors="surrogateescape")).digest()
        # A sum, not any(): every key is compared, whichever matches.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def load_keys(path: Path) -> ApiKeys:
    """One key per line; empty lines and lines that begin with # are skipped. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not a text file") from exc
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path}: no API key in it")
    return ApiKeys(keys)
