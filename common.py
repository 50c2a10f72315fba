"""What the five method files share: settings, runs, models, data, sampling and evaluation.

Nothing here belongs to one method. Read it from top to bottom, or begin with `Batch` and `collate`
(how text becomes tensors), `response_states`, `logits_of` and `in_chunks` (how a loss over a large
vocabulary fits into memory), `sample`, and `Evaluator`.

p is always the teacher and q always the student. Shapes: B responses, T tokens of prompt and
response, P of a prompt, N of a response, V vocabulary, H hidden size. R is the number of response
tokens of a whole batch, r of one chunk of it. A tensor with R rows has one row for each response
token, one response after the other. These rows hold no padding, so none can leak into a loss.
"""
import argparse
import atexit
import contextlib
import csv
import functools
import gzip
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zlib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm  # comes with transformers
from transformers import DynamicCache, EncoderDecoderCache

# transformers 5.24 renamed past_key_values to cache; until 5.40 the old name serves all versions
warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
HERE = Path(__file__).resolve().parent


# --- Errors ---------------------------------------------------------------------------------------
class BadInput(Exception):
    """What the user can mend. The text is one sentence: what is wrong, where, and what to do."""


@contextlib.contextmanager
def blaming(what):
    """Turn what a library raises inside the block into one sentence that begins with `what`."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as e:
        while type(e).__module__.startswith("datasets") and e.__cause__:
            e = e.__cause__  # its own text only says that something went wrong
        reason = (str(e).strip().splitlines() or [""])[0][:300] or type(e).__name__
        if "trust_remote_code" in str(e):
            reason = "it needs Python code from its author, and remote code is never run here"
        raise BadInput(f"{what}: {reason}") from e


# --- Settings: a dataclass is the command line; the comment behind a field is its help text -------
@dataclass
class Settings:
    """What every script can set. A script's Config adds the settings of its method."""
    # models and data
    teacher: str = "teacher"         # model directory or hub name; none: no teacher
    student: str = "student"         # the same; a directory without weights gives random ones
    data: str = str(HERE / "data/answers")  # file, folder of train/valid/test files, hub name
    response: str = "response"       # column of the response
    template: str = "auto"           # prompt with {columns}; auto: chat template, else {prompt}\n
    teacher_template: str = ""       # the teacher's, if it differs; auto: its own chat template
    max_prompt: int = 256            # tokens; longer prompts lose their beginning
    max_response: int = 64           # tokens; longer ones lose their end; for real data 256 or more
    holdout: float = 0.05            # share of train that each missing split (valid, test) gets
    # optimization
    steps: int = 300                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches of a step; raise it when memory runs out
    lr: float = 3e-3                 # peak; for pretrained models 1e-5 to 5e-5
    warmup: int = 20                 # steps of linear warm-up; then a cosine to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    # evaluation
    eval_every: int = 100            # steps between evaluations on validation rows
    eval_rows: int = 500             # test rows, at most (--steps 0 on one file: all); valid: 200
    eval_temperature: float = 1.0    # of the student's distribution that is evaluated
    kl_on: Literal["samples", "references"] = "samples"  # KL on samples or on given responses
    # system
    log_every: int = 20              # steps between lines of the log
    save_every: int = 500            # steps between checkpoints
    seed: int = 0                    # of data order, sampling and random weights
    device: str = "auto"             # auto (cuda, else cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations and of the teacher
    compile: bool = False            # torch.compile: faster steps after minutes of compiling
    recompute: bool = False          # compute activations again for the gradient: less memory
    out: str = ""                    # directory of the run; empty: out/<script>-<date>-<time>
    resume: str = ""                 # directory of an unfinished run, whose settings are used

    unused = ()  # settings without effect in a script: its command line does not have them


# what may change when a run is resumed, because it does not change what is learned
FREE = ("accum", "eval_every", "log_every", "save_every", "device", "compile", "recompute",
        "cache", "out", "resume")


def settings_of(config_class):
    """{name: field} of what a script's command line has."""
    return {f.name: f for f in fields(config_class) if f.name not in config_class.unused}


def parse_args(config_class, argv):
    """Command line -> config_class(...). --batch-size 8, --batch_size=8 and --no-compile work."""
    comments = {}
    for source in [c for c in reversed(config_class.__mro__) if is_dataclass(c)]:
        comments |= re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(source), re.M)
    about = (sys.modules[config_class.__module__].__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)

    def refuse(message):
        raise BadInput(f"{message} (--help lists all settings)")

    parser.error = refuse
    for name, f in settings_of(config_class).items():
        default = str(f.default).replace(f"{HERE}{os.sep}", "")
        options = {"default": f.default, "help": f"{comments[name]} [{default}]".replace("%", "%%")}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(f.type) is Literal:
            options["choices"] = get_args(f.type)
        else:  # a shell expands ~ in --out ~/run, but not in --out=~/run
            kind = os.path.expanduser if f.type is str else f.type
            options |= {"type": kind, "metavar": f.type.__name__}
        parser.add_argument("--" + name.replace("_", "-"), **options)
    words = [re.sub("^--[^=]*", lambda m: m[0].replace("_", "-"), word) for word in argv]
    if resumed := parser.parse_args(words).resume:  # `Run` refuses what would alter the result
        saved, names = saved_settings(resumed), settings_of(config_class)
        parser.set_defaults(**{k: v for k, v in saved.items() if k in names})
    return config_class(**vars(parser.parse_args(words)))


def saved_settings(directory):
    """settings.json of a run."""
    with blaming(f"--resume {directory}: no run can be read there"):
        return dict(json.loads(Path(directory, "settings.json").read_text()))


def main(train, config_class):
    """Run a script. Exit status: 0 done, 2 BadInput, 1 another failure, 130 or 143 on a signal."""
    for stream in (sys.stdout, sys.stderr):  # text that a terminal cannot show must not end a run
        stream.reconfigure(errors="backslashreplace")
    try:
        train(parse_args(config_class, sys.argv[1:]))
        return 0
    except torch.OutOfMemoryError:
        status, reason = 1, "out of memory: raise --accum, give --recompute or lower --max-response"
    except (BadInput, OSError) as e:
        status, reason = 2 if isinstance(e, BadInput) else 1, e
    except KeyboardInterrupt:
        status, reason = 130, "stopped outside of training: --resume goes on from a checkpoint"
    if os.environ.get("RANK", "0") == "0" or status == 1:  # other reasons are the same in all
        print(f"error: {reason}", file=sys.stderr)
    return status


def check_settings(cfg, **limits):
    """BadInput where a number lies outside (lowest, highest) and would train nonsense silently."""
    one_or_more = ("batch_size", "accum", "max_prompt", "max_response", "eval_every", "eval_rows",
                   "log_every", "save_every")
    limits |= {"steps": (0, math.inf), "lr": (0, 1e3), "warmup": (0, math.inf), "clip": (1e-9, 1e9),
               "weight_decay": (0, 1e3), "holdout": (0, 0.4), "eval_temperature": (0.05, 100),
               "seed": (0, 10**9), **dict.fromkeys(one_or_more, (1, math.inf))}
    for f in fields(cfg):
        value, (low, high) = getattr(cfg, f.name), limits.get(f.name, (0, 0))
        choices = get_args(f.type)  # a notebook has not checked them yet
        if not choices and not isinstance(value, (int, float) if f.type is float else f.type):
            raise BadInput(f"{f.name} {value!r}: a value of type {f.type.__name__} is wanted")
        if choices and value not in choices:
            raise BadInput(f"{f.name} {value!r}: choose one of {choices}")
        if f.name in limits and not low <= value <= high:  # nan fails too
            limit = f"between {low} and {high}" if high < math.inf else f"{low} or more"
            raise BadInput(f"--{f.name.replace('_', '-')} {value}: it must be {limit}")
    n = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % (cfg.accum * n):
        raise BadInput(f"--batch-size {cfg.batch_size} counts the sequences of a whole optimizer "
                       f"step: it must be a multiple of --accum {cfg.accum} times {n} processes")


