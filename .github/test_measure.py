# SPDX-License-Identifier: MIT
"""Tests of measure.py, in its smallest form, and of pictures.py.

    python -m pytest .github/test_measure.py
"""
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
README = (HERE.parent / "README.md").read_text(encoding="utf-8")


def measured(option):
    """What measure.py prints."""
    done = subprocess.run([sys.executable, HERE / "measure.py", option, "--small"], capture_output=True, text=True, timeout=900,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module(name):
    spec = importlib.util.spec_from_file_location(name, HERE / (name + ".py"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_options_that_the_readme_names_exist():
    options = measured("--help")
    named = re.findall(r"python\s+\.github/measure\.py\s+(--[\w-]+)", README)
    assert named and all(name in options for name in named)


PARTS = ["versions", "attention", "random_model", "layouts", "rollouts", "rl"]


def test_gpu_runs_every_part():
    """Rollouts by LMDeploy with and without the hook and the authors' layout are among them."""
    text = measured("--gpu")
    assert re.findall(r"^==== (\w+): done after", text, re.M) == PARTS
    assert text.count("  ok\n") == 6 and "WRONG" not in text and "failed: none" in text
    assert text.count("the authors' layout  ") == text.count("one forward (ours)") == 4
    for n in (4, 8):
        assert re.search(rf"^rollout, +{n} at once, stock: +[\d.,]+ tokens/s$", text, re.M)
        assert re.search(rf"^rollout, +{n} at once, ours : +[\d.,]+ tokens/s, [\d.]+ of stock$", text, re.M)
    gap, = re.findall(r"^logp_gap.* (\S+)$", text, re.M)
    assert float(gap) < 1e-4 and "GPU memory in use: before the engine" in text
    assert re.findall("^weight update, ([^:]+)", text, re.M) == ["awake", "awake", "after sleep"]
    assert re.findall(r"^step (\d): .*logp_gap \d\.\de-0[5-9]", text, re.M) == ["1", "2", "3"]
    for phase in ("rollout", "training", "weights"):
        assert len(re.findall(rf"{phase} [\d.]+ s \([\d.]+ GB\)", text)) == 3


def test_gpu_goes_on_after_a_part_that_fails_or_hangs(monkeypatch, capsys):
    measure, ran = module("measure"), []
    monkeypatch.setattr(measure, "part", lambda name, *args, seconds: ran.append((name, seconds)) or name != "attention")
    with pytest.raises(SystemExit) as end:
        measure.gpu()
    assert end.value.code == 1 and "failed: attention" in capsys.readouterr().out
    assert [name for name, _ in ran] == PARTS and all(0 < seconds <= 170 for _, seconds in ran)
    assert not module("measure").part("versions", seconds=0.01)
    assert "stopped after" in capsys.readouterr().out


def test_bench_compares_the_layouts(tmp_path):
    text = measured("--bench")
    (tmp_path / "bench.txt").write_text(text, encoding="utf-8")
    scale, rows = module("pictures").bench_lines(tmp_path / "bench.txt")
    tokens = [row[3] for row in rows]
    assert [row[2] for row in rows] == ["the authors' layout", "without fake samples", "one forward (ours)"]
    assert all(row[:2] == ("1024", 2) for row in rows) and tokens == sorted(tokens, reverse=True)
    padded = 2 * (1024 + 8192) // scale
    assert tokens == [4 * padded, 2 * padded, 16 + 8 * 2]           # prompt and output of 8 tokens, two blocks of two steps
    assert all(float(x) < 1e-4 for line in text.splitlines()[-2:] for x in line.split()[-2:])           # the differences


def test_one_step_finds_no_error_at_the_first_step_only():
    text = measured("--one-step")
    assert re.findall(r"^seed 0, --unmask (\w+)", text, re.M) == ["dynamic", "static"]
    errors = [(int(s), float(e)) for s, e in re.findall(r"committed at step (\d): .* max ([\d.]+)$", text, re.M)]
    assert all((e < 1e-3) == (s == 1) for s, e in errors) and {s for s, _ in errors} == {1, 2, 3, 4}
    gaps = [float(x) for x in re.findall(r"RL with .*largest logp_gap ([\d.e+-]+)$", text, re.M)]
    assert len(gaps) == 4 and max(gaps[::2]) < 1e-4 and min(gaps[1::2]) > 1e-3               # exact, one-step, twice


def test_memory_simulated_is_the_memory_of_a_real_step(tmp_path):
    """The tiny model in float32: bytes of parameters, gradients and moments are equal; what autograd keeps for the backward
    differs by what SDPA on a CPU keeps and FlexAttention does not, keys and values once for each query head."""
    import torch

    import dirl
    simulated = json.loads(measured("--memory"))
    dirl.build_tiny(str(tmp_path), 4, 0)
    c, N, R, kept = dirl.parse_flags([]), 512, 128, {}
    policy = dirl.load_policy(str(tmp_path), c)
    optimizer, weights = dirl.make_optimizer(policy, c), list(policy.model.parameters())

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = policy.hidden(torch.zeros(1, N, dtype=torch.long), torch.arange(N)[None], None)[0, :R]
        logp, _ = dirl.log_probs(hidden, policy.model.lm_head.weight, torch.zeros(R, dtype=torch.long), 1.0, 9)
        J, _ = dirl.eq7(logp, None, torch.ones(R), torch.ones(R), 0.2, 0.2)
    J.backward()

    def size(tensors):
        return sum(x.untyped_storage().nbytes() for x in tensors)
    assert simulated["sharded_param"] == size(weights) == 4 * simulated["weights"]
    assert simulated["sharded_grad"] == size(w.grad for w in weights)
    assert simulated["opt"] == size(x for state in optimizer.state.values() for x in state.values())
    own = {w.untyped_storage().data_ptr() for w in weights}
    real = size(x for at, x in kept.items() if at not in own)
    print(f"kept for the backward: {real:,} bytes, simulated {simulated['kept']:,}")
    assert abs(simulated["kept"] / real - 1) < 0.1
    pairs = 2 * N * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384) + 2 * 128 * 262 * R / 2
    assert simulated["flops"] == 3 * 2 * pairs                      # a forward and two gradients, of two layers and R reads


def test_mismatch_disturbs_the_sampler_and_importance_weighs_it(tmp_path):
    text = measured("--mismatch")
    number = r" +(\d\.\d+)"
    rows = re.findall(rf"^(\S.*?\S) +(-|\d+) +0{4 * ' +[0-9.]+'}{number}(?:{number} +[0-9.]+{number})?$", text, re.M)
    samplers = list(dict.fromkeys(name for name, *_ in rows))
    assert samplers == ["the trainer", "logits in steps of 1", "logits in steps of 4", "weights 8 steps old"]
    assert [(name, C) for name, C, *_ in rows] == [(samplers[0], "-"), *itertools.product(samplers[1:], "-3")]
    gaps = [float(gap) for *_, gap, _, _ in rows]
    assert gaps[0] < 1e-3 < min(gaps[1:]) and gaps[1] < gaps[3]
    assert all(bool(weight) == (C == "3") and (not share or 0 < float(share) < 1) for _, C, _, weight, share in rows)
    assert len(re.findall(r"^    rewards( \d\.\d+){3}$", text, re.M)) == len(rows)
    pictures = module("pictures")
    pictures.HERE = str(tmp_path)
    (tmp_path / "text").write_text(text + "static, top1: relative error of the expected gradient 2.0e-15, x\n"
                                   "static, a sampler 0.08 nats a token away: relative error of the expected gradient 0.30 "
                                   "uncorrected, 0.12 with token ratios, 1.7e-15 with importance weights\n")
    pictures.mismatch(tmp_path / "text")
    pictures.bias(tmp_path / "text")
    assert [(tmp_path / "mismatch.svg").read_text().count(f'"l-{c}"') for c in ("third", "theirs", "ours")] == [6, 6, 6]
    assert re.findall(">(0.3|1.7e-15|2e-15)</text>", (tmp_path / "bias.svg").read_text()) == ["2e-15", "0.3", "1.7e-15"]


@pytest.mark.parametrize("per_step", [1, 2, 4])
def test_attention_flops_count_the_pairs_that_the_mask_shows(per_step):
    """Of a trajectory and of what fills its row."""
    import torch

    measure = module("measure")
    dirl, P, L, fill = measure.dirl, 12, 20, 24
    steps = (torch.arange(L) % 4) // per_step + 1
    document = dirl.trajectory_document(torch.ones(P).long(), torch.ones(L).long(), steps, 4, 9)
    row = dirl.join([document], length=len(document["ids"]) + fill)
    i, sees = torch.arange(len(row["ids"])), dirl.mask_mod(row["doc"], row["view"], row["pos"] // 4)
    assert int(sees(0, 0, i[:, None], i).sum()) == measure.visible_pairs(P, L, 4 // per_step, fill)


def test_pictures_come_from_the_code(tmp_path):
    from xml.dom.minidom import parse
    pictures, runs = module("pictures"), [tmp_path / "a", tmp_path / "b"]
    pictures.HERE = str(tmp_path)
    for folder in runs:                                             # metrics as of a run of RL
        folder.mkdir()
        lines = [{"step": n, "reward": 0.9 - 0.6 * math.exp(-n / 9), "logp_gap": 1e-8} for n in range(1, 51)]
        lines = [{"step": 0, "accuracy": 0.1}, *(x | {"accuracy": 0.98} if x["step"] % 10 == 0 else x for x in lines)]
        (folder / "rl.metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures.mask()
    pictures.curves(list(map(str, runs)))
    ours = f"{'1024':8} {2:11}  {'one forward (ours)':22} {1600:14,} {1.99:8.2f} {0.41:6.2f} {0.75:8.2f}\n"
    (tmp_path / "bench.txt").write_text(ours)
    pictures.cost(tmp_path / "bench.txt")
    (tmp_path / "text").write_text(
        "static, top1: relative error of the expected gradient 2.0e-15, x\n"
        "seed 0, --unmask dynamic, x\n    committed at step 2:  10% of the tokens; x: mean 0.388, median\n")
    pictures.bias(tmp_path / "text")
    pictures.one_step(tmp_path / "text")
    shown = set(re.findall(r"\]\(\.github/([\w-]+\.svg)\)", README))
    assert shown == {"mask.svg", "curves.svg", "cost.svg", "bias.svg", "one-step.svg", "mismatch.svg"}
    for name in shown - {"mismatch.svg"}:                           # see test_mismatch
        assert "prefers-color-scheme:dark" in (tmp_path / name).read_text()
        assert len(parse(str(tmp_path / name)).getElementsByTagName("text")) > 3
    assert (tmp_path / "mask.svg").read_text() == (HERE / "mask.svg").read_text(encoding="utf-8")
