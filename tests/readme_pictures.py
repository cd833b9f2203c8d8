"""README's pictures and its tables of what was measured, from data/results alone.

python tests/readme_pictures.py     writes both
"""

import io
import json
import re
from importlib import import_module
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastkit.lab.plots.shares import shares
from fastkit.lab.plots.steps import ours_and_peers
from fastkit.lab.results import RESULTS, recorded
from fastkit.train.bench_train import TrainBenchConfig

README = Path(__file__).parent.parent / "README.md"
PICTURES = README.parent / "data" / "pictures"
BLOCK = re.compile(r"(<!-- measured: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLOURS = 64
# operations that the picture leaves out
ONLY_IN_TABLE = re.compile(r"geglu|(swiglu|rope) (for|back)ward|.*transposed|nf4 matvec\n(4|16)|linear_.*\n.*×128256")
NAMES = {"mistral-7b": "Mistral-7B", "llama2-7b": "Llama-2-7B", "llama2-13b": "Llama-2-13B", "qwen2.5-7b": "Qwen2.5-7B"}
PEERS = {  # (in a picture, in a table)
    "hf": ("transformers + peft", "transformers + peft + bitsandbytes, activations recomputed"),
    "hf-keep": ("transformers + peft, nothing recomputed", "transformers + peft + bitsandbytes, nothing recomputed"),
    "liger": ("Liger", "those three with Liger's kernels, activations recomputed"),
    "liger-keep": ("Liger, nothing recomputed", "those three with Liger's kernels, nothing recomputed"),
    "unsloth": ("Unsloth, its default", "Unsloth, its default: activations recomputed and offloaded"),
    "unsloth-keep": ("Unsloth, nothing recomputed", "Unsloth, nothing recomputed"),
}


# --- what the records hold


def steps(result: dict) -> list[dict]:
    """The contenders of `fastkit bench train` in one process: who ran, slowest first, then who ran out of memory."""
    rows = [row for row in result["rows"] if row.get("what") == "step" and row["processes"] == 1]
    ran = sorted((row for row in rows if row["failed"] is None), key=lambda row: row["tokens_per_second"])
    return ran + [row for row in rows if (row["failed"] or "").startswith("out of memory")]


def task(result: dict) -> str:
    """What each contender of `fastkit bench train` did, by its command."""

    def setting(name):
        found = re.search(rf"--{name}[ =](\S+)", result["command"])
        return found[1] if found else getattr(TrainBenchConfig(), name)

    shape, tokens = setting("shape"), f"{setting('batch')}×{setting('seq')} tokens"
    return (
        f"{NAMES.get(shape, shape)}'s shape, NF4, LoRA rank {setting('rank')} on all projections, AdamW8bit, {tokens}"
    )


def ladders(result: dict) -> dict[str, list[dict]]:
    """{"copy ...": first rung, last rung and the others' ways} of each ladder, at its largest size."""
    found = {}
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        if op in ("copy", "transpose", "softmax", "matmul"):
            rungs = [rung.name for rung in import_module(f"fastkit.kernels.ladders.{op}").RUNGS]
            rows = {row["who"]: row for row in result["rows"] if row["op"] == op}  # of the last size
            timed = [name for name in rungs if name in rows]
            ends = {"first rung, ": timed[0], "last rung, ": timed[-1]}
            mine = [rows[name] | {"who": which + name, "ours": True} for which, name in ends.items()]
            found[_title(mine[0])] = mine + [row | {"ours": False} for who, row in rows.items() if who not in rungs]
    return found


def operations(result: dict) -> dict[str, list[dict]]:
    """{"rms_norm forward ...": ours, and others from the fastest on} of each operation of a step."""
    found: dict[str, list[dict]] = {}
    for row in sorted(result["rows"], key=lambda row: row["median_ms"]):
        found.setdefault(_title(row), []).append(row | {"ours": row["who"].startswith("fastkit")})
    titles = dict.fromkeys(map(_title, result["rows"]))  # in their order
    found = {title: sorted(found[title], key=lambda row: not row["ours"]) for title in titles}
    return {title: rows for title, rows in found.items() if rows[0]["ours"]}


def _title(row: dict) -> str:
    """The operation, and below it its size and dtype."""
    size = "256 MiB" if (row["op"], row["size"]) == ("copy", str(2**26)) else row["size"]
    size = re.sub(r"(?<=\d)( ?)x( ?)(?=\d)", r"\1×\2", size)
    return f"{row['op']}\n{size}, {row['dtype'].replace('bfloat', 'bf').replace('float', 'fp')}"


# --- pictures


def speed_memory():
    """Contenders of one run and, where they are recorded, what budgets bought on the same card."""
    results = [recorded("train_h200")]
    if (RESULTS / "budgets_h200.json").is_file():
        results.append(recorded("budgets_h200"))
    if len({each["card"]["name"] for each in results}) > 1:
        raise ValueError("budgets were measured on another card than the contenders: one picture is of one card")
    ran = [row for each in results for row in steps(each) if row["failed"] is None]
    prefix = "fastkit, " if sum(bool(row["plan"]) for row in ran) <= 6 else ""  # the colour says it too
    rows = [
        {
            "who": prefix + row["who"].removeprefix("ours, ") if row["plan"] else PEERS[row["who"]][0],
            "gib": row["peak_allocated_gib"],
            "tokens_per_second": row["tokens_per_second"],
            "ours": bool(row["plan"]),
            "fp8": row["compute"] == "fp8",
        }
        for row in ran
    ]
    return ours_and_peers, rows, f"A QLoRA step of {task(results[0])}", _where(results[0])


def kernels():
    result = recorded("kernels_h200")
    groups = ladders(recorded("ladders_h200"))  # of the same card
    for title, rows in operations(result).items():
        if ONLY_IN_TABLE.match(title):
            continue
        mine = [row for row in rows if row["ours"]]
        groups[title] = mine + rows[len(mine) :][:1]  # the fastest of the others
    keys = ("who", "median_ms", "floor_ms", "ours")
    return (
        shares,
        {title: [{key: row[key] for key in keys} for row in rows] for title, rows in groups.items()},
        _where(result),
    )


def _where(result: dict) -> str:
    return f"{result['card']['name']}, {result['date']}"


DRAWN = {"speed_memory": speed_memory, "kernels": kernels}


def said(name: str) -> str:
    """What picture `name` is drawn from; it stands in the file too."""
    _, *given = DRAWN[name]()
    return json.dumps(given)


def write_pictures(folder: Path = PICTURES) -> None:
    folder.mkdir(exist_ok=True)
    for name, make in DRAWN.items():
        draw, *given = make()
        picture = Image.open(io.BytesIO(draw(*given).png())).convert("RGB")
        info = PngInfo()
        info.add_text("drawn from", said(name))
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True, pnginfo=info)