def compute_dtype(cfg, device):
    """--dtype auto: bf16 where CUDA has it, else fp32. No speed is measured, so runs repeat."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def precision(cfg, device):
    """The autocast context of a forward pass: under bf16 it casts the student's fp32 weights."""
    dtype = compute_dtype(cfg, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def set_lr(optimizer, step, cfg):
    """Set and return the rate of a step: linear warm-up, then a cosine down to a tenth of --lr."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup))
    progress = max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    lr = cfg.lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# --- Several processes: torchrun --nproc_per_node=N script.py -------------------------------------
# Every process holds both models, takes its share of each step, and evaluates; process 0 writes and
# prints. The loops divide sums by the counts of all processes, so a wrapper (DDP) is not needed.
def processes():
    """(rank, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(wanted):
    """--device -> torch.device of this process. Under torchrun it joins the others."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if n > 1 and device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    with blaming(f"--device {wanted}: it cannot be used on this machine"):
        torch.zeros(1, device=device)
    cuda = device.startswith("cuda")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if n > 1 and not dist.is_initialized():
        # the others wait while process 0 lets the teacher respond to all prompts: maybe for hours
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6),
                                device_id=torch.device(device) if cuda else None)
        atexit.register(dist.destroy_process_group)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return torch.device(device)


def all_reduce_sum(x):
    """The sum of a number over all processes."""
    numbers = [x] * processes()[1]  # one of each process
    if len(numbers) > 1:
        dist.all_gather_object(numbers, x)
    return sum(numbers)


def from_process_0(make):
    """Process 0 alone calls make(); all processes get what it returned."""
    box = [make() if processes()[0] == 0 else None]
    if processes()[1] > 1:
        dist.broadcast_object_list(box)
    return box[0]


def reduce_gradients(model, totals):
    """Add up, in place, the gradients of all processes and the tensor `totals` for the log."""
    if processes()[1] > 1:
        tensors = [p.grad for p in model.parameters() if p.grad is not None] + [totals]
        flat = parameters_to_vector(tensors)  # one message, not one for each parameter
        dist.all_reduce(flat)
        vector_to_parameters(flat, tensors)


def sample_seed(seed, step):
    """The seed of what is sampled in one step. Each process has its own."""
    return 10**9 * seed + step + 10**15 * processes()[0]


# --- A run: its directory, log, checkpoints and signals -------------------------------------------
class Run:
    """DIR/ with settings.json, log.jsonl, a copy of the script, checkpoint.pt, and at the end the
    student, generations.jsonl and result.json. The constructor only looks; `start` creates DIR."""

    def __init__(self, cfg, script):
        self.cfg, self.script = cfg, Path(script)
        self.stop, self.board = 0, None
        self.device = join_processes(cfg.device)
        default = f"out/{self.script.stem}-{datetime.now():%Y%m%d-%H%M%S}"
        self.dir = from_process_0(lambda: Path(cfg.resume or cfg.out or default))
        names = settings_of(type(cfg))
        self.settings = {"script": self.script.stem, **{k: getattr(cfg, k) for k in names}}
        dtype = compute_dtype(cfg, self.device)
        self.settings["dtype"] = str(dtype).removeprefix("torch.")  # auto must not change later
        if cfg.resume:
            saved = saved_settings(cfg.resume)
            for k, new in self.settings.items():
                if k not in FREE and saved.get(k) != new:
                    raise BadInput(f"--resume {cfg.resume}: {k} was {saved.get(k)} and is {new} "
                                   "now, which changes the result: start a new run")
        elif any((self.dir / name).exists() for name in ("settings.json", "student")):
            raise BadInput(f"--out {self.dir} holds a run or a model: choose another directory, or "
                           "go on with --resume")
        for k in names:
            mark = " " if getattr(cfg, k) == names[k].default else "*"
            print(f"{mark} {k:<20}{str(self.settings[k]).replace(f'{HERE}{os.sep}', '')}")
        print(f"run directory: {self.dir}", flush=True)
        torch.manual_seed(cfg.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what stays in fp32

    def start(self, data, **parts):
        """Create the directory, or load the checkpoint of --resume. `data` is a hash of the data: a
        resumed run must go on with the same. `parts`, which have state_dict and load_state_dict,
        are what a checkpoint holds. Returns the number of steps that are done."""
        self.parts, first, seconds, (rank, n) = parts, 0, 0.0, processes()
        if n > 1:
            torch.manual_seed(self.cfg.seed + rank)  # dropout differs between processes
        if self.cfg.resume and saved_settings(self.dir).get("data_hash") != data:
            raise BadInput(f"--resume {self.dir}: the data has changed since: start a new run")
        file = self.dir / "checkpoint.pt"
        if self.cfg.resume and file.exists():
            with blaming(f"{file} cannot be loaded"):
                state = torch.load(file, map_location="cpu", weights_only=True)
                for key, part in parts.items():
                    part.load_state_dict(state["parts"][key])
                first, seconds = state["step"], state["seconds"]
                if rank == 0:
                    torch.set_rng_state(state["rng"])
                    if self.device.type == "cuda" and state["cuda_rng"] is not None:
                        torch.cuda.set_rng_state(state["cuda_rng"])
            print(f"resumed from {file} at step {first}")
        if rank == 0:
            self.write_settings(first, data)
        self.t0 = time.time() - seconds  # `seconds` were spent before the run was resumed
        with contextlib.suppress(ValueError):  # a thread of a notebook cannot catch signals
            for number in (signal.SIGINT, signal.SIGTERM) if first < self.cfg.steps else ():
                signal.signal(number, lambda number, frame: setattr(self, "stop", number))
        return first

    def write_settings(self, first, data):
        """settings.json and the script of a new run; the log keeps the steps before `first`."""
        with blaming(f"{self.dir}: the run cannot be written there"):
            self.dir.mkdir(parents=True, exist_ok=True)
            if not self.cfg.resume:  # mode x: of two runs that start at once, the second fails
                with open(self.dir / "settings.json", "x") as f:
                    json.dump({**self.settings, "data_hash": data}, f, indent=1)
                shutil.copy(self.script, self.dir / self.script.name)
            log = self.dir / "log.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            whole = [x for x in lines if x.endswith("}") and json.loads(x)["step"] < first]
            write(log, "".join(x + "\n" for x in whole))
        with contextlib.suppress(ImportError):  # curves, where tensorboard is installed
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.dir, purge_step=first)

    def log(self, step, **values):
        """A line to log.jsonl and one to the screen. BadInput if the loss is not finite."""
        if not math.isfinite(values.get("loss", 0.0)):
            self.fail(step, f"the loss is {values['loss']}")
        shown = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
        print(f"step {step:5d}/{self.cfg.steps}  {'  '.join(shown[:9])}", flush=True)
        if processes()[0] == 0:
            with open(self.dir / "log.jsonl", "a") as f:
                line = {"step": step, "seconds": round(time.time() - self.t0, 2), **values}
                f.write(json.dumps(line) + "\n")
            for k, v in values.items() if self.board else ():
                self.board.add_scalar(k, v, values.get("round", step))

    def evaluated(self, step, metrics, generations=()):
        """Log the metrics of the validation rows, and show two responses."""
        self.log(step, **{f"valid/{k}": v for k, v in metrics.items()})
        for g in generations[:2]:
            prompt = g["prompt"] if isinstance(g["prompt"], str) else g["prompt"][-1]["content"]
            print(f"      {prompt[:90]!r} -> {g['sample'][:160]!r}", flush=True)

    def end_step(self, step):
        """After every optimizer step; `step` of them are done. Save when it is time, after the last
        step, and when a signal came."""
        self.stop = all_reduce_sum(self.stop)  # a signal to one process stops all of them
        last = self.stop or step == self.cfg.steps
        if last or step % self.cfg.save_every == 0:
            self.save(step)
        if last:  # all is saved, so signals act as Python's defaults
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.leave_if_asked(f"after step {step}, saved")

    def leave_if_asked(self, where):
        """End the run if a signal came."""
        if self.stop:
            print(f"stopped {where}: --resume {self.dir} goes on", flush=True)
            sys.exit(130 if self.stop % signal.SIGTERM else 143)  # `stop` is a sum over processes

    def fail(self, step, what):
        raise BadInput(f"{what} at step {step}: start anew with a lower --lr")

    def save(self, step):
        """Write checkpoint.pt. A weight that is not finite is never saved."""
        if not all(p.isfinite().all() for p in self.parts["student"].parameters()):
            self.fail(step, "a weight is no longer a finite number")
        if processes()[0] == 0:
            cuda_rng = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
            write(self.dir / "checkpoint.pt", {
                "step": step, "seconds": time.time() - self.t0, "rng": torch.get_rng_state(),
                "cuda_rng": cuda_rng, "parts": {k: v.state_dict() for k, v in self.parts.items()}})

    def finish(self, student, columns, meanings, generations=()):
        """Print `columns` {name: metrics}, a line for each metric that has a meaning; save the
        student, generations.jsonl and result.json."""
        peak = 0.0
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        elif os.name == "posix":
            import resource  # Windows has no such module
            unit = 2**30 if sys.platform == "darwin" else 2**20
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        result = {f"{name}.{k}": round(v, 6) for name, m in columns.items() for k, v in m.items()}
        result |= {"script": self.script.stem, "steps": self.cfg.steps,
                   "seconds": round(time.time() - self.t0, 1), "peak_gib": round(peak, 3),
                   "torch": torch.__version__, "transformers": transformers.__version__}
        print("\n" + " " * 18 + "".join(f"{name:>10}" for name in columns))
        for k, meaning in meanings.items():
            if any(k in m for m in columns.values()):
                cells = [f"{m[k]:10.3f}" if k in m else " " * 10 for m in columns.values()]
                print(f"{k:<18}{''.join(cells)}   {meaning}")
        if processes()[0] == 0:
            with blaming(f"{self.dir}: the result cannot be written there"):
                student.save_pretrained(self.dir / "student")
                student.tokenizer.save_pretrained(self.dir / "student")
                lines = [json.dumps(g, ensure_ascii=False) + "\n" for g in generations]
                write(self.dir / "generations.jsonl", "".join(lines))
                write(self.dir / "result.json", json.dumps(result, indent=1))
        if processes()[1] > 1:
            dist.barrier()
        print(f"\n{result['seconds']:.0f} s. {self.dir} holds student/ and result.json", flush=True)
        return result


def write(path, content):
    """Write text, or a checkpoint, in one piece: a kill or a full disk leaves the old file."""
    part = path.with_name(path.name + ".tmp")
    try:
        if isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        else:
            torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written ({e}): make room, then --resume") from e


# --- Models. A loaded one also carries `role`, `tokenizer` and `vocab`, how many logits are used --
def model_path(cfg, role):
    """The names teacher, student and student-kl mean the models in the folder of --data."""
    name = getattr(cfg, role)
    if name not in ("teacher", "student", "student-kl"):
        return name
    if not Path(cfg.data, name, "config.json").is_file():
        raise BadInput(f"--{role} {name}: --data {cfg.data} brings no such model: name a model "
                       f"directory or a hub name with --{role}")
    return str(Path(cfg.data, name))


def load_model(path, role, device, dtype=torch.float32, seed=0):
    """A decoder-only or encoder-decoder model in eval mode, with its tokenizer. BadInput where
    weights are missing: transformers would fill the gaps with random numbers."""
    with blaming(f"--{role} {path}"):
        files = [f.name for f in Path(path).iterdir()] if Path(path).is_dir() else []
        if not files and (os.path.exists(path) or len(Path(path).parts) > 2):
            raise ValueError("there is no such directory")
        if "adapter_config.json" in files:
            raise ValueError("this is an adapter: merge it into its base model first")
        if files and not any(re.match("tokenizer|vocab|spiece|sentencepiece", f) for f in files):
            raise ValueError("no tokenizer is there: save one beside the model")
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        auto = (transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder
                else transformers.AutoModelForCausalLM)
        weights = r"\.(safetensors|bin|h5|msgpack|gguf|ckpt|pth?)(\.index\.json)?$"
        if role == "student" and files and not any(re.search(weights, f) for f in files):
            print(f"{path} holds no weights: the student starts from random ones")
            torch.manual_seed(seed)
            model = auto.from_config(config).to(dtype)
        else:
            model, report = auto.from_pretrained(
                path, dtype=dtype, weights_only=True, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True)
            for name, in_file, in_model in sorted(report["mismatched_keys"]):
                raise ValueError(f"{name} is {tuple(in_file)} in the weights and {tuple(in_model)} "
                                 "in config.json: these files do not belong together")
            missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
            if extra:
                print(f"{path}: {len(extra)} weights are not used, such as {extra[0]}")
            if missing:
                raise ValueError(f"{len(missing)} weights are missing and would be random, such as "
                                 f"{missing[0]}: save the model with save_pretrained")
    model = model.to(device).eval()  # from_config gives training mode
    model.role, model.tokenizer = role, tokenizer
    model.vocab = len(model.get_output_embeddings().weight)
    set_eos(model, f"--{role} {path}")
    check_model(model, f"--{role} {path}")
    return model


def set_eos(model, name):
    """Let EOS be what ends a response. Gemma's and Phi-3's tokenizers name the token that ends a
    whole text; only the generation config lists the one that ends a turn of a chat."""
    tokenizer, ends = model.tokenizer, model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    # a plain token would be a default of config.json that does not belong to this tokenizer
    ids = [i for i in ends if len(ends) == 1 and i in tokenizer.added_tokens_decoder]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ue000"}]
        with contextlib.suppress(Exception):  # a template with an error is reported with the data
            text = tokenizer.apply_chat_template(turns, tokenize=False).partition("\ue000")[2]
            ids = [i for i in tokenizer(text, add_special_tokens=False).input_ids[:1] if i in ends]
    if ids and ids[0] != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])
        print(f"{name}: responses end with {tokenizer.eos_token}, as the generation config says")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{name}: the tokenizer has no end-of-sequence token to end a response with")


@torch.no_grad()
def check_model(model, name):
    """BadInput if our logits differ from the model's, or its kind of cache is not supported."""
    config, kind = decoder_config(model), type(model).__name__
    for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, k, None) not in (None, 0, 1):
            raise BadInput(f"{name}: {kind} changes its logits after the output head ({k}), and "
                           "the losses here do not: choose another model")
    prompt, response = [3, 4, 5, 6], [4, 3, 5]
    examples = [Example(prompt, prompt, response), Example(prompt, prompt, response + prompt)]
    ids = lambda tokens: torch.tensor([tokens], device=model.device)
    with blaming(f"{name}: {kind} is not built like GPT-2, Llama, Qwen or T5"):
        layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
        if model._is_stateful or not layers <= {"DynamicLayer", "DynamicSlidingWindowLayer"}:
            raise ValueError("it has no cache of keys and values alone, as sampling needs")
        batch = collate(examples, model)
        ours = logits_of(model, response_states(model, batch))[:len(response)]
        if is_encdec(model):
            start = [model.config.decoder_start_token_id]
            out = model(input_ids=ids(prompt), decoder_input_ids=ids(start + response[:-1]))
        else:
            out = model(input_ids=ids(prompt + response[:-1]))
    theirs = out.logits[0, -len(response):].float()
    if (ours - theirs).abs().max() > 0.02 * theirs.abs().max() + 1e-3:
        raise BadInput(f"{name}: the logits of {kind} are not its output head times its hidden "
                       "states, as the losses here need: choose another model")


def load_pair(cfg, device, same_tokens=True):
    """(student with fp32 weights, teacher in the compute dtype, frozen, or None), in eval mode.

    Heads that are padded to different sizes are cut to the smaller one, `model.vocab`, so both
    models renormalise over the same V tokens. `same_tokens`: False if the teacher gives text.
    """
    student = load_model(model_path(cfg, "student"), "student", device, seed=cfg.seed)
    if is_encdec(student) and around(student.tokenizer)[0]:
        raise BadInput(f"--student {cfg.student} begins every response with a token of its own, as "
                       "BART does: choose a T5-like or decoder-only model")
    teacher = None
    if cfg.teacher != "none":
        dtype = compute_dtype(cfg, device)
        teacher = load_model(model_path(cfg, "teacher"), "teacher", device, dtype)
        teacher.requires_grad_(False)
        if same_tokens:
            student.vocab = teacher.vocab = min(student.vocab, teacher.vocab)
    both = [m for m in (student, teacher) if m]
    if cfg.recompute:
        with blaming("--recompute"):
            student.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64    # it counts both models together
        torch._dynamo.config.suppress_errors = True  # without a compiler, go on without
        for model in both:
            whole = [model.base_model]
            parts = [model.get_encoder(), model.get_decoder()] if is_encdec(model) else whole
            for part in parts:
                part.compile(dynamic=True)
    small = sum(m.num_parameters() for m in both) < 10**6
    if device.type == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        print("one CPU thread: models this small are slower with more (or set OMP_NUM_THREADS)")
    return student, teacher


def is_encdec(model):
    """Is it an encoder-decoder, such as a T5?"""
    return model.config.is_encoder_decoder


def decoder_config(model):
    """The part of a configuration that describes the decoder: an encoder may have other sizes."""
    decoder = model.get_decoder() if is_encdec(model) else model
    return decoder.config.get_text_config(decoder=True)


def no_dropout(model):
    """Set every dropout rate to 0. Training mode, which --recompute needs, then gives the same
    results as eval mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# --- Rows of data: files, folders, saved data sets and the hub ------------------------------------
SPLITS = {"train": "train", "train_sft": "train", "valid": "valid", "validation": "valid",
          "dev": "valid", "val": "valid", "test": "test", "test_sft": "test"}
FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SLOT = re.compile(r"\{(\w+)\}")  # a column in a template


def read_file(path):
    """[(where, {column: value})] of a file of rows. JSONL and CSV are read with the standard
    library, because `datasets` guesses types and does not name the row that is wrong."""
    form, at, rows = next((s for s in reversed(path.suffixes) if s != ".gz"), ""), 0, []
    if form not in FORMS:
        raise BadInput(f"{path}: the name of a file of rows must end in one of {', '.join(FORMS)}")
    if not path.is_file():
        raise BadInput(f"--data {path}: there is no such file")
    if form == ".parquet":
        import datasets  # takes a second, so only where it is needed
        datasets.disable_progress_bars()
        with blaming(path):
            loaded = datasets.Dataset.from_parquet(str(path))
            return [(f"{path}, row {i}", row) for i, row in enumerate(loaded, 1)]

    def lines():
        nonlocal at
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for at, line in enumerate(file, 1):
                yield line.decode("utf-8-sig")

    try:
        if form == ".json":  # an array of objects
            whole = json.loads("".join(lines()))
            return [(f"{path}, row {at}", {**row}) for at, row in enumerate(whole, 1)]
        if form == ".jsonl":
            return [(f"{path}, line {at}", {**json.loads(x)}) for x in lines() if x.strip()]
        reader = csv.reader(lines(), delimiter="," if form == ".csv" else "\t", strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError("two columns have one name")
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells under a header of {len(header)}")
            rows.append((f"{path}, line {at}", dict(zip(header, cells))))
    except (ValueError, TypeError, RecursionError, csv.Error, OSError) as e:
        where = path if form == ".json" else f"{path}, line {at}"
        raise BadInput(f"{where}: {e}: mend the row or remove it") from e
    return rows


def find_rows(source, names=SPLITS):
    """{split: [(where, row)]} of a file, a folder of files train, valid and test, a saved data set,
    or one on the hub (owner/name or owner/name:configuration). `names`: {theirs: ours}."""
    path, found = Path(source), {}
    if path.is_file() or set(path.suffixes) & set(FORMS):
        return {"train": read_file(path)}
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        split = names.get(file.name.split(".")[0])
        if split in found:
            raise BadInput(f"--data {source}: two of its files are for {split}: remove one")
        if split and file.is_file():
            found[split] = read_file(file)
    if found:
        return found
    import datasets
    name, _, configuration = str(source).partition(":")
    with blaming(f"--data {source} is no file, no folder with a train.jsonl, and no data set"):
        loaded = (datasets.load_from_disk(path) if path.is_dir()
                  else datasets.load_dataset(name, configuration or None))
    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
    for theirs, ours in names.items():
        if theirs in loaded and ours not in found:
            rows = enumerate(loaded[theirs])
            found[ours] = [(f"{source}, {theirs} row {i}", dict(row)) for i, row in rows]
    if not found:
        raise BadInput(f"--data {source}: its splits {', '.join(loaded)} are none of {list(names)}")
    return found


def hold_out(splits, cfg):
    """Take the splits that are not given out of train, by a hash of the prompt: they are the same
    for every seed, and no prompt is in two of them. With --steps 0 a single split is all test."""
    if cfg.steps == 0 and len(splits) == 1:
        splits = {"train": [], "valid": [], "test": next(iter(splits.values()))}
    rows = splits.get("train", [])
    prompts = sorted({str(row["prompt"]) for row in rows}, key=lambda p: zlib.crc32(p.encode()))
    n = math.ceil(cfg.holdout * len(prompts))
    for split in ("test", "valid"):
        if split not in splits:
            held, prompts = set(prompts[:n]), prompts[n:]
            splits[split] = [r for r in rows if str(r["prompt"]) in held]
    rest = set(prompts)
    splits["train"] = [r for r in rows if str(r["prompt"]) in rest]
    for split in ("train", "valid", "test") if cfg.steps else ("test",):
        if not splits[split]:
            raise BadInput(f"--data {cfg.data}: of {len(rows)} training rows none is left for "
                           f"{split}: add rows, or a file for each split, or set --holdout")
    return splits


def text_in(row, column, where):
    """The text of a column, or "" where it is null or absent. Whole numbers are taken, too."""
    value = row.get(column)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise BadInput(f"{where}: column {column} holds a {type(value).__name__}, not a text")
    with blaming(f"{where}: column {column}"):
        return "" if value is None else str(value).encode().decode()  # refuses lone surrogates


def turns_in(row, where):
    """The messages of a row of the forms `messages`, ShareGPT's `conversations` and TRL's lists
    `prompt` and `completion`, as [{role, content}]; [] for other rows."""
    turns = row.get("messages") or row.get("conversations") or []
    if isinstance(row.get("prompt"), list):
        turns = row["prompt"] + list(row.get("completion") or [])
    roles = {"human": "user", "gpt": "assistant"}
    try:
        turns = [{"role": m["role"], "content": m["content"]} if "role" in m else
                 {"role": roles.get(m["from"], m["from"]), "content": m["value"]} for m in turns]
    except (TypeError, KeyError):
        turns = [{"content": None}]
    if not all(isinstance(m["content"], str) for m in turns):
        raise BadInput(f"{where}: messages must be objects with role and content, both texts")
    return turns


def read_row(row, where, cfg):
    """A raw row -> {prompt: a text or messages, response: a text or "", references: all right
    responses, if they are known, probs: how probable each is, columns: the raw row, where}."""
    turns, template = turns_in(row, where), "{prompt}" if cfg.template == "auto" else cfg.template
    for text in (template, cfg.teacher_template):
        if text not in ("", "auto") and not SLOT.search(text):
            raise BadInput(f"template {text!r} names no column, so all prompts would be the same")
    wanted = [] if turns and cfg.template == "auto" else SLOT.findall(template)
    for column in wanted + SLOT.findall(cfg.teacher_template):
        if column not in row:
            raise BadInput(f"{where}: there is no column {column} among {', '.join(row)}: name the "
                           'columns of a prompt, as in --template "{instruction}\\n{input}\\n"')
    if turns and turns[-1]["role"] == "assistant":
        prompt, response = turns[:-1], turns[-1]["content"]
    else:
        prompt, response = turns, text_in(row, cfg.response, where)
    if not turns:
        prompt = SLOT.sub(lambda m: text_in(row, m[1], where), template.replace("\\n", "\n"))
    references, probs = row.get("references") or [], row.get("probs") or []
    references = [references] if isinstance(references, str) else references
    lists = isinstance(references, list) and isinstance(probs, list)
    texts = lists and all(isinstance(r, str) for r in references)
    if not texts or len(probs) not in (0, len(references)):
        raise BadInput(f"{where}: references must be texts, and probs a number for each of them")
    return {"prompt": prompt, "response": response, "references": references, "probs": probs,
            "columns": row, "where": where}


def load_rows(cfg):
    """{"train", "valid", "test": rows} of --data. It needs no model, so bad data shows at once."""
    splits = {split: [read_row(row, where, cfg) for where, row in rows]
              for split, rows in find_rows(cfg.data).items()}
    columns = dict.fromkeys(c for rows in splits.values() for r in rows[:100] for c in r["columns"])
    used = {"prompt", "messages", "conversations", "completion", "references", "probs",
            cfg.response, *SLOT.findall(cfg.template + cfg.teacher_template)}
    if unread := [c for c in columns if c not in used]:
        print(f"columns that nothing reads: {', '.join(unread)} (--template can name them)")
    whole = cfg.steps == 0 and len(splits) == 1
    splits = hold_out(splits, cfg)
    splits["valid"] = spread(splits["valid"], min(cfg.eval_rows, 200))
    splits["test"] = spread(splits["test"], len(splits["test"]) if whole else cfg.eval_rows)
    return splits


def spread(rows, most):
    """All rows, or `most` of them evenly spread: the first ones may all come from one source."""
    chosen = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    return [rows[i] for i in chosen]


# --- From rows to examples: token ids, with the template around the prompt ------------------------
@dataclass(eq=False)
class Example:
    prompt: list            # token ids of the prompt as the student reads it
    teacher_prompt: list    # the same list, unless the teacher reads another template
    response: list          # token ids with EOS; without EOS where it was cut; [] where none is
    row: dict = field(default_factory=dict)

    def prompt_of(self, model):
        return self.teacher_prompt if model.role == "teacher" else self.prompt


def tokenize(tokenizer, texts, special=False):
    """Texts -> lists of token ids. Without `special` the text of a special token is plain text."""
    ids = []
    for i in tqdm(range(0, len(texts), 1000), "tokenize", delay=3, disable=None):
        ids += tokenizer(texts[i:i + 1000], add_special_tokens=False,
                         split_special_tokens=not special).input_ids
    return ids


def around(tokenizer):
    """What a tokenizer puts around a text: ([BOS], []) for Llama, ([], [EOS]) for T5."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    at = next((i for i in range(len(whole)) if whole[i:i + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare):]


@functools.cache
def special_tokens(tokenizer):
    """A pattern that finds the texts of all special tokens, also of those without a name."""
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = sorted({*found, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)))


