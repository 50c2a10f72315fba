"""Reinforcement learning with the teacher's logits as reward: the student writes, and is scored.

Li, Hao, Mou, "LLMR: Knowledge Distillation with a Large Language Model-Induced Reward",
LREC-COLING 2024, arxiv.org/abs/2409.12500; code: https://github.com/MANGA-UOFA/Prompt-LLMR

For a prompt x the student q samples a response a_1 .. a_n, with its end-of-sequence token (EOS).
Token a_t is an action in the state s_t = (x, a_1 .. a_{t-1}). The logits f(s,a) of the teacher p,
centred, are values Q. Bellman: Q(s_t,a_t) = r_t + V(s_{t+1}), which gives r_t. Our own numbering:

    Q(s,a) = f(s,a) - mean_a' f(s,a')                               centred logits            (1)
    r_t    = Q(s_t,a_t) - V(s_{t+1});  V(s) = max_a Q(s,a), V(s_{n+1}) = 0    reward          (2)
    G_t    = r_t + r_{t+1} + ... + r_n                                        return-to-go    (3)
    w_t    = q(a_t|s_t) / b(a_t|s_t)   b: the sampler, a copy of q renewed every --sync steps (4)
    W_t    = stop_gradient[ w_t (G_t - baseline_t) ]        weight; baseline_t = 0 by default (5)
    L      = - mean over responses [ sum_t W_t log q(a_t|s_t) ], all of one step  REINFORCE   (6)

    In the code: f = teacher_logits, Q = action_value, V = state_value, r = reward, G = returns, b =
    sampler, w = ratio, W = weights. --value: V is max, mean under p or logsumexp of Q.

The advantage A_t = log p(a_t|s_t) - max_a log p(a|s_t) is 0 for p's likeliest token, else below 0.
V = max: G_1 = V(s_1) + sum_t A_t. q learns p's greedy response or, if it cannot, one of high G_1.

What differs from the released code (it names no settings, and we read only the paper's abstract):
 1. Responses without EOS are kept, with V = 0 after their last token. The release drops them.
 2. L is divided by the number of responses, which is fixed; the release divides by that of tokens.
 3. Defaults: temperature 1, all tokens, b = q (--sync 1). The release: top-k tokens, b an older q.
 4. The release also clips W, scales G and adds an entropy to L: tests/controls/llmr_release.py.

What to watch: `advantage`, summed over a response, is the objective and rises to 0. `nll` (-log q
of q's samples) falls if q drops right responses; then `wording_distance` rises. Ignore `loss`.

    python llmr.py                       start from student-kl, a student after long KD
    python llmr.py --value lse           G_1 = V(s_1) + sum log p: each token lowers it, short wins
    python llmr.py --baseline value      the weight is the sum of the advantages from t on
    python llmr.py --sync 50             a stale sampler and its importance ratio
    python llmr.py --teacher Qwen/Qwen2.5-1.5B --student my-kl-student --data my.jsonl \
        --max-response 512 --lr 1e-6 --accum 8
"""
import copy
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Config(common.Settings):
    student: str = "student-kl"      # where to start: a student after long KD
    value: Literal["max", "mean", "lse"] = "max"  # V of a state: max (Bellman), mean, logsumexp
    baseline: Literal["none", "value", "mean"] = "none"  # V(s_t), or the other responses' mean G
    sync: int = 1                    # steps between refreshes of the sampler; 1: on policy, ratio 1
    steps: int = 400                 # optimizer steps; 0 only evaluates
    lr: float = 1e-3                 # peak; for pretrained models 1e-6 to 1e-5


# --- The method -----------------------------------------------------------------------------------
# In a micro-batch: B responses, N tokens in the longest, R tokens in all, r tokens in a chunk.
def teacher_values(teacher_logits, targets, value):
    """Q of a token (Eq. 1), V of its state, its advantage. (r,vocabulary), (r,) -> three (r,)."""
    centred = teacher_logits - teacher_logits.mean(-1, keepdim=True)  # (r,vocabulary)
    action_value = centred.gather(-1, targets[:, None])[:, 0]         # (r,)
    greatest = centred.amax(-1)                                       # (r,)
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
    next_value = F.pad(state_value[:, 1:], (0, 1))                        # V(s_2) .. V(s_N), 0
    next_value = next_value.masked_fill(at >= lengths[:, None] - 1, 0.0)  # V(s_{n+1}) = 0
    return (action_value - next_value).masked_fill(at >= lengths[:, None], 0.0)


def returns_to_go(reward):
    """Eq. 3: the sum of this reward and all later ones. (B,N) -> (B,N)."""
    return reward.flip(-1).cumsum(-1).flip(-1)


def mean_of_others(returns, lengths, total, count):
    """The mean return over the tokens of all *other* responses; including its own would add a bias.
    returns (B,N), lengths (B,), sum and number of all returns of the step -> (B,1)."""
    own = returns.sum(-1, keepdim=True)
    return (total - own) / (count - lengths[:, None]).clamp(min=1)


