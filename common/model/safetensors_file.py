"""safetensors by byte range: the header is parsed and checked here, tensor bytes are read only when asked for.

Format: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the data, to whose
start the offsets are relative. Leaves names and shapes that a model needs to `loader`.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file

from common.errors import ModelError

_MAX_HEADER_NBYTES = 100 << 20
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `start` and `end` are absolute byte offsets."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.start


class Closing:
    """A context manager that closes; what holds nothing open need not override `close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open; idempotent."""


class SafetensorsFile(Closing):
    """One open file. `nbytes_read` counts tensor bytes, to show that a worker reads only what is its own."""

    def __init__(self, path: Path) -> None:
        """Open and check the header. Raises ModelError naming file and tensor."""
        self.path = path
        self.nbytes_read = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise ModelError(f"{path}: {exc.strerror}") from exc
        try:
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<SafetensorsFile {self.path.name} [{len(self.entries)} tensors]>"

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_bytes(self, name: str) -> bytearray:
        """The raw bytes of a tensor. Raises ModelError naming file and tensor."""
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(f"{self.path}: tensor {name} is missing")
        data = bytearray(entry.nbytes)
        self._pread_into(memoryview(data), entry.start, name)
        self.nbytes_read += entry.nbytes
        return data

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype and shape. Raises ModelError naming file and tensor."""
        data = self.read_bytes(name)
        entry = self.entries[name]
        if not data:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)

    def _pread_into(self, view: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise ModelError(f"{self.path}: truncated while reading {what}")
            done += count

    def _read_header(self) -> dict[str, TensorEntry]:
        size = os.fstat(self._fd).st_size
        if size < 8:
            raise ModelError(f"{self.path}: truncated, {size} bytes are no safetensors file")
        prefix = bytearray(8)
        self._pread_into(memoryview(prefix), 0, "the header length")
        length = int.from_bytes(prefix, "little")
        if length > _MAX_HEADER_NBYTES:
            raise ModelError(f"{self.path}: header of {length} bytes is above the limit of 100 MiB")
        if 8 + length > size:
            raise ModelError(
                f"{self.path}: truncated, the header needs {8 + length} bytes and the file has {size}"
            )
        raw = bytearray(length)
        self._pread_into(memoryview(raw), 8, "the header")
        try:
            header = json.loads(raw)
        except ValueError as exc:
            raise ModelError(f"{self.path}: the header is not valid JSON ({exc})") from exc
        if not isinstance(header, dict):
            raise ModelError(f"{self.path}: the header must be a JSON object")
        header.pop("__metadata__", None)
        entries = {
            name: self._entry(name, value, 8 + length, size) for name, value in header.items()
        }
        self._check_overlap(entries)
        return entries

    def _entry(self, name: str, value: Any, base: int, size: int) -> TensorEntry:  # noqa: ANN401
        where = f"{self.path}: tensor {name}"
        try:
            dtype, shape = value["dtype"], tuple(value["shape"])
            start, end = value["data_offsets"]
        except (KeyError, TypeError, ValueError) as exc:
            raise ModelError(f"{where} has no dtype, shape and two data_offsets") from exc
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ModelError(f"{where} has dtype {dtype!r}, known are {', '.join(DTYPES)}")
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ModelError(f"{where} has a shape or offset that is no whole number")
        count = 1
        for dimension in shape:
            count *= dimension
        if end - start != count * DTYPES[dtype].itemsize:
            raise ModelError(
                f"{where} of shape {list(shape)} in {dtype} needs {count * DTYPES[dtype].itemsize} "
                f"bytes, its offsets give {end - start}"
            )
        if base + end > size:
            raise ModelError(f"{where} ends at byte {base + end}, the file is truncated at {size}")
        return TensorEntry(dtype, shape, base + start, base + end)

    def _check_overlap(self, entries: dict[str, TensorEntry]) -> None:
        previous, end = "", 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start < end:
                raise ModelError(f"{self.path}: tensors {previous} and {name} overlap")
            previous, end = name, entry.end


def write_safetensors(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """The same tensors give the same bytes."""
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors}, path, metadata={"format": "pt"}
    )
    path.chmod(0o644)  # whoever serves it may be another user
