"""The numbers behind the figures, and that they draw; the pictures themselves are for the eye."""
import itertools
import json

import numpy as np
import pytest
from evidence import figures


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


def test_draws_what_has_records_and_names_what_has_not(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    point = lambda step: {"step": step, "margin": step - 9, "nll_t": 3 + step, "nll_s": 4, "fresh_margin": -2 - step}
    records = [{"row": row, "seed": seed, "command": f"python dpkd.py --beta 0.1 --seed {seed}",
                "train": [point(0), point(9)], "curve": [point(0), point(10)]}
               for row in ("frozen-b01", "online-b01") for seed in (10, 11)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figures.main(tmp_path / "r.jsonl", tmp_path)
    assert sorted(f.name for f in tmp_path.glob("*.png")) == ["dpkd_margin.png"]
    assert (tmp_path / "dpkd_margin.png").stat().st_size > 10_000
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("skipped for lack of records: overview.png (sft, kd, seqkd,") and "ddk_gap.png (uniform, " in said


def test_figures_of_what_an_llm_wrote_draw_from_records(tmp_path):
    pytest.importorskip("matplotlib")
    made = {"coverage": [[160, 3], [320, 7]], "by_topic": [1 - t / 40 for t in range(20)]}
    records = [{"row": row, "seed": seed, "written": made} for row in ("a", "b") for seed in (10, 11)]
    figures.coverage(records, {"a": "one", "b": "two"}, "title").savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
