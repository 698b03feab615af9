"""Files that either exist whole or not at all: safetensors and JSON, flushed to the disk and renamed into place.

Nothing here unpickles. Tied tensors (two names, one memory) are stored once, under the first name; the other names are
returned as aliases, which the manifest keeps, and become the same tensor object again when read. Tensors that overlap
without being equal are stored as separate copies.
"""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lost.utils.errors import CheckpointError
from lost.utils.files import flush

Tensors = dict[str, torch.Tensor]


def write_tensors(path: Path, tensors: Tensors) -> dict[str, str]:
    """Writes a safetensors file and flushes it to the disk.

    Args:
        path: file to write.
        tensors: any dtype, device, layout and sharing; meta tensors have no values and are refused.
    Returns:
        name left out -> name under which the same memory is stored.
    Raises:
        CheckpointError: the file could not be written (disk full, no permission).
    """
    stored, aliases = _without_shared_memory(tensors)
    try:
        save_file(stored, path)
        flush(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written: {error}. {_space_left(path)}") from error
    return aliases


def read_tensors(path: Path, aliases: dict[str, str]) -> Tensors:
    """The tensors of a safetensors file on the CPU; aliased names hold the very same tensor.

    Raises:
        CheckpointError: the file is no safetensors file, or an alias names a tensor that it lacks.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    for name, target in aliases.items():
        if target not in tensors:
            raise CheckpointError(f"{path}: {name} is tied to {target}, which the file does not hold")
        tensors[name] = tensors[target]
    return tensors


def _without_shared_memory(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """CPU tensors that own their memory, and the names that were the same memory under another name."""
    stored: Tensors = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple, str] = {}
    seen_storages: set[int] = set()
    for name, tensor in tensors.items():
        assert not tensor.is_meta, f"{name} is on the meta device: it has no values to save"
        same_memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and same_memory in first_name:
            aliases[name] = first_name[same_memory]
            continue
        first_name[same_memory] = name
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        is_view = storage.nbytes() != value.numel() * value.element_size()
        if is_view or storage.data_ptr() in seen_storages:
            value = value.clone()
        seen_storages.add(value.untyped_storage().data_ptr())
        stored[name] = value
    return stored, aliases


def write_text(path: Path, text: str) -> None:
    """Writes a text file and flushes it to the disk."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}. {_space_left(path)}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON and flushes it to the disk; floats are exact, keys become text."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        CheckpointError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a kill at any moment, sees the old contents or the new ones."""
    # Host and process in the name: two writers never share a temporary file.
    temporary = path.with_name(f".tmp_{path.name}_{socket.gethostname()}_{os.getpid()}")
    try:
        write_text(temporary, text)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomically(path: Path, value: Any) -> None:
    """Replaces a JSON file like `write_text_atomically`."""
    write_text_atomically(path, json.dumps(value, indent=1) + "\n")


def replace(source: Path, target: Path) -> None:
    """Renames over `target` and flushes the folder, so that the new name survives a power cut."""
    try:
        os.replace(source, target)
        flush(target.parent)
    except OSError as error:
        raise CheckpointError(f"{source} could not be renamed to {target.name}: {error}") from error


def _space_left(path: Path) -> str:
    try:
        gib = shutil.disk_usage(path.parent).free / 2**30
    except OSError:
        return "Check that the folder exists and is writable"
    return f"Free space there: {gib:.2f} GiB; make room, or choose another run_dir"
