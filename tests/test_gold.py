"""GOLD: its equations as loops, its selection on small batches, its prompts word by word, whole runs with a tiny LLM."""
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL_GOLD, make_gold_world, make_pair, outcome, prepare, small_run
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import gold
from gold import SOLVE, WRITE, build_prompt

CPU = torch.device("cpu")
TASKS = json.loads((ROOT / "data/tasks.json").read_text())["tasks"]


# ---------------------------------------------------------------------------------------------------------------
# Equations
# ---------------------------------------------------------------------------------------------------------------
def test_energy_is_minus_logsumexp_and_shifts_with_the_logits():
    f = torch.randn(5, 9, dtype=torch.double)
    want = [-math.log(sum(math.exp(x) for x in row)) for row in f.tolist()]
    assert gold.energy(f).tolist() == pytest.approx(want)
    assert torch.allclose(gold.energy(f + 3.5), gold.energy(f) - 3.5)
    ce = torch.nn.functional.cross_entropy
    y = torch.zeros(5, dtype=torch.long)
    assert torch.allclose(ce(f + 3.5, y), ce(f, y))  # the loss that trained f knows nothing of the shift


def test_sce_is_its_equation_with_the_one_hot_clamped():
    logits, y = torch.randn(6, 7, dtype=torch.double), torch.tensor([0, 3, 6, 2, 2, 5])
    loss, ce = gold.sce_loss(logits, y, 0.3, 0.7)
    for row, target, got, got_ce in zip(logits.tolist(), y.tolist(), loss.tolist(), ce.tolist()):
        z = sum(math.exp(x) for x in row)
        q = [math.exp(x) / z for x in row]
        reverse = -sum(q[k] * math.log(max(1e-4, float(k == target))) for k in range(7))
        assert reverse == pytest.approx(9.2103 * (1 - q[target]), rel=1e-4)
        assert got == pytest.approx(0.3 * -math.log(q[target]) + 0.7 * reverse) and got_ce == pytest.approx(-math.log(q[target]))
    assert torch.equal(gold.sce_loss(logits, y, 1.0, 0.0)[0], ce)


def test_a_wrong_label_weighs_less_under_reverse_ce():
    """Gradient of the logit of a label that the student finds unlikely: CE pushes with 1 - q, RCE with q (1 - q)."""
    logits = torch.tensor([[4.0, -4.0]], requires_grad=True)
    push = [torch.autograd.grad(gold.sce_loss(logits, torch.tensor([1]), a, b)[0].sum(), logits)[0][0, 1].item()
            for a, b in ((1.0, 0.0), (0.0, 1.0))]
    q = logits.softmax(-1)[0, 1].item()
    assert push[0] == pytest.approx(-(1 - q)) and push[1] == pytest.approx(-9.2103 * q * (1 - q), rel=1e-4)
    assert abs(push[1]) < 0.01 < abs(push[0])


# ---------------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, most, ranks", [(8, 2, [4, 5]), (16, 2, [9, 10]), (16, 9, [8, 9, 10, 11]), (5, 2, [2, 3]), (3, 2, [1]),
                                            (2, 2, []), (1, 2, []), (0, 2, [])])
def test_the_band_is_relative_to_the_samples_that_are_there(n, most, ranks):
    energies = [math.sin(7 * i + 1) for i in range(n)]
    rank = sorted(range(n), key=lambda i: energies[i])
    assert gold.select_feedback(energies, "band", most, random.Random(0)) == [rank[r] for r in ranks]


def test_the_controls_select_what_their_names_say():
    energies = [0.3, -1.0, 2.0, 0.5, 0.4]
    pick = lambda how, seed=0: gold.select_feedback(energies, how, 2, random.Random(seed))
    assert sorted(pick("top")) == [2, 3] and pick("none") == []
    drawn = [tuple(sorted(pick("random", s))) for s in range(200)]
    assert len(set(drawn)) == 10 and all(len(set(d)) == 2 for d in drawn)


# ---------------------------------------------------------------------------------------------------------------
# Prompts and parsing: word by word for two tasks
# ---------------------------------------------------------------------------------------------------------------
RTE = [{"Sentence1": "A man sleeps.", "Sentence2": "Nobody is awake.", "label": "not_entailment"}]
SVAMP = [{"Body": "Ann has 3 figs and eats 1.", "Question": "How many are left?", "label": "( 3.0 - 1.0 )"}]


