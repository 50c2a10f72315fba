"""DPKD: as in direct preference optimization (DPO), prefer the teacher's response to the student's.

Li, Gu, Dong, Wang, Cheng, Wei, "Direct Preference Knowledge Distillation for Large Language
Models", 2024, arxiv.org/abs/2406.19774; code: https://github.com/microsoft/LMOps/tree/main/dpkd

p is the teacher, q the student, x a prompt. y^p is a response sampled by the teacher (paper: y_t),
y^q is one sampled by the student (paper: y_s). EOS, the end-of-sequence token, is part of both.
For a reward r, E_q[r(x,y)] - beta KL(q||p) is largest at q = p exp(r/beta) / Z(x); Z(x) normalises.
Solved for r: r(x,y) = beta log [q(y|x)/p(y|x)] + beta log Z(x) (Eqs. 2 to 5 of the paper). In
Bradley and Terry's model Pr(y^p beats y^q) is sigmoid(r(x,y^p) - r(x,y^q)), so Z(x) cancels:

    log_ratio(y) = log q(y|x) - log p(y|x)               a sum over the tokens of y
    margin       = beta log_ratio(y^p) - beta log_ratio(y^q)
    L            = -log sigmoid(margin)                                            Eqs. 7, 8
    --length-norm: log_ratio(y) is divided by the number of tokens of y            Eq. 9
    total        = cfg.preference L + cfg.anchor CE(y^p) + cfg.lm_coef CE(corpus)

The paper does not say when y^q is drawn. Fresh y^q (--refresh 1) cancel in the mean, because
E[grad log q(y^q|x)] = 0. So at small beta E[grad L] = -1/2 E[grad margin] = beta/2 grad KL(p||q):
SeqKD, more variance. Frozen y^q (--refresh 0): the margin grows, q may lose even right responses.

What differs from the paper:
 1. --length-norm is off: with it Z(x) does not cancel, so Eq. 9 does not follow from r(x,y) above.
 2. We chose beta and lm_coef. y^p is drawn once per prompt. The released code's anchor is off here.
 3. No dropout: log q must be computed from the same distribution that y^q was sampled from.
 4. The released code has another loss, on single tokens: see tests/controls/dpkd_token.py.

What to watch: `fresh_margin` on new responses; its mean, -beta [KL(p||q) + KL(q||p)], rises to 0. A
training `margin` far above 0 means that frozen pairs are overfitted, and `nll_student` explodes.

    python dpkd.py                               fresh student responses at every step
    python dpkd.py --refresh 0 --beta 0.1        frozen ones: the student collapses
    python dpkd.py --preference 0 --anchor 1     the anchor alone: SeqKD
    python dpkd.py --teacher gpt2-xl --student gpt2 --data my.jsonl --max-response 256 --lr 1e-5 \
        --corpus books.txt --lm-coef 0.5 --accum 8
"""
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common


@dataclass
class Config(common.Settings):
    refresh: int = 1                 # draw student responses every N steps; 0: once, all at step 0
    beta: float = 0.5                # strength of the KL to p; --length-norm needs a larger one
    length_norm: bool = False        # divide each log-ratio by the length of its response, Eq. 9
    preference: float = 1.0          # weight of L; at 0 no student responses are drawn for training
    anchor: float = 0.0              # weight of CE on the teacher's responses, mean over tokens
    lm_coef: float = 0.0             # weight of CE on --corpus, the paper's lambda
    corpus: str = ""                 # .txt (blank lines between documents), folder or hub name


# --- The method -----------------------------------------------------------------------------------
def preference_loss(logq_teacher, logp_teacher, logq_student, logp_student, n_teacher, n_student,
                    beta, length_norm):
    """L and the margin of each pair, Eq. 8, with length_norm Eq. 9. Six (B,) -> two (B,).

    logq_teacher is log q(y^p|x): q is the model, and `_teacher` says who wrote the response. So
    logp_student is log p(y^q|x). n_teacher and n_student are the lengths of y^p and y^q.
    """
    ratio_teacher = logq_teacher - logp_teacher  # (B,) above 0: y^p is likelier under q than p
    ratio_student = logq_student - logp_student  # (B,) the same of y^q
    if length_norm:
        ratio_teacher, ratio_student = ratio_teacher / n_teacher, ratio_student / n_student
    margin = beta * (ratio_teacher - ratio_student)
    return -F.logsigmoid(margin), margin  # log(sigmoid()) is -inf for margins of -100, which occur


