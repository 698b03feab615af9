"""`lost generate`: continues a prompt, printing tokens as they come."""

from transformers import TextStreamer

from lost.assemble.generation import generate
from lost.assemble.load import load_model
from lost.config.runtime import RuntimeConfig
from lost.config.schema import GenerateConfig
from lost.config.section import to_dict
from lost.train.runtime import start_runtime
from lost.utils.logging import setup


def run(config: GenerateConfig) -> int:
    """Prints the prompt and its continuation to standard output."""
    runtime = start_runtime(RuntimeConfig(**to_dict(config.runtime)))
    setup(runtime.is_main)
    loaded = load_model(config.source, runtime.device, runtime.param_dtype)
    streamer = TextStreamer(loaded.tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # pyright: ignore[reportArgumentType]
    with runtime.autocast():
        generate(loaded.model, loaded.tokenizer, config, streamer if runtime.is_main else None)
    return 0
