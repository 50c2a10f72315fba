"""What the five method files share, and nothing of any method: settings, models, data, head, sampler, ruler, runs.

    python common.py            build the tiny world (teacher, students to start from), print samples from each
    python common.py tiny:10    another one: other labelled rows, another teacher, another start

Order of reading: `Batch` and `collate` (how text becomes tensors), `response_states` and `rowwise_loss` (how a
loss over a large vocabulary fits in memory), `sample`, `make_ruler`. The rest is plumbing that a first reading
may skip. p is always the teacher, q always the student. Sizes: B batch, T tokens, R response tokens of the whole
batch ("rows"), V vocabulary, H hidden. Every row of a batch counts once: there is no padding among rows.
"""
import argparse, ast, csv, dataclasses, difflib, hashlib, inspect, json, math, os, random, re, shutil, signal, sys, time, zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

HERE = Path(__file__).resolve().parent
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class BadInput(Exception):
    """The user can mend this: one sentence with what, where and what to do. Exit status 2."""


class RunFailed(Exception):
    """The run cannot go on, and the sentence says from which checkpoint it can. Exit status 1."""


# ---------------------------------------------------------------------------------------------------------------
# Settings: a dataclass is the command line, and the comment behind a field is its help text
# ---------------------------------------------------------------------------------------------------------------
def parse_args(config_class, argv=None):
    """Command line -> config_class(...). --lr 1e-4, --lr=1e-4, --batch-size, --batch_size, --no-compile all work."""
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    comments = dict(re.findall(r"^    (\w+): *\w+ *=.*?  # (.*)$", inspect.getsource(config_class), re.M))
    doc = inspect.getdoc(sys.modules[config_class.__module__]) or ""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0].replace("%", "%%"), allow_abbrev=False, add_help=True)
    parser.error = lambda message: (_ for _ in ()).throw(BadInput(message + " (see --help)"))
    for name, f in fields.items():
        text = f"{comments.get(name, '')} [{f.default}]".replace("%", "%%")
        kind = dict(action=argparse.BooleanOptionalAction) if f.type in (bool, "bool") else dict(type=type(f.default), metavar=type(f.default).__name__)
        parser.add_argument("--" + name.replace("_", "-"), default=f.default, help=text, **kind)
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        words.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        names = ["--" + n.replace("_", "-") for n in fields]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, 1)
        raise BadInput(f"unknown setting {unknown[0]}" + (f": did you mean {near[0]}?" if near else ": --help lists all settings"))
    return config_class(**vars(known))


def main(train, config_class):
    """Run a script. Exit status 0 done, 2 bad input, 1 failed while running, 130/143 on SIGINT/SIGTERM."""
    try:
        train(parse_args(config_class))
        return 0
    except (BadInput, RunFailed) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, BadInput) else 1
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130


