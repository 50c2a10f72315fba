"""What the five method files share, and nothing of any method: models, data, output head, sampler, ruler.

    python common.py            build the tiny world (a teacher, students to start from) and print samples of each
    python common.py tiny:10    another one: other labelled rows, another teacher, another start

Read `Batch` and `collate` (how text becomes tensors), `response_states` and `rowwise_loss` (how a loss over a large
vocabulary fits into memory), `sample` and `make_ruler`. Settings, run directories and checkpoints are in
assets/plumbing.py, the tiny worlds in assets/worlds.py; a first reading may skip both.
p is always the teacher, q always the student. Sizes: B batch, T tokens, V vocabulary, H hidden, R "rows": the
response tokens of a whole batch, one after the other. There is no padding among rows, so none can leak into a loss.
"""
import contextlib
import csv
import dataclasses
import hashlib
import importlib
import json
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from assets import domains
from assets.metrics import bleu, distinct, rouge_l
from assets.plumbing import BadInput, Run, RunFailed, check_settings, compute_dtype, main, parse_args  # noqa: F401
from assets.processes import from_zero, noise_seed, processes, reduce_gradients, total, zero_first  # noqa: F401
from assets.speed import gumbel, recompute, roomy_cache
from assets.tasks import Pool, Writer, census, check_labels, load_task, pick_shots, row_reader, student_row  # noqa: F401
from assets.tasks import metrics as task_metrics  # noqa: F401

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------
# Models and tokenizers
# ---------------------------------------------------------------------------------------------------------------
SAFE = {"trust_remote_code": False}  # without it transformers would ask on the terminal whether to run foreign code


def load_model(path, device, dtype=torch.float32, what="student", seed=0, device_map=""):
    """A Hugging Face causal or encoder-decoder model in eval mode, on `device`, with `dtype` weights.

    A student's directory with a config.json but no weights gives random weights, which is said in a line.
    `device_map` is handed to transformers, for a teacher that needs several devices (wants accelerate).
    """
    try:
        config = AutoConfig.from_pretrained(path, **SAFE)
    except (OSError, ValueError, KeyError) as e:
        raise BadInput(f"--{what} {path}: no model can be loaded from there ({first_line(e)})") from None
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    weights = not Path(path).is_dir() or any(f.suffix in (".safetensors", ".bin") for f in Path(path).iterdir())
    if weights:
        try:
            model = auto.from_pretrained(path, dtype=dtype, weights_only=True, **SAFE,
                                         **({"device_map": device_map} if device_map else {}))
        except Exception as e:  # damaged or foreign weights: transformers and safetensors raise many kinds
            raise BadInput(f"--{what} {path}: the weights cannot be loaded ({first_line(e)})") from None
    elif what == "student":
        print(f"{path} holds no weights: the student starts from random ones")
        torch.manual_seed(seed)
        model = auto.from_config(config).to(dtype)
    else:
        raise BadInput(f"--{what} {path}: config.json is there, but no weights (*.safetensors or *.bin)")
    model = (model if device_map else model.to(device)).eval()  # from_config gives train mode: dropout
    model.vocab = model.get_output_embeddings().weight.shape[0]  # load_pair cuts it to the common size
    check_head(model, path, what)
    return model


@torch.no_grad()
def check_head(model, path, what):
    """The chunked losses compute head(states); models that change logits after the head are refused."""
    batch = collate([Example([3, 4, 5, 6], [3, 4, 5, 6], [4, 3, 5])], model).to(model.device)
    ours = head_logits(model, response_states(model)(batch))
    if model.config.is_encoder_decoder:
        theirs = model(input_ids=batch.tokens, attention_mask=batch.mask,
                       decoder_input_ids=batch.decoder_tokens).logits[0]
    else:
        theirs = model(input_ids=batch.tokens).logits[0, batch.rows]
    if (ours - theirs.float()).abs().max() > 0.02 * theirs.float().abs().max() + 1e-3:
        raise BadInput(f"--{what} {path}: {type(model).__name__} changes its logits after the output head (soft-capping"
                       " or a logit scale), which the chunked losses here do not do: choose another model")


def load_tokenizer(path, what):
    files = [f.name for f in Path(path).iterdir()] if Path(path).is_dir() else ["tokenizer.json"]
    try:  # transformers would make an empty tokenizer up from config.json alone
        if not any(re.match(r"tokenizer|vocab|spiece|sentencepiece", f) for f in files):
            raise OSError("no tokenizer.json or other vocabulary file")
        tokenizer = AutoTokenizer.from_pretrained(path, **SAFE)
    except Exception as e:  # transformers raises a dozen kinds here
        raise BadInput(f"--{what} {path}: no tokenizer there ({first_line(e)}); save one beside the model") from None
    if tokenizer.eos_token_id is None:
        raise BadInput(f"--{what} {path}: the tokenizer has no end-of-sequence token, so that no response could end")
    return tokenizer


def first_line(e):
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]


PROBE = "The quick brown fox: jumps over 13 lazy dogs, naïve café!\n\tdef f(x): return x ** 2  # describe name ada ;"


def load_pair(cfg, device, same_tokens=True, world="worlds"):
    """(student in fp32, teacher in the compute dtype and frozen or None, the student's tokenizer), all in eval mode.

    Methods that compare distributions need tokenizers that agree, which is checked on a probe text. Heads padded to
    different sizes are cut to the smaller (`model.vocab`), and both models renormalise over those V tokens.
    """
    paths = [resolve(getattr(cfg, role), role, cfg.data, world) for role in ("student", "teacher")]
    tokenizer, student = load_tokenizer(paths[0], "student"), load_model(paths[0], device, seed=cfg.seed)
    if cfg.recompute:
        recompute(student)
    if cfg.teacher == "none":
        return student, None, tokenizer
    teacher = load_model(paths[1], device, compute_dtype(cfg, device), "teacher", device_map=cfg.teacher_device_map)
    teacher.requires_grad_(False)
    if same_tokens:
        other = load_tokenizer(paths[1], "teacher")
        if tokenizer(PROBE).input_ids != other(PROBE).input_ids or tokenizer.eos_token_id != other.eos_token_id:
            raise BadInput(f"--teacher {paths[1]} and --student {paths[0]} have different tokenizers, so their token "
                           "distributions cannot be compared: choose two models of one family")
        student.vocab = teacher.vocab = min(student.vocab, teacher.vocab)
    return student, teacher, tokenizer