def plain(text, tokenizer):
    """A user's words: the text of a special token gets a blank, so that it is read as text."""
    return special_tokens(tokenizer).sub(lambda m: f"{m[0][:1]} {m[0][1:]}", text)


def prompt_text(row, template, model):
    """What a model reads of a row: the prompt in a chat template, or columns in --template."""
    tokenizer, prompt = model.tokenizer, row["prompt"]
    if template != "auto":
        fill = lambda slot: plain(text_in(row["columns"], slot[1], row["where"]), tokenizer)
        return SLOT.sub(fill, template.replace("\\n", "\n"))
    if tokenizer.chat_template:
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        # some templates write the date: let it be the same tomorrow
        template = re.sub(r"strftime_now\([^)]*\)", "'26 Jul 2024'", tokenizer.get_chat_template())
        return tokenizer.apply_chat_template(
            [{**m, "content": plain(m["content"], tokenizer)} for m in turns],
            chat_template=template, tokenize=False, add_generation_prompt=True,
            date_string="26 Jul 2024")
    if isinstance(prompt, list):
        raise ValueError("rows with messages need a chat template, and the tokenizer has none")
    return plain(prompt, tokenizer) + ("" if is_encdec(model) else "\n")


def encode_prompts(rows, template, model, max_prompt):
    """The token ids of each prompt. Special tokens are recognised in the template's words. Too long
    a prompt loses its beginning, but not BOS; row["cut"] says so."""
    tokenizer, prompts = model.tokenizer, []
    texts = []
    for row in rows:
        with blaming(f"{row['where']}: template {template!r} for {tokenizer.name_or_path}"):
            texts.append(prompt_text(row, template, model))
    before, behind = around(tokenizer)
    if template == "auto" and tokenizer.chat_template:  # it writes these tokens itself
        before, behind = [], []
    for row, ids in zip(rows, tokenize(tokenizer, texts, special=True)):
        start = [] if ids[:len(before)] == before else before  # --template may hold BOS itself
        ids = start + ids + (behind if is_encdec(model) else [])
        bos = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
        row["cut"] = row.get("cut", False) or len(ids) > max_prompt  # of either model
        if len(ids) > max_prompt:
            ids = bos + ids[len(ids) - max_prompt + len(bos):]
        prompts.append(ids or [tokenizer.eos_token_id])  # something must come first
    return prompts


