"""Does pre-training help a small classifier, and does a LOST model lose anything against a dense one?

Pre-trains llama_tiny in LOST and dense form on English text, fine-tunes both on sentence polarity (LOST also with an
adapter, and both ways from its initial weights), for several seeds, and compares accuracies on validation and test
together.

    python scripts/sentiment.py --english english --polarity sentence_polarity --out runs/sentiment

Both folders hold {train,validation}.jsonl.gz, sentence_polarity also test.jsonl.gz. Runs that are done are not done
again. Early stopping is off and the last weights are kept, so that the validation set is as unseen as the test set.
"""

import argparse
import gzip
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np

# name -> (pre-trained as, fine-tuned by)
ARMS = {
    "lost_full": ("lost", "full"),
    "lost_adapter": ("lost", "lost_adapter"),
    "dense_full": ("dense", "full"),
    "random_full": ("random", "full"),
    "random_adapter": ("random", "lost_adapter"),
}
COMPARISONS = (
    ("lost_full", "random_full"),
    ("lost_adapter", "random_adapter"),
    ("lost_adapter", "random_full"),
    ("lost_full", "dense_full"),
    ("lost_adapter", "dense_full"),
)
# Each form's best of a sweep with seed 0, a quarter as long (docs/results.md).
PRETRAIN_LEARNING_RATES = {"lost": 2e-3, "dense": 1e-3}
# Each arm's best of a sweep with seed 0 on 1000 sentences held out of the training file (docs/results.md).
LEARNING_RATES = dict.fromkeys(ARMS, 1e-3)
ADAPTER = ["method.rank=64", "method.alpha=64"]
SETS = ("validation", "test")
NUM_RESAMPLES = 10_000


def main() -> None:
    arguments = parsed()
    hits = {arm: np.stack([hits_of(run_arm(arm, seed, arguments)) for seed in range(arguments.seeds)]) for arm in ARMS}
    result = {
        "sentences": hits["lost_full"].shape[1],
        "seeds": arguments.seeds,
        "accuracy": {arm: rows.mean(axis=1).tolist() for arm, rows in hits.items()},
        "differences": {f"{first} - {second}": interval(hits[first], hits[second]) for first, second in COMPARISONS},
    }
    (arguments.out / f"result{suffix(arguments)}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--english", type=Path, required=True, help="folder of the text to pre-train on")
    parser.add_argument("--polarity", type=Path, required=True, help="folder of the labelled sentences")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of result.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-steps", type=int, default=5600, help="of 1,024 tokens")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--labels", type=int, default=0, help="train on the first so many sentences only; 0: all")
    return parser.parse_args()


def run_arm(arm: str, seed: int, arguments: argparse.Namespace) -> Path:
    """The run directory of one fine-tuning, made if it is not there."""
    form, method = ARMS[arm]
    source = pretrained(form, seed, arguments)
    run_dir = arguments.out / f"{arm}_{seed}{suffix(arguments)}"
    files = [f"data.{name}_files=[{arguments.polarity / name}.jsonl.gz]" for name in SETS]
    more = [
        f"method={method}",
        f"optimizer.learning_rate={LEARNING_RATES[arm]}",
        f"train.num_epochs={arguments.epochs}",
    ]
    more += ADAPTER if method == "lost_adapter" else []
    more += ["evaluation.keep=last", "train.seq_len=128", f"seed={seed}", "logging=none"]
    files.append(train_file(arguments))
    lost("finetune", f"source={source}", "task=classification", *files, f"run_dir={run_dir}", *more)
    return run_dir


def suffix(arguments: argparse.Namespace) -> str:
    return f"_{arguments.labels}_labels" if arguments.labels else ""


def train_file(arguments: argparse.Namespace) -> str:
    """The setting that names the labelled sentences to train on."""
    path = arguments.polarity / "train.jsonl.gz"
    if arguments.labels:
        with gzip.open(path, "rt") as file:
            lines = list(islice(file, arguments.labels))
        path = arguments.out / f"train{suffix(arguments)}.jsonl"
        path.write_text("".join(lines))
    return f"data.train_files=[{path}]"


def pretrained(form: str, seed: int, arguments: argparse.Namespace) -> Path:
    """The run directory of one pre-training; `random`: LOST's initial weights, after one step that changes nothing."""
    run_dir = arguments.out / f"pretrained_{form}_{seed}"
    files = [f"data.{key}_files=[{arguments.english / key}.jsonl.gz]" for key in ("train", "validation")]
    length, learning_rate = arguments.pretrain_steps, PRETRAIN_LEARNING_RATES.get(form)
    if learning_rate is None:
        form, length, learning_rate = "lost", 1, 0
    settings = ["experiment=quickstart", f"parameterization={form}", "data=text_files", f"train.max_steps={length}"]
    settings += [f"optimizer.learning_rate={learning_rate}", f"seed={seed}", f"run_dir={run_dir}", "logging=none"]
    settings += ["train.global_batch_size=4", "train.micro_batch_size=4"]
    settings += ["evaluation.every_steps=1400", "evaluation.max_tokens=50000"]
    lost("pretrain", *settings, *files)
    return run_dir


def lost(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "lost", *words], check=True)


def hits_of(run_dir: Path) -> np.ndarray:
    """Whether each sentence of both sets was classified right, float64 [sentences]."""
    texts = [(run_dir / "predictions" / f"{name}.jsonl").read_text().splitlines() for name in SETS]
    lines = [json.loads(line) for part in texts for line in part]
    return np.array([float(line["prediction"] == line["label"]) for line in lines])


def interval(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Difference of accuracies in points, with a 95 % interval: sentences and seeds are drawn anew, in pairs.

    Args:
        first, second: hits [seeds, sentences] of two arms on the same sentences.
    """
    differences = 100 * (first - second)
    generator = np.random.default_rng(0)
    num_seeds, num_sentences = differences.shape
    drawn = []
    for _ in range(NUM_RESAMPLES):
        seeds = generator.integers(0, num_seeds, num_seeds)
        sentences = generator.integers(0, num_sentences, num_sentences)
        drawn.append(differences[seeds][:, sentences].mean())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"points": float(differences.mean()), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
