"""Control: LLMR by the rules of the released code, each of which can be switched off to see what it does.

A copy of llmr.py (`git diff --no-index llmr.py tests/controls/llmr_release.py`), whose docstring has the
method, the names and Eqs. 1 to 6. The release (https://github.com/MANGA-UOFA/Prompt-LLMR) leaves its
numbers blank; the defaults here are those of its predecessor. Where it departs from llmr.py, n being the
length of a response:

    --cut value       r_n = Q(s_n,a_n) - V(s_{n+1}) of a response that is cut before EOS; llmr.py grants V(s_{n+1})
    --denom D, --reward-clip c         W_t = stop_gradient[ clamp(rho_t (G_t - baseline_t) / D, -c, c) ]
    --discard         L = - 1/n_tokens sum of W_t log q(a_t|s_t) over the responses that end
    --entropy         L += entropy sum_t H(uniform, q(.|s_t)), H = logsumexp(z) - mean(z), z the student's logits
    --sync, --top-k   b is a copy of q of up to 5000 updates ago, cut to its 2 likeliest tokens

What each does to the gradient. A constant c(s) added to the teacher's logits of a state is no more than a
baseline in llmr.py; it changes the gradient under --discard, which divides by a number that depends on what
was sampled and leaves responses out, and under --cut value, where -c(s_{n+1}) stays behind. Clipping biases
it wherever it bites. rho_t is the token's own ratio; what happened to the prefix is left out. H is the
cross entropy to the uniform distribution, not the entropy of q: its size must fit G / D, or it destroys the
student.

Held against: llmr.py with the same --value.

What to watch: `return` and `no_end` beside llmr.py's. The loss means nothing.

    python -m tests.controls.llmr_release                       all of the release's rules
    python -m tests.controls.llmr_release --entropy 0.001       with its "entropy" term
    python -m tests.controls.llmr_release --value max --no-discard --cut optimal --sync 1 --top-k 0 \
        --denom 1 --reward-clip 0                               none of them: llmr.py
"""
import copy
import math
import sys
from dataclasses import dataclass, replace

import torch

import common


@dataclass
class Config(common.Settings):
    # method
    student: str = "tiny-kl"         # where to start: a converged KL student; tiny-kl: the tiny world's
    value: str = "mean"              # V of a state: max (Bellman), mean (under the teacher), lse (soft)
    baseline: str = "none"           # subtracted from returns: none, value (V), mean (of the others)
    sync: int = 5000                 # updates between refreshes of the sampler; 1: none is old
    top_k: int = 2                   # sample among the k likeliest tokens only; 0: all, as the theory wants
    denom: float = 100.0             # D: divides the returns; matters beside --reward-clip and --entropy only
    reward_clip: float = 1.0         # c: largest weight of a token; 0: none
    cut: str = "value"               # after --max-response: value (V counts against it), optimal (V is granted)
    discard: bool = True             # drop responses without an end, divide by the tokens of the others
    entropy: float = 0.0             # weight of the cross entropy to the uniform distribution; 1e-3 or more
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


def induced_reward(action_value, state_value, lengths, ended):
    """Eq. 2. (B,N), (B,N+1), (B,), (B,) bool -> (B,N), 0 after the last token of a response."""
    at = torch.arange(action_value.shape[1], device=action_value.device)  # (N,)
    # after EOS comes the terminal state, after another last token a state whose value counts
    terminal = ended[:, None] & (at == lengths[:, None] - 1)              # (B,N)
    reward = action_value - state_value[:, 1:].masked_fill(terminal, 0.0)
    return reward.masked_fill(at >= lengths[:, None], 0.0)


def counted_tokens(inside, ended, discard, total=lambda x: x):
    """The tokens that count, (B,N) bool, and what the loss is divided by. total: sums over processes."""
    if not discard:
        return inside, total(len(ended))
    mask = inside & ended[:, None]  # below: the mean over tokens, times the share of responses kept
    return mask, total(mask.sum()) * total(len(ended)) / total(ended.sum())


