"""dpkd.py against its equations: nested loops, seven exact identities on a set of ten responses, and whole runs."""
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import small_run
from tokenizers.processors import TemplateProcessing

import common
import dpkd

CPU = torch.device("cpu")


@pytest.fixture
def dpkd_config(pair, rows_file, tmp_path):
    """dpkd_config(kind="gpt2", **settings) -> a dpkd.Config for a run of a second."""
    return lambda kind="gpt2", **settings: small_run(dpkd.Config, pair(kind), rows_file, tmp_path / "run",
                                                     **{"eval_every": 4, **settings})


# ------------------------------------------------------------------------------ ten responses that can be enumerated
def world(seed=0, n=10, spread=0.7):
    """log p, logits of q and lengths of n responses to one prompt: (n,), (n,), (n,)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, generator=g, dtype=torch.double) * spread
    return draw().log_softmax(0), draw(), torch.randint(1, 9, (n,), generator=g)


def all_pairs(logq, logp, n, beta, length_norm=False):
    """Loss and margin (n*n,) of every pair, y_t the slower index."""
    t, s = (x.flatten() for x in torch.meshgrid(torch.arange(len(logq)), torch.arange(len(logq)), indexing="ij"))
    return dpkd.preference_loss(logq[t], logp[t], logq[s], logp[s], n[t], n[s], beta, length_norm)


def kl(a, b):
    return (a.exp() * (a - b)).sum()


def expected_gradient(z, logp, n, beta, from_t, from_s, length_norm=False):
    """Gradient of the loss for z, expected over y_t ~ from_t and y_s ~ from_s, which count as given."""
    z = z.detach().requires_grad_()
    loss, _ = all_pairs(z.log_softmax(0), logp, n, beta, length_norm)
    (from_t[:, None] * from_s).flatten().detach().mul(loss).sum().backward()
    return z.grad


def optimum(logp, n, beta, logq0, z=None, steps=60):
    """The student that minimises the loss for negatives drawn from q0, by Newton's method."""
    z = (logp if z is None else z).clone()
    weights = (logp.exp()[:, None] * logq0.exp()).flatten()
    objective = lambda z: (weights * all_pairs(z.log_softmax(0), logp, n, beta)[0]).sum()
    for _ in range(steps):
        g, h = torch.autograd.functional.jacobian(objective, z), torch.autograd.functional.hessian(objective, z)
        move = torch.linalg.solve(h + h.trace() / len(z) ** 2, g)  # adding to all logits changes nothing: h is singular there
        z = z - move * min(1.0, 1.0 / move.abs().max().item())
        z = z - z.mean()
    return z.log_softmax(0)


def test_preference_loss_equals_the_equation_in_loops():
    torch.manual_seed(0)
    logq_t, logp_t, logq_s, logp_s = -10 * torch.rand(4, 6).double()
    n_t, n_s = torch.randint(1, 9, (2, 6))
    for norm in (False, True):
        loss, margin = dpkd.preference_loss(logq_t, logp_t, logq_s, logp_s, n_t, n_s, 0.7, norm)
        for i in range(6):
            r_t = 0.7 * (logq_t[i].item() - logp_t[i].item()) / (n_t[i].item() if norm else 1)
            r_s = 0.7 * (logq_s[i].item() - logp_s[i].item()) / (n_s[i].item() if norm else 1)
            assert margin[i].item() == pytest.approx(r_t - r_s) and margin.shape == loss.shape == (6,)
            assert loss[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-(r_t - r_s)))))


