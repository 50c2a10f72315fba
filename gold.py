"""GOLD: an LLM writes the training data, steered by what the student finds strange.

Gholami, Akbari, Hu, Masrani, Wang, Zhang, "GOLD: Generalized Knowledge Distillation via
Out-of-Distribution-Guided Language Data Generation", NAACL 2024 Findings, arxiv.org/abs/2403.19754;
code: https://github.com/mgholamikn/GOLD. (A trainer of that name in TRL is another method.)

The LLM p is a black box that gives text only. A task brings a description, K real samples and, for
classification, labels. Round t asks for b training samples X_t. Then an "OOD prompt" (OOD: out of
distribution) asks for b different samples V_t. The feedback F_t are those of V_t with high, but not
the highest, energy. Each even round t shows F_{t-1} to the LLM. All X_t and V_t are the data set.

    X_t = p(task + real samples + F_{t-1})                                                      (1)
    V_t = p(task + real samples + F_{t-1} + X_t[:2] + "different from all above")               (2)
    E(x,y) = - mean_j log sum_v exp f_v(x, y_<j)    energy over tokens j of y; high: strange    (3)
    F_t = V_t sorted by rising energy, of it the slice [floor(.5 b) : floor(.8 b)]              (4)

The scorer f (f_v: its logit of token v) is a copy of the student, trained every few rounds. At the
end a fresh student q learns the label y from the text x. A label that q finds unlikely is often
wrong (the LLM's mistake), so the loss, the symmetric CE, has a small gradient for it:

    L = mean over response tokens, whose probability is q_y, of
        ce_weight (-log q_y) + reverse_ce_weight (-log 1e-4) (1 - q_y)      see sce_loss        (5)

    In the code: X_t = fresh, V_t = strange, F_{t-1} = feedback, K = shots, b = cfg.round_size. The
    paper's alpha and beta are ce_weight and reverse_ce_weight.

What differs from the paper (we know its abstract and the released code, which does not run as is):
 1. Energies and losses skip padding. The released code averages over 32 tokens, padding included.
 2. --budget counts samples. The released code writes two files a round and trains on half of them.
 3. A sample that does not parse, or has the text of a validation or test row, is written anew.
 4. V_t is asked for in every round and task. Prompts show the label before the text.

What to watch: `accuracy` on real test rows. Compare energies only within a round (samples.jsonl): a
constant on all logits shifts them. `asked`: texts per kept sample. `modes`: topics (10+ texts).

    python gold.py                              task reviews, with Eqs. 1 to 5
    python gold.py --no-ood                     Eq. 1 alone, without feedback
    python gold.py --select random              feed back any samples of V_t
    python gold.py --task rte --teacher meta-llama/Llama-2-7b-chat-hf --student google-t5/t5-base \
        --lr 5e-5 --scorer-lr 5e-5 --batch-size 8 --retrain 25 --passes 1 --max-prompt 128
"""
import ast
import copy
import json
import math
import operator
import random
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import TopKLogitsWarper, TopPLogitsWarper

import common


@dataclass
class Config(common.Settings):
    task: str = "reviews"            # an entry of data/tasks.json, or a .json file of that form
    data: str = ""                   # real rows for prompts and test; empty: the task's own
    budget: int = 3008               # samples to write and to train on
    round_size: int = 8              # b: samples of one call of the LLM
    ood: bool = True                 # Eq. 2 in every round; --no-ood: Eq. 1 alone, no feedback
    select: Literal["band", "top", "random", "none"] = "band"  # band: Eq. 4; others: to compare
    feedback: int = 2                # the largest number of samples fed back in a round
    temperature: float = 0.6         # of the LLM's samples; low: rare topics get lost
    top_k: int = 10                  # the LLM samples among its k likeliest tokens; 0: all
    top_p: float = 0.9               # and among the top ones that sum to this probability; 1: all
    retrain: int = 12                # rounds between trainings of the scorer; paper's code: 25
    passes: int = 3                  # epochs of scorer training; paper's code: 1
    scorer_lr: float = 2e-3          # constant rate of the scorer; for pretrained models 5e-5
    ce_weight: float = 0.1           # of the cross entropy in Eq. 5; paper's code: 1, .1 or .01
    reverse_ce_weight: float = 1.0   # of the reverse cross entropy
    steps: int = 1000                # optimizer steps of the student; 0: it does not learn
    batch_size: int = 32             # sequences of one optimizer step
    lr: float = 5e-3                 # peak; for pretrained models 1e-5 to 5e-5
    eval_every: int = 250            # steps between evaluations on validation rows
    eval_rows: int = 800             # test rows to evaluate on, at most; validation: at most 200

    unused = ("response", "teacher_template", "eval_temperature", "kl_on")


