"""The bug museum: thirty one-line bugs of distillation code, and the ordinary test that sees each.

    python tests/labs/museum.py            plant every bug in a copy of the project: minutes
    python tests/labs/museum.py 7 --ask    show the two lines of exhibit 7
    python tests/labs/museum.py 7          also what they do, and plant the bug

With each of these bugs a run starts, trains and ends, and its curve looks fine. An exhibit is
caught if the named test passes in a clean copy and fails by an assertion in the one with the bug.
To learn from an exhibit, look at its two lines with --ask, and predict what will be seen.
A shift by one in `positions` is no exhibit: `check_model` refuses it when a model is loaded.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Exhibit:
    file: str
    old: str      # occurs once in the file
    new: str
    test: str     # of tests/, as file::name without "test_"
    symptom: str
    fine: str     # why the curve looks fine


KD, LLMR, DPKD, GOLD, DDK, COMMON = (
    f"{name}.py" for name in ("kd_forward", "llmr", "dpkd", "gold", "ddk", "common"))
OF_KD = "oracle::kd_forward_steps_with_the_gradient_of_its_equation"
OF_LLMR = "oracle::llmr_steps_with_the_gradient_of_its_equations"
OF_STALE = "oracle::llmr_weighs_texts_of_a_stale_student_by_what_it_gave_them"
OF_DPKD = "oracle::dpkd_steps_with_the_gradient_of_its_equations"
OF_SHARES = "oracle::ddk_shares_follow_the_gaps_on_validation_sequences_and_never_on_test_ones"
OF_DDK = "oracle::ddk_steps_with_the_gradient_of_its_equation_on_what_was_drawn"

EXHIBITS = [
    # ---- losses and denominators
    Exhibit(KD, "kl = (logp.exp() * (logp - logq)).sum(-1)",
            'kl = F.kl_div(logp, logq, reduction="none", log_target=True).sum(-1)', OF_KD,
            "F.kl_div takes its arguments the other way round, so this is KL(q||p). The student "
            "drops wordings that the teacher uses.",
            "Both divergences fall together, and the wrong one often looks smaller."),
    Exhibit(KD, "alpha * tau**2 * kl", "alpha * kl", OF_KD,
            "At tau = 2 the KL has a quarter of the weight that --alpha says, and CE rules.",
            "The loss is smaller and falls smoothly. At tau = 1 nothing changes."),
    Exhibit(KD, "logq = F.log_softmax(student_logits / tau, -1)",
            "logq = F.log_softmax(student_logits, -1)", OF_KD,
            "The undivided student learns the softened teacher, and stays too flat at tau > 1.",
            "The loss reaches its minimum. But this minimum is at another distribution."),
    Exhibit(KD, "(logp - logq)).sum(-1)", "(logp - logq)).mean(-1)", OF_KD,
            "The KL is divided by the size of the vocabulary: beside CE it counts nothing.",
            "Alone it trains as before, because Adam divides the factor out again."),
    Exhibit(KD, "(loss.sum() / n_tokens).backward()",
            "(loss.sum() / len(batch.targets) / cfg.accum).backward()", OF_KD,
            "A mean of means: with --accum, tokens of short responses weigh several times more.",
            "The logged loss has the right denominator. Without --accum nothing changes."),
    Exhibit(KD, "optimizer.zero_grad(set_to_none=True)", "pass", OF_KD,
            "The gradients of all past steps add up, like a momentum that never decays.",
            "Clipping keeps the steps short, and at first the old gradients point the right way."),
    # ---- shifts, masks, and what is read
    Exhibit(COMMON, "[t for r in responses for t in r]",
            "[t for p, r in zip(prompts, responses) for t in p[-1:] + r[:-1]]", OF_KD,
            "No shift: each state has to predict the token that it has just read.",
            "The loss falls faster, because copying is easier than predicting."),
    Exhibit(COMMON, "[t for r in responses for t in r]",
            "[t for r in responses for t in r[1:] + r[-1:]]", OF_KD,
            "The shift is made twice: each state has to predict the next token but one.",
            "It can be learned to some degree, and a KL needs no targets: with --alpha 1 nothing "
            "changes but the logged CE."),
    Exhibit(COMMON, "    responses = [e.response for e in examples]\n",
            "    responses = [[t for t in e.response if t != model.tokenizer.eos_token_id] "
            "or e.response for e in examples]\n", OF_KD,
            "EOS is taken for padding, as where pad = eos: the student never learns to stop.",
            "The loss per token is lower, because the least certain token is gone."),
    Exhibit(COMMON, "(ids + eos)[:cfg.max_response]", "ids[:cfg.max_response - 1] + eos", OF_KD,
            "A response that is cut gets an EOS: the student learns to stop in mid-sentence.",
            "An EOS at a fixed place is easy to predict, so the loss falls."),
    Exhibit(COMMON, 'self.teacher_prompt if model.role == "teacher" else self.prompt',
            "self.prompt", OF_KD,
            "The teacher reads the student's prompt, not that of --teacher-template.",
            "The KL to a confused teacher falls as well as the KL to a good one."),
    Exhibit(COMMON, "teacher.requires_grad_(False)", "teacher.requires_grad_(False).train()",
            OF_LLMR, "Dropout is on in the teacher: each step is scored by another teacher.",
            "The student learns the mean of these teachers, and the loss falls towards it."),
    Exhibit(COMMON, "    return logits.float()\n", "    return logits\n",
            "core::under_bf16_autocast_logits_are_fp32_and_gradients_those_of_fp32_softmaxes",
            "Softmaxes of bf16 logits: gradients are 5 % off, more where q is close to p.",
            "Runs in fp32 do not change, and the error looks like the noise of small batches."),
    Exhibit(COMMON, "position_ids = lengths[:, None] + t", "position_ids = at[-1:, None] + 1 + t",
            "core::greedy_sampling_equals_generate_on_ragged_prompts",
            "While it samples, GPT-2 counts the padding on the left as positions.",
            "Training is padded on the right, and right. The longest prompt samples well, too."),
    Exhibit(COMMON, "at < lengths[:, None] if encdec else at >= len(at) - lengths[:, None]",
            "at.expand_as(prompt) >= 0",
            "core::greedy_sampling_equals_generate_on_ragged_prompts",
            "While a model samples, it attends to padding: what it writes depends on the other "
            "prompts of the batch.",
            "Prompts of one length need no mask, and a model gets used to a constant prefix."),
    # ---- llmr.py
    Exhibit(LLMR, "F.pad(state_value[:, 1:], (0, 1)) ", "state_value ", OF_LLMR,
            "V is that of the state in which a token was chosen, not of the one that it leads to.",
            "Most rewards become advantages, whose sum is the objective anyway."),
    Exhibit(LLMR, "return reward.flip(-1).cumsum(-1).flip(-1)", "return reward.cumsum(-1)",
            OF_LLMR, "A token is rewarded for what came before it, and it had no part in that.",
            "The sum of all rewards, which is what one plots, is the same."),
    Exhibit(LLMR, "return (ratio * gain).detach()", "return ratio * gain", OF_STALE,
            "The gradient goes through the importance ratio as well.",
            "On policy the ratio is 1, so with the default --sync 1 nothing changes."),
    Exhibit(LLMR, "else copy.deepcopy(student)", "else student", OF_STALE,
            "The stale copy is no copy: --sync 50 does the same as --sync 1.",
            "It trains better than it should."),
    Exhibit(LLMR, "(total - own) / (count - lengths[:, None]).clamp(min=1)",
            "torch.full_like(own, total / count)", OF_LLMR,
            "The baseline of a response contains its own return, which adds a bias.",
            "With 64 responses the bias is a 64th, and the variance even falls."),
    Exhibit(LLMR, ".sum() / n_responses ", ".sum() / n_tokens ", OF_LLMR,
            "The denominator depends on what was sampled. So a constant in the teacher's logits, "
            "which means nothing, changes the gradient.",
            "Losses of language models are means over tokens, and Adam hides the size."),
    Exhibit(LLMR, "common.no_dropout(student)", "pass", OF_LLMR,
            "The student samples without dropout, and another distribution, with it, is improved.",
            "It looks like the ordinary noise of a policy gradient."),
    # ---- dpkd.py
    Exhibit(DPKD, "ratio_student = logq_student - logp_student", "ratio_student = logq_student",
            OF_DPKD, "Without the teacher's log p the student unlearns its own responses, good "
            "ones as well.", "The margin of the training pairs rises faster than before."),
    Exhibit(DPKD, "by_teacher.lengths, by_student.lengths, cfg.beta",
            "by_teacher.lengths, by_teacher.lengths, cfg.beta", OF_DPKD,
            "With --length-norm both sums are divided by the length of the teacher's response.",
            "Where both responses are about as long, nothing changes."),
    Exhibit(DPKD, "cfg.preference * losses.sum() / n_pairs", "cfg.preference * losses.mean()",
            OF_DPKD, "With --accum 8 the preference counts eight times, beside the anchor.",
            "Without --accum it is the same number, and clipping hides it."),
    # ---- gold.py and ddk.py
    Exhibit(GOLD, "return -logits.logsumexp(-1)", "return -logits.log_softmax(-1).logsumexp(-1)",
            "oracle::gold_measures_energies_with_the_scorer_of_that_round",
            "Normalised logits have energy 0 everywhere: rounding picks the feedback.",
            "Random feedback brings variety, too, and accuracy rises with the budget."),
    Exhibit(GOLD, "scorer = copy.deepcopy(student)", "scorer = student",
            "oracle::golds_scorer_goes_on_with_weights_and_optimizer_and_its_student_is_fresh",
            "The student that is to start fresh has learned from the early samples already.",
            "It starts lower and gets there sooner. It also overfits what came first."),
    Exhibit(DDK, "return (student_ce - teacher_ce).clamp", "return (teacher_ce - student_ce).clamp",
            OF_SHARES, "The domain in which the student lags most gets the least data.",
            "The loss falls faster, because it is that of the easy domains."),
    Exhibit(DDK, "student_ce = domain_ce(student, data.valid, cfg)",
            "student_ce = domain_ce(student, data.test, cfg)", OF_SHARES,
            "The mixture is steered by the test split, from which the result is reported.",
            "The gaps of both splits are close, and both fall."),
    Exhibit(COMMON, "for t in ids + [eos]]", "for t in ids]", OF_DDK,
            "Documents are packed without an EOS between them: no end of a text is ever seen.",
            "The loss is a bit lower: no token is as hard to predict as the end of a text."),
]


def node(exhibit):
    """The test as pytest names it: all of its parameters."""
    file, name = exhibit.test.split("::")
    return f"tests/test_{file}.py::test_{name}"


def run_tests(nodes, exhibit=None):
    """Copy the project, plant the bug, run the tests -> (exit status, first line of a failure)."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "copy")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "out", "__pycache__"))
        if exhibit:
            text = (tree / exhibit.file).read_text()
            if text.count(exhibit.old) != 1:
                return -1, f"{exhibit.file} holds {text.count(exhibit.old)} times: {exhibit.old}"
            (tree / exhibit.file).write_text(text.replace(exhibit.old, exhibit.new))
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider",
                               *nodes], cwd=tree, capture_output=True, text=True)
    failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return done.returncode, (failed or [(done.stdout + done.stderr)[-500:]])[0]


