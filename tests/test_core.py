"""common.py: batches, hidden states, chunks and the sampler, against transformers' plain forward
pass of one unpadded example at a time."""
import copy
import functools
import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, plain_logits, small_model, small_run
from transformers import TopKLogitsWarper, TopPLogitsWarper

import common
import dpkd
import kd_forward
from common import Example

CPU = torch.device("cpu")


def load(pair, kind, role=1):
    return common.load_model(str(pair(kind)[role]), "student", CPU)


def examples(n=6, top=200, seed=0):
    """Ragged ones; EOS (0, of T5 1) also stands inside prompts."""
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(2, top) for _ in range(rng.randint(low, high))]
    prompts = [draw(1, 4) + [0] + draw(0, 5) for _ in range(n)]
    return [Example(x, x, draw(1, 6) + [0] * (i % 2)) for i, x in enumerate(prompts)]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, wanted, tol=2e-5):
    assert found.keys() == wanted.keys() and len(found) > 3
    scale = sum(g.norm() for g in wanted.values()) / len(wanted)
    for name in wanted:  # some are 0 in theory, such as those of the biases of OPT's keys
        assert (found[name] - wanted[name]).norm() < tol * (wanted[name].norm() + scale), name


# ---- batches ------------------------------------------------------------------------------------
def test_collate_gives_its_worked_example():
    """EOS is 0, and so is the fill: a response keeps its own EOS, and no padding is a target."""
    model = small_model("gpt2", 16, 40)
    batch = common.collate([Example([5, 6], [5, 6], [7, 8, 0]), Example([9], [9], [3])], model)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 0], [9, 3, 0, 0, 0]]
    assert batch.positions.tolist() == [1, 2, 3, 5 + 0] and batch.targets.tolist() == [7, 8, 0, 3]
    assert batch.owner.tolist() == [0, 0, 0, 1] and batch.lengths.tolist() == [3, 1]


def test_collate_shifts_the_response_of_an_encoder_decoder_and_masks_by_length():
    """T5's padding and its start are both 0; a 0 within a prompt is not masked."""
    model = small_model("t5", 16, 40)
    batch = common.collate([Example([5, 0], [8, 8, 8], [7, 8, 1]), Example([9], [4], [3])], model)
    assert batch.tokens.tolist() == [[5, 0], [9, 0]] and batch.mask.tolist() == [[1, 1], [1, 0]]
    assert batch.decoder_tokens.tolist() == [[0, 7, 8], [0, 0, 0]]
    assert batch.positions.tolist() == [0, 1, 2, 3] and batch.targets.tolist() == [7, 8, 1, 3]
    model.role = "teacher"
    teachers = common.collate([Example([5], [8, 8, 8], [7])], model)
    assert teachers.tokens.tolist() == [[8, 8, 8]]


def test_every_epoch_is_another_permutation_and_a_function_of_seed_and_step():
    cfg, n = SimpleNamespace(seed=3, batch_size=4), 10
    stream = [i for step in range(10) for i in common.step_indices(n, step, cfg)]
    epochs = [stream[i:i + n] for i in range(0, 40, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert common.step_indices(n, 7, cfg) == stream[28:32]  # what a resumed run reads
    assert common.step_indices(n, 7, SimpleNamespace(seed=4, batch_size=4)) != stream[28:32]


def test_processes_share_a_step_without_overlap_and_draw_with_seeds_of_their_own(monkeypatch):
    cfg = SimpleNamespace(seed=0, batch_size=6)
    whole, seeds = common.step_indices(10, 5, cfg), set()
    shares = []
    for rank in (0, 1, 2):
        monkeypatch.setattr(common, "processes", lambda: (rank, 3))
        shares.append(common.step_indices(10, 5, cfg))
        assert common.step_indices(10, 5, cfg, of_all=True) == whole
        seeds |= {common.sample_seed(s, t) for s in (0, 1) for t in (-2, 0, 1)}
    assert [len(share) for share in shares] == [2, 2, 2] and len(seeds) == 18
    assert sorted(sum(shares, [])) == sorted(whole)


# ---- hidden states, logits, chunks --------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_logits_are_those_of_the_plain_forward_pass_whatever_the_padding(
        pair, kind, monkeypatch):
    model, rows = load(pair, kind), examples()
    wanted = torch.cat([plain_logits(model, e.prompt, e.response) for e in rows])
    for fill in (0, 7):
        monkeypatch.setattr(common, "pad", lambda lists, left=False: torch.tensor(
            [x + [fill] * (max(map(len, lists)) - len(x)) for x in lists]))
        batch = common.collate(rows, model)
        got = common.logits_of(model, common.response_states(model, batch))
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def heads(kind):
    """A student and a teacher whose heads differ in size or have a bias."""
    student, teacher = (small_model(kind, 16, V, seed) for V, seed in ((50, 0), (46, 1)))
    if kind == "llama":  # as Phi and GPT-J have it
        for model in (student, teacher):
            model.lm_head.bias = torch.nn.Parameter(torch.randn(len(model.lm_head.weight)))
    for model in (student, teacher):
        model.vocab = 46
    return student, teacher.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [10**6, 5, 1])
