# SPDX-License-Identifier: MIT
"""Tests of dirl.py: every equation against a slow version written independently of it, and real runs on one CPU.

    python -m pytest test_dirl.py .github/test_measure.py -n 2
"""
import argparse
import ast
import builtins
import contextlib
import copy
import dis
import fcntl
import functools
import importlib.util
import itertools
import json
import math
import os
import pickle
import pkgutil
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dirl

HERE = os.path.dirname(os.path.abspath(dirl.__file__))
sys.path.insert(0, os.path.join(HERE, ".github"))

import stand_ins

MODULE = Path(__file__).stem
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1",
                           "PYTHONPATH": os.pathsep.join([HERE, os.path.dirname(os.path.abspath(__file__))])}
torch.set_num_threads(1)                 # workers and the processes that they start share the cores


# ---- what is made once -----------------------------------------------------------------------------------------

def made_once(request, tmp_path_factory, name, make):
    """A folder that `make` fills once in a session, whichever of xdist's workers comes first; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):                      # a worker: its base is a folder in the session's
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(str(folder))
            done.touch()
    return str(folder)


@pytest.fixture(scope="session")
def default_run(request, tmp_path_factory):
    """`torchrun dirl.py --stage rl`, as in the README, of seed 0: its folder, OUT; its log is OUT.log."""
    def make(out):
        command = [sys.executable, "-m", "torch.distributed.run", dirl.__file__, "--stage", "rl", "--out", out]
        with open(out + ".log", "w", encoding="utf-8") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True, timeout=900, env=ONE_THREAD)
    return made_once(request, tmp_path_factory, "default", make)


@pytest.fixture(scope="session")
def checkpoint(request, tmp_path_factory):
    """The tiny model after 100 steps of SFT, which sometimes is right."""
    def make(out):
        main("--stage sft --steps 100 --save-every 100 --out", out)
    return os.path.join(made_once(request, tmp_path_factory, "short", make), "sft")


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """B → an untrained tiny policy."""
    made = {}

    def policy(B=4):
        if B not in made:
            folder = str(tmp_path_factory.mktemp(f"tiny{B}"))
            c = flags("--block-size", B)
            dirl.build_tiny(folder, B, seed=0)
            made[B] = dirl.load_policy(folder, c)
            with torch.no_grad():                     # a sharper head: confidences on both sides of a threshold
                made[B].model.lm_head.weight *= 4
        return made[B]
    return policy


# ---- flags and files -------------------------------------------------------------------------------------------

def flags(*argv, stage="rl"):
    return dirl.parse_flags(["--stage", stage, *map(str, argv)])


def changed(c, **values):
    """A copy of the flags with other values."""
    return argparse.Namespace(**vars(c) | values)


def words(*argv):
    """Flags as main takes them; a text that begins with -- is split at its spaces, and an empty one is none."""
    return [word for x in map(str, argv) for word in (x.split() if x[:2] in ("--", "") else [x])]


def main(*argv):
    dirl.main(words(*argv))


def refused(captured, *argv, quiet=False):
    """The one line with which main ends, at exit code 2, after a progress bar if there is one; quiet: nothing else is said."""
    with pytest.raises(SystemExit) as stop:
        main(*argv)
    out, err = captured.readouterr()
    before, line = err.split("dirl.py: error: ")
    assert stop.value.code == 2 and line.endswith("\n") and line.count("\n") == 1 and "Traceback" not in err, err
    assert not quiet or before + out == "", (out, err)
    return line[:-1]


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def jsonl(path, *records, answer="3"):
    """Write records into a file, one a line; a text is the question of a problem."""
    records = (x if isinstance(x, dict) else {"question": x, "answer": answer} for x in records)
    Path(path).write_text("".join(json.dumps(x) + "\n" for x in records))


def lines_of(*path):
    """Of a .jsonl file, in which no number is a bare NaN or Infinity."""
    with open(os.path.join(*path), encoding="utf-8") as file:
        return [json.loads(line, parse_constant=pytest.fail) for line in file]


def without(mapping, *names):
    return {key: value for key, value in mapping.items() if key not in names}


def without_seconds(out, stage="rl"):
    """A run's metrics, which are then the same for the same run."""
    return [without(line, *(x for x in line if x.startswith("seconds"))) for line in lines_of(out, f"{stage}.metrics.jsonl")]


def noting(calls, name, function=lambda *args: None):
    """A function that notes its name in a list, every time it is called."""
    def call(*args, **more):
        calls.append(name)
        return function(*args, **more)
    return call


def files_under(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SHORT_CONSTANTS = {"WARMUP": 0, "MAX_ROUNDS": 1, "HELD_OUT": 0, "EXAMPLES": 2**9}


def short_runs(monkeypatch, held_out=0):
    """One round of rollouts a step, no warm-up, little built-in data: what `short_script` says to a process of its own."""
    for name, value in (SHORT_CONSTANTS | {"HELD_OUT": held_out}).items():
        monkeypatch.setattr(dirl, name, value)


def metrics(out, stage):
    """The lines of a run's metrics; of RL without step 0, which is only an evaluation."""
    return [line for line in lines_of(out, f"{stage}.metrics.jsonl") if stage != "rl" or "reward" in line]


# ---- the default run, first: another worker goes through the rest meanwhile ------------------------------------------

def test_default_run_learns(default_run):
    """`torchrun dirl.py --stage rl`: SFT, then DiPO on the built-in task; the figures of the README."""
    out = default_run
    lines, every, log = metrics(out, "rl"), lines_of(out, "rl.metrics.jsonl"), Path(out + ".log").read_text()
    reward = [line["reward"] for line in lines]
    first, last = sum(reward[:5]) / 5, sum(reward[-10:]) / 10
    assert last >= first + 0.30 and last >= 0.80
    said = re.fullmatch(r"rl: greedy accuracy (\S+) -> (\S+), reward (\S+) \(first 5 steps\) -> (\S+) \(last 10\); "
                        f"all of it is in {re.escape(out)}", log.splitlines()[-1])
    before, after, *rewards = map(float, said.groups())
    assert rewards == [round(first, 3), round(last, 3)]
    N = dirl.PRESETS["tiny rl"]["steps"]
    assert after >= before + 0.15 and f"rl, step {N}: 256 problems, one greedy answer each" in log
    assert [(line["step"], round(line["accuracy"], 3)) for line in every if "accuracy" in line] == [(0, before), (N, after)]
    assert all(line["logp_gap"] < 1e-4 for line in lines)
    both = {"step", "loss", "lr", "grad_norm", "seconds", "forward_tokens", "passed_over"}
    expected = both | set("reward kl entropy clip_fraction tokens_per_step output_length truncated groups_dropped duplicates "
                          "logp_gap seconds_rollout seconds_training seconds_weights".split())
    evaluated = {"accuracy", "standard_error", "eval_tokens_per_step", "eval_length", "eval_truncated"}
    assert all(set(line) == expected for line in lines[:-1]) and [line["step"] for line in lines] == list(range(1, N + 1))
    assert set(every[0]) == {"step"} | evaluated and set(every[-1]) == expected | evaluated and len(every) == N + 1
    parts = "seconds_rollout", "seconds_training", "seconds_weights"
    assert all(sum(line[x] for x in parts) == pytest.approx(line["seconds"]) for line in lines)
    assert set(metrics(out, "sft")[0]) == both
    files = {".lock", "init", *(f"{stage}{x}" for stage in ("sft", "rl") for x in ("", ".metrics.jsonl", ".run.json", ".state"))}
    assert set(os.listdir(out)) == files | {"rl.eval.jsonl"}
    installed = {name for name in ("torch", "transformers", "lmdeploy") if importlib.util.find_spec(name)}
    assert set(dirl.read_json(os.path.join(out, "rl.run.json"))["versions"]) == installed


# ---- a slow reference for everything the fast path does ----------------------------------------------------------

def slow_logits(policy, tokens, attention="eager", **mask):
    """Block-causal forward of one sequence, no packing, no cache, attention of transformers' own: [len, vocab]."""
    if attention == "eager":
        block = torch.arange(len(tokens)) // policy.B
        mask["attention_mask"] = -1e30 * (block > block[:, None])[None, None].float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.model.config, "_attn_implementation", attention)
        return policy.model(input_ids=tokens[None], use_cache=False, **mask).logits[0]


def slow_log_policy(policy, logits, temperature=1.0):
    keep = torch.tensor([i for i in range(logits.shape[-1]) if i != policy.mask_id])
    return torch.full_like(logits, -torch.inf).index_copy(-1, keep, torch.log_softmax(logits[..., keep] / temperature, -1))


def slow_states(policy, t):
    """Replay: yields (block, step, the sequence up to this block as the model saw it, positions committed)."""
    P, tokens, step = len(t.prompt), torch.cat([t.prompt, t.output]), [0] * len(t.prompt) + t.steps.tolist()
    for k in range(P // policy.B, len(tokens) // policy.B):
        positions = range(k * policy.B, (k + 1) * policy.B)
        for s in range(1, max(step[p] for p in positions) + 1):
            seen = tokens[:(k + 1) * policy.B].clone()
            for p in positions:
                if step[p] >= s:
                    seen[p] = policy.mask_id
            yield k, s, seen, [p for p in positions if step[p] == s]


@torch.no_grad()
def assert_replay(policy, trajectories, packed=None, temperature=1.0):
    """Their log-probabilities, and those of {index: packed score}, are those of one forward for every decoding step."""
    for i, t in enumerate(trajectories):
        tokens, scores = torch.cat([t.prompt, t.output]), {}
        for _, _, seen, committed in slow_states(policy, t):
            log_pi = slow_log_policy(policy, slow_logits(policy, seen), temperature)
            scores |= {p: log_pi[p, tokens[p]] for p in committed}
        slow = torch.stack([scores[p] for p in sorted(scores)])
        for logp in [t.logp] if packed is None else [t.logp, packed[i]]:
            assert logp.shape == slow.shape and (logp - slow).abs().max() < 1e-4


def prompts_of_every_remainder(policy, n=None):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 200, (length,), generator=g).tolist() for length in range(1, (n or 2 * policy.B + 1) + 1)]


def rollouts(policy, *argv, n=None, greedy=False):
    c = flags("--max-new-tokens", 13, "--threshold", 0.5, "--block-size", policy.B, *argv)
    prompts = prompts_of_every_remainder(policy, n)
    return c, dirl.decode(policy, prompts, [(0, "test", 0, i, 0) for i in range(len(prompts))], c, greedy)


def dense(row, B):
    """Who sees whom in a row: bool [N, N]."""
    i = torch.arange(len(row["ids"]))
    return dirl.mask_mod(row["doc"], row["view"], row["pos"] // B)(0, 0, i[:, None], i)


def gradient(model, value):
    """Of all parameters, in one vector."""
    parameters = list(model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)])


def relative(a, b):
    return float((a - b).norm() / b.norm())


def rows_of(policy, documents, max_tokens):
    lengths = [len(d["ids"]) for d in documents]
    return dirl.make_rows(policy, lengths, documents.__getitem__, SimpleNamespace(max_tokens=max_tokens))


def documents_of(policy, trajectories):
    return [dirl.trajectory_document(t.prompt, t.output, t.steps, policy.B, policy.mask_id) for t in trajectories]


# ---- Eq. 1-2, Fig. 4b: mask and layout ------------------------------------------------------------------------

def test_mask_is_the_picture_of_fig_4b():
    """B = 2; a prompt block 0 and two output blocks, each with one noisy view; blocks see columns marked x."""
    picture = """
        clean0 clean1 clean2 noisy1 noisy2
        x . . . .
        x x . . .
        x x x . .
        x . . x .
        x x . . x"""
    blocks = torch.tensor([[c == "x" for c in line.split()] for line in picture.strip().splitlines()[1:]])
    expected = blocks.repeat_interleave(2, 0).repeat_interleave(2, 1)
    d = dirl.layout(torch.arange(6), torch.tensor([1, 2]), torch.full((2, 2), 9), 2) | {"reads": torch.tensor([6])}
    assert d["ids"].tolist() == [0, 1, 2, 3, 4, 5, 9, 9, 9, 9] and d["pos"].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    row = dirl.join([d, d], length=24)
    assert row["reads"].tolist() == [6, 16] and row["view"].max() == 4 and len(row["ids"]) == 24
    mask = dense(row, 2)
    assert torch.equal(mask[:20, :20], torch.block_diag(expected, expected))
    assert not mask[:20, 20:].any() and not mask[20:, :20].any() and mask.any(1).all()     # padding sees padding, and some

    # two views of one block do not see each other
    d = dirl.layout(torch.arange(4), torch.tensor([1, 1]), torch.full((2, 2), 9), 2) | {"reads": torch.tensor([4])}
    assert dense(dirl.join([d]), 2)[4:].int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2 + [[1, 1, 0, 0, 0, 0, 1, 1]] * 2


