"""Every row of the result tables is a command; this runs the missing ones and prints the tables.

    python tests/results.py                 run what is missing (may be stopped and started again), then print
    python tests/results.py --print         only print, from the committed assets/results.jsonl
    python tests/results.py --again kd 12   run one row for one seed again and compare with the committed figures

Seed N means: --seed N on world tiny:N, so every seed has its own teacher, labelled rows and student to start from.
Settings and world were chosen on seeds 0-2; the tables are from seeds 10 and up.
"""
import argparse
import json
import math
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "assets/results.jsonl"
SEEDS = range(10, 15)  # rows with 3 seeds use the first three
MID = "--student out/results/kd-teacher-{seed}/student"


def cooler(row, seeds):
    """The student of a row, sampled at temperatures below 1: what sharpening alone would give."""
    return {f"{row}-t{i}": (f"kd_forward.py --student out/results/{row}-{{seed}}/student --steps 0 --eval-temperature 0.{i}", [], seeds)
            for i in (2, 3, 5, 7)}


TABLES = {  # table: {row: (command, controls that paired differences are taken against, seeds)}
    "kd": {
        "sft": ("kd_forward.py --alpha 0", [], 5),
        "kd": ("kd_forward.py", ["sft", "sft-2x"], 5),
        "seqkd": ("kd_forward.py --responses teacher --alpha 0", ["sft"], 5),
        "kd-teacher": ("kd_forward.py --responses teacher", ["seqkd", "seqkd-2x"], 5),
        "sft-2x": ("kd_forward.py --alpha 0 --steps 1000", [], 5),  # the seconds of kd
        "seqkd-2x": ("kd_forward.py --responses teacher --alpha 0 --steps 1000", [], 5),  # those of kd-teacher
        "kd-teacher-2x": ("kd_forward.py --responses teacher --steps 1000 --cache-gib 1", ["seqkd-2x"], 5),  # cached
        "kd-half": ("kd_forward.py --alpha 0.5", ["kd"], 5),
        "kd-tau2": ("kd_forward.py --tau 2", ["kd"], 5),
    },
    "llmr": {  # from the KL-distilled start, where little is left to gain
        "llmr": ("llmr.py", ["kl-more", "seqkd-more", "kl-more-s", "seqkd-more-s"], 5),
        "kl-more": ("kd_forward.py --student tiny-kl --responses teacher --steps 300 --lr 3e-4", [], 5),
        "seqkd-more": ("kd_forward.py --student tiny-kl --responses teacher --alpha 0 --steps 300 --lr 3e-4", ["kl-more"], 5),
        # the seconds of llmr: 1.27 and 2.87 times as many steps were measured
        "kl-more-s": ("kd_forward.py --student tiny-kl --responses teacher --steps 400 --lr 3e-4", [], 5),
        "seqkd-more-s": ("kd_forward.py --student tiny-kl --responses teacher --alpha 0 --steps 900 --lr 3e-4", [], 5),
        **cooler("kl-more", 5), **cooler("seqkd-more", 5),
        "llmr-25": ("llmr.py --steps 25", [], 5),
        "llmr-50": ("llmr.py --steps 50", [], 5),
        "llmr-100": ("llmr.py --steps 100", [], 5),
        "llmr-lse": ("llmr.py --value lse", ["llmr"], 3),
        "llmr-mean": ("llmr.py --value mean", ["llmr"], 3),
        "llmr-value": ("llmr.py --baseline value", ["llmr"], 3),
        "llmr-others": ("llmr.py --baseline mean", ["llmr"], 3),
        "llmr-fine": ("llmr.py --eval-every 20", [], 3),  # llmr again, looked at more often, for a figure
    },
    "llmr-mid": {  # from the students of kd-teacher, where there is something to gain
        "llmr-mid": (f"llmr.py {MID}", ["kl-mid", "seqkd-mid"], 3),
        "llmr-mid-lr1e-3": (f"llmr.py {MID} --lr 1e-3", ["kl-mid", "seqkd-mid"], 3),
        "kl-mid": (f"kd_forward.py {MID} --responses teacher --steps 300", [], 3),
        "seqkd-mid": (f"kd_forward.py {MID} --responses teacher --alpha 0 --steps 300", ["kl-mid"], 3),
        **cooler("kl-mid", 3), **cooler("seqkd-mid", 3),
    },
    "dpkd": {
        "dpkd": ("dpkd.py", ["sft", "seqkd", "kd-teacher", "reverse-kl"], 5),
        "dpkd-alone": ("dpkd.py --anchor 0", ["seqkd", "reverse-kl", "dpkd"], 5),
        "reverse-kl": ("dpkd.py --level reverse_kl", ["seqkd"], 5),
        "frozen-b01": ("dpkd.py --negatives frozen --beta 0.1 --anchor 0", ["seqkd"], 5),
        "online-b01": ("dpkd.py --beta 0.1 --anchor 0", ["frozen-b01"], 5),
        "frozen-b01-anchor": ("dpkd.py --negatives frozen --beta 0.1", ["frozen-b01"], 5),
        "anchor-alone": ("dpkd.py --preference 0", ["dpkd"], 3),
        "epoch-b01": ("dpkd.py --negatives epoch --beta 0.1 --anchor 0", ["frozen-b01"], 3),
        "length-norm": ("dpkd.py --length-norm --beta 2", ["dpkd"], 3),
        "token": ("dpkd.py --level token --beta 0.1 --preference 0.5", ["seqkd"], 5),
        "token-alone": ("dpkd.py --level token --beta 0.1 --preference 0.5 --anchor 0", ["token"], 3),
    },
    "starts": {  # what is missing for every method from either start: supervised (tiny) and KL-distilled (tiny-kl)
        "llmr-sft": ("llmr.py --student tiny", ["sft", "seqkd"], 5),
        "reverse-kl-late": ("dpkd.py --level reverse_kl --student tiny-kl --steps 300 --lr 3e-4", ["kl-more"], 5),
        "dpkd-late": ("dpkd.py --student tiny-kl --steps 300 --lr 3e-4", ["kl-more", "reverse-kl-late"], 5),
        "sft-late": ("kd_forward.py --student tiny-kl --alpha 0 --steps 300 --lr 3e-4", ["kl-more"], 5),
    },
    "ddk": {  # seed N: teacher and student of world 3, number N, equal tokens
        "ddk": ("ddk.py", ["natural", "uniform", "static", "no-smoothing"], 5),
        "natural": ("ddk.py --mix natural", [], 5),
        "uniform": ("ddk.py --mix uniform", ["natural"], 5),
        "no-smoothing": ("ddk.py --mix no-smoothing", ["uniform"], 5),
        "static": ("ddk.py --mix static --shares out/results/ddk-{seed}/result.json", ["uniform"], 5),
        "alpha-8": ("ddk.py --alpha 0.8", ["ddk"], 5),
        "alpha-1": ("ddk.py --alpha 1", ["ddk"], 5),
        "interval-10": ("ddk.py --interval 10", ["ddk"], 5),
        "interval-150": ("ddk.py --interval 150", ["ddk"], 5),
        "ddk-ce": ("ddk.py --gamma 0", ["ddk", "uniform-ce"], 5),
        "uniform-ce": ("ddk.py --mix uniform --gamma 0", ["uniform"], 5),
        # from students whose gaps are small and alike already
        "ddk-late": ("ddk.py --student out/results/uniform-{seed}/student", ["uniform-late"], 5),
        "uniform-late": ("ddk.py --student out/results/uniform-{seed}/student --mix uniform", [], 5),
    },
}
for name in ("mild", "alike", "same"):  # other sets of domains (assets/world3.py): small gaps, more alike ones, equal ones
    on = " ".join(f"--{role} out/worlds/{name}-{{seed}}/{role}" for role in ("data", "teacher", "student"))
    TABLES[f"ddk-{name}"] = {
        name: (f"ddk.py {on}", [f"{name}-natural", f"{name}-uniform", f"{name}-no-smoothing"], 5),
        **{f"{name}-{mix}": (f"ddk.py {on} --mix {mix}", [], 5) for mix in ("natural", "uniform", "no-smoothing")},
    }