def test_the_gradient_of_chunks_is_that_of_all_logits_at_once(kind, chunk, monkeypatch):
    """Of KD: the textbook makes the logits of the whole batch. Padded and biased heads as well."""
    (student, teacher), rows = heads(kind), examples(top=40)
    monkeypatch.setattr(common, "chunk_slices", lambda hidden, model: [
        slice(i, i + chunk) for i in range(0, len(hidden), chunk)])
    batch = common.collate(rows, student)
    hidden, teacher_hidden = (common.response_states(m, batch) for m in (student, teacher))
    for at, part in common.in_chunks(hidden, student):
        f, g = common.logits_of(student, part), common.logits_of(teacher, teacher_hidden[at])
        loss = kd_forward.kd_loss(f, g, batch.targets[at], 0.6, 2.0)[0]
        (loss.sum() / len(batch.targets)).backward()
    found = gradients(student)
    f, g = (torch.cat([plain_logits(m, e.prompt, e.response)[:, :46] for e in rows])
            for m in (student, teacher))
    kd_forward.kd_loss(f, g, batch.targets, 0.6, 2.0)[0].mean().backward()
    assert_same(found, gradients(student))
    assert kind != "llama" or "lm_head.bias" in found


def test_leaving_the_loop_over_chunks_early_loses_the_gradients_of_the_model(monkeypatch):
    """As the docstring of in_chunks warns: the head has its gradient, no layer has."""
    student = heads("llama")[0]
    batch = common.collate(examples(top=40), student)
    for _, part in common.in_chunks(common.response_states(student, batch), student):
        common.logits_of(student, part).sum().backward()
        break
    assert all(name.startswith("lm_head") for name in gradients(student))


def test_chunks_cover_all_rows_once_and_hold_sixteen_megabytes_of_logits_at_most():
    for rows, vocab in ((1, 50), (77, 150_000), (5000, 1000), (3, 10**8)):
        slices = common.chunk_slices(torch.zeros(rows, 2), SimpleNamespace(vocab=vocab))
        sizes = [len(range(rows)[s]) for s in slices]
        assert [i for s in slices for i in range(rows)[s]] == list(range(rows))
        assert max(sizes) * vocab * 4 <= max(2**24, 4 * vocab) and min(sizes) > 0
    assert len(common.chunk_slices(torch.zeros(900, 2), SimpleNamespace(vocab=4000))) == 1


@pytest.mark.parametrize("kind", ["gpt2", "t5-scaled"])
def test_response_logprobs_are_sums_over_whole_responses_and_their_gradient_is_exact(
        kind, monkeypatch):
    model, rows = heads(kind)[0], examples(top=40)
    monkeypatch.setattr(common, "chunk_slices", lambda hidden, model: [
        slice(i, i + 5) for i in range(0, len(hidden), 5)])
    weights, batch = torch.randn(len(rows)), common.collate(rows, model)
    got = dpkd.response_logprobs(model, batch)
    (weights * got.sigmoid()).sum().backward()
    found = gradients(model)
    wanted = torch.stack([plain_logits(model, e.prompt, e.response)[:, :46].log_softmax(-1)[
        range(len(e.response)), e.response].sum() for e in rows])
    (weights * wanted.sigmoid()).sum().backward()
    assert torch.allclose(got, wanted, rtol=1e-5) and not torch.allclose(got, wanted * 0)
    assert_same(found, gradients(model), 1e-4)