# --- The method -----------------------------------------------------------------------------------
def energy(logits):
    """Eq. 3 of each row. Heuristic: training tends to lower it on familiar text. (r,V) -> (r,)."""
    return -logits.logsumexp(-1)


def select_feedback(energies, select, most, rng):
    """Eq. 4 or a control: the indices of the samples that are fed back, at most `most`."""
    n = len(energies)
    order = sorted(range(n), key=lambda i: energies[i])  # familiar ones first
    if select == "random":
        return rng.sample(range(n), min(most, n))
    if select == "top":
        return order[max(0, n - most):]
    band = order[n * 5 // 10:n * 8 // 10] if select == "band" else []
    spare = max(0, len(band) - most)  # if the band is too wide, feed back its middle
    return band[spare // 2:spare // 2 + most]


def sce_loss(logits, targets, ce_weight, reverse_ce_weight):
    """Eq. 5 of each row, and its CE. (r,V), (r,) -> two (r,).

    The reverse cross entropy is -sum_k q_k log(target_k). The target is one-hot, with 1e-4 instead
    of 0. So it is -log(1e-4) (1 - q_y) = 9.21 (1 - q_y).
    """
    ce = F.cross_entropy(logits, targets, reduction="none")  # (r,)
    reverse_ce = -math.log(1e-4) * (1 - (-ce).exp())         # (r,)
    return ce_weight * ce + reverse_ce_weight * reverse_ce, ce


# --- Tasks: their table is data/tasks.json, which explains its entries ----------------------------
SLOT = re.compile(r"\{([^{}]+)\}")
TASK = {"data": "", "train": "train", "test": "test", "about": "", "fields": {}, "label": "",
        "labels": {}, "label_name": "Label", "student": "", "shots": 3, "max_new": 256,
        "lengths": [3, 2000], "check": "", "metric": "exact", "stop": ["\n\n", "\nSample "],
        "write": {}, "solve": {}}
# The words around the samples. A task may bring words of its own.
WRITE = {
    "prompt": "{about}\n\n{shots}Write one more sample of this task, new and complete, in the same "
              "form, and nothing after it.\n\n",
    "shot": "Sample {n}:\n{sample}\n\n",
    "plain": "Here is a new sample.{meaning}\n\n",
    "ood": "Here is a new sample.{meaning} It is about another topic, from another domain, and "
           "very different from every sample above.\n\n",
}
SOLVE = {  # for the LLM's own score, with which the student is compared
    "prompt": "{about}\n\n{shots}Give the {label_name} of the next sample, and nothing after it."
              "\n\n",
    "shot": "Sample {n}:\n{sample}\n\n",
    "plain": "",
}


def load_task(name):
    """An entry of data/tasks.json, or of a .json file, with all defaults filled in."""
    with common.blaming(f"--task {name}"):
        table = json.loads((common.HERE / "data/tasks.json").read_text())["tasks"]
        entry = json.loads(Path(name).read_text()) if name.endswith(".json") else table.get(name)
        if entry is None:
            raise ValueError(f"there are only {', '.join(table)}; or give a .json file")
        if unknown := set(entry) - set(TASK):
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}; a task has {', '.join(TASK)}")
        task = {**TASK, **entry, "name": Path(name).stem}
        label = f"{task['label_name']}: {{label}}"
        named = [f"{f}: {{{f}}}" for f in task["fields"]]
        # where there are labels, the label is written first
        forms = {"write": [label, *named] if task["labels"] else [*named, label],
                 "solve": [*named, label]}
        for mode, lines in forms.items():
            task[mode] = {"sample": "\n".join(lines), **task[mode]}
            if sorted(SLOT.findall(task[mode]["sample"])) != sorted([*task["fields"], "label"]):
                raise ValueError(f"the sample of {mode} must hold each field and {{label}} once")
        for text in (task["student"], *task["labels"].values()):
            text.format(**dict.fromkeys(task["fields"], ""))  # KeyError: a slot that is no field
        if not (task["fields"] and task["label"] and task["student"]):
            raise ValueError("a task needs fields, label and student")
    if task["data"] and (common.HERE / task["data"]).is_dir():
        task["data"] = str(common.HERE / task["data"])
    return task


def read_sample(row, where, task):
    """A row of the task's data -> what the student reads and should say, the sample, and every
    correct answer (references)."""
    def column(path):
        value = row
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                raise common.BadInput(f"{where}: there is no column {path} among {', '.join(row)}: "
                                      "see fields and label of the task")
            value = value[part]
        return value

    sample = {field: str(column(path)) for field, path in task["fields"].items()}
    label, words = column(task["label"]), list(task["labels"])
    if words and label not in words:
        if not str(label).isdigit() or int(label) >= len(words):
            raise common.BadInput(f"{where}: the label {label!r} is none of {', '.join(words)}")
        label = words[int(label)]  # a class number
    right = [str(x) for x in (label if isinstance(label, list) else [label])] or [""]
    known = {k: row[k] for k in ("weight", "tail") if k in row}
    return {**student_row(task, {**sample, "label": right[0]}), "references": right,
            "where": where, **known}


def student_row(task, sample):
    """What the student reads and what it should say."""
    prompt = task["student"].format(**sample)
    return {"prompt": prompt, "response": sample["label"], "references": [sample["label"]],
            "sample": sample, "columns": {"prompt": prompt}, "where": f"task {task['name']}"}


def build_prompt(task, wording, shots, given, opening="plain"):
    """What the LLM is asked, the beginning of its answer, and the template of the rest.

    wording: WRITE or SOLVE. shots: the samples to show. given: what is known of the new sample: its
    label (WRITE) or its fields (SOLVE).
    """
    form = wording | task["write" if wording is WRITE else "solve"]
    shown = "".join(form["shot"].format(n=n, sample=form["sample"].format(**shot))
                    for n, shot in enumerate(shots, 1))
    asked = form["prompt"].format(about=task["about"], shots=shown, label_name=task["label_name"])
    names = {f: f for f in task["fields"]}  # "{Hypothesis} is true" -> "Hypothesis is true"
    meaning = task["labels"].get(given.get("label"), "").format(**names)
    begun = form[opening].format(meaning=f" {meaning}" if meaning else "")
    # the LLM goes on at the first slot that is not given
    first = next(slot.start() for slot in SLOT.finditer(form["sample"]) if slot[1] not in given)
    begun += form["sample"][:first].format(**given)
    return asked, begun.rstrip(" "), form["sample"][first:]


def parse_sample(text, template, stop):
    """An LLM's text -> {slot: text}, by the words between slots; {} if they do not fit."""
    text = " " + text.strip()  # a stop string that begins with a space is found at the start, too
    for word in stop:
        text = text.split(word)[0]
    pieces, pattern = SLOT.split(template), ""
    for i, piece in enumerate(pieces):
        pattern += r"\s*(\S.*?)\s*" if i % 2 else r"\s+".join(re.escape(w) for w in piece.split())
    match = re.fullmatch(pattern, text, re.S)
    return dict(zip(pieces[1::2], match.groups())) if match else {}


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}