PLAIN = "--control plain --select none"
TABLES["gold"] = {  # reviews of world 2, each seed with its own LLM
    "gold": ("gold.py", ["gold-plain", "gold-ood", "gold-random", "gold-top", "gold-t1"], 5),
    "gold-random": ("gold.py --select random", ["gold-ood"], 5),
    "gold-top": ("gold.py --select top", ["gold-random"], 5),
    "gold-ood": ("gold.py --select none", ["gold-plain"], 5),
    "gold-plain": (f"gold.py {PLAIN}", [], 5),
    "gold-t1": (f"gold.py {PLAIN} --temperature 1 --top-k 0 --top-p 1", ["gold-plain"], 5),
    "gold-real": ("gold.py --control real --select none", ["gold"], 5),
    "gold-ce": ("gold.py --loss ce", ["gold"], 5),
    "gold-noise": ("gold.py --label-noise 0.2", ["gold-noise-ce"], 5),
    "gold-noise-ce": ("gold.py --label-noise 0.2 --loss ce", [], 5),
}
TABLES["gold-sums"] = {  # stories with equations
    "sums": ("gold.py --task sums", ["sums-plain", "sums-ood", "sums-random", "sums-top"], 5),
    "sums-random": ("gold.py --task sums --select random", [], 5),
    "sums-top": ("gold.py --task sums --select top", [], 5),
    "sums-ood": ("gold.py --task sums --select none", ["sums-plain"], 5),
    "sums-plain": (f"gold.py --task sums {PLAIN}", [], 5),
}
GOLD = ["accuracy", "accuracy_uniform", "accuracy_tail", "modes", "tail_mass", "garbage", "garbage_fed", "auroc_garbage"]
MATCHED = {  # table: {row: controls whose curve over T it is held against, at its own entropy and mode distance}
    "llmr": {row: ["kl-more", "seqkd-more"] for row in ("llmr", "llmr-100", "llmr-50", "llmr-25", "llmr-value", "llmr-others")},
    "llmr-mid": {row: ["kl-mid", "seqkd-mid"] for row in ("llmr-mid", "llmr-mid-lr1e-3")},
}
STARTS = {  # the table of all methods: start, then method: row
    "start: supervised": {"SFT": "sft", "KD": "kd", "SeqKD": "seqkd", "KD on teacher text": "kd-teacher", "reverse KL on own text": "reverse-kl",
                          "DPKD": "dpkd", "DPKD without anchor": "dpkd-alone", "DPKD, stale negatives": "frozen-b01",
                          "DPKD, released token form": "token", "LLMR": "llmr-sft"},
    "start: KL-distilled": {"SFT": "sft-late", "KD on teacher text": "kl-more", "SeqKD": "seqkd-more", "reverse KL on own text": "reverse-kl-late",
                            "DPKD": "dpkd-late", "LLMR": "llmr"},
}
ROWS = {row: what for table in TABLES.values() for row, what in table.items()}
DDK = ["worst_gap", "mean_gap", "mean_ce"]
README = {"ddk": DDK, "ddk-mild": DDK, "ddk-alike": DDK, "ddk-same": DDK, "gold": GOLD, "gold-sums": GOLD}  # columns there, if not these:
COLUMNS = ["kl_pq", "kl_qp", "valid", "valid_greedy", "mode_distance", "entropy"]
SHOWN = ["kl_pq", "kl_qp", "valid", "valid_mass", "valid_greedy", "mode_distance", "entropy", "rouge_l", "ce",
         "worst_gap", "mean_gap", "mean_ce", "gap_code", "gap_csv", "gap_json", "gap_log", "gap_noise", "gap_prose", "gap_arith", "gap_copy", *GOLD]