def test_a_teachers_cached_states_are_right_and_it_does_not_run_again():
    student, teacher = heads("gpt2")
    rows, kept = examples(top=40), {}
    first = common.collate(rows, student, teacher)
    assert torch.equal(kd_forward.cached_states(teacher, first, kept),
                       common.response_states(teacher, first))
    again = common.collate(rows[::-1], student)  # other batches of the next epoch
    states = kd_forward.cached_states(None, again, kept)
    assert torch.allclose(states, common.response_states(teacher, again), atol=1e-5)


def test_a_loaded_teacher_is_frozen_in_eval_mode_and_cut_to_the_tokens_that_both_heads_have(pair):
    cfg = small_run(kd_forward.Config, pair("qwen2"), "", "", recompute=True)
    student, teacher = common.load_pair(cfg, CPU)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    sizes = [len(m.get_output_embeddings().weight) for m in (student, teacher)]
    assert student.vocab == teacher.vocab == min(sizes) < max(sizes)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


# ---- dropout, recompute, bf16, compile ----------------------------------------------------------
def states_loss(model, rows):
    batch = common.collate(rows, model)
    states = common.response_states(model, batch)
    return F.cross_entropy(common.logits_of(model, states), batch.targets)


@pytest.mark.parametrize("kind", KINDS)
def test_recompute_gives_equal_gradients_runs_layers_twice_and_leaves_the_sampler_its_cache(kind):
    model, rows, found, calls = small_model(kind, 16, 50), examples(top=40), [], []
    model.vocab, model.tokenizer = 50, SimpleNamespace(eos_token_id=49)
    common.no_dropout(model.train())
    leaf = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) or
            type(m).__name__ == "Conv1D"][-2]  # of the last layer
    leaf.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape))
    texts = common.sample(model, [[5, 6, 7]], 6)
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls.clear()
        states_loss(model, rows).backward()
        found.append(gradients(model))
        assert len(calls) == 1 + again
    assert_same(found[1], found[0])
    calls.clear()
    assert common.sample(model, [[5, 6, 7]], 6) == texts
    assert {shape[-2] for shape in calls[1:]} == {1}  # one new token at a time


