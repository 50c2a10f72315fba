"""kd_forward.py against its equation written as nested loops, and whole runs on every architecture."""
import json
import math

import pytest
import torch
from conftest import KINDS

import common
import kd_forward

CPU = torch.device("cpu")


def kd_by_loops(student_logits, teacher_logits, targets, alpha, tau):
    """The docstring's equation, one probability at a time."""
    losses = []
    for z_q, z_p, y in zip(student_logits.tolist(), teacher_logits.tolist(), targets.tolist()):
        Zp, Zq, Zq1 = (sum(math.exp(v / t) for v in z) for z, t in ((z_p, tau), (z_q, tau), (z_q, 1.0)))
        kl = 0.0
        for v in range(len(z_q)):
            p, q = math.exp(z_p[v] / tau) / Zp, math.exp(z_q[v] / tau) / Zq
            kl += p * math.log(p / q)
        ce = -math.log(math.exp(z_q[y]) / Zq1)
        losses.append((1 - alpha) * ce + alpha * tau * tau * kl)
    return losses


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_equals_the_equation(alpha, tau):
    torch.manual_seed(0)
    q, p, y = torch.randn(7, 11).double() * 2, torch.randn(7, 11).double() * 2, torch.randint(11, (7,))
    loss, ce, kl = kd_forward.kd_loss(q, p, y, alpha, tau)
    assert loss.tolist() == pytest.approx(kd_by_loops(q, p, y, alpha, tau), rel=1e-9)
    assert ce.tolist() == pytest.approx(kd_by_loops(q, p, y, 0.0, tau), rel=1e-9)
    assert (kl * tau**2).tolist() == pytest.approx(kd_by_loops(q, p, y, 1.0, tau), rel=1e-9)


def test_kl_is_zero_with_zero_gradient_where_student_equals_teacher():
    q = torch.randn(5, 9, dtype=torch.double, requires_grad=True)
    loss = kd_forward.kd_loss(q, q.detach().clone(), torch.zeros(5, dtype=torch.long), 1.0, 2.0)[0].sum()
    loss.backward()
    assert abs(loss.item()) < 1e-12 and q.grad.abs().max() < 1e-12


def test_tau_squared_keeps_the_size_of_the_gradient():
    q, p, y = torch.randn(20, 50).double(), torch.randn(20, 50).double(), torch.zeros(20, dtype=torch.long)
    norms = []
    for tau in (10.0, 20.0):
        x = q.clone().requires_grad_()
        kd_forward.kd_loss(x, p, y, 1.0, tau)[0].sum().backward()
        norms.append(x.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.15)  # without tau^2 the ratio would be near 1/4


def setup(cfg):
    student, teacher, tokenizer = common.load_pair(cfg, CPU)
    data = common.load_data(cfg, student, teacher, tokenizer)
    return student, teacher, tokenizer, data, common.Batches(data.train, student, teacher, cfg, CPU)


