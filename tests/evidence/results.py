"""Run the rows of assets/results.md, one command each, and write its tables.

    python tests/evidence/results.py run                        every run that results.csv lacks
    python tests/evidence/results.py run kd llmr --seeds 20 21  some of them
    python tests/evidence/results.py show kd                    the commands of a row
    python tests/evidence/results.py tables                     results.csv -> results.md

A row is a command and its seeds. Seed N runs on instance N of its toy task, which the task's
prepare.py makes in out/ if it is not there. What is done stands in assets/results.csv, so an
interrupted program goes on where it stopped; to run a row anew, delete its lines. Two programs with
different seeds can work side by side. A run has one thread. Settings were chosen on seeds 0 to 2.

results.csv has one line for each number: row, seed, part, step, metric, value. The parts `teacher`,
`before` and `after` are the final table of a run, on test rows; `valid` is its curve on validation
rows; `train` is what the loop logged; `run` holds seconds and steps. The tables show means and 95 %
intervals of the mean over seeds (Student's t).
"""
import argparse
import csv
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSV, PAGE, OUT = ROOT / "assets/results.csv", ROOT / "assets/results.md", Path("out/results")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's t, by the number of seeds
CURVED = {"sft", "kd", "seqkd", "kd-teacher", "dpkd-fresh", "dpkd-frozen", "ddk"}
CURVES = {"kl_pq", "right", "wording_distance", "worst_gap", "fresh_margin", "margin"}

# --- The rows -------------------------------------------------------------------------------------
KD, DPKD, LLMR, GOLD, DDK = (f"{name}.py" for name in ("kd_forward", "dpkd", "llmr", "gold", "ddk"))
GREEDY, ON_POLICY = "tests/controls/seqkd_greedy.py", "tests/controls/on_policy.py"
LATE = " --student student-kl --steps 400 --lr 1e-3"
T1 = " --temperature 1 --top-k 0 --top-p 1"
WORDS = (" --teacher out/pronounce/runs/teacher/student --max-prompt 32 --max-response 32"
         " --eval-rows 1000 --eval-every 1000")
FRESH = f"{WORDS} --student out/pronounce/random-student --steps 3000 --lr 6e-3 --warmup 50"
TAUGHT = f"{WORDS} --student out/pronounce/runs/kd/student --steps 600"
FIVE, THREE, TUNE = [20, 21, 22, 23, 24], [20, 21, 22], [0, 1, 2]

# table: (toy task, seeds, {row: command}); @row.share is a mixture that a run of that row had
TABLES = {
    "supervised": ("answers", FIVE, {
        "sft": f"{KD} --alpha 0",
        "kd": KD,
        "seqkd": f"{KD} --alpha 0 --responses teacher",
        "kd-teacher": f"{KD} --responses teacher",
        "greedy": GREEDY,
        "on-policy": ON_POLICY,
        "on-policy-sampled": f"{ON_POLICY} --form sampled",
        "on-policy-half": f"{ON_POLICY} --student-share 0.5",
        "dpkd": DPKD,
        "llmr": f"{LLMR} --student student --steps 300",
        "sft-2x": f"{KD} --alpha 0 --steps 600",
        "seqkd-4x": f"{KD} --alpha 0 --responses teacher --steps 1200",
        "kd-teacher-2x": f"{KD} --responses teacher --steps 600",
        "greedy-3x": f"{GREEDY} --steps 900",
    }),
    "distilled": ("answers", FIVE, {
        "kd-late": f"{KD} --responses teacher{LATE}",
        "seqkd-late": f"{KD} --alpha 0 --responses teacher{LATE}",
        "greedy-late": f"{GREEDY}{LATE}",
        "on-policy-late": f"{ON_POLICY}{LATE}",
        "dpkd-late": f"{DPKD}{LATE}",
        "llmr-late": f"{LLMR}",
        "llmr-lse": f"{LLMR} --value lse",
        "greedy-late-3x": f"{GREEDY} --student student-kl --steps 1200 --lr 1e-3",
        "kd-cooled": f"{KD} --steps 0 --eval-temperature 0.5 --student @kd-late.student",
    }),
    "frozen": ("answers", FIVE, {
        "dpkd-fresh": f"{DPKD} --beta 0.1",
        "dpkd-frozen": f"{DPKD} --beta 0.1 --refresh 0",
    }),
    "few": ("few", FIVE, {
        "few-dpkd": DPKD,
        "few-seqkd": f"{KD} --alpha 0 --responses teacher",
        "few-kd": f"{KD} --responses teacher",
    }),
    "gold": ("reviews", THREE, {
        "gold": GOLD,
        "gold-random": f"{GOLD} --select random",
        "gold-ood": f"{GOLD} --select none",
        "gold-plain": f"{GOLD} --no-ood",
        "gold-t1": f"{GOLD}{T1}",
        "gold-t1-random": f"{GOLD} --select random{T1}",
        "gold-t1-ood": f"{GOLD} --select none{T1}",
        "gold-t1-plain": f"{GOLD} --no-ood{T1}",
    }),
    "ddk": ("domains", THREE, {
        "ddk": DDK,
        "ddk-uniform": f"{DDK} --mix uniform",
        "ddk-natural": f"{DDK} --mix natural",
        "ddk-first": f"{DDK} --mix @ddk.first",
        "ddk-static": f"{DDK} --mix @ddk.share",
        "ddk-rough": f"{DDK} --mix no-smoothing",
    }),
    "border": ("answers", TUNE, {
        f"border-{beta}-{refresh}":
            f"{DPKD} --steps 500 --eval-every 500 --beta {beta} --refresh {refresh}"
        for beta in ("0.1", "0.5", "2", "5") for refresh in (1, 4, 16, 64, 0)}),
    "border-more": ("answers", TUNE, {
        f"more-{refresh}-{change}":
            f"{DPKD} --steps 500 --eval-every 500 --refresh {refresh} {settings}"
        for refresh in (1, 64, 0) for change, settings in (
            ("norm", "--beta 1 --length-norm"), ("anchor", "--beta 0.1 --anchor 0.5"),
            ("slow", "--beta 0.1 --lr 1.5e-3"), ("fast", "--beta 0.1 --lr 1e-2"))}),
    "words": ("pronounce", THREE, {
        "words-labels": f"{KD} --alpha 0{FRESH}",
        "words-kd": f"{KD} --cache{FRESH}",
        "words-seqkd": f"{KD} --alpha 0 --responses teacher{FRESH}",
        "words-kd-teacher": f"{KD} --responses teacher --cache{FRESH}",
    }),
    "words-late": ("pronounce", THREE, {
        "words-late-kd": f"{KD} --responses teacher --cache{TAUGHT} --lr 1e-3",
        "words-late-greedy": f"{GREEDY}{TAUGHT} --lr 1e-3",
        "words-late-on-policy": f"{ON_POLICY}{TAUGHT} --lr 1e-3",
        "words-late-dpkd": f"{DPKD}{TAUGHT} --lr 1e-3",
        "words-late-llmr": f"{LLMR} --baseline value{TAUGHT} --lr 3e-4",
    }),
}
ROWS = {row: (task, seeds, command) for task, seeds, rows in TABLES.values()
        for row, command in rows.items()}


