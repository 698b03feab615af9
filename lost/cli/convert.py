"""`lost convert`: a dense model in LOST form, by the SVD of its trained weights."""

from pathlib import Path

from rich.console import Console

from lost.cli.export import refuse_used_folder
from lost.config.convert import ConvertConfig
from lost.config.runtime import RuntimeConfig
from lost.config.section import to_dict
from lost.config.validate import num_processes
from lost.convert import convert
from lost.convert.report import summary_lines, table_of
from lost.export.card import CONVERSION_PICTURE, CONVERSION_REPORT
from lost.train.runtime import start_runtime
from lost.utils.errors import ConfigError
from lost.utils.logging import setup


def run(config: ConvertConfig) -> int:
    """Converts, writes the folder, and prints what was kept."""
    if num_processes() > 1:
        raise ConfigError("lost convert works in one process, with a thread a core: start it without torchrun")
    setup()
    target = Path(config.to).expanduser()
    refuse_used_folder(target)
    runtime = start_runtime(RuntimeConfig(**to_dict(config.runtime)))
    conversion = convert(config, runtime)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table_of(conversion, config))
    for line in summary_lines(conversion, config):
        console.print(line, markup=False)
    console.print(
        f"{target}: every layer in {CONVERSION_REPORT}, a picture in {CONVERSION_PICTURE}\n"
        f"Load it with: import lost.model; from transformers import AutoModelForCausalLM;"
        f" AutoModelForCausalLM.from_pretrained({str(target)!r})",
        markup=False,
    )
    return 0
