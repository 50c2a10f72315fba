"""Direct preference KD: learn to prefer the teacher's response to one's own, with a loss like DPO's.

Li, Gu, Dong, Wang, Cheng, Wei, "Direct Preference Knowledge Distillation for Large Language Models", 2024,
https://arxiv.org/abs/2406.19774; official code: https://github.com/microsoft/LMOps/tree/main/dpkd

p is the teacher, q the student, x a prompt. y^p is a response that the teacher sampled (the paper's y_t), y^q
one that the student sampled (its y_s); EOS, the end-of-sequence token, is part of both. Take any reward
r(x,y). The q that maximises E_q[r] - beta KL(q||p) is q*(y|x) = p(y|x) exp(r/beta) / Z(x), hence

    r = beta log q*(y|x)/p(y|x) + beta log Z(x)                                         Eqs. 2 to 5

Put this into the model of Bradley and Terry, Pr(y^p beats y^q) = sigmoid(r(y^p) - r(y^q)). Z(x) cancels:

    log_ratio(y) = log q(y|x) - log p(y|x)                    a sum over the tokens of y
    margin       = beta log_ratio(y^p) - beta log_ratio(y^q)
    L            = -log sigmoid(margin)                                                 Eqs. 7, 8
    --length-norm: log_ratio(y) is divided by the number of tokens of y                 Eq. 9
    total        = cfg.preference L + cfg.anchor CE(y^p) + cfg.lm_coef CE(corpus)       lm_coef: its lambda

In DPO the frozen start of the student stands where p stands here, and people made the labels.

When y^q is drawn decides everything, and the paper leaves it open. Fresh ones (--refresh 1) make E[margin] =
-beta [KL(p||q) + KL(q||p)], and for small beta the gradient is beta/2 times that of KL(p||q): SeqKD with more
variance. Frozen ones (--refresh 0), drawn from the starting student q_0, lead to q proportional to p
(p/q_0)^(1/beta): the student overshoots p and collapses.

What differs from the paper:
 1. No length normalisation by default: with it, Z(x) does not cancel, and Eq. 9 does not follow from Eq. 2.
 2. beta and lm_coef are ours, the paper gives none. y^p is drawn once for each prompt, at temperature 1.
 3. The corpus term is off until you name a --corpus. The anchor is from the released code; it is off, too.
 4. No dropout: log q must be that of the distribution from which y^q was sampled.
 5. The released code has another loss, on single tokens: tests/controls/dpkd_token.py.

What to watch: `fresh_margin`, on new pairs of validation prompts, rises to 0 as q nears p. A training `margin`
far above 0, or a `preference` far below log 2 = 0.69, is overfitting of old pairs: then `nll_teacher` and
`nll_student`, -log q of the two responses, explode. `same` is the share of pairs with equal responses.

    python dpkd.py                                              fresh student responses at every step
    python dpkd.py --refresh 0 --beta 0.1                       frozen ones: collapses
    python dpkd.py --preference 0 --anchor 1                    the anchor alone: SeqKD
    python dpkd.py --length-norm --beta 2                       Eq. 9
    python dpkd.py --teacher gpt2-xl --student gpt2 --data dolly.jsonl --corpus books.txt --lm-coef 0.5 \
        --lr 1e-5 --batch-size 32 --accum 4
"""
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    refresh: int = 1                 # student responses are drawn for so many steps; 0: once for the run
    beta: float = 0.5                # strength of the KL to the teacher; --length-norm needs a larger one
    length_norm: bool = False        # divide each log-ratio by the length of its response, as in Eq. 9
    preference: float = 1.0          # weight of L; at 0 no student responses are drawn
    anchor: float = 0.0              # weight of CE on the teacher's responses, mean over tokens
    lm_coef: float = 0.0             # weight of CE on --corpus, the paper's lambda
    corpus: str = ""                 # running text: .txt with blank lines between documents, folder, hub


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def preference_loss(logq_teacher, logp_teacher, logq_student, logp_student, n_teacher, n_student, beta,
                    length_norm):
    """L and the margin of each pair, Eq. 8, with length_norm Eq. 9. Six (B,) -> two (B,).

    logq_teacher is log q(y^p|x), the student's log-probability of the teacher's response; logp_student is
    log p(y^q|x), the teacher's of the student's response, and so on. n_teacher and n_student are lengths.
    """
    ratio_teacher = logq_teacher - logp_teacher  # (B,) above 0: y^p is likelier to the student than to the teacher
    ratio_student = logq_student - logp_student  # (B,) the same of y^q
    if length_norm:
        ratio_teacher, ratio_student = ratio_teacher / n_teacher, ratio_student / n_student
    margin = beta * (ratio_teacher - ratio_student)
    return -F.logsigmoid(margin), margin  # log(sigmoid()) would be -inf for margins of -100, which do occur