def check_range(cfg, **limits):
    """check_range(cfg, alpha=(0, 1)): a numeric setting outside its closed range is bad input."""
    for name, (low, high) in limits.items():
        if not low <= getattr(cfg, name) <= high:  # also false for nan
            raise BadInput(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must lie in [{low}, {high}]")


# ---------------------------------------------------------------------------------------------------------------
# A run: its directory, log, checkpoints and signals
# ---------------------------------------------------------------------------------------------------------------
NOT_COMPARED = ("out", "resume", "overwrite", "device", "compile")  # settings that may change when a run is resumed


class Run:
    """out/<name>/ with settings.json, log.jsonl, a copy of the script, checkpoint.pt, result.json and the student.

    The constructor only looks (bad input must overwrite nothing); `start` creates the directory or resumes.
    """

    def __init__(self, cfg, script):
        self.cfg, self.script, self.t0, self.stop = cfg, Path(script), time.time(), 0
        self.seconds, self.finished, self.bar = 0.0, None, None
        defaults = type(cfg)()
        changed = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(defaults, f.name)}
        name = "-".join([self.script.stem] + [f"{k}={Path(str(v)).name}" for k, v in changed.items() if k not in NOT_COMPARED])
        self.dir = Path(cfg.out or f"out/{name if len(name) < 120 else name[:100] + hashlib.sha1(name.encode()).hexdigest()[:12]}")
        self.settings = {"script": self.script.stem, **{k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_COMPARED}}
        for key, value in dataclasses.asdict(cfg).items():
            print(f"  {'*' if key in changed else ' '} {key:<18}{value}")
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise BadInput(f"--device {cfg.device}: this machine has no usable CUDA device; leave --device out to run on the CPU")
        self._look()
        torch.manual_seed(cfg.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what stays in fp32

    def _look(self):
        old = self.dir / "settings.json"
        if self.dir.exists() and not self.dir.is_dir():
            raise BadInput(f"{self.dir} is a file: choose another --out")
        if not old.is_file():
            if self.dir.exists() and any(self.dir.iterdir()):
                raise BadInput(f"{self.dir} is not empty and holds no settings.json of a run: choose another --out")
            if self.cfg.resume:
                raise BadInput(f"--resume: no run in {self.dir}")
            return
        if self.cfg.overwrite:
            return
        settings = json.loads(old.read_text())
        other = [f"{k} {settings.get(k)} there, {self.settings.get(k)} now" for k in {**settings, **self.settings} if settings.get(k) != self.settings.get(k)]
        if other:
            raise BadInput(f"{self.dir} holds a run with other settings ({'; '.join(other)}): choose another --out, or --overwrite it")
        if (self.dir / "result.json").is_file():
            self.finished = json.loads((self.dir / "result.json").read_text())
            print(f"{self.dir} is finished; its result (--overwrite runs it again):\n---")
            for key, value in self.finished.items():
                print(f"{key}: {value}")
        elif not self.cfg.resume:
            raise BadInput(f"{self.dir} holds an unfinished run: --resume goes on with it, --overwrite starts anew")

    def start(self, **parts):
        """Create the directory, or load the checkpoint into parts (model, optimizer, ...). Returns the next step."""
        step = 0
        try:
            if self.cfg.overwrite and self.dir.exists():
                shutil.rmtree(self.dir)
            self.dir.mkdir(parents=True, exist_ok=True)
            (self.dir / "settings.json").write_text(json.dumps(self.settings, indent=1))
            shutil.copy(self.script, self.dir / self.script.name)
        except OSError as e:
            raise BadInput(f"cannot write to {self.dir} ({e.strerror}): choose another --out") from None
        log = self.dir / "log.jsonl"
        if self.cfg.resume and (self.dir / "checkpoint.pt").is_file():
            state = torch.load(self.dir / "checkpoint.pt", map_location="cpu", weights_only=True)
            for key, part in parts.items():
                part.load_state_dict(state["parts"][key])
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"])
            step, self.seconds = state["step"], state["seconds"]
            lines = [x for x in log.read_text().splitlines() if json.loads(x)["step"] < step]
            log.write_text("".join(x + "\n" for x in lines))
            print(f"resumed {self.dir} at step {step}")
        else:
            log.write_text("")
        self.t0 = time.time()
        if sys.stdout.isatty():
            from tqdm import tqdm  # comes with transformers
            self.bar = tqdm(total=self.cfg.steps, initial=step, unit="step", dynamic_ncols=True)
        if self._main_thread():
            for s in (signal.SIGINT, signal.SIGTERM):
                signal.signal(s, self._on_signal)
        return step

    @staticmethod
    def _main_thread():
        import threading
        return threading.current_thread() is threading.main_thread()

    def _on_signal(self, number, frame):
        if self.stop:  # asked twice: leave at once
            raise SystemExit(128 + number)
        self.stop = number

    def print(self, text):
        self.bar.write(text) if self.bar else print(text, flush=True)

    def log(self, step, **values):
        """One JSON object to log.jsonl, one aligned line to the screen."""
        seconds = self.seconds + time.time() - self.t0
        if not math.isfinite(values.get("loss", 0.0)):
            good = self.dir / "checkpoint.pt"
            where = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint was written yet"
            raise RunFailed(f"the loss is {values['loss']} at step {step}: {where}; lower --lr, then start anew or --resume")
        with open(self.dir / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "seconds": round(seconds, 2), **values}) + "\n")
        left = seconds / max(step, 1) * (self.cfg.steps - step)
        shown = "  ".join(f"{k} {v:8.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if not isinstance(v, (dict, list)))
        self.print(f"step {step:5d}/{self.cfg.steps}  {shown}  {seconds:5.0f} s" + (f", {left:.0f} s left" if step and left >= 1 else ""))

    def evaluated(self, step, metrics):
        """The ruler's numbers on validation rows: all to log.jsonl, the main ones to the screen."""
        with open(self.dir / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "seconds": round(self.seconds + time.time() - self.t0, 2), "valid": metrics}) + "\n")
        main = ("kl_pq", "kl_qp", "ce", "rouge_l", "valid", "valid_greedy", "mode_distance")
        self.print(f"step {step:5d}/{self.cfg.steps}  validation: " + "  ".join(f"{k} {metrics[k]:.3f}" for k in main if k in metrics))

    def end_step(self, step, **parts):
        """After every optimizer step: move the bar, save every save_every steps, leave if a signal came."""
        if self.bar:
            self.bar.update(1)
        if self.stop or step % self.cfg.save_every == 0:
            self.save(step, **parts)
        if self.stop:
            print(f"stopped by {signal.Signals(self.stop).name} after step {step}, saved: --resume goes on", file=sys.stderr)
            raise SystemExit(128 + self.stop)

    def save(self, step, **parts):
        """Write checkpoint.pt in one piece: a full disk or a kill leaves the previous one as it was."""
        state = {"step": step, "seconds": self.seconds + time.time() - self.t0, "rng": torch.get_rng_state(),
                 "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
                 "parts": {k: v.state_dict() for k, v in parts.items()}}
        temporary = self.dir / "checkpoint.tmp"
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.dir / "checkpoint.pt")
        except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
            if not isinstance(e, OSError) and "write" not in str(e):
                raise
            good = "the previous checkpoint is untouched" if (self.dir / "checkpoint.pt").exists() else "no checkpoint exists yet"
            raise BadInput(f"cannot save {self.dir / 'checkpoint.pt'} at step {step} ({e}): free some space, {good}") from None

    def finish(self, student, tokenizer, rows):
        """Save the student, print the table of rows {name: metrics} and the `key: value` block, write result.json."""
        if self.bar:
            self.bar.close()
        student.save_pretrained(self.dir / "student")
        tokenizer.save_pretrained(self.dir / "student")
        keys = [k for k, v in rows["after"].items() if isinstance(v, (int, float))]
        names = {"teacher": "teacher", "before": "student before", "after": "student after"}
        width = max(len(k) for k in keys)
        print("\n" + " " * width + "".join(f"{names[r]:>16}" for r in rows))
        for k in keys:
            print(f"{k:<{width}}" + "".join(f"{rows[r][k]:16.4f}" if k in rows[r] else " " * 16 for r in rows))
        gib = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else peak_rss()
        result = {"method": self.script.stem, **{f"{r}.{k}": round(v, 6) for r in rows for k, v in rows[r].items() if k in keys},
                  "steps": self.cfg.steps, "seconds": round(self.seconds + time.time() - self.t0, 1), "peak_gib": round(gib, 3)}
        (self.dir / "result.tmp").write_text(json.dumps(result, indent=1))
        os.replace(self.dir / "result.tmp", self.dir / "result.json")
        print("---\n" + "\n".join(f"{k}: {v}" for k, v in result.items()))
        return result


def peak_rss():
    """Peak resident memory of this process in GiB, 0 where the platform does not tell."""
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    except ImportError:
        return 0.0


