"""`lost plan`: parameters, FLOPs and memory of every size from the config alone; no torch, nothing is allocated."""

from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lost.accounting import GIB, Memory, count_parameters, forward_flops, memory_per_device
from lost.accounting.flops import FORWARD_AND_BACKWARD
from lost.accounting.memory import Precision, Recompute
from lost.accounting.shapes import block_linears
from lost.accounting.sharding import SPLIT_PARTS, memory_over_devices
from lost.accounting.targets import lost_shapes
from lost.config.choices import choices, read_yaml
from lost.config.model import DenseConfig, LostConfig, ModelConfig, ParameterizationConfig
from lost.config.schema import PlanConfig
from lost.config.section import build
from lost.utils.errors import ConfigError

NARROWEST = 100


@dataclass(frozen=True)
class Plan:
    """What one model in one form of its linear layers costs."""

    model: ModelConfig
    form: str
    num_parameters: int
    flops_per_token: float
    memory: Memory


def run(config: PlanConfig) -> int:
    """Prints the table of all sizes and the details of the chosen one; returns the exit status."""
    precision = precision_of(config)
    forms = [config.parameterization, *([] if isinstance(config.parameterization, DenseConfig) else [DenseConfig()])]
    console = Console()
    # A file or a pipe has no width of its own: do not fold the columns.
    console.width = console.width if console.is_terminal else max(console.width, NARROWEST)
    table = size_table(config, precision)
    for model in models(config.model):
        for index, form in enumerate(forms):
            add_row(table, config, model, form, precision, is_first=index == 0)
        table.add_section()
    console.print(table)
    for form in forms:
        console.print(details(config, plan_of(config, config.model, form, precision), precision))
    return 0


def precision_of(config: PlanConfig) -> Precision:
    """fp32, bf16 or pure_bf16; auto is bf16 unless the device is named and is no GPU."""
    wanted = config.runtime.precision
    if wanted == "auto":
        return "fp32" if config.runtime.device in ("cpu", "mps") else "bf16"
    return wanted


def models(chosen: ModelConfig) -> list[ModelConfig]:
    """The packaged sizes, with the chosen model, as the config has it, in place of the one of its name or first."""
    packaged = [packaged_model(name) for name in choices("plan", "model")]
    if chosen.name in {model.name for model in packaged}:
        return [chosen if model.name == chosen.name else model for model in packaged]
    return [chosen, *packaged]


def packaged_model(name: str) -> ModelConfig:
    """The size as its YAML file says; `${.key}` stands for another key of the file."""
    values: dict[str, Any] = read_yaml(f"model/{name}")
    inside = {f"${{.{key}}}": value for key, value in values.items()}
    return build(ModelConfig, {key: inside.get(str(value), value) for key, value in values.items()})


def form_for(config: PlanConfig, model: ModelConfig, form: ParameterizationConfig) -> ParameterizationConfig:
    """The form at another size: a rank that is the papers' for the chosen size becomes the papers' for that one."""
    is_lineage = isinstance(form, LostConfig) and form.lost_rank == config.model.lineage_rank
    return replace(form, lost_rank=model.lineage_rank) if is_lineage else form


def plan_of(
    config: PlanConfig,
    model: ModelConfig,
    form: ParameterizationConfig,
    precision: Precision,
    recompute: Recompute | None = None,
) -> Plan:
    """Costs of `model` in `form` with the batch of `config`.

    Raises:
        ConfigError: the form does not fit the model.
    """
    form = form_for(config, model, form)
    return Plan(
        model=model,
        form=type(form).__dataclass_fields__["name"].default,  # pyright: ignore[reportArgumentType]
        num_parameters=count_parameters(model, form),
        flops_per_token=FORWARD_AND_BACKWARD * forward_flops(model, form, config.train.seq_len).total,
        memory=memory_per_device(
            model,
            form,
            micro_batch_size=config.train.micro_batch_size,
            seq_len=config.train.seq_len,
            precision=precision,
            recompute=recompute or config.runtime.recompute,
        ),
    )


def size_table(config: PlanConfig, precision: Precision) -> Table:
    auto = " (auto, on a GPU)" if config.runtime.precision == "auto" and precision == "bf16" else ""
    table = Table(
        title=(
            f"One device, {config.train.micro_batch_size} rows of {config.train.seq_len} tokens a forward pass,"
            f" {precision}{auto}, recompute={config.runtime.recompute}, AdamW"
        ),
        caption="Memory in GiB at the peak of a training step; peak = state + activations + working.",
    )
    table.add_column("model")
    table.add_column("form")
    for column in ("parameters\nM", "GFLOP\n/token", "state\nGiB", "activations\nGiB", "working\nGiB", "peak\nGiB"):
        table.add_column(column, justify="right")
    if config.device_memory_gib:
        table.add_column(f"fits\n{config.device_memory_gib:g} GiB", justify="right")
    return table


def add_row(
    table: Table,
    config: PlanConfig,
    model: ModelConfig,
    form: ParameterizationConfig,
    precision: Precision,
    *,
    is_first: bool,
) -> None:
    """One model in one form; a form that does not fit the model leaves its cells empty and says why."""
    is_chosen = model.name == config.model.name
    name = f"{model.name} *" if is_chosen else model.name
    try:
        plan = plan_of(config, model, form, precision)
    except ConfigError as error:
        first = error.problems[0].split(":")[0]
        table.add_row(
            name if is_first else "", "lost", "-", "-", "-", "-", "-", "-", *(["-"] if config.device_memory_gib else [])
        )
        table.caption = f"{table.caption}\n{model.name}: {first} does not fit this size."
        return
    memory = plan.memory
    cells = [
        f"{plan.num_parameters / 1e6:.2f}",
        f"{plan.flops_per_token / 1e9:.3f}",
        *(f"{value / GIB:.2f}" for value in (memory.state.total, memory.activations, memory.working, memory.total)),
    ]
    if config.device_memory_gib:
        cells.append(fits(memory.total, config.device_memory_gib))
    table.add_row(name if is_first else "", plan.form, *cells, style="bold" if is_chosen else None)


