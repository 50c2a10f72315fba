"""Reinforcement learning on the reward that the teacher's logits induce: the student writes, the teacher scores.

Li, Hao, Mou, "LLMR: Knowledge Distillation with a Large Language Model-Induced Reward", LREC-COLING 2024,
https://arxiv.org/abs/2409.12500; code: https://github.com/MANGA-UOFA/Prompt-LLMR

The student q samples a response y = a_1 .. a_n to a prompt x; the state s_t = (x, a_1 .. a_{t-1}) is a prefix. A
language model that was trained on good text knows which action is good, so the teacher's logits f(s,a) are read as
action values, and the Bellman optimality equation is solved for the reward. (Equation numbers are ours.)

    Q(s,a)  = f(s,a) - mean_a' f(s,a')                                             action value, centred logits  (1)
    r_t     = Q(s_t,a_t) - V(s_{t+1}),  V(s) = max_a Q(s,a),  V = 0 after EOS      induced reward                (2)
    G_t     = sum_{t'>=t} r_t'                                                     return-to-go                  (3)
    rho_t   = q(a_t|s_t) / b(a_t|s_t)               1 on policy; b is the distribution that was sampled          (4)
    W_t     = stop_gradient[ rho_t (G_t - baseline_t) / D ]                        clipped to +-c where c > 0    (5)
    L       = - (1/B) sum over the B responses of sum_t W_t log q(a_t|s_t)         REINFORCE                     (6)

    p is the teacher and q the student everywhere: the paper's q(s,a) is `action_value`, its V `state_value`. D =
    cfg.denom, c = cfg.reward_clip. --value takes V = max, V = mean under p (as the release may have), or V = logsumexp.

What it comes to: the sum over t of r_t is V(s_1) + sum_t A_t with the advantage A_t = log p(a_t|s_t) - max_a log
p(a|s_t) <= 0. So the best student decodes as the greedy teacher does, one mode and no entropy. With logsumexp the
return is log p(y|x) (shorter responses), with the mean it adds the teacher's entropy at each token (longer ones).

What differs from the paper, of which we know the abstract and the released code (its settings are left blank there):
 1. Logits are known up to a constant c(s) for each state. In G_t it cancels but for c(s_t), a mere baseline, provided
    that all responses count, that L is divided by a constant, and that a response cut at --max-response keeps
    -V(s_{n+1}) and is granted +V(s_{n+1}), what the best rest would collect. The release discards cut responses and
    divides by the tokens sampled (--release): then c(s) changes the gradient. So does -V(s_{n+1}) alone (--cut value).
 2. On policy (--sync 1), T = 1, no truncation, no dropout: the distribution sampled is the one that is improved. The
    release samples a copy of up to 5000 updates ago and weights each token by its own rho_t, prefixes by nothing.
 3. The release's "entropy" term is the cross entropy to the uniform distribution. It is --entropy here, default 0: its
    size must fit G / D, else it destroys the student.
 4. AdamW, warm-up and a cosine instead of Adam at a constant rate; one template instead of an average over several.

What to watch: `advantage` is the objective, sum_t A_t a response: it rises towards 0. That proves that the optimizer
works, no more: where the teacher is unsure, a student that says "Yes ." to everybody gets far; see `length`. `return`
moves with V(s_1) of the prompts drawn. `entropy` (nats a token) falls, and `valid` at T = 1 rises with that alone:
compare a KL student at --eval-temperature 0.3, and `valid_greedy`; `mode_distance` is what it cost. The loss means
nothing: G is not centred, so L may go either way. A `truncated` above a few percent wants a larger --max-response.

    python llmr.py                                        the tiny world, from its KL-distilled student
    python llmr.py --value lse                            soft values: log p(y|x) as the return
    python llmr.py --baseline value                       advantage-to-go as the weight
    python llmr.py --sync 50                              a stale sampler and its importance weights
    python llmr.py --release --value mean --sync 5000 --top-k 2 --denom 100 --reward-clip 1    the release's rules with
                                                          the numbers of its predecessor, its own being blank
    python llmr.py --teacher bigscience/T0_3B --student my-kl-student --data dailydialog.jsonl --lr 1e-5 \
        --batch-size 32 --accum 4 --teacher-template "The dialogue response of {prompt} is:"
    python llmr.py --teacher Qwen/Qwen2.5-1.5B --student my-kl-student --data my.jsonl --lr 1e-6 --accum 8
"""
import copy
import math
import sys
from dataclasses import dataclass, replace

import torch

import common


