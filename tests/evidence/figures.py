"""Draw the pictures of README.md and results.md from assets/results.csv, into assets/.

    python tests/evidence/figures.py        needs matplotlib, which no script does

A dot or thick line is a mean over seeds, a thin line is one seed. A color stands for one method in
all pictures.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import results

ASSETS = results.ROOT / "assets"
# Okabe and Ito's colors, for color-blind eyes, and one of Paul Tol's
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, WINE, GRAY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "0.55")


def canvas(n, title, height=3.6, width=10.5, **kwargs):
    import matplotlib.figure
    matplotlib.rc("axes", titlesize=10, titlelocation="left")
    matplotlib.rc("axes.spines", top=False, right=False)
    matplotlib.rc("font", size=9)
    figure = matplotlib.figure.Figure((width, height), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, figure.subplots(1, n, **kwargs)


def mean(values, row, metric, part="after"):
    return statistics.mean(results.per_seed(values, row, metric, part).values())


def curves(values, row, metric, part="valid"):
    """{seed: [(step, value)]} of what a run logged."""
    found = {}
    for (r, seed, p, step, m), value in values.items():
        if (r, p, m) == (row, part, metric):
            found.setdefault(seed, []).append((int(step), value))
    return {seed: sorted(points) for seed, points in found.items()}


def draw_curves(axis, found, color, label, scale=1.0, up=0):
    """A thin line for each seed, a thick one for their mean, with its name at the right end, moved
    up by some points."""
    for points in found.values():
        axis.plot([s for s, _ in points], [scale * v for _, v in points], color=color, lw=0.6,
                  alpha=0.4)
    steps = [s for s, _ in next(iter(found.values()))]
    means = [scale * statistics.mean(p[i][1] for p in found.values()) for i in range(len(steps))]
    axis.plot(steps, means, color=color, lw=2)
    axis.annotate(label, (steps[-1], means[-1]), (5, up), textcoords="offset points", color=color,
                  va="center", annotation_clip=False)


# --- The pictures ---------------------------------------------------------------------------------
def tradeoff(values):
    figure, axes = canvas(2, "LLMR is right most often and gives up wordings for it; KD keeps them",
                          4.2, sharey=True, sharex=True)
    panels = {
        "from the supervised student, 300 steps": {
            "sft": ("SFT", ORANGE), "kd": ("KD, given responses", SKY), "seqkd": ("SeqKD", GREEN),
            "kd-teacher": ("KD, teacher's responses", BLUE), "greedy": ("SeqKD, greedy", WINE),
            "on-policy": ("on-policy", PINK), "dpkd": ("DPKD", RED), "llmr": ("LLMR", BLACK)},
        "from the distilled student, 400 steps": {
            "kd-late": ("KD, teacher's responses", BLUE), "seqkd-late": ("SeqKD", GREEN),
            "greedy-late": ("SeqKD, greedy", WINE), "on-policy-late": ("on-policy", PINK),
            "dpkd-late": ("DPKD", RED), "llmr-late": ("LLMR", BLACK)}}
    for axis, (title, rows) in zip(axes, panels.items()):
        def place(row, part="after"):
            return [mean(values, row, metric, part) for metric in ("wording_distance", "right")]
        dots = [(*place(row), *shown) for row, shown in rows.items()]
        dots.append((*place(next(iter(rows)), "before"), "start", GRAY))
        last = -1.0
        for x, y, name, color in sorted(dots, key=lambda dot: dot[1]):
            axis.plot(x, y, "o" if name != "start" else "x", color=color, ms=8)
            height = y if x > 0.3 else max(y, last + 0.02)  # labels must not cover each other
            last = height if x <= 0.3 else last
            axis.annotate(name, (x, y), (x + 0.02, height), color=color, va="center")
        axis.set(title=title, xlabel="distance from the teacher's choice of wordings",
                 xlim=(-0.02, 0.72), ylim=(0.58, 1.0))
        axis.grid(color="0.92")
    axes[0].set_ylabel("probability of a right response")
    return figure


def kd_forward(values):
    figure, axis = canvas(1, "KL(p||q) over 300 steps depends on what the teacher gives", width=7.5)
    for row, name, color, up in (("sft", "SFT", ORANGE, 0), ("kd", "KD, given responses", SKY, 0),
                                 ("seqkd", "SeqKD", GREEN, 7),
                                 ("kd-teacher", "KD, teacher's responses", BLUE, -6)):
        points = curves(values, row, "kl_pq")
        for seed in points:  # the curve ends with the test rows
            points[seed].append((300, results.per_seed(values, row, "kl_pq")[seed]))
        draw_curves(axis, points, color, name, up=up)
    axis.set(xlabel="optimizer steps (thin lines: five instances)", ylim=(0, None),
             ylabel="kl_pq, nats per response")
    return figure


def llmr(values):
    figure, axes = canvas(2, "LLMR gains on every instance where the student falls short",
                          sharey=True)
    starts = {"from the supervised student": ("llmr", {"greedy": ("SeqKD, greedy", WINE)}),
              "from the distilled student": ("llmr-late", {"greedy-late": ("SeqKD, greedy", WINE)})}
    for axis, (title, (row, others)) in zip(axes, starts.items()):
        before = results.per_seed(values, row, "right_greedy", "before")
        after = results.per_seed(values, row, "right_greedy")
        for at, seed in enumerate(sorted(before)):
            axis.plot([at, at], [before[seed], after[seed]], color="0.8", lw=3, zorder=0)
        axis.plot(range(len(before)), [before[s] for s in sorted(before)], "x", color=GRAY, ms=8,
                  label="start")
        for other, (name, color) in others.items():
            found = results.per_seed(values, other, "right_greedy")
            axis.plot(range(len(found)), [found[s] for s in sorted(found)], "o", color=color,
                      label=name)
        axis.plot(range(len(after)), [after[s] for s in sorted(after)], "o", color=BLACK,
                  label="LLMR")
        axis.set(title=title, xlabel="instance", ylim=(0.55, 1.02))
        axis.set_xticks(range(len(before)), [str(s) for s in sorted(before)])
    axes[0].set_ylabel("greedy responses that are right")
    axes[1].legend(loc="lower right", frameon=False)
    return figure


def dpkd_margin(values):
    figure, axes = canvas(2, "DPKD, beta = 0.1: frozen pairs look better while the student breaks")
    for row, name, color in (("dpkd-frozen", "frozen", RED), ("dpkd-fresh", "fresh", BLUE)):
        draw_curves(axes[0], curves(values, row, "margin", "train"), color,
                    f"{name} pairs, trained on", 10)
        draw_curves(axes[0], curves(values, row, "fresh_margin"), GRAY if name == "fresh" else PINK,
                    f"{name} pairs, measured on new ones", 10, up=-9)
        draw_curves(axes[1], curves(values, row, "right"), color, name)
    axes[0].set_yscale("symlog", linthresh=10)
    ticks = [-300, -100, -30, -10, -5, 0, 5]
    axes[0].set_yticks(ticks, map(str, ticks))
    axes[0].set(title="margin / beta, nats (logarithmic below -10)", xlabel="optimizer steps")
    axes[1].set(title="probability of a right response", xlabel="optimizer steps", ylim=(0, 1))
    return figure


def dpkd_border(values):
    betas, refreshes = ("0.1", "0.5", "2", "5"), (1, 4, 16, 64, 0)
    figure, axes = canvas(2, "DPKD collapses when student responses are old, whatever beta is",
                          3.4)
    shown_as = {"right": ("probability of a right response", "BuGn"),
                "kl_pq": ("kl_pq, nats per response", "OrRd")}
    for axis, (metric, (title, color)) in zip(axes, shown_as.items()):
        grid = [[mean(values, f"border-{b}-{r}", metric) for r in refreshes] for b in betas]
        shown = [[min(x, 12) for x in line] for line in grid]
        axis.imshow(shown, cmap=color, aspect="auto", vmin=0)
        for i, line in enumerate(grid):
            for j, x in enumerate(line):
                dark = shown[i][j] > 0.6 * max(map(max, shown))
                axis.text(j, i, f"{x:.2f}" if x < 10 else f"{x:.0f}", ha="center", va="center",
                          color="white" if dark else "black")
        axis.set_xticks(range(5), [f"{r}" if r else "0 (frozen)" for r in refreshes])
        axis.set_yticks(range(4), betas)
        axis.set(title=title, xlabel="--refresh: steps between new student responses",
                 ylabel="--beta")
    return figure


def gold(values):
    figure, axes = canvas(2, "GOLD: the loop covers more topics, and random feedback does as well",
                          3.2, sharey=True)
    arms = {"plain": "plain prompt", "ood": "OOD prompt, no feedback", "random": "random feedback",
            "": "energy band (GOLD)"}
    for axis, metric, title in ((axes[0], "modes", "topics with 10 samples or more, of 20"),
                                (axes[1], "accuracy_uniform", "student's accuracy over topics")):
        for prefix, name, color, shift in (("gold", "LLM at T = 0.6", BLUE, 0.12),
                                           ("gold-t1", "LLM at T = 1", RED, -0.12)):
            for at, arm in enumerate(arms):
                found = results.per_seed(values, f"{prefix}-{arm}".rstrip("-"), metric).values()
                axis.plot(found, [at + shift] * len(found), "o", color=color, ms=4, alpha=0.4)
                axis.plot(statistics.mean(found), at + shift, "D", color=color, ms=8,
                          label=name if at == 0 else None)
        axis.set_yticks(range(len(arms)), arms.values())
        axis.set(title=title)
        axis.grid(axis="x", color="0.92")
    axes[0].set_xlim(0, 20.5)
    axes[0].set_xticks(range(0, 21, 4))
    axes[1].axvline(0.5, color="0.6", lw=0.8)
    axes[1].annotate("guessing", (0.5, 2.5), (4, 0), textcoords="offset points", color="0.4")
    axes[1].legend(loc="lower right", frameon=False)
    return figure


def ddk(values):
    figure, axes = canvas(2, "DDK gives more data to the domains that lag behind", 3.4)
    rows = {"ddk-natural": "natural proportions", "ddk-uniform": "uniform",
            "ddk-first": "fixed at the first gaps", "ddk-rough": "DDK without smoothing",
            "ddk-static": "fixed at DDK's averages", "ddk": "DDK"}
    for at, (row, name) in enumerate(rows.items()):
        found = results.per_seed(values, row, "worst_gap").values()
        axes[0].barh(at, statistics.mean(found), color=RED if row == "ddk" else "0.75")
        axes[0].plot(found, [at] * len(found), "o", color="black", ms=3)
    axes[0].set_yticks(range(len(rows)), rows.values())
    axes[0].axvline(1, color="0.4", lw=0.8)
    axes[0].set(title="widest gap at the end (1: the teacher's level)", xlim=(0.9, None))
    domains = {"csv": SKY, "json": PINK, "noise": GRAY, "log": ORANGE, "code": BLUE, "prose": GREEN}
    for domain, color in domains.items():
        label = "log, json, csv, noise" if domain == "log" else domain
        draw_curves(axes[1], curves(values, "ddk", f"share_{domain}"), color,
                    label if domain in ("log", "code", "prose") else "")
    axes[1].set(title="share of the data under DDK", xlabel="optimizer steps", ylim=(0, None))
    return figure


PICTURES = (tradeoff, kd_forward, llmr, dpkd_margin, dpkd_border, gold, ddk)


def main():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("error: the pictures need matplotlib: pip install matplotlib")
    values = results.read()
    for draw in PICTURES:
        try:
            draw(values).savefig(ASSETS / f"{draw.__name__}.png")
        except (statistics.StatisticsError, KeyError, StopIteration):
            print(f"skipped {draw.__name__}: results.csv lacks some of its rows")
            continue
        print(f"assets/{draw.__name__}.png")


if __name__ == "__main__":
    main()