@pytest.mark.parametrize("norm", [False, True])
def test_1_the_gradient_has_the_corrected_sign(norm):
    logp, z, n = world()
    z.requires_grad_()
    t, s, beta = 2, 7, 0.8
    logq = z.log_softmax(0)
    g_t, g_s = (torch.autograd.grad(logq[i], z, retain_graph=True)[0] for i in (t, s))
    g_t, g_s = (g_t / n[t], g_s / n[s]) if norm else (g_t, g_s)
    loss, margin = dpkd.preference_loss(logq[t], logp[t], logq[s], logp[s], n[t], n[s], beta, norm)
    got = torch.autograd.grad(loss, z, retain_graph=True)[0]
    assert torch.allclose(got, -beta * torch.sigmoid(-margin) * (g_t - g_s), atol=1e-14)
    assert not torch.allclose(got, -beta * torch.sigmoid(margin) * (g_t - g_s), rtol=0.05)  # the paper's Eq. 11


@pytest.mark.parametrize("norm", [False, True])
def test_2_a_student_equal_to_the_teacher_has_nothing_to_learn(norm):
    logp, _, n = world()
    loss, margin = all_pairs(logp, logp, n, 0.5, norm)
    assert (margin == 0).all() and torch.allclose(loss, torch.full_like(loss, math.log(2)), rtol=1e-15)
    assert expected_gradient(logp, logp, n, 0.5, logp.exp(), logp.exp(), norm).abs().max() < 1e-16


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_3_frozen_negatives_lead_beyond_the_teacher(beta):
    logp, z, n = world(spread=0.4)
    logq0 = z.log_softmax(0)
    formula = (logp + (logp - logq0) / beta).log_softmax(0)
    assert (optimum(logp, n, beta, logq0).exp() - formula.exp()).abs().max() < 1e-9
    assert kl(logp, formula) > 0.01  # and that is not the teacher


def test_4_the_expected_margin_of_fresh_pairs_is_minus_beta_times_jeffreys():
    for seed in range(5):
        logp, z, n = world(seed)
        logq, beta = z.log_softmax(0), 0.3
        _, margin = all_pairs(logq, logp, n, beta)
        mean = ((logp.exp()[:, None] * logq.exp()).flatten() * margin).sum()
        assert mean.item() == pytest.approx(-beta * (kl(logp, logq) + kl(logq, logp)).item(), abs=1e-14) and mean < 0


def test_5_for_small_beta_the_gradient_is_that_of_seqkd():
    logp, z, n = world()
    forward = torch.autograd.functional.jacobian(lambda z: kl(logp, z.log_softmax(0)), z)
    errors = []
    for beta in (1e-1, 1e-2, 1e-3):
        g = expected_gradient(z, logp, n, beta, logp.exp(), z.softmax(0))
        errors.append(((g - beta / 2 * forward).norm() / (beta / 2 * forward).norm()).item())
    assert errors[2] < 2e-3 and [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([10, 10], rel=0.1)


def test_6_equals_dpo_with_the_teacher_as_reference():
    def dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):  # Rafailov et al. 2023, Eq. 7
        logits = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        return -F.logsigmoid(beta * logits)
    torch.manual_seed(1)
    logq_t, logp_t, logq_s, logp_s = -20 * torch.rand(4, 8).double()
    ours, _ = dpkd.preference_loss(logq_t, logp_t, logq_s, logp_s, None, None, 0.3, False)
    assert torch.allclose(ours, dpo(logq_t, logq_s, logp_t, logp_s, 0.3))
    assert dpkd.preference_loss(*torch.tensor([[-9e3], [0.0], [0.0], [0.0]]), 1, 1, 1.0, False)[0].item() == 9e3  # no inf


