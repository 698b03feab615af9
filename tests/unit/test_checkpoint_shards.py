"""Tensors written and read back are the same bits, whatever their layout, dtype, ties and sharding."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lost.checkpoint import CheckpointManager, shards
from lost.checkpoint.shards import copied, read_into, read_whole, tied_names, write_shards
from lost.testing.processes import run_processes
from lost.testing.sharded import SIZES, layer, save_and_load_sharded
from lost.utils.errors import CheckpointError


def write(folder, tensors):
    write_shards(folder, {"g": tensors}, None)


def read(folder):
    return read_whole(folder, "g", {})


def bits(tensor: torch.Tensor) -> bytes:
    """The raw bytes of the values in row-major order: nan equals nan, 0.0 differs from -0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def odd_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(7, 5, generator=generator)
    return {
        "float32": normal,
        "float64": normal.double() * 1e-300,
        "bfloat16": (normal * 3).to(torch.bfloat16),
        "float16": (normal * 5).to(torch.float16),
        "int64": torch.tensor([2**62, -(2**63), 0]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 4),
        "also empty": torch.empty(0, 4),
        "not finite": torch.tensor([float("nan"), float("inf"), -float("inf")]),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
        "expanded": torch.randn(4, 1, generator=generator).expand(4, 6),
    }


def test_every_dtype_and_shape_round_trips_bit_for_bit(tmp_path):
    tensors = odd_tensors()
    write(tmp_path, tensors)
    found = read(tmp_path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def test_bits_sees_the_smallest_difference():
    assert bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0]))
    assert bits(torch.tensor([1.0])) != bits(torch.nextafter(torch.tensor([1.0]), torch.tensor([2.0])))


def test_tied_tensors_are_found_and_no_others():
    weight = torch.randn(100, 63)
    tensors = {"embedding": weight, "head": weight, "part": weight[:50], "copy": weight.clone(), "again": weight[:]}
    assert tied_names(tensors) == {"head": "embedding", "again": "embedding"}
    assert tied_names({"a": torch.empty(0, 3), "b": torch.empty(0, 3)}) == {}


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    weight = torch.randn(100, 63)
    path = CheckpointManager(tmp_path).save(1, {"model": {"embedding": weight, "head": weight}}, {})
    assert sum(file.stat().st_size for file in path.iterdir()) < 1.1 * weight.numel() * 4
    found = CheckpointManager(tmp_path).load(path)[0]["model"]
    assert found["head"] is found["embedding"]
    assert torch.equal(found["head"], weight)
    own = torch.zeros(100, 63)
    read_into(path, "model", {"embedding": own, "head": own})
    assert torch.equal(own, weight)


def test_an_alias_of_a_tensor_that_is_not_there_is_named(tmp_path):
    write(tmp_path, {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="head is tied to embedding"):
        read_whole(tmp_path, "g", {"head": "embedding"})


def test_overlapping_views_become_separate_copies(tmp_path):
    base = torch.randn(6, 4)
    views = {"base": base, "row": base[2], "transposed": base.t(), "flat": base.view(-1), "strided": base[::2, 1::2]}
    write(tmp_path, views)
    found = read(tmp_path)
    for name, view in views.items():
        assert torch.equal(found[name], view), name
    found["base"].zero_()
    assert torch.equal(found["row"], base[2])


def test_large_groups_are_split_into_files_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_FILE_BYTES", 1000)
    tensors = {f"t{i}": torch.randn(40 + i) for i in range(30)} | {"large": torch.randn(600)}
    files = write_shards(tmp_path, {"model": tensors, "optimizer": {"a": torch.ones(3)}}, None)
    assert len(files) >= 10
    assert sorted(file.name for file in files)[-1] == "optimizer_00000_process_00000.safetensors"
    assert sorted(tmp_path.iterdir()) == sorted(files)
    found = read_whole(tmp_path, "model", {})
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_source_tensors_are_left_alone(tmp_path):
    weight = torch.nn.Parameter(torch.randn(5, 3))
    kept = weight.detach().clone()
    write(tmp_path, {"a": weight, "b": weight.t()})
    assert weight.requires_grad
    assert torch.equal(weight, kept)


def test_a_copy_has_memory_of_its_own_and_keeps_ties():
    tensors = odd_tensors()
    tensors["tied"] = tensors["float32"]
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    copies = copied({"g": tensors})["g"]
    for tensor in tensors.values():
        tensor.detach().view(-1).zero_() if tensor.is_contiguous() else None
    assert {name: bits(tensor) for name, tensor in copies.items()} == before
    assert tied_names(copies) == {"tied": "float32"}


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "g_00000_process_00000.safetensors"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(SystemExit):
        pickle.loads(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"no readable safetensors file"):
        read(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**6])
def test_an_absurd_header_is_refused_without_taking_memory(tmp_path, length):
    (tmp_path / "g_00000_process_00000.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"no readable safetensors file"):
        read(tmp_path)


def test_shards_that_leave_a_hole_or_lie_far_away_are_refused(tmp_path):
    for offset in (1, 2**60):
        facts = {"DCP_SHARDING_INFO": json.dumps({"g/a": {"saved_offsets": [offset, 0]}})}
        save_file({"g/a": torch.ones(2, 3)}, tmp_path / "g_00000_process_00000.safetensors", metadata=facts)
        with pytest.raises(CheckpointError, match="do not make up a tensor"):
            read(tmp_path)


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    write(tmp_path, {"a": torch.ones(2, 3), "b": torch.ones(4), "left over": torch.ones(1)})
    with pytest.raises(CheckpointError) as error:
        read_into(tmp_path, "g", {"a": torch.ones(3, 2), "b": torch.ones(4), "new": torch.ones(1)})
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  - g/a: [2, 3] in the checkpoint, [3, 2] here",
        "  - g/left over: in the checkpoint only",
        "  - g/new: not in the checkpoint",
    ]


@pytest.mark.parametrize(("saved_by", "read_by"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_any_number_of_processes_reads_what_any_number_saved(tmp_path, saved_by, read_by):
    """Shards of odd sizes, some of them empty, a buffer that every process has whole, and what process 0 alone has."""
    run_processes(save_and_load_sharded, tmp_path / "save", str(tmp_path), True, count=saved_by)
    (path,) = (tmp_path / "checkpoints").glob("step_*")
    expected = layer().state_dict()
    whole = read_whole(path, "model", {})
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], value) for name, value in expected.items())
    assert read_whole(path, "rng", {}).keys() == {"process_0/x"}
    num_files = len(list(path.glob("model_*")))
    assert num_files == saved_by
    for found in run_processes(save_and_load_sharded, tmp_path / "read", str(tmp_path), False, count=read_by):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_missing_shard_of_another_process_is_seen(tmp_path):
    run_processes(save_and_load_sharded, tmp_path / "save", str(tmp_path), True)
    (path,) = (tmp_path / "checkpoints").glob("step_*")
    (path / "model_00000_process_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"process_00001\.safetensors is missing"):
        CheckpointManager(path.parent).load(path)
    with pytest.raises(CheckpointError, match=r"in the checkpoint"):
        read_into(path, "model", layer().state_dict())
    assert len(SIZES) == len(nn.Sequential(*layer()))
