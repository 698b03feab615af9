"""What the commands are called and what each does, in one line."""

COMMANDS = {
    "pretrain": "train a model; the default experiment runs anywhere, offline, on a CPU",
    "prepare": "tokenise a data set once into rows on disk",
    "evaluate": "perplexity of models on a data set, and tasks of lm-eval",
    "generate": "continue prompts, or answer in a chat",
    "export": "write a model as a Hugging Face folder: LOST, dense, or with its own code",
    "convert": "bring a trained dense model into LOST form by the SVD of its weights",
    "finetune": "go on training a model on text, on conversations or as a classifier",
    "plan": "parameters, FLOPs and memory of every size, without building a model",
    "bench": "speed and memory of a layer, a training step or decoding against dense",
}

# The key that a first bare word means: `lost bench layer` is `lost bench what=layer`.
POSITIONAL = {"bench": "what"}
