"""Draw the figures of README.md and assets/results.md from the committed assets/results.jsonl.

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
    "dpkd": RED, "dpkd-alone": WINE, "llmr": BLACK,
    "natural": ORANGE, "uniform": GREEN, "static": BLUE, "no-smoothing": PINK, "ddk": RED,
    "gold": RED, "gold-plain": BLUE, "gold-ood": GREEN, "gold-random": PINK, "gold-top": ORANGE, "gold-t1": SKY,
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


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(np.maximum(q, 1e-300)))).sum(-1)


def beyond(p, q0, beta):
    """Where the preference loss leads when y_s stays drawn from q0: p (p/q0)^(1/beta), normalised."""
    return softmax(np.log(p) + (np.log(p) - np.log(q0)) / beta)


def descend(p, q0, beta, refresh, steps, rate=0.2):
    """Exact expected gradient descent of dpkd's loss on a table of n responses; y_s is drawn anew every refresh steps.

    beta and refresh broadcast, say (A,1) and (B,) -> q of (A,B,n). Steps of rate/beta: all betas start equally fast."""
    beta, refresh = (x[..., None] for x in np.broadcast_arrays(np.float64(beta), np.float64(refresh)))
    z = np.log(q0) + np.zeros(beta.shape)  # logits
    drawn = 0  # the distribution of y_s
    for step in range(steps):
        drawn = np.where(step % refresh == 0, softmax(z), drawn)
        rho = z - np.log(p)
        margin = beta[..., None] * (rho[..., :, None] - rho[..., None, :])  # (A,B,n,n): y_t, y_s
        pull = p[:, None] * drawn[..., None, :] / (1 + np.exp(np.minimum(margin, 500)))  # Pr(pair) sigmoid(-margin)
        z += rate * (pull.sum(-1) - pull.sum(-2))
    return softmax(z)


def tabular():
    """Ten responses to one prompt: what the student converges to, and KL(p||q) over beta and the age of y_s."""
    p = np.array([.25, .20, .15, .12, .10, .07, .05, .03, .02, .01])
    q0 = np.array([.33, .12, .20, .08, .13, .03, .06, .015, .025, .01])
    betas, intervals = np.array([5, 2, 1, .5, .2, .1, .05]), np.array([1, 10, 30, 100, 300, 1000, np.inf])
    return dict(p=p, q0=q0, frozen=beyond(p, q0, 0.1), online=descend(p, q0, 0.1, 1, 5000), betas=betas,
                intervals=intervals, grid=kl(p, descend(p, q0, betas[:, None], intervals, 5000)))


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


def overview(records, names, title):
    """Mean over seeds on one ruler, against seconds: those of the quickest seed, since the machine was shared. Rows
    from the KL-distilled start are dashed."""
    figure, axes = panels(2, title, 3.9, between=1.1, right=1.1)
    labels = "KL(p||q), nats a response", "right answers, sampled at T = 1"
    for axis, key, label in zip(axes, ("kl_pq", "valid"), labels):
        ends = []
        for row, name in names.items():
            color = color_of(row)
            runs = [r["curve"] for r in records if r["row"] == row]
            dashed = row == "llmr" or any("--student tiny-kl" in r["command"] for r in records if r["row"] == row)
            rate = min(c[-1]["seconds"] for c in runs) / runs[0][-1]["step"]
            mean = [np.mean([c[i][key] for c in runs]) for i in range(len(runs[0]))]
            seconds = [rate * x["step"] for x in runs[0]]
            axis.plot(seconds, mean, "--" if dashed else "-", color=color, linewidth=2)
            axis.plot(seconds[-1:], mean[-1:], "o", color=color, markersize=4)
            ends.append(((seconds[-1], mean[-1]), name, color))
        if key == "kl_pq":
            log_scale(axis, sorted({*TICKS, *FINE}))
        axis.set(title=label, xlabel="seconds of training on one CPU core, the quickest seed's")
        for short in (True, False):  # the long runs end elsewhere
            end_labels(axis, [e for e in ends if (e[0][0] < 30) == short])
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


def domains(records):
    return [k[4:] for k in next(r for r in records if r["row"] == "ddk")["curve"][0] if k.startswith("gap_")]


def mixtures(records, title):
    """Left: who gets how much of the data, stacked. Right: the same shares as lines between floor and cap."""
    figure, (left, right) = panels(2, title, 4, between=0.7, right=0.8)
    runs, names, ends = [r["curve"] for r in records if r["row"] == "ddk"], domains(records), []
    steps = [x["step"] for x in runs[0]]
    mean = np.mean([[[x["share_" + n] for n in names] for x in run] for run in runs], 0)  # (steps, domains)
    step = lambda values: np.repeat(values, 2)[:-1]  # a share holds until the next look at the gaps
    left.stackplot(np.repeat(steps, 2)[1:], *map(step, mean.T), colors=[DOMAINS[n] for n in names])
    for y, n in zip(mean[-1].cumsum() - mean[-1] / 2, names):
        left.text(steps[-1] * 0.97, y, n, color="white", ha="right", va="center", fontweight="bold")
    for i, n in enumerate(names):
        color = DOMAINS[n]
        right.plot(np.repeat(steps, 2)[1:], step(mean[:, i]), color=color, linewidth=2)
        ends.append(((steps[-1], mean[-1, i]), n, color))
    floor = 0.5 / len(names)
    for y, at, text in ((floor, -0.035, "floor: (1 - alpha) / N"), (floor + 0.5, 0.01, "cap: alpha + floor")):
        right.axhline(y, color="0.3", linewidth=1, linestyle="--")
        right.text(steps[-1] / 2, y + at, text, ha="center", color="0.3")
    left.set(title="shares, stacked", xlabel="optimizer steps", xlim=(0, steps[-1]), ylim=(0, 1))
    right.set(title="the same, with the bounds of Eq. 2", xlabel="optimizer steps", ylim=(0, 0.66))
    end_labels(right, ends)
    return figure


def worst(records, names, alphas, title):
    """Left: the widest gap over steps. Right: what more weight on the gaps buys and costs, at the end, on test text."""
    figure, (left, right) = panels(2, title, 3.6, between=1.9, right=0.4)
    ends = []
    for row, name in names.items():
        color = color_of(row)
        runs = [[(x["step"], x["worst_gap"]) for x in r["curve"]] for r in records if r["row"] == row]
        ends.append((draw_runs(left, runs, color), name, color))
    log_scale(left, FINE)
    end_labels(left, ends)
    shared = set.intersection(*({r["seed"] for r in records if r["row"] == row} for row in alphas))
    line = []
    for row, alpha in alphas.items():
        found = [(r["result"]["after.mean_ce"], r["result"]["after.worst_gap"]) for r in records
                 if r["row"] == row and r["seed"] in shared]
        right.plot(*zip(*found), "o", color=color_of("ddk"), markersize=3, alpha=0.4)
        line.append(np.mean(found, 0))
        right.annotate(f"alpha {alpha}", line[-1], (5, 5), textcoords="offset points", color=color_of("ddk"))
    right.plot(*zip(*line), "-o", color=color_of("ddk"), linewidth=1.5)
    left.set(title="widest gap of the domains (validation)", xlabel="optimizer steps")
    right.set(title=f"widest gap (test), {len(shared)} seeds", xlabel="mean cross entropy, nats a token")
    return figure


def sets(records, rows, names, title):
    """The widest gap over steps, one panel for each set of domains, {title: row of DDK}; mixtures as in `names`."""
    figure, axes = panels(len(rows), title, between=0.35, right=0.3, sharey=True)
    for axis, (text, row) in zip(axes, rows.items()):
        for mix in names:
            wanted = row if mix == "ddk" else mix if row == "ddk" else f"{row}-{mix}"
            runs = [[(x["step"], x["worst_gap"]) for x in r["curve"]] for r in records if r["row"] == wanted]
            draw_runs(axis, runs, color_of(mix))
        axis.set(title=text, xlabel="optimizer steps", xticks=[0, 300, 600])
    for i, (mix, name) in enumerate(names.items()):
        axis.text(0.95, 0.9 - 0.1 * i, name, color=color_of(mix), transform=axis.transAxes, ha="right", fontweight="bold")
    axes[0].set_ylim(1, 20)  # without smoothing it goes far beyond for a while
    log_scale(axes[0], FINE)
    axes[0].set_ylabel("widest gap (validation)")
    return figure


def of_rows(records, row, key):
    return np.array([r["written"][key] for r in records if r["row"] == row], dtype=float)


def written(records, names, title):
    """A panel for each row: the share of each topic among what the LLM wrote (dots: seeds) over its true weight."""
    topics = list(json.loads((ROOT / "data/reviews/grammar.json").read_text())["topics"])
    weights = np.arange(1, len(topics) + 1) ** -1.6
    figure, axes = panels(len(names), title, 3.6, between=0.3, right=0.3, sharey=True)
    for axis, (row, name) in zip(axes, names.items()):
        color = color_of(row)
        counts, garbage = of_rows(records, row, "topics"), of_rows(records, row, "garbage")
        shares = counts / (counts.sum(1) + garbage)[:, None]
        axis.bar(range(20), shares.mean(0), color=color, alpha=0.5)
        axis.plot(np.tile(range(20), (len(shares), 1)), shares, ".", color=color, markersize=3)
        axis.plot(weights / weights.sum(), color="0.2", linewidth=1.5)
        axis.set(title=f"{name}: garbage {(garbage / (counts.sum(1) + garbage)).mean():.2f}", yscale="log",
                 ylim=(3e-4, 1), xlabel="topic, from common to rare")
        axis.set_xticks([0, 5, 10, 18], [topics[i] for i in (0, 5, 10, 18)])
    axes[0].text(4.5, 0.09, "true weights", color="0.2")
    axes[0].set_yticks([.001, .01, .1, 1], ["0.001", "0.01", "0.1", "1"])
    return figure


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


def by_energy(records, names, title):
    """OOD samples by their rank of energy inside their round: how many are of common topics, of rare ones, garbage."""
    figure, axes = panels(len(names), title, 3.4, between=0.3, right=1.2, sharey=True)
    for axis, (row, name) in zip(np.atleast_1d(axes), names.items()):
        ranks = of_rows(records, row, "ranks").sum(0)  # (3, b)
        shares, floor, b = ranks / ranks.sum(0), 0, ranks.shape[1]
        for share, color, what in zip(shares, (BLUE, GREEN, RED), ("common", "rare", "garbage")):
            axis.bar(range(b), share, bottom=floor, color=color, width=0.9)
            if axis is np.atleast_1d(axes)[-1]:
                axis.text(b - 0.3, (floor + share / 2)[-1], what, color=color, va="center", fontweight="bold")
            floor = floor + share
        axis.axvspan(b * 5 // 10 - 0.5, b * 8 // 10 - 0.5, color="0.2", alpha=0.25)
        axis.text((b * 5 // 10 + b * 8 // 10 - 1) / 2, 1.02, "band", ha="center", color="0.3")
        axis.set(title=name, xlabel="rank by energy in its round", xticks=range(b), ylim=(0, 1.08))
        axis.set_xticklabels(range(1, b + 1))
    return figure


def table(title):
    """Left: p, q0 and what both kinds of negatives converge to. Right: the boundary of stability."""
    t = tabular()
    figure, (left, right) = panels(2, title, 4, between=1, right=0.15)
    n, top, start = np.arange(1, 11), t["frozen"].argmax(), kl(t["p"], t["q0"])
    left.bar(n, t["p"], color="0.85")
    for q, color in (("q0", BLUE), ("frozen", RED), ("online", GREEN)):
        left.plot(n, t[q], color=color, linewidth=1, marker="o", markersize=5)
    left.text(1.2, t["q0"][0] + 0.01, "start q0", color=BLUE)
    left.text(2.7, 0.23, "fresh y_s:\nq = p (bars)", color=GREEN)
    text = f"frozen y_s: {t['frozen'][top]:.2f}\nwhere p has {t['p'][top]:.2f}\nand q0 had {t['q0'][top]:.2f}"
    left.text(top + 1.3, t["frozen"][top] - 0.1, text, color=RED)
    left.set(title="probability of each response, beta = 0.1", xlabel="response, sorted by p", xticks=n)
    far = np.log(np.maximum(t["grid"], 1e-9) / start).clip(-5, 5)  # 0, white: as far from p as at the start
    right.imshow(far, cmap="RdBu_r", vmin=-8, vmax=8, aspect="auto")
    for (i, j), value in np.ndenumerate(t["grid"]):
        right.text(j, i, f"{value:.2f}", ha="center", va="center")
    right.set_xticks(range(len(t["intervals"])), [f"{k:g}" if k < np.inf else "never" for k in t["intervals"]])
    right.set_yticks(range(len(t["betas"])), [f"{b:g}" for b in t["betas"]])
    right.set(title=f"KL(p||q) after 5,000 steps; {start:.2f} at the start", ylabel="beta",
              xlabel="steps (of 0.2 / beta) until y_s is drawn anew")
    return figure


def frontier(records, starts, title):
    """Wrong answers over entropy: the controls cooled from T = 1 down to .2 (lines), LLMR (dots: seeds and mean)."""
    figure, axes = panels(len(starts), title, 3.6, between=0.8, left=0.8, right=0.7, sharey=True)
    for axis, (start, rows) in zip(axes, starts.items()):
        for row, label in rows.items():
            color, runs = color_of(row), []
            for seed in sorted({r["seed"] for r in records if r["row"] == row}):
                found = {r["row"]: r["result"] for r in records if r["seed"] == seed}
                cooled = [] if row.startswith("llmr") else [f"{row}-t{t}" for t in (7, 5, 3, 2)]
                if all(k in found for k in cooled):
                    runs.append([(found[k]["after.entropy"], 1 - found[k]["after.valid_mass"]) for k in [row, *cooled]])
            mean = np.mean(runs, 0)
            if len(mean) == 1:
                axis.plot(*np.array(runs)[:, 0].T, ".", color=color, markersize=4, alpha=0.4)
                axis.plot(*mean.T, "o", color=color, markersize=7)
                axis.annotate(label, mean[0], (7, 3), textcoords="offset points", color=color)
                continue
            axis.plot(*mean.T, "-o", color=color, markersize=4, linewidth=2)
            axis.annotate(label, mean[0], (-4, 8 if color == GREEN else -24), textcoords="offset points", color=color)
            for point, t in zip(mean, ("1", ".7", ".5", ".3", ".2") if color == BLUE else ()):
                axis.annotate(f"T = {t}", point, (3, -13), textcoords="offset points", color=color, fontsize=8)
        axis.set(title=start, xlabel="entropy, nats a response", yscale="log")
    for axis in axes:
        ticks = [.002, .005, .01, .02, .05, .1, .2, .3]
        low, high = 0.65 * min(a.dataLim.y0 for a in axes), axis.get_ylim()[1]
        axis.set_ylim(low, high)
        axis.set_yticks([t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high])
        axis.set_yticks([], minor=True)
    axes[0].set_ylabel("probability of a wrong answer")
    return figure


def training(records, title):
    """Over updates: LLMR's objective, and three metrics on validation prompts, with both controls."""
    figure, axes = panels(4, title, between=0.55, right=0.85)
    names = {"llmr-fine": "LLMR", "kl-more": "+KL", "seqkd-more": "+SeqKD"}
    for axis, key, label in zip(axes, ("advantage", "valid", "entropy", "mode_distance"), (
            "sum of A_t", "right answers, T = 1", "entropy, nats", "mode distance")):
        ends = []
        for row, name in names.items():
            color = color_of(row)
            where = "train" if key == "advantage" else "curve"
            runs = [[(x["step"], x[key]) for x in r[where]] for r in records
                    if r["row"] == row and where in r and key in r[where][0]]
            if runs:
                ends.append((draw_runs(axis, runs, color), name, color))
        axis.set(title=label, xlabel="updates")
    end_labels(axes[-1], ends)
    return figure


