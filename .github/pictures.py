# SPDX-License-Identifier: MIT
"""The README's pictures, as SVG beside this file: from dirl.py itself, and from what real runs left and printed.

    python .github/pictures.py                                       mask.svg, from dirl.mask_mod and dirl.layout
    python .github/pictures.py --runs runs/tiny-0 runs/tiny-1 ...    curves.svg: reward and accuracy of default runs
    python .github/measure.py --bench > bench.txt                    for --bench bench.txt: cost.svg, the authors' layout and ours
    python -m pytest test_dirl.py -k "unbiased or importance" -s > bias.txt          for --bias bias.txt: bias.svg
    python .github/measure.py --mismatch > mismatch.txt              for --mismatch mismatch.txt: mismatch.svg
    python .github/measure.py --one-step > one-step.txt              for --one-step one-step.txt: one-step.svg

A viewer's dark colour scheme is respected: the colours are classes, defined twice."""
import argparse
import json
import os
import re
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

COLOURS = {                                       # class: (light, dark)
    "ink": ("#1f2328", "#e6edf3"), "faint": ("#d0d7de", "#3d444d"), "paper": ("#ffffff", "#0d1117"),
    "ours": ("#0969da", "#4493f8"), "theirs": ("#bc4c00", "#f0883e"), "third": ("#6e7781", "#9198a1"),
    "own": ("#f4a261", "#d97706"), "clean": ("#8ec3ff", "#1f6feb")}


def svg(name, width, height, parts):
    """Write a picture: its parts are SVG elements whose class is one of COLOURS, filled or stroked with it."""
    def rules(i):
        return "".join(f".{c}{{fill:{pair[i]}}}.l-{c}{{stroke:{pair[i]};fill:none}}" for c, pair in COLOURS.items())
    style = f"text{{font:12px system-ui,sans-serif}}{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}"
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
                   f"<style>{style}</style>\n" + "\n".join(parts) + "\n</svg>\n")


def text(x, y, words, c="ink", anchor="start", size=12, more=""):
    words = str(words).replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{c}" text-anchor="{anchor}" style="font-size:{size}px" {more}>{words}</text>'


def box(x, y, width, height, c):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{c}"/>'


def line(points, c, width=1.5):
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="l-{c}" stroke-width="{width}"/>'


class Axes:
    """A panel with linear axes from 0: x and y in data units, ticks labelled."""
    def __init__(self, left, top, width, height, xs, ys, title, xlabel):
        self.left, self.top, self.width, self.height, self.x_max, self.y_max = left, top, width, height, xs[-1], ys[-1]
        self.parts = [text(left, top - 12, title, more='font-weight="600"'),
                      text(left + width / 2, top + height + 34, xlabel, "third", "middle")]
        for y in ys:
            self.parts.append(line([self.at(0, y), self.at(self.x_max, y)], "faint", 1))
            self.parts.append(text(left - 6, self.at(0, y)[1] + 4, f"{y:,}", "third", "end", 11))
        for x in xs:
            self.parts.append(text(self.at(x, 0)[0], top + height + 16, f"{x:,}", "third", "middle", 11))

    def at(self, x, y):
        return self.left + self.width * x / self.x_max, self.top + self.height * (1 - y / self.y_max)

    def draw(self, points, c, width=1.5, dots=False, label=None, shift=0):
        places = [self.at(x, y) for x, y in points]
        self.parts.append(line(places, c, width))
        if dots:
            self.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" class="{c}"/>' for x, y in places]
        if label:
            self.parts.append(text(places[-1][0] + 6, places[-1][1] + 4 + shift, label, c))


