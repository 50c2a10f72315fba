"""Excess error: how much of a student's divergence from the teacher comes from prefixes of its own making.

    python tests/evidence/results.py --rows llmr kl-more seqkd-more llmr-mid kl-mid seqkd-mid llmr-mean llmr-lse
    python tests/evidence/excess.py      reads those students in out/results, writes assets/excess.json for figures.py
    python tests/evidence/excess.py TEACHER DATA STUDENT...     prints the same for your own models, on 500 test rows

Arora et al. 2022, "Why Exposure Bias Matters", https://arxiv.org/abs/2204.01171, with teacher samples for the expert.
d(h) = KL(p(.|h) || q(.|h)) at a prefix h, p the teacher; an average runs over the responses that reach place t:

    R(l)        = sum_{t<=l} mean of d over prefixes sampled from the student q
    l eps(l)    = sum_{t<=l} mean of d over prefixes sampled from the teacher p
    ExAccErr(l) = 100 (R(l) - l eps(l)) / (l eps(l))  %

A ratio: a student that leaves out what the teacher says has a large eps, and so a small ExAccErr, however large R is.
The file also holds how long the students' responses are, and the induced reward of a good and of a corrupted response.
"""
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch

import common
import llmr

FILE = ROOT / "assets/excess.json"
ROWS = ["kl-more", "seqkd-more", "llmr", "kl-mid", "seqkd-mid", "llmr-mid", "llmr-mean", "llmr-lse"]
SEEDS, DRAWS, CPU = range(10, 15), 4, torch.device("cpu")


def accumulated(d, lengths, weights=None):
    """(N,L) divergences by place, (N,) lengths -> (L,): sum over t <= l of the mean at t of the responses that reach t.

    `weights` (N,) are their probabilities, where responses are enumerated and not sampled."""
    reached = (torch.arange(d.shape[1]) < lengths[:, None]).double()  # (N,L)
    reached = reached if weights is None else reached * weights[:, None]
    return ((d * reached).sum(0) / reached.sum(0)).cumsum(0)


def excess(R, leps):
    """ExAccErr in per cent."""
    return 100 * (R - leps) / leps


@torch.no_grad()
def divergences(student, teacher, examples, batch_size=256):
    """KL(p||q) at every token of the responses: (N,L), 0 beyond the end, and lengths (N,)."""
    lengths, pieces = torch.tensor([len(e.response) for e in examples]), []
    states, teacher_states = common.response_states(student), common.response_states(teacher)
    for i in range(0, len(examples), batch_size):
        part = examples[i:i + batch_size]
        batch, theirs = common.collate(part, student), common.collate(part, teacher, "teacher")
        q, p = states(batch), teacher_states(theirs)  # (R,H)
        pieces += [common.both_kl(common.head_logits(student, q[rows]), common.head_logits(teacher, p[rows]), None)[0]
                   for rows in common.chunks(len(q), student.vocab, CPU)]
    return common.pad_responses(torch.cat(pieces).double(), lengths, int(lengths.max())), lengths


def analyse(cfg, draws=DRAWS, least=0.05):
    """R and l eps of cfg.student, as lists over l as long as a share `least` of both kinds of responses is; lengths."""
    student, teacher, tokenizer = common.load_pair(cfg, CPU)
    test = common.load_data(cfg, student, teacher, tokenizer).test
    curves, counts = {}, {}
    for name, model, role in (("R", student, "student"), ("leps", teacher, "teacher")):
        drawn = [e for k in range(draws) for e in common.answer_examples(model, test, tokenizer, cfg, seed=100 + k, role=role)]
        d, lengths = divergences(student, teacher, drawn)
        enough = int((lengths[:, None] > torch.arange(d.shape[1])).double().mean(0).ge(least).sum())
        curves[name], counts[role] = accumulated(d, lengths)[:enough].tolist(), Counter(lengths.tolist())
    n = min(map(len, curves.values()))
    return {k: [round(x, 4) for x in v[:n]] for k, v in curves.items()}, counts


@torch.no_grad()
def rewards(cfg):
    """The induced reward and the advantage of every token: of the teacher's greedy response to a prompt, and of the
    same with one word exchanged."""
    student, teacher, tokenizer = common.load_pair(cfg, CPU)
    prompts = common.load_data(cfg, student, teacher, tokenizer).test
    e = next(e for e in prompts if e.row["prompt"].startswith("recap"))
    good = common.answer_examples(teacher, [e], tokenizer, cfg, temperature=0.0, role="teacher")[0]
    names = tokenizer.convert_ids_to_tokens(good.response)
    wrong = tokenizer.convert_tokens_to_ids("paris" if "paris" not in names else "oslo")
    at = next(i for i, x in enumerate(names) if x == "in" or x == "to") + 1  # the place that the miner went to
    bad = replace(good, response=good.response[:at] + [wrong] + good.response[at + 1:])
    out = {"prompt": e.row["prompt"], "responses": []}
    for x in (good, bad):
        batch = common.collate([x], teacher, "teacher")
        hidden = common.response_states(teacher)(batch)
        q, v, a = common.row_scalars(lambda p, y: llmr.teacher_values(p, y, "max"), teacher, hidden, batch.targets)
        reward = llmr.induced_reward(q[None], v[None], torch.tensor([len(x.response)]))[0]
        r4 = lambda t: [round(z, 3) for z in t.tolist()]
        out["responses"].append({"tokens": tokenizer.convert_ids_to_tokens(x.response), "reward": r4(reward),
                                 "advantage": r4(a), "value": r4(v)})
    return out


def main(*own):
    base = llmr.Config(device="cpu", compile=False)
    if own:
        teacher, data, *students = own
        for student in students:
            cfg = replace(base, teacher=teacher, data=data, student=student, max_prompt=64, max_response=48)
            found, _ = analyse(cfg, draws=1)
            for i in range(4, len(found["R"]), 5):
                R, leps = found["R"][i], found["leps"][i]
                print(f"{student}  l {i + 1:3d}  R {R:8.3f}  l eps {leps:8.3f}  ExAccErr {excess(R, leps):8.1f} %")
        return
    # of a row that is not in out/results, what the file has stays
    out = json.loads(FILE.read_text()) if FILE.exists() else {"excess": {}, "lengths": {}}
    out["rewards"] = rewards(replace(base, data="tiny:10"))
    for row in ROWS:
        for seed in SEEDS:
            student = ROOT / f"out/results/{row}-{seed}/student"
            if student.exists():
                found, counts = analyse(replace(base, data=f"tiny:{seed}", student=str(student)))
                out["excess"].setdefault(row, {})[str(seed)] = found
                for who, count in ((row, counts["student"]), ("teacher", counts["teacher"])):
                    out["lengths"].setdefault(who, {})[str(seed)] = {str(n): count[n] for n in sorted(count)}
                print(row, seed, {k: v[-1] for k, v in found.items()}, flush=True)
                FILE.write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
