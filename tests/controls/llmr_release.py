"""LLMR by the rules of the released code. Each can be switched off, to see what it does.

Code: https://github.com/MANGA-UOFA/Prompt-LLMR, of the paper arxiv.org/abs/2409.12500

A copy of llmr.py, whose docstring has the names and Eqs. 1 to 6: `git diff --no-index llmr.py
tests/controls/llmr_release.py` shows the rules. The release leaves its numbers blank; the defaults
here are those of its predecessor, https://github.com/MANGA-UOFA/LMReward.

    --sync, --top-k          b is q as it was up to 5000 steps ago, cut to its 2 likeliest tokens
    --denom D, --reward-clip c     W_t = stop_gradient[ clamp(w_t G_t / D, -c, c) ]          (5')
    --discard    L = - share/n_tokens sum of W_t log q(a_t|s_t), both sum and n_tokens over the
                 responses that end; share is the share of these responses                    (6')
    --entropy    L also has entropy H(uniform, q(.|s_t)) = entropy (logsumexp(z) - mean(z)) for each
                 token; z are the student's logits

What they do to the gradient. In llmr.py a constant c(s) that is added to the teacher's logits of a
state is a baseline and nothing more. Under --discard it changes the gradient, because responses are
left out, and because n_tokens depends on what was sampled. Clipping adds a bias wherever it bites.
H is no entropy of q but the cross entropy to the uniform distribution: its weight must fit G / D,
or it destroys the student. The release has no baseline.

What to watch: `advantage` and `no_end`, beside those of llmr.py. The loss has no set goal.

    python tests/controls/llmr_release.py                       all rules but the last
    python tests/controls/llmr_release.py --entropy 0.001       and the last
    python tests/controls/llmr_release.py --value max --sync 1 --top-k 0 --denom 1 --reward-clip 0 \
        --no-discard                                            none of them: llmr.py
"""
import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import TopKLogitsWarper

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where common.py is
import common


@dataclass
class Config(common.Settings):
    student: str = "student-kl"      # where to start: a student after long KD
    value: Literal["max", "mean", "lse"] = "mean"  # V of a state: max (Bellman), mean, logsumexp
    sync: int = 5000                 # steps between refreshes of the sampler
    top_k: int = 2                   # sample among the k likeliest tokens; 0: all
    denom: float = 100.0             # D: divides the returns
    reward_clip: float = 1.0         # c: the largest weight of a token; 0: no clipping
    discard: bool = True             # drop responses without an end, divide by tokens of the others
    entropy: float = 0.0             # weight of the cross entropy to the uniform distribution
    steps: int = 600                 # optimizer steps; 0 only evaluates
    lr: float = 1e-3                 # peak; for pretrained models 1e-6 to 1e-5


# --- The method -----------------------------------------------------------------------------------
# In a micro-batch: B responses, N tokens in the longest, R tokens in all, r tokens in a chunk.
def teacher_values(teacher_logits, targets, value):
    """Eq. 1: Q of the token, V of its state, advantage of the token. (r,V), (r,) -> three (r,)."""
    centred = teacher_logits - teacher_logits.mean(-1, keepdim=True)  # (r,V)
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
    next_value = next_value.masked_fill(at >= lengths[:, None] - 1, 0.0)  # V = 0 at the end: note 1
    return (action_value - next_value).masked_fill(at >= lengths[:, None], 0.0)


def returns_to_go(reward):
    """Eq. 3: the sum of this reward and all later ones. (B,N) -> (B,N)."""
    return reward.flip(-1).cumsum(-1).flip(-1)


def sampler_logprobs(logits, targets, top_k):
    """log b of each token, b cut to its k likeliest. (r,V), (r,) -> (r,)."""
    kept = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    return logits.gather(-1, targets[:, None])[:, 0] - kept.logsumexp(-1)


def policy_weights(gain, logprobs, sampler_logprobs, reward_clip):
    """Eqs. 4 and 5'. gain is G / D; sampler_logprobs is None on policy, ratio 1. -> (r,)."""
    weights = gain
    if sampler_logprobs is not None:
        # only this token's ratio: exact would be the product of the ratios up to it
        weights = (logprobs - sampler_logprobs).exp() * weights
    if reward_clip > 0:
        weights = weights.clamp(-reward_clip, reward_clip)
    return weights.detach()  # without detach the gradient of the ratio would count, too