@dataclass
class Config:
    # models and data
    teacher: str = "tiny"            # model directory or hub name; tiny: the tiny world's
    student: str = "tiny-kl"         # start from a converged KL student; tiny-kl: the tiny world's
    data: str = "tiny"               # .jsonl, .csv, dir of train/valid/test.jsonl, saved/hub dataset; tiny:N: world N
    prompt_field: str = "prompt"     # name of the prompt in a row of data
    response_field: str = "response" # name of the response; null there marks a prompt without one
    template: str = "auto"           # text around {prompt}; auto: the chat template, else the prompt and a line break
    teacher_template: str = ""       # if the teacher is to read another template than the student
    max_prompt: int = 256            # tokens; longer prompts lose their beginning
    max_response: int = 256          # tokens; longer responses lose their end and with it EOS
    holdout: float = 0.05            # share of prompts held out for valid, and again for test, where data has no splits
    teacher_device_map: str = ""     # e.g. auto: spread a large teacher over devices (needs accelerate)
    # method
    value: str = "max"               # V of a state: max (Bellman optimality), mean (under the teacher), lse (logsumexp)
    baseline: str = "none"           # subtracted from the returns: none, value (V of the state), mean (other responses)
    sync: int = 1                    # updates between refreshes of the sampler; 1: on policy, no importance weights
    top_k: int = 0                   # sample among the k likeliest tokens only; 0: all, as the theory wants
    denom: float = 1.0               # D: returns are divided by it; only matters beside --reward-clip and --entropy
    reward_clip: float = 0.0         # c: largest weight of a token; 0: off; biases the gradient where it bites
    cut: str = "optimal"             # where --max-response cuts: optimal (grant V, the best rest), value (do not)
    entropy: float = 0.0             # weight of the cross entropy to the uniform distribution; if at all, from 1e-3
    release: bool = False            # as the released code: discard samples without an end, divide by sampled tokens
    # optimization
    steps: int = 300                 # optimizer steps; 0 only evaluates
    batch_size: int = 64             # sequences of one optimizer step
    accum: int = 1                   # micro-batches they are split into: raise it when memory runs out
    lr: float = 3e-4                 # peak; right for the tiny world, 1e-6 to 1e-5 for pretrained models
    warmup: int = 20                 # steps of linear warm-up; after it a cosine down to a tenth of lr
    weight_decay: float = 0.01       # AdamW's
    clip: float = 1.0                # largest gradient norm
    # system
    eval_every: int = 100            # steps between evaluations on validation rows
    eval_rows: int = 500             # most test rows to evaluate on (validation: at most 200)
    eval_temperature: float = 1.0    # temperature of the evaluated distribution; the _greedy metrics have none
    kl_on: str = "samples"           # samples: KL on samples of teacher and student; references: on the given responses
    log_every: int = 20              # steps between lines of the log
    save_every: int = 500            # steps between checkpoints
    seed: int = 0                    # of data order, sampling and random weights
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # float32 or bfloat16 for activations and teacher; the student's weights stay fp32
    compile: bool = torch.cuda.is_available()  # torch.compile: minutes at the start, faster steps; for long runs
    recompute: bool = False          # forget activations, compute them again for the gradient: less memory, slower
    out: str = ""                    # directory of this run; empty: out/<script and changed settings>
    resume: bool = False             # go on from the last checkpoint
    overwrite: bool = False          # delete an earlier run in the same directory first


# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------
def teacher_values(teacher_logits, targets, value):
    """Eq. 1 and V: action value of the token, state value, advantage A of the token. (R,V), (R,) -> three (R,)."""
    centred = teacher_logits - teacher_logits.mean(-1, keepdim=True)  # (R,V); a choice of baseline, no more
    action_value, greatest = centred.gather(-1, targets[:, None])[:, 0], centred.amax(-1)  # (R,)
    if value == "max":
        state_value = greatest
    elif value == "lse":
        state_value = centred.logsumexp(-1)
    else:
        state_value = (centred.softmax(-1) * centred).sum(-1)
    return action_value, state_value, action_value - greatest


def induced_reward(action_value, state_value, lengths, ended):
    """Eq. 2. (B,N), (B,N+1), (B,), (B,) bool -> (B,N), 0 after the response. state_value[:, t] is V(s_t)."""
    at = torch.arange(action_value.shape[1], device=action_value.device)  # (N,)
    # after the last token comes the terminal state if it is EOS, else a state whose value counts: nothing wraps around
    terminal = ended[:, None] & (at == lengths[:, None] - 1)  # (B,N)
    reward = action_value - state_value[:, 1:].masked_fill(terminal, 0.0)
    return reward.masked_fill(at >= lengths[:, None], 0.0)


