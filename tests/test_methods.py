"""Every function of the five methods against its equation: nested loops, vectors by hand, and
expectations that are exact because all responses can be listed. All in float64."""
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, small_model, small_tokenizer

import common
import ddk
import dpkd
import gold
import kd_forward
import llmr


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(logits):
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


# ---- kd_forward.py and ddk.py: cross entropy and KL ---------------------------------------------
def test_kd_loss_is_kl_of_teacher_to_student_on_two_tokens_by_hand():
    q, p, y = double([0.5, 0.5]).log(), double([0.75, 0.25]).log(), torch.tensor([1])
    loss, ce, kl = kd_forward.kd_loss(q, p, y, 1.0, 1.0)
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))  # 0.1308
    assert loss.item() == kl.item() != pytest.approx(0.1438, abs=1e-3)            # KL(q||p)
    assert ce.item() == pytest.approx(math.log(2))


def test_kd_loss_multiplies_its_kl_by_tau_squared_and_divides_the_logits_of_no_ce():
    """softmax(log p / 2) of p = (.9, .1) is (3, 1) / 4."""
    q, p, y = double([0.0, 0.0]), double([0.9, 0.1]).log(), torch.tensor([0])
    loss, ce, kl = kd_forward.kd_loss(q, p, y, 1.0, 2.0)
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert loss.item() == pytest.approx(4 * kl.item())
    assert kd_forward.kd_loss(p, q, y, 0.5, 2.0)[1].item() == pytest.approx(-math.log(0.9))


@pytest.mark.parametrize("weight, tau", [(0.0, 1.0), (0.3, 1.0), (0.7, 2.5), (1.0, 0.4)])
def test_kd_loss_and_ddks_loss_equal_their_equations_in_loops(weight, tau):
    """At a weight of zero there need be no teacher, and the KL that is logged is 0."""
    f, g, y = randn(6, 9) * 2, randn(6, 9, seed=1) * 2, [0, 8, 3, 3, 5, 1]
    kd, of_ddk = (loss_of(f, g if weight else None, torch.tensor(y), weight, tau)
                  for loss_of in (kd_forward.kd_loss, ddk.distill_loss))
    for row in range(6):
        q, p = (softmax([x / tau for x in logits[row].tolist()]) for logits in (f, g))
        kl = sum(p[v] * math.log(p[v] / q[v]) for v in range(9)) if weight else 0.0
        ce = -math.log(softmax(f[row].tolist())[y[row]])
        wanted = [(1 - weight) * ce + weight * tau**2 * kl, ce, kl]
        assert [term[row].item() for term in kd] == pytest.approx(wanted)
        assert [term[row].item() for term in of_ddk] == pytest.approx([ce + weight * kl, ce, kl])


# ---- llmr.py: every response of at most N tokens over V tokens, where token 0 ends it -----------
class Tree:
    """A teacher and a student with random logits at every state. Responses of N tokens that do not
    end with 0 are cut. Rows beyond the end of a response hold the logits of another state."""

    def __init__(self, V=3, N=3, seed=0):
        states = [s for n in range(N) for s in itertools.product(range(1, V), repeat=n)]
        cut = list(itertools.product(range(1, V), repeat=N))
        self.responses = [s + (0,) for s in states] + cut
        self.lengths = torch.tensor([len(y) for y in self.responses])
        self.inside = torch.arange(N) < self.lengths[:, None]                           # (B,N)
        self.tokens = torch.tensor([y + (0,) * (N - len(y)) for y in self.responses])   # (B,N)
        self.at = torch.tensor([[states.index(y[:t]) if t < len(y) else 0 for t in range(N)]
                                for y in self.responses])                               # (B,N)
        self.teacher, self.student = 2 * randn(len(states), V, seed=seed), randn(
            len(states), V, seed=seed + 1)
        self.shift = 3 * randn(len(states), 1, seed=seed + 2)

    def token_logprobs(self, logits):
        logprobs = logits.log_softmax(-1)[self.at]
        return logprobs.gather(-1, self.tokens[..., None])[..., 0] * self.inside        # (B,N)

    def values(self, f, value="max"):
        """The script's Q, V and advantage of every token, each (B,N)."""
        rows = llmr.teacher_values(f[self.at].flatten(0, 1), self.tokens.flatten(), value)
        return [x.view(self.tokens.shape) for x in rows]

    def expected_gradient(self, gain_of, batch=1):
        """The exact expectation of the gradient of Eq. 6, over batches of sampled responses.
        gain_of(responses of a batch) -> (B,N)."""
        theta, total = self.student.clone().requires_grad_(), 0.0
        logq = self.token_logprobs(theta)
        chance = logq.sum(-1).exp().detach()
        for ids in map(list, itertools.product(range(len(self.responses)), repeat=batch)):
            weights = llmr.policy_weights(gain_of(ids), logq[ids], logq[ids])
            loss = -(weights * logq[ids] * self.inside[ids]).sum() / batch
            total = total + chance[ids].prod() * loss
        return torch.autograd.grad(total, theta)[0]

    def gradient_of_expectation(self, values):
        """Autograd through the expectation itself of a value of each response, (B,)."""
        theta = self.student.clone().requires_grad_()
        chance = self.token_logprobs(theta).sum(-1).exp()
        return torch.autograd.grad((chance * values).sum(), theta)[0]

    def returns(self, f, value="max"):
        q, v, _ = self.values(f, value)
        return llmr.returns_to_go(llmr.induced_reward(q, v, self.lengths))


