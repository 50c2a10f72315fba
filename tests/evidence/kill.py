"""Kill every script at random moments and resume it: it must end bit by bit like a run that nobody touched.

    python tests/evidence/kill.py [--scripts kd_forward llmr ...] [--kills 10] [--seed 0]

1. SIGKILL, --kills times a script, in turn while training, evaluating and saving, at a random moment of that phase;
   half of the resumed runs are killed once more. Then --resume until it is finished.
2. kd_forward is killed at *every* state its directory goes through (names and sizes of files, looked at after each
   line of Python that writes them): half-written files have no place to hide.
3. SIGINT and SIGTERM, sent to the real commands: one line on stderr, exit status 130 and 143, saved, resumable.

Compared with the uninterrupted run: all files of the student, log.jsonl without times, result.json without times and
memory. 1 and 2 run in forked children of a process that has everything imported, which needs Linux or macOS.
"""
import argparse
import collections
import dataclasses
import importlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[1:3]]
from conftest import ROOT, any_run, flags, outcome

import common

METHODS = ["kd_forward", "llmr", "dpkd", "gold", "ddk"]
WATCHED = "common.py", "shutil.py", "pathlib.py", "serialization.py", "modeling_utils.py"  # whose lines are looked at
PHASES = ("training", "evaluating", "saving")
SETTINGS = dict(steps=10, save_every=2, eval_every=3, max_response=8)
EXTRA = {"llmr": dict(sync=4), "gold": dict(eval_rows=8), "ddk": dict(interval=4), "dpkd": dict(negatives="epoch", batch_size=16)}  # state that is old at a checkpoint


