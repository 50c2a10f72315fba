"""The bug museum: one-line bugs of distillation code. Each still imports and trains; a test catches each.

    python tests/labs/museum.py             plant every bug in turn in a copy: `caught N of N`, in minutes
    python tests/labs/museum.py --show 7    exhibit 7 for students: the line, settings under which it bites, no answers
    python tests/labs/museum.py --only 7    plant and test it, with the answers
    python tests/labs/museum.py --check     every line stands once in its file, every named test exists: a second

An exhibit is caught if its mutant trains three steps with a finite loss, and its *named* test, which passes on the clean
tree, fails on the mutant by an AssertionError. Mutants run in forked children of a process that has torch and
transformers imported, which needs Linux or macOS. An exhibit that survives is a missing test.
"""
import argparse
import contextlib
import importlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Bug:
    file: str
    old: str      # one line, or a piece of one, that occurs once in the file
    new: str
    test: str     # file::name without "tests/test_" and ".py::test_"
    symptom: str
    fine: str     # why the training curve looks fine
    run: dict = field(default_factory=dict)  # settings with which the three steps meet the line


KD, LLMR, DPKD, GOLD, DDK = (f"{name}.py" for name in ("kd_forward", "llmr", "dpkd", "gold", "ddk"))
COMMON, RELEASE, NOISE = "common.py", "tests/controls/llmr_release.py", "tests/controls/gold_noise.py"
EQUATION, CHUNKED = "kd_forward::loss_equals_the_equation", "kd_forward::chunked_loss_and_gradient_equal_the_textbook"
ROWS = "common::rows_predict_exactly_the_response_tokens_incl_eos"
BUGS = [
    # ------------------------------------------------------------------------------ the loss
    Bug(KD, "kl = (logp.exp() * (logp - logq)).sum(-1) ", 'kl = F.kl_div(logp, logq, reduction="none", log_target=True).sum(-1) ', EQUATION,
        "KL(q||p) is minimised instead of KL(p||q): the student drops wordings that the teacher uses.",
        "Both divergences fall to zero together, and the swapped one often looks smaller."),
    Bug(KD, "loss = alpha * tau**2 * kl", "loss = alpha * kl", "kd_forward::tau_squared_keeps_the_size_of_the_gradient",
        "At tau = 4 the KL counts a sixteenth of what --alpha says, so that CE rules.",
        "The loss is smaller and falls smoothly; Adam even hides the size where the KL stands alone.", dict(tau=2.0)),
    Bug(KD, "logq = F.log_softmax(student_logits / tau, -1)", "logq = F.log_softmax(student_logits, -1)",
        "kd_forward::kl_is_zero_with_zero_gradient_where_student_equals_teacher",
        "The student is taught the softened teacher: at tau = 2 it stays too flat for ever.",
        "The loss does reach its minimum, only that the minimum is at another distribution.", dict(tau=2.0)),
    Bug(KD, "logq = F.log_softmax(student_logits, -1) ", "logq = F.log_softmax(student_logits / tau, -1) ", EQUATION,
        "CE is that of a softened student, so that the undivided one becomes overconfident.",
        "With tau = 1, the default, nothing changes at all.", dict(tau=2.0, alpha=0.5)),
    Bug(KD, "kl = (logp.exp() * (logp - logq)).sum(-1) ", "kl = (logp.exp() * (logp - logq)).mean(-1) ", EQUATION,
        "Dividing by the vocabulary makes the KD term 1000 times too small beside CE.",
        "Alone under Adam it trains as before: the optimizer divides the factor out again.", dict(alpha=0.5)),
    Bug(KD, "loss = (1 - alpha) * ce + loss", "loss = alpha * ce + (1 - alpha) * tau**2 * kl", EQUATION,
        "--alpha 1 trains plain SFT, --alpha 0 trains KD.",
        "CE falls and KL falls with it for a while, as each does when the other is trained.", dict(alpha=0.9)),
    Bug(KD, "(sums[0] / n_tokens).backward()", "(sums[0] / len(batch.targets) / cfg.accum).backward()",
        "kd_forward::accumulation_in_the_script_itself",
        "A mean of means: tokens of the micro-batch with the short responses weigh several times more.",
        "The logged loss is computed apart and right, and without accumulation there is no difference.", dict(accum=4)),
    Bug(KD, "n_tokens = common.all_reduce_sum(sum(len(b.targets) for b in micro))", "n_tokens = sum(len(b.targets) for b in micro)", "torchrun::two_processes_train_what_one_does",
        "Under torchrun each process divides by its own tokens: the gradient is N times too large, and a mean of means.", "One process is the whole world, and clipping hides the factor N."),
    Bug(KD, "        optimizer.zero_grad(set_to_none=True)", "        pass", "kd_forward::gradients_do_not_outlive_their_step",
        "Gradients of all past steps add up: a momentum without decay.",
        "Clipping keeps the steps short, Adam divides the growth out, and at first the old gradients point the right way."),
    # ------------------------------------------------------------------------------ rows, shift, masks
    Bug(COMMON, "before = torch.tensor([len(a) - 1 for a in prompts])", "before = torch.tensor([len(a) for a in prompts])", CHUNKED,
        "The shift is missing: each state is asked for the token that it has just read.",
        "The loss falls even faster, since copying the input is easier than predicting."),
    Bug(COMMON, "before = torch.tensor([len(a) - 1 for a in prompts])", "before = torch.tensor([len(a) - 2 for a in prompts])", ROWS,
        "The shift is made twice: the model is trained to predict the next token but one.",
        "Teacher and student are shifted alike, so that their KL falls as it should."),
    Bug(COMMON, "shifted = [[model.config.decoder_start_token_id] + r[:-1] for r in responses]", "shifted = [list(r) for r in responses]", CHUNKED,
        "T5's decoder reads the very token it is to predict.", "A copy is learned at once: the best curve of all."),
    Bug(COMMON, "    responses = [e.response for e in examples]", "    responses = [[t for t in e.response if t != 0] or e.response for e in examples]", ROWS,
        "EOS is taken for padding, for pad == eos: the student never learns to stop.",
        "The loss per token is lower, because the least certain token is gone; only the generated text is endless."),
    Bug(COMMON, "(response + [tokenizer.eos_token_id])[:cfg.max_response]", "(response + [])[:cfg.max_response]", "input::responses_end_with_eos_unless_they_were_cut",
        "No end is in the data: generation runs to --max-response.", "Every token that is left is learned as well as before."),
    Bug(COMMON, "(response + [tokenizer.eos_token_id])[:cfg.max_response]", "response[:cfg.max_response - 1] + [tokenizer.eos_token_id]",
        "input::responses_end_with_eos_unless_they_were_cut",
        "Cut responses get an end where they have none: the student learns to stop in the middle of a sentence.",
        "EOS at a fixed length is easily predicted, so the loss falls."),
    Bug(COMMON, "return start + content[-room:] + end", "return start + content[:room] + end", "common::long_prompts_lose_their_beginning_and_keep_the_template",
        "Long prompts lose their end, where the question usually stands.", "Teacher and student read the same cut text and agree on it."),
    Bug(COMMON, "content = ids(text, split_special_tokens=True)", "content = ids(text)", "common::user_text_never_becomes_a_control_token",
        "A user who writes <|endoftext|> ends the document.", "No training text holds such a string, until one does."),
    Bug(COMMON, 'tokenizer(row["response"] or "", add_special_tokens=False, split_special_tokens=True)', 'tokenizer(row["response"] or "", add_special_tokens=False)',
        "input::responses_end_with_eos_unless_they_were_cut",
        "A response that mentions <|endoftext|> has its end in the middle, and what follows is learned as its continuation.",
        "One row in a million moves no curve."),
    Bug(COMMON, "mask = (torch.arange(tokens.shape[1]) < torch.tensor([len(x) for x in prompts])[:, None]).long()", "mask = torch.ones_like(tokens)",
        "common::padding_is_invisible", "T5 attends to padding: what it says depends on the other prompts of the batch.",
        "Training and evaluation are wrong in the same way."),
    Bug(COMMON, "splits[\"train\"] = [r for r, x in zip(everything, draw) if x >= len(lacking) * cut]", "splits[\"train\"] = everything",
        "input::csv_saved_datasets_and_split_directories", "Test and validation rows are trained on.", "The validation curve is the best you ever had."),
    Bug(COMMON, 'draw = [zlib.crc32(r["prompt"].encode()) % 1000 for r in everything]', 'draw = [zlib.crc32(str(i).encode()) % 1000 for i in range(len(everything))]',
        "input::a_prompt_that_comes_twice_is_in_one_split", "A prompt with two answers is in training and in test: memory counts as generalisation.",
        "Validation improves, and it is the leak that improves it."),
    Bug(COMMON, "order = {e: np.random.default_rng((cfg.seed, e)).permutation(n)", "order = {e: np.random.default_rng(cfg.seed).permutation(n)",
        "common::batches_are_a_function_of_the_step_and_cover_an_epoch", "Every epoch has the same order: the same examples always share a batch.",
        "Shuffled once is nearly as good as shuffled often; nothing shows."),
    Bug(COMMON, "order = {e: np.random.default_rng((cfg.seed, e)).permutation(n)", "order = {e: np.random.permutation(n)",
        "common::batches_are_a_function_of_the_step_and_cover_an_epoch", "The order hangs on a global state: a resumed run sees other data, and some twice.",
        "A resumed curve goes on smoothly from where it stopped."),
    # ------------------------------------------------------------------------------ teacher and vocabulary
    Bug(COMMON, "return weight[:V], None if bias is None else bias[:V]", "return weight, bias",
        "common::heads_of_different_size_are_cut_and_renormalised", "Qwen2.5's padded heads (151,936 and 152,064) do not fit together: a crash, or mass on padding.",
        "Pairs with heads of one size, the usual test, never notice."),
    Bug(COMMON, "teacher.requires_grad_(False)", "teacher.requires_grad_(False).train()", "common::a_teacher_is_frozen_and_in_eval_mode",
        "Dropout is on in the teacher: its distribution is blurred, and another one at each step.", "The student learns the blurred mean, and the loss falls towards it."),
    Bug(COMMON, "teacher.requires_grad_(False)", "teacher.requires_grad_(True)", "common::a_teacher_is_frozen_and_in_eval_mode",
        "A graph is built through the teacher: its activations are kept for a backward pass that never comes.", "Only memory tells: the numbers are the same."),
    Bug(COMMON, "prompt if same else encode_for_teacher(row[\"prompt\"])", "prompt if same else encode(row[\"prompt\"])",
        "kd_forward::a_teacher_with_its_own_template_scores_the_same_response_tokens", "The teacher reads the student's template, on which it was never trained.",
        "KL to a confused teacher falls as well as KL to a good one.", dict(teacher_template="Sort: {prompt} =")),
    Bug(COMMON, "load_model(paths[\"student\"], device, seed=cfg.seed)", "load_model(paths[\"student\"], device, torch.bfloat16, seed=cfg.seed)", "kd_forward::a_bf16_checkpoint_trains_in_fp32",
        "Weights and AdamW in bf16: updates below 0.4 % of a weight are rounded away.", "Early steps are large enough; training just stops improving sooner."),
    Bug(COMMON, "None if bias is None else bias.to(dtype)).float()", "None if bias is None else bias.to(dtype))",
        "common::bf16_states_give_fp32_logits_and_fp32_head_gradients", "Softmax over bf16 logits: gradients are off by 5 % and more where student and teacher are close.",
        "In fp32 runs nothing changes, and in bf16 the noise looks like noise."),
    Bug(COMMON, "most = max(1, (2**30 if device.type == \"cuda\" else 2**24) // (4 * vocab))", "most = max(1, rows)", "common::logits_exist_one_chunk_at_a_time",
        "Both models' logits of all rows exist at once: out of memory at V = 152,000.", "The numbers are the same, on a small vocabulary."),
    Bug(COMMON, "loss = losses[0].sum()", "loss = losses[0].mean()", CHUNKED, "Rows of a short last chunk weigh more, and all weigh too little.",
        "The logged sums are right; the gradient's size is hidden by clipping and Adam."),
    Bug(COMMON, "scale = lambda g: None if g is None else g * grad[0].to(g.dtype)", "scale = lambda g: g", CHUNKED,
        "The incoming gradient is ignored, so that the division by the tokens is lost.", "Clipping to norm 1 makes every step look normal."),
    Bug(COMMON, "batch.ids = batch.teacher_batch.ids = ids", "batch.ids, batch.teacher_view = ids, batch.teacher_batch", "common::a_step_leaves_nothing_to_the_garbage_collector",
        "Each batch holds itself, so that its tensors live until the garbage collector comes: memory creeps up for hours.",
        "Nothing but memory changes: the same losses to the last bit, and minutes show no growth."),
    Bug(COMMON, "self.known[batch.ids] = True", "pass", "kd_forward::the_teacher_runs_once_for_each_remembered_response",
        "The remembered states are never used: the teacher runs again every epoch.", "The curve is identical; only the bill is not.", dict(cache_gib=1.0)),
    # ------------------------------------------------------------------------------ sampling and measuring
    Bug(COMMON, "temperature=1.0, top_k=0, seed=0, eos=None", "temperature=1.0, top_k=50, seed=0, eos=None", "common::sampled_logprobs_are_those_of_the_model",
        "A default of top_k = 50 makes \"on-policy\" samples off-policy.", "Samples look better than honest ones."),
    Bug(COMMON, "    model.eval()\n", "    pass\n", "common::sampling_leaves_training_mode_and_global_random_state_alone",
        "Sampling with dropout: from a distribution that is never scored, with random numbers that training misses.", "The text is a little worse, as text of a small model is."),
    Bug(COMMON, "position_ids = (mask.cumsum(-1) - 1).clamp(min=0)", "position_ids = at.expand(B, P)", "common::greedy_sampling_equals_generate",
        "Left-padded prompts start at position 5, say: GPT-2's absolute positions are wrong for all but the longest.", "Training is right-padded and right; one prompt alone, or Llama, samples well."),
    Bug(COMMON, "n = t.index(eos) + 1 if eos in t", "n = max(1, t.index(eos)) if eos in t", "common::sampled_responses_keep_their_first_eos_and_nothing_after_it",
        "EOS is stripped from the samples that one trains on, so that stopping is never rewarded.", "Texts look right, for a decoder skips EOS anyway.", {}),
    Bug(COMMON, "    student.eval()  # no dropout in what is reported", "    pass", "evaluation::dropout_plays_no_part_in_what_is_measured",
        "Validation is measured with dropout on.", "The curve has the right shape, a bit too high."),
    Bug(COMMON, "return (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)", "return (logq.exp() * (logq - logp)).sum(-1), (logp.exp() * (logp - logq)).sum(-1)",
        "evaluation::kl_directions_on_two_tokens_by_hand", "The table calls reverse KL forward, and the paper that you refute was right.", "Both fall in most runs."),
    Bug(COMMON, 'm["ce"] = nll / sum(len(e.response) for e in labelled)', 'm["ce"] = nll / len(labelled)', "evaluation::ce_is_a_mean_over_tokens",
        "Cross entropy a response is reported as cross entropy a token.", "It falls by the same share."),
    # ------------------------------------------------------------------------------ the run
    Bug(COMMON, 'os.replace(file.with_suffix(".tmp"), file)', 'shutil.copy(file.with_suffix(".tmp"), file)',
        "input::a_checkpoint_is_replaced_in_one_piece", "A kill in the middle of the copy leaves half a checkpoint and no older one.", "It works every time that nobody pulls the plug."),
    Bug(COMMON, 'torch.set_rng_state(state["rng"])', "pass", "kd_forward::resume_ends_bitwise_like_an_uninterrupted_run",
        "A resumed run has other dropout masks: it cannot be repeated.", "One dropout mask is as good as another."),
    Bug(COMMON, "for key, part in parts.items():", "for key, part in list(parts.items())[:1]:",
        "kd_forward::resume_ends_bitwise_like_an_uninterrupted_run", "AdamW's moments start from zero after each resumption.", "A bump of a few steps, blamed on the data."),
    # ------------------------------------------------------------------------------ llmr.py
    Bug(LLMR, "next_value = F.pad(state_value[:, 1:], (0, 1)) ", "next_value = state_value ", "llmr::the_last_position_does_not_wrap_around",
        "A token is compared with the state that it was chosen in, not with the state that it leads to: the last one is never held to account.",
        "All rewards but the last become advantages, whose sum is the objective anyway."),
    Bug(RELEASE, "reward = action_value - state_value[:, 1:].masked_fill", "reward = action_value - state_value[:, :-1].roll(-1, 1).masked_fill",
        "controls::the_last_position_does_not_wrap_around", "A roll by one puts the first state's value into the last place of a response that was cut.",
        "Few responses are cut, and rewards have no known size.", dict(discard=False)),
    Bug(RELEASE, "state_value[:, 1:].masked_fill(terminal, 0.0)", "state_value[:, 1:]", "controls::the_last_position_does_not_wrap_around",
        "The state behind the end has a value: stopping is punished by whatever would come after it.", "`return` still rises, by longer responses.", dict(discard=False)),
    Bug(LLMR, "return (action_value - next_value).masked_fill(at >= lengths[:, None], 0.0)", "return action_value - next_value", "llmr::what_lies_beyond_a_response_changes_nothing",
        "Rewards of padding flow back into every token before it.", "They are nearly the same constant for all, which a policy gradient forgives for a while."),
    Bug(LLMR, "return reward.flip(-1).cumsum(-1).flip(-1)", "return reward.cumsum(-1)", "llmr::loss_equals_the_equations",
        "A token is credited with the past, on which it had no influence.", "The sum of rewards, which is what one plots, is the same."),
    Bug(LLMR, "return (ratio * gain).detach()", "return ratio * gain", "llmr::rho_is_one_on_policy_and_the_ratio_where_the_sampler_is_stale",
        "The gradient of the importance ratio counts as well.", "On policy there is no ratio and nothing changes.", dict(sync=2)),
    Bug(LLMR, "return -(weights * token_logprobs).sum()", "return (weights * token_logprobs).sum()", "llmr::policy_gradient_is_the_gradient_of_the_expected_return",
        "The policy is pushed away from what is rewarded.", "The loss falls: that is what descending it does. Its value means nothing."),
    Bug(LLMR, "of_others = (all_own - own) / (all_n - n).clamp(min=1)", "of_others = all_own / all_n",
        "llmr::policy_gradient_is_the_gradient_of_the_expected_return", "A baseline that contains the response's own return is biased.", "With a batch of 64 the bias is a 64th.", dict(baseline="mean")),
    Bug(RELEASE, "return inside, total(len(ended))", "return inside, total(inside.sum())", "controls::discarding_and_the_cut_value_break_the_shift_invariance",
        "Dividing by a number of sampled tokens makes the gradient depend on an arbitrary constant in the teacher's logits.", "Every language-model loss is a mean over tokens, so this one looks right too.", dict(discard=False)),
    Bug(RELEASE, "on_policy = cfg.sync == 1 and cfg.top_k == 0", "on_policy = cfg.sync == 1", "controls::llmr_release_weights_by_the_samplers_own_logprobs",
        "Truncated samples are treated as if they were the policy's own.", "Truncation lowers the variance: the curve is smoother.", dict(top_k=5, sync=1, discard=False)),
    Bug(LLMR, "else copy.deepcopy(student).requires_grad_(False)", "else student", "llmr::the_loop_weights_by_the_samplers_own_logprobs_and_draws_by_seed_and_step",
        "The stale copy is no copy: --sync 50 changes nothing that was to be studied.", "It trains better than it should.", dict(sync=4)),
    Bug(LLMR, "seed=common.noise_seed(cfg.seed, step)", "seed=common.noise_seed(cfg.seed, 0)", "llmr::the_loop_weights_by_the_samplers_own_logprobs_and_draws_by_seed_and_step",
        "The same noise at every step: few different samples are ever seen.", "The same samples can be learned by heart."),
    Bug(LLMR, "    student.eval()  # no dropout", "    student.train()  # no dropout", "llmr::the_loop_weights_by_the_samplers_own_logprobs_and_draws_by_seed_and_step",
        "What is improved, with dropout, is not what was sampled, without.", "Dropout looks like ordinary noise of a policy gradient."),
    # ------------------------------------------------------------------------------ dpkd.py
    Bug(DPKD, "margin = beta * (rho_t - rho_s)", "margin = beta * (rho_s - rho_t)", "dpkd::preference_loss_equals_the_equation_in_loops",
        "The student is to prefer its own text to the teacher's.", "The loss falls and the margin rises, as always when one descends it."),
    Bug(DPKD, "rho_t, rho_s = rho_t / n_t, rho_s / n_s\n    margin = beta * (rho_t - rho_s)", "rho_t, rho_s = rho_t / n_t, rho_s / n_s\n    margin = beta * (logq_t - logq_s)", "dpkd::2_a_student_equal_to_the_teacher_has_nothing_to_learn",
        "Without the teacher's log-probs the own text is unlearned without end.", "The margin of the training pairs rises faster than before."),
    Bug(DPKD, "return -F.logsigmoid(margin), margin", "return -torch.log(torch.sigmoid(margin)), margin", "dpkd::6_equals_dpo_with_the_teacher_as_reference",
        "Infinite for margins below -104, which long responses do reach.", "All is well until a pair is bad enough."),
    Bug(DPKD, "return token_logprobs.new_zeros(len(batch.lengths)).index_add(0, batch.owner, token_logprobs)",
        "return token_logprobs.new_zeros(len(batch.lengths)).index_add(0, batch.owner, token_logprobs) / batch.lengths",
        "dpkd::6_prompts_and_pads_do_not_count_and_eos_does", "A mean over tokens in place of log q(y|x): length normalisation that nobody asked for.", "Margins are smaller and calmer."),
    Bug(DPKD, 'elif step == 0 or cfg.negatives == "epoch" and epoch(step) != epoch(step - 1):', "elif step == 0:", "dpkd::resume_ends_bitwise_like_an_uninterrupted_run",
        "The negatives are those of step 0 for ever: at a small beta the student runs beyond the teacher and collapses.", "The margin of the stale pairs rises all the time.", dict(negatives="epoch")),
    Bug(DPKD, 'scored = fixed_logprobs(teacher, drawn, cfg, "teacher").tolist()', 'scored = fixed_logprobs(teacher, drawn, cfg, "student").tolist()',
        "dpkd::every_negative_is_the_students_own_and_scored_by_the_teacher", "The teacher scores y_s under the student's template and y_t under its own.",
        "With one template for both it is the same thing.", dict(teacher_template="Sort: {prompt} =")),
    Bug(DPKD, '"preference": losses.sum() / n_pairs,', '"preference": losses.mean(),', "dpkd::accumulation_gives_one_result",
        "With --accum 8 the preference counts eight times.", "Without accumulation it is the same number.", dict(accum=4)),
    # ------------------------------------------------------------------------------ gold.py
    Bug(GOLD, "return -logits.logsumexp(-1)", "return -logits.log_softmax(-1).logsumexp(-1)", "gold::energy_is_minus_logsumexp_and_shifts_with_the_logits",
        "The energy of normalised logits is 0 everywhere: ranks are rounding noise, so feedback is random.", "Random feedback still brings variety, and accuracy rises with the budget."),
    Bug(GOLD, "key=lambda i: energies[i])", "key=lambda i: -energies[i])", "gold::the_band_is_relative_to_the_samples_that_are_there",
        "High and low energy are exchanged: what the student knows already is fed back.", "Samples come in, all well-formed, and the student learns them."),
    Bug(GOLD, "order[n * 5 // 10:n * 8 // 10]", "order[4:6]", "gold::the_band_is_relative_to_the_samples_that_are_there",
        "Ranks are fixed for batches of 8: for 16 samples it feeds back familiar ones, for 4 none.", "With the default round size hardly anything changes."),
    Bug(GOLD, "reverse_ce = -math.log(1e-4) * (1 - (-ce).exp()) ", "reverse_ce = -math.log(1e-4) * (-ce).exp() ", "gold::sce_is_its_equation_with_the_one_hot_clamped",
        "Reverse CE punishes the probability of the right label.", "The loss falls: it is easy to be wrong."),
    Bug(GOLD, 'if s["round"] == t - 1 and s["fed"]] if t % 2 == 0 else []', 'if s["fed"]]',
        "gold::feedback_is_shown_on_even_rounds_only_and_the_ood_prompt_sees_two_training_samples",
        "All feedback so far is shown in every round: the prompt grows until it is cut.", "More examples in a prompt make better samples, at first."),
    Bug(GOLD, "return [x / len(e.response) for x, e in zip(sums.tolist(), examples)]", "return [x / cfg.max_response for x in sums.tolist()]",
        "gold::energies_skip_padding", "The mean energy of a response depends on how long the longest may be: short ones look familiar.",
        "Where all labels have one word every energy is off by one factor, and ranks stay."),
    Bug(GOLD, "scorer=scorer, scorer_optimizer=scorer_optimizer,", "scorer_optimizer=scorer_optimizer,", "gold::a_run_killed_while_samples_are_written_asks_for_no_text_twice",
        "The scorer is not in the checkpoint: a resumed run judges by an untrained one.", "Energies have no zero, so other energies raise no suspicion."),
    # ------------------------------------------------------------------------------ ddk.py
    Bug(DDK, "return (student_ce - teacher_ce).clamp", "return (teacher_ce - student_ce).clamp", "ddk::gap_and_prior_of_a_worked_example",
        "The domain in which the student lags most gets the least data.", "CE on what is drawn falls, and faster: the easy domains are drawn."),
    Bug(DDK, "log_psi = (log_shares + rho).log_softmax(-1)", "log_psi = rho.log_softmax(-1)", "ddk::mixture_of_a_worked_example",
        "The old shares are forgotten: no memory, and shares that jump.", "The mixture does follow the gaps, as it should."),
    Bug(DDK, "uniform = torch.full_like(rho, log((1 - alpha) / len(rho)))", "uniform = torch.full_like(rho, log((1 - alpha) / 2))", "ddk::mixture_equals_the_equation_written_out",
        "A floor for two domains, left over from a small trial: with six the shares add up to 2.", "What draws by them divides by their sum and says nothing."),
    Bug(DDK, "kl = (logp.exp() * (logp - logq)).sum(-1) ", 'kl = F.kl_div(logp, logq, reduction="none", log_target=True).sum(-1) ', "ddk::loss_equals_the_equation_in_loops",
        "KL(q||p) in place of KL(p||q).", "CE carries the loss; its small KL term falls either way."),
    Bug(DDK, "shares = sampler.log_shares.exp() if steered and step >= cfg.interval else fixed", "shares = sampler.log_shares.exp() if steered else fixed",
        "ddk::interval_zero_is_drawn_in_natural_proportion_whatever_the_gaps", "The prior is drawn from in interval 0, where D_0 is a random sample.",
        "It is one interval of twenty."),
    Bug(DDK, 'for k in ("sizes", "log_shares", "drawn", "total", "seconds")', 'for k in ("sizes", "log_shares", "total", "seconds")',
        "ddk::a_resumed_run_ends_bit_by_bit_where_it_would_have_ended", "The cursors are not in the checkpoint: after a resumption the first sequences come again.",
        "Sequences seen before have a lower loss."),
    Bug(DDK, 'm = {"worst_gap": rho.max().item()', 'm = {"worst_gap": rho.mean().item()', "ddk::a_run_reports_gaps_and_follows_them",
        "The number that the method works on is a mean, in which one bad domain drowns.", "It falls."),
    Bug(DDK, "torch.multinomial(shares, size, replacement=True, generator=noise)", "torch.multinomial(shares, size, replacement=True)",
        "ddk::a_restored_sampler_draws_what_the_first_would_have_drawn", "The draws hang on the global random state, which dropout and evaluation move too.",
        "One random draw is as good as another, until a run is to be repeated."),
    # ------------------------------------------------------------------------------ the loops: right functions, wrong rows
    Bug(GOLD, "held_out, scorer, to_example, cfg)\n        if t %", "held_out, student, to_example, cfg)\n        if t %", "loops::energies_are_those_of_the_scorer_as_it_is_after_its_training",
        "Energies are the untrained student's: what it finds strange at the start it finds strange for ever, so feedback never moves on.",
        "The scorer trains and its loss falls; nobody asks it anything."),
    Bug(GOLD, 'known = [to_example(s["sample"]) for s in samples]', 'known = [to_example(s["sample"]) for s in samples if s["round"] >= t - cfg.retrain]',
        "loops::the_scorer_trains_by_plain_ce_on_all_samples_so_far", "The scorer sees only what came since its last training and forgets the rest, which looks strange again.",
        "It is faster, and fewer samples are fitted more closely."),
    Bug(GOLD, "lambda logits, _, targets: sce_loss(logits, targets, 1.0, 0.0)", "lambda logits, _, targets: sce_loss(logits, targets, cfg.alpha, cfg.beta)", "loops::the_scorer_trains_by_plain_ce_on_all_samples_so_far",
        "The scorer too is trained by SCE, which hardly moves logits of what it finds unlikely: the very thing that it is to tell.", "Its loss falls as the final student's does."),
    Bug(GOLD, "            train_scorer(scorer,", "            scorer.load_state_dict(student.state_dict())\n            train_scorer(scorer,",
        "loops::the_scorer_goes_on_between_trainings_with_its_weights_and_its_optimizer", "Each training starts anew: with few epochs the scorer stays close to the untrained student.",
        "Each of its trainings has a curve that falls from far above."),
    Bug(GOLD, 'real = pick_shots(task, rows["train"], task["shots"]', 'real = pick_shots(task, rows["test"], task["shots"]', "loops::the_llm_is_shown_training_rows_only",
        "The LLM is shown test rows and writes more of the kind: the test leaks into the training data.", "Accuracy is better than it should be."),
    Bug(GOLD, 'examples = [to_example(s["sample"]) for s in samples[:cfg.budget]]', 'examples = [to_example(s["sample"]) for s in samples[:cfg.budget] if s["opening"] == "plain"]', "loops::samples_of_the_ood_prompt_are_trained_on_as_well",
        "Half of the budget, the half that was to bring what is rare, is used for feedback only.", "The other half is trained on twice as often, and its loss is lower."),
    Bug(NOISE, 'rng.choice([w for w in words if w != s["label"]])', "rng.choice(words)", "controls::planted_noise_makes_the_share_of_labels_wrong_and_nothing_else",
        "A wrong label may be the right one: of two labels half of the noise is none.", "Accuracy falls with the noise, only half as fast.", dict(noise=0.5)),
    Bug(DDK, "            rho = domain_gap(student_ce, teacher_ce)", "            rho = domain_gap(domain_ce(student, data.test, cfg), teacher_test)",
        "loops::the_mixture_is_steered_by_validation_sequences_and_never_by_test_ones", "The mixture is tuned on the split that the gaps are reported from.",
        "The gaps of both splits are close, and they fall."),
    Bug(LLMR, "weights) / n_responses", "weights) / n_tokens", "loops::llmr_steps_with_the_gradient_of_its_equations",
        "Divided by the tokens sampled: steps with long samples count less, and a constant in the teacher's logits changes the gradient.",
        "Every language-model loss is a mean over tokens; Adam hides the size."),
    Bug(LLMR, "examples, eos = data.train, tokenizer", "examples, eos = data.train + data.valid, tokenizer", "loops::llmr_trains_on_prompts_of_the_train_split_only_and_on_all_of_them",
        "Validation prompts are trained on: no response of theirs is needed, so why not?", "Validation improves, and it is the leak that improves it."),
    Bug(DPKD, "batch_s.lengths, cfg.beta, cfg.length_norm)", "batch.lengths, cfg.beta, cfg.length_norm)", "loops::dpkd_steps_with_the_gradient_of_its_equations",
        "Both sums are divided by |y_t|: what length normalisation was for, the length of y_s, still counts.", "Where both are about as long, nothing changes.", dict(length_norm=True)),
    Bug(DPKD, "common.noise_seed(cfg.seed + 1, step)", "common.noise_seed(cfg.seed, step)", "loops::the_noise_of_y_s_is_never_that_of_y_t_nor_of_another_step",
        "y_s is drawn with y_t's noise: the closer the student comes, the more often both are the same text.", "`same` rises, which looks like success."),
    Bug(DPKD, "evaluate_fresh = fresh_pairs(teacher, student, data.valid, ", "evaluate_fresh = fresh_pairs(teacher, student, data.train[:len(data.valid)], ", "loops::fresh_pairs_come_from_validation_prompts",
        "The margin of fresh pairs is one on training prompts, which the anchor has taught by heart.", "It rises to 0 sooner."),
    Bug(KD, "teacher_hidden = teacher_fwd(batch.teacher_batch) if", "teacher_hidden = teacher_fwd(batch) if", "loops::kd_steps_with_the_gradient_of_its_equation",
        "The teacher reads the student's prompt: --teacher-template is ignored, and an instruction that it needs is missing.",
        "With one template for both it is the same thing; the KL falls, towards a worse teacher.", dict(teacher_template="Sort: {prompt} =")),
    Bug(COMMON, "truncated(logits / temperature if temperature > 0 else logits, top_k, top_p)", "truncated(logits, top_k, top_p) / (temperature or 1)",
        "loops::temperature_is_applied_before_top_p", "top-p is decided at temperature 1 and the temperature applied after it: cold samples come from too many tokens, hot ones from too few.",
        "At temperature 1, or without top-p, it is the same; top-k keeps the same tokens either way."),
    Bug(COMMON, "cfg.max_response, cfg.seed]", "cfg.max_response]", "loops::teacher_answers_differ_between_seeds_and_come_again_with_the_seed",
        "All seeds train on the same teacher answers: the spread over seeds is too small.", "Each run by itself is right.", dict(responses="teacher")),
    Bug(COMMON, 'from_model = labelled if cfg.kl_on == "references" else drawn', 'from_model = labelled if cfg.kl_on == "references" else from_teacher', "loops::kl_qp_is_measured_on_the_students_samples_and_kl_pq_on_the_teachers",
        "KL(q||p) is measured where the teacher goes: a student that wanders off where it is alone is not found out.", "The number is smaller and calmer, and it falls."),
    # ------------------------------------------------------------------------------ what is read, logged and reported
    Bug(KD, '    student.train()\n', '    student.eval()\n', "runs::every_step_has_dropout_but_those_of_llmr_and_dpkd",
        "The student trains without the dropout of its configuration, from the second epoch on to its cost.", "Losses fall faster without noise, and evaluation never had any."),
    Bug(LLMR, '[e.response[-1] == eos for e in answered]', '[len(e.response) < cfg.max_response for e in answered]', "llmr::an_end_in_the_last_place_that_is_allowed_is_an_end",
        "A response whose EOS stands in the last place that is allowed counts as cut: `no_end` asks one to raise --max-response that is long enough.", "It is a number of the log; nothing is trained by it."),
    Bug(LLMR, 'return action_value, state_value, action_value - greatest', 'return action_value, state_value, action_value - state_value', "llmr::the_advantage_is_below_the_likeliest_token_whatever_v_is",
        "`advantage` is measured against V: with --value mean it is above 0, and runs with other V do not compare.", "It rises, as the objective does; with the default, max, it is right."),
    Bug(DPKD, 'n_s = torch.tensor([len(e.response) for e in fresh_s])', 'n_s = torch.tensor([len(e.response) for e in fresh_t])', "dpkd::the_margin_of_fresh_pairs_divides_each_text_by_its_own_length",
        "`fresh_margin` normalises y_s by the length of y_t: the curve that is watched is not that of Eq. 9.", "The training loss has a line of its own, which is right."),
    Bug(DPKD, 'seed=seed(-2))', 'seed=seed(-1))', "dpkd::fresh_y_s_have_other_noise_than_fresh_y_t_and_than_the_pairs_of_any_step",
        "Fresh pairs share their noise: the closer the student comes, the more often y_s repeats y_t, a margin of 0 that says nothing.", "`fresh_margin` rises to 0 sooner."),
    Bug(GOLD, 'real + feedback + fresh[:2], labels[1], "ood"', 'real + feedback + fresh[:2], labels[0], "ood"', "gold::labels_are_drawn_for_each_sample_apart",
        "V_t has the labels of X_t again: half as many draws, so that the counts of the labels are twice as uneven.", "Each label comes as often as before in the mean."),
    Bug(GOLD, 't > 0 and t % cfg.retrain == 0', 't > 0 and (t + 1) % cfg.retrain == 0', "gold::the_scorer_is_trained_every_retrain_rounds_at_its_own_rate",
        "The scorer is trained a round early, on one round fewer than is said.", "With --retrain 1 nothing changes but round 0, with 12 hardly anything does."),
    Bug(GOLD, 'scorer.parameters(), lr=cfg.scorer_lr', 'scorer.parameters(), lr=cfg.lr', "gold::the_scorer_is_trained_every_retrain_rounds_at_its_own_rate",
        "--scorer-lr has no effect: the scorer is trained at the peak rate of the final student.", "It trains; and energies have no scale to be missed."),
    Bug(GOLD, 'for j in order[i:i + cfg.batch_size]]', 'for j in range(i, min(i + cfg.batch_size, len(examples)))]', "gold::the_scorer_sees_every_sample_once_a_pass_in_a_new_order",
        "Batches of the scorer hold samples of the same few rounds, in the same order in every pass: it ends on the newest.", "Its loss falls, lower even within each batch."),
    Bug(GOLD, 'sorted(task["labels"], key=len, reverse=True)', 'sorted(task["labels"], key=len)', "gold::a_label_that_begins_like_another_is_not_taken_for_it",
        "An answer `sport news` is read as `sport`: the LLM's own score, which the student is compared with, is too low.", "No task of the table has two such labels. Yours may."),
    Bug(DDK, 'first = step == 0 or cfg.mix', 'first = step == start or cfg.mix', "ddk::a_run_that_resumes_at_the_first_step_of_an_interval_keeps_its_old_shares",
        "A run that is resumed at the first step of an interval forgets its shares and starts from the prior.", "--save-every 500 and --interval 30 meet every 1500 steps."),
    Bug(DDK, 'teacher_test = domain_ce(teacher, data.test, cfg)', 'teacher_test = domain_ce(teacher, data.valid, cfg)', "ddk::the_gaps_of_the_result_are_those_of_the_test_split_for_both_models",
        "The student on test sequences is compared with the teacher on validation ones: a gap has the difference of the splits in it.", "The teacher's own gaps are 1 as they must be, and the student's fall."),
    Bug(COMMON, 'zeros.index_add_(0, batch.owner[rows], values)', 'zeros.index_add_(0, batch.owner[:len(values)], values)', "evaluation::a_measurement_does_not_depend_on_the_size_of_chunks",
        "What later chunks measure is booked to the first responses: the mean is right, each response wrong, and with it energies and margins.", "Small vocabularies have one chunk."),
    Bug(COMMON, 'float(scores @ weights / weights.sum())', 'float(scores @ weights / len(weights))', "gold::rows_count_by_their_weights_whatever_those_add_up_to",
        "Weighted accuracy is divided by the number of rows, not by their weights: too small by a factor, one for all runs.", "The curve has the right shape, and compares as it should."),
    Bug(COMMON, 'start = whole[:at] + ids(before)', 'start = ids(before)', "common::a_prompt_begins_as_the_tokenizer_begins_a_text",
        "Llama reads prompts without their begin-of-sequence token, with which it was trained throughout.", "Teacher and student are both a bit worse, and agree on it; GPT-2 and Qwen have no such token."),
    Bug(DPKD, 'epoch(step) != epoch(step - 1)', 'epoch(step) != epoch(step + 1)', "dpkd::negatives_of_an_epoch_are_drawn_before_its_first_step",
        "Negatives are drawn a step too early: the first epoch's last step uses the next one's, which is then a step old.", "Once an epoch it is, either way.", dict(negatives="epoch")),
    Bug(COMMON, "+ [tokenizer.eos_token_id]\n        self.answers", "+ []\n        self.answers", "answers::exact_mass_is_the_probability_of_sampling_a_right_answer",
        "Right answers are scored without their EOS: a student that never stops has all the mass.", "A trained student does stop, nearly always: the number is hardly larger."),
]