def same(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-11)


def test_teacher_values_and_induced_reward_equal_eqs_1_and_2_in_loops():
    """V behind the last token is 0, of responses that end and of cut ones, and nothing that stands
    in the rows behind it plays a part."""
    tree = Tree(V=4)
    for value in ("max", "mean", "lse"):
        q, v, advantage = tree.values(tree.teacher, value)
        reward = llmr.induced_reward(q, v, tree.lengths)
        for i, y in enumerate(tree.responses):
            n, wanted = len(y), []
            f = [tree.teacher[s].tolist() for s in tree.at[i, :n]]
            centred = [[x - sum(row) / len(row) for x in row] for row in f]
            of_state = {"max": max, "lse": lambda row: math.log(sum(map(math.exp, row))),
                        "mean": lambda row: sum(a * b for a, b in zip(softmax(row), row))}[value]
            for t in range(n):
                after = of_state(centred[t + 1]) if t + 1 < n else 0.0
                wanted.append(centred[t][y[t]] - after)
            assert reward[i].tolist() == pytest.approx(wanted + [0.0] * (3 - n))
            logp = [[math.log(x) for x in softmax(row)] for row in f]
            below = [logp[t][y[t]] - max(logp[t]) for t in range(n)]  # whatever V is
            assert advantage[i, :n].tolist() == pytest.approx(below)


def test_the_sum_of_rewards_telescopes_to_a_value_and_what_the_teacher_makes_of_each_token():
    """max: V(s_1) + advantages; lse: V(s_1) + log p(y|x); mean: also the entropy of each state."""
    tree = Tree(V=4)
    logp = tree.teacher.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)[tree.at] * tree.inside
    advantage, token = tree.values(tree.teacher)[2] * tree.inside, tree.token_logprobs(tree.teacher)
    for value, terms in (("max", advantage), ("lse", token), ("mean", token + entropy)):
        v = tree.values(tree.teacher, value)[1]
        left = (tree.returns(tree.teacher, value) - v) * tree.inside
        assert same(left, llmr.returns_to_go(terms) * tree.inside)
    greedy = (advantage.sum(-1) == 0).nonzero().item()  # each token is the likeliest of its state
    assert tree.returns(tree.teacher)[:, 0].argmax().item() == greedy  # the optimum with max


@pytest.mark.parametrize("baseline, batch", [("none", 1), ("value", 1), ("mean", 2)])
def test_the_expected_gradient_is_that_of_the_expected_return_with_every_baseline(baseline, batch):
    """Cut responses are among them."""
    tree = Tree(N=2, V=4)
    returns, v = tree.returns(tree.teacher), tree.values(tree.teacher)[1]

    def gain(ids):
        if baseline == "mean":
            n, total = tree.lengths[ids], returns[ids].sum()
            return returns[ids] - llmr.mean_of_others(returns[ids], n, total, n.sum())
        return returns[ids] - (v[ids] if baseline == "value" else 0.0)

    wanted = -tree.gradient_of_expectation(returns[:, 0])
    assert same(tree.expected_gradient(gain, batch), wanted)


