"""Does memory stay flat in a long run? Resident memory of a real run, sampled every second; slope with its interval.

    python tests/soak.py [--minutes 20] [--scripts kd_forward llmr]

The scripts run one after the other with their default settings on the tiny world, evaluating and saving as usual, for
--minutes each, and are then stopped by SIGTERM. The first fifth is warm-up and left out; the rest is cut into ten
blocks, and the slope is fitted to the blocks' means (seconds are too alike to count as single observations): 95 %
interval by Student's t with 8 degrees of freedom. Flat: the interval's lower end is below 30 MiB an hour. Linux only.
"""
import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def resident(pid):
    """MiB of resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def slope(points, blocks=10, t=2.306):
    """(hours, MiB) -> MiB an hour with the ends of its 95 % interval, least squares over the means of blocks."""
    size = len(points) // blocks
    x, y = zip(*([sum(v) / size for v in zip(*points[i * size:(i + 1) * size])] for i in range(blocks)))
    mx, my = sum(x) / blocks, sum(y) / blocks
    sxx = sum((a - mx) ** 2 for a in x)
    b = sum((a - mx) * (c - my) for a, c in zip(x, y)) / sxx
    rest = sum((c - my - b * (a - mx)) ** 2 for a, c in zip(x, y))
    half = t * (rest / (blocks - 2) / sxx) ** 0.5
    return b, b - half, b + half


def soak(script, minutes, root):
    command = [sys.executable, str(ROOT / f"{script}.py"), "--steps", "1000000", "--out", str(root / script)]
    process = subprocess.Popen(command, stdout=open(root / f"{script}.txt", "w"), stderr=subprocess.PIPE, text=True)
    log, points = root / script / "log.jsonl", []
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(1)  # models are loaded, the tiny world is made
    begin = time.time()
    while process.poll() is None and time.time() - begin < 60 * minutes:
        points.append(((time.time() - begin) / 3600, resident(process.pid)))
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1].strip()
    if process.returncode != 143:
        sys.exit(f"{script} ended with {process.returncode}: {said}")
    kept = points[len(points) // 5:]
    b, low, high = slope(kept)
    print(f"{script:<11} {minutes:g} minutes, {said.split('after step ')[1].split(',')[0]} steps: resident memory {kept[0][1]:.0f} MiB, at the end "
          f"{kept[-1][1]:.0f}, at most {max(m for _, m in points):.0f}; slope {b:+.1f} MiB an hour [{low:+.1f}, {high:+.1f}]", flush=True)
    return low < 30


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--scripts", nargs="+", default=["kd_forward", "llmr"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        flat = [soak(s, args.minutes, Path(root)) for s in args.scripts]
    print("memory is flat" if all(flat) else "memory grows")
    return not all(flat)


if __name__ == "__main__":
    sys.exit(main())