def value_of(equation):
    """The value of an expression of numbers, + - * / and parentheses, or None. No code is run."""
    def walk(node):
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        return float(node.value if type(node.value) in (int, float) else "")  # "" raises ValueError

    text = re.sub(r"^\s*[a-zA-Z]\s*=|=.*", "", equation[:200])  # "x = 2 + 3", "2 + 3 = 5": 2 + 3
    try:
        return walk(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, ArithmeticError):
        return None


def well_formed(task, sample):
    """Is a sample kept? Lengths are in characters; `check` tests the answer."""
    low, high = task["lengths"]
    if set(sample) != {*task["fields"], "label"}:
        return False
    if not all(low <= len(sample[f]) <= high for f in task["fields"]):
        return False
    if task["check"] == "substring":  # a span that is copied from the first field
        return sample["label"] in sample[next(iter(task["fields"]))]
    return task["check"] != "equation" or value_of(sample["label"]) is not None


def score(task, text, row):
    """How right an answer is, 0 to 1."""
    if task["metric"] == "rouge_l":
        return common.rouge_l(text, row["references"])
    if task["metric"] == "equation":
        values = [value_of(t) for t in (text, row["references"][0])]
        return float(None not in values and abs(values[0] - values[1]) < 1e-6)
    return float(common.same_words(text, row["references"]))


