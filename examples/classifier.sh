#!/usr/bin/env bash
# From nothing to a fine-tuned classifier on a CPU, no network (3 min 52 s on two cores of a Xeon, with an empty cache):
# a small LOST LLaMA is pre-trained on the source of Python's standard library (the quickstart), then learns to tell from
# which of six packages a function comes.
#
#     source .venv/bin/activate
#     bash examples/classifier.sh [key=value of `lost pretrain` ...]
#
# FOLDER (runs/classifier) takes everything; FINETUNE holds more settings of `lost finetune`. Run again, it goes on.
set -euo pipefail

folder="${FOLDER:-runs/classifier}"
read -ra finetune <<<"${FINETUNE:-}"

echo "== 1. pre-training"
lost pretrain run_dir="$folder/pretrained" "$@"

echo "== 2. labelled functions"
python "$(dirname "${BASH_SOURCE[0]}")/functions_by_package.py" "$folder/data"

echo "== 3. fine-tuning"
lost finetune source="$folder/pretrained" task=classification run_dir="$folder/classifier" train.seq_len=128 \
  data.train_files="[$folder/data/train.jsonl]" data.validation_files="[$folder/data/validation.jsonl]" \
  data.test_files="[$folder/data/test.jsonl]" optimizer.learning_rate=3e-4 train.num_epochs=4 ${finetune[@]+"${finetune[@]}"}

echo "== 4. what it says"
head -n 3 "$folder/classifier/predictions/test.jsonl"
python - "$folder" <<'END'
import json, sys
print(json.dumps(json.load(open(f"{sys.argv[1]}/classifier/result.json")), indent=1))
END