def test_a_constant_added_to_the_teachers_logits_of_a_state_changes_no_expected_gradient():
    """Not so if cut responses were dropped, as in the release, or if V followed a cut response."""
    tree = Tree()
    uncentred = lambda f: (f[tree.at].gather(-1, tree.tokens[..., None])[..., 0],
                           f.amax(-1)[tree.at])  # the mean would hide the shift
    shifted, plain = (llmr.returns_to_go(llmr.induced_reward(*uncentred(f), tree.lengths))
                      for f in (tree.teacher + tree.shift, tree.teacher))
    assert same((shifted - plain) * tree.inside, tree.shift[tree.at][..., 0] * tree.inside)
    ends = (tree.tokens == 0).any(-1, keepdim=True)
    for kept, wanted in ((torch.ones_like(ends), True), (ends, False)):
        a, b, c = (tree.expected_gradient(lambda ids: (returns * kept)[ids])
                   for returns in (shifted, plain, tree.returns(tree.teacher)))
        assert same(a, b) == same(b, c) == wanted


# ---- dpkd.py: ten responses that can be listed --------------------------------------------------
def pairs_of(logq, logp, beta):
    """Loss and margin (10,10) of every pair; the row is the teacher's response."""
    t, s = (x.flatten() for x in torch.meshgrid(*[torch.arange(10)] * 2, indexing="ij"))
    found = dpkd.preference_loss(logq[t], logp[t], logq[s], logp[s], 1, 1, beta, False)
    return [x.view(10, 10) for x in found]


def descend(logp, logq, beta, frozen, steps, rate):
    """The student after gradient steps on the expected loss, with frozen or fresh own responses."""
    z, start = logq.clone().requires_grad_(), logq
    for _ in range(steps):
        drawn = (start if frozen else z.log_softmax(0)).exp().detach()
        loss = (logp.exp()[:, None] * drawn * pairs_of(z.log_softmax(0), logp, beta)[0]).sum()
        z.data -= rate * torch.autograd.grad(loss, z)[0]
    return z.detach().log_softmax(0)


def kl(a, b):
    return (a.exp() * (a - b)).sum()


@pytest.fixture
def p_and_q():
    return 0.5 * randn(10, seed=3).log_softmax(0), (0.5 * randn(10, seed=4)).log_softmax(0)


@pytest.mark.parametrize("norm", [False, True])
def test_preference_loss_equals_eqs_8_and_9_in_loops(norm):
    logq_t, logp_t, logq_s, logp_s = -9 * torch.rand(4, 6, dtype=torch.float64)
    n_t, n_s = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 1, 5, 2, 4, 3]])
    loss, margin = dpkd.preference_loss(logq_t, logp_t, logq_s, logp_s, n_t, n_s, 0.7, norm)
    for i in range(6):
        of_teacher = 0.7 * (logq_t[i] - logp_t[i]).item() / (n_t[i].item() if norm else 1)
        of_student = 0.7 * (logq_s[i] - logp_s[i]).item() / (n_s[i].item() if norm else 1)
        assert margin[i].item() == pytest.approx(of_teacher - of_student)
        sigmoid = 1 / (1 + math.exp(of_student - of_teacher))
        assert loss[i].item() == pytest.approx(-math.log(sigmoid))


def test_a_margin_of_minus_ten_thousand_gives_a_finite_loss_and_gradient():
    logq = torch.tensor([-2e4], requires_grad=True)
    loss, margin = dpkd.preference_loss(logq, torch.zeros(1), torch.zeros(1), torch.zeros(1), 1, 1,
                                        0.5, False)
    loss.sum().backward()
    assert margin.item() == -1e4 and loss.item() == 1e4 and logq.grad.item() == -0.5


def test_the_expected_margin_of_fresh_pairs_is_minus_beta_times_both_kls():
    for seed in range(5):
        logp, logq = randn(10, seed=seed).log_softmax(0), randn(10, seed=seed + 9).log_softmax(0)
        margin = pairs_of(logq, logp, 0.3)[1]
        mean = (logp.exp()[:, None] * logq.exp() * margin).sum()
        assert mean.item() == pytest.approx(-0.3 * (kl(logp, logq) + kl(logq, logp)).item())


