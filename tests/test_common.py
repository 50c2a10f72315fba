"""Batches, masks, head primitives and sampler: what every method stands on."""
import dataclasses
import gc
import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import KINDS, any_run, small_config
from tokenizers.processors import TemplateProcessing

import common
from common import Example

CPU = torch.device("cpu")


def load(pair, kind, which=1):
    model = common.load_model(pair(kind)[which], CPU)
    return model, common.load_tokenizer(pair(kind)[which], "student")


def examples(n=6, vocab=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(3, vocab, (k,), generator=g).tolist()
    out = []
    for i in range(n):
        p = draw(2 + i % 4)
        out.append(Example(p, p, draw(1 + 2 * i) + [0]))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_rows_predict_exactly_the_response_tokens_incl_eos(pair, kind):
    """The shift by one: each row's hidden state is the one before its target, never the target's own."""
    model, _ = load(pair, kind)
    batch = common.collate(examples(), model)
    assert batch.targets.tolist() == [t for e in examples() for t in e.response]
    assert (batch.targets == 0).sum() == 6 and batch.lengths.tolist() == [len(e.response) for e in examples()]
    if not model.config.is_encoder_decoder:
        flat = batch.tokens.flatten()
        assert torch.equal(flat[batch.positions + 1], batch.targets)  # pad is 0 and so is EOS: lengths decide, not ids
        starts = [len(e.prompt) - 1 for e in examples()]
        firsts = [batch.positions[(batch.owner == i)][0].item() - i * batch.tokens.shape[1] for i in range(6)]
        assert firsts == starts


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_invisible(pair, kind):
    model, _ = load(pair, kind)
    states = common.response_states(model)
    batch = common.collate(examples(), model, bucket_widths=(40,))
    together = states(batch).detach()
    garbage = dataclasses.replace(batch, tokens=batch.tokens.clone())
    if model.config.is_encoder_decoder:
        garbage.tokens[batch.mask == 0] = 77
    else:
        for i, e in enumerate(examples()):
            garbage.tokens[i, len(e.prompt) + len(e.response):] = 77
    assert torch.allclose(states(garbage), together, atol=1e-6)
    alone = torch.cat([states(common.collate([e], model)) for e in examples()])
    assert torch.allclose(alone, together, atol=1e-5)


def test_batches_are_a_function_of_the_step_and_cover_an_epoch(pair, config):
    model, _ = load(pair, "gpt2")
    cfg = config(batch_size=4, accum=2)
    batches = common.Batches(examples(10), model, None, cfg, CPU)
    again = common.Batches(examples(10), model, None, cfg, CPU)
    order = [i for s in range(5) for i in batches.indices(s)]
    assert sorted(order[:10]) == list(range(10)) and sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert all(batches.indices(s) == again.indices(s) for s in (7, 3, 7))
    micro = batches.at(0)
    assert len(micro) == 2 and sum(len(b.ids) for b in micro) == 4


def test_the_order_of_the_data_is_another_for_another_seed(config):
    orders = [[common.step_indices(10, step, config(batch_size=4, seed=seed)) for step in range(5)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    epochs = [common.step_indices(10, epoch, config(batch_size=10, seed=seed)) for seed in range(4) for epoch in range(4)]
    assert len(set(map(tuple, epochs))) == 16  # epoch 1 of seed 0 is not epoch 0 of seed 1


def test_at_most_eight_widths_when_compiled(pair, config):
    model, _ = load(pair, "gpt2")
    batches = common.Batches(examples(12), model, None, config(batch_size=4, compile=True), CPU)
    widths = batches.bucket_widths
    assert widths == sorted(widths) and len(widths) <= 8 and all(w % 8 == 0 for w in widths)
    assert 0 <= widths[-1] - batches.length.max() < 8  # no wider than needed
    assert {b.tokens.shape[1] for s in range(9) for b in batches.at(s)} <= set(batches.bucket_widths)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "opt", "t5-scaled"])
def test_token_logprobs_equal_log_softmax_with_gradient(pair, kind, monkeypatch):
    model, _ = load(pair, kind)
    batch, states = common.collate(examples(), model), common.response_states(model)
    grads, real, again = [], common.checkpoint, []
    monkeypatch.setattr(common, "checkpoint", lambda *args, **kw: again.append(1) or real(*args, **kw))
    for size in (10**6, 4, 1):
        monkeypatch.setattr(common, "chunks", lambda rows, *_, size=size: [slice(i, i + size) for i in range(0, rows, size)])
        model.zero_grad()
        got = common.token_logprobs(model, states(batch), batch.targets)
        (got * torch.linspace(-1, 1, len(got))).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    wanted = common.head_logits(model, states(batch)).log_softmax(-1)[range(len(batch.targets)), batch.targets]
    assert torch.allclose(got, wanted, atol=1e-5)
    assert all(torch.allclose(grads[0], g, atol=1e-5) for g in grads[1:])
    assert len(again) == len(got) > 16  # many chunks do not keep their logits, few do


def test_logits_exist_one_chunk_at_a_time():
    """At Qwen's vocabulary 10,000 rows would take 6 GB for each model; a chunk takes 16 MB at most on a CPU."""
    parts = common.chunks(10_000, 152_064, CPU)
    assert [i for part in parts for i in range(10_000)[part]] == list(range(10_000))
    assert all((part.stop - part.start) * 152_064 * 4 <= 2**24 for part in parts)


def test_bf16_states_give_fp32_logits_and_fp32_head_gradients(pair):
    model, _ = load(pair, "llama")
    hidden, targets = torch.randn(9, 16).bfloat16().requires_grad_(), torch.arange(9)
    seen = []
    loss = lambda q, p, y: (seen.append(q.dtype), torch.nn.functional.cross_entropy(q, y, reduction="none"))[1:]
    with torch.autocast("cpu", torch.bfloat16):
        common.rowwise_loss(loss, model, hidden, targets)[0].backward()
    assert seen == [torch.float32] and hidden.grad.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_head_and_its_bias_are_sums_over_all_chunks(dtype, monkeypatch):
    """GPT-J and Phi have a bias there; under bf16 the head's gradient takes another path."""
    torch.manual_seed(0)
    layer, hidden, targets = torch.nn.Linear(16, 30), torch.randn(11, 16).to(dtype), torch.arange(11)
    model = SimpleNamespace(get_output_embeddings=lambda: layer, vocab=30)
    loss = lambda q, p, y: (torch.nn.functional.cross_entropy(q, y, reduction="none"),)
    monkeypatch.setattr(common, "chunks", lambda rows, *_: [slice(i, i + 4) for i in range(0, rows, 4)])
    common.rowwise_loss(loss, model, hidden.requires_grad_(), targets)[0].backward()
    got = [layer.weight.grad.clone(), layer.bias.grad.clone(), hidden.grad.float()]
    x = hidden.detach().float().requires_grad_()
    wanted = torch.autograd.grad(loss(layer(x), None, targets)[0].sum(), [layer.weight, layer.bias, x])
    assert all(torch.allclose(a, b, rtol=0.05, atol=1e-5 if dtype == torch.float32 else 0.03) for a, b in zip(got, wanted))


def test_only_the_first_value_of_a_row_loss_has_a_gradient(pair):
    model, _ = load(pair, "llama")
    hidden, targets = torch.randn(9, 16, requires_grad=True), torch.arange(9)
    ce = lambda q, y: torch.nn.functional.cross_entropy(q, y, reduction="none")
    one = common.rowwise_loss(lambda q, p, y: (ce(q, y), 100 * q.sum(-1)), model, hidden, targets)
    one[0].backward()
    wanted = torch.autograd.grad(ce(common.head_logits(model, hidden), targets).sum(), hidden)[0]
    assert torch.allclose(hidden.grad, wanted, atol=1e-6) and one.shape == (2,)


def test_heads_of_different_size_are_cut_and_renormalised(config):
    student, teacher, tokenizer = common.load_pair(config("qwen2"), CPU)
    sizes = [m.get_output_embeddings().weight.shape[0] for m in (student, teacher)]
    assert sizes[0] != sizes[1] and student.vocab == teacher.vocab == min(sizes)
    batch = common.collate(examples(), teacher, "teacher")
    assert common.head_logits(teacher, common.response_states(teacher)(batch)).shape[-1] == min(sizes)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_sampling_equals_generate(pair, kind, static):
    model, tokenizer = load(pair, kind)
    prompts = [e.prompt for e in examples()]
    got, logprobs = common.sample(model, prompts, 12, temperature=0, eos=tokenizer.eos_token_id, batch_size=4, static=static)
    for p, r, lp in zip(prompts, got, logprobs):
        ids = torch.tensor([p])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                             eos_token_id=tokenizer.eos_token_id, pad_token_id=0)[0]
        wanted = out[1:].tolist() if model.config.is_encoder_decoder else out[len(p):].tolist()
        assert r == wanted and len(lp) == len(r)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "t5", "t5-scaled"])
