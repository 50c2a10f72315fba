"""Tasks in text: their table, prompts in and out of text, format filters, scores. A first reading may skip this file.

An entry of gold_tasks.json (or a JSON file of that form, the user's own) says which data set, which of its columns are
fields, what the labels are called and mean, and how a sample looks in a prompt. The same template prints a sample and
parses one. Entries without "labels" are text-to-text: the label is then a free text, the answer.
"""
import ast
import hashlib
import json
import operator
import os
import re
from pathlib import Path

import numpy as np

from assets.metrics import rouge_l
from assets.plumbing import BadInput
from assets.processes import from_zero, processes

FILE = Path(__file__).with_name("gold_tasks.json")
SLOT = re.compile(r"\{([^{}]+)\}")


# ---------------------------------------------------------------------------------------------------------------
# The table of tasks
# ---------------------------------------------------------------------------------------------------------------
def load_task(name):
    """An entry by name, or from a JSON file, with all defaults filled in and checked."""
    try:
        table = json.loads(FILE.read_text())
        if name.endswith(".json"):
            entry, where = json.loads(Path(name).read_text(encoding="utf-8-sig")), name
        elif name in table["tasks"]:
            entry, where = table["tasks"][name], f"task {name}"
        else:
            raise BadInput(f"--task {name}: no such entry; there are {', '.join(table['tasks'])}, or give a .json file")
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"--task {name}: cannot be read as JSON ({str(e)[:120]})") from None
    if not isinstance(entry, dict):
        raise BadInput(f"{where}: an object is wanted, with {', '.join(table['required'])}")
    for key, kind in {"about": str, "fields": dict, "label": str, "student": str}.items():
        if not isinstance(entry.get(key), kind) or not entry[key] and key != "about":
            raise BadInput(f"{where}: {key!r} is missing or no {'text' if kind is str else 'object'}; a task needs "
                           f"{', '.join(table['required'])}")
    if unknown := set(entry) - set(table["defaults"]) - {*table["required"], "labels"}:
        raise BadInput(f"{where}: unknown {', '.join(sorted(map(repr, unknown)))}; known: "
                       f"{', '.join([*table['required'], 'labels', *table['defaults']])}")
    for key, default in {**table["defaults"], "fields": {}, "labels": {}}.items():  # of the type of its default
        value, of = entry.get(key, default), type(default[0]) if isinstance(default, list) else str
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if type(value) is not type(default) or any(type(x) is not of for x in parts):
            raise BadInput(f"{where}: {key!r} is {str(value)[:40]!r}, of another type than "
                           f"{str(default)[:40] or 'text'!r}")
    task = {**table["defaults"], "labels": {}, **entry, "name": Path(name).stem}
    named = [f"{f}: {{{f}}}" for f in task["fields"]]
    label = f"{task['label_name']}: {{label}}"
    natural = {"write": [label, *named] if task["labels"] else [*named, label], "solve": [*named, label]}
    for mode, lines in natural.items():
        task[mode] = {"sample": "\n".join(lines), **table["defaults"][mode], **entry.get(mode, {})}
        slots = SLOT.findall(task[mode]["sample"])
        if sorted(slots) != sorted([*task["fields"], "label"]):
            raise BadInput(f"{where}: the sample of {mode!r} must hold each field and {{label}} once, "
                           f"it holds {', '.join(slots)}")
    for template in (task["student"], *task["labels"].values()):
        if other := set(SLOT.findall(template)) - set(task["fields"]):
            raise BadInput(f"{where}: {template!r} names {', '.join(sorted(other))}, which is no field")
    if task["check"] not in FILTERS or task["metric"] not in ("exact", "equation", "rouge_l"):
        raise BadInput(f"{where}: check is one of {', '.join(map(repr, FILTERS))}, metric of exact, equation, rouge_l")
    low, high, *more = [*task["lengths"], -1, -1]
    if len(more) != 2 or not 0 <= low <= high or not 0 <= task["shots"] < 10**6 or not 0 < task["max_new"] < 10**6:
        raise BadInput(f"{where}: lengths are two, the fewest and the most characters; shots is 0 or more, max_new 1 "
                       "or more")
    worlds = sorted({t.get("world", table["defaults"]["world"]) for t in table["tasks"].values()})
    if task["world"] not in worlds:  # the name of a module: nobody else's
        raise BadInput(f"{where}: world is one of {', '.join(worlds)}")
    return task