def counted_tokens(inside, ended, release, total=lambda x: x):
    """The tokens that count, (B,N) bool, and the number the loss is divided by. total: sums over processes."""
    if not release:
        return inside, total(len(ended))  # a constant: a number of tokens would depend on what was sampled
    mask = inside & ended[:, None]  # below: the mean over tokens, times the share of responses kept
    return mask, total(mask.sum()) * total(len(ended)) / total(ended.sum())


def returns_to_go(reward):
    """Eq. 3: the sum of this reward and all later ones. (B,N) -> (B,N)."""
    return reward.flip(-1).cumsum(-1).flip(-1)


def state_baseline(returns, state_value, mask, baseline):
    """What to subtract from the returns: it depends on states or other responses only, so it adds no bias. (B,N)"""
    if baseline == "value":  # with V = max, G_t - V(s_t) is the advantage-to-go
        return state_value[:, :-1]
    if baseline == "mean":  # of the *other* responses: a mean with the own return in it is no constant
        own, n = (returns * mask).sum(-1, keepdim=True), mask.sum(-1, keepdim=True)  # (B,1)
        return ((own.sum() - own) / (n.sum() - n).clamp(min=1)).expand_as(returns)
    return torch.zeros_like(returns)


def policy_weights(returns, token_logprobs, sampler_logprobs, reward_clip):
    """Eqs. 4 and 5, detached. sampler_logprobs None: on policy, rho is 1 by definition, not by division. -> (R,)"""
    weights = returns
    if sampler_logprobs is not None:  # a token's own ratio; what happened to the prefix is left out, as in the release
        weights = (token_logprobs - sampler_logprobs).exp() * weights
    if reward_clip > 0:
        weights = weights.clamp(-reward_clip, reward_clip)
    return weights.detach()  # without it the gradient of rho would count as well


def policy_gradient_loss(token_logprobs, weights):
    """Eq. 6 before the division. (R,), (R,) -> sum. Descending it makes tokens with a positive weight more likely."""
    return -(weights * token_logprobs).sum()