def test_sampled_logprobs_are_those_of_the_model(pair, kind, static):
    model, tokenizer = load(pair, kind)
    prompts = [e.prompt for e in examples(12)]
    responses, logprobs = common.sample(model, prompts, 10, seed=3, eos=tokenizer.eos_token_id, static=static)
    batch = common.collate([Example(p, p, r) for p, r in zip(prompts, responses)], model)
    wanted = common.token_logprobs(model, common.response_states(model)(batch), batch.targets)
    assert torch.allclose(torch.cat(logprobs), wanted, atol=1e-4)
    assert responses == common.sample(model, prompts, 10, seed=3, eos=tokenizer.eos_token_id, static=static)[0]


@pytest.mark.parametrize("static", [False, True])
def test_sampled_responses_keep_their_first_eos_and_nothing_after_it(pair, static):
    model, _ = load(pair, "gpt2")
    prompts = [e.prompt for e in examples(12)]
    never, _ = common.sample(model, prompts, 10, eos=model.vocab - 1, static=static)
    eos = max(range(model.vocab), key=lambda t: sum(t in r for r in never))  # a token that comes up often
    responses, logprobs = common.sample(model, prompts, 10, eos=eos, static=static)
    assert any(len(r) < 10 for r in responses) and all(len(r) == len(lp) for r, lp in zip(responses, logprobs))
    assert all(eos not in r[:-1] and (r[-1] == eos or len(r) == 10) for r in responses)