def show(number):
    b = BUGS[number - 1]
    print(f"Exhibit {number}: {b.file}\n\n- {b.old.strip()}\n+ {b.new.strip()}\n\n"
          "1. What will be seen, and where? Predict it before you plant it.\n2. Which test fails? Find it by its name first.\n"
          "3. Why does the training curve look fine?")
    if b.run:
        print("Settings with which it bites: " + ", ".join(f"{k} = {v}" for k, v in b.run.items()))


# ---------------------------------------------------------------------------------------------------------------
def child(job, seconds=120):
    """Fork; job() -> a string, through a file. A child that dies or takes too long has a string, too."""
    with tempfile.NamedTemporaryFile("r+") as told:
        pid = os.fork()
        if not pid:
            os.setsid()  # so that what it starts can be ended with it
            signal.alarm(seconds)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            try:
                said = job()
            except BaseException as e:
                said = f"{type(e).__name__}: {str(e).strip().splitlines()[:1]}"
            Path(told.name).write_text(said)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return Path(told.name).read_text() or f"the child ended with {status}"


def enter(tree):
    os.chdir(tree)
    os.environ["XDG_CACHE_HOME"] = f"{tree}/cache"
    sys.path[:] = [str(tree / "tests"), str(tree)] + [p for p in sys.path if ROOT not in (place := Path(p or ".").resolve(), *place.parents)]