def task_metrics(task, texts, rows):
    """accuracy, or rouge_l: mean score, weighted by topic frequency if rows have topics (as many
    rows for each); then also unweighted (uniform) and on rare topics only (tail)."""
    scores = np.array([score(task, text, row) for text, row in zip(texts, rows)])
    weights = np.array([row.get("weight", 1.0) for row in rows])
    name = "rouge_l" if task["metric"] == "rouge_l" else "accuracy"
    m = {name: float(scores @ weights / weights.sum())}
    if all("tail" in row for row in rows):
        m["accuracy_uniform"] = float(scores.mean())
        m["accuracy_tail"] = float(scores[[row["tail"] for row in rows]].mean())
    return m


def coverage(samples, topics):
    """Counts of the samples' topics, which the patterns in topics.json find; {} without topics."""
    if not topics:
        return {}
    for s in samples:
        if "topic" not in s:
            text = " ".join(v for k, v in s["sample"].items() if k != "label")
            s["topic"] = next((t["topic"] for t in topics
                               if any(re.fullmatch(p, text) for p in t["patterns"])), None)
    found = [s["topic"] for s in samples if s["topic"]]
    rare = {t["topic"] for t in topics if t["tail"]}
    return {"modes": float(sum(found.count(t) >= 10 for t in set(found))),
            "tail_mass": sum(t in rare for t in found) / len(samples),
            "garbage": 1 - len(found) / len(samples)}


MEANINGS = {
    "accuracy": "share of right greedy answers; higher is better",
    "rouge_l": "ROUGE-L of greedy answers, 0 to 1; higher is better",
    "accuracy_uniform": "the same if all topics were equally frequent; higher is better",
    "accuracy_tail": "the same on rare topics; higher is better",
    "modes": "topics with 10 samples or more; higher is better",
    "tail_mass": "share of samples about rare topics; higher is better",
    "garbage": "share of samples about no topic; lower is better",
}