def test_6_identical_pairs_give_zero_gradient():
    logp, z, n = world()
    z.requires_grad_()
    logq = z.log_softmax(0)
    for norm in (False, True):
        loss, margin = dpkd.preference_loss(logq, logp, logq, logp, n, n, 0.5, norm)
        assert (margin == 0).all() and (torch.autograd.grad(loss.sum(), z, retain_graph=True)[0] == 0).all()


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_6_prompts_and_pads_do_not_count_and_eos_does(dpkd_config, kind):
    """log q of a response does not depend on its companions in the batch and is the textbook's sum, EOS included."""
    student, teacher, tokenizer = common.load_pair(dpkd_config(kind), CPU)
    examples = [common.Example(p, p, r + [tokenizer.eos_token_id])
                for p, r in (([5, 6, 7, 1], [8, 9]), ([5, 6] * 5 + [1], [9, 10, 11, 12, 13, 14]), ([7, 1], [20]))]
    batch, fwd = common.collate(examples, student), common.response_states(student)
    together = dpkd.response_logprobs(student, fwd(batch), batch)
    for i, e in enumerate(examples):
        if student.config.is_encoder_decoder:
            start = [student.config.decoder_start_token_id]
            logits = student(input_ids=torch.tensor([e.prompt]), decoder_input_ids=torch.tensor([start + e.response[:-1]])).logits[0]
        else:
            logits = student(input_ids=torch.tensor([e.prompt + e.response])).logits[0, len(e.prompt) - 1:-1]
        logq = logits[:, :student.vocab].log_softmax(-1)
        assert together[i].item() == pytest.approx(sum(logq[j, t].item() for j, t in enumerate(e.response)), rel=1e-5)


def test_7_converging_on_each_set_of_negatives_multiplies_the_error_by_minus_one_over_beta():
    logp, z, n = world(spread=0.15)
    for beta, closer in ((0.5, False), (2.0, True)):
        logq, kls = z.log_softmax(0), []
        for _ in range(2):
            rho = logq - logp
            logq = optimum(logp, n, beta, logq)
            shift = (logq - logp) + rho / beta
            assert (shift - shift.mean()).abs().max() < 1e-7
            kls.append((kl(logp, (rho + logp)).item(), kl(logp, logq).item()))
        assert all((after < before) == closer for before, after in kls)


def test_online_negatives_have_the_teacher_as_their_fixed_point():
    """One small step for each new set of negatives: KL falls to zero where frozen ones would leave far off."""
    logp, z, n = world()
    for norm in (False, True):
        z1 = z.clone()
        for _ in range(800):
            z1 -= 8.0 * expected_gradient(z1, logp, n, 0.5, logp.exp(), z1.softmax(0), norm)
        assert kl(logp, z1.log_softmax(0)) < 1e-8


# ------------------------------------------------------------------------------------------------------ whole runs
def records(cfg, key):
    return [r for r in map(json.loads, open(f"{cfg.out}/log.jsonl")) if key in r]


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_whole_run(dpkd_config, kind):
    cfg = dpkd_config(kind, anchor=0.5, steps=16, lr=3e-3, max_response=24)
    result = dpkd.train(cfg)
    jeffreys = lambda when: result[f"{when}.kl_pq"] + result[f"{when}.kl_qp"]  # what the loss and the margin are about
    assert jeffreys("after") < jeffreys("before") and result["method"] == "dpkd"
    steps, evaluated = records(cfg, "loss"), [r["valid"] for r in records(cfg, "valid")]
    assert all(math.isfinite(r["loss"]) for r in steps) and all("fresh_margin" in v for v in evaluated)
    assert evaluated[0]["fresh_margin"] < 0
    for r in steps:
        assert r["loss"] == pytest.approx(cfg.preference * r["preference"] + cfg.anchor * r["ce"], rel=1e-5)
        assert {"margin", "nll_t", "nll_s", "same", "no_end"} <= set(r) and 0 <= r["no_end"] <= 1


@pytest.mark.parametrize("negatives", ["epoch", pytest.param("online", marks=pytest.mark.slow),
                                       pytest.param("frozen", marks=pytest.mark.slow)])
def test_resume_ends_bitwise_like_an_uninterrupted_run(dpkd_config, negatives, monkeypatch, resumes_bitwise):
    """64 prompts, 16 a step: the checkpoint of step 3 lies inside an epoch, and its y_s come from weights of step 0."""
    cfg = dpkd_config(negatives=negatives, steps=6, batch_size=16, lr=3e-3, eval_every=9, save_every=3)
    drawn, sampled = [], common.answer_examples
    monkeypatch.setattr(common, "answer_examples", lambda *a, **k: drawn.append(len(a[1])) or sampled(*a, **k))
    dpkd.train(cfg)
    n = len([d for d in drawn if d > 4])  # all but the four validation and test rows, and the teacher's own answers
    assert n == {"online": 6, "epoch": 2, "frozen": 1}[negatives] + 1
    whole, cut = resumes_bitwise(dpkd.train, cfg, died=5)
    assert whole["y_s"] == cut["y_s"]