def trains(tree, bug):
    """The mutant imports and trains three steps."""
    def job():
        enter(tree)
        conftest = importlib.import_module("conftest")
        script = "kd_forward" if bug.file == COMMON else bug.file.removesuffix(".py").replace("/", ".")
        cfg = conftest.any_run(script, tree, tree / "run", **{"steps": 3, "save_every": 2, "eval_every": 9, "eval_rows": 2, **bug.run})
        importlib.import_module(script).train(cfg)
        losses = [r["loss"] for r in map(json.loads, open(tree / "run/log.jsonl")) if "loss" in r]
        return "ok" if len(losses) == 3 and all(map(math.isfinite, losses)) else f"losses {losses}"
    return child(job)


def outcomes(tree, names):
    """Run tests -> {name: "passed" or the type of the exception}."""
    def job():
        enter(tree)
        import pytest

        class Watch:
            found = {}

            @pytest.hookimpl(wrapper=True)
            def pytest_runtest_makereport(self, item, call):
                report = yield
                if report.when == "call" or call.excinfo:
                    name = item.nodeid.split("[")[0].removeprefix("tests/test_").replace(".py::test_", "::")
                    if self.found.get(name, "passed") == "passed":
                        self.found[name] = call.excinfo.typename if call.excinfo else "passed"
                return report
        nodes = sorted({"tests/test_" + n.replace("::", ".py::test_") for n in names})
        pytest.main(["-q", "-o", "addopts=", "-p", "no:cacheprovider", *(["-x"] if len(nodes) == 1 else []), *nodes], plugins=[Watch()])
        return json.dumps(Watch.found)
    said = child(job, 120 * len(names))
    return json.loads(said) if said.startswith("{") else {"": said}