def fits(num_bytes: float, device_memory_gib: float) -> str:
    """Whether the peak is below the device's memory; above nine tenths of it, fragmentation may break the run."""
    share = num_bytes / GIB / device_memory_gib
    return "no" if share > 1 else "tight" if share > 0.9 else "yes"


def details(config: PlanConfig, plan: Plan, precision: Precision) -> Table:
    """Everything about the chosen model in one form."""
    table = Table(
        title=f"{plan.model.name}, {plan.form}", show_header=False, title_justify="left", min_width=NARROWEST - 10
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for key, value in [
        *parameter_lines(config, plan),
        *flop_lines(config, plan),
        *memory_lines(config, plan, precision),
    ]:
        table.add_row(key, value)
    return table


def parameter_lines(config: PlanConfig, plan: Plan) -> list[tuple[str, str]]:
    dense = count_parameters(plan.model, DenseConfig())
    ratio = "" if plan.form == "dense" else f", {plan.num_parameters / dense:.3f} of dense ({dense:,})"
    lines = [("parameters", f"{plan.num_parameters:,}{ratio}")]
    if isinstance(config.parameterization, LostConfig) and plan.form == "lost":
        shapes = lost_shapes(config.parameterization, block_linears(plan.model, 0)) if is_uniform(config) else []
        for shape in shapes:
            linear = shape.linear
            lines.append(
                (
                    f"  {linear.name.rpartition('.')[2]}",
                    f"{linear.in_features} -> {linear.out_features}: rank {shape.lost_rank}, {shape.num_kept} kept"
                    f" {config.parameterization.selection_axis.removesuffix('s')}s",
                )
            )
    return lines


def is_uniform(config: PlanConfig) -> bool:
    """Whether every block has the same layers, so that the first one tells all."""
    form = config.parameterization
    return isinstance(form, LostConfig) and not (form.rank_overrides or form.density_overrides or form.target_modules)


def flop_lines(config: PlanConfig, plan: Plan) -> list[tuple[str, str]]:
    form = config.parameterization if plan.form != "dense" else DenseConfig()
    flops = forward_flops(plan.model, form, config.train.seq_len)
    dense = forward_flops(plan.model, DenseConfig(), config.train.seq_len)
    parts = ", ".join(
        f"{part} {FORWARD_AND_BACKWARD * getattr(flops, part) / 1e9:.4f}" for part in ("linears", "attention", "head")
    )
    tokens = config.train.num_steps * config.train.global_batch_tokens
    return [
        (
            "GFLOP per token",
            f"{plan.flops_per_token / 1e9:.4f} forward and backward ({parts})"
            + ("" if plan.form == "dense" else f", {flops.total / dense.total:.3f} of dense"),
        ),
        (
            "whole run",
            f"{config.train.num_steps:,} steps of {config.train.global_batch_tokens:,} tokens = {tokens:,} tokens,"
            f" {plan.flops_per_token * tokens:.3g} FLOP",
        ),
    ]


def memory_lines(config: PlanConfig, plan: Plan, precision: Precision) -> list[tuple[str, str]]:
    memory, state = plan.memory, plan.memory.state
    form = config.parameterization if plan.form != "dense" else DenseConfig()
    other: Recompute = "block" if config.runtime.recompute != "block" else "none"
    with_other = plan_of(config, plan.model, form, precision, other).memory
    tokens = config.train.micro_batch_size * config.train.seq_len
    lines = [
        (
            "state",
            f"{size(state.total)}: weights {size(state.weights)}, gradients {size(state.gradients)}, AdamW"
            f" {size(state.optimizer)}, indices {size(state.buffers)}",
        ),
        ("activations", f"{size(memory.activations)}: {memory.activations / tokens / 1000:.1f} kB a token"),
        ("working", f"{size(memory.working)}, worst at: {memory.worst_moment}"),
        ("peak", f"{size(memory.total)}; with runtime.recompute={other} {size(with_other.total)}"),
    ]
    if config.device_memory_gib:
        verdict = fits(memory.total, config.device_memory_gib)
        lines.append((f"fits {config.device_memory_gib:g} GiB", verdict))
    if config.num_devices > 1:
        lines.append((f"{config.num_devices} devices", over_devices(config, plan, precision)))
    return lines


def over_devices(config: PlanConfig, plan: Plan, precision: Precision) -> str:
    """The peak of each runtime on one of the devices, and the first that fits."""
    group = config.num_devices // config.runtime.replicas
    peaks = {
        runtime: memory_over_devices(
            plan.memory, plan.model, runtime, group if runtime == "fsdp2" else config.num_devices, precision
        )
        for runtime in SPLIT_PARTS
    }
    words = ", ".join(f"{runtime} {size(peak)}" for runtime, peak in peaks.items())
    if not config.device_memory_gib:
        return f"peak of one with {words}"
    fitting = [name for name, peak in peaks.items() if fits(peak, config.device_memory_gib) == "yes"]
    advice = f"the first that fits is runtime={fitting[0]}" if fitting else "none fits: recompute, or smaller rows"
    return f"peak of one with {words}; {advice}"


def size(num_bytes: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale / 10:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"
