"""Reinforcement learning with the teacher's logits as the reward: the student writes, the teacher scores.

Li, Hao, Mou, "LLMR: Knowledge Distillation with a Large Language Model-Induced Reward", LREC-COLING 2024,
https://arxiv.org/abs/2409.12500; code: https://github.com/MANGA-UOFA/Prompt-LLMR

To a prompt x the student q samples a response y = a_1 .. a_n, its end-of-sequence token (EOS) included.
Each token is an action, taken in the state s_t = (x, a_1 .. a_{t-1}). A language model that was trained on
good text knows which action is good. So the logits f(s,a) of the teacher p are read as action values, and
the reward is what Bellman's optimality equation then says it must be. (The equation numbers are ours.)

    Q(s,a) = f(s,a) - mean_a' f(s,a')                                         action value: centred f   (1)
    r_t    = Q(s_t,a_t) - V(s_{t+1}),  V(s) = max_a Q(s,a), V = 0 after EOS   the induced reward        (2)
    G_t    = r_t + r_{t+1} + ... + r_n                                        return-to-go              (3)
    rho_t  = q(a_t|s_t) / b(a_t|s_t)        b is the distribution that was sampled; 1 where that is q   (4)
    W_t    = stop_gradient[ rho_t (G_t - baseline_t) ]                                                  (5)
    L      = - (1/B) sum over the B responses of sum_t W_t log q(a_t|s_t)     REINFORCE                 (6)

    In the code f is `teacher_logits`, a_t `targets`, Q `action_value`, V `state_value`, r `reward`, G
    `returns`, b the `sampler`, rho `ratio`, W `weights`, B `n_responses`. --value chooses V: max, the mean
    under p, or logsumexp. p is the teacher and q the student; the paper writes q(s,a) for Q(s,a).

What it comes to: the rewards of a response add up to V(s_1) + sum_t A_t, with the advantage A_t = log
p(a_t|s_t) - max_a log p(a|s_t), which is never above 0. So the best student writes what the teacher would
write greedily: one answer to a prompt, and no entropy. With V = logsumexp the return G_1 is V(s_1) + log
p(y|x), which favours shorter responses; with the mean each token brings the teacher's entropy on top of
that, which favours longer ones.

What differs from the paper, of which we know the abstract and the released code (its settings are blank):
 1. A response that is cut at --max-response has no EOS. The release discards it. Here it counts, with V = 0
    behind its last token, too: it is granted V(s_{n+1}), what the best continuation would collect, which
    cancels the -V(s_{n+1}) of its last reward. Why it matters: p = softmax(f) fixes f only up
    to a constant c(s) for each state, and the mean in Eq. 1 is but one choice of it. Another choice adds
    c(s_t) to G_t: a baseline, without effect on the expected gradient, *if* all responses count and L is
    divided by a constant.
 2. L is divided by the number of responses; the release divides by the number of tokens sampled.
 3. On policy (--sync 1), at temperature 1, without truncation or dropout: the distribution that is sampled
    is the one that is improved. The release samples a copy of up to 5000 updates ago, cut to its top k.
 4. The release clips W, divides the returns, and has an "entropy" term: see tests/controls/llmr_release.py.
 5. AdamW, warm-up and a cosine instead of Adam at a constant rate; one template, not a mean over several.

What to watch: `advantage`, in nats, is sum_t A_t of a sampled response, mean over responses. It is the
objective, and rises towards 0. That shows that the optimizer works, no more: a student that answers briefly
to everything raises it too, so see `length`. `nll` of the sampled tokens estimates the student's entropy in
nats a token. It falls, and that alone lets `valid` at temperature 1 rise: so compare with a KL student at
--eval-temperature 0.3, and compare `valid_greedy`. The loss says nothing: G has no fixed zero, so L
may go either way. If `no_end`, the share of responses that were cut before EOS, is above a few per
cent, raise --max-response.

    python llmr.py                                        the tiny world, from its KL-distilled student
    python llmr.py --value lse                            soft values: log p(y|x) as the return
    python llmr.py --baseline value                       G_t - V(s_t), the advantage-to-go, as the weight
    python llmr.py --sync 50                              a stale sampler and its importance weights
    python llmr.py --teacher bigscience/T0_3B --student my-kl-student --data dailydialog.jsonl --lr 1e-5 \
        --batch-size 32 --accum 4 --teacher-template "The dialogue response of {prompt} is:"
    python llmr.py --teacher Qwen/Qwen2.5-1.5B --student my-kl-student --data my.jsonl --lr 1e-6 --accum 8
"""
import copy
import math
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    # method
    student: str = "tiny-kl"         # where to start: a converged KL student; tiny-kl: the tiny world's
    value: str = "max"               # V of a state: max (Bellman), mean (under the teacher), lse (soft)
    baseline: str = "none"           # subtracted from returns: none, value (V), mean (of the others)
    sync: int = 1                    # updates between refreshes of the sampler; 1: on policy, rho = 1
    # optimization
    steps: int = 600                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 1e-3                 # peak; right for the tiny world, 1e-6 to 1e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm

    unused = ("text_field", "cache_gib")  # shared settings without effect here: setting one is an error


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
# R: the response tokens of a micro-batch, one row each, response after response; V vocabulary, H hidden
# size, B responses, N tokens of the longest one.
def teacher_values(teacher_logits, targets, value):
    """Eq. 1 and V: Q of the token, V of its state, advantage A of the token. (R,V), (R,) -> three (R,)."""
    centred = teacher_logits - teacher_logits.mean(-1, keepdim=True)  # (R,V)
    action_value = centred.gather(-1, targets[:, None])[:, 0]         # (R,)
    greatest = centred.amax(-1)                                       # (R,)
    if value == "max":
        state_value = greatest
    elif value == "lse":
        state_value = centred.logsumexp(-1)
    else:
        state_value = (centred.softmax(-1) * centred).sum(-1)
    return action_value, state_value, action_value - greatest


