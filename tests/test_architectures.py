"""Which models of transformers can be used: a random small one of each architecture, compared with
its own plain forward pass and with `generate`."""
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import plain_logits, small_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import common

PLAIN = dict(vocab_size=328, bos_token_id=0, eos_token_id=0, pad_token_id=0)
OLD = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)  # GPT-2 and its kin
NEW = dict(OLD, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128)
WINDOW = dict(NEW, sliding_window=4)  # shorter than the prompts
EXPERTS = dict(NEW, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=16)
GEMMA3 = dict(WINDOW, head_dim=8, layer_types=["sliding_attention", "full_attention"])
NEO = dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
           window_size=4)
DECODERS = {  # 36 of them
    "gpt2": OLD, "gpt_bigcode": OLD, "gpt_neo": NEO, "gptj": dict(OLD, rotary_dim=8),
    "codegen": dict(OLD, rotary_dim=8), "gpt_neox": dict(OLD, intermediate_size=48), "opt": dict(
        OLD, ffn_dim=48, word_embed_proj_dim=32), "bloom": OLD, "falcon": OLD, "mpt": dict(
        d_model=32, n_layers=2, n_heads=4), "xglm": dict(d_model=32, num_layers=2,
                                                         attention_heads=4, ffn_dim=48),
    "biogpt": dict(OLD, intermediate_size=48), "ctrl": dict(n_embd=32, n_layer=2, n_head=4, dff=48),
    "llama": NEW, "mistral": dict(NEW, sliding_window=None), "mistral with a window": WINDOW,
    "qwen2": NEW, "qwen2 with a window": dict(WINDOW, use_sliding_window=True, max_window_layers=0),
    "qwen3": dict(NEW, head_dim=8), "gemma": dict(NEW, head_dim=8), "gemma3_text": GEMMA3,
    "phi": NEW, "phi3": WINDOW, "olmo": NEW, "olmo2": NEW, "olmo3": WINDOW, "stablelm": NEW,
    "starcoder2": WINDOW, "persimmon": dict(OLD, intermediate_size=48), "smollm3": NEW,
    "glm4": dict(NEW, head_dim=8), "mixtral": EXPERTS, "qwen2_moe": dict(
        EXPERTS, shared_expert_intermediate_size=16), "qwen3_moe": dict(EXPERTS, head_dim=8),
    "olmoe": EXPERTS, "gpt_oss": dict(EXPERTS, head_dim=8, sliding_window=4)}
T5 = dict(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2)
BART = dict(d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
            max_position_embeddings=128, forced_eos_token_id=None, forced_bos_token_id=None)
ENCODER_DECODERS = {  # 11 of them
    "t5": T5, "t5 with a head of its own": dict(T5, scale_decoder_outputs=False), "mt5": T5,
    "umt5": T5, "longt5": dict(T5, local_radius=4), "pegasus": BART, "marian": BART,
    "mbart": BART, "blenderbot": BART, "blenderbot-small": BART, "bart": BART}
REFUSED = {
    "mamba": (dict(OLD, state_size=4), "no cache of keys and values"),
    "rwkv": (dict(hidden_size=32, num_hidden_layers=2), "no cache of keys and values"),
    "lfm2": (dict(NEW, layer_types=["conv", "full_attention"]), "no cache of keys and values"),
    "xlnet": (dict(d_model=32, n_layer=2, n_head=4, d_inner=48), "are not its output head times"),
    "bert": (dict(OLD, intermediate_size=48, is_decoder=True), "are not its output head times"),
    "gemma2": (dict(NEW, head_dim=8), r"after the output head \(final_logit_softcapping\)"),
    "cohere": (NEW, r"after the output head \(logit_scale\)"),
    "granite": (dict(NEW, logits_scaling=8.0), r"after the output head \(logits_scaling\)")}


def build(name, settings):
    """A random model, as load_model leaves it."""
    more = {"decoder_start_token_id": 2} if settings in ENCODER_DECODERS.values() else {}
    config = AutoConfig.for_model(name.split()[0], **PLAIN, **settings, **more)
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for p in model.parameters():  # far from uniform, and no two tokens are equally likely
        p.data *= 4 if p.dim() > 1 else 1
    model.tokenizer, model.role = small_tokenizer(), "student"
    model.vocab = len(model.get_output_embeddings().weight)
    return model


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_states_logits_and_greedy_samples_are_those_of_transformers(name):
    """Prompts of 1 to 12 tokens in one batch; an EOS that comes up soon makes rows leave it."""
    model, rng = build(name, {**DECODERS, **ENCODER_DECODERS}[name]), random.Random(0)
    common.check_model(model, name)
    draw = lambda low, high: [rng.randrange(3, 328) for _ in range(rng.randint(low, high))]
    prompts = [[7], *(draw(1, 12) for _ in range(6))]
    rows = [common.Example(x, x, draw(2, 7)) for x in prompts]
    wanted = torch.cat([plain_logits(model, e.prompt, e.response) for e in rows])
    got = common.logits_of(model, common.response_states(model, common.collate(rows, model)))
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()

    free = common.sample(model, prompts, 10, temperature=0)
    end = max(free[0][4:7] + free[1][2:4], key=lambda token: sum(token in y for y in free))
    model.tokenizer = SimpleNamespace(eos_token_id=end)
    for x, y in zip(prompts, common.sample(model, prompts, 10, temperature=0)):
        out = model.generate(torch.tensor([x]), attention_mask=torch.ones(1, len(x)).long(),
                             do_sample=False, max_new_tokens=10, pad_token_id=0,
                             eos_token_id=end)[0].tolist()
        assert y == out[1 if model.config.is_encoder_decoder else len(x):]


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(name):
    settings, reason = REFUSED[name]
    with pytest.raises(common.BadInput, match=reason) as said:
        common.check_model(build(name, settings), "--student DIR")
    assert str(said.value).startswith("--student DIR: ") and "\n" not in str(said.value)