def cross_entropy_to_uniform(student_logits):
    """H(uniform, q) of each row: KL(uniform||q) + log V, not Shannon's entropy of q. (R,V) -> (R,)."""
    return student_logits.logsumexp(-1) - student_logits.mean(-1)


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------
def train(cfg):
    common.check_settings(cfg, value=["max", "mean", "lse"], baseline=["none", "value", "mean"], sync=(1, 10**9),
                          top_k=(0, 10**9), denom=(1e-9, 1e9), reward_clip=(0, 1e9), entropy=(0, 1e9),
                          cut=["optimal", "value"])
    run = common.Run(cfg, __file__)
    if run.finished:
        return run.finished
    device, dtype = run.device, common.compute_dtype(cfg, run.device)

    # models: the teacher is frozen and in the compute dtype, the student keeps fp32 weights and is cast on the fly
    student, teacher, tokenizer = common.load_pair(cfg, device)
    if teacher is None:
        raise common.BadInput("--teacher none: the reward is the teacher's, so name a --teacher")

    # data
    data = common.load_data(cfg, student, teacher, tokenizer, spare=1)  # V of the state after a cut response
    examples, eos = data.train, tokenizer.eos_token_id  # with or without a response: only prompts are used

    # what is called in the loop
    student_fwd = common.response_states(student, cfg.compile)
    teacher_fwd = common.response_states(teacher, cfg.compile)
    sampler = student if cfg.sync == 1 else copy.deepcopy(student).requires_grad_(False)
    on_policy = cfg.sync == 1 and cfg.top_k == 0
    widest = max(max(len(e.prompt), len(e.teacher_prompt)) for e in examples) + cfg.max_response + 1
    edges = [8 * math.ceil(widest * i / 64) for i in range(1, 9)] if cfg.compile else ()  # 8 widths, 8 compilations
    ruler, test_ruler = (common.make_ruler(cfg, teacher, tokenizer, part) for part in (data.valid, data.test))
    before = test_ruler(student)

    # optimizer
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay,
                                  fused=True)
    parts = dict(student=student, optimizer=optimizer, **({} if cfg.sync == 1 else {"sampler": sampler}))
    start = run.start(**parts)
    student.eval()  # no dropout: what is sampled and what is improved are one distribution

    for step in range(start, cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.evaluated(step, ruler(student))
            common.show_samples(run, student, data.valid, tokenizer, cfg)
        if step == cfg.steps:
            break

        # learning rate: linear warm-up, then a cosine down to a tenth
        progress = max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
        lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the student answers the prompts of this step in one batched call; the noise depends on seed and step alone
        if cfg.sync > 1 and step % cfg.sync == 0:
            sampler.load_state_dict(student.state_dict())
        asked = [examples[i] for i in common.step_indices(len(examples), step, cfg)]
        responses, logb = common.sample(sampler, [e.prompt for e in asked], cfg.max_response, top_k=cfg.top_k,
                                        seed=common.noise_seed(cfg.seed, step), eos=eos, compiled=cfg.compile)
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt) + len(responses[i]))  # less padding
        answered, logb = [replace(asked[i], response=responses[i]) for i in order], [logb[i] for i in order]
        size = len(asked) // cfg.accum
        micro = [slice(i, i + size) for i in range(0, len(asked), size)]

        # the teacher scores them; after a response without an end it reads one token more, any token, for V(s_{n+1})
        scored = [e if e.response[-1] == eos else replace(e, response=e.response + [eos]) for e in answered]
        values = []
        for part in micro:
            batch = common.collate(scored[part], teacher, "teacher", edges).to(device)
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                teacher_hidden = teacher_fwd(batch)  # (R,H)
            values.append(common.row_scalars(lambda p, y: teacher_values(p, y, cfg.value), teacher, teacher_hidden,
                                             batch.targets))
        lengths = torch.tensor([len(e.response) for e in answered], device=device)  # (B,)
        ended = torch.tensor([e.response[-1] == eos for e in answered], device=device)  # (B,)
        action_value, state_value, advantage = (  # (B,N+1) each
            common.by_response(torch.cat(v), lengths + ~ended, int(lengths.max()) + 1) for v in zip(*values))
        if cfg.release and not common.total(ended.sum()):
            raise common.BadInput(f"step {step}: 100 % of the {cfg.batch_size} samples reach --max-response "
                                  f"{cfg.max_response} without an end and --release discards such: raise it")
        if step % cfg.log_every == 0 and not ended.any():
            run.print(f"step {step}: none of the samples ends within --max-response {cfg.max_response}: raise it")
        inside = torch.arange(state_value.shape[1] - 1, device=device) < lengths[:, None]  # (B,N); never from ids
        mask, count = counted_tokens(inside, ended, cfg.release, common.total)  # (B,N)
        # a cut response would still collect V(s_{n+1}) at best; added to -V(s_{n+1}) it leaves nothing to subtract
        reward = induced_reward(action_value[:, :-1], state_value, lengths, ended | (cfg.cut == "optimal"))  # (B,N)
        returns = returns_to_go(reward)  # (B,N)
        centred = (returns - state_baseline(returns, state_value, mask, cfg.baseline)) / cfg.denom * mask  # (B,N)

        # one optimizer step over accum micro-batches: sums are divided once, by the count of the whole step
        totals, n_tokens = 0.0, common.total(lengths.sum())
        for part in micro:
            batch = common.collate(answered[part], student, "student", edges).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                student_hidden = student_fwd(batch)  # (R,H)
            token_logprobs = common.token_logprobs(student, student_hidden, batch.targets)  # (R,)
            weights = policy_weights(centred[part][inside[part]], token_logprobs,
                                     None if on_policy else torch.cat(logb[part]).to(device), cfg.reward_clip)  # (R,)
            loss = policy_gradient_loss(token_logprobs, weights)
            if cfg.entropy > 0:
                kept = mask[part][inside[part]]  # (R,)
                loss = loss + cfg.entropy * common.rowwise_loss(lambda q, p, y: (cross_entropy_to_uniform(q),), student,
                                                                student_hidden[kept], batch.targets[kept])[0]
            (loss / count).backward()
            totals = totals + torch.stack([loss.detach() / count, -token_logprobs.detach().sum() / n_tokens])
        common.reduce_gradients(student, totals)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            loss, entropy = totals.tolist()
            run.log(step, loss=loss, advantage=(advantage[:, :-1] * inside).sum(-1).mean().item(),
                    **{"return": returns[:, 0].mean().item()}, entropy=entropy, length=lengths.float().mean().item(),
                    truncated=1 - ended.float().mean().item(), grad_norm=grad_norm.item(), lr=lr)
        run.end_step(step + 1, **parts)

    report = {"teacher": test_ruler(teacher)}
    return run.finish(student, tokenizer, {**report, "before": before, "after": test_ruler(student)})


if __name__ == "__main__":
    sys.exit(common.main(train, Config))