def encode(rows, student, teacher, cfg):
    """Rows -> Examples. A T5's prompt ends with EOS, and a decoder-only model's does not, so their
    tokens differ even with the same template."""
    prompts = teacher_prompts = encode_prompts(rows, cfg.template, student, cfg.max_prompt)
    if teacher and (cfg.teacher_template or is_encdec(teacher) != is_encdec(student)):
        template = cfg.teacher_template or cfg.template
        teacher_prompts = encode_prompts(rows, template, teacher, cfg.max_prompt)
    with blaming(f"--data {cfg.data}"):
        responses = tokenize(student.tokenizer, [row["response"] for row in rows])
    eos = [student.tokenizer.eos_token_id]
    responses = [(ids + eos)[:cfg.max_response] if ids else [] for ids in responses]
    return [Example(*parts) for parts in zip(prompts, teacher_prompts, responses, rows)]


def load_data(cfg, rows, student, teacher):
    """The rows of load_rows -> SimpleNamespace(train, valid, test: Examples, hash)."""
    for model in filter(None, (student, teacher)):
        check_context(model, cfg)
    if teacher and not cfg.teacher_template and cfg.template == "auto":
        if student.tokenizer.chat_template != teacher.tokenizer.chat_template:
            print("teacher and student have different chat templates, and both read the student's; "
                  "with --teacher-template auto each reads its own")
    data = SimpleNamespace(
        **{split: encode(part, student, teacher, cfg) for split, part in rows.items()})
    examples = data.train + data.valid + data.test
    check_tokens(examples, student, teacher)
    texts = [str(e.row["columns"]) for e in examples]
    if n := sum(plain(text, student.tokenizer) != text for text in texts):
        print(f"{n} rows hold the text of a special token, which is read as plain text")
    n_cut = sum(e.response[-1] != student.tokenizer.eos_token_id for e in examples if e.response)
    print(f"data: {len(data.train)} training prompts, "
          f"{sum(bool(e.response) for e in data.train)} with a response; {len(data.valid)} "
          f"validation, {len(data.test)} test rows; cut to fit: "
          f"{sum(e.row['cut'] for e in examples)} prompts, {n_cut} responses", flush=True)
    data.hash = hash_of([e.prompt, e.response] for e in examples)
    return data