def ticks(most):
    """0 and three to five round numbers, the last at or above most."""
    step = next(s * 10**e for e in range(-3, 9) for s in (1, 2, 2.5, 5) if s * 10**e * 5 >= most)
    n = int(-(-most // step)) + 1
    return [int(i * step) if step >= 1 else round(i * step, 6) for i in range(n)]


def matrix(left, top, cell, document, B, labels, title):
    """Who sees whom in one document: coloured by why, with a label at every row and column."""
    import torch

    import dirl
    block, copy = document["pos"] // B, document["view"]
    n = len(block)
    i = torch.arange(n)
    sees = dirl.mask_mod(torch.zeros(n), copy, block)(0, 0, i[:, None], i).tolist()
    parts = [text(left, top - 40, title, more='font-weight="600"'), box(left, top, n * cell, n * cell, "faint")]
    for q in range(n):
        parts.append(text(left - 6, top + q * cell + cell * 0.72, labels[q], "ink", "end", 11))
        parts.append(text(left + q * cell + cell / 2, top - 6, labels[q], "ink", "middle", 11))
        for kv in range(n):
            own = copy[q] == copy[kv] and block[q] == block[kv]
            parts.append(box(left + kv * cell + 0.5, top + q * cell + 0.5, cell - 1, cell - 1,
                             "paper" if not sees[q][kv] else "own" if own else "clean"))
    for v in range(int(copy.max()) + 1):                                         # a line where a copy or view ends
        end = int((copy <= v).sum()) * cell
        for points in ([(left, top + end), (left + n * cell, top + end)], [(left + end, top), (left + end, top + n * cell)]):
            parts.append(line(points, "third", 1))
    return parts


def mask():
    """Left: Fig. 4b's mask, clean copy first, every block once noisy. Right: one trajectory as one forward holds it."""
    import torch

    import dirl
    fig = dirl.layout(torch.arange(6), torch.arange(3), torch.zeros(3, 2, dtype=torch.long), 2)
    dot = "·"
    document = dirl.trajectory_document(torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5]), torch.tensor([1, 1, 1, 2]), 2, 6)
    shown = ["P", "P", "a", "b", "c", "d", dot]
    cell = 20
    parts = matrix(40, 72, cell, fig, 2, [*"xxxxxx", *[dot] * 6], "SFT (Fig. 4b): a clean copy, every block noised once")
    right = 40 + 12 * cell + 130
    parts += matrix(right, 72, cell, document, 2, [shown[i] for i in document["ids"].tolist()],
                    "RL: a trajectory, every decoding step a view")
    for left, spans in ((40, (("clean copy", 0, 6), ("noised", 6, 12))),
                        (right, (("clean copy", 0, 6), ("view 1", 6, 8), ("view 2", 8, 10), ("view 3", 10, 12)))):
        parts += [text(left + cell * (a + b) / 2, 54, name, "third", "middle", 11) for name, a, b in spans]
    reads = document["reads"].tolist()
    for i, r in enumerate(reads):
        y = 72 + r * cell + cell * 0.72
        parts.append(text(right + 12 * cell + 8, y, f"log π({shown[2 + i]})", "ink", size=11))
    bottom = 72 + 12 * cell + 26
    parts += [box(40, bottom - 10, 12, 12, "own"), text(58, bottom, "sees: its own copy of its block"),
              box(260, bottom - 10, 12, 12, "clean"), text(278, bottom, "sees: an earlier clean block"),
              text(470, bottom, "· is [MASK]; rows look at columns")]
    svg("mask.svg", right + 12 * cell + 70, bottom + 14, parts)


def curves(folders):
    """The sampled reward of every step, and the accuracy on held-out problems, of default runs of several seeds."""
    runs = []
    for folder in folders:
        with open(os.path.join(folder, "rl.metrics.jsonl"), encoding="utf-8") as file:
            runs.append([json.loads(x) for x in file])
    rewards = [[(x["step"], x["reward"]) for x in run if "reward" in x] for run in runs]
    accuracy = [[(x["step"], x["accuracy"]) for x in run if "accuracy" in x] for run in runs]
    steps = ticks(max(x for points in rewards for x, _ in points))
    left = Axes(50, 40, 300, 180, steps, [0, 0.25, 0.5, 0.75, 1.0], "mean reward of the sampled answers", "RL step")
    right = Axes(420, 40, 300, 180, steps, [0, 0.25, 0.5, 0.75, 1.0], "greedy accuracy, held-out problems", "RL step")
    for axes, group in ((left, rewards), (right, accuracy)):
        for points in group:
            axes.draw(points, "third", 1)
        mean = [(x, statistics.mean(p[i][1] for p in group)) for i, (x, _) in enumerate(group[0])]
        axes.draw(mean, "ours", 2.5, dots=axes is right)
    note = f"grey: {len(runs)} seeds; blue: their mean"
    svg("curves.svg", 750, 290, left.parts + right.parts + [text(50, 282, note, "third", size=11)])