def random_trajectory(g, P, L, B):
    """(prompt, output, step map) with random tokens below 200 and, in each block, steps 1 to at most B."""
    prompt, output = torch.randint(0, 200, (P,), generator=g), torch.randint(0, 200, (L,), generator=g)
    steps = torch.zeros(L, dtype=torch.long)
    for k in range(P // B, (P + L) // B):
        block = steps[max(0, k * B - P):(k + 1) * B - P]
        block[:] = torch.randint(0, B, block.shape, generator=g).unique(return_inverse=True)[1] + 1      # no step commits nothing
    return prompt, output, steps


def slow_noise(tokens, P, u, z, B, mask_id):
    """Eq. 3's forward process: of every block from P // B on its t, and the sequence up to this block as the model sees it."""
    for i, k in enumerate(range(P // B, len(tokens) // B)):
        t, seen = 1e-3 + (1 - 1e-3) * float(u[i]), tokens[:(k + 1) * B].clone()          # b_t^k after the clean b^{<k}
        for j in range(B):
            if k * B + j >= P and z[i, j] < t:
                seen[k * B + j] = mask_id
        yield t, seen


@pytest.mark.parametrize("B", [1, 2, 4])
def test_every_token_sees_its_sequence_exactly_as_it_stood(B):
    """Brute force over random rows: what a token of block k sees, ordered by position, spells block 0 to k of its
    own document at its own moment, each position once. Token ids say which document they are of."""
    g, mask_id = torch.Generator().manual_seed(B), 10**6
    for _ in range(4):
        documents, moments = [], []                                 # moments: for each token of the row, what it sees
        for d in range(4):
            P, blocks = int(torch.randint(1, 3 * B + 1, (), generator=g)), int(torch.randint(1, 5, (), generator=g))
            prompt, output, steps = random_trajectory(g, P, (P // B + blocks) * B - P, B)
            tokens = torch.cat([prompt, output]) + 1000 * d
            moments += [tokens[:(p // B + 1) * B] for p in range(len(tokens))]
            if d % 2:                                               # a trajectory
                t = SimpleNamespace(prompt=tokens[:P], output=tokens[P:], steps=steps)
                states = [seen for _, _, seen, _ in slow_states(SimpleNamespace(B=B, mask_id=mask_id), t)]
                documents.append(dirl.trajectory_document(t.prompt, t.output, steps, B, mask_id))
            else:                                                   # an SFT example
                noise = torch.rand(blocks, generator=g), torch.rand(blocks, B, generator=g)
                states = [seen for _, seen in slow_noise(tokens, P, *noise, B, mask_id) if mask_id in seen]
                documents.append(dirl.noised_document(tokens, P, *noise, B, mask_id))
            moments += [seen for seen in states for _ in range(B)]
        row = dirl.join(documents, length=len(moments) + 7)
        mask = dense(row, B)
        for q, expected in enumerate(moments):
            pos, order = row["pos"][mask[q]].sort(stable=True)
            assert pos.tolist() == list(range(len(expected))) and torch.equal(row["ids"][mask[q]][order], expected)
        assert not mask[len(moments):, :len(moments)].any() and mask.any(1).all()


def test_block_mask_is_the_mask_and_attention_agrees_under_it():
    from torch.nn.attention.flex_attention import flex_attention
    g, N = torch.Generator().manual_seed(0), 2304
    first = torch.arange(124), torch.arange(132), torch.ones(132, dtype=torch.long)        # has a tile that lacks 16 pairs
    trajectories = [first] + [random_trajectory(g, P, L, 4) for P, L in ((300, 200), (5, 23), (130, 46), (9, 51))]
    row = dirl.join([dirl.trajectory_document(*t, 4, 999) for t in trajectories], length=N)
    sees = dirl.mask_mod(row["doc"], row["view"], row["pos"] // 4)
    mask, blocks = dense(row, 4), dirl.block_mask(sees, N, "cpu")
    assert torch.equal(blocks.mask_mod(0, 0, torch.arange(N)[:, None], torch.arange(N)), mask)
    visible = mask.view(18, 128, 18, 128).sum((1, 3))               # pairs of a tile
    partial, full = (visible > 0) & (visible < 128 * 128), visible == 128 * 128
    for expected, number, index in ((partial, blocks.kv_num_blocks[0, 0], blocks.kv_indices[0, 0]),
                                    (full, blocks.full_kv_num_blocks[0, 0], blocks.full_kv_indices[0, 0])):
        listed = [[i, j] for i in range(18) for j in index[i, :number[i]].tolist()]
        assert listed and sorted(listed) == expected.nonzero().tolist()      # each once, none masked needlessly or for nothing
    assert (visible == 0).any() and (visible == 128 * 128 - 16).any()
    q, k, v = torch.randn(3, 1, 2, N, 8, generator=g)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    assert (flex_attention(q, k, v, block_mask=blocks) - expected).abs().max() < 1e-4
    doc, pos = torch.tensor([0] * 127 + [1] * 2 + [2] * 127), torch.cat([torch.arange(n) for n in (127, 2, 127)])
    alone = dirl.block_mask(dirl.mask_mod(doc, torch.zeros_like(doc), pos), 256, "cpu")     # B = 1: a tile of one visible pair
    assert alone.kv_num_blocks[0, 0].tolist() == [1, 2] and alone.full_kv_num_blocks.sum() == 0
    small = dirl.block_mask(sees, N, "cpu", tile=64)
    assert small.BLOCK_SIZE == (64, 64) and small.to_dense().shape[-2:] == (36, 36)
    assert small.kv_indices.dtype == small.kv_num_blocks.dtype == torch.int32                  # the kernels want them so
    strips = []                                                     # in memory: a tile of queries at a time, against all keys
    meta = dirl.block_mask(lambda b, h, q, kv: (strips.append(q.shape), q >= kv)[1], 256, "meta")
    assert meta.kv_num_blocks.device.type == "meta" and strips == [(128, 1)] * 2


def test_pack_fills_rows_and_leaves_the_long_alone():
    lengths = [3, 9, 4, 20, 6, 1]
    rows = dirl.pack(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(6)) and [3] in rows
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows if row != [3]) and len(rows) == 4
    assert dirl.pack([], 10) == []


# ---- Eq. 2: log-probabilities ---------------------------------------------------------------------------------

def test_log_probs_in_chunks_equal_the_whole_softmax(monkeypatch):
    torch.manual_seed(0)
    log_policy, rows = dirl.log_policy, []
    monkeypatch.setattr(dirl, "log_policy", lambda logits, *more: (rows.append(len(logits)), log_policy(logits, *more))[1])
    hidden, weight = torch.randn(37, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target = torch.randint(0, 10, (37,))
    plain = torch.log_softmax((hidden @ weight.T)[:, :10] / 0.7, -1)                    # 10 is the mask token
    logp, entropy = dirl.log_probs(hidden, weight, target, 0.7, 10, chunk=5)
    assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), atol=1e-5) and not entropy.requires_grad
    plain, coefficient = plain[range(37), target], torch.randn(37)
    assert torch.allclose(logp, plain, atol=1e-6)
    fast, slow = (torch.autograd.grad((coefficient * x).sum(), (hidden, weight)) for x in (logp, plain))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fast, slow))
    assert sorted(rows) == [2] * 2 + [5] * 14                       # never more logits at a time; the backward makes them again
    rows.clear()
    torch.autograd.grad(dirl.log_probs(hidden, weight, target, 0.7, 10, chunk=37)[0].sum(), hidden)
    assert rows == [37]                                             # but not those of a single chunk
    logits = torch.randn(2, 3, 7).bfloat16()                        # at least float32, and float64 stays
    assert dirl.log_policy(logits, 1.0, 6).dtype == torch.float32
    assert dirl.log_policy(logits.double(), 1.0, 6).dtype == torch.float64
    assert (dirl.log_policy(logits, 1.0, 6)[..., 6] == -torch.inf).all()


# ---- Eq. 3: SFT -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("B", [1, 2, 4, 8])
def test_sft_loss_equals_a_transcription_of_eq_3(policies, B):
    policy, total, documents, answer_tokens, g = policies(B), 0.0, [], 0, torch.Generator().manual_seed(B)
    for P in range(1, B + 2):                                      # prompts of every remainder
        tokens = torch.randint(0, 200, ((P + 2 * B) // B * B,), generator=g)
        K = len(tokens) // B - P // B
        noise = torch.rand(K, generator=g), torch.rand(K, B, generator=g)
        documents.append(dirl.noised_document(tokens, P, *noise, B, policy.mask_id))
        answer_tokens += len(tokens) - P
        for t, seen in slow_noise(tokens, P, *noise, B, policy.mask_id):                 # Σ_k
            log_pi, masked = slow_log_policy(policy, slow_logits(policy, seen)), seen == policy.mask_id
            total = total - log_pi[masked, tokens[:len(seen)][masked]].sum() / t         # Σ_j 1[MASK] CE
    rows = rows_of(policy, documents, 60)
    loss = sum(dirl.sft_loss(policy.score(row)[0], row["w_t"], answer_tokens) for row in rows)
    slow, fast = gradient(policy.model, total / answer_tokens), gradient(policy.model, loss)
    assert torch.isclose(loss, total / answer_tokens, rtol=1e-4) and relative(fast, slow) < 1e-4


def test_blocks_of_one_token_are_a_causal_model(policies):
    """B = 1: the clean copy is transformers' own causal forward, and the view of token i is the last row of that forward
    on x_<i and one [MASK]; the position predicts itself."""
    policy = policies(1)
    prompt, output, steps = random_trajectory(torch.Generator().manual_seed(3), 4, 9, 1)
    tokens, mask_token = torch.cat([prompt, output]), torch.tensor([policy.mask_id])
    row = dirl.join([dirl.trajectory_document(prompt, output, steps, 1, policy.mask_id)])
    with torch.no_grad():
        ours = policy.model.lm_head(policy.hidden(row["ids"][None], row["pos"][None], dense(row, 1)[None, None])[0])
        logp, _ = policy.score(row)
        causal = slow_logits(policy, tokens, "sdpa")
        masked = torch.stack([slow_logits(policy, torch.cat([tokens[:i], mask_token]), "sdpa")[-1] for i in range(4, 13)])
    assert len(ours) == 13 + 9 and (ours - torch.cat([causal, masked])).abs().max() < 1e-4
    assert (logp - slow_log_policy(policy, masked)[range(9), output]).abs().max() < 1e-4


@pytest.mark.parametrize("P", [3, 4])
def test_sft_loss_averaged_over_t_and_all_masks_is_the_nelbo(P):
    """E over t and masks of Eq. 3, by enumeration of the masks and quadrature in t, is the mean over all orders of
    -log Π_j p(x_σ(j) | x_σ(<j)): a mask of m of B tokens weighs ∫ t^m (1-t)^(B-m) / t dt = 1/m of 1 / (B over m)."""
    import numpy
    policy, tokens, n = toy_policy(), torch.tensor([0, 2, 1, 1, 0, 2]), 6 - P

    def cross_entropy(hidden):
        """Of each hidden token, given the prompt, and the rest of the block."""
        log_pi = toy_log_pi(policy, tokens.index_fill(0, torch.tensor(hidden), 3))
        return {p: -log_pi[p - 3, tokens[p]] for p in hidden}
    orders = list(itertools.permutations(range(P, 6)))
    nelbo = sum(cross_entropy(order[i:])[order[i]] for order in orders for i in range(n)) / len(orders)
    patterns = [hidden for m in range(1, n + 1) for hidden in itertools.combinations(range(P, 6), m)]
    nodes, shares = (torch.tensor(x) for x in numpy.polynomial.legendre.leggauss(8))     # exact to degree 15 on [-1, 1]

    def averaged(times):
        total = 0.0
        for (t, share), hidden in itertools.product(zip(times, shares / 2), patterns):
            z = torch.ones(1, 3).index_fill(1, torch.tensor(hidden) - 3, -1.0)           # hidden, whatever t
            row = dirl.join([dirl.noised_document(tokens, P, (t[None] - 1e-3) / (1 - 1e-3), z, 3, 3)])
            loss = dirl.sft_loss(policy.score(row)[0], row["w_t"], answer_tokens=1)
            total = total + share * t**len(hidden) * (1 - t)**(n - len(hidden)) * loss
        return total
    by_weights = sum(sum(cross_entropy(p).values()) / len(p) / math.comb(n, len(p)) for p in patterns)
    by_quadrature = averaged((nodes + 1) / 2)
    assert torch.isclose(by_weights, nelbo, rtol=1e-12) and torch.isclose(by_quadrature, nelbo, rtol=1e-12)
    assert relative(gradient(policy.model, by_quadrature), gradient(policy.model, nelbo)) < 1e-12
    clipped = averaged(1e-3 + (1 - 1e-3) * (nodes + 1) / 2)         # what t >= 1e-3 costs
    assert 1e-6 < abs(clipped / nelbo - 1) < 2e-3


def test_noise_and_views_of_an_sft_example():
    tokens, B, P = torch.arange(12), 4, 5
    d = dirl.noised_document(tokens, P, torch.tensor([0.5, 1.0]), torch.tensor([[0.0] * 4, [0.6] * 4]), B, 99)
    assert d["ids"].tolist() == [*range(12), 4, 99, 99, 99, 99, 99, 99, 99]     # prompt token 4 stays clean
    assert d["target"].tolist() == [5, 6, 7, 8, 9, 10, 11] and d["reads"].tolist() == [13, 14, 15, 16, 17, 18, 19]
    assert torch.allclose(d["w_t"], 1 / torch.tensor([0.5005] * 3 + [1.0] * 4))
    z = torch.tensor([[0.01] * 4, [0.9, 0.1, 0.9, 0.9]])
    d = dirl.noised_document(tokens, P, torch.tensor([0.0, 0.5]), z, B, 99)
    assert d["ids"].tolist() == [*range(12), 8, 99, 10, 11] and d["target"].tolist() == [9]
    assert d["pos"].tolist()[12:] == [8, 9, 10, 11]                # a block without a masked token has no view
    half = torch.tensor([0.5, 0.5])
    for less, n in ((0, 0), (1e-4, 7)):                             # z < t, not =; and t is not u
        z = (1e-3 + (1 - 1e-3) * half - less)[:, None].expand(2, 4)
        assert len(dirl.noised_document(tokens, P, half, z, B, 99)["target"]) == n


def test_example_ends_with_the_end_token_and_fills_its_block(policies):
    policy = policies(4)
    for text in ("", "1", "12", "123", "1234"):
        tokens, P = policy.example([{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}])
        tail = tokens[P + len(text):].tolist()
        assert len(tokens) % 4 == 0 and len(tail) <= 4 and tail[0] == policy.end_id and set(tail[1:]) <= {policy.eos_id}
        texts = [policy.tokenizer.decode(x) for x in (tokens[:P], tokens[P:P + len(text)])]
        assert texts == ["<|user|>hi<|im_end|><|assistant|>", text]


# ---- section 3.2: one forward scores a trajectory --------------------------------------------------------------

RULES = [("static", 1), ("static", 2), ("dynamic", 1), ("sequential", 1), ("sequential", 2)]


@pytest.mark.parametrize("B, rule, per_step", [
    (1, "static", 1), (2, "static", 1), (2, "dynamic", 1), (4, "static", 2), (4, "dynamic", 1), (4, "sequential", 1),
    (8, "dynamic", 1), (8, "sequential", 2)])
def test_packed_scores_equal_step_by_step_scores(policies, B, rule, per_step):
    policy = policies(B)
    for confidence in ("top1", "drawn"):
        c, trajectories = rollouts(policy, "--unmask", rule, "--tokens-per-step", per_step, "--confidence", confidence)
        documents = documents_of(policy, trajectories)
        for t, d in zip(trajectories, documents):
            S, views = len(t.prompt) + len(t.output), len(list(slow_states(policy, t)))
            assert S % B == 0 and len(d["ids"]) == S + B * views and len(d["reads"]) == len(t.output)
            assert t.decoding_steps == views
        rows = rows_of(policy, [d | {"at": torch.full_like(d["target"], i)} for i, d in enumerate(documents)], 60)
        assert len(rows) > 1
        packed = {}
        for row in rows:
            logp, _ = policy.score(row)
            packed |= {i: logp[row["at"] == i] for i in row["at"].unique().tolist()}
        assert_replay(policy, trajectories, packed)


@pytest.mark.parametrize("rule, per_step", RULES)
@pytest.mark.parametrize("confidence", ["top1", "drawn"])
def test_step_maps_follow_the_unmasking_rule(policies, rule, per_step, confidence):
    policy, several = policies(4), 0
    c, trajectories = rollouts(policy, "--unmask", rule, "--tokens-per-step", per_step, "--confidence", confidence, greedy=True)
    for t in trajectories:
        tokens = torch.cat([t.prompt, t.output])
        for k, s, seen, committed in slow_states(policy, t):
            masked = [p for p in range(k * 4, k * 4 + 4) if seen[p] == policy.mask_id]
            top = slow_log_policy(policy, slow_logits(policy, seen).detach()).max(-1)
            assert all(tokens[p] == top.indices[p] for p in committed)          # greedy
            ordered = sorted(masked, key=lambda p: p if rule == "sequential" else -top.values[p].item())
            sure = [p for p in masked if float(top.values[p].exp()) >= 0.5]
            assert committed == (sure or ordered[:1] if rule == "dynamic" else sorted(ordered[:per_step]))
            several += len(committed) > 1
    assert several or (rule != "dynamic" and per_step == 1)


def test_drawn_confidence_looks_at_the_drawn_token():
    top1, drawn = torch.tensor([[0.6, 0.9]]).log(), torch.tensor([[0.6, 0.1]]).log()
    at = float(top1[0, 1].exp())                                    # dynamic: at >= threshold
    for rule, threshold, confidence, expected in (
            ("static", 0.9, "top1", [0, 1]), ("static", 0.9, "drawn", [1, 0]), ("sequential", 0.9, "top1", [1, 0]),
            ("dynamic", 0.6, "top1", [1, 1]), ("dynamic", 0.95, "top1", [0, 1]), ("dynamic", at, "top1", [0, 1]),
            ("dynamic", 0.5, "drawn", [1, 0])):
        for masked in (1, 0):
            new = dirl.unmask(top1, drawn, torch.tensor([[masked, masked]]).bool(), rule, 1, threshold, confidence)
            assert new.int().tolist() == [[x * masked for x in expected]]
    tied = torch.zeros(1, 300), torch.zeros(1, 300), torch.ones(1, 300, dtype=torch.bool)        # of equals the leftmost
    assert dirl.unmask(*tied, "static", 3, 0.9, "top1")[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert dirl.unmask(*(x.to("meta") for x in tied), "sequential", 3, 0.9, "top1").device.type == "meta"


def test_draw_inverts_the_distribution():
    log_pi, u = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]).log(), (torch.arange(1000) + 0.5) / 1000
    assert dirl.draw(log_pi.expand(1000, 5), u).bincount(minlength=5).tolist() == [100, 0, 600, 300, 0]
    assert dirl.draw(torch.tensor([0.2, 0.3, 0.5]).log().expand(1000, 3), u).bincount().tolist() == [200, 300, 500]
    assert dirl.draw(torch.tensor([0.5, 0.4]).log(), torch.tensor(0.95)) == 1           # π that does not sum to 1
    log_pi, u = torch.tensor([-1e-9, -20.7], dtype=torch.float64), torch.tensor(1 - 5e-10, dtype=torch.float64)
    assert dirl.draw(log_pi, u) == 1                                # float64 stays what it is


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 24), (torch.float64, 53)])
def test_draw_stays_on_tokens_that_have_a_probability(dtype, digits):
    """At both ends of [0, 1), whatever rounding makes of the sum of π, and wherever tokens of π = 0 stand."""
    g, ends = torch.Generator().manual_seed(0), torch.tensor([0.0, 2.0**-149, 0.5, 1 - 2.0**-digits], dtype=dtype)
    sums = set()
    for vocab, sharp in itertools.product((2, 3, 7, 262, 5000), (0.1, 1.0, 10.0, 60.0)):
        logits = sharp * torch.randn(50, vocab, generator=g, dtype=dtype)
        logits[torch.rand(50, vocab, generator=g) < torch.rand(50, 1, generator=g)] = -torch.inf
        logits[::3, 0] = logits[1::3, -1] = -torch.inf
        log_pi = logits[logits.isfinite().any(1)].log_softmax(-1)
        u = torch.cat([ends, torch.rand(60, generator=g, dtype=dtype)])
        tokens = dirl.draw(log_pi[:, None].expand(-1, 64, -1), u.expand(len(log_pi), -1))
        assert 0 <= tokens.min() and tokens.max() < vocab and (log_pi.gather(1, tokens).exp() > 0).all()
        assert torch.equal(tokens[:, 0], (log_pi.exp() > 0).int().argmax(1))            # u = 0: the first of them
        sums |= {(float(x) > 1) - (float(x) < 1) for x in log_pi.exp().cumsum(-1)[:, -1]}
    assert sums == {-1, 0, 1}
    for more in range(-100, 100):                                   # the last token is the last
        log_pi = torch.tensor([0.5, 0.5 + more * 2.0**-(digits - 2)], dtype=dtype).log()
        assert dirl.draw(log_pi, ends[-1]) == 1


def test_decoding_ends_after_the_first_block_with_a_stop_token_or_at_max_new_tokens(policies):
    policy, stopped = copy.copy(policies(4)), 0
    policy.stop_ids = torch.tensor([7, *range(20, 50)])             # likely ones, some of them in the prompts too
    prompts = prompts_of_every_remainder(policy)
    for max_new in (1, 6, 13):
        made = dirl.decode(policy, prompts, [(3, i) for i in range(len(prompts))], flags("--max-new-tokens", max_new))
        for t, prompt in zip(made, prompts, strict=True):
            L, output = len(t.output), t.output.tolist()
            is_stop = [x in policy.stop_ids.tolist() for x in output]
            assert t.prompt.tolist() == prompt and (len(prompt) + L) % 4 == 0 and policy.mask_id not in output
            assert any(is_stop) or L >= max_new
            assert L - 4 < max_new and not any(is_stop[:max(0, L - 4)])                  # not a block more than was asked
            assert t.stopped == any(is_stop[:max_new])
            assert t.answer.tolist() == output[:is_stop.index(True) if t.stopped else max_new]
            assert len(t.steps) == len(t.logp) == L and (t.steps > 0).all()
            stopped += t.stopped
    assert stopped


def test_a_sample_depends_on_its_key_alone(policies):
    """Not on the batch, --slots, the order, or torch's own generator."""
    policy, c = policies(4), flags("--max-new-tokens", 13, "--threshold", 0.5)
    prompts, keys = prompts_of_every_remainder(policy), [(0, i) for i in range(9)]
    expected = [(t.output.tolist(), t.steps.tolist()) for t in dirl.decode(policy, prompts, keys, c)]
    for slots in (1, 2, 7):
        torch.manual_seed(slots)
        state = torch.get_rng_state()
        made = dirl.TorchEngine(policy, changed(c, slots=slots)).generate(prompts[::-1], keys[::-1])
        assert torch.equal(torch.get_rng_state(), state)
        assert [(t.output.tolist(), t.steps.tolist()) for t in made[::-1]] == expected
    same = dirl.decode(policy, [prompts[5]] * 9, [(1, i) for i in range(8)] + [(1, 0)], c)
    assert len({tuple(t.output.tolist()) for t in same}) == 8 and same[0].output.tolist() == same[8].output.tolist()


@pytest.mark.parametrize("B", [1, 4])
def test_decoding_takes_one_pass_a_step_one_a_whole_block_and_one_for_the_prompts(policies, B):
    policy, passes = copy.copy(policies(B)), []

    def hidden(ids, pos, mask, cache=None):
        passes.append(tuple(ids.shape))
        return dirl.Policy.hidden(policy, ids, pos, mask, cache)
    policy.hidden = hidden
    c, prompts = flags("--block-size", B, "--max-new-tokens", 14, "--threshold", 0.5), prompts_of_every_remainder(policy)
    for batch in (prompts, *([prompt] for prompt in prompts)):
        passes.clear()
        made = dirl.decode(policy, batch, [(4, i) for i in range(len(batch))], c)
        expected = [(len(batch), max(1, len(batch[-1]) // B) * B)]
        steps = [torch.cat([torch.zeros_like(t.prompt), t.steps]).view(-1, B).amax(1)[len(t.prompt) // B:] for t in made]
        for k in range(max(map(len, steps))):
            live = [x for x in steps if len(x) > k]
            expected += [(len(live), B)] * int(max(x[k] for x in live))
            expected += [(n, B) for n in [sum(len(x) > k + 1 for x in steps)] if n]
        assert passes == expected
        assert_replay(policy, made)


# ---- Eq. 4-8 ---------------------------------------------------------------------------------------------------

def J_of(name, logp, old, A, w, view, eps=0.2, eps_high=0.2):
    """(J, where the clip acts) of an objective; Eq. 8 alone wants the views."""
    return getattr(dirl, name)(logp, old, A, w, eps, eps_high, *[view] * (name == "eq8"))


@pytest.mark.parametrize("name", ["eq6", "eq7", "eq8"])
@pytest.mark.parametrize("count", ["steps", "tokens"])
def test_objectives_equal_transcriptions_with_loops(name, count):
    """Two groups of three trajectories, each a list of decoding steps, each a list of (log π_θ, log π_old)."""
    g, lengths = torch.Generator().manual_seed(5), [[[1, 2, 1], [3], [2, 2]], [[1], [1, 1, 1, 4], [2]]]
    groups = [[[(-1.5 * torch.rand(n, 2, generator=g)).tolist() for n in steps] for steps in group] for group in lengths]
    rewards, eps, eps_high, J, hits = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]], 0.2, 0.3, 0.0, []
    sizes = [[len(steps) if count == "steps" else sum(steps) for steps in group] for group in lengths]
    for group, size, r in zip(groups, sizes, rewards):
        for i, trajectory in enumerate(group):
            A, normaliser = r[i] - sum(r) / len(r), 1 / size[i] if name == "eq6" else 1 / sum(size)
            for step in trajectory:
                ratios = [math.exp(new - old) for new, old in step]
                for ratio in [math.prod(ratios)] if name == "eq8" else ratios:
                    C = min(ratio * A, min(max(ratio, 1 - eps), 1 + eps_high) * A)
                    J += normaliser * C / len(groups)
                    hits.append(C < ratio * A - 1e-9)
    assert any(hits) and not all(hits)
    A, w = dirl.advantage(torch.tensor(rewards)), dirl.trajectory_weights(torch.tensor(sizes), name)
    every_step = [(step, A[i, j], w[i, j]) for i, g in enumerate(groups) for j, trajectory in enumerate(g) for step in trajectory]
    columns = [(new, old, a, b, view) for view, (step, a, b) in enumerate(every_step) for new, old in step]
    fast, clipped = J_of(name, *(torch.tensor(x) for x in zip(*columns)), eps, eps_high)
    assert abs(float(fast) - J) < 1e-6 and clipped.tolist() == hits
    J, clipped = J_of(name, *[torch.zeros(0)] * 4, torch.zeros(0, dtype=torch.long))
    assert J == 0 and len(clipped) == 0                             # a row without a place to read


def test_on_policy_all_objectives_have_the_gradient_of_reinforce():
    """At θ = θ_old and without a KL term: Σ w A ∇log π, whether the ratio is a token's or a step's."""
    logp = torch.randn(6, requires_grad=True)
    A, w, view = torch.randn(6)[[0, 0, 0, 1, 1, 2]], torch.rand(6)[[0, 0, 0, 1, 1, 2]], torch.tensor([0, 0, 1, 2, 2, 3])
    reinforce = torch.autograd.grad((w * A * logp).sum(), logp)[0]
    for name, old in (("eq6", logp.detach()), ("eq7", None), ("eq7", logp.detach()), ("eq8", None), ("eq8", logp.detach())):
        fast, clipped = J_of(name, logp, old, A, w, view)
        assert torch.allclose(torch.autograd.grad(fast, logp)[0], reinforce) and not clipped.any()


@pytest.mark.parametrize("name", ["eq6", "eq7", "eq8"])
def test_the_clip_acts_on_the_side_where_more_would_be_gained(name):
    """(ratio, A, whether C_ε holds): its gradient is w ρ A where it does not hold, else 0, and the value is w A times the
    ratio, or the bound. In Eq. 8 the ratio is that of two tokens, and neither is beyond the bounds alone."""
    for ratio, A, held in ((1.5, 2.0, True), (1.5, -2.0, False), (0.5, 2.0, False), (0.5, -2.0, True),
                           (1.25, 2.0, False), (0.85, -2.0, False), (1.35, 2.0, True), (0.75, -2.0, True)):
        n, eps, eps_high, w = 2 if name == "eq8" else 1, 0.2, 0.3, 0.7
        one = torch.ones(n, dtype=torch.float64)
        logp = (-1.3 * one + math.log(ratio) / n).requires_grad_()
        J, clipped = J_of(name, logp, -1.3 * one, A * one, w * one, torch.zeros(n, dtype=torch.long), eps, eps_high)
        bound = 1 + eps_high if ratio > 1 else 1 - eps
        assert clipped.tolist() == [held] and math.isclose(float(J.detach()), w * A * (bound if held else ratio), rel_tol=1e-12)
        expected = one * (0.0 if held else w * A * ratio)
        assert torch.allclose(torch.autograd.grad(J, logp)[0], expected, rtol=1e-12, atol=0)


def test_advantage():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [2.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(dirl.advantage(r), r - 0.5)
    assert torch.allclose(dirl.advantage(r, True)[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert torch.equal(dirl.advantage(r, True)[1], torch.zeros(4))


def test_unbiased_kl_term():
    torch.manual_seed(0)
    theta, ref = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    log_pi, log_ref = theta.log_softmax(0), ref.log_softmax(0)
    k3 = (log_ref - log_pi).exp() - 1 - (log_ref - log_pi)                       # without the factor before it
    assert torch.allclose(dirl.kl_term(log_pi, log_ref), k3) and (k3 >= 0).all()   # a token's value is k3's
    # E over tokens from π_θ
    expected, plain = ((log_pi.exp().detach() * x).sum() for x in (dirl.kl_term(log_pi, log_ref), k3))
    exact, reverse = (log_pi.exp() * (log_pi - log_ref)).sum(), (log_ref.exp() * (log_ref - log_pi)).sum()
    ours, right, k3s, wrong = (torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (expected, exact, plain, reverse))
    assert torch.allclose(exact, expected) and torch.allclose(exact, plain)                  # the value is the same
    assert torch.allclose(ours, right) and torch.allclose(k3s, wrong)            # k3's own gradient: of KL(π_ref‖π_θ)
    off, ours_off = relative(k3s, right), relative(ours, right)
    print(f"k3 alone: its expected gradient is {off:.2f} off, relative; with π_θ/sg[π_θ] before it {ours_off:.1e}")
    assert off > 0.1


@pytest.mark.parametrize("objective", ["eq6", "eq7", "eq8"])
def test_gradient_does_not_depend_on_max_tokens_nor_on_checkpointing(policies, objective):
    policy, gradients = copy.deepcopy(policies(4)), []
    c, flat = rollouts(policy, "--objective", objective, n=8)
    groups = [dirl.Group(flat[:4], None, [1.0, 0.0, 0.0, 0.5]), dirl.Group(flat[4:], None, [0.0, 1.0, 1.0, 1.0])]
    for max_tokens, checkpointing in ((1, False), (150, False), (10**6, False), (10**6, True)):
        if checkpointing:
            policy.model.activation_checkpointing_enable({"use_reentrant": False})
        (rows, _), J = dirl.dipo_rows(policy, changed(c, max_tokens=max_tokens), groups), 0.0
        for row in rows:
            old, view = row["logp_sampler"] if objective == "eq6" else None, row["view"][row["reads"]] - 1
            J = J + J_of(objective, policy.score(row)[0], old, row["A"], row["w"], view)[0]
        gradients.append(gradient(policy.model, J))
        assert len(rows) == {1: 8, 10**6: 1}.get(max_tokens, len(rows))
    assert all(relative(g, gradients[0]) < 1e-5 for g in gradients[1:])
    assert policy.model.training and torch.allclose(*gradients[2:], atol=5e-9)
    _, again = rollouts(policy, n=8)                                # and the sampler's cache still works
    assert all(torch.equal(a.output, b.output) for a, b in zip(flat, again))


def test_dynamic_sampling_drops_exactly_the_flat_groups(policies, monkeypatch, tmp_path):
    policy, coin, trained = policies(4), itertools.cycle((1.0, 0.0)), []
    c = flags("--prompts", 3, "--group-size", 4, "--max-new-tokens", 4, "--steps", 2, "--out", tmp_path)
    monkeypatch.setattr(dirl, "MAX_ROUNDS", 3)
    monkeypatch.setattr(dirl, "save", lambda *args: None)

    def train_on(policy, reference, optimizer, c, mixed, step):
        trained.append([int(group.trajectories[0].prompt[0]) - 1 for group in mixed])
        return {"logp_gap": None}
    monkeypatch.setattr(dirl, "train_on", train_on)
    records = [(str(i), "mixed" if i in (1, 4, 5, 8) else "flat") for i in range(20)]
    monkeypatch.setattr(dirl, "encode", lambda policy, c, record: dirl.Problem([int(record[0]) + 1] * 5, record[1], ""))
    monkeypatch.setattr(dirl, "order", lambda n, *key: range(n))
    walk = dirl.Walk(policy, c, "", records)
    dirl.train_rl(policy, None, dirl.TorchEngine(policy, c), c, walk,
                  lambda answer, truth: next(coin) if truth == "mixed" else 1.0, [])
    assert trained == [[1, 4, 5], [8]]                              # of 6 problems in two rounds, and of 3 + 2 + 2 in three
    assert walk.position == 6 + 7 and [x["groups_dropped"] for x in lines_of(tmp_path, "rl.metrics.jsonl")] == [3, 6]


# ---- what "unbiased" means: the gradient, by enumerating every trajectory ----------------------------------------

class Toy(torch.nn.Module):
    """One attention layer in float64 with the interface that Policy uses; 3 tokens and [MASK] = 3."""
    def __init__(self, seed):
        super().__init__()
        g, self.device = torch.Generator().manual_seed(seed), torch.device("cpu")
        shapes = {"token": (4, 8), "place": (6, 8), "q": (8, 8), "k": (8, 8), "v": (8, 8), "up": (8, 16), "down": (16, 8)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(0.8 * torch.randn(shape, generator=g, dtype=torch.float64)))
        self.lm_head = torch.nn.Linear(8, 4, bias=False, dtype=torch.float64)
        self.lm_head.weight.data = 0.6 * torch.randn(4, 8, generator=g, dtype=torch.float64)

    def base(self, input_ids, position_ids, attention_mask, cache=None, **unused):
        mask = attention_mask["full_attention"]
        x = self.token[input_ids] + self.place[position_ids]
        k, v = (x @ self.k)[:, None], (x @ self.v)[:, None]
        if cache is not None:
            k, v = cache.update(k, v, 0)
        scores = (x @ self.q) @ k[:, 0].transpose(1, 2) / 8**0.5
        x = x + scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ v[:, 0]
        return SimpleNamespace(last_hidden_state=x + torch.tanh(x @ self.up) @ self.down)


def toy_policy():
    return dirl.Policy(Toy(seed=57), None, None, {"block_size": 3, "mask_token_id": 3}, 0, [0], 1.0)


def toy_log_pi(policy, tokens):
    """log π at the second of two blocks of three tokens: [3, vocab]."""
    place = torch.arange(6)
    hidden = policy.hidden(tokens[None], place[None], (place // 3 <= place[:, None] // 3)[None, None])[0, 3:]
    return dirl.log_policy(hidden @ policy.model.lm_head.weight.T, 1.0, 3)


def every_path(policy, prompt, rule, block, steps, s=1, log_p=0.0):
    """Every way to decode a block from step s on: (probability, output, step map, log-probability of all candidates drawn).
    A path draws a candidate for each masked position at each step; dirl.unmask says which of them are committed."""
    masked = block == 3
    if not masked.any():
        yield log_p.exp(), block, steps, log_p
        return
    log_pi = toy_log_pi(policy, torch.cat([prompt, block]))                                  # [3, vocab]
    for drawn in itertools.product(range(3), repeat=int(masked.sum())):
        token = block.masked_scatter(masked, torch.tensor(drawn))
        log_drawn = log_pi[range(3), token]                                                  # [3]
        new = dirl.unmask(log_pi.max(1).values[None], log_drawn[None], masked[None], *rule)[0]
        after = torch.where(new, token, block), torch.where(new, s, steps), s + 1, log_p + log_drawn[masked].sum()
        yield from every_path(policy, prompt, rule, *after)


def disturbed(policy, noise):
    """Another policy near this one: a sampler that is not the trainer."""
    other, g = copy.deepcopy(policy), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight += noise * torch.randn(weight.shape, generator=g, dtype=weight.dtype)
    return other


@functools.cache
def enumerated(rule):
    """Of each of two prompts: every trajectory, with its probability p (differentiable), the reward, |τ|, its document,
    and `every`, Σ over its paths of p times the log-probability of all candidates drawn, rejected ones too."""
    policy, rewards = toy_policy(), torch.randn(27, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    tables = []
    for prompt in torch.tensor([[0, 2, 1], [1, 1, 2]]):
        found = {}
        for p, output, steps, log_p in every_path(policy, prompt, rule, torch.tensor([3] * 3), torch.tensor([0] * 3)):
            found.setdefault((*output.tolist(), *steps.tolist()), []).append(torch.stack([p, p.detach() * log_p]))
        p, every = torch.stack([sum(paths) for paths in found.values()]).T
        outputs, steps = torch.tensor(list(found)).split(3, 1)
        tables.append(SimpleNamespace(
            p=p, every=every, r=rewards[outputs @ torch.tensor([1, 3, 9])], size=steps.amax(1).double(), steps=steps,
            documents=[dirl.trajectory_document(prompt, *pair, 3, 3) for pair in zip(outputs, steps)]))
        assert abs(float(p.detach().sum()) - 1) < 1e-12
    return policy, tables


def dipo_gradient(policy, tables, coefficients):
    """Gradient of Eq. 8 where trajectory i of a prompt's table enters with a factor: [prompts] of [trajectories]."""
    documents = [d | {"A": torch.ones(3, dtype=torch.float64), "w": factor.expand(3)}
                 for table, factors in zip(tables, coefficients) for d, factor in zip(table.documents, factors)]
    return gradient(policy.model, sum(
        dirl.eq8(policy.score(row)[0], None, row["A"], row["w"], 0.2, 0.2, row["view"][row["reads"]] - 1)[0]
        for row in rows_of(policy, documents, 600)))


def in_groups(table, r, G, objective="eq6", adv_std=False, dropped=False):
    """What a trajectory's factor is in expectation over all groups of G: the batch is every group there can be, each
    with its probability; dropped: flat groups do not count, and the rest makes up for them. [trajectories]"""
    p = table.p.detach()
    groups = torch.cartesian_prod(*[torch.arange(len(p))] * G)                               # [len(p)^G, G]
    P = p[groups].prod(1) * (r[groups].amax(1) > r[groups].amin(1) if dropped else 1)
    P = P / P.sum()
    A = dirl.advantage(r[groups], adv_std)
    w = dirl.trajectory_weights(table.size[groups], objective) * len(groups)        # its mean over groups becomes P
    return torch.zeros_like(p).index_add(0, groups.flatten(), (P[:, None] * A * w).flatten())


def exact_gradient(policy, tables, rewards):
    """Of E[R], summed over the prompts."""
    return gradient(policy.model, sum((t.p * r).sum() for t, r in zip(tables, rewards)))


def bias(estimate, exact):
    """What remains of the exact gradient's norm after the best scaling of the estimate: the sine of their angle."""
    return relative((estimate @ exact) / (estimate @ estimate) * estimate, exact)


TOY_RULES = [("sequential", "top1"), ("static", "top1"), ("dynamic", "top1"), ("static", "drawn"), ("dynamic", "drawn")]


@pytest.mark.parametrize("rule, confidence", TOY_RULES)
def test_unbiased_unless_a_token_is_kept_for_its_own_value(rule, confidence):
    """With a constant baseline and normaliser."""
    policy, tables = enumerated((rule, 1, 0.7, confidence))
    baseline, normaliser, exact = 0.3, 1.7, exact_gradient(policy, tables, [t.r for t in tables])
    committed = normaliser * dipo_gradient(policy, tables, [t.p.detach() * (t.r - baseline) / normaliser for t in tables])
    every = gradient(policy.model, sum((t.every * (t.r - baseline)).sum() for t in tables))
    error, error_of_every = relative(committed, exact), relative(every, exact)
    print(f"{rule}, {confidence}: relative error of the expected gradient {error:.1e}, with rejected candidates scored too "
          f"{error_of_every:.1e}")
    assert error_of_every < 1e-10                                   # scoring rejected candidates too is always exact
    assert error < 1e-10 if confidence == "top1" else error > 0.1
    sizes = {int((steps == s).sum()) for t in tables for steps in t.steps for s in steps}
    assert sizes == ({1, 2, 3} if rule == "dynamic" else {1})


def chi_square(seen, expected, classes=12):
    """How far counts are from the expected ones, in standard deviations; rare classes are one. At least so many classes."""
    seen, expected = torch.as_tensor(seen).double(), expected.double()
    seen, expected = (torch.cat([x[expected >= 5], x[expected < 5].sum()[None]]) for x in (seen, expected))
    rest, freedom = expected[-1] > 1e-9, len(seen) - 2 + int(expected[-1] > 1e-9)
    assert freedom + 1 >= classes and (rest or seen[-1] == 0)
    return float(((seen - expected)**2 / expected)[:len(seen) - 1 + rest].sum() - freedom) / (2 * freedom)**0.5


@pytest.mark.parametrize("rule, confidence", TOY_RULES)
def test_decoding_draws_every_trajectory_as_often_as_it_is_probable(rule, confidence):
    """Outputs and step maps of the sampler against the enumeration: its draws at the positions and steps are independent."""
    (_, tables), policy, n = enumerated((rule, 1, 0.7, confidence)), toy_policy(), 5000
    policy.model.float()
    c = flags("--block-size", 3, "--max-new-tokens", 3, "--unmask", rule, "--threshold", 0.7, "--confidence", confidence)
    for prompt, table in zip(([0, 2, 1], [1, 1, 2]), tables):
        made = dirl.decode(policy, [prompt] * n, [(prompt, i) for i in range(n)], c)
        counts = Counter((*t.output.tolist(), *t.steps.tolist()) for t in made)
        names = [(*d["target"].tolist(), *steps.tolist()) for d, steps in zip(table.documents, table.steps)]
        assert set(counts) <= set(names) and abs(chi_square([counts[x] for x in names], n * table.p.detach(), 6)) < 4


@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("objective", ["eq6", "eq7"])
def test_unbiased_means_up_to_the_group_mean(G, objective):
    """|τ| = 3 always: 1/|τ_i| or 1/Σ|τ_i| is a constant, and a mean that contains r_i leaves (G-1)/G of the gradient."""
    policy, tables = enumerated(("static", 1, 0.7, "top1"))
    estimate = dipo_gradient(policy, tables, [in_groups(t, t.r, G, objective) for t in tables])
    normaliser = {"eq6": 1 / 3, "eq7": 1 / (3 * G)}[objective]      # of each of the G trajectories
    error = relative(estimate, (G - 1) / G * G * normaliser * exact_gradient(policy, tables, [t.r for t in tables]))
    print(f"static, {objective}, G = {G}: relative error against (G-1)/G of the gradient {error:.1e}")
    assert error < 1e-10


def test_unbiased_no_more_where_the_length_depends_on_the_draws():
    """The second prompt takes two decoding steps or three."""
    policy, (one, two) = enumerated(("dynamic", 1, 0.7, "top1"))
    assert set(one.size.tolist()) == {1} and set(two.size.tolist()) == {2, 3}
    exact, p, errors = exact_gradient(policy, [two], [two.r]), two.p.detach(), []
    for name, factors in (("a constant", p * two.r), ("1/|τ_i|, constant baseline", p * (two.r - 0.3) / two.size),
                          *((f"{w}, group mean, G = {G}", in_groups(two, two.r, G, objective))
                            for w, objective in (("1/|τ_i|", "eq6"), ("1/Σ|τ_i|", "eq8")) for G in (2, 4))):
        errors.append(bias(dipo_gradient(policy, [two], [factors]), exact))
        print(f"dynamic, top1, weighted by {name}: relative error after the best scaling {errors[-1]:.1e}")
    constant, eq6, *eq6_groups, eq8_of_two, eq8_of_four = errors
    assert constant < 1e-10 and min(eq6, *eq6_groups, eq8_of_two) > 0.02
    assert eq8_of_four < 0.6 * eq8_of_two                           # the sum over a group hardly depends on one of it


@pytest.mark.parametrize("name", ["--adv-std", "flat groups, same prompt again"])
def test_unbiased_for_another_average_of_the_prompts(name):
    """Right or wrong answers: dividing by the group's standard deviation, and sampling a prompt until its group is mixed, leave
    each prompt's gradient exact in direction and weigh the prompts anew, by their rate of right answers."""
    policy, tables = enumerated(("static", 1, 0.7, "top1"))
    G, real, right, scales = 4, [t.r for t in tables], [(t.r > 0.3).double() for t in tables], []
    options = {"adv_std": True} if name == "--adv-std" else {"dropped": True}

    def estimated(tables, rewards):
        """(DiPO's gradient, the exact one)."""
        factors = [in_groups(t, r, G, "eq8", **options) for t, r in zip(tables, rewards)]
        return dipo_gradient(policy, tables, factors), exact_gradient(policy, tables, rewards)

    def A(right, others_right):                                     # of a right or wrong one beside K right others
        mean = (right + others_right) / G
        return 0 if mean in (0, 1) else (right - mean) / (mean * (1 - mean))**0.5
    for t, r in zip(tables, right):
        rate, (estimate, exact) = float((t.p.detach() * r).sum()), estimated([t], [r])
        scales.append(3 * float(estimate @ exact / (exact @ exact)))                         # Eq. 8's mean: |τ| = 3
        expected = (G - 1) / G / (1 - rate**G - (1 - rate)**G)      # over the share of mixed groups
        if name == "--adv-std":
            expected = sum(math.comb(G - 1, K) * rate**K * (1 - rate)**(G - 1 - K) * (A(1, K) - A(0, K)) for K in range(G))
        print(f"{name}: rate {rate:.3f} of right answers, the prompt's gradient times {scales[-1]:.4f} (expected {expected:.4f})")
        assert bias(estimate, exact) < 1e-10 and abs(scales[-1] - expected) < 1e-10 and 0.05 < rate < 0.95
    assert abs(scales[0] / scales[1] - 1) > 0.01
    if name == "flat groups, same prompt again":
        # DAPO, and dirl.train_rl, draw *other* prompts: one counts as often as its groups are mixed: exact again.
        for rewards in (right, real):
            share = torch.stack([1 - sum(t.p.detach()[r == x].sum()**G for x in r.unique()) for t, r in zip(tables, rewards)])
            factors = [in_groups(t, r, G, "eq8", **options) * s for t, r, s in zip(tables, rewards, share / share.sum())]
            estimate, exact = dipo_gradient(policy, tables, factors), exact_gradient(policy, tables, rewards)
            print(f"flat groups, other prompts instead: relative error after the best scaling {bias(estimate, exact):.1e}")
            assert bias(estimate, exact) < 1e-10
            assert abs(3 * estimate @ exact / (exact @ exact) - (G - 1) / G / share.sum()) < 1e-10
    error, error_of_real = (bias(*estimated(tables, rewards)) for rewards in (right, real))
    print(f"{name}: relative error over both prompts {error:.1e}; where rewards are real numbers {error_of_real:.1e}")
    assert error > 1e-3 and error_of_real > 1e-3


def decodings(sampler, policy, prompt, rule, block, steps, logp, s=1):
    """Every way to decode a block from step s on where the sampler's confidences say what is committed: (output, step map,
    log π of the committed tokens, the sampler's and the policy's: [2, 3]). No draw decides what is committed, so only
    the tokens that are differ."""
    masked = block == 3
    if not masked.any():
        yield block, steps, logp
        return
    log_pi = torch.stack([toy_log_pi(x, torch.cat([prompt, block])) for x in (sampler, policy)])         # [2, 3, vocab]
    top1 = log_pi[0].max(1).values[None]
    new = dirl.unmask(top1, top1, masked[None], *rule)[0]
    for drawn in itertools.product(range(3), repeat=int(new.sum())):
        token = block.masked_scatter(new, torch.tensor(drawn))
        after = torch.where(new, s, steps), torch.where(new, log_pi[:, range(3), token.clamp_max(2)], logp), s + 1
        yield from decodings(sampler, policy, prompt, rule, token, *after)


@pytest.mark.parametrize("rule", ["sequential", "static", "dynamic"])
def test_importance_gives_the_gradient_of_the_policy_where_another_one_samples(rule):
    """Constant baseline and normaliser. The sampler's confidences say what is committed when; π_θ decodes in that order."""
    policy, sampler, baseline, documents, expected = toy_policy(), disturbed(toy_policy(), 0.009), 0.3, [], 0.0
    rewards = torch.randn(27, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for prompt in torch.tensor([[0, 2, 1], [1, 1, 2]]):
        start = torch.tensor([3] * 3), torch.tensor([0] * 3), torch.zeros(2, 3, dtype=torch.float64)
        found = list(decodings(sampler, policy, prompt, (rule, 1, 0.7, "top1"), *start))
        p, q = torch.stack([logp.sum(1).exp() for *_, logp in found]).T                      # the sampler's, π_θ's
        assert len(found) == 27 and all(abs(x.item() - 1) < 1e-12 for x in (p.sum(), q.sum()))
        r = rewards[torch.stack([output for output, *_ in found]) @ torch.tensor([1, 3, 9])]
        expected = expected + (q * r).sum()
        documents += [dirl.trajectory_document(prompt, output, steps, 3, 3) | {
            "p": p[i].detach().expand(3), "r": r[i].expand(3), "logp_sampler": logp[0].detach()}
            for i, (output, steps, logp) in enumerate(found)]
    exact, row = gradient(policy.model, expected), dirl.join(documents)
    logp, p, theirs = policy.score(row)[0], row["p"], row["logp_sampler"]
    step, trajectory = row["view"][row["reads"]] - 1, row["doc"][row["reads"]]
    ratio = (logp - theirs).detach()
    weights, gap = dirl.importance_weights(logp.detach(), theirs, trajectory, 1e9), float((p * ratio.abs()).sum()) / 6

    def error(name, weights):
        J, _ = J_of(name, logp, None, row["r"] - baseline, p * weights, step, 0.2, 0.2)
        return relative(gradient(policy.model, J), exact)
    uncorrected, of_tokens, corrected = (error("eq7", x) for x in (torch.ones_like(p), ratio.exp(), weights))
    print(f"{rule}, a sampler {gap:.2f} nats a token away: relative error of the expected gradient {uncorrected:.2f} "
          f"uncorrected, {of_tokens:.2f} with token ratios, {corrected:.1e} with importance weights")
    assert 0.06 < gap < 0.12 and corrected < 1e-12 and error("eq8", weights) < 1e-12 and min(uncorrected, of_tokens) > 0.05
    assert error("eq8", torch.ones_like(p)) == pytest.approx(uncorrected, rel=1e-9)
    assert torch.equal(weights, weights.view(-1, 3)[:, :1].expand(-1, 3).flatten())
    assert torch.allclose(weights[::3], ratio.view(-1, 3).sum(1).exp(), rtol=1e-12)
    capped = dirl.importance_weights(logp.detach(), theirs, trajectory, 1.1)
    assert torch.equal(capped, weights.clamp_max(1.1)) and (capped == 1.1).any() and (capped < 1.1).any()
    far = dirl.importance_weights(torch.zeros(2), torch.tensor([-1000.0, 1000.0]), torch.tensor([0, 1]), 3.0)
    assert far.tolist() == [3.0, 0.0] and len(dirl.importance_weights(*[torch.zeros(0)] * 2, torch.zeros(0).long(), 3.0)) == 0


def test_importance_weights_come_from_whole_trajectories_and_reach_the_loss(policies, tmp_path):
    policy = policies(4)
    c, flat = rollouts(disturbed(policy, 0.003), "--importance", 0.5, "--out", tmp_path, n=8)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 1.0, 1.0]])
    groups = [dirl.Group(tuple(flat[i * 4:i * 4 + 4]), ("",) * 4, tuple(rewards[i].tolist())) for i in (0, 1)]
    with torch.no_grad():
        scores = [policy.score(dirl.join([d]))[0] for d in documents_of(policy, flat)]
    W = torch.stack([(a.double() - t.logp.double()).sum().exp() for a, t in zip(scores, flat)]).clamp_max(0.5)
    plain = dirl.trajectory_weights(torch.tensor([[t.decoding_steps for t in flat[i:i + 4]] for i in (0, 4)]), "eq8").flatten()
    expected = {"importance": W.mean(), "importance_capped": (W == 0.5).double().mean(),
                "importance_ess": W.sum()**2 / (8 * W.square().sum())}
    assert 0 < expected["importance_capped"] < 1 and W.min() < 0.3
    A, reference, gradients = dirl.advantage(rewards).flatten(), 0.0, []
    for i, d in enumerate(documents_of(policy, flat)):
        logp = policy.score(dirl.join([d]))[0]
        reference = reference + (A[i] * plain[i] * W[i] * logp).sum()      # the gradient of Eq. 8 with one update
    reference = gradient(policy.model, reference)
    for max_tokens, updates in ((1, 1), (150, 1), (10**6, 1), (10**6, 2)):
        moving, moved = copy.deepcopy(policy), []
        given = changed(c, max_tokens=max_tokens, updates=updates)
        with pytest.MonkeyPatch.context() as patch:                # the gradients that train_on hands to the optimizer
            patch.setattr(dirl, "optimizer_step", lambda policy, *args: moved.append(torch.cat(
                [w.grad.flatten().clone() for w in policy.model.parameters()])) or policy.model.zero_grad() or 1.0)
            metrics = dirl.train_on(moving, None, None, given, groups, 1)
        assert {x: metrics[x] for x in expected} == pytest.approx({x: float(y) for x, y in expected.items()}, rel=1e-5)
        gradients += moved
    assert len(gradients) == 5 and all(relative(-g, reference) < 1e-5 for g in gradients)


def test_importance_weights_are_those_of_the_policy_before_the_first_update(policies, tmp_path, monkeypatch):
    """With --updates 2 and a policy that moves in between, on which the second update's ratio is: Eq. 7 written out."""
    policy, eq7 = copy.deepcopy(policies(4)), dirl.eq7
    c, flat = rollouts(disturbed(policy, 0.003), "--importance", 0.3, "--objective", "eq7", "--updates", 2, n=8)
    groups = [dirl.Group(tuple(flat), ("",) * 8, (1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0))]
    scored, given, moved, documents = [], [], [], documents_of(policy, flat)

    def move(policy, *args):
        """In place of the optimizer's step, plain descent."""
        with torch.no_grad():
            scored.append([policy.score(dirl.join([d]))[0] for d in documents])
            moved.append(torch.cat([w.grad.flatten() for w in policy.model.parameters()]))
            for w in policy.model.parameters():
                w -= 0.01 * w.grad / moved[0].norm()
        policy.model.zero_grad()
        return 1.0
    monkeypatch.setattr(dirl, "optimizer_step", move)
    monkeypatch.setattr(dirl, "eq7", lambda *args: given.append(args[3]) or eq7(*args))
    metrics = dirl.train_on(policy, None, None, changed(c, max_tokens=10**6), groups, 1)
    before, later = ([torch.stack([x.sum() for x in update])] for update in scored)
    W = torch.stack([(x.double() - t.logp.double()).sum().exp() for x, t in zip(scored[0], flat)]).clamp_max(0.3)
    assert (before[0] - later[0]).abs().min() > 0.01 and 0 < (W == 0.3).sum() < 8            # the policy has moved
    expected = (W / sum(t.decoding_steps for t in flat)).repeat_interleave(torch.tensor([len(t.output) for t in flat]))
    order = sorted(range(8), key=lambda i: -len(documents[i]["ids"]))                        # of the documents in the row
    expected = torch.cat([expected.split([len(t.output) for t in flat])[i] for i in order])
    assert len(given) == 2 and torch.equal(*given) and torch.allclose(given[0].double(), expected, rtol=1e-5)
    assert metrics["importance"] == pytest.approx(float(W.mean()), rel=1e-5)


@pytest.mark.parametrize("objective", ["eq7", "eq8"])
def test_importance_weights_of_the_trainer_s_own_rollouts_are_one(policies, objective):
    policy = policies(4)
    c, same = rollouts(policy, "--objective", objective, n=8)
    rows, _ = dirl.dipo_rows(policy, c, [dirl.Group(tuple(same), ("",) * 8, tuple(range(8)))])
    with torch.no_grad():
        rows = [row | {"logp_old": policy.score(row)[0]} for row in rows]
    weighted, found = dirl.weigh(rows, 3.0)
    assert [found[x] for x in ("importance", "importance_capped", "importance_ess")] == pytest.approx([1, 0, 1], abs=1e-4)
    assert all(torch.allclose(a["w"], b["w"], rtol=1e-4) for a, b in zip(weighted, rows))


def weighed(*log_ratios, cap=3.0):
    """(w, metrics) of trajectories of two tokens each, in one row, beside a row of which nothing is read."""
    n, none = len(log_ratios), torch.zeros(0)
    row = {"doc": torch.arange(n).repeat_interleave(3), "reads": torch.tensor([3 * i + j for i in range(n) for j in (1, 2)]),
           "w": torch.ones(2 * n), "logp_sampler": torch.zeros(2 * n),
           "logp_old": torch.tensor(log_ratios).repeat_interleave(2) / 2}
    dummy = {"doc": torch.zeros(4).long(), "reads": none.long(), "w": none, "logp_sampler": none, "logp_old": none}
    (row, _), metrics = dirl.weigh([row, dummy], cap)
    return row["w"][::2], metrics


def test_importance_metrics_count_trajectories_and_survive_every_gap():
    w, metrics = weighed(0.0, 0.5, 2.0, -1.0)
    W = torch.tensor([0.0, 0.5, 2.0, -1.0]).exp().clamp_max(3.0)
    assert torch.allclose(w, W) and metrics["importance"] == pytest.approx(float(W.mean()))
    assert metrics["importance_capped"] == 0.25
    assert metrics["importance_ess"] == pytest.approx(float(W.sum()**2 / (4 * W.square().sum())))
    for cap in (0.1, 0.7, 1.1, 3.3):                                # which float32 rounds: at the cap is at the cap
        assert weighed(5.0, cap=cap)[1]["importance_capped"] == 1
    assert weighed(2000.0)[0].tolist() == [3.0]
    for gap in (-60.0, -200.0):      # of W², and of W, nothing is left in float32
        assert weighed(gap, gap)[1]["importance"] < 1e-20


def test_importance_leaves_the_kl_term_alone(policies, monkeypatch):
    policy, metrics = policies(4), []
    c, flat = rollouts(disturbed(policy, 0.003), "--objective", "eq7", "--beta", 0.1, n=4)
    groups = [dirl.Group(tuple(flat), ("",) * 4, (1.0, 0.0, 0.0, 0.5))]
    monkeypatch.setattr(dirl, "optimizer_step", lambda policy, *args: policy.model.zero_grad() or 1.0)
    for cap in (None, 0.3):
        metrics.append(dirl.train_on(policy, disturbed(policy, 0.01), None, changed(c, importance=cap), groups, 1))
    without, weighted = metrics
    assert weighted["kl"] == pytest.approx(without["kl"], rel=1e-5) and without["kl"] > 0.01
    assert weighted["loss"] != pytest.approx(without["loss"], rel=1e-3)


# ---- LMDeploy: the real engine, without its CUDA pieces where there is no GPU --------------------------------------

@pytest.fixture
def lmdeploy_engine(monkeypatch):
    """A maker of LMDeploy engines, closed after the test. Options are for engines without a GPU."""
    stand_ins.lmdeploy_on_cpu()
    monkeypatch.setattr(dirl, "gpu_memory", lambda: 2**37)
    with contextlib.ExitStack() as stack:
        def make(policy, c, **options):
            small = {} if torch.cuda.is_available() else {"num_gpu_blocks": 64, "block_size": 16, "eager_mode": True} | options
            engine = dirl.LMDeployEngine(policy, c, **small)
            stack.callback(engine.close)
            return engine
        yield make


def assert_same(ours, theirs, atol=1e-4):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("prompt", "output", "steps", "answer"))
        assert (a.logp - b.logp).abs().max() < atol and (a.stopped, a.decoding_steps) == (b.stopped, b.decoding_steps)


@pytest.mark.parametrize("B, cases", [
    (4, [("static", 2, "drawn"), ("dynamic", 1, "top1"), ("sequential", 1, "drawn")]),
    (8, [("static", 1, "top1"), ("dynamic", 1, "drawn"), ("sequential", 2, "top1")])])
def test_lmdeploy_decodes_as_our_sampler(policies, lmdeploy_engine, B, cases):
    """Greedy trajectories are the same; the log-probabilities of samples are those of a replay; equal calls, equal samples."""
    policy, prompts = policies(B), prompts_of_every_remainder(policies(B))
    keys, other_keys = ([(seed, i) for i in range(len(prompts))] for seed in (5, 6))
    c = flags("--block-size", B, "--max-new-tokens", 21, "--threshold", 0.5, "--slots", 32)
    engine = lmdeploy_engine(policy, c)
    for (c.unmask, c.tokens_per_step, c.confidence), c.max_new_tokens in itertools.product(cases, (21, 6, 1)):
        assert_same(dirl.decode(policy, prompts, keys, c, greedy=True), engine.generate(prompts, keys, greedy=True))
        theirs, again, other = (engine.generate(prompts, x) for x in (keys, keys, other_keys))
        assert_same(theirs, again)
        assert any(a.output.tolist() != b.output.tolist() for a, b in zip(theirs, other))
        if c.max_new_tokens == 6:
            assert_replay(policy, theirs)


@pytest.mark.parametrize("T", [0.5, 1.7])
def test_both_engines_sample_at_the_temperature(policies, lmdeploy_engine, T):
    policy = copy.copy(policies(4))
    policy.temperature = T
    prompts, c = prompts_of_every_remainder(policy), flags("--max-new-tokens", 9, "--threshold", 0.5)
    for engine in (dirl.TorchEngine(policy, c), lmdeploy_engine(policy, c)):
        assert_replay(policy, engine.generate(prompts, [(5, i) for i in range(9)]), temperature=T)


def test_lmdeploy_more_requests_than_slots_preemption_and_prefill_in_chunks(policies, lmdeploy_engine, monkeypatch):
    from lmdeploy.pytorch.paging.scheduler import Scheduler
    policy, preempted, preempt = policies(4), [], Scheduler.preempt_seqs
    c = flags("--max-new-tokens", 90, "--threshold", 0.5, "--slots", 6)
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 200, (n,), generator=g).tolist() for n in (100, 33, 5, 64, 131, *range(1, 60, 8))]
    keys = [(6, i) for i in range(len(prompts))]
    monkeypatch.setattr(Scheduler, "preempt_seqs", lambda self, seqs: (preempted.extend(seqs), preempt(self, seqs))[1])
    engine, made = lmdeploy_engine(policy, c, num_gpu_blocks=20, max_prefill_token_num=32), {}
    for greedy in (True, False):
        preempted.clear()
        made[greedy] = engine.generate(prompts, keys, greedy)
        assert preempted or torch.cuda.is_available()
    assert_same(dirl.decode(policy, prompts, keys, c, greedy=True), made[True])
    assert_replay(policy, made[False])


@pytest.mark.parametrize("tied", [False, True])
def test_lmdeploy_takes_new_weights_awake_or_after_sleep(policies, lmdeploy_engine, tmp_path, tied):
    """In every order, the outputs are those of an engine built from a checkpoint with the same weights."""
    start = policies(4).folder if not tied else tied_copy(policies(4).folder, str(tmp_path / "tied"))
    c = flags("--max-new-tokens", 9, "--threshold", 0.5)
    policy = dirl.load_policy(start, c)
    prompts, keys = prompts_of_every_remainder(policy), [(7, i) for i in range(9)]
    original = {name: weight.clone() for name, weight in policy.named_weights(torch.float32)}
    assert ("lm_head.weight" in original) != tied

    def set_weights(noise):
        g = torch.Generator().manual_seed(4)
        for name, weight in policy.model.named_parameters():
            noisy = original[name] + noise * torch.randn(weight.shape, generator=g).to(weight)
            weight.data.copy_(noisy.bfloat16())                     # as a checkpoint in bfloat16 holds it
    expected = {}
    for noise in (0.0, 0.05):
        set_weights(noise)
        dirl.save_policy(policy, str(tmp_path / f"{noise}"))
        expected[noise] = lmdeploy_engine(dirl.load_policy(str(tmp_path / f"{noise}"), c), c).generate(prompts, keys, greedy=True)
    assert any(a.output.tolist() != b.output.tolist() for a, b in zip(*expected.values()))
    engine = lmdeploy_engine(policy, c)
    agent = engine.engine.executor.model_agent
    for orders in ("update", "sleep update", "update sleep update", "sleep sleep update", "update update"):
        for noise in (0.0, 0.05):
            set_weights(noise)
            model = agent.patched_model.get_model()
            for name in orders.split():
                {"update": engine.update_weights, "sleep": engine.sleep}[name]()
            assert_same(expected[noise], engine.generate(prompts, keys, greedy=True))
            assert (agent.patched_model.get_model() is model) == ("sleep" not in orders)     # awake, nothing is built anew


def test_lmdeploy_weights_that_do_not_arrive_are_an_error(policies, lmdeploy_engine, monkeypatch):
    engine = lmdeploy_engine(policies(4), flags())
    model = type(engine.engine.executor.model_agent.patched_model.get_model())
    monkeypatch.setattr(model, "load_weights", lambda self, weights: None)
    engine.update_weights()                                         # the same ones: nothing is stale
    monkeypatch.setattr(dirl.Policy, "named_weights", lambda self, dtype: [("model.norm.weight", torch.full((128,), 1.01))])
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        engine.update_weights()


def test_lmdeploy_a_failed_request_is_an_error_that_names_it(policies, lmdeploy_engine, monkeypatch):
    engine = lmdeploy_engine(policies(4), flags("--max-new-tokens", 40, "--max-length", 60))
    with pytest.raises(RuntimeError, match="prompt of 90 tokens"):
        engine.generate([[1] * 5, [1] * 90], [(0, 0), (0, 1)])
    stream = engine.instance.async_stream_infer

    async def aborted(session, *args, **more):
        async for response in stream(session, *args, **more):
            yield response
            await engine.instance.async_cancel(session)
    engine.instance.async_stream_infer = aborted
    with pytest.raises(RuntimeError, match="prompt of 5 tokens.*CANCEL"):
        engine.generate([[1] * 5], [(0, 0)])
    engine.instance.async_stream_infer = stream
    assert len(engine.generate([[1] * 5], [(0, 0)])) == 1           # and the engine lives on
    if not torch.cuda.is_available():                               # a small cache: LMDeploy would stop earlier, and say nothing
        small = lmdeploy_engine(policies(4), flags("--max-new-tokens", 300), num_gpu_blocks=20)
        with pytest.raises(RuntimeError, match="prompt of 5 tokens: room for 283 more, --max-new-tokens is 300"):
            small.generate([[1] * 5], [(0, 0)])
    monkeypatch.setattr(dirl, "denoise", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="prompt of 5 tokens"):   # an exception in its loop is not a hang
        engine.generate([[1] * 5], [(0, 0)])


def test_lmdeploy_stops_in_the_block_that_the_prompt_begins(policies, lmdeploy_engine):
    policy, c = copy.copy(policies(4)), flags("--max-new-tokens", 30, "--threshold", 0.5)
    prompts, keys = [[5] * n for n in (1, 2, 3, 5, 6, 7)], [(0, i) for i in range(6)]
    first = [int(t.output[0]) for t in dirl.decode(policy, prompts, keys, c, greedy=True)]
    policy.stop_ids = torch.tensor([*first, 5])                     # 5 stands in the prompts: it must not stop them there
    theirs = lmdeploy_engine(policy, c).generate(prompts, keys, greedy=True)
    assert all(len(t.output) == -len(t.prompt) % 4 and t.stopped for t in theirs)
    assert_same(dirl.decode(policy, prompts, keys, c, greedy=True), theirs)


@pytest.mark.parametrize("name", ["torch", "lmdeploy"])
@torch.no_grad()
def test_rollouts_of_one_prompt_differ_and_follow_the_policy(policies, lmdeploy_engine, name):
    """Stock LMDeploy gives 16 rollouts of a prompt 4 different outputs (seeds tiled in the wrong order)."""
    policy, prompt = copy.copy(policies(4)), prompts_of_every_remainder(policies(4))[6]
    policy.stop_ids, n = torch.tensor([policy.mask_id]), 2000       # outputs of one length
    c = flags("--max-new-tokens", 9, "--slots", 256, "--max-length", 16, "--threshold", 0.1)
    engine = lmdeploy_engine(policy, c, num_gpu_blocks=600) if name == "lmdeploy" else dirl.TorchEngine(policy, c)
    made = engine.generate([prompt] * n, [(9, i) for i in range(n)])
    assert len({tuple(t.output.tolist()) for t in made[:16]}) == 16
    p = slow_log_policy(policy, slow_logits(policy, torch.tensor([*prompt, policy.mask_id]))[-1]).exp()
    assert abs(chi_square(torch.stack([t.output[0] for t in made]).bincount(minlength=len(p)), n * p.double())) < 4
    # Of all tokens: where in its distribution function each one was drawn is uniform, and independent of the others.
    g, places = torch.Generator().manual_seed(0), []
    for row in rows_of(policy, documents_of(policy, made), 1000):
        hidden = policy.hidden(row["ids"][None], row["pos"][None], dense(row, 4)[None, None])[0, row["reads"]]
        p = slow_log_policy(policy, policy.model.lm_head(hidden)).double().exp()
        here, below = (x.gather(1, row["target"][:, None])[:, 0] for x in (p, p.cumsum(1)))
        places.append(below - here * torch.rand(len(here), generator=g))
    places = torch.cat(places).view(n, 9)
    assert abs(chi_square((places.flatten() * 100).long().bincount(minlength=100), torch.full((100,), 9 * n / 100))) < 4
    correlation = torch.corrcoef(places.T) - torch.eye(9)
    assert correlation.abs().max() < 4.5 / n**0.5 and any(t.decoding_steps < 9 for t in made)


def test_rl_with_lmdeploy(checkpoint, lmdeploy_engine, tmp_path, monkeypatch, capsys):
    """Sampler and trainer agree at every step, awake and with --sleep, and the engine ends with the trainer's weights."""
    monkeypatch.setattr(dirl, "WARMUP", 0)
    monkeypatch.setattr(dirl, "HELD_OUT", 8)
    engines, close, out = [], dirl.LMDeployEngine.close, str(tmp_path / "run")
    build = functools.partialmethod(dirl.LMDeployEngine.__init__, num_gpu_blocks=400, block_size=16, eager_mode=True)
    if not torch.cuda.is_available():
        monkeypatch.setattr(dirl.LMDeployEngine, "__init__", build)
    monkeypatch.setattr(dirl.LMDeployEngine, "close", lambda self: engines.append(self))     # the run's end: ours comes later
    model = ["--model", checkpoint]
    argv = [*model, "--engine", "lmdeploy", "--prompts", "4", "--group-size", "4", "--lr", "1e-3", "--max-new-tokens", "24"]
    parts = [*argv, "--out", out + " in two parts", "--sleep"]
    dirl.main([*parts, "--steps", "2"])
    dirl.main([*parts, "--steps", "4", "--resume"])                 # a new engine takes the resumed weights
    while engines:
        close(engines.pop())
    dirl.main([*argv, "--out", out, "--steps", "4"])
    whole, parts = (metrics(x, "rl") for x in (out, out + " in two parts"))
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    assert all(a["reward"] == b["reward"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5) for a, b in zip(whole, parts))
    assert len(whole) == 4 and all(line["logp_gap"] is None or line["logp_gap"] < 1e-3 for line in whole + parts)
    assert any(line["logp_gap"] is not None for line in whole) and all("seconds_weights" in line for line in whole)
    monkeypatch.undo()
    c, keys, (engine,) = flags("--max-new-tokens", 48), [(0, i) for i in range(8)], engines
    saved = dirl.load_policy(os.path.join(out, "rl"), c)
    prompts = [saved.prompt([{"role": "user", "content": dirl.arithmetic(i)[0]}]) for i in range(8)]
    assert_same(lmdeploy_engine(saved, c).generate(prompts, keys, greedy=True), engine.generate(prompts, keys, greedy=True))
    close(engine)
    monkeypatch.setattr(dirl, "MAX_LOGP_GAP", 1e-12)
    with pytest.raises(SystemExit):                                 # a gap is an end, with the step's line written
        dirl.main([*model, "--out", out + "2", "--steps", "3", "--prompts", "4"])
    assert "MAX_LOGP_GAP" in capsys.readouterr().err and len(metrics(out + "2", "rl")) == 1


def test_lmdeploy_gets_its_memory_and_one_without_the_patch_point_is_an_error(policies, lmdeploy_engine, monkeypatch, capsys):
    from lmdeploy.pytorch.strategies import dllm
    engine = lmdeploy_engine(policies(4), flags("--engine-memory", 0.2))
    assert engine.engine.cache_config.cache_max_entry_count == 0.2
    monkeypatch.delattr(dllm.sequence, "DLLMSequenceStrategy")
    with pytest.raises(SystemExit):
        lmdeploy_engine(policies(4), flags())
    assert "DLLMSequenceStrategy" in capsys.readouterr().err


# ---- CUDA kernels without a GPU: Triton's interpreter runs them on CPU tensors ------------------------------------------

def in_triton_interpreter(test):
    """The test, in a pytest of its own: triton looks at TRITON_INTERPRET when it is imported."""
    def in_a_process_of_its_own():
        more = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"{__file__}::{test.__name__}"]
        done = subprocess.run(command, env=ONE_THREAD | more, timeout=900, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return test if os.environ.get("TRITON_INTERPRET") == "1" else in_a_process_of_its_own


@in_triton_interpreter
def test_lmdeploy_kernels_decode_as_our_sampler(policies, lmdeploy_engine, monkeypatch):
    """LMDeploy's own CUDA backend in float32, as on an A100 (decoding on sm_90 has inline assembly): prefill, paged decoding,
    cache, rotary embedding, norm and activation are its Triton kernels. Prompts end in the first block, at its end, in the
    second; then new weights, awake and after sleep."""
    from lmdeploy.pytorch.backends import selector
    device = SimpleNamespace(major=8, minor=0, multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: device)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    stand_ins.fast_interpreter((8, 0))
    from lmdeploy.pytorch.backends.cuda import CudaOpsBackend
    monkeypatch.setattr(selector, "_get_backend", lambda: CudaOpsBackend)
    for B in (4, 8):
        c = flags("--block-size", B, "--max-new-tokens", 6, "--threshold", 0.2, "--slots", 8)
        policy, g = dirl.load_policy(policies(B).folder, c), torch.Generator().manual_seed(0)
        engine, every = lmdeploy_engine(policy, c), prompts_of_every_remainder(policy)
        attention = engine.engine.executor.model_agent.patched_model.get_model().model.layers[0].self_attn.attn_fwd.impl
        assert type(attention).__name__ == "TritonAttentionImpl"

        def check(*lengths):
            prompts, keys = [every[n - 1] for n in lengths], [(5, n) for n in lengths]
            ours = dirl.decode(policy, prompts, keys, c, greedy=True)
            assert_same(ours, engine.generate(prompts, keys, greedy=True))
            return ours[-1].output.tolist()
        outputs = [check(1, B, B + 2)]
        for sleeps in (False, True) if B == 4 else ():
            with torch.no_grad():
                for weight in policy.model.parameters():
                    weight += 0.02 * torch.randn(weight.shape, generator=g)
            if sleeps:
                engine.sleep()
            engine.update_weights()
            outputs.append(check(B + 2))
            assert outputs[-1] != outputs[-2]


def flex_case(D, dtype, N=384):
    """A packed row of trajectories and padding: its mask_mod, and q, k, v as Qwen3 passes them, two heads to one of k and v."""
    g = torch.Generator().manual_seed(0)
    trajectories = [random_trajectory(g, P, L, 4) for P, L in ((238, 18), (5, 11))]
    row = dirl.join([dirl.trajectory_document(*t, 4, 999) for t in trajectories], length=N)
    assert len(row["doc"].unique()) == 3
    qkv = [torch.randn(1, N, heads, D, generator=g).to(dtype).transpose(1, 2).requires_grad_() for heads in (2, 1, 1)]
    return dirl.mask_mod(row["doc"], row["view"], row["pos"] // 4), qkv, torch.randn(1, N, 2, D, generator=g).to(dtype)


def flex_errors(sees, blocks, qkv, upstream=None):
    """Relative errors of out, with its gradient also of dq, dk, dv, under the BlockMask; against all scores in float64."""
    exact = [x.detach().double().requires_grad_() for x in qkv]
    q, k, v = exact[0], *(x.repeat_interleave(2, 1) for x in exact[1:])
    i, scale = torch.arange(q.shape[2]), q.shape[3]**-0.5
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~sees(0, 0, i[:, None], i), -torch.inf)
    found, expected = [dirl.attention(None, *qkv, blocks, scale)[0]], [(scores.softmax(-1) @ v).transpose(1, 2)]
    if upstream is not None:
        found += torch.autograd.grad(found[0], qkv, upstream)
        expected += torch.autograd.grad(expected[0], exact, upstream.double())
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected)]


@in_triton_interpreter
def test_flex_kernels_under_the_block_mask_are_dense_attention_and_tell_wrong_masks():
    stand_ins.flex_kernels_on_cpu()
    half = torch.bfloat16
    for D, dtype, most in ((32, half, 4e-3), (128, half, 4e-3), (32, torch.float32, 1e-5)):
        sees, *case = flex_case(D, dtype)
        right = dirl.block_mask(sees, 384, "cpu")
        errors = flex_errors(sees, right, *case)
        assert max(errors) < most, (D, dtype, errors)
    assert right.kv_num_blocks.sum() > 0 and right.full_kv_num_blocks.sum() > 0
    transposed, no_full, pair = copy.copy(right), copy.copy(right), copy.copy(right)
    transposed.q_num_blocks, transposed.q_indices = right.kv_num_blocks, right.kv_indices      # the backward reads these
    no_full.full_kv_num_blocks = torch.zeros_like(right.full_kv_num_blocks)
    pair.mask_mod = lambda batch, head, q, kv: sees(batch, head, q, kv) & ~((q == 240) & (kv == 240))
    assert max(flex_errors(sees, pair, case[0])) > 1e-4             # of 384 queries one loses one key
    sees, *case = flex_case(32, half)
    assert max(flex_errors(sees, no_full, case[0])) > 0.1
    assert max(flex_errors(sees, transposed, *case)) > 0.1


def test_flex_kernels_are_compiled_or_it_is_an_error(monkeypatch):
    """Beyond the recompile limit torch.compile would fall back, silently, to attention with the whole score matrix."""
    asked, limit, compile = {}, {"backend": "eager", "recompile_limit": 1}, torch.compile
    monkeypatch.setattr(torch._dynamo.config, "disable", False)     # as LMDeploy's stand-ins have it
    monkeypatch.setattr(torch, "compile", lambda *args, **more: (asked.update(more), compile(*args, **more | limit))[1])
    compiled = dirl.flex_attention.__wrapped__()
    assert asked["recompile_limit"] == 64                           # see test_rows_of_a_long_run_have_few_lengths
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for N in (128, 256):
            q, blocks = torch.randn(1, 1, N, 16), dirl.block_mask(lambda batch, head, q, kv: q >= kv, N, "cpu")
            compiled(q, q, q, block_mask=blocks)


# ---- data and reward --------------------------------------------------------------------------------------------

def test_reward_on_a_table_of_answers():
    long = "1" + "0" * 300
    table = [
        (r"so \boxed{42}", "42", 1), (r"\boxed{41} no, \boxed{42}", "42", 1), (r"\boxed{42} no, \boxed{41}", "42", 0),
        ("42", "42", 0), (r"\boxed{\frac{1}{2}}", "0.5", 1), (r"\boxed{0.5}", r"\frac{1}{2}", 1), (r"\boxed{1,000}", "1000", 1),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1), (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1), (r"\boxed{}", "42", 0), ("", "42", 0),
        (r"\boxed{42", "42", 0), (r"\boxed{-3}", "3", 0), (r"\boxed{(1,2)}", "(1,2)", 1), (r"\boxed{\text{no}}", "42", 0),
        (r"\boxed{18\text{ dollars}}", "18", 1), (r"\boxed{10,\!000}", "10000", 1), (r"\boxed{10000}", r"10,\!000", 1),
        (r"\boxed{3.}", "3", 1), (r"$\boxed 3$", "3", 1), (r"\boxed{3}", "3.", 1), (rf"\boxed{{{long}}}", long, 1),
        (rf"\boxed{{{long}0}}", long, 0), (rf"\boxed{{{long}}}", "1", 0)]
    for answer, truth, expected in table:
        assert dirl.math_reward(answer, truth) == expected, (answer, truth)
    assert dirl.arithmetic_reward("1+1=2,2+3=5", "5") == 1 and dirl.arithmetic_reward("1+1=2,2+3=5,", "5") == 0
    assert dirl.arithmetic_reward("1+1=2", "5") == 0 and dirl.arithmetic_reward("", "5") == 0


RIGHT = [                                      # (the boxed answer, the truth)
    ("2.25", "2 1/4"), (r"\frac{9}{4}", "2 1/4"), (r"2\frac{1}{4}", "2 1/4"), (r"\frac94", "2 1/4"),
    ("2 1/4", r"\frac{9}{4}"), (r"2\tfrac{1}{4}", "2.25"), ("-2.25", "-2 1/4"), (r"-2\frac14", "-2 1/4"), ("2½", "2.5"),
    ("½", "0.5"), ("½", r"\frac{1}{2}"), ("¾", "3/4"), ("1 ½", "3/2"), ("60", "60 km/h"), ("60 km/h", "60"),
    (r"60\text{ km/h}", "60 km/h"), (r"60\,\text{km/h}", "60 km/h"), (r"60\ \mathrm{km/h}", "60"),
    ("60 km per hour", "60 km/hour"), ("5 cm", "5"), (r"5\text{ cm}^2", "5"), ("18", "18 dollars"), (r"\$18", "18"),
    ("18.00", "18"), ("3 hours", "3 hour"), (r"12\text{ inches}", "12"), (r"\text{infinitely many}", "infinitely many"),
    ("infinitely many", r"\text{infinitely many}"), (r"\text{Yes}", "Yes"), (r"\text{no solution}", "no solution"),
    ("1234", r"1\,234"), (r"1\,234", "1234"), ("1,234", "1234"), ("1{,}234", "1234"), (r"1\;234", "1234"), ("1 234", "1234"),
    (r"1\,234\,567", "1234567"), ("1,234,567", "1234567"), (r"10,\!000", "10000"), ("0.00001", "1e-05"), ("1e-05", "0.00001"),
    ("10^{-5}", "1e-05"), ("6.02e23", "6.02e23"), (r"6.02\times 10^{23}", "6.02e23"), (r"6.02 \cdot 10^{23}", "6.02e23"),
    ("1E5", "100000"), ("2.5e3", "2500"), ("1e+05", "100000"), ("√2", r"\sqrt{2}"), (r"\sqrt2", "√2"), ("2√3", r"2\sqrt{3}"),
    ("√(2)", r"\sqrt{2}"), ("sqrt(2)", r"\sqrt{2}"), ("60°", "60"), (r"60^\circ", "60°"), ("60", r"60^{\circ}"),
    ("60 degrees", "60°"), ("2*pi", r"2\pi"), ("2π", "2*pi"), (r"2\pi", "2π"), ("π/2", r"\frac{\pi}{2}"), ("−3", "-3"),
    ("3×4", "12"), ("∞", r"\infty"), ("x≤5", r"x \le 5"), ("0.333333", r"\frac{1}{3}"), ("0.5", "1/2"), ("(1,2)", "(1, 2)"),
    (r"\langle 1,2,3\rangle", r"\langle 1, 2, 3 \rangle"), ("(1,2,3)", r"\langle 1,2,3\rangle"),
    (r"\frac{1}{2^{99}}", "2^{-99}"), (r"\frac{1}{2^{99}}", r"\frac{1}{2^{99}}"), (r"1,2,3,\dots", r"1, 2, 3, \ldots"),
    ("1,2,3,...", "1,2,3,…"), ("E", "E"), (r"\text{E}", "E"), ("(E)", "E"), (r"\text{(E)}", "E"), (r"\textbf{(B)}", "B"),
    ("B", "(B)"), ("e", "e"), ("3.0000", "3"), ("3.", "3"), ("x^2+2x+1", "(x+1)^2"), (r"\{1,2\}", r"\{2,1\}"),
    ("[1,2)", "[1,2)"), (r"50\%", "50%"), (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\left(1,2\right)", "(1,2)"), ("x=5", "5"),
    ("5", "x=5"), (r"\sqrt{8}", r"2\sqrt{2}"), ("1e-30", "1e-30"), ("10^{-30}", "1e-30"), ("0", "0"), ("0.0", "0"),
    ("-0", "0"), (r"\frac{10}{5}", "2"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("12:30", "12:30"), ("Monday", "Monday"), ("2 + 3i", "2+3i"), ("y=2x+1", "y = 2x + 1"), (r"16 \pi", "16π"),
    ("1/3", "0.333333"), (r"3\sqrt{2}", "3√2"), ("7/2", "3.5"), ("3 1/2", "3.5"), ("12 m/s", "12"),
    ("12 m/s", r"12\text{ m/s}"), ("5 m", "5"), (r"\frac{3}{4}\text{ cups}", "3/4"), ("$x^2$", "x^2")]
WRONG = [                                      # (the boxed answer, the truth)
    ("21/4", "2 1/4"), ("2 1/4", "21/4"), ("60 mph", "60 km/h"), ("60 km/h", "60 mph"), ("60 km", "60 km/h"),
    ("3.0000", "3.001"), ("3.001", "3"), (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), ("1e-30", "2e-30"),
    ("10^{-9}", "10^{-10}"), ("0.0000001", "0.0000002"), ("0", "1e-9"), ("1e-9", "0"),
    (r"\langle 1,2,4\rangle", r"\langle 1,2,3\rangle"), ("(1,2,4)", r"\langle 1,2,3\rangle"), ("(10^{-9},1)", "(10^{-10},1)"),
    (r"\{10^{-9}\}", r"\{2\cdot10^{-9}\}"), (r"1,2,4,\dots", r"1,2,3,\dots"), ("1,2,3,...", "1,2,3"),
    ("1,3,5,...", "2,4,6,..."), ("e", "E"), ("E", "e"), ("(e)", "E"), ("A", "B"), ("a", "A"), (r"\text{A}", "B"),
    ("(C)", "(D)"), ("2", "2 1/4"), ("1/4", "2 1/4"), ("-2.25", "2 1/4"), ("1.75", "-2 1/4"), ("3/2", "1/2"), ("¾", "¼"),
    ("12345", "1234"), ("1234", "1,235"), ("1.234", "1234"), ("61", "60 km/h"), ("6 km/h", "60 km/h"), ("5 cm", "5 inches"),
    ("3 hours", "3 days"), ("finitely many", "infinitely many"), ("No", "Yes"), ("no solution", "infinitely many"),
    ("6.02e22", "6.02e23"), ("1e-04", "1e-05"), ("√3", "√2"), ("2", "√2"), ("61°", "60°"), ("π", "2π"), ("3*pi", "2*pi"),
    ("-5", "5"), ("(2,1)", "(1,2)"), ("(1,2)", "(1,2,3)"), ("[1,2]", "[1,2)"), (r"\{1,2\}", r"\{1,3\}"),
    ("x^2+2x+2", "(x+1)^2"), ("0.3", "1/3"), ("0.33", "1/3"), ("x≥5", "x≤5"), ("-∞", "∞"), ("12:31", "12:30"),
    ("Tuesday", "Monday"), ("2x", "2"), ("2", "2x"), ("y=2x", "y=3x"), ("50", "49%"),
    (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("3 and 4", "3"), ("3", "3 and 4"),
    ("3 or 4", "3"), ("100 people", "10 people"), ("1000", "1 000 000"), ("0.001", "0.0011"), ("2^{-98}", "2^{-99}"),
    ("5 x", "5"), ("19 dollars", "18 dollars"), ("10^{10}", "10^{11}"), ("", "42"), ("1", "-1"), ("i", "-i")]


def test_answers_in_other_forms_are_right_and_other_answers_wrong():
    """Mixed numbers, units, words, separators, Unicode; near 0; vectors, sequences with dots, choices."""
    for expected, pairs in ((1, RIGHT), (0, WRONG)):
        wrong = [pair for pair in pairs if dirl.math_reward(rf"so \boxed{{{pair[0]}}}", pair[1]) != expected]
        assert not wrong, wrong
    assert all(dirl.math_reward(rf"\boxed{{{truth}}}", truth) for pair in RIGHT + WRONG for truth in pair if truth)


@pytest.mark.parametrize("answer", [
    r"\boxed{9^9^9^9}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{" + "{" * 10**6 + "}" * 10**6 + "}", r"\boxed{" * 10**5,
    r"\boxed{\frac{1}{}}", r"\boxed{\begin{matrix}1&2\\}", r"\boxed{" + "((((" * 40 + "1" + "))))" * 40 + "}",
    r"\boxed{1000000000!}", r"\boxed{\int_0^{\infty} \frac{\sin x^{x^x}}{x} dx}", r"\boxed{10^{10^{10}}}",
    r"\boxed{\x00\ud83d}", r"\boxed{\sum_{i=1}^{10^{12}} i^i}", r"\boxed{2^{2^{2^{2^{2^{2}}}}}}"])
def test_hostile_answers_earn_nothing_and_stop_nothing(answer):
    start = time.perf_counter()
    assert dirl.math_reward(answer, "42") == 0 and time.perf_counter() - start < 5


def test_built_in_task():
    made = [dirl.arithmetic(i) for i in range(400)]
    for question, work, truth in made:                              # the chain itself, and its terms
        assert str(eval(question.rstrip("="))) == truth
        assert all(str(eval(left)) == right for left, right in (term.split("=") for term in work.split(",")))
    questions = {question for question, _, _ in made}
    assert {(len(question) + 3) % 4 for question in questions} == {0, 1, 2, 3} and len(questions) > 350
    assert sum((len(work) + 1) / 4 for _, work, _ in made) / 400 >= 3
    right = sum(dirl.arithmetic_reward(work, truth) for _, work, truth in made) / 400
    assert abs(right - 0.25) < 0.06                                 # two of eight demonstrations are right
    held_out = {dirl.arithmetic(i, held_out=True)[0] for i in range(300)}
    assert not questions & held_out and dirl.arithmetic(5) == dirl.arithmetic(5)


def test_problems_in_the_formats_of_dirl_gsm8k_math_and_big_math(tmp_path, capsys):
    records = [{"question": "a", "ground_truth_answer": 3}, {"question": "b", "answer": "work\n#### 1,234"},
               {"problem": "c", "solution": r"thus \boxed{\frac{1}{2}}."}, {"problem": "d", "answer": "x"}]
    for name, text in (("p.json", json.dumps(records)), ("p.jsonl", "\n\n".join(map(json.dumps, records)) + "\n")):
        (tmp_path / name).write_text(text)
        found = dirl.read_records(str(tmp_path / name), "--data", "rl")
        assert found == [("a", "3"), ("b", "1,234"), ("c", r"\frac{1}{2}"), ("d", "x")]
    (tmp_path / "c.json").write_text(json.dumps([{"messages": chat("q", "a") * 2 + chat("q", "a")[:1]}]))
    assert dirl.read_records(str(tmp_path / "c.json"), "--data", "sft") == [chat("q", "a") * 2]
    assert capsys.readouterr() == ("", "")


def test_bad_records_are_skipped_and_counted_while_there_are_more_good_ones(tmp_path, capsys):
    good = [{"problem": "a", "solution": r"so \boxed 2"}, {"problem": "b", "answer": "", "solution": r"\boxed{5}"},
            {"question": "c", "ground_truth_answer": "", "answer": "work\n#### 7"}, {"question": "d", "answer": 0}]
    bad = ['{"question": "e"}', '{"question": null, "answer": "1"}', '{"question": "f", "answer": "####"}', "{", "[1]"]
    path, lines = tmp_path / "p.jsonl", list(map(json.dumps, good))
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join([bad[0], lines[0], *bad[1:3], *lines[1:]]).encode())        # a BOM
    assert dirl.read_records(str(path), "--eval-data", "rl") == [("a", "2"), ("b", "5"), ("c", "7"), ("d", "0")]
    assert capsys.readouterr().out == f"--eval-data {path}: 3 of 7 records are bad, the first is number 1; they are skipped\n"
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([*good, 3]).encode())
    assert len(dirl.read_records(str(tmp_path / "p.json"), "--data", "rl")) == 4 and "1 of 5 records" in capsys.readouterr().out
    for n in (4, 5):                                                # as many bad as good ones, or more
        path.write_text("\n".join([*lines, *bad[:n]]))
        line = refused(capsys, "--stage eval --model nowhere --data", path, quiet=True)
        assert f"{n} of {4 + n} records are bad, the first is number 5" in line
    chats = [chat("q", "a")] * 3 + [chat("q", "a")[:1], chat("q", None)]
    jsonl(path, *({"messages": x} for x in chats))
    assert dirl.read_records(str(path), "--data", "sft") == chats[:3] and "2 of 5 records are bad" in capsys.readouterr().out


def test_a_walk_goes_through_every_record_of_an_epoch(policies):
    records = [(letter * (1 + 500 * (letter == "c")), "") for letter in "abcdefg"]      # one is too long
    walk = dirl.Walk(policies(4), flags(), "here", records)
    first, second = ([next(walk) for _ in range(6)] for _ in range(2))
    numbers = [number for number, _ in first + second]
    assert numbers == sorted(set(numbers)) and walk.position - walk.passed_over == 12 and walk.passed_over in (1, 2)
    first, second = ([problem.question for _, problem in x] for x in (first, second))
    assert sorted(first) == sorted(second) == list("abdefg") and first != second
    assert [problem.question for problem in walk.once()] == list("abdefg")
    assert str(walk).startswith("here: 1 of 7 records passed over: ")


# ---- checkpoints, flags, runs -------------------------------------------------------------------------------------

def weights_of(folder):
    from safetensors.torch import load_file
    return load_file(os.path.join(folder, "model.safetensors"))


def changed_weights(folder, change):
    from safetensors.torch import save_file
    save_file(change(weights_of(folder)), os.path.join(folder, "model.safetensors"), {"format": "pt"})


def changed_copy(source, folder, drop=(), **changes):
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(source, folder)
    config = dirl.read_json(os.path.join(folder, "config.json"))
    dirl.write_json(os.path.join(folder, "config.json"), without(config | changes, *drop))
    return folder


def tied_copy(source, folder, **changes):
    """A copy of a checkpoint in bfloat16 with tied embeddings, and with a program in it."""
    program = {"AutoConfig": "evil.SDARConfig", "AutoModelForCausalLM": "evil.SDARForCausalLM",
               "AutoTokenizer": ["evil.SDARTokenizer", None]}
    changed_copy(source, folder, **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "auto_map": program} | changes)
    Path(folder, "evil.py").write_text("raise SystemExit('executed')")
    changed_weights(folder, lambda w: {name: x.bfloat16() for name, x in without(w, "lm_head.weight").items()})
    return folder


def without_mask_token(folder, rows):
    """Take the mask token out of a checkpoint's tokenizer; its embedding gets more rows than there are tokens."""
    path = Path(folder, "tokenizer.json")
    path.write_text(path.read_text().replace("<|MASK|>", "<|unused|>"))
    path = Path(folder, "tokenizer_config.json")
    dirl.write_json(path, without(dirl.read_json(path), "mask_token"))
    changed_weights(folder, lambda w: w | {x: torch.cat([w[x], torch.zeros(rows - len(w[x]), 128)])
                                           for x in ("model.embed_tokens.weight", "lm_head.weight")})


def test_a_bfloat16_tied_checkpoint_with_a_foreign_attention_setting(policies, tmp_path):
    folder = tied_copy(policies(4).folder, str(tmp_path / "tied"), attn_implementation="flex_attention", rope_theta=1e6,
                       eos_token_id=[256, 257])
    out, weights, policy = tmp_path / "out", weights_of(folder), dirl.load_policy(folder, flags())
    assert policy.model.config.rope_parameters["rope_theta"] == 1e6 and policy.eos_id == 256
    assert policy.model.lm_head.weight.data_ptr() == policy.model.model.embed_tokens.weight.data_ptr()
    assert len(rollouts(policy, n=2)[1]) == 2
    dirl.save_policy(policy, str(out))
    saved, config = weights_of(out), dirl.read_json(out / "config.json")
    assert "lm_head.weight" not in saved and {v.dtype for v in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[k], weights[k].bfloat16()) for k in saved)
    assert config["auto_map"]["AutoConfig"] == "evil.SDARConfig" and (out / "evil.py").exists()        # its own, kept


CHOICES = {"mask_token_id", "block_size"}
QWEN3, SCALED = {"model_type": "qwen3"}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
KINDS = {  # checkpoint: (--block-size, what its config.json lacks, what it says otherwise)
    "sdar": (None, set(), {}), "sdar that does not say": (None, CHOICES, {}),
    "sdar with its program": (None, set(), {"auto_map": {"AutoModel": "modeling_sdar.SDARForCausalLM"}}),
    "a2d-qwen3": (2, CHOICES, {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"],
                               "auto_map": {"AutoModel": "tokenizer.A2DQwen3LMHeadModel"}}),
    "qwen3": (None, CHOICES, QWEN3 | {"architectures": ["Qwen3ForCausalLM"]}),
    "qwen3 of newer transformers": (8, CHOICES | {"rope_theta", "torch_dtype", "rope_scaling", "use_sliding_window"}, QWEN3 | {
        "dtype": "float32", "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0}}),
    "rope that is scaled": (None, {"rope_theta"}, {"rope_parameters": SCALED | {"rope_theta": 30.0}}),
    "tied": (None, CHOICES, QWEN3 | {"tie_word_embeddings": True}),
    "no mask token": (None, CHOICES, QWEN3 | {"vocab_size": 264})}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_as_they_come_are_trained_and_leave_as_sdar(policies, tmp_path, capsys, monkeypatch, kind):
    import transformers
    short_runs(monkeypatch)
    given, lacks, changes = KINDS[kind]
    folder, out = changed_copy(policies(4).folder, tmp_path / "source", lacks, **changes), tmp_path / "out" / "sft"
    (folder / "README.md").write_bytes(b"\xff\r\n")
    (folder / "subfolder").mkdir()
    if kind == "sdar with its program":
        (folder / "modeling_sdar.py").write_text("raise SystemExit('executed')")
    if kind == "tied":
        changed_weights(folder, lambda w: without(w, "lm_head.weight"))
    if kind == "no mask token":
        without_mask_token(folder, 264)
    files = files_under(folder)
    B, mask_id = given or 4, 262 if kind == "no mask token" else policies(4).mask_id
    main("--stage sft --steps 1 --batch 2 --lr 1e-3", f"--block-size {B}" * bool(given), "--model", folder, "--out", out.parent)
    said = f"{folder}: its config.json does not say, so chosen here: mask_token_id {mask_id}, block_size {B}\n"
    assert (said in capsys.readouterr().out) == (lacks >= CHOICES)
    (line,), saved = metrics(out.parent, "sft"), dirl.read_json(out / "config.json")
    assert line["loss"] > 0 and line["grad_norm"] > 0
    assert saved | {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "mask_token_id": mask_id, "block_size": B,
                    "torch_dtype": "float32", "rope_theta": 30.0} == saved
    assert not {"dtype", "layer_types", "rope_parameters"} & set(saved)
    assert ("auto_map" in saved) == (kind == "sdar with its program")
    assert set(os.listdir(out)) == set(map(str, files))
    changed = ["config.json", "model.safetensors"] + (["tokenizer.json", "tokenizer_config.json"] if mask_id == 262 else [])
    assert without(files_under(out), *map(Path, changed)) == without(files, *map(Path, changed))
    assert transformers.PreTrainedTokenizerFast.from_pretrained(out).mask_token_id == mask_id
    c = flags("--block-size", B)
    again, before = (dirl.load_policy(str(x), c) for x in (out, folder))
    assert (again.B, again.mask_id, again.eos_id, again.end_id) == (B, mask_id, before.eos_id, before.end_id)
    assert again.model.config.rope_parameters == before.model.config.rope_parameters and again.config == saved
    assert again.model.config._attn_implementation == "dirl"
    warned = "plain Qwen3, no block diffusion model yet" in capsys.readouterr().out
    assert warned == (changes.get("model_type") == "qwen3")         # and what was saved is one
    assert torch.equal(again.example(chat("1+1", "2"))[0], before.example(chat("1+1", "2"))[0])
    assert not any(torch.equal(a, b) for a, b in zip(again.model.parameters(), before.model.parameters(), strict=True))
    dirl.save_policy(before, str(tmp_path / "copy"))                # untrained, it is the same policy
    copied = dirl.load_policy(str(tmp_path / "copy"), c)
    was, written = weights_of(folder), weights_of(tmp_path / "copy")
    assert written.keys() == was.keys() == weights_of(out).keys() and all(torch.equal(written[x], was[x]) for x in was)
    assert ("lm_head.weight" in was) == (kind != "tied") and "model.layers.0.self_attn.q_norm.weight" in was
    assert kind != "sdar" or (tmp_path / "copy" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    pos = torch.arange(16)[None]
    mask = (pos[0] // B <= pos[0, :, None] // B)[None, None]
    assert torch.equal(copied.hidden(pos, pos, mask), before.hidden(pos, pos, mask))
    if "rope" in kind:                                              # as transformers itself reads it
        native = transformers.Qwen3Config(rope_parameters=changes["rope_parameters"]).rope_parameters
        assert native.items() <= copied.model.config.rope_parameters.items()


def test_no_thinking_closes_the_think_of_a_template(policies, tmp_path, monkeypatch):
    """The rule of Qwen3's template: enable_thinking=False, and only it, puts a closed <think> at the prompt's end."""
    short_runs(monkeypatch)
    folder, forward_tokens = changed_copy(policies(4).folder, str(tmp_path / "model")), []
    with open(os.path.join(folder, "chat_template.jinja"), "a") as template:
        template.write("{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
                       "<think>\n\n</think>\n\n{% endif %}")
    for out, argv in (tmp_path / "0", ()), (tmp_path / "1", ("--no-thinking",)):
        policy = dirl.load_policy(folder, flags(*argv))
        text = policy.tokenizer.decode(policy.prompt(chat("1+1", "2")[:1]))
        assert text == "<|user|>1+1<|im_end|><|assistant|>" + ("<think>\n\n</think>\n\n" if argv else "")
        tokens, P = policy.example(chat("1+1", "2"))
        assert policy.tokenizer.decode(tokens[:P]) == text and policy.tokenizer.decode(tokens[P:]).startswith("2<|im_end|>")
        main("--stage sft --steps 1 --batch 2", "--model", folder, "--out", out, *argv)
        forward_tokens.append(metrics(out, "sft")[0]["forward_tokens"])
    assert forward_tokens[0] < forward_tokens[1]


SHORT = {"sft": "--stage sft --seed 0 --steps 1 --lr 1e-3 --batch 2",
         "rl": "--stage rl --seed 0 --steps 1 --lr 1e-3 --prompts 3 --group-size 4 --max-new-tokens 24"}
FLAGS = [  # stage, flag, two values that must differ in something (-: not given, +: given), and what else is given
    "rl seed 0 1", "rl steps 1 2", "rl lr 1e-3 1e-2", "rl temperature 1 2", "rl max-tokens 64 512", "sft batch 2 3",
    "rl max-length 200 300 --data data.jsonl", "rl prompts 2 3", "rl group-size 4 5", "rl max-new-tokens 12 24",
    "sft block-size 2 4 --model tiny", "rl unmask dynamic static", "rl tokens-per-step 1 2 --unmask static",
    "rl threshold 0.3 0.9", "rl confidence top1 drawn --unmask static --temperature 2", "rl slots 3 256",
    "rl objective eq7 eq6", "rl eps 0.01 0.2 --updates 3 --lr 0.1", "rl eps-high 0.01 0.2 --updates 3 --lr 0.01",
    "rl beta 0 1 --objective eq7 --updates 2", "rl adv-std - +", "rl updates 1 2", "rl importance - 0.5",
    "rl reward flat:reward flat:length", "rl data - data.jsonl", "sft recipe - paper --data chats.jsonl", "rl model - other",
    "rl no-thinking - + --model thinks", "rl stage sft rl --batch 2"]


def test_every_flag_changes_something(checkpoint, policies, tmp_path, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("flags"))
    short_runs(monkeypatch)
    Path("flat.py").write_text("def reward(answer, truth):\n    return 1\ndef length(answer, truth):\n    return len(answer)\n")
    jsonl("data.jsonl", *("?" * (100 + 20 * n) for n in range(6)), answer="#### 3")
    jsonl("chats.jsonl", *({"messages": chat("?" * n, "!")} for n in (10, 500)))
    os.symlink(policies(4).folder, "other")
    shutil.copytree(checkpoint, "thinks")
    with open("thinks/chat_template.jinja", "a") as template:
        template.write("{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}0{% endif %}")
    in_tests_of_their_own = set("out engine engine-memory sleep save-every resume eval-data eval-every samples prompt".split())
    assert {x.split()[1] for x in FLAGS} == {name.replace("_", "-") for name in vars(flags())} - in_tests_of_their_own
    known = {}

    def outcome(stage, *argv):
        """Everything a short run leaves: printed lines, metrics without seconds, weights, and how often the model ran. Runs
        whose flags all have the same values are one run."""
        argv = words("--model", checkpoint, SHORT[stage], *argv)
        same = str(dirl.parse_flags(argv))
        if same in known:
            return known[same]
        out, calls = tmp_path / str(len(os.listdir(tmp_path))), []
        with monkeypatch.context() as patch:
            patch.setattr(dirl.Policy, "score", noting(calls, "score", dirl.Policy.score))
            patch.setattr(dirl, "decode", noting(calls, "decode", dirl.decode))
            main("--out", out, *argv)
        stage = dirl.parse_flags(argv).stage
        known[same] = {
            "metrics": without_seconds(out, stage), "config": (out / stage / "config.json").read_text(),
            "weights": float(sum(w.double().abs().sum() for w in weights_of(out / stage).values())),
            "printed": capsys.readouterr().out.replace(str(out), "OUT"), "calls": Counter(calls)}
        return known[same]
    for stage, name, *values, besides in (re.fullmatch(r"(\w+) (\S+) (\S+) (\S+)(.*)", x).groups() for x in FLAGS):
        given = [{"-": "", "+": f"--{name}"}.get(x, f"--{name} {x}") for x in values]
        a, b = (outcome(stage, besides.strip(), x) for x in given)
        if name == "reward":
            assert a["metrics"][0]["reward"] != b["metrics"][0]["reward"]
        elif name in ("max-tokens", "slots"):                       # how the work is cut must not show in the result
            assert a["calls"] != b["calls"] and abs(a["weights"] - b["weights"]) < 1e-4 * a["weights"], name
            assert a["metrics"][0]["reward"] == b["metrics"][0]["reward"], name
        elif name in ("recipe", "max-length"):
            assert a["printed"] != b["printed"] or a["metrics"] != b["metrics"], name
        else:
            assert a["metrics"] != b["metrics"] or a["config"] != b["config"], name
    once = outcome("rl")
    known.clear()
    assert outcome("rl") == once                                    # and a run repeats itself bit for bit


def test_sleep_frees_the_engine_between_rollouts_and_new_weights(checkpoint, tmp_path, monkeypatch):
    """With --sleep: after the rollouts of a step, until the weights have moved; without it, never."""
    short_runs(monkeypatch, held_out=2)
    calls = []

    class Engine(dirl.TorchEngine):
        generate = noting(calls, "rollout", dirl.TorchEngine.generate)
        sleep = noting(calls, "sleep")
        update_weights = noting(calls, "weights")
    monkeypatch.setattr(dirl, "gpu_memory", lambda: 2**37)
    monkeypatch.setattr(dirl, "LMDeployEngine", Engine)
    monkeypatch.setattr(dirl, "optimizer_step", noting(calls, "step", dirl.optimizer_step))
    for more, expected in ((["--sleep"], ["rollout", "rollout", "sleep", "step", "weights", "rollout"]),
                           ([], ["rollout", "rollout", "step", "weights", "rollout"])):
        calls.clear()
        main("--steps 1 --prompts 4 --group-size 4 --engine lmdeploy", *more, "--model", checkpoint,
             "--out", tmp_path / str(len(more)))
        assert calls == expected
    calls.clear()                                                   # asleep too while moments, and gradients, are loaded
    monkeypatch.setattr(dirl, "resume", noting(calls, "resume", dirl.resume))
    main("--steps 2 --prompts 4 --group-size 4 --engine lmdeploy --sleep --resume", "--model", checkpoint,
         "--out", tmp_path / "1")
    assert calls == ["sleep", "resume", "weights", "rollout", "sleep", "step", "weights", "rollout"]


def test_recipe_sets_the_papers_values_and_flags_override_them():
    sft, rl = flags("--recipe", "paper", stage="sft"), flags("--recipe", "paper", "--lr", "2e-6")
    assert (sft.steps, sft.lr, sft.batch, sft.max_length) == (100, 1e-5, 512, 8192)
    assert (rl.steps, rl.lr, rl.prompts, rl.group_size, rl.max_new_tokens) == (40, 2e-6, 128, 32, 8192)
    assert flags("--eps", 0.1).eps_high == 0.1 and flags("--eps-high", 0.28).eps == 0.2
    real = flags("--model", "somewhere")
    assert (real.prompts, real.group_size, real.max_new_tokens) == (8, 8, 2048)


def test_learning_rate(monkeypatch):
    c = flags("--steps", 30, "--lr", 1, stage="sft")
    rates = [dirl.learning_rate(c, step) for step in range(1, 31)]
    assert rates[:11] == [0.1 * n if n < 3 else n / 10 for n in range(1, 11)] + [1.0]
    assert all(a > b > 0 for a, b in zip(rates[10:], rates[11:])) and rates[-1] < 0.05
    monkeypatch.setattr(dirl, "WARMUP", 2)
    assert [dirl.learning_rate(flags("--steps", 10, "--lr", 1), step) for step in (1, 2, 3, 10, 99)] == [0.5, 1, 1, 1, 1]
    monkeypatch.setattr(dirl, "WARMUP", 0)
    assert dirl.learning_rate(flags("--lr", 1), 1) == dirl.learning_rate(flags("--lr", 1, stage="sft"), 1) == 1


def bad_inputs(checkpoint, folder):
    """[(flags, what the line must name)]; the files that they name are written into a folder."""
    config = without(dirl.read_json(os.path.join(checkpoint, "config.json")), "tiny")
    names_its_flag = [
        "--step 3", "--steps many", "--steps -1", "--lr nan", "--lr -1e-3", "--objective eq9", "--group-size 1", "--beta 0.1",
        "--tokens-per-step 3", "--temperature 0", "--importance 0", "--importance 2 --objective eq6",
        "--importance 2 --confidence drawn", "--engine-memory 2", "--confidence top2", "--unmask random", "--sleep",
        "--stage dpo", "--prompts 0", "--save-every 0", "--seed 1.5", "--recipe mine", "--eps inf", "--reward nothing",
        "--reward json:nothing", "--reward no.module:f", "--block-size 0", "--samples -1", "--eval-every 0", "--resume",
        "--engine " + ("vllm" if torch.cuda.is_available() else "lmdeploy"), "--out file/run"]
    names_another = {
        "extra": "extra", "--no-thinking 3": "3", "--stage eval": "--model", "--stage show": "--model",
        "--eval-data x.jsonl": "--data", "--stage eval --model x --data y --eval-data z": "--eval-data",
        "--data good.jsonl --eval-data list.jsonl": "--eval-data", "--data nowhere.jsonl": "nowhere.jsonl",
        "--data bytes.jsonl": "bytes.jsonl", "--data .": "--data .: ", "--model nowhere": "nowhere", "--model .": "config.json",
        "--model json": "config.json", "--model good --block-size 8": "--block-size 8",
        "--model good --tokens-per-step 3": "--tokens-per-step"}
    good = '{"question": "a", "answer": "1"}\n'
    data = {  # flags: (the text of the file at their end, what the line names)
        "--data broken.jsonl": (good + "{", "broken.jsonl: 1 of 2 records are bad, the first is number 2"),
        "--data empty.jsonl": ("", "no records"), "--data list.jsonl": ("[1]", "number 1"),
        "--data number.json": ("3", "number.json"), "--data names.jsonl": ('{"ask": "a", "answer": "1"}', "number 1"),
        "--data no.jsonl": (good + '{"question": "a"}', "number 2"),
        "--data null.jsonl": (good + '{"question": null, "answer": "1"}', "number 2"),
        "--data blank.jsonl": ('{"question": "a", "answer": "####"}', "number 1"),
        "--stage sft --data chat.json": ('[{"messages": []}]', "number 1"),
        "--stage sft --data pair.json": ('[{"question": "a"}]', "number 1"),
        "--stage sft --data role.json": ('[{"messages": [{"role": "user"}]}]', "number 1"),
        "--stage sft --data user.json": ('[{"messages": [{"role": "user", "content": "a"}]}]', "number 1")}
    models = [  # (what config.json says otherwise, what the line names)
        (dict(model_type="sdar_moe"), "sdar_moe"), (dict(model_type="qwen3", num_experts=8), "only dense Qwen3"),
        (dict(model_type="qwen2"), "'qwen2'"), (dict(model_type=None), "model_type None"),
        (dict(mask_token_id=262), "mask_token_id 262"), (dict(mask_token_id=[261]), "mask_token_id [261]"),
        (dict(eos_token_id=[]), "eos_token_id"),
        (dict(hidden_size="wide"), "hidden_size"), (dict(torch_dtype="float17"), "float17"), (dict(torch_dtype="nn"), "'nn'"),
        (dict(model_type="a2d-qwen3", block_size=None), "--block-size"), (dict(use_sliding_window=True), "sliding"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding")]
    texts = {"file": "kept", "good.jsonl": good, "json/config.json": "[1, 2]", "good/config.json": json.dumps(config)}
    texts |= {line.split()[-1]: text for line, (text, _) in data.items()}
    for i, (changes, _) in enumerate(models):
        texts[f"{i}/config.json"] = json.dumps({name: x for name, x in (config | changes).items() if x is not None})
    for name, text in texts.items():
        os.makedirs((folder / name).parent, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bytes.jsonl").write_bytes(b'{"question": "\xff"}')
    return [*((line, line.split()[0]) for line in names_its_flag), *names_another.items(),
            *((line, culprit) for line, (_, culprit) in data.items()),
            *((f"--model {i}", culprit) for i, (_, culprit) in enumerate(models))]


def test_bad_input_is_one_line_and_exit_code_2(policies, tmp_path, monkeypatch, capfd):
    """Nothing is written or lost."""
    monkeypatch.chdir(tmp_path)
    short_runs(monkeypatch)
    cases = bad_inputs(policies(4).folder, tmp_path)
    before = files_under(tmp_path)
    for line, culprit in cases:
        assert culprit in refused(capfd, *line.split(), quiet=True), line
    assert files_under(tmp_path) == before and len(cases) == 72


def test_bad_input_in_processes_of_its_own(tmp_path):
    """Of which one looks at what was imported for it: transformers takes seconds; and of torchrun, whose ranks say it once."""
    asked = "import sys, dirl\ntry:\n    dirl.main(['--data', 'no.jsonl'])\nfinally:\n    print('transformers' in sys.modules)"
    code, out, err = finished([sys.executable, "-c", asked], cwd=tmp_path)
    assert code == 2 and out == "False\n" and err.count("\n") == 1 and "--data no.jsonl" in err
    code, _, err = finished(torchrun(2, "--objective eq9"), cwd=tmp_path)
    assert code != 0 and err.count("dirl.py: error: argument --objective: invalid choice: 'eq9'") == 1


WEIGHTS, TEMPLATE = "model.safetensors", "chat_template.jinja"
BROKEN = {  # what is wrong: (the file, what is done to it, what the line names)
    "no tokenizer": ("tokenizer.json", os.remove, "no tokenizer"),
    "a torn tokenizer": ("tokenizer.json", lambda path: os.truncate(path, 100), ""),
    "no weights": (WEIGHTS, os.remove, WEIGHTS),
    "weights cut off": (WEIGHTS, lambda path: os.truncate(path, path.stat().st_size - 100), ""),
    "empty weights": (WEIGHTS, lambda path: os.truncate(path, 0), ""),
    "weights that are text": (WEIGHTS, lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ""),
    "a tensor too few": (WEIGHTS, lambda path: changed_weights(path.parent, lambda w: without(w, "model.norm.weight")),
                         "missing keys in its weights: model.norm.weight"),
    "a tensor too many": (WEIGHTS, lambda path: changed_weights(path.parent, lambda w: w | {"extra": torch.ones(2)}),
                          "unexpected keys in its weights: extra"),
    "a tensor of another shape": (WEIGHTS, lambda path: changed_weights(path.parent, lambda w: w | {
        "model.norm.weight": torch.ones(64)}), "model.norm.weight"),
    "a torn chat template": (TEMPLATE, lambda path: path.write_text("{% for m in messages %}"), ""),
    "no chat template": (TEMPLATE, os.remove, "chat_template"),
    "a chat template without end of turn": (TEMPLATE, lambda path: path.write_text("{{ messages[-1].content }}"), ""),
    "a chat template without the answer": (TEMPLATE, lambda path: path.write_text("{{ messages[0].content }}"), ""),
    "a chat template that refuses": (TEMPLATE, lambda path: path.write_text("{{ raise_exception('not you') }}"), "not you"),
    "more tokens than the embedding has": ("config.json", lambda path: dirl.write_json(path, dirl.read_json(path) | {
        "vocab_size": 261}), "token id 261: the embedding has room for 261"),
    "heads of another number": ("config.json", lambda path: dirl.write_json(path, dirl.read_json(path) | {
        "num_key_value_heads": 3}), "k_proj.weight"),
    "heads of no number": ("config.json", lambda path: dirl.write_json(path, without(
        dirl.read_json(path), "num_attention_heads")), "mismatched keys in its weights"),
    "no room for a mask token": ("config.json", lambda path: without_mask_token(path.parent, 262), "room for 262")}


@pytest.mark.parametrize("wrong", BROKEN)
def test_a_broken_checkpoint_is_one_line_and_exit_code_2(policies, tmp_path, capfd, monkeypatch, wrong):
    short_runs(monkeypatch)
    (file, do, culprit), folder, out = BROKEN[wrong], tmp_path / "model", tmp_path / "out"
    changed_copy(policies(4).folder, folder, ["mask_token_id"] * (wrong == "no room for a mask token"))
    do(folder / file)
    line = refused(capfd, "--stage sft --steps 1 --batch 1", "--model", folder, "--out", out, quiet=True)
    assert line.startswith(f"--model {folder}: ") and culprit in line and sorted(os.listdir(out)) == [".lock", "sft.run.json"]


def test_what_cannot_be_asked_or_written_is_one_line(policies, tmp_path, capsys, monkeypatch):
    """Text that is no UTF-8, prompts that are all too long, an OUT that has been evaluated."""
    monkeypatch.chdir(tmp_path)
    for name, question in (("half", "\ud800"), ("long", "x" * 500), ("good", "x")):
        jsonl(f"{name}.jsonl", question)
    with pytest.raises(SystemExit), dirl.in_one_line("here"):
        raise ValueError("two\n  lines")
    assert capsys.readouterr().err == "dirl.py: error: here: two lines\n"
    model = "--model", policies(4).folder
    evaluate = *model, "--stage eval --max-new-tokens 4 --out out --data"
    for argv, culprit in (((*model, "--stage show", "--prompt", "\udcff"), "--prompt"),
                          ((*evaluate, "half.jsonl"), "half.jsonl"), ((*evaluate, "long.jsonl"), "--max-length")):
        assert culprit in refused(capsys, *argv)                    # and leaves nothing that the next one could not begin in
    main(*evaluate, "good.jsonl")
    before = Path("out/eval.jsonl").read_text()
    assert "--resume" in refused(capsys, *evaluate, "good.jsonl") and Path("out/eval.jsonl").read_text() == before
    main(*evaluate, "good.jsonl", "--resume")
    assert Path("out/eval.jsonl").read_text() == before


def test_help_names_the_papers_values_and_the_defaults_under_the_flags_given(capsys):
    for stage in ("sft", "rl"):
        with pytest.raises(SystemExit) as stop:
            main(f"--stage {stage} --help")
        said = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0 and "paper: 0.9 (default: 0.9)" in said and "Eq. 6, 7 or 8; paper: eq8 (default: eq8)" in said
        assert f"paper: sft 1e-5, rl 1e-6 (default: {dirl.PRESETS[f'tiny {stage}']['lr']})" in said


def test_sft_on_chats_then_rl_on_problems_with_python(tmp_path, capsys, monkeypatch):
    """`python dirl.py` from file data: skipped records are counted, finished stages are left alone."""
    monkeypatch.chdir(tmp_path)
    short_runs(monkeypatch)
    chats = [*(chat("x" * n, "yes") for n in (5, 10, 200, 15)), chat("<|MASK|>", "no")]
    Path("chats.json").write_text(json.dumps([{"messages": x} for x in chats]))
    jsonl("gsm8k.jsonl", *("a" * n for n in (3, 50, 400)), answer="#### 2")
    main("--stage sft --data chats.json --out run --steps 2 --batch 3 --max-length 64")
    assert "chats.json: 4 of 10 records passed over" in capsys.readouterr().out and len(metrics("run", "sft")) == 2
    rl = "--model run/sft --data gsm8k.jsonl --prompts 1 --group-size 2 --max-new-tokens 4 --max-length 300 --out run"
    main(rl, "--stage rl --steps 3")
    said = capsys.readouterr().out
    assert "gsm8k.jsonl: 1 of 4 records passed over" in said and said.endswith("all of it is in run\n")
    line = metrics("run", "rl")[0]                                  # every group flat: no step, null
    assert line["loss"] is None and line["grad_norm"] is None and line["groups_dropped"] == 1 and line["reward"] == 0
    before = files_under(tmp_path)
    assert "--out run: it holds rl up to step 3: --resume" in refused(capsys, rl, "--stage rl --steps 4")
    assert files_under(tmp_path) == before
    assert "--block-size 8" in refused(capsys, "--stage sft --model run/sft --block-size 8 --out other")


@pytest.mark.parametrize("objective", ["eq6", "eq7", "eq8"])
def test_the_second_update_moves_the_ratio(objective, checkpoint, tmp_path, monkeypatch):
    """With hardly an ε, C_ε holds nothing at the first update (Eq. 6: beyond rounding) and something at the second."""
    monkeypatch.setattr(dirl, "WARMUP", 0)
    monkeypatch.setattr(dirl, "HELD_OUT", 0)
    clipped = {}
    for updates in (1, 2):
        out = str(tmp_path / f"{updates}")
        dirl.main(["--model", checkpoint, "--out", out, "--objective", objective, "--eps", "1e-4",
                   "--steps", "1", "--prompts", "4", "--group-size", "4", "--updates", str(updates)])
        clipped[updates] = metrics(out, "rl")[0]["clip_fraction"]
    assert clipped[1] == 0 and clipped[2] > 0.1


# ---- what people's files, answers and runs do to it -------------------------------------------------------------------

THINKS = ("{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}<|{{ m.role }}|>"
          "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")             # as SDAR's: thoughts of earlier turns are dropped


@pytest.mark.parametrize("extra, good", [
    ({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, False), ({"function_call": {"name": "f"}}, False),
    ({"reasoning_content": "hm"}, False), ({"thinking": ["", {"text": "hm"}]}, False), ({"reasoning_content": " "}, True),
    ({"tool_calls": [], "function_call": None, "weight": 1, "train": True}, True)])
def test_text_that_would_get_lost_makes_a_bad_record(extra, good):
    system = {"role": "system", "content": "be brief"}
    for at in range(3):
        messages = [system, *chat("q", "a")]
        messages[at] = messages[at] | extra
        record = {"messages": [*messages, {"role": "user", "content": "more", "name": "what follows the answer is cut"}]}
        if good:
            assert dirl.read_chat(record) == [system, *chat("q", "a")]
        else:
            with pytest.raises(ValueError):
                dirl.read_chat(record)
    for answer in ("", " \n"):
        with pytest.raises(ValueError):
            dirl.read_chat({"messages": chat("q", answer)})


def test_a_message_that_the_template_leaves_out_makes_a_record_unusable(policies, tmp_path, capsys, monkeypatch):
    short_runs(monkeypatch)
    folder = changed_copy(policies(4).folder, str(tmp_path / "model"))
    Path(folder, "chat_template.jinja").write_text(THINKS)
    developer = {"role": "developer", "content": "Answer in French."}
    thoughts = [*chat("q", "<think>hm</think>a"), *chat("more", "b")]
    records = [chat("q", "a"), [developer, *chat("q", "a")], thoughts, [*chat("q", "a"), developer, *chat("q", "a")]]
    c, policy = flags("--stage", "sft", "--model", folder), dirl.load_policy(folder, flags("--stage", "sft"))
    found = [dirl.encode(policy, c, record) for record in records]
    assert [x is not None for x in found] == [True, False, True, False]
    assert "hm" not in policy.tokenizer.decode(found[2][0]) and policy.tokenizer.decode(found[2][0]).count("<|user|>") == 2
    jsonl(tmp_path / "chats.jsonl", *({"messages": x} for x in [*records, chat("?" * 500, "a")]))
    main("--stage sft --steps 3 --batch 3", "--model", folder, "--data", tmp_path / "chats.jsonl", "--out", tmp_path / "out")
    lines, said = metrics(tmp_path / "out", "sft"), capsys.readouterr().out
    assert lines[-1]["passed_over"] >= 9 and lines[0]["passed_over"] <= 6         # 9 of 4 or 5 epochs of 2 good in 5
    passed_over = lines[-1]["passed_over"]
    assert re.search(rf"chats.jsonl: {passed_over} of [12]\d records passed over: longer than --max-length 384", said)


@pytest.mark.parametrize("record, expected", [
    ({"question": None, "problem": "1+1?", "answer": "2"}, ("1+1?", "2")),
    ({"question": " ", "problem": "Q", "answer": 0}, ("Q", "0")),
    ({"question": 5, "problem": "Q", "answer": "2"}, ("Q", "2")), ({"question": "Q", "answer": 1e-05}, ("Q", "1e-05")),
    ({"question": "Q", "answer": math.nan, "solution": r"\boxed{7}"}, ("Q", "7")),
    ({"question": "Q", "ground_truth_answer": math.inf, "answer": " 3 "}, ("Q", "3")),
    ({"question": "Q", "ground_truth_answer": ["3"], "answer": "#### ", "solution": r"\boxed{4}"}, ("Q", "4"))])
def test_the_first_field_that_says_something_counts(record, expected):
    assert dirl.read_problem(record) == expected


def test_held_out_questions_are_never_trained_on(tmp_path, monkeypatch):
    """By their own hash: copies, order, other questions that are filtered and --max-length change nothing."""
    records = [(f"{'  ' * (i % 3)}{i} +\n {i % 7}", str(i)) for i in range(100)]
    kept, held_out = dirl.split(records * 2, [])
    asked = [" ".join(q.split()) for q, _ in held_out]
    assert len(asked) == len(set(asked)) == 10 and len(kept) == 180
    assert not set(asked) & {" ".join(q.split()) for q, _ in kept}
    assert sorted(dirl.split(records[::-1], [])[1]) == sorted(held_out)
    spaced = [(q.replace(" ", "   "), a) for q, a in records]
    assert [" ".join(q.split()) for q, _ in dirl.split(spaced, [])[1]] == asked
    assert set(dirl.split(records[:95], [])[1]) - set(held_out) == set() or len(dirl.split(records[:95], [])[1]) == 9
    assert dirl.split(records[:9], []) == (records[:9], [])         # fewer than ten distinct ones
    assert dirl.split(records[:9] * 3, [])[1] == []
    kept, held_out = dirl.split(records, [("99  + 1", "x")])        # those of --eval-data leave too
    assert len(kept) == 99 and held_out == [("99  + 1", "x")]
    jsonl(tmp_path / "a.jsonl", "1+1", "1 + 1")
    jsonl(tmp_path / "b.jsonl", "1+1", "1 + 1")
    monkeypatch.chdir(tmp_path)
    c = flags("--data", "a.jsonl", "--eval-data", "b.jsonl")
    with pytest.raises(SystemExit):
        dirl.read_data(c)


def test_end_tokens_of_both_files_stop(policies, tmp_path):
    for n, (config, generation, expected) in enumerate((
            ([256, 259], None, {256, 258, 259}), (256, [256, 260], {256, 258, 260}), (256, 261, {256, 258, 261}),
            ([259], [256], {256, 258, 259}))):
        folder = changed_copy(policies(4).folder, str(tmp_path / str(n)), eos_token_id=config)
        if generation:
            dirl.write_json(os.path.join(folder, "generation_config.json"), {"eos_token_id": generation})
        policy = dirl.load_policy(folder, flags())
        assert set(policy.stop_ids.tolist()) - {policy.end_id} == expected - {258} and policy.end_id in policy.stop_ids
        assert policy.eos_id == (config[0] if isinstance(config, list) else config)


def test_a_saved_folder_says_what_it_is(policies, tmp_path, capfd, monkeypatch):
    short_runs(monkeypatch)
    stale = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    source = changed_copy(policies(4).folder, tmp_path / "fp8", ["tie_word_embeddings"], quantization_config=stale)
    dirl.save_policy(dirl.load_policy(str(source), flags()), str(tmp_path / "saved"))
    config = dirl.read_json(tmp_path / "saved" / "config.json")
    assert "quantization_config" not in config and config["tie_word_embeddings"] is False and config["torch_dtype"] == "float32"
    changes = {"mask_token_id": 5}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, \
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 30.0, "factor": 2.0}}
    for n, (change, *culprits) in enumerate(zip(changes, ("mask_token_id is 5", "'dynamic'", "'longrope'"),
                                                (str(policies(4).mask_id), "length", "length"))):
        folder = changed_copy(policies(4).folder, tmp_path / str(n), **change)
        line = refused(capfd, "--stage sft --steps 1 --batch 1", "--model", folder, "--out", tmp_path / f"out{n}", quiet=True)
        assert all(culprit in line for culprit in culprits), line
    for folder in (Path(policies(4).folder), tmp_path / "masked"):  # as transformers 4 wants it: tried with 4.52.4
        if folder.name == "masked":
            without_mask_token(changed_copy(policies(4).folder, tmp_path / "plain", ["mask_token_id"], vocab_size=264), 264)
            dirl.save_policy(dirl.load_policy(str(tmp_path / "plain"), flags()), str(folder))
        config = dirl.read_json(folder / "tokenizer_config.json")
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["mask_token"] == "<|MASK|>"
        assert not isinstance(config.get("extra_special_tokens", {}), list)
        assert "<|im_end|>" in config["additional_special_tokens"]


def test_moments_do_not_depend_on_who_looks_at_them(policies):
    """Saving before the first step would make torch take one, with gradients of zero, that counts."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    moved = []
    for looks in (False, True):
        policy = copy.deepcopy(policies(4))
        optimizer = dirl.make_optimizer(policy, flags("--lr", 1e-3))
        if looks:
            get_state_dict(policy.model, optimizer)
        for weight in policy.model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved.append([weight.detach().clone() for weight in policy.model.parameters()])
        assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    assert all(torch.equal(a, b) for a, b in zip(*moved))


def test_a_walk_goes_on_where_it_was_whatever_the_batch(policies, tmp_path, capsys, monkeypatch):
    short_runs(monkeypatch)
    walked, encode, out = [], dirl.encode, tmp_path / "out"
    monkeypatch.setattr(dirl, "encode", lambda policy, c, record: (walked.append(record), encode(policy, c, record))[1])
    jsonl(tmp_path / "chats.jsonl", *({"messages": chat("?" * (500 * (n % 4 == 0) + n), "a")} for n in range(40)))
    argv = "--stage sft --save-every 2 --model", policies(4).folder, "--data", tmp_path / "chats.jsonl"
    main(*argv, "--steps 4 --batch 9 --out", tmp_path / "whole")
    whole, total = walked[:], metrics(tmp_path / "whole", "sft")[-1]["passed_over"]
    walked.clear()
    main(*argv, "--steps 2 --batch 9 --out", out)
    main(*argv, "--steps 5 --batch 6 --resume --out", out)          # 18 and 18 examples, as 36 before
    assert walked == whole and len(whole) == 36 + total             # a record is encoded when its turn comes, once
    assert metrics(out, "sft")[-1]["passed_over"] == total > 0
    line = refused(capsys, *argv, "--steps 3 --resume --out", out)
    assert line == f"dirl.py: error: --steps 3: {out} holds sft up to step 5 already".removeprefix("dirl.py: error: ")
    jsonl(tmp_path / "long.jsonl", *({"messages": chat("?" * (500 + n), "a")} for n in range(7)))
    line = refused(capsys, *argv[:-1], tmp_path / "long.jsonl", "--steps 1 --out", tmp_path / "none")
    assert "long.jsonl: 7 of 7 records passed over: longer than --max-length 384" in line


def test_rewards_of_any_size():
    """Rounding is no difference, large rewards and small ones are; and neither an infinite ratio nor a far reference is a NaN."""
    for rewards, mixed in (([0.1 + 0.2] * 3 + [0.3] * 3, False), ([1e8, 1e8 + 1, 1e8 + 2, 1e8 + 3], True), ([0.0] * 4, False),
                           ([1e-30, 2e-30], True), ([-1e8, -1e8 - 1e-3], False), ([0, 1], True)):
        assert dirl.is_mixed(rewards) == mixed
        A = dirl.advantage(torch.tensor([rewards], dtype=torch.float64), True)[0]
        assert (A != 0).any() == mixed and A.isfinite().all() and A.abs().max() < 2
    A = dirl.advantage(torch.tensor([[1e8, 1e8 + 1, 1e8 + 2, 1e8 + 3]], dtype=torch.float64))
    assert A.tolist() == [[-1.5, -0.5, 0.5, 1.5]]
    assert dirl.advantage(torch.full((1, 3), 0.1), True).tolist() == [[0.0] * 3]        # float32, whose mean is rounded
    for name, sign in itertools.product(("eq6", "eq7", "eq8"), (1.0, 0.0, -1.0)):
        logp, one = torch.zeros(2, requires_grad=True), torch.ones(2)
        J, clipped = J_of(name, logp, torch.tensor([-100.0, -0.1]), sign * one, 0.5 * one, torch.tensor([0, 1]))
        gradient, = torch.autograd.grad(J, logp)
        if sign > 0:
            assert clipped.tolist() == [True, False] and float(J.detach()) == pytest.approx(0.5 * (1.2 + math.exp(0.1)))
            assert gradient.tolist() == [0.0, pytest.approx(0.5 * math.exp(0.1))]
        else:
            assert (J == 0 and (gradient == 0).all()) if sign == 0 else (J == -math.inf and not gradient.isfinite().all())
    logp = torch.zeros(3, requires_grad=True)
    gradient, = torch.autograd.grad(dirl.kl_term(logp, torch.tensor([50.0, -50.0, 1e-4])).sum(), logp)
    assert gradient.tolist() == pytest.approx([-50.0, 50.0, -1e-4])


def test_nodes_of_unequal_size_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(dirl.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dirl.dist, "init_process_group", lambda *args, **more: None)
    monkeypatch.setattr(dirl, "gather", lambda ranks: [2, 2, 1])
    with pytest.raises(SystemExit) as end:
        dirl.start_ranks()
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- the GPU path's costs, as far as a CPU sees them --------------------------------------------------------------------

def test_the_recipe_sleeps_on_small_cards_only(policies, monkeypatch):
    monkeypatch.setattr(dirl, "gpu_memory", lambda: 141e9)
    for memory, argv, expected in (
            (80e9, [], (True, 0.7)), (141e9, [], (False, 0.4)), (80e9, ["--engine", "torch"], (False, 0.4)),
            (80e9, ["--stage", "sft"], (False, 0.4)), (80e9, ["--engine-memory", 0.5], (True, 0.5))):
        monkeypatch.setattr(dirl, "gpu_memory", lambda: memory)
        c = flags("--model", "somewhere", "--recipe", "paper", *argv)
        assert (c.sleep, c.engine_memory) == expected
    monkeypatch.setattr(dirl, "gpu_memory", lambda: 80e9)
    assert not flags("--model", "somewhere").sleep


def test_long_rows_are_padded_little():
    """Documents of 600 to 36,600 tokens, in rows of 16,384 and beyond: at most 7% is padding, in at most 24 lengths."""
    g, used, padded, lengths = torch.Generator().manual_seed(0), 0, 0, set()
    for _ in range(200):
        documents = (600 * (torch.rand(64, generator=g) * math.log(61)).exp()).long().tolist()
        rows, capacity = dirl.deal(documents, 16384)
        for row in rows:
            n = sum(documents[i] for i in row)
            used, padded = used + n, padded + dirl.row_length(n, capacity)
            lengths.add(dirl.row_length(n, capacity))
    print(f"padding {padded / used - 1:.3f}, {len(lengths)} lengths")
    assert padded / used - 1 <= 0.07 and len(lengths) <= 24


def test_a_temperature_of_one_divides_nothing(monkeypatch):
    logits, divided = torch.randn(2, 5), []
    monkeypatch.setattr(torch.Tensor, "__truediv__", lambda x, y: divided.append(y) or torch.div(x, y))
    plain = dirl.log_policy(logits, 1.0, 4)
    assert divided == [] and torch.equal(plain, dirl.log_policy(2 * logits, 2.0, 4)) and divided == [2.0]


def test_ranks_send_each_other_small_trajectories(policies):
    policy = copy.copy(policies(4))
    policy.stop_ids = torch.tensor([policy.mask_id])                # a long output
    made, = dirl.decode(policy, [[5] * 9], [(0, 0)], flags("--max-new-tokens", 1000, "--threshold", 0))
    assert made.output.dtype == made.prompt.dtype == torch.int32 and made.steps.dtype == torch.int16 and len(made.output) == 1003
    assert len(pickle.dumps(made)) < 10 * 1003 + 3000


# ---- evaluation -----------------------------------------------------------------------------------------------------

def table_by_hand(lines):
    """Table 1's columns from lines of eval.jsonl."""
    means = [statistics.mean(line["reward"] for line in lines if line["problem"] == i) for i in {x["problem"] for x in lines}]
    return [statistics.mean(means), statistics.stdev(means) / math.sqrt(len(means)),
            sum(x["tokens"] for x in lines) / sum(x["decoding_steps"] for x in lines),
            statistics.mean(x["length"] for x in lines), statistics.mean(x["truncated"] for x in lines)]


def assert_printed(text, lines):
    """The table in a text is that of the lines, as far as it has digits. Returns what it says of the decoding rule."""
    rows = [line.split() for line in text.splitlines() if line.startswith(("static", "dynamic"))]
    (rule, value, *row), = rows
    for a, b, digits in zip(row, table_by_hand(lines), (3, 3, 2, 1, 3), strict=True):
        assert abs(float(a) - b) <= 0.51 * 10**-digits
    return f"{rule} {value}"


def test_eval_table_equals_its_answers_on_any_number_of_ranks(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short_runs(monkeypatch, held_out=60)
    argv, speed = ["--stage eval --model", checkpoint], []
    for name in ("static 1", "dynamic 0.3", "dynamic 0.5", "dynamic 0.7", "dynamic 0.9"):
        rule, threshold = name.split()
        main(*argv, f"--unmask {rule}", f"--threshold {threshold}" if rule == "dynamic" else "", "--out", name)
        lines = lines_of(name, "eval.jsonl")
        assert assert_printed(capsys.readouterr().out, lines) == name and len(lines) == 60
        assert sorted(os.listdir(name)) == [".lock", "eval.jsonl", "eval.run.json"]
        assert all(dirl.arithmetic_reward(line["answer"], line["truth"]) == line["reward"] for line in lines)
        assert all(len(line["answer"]) == line["length"] <= line["tokens"] for line in lines if not line["truncated"])
        speed.append(table_by_hand(lines)[2])
    assert speed[0] == 1 and speed[1] > speed[2] > speed[3] > speed[4] > 1                # fewer at a time, the surer one must be
    on_ranks((2, 1, "short_mains", 60, words(*argv, "--out two")))
    assert Path("dynamic 0.9/eval.jsonl").read_text() == Path("two/eval.jsonl").read_text()
    main(*argv, "--samples 3 --max-new-tokens 12")                                        # a folder of its own
    lines = lines_of("runs/eval-0/eval.jsonl")
    assert set(lines[0]) == set("step problem sample question truth answer reward truncated length tokens decoding_steps".split())
    assert_printed(capsys.readouterr().out, lines)
    assert [line["sample"] for line in lines[:6]] == [0, 1, 2, 0, 1, 2] and any(line["truncated"] for line in lines)
    assert any(len({line["answer"] for line in lines if line["problem"] == i}) > 1 for i in range(60))


def test_rl_evaluates_on_its_way(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jsonl("train.jsonl", *("?" * n for n in range(1, 12)))
    jsonl("test.jsonl", *("!" * n for n in range(1, 5)))
    short_runs(monkeypatch, held_out=2)
    argv = ["--out run --model", checkpoint]
    main(*argv, "--stage eval --unmask sequential")
    before = Path("run/eval.jsonl").read_text()
    assert "sequential 1 " in capsys.readouterr().out and before.count("\n") == 2
    main(*argv, "--data train.jsonl --eval-data test.jsonl --eval-every 2 --samples 2",
         "--steps 3 --prompts 2 --group-size 2 --max-new-tokens 8 --save-every 2")
    assert Path("run/eval.jsonl").read_text() == before
    lines, every = lines_of("run/rl.eval.jsonl"), lines_of("run/rl.metrics.jsonl")
    assert [line["step"] for line in every] == [0, 1, 2, 3]
    assert [line["step"] for line in every if "accuracy" in line] == [0, 2, 3]
    assert [(x["step"], x["problem"], x["sample"]) for x in lines[:8]] == [(0, i, g) for i in range(4) for g in range(2)]
    assert len(lines) == 3 * 4 * 2 and {x["question"] for x in lines} == {"!" * n for n in range(1, 5)}
    for line in (line for line in every if "accuracy" in line):
        found = [line[x] for x in ("accuracy", "standard_error", "eval_tokens_per_step", "eval_length", "eval_truncated")]
        assert found == pytest.approx(table_by_hand([x for x in lines if x["step"] == line["step"]]), rel=1e-5)
    assert "sampled accuracy 0.000 -> 0.000" in capsys.readouterr().out and len(metrics("run", "rl")) == 3


SHORT_RL = "--stage rl --steps 6 --lr 1e-3 --prompts 3 --group-size 4 --max-new-tokens 24 --eval-every 2 --save-every 2"


def test_show_is_the_trajectory(checkpoint, capsys):
    folder, c = checkpoint, flags()
    show = "--stage show --model", folder
    main(*show, "--prompt 4+2-1= --samples 1 --seed 3")
    lines = capsys.readouterr().out.splitlines()
    policy = dirl.load_policy(folder, c)
    prompt = policy.prompt(chat("4+2-1=", "")[:1])
    t, = dirl.decode(policy, [prompt], [(3, "show", 0, 0, 0)], c)
    shown, P = [line for line in lines if line[:5].strip().isdigit()], len(prompt)
    assert lines[0] == "4+2-1=" and len(shown) == t.decoding_steps
    assert f"{len(t.output)} tokens in {t.decoding_steps} dec" in lines[-1]
    for line, (k, s, seen, committed) in zip(shown, slow_states(policy, t)):
        assert line.split()[:2] == [str(k), str(s)]
        scores = [t.logp[p - P].exp().item() for p in committed for _ in range(2)]         # sampled, and scored
        assert [float(x) for x in re.findall(r"\d\.\d{3}", line)] == pytest.approx(scores, abs=6e-4)
        assert line.count("·") == (seen[k * 4:] == policy.mask_id).sum() - len(committed)
    for prompt in ("<|MASK|>", "1" * 500):                          # one that a model cannot be asked
        assert refused(capsys, *show, "--prompt", prompt).startswith("--prompt: 1 of 1 records passed over")
    main(*show)
    assert capsys.readouterr().out.splitlines()[0] == dirl.built_in("held out", 0)[0][0]


# ---- what the README says -----------------------------------------------------------------------------------------

README = Path(HERE, "README.md").read_text(encoding="utf-8")


def test_equation_table_is_where_and_what_it_says():
    source = Path(dirl.__file__).read_text(encoding="utf-8")
    cut = next(i for i, line in enumerate(source.splitlines(), 1) if line.startswith("# ====="))
    found = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    row = r"^\| (.+?) \| (.+?) \| \[`(\w+)`\]\(dirl\.py#L(\d+)-L(\d+)\) \| (\d+)-(\d+) \|$"
    rows, last = re.findall(row, README, re.M), 0
    for paper, equation, name, *numbers in rows:
        node, text = found[name], " ".join(ast.get_docstring(found[name]).split())
        assert [node.lineno, node.end_lineno] * 2 == list(map(int, numbers)), f"{name}: lines {node.lineno}-{node.end_lineno}"
        assert paper.split(",")[0] in text and equation.replace("\\|", "|").strip("`") in text, (name, paper, equation)
        assert last <= node.lineno < node.end_lineno < cut           # in the order of the file
        last = node.lineno
    assert set("mask_mod log_policy sft_loss C_eps trajectory_document eq6 eq7 eq8 unmask".split()) <= {row[2] for row in rows}
    named = set(re.findall(r"`(\w+)`", README.split("## Read it")[1].split("\n## ")[0]))
    assert named >= {name for name, node in found.items() if node.lineno < cut}


def global_names(code):
    yield from (x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            yield from global_names(constant)


def test_what_stands_above_the_cut_needs_nothing_but_torch():
    source = Path(dirl.__file__).read_text(encoding="utf-8").split("# =====")[0]
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", name.name) for node in imports for name in node.names} == {
        "torch", "torch.nn.attention.flex_attention"}
    code, paper = compile(source, "part I", "exec"), {}
    exec(code, paper)
    assert set(global_names(code)) <= set(paper) | set(dir(builtins))
    chunks = "h = torch.ones(2, 3)\nlog_probs(h, h, torch.tensor([0, 1]), 1.0, 2, chunk=1)"      # what torch has to bring itself
    subprocess.run([sys.executable, "-c", f"{source}\n{chunks}"], check=True, cwd="/")


def test_readme_commands_run(checkpoint, policies, tmp_path, monkeypatch, capsys):
    """Those for the tiny model as they stand, but short; those for checkpoints on a stand-in; measurements elsewhere."""
    monkeypatch.chdir(tmp_path)
    short_runs(monkeypatch, held_out=4)
    jsonl("chats.jsonl", {"messages": chat("?", "!")})
    jsonl("problems.jsonl", "2+1")
    jsonl("test.jsonl", "2+1")
    my_reward = README.split("# my_reward.py")[1].split("\n\n")[0].split("\n", 1)[1]
    Path("my_reward.py").write_text(my_reward.replace("\n    ", "\n")[4:])
    for name in ("sdar", "opdlm", "qwen3"):
        shutil.copytree(policies(4).folder, f"models/{name}")
    for name in ("sft", "rl"):
        shutil.copytree(checkpoint, f"runs/tiny-0/{name}")
    rl = "--prompts 1 --group-size 2 --max-new-tokens 4 --save-every 1"
    short = {"sft": "--batch 2 --save-every 1", "rl": rl, "eval": "--max-new-tokens 4", "show": ""}
    measurements = Path(HERE, ".github", "measure.py").read_text(encoding="utf-8")
    known = {"--nnodes", *re.findall("--[a-z-]+", measurements), *("--" + name.replace("_", "-") for name in vars(flags()))}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= known            # flags, wherever they are named
    lines, ran, stages = re.findall(r"^    ((?:pip|python|torchrun) .*)", README, re.M), 0, set()
    for command in (part.split() for line in lines for part in line.split(" && ")):
        if command[:2] == ["pip", "install"]:
            assert set(command[2:]) <= {"-r", "requirements.txt", "pytest", "pytest-xdist"}
        elif command[1] == ".github/measure.py":
            assert command[2] in measurements
        elif "pytest" in command or ".github/pictures.py" in command:
            assert command[1:3] == ["-m", "pytest"] or os.path.exists(os.path.join(HERE, command[1]))
        elif command[-1] == "--help":
            with pytest.raises(SystemExit) as end:
                main(*command[command.index("dirl.py") + 1:])
            assert end.value.code == 0
        elif "--model" not in command:                               # the default run: that is what `default_run` did
            continue
        else:
            stage = command[command.index("--stage") + 1]
            steps = f"--steps {2 if '--resume' in command else 1}" if stage in ("sft", "rl") else ""
            main(*command[command.index("dirl.py") + 1:], short[stage], steps)
            stages.add(stage)
        ran += 1
    assert ran > 8 and stages == {"show", "eval", "sft", "rl"}
    assert [line["step"] for line in metrics("runs/my", "rl")] == [1, 2] and os.path.exists("runs/eval-0/eval.jsonl")
    assert "accuracy" in capsys.readouterr().out


# ---- ranks, resume, bad days: real processes ----------------------------------------------------------------------

def torchrun(n, *argv, script=dirl.__file__):
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
    return [sys.executable, *many, str(script), *words(*argv)]


def short_script(folder, more=""):
    """`dirl.py` in processes of its own, as `short_runs` would have it."""
    path = folder / "short.py"
    path.write_text(f"import dirl, {MODULE}, pytest\n{MODULE}.short_runs(pytest.MonkeyPatch(), 8)\n{more}\n"
                    "if __name__ == '__main__':\n    dirl.main()\n")
    return path


def finished(command, cwd=None):
    """(exit code, output, errors) of a run."""
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=900, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def succeeded(command):
    """The output of a run that must end well."""
    code, said, err = finished(command)
    assert code == 0, err
    return said


@contextlib.contextmanager
def killed_after(command, moment, log):
    """A run that has come to a moment, its output in a file. Later it is killed with all its ranks: kill -9, torchrun first."""
    with open(log, "a") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file, env=ONE_THREAD)
    ranks, end = [], time.time() + 900
    try:
        while not moment() and run.poll() is None and time.time() < end:
            time.sleep(0.001)
        assert run.poll() is None and time.time() < end, log.read_text()[-2000:]
        children = [file.read_text().split() for file in Path(f"/proc/{run.pid}/task").glob("*/children")]
        ranks = [os.pidfd_open(int(pid)) for pids in children for pid in pids]
        yield run                                                    # torchrun's ranks are in no group with it
    finally:
        run.kill()
        run.wait()
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [])                         # until it is gone
            os.close(process)


def same_run(a, b):
    """Assert that two runs left the same, bit for bit; their metrics without seconds."""
    x, y = files_under(a), files_under(b)
    assert without_seconds(a) == without_seconds(b) and x.keys() == y.keys()
    assert all(x[path] == y[path] for path in x if path.name not in ("rl.metrics.jsonl", "rl.run.json", ".metadata"))
    flags_of_a, flags_of_b = (dirl.read_json(out / "rl.run.json")["flags"] for out in (a, b))
    assert without(flags_of_a, "out", "resume") == without(flags_of_b, "out", "resume")


def on_ranks(*calls):
    """Each call, (n, nodes, function of this file, arguments), on n ranks, which are forks of one process: so everything is
    imported once."""
    succeeded([sys.executable, "-c", f"import {MODULE}\nfor call in {calls!r}:\n    {MODULE}.fork_ranks(*call)"])


def fork_ranks(n, *call):
    import torch.distributed.checkpoint.state_dict
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(one_rank, (n, port, *call), n, start_method="fork")


def one_rank(rank, n, port, nodes, name, *args):
    """Under torchrun's environment variables. Ends as main does."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n // nodes, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "localhost"} | {key: str(value) for key, value in numbers.items()}
    globals()[name](*args)
    dirl.barrier()
    sys.stdout.flush()
    os._exit(0)


def short_mains(held_out, *commands):
    """`dirl.main` again and again, as `short_runs` would have it; each would end its rank."""
    with pytest.MonkeyPatch.context() as patch:
        short_runs(patch, held_out)
        patch.setattr(os, "_exit", lambda code: None)
        for command in commands:
            dirl.main(command)


def test_ranks_wait_for_the_slowest_rollout(monkeypatch):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dirl.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dirl, "gather", lambda items: items)
    monkeypatch.setattr(dirl.dist, "init_process_group", lambda backend, timeout: asked.update(timeout=timeout))
    dirl.start_ranks()
    assert asked["timeout"].total_seconds() >= 12 * 3600


def test_documents_are_dealt_to_ranks_by_their_tokens(monkeypatch):
    lengths = torch.randint(50, 900, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(dirl, "world", lambda: 4)

    def dealt(lengths, max_tokens):
        """What each of four ranks is dealt: (rows, room)."""
        for r in range(4):
            monkeypatch.setattr(dirl, "rank", lambda: r)
            yield dirl.deal(lengths, max_tokens)
    plans = [rows for rows, _ in dealt(lengths, 1000)]
    assert sorted(i for rows in plans for row in rows for i in row) == list(range(64))
    assert len({len(rows) for rows in plans}) == 1 and all(sum(lengths[i] for i in row) <= 1000 for rows in plans for row in rows)
    loads = [sum(lengths[i] for row in rows for i in row) for rows in plans]
    assert max(loads) / (sum(loads) / 4) - 1 < 0.05
    assert list(dealt([5], 10)) == [([[0]], 10)] + [([[]], 10)] * 3  # empty rows where rank 0 has one
    small = list(dealt([500, 700, 900, 300] * 4, 16384))             # 9600 tokens, less than a row: it is cut for four ranks
    assert all(room == 3072 and len(rows) == 1 and rows[0] for rows, room in small)
    assert sorted(i for (row,), _ in small for i in row) == list(range(16))


@pytest.mark.parametrize("max_tokens", [512, 1000, 16384])
def test_rows_of_a_long_run_have_few_lengths(max_tokens):
    """FlexAttention is compiled for each, twice: packed rows have one, documents that are longer and small batches a few."""
    g, packed, single, short = torch.Generator().manual_seed(0), set(), set(), set()
    for _ in range(300):
        lengths = (torch.rand(40, generator=g).mul(6.5).add(3).exp() * 4).long().tolist()      # 80 to 54000 tokens
        (rows, room), few = dirl.deal(lengths, max_tokens), dirl.deal(lengths[:2], max_tokens)[1]
        assert room == max_tokens and few <= max_tokens
        short.add(dirl.row_length(0, few))                           # of a small batch
        for row in rows:
            n = sum(lengths[i] for i in row)
            length = dirl.row_length(n, room)
            assert length % 128 == 0 and length >= n and (n <= room or length < n + 4096)
            (packed if n <= room else single).add(length)
    assert packed == {-(-max_tokens // 128) * 128} and len(single) <= 54000 / 4096 + 1
    assert dirl.row_length(0, max_tokens) == dirl.row_length(max_tokens, max_tokens) == min(packed) == max(short)
    assert 2 * len(packed | single | short) < 64                     # recompile_limit, see flex_attention


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_reward_that_is_not_finite_is_an_end(checkpoint, tmp_path, monkeypatch, capsys, value):
    """One line that names the question and the answer, in RL and in evaluation; what is written holds no bare NaN."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    short_runs(monkeypatch, held_out=2)
    name = "bad_" + value.strip("-") + "_minus" * value.startswith("-")
    Path(f"{name}.py").write_text(f"calls = 0\ndef reward(answer, truth):\n    global calls\n    calls += 1\n"
                                  f"    return float('{value}') if calls > 20 else calls % 3 / 2\n")
    for stage in ("rl", "eval"):
        monkeypatch.setattr(dirl, "HELD_OUT", 2 if stage == "rl" else 30)
        line = refused(capsys, SHORT_RL, f"--max-new-tokens 8 --reward {name}:reward --stage {stage} --out {stage} --model",
                       checkpoint)
        assert re.fullmatch(rf"--reward: {value} for the answer '.*' to '[\d+=-]+'", line), line
        sys.modules.pop(name)
    assert [line["step"] for line in lines_of("rl", "rl.metrics.jsonl")] == [0, 1] and len(lines_of("rl", "rl.eval.jsonl")) == 2


def test_files_that_cannot_be_written_are_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    """Metrics, where a folder of that name is in the way, or OUT itself has vanished."""
    short_runs(monkeypatch)
    train_on = dirl.train_on
    for name in ("in the way", "vanished"):
        out = tmp_path / name

        def vanishing(*args):
            if args[-1] == 3 and name == "vanished":
                shutil.rmtree(out)
            elif args[-1] == 3:
                os.rename(out / "rl.metrics.jsonl", out / "moved")
                os.mkdir(out / "rl.metrics.jsonl")
            return train_on(*args)
        monkeypatch.setattr(dirl, "train_on", vanishing)
        line = refused(capsys, SHORT_RL, "--model", checkpoint, "--out", out)
        assert line.startswith(f"cannot write {out}/rl.metrics.jsonl: ")
    assert os.listdir(tmp_path / "in the way" / "rl.state") == ["2"]


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_forgotten(checkpoint, tmp_path, monkeypatch, capsys):
    short_runs(monkeypatch)
    calls, eq8, optimizer_step, moved = [], dirl.eq8, dirl.optimizer_step, []

    def sometimes(*terms):
        J, clipped = eq8(*terms)
        return J * (float("nan") if len(calls) in (2, 4, 5) else 1), clipped

    def watched(policy, *rest):
        before = [weight.detach().clone() for weight in policy.model.parameters()]
        norm = optimizer_step(policy, *rest)
        moved.append(not all(map(torch.equal, before, policy.model.parameters())))
        return norm
    monkeypatch.setattr(dirl, "eq8", noting(calls, "eq8", sometimes))
    monkeypatch.setattr(dirl, "optimizer_step", watched)
    main(SHORT_RL, "--lr 1e-4 --prompts 8 --max-tokens 100000 --model", checkpoint, "--out", tmp_path)
    lines = metrics(tmp_path, "rl")
    assert moved == [True, False, True, False, False, True]
    assert [line["grad_norm"] is not None for line in lines] == [line["loss"] is not None for line in lines] == moved
    said = capsys.readouterr().out
    for n, has_moved in enumerate(moved, 1):
        assert (f"step {n}: a gradient that is not finite, which moves nothing\n" in said) == (not has_moved)


@pytest.mark.parametrize("gap", [float("nan"), 0.11, 0.09])
def test_a_gap_above_the_limit_or_not_a_number_is_an_end(checkpoint, tmp_path, monkeypatch, capsys, gap):
    short_runs(monkeypatch)
    denoise = dirl.denoise

    def broken(*terms):
        token, new, logp = denoise(*terms)
        return token, new, logp + gap
    monkeypatch.setattr(dirl, "denoise", broken)
    argv = SHORT_RL, "--model", checkpoint, "--out", tmp_path / "run"
    if gap < dirl.MAX_LOGP_GAP:
        return main(*argv)
    assert "above MAX_LOGP_GAP = 0.1" in refused(capsys, *argv)
    *before, last = lines_of(tmp_path / "run", "rl.metrics.jsonl")  # its line is written, and is the first with a gap
    assert all(line["logp_gap"] is None for line in before) and last["loss"] is not None
    assert last["logp_gap"] == (None if math.isnan(gap) else pytest.approx(gap, abs=1e-4))


def gradients(folder, file):
    """Of SFT and of DiPO on the same trajectories, on however many ranks there are; before, the weights, and saved."""
    from safetensors.torch import save_file
    dirl.start_ranks()
    c = flags("--max-tokens", 100)
    policy, g = dirl.load_policy(folder, c), torch.Generator().manual_seed(0)
    found = {"weight " + name: tensor for name, tensor in policy.named_weights(torch.float32)}
    dirl.save_policy(policy, file + ".saved")

    def keep(name, rows, loss_of):
        policy.model.zero_grad()
        total = torch.zeros(1)
        for row in rows:
            loss = loss_of(row)
            (loss * dirl.world()).backward()
            total += loss.detach()
        found[name + " loss"], found[name + " rows"] = dirl.all_sum(total), torch.tensor(len(rows))
        for parameter, p in policy.model.named_parameters():
            found[f"{name} {parameter}"] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    documents, answer_tokens = [], sum(24 - P for P in range(3, 10))
    for P in range(3, 10):
        tokens, K = torch.randint(0, 200, (24,), generator=g), 6 - P // 4
        u, z = torch.rand(K, generator=g), torch.rand(K, 4, generator=g)
        documents.append(dirl.noised_document(tokens, P, u, z, 4, policy.mask_id))
    for name, n in (("sft", 7), ("sft of one example", 1)):
        keep(name, rows_of(policy, documents[:n], 100),
             lambda row: dirl.sft_loss(policy.score(row)[0], row["w_t"], answer_tokens))

    def sampled():
        prompt, output, steps = random_trajectory(g, 6, 10 + 4 * int(torch.randint(0, 4, (), generator=g)), 4)
        return dirl.finish(prompt, output, steps, -3 * torch.rand(len(output), generator=g), policy, c)
    groups = [dirl.Group([sampled() for _ in r], None, r) for r in ([1.0, 0.0, 0.0], [0.5, 0.0, 1.0])]
    for objective, n in itertools.product(("eq6", "eq7", "eq8"), (2, 1)):
        def loss_of(row):
            view = (row["view"][row["reads"]] - 1,) if objective == "eq8" else ()
            old = row["logp_sampler"] if objective == "eq6" else None
            return -getattr(dirl, objective)(policy.score(row)[0], old, row["A"], row["w"], 0.2, 0.2, *view)[0]
        two = dirl.Group(groups[0].trajectories[:2], None, groups[0].rewards[:2])      # of which a third rank has none
        chosen = groups if n == 2 else [two]
        keep(f"{objective} {n}", dirl.dipo_rows(policy, changed(c, objective=objective), chosen)[0], loss_of)
    reference, optimizer = dirl.load_policy(folder, c), dirl.make_optimizer(policy, c)
    policy.model.zero_grad()
    given = changed(c, objective="eq7", beta=0.1, importance=0.9)
    metrics = dirl.train_on(policy, reference, optimizer, given, groups, 1)
    found["metrics"] = torch.tensor([metrics[x] for x in ("loss", "kl", "importance", "importance_capped", "importance_ess")])
    if dirl.world() > 1:
        weight = reference.model.lm_head.weight                     # sharded again, though no backward did it
        assert isinstance(weight, dirl.DTensor)
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in weight.device_mesh.get_all_groups()]
        assert timeouts and all(x == dirl.PATIENCE for x in timeouts), timeouts
    if dirl.rank() == 0:
        save_file({name: tensor.detach().clone() for name, tensor in found.items()}, file)


def test_any_number_of_ranks_gives_one_gradient(policies, tmp_path):
    results, folder, calls = {}, policies(4).folder, []
    for n in (1, 2, 3, 4):                                           # 43, 43 and 42 of 128 rows on 3 ranks; 2 nodes of 2 ranks
        os.makedirs(tmp_path / str(n))
        calls.append((n, 2 if n == 4 else 1, "gradients", folder, str(tmp_path / str(n) / "model.safetensors")))
    on_ranks(*calls)
    for n in (1, 2, 3, 4):
        results[n] = weights_of(tmp_path / str(n))
    one, file_weights, saved = results.pop(1), weights_of(folder), files_under(tmp_path / "1" / "model.safetensors.saved")
    assert {name for name in one if name.startswith("weight ")} == {"weight " + name for name in file_weights}
    assert all(torch.equal(one["weight " + name], weight) for name, weight in file_weights.items())
    for n, found in results.items():
        assert found.keys() == one.keys()
        assert all(torch.equal(found[x], one[x]) for x in one if x.startswith("weight "))
        assert files_under(tmp_path / str(n) / "model.safetensors.saved") == saved
        assert torch.allclose(found["metrics"], one["metrics"], rtol=1e-4, atol=1e-6), (found["metrics"], one["metrics"])
        for name in ("sft", "sft of one example", *(f"eq{e} {k}" for e in (6, 7, 8) for k in (1, 2))):
            assert torch.isclose(found[name + " loss"], one[name + " loss"], rtol=1e-5, atol=1e-8)
            names = [x for x in one if x.startswith(name + " ") and x.split()[-1] not in ("loss", "rows")]
            a, b = (torch.cat([r[x].flatten() for x in names]) for r in (one, found))
            assert (a - b).norm() < 1e-5 * a.norm() and a.norm() > 0, (n, name)
            assert found[name + " rows"] <= one[name + " rows"]


MOMENTS = [  # the run ends in a function at its n-th call since the start, or with these arguments; the newest state it leaves
    ("dirl.train_on", lambda n, *args: args[-1] == 2, 0),                   # step 1 is written, nothing is saved
    ("dirl.arithmetic_reward", lambda n, *args: n == 8 + 2 * 12 + 3, 0),    # amid the answers of the second evaluation
    ("dirl.table_1", lambda n, *args: n == 2, 0),                           # after them
    ("torch.distributed.checkpoint.save", lambda n, *args: n == 1, 0),      # the checkpoint is in place, a state begun
    ("os.rename", lambda n, source, target: str(target).endswith("/rl.state/2"), 0),     # the state is whole, but not in place
    ("dirl.train_on", lambda n, *args: args[-1] == 4, 2),                   # step 3 is written after the state of step 2
    ("os.rename", lambda n, source, target: str(source).endswith("/rl.tmp"), 2),         # the checkpoint makes room for the next
    ("dirl.arithmetic_reward", lambda n, *args: n == 2 * 12 + 3, 2),        # amid the answers of the third evaluation
    ("dirl.save", lambda n, *args: n == 2, 4),                              # the last step is written, and not saved
    ("dirl.arithmetic_reward", lambda n, *args: n == 2 * 12 + 8, 4),        # amid the answers of the last evaluation
    ("dirl.table_1", lambda n, *args: True, 4)]                             # after them


def test_ended_at_any_moment_and_resumed_as_if_nothing_had_happened(checkpoint, tmp_path, monkeypatch, capsys):
    """One rank, ended by what nothing in dirl.py catches, and each time resumed; a line half-written; then a finished run."""
    short_runs(monkeypatch, held_out=8)
    whole, out = tmp_path / "whole", tmp_path / "ended"
    argv, state = (SHORT_RL, "--model", checkpoint, "--out"), out / "rl.state"
    main(*argv, whole)
    for name, moment, last in MOMENTS:
        function, calls = pkgutil.resolve_name(name), []

        def ending(*args, **more):
            if moment(len(calls), *args):
                raise KeyboardInterrupt
            return function(*args, **more)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(name, noting(calls, name, ending))
            main(*argv, out, "--resume" * out.exists())
        with open(out / "rl.metrics.jsonl", "a") as file:
            file.write('{"step": 1, "rew')
        assert f"it holds rl up to step {last}: --resume continues it, another --out" in refused(capsys, *argv, out)
        assert (state / str(last)).exists() == (last > 0) and not (state / str(last + 2)).exists()
    main(*argv, out, "--resume")
    assert "rl: resuming after step 4\n" in capsys.readouterr().out and sorted(os.listdir(state)) == ["4", "6"]
    same_run(whole, out)
    found = without_seconds(out)
    assert [line["step"] for line in found] == list(range(7))
    assert [line["step"] for line in found if "accuracy" in line] == [0, 2, 4, 6]
    assert [x["step"] for x in lines_of(out, "rl.eval.jsonl")] == [step for step in (0, 2, 4, 6) for _ in range(8)]
    assert "it holds rl up to step 6" in refused(capsys, *argv, out)           # a finished stage is like a begun one
    main(*argv, out, "--resume")
    same_run(whole, out)


AMID_A_SAVE = """
import os, time
from torch.distributed import checkpoint
save = checkpoint.save
def waiting(state, checkpoint_id):
    if checkpoint_id.endswith("rl.state/4.tmp"):
        with open(os.path.join(checkpoint_id, "half"), "w") as file:
            file.write("a file half-wr")
        time.sleep(900)
    save(state, checkpoint_id=checkpoint_id)
checkpoint.save = waiting
"""


def test_three_ranks_killed_amid_a_save_and_resumed_as_if_nothing_had_happened(checkpoint, tmp_path, monkeypatch, capsys):
    """kill -9; until all their processes are gone no other run begins in OUT. Then the run goes on, on one rank too."""
    short_runs(monkeypatch, held_out=8)
    whole, out, one = tmp_path / "whole", tmp_path / "killed", tmp_path / "one"
    argv = SHORT_RL, "--model", checkpoint, "--out"
    refusal = f"--out {out}: another run is writing there; wait for it, or end it (pgrep -f dirl.py)"
    command = torchrun(3, *argv, out, script=short_script(tmp_path, AMID_A_SAVE))
    with killed_after(command, (out / "rl.state" / "4.tmp" / "half").exists, tmp_path / "log") as first:
        assert refused(capsys, *argv, out) == refused(capsys, *argv, out, "--resume") == refusal
        first.kill()                                                 # torchrun alone: its ranks live on
        first.wait()
        assert refused(capsys, *argv, out, "--resume") == refusal
    assert "it holds rl up to step 2" in refused(capsys, *argv, out)
    main(*argv, one, "--steps 2")
    commands = [(*argv, whole), (*argv, out, "--resume"), (*argv, one, "--resume --steps 3")]
    on_ranks((3, 1, "short_mains", 8, *(words(*command) for command in commands)))
    assert sorted(os.listdir(out / "rl.state")) == ["4", "6"]
    same_run(whole, out)
    found = without_seconds(out)
    main(*argv, out, "--resume --steps 7 --eps 0.1")
    assert [line["step"] for line in without_seconds(out)] == list(range(8)) and without_seconds(out)[:7] == found
    assert dirl.read_json(out / "rl.run.json")["flags"]["steps"] == 7
    assert [line["step"] for line in without_seconds(one)] == list(range(4))
    for a, b in zip(without_seconds(one), found):                    # one rank and three: the same samples, and rounding
        assert a["reward"] == b["reward"] if "reward" in a else a == b


def test_a_rank_that_raises_ends_all_with_its_message(checkpoint, tmp_path):
    (tmp_path / "broken.py").write_text("import os\ndef reward(answer, truth):\n    if os.environ['RANK'] == '1':\n"
                                        "        raise ValueError('the reward of rank one broke')\n    return 0\n")
    code, _, err = finished(torchrun(2, SHORT_RL, "--model", checkpoint, "--out", tmp_path / "run",
                                     "--reward broken:reward", script=short_script(tmp_path)))
    assert code != 0 and "the reward of rank one broke" in err


def test_a_full_disk_is_one_line_and_leaves_the_states_before(checkpoint, tmp_path, monkeypatch, capsys):
    """Files may not grow beyond a limit in the second save: too little for the checkpoint, or for the state. Then the run is
    resumed, as if nothing had happened."""
    short_runs(monkeypatch)
    argv, whole, save = (SHORT_RL, "--model", checkpoint, "--out"), tmp_path / "whole", dirl.save
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    main(*argv, whole)
    for limit in (2 * 10**5, 3 * 10**6):
        def limited(policy, optimizer, c, step, position):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]) if step == 4 else unlimited)
            try:
                save(policy, optimizer, c, step, position)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        out = tmp_path / str(limit)
        with monkeypatch.context() as patch:
            patch.setattr(dirl, "save", limited)
            assert refused(capsys, *argv, out).startswith(f"cannot save in {out}: ")
        assert [x for x in os.listdir(out / "rl.state") if x.isdigit()] == ["2"]
        main(*argv, out, "--resume")
        same_run(whole, out)
