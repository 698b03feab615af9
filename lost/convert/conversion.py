"""The conversion of a dense checkpoint, from what is asked for to a folder that loads."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lost.assemble.load import load_model, load_tokenizer
from lost.assemble.locate import Place, locate
from lost.config.convert import ConvertConfig
from lost.convert.dense import DenseCheckpoint
from lost.convert.folder import ShardWriter, copy_beside
from lost.convert.layer import LayerError, approximate, squared_singular_values
from lost.convert.measure import calibration_scales, perplexities
from lost.convert.plan import Plan, Targets, converted_model, plan_of, targets_of
from lost.convert.ranks import LayerSize
from lost.convert.report import write_report
from lost.model.workers import run_side_by_side
from lost.train.runtime import Runtime
from lost.utils.errors import LostError
from lost.utils.files import appearing
from lost.utils.logging import get_logger
from lost.utils.memory import peak_memory_gib
from lost.utils.progress import progress_bar

log = get_logger(__name__)

DTYPES = {"source": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Perplexities = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        place: of the dense model.
        model_type: of the dense model.
        plan: layers, ranks and the converted model's parameterization.
        errors: of each converted layer by name.
        before, after: perplexity of each validation set; empty if not measured.
        seconds: of the whole conversion.
        peak_memory_gib: of this process so far.
    """

    place: Place
    model_type: str
    plan: Plan
    errors: Mapping[str, LayerError]
    before: Perplexities
    after: Perplexities
    seconds: float
    peak_memory_gib: float


class Measured(NamedTuple):
    """What the dense model says on text."""

    perplexities: Perplexities
    scales: dict[str, Tensor]


def convert(config: ConvertConfig, runtime: Runtime) -> Conversion:
    """Writes config.to, the LOST form of config.source; it appears in one rename, whole.

    Holds at most one model (for perplexity and calibration), or the tensors of about two output files and one layer
    for each thread.

    Raises:
        LostError: the source has no LOST form or is not complete, a rank saves nothing, text cannot be read, or the
            folder cannot be written. Nothing is left behind.
    """
    started = time.monotonic()
    checkpoint = DenseCheckpoint(locate(config.source))
    load_tokenizer(checkpoint.place)
    targets = targets_of(checkpoint, config)
    measured = measure_dense(config, targets, runtime)
    squares = spectra_of(checkpoint, targets, measured.scales, runtime)
    plan = plan_of(targets, config, squares)
    with appearing(Path(config.to).expanduser()) as folder:
        errors = write_model(folder, checkpoint, plan, measured.scales, config, runtime)
        after = measure_converted(folder, config, runtime)
        conversion = Conversion(
            place=checkpoint.place,
            model_type=checkpoint.config.model_type,
            plan=plan,
            errors=errors,
            before=measured.perplexities,
            after=after,
            seconds=time.monotonic() - started,
            peak_memory_gib=peak_memory_gib(),
        )
        write_report(folder, conversion, config)
    return conversion


def measure_dense(config: ConvertConfig, targets: Targets, runtime: Runtime) -> Measured:
    """Perplexity and calibration of the dense model, which is gone afterwards."""
    if not (config.perplexity or config.calibration_tokens):
        return Measured({}, {})
    loaded = load_model(config.source, runtime.device, runtime.param_dtype)
    found = perplexities(loaded, config, runtime) if config.perplexity else {}
    names = [layer.name for layer in targets.layers]
    scales = calibration_scales(loaded, names, config, runtime) if config.calibration_tokens else {}
    del loaded
    gc.collect()
    return Measured(found, scales)


def measure_converted(folder: Path, config: ConvertConfig, runtime: Runtime) -> Perplexities:
    """Perplexity of what was written, read back from the disk."""
    if not config.perplexity:
        return {}
    loaded = load_model(str(folder), runtime.device, runtime.param_dtype)
    return perplexities(loaded, config, runtime)