def response_logprobs(model, batch):
    """(B,) log q(y|x) of whole responses, with EOS; differentiable. L needs all chunks at once, so
    the logits of all would stay in memory; above 256 MB backward() computes them again instead."""
    def logprobs_of(part, targets):
        return common.log_softmax_at(common.logits_of(model, part), targets)     # (r,)

    hidden = common.response_states(model, batch)                                # (R,H)
    call = logprobs_of
    if 4 * len(hidden) * model.vocab > 2**28:
        call = lambda *inputs: checkpoint(logprobs_of, *inputs, use_reentrant=False)
    logprobs = torch.cat([call(hidden[rows], batch.targets[rows])
                          for rows in common.chunk_slices(hidden, model)])       # (R,)
    return logprobs.new_zeros(len(batch.lengths)).index_add(0, batch.owner, logprobs)


def fixed_logprobs(model, examples, cfg):
    """log-probabilities of whole responses without gradient: (len(examples),) on the CPU."""
    return common.per_response(common.log_likelihood, model, examples, cfg)[:, 0].float()


# logged at a step: means over pairs (`ce`: over tokens); `same`: share of pairs with y^q = y^p
NAMES = ("loss", "preference", "margin", "nll_teacher", "nll_student", "ce", "same", "no_end")


class StudentResponses(dict):
    """{index of the example: (y^q, log p(y^q|x))}. Checkpoints hold it: the student that drew it
    has changed since, so it cannot be drawn again."""
    state_dict = dict.copy
    load_state_dict = dict.update


def draw_due(step, ids, drawn, examples, student, teacher, cfg):
    """If it is time, draw student responses into `drawn`: for the examples `ids` of this step, for
    those of the next N steps, or for all."""
    if cfg.refresh == 0:
        due = range(len(examples)) if step == 0 else ()
    elif cfg.refresh == 1:
        due = ids
    else:  # ids of all processes: process 0 draws for all, and its checkpoint holds all
        steps = range(step, step + cfg.refresh) if step % cfg.refresh == 0 else ()
        due = {i for s in steps for i in common.step_indices(len(examples), s, cfg, of_all=True)}
    if not due:
        return

    def draw():
        asked = [examples[i] for i in due]
        # not the seed of y^p: a student equal to its teacher would copy y^p
        seed = common.sample_seed(cfg.seed + 1, step)
        answered = common.respond(student, asked, cfg, seed=seed)
        logps = fixed_logprobs(teacher, answered, cfg).tolist()
        return {i: (e.response, logp) for i, e, logp in zip(due, answered, logps)}

    drawn.clear()
    drawn.update(draw() if cfg.refresh == 1 else common.from_process_0(draw))


def fresh_pairs(teacher, student, examples, cfg):
    """A function () -> metrics of pairs that are never trained on: the teacher's response is
    drawn once, the student's anew at every call."""
    seed = common.sample_seed(cfg.seed + 1, -1)
    by_teacher = common.respond(teacher, examples, cfg, seed=seed)
    logp_teacher = fixed_logprobs(teacher, by_teacher, cfg)
    lengths = lambda answered: torch.tensor([len(e.response) for e in answered])

    def evaluate():
        by_student = common.respond(student, examples, cfg, seed=seed - 1)
        logp_student = fixed_logprobs(teacher, by_student, cfg)
        logq_teacher = fixed_logprobs(student, by_teacher, cfg)
        logq_student = fixed_logprobs(student, by_student, cfg)
        _, margin = preference_loss(logq_teacher, logp_teacher, logq_student, logp_student,
                                    lengths(by_teacher), lengths(by_student), cfg.beta,
                                    cfg.length_norm)
        return {"fresh_margin": margin.mean().item(),
                "fresh_nll_teacher": -logq_teacher.mean().item(),
                "fresh_nll_student": -logq_student.mean().item()}

    return evaluate