def excess_error(data, names, title):
    """The ratio, and beside it both things it is made of."""
    excess = lambda R, leps: 100 * (R - leps) / leps
    figure, axes = panels(3, title)
    ends = {axis: [] for axis in axes}
    for row, name in names.items():
        color = color_of(row)
        runs = list(data["excess"][row].values())
        n = min(len(r["R"]) for r in runs)
        R, leps = (np.array([r[k][:n] for r in runs]) for k in ("R", "leps"))
        for axis, values in zip(axes, (R, leps, excess(R, leps))):
            lines = [list(zip(range(1, n + 1), v)) for v in values]
            ends[axis].append((draw_runs(axis, lines, color), name, color))
    longest = max(x for (x, _), _, _ in ends[axes[0]])
    for axis, label in zip(axes, ("R(l): on the student's prefixes, nats", "l eps(l): on the teacher's, nats",
                                  "ExAccErr(l), %: their ratio less 1")):
        axis.set(title=label, xlabel="tokens l")
        end_labels(axis, [end for end in ends[axis] if end[0][0] == longest])
        for (x, y), name, color in [end for end in ends[axis] if end[0][0] < longest]:
            axis.annotate(name, (x, y), (5, -3), textcoords="offset points", color=color)
    axes[2].axhline(0, color="0.6", linewidth=0.8, zorder=0)
    return figure