# --- The LLM --------------------------------------------------------------------------------------
class LLM:
    """A black box: prompts in, texts out, in one batched call. Every text is written to a file
    immediately, and a resumed run takes it from there instead of asking again."""

    def __init__(self, model, task, real, held_out, file, cfg):
        self.model, self.task, self.real, self.held_out = model, task, real, held_out
        self.cfg, self.file, self.asked, self.kept = cfg, file, 0, 0
        lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else [""]
        self.written = {r["key"]: r["texts"] for r in map(json.loads, lines[:-1])}
        if lines[-1] and common.processes()[0] == 0:  # a killed run left an incomplete last line
            common.write(file, "".join(line + "\n" for line in lines[:-1]))

    def tokens(self, asked, begun):
        """Token ids: the question, in the chat template if there is one, and the answer's start."""
        encdec, tokenizer = common.is_encdec(self.model), self.model.tokenizer
        asked = asked + begun if encdec else asked
        row = {"prompt": asked, "columns": {"prompt": asked}, "where": "the prompt of the LLM"}
        template = "auto" if tokenizer.chat_template else "{prompt}"
        ids = common.encode_prompts([row], template, self.model, 10**9)[0]
        if not encdec:
            ids = ids + tokenizer(begun, add_special_tokens=False).input_ids
        room = common.context_of(self.model) or 10**9
        room = room if encdec else room - self.task["max_new"]
        if len(ids) > room:
            raise common.BadInput(f"a prompt of {len(ids)} tokens does not fit the LLM, which has "
                                  f"room for {room}: lower shots or max_new, or shorten `about`")
        return ids

    def __call__(self, prompts, call, temperature=0.0, top_k=0, top_p=1.0):
        """[(asked, begun)] -> texts. The random numbers depend on `call`, the name of this call."""
        tokens = [self.tokens(asked, begun) for asked, begun in prompts]
        key = common.hash_of([tokens, self.cfg.seed, call, temperature, top_k, top_p])
        seed = int(common.hash_of([self.cfg.seed, call])[:15], 16)

        def ask():
            if key not in self.written:
                warpers = [TopKLogitsWarper(top_k or 10**9), TopPLogitsWarper(top_p)]
                responses = common.sample(self.model, tokens, self.task["max_new"], temperature,
                                          warpers, seed=seed, batch_size=64)
                self.written[key] = [self.model.tokenizer.decode(r, skip_special_tokens=True)
                                     for r in responses]
                line = json.dumps({"call": call, "key": key, "texts": self.written[key]})
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
            return self.written[key]

        return common.from_process_0(ask)

    def write(self, shots, given, opening, call):
        """One sample for each of `given` (a label, or nothing). It is asked for again until it is
        well formed and its text is not that of a validation or test row."""
        cfg, task, found, tries, idle = self.cfg, self.task, [], 0, 0
        missing = list(given)
        while missing:
            prompts = [build_prompt(task, WRITE, self.real + shots, g, opening) for g in missing]
            texts = self([(asked, begun) for asked, begun, _ in prompts], [call, opening, tries],
                         cfg.temperature, cfg.top_k, cfg.top_p)
            again = []
            for text, g, (_, _, rest) in zip(texts, missing, prompts):
                sample = {**parse_sample(text, rest, task["stop"]), **g}
                good = (well_formed(task, sample)
                        and student_row(task, sample)["prompt"] not in self.held_out)
                found.append(sample) if good else again.append(g)
            self.asked += len(missing)
            self.kept += len(missing) - len(again)
            tries += 1
            idle = idle + 1 if len(again) == len(missing) else 0
            missing = again
            if idle == 20:
                raise common.BadInput(
                    f"not one text of the LLM could be used in 20 calls; it wrote {texts[:3]}: see "
                    f"lengths, check, max_new and about of the task, and {self.file}")
        return found

    def answer(self, rows):
        """The LLM's own greedy answers to rows, with the same real samples in its prompt."""
        task = self.task
        prompts = [build_prompt(task, SOLVE, self.real, {f: r["sample"][f] for f in task["fields"]})
                   for r in rows]
        texts = self([(asked, begun) for asked, begun, _ in prompts], "answers")
        answers = [parse_sample(text, rest, task["stop"]).get("label", "")
                   for text, (_, _, rest) in zip(texts, prompts)]
        plain = lambda text: re.sub(r"[\W_]+", " ", text.lower()).strip()  # "Not_A." -> "not a"
        words = sorted(task["labels"], key=len, reverse=True)
        return [next((w for w in words if plain(a).startswith(plain(w))), a) for a in answers]


def pick_shots(task, rows, rng):
    """The K real samples of the whole run, each label as often as any other, from the first K * 10
    training rows, so the first rows of the data should be typical ones."""
    n, near = task["shots"], min(len(rows), 10 * task["shots"])
    order, chosen = rng.sample(range(near), near), []
    while order and len(chosen) < n:
        if task["labels"]:  # the label chosen least often so far; among equals the first drawn
            taken = [sample["label"] for sample in chosen]
            order.sort(key=lambda i: taken.count(rows[i]["sample"]["label"]))
        chosen.append(rows[order.pop(0)]["sample"])
    if len(chosen) < n:
        raise common.BadInput(f"task {task['name']}: {n} real samples are wanted, and the data has "
                              f"{len(chosen)}: add rows")
    return chosen


