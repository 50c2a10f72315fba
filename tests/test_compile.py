"""What --compile and a GPU would run, looked at without a GPU: torch.compile with a backend that only counts."""
import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import any_run
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import common

CPU = torch.device("cpu")


class Counter:
    """A backend of torch.compile: keeps the graphs, counts their calls, runs them as they are."""

    def __init__(self):
        self.graphs, self.calls = [], 0

    def __call__(self, graph, inputs):
        self.graphs.append(graph)

        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def counter(monkeypatch):
    """torch.compile counts; a frame that is left uncompiled for too many recompilations is an error."""
    counter, compile = Counter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, dynamic=None, **_: compile(f, backend=counter, dynamic=dynamic))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield counter
    torch._dynamo.reset()


def models(pair, kind):
    return [common.load_model(str(path), CPU) for path in pair(kind)]


def batches(model, widths):
    """One batch of two responses for each width."""
    for width in widths:
        ids = list(range(3, 3 + width))
        yield common.collate([common.Example(ids[:2], ids[:2], ids[2:]), common.Example(ids[:3], ids[:3], ids[3:])], model)


def attention_nodes(graph):
    return [n for n in graph.graph.nodes if "scaled_dot_product_attention" in str(n.target)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_every_width_of_both_models_is_one_compiled_graph(pair, kind, counter):
    """dynamo's limit counts the recompilations of a piece of code, which student and teacher share."""
    widths, teacher_and_student = range(8, 18, 2), models(pair, kind)  # ten compilations; the limit was eight
    for model in teacher_and_student:
        states = common.response_states(model, compiled=True)
        for _ in range(2):
            for batch in batches(model, widths):
                states(batch)
    assert len(counter.graphs) == 2 * len(widths)  # no graph is broken in two
    assert counter.calls == 2 * 2 * len(widths)    # and none runs outside of what was compiled


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_training_makes_no_mask_and_is_causal(pair, kind, counter):
    for model in models(pair, kind):
        plain, compiled = common.response_states(model), common.response_states(model, compiled=True)
        for batch in batches(model, [9, 12]):
            got, wanted = compiled(batch), plain(batch)
            assert torch.allclose(got, wanted, atol=1e-6)
    nodes = [n for graph in counter.graphs for n in attention_nodes(graph)]
    assert len(nodes) == 2 * 2 * 2  # models, widths, layers
    for n in nodes:
        assert n.kwargs.get("attn_mask") is None and n.kwargs["is_causal"] is True
        assert kind == "gpt2" or n.kwargs.get("enable_gqa")  # keys are not repeated for the heads that share them


def test_the_mask_is_still_there_where_windows_slide_and_for_encoder_decoders(pair):
    model = models(pair, "llama")[1]
    with common.attention(model, "causal"):
        assert model.config._attn_implementation == "causal"
    assert model.config._attn_implementation == "sdpa"
    model.config.sliding_window = 4
    with common.attention(model, "causal"):
        assert model.config._attn_implementation == "sdpa"
    t5 = models(pair, "t5")[1]
    with common.attention(t5, "causal"):
        assert t5.config._attn_implementation != "causal"


def test_the_windows_of_a_model_for_images_are_those_of_its_text_part():
    """Gemma 3's own config has no windows, the text config inside it has."""
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(**small, vocab_size=50, num_key_value_heads=1, head_dim=8, sliding_window=4,
                layer_types=["sliding_attention", "full_attention"])
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=dict(**small, image_size=14, patch_size=14))
    model = Gemma3ForConditionalGeneration(config).eval()
    model.vocab, ids = 50, list(range(3, 23))
    batch = common.collate([common.Example(ids[:2], ids[:2], ids[2:])], model)
    with torch.no_grad():
        got = common.head_logits(model, common.response_states(model)(batch))
        wanted = model(input_ids=torch.tensor([ids])).logits[0, 1:-1]
    assert torch.allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow),
                                  pytest.param("t5", marks=pytest.mark.slow)])
