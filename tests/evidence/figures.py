"""Draw the figures of README.md from the committed assets/results.jsonl.

    python tests/evidence/figures.py                    into assets/; needs matplotlib, which no script does
    python tests/evidence/figures.py FILE FOLDER        other records, another folder

One palette for all: a color stands for one method in every figure (`color_of`), blue for the teacher's text and red
for the student's own where texts are shown.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# Okabe and Ito, for color-blind eyes, and one of Paul Tol's
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, WINE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
PALETTE = {  # row, or what its name begins with; the longest that fits counts
    "teacher": "0.6", "sft": ORANGE, "kd": SKY, "kd-teacher": BLUE, "kl": BLUE, "seqkd": GREEN, "reverse-kl": PINK,
    "greedy": WINE, "seqkd-greedy": WINE, "dpkd": RED, "llmr": BLACK,
    "natural": ORANGE, "uniform": GREEN, "static": BLUE, "no-smoothing": PINK, "ddk": RED,
    "gold": RED, "gold-plain": BLUE, "gold-ood": GREEN, "gold-random": PINK, "gold-top": ORANGE, "t1-plain": SKY, "t1": BLACK,
}
DOMAINS = {"code": BLUE, "prose": GREEN, "log": ORANGE, "json": PINK, "csv": SKY, "noise": RED}
TICKS = [.1, .2, .3, .4, .5, .7, 1, 3, 10, 30, 100, 300, 1000, 3000]  # of logarithmic axes


def color_of(row):
    fits = [name for name in PALETTE if row == name or row.startswith(name + "-")]
    return PALETTE[max(fits, key=len)] if fits else "0.4"


def spread(places, gap, low=-np.inf, high=np.inf):
    """Places moved as little as possible until neighbours are gap apart: isotonic regression of place - rank gap."""
    order, blocks = sorted(range(len(places)), key=lambda i: places[i]), []
    for rank, i in enumerate(order):
        blocks.append((places[i] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((n * a + m * b) / (n + m), n + m)]
    flat = np.repeat([a for a, _ in blocks], [n for _, n in blocks]).clip(low, high - (len(places) - 1) * gap)
    return [flat[order.index(i)] + order.index(i) * gap for i in range(len(places))]


def panels(n, title, height=3.3, between=1.75, left=0.65, right=1.2, **kwargs):
    """A figure 10.5 inches wide of n panels; margins in inches, so that labels at line ends find their place."""
    import matplotlib.figure
    matplotlib.rc("axes", titlesize=10, titlelocation="left")
    matplotlib.rc("axes.spines", top=False, right=False)
    figure = matplotlib.figure.Figure((10.5, height), dpi=160, facecolor="white")
    axes = figure.subplots(1, n, **kwargs)
    figure.subplots_adjust(left=left / 10.5, right=1 - right / 10.5, bottom=0.55 / height, top=1 - 0.65 / height,
                           wspace=between * n / (10.5 - left - right - (n - 1) * between))
    figure.suptitle(title, x=0.01, y=1 - 0.08 / height, ha="left", va="top", fontsize=11, fontweight="bold")
    return figure, axes


FINE = [1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100, 300]


def log_scale(axis, marks=TICKS):
    """Logarithmic, on both sides of 0 if the data are; plain numbers as ticks, not powers of ten."""
    both = axis.dataLim.y0 < 0
    axis.set_yscale("symlog" if both else "log", **dict(linthresh=1, linscale=0.5) if both else {})
    low, high = axis.get_ylim()
    ticks = [t for t in ([-t for t in TICKS[6:]] + [0] + TICKS[6:] if both else marks) if low <= t <= high]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_yticks([], minor=True)
    if both:
        axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)


def draw_runs(axis, runs, color):
    """Runs [[(step, value)]]: each a thin line, their mean a thick one. The last step and the mean there."""
    for run in runs:
        axis.plot(*zip(*run), color=color, linewidth=0.6, alpha=0.35)
    mean = np.mean(runs, 0)
    axis.plot(*mean.T, color=color, linewidth=2)
    return mean[-1]


def end_labels(axis, ends):
    """Label lines at their right ends, [((x, y), text, colour)], without overlap; when the limits are final."""
    points = lambda y: axis.transData.transform((0, y))[1] * 72 / axis.figure.dpi
    low, high = map(points, axis.get_ylim())
    last, places = max(x for (x, _), _, _ in ends), spread([points(y) for (_, y), _, _ in ends], 13, low + 5, high - 5)
    for ((_, y), text, color), place in zip(ends, places):
        axis.annotate(text, (last, y), (6, place - points(y)), textcoords="offset points", color=color, va="center")


def curves(records, names, title):
    """Three metrics on validation prompts over steps: mean over seeds, each seed a thin line, labels at the ends."""
    figure, axes = panels(3, title)
    for axis, key, label in zip(axes, ("kl_pq", "valid", "mode_distance"), (
            "KL(p||q), nats a response", "right answers at T = 1", "distance of wording shares")):
        ends = []
        for row, name in names.items():
            color = color_of(row)
            runs = [[(x["step"], x[key]) for x in r["curve"]] for r in records if r["row"] == row]
            ends.append((draw_runs(axis, runs, color), name, color))
        if key == "kl_pq":
            log_scale(axis)
        axis.set(title=label, xlabel="optimizer steps")
        end_labels(axis, ends)
    return figure


def tradeoff(records, starts, title):
    """A panel for each start, {its title: {row: label}}: probability of a right response over the
    distance from the teacher's wordings; a dot is the mean over seeds, a cross the start."""
    figure, axes = panels(len(starts), title, 4.2, between=0.5, right=0.4, sharey=True, sharex=True)
    for axis, (start, rows) in zip(axes, starts.items()):
        def mean(when, row):
            results = [r["result"] for r in records if r["row"] == row]
            return [np.mean([x[f"{when}.{key}"] for x in results]) for key in ("mode_distance", "valid_mass")]
        points = [(mean("before", next(iter(rows))), "start", "0.4", "x")]
        points += [(mean("after", row), label, color_of(row), "o") for row, label in rows.items()]
        points.sort(key=lambda point: -point[0][1])
        near = [point for point in points if point[0][0] < 0.3]  # their labels must not cover each other
        heights = spread([-514 * y for (_, y), *_ in near], 13)  # 514 points a unit, see ylim
        for (x, y), label, color, marker in points:
            axis.plot(x, y, marker, color=color, markersize=7)
            up = -heights[[n[1] for n in near].index(label)] - 514 * y if x < 0.3 else 0
            axis.annotate(label, (x, y), (10, up), textcoords="offset points", color=color, va="center", fontsize=9)
        axis.set(title=start, xlabel="distance from the teacher's choice of wordings", xlim=(-0.02, 0.72),
                 ylim=(0.6, 1.02))
        axis.grid(color="0.92")
    axes[0].set_ylabel("probability of a right response")
    return figure