def policy_weights(gain, logprobs, sampler_logprobs):
    """Eqs. 4 and 5 -> (r,). gain = G - baseline. On policy both logprobs are equal: ratio 1."""
    # only this token's ratio; an unbiased weight would need the product over the whole response
    ratio = (logprobs - sampler_logprobs).exp()
    return (ratio * gain).detach()  # without detach the gradient of the ratio would count, too


def pad_responses(values, lengths):
    """(R,) values of response tokens -> (B,N): one row for each response, filled up with 0."""
    inside = torch.arange(int(lengths.max()), device=values.device) < lengths[:, None]
    return values.new_zeros(inside.shape).masked_scatter(inside, values)


# --- The loop -------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(cfg, sync=(1, 10**9))
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: the reward is the teacher's, so name a --teacher")
    run = common.Run(cfg, __file__)

    # data and models: the frozen teacher has the dtype of --dtype; the student's weights are fp32
    rows = common.load_rows(cfg)
    student, teacher = common.load_pair(cfg, run.device)
    data = common.load_data(cfg, rows, student, teacher)  # training uses only the prompts
    sampler = student if cfg.sync == 1 else copy.deepcopy(student)

    evaluate = common.Evaluator(cfg, teacher, data.valid)
    evaluate_test = common.Evaluator(cfg, teacher, data.test)
    columns = {"teacher": evaluate_test(teacher)}
    columns["before"] = evaluate_test(student)  # before run.start, which may load trained weights

    # runs are short: beta_2 = 0.98 averages squared gradients over 50 steps, the default over 1000
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    start = run.start(data.hash, student=student, optimizer=optimizer, sampler=sampler)
    common.no_dropout(student)  # sampling and training must use the same distribution
    student.train()

    for step in range(start, cfg.steps):
        if step % cfg.eval_every == 0:
            run.evaluated(step, evaluate(student), evaluate.generations)
        lr = common.set_lr(optimizer, step, cfg)

        # the student responds to the prompts of this step
        if cfg.sync > 1 and step % cfg.sync == 0:
            sampler.load_state_dict(student.state_dict())
        asked = [data.train[i] for i in common.step_indices(len(data.train), step, cfg)]
        answered = common.respond(sampler, asked, cfg, seed=common.sample_seed(cfg.seed, step))
        micro = common.micro_batches(answered, student, teacher, cfg)

        # the teacher scores them
        scores = []
        for batch in micro:
            with common.precision(cfg, run.device):
                values = common.row_values(lambda f, _, a: teacher_values(f, a, cfg.value),
                                           teacher, batch.for_teacher)                   # (R,3)
            action_value, state_value, advantage = (
                pad_responses(v, batch.lengths) for v in values.unbind(-1))              # (B,N)
            reward = induced_reward(action_value, state_value, batch.lengths)            # (B,N)
            scores.append((returns_to_go(reward), state_value, advantage))
        n_responses = cfg.batch_size
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        all_returns = common.all_reduce_sum(sum(returns.sum() for returns, _, _ in scores).item())

        # the student learns; totals: loss, advantage, nll, share of responses without an end
        totals = torch.zeros(4, device=run.device)
        for batch, (returns, state_value, advantage) in zip(micro, scores):
            gain = returns
            if cfg.baseline == "value":  # with V = max, G_t - V(s_t) sums the advantages from t on
                gain = returns - state_value
            elif cfg.baseline == "mean":
                gain = returns - mean_of_others(returns, batch.lengths, all_returns, n_tokens)
            inside = torch.arange(gain.shape[1], device=run.device) < batch.lengths[:, None]
            gain = gain[inside]  # (B,N) -> (R,), response after response
            with common.precision(cfg, run.device):
                student_hidden = common.response_states(student, batch)                  # (R,H)
                if cfg.sync > 1:
                    stale = common.row_values(common.log_likelihood, sampler, batch)[:, 0]
            # the logits of all R rows need too much memory; in_chunks collects the gradients
            for rows, part in common.in_chunks(student_hidden, student):
                logits = common.logits_of(student, part)                        # (r,vocabulary)
                logprobs = common.log_softmax_at(logits, batch.targets[rows])            # (r,)
                of_sampler = logprobs if cfg.sync == 1 else stale[rows]                  # (r,)
                weights = policy_weights(gain[rows], logprobs, of_sampler)               # (r,)
                loss = -(weights * logprobs).sum() / n_responses                         # Eq. 6
                loss.backward()
                totals[0] += loss.detach()
                totals[2] -= logprobs.detach().sum() / n_tokens
            last = batch.targets[batch.lengths.cumsum(0) - 1]                            # (B,)
            totals[1] += advantage.sum() / n_responses
            totals[3] += (last != student.tokenizer.eos_token_id).sum() / n_responses
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, advantage, nll, no_end = totals.tolist()
            run.log(step, loss=loss, advantage=advantage, nll=nll, length=n_tokens / n_responses,
                    no_end=no_end, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1)

    columns["after"] = evaluate_test(student) if cfg.steps else columns["before"]
    return run.finish(student, columns, common.MEANINGS, evaluate_test.generations)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