def gradients(cfg, alpha=0.5, tau=2.0):
    """Gradients of one optimizer step of the script's loop, without the step."""
    student, teacher, _, _, batches = setup(cfg)
    fwd, teacher_fwd, micro = common.response_states(student), common.response_states(teacher), batches.at(0)
    for b in micro:
        sums = common.rowwise_loss(lambda q, p, y: kd_forward.kd_loss(q, p, y, alpha, tau), student, fwd(b), b.targets,
                                   teacher, teacher_fwd(b.teacher_batch))
        (sums[0] / sum(len(b.targets) for b in micro)).backward()
    return student, teacher, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_loss_and_gradient_equal_the_textbook(config, kind, monkeypatch):
    """The whole (B,T,V) way, one example at a time without any padding, in the model's own forward."""
    monkeypatch.setattr(common, "chunks", lambda rows, *_: [slice(i, i + 5) for i in range(0, rows, 5)])
    cfg = config(kind)
    student, teacher, got = gradients(cfg)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for p in student.parameters():
        p.grad = None
    _, _, _, data, batches = setup(cfg)
    total, n = 0.0, 0
    for i in batches.indices(0):
        e = batches.examples[i]
        V, y = student.vocab, torch.tensor(e.response)
        if student.config.is_encoder_decoder:
            kw = dict(input_ids=torch.tensor([e.prompt]), decoder_input_ids=torch.tensor([[0] + e.response[:-1]]))
            q, p = (m(**kw).logits[0, :, :V] for m in (student, teacher))
        else:
            ids, rows = torch.tensor([e.prompt + e.response]), slice(len(e.prompt) - 1, -1)
            q, p = (m(input_ids=ids).logits[0, rows, :V] for m in (student, teacher))
        total, n = total + kd_forward.kd_loss(q, p, y, 0.5, 2.0)[0].sum(), n + len(y)
    (total / n).backward()
    for name, p in student.named_parameters():
        if p.grad is not None:
            assert torch.allclose(got[name], p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item() + 1e-8), name
    flat = lambda grads: torch.cat([g.flatten() for g in grads])
    mine, theirs = flat(got.values()), flat(p.grad for p in student.parameters() if p.grad is not None)
    assert (mine - theirs).norm() / theirs.norm() < 1e-5


def test_accumulation_gives_one_result(config):
    """(8,1), (8,2), (8,4): mean over the tokens of the step, not a mean of means."""
    flat = []
    for accum in (1, 2, 4):
        _, _, g = gradients(config("llama", accum=accum))
        flat.append(torch.cat([x.flatten() for x in g.values()]))
    assert torch.allclose(flat[0], flat[1], atol=1e-6) and torch.allclose(flat[0], flat[2], atol=1e-6)


def test_accumulation_in_the_script_itself(config, tmp_path):
    """The gradient norm of the first step, as logged: a mean of means would change it, lengths differ by a factor."""
    norms = []
    for accum in (1, 2, 4):
        cfg = config("llama", steps=1, accum=accum, out=str(tmp_path / f"a{accum}"))
        kd_forward.train(cfg)
        norms += [r["grad_norm"] for r in map(json.loads, open(f"{cfg.out}/log.jsonl")) if "loss" in r]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and norms[2] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "t5-scaled", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS
                                                          if k not in ("qwen2", "t5-scaled"))])
def test_whole_run_from_directories(config, kind, capsys):
    cfg = config(kind)
    result = kd_forward.train(cfg)
    out = capsys.readouterr().out
    assert result["after.kl_pq"] < result["before.kl_pq"] and math.isfinite(result["after.kl_qp"])
    block = dict(line.split(": ", 1) for line in out.rsplit("---\n", 1)[1].strip().splitlines())
    wanted = {"method", "teacher.kl_pq", "before.kl_pq", "after.kl_qp", "after.rouge_l", "steps", "seconds", "peak_gib"}
    assert wanted <= set(block) and block["method"] == "kd_forward"
    files = {f.name for f in (common.Path(cfg.out)).iterdir()}
    assert {"settings.json", "log.jsonl", "kd_forward.py", "result.json", "student", "checkpoint.pt"} <= files
    auto = common.AutoModelForSeq2SeqLM if kind.startswith("t5") else common.AutoModelForCausalLM
    again, tokenizer = auto.from_pretrained(f"{cfg.out}/student"), common.AutoTokenizer.from_pretrained(f"{cfg.out}/student")
    assert again.dtype == torch.float32 and tokenizer.eos_token_id is not None
    records = [json.loads(x) for x in open(f"{cfg.out}/log.jsonl")]
    assert [r["step"] for r in records if "loss" in r] == [0, 1, 2, 3]
    assert [r["step"] for r in records if "valid" in r] == [0, 2, 4]