# --- The loop -------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(cfg, refresh=(0, 10**9), beta=(1e-6, 1e6), preference=(0, 1e6),
                          anchor=(0, 1e6), lm_coef=(0, 1e6))
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: DPKD needs a teacher's responses: name a --teacher")
    if cfg.lm_coef > 0 and not cfg.corpus:
        raise common.BadInput(f"--lm-coef {cfg.lm_coef} needs a text: name one with --corpus")
    if cfg.preference == cfg.anchor == cfg.lm_coef == 0:
        raise common.BadInput("--preference, --anchor and --lm-coef are all 0: nothing is learned")
    run = common.Run(cfg, __file__)

    # data and models: the frozen teacher has the dtype of --dtype; the student's weights are fp32
    rows, device = common.load_rows(cfg), run.device
    student, teacher = common.load_pair(cfg, device)
    data = common.load_data(cfg, rows, student, teacher)
    tokenizer, corpus = student.tokenizer, []
    if cfg.lm_coef > 0:  # blocks of --max-response tokens; BOS or EOS stands before each
        corpus = common.pack(common.documents(cfg.corpus), tokenizer, cfg.max_response)
        before_text = common.around(tokenizer)[0] or [tokenizer.eos_token_id]
        if not len(corpus):
            raise common.BadInput(f"--corpus {cfg.corpus}: it has fewer tokens than --max-response "
                                  f"{cfg.max_response}")
    if cfg.steps:  # the teacher's response to every training prompt, and its log p, never change
        examples = common.teacher_responses(teacher, data.train, cfg)
        logp_of_teacher = fixed_logprobs(teacher, examples, cfg).to(device)
        evaluate_fresh = fresh_pairs(teacher, student, data.valid, cfg)

    evaluate = common.Evaluator(cfg, teacher, data.valid)
    evaluate_test = common.Evaluator(cfg, teacher, data.test)
    columns = {"teacher": evaluate_test(teacher)}
    columns["before"] = evaluate_test(student)  # before run.start, which may load trained weights

    # runs are short: beta_2 = 0.98 averages squared gradients over 50 steps, the default over 1000
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    drawn = StudentResponses()
    start = run.start(data.hash, student=student, optimizer=optimizer, drawn=drawn)
    common.no_dropout(student)
    student.train()

    for step in range(start, cfg.steps):
        if step % cfg.eval_every == 0:
            metrics = {**evaluate_fresh(), **evaluate(student)}
            run.evaluated(step, metrics, evaluate.generations)
        lr = common.set_lr(optimizer, step, cfg)

        ids = common.step_indices(len(examples), step, cfg)
        ids.sort(key=lambda i: len(examples[i].prompt) + len(examples[i].response))  # less padding
        if cfg.preference > 0:
            draw_due(step, ids, drawn, examples, student, teacher, cfg)
        texts = common.step_indices(len(corpus), step, cfg) if len(corpus) else []
        n_pairs, size = cfg.batch_size, len(ids) // cfg.accum
        n_tokens = common.all_reduce_sum(sum(len(examples[i].response) for i in ids))
        n_text = cfg.batch_size * cfg.max_response

        totals = dict.fromkeys(NAMES, torch.zeros((), device=device))
        for i in range(0, len(ids), size):
            part, loss, terms = ids[i:i + size], 0.0, {}
            by_teacher = common.collate([examples[i] for i in part], student)
            with common.precision(cfg, device):
                logq_teacher = response_logprobs(student, by_teacher)                    # (B,)
            if cfg.preference > 0:
                own = [replace(examples[i], response=drawn[i][0]) for i in part]
                by_student = common.collate(own, student)
                with common.precision(cfg, device):
                    logq_student = response_logprobs(student, by_student)                # (B,)
                logp_student = torch.tensor([drawn[i][1] for i in part], device=device)  # (B,)
                losses, margin = preference_loss(
                    logq_teacher, logp_of_teacher[part], logq_student, logp_student,
                    by_teacher.lengths, by_student.lengths, cfg.beta, cfg.length_norm)   # (B,)
                loss = cfg.preference * losses.sum() / n_pairs
                same = [e.response == examples[i].response for i, e in zip(part, own)]
                no_end = [e.response[-1] != student.tokenizer.eos_token_id for e in own]
                terms = {"preference": losses, "margin": margin, "nll_student": -logq_student,
                         "same": torch.tensor(same).float(), "no_end": torch.tensor(no_end).float()}
            if cfg.anchor > 0:
                loss = loss - cfg.anchor * logq_teacher.sum() / n_tokens
            if texts:
                blocks = [corpus[i].tolist() for i in texts[i:i + size]]
                text = [common.Example(before_text, before_text, block) for block in blocks]
                with common.precision(cfg, device):
                    logq_text = response_logprobs(student, common.collate(text, student))
                loss = loss - cfg.lm_coef * logq_text.sum() / n_text
            loss.backward()
            terms["nll_teacher"] = -logq_teacher
            for name, values in terms.items():
                totals[name] = totals[name] + values.detach().sum().to(device) / n_pairs
            totals["ce"] = totals["ce"] - logq_teacher.detach().sum() / n_tokens
            totals["loss"] = totals["loss"] + loss.detach()
        sums = torch.stack(list(totals.values()))
        common.reduce_gradients(student, sums)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            run.log(step, **dict(zip(NAMES, sums.tolist())), grad_norm=grad_norm.item(), lr=lr,
                    tokens=n_tokens)
        run.end_step(step + 1)

    columns["after"] = evaluate_test(student) if cfg.steps else columns["before"]
    return run.finish(student, columns, common.MEANINGS, evaluate_test.generations)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