CURVE = ["kl_pq", "kl_qp", "valid", "mode_distance", "entropy", "fresh_margin", "fresh_nll_t", "fresh_nll_s"]  # validation
TRAIN = ["margin", "nll_t", "nll_s", "norm_preference", "norm_anchor", "advantage", "length"]  # training batches, where the method logs them
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's t, two-sided


def load():
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return {(r["row"], r["seed"]): r for r in map(json.loads, lines)}


def run(row, seed):
    """The record of one run: command, commit, versions and the script's own result.json."""
    import torch
    import transformers
    for start in re.findall(r"out/results/([\w-]+)-\{seed\}/", ROWS[row][0]):  # its record may be committed, it is not
        if not (ROOT / f"out/results/{start}-{seed}/student").exists():
            run(start, seed)
    for world in set(re.findall(r"out/worlds/(\w+)-\{seed\}/", ROWS[row][0])):
        if not (ROOT / f"out/worlds/{world}-{seed}").exists():
            subprocess.run([sys.executable, "-m", "assets.world3", world, str(seed), f"out/worlds/{world}-{seed}"], cwd=ROOT, check=True)
    command = ROWS[row][0].format(seed=seed) + ("" if "--data" in ROWS[row][0] else f" --data tiny:{seed}") + f" --seed {seed}"
    out = ROOT / "out" / "results" / f"{row}-{seed}"
    print(f"python {command}", flush=True)
    subprocess.run([sys.executable, *command.split(), "--out", str(out), "--overwrite"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    pick = lambda x, v, keys: {"step": x["step"], "seconds": x["seconds"], **{k: round(v[k], 4) for k in keys if k in v}}
    domains = lambda v: [k for k in v if k.startswith(("gap_", "share_"))] + ["worst_gap", "mean_gap", "mean_ce"]
    curve = [pick(x, x["valid"], CURVE + domains(x["valid"])) for x in log if "valid" in x]
    train = [pick(x, x, TRAIN) for x in log if any(k in x for k in TRAIN)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"row": row, "seed": seed, "command": f"python {command}", "commit": commit, "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__, **({} if "--steps 0" in command else by_length(out)), "curve": curve, **({"train": train} if train else {}), "result": json.loads((out / "result.json").read_text())}


def written(out):
    """What GOLD's LLM wrote, by topic, and the student's accuracy by topic. Ranks of energy inside a round, since energies
    drift: of V_t, how many samples of common topics, of rare ones, and of garbage are the 1st, 2nd .. b-th."""
    import torch

    import common
    import gold
    from assets import tasks, world2
    settings = json.loads((out / "settings.json").read_text())
    known = {k: v for k, v in settings.items() if k in gold.Config.__dataclass_fields__}
    task = tasks.load_task(settings["task"])
    cfg = gold.Config(**{**known, "teacher": "none", "student": str(out / "student"), "device": "cpu", "dtype": "float32"})
    student, _, tokenizer = common.load_pair(cfg, torch.device("cpu"), same_tokens=False, world=task["world"])
    encode = common.row_encoder(cfg, student, None, tokenizer)
    test = [encode(r) for r in common.load_rows(cfg, task["world"], tasks.row_reader(task))["test"]]
    texts = [tokenizer.decode(e.response, skip_special_tokens=True) for e in common.sampled(student, test, tokenizer, cfg, 0.0)]
    right = [tasks.score(task, t, e.row) for t, e in zip(texts, test)]
    samples = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    ranks = [[0] * settings["round_size"] for _ in range(3)]  # common, rare, garbage
    for r in {s["round"] for s in samples if "energy" in s}:
        for i, s in enumerate(sorted((s for s in samples if s["round"] == r and "energy" in s), key=lambda s: s["energy"])):
            ranks[2 if s["topic"] < 0 else int(s["topic"] in world2.TAIL)][i] += 1
    seen, coverage = [], []  # topics with at least one sample, after every 16 samples
    for i, s in enumerate(samples, 1):
        seen.append(s["topic"])
        if i % 160 == 0 or i == len(samples):
            coverage.append([i, sum(seen.count(t) >= 10 for t in range(20))])
    return {"topics": [seen.count(t) for t in range(20)], "garbage": seen.count(-1), "ranks": ranks, "coverage": coverage,
            "by_topic": [round(float(sum(s for s, e in zip(right, test) if e.row["topic"] == n) /
                               sum(e.row["topic"] == n for e in test)), 4) for n in world2.NAMES]}


def by_length(out):
    """`valid` and ROUGE-L (T = 1) of a run's student on test rows, apart for short, middle and long gold responses;
    nothing where the data are running text."""
    import torch
    sys.path.insert(0, str(ROOT))
    import common
    import kd_forward
    settings = json.loads((out / "settings.json").read_text())
    if "max_response" not in settings:
        return {}
    if settings["script"] == "gold":
        return {"written": written(out)}
    cfg = kd_forward.Config(data=settings["data"], teacher="none", student=str(out / "student"), device="cpu", compile=False)
    student, _, tokenizer = common.load_pair(cfg, torch.device("cpu"))
    test = sorted(common.load_data(cfg, student, None, tokenizer).test, key=lambda e: len(e.response))
    found, n = [], len(test)
    for part in (test[:n // 3], test[n // 3:2 * n // 3], test[2 * n // 3:]):
        m = common.make_ruler(cfg, None, tokenizer, part)(student)
        found.append({"tokens": round(sum(len(e.response) for e in part) / len(part), 1),
                      "valid": round(m["valid"], 4), "rouge_l": round(m["rouge_l"], 4)})
    return {"by_length": found}


def mean_sd(values):
    m = sum(values) / len(values)
    return m, math.sqrt(sum((v - m) ** 2 for v in values) / max(1, len(values) - 1))


def at_match(records, row, control, by, key, seed):
    """`key` of the row less that of its control, cooled until both have the same `by`: piecewise linear between the
    measured temperatures 1, .7, .5, .3, .2; beyond the last, the last. None where a record is missing."""
    curve = [records.get((r, seed)) for r in (control, *cooler(control, 0))]
    if None in curve or (row, seed) not in records:
        return None
    at = lambda r, k: r["result"][f"after.{k}"]
    points = sorted((at(r, by), at(r, key)) for r in curve)
    x = min(max(at(records[row, seed], by), points[0][0]), points[-1][0])
    (x0, y0), (x1, y1) = next((a, b) for a, b in zip(points, points[1:]) if a[0] <= x <= b[0])
    return at(records[row, seed], key) - (y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def interval(values):
    m, sd = mean_sd(values)
    half = T95.get(len(values) - 1, 2.0) * sd / math.sqrt(len(values))
    return f"{m:+.3f} [{m - half:+.3f}, {m + half:+.3f}]" if m == m else ""


def matched_table(records, name):
    """Differences in validity from controls sampled at a temperature that makes them as sharp as the row is."""
    lines = ["", "Against the control sampled at the T < 1 that gives it the row's own entropy, or its own mode distance (where no T >= .2 does: at .2):", "",
             "| row - control | seeds | valid, same entropy | valid_mass, same entropy | valid, same mode_distance | valid_mass, same mode_distance |",
             "|" + "---|" * 6]
    for row, controls in MATCHED.get(name, {}).items():
        for control in controls:
            cells = [[d for s in SEEDS if (d := at_match(records, row, control, by, key, s)) is not None]
                     for by in ("entropy", "mode_distance") for key in ("valid", "valid_mass")]
            if len(cells[0]) > 1:
                lines.append(f"| {row} - {control} | {len(cells[0])} | " + " | ".join(map(interval, cells)) + " |")
    return lines if len(lines) > 5 else []


def table(records, name, columns):
    """Markdown tables: means and standard deviations of the rows, paired differences from their controls, matched ones."""
    rows, lines = TABLES[name], []
    here = [r["result"] for (row, _), r in records.items() if row in rows]
    enough = any if name.startswith("gold") else all  # rows without feedback fed no garbage back
    columns = [k for k in columns if here and enough(f"after.{k}" in r for r in here)]  # older records lack the younger metrics
    value = lambda row, seed, key: records[row, seed]["result"].get(key, float("nan"))
    seeds = {row: sorted(s for r, s in records if r == row) for row in ROWS}
    shown = lambda values: "{:.3f} ± {:.3f}".format(*mean_sd(values)) if all(v == v for v in values) else ""
    show = lambda row, which: [shown([value(row, s, f"{which}.{k}") for s in seeds[row]]) for k in columns]
    cost = lambda row: [f"{mean_sd([value(row, s, key) for s in seeds[row]])[0]:.{digits}f}" for key, digits in (("seconds", 0), ("peak_gib", 2))]
    lines += ["| row | command | seeds | " + " | ".join([*columns, "seconds", "GiB"]) + " |", "|" + "---|" * (len(columns) + 5)]
    for which, title in (("teacher", "teacher"), ("before", "student, start")):
        if seeds[first := next(iter(rows))]:
            lines.append(f"| {title} | `--steps 0` | {len(seeds[first])} | " + " | ".join([*show(first, which), "", ""]) + " |")
    for row, (command, _, _) in rows.items():
        if seeds[row]:
            lines.append(f"| {row} | `python {command.replace('{seed}', 'N')}` | {len(seeds[row])} | " + " | ".join(show(row, "after") + cost(row)) + " |")
    made = sorted({f"{key} {r[key]}" for (row, _), r in records.items() if row in rows for key in ("python", "torch", "transformers")})
    commits = sorted({r["commit"] for (row, _), r in records.items() if row in rows})
    lines += ["", f"Seconds and peak memory: means over the seeds, one thread, other work beside them. {', '.join(made)}; commits {', '.join(commits)}."]
    lines += ["", "Paired differences, with 95 % intervals (Student's t over seeds):", "",
              "| row - control | seeds | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for row, (_, controls, _) in rows.items():
        for control in controls:
            both = [s for s in seeds[row] if s in seeds[control]]
            if len(both) > 1:
                cells = [interval([value(row, s, f"after.{k}") - value(control, s, f"after.{k}") for s in both]) for k in columns]
                lines.append(f"| {row} - {control} | {len(both)} | " + " | ".join(cells) + " |")
    return "\n".join(lines + matched_table(records, name))


def summary(records):
    """All methods with one ruler, from the two starts, on the seeds that all of these rows have."""
    lines = ["| method | command | " + " | ".join(["right (`valid`)", "greedy", "`kl_pq`", "`kl_qp`", "`mode_distance`", "seconds"]) + " |",
             "|" + "---|" * 8]
    keys = ("valid", "valid_greedy", "kl_pq", "kl_qp", "mode_distance")
    cells = lambda which, row, seeds: [f"{mean_sd(v)[0]:.{2 if k.startswith('kl') else 3}f}" if all(x == x for x in v) else ""
                                       for k in keys for v in [[records[row, s]["result"].get(f"{which}.{k}", float("nan")) for s in seeds]]]
    for title, methods in STARTS.items():
        rows = [r for r in methods.values() if any((r, s) in records for s in SEEDS)]
        seeds = [s for s in SEEDS if all((r, s) in records for r in rows)]
        for which, name in (("teacher", "teacher"), ("before", f"**{title}**, seeds {seeds[0]} to {seeds[-1]}")):
            if which == "before" or title == next(iter(STARTS)):
                lines.append(f"| {name} | | " + " | ".join([*cells(which, rows[0], seeds), ""]) + " |")
        for name, row in methods.items():
            if row in rows:
                took = mean_sd([records[row, s]["result"]["seconds"] for s in seeds])[0]
                lines.append(f"| {name} | `{ROWS[row][0]}` | " + " | ".join([*cells("after", row, seeds), f"{took:.0f}"]) + " |")
    return "\n".join(lines)


def with_tables(text, records):
    """The README with the tables between their marks made anew from the records."""
    made = {name: table(records, name, README.get(name, COLUMNS)) for name in TABLES} | {"summary": summary(records)}
    for name, new in made.items():
        text = re.sub(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", lambda m, new=new: f"{m[1]}{new}\n{m[2]}", text, flags=re.S)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="only_print")
    parser.add_argument("--readme", action="store_true", help="write the tables into README.md too")
    parser.add_argument("--again", nargs=2, metavar=("ROW", "SEED"))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="only these rows")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these seeds")
    args = parser.parse_args()
    records = load()
    if args.again:
        row, seed = args.again[0], int(args.again[1])
        old, new = records[row, seed]["result"], run(row, seed)["result"]
        for k in [k for k in SHOWN if f"after.{k}" in old]:
            a, b = old[f"after.{k}"], new[f"after.{k}"]
            sd = mean_sd([r["result"][f"after.{k}"] for (name, _), r in records.items() if name == row])[1]
            print(f"{k:<15}{a:10.4f} committed {b:10.4f} now   {'same' if abs(a - b) <= 1e-6 else f'{abs(a - b) / max(sd, 1e-9):.2f} sd away'}")
        return
    if not args.only_print:
        for i, seed in enumerate(SEEDS):
            for row in args.rows:
                if (row, seed) not in records and i < ROWS[row][2] and seed in (args.seeds or SEEDS):
                    records[row, seed] = run(row, seed)
                    with open(FILE, "a") as f:
                        f.write(json.dumps(records[row, seed]) + "\n")
    print(f"\n### summary\n\n{summary(records)}")
    for name in TABLES:
        print(f"\n### {name}\n\n{table(records, name, SHOWN)}")
    if args.readme:
        (ROOT / "README.md").write_text(with_tables((ROOT / "README.md").read_text(), records))


if __name__ == "__main__":
    main()
