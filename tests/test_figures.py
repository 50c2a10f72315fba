"""The numbers behind the figures, and that they draw; the pictures themselves are for the eye."""
import itertools
import json

import numpy as np
import pytest
from evidence import figures

P = np.array([.4, .3, .2, .1])
Q0 = np.array([.3, .4, .1, .2])


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_frozen_negatives_descend_to_the_closed_form(beta):
    ratio = P * (P / Q0) ** (1 / beta)
    assert np.abs(figures.beyond(P, Q0, beta) - ratio / ratio.sum()).max() < 1e-12
    q = figures.descend(P, Q0, beta, np.inf, 4000, rate=2.0)
    assert np.abs(q - ratio / ratio.sum()).max() < 1e-6 < 0.01 < figures.kl(P, q)


def test_online_negatives_descend_to_the_teacher():
    q = figures.descend(P, Q0, [0.1, 1.0], 1, 2000)
    assert q.shape == (2, 4) and np.abs(q - P).max() < 1e-6


def test_descent_follows_the_loss_of_dpkd():
    """One step from q0 is the gradient of dpkd.preference_loss, expected over all pairs."""
    import torch

    import dpkd
    beta, rate = 0.3, 0.2
    z, logp, logq0 = (torch.tensor(x).log() for x in (Q0, P, Q0))
    z.requires_grad_()
    t, s = (x.flatten() for x in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    logq = z.log_softmax(0)
    loss, _ = dpkd.preference_loss(logq[t], logp[t], logq[s], logp[s], 1, 1, beta, False)
    ((logp[t] + logq0[s]).exp() * loss).sum().backward()
    wanted = (z - rate / beta * z.grad).softmax(0).detach().numpy()
    assert np.abs(figures.descend(P, Q0, beta, 1, 1, rate) - wanted).max() < 1e-12


def test_the_map_shows_both_sides_of_the_boundary():
    t = figures.tabular()
    grid = {(b, k): t["grid"][i, j] for i, b in enumerate(t["betas"]) for j, k in enumerate(t["intervals"])}
    start = figures.kl(t["p"], t["q0"])
    assert all(v < 1e-6 for (b, k), v in grid.items() if k == 1 or b > 1 and k < 300)
    assert all(v > start for (b, k), v in grid.items() if b < 1 and k >= 300)
    assert np.abs(t["online"] - t["p"]).max() < 1e-5


@pytest.mark.parametrize("places", [[1, 1, 1], [0, 3, 1, 2], [5, 5.2, 9, 9.1, 9.2], [4, -3], [7]])
def test_labels_keep_their_order_and_a_gap(places):
    moved = figures.spread(places, 2.0)
    rank = sorted(range(len(places)), key=lambda i: places[i])
    assert all(moved[b] - moved[a] >= 2 - 1e-9 for a, b in itertools.pairwise(rank))
    assert np.mean(moved) == pytest.approx(np.mean(places))  # pushed both ways
    inside = figures.spread(places, 2.0, -1, 10)
    assert -1 <= min(inside) and max(inside) <= 10
    assert all(inside[b] - inside[a] >= 2 - 1e-9 for a, b in itertools.pairwise(rank))


def test_labels_that_fit_stay():
    assert figures.spread([1, 10, 4], 2.0, 0, 11) == [1, 10, 4]


def test_draws_what_has_records_and_names_what_has_not(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "table", lambda title: figures.panels(1, title)[0])  # its numbers are tested above
    point = lambda step: {"step": step, "margin": step - 9, "nll_t": 3 + step, "nll_s": 4, "fresh_margin": -2 - step}
    records = [{"row": row, "seed": seed, "command": f"python dpkd.py --beta 0.1 --seed {seed}",
                "train": [point(0), point(9)], "curve": [point(0), point(10)]}
               for row in ("frozen-b01", "epoch-b01", "online-b01") for seed in (10, 11)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figures.main(tmp_path / "r.jsonl", tmp_path)
    assert sorted(f.name for f in tmp_path.glob("*.png")) == ["dpkd_margin.png", "dpkd_tabular.png"]
    assert (tmp_path / "dpkd_margin.png").stat().st_size > 10_000
    llmr = ", ".join(f"llmr_{x}.png (assets/excess.json)" for x in ("excess", "reward"))
    missing = ("overview.png (sft, seqkd, kd, kd-teacher, reverse-kl, dpkd, llmr, kl-more), kd_forward.png (sft, kd, seqkd, kd-teacher), llmr_frontier.png (kl-more, seqkd-more, llmr, llmr-100, llmr-50, "
               "llmr-25, kl-mid, seqkd-mid, llmr-mid, llmr-mid-lr1e-3), llmr_training.png (llmr-fine, kl-more, seqkd-more), "
               f"{llmr}, ddk_gap.png (no-smoothing, ddk), "
               "ddk_shares.png (ddk), ddk_worst.png (natural, uniform, static, ddk, alpha-8, alpha-1), "
               "ddk_sets.png (natural, uniform, no-smoothing, ddk, mild, alike, same, mild-natural, alike-natural, same-natural), "
               "gold_written.png (gold-plain, gold-ood, gold), "
               "gold_coverage.png (gold-plain, gold-ood, gold, gold-random, gold-top, gold-t1), gold_energy.png (gold-ood, gold, gold-top)")
    assert capsys.readouterr().out.splitlines()[-1] == f"skipped for lack of records: {missing}"


def test_figures_of_what_an_llm_wrote_draw_from_records(tmp_path):
    pytest.importorskip("matplotlib")
    made = {"topics": [100 - 5 * t for t in range(20)], "garbage": 50, "ranks": [[9] * 8, [1] * 8, list(range(8))],
            "coverage": [[160, 3], [320, 7]], "by_topic": [1 - t / 40 for t in range(20)]}
    records = [{"row": row, "seed": seed, "written": made} for row in ("a", "b") for seed in (10, 11)]
    for draw in (figures.written, figures.coverage, figures.by_energy):
        draw(records, {"a": "one", "b": "two"}, "title").savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