def test_sft_needs_no_teacher_and_seqkd_trains_on_teacher_text(config, tmp_path, capsys):
    result = kd_forward.train(config(teacher="none", alpha=0.0))
    assert "after.kl_pq" not in result and result["after.ce"] < result["before.ce"]
    kd_forward.train(config(responses="teacher", alpha=0.0, out=str(tmp_path / "seqkd")))
    assert "the teacher answers" in capsys.readouterr().out
    kd_forward.train(config(responses="teacher", out=str(tmp_path / "kd")))
    assert "the teacher answers" not in capsys.readouterr().out  # drawn once, cached
    for needs in (dict(), dict(alpha=0.0, responses="teacher")):
        with pytest.raises(common.BadInput, match="needs a teacher"):
            kd_forward.train(config(teacher="none", out=str(tmp_path / "x"), **needs))


def test_the_teacher_answers_every_training_prompt_also_those_without_a_response(config, tmp_path, monkeypatch):
    rows, given, real = [json.loads(x) for x in open(config().data)], [], common.Batches
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({**r, "response": r["response"] if i % 3 else None}) + "\n" for i, r in enumerate(rows)))
    monkeypatch.setattr(common, "Batches", lambda examples, *a: given.extend(examples) or real(examples, *a))
    cfg = config(data=str(file), responses="teacher", steps=0)
    kd_forward.train(cfg)
    prompts = {r["prompt"] for r in common.load_rows(cfg)["train"]}
    assert {e.row["prompt"] for e in given} == prompts and all(e.response for e in given)
    assert any(e.row["response"] is None for e in given)


def test_zero_steps_only_evaluates(config):
    result = kd_forward.train(config(steps=0))
    assert result["before.kl_pq"] == result["after.kl_pq"] and result["steps"] == 0