def hash_of(things):
    """A short hash of anything that JSON can hold, to see whether data has changed."""
    return hashlib.sha1(json.dumps(list(things)).encode()).hexdigest()[:16]


def check_tokens(examples, student, teacher):
    """BadInput if a token id in use is beyond an embedding, or is another token to the teacher."""
    ours, theirs = student.tokenizer, teacher.tokenizer if teacher else student.tokenizer
    used = {ours.eos_token_id: "the end of a response"}
    for e in examples:
        used.update(dict.fromkeys({*e.prompt, *e.response} - set(used), e.row["where"]))
        for model in filter(None, (student, teacher)):
            most = max(e.prompt_of(model) + e.response + [ours.eos_token_id])
            if most >= len(model.get_input_embeddings().weight):
                raise BadInput(
                    f"{e.row['where']}: token {model.tokenizer.convert_ids_to_tokens(most)!r} is "
                    f"beyond the embedding of {model.config.name_or_path}: call "
                    "resize_token_embeddings on that model")
    if ours.eos_token_id != theirs.eos_token_id:
        raise BadInput(
            f"the student ends a response with {ours.eos_token}, the teacher with "
            f"{theirs.eos_token}: for a chat teacher and a base student of one family save the "
            "teacher's tokenizer into a copy of the student's directory; else choose another pair")
    for i, where in sorted(used.items()):
        a, b = ours.convert_ids_to_tokens(i), theirs.convert_ids_to_tokens(i)
        if a != b:
            raise BadInput(f"teacher and student have different tokenizers: token {i} ({where}) is "
                           f"{a!r} for the student and {b!r} for the teacher: choose another pair")