def test_every_new_token_is_a_compiled_step_on_the_same_cache(pair, kind, counter):
    model, prompts, n = models(pair, kind)[1], [[5, 6, 7], [8, 9]], 12
    eos = len(common.head(model)[0]) - 1  # seldom drawn: all n tokens are
    wanted, _ = common.sample(model, prompts, n, seed=3, eos=eos, static=True)
    for _ in range(2):
        got, _ = common.sample(model, prompts, n, seed=3, eos=eos, compiled=True, static=True)
        assert got == wanted
        steps = max(map(len, got)) - 1  # the first token comes from the prompt, uncompiled
        assert counter.calls % steps == 0 and counter.calls >= steps
    assert len(counter.graphs) == 1 and counter.calls == 2 * steps


def test_the_static_cache_keeps_its_addresses_and_forgets_its_content(pair, counter):
    model = models(pair, "llama")[1]
    config = model.config
    once = lambda model: common.sample(model, [[5, 6], [7, 8, 9]], 5, seed=0, eos=1, static=True, compiled=True)[0]
    first = common.static_cache(model, config, "self", 2, 64, compiled=True)
    once(model)
    addresses = [layer.keys.data_ptr() for layer in first.layers]
    again = once(model)
    assert common.static_cache(model, config, "self", 2, 64, compiled=True) is first
    assert [layer.keys.data_ptr() for layer in first.layers] == addresses
    assert again == once(common.load_model(str(model.name_or_path), CPU))


@pytest.mark.parametrize("kind, device, wanted", [("GPT2LMHeadModel", "cuda", True), ("GPTNeoForCausalLM", "cuda", False),
                                                  ("GPT2LMHeadModel", "cpu", False)])
def test_a_gpu_samples_on_a_static_cache_if_the_models_class_can(kind, device, wanted, monkeypatch):
    """GPT-Neo takes the width of a cache for the position; who would sample is asked for no sample here."""
    seen, generator = [], SimpleNamespace(manual_seed=lambda seed: None)
    model = SimpleNamespace(device=torch.device(device), dtype=torch.float32, training=False, eval=lambda: None, train=lambda mode: None,
                            _can_compile_fullgraph=getattr(transformers, kind)._can_compile_fullgraph)
    monkeypatch.setattr(torch, "Generator", lambda device: generator)
    monkeypatch.setattr(common, "cache_rows", lambda model, length: 8)
    monkeypatch.setattr(common, "attention", lambda model, name: contextlib.nullcontext())
    monkeypatch.setattr(common, "_sample_batch", lambda *args: seen.append(args[-1]) or (torch.ones(1, 2), torch.zeros(1, 2)))
    common.sample(model, [[5, 6]], 2, eos=1)
    assert seen == [wanted]