def test_prompt_of_a_classification_task():
    asked, begun, rest = build_prompt(common.load_task("rte"), WRITE, RTE, {"label": "entailment"}, "ood")
    assert asked == (
        "Each sample of this task has a Sentence1 and a Sentence2. The label is entailment if Sentence2 must be true when "
        "Sentence1 is, and not_entailment if it need not be.\n\nSample 1:\nLabel: not_entailment\nSentence1: A man sleeps.\n"
        "Sentence2: Nobody is awake.\n\nWrite one more sample of this task, new and complete, in the same form, and nothing "
        "after it.\n\n")
    assert begun == ("Here is a new sample. Sentence2 follows from Sentence1. It is about another topic, from another domain, "
                     "and very different from every sample above.\n\nLabel: entailment\nSentence1:")
    assert common.parse_sample(" It rains.\nSentence2: It is wet.\n\nSample 2:", rest, ["\n\n"]) == \
        {"Sentence1": "It rains.", "Sentence2": "It is wet."}
    asked, begun, rest = build_prompt(common.load_task("rte"), SOLVE, RTE, {"Sentence1": "{x}", "Sentence2": "B."})
    assert asked.endswith("Sentence2: Nobody is awake.\nLabel: not_entailment\n\nGive the Label of the next sample, and nothing after it.\n\n")
    assert begun == "Sentence1: {x}\nSentence2: B.\nLabel:" and rest == "{label}"


def test_prompt_of_a_task_with_answers():
    asked, begun, rest = build_prompt(common.load_task("svamp"), WRITE, SVAMP, {}, "plain")
    assert asked.endswith("\n\nSample 1:\nBody: Ann has 3 figs and eats 1.\nQuestion: How many are left?\nEquation: ( 3.0 - 1.0 )\n\n"
                          "Write one more sample of this task, new and complete, in the same form, and nothing after it.\n\n")
    assert begun == "Here is a new sample.\n\nBody:" and rest == "{Body}\nQuestion: {Question}\nEquation: {label}"
    got = common.parse_sample("Bo had 5.\nHe ate 2.\nQuestion: And now?\nEquation: 5 + 1", rest, ["\n\n"])
    assert got == {"Body": "Bo had 5.\nHe ate 2.", "Question": "And now?", "label": "5 + 1"}


@pytest.mark.parametrize("text", ["", "only a body", "Bo. Equation: 5", "\n\nSample 2:", "Question: what? Equation: 1"])
def test_text_that_does_not_fit_is_no_sample(text):
    rest = build_prompt(common.load_task("svamp"), WRITE, SVAMP, {})[2]
    assert common.parse_sample(text, rest, ["\n\n"]) is None


def test_every_entry_renders_parses_and_reads_its_columns():
    assert len(set(TASKS) - {"reviews", "sums"}) == 10
    for name in TASKS:
        task = common.load_task(name)
        sample = {f: f"some text for {f}" for f in task["fields"]} | {"label": next(iter(task["labels"]), "1 + 1")}
        given = {"label": sample["label"]} if task["labels"] else {}
        _, begun, rest = build_prompt(task, WRITE, [sample] * 3, given, "ood")
        whole = task["write"]["sample"].format(**sample)
        completion = whole[len(whole) - len(rest.format(**sample)):]
        assert {**common.parse_sample(completion, rest, task["stop"]), **given} == sample, name
        raw = {}
        for column, value in [*((c, sample[f]) for f, c in task["fields"].items()), (task["label"], 0 if task["labels"] else ["1 + 1", "2"])]:
            inside = raw
            for part in column.split(".")[:-1]:
                inside = inside.setdefault(part, {})
            inside[column.split(".")[-1]] = value
        row = common.sample_reader(task)(raw, "here", None)
        assert row["sample"] == sample and row["prompt"] == task["student"].format(**sample) and row["response"] == sample["label"]


# ---------------------------------------------------------------------------------------------------------------
# Filters and scores
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, value", [("12 - 5", 7), ("( 8.0 - 3.0 ) * 2", 10), ("x = 7 / 2", 3.5), ("3 + 4 = 8", 7), ("-2+1", -1)])
def test_equations_have_values(text, value):
    assert common.value_of(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "five", "__import__('os').system('true')", "2 ** 9 ** 9", "1 / 0", "(1).real", "[1][0]", "True + 1",
                                  "(" * 500, "lambda: 1", "9" * 400])
def test_nothing_but_arithmetic_has_a_value(text):
    assert common.value_of(text) is None


def test_filters():
    fine = lambda name, **s: common.well_formed(common.load_task(name), s)
    assert fine("rte", Sentence1="x" * 11, Sentence2="y" * 399, label="entailment")
    assert not fine("rte", Sentence1="x" * 10, Sentence2="y" * 20, label="entailment")
    assert not fine("rte", Sentence1="x" * 11, Sentence2="y" * 400, label="entailment")
    context = dict(Context="The cat sat on the mat.", Question="Where was the cat?")
    assert fine("squad", **context, label="the mat") and not fine("squad", **context, label="the hat")
    story = dict(Body="Ann has 3 figs and eats 1.", Question="How many are left?")
    assert fine("svamp", **story, label="3 - 1") and not fine("svamp", **story, label="two")