def test_for_small_beta_the_gradient_is_beta_half_times_that_of_kl_p_q(p_and_q):
    logp, logq = (x.log_softmax(0) for x in p_and_q)
    z, beta = logq.clone().requires_grad_(), 1e-4
    loss = pairs_of(z.log_softmax(0), logp, beta)[0]
    (logp.exp()[:, None] * logq.exp() * loss).sum().backward()
    assert torch.allclose(z.grad, beta / 2 * (logq.exp() - logp.exp()), rtol=1e-3, atol=1e-9)


def test_frozen_student_responses_lead_beyond_the_teacher_and_fresh_ones_to_it(p_and_q):
    """The fixed point of frozen ones, drawn from q_0, is q ~ p (p/q_0)^(1/beta)."""
    logp, start = (x.log_softmax(0) for x in p_and_q)
    formula = (logp + (logp - start) / 0.5).log_softmax(0)
    found = descend(logp, start, 0.5, frozen=True, steps=3000, rate=10.0)
    assert (found.exp() - formula.exp()).abs().max() < 1e-6 and kl(logp, formula) > 0.05
    assert kl(logp, descend(logp, start, 0.5, frozen=False, steps=1500, rate=5.0)) < 1e-9


# ---- gold.py: its three equations ---------------------------------------------------------------
def test_energies_are_means_over_the_tokens_of_each_answer_and_skip_padding():
    model = small_model("gpt2", 16, 40)
    model.vocab = 40
    cfg = SimpleNamespace(dtype="float32")
    answers = [([3, 4, 5], [6, 0]), ([7], [8, 9, 10, 11, 12, 0]), ([5] * 9, [0])]
    got = gold.energies_of(model, [common.Example(x, x, y) for x, y in answers], cfg)
    for energy, (x, y) in zip(got, answers):
        rows = model(torch.tensor([x + y])).logits[0, len(x) - 1:-1]
        assert energy == pytest.approx(-rows.logsumexp(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("n, most, ranks", [
    (8, 2, [4, 5]), (16, 2, [9, 10]), (16, 9, [8, 9, 10, 11]), (5, 2, [2, 3]), (3, 2, [1]),
    (2, 2, []), (0, 2, [])])
def test_the_band_has_ranks_floor_half_b_to_floor_eight_tenths_b_minus_one(n, most, ranks):
    energies = [math.sin(7 * i + 1) for i in range(n)]
    rank = sorted(range(n), key=lambda i: energies[i])
    got = gold.select_feedback(energies, "band", most, random.Random(0))
    assert got == [rank[r] for r in ranks]


def test_the_controls_of_select_are_the_strangest_any_or_none():
    energies = [0.3, -1.0, 2.0, 0.5, 0.4]
    pick = lambda how, seed=0: gold.select_feedback(energies, how, 2, random.Random(seed))
    assert sorted(pick("top")) == [2, 3] and pick("none") == []
    assert len({tuple(sorted(pick("random", seed))) for seed in range(200)}) == 10


def test_sce_loss_is_ce_and_reverse_ce_with_the_zeros_of_the_one_hot_target_at_1e_4():
    f, y = randn(6, 7), [0, 3, 6, 2, 2, 5]
    loss, ce = gold.sce_loss(f, torch.tensor(y), 0.3, 0.7)
    for row in range(6):
        q = softmax(f[row].tolist())
        reverse = -sum(q[k] * math.log(1.0 if k == y[row] else 1e-4) for k in range(7))
        assert ce[row].item() == pytest.approx(-math.log(q[y[row]]))
        assert loss[row].item() == pytest.approx(0.3 * ce[row].item() + 0.7 * reverse)


# ---- gold.py: tasks, prompts and answers --------------------------------------------------------
HUB = {  # a row as the hub has it, and how the student's prompt ends; its response
    "rte": ({"sentence1": "A man sleeps.", "sentence2": "He rests.", "label": 1, "idx": 0},
            "rte sentence1: A man sleeps. sentence2: He rests.", "not_entailment"),
    "wnli": ({"sentence1": "Ann saw her.", "sentence2": "Ann saw Bea.", "label": 1, "idx": 0},
             "wnli sentence1: Ann saw her. sentence2: Ann saw Bea.", "entailment"),
    "mrpc": ({"sentence1": "It rose.", "sentence2": "It fell.", "label": 0, "idx": 0},
             "mrpc sentence1: It rose. sentence2: It fell.", "not_equivalent"),
    "qnli": ({"question": "Who?", "sentence": "Ann did.", "label": 0, "idx": 0},
             "qnli question: Who? sentence: Ann did.", "entailment"),
    "mnli": ({"premise": "It rains.", "hypothesis": "It pours.", "label": 1, "idx": 0},
             "mnli premise: It rains. hypothesis: It pours.", "neutral"),
    "squad": ({"id": "1", "title": "T", "context": "The cat sat.", "question": "Who sat?",
               "answers": {"text": ["The cat", "cat"], "answer_start": [0, 4]}},
              "question: Who sat? context: The cat sat.", "The cat"),
    "svamp": ({"ID": "chal-1", "Body": "Ann has 8 figs.", "Question": "And now?", "Type": "x",
               "Equation": "( 8.0 - 3.0 )", "Answer": "5.0", "question_concat": "x"},
              "svamp body: Ann has 8 figs. question: And now?", "( 8.0 - 3.0 )"),
    "nl4opt": ({"problem": "Maximise x.", "formulation": "max x"}, "nl4opt: Maximise x.", "max x"),
}


@pytest.mark.parametrize("name", HUB)
def test_a_task_reads_rows_of_its_hub_form(name):
    record, prompt, response = HUB[name]
    row = gold.read_sample(record, "here", gold.load_task(name))
    assert (row["prompt"], row["response"]) == (prompt, response)
    assert row["references"] == record.get("answers", {"text": [response]})["text"]


def test_the_llm_is_shown_samples_and_begins_a_new_one_with_its_label():
    """The label is drawn first and stands before its text. Free answers stand behind theirs."""
    task, form = gold.load_task("rte"), "Label: not_entailment\nSentence1: A.\nSentence2: B.\n\n"
    shot = {"Sentence1": "A.", "Sentence2": "B.", "label": "not_entailment"}
    asked, begun, rest = gold.build_prompt(task, gold.WRITE, [shot], {"label": "entailment"}, "ood")
    assert asked.startswith(f"{task['about']}\n\nSample 1:\n{form}Write one more sample")
    assert begun.endswith("every sample above.\n\nLabel: entailment\nSentence1:")
    text = " It rains.\nSentence2: It is wet.\n\nSample 2:"
    assert gold.parse_sample(text, rest, task["stop"]) == {
        "Sentence1": "It rains.", "Sentence2": "It is wet."}
    fields = {"Sentence1": "{x}", "Sentence2": "B."}
    _, begun, rest = gold.build_prompt(task, gold.SOLVE, [shot], fields)
    assert (begun, rest) == ("Sentence1: {x}\nSentence2: B.\nLabel:", "{label}")

    task, shot = gold.load_task("svamp"), {"Body": "8.", "Question": "How?", "label": "( 8 - 1 )"}
    asked, begun, rest = gold.build_prompt(task, gold.WRITE, [shot, shot], {})
    assert "\n\nSample 2:\nBody: 8.\nQuestion: How?\nEquation: ( 8 - 1 )\n\nWrite" in asked
    text = "Bo had 5.\nHe ate 2.\nQuestion: And now?\nEquation: 5 + 1"
    assert gold.parse_sample(text, rest, task["stop"]) == {
        "Body": "Bo had 5.\nHe ate 2.", "Question": "And now?", "label": "5 + 1"}
    for bad in ("", "a body", "Bo. Equation: 5", "\n\nSample 2:", "Question: what? Equation: 1"):
        assert gold.parse_sample(bad, rest, task["stop"]) == {}


@pytest.mark.parametrize("text, value", [
    ("12 - 5", 7), ("( 8.0 - 3.0 ) * 2", 10), ("x = 7 / 2", 3.5), ("3 + 4 = 8", 7), ("-2+1", -1),
    ("", None), ("five", None), ("__import__('os').system('true')", None), ("2 ** 9 ** 9", None),
    ("1 / 0", None), ("(1).real", None), ("[1][0]", None), ("(" * 500, None), ("lambda: 1", None),
    ("True and 5", None)])
def test_equations_have_values_and_nothing_is_executed(text, value):
    assert gold.value_of(text) == (None if value is None else pytest.approx(value))


def test_samples_are_kept_by_the_lengths_of_their_fields_and_the_check_of_the_task():
    fine = lambda name, **sample: gold.well_formed(gold.load_task(name), sample)
    for a, b, kept in ((11, 399, True), (10, 20, False), (11, 400, False)):
        assert fine("rte", Sentence1="x" * a, Sentence2="y" * b, label="entailment") == kept
    asked = dict(Context="The cat sat on the mat.", Question="Where was the cat?")
    assert fine("squad", **asked, label="the mat") and not fine("squad", **asked, label="the hat")
    tale = dict(Body="Ann has 3 figs and eats 1.", Question="How many are left?")
    assert fine("svamp", **tale, label="3 - 1") and not fine("svamp", **tale, label="two")
    assert not fine("svamp", **tale)


@pytest.mark.parametrize("name, text, right, wanted", [
    ("rte", " entailment", ["entailment"], 1), ("rte", "not_entailment", ["entailment"], 0),
    ("squad", "b  c", ["a", "b c"], 1), ("svamp", "1 + 3", ["( 3.0 + 1.0 )"], 1),
    ("svamp", "?", ["( 3.0 + 1.0 )"], 0), ("svamp", "5", ["( 3.0 + 1.0 )"], 0),
    ("nl4opt", "maximise x", ["maximise x now please"], 2 / 3)])
def test_scores_are_exact_matches_values_of_equations_or_rouge_l(name, text, right, wanted):
    found = gold.task_metrics(gold.load_task(name), [text], [{"references": right}])
    metric = "rouge_l" if name == "nl4opt" else "accuracy"
    assert found == {metric: pytest.approx(wanted)}


def test_accuracy_weighs_topics_as_they_occur_and_uniform_and_tail_do_not():
    rows = [{"references": ["a"], "weight": w, "tail": tail}
            for w, tail in ((6.0, False), (1.0, True), (1.0, True))]
    m = gold.task_metrics(gold.load_task("rte"), ["a", "a", "b"], rows)
    assert m == pytest.approx({"accuracy": 7 / 8, "accuracy_uniform": 2 / 3, "accuracy_tail": 0.5})


def test_coverage_counts_topics_of_ten_samples_the_tail_and_garbage():
    topics = [{"topic": "cats", "patterns": [r"cat \d+"], "tail": False},
              {"topic": "dogs", "patterns": [r"dog \d+"], "tail": True}]
    texts = [f"cat {i}" for i in range(12)] + [f"dog {i}" for i in range(4)] + ["what", "a cat 1"]
    samples = [{"sample": {"text": text, "label": "dog 1"}} for text in texts]
    assert gold.coverage(samples, topics) == pytest.approx(
        {"modes": 1, "tail_mass": 4 / 18, "garbage": 2 / 18})
    assert gold.coverage(samples, []) == {}


def test_real_samples_have_each_label_equally_often_and_come_from_the_first_ten_k_rows():
    rows = [{"sample": {"text": str(i), "label": "rare" if i % 10 == 0 else "common"}}
            for i in range(400)]
    task = {"name": "x", "shots": 4, "labels": {"rare": "", "common": ""}}
    shots = gold.pick_shots(task, rows, random.Random(0))
    assert [s["label"] for s in shots].count("rare") == 2
    assert len({s["text"] for s in shots}) == 4 and all(int(s["text"]) < 40 for s in shots)
    with pytest.raises(common.BadInput, match="4 real samples are wanted"):
        gold.pick_shots(task, rows[:3], random.Random(0))


def test_the_llm_is_asked_again_for_bad_samples_and_texts_of_held_out_rows(tmp_path, monkeypatch):
    task, calls = gold.load_task("rte"), []
    form = " {0}.\nSentence2: {0}."
    bad, held, good = "no form", form.format("held out row"), form.format("quite a new one")

    def answer(self, prompts, call, *_):
        calls.append(call)
        return [[bad, held, good], [bad, good], [good]][len(calls) - 1]

    monkeypatch.setattr(gold.LLM, "__call__", answer)
    cfg = SimpleNamespace(temperature=1.0, top_k=0, top_p=1.0)
    held_out = {"rte sentence1: held out row. sentence2: held out row."}
    llm = gold.LLM(None, task, [], held_out, tmp_path / "written.jsonl", cfg)
    found = llm.write([], [{"label": "entailment"}] * 3, "plain", 5)
    assert [s["Sentence1"] for s in found] == ["quite a new one."] * 3
    assert calls == [[5, "plain", 0], [5, "plain", 1], [5, "plain", 2]] and llm.asked == 6


def test_an_llm_reads_a_chat_turn_and_goes_on_from_a_forced_beginning_or_reads_both_in_one():
    model = small_model("llama", 16, 328)
    model.tokenizer = tokenizer = small_tokenizer()
    llm = gold.LLM(model, gold.load_task("reviews"), [], set(), ROOT / "none", None)
    assert tokenizer.decode(llm.tokens("the cat", " sat on")) == "the cat sat on"
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    assert tokenizer.decode(llm.tokens("the cat", " sat on")) == "<u>the cat</u><a> sat on"
    with pytest.raises(common.BadInput, match="has room for 244"):  # of 256, 12 are new
        llm.tokens("the cat " * 200, "on")


# ---- ddk.py: the mixture ------------------------------------------------------------------------
def near(got, wanted):
    return got.tolist() == pytest.approx(wanted, abs=5e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_mixture_equals_eq_2_in_loops(smoothing):
    r, rho = [0.1, 0.3, 0.05, 0.35, 0.2], [0.9, 5.0, 1.1, 2.2, 3.0]
    psi = [r[i] * math.exp(rho[i]) for i in range(5)]
    wanted = [smoothing * x / sum(psi) + (1 - smoothing) / 5 for x in psi]
    assert near(ddk.mixture(double(*r).log(), double(*rho), smoothing).exp(), wanted)


def test_shares_stay_finite_where_the_exponential_of_a_gap_is_infinite():
    rho = ddk.domain_gap(double(711, 5000, 3), double(1, 1, 1))
    r = ddk.mixture(rho.log_softmax(-1), double(1000, 1, 740), 0.5)
    assert rho.isfinite().all() and r.isfinite().all() and near(r.exp(), [4 / 6, 1 / 6, 1 / 6])


def test_metrics_report_the_largest_gap_and_not_that_of_the_hardest_domain():
    m = ddk.metrics(["a", "b"], double(5, 1), double(4.9, 0.2), double(0.3, 0.7))
    assert m["worst_gap"] == m["gap_b"] == pytest.approx(math.exp(0.8))
    assert (m["mean_ce"], m["ppl_a"], m["share_b"]) == pytest.approx((3, math.exp(5), 0.7))


def test_a_domain_goes_through_all_its_sequences_before_one_repeats_also_after_resuming():
    straight, sampler = (ddk.DomainSampler([5, 7], 3) for _ in range(2))
    seen = {0: [], 1: []}
    for step in range(60):
        shares = double(.9, .1) if step % 2 else double(.2, .8)
        if step % 7 == 3:  # a new process
            state, sampler = sampler.state_dict(), ddk.DomainSampler([5, 7], 3)
            sampler.load_state_dict(state)
        drawn = sampler.draw(step, 3, shares)
        assert drawn == straight.draw(step, 3, shares)
        for i, j in drawn:
            seen[i].append(j)
    for i, size in ((0, 5), (1, 7)):
        passes = [seen[i][a:a + size] for a in range(0, len(seen[i]) - size + 1, size)]
        assert len(passes) > 5 and all(sorted(order) == list(range(size)) for order in passes)
        assert len(set(map(tuple, passes))) > 1  # reshuffled


def test_draws_follow_the_shares_and_differ_between_seeds():
    shares = [0.6, 0.3, 0.1]
    samplers = [ddk.DomainSampler([50, 50, 50], seed) for seed in (0, 1)]
    a, b = ([pair for t in range(150) for pair in sampler.draw(t, 20, double(*shares))]
            for sampler in samplers)
    assert a != b
    for domain, share in enumerate(shares):  # within four standard deviations
        count = sum(i == domain for i, _ in a)
        assert abs(count - 3000 * share) < 4 * math.sqrt(3000 * share * (1 - share))


def test_fixed_shares_are_uniform_natural_or_as_named():
    shares = lambda mix: ddk.fixed_shares(mix, ["a", "b"], [30, 10]).tolist()
    assert shares("uniform") == [0.5, 0.5] and shares("natural") == shares("ddk") == [0.75, 0.25]
    assert shares("b=.8,a=.2") == pytest.approx([0.2, 0.8])
    for bad in ("a=.5", "a=.5,b=.6", "a=1.5,b=-.5", "a=.5,b=x", "a=.5,c=.5", "a=.5,a=.5"):
        with pytest.raises(common.BadInput, match="--mix"):
            shares(bad)