def row_reader(task):
    """A function (raw record, where, cfg) -> row: prompt and response of the student, the sample, all right answers."""
    def column(r, name, where):
        for part in name.split("."):
            if not isinstance(r, dict) or part not in r:
                raise BadInput(f"{where}: no field {name!r} (there: {', '.join(map(str, r))[:80] or 'nothing'}): "
                               "see 'fields' and 'label' of the task")
            r = r[part]
        return r

    def read(r, where, cfg):
        sample = {f: str(column(r, c, where)) for f, c in task["fields"].items()}
        label, words = column(r, task["label"], where), list(task["labels"])
        if words:
            label = int(label) if isinstance(label, str) and label.isdigit() and label not in words else label  # CSV
            if not (isinstance(label, int) and 0 <= label < len(words) or label in words):
                raise BadInput(f"{where}: unknown label {label!r}: the task has {', '.join(words)}, or numbers from 0")
            label = words[label] if isinstance(label, int) else label
        right = [str(x) for x in (label if isinstance(label, list) else [label])] or [""]
        sample["label"] = right[0]
        known = {k: r[k] for k in ("topic", "weight", "tail") if k in r}
        return {**student_row(task, sample), "references": right, **known}
    return read


def student_row(task, sample):
    """What the student reads and is to say, with the sample itself."""
    return {"prompt": task["student"].format(**sample), "response": sample["label"], "sample": sample}


def pick_shots(task, rows, n, rng):
    """n samples for the prompts of a whole run, the labels as even as they go: of the first 10 n training rows, so that
    typical ones can be put there."""
    near = min(len(rows), 10 * n)
    chosen, order = [], rng.sample(range(near), near)
    for _ in range(n):
        count = lambda i: sum(s["label"] == rows[i]["sample"]["label"] for s in chosen) if task["labels"] else 0
        order.sort(key=count)  # stable: the order of the draw decides among equals
        if order:
            chosen.append(rows[order.pop(0)]["sample"])
    if len(chosen) < n:
        raise BadInput(f"task {task['name']}: {n} real samples are wanted in the prompt, the data has {len(chosen)}: "
                       "add rows, or lower 'shots' of the task")
    return chosen


def check_labels(task, tokenizer):
    """Label words may be of several tokens, but the student's tokenizer must be able to tell and to write them."""
    spelled = {w: tuple(tokenizer(w, add_special_tokens=False).input_ids) for w in task["labels"]}
    for w, ids in spelled.items():
        if list(spelled.values()).count(ids) > 1 or tokenizer.decode(list(ids), skip_special_tokens=True).strip() != w:
            raise BadInput(f"task {task['name']}: the student's tokenizer writes the label {w!r} as "
                           f"{tokenizer.decode(list(ids))!r}: choose another word in 'labels'")


# ---------------------------------------------------------------------------------------------------------------
# Prompts to text, text to samples
# ---------------------------------------------------------------------------------------------------------------
def render(task, mode, shots, given, control="plain"):
    """(what the LLM is asked, the beginning of its answer, which it is made to go on from, the template of the rest)

    `given` holds what is known of the new sample: the label when a sample is written, the fields when one is solved.
    """
    form = task[mode]
    shown = "".join(form["shot"].format(n=i + 1, sample=form["sample"].format(**s)) for i, s in enumerate(shots))
    names = {f: f for f in task["fields"]}
    meaning = task["labels"].get(given.get("label"), "").format(**names)
    asked = form["prompt"].format(about=task["about"], shots=shown, label_name=task["label_name"])
    first = next(m.start() for m in SLOT.finditer(form["sample"]) if m[1] not in given)
    begun = form[control].format(meaning=f" {meaning}" if meaning else "") + form["sample"][:first].format(**given)
    return asked, begun.rstrip(" "), form["sample"][first:]


def parse(text, template, stop):
    """The LLM's text -> {slot: text} by the template's words between the slots, or None where they do not fit."""
    text = " " + text.strip()  # a completion that starts with a stop word is empty
    for word in stop:
        text = text.split(word)[0]
    pieces, pattern = SLOT.split(template), ""
    for i, piece in enumerate(pieces):
        pattern += r"\s*(\S.*?)\s*" if i % 2 else r"\s+".join(re.escape(w) for w in piece.split())
    match = re.fullmatch(pattern, text, re.S)
    return match and dict(zip(pieces[1::2], match.groups()))


