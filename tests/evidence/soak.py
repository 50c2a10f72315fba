"""Does memory stay flat in a long run? Memory of a real run, sampled every second; slope with its interval.

    python tests/evidence/soak.py [--minutes 20] [--scripts kd_forward llmr]

The scripts run one after the other with their default settings on the tiny world, evaluating and saving as usual, for
--minutes each, and are then stopped by SIGTERM. The first fifth is warm-up and left out; the rest is cut into ten
blocks, and the slope is fitted to the blocks' means (seconds are too alike to count as single observations): 95 %
interval by Student's t with 8 degrees of freedom. Flat: the interval's lower end is below 30 MiB an hour. Linux with glibc only.

Two numbers: resident memory, as the system sees it, and bytes in use, as the allocator sees them. Flat is what is flat
by both. Where only the first grows, look for what dies late and leaves the heap in pieces: reference cycles, above all.
Python's own blocks are shown beside them; they rise for some minutes, since freed ones are kept for the next of their kind.
"""
import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


WATCH = """
import ctypes, runpy, sys, threading, time
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo.restype = Info
def watch(file):
    while True:
        m = mallinfo()
        print((m.uordblks + m.hblkhd) / 2**20, sys.getallocatedblocks(), file=file, flush=True)
        time.sleep(1)
threading.Thread(target=watch, args=(open(sys.argv[1], "w"),), daemon=True).start()
del sys.argv[:2]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def in_use(file):
    """(MiB in use, Python's blocks), the last line that is whole."""
    lines = file.read_text().split("\n")[:-1]
    return tuple(map(float, lines[-1].split()))


def soak(script, minutes, root):
    watched = root / f"{script}.memory"
    command = [sys.executable, "-c", WATCH, str(watched), str(ROOT / f"{script}.py"), "--steps", "1000000", "--out", str(root / script)]
    process = subprocess.Popen(command, stdout=open(root / f"{script}.txt", "w"), stderr=subprocess.PIPE, text=True)
    log, points = root / script / "log.jsonl", []
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(1)  # models are loaded, the tiny world is made
    begin = time.time()
    while process.poll() is None and time.time() - begin < 60 * minutes:
        points.append(((time.time() - begin) / 3600, resident(process.pid), *in_use(watched)))
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1].strip()
    if process.returncode != 143:
        sys.exit(f"{script} ended with {process.returncode}: {said}")
    kept = points[len(points) // 5:]
    flat = True
    print(f"{script}: {minutes:g} minutes, {said.split('after step ')[1].split(',')[0]} steps", flush=True)
    for name, column, unit in (("resident", 1, "MiB"), ("in use", 2, "MiB"), ("Python blocks", 3, "")):
        b, low, high = slope([(p[0], p[column]) for p in kept])
        print(f"  {name:<14}{kept[0][column]:.0f} {unit}, at the end {kept[-1][column]:.0f}, at most {max(p[column] for p in points):.0f}; "
              f"slope {b:+.1f} {unit} an hour [{low:+.1f}, {high:+.1f}]", flush=True)
        flat &= low < 30 or not unit  # blocks are shown, no more: they are counted, not weighed
    return flat


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