def test_scores():
    score = lambda name, text, *right: common.score(common.load_task(name), text, {"references": list(right)})
    assert score("rte", " entailment", "entailment") == 1 and score("rte", "not_entailment", "entailment") == 0
    assert score("squad", "b", "a", "b") == 1 and score("svamp", "1 + 3", "( 3.0 + 1.0 )") == 1 and score("svamp", "?", "3 + 1") == 0
    assert score("svamp", "1 + 2", "3 + 1") == 0 and score("svamp", "7 / 2", "3") == 0 and score("svamp", "1 / 3 * 3", "1") == 1
    assert 0 < score("nl4opt", "maximise x", "maximise x + y") < 1


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def world(any_root):
    return lambda kind: make_gold_world(any_root / "gold", kind)  # made once, shared with any_run


@pytest.fixture
def gold_config(world, tmp_path):
    """gold_config(kind, **settings): the tiny LLM as a model directory, behind --teacher DIR, as a real one would be."""
    def make(kind="reviews", **settings):
        root = world(kind)
        return small_run(gold.Config, (root / "teacher", root / "student"), root / "data", tmp_path / "run",
                         **{**SMALL_GOLD, "task": kind, **settings})
    return make


@pytest.mark.parametrize("kind, settings", [
    ("reviews", dict()), pytest.param("sums", dict(select="top", accum=2, budget=16), marks=pytest.mark.slow),
    pytest.param("reviews", dict(ood=False, alpha=1.0, beta=0.0), marks=pytest.mark.slow)])
def test_whole_run_ends_with_a_student_that_loads_and_answers(gold_config, kind, settings):
    cfg = gold_config(kind, **settings)
    result = gold.train(cfg)
    assert {f"{w}.accuracy{d}" for w in ("teacher", "before", "after") for d in ("", "_uniform", "_tail")} <= set(result)
    log = [json.loads(x) for x in open(f"{cfg.out}/log.jsonl")]
    assert [x["step"] for x in log if "round" in x] == list(range(-len([x for x in log if "round" in x]), 0))
    assert [x for x in log if "round" in x][-1]["samples"] == cfg.budget and 0 <= result["after.garbage"] <= 1
    student, tokenizer = AutoModelForCausalLM.from_pretrained(f"{cfg.out}/student"), AutoTokenizer.from_pretrained(f"{cfg.out}/student")
    samples = [json.loads(x) for x in open(f"{cfg.out}/samples.jsonl")]
    assert len(samples) == cfg.budget and all({"text", "label", "round", "opening", "fed", "topic"} <= set(s) for s in samples)
    row = json.loads(Path(cfg.data, "test.jsonl").read_text().splitlines()[0])
    ids = tokenizer(row["text"], return_tensors="pt").input_ids
    assert len(tokenizer.decode(student.generate(ids, max_new_tokens=3, do_sample=False)[0]).split()) > len(row["text"].split())


def test_the_curve_is_of_validation_rows_and_the_table_of_test_rows(gold_config, monkeypatch):
    cfg = gold_config(steps=2, eval_every=1, eval_rows=4)
    read = lambda split: [json.loads(x)["text"] for x in Path(cfg.data, f"{split}.jsonl").read_text().splitlines()]
    asked, rows = [], {"valid": read("valid"), "test": [read("test")[i] for i in (0, 6, 13, 19)]}  # 4 of 20, evenly spread

    def evaluate(model, examples, *args):
        texts = [e.row["sample"]["text"] for e in examples]
        asked.append(next(split for split in rows if texts == rows[split]))
        return {"accuracy": 0.5}
    monkeypatch.setattr(gold, "evaluate", evaluate)
    gold.train(cfg)
    assert asked == ["test", "valid", "valid", "valid", "test"]