@pytest.mark.parametrize("static", [False, True])
def test_every_batch_of_a_sample_has_noise_of_its_own(pair, static):
    """More prompts than fit into one batch: the same noise in each would give fewer different answers."""
    model, _ = load(pair, "gpt2")
    responses, _ = common.sample(model, [[5, 9, 17]] * 12, 6, eos=0, batch_size=4, static=static)
    assert len({tuple(map(tuple, responses[i:i + 4])) for i in (0, 4, 8)}) == 3


def test_samples_follow_the_exact_distribution(pair):
    """Chi-square over the first token's 12 most likely values and the rest, and over two-token responses."""
    model, tokenizer = load(pair, "llama")
    prompt, n = [5, 9, 17], 6000
    responses, _ = common.sample(model, [prompt] * n, 2, seed=11, eos=tokenizer.eos_token_id, batch_size=3000)
    p1 = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    top = p1.topk(12).indices.tolist()
    expected = [n * p1[t].item() for t in top] + [n * (1 - p1[top].sum().item())]
    observed = [sum(r[0] == t for r in responses) for t in top]
    observed.append(n - sum(observed))
    assert sum((o - e) ** 2 / e for o, e in zip(observed, expected)) < 34.5  # 12 degrees of freedom, p = 0.0006
    a = top[0]
    p2 = model(torch.tensor([prompt + [a]])).logits[0, -1].softmax(-1)
    b = p2.argmax().item()
    joint = n * (p1[a] * p2[b]).item()
    assert abs(sum(r == [a, b] for r in responses) - joint) < 4 * joint**0.5


def test_temperature_and_top_k(pair):
    model, tokenizer = load(pair, "gpt2")
    prompts = [[5, 9, 17]] * 400
    cold, _ = common.sample(model, prompts, 1, temperature=0.2, eos=0)
    hot, logprobs = common.sample(model, prompts, 1, temperature=1.0, top_k=3, eos=0)
    assert len({r[0] for r in cold}) < len({r[0] for r in common.sample(model, prompts, 1, eos=0)[0]})
    top = model(torch.tensor([[5, 9, 17]])).logits[0, -1].topk(3)
    assert {r[0] for r in hot} <= set(top.indices.tolist())
    share = dict(zip(top.indices.tolist(), top.values.log_softmax(-1).tolist()))  # renormalised over the three
    assert all(abs(lp.item() - share[r[0]]) < 1e-4 for r, lp in zip(hot, logprobs))


def test_sampling_leaves_training_mode_and_global_random_state_alone(pair):
    model, _ = load(pair, "gpt2")
    model.train()
    state = torch.get_rng_state()
    common.sample(model, [[5, 6]], 4, eos=0)
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_user_text_never_becomes_a_control_token(pair):
    model, tokenizer = load(pair, "gpt2")
    encode = common.prompt_encoder(tokenizer, "auto", model, 64)
    assert tokenizer.eos_token_id not in encode("ignore this <|endoftext|> and go on")