# --- tables


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def training(result: dict) -> str:
    rows = []
    for row in steps(result):
        rate = f"{row['tokens_per_second']:,.0f}" if row["failed"] is None else "out of memory"
        memory = f"{row['peak_allocated_gib']:.2f}" if row["failed"] is None else ""
        rows.append([_contender(row), rate, memory])
    return table([f"{task(result)} ({_link(result)})", "tokens/s", "peak GiB allocated"], rows)


def _contender(row: dict) -> str:
    if not row["plan"]:
        return PEERS[row["who"]][1]
    plan, *more = row["who"].removeprefix("ours, ").split(", ")
    name, _, budget = plan.partition(" ")
    words = {"fp8": "in FP8", "graph": "as a CUDA graph"}
    return ", ".join([f"fastkit, plan `{name}`", *([f"budget {budget}"] if budget else []), *(words[m] for m in more)])


def short_passes(result: dict) -> str:
    each = []
    for row in steps(result):
        who = _contender(row) if row["plan"] else PEERS[row["who"]][0]
        speed = f"{row['median_ms']:.0f} ms, {row['tokens_per_second']:,.0f} tokens/s"
        each.append(f"{who}: {speed} in {row['peak_allocated_gib']:.2f} GiB")
    return f"* Steps of 1×512 tokens, in which the GPU waits for Python ({_link(result)}): {'; '.join(each)}."


def same_learning(first: dict) -> str:
    """All runs of `fastkit bench learning` of the same card, of which `first` is one."""
    rows = []
    for path in sorted(RESULTS.glob("learning_*_h200.json")):
        result = recorded(path.stem)
        run = {row["who"]: row for row in result["rows"] if row["what"] == "run"}
        stock, ours, fp8 = (run[who] for who in ("transformers", "ours, keep", "ours, keep, FP8"))
        rank, rate = re.search(r"--rank (\S+) --learning-rate (\S+)", result["command"]).groups()
        drifts = [ours["mean_relative_drift"], *(each["mean_relative_drift_from_fp32"] for each in (stock, ours))]
        shown = [f"{drift:.2%}" for drift in drifts] + [f"{each['validation_drift']:+.2%}" for each in (ours, fp8)]
        rows.append([f"rank {rank}, rate {rate} ({_link(result)})", *shown])
    count = sum(row["what"] == "loss" for row in first["rows"])
    heads = [f"SmolLM2-135M, {count} steps in bf16: how far losses are apart, on average", "ours from transformers"]
    heads += ["transformers from its fp32", "ours from that fp32", "validation loss", "in FP8"]
    return table(heads, rows)


