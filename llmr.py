"""Reinforcement learning with the teacher's logits as the reward: the student writes, the teacher scores.

Li, Hao, Mou, "LLMR: Knowledge Distillation with a Large Language Model-Induced Reward", LREC-COLING 2024,
https://arxiv.org/abs/2409.12500; code: https://github.com/MANGA-UOFA/Prompt-LLMR

To a prompt x the student q samples a response y = a_1 .. a_n, its end-of-sequence token included. Each token is an
action, taken in the state s_t = (x, a_1 .. a_{t-1}). A language model that was trained on good text knows which
action is good. So the logits f(s,a) of the teacher p are read as action values, and the reward is what Bellman's
optimality equation then says it must be. (The equation numbers are ours.)

    Q(s,a)  = f(s,a) - mean_a' f(s,a')                                         action value: centred logits      (1)
    r_t     = Q(s_t,a_t) - V(s_{t+1}),  V(s) = max_a Q(s,a),  V = 0 after EOS  the induced reward                (2)
    G_t     = r_t + r_{t+1} + ... + r_n                                        return-to-go                      (3)
    rho_t   = q(a_t|s_t) / b(a_t|s_t)       b is the distribution that was sampled; 1 where that is q itself     (4)
    W_t     = stop_gradient[ rho_t (G_t - baseline_t) ]                                                          (5)
    L       = - (1/B) sum over the B responses of sum_t W_t log q(a_t|s_t)     REINFORCE                         (6)

    In the code Q is `action_value`, V `state_value`, G `returns`, rho_t `ratio`, W `weights`. --value chooses V: max,
    or the mean under p, or logsumexp. p is the teacher and q the student; the paper writes q(s,a) for Q(s,a).

What it comes to: the rewards of a response add up to V(s_1) + sum_t A_t, with the advantage A_t = log p(a_t|s_t) -
max_a log p(a|s_t), which is never above 0. So the best student writes what the teacher would write greedily: one
answer to a prompt, and no entropy. With V = logsumexp the return is log p(y|x), which favours shorter responses; with
the mean it adds the teacher's entropy at each token, which favours longer ones.

What differs from the paper, of which we know the abstract and the released code (that leaves its settings blank):
 1. A response may be cut at --max-response, before its EOS. The release discards it. Here it counts, and is granted
    V(s_{n+1}), what the best continuation would collect; so the -V(s_{n+1}) of its last reward cancels, and V = 0
    behind the last token of every response. That matters: logits are known only up to a constant c(s) for each
    state. In G_t it cancels but for c(s_t), a mere baseline, *if* all responses count and L is divided by a constant.
 2. L is divided by the number of responses; the release divides by the number of tokens sampled.
 3. On policy (--sync 1), at temperature 1, without truncation or dropout: the distribution that is sampled is the one
    that is improved. The release samples a copy of up to 5000 updates ago among its 2 likeliest tokens.
 4. The release's clipping of W, division of returns, and "entropy" term are in tests/controls/llmr_release.py.
 5. AdamW, warm-up and a cosine instead of Adam at a constant rate; one template, not an average over several.

What to watch: `advantage` is the objective, sum_t A_t of a response: it rises towards 0. That shows that the optimizer
works, no more: where the teacher is unsure, a student that answers "Yes ." to everybody gets far; see `length`. `nll`,
of the sampled tokens, estimates the student's entropy in nats a token. It falls, and `valid` at temperature 1 rises
with that alone: so compare a KL student at --eval-temperature 0.3, and compare `valid_greedy`. The loss means nothing:
G is not centred, so L may go either way. A `truncated` above a few per cent wants a larger --max-response.

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
    value: str = "max"               # V of a state: max (Bellman optimality), mean (under the teacher), lse (logsumexp)
    baseline: str = "none"           # subtracted from the returns: none, value (V of the state), mean (of the others)
    sync: int = 1                    # updates between refreshes of the sampler; 1: on policy, no importance weights
    # optimization
    steps: int = 300                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-4                 # peak; right for the tiny world, 1e-6 to 1e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm

    unused = ("text_field", "cache_gib")


# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------
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
    """Eq. 2. Q and V of the states s_1 .. s_N (B,N), (B,) -> (B,N), 0 after the response."""
    at = torch.arange(action_value.shape[1], device=action_value.device)  # (N,)
    next_value = F.pad(state_value[:, 1:], (0, 1))                        # (B,N): V(s_2) .. V(s_N), 0
    next_value = next_value.masked_fill(at >= lengths[:, None] - 1, 0.0)  # 0 behind the last token, see 1 above
    return (action_value - next_value).masked_fill(at >= lengths[:, None], 0.0)


def returns_to_go(reward):
    """Eq. 3: the sum of this reward and all later ones. (B,N) -> (B,N)."""
    return reward.flip(-1).cumsum(-1).flip(-1)


def return_baseline(returns, state_value, mask, baseline):
    """What to subtract from the returns: it depends on states or other responses only, so it adds no bias. (B,N)"""
    if baseline == "value":  # with V = max, G_t - V(s_t) is the sum of the advantages from t on
        return state_value
    if baseline == "mean":  # of the *other* responses: a mean with the own return in it would add a bias
        own = (returns * mask).sum(-1, keepdim=True)  # (B,1)
        n = mask.sum(-1, keepdim=True)                # (B,1)
        return ((own.sum() - own) / (n.sum() - n).clamp(min=1)).expand_as(returns)
    return torch.zeros_like(returns)


def policy_weights(returns, token_logprobs, sampler_logprobs):
    """Eqs. 4 and 5, detached. sampler_logprobs None: on policy, ratio 1 by definition and not by division. -> (R,)"""
    if sampler_logprobs is None:
        return returns.detach()
    ratio = (token_logprobs - sampler_logprobs).exp()  # of the token alone; the release leaves prefixes out as well
    return (ratio * returns).detach()  # without detach the gradient of the ratio would count too


def policy_gradient_loss(token_logprobs, weights):
    """Eq. 6 before the division. (R,), (R,) -> sum. Descending it makes tokens of positive weight more likely."""
    return -(weights * token_logprobs).sum()


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------
def train(cfg):
    common.check_settings(cfg, value=["max", "mean", "lse"], baseline=["none", "value", "mean"], sync=(1, 10**9))
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen and in the compute dtype, the student keeps fp32 weights and is cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)
    if teacher is None:
        raise common.BadInput("--teacher none: the reward is the teacher's, so name a --teacher")

    # data: with or without a response, only the prompts are used
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples, eos = data.train, tokenizer.eos_token_id

    # what is called in the loop
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.response_states(teacher, cfg.compile)
    row_values = lambda p, y: teacher_values(p, y, cfg.value)
    sampler = student if cfg.sync == 1 else copy.deepcopy(student).requires_grad_(False)
    longest = max(max(len(e.prompt), len(e.teacher_prompt)) for e in examples) + cfg.max_response
    widths = [8 * math.ceil(longest * x / 8) for x in (0.5, 0.75, 1)] if cfg.compile else ()  # three to compile
    evaluate = common.make_evaluator(cfg, teacher, tokenizer, data.valid)
    evaluate_test = common.make_evaluator(cfg, teacher, tokenizer, data.test)
    before = evaluate_test(student)

    # optimizer
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    parts = dict(student=student, optimizer=optimizer) | ({} if cfg.sync == 1 else {"sampler": sampler})
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

        # the student answers the prompts of this step in one batched call; the noise depends on seed and step alone
        if cfg.sync > 1 and step % cfg.sync == 0:
            sampler.load_state_dict(student.state_dict())
        asked = [examples[i] for i in common.step_indices(len(examples), step, cfg)]
        responses, sampler_logprobs = common.sample(
            sampler, [e.prompt for e in asked], cfg.max_response, seed=common.noise_seed(cfg.seed, step), eos=eos,
            compiled=cfg.compile, dtype=dtype)
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt) + len(responses[i]))  # less padding
        answered = [replace(asked[i], response=responses[i]) for i in order]
        sampler_logprobs = [sampler_logprobs[i] for i in order]
        size = len(asked) // cfg.accum
        micro = [slice(i, i + size) for i in range(0, len(asked), size)]

        # the teacher scores them
        lengths = torch.tensor([len(e.response) for e in answered], device=device)                # (B,)
        ended = torch.tensor([e.response[-1] == eos for e in answered], device=device)            # (B,)
        values = []
        for part in micro:
            batch = common.collate(answered[part], teacher, "teacher", widths).to(device)
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                teacher_hidden = teacher_fwd(batch)  # (R,H)
            values.append(common.row_scalars(row_values, teacher, teacher_hidden, batch.targets))
        action_value, state_value, advantage = (
            common.pad_responses(torch.cat(v), lengths, int(lengths.max())) for v in zip(*values))  # (B,N) each
        if step % cfg.log_every == 0 and not ended.any():
            run.print(f"step {step}: none of the samples ends within --max-response {cfg.max_response}: raise it")
        mask = torch.arange(action_value.shape[1], device=device) < lengths[:, None]              # (B,N)
        returns = returns_to_go(induced_reward(action_value, state_value, lengths))               # (B,N)
        centred = returns - return_baseline(returns, state_value, mask, cfg.baseline)             # (B,N)

        # one optimizer step over accum micro-batches: sums are divided once, by the responses of the whole step
        n_responses, n_tokens, totals = cfg.batch_size, common.all_reduce_sum(lengths.sum()), 0.0
        for part in micro:
            batch = common.collate(answered[part], student, "student", widths).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)  # (R,H)
            token_logprobs = common.token_logprobs(student, student_hidden, batch.targets)        # (R,)
            stale_logprobs = None if cfg.sync == 1 else torch.cat(sampler_logprobs[part]).to(device)
            weights = policy_weights(centred[part][mask[part]], token_logprobs, stale_logprobs)   # (R,)
            loss = policy_gradient_loss(token_logprobs, weights) / n_responses
            loss.backward()
            totals = totals + torch.stack([loss.detach(), -token_logprobs.detach().sum() / n_tokens])
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, nll = totals.tolist()
            of_sample = dict(advantage=advantage.sum(-1), length=lengths.float(), truncated=1 - ended.float())
            run.log(step, loss=loss, **{k: x.mean().item() for k, x in of_sample.items()}, nll=nll,
                    grad_norm=grad_norm.item(), lr=lr)
        run.end_step(step + 1, **parts)

    report = {"teacher": evaluate_test(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
