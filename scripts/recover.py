"""How many tokens does a dense model take to recover from its conversion to LOST, and LOST from scratch to be as good?

Converts a finished dense run, trains the result on the same text, trains LOST from scratch, and compares when the
validation perplexities are within 5 % of the dense model's. Twice: at llama_tiny's rank, and at half of all parameters.

    python scripts/recover.py --dense runs/sentiment/pretrained_dense_0 --english english --out runs/recover

`english` holds {train,validation}.jsonl.gz, on which the dense run was trained (scripts/sentiment.py makes it). Writes
result.json and recover.png to --out. What is done already is not done again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

TOLERANCE = 1.05
# name -> (settings of the conversion, steps of 1,024 tokens, rank of LOST from scratch with as many parameters)
SIZES = {
    "rank_64": (["lost_rank=64"], 2000, 64),
    "half": (["parameters=0.5"], 4000, 26),
}
CALIBRATION = "calibration_tokens=100000"
# Of 0.001 and 0.002 the better one for each, by runs that were tried (docs/results.md).
LEARNING_RATES = {"converted": 1e-3, "from scratch": 2e-3}

# Perplexities on the axis of the picture.
TICKS = (50, 60, 80, 100, 150, 200, 300)

# tokens seen, perplexity
Curve = list[tuple[int, float]]


def main() -> None:
    arguments = parsed()
    target = TOLERANCE * curve_of(arguments.dense)[-1][1]
    curves = {}
    for name, (conversion, steps, rank) in SIZES.items():
        folder = arguments.out / name
        if not (folder / "converted").exists():
            to = f"to={folder / 'converted'}"
            lost("convert", f"source={arguments.dense}", to, "perplexity=false", CALIBRATION, *conversion)
        converted = [f"source={folder / 'converted'}", f"train.max_steps={steps // arguments.shorter}"]
        curves[f"{name}, converted"] = trained(folder, "converted", 100, converted, arguments.english)
        fresh = [f"parameterization.lost_rank={rank}", f"train.max_steps={5600 // arguments.shorter}"]
        curves[f"{name}, from scratch"] = trained(folder, "from scratch", 200, fresh, arguments.english)
    tokens = {name: first_within(curve, target) for name, curve in curves.items()}
    result = {"target": target, "tokens_to_target": tokens, "curves": curves}
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.out / "recover.png")
    print(json.dumps(result, indent=1))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="run directory of the dense model")
    parser.add_argument("--english", type=Path, required=True, help="folder of the text that it was trained on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shorter", type=int, default=1, help="divides the steps of every run, for a first look")
    return parser.parse_args()


def trained(folder: Path, kind: str, evaluate_every: int, more: list[str], english: Path) -> Curve:
    """The curve of one run, made if it is not there."""
    run_dir = folder / f"trained_{kind.replace(' ', '_')}"
    files = [f"data.{key}_files=[{english / key}.jsonl.gz]" for key in ("train", "validation")]
    settings = ["experiment=quickstart", "data=text_files", *files, f"run_dir={run_dir}", "logging=none"]
    settings += [f"optimizer.learning_rate={LEARNING_RATES[kind]}"]
    settings += ["train.global_batch_size=4", "train.micro_batch_size=4"]
    settings += [f"evaluation.every_steps={evaluate_every}", "evaluation.max_tokens=50000"]
    lost("pretrain", *settings, *more)
    return curve_of(run_dir)


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
    for number, (name, curve) in enumerate(result["curves"].items()):
        tokens, perplexities = zip(*curve, strict=True)
        millions = [count / 1e6 for count in tokens]
        axes.plot(millions, perplexities, color=f"C{number // 2}", linestyle=("-", ":")[number % 2], label=name)
    axes.axhline(result["target"], color="grey", linestyle="--", label="dense + 5 %")
    axes.set(xlabel="tokens, millions", ylabel="validation perplexity", yscale="log", ylim=(45, 300))
    axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