def test_static_caches_are_kept_for_graphs_only_and_not_without_end(pair, counter, monkeypatch):
    model = models(pair, "llama")[1]
    common.sample(model, [[5, 6]], 5, seed=0, eos=1, static=True)
    assert model not in common._static_caches  # nothing is compiled: nothing is kept
    monkeypatch.setattr(common, "cache_rows", lambda model, length: 512 // length)  # 8 rows of 64
    for rows, width in ((6, 64), (1, 128), (1, 64), (3, 64)):  # .75, .25, .125 and .375 of what may be kept
        common.static_cache(model, model.config, "self", rows, width, compiled=True)
    assert set(common._static_caches[model]) == {("self", 3, 64)}


def test_a_batch_of_the_sampler_has_keys_and_values_of_sixteen_gib_at_most(pair, counter):
    """Counted by a run of the sampler itself: what its cache holds of one sequence, times the rows of a batch."""
    model = models(pair, "llama")[1]
    common.sample(model, [[5, 6]], 62, seed=0, eos=1, static=True, compiled=True)
    cache = common.static_cache(model, model.config, "self", 1, 64, compiled=True)
    one = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    rows = common.cache_rows(model, 64)
    assert rows * one <= 2**34 < (rows + 1) * one


def test_grouped_heads_share_their_keys_without_a_copy(monkeypatch):
    """The attention of one new token against heads that each get their own copy of the keys."""
    torch.manual_seed(0)
    B, heads, kv, room, D = 3, 6, 2, 9, 4
    query, key, value = torch.randn(B, heads, 1, D), torch.randn(B, kv, room, D), torch.randn(B, kv, room, D)
    mask = (torch.rand(B, 1, 1, room) > 0.3) | (torch.arange(room) == 0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // kv, True
    monkeypatch.setattr(common, "sdpa_attention_forward", None)  # which would copy them for each head
    got, _ = common.grouped_attention(module, query, key, value, mask, scaling=0.7)
    for b in range(B):
        for h in range(heads):
            k, v = key[b, h // (heads // kv)], value[b, h // (heads // kv)]
            scores = (0.7 * query[b, h] @ k.T).masked_fill(~mask[b, 0], -torch.inf)
            assert torch.allclose(got[b, :, h], scores.softmax(-1) @ v, atol=1e-6)


def test_a_graph_that_is_compiled_for_a_loss_has_a_fixed_vocabulary(counter):
    import kd_forward
    loss = common.try_compile(kd_forward.kd_loss)
    for rows in (5, 9, 13, 17):
        q, p = torch.randn(rows, 40), torch.randn(rows, 40)
        loss(q, p, torch.zeros(rows, dtype=torch.long), 1.0, 1.0)
    assert len(counter.graphs) <= 2  # one for the first number of rows, one for any
    inputs = [n for n in counter.graphs[-1].graph.nodes if n.op == "placeholder" and n.meta.get("example_value") is not None]
    shapes = [tuple(n.meta["example_value"].shape) for n in inputs if hasattr(n.meta["example_value"], "shape")]
    assert any(isinstance(shape[-1], int) and shape[-1] == 40 for shape in shapes if len(shape) == 2)


def test_under_autocast_what_is_sampled_is_what_is_scored(pair):
    """log rho of LLMR, which is 0 by definition on policy: with fp32 sampling it would be some hundredths."""
    for model in models(pair, "llama"):
        prompts = [[i, i + 1, i + 2] for i in range(3, 35)]
        gaps = {}
        for dtype in (torch.bfloat16, None):
            responses, logprobs = common.sample(model, prompts, 16, seed=5, eos=0, dtype=dtype)
            batch = common.collate([common.Example(p, p, r) for p, r in zip(prompts, responses)], model)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = common.response_states(model)(batch)
            scored = common.token_logprobs(model, hidden, batch.targets)
            gaps[dtype] = (scored - torch.cat(logprobs)).abs().mean().item()
        assert gaps[torch.bfloat16] < 0.5 * gaps[None]


def test_the_low_copy_follows_the_weights(pair):
    model = models(pair, "gpt2")[1]
    common.low_copy(model, torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    copied = common.low_copy(model, torch.bfloat16)
    now = dict(model.named_parameters(remove_duplicate=False))
    pairs = [(now[name], p) for name, p in copied.named_parameters(remove_duplicate=False)]
    assert len(pairs) > 10 and all(torch.equal(a.to(p.dtype), p) for a, p in pairs)
    assert {p.dtype for _, p in pairs} == {torch.bfloat16, torch.float32}  # embeddings and norms stay


class Syncs(TorchDispatchMode):
    """Counts what makes a GPU's host wait: reading a number out of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("script, most", [("kd_forward", 0), ("ddk", 16), pytest.param("dpkd", 40, marks=pytest.mark.slow),
                                          ("llmr", 40)])
def test_a_step_that_is_not_logged_reads_few_numbers_back(script, most, pair, any_root, tmp_path, monkeypatch):
    """In ddk they are the draws of 8 sequences, which are on the CPU anyway; in dpkd and llmr the sampler looks for rows
    that are done, here at every token and on a GPU at every sixteenth. (GPT-2's forward looks for padding: one more.)"""
    teacher, student = map(str, pair("llama"))
    counts = []
    cfg = any_run(script, any_root, tmp_path / "run", teacher=teacher, student=student, steps=5, log_every=1000,
                  eval_every=1000, save_every=1000, interval=1000, max_response=8)
    with Syncs() as mode:
        monkeypatch.setattr(common.Run, "end_step", lambda *_, **__: counts.append(mode.count))
        importlib.import_module(script).train(cfg)
    assert max(b - a for a, b in zip(counts[:-1], counts[1:-1])) <= most