def fixed_logprobs(model, examples, cfg, role):
    """log-probabilities of whole responses without gradient: (len(examples),) on the CPU."""
    return common.per_response(common.log_likelihood, model, examples, cfg, role)[:, 0].float()


class StudentResponses(dict):
    """{index of the example: (response, log p of it)}. It is part of a checkpoint, since the weights that
    drew old responses are gone."""
    state_dict = dict.copy
    load_state_dict = dict.update


def draw_due(step, ids, drawn, examples, student, teacher, cfg):
    """Fill `drawn` if student responses are due: for the examples `ids` of this step, for those of the next N
    steps, or for the whole run."""
    if cfg.refresh == 0:
        due = range(len(examples)) if step == 0 else ()
    elif cfg.refresh == 1:
        due = ids
    else:  # of all processes: process 0 draws, because its responses are those that a checkpoint keeps
        steps = range(step, step + cfg.refresh) if step % cfg.refresh == 0 else ()
        due = sorted({i for s in steps for i in common.step_indices(len(examples), s, cfg, of_all=True)})
    if not due:
        return

    def draw():
        asked = [examples[i] for i in due]
        # not the seed of the teacher's responses: a student equal to its teacher would repeat them
        answered = common.respond(student, asked, cfg, seed=common.sample_seed(cfg.seed + 1, step))
        logps = fixed_logprobs(teacher, answered, cfg, "teacher").tolist()
        return {i: (e.response, logp) for i, e, logp in zip(due, answered, logps)}

    drawn.clear()
    drawn.update(draw() if cfg.refresh == 1 else common.from_process_0(draw))