def cross_entropy_to_uniform(logits):
    """H(uniform, q) of each row: KL(uniform||q) + log V, no entropy of q. (r,V) -> (r,)."""
    return logits.logsumexp(-1) - logits.mean(-1)


def pad_responses(values, lengths):
    """(R,) values of response tokens -> (B,N): one response a line, filled with 0."""
    inside = torch.arange(int(lengths.max()), device=values.device) < lengths[:, None]
    return values.new_zeros(inside.shape).masked_scatter(inside, values)


# --- The loop -------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills its directory and returns its final metrics."""
    common.check_settings(cfg, sync=(1, 10**9), top_k=(0, 10**9), denom=(1e-9, 1e9),
                          reward_clip=(0, 1e9), entropy=(0, 1e9))
    if cfg.teacher == "none":
        raise common.BadInput("--teacher none: the reward is the teacher's, so name a --teacher")
    run = common.Run(cfg, __file__)

    # data and models: the frozen teacher has the dtype of --dtype; the student's weights are fp32
    rows = common.load_rows(cfg)
    student, teacher = common.load_pair(cfg, run.device)
    data = common.load_data(cfg, rows, student, teacher)  # of train, only prompts are used
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
        with common.precision(cfg, run.device):
            responses = common.sample(sampler, [e.prompt for e in asked], cfg.max_response,
                                      warpers=[TopKLogitsWarper(cfg.top_k)] if cfg.top_k else [],
                                      seed=common.sample_seed(cfg.seed, step))
        answered = [replace(e, response=y) for e, y in zip(asked, responses)]
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
            last = batch.targets[batch.lengths.cumsum(0) - 1]                            # (B,)
            ended = last == student.tokenizer.eos_token_id                               # (B,)
            scores.append((returns_to_go(reward), advantage, ended))
        n_responses = cfg.batch_size
        n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))
        n_ended = common.all_reduce_sum(sum(int(ended.sum()) for _, _, ended in scores))
        count = n_responses
        if cfg.discard:  # Eq. 6', divided by the share
            kept = sum(int(b.lengths[ended].sum()) for b, (_, _, ended) in zip(micro, scores))
            count = common.all_reduce_sum(kept) * n_responses / max(1, n_ended)
        if not count:
            raise common.BadInput(f"step {step}: none of {n_responses} samples has an end, and "
                                  "--discard drops such: raise --max-response")

        # the student learns; totals: loss, advantage, nll
        totals = torch.zeros(3, device=run.device)
        for batch, (returns, advantage, ended) in zip(micro, scores):
            inside = torch.arange(returns.shape[1], device=run.device) < batch.lengths[:, None]
            gain, stale = returns[inside] / cfg.denom, None  # (B,N) -> (R,)
            counted = (ended | (not cfg.discard))[batch.owner].float()                   # (R,)
            with common.precision(cfg, run.device):
                student_hidden = common.response_states(student, batch)                  # (R,H)
                if cfg.sync > 1 or cfg.top_k > 0:
                    stale = common.row_values(
                        lambda logits, _, a: (sampler_logprobs(logits, a, cfg.top_k),),
                        sampler, batch)[:, 0]                                            # (R,)
            # the logits of all R rows need too much memory; in_chunks collects the gradients
            for rows, part in common.in_chunks(student_hidden, student):
                logits = common.logits_of(student, part)                                 # (r,V)
                logprobs = common.log_softmax_at(logits, batch.targets[rows])            # (r,)
                weights = policy_weights(gain[rows], logprobs,
                                         None if stale is None else stale[rows],
                                         cfg.reward_clip)                                # (r,)
                losses = -weights * logprobs                                             # (r,)
                if cfg.entropy > 0:
                    losses = losses + cfg.entropy * cross_entropy_to_uniform(logits)     # (r,)
                loss = (counted[rows] * losses).sum() / count                            # Eq. 6'
                loss.backward()
                totals[0] += loss.detach()
                totals[2] -= logprobs.detach().sum() / n_tokens
            totals[1] += advantage.sum() / n_responses
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, advantage, nll = totals.tolist()
            run.log(step, loss=loss, advantage=advantage, nll=nll, length=n_tokens / n_responses,
                    no_end=1 - n_ended / n_responses, grad_norm=grad_norm.item(), lr=lr,
                    tokens=n_tokens)
        run.end_step(step + 1)

    columns["after"] = evaluate_test(student) if cfg.steps else columns["before"]
    return run.finish(student, columns, common.MEANINGS, evaluate_test.generations)


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