def bench_lines(path):
    """What --bench printed: the scale of its lengths, [(lengths, tokens a step, layout, forward tokens, seconds, gigabytes)]."""
    found, scale = [], 1
    with open(path, encoding="utf-8") as file:
        for row in file:
            scale = int(re.search(r"paper / (\d+)", row)[1]) if "paper / " in row else scale
            m = re.match(r"(.{8}) +(\d+)  (the authors' layout|without fake samples|one forward \(ours\)) +"
                         r"([\d,]+) +([\d.]+) +[\d.]+ +([\d.]+)", row)
            if m:
                tokens = int(m[4].replace(",", ""))
                found.append((m[1].strip(), int(m[2]), m[3], tokens, float(m[5]), float(m[6])))
    return scale, found


def cost(path):
    """Tokens, seconds and memory of one forward and backward over a trajectory, as the output grows."""
    scale, found = bench_lines(path)
    rows = [(int(name) // scale, *rest) for name, per_step, *rest in found if name.isdigit() and per_step == 2]
    styles = {"the authors' layout": ("theirs", "authors' layout"), "without fake samples": ("third", "without fakes"),
              "one forward (ours)": ("ours", "one forward")}
    titles, parts = ("forward tokens", "seconds, forward and backward", "peak memory, GB"), []
    xs = [0] + sorted({row[0] for row in rows})
    for panel, title in enumerate(titles):
        axes = Axes(60 + 290 * panel, 40, 200, 170, xs, ticks(max(row[2 + panel] for row in rows)), title, "output tokens")
        for layout, (c, _) in styles.items():
            axes.draw(sorted((row[0], row[2 + panel]) for row in rows if row[1] == layout), c, 2, dots=True)
        parts += axes.parts
    for i, (c, label) in enumerate(styles.values()):
        parts += [box(60 + 160 * i, 268, 12, 12, c), text(78 + 160 * i, 278, label)]
    svg("cost.svg", 880, 294, parts)


def bars(name, title, rows, most, unit, left=250):
    """Horizontal bars: (label, value, class, what is written beside it); without a label a gap."""
    parts, width = [text(16, 24, title, more='font-weight="600"')], 330
    for i, (label, value, c, words) in enumerate(rows):
        y = 40 + 24 * i
        if not label:
            continue
        parts += [text(left - 8, y + 13, label, "ink", "end"), box(left, y, max(1, width * value / most), 17, c),
                  text(left + max(1, width * value / most) + 6, y + 13, words)]
    parts.append(text(left, 40 + 24 * len(rows) + 16, unit, "third", size=11))
    svg(name, left + width + 150, 40 + 24 * len(rows) + 28, parts)


def bias(path):
    """Relative error of DiPO's expected gradient, all trajectories of a toy enumerated; then where another policy samples."""
    with open(path, encoding="utf-8") as file:
        printed = file.read()
    error = r"relative error of the expected gradient ([\d.e+-]+)"
    found = re.findall(rf"(sequential|static|dynamic), (top1|drawn): {error}", printed)
    rows = [(f"{rule}, confidence: {kind}", float(x), "ours" if kind == "top1" else "theirs", f"{float(x):.2g}")
            for rule, kind, x in found]
    for rule, gap, *errors in re.findall(
            rf"(sequential|static|dynamic), a sampler ([\d.]+) nats a token away: {error} uncorrected.* (\S+) with imp", printed):
        without, corrected = map(float, errors)
        rows += [("", 0, "", "")] * (rule == "sequential")
        rows += [(f"{rule}, a sampler {gap} nats away", without, "theirs", f"{without:.2g}"),
                 ("the same with --importance", corrected, "ours", f"{corrected:.2g}")]
    bars("bias.svg", "error of DiPO's expected gradient, every trajectory enumerated", rows, max(row[1] for row in rows),
         "relative error; constant baseline and normaliser")


def one_step(path):
    """How wrong one-step log-probabilities are, by the decoding step at which a token was committed; seed 0."""
    rows, rule = [], None
    with open(path, encoding="utf-8") as file:
        for row in file:
            rule = re.match(r"seed 0, --unmask (\w+)", row) or (None if row.startswith("seed") else rule)
            m = re.search(r"committed at step (\d): +(\d+)% of the tokens; .*mean ([\d.]+)", row)
            if rule and m:
                rows.append((f"{rule[1]}, step {m[1]} ({m[2]}% of tokens)", float(m[3]), "theirs", m[3]))
    bars("one-step.svg", "one-step against exact log-probabilities of committed tokens", rows, max(row[1] for row in rows),
         "mean |one-step − exact| log π, nats; exact ones have no error at any step")


def mismatch(path):
    """Reward curves of RL by samplers that are not the trainer, as they are and with --importance: a panel a sampler."""
    runs, row = {}, None                                # {(sampler, --importance or "-"): [rewards of a seed, step by step]}
    with open(path, encoding="utf-8") as file:
        for printed in file:
            row = re.match(r"(\S.*?\S) +(-|\d+) +\d+ +\d\.\d+ ", printed) or row
            if printed.startswith("    rewards "):
                runs.setdefault(row.groups(), []).append([float(x) for x in printed.split()[1:]])
    control, samplers = runs.pop(("the trainer", "-")), list(dict.fromkeys(name for name, _ in runs))
    parts, steps = [], ticks(len(control[0]))

    def draw(axes, curves, c):
        for rewards in curves:
            axes.draw(list(enumerate(rewards, 1)), c, 0.6)
        axes.draw([(step, statistics.mean(x)) for step, x in enumerate(zip(*curves), 1)], c, 2.5)
    for panel, name in enumerate(samplers):
        axes = Axes(50 + 290 * panel, 40, 235, 170, steps, [0, 0.25, 0.5, 0.75, 1.0], f"sampler: {name}", "RL step")
        draw(axes, control, "third")
        for kind in (kind for other, kind in runs if other == name):
            draw(axes, runs[name, kind], "theirs" if kind == "-" else "ours")
        parts += axes.parts
    labels = ("third", "the trainer samples"), ("theirs", "uncorrected"), ("ours", "--importance 3")
    for i, (c, label) in enumerate(labels):
        parts += [box(50 + 150 * i, 268, 12, 12, c), text(68 + 150 * i, 278, label)]
    note = f"mean reward of sampled answers; thin: {len(control)} seeds, thick: their mean"
    svg("mismatch.svg", 40 + 290 * len(samplers), 294, parts + [text(50 + 150 * len(labels), 278, note, "third", size=11)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", metavar="OUT", help="folders of default runs, for curves.svg")
    parser.add_argument("--bench", metavar="FILE", help="what measure.py --bench printed, for cost.svg")
    parser.add_argument("--bias", metavar="FILE", help="what that pytest -s printed, for bias.svg")
    parser.add_argument("--one-step", metavar="FILE", help="what measure.py --one-step printed, for one-step.svg")
    parser.add_argument("--mismatch", metavar="FILE", help="what measure.py --mismatch printed, for mismatch.svg")
    given = parser.parse_args()
    mask()
    for made, source in ((curves, given.runs), (cost, given.bench), (bias, given.bias), (one_step, given.one_step),
                         (mismatch, given.mismatch)):
        if source:
            made(source)
