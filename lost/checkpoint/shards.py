"""The tensors of a checkpoint, written by all processes together and read by any number of them.

Written and read by torch.distributed.checkpoint as safetensors files, which hold nothing but tensors: each process
writes its own shards (of a tensor that every process has whole, one of them writes it), and each reads what it needs.
A tensor is stored under '<group>/<name>', a file as '<group>_<number>_process_<index>.safetensors'.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from lost.checkpoint.io import space_left
from lost.utils.errors import CheckpointError
from lost.utils.files import flush
from lost.utils.tensors import local_of

# Whole tensors, or sharded ones (DTensor).
Tensors = Mapping[str, torch.Tensor]
Groups = Mapping[str, Tensors]

# While a file is written its bytes are in memory a second time.
MAX_FILE_BYTES = 2**29
# That a single process saves alone is meant.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
_WRITTEN_NAME = re.compile(r"shard-(\d{5})-model-(\d{5})-of-\d{5}\.safetensors")


def write_shards(folder: Path, groups: Groups, processes: dist.ProcessGroup | None) -> list[Path]:
    """Writes this process's part of every group and flushes it to the disk; called on every process of `processes`.

    Args:
        folder: exists on every process.
        groups: group ("model", "optimizer", ...) -> tensors by name. A tensor that only process 0 has is written by it.
        processes: a gloo group; None: this process alone.
    Returns:
        The files that this process has written.
    Raises:
        CheckpointError: on every process where one could not write.
    """
    tensors = _with_own_memory({f"{group}/{name}": value for group in groups for name, value in groups[group].items()})
    file_of = _file_numbers(tensors)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    try:
        state_dict_saver.save(tensors, storage_writer=writer, process_group=processes, no_dist=processes is None)
        index = dist.get_rank(processes) if processes else 0
        return list(_named_by_group(folder, index, _names_of_files(file_of)))
    except (OSError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"{folder} could not be written: {first_cause(error)}. {space_left(folder)}") from error


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """'<group>/<name>' -> size and dtype of what the files of a checkpoint hold.

    Raises:
        CheckpointError: a file is no safetensors file, or its shards do not make up whole tensors.
    """
    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} holds a file that is no readable safetensors file: {error}") from error
    tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    for name, entry in tensors.items():
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise CheckpointError(f"{folder}: the shards of {name} do not make up a tensor of {list(entry.size)}")
    return tensors


def read_into(folder: Path, group: str, tensors: Tensors) -> None:
    """Fills `tensors`, whole or sharded, in place with the values that a checkpoint holds under their names.

    Raises:
        CheckpointError: a name is missing or left over, or a shape differs.
    """
    stored = {name: tuple(entry.size) for name, entry in stored_tensors(folder).items() if name.startswith(f"{group}/")}
    tied = tied_names(tensors)
    wanted = {f"{group}/{name}": value.detach() for name, value in tensors.items() if name not in tied}
    problems = [f"{name}: not in the checkpoint" for name in wanted.keys() - stored.keys()]
    problems += [f"{name}: in the checkpoint only" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name}: {list(stored[name])} in the checkpoint, {list(value.shape)} here"
        for name, value in wanted.items()
        if name in stored and stored[name] != tuple(value.shape)
    ]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in sorted(problems)[:10])
        raise CheckpointError(f"the tensors of {folder} do not fit this run:{listed}")
    # Each process reads for itself: nothing to agree on, and no collective that a damaged file could leave hanging.
    try:
        with torch.no_grad():
            state_dict_loader.load(dict(wanted), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"{folder} could not be read: {first_cause(error)}") from error


def read_whole(folder: Path, group: str, aliases: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Every tensor of a group, whole, on the CPU; aliased names hold the very same tensor."""
    tensors = {
        name.removeprefix(f"{group}/"): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored_tensors(folder).items()
        if name.startswith(f"{group}/")
    }
    read_into(folder, group, tensors)
    for name, target in aliases.items():
        if target not in tensors:
            raise CheckpointError(f"{folder}: {name} is tied to {target}, which the checkpoint does not hold")
        tensors[name] = tensors[target]
    return tensors


def tied_names(tensors: Tensors) -> dict[str, str]:
    """name -> first name of the same tensor: tied weights are stored once."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        local = local_of(tensor)
        memory = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride())
        if local.numel() and memory in first:
            aliases[name] = first[memory]
        first.setdefault(memory, name)
    return aliases


def copied(groups: Groups) -> dict[str, dict[str, torch.Tensor]]:
    """The same tensors with memory of their own on the CPU (sharded ones stay sharded); tied ones stay tied."""
    has_gpu = torch.accelerator.is_available()
    options = StagingOptions(
        use_pinned_memory=has_gpu,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=has_gpu,
    )
    return DefaultStager(options).stage({group: dict(tensors) for group, tensors in groups.items()})  # pyright: ignore[reportReturnType]


def first_cause(error: BaseException) -> str:
    """The message of what failed first, in whichever process."""
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
        return "; ".join(sorted({f"{type(failure).__name__}: {failure}" for failure in failures}))
    return str(error)


def _with_own_memory(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Contiguous tensors of which no two share memory: safetensors takes no others."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        assert not tensor.is_meta, f"{name} is on the meta device: it has no values to save"
        value = tensor.detach()
        if not isinstance(value, DTensor):
            value = value.contiguous()
            storage = value.untyped_storage()
            is_view = storage.nbytes() != value.numel() * value.element_size() or storage.data_ptr() in seen
            value = value.clone() if is_view else value
            seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _file_numbers(tensors: Tensors) -> dict[str, int]:
    """tensor -> number of its file, the same on every process: groups are kept apart, and files bounded in size."""
    number, group, num_bytes = 0, None, 0
    numbers = {}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if name.split("/", 1)[0] != group or num_bytes + size > MAX_FILE_BYTES:
            number, group, num_bytes = number + 1, name.split("/", 1)[0], 0
        num_bytes += size
        numbers[name] = number
    return numbers


def _names_of_files(file_of: Mapping[str, int]) -> dict[int, str]:
    """file number -> '<group>_<number within the group>'."""
    names: dict[int, str] = {}
    for tensor, number in file_of.items():
        group = tensor.split("/", 1)[0]
        if number not in names:
            names[number] = f"{group}_{sum(name.startswith(f'{group}_') for name in names.values()):05d}"
    return names


def _named_by_group(folder: Path, index: int, names: Mapping[int, str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        match = _WRITTEN_NAME.fullmatch(path.name)
        if match and int(match[1]) == index + 1:
            target = path.with_name(f"{names[int(match[2])]}_process_{index:05d}.safetensors")
            path.rename(target)
            flush(target)
            yield target