def induced_reward(action_value, state_value, lengths):
    """Eq. 2. Q and V (B,N), lengths (B,) -> (B,N), 0 after the last token of a response."""
    at = torch.arange(action_value.shape[1], device=action_value.device)  # (N,)
    next_value = F.pad(state_value[:, 1:], (0, 1))                        # (B,N): V(s_2) .. V(s_N), 0
    next_value = next_value.masked_fill(at >= lengths[:, None] - 1, 0.0)  # behind the last token, see 1
    return (action_value - next_value).masked_fill(at >= lengths[:, None], 0.0)


def returns_to_go(reward):
    """Eq. 3: the sum of this reward and all later ones. (B,N) -> (B,N)."""
    return reward.flip(-1).cumsum(-1).flip(-1)


def return_baseline(returns, state_value, mask, baseline):
    """What to subtract from the returns (B,N): of states or other responses only, so it adds no bias."""
    if baseline == "value":  # with V = max, G_t - V(s_t) is the sum of the advantages from t on
        return state_value
    if baseline == "mean":  # of the *other* responses: a mean with the own return in it would add a bias
        own = (returns * mask).sum(-1, keepdim=True)  # (B,1) sum over the tokens of a response
        n = mask.sum(-1, keepdim=True)                # (B,1)
        all_own = common.all_reduce_sum(own.sum())    # of all processes
        all_n = common.all_reduce_sum(n.sum())
        of_others = (all_own - own) / (all_n - n).clamp(min=1)  # (B,1) mean over the tokens of the others
        return of_others.expand_as(returns)
    return torch.zeros_like(returns)


def policy_weights(gain, token_logprobs, sampler_logprobs):
    """Eqs. 4 and 5: W (R,), detached. gain is G - baseline; sampler_logprobs None: on policy, rho = 1."""
    if sampler_logprobs is None:
        return gain.detach()
    # only this token's ratio: an exact importance weight would be the product over the tokens before it too
    ratio = (token_logprobs - sampler_logprobs).exp()
    return (ratio * gain).detach()  # without detach the gradient of the ratio would count too