def test_a_bf16_checkpoint_trains_in_fp32(config, pair, tmp_path):
    _, student = pair("llama")
    common.AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    common.AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "bf16")
    model, _, _ = common.load_pair(config("llama", student=str(tmp_path / "bf16")), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bf16_compute_stays_close(config):
    student, teacher, _ = common.load_pair(config("llama", dtype="bfloat16"), CPU)
    assert (student.dtype, teacher.dtype) == (torch.float32, torch.bfloat16)
    a = kd_forward.train(config("llama", steps=2))
    b = kd_forward.train(config("llama", steps=2, dtype="bfloat16", out=config().out + "16"))
    assert b["after.kl_pq"] == pytest.approx(a["after.kl_pq"], rel=0.15)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_resume_ends_bitwise_like_an_uninterrupted_run(config, kind, resumes_bitwise):
    """GPT-2 and T5 have dropout, so random states count too."""
    whole, cut = resumes_bitwise(kd_forward.train, config(kind, steps=6))
    assert all(torch.equal(whole["student"][k], cut["student"][k]) for k in whole["student"])


def test_gradients_do_not_outlive_their_step(config, monkeypatch):
    def end_step(self, step, **parts):
        assert all(p.grad is None or not p.grad.any() for p in parts["student"].parameters())
    monkeypatch.setattr(common.Run, "end_step", end_step)
    kd_forward.train(config(steps=2))


def test_the_teacher_runs_once_for_each_remembered_response(config):
    cfg = config(cache_gib=1.0)
    _, teacher, _, _, batches = setup(cfg)
    cached = common.teacher_states(teacher, batches, cfg)
    real, calls, epoch = cached.states, [], math.ceil(len(batches.examples) / cfg.batch_size)
    cached.states = lambda batch: calls.append(1) or real(batch)
    first = [cached(batches.at(step)[0]) for step in range(epoch)]
    assert len(calls) == epoch and torch.allclose(first[0], cached(batches.at(0)[0]), atol=1e-6)
    [cached(batches.at(step)[0]) for step in range(epoch, 2 * epoch)]
    assert len(calls) == epoch


def test_a_batch_of_which_a_part_is_remembered_is_computed(config):
    """Where an epoch ends within a step, or the batch size does not divide it, old and new examples meet."""
    cfg = config(cache_gib=1.0)
    _, teacher, _, _, batches = setup(cfg)
    cached, plain = common.teacher_states(teacher, batches, cfg), common.response_states(teacher)
    for ids in ([0, 1], [1, 2, 3], [3, 0, 2], [5, 1]):
        batch = batches.batch(ids)
        assert torch.allclose(cached(batch), plain(batch), atol=1e-5), ids


@pytest.mark.slow
def test_the_teacher_cache_is_exact(config, tmp_path):
    plain = kd_forward.train(config("llama", steps=14, out=str(tmp_path / "a")))  # 8 of 64 rows a step: two epochs
    cached = kd_forward.train(config("llama", steps=14, cache_gib=1.0, out=str(tmp_path / "b")))
    mapped = kd_forward.train(config("llama", steps=14, cache_gib=1e-9, out=str(tmp_path / "c")))
    for other in (cached, mapped):
        assert other["after.kl_pq"] == pytest.approx(plain["after.kl_pq"], rel=1e-4)


def test_a_teacher_with_its_own_template_scores_the_same_response_tokens(config):
    cfg = config("gpt2", teacher_template="Sort these words: {prompt} =\\n")
    student, teacher, tokenizer, data, batches = setup(cfg)
    batch = batches.at(0)[0]
    assert batch.teacher_batch is not batch and torch.equal(batch.targets, batch.teacher_batch.targets)
    assert "Sort these words" in tokenizer.decode(batch.teacher_batch.tokens[0]) and "Sort" not in tokenizer.decode(batch.tokens[0])
    kd_forward.train(cfg)


def test_a_run_from_a_notebook_and_an_unfinished_loss(config, monkeypatch, tmp_path):
    cfg = config("gpt2", steps=5, lr=1e-3)
    real, calls = kd_forward.kd_loss, []

    def broken(*args):
        calls.append(1)
        return tuple(x * float("nan") for x in real(*args)) if len(calls) > 3 else real(*args)
    monkeypatch.setattr(kd_forward, "kd_loss", broken)
    with pytest.raises(common.RunFailed, match=r"nan at step 3.*checkpoint\.pt"):
        kd_forward.train(cfg)
    torch.load(f"{cfg.out}/checkpoint.pt", weights_only=True)  # the good one is still loadable


def test_parameters_that_are_not_finite_are_never_saved(config, monkeypatch):
    """Between two lines of the log nobody looks at the loss: saving does, and keeps the good checkpoint."""
    cfg, real, calls = config("gpt2", steps=6, log_every=100), kd_forward.kd_loss, []

    def broken(*args):
        calls.append(1)
        return tuple(x * float("nan") for x in real(*args)) if len(calls) == 3 else real(*args)
    monkeypatch.setattr(kd_forward, "kd_loss", broken)
    with pytest.raises(common.RunFailed, match=r"at step 4.*checkpoint\.pt"):
        kd_forward.train(cfg)
    saved = torch.load(f"{cfg.out}/checkpoint.pt", weights_only=True)
    assert saved["step"] == 2 and all(v.isfinite().all() for v in saved["parts"]["student"].values())


def test_weights_that_are_not_finite_after_the_last_step_fail_the_run(config, monkeypatch):
    """Nothing comes after it that would look at them: neither a line of the log, with its loss, nor a checkpoint."""
    cfg, step, calls = config("gpt2", steps=3, save_every=100), torch.optim.AdamW.step, []

    def broken(self, *args, **kwargs):
        out = step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            self.param_groups[0]["params"][0].data.fill_(math.nan)
        return out
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(common.RunFailed, match="a weight is no longer a finite number at step 3: .*no checkpoint was due"):
        kd_forward.train(cfg)
    assert not common.Path(cfg.out, "student").exists() and not common.Path(cfg.out, "result.json").exists()