def spectra_of(
    checkpoint: DenseCheckpoint, targets: Targets, scales: Mapping[str, Tensor], runtime: Runtime
) -> dict[str, Tensor]:
    """Squared singular values of every layer whose rank is not given."""
    device = linear_algebra_device(runtime)
    names = [layer.name for layer in targets.layers if layer.name not in targets.ranks]

    def job(name: str) -> Tensor:
        weight = checkpoint.read(f"{name}.weight").to(device)
        return with_name(name, lambda: squared_singular_values(weight, scale_on(device, scales.get(name))))

    found = {}
    with progress_bar("spectra", "layers") as progress:
        for name, squares in zip(names, results_of([partial(job, name) for name in names], device), strict=True):
            found[name] = squares
            progress(len(found), len(names))
    return found


def write_model(
    folder: Path,
    checkpoint: DenseCheckpoint,
    plan: Plan,
    scales: Mapping[str, Tensor],
    config: ConvertConfig,
    runtime: Runtime,
) -> dict[str, LayerError]:
    """Config, weights, and what lies beside them; the error of every converted layer."""
    dtype = DTYPES[config.dtype]
    empty = converted_model(checkpoint, plan.lost, dtype)
    copy_beside(checkpoint.place.folder, folder)
    empty.config.save_pretrained(folder)
    writer = ShardWriter(folder, int(config.max_shard_gib * 2**30))
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    errors: dict[str, LayerError] = {}
    converted = converted_layers(checkpoint, plan, scales, dtype, runtime)
    with progress_bar("converting", "layers") as progress:
        for name in checkpoint.stored:
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in plan.ranks:
                tensors, errors[layer] = next(converted)
                progress(len(errors), len(plan.layers))
            else:
                tensors = {name: in_dtype(name, checkpoint.read(name), dtype)}
            for own_name, tensor in tensors.items():
                assert expected[own_name] == tuple(tensor.shape), (own_name, expected[own_name], tensor.shape)
                writer.add(own_name, tensor)
    writer.finish()
    return errors


def converted_layers(
    checkpoint: DenseCheckpoint, plan: Plan, scales: Mapping[str, Tensor], dtype: torch.dtype | None, runtime: Runtime
) -> Iterator[tuple[dict[str, Tensor], LayerError]]:
    """Tensors by their names in the converted model, and the error, of every layer in the model's order."""
    device = linear_algebra_device(runtime)

    def job(layer: LayerSize) -> tuple[dict[str, Tensor], LayerError]:
        weight = checkpoint.read(f"{layer.name}.weight").to(device)
        scale = scale_on(device, scales.get(layer.name))
        rank = plan.ranks[layer.name]
        tensors, error = with_name(
            layer.name, lambda: approximate(weight, plan.lost, rank, layer.num_kept, scale, dtype or weight.dtype)
        )
        return {f"{layer.name}.{own}": tensor.cpu() for own, tensor in tensors.items()}, error

    return results_of([partial(job, layer) for layer in plan.layers], device)


def results_of(jobs: list[Callable[[], Any]], device: torch.device) -> Iterator[Any]:
    """The results in their order; on a CPU by several threads, each with one job, on a GPU one after the other."""
    return run_side_by_side(jobs) if device.type == "cpu" else (job() for job in jobs)


def linear_algebra_device(runtime: Runtime) -> torch.device:
    """Where float64 is known: not on Apple's GPUs."""
    return torch.device(runtime.device) if torch.device(runtime.device).type == "cuda" else torch.device("cpu")


def scale_on(device: torch.device, scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.to(device)


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor that is not converted, in `dtype`; None: as it is stored.

    Raises:
        LostError: values that are not finite, or that `dtype` cannot hold.
    """
    if not tensor.is_floating_point():
        return tensor
    if not torch.isfinite(tensor).all():
        raise LostError(f"{name}: it holds values that are not finite: the checkpoint is damaged")
    cast = tensor.to(dtype or tensor.dtype)
    if not torch.isfinite(cast).all():
        raise LostError(
            f"{name} ({words_of(tensor.dtype)}, up to {float(tensor.abs().max()):g}) is beyond what"
            f" {words_of(cast.dtype)} holds: use dtype=fp32 or bf16"
        )
    return cast


def words_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_name(name: str, compute: Callable[[], Any]) -> Any:
    """The result of `compute`; what goes wrong says in which layer.

    Raises:
        LostError: from `compute`, or linear algebra that does not converge.
    """
    try:
        return compute()
    except LostError as error:
        raise LostError(f"{name}.weight: {error}") from error
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise LostError(f"{name}.weight cannot be factorised: {error}") from error
