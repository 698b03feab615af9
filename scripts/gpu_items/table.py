"""The end of a run: a short table of its rows, and what they say about the default kernels."""

from typing import Any

from gpu_items.plan import OPERATORS, PLAIN

# Operators are the default if they are so much faster than the compiled definition, or need so much less memory at
# about equal speed.
FASTER, LESS_MEMORY, EQUAL_SPEED = 1.05, 0.8, 0.98
DECISIVE_CASE = "llama_1b 16x256"
COLUMNS = ("ms", "between_products_ms", "tokens_per_second", "over_dense", "of_limit", "peak_gib", "memory_over_dense")
COLUMNS += ("tflops", "error")


def verdict(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """operators, plain or not measured, with the two ratios that decide."""
    rows = {line["what"]: line for line in lines if "tokens_per_second" in line and line["stage"] == "S4"}
    ours, plain = (rows.get(f"{DECISIVE_CASE} {arm}") for arm in (OPERATORS, PLAIN))
    if not ours or not plain or "peak_gib" not in ours:
        return {"default": "not measured"}
    speed = ours["tokens_per_second"] / plain["tokens_per_second"]
    memory = ours["peak_gib"] / plain["peak_gib"]
    is_better = speed >= FASTER or (memory <= LESS_MEMORY and speed >= EQUAL_SPEED)
    return {
        "default": "operators" if is_better else "plain",
        "speed_over_compiled_plain": round(speed, 3),
        "memory_over_compiled_plain": round(memory, 3),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The rows but S1's and those of tiles; items that did not pass; how many were left out."""
    rows = [line for line in lines if "what" in line and line["stage"] != "S1" and line["item"] != "tiles"]
    rows = with_ratios([row for row in rows if any(key in row for key in COLUMNS)])
    width = max([len(row["what"]) for row in rows], default=10)
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    text = [f"{'':2}  {'':{width}}" + "".join(f" {name:>12}" for name in columns)]
    for row in rows:
        cells = "".join(f" {row.get(name, '')!s:>{max(12, len(name))}}" for name in columns)
        mark = "  WRONG" if row.get("status") == "failed" else ""
        text.append(f"{row['stage']}  {row['what']:{width}}{cells}{mark}")
    for line in lines:
        if "what" not in line and line["status"] in ("failed", "cut off"):
            text.append(f"{line['stage']}  {line['item']}: {line['status']}  {line.get('error', '')[:100]}")
    left_out = [line["item"] for line in lines if line.get("status") == "left out"]
    if left_out:
        text.append(f"left out: {len(left_out)}, from {left_out[0]} on")
    return "\n".join(text)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps with speed and peak memory over those of the compiled dense one of the same model and batch."""
    dense = {case(row): row for row in rows if row["stage"] == "S4" and " dense " in row["what"]}
    found = []
    for row in rows:
        base = dense.get(case(row)) if row["stage"] == "S4" else None
        ratios = {"over_dense": round(row["tokens_per_second"] / base["tokens_per_second"], 3)} if base else {}
        if base and "peak_gib" in base:
            ratios["memory_over_dense"] = round(row["peak_gib"] / base["peak_gib"], 3)
        found.append(row | ratios)
    return found


def case(row: dict[str, Any]) -> str:
    """Model and batch."""
    return " ".join(row["what"].split()[:2])
