"""Reads a checkpoint for the doctor: is it complete, and are its bytes those that somebody vouches for?

Vouched for by `SHA256SUMS` in the directory (as sha256sum writes it), or by what Hugging Face's downloader leaves: a
cache whose files are links to blobs named by their SHA-256, or `.cache/huggingface/download/*.metadata`. Files beyond
`BUDGET_NBYTES` in all are hashed only when asked for.
"""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import AtollError, ModelError
from common.model.checkpoint import INDEX, Checkpoint
from common.model.hf_config import load_config
from deploy.doctor import facts

SUMS = "SHA256SUMS"
BUDGET_NBYTES = 1 << 30  # about a second
_SHA256 = re.compile(r"[0-9a-f]{64}")
_THREADS = 8


def model(directory: Path, *, full: bool) -> facts.Model:
    """Read it; `full` hashes whatever its size."""
    try:
        load_config(directory)
        files, digest = _complete(directory)
        reference, sums = _vouched(directory)
    except OSError as exc:
        return facts.Model(str(directory), problem=f"{exc.filename}: {exc.strerror}")
    except AtollError as exc:
        return facts.Model(str(directory), problem=str(exc))
    nbytes = sum(path.stat().st_size for path in files)
    known = [path for path in files if path.name in sums]
    hashed = [] if nbytes > BUDGET_NBYTES and not full else known
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(hashed, pool.map(sha256, hashed), strict=True))
    wrong = tuple(path.name for path, value in found.items() if value != sums[path.name])
    unhashed = tuple(path.name for path in known if path not in found)
    if known != files and not wrong:
        reference = ""  # vouching for a part says nothing of the rest
    return facts.Model(str(directory), nbytes, reference, wrong, unhashed, digest)


def _complete(directory: Path) -> tuple[list[Path], str]:
    """Every weight file, each with a header that fits its size and the tensors that the index promises."""
    digest = hashlib.blake2b((directory / "config.json").read_bytes(), digest_size=16)
    with Checkpoint(directory) as checkpoint:
        for name in checkpoint.names:
            entry = checkpoint.entry(name)
            digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        files = checkpoint.files
    if (directory / INDEX).exists():
        digest.update((directory / INDEX).read_bytes())
    return files, digest.hexdigest()


def _vouched(directory: Path) -> tuple[str, dict[str, str]]:
    """Who vouches, and file name -> SHA-256 in hexadecimal."""
    path = directory / SUMS
    if path.exists():
        return SUMS, _read_sums(path)
    found = {}
    for file in directory.glob("*.safetensors"):
        blob = file.resolve().name
        if file.is_symlink() and _SHA256.fullmatch(blob):
            found[file.name] = blob
            continue
        metadata = directory / ".cache/huggingface/download" / f"{file.name}.metadata"
        if metadata.exists():
            etag = (*metadata.read_text().splitlines(), "", "")[1].strip('"')
            if _SHA256.fullmatch(etag):
                found[file.name] = etag
    return "the hashes of its download", found


def _read_sums(path: Path) -> dict[str, str]:
    sums = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        value, _, name = line.partition(" ")
        if not _SHA256.fullmatch(value) or not name.strip():
            raise ModelError(f"{path}:{number} is not a line of sha256sum")
        sums[name.strip().removeprefix("*")] = value
    return sums


def sha256(path: Path) -> str:
    """In hexadecimal. hashlib lets other threads run meanwhile."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