def token_rewards(data, title):
    """The induced reward of every token of a good and of a corrupted response; the advantage beside it."""
    figure, axes = panels(2, title, 3.4, between=1.0, left=1.0, right=0.3, sharex=True)
    names = "the teacher's greedy response", "one word exchanged"
    for axis, response, name in zip(axes, data["rewards"]["responses"], names):
        at = np.arange(len(response["tokens"]))
        axis.barh(at - 0.18, response["reward"], 0.34, color=BLUE)
        axis.barh(at + 0.18, response["advantage"], 0.34, color=RED)
        axis.set_yticks(at, response["tokens"])
        axis.invert_yaxis()
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set(title=f"{name}: sum of A_t {sum(response['advantage']):.1f}", xlabel="nats")
    axes[0].text(0.02, 0.02, "reward r_t", color=BLUE, transform=axes[0].transAxes)
    axes[0].text(0.02, 0.1, "advantage A_t", color=RED, transform=axes[0].transAxes)
    return figure


def main(source=ROOT / "assets/results.jsonl", folder=ROOT / "assets"):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("error: the figures need matplotlib: pip install matplotlib")
    records = [json.loads(line) for line in Path(source).read_text().splitlines()]
    kd = {"sft": "SFT", "kd": "KD", "seqkd": "SeqKD", "kd-teacher": "KD, teacher text"}
    margins = {"frozen-b01": "y_s drawn once (frozen)", "epoch-b01": "every epoch", "online-b01": "every step (online)"}
    margin = {"training pairs": ("train", "margin", RED), "fresh pairs": ("curve", "fresh_margin", BLUE)}
    gaps = {"no-smoothing": "without smoothing: r = softmax(rho)", "ddk": "DDK"}
    mixes = {"natural": "natural", "uniform": "uniform", "static": "static at DDK's mean", "ddk": "DDK"}
    others = {"the six domains": "ddk", "mild: small gaps": "mild", "alike": "alike", "same: equal gaps": "same"}
    of_each = {"natural": "natural", "uniform": "uniform", "no-smoothing": "no smoothing", "ddk": "DDK"}
    alphas = {"uniform": "0 (uniform)", "ddk": 0.5, "alpha-8": 0.8, "alpha-1": 1}
    wrote = {"gold-plain": "plain prompt", "gold-ood": "OOD prompt", "gold": "GOLD"}
    arms = {"gold-plain": "plain prompt", "gold-ood": "OOD prompt", "gold": "GOLD (band)", "gold-random": "random",
            "gold-top": "top", "gold-t1": "plain at T = 1"}
    energies = {"gold-ood": "no feedback", "gold": "GOLD (band)", "gold-top": "most strange fed back"}
    excess = Path(source).with_name("excess.json")
    data = json.loads(excess.read_text()) if excess.exists() else None
    three = {"kl-more": "+KL", "seqkd-more": "+SeqKD", "llmr": "LLMR"}
    starts = {"from the KL-distilled start": {"kl-more": "+KL", "seqkd-more": "+SeqKD", "llmr": "LLMR, 300 updates",
                                              "llmr-100": "100", "llmr-50": "50", "llmr-25": "25"},
              "from a weaker start": {"kl-mid": "+KL", "seqkd-mid": "+SeqKD", "llmr-mid": "LLMR, lr 3e-4",
                                      "llmr-mid-lr1e-3": "lr 1e-3"}}
    everyone = {"sft": "SFT", "seqkd": "SeqKD", "kd": "KD", "kd-teacher": "KD, teacher text",
                "reverse-kl": "reverse KL", "dpkd": "DPKD", "llmr": "LLMR", "kl-more": "KL"}
    figures = {
        "overview.png": (everyone, lambda title: overview(records, everyone, title),
                         "500 steps each, mean of {}; dashed: 300 more, from a start that 1,500 steps of KD made"),
        "kd_forward.png": (kd, lambda title: curves(records, kd, title),
                           "Same student, same 500 steps, {} (thin): what the teacher gives decides"),
        "llmr_frontier.png": ([row for rows in starts.values() for row in rows],
                              lambda title: frontier(records, starts, title),
                              "Is it more than sharpening? LLMR against its controls at lower temperatures"),
        "llmr_training.png": (["llmr-fine", "kl-more", "seqkd-more"], lambda title: training(records, title),
                              "300 updates from the KL-distilled start, thin lines: seeds"),
        "llmr_excess.png": (data and {}, lambda title: excess_error(data, three, title),
                            "Excess error: the ratio (right) says little without the two that it is made of"),
        "llmr_reward.png": (data and {}, lambda title: token_rewards(data, title),
                            "What the teacher's logits pay for each token"),
        "dpkd_margin.png": (margins, lambda title: pairs(records, margins, margin, 1.1, title),
                            "Margin / beta, nats, {} (thin): stale pairs flatter the student, fresh ones do not"),
        "ddk_gap.png": (gaps, lambda title: by_domain(records, gaps, title),
                        "Gap to the teacher, PPL(q) / PPL(p), by domain, {} (thin)"),
        "ddk_shares.png": ({"ddk": ""}, lambda title: mixtures(records, title),
                           "What DDK draws: mean of {}, interval 0 in natural proportion"),
        "ddk_worst.png": ({**mixes, **alphas}, lambda title: worst(records, mixes, alphas, title),
                          "Equal tokens, different mixtures, {} (thin)"),
        "ddk_sets.png": ([*of_each, "mild", "alike", "same", "mild-natural", "alike-natural", "same-natural"],
                         lambda title: sets(records, others, of_each, title),
                         "What there is to gain hangs on how unlike the gaps are, {} (thin)"),
        "gold_written.png": (wrote, lambda title: written(records, wrote, title),
                             "What the LLM wrote, share of all samples, mean of {} (dots: seeds)"),
        "gold_coverage.png": (arms, lambda title: coverage(records, arms, title),
                              "3,008 samples each, {} (thin): what is covered is what is learned"),
        "gold_energy.png": (energies, lambda title: by_energy(records, energies, title),
                            "Samples of the OOD prompt by energy, sum over {}: garbage rises with the rank"),
        "dpkd_tabular.png": ({}, table, "No network, no noise: ten responses to one prompt, exact gradients"),
    }
    skipped, have = [], [r["row"] for r in records]
    for name, (rows, draw, title) in figures.items():
        if rows is None:
            skipped.append(f"{name} (assets/excess.json)")
            continue
        if missing := [row for row in rows if row not in have]:
            skipped.append(f"{name} ({', '.join(missing)})")
            continue
        seeds = " or ".join(sorted({str(have.count(row)) for row in rows})) + " seeds"
        draw(title.format(seeds)).savefig(Path(folder) / name)
        print(Path(folder) / name)
    if skipped:
        print(f"skipped for lack of records: {', '.join(skipped)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