def check_context(model, cfg):
    """BadInput where prompts and responses may be longer than what a model can read."""
    context, parts = context_of(model), (cfg.max_prompt, cfg.max_response)
    if context and (max if is_encdec(model) else sum)(parts) > context:
        raise BadInput(f"--max-prompt {parts[0]} and --max-response {parts[1]} do not fit the "
                       f"{model.role}'s context of {context} tokens: lower them")


def context_of(model):
    """How many positions a model has; None if it has no limit."""
    return getattr(decoder_config(model), "max_position_embeddings", None)


# --- Running text: documents -> blocks of tokens (ddk.py's domains, dpkd.py's corpus) -------------
def documents(source):
    """A datasets.Dataset with the column text: of a .txt (documents between blank lines), a .jsonl
    or .parquet, a folder or pattern (each file is a document), a saved data set, or the hub."""
    import datasets
    if not sys.stdout.isatty():
        datasets.disable_progress_bars()
    path = Path(source).expanduser()
    files = path.rglob("*") if path.is_dir() else path.parent.glob(path.name)
    files = sorted(str(f) for f in files if f.is_file() and f.stat().st_size and f.name[0] != ".")
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix, "text")
    more = {"sample_by": "paragraph" if path.is_file() else "document"} if kind == "text" else {}
    with blaming(source):
        if (path / "state.json").exists():
            loaded = datasets.load_from_disk(path)
        elif files:
            loaded = datasets.load_dataset(kind, data_files=files, split="train", **more)
        else:
            name, _, configuration = str(source).partition(":")
            loaded = datasets.load_dataset(name, configuration or None, split="train")
        return loaded.select_columns("text")


def pack(texts, tokenizer, length, split=None, holdout=0.0):
    """Documents -> an array of blocks of `length` tokens, which `datasets` keeps on disk.

    Documents are joined, without duplicates, with EOS after each; an incomplete last block is
    dropped.
    With `split` only the documents of that split are used, which a hash of their text decides.
    """
    eos, seen, rest = tokenizer.eos_token_id, set(), []

    def blocks(batch):
        chosen = []
        for text in batch["text"]:
            known = hashlib.sha1(text.encode()).digest()[:8]
            # the split is a function of the text alone, so the same for every seed
            draw, cut = zlib.crc32(text.encode()) % 1000, 1000 * holdout
            own = "test" if draw < cut else "valid" if draw < 2 * cut else "train"
            if text.strip() and known not in seen and split in (None, own):
                chosen.append(text)
                seen.add(known)
        tokens = rest + [t for ids in tokenize(tokenizer, chosen) for t in ids + [eos]]
        whole = len(tokens) // length * length
        rest[:] = tokens[whole:]  # the next call goes on with it
        return {"tokens": [tokens[i:i + length] for i in range(0, whole, length)]}

    packed = texts.map(blocks, batched=True, batch_size=10_000, remove_columns="text")
    return packed.with_format("numpy")["tokens"] if len(packed) else []


# --- Batches --------------------------------------------------------------------------------------
@dataclass
class Batch:
    """Decoder-only: tokens (B,T) are prompt + response, right-padded. Encoder-decoder: tokens and
    mask (B,P) are the prompt, decoder_tokens (B,N) the shifted response.

    The R response tokens stand one after the other: positions (R,) says where in the flattened
    (B*T) or (B*N) a token is predicted, targets (R,) is the token, owner (R,) the number of its
    example. lengths (B,) counts response tokens.
    """
    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor = None
    decoder_tokens: torch.Tensor = None
    examples: list = None
    for_teacher: "Batch" = None  # the same responses, after the prompts that the teacher reads


def pad(lists, left=False):
    """Lists of token ids -> (len, longest). The fill 0 never matters: masks know the lengths."""
    width = max(map(len, lists))
    fills = [[0] * (width - len(x)) for x in lists]
    return torch.tensor([fill + x if left else x + fill for fill, x in zip(fills, lists)])


def collate(examples, model, teacher=None):
    """Examples -> Batch as the model reads them, on its device; with the teacher's view of them.

    The shift by one token is made here and nowhere else. Of the prompt a b and the response
    c d EOS, tokens are a b c d EOS (T = 5); c is predicted at b, so positions are 1 2 3, and
    targets are c d EOS. Masks come from lengths, never from ids: pad may equal EOS.
    """
    prompts = [e.prompt_of(model) for e in examples]
    responses = [e.response for e in examples]
    lengths = torch.tensor([len(r) for r in responses])
    targets = torch.tensor([t for r in responses for t in r], dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(examples)), lengths)
    place = torch.cat([torch.arange(len(r)) for r in responses])  # (R,) in its own response
    before = torch.tensor([len(p) for p in prompts])
    mask = decoder_tokens = None
    if is_encdec(model):
        tokens = pad(prompts)
        mask = (torch.arange(tokens.shape[1]) < before[:, None]).long()
        decoder_tokens = pad([[model.config.decoder_start_token_id] + r[:-1] for r in responses])
        positions = owner * decoder_tokens.shape[1] + place
    else:
        tokens = pad([p + r for p, r in zip(prompts, responses)])
        positions = owner * tokens.shape[1] + before[owner] - 1 + place  # at the token before
    batch = Batch(tokens, positions, targets, owner, lengths, mask, decoder_tokens, examples)
    for name, value in vars(batch).items():
        if torch.is_tensor(value):
            setattr(batch, name, value.to(model.device))
    if teacher:
        batch.for_teacher = collate(examples, teacher)
    return batch


def micro_batches(examples, student, teacher, cfg):
    """The examples of one optimizer step -> --accum batches. They are sorted by length first, which
    means less padding; the step sees the same examples."""
    ordered = sorted(examples, key=lambda e: len(e.prompt) + len(e.response))
    size = len(ordered) // cfg.accum
    return [collate(ordered[i:i + size], student, teacher) for i in range(0, len(ordered), size)]


