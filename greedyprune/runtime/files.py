"""The package's own files: written completely or not at all, and verified when they are read.

A file is written under a temporary name and renamed once it is on the disk. It holds a checksum of
its content, so that a damaged file is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKSUM = "checksum"


def write_tensors(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> None:
    """Writes a safetensors file. It replaces a file at `path` once it is complete on the disk.

    TypeError for a `path` of another type; OSError where there is no such folder, or it can't be
    written to.
    """
    path = _checked_path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path: found the folder {str(path)!r}, expected a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path: found {str(path)!r} in a folder that does not exist; make {str(path.parent)!r} "
            "first"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, temporary, {**header, CHECKSUM: _checksum(contiguous, header)})
        _replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"path: can't write {str(path)!r} ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _checked_path(path: object) -> Path:
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"path: found {path!r}, expected a str or a path")
    return Path(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value that JSON can hold, in the same way as `write_tensors`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    content = json.dumps({CHECKSUM: _json_checksum(value), "value": value}, indent=1)
    try:
        temporary.write_text(content)
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The value that `write_json` wrote; ValueError where the file is damaged."""
    try:
        content = json.loads(path.read_bytes())
        intact = content[CHECKSUM] == _json_checksum(content["value"])
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"path: {str(path)!r} is damaged: its checksum does not match")
    return content["value"]


def _replace(temporary: Path, path: Path) -> None:
    """Renames a file, so that a crash leaves either the old file or the new one, complete."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)  # the folder holds the name


def _sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(
    path: str | PathLike[str], form: str, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file that `write_tensors` wrote.

    form: what the header's entry "format" has to be; what: the content, in words, for the error

    TypeError for a `path` of another type; FileNotFoundError where there is no file; ValueError for
    a damaged file or one of another format
    """
    path = _checked_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no file at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"path: {str(path)!r} is not a safetensors file ({error})") from None
    if metadata.get("format") != form:
        raise ValueError(f"path: {str(path)!r} holds no {what} of this format ({form})")
    checksum = metadata.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(tensors, metadata):
        raise ValueError(f"path: {str(path)!r} is damaged: its checksum does not match")
    return tensors, metadata


def _json_checksum(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(header):
        digest.update(f"{name}={header[name]};".encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous().reshape(-1)
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensors[name].shape)};".encode())
        if tensor.numel():
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