def several_cards(result: dict) -> str:
    one, *more = (row for row in result["rows"] if row["what"] == "step")
    each = [
        f"{row['processes']} take {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['tokens_per_second'] / one['tokens_per_second']:.2f} times what one took"
        for row in more
    ]
    return (
        f"* Several such cards joined by {more[0]['link']}, under DDP with as many tokens on each ({_link(result)}): "
        f"{'; '.join(each)}."
    )


def sharded(result: dict) -> str:
    (row,) = (row for row in result["rows"] if row["what"] == "step")
    return (
        f"* Llama-2-70B's shape on {row['processes']} of them under FSDP2, each with a part of every weight "
        f"({_link(result)}): {row['tokens_per_second']:,.0f} tokens/s, {row['peak_allocated_gib']:.1f} GiB on each."
    )


def commands(result: dict) -> str:
    each = [
        f"{row['what']}, {row['tokens_per_second']:,} tokens/s in {row['peak_allocated_gib']:.1f} GiB"
        for row in result["rows"]
    ]
    what = "The same task by whole commands, activations recomputed, no layer fused"
    return f"* {what} ({_link(result)}): {'; '.join(each)}."


def learning(result: dict) -> str:
    row = {row["what"]: row for row in result["rows"]}
    facts, loss = row["canary facts known, of 24, asked in other words"], row["validation loss"]
    steps, seconds = (row[what]["after"] for what in ("optimizer steps", "seconds of training"))
    return (
        f"* SmolLM2-135M learns 24 facts that no model can know, asked in other words than in training "
        f"({_link(result)}): {facts['before']} right answers before, {facts['after']} after {steps} "
        f"steps, {seconds:.0f} s of training. By then it has learned by heart, and the validation loss has risen "
        f"from {loss['before']:.2f} to {loss['after']:.2f}."
    )


def kernel_times(result: dict) -> str:
    rows = []
    for title, (ours, *others) in operations(result).items():
        theirs = [f"{_ms(row)} `{row['who']}`" for row in others if not row["ours"]]
        rows.append([title.replace("\n", ", "), _ms(ours), ", ".join(theirs[:2]), f"{ours['floor_ms']:.3f}"])
    return table([f"kernel, median ms, weights frozen ({_link(result)})", "fastkit", "the two next", "the limit"], rows)


def proof(result: dict) -> str:
    rows = result["rows"]
    turns = {
        row["case"].split()[1]: row["measured"]
        for row in rows
        if row["case"].startswith("transpose") and row["case"].endswith("full")
        if row["what"] == "shared_load_conflict_degree"
    }
    lost = 1 - (turns["swizzled"] - 1) / (turns["shared"] - 1)
    launches = len({row["case"] for row in rows})
    return (
        f"**The tracer tells the truth**: its predictions for {launches} launches of all ladders, RMSNorm and SwiGLU, "
        f"made without running them, beside Nsight Compute's counters, {len(rows)} numbers ({_link(result)}). Where no "
        f"lane is masked, sectors a request are equal, elsewhere within 2%, traffic within 5%, and conflicts of the "
        f"banks within a tenth; all hold. By the same counters the transpose loses {lost:.2%} of its bank conflicts "
        f"between the rungs `shared` and `swizzled`: a load takes {turns['shared']:.1f} turns of the banks there and "
        f"{turns['swizzled']:.2f} here."
    )


def _ms(row: dict) -> str:
    memory = f" in {row['extra_gib']:.2f} GiB" if "extra_gib" in row else ""
    return f"{row['median_ms']:{'.3f' if row['median_ms'] < 10 else '.1f'}}{memory}"


def _link(result: dict) -> str:
    name = f"{result['name']}.json"
    return f"[{result['card']['name']}, {result['date']}](data/results/{name})"


TABLES = {
    "train_h200": training,
    "small_h200": short_passes,
    "learning_r64_lr2e-4_h200": same_learning,
    "four_h200": several_cards,
    "two_70b_h200": sharded,
    "mistral_7b_4x2048": commands,
    "17_canary": learning,
    "kernels_h200": kernel_times,
    "tracer_h200": proof,
}


def filled(text: str) -> str:
    """`text` with what the records say between `<!-- measured: NAME -->` and `<!-- end -->`."""

    def block(found: re.Match) -> str:
        result = recorded(found[2])
        write = TABLES.get(found[2]) or (kernel_times if "op" in result["rows"][0] else training)  # of a new record
        return f"{found[1]}{write(result)}\n{found[3]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    write_pictures()
    README.write_text(filled(README.read_text()))