# --- Two phases: the LLM writes the data, then the student learns ---------------------------------
def write_data(llm, scorer, encode, topics, cfg, run):
    """Phase 1, Eqs. 1 to 4: the samples, as dicts of sample, round, opening, fed (is it in F_t) and
    energy. A run that stopped in phase 1 repeats it quickly: its texts are read from a file."""
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=cfg.scorer_lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    words, b, samples = list(llm.task["labels"]), cfg.round_size, []
    rounds = math.ceil(cfg.budget / (2 * b if cfg.ood else b))
    for t in range(rounds):
        rng = random.Random(f"{cfg.seed} {t}")  # a round's draws depend on seed and round alone
        if cfg.ood and t > 0 and t % cfg.retrain == 0:
            train_scorer(scorer, optimizer, encode(samples), rng, cfg, run)
        feedback = []
        if t % 2 == 0:
            feedback = [s["sample"] for s in samples if s["round"] == t - 1 and s["fed"]]
        labels = [[{"label": rng.choice(words)} if words else {} for _ in range(b)] for _ in "XV"]
        fresh = llm.write(feedback, labels[0], "plain", t)                                # Eq. 1
        new = [{"sample": s, "round": t, "opening": "plain", "fed": False} for s in fresh]
        if cfg.ood:
            strange = llm.write(feedback + fresh[:2], labels[1], "ood", t)                # Eq. 2
            strange = [{"sample": s, "round": t, "opening": "ood"} for s in strange]
            energies = energies_of(scorer, encode(strange), cfg)                          # Eq. 3
            chosen = select_feedback(energies, cfg.select, cfg.feedback, rng)             # Eq. 4
            for i, s in enumerate(strange):
                s |= {"fed": i in chosen, "energy": energies[i]}
            new += strange
        samples += new
        if t % cfg.log_every == 0 or t + 1 == rounds:
            mean = {"energy": float(np.mean(energies))} if cfg.ood else {}
            run.log(0, round=t, samples=len(samples), asked=llm.asked / llm.kept, **mean,
                    **coverage(samples, topics))
            print(f"      {[s['sample'] for s in new if s['fed']][:2] or [fresh[0]]}", flush=True)
        run.leave_if_asked(f"after round {t}")
    if common.processes()[0] == 0:  # the data set that was made, for people and other scripts
        flat = [{**s["sample"], **{k: v for k, v in s.items() if k != "sample"}} for s in samples]
        common.write(run.dir / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in flat))
    return samples


def energies_of(scorer, examples, cfg):
    """Eq. 3 of each sample, a mean over the tokens of its answer."""
    sums = common.per_response(lambda logits, *_: (energy(logits),), scorer, examples, cfg)[:, 0]
    means = [x / len(e.response) for x, e in zip(sums.tolist(), examples)]
    return common.from_process_0(lambda: means)  # all processes must feed back the same samples