def policy_gradient_loss(token_logprobs, weights):
    """Eq. 6 before the division. (R,), (R,) -> sum. Descent makes tokens of positive weight more likely."""
    return -(weights * token_logprobs).sum()


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg, value=["max", "mean", "lse"], baseline=["none", "value", "mean"],
                          sync=(1, 10**9))
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen, in the compute dtype; the student keeps fp32 weights, cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)
    if teacher is None:
        raise common.BadInput("--teacher none: the reward is the teacher's, so name a --teacher")

    # data: with or without a response, only the prompts are used
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples, eos = data.train, tokenizer.eos_token_id

    # what is called in the loop: see kd_forward.py
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.response_states(teacher, cfg.compile)
    row_values = lambda teacher_logits, targets: teacher_values(teacher_logits, targets, cfg.value)
    sampler = student if cfg.sync == 1 else copy.deepcopy(student).requires_grad_(False)
    # --compile: every width of a batch is compiled anew, so batches are padded to one of three widths
    longest = max(max(len(e.prompt), len(e.teacher_prompt)) for e in examples) + cfg.max_response
    widths = [8 * math.ceil(longest * x / 8) for x in (0.5, 0.75, 1)] if cfg.compile else ()
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, data.valid)
    evaluate_test = common.make_evaluator(cfg, teacher, tokenizer, data.test)
    before = evaluate_test(student)  # ahead of run.start, which may load a later student from a checkpoint

    # optimizer; beta_2 = 0.98 averages squared gradients over 50 steps, not 1000: runs have a few hundred
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    parts = {"student": student, "optimizer": optimizer}  # what a checkpoint holds
    if cfg.sync > 1:
        parts["sampler"] = sampler
    start = run.start(**parts)
    student.eval()  # no dropout: what is sampled and what is improved are one distribution

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.evaluated(step, evaluate(student))
            common.show_samples(run, student, data.valid, tokenizer, cfg)
        if step == cfg.steps:
            break

        lr = common.lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the student answers the prompts of this step; the noise depends on seed and step alone
        if cfg.sync > 1 and step % cfg.sync == 0:
            sampler.load_state_dict(student.state_dict())
        asked = [examples[i] for i in common.step_indices(len(examples), step, cfg)]
        responses, sampler_logprobs = common.sample(
            sampler, [e.prompt for e in asked], cfg.max_response, seed=common.noise_seed(cfg.seed, step),
            eos=eos, compiled=cfg.compile, dtype=dtype)
        # sorted by length: less padding
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt) + len(responses[i]))
        answered = [replace(asked[i], response=responses[i]) for i in order]
        sampler_logprobs = [sampler_logprobs[i] for i in order]
        size = len(asked) // cfg.accum
        micro = [slice(i, i + size) for i in range(0, len(asked), size)]

        # the teacher scores them
        lengths = torch.tensor([len(e.response) for e in answered], device=device)      # (B,)
        ended = torch.tensor([e.response[-1] == eos for e in answered], device=device)  # (B,)
        values = []
        for part in micro:
            batch = common.collate(answered[part], teacher, "teacher", widths).to(device)
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                teacher_hidden = teacher_fwd(batch)  # (R,H)
            values.append(common.row_scalars(row_values, teacher, teacher_hidden, batch.targets))
        action_value, state_value, advantage = (  # (B,N) each
            common.pad_responses(torch.cat(v), lengths, int(lengths.max())) for v in zip(*values))
        if step % cfg.log_every == 0 and not ended.any():
            run.print(f"step {step}: none of the samples ends within --max-response {cfg.max_response}: "
                      "raise it")
        mask = torch.arange(action_value.shape[1], device=device) < lengths[:, None]  # (B,N)
        returns = returns_to_go(induced_reward(action_value, state_value, lengths))   # (B,N)
        gain = returns - return_baseline(returns, state_value, mask, cfg.baseline)    # (B,N)

        # one step over accum micro-batches: sums are divided once, by the responses of the whole step
        n_responses = cfg.batch_size
        n_tokens = common.all_reduce_sum(sum(len(e.response) for e in answered))
        totals = 0.0
        for part in micro:
            batch = common.collate(answered[part], student, "student", widths).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)  # (R,H)
            token_logprobs = common.token_logprobs(student, student_hidden, batch.targets)       # (R,)
            stale_logprobs = None if cfg.sync == 1 else torch.cat(sampler_logprobs[part]).to(device)
            # gain[mask] lists response after response: the order of the rows of the batch
            weights = policy_weights(gain[part][mask[part]], token_logprobs, stale_logprobs)     # (R,)
            loss = policy_gradient_loss(token_logprobs, weights) / n_responses
            loss.backward()
            totals = totals + torch.stack([loss.detach(), -token_logprobs.detach().sum() / n_tokens])
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, nll = totals.tolist()
            mean = lambda x: common.all_reduce_sum(x.sum().item()) / n_responses
            run.log(step, loss=loss, advantage=mean(advantage), length=n_tokens / n_responses,
                    no_end=mean(~ended), nll=nll, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, **parts)

    report = {"teacher": evaluate_test(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
