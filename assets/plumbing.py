"""Settings, runs and exit codes: what a reader may skip. A run is a directory with everything it needed and made."""
import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm  # comes with transformers

from assets.processes import join_processes, processes, total


class BadInput(Exception):
    """The user can mend it: one sentence with what is wrong, where, and what to do. Exit status 2."""
    def __init__(self, sentence):  # what it quotes may be anything: 10 MB of text, line breaks, terminal codes
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", sentence)
        super().__init__(line if len(line) < 600 else line[:350] + " ... " + line[-200:])


class RunFailed(Exception):
    """The run cannot go on; the sentence names the checkpoint it can go on from. Exit status 1."""


# ---------------------------------------------------------------------------------------------------------------
# Settings: a dataclass is the command line, the comment behind a field is its help text
# ---------------------------------------------------------------------------------------------------------------
def parse_args(config_class, argv=None):
    """Command line -> config_class(...). --lr 1e-4, --lr=1e-4, --batch-size, --batch_size and --no-compile all work."""
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    comments = dict(re.findall(r"^    (\w+): *\w+ *=.*?# (.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=(sys.modules[config_class.__module__].__doc__ or "").split("\n\n")[0],
                                     allow_abbrev=False)

    def refuse(message):
        raise BadInput(f"{message} (--help lists all settings)")
    parser.error = refuse
    for name, f in fields.items():
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else \
            dict(type=type(f.default), metavar=type(f.default).__name__)
        text = f"{comments.get(name, '')} [{f.default}]".replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), default=f.default, help=text, **kind)
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        words.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        names = ["--" + n.replace("_", "-") for n in fields]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, 1)
        raise BadInput(f"unknown setting {unknown[0]}: " + (f"did you mean {near[0]}?" if near else "see --help"))
    return config_class(**vars(known))


def main(train, config_class):
    """Run a script. Exit status: 0 done, 2 bad input, 1 failed while running, 130 and 143 on SIGINT and SIGTERM."""
    for stream in (sys.stdout, sys.stderr):  # text that the terminal cannot show must not end a run
        stream.reconfigure(errors="backslashreplace")
    try:
        train(parse_args(config_class))
        return 0
    except (BadInput, RunFailed) as e:
        if os.environ.get("RANK", "0") == "0":  # of several processes one will do
            print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, BadInput) else 1
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130


def check_settings(cfg, **limits):
    """check_settings(cfg, alpha=(0, 1), kl_on=["samples", "references"]): out of range or unknown is bad input."""
    for f in dataclasses.fields(cfg):
        value, wanted = getattr(cfg, f.name), type(f.default)
        fits = isinstance(value, (float, int) if wanted is float else wanted)
        if not fits or isinstance(value, bool) != (wanted is bool):
            raise BadInput(f"{f.name}: a {type(value).__name__}, {wanted.__name__} is wanted")
        if wanted is str and re.search("[\0\ud800-\udfff]", value):
            raise BadInput(f"{f.name} {ascii(value)}: holds a NUL or half a surrogate pair, which is no text")
        if f.name in ("teacher", "student", "data", "out", "corpus") and any(len(x) > 200 for x in value.split("/")):
            raise BadInput(f"{f.name} {value}: no name of a file or directory is that long")
    common = dict(steps=(0, 10**9), batch_size=(1, 10**9), accum=(1, cfg.batch_size), lr=(0, 1e3),
                  clip=(1e-9, math.inf), eval_every=(1, math.inf), log_every=(1, math.inf), save_every=(1, math.inf),
                  eval_rows=(1, math.inf), holdout=(0, 0.4), max_prompt=(1, 10**9), max_response=(1, 10**9),
                  warmup=(0, 10**9), weight_decay=(0, 1e3), seed=(0, 10**9), kl_on=["samples", "references"],
                  dtype=["auto", "float32", "bfloat16"],
                  eval_temperature=(0.05, 100))  # at 0 there would be no entropy, and no bound to KL(p||q)
    common = {name: allowed for name, allowed in common.items() if hasattr(cfg, name)}
    for name, allowed in {**common, **limits}.items():
        value, flag = getattr(cfg, name), "--" + name.replace("_", "-")
        if isinstance(allowed, list) and value not in allowed:
            raise BadInput(f"{flag} {value}: choose one of {', '.join(allowed)}")
        if isinstance(allowed, tuple) and not allowed[0] <= value <= allowed[1]:  # nan fails too
            raise BadInput(f"{flag} {value}: must lie between {allowed[0]} and {allowed[1]}")
    n = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % (cfg.accum * n):
        raise BadInput(f"--batch-size {cfg.batch_size} must be a multiple of --accum {cfg.accum}"
                       f"{f' times {n} processes' if n > 1 else ''}: it counts the sequences of a whole optimizer step")


