"""Checkpoints of one run: when a folder counts, which one is the newest, which ones are kept."""

import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from lost.checkpoint.io import read_json, replace, write_json
from lost.checkpoint.manifest import FileEntry, Manifest, file_entry, read_manifest, verify, write_manifest
from lost.checkpoint.shards import Groups, Tensors, copied, read_whole, stored_tensors, tied_names, write_shards
from lost.utils.errors import CheckpointError
from lost.utils.files import flush
from lost.utils.logging import get_logger

logger = get_logger(__name__)

FACTS_NAME = "state.json"
Result = TypeVar("Result")
_STEP_NAME = re.compile(r"step_(\d{8,})")
# Being written, and on the way to be deleted; followed by the step.
_SAVING_PREFIX = ".tmp_step_"
_OLD_PREFIX = ".tmp_old_step_"
_SET_ASIDE_PREFIX = "superseded_"


class CheckpointManager:
    """Saves, finds, verifies and prunes the checkpoints in one folder, which every process of a run sees.

    A checkpoint is written to `.tmp_step_<step>`, every file flushed to the disk, the manifest last; the folder is then
    renamed to `step_<step>`. A kill at any moment leaves the older checkpoints as they were.

    Args:
        folder: usually <run_dir>/checkpoints; made when first needed.
        keep: newest complete checkpoints kept, at least 1.
        processes: gloo group of the processes that save together, used for nothing else; None: this process alone.
    """

    def __init__(self, folder: str | Path, keep: int = 2, processes: dist.ProcessGroup | None = None):
        assert keep >= 1, keep
        self.folder = Path(folder)
        self.keep = keep
        self._processes = processes
        self._is_main = processes is None or dist.get_rank(processes) == 0
        # Checkpoints that this process has verified, with what their files looked like: sums are not computed twice.
        self._verified: dict[Path, tuple] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, step: int, groups: Groups, facts: dict[str, Any], also_keep: int | None = None) -> Path:
        """Writes a checkpoint, then deletes those beyond `keep`; called on every process of the group.

        Args:
            step: optimizer steps done.
            groups: group ("model", "optimizer", "rng") -> tensors by name, whole or sharded; what process 0 alone has
                is written by it.
            facts: everything else, as JSON values (text keys); those of process 0 are written.
            also_keep: step of an older checkpoint that is not deleted.
        Returns:
            The checkpoint's folder.
        Raises:
            CheckpointError: on every process, where one could not write; older checkpoints are untouched and nothing
                half-written counts.
        """
        self.finish()
        return self._save(step, groups, facts, also_keep)

    def save_in_background(
        self, step: int, groups: Groups, facts: dict[str, Any], also_keep: int | None = None
    ) -> None:
        """`save`, of which the caller waits for a copy in memory only (and for the save before it, if still running).

        Raises:
            CheckpointError: the save before it failed; `finish` raises what went wrong in the last one.
        """
        self.finish()
        self._pending = self._background.submit(self._save, step, copied(groups), facts, also_keep)

    def finish(self) -> None:
        """Waits for a save in the background; raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self) -> None:
        """Waits for a save in the background whatever becomes of it: call before leaving because of another failure."""
        try:
            self.finish()
        except (CheckpointError, OSError, RuntimeError) as error:
            logger.warning("the checkpoint being written was given up as well: %s", error)

    def load(self, path: str | Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Tensors (whole, on the CPU, by group and name) and facts of a checkpoint, verified first.

        Raises:
            CheckpointError: names the file that is missing, damaged or not allowed, and what to do.
        """
        path = Path(path)
        manifest = self._verify_or_advise(path)
        groups = sorted({name.split("/", 1)[0] for name in stored_tensors(path)})
        tensors: dict[str, Tensors] = {
            group: read_whole(path, group, manifest.aliases.get(group, {})) for group in groups
        }
        return tensors, read_json(path / FACTS_NAME)

    def latest(self, before_step: int | None = None) -> Path | None:
        """The newest checkpoint (of a step before `before_step`) that is complete and undamaged; damaged ones above it
        are named in a warning."""
        for path in reversed(self.complete()):
            if before_step is not None and step_of(path) >= before_step:
                continue
            try:
                self._verify(path)
            except CheckpointError as error:
                logger.warning("%s. Skipping this checkpoint, trying the one before it", error)
                continue
            return path
        return None

    def complete(self) -> list[Path]:
        """Folders named after a step that have a manifest, oldest first; their contents are not verified."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _STEP_NAME.fullmatch(path.name)]
        return sorted((path for path in found if (path / "manifest.json").is_file()), key=step_of)

    def resolve(self, resume: str) -> Path | None:
        """The checkpoint to go on from; None for a run that starts anew.

        Args:
            resume: "auto": the newest complete one, if any; "never": start anew in an unused run directory;
                "must": the newest complete one; else the path of a checkpoint.
        Raises:
            CheckpointError: `never` and the run directory holds a run; `must` and there is none; a path that is no
                checkpoint or a damaged one; checkpoints exist but every one is damaged.
        """
        if resume == "never":
            self._check_unused()
            return None
        if resume not in ("auto", "must"):
            path = Path(resume)
            self._check_is_checkpoint(path)
            self._verify_or_advise(path)
            return path
        path = self.latest()
        if path is None and self.complete():
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged (see the warnings above): choose another run_dir,"
                f" or delete {self.folder} to start anew"
            )
        if path is None and resume == "must":
            raise CheckpointError(
                f"checkpoint.resume=must, but {self.folder} holds no complete checkpoint: check run_dir,"
                " or use checkpoint.resume=auto to start anew"
            )
        return path

    def clean(self) -> None:
        """Call once at the start of a run, with the run's lock held: deals with what a killed save left behind.

        A temporary folder that is complete (killed just before its rename) takes its place; all others are deleted.
        """
        for prefix in (_SAVING_PREFIX, _OLD_PREFIX):
            for leftover in sorted(self.folder.glob(f"{prefix}*")):
                target = self.folder / f"step_{leftover.name.removeprefix(prefix)}"
                if _STEP_NAME.fullmatch(target.name) and not target.exists() and _is_undamaged(leftover):
                    replace(leftover, target)
                _remove(leftover)

    def set_aside_after(self, step: int) -> None:
        """Call after resuming at `step`: newer checkpoints (damaged, or of a future that is run again) are renamed to
        superseded_*, so that a later resume=auto does not jump to them."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            if _STEP_NAME.fullmatch(path.name) and step_of(path) > step:
                aside = path.with_name(_SET_ASIDE_PREFIX + path.name)
                logger.warning("%s is newer than step %d, where the run goes on: renamed to %s", path, step, aside.name)
                _remove(aside)
                replace(path, aside)

    def _save(self, step: int, groups: Groups, facts: dict[str, Any], also_keep: int | None) -> Path:
        target = self.folder / step_name(step)
        temporary = self.folder / f"{_SAVING_PREFIX}{step:08d}"
        aliases = {group: tied_names(tensors) for group, tensors in groups.items()}
        stored = {
            group: {name: value for name, value in tensors.items() if name not in aliases[group]}
            for group, tensors in groups.items()
        }

        def begin() -> None:
            if self._is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                _remove(temporary)
                temporary.mkdir()

        def write() -> dict[str, FileEntry]:
            return {path.name: file_entry(path) for path in write_shards(temporary, stored, self._processes)}

        def commit() -> None:
            if self._is_main:
                write_json(temporary / FACTS_NAME, facts)
                known = {name: entry for part in written for name, entry in part.items()}
                write_manifest(temporary, step, {group: names for group, names in aliases.items() if names}, known)
                flush(temporary)
                self._commit(temporary, target)

        try:
            self._everywhere(begin, target)
            written = self._everywhere(write, target)
            self._everywhere(commit, target)
        finally:
            if self._is_main:
                _remove(temporary)
        if self._is_main:
            self._prune(newest=target, also_keep=also_keep)
        return target

    def _everywhere(self, action: Callable[[], Result], target: Path) -> list[Result]:
        """What `action` returns on each process; a failure of one is an error on all, so that none waits for it."""
        problem, result = "", None
        try:
            result = action()
        except (OSError, CheckpointError) as error:
            problem = f"checkpoint {target} could not be written: {error}"
        if self._processes is None:
            answers = [(problem, result)]
        else:
            answers: list[Any] = [None] * dist.get_world_size(self._processes)
            dist.all_gather_object(answers, (problem, result), group=self._processes)
        problems = sorted({problem for problem, _ in answers if problem})
        if problems:
            raise CheckpointError("; ".join(problems))
        return [result for _, result in answers]

    def _commit(self, temporary: Path, target: Path) -> None:
        """Gives a complete folder its name. One that has it already moves away first: a kill between the two renames
        leaves the complete temporary folder, which `clean` puts in place."""
        old = self._move_away(target)
        replace(temporary, target)
        _remove(old)

    def _prune(self, newest: Path, also_keep: int | None) -> None:
        """Deletes all but the newest `keep` checkpoints, counting only those whose files have the right sizes, and the
        one of step `also_keep`."""
        kept = 0
        for path in reversed(self.complete()):
            if step_of(path) > step_of(newest):
                continue
            if step_of(path) == also_keep and kept >= self.keep:
                continue
            kept += path == newest or _has_right_sizes(path)
            if kept > self.keep:
                # A kill in the middle of the deletion must not leave a checkpoint with files missing.
                _remove(self._move_away(path))

    def _move_away(self, path: Path) -> Path:
        """Renames a checkpoint, if it is there, to a name that does not count; returns that name."""
        old = self.folder / f"{_OLD_PREFIX}{path.name.removeprefix('step_')}"
        _remove(old)
        if path.exists():
            replace(path, old)
        return old

    def _verify(self, path: Path) -> Manifest:
        manifest = read_manifest(path)
        look = _look_of(path, manifest)
        if look is None or self._verified.get(path) != look:
            manifest = verify(path)
            self._verified[path] = _look_of(path, manifest) or ()
        return manifest

    def _verify_or_advise(self, path: Path) -> Manifest:
        try:
            return self._verify(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. Use another checkpoint; checkpoint.resume=auto takes the newest undamaged one of run_dir"
            ) from error

    def _check_unused(self) -> None:
        metrics = self.folder.parent / "metrics.jsonl"
        used = [str(path) for path in self.complete()]
        if metrics.is_file() and metrics.stat().st_size:
            used.append(str(metrics))
        if used:
            raise CheckpointError(
                f"checkpoint.resume=never, but the run directory {self.folder.parent} already holds {', '.join(used)}:"
                " choose another run_dir, or checkpoint.resume=auto to go on with it"
            )

    def _check_is_checkpoint(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(
                f"checkpoint.resume={path}: there is no such folder; give auto, never, must or the path of a"
                f" checkpoint such as {self.folder / step_name(100)}"
            )
        inside = CheckpointManager(path / "checkpoints").complete() or CheckpointManager(path).complete()
        if inside:
            raise CheckpointError(
                f"checkpoint.resume={path}: this folder holds checkpoints but is none; give one of them,"
                f" for instance {inside[-1]}"
            )


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Step in a checkpoint folder's name; ValueError for another name."""
    match = _STEP_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named step_<number>")
    return int(match.group(1))


def _look_of(path: Path, manifest: Manifest) -> tuple | None:
    """Size and modification time of every file, or None if one is missing."""
    try:
        stats = [(path / name).stat() for name in (*manifest.files, "manifest.json")]
    except OSError:
        return None
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def _has_right_sizes(path: Path) -> bool:
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return False
    return all(
        (path / name).is_file() and (path / name).stat().st_size == entry.size_bytes
        for name, entry in manifest.files.items()
    )


def _is_undamaged(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path, ignore_errors=True)
