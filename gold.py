"""GOLD: an LLM writes the training data, steered by what the student finds strange.

Gholami, Akbari, Hu, Masrani, Wang, Zhang, "GOLD: Generalized Knowledge Distillation via
Out-of-Distribution-Guided Language Data Generation", Findings of NAACL 2024,
https://arxiv.org/abs/2403.19754; code: https://github.com/mgholamikn/GOLD. (A trainer of that name in
Hugging Face's TRL is another method.)

The LLM p is a black box that gives text only. A task comes as a description, K real samples and, for
classification, its labels. Round t asks for b training samples X_t, then for b samples V_t that are to be
different. Of V_t the strange ones, yet not the strangest, are the feedback F_t: the next round, if its
number is even, shows them to the LLM, so that it writes more like them.

    X_t = p(task + real samples + F_{t-1})                    F in even rounds only, in (2), too         (1)
    V_t = p(task + real samples + F_{t-1} + X_t[:2] + "different from all above")                        (2)
    E(x,y) = - mean_j log sum_v exp f_v(x, y_<j)              energy; f_v: the scorer's logit of token v (3)
    F_t = the samples of V_t with rank floor(.5 b) to floor(.8 b) - 1 by energy, counted from 0          (4)

For classification the label is drawn first and the LLM writes a text for it; else it writes text and answer
together. All of X_t and V_t go to the data set. The scorer f is a copy of the student, trained on what
there is every few rounds (up to round --retrain it is the student as given): its energy is high where it
has seen little. At the end a fresh student q learns y from x on the whole budget, by symmetric cross
entropy. Its second term is bounded, and its gradient goes with q_y: a label that the student finds
unlikely, as wrong ones are, gets hardly any of it.

    L = mean over response tokens of alpha (-log q_y) + beta (-log 1e-4) (1 - q_y)                       (5)

    q_y is the student's probability of the observed token. In the code X_t is `fresh`, V_t `strange`, F
    `feedback`, K the task's "shots", b cfg.round_size; alpha and beta are cfg's. The y_j include EOS. Ranks
    from .8 b on are left out as most likely noise.

What the LLM is sent for V_t in the task `rte`, shortened to one real sample; the others, F_{t-1} and
X_t[:2] follow as Sample 2, 3 and so on (the student learns "rte sentence1: .. sentence2: .." -> label):

    Each sample of this task has a Sentence1 and a Sentence2. The label is entailment if ...

    Sample 1:
    Label: not_entailment
    Sentence1: The bridge was closed in 1994.
    Sentence2: The bridge is open.

    Write one more sample of this task, new and complete, in the same form, and nothing after it.

and its answer is begun for it, up to the first thing that it is to write:

    Here is a new sample. Sentence2 follows from Sentence1. It is about another topic, from another domain,
    and very different from every sample above.

    Label: entailment
    Sentence1:

What differs from the paper, of which we know the abstract and the released code (which does not run as it
is):
 1. Energies and losses skip padding. The code pads every answer to 32 tokens and averages over all of them.
 2. The budget counts samples. The code's counting of files leaves half of the rounds unused.
 3. Samples that do not parse, and texts that occur in the valid or test rows, are asked for again until
    there are b. If the band of (4) has more than --feedback samples (2), its middle is fed back.
 4. One schedule for all tasks: V_t in every round. For answers the code makes V_t and F on even rounds
    only.
 5. In prompts the label stands before the text that it conditions. Real samples are drawn from the training
    split.
 6. AdamW, warm-up and a cosine for the final student; equations by a parser where the code calls Python's
    eval.

What to watch: `accuracy` on held-out real rows is what counts. `energy` has no zero, since a constant added
to all logits shifts it: compare within a round only. `asked` is how many texts the LLM had to write for
each one kept. In a tiny world the truth is known: `modes` (topics with 10 samples or more) and `tail_mass`
(share of samples on rare topics) should rise, `garbage` (share that is of no topic) should not. The final
loss says nothing.

    python gold.py                                          tiny reviews: OOD prompt and the energy band
    python gold.py --no-ood                                 Eq. 1 alone, no feedback (as ZeroGen does it)
    python gold.py --select random                          feed back any samples of V_t
    python gold.py --select top                             feed back the strangest: garbage comes with it
    python gold.py --alpha 1 --beta 0                       plain cross entropy for the final student
    python gold.py --task sums                              answers instead of labels
    python gold.py --task rte --teacher meta-llama/Llama-2-7b-chat-hf --student google-t5/t5-base \
        --lr 5e-5 --scorer-lr 5e-5 --batch-size 8 --retrain 25 --passes 1 --steps 18750 --max-prompt 128
"""
import copy
import json
import math
import random
import re
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import cross_entropy  # not as F, which is the feedback here