# ---------------------------------------------------------------------------------------------------------------
# Models and tokenizers
# ---------------------------------------------------------------------------------------------------------------
def load_model(path, device, dtype=torch.float32, what="student", seed=0, device_map=""):
    """A Hugging Face causal or encoder-decoder model in eval mode, on `device`, with `dtype` weights.

    A local directory with a config.json but no weights gives random weights (said in a line; students only).
    `device_map` is handed to transformers for a teacher that needs several devices.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise BadInput(f"--{what} {path}: no model to be loaded there ({str(e).splitlines()[0]})") from None
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    weights = not Path(path).is_dir() or any(Path(path).glob("*.safetensors")) or any(Path(path).glob("*.bin"))
    if weights:
        model = auto.from_pretrained(path, dtype=dtype, **({"device_map": device_map} if device_map else {}))
    elif what == "student":
        print(f"{path} holds no weights: the {what} starts from random ones")
        torch.manual_seed(seed)
        model = auto.from_config(config).to(dtype)
    else:
        raise BadInput(f"--{what} {path}: config.json is there, but no weights (*.safetensors or *.bin)")
    model = (model if device_map else model.to(device)).eval()
    model.vocab = model.get_output_embeddings().weight.shape[0]  # cut to the common size by load_pair
    _check_head(model, path, what)
    return model


@torch.no_grad()
def _check_head(model, path, what):
    """Our path is head(states); models that change logits after the head (soft-capping, scales) are refused."""
    prompt, response = [3, 4, 5, 6], [4, 3, 5]
    batch = collate([Example(prompt, prompt, response)], model).to(model.device)
    ours = head_logits(model, response_states(model)(batch))
    if model.config.is_encoder_decoder:
        theirs = model(input_ids=batch.tokens, attention_mask=batch.mask, decoder_input_ids=batch.decoder_tokens).logits[0]
    else:
        theirs = model(input_ids=batch.tokens).logits[0, batch.rows]
    if (ours - theirs.float()).abs().max() > 0.02 * theirs.float().abs().max() + 1e-3:
        raise BadInput(f"--{what} {path}: this architecture changes its logits after the output head "
                       "(soft-capping or a logit scale), which the chunked losses here do not support")


def load_tokenizer(path, what):
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as e:  # transformers raises a dozen kinds here
        raise BadInput(f"--{what} {path}: no tokenizer there ({str(e).splitlines()[0][:120]}); save one beside the model") from None
    if tokenizer.eos_token_id is None:
        raise BadInput(f"--{what} {path}: the tokenizer has no end-of-sequence token, so no response could ever end")
    return tokenizer


PROBE = "The quick brown fox: jumps over 13 lazy dogs, naïve café!\n\tdef f(x): return x ** 2  # describe name ada ;"


def load_pair(cfg, device, same_tokens=True):
    """Student (fp32 master weights, eval mode), teacher or None (frozen, compute dtype), the student's tokenizer.

    Methods that compare distributions need the two tokenizers to agree: token ids are checked on a probe text, and
    heads that are padded to different sizes are cut to the smaller one (`model.vocab`), so both renormalise over V.
    """
    student_path, teacher_path = resolve(cfg.student, "student", cfg.data), resolve(cfg.teacher, "teacher", cfg.data)
    tokenizer = load_tokenizer(student_path, "student")
    student = load_model(student_path, device, seed=cfg.seed)
    if teacher_path == "none":
        return student, None, tokenizer
    teacher = load_model(teacher_path, device, compute_dtype(cfg, device), "teacher", device_map=cfg.teacher_device_map)
    teacher.requires_grad_(False)
    if same_tokens:
        other = load_tokenizer(teacher_path, "teacher")
        if tokenizer(PROBE).input_ids != other(PROBE).input_ids or tokenizer.eos_token_id != other.eos_token_id:
            raise BadInput(f"--teacher {teacher_path} and --student {student_path} use different tokenizers: "
                           "their token distributions cannot be compared; choose a pair of one model family")
        student.vocab = teacher.vocab = min(student.vocab, teacher.vocab)
    return student, teacher, tokenizer


def compute_dtype(cfg, device):
    """`--dtype auto` is bf16 where CUDA supports it and fp32 on a CPU: never a matter of timing, so runs repeat."""
    names = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if cfg.dtype not in names:
        raise BadInput(f"--dtype {cfg.dtype}: choose auto, float32 or bfloat16")
    if cfg.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return names[cfg.dtype]


def fingerprint(model):
    """A short hash of the configuration and of a sample of every weight: other teacher, other cache."""
    h = hashlib.sha1(model.config.to_json_string().encode())
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        h.update(name.encode() + flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------
# Data: rows of prompt and response -> token ids -> batches
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Example:
    prompt: list            # token ids of the prompt as the student reads it
    teacher_prompt: list    # the same content in the teacher's template
    response: list          # token ids incl. EOS; without EOS where cut off; [] where the row has none
    row: dict = field(default_factory=dict)


def teacher_states(teacher, batches, cfg):
    """The teacher's forward pass; with --cache-gib, remembered for every example of `batches` after the first epoch."""
    states = response_states(teacher, cfg.compile)
    return CachedStates(states, batches.examples, teacher, int(cfg.cache_gib * 2**30)) if cfg.cache_gib > 0 else states


def read_rows(path, cfg):
    """Rows {"prompt": str, "response": str or None} from a JSONL or CSV file. Errors name file and line."""
    path, rows = Path(path), []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = path.read_bytes()[: e.start].count(b"\n") + 1
        raise BadInput(f"{path}:{line}: not valid UTF-8 (byte {e.start}): convert the file to UTF-8") from None
    except OSError as e:
        raise BadInput(f"--data {path}: cannot be read ({e.strerror})") from None
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
        try:
            numbered = [(reader.line_num, r) for r in reader]
        except csv.Error as e:
            raise BadInput(f"{path}:{reader.line_num}: {e}: mend the quotes of this line") from None
    else:
        numbered = []
        for i, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
            if line.strip():
                try:
                    numbered.append((i, json.loads(line)))
                except (ValueError, RecursionError) as e:
                    raise BadInput(f"{path}:{i}: not JSON ({e}); one object a line is wanted") from None
    for i, r in numbered:
        rows.append(check_row(r, f"{path}:{i}", cfg))
    if not rows:
        raise BadInput(f"--data {path}: the file has no rows")
    return rows


def check_row(r, where, cfg):
    """One raw record -> {"prompt", "response", ...}; a sentence with `where` if it is not what it should be."""
    if not isinstance(r, dict):
        raise BadInput(f"{where}: a {type(r).__name__}, not an object with the fields {cfg.prompt_field} and {cfg.response_field}")
    for name, flag in ((cfg.prompt_field, "--prompt-field"), (cfg.response_field, "--response-field")):
        if name not in r:
            raise BadInput(f"{where}: no field \"{name}\" (there: {', '.join(map(str, r)) or 'nothing'}): name it with {flag}")
    prompt, response = r[cfg.prompt_field], r[cfg.response_field]
    for name, value in ((cfg.prompt_field, prompt), (cfg.response_field, response)):
        if not isinstance(value, str) and not (value is None and name == cfg.response_field):
            raise BadInput(f"{where}: field \"{name}\" is a {type(value).__name__}, a string is wanted")
        if value is not None:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise BadInput(f"{where}: field \"{name}\" holds half a surrogate pair, which is no text: remove it") from None
    known = {k: r[k] for k in ("references", "probs") if k in r}
    return {"prompt": prompt, "response": response, **known}


def load_rows(cfg):
    """{"train", "valid", "test"}: rows from a directory of JSONL files, one JSONL/CSV file, a saved dataset or the hub.

    A source without its own valid and test rows is split by a hash of the *prompt*, so that no prompt is in two
    splits and the split does not depend on the seed.
    """
    path = Path(resolve(cfg.data, "data", cfg.data))
    if path.is_file():
        splits = {"train": read_rows(path, cfg)}
    elif (path / "train.jsonl").is_file():
        splits = {s: read_rows(path / f"{s}.jsonl", cfg) for s in ("train", "valid", "test") if (path / f"{s}.jsonl").is_file()}
    else:
        if str(cfg.data).endswith((".jsonl", ".csv", ".json")):
            raise BadInput(f"--data {cfg.data}: no such file")
        import datasets  # only here: everything else runs without it
        try:
            name, _, config = str(cfg.data).partition(":")
            loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name, config or None)
        except Exception as e:
            raise BadInput(f"--data {cfg.data}: neither a file, a saved dataset nor a hub data set ({str(e).splitlines()[0][:160]})") from None
        loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
        splits = {{"validation": "valid"}.get(s, s): [check_row(dict(r), f"{cfg.data}, {s} row {i}", cfg) for i, r in enumerate(d)]
                  for s, d in loaded.items()}
    rows = splits["train"]
    if "test" not in splits:
        crc = [zlib.crc32(r["prompt"].encode()) % 1000 for r in rows]
        cut = int(1000 * cfg.holdout)
        splits["test"] = [r for r, c in zip(rows, crc) if c < cut]
        if "valid" not in splits:
            splits["valid"] = [r for r, c in zip(rows, crc) if cut <= c < 2 * cut]
        splits["train"] = [r for r, c in zip(rows, crc) if c >= 2 * cut]
    splits.setdefault("valid", splits["test"])
    for s in ("train", "valid", "test"):
        if not splits[s]:
            raise BadInput(f"--data {cfg.data}: no row is left for {s} (of {len(rows)} rows): add rows, or change --holdout")
    return splits