def plant(source, tree, bug):
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns(".*", "out", "*.png", "__pycache__", "*.jsonl", "cache"))
    if bug:
        text = (tree / bug.file).read_text()
        assert text.count(bug.old) == 1, f"{bug.file} holds {text.count(bug.old)} times: {bug.old}"
        (tree / bug.file).write_text(text.replace(bug.old, bug.new))


def check():
    """What can be said without running anything. -> whether something is wrong."""
    wrong, tests = [], {}
    for i, b in enumerate(BUGS, 1):
        if (n := (ROOT / b.file).read_text().count(b.old)) != 1:
            wrong.append(f"{i}: {b.file} holds {n} times: {b.old}")
        if b.old == b.new:
            wrong.append(f"{i}: nothing is changed")
        file, _, name = b.test.partition("::")
        path = ROOT / f"tests/test_{file}.py"
        if file not in tests:
            tests[file] = path.read_text() if path.exists() else ""
        if f"def test_{name}(" not in tests[file]:
            wrong.append(f"{i}: there is no test {name} in {path.relative_to(ROOT)}")
    print("\n".join([*wrong, f"{len(BUGS)} exhibits, {len(wrong)} wrong"]))
    return bool(wrong)


def numbered(text):
    if not text.isdigit() or not 1 <= int(text) <= len(BUGS):
        raise argparse.ArgumentTypeError(f"there are exhibits 1 to {len(BUGS)}")
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    exhibit = dict(type=numbered, metavar=f"1..{len(BUGS)}")
    parser.add_argument("--show", **exhibit)
    parser.add_argument("--only", nargs="+", **exhibit)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.show:
        return show(args.show)
    if args.check:
        return check()
    import numpy  # noqa: F401  # imported here, once, and inherited by every child
    import pytest  # noqa: F401
    import torch
    import transformers
    torch.set_num_threads(1)
    [getattr(transformers, n) for n in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoTokenizer", "GPT2LMHeadModel", "LlamaForCausalLM",
                                        "T5ForConditionalGeneration", "Qwen2ForCausalLM", "OPTForCausalLM", "PreTrainedTokenizerFast", "StaticCache")]
    os.environ["HF_HUB_OFFLINE"] = "1"
    begin, caught, chosen = time.time(), 0, [(i, b) for i, b in enumerate(BUGS, 1) if i in (args.only or [i])]
    with tempfile.TemporaryDirectory() as root:
        root = Path(root).resolve()
        plant(ROOT, root / "clean", None)
        clean = outcomes(root / "clean", [b.test for _, b in chosen])
        for i, b in chosen:
            tree = root / f"bug{i}"
            plant(root / "clean", tree, b)
            first, end = trains(tree, b), outcomes(tree, [b.test]).get(b.test)
            shutil.rmtree(tree)
            good = clean.get(b.test) == "passed" and first == "ok" and end == "AssertionError"
            caught += good
            print(f"{i:3d} {'caught' if good else 'MISSED'}  {b.file:<18} {b.test}" +
                  ("" if good else f"  (clean: {clean.get(b.test, clean)}; three steps: {first}; test: {end})"), flush=True)
            if args.only:
                print(f"- {b.old.strip()}\n+ {b.new.strip()}\n{b.symptom}\nWhy the curve looks fine: {b.fine}\n")
    print(f"{time.time() - begin:.0f} s\ncaught {caught} of {len(chosen)}")
    return caught < len(chosen)


if __name__ == "__main__":
    sys.exit(main())