import common


@dataclass
class Config(common.Settings):
    # method
    teacher: str = "tiny"            # the LLM: model directory or hub name, chat or base; tiny: the world's
    task: str = "reviews"            # an entry of data/tasks.json, or a .json file of your own in that form
    data: str = "auto"               # real rows (shots, test); auto: the task's own
    budget: int = 3008               # samples to write and to train on, those of the OOD prompt included
    round_size: int = 8              # b: samples of one call of the LLM
    ood: bool = True                 # Eq. 2 in every round; --no-ood: Eq. 1 alone, and no feedback
    select: str = "band"             # what is fed back: band (Eq. 4), top (highest energies), random, none
    feedback: int = 2                # most samples fed back
    temperature: float = 0.6         # of the LLM's samples, as for chat models; low: rare topics get lost
    top_k: int = 10                  # the LLM samples among its k likeliest tokens; 0: all
    top_p: float = 0.9               # and among the fewest that hold this share; 1: all
    llm_prompt: int = 4096           # most tokens of a prompt to the LLM; what it may write: task's max_new
    retrain: int = 12                # rounds between trainings of the scorer; the paper's code: 25
    passes: int = 3                  # epochs of each of these over all samples so far; the paper's code: 1
    scorer_lr: float = 2e-3          # learning rate of the scorer, constant; 5e-5 for pretrained models
    alpha: float = 0.1               # weight of CE in Eq. 5; the code has 1, .1 and .01
    beta: float = 1.0                # weight of reverse CE; 0 leaves alpha CE
    max_response: int = 64           # tokens of the student's answer
    # optimization
    steps: int = 1000                # optimizer steps of the final student; 0: only the LLM writes
    batch_size: int = 32             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 5e-3                 # peak; right for the tiny world, 1e-5 to 5e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    eval_every: int = 250            # steps between evaluations on validation rows
    eval_rows: int = 800             # most test rows to evaluate on (validation: at most 200)

    # shared settings without effect here: setting one is an error
    unused = ("prompt_field", "response_field", "text_field", "teacher_template", "eval_temperature",
              "kl_on", "cache_gib")


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
# R: the response tokens of a micro-batch, one row each, response after response; V vocabulary, H hidden
# size. No row is a prompt token or padding, so no loss needs a mask.

# The words around the samples. {about}, and the {meaning} of a label, come from the task (data/tasks.json),
# which may also bring words of its own.
WRITE = {
    "prompt": "{about}\n\n{shots}Write one more sample of this task, new and complete, in the same form, "
              "and nothing after it.\n\n",
    "shot": "Sample {n}:\n{sample}\n\n",
    "plain": "Here is a new sample.{meaning}\n\n",
    "ood": "Here is a new sample.{meaning} It is about another topic, from another domain, and very "
           "different from every sample above.\n\n",
}
SOLVE = {  # for the LLM's own score, which the student is compared with
    "prompt": "{about}\n\n{shots}Give the {label_name} of the next sample, and nothing after it.\n\n",
    "shot": "Sample {n}:\n{sample}\n\n",
    "plain": "",
}


def build_prompt(task, wording, shots, given, opening="plain"):
    """What the LLM is asked, the beginning of its answer, and the template of what it is to go on with.

    wording: WRITE or SOLVE, parts of which a task may word otherwise. shots: the samples to show. given:
    what is known of the new sample, its label when a sample is written, its fields when one is solved.
    """
    form = wording | task["write" if wording is WRITE else "solve"]
    shown = "".join(form["shot"].format(n=i + 1, sample=form["sample"].format(**s))
                    for i, s in enumerate(shots))
    asked = form["prompt"].format(about=task["about"], shots=shown, label_name=task["label_name"])
    names = {f: f for f in task["fields"]}  # "{Sentence2} follows from .." -> "Sentence2 follows from .."
    meaning = task["labels"].get(given.get("label"), "").format(**names)
    begun = form[opening].format(meaning=f" {meaning}" if meaning else "")
    # where the LLM goes on: at the first slot of the sample that is not given
    first = next(slot.start() for slot in common.SLOT.finditer(form["sample"]) if slot[1] not in given)
    begun += form["sample"][:first].format(**given)
    return asked, begun.rstrip(" "), form["sample"][first:]