def test_a_resumed_run_goes_on_in_the_middle_of_its_corpus(dpkd_config, tmp_path, resumes_bitwise):
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n".join(f"the cat sat under the tree {i} and then it ran on" for i in range(40)))
    resumes_bitwise(dpkd.train, dpkd_config(preference=0.0, lm_coef=1.0, corpus=str(text), steps=5, eval_every=9))


def test_identical_pairs_are_counted_and_move_nothing(dpkd_config, monkeypatch):
    """A student that says just what the teacher said: log 2 at every step and not the smallest step taken."""
    cfg, sampled, answers = dpkd_config(anchor=0.0, weight_decay=0.0), common.answer_examples, {}

    def echo(model, examples, tokenizer, cfg, temperature=1.0, seed=0, role="student"):
        if role == "teacher":
            return [answers.setdefault(tuple(e.prompt), e) for e in sampled(model, examples, tokenizer, cfg, temperature, seed, role)]
        return [answers.get(tuple(e.prompt), e) for e in examples]
    monkeypatch.setattr(common, "answer_examples", echo)
    dpkd.train(cfg)
    assert all(r["same"] == 1 and r["margin"] == 0 and r["grad_norm"] == 0 for r in records(cfg, "loss"))
    assert all(r["loss"] == pytest.approx(math.log(2)) for r in records(cfg, "loss"))


def test_an_identical_pair_among_others_has_no_gradient_at_all(dpkd_config, monkeypatch):
    """Not a small one, of rounding, which AdamW would make as large as any: the batches differ, so do last digits."""
    real, sampled, answers, left = dpkd.preference_loss, common.answer_examples, {}, []

    def echo(model, examples, tokenizer, cfg, temperature=1.0, seed=0, role="student"):
        """Every third of the student's responses is the teacher's; the others are its own, and shorter."""
        drawn = sampled(model, examples, tokenizer, cfg, temperature, seed, role)
        if role == "teacher":
            answers.update({tuple(e.prompt): e for e in drawn})
            return drawn
        own = [dataclasses.replace(e, response=e.response[:3]) for e in drawn]
        return [answers.get(tuple(e.prompt), e) if sum(e.prompt) % 3 == 0 else e for e in own]

    def watched(logq_t, logp_t, logq_s, logp_s, *others):
        same = (logq_t == logq_s) & (logp_t == logp_s)
        students = [p for p in models["student"].parameters()]
        grads = torch.autograd.grad((logq_t - logq_s)[same].sum(), students, retain_graph=True, allow_unused=True)
        left.append((int(same.sum()), max(float(g.abs().max()) for g in grads if g is not None)))
        return real(logq_t, logp_t, logq_s, logp_s, *others)

    models, start = {}, common.Run.start
    monkeypatch.setattr(common.Run, "start", lambda self, **parts: models.update(parts) or start(self, **parts))
    monkeypatch.setattr(common, "answer_examples", echo)
    monkeypatch.setattr(dpkd, "preference_loss", lambda *a: watched(*a) if a[0].requires_grad else real(*a))
    dpkd.train(dpkd_config(steps=2))
    assert len(left) == 2 and all(n > 0 and largest == 0.0 for n, largest in left)


