"""What the five method files share, and nothing of any method: settings and runs, models, data, the output
head, the sampler, the evaluation.

    python common.py compare out/a out/b    in which settings and metrics runs differ, and their curves

This file is for looking things up, in this order: settings, processes, a run, models, rows, examples,
running text, batches, head and loss, sampling, evaluation, GOLD's tasks, tiny worlds, comparing runs. To
read it, begin with `Batch` and `collate` (how text becomes tensors), `response_states` and `rowwise_loss`
(how a loss over a large vocabulary fits into memory), `sample`, and `make_evaluator`.

p is always the teacher, q always the student. Sizes: B responses, T tokens of prompt and response, P of a
prompt, N of a response, V vocabulary, H hidden, D of an attention head. R is the number of response tokens
in a whole batch, r in a chunk of it: tensors with R rows hold one row for each response token, one response
after the other. There is no padding among these rows, so none can leak into a loss.
"""
import argparse
import ast
import atexit
import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import glob
import hashlib
import inspect
import json
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm  # comes with transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
HERE = Path(__file__).resolve().parent


class BadInput(Exception):
    """Something the user can mend: one sentence with what is wrong, where, and what to do. Exit status
    2."""

    def __init__(self, sentence):
        # what a sentence quotes may be anything: 10 MB of text, line breaks, terminal codes
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", sentence)
        super().__init__(line if len(line) < 600 else line[:350] + " ... " + line[-200:])


class RunFailed(Exception):
    """The run cannot go on; the sentence names the checkpoint it can go on from. Exit status 1."""


def first_line(error):
    """Of an error's text, or of its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


# ----------------------------------------------------------------------------------------------------------
# Settings: a dataclass is the command line, the comment behind a field is its help text
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Settings:
    """What every script can set beside its own method. A script's Config adds its settings, and gives
    others of these defaults where its method wants them; in `unused` it lists those that would have no
    effect."""
    # models and data
    teacher: str = "tiny"            # model directory or hub name; tiny: the tiny world's; none: no teacher
    student: str = "tiny"            # the same; a directory with a config.json alone: random weights
    data: str = "tiny"               # .jsonl, .csv, folder of train/valid/test.jsonl, hub; tiny:N: world N
    prompt_field: str = "prompt"     # name of the prompt in a row of data
    response_field: str = "response" # name of the response; null there marks a prompt without one
    text_field: str = "text"         # name of the text in a row of a corpus
    template: str = "auto"           # text around {prompt}; auto: chat template, else a line break after it
    teacher_template: str = ""       # if the teacher is to read another template than the student
    max_prompt: int = 256            # tokens; longer prompts lose their beginning
    max_response: int = 256          # tokens; longer responses lose their end and with it EOS
    holdout: float = 0.05            # share of data without splits held out for valid, and again for test
    # system
    eval_every: int = 100            # steps between evaluations on validation rows
    eval_rows: int = 500             # most test rows to evaluate on (validation: at most 200)
    eval_temperature: float = 1.0    # of the distribution that is evaluated; metrics in _greedy have none
    kl_on: str = "samples"           # both KL on samples of the two models; references: on given responses
    log_every: int = 20              # steps between lines of the log
    save_every: int = 500            # steps between checkpoints
    cache_gib: float = 0.0           # keep the teacher's hidden states: saves its pass from epoch 2 on
    seed: int = 0                    # of data order, sampling and random weights
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # float32 or bfloat16: activations and teacher; student weights: fp32
    compile: bool = False            # torch.compile: faster steps after minutes of compiling; for long runs
    recompute: bool = False          # compute activations again for the gradient: less memory, slower
    out: str = ""                    # directory of this run; empty: out/<script and changed settings>
    resume: bool = False             # go on from the last checkpoint
    overwrite: bool = False          # delete an earlier run in the same directory first

    unused = ()


def config_fields(config_class):
    """The fields of a Config: those of its own body first, i.e. the method's, then the shared ones."""
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.name not in config_class.unused}
    own = [name for name in config_class.__dict__.get("__annotations__", {}) if name in fields]
    return {name: fields[name] for name in [*own, *[n for n in fields if n not in own]]}, own


def parse_args(config_class, argv=None):
    """Command line -> config_class(...). --lr 1e-4, --lr=1e-4, --batch-size, --batch_size and --no-compile
    work."""
    fields, own = config_fields(config_class)
    comments = {}
    for source in [c for c in reversed(config_class.__mro__) if dataclasses.is_dataclass(c)]:
        comments |= dict(re.findall(r"^    (\w+): *\w+ *=.*?# (.*)$", inspect.getsource(source), re.M))
    about = (sys.modules[config_class.__module__].__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)

    def refuse(message):
        raise BadInput(f"{message} (--help lists all settings)")

    parser.error = refuse
    groups = {True: parser.add_argument_group("the method and its optimization"),
              False: parser.add_argument_group("models, data and system, alike in all scripts")}
    for name, f in fields.items():
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        else:
            kind = dict(type=type(f.default), metavar=type(f.default).__name__)
        text = f"{comments.get(name, '')} [{f.default}]".replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        groups[name in own].add_argument(flag, default=f.default, help=text, **kind)
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        words.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        names = ["--" + n.replace("_", "-") for n in fields]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, 1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise BadInput(f"unknown setting {unknown[0]}: {hint}")
    return config_class(**vars(known))


def main(train, config_class):
    """Run a script. Exit status: 0 done, 2 bad input, 1 failed while running, 130 and 143 on SIGINT and
    SIGTERM."""
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


LIMITS = dict(
    steps=(0, 10**9), batch_size=(1, 10**9), lr=(0, 1e3), clip=(1e-9, math.inf), warmup=(0, 10**9),
    weight_decay=(0, 1e3), eval_every=(1, math.inf), log_every=(1, math.inf), save_every=(1, math.inf),
    eval_rows=(1, math.inf), holdout=(0, 0.4), max_prompt=(1, 10**9), max_response=(1, 10**9),
    seed=(0, 10**9), kl_on=["samples", "references"], dtype=["auto", "float32", "bfloat16"],
    eval_temperature=(0.05, 100))  # at 0 there would be no entropy, and no bound to KL(p||q)


def check_settings(cfg, **limits):
    """BadInput where a setting has the wrong type, is outside (lowest, highest) or none of [choices], as in
    check_settings(cfg, alpha=(0, 1), negatives=["online", "frozen"]). LIMITS has those of shared
    settings."""
    defaults = type(cfg)()
    for name in cfg.unused:
        if getattr(cfg, name) != getattr(defaults, name):
            raise BadInput(f"--{name.replace('_', '-')} has no effect in this script: leave it out")
    for f in dataclasses.fields(cfg):
        value, wanted = getattr(cfg, f.name), type(f.default)
        fits = isinstance(value, (float, int) if wanted is float else wanted)
        if not fits or isinstance(value, bool) != (wanted is bool):
            raise BadInput(f"{f.name}: a {type(value).__name__}, {wanted.__name__} is wanted")
        if wanted is str and re.search("[\0\ud800-\udfff]", value):
            raise BadInput(f"{f.name} {ascii(value)}: holds a NUL or half a surrogate pair, "
                           "which is no text")
        is_path = f.name in ("teacher", "student", "data", "out", "corpus")
        if is_path and any(len(x) > 200 for x in value.split("/")):
            raise BadInput(f"{f.name} {value}: no name of a file or directory is that long")
    shared = {name: allowed for name, allowed in LIMITS.items() if hasattr(cfg, name)}
    for name, allowed in {**shared, "accum": (1, cfg.batch_size), **limits}.items():
        value, flag = getattr(cfg, name), "--" + name.replace("_", "-")
        if isinstance(allowed, list) and value not in allowed:
            raise BadInput(f"{flag} {value}: choose one of {', '.join(allowed)}")
        if isinstance(allowed, tuple) and not allowed[0] <= value <= allowed[1]:  # nan fails too
            raise BadInput(f"{flag} {value}: must lie between {allowed[0]} and {allowed[1]}")
    n = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % (cfg.accum * n):
        times = f" times {n} processes" if n > 1 else ""
        raise BadInput(f"--batch-size {cfg.batch_size} must be a multiple of --accum {cfg.accum}{times}: "
                       "it counts the sequences of a whole optimizer step")


def compute_dtype(cfg, device):
    """--dtype auto: bf16 where CUDA has it, else fp32. Never decided by timing, so that runs repeat bit by
    bit."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def lr_at(step, cfg):
    """The learning rate of a step: linear warm-up, then a cosine down to a tenth of --lr."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup))
    progress = max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    return cfg.lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


# ----------------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc_per_node=N script.py. Alone, nothing here does anything
# ----------------------------------------------------------------------------------------------------------
# Every process holds both models, takes its share of each optimizer step, and evaluates; process 0 writes
# and prints. A wrapper around the model (DDP) is not needed, since the loops divide sums by counts.
# Models are not sharded (torch's fully_shard): the chunked head reads the whole weight of the output layer,
# losses and checkpoints would meet DTensors, and the sampler would have to move in step on all processes.
_alone = []  # not empty while process 0 works without the others


def processes():
    """(number of this process, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _alone else (0, 1)


def join_processes(wanted):
    """--device -> the device of this process. Under torchrun it joins the others; all but process 0 fall
    silent."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if n > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # else random state and peak memory would be those of GPU 0
    if n > 1 and not dist.is_initialized():
        cuda = device.startswith("cuda")
        # the others wait while process 0 builds a tiny world or lets the teacher answer: that may take
        # hours
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6),
                                device_id=torch.device(device) if cuda else None)
        atexit.register(dist.destroy_process_group)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return device


@contextlib.contextmanager
def rank0_first():
    """Process 0 runs the block alone (it builds what is cached), then the others do (they find it)."""
    rank, n = processes()
    if rank > 0:
        dist.barrier()
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()
    if rank == 0 and n > 1:
        dist.barrier()


def all_reduce_sum(x):
    """The sum of a number or tensor over all processes, in the form it came in."""
    if processes()[1] == 1:
        return x
    t = torch.as_tensor(x, dtype=None if torch.is_tensor(x) else torch.float64).detach().clone()
    t = t.cuda() if dist.get_backend() == "nccl" else t
    dist.all_reduce(t)
    return t if torch.is_tensor(x) else type(x)(t.item())


def broadcast(x):
    """What process 0 has, for decisions that must be one: numbers, lists, CPU tensors."""
    if processes()[1] == 1:
        return x
    box = [x]
    dist.broadcast_object_list(box)
    return box[0]


def reduce_gradients(model, *sums):
    """Add up the gradients of all processes, and in place the tensors `sums` that are to be logged.

    A loss is a sum over its tokens, divided by the tokens of *all* processes (`all_reduce_sum`), so adding
    is right and averaging would not be.
    """
    if processes()[1] == 1:
        return
    tensors = [p.grad for p in model.parameters() if p.grad is not None] + list(sums)
    for dtype in {t.dtype for t in tensors}:
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in same])  # one message instead of one for each parameter
        dist.all_reduce(flat)
        for t, reduced in zip(same, flat.split([t.numel() for t in same])):
            t.copy_(reduced.view_as(t))


def noise_seed(seed, step):
    """A seed for sampling in one step: with several processes each has a stream of its own."""
    return 10**9 * seed + step + 10**15 * processes()[0]


# ----------------------------------------------------------------------------------------------------------
# A run: its directory, log, checkpoints and signals
# ----------------------------------------------------------------------------------------------------------
HEADLINES = ("kl_pq", "kl_qp", "ce", "rouge_l", "valid", "valid_mass", "valid_greedy", "exact_match",
             "exact_match_greedy", "mode_distance", "worst_gap", "mean_gap", "mean_ce", "accuracy",
             "accuracy_uniform", "accuracy_tail")