def command_of(row, seed, values):
    """The words of a run's command. `values` has what other runs of this seed left."""
    task, _, command = ROWS[row]

    def fill(match):
        source, what = match[1], match[2]
        if what == "student":
            return str(OUT / f"{source}-{seed}/student")
        steps = {int(step) for r, s, part, step, _ in values
                 if (r, s, part) == (source, seed, "valid")}
        at = ("after", "") if what == "share" else ("valid", str(sorted(steps)[1]))
        shares = {m[6:]: v for (r, s, *when, m), v in values.items()
                  if (r, s, *when) == (source, seed, *at) and m.startswith("share_")}
        return ",".join(f"{name}={share:.4f}" for name, share in sorted(shares.items()))

    command = re.sub(r"@([\w-]+)\.(\w+)", fill, command)
    if row not in CURVED and "--eval-every" not in command:
        command += " --eval-every 5000"  # a curve that no picture shows costs time
    return [*shlex.split(command), "--data", data_of(task, seed), "--seed", str(seed),
            "--out", str(OUT / f"{row}-{seed}")]


def data_of(task, seed):
    return "out/pronounce/few" if task == "pronounce" else f"out/{task}-{seed}"


# --- Running --------------------------------------------------------------------------------------
def make_instance(task, seed):
    """The data and models of a row, if they are not there."""
    folder = ROOT / data_of(task, seed)
    if folder.is_dir():
        return
    if task == "pronounce":
        sys.exit("error: make out/pronounce first: python data/pronounce/prepare.py DICTIONARY "
                 "out/pronounce --no-stress --train")
    if task != "few":
        call([f"data/{task}/prepare.py", str(folder), "--number", str(seed)])
        return
    make_instance("answers", seed)  # few: 250 prompts, for which only the teacher has responses
    source = ROOT / f"out/answers-{seed}"
    shutil.copytree(source, folder)
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not row["response"]][:250]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(words):
    print("python " + shlex.join(words), flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


def read():
    """{(row, seed, part, step, metric): value}, step as text and empty where there is none."""
    if not CSV.is_file():
        return {}
    with CSV.open(newline="") as file:
        return {(r["row"], int(r["seed"]), r["part"], r["step"], r["metric"]): float(r["value"])
                for r in csv.DictReader(file)}


def numbers_of(directory):
    """[(part, step, metric, value)] of a finished run."""
    found = []
    for key, value in json.loads((directory / "result.json").read_text()).items():
        part, _, metric = key.partition(".")
        if metric and isinstance(value, (int, float)) and part in ("teacher", "before", "after"):
            found.append((part, "", metric, value))
        elif key in ("seconds", "steps", "peak_gib"):
            found.append(("run", "", key, value))
    for line in (directory / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key, value in record.items():
            part = "valid" if key.startswith("valid/") else "train"
            metric = key.removeprefix("valid/")
            if metric in CURVES or metric.startswith("share_"):
                found.append((part, record["step"], metric, value))
    return found


def run(rows, seeds):
    for table, (task, table_seeds, commands) in TABLES.items():
        for row in commands:
            for seed in table_seeds:
                values = read()
                done = any(key[:3] == (row, seed, "after") for key in values)
                if row not in rows or (seeds and seed not in seeds) or done:
                    continue
                make_instance(task, seed)
                directory = ROOT / OUT / f"{row}-{seed}"
                if not (directory / "result.json").is_file():
                    shutil.rmtree(directory, ignore_errors=True)
                    call(command_of(row, seed, values))
                lines = [f"{row},{seed},{part},{step},{metric},{value:.6g}\n"
                         for part, step, metric, value in numbers_of(directory)]
                head = "" if CSV.is_file() else "row,seed,part,step,metric,value\n"
                with CSV.open("a") as file:
                    file.write(head + "".join(lines))


# --- Tables ---------------------------------------------------------------------------------------
def per_seed(values, row, metric, part="after"):
    """{seed: value} of the runs of a row."""
    return {s: v for (r, s, p, step, m), v in values.items()
            if (r, p, m) == (row, part, metric)}


def mean(numbers, digits=3):
    """"mean ± half of the 95 % interval"."""
    numbers, n = list(numbers), len(numbers)
    text = f"{statistics.mean(numbers):.{digits}f}"
    if n > 1:
        text += f" ± {T_95[n] * statistics.stdev(numbers) / n ** 0.5:.{digits}f}"
    return text


def table(name, metrics, values):
    """A Markdown table of a table's rows; the start and the teacher come first."""
    task, seeds, commands = TABLES[name]
    first = next(iter(commands))
    lines = [f"| row | {' | '.join(metrics)} | seconds | command |",
             "|---" * (len(metrics) + 3) + "|"]
    entries = [("teacher", first, "teacher", ""), ("start", first, "before", "")]
    entries += [(row, row, "after", f"`python {command.replace(WORDS, ' ...')}`")
                for row, command in commands.items()]
    for label, row, part, command in entries:
        cells = []
        for metric in metrics:
            found = per_seed(values, row, metric, part).values()
            cells.append(mean(found) if found else "")
        seconds = per_seed(values, row, "seconds", "run").values() if part == "after" else []
        spent = f"{min(seconds):.0f}" if seconds else ""
        lines.append(f"| {label} | {' | '.join(cells)} | {spent} | {command} |")
    return "\n".join(lines)


def difference(first, second, metric, values):
    """"row - row: mean ± half of the 95 % interval" of a metric, paired by seed."""
    a, b = per_seed(values, first, metric), per_seed(values, second, metric)
    return mean([a[s] - b[s] for s in sorted(set(a) & set(b))])


def fill(page, values):
    """Write the tables between their marks `<!-- table NAME METRIC ... METRIC:ROW:ROW ... -->` and
    `<!-- end -->`; METRIC:ROW:ROW asks for a difference below the table. `<!-- differences
    METRIC:ROW:ROW ... -->` has no table."""
    def one(match):
        kind, *words = match[1].split()
        blocks, found = [], {}
        if kind == "table":
            metrics = [word for word in words[1:] if ":" not in word]
            blocks.append(table(words[0], metrics, values))
        for metric, first, second in [word.split(":") for word in words if ":" in word]:
            value = difference(first, second, metric, values)
            found.setdefault(metric, []).append(f"{first} - {second} {value}")
        if found:
            blocks.append("Differences. " + ". ".join(
                f"`{metric}`: " + "; ".join(items) for metric, items in found.items()) + ".")
        return f"<!-- {match[1]} -->\n" + "\n\n".join(blocks) + "\n<!-- end -->"
    return re.sub(r"<!-- ((?:table|differences) .*?) -->\n.*?<!-- end -->", one, page, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("do", choices=("run", "show", "tables"))
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all rows where none is named")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these")
    args = parser.parse_args()
    wrong = [row for row in args.rows if row not in ROWS]
    if wrong:
        sys.exit(f"error: no row {wrong[0]}; there are {', '.join(ROWS)}")
    if args.do == "run":
        run(args.rows or list(ROWS), args.seeds)
    elif args.do == "show":
        values = read()
        for row in args.rows or ROWS:
            for seed in args.seeds or ROWS[row][1]:
                print("python " + shlex.join(command_of(row, seed, values)))
    else:
        PAGE.write_text(fill(PAGE.read_text(), read()))


if __name__ == "__main__":
    main()