def fresh_pairs(teacher, student, examples, cfg):
    """A function () -> metrics of pairs that nothing was trained on: the teacher's response is drawn once,
    the student's anew at every call."""
    by_teacher = common.respond(teacher, examples, cfg, seed=common.sample_seed(cfg.seed + 1, -1), role="teacher")
    logp_teacher = fixed_logprobs(teacher, by_teacher, cfg, "teacher")
    lengths = lambda answered: torch.tensor([len(e.response) for e in answered])

    def evaluate():
        by_student = common.respond(student, examples, cfg, seed=common.sample_seed(cfg.seed + 1, -2))
        logp_student = fixed_logprobs(teacher, by_student, cfg, "teacher")
        logq_teacher = fixed_logprobs(student, by_teacher, cfg, "student")
        logq_student = fixed_logprobs(student, by_student, cfg, "student")
        _, margin = preference_loss(logq_teacher, logp_teacher, logq_student, logp_student, lengths(by_teacher),
                                    lengths(by_student), cfg.beta, cfg.length_norm)
        return {"fresh_margin": margin.mean().item(), "fresh_nll_teacher": -logq_teacher.mean().item(),
                "fresh_nll_student": -logq_student.mean().item()}

    return evaluate


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(cfg, refresh=(0, 10**9), beta=(1e-6, 1e6), preference=(0, 1e6), anchor=(0, 1e6),
                          lm_coef=(0, 1e6))
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: the preference is for the teacher's response, so name a --teacher")
    if cfg.lm_coef > 0 and not cfg.corpus:
        raise common.BadInput(f"--lm-coef {cfg.lm_coef} needs a text: name one with --corpus, or leave it at 0")
    if cfg.preference == cfg.anchor == cfg.lm_coef == 0:
        raise common.BadInput("--preference, --anchor and --lm-coef are all 0: nothing to train on")
    run = common.Run(cfg, __file__)
    device = run.device

    # data and models: the teacher is frozen, in the compute dtype; the student's weights are fp32
    rows = common.load_rows(cfg)
    student, teacher = common.load_pair(cfg, device)
    data = common.load_data(cfg, rows, student, teacher)
    tokenizer, evaluate_fresh = student.tokenizer, None
    if cfg.steps:  # the teacher's response to every training prompt, and its log p, never change
        examples = common.teacher_responses(teacher, data.train, cfg)
        logp_of_teacher = fixed_logprobs(teacher, examples, cfg, "teacher").to(device)
        evaluate_fresh = fresh_pairs(teacher, student, data.valid, cfg)
    corpus, start_of_text = [], common.around(tokenizer)[0] or [tokenizer.eos_token_id]
    if cfg.lm_coef > 0:
        corpus = common.pack(common.documents(cfg.corpus), tokenizer, cfg.max_response)
        if not len(corpus):
            raise common.BadInput(f"--corpus {cfg.corpus}: fewer than --max-response {cfg.max_response} tokens")

    evaluate = common.Evaluator(cfg, teacher, data.valid)
    evaluate_test = common.Evaluator(cfg, teacher, data.test)
    before = evaluate_test(student)  # ahead of run.start, which may load a later student

    # beta_2 = 0.98 averages squared gradients over 50 steps instead of 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    drawn = StudentResponses()
    parts = {"student": student, "optimizer": optimizer, "drawn": drawn}  # what a checkpoint holds
    start = run.start(data.hash, **parts)
    common.no_dropout(student)
    student.train()

    for step in range(start, cfg.steps):
        if step % cfg.eval_every == 0:
            run.evaluated(step, {**evaluate_fresh(), **evaluate(student)}, evaluate.generations)
        lr = common.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        ids = common.step_indices(len(examples), step, cfg)
        ids.sort(key=lambda i: len(examples[i].prompt) + len(examples[i].response))  # less padding
        if cfg.preference > 0:
            draw_due(step, ids, drawn, examples, student, teacher, cfg)
        size = len(ids) // cfg.accum
        micro = [ids[i:i + size] for i in range(0, len(ids), size)]
        texts = [corpus[i].tolist() for i in common.step_indices(len(corpus), step, cfg)] if len(corpus) else []
        n_pairs = cfg.batch_size
        n_tokens = common.all_reduce_sum(sum(len(examples[i].response) for i in ids))
        n_text = common.all_reduce_sum(len(texts) * cfg.max_response)

        names = ("loss", "preference", "margin", "nll_teacher", "nll_student", "ce", "same", "no_end")
        totals = dict.fromkeys(names, torch.zeros((), device=device))
        for k, part in enumerate(micro):
            by_teacher = common.make_batch([examples[i] for i in part], student)
            with common.precision(cfg, device):
                logq_teacher = common.response_logprobs(student, by_teacher)             # (B,)
            terms = {"nll_teacher": -logq_teacher.sum() / n_pairs, "ce": -logq_teacher.sum() / n_tokens}
            loss = cfg.anchor * terms["ce"]
            if cfg.preference > 0:
                responses = [drawn[i][0] for i in part]
                by_student = common.make_batch(
                    [replace(examples[i], response=y) for i, y in zip(part, responses)], student)
                with common.precision(cfg, device):
                    logq_student = common.response_logprobs(student, by_student)         # (B,)
                logp_student = torch.tensor([drawn[i][1] for i in part], device=device)  # (B,)
                losses, margin = preference_loss(
                    logq_teacher, logp_of_teacher[part], logq_student, logp_student, by_teacher.lengths,
                    by_student.lengths, cfg.beta, cfg.length_norm)
                loss = loss + cfg.preference * losses.sum() / n_pairs
                same = sum(y == examples[i].response for i, y in zip(part, responses))
                no_end = sum(y[-1] != tokenizer.eos_token_id for y in responses)
                terms |= {"preference": losses.sum() / n_pairs, "margin": margin.sum() / n_pairs,
                          "nll_student": -logq_student.sum() / n_pairs,
                          "same": torch.tensor(same / n_pairs), "no_end": torch.tensor(no_end / n_pairs)}
            if texts:
                part_of_text = texts[k * size:(k + 1) * size]
                batch = common.make_batch([common.Example(start_of_text, start_of_text, t) for t in part_of_text],
                                          student)
                with common.precision(cfg, device):
                    loss = loss - cfg.lm_coef * common.response_logprobs(student, batch).sum() / n_text
            loss.backward()
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals[name] + value.detach()
        sums = torch.stack([x.to(device) for x in totals.values()])
        common.reduce_gradients(student, sums)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            run.log(step, **dict(zip(names, sums.tolist())), grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, **parts)

    rows = {"teacher": evaluate_test(teacher), "before": before}
    rows["after"] = evaluate_test(student) if cfg.steps else before
    return run.finish(student, rows, common.MEANINGS, evaluate_test.generations)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
