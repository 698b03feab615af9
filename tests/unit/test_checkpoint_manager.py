"""Which checkpoint counts: complete ones only, the newest undamaged one, never a file from elsewhere."""

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lost.checkpoint import CheckpointManager
from lost.checkpoint.manifest import sha256_of
from lost.utils.errors import CheckpointError


@pytest.fixture(autouse=True)
def _messages_reach_pytest(monkeypatch):
    # lost.utils.logging.setup, run by another test of this process, keeps our messages from the root logger.
    monkeypatch.setattr(logging.getLogger("lost"), "propagate", True)


def contents(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that are a function of the step, so that a mixture of two checkpoints is seen."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(9, 5, generator=generator)
    return {
        "model": {"embedding": weight, "head": weight, "norm": torch.randn(5, generator=generator)},
        "optimizer": {"moment": torch.randn(9, 5, generator=generator), "step": torch.tensor(float(step))},
        "rng": {"torch": generator.get_state()},
    }


def save(manager: CheckpointManager, step: int) -> Path:
    return manager.save(step, contents(step), {"step": step, "loss": 1 / 3})


def assert_holds(manager: CheckpointManager, path: Path, step: int) -> None:
    tensors, facts = manager.load(path)
    assert facts == {"step": step, "loss": 1 / 3}
    expected = contents(step)
    assert {name: set(group) for name, group in tensors.items()} == {n: set(g) for n, g in expected.items()}
    for name, group in expected.items():
        for key, value in group.items():
            assert torch.equal(tensors[name][key], value), (name, key)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run" / "checkpoints"


def test_what_is_saved_is_loaded(folder):
    manager = CheckpointManager(folder)
    path = save(manager, 100)
    assert path == folder / "step_00000100"
    assert names(path) == [
        "manifest.json",
        "model_00000_process_00000.safetensors",
        "optimizer_00000_process_00000.safetensors",
        "rng_00000_process_00000.safetensors",
        "state.json",
    ]
    assert_holds(CheckpointManager(folder), path, 100)
    tensors, _ = manager.load(path)
    assert tensors["model"]["head"] is tensors["model"]["embedding"]


def test_manifest_lists_size_and_sum_of_every_other_file(folder):
    path = save(CheckpointManager(folder), 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["format_version"] == 2
    assert set(manifest["files"]) == set(names(path)) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def test_the_newest_are_kept(folder):
    manager = CheckpointManager(folder, keep=2)
    for step in (10, 20, 100_000_000, 100_000_010):
        save(manager, step)
    assert names(folder) == ["step_100000000", "step_100000010"]
    assert manager.latest() == folder / "step_100000010"


def test_a_damaged_checkpoint_does_not_count_as_kept(folder):
    manager = CheckpointManager(folder, keep=2)
    save(manager, 1)
    newest = save(manager, 2)
    (newest / "model_00000_process_00000.safetensors").unlink()
    save(manager, 3)
    assert "step_00000001" in names(folder)
    assert_holds(manager, folder / "step_00000001", 1)


def test_saving_a_step_again_replaces_it(folder):
    manager = CheckpointManager(folder, keep=1)
    path = save(manager, 5)
    (path / "model_00000_process_00000.safetensors").write_bytes(b"damaged")
    save(manager, 5)
    assert names(folder) == ["step_00000005"]
    assert_holds(CheckpointManager(folder), path, 5)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(
        path / "model_00000_process_00000.safetensors",
        (path / "model_00000_process_00000.safetensors").stat().st_size - 1,
    ),
    "longer": lambda path: (path / "rng_00000_process_00000.safetensors").open("ab").write(b"0"),
    "bit flipped in weights": lambda path: flip_a_bit(path / "model_00000_process_00000.safetensors"),
    "bit flipped in facts": lambda path: flip_a_bit(path / "state.json"),
    "bit flipped in manifest": lambda path: flip_a_bit(path / "manifest.json"),
    "empty manifest": lambda path: (path / "manifest.json").write_text(""),
    "missing file": lambda path: (path / "optimizer_00000_process_00000.safetensors").unlink(),
    "file of another checkpoint": lambda path: shutil.copy(
        path.parent / "step_00000100" / "optimizer_00000_process_00000.safetensors", path
    ),
    "link instead of a file": lambda path: (
        (path / "rng_00000_process_00000.safetensors").rename(path.parent / "elsewhere"),
        (path / "rng_00000_process_00000.safetensors").symlink_to(path.parent / "elsewhere"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_used(folder, caplog, damage):
    save(CheckpointManager(folder), 100)
    newest = save(CheckpointManager(folder), 200)
    DAMAGES[damage](newest)
    manager = CheckpointManager(folder)
    with caplog.at_level("WARNING"):
        path = manager.resolve("auto")
    assert path == folder / "step_00000100"
    assert str(newest) in caplog.text
    assert_holds(manager, path, 100)
    with pytest.raises(CheckpointError, match="step_00000200"):
        manager.load(newest)
    with pytest.raises(CheckpointError, match="newest undamaged one"):
        manager.resolve(str(newest))


def test_undamaged_checkpoints_say_nothing(folder, caplog):
    save(CheckpointManager(folder), 100)
    newest = save(CheckpointManager(folder), 200)
    with caplog.at_level("WARNING"):
        assert CheckpointManager(folder).resolve("auto") == newest
    assert [record for record in caplog.records if record.name.startswith("lost")] == []


def test_damage_after_a_first_verification_is_seen(folder):
    manager = CheckpointManager(folder)
    path = save(manager, 1)
    manager.load(path)
    flip_a_bit(path / "model_00000_process_00000.safetensors")
    # A later modification time than the clock's coarsest tick.
    os.utime(path / "model_00000_process_00000.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="expected sha256"):
        manager.load(path)


def test_a_message_says_file_expected_and_found(folder):
    path = save(CheckpointManager(folder), 1)
    expected = sha256_of(path / "rng_00000_process_00000.safetensors")
    flip_a_bit(path / "rng_00000_process_00000.safetensors")
    found = sha256_of(path / "rng_00000_process_00000.safetensors")
    with pytest.raises(CheckpointError) as error:
        CheckpointManager(folder).load(path)
    for part in (str(path / "rng_00000_process_00000.safetensors"), expected, found, "checkpoint.resume=auto"):
        assert part in str(error.value)


def test_a_folder_without_manifest_does_not_exist(folder, caplog):
    manager = CheckpointManager(folder)
    (save(manager, 100) / "manifest.json").unlink()
    with caplog.at_level("WARNING"):
        assert manager.complete() == []
        assert manager.resolve("auto") is None
    assert [record for record in caplog.records if record.name.startswith("lost")] == []


def test_when_all_are_damaged_auto_does_not_silently_start_anew(folder):
    flip_a_bit(save(CheckpointManager(folder), 100) / "model_00000_process_00000.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        CheckpointManager(folder).resolve("auto")


def test_resolve_without_a_checkpoint(folder):
    manager = CheckpointManager(folder)
    assert manager.resolve("auto") is None
    assert manager.resolve("never") is None
    with pytest.raises(CheckpointError, match=r"resume=must.*no complete checkpoint"):
        manager.resolve("must")
    with pytest.raises(CheckpointError, match=r"there is no such folder; give auto, never, must or the path"):
        manager.resolve("newest")


def test_never_refuses_a_used_run_directory(folder):
    path = save(CheckpointManager(folder), 1)
    with pytest.raises(CheckpointError, match="step_00000001"):
        CheckpointManager(folder).resolve("never")
    shutil.rmtree(path)
    assert CheckpointManager(folder).resolve("never") is None
    (folder.parent / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl.*choose another run_dir"):
        CheckpointManager(folder).resolve("never")


def test_resolve_takes_a_path_even_if_it_is_not_the_newest(folder):
    old = save(CheckpointManager(folder), 1)
    newest = save(CheckpointManager(folder), 2)
    manager = CheckpointManager(folder)
    assert manager.resolve(str(old)) == old
    assert manager.resolve("must") == newest
    for parent in (folder, folder.parent):
        with pytest.raises(CheckpointError, match=r"holds checkpoints but is none; give one of them.*step_00000002"):
            manager.resolve(str(parent))


def forge(path: Path, name: str, data: bytes) -> None:
    """Adds a file and a manifest entry with the right size and sums, as an attacker would."""
    target = path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256_of_the_rest"]
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    manifest["sha256_of_the_rest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


class Payload:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.pkl", "model.bin"])
def test_a_manifest_may_not_name_other_kinds_of_files(folder, name):
    path = save(CheckpointManager(folder), 1)
    forge(path, name, pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"only .safetensors, .json files are read"):
        CheckpointManager(folder).load(path)


def test_a_pickle_with_the_right_name_and_sum_is_refused(folder):
    path = save(CheckpointManager(folder), 1)
    forge(path, "optimizer_00000_process_00000.safetensors", pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"holds a file that is no readable safetensors file"):
        CheckpointManager(folder).load(path)


@pytest.mark.parametrize(
    "name", ["../outside.json", "../../outside.json", "inner/a.json", "..\\outside.json", ".hidden.json"]
)
def test_a_manifest_may_not_point_outside_its_folder(folder, name):
    path = save(CheckpointManager(folder), 1)
    forge(path, name, b"{}")
    with pytest.raises(CheckpointError, match="only plain file names inside the folder"):
        CheckpointManager(folder).load(path)


def test_a_manifest_may_not_name_an_absolute_path(folder, tmp_path):
    path = save(CheckpointManager(folder), 1)
    forge(path, str(tmp_path / "outside.json"), b"{}")
    with pytest.raises(CheckpointError, match="only plain file names inside the folder"):
        CheckpointManager(folder).load(path)


def test_a_forged_plain_file_is_accepted(folder):
    # The control of the three tests above: what they refuse is the name or the kind, not the forging itself.
    path = save(CheckpointManager(folder), 1)
    forge(path, "note.json", b"{}")
    CheckpointManager(folder).load(path)


def test_a_future_format_is_refused(folder):
    path = save(CheckpointManager(folder), 1)
    manifest = json.loads((path / "manifest.json").read_text()) | {"format_version": 99}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format_version is 99, this program reads 2"):
        CheckpointManager(folder).load(path)


def test_other_folders_are_left_alone(folder):
    manager = CheckpointManager(folder, keep=1)
    for name in ("step_00000003.bak", "step_x", "notes", "step_3"):
        (folder / name).mkdir(parents=True)
    save(manager, 1)
    save(manager, 2)
    manager.clean()
    assert names(folder) == ["notes", "step_00000002", "step_00000003.bak", "step_3", "step_x"]
    assert manager.latest() == folder / "step_00000002"


def test_clean_removes_what_a_killed_save_left(folder):
    manager = CheckpointManager(folder)
    complete = save(manager, 1)
    half = folder / ".tmp_step_00000002"
    shutil.copytree(complete, half)
    (half / "manifest.json").unlink()
    damaged = folder / ".tmp_step_00000003"
    shutil.copytree(complete, damaged)
    flip_a_bit(damaged / "model_00000_process_00000.safetensors")
    half_deleted = folder / ".tmp_old_step_00000000"
    half_deleted.mkdir()
    manager.clean()
    assert names(folder) == ["step_00000001"]


def test_clean_finishes_a_save_killed_before_its_rename(folder):
    save(CheckpointManager(folder), 1)
    save(CheckpointManager(folder), 2).rename(folder / ".tmp_step_00000002")
    manager = CheckpointManager(folder)
    manager.clean()
    assert_holds(manager, folder / "step_00000002", 2)


def test_clean_after_a_kill_between_the_two_renames_of_a_step_saved_again(folder):
    manager = CheckpointManager(folder)
    path = save(manager, 2)
    shutil.copytree(path, folder / ".tmp_old_step_00000002")
    path.rename(folder / ".tmp_step_00000002")
    manager.clean()
    assert names(folder) == ["step_00000002"]
    assert_holds(CheckpointManager(folder), path, 2)
    # The new one did not reach the disk: the old one comes back.
    shutil.copytree(path, folder / ".tmp_step_00000002")
    flip_a_bit(folder / ".tmp_step_00000002" / "model_00000_process_00000.safetensors")
    path.rename(folder / ".tmp_old_step_00000002")
    manager.clean()
    assert names(folder) == ["step_00000002"]
    assert_holds(CheckpointManager(folder), path, 2)


def test_newer_checkpoints_are_set_aside(folder, caplog):
    manager = CheckpointManager(folder, keep=5)
    for step in (1, 2, 3):
        save(manager, step)
    manager.set_aside_after(1)
    assert names(folder) == ["step_00000001", "superseded_step_00000002", "superseded_step_00000003"]
    assert "superseded_step_00000002" in caplog.text
    assert manager.latest() == folder / "step_00000001"


def test_an_impossible_folder_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints.*could not be written"):
        save(CheckpointManager(tmp_path / "file" / "checkpoints"), 1)