def prompt_encoder(tokenizer, template, model, max_prompt):
    """A function text -> token ids of the whole prompt, chat or plain template around it, content cut from the left.

    User text never becomes a control token: only the template's own parts are tokenised with special tokens on.
    """
    mark = "\ue000"
    if template == "auto" and tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(mark)
        special = ([], [])  # a chat template writes its own begin-of-sequence token
    else:
        plain = ("{prompt}" if model.config.is_encoder_decoder else "{prompt}\n") if template == "auto" else template
        if plain.count("{prompt}") != 1:
            raise BadInput(f"--template {template!r}: it must contain {{prompt}} exactly once")
        before, after = plain.encode().decode("unicode_escape" if "\\n" in plain else "utf-8").split("{prompt}")
        inner, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
        at = next((i for i in range(len(whole)) if whole[i:i + len(inner)] == inner), 0)
        special = (whole[:at], whole[at + len(inner):] if model.config.is_encoder_decoder else [])

    def ids(text, **kw):
        return tokenizer(text, add_special_tokens=False, **kw).input_ids if text else []

    head, tail = special[0] + ids(before), ids(after) + special[1]
    room = max_prompt - len(head) - len(tail)
    if room < 1:
        raise BadInput(f"--max-prompt {max_prompt}: the template alone takes {len(head) + len(tail)} tokens")

    def encode(text):
        content = ids(text, split_special_tokens=True)
        encode.cut += len(content) > room
        return (head + content[-room:] + tail) or [tokenizer.eos_token_id]  # a causal model needs a token to start from

    encode.cut = 0
    return encode


def load_data(cfg, student, teacher, tokenizer):
    """SimpleNamespace(train, valid, test) of Examples, tokenised once; says what was cut and dropped."""
    for model, what in ((student, "student"), (teacher, "teacher")):
        context = getattr(model.config, "max_position_embeddings", None) if model is not None else None
        if context and not model.config.is_encoder_decoder and cfg.max_prompt + cfg.max_response > context:
            raise BadInput(f"--max-prompt {cfg.max_prompt} and --max-response {cfg.max_response} make {cfg.max_prompt + cfg.max_response} "
                           f"tokens, the {what}'s context is {context}: lower one of them")
    encode = prompt_encoder(tokenizer, cfg.template, student, cfg.max_prompt)
    for_teacher = encode if not cfg.teacher_template else prompt_encoder(tokenizer, cfg.teacher_template, teacher or student, cfg.max_prompt)
    data, cut, empty = SimpleNamespace(), 0, 0
    splits = load_rows(cfg)
    limits = {"train": None, "valid": min(cfg.eval_rows, 200), "test": cfg.eval_rows}
    for split, rows in splits.items():
        examples = []
        for row in rows[: limits.get(split, 0)]:
            response = []
            if row["response"]:
                response = tokenizer(row["response"], add_special_tokens=False, split_special_tokens=True).input_ids
                response = (response + [tokenizer.eos_token_id])[: cfg.max_response]  # cut from the right: loses its EOS
                cut += response[-1] != tokenizer.eos_token_id
            empty += row["response"] == ""
            prompt = encode(row["prompt"])
            examples.append(Example(prompt, prompt if for_teacher is encode else for_teacher(row["prompt"]), response, row))
        setattr(data, split, examples)
    labelled = sum(bool(e.response) for e in data.train)
    print(f"data: {len(data.train)} training prompts ({labelled} with a response), {len(data.valid)} valid, {len(data.test)} test"
          + f"; cut to fit: {encode.cut} prompts, {cut} responses" * bool(encode.cut or cut) + f"; {empty} empty responses dropped" * bool(empty))
    return data


@dataclass
class Batch:
    """tokens (B,T) right-padded prompt+response; rows (R,) positions in the flattened (B*T) whose next token is a
    response token; targets (R,) that next token; owner (R,) the example of each row; lengths (B,) response tokens.
    Encoder-decoder: tokens and mask (B,P) are the prompt, decoder_tokens (B,N) the shifted response, rows index (B*N).
    """
    tokens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor = None
    decoder_tokens: torch.Tensor = None
    teacher: "Batch" = None     # the same responses behind the teacher's template; self where the prompts are equal
    ids: list = None            # indices of the examples, for caches

    def to(self, device):
        move = lambda t: t if t is None else (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)
        moved = {k: move(getattr(self, k)) for k in ("tokens", "rows", "targets", "owner", "lengths", "mask", "decoder_tokens")}
        batch = Batch(**moved, ids=self.ids)
        batch.teacher = batch if self.teacher is self else self.teacher and self.teacher.to(device)
        return batch


def _pad(lists, width, left=False):
    out = np.zeros((len(lists), width), dtype=np.int64)
    for i, x in enumerate(lists):
        out[i, width - len(x):] = x if left else out[i, width - len(x):]
        out[i, : len(x)] = out[i, : len(x)] if left else x
    return torch.from_numpy(out)


def collate(examples, model, side="student", edges=()):
    """Examples -> Batch on the CPU. Masks come from lengths, never from token ids: pad may equal eos. The next-token
    shift is made here and nowhere else: the row of a token is the position *before* it."""
    prompts = [e.prompt if side == "student" else e.teacher_prompt for e in examples]
    responses = [e.response for e in examples]
    n = torch.tensor([len(r) for r in responses])
    fit = lambda width: next((e for e in edges if e >= width), width)  # few fixed shapes for torch.compile
    targets = torch.tensor([t for r in responses for t in r], dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(examples)), n)
    offset = torch.cat([torch.arange(len(r)) for r in responses])  # index of each row's token in its response
    if model.config.is_encoder_decoder:
        p = torch.tensor([len(x) for x in prompts])
        tokens = _pad(prompts, fit(int(p.max())))
        start = model.config.decoder_start_token_id
        decoder = _pad([[start] + r[:-1] for r in responses], fit(int(n.max())))
        mask = (torch.arange(tokens.shape[1]) < p[:, None]).long()
        return Batch(tokens, owner * decoder.shape[1] + offset, targets, owner, n, mask, decoder)
    tokens = _pad([a + r for a, r in zip(prompts, responses)], fit(max(len(a) + len(r) for a, r in zip(prompts, responses))))
    first = torch.tensor([len(a) for a in prompts]) - 1
    return Batch(tokens, owner * tokens.shape[1] + first[owner] + offset, targets, owner, n)