def test_chat_template_is_used_where_there_is_one(pair):
    model, tokenizer = load(pair, "gpt2")
    tokenizer.chat_template = ("{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}bot:{% endif %}")
    ids = common.prompt_encoder(tokenizer, "auto", model, 64)("the <|endoftext|> cat")
    assert tokenizer.decode(ids) == "<|endoftext|>user: the <|endoftext|> cat\nbot:" and ids.count(tokenizer.eos_token_id) == 1
    plain = common.prompt_encoder(tokenizer, "Q: {prompt} A:", model, 64)("the cat")
    assert tokenizer.decode(plain) == "Q: the cat A:"


END = "<|endoftext|>"


@pytest.mark.parametrize("ends, wanted", [([END, "!"], "!"), ([END, "?"], END), ("!", END), (None, END)])
def test_an_answer_ends_where_a_chat_model_ends_its_turn(pair, tmp_path, ends, wanted):
    """The tokenizers of Gemma and Phi-3 name the end of a text as EOS, and only the generation config the end of a turn."""
    shutil.copytree(pair("gpt2")[1], tmp_path / "chat")
    tokenizer = common.load_tokenizer(tmp_path / "chat", "student")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}!\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    file = tmp_path / "chat/generation_config.json"
    if ends is None:
        file.unlink()
    else:
        file.write_text(json.dumps({"eos_token_id": tokenizer.convert_tokens_to_ids(ends)}))
    assert common.load_tokenizer(tmp_path / "chat", "student").eos_token == wanted
    begin = TemplateProcessing(single="the $A", special_tokens=[("the", tokenizer.convert_tokens_to_ids("the"))])
    tokenizer.backend_tokenizer.post_processor = begin  # as Gemma's, which puts its BOS before every text
    tokenizer.save_pretrained(tmp_path / "chat")
    assert common.load_tokenizer(tmp_path / "chat", "student").eos_token == wanted
    (tmp_path / "chat/chat_template.jinja").unlink()
    assert common.load_tokenizer(tmp_path / "chat", "student").eos_token == END  # no chat, no turns


def test_a_prompt_is_the_same_on_another_day(pair):
    model, tokenizer = load(pair, "gpt2")
    tokenizer.chat_template = ("{% if not date_string is defined %}{% set date_string = strftime_now('%H:%M:%S.%f') %}{% endif %}"
                               "{{ date_string }} {{ messages[0].content }}")
    assert tokenizer.decode(common.prompt_encoder(tokenizer, "auto", model, 64)("the cat")) == "26 Jul 2024 the cat"


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(pair):
    """Llama's tokenizers put a begin-of-sequence token there: once, and before the template."""
    model, tokenizer = load(pair, "llama")
    begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    for template, text in (("auto", "the cat\n"), ("Q: {prompt} A:", "Q: the cat A:")):
        ids = common.prompt_encoder(tokenizer, template, model, 64)("the cat")
        assert ids[0] == 0 and 0 not in ids[1:] and tokenizer.decode(ids[1:]) == text
    short = common.prompt_encoder(tokenizer, "auto", model, 4)("the cat sat on the mat")
    assert len(short) == 4 and short[0] == 0


def test_long_prompts_lose_their_beginning_and_keep_the_template(pair):
    model, tokenizer = load(pair, "gpt2")
    encode = common.prompt_encoder(tokenizer, "Q: {prompt} A:", model, 12)
    ids = encode("the cat sat on the mat and then it ran under the green house")
    assert len(ids) == 12 and tokenizer.decode(ids).startswith("Q:") and tokenizer.decode(ids).endswith("green house A:")
    assert encode.cut == 1