def energy(logits):
    """Eq. 3 of each row. Never a probability: softmax would cancel what is asked for. (R,V) -> (R,)."""
    return -logits.logsumexp(-1)


def select_feedback(energies, select, most, rng):
    """Eq. 4 or a control: indices of the samples to show the LLM. Ranks are relative to how many there
    are."""
    n = len(energies)
    order = sorted(range(n), key=lambda i: energies[i])  # ascending: familiar first
    if select == "random":
        return rng.sample(range(n), min(most, n))
    if select == "top":
        return order[max(0, n - most):]
    band = order[n * 5 // 10:n * 8 // 10] if select == "band" else []
    spare = max(0, len(band) - most)
    return band[spare // 2:spare // 2 + most]


def sce_loss(logits, targets, alpha, beta):
    """Eq. 5 of each row, and its CE. (R,V), (R,) -> two (R,).

    The reverse cross entropy is -sum_k q_k log(target_k). With a one-hot target whose zeros are set to 1e-4
    that is -log(1e-4) (1 - q_y) = 9.21 (1 - q_y).
    """
    ce = cross_entropy(logits, targets, reduction="none")  # (R,)
    reverse_ce = -math.log(1e-4) * (1 - (-ce).exp())         # (R,)
    return alpha * ce + beta * reverse_ce, ce


def pick_shots(task, rows, n, rng):
    """The K real samples of a whole run, each label as often as any other: of the first 10 n training rows,
    so that typical ones can be put there."""
    near = min(len(rows), 10 * n)
    chosen, order = [], rng.sample(range(near), near)
    for _ in range(min(n, near)):
        if task["labels"]:  # rarest label first; the sort is stable, so the draw decides among equals
            taken = [s["label"] for s in chosen]
            order.sort(key=lambda i: taken.count(rows[i]["sample"]["label"]))
        chosen.append(rows[order.pop(0)]["sample"])
    if len(chosen) < n:
        raise common.BadInput(f"task {task['name']}: {n} real samples are wanted in the prompt, the data "
                              f"has {len(chosen)}: add rows, or lower 'shots' of the task")
    return chosen


def write_samples(llm, task, shots, given, opening, call, held_out, cfg):
    """One sample for each of `given` (a label, or nothing), asked for again until it is well formed and its
    text is none of those held out for the test."""
    found, missing, tries, idle = [], list(given), 0, 0
    while missing:
        prompts = [build_prompt(task, WRITE, shots, g, opening) for g in missing]
        texts = llm([(asked, begun) for asked, begun, _ in prompts], [call, opening, tries],
                    temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
        again = []
        for text, g, (_, _, rest) in zip(texts, missing, prompts):
            sample = {**(common.parse_sample(text, rest, task["stop"]) or {}), **g}
            fine = common.well_formed(task, sample)
            fine = fine and common.student_row(task, sample)["prompt"] not in held_out
            if fine:
                found.append(sample)
            else:
                again.append(g)
        llm.asked += len(missing)
        llm.kept += len(missing) - len(again)
        tries += 1
        idle = idle + 1 if len(again) == len(missing) else 0
        missing = again
        if idle == 20:
            raise common.BadInput("not one text of the LLM could be used in 20 calls; it wrote "
                                  f"{texts[:3]}: see the task's prompt, lengths, check and max_new, and "
                                  f"{llm.file}")
    return found


def llm_answers(llm, task, shots, rows):
    """What the LLM itself answers, greedily, to rows of the task, with the same real samples in its
    prompt."""
    fields = [{f: r["sample"][f] for f in task["fields"]} for r in rows]
    prompts = [build_prompt(task, SOLVE, shots, given) for given in fields]
    texts = llm([(asked, begun) for asked, begun, _ in prompts], "answers")
    parsed = [common.parse_sample(t, rest, task["stop"]) for t, (_, _, rest) in zip(texts, prompts)]
    texts = [p["label"] if p else "" for p in parsed]
    plain = lambda text: re.sub(r"[\W_]+", " ", text.lower()).strip()  # "Not entailment." is not_entailment
    words = sorted(task["labels"], key=len, reverse=True)
    return [next((w for w in words if plain(t).startswith(plain(w))), t) for t in texts]


class Samples(list):
    """What was written so far: dicts of sample, round, opening, energy, and whether it is in F_t (fed)."""

    def state_dict(self):
        return {"all": list(self)}

    def load_state_dict(self, state):
        self[:] = state["all"]


# ----------------------------------------------------------------------------------------------------------
# The loops: first the LLM writes, then the student learns. `train`, then its steps
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg, select=["band", "top", "random", "none"], budget=(1, 10**9),
                          round_size=(1, 10**6), feedback=(1, 10**6), temperature=(0, 1e3),
                          top_k=(0, 10**9), top_p=(1e-9, 1), llm_prompt=(1, 10**9), retrain=(1, 10**9),
                          passes=(1, 10**6), scorer_lr=(0, 1e3), alpha=(0, 1e6), beta=(0, 1e6))
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device = run.device

    # task
    task = common.load_task(cfg.task)
    cfg = replace(cfg, data=task["data"] if cfg.data == "auto" else cfg.data)
    if not cfg.data:
        raise common.BadInput(f"--task {cfg.task} names no data set: give --data, for real samples and for "
                              "the test")

    # models: the teacher is frozen, in the compute dtype; the student keeps fp32 weights, cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device, same_tokens=False, world=task["world"])
    if teacher is None:
        raise common.BadInput("--teacher none: somebody has to write the samples, so name a --teacher")
    common.check_labels(task, tokenizer)
    scorer = copy.deepcopy(student)

    # data
    rows = common.load_rows(cfg, task["world"], common.sample_reader(task),
                            {task["train"]: "train", task["test"]: "test"})
    topics = common.load_topics(cfg, task["world"])
    encode = common.row_encoder(cfg, student, None, tokenizer)
    valid = [encode(r) for r in common.spread(rows["valid"], 200)]
    test = [encode(r) for r in common.spread(rows["test"], cfg.eval_rows)]
    held_out = {r["prompt"] for split in ("valid", "test") for r in rows[split]}
    real = pick_shots(task, rows["train"], task["shots"], random.Random(cfg.seed))
    llm_path = common.resolve(cfg.teacher, "teacher", cfg.data, task["world"])
    llm = common.LLM(teacher, common.load_tokenizer(llm_path, "teacher"), run.dir / "written.jsonl",
                     cfg.llm_prompt, task["max_new"], cfg.seed, cfg.compile)
    print(f"task {task['name']}: {len(real)} real samples in every prompt, {len(valid)} valid, "
          f"{len(test)} test rows")

    # ahead of run.start, which may load a later student from a checkpoint
    before = evaluate(student, test, task, tokenizer, cfg)

    # optimizers; beta_2 = 0.98 averages squared gradients over 50 steps, not 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    scorer_optimizer = torch.optim.AdamW(scorer.parameters(), lr=cfg.scorer_lr, betas=(0.9, 0.98),
                                         weight_decay=cfg.weight_decay, fused=True)
    samples = Samples()
    rounds = math.ceil(cfg.budget / (2 * cfg.round_size if cfg.ood else cfg.round_size))
    parts = dict(student=student, optimizer=optimizer, scorer=scorer, scorer_optimizer=scorer_optimizer,
                 samples=samples, llm=llm)  # what a checkpoint holds
    start = run.start(first=-rounds, **parts)  # rounds count up to 0, where the final student starts

    to_example = lambda sample: encode(common.student_row(task, sample))
    for step in range(start, 0):
        t = step + rounds
        rng = random.Random(f"{cfg.seed} {t}")  # what a round draws depends on seed and round alone
        if cfg.ood and t > 0 and t % cfg.retrain == 0:
            known = [to_example(s["sample"]) for s in samples]
            train_scorer(scorer, scorer_optimizer, known, rng, cfg, run)
        samples += write_round(t, rng, task, llm, real, samples, held_out, scorer, to_example, cfg)
        if t % cfg.log_every == 0 or t + 1 == rounds:
            new = [s for s in samples if s["round"] == t]
            strange = [s["energy"] for s in new if "energy" in s]
            energies = {"energy": float(np.mean(strange))} if strange else {}
            run.log(step, round=t, samples=len(samples), asked=llm.asked / max(1, llm.kept), **energies,
                    **common.coverage(samples, topics))
            run.print(f"      {[s['sample'] for s in new if s['fed']][:2] or [new[0]['sample']]}")
        run.end_step(step + 1, **parts)

    if common.processes()[0] == 0:  # the data set that was made, for people and other scripts
        flat = [{**s["sample"], **{k: v for k, v in s.items() if k != "sample"}} for s in samples]
        lines = "".join(json.dumps(s) + "\n" for s in flat)
        (run.dir / "samples.jsonl").write_text(lines, encoding="utf-8")
    examples = [to_example(s["sample"]) for s in samples[:cfg.budget]]
    train_student(student, optimizer, examples, valid, task, tokenizer, max(0, start), parts, cfg, run)

    asked = [e.row for e in test]
    report = {"teacher": common.task_metrics(task, llm_answers(llm, task, real, asked), asked)}
    after = {**evaluate(student, test, task, tokenizer, cfg), **common.coverage(samples, topics)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": after})


def evaluate(model, examples, task, tokenizer, cfg):
    """The task's metrics of a model's greedy answers."""
    answers = common.answer_examples(model, examples, tokenizer, cfg, temperature=0.0)
    texts = [tokenizer.decode(e.response, skip_special_tokens=True) for e in answers]
    return common.task_metrics(task, texts, [e.row for e in examples])


def write_round(t, rng, task, llm, real, samples, held_out, scorer, to_example, cfg):
    """Eqs. 1, 2 and 4: the samples of round t. Labels first, then texts."""
    words, b = list(task["labels"]), cfg.round_size
    feedback = [s["sample"] for s in samples if s["round"] == t - 1 and s["fed"]] if t % 2 == 0 else []
    labels = [[{"label": rng.choice(words)} if words else {} for _ in range(b)] for _ in range(2)]
    fresh = write_samples(llm, task, real + feedback, labels[0], "plain", t, held_out, cfg)
    new = [{"sample": s, "round": t, "opening": "plain", "fed": False} for s in fresh]
    if not cfg.ood:
        return new
    strange = write_samples(llm, task, real + feedback + fresh[:2], labels[1], "ood", t, held_out, cfg)
    energies = common.broadcast(energies_of(scorer, [to_example(s) for s in strange], cfg))
    chosen = select_feedback(energies, cfg.select, cfg.feedback, rng)
    return new + [{"sample": s, "round": t, "opening": "ood", "fed": i in chosen, "energy": e}
                  for i, (s, e) in enumerate(zip(strange, energies))]


def energies_of(scorer, examples, cfg):
    """Eq. 3: the mean over the tokens of each response."""
    row_values = lambda logits, _, targets: (energy(logits),)
    sums = common.per_response(row_values, scorer, None, examples, cfg)[:, 0]
    return [x / len(e.response) for x, e in zip(sums.tolist(), examples)]


def train_scorer(scorer, optimizer, examples, rng, cfg, run):
    """A few epochs of plain CE over everything so far; weights and optimizer go on from the last time.

    As in the paper's code the rate is constant and nothing is clipped. --accum does not apply.
    """
    dtype, scorer_fwd = common.compute_dtype(cfg, run.device), common.response_states(scorer)
    row_loss = lambda logits, _, targets: sce_loss(logits, targets, 1.0, 0.0)
    scorer.train()
    for _ in range(cfg.passes):
        order = rng.sample(range(len(examples)), len(examples))
        for i in range(0, len(examples), cfg.batch_size):
            chosen = [examples[j] for j in order[i:i + cfg.batch_size]]
            batch = common.collate(chosen, scorer).to(run.device)
            with torch.autocast(run.device.type, dtype, enabled=dtype != torch.float32):
                hidden = scorer_fwd(batch)  # (R,H)
            sums = common.rowwise_loss(row_loss, scorer, hidden, batch.targets)  # (2,) loss CE
            (sums[0] / len(batch.targets)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train_student(student, optimizer, examples, valid, task, tokenizer, start, parts, cfg, run):
    """The fresh student on everything that was written, by Eq. 5."""
    device, dtype = run.device, common.compute_dtype(cfg, run.device)
    batches = common.Batches(examples, student, None, cfg, device)
    student_fwd = common.response_states(student, cfg.compile)
    compiled_loss = common.try_compile(sce_loss) if cfg.compile else sce_loss
    row_loss = lambda logits, _, targets: compiled_loss(logits, targets, cfg.alpha, cfg.beta)
    student.train()

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.evaluated(step, evaluate(student, valid, task, tokenizer, cfg))
            common.show_samples(run, student, valid, tokenizer, cfg)
        if step == cfg.steps:
            break

        lr = common.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # one step over accum micro-batches: sums are divided once, by the tokens of the whole step
        micro = batches.at(step)
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        totals = 0.0
        for batch in micro:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)  # (R,H)
            sums = common.rowwise_loss(row_loss, student, student_hidden, batch.targets)  # (2,) loss CE
            (sums[0] / n_tokens).backward()
            totals = totals + sums.detach() / n_tokens
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, ce = totals.tolist()
            run.log(step, loss=loss, ce=ce, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, **parts)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