def returns_to_go(reward):
    """Eq. 3: the sum of this reward and all later ones. (B,N) -> (B,N)."""
    return reward.flip(-1).cumsum(-1).flip(-1)


def return_baseline(returns, state_value, mask, baseline):
    """What to subtract from the returns (B,N): of states or other responses only, so it adds no bias."""
    if baseline == "value":  # with V = max, G_t - V(s_t) is the sum of the advantages from t on
        return state_value[:, :-1]
    if baseline == "mean":  # of the *other* responses: a mean with the own return in it would add a bias
        own = (returns * mask).sum(-1, keepdim=True)  # (B,1) sum over the tokens of a response
        n = mask.sum(-1, keepdim=True)                # (B,1)
        all_own = common.all_reduce_sum(own.sum())    # of all processes
        all_n = common.all_reduce_sum(n.sum())
        of_others = (all_own - own) / (all_n - n).clamp(min=1)  # (B,1) mean over the tokens of the others
        return of_others.expand_as(returns)
    return torch.zeros_like(returns)


def policy_weights(gain, token_logprobs, sampler_logprobs, reward_clip):
    """Eqs. 4 and 5: W (R,), clipped and detached. gain is (G - baseline) / D; sampler_logprobs None: rho =
    1."""
    weights = gain
    if sampler_logprobs is not None:
        # only this token's ratio: an exact importance weight would be the product over the tokens before it
        # too
        weights = (token_logprobs - sampler_logprobs).exp() * weights
    if reward_clip > 0:
        weights = weights.clamp(-reward_clip, reward_clip)
    return weights.detach()  # without detach the gradient of the ratio would count too


def policy_gradient_loss(token_logprobs, weights):
    """Eq. 6 before the division. (R,), (R,) -> sum. Descent makes tokens of positive weight more likely."""
    return -(weights * token_logprobs).sum()