class Batches:
    """Training batches as a pure function of the step, so that a resumed run sees what it would have seen.

    `at(step)` gives the accum micro-batches of one optimizer step. Examples are shuffled anew every epoch; inside a
    step they are sorted by length before being split, which saves padding and does not change what the step sees.
    """

    def __init__(self, examples, student, teacher, batch_size, accum, seed, device, compiled=False):
        self.examples, self.student, self.teacher, self.device = [e for e in examples if e.response], student, teacher, device
        if not self.examples:
            raise BadInput("no training row has a response (all empty, null or cut off): nothing to train on")
        if batch_size < 1 or accum < 1 or batch_size % accum:
            raise BadInput(f"--batch-size {batch_size} must be a positive multiple of --accum {accum}: it counts the sequences of one optimizer step")
        self.batch_size, self.accum, self.seed = batch_size, accum, seed
        lengths = np.array([len(e.prompt) + len(e.response) for e in self.examples])
        self.edges = sorted({int(math.ceil(np.quantile(lengths, q) / 8) * 8) for q in np.linspace(0.3, 1, 8)}) if compiled else ()
        self.separate = teacher is not None and (student.config.is_encoder_decoder != teacher.config.is_encoder_decoder
                                                 or any(e.prompt is not e.teacher_prompt for e in self.examples))

    def indices(self, step):
        n, first = len(self.examples), step * self.batch_size
        order = {e: np.random.default_rng((self.seed, e)).permutation(n) for e in range(first // n, (first + self.batch_size - 1) // n + 1)}
        return [int(order[i // n][i % n]) for i in range(first, first + self.batch_size)]

    def at(self, step):
        ids = sorted(self.indices(step), key=lambda i: len(self.examples[i].prompt) + len(self.examples[i].response))
        size = self.batch_size // self.accum
        return [self.batch(ids[i:i + size]) for i in range(0, len(ids), size)]

    def batch(self, ids):
        examples = [self.examples[i] for i in ids]
        batch = collate(examples, self.student, edges=self.edges)
        batch.teacher = collate(examples, self.teacher, "teacher", self.edges) if self.separate else batch
        batch.ids = batch.teacher.ids = ids
        return batch.to(self.device)


# ---------------------------------------------------------------------------------------------------------------
# From tokens to hidden states to losses: logits exist for response rows only, a chunk at a time
# ---------------------------------------------------------------------------------------------------------------
def response_states(model, compiled=False):
    """A function batch -> (R,H), the hidden states from which the output head predicts the response tokens.

    Decoder-only models run right-padded without a mask: causal attention never looks at padding to the right, and
    no mask keeps the fast attention kernels. T5 scales the states before a tied head; the scale is applied here.
    """
    config = model.config
    if config.is_encoder_decoder:
        scale = config.d_model ** -0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0

        def body(tokens, mask, decoder_tokens):
            memory = model.get_encoder()(input_ids=tokens, attention_mask=mask)[0]
            return model.get_decoder()(input_ids=decoder_tokens, encoder_hidden_states=memory, encoder_attention_mask=mask, use_cache=False)[0] * scale
    else:
        def body(tokens, mask, decoder_tokens):
            return model.base_model(input_ids=tokens, use_cache=False)[0]
    body = try_compile(body, dynamic=False) if compiled else body
    return lambda batch: body(batch.tokens, batch.mask, batch.decoder_tokens).flatten(0, 1)[batch.rows]


def try_compile(function, **options):
    """torch.compile, or the function itself with one line where the machine has no compiler for it."""
    compiled, state = torch.compile(function, **options), {}

    def call(*args):
        if "eager" not in state:
            try:
                return compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as e:
                print(f"torch.compile does not work here ({type(e).__name__}): going on without it", flush=True)
                state["eager"] = True
        return function(*args)
    return call


def head(model):
    """Weight (V,H) and bias (V,) or None of the output layer, cut to the vocabulary shared with the other model."""
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return layer.weight[: model.vocab], None if bias is None else bias[: model.vocab]


def head_logits(model, hidden):
    """(R,H) -> (R,V) fp32 logits; the product runs in the dtype of the hidden states."""
    weight, bias = head(model)
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)).float()


def chunk_rows(V, device):
    """Rows per chunk: about 32 MB of fp32 logits on a CPU (stays near the cache), 1 GB on a GPU."""
    return max(1, (2**30 if device.type == "cuda" else 2**25) // (4 * V))


class _RowwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row_loss, targets, teacher_logits, hidden, weight, bias):
        # Chunk by chunk: logits, the method's per-row loss, and at once the gradients of hidden states and head.
        # Nothing (R,V) outlives its chunk and nothing is recomputed. Gradients of the head accumulate in fp32.
        low = weight.to(hidden.dtype)
        want = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        grad_hidden = torch.empty_like(hidden) if want else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want and bias is not None else None
        totals, size = 0.0, chunk_rows(weight.shape[0], hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, hidden.shape[0], size):
                h = hidden[i:i + size]
                logits = F.linear(h, low, None if bias is None else bias.to(low.dtype)).float().requires_grad_(want)
                with torch.set_grad_enabled(want):
                    losses = row_loss(logits, teacher_logits(i, i + size), targets[i:i + size])
                    loss = losses[0].sum()
                totals = totals + torch.stack([x.detach().sum() for x in losses])
                if want:
                    g = torch.autograd.grad(loss, logits)[0]
                    if grad_bias is not None:
                        grad_bias += g.sum(0)
                    g = g.to(low.dtype)
                    grad_hidden[i:i + size] = g @ low
                    if low.dtype == torch.float32:
                        grad_weight.addmm_(g.t(), h)
                    else:
                        grad_weight += (g.t() @ h).float()
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return totals

    @staticmethod
    def backward(ctx, grad):
        scale = grad[0]  # only the first entry is a loss, the others are there to be logged
        grads = [None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors]
        return (None, None, None, *grads)


def rowwise_loss(row_loss, student, hidden, targets, teacher=None, teacher_hidden=None):
    """Sum a per-row loss of logits over all rows in flat memory, differentiable in student hidden states and head.

    row_loss(student_logits (r,V) fp32, teacher_logits (r,V) fp32 or None, targets (r,)) -> tuple of (r,) tensors:
    the first is the loss, the others are logged. Returns a tensor with the *sum* of each over the R rows (divide by
    the response tokens of the whole optimizer step, once). The gradient is taken inside the forward pass, an idea
    of Liger-Kernel's fused losses (Hsu et al. 2024), here around any loss that is a sum over rows.
    """
    weight, bias = head(student)

    def teacher_logits(i, j):
        with torch.no_grad():
            return None if teacher is None else head_logits(teacher, teacher_hidden[i:j].to(teacher.dtype))
    return _RowwiseLoss.apply(row_loss, targets, teacher_logits, hidden, weight, bias)


def token_logprobs(model, hidden, targets):
    """(R,H), (R,) -> (R,) log-probabilities of the observed tokens, differentiable, logits recomputed in backward.

    For losses whose row weights depend on the whole response (preference, policy gradient)."""
    weight, bias = head(model)

    def piece(h, t, w, b):
        logits = F.linear(h, w.to(h.dtype), None if b is None else b.to(h.dtype)).float()
        return logits.gather(-1, t[:, None])[:, 0] - logits.logsumexp(-1)
    size = chunk_rows(weight.shape[0], hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        if not torch.is_grad_enabled() or hidden.shape[0] <= size:
            return torch.cat([piece(hidden[i:i + size], targets[i:i + size], weight, bias) for i in range(0, max(1, len(targets)), size)])
        return torch.cat([torch.utils.checkpoint.checkpoint(piece, hidden[i:i + size], targets[i:i + size], weight, bias, use_reentrant=False)
                          for i in range(0, len(targets), size)])


class CachedStates:
    """teacher_states(batch) for fixed data: the teacher's final hidden states of every example, computed once.

    Exact (the head turns states into the full distribution), 2H or 4H bytes a response token instead of 2V for
    logits. Memory-mapped on disk beyond `in_memory` bytes. `key` names the file, so it must name teacher and data.
    """

    def __init__(self, states, examples, model, key, in_memory=2**30):
        self.states, n = states, [len(e.response) for e in examples]
        self.start = np.concatenate([[0], np.cumsum(n)])
        H, self.dtype = model.get_output_embeddings().weight.shape[1], model.dtype
        size = int(self.start[-1]) * H * self.dtype.itemsize
        self.file = None if size <= in_memory else cache_dir() / f"states-{key}-{os.getpid()}.bin"
        if self.file is None:
            self.store = torch.empty(int(self.start[-1]), H, dtype=self.dtype)
        else:
            self.store = torch.from_file(str(self.file), shared=True, size=size // self.dtype.itemsize, dtype=self.dtype).view(-1, H)
            self.file.unlink()  # the mapping keeps it alive; nothing is left behind when the run ends
        self.known = np.zeros(len(examples), dtype=bool)

    def __call__(self, batch):
        if not self.known[batch.ids].all():
            states = self.states(batch).detach()
            for i, piece in zip(batch.ids, states.to("cpu", self.dtype).split(batch.lengths.tolist())):
                self.store[self.start[i]:self.start[i + 1]] = piece
            self.known[batch.ids] = True
            return states
        return torch.cat([self.store[self.start[i]:self.start[i + 1]] for i in batch.ids]).to(batch.tokens.device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def sample(model, prompts, max_new, temperature=1.0, top_k=0, seed=0, eos=None, batch_size=256, compiled=False):
    """Responses to a list of prompts (token ids): (list of token-id lists, list of (n,) log-prob tensors).

    By default from the very distribution that is scored: T = 1, no truncation, no dropout. temperature 0 is greedy.
    A response ends with EOS, or without one after max_new tokens. Log-probs are those of the sampling distribution.
    Left-padded prompts with explicit positions, one cache, Gumbel-max draws (no host sync); on a GPU one compiled
    step under CUDA graphs and a look for "all done" every 16 tokens, on a CPU finished rows leave the batch at once.
    """
    training, model_eos = model.training, eos if eos is not None else model.generation_config.eos_token_id
    model.eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    responses, logprobs = [None] * len(prompts), [None] * len(prompts)
    for i in range(0, len(order), batch_size):
        ids = order[i:i + batch_size]
        tokens, logp = _sample_batch(model, [prompts[j] for j in ids], max_new, temperature, top_k, generator, model_eos, compiled)
        for j, t, lp in zip(ids, tokens.tolist(), logp):
            n = next((k + 1 for k, x in enumerate(t) if x == model_eos), max_new)  # the first EOS counts, nothing after it
            responses[j], logprobs[j] = t[:n], lp[:n].clone()
    model.train(training)
    return responses, logprobs


def _sample_batch(model, prompts, max_new, temperature, top_k, generator, eos, compiled):
    device, B, cuda = model.device, len(prompts), model.device.type == "cuda"
    encdec, P = model.config.is_encoder_decoder, max(len(p) for p in prompts)
    prompt = _pad(prompts, P, left=not encdec).to(device)
    n = torch.tensor([len(p) for p in prompts], device=device)
    at = torch.arange(P, device=device)
    mask = (at < n[:, None]) if encdec else (at >= P - n[:, None])  # (B,P)
    scale = model.config.d_model ** -0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0
    room = max_new if encdec else P + max_new
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=room) if cuda else DynamicCache(config=model.config.get_text_config(decoder=True))
    if encdec:
        memory = model.get_encoder()(input_ids=prompt, attention_mask=mask.long())[0]
        cache = EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))
        tokens = torch.full((B, 1), model.config.decoder_start_token_id, device=device)
        body, positions, attend = model.get_decoder(), None, None
    else:
        body, tokens, memory = model.base_model, prompt, None
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        attend = torch.cat([mask, mask.new_ones(B, max_new)], -1).long()  # a static cache wants the whole width

    def step(tokens, positions, attend, mask, memory):
        if encdec:
            out = body(input_ids=tokens, encoder_hidden_states=memory, encoder_attention_mask=mask.long(), past_key_values=cache, use_cache=True)[0] * scale
        else:
            out = body(input_ids=tokens, attention_mask=attend, position_ids=positions, past_key_values=cache, use_cache=True)[0]
        return head_logits(model, out[:, -1])  # (B,V)

    fast = torch.compile(step, mode="reduce-overhead", fullgraph=False) if cuda and compiled and not encdec else step
    out = torch.full((B, max_new), eos, dtype=torch.long, device=device)
    logp = torch.zeros(B, max_new, device=device)
    done, alive = torch.zeros(B, dtype=torch.bool, device=device), torch.arange(B, device=device)
    for t in range(max_new):
        width = None if cuda else (0 if encdec else P + t)  # a growing cache takes a growing mask
        logits = (step if t == 0 else fast)(tokens, positions, attend if width is None or encdec else attend[:, :width], mask, memory)
        if temperature:
            logits = logits / temperature
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
        noise = 0.0  # greedy, or argmax(logits + Gumbel), which is an exact draw from softmax(logits)
        if temperature:
            noise = -torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-20).log_()
        token = (logits + noise).argmax(-1)  # (B,)
        lp = logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
        out[alive, t], logp[alive, t] = torch.where(done, eos, token), lp
        done = done | (token == eos)
        tokens = token[:, None].clone()
        positions = None if encdec else n[:, None] + t
        if cuda:
            if t % 16 == 15 and done.all():
                break
        elif done.any():
            if done.all():
                break
            if done.sum() >= max(1, len(done) // 8):  # finished rows leave; the rest go on in a smaller batch
                keep = (~done).nonzero()[:, 0]
                alive, done, tokens, n, mask = alive[keep], done[keep], tokens[keep], n[keep], mask[keep]
                cache.batch_select_indices(keep)
                positions, attend, memory = [x if x is None else x[keep] for x in (positions, attend, memory)]
    return out.cpu(), logp.cpu()


def teacher_answers(teacher, examples, tokenizer, cfg, per_prompt=1):
    """The examples with the teacher's own responses (T = 1, drawn once, cached on disk under teacher, prompts, seed)."""
    what = json.dumps([fingerprint(teacher), [e.teacher_prompt for e in examples], cfg.max_response, cfg.seed, per_prompt, str(teacher.dtype)])
    file = cache_dir() / f"answers-{hashlib.sha1(what.encode()).hexdigest()[:20]}.json"
    try:
        responses = json.loads(file.read_text())
    except (OSError, ValueError):
        print(f"the teacher answers {len(examples)} prompts ...", flush=True)
        prompts = [e.teacher_prompt for e in examples for _ in range(per_prompt)]
        responses, _ = sample(teacher, prompts, cfg.max_response, seed=cfg.seed, eos=tokenizer.eos_token_id, compiled=cfg.compile)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(responses))
        os.replace(temporary, file)
    examples = [e for e in examples for _ in range(per_prompt)]
    cut = sum(r[-1] != tokenizer.eos_token_id for r in responses)
    if cut:
        print(f"{cut} of {len(responses)} teacher responses reach --max-response {cfg.max_response} without an end")
    return [dataclasses.replace(e, response=r) for e, r in zip(examples, responses)]


# ---------------------------------------------------------------------------------------------------------------
# The ruler: one for all methods
# ---------------------------------------------------------------------------------------------------------------
def rouge_l(candidate, references):
    """ROUGE-L F1 (Lin 2004), best over references; tokens as in the rouge-score package without stemming."""
    words = lambda s: re.findall(r"[a-z0-9]+", s.lower())
    a, best = words(candidate), 0.0
    for reference in references:
        b, where, row = words(reference), {}, 0
        for i, w in enumerate(a):
            where[w] = where.get(w, 0) | 1 << i
        for w in b:  # longest common subsequence, one bit a token (Crochemore et al. 2001): zeros of ~row count it
            x = row | where.get(w, 0)
            row = x & ~(x - ((row << 1) | 1))
        lcs = bin(row).count("1")
        best = max(best, 2 * lcs / (len(a) + len(b)) if lcs else 0.0)
    return best


def bleu(candidates, references):
    """Corpus BLEU-4 in 0..1 as sacrebleu computes it (13a tokens, exponential smoothing, closest reference length)."""
    def tokens(s):
        s = " " + s.replace("<skipped>", "").replace("-\n", "").replace("\n", " ") + " "
        for a, b in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
            s = s.replace(a, b)
        for pattern, new in ((r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "), (r"([^0-9])([\.,])", r"\1 \2 "), (r"([\.,])([^0-9])", r" \1 \2"), (r"([0-9])(-)", r"\1 \2 ")):
            s = re.sub(pattern, new, s)
        return s.split()

    def grams(words, n):
        counts = {}
        for i in range(len(words) - n + 1):
            counts[tuple(words[i:i + n])] = counts.get(tuple(words[i:i + n]), 0) + 1
        return counts
    match, total, length, wanted = [0] * 4, [0] * 4, 0, 0
    for candidate, refs in zip(candidates, references):
        c, rs = tokens(candidate), [tokens(r) for r in refs]
        length += len(c)
        wanted += min((abs(len(r) - len(c)), len(r)) for r in rs)[1]
        for n in range(1, 5):
            most = {}
            for r in rs:
                for g, k in grams(r, n).items():
                    most[g] = max(most.get(g, 0), k)
            have = grams(c, n)
            match[n - 1] += sum(min(k, most.get(g, 0)) for g, k in have.items())
            total[n - 1] += sum(have.values())
    if not length or not match[0]:
        return 0.0
    smooth, logs = 1.0, []
    for m, t in zip(match, total):
        if t == 0:
            break  # sacrebleu's effective order only stops here
        smooth *= 2 if m == 0 else 1
        logs.append(math.log(m / t if m else 1 / (smooth * t)))
    if len(logs) < 4:
        return 0.0
    return math.exp(min(0.0, 1 - wanted / length) + sum(logs) / 4)


def distinct(texts, n):
    """Distinct n-grams over all n-grams of all texts (Li et al. 2016): 1 is no repetition at all."""
    grams = [tuple(w[i:i + n]) for w in (t.split() for t in texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def per_response(row_loss, student, teacher, examples, batch_size=64, dtype=torch.float32):
    """(len(examples), k) sums over the tokens of each response of the k values that row_loss gives for a row."""
    out, states = [], response_states(student)
    teacher_states = response_states(teacher) if teacher is not None else None
    for i in range(0, len(examples), batch_size):
        part = examples[i:i + batch_size]
        batch = collate(part, student).to(student.device)
        with _autocast(student.device, dtype):
            hidden = states(batch)
            teacher_hidden = teacher_states(collate(part, teacher, "teacher").to(teacher.device)) if teacher is not None else None
        total, size = 0.0, chunk_rows(student.vocab, student.device)
        for j in range(0, len(batch.targets), size):
            rows = slice(j, j + size)
            p = head_logits(teacher, teacher_hidden[rows].to(teacher.dtype)) if teacher is not None else None
            values = torch.stack(row_loss(head_logits(student, hidden[rows]), p, batch.targets[rows]), -1)  # (r,k)
            total = total + values.new_zeros(len(part), values.shape[-1]).index_add_(0, batch.owner[rows], values)
        out.append(total.double().cpu())
    return torch.cat(out)


def make_ruler(cfg, teacher, tokenizer, examples, temperature=1.0, seed=1234):
    """A function model -> dict of metrics on `examples`, for teacher and student alike.

    Sampled at `temperature` (1 unless a control says otherwise) and greedy. kl_pq: mean over teacher-sampled
    responses of the per-response sum of KL(p||q), nats. kl_qp: KL(q||p) over responses sampled from the measured
    model. With --kl-on references both sums run over the reference responses instead. ce: nats a token there.
    Where a row knows every right answer and its probability (the tiny world): valid, valid_greedy (share of
    generated texts that are right answers), valid_mass (the same as `valid` in expectation, exactly: the
    probability that the model gives to right answers) and mode_distance (total variation between the shares of
    the wordings among right answers, model against teacher, mean over kinds of prompt).
    """
    device = (teacher or SimpleNamespace(device="cpu")).device
    kl_on = "references" if cfg.kl_on == "references" else "samples"
    labelled = [e for e in examples if e.response]
    from_teacher = None
    if teacher is not None and kl_on == "samples":
        from_teacher = answered(teacher, [e.teacher_prompt for e in examples], examples, cfg, 1.0, seed, tokenizer)
    exact = [dataclasses.replace(e, response=tokenizer(r, add_special_tokens=False).input_ids + [tokenizer.eos_token_id])
             for e in examples for r in e.row.get("references", []) if "probs" in e.row]
    known = len(exact) > 0 and all("probs" in e.row for e in examples)

    def mass(model, side):  # (N, wordings): exact probability of every right answer
        as_read = exact if side == "student" else [dataclasses.replace(e, prompt=e.teacher_prompt) for e in exact]
        return per_response(lambda q, p, y: (log_softmax_at(q / temperature, y),), model, None, as_read)[:, 0].exp().view(len(examples), -1)

    def modes(m):  # mean over kinds of prompt of the shares of the wordings
        kinds = np.array([e.row["prompt"].split()[0] for e in examples])
        return {k: (m[kinds == k].sum(0) / m[kinds == k].sum().clamp(min=1e-12)) for k in sorted(set(kinds))}
    teacher_modes = modes(mass(teacher, "teacher")) if known and teacher is not None else None

    def ruler(model):
        side = "teacher" if model is teacher else "student"
        prompts = [e.teacher_prompt if side == "teacher" else e.prompt for e in examples]
        sampled = answered(model, prompts, examples, cfg, temperature, seed + 1, tokenizer)
        greedy = answered(model, prompts, examples, cfg, 0.0, seed, tokenizer)
        texts, best = [[tokenizer.decode(e.response, skip_special_tokens=True).strip() for e in part] for part in (sampled, greedy)]
        m = {}
        if teacher is not None and model is not teacher:
            on = labelled if kl_on == "references" else None
            if on or from_teacher:
                m["kl_pq"] = per_response(lambda q, p, y: (kl(p, q),), model, teacher, on or from_teacher)[:, 0].mean().item()
                m["kl_qp"] = per_response(lambda q, p, y: (kl(q, p),), model, teacher, on or sampled)[:, 0].mean().item()
        elif model is teacher:
            m["kl_pq"] = m["kl_qp"] = 0.0
        if labelled:
            as_read = labelled if side == "student" else [dataclasses.replace(e, prompt=e.teacher_prompt) for e in labelled]
            ce = -per_response(lambda q, p, y: (log_softmax_at(q, y),), model, None, as_read)[:, 0].sum().item()
            m["ce"] = ce / sum(len(e.response) for e in labelled)
        references = [e.row.get("references") or ([e.row["response"]] if e.row.get("response") else []) for e in examples]
        scored = [i for i, r in enumerate(references) if r]
        if scored:
            refs = [references[i] for i in scored]
            for name, t in (("", texts), ("_greedy", best)):
                t = [t[i] for i in scored]
                m["rouge_l" + name] = float(np.mean([rouge_l(c, r) for c, r in zip(t, refs)]))
                m["bleu" + name] = bleu(t, refs)
                m["exact_match" + name] = float(np.mean([any(c.split() == x.split() for x in r) for c, r in zip(t, refs)]))
        m["distinct_1"], m["distinct_2"] = distinct(texts, 1), distinct(texts, 2)
        m["length"] = float(np.mean([len(e.response) for e in sampled]))
        m["no_end"] = float(np.mean([e.response[-1] != tokenizer.eos_token_id for e in sampled]))
        if known:
            m["valid"], m["valid_greedy"] = m["exact_match"], m["exact_match_greedy"]
            now = mass(model, side)
            m["valid_mass"] = now.sum(-1).mean().item()
            mine = modes(now)
            for i in range(now.shape[1]):
                m[f"mode_{i + 1}"] = float(np.mean([mine[k][i].item() for k in mine]))
            if teacher_modes:
                m["mode_distance"] = float(np.mean([0.5 * (mine[k] - teacher_modes[k]).abs().sum().item() for k in mine]))
            kinds = [e.row["prompt"].split()[0] for e in examples]
            for k in sorted(set(kinds)):
                m[f"valid_{k}"] = now.sum(-1)[[x == k for x in kinds]].mean().item()
        return m

    ruler.device = device
    return ruler


def answered(model, prompts, examples, cfg, temperature, seed, tokenizer):
    """The examples with responses sampled from the model."""
    responses, _ = sample(model, prompts, cfg.max_response, temperature, seed=seed, eos=tokenizer.eos_token_id)
    return [dataclasses.replace(e, response=r) for e, r in zip(examples, responses)]


def log_softmax_at(logits, targets):
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def kl(logits_p, logits_q):
    """(r,V), (r,V) -> (r,) KL(softmax(logits_p) || softmax(logits_q)) in nats, for measuring only."""
    logp, logq = F.log_softmax(logits_p, -1), F.log_softmax(logits_q, -1)
    return (logp.exp() * (logp - logq)).sum(-1)


def show_samples(run, model, examples, tokenizer, cfg, seed=7):
    """Print the model's samples for the first two examples: the same prompts at every evaluation."""
    for e, r in zip(examples[:2], sample(model, [e.prompt for e in examples[:2]], cfg.max_response, seed=seed, eos=tokenizer.eos_token_id)[0]):
        run.print(f"      {e.row['prompt'][:90]!r} -> {tokenizer.decode(r, skip_special_tokens=True)[:160]!r}")


# ---------------------------------------------------------------------------------------------------------------
# The tiny world's directories (its generator is assets/worlds.py)
# ---------------------------------------------------------------------------------------------------------------
def cache_dir():
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kd-of-language-models"
    path.mkdir(parents=True, exist_ok=True)
    return path


def resolve(name, role, data):
    """The path behind a --teacher, --student or --data setting. "tiny" is the tiny world of --data tiny or tiny:N:
    its rows, its teacher, its student after supervised fine-tuning ("tiny-kl": after KL distillation as well)."""
    if not re.fullmatch(r"tiny(:\d+)?" if role == "data" else "tiny(-kl)?", name):
        return name
    if not re.fullmatch(r"tiny(:\d+)?", data):
        raise BadInput(f"--{role} {name} only knows the words of the tiny world: with --data {data}, name your own --teacher and --student")
    from assets import worlds
    return str(worlds.build(int(data.partition(":")[2] or 0), cache_dir()) / {"data": "data", "teacher": "teacher"}.get(role, "student" + name[4:]))


if __name__ == "__main__":
    try:
        from assets import worlds
        worlds.show(resolve(sys.argv[1] if len(sys.argv) > 1 else "tiny", "data", sys.argv[1] if len(sys.argv) > 1 else "tiny"))
    except BadInput as e:
        sys.exit(f"error: {e}")
