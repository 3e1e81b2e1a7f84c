"""Files of ours: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKSUM = "checksum"


def write_tensors(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> None:
    """One safetensors file, in the place of any before it once it is complete on the disk."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, part, {**header, CHECKSUM: _checksum(whole, header)})
        _replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """The same for what JSON can hold."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps({CHECKSUM: _json_checksum(value), "value": value}, indent=1))
        _replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """ValueError where it is not as it was written."""
    try:
        found = json.loads(path.read_bytes())
        whole = found[CHECKSUM] == _json_checksum(found["value"])
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"path: {str(path)!r} is damaged: its checksum does not fit")
    return found["value"]


def _replace(part: Path, path: Path) -> None:
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)  # its new name


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(
    path: str | PathLike[str], form: str, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's texts of a file of ours; an error naming `path` for others."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file at {str(path)!r}")
    try:
        with safe_open(Path(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"path: {str(path)!r} is not a safetensors file ({error})") from None
    if metadata.get("format") != form:
        raise ValueError(f"path: {str(path)!r} holds no {what} of this format ({form})")
    found = metadata.pop(CHECKSUM, None)
    if found is not None and found != _checksum(tensors, metadata):
        raise ValueError(f"path: {str(path)!r} is damaged: its checksum does not fit")
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