def test_a_task_file_and_a_t5_student_with_its_own_tokenizer(gold_config, tmp_path):
    """The real path: LLM from a directory, a user's task, data in a file, a student of another kind and vocabulary."""
    entry = TASKS["reviews"]
    (tmp_path / "mine.json").write_text(json.dumps({**entry, "labels": {"bad": "", "good": ""}, "shots": 2, "data": str(tmp_path / "rows.jsonl"),
                                                    "write": {**entry["write"], "sample": "{label} {text}"}}))
    rows = [{"text": f"the film was {w} number {i}", "label": i % 2} for i, w in enumerate(["loud", "soft"] * 30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, student = make_pair("t5", tmp_path)
    cfg = gold_config(task=str(tmp_path / "mine.json"), data="auto", student=str(student), budget=16, steps=2, holdout=0.2)
    result = gold.train(cfg)
    assert "after.accuracy" in result and "after.modes" not in result and "after.accuracy_tail" not in result
    assert common.load_model(f"{cfg.out}/student", CPU).config.is_encoder_decoder


def test_a_chat_model_gets_the_task_in_the_users_turn_and_goes_on_from_a_forced_beginning(tmp_path, monkeypatch):
    _, student = make_pair("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    llm = common.LLM(common.load_model(student, CPU), tokenizer, tmp_path / "w.jsonl", 500, 4, 0)
    ids = llm.tokens("the cat sat", "on the mat")
    assert tokenizer.decode(ids) == "<u>the cat sat</u><a>on the mat"
    ends = [[5, 6, tokenizer.eos_token_id]]
    monkeypatch.setattr(common, "sample", lambda *a, **k: (ends, None))
    assert llm([("a cat", "")], "x") == [tokenizer.decode(ends[0][:2])]  # what ends a text is no part of it
    with pytest.raises(common.BadInput, match="leave room for 20"):
        common.LLM(common.load_model(student, CPU), tokenizer, tmp_path / "w.jsonl", 20, 4, 0).tokens("the cat " * 9, "on")
    with pytest.raises(common.BadInput, match="leave room for 60"):  # of its 64 positions 4 are to be written
        llm.tokens("the cat " * 40, "on")


def test_a_base_model_reads_what_is_asked_and_begun_in_one_and_nothing_between(tmp_path):
    """No line break of ours, and no second begin-of-sequence token."""
    _, student = make_pair("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    llm = common.LLM(common.load_model(student, CPU), tokenizer, tmp_path / "w.jsonl", 500, 4, 0)
    ids = llm.tokens("the cat", " sat on")
    assert ids[0] == 0 and 0 not in ids[1:] and tokenizer.decode(ids[1:]) == "the cat sat on"


def test_batched_generation_equals_one_at_a_time_at_temperature_0(world, tmp_path, monkeypatch):
    root = world("reviews")
    model, tokenizer = common.load_model(root / "teacher", CPU), AutoTokenizer.from_pretrained(root / "teacher")
    task, rng = common.load_task("reviews"), random.Random(0)
    p = prepare("reviews")
    grammar = p.Grammar(p.HERE / "grammar.json", "reviews")
    shots = [dict(zip(("text", "label"), p.draw_sample(grammar, rng, t))) for t in (0, 1, 2, 3)]
    prompts = [build_prompt(task, WRITE, shots[:n], {"label": y})[:2] for n in (1, 2, 4) for y in task["labels"]]
    llm = lambda name: common.LLM(model, tokenizer, tmp_path / name, 500, 12, 0)
    together = llm("a")(prompts, "x")
    assert together == [llm(f"b{i}")([p], "x")[0] for i, p in enumerate(prompts)]
    monkeypatch.setattr(common, "sample", None)  # what the file holds is not asked for again
    assert llm("a")(prompts, "x") == together
    for other in (dict(temperature=0.5), dict(top_k=3), dict(top_p=0.5)):
        with pytest.raises(TypeError):  # sampled otherwise it is another text
            llm("a")(prompts, "x", **other)


@pytest.mark.parametrize("top_p, kept", [(1.0, {0, 1, 2, 3}), (0.9, {0, 1, 2}), (0.79, {0, 1}), (0.81, {0, 1, 2}), (0.1, {0})])
def test_top_p_keeps_the_fewest_tokens_that_hold_the_share(pair, monkeypatch, top_p, kept):
    share = torch.tensor([.3, .15, .5, .05])[[2, 0, 1, 3]]
    monkeypatch.setattr(common, "decode_step", lambda *a: share.log().repeat(len(a[2]), 1))
    out, logp = common.sample(common.load_model(pair("llama")[1], CPU), [[5]] * 300, 1, top_p=top_p, eos=99)
    assert {t[0] for t in out} == kept
    total = sum(share[k].item() for k in kept)
    assert all(x.exp().item() == pytest.approx(share[t[0]].item() / total, rel=1e-4) for t, x in zip(out, logp))


def test_energies_skip_padding(gold_config, monkeypatch):
    """A batch of answers of different lengths gives what each gives alone."""
    found, select = {}, gold.select_feedback
    monkeypatch.setattr(gold, "select_feedback", lambda e, *a: found.setdefault("e", e) and select(e, *a))
    made = [{"text": "after owning 17 actor we sold 8", "label": y} for y in ("17 - 8", "17", "17 - 8 + 1 - 1", "1 + 1")]
    monkeypatch.setattr(gold, "write_samples", lambda *a, **k: made)
    cfg = gold_config("sums", budget=8, steps=0, seed=4, max_response=12)
    gold.train(cfg)
    student, tokenizer = common.load_model(cfg.student, CPU, seed=4), AutoTokenizer.from_pretrained(cfg.student)
    for e, s in zip(found["e"], made):
        x, y = tokenizer(s["text"]).input_ids, tokenizer(s["label"]).input_ids + [tokenizer.eos_token_id]
        logits = student(torch.tensor([x + y])).logits[0, len(x) - 1:-1]
        assert e == pytest.approx(-logits.logsumexp(-1).mean().item(), abs=1e-4)


def test_labels_are_drawn_for_each_sample_apart(gold_config, monkeypatch):
    """Not those of X_t again for V_t, nor those of another round; each label about as often as another."""
    asked, words = [], list(common.load_task("reviews")["labels"])

    def write(llm, task, shots, given, opening, call, held_out, cfg):
        asked.append([g["label"] for g in given])
        return [{**g, "text": "a cat"} for g in given]
    monkeypatch.setattr(gold, "write_samples", write)
    monkeypatch.setattr(gold, "train_scorer", lambda *a: None)
    gold.train(gold_config(steps=0, budget=256, round_size=16))
    assert len(asked) == 16 and len({tuple(x) for x in asked}) == 16
    drawn = [label for x in asked for label in x]
    assert set(drawn) == set(words) and all(abs(drawn.count(w) - 256 / len(words)) < 50 for w in words)


def test_seeds_differ_in_the_labels_that_are_asked_for_and_in_the_real_samples(gold_config, monkeypatch):
    """Else a spread over seeds would leave out what the LLM was asked; and one seed asks the same again."""
    asked = []

    def write(llm, task, shots, given, *others):
        asked[-1].append((shots, given))
        return [{**g, "text": "a cat"} for g in given]
    monkeypatch.setattr(gold, "write_samples", write)
    monkeypatch.setattr(gold, "evaluate", lambda *a: {"accuracy": 0.0})
    monkeypatch.setattr(gold, "llm_answers", lambda llm, task, shots, rows: [""] * len(rows))
    for i, seed in enumerate((1, 2, 1)):
        asked.append([])
        gold.train(gold_config(steps=0, ood=False, seed=seed, out=gold_config().out + str(i)))
    (shots, given), (other_shots, other_given) = (zip(*x) for x in asked[:2])
    assert asked[0] == asked[2] and given != other_given and shots[0] != other_shots[0]


def test_the_scorer_sees_every_sample_once_a_pass_in_a_new_order(gold_config, monkeypatch):
    """Samples lie in the order of their rounds, plain before OOD: batches must mix them."""
    cfg, read, collate = gold_config(passes=3, batch_size=4), [], common.collate
    scorer = common.load_model(cfg.student, CPU)
    examples = [common.Example([5 + i], [5 + i], [3, 4]) for i in range(10)]

    def look(part, *args):
        read.append([examples.index(e) for e in part])
        return collate(part, *args)
    monkeypatch.setattr(common, "collate", look)
    optimizer = torch.optim.AdamW(scorer.parameters())
    gold.train_scorer(scorer, optimizer, examples, random.Random(0), cfg, SimpleNamespace(device=CPU))
    assert [len(x) for x in read] == [4, 4, 2] * 3
    passes = [sum(read[i:i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert len({tuple(p) for p in [*passes, range(10)]}) == 4


def test_the_scorer_is_trained_every_retrain_rounds_at_its_own_rate(gold_config, monkeypatch):
    """Before rounds 2 and 4 of 6, on the 8 samples of each round so far."""
    trained = []

    def train_scorer(scorer, optimizer, examples, *args):
        trained.append((len(examples), optimizer.param_groups[0]["lr"]))
    monkeypatch.setattr(gold, "train_scorer", train_scorer)
    gold.train(gold_config(steps=0, retrain=2, scorer_lr=0.003, lr=0.007))
    assert trained == [(16, 0.003), (32, 0.003)]


@pytest.mark.parametrize("seed", range(5))
def test_real_samples_have_each_label_as_often_as_any_other(seed):
    """Also where one of them is rare among the rows."""
    rows = [{"sample": {"text": str(i), "label": "rare" if i % 10 == 0 else "common"}} for i in range(60)]
    task = {"name": "x", "labels": {"rare": "", "common": ""}}
    labels = [s["label"] for s in gold.pick_shots(task, rows, 4, random.Random(seed))]
    assert labels.count("rare") == labels.count("common") == 2


@pytest.fixture
def written(monkeypatch):
    """What is written in a run: for each call of write_samples (opening, round, shots, held out, samples)."""
    calls, real = [], gold.write_samples

    def write(llm, task, shots, given, opening, call, held_out, cfg):
        calls.append((opening, call, shots, held_out, real(llm, task, shots, given, opening, call, held_out, cfg)))
        return calls[-1][-1]
    monkeypatch.setattr(gold, "write_samples", write)
    return calls


def test_feedback_is_shown_on_even_rounds_only_and_the_ood_prompt_sees_two_training_samples(gold_config, written):
    gold.train(gold_config(steps=0))
    assert [(c[1], c[0]) for c in written] == [(t, o) for t in range(6) for o in ("plain", "ood")]
    human = written[0][2]
    assert len(human) == 3
    for (_, t, plain, _, fresh), (_, _, ood, _, _) in zip(written[::2], written[1::2]):
        assert plain[:3] == human and ood == plain + fresh[:2]
        earlier = written[2 * t - 1][-1] if t else []
        assert len(plain) == (3 if t % 2 or not t else 4) and all(s in earlier for s in plain[3:])  # 4 samples: band [2,3)


def test_without_the_ood_prompt_there_is_eq_1_alone(gold_config, written, monkeypatch):
    """No V_t, no scorer, no feedback: every prompt shows the real samples and nothing else."""
    monkeypatch.setattr(gold, "train_scorer", lambda *a: pytest.fail("a scorer was trained"))
    cfg = gold_config(ood=False, steps=0)
    gold.train(cfg)
    assert [(c[1], c[0]) for c in written] == [(t, "plain") for t in range(12)] and all(c[2] == written[0][2] for c in written)
    assert not any("energy" in json.loads(x) for x in open(f"{cfg.out}/samples.jsonl"))


def test_texts_of_the_valid_and_test_rows_are_asked_for_again_and_never_trained_on(gold_config, monkeypatch):
    """An LLM that has test rows by heart, and repeats one in every other text, adds none of them to the samples."""
    cfg, asked, read = gold_config(steps=2), [], []
    rows = [json.loads(x) for s in ("valid", "test") for x in open(f"{cfg.data}/{s}.jsonl")]
    real, collate = common.LLM.__call__, common.collate

    def call(self, prompts, *a, **k):
        texts = real(self, prompts, *a, **k)
        if k:  # it writes, it does not solve
            texts = [rows[(len(asked) + i) % len(rows)]["text"] if (len(asked) + i) % 2 else t for i, t in enumerate(texts)]
            asked.extend(texts)
        return texts
    monkeypatch.setattr(common.LLM, "__call__", call)
    monkeypatch.setattr(common, "collate", lambda part, *a, **k: (read.extend(part if torch.is_grad_enabled() else []), collate(part, *a, **k))[1])
    gold.train(cfg)
    held_out = {r["text"] for r in rows}
    samples = [json.loads(x) for x in open(f"{cfg.out}/samples.jsonl")]
    assert len(samples) == cfg.budget and not held_out & {s["text"] for s in samples}
    assert len(held_out & set(asked)) > 5 and len(asked) > 1.8 * cfg.budget
    assert read and not held_out & {e.row["sample"]["text"] for e in read}
    last = [json.loads(x) for x in open(f"{cfg.out}/log.jsonl") if "asked" in x][-1]
    assert last["asked"] == pytest.approx(len(asked) / cfg.budget)


def test_resume_ends_bitwise_like_an_uninterrupted_run(gold_config, resumes_bitwise):
    a, b = resumes_bitwise(gold.train, gold_config(steps=6))
    assert a["samples"] == b["samples"] and a["samples"]["all"]


@pytest.mark.parametrize("save_every, saved", [(3, True), pytest.param(1000, False, marks=pytest.mark.slow)])
def test_a_run_killed_while_samples_are_written_asks_for_no_text_twice(gold_config, monkeypatch, capsys, save_every, saved):
    """From a checkpoint between two rounds, and without any: then the rounds are replayed from the file."""
    whole, cut = (gold_config(save_every=save_every, out=gold_config().out + n) for n in ("whole", "cut"))
    gold.train(whole)
    end_step, started = common.Run.end_step, len(Path(whole.out, "written.jsonl").read_text().splitlines())

    def killed(self, step, **parts):
        end_step(self, step, **parts)
        if step == -2:
            raise SystemExit(9)
    monkeypatch.setattr(common.Run, "end_step", killed)
    with pytest.raises(SystemExit):
        gold.train(cut)
    before = Path(cut.out, "written.jsonl").read_text()
    Path(cut.out, "written.jsonl").write_text(before + '{"call": [5, "pl')  # torn by the kill
    monkeypatch.setattr(common.Run, "end_step", end_step)
    cut.resume = True
    gold.train(cut)
    assert ("at step -3" in capsys.readouterr().out) == saved
    assert outcome(whole.out) == outcome(cut.out)
    after = Path(cut.out, "written.jsonl").read_text()
    assert after == Path(whole.out, "written.jsonl").read_text() and after.startswith(before) and len(after.splitlines()) == started


# ---------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings, match", [
    (dict(teacher="none"), "name a --teacher"), (dict(task="rta"), "no such entry; there are reviews, sums, rte"),
    (dict(data=""), "names no data set"), (dict(select="bottom"), "choose one of band, top, random, none"),
    (dict(top_p=0.0), "--top-p 0.0"), (dict(budget=0), "--budget 0"), (dict(llm_prompt=10), "leave room for 10")])
def test_bad_settings_are_told_in_a_sentence(gold_config, settings, match):
    with pytest.raises(common.BadInput, match=match):
        gold.train(gold_config(**settings))


@pytest.mark.parametrize("change, match", [
    (dict(label=None), "'label' is missing"), (dict(fields={}), "'fields' is missing"), (dict(colour=1), "unknown 'colour'"),
    (dict(student="{body}"), "names body, which is no field"), (dict(check="true"), "check is one of"),
    (dict(write={"sample": "{label}"}), "must hold each field"), (dict(shots=99), "99 real samples are wanted"),
    (dict(labels={"bad word": "", "worse": ""}), "writes the label 'bad word' as"), (dict(fields={"text": "body"}), "1: no field 'body'"),
    (dict(labels={"negative": ""}), "unknown label 'positive'")])
def test_bad_tasks_are_told_in_a_sentence(gold_config, tmp_path, change, match):
    entry = {**TASKS["reviews"], **change}
    (tmp_path / "t.json").write_text(json.dumps({k: v for k, v in entry.items() if v is not None}))
    with pytest.raises(common.BadInput, match=match):
        gold.train(gold_config(task=str(tmp_path / "t.json")))


def test_the_number_of_a_class_counts_from_0():
    task = common.load_task("reviews")
    read, words = common.sample_reader(task), list(task["labels"])
    label = lambda value: read({"text": "a good film", "label": value}, "f:1", None)["response"]
    assert [label(0), label("1"), label(words[1])] == [words[0], words[1], words[1]]
    for value in (len(words), -1, str(len(words)), "maybe", None, [0]):
        with pytest.raises(common.BadInput, match="f:1: unknown label"):
            label(value)


def test_what_the_llm_answers_is_read_leniently():
    task, row = common.load_task("rte"), {"sample": {"Sentence1": "A.", "Sentence2": "B."}}
    for text, label in ((" Entailment.", "entailment"), ("Not entailment, since", "not_entailment"), (" maybe\n\nSample 2:", "maybe"), ("", "")):
        assert gold.llm_answers(lambda *a, text=text: [text], task, RTE, [row]) == [label]


def test_a_label_that_begins_like_another_is_not_taken_for_it():
    task = {**common.load_task("rte"), "labels": {"sport": "", "sport news": "", "art": ""}}
    row = {"sample": {"Sentence1": "A.", "Sentence2": "B."}}
    for text, label in ((" Sport.", "sport"), (" Sport news, of course", "sport news"), (" Art", "art")):
        assert gold.llm_answers(lambda *a, text=text: [text], task, RTE, [row]) == [label]


def test_an_llm_that_writes_nothing_usable_stops_the_run_with_three_of_its_texts(gold_config, monkeypatch):
    calls = []
    real = common.LLM.__call__
    monkeypatch.setattr(common.LLM, "__call__", lambda self, prompts, call, **k: calls.append(call) or ["plain"] * len(prompts) if k else real(self, prompts, call))
    with pytest.raises(common.BadInput, match=r"not one text of the LLM could be used in 20 calls; it wrote \['plain', 'plain', 'plain'\]"):
        gold.train(gold_config())
    assert len(calls) == 20


def test_an_llm_that_is_slow_but_writes_is_waited_for():
    """One usable text a call: 24 samples take 24 calls, and only 20 useless calls one after the other end a run."""
    class Llm:
        asked = kept = 0
        file = "written.jsonl"

        def __call__(self, prompts, *a, **k):
            return ["the actor was rather slow here"] + ["no"] * (len(prompts) - 1)
    cfg, task = gold.Config(), common.load_task("reviews")
    found = gold.write_samples(Llm(), task, [], [{"label": "negative"}] * 24, "plain", 0, set(), cfg)
    assert len(found) == 24


def test_real_samples_are_of_the_first_rows_where_typical_ones_can_be_put():
    rows, task = [{"sample": {"text": str(i), "label": str(i % 2)}} for i in range(100)], {"name": "t", "labels": {"0": "", "1": ""}}
    drawn = [int(s["text"]) for seed in range(60) for s in gold.pick_shots(task, rows, 2, random.Random(seed))]
    assert set(drawn) == set(range(20))


def test_a_text_is_asked_for_again_with_other_noise_and_with_the_settings_of_sampling():
    """The name of a call is its noise: under one name the LLM would write the same useless text again and again."""
    class Llm:
        asked, kept, file, calls = 0, 0, "written.jsonl", []

        def __call__(self, prompts, call, **settings):
            self.calls.append((call, settings))
            return ["no" if len(self.calls) < 4 else "the actor was rather slow here"]
    cfg, task = gold.Config(temperature=0.4, top_k=7, top_p=0.6), common.load_task("reviews")
    gold.write_samples(Llm(), task, [], [{"label": "negative"}], "plain", 0, set(), cfg)
    names, settings = zip(*Llm.calls)
    assert len({str(name) for name in names}) == len(names) == 4
    assert all(s == dict(temperature=0.4, top_k=7, top_p=0.6) for s in settings)


def test_the_two_prompts_of_a_round_have_noise_of_their_own():
    names = []

    class Llm:
        asked, kept = 0, 0

        def __call__(self, prompts, call, **settings):
            names.append(str(call))
            return ["the actor was rather slow here"]
    for opening, t in (("plain", 0), ("ood", 0), ("plain", 1)):
        gold.write_samples(Llm(), common.load_task("reviews"), [], [{"label": "negative"}], opening, t, set(), gold.Config())
    assert len(set(names)) == 3


def test_the_llms_own_score_is_with_all_real_samples_in_its_prompt(gold_config, monkeypatch):
    """Else the student would be compared with an LLM that knows less of the task than the one that wrote."""
    shown, real, picked = [], gold.build_prompt, gold.pick_shots
    monkeypatch.setattr(gold, "build_prompt", lambda task, wording, shots, *a: shown.append((wording is gold.SOLVE, shots)) or real(task, wording, shots, *a))
    monkeypatch.setattr(gold, "pick_shots", lambda *a: shown.append(picked(*a)) or shown[-1])
    gold.train(gold_config(steps=0, budget=8))
    chosen = shown[0]
    assert len(chosen) == 3 and [shots for solve, shots in shown[1:] if solve] == [chosen] * 20


def test_as_many_samples_are_fed_back_as_are_asked_for(gold_config):
    for most in (1, 3):
        cfg = gold_config(steps=0, budget=40, round_size=20, feedback=most, out=gold_config().out + str(most))
        gold.train(cfg)
        assert sum(json.loads(line)["fed"] for line in open(f"{cfg.out}/samples.jsonl")) == most


def test_the_student_gets_as_many_samples_as_the_budget_says_the_first_ones(gold_config, monkeypatch):
    """A round that goes beyond it is cut: budgets are what methods are compared at."""
    given, real = [], gold.train_student
    monkeypatch.setattr(gold, "train_student", lambda student, optimizer, examples, *a: (given.extend(examples), real(student, optimizer, examples, *a)))
    cfg = gold_config(steps=0, budget=21)
    gold.train(cfg)
    written = [json.loads(line)["text"] for line in open(f"{cfg.out}/samples.jsonl")]
    assert len(written) > 21 and [e.row["sample"]["text"] for e in given] == written[:21]


def test_unusable_texts_are_asked_for_again_and_counted(gold_config, monkeypatch):
    real = common.parse_sample
    monkeypatch.setattr(common, "parse_sample", lambda text, *a: None if len(text) % 2 else real(text, *a))
    cfg = gold_config(steps=0)
    gold.train(cfg)
    last = [json.loads(x) for x in open(f"{cfg.out}/log.jsonl") if "asked" in x][-1]
    assert last["samples"] == 48 and last["asked"] > 1.2


@pytest.mark.filterwarnings("error")  # a mean over nothing
def test_accuracy_is_that_of_greedy_answers(gold_config, monkeypatch):
    """As the LLM's own, which it is compared with. Here a student that is right when it is greedy only."""
    cfg = gold_config()
    student, tokenizer = common.load_model(cfg.student, CPU), AutoTokenizer.from_pretrained(cfg.student)
    words = {0.0: "negative", 1.0: "positive"}
    monkeypatch.setattr(common, "sample", lambda model, prompts, max_new, temperature=1.0, **k:
                        ([tokenizer(words[temperature]).input_ids for _ in prompts], None))
    examples = [common.Example([5], [5], [6], {"references": ["negative"]})] * 3
    assert gold.evaluate(student, examples, common.load_task("reviews"), tokenizer, cfg) == {"accuracy": 1.0}


def test_a_handful_of_test_rows_need_not_hold_a_rare_topic():
    rows = [{"references": ["good"], "weight": 0.5, "tail": False}, {"references": ["bad"], "weight": 1.5, "tail": False}]
    task = {"metric": "accuracy"}
    assert common.task_metrics(task, ["good", "good"], rows) == {"accuracy": 0.25, "accuracy_uniform": 0.5}
    found = common.task_metrics(task, ["good", "good"], [rows[0], {**rows[1], "tail": True}])
    assert found["accuracy_tail"] == 0


def test_rows_count_by_their_weights_whatever_those_add_up_to():
    rows = [{"references": ["good"], "weight": 0.5, "tail": False},
            {"references": ["bad"], "weight": 0.3, "tail": True}]
    for scale in (1, 10):
        part = [{**r, "weight": scale * r["weight"]} for r in rows]
        found = common.task_metrics({"metric": "exact"}, ["good", "good"], part)
        assert found == {"accuracy": pytest.approx(0.625), "accuracy_uniform": 0.5, "accuracy_tail": 0.0}
