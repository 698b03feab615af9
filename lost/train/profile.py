"""A torch profiler trace of a few steps, to open in chrome://tracing or Perfetto."""

from pathlib import Path

from torch.profiler import profile, schedule

STEPS_BEFORE = 3


class StepProfiler:
    """Traces `num_steps` steps after the first three into `folder`; does nothing for 0.

    Args:
        folder: gets trace_process_<i>.json.
    """

    def __init__(self, num_steps: int, folder: Path, process_index: int = 0):
        self._path = folder / f"trace_process_{process_index}.json"
        self._profile = None
        if num_steps:
            self._profile = profile(
                schedule=schedule(wait=STEPS_BEFORE - 1, warmup=1, active=num_steps, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> "StepProfiler":
        if self._profile:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile:
            self._profile.__exit__(*error)  # pyright: ignore[reportArgumentType]

    def step(self) -> None:
        """To be called after every optimizer step."""
        if self._profile:
            self._profile.step()

    def _write(self, finished: profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._path))