@pytest.mark.parametrize("kind", KINDS)
def test_under_bf16_autocast_logits_are_fp32_and_gradients_those_of_fp32_softmaxes(kind):
    """Llama's last norm gives fp32 states, which the head would then multiply in fp32."""
    model, rows = small_model(kind, 32, 50), examples(top=40)
    model.vocab, batch = 50, common.collate(rows, model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = [plain_logits(model, e.prompt, e.response) for e in rows]
        F.cross_entropy(torch.cat(plain).float(), batch.targets).backward()
        wanted = gradients(model)
        hidden = common.response_states(model, batch)
        assert hidden.dtype == torch.bfloat16
        for at, part in common.in_chunks(hidden, model):
            logits = common.logits_of(model, part)
            assert logits.dtype == torch.float32
            loss = F.cross_entropy(logits, batch.targets[at], reduction="sum")
            (loss / len(batch.targets)).backward()
    found = gradients(model)
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert_same(found, wanted, 0.02)


@pytest.mark.slow
def test_a_compiled_model_serves_all_widths_samples_eagerly_and_copies_with_its_own_weights():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, plain = small_model("llama", 16, 50), small_model("llama", 16, 50)
    for m in (model, plain):
        m.vocab, m.tokenizer = 50, SimpleNamespace(eos_token_id=0)
    model.base_model.compile(dynamic=True, backend=backend)
    for seed in range(4):
        rows = examples(top=40, seed=seed)
        assert torch.allclose(states_loss(model, rows), states_loss(plain, rows))
    assert 0 < len(graphs) <= 2
    n = len(graphs)
    assert common.sample(model, [[5], [6, 7]], 8) == common.sample(plain, [[5], [6, 7]], 8)
    assert len(graphs) == n
    copied = copy.deepcopy(model)  # llmr's sampler
    copied.model.layers[0].mlp.down_proj.weight.data *= 2
    plain.model.layers[0].mlp.down_proj.weight.data *= 2
    assert torch.allclose(states_loss(copied, rows), states_loss(plain, rows))
    assert not torch.allclose(states_loss(model, rows), states_loss(plain, rows))


# ---- the sampler --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_sampling_equals_generate_on_ragged_prompts(pair, kind):
    """One of the first tokens serves as EOS, so that rows end at different times and leave."""
    model = load(pair, kind, role=0)
    prompts = [e.prompt for e in examples(9)]
    plain = common.sample(model, prompts, 12, temperature=0)
    often = Counter(t for y in plain for t in set(y[1:9])).most_common(4)
    model.tokenizer = SimpleNamespace(eos_token_id=often[-1][0])
    got = common.sample(model, prompts, 12, temperature=0, batch_size=5)
    for x, y in zip(prompts, got):
        out = model.generate(torch.tensor([x]), attention_mask=torch.ones(1, len(x)).long(),
                             do_sample=False, max_new_tokens=12, pad_token_id=0,
                             eos_token_id=model.tokenizer.eos_token_id)[0].tolist()
        assert y == out[1 if model.config.is_encoder_decoder else len(x):]
    assert any(len(y) < 12 for y in got)


def chance_of(logits_after, y, temperature, top_k, top_p):
    """The probability of a response when the sampler is told this; by loops."""
    chance = 1.0
    for t, token in enumerate(y):
        logits = logits_after(y[:t]) / temperature
        order = logits.argsort(descending=True).tolist()[:top_k or None]
        share = logits[order].softmax(-1).tolist()
        n = next(n for n in range(1, len(order) + 1)
                 if sum(share[:n]) >= top_p or n == len(order))
        chance *= share[order.index(token)] / sum(share[:n]) if token in order[:n] else 0.0
    return chance


@pytest.mark.parametrize("kind, told", [
    ("gpt2", (1.0, 0, 1.0)), ("t5-scaled", (1.0, 0, 1.0)), ("gpt2", (0.7, 4, 0.9)),
    ("llama", (2.0, 3, 1.0))])
def test_samples_follow_the_exact_probabilities_of_all_responses(kind, told):
    """Chi-square over every response of at most three of five tokens; rows leave as they end."""
    model, n = small_model(kind, 16, 5, seed=4), 3000
    model.vocab, model.tokenizer = 5, SimpleNamespace(eos_token_id=0)
    words = range(1, 5)
    ended = [(*y, 0) for k in range(3) for y in itertools.product(words, repeat=k)]
    prompts = [[3, 2, 4, 1], [2]]
    temperature, top_k, top_p = told
    warpers = [TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)] if top_k else []
    drawn = common.sample(model, prompts * n, 3, temperature, warpers, seed=7)
    for i, x in enumerate(prompts):
        seen = Counter(map(tuple, drawn[i::2]))
        logits_after = functools.cache(lambda y: plain_logits(model, x, [*y, 0])[-1])
        chances = {y: chance_of(logits_after, y, *told)
                   for y in [*ended, *itertools.product(words, repeat=3)]}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-5) and set(seen) <= set(chances)
        assert not any(seen[y] for y in chances if chances[y] == 0)
        cells = [y for y in chances if n * chances[y] >= 5]
        parts = [(seen[y], n * chances[y]) for y in cells]
        parts.append((n - sum(a for a, _ in parts), n - sum(b for _, b in parts) + 1e-3))
        chi2 = sum((a - b) ** 2 / b for a, b in parts[:-1 if parts[-1][1] < 5 else None])
        assert len(cells) > 5 and chi2 < len(cells) + 4 * math.sqrt(2 * len(cells))


def test_a_seed_gives_the_same_text_again_and_leaves_everything_else_as_it_was(pair):
    """Dropout is off; batches of one call do not repeat each other's random numbers."""
    model = load(pair, "gpt2").train()
    state = torch.get_rng_state()
    draw = lambda seed, prompts: common.sample(model, prompts, 6, seed=seed, batch_size=4)
    prompts = [[5, 9, 17]] * 12
    first = draw(3, prompts)
    assert first == draw(3, prompts) != draw(4, prompts)
    assert len({tuple(map(tuple, first[i:i + 4])) for i in (0, 4, 8)}) == 3
    assert model.training and torch.equal(state, torch.get_rng_state())
