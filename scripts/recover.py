"""How many tokens does a dense model take to recover from its conversion to half its size, and LOST from scratch?

Converts a finished dense run at half its parameters, trains the result on the same text, and compares when its
validation perplexity is within 5 % of the dense model's with when that of a LOST run from scratch is.

    python scripts/recover.py --dense runs/sentiment/pretrained_dense_0 --lost runs/sentiment/pretrained_lost_0 \\
        --english english --out runs/recover

Both runs were trained on `english` ({train,validation}.jsonl.gz; scripts/sentiment.py makes them) and evaluated every
few steps. Writes result.json and recover.png to --out. What is done already is not done again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

TOLERANCE = 1.05
EVALUATE_EVERY = 20

# tokens seen, perplexity
Curve = list[tuple[int, float]]


def main() -> None:
    arguments = parsed()
    converted = arguments.out / "converted"
    if not converted.exists():
        lost("convert", f"source={arguments.dense}", f"to={converted}", "parameters=0.5", "perplexity=false")
    recovered = arguments.out / "recovered"
    lost("pretrain", "experiment=quickstart", f"source={converted}", f"run_dir={recovered}", *settings(arguments))
    dense = curve_of(arguments.dense)[-1][1]
    curves = {"converted": curve_of(recovered), "from scratch": curve_of(arguments.lost)}
    result = {
        "dense_perplexity": dense,
        "target": TOLERANCE * dense,
        "tokens_to_target": {name: first_within(curve, TOLERANCE * dense) for name, curve in curves.items()},
        "curves": curves,
    }
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.out / "recover.png")
    print(json.dumps(result, indent=1))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="run directory of the dense model")
    parser.add_argument("--lost", type=Path, required=True, help="run directory of LOST from scratch")
    parser.add_argument("--english", type=Path, required=True, help="folder of the text that both were trained on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="of 4,096 tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser.parse_args()


def settings(arguments: argparse.Namespace) -> list[str]:
    files = [f"data.{key}_files=[{arguments.english / key}.jsonl.gz]" for key in ("train", "validation")]
    length = [f"train.max_steps={arguments.steps}", f"optimizer.learning_rate={arguments.learning_rate}"]
    evaluation = [f"evaluation.every_steps={EVALUATE_EVERY}", "evaluation.max_tokens=50000"]
    return ["data=text_files", *files, *length, *evaluation, "logging=none"]


def lost(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "lost", *words], check=True)


def curve_of(run_dir: Path) -> Curve:
    """Validation perplexity over tokens."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tokens = {0: 0} | {line["step"]: line["tokens_seen"] for line in lines if "tokens_seen" in line}
    return [(tokens[line["step"]], line["eval/perplexity"]) for line in lines if "eval/perplexity" in line]


def first_within(curve: Curve, target: float) -> int | None:
    """Tokens at the first evaluation that is no worse; None: there is none."""
    return next((tokens for tokens, perplexity in curve if perplexity <= target), None)


def draw(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, curve in result["curves"].items():
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=name)
    axes.axhline(result["target"], color="grey", linestyle="--", label="dense + 5 %")
    axes.set(xlabel="tokens", ylabel="validation perplexity", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