def cross_entropy_to_uniform(student_logits):
    """H(uniform, q) of each row: KL(uniform||q) + log V, not Shannon's entropy of q. (R,V) -> (R,)."""
    return student_logits.logsumexp(-1) - student_logits.mean(-1)


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------
def train(cfg) -> dict:
    """One run: it fills out/<name>/ and returns its final metrics."""
    common.check_settings(cfg, value=["max", "mean", "lse"], baseline=["none", "value", "mean"],
                          sync=(1, 10**9), top_k=(0, 10**9), denom=(1e-9, 1e9), reward_clip=(0, 1e9), entropy=(0, 1e9),
                          cut=["optimal", "value"])
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen, in the compute dtype; the student keeps fp32 weights, cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)
    if teacher is None:
        raise common.BadInput("--teacher none: the reward is the teacher's, so name a --teacher")
    room = getattr(teacher.config, "max_position_embeddings", None)
    if room and cfg.max_prompt + cfg.max_response >= room:  # the state after a cut response is read too
        raise common.BadInput(f"--max-prompt {cfg.max_prompt} and --max-response {cfg.max_response} do not "
                              f"fit the teacher's context of {room} tokens less 1: lower them")

    # data: with or without a response, only the prompts are used
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples, eos = data.train, tokenizer.eos_token_id

    # what is called in the loop: see kd_forward.py
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.response_states(teacher, cfg.compile)
    row_values = lambda teacher_logits, targets: teacher_values(teacher_logits, targets, cfg.value)
    sampler = student if cfg.sync == 1 else copy.deepcopy(student).requires_grad_(False)
    on_policy = cfg.sync == 1 and cfg.top_k == 0
    # --compile: every width of a batch is compiled anew, so batches are padded to one of three widths
    longest = max(max(len(e.prompt), len(e.teacher_prompt)) for e in examples) + cfg.max_response + 1
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
            eos=eos, top_k=cfg.top_k, compiled=cfg.compile, dtype=dtype)
        # sorted by length: less padding
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt) + len(responses[i]))
        answered = [replace(asked[i], response=responses[i]) for i in order]
        sampler_logprobs = [sampler_logprobs[i] for i in order]
        size = len(asked) // cfg.accum
        micro = [slice(i, i + size) for i in range(0, len(asked), size)]

        # the teacher scores them; after a response without an end it reads any token more, for V(s_{n+1})
        lengths = torch.tensor([len(e.response) for e in answered], device=device)      # (B,)
        ended = torch.tensor([e.response[-1] == eos for e in answered], device=device)  # (B,)
        scored = [e if e.response[-1] == eos else replace(e, response=e.response + [eos]) for e in answered]
        values = []
        for part in micro:
            batch = common.collate(scored[part], teacher, "teacher", widths).to(device)
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                teacher_hidden = teacher_fwd(batch)  # (R,H)
            values.append(common.row_scalars(row_values, teacher, teacher_hidden, batch.targets))
        action_value, state_value, advantage = (  # (B,N+1) each
            common.pad_responses(torch.cat(v), lengths + ~ended, int(lengths.max()) + 1)
            for v in zip(*values))
        if cfg.discard and not common.all_reduce_sum(ended.sum()):
            raise common.BadInput(f"step {step}: 100 % of the {cfg.batch_size} samples reach --max-response "
                                  f"{cfg.max_response} without an end and --discard drops such: raise it")
        if step % cfg.log_every == 0 and not ended.any():
            run.print(f"step {step}: none of the samples ends within --max-response {cfg.max_response}: "
                      "raise it")
        inside = torch.arange(state_value.shape[1] - 1, device=device) < lengths[:, None]  # (B,N)
        mask, count = counted_tokens(inside, ended, cfg.discard, common.all_reduce_sum)    # (B,N)
        granted = ended | (cfg.cut == "optimal")                                           # (B,)
        returns = returns_to_go(induced_reward(action_value[:, :-1], state_value, lengths, granted))  # (B,N)
        gain = returns - return_baseline(returns, state_value, mask, cfg.baseline)         # (B,N)
        gain = gain / cfg.denom * mask

        # one step over accum micro-batches: sums are divided once, by the count of the whole step
        n_tokens = common.all_reduce_sum(sum(len(e.response) for e in answered))
        totals = 0.0
        for part in micro:
            batch = common.collate(answered[part], student, "student", widths).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)  # (R,H)
            token_logprobs = common.token_logprobs(student, student_hidden, batch.targets)       # (R,)
            stale_logprobs = None if on_policy else torch.cat(sampler_logprobs[part]).to(device)
            # gain[inside] lists response after response: the order of the rows of the batch
            weights = policy_weights(gain[part][inside[part]], token_logprobs, stale_logprobs,
                                     cfg.reward_clip)                                            # (R,)
            loss = policy_gradient_loss(token_logprobs, weights) / count
            if cfg.entropy > 0:
                kept = mask[part][inside[part]]  # (R,)
                row_loss = lambda logits, _, targets: (cross_entropy_to_uniform(logits),)
                uniform = common.rowwise_loss(row_loss, student, student_hidden[kept], batch.targets[kept])
                loss = loss + cfg.entropy * uniform[0] / count
            loss.backward()
            totals = totals + torch.stack([loss.detach(), -token_logprobs.detach().sum() / n_tokens])
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, nll = totals.tolist()
            mean = lambda x: common.all_reduce_sum(x.sum().item()) / cfg.batch_size
            run.log(step, loss=loss, advantage=mean(advantage[:, :-1] * inside),
                    length=n_tokens / cfg.batch_size, no_end=mean(~ended), **{"return": mean(returns[:, 0])},
                    nll=nll, grad_norm=grad_norm.item(), lr=lr, tokens=n_tokens)
        run.end_step(step + 1, **parts)

    report = {"teacher": evaluate_test(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": evaluate_test(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