def by_world(records, starts, title):
    """A panel for each start, {its title: {row: label}}: the share of right greedy answers on each world."""
    figure, axes = panels(len(starts), title, 3.8, between=1.6, right=1.6, sharey=True)
    ends = {axis: [] for axis in axes}
    for axis, (start, rows) in zip(axes, starts.items()):
        of = lambda row, key: sorted((r["seed"], r["result"][key]) for r in records if r["row"] == row)
        lines = [(of(next(iter(rows)), "before.valid_greedy"), "the start", "0.6")]
        lines += [(of(row, "after.valid_greedy"), label, color_of(row)) for row, label in rows.items()]
        for line, label, color in lines:
            axis.plot(range(len(line)), [y for _, y in line], "-o", color=color, linewidth=1.2, markersize=6)
            ends[axis].append(((len(line) - 1, line[-1][1]), label, color))
        axis.set(title=start, xlabel="world", ylim=(0.55, 1.02))
        axis.set_xticks(range(len(lines[0][0])), [str(seed) for seed, _ in lines[0][0]])
    axes[0].set_ylabel("right when greedy")
    for axis in axes:
        end_labels(axis, ends[axis])
    return figure


def pairs(records, names, lines, between, title):
    """A panel for each row, lines {label: (where it is logged, key, colour)}; margins are divided by beta."""
    figure, axes = panels(len(names), title, between=between, right=between, sharey=True)
    ends = {axis: [] for axis in axes}
    for axis, (row, name) in zip(axes, names.items()):
        for label, (where, key, color) in lines.items():
            unit = lambda r: float(re.search(r"--beta (\S+)", r["command"])[1]) if "margin" in key else 1
            runs = [[(x["step"], x[key] / unit(r)) for x in r[where]] for r in records if r["row"] == row]
            ends[axis].append((draw_runs(axis, runs, color), label, color))
        axis.set(title=name, xlabel="optimizer steps")
    for axis in axes:  # they share limits, which are final only now
        log_scale(axis)
        end_labels(axis, ends[axis])
    return figure


def by_domain(records, names, title, prefix="gap_"):
    """A panel for each row, a line for each domain: gaps (or shares) on validation sequences over steps."""
    figure, axes = panels(len(names), title, 4, between=0.9, right=0.9, sharey=True)
    ends = {axis: [] for axis in axes}
    for axis, (row, name) in zip(axes, names.items()):
        for domain, color in DOMAINS.items():
            runs = [[(x["step"], x[prefix + domain]) for x in r["curve"]] for r in records if r["row"] == row]
            ends[axis].append((draw_runs(axis, runs, color), domain, color))
        axis.axhline(1, color="0.6", linewidth=0.8, zorder=0)
        axis.set(title=name, xlabel="optimizer steps")
    for axis in axes:  # they share limits, which are final only now
        log_scale(axis, FINE)
        end_labels(axis, ends[axis])
    return figure


def of_rows(records, row, key):
    return np.array([r["written"][key] for r in records if r["row"] == row], dtype=float)


