"""Tensors written and read back are the same bits, ties included, whatever their layout."""

import pickle

import pytest
import torch

from lost.checkpoint.io import read_json, read_tensors, write_json, write_json_atomically, write_tensors
from lost.utils.errors import CheckpointError


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
    assert write_tensors(tmp_path / "a.safetensors", tensors) == {}
    found = read_tensors(tmp_path / "a.safetensors", {})
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def test_bits_sees_the_smallest_difference():
    assert bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0]))
    assert bits(torch.tensor([1.0])) != bits(torch.nextafter(torch.tensor([1.0]), torch.tensor([2.0])))


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    weight = torch.randn(100, 63)
    path = tmp_path / "a.safetensors"
    aliases = write_tensors(path, {"embedding": weight, "head": weight, "parameter": weight[:]})
    assert aliases == {"head": "embedding", "parameter": "embedding"}
    assert path.stat().st_size < 1.1 * weight.numel() * 4
    found = read_tensors(path, aliases)
    assert found["head"] is found["embedding"]
    assert torch.equal(found["head"], weight)


def test_equal_values_in_different_memory_are_not_tied(tmp_path):
    weight = torch.randn(4, 3)
    assert write_tensors(tmp_path / "a.safetensors", {"one": weight, "two": weight.clone()}) == {}


def test_overlapping_views_become_separate_copies(tmp_path):
    base = torch.randn(6, 4)
    views = {"base": base, "row": base[2], "transposed": base.t(), "flat": base.view(-1), "strided": base[::2, 1::2]}
    aliases = write_tensors(tmp_path / "a.safetensors", views)
    assert aliases == {}
    found = read_tensors(tmp_path / "a.safetensors", aliases)
    for name, view in views.items():
        assert torch.equal(found[name], view), name
    found["base"].zero_()
    assert torch.equal(found["row"], base[2])


def test_writing_into_what_was_read_leaves_the_file_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(1000)})
    before = path.read_bytes()
    read_tensors(path, {})["a"].zero_()
    assert path.read_bytes() == before


def test_the_source_tensors_are_left_alone(tmp_path):
    weight = torch.nn.Parameter(torch.randn(5, 3))
    kept = weight.detach().clone()
    write_tensors(tmp_path / "a.safetensors", {"a": weight, "b": weight.t()})
    assert weight.requires_grad
    assert torch.equal(weight, kept)


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(SystemExit):
        pickle.loads(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"a.safetensors is not a readable safetensors file"):
        read_tensors(path, {})


def test_an_alias_of_a_tensor_that_is_not_there_is_named(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="head is tied to embedding"):
        read_tensors(tmp_path / "a.safetensors", {"head": "embedding"})


def test_json_keeps_every_float_and_any_text(tmp_path):
    value = {"a": 0.1 + 0.2, "tiny": 5e-324, "big": 2**70, "nan": float("inf"), "text": "é \udce9 \n", "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_is_replaced_whole_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "status.json"
    write_json_atomically(path, {"a": 1})
    write_json_atomically(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert read_json(path) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_broken_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1')
    with pytest.raises(CheckpointError, match=r"a.json is not readable JSON"):
        read_json(tmp_path / "a.json")