def test_the_corpus_counts_by_its_own_tokens(dpkd_config, tmp_path, monkeypatch):
    """--lm-coef 1 alone: the loss is the mean over the text's tokens, of which there are more than of the answers."""
    answered = common.teacher_answers
    monkeypatch.setattr(common, "teacher_answers", lambda *a: [dataclasses.replace(e, response=e.response[:2]) for e in answered(*a)])
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n".join(f"the cat sat under the tree {i} and then it ran on" for i in range(40)))
    cfg = dpkd_config(steps=1, preference=0.0, anchor=0.0, lm_coef=1.0, corpus=str(text))
    student, _, tokenizer = common.load_pair(cfg, CPU)
    part = common.load_corpus(cfg.corpus, tokenizer, cfg)
    chosen = [part[i] for i in common.step_indices(len(part), 0, cfg)]
    nll = lambda q, _, y: (-common.log_softmax_at(q, y),)
    wanted = common.per_response(nll, student, None, chosen, cfg).sum() / sum(len(e.response) for e in chosen)
    dpkd.train(cfg)
    assert records(cfg, "loss")[0]["loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_a_text_begins_as_the_tokenizer_begins_it(dpkd_config, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    cfg = dpkd_config()
    tokenizer = common.load_tokenizer(cfg.student, "student")
    eos = tokenizer.eos_token_id
    prompts = lambda: {tuple(e.prompt) for e in common.load_corpus(tmp_path / "a.txt", tokenizer, cfg)}
    assert prompts() == {(eos,)}
    tokenizer.bos_token = "!"
    bos = tokenizer.bos_token_id
    assert prompts() == {(eos,)}  # it has one, but puts it nowhere
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", bos)])
    assert prompts() == {(bos,)}


def test_only_pairs_that_are_needed_are_kept(dpkd_config, monkeypatch):
    """Fresh y_s of all prompts that were ever asked would fill memory and checkpoints."""
    kept, end_step = [], common.Run.end_step
    monkeypatch.setattr(common.Run, "end_step", lambda self, step, **p: kept.append(len(p["y_s"])) or end_step(self, step, **p))
    cfg = dpkd_config(steps=3)
    dpkd.train(cfg)
    assert kept == [cfg.batch_size] * 3


def test_every_negative_is_the_students_own_and_scored_by_the_teacher(dpkd_config, monkeypatch):
    """What the loss is given equals a second computation, with a teacher that reads another template."""
    seen, real = [], dpkd.preference_loss
    monkeypatch.setattr(dpkd, "preference_loss", lambda *a: seen.append([x.detach() if torch.is_tensor(x) else x for x in a]) or real(*a))
    drawn, end_step = [], common.Run.end_step
    monkeypatch.setattr(common.Run, "end_step", lambda self, step, **p: drawn.append(dict(p["y_s"])) or end_step(self, step, **p))
    cfg = dpkd_config(steps=1, accum=2, teacher_template="Sort: {prompt} =\\n")
    student, teacher, tokenizer = common.load_pair(cfg, CPU)  # the student before its step
    dpkd.train(cfg)
    data = common.load_data(cfg, student, teacher, tokenizer)
    examples = common.teacher_answers(teacher, data.train, tokenizer, cfg)
    ids = [i for b in common.Batches(examples, student, teacher, cfg, CPU).at(0) for i in b.ids]
    score = lambda model, part, role: common.per_response(
        lambda q, p, y: (common.log_softmax_at(q, y),), model, None, part, cfg, role)[:, 0]
    y_t, y_s = [examples[i] for i in ids], [dataclasses.replace(examples[i], response=drawn[0][i][0]) for i in ids]
    inside = [a for a in seen if len(a[0]) == 4 and a[0].dtype == torch.float32][:2]  # evaluation is in float64
    logq_t, logp_t, logq_s, logp_s, n_t, n_s = (torch.cat(x) for x in list(zip(*inside))[:6])
    for got, wanted in ((logq_t, score(student, y_t, "student")), (logp_t, score(teacher, y_t, "teacher")),
                        (logq_s, score(student, y_s, "student")), (logp_s, score(teacher, y_s, "teacher"))):
        assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-4)
    assert n_t.tolist() == [len(e.response) for e in y_t] and n_s.tolist() == [len(e.response) for e in y_s]