def test_models_that_change_logits_after_the_head_are_refused(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM
    config = Gemma2Config(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(common.BadInput, match="after the output head"):
        common.load_model(tmp_path, CPU)


def test_a_model_that_is_no_transformer_is_refused_in_one_sentence(config, tmp_path):
    """Mamba keeps a state, not keys and values: the sampler cannot cut rows from that when their responses end."""
    n = dict(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    transformers.MambaForCausalLM(transformers.MambaConfig(**n)).save_pretrained(tmp_path / "mamba")
    for role in ("student", "teacher"):
        with pytest.raises(common.BadInput, match=f"--{role} .*MambaForCausalLM .*: choose a transformer such as GPT-2") as said:
            common.load_model(tmp_path / "mamba", CPU, role=role)
        assert "\n" not in str(said.value)


def test_a_teacher_is_frozen_and_in_eval_mode(config):
    student, teacher, _ = common.load_pair(config("gpt2"), CPU)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not student.training and all(p.requires_grad for p in student.parameters())


def test_another_teacher_never_meets_the_cache(pair):
    a, b = (common.load_model(d, CPU) for d in pair("llama"))
    before = common.fingerprint(a)
    assert before != common.fingerprint(b) and before == common.fingerprint(a)
    weight = next(a.parameters()).data
    as_it_was, found = weight.clone(), {before}
    for changed in (slice(1, None), slice(len(weight) // 2, None), slice(None)):  # a pad token's row is never trained
        weight[changed] += 0.01
        found.add(common.fingerprint(a))
        weight.copy_(as_it_was)
    assert len(found) == 4 and before == common.fingerprint(a)


def test_every_seed_step_and_process_has_noise_of_its_own(pair, monkeypatch):
    seeds = [common.noise_seed(seed, step) for seed in range(3) for step in range(-2, 50)]
    monkeypatch.setattr(common, "processes", lambda: (1, 2))
    seeds += [common.noise_seed(seed, step) for seed in range(3) for step in range(-2, 50)]
    assert len(set(seeds)) == len(seeds)
    model, _ = load(pair, "gpt2")
    drawn = [common.sample(model, [[3, 4]] * 4, 8, seed=common.noise_seed(seed, step), eos=0)[0] for seed, step in ((0, 0), (1, 0), (0, 1))]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2]


def test_answers_to_one_template_never_meet_another(pair, config):
    teacher, tokenizer = load(pair, "llama", 0)
    cfg, answered = config("llama", max_response=8), []
    for ids in ([5, 6], [7, 8]):  # the student reads the same prompt, the teacher another one
        part = [Example(e.prompt, ids + e.prompt, []) for e in examples(20)]
        answered.append([e.response for e in common.teacher_answers(teacher, part, tokenizer, cfg)])
        assert answered[-1] == [e.response for e in common.answer_examples(teacher, part, tokenizer, cfg, seed=cfg.seed, role="teacher")]
    assert answered[0] != answered[1]


def test_answers_from_a_cut_vocabulary_never_meet_a_whole_one(pair, config, capsys):
    """With a student of a smaller head the teacher's distribution is cut to that size: these are other answers."""
    teacher, tokenizer = load(pair, "llama", 0)
    part, cfg = [Example(e.prompt, e.prompt, []) for e in examples(20)], config("llama", max_response=8)
    answered = lambda: [e.response for e in common.teacher_answers(teacher, part, tokenizer, cfg)]
    whole, teacher.vocab = teacher.vocab, 40
    cut = answered()
    assert max(t for r in cut for t in r) < 40
    teacher.vocab = whole
    assert max(t for r in answered() for t in r) >= 40 and capsys.readouterr().out.count("the teacher answers 20 prompts") == 2
    teacher.vocab = 40
    assert answered() == cut and "the teacher answers" not in capsys.readouterr().out


def test_answers_to_other_prompts_are_never_taken_from_the_cache(pair, config):
    teacher, tokenizer = load(pair, "llama", 0)
    cfg = config("llama", max_response=8)
    for seed in (0, 1):  # as many prompts, other ones
        part = [Example(e.prompt, e.prompt, []) for e in examples(20, seed=seed)]
        got = common.teacher_answers(teacher, part, tokenizer, cfg)
        wanted = common.answer_examples(teacher, part, tokenizer, cfg, seed=cfg.seed, role="teacher")
        assert [e.response for e in got] == [e.response for e in wanted]


def test_answers_of_another_length_never_meet_the_cache(pair, config):
    teacher, tokenizer = load(pair, "llama", 0)
    part = [Example(e.prompt, e.prompt, []) for e in examples()]
    longest = lambda n: max(len(e.response) for e in common.teacher_answers(teacher, part, tokenizer, config("llama", max_response=n)))
    assert [longest(n) for n in (8, 4, 8)] == [8, 4, 8]


def test_answers_that_end_otherwise_never_meet_the_cache(pair, config):
    teacher, tokenizer = load(pair, "llama", 0)
    part = [Example(e.prompt, e.prompt, []) for e in examples(20)]
    answers = lambda: [e.response for e in common.teacher_answers(teacher, part, tokenizer, config("llama", max_response=8))]
    first = answers()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first[0][2])
    assert answers()[0] == first[0][:first[0].index(first[0][2]) + 1] and answers() != first


# ---- what makes sampling faster changes no number -------------------------------------------------------------------
def test_noise_is_that_of_exponential():
    like = torch.empty(7, 501)
    plain = torch.empty_like(like).exponential_(generator=torch.Generator().manual_seed(3)).clamp(min=1e-30).log().neg()
    assert torch.equal(common.gumbel(like, torch.Generator().manual_seed(3)), plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_preallocated_cache_changes_no_sample(kind, monkeypatch):
    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    model = auto.from_config(small_config(kind, 32, 40)).eval()
    model.vocab = 40
    prompts = [list(range(2, 3 + n)) for n in (1, 4, 9, 2, 7, 3)]
    hot = 100.0 if kind == "t5" else 1.0  # small random T5s repeat themselves
    made = lambda: common.sample(model, prompts, 40, hot, seed=2, eos=1)  # rows end at different times and leave
    monkeypatch.setattr(common, "STEP", 3)  # room is added often
    preallocated = made()
    assert len({len(r) for r in preallocated[0]}) > 2
    monkeypatch.setattr(common, "preallocated_cache", lambda config: transformers.DynamicCache(config=config))
    plain = made()
    assert preallocated[0] == plain[0] and all(torch.equal(a, b) for a, b in zip(preallocated[1], plain[1]))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_give_the_same_gradients_and_the_sampler_keeps_its_cache(pair, kind, train):
    """In eval mode too, in which llmr.py and dpkd.py train; with GPT-2's dropout in training mode."""
    student = common.load_model(str(pair(kind)[1]), torch.device("cpu")).train(train)
    batch = common.collate([Example([5, 6, 7], [5, 6, 7], [8, 9, 3]), Example([4, 9], [4, 9], [7, 2])], student)
    calls, grads = [], []
    layer = next(m for m in student.modules() if isinstance(m, common.GradientCheckpointingLayer))
    layer.register_forward_pre_hook(lambda *_: calls.append("outside"))
    leaf = next(m for m in layer.modules() if not list(m.children()) and list(m.parameters()))
    leaf.register_forward_pre_hook(lambda *_: calls.append("inside"))
    for again in (False, True):
        if again:
            common.recompute(student)
        calls.clear()
        torch.manual_seed(0)
        common.response_states(student)(batch).square().sum().backward()
        assert calls.count("inside") == (2 if again else 1) * calls.count("outside")
        grads.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
        student.zero_grad()
    assert len(grads[0]) == len(grads[1]) > 3 and all(torch.equal(a, b) for a, b in zip(*grads))
    calls.clear()
    common.sample(student, [[5, 6, 7]], 6, eos=0)
    assert calls.count("inside") == calls.count("outside")


def test_under_autocast_the_head_gets_states_of_its_dtype(pair, monkeypatch):
    """Llama's last norm has fp32 weights and gives fp32 states, with which the head would run in fp32."""
    student = common.load_model(str(pair("llama")[1]), torch.device("cpu"))
    batch, states = common.collate([Example([5, 6], [5, 6], [8, 3])], student), common.response_states(student)
    assert states(batch).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert states(batch).dtype == torch.bfloat16
    seen, project = set(), common.project
    monkeypatch.setattr(common, "project", lambda hidden, *head: seen.add(hidden.dtype) or project(hidden, *head))
    common.sample(student, [[5, 6]], 3, eos=0, dtype=torch.bfloat16)  # the sampler's head, too
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("script", ["kd_forward", "llmr", *[pytest.param(x, marks=pytest.mark.slow)
                                                          for x in ("dpkd", "gold", "ddk")]])
def test_a_step_leaves_nothing_to_the_garbage_collector(script, any_root, tmp_path, monkeypatch):
    """Objects in a reference cycle live on, with their tensors, until the collector comes, which is rare in a process
    with as many objects as transformers makes: a batch that held itself let resident memory creep for hours."""
    cfg = any_run(script, any_root, tmp_path / "run", steps=6, eval_every=6, save_every=6, log_every=6, budget=16)
    left, end_step = [], common.Run.end_step

    def after_step(self, step, **parts):
        end_step(self, step, **parts)
        left.append(gc.collect())  # what the step left in cycles
    monkeypatch.setattr(common.Run, "end_step", after_step)
    gc.disable()
    gc.freeze()  # what was there before need not be looked through each time
    try:
        importlib.import_module(script).train(cfg)
    finally:
        gc.unfreeze()
        gc.enable()
    assert left[-5:-1] == [0, 0, 0, 0]  # the first may have lazy imports, the last saves