def step_indices(n, step, cfg, of_all=False):
    """Which of n examples an optimizer step uses: shuffled anew in every epoch, and a function of
    seed and step alone, so a resumed run sees what it would have seen. Each process takes its
    share; with `of_all` it sees the shares of all."""
    first = step * cfg.batch_size
    epochs = {i // n for i in range(first, first + cfg.batch_size)}
    order = {e: np.random.default_rng((cfg.seed, e)).permutation(n) for e in epochs}
    rank, world = (0, 1) if of_all else processes()
    return [int(order[i // n][i % n]) for i in range(first + rank, first + cfg.batch_size, world)]


# --- From tokens to hidden states to logits, one chunk of response tokens at a time ---------------
def response_states(model, batch):
    """(R,H): the last hidden states at the positions that predict the response tokens.

    A decoder-only model runs right-padded and without a mask: it never looks to the right, and
    without a mask the fast attention kernels serve. Under autocast the states get autocast's dtype.
    """
    if is_encdec(model):
        memory = model.get_encoder()(input_ids=batch.tokens, attention_mask=batch.mask)[0]
        hidden = model.get_decoder()(
            input_ids=batch.decoder_tokens, encoder_hidden_states=memory,
            encoder_attention_mask=batch.mask, use_cache=False)[0]
    else:
        hidden = model.base_model(input_ids=batch.tokens, use_cache=False)[0]  # (B,T,H)
    return for_head(model, hidden.flatten(0, 1)[batch.positions])


def for_head(model, hidden):
    """The input of the output head: a T5 with tied embeddings scales it, and it gets autocast's
    dtype again, because a final norm with fp32 weights returns fp32."""
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * model.config.d_model**-0.5
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return hidden


def logits_of(model, hidden):
    """(r,H) -> (r,V) fp32 logits, cut to the first `model.vocab` tokens, see load_pair. The product
    runs in the dtype of `hidden`, the rest in fp32: bf16 softmaxes would be 5 % off."""
    head = model.get_output_embeddings()
    bias = None if getattr(head, "bias", None) is None else head.bias.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden, head.weight.to(hidden.dtype), bias)
    if model.vocab < len(head.weight):  # even a slice of everything costs a copy of its gradient
        logits = logits[:, :model.vocab]
    return logits.float()


def chunk_slices(hidden, model):
    """Equal slices of the R rows, whose logits take at most 16 MB on a CPU, or 1 GB on a GPU."""
    most = max(1, (2**30 if hidden.device.type == "cuda" else 2**24) // (4 * model.vocab))
    size = math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / most)))
    return [slice(i, i + size) for i in range(0, len(hidden), max(1, size))]


def in_chunks(hidden, model):
    """Yield (rows, part): a slice of the R rows, and their states (r,H). The caller makes logits
    and a loss of them, and calls backward(). Logits of all R rows would take most of the memory.

    The head gets its gradient at each backward(). `part` is detached: the rest of the model gets
    its gradient after the last chunk. So never leave the loop early: that gradient would be lost.
    Divide each loss by the tokens of the whole step before backward().
    """
    gradients = []
    for rows in chunk_slices(hidden, model):
        part = hidden[rows].detach().requires_grad_()
        yield rows, part
        gradients.append(part.grad)
    hidden.backward(torch.cat(gradients))


def log_softmax_at(logits, targets):
    """(r,V), (r,) -> (r,) log-softmax at the targets, without the other V - 1 entries."""
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


@torch.no_grad()
def row_values(function, model, batch, teacher=None):
    """(R,k): the k values that function(logits (r,V), teacher_logits (r,V) or None, targets (r,))
    gives for each row, chunk by chunk and without gradient."""
    hidden, values = response_states(model, batch), []
    teacher_hidden = response_states(teacher, batch.for_teacher) if teacher else None
    for rows in chunk_slices(hidden, model):
        teacher_logits = logits_of(teacher, teacher_hidden[rows]) if teacher else None
        found = function(logits_of(model, hidden[rows]), teacher_logits, batch.targets[rows])
        values.append(torch.stack(found, -1))
    return torch.cat(values)


# --- Sampling -------------------------------------------------------------------------------------
@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # its shapes change with every token
def sample(model, prompts, max_new, temperature=1.0, warpers=(), seed=0, batch_size=256):
    """Prompts (lists of token ids) -> responses (lists of token ids).

    By default they come from the very distribution that is scored: temperature 1, no truncation,
    no dropout. Temperature 0 is greedy. `warpers` are transformers' own, such as TopKLogitsWarper.
    A response ends with its first EOS, or after max_new tokens without one.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    config, out = decoder_config(model), [None] * len(prompts)
    # keys and values take 16 GiB at most; not the free memory: samples depend on the batch size
    length = max(map(len, prompts), default=0) + max_new
    size = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize * length
    batch_size = max(1, min(batch_size, 2**34 // size))
    for i in range(0, len(order), batch_size):
        ids = order[i:i + batch_size]
        rows = sample_batch(model, [prompts[j] for j in ids], max_new, temperature, warpers,
                            generator)
        for j, row in zip(ids, rows):
            out[j] = row
    model.train(was_training)
    return out


def sample_batch(model, prompts, max_new, temperature, warpers, generator):
    """One batch of `sample`. Rows that have ended leave it, so the others go faster."""
    device, encdec = model.device, is_encdec(model)
    eos, config = model.tokenizer.eos_token_id, decoder_config(model)
    # a decoder-only model continues its prompts: they are padded on the left and told positions
    prompt = pad(prompts, left=not encdec).to(device)                                # (B,P)
    lengths = torch.tensor([len(p) for p in prompts], device=device)                 # (B,)
    at = torch.arange(prompt.shape[1], device=device)
    mask = (at < lengths[:, None] if encdec else at >= len(at) - lengths[:, None]).long()
    decoder = model.get_decoder() if encdec else model.base_model
    cache, memory = DynamicCache(config=config), None
    if encdec:
        memory = model.get_encoder()(input_ids=prompt, attention_mask=mask)[0]
        cache = EncoderDecoderCache(cache, DynamicCache(config=config))
        tokens = torch.full((len(prompts), 1), model.config.decoder_start_token_id, device=device)
    else:
        tokens, position_ids = prompt, (mask.cumsum(-1) - 1).clamp(min=0)
    out, alive = [[] for _ in prompts], list(range(len(prompts)))  # alive: rows still in the batch
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for t in range(max_new):
        if encdec:
            inputs = {"encoder_hidden_states": memory, "encoder_attention_mask": mask}
        else:
            inputs = {"attention_mask": mask, "position_ids": position_ids}
        hidden = decoder(input_ids=tokens, past_key_values=cache, use_cache=True, **inputs)[0]
        logits = logits_of(model, for_head(model, hidden[:, -1]))                    # (B,V)
        if temperature > 0:
            logits = logits / temperature
            for warp in warpers:
                logits = warp(None, logits)
            logits = logits + gumbel(logits, generator)  # the argmax is then an exact draw
        token = logits.argmax(-1)                                                    # (B,)
        for row, one in zip(alive, token.tolist()):
            if out[row][-1:] != [eos]:
                out[row].append(one)
        done, tokens = done | (token == eos), token[:, None]
        if done.all():
            break
        if done.sum() * 8 > len(done):
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive = [alive[i] for i in keep.tolist()]
            done, tokens, lengths, mask = done[keep], tokens[keep], lengths[keep], mask[keep]
            memory = memory[keep] if encdec else None
        if not encdec:
            position_ids = lengths[:, None] + t
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return out


def gumbel(like, generator):
    """Gumbel noise of that shape: -log of an exponential variable, clamped: it can be 0."""
    if like.device.type == "cpu":  # the numbers of exponential_, in a third of its time
        uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        noise = uniform.neg_().log1p_().neg_().to(like.dtype)
    else:
        noise = torch.empty_like(like).exponential_(generator=generator)
    return noise.clamp_(min=1e-30).log_().neg_()


def respond(model, examples, cfg, temperature=1.0, seed=0):
    """Copies of the examples with responses of the model, of at most --max-response tokens."""
    prompts = [e.prompt_of(model) for e in examples]
    with precision(cfg, model.device):
        responses = sample(model, prompts, cfg.max_response, temperature, seed=seed)
    return [replace(e, response=r) for e, r in zip(examples, responses)]


def teacher_responses(teacher, examples, cfg):
    """The examples with the teacher's responses, drawn once at temperature 1. They are kept on disk
    under teacher, prompts and seed, so that the next run need not wait for them."""
    weights = [p.flatten()[::max(1, p.numel() // 64)].tolist() for p in teacher.parameters()]
    eos = teacher.tokenizer.eos_token_id
    key = hash_of([weights, str(teacher.config), str(teacher.dtype),
                   [e.teacher_prompt for e in examples], eos, cfg.max_response, cfg.seed])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache / "kd-of-language-models" / f"responses-{key}.json"

    def ask():
        if not file.is_file():
            print(f"the teacher responds to {len(examples)} prompts ...", flush=True)
            answered = respond(teacher, examples, cfg, seed=cfg.seed)
            with blaming("XDG_CACHE_HOME, where the teacher's responses are kept"):
                file.parent.mkdir(parents=True, exist_ok=True)
                write(file, json.dumps([e.response for e in answered]))
        return json.loads(file.read_text())

    answered = [replace(e, response=r) for e, r in zip(examples, from_process_0(ask))]
    n_cut = sum(e.response[-1] != eos for e in answered)
    print(f"teacher responses: {len(answered)}, {n_cut} of them cut at --max-response", flush=True)
    return answered


# --- Evaluation: one for all methods that learn responses to prompts ------------------------------
MEANINGS = {
    "kl_pq": "KL(teacher || student), nats per response; lower is better",
    "kl_qp": "KL(student || teacher), nats per response; lower is better",
    "right": "probability of a right response; higher is better",
    "right_greedy": "share of greedy responses that are right; higher is better",
    "wording_distance": "to the teacher's choice of wordings, 0 to 1; lower is better",
    "rouge_l": "ROUGE-L of greedy responses, 0 to 1; higher is better",
    "exact_match": "share of greedy responses equal to a reference; higher is better",
    "ce": "cross entropy on given responses, nats per token; lower is better",
    "entropy": "of the distribution over responses, nats per response",
    "length": "tokens of a sampled response",
    "no_end": "share of samples cut at --max-response; lower is better",
}


def rouge_l(candidate, references):
    """ROUGE-L F1, 0 to 1 (Lin 2004), of words (a Chinese clause is one), for the best reference."""
    a, best = re.findall(r"\w+", candidate.lower()), 0.0
    for reference in references:
        b = re.findall(r"\w+", reference.lower())
        lcs = [0] * (len(b) + 1)  # longest common subsequence of a so far and the first j of b
        for word in a:
            last, lcs = lcs, [0]
            for j, other in enumerate(b):
                lcs.append(last[j] + 1 if word == other else max(last[j + 1], lcs[j]))
        best = max(best, 2 * lcs[-1] / max(1, len(a) + len(b)))
    return best


def same_words(text, references):
    """Is a text one of the references, up to white space?"""
    return text.split() in [reference.split() for reference in references]


@torch.no_grad()
def per_response(function, model, examples, cfg, teacher=None, batch_size=64):
    """(n,k) float64 on the CPU: the values of `row_values`, summed over the tokens of each of n
    responses. Without dropout."""
    sums, was_training = [], model.training
    model.eval()
    for i in range(0, len(examples), batch_size):
        part = examples[i:i + batch_size]
        batch = collate(part, model, teacher)
        with precision(cfg, model.device):
            values = row_values(function, model, batch, teacher)
        zeros = values.new_zeros(len(part), values.shape[-1])
        sums.append(zeros.index_add_(0, batch.owner, values).cpu().double())
    model.train(was_training)
    return torch.cat(sums)


def both_kl(logits, teacher_logits, _):
    """KL(p||q) and KL(q||p) of each row, in nats; p is the teacher. (r,V), (r,V) -> two (r,)."""
    logp, logq = F.log_softmax(teacher_logits, -1), F.log_softmax(logits, -1)
    return (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)


def log_likelihood(logits, _, targets):
    """log q of each observed token."""
    return (log_softmax_at(logits, targets),)


def entropy(logits, *_):
    """The entropy of q at each row, in nats."""
    return (logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1),)


class Evaluator:
    """Evaluator(cfg, teacher, examples)(model) -> {metric: float}, for student and teacher alike.

    kl_pq sums KL(p||q) over the tokens of responses that the teacher sampled, kl_qp sums KL(q||p)
    over responses that the student sampled. Each is an unbiased estimate of the KL between whole
    responses. --kl-on references takes the given responses for both. With --eval-temperature the
    student's logits are divided by it. `generations` is what the model wrote at the last call.
    """

    def __init__(self, cfg, teacher, examples):
        self.cfg, self.teacher, self.examples, self.seed = cfg, teacher, examples, 1234
        self.given = self.from_teacher = [e for e in examples if e.response]
        self.generations, counts = [], {len(e.row["probs"]) for e in examples}
        # all right responses are known, and equally many of each prompt
        self.known = len(counts) == 1 and 0 not in counts
        if teacher and cfg.kl_on == "samples":
            self.from_teacher = respond(teacher, examples, cfg, 1.0, self.seed)
        if teacher and self.known:
            self.teacher_shares = self.shares(self.right_mass(teacher, 1.0))

    def __call__(self, model):
        cfg, tau = self.cfg, 1.0 if model is self.teacher else self.cfg.eval_temperature
        drawn = respond(model, self.examples, cfg, tau, self.seed + 1)
        greedy = respond(model, self.examples, cfg, 0.0, self.seed + 1)
        text = lambda e: model.tokenizer.decode(e.response, skip_special_tokens=True).strip()
        self.generations = [
            {"prompt": e.row["prompt"], "greedy": text(best), "sample": text(e),
             "references": e.row["references"] or list(filter(None, [e.row["response"]]))}
            for e, best in zip(drawn, greedy)]

        def mean(function, examples, k=0, teacher=None):
            at_tau = lambda logits, *others: function(logits / tau, *others)
            return per_response(at_tau, model, examples, cfg, teacher)[:, k].mean().item()

        m = {}
        if self.teacher and self.from_teacher:
            from_model = self.given if cfg.kl_on == "references" else drawn
            same = model is self.teacher
            m["kl_pq"] = 0.0 if same else mean(both_kl, self.from_teacher, 0, self.teacher)
            m["kl_qp"] = 0.0 if same else mean(both_kl, from_model, 1, self.teacher)
        scored = [(g["greedy"], g["references"]) for g in self.generations if g["references"]]
        if self.known:
            mass = self.right_mass(model, tau)
            m["right"] = mass.sum(-1).mean().item()
            m["right_greedy"] = float(np.mean([same_words(*pair) for pair in scored]))
            if self.teacher:
                distance = 0.5 * (self.shares(mass) - self.teacher_shares).abs().sum(-1)
                m["wording_distance"] = distance.mean().item()
        elif scored:
            m["rouge_l"] = float(np.mean([rouge_l(*pair) for pair in scored]))
            m["exact_match"] = float(np.mean([same_words(*pair) for pair in scored]))
        if self.given:
            n_tokens = np.mean([len(e.response) for e in self.given])
            m["ce"] = float(-mean(log_likelihood, self.given) / n_tokens)
        m["entropy"] = mean(entropy, drawn)
        m["length"] = float(np.mean([len(e.response) for e in drawn]))
        eos = model.tokenizer.eos_token_id
        m["no_end"] = float(np.mean([e.response[-1] != eos for e in drawn]))
        return m

    def right_mass(self, model, tau):
        """(rows, wordings): the exact probability of every right response."""
        ids = lambda text: model.tokenizer(text, add_special_tokens=False).input_ids
        right = [replace(e, response=ids(r) + [model.tokenizer.eos_token_id])
                 for e in self.examples for r in e.row["references"]]
        at_tau = lambda logits, _, targets: (log_softmax_at(logits / tau, targets),)
        return per_response(at_tau, model, right, self.cfg).exp().view(len(self.examples), -1)

    def shares(self, mass):
        """(rows, wordings) -> (kinds, wordings): how the probability of right responses is shared
        out. The kind of a prompt is its first word."""
        kinds = np.array([str(e.row["prompt"]).split(" ")[0] for e in self.examples])
        of_kind = [torch.from_numpy(kinds == kind) for kind in sorted(set(kinds))]
        by_kind = torch.stack([mass[rows].sum(0) for rows in of_kind])
        return by_kind / by_kind.sum(-1, keepdim=True).clamp(min=1e-30)