def fingerprint(model):
    """A short hash of the configuration and of a sample of every weight: other teacher, other cache."""
    h = hashlib.sha1(model.config.to_json_string().encode())
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        h.update(name.encode() + flat[::max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------
# Data: rows of prompt and response -> token ids -> batches
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Example:
    prompt: list            # token ids of the prompt as the student reads it
    teacher_prompt: list    # the same object, unless the teacher reads another template
    response: list          # token ids with EOS; without EOS where it was cut; [] where there is none
    row: dict = field(default_factory=dict)


def check_row(r, where, cfg):
    """A raw record -> {"prompt": str, "response": str or None}, or a sentence with `where` that says what is wrong."""
    if not isinstance(r, dict):
        raise BadInput(f"{where}: a {type(r).__name__}, not an object with {cfg.prompt_field} and {cfg.response_field}")
    for name, flag in ((cfg.prompt_field, "--prompt-field"), (cfg.response_field, "--response-field")):
        if name not in r:
            raise BadInput(f"{where}: no field {name!r} (there: {', '.join(map(str, r))[:80] or 'nothing'}): "
                           f"name it with {flag}")
        if not isinstance(r[name], str) and (r[name] is not None or name == cfg.prompt_field):
            raise BadInput(f"{where}: field {name!r} is a {type(r[name]).__name__}, a string is wanted")
        if re.search("[\ud800-\udfff]", r[name] or ""):
            raise BadInput(f"{where}: field {name!r} holds half a surrogate pair, which is no text: remove it")
    known = {k: r[k] for k in ("references", "probs") if k in r}
    return {"prompt": r[cfg.prompt_field], "response": r[cfg.response_field], **known}


def read_rows(path, cfg, check=check_row):
    """Checked rows of a JSONL or CSV file; errors name file and line."""
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[:e.start].count(b"\n") + 1
        raise BadInput(f"{path}:{line}: not valid UTF-8: convert the file to UTF-8") from None
    except OSError as e:
        raise BadInput(f"--data {path}: cannot be read ({e.strerror})") from None
    rows, at = [], 0
    try:
        if Path(path).suffix == ".csv":
            reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
            for r in reader:
                at = reader.line_num
                rows.append(check(r, f"{path}:{at}", cfg))
        else:
            for at, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may hold U+2028
                if line.strip():
                    rows.append(check(json.loads(line), f"{path}:{at}", cfg))
    except (ValueError, RecursionError, csv.Error) as e:
        raise BadInput(f"{path}:{at}: {first_line(e)}: one JSON object a line (or valid CSV) is wanted") from None
    if not rows:
        raise BadInput(f"--data {path}: the file has no rows")
    return rows


def load_rows(cfg, world="worlds", check=check_row, names=None):
    """{"train", "valid", "test": rows} from a directory of JSONL files, one JSONL or CSV file, a saved data set or the
    hub. Data without splits is split by a hash of the prompt: no prompt in two splits, the same for every seed.
    `check` makes a row of a raw record; `names` are the splits to use of a saved or hub data set, {theirs: ours}."""
    path = Path(resolve(cfg.data, "data", cfg.data, world))
    if path.is_file():
        splits = {"train": read_rows(path, cfg, check)}
    elif (path / "train.jsonl").is_file():
        files = {s: path / f"{s}.jsonl" for s in ("train", "valid", "test")}
        splits = {s: read_rows(f, cfg, check) for s, f in files.items() if f.is_file()}
    elif path.suffix in (".jsonl", ".json", ".csv", ".txt"):
        raise BadInput(f"--data {cfg.data}: no such file")
    else:
        import datasets  # only here: everything else runs without it
        name, _, conf = cfg.data.partition(":")
        try:
            loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name, conf or None)
        except Exception as e:  # absent, offline, damaged: many kinds
            raise BadInput(f"--data {cfg.data}: neither a file nor a saved or hub data set ({first_line(e)})") from None
        loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
        names = names or {s: s.replace("validation", "valid") for s in loaded}
        splits = {names[s]: [check(dict(r), f"{cfg.data}, {s} row {i}", cfg) for i, r in enumerate(d)]
                  for s, d in loaded.items() if s in names}
    if "train" not in splits:
        raise BadInput(f"--data {cfg.data}: no split is called train (there: {', '.join(splits)})")
    everything, cut = splits["train"], 1000 * cfg.holdout
    draw = [zlib.crc32(r["prompt"].encode()) % 1000 for r in everything]
    lacking = [s for s in ("test", "valid") if s not in splits]
    for i, s in enumerate(lacking):
        splits[s] = [r for r, x in zip(everything, draw) if i * cut <= x < (i + 1) * cut]
    splits["train"] = [r for r, x in zip(everything, draw) if x >= len(lacking) * cut]
    for s in ("train", "valid", "test"):
        if not splits[s]:
            raise BadInput(f"--data {cfg.data}: of {len(everything)} none is left for {s}: add rows or set --holdout")
    return splits


def prompt_encoder(tokenizer, template, model, max_prompt):
    """A function text -> token ids of the whole prompt: template around it, too long content cut from the left.

    User text never becomes a control token: special tokens are recognised in the template's own parts only.
    """
    ids = lambda text, **kw: tokenizer(text, add_special_tokens=False, **kw).input_ids if text else []
    encdec, mark = model.config.is_encoder_decoder, "\ue000"
    if template == "auto" and tokenizer.chat_template:  # it writes its own begin-of-sequence token
        chat = [{"role": "user", "content": mark}]
        whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start, found, end = whole.partition(mark)
        if not found:
            raise BadInput("the tokenizer's chat template drops the user's message: give a --template of your own")
        start, end = ids(start), ids(end)
    else:
        template = ("{prompt}" if encdec else "{prompt}\n") if template == "auto" else template.replace("\\n", "\n")
        if template.count("{prompt}") != 1:
            raise BadInput(f"--template {template!r}: it must hold {{prompt}} exactly once")
        before, after = template.split("{prompt}")
        bare, whole = ids("a"), tokenizer("a").input_ids  # what the tokenizer puts around a text by itself
        at = next((i for i in range(len(whole)) if whole[i:i + len(bare)] == bare), 0)
        start, end = whole[:at] + ids(before), ids(after) + (whole[at + len(bare):] if encdec else [])
    room = max_prompt - len(start) - len(end)
    if room < 1:
        raise BadInput(f"--max-prompt {max_prompt}: the template alone takes {len(start) + len(end)} tokens")

    def encode(text):
        content = ids(text, split_special_tokens=True)
        encode.cut += len(content) > room
        return start + content[-room:] + end or [tokenizer.eos_token_id]  # a decoder needs a token to start from
    encode.cut = 0
    return encode


def row_encoder(cfg, student, teacher, tokenizer, spare=0):
    """A function row -> Example; its attributes count what was cut or empty. `spare` is how many positions after the
    longest response a method reads."""
    for model, what in ((student, "student"), (teacher, "teacher")):
        context = getattr(model.config, "max_position_embeddings", None) if model is not None else None
        need = (max if context and model.config.is_encoder_decoder else sum)((cfg.max_prompt, cfg.max_response + spare))
        if context and need > context:
            raise BadInput(f"--max-prompt {cfg.max_prompt} and --max-response {cfg.max_response} do not fit the "
                           f"{what}'s context of {context} tokens{' less ' + str(spare) if spare else ''}: lower them")
    encode = encode_t = prompt_encoder(tokenizer, cfg.template, student, cfg.max_prompt)
    if getattr(cfg, "teacher_template", ""):
        encode_t = prompt_encoder(tokenizer, cfg.teacher_template, teacher or student, cfg.max_prompt)

    def example(row):
        response = tokenizer(row["response"] or "", add_special_tokens=False, split_special_tokens=True).input_ids
        if response:
            response = (response + [tokenizer.eos_token_id])[:cfg.max_response]  # cut from the right: loses EOS
            example.cut += response[-1] != tokenizer.eos_token_id
        example.empty += row["response"] is not None and not response
        prompt = encode(row["prompt"])
        example.cut_prompts = encode.cut
        return Example(prompt, prompt if encode_t is encode else encode_t(row["prompt"]), response, row)
    example.cut = example.empty = example.cut_prompts = 0
    return example


def load_data(cfg, student, teacher, tokenizer, spare=0):
    """SimpleNamespace(train, valid, test) of lists of Examples, tokenised once; says what was cut or dropped."""
    encode, splits = row_encoder(cfg, student, teacher, tokenizer, spare), load_rows(cfg)
    limits = {"train": None, "valid": min(cfg.eval_rows, 200), "test": cfg.eval_rows}
    data = SimpleNamespace(**{s: [encode(row) for row in splits[s][:limit]] for s, limit in limits.items()})
    print(f"data: {len(data.train)} training prompts, {sum(bool(e.response) for e in data.train)} with a response; "
          f"{len(data.valid)} validation, {len(data.test)} test rows; "
          f"cut to fit: {encode.cut_prompts} prompts, {encode.cut} responses; {encode.empty} empty responses",
          flush=True)
    return data


def load_corpus(path, tokenizer, cfg):
    """Examples for plain language modelling: blocks of --max-response tokens from a text file (blank lines part its
    documents) or a .jsonl (field "text"), EOS after each document; EOS serves as the prompt of each block."""
    eos, n = tokenizer.eos_token_id, cfg.max_response
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        documents = re.split(r"\n\s*\n", text) if Path(path).suffix != ".jsonl" else \
            [json.loads(x)["text"] for x in text.split("\n") if x.strip()]
        tokens = [t for d in documents if d.strip()
                  for t in tokenizer(d.strip(), add_special_tokens=False, split_special_tokens=True).input_ids + [eos]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadInput(f'{path}: not UTF-8 text or JSON lines with a string "text" ({first_line(e)})') from None
    if not tokens:
        raise BadInput(f"{path}: the file has no text")
    return [Example([eos], [eos], tokens[i:i + n]) for i in range(0, len(tokens), n)]


def load_domains(cfg, student, teacher, tokenizer, world):
    """SimpleNamespace(names, train, valid, test, sha1): for every domain of --domains or --data, memory-mapped tokens
    packed into sequences of --max-tokens; assets/domains.py. Of valid and test at most `gap_rows` and `eval_rows`
    sequences a domain, as Examples: the first token is the prompt, so that all that follow it are predicted."""
    for model, what in ((student, "student"), (teacher, "teacher")):
        context = getattr(model.config, "max_position_embeddings", None) if model is not None else None
        if model is not None and model.config.is_encoder_decoder:
            raise BadInput(f"the {what} is an encoder-decoder: running text wants a decoder-only model")
        if context and cfg.max_tokens > context:
            raise BadInput(f"--max-tokens {cfg.max_tokens} does not fit the {what}'s context of {context} tokens")
    sources = domains.parse(cfg.domains, "--domains") if cfg.domains else \
        domains.folder(resolve(cfg.data, "data", cfg.data, world))
    with zero_first():
        data = domains.load(sources, tokenizer, cfg, cache_dir())
    for split, limit in (("valid", cfg.gap_rows), ("test", cfg.eval_rows)):
        setattr(data, split, {n: [sequence(x) for x in getattr(data, split)[n][:limit]] for n in data.names})
    shown = [f"{n} {len(data.train[n])} {len(data.valid[n])} {len(data.test[n])}" for n in data.names]
    print(f"{cfg.max_tokens}-token sequences (train valid test): {', '.join(shown)}; corpus {data.sha1}", flush=True)
    return data


def sequence(tokens):
    """Packed tokens -> Example: the first token is the prompt, the others are the response."""
    tokens = [int(t) for t in tokens]
    return Example(tokens[:1], tokens[:1], tokens[1:])


@dataclass
class Batch:
    """Decoder-only: tokens (B,T) are prompt+response, right-padded; encoder-decoder: tokens and mask (B,P) are the
    prompt, decoder_tokens (B,N) the shifted response. For the R response tokens of the batch, one after the other:
    rows (R,) is the position, in the flattened (B*T) or (B*N), from which the token is predicted; targets (R,) is
    the token; owner (R,) its example. lengths (B,) counts response tokens."""
    tokens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor = None
    decoder_tokens: torch.Tensor = None
    view: "Batch" = None        # the same responses as the teacher reads them, where that is something else
    ids: list = None            # which examples these are, for caches

    @property
    def teacher(self):  # no field that holds the batch itself: such a cycle lives until the garbage collector comes
        return self.view or self

    def to(self, device):
        moved = {k: (v.pin_memory() if device.type == "cuda" else v).to(device, non_blocking=True)
                 for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **moved, view=self.view and self.view.to(device))


def pad(lists, width, left=False):
    """Lists of token ids -> (len, width) int64, filled with 0. What the fill is never matters: masks know lengths."""
    out = np.zeros((len(lists), width), dtype=np.int64)
    for row, x in zip(out, lists):
        row[width - len(x) if left else 0:][:len(x)] = x
    return torch.from_numpy(out)


def collate(examples, model, side="student", edges=()):
    """Examples -> Batch on the CPU. Masks come from lengths, never from ids, since pad may equal EOS. The shift by
    one token is made here and nowhere else. `edges` are the widths to pad to, where few shapes are wanted."""
    prompts = [e.prompt if side == "student" else e.teacher_prompt for e in examples]
    responses = [e.response for e in examples]
    fit = lambda lists: next((w for w in edges if w >= max(map(len, lists))), max(map(len, lists)))
    lengths = torch.tensor([len(r) for r in responses])
    targets = torch.tensor([t for r in responses for t in r], dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(examples)), lengths)
    index = torch.cat([torch.arange(len(r)) for r in responses])  # (R,) place of the token in its own response
    if model.config.is_encoder_decoder:
        tokens = pad(prompts, fit(prompts))
        decoder_tokens = pad([[model.config.decoder_start_token_id] + r[:-1] for r in responses], fit(responses))
        mask = (torch.arange(tokens.shape[1]) < torch.tensor([len(x) for x in prompts])[:, None]).long()
        return Batch(tokens, owner * decoder_tokens.shape[1] + index, targets, owner, lengths, mask, decoder_tokens)
    both = [a + b for a, b in zip(prompts, responses)]
    tokens, before = pad(both, fit(both)), torch.tensor([len(a) - 1 for a in prompts])
    return Batch(tokens, owner * tokens.shape[1] + before[owner] + index, targets, owner, lengths)


def step_indices(n, step, cfg):
    """Which of n examples an optimizer step uses: shuffled anew every epoch, a function of seed and step alone.
    Under torchrun every process takes its share of them."""
    first = step * cfg.batch_size
    epochs = {i // n for i in range(first, first + cfg.batch_size)}
    order = {e: np.random.default_rng((cfg.seed, e)).permutation(n) for e in epochs}
    rank, world = processes()
    return [int(order[i // n][i % n]) for i in range(first + rank, first + cfg.batch_size, world)]


class Batches:
    """Training batches as a function of the step alone, so that a resumed run sees what it would have seen.

    at(step) gives the micro-batches of one optimizer step. Examples are shuffled anew every epoch. Inside a step
    they are sorted by length before they are split: less padding, and the step sees the same examples.
    """

    def __init__(self, examples, student, teacher, cfg, device):
        self.examples, self.student, self.teacher = [e for e in examples if e.response], student, teacher
        if not self.examples:
            raise BadInput("no training row has a response (all are null, empty or cut away): nothing to train on")
        self.cfg, self.device, self.edges = cfg, device, ()
        self.length = np.array([len(e.prompt) + len(e.response) for e in self.examples])
        if cfg.compile:  # at most 8 widths, hence at most 8 compilations
            self.edges = sorted({8 * math.ceil(np.quantile(self.length, x) / 8) for x in np.linspace(0.3, 1, 8)})
        self.two_views = teacher is not None and (any(e.prompt is not e.teacher_prompt for e in self.examples)
            or student.config.is_encoder_decoder != teacher.config.is_encoder_decoder)

    def indices(self, step):
        return step_indices(len(self.examples), step, self.cfg)

    def at(self, step):
        ids = sorted(self.indices(step), key=lambda i: self.length[i])
        size = len(ids) // self.cfg.accum
        return [self.batch(ids[i:i + size]) for i in range(0, len(ids), size)]

    def batch(self, ids):
        batch = self.collate([self.examples[i] for i in ids])
        batch.ids = batch.teacher.ids = ids
        return batch

    def collate(self, examples):
        """Any examples, such as the student's own answers, -> Batch on the device, with the teacher's view of it."""
        view = collate(examples, self.teacher, "teacher", self.edges) if self.two_views else None
        return dataclasses.replace(collate(examples, self.student, "student", self.edges), view=view).to(self.device)


# ---------------------------------------------------------------------------------------------------------------
# From tokens to hidden states to a loss: logits exist for response rows only, one chunk at a time
# ---------------------------------------------------------------------------------------------------------------
def response_states(model, compiled=False):
    """A function batch -> (R,H): the hidden states from which the output head predicts the response tokens.

    Decoder-only models run right-padded and without a mask: a causal model never looks to the right, and without
    a mask the fast attention kernels serve. T5 scales the states before a tied head; that is done here. Under autocast
    states have its dtype: after a final norm with fp32 weights they have not, and the head would run in fp32."""
    device = model.device.type
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
        rows = body(batch.tokens, batch.mask, batch.decoder_tokens).flatten(0, 1)[batch.rows]
        return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows
    return states


def state_scale(model):
    return model.config.d_model ** -0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0


def try_compile(function, **options):
    """torch.compile, or after one line the plain function, where the machine cannot compile (no C++ compiler, say)."""
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
    """Weight (V,H) and bias (V,) or None of the output layer, cut to the vocabulary shared with the other model."""
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return layer.weight[:model.vocab], None if bias is None else bias[:model.vocab]


def project(hidden, weight, bias):
    """(r,H) -> (r,V) fp32 logits. The product runs in the dtype of `hidden`; softmaxes of bf16 logits are 5 % off."""
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)).float()


def head_logits(model, hidden):
    return project(hidden, *head(model))


def chunks(rows, vocab, device):
    """Equal slices of rows whose fp32 logits take at most 16 MB on a CPU (near the cache) or 1 GB on a GPU."""
    most = max(1, (2**30 if device.type == "cuda" else 2**24) // (4 * vocab))
    size = math.ceil(rows / math.ceil(rows / most)) if rows else 1
    return [slice(i, i + size) for i in range(0, max(1, rows), size)]


class _RowwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row_loss, teacher_logits, targets, hidden, weight, bias):
        # Per chunk: logits, the method's loss, and at once the gradients of hidden states and head, these in fp32.
        # No (R,V) tensor outlives its chunk and nothing is computed twice.
        low, want = weight.to(hidden.dtype), ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        grads = [torch.zeros_like(t, dtype=d) if want and t is not None else None
                 for t, d in ((hidden, hidden.dtype), (weight, torch.float32), (bias, torch.float32))]
        totals = 0.0
        with torch.autocast(hidden.device.type, enabled=False):  # else it would turn the logits back into bf16
            for rows in chunks(len(targets), len(weight), hidden.device):
                logits = project(hidden[rows], low, bias).requires_grad_(want)
                with torch.set_grad_enabled(want):  # a Function's forward runs without grad
                    losses = row_loss(logits, teacher_logits(rows), targets[rows])
                    loss = losses[0].sum()
                totals = totals + torch.stack([x.detach().sum() for x in losses])
                if want:
                    g = torch.autograd.grad(loss, logits)[0]  # (r,V)
                    if bias is not None:
                        grads[2] += g.sum(0)
                    g = g.to(low.dtype)
                    grads[0][rows] = g @ low
                    if low.dtype == torch.float32:
                        grads[1].addmm_(g.t(), hidden[rows])
                    else:
                        grads[1] += (g.t() @ hidden[rows]).float()
        ctx.save_for_backward(*grads)
        return totals

    @staticmethod
    def backward(ctx, grad):  # grad[0] belongs to the loss; the other entries are there to be logged
        return None, None, None, *(None if g is None else g * grad[0].to(g.dtype) for g in ctx.saved_tensors)


def rowwise_loss(row_loss, student, hidden, targets, teacher=None, teacher_hidden=None):
    """Sums a loss of logits over all rows in flat memory; differentiable in student states (R,H) and student head.

    row_loss(student_logits (r,V), teacher_logits (r,V) or None, targets (r,)) -> tuple of (r,): the first is the
    loss, the others are logged; logits are fp32. Returns the *sum* of each over the R rows: divide once, by the
    response tokens of the whole optimizer step. Taking the gradient inside the forward pass is the idea of
    Liger-Kernel's fused losses (Hsu et al. 2024, https://arxiv.org/abs/2410.10989), here for any loss of rows.
    """
    def teacher_logits(rows):
        with torch.no_grad():
            return None if teacher is None else head_logits(teacher, teacher_hidden[rows].to(teacher.dtype))
    return _RowwiseLoss.apply(row_loss, teacher_logits, targets, hidden, *head(student))


def token_logprobs(model, hidden, targets):
    """(R,H), (R,) -> (R,) log-probabilities of the observed tokens; differentiable. For losses in which the weight of
    a row depends on its whole response. Logits of up to 1 GB (256 MB on a CPU) are kept, more computed again."""
    def piece(h, t, weight, bias):
        return log_softmax_at(project(h, weight, bias), t)
    parts = chunks(len(targets), model.vocab, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        keep = len(parts) <= (1 if hidden.device.type == "cuda" else 16) or not torch.is_grad_enabled()
        call = piece if keep else lambda *args: checkpoint(piece, *args, use_reentrant=False)
        return torch.cat([call(hidden[rows], targets[rows], *head(model)) for rows in parts])


@torch.no_grad()
def row_scalars(row_values, model, hidden, targets):
    """The values (r,) that row_values(logits (r,V) fp32, targets (r,)) gives, for all R rows: a tuple of (R,)."""
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [row_values(head_logits(model, hidden[rows].to(model.dtype)), targets[rows])
                 for rows in chunks(len(targets), model.vocab, hidden.device)]
    return tuple(torch.cat(x) for x in zip(*parts))


def by_response(values, lengths, width):
    """(R,) values of rows -> (B,width): a response a line, filled with 0."""
    inside = torch.arange(width, device=values.device) < lengths[:, None]
    return values.new_zeros(inside.shape).masked_scatter(inside, values)


def log_softmax_at(logits, targets):
    """(r,V), (r,) -> (r,) log-softmax at the targets, without the other V - 1 entries."""
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def teacher_states(teacher, batches, cfg):
    """batch -> (R,H) from the teacher; with --cache-gib, remembered for every example from the first epoch on."""
    states = response_states(teacher, cfg.compile)
    return CachedStates(states, batches.examples, teacher, cfg.cache_gib * 2**30) if cfg.cache_gib > 0 else states


class CachedStates:
    """The teacher's final hidden states of fixed responses, computed once: with the head they give the exact, full
    distribution at 2H (bf16) or 4H bytes a token, against 2V or 4V for logits. They live with the run, in memory or,
    beyond `limit` bytes, in a memory-mapped temporary file, so no other teacher or data can ever meet them."""

    def __init__(self, states, examples, model, limit):
        self.states, self.known = states, np.zeros(len(examples), dtype=bool)
        self.start = np.concatenate([[0], np.cumsum([len(e.response) for e in examples])])
        shape = int(self.start[-1]), head(model)[0].shape[1]
        if shape[0] * shape[1] * model.dtype.itemsize <= limit:
            self.store = torch.empty(shape, dtype=model.dtype)
        else:
            file = cache_dir() / f"states-{os.getpid()}-{id(self)}"
            self.store = torch.from_file(str(file), True, shape[0] * shape[1], dtype=model.dtype).view(shape)
            with contextlib.suppress(OSError):  # the mapping keeps it alive; Windows will not let it go before
                file.unlink()

    def __call__(self, batch):
        rows = [slice(self.start[i], self.start[i + 1]) for i in batch.ids]
        if not self.known[batch.ids].all():
            states = self.states(batch).detach()
            for r, piece in zip(rows, states.to("cpu", self.store.dtype).split(batch.lengths.tolist())):
                self.store[r] = piece
            self.known[batch.ids] = True
            return states
        return torch.cat([self.store[r] for r in rows]).to(batch.tokens.device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def sample(model, prompts, max_new, temperature=1.0, top_k=0, seed=0, eos=None, batch_size=256, compiled=False,
           static=None, top_p=1.0):
    """Prompts (lists of token ids) -> (responses as lists of token ids, their token log-probs as (n,) tensors).

    By default from the very distribution that is scored: T = 1, no truncation, no dropout; temperature 0 is greedy.
    A response ends with its first EOS, or without one after max_new tokens. Log-probs are those of the sampling
    distribution. Draws are argmax(logits + Gumbel noise), which is exact and needs no host sync. On a GPU (`static`)
    one compiled step under CUDA graphs on a fixed-size cache, with a look for "all done" every 16 tokens; elsewhere
    a growing cache, which finished rows leave at once.
    """
    was_training, static = model.training, model.device.type == "cuda" if static is None else static
    eos = model.generation_config.eos_token_id if eos is None else eos
    model.eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    out = [None] * len(prompts)
    for i in range(0, len(order), batch_size):
        ids = order[i:i + batch_size]
        tokens, logprobs = _sample_batch(model, [prompts[j] for j in ids], max_new, temperature, top_k, generator, eos,
                                         compiled, static, top_p)
        for j, t, lp in zip(ids, tokens.tolist(), logprobs):
            n = t.index(eos) + 1 if eos in t else max_new  # the first EOS counts, nothing after it
            out[j] = t[:n], lp[:n].clone()
    model.train(was_training)
    return [t for t, _ in out], [lp for _, lp in out]


def decode_step(model, cache, tokens, positions, attend, mask, memory):
    """One step of the decoder: (B,1) tokens (or (B,P) prompts) -> (B,V) fp32 logits of the next one."""
    if memory is not None:
        hidden = model.get_decoder()(input_ids=tokens, encoder_hidden_states=memory, encoder_attention_mask=mask,
                                     past_key_values=cache, use_cache=True)[0] * state_scale(model)
    else:
        hidden = model.base_model(input_ids=tokens, attention_mask=attend, position_ids=positions,
                                  past_key_values=cache, use_cache=True)[0]
    return head_logits(model, hidden[:, -1])


def _sample_batch(model, prompts, max_new, temperature, top_k, generator, eos, compiled, static, top_p):
    device, B, P, encdec = model.device, len(prompts), max(map(len, prompts)), model.config.is_encoder_decoder
    prompt, n = pad(prompts, P, left=not encdec).to(device), torch.tensor([len(p) for p in prompts], device=device)
    at = torch.arange(P, device=device)
    mask = (at < n[:, None] if encdec else at >= P - n[:, None]).long()  # (B,P)
    config, room = model.config.get_text_config(decoder=True), 64 * math.ceil(((0 if encdec else P) + max_new) / 64)
    cache = StaticCache(config=config, max_cache_len=room) if static else roomy_cache(config)
    tokens, memory, positions, attend = prompt, None, None, None
    if encdec:  # the encoder runs once
        memory = model.get_encoder()(input_ids=prompt, attention_mask=mask)[0]
        cache = EncoderDecoderCache(cache, DynamicCache(config=config))
        tokens = torch.full((B, 1), model.config.decoder_start_token_id, device=device)
    else:  # left-padded, so positions are told explicitly: absolute embeddings are wrong otherwise
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        attend = torch.cat([mask, mask.new_ones(B, room - P)], -1)
    if static and compiled and not hasattr(model, "fast_step"):
        model.fast_step = try_compile(decode_step, mode="reduce-overhead")
    out, logprobs = torch.full((B, max_new), eos, device=device), torch.zeros(B, max_new, device=device)
    done, alive = torch.zeros(B, dtype=torch.bool, device=device), torch.arange(B, device=device)
    for t in range(max_new):
        step = model.fast_step if static and compiled and t > 0 else decode_step
        seen = attend if static or encdec else attend[:, :P + t]
        logits = step(model, cache, tokens, positions, seen, mask, memory)  # (B,V)
        if temperature > 0:
            logits = logits / temperature
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
        if top_p < 1:  # the fewest tokens that hold the share top_p: those with less than it before them
            ordered, at_token = logits.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.scatter(-1, at_token, ordered.masked_fill(before >= top_p, -math.inf))
        token = (logits + gumbel(logits, generator) if temperature > 0 else logits).argmax(-1)  # (B,)
        out[alive, t], logprobs[alive, t] = torch.where(done, eos, token), log_softmax_at(logits, token)
        done, tokens, positions = done | (token == eos), token[:, None], None if encdec else n[:, None] + t
        if static:
            if t % 16 == 15 and done.all():
                break
        elif done.all():
            break
        elif done.sum() * 8 > len(done):
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive, done, tokens, n, mask, positions, attend, memory = \
                [x if x is None else x[keep] for x in (alive, done, tokens, n, mask, positions, attend, memory)]
    return out.cpu(), logprobs.cpu()


def sampled(model, examples, tokenizer, cfg, temperature=1.0, seed=0, side="student"):
    """The examples with responses of the model in place of their own."""
    prompts = [e.prompt if side == "student" else e.teacher_prompt for e in examples]
    responses, _ = sample(model, prompts, cfg.max_response, temperature, seed=seed, eos=tokenizer.eos_token_id,
                          compiled=cfg.compile)
    return [dataclasses.replace(e, response=r) for e, r in zip(examples, responses)]


def teacher_answers(teacher, examples, tokenizer, cfg):
    """The examples with the teacher's responses (T = 1, drawn once), kept on disk under teacher, prompts and seed."""
    what = [fingerprint(teacher), str(teacher.dtype), [e.teacher_prompt for e in examples], cfg.max_response, cfg.seed]
    file = cache_dir() / f"answers-{hashlib.sha1(json.dumps(what).encode()).hexdigest()[:20]}.json"
    if file.is_file():
        responses = json.loads(file.read_text())
    else:
        print(f"the teacher answers {len(examples)} prompts ...", flush=True)
        responses = [e.response for e in sampled(teacher, examples, tokenizer, cfg, seed=cfg.seed, side="teacher")]
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(responses))
        os.replace(part, file)
    cut = sum(r[-1] != tokenizer.eos_token_id for r in responses)
    print(f"teacher responses: {len(responses)}, of which {cut} reach --max-response without an end", flush=True)
    return [dataclasses.replace(e, response=r) for e, r in zip(examples, responses)]


def show_samples(run, model, examples, tokenizer, cfg):
    """Print what the model says to the first two examples: the same prompts and seed at every evaluation."""
    for e in sampled(model, examples[:2], tokenizer, cfg, seed=7):
        run.print(f"      {e.row['prompt'][:90]!r} -> {tokenizer.decode(e.response, skip_special_tokens=True)[:160]!r}")


# ---------------------------------------------------------------------------------------------------------------
# The ruler: one for all methods
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def per_response(row_values, student, teacher, examples, cfg, side="student", batch_size=64):
    """(len(examples), k): for each response the sums over its tokens of the k values that row_values(student_logits,
    teacher_logits, targets) gives for each row. Logits never outlive their chunk."""
    out, states, teacher_fwd = [], response_states(student), teacher and response_states(teacher)
    was_training = student.training
    student.eval()  # no dropout in what is reported
    dtype = compute_dtype(cfg, student.device)
    for i in range(0, len(examples), batch_size):
        part = examples[i:i + batch_size]
        batch = collate(part, student, side).to(student.device)
        with torch.autocast(student.device.type, dtype, enabled=dtype != torch.float32):
            hidden = states(batch)
            teacher_hidden = teacher_fwd(collate(part, teacher, "teacher").to(teacher.device)) if teacher else None
        sums = 0.0
        for rows in chunks(len(batch.targets), student.vocab, student.device):
            p = head_logits(teacher, teacher_hidden[rows].to(teacher.dtype)) if teacher else None
            values = torch.stack(row_values(head_logits(student, hidden[rows]), p, batch.targets[rows]), -1)  # (r,k)
            sums = sums + values.new_zeros(len(part), values.shape[-1]).index_add_(0, batch.owner[rows], values)
        out.append(sums.cpu().double())
    student.train(was_training)
    return torch.cat(out)


def both_kl(student_logits, teacher_logits, targets):
    """KL(p||q) and KL(q||p) of each row, in nats, p the teacher. (r,V), (r,V) -> two (r,)."""
    logp, logq = F.log_softmax(teacher_logits, -1), F.log_softmax(student_logits, -1)
    return (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)


def make_ruler(cfg, teacher, tokenizer, examples, seed=1234):
    """A function model -> {metric: float} on `examples`; it measures teacher and student alike, as they are or
    with logits divided by cfg.eval_temperature: q below, all but _greedy. The teacher p that it compares with is at 1.

    kl_pq, kl_qp: nats a response, the sum over its tokens of KL(p||q) on responses sampled from the teacher, of
    KL(q||p) on responses sampled from q (--kl-on references: both on the reference responses). entropy: nats a
    response, the sum over its tokens of the entropy of q, on responses sampled from q. ce: nats a token on reference
    responses. rouge_l, bleu, exact_match, distinct_n, length, no_end: of responses sampled from q; _greedy: of
    greedy ones. Where every row knows all right answers and their probabilities (the tiny world) also: valid,
    valid_greedy, the share of generated texts that are right; valid_mass, the probability that q gives to right
    answers, i.e. `valid` without sampling noise; mode_i, the share of wording i among right answers; mode_distance,
    the total variation between q's shares and the teacher's, mean over kinds of prompt.
    """
    labelled = [e for e in examples if e.response]
    has_reference = [bool(e.row.get("references") or e.row["response"]) for e in examples]
    references = [e.row.get("references") or [e.row["response"]] for e, has in zip(examples, has_reference) if has]
    known, eos = all("probs" in e.row for e in examples), tokenizer.eos_token_id
    kinds = np.array([e.row["prompt"].split(" ")[0] for e in examples])
    answers = [dataclasses.replace(e, response=tokenizer(r, add_special_tokens=False).input_ids + [eos])
               for e in examples for r in e.row["references"]] if known else []
    text = lambda part: [tokenizer.decode(e.response, skip_special_tokens=True).strip() for e in part]
    T = getattr(cfg, "eval_temperature", 1.0)
    kl, logprob = lambda q, p, y: both_kl(q / T, p, y), lambda q, p, y: (log_softmax_at(q / T, y),)
    entropy = lambda q, p, y: ((q / T).logsumexp(-1) - ((q / T).softmax(-1) * q / T).sum(-1),)

    def mass(model, side, logprob=logprob):  # (N, wordings): the exact probability of every right answer
        logp = per_response(logprob, model, None, answers, cfg, side)
        return logp.exp().view(len(examples), -1)

    def shares(m):  # (kinds, wordings)
        m = torch.stack([m[torch.from_numpy(kinds == k)].sum(0) for k in sorted(set(kinds))])
        return m / m.sum(-1, keepdim=True).clamp(min=1e-30)

    from_teacher, teacher_shares = None, None
    if teacher is not None:
        from_teacher = labelled if cfg.kl_on == "references" else \
            sampled(teacher, examples, tokenizer, cfg, 1.0, seed, "teacher")
        teacher_shares = shares(mass(teacher, "teacher", lambda q, p, y: (log_softmax_at(q, y),))) if known else None

    def ruler(model):
        m, side = {}, "teacher" if model is teacher else "student"
        drawn, best = (sampled(model, examples, tokenizer, cfg, t, seed + 1, side) for t in (T, 0.0))
        if teacher is not None and from_teacher:
            m["kl_pq"], m["kl_qp"] = 0.0, 0.0
            if model is not teacher or T != 1:
                m["kl_pq"] = per_response(kl, model, teacher, from_teacher, cfg, side)[:, 0].mean().item()
                on = labelled if cfg.kl_on == "references" else drawn
                m["kl_qp"] = per_response(kl, model, teacher, on, cfg, side)[:, 1].mean().item()
        m["entropy"] = per_response(entropy, model, None, drawn, cfg, side).mean().item()
        if labelled:
            nll = -per_response(logprob, model, None, labelled, cfg, side).sum().item()
            m["ce"] = nll / sum(len(e.response) for e in labelled)
        for name, part in (("", drawn), ("_greedy", best)):
            texts = [t for t, has in zip(text(part), has_reference) if has]
            if texts:
                m["rouge_l" + name] = float(np.mean([rouge_l(c, r) for c, r in zip(texts, references)]))
                m["bleu" + name] = bleu(texts, references)
                right = float(np.mean([any(c.split() == x.split() for x in r) for c, r in zip(texts, references)]))
                m[("valid" if known else "exact_match") + name] = right
        if known:
            exact = mass(model, side)
            m["valid_mass"], mine = exact.sum(-1).mean().item(), shares(exact)
            if teacher_shares is not None:
                m["mode_distance"] = 0.5 * (mine - teacher_shares).abs().sum(-1).mean().item()
            m.update({f"mode_{i + 1}": x for i, x in enumerate(mine.mean(0).tolist())})
            m |= {f"valid_{k}": exact[torch.from_numpy(kinds == k)].sum(-1).mean().item() for k in sorted(set(kinds))}
        m["distinct_1"], m["distinct_2"] = distinct(text(drawn), 1), distinct(text(drawn), 2)
        m["length"] = float(np.mean([len(e.response) for e in drawn]))
        m["no_end"] = float(np.mean([e.response[-1] != tokenizer.eos_token_id for e in drawn]))
        return m
    return ruler


# ---------------------------------------------------------------------------------------------------------------
# Caches and the tiny world's directories (the world itself is assets/worlds.py)
# ---------------------------------------------------------------------------------------------------------------
def cache_dir():
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kd-of-language-models"
    path.mkdir(parents=True, exist_ok=True)
    return path


def resolve(name, role, data, world="worlds"):
    """The path behind a --teacher, --student or --data. "tiny" means the tiny world of --data tiny or tiny:N: its
    rows, its teacher, its student after supervised fine-tuning ("tiny-kl": after KL distillation too). `world` is
    the module in assets/ that makes it."""
    if not re.fullmatch(r"tiny(:\d+)?" if role == "data" else "tiny(-kl)?", name):
        return name
    if not re.fullmatch(r"tiny(:\d+)?", data):
        raise BadInput(f"--{role} {name} knows the words of the tiny world only: with --data {data}, "
                       "name your own --teacher and --student")
    part = "student" + name[4:] if role == "student" else role
    build = importlib.import_module(f"assets.{world}").build
    with zero_first():
        return str(build(int(data.partition(":")[2] or 0), cache_dir(), part) / part)


if __name__ == "__main__":
    from assets import worlds
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    if not re.fullmatch(r"tiny(:\d+)?", name):
        sys.exit(f"error: {name}: a tiny world is called tiny or tiny:N")
    worlds.show(worlds.build(int(name.partition(":")[2] or 0), cache_dir(), "student-kl"))