class Writer:
    """The LLM: prompts in, texts out, in one batched call. What it wrote is kept in `file`, a line a call, as soon as
    it is there; a resumed run gets the same texts from the file instead of asking again."""

    def __init__(self, model, tokenizer, file, max_prompt, max_new, seed):
        import common
        self.model, self.tokenizer, self.file, self.max_new, self.seed = model, tokenizer, Path(file), max_new, seed
        template = "auto" if tokenizer.chat_template else "{prompt}"
        self.encode = common.prompt_encoder(tokenizer, template, model, 10**9)  # too long is an error, not cut
        context = getattr(model.config, "max_position_embeddings", None) or 10**9
        self.room = min(max_prompt, context - (0 if model.config.is_encoder_decoder else max_new))
        self.memory, self.asked, self.kept = None, 0, 0

    def tokens(self, asked, begun):
        """The user's turn through the chat template where there is one, then the beginning of the answer."""
        encdec = self.model.config.is_encoder_decoder
        ids = self.encode(asked + begun if encdec else asked)
        ids = ids if encdec else ids + self.tokenizer(begun, add_special_tokens=False).input_ids
        if len(ids) > self.room:
            raise BadInput(f"a prompt of {len(ids)} tokens does not fit: --llm-prompt and the LLM's context leave room "
                           f"for {self.room}; raise it, or shorten the task's 'about', 'shots' or 'max_new'")
        return ids

    def __call__(self, prompts, call, temperature=0.0, top_k=0, top_p=1.0):
        import common
        tokens = [self.tokens(*p) for p in prompts]
        if processes()[0] > 0:
            return from_zero(None)
        what = json.dumps([tokens, self.seed, call, temperature, top_k, top_p])
        key = hashlib.sha1(what.encode()).hexdigest()[:20]
        if self.memory is None:
            lines = self.file.read_text(encoding="utf-8").split("\n") if self.file.exists() else [""]
            self.memory = {r["key"]: r["texts"] for r in map(json.loads, lines[:-1])}
            if lines[-1]:  # a line without its end: a kill has torn it
                self.file.write_text("".join(x + "\n" for x in lines[:-1]), encoding="utf-8")
        if key not in self.memory:
            seed = int(hashlib.sha1(json.dumps([self.seed, call]).encode()).hexdigest()[:15], 16)
            responses, _ = common.sample(self.model, tokens, self.max_new, temperature, top_k=top_k, top_p=top_p,
                                         seed=seed, eos=self.tokenizer.eos_token_id, batch_size=64)
            texts = [self.tokenizer.decode(r, skip_special_tokens=True) for r in responses]
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(json.dumps({"call": call, "key": key, "texts": texts}) + "\n")
                f.flush()
                os.fsync(f.fileno())
            self.memory[key] = texts
        return from_zero(self.memory[key])

    def state_dict(self):
        return {"asked": self.asked, "kept": self.kept}

    def load_state_dict(self, state):
        self.asked, self.kept = state["asked"], state["kept"]

    def samples(self, task, shots, given, control, call, **decoding):
        """One sample for each of `given` (a label, or nothing): asked for again until it parses and is well formed."""
        found, missing, tries, idle = [], list(given), 0, 0
        while missing:
            prompts = [render(task, "write", shots, g, control) for g in missing]
            texts = self([p[:2] for p in prompts], [call, control, tries], **decoding)
            again = []
            for text, g, (_, _, rest) in zip(texts, missing, prompts):
                sample = {**(parse(text, rest, task["stop"]) or {}), **g}
                fine = len(sample) == len(task["fields"]) + 1 and well_formed(task, sample)
                found.append(sample) if fine else again.append(g)
            self.asked, self.kept = self.asked + len(missing), self.kept + len(missing) - len(again)
            missing, tries, idle = again, tries + 1, idle + 1 if len(again) == len(missing) else 0
            if idle == 20:
                raise BadInput(f"not one text of the LLM could be used in 20 calls; it wrote {texts[:3]}: see the "
                               f"task's prompt, lengths, check and max_new, and {self.file}")
        return found

    def answers(self, task, shots, rows):
        """What the LLM itself answers, greedily, to rows of the task, with the same shots in its prompt."""
        prompts = [render(task, "solve", shots, {f: r["sample"][f] for f in task["fields"]}) for r in rows]
        texts = [parse(t, p[2], task["stop"]) for t, p in zip(self([p[:2] for p in prompts], "answers"), prompts)]
        texts = [t["label"] if t else "" for t in texts]
        plain = lambda text: re.sub(r"[\W_]+", " ", text.lower()).strip()  # "Not entailment." is not_entailment
        words = sorted(task["labels"], key=len, reverse=True)
        return [next((w for w in words if plain(t).startswith(plain(w))), t) for t in texts]