def test_what_is_logged_of_negatives_is_of_the_students_texts(dpkd_config, monkeypatch):
    """nll_t and nll_s are nats a response, y_s is 5 tokens long and y_t 2; no_end is the share of y_s without EOS, a third."""
    cfg = dpkd_config("llama", steps=1, batch_size=66, accum=2)
    student, teacher, tokenizer = common.load_pair(cfg, CPU)
    train, eos = common.load_data(cfg, student, teacher, tokenizer).train, tokenizer.eos_token_id
    at = {tuple(e.prompt): i for i, e in enumerate(train)}

    def answers(model, examples, *args, role="student", **kwargs):
        texts = ([4, eos], [4, eos]) if role == "teacher" else ([5, 3, 8, 6, 9], [5, 3, 8, 6, eos])
        return [dataclasses.replace(e, response=texts[at.get(tuple(e.prompt), 0) % 3 > 0]) for e in examples]
    monkeypatch.setattr(common, "answer_examples", answers)
    dpkd.train(cfg)
    logged = records(cfg, "loss")[0]
    assert len(train) == 66 and logged["no_end"] == pytest.approx(1 / 3)
    for key, role in (("nll_t", "teacher"), ("nll_s", "student")):
        wanted = -dpkd.fixed_logprobs(student, answers(None, train, role=role), cfg, "student").mean().item()
        assert logged[key] == pytest.approx(wanted, rel=1e-4), key


def test_accumulation_gives_one_result(dpkd_config, tmp_path):
    """(8,1), (8,4), with a corpus too: pairs by pairs, tokens by tokens of the whole step."""
    text = tmp_path / "corpus.txt"
    text.write_text("the cat sat .\n\nthe dog ran under the tree and it was happy\n\n" * 20)
    runs = []
    for accum in (1, 4):
        cfg = dpkd_config(steps=2, accum=accum, lm_coef=0.5, corpus=str(text), out=str(tmp_path / str(accum)))
        dpkd.train(cfg)
        runs.append(records(cfg, "loss"))
    for a, b in zip(*runs):
        assert all(a[k] == pytest.approx(b[k], rel=2e-3) for k in ("loss", "preference", "ce", "nll_t", "nll_s", "grad_norm"))


def test_the_anchor_alone_is_seqkd_and_eq_9_runs(dpkd_config, tmp_path):
    anchor = dpkd_config(preference=0.0, anchor=1.0, out=str(tmp_path / "a"))  # SeqKD
    assert dpkd.train(anchor)["after.kl_pq"] > 0
    r = records(anchor, "loss")[0]
    assert r["loss"] == pytest.approx(r["ce"])
    dpkd.train(dpkd_config(length_norm=True, beta=2.0, steps=2, out=str(tmp_path / "n")))


def test_bad_input(dpkd_config, tmp_path):
    for settings, sentence in (
            (dict(beta=0.0), "--beta 0.0: must lie"), (dict(beta=-1.0), "--beta -1.0: must lie"),
            (dict(beta=float("nan")), "--beta nan"),
            (dict(negatives="never"), "--negatives never: choose one of"), (dict(teacher="none"), "name one"),
            (dict(lm_coef=0.5), "--lm-coef 0.5 needs a text"), (dict(lm_coef=0.5, corpus="/nowhere.txt"), "/nowhere.txt: there is no such file"),
            (dict(preference=0.0, anchor=0.0), "nothing to train")):
        with pytest.raises(common.BadInput, match=sentence):
            dpkd.train(dpkd_config(**settings))
        assert not (tmp_path / "run").exists()
    for name, text in (("a.txt", b"\xff\xfe"), ("b.txt", b" \n\n "), ("c.jsonl", b'{"txt": "a"}\n'), ("d.jsonl", b"{"), ("e.jsonl", b'{"text": 1}')):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(common.BadInput, match=name):
            dpkd.train(dpkd_config(lm_coef=0.5, corpus=str(tmp_path / name)))


