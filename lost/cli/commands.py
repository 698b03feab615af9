"""What the commands are called and what each does, in one line."""

COMMANDS = {
    "pretrain": "train a model; the default experiment runs anywhere, offline, on a CPU",
    "prepare": "tokenise a data set once into rows on disk",
    "evaluate": "perplexity of a checkpoint or an export on a data set",
    "generate": "continue a prompt",
    "export": "write a checkpoint as a Hugging Face folder",
    "convert": "bring a trained dense model into LOST form by the SVD of its weights",
    "finetune": "go on training a model on text, on conversations or as a classifier",
    "plan": "parameters, FLOPs and memory of every size, without building a model",
    "bench": "speed and memory of a layer or a training step against dense",
}

# The key that a first bare word means: `lost bench layer` is `lost bench what=layer`.
POSITIONAL = {"bench": "what"}