def coverage(records, names, title):
    """Left: topics with 10 samples or more while samples are written. Right: the student's accuracy over rarity."""
    figure, (left, right) = panels(2, title, 3.8, between=1.9, right=1.7)
    ends, ends_right = [], []
    for row, name in names.items():
        color = color_of(row)
        runs = [[tuple(x) for x in r["written"]["coverage"]] for r in records if r["row"] == row]
        ends.append((draw_runs(left, runs, color), name, color))
        fours = of_rows(records, row, "by_topic").reshape(-1, 5, 4).mean(2)  # four topics a point
        ends_right.append((draw_runs(right, [list(zip(range(5), x)) for x in fours], color), name, color))
    left.set(title="topics with 10 samples or more, of 20", xlabel="samples written", ylim=(0, 20.5))
    right.set(title="student's accuracy, four topics a point", xlabel="topics, from common to rare", ylim=(0, 1.02))
    right.set_xticks(range(5), [f"{4 * i + 1}-{4 * i + 4}" for i in range(5)])
    left.set_yticks(range(0, 21, 5))
    right.axhline(0.5, color="0.6", linewidth=0.8, zorder=0)
    end_labels(left, ends)
    end_labels(right, ends_right)
    return figure


def main(source=ROOT / "assets/results.jsonl", folder=ROOT / "assets"):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("error: the figures need matplotlib: pip install matplotlib")
    records = [json.loads(line) for line in Path(source).read_text().splitlines()]
    kd = {"sft": "SFT", "kd": "KD", "seqkd": "SeqKD", "kd-teacher": "KD, teacher text"}
    starts = {
        "from the supervised student, 500 steps": {
            **kd, "seqkd-greedy": "SeqKD, greedy", "reverse-kl": "reverse KL", "dpkd": "DPKD", "llmr-sft": "LLMR (600)"},
        "from the distilled student, 600 steps": {
            "kl-more": "KD, teacher text", "seqkd-more": "SeqKD", "greedy-more": "SeqKD, greedy",
            "reverse-kl-late": "reverse KL", "dpkd-late": "DPKD", "llmr": "LLMR"}}
    worlds = {
        "from the student trained on labels": {
            "kd-teacher": "KD, teacher text", "seqkd-2x": "SeqKD, 2x steps", "seqkd-greedy": "SeqKD, greedy",
            "reverse-kl": "reverse KL", "llmr-sft": "LLMR"},
        "from its KL-distilled successor": {
            "kl-more-2x": "KD, 2x steps", "greedy-more-3x": "SeqKD, greedy, 3x", "reverse-kl-late": "reverse KL", "llmr": "LLMR"}}
    margins = {"frozen-b01": "y_s drawn once (frozen)", "online-b01": "every step (online)"}
    margin = {"training pairs": ("train", "margin", RED), "fresh pairs": ("curve", "fresh_margin", BLUE)}
    gaps = {"uniform": "uniform", "first-look": "the first look, kept", "no-smoothing": "without smoothing", "ddk": "DDK"}
    arms = {"gold-plain": "plain prompt", "gold-ood": "OOD prompt", "gold": "GOLD (band)", "gold-random": "random",
            "gold-top": "top", "t1-plain": "plain at T = 1", "t1": "GOLD at T = 1"}
    figures = {
        "tradeoff.png": ([row for rows in starts.values() for row in rows],
                         lambda title: tradeoff(records, starts, title),
                         "LLMR is right most often, and gives up wordings for it; KD keeps them ({})"),
        "kd_forward.png": (kd, lambda title: curves(records, kd, title),
                           "Same student, same 500 steps, {} (thin): what the teacher gives decides"),
        "llmr_worlds.png": ([row for rows in worlds.values() for row in rows],
                            lambda title: by_world(records, worlds, title),
                            "Greedy answers, world by world: LLMR gains where the student falls short, and only there ({})"),
        "dpkd_margin.png": (margins, lambda title: pairs(records, margins, margin, 1.1, title),
                            "Margin / beta, nats, {} (thin): stale pairs flatter the student, fresh ones do not"),
        "ddk_gap.png": (gaps, lambda title: by_domain(records, gaps, title),
                        "Gap to the teacher, PPL(q) / PPL(p), by domain, {} (thin): it has to be followed, and smoothly"),
        "gold_coverage.png": (arms, lambda title: coverage(records, arms, title),
                              "3,008 samples each, {} (thin): what is covered is what is learned"),
    }
    skipped, have = [], [r["row"] for r in records]
    for name, (rows, draw, title) in figures.items():
        if missing := [row for row in rows if row not in have]:
            skipped.append(f"{name} ({', '.join(missing)})")
            continue
        seeds = " or ".join(sorted({str(have.count(row)) for row in rows})) + " seeds"
        try:
            figure = draw(title.format(seeds))
        except KeyError as e:
            skipped.append(f"{name} (older records have no {e})")
            continue
        figure.savefig(Path(folder) / name)
        print(Path(folder) / name)
    if skipped:
        print(f"skipped for lack of records: {', '.join(skipped)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