def test_a_corpus_is_cut_into_blocks_with_ends_of_documents(dpkd_config, tmp_path):
    cfg = dpkd_config()
    tokenizer = common.load_tokenizer(cfg.student, "student")
    (tmp_path / "a.txt").write_text("the cat\nsat\n\n \na dog\n")
    (tmp_path / "a.jsonl").write_text('{"text": "the cat\\nsat"}\n\n{"text": "a dog"}\n')
    plain, rows = (common.load_corpus(tmp_path / name, tokenizer, cfg) for name in ("a.txt", "a.jsonl"))
    assert plain == rows and tokenizer.decode(plain[0].response) == "the cat\nsat<|endoftext|>a dog<|endoftext|>"
    cfg.max_response = 2
    assert [len(e.response) for e in common.load_corpus(tmp_path / "a.txt", tokenizer, cfg)][:2] == [2, 2]


def test_the_margin_of_fresh_pairs_divides_each_text_by_its_own_length(dpkd_config, monkeypatch):
    cfg = dpkd_config("llama", length_norm=True, beta=0.1)
    student, teacher, tokenizer = common.load_pair(cfg, CPU)
    valid = common.load_data(cfg, student, teacher, tokenizer).valid
    written = {"teacher": [dataclasses.replace(e, response=[4, 7]) for e in valid],
               "student": [dataclasses.replace(e, response=[5, 3, 8, 6, 9]) for e in valid]}
    monkeypatch.setattr(common, "answer_examples", lambda *a, seed, role="student": written[role])
    got = dpkd.fresh_pairs(teacher, student, valid, tokenizer, cfg, lambda step: step)()["fresh_margin"]
    score = lambda model, by, role: dpkd.fixed_logprobs(model, written[by], cfg, role)
    rho = {by: score(student, by, "student") - score(teacher, by, "teacher") for by in written}
    assert got == pytest.approx(0.1 * (rho["teacher"] / 2 - rho["student"] / 5).mean().item(), rel=1e-6)


def test_fresh_y_s_have_other_noise_than_fresh_y_t_and_than_the_pairs_of_any_step(dpkd_config, monkeypatch):
    """A student close to its teacher would repeat y_t under one noise: a margin of 0 that says nothing."""
    cfg = dpkd_config("llama", steps=2)
    student, teacher, tokenizer = common.load_pair(cfg, CPU)
    valid = common.load_data(cfg, student, teacher, tokenizer).valid
    seeds, real = [], common.answer_examples

    def answer_examples(*args, seed, **kwargs):
        seeds.append(seed)
        return real(*args, seed=seed, **kwargs)
    monkeypatch.setattr(common, "answer_examples", answer_examples)
    evaluate_fresh = dpkd.fresh_pairs(teacher, student, valid, tokenizer, cfg, lambda step: step)
    assert evaluate_fresh() == evaluate_fresh()
    y_t, y_s, again = seeds
    assert y_s == again and y_t != y_s and y_t < 0 and y_s < 0


def test_negatives_of_an_epoch_are_drawn_before_its_first_step(dpkd_config, monkeypatch):
    """66 prompts, 22 a step: before steps 0 and 3."""
    cfg = dpkd_config(negatives="epoch", steps=5, batch_size=22, eval_every=9)
    drawn, done, real, end_step = [], [], common.answer_examples, common.Run.end_step

    def answer_examples(model, examples, tokenizer, cfg, temperature=1.0, seed=0, role="student"):
        drawn.extend([len(done)] if len(examples) == 66 and role == "student" else [])
        return real(model, examples, tokenizer, cfg, temperature, seed, role)
    monkeypatch.setattr(common, "answer_examples", answer_examples)
    monkeypatch.setattr(common.Run, "end_step",
                        lambda self, step, **p: done.append(step) or end_step(self, step, **p))
    dpkd.train(cfg)
    assert drawn == [0, 3]