def start(script, cfg, log, prepare=lambda: None):
    """Fork a child that runs the script's main() with these settings, output to `log`. -> its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = [script, *flags(cfg)]
        prepare()
        module = importlib.import_module(script)
        status = common.main(module.train, module.Config)
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------------------------------------------------------
# 1. Random moments: the child says through a pipe when a phase begins
# ---------------------------------------------------------------------------------------------------------------
def announcer(script, pipe):
    """Wrap what the phases are made of, so that each writes its letter when it begins and "." when it ends."""
    def wrap(owner, name, letter):
        real = getattr(owner, name)

        def announced(*args, **kw):
            os.write(pipe, letter)
            try:
                return real(*args, **kw)
            finally:
                os.write(pipe, b".")
        setattr(owner, name, announced)

    def prepare():
        make_evaluator = common.make_evaluator

        def make(*args, **kw):
            holder = argparse.Namespace(evaluate=make_evaluator(*args, **kw))
            wrap(holder, "evaluate", b"e")
            return holder.evaluate
        common.make_evaluator = make
        if hasattr(module := importlib.import_module(script), "domain_ce"):  # measures in its own way
            wrap(module, "domain_ce", b"e")
        if script == "gold":  # its evaluation is its own; nothing else there calls this
            wrap(common, "answer_examples", b"e")
        wrap(common.Run, "save", b"s")
        wrap(common.Run, "finish", b"s")
        wrap(common.Run, "log", b"t")  # with log_every 1 once a step: what follows it is the next step
    return prepare


def killed_at(script, cfg, log, phase, which, delay):
    """Kill the child `delay` seconds after the `which`-th beginning of the phase. -> False if it ended before."""
    read, write = os.pipe()
    pid = start(script, cfg, log, announcer(script, write))
    os.close(write)
    seen = 0
    while seen <= which:
        letter = os.read(read, 1)
        if not letter:
            os.close(read)
            finish(pid)
            return False
        seen += letter.decode() == phase[0]
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.close(read)
    return finish(pid) == -signal.SIGKILL


def durations(script, cfg, log):
    """The uninterrupted run, timed: how often each phase begins and how long it lasts in the mean."""
    read, write = os.pipe()
    pid = start(script, cfg, log, announcer(script, write))
    os.close(write)
    began, spent, count = {}, collections.Counter(), collections.Counter()
    now, stack = time.time(), []
    while letter := os.read(read, 1).decode():
        now = time.time()
        if letter == ".":
            began, name = stack.pop()
            spent[name] += now - began
        else:
            stack.append((now, letter))
            count[letter] += 1
    os.close(read)
    if status := finish(pid):
        sys.exit(f"{script}: the uninterrupted run ended with status {status}: see {log}")
    return {p: (count[p[0]], spent[p[0]] / max(1, count[p[0]])) for p in PHASES}


def kills(script, make, n, rng):
    whole, log = make(script, "whole"), make.root / f"{script}.txt"
    found = durations(script, whole, log)
    wanted, done, steps, anew, differ = outcome(whole.out), collections.Counter(), [], 0, []
    attempt = 0
    while sum(done.values()) < n:
        phase, attempt = PHASES[attempt % 3], attempt + 1
        times, mean = found[phase]
        cfg = make(script, f"kill{attempt}")
        draws = [(phase, rng.randrange(times), rng.uniform(0, 2 * mean if phase != "training" else 0.02))]
        if rng.random() < 0.5:  # the resumed run too
            draws.append((phase, rng.randrange(max(1, times // 2)), rng.uniform(0, 2 * mean)))
        for draw in draws:
            done[phase] += killed_at(script, cfg, log, *draw)
            steps += map(int, re.findall(r"resumed from .* at step (-?\d+)", log.read_text()))
            there = Path(cfg.out, "settings.json").exists()  # before that nothing exists: a plain start, as for a user
            cfg = dataclasses.replace(cfg, resume=there)
        status = finish(start(script, cfg, log))
        said = log.read_text()
        steps += map(int, re.findall(r"resumed from .* at step (-?\d+)", said))
        anew += "starting anew" in said
        if status or outcome(cfg.out) != wanted:
            differ.append(f"{draws}: status {status}, {'differs' if not status else said.strip().splitlines()[-1][:200]}")
    inside = sum(s < whole.steps for s in steps)
    print(f"{script:<11} {sum(done.values())} SIGKILLs ({', '.join(f'{k} {v}' for k, v in done.items())}); "
          f"resumed {inside} times from a checkpoint before the end (steps {min(steps)} to {max(steps)} of {whole.steps}), "
          f"{anew} started anew; {len(differ)} differ", flush=True)
    return differ + ([] if inside else [f"{script}: no run really resumed"])


# ---------------------------------------------------------------------------------------------------------------
# 2. Every state of the directory
# ---------------------------------------------------------------------------------------------------------------
def die_at(directory, which, said):
    """Trace the run's bookkeeping line by line; at the `which`-th new state of the directory, SIGKILL this process."""
    def state():
        found = []
        for folder in (directory, f"{directory}/student"):
            if os.path.isdir(folder):
                found += [(f.name, f.name.endswith(".tmp") or f.stat().st_size) for f in os.scandir(folder)]
        return sorted(found, key=str)

    def prepare():
        last, count = [state()], [0]

        def look(frame, event, arg):
            if not frame.f_code.co_filename.endswith(WATCHED):
                return None
            if (now := state()) != last[0]:
                last[0] = now
                if count[0] == which:
                    said.write_text(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {now}")
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
            return look

        def trace(name):
            real = getattr(common.Run, name)

            def traced(*args, **kw):
                sys.settrace(look)
                try:
                    return real(*args, **kw)
                finally:
                    sys.settrace(None)
            setattr(common.Run, name, traced)
        for name in ("start", "log", "evaluated", "save", "finish"):
            trace(name)
    return prepare


def every_state(script, make):
    log, said, differ, starts = make.root / "states.txt", make.root / "where.txt", [], 0
    small = dict(steps=2, save_every=1, eval_every=9, eval_rows=2)
    whole = make(script, "whole2", **small)
    if finish(start(script, whole, log)):
        sys.exit(f"{script}: the uninterrupted run failed: see {log}")
    wanted, n = outcome(whole.out), 0
    while True:
        cfg = make(script, f"state{n}", **small)
        if finish(start(script, cfg, log, die_at(cfg.out, n, said))) != -signal.SIGKILL:
            break  # it came to its end: no more states
        there = Path(cfg.out, "settings.json").exists()
        status = finish(start(script, dataclasses.replace(cfg, resume=there), log))
        starts += not there
        if status or outcome(cfg.out) != wanted:
            differ.append(f"state {n}, killed at {said.read_text()}: status {status}: {log.read_text().strip().splitlines()[-1][:200]}")
        n += 1
    print(f"{script:<11} killed at each of the {n} states of its directory ({starts} before there was a run to resume): "
          f"{len(differ)} differ", flush=True)
    return differ


# ---------------------------------------------------------------------------------------------------------------
# 3. Signals
# ---------------------------------------------------------------------------------------------------------------
def signals(script, make):
    differ = []
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        cfg = make(script, number.name, steps=400, save_every=1000, eval_every=1000)
        process = subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *flags(cfg)], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, cwd=make.root)
        for line in process.stdout:
            if line.startswith("step     5/"):
                process.send_signal(number)
                break
        err = process.communicate()[1]
        line = re.fullmatch(rf"stopped by {number.name} after step (\d+), saved: --resume goes on\n", err)
        if process.returncode != status or not line:
            differ.append(f"{script} {number.name}: status {process.returncode}, stderr {err!r}")
        elif not 5 < int(line[1]) < 400:
            differ.append(f"{script} {number.name}: stopped after step {line[1]} of 400")
    print(f"{script:<11} SIGINT and SIGTERM: one line, 130 and 143, saved: {'no' if differ else 'yes'}", flush=True)
    return differ


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common.torch.set_num_threads(1)
    begin, bad = time.time(), []
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        def make(script, name, **settings):
            return any_run(script, root, root / script / name, **{**SETTINGS, **EXTRA.get(script, {}), **settings})
        make.root = root
        for script in args.scripts:
            bad += kills(script, make, args.kills, random.Random(f"{script} {args.seed}"))
            if script == "kd_forward":
                bad += every_state(script, make)
            bad += signals(script, make)
    print("\n".join(bad))
    print(f"{len(args.scripts)} scripts, {time.time() - begin:.0f} s: {len(bad)} failures")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