class Run:
    """out/<name>/ with settings.json, log.jsonl, a copy of the script, checkpoint.pt, result.json and the
    student.

    The constructor only looks, since bad input must overwrite nothing; `start` creates the directory, or
    resumes.
    """
    FREE = ("out", "resume", "overwrite", "device", "compile")  # may change on resuming

    def __init__(self, cfg, script):
        self.cfg, self.script, self.t0, self.seconds = cfg, Path(script), time.time(), 0.0
        self.finished, self.bar, self.stop, self.first = None, None, 0, 0
        try:
            self.device = torch.device(join_processes(cfg.device))
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError, AttributeError):  # absent, unknown, or torch lacks it
            raise BadInput(f"--device {cfg.device}: not usable on this machine; "
                           "leave it out for auto") from None
        fields, _ = config_fields(type(cfg))
        values = {name: getattr(cfg, name) for name in fields}
        changed = {name: v for name, v in values.items() if v != fields[name].default}
        self.dir = Path(cfg.out or f"out/{self._name(changed)}")
        self.settings = {"script": self.script.stem}
        self.settings |= {k: v for k, v in values.items() if k not in self.FREE}
        self.settings["dtype"] = str(compute_dtype(cfg, self.device))  # "auto" must not change on resuming
        print("\n".join(f"{'*' if name in changed else ' '} {name:<20}{v}" for name, v in values.items()))
        print(f"run directory: {self.dir}")
        self._look()
        torch.manual_seed(cfg.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what stays in fp32

    def _name(self, changed):
        parts = [f"{k}={str(v).replace('/', '_')}" for k, v in changed.items() if k not in self.FREE]
        name = "-".join([self.script.stem, *parts])
        return name if len(name) < 100 else name[:80] + hashlib.sha1(name.encode()).hexdigest()[:12]

    def _look(self):
        """BadInput if this run may not use its directory; the result, if there is one, becomes
        `finished`."""
        if self.dir.exists() and not self.dir.is_dir():
            raise BadInput(f"{self.dir} is a file: choose another --out")
        if not (self.dir / "settings.json").is_file():
            # .tmp: what a run leaves that was killed at its very start
            if self.dir.exists() and any(f.suffix != ".tmp" for f in self.dir.iterdir()):
                raise BadInput(f"{self.dir} is not empty and holds no settings.json of a run: "
                               "choose another --out")
            if self.cfg.resume:
                raise BadInput(f"--resume: there is no run in {self.dir}")
            return
        if self.cfg.overwrite:
            return
        there = self._read("settings.json")
        other = [f"{k} was {there.get(k)}, is {self.settings.get(k)}" for k in {**there, **self.settings}
                 if there.get(k) != self.settings.get(k)]
        if other:
            raise BadInput(f"{self.dir} has other settings ({'; '.join(other)}): "
                           "choose a new --out or --overwrite")
        if (self.dir / "result.json").is_file():
            self.finished = self._read("result.json")
            print("this run is finished (--overwrite runs it again); its result:\n---")
            print("\n".join(f"{k}: {v}" for k, v in self.finished.items()))
        elif not self.cfg.resume:
            raise BadInput(f"{self.dir} holds an unfinished run: --resume goes on with it, "
                           "--overwrite starts anew")

    def _read(self, name):
        try:
            return dict(json.loads((self.dir / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            raise BadInput(f"{self.dir / name} is damaged: choose another --out, or --overwrite") from None

    def start(self, first=0, **parts):
        """Create the directory, or with --resume load the last checkpoint into `parts`: anything with
        state_dict and load_state_dict. Returns the next step. `first` is that of a new run: negative where
        something else is done before step 0 of the training. BadInput where a checkpoint is damaged or the
        directory not writable."""
        self.first = first
        rank, n = processes()
        if n > 1:
            torch.manual_seed(self.cfg.seed + rank)  # dropout differs, the weights were made before
            dist.barrier()  # all have looked before the directory changes
        try:
            if rank == 0:
                self._prepare(parts)
            else:
                self._load(parts)
        except OSError as e:
            raise BadInput(f"cannot write to {self.dir} ({e.strerror}): choose another --out") from None
        self.t0 = time.time()
        if sys.stdout.isatty():
            self.bar = tqdm(total=self.cfg.steps, initial=self.first, unit="step", dynamic_ncols=True)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)
        return self.first

    def _prepare(self, parts):
        """Of process 0: make the directory, load a checkpoint, cut the log back to its step."""
        if self.cfg.overwrite and self.dir.exists():
            shutil.rmtree(self.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        write(self.dir / "settings.json", json.dumps(self.settings, indent=1))
        shutil.copy(self.script, self.dir / self.script.name)
        log, lines = self.dir / "log.jsonl", []
        if self._load(parts):
            lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
            print(f"resumed from {self.dir / 'checkpoint.pt'} at step {self.first}")
        elif self.cfg.resume:
            print("no checkpoint was saved yet: starting anew")
        write(log, "".join(line + "\n" for line in lines if self._is_past(line)))

    def _load(self, parts):
        """Load checkpoint.pt into `parts`, if this run resumes and there is one: whether it did."""
        saved = self.dir / "checkpoint.pt"
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
            raise BadInput(f"{saved} cannot be loaded ({first_line(e)}): "
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
        """Seconds of this run, those before a resumption included."""
        return self.seconds + time.time() - self.t0

    def print(self, text):
        self.bar.write(text) if self.bar else print(text, flush=True)

    def log(self, step, **values):
        """A line to log.jsonl and one to the screen. RunFailed if the loss of this logged step is not
        finite."""
        if not math.isfinite(values.get("loss", 0.0)):
            self.fail(step, f"the loss is {values['loss']}")
        self._record(step, values)
        now = time.time() - self.t0
        left = now / max(1, step - self.first) * (self.cfg.steps - step)
        shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        self.print(f"step {step:5d}/{self.cfg.steps}  {shown}"
                   + (f"  {left:.0f} s left" if step > self.first else ""))

    def fail(self, step, what):
        good = self.dir / "checkpoint.pt"
        there = good.exists()
        where = f"the last good checkpoint is {good}" if there else "no checkpoint was due before it"
        raise RunFailed(f"{what} at step {step}: start anew with a lower --lr; {where}")

    def evaluated(self, step, metrics):
        """The evaluator's numbers on validation rows: all of them to log.jsonl, the main ones to the
        screen."""
        self._record(step, {"valid": metrics})
        shown = "  ".join(f"{k} {metrics[k]:.3f}" for k in HEADLINES if k in metrics)
        self.print(f"step {step:5d}/{self.cfg.steps}  validation: {shown}")

    def _record(self, step, values):
        if processes()[0] > 0:
            return
        with open(self.dir / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "seconds": round(self.elapsed(), 2), **values}) + "\n")

    def end_step(self, step, **parts):
        """After every optimizer step (`step` are done): move the bar, save in time, leave if a signal
        came."""
        if self.bar:
            self.bar.update(1)
        stop = self.stop
        if processes()[1] > 1:  # a signal to one process stops all, at a step where they wait anyway
            stop = step % self.cfg.log_every == 0 and all_reduce_sum(self.stop)
            stop = stop and (self.stop or int(signal.SIGTERM))
        if stop or step % self.cfg.save_every == 0:
            self.save(step, **parts)
        if stop:
            if processes()[0] == 0:
                print(f"stopped by {signal.Signals(stop).name} after step {step}, saved: --resume goes on",
                      file=sys.stderr)
            raise SystemExit(128 + stop)

    def check_finite(self, step, *parts):
        """RunFailed if a weight of a model among `parts` is infinite or NaN."""
        for part in parts:
            weights = part.parameters() if isinstance(part, torch.nn.Module) else ()
            if not all(bool(p.isfinite().all()) for p in weights):
                self.fail(step, "a weight is no longer a finite number")

    def save(self, step, **parts):
        """Write checkpoint.pt in one piece: a full disk or a kill leaves the previous one as it was, and so
        does a weight that is no longer finite."""
        self.check_finite(step, *parts.values())
        if processes()[0] > 0:
            return
        state = {"step": step, "seconds": self.elapsed(), "rng": torch.get_rng_state(),
                 "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
                 "parts": {k: v.state_dict() for k, v in parts.items()}}
        file = self.dir / "checkpoint.pt"
        try:
            torch.save(state, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
        except (OSError, RuntimeError) as e:  # a full disk is a RuntimeError of torch's zip writer
            there = "the previous one is untouched" if file.exists() else "there is none yet"
            raise BadInput(f"cannot save {file} at step {step} ({first_line(e)}): "
                           f"make room or choose another --out; {there}") from None

    def finish(self, student, tokenizer, rows, **more):
        """Save the student, print the table of `rows` {name: metrics} and the key: value block, write
        result.json. `more` is what else the result should say."""
        if self.bar:
            self.bar.close()
        self.check_finite(self.cfg.steps, student)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else peak_rss()
        metrics = {f"{r}.{k}": round(v, 6) for r in rows for k, v in rows[r].items()}
        result = {"method": self.script.stem, **metrics, "steps": self.cfg.steps,
                  "seconds": round(self.elapsed(), 1), "peak_gib": round(peak, 3), **more}
        if processes()[0] > 0:
            dist.barrier()
            return result
        print(table(rows))
        try:
            student.save_pretrained(self.dir / "student")
            tokenizer.save_pretrained(self.dir / "student")
            write(self.dir / "result.json", json.dumps(result, indent=1))
        except OSError as e:
            raise BadInput(f"cannot save the student to {self.dir} ({e.strerror}): "
                           "make room, then --resume") from None
        if processes()[1] > 1:
            dist.barrier()
        moved = moved_most(rows["before"], rows["after"])
        print(f"{moved}; the curves: python common.py compare {self.dir}")
        print(f"saved {self.dir / 'student'}\n---\n" + "\n".join(f"{k}: {v}" for k, v in result.items()))
        return result


def table(rows):
    """{name: metrics} -> text with a line for each metric and a column for each name."""
    titles = {"before": "student before", "after": "student after"}
    names = list(dict.fromkeys(k for metrics in rows.values() for k in metrics))
    lines = [f"\n{'':<20}" + "".join(f"{titles.get(r, r):>16}" for r in rows)]
    for k in names:
        lines.append(f"{k:<20}" + "".join(f"{m[k]:16.4f}" if k in m else " " * 16 for m in rows.values()))
    return "\n".join(lines)


def moved_most(before, after):
    """One line that says which headline changed most, relative to its larger value."""
    change = {k: abs(after[k] - before[k]) / (max(abs(after[k]), abs(before[k])) or 1)
              for k in HEADLINES if k in before and k in after}
    if not change:
        return "no headline metric was measured"
    k = max(change, key=change.get)
    return f"moved most: {k}, {before[k]:.3f} -> {after[k]:.3f}"


def write(path, text):
    """In one piece: a kill or a full disk leaves the old file or none, never half of the new one."""
    part = path.with_suffix(".tmp")
    part.write_text(text)
    os.replace(part, path)


def peak_rss():
    """Peak resident memory of this process in GiB; 0 where the platform does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ----------------------------------------------------------------------------------------------------------
# Models and tokenizers
# ----------------------------------------------------------------------------------------------------------
SAFE = {"trust_remote_code": False}  # else transformers would ask on the terminal about foreign code


def load_model(path, device, dtype=torch.float32, role="student", seed=0):
    """A Hugging Face causal or encoder-decoder model in eval mode, on `device`, with `dtype` weights.

    A student's directory with a config.json but no weights gives random weights, which is said in a line.
    """
    try:
        config = AutoConfig.from_pretrained(path, **SAFE)
    except (OSError, ValueError, KeyError) as e:
        raise BadInput(f"--{role} {path}: no model can be loaded from there ({first_line(e)})") from None
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    here = Path(path)
    if not here.is_dir() or any(f.suffix in (".safetensors", ".bin") for f in here.iterdir()):
        try:
            model = auto.from_pretrained(path, dtype=dtype, weights_only=True, **SAFE)
        except Exception as e:  # damaged or foreign weights: transformers and safetensors raise many kinds
            raise BadInput(f"--{role} {path}: the weights cannot be loaded ({first_line(e)})") from None
    elif role == "student":
        print(f"{path} holds no weights: the student starts from random ones")
        torch.manual_seed(seed)
        model = auto.from_config(config).to(dtype)
    else:
        raise BadInput(f"--{role} {path}: config.json is there, but no weights (*.safetensors or *.bin)")
    model = model.to(device).eval()  # from_config gives train mode: dropout
    model.vocab = model.get_output_embeddings().weight.shape[0]  # load_pair cuts it to the common size
    check_head(model, path, role)
    return model


@torch.no_grad()
def check_head(model, path, role):
    """BadInput for a model whose logits are not head(hidden states), on which all losses here rely."""
    batch = collate([Example([3, 4, 5, 6], [3, 4, 5, 6], [4, 3, 5])], model).to(model.device)
    try:
        ours = head_logits(model, response_states(model)(batch))
        if model.config.is_encoder_decoder:
            theirs = model(input_ids=batch.tokens, attention_mask=batch.mask,
                           decoder_input_ids=batch.decoder_tokens).logits[0]
        else:
            theirs = model(input_ids=batch.tokens).logits[0, batch.positions]
            cache = preallocated_cache(model.config)
            keeps_keys = all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    except (AttributeError, TypeError) as e:
        raise BadInput(f"--{role} {path}: {type(model).__name__} is not built as the models that can be "
                       f"used here ({first_line(e)}): choose a transformer such as GPT-2, "
                       "Llama, Qwen or T5") from None
    if not model.config.is_encoder_decoder and not keeps_keys:
        raise BadInput(f"--{role} {path}: {type(model).__name__} keeps a state that is no cache of keys "
                       "and values, which the sampler cannot cut rows from: "
                       "choose a transformer such as GPT-2, Llama or Qwen")
    if (ours - theirs.float()).abs().max() > 0.02 * theirs.float().abs().max() + 1e-3:
        raise BadInput(f"--{role} {path}: {type(model).__name__} changes its logits after the output head "
                       "(soft-capping or a logit scale), which the chunked losses here do not do: "
                       "choose another")


def load_tokenizer(path, role):
    """The tokenizer of a model's directory or hub name, or one sentence with what it lacks."""
    files = [f.name for f in Path(path).iterdir()] if Path(path).is_dir() else ["tokenizer.json"]
    try:  # transformers would make an empty tokenizer up from config.json alone
        if not any(re.match(r"tokenizer|vocab|spiece|sentencepiece", f) for f in files):
            raise OSError("no tokenizer.json or other vocabulary file")
        tokenizer = AutoTokenizer.from_pretrained(path, **SAFE)
    except Exception as e:  # transformers raises a dozen kinds here
        raise BadInput(f"--{role} {path}: no tokenizer there ({first_line(e)}); "
                       "save one beside the model") from None
    if tokenizer.eos_token_id is None:
        raise BadInput(f"--{role} {path}: the tokenizer has no end-of-sequence token, "
                       "so no response could end")
    end_as_in_chat(tokenizer, path)
    return tokenizer


def end_as_in_chat(tokenizer, path):
    """Let EOS be what ends an answer of a chat model. Gemma's and Phi-3's tokenizers name another token, that
    of a whole text, and only the generation config lists both."""
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):  # a model without one
        return
    if not (tokenizer.chat_template and isinstance(ends, list)):
        return
    mark = "\ue000"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).partition(mark)[2]
    ids = tokenizer(after, add_special_tokens=False).input_ids
    if ids and ids[0] in ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])