def compute_dtype(cfg, device):
    """--dtype auto: bf16 where CUDA has it, else fp32. Never decided by timing, so that runs repeat bit by bit."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, cfg.dtype)


# ---------------------------------------------------------------------------------------------------------------
# A run: its directory, log, checkpoints and signals
# ---------------------------------------------------------------------------------------------------------------
class Run:
    """out/<name>/ with settings.json, log.jsonl, a copy of the script, checkpoint.pt, result.json and the student.

    The constructor only looks, since bad input must overwrite nothing; `start` creates the directory, or resumes.
    """
    FREE = ("out", "resume", "overwrite", "device", "compile")  # may differ between a run and its resumption

    def __init__(self, cfg, script):
        self.cfg, self.script, self.t0, self.seconds = cfg, Path(script), time.time(), 0.0
        self.finished, self.bar, self.stop, self.first = None, None, 0, 0
        try:
            self.device = torch.device(join_processes(cfg.device))
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError):  # absent, unknown, or torch was built without it
            raise BadInput(f"--device {cfg.device}: not usable on this machine; leave it out for auto") from None
        values, defaults = dataclasses.asdict(cfg), dataclasses.asdict(type(cfg)())
        changed = {k: v for k, v in values.items() if v != defaults[k]}
        name = "-".join([self.script.stem] + [f"{k}={str(v).replace('/', '_')}" for k, v in changed.items()
                                              if k not in self.FREE])
        name = name if len(name) < 100 else name[:80] + hashlib.sha1(name.encode()).hexdigest()[:12]
        self.dir = Path(cfg.out or f"out/{name}")
        self.settings = {"script": self.script.stem, **{k: v for k, v in values.items() if k not in self.FREE}}
        print("\n".join(f"{'*' if k in changed else ' '} {k:<20}{v}" for k, v in values.items()))
        print(f"run directory: {self.dir}")
        self.settings["dtype"] = str(compute_dtype(cfg, self.device))  # "auto" must not change between resumptions
        self._look()
        torch.manual_seed(cfg.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what stays in fp32

    def _look(self):
        if self.dir.exists() and not self.dir.is_dir():
            raise BadInput(f"{self.dir} is a file: choose another --out")
        if not (self.dir / "settings.json").is_file():
            if self.dir.exists() and any(f.suffix != ".tmp" for f in self.dir.iterdir()):  # .tmp: killed at its start
                raise BadInput(f"{self.dir} is not empty and holds no settings.json of a run: choose another --out")
            if self.cfg.resume:
                raise BadInput(f"--resume: there is no run in {self.dir}")
        elif not self.cfg.overwrite:
            there = self._read("settings.json")
            other = [f"{k} was {there.get(k)}, is {self.settings.get(k)}" for k in {**there, **self.settings}
                     if there.get(k) != self.settings.get(k)]
            if other:
                raise BadInput(f"{self.dir} has other settings ({'; '.join(other)}): choose a new --out or --overwrite")
            if (self.dir / "result.json").is_file():
                self.finished = self._read("result.json")
                print("this run is finished (--overwrite runs it again); its result:\n---")
                print("\n".join(f"{k}: {v}" for k, v in self.finished.items()))
            elif not self.cfg.resume:
                raise BadInput(f"{self.dir} holds an unfinished run: --resume goes on with it, --overwrite starts anew")

    def _read(self, name):
        try:
            return dict(json.loads((self.dir / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            raise BadInput(f"{self.dir / name} is damaged: choose another --out, or --overwrite") from None

    def start(self, first=0, **parts):
        """Create the directory, or load the last checkpoint into `parts` (model, optimizer). Returns the next step.
        `first` is that of a new run: negative where something else is done before step 0 of the training."""
        log, saved, self.first = self.dir / "log.jsonl", self.dir / "checkpoint.pt", first
        rank, n = processes()
        if n > 1:
            torch.manual_seed(self.cfg.seed + rank)  # dropout differs, the weights were made before
            dist.barrier()  # all have looked before the directory changes
        try:
            if rank > 0:
                self._load(saved, parts)
            else:
                self._prepare(log, saved, parts)
        except OSError as e:
            raise BadInput(f"cannot write to {self.dir} ({e.strerror}): choose another --out") from None
        self.t0 = time.time()
        if sys.stdout.isatty():
            self.bar = tqdm(total=self.cfg.steps, initial=self.first, unit="step", dynamic_ncols=True)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)
        return self.first

    def _prepare(self, log, saved, parts):
        if self.cfg.overwrite and self.dir.exists():
            shutil.rmtree(self.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        write(self.dir / "settings.json", json.dumps(self.settings, indent=1))
        shutil.copy(self.script, self.dir / self.script.name)
        lines = []
        if self._load(saved, parts):
            lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
            print(f"resumed from {saved} at step {self.first}")
        elif self.cfg.resume:
            print("no checkpoint was saved yet: starting anew")
        write(log, "".join(x + "\n" for x in lines if self._is_past(x)))

    def _load(self, saved, parts):
        if not (self.cfg.resume and saved.is_file()) or self.cfg.overwrite:
            return False
        try:
            state = torch.load(saved, map_location="cpu", weights_only=True)
            for key, part in parts.items():
                part.load_state_dict(state["parts"][key])
            if processes()[0] == 0:
                torch.set_rng_state(state["rng"])
                if self.device.type == "cuda" and state["cuda_rng"] is not None:
                    torch.cuda.set_rng_state(state["cuda_rng"])
            self.first, self.seconds = state["step"], state["seconds"]
        except BadInput:
            raise
        except Exception as e:  # damaged or foreign: torch raises many kinds
            raise BadInput(f"{saved} cannot be loaded ({(str(e) or type(e).__name__).splitlines()[0][:160]}): "
                           "put a good one there, or --overwrite starts anew") from None
        return True

    def _is_past(self, line):
        try:  # a kill may have cut the last line short
            return json.loads(line)["step"] < self.first
        except (ValueError, TypeError, KeyError, RecursionError):
            return False

    def _on_signal(self, number, frame):
        if self.stop and processes()[1] == 1:  # asked twice: leave at once (torchrun does ask twice)
            raise SystemExit(128 + number)
        self.stop = number

    def elapsed(self):
        return self.seconds + time.time() - self.t0

    def print(self, text):
        self.bar.write(text) if self.bar else print(text, flush=True)

    def log(self, step, **values):
        """One JSON object to log.jsonl and one aligned line to the screen. Stops the run if the loss is not finite."""
        if not math.isfinite(values.get("loss", 0.0)):
            good = self.dir / "checkpoint.pt"
            where = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint was due before it"
            raise RunFailed(f"the loss is {values['loss']} at step {step}: start anew with a lower --lr; {where}")
        self._record(step, values)
        now = time.time() - self.t0
        left = now / max(1, step - self.first) * (self.cfg.steps - step)
        shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        self.print(f"step {step:5d}/{self.cfg.steps}  {shown}" + (f"  {left:.0f} s left" if step > self.first else ""))

    def evaluated(self, step, metrics):
        """The ruler's numbers on validation rows: all of them to log.jsonl, the main ones to the screen."""
        self._record(step, {"valid": metrics})
        top = [k for k in ("kl_pq", "kl_qp", "ce", "rouge_l", "valid", "valid_greedy", "mode_distance", "worst_gap",
                           "mean_gap", "mean_ce", "accuracy", "accuracy_uniform", "accuracy_tail") if k in metrics]
        self.print(f"step {step:5d}/{self.cfg.steps}  validation: " + "  ".join(f"{k} {metrics[k]:.3f}" for k in top))

    def _record(self, step, values):
        if processes()[0] > 0:
            return
        with open(self.dir / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "seconds": round(self.elapsed(), 2), **values}) + "\n")

    def end_step(self, step, **parts):
        """After every optimizer step (`step` are done): move the bar, save in time, leave if a signal came."""
        if self.bar:
            self.bar.update(1)
        stop = self.stop
        if processes()[1] > 1:  # a signal that reached one process stops all, at a step where they wait anyway
            stop = step % self.cfg.log_every == 0 and total(self.stop) and (self.stop or int(signal.SIGTERM))
        if stop or step % self.cfg.save_every == 0:
            self.save(step, **parts)
        if stop:
            if processes()[0] == 0:
                print(f"stopped by {signal.Signals(stop).name} after step {step}, saved: --resume goes on",
                      file=sys.stderr)
            raise SystemExit(128 + stop)

    def save(self, step, **parts):
        """Write checkpoint.pt in one piece: a full disk or a kill leaves the previous one as it was, and so does a
        parameter that is no longer finite."""
        for part in parts.values():
            if isinstance(part, torch.nn.Module) and not all(bool(p.isfinite().all()) for p in part.parameters()):
                self.log(step, loss=math.nan)  # raises, and names the last good checkpoint
        if processes()[0] > 0:
            return
        state = {"step": step, "seconds": self.elapsed(), "rng": torch.get_rng_state(),
                 "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
                 "parts": {k: v.state_dict() for k, v in parts.items()}}
        try:
            torch.save(state, self.dir / "checkpoint.tmp")
            os.replace(self.dir / "checkpoint.tmp", self.dir / "checkpoint.pt")
        except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError of its zip writer
            there = "the previous one is untouched" if (self.dir / "checkpoint.pt").exists() else "there is none yet"
            raise BadInput(f"cannot save {self.dir / 'checkpoint.pt'} at step {step} ({str(e).splitlines()[0]}): "
                           f"make room or choose another --out; {there}") from None

    def finish(self, student, tokenizer, rows, **more):
        """Save the student, print the table of `rows` {name: metrics} and the key: value block, write result.json.
        `more` is what else the result should say."""
        if self.bar:
            self.bar.close()
        keys = list(rows["after"])
        title = {"teacher": "teacher", "before": "student before", "after": "student after"}
        print(f"\n{'':<20}" + "".join(f"{title[r]:>16}" for r in rows))
        for k in keys:
            print(f"{k:<20}" + "".join(f"{rows[r][k]:16.4f}" if k in rows[r] else f"{'':16}" for r in rows))
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else peak_rss()
        result = {"method": self.script.stem, **{f"{r}.{k}": round(v, 6) for r in rows for k, v in rows[r].items()},
                  "steps": self.cfg.steps, "seconds": round(self.elapsed(), 1), "peak_gib": round(peak, 3),
                  **more}
        if processes()[0] > 0:
            dist.barrier()
            return result
        try:
            student.save_pretrained(self.dir / "student")
            tokenizer.save_pretrained(self.dir / "student")
            write(self.dir / "result.json", json.dumps(result, indent=1))
        except OSError as e:
            raise BadInput(f"cannot save the student to {self.dir} ({e.strerror}): make room, then --resume") from None
        if processes()[1] > 1:
            dist.barrier()
        print(f"saved {self.dir / 'student'}\n---\n" + "\n".join(f"{k}: {v}" for k, v in result.items()))
        return result


def write(path, text):
    """In one piece: a kill or a full disk leaves the old file or none, never half of the new one."""
    part = path.with_suffix(".tmp")
    part.write_text(text)
    os.replace(part, path)


def peak_rss():
    """Peak resident memory of this process in GiB; 0 where the platform does not tell (Windows)."""
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    except ImportError:
        return 0.0