def train_scorer(scorer, optimizer, examples, rng, cfg, run):
    """A few epochs of plain CE over everything so far. Weights and optimizer go on from the last
    time; as in the paper's code the rate is constant and nothing is clipped."""
    scorer.train()
    for _ in range(cfg.passes):
        order = rng.sample(range(len(examples)), len(examples))
        for i in range(0, len(examples), cfg.batch_size):
            batch = common.collate([examples[j] for j in order[i:i + cfg.batch_size]], scorer)
            with common.precision(cfg, run.device):
                hidden = common.response_states(scorer, batch)                            # (R,H)
            for rows, part in common.in_chunks(hidden, scorer):
                logits = common.logits_of(scorer, part)                                   # (r,V)
                ce = F.cross_entropy(logits, batch.targets[rows], reduction="sum")
                (ce / len(batch.targets)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train_student(student, optimizer, examples, evaluate, start, cfg, run):
    """Phase 2: the fresh student learns everything that was written, by Eq. 5."""
    if start == 0:  # so dropout does not depend on phase 1; a checkpoint restores the random state
        torch.manual_seed(cfg.seed + common.processes()[0])
    loss_of = torch.compile(sce_loss, dynamic=True) if cfg.compile else sce_loss
    student.train()

    for step in range(start, cfg.steps):
        if step % cfg.eval_every == 0:
            run.evaluated(step, evaluate())
        lr = common.set_lr(optimizer, step, cfg)

        chosen = [examples[i] for i in common.step_indices(len(examples), step, cfg)]
        micro = common.micro_batches(chosen, student, None, cfg)
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        totals = torch.zeros(2, device=run.device)
        for batch in micro:
            with common.precision(cfg, run.device):
                hidden = common.response_states(student, batch)                           # (R,H)
            # the logits of all R rows need too much memory; in_chunks collects the gradients
            for rows, part in common.in_chunks(hidden, student):
                logits = common.logits_of(student, part)                                  # (r,V)
                loss, ce = loss_of(logits, batch.targets[rows], cfg.ce_weight,
                                   cfg.reverse_ce_weight)
                (loss.sum() / n_tokens).backward()  # n_tokens counts the whole step
                totals += torch.stack([loss.detach().sum(), ce.detach().sum()])
        totals /= n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, ce = totals.tolist()
            run.log(step, loss=loss, ce=ce, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1)


def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(
        cfg, budget=(1, 10**9), round_size=(1, 10**6), feedback=(1, 10**6), temperature=(0, 1e3),
        top_k=(0, 10**9), top_p=(1e-9, 1), retrain=(1, 10**9), passes=(1, 10**6),
        scorer_lr=(0, 1e3), ce_weight=(0, 1e6), reverse_ce_weight=(0, 1e6))
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: somebody has to write the samples: name a --teacher")
    if cfg.template != "auto" and set(common.SLOT.findall(cfg.template)) != {"prompt"}:
        raise common.BadInput(f"--template {cfg.template}: it may name only {{prompt}}, which "
                              "the entry `student` of the task makes from the columns of the data")
    task = load_task(cfg.task)
    cfg = replace(cfg, data=cfg.data or task["data"])
    if not cfg.data:
        raise common.BadInput(f"--task {cfg.task} has no data of its own: name rows with --data")
    run = common.Run(cfg, __file__)

    # data and models: the LLM is the teacher, with the dtype of --dtype; the student's are fp32
    names = common.SPLITS | {task["train"]: "train", task["test"]: "test"}
    splits = {split: [read_sample(row, where, task) for where, row in rows]
              for split, rows in common.find_rows(cfg.data, names).items()}
    splits = common.hold_out(splits, replace(cfg, steps=1))  # steps=1: it then makes all 3 splits
    student, teacher = common.load_pair(cfg, run.device, same_tokens=False)
    common.check_context(student, cfg)
    scorer = copy.deepcopy(student)
    valid, test = (common.encode(common.spread(splits[split], most), student, None, cfg)
                   for split, most in (("valid", min(200, cfg.eval_rows)), ("test", cfg.eval_rows)))
    common.check_tokens(valid + test, student, None)
    held_out = {row["prompt"] for split in ("valid", "test") for row in splits[split]}
    print(f"data: {len(splits['train'])} training prompts, {task['shots']} of them shown to the "
          f"LLM; {len(valid)} validation, {len(test)} test rows", flush=True)
    file = Path(cfg.data, "topics.json")
    topics = json.loads(file.read_text()) if file.is_file() else []

    def encode(samples):
        rows = [student_row(task, s["sample"]) for s in samples]
        return common.encode(rows, student, None, cfg)

    def answers_of(examples, temperature=0.0):
        answered = common.respond(student, examples, cfg, temperature)
        return [student.tokenizer.decode(e.response, skip_special_tokens=True) for e in answered]

    def evaluate(examples=valid):
        return task_metrics(task, answers_of(examples), [e.row for e in examples])

    before = evaluate(test)  # before run.start, which may load trained weights
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    data = [[row["prompt"], row["references"]] for part in splits.values() for row in part]
    start = run.start(common.hash_of(data), student=student, optimizer=optimizer)
    real = pick_shots(task, splits["train"], random.Random(cfg.seed))
    llm = LLM(teacher, task, real, held_out, run.dir / "written.jsonl", cfg)
    if start == 0:
        samples = write_data(llm, scorer, encode, topics, cfg, run)
    else:
        keys = (*task["fields"], "label")
        lines = (run.dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        samples = [{**s, "sample": {k: s[k] for k in keys}} for s in map(json.loads, lines)]
    train_student(student, optimizer, encode(samples[:cfg.budget]), evaluate, start, cfg, run)

    rows, answers = [e.row for e in test], answers_of(test)
    generations = [{"prompt": row["prompt"], "greedy": answer, "sample": drawn,
                    "references": row["references"]}
                   for row, answer, drawn in zip(rows, answers, answers_of(test, 1.0))]
    columns = {"teacher": task_metrics(task, llm.answer(rows), rows), "before": before,
               "after": {**task_metrics(task, answers, rows), **coverage(samples, topics)}}
    return run.finish(student, columns, MEANINGS, generations)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