def bos_of(tokenizer):
    """[BOS] for a tokenizer that puts it before every text, else []: Gemma and Llama know no text without."""
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


PROBE = ("The quick brown fox: jumps over 13 lazy dogs, naïve café!\n"
         "\tdef f(x): return x ** 2  # describe name ada ;")


def load_pair(cfg, device, same_tokens=True, world="answers"):
    """(student in fp32, teacher in the compute dtype and frozen or None, the student's tokenizer), in eval
    mode.

    Methods that compare distributions need tokenizers that agree, which is checked on a probe text. Heads
    padded to different sizes are cut to the smaller (`model.vocab`); both models renormalise over those V
    tokens. `world` is the tiny world that "tiny" means.
    """
    paths = {role: resolve(getattr(cfg, role), role, cfg.data, world) for role in ("student", "teacher")}
    tokenizer = load_tokenizer(paths["student"], "student")
    student = load_model(paths["student"], device, seed=cfg.seed)
    if student.config.is_encoder_decoder and bos_of(tokenizer):
        raise BadInput(f"--student {paths['student']}: begins every response with {tokenizer.bos_token}, as "
                       "BART does, which the responses here do not: choose a T5-like or decoder-only model")
    if cfg.recompute:
        recompute(student)
    teacher = None
    if cfg.teacher != "none":
        teacher = load_model(paths["teacher"], device, compute_dtype(cfg, device), "teacher")
        teacher.requires_grad_(False)
    size = sum(model.num_parameters() for model in (student, teacher) if model is not None)
    if device.type == "cpu" and size < 10**6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on several the steps of such models take longer, beside other work much
    if teacher is not None and same_tokens:
        other = load_tokenizer(paths["teacher"], "teacher")
        both = f"--teacher {paths['teacher']} and --student {paths['student']}"
        if tokenizer(PROBE).input_ids != other(PROBE).input_ids:
            raise BadInput(f"{both} have different tokenizers, so their token distributions cannot be "
                           "compared: choose two models of one family")
        if tokenizer.eos_token_id != other.eos_token_id:
            raise BadInput(f"{both} end a response with different tokens, {other.eos_token} and "
                           f"{tokenizer.eos_token}: choose two chat models or two base models of one family")
        student.vocab = teacher.vocab = min(student.vocab, teacher.vocab)
    return student, teacher, tokenizer


