"""Draw the figures of the README from the committed assets/results.jsonl:  python -m assets.figures

Needs matplotlib, which nothing else does."""
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).parent
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito: safe for colour-blind eyes


def curves(records, rows, row_names, file, title):
    """Three metrics on validation prompts over steps: mean over seeds, each seed a thin line, labels at the ends."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), dpi=160)
    for axis, key, label in zip(axes, ("kl_pq", "valid", "mode_distance"), (
            "KL(p||q), nats a response", "right answers at T = 1", "distance of wording shares")):
        ends = []
        for row, color in zip(rows, COLORS):
            runs = [r["curve"] for r in records if r["row"] == row]
            steps = [x["step"] for x in runs[0]]
            for run in runs:
                axis.plot(steps, [x[key] for x in run], color=color, linewidth=0.6, alpha=0.35)
            mean = [sum(run[i][key] for run in runs) / len(runs) for i in range(len(steps))]
            axis.plot(steps, mean, color=color, linewidth=2)
            ends.append([mean[-1], row_names[row], color])
        if key == "kl_pq":
            axis.set_yscale("log")
        low, high = axis.get_ylim()
        place = (lambda y: y) if key != "kl_pq" else math.log
        gap, last = 0.075 * (place(high) - place(low)), None
        for end in sorted(ends):  # labels at the line ends, pushed apart where they would overlap
            at = place(end[0]) if last is None else max(place(end[0]), last + gap)
            last = at
            y = at if key != "kl_pq" else math.exp(at)
            axis.annotate(end[1], (steps[-1], y), xytext=(5, 0), textcoords="offset points", color=end[2], va="center")
        axis.set_title(label, loc="left", fontsize=10)
        axis.set_xlabel("optimizer steps")
        axis.set_xticks(steps[::2] if len(steps) > 4 else steps)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.tight_layout(w_pad=4.5)
    figure.savefig(file, facecolor="white")
    plt.close(figure)
    print(file)


def main():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("error: the figures need matplotlib: pip install matplotlib")
    records = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    names = {"sft": "SFT", "kd": "KD", "seqkd": "SeqKD", "kd-teacher": "KD on\nteacher text"}
    curves(records, list(names), names, HERE / "kd_forward.png",
           "Same student, same 500 steps, 5 seeds (thin): what the teacher gives decides")


if __name__ == "__main__":
    main()