def show(number, exhibit, ask):
    print(f"Exhibit {number}: {exhibit.file}\n\n- {exhibit.old.strip()}\n"
          f"+ {exhibit.new.strip()}\n")
    if ask:
        print("What is the symptom? Why does the curve look fine? Which test could see it?")
    else:
        print(f"Symptom: {exhibit.symptom}\nWhy the curve looks fine: {exhibit.fine}\n"
              f"Seen by: {node(exhibit)}\n", flush=True)


def main():
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "400"}  # narrow lines would lose the reason
    chosen = dict(enumerate(EXHIBITS, 1))
    if sys.argv[1:]:
        number = int(sys.argv[1]) if sys.argv[1].isdigit() else 0
        if number not in chosen:
            print(f"error: there are exhibits 1 to {len(EXHIBITS)}", file=sys.stderr)
            return 2
        chosen = {number: chosen[number]}
        show(number, chosen[number], "--ask" in sys.argv)
        if "--ask" in sys.argv:
            return 0
    status, line = run_tests(sorted({node(exhibit) for exhibit in chosen.values()}))
    if status:
        print(f"error: a test fails without any bug: {line}", file=sys.stderr)
        return 1
    caught = 0
    for number, exhibit in chosen.items():
        status, line = run_tests([node(exhibit)], exhibit)
        good = status == 1 and (" - assert" in line or "AssertionError" in line)
        caught += good
        said = f"{'caught' if good else 'MISSED'}  {exhibit.file:<14}"
        print(f"{number:3d} {said}{exhibit.test}{'' if good else ': ' + line}", flush=True)
    print(f"caught {caught} of {len(chosen)}")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