def fingerprint(model):
    """A short hash of the configuration, the vocabulary in use, and a sample of every weight."""
    h = hashlib.sha1((model.config.to_json_string() + str(model.vocab)).encode())
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        h.update(name.encode() + flat[::max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def recompute(model):
    """Let the layers of a model forget their activations and compute them again in the backward pass.

    transformers' own switch works in training mode only and turns the sampler's cache off; here it is the
    gradient that decides. Dropout draws the same again.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise BadInput(f"--recompute: {type(model).__name__} has no layers that can be computed again: "
                       "leave it out")
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward, *args, **kwargs):
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------------
# Rows of data: files, folders, saved data sets and the hub
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Example:
    prompt: list            # token ids of the prompt as the student reads it
    teacher_prompt: list    # the same object, unless the teacher reads another template
    response: list          # token ids with EOS; without EOS where it was cut; [] where there is none
    row: dict = field(default_factory=dict)


def lines_of(path):
    """(number, text) of each line of a UTF-8 file."""
    with open(path, "rb") as f:
        for at, raw in enumerate(f, 1):
            try:
                yield at, raw.decode("utf-8-sig" if at == 1 else "utf-8")
            except UnicodeDecodeError:
                raise BadInput(f"{path}:{at}: not valid UTF-8: convert the file to UTF-8, "
                               "or leave it out") from None


def read_records(path):
    """(where, record) of each row of a JSONL or CSV file. Read with the standard library, since `datasets`
    guesses types: of a CSV cell NA or null it makes nothing, of a date no text, and its errors do not name
    the line."""
    path, at = Path(path), 0
    try:
        if path.suffix == ".csv":
            reader = csv.DictReader((line for _, line in lines_of(path)), strict=True)
            for record in reader:
                at = reader.line_num
                yield f"{path}:{at}", record
        else:
            for at, line in lines_of(path):
                if line.strip():
                    yield f"{path}:{at}", json.loads(line)
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError, csv.Error) as e:
        raise BadInput(f"{path}:{at}: {first_line(e)}: one JSON object a line (or "
                       "valid CSV) is wanted") from None


def text_of(record, name, where, flag, optional=False):
    """The string under `name` of a raw record, or one sentence with what is wrong with it."""
    if not isinstance(record, dict):
        raise BadInput(f"{where}: a {type(record).__name__}, not an object with a field {name!r}")
    if name not in record:
        raise BadInput(f"{where}: no field {name!r} (there: "
                       f"{', '.join(map(str, record))[:80] or 'nothing'}): name it with {flag}")
    text = record[name]
    if text is None and optional:
        return None
    if not isinstance(text, str):
        raise BadInput(f"{where}: field {name!r} is a {type(text).__name__}, a string is wanted")
    if re.search("[\ud800-\udfff]", text):
        raise BadInput(f"{where}: field {name!r} holds half a surrogate pair, which is no text: remove it")
    return text


def prompt_and_response(record, where, cfg):
    """A raw record -> row: prompt, response or None; where there are any, the right responses (references)
    and, from a tiny world, how probable each of them is (probs)."""
    row = {"prompt": text_of(record, cfg.prompt_field, where, "--prompt-field"),
           "response": text_of(record, cfg.response_field, where, "--response-field", optional=True)}
    right = record.get("references") or []
    right = right if isinstance(right, list) else [right]
    if right:
        row["references"] = [text_of({"references": text}, "references", where, "") for text in right]
    if "probs" in record:
        row["probs"] = record["probs"]
        if not isinstance(row["probs"], list) or len(row["probs"]) != len(right) or not right:
            raise BadInput(f"{where}: field 'probs' is not a list with a number for each of 'references': "
                           "leave it out")
    return row


def load_rows(cfg, world="answers", read=prompt_and_response, names=None):
    """{"train", "valid", "test": rows} from a folder of JSONL files, one JSONL or CSV file, a saved data
    set or the hub. Data without splits is split by a hash of the prompt: no prompt is in two splits, and
    the splits are the same for every seed. `read` makes a row of a raw record; `names` {theirs: ours} are
    the splits to use of a saved or hub data set."""
    path = Path(resolve(cfg.data, "data", cfg.data, world))
    if path.is_file() or path.suffix in (".jsonl", ".json", ".csv", ".txt"):
        if not path.exists():
            raise BadInput(f"--data {cfg.data}: no such file")
        found = {"train": read_records(path)}
    elif (path / "train.jsonl").is_file():
        found = {s: read_records(path / f"{s}.jsonl") for s in ("train", "valid", "test")
                 if (path / f"{s}.jsonl").is_file()}
    else:
        loaded = hub_data(cfg.data)
        loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
        names = names or {s: s.replace("validation", "valid") for s in loaded}
        records = lambda s: ((f"{cfg.data}, {s} row {i}", dict(r)) for i, r in enumerate(loaded[s]))
        found = {ours: records(theirs) for theirs, ours in names.items() if theirs in loaded}
    splits = {s: [read(record, where, cfg) for where, record in records] for s, records in found.items()}
    if "train" not in splits:
        raise BadInput(f"--data {cfg.data}: no split is called train (there: {', '.join(splits)})")
    everything = splits["train"]
    if not everything:
        raise BadInput(f"--data {cfg.data}: there are no rows in it")
    draw = [zlib.crc32(r["prompt"].encode()) % 1000 for r in everything]
    lacking, cut = [s for s in ("test", "valid") if s not in splits], 1000 * cfg.holdout
    for i, s in enumerate(lacking):
        splits[s] = [r for r, x in zip(everything, draw) if i * cut <= x < (i + 1) * cut]
    splits["train"] = [r for r, x in zip(everything, draw) if x >= len(lacking) * cut]
    for s in ("train", "valid", "test"):
        if not splits[s]:
            raise BadInput(f"--data {cfg.data}: of {len(everything)} none is left for {s}: "
                           "add rows or set --holdout")
    return splits


def hub_data(name, split=None, **options):
    """A saved data set or one on the hub (owner/name, owner/name/folder, either with :configuration), all
    its splits by name or one `split`."""
    import datasets  # only here: everything else runs without it
    repository, _, configuration = name.partition(":")
    folder = "/".join(repository.split("/")[2:])
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
            return loaded[split] if split and isinstance(loaded, dict) else loaded
        return datasets.load_dataset("/".join(repository.split("/")[:2]), configuration or None,
                                     split=split, data_dir=folder or None, **options)
    except Exception as e:  # absent, offline, damaged, gated: many kinds
        raise BadInput(f"{name}: neither a file, a folder, a pattern nor a saved or hub data set "
                       f"({first_line(e)})") from None


# ----------------------------------------------------------------------------------------------------------
# From rows to examples: token ids with the template around the prompt
# ----------------------------------------------------------------------------------------------------------
def prompt_encoder(tokenizer, template, model, max_prompt):
    """A function text -> token ids of the whole prompt: template around it, too long content cut from the
    left.

    User text never becomes a control token: special tokens are recognised in the template's own parts only.
    """
    ids = lambda text, **kw: tokenizer(text, add_special_tokens=False, **kw).input_ids if text else []
    is_encdec, mark = model.config.is_encoder_decoder, "\ue000"
    if template == "auto" and tokenizer.chat_template:  # it writes its own begin-of-sequence token
        chat = [{"role": "user", "content": mark}]
        # Llama's template writes the date into every prompt: let it be the same tomorrow
        whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True,
                                              date_string="26 Jul 2024")
        start, found, end = whole.partition(mark)
        if not found:
            raise BadInput("the tokenizer's chat template drops the user's message: "
                           "give a --template of your own")
        start, end = ids(start), ids(end)
    else:
        default = "{prompt}" if is_encdec else "{prompt}\n"
        template = default if template == "auto" else template.replace("\\n", "\n")
        if template.count("{prompt}") != 1:
            raise BadInput(f"--template {template!r}: it must hold {{prompt}} exactly once")
        before, after = template.split("{prompt}")
        bare, whole = ids("a"), tokenizer("a").input_ids  # what the tokenizer puts around a text by itself
        at = next((i for i in range(len(whole)) if whole[i:i + len(bare)] == bare), 0)
        start = whole[:at] + ids(before)
        end = ids(after) + (whole[at + len(bare):] if is_encdec else [])
    room = max_prompt - len(start) - len(end)
    if room < 1:
        raise BadInput(f"--max-prompt {max_prompt}: the template alone takes {len(start + end)} tokens")

    def encode(text):
        content = ids(text, split_special_tokens=True)
        encode.cut += len(content) > room
        return start + content[-room:] + end or [tokenizer.eos_token_id]  # a decoder must start somewhere

    encode.cut = 0
    return encode


def row_encoder(cfg, student, teacher, tokenizer):
    """A function row -> Example; its attributes count what was cut or empty."""
    for model, role in ((student, "student"), (teacher, "teacher")):
        context = context_of(model)
        if not context:
            continue
        parts = cfg.max_prompt, cfg.max_response
        if (max(parts) if model.config.is_encoder_decoder else sum(parts)) > context:
            raise BadInput(f"--max-prompt {cfg.max_prompt} and --max-response {cfg.max_response} do not "
                           f"fit the {role}'s context of {context} tokens: lower them")
    encode = encode_for_teacher = prompt_encoder(tokenizer, cfg.template, student, cfg.max_prompt)
    teacher = teacher or student
    # without a template of its own, too, a T5 ends its prompt otherwise than a decoder-only model
    mixed = teacher.config.is_encoder_decoder != student.config.is_encoder_decoder
    if cfg.teacher_template or mixed:
        encode_for_teacher = prompt_encoder(tokenizer, cfg.teacher_template or cfg.template, teacher,
                                            cfg.max_prompt)

    def example(row):
        plain = tokenizer(row["response"] or "", add_special_tokens=False, split_special_tokens=True)
        response = plain.input_ids
        if response:  # cut from the right, where EOS gets lost
            response = (response + [tokenizer.eos_token_id])[:cfg.max_response]
            example.cut += response[-1] != tokenizer.eos_token_id
        example.empty += row["response"] is not None and not response
        prompt = encode(row["prompt"])
        example.cut_prompts = encode.cut
        same = encode_for_teacher is encode
        return Example(prompt, prompt if same else encode_for_teacher(row["prompt"]), response, row)

    example.cut = example.empty = example.cut_prompts = 0
    return example


def spread(rows, most):
    """All rows or so many of them, evenly spread: the first ones may all be of one source."""
    chosen = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    return [rows[i] for i in chosen]


def context_of(model):
    """How many positions a model has; None if it has no limit, or there is no model."""
    if model is None:
        return None
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def load_data(cfg, student, teacher, tokenizer):
    """SimpleNamespace(train, valid, test) of lists of Examples, tokenised once; says what was cut or
    dropped."""
    encode, splits = row_encoder(cfg, student, teacher, tokenizer), load_rows(cfg)
    splits["valid"] = spread(splits["valid"], min(cfg.eval_rows, 200))
    splits["test"] = spread(splits["test"], cfg.eval_rows)
    data = SimpleNamespace(**{s: [encode(row) for row in rows] for s, rows in splits.items()})
    print(f"data: {len(data.train)} training prompts, {sum(bool(e.response) for e in data.train)} with a "
          f"response; {len(data.valid)} validation, {len(data.test)} test rows; "
          f"cut to fit: {encode.cut_prompts} prompts, {encode.cut} responses; "
          f"{encode.empty} empty responses",
          flush=True)
    return data


# ----------------------------------------------------------------------------------------------------------
# Running text: documents -> packed sequences of tokens (ddk.py's domains, dpkd.py's corpus)
# ----------------------------------------------------------------------------------------------------------
def documents(source, cfg):
    """The documents of a text file (separated by blank lines), a folder or pattern (each file is one), a
    .jsonl, a saved data set, or one on the hub (owner/name, owner/name/folder, owner/name:configuration; it
    is streamed)."""
    files = files_of(source)
    if files == [] or files is None and Path(source).suffix in (".txt", ".jsonl", ".md", ".py"):
        raise BadInput(f"{source}: there is no such file")
    for file in files or []:
        try:
            if not file.stat().st_size:
                raise BadInput(f"{file}: the file is empty: remove it or leave it out")
            yield from file_documents(file, cfg, whole=file != Path(source).expanduser())
        except OSError as e:
            raise BadInput(f"{file}: cannot be read ({e.strerror})") from None
    if files:
        return
    loaded = hub_data(source, split="train", streaming=True)
    for i, record in enumerate(loaded):
        yield text_of(record, cfg.text_field, f"{source}, row {i}", "--text-field")


def files_of(source):
    """The files behind a path or a pattern such as src/**/*.py; None if it is neither."""
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return [path]
        saved = any((path / f).is_file() for f in ("dataset_info.json", "dataset_dict.json"))
        if path.is_dir() and not saved:
            return [p for p in sorted(path.rglob("*")) if p.is_file()]
        if glob.has_magic(source):
            return [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    except OSError as e:  # a folder with something that may not be looked at
        raise BadInput(f"{source}: {e.filename} cannot be read ({e.strerror})") from None
    return None


def file_documents(file, cfg, whole):
    """The rows of a .jsonl; of another file all its text, or the parts between its blank lines."""
    if file.suffix == ".jsonl":
        for where, record in read_records(file):
            yield text_of(record, cfg.text_field, where, "--text-field")
        return
    waiting = []
    for at, line in lines_of(file):
        if "\0" in line:
            raise BadInput(f"{file}:{at}: a binary file, text is wanted: leave it out")
        if whole or line.strip():
            waiting.append(line)
        elif waiting:
            yield "".join(waiting)
            waiting = []
    if waiting:
        yield "".join(waiting)


def load_corpus(source, tokenizer, cfg):
    """Examples for plain language modelling: blocks of --max-response tokens of the documents of `source`,
    EOS after each document; BOS, or where the tokenizer adds none EOS, is the prompt of each block."""
    eos, n = tokenizer.eos_token_id, cfg.max_response
    prompt = bos_of(tokenizer) or [eos]
    texts = (text.strip() for text in documents(source, cfg))
    encode = lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    tokens = [t for text in texts if text for t in encode(text) + [eos]]
    if not tokens:
        raise BadInput(f"{source}: there is no text in it")
    return [Example(prompt, prompt, tokens[i:i + n]) for i in range(0, len(tokens), n)]


def parse_pairs(text, flag):
    """"code=src,prose=notes.txt" -> {"code": "src", "prose": "notes.txt"}."""
    found = {}
    for part in text.split(","):
        name, equals, value = (x.strip() for x in part.partition("="))
        if not (re.fullmatch(r"[\w.-]+", name) and equals and value):
            raise BadInput(f"{flag} {part!r}: name=value is wanted, with a comma between two of them")
        if name in found:
            raise BadInput(f"{flag}: the name {name} is given twice")
        found[name] = value
    return found


def domain_sources(cfg, world):
    """{name: source} of --domains, or of the folder --data with a file or folder for each domain."""
    if cfg.domains:
        return parse_pairs(cfg.domains, "--domains")
    path = Path(resolve(cfg.data, "data", cfg.data, world))
    if not path.is_dir():
        raise BadInput(f"--data {path}: neither a tiny world (tiny, tiny:N) nor a folder with a file or "
                       "folder for each domain; to name them one by one use --domains "
                       "name=source,name=source")
    found = {}
    for p in sorted(path.iterdir()):
        if p.stem in found:
            raise BadInput(f"--data {path}: {Path(found[p.stem]).name} and {p.name} are both called "
                           f"{p.stem}: rename one")
        if not p.name.startswith("."):
            found[p.stem] = str(p)
    return found


def load_domains(cfg, student, teacher, tokenizer, world="domains"):
    """SimpleNamespace(names, train, valid, test, bos, sha1). train {name: (sequences, --max-tokens) of
    tokens, mapped into memory}; valid and test {name: at most --gap-rows and --eval-rows Examples, spread
    over the split}; bos as in `bos_of`, for `sequence`."""
    bos = bos_of(tokenizer)
    for model, role in ((student, "student"), (teacher, "teacher")):
        context = context_of(model)
        if model is not None and model.config.is_encoder_decoder:
            raise BadInput(f"the {role} is an encoder-decoder: running text needs a decoder-only model")
        if context and len(bos) + cfg.max_tokens > context:
            raise BadInput(f"--max-tokens {cfg.max_tokens} does not fit the {role}'s context of {context} "
                           "tokens")
    sources = domain_sources(cfg, world)
    if len(sources) < 2:
        raise BadInput(f"a mixture needs two domains or more, there is {len(sources)} "
                       f"({', '.join(sources) or 'none'})")
    data = SimpleNamespace(names=list(sources), train={}, valid={}, test={}, bos=bos)
    digest = hashlib.sha1()
    with rank0_first():
        packed = {name: pack(name, source, tokenizer, cfg) for name, source in sources.items()}
    for name, (splits, sha1) in packed.items():
        digest.update(name.encode() + sha1.encode())
        data.train[name] = splits["train"]
        data.valid[name] = [sequence(tokens, bos) for tokens in spread(splits["valid"], cfg.gap_rows)]
        data.test[name] = [sequence(tokens, bos) for tokens in spread(splits["test"], cfg.eval_rows)]
    data.sha1 = digest.hexdigest()[:12]
    shown = [f"{n} {len(data.train[n])} {len(data.valid[n])} {len(data.test[n])}" for n in data.names]
    print(f"{cfg.max_tokens}-token sequences (train valid test): "
          f"{', '.join(shown)}; corpus {data.sha1}", flush=True)
    return data


def sequence(tokens, bos):
    """Packed tokens -> Example: BOS, if there is one, and the first token are the prompt, the others the
    response."""
    tokens = [int(t) for t in tokens]
    prompt = bos + tokens[:1]
    return Example(prompt, prompt, tokens[1:])


SPLITS = ("train", "valid", "test")
PIECE = 2**22  # characters of text that `pack` holds at a time


def split_of(text, holdout):
    """Which split a document belongs to: a function of its text alone, the same for every seed."""
    draw, cut = zlib.crc32(text.encode()) % 1000, 1000 * holdout
    return "test" if draw < cut else "valid" if draw < 2 * cut else "train"


def pack(name, source, tokenizer, cfg):
    """({split: (sequences, --max-tokens) tokens, mapped into memory}, sha1 of the text) of one domain.

    Different documents go one after the other, EOS behind each, into a file of 16- or 32-bit tokens: a
    corpus may be larger than memory. Which split a document is in depends on a hash of its text; where that
    leaves a split without a sequence (one long book, a server's log), the text is split by position. The
    files are kept in the cache under the tokenizer and the path, size and time of every source file.
    """
    vocabulary = hashlib.sha1(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    # of a saved data set all its files; the hub has none here
    files = files_of(source) or [f for f in sorted(Path(source).rglob("*")) if f.is_file()]
    stamp = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    n, dtype = cfg.max_tokens, np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    spelled = tokenizer.eos_token_id, tokenizer(PROBE).input_ids  # the same words may be cut otherwise
    key = json.dumps([stamp or source, vocabulary, spelled, cfg.domain_tokens, cfg.holdout, cfg.text_field])
    target = cache_dir() / f"packed-{name}-{hashlib.sha1(key.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        print(f"packing domain {name}: {source} ...", flush=True)
        part = Path(tempfile.mkdtemp(prefix="packing-", dir=cache_dir()))
        try:
            write_tokens(part, source, tokenizer, cfg, dtype)
            os.replace(part, target)
        except BadInput as e:
            raise BadInput(f"domain {name}: {e}") from None
        except OSError as e:
            if not target.is_dir():  # else another process was faster
                raise BadInput(f"domain {name}: cannot write its tokens to {cache_dir()} ({e.strerror}): "
                               "make room or set XDG_CACHE_HOME") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    meta = json.loads((target / "meta.json").read_text())
    tokens = {s: np.memmap(target / f"{s}.bin", dtype, "r") if size else np.empty(0, dtype)
              for s, size in meta["tokens"].items()}
    total = sum(map(len, tokens.values()))
    if min(len(tokens["valid"]), len(tokens["test"])) < n and cfg.holdout * total >= n:
        whole, held = np.concatenate([tokens[s] for s in SPLITS]), int(cfg.holdout * total)
        cuts = len(whole) - 2 * held, len(whole) - held
        tokens = dict(zip(SPLITS, np.split(whole, cuts)))
        print(f"domain {name}: too few documents to hold some out: "
              f"its last {2 * held} tokens are valid and test")
    for split, have in tokens.items():
        if split == "train" and cfg.domain_tokens:
            have = have[:cfg.domain_tokens]
        if len(have) < n:
            raise BadInput(f"domain {name}: {len(have)} tokens for {split}, "
                           f"fewer than one sequence of {n}: more or shorter documents, "
                           "a larger --holdout or a smaller --max-tokens")
        tokens[split] = have[:len(have) // n * n].reshape(-1, n)  # the rest is cut off
    return tokens, meta["sha1"]


def write_tokens(folder, source, tokenizer, cfg, dtype):
    """Write {train,valid,test}.bin and meta.json. Holds a few MB of text at a time, whatever the corpus
    has."""
    digest, count, seen = hashlib.sha1(), dict.fromkeys(SPLITS, 0), set()
    files = {s: open(folder / f"{s}.bin", "wb") for s in SPLITS}

    def flush(texts):
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
        for text, tokens in zip(texts, ids):
            split = split_of(text, cfg.holdout)
            np.array(tokens + [tokenizer.eos_token_id], dtype=dtype).tofile(files[split])
            count[split] += len(tokens) + 1

    waiting, size = [], 0
    for text in documents(source, cfg):
        known = hashlib.sha1(text.encode()).digest()[:8]
        if not text.strip() or known in seen:  # a text that comes again is left out
            continue
        seen.add(known)
        digest.update(text.encode() + b"\0")
        waiting.append(text)
        size += len(text)
        if size > PIECE:
            flush(waiting)
            waiting, size = [], 0
            if cfg.domain_tokens and count["train"] >= cfg.domain_tokens:
                break
    if waiting:
        flush(waiting)
    for f in files.values():
        f.close()
    meta = {"tokens": count, "sha1": digest.hexdigest(), "source": source}
    (folder / "meta.json").write_text(json.dumps(meta))


# ----------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """Decoder-only: tokens (B,T) are prompt+response, right-padded. Encoder-decoder: tokens and mask (B,P)
    are the prompt, decoder_tokens (B,N) the shifted response. For the R response tokens of the batch, one
    after the other: positions (R,) is where, in the flattened (B*T) or (B*N), the token is predicted;
    targets (R,) is the token; owner (R,) its example. lengths (B,) counts response tokens."""
    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor = None
    decoder_tokens: torch.Tensor = None
    teacher_view: "Batch" = None  # the same responses as the teacher reads them, if otherwise
    ids: list = None              # which examples these are; set by `Batches` only, for CachedStates

    @property
    def teacher_batch(self):
        # no field that holds the batch itself: such a cycle would live until the garbage collector comes
        return self.teacher_view or self

    def to(self, device):
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        moved = {k: v.to(device, non_blocking=True) for k, v in tensors.items()}
        view = self.teacher_view and self.teacher_view.to(device)
        return dataclasses.replace(self, **moved, teacher_view=view)


def pad(lists, width, left=False):
    """Lists of token ids -> (len, width) int64, filled with 0. What the fill is never matters: masks know
    lengths."""
    out = np.zeros((len(lists), width), dtype=np.int64)
    for row, x in zip(out, lists):
        row[width - len(x) if left else 0:][:len(x)] = x
    return torch.from_numpy(out)


def bucket(lists, widths):
    """The width to pad to: the longest list, or where few shapes are wanted the next of `widths` or
    multiple of 64."""
    longest = max(map(len, lists))
    if not widths:
        return longest
    return next((w for w in widths if w >= longest), 64 * math.ceil(longest / 64))


def collate(examples, model, role="student", bucket_widths=()):
    """Examples -> Batch on the CPU. Masks come from lengths, never from ids, since pad may equal EOS. The
    shift by one token is made here and nowhere else: of prompt a b and response c d EOS tokens are a b c d
    EOS (T = 5); c is predicted at b, so positions are 1 2 3 and targets c d EOS."""
    prompts = [e.prompt if role == "student" else e.teacher_prompt for e in examples]
    responses = [e.response for e in examples]
    lengths = torch.tensor([len(r) for r in responses])
    targets = torch.tensor([t for r in responses for t in r], dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(examples)), lengths)
    place = torch.cat([torch.arange(len(r)) for r in responses])  # (R,) its place in its own response
    if model.config.is_encoder_decoder:
        tokens = pad(prompts, bucket(prompts, bucket_widths))
        mask = (torch.arange(tokens.shape[1]) < torch.tensor([len(x) for x in prompts])[:, None]).long()
        shifted = [[model.config.decoder_start_token_id] + r[:-1] for r in responses]
        decoder_tokens = pad(shifted, bucket(shifted, bucket_widths))
        positions = owner * decoder_tokens.shape[1] + place
        return Batch(tokens, positions, targets, owner, lengths, mask, decoder_tokens)
    both = [a + b for a, b in zip(prompts, responses)]
    tokens = pad(both, bucket(both, bucket_widths))
    before = torch.tensor([len(a) - 1 for a in prompts])  # a prompt's last token predicts the response
    return Batch(tokens, owner * tokens.shape[1] + before[owner] + place, targets, owner, lengths)


def step_indices(n, step, cfg):
    """Which of n examples an optimizer step uses: shuffled anew every epoch, a function of seed and step
    alone. Under torchrun every process takes its share of them."""
    first = step * cfg.batch_size
    epochs = {i // n for i in range(first, first + cfg.batch_size)}
    order = {e: np.random.default_rng((cfg.seed, e)).permutation(n) for e in epochs}
    rank, world = processes()
    return [int(order[i // n][i % n]) for i in range(first + rank, first + cfg.batch_size, world)]


class Batches:
    """Training batches as a function of the step alone, so that a resumed run sees what it would have seen.

    at(step) gives the micro-batches of one optimizer step. Inside a step examples are sorted by length
    before they are split: less padding, and the step sees the same examples.
    """

    def __init__(self, examples, student, teacher, cfg, device):
        self.examples, self.student, self.teacher = [e for e in examples if e.response], student, teacher
        if not self.examples:
            raise BadInput("no training row has a response (all are null, "
                           "empty or cut away): nothing to train on")
        self.cfg, self.device, self.bucket_widths = cfg, device, []
        self.length = np.array([len(e.prompt) + len(e.response) for e in self.examples])
        if cfg.compile:  # each width is compiled anew, which takes from seconds to minutes: three of them
            quantiles = np.quantile(self.length, (0.5, 0.85, 1))
            self.bucket_widths = sorted({8 * math.ceil(x / 8) for x in quantiles})
        self.two_views = teacher is not None and (
            any(e.prompt is not e.teacher_prompt for e in self.examples)
            or student.config.is_encoder_decoder != teacher.config.is_encoder_decoder)

    def indices(self, step):
        return step_indices(len(self.examples), step, self.cfg)

    def at(self, step):
        ids = sorted(self.indices(step), key=lambda i: self.length[i])
        size = len(ids) // self.cfg.accum
        return [self.batch(ids[i:i + size]) for i in range(0, len(ids), size)]

    def batch(self, ids):
        batch = self.collate([self.examples[i] for i in ids])
        batch.ids = batch.teacher_batch.ids = ids
        return batch

    def collate(self, examples):
        """Any examples, such as the student's own answers -> Batch on the device, with the teacher's view
        of it."""
        batch = collate(examples, self.student, "student", self.bucket_widths)
        if self.two_views:
            batch.teacher_view = collate(examples, self.teacher, "teacher", self.bucket_widths)
        return batch.to(self.device)


# ----------------------------------------------------------------------------------------------------------
# From tokens to hidden states to a loss: logits exist for response tokens only, one chunk at a time
# ----------------------------------------------------------------------------------------------------------
def grouped_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention of one new token each: query (B,heads,1,D), key and value (B,kv_heads,room,D). Where
    several heads share a key, they become the positions of one query; transformers would copy keys and
    values for each of them."""
    groups = getattr(module, "num_key_value_groups", 1)
    if query.shape[2] > 1 or groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    B, heads, _, D = query.shape
    out = F.scaled_dot_product_attention(query.reshape(B, heads // groups, groups, D), key, value,
                                         attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return out.reshape(B, heads, 1, D).transpose(1, 2).contiguous(), None


# "causal" has no function that makes masks, so none is made, also under torch.compile: the fast kernels
# need that
AttentionInterface.register("causal", sdpa_attention_forward)
AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


@contextlib.contextmanager
def attention(model, name):
    """Let a decoder-only model use another attention function, if it would use torch's without a sliding
    window."""
    config = model.config.get_text_config(decoder=True)  # of a model for images, too, its text part
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
    if config._attn_implementation != "sdpa" or model.config.is_encoder_decoder or not plain:
        yield
        return
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def response_states(model, compiled=False):
    """A function batch -> (R,H): the hidden states from which the output head predicts the response tokens.

    Decoder-only models run right-padded and without a mask: a causal model never looks to the right, and
    without a mask the fast attention kernels serve. T5 scales the states before a tied head; that is done
    here. Under autocast states have its dtype.
    """
    if model.config.is_encoder_decoder:
        scale = state_scale(model)

        def body(tokens, mask, decoder_tokens):
            memory = model.get_encoder()(input_ids=tokens, attention_mask=mask)[0]
            return scale * model.get_decoder()(input_ids=decoder_tokens, encoder_hidden_states=memory,
                                               encoder_attention_mask=mask, use_cache=False)[0]
    else:
        def body(tokens, mask, decoder_tokens):
            return model.base_model(input_ids=tokens, use_cache=False)[0]
    body = try_compile(body, dynamic=False) if compiled else body

    def states(batch):
        with attention(model, "causal"):
            hidden = body(batch.tokens, batch.mask, batch.decoder_tokens)  # (B,T,H)
        return autocast_dtype(hidden.flatten(0, 1)[batch.positions])

    return states


def autocast_dtype(hidden):
    """Under autocast in its dtype: after a final norm with fp32 weights states have not, and the head, which
    follows them, would run in fp32."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def state_scale(model):
    """What the decoder's states are multiplied with before the head: not 1 for a T5 with tied
    embeddings."""
    return model.config.d_model ** -0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0


def try_compile(function, **options):
    """torch.compile, or after one line the plain function, where the machine cannot compile (no C++
    compiler, say)."""
    # the limit counts the recompilations of all models that share a line of code, and past it they run
    # uncompiled
    torch._dynamo.config.recompile_limit = 64
    # compile backward passes inside the try below
    torch._functorch.config.force_non_lazy_backward_lowering = True
    state = {"call": torch.compile(function, **options)}

    def call(*args):
        try:
            return state["call"](*args)
        except Exception as e:
            if state["call"] is function or not type(e).__module__.startswith("torch._"):
                raise
            print(f"torch.compile does not work here ({type(e).__name__}): going on without it", flush=True)
            state["call"] = function
            return function(*args)

    return call


def head(model):
    """Weight (V,H) and bias (V,) or None of the output layer, cut to the vocabulary shared with the other
    model."""
    layer, V = model.get_output_embeddings(), model.vocab
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if V == len(weight):  # a slice, even of everything, would cost a padded copy of the gradient
        return weight, bias
    return weight[:V], None if bias is None else bias[:V]


def project(hidden, weight, bias):
    """(r,H) -> (r,V) fp32 logits. The product runs in the dtype of `hidden`; softmaxes of bf16 logits are 5
    % off."""
    dtype = hidden.dtype
    return F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype)).float()


def head_logits(model, hidden):
    """(r,H) -> (r,V) fp32 logits of a model, V cut to the vocabulary that both models share."""
    return project(hidden, *head(model))


def chunks(rows, vocab, device):
    """Equal slices of rows whose fp32 logits take at most 16 MB on a CPU (near the cache) or 1 GB on a
    GPU."""
    most = max(1, (2**30 if device.type == "cuda" else 2**24) // (4 * vocab))
    size = math.ceil(rows / math.ceil(rows / most)) if rows else 1
    return [slice(i, i + size) for i in range(0, max(1, rows), size)]


class _RowwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row_loss, teacher_logits, targets, hidden, weight, bias):
        # Per chunk: logits, the method's loss, and at once the gradients of hidden states and head, these
        # in fp32. No (R,V) tensor outlives its chunk and nothing is computed twice.
        low = weight.to(hidden.dtype)
        want = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        grad_hidden = torch.zeros_like(hidden) if want else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want and bias is not None else None
        totals = 0.0
        with torch.autocast(hidden.device.type, enabled=False):  # else logits would become bf16 again
            for rows in chunks(len(targets), len(weight), hidden.device):
                logits = project(hidden[rows], low, bias).requires_grad_(want)
                with torch.set_grad_enabled(want):  # a Function's forward runs without grad
                    losses = row_loss(logits, teacher_logits(rows), targets[rows])
                    loss = losses[0].sum()
                totals = totals + torch.stack([x.detach().sum() for x in losses])
                if not want:
                    continue
                g = torch.autograd.grad(loss, logits)[0]  # (r,V)
                if bias is not None:
                    grad_bias += g.sum(0)
                g = g.to(low.dtype)
                grad_hidden[rows] = g @ low
                if low.dtype == torch.float32:
                    grad_weight.addmm_(g.t(), hidden[rows])
                else:
                    grad_weight += (g.t() @ hidden[rows]).float()
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return totals

    @staticmethod
    def backward(ctx, grad):  # grad[0] belongs to the loss; the other entries are there to be logged
        scale = lambda g: None if g is None else g * grad[0].to(g.dtype)
        return None, None, None, *map(scale, ctx.saved_tensors)


def rowwise_loss(row_loss, student, hidden, targets, teacher=None, teacher_hidden=None):
    """Sum a loss of logits over all rows, in memory that does not grow with R V; differentiable in student
    states (R,H) and student head.

    row_loss(student_logits (r,V), teacher_logits (r,V) or None, targets (r,)) -> tuple of (r,): the first
    is the loss, the others are logged; logits are fp32. Returns (k,), the *sum* of each over the R rows, of
    which only the first has a gradient: divide once, by the response tokens of the whole optimizer step.
    Taking the gradient inside the forward pass is the idea of Liger-Kernel's fused losses (Hsu et al. 2024,
    https://arxiv.org/abs/2410.10989), here for any loss of rows.
    """
    def teacher_logits(rows):
        with torch.no_grad():
            return None if teacher is None else head_logits(teacher, teacher_hidden[rows].to(teacher.dtype))

    return _RowwiseLoss.apply(row_loss, teacher_logits, targets, hidden, *head(student))


def token_logprobs(model, hidden, targets):
    """(R,H), (R,) -> (R,) log-probabilities of the observed tokens; differentiable. For losses in which the
    weight of a row depends on its whole response. Logits of up to 1 GB (256 MB on a CPU) are kept, more
    computed again."""
    def piece(h, t, weight, bias):
        return log_softmax_at(project(h, weight, bias), t)

    parts = chunks(len(targets), model.vocab, hidden.device)
    keep = len(parts) <= (1 if hidden.device.type == "cuda" else 16) or not torch.is_grad_enabled()
    call = piece if keep else lambda *args: checkpoint(piece, *args, use_reentrant=False)
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.cat([call(hidden[rows], targets[rows], *head(model)) for rows in parts])


@torch.no_grad()
def row_scalars(row_values, model, hidden, targets):
    """The values (r,) that row_values(logits (r,V) fp32, targets (r,)) gives, for all R rows: a tuple of
    (R,)."""
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [row_values(head_logits(model, hidden[rows].to(model.dtype)), targets[rows])
                 for rows in chunks(len(targets), model.vocab, hidden.device)]
    return tuple(torch.cat(x) for x in zip(*parts))


def pad_responses(values, lengths, width):
    """(R,) values of rows -> (B,width): a response a line, filled with 0."""
    inside = torch.arange(width, device=values.device) < lengths[:, None]
    return values.new_zeros(inside.shape).masked_scatter(inside, values)


def log_softmax_at(logits, targets):
    """(r,V), (r,) -> (r,) log-softmax at the targets, without the other V - 1 entries."""
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def teacher_states(teacher, batches, cfg):
    """batch -> (R,H) from the teacher; with --cache-gib, remembered for every example from the first epoch
    on."""
    states = response_states(teacher, cfg.compile)
    if cfg.cache_gib > 0:
        return CachedStates(states, batches.examples, teacher, cfg.cache_gib * 2**30)
    return states


class CachedStates:
    """The teacher's final hidden states of fixed responses, computed once: with the head they give the
    exact, full distribution at 2H (bf16) or 4H bytes a token, against 2V or 4V for logits. They live with
    the run, in memory or, beyond `limit` bytes, in a memory-mapped temporary file, so no other teacher or
    data can ever meet them."""

    def __init__(self, states, examples, model, limit):
        self.states, self.known = states, np.zeros(len(examples), dtype=bool)
        self.start = np.concatenate([[0], np.cumsum([len(e.response) for e in examples])])
        shape = int(self.start[-1]), head(model)[0].shape[1]
        if shape[0] * shape[1] * model.dtype.itemsize <= limit:
            self.store = torch.empty(shape, dtype=model.dtype)
            return
        file = cache_dir() / f"states-{os.getpid()}-{id(self)}"
        self.store = torch.from_file(str(file), True, shape[0] * shape[1], dtype=model.dtype).view(shape)
        with contextlib.suppress(OSError):  # the mapping keeps it alive; Windows will not let it go before
            file.unlink()

    def __call__(self, batch):
        rows = [slice(self.start[i], self.start[i + 1]) for i in batch.ids]
        if self.known[batch.ids].all():
            return torch.cat([self.store[r] for r in rows]).to(batch.tokens.device, non_blocking=True)
        states = self.states(batch).detach()
        for r, piece in zip(rows, states.to("cpu", self.store.dtype).split(batch.lengths.tolist())):
            self.store[r] = piece
        self.known[batch.ids] = True
        return states


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def sample(model, prompts, max_new, temperature=1.0, top_k=0, seed=0, eos=None, batch_size=256,
           compiled=False, static=None, top_p=1.0, dtype=None):
    """Prompts (lists of token ids) -> (responses as lists of token ids, their token log-probs as (n,)
    tensors).

    By default from the very distribution that is scored: T = 1, no truncation, no dropout; temperature 0 is
    greedy. A response ends with its first EOS, or without one after max_new tokens. Log-probs are those of
    the sampling distribution (at temperature 0 of the model's). A draw is argmax(logits + Gumbel noise):
    exact, and the GPU need not wait for the CPU. On a GPU (`static`), if the model's class can, one step on
    a fixed-size cache, compiled under CUDA graphs, with a look for "all done" every 16 tokens; elsewhere a
    growing cache, which finished rows leave at once. `dtype`: what the model is trained in under autocast,
    so that what is sampled is what is scored.
    """
    was_training = model.training
    if static is None:  # GPT-Neo cannot: its local mask takes the width of the cache for the position
        static = model.device.type == "cuda" and getattr(model, "_can_compile_fullgraph", False)
    eos = model.generation_config.eos_token_id if eos is None else eos
    model.eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    out = [None] * len(prompts)
    batch_size = min(batch_size, cache_rows(model, len(prompts[order[-1]]) + max_new))
    low = dtype not in (None, torch.float32, model.dtype)
    sampler = low_copy(model, dtype) if low else model
    for i in range(0, len(order), batch_size):
        ids = order[i:i + batch_size]
        with torch.autocast(model.device.type, dtype, enabled=low), attention(sampler, "grouped"):
            tokens, logprobs = _sample_batch(sampler, [prompts[j] for j in ids], max_new, temperature,
                                             top_k, top_p, generator, eos, compiled, static)
        for j, t, lp in zip(ids, tokens.tolist(), logprobs):
            n = t.index(eos) + 1 if eos in t else max_new  # the first EOS counts, nothing after it
            out[j] = t[:n], lp[:n].clone()
    model.train(was_training)
    return [t for t, _ in out], [lp for _, lp in out]


def decode_step(model, cache, tokens, position_ids, attend, mask, memory):
    """One step of the decoder: (B,1) tokens (or (B,P) prompts) -> (B,V) fp32 logits of the next one.
    `cache` is a keyword argument, {its name: the cache}."""
    if memory is not None:
        hidden = model.get_decoder()(input_ids=tokens, encoder_hidden_states=memory,
                                     encoder_attention_mask=mask, use_cache=True, **cache)[0]
        hidden = hidden * state_scale(model)
    else:
        hidden = model.base_model(input_ids=tokens, attention_mask=attend, position_ids=position_ids,
                                  use_cache=True, **cache)[0]
    return head_logits(model, autocast_dtype(hidden[:, -1]))


def _sample_batch(model, prompts, max_new, temperature, top_k, top_p, generator, eos, compiled, static):
    """One batch of `sample`: tokens and log-probs (B,max_new) on the CPU. What stands after a row's first
    EOS has no meaning. `alive` holds the batch positions of the rows that are still computed."""
    device, B, P = model.device, len(prompts), max(map(len, prompts))
    is_encdec = model.config.is_encoder_decoder
    prompt = pad(prompts, P, left=not is_encdec).to(device)           # (B,P)
    n = torch.tensor([len(p) for p in prompts], device=device)        # (B,)
    at = torch.arange(P, device=device)
    mask = (at < n[:, None] if is_encdec else at >= P - n[:, None]).long()  # (B,P)
    room = 64 * math.ceil(((0 if is_encdec else P) + max_new) / 64)
    config = model.config.get_text_config(decoder=True)
    of_size = lambda use, room: static_cache(model, config, use, B, room, compiled)
    cache = of_size("self", room) if static else preallocated_cache(config)
    if is_encdec:  # the encoder runs once
        memory = model.get_encoder()(input_ids=prompt, attention_mask=mask)[0]
        of_prompt = of_size("cross", P) if static else DynamicCache(config=config)
        cache = EncoderDecoderCache(cache, of_prompt)
        tokens = torch.full((B, 1), model.config.decoder_start_token_id, device=device)
        position_ids = attend = None
    else:  # left-padded, so positions are told explicitly: absolute embeddings are wrong otherwise
        memory, tokens = None, prompt
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        attend = torch.cat([mask, mask.new_ones(B, room - P)], -1)
    if static and compiled and not hasattr(model, "fast_step"):
        model.fast_step = try_compile(decode_step, mode="reduce-overhead")
    decoder = model.get_decoder() if is_encdec else model.base_model
    renamed = "cache" in inspect.signature(decoder.forward).parameters  # since transformers 5.24
    cache_argument = {"cache" if renamed else "past_key_values": cache}
    out, logprobs = torch.full((B, max_new), eos, device=device), torch.zeros(B, max_new, device=device)
    done, alive = torch.zeros(B, dtype=torch.bool, device=device), torch.arange(B, device=device)
    for t in range(max_new):
        step = model.fast_step if static and compiled and t > 0 else decode_step
        seen = attend if static or is_encdec else attend[:, :P + t]
        logits = step(model, cache_argument, tokens, position_ids, seen, mask, memory)  # (B,V)
        logits = truncated(logits / temperature if temperature > 0 else logits, top_k, top_p)
        token = (logits + gumbel(logits, generator) if temperature > 0 else logits).argmax(-1)  # (B,)
        out[alive, t], logprobs[alive, t] = torch.where(done, eos, token), log_softmax_at(logits, token)
        done, tokens = done | (token == eos), token[:, None]
        position_ids = None if is_encdec else n[:, None] + t
        if static:
            if t % 16 == 15 and done.all():
                break
        elif done.all():
            break
        elif done.sum() * 8 > len(done):  # those that are done leave the batch
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive, done, tokens, n, mask, position_ids, attend, memory = (
                x if x is None else x[keep]
                for x in (alive, done, tokens, n, mask, position_ids, attend, memory))
    return out.cpu(), logprobs.cpu()


def truncated(logits, top_k, top_p):
    """(B,V) -> (B,V), -inf outside the k likeliest tokens, and outside the fewest that hold the share
    top_p."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, at_token = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # the share of those likelier
        logits = logits.scatter(-1, at_token, ordered.masked_fill(before >= top_p, -math.inf))
    return logits


def gumbel(like, generator):
    """Gumbel(0,1) = -log(Exponential(1)) noise of that shape; clamped, for an exponential of 0 would be
    infinite."""
    if like.device.type == "cpu":  # bit by bit what exponential_ draws there, in a third of the time
        uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        noise = uniform.neg_().log1p_().neg_().to(like.dtype)
    else:
        noise = torch.empty_like(like).exponential_(generator=generator)
    return noise.clamp_(min=1e-30).log_().neg_()


STEP = 64  # tokens of room that a cache adds at a time


class PreallocatedLayer(DynamicLayer):
    """transformers' DynamicLayer appends by torch.cat, so that every token costs a copy of all before it;
    here keys and values are written into room that is there already. The numbers are the same."""
    room = None  # [keys, values], (B,heads,more than enough,D); self.keys and self.values are views of it

    def update(self, key_states, value_states, *args, **kwargs):
        begin = self.get_seq_length()
        if not begin:  # the prompt
            return super().update(key_states, value_states, *args, **kwargs)
        new, end = (key_states, value_states), begin + key_states.shape[-2]
        # rows that left (batch_select_indices) took self.keys out of the room, so it is made anew
        if self.room is None or len(self.room[0]) != len(key_states) or self.room[0].shape[-2] < end:
            self.room = [x.new_empty(*x.shape[:-2], end + STEP, x.shape[-1]) for x in new]
            for room, old in zip(self.room, (self.keys, self.values)):
                room[..., :begin, :] = old
        for room, x in zip(self.room, new):
            room[..., begin:end, :] = x
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values


def preallocated_cache(config):
    """A DynamicCache whose plain layers (not those with a sliding window) are preallocated."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


_static_caches = weakref.WeakKeyDictionary()  # model: {(use, batch, room): cache}


def static_cache(model, config, use, batch, room, compiled):
    """A StaticCache; where the step is compiled the same one for the same sizes, since a CUDA graph is tied
    to the addresses it was recorded with. Those that are kept for a model take 16 GiB at most, one more
    aside."""
    if not compiled:
        return StaticCache(config=config, max_cache_len=room)
    kept = _static_caches.setdefault(model, {})
    if (use, batch, room) not in kept:
        if sum(rows / cache_rows(model, width) for _, rows, width in kept) > 1:
            kept.clear()  # prompts of many lengths must not fill the GPU
        kept[use, batch, room] = StaticCache(config=config, max_cache_len=room)
    kept[use, batch, room].reset()
    return kept[use, batch, room]


def cache_rows(model, length):
    """How many sequences of that length have keys and values of 16 GiB together: a fixed number, not what
    is free now, since the noise of a sample depends on its batch."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * length * model.dtype.itemsize
    return max(1, 2**34 // size)


_low_copies = weakref.WeakKeyDictionary()  # model: its copy


def low_copy(model, dtype):
    """A copy of a model with fp32 weights, whose matrices are `dtype` already: what autocast would make of
    them at every token. It is made once and gets the model's present weights at each call."""
    if model not in _low_copies:
        made = _low_copies[model] = copy.deepcopy(model).requires_grad_(False)
        for layer in made.modules():
            if isinstance(layer, (torch.nn.Linear, Conv1D)):  # a tied head parts from the embedding here
                for name, p in list(layer.named_parameters(recurse=False)):
                    setattr(layer, name, torch.nn.Parameter(p.to(dtype), requires_grad=False))
    made = _low_copies[model]
    now = dict(model.named_parameters(remove_duplicate=False))
    for name, p in made.named_parameters(remove_duplicate=False):
        p.copy_(now[name])
    return made


def answer_examples(model, examples, tokenizer, cfg, temperature=1.0, seed=0, role="student"):
    """Copies of the examples with responses of the model, sampled as in `sample`, of at most --max-response
    tokens; one that was cut lacks its EOS."""
    prompts = [e.prompt if role == "student" else e.teacher_prompt for e in examples]
    responses, _ = sample(model, prompts, cfg.max_response, temperature, seed=seed,
                          eos=tokenizer.eos_token_id, compiled=cfg.compile,
                          dtype=compute_dtype(cfg, model.device))
    return [dataclasses.replace(e, response=r) for e, r in zip(examples, responses)]


def teacher_answers(teacher, examples, tokenizer, cfg):
    """The examples with the teacher's responses (T = 1, drawn once), kept on disk under teacher, prompts
    and seed."""
    prompts = [e.teacher_prompt for e in examples]
    eos = tokenizer.eos_token_id
    what = [fingerprint(teacher), str(teacher.dtype), prompts, eos, cfg.max_response, cfg.seed]
    file = cache_dir() / f"answers-{hashlib.sha1(json.dumps(what).encode()).hexdigest()[:20]}.json"
    with rank0_first():
        if file.is_file():
            responses = json.loads(file.read_text())
        else:
            print(f"the teacher answers {len(examples)} prompts ...", flush=True)
            answered = answer_examples(teacher, examples, tokenizer, cfg, seed=cfg.seed, role="teacher")
            responses = [e.response for e in answered]
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(responses))
            os.replace(part, file)
    cut = sum(r[-1] != eos for r in responses)
    print(f"teacher responses: {len(responses)}, of which {cut} reach "
          "--max-response without an end", flush=True)
    return [dataclasses.replace(e, response=r) for e, r in zip(examples, responses)]


def show_samples(run, model, examples, tokenizer, cfg):
    """Print what the model says to the first two examples: the same prompts and seed at every
    evaluation."""
    for e in answer_examples(model, examples[:2], tokenizer, cfg, seed=7):
        said = tokenizer.decode(e.response, skip_special_tokens=True)
        run.print(f"      {e.row['prompt'][:90]!r} -> {said[:160]!r}")


# ----------------------------------------------------------------------------------------------------------
# Scores of texts, held by tests/test_evaluation.py to rouge-score
# ----------------------------------------------------------------------------------------------------------
def rouge_l(candidate, references):
    """ROUGE-L F1 in 0..1 (Lin 2004), the best over the references; tokens as in rouge-score without
    stemming."""
    a, best = re.findall(r"[a-z0-9]+", candidate.lower()), 0.0
    for reference in references:
        b, where, row = re.findall(r"[a-z0-9]+", reference.lower()), {}, 0
        for i, word in enumerate(a):
            where[word] = where.get(word, 0) | 1 << i
        for word in b:  # longest common subsequence with one bit a token (Crochemore et al. 2001)
            x = row | where.get(word, 0)
            row = x & ~(x - ((row << 1) | 1))
        lcs = bin(row).count("1")
        best = max(best, 2 * lcs / (len(a) + len(b)) if lcs else 0.0)
    return best


def grams(words, n):
    """How often each n-gram occurs."""
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def distinct(texts, n):
    """Different n-grams over all n-grams of all texts (Li et al. 2016): 1 says that nothing is repeated."""
    all_grams = Counter()
    for text in texts:
        all_grams.update(grams(text.split(), n))
    return len(all_grams) / max(1, sum(all_grams.values()))


# ----------------------------------------------------------------------------------------------------------
# The evaluation: one for all methods
# ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def per_response(row_values, student, teacher, examples, cfg, role="student", batch_size=64):
    """(len(examples), k) float64 on the CPU: for each response the sums over its tokens of the k values
    that row_values(student_logits, teacher_logits or None, targets) gives for each row. `student` is any
    model to be measured, `role` whose template it reads. Without gradient and dropout; logits never outlive
    their chunk."""
    out, states, teacher_fwd = [], response_states(student), teacher and response_states(teacher)
    was_training = student.training
    student.eval()  # no dropout in what is reported
    dtype = compute_dtype(cfg, student.device)
    for i in range(0, len(examples), batch_size):
        part = examples[i:i + batch_size]
        batch = collate(part, student, role).to(student.device)
        with torch.autocast(student.device.type, dtype, enabled=dtype != torch.float32):
            hidden = states(batch)
            if teacher:
                teacher_hidden = teacher_fwd(collate(part, teacher, "teacher").to(teacher.device))
        sums = 0.0
        for rows in chunks(len(batch.targets), student.vocab, student.device):
            teacher_logits = None
            if teacher:
                teacher_logits = head_logits(teacher, teacher_hidden[rows].to(teacher.dtype))
            values = row_values(head_logits(student, hidden[rows]), teacher_logits, batch.targets[rows])
            values = torch.stack(values, -1)  # (r,k)
            zeros = values.new_zeros(len(part), values.shape[-1])
            sums = sums + zeros.index_add_(0, batch.owner[rows], values)
        out.append(sums.cpu().double())
    student.train(was_training)
    return torch.cat(out)


def both_kl(student_logits, teacher_logits, targets):
    """KL(p||q) and KL(q||p) of each row, in nats, p the teacher. (r,V), (r,V) -> two (r,)."""
    logp, logq = F.log_softmax(teacher_logits, -1), F.log_softmax(student_logits, -1)
    return (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)


def make_evaluator(cfg, teacher, tokenizer, examples, seed=1234):
    """A function model -> {metric: float} on `examples`, for teacher and student alike.

    The distribution q of the model is measured as it is, or with logits divided by --eval-temperature; the
    teacher p that it is compared with always as it is.
      kl_pq, kl_qp      nats a response: the sum over its tokens of KL(p||q) on responses sampled from the
                        teacher, of KL(q||p) on responses sampled from q (--kl-on references: both on the
                        given responses)
      entropy           nats a response: the sum over its tokens of the entropy of q, on samples of q
      ce                nats a token, on the given responses
      rouge_l, exact_match, distinct_1, distinct_2, length, no_end    of samples of q; ..._greedy: of greedy
                        responses
    Where every row knows all right answers and their probabilities (a tiny world):
      valid             in place of exact_match: the share of generated texts that are right
      valid_mass        the probability that q gives to right answers: `valid` without the noise of sampling
      valid_<kind>      valid_mass of one kind of prompt, its first word
      mode_i            the share of wording i among the right answers, by that probability
      mode_distance     total variation (0 to 1) of those shares and the teacher's, mean over the kinds
    """
    labelled = [e for e in examples if e.response]
    given = lambda row: [row["response"]] if row["response"] else []
    references = [e.row.get("references") or given(e.row) for e in examples]
    truth = KnownAnswers(examples, tokenizer, cfg) if all("probs" in e.row for e in examples) else None
    tau = cfg.eval_temperature
    kl = lambda logits, teacher_logits, targets: both_kl(logits / tau, teacher_logits, targets)
    logprob = lambda logits, _, targets: (log_softmax_at(logits / tau, targets),)

    def entropy(logits, *_):
        logits = logits / tau
        return (logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1),)

    from_teacher, teacher_shares = None, None
    if teacher is not None:
        from_teacher = labelled
        if cfg.kl_on == "samples":
            from_teacher = answer_examples(teacher, examples, tokenizer, cfg, 1.0, seed, "teacher")
        if truth:
            teacher_shares = truth.shares(truth.mass(teacher, "teacher", 1.0))

    def scores(answered, suffix):
        texts = [tokenizer.decode(e.response, skip_special_tokens=True).strip() for e in answered]
        pairs = [(t, r) for t, r in zip(texts, references) if r]
        if not pairs:
            return {}
        exact = "valid" if truth else "exact_match"
        return {"rouge_l" + suffix: float(np.mean([rouge_l(t, r) for t, r in pairs])),
                exact + suffix: float(np.mean([any(t.split() == x.split() for x in r) for t, r in pairs]))}

    def evaluate(model):
        m, role = {}, "teacher" if model is teacher else "student"
        drawn = answer_examples(model, examples, tokenizer, cfg, tau, seed + 1, role)
        greedy = answer_examples(model, examples, tokenizer, cfg, 0.0, seed + 1, role)
        if from_teacher:
            m["kl_pq"], m["kl_qp"] = 0.0, 0.0
            if model is not teacher or tau != 1:
                from_model = labelled if cfg.kl_on == "references" else drawn
                m["kl_pq"] = per_response(kl, model, teacher, from_teacher, cfg, role)[:, 0].mean().item()
                m["kl_qp"] = per_response(kl, model, teacher, from_model, cfg, role)[:, 1].mean().item()
        m["entropy"] = per_response(entropy, model, None, drawn, cfg, role).mean().item()
        if labelled:
            nll = -per_response(logprob, model, None, labelled, cfg, role).sum().item()
            m["ce"] = nll / sum(len(e.response) for e in labelled)
        m |= scores(drawn, "") | scores(greedy, "_greedy")
        if truth:
            m |= truth.metrics(model, role, tau, teacher_shares)
        texts = [tokenizer.decode(e.response, skip_special_tokens=True) for e in drawn]
        m["distinct_1"], m["distinct_2"] = distinct(texts, 1), distinct(texts, 2)
        m["length"] = float(np.mean([len(e.response) for e in drawn]))
        m["no_end"] = float(np.mean([e.response[-1] != tokenizer.eos_token_id for e in drawn]))
        return m

    return evaluate


class KnownAnswers:
    """The metrics of rows that know all their right answers, as many for each row."""

    def __init__(self, examples, tokenizer, cfg):
        counts = sorted({len(e.row["references"]) for e in examples})
        if len(counts) > 1:
            raise BadInput(f"--data {cfg.data}: rows with 'probs' have as many 'references' each, here some "
                           f"have {counts[0]} and others {counts[-1]}: leave 'probs' out")
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        self.answers = [dataclasses.replace(e, response=encode(r))
                        for e in examples for r in e.row["references"]]
        self.cfg, self.n = cfg, len(examples)
        kinds = np.array([e.row["prompt"].split(" ")[0] for e in examples])
        self.of_kind = {kind: torch.from_numpy(kinds == kind) for kind in sorted(set(kinds))}

    def mass(self, model, role, tau):
        """(rows, wordings): the probability of every right answer."""
        logprob = lambda logits, _, targets: (log_softmax_at(logits / tau, targets),)
        return per_response(logprob, model, None, self.answers, self.cfg, role).exp().view(self.n, -1)

    def shares(self, mass):
        """(rows, wordings) -> (kinds, wordings): how the probability of right answers falls to the
        wordings."""
        by_kind = torch.stack([mass[rows].sum(0) for rows in self.of_kind.values()])
        return by_kind / by_kind.sum(-1, keepdim=True).clamp(min=1e-30)

    def metrics(self, model, role, tau, teacher_shares):
        """valid_mass, mode_distance, mode_<i> and valid_<kind>, as in make_evaluator."""
        mass = self.mass(model, role, tau)
        shares = self.shares(mass)
        m = {"valid_mass": mass.sum(-1).mean().item()}
        if teacher_shares is not None:
            m["mode_distance"] = 0.5 * (shares - teacher_shares).abs().sum(-1).mean().item()
        m |= {f"mode_{i + 1}": x for i, x in enumerate(shares.mean(0).tolist())}
        return m | {f"valid_{k}": mass[rows].sum(-1).mean().item() for k, rows in self.of_kind.items()}


# ----------------------------------------------------------------------------------------------------------
# Tasks in text (gold.py): their table, the LLM, reading and checking of samples, scores
# ----------------------------------------------------------------------------------------------------------
# An entry of data/tasks.json, or a JSON file of that form, says which data set, which of its columns are
# fields, what the labels are called and mean. Entries without "labels" are text-to-text: the label is then
# a free text, the answer.
SLOT = re.compile(r"\{([^{}]+)\}")
TASK = {"data": "", "world": "", "train": "train", "test": "test", "about": "", "fields": {}, "label": "",
        "labels": {}, "label_name": "Label", "student": "", "shots": 3, "max_new": 256,
        "lengths": [3, 2000],
        "check": "", "metric": "exact", "stop": ["\n\n", "\nSample "], "write": {}, "solve": {}}


def load_task(name):
    """An entry by name, or from a JSON file, with all defaults filled in and checked."""
    try:
        entries = json.loads((HERE / "data/tasks.json").read_text())["tasks"]
        if name.endswith(".json"):
            entry, where = json.loads(Path(name).read_text(encoding="utf-8-sig")), name
        elif name in entries:
            entry, where = entries[name], f"task {name}"
        else:
            raise BadInput(f"--task {name}: no such entry; there are {', '.join(entries)}, "
                           "or give a .json file")
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"--task {name}: cannot be read as JSON ({first_line(e)})") from None
    if not isinstance(entry, dict):
        raise BadInput(f"{where}: an object is wanted, with fields, label, student and about")
    if unknown := set(entry) - set(TASK):
        raise BadInput(f"{where}: unknown {', '.join(sorted(map(repr, unknown)))}; "
                       f"known: {', '.join(TASK)}")
    task = {**TASK, **entry, "name": Path(name).stem}
    for key, default in TASK.items():  # of the type of its default, and so are its parts
        value, of = task[key], type(default[0]) if isinstance(default, list) else str
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if type(value) is not type(default) or any(type(x) is not of for x in parts):
            raise BadInput(f"{where}: {key!r} is {str(value)[:40]!r}, of another type than "
                           f"{str(default)[:40] or 'text'!r}")
        if key in ("fields", "label", "student") and not value:
            raise BadInput(f"{where}: {key!r} is missing; a task needs fields, label, student and about")
    label, named = f"{task['label_name']}: {{label}}", [f"{f}: {{{f}}}" for f in task["fields"]]
    # where there are labels, the label is written first
    forms = {"write": [label, *named] if task["labels"] else [*named, label], "solve": [*named, label]}
    for mode, lines in forms.items():
        task[mode] = {"sample": "\n".join(lines), **task[mode]}
        slots = SLOT.findall(task[mode]["sample"])
        if sorted(slots) != sorted([*task["fields"], "label"]):
            raise BadInput(f"{where}: the sample of {mode!r} must hold each field and {{label}} once, "
                           f"it holds {', '.join(slots)}")
    for template in (task["student"], *task["labels"].values()):
        if other := set(SLOT.findall(template)) - set(task["fields"]):
            raise BadInput(f"{where}: {template!r} names {', '.join(sorted(other))}, which is no field")
    if task["check"] not in FILTERS or task["metric"] not in ("exact", "equation", "rouge_l"):
        raise BadInput(f"{where}: check is one of {', '.join(map(repr, FILTERS))}, "
                       "metric of exact, equation, rouge_l")
    low, high, *more = [*task["lengths"], -1, -1]
    fine = len(more) == 2 and 0 <= low <= high
    if not fine or not 0 <= task["shots"] < 10**6 or not 0 < task["max_new"] < 10**6:
        raise BadInput(f"{where}: lengths are two, the fewest and the most characters; "
                       "shots is 0 or more, max_new 1 or more")
    worlds = {t.get("world", "") for t in entries.values()}
    if task["world"] not in worlds:  # it names a program: nobody else's
        raise BadInput(f"{where}: world is one of {', '.join(sorted(filter(None, worlds)))}, or absent")
    return task


def sample_reader(task):
    """A function (raw record, where, cfg) -> row: prompt and response of the student, the sample, all right
    answers."""
    def column(record, name, where):
        for part in name.split("."):
            if not isinstance(record, dict) or part not in record:
                there = ", ".join(map(str, record))[:80] or "nothing"
                raise BadInput(f"{where}: no field {name!r} (there: {there}): "
                               "see 'fields' and 'label' of the task")
            record = record[part]
        return record

    def read(record, where, cfg):
        sample = {f: str(column(record, c, where)) for f, c in task["fields"].items()}
        label, words = column(record, task["label"], where), list(task["labels"])
        if words:
            if isinstance(label, str) and label.isdigit() and label not in words:
                label = int(label)  # a class number that came through a CSV file
            if not (isinstance(label, int) and 0 <= label < len(words) or label in words):
                raise BadInput(f"{where}: unknown label {label!r}: the task has {', '.join(words)}, "
                               "or numbers from 0")
            label = words[label] if isinstance(label, int) else label
        right = [str(x) for x in (label if isinstance(label, list) else [label])] or [""]
        sample["label"] = right[0]
        known = {k: record[k] for k in ("topic", "weight", "tail") if k in record}
        return {**student_row(task, sample), "references": right, **known}

    return read


def student_row(task, sample):
    """What the student reads and is to say, with the sample itself."""
    return {"prompt": task["student"].format(**sample), "response": sample["label"], "sample": sample}


def check_labels(task, tokenizer):
    """Label words may be of several tokens, but the student's tokenizer must be able to tell and to write
    them."""
    spelled = {w: tuple(tokenizer(w, add_special_tokens=False).input_ids) for w in task["labels"]}
    for w, ids in spelled.items():
        twice = list(spelled.values()).count(ids) > 1
        if twice or tokenizer.decode(list(ids), skip_special_tokens=True).strip() != w:
            raise BadInput(f"task {task['name']}: the student's tokenizer writes the label {w!r} as "
                           f"{tokenizer.decode(list(ids))!r}: choose another word in 'labels'")


class LLM:
    """A black box: prompts in, texts out, in one batched call. What it wrote is kept in `file`, a line a
    call, as soon as it is there; a resumed run gets the same texts from the file instead of asking
    again."""

    def __init__(self, model, tokenizer, file, max_prompt, max_new, seed, compiled=False):
        self.model, self.tokenizer, self.file = model, tokenizer, Path(file)
        self.max_new, self.seed, self.compiled = max_new, seed, compiled
        template = "auto" if tokenizer.chat_template else "{prompt}"
        self.encode = prompt_encoder(tokenizer, template, model, 10**9)  # too long is an error, not cut
        context = context_of(model) or 10**9
        self.room = min(max_prompt, context - (0 if model.config.is_encoder_decoder else max_new))
        self.written, self.asked, self.kept = None, 0, 0

    def tokens(self, asked, begun):
        """The user's turn through the chat template where there is one, then the beginning of the
        answer."""
        if self.model.config.is_encoder_decoder:
            ids = self.encode(asked + begun)
        else:
            ids = self.encode(asked) + self.tokenizer(begun, add_special_tokens=False).input_ids
        if len(ids) > self.room:
            raise BadInput(f"a prompt of {len(ids)} tokens does not fit: "
                           f"--llm-prompt and the LLM's context leave room for {self.room}; "
                           "raise it, or shorten the task's 'about', 'shots' or 'max_new'")
        return ids

    def __call__(self, prompts, call, temperature=0.0, top_k=0, top_p=1.0):
        """[(asked, begun)] -> texts. `call` names the call, so that its noise is its own and the same on
        resuming."""
        tokens = [self.tokens(asked, begun) for asked, begun in prompts]
        if processes()[0] > 0:
            return broadcast(None)
        if self.written is None:
            self.read_file()
        what = json.dumps([tokens, self.seed, call, temperature, top_k, top_p])
        key = hashlib.sha1(what.encode()).hexdigest()[:20]
        if key not in self.written:
            seed = int(hashlib.sha1(json.dumps([self.seed, call]).encode()).hexdigest()[:15], 16)
            responses, _ = sample(self.model, tokens, self.max_new, temperature, top_k=top_k, top_p=top_p,
                                  seed=seed, eos=self.tokenizer.eos_token_id, batch_size=64,
                                  compiled=self.compiled)
            self.written[key] = [self.tokenizer.decode(r, skip_special_tokens=True) for r in responses]
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(json.dumps({"call": call, "key": key, "texts": self.written[key]}) + "\n")
                f.flush()
                os.fsync(f.fileno())
        return broadcast(self.written[key])

    def read_file(self):
        lines = self.file.read_text(encoding="utf-8").split("\n") if self.file.exists() else [""]
        self.written = {r["key"]: r["texts"] for r in map(json.loads, lines[:-1])}
        if lines[-1]:  # a line without its end: a kill has torn it
            self.file.write_text("".join(x + "\n" for x in lines[:-1]), encoding="utf-8")

    def state_dict(self):
        return {"asked": self.asked, "kept": self.kept}

    def load_state_dict(self, state):
        self.asked, self.kept = state["asked"], state["kept"]


def parse_sample(text, template, stop):
    """An LLM's text -> {slot: text} by the template's words between the slots, or None where they do not
    fit."""
    text = " " + text.strip()  # a completion that starts with a stop word is empty
    for word in stop:
        text = text.split(word)[0]
    pieces, pattern = SLOT.split(template), ""
    for i, piece in enumerate(pieces):
        pattern += r"\s*(\S.*?)\s*" if i % 2 else r"\s+".join(re.escape(w) for w in piece.split())
    match = re.fullmatch(pattern, text, re.S)
    return match and dict(zip(pieces[1::2], match.groups()))


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}


def value_of(equation):
    """The value of an arithmetic expression of numbers, + - * / and parentheses, or None. Nothing is ever
    executed."""
    def walk(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        raise ValueError

    try:
        names_a_variable = re.fullmatch(r"\s*[a-zA-Z]\s*", equation.split("=")[0])  # x = 2 + 3
        text = equation.split("=")[-1 if names_a_variable else 0]
        return walk(ast.parse(text.strip(), mode="eval").body) if len(text) <= 200 else None
    except (ValueError, SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


FILTERS = {
    "": lambda sample: True,
    "substring": lambda sample: sample["label"] in next(iter(sample.values())),  # it is in the context
    "equation": lambda sample: value_of(sample["label"]) is not None,
}


def well_formed(task, sample):
    """Would a sample be kept? By lengths in characters, and by the task's own check of the answer."""
    low, high = task["lengths"]
    if set(sample) != {*task["fields"], "label"} or not sample["label"]:
        return False
    return all(low <= len(sample[f]) <= high for f in task["fields"]) and FILTERS[task["check"]](sample)


def score(task, text, row):
    """How right an answer is, 0 to 1: the words of a reference, the value of its equation, or ROUGE-L."""
    if task["metric"] == "rouge_l":
        return rouge_l(text, row["references"])
    if task["metric"] == "equation":
        value, right = value_of(text), value_of(row["references"][0])
        return float(value is not None and right is not None and abs(value - right) < 1e-6)
    return float(any(text.split() == r.split() for r in row["references"]))


def task_metrics(task, texts, rows):
    """accuracy: the mean score, by the task's own distribution; where rows know their topic also that with
    every topic as common as any other (uniform), and over rare topics only (tail)."""
    scores = np.array([score(task, t, r) for t, r in zip(texts, rows)])
    weights = np.array([r.get("weight", 1.0) for r in rows])
    m = {"rouge_l" if task["metric"] == "rouge_l" else "accuracy": float(scores @ weights / weights.sum())}
    if all("tail" in r for r in rows):
        tail = np.array([r["tail"] for r in rows])
        m["accuracy_uniform"] = float(scores.mean())
        if tail.any():
            m["accuracy_tail"] = float(scores[tail].mean())
    return m


def load_topics(cfg, world):
    """The topics.json of a data folder, if it has one: what a tiny world knows about right samples. A list
    of {"topic", "tail", "label", "patterns"}; the groups of a pattern, a regular expression, may be named
    in the label."""
    file = Path(resolve(cfg.data, "data", cfg.data, world)) / "topics.json"
    return json.loads(file.read_text()) if file.is_file() else []


def coverage(samples, topics):
    """What was written, where the truth is known: `topics` are those of a tiny world, [] elsewhere, which
    gives {}.

    modes: topics with at least 10 samples; tail_mass: the share of the rare ones; garbage: of what no topic
    can be read from; label_errors: of wrong labels among the rest; garbage_ood, garbage_fed: garbage in
    what was to differ, and in what was fed back.
    """
    if not topics:
        return {}
    for s in samples:
        if "topic" not in s:  # each is looked at once
            s["topic"], s["right"] = read_topic(s["sample"], topics)
    tail = {t["topic"] for t in topics if t["tail"]}
    known = [s for s in samples if s["topic"]]
    names = [s["topic"] for s in known]
    share = lambda part, of: sum(part) / max(1, len(of))
    garbage = lambda of: share([not s["topic"] for s in of], of)
    found = {"modes": float(sum(names.count(t) >= 10 for t in set(names))),
             "tail_mass": share([t in tail for t in names], samples), "garbage": garbage(samples),
             "label_errors": share([not s["right"] for s in known], known)}
    for name, part in (("garbage_ood", [s for s in samples if "energy" in s]),
                       ("garbage_fed", [s for s in samples if s["fed"]])):
        if part:
            found[name] = garbage(part)
    return found


def read_topic(sample, topics):
    """(topic or None, whether the label is right): the first topic of which a pattern fits the whole
    text."""
    text = " ".join(v for k, v in sample.items() if k != "label")
    for topic in topics:
        for pattern in topic["patterns"]:
            if match := re.fullmatch(pattern, text):
                right = topic["label"].format(**match.groupdict())
                return topic["topic"], sample["label"].split() == right.split()
    return None, False


# ----------------------------------------------------------------------------------------------------------
# Caches and tiny worlds
# ----------------------------------------------------------------------------------------------------------
def cache_dir():
    """Where tiny worlds, packed text and the teacher's answers are kept between runs."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kd-of-language-models"
    path.mkdir(parents=True, exist_ok=True)
    return path


def resolve(name, role, data, world="answers"):
    """The path behind a --teacher, --student or --data. "tiny" means the tiny world of --data tiny or
    tiny:N: its rows, its teacher, its student after supervised fine-tuning ("tiny-kl": after KL
    distillation)."""
    if role == "teacher" and name == "tiny-kl":
        raise BadInput("--teacher tiny-kl: that is a student of the tiny world; "
                       "its teacher is --teacher tiny")
    if not re.fullmatch(r"tiny(:\d+)?" if role == "data" else "tiny(-kl)?", name):
        return name
    if not re.fullmatch(r"tiny(:\d+)?", data):
        raise BadInput(f"--{role} {name} knows the words of the tiny world only: with --data {data}, "
                       "name your own --teacher and --student")
    part = "student" + name[4:] if role == "student" else role
    with rank0_first():
        return str(tiny_world(world, int(data.partition(":")[2] or 0), part) / part)


def tiny_world(world, number, part="student"):
    """Where tiny world `number` lies, with `part` of it: data, teacher, student or student-kl. On first use
    the program data/<world>/prepare.py makes it.

    world: the name of that folder, "reviews:sums" is the kind sums of it. The directory's name has a hash
    of the program, its grammar and Python's version, so that a changed world never meets an old teacher.
    """
    folder, _, kind = world.partition(":")
    sources = sorted(f for f in (HERE / "data" / folder).iterdir() if f.suffix in (".py", ".json"))
    key = hashlib.sha1(b"".join(f.read_bytes() for f in sources) + sys.version.encode()).hexdigest()[:12]
    target = cache_dir() / f"{kind or folder}-{key}-{number}"
    if (target / part).exists():
        return target
    command = [sys.executable, str(HERE / "data" / folder / "prepare.py")]
    options = ["--number", str(number), *(["--kind", kind] if kind else [])]
    if not target.exists():
        print(f"building the tiny world {kind or folder} {number}, once: {target}", flush=True)
        root = Path(tempfile.mkdtemp(prefix="building-", dir=cache_dir()))
        try:
            run_program([*command, str(root), *options])
            move(root, target)
        finally:
            shutil.rmtree(root, ignore_errors=True)
    if not (target / part).exists():
        print(f"making the tiny world's {part}, once: {target / part}", flush=True)
        run_program([*command, str(target), *options, "--part", part])
    return target


def run_program(command):
    """Run a command and pass on what it prints; it is not to know of torchrun's other processes."""
    torchruns = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in torchruns}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode:
        raise RunFailed(f"{' '.join(command)} ended with status {process.returncode}: "
                        "see what it printed above")


def move(made, target):
    """A directory that was built aside to its place, in one piece."""
    try:
        os.replace(made, target)
    except OSError:  # another process was faster: use what it made
        if not target.exists():
            raise


# ----------------------------------------------------------------------------------------------------------
# python common.py compare out/a out/b: runs side by side
# ----------------------------------------------------------------------------------------------------------
def compare(folders):
    """Print the settings in which runs differ and their metrics, and draw their validation curves."""
    runs = {}
    for folder in map(Path, folders):
        try:
            settings = json.loads((folder / "settings.json").read_text())
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            done = (folder / "result.json").is_file()
            result = json.loads((folder / "result.json").read_text()) if done else {}
        except (OSError, ValueError) as e:
            raise BadInput(f"{folder}: no run can be read there ({first_line(e)})") from None
        runs[folder.name if folder.name not in runs else str(folder)] = settings, log, result
    width = max(20, *map(len, runs)) + 2
    cut = lambda cell: f"{str(cell)[2 - width:]:>{width}}"  # of a long path its end
    line = lambda name, cells: print(f"{name:<20}" + "".join(map(cut, cells)))
    line("", runs)
    names = dict.fromkeys(k for settings, _, _ in runs.values() for k in settings)
    for k in names:
        cells = [settings.get(k, "") for settings, _, _ in runs.values()]
        if len(set(map(str, cells))) > 1:
            line(k, cells)
    print("---")
    names = dict.fromkeys(k for _, _, result in runs.values() for k in result if k.startswith("after."))
    for k in [*names, "seconds", "peak_gib"]:
        cells = [result.get(k, "") for _, _, result in runs.values()]
        line(k.removeprefix("after."), [f"{c:.4f}" if isinstance(c, float) else c for c in cells])
    curves = {name: [(x["step"], x["valid"]) for x in log if "valid" in x]
              for name, (_, log, _) in runs.items()}
    folder = Path(folders[0]) if len(folders) == 1 else Path(folders[0]).parent
    draw_curves(curves, folder / "compare.png")


def draw_curves(curves, file):
    """{run: [(step, {metric: value})]} -> a picture with a panel for each headline that was logged."""
    logged = {k for points in curves.values() for _, metrics in points for k in metrics}
    shown = [k for k in HEADLINES if k in logged][:6]
    if not shown:
        print("no validation curves were logged: nothing to draw")
        return
    try:
        import matplotlib
    except ImportError:
        print("pip install matplotlib, and the same command draws the curves")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(4.2 * columns, 3.2 * rows))
    for k, axis in zip(shown, axes.flat):
        for name, points in curves.items():
            known = [(step, metrics[k]) for step, metrics in points if k in metrics]
            axis.plot(*zip(*known) if known else ((), ()), marker=".", label=name)
        axis.set(title=k, xlabel="optimizer steps")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(shown):]:
        axis.set_axis_off()
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    print(f"curves: {file}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["compare"] or len(sys.argv) < 3:
        sys.exit("error: say python common.py compare out/a out/b ...")
    try:
        compare(sys.argv[2:])
    except BadInput as e:
        sys.exit(f"error: {e}")