class Pool:
    """The samples so far, as a checkpoint holds them: dicts of sample, round, control, energy, and whether fed back."""

    def __init__(self):
        self.all = []

    def state_dict(self):
        return {"all": self.all}

    def load_state_dict(self, state):
        self.all = state["all"]

    def write(self, file):
        """A line a sample: the data set that was made, for people and other scripts."""
        if processes()[0] == 0:
            flat = [{**s["sample"], **{k: v for k, v in s.items() if k != "sample"}} for s in self.all]
            Path(file).write_text("".join(json.dumps(s) + "\n" for s in flat), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Format filters and scores
# ---------------------------------------------------------------------------------------------------------------
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value_of(equation):
    """The value of an arithmetic expression of numbers, + - * / and parentheses, or None. Nothing is ever executed."""
    def walk(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        raise ValueError
    try:
        text = equation.split("=")[-1 if re.fullmatch(r"\s*[a-zA-Z]\s*", equation.split("=")[0]) else 0]  # x = 2 + 3
        return walk(ast.parse(text.strip(), mode="eval").body) if len(text) <= 200 else None
    except (ValueError, SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


FILTERS = {
    "": lambda sample: True,
    "substring": lambda sample: sample["label"] in next(iter(sample.values())),  # extractive: it stands in the context
    "equation": lambda sample: value_of(sample["label"]) is not None,
}


def well_formed(task, sample):
    """Would a sample be kept? By lengths in characters, and by the task's own check of the answer."""
    low, high = task["lengths"]
    texts = [sample[f] for f in task["fields"]]
    return bool(all(low <= len(t) <= high for t in texts) and sample["label"] and FILTERS[task["check"]](sample))


def score(task, text, row):
    """How right an answer is, 0 to 1: the words of a reference, the value of its equation, or ROUGE-L."""
    if task["metric"] == "rouge_l":
        return rouge_l(text, row["references"])
    if task["metric"] == "equation":
        value, right = value_of(text), value_of(row["references"][0])
        return float(value is not None and right is not None and abs(value - right) < 1e-6)
    return float(any(text.split() == r.split() for r in row["references"]))


def metrics(task, texts, rows):
    """accuracy: the mean score, by the task's own distribution; where rows know their topic also that with every topic
    as common as any other (uniform), and over rare topics only (tail)."""
    scores = np.array([score(task, t, r) for t, r in zip(texts, rows)])
    weights = np.array([r.get("weight", 1.0) for r in rows])
    m = {"rouge_l" if task["metric"] == "rouge_l" else "accuracy": float(scores @ weights / weights.sum())}
    if all("tail" in r for r in rows):
        tail = np.array([r["tail"] for r in rows])
        m["accuracy_uniform"] = float(scores.mean())
        if tail.any():
            m["accuracy_tail"] = float(scores[tail].mean())
    return m


def auroc(pairs):
    """The chance that a value of `high` exceeds one of `low`, over all [(high, low)]; None without any two values.
    Energies have no zero and drift while the scorer learns: they are compared inside their own round only."""
    wins = total = 0.0
    for high, low in pairs:
        high, low = np.array(high)[:, None], np.array(low)[None]
        wins, total = wins + (high > low).sum() + 0.5 * (high == low).sum(), total + high.size * low.size
    return float(wins / total) if total else None


def census(task, samples):
    """What was written, where the truth is known (a tiny world): {} for real tasks, and notes topics in the samples.

    modes: topics with at least 10 samples; tail_mass: share of the rare ones; garbage: share of what no topic can be
    read from; label_errors: wrong labels among the rest; auroc_*: does energy tell garbage (rare topics) from common
    ones of its round; garbage_ood, garbage_fed: share of garbage in what was to differ, and in what was fed back.
    """
    if not task["truth"]:
        return {}
    from assets import world2
    for s in samples:
        if "topic" not in s:
            topic, right = world2.judge(task["truth"], s["sample"]["text"], s["sample"]["label"])
            s["topic"], s["right"] = -1 if topic is None else topic, right
    topics = [s["topic"] for s in samples]
    good = [t for t in topics if t >= 0]
    strange = [s for s in samples if "energy" in s]
    energy = lambda r, kind: [s["energy"] for s in strange if s["round"] == r and kind(s["topic"])]
    above = lambda kind: auroc([(energy(r, kind), energy(r, lambda t: t >= 0 and t not in world2.TAIL))
                                for r in {s["round"] for s in strange}])
    found = {"modes": float(sum(topics.count(t) >= 10 for t in set(good))),
             "tail_mass": sum(t in world2.TAIL for t in good) / max(1, len(topics)),
             "garbage": topics.count(-1) / max(1, len(topics)),
             "label_errors": sum(not s["right"] for s in samples if s["topic"] >= 0) / max(1, len(good)),
             "auroc_garbage": above(lambda t: t < 0), "auroc_tail": above(lambda t: t in world2.TAIL),
             "garbage_ood": np.mean([s["topic"] < 0 for s in strange] or [np.nan]),
             "garbage_fed": np.mean([s["topic"] < 0 for s in strange if s["fed"]] or [np.nan])}
    return {k: float(v) for k, v in found.items() if v is not None and v == v}
