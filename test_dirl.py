# SPDX-License-Identifier: MIT
"""Tests of dirl.py: every equation against a slow version written independently of it, and real runs on one CPU.

    python -m pytest test_dirl.py        the tests
    python test_dirl.py --help           the measurements behind the README's figures
"""
import argparse
import ast
import asyncio
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dirl

TRAJECTORY_DOCUMENT = dirl.trajectory_document
HERE = os.path.dirname(os.path.abspath(__file__))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", os.path.join(HERE, "dirl.py")]


# ---- helpers: a tiny policy, and a slow reference for everything the fast path does --------------------------


def flags(*argv, stage="rl"):
    return dirl.configure(dirl.parse_flags([str(x) for x in argv]), stage)


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """B → an untrained tiny policy."""
    made = {}

    def policy(B=4):
        if B not in made:
            folder = str(tmp_path_factory.mktemp(f"tiny{B}"))
            c = flags("--block-size", B)
            dirl.build_tiny(folder, B, seed=0)
            made[B] = dirl.load_policy(folder, c, dirl.read_config(folder, c))
            with torch.no_grad():                     # a sharper head: confidences on both sides of a threshold
                made[B].model.lm_head.weight *= 4
        return made[B]
    return policy


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of the default run of seed 0, under torchrun as in the README; its log is OUT.log."""
    out = str(tmp_path_factory.mktemp("default") / "run")
    with open(out + ".log", "w", encoding="utf-8") as log:
        subprocess.run([*TORCHRUN, "--stage", "rl", "--seed", "0", "--out", out], stdout=log, stderr=log, check=True,
                       timeout=900)
    return out


def metrics(out, stage):
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as file:
        return [line for line in map(json.loads, file) if line["stage"] == stage]


def slow_logits(policy, tokens):
    """Block-causal forward of one sequence, no packing, no cache, transformers' own eager attention: [len, vocab]."""
    model = copy.copy(policy.model)
    model.config._attn_implementation = "eager"
    try:
        block = torch.arange(len(tokens)) // policy.B
        mask = torch.zeros(len(tokens), len(tokens)).masked_fill(block[None, :] > block[:, None], -1e30)
        return model(input_ids=tokens[None], attention_mask=mask[None, None], use_cache=False).logits[0]
    finally:
        model.config._attn_implementation = "dirl"


def slow_log_policy(policy, logits, temperature=1.0):
    keep = [i for i in range(logits.shape[-1]) if i != policy.mask_id]
    out = torch.full_like(logits, -torch.inf)
    out[..., keep] = torch.log_softmax(logits[..., keep] / temperature, -1)
    return out


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


def slow_scores(policy, t, temperature=1.0):
    """log π of every output token, one forward for every decoding step: [L]."""
    tokens, scores = torch.cat([t.prompt, t.output]), {}
    for _, _, seen, committed in slow_states(policy, t):
        log_pi = slow_log_policy(policy, slow_logits(policy, seen), temperature)
        scores |= {p: log_pi[p, tokens[p]] for p in committed}
    return torch.stack([scores[p] for p in sorted(scores)])


def prompts_of_every_remainder(policy, n=None):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 200, (length,), generator=g).tolist() for length in range(1, (n or 2 * policy.B + 1) + 1)]


def rollouts(policy, *argv, n=None, greedy=False):
    c = flags("--max-new-tokens", 13, "--threshold", 0.5, "--block-size", policy.B, *argv)
    prompts = prompts_of_every_remainder(policy, n)
    return c, dirl.rollout(policy, prompts, [(0, "test", 0, i, 0) for i in range(len(prompts))], c, greedy)


def dense(row, B):
    """Who sees whom in a row: bool [N, N]."""
    i = torch.arange(len(row["ids"]))
    return dirl.mask_mod(row["doc"], row["copy"], row["pos"] // B)(0, 0, i[:, None], i)


def gradient(model, value):
    """Of all parameters, in one vector."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads)])


def rows_of(policy, documents, max_tokens):
    lengths = [len(d["ids"]) for d in documents]
    return dirl.make_rows(policy, lengths, documents.__getitem__, SimpleNamespace(max_tokens=max_tokens))[0]


def documents_of(policy, trajectories):
    return [dirl.trajectory_document(t.prompt, t.output, t.steps, policy.B, policy.mask_id) for t in trajectories]


# ---- Eq. 1-2, Fig. 4b: mask and layout ------------------------------------------------------------------------


def test_mask_is_the_picture_of_fig_4b():
    """B = 2; a prompt block 0 and two output blocks, each with one noisy view; rows see columns marked x."""
    picture = """
        clean0 clean0 clean1 clean1 clean2 clean2 noisy1 noisy1 noisy2 noisy2
        x x . . . . . . . .
        x x . . . . . . . .
        x x x x . . . . . .
        x x x x . . . . . .
        x x x x x x . . . .
        x x x x x x . . . .
        x x . . . . x x . .
        x x . . . . x x . .
        x x x x . . . . x x
        x x x x . . . . x x"""
    expected = torch.tensor([[c == "x" for c in line.split()] for line in picture.strip().splitlines()[1:]])
    d = dirl.layout(torch.arange(6), torch.tensor([1, 2]), torch.full((2, 2), 9), 2)
    assert d["ids"].tolist() == [0, 1, 2, 3, 4, 5, 9, 9, 9, 9]
    assert d["pos"].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    row = dirl.join([d | {"reads": torch.tensor([6])}, d | {"reads": torch.tensor([6])}], length=24)
    assert row["reads"].tolist() == [6, 16] and row["copy"].max() == 4
    mask = dense(row, 2)
    assert torch.equal(mask[:10, :10], expected) and torch.equal(mask[10:20, 10:20], expected)
    assert not mask[:10, 10:].any() and not mask[10:20, :10].any() and not mask[10:20, 20:].any()
    assert not mask[20:, :20].any() and mask.any(1).all()          # padding sees padding only, and something


def test_two_views_of_one_block_do_not_see_each_other():
    d = dirl.layout(torch.arange(4), torch.tensor([1, 1]), torch.full((2, 2), 9), 2) | {"reads": torch.tensor([4])}
    row = dirl.join([d])
    mask = dense(row, 2)
    assert mask[4:6].int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2
    assert mask[6:8].int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]] * 2


def random_trajectory(g, P, L, B):
    """(prompt, output, step map) with random tokens below 200 and, in each block, steps 1 to at most B."""
    prompt, output = torch.randint(0, 200, (P,), generator=g), torch.randint(0, 200, (L,), generator=g)
    steps = torch.zeros(L, dtype=torch.long)
    for k in range(P // B, (P + L) // B):
        positions = [p - P for p in range(k * B, (k + 1) * B) if p >= P]
        drawn = torch.randint(0, B, (len(positions),), generator=g)
        steps[positions] = drawn.unique(return_inverse=True)[1] + 1                      # no step commits nothing
    return prompt, output, steps


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
            prompt, output = prompt + 1000 * d, output + 1000 * d
            tokens = torch.cat([prompt, output])
            moments += [tokens[:(p // B + 1) * B].tolist() for p in range(len(tokens))]
            if d % 2:                                               # a trajectory
                t = SimpleNamespace(prompt=prompt, output=output, steps=steps)
                states = [seen.tolist() for _, _, seen, _ in slow_states(SimpleNamespace(B=B, mask_id=mask_id), t)]
                documents.append(dirl.trajectory_document(prompt, output, steps, B, mask_id))
            else:                                                   # an SFT example
                u, z = torch.rand(blocks, generator=g), torch.rand(blocks, B, generator=g)
                documents.append(dirl.noised_document(tokens, P, u, z, B, mask_id))
                noisy = [[mask_id if p >= P and z[p // B - P // B, p % B] < 1e-3 + 0.999 * u[p // B - P // B] else
                          int(tokens[p]) for p in range(k * B, (k + 1) * B)] for k in range(P // B, len(tokens) // B)]
                states = [tokens[:(P // B + i) * B].tolist() + block for i, block in enumerate(noisy) if mask_id in block]
            moments += [state for state in states for _ in range(B)]
        row = dirl.join(documents, length=len(moments) + 7)
        mask = dense(row, B)
        for q, expected in enumerate(moments):
            seen = mask[q].nonzero()[:, 0]
            seen = seen[row["pos"][seen].argsort(stable=True)]
            assert row["pos"][seen].tolist() == list(range(len(expected))) and row["ids"][seen].tolist() == expected
        assert not mask[len(moments):, :len(moments)].any() and mask.any(1).all()


def test_block_mask_and_strips_are_the_mask_and_attention_agrees_under_them():
    from torch.nn.attention.flex_attention import flex_attention
    g = torch.Generator().manual_seed(0)
    first = torch.arange(124), torch.arange(132), torch.ones(132, dtype=torch.long)        # has a tile that lacks 16 pairs
    trajectories = [first] + [random_trajectory(g, P, L, 4) for P, L in ((300, 200), (5, 23), (130, 46), (9, 51))]
    N = 2304
    row = dirl.join([dirl.trajectory_document(*t, 4, 999) for t in trajectories], length=N)
    sees = dirl.mask_mod(row["doc"], row["copy"], row["pos"] // 4)
    mask, blocks = dense(row, 4), dirl.block_mask(sees, N, "cpu")
    expanded, kinds = torch.zeros(N, N, dtype=torch.bool), {"none": 18 * 18, "partial": 0, "full": 0}
    for kind, number, index in (("partial", blocks.kv_num_blocks, blocks.kv_indices),
                                ("full", blocks.full_kv_num_blocks, blocks.full_kv_indices)):
        for i in range(18):
            for j in index[0, 0, i, :number[0, 0, i]].tolist():
                q, kv = torch.arange(128)[:, None] + 128 * i, torch.arange(128) + 128 * j
                assert not expanded[q, kv].any()                    # listed once
                expanded[q, kv] = blocks.mask_mod(0, 0, q, kv) if kind == "partial" else True
                kinds[kind], kinds["none"] = kinds[kind] + 1, kinds["none"] - 1
                assert (kind == "full") == mask[q, kv].all()  # and no tile is masked needlessly, or for nothing
                assert mask[q, kv].any()
    visible = mask.view(18, 128, 18, 128).sum((1, 3))
    assert torch.equal(expanded, mask) and all(kinds.values()) and (visible == 128 * 128 - 16).any()
    doc, pos = (torch.tensor([0] * 127 + [1] * 2 + [2] * 127), torch.cat([torch.arange(n) for n in (127, 2, 127)]))
    alone = dirl.block_mask(dirl.mask_mod(doc, torch.zeros_like(doc), pos), 256, "cpu")     # B = 1: a tile of one visible pair
    assert alone.kv_num_blocks[0, 0].tolist() == [1, 2] and alone.full_kv_num_blocks.sum() == 0
    small = dirl.block_mask(sees, N, "cpu", tile=64)
    assert small.BLOCK_SIZE == (64, 64) and small.to_dense().shape[-2:] == (36, 36)
    assert small.kv_indices.dtype == small.kv_num_blocks.dtype == torch.int32                  # the kernels want them so
    assert dirl.block_mask(lambda b, h, q, kv: q >= kv, 256, "meta").kv_num_blocks.device.type == "meta"


def test_pack_fills_rows_and_leaves_the_long_alone():
    lengths = [3, 9, 4, 20, 6, 1]
    rows = dirl.pack(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(6)) and [3] in rows
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows if row != [3]) and len(rows) == 4
    assert dirl.pack([], 10) == []


def test_padded_lengths_are_few_and_close():
    sizes = {dirl.padded_length(n) for n in range(1, 20000)}
    assert len(sizes) <= 13 and all(size % 128 == 0 for size in sizes)
    assert all(n <= dirl.padded_length(n) <= max(384, 1.5 * n) for n in range(1, 20000))


# ---- Eq. 2: log-probabilities ---------------------------------------------------------------------------------


def test_log_probs_in_chunks_equal_the_whole_softmax():
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target = torch.randint(0, 10, (37,))
    keep = list(range(10))                                         # 10 is the mask token
    plain = torch.log_softmax((hidden @ weight.T)[:, keep] / 0.7, -1)
    logp, entropy = dirl.log_probs(hidden, weight, target, 0.7, 10, chunk=5)
    assert torch.allclose(logp, plain[range(37), target], atol=1e-6)
    assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), atol=1e-5) and not entropy.requires_grad
    coefficient = torch.randn(37)
    fast = torch.autograd.grad((coefficient * logp).sum(), (hidden, weight))
    slow = torch.autograd.grad((coefficient * plain[range(37), target]).sum(), (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fast, slow))


def test_log_policy_is_at_least_float32_and_keeps_float64():
    logits = torch.randn(3, 7).bfloat16()
    assert dirl.log_policy(logits, 1.0, 6).dtype == torch.float32
    assert dirl.log_policy(logits.double(), 1.0, 6).dtype == torch.float64
    assert (dirl.log_policy(logits, 1.0, 6)[:, 6] == -torch.inf).all()


# ---- Eq. 3: SFT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [1, 2, 4, 8])
def test_sft_loss_equals_a_transcription_of_eq_3(policies, B):
    policy, total, documents, answer_tokens, g = policies(B), 0.0, [], 0, torch.Generator().manual_seed(B)
    for P in range(1, B + 2):                                      # prompts of every remainder
        tokens = torch.randint(0, 200, ((P + 2 * B) // B * B,), generator=g)
        K = len(tokens) // B - P // B
        u, z = torch.rand(K, generator=g), torch.rand(K, B, generator=g)
        documents.append(dirl.noised_document(tokens, P, u, z, B, policy.mask_id))
        answer_tokens += len(tokens) - P
        for k in range(P // B, len(tokens) // B):                  # Σ_k
            t = 1e-3 + (1 - 1e-3) * float(u[k - P // B])
            noisy = tokens[:(k + 1) * B].clone()                   # b_t^k after the clean b^{<k}
            for j in range(B):
                if k * B + j >= P and z[k - P // B, j] < t:
                    noisy[k * B + j] = policy.mask_id
            log_pi = slow_log_policy(policy, slow_logits(policy, noisy))
            for p in range(k * B, (k + 1) * B):                    # Σ_j 1[MASK] CE
                if noisy[p] == policy.mask_id:
                    total = total - log_pi[p, tokens[p]] / t
    rows = rows_of(policy, documents, 60)
    loss = sum(dirl.sft_loss(policy.score(row)[0], row["weight"], answer_tokens) for row in rows)
    slow, fast = gradient(policy.model, total / answer_tokens), gradient(policy.model, loss)
    assert torch.isclose(loss, total / answer_tokens, rtol=1e-4)
    assert (fast - slow).norm() < 1e-4 * slow.norm()


def test_blocks_of_one_token_are_a_causal_model(policies):
    """B = 1: the clean copy is transformers' own causal forward, and the view of token i is the last row of that forward
    on x_<i and one [MASK]; the position predicts itself."""
    policy, model = policies(1), copy.copy(policies(1).model)
    prompt, output, steps = random_trajectory(torch.Generator().manual_seed(3), 4, 9, 1)
    tokens, P, S = torch.cat([prompt, output]), 4, 13
    row = dirl.join([dirl.trajectory_document(prompt, output, steps, 1, policy.mask_id)])
    with torch.no_grad():
        ours = model.lm_head(policy.hidden(row["ids"][None], row["pos"][None], dense(row, 1)[None, None])[0])
        logp, _ = policy.score(row)
        model.config._attn_implementation = "sdpa"
        try:
            causal = model(input_ids=tokens[None], use_cache=False).logits[0]
            masked = [model(input_ids=torch.tensor([[*tokens[:i], policy.mask_id]]), use_cache=False).logits[0, -1]
                      for i in range(P, S)]
        finally:
            model.config._attn_implementation = "dirl"
    assert (ours[:S] - causal).abs().max() < 1e-4 and (ours[S:] - torch.stack(masked)).abs().max() < 1e-4
    expected = slow_log_policy(policy, torch.stack(masked)).gather(1, output[:, None])[:, 0]
    assert len(ours) == S + 9 and (logp - expected).abs().max() < 1e-4


@pytest.mark.parametrize("P", [3, 4])
def test_sft_loss_averaged_over_t_and_all_masks_is_the_nelbo(P):
    """E over t and masks of Eq. 3, by enumeration of the masks and quadrature in t, is the mean over all orders of
    -log Π_j p(x_σ(j) | x_σ(<j)): a mask of m of B tokens weighs ∫ t^m (1-t)^(B-m) / t dt = (m-1)! (B-m)! / B!."""
    import numpy
    B, policy = 3, toy_policy()
    tokens = torch.tensor([0, 2, 1, 1, 0, 2])
    answer = list(range(P, 6))
    n = len(answer)

    def cross_entropy(hidden_positions):
        """Of each hidden token, given the prompt, and the rest of the block."""
        seen = tokens.clone()
        seen[hidden_positions] = 3
        block = torch.arange(6) // B
        hidden = policy.hidden(seen[None], torch.arange(6)[None], (block[None] <= block[:, None])[None, None])[0]
        log_pi = dirl.log_policy(hidden @ policy.model.lm_head.weight.T, 1.0, 3)
        return {p: -log_pi[p, tokens[p]] for p in hidden_positions}
    orders = list(itertools.permutations(answer))
    nelbo = sum(cross_entropy(list(order[i:]))[order[i]] for order in orders for i in range(n)) / len(orders)
    patterns = [[p for p, h in zip(answer, pattern) if h] for pattern in itertools.product((0, 1), repeat=n)][1:]
    nodes, shares = (torch.tensor(x) for x in numpy.polynomial.legendre.leggauss(8))     # exact to degree 15 on [-1, 1]

    def averaged(times):
        total = 0.0
        for (t, share), pattern in itertools.product(zip(times, shares / 2), patterns):
            z = torch.ones(1, B)
            z[0, [p - 3 for p in pattern]] = -1.0                   # hidden, whatever t
            row = dirl.join([dirl.noised_document(tokens, P, (t[None] - 1e-3) / (1 - 1e-3), z, B, 3)])
            loss = dirl.sft_loss(policy.score(row)[0], row["weight"], answer_tokens=1)
            total = total + share * t**len(pattern) * (1 - t)**(n - len(pattern)) * loss
        return total
    by_weights = sum(math.factorial(len(p) - 1) * math.factorial(n - len(p)) / math.factorial(n)
                     * sum(cross_entropy(p).values()) for p in patterns)
    by_quadrature = averaged((nodes + 1) / 2)
    assert torch.isclose(by_weights, nelbo, rtol=1e-12) and torch.isclose(by_quadrature, nelbo, rtol=1e-12)
    exact, ours = (gradient(policy.model, x) for x in (nelbo, by_quadrature))
    assert (exact - ours).norm() < 1e-12 * exact.norm()
    clipped = averaged(1e-3 + (1 - 1e-3) * (nodes + 1) / 2)         # what t >= 1e-3 costs
    assert 1e-6 < abs(clipped / nelbo - 1) < 2e-3


def test_noise_and_views_of_an_sft_example():
    tokens, B, P = torch.arange(12), 4, 5
    d = dirl.noised_document(tokens, P, torch.tensor([0.5, 1.0]), torch.tensor([[0.0] * 4, [0.6] * 4]), B, 99)
    assert d["ids"].tolist() == [*range(12), 4, 99, 99, 99, 99, 99, 99, 99]     # prompt token 4 stays clean
    assert d["target"].tolist() == [5, 6, 7, 8, 9, 10, 11] and d["reads"].tolist() == [13, 14, 15, 16, 17, 18, 19]
    assert torch.allclose(d["weight"], 1 / torch.tensor([0.5005] * 3 + [1.0] * 4))
    z = torch.tensor([[0.01] * 4, [0.9, 0.1, 0.9, 0.9]])
    d = dirl.noised_document(tokens, P, torch.tensor([0.0, 0.5]), z, B, 99)
    assert d["ids"].tolist() == [*range(12), 8, 99, 10, 11] and d["target"].tolist() == [9]
    assert d["pos"].tolist()[12:] == [8, 9, 10, 11]                # a block without a masked token has no view
    t = 1e-3 + (1 - 1e-3) * torch.tensor([0.5, 0.5])
    assert len(dirl.noised_document(tokens, P, torch.tensor([0.5, 0.5]), t[:, None].expand(2, 4), B, 99)["target"]) == 0   # z < t, not =


def test_example_ends_with_the_end_token_and_fills_its_block(policies):
    policy = policies(4)
    for text in ("", "1", "12", "123", "1234"):
        tokens, P = policy.example([{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}])
        tail = tokens[P + len(text):].tolist()
        assert len(tokens) % 4 == 0 and len(tail) <= 4
        assert tail[0] == policy.end_id and set(tail[1:]) <= {policy.eos_id}
        assert policy.tokenizer.decode(tokens[P:P + len(text)]) == text
        assert policy.tokenizer.decode(tokens[:P]) == "<|user|>hi<|im_end|><|assistant|>"


# ---- section 3.2: one forward scores a trajectory --------------------------------------------------------------


RULES = [("static", 1), ("static", 2), ("dynamic", 1), ("sequential", 1), ("sequential", 2)]


@pytest.mark.parametrize("B, rule, per_step", [(B, *rule) for B in (1, 2, 4, 8) for rule in RULES if B % rule[1] == 0])
def test_packed_scores_equal_step_by_step_scores(policies, B, rule, per_step):
    policy = policies(B)
    for confidence in ("top1", "drawn"):
        c, trajectories = rollouts(policy, "--unmask", rule, "--tokens-per-step", per_step, "--confidence", confidence)
        documents = documents_of(policy, trajectories)
        for t, d in zip(trajectories, documents):
            P, L = len(t.prompt), len(t.output)
            views = sum(int(t.steps[[p for p in range(L) if (P + p) // B == k]].max())
                        for k in range(P // B, (P + L) // B))
            assert (P + L) % B == 0 and len(d["ids"]) == P + L + B * views and len(d["reads"]) == L
            assert t.decoding_steps == views
        with torch.no_grad():
            rows = rows_of(policy, [d | {"at": torch.tensor([i] * len(d["reads"]))}
                                           for i, d in enumerate(documents)], 60)
            assert len(rows) > 1
            for row in rows:
                logp, _ = policy.score(row)
                for i in row["at"].unique().tolist():
                    slow = slow_scores(policy, trajectories[i])
                    assert (logp[row["at"] == i] - slow).abs().max() < 1e-4
                    assert (trajectories[i].logp - slow).abs().max() < 1e-4


@pytest.mark.parametrize("rule, per_step", RULES)
@pytest.mark.parametrize("confidence", ["top1", "drawn"])
def test_step_maps_follow_the_unmasking_rule(policies, rule, per_step, confidence):
    policy, several = policies(4), 0
    c, trajectories = rollouts(policy, "--unmask", rule, "--tokens-per-step", per_step, "--confidence", confidence,
                               greedy=True)
    for t in trajectories:
        tokens = torch.cat([t.prompt, t.output])
        for k, s, seen, committed in slow_states(policy, t):
            masked = [p for p in range(k * 4, k * 4 + 4) if seen[p] == policy.mask_id]
            top = slow_log_policy(policy, slow_logits(policy, seen).detach()).max(-1)
            assert all(tokens[p] == top.indices[p] for p in committed)          # greedy
            ordered = sorted(masked, key=lambda p: p if rule == "sequential" else -top.values[p].item())
            expected = ordered[:per_step]
            if rule == "dynamic":
                expected = [p for p in masked if float(top.values[p].exp()) >= 0.5] or ordered[:1]
            assert sorted(expected) == committed
            several += len(committed) > 1
    assert several or (rule != "dynamic" and per_step == 1)


def test_drawn_confidence_looks_at_the_drawn_token():
    log_pi = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]).log()
    token, masked = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    assert dirl.unmask(log_pi, token, masked, "static", 1, 0.9, "top1").tolist() == [[False, True]]
    assert dirl.unmask(log_pi, token, masked, "static", 1, 0.9, "drawn").tolist() == [[True, False]]
    assert dirl.unmask(log_pi, token, masked, "dynamic", 1, 0.6, "top1").tolist() == [[True, True]]
    assert dirl.unmask(log_pi, token, masked, "dynamic", 1, 0.95, "top1").tolist() == [[False, True]]
    assert dirl.unmask(log_pi, token, ~masked, "dynamic", 1, 0.0, "top1").tolist() == [[False, False]]
    threshold = float(log_pi[0, 1, 0].exp())                        # at >= threshold
    assert dirl.unmask(log_pi, token, masked, "dynamic", 1, threshold, "top1").tolist() == [[False, True]]
    assert dirl.unmask(log_pi, token, masked, "sequential", 1, 0.9, "top1").tolist() == [[True, False]]


def test_draw_inverts_the_distribution():
    log_pi = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]).log()
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = dirl.draw(log_pi.expand(1000, 5), u)
    assert tokens.bincount(minlength=5).tolist() == [100, 0, 600, 300, 0]
    assert dirl.draw(log_pi, torch.tensor(0.0, dtype=torch.float64)) == 0
    assert dirl.draw(torch.tensor([0.0, 1.0]).log(), torch.tensor(0.0, dtype=torch.float64)) == 1
    assert dirl.draw(log_pi, torch.tensor(1 - 2**-53, dtype=torch.float64)) == 3
    assert dirl.draw(torch.tensor([0.2, 0.3, 0.5]).log().expand(1000, 3), u).bincount().tolist() == [200, 300, 500]
    assert dirl.draw(torch.tensor([0.5, 0.4]).log(), torch.tensor(0.95, dtype=torch.float64)) == 1      # π that does not sum to 1
    assert dirl.draw(torch.tensor([-1e-9, -20.7]), torch.tensor(1 - 5e-10, dtype=torch.float64)) == 1   # nor is 1 - 1e-9 rounded to 1
    for more in range(-100, 100):                                   # nor does rounding ever lead past the last token
        log_pi = torch.tensor([0.5, 0.5 + more * 2**-51], dtype=torch.float64).log()
        assert dirl.draw(log_pi, torch.tensor(1 - 2**-53, dtype=torch.float64)) == 1


def test_uniform_depends_on_seed_position_and_tokens_left_and_on_nothing_else():
    seed, block, left = (x.flatten() for x in torch.meshgrid(torch.arange(40) * 7919, torch.arange(25), torch.arange(1, 5), indexing="ij"))
    u = dirl.uniform(seed, block[:, None] * 4 + torch.arange(4), left)                          # [4000, 4]
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == u.numel()
    histogram = (u.flatten() * 100).long().bincount(minlength=100)
    assert abs(float(((histogram - 160)**2 / 160).sum()) - 99) < 4 * (2 * 99)**0.5            # chi-square
    cells = u.view(40, 25, 4, 4)
    for a, b in ((cells[1:], cells[:-1]), (cells[:, 1:], cells[:, :-1]), (cells[:, :, 1:], cells[:, :, :-1]), (cells[..., 1:], cells[..., :-1])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.04
    assert torch.equal(dirl.uniform(seed[5:7], block[5:7, None] * 4 + torch.arange(4), left[5:7]), u[5:7])


def test_decoding_ends_after_the_first_block_with_a_stop_token_or_at_max_new_tokens(policies):
    policy, stopped = copy.copy(policies(4)), 0
    policy.stop_ids = torch.tensor([7, *range(20, 50)])             # likely ones, some of them in the prompts too
    for max_new in (1, 6, 13):
        c = flags("--max-new-tokens", max_new)
        prompts = prompts_of_every_remainder(policy)
        for t, prompt in zip(dirl.rollout(policy, prompts, [(3, i) for i in range(len(prompts))], c), prompts):
            P, L, output = len(prompt), len(t.output), t.output.tolist()
            is_stop = [x in policy.stop_ids.tolist() for x in output]
            before_last_block = is_stop[:(P + L) - 4 - P] if L > 4 else []
            assert t.prompt.tolist() == prompt and (P + L) % 4 == 0 and not any(before_last_block)
            assert any(is_stop) or L >= max_new
            assert (P + L) - 4 < P + max_new                        # not a block more than was asked
            end = is_stop.index(True) if any(is_stop[:max_new]) else max_new
            assert t.answer.tolist() == output[:end] and t.stopped == any(is_stop[:max_new])
            assert policy.mask_id not in output and len(t.steps) == len(t.logp) == L and (t.steps > 0).all()
            stopped += t.stopped
    assert stopped


def test_a_sample_depends_on_its_key_alone(policies):
    policy = policies(4)
    prompts, keys = prompts_of_every_remainder(policy), [(0, i) for i in range(9)]
    together = dirl.rollout(policy, prompts, keys, flags("--max-new-tokens", 13))
    torch.manual_seed(123)
    alone = dirl.rollout(policy, prompts, keys, flags("--max-new-tokens", 13, "--slots", 2))
    assert all(torch.equal(a.output, b.output) and torch.equal(a.steps, b.steps) for a, b in zip(together, alone))
    same = dirl.rollout(policy, [prompts[5]] * 8, [(1, i) for i in range(8)], flags("--max-new-tokens", 13))
    assert len({tuple(t.output.tolist()) for t in same}) == 8


# ---- Eq. 4-8 ---------------------------------------------------------------------------------------------------


def slow_C(ratio, A, eps, eps_high):
    clipped = min(max(ratio, 1 - eps), 1 + eps_high)
    return min(ratio * A, clipped * A)


def example_groups():
    """Two groups of three trajectories, each a list of decoding steps, each a list of (log π_θ, log π_old)."""
    g = torch.Generator().manual_seed(5)
    sizes = [[[1, 2, 1], [3], [2, 2]], [[1], [1, 1, 1, 4], [2]]]
    return [[[[(-1.5 * float(torch.rand((), generator=g)), -1.5 * float(torch.rand((), generator=g)))
               for _ in range(n)] for n in trajectory] for trajectory in group] for group in sizes]


@pytest.mark.parametrize("name", ["eq6", "eq7", "eq8"])
@pytest.mark.parametrize("count", ["steps", "tokens"])
def test_objectives_equal_transcriptions_with_loops(name, count):
    groups, rewards = example_groups(), [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]
    eps, eps_high, J, hits = 0.2, 0.3, 0.0, []
    for group, r in zip(groups, rewards):
        mean = sum(r) / len(r)
        size = [len(t) if count == "steps" else sum(map(len, t)) for t in group]
        for i, trajectory in enumerate(group):
            normaliser = 1 / size[i] if name == "eq6" else 1 / sum(size)
            for step in trajectory:
                ratios = [torch.tensor(new - old).exp().item() for new, old in step]
                if name == "eq8":
                    joint = 1.0
                    for ratio in ratios:
                        joint *= ratio
                    ratios = [joint]
                for ratio in ratios:
                    J += normaliser * slow_C(ratio, r[i] - mean, eps, eps_high) / len(groups)
                    hits.append(slow_C(ratio, r[i] - mean, eps, eps_high) < ratio * (r[i] - mean) - 1e-9)
    assert any(hits) and not all(hits)
    A = dirl.advantage(torch.tensor(rewards))
    size = torch.tensor([[len(t) if count == "steps" else sum(map(len, t)) for t in group] for group in groups])
    w = dirl.trajectory_weights(size, name)
    columns, view = [], 0
    for i, group in enumerate(groups):
        for j, trajectory in enumerate(group):
            for step in trajectory:
                columns += [(new, old, float(A[i, j]), float(w[i, j]), view) for new, old in step]
                view += 1
    logp, old, A, w = (torch.tensor(x) for x in list(zip(*columns))[:4])
    view = (torch.tensor([x[4] for x in columns]),) if name == "eq8" else ()
    fast, clipped = {"eq6": dirl.eq6, "eq7": dirl.eq7, "eq8": dirl.eq8}[name](logp, old, A, w, eps, eps_high, *view)
    assert abs(float(fast) - J) < 1e-6 and clipped.tolist() == hits
    empty = torch.zeros(0)
    none = (torch.zeros(0, dtype=torch.long),) if view else ()
    assert getattr(dirl, name)(empty, empty, empty, empty, eps, eps_high, *none)[0] == 0


def test_on_policy_all_objectives_have_the_gradient_of_reinforce():
    """At θ = θ_old and without a KL term: Σ w A ∇log π, whether the ratio is a token's or a step's."""
    logp = torch.randn(6, requires_grad=True)
    A, w, view = torch.randn(6)[[0, 0, 0, 1, 1, 2]], torch.rand(6)[[0, 0, 0, 1, 1, 2]], torch.tensor([0, 0, 1, 2, 2, 3])
    reinforce = torch.autograd.grad((w * A * logp).sum(), logp)[0]
    for fast, clipped in (dirl.eq6(logp, logp.detach(), A, w, 0.2, 0.2), dirl.eq7(logp, None, A, w, 0.2, 0.2),
                          dirl.eq7(logp, logp.detach(), A, w, 0.2, 0.2), dirl.eq8(logp, None, A, w, 0.2, 0.2, view),
                          dirl.eq8(logp, logp.detach(), A, w, 0.2, 0.2, view)):
        assert torch.allclose(torch.autograd.grad(fast, logp)[0], reinforce) and not clipped.any()
    J, clipped = dirl.eq8(*[torch.zeros(0)] * 4, 0.2, 0.2, torch.zeros(0, dtype=torch.long))          # a row without a place to read
    assert J == 0 and len(clipped) == 0


@pytest.mark.parametrize("name", ["eq6", "eq7", "eq8"])
def test_the_clip_acts_on_the_side_where_more_would_be_gained(name):
    """(ratio, A, whether C_ε holds): its gradient is w ρ A where it does not hold, else 0, and the value is w A times the
    ratio, or the bound. In Eq. 8 the ratio is that of two tokens, and neither is beyond the bounds alone."""
    for ratio, A, held in ((1.5, 2.0, True), (1.5, -2.0, False), (0.5, 2.0, False), (0.5, -2.0, True),
                           (1.25, 2.0, False), (0.85, -2.0, False), (1.35, 2.0, True), (0.75, -2.0, True)):
        n, eps, eps_high, w = 2 if name == "eq8" else 1, 0.2, 0.3, 0.7
        old = torch.full((n,), -1.3, dtype=torch.float64)
        logp = (old + math.log(ratio) / n).requires_grad_()
        view = (torch.zeros(n, dtype=torch.long),) if name == "eq8" else ()
        columns = (torch.full((n,), x, dtype=torch.float64) for x in (A, w))
        J, clipped = getattr(dirl, name)(logp, old, *columns, eps, eps_high, *view)
        bound = 1 + eps_high if ratio > 1 else 1 - eps
        assert clipped.tolist() == [held] and math.isclose(float(J.detach()), w * A * (bound if held else ratio), rel_tol=1e-12)
        expected = torch.full((n,), 0.0 if held else w * A * ratio, dtype=torch.float64)
        assert torch.allclose(torch.autograd.grad(J, logp)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", ["eq6", "eq7", "eq8"])
def test_the_second_update_moves_the_ratio(objective, trained, tmp_path):
    """With hardly an ε, C_ε holds nothing at the first update (Eq. 6: beyond rounding) and something at the second."""
    clipped = {}
    for updates in (1, 2):
        out = str(tmp_path / f"{updates}")
        dirl.main(["--model", os.path.join(trained, "sft"), "--out", out, "--objective", objective, "--eps", "1e-4", "--steps", "1",
                   "--warmup", "0", "--prompts", "4", "--group-size", "4", "--held-out", "0", "--updates", str(updates)])
        clipped[updates] = metrics(out, "rl")[0]["clip_fraction"]
    assert clipped[1] == 0 and clipped[2] > 0.1


def test_advantage():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [2.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(dirl.advantage(r), r - torch.tensor([[0.5], [0.5], [0.5]]))
    assert torch.allclose(dirl.advantage(r, True)[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert torch.equal(dirl.advantage(r, True)[1], torch.zeros(4))


def test_unbiased_kl_term():
    torch.manual_seed(0)
    theta, ref = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    log_pi, log_ref = theta.log_softmax(0), ref.log_softmax(0)
    exact = (log_pi.exp() * (log_pi - log_ref)).sum()
    expected = (log_pi.exp().detach() * dirl.kl_k3(log_pi, log_ref)).sum()       # E over tokens drawn from π_θ
    k3 = (log_ref - log_pi).exp() - 1 - (log_ref - log_pi)                       # without the factor before it
    assert torch.allclose(dirl.kl_k3(log_pi, log_ref), k3) and (k3 >= 0).all()    # a token's value is k3's
    plain, reverse = (log_pi.exp().detach() * k3).sum(), (log_ref.exp() * (log_ref - log_pi)).sum()
    ours, right, k3s, wrong = (torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (expected, exact, plain, reverse))
    assert torch.allclose(exact, expected) and torch.allclose(exact, plain)                  # the value is the same
    assert torch.allclose(ours, right) and torch.allclose(k3s, wrong)            # k3's own gradient: of KL(π_ref‖π_θ)
    print(f"k3 alone: its expected gradient is {float((k3s - right).norm() / right.norm()):.2f} off, relative; with "
          f"π_θ/sg[π_θ] before it {float((ours - right).norm() / right.norm()):.1e}")
    assert (k3s - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("objective", ["eq6", "eq7", "eq8"])
def test_gradient_does_not_depend_on_max_tokens(policies, objective):
    policy = policies(4)
    c, flat = rollouts(policy, "--objective", objective, n=8)
    groups = [(flat[:4], [1.0, 0.0, 0.0, 0.5]), (flat[4:], [0.0, 1.0, 1.0, 1.0])]
    gradients = []
    for max_tokens in (1, 150, 10**6):
        rows, _, _ = dirl.dipo_rows(policy, replace(c, max_tokens=max_tokens), groups)
        J = 0.0
        for row in rows:
            logp, _ = policy.score(row)
            view = (row["copy"][row["reads"]] - 1,) if objective == "eq8" else ()
            old = row["logp_sampler"] if objective == "eq6" else None
            J = J + getattr(dirl, objective)(logp, old, row["A"], row["w"], 0.2, 0.2, *view)[0]
        gradients.append(gradient(policy.model, J))
        assert len(rows) == {1: 8, 10**6: 1}.get(max_tokens, len(rows))
    assert all((g - gradients[0]).norm() < 1e-5 * gradients[0].norm() for g in gradients[1:])


def test_gradient_checkpointing_changes_nothing(policies):
    policy = policies(4)
    _, trajectories = rollouts(policy, n=4)
    row = rows_of(policy, documents_of(policy, trajectories), 10**6)[0]
    plain = gradient(policy.model, policy.score(row)[0].sum())
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        assert policy.model.training and torch.allclose(plain, gradient(policy.model, policy.score(row)[0].sum()), atol=1e-6)
        again = rollouts(policy, n=4)[1]                            # and the sampler's cache still works
        assert all(torch.equal(a.output, b.output) for a, b in zip(trajectories, again))
    finally:
        policy.model.activation_checkpointing_disable()


def test_dynamic_sampling_drops_exactly_the_flat_groups(policies):
    policy = policies(4)
    c = flags("--prompts", 3, "--group-size", 4, "--max-new-tokens", 4, "--max-attempts", 3)
    calls, asked = [], []

    def problem(i):
        asked.append(i)
        return [i + 1] * 5, ("mixed" if i in (1, 4, 5, 8) else "flat"), ""

    def reward(answer, truth):
        calls.append(truth)
        return len(calls) % 2 if truth == "mixed" else 1.0
    mixed, every, position = dirl.dynamic_sampling(policy, dirl.TorchEngine(policy, c), c, problem, reward, 1, 0, {})
    assert asked == [0, 1, 2, 3, 4, 5] and position == 5 or asked == list(range(position))
    assert [int(g[0].prompt[0]) - 1 for g, _ in mixed] == [1, 4, 5][:len(mixed)] and len(mixed) == 3
    assert len(every) == position and all(max(r) > min(r) for _, r in mixed)
    assert sum(max(r) == min(r) for _, r in every) == len(every) - len(mixed)
    never = dirl.dynamic_sampling(policy, dirl.TorchEngine(policy, c), c, lambda i: ([i + 1], "flat", ""), reward, 1, 7, {})
    assert never[0] == [] and len(never[1]) == 9 and never[2] == 16         # three rounds of three, then give up


# ---- what "unbiased" means: the gradient, by enumerating every trajectory ----------------------------------------


class Toy(torch.nn.Module):
    """One attention layer in float64 with the interface that Policy.score uses; 3 tokens and [MASK] = 3."""

    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        shapes = {"token": (4, 8), "place": (6, 8), "q": (8, 8), "k": (8, 8), "v": (8, 8), "up": (8, 16), "down": (16, 8)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(0.8 * torch.randn(shape, generator=g, dtype=torch.float64)))
        self.lm_head = torch.nn.Linear(8, 4, bias=False, dtype=torch.float64)
        self.lm_head.weight.data = 0.6 * torch.randn(4, 8, generator=g, dtype=torch.float64)
        self.device = torch.device("cpu")

    def model(self, input_ids, position_ids, attention_mask, **unused):
        mask = attention_mask["full_attention"]
        if isinstance(mask, list):                                  # strips
            full = torch.zeros(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool)
            for rows, (kv, seen) in zip(torch.arange(len(full)).split(len(mask[0][1])), mask):
                full[rows[:, None], kv] = seen
            mask = full[None, None]
        x = self.token[input_ids] + self.place[position_ids]
        scores = (x @ self.q) @ (x @ self.k).transpose(1, 2) / 8**0.5
        x = x + scores.masked_fill(~mask[0], -torch.inf).softmax(-1) @ x @ self.v
        return SimpleNamespace(last_hidden_state=x + torch.tanh(x @ self.up) @ self.down)


def toy_policy():
    return dirl.Policy(Toy(seed=57), None, None, 3, 3, 0, 0, 1.0)


def every_path(policy, prompt, rule):
    """Every way to decode one block: (probability, output, step map, log-probability of all candidates drawn).

    A path draws a candidate for each masked position at each step; dirl.unmask says which of them are committed."""
    positions = torch.arange(6)
    mask = (positions[None, :] // 3 <= positions[:, None] // 3)[None, None]

    def walk(block, steps, s, log_p):
        masked = block == 3
        if not masked.any():
            yield log_p.exp(), block, steps, log_p
            return
        ids = torch.cat([prompt, block])[None]
        logits = policy.hidden(ids, positions[None], mask)[0, 3:] @ policy.model.lm_head.weight.T
        log_pi = dirl.log_policy(logits, 1.0, 3)                                             # [3, vocab]
        for drawn in itertools.product(range(3), repeat=int(masked.sum())):
            token = block.clone()
            token[masked] = torch.tensor(drawn)
            new = dirl.unmask(log_pi[None], token[None], masked[None], *rule)[0]
            log_draw = log_pi[masked].gather(1, token[masked][:, None]).sum()
            yield from walk(torch.where(new, token, block), torch.where(new, s, steps), s + 1, log_p + log_draw)
    start = torch.full((3,), 3), torch.zeros(3, dtype=torch.long), 1, torch.zeros((), dtype=torch.float64)
    yield from walk(*start)


@functools.cache
def enumerated(rule):
    """Of each of two prompts: every trajectory, with its probability p (differentiable), the reward, |τ|, its document,
    and `every`, Σ over its paths of p times the log-probability of all candidates drawn, rejected ones too."""
    policy, rewards = toy_policy(), torch.randn(27, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    tables = []
    for prompt in torch.tensor([[0, 2, 1], [1, 1, 2]]):
        found = {}
        for p, output, steps, log_p in every_path(policy, prompt, rule):
            entry = found.setdefault((*output.tolist(), *steps.tolist()), [0.0, 0.0, output, steps])
            entry[0], entry[1] = entry[0] + p, entry[1] + p.detach() * log_p
        p, every, output, steps = zip(*found.values())
        tables.append(SimpleNamespace(
            p=torch.stack(p), every=torch.stack(every), r=torch.stack([rewards[o @ torch.tensor([1, 3, 9])] for o in output]),
            size=torch.stack([s.max() for s in steps]).double(), steps=steps,
            documents=[dirl.trajectory_document(prompt, o, s, 3, 3) for o, s in zip(output, steps)]))
        assert abs(float(tables[-1].p.detach().sum()) - 1) < 1e-12
    return policy, tables


def dipo_gradient(policy, tables, coefficients):
    """Gradient of Eq. 8 where trajectory i of a prompt's table enters with a factor: [prompts] of [trajectories]."""
    documents = [d | {"A": torch.ones(3, dtype=torch.float64), "w": factor.expand(3)}
                 for table, factors in zip(tables, coefficients) for d, factor in zip(table.documents, factors)]
    J = 0.0
    for row in rows_of(policy, documents, 600):
        J = J + dirl.eq8(policy.score(row)[0], None, row["A"], row["w"], 0.2, 0.2, row["copy"][row["reads"]] - 1)[0]
    return gradient(policy.model, J)


def in_groups(table, r, G, objective="eq6", adv_std=False, dropped=False):
    """What a trajectory's factor is in expectation over all groups of G: the batch is every group there can be, each
    with its probability; dropped: flat groups do not count, and the rest makes up for them. [trajectories]"""
    n, p = len(table.p), table.p.detach()
    groups = torch.cartesian_prod(*[torch.arange(n)] * G)                                    # [n^G, G]
    P = p[groups].prod(1)
    if dropped:
        P = P * (r[groups].amax(1) > r[groups].amin(1))
        P = P / P.sum()
    A = dirl.advantage(r[groups], adv_std)
    w = dirl.trajectory_weights(table.size[groups], objective) * len(groups)        # its mean over groups becomes P
    return torch.zeros(n, dtype=torch.float64).index_add(0, groups.flatten(), (P[:, None] * A * w).flatten())


def mixed_share(table, r, G):
    """The probability that a group of G has unequal rewards."""
    groups = torch.cartesian_prod(*[torch.arange(len(table.p))] * G)
    return table.p.detach()[groups].prod(1) @ (r[groups].amax(1) > r[groups].amin(1)).double()


def exact_gradient(policy, tables, rewards=None):
    """Of E[R], summed over the prompts; rewards: in place of the tables'."""
    return gradient(policy.model, sum((t.p * (t.r if rewards is None else r)).sum()
                                      for t, r in zip(tables, rewards or [None] * len(tables))))


def bias(estimate, exact):
    """What remains of the exact gradient's norm after the best scaling of the estimate: the sine of their angle."""
    scale = (estimate @ exact) / (estimate @ estimate)
    return float((scale * estimate - exact).norm() / exact.norm())


@pytest.mark.parametrize("rule, confidence", [("sequential", "top1"), ("static", "top1"), ("dynamic", "top1"),
                                              ("static", "drawn"), ("dynamic", "drawn")])
def test_unbiased_unless_a_token_is_kept_for_its_own_value(rule, confidence):
    """With a constant baseline and normaliser."""
    policy, tables = enumerated((rule, 1, 0.7, confidence))
    baseline, normaliser = 0.3, 1.7
    exact = exact_gradient(policy, tables)
    committed = normaliser * dipo_gradient(policy, tables, [t.p.detach() * (t.r - baseline) / normaliser for t in tables])
    every = gradient(policy.model, sum((t.every * (t.r - baseline)).sum() for t in tables))
    error = float((committed - exact).norm() / exact.norm())
    print(f"{rule}, {confidence}: relative error of the expected gradient {error:.1e}, with rejected candidates scored too "
          f"{float((every - exact).norm() / exact.norm()):.1e}")
    assert float((every - exact).norm() / exact.norm()) < 1e-10     # scoring rejected candidates too is always exact
    assert error < 1e-10 if confidence == "top1" else error > 0.1
    sizes = {int((steps == s).sum()) for t in tables for steps in t.steps for s in steps.tolist()}
    assert sizes == ({1, 2, 3} if rule == "dynamic" else {1})


@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("objective", ["eq6", "eq7"])
def test_unbiased_means_up_to_the_group_mean(G, objective):
    """|τ| = 3 always: 1/|τ_i| or 1/Σ|τ_i| is a constant, and a mean that contains r_i leaves (G-1)/G of the gradient."""
    policy, tables = enumerated(("static", 1, 0.7, "top1"))
    exact = exact_gradient(policy, tables)
    estimate = dipo_gradient(policy, tables, [in_groups(t, t.r, G, objective) for t in tables])
    normaliser = {"eq6": 1 / 3, "eq7": 1 / (3 * G)}[objective]      # of each of the G trajectories
    expected = (G - 1) / G * G * normaliser * exact
    print(f"static, {objective}, G = {G}: relative error against (G-1)/G of the gradient "
          f"{float((estimate - expected).norm() / expected.norm()):.1e}")
    assert (estimate - expected).norm() < 1e-10 * expected.norm()


def test_unbiased_no_more_where_the_length_depends_on_the_draws():
    """The second prompt takes two decoding steps or three."""
    policy, (one, two) = enumerated(("dynamic", 1, 0.7, "top1"))
    assert set(one.size.tolist()) == {1} and set(two.size.tolist()) == {2, 3}
    exact, p, errors = exact_gradient(policy, [two]), two.p.detach(), {}
    for name, factors in (("a constant", p * two.r), ("1/|τ_i|, constant baseline", p * (two.r - 0.3) / two.size),
                          *((f"{w}, group mean, G = {G}", in_groups(two, two.r, G, objective))
                            for w, objective in (("1/|τ_i|", "eq6"), ("1/Σ|τ_i|", "eq8")) for G in (2, 4))):
        errors[name] = bias(dipo_gradient(policy, [two], [factors]), exact)
        print(f"dynamic, top1, weighted by {name}: relative error after the best scaling {errors[name]:.1e}")
    constant, eq6, *eq6_groups, eq8_of_two, eq8_of_four = errors.values()
    assert constant < 1e-10 and min(eq6, *eq6_groups, eq8_of_two) > 0.02
    assert eq8_of_four < 0.6 * eq8_of_two                           # the sum over a group hardly depends on one of it


@pytest.mark.parametrize("name", ["--adv-std", "flat groups, same prompt again"])
def test_unbiased_for_another_average_of_the_prompts(name):
    """Right or wrong answers: dividing by the group's standard deviation, and sampling a prompt until its group is mixed, leave
    each prompt's gradient exact in direction and weigh the prompts anew, by their rate of right answers."""
    policy, tables = enumerated(("static", 1, 0.7, "top1"))
    G, rewards, scales, options = 4, [(t.r > 0.3).double() for t in tables], [], {"adv_std": name == "--adv-std"}
    options["dropped"] = not options["adv_std"]

    def A(right, others_right):                                     # of a right or wrong one beside K right others
        mean = (right + others_right) / G
        return 0 if mean in (0, 1) else (right - mean) / (mean * (1 - mean))**0.5
    for t, r in zip(tables, rewards):
        rate, exact = float((t.p.detach() * r).sum()), exact_gradient(policy, [t], [r])
        estimate = 3 * dipo_gradient(policy, [t], [in_groups(t, r, G, "eq8", **options)])    # Eq. 8's mean: |τ| = 3
        scales.append(float(estimate @ exact / (exact @ exact)))
        expected = (G - 1) / G / (1 - rate**G - (1 - rate)**G)      # over the share of mixed groups
        if name == "--adv-std":
            expected = sum(math.comb(G - 1, K) * rate**K * (1 - rate)**(G - 1 - K) * (A(1, K) - A(0, K)) for K in range(G))
        print(f"{name}: rate {rate:.3f} of right answers, the prompt's gradient times {scales[-1]:.4f} "
              f"(expected {expected:.4f})")
        assert bias(estimate, exact) < 1e-10 and abs(scales[-1] - expected) < 1e-10 and 0.05 < rate < 0.95
    assert abs(scales[0] / scales[1] - 1) > 0.01
    if name == "flat groups, same prompt again":
        # DAPO, and dirl.dynamic_sampling, draw *other* prompts: one counts as often as its groups are mixed, which is exact again.
        for chosen in (rewards, [t.r for t in tables]):
            share = torch.stack([mixed_share(t, r, G) for t, r in zip(tables, chosen)])
            factors = [in_groups(t, r, G, "eq8", dropped=True) * s for t, r, s in zip(tables, chosen, share / share.sum())]
            estimate, exact = dipo_gradient(policy, tables, factors), exact_gradient(policy, tables, chosen)
            print(f"flat groups, other prompts instead: relative error after the best scaling {bias(estimate, exact):.1e}")
            assert bias(estimate, exact) < 1e-10
            assert abs(3 * estimate @ exact / (exact @ exact) - (G - 1) / G / share.sum()) < 1e-10
    both = dipo_gradient(policy, tables, [in_groups(t, r, G, "eq8", **options) for t, r in zip(tables, rewards)])
    error = bias(both, exact_gradient(policy, tables, rewards))
    real = bias(dipo_gradient(policy, tables, [in_groups(t, t.r, G, "eq8", **options) for t in tables]),
                exact_gradient(policy, tables))
    print(f"{name}: relative error over both prompts {error:.1e}; where rewards are real numbers {real:.1e}")
    assert error > 1e-3 and real > 1e-3


# ---- LMDeploy: the real engine, without its CUDA pieces where there is no GPU --------------------------------------


class Nothing:
    """A CUDA stream or event on a machine without CUDA: everything is done when it is asked for."""
    def __init__(self, *args, **more):
        pass

    def query(self):
        return True

    def __getattr__(self, name):
        return lambda *args, **more: None


class PagedAttention:
    """What LMDeploy's kernel computes: block-causal attention over a paged cache, one sequence after the other."""
    def __init__(self, spec):
        self.scale, self.B = spec.scale or spec.head_dim**-0.5, spec.block_sparse_size

    def forward(self, query, key, value, key_cache, value_cache, attn_metadata, **unused):
        page_size, out, done = key_cache.shape[1], [], 0
        for n, kv, pages in zip(*(getattr(attn_metadata, x).tolist() for x in ("q_seqlens", "kv_seqlens", "block_offsets"))):
            position = torch.arange(kv)
            at, rows = (torch.tensor(pages)[position // page_size], position % page_size), slice(done, done + n)
            for cache, new in ((key_cache, key), (value_cache, value)):
                cache[at[0][kv - n:], at[1][kv - n:]] = new[rows].to(cache.dtype)
            q, k, v = (x.transpose(0, 1) for x in (query[rows], key_cache[at], value_cache[at]))      # [heads, tokens, dim]
            k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
            mask = position // self.B <= position[kv - n:, None] // self.B
            out.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=self.scale).transpose(0, 1))
            done += n
        return torch.cat(out)


@functools.cache
def lmdeploy_on_cpu():
    """LMDeploy's engine, scheduler, model agent and SDAR model on this CPU in float32: only what is CUDA is replaced, by
    LMDeploy's own plain PyTorch operators and by the attention above. Does nothing on a machine with a GPU."""
    if torch.cuda.is_available():
        return
    os.environ |= {"LMDEPLOY_ENABLE_CHECK_ENV": "0", "LMDEPLOY_SKIP_WARMUP": "1"}
    from lmdeploy.pytorch import config
    from lmdeploy.pytorch.backends import attention, selector
    from lmdeploy.pytorch.backends.default import cache, op_backend
    from lmdeploy.pytorch.engine.cache_engine.plan import BlockCachePlan
    from lmdeploy.pytorch.engine.model_agent import agent

    class Backend(op_backend.DefaultOpsBackend):
        get_attention_metadata_cls = staticmethod(lambda: attention.AttentionMetadata)
        get_cache_backend = staticmethod(lambda: cache.DefaultCacheBackend)

        @classmethod
        def build_op(cls, spec, **more):
            paged = isinstance(spec, attention.PagedAttentionBuildSpec)
            return PagedAttention(spec) if paged else super().build_op(spec, **more)

        @classmethod
        def update_step_context(cls, context):
            fields = ("is_decoding", "block_offsets", "q_start_loc", "q_seqlens", "kv_seqlens")
            context.attn_metadata = attention.AttentionMetadata(*(getattr(context, name) for name in fields))
            return context

    def wrap(owner, name, around):
        setattr(owner, name, functools.partialmethod(around, getattr(owner, name)) if isinstance(owner, type) else
                functools.partial(around, getattr(owner, name)))

    def on_cpu(self, init, *args, **more):
        init(self, *args, **more)
        self.device = "cpu"

    def allocate_on_cpu(self, allocate, num_logical_blocks, device):
        return allocate(self, num_logical_blocks=num_logical_blocks, device="cpu")

    def in_float32(update, *args, **more):
        made = update(*args, **more)
        made.dtype = torch.float32
        return made
    selector._get_backend = lambda: Backend
    config.is_bf16_supported = lambda *args: True
    torch._dynamo.config.disable = True                             # LMDeploy compiles small functions: 20 s for nothing here
    agent._try_to_cuda = lambda x, non_blocking=False: x.to_device("cpu") if hasattr(x, "to_device") else x
    agent.get_gpu_memory = lambda *args: (2**31, 2**31)
    wrap(agent.BaseModelAgent, "__init__", on_cpu)
    wrap(BlockCachePlan, "allocate", allocate_on_cpu)
    wrap(config, "_update_torch_dtype", in_float32)
    torch.cuda.Stream = torch.cuda.Event = Nothing
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_stream = torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args: None
    torch.cuda.current_device = lambda: "cpu"
    torch._C._cuda_clearCublasWorkspaces = lambda: None


@pytest.fixture
def lmdeploy_engine(monkeypatch):
    """A maker of LMDeploy engines, closed after the test."""
    lmdeploy_on_cpu()
    monkeypatch.setattr(dirl, "lmdeploy_runs", lambda: True)
    with contextlib.ExitStack() as stack:
        def make(policy, c, **options):
            small = {} if torch.cuda.is_available() else {"num_gpu_blocks": 64, "block_size": 16, "eager_mode": True}
            engine = dirl.LMDeployEngine(policy, c, **small | options)
            stack.callback(engine.close)
            return engine
        yield make


def assert_same(ours, theirs, atol=1e-4):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.prompt.tolist() == b.prompt.tolist() and a.output.tolist() == b.output.tolist()
        assert a.steps.tolist() == b.steps.tolist() and (a.logp - b.logp).abs().max() < atol
        assert a.answer.tolist() == b.answer.tolist() and (a.stopped, a.decoding_steps) == (b.stopped, b.decoding_steps)


@pytest.mark.parametrize("B", [4, 8])
@pytest.mark.parametrize("rule, per_step", RULES)
@pytest.mark.parametrize("confidence", ["top1", "drawn"])
def test_lmdeploy_decodes_as_our_sampler(policies, lmdeploy_engine, B, rule, per_step, confidence):
    """Greedy trajectories are the same. Sampled ones too, but where a random number falls on a boundary between two tokens;
    their log-probabilities are those of a replay, one forward a step."""
    policy, engine = policies(B), None
    for max_new in (1, 6, 21):
        c = flags("--block-size", B, "--unmask", rule, "--tokens-per-step", per_step, "--confidence", confidence,
                  "--max-new-tokens", max_new, "--threshold", 0.5, "--slots", 32)
        engine = engine or lmdeploy_engine(policy, replace(c, max_new_tokens=21))
        engine.c, prompts = c, prompts_of_every_remainder(policy)
        keys = [(5, i) for i in range(len(prompts))]
        assert_same(dirl.rollout(policy, prompts, keys, c, greedy=True), engine.generate(prompts, keys, greedy=True))
        ours, theirs = dirl.rollout(policy, prompts, keys, c), engine.generate(prompts, keys)
        assert sum(torch.equal(a.output, b.output) and torch.equal(a.steps, b.steps) for a, b in zip(ours, theirs)) > 0.8 * len(ours)
        if max_new == 6:
            with torch.no_grad():
                assert all((t.logp - slow_scores(policy, t)).abs().max() < 1e-4 for t in theirs)


def test_lmdeploy_requests_of_different_temperatures_share_a_batch(policies, lmdeploy_engine):
    class Varied(dirl.Policy):
        temperatures = itertools.cycle((0.5, 1.0, 1.7))
        temperature = property(lambda self: next(self.temperatures), lambda self, value: None)
    policy = policies(4)
    c = flags("--max-new-tokens", 9, "--threshold", 0.5)
    varied = Varied(**{f.name: getattr(policy, f.name) for f in fields(dirl.Policy)})
    prompts, engine = prompts_of_every_remainder(policy), lmdeploy_engine(varied, c)
    keys = [(5, i) for i in range(9)]
    for t, T in zip(engine.generate(prompts, keys), (0.5, 1.0, 1.7) * 3):
        with torch.no_grad():
            assert (t.logp - slow_scores(policy, t, T)).abs().max() < 1e-4


def test_lmdeploy_more_requests_than_slots_preemption_and_prefill_in_chunks(policies, lmdeploy_engine, monkeypatch):
    from lmdeploy.pytorch.paging.scheduler import Scheduler
    policy, preempted, preempt = policies(4), [], Scheduler.preempt_seqs
    c = flags("--max-new-tokens", 90, "--threshold", 0.5, "--slots", 6)
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 200, (n,), generator=g).tolist() for n in (100, 33, 5, 64, 131, *range(1, 60, 4))]
    keys = [(6, i) for i in range(len(prompts))]
    monkeypatch.setattr(Scheduler, "preempt_seqs", lambda self, seqs: (preempted.extend(seqs), preempt(self, seqs))[1])
    engine = lmdeploy_engine(policy, c, **({} if torch.cuda.is_available() else
                                           {"num_gpu_blocks": 20, "max_prefill_token_num": 32}))
    assert_same(dirl.rollout(policy, prompts, keys, c, greedy=True), engine.generate(prompts, keys, greedy=True))
    assert preempted or torch.cuda.is_available()


@pytest.mark.parametrize("tied", [False, True])
def test_lmdeploy_takes_new_weights_awake_or_after_sleep(policies, lmdeploy_engine, tmp_path, tied):
    """In every order, the outputs are those of an engine built from a checkpoint with the same weights."""
    start = policies(4).folder if not tied else tied_copy(policies(4).folder, str(tmp_path / "tied"))
    c = flags("--max-new-tokens", 9, "--threshold", 0.5)
    policy = dirl.load_policy(start, c, dirl.read_config(start, c))
    policy.folder, prompts = start, prompts_of_every_remainder(policy)
    original = {name: weight.clone() for name, weight in policy.named_weights()}
    assert ("lm_head.weight" in original) != tied

    def set_weights(noise):
        g = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, weight in policy.named_weights():
                noisy = original[name] + noise * torch.randn(weight.shape, generator=g).to(weight)
                weight.copy_(noisy.bfloat16())                      # as a checkpoint in bfloat16 holds it
    expected = {}
    for noise in (0.0, 0.05):
        set_weights(noise)
        dirl.save_policy(policy, str(tmp_path / f"{noise}"))
        saved = dirl.load_policy(str(tmp_path / f"{noise}"), c, dirl.read_config(str(tmp_path / f"{noise}"), c))
        expected[noise] = lmdeploy_engine(saved, c).generate(prompts, [(7, i) for i in range(9)], greedy=True)
    assert any(a.output.tolist() != b.output.tolist() for a, b in zip(*expected.values()))
    engine = lmdeploy_engine(policy, c)
    for orders in (("update",), ("sleep", "update"), ("update", "sleep", "update"), ("sleep", "sleep", "update"), ("update", "update")):
        for noise in (0.0, 0.05):
            set_weights(noise)
            for name in orders:
                {"update": engine.update_weights, "sleep": engine.sleep}[name]()
            assert_same(expected[noise], engine.generate(prompts, [(7, i) for i in range(9)], greedy=True))


def test_lmdeploy_weights_that_do_not_arrive_are_an_error(policies, lmdeploy_engine, monkeypatch):
    policy = copy.copy(policies(4))
    engine = lmdeploy_engine(policy, flags())
    model = type(engine.engine.executor.model_agent.patched_model.get_model())
    monkeypatch.setattr(model, "load_weights", lambda self, weights: None)
    engine.update_weights()                                         # the same ones: nothing is stale
    monkeypatch.setattr(dirl.Policy, "named_weights", lambda self: iter([("model.norm.weight", torch.full((128,), 1.01))]))
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        engine.update_weights()


def test_lmdeploy_a_failed_request_is_an_error_that_names_it(policies, lmdeploy_engine, monkeypatch):
    policy, c = policies(4), flags("--max-new-tokens", 40, "--max-length", 60)
    engine = lmdeploy_engine(policy, c)
    with pytest.raises(RuntimeError, match="request 1 of 2, prompt of 90 tokens"):
        engine.generate([[1] * 5, [1] * 90], [(0, 0), (0, 1)])
    stream = engine.instance.async_stream_infer

    async def aborted(session, *args, **more):
        async for response in stream(session, *args, **more):
            yield response
            await engine.instance.async_cancel(session)
    engine.instance.async_stream_infer = aborted
    with pytest.raises(RuntimeError, match="request 0 of 1.*CANCEL"):
        engine.generate([[1] * 5], [(0, 0)])
    engine.instance.async_stream_infer = stream
    assert len(engine.generate([[1] * 5], [(0, 0)])) == 1           # and the engine lives on
    monkeypatch.setattr(dirl, "denoise", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="request 0 of 1"):       # an exception in its loop is not a hang
        engine.generate([[1] * 5], [(0, 0)])


def test_lmdeploy_stops_in_the_block_that_the_prompt_begins(policies, lmdeploy_engine):
    policy, c = copy.copy(policies(4)), flags("--max-new-tokens", 30, "--threshold", 0.5)
    prompts, keys = [[5] * n for n in (1, 2, 3, 5, 6, 7)], [(0, i) for i in range(6)]
    first = [int(t.output[0]) for t in dirl.rollout(policy, prompts, keys, c, greedy=True)]
    policy.stop_ids = torch.tensor([*first, 5])                     # 5 stands in the prompts: it must not stop them there
    theirs = lmdeploy_engine(policy, c).generate(prompts, keys, greedy=True)
    assert all(len(t.output) == -len(t.prompt) % 4 and t.stopped for t in theirs)
    assert_same(dirl.rollout(policy, prompts, keys, c, greedy=True), theirs)


def test_lmdeploy_rollouts_of_one_prompt_differ_and_follow_the_policy(policies, lmdeploy_engine):
    """Stock LMDeploy gives 16 rollouts of a prompt 4 different outputs (seeds tiled in the wrong order)."""
    policy, prompt = policies(4), prompts_of_every_remainder(policies(4))[6]
    c = flags("--max-new-tokens", 1, "--slots", 64, "--max-length", 16)
    theirs = lmdeploy_engine(policy, replace(c, max_new_tokens=13)).generate([prompt] * 16, [(8, i) for i in range(16)])
    assert len({tuple(t.output.tolist()) for t in theirs}) == 16
    n, engine = 2000, lmdeploy_engine(policy, c)
    outputs = torch.cat([t.output for t in engine.generate([prompt] * n, [(9, i) for i in range(n)])])
    with torch.no_grad():
        logits = slow_logits(policy, torch.tensor([*prompt, policy.mask_id]))[-1]
    p = slow_log_policy(policy, logits).exp().double()
    likely = (n * p >= 5).nonzero()[:, 0].tolist()                  # the rest is one class
    classes = [(int((outputs == x).sum()), n * float(p[x])) for x in likely]
    classes.append((n - sum(seen for seen, _ in classes), n - sum(expected for _, expected in classes)))
    chi2, freedom = sum((seen - expected)**2 / expected for seen, expected in classes), len(classes) - 1
    assert freedom > 10 and abs(chi2 - freedom) < 4 * (2 * freedom)**0.5


def test_rl_with_lmdeploy(trained, lmdeploy_engine, tmp_path, monkeypatch, capsys):
    """A few steps of the tiny model: sampler and trainer agree at every step, and the engine ends with the trainer's weights."""
    engines = []
    build, close = dirl.LMDeployEngine.__init__, dirl.LMDeployEngine.close

    def small(self, policy, c):
        build(self, policy, c, **{} if torch.cuda.is_available() else {"num_gpu_blocks": 400, "block_size": 16, "eager_mode": True})
        engines.append(self)
    monkeypatch.setattr(dirl.LMDeployEngine, "__init__", small)
    monkeypatch.setattr(dirl.LMDeployEngine, "close", lambda self: None)
    out = str(tmp_path / "run")
    argv = ["--model", os.path.join(trained, "sft"), "--engine", "lmdeploy", "--prompts", "4", "--group-size", "4", "--warmup", "0",
            "--lr", "1e-3", "--held-out", "8"]
    dirl.main([*argv, "--out", out + " in two parts", "--steps", "2"])
    dirl.main([*argv, "--out", out + " in two parts", "--steps", "4", "--resume"])        # a new engine takes the resumed weights
    for engine in engines:
        close(engine)
    engines.clear()
    dirl.main([*argv, "--out", out, "--steps", "4"])
    whole, parts = (metrics(x, "rl") for x in (out, out + " in two parts"))
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    assert all(a["reward"] == b["reward"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5) for a, b in zip(whole, parts))
    assert all(line["logp_gap"] is None or line["logp_gap"] < 1e-3 for line in parts)
    lines, c = metrics(out, "rl"), flags("--max-new-tokens", 48)
    assert len(lines) == 4 and all(line["logp_gap"] is None or line["logp_gap"] < 1e-3 for line in lines)
    assert any(line["logp_gap"] is not None for line in lines) and all("seconds_weights" in line for line in lines)
    saved = dirl.load_policy(os.path.join(out, "rl"), c, dirl.read_config(os.path.join(out, "rl"), c))
    prompts = [saved.prompt([{"role": "user", "content": dirl.arithmetic(i)[0]}]) for i in range(8)]
    monkeypatch.undo()
    keys, (engine,) = [(0, i) for i in range(8)], engines
    assert_same(lmdeploy_engine(saved, c).generate(prompts, keys, greedy=True), engine.generate(prompts, keys, greedy=True))
    close(engine)
    with pytest.raises(SystemExit):                                 # a gap is an end, with the step's line written
        dirl.main(["--model", os.path.join(trained, "sft"), "--out", out + "2", "--steps", "3", "--prompts", "4", "--held-out", "0",
                   "--engine", "torch", "--max-logp-gap", "1e-12"])
    assert "--max-logp-gap" in capsys.readouterr().err and len(metrics(out + "2", "rl")) == 1


def test_another_lmdeploy_is_a_warning_and_one_without_the_patch_point_an_error(policies, lmdeploy_engine, monkeypatch, capsys):
    import lmdeploy
    from lmdeploy.pytorch.strategies import dllm
    monkeypatch.setattr(lmdeploy, "__version__", "0.19.0")
    engine = lmdeploy_engine(policies(4), flags("--engine-memory", 0.2))
    assert "lmdeploy 0.19.0" in capsys.readouterr().err
    assert engine.engine.cache_config.cache_max_entry_count == 0.2
    monkeypatch.delattr(dllm.sequence.SchedulerSequenceDLLM, "set_stop_pos")
    with pytest.raises(SystemExit):
        lmdeploy_engine(policies(4), flags())
    assert "set_stop_pos" in capsys.readouterr().err


# ---- data and reward --------------------------------------------------------------------------------------------


def test_reward_on_a_table_of_answers():
    table = [(r"so \boxed{42}", "42", 1), (r"\boxed{41} no, \boxed{42}", "42", 1), (r"\boxed{42} no, \boxed{41}", "42", 0),
             ("42", "42", 0), (r"\boxed{\frac{1}{2}}", "0.5", 1), (r"\boxed{0.5}", r"\frac{1}{2}", 1),
             (r"\boxed{1,000}", "1000", 1), (r"\boxed{x^2+2x+1}", "(x+1)^2", 1), (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
             (r"\boxed{}", "42", 0), (r"\boxed{42", "42", 0), ("", "42", 0), (r"\boxed{-3}", "3", 0),
             (r"\boxed{(1,2)}", "(1,2)", 1), (r"\boxed{18\text{ dollars}}", "18", 1), (r"\boxed{\text{no}}", "42", 0)]
    for answer, truth, expected in table:
        assert dirl.math_reward(answer, truth) == expected, (answer, truth)
    assert dirl.arithmetic_reward("1+1=2,2+3=5", "5") == 1 and dirl.arithmetic_reward("1+1=2,2+3=5,", "5") == 0
    assert dirl.arithmetic_reward("1+1=2", "5") == 0 and dirl.arithmetic_reward("", "5") == 0


@pytest.mark.parametrize("answer", [
    r"\boxed{9^9^9^9}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{" + "{" * 10**6 + "}" * 10**6 + "}", r"\boxed{" * 10**5,
    r"\boxed{\frac{1}{}}", r"\boxed{\begin{matrix}1&2\\}", r"\boxed{" + "((((" * 40 + "1" + "))))" * 40 + "}",
    r"\boxed{1000000000!}", r"\boxed{\int_0^{\infty} \frac{\sin x^{x^x}}{x} dx}", r"\boxed{10^{10^{10}}}",
    r"\boxed{\x00\ud83d}", r"\boxed{\sum_{i=1}^{10^{12}} i^i}", r"\boxed{2^{2^{2^{2^{2^{2}}}}}}"])
def test_hostile_answers_earn_nothing_and_stop_nothing(answer):
    start = time.perf_counter()
    assert dirl.math_reward(answer, "42") == 0
    assert time.perf_counter() - start < 5


def test_built_in_task():
    questions, remainders, lengths, rewards = set(), set(), [], []
    for i in range(400):
        question, work, truth = dirl.arithmetic(i)
        assert str(eval(question.rstrip("="))) == truth             # the chain itself
        for term in work.split(","):
            left, right = term.split("=")
            assert str(eval(left)) == right
        questions.add(question)
        remainders.add((len(question) + 3) % 4)
        lengths.append((len(work) + 1) / 4)
        rewards.append(dirl.arithmetic_reward(work, truth))
    assert remainders == {0, 1, 2, 3} and sum(lengths) / 400 >= 3 and len(questions) > 350
    assert abs(sum(rewards) / 400 - 0.25) < 0.06                    # two of eight demonstrations are right
    held_out = {dirl.arithmetic(i, held_out=True)[0] for i in range(300)}
    assert not questions & held_out and dirl.arithmetic(5) == dirl.arithmetic(5)


def test_problems_in_the_formats_of_dirl_gsm8k_math_and_big_math(tmp_path):
    records = [{"question": "a", "ground_truth_answer": 3}, {"question": "b", "answer": "work\n#### 1,234"},
               {"problem": "c", "solution": r"thus \boxed{\frac{1}{2}}."}, {"problem": "d", "answer": "x"}]
    for name, text in (("p.json", json.dumps(records)), ("p.jsonl", "\n\n".join(map(json.dumps, records)) + "\n")):
        (tmp_path / name).write_text(text)
        assert dirl.read_problems(str(tmp_path / name)) == [("a", "3"), ("b", "1,234"), ("c", r"\frac{1}{2}"), ("d", "x")]
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    (tmp_path / "c.json").write_text(json.dumps([{"messages": [user, assistant, user, assistant, user]}]))
    assert dirl.read_chats(str(tmp_path / "c.json")) == [[user, assistant, user, assistant]]


def test_nth_walks_through_every_item_of_an_epoch():
    items = list("abcdefg")
    first, second = ([dirl.nth(items, i, 0, "x") for i in range(e * 7, e * 7 + 7)] for e in (0, 1))
    assert sorted(first) == sorted(second) == items and first != second


# ---- checkpoints, flags, runs -------------------------------------------------------------------------------------


def test_sdar_save_and_load(policies, tmp_path):
    from safetensors.torch import load_file
    source, folder = policies(4).folder, str(tmp_path / "copy")
    c = flags()
    policy = dirl.load_policy(source, c, dirl.read_config(source, c))
    os.makedirs(os.path.join(source, "subfolder"), exist_ok=True)
    dirl.save_policy(policy, folder)
    before, after = (load_file(os.path.join(f, "model.safetensors")) for f in (source, folder))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert "model.layers.0.self_attn.q_norm.weight" in after and "lm_head.weight" in after
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        with open(os.path.join(source, name), "rb") as a, open(os.path.join(folder, name), "rb") as b:
            assert a.read() == b.read()
    again = dirl.load_policy(folder, c, dirl.read_config(folder, c))
    for a, b in zip(policy.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    config = json.load(open(os.path.join(folder, "config.json")))
    assert config["model_type"] == "sdar" and config["rope_theta"] == 100.0 and config["torch_dtype"] == "float32"
    assert again.model.config._attn_implementation == "dirl"


def tied_copy(source, folder, **changes):
    """A copy of a checkpoint in bfloat16 with tied embeddings, and with a program in it."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(source, folder)
    path = os.path.join(folder, "config.json")
    config = json.load(open(path)) | {"tie_word_embeddings": True, "torch_dtype": "bfloat16",
                                      "auto_map": {"AutoConfig": "evil.SDARConfig", "AutoModelForCausalLM": "evil.SDARForCausalLM",
                                                   "AutoTokenizer": ["evil.SDARTokenizer", None]}} | changes
    json.dump(config, open(path, "w"))
    with open(os.path.join(folder, "evil.py"), "w") as file:
        file.write("raise SystemExit('executed')")
    weights = load_file(os.path.join(folder, "model.safetensors"))
    weights.pop("lm_head.weight")
    save_file({k: v.bfloat16() for k, v in weights.items()}, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    return folder


def test_a_bfloat16_tied_checkpoint_with_a_foreign_attention_setting(policies, tmp_path):
    from safetensors.torch import load_file
    folder = tied_copy(policies(4).folder, str(tmp_path / "tied"), attn_implementation="flex_attention", rope_theta=1e6,
                       eos_token_id=[256, 257])
    weights, c = load_file(os.path.join(folder, "model.safetensors")), flags()
    policy = dirl.load_policy(folder, c, dirl.read_config(folder, c))
    assert policy.model.config.rope_parameters["rope_theta"] == 1e6 and policy.eos_id == 256
    assert policy.model.lm_head.weight.data_ptr() == policy.model.model.embed_tokens.weight.data_ptr()
    assert len(rollouts(policy, n=2)[1]) == 2
    dirl.save_policy(policy, str(tmp_path / "out"))
    saved = load_file(str(tmp_path / "out" / "model.safetensors"))
    assert "lm_head.weight" not in saved and {v.dtype for v in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[k], weights[k].bfloat16()) for k in saved)


def outcome(tmp_path, capsys, monkeypatch, start, *argv):
    """Everything a short run leaves: printed lines, metrics without seconds, weights, and how often the model ran."""
    calls = {"score": 0, "decode": 0}
    score, decode = dirl.Policy.score, dirl.decode

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)
        return call
    out = str(tmp_path / f"out{len(os.listdir(tmp_path))}")
    with monkeypatch.context() as patch:
        patch.setattr(dirl.Policy, "score", counted("score", score))
        patch.setattr(dirl, "decode", counted("decode", decode))
        given = [str(x) for x in argv]
        dirl.main((["--model", start] if "--model" not in given else []) + ["--out", out] + given)
    from safetensors.torch import load_file
    stage = "sft" if "sft" in given else "rl"
    weights = load_file(os.path.join(out, stage, "model.safetensors"))
    lines = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in metrics(out, stage)]
    printed = capsys.readouterr().out.replace(out, "OUT")
    return {"metrics": lines, "weights": float(sum(w.double().abs().sum() for w in weights.values())),
            "config": open(os.path.join(out, stage, "config.json")).read(), "calls": calls, "printed": printed}


FLAGS = {  # flag: (stage, what it needs besides, two values that must differ in something)
    "seed": ("rl", (), 0, 1), "steps": ("rl", (), 1, 2), "lr": ("rl", (), 1e-3, 1e-2), "temperature": ("rl", (), 1, 2),
    "schedule": ("rl", ("--steps", 3, "--warmup", 0), "constant", "cosine"), "warmup": ("rl", (), 0, 3),
    "max-tokens": ("rl", (), 64, 512), "max-length": ("rl", ("--data", "DATA"), 200, 300), "batch": ("sft", (), 2, 3),
    "prompts": ("rl", (), 2, 3), "group-size": ("rl", (), 4, 5), "max-new-tokens": ("rl", (), 12, 24),
    "block-size": ("sft", ("--model", "tiny"), 2, 4), "unmask": ("rl", (), "dynamic", "static"),
    "tokens-per-step": ("rl", ("--unmask", "static"), 1, 2), "threshold": ("rl", (), 0.3, 0.95),
    "confidence": ("rl", ("--unmask", "static", "--temperature", 2), "top1", "drawn"), "slots": ("rl", (), 3, 100),
    "objective": ("rl", (), "eq7", "eq6"), "count": ("rl", (), "steps", "tokens"),
    "eps": ("rl", ("--updates", 3, "--lr", 0.1), 0.01, 0.5), "eps-high": ("rl", ("--updates", 3, "--lr", 0.1), 0.01, 0.5),
    "beta": ("rl", ("--objective", "eq7", "--updates", 2), 0, 1), "adv-std": ("rl", (), None, True),
    "updates": ("rl", (), 1, 2), "max-attempts": ("rl", ("--reward", "flat:reward"), 1, 2),
    "reward": ("rl", (), "flat:reward", "flat:length"), "held-out": ("rl", (), 0, 3), "data": ("rl", (), None, "DATA"),
    "recipe": ("sft", ("--batch", 2), None, "paper"), "model": ("rl", (), None, "OTHER"),
    "stage": (None, (), "sft", "rl")}


def test_every_flag_changes_something(trained, policies, tmp_path, tmp_path_factory, capsys, monkeypatch):
    work = tmp_path_factory.mktemp("flags")
    (work / "flat.py").write_text("def reward(answer, truth):\n    return 1\n"
                                  "def length(answer, truth):\n    return len(answer)\n")
    with open(work / "data.jsonl", "w") as file:
        for n in range(6):
            file.write(json.dumps({"question": "?" * (100 + 20 * n), "answer": "#### 3"}) + "\n")
    monkeypatch.chdir(work)
    places = {"DATA": str(work / "data.jsonl"), "OTHER": policies(4).folder}
    assert set(FLAGS) == {f.name.replace("_", "-") for f in dirl.fields(dirl.Config)} - {
        "out", "engine", "engine-memory", "max-logp-gap", "hsdp", "save-every", "resume", "eval-data", "eval-every", "thresholds",
        "samples", "prompt"}                                        # in tests of their own
    same = None
    for name, (stage, besides, *values) in FLAGS.items():
        short = {"--steps": 1, "--warmup": 0, "--lr": 1e-3, "--seed": 0}
        short |= {"--batch": 2} if stage == "sft" else {"--prompts": 3, "--group-size": 4, "--max-new-tokens": 24,
                                                        "--max-attempts": 1, "--held-out": 0}
        results = []
        for value in values:
            given = short | dict(zip(besides[::2], besides[1::2])) | {"--" + name: value}
            if name == "stage":
                given |= {"--batch": 2} if value == "sft" else {}
            else:
                given["--stage"] = stage
            given = [places.get(x, x) for k, v in given.items() if v is not None for x in ((k,) if v is True else (k, v))]
            start = os.path.join(trained, "rl" if stage == "sft" else "sft")
            results.append(outcome(tmp_path, capsys, monkeypatch, start, *given))
        a, b = results
        if name == "reward":
            assert a["metrics"][0]["reward"] != b["metrics"][0]["reward"]
        elif name in ("max-tokens", "slots"):                       # how the work is cut must not show in the result
            assert a["calls"] != b["calls"] and abs(a["weights"] - b["weights"]) < 1e-4 * a["weights"], name
            assert a["metrics"][0]["reward"] == b["metrics"][0]["reward"], name
        elif name in ("held-out", "recipe", "max-attempts"):
            assert a["printed"] != b["printed"] or a["metrics"] != b["metrics"], name
        else:
            assert a["metrics"] != b["metrics"] or a["config"] != b["config"], name
        if name == "seed":
            same = a
    assert outcome(tmp_path, capsys, monkeypatch, os.path.join(trained, "sft"), "--stage", "rl", "--steps", 1, "--warmup", 0,
                   "--lr", 1e-3, "--prompts", 3, "--group-size", 4, "--max-new-tokens", 24, "--max-attempts", 1,
                   "--held-out", 0)["metrics"] == same["metrics"]   # and a run repeats itself bit for bit


def test_recipe_sets_the_papers_values_and_flags_override_them():
    sft, rl = flags("--recipe", "paper", stage="sft"), flags("--recipe", "paper", "--lr", "2e-6")
    assert (sft.steps, sft.lr, sft.batch, sft.schedule, sft.max_length) == (100, 1e-5, 512, "cosine", 8192)
    assert (rl.steps, rl.lr, rl.prompts, rl.group_size, rl.max_new_tokens) == (40, 2e-6, 128, 32, 8192)
    assert flags("--eps", 0.1).eps_high == 0.1 and flags("--eps-high", 0.28).eps == 0.2
    real = flags("--model", "somewhere")
    assert (real.prompts, real.group_size, real.max_new_tokens) == (8, 8, 2048)


def test_learning_rate():
    c = flags("--steps", 10, "--warmup", 2, "--lr", 1, "--schedule", "cosine")
    rates = [dirl.learning_rate(c, step) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and all(a > b > 0 for a, b in zip(rates[2:], rates[3:])) and rates[-1] < 0.05
    assert dirl.learning_rate(flags("--warmup", 0, "--lr", 1), 1) == 1


def bad_inputs(tmp_path):
    """[(flags, what the line must name)]"""
    def write(name, text):
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    def model(name, **changes):
        sizes = dict(vocab_size=262, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=32, mask_token_id=258, eos_token_id=256, block_size=4, model_type="sdar")
        config = {k: v for k, v in (sizes | changes).items() if v is not None}
        return os.path.dirname(write(f"{name}/config.json", json.dumps(config)))
    good = '{"question": "a", "answer": "1"}\n'
    sft = ["--stage", "sft", "--data"]
    flag_cases = [
        (["--step", "3"], "--step"), (["--steps", "many"], "--steps"), (["--steps", "-1"], "--steps"), (["--lr", "nan"], "--lr"),
        (["--lr", "-1e-3"], "--lr"), (["--objective", "eq9"], "--objective"), (["--group-size", "1"], "--group-size"),
        (["--beta", "0.1"], "--beta"), (["--tokens-per-step", "3"], "--tokens-per-step"), (["--temperature", "0"], "--temperature"),
        (["--model", "nowhere"], "nowhere"), (["extra"], "extra"), (["--engine-memory", "2"], "--engine-memory"),
        (["--max-logp-gap", "-1"], "--max-logp-gap"), (["--confidence", "top2"], "--confidence"), (["--unmask", "random"], "--unmask"),
        (["--stage", "dpo"], "--stage"), (["--prompts", "0"], "--prompts"), (["--save-every", "0"], "--save-every"),
        (["--seed", "1.5"], "--seed"), (["--hsdp", "2"], "--hsdp"), (["--recipe", "mine"], "--recipe"), (["--eps", "inf"], "--eps"),
        (["--engine", "vllm" if torch.cuda.is_available() else "lmdeploy"], "--engine"), (["--reward", "nothing"], "--reward"),
        (["--reward", "json:nothing"], "--reward"), (["--reward", "no.module:f"], "--reward"), (["--stage", "eval"], "--model"),
        (["--stage", "show"], "--model"), (["--thresholds", "0.5,0.9"], "--thresholds"), (["--thresholds", "-1"], "--thresholds"),
        (["--samples", "-1"], "--samples"), (["--eval-every", "0"], "--eval-every"), (["--eval-data", "x.jsonl"], "--data"),
        (["--stage", "eval", "--model", "nowhere", "--held-out", "0"], "--held-out"), (["--stage", "show", "--held-out", "0",
        "--model", "x"], "--held-out"), (["--stage", "eval", "--model", "x", "--data", "y", "--eval-data", "z"], "--eval-data"),
        (["--stage", "show", "--model", "x", "--prompt", "\udcff"], "--prompt")]
    file_cases = [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--data", write("empty.jsonl", "")], "no records"),
        (["--data", write("broken.jsonl", good + "{")], "broken.jsonl"), (["--data", write("list.jsonl", "[1]")], "line 1"),
        (["--data", write("number.json", "3")], "number.json"), (["--data", write("no.jsonl", good + '{"question": "a"}')], "line 2"),
        (["--data", write("names.jsonl", '{"ask": "a", "answer": "1"}')], "line 1"), (["--data", str(tmp_path)], str(tmp_path)),
        (["--data", write("null.jsonl", good + '{"question": null, "answer": "1"}')], "line 2"),
        (["--data", write("blank.jsonl", '{"question": "a", "answer": "####"}')], "line 1"),
        (["--data", write("latin.jsonl", good).replace("latin", "bytes")], "bytes.jsonl"),
        ([*sft, write("chat.json", '[{"messages": []}]')], "record 1"), ([*sft, write("pair.json", '[{"question": "a"}]')], "record 1"),
        ([*sft, write("role.json", '[{"messages": [{"role": "user"}]}]')], "record 1"),
        ([*sft, write("user.json", '[{"messages": [{"role": "user", "content": "a"}]}]')], "record 1"),
        (["--model", str(tmp_path)], "config.json"), (["--model", model("moe", model_type="sdar_moe")], "sdar_moe"),
        (["--model", os.path.dirname(write("json/config.json", "[1, 2]"))], "config.json"),
        (["--model", model("mask", mask_token_id=262)], "mask_token_id 262"), (["--model", model("none", head_dim=None)], "head_dim"),
        (["--model", model("text", hidden_size="wide")], "hidden_size"), (["--model", model("block"), "--block-size", "8"], "--block-size 8"),
        (["--model", model("large", num_hidden_layers=20000, hidden_size=4096, intermediate_size=12288, num_attention_heads=32)],
         "GB of memory"),
        (["--out", os.path.join(write("file", "kept"), "run")], "--out"), (["--resume"], "--resume"),
        (["--data", write("good.jsonl", good), "--eval-data", write("bad.jsonl", "{")], "--eval-data"),
        (["--stage", "eval", "--model", model("m"), "--out", os.path.dirname(write("done/eval.jsonl", ""))], "eval.jsonl")]
    (tmp_path / "bytes.jsonl").write_bytes(b'{"question": "\xff"}')
    return flag_cases + file_cases


FORK = """import json, os, sys
import dirl
for i, argv in enumerate(json.load(open(sys.argv[1]))):             # one import of torch for all; a process for each
    if os.fork() == 0:
        for fd in (1, 2):
            os.dup2(os.open(f"{sys.argv[1]}.{i}.{fd}", os.O_CREAT | os.O_WRONLY), fd)
        assert "transformers" not in sys.modules
        try:
            dirl.main(argv)
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(stop.code)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(code, flush=True)
"""


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, tmp_path_factory):
    """Each in a process of its own, some with `python dirl.py` from the start; nothing is written or lost."""
    cases, logs = bad_inputs(tmp_path), tmp_path_factory.mktemp("logs")
    before = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    argvs = [argv + ([] if "--out" in argv or "--resume" in argv else ["--out", str(tmp_path / "never")]) for argv, _ in cases]
    (logs / "argv").write_text(json.dumps(argvs))
    codes = subprocess.run([sys.executable, "-c", FORK, str(logs / "argv")], stdout=subprocess.PIPE, text=True, cwd=tmp_path, check=True,
                           env=os.environ | {"PYTHONPATH": HERE}).stdout.split()
    results = [(int(code), *((logs / f"argv.{i}.{fd}").read_text() for fd in (1, 2))) for i, code in enumerate(codes)]
    assert len(results) == len(cases) >= 40

    def whole(argv):
        done = subprocess.run([sys.executable, os.path.join(HERE, "dirl.py"), *argv], capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(whole, argvs[::9])) == results[::9]
    for (argv, culprit), (code, out, err) in zip(cases, results):
        assert code == 2 and out == "" and err.count("\n") == 1 and culprit in err and "Traceback" not in err, (argv, code, err)
    assert {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    done = subprocess.run(torchrun(2, "--objective", "eq9"), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("dirl.py: error: argument --objective: invalid choice: 'eq9'") == 1


def test_help_names_the_papers_values(capsys):
    with pytest.raises(SystemExit) as stop:
        dirl.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "(paper: 0.9)" in text and "Eq. 6, 7 or 8 [eq8]" in text and "tiny rl 0.0002" in text


def test_sft_on_chats_then_rl_on_problems_with_python(tmp_path, capsys, monkeypatch):
    """`python dirl.py` from file data: skipped records are counted, finished stages are left alone."""
    monkeypatch.chdir(tmp_path)
    chats = [{"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "yes"}]}
             for n in (5, 10, 200, 15)] + [{"messages": [{"role": "user", "content": "<|MASK|>"},
                                                         {"role": "assistant", "content": "no"}]}]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps({"question": "a" * n, "answer": "#### 2"}) + "\n"
                                                  for n in (3, 50, 400)))
    dirl.main(["--stage", "sft", "--data", "chats.json", "--out", "run", "--steps", "2", "--batch", "3", "--max-length", "64"])
    assert "skipped 2 of 5 examples" in capsys.readouterr().out and len(metrics("run", "sft")) == 2
    dirl.main(["--stage", "rl", "--model", "run/sft", "--data", "gsm8k.jsonl", "--steps", "21", "--prompts", "1",
               "--group-size", "2", "--max-new-tokens", "4", "--max-attempts", "1", "--max-length", "300"])
    captured = capsys.readouterr()
    assert "skipped 1 of 3 prompts" in captured.out and "run/rl" in captured.out
    assert captured.out.count("20 steps in a row") == 1
    line = metrics("run", "rl")[0]                                  # every group flat: no step, null
    assert line["loss"] is None and line["grad_norm"] is None and line["groups_dropped"] == 1 and line["reward"] == 0
    before = open("run/metrics.jsonl").read()
    dirl.main(["--stage", "rl", "--model", "run/sft", "--steps", "21"])
    assert "run/rl exists" in capsys.readouterr().out and open("run/metrics.jsonl").read() == before
    with pytest.raises(SystemExit):
        dirl.main(["--stage", "sft", "--model", "run/sft", "--block-size", "8", "--out", "other"])
    assert "--block-size 8" in capsys.readouterr().err


def test_default_run_learns(trained):
    """`torchrun dirl.py --stage rl`: SFT, then DiPO on the built-in task; the figures of the README."""
    lines, log = metrics(trained, "rl"), open(trained + ".log").read()
    reward = [line["reward"] for line in lines]
    first, last = sum(reward[:5]) / 5, sum(reward[-10:]) / 10
    assert last >= first + 0.30 and last >= 0.80
    before, after = (float(x) for x in log.splitlines()[-1].split(",")[0].removeprefix("rl: greedy accuracy ").split(" -> "))
    assert after >= before + 0.15 and "rl, step 60: 256 problems, one greedy answer each" in log
    assert [(line["step"], round(line["accuracy"], 3)) for line in metrics(trained, "rl eval")] == [(0, before), (60, after)]
    assert all(line["logp_gap"] < 1e-4 for line in lines)
    expected = {"stage", "step", "loss", "lr", "grad_norm", "seconds", "reward", "kl", "entropy", "clip_fraction",
                "tokens_per_step", "output_length", "truncated", "groups_dropped", "duplicates", "forward_tokens", "logp_gap",
                "seconds_rollout", "seconds_reward", "seconds_forward", "seconds_backward", "seconds_update", "seconds_weights",
                "imbalance", "skipped"}
    assert all(set(line) == expected for line in lines) and [line["step"] for line in lines] == list(range(1, 61))
    assert set(metrics(trained, "sft")[0]) == {"stage", "step", "loss", "lr", "grad_norm", "forward_tokens", "seconds", "imbalance",
                                                    "skipped"}
    assert sorted(os.listdir(trained)) == ["eval.jsonl", "init", "metrics.jsonl", "rl", "rl.state", "sft", "sft.state"]


def test_a_random_reward_teaches_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coin.py").write_text("import random\n\nrandom.seed(0)\n\n\ndef toss(answer, truth):\n"
                                      "    return random.random() < 0.5\n")
    dirl.main(["--model", os.path.join(trained, "sft"), "--out", "run", "--reward", "coin:toss", "--steps", "30",
               "--held-out", "0"])
    accuracy = []
    for folder in (os.path.join(trained, "sft"), "run/rl", os.path.join(trained, "rl")):
        c = flags()
        policy = dirl.load_policy(folder, c, dirl.read_config(folder, c))
        problems = [dirl.arithmetic(("held out", i), held_out=True) for i in range(256)]
        prompts = [policy.prompt([{"role": "user", "content": question}]) for question, _, _ in problems]
        trajectories = dirl.rollout(policy, prompts, [(0, "accuracy", i) for i in range(256)], c)
        accuracy.append(sum(dirl.arithmetic_reward(policy.tokenizer.decode(t.answer), truth)
                            for t, (_, _, truth) in zip(trajectories, problems)) / 256)
    assert accuracy[1] < accuracy[0] + 0.15 and accuracy[2] > accuracy[0] + 0.30


# ---- evaluation -----------------------------------------------------------------------------------------------------


def independent_rows(lines):
    """Table 1's columns from eval.jsonl, by hand: {decoding: columns}."""
    rows = {}
    for name in dict.fromkeys(line["decoding"] for line in lines):
        mine = [line for line in lines if line["decoding"] == name]
        problems = [statistics.mean(line["reward"] for line in mine if line["problem"] == i) for i in {line["problem"] for line in mine}]
        rows[name] = [statistics.mean(problems), statistics.stdev(problems) / math.sqrt(len(problems)),
                      sum(x["tokens"] for x in mine) / sum(x["steps"] for x in mine),
                      sum(x["tokens"] for x in mine) / sum(x["forwards"] for x in mine),
                      statistics.mean(x["length"] for x in mine), statistics.mean(x["truncated"] for x in mine)]
    return rows


def printed_rows(text):
    return {" ".join(words[:2]): [float(x) for x in words[2:]] for words in map(str.split, text.splitlines())
            if words[:1] in (["static"], ["dynamic"])}


def test_eval_table_equals_its_answers_on_any_number_of_ranks(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--stage", "eval", "--model", os.path.join(trained, "sft"), "--held-out", "60", "--thresholds", "0.5", "0.7", "0.9", "0.99"]
    dirl.main([*argv, "--out", "one"])
    printed = printed_rows(capsys.readouterr().out)
    lines = [json.loads(line) for line in open("one/eval.jsonl")]
    expected = independent_rows(lines)
    assert list(printed) == list(expected) == ["static 1", "dynamic 0.5", "dynamic 0.7", "dynamic 0.9", "dynamic 0.99"]
    for name, row in expected.items():
        assert all(abs(a - b) <= 0.51 * 10**-digits for a, b, digits in zip(printed[name], row, (3, 3, 2, 2, 1, 3), strict=True))
    assert all(dirl.arithmetic_reward(line["answer"], line["truth"]) == line["reward"] for line in lines) and len(lines) == 5 * 60
    assert all(len(line["answer"]) == line["length"] <= line["tokens"] for line in lines if not line["truncated"])
    speed = [row[2] for row in expected.values()]
    assert speed[0] == 1 and speed[1] > speed[2] > speed[3] > speed[4] > 1                # fewer at a time, the surer one must be
    assert all(row[3] < row[2] for row in expected.values()) and not os.path.exists("one/metrics.jsonl")
    subprocess.run(torchrun(2, *argv, "--out", "two"), check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert open("one/eval.jsonl").read() == open("two/eval.jsonl").read()
    dirl.main([*argv[:6], "--samples", "3", "--max-new-tokens", "12"])                   # a folder of its own; thresholds as in Table 1
    lines = [json.loads(line) for line in open("runs/eval-0/eval.jsonl")]
    assert printed_rows(capsys.readouterr().out).keys() == independent_rows(lines).keys() == {"static 1", "dynamic 0.9"}
    assert [line["sample"] for line in lines[:6]] == [0, 1, 2, 0, 1, 2] and any(line["truncated"] for line in lines)
    assert len({line["answer"] for line in lines if line["problem"] == 3}) > 1


def test_forwards_are_those_that_the_engines_do(policies, lmdeploy_engine, tmp_path, monkeypatch):
    """Every decoding step, and the pass that leaves a block's clean keys and values. Besides, once a request: ours reads the
    prompt's whole blocks, LMDeploy does one forward or two more at the end, since it launches the next before it looks."""
    from lmdeploy.pytorch.engine.model_agent.agent import BaseModelAgent
    policy, calls, hidden, forward = policies(4), [], policies(4).hidden, BaseModelAgent._async_model_forward
    monkeypatch.setattr(policy, "hidden", lambda *args: (calls.append(1), hidden(*args))[1])
    monkeypatch.setattr(BaseModelAgent, "_async_model_forward", lambda *args, **more: (calls.append(1), forward(*args, **more))[1])
    c = flags("--max-new-tokens", 29, "--out", tmp_path, "--unmask", "static", "--tokens-per-step", 2)
    for engine, besides in ((dirl.TorchEngine(policy, c), {1}), (lmdeploy_engine(policy, c), {1, 2})):
        for P, c.max_new_tokens in itertools.product((4, 5, 9), (1, 8, 29)):
            calls.clear()
            line, = dirl.answer(policy, engine, c, [(list(range(10, 10 + P)), "", "")], lambda answer, truth: 0)
            assert len(calls) - line["forwards"] in besides and line["forwards"] >= line["steps"]


def test_both_engines_evaluate_alike(policies, lmdeploy_engine, tmp_path):
    policy, answers = policies(4), []
    problems = [(prompt, "", str(i)) for i, prompt in enumerate(prompts_of_every_remainder(policy))]
    for build in (dirl.TorchEngine, lmdeploy_engine):
        c = flags("--max-new-tokens", 21, "--thresholds", "0.3", "0.6", "--out", tmp_path / build.__name__)
        os.makedirs(c.out)
        rows = dirl.evaluate(policy, build(policy, c), c, problems, lambda answer, truth: len(answer) % 2)
        answers.append(open(os.path.join(c.out, "eval.jsonl")).read())
        assert len({row["tokens_per_step"] for row in rows}) == 4 and (c.unmask, c.threshold) == ("dynamic", 0.9)
    assert answers[0] == answers[1]


def test_rl_evaluates_on_its_way(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps({"question": "?" * n, "answer": "3"}) + "\n" for n in range(1, 12)))
    Path("test.jsonl").write_text("".join(json.dumps({"question": "!" * n, "answer": "3"}) + "\n" for n in range(1, 5)))
    argv = ["--model", os.path.join(trained, "sft"), "--data", "train.jsonl", "--eval-data", "test.jsonl", "--eval-every", "2",
            "--steps", "3", "--prompts", "2", "--group-size", "2", "--max-new-tokens", "8", "--max-attempts", "1", "--samples", "2",
            "--thresholds", "0.5", "--save-every", "2"]
    dirl.main(["--stage", "eval", "--model", os.path.join(trained, "sft"), "--out", "run", "--held-out", "2", "--unmask", "sequential"])
    before = open("run/eval.jsonl").readlines()
    assert {json.loads(line)["decoding"] for line in before} == {"sequential 1"} and len(before) == 2
    dirl.main([*argv, "--out", "run"])
    assert open("run/eval.jsonl").readlines()[:2] == before
    Path("run/eval.jsonl").write_text("".join(open("run/eval.jsonl").readlines()[2:]))
    lines, rows = [json.loads(line) for line in open("run/eval.jsonl")], metrics("run", "rl eval")
    assert [(row["step"], row["decoding"]) for row in rows] == [(s, d) for s in (0, 2, 3) for d in ("dynamic 0.9", "static 1", "dynamic 0.5")]
    assert [(x["step"], x["problem"], x["sample"]) for x in lines[:8]] == [(0, i, g) for i in range(4) for g in range(2)]
    assert len(lines) == 3 * 3 * 4 * 2 and {x["question"] for x in lines} == {"!" * n for n in range(1, 5)}
    for row in rows:
        mine = [x for x in lines if (x["step"], x["decoding"]) == (row["step"], row["decoding"])]
        assert list(row.values())[3:] == pytest.approx(independent_rows(mine)[row["decoding"]], rel=1e-5)
    assert "sampled accuracy 0.000 -> 0.000" in capsys.readouterr().out and len(metrics("run", "rl")) == 3


@pytest.mark.parametrize("error", [dirl.Stopped, MemoryError])
@pytest.mark.parametrize("call", [4, 6])
def test_an_evaluation_that_was_interrupted_is_done_again(trained, tmp_path, monkeypatch, error, call):
    """By SIGTERM or by an error, on the way or at the end, in the second of two decodings."""
    argv = [*SHORT_RL, "--steps", "4", "--thresholds", "0.9", "--model", os.path.join(trained, "sft")]        # 0, 2, 4; two rows each
    answer, calls = dirl.answer, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call and "--resume" not in argv:
            raise error
        return answer(*args)
    dirl.main([*argv, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(dirl, "answer", interrupted)
    with pytest.raises(SystemExit if error is dirl.Stopped else error):
        dirl.main([*argv, "--out", str(tmp_path / "cut")])
    assert len(calls) == call
    argv += ["--resume"]
    dirl.main([*argv, "--out", str(tmp_path / "cut")])
    a, b = tmp_path / "whole", tmp_path / "cut"
    for stage in ("rl", "rl eval"):
        assert lines_without_seconds(a, stage) == lines_without_seconds(b, stage) and lines_without_seconds(a, stage)
    assert (a / "eval.jsonl").read_text() == (b / "eval.jsonl").read_text() and sorted(os.listdir(a)) == sorted(os.listdir(b))
    before = (b / "eval.jsonl").read_text()
    dirl.main([*argv, "--out", str(b)])                             # now it is finished
    assert (b / "eval.jsonl").read_text() == before


def test_show_is_the_trajectory(trained, capsys):
    folder, c = os.path.join(trained, "sft"), flags()
    dirl.main(["--stage", "show", "--model", folder, "--prompt", "4+2-1=", "--samples", "1", "--seed", "3"])
    lines = capsys.readouterr().out.splitlines()
    policy = dirl.load_policy(folder, c, dirl.read_config(folder, c))
    prompt = policy.prompt([{"role": "user", "content": "4+2-1="}])
    t, = dirl.rollout(policy, [prompt], [(3, "show", 0, 0, 0)], c)
    shown, P = [line for line in lines if line[:5].strip().isdigit()], len(prompt)
    assert lines[0] == "4+2-1=" and len(shown) == t.decoding_steps and f"{len(t.output)} tokens in {t.decoding_steps} dec" in lines[-1]
    for line, (k, s, seen, committed) in zip(shown, slow_states(policy, t)):
        probabilities = re.findall(r"\d\.\d{3}", line)
        assert line.split()[:2] == [str(k), str(s)]
        scores = [t.logp[p - P].exp().item() for p in committed for _ in range(2)]         # sampled, and scored
        assert [float(x) for x in probabilities] == pytest.approx(scores, abs=6e-4)
        left = (seen[k * 4:] == policy.mask_id).sum() - len(committed)
        assert line.count("·") == left
    for prompt in ("<|MASK|>", "1" * 500):                          # one that a model cannot be asked
        with pytest.raises(SystemExit):
            dirl.main(["--stage", "show", "--model", folder, "--prompt", prompt])
        assert capsys.readouterr().err.startswith("dirl.py: error: --prompt: none of its prompts")
    dirl.main(["--stage", "show", "--model", folder])
    question = dirl.arithmetic(("held out", 0), held_out=True)[0]
    assert capsys.readouterr().out.splitlines()[0] == question


# ---- what the README says -----------------------------------------------------------------------------------------

README = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()


def equation_rows():
    """The README's table of equations: (paper, equation, function, first line, last line)."""
    for row in README.splitlines():
        m = re.fullmatch(r"\| (.+?) \| (.+?) \| \[`(\w+)`\]\(dirl\.py#L(\d+)-L(\d+)\) \| (\d+)-(\d+) \|", row)
        if m:
            assert m.groups()[3:5] == m.groups()[5:], row
            yield m[1], m[2].replace("\\|", "|").strip("`"), m[3], int(m[4]), int(m[5])


def test_equation_table_is_where_and_what_it_says():
    lines = open(dirl.__file__, encoding="utf-8").read().splitlines()
    cut = next(i for i, line in enumerate(lines, 1) if line.startswith("# ====="))
    found = {node.name: node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.FunctionDef)}
    rows = list(equation_rows())
    for paper, equation, name, first, last in rows:
        node = found[name]
        assert (node.lineno, node.end_lineno) == (first, last) and last < cut, f"{name}: lines {node.lineno}-{node.end_lineno}"
        text = " ".join(ast.get_docstring(node).split())
        assert paper.split(",")[0] in text and equation in text, (name, paper, equation)
    assert [name for *_, name, _, _ in rows] == sorted((name for *_, name, _, _ in rows), key=lambda name: found[name].lineno)
    assert {"mask_mod", "log_policy", "sft_loss", "C_eps", "trajectory_document", "eq6", "eq7", "eq8", "unmask"} <= {row[2] for row in rows}
    copied = set(re.findall(r"`(\w+)`", README.split("## Copy it")[1].split("\n## ")[0]))
    assert copied >= {name for name, node in found.items() if node.lineno < cut}


ALONE = """
import sys, types
source, tests = sys.argv[1:]
paper = types.ModuleType("paper")
exec("import torch", vars(paper))
exec(source, vars(paper))
for name in list(sys.modules):                                      # nothing but torch and what torch itself has brought
    assert not name.startswith(("transformers", "lmdeploy", "dirl")), name
sys.modules["dirl"] = paper
exec(tests)
"""

ON_ITS_OWN = """
import torch, dirl
B, MASK = 2, 9
u, z = torch.tensor([0.5, 0.2]), torch.tensor([[0.9, 0.1], [0.1, 0.9]])
sft = dirl.noised_document(torch.tensor([1, 2, 3, 4, 5, 6]), 3, u, z, B, MASK)
assert sft["ids"].tolist() == [1, 2, 3, 4, 5, 6, 3, MASK, MASK, 6] and sft["target"].tolist() == [4, 5]
t = dirl.trajectory_document(torch.tensor([1, 2]), torch.tensor([3, 4, 5, 6]), torch.tensor([1, 1, 1, 2]), B, MASK)
assert t["ids"].tolist() == [1, 2, 3, 4, 5, 6, MASK, MASK, MASK, MASK, 5, MASK] and t["reads"].tolist() == [6, 7, 8, 11]
row = dirl.join([t], 12)
sees = dirl.mask_mod(row["doc"], row["copy"], row["pos"] // B)
i = torch.arange(12)
assert sees(0, 0, i[10], i).tolist() == [True] * 4 + [False] * 6 + [True] * 2
assert [kv.tolist() for kv, _ in dirl.strips(sees, 12, "cpu", tile=6)] == [[*range(6)], [*range(4), *range(6, 12)]]
assert dirl.block_mask(sees, 12, "cpu", tile=6).kv_num_blocks.tolist() == [[[1, 2]]]
g = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(4, 8, generator=g).requires_grad_(), torch.randn(10, 8, generator=g)
logp, entropy = dirl.log_probs(hidden, weight, t["target"], 1.0, MASK)
log_pi = dirl.log_policy(hidden @ weight.T, 1.0, MASK)
assert torch.allclose(logp, log_pi[range(4), t["target"]]) and (entropy > 0).all()
A = dirl.advantage(torch.tensor([[1.0, 0.0]]))
w = dirl.trajectory_weights(torch.tensor([[2, 3]]), "eq8")
assert A.tolist() == [[0.5, -0.5]] and torch.allclose(w, torch.tensor(0.2))
one = torch.ones(4)
for eq, more in ((dirl.eq6, ()), (dirl.eq7, ()), (dirl.eq8, (t["copy"][t["reads"]] - 1,))):
    J, clipped = eq(logp, logp.detach(), 0.5 * one, 0.2 * one, 0.2, 0.2, *more)
    (gradient,) = torch.autograd.grad(J, logp, retain_graph=True)
    assert torch.allclose(gradient, 0.1 * one) and not clipped.any()
assert dirl.C_eps(torch.tensor(1.5), torch.tensor(1.0), 0.2, 0.2) == 1.2 and dirl.kl_k3(logp, logp).abs().max() == 0
assert dirl.sft_loss(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]), 5) == 1
token = dirl.draw(log_pi[None, :2], torch.tensor([[0.5, 0.5]], dtype=torch.double))
new = dirl.unmask(log_pi[None, :2], token, torch.tensor([[True, True]]), "static", 1, 0.9, "top1")
assert token.shape == (1, 2) and new.sum() == 1
assert dirl.layout(torch.arange(4), torch.tensor([1]), torch.tensor([[9, 9]]), B)["pos"].tolist() == [0, 1, 2, 3, 2, 3]
"""


def test_what_stands_above_the_cut_works_in_an_empty_module():
    source = open(dirl.__file__, encoding="utf-8").read().split("# =====")[0]
    tree = ast.parse(source)
    assert {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)} == {"torch", "torch.nn.attention.flex_attention"}
    assert all(f"dirl.{node.name}(" in ON_ITS_OWN or f"dirl.{node.name}," in ON_ITS_OWN for node in tree.body if isinstance(node, ast.FunctionDef))
    subprocess.run([sys.executable, "-c", ALONE, source, ON_ITS_OWN], check=True, cwd="/")


def readme_commands():
    return [line[4:] for line in README.splitlines() if re.match(r"    (pip|python|torchrun) ", line)]


def test_readme_commands_run(trained, policies, tmp_path, monkeypatch, capsys):
    """Those for the tiny model as they stand, but short; those for checkpoints on a stand-in; measurements with --help."""
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}) + "\n")
    for name in ("problems.jsonl", "test.jsonl"):
        Path(name).write_text(json.dumps({"question": "2+1", "answer": "3"}) + "\n")
    os.makedirs("JetLM")
    shutil.copytree(policies(4).folder, "JetLM/SDAR-8B-Chat")
    shutil.copytree(trained, "runs/tiny-0")
    short = {"sft": "--batch 2", "rl": "--prompts 1 --group-size 2 --max-new-tokens 4 --max-attempts 1", "eval": "--max-new-tokens 4", "show": ""}
    measurements = subprocess.run([sys.executable, os.path.join(HERE, "test_dirl.py"), "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in measurements for name in re.findall(r"`python\s+test_dirl\.py\s+(--[\w-]+)", README))
    named = set(re.findall(r"`(--[a-z-]+)", README.split("## Next to other code")[0]))          # flags, wherever they are named
    assert named - {"--nnodes", *re.findall("--[a-z-]+", measurements)} <= {"--" + f.name.replace("_", "-") for f in fields(dirl.Config)}
    ran = []
    for command in readme_commands():
        for part in command.split(" && "):
            words = part.split()
            if words[:2] == ["pip", "install"]:
                assert set(words[2:]) <= {"-r", "requirements.txt", "pytest"} and os.path.exists(os.path.join(HERE, "requirements.txt"))
            elif words[1] == "test_dirl.py":
                assert words[2] in measurements
            elif "pytest" in words or ".github/pictures.py" in words:
                assert words[1:3] == ["-m", "pytest"] or os.path.exists(os.path.join(HERE, words[1]))
            elif words[-1] == "--help":
                with pytest.raises(SystemExit) as end:
                    dirl.main(words[words.index("dirl.py") + 1:])
                assert end.value.code == 0
            else:
                argv = words[words.index("dirl.py") + 1:]
                stage = argv[argv.index("--stage") + 1]
                steps = "2" if "--resume" in argv else "1"
                if "--model" not in argv:                            # the default run: that is what `trained` did
                    continue
                dirl.main([*argv, *short[stage].split(), *(["--steps", steps, "--save-every", "1"] if stage in ("sft", "rl") else [])])
            ran.append(part)
    assert len(ran) > 8 and {"show", "eval", "sft", "rl"} <= {words[words.index("--stage") + 1] for words in map(str.split, ran) if "--stage" in words}
    assert [line["step"] for line in metrics("runs/my", "rl")] == [1, 2] and os.path.exists("runs/eval-0/eval.jsonl")
    assert "accuracy" in capsys.readouterr().out


def test_pictures_and_memory_table_come_from_the_code(trained, tmp_path):
    import importlib.util
    spec = importlib.util.spec_from_file_location("pictures", os.path.join(HERE, ".github", "pictures.py"))
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.HERE = str(tmp_path)
    pictures.mask()
    pictures.curves([trained, trained])
    (tmp_path / "bench.txt").write_text(f"{'1024':8} {2:11}  {'one forward (ours)':22} {1600:14,} {1.99:8.2f} {0.41:6.2f} {0.75:8.2f}\n")
    pictures.cost(tmp_path / "bench.txt")
    (tmp_path / "text").write_text("static, top1: relative error of the expected gradient 2.0e-15, x\nseed 0, --unmask dynamic, x\n"
                                   "    committed at step 2:  10% of the tokens; x: mean 0.388, median\n")
    pictures.bias(tmp_path / "text")
    pictures.one_step(tmp_path / "text")
    from xml.dom.minidom import parse
    shown = set(re.findall(r"\]\(\.github/([\w-]+\.svg)\)", README))
    assert shown == {"mask.svg", "curves.svg", "cost.svg", "bias.svg", "one-step.svg"}
    for name in shown:
        assert "prefers-color-scheme:dark" in (tmp_path / name).read_text()
        assert len(parse(str(tmp_path / name)).getElementsByTagName("text")) > 3
    assert (tmp_path / "mask.svg").read_text() == open(os.path.join(HERE, ".github", "mask.svg"), encoding="utf-8").read()
    assert memory_table() in README


# ---- ranks, resume, bad days: real processes ----------------------------------------------------------------------


def torchrun(n, *argv, script="dirl.py"):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n),
            os.path.join(HERE, script), *map(str, argv)] if n > 1 else [sys.executable, os.path.join(HERE, script), *map(str, argv)]


def rank_worker(folder, file, hsdp):
    """Gradients of SFT and of DiPO on the same trajectories, on however many ranks there are."""
    from safetensors.torch import save_file
    dirl.start_ranks()
    c = flags("--max-tokens", 100, *(["--hsdp", hsdp] if int(hsdp) else []))
    policy, g, found = dirl.load_policy(folder, c, dirl.read_config(folder, c)), torch.Generator().manual_seed(0), {}

    def keep(name, rows, loss_of):
        policy.model.zero_grad()
        total = torch.zeros(1)
        for row in rows:
            loss = loss_of(row)
            dirl.backward(loss)
            total += loss.detach()
        found[name + " loss"] = dirl.all_sum(total)
        found[name + " rows"] = torch.tensor(len(rows))
        for parameter, p in policy.model.named_parameters():
            found[f"{name} {parameter}"] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    documents, answer_tokens = [], 0
    for P in range(3, 10):
        tokens = torch.randint(0, 200, (24,), generator=g)
        K = 6 - P // 4
        documents.append(dirl.noised_document(tokens, P, torch.rand(K, generator=g), torch.rand(K, 4, generator=g), 4, policy.mask_id))
        answer_tokens += 24 - P
    for name, n in (("sft", 7), ("sft of one example", 1)):
        keep(name, rows_of(policy, documents[:n], 100), lambda row: dirl.sft_loss(policy.score(row)[0], row["weight"], answer_tokens))
    groups = []
    for r in ([1.0, 0.0, 0.0], [0.5, 0.0, 1.0]):
        group = []
        for _ in r:
            prompt, output, steps = random_trajectory(g, 6, 10 + 4 * int(torch.randint(0, 4, (), generator=g)), 4)
            logp = -3 * torch.rand(len(output), generator=g)
            blocks = torch.cat([torch.zeros(6, dtype=torch.long), steps]).view(-1, 4).amax(1)
            group.append(dirl.Trajectory(prompt, output, steps, logp, output, True, int(blocks.sum())))
        groups.append((group, r))
    for objective, n in itertools.product(("eq6", "eq7", "eq8"), (2, 1)):
        def loss_of(row):
            view = (row["copy"][row["reads"]] - 1,) if objective == "eq8" else ()
            old = row["logp_sampler"] if objective == "eq6" else None
            return -getattr(dirl, objective)(policy.score(row)[0], old, row["A"], row["w"], 0.2, 0.2, *view)[0]
        chosen = groups if n == 2 else [(groups[0][0][:2], groups[0][1][:2])]      # of two trajectories: a third rank has none
        keep(f"{objective} {n}", dirl.dipo_rows(policy, replace(c, objective=objective), chosen)[0], loss_of)
    if dirl.rank() == 0:
        save_file(found, file)


def test_any_number_of_ranks_gives_one_gradient(policies, tmp_path):
    from safetensors.torch import load_file
    results = {}
    rank_worker(policies(4).folder, str(tmp_path / "1.safetensors"), 0)
    results[1] = load_file(str(tmp_path / "1.safetensors"))
    for n, hsdp in ((2, 0), (3, 0), (4, 2)):
        file = str(tmp_path / f"{n}.safetensors")
        subprocess.run(torchrun(n, "--rank-worker", policies(4).folder, file, hsdp, script="test_dirl.py"), check=True, timeout=300,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        results[n] = load_file(file)
    one = results.pop(1)
    for n, found in results.items():
        assert found.keys() == one.keys()
        for name in ("sft", "sft of one example", *(f"eq{e} {k}" for e in (6, 7, 8) for k in (1, 2))):
            assert torch.isclose(found[name + " loss"], one[name + " loss"], rtol=1e-5, atol=1e-8)
            names = [x for x in one if x.startswith(name + " ") and x.split()[-1] not in ("loss", "rows")]
            a, b = (torch.cat([r[x].flatten() for x in names]) for r in (one, found))
            assert (a - b).norm() < 1e-5 * a.norm() and a.norm() > 0, (n, name)
            assert found[name + " rows"] <= one[name + " rows"]


def test_documents_are_dealt_to_ranks_by_their_tokens(monkeypatch):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(50, 900, (64,), generator=g).tolist()
    monkeypatch.setattr(dirl, "world", lambda: 4)
    plans = []
    for r in range(4):
        monkeypatch.setattr(dirl, "rank", lambda: r)
        rows, imbalance = dirl.deal(lengths, 1000)
        plans.append(rows)
    assert sorted(i for rows in plans for row in rows for i in row) == list(range(64))
    assert len({len(rows) for rows in plans}) == 1 and all(sum(lengths[i] for i in row) <= 1000 for rows in plans for row in rows)
    loads = [sum(lengths[i] for row in rows for i in row) for rows in plans]
    assert math.isclose(imbalance, max(loads) / (sum(loads) / 4) - 1) and imbalance < 0.05
    assert dirl.deal([5], 10) == ([[]], 3.0)                         # this is rank 3: it has an empty row, like rank 0's one


SHORT_RL = ("--stage", "rl", "--steps", "6", "--warmup", "0", "--lr", "1e-3", "--prompts", "3", "--group-size", "4",
            "--max-new-tokens", "24", "--max-attempts", "1", "--eval-every", "2", "--save-every", "2", "--held-out", "8")


def lines_without_seconds(out, stage="rl"):
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in metrics(out, stage)]


def started(command, log, **more):
    """A run in a process group of its own, its output in a file."""
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)


def killed_when(command, condition, log, how=signal.SIGKILL):
    """Start a run, wait for a moment, kill it; the exit code."""
    with open(log, "a") as file:
        run, end = started(command, file), time.time() + 240
        while not condition() and run.poll() is None and time.time() < end:
            time.sleep(0.001)
        assert run.poll() is None and time.time() < end, open(log).read()[-2000:]
        os.killpg(run.pid, how) if how == signal.SIGKILL else run.send_signal(how)
        return run.wait(timeout=90)


def count(out):
    try:
        return sum('"stage": "rl",' in line for line in open(os.path.join(out, "metrics.jsonl")))
    except OSError:
        return 0


def killed_and_resumed(start, tmp_path, ranks):
    """Killed between steps, in a save, right after one; each time resumed. Returns the metrics and the undisturbed run's."""
    whole, out, log = (str(tmp_path / name) for name in ("whole", "killed", "log"))
    with open(log, "a") as file:
        assert started(torchrun(ranks, *SHORT_RL, "--model", start, "--out", whole), file).wait(timeout=240) == 0
    state = os.path.join(out, "rl.state")
    command = torchrun(ranks, *SHORT_RL, "--model", start, "--out", out)
    killed_when(command, lambda: count(out) == 1, log)               # before anything was saved
    killed_when(command + ["--resume"], lambda: os.path.isdir(os.path.join(state, "2.tmp")), log)          # in a save
    killed_when(command + ["--resume"], lambda: count(out) >= 3, log)
    killed_when(command + ["--resume"], lambda: os.path.isdir(os.path.join(state, "4")), log)
    with open(log, "a") as file:
        assert started(command + ["--resume"], file).wait(timeout=240) == 0, open(log).read()[-2000:]
    assert sorted(os.listdir(state)) == ["4", "6"] and not os.path.exists(os.path.join(out, "rl.tmp"))
    return lines_without_seconds(out), lines_without_seconds(whole), out, whole, log


def test_killed_at_any_moment_and_resumed_as_if_nothing_had_happened(trained, tmp_path):
    from safetensors.torch import load_file
    found, expected, out, whole, log = killed_and_resumed(os.path.join(trained, "sft"), tmp_path, ranks=1)
    assert found == expected and len(found) == 6
    a, b = (load_file(os.path.join(x, "rl", "model.safetensors")) for x in (out, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)
    evaluations, answers = (lines_without_seconds(x, "rl eval") for x in (out, whole)), (open(os.path.join(x, "eval.jsonl")).read()
                                                                                         for x in (out, whole))
    assert [line["step"] for line in lines_without_seconds(out, "rl eval")] == [0, 2, 4, 6]
    assert next(evaluations) == next(evaluations) and next(answers) == next(answers)
    last = [open(os.path.join(x, "metrics.jsonl")).read().count("\n") for x in (out, whole)]
    assert last == [10, 10]
    done = subprocess.run(torchrun(1, *SHORT_RL, "--model", os.path.join(trained, "sft"), "--out", out), capture_output=True, text=True)
    assert done.returncode == 0 and "finished" in done.stdout
    more = ["8" if x == "6" else x for x in SHORT_RL]                # a finished stage can be prolonged
    refused = subprocess.run(torchrun(1, *more, "--model", os.path.join(trained, "sft"), "--out", out), capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume" in refused.stderr and refused.stderr.count("\n") == 1
    subprocess.run(torchrun(2, *more, "--model", os.path.join(trained, "sft"), "--out", out, "--resume"), check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)            # and on another number of ranks
    assert [line["step"] for line in lines_without_seconds(out)] == list(range(1, 9)) and lines_without_seconds(out)[:6] == found


SLOW = """import sys, time
calls = 0
def reward(answer, truth):
    global calls
    calls += 1
    run = sys.modules["__main__"]
    if calls == 24 // run.world() and not "--resume" in sys.argv:   # two steps are done: from now on rollouts take long
        denoise = run.denoise
        run.denoise = lambda *args: (time.sleep(1), denoise(*args))[1]
    return calls % 2
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_in_a_long_rollout_saves_the_last_completed_step(trained, tmp_path, ranks):
    (tmp_path / "slow.py").write_text(SLOW)
    out, log = str(tmp_path / "run"), str(tmp_path / "log")
    command = torchrun(ranks, *SHORT_RL[:-2], "--held-out", "0", "--prompts", "2", "--model", os.path.join(trained, "sft"), "--out", out,
                       "--reward", "slow:reward")
    command = ["env", f"PYTHONPATH={tmp_path}", *command]
    begin = time.time()
    moment = lambda: count(out) >= 2 and time.time() > begin + 1     # noqa: E731
    code = killed_when(command, moment, log, signal.SIGTERM)
    assert code != 0 and os.listdir(os.path.join(out, "rl.state")) == [str(count(out))], open(log).read()[-3000:]
    steps = count(out)
    assert 2 <= steps < 6 and "stopped by SIGTERM" in open(log).read()
    with open(log, "a") as file:
        assert started(command + ["--resume"], file).wait(timeout=240) == 0, open(log).read()[-2000:]
    assert [line["step"] for line in metrics(out, "rl")] == [1, 2, 3, 4, 5, 6]


def test_a_rank_that_raises_ends_all_with_its_message(trained, tmp_path):
    (tmp_path / "broken.py").write_text("import os\ndef reward(answer, truth):\n    if os.environ['RANK'] == '1':\n"
                                        "        raise ValueError('the reward of rank one broke')\n    return 0\n")
    start = time.time()
    done = subprocess.run(torchrun(2, *SHORT_RL, "--held-out", "0", "--model", os.path.join(trained, "sft"), "--out", str(tmp_path / "run"),
                                   "--reward", "broken:reward"), capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)})
    assert done.returncode != 0 and "the reward of rank one broke" in done.stderr and time.time() - start < 60


def test_gradients_that_are_not_finite_are_skipped_and_the_third_in_a_row_is_an_end(trained, tmp_path, monkeypatch, capsys):
    calls, eq8 = [], dirl.eq8

    def sometimes(*terms):
        calls.append(1)
        J, clipped = eq8(*terms)
        return J * (float("nan") if bad(len(calls)) else 1), clipped
    monkeypatch.setattr(dirl, "eq8", sometimes)
    argv = [*SHORT_RL, "--max-tokens", "100000", "--model", os.path.join(trained, "sft"), "--out"]
    bad = lambda call: call in (2, 4, 5)                             # noqa: E731
    dirl.main([*argv, str(tmp_path / "some")])
    lines = metrics(str(tmp_path / "some"), "rl")
    trains = [line for line in lines if line["forward_tokens"]]
    assert [line["grad_norm"] is None for line in trains[:6]] == [False, True, False, True, True, False][:len(trains)]
    assert [line["skipped"] for line in trains[:5]] == [0, 1, 1, 2, 3] and trains[1]["loss"] is None
    calls.clear()
    bad = lambda call: call > 2                                      # noqa: E731
    with pytest.raises(SystemExit) as stop:
        dirl.main([*argv, str(tmp_path / "end")])
    assert stop.value.code == 2 and "third gradient in a row" in capsys.readouterr().err
    assert dirl.saved_states(SimpleNamespace(out=str(tmp_path / "end"), stage="rl")) in ([2], [2, 4])


def test_a_gap_that_is_not_a_number_is_an_end(trained, tmp_path, monkeypatch, capsys):
    denoise = dirl.denoise

    def broken(*terms):
        token, new, logp = denoise(*terms)
        return token, new, logp * float("nan")
    monkeypatch.setattr(dirl, "denoise", broken)
    with pytest.raises(SystemExit):
        dirl.main([*SHORT_RL, "--model", os.path.join(trained, "sft"), "--out", str(tmp_path / "run")])
    assert "--max-logp-gap" in capsys.readouterr().err


def test_sigterm_gives_up_rollouts_but_not_a_weight_update(policies, lmdeploy_engine, monkeypatch, tmp_path):
    policy, c = policies(4), flags("--max-new-tokens", 400, "--max-length", 16, "--slots", 9, "--out", tmp_path)
    prompts, keys = prompts_of_every_remainder(policy), [(0, i) for i in range(9)]
    more = {} if torch.cuda.is_available() else {"num_gpu_blocks": 400}
    for engine in (dirl.TorchEngine(policy, c), lmdeploy_engine(policy, c, **more)):
        monkeypatch.setattr(policy, "stop_ids", torch.tensor([policy.mask_id]))                # none is drawn: it takes long
        dirl.stop_signal.set()
        try:
            engine.sleep()
            engine.update_weights()
            with pytest.raises(dirl.Stopped):
                engine.generate(prompts, keys)
            with pytest.raises(dirl.Stopped):
                dirl.evaluate(policy, engine, c, [(p, "", "") for p in prompts], lambda answer, truth: 0)
        finally:
            dirl.stop_signal.clear()


def soak(start):
    """Kill and resume on two ranks, several times over."""
    for n in range(3):
        with tempfile.TemporaryDirectory() as folder:
            found, expected, *_ = killed_and_resumed(start, Path(folder), ranks=2)
            print(f"round {n}: {'the same metrics, bit for bit' if found == expected else 'DIFFERENT'}", flush=True)


# ---- python test_dirl.py --bench: what a forward costs ------------------------------------------------------------

# Table 1's mean output lengths of DiRL-8B: MATH500 and GSM8K, with static decoding (1 token a step) and dynamic (about 2).
TABLE_1 = {1: (1917, 707), 2: (2001, 730)}
LAYOUTS = {"authors": "the authors' layout", "no fakes": "without fake samples", "ours": "one forward (ours)"}


def bench_policy():
    """A random Qwen3 in float32; on CUDA as wide as SDAR-1.7B, in bfloat16 as in training, with 8 of its 28 layers."""
    import transformers
    cuda = torch.cuda.is_available()
    d, layers, heads, vocab = (2048, 8, 16, 151936) if cuda else (512, 6, 8, 4096)
    config = dict(vocab_size=vocab, hidden_size=d, intermediate_size=3 * d, num_hidden_layers=layers, num_attention_heads=heads,
                  num_key_value_heads=8 if cuda else 4, head_dim=d // heads, max_position_embeddings=2**15, rope_theta=1e6)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(dirl.qwen3_config(config)).to("cuda" if cuda else "cpu").train()
    with torch.no_grad():
        model.lm_head.weight *= 4                                   # logits that differ by a few nats, as a trained model's
    if cuda:
        model.activation_checkpointing_enable({"use_reentrant": False})
    dirl.start_ranks()
    return dirl.Policy(dirl.shard(model, flags()), None, None, 4, vocab - 1, 0, 0, 1.0)


def bench_trajectories(lengths, per_step, scale):
    """The trajectories of a case: "paper" has one of 1024 + 8192 tokens, "Table 1" one of MATH500's mean output length and
    one of GSM8K's, after prompts of 200 tokens, a number one of 1024 + as many, all in 1/scale; random tokens, random
    order, per_step tokens a step."""
    g, trajectories = torch.Generator().manual_seed(1), []
    known = {"paper": [(1024, 8192)], "Table 1": [(200, L) for L in TABLE_1[per_step]]}
    for P, L in known.get(lengths) or [(1024, int(lengths))]:
        P, S = P // scale, (P + L) // scale // 4 * 4
        steps = torch.zeros(S, dtype=torch.long)
        for k in range(P // 4, S // 4):
            order = [p for p in (torch.randperm(4, generator=g) + 4 * k).tolist() if p >= P]
            steps[order] = torch.arange(len(order)) // per_step + 1
        tokens = torch.randint(0, 4000, (S,), generator=g)
        trajectories.append((tokens[:P], tokens[P:], steps[P:]))
    return trajectories


def authors_rows(trajectory, padded, fakes, mask_id):
    """Rows of the authors' layout (train/dapo.py, models/sdar/modeling_sdar.py of OpenMOSS/DiRL, batch_size_lm 1): one
    sample for each round, round s in all blocks at once, a noisy and a clean copy of the whole padded sequence; every
    masked position goes through the vocabulary projection; rounds that did not occur are filled up to B with fake ones."""
    prompt, output, steps = trajectory
    tokens, P = torch.cat([prompt, output]), len(prompt)
    step = torch.cat([torch.zeros_like(prompt), steps])
    for s in range(1, 4 + 1 if fakes else int(steps.max()) + 1):
        masked = step >= s
        document = dirl.layout(tokens, torch.arange(len(tokens) // 4), torch.where(masked, mask_id, tokens).view(-1, 4), 4)
        document["reads"] = len(tokens) + masked.nonzero()[:, 0]
        document["target"], document["at"] = tokens[masked], masked.nonzero()[:, 0] - P      # at: which output token
        document["kept"] = step[masked] == s
        yield dirl.join([document], length=2 * padded)


def peak_memory():
    """The most memory that this process has had, in bytes: of the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_one(layout, lengths, per_step, scale, file):
    """One line of the table, in a process of its own; log-probabilities and gradients go to a file."""
    from safetensors.torch import save_file
    policy, trajectories = bench_policy(), bench_trajectories(lengths, int(per_step), int(scale))
    total, documents, rows = sum(len(output) for _, output, _ in trajectories), [], []
    for i, (prompt, output, steps) in enumerate(trajectories):
        if layout == "ours":
            at = torch.arange(len(output))
            document = dirl.trajectory_document(prompt, output, steps, 4, policy.mask_id)
            documents.append(document | {"at": at, "kept": at >= 0, "which": torch.full_like(at, i)})
        else:
            for row in authors_rows((prompt, output, steps), (1024 + 8192) // int(scale), layout == "authors", policy.mask_id):
                rows.append(row | {"which": torch.full_like(row["at"], i)})
    rows += rows_of(policy, documents, 16384 // int(scale))
    rows = [{name: x.to(policy.device) for name, x in row.items()} for row in rows]
    A = torch.randn(len(trajectories), generator=torch.Generator().manual_seed(2)).to(policy.device) / total
    found = [torch.zeros(len(output), device=policy.device) for _, output, _ in trajectories]

    def forward_and_backward():
        for row in rows:
            logp, _ = policy.score(row)                             # a fake sample's is empty, its backward is not
            (A[row["which"]] * row["kept"] * logp).sum().backward()
            for i in row["which"].unique().tolist():
                chosen = row["kept"] & (row["which"] == i)
                found[i][row["at"][chosen]] = logp.detach()[chosen]
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
    seconds, before = [], peak_memory()
    for _ in range(4):                                              # the first compiles and touches memory
        policy.model.zero_grad()
        start = time.perf_counter()
        forward_and_backward()
        seconds.append(time.perf_counter() - start)
    grads = {name: p.grad for name, p in policy.model.named_parameters()}
    grads = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}      # FSDP's, on CUDA
    save_file({name: x.cpu() for name, x in (grads | {"logp": torch.cat(found)}).items()}, file)
    print(json.dumps({"tokens": sum(len(row["ids"]) for row in rows), "seconds": statistics.median(seconds[1:]),
                      "gigabytes": (peak_memory() - before) / 1e9}))


def bench():
    from safetensors.torch import load_file
    scale = 1 if torch.cuda.is_available() else 16
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}. Lengths of the paper / {scale}; the authors' rows padded to (1024 + 8192) / {scale}. Seconds: forward and "
          "backward.\nMemory: the process's peak above the model. Differences: to the authors' layout.\n")
    print(f"{'lengths':8} {'tokens/step':>11}  {'layout':22} {'forward tokens':>14} {'seconds':>8} {'ratio':>6} "
          f"{'peak GB':>8} {'max |Δ log π|':>13} {'rel. Δ gradient':>15}")
    growing = [(str(L), 2) for L in (1024, 2048, 4096, 8192)]
    for lengths, per_step in [*itertools.product(("paper", "Table 1"), (1, 2)), *growing]:
        first = None
        for layout, title in LAYOUTS.items():
            with tempfile.TemporaryDirectory() as folder:
                file = os.path.join(folder, "result.safetensors")
                command = [sys.executable, __file__, "--bench-one", layout, lengths, str(per_step), str(scale), file]
                output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
                result = json.loads(output.splitlines()[-1]) | {"tensors": load_file(file)}
            first = first or result
            off = {name: result["tensors"][name] - x for name, x in first["tensors"].items()}
            gap = float(off.pop("logp").abs().max())
            error, norm = (sum(float(tensors[name].square().sum()) for name in off)**0.5 for tensors in (off, first["tensors"]))
            print(f"{lengths:8} {per_step:11}  {title:22} {result['tokens']:14,} {result['seconds']:8.2f} "
                  f"{result['seconds'] / first['seconds']:6.2f} {result['gigabytes']:8.2f} {gap:13.1e} {error / norm:15.1e}",
                  flush=True)


# ---- python test_dirl.py --rollouts: LMDeploy, and what the hook and the weight update cost --------------------------


def random_sdar(folder):
    """On a GPU a random SDAR-1.7B, else the tiny model."""
    dirl.build_tiny(folder, 4, 0)
    if torch.cuda.is_available():
        import transformers
        from huggingface_hub import save_torch_state_dict
        path = os.path.join(folder, "config.json")
        config = json.load(open(path)) | dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, rope_theta=1e6, initializer_range=0.02, torch_dtype="bfloat16",
            max_position_embeddings=32768)
        json.dump(config, open(path, "w"))
        model = transformers.Qwen3ForCausalLM(dirl.qwen3_config(config)).bfloat16()
        save_torch_state_dict(model.state_dict(), folder)
    return folder


def stock(policy, *rest):
    """In place of dirl.hook_lmdeploy: LMDeploy's own strategies, with the checkpoint's mask token."""
    from lmdeploy.pytorch.strategies import dllm

    class Factory(dllm.DLLMStrategyFactory):
        def __init__(self, model_config, dllm_config):
            model_config.dllm_mask_token = policy.mask_id
            super().__init__(model_config, dllm_config)
    return Factory


def stock_tokens(engine, prompts, max_new):
    """Output tokens of LMDeploy as it is, on the same engine settings: its own sampler, with top-k off."""
    from lmdeploy import GenerationConfig

    async def one(i):
        asked = GenerationConfig(max_new_tokens=max_new, temperature=1.0, top_k=0, random_seed=i, ignore_eos=True)
        async for response in engine.instance.async_stream_infer(next(engine.sessions), list(prompts[i]), gen_config=asked):
            tokens = len(response.token_ids)
        return tokens

    async def every():
        return sum(await asyncio.gather(*map(one, range(len(prompts)))))
    return engine.run(every())


def rollout_table():
    cuda = torch.cuda.is_available()
    lmdeploy_on_cpu()
    n, P, max_new, options = (64, 200, 512, {}) if cuda else (8, 20, 32, {"num_gpu_blocks": 64, "block_size": 16, "eager_mode": True})
    prompts = torch.randint(0, 200, (n, P), generator=torch.Generator().manual_seed(0)).tolist()
    used = (lambda: torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) if cuda else (lambda: 0)
    with tempfile.TemporaryDirectory() as folder:
        c = flags("--max-new-tokens", max_new, "--max-length", P, "--slots", n, "--engine", "torch")
        policy = dirl.load_policy(random_sdar(folder), c, dirl.read_config(folder, c))
        policy.stop_ids, before, rates = torch.tensor([], dtype=torch.long), used(), {}
        hook = dirl.hook_lmdeploy
        for name in ("stock", "hooked"):
            dirl.hook_lmdeploy = stock if name == "stock" else hook
            engine = dirl.LMDeployEngine(policy, c, **options)
            for warm in (True, False):
                start = time.perf_counter()
                if name == "stock":
                    tokens = stock_tokens(engine, prompts, max_new)
                else:
                    found = engine.generate(prompts, [(0, warm, i) for i in range(n)])
                    tokens = sum(len(t.output) for t in found)
                rates[name] = tokens / (time.perf_counter() - start)
            if name == "stock":
                engine.close()
        awake, size = used(), sum(w.numel() * 2 for _, w in policy.named_weights()) / 1e9
        engine.sleep()
        asleep = used()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            engine.update_weights()
            seconds.append(time.perf_counter() - start)             # the first wakes it up: weights, cache, graphs
        with torch.no_grad():
            row = rows_of(policy, documents_of(policy, found[:4]), 10**6)[0]
            logp = policy.score(row)[0].cpu()
        order = dirl.pack([len(d["ids"]) for d in documents_of(policy, found[:4])], 10**6)[0]
        gap = (logp - torch.cat([found[i].logp for i in order])).abs().mean()
        print(f"{torch.cuda.get_device_name() if cuda else 'CPU, stand-ins for the kernels, the tiny model'}; {n} prompts of {P} "
              f"tokens, {max_new} new ones")
        print(f"rollout: stock {rates['stock']:,.0f} tokens/s, hooked {rates['hooked']:,.0f} tokens/s "
              f"({rates['hooked'] / rates['stock']:.3f}); logp_gap {float(gap):.1e}")
        print(f"update_weights: {size:.2f} GB in bfloat16; after sleep {seconds[0]:.2f} s, awake {seconds[2]:.2f} s, "
              f"{size / seconds[2]:.1f} GB/s")
        print(f"GPU memory in use: before the engine {before / 1e9:.1f} GB, awake {awake / 1e9:.1f} GB, asleep {asleep / 1e9:.1f} GB")
        engine.close()


# ---- python test_dirl.py --one-step: log-probabilities that are not those of the decoding -------------------------


def one_step_document(prompt, output, steps, B, mask_id):
    """diffu-GRPO's estimate (d1), for blocks: every token is scored as if its whole block had been committed at once."""
    return TRAJECTORY_DOCUMENT(prompt, output, torch.ones_like(steps), B, mask_id)


def last_line(*argv):
    """Of dirl.py with these flags, in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        dirl.main([str(x) for x in argv])
    return printed.getvalue().splitlines()[-1].split("; ")[0]


def one_step_errors(folder, seed, rule):
    """Of the committed tokens of 32 groups sampled from a checkpoint: one-step against exact log-probabilities."""
    c = replace(flags("--seed", seed, "--prompts", 32, "--unmask", rule), max_attempts=1, max_tokens=1)
    policy = dirl.load_policy(folder, c, dirl.read_config(folder, c))
    _, groups, _ = dirl.dynamic_sampling(policy, dirl.TorchEngine(policy, c), c, dirl.rl_problems(policy, c, None)[0], dirl.arithmetic_reward, 0, 10**6, {})
    logp, gradients = [], []
    for score_as in (TRAJECTORY_DOCUMENT, one_step_document):
        dirl.trajectory_document = score_as
        rows, _, _ = dirl.dipo_rows(policy, c, groups)              # one trajectory a row, the longest first
        dirl.trajectory_document = TRAJECTORY_DOCUMENT
        values = [policy.score(row)[0] for row in rows]
        J = sum(dirl.eq7(value, None, row["A"], row["w"], 0.2, 0.2)[0] for value, row in zip(values, rows))
        logp.append(torch.cat(values).detach())
        gradients.append(gradient(policy.model, J))
    trajectories = [t for group, _ in groups for t in group]
    order = sorted(range(len(trajectories)), key=lambda i: -len(trajectories[i].prompt) - len(trajectories[i].output)
                   - policy.B * trajectories[i].decoding_steps)
    steps, error = torch.cat([trajectories[i].steps for i in order]), (logp[1] - logp[0]).abs()
    for s in steps.unique().tolist():
        e = error[steps == s]
        print(f"    committed at step {s}: {len(e) / len(error):4.0%} of the tokens; |one-step - exact| log π in nats: "
              f"mean {e.mean():.3f}, median {e.median():.3f}, 90% {e.quantile(0.9):.3f}, max {e.max():.3f}")
    print(f"    gradient of Eq. 7 on them: relative error {float((gradients[1] - gradients[0]).norm() / gradients[0].norm()):.2f}, "
          f"after the best scaling {bias(gradients[1], gradients[0]):.2f}", flush=True)


def one_step():
    for seed in (0, 1, 2):
        with tempfile.TemporaryDirectory() as folder:
            last_line("--stage", "sft", "--seed", seed, "--out", folder)
            sft = os.path.join(folder, "sft")
            for rule in ("dynamic", "static"):
                print(f"seed {seed}, --unmask {rule}, trajectories of the model after SFT")
                one_step_errors(sft, seed, rule)
                for name, score_as in (("exact", TRAJECTORY_DOCUMENT), ("one-step", one_step_document)):
                    dirl.trajectory_document, out = score_as, os.path.join(folder, f"{rule} {name}")
                    line = last_line("--seed", seed, "--unmask", rule, "--model", sft, "--out", out,
                                     "--max-logp-gap", 100)         # the guard would stop it, and rightly
                    gap = max(line["logp_gap"] or 0 for line in metrics(out, "rl"))
                    print(f"    RL with {name} log-probabilities: {line}, largest logp_gap {gap:.1e}", flush=True)
                dirl.trajectory_document = TRAJECTORY_DOCUMENT


# ---- python test_dirl.py --memory: what training asks of a GPU, by formula ------------------------------------------

# Qwen3's sizes, which SDAR took over; the output embedding counted as a matrix of its own.
SIZES = {"1.7B": (2048, 6144, 28, 16), "4B": (2560, 9728, 36, 32), "8B": (4096, 12288, 36, 32)}


def memory_table():
    """README's table: gigabytes a GPU with --recipe paper and LMDeploy."""
    lines = ["| model | GPUs | loading | training | rollout |", "|---|---|---|---|---|"]
    for (name, (d, inter, layers, heads)), ranks in itertools.product(SIZES.items(), (1, 8)):
        config = dict(hidden_size=d, intermediate_size=inter, num_hidden_layers=layers, num_attention_heads=heads, head_dim=128,
                      num_key_value_heads=8, vocab_size=151936, block_size=4)
        c = replace(flags("--model", name, "--recipe", "paper"), engine="lmdeploy")
        cells = (f"{x / 1e9:.0f} GB" for x in dirl.memory(c, config, ranks, cuda=True)[1].values())
        lines.append(f"| {name} | {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- python test_dirl.py --mutate: does a test fail when a line above the cut is changed? ----------------------------

OPERATORS = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv],
             ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Lt: [ast.LtE, ast.Gt],
             ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is]}
CALLS = {"minimum": "maximum", "min": "max", "max": "min", "sum": "mean", "mean": "sum", "any": "all", "all": "any", "zeros": "ones",
         "zeros_like": "ones_like", "ones_like": "zeros_like", "new_zeros": "new_ones", "cumsum": "cumprod", "index_add": "index_copy",
         "index_copy": "index_add", "expand_as": "view_as", "log_softmax": "softmax", "searchsorted": "bucketize"}
DROPPED = {"detach", "exp", "square", "sqrt", "flatten", "clamp", "clamp_min", "log_softmax", "cumsum", "masked_fill", "index_fill", "double",
           "to", "float", "argsort", "expand_as"}


def changed(node):
    """What may stand in the place of a node of the syntax tree: (what was changed, other node)."""
    if isinstance(node, ast.BinOp | ast.UnaryOp):
        for other in OPERATORS.get(type(node.op), []):
            yield ast.BinOp(node.left, other(), node.right)
        yield from [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    if isinstance(node, ast.AugAssign | ast.Expr) or isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
        yield ast.Pass()
    if isinstance(node, ast.AugAssign):
        yield from (ast.AugAssign(node.target, other(), node.value) for other in OPERATORS[type(node.op)])
    if isinstance(node, ast.Compare):
        for other in OPERATORS.get(type(node.ops[0]), []):
            yield ast.Compare(node.left, [other()], node.comparators)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        values = [not node.value] if isinstance(node.value, bool) else [node.value + 1, node.value - 1]
        yield from map(ast.Constant, [node.value * 2] if isinstance(node.value, float) else values)
    if isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse, ast.IfExp(node.test, node.orelse, node.body))
    if isinstance(node, ast.Slice):
        yield from [ast.Slice(None, node.upper)] * (node.lower is not None) + [ast.Slice(node.lower, None)] * (node.upper is not None)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in CALLS:
            yield ast.Call(ast.Attribute(node.func.value, CALLS[node.func.attr], ast.Load()), node.args, node.keywords)
        if node.func.attr in DROPPED:
            yield node.func.value
    if isinstance(node, ast.Call) and node.keywords:
        yield from (ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1:]) for i in range(len(node.keywords)))
    if isinstance(node, ast.Call) and len(node.args) > 1:
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)


def mutants():
    """[(function, line, old code, new code, mutated source of the function)] of all that stands above the cut line."""
    found = []
    for function in ast.parse(open(dirl.__file__, encoding="utf-8").read().split("# =====")[0]).body:
        if isinstance(function, ast.FunctionDef):
            function.body = function.body[1:]                       # without its docstring
            places = [(parent, name, i) for parent in ast.walk(function) for name, value in ast.iter_fields(parent)
                      for i, child in enumerate(value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)]
            for parent, name, i in places:
                value = getattr(parent, name)
                values = value if isinstance(value, list) else [value]
                node, shown = values[i], parent if isinstance(parent, ast.expr | ast.keyword) else values[i]
                for other in changed(node):
                    old, line = ast.unparse(shown), getattr(shown, "lineno", 0)
                    put = values[:i] + [ast.fix_missing_locations(ast.copy_location(other, node))] + values[i + 1:]
                    setattr(parent, name, put if isinstance(value, list) else put[0])
                    new = ast.unparse(shown if shown is parent else other)
                    found.append((function.name, line, old, new, ast.unparse(ast.fix_missing_locations(function))))
                    setattr(parent, name, value)
    return [mutant for mutant in found if mutant[2] != mutant[3]]


class Mutate:
    """A pytest plugin: instead of running the tests once, it runs those that reach a function for each of its mutants, in
    forked processes, two at a time, until one fails; a mutant that hangs counts as caught."""
    def __init__(self, functions):
        self.queue = [mutant for mutant in mutants() if not functions or mutant[0] in functions]

    def pytest_runtestloop(self, session):
        from _pytest.runner import runtestprotocol
        items = [item for item in session.items if not {"trained", "lmdeploy_engine", "tmp_path"} & set(item.fixturenames)]

        def passes(item):
            item._initrequest()
            reports = runtestprotocol(item, log=False, nextitem=items[item is items[0]])    # another one: fixtures stay
            return all(report.passed or report.skipped for report in reports)
        queue, reached, seconds = self.queue, {}, {}

        def spied(name, function):
            def call(*args, **more):
                reached.setdefault(name, set()).add(current)
                return function(*args, **more)
            return call
        originals = {name: getattr(dirl, name) for name, *_ in queue}
        vars(dirl).update({name: spied(name, function) for name, function in originals.items()})
        for current in items:
            start = time.perf_counter()
            assert passes(current), f"{current.nodeid} fails without a mutation"
            seconds[current] = time.perf_counter() - start
        vars(dirl).update(originals)
        running, survivors, equivalent, begin = {}, [], [], time.time()
        known = {key for key, _ in EQUIVALENT}

        def reap():
            pid, status = os.wait()
            mutant = running.pop(pid)
            if status == 0:
                if mutant[4] == "":
                    return
                same = (mutant[0], *mutant[2:4]) in known
                (equivalent if same else survivors).append(mutant)
                print("{}: {}, line {}: {}  ->  {}".format("equivalent" if same else "SURVIVED", *mutant[:4]), flush=True)
            elif mutant[4] == "":
                raise RuntimeError(f"the tests of {mutant[0]} fail in a forked process without a mutation")
            elif os.WIFSIGNALED(status):
                print("hangs: {}, line {}: {}  ->  {}".format(*mutant[:4]), flush=True)
        nothing = [(name, 0, "", "", "") for name in originals]    # first, a mutant of every function that is none: all must pass
        for mutant in nothing + queue:
            if len(running) == 2:
                reap()
            tests = sorted(reached[mutant[0]], key=seconds.get)
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                for module in (dirl, sys.modules[tests[0].module.__name__]):
                    for function in list(vars(module).values()):
                        getattr(function, "cache_clear", int)()
                try:
                    exec(mutant[4], vars(dirl))
                    for item in tests:
                        signal.alarm(10 + 5 * math.ceil(seconds[item]))
                        if not passes(item):
                            os._exit(1)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            running[pid] = mutant
        while running:
            reap()
        caught = len(queue) - len(survivors) - len(equivalent)
        print(f"{len(queue)} mutants, {len(equivalent)} of them equivalent; {caught} caught: {caught / (len(queue) - len(equivalent)):.1%}"
              f"; {time.time() - begin:.0f} s")
        return True


def mutate(functions):
    torch.set_num_threads(1)                                        # no thread pool: processes that are forked have none
    return pytest.main([__file__, "-s", "-p", "no:cacheprovider", "-p", "no:terminal", "-W", "ignore"], plugins=[Mutate(functions)])


# Mutants that no test can tell from the original, and why: (function, old code, new code).
SEES, ORDER, ONE = "sees({}, {}, q[:, None], {})", "tiles.int().argsort({}).int", "the last of two dimensions, or the only one"
CHECKPOINT = ("[torch.utils.checkpoint.checkpoint(one, h, y, use_reentrant=False{}) for h, y in "
              "zip(hidden.split(chunk), target.split(chunk))]")
EQUIVALENT = [
    *(((name, SEES.format(0, 0, kv), SEES.format(*indices, kv)), "our mask_mod looks at neither batch nor head")
      for indices in ((1, 0), (-1, 0), (0, 1), (0, -1)) for name, kv in (("block_mask", "kv"), ("strips", "i"))),
    *(((name, str(size), str(size + more)), "how the work is cut does not matter")
      for name, size in (("strips", 128), ("log_probs", 512)) for more in (1, -1)),
    *(((name, old, new), "no other device here") for name, old, new in (
        ("strips", "torch.arange(N, device=device)", "torch.arange(N)"),
        ("log_policy", "torch.tensor([mask_id], device=logits.device)", "torch.tensor([mask_id])"))),
    *(((name, "(:, 0)", "(:, -1)"), ONE) for name in ("strips", "log_probs", "noised_document")),
    (("draw", "(..., 0)", "(..., -1)"), ONE),
    (("trajectory_document", "count.cumsum(0)", "count.cumsum(-1)"), ONE),
    (("eq8", "x.new_zeros(T).index_copy(0, view, x)", "x.new_zeros(T).index_copy(-1, view, x)"), ONE),
    (("eq8", "logp.new_zeros(T).index_add(0, view, log_ratio)", "logp.new_zeros(T).index_add(-1, view, log_ratio)"), ONE),
    (("block_mask", ORDER.format("dim=1, descending=True, stable=True"), ORDER.format("descending=True, stable=True")), ONE),
    (("block_mask", ORDER.format("dim=1, descending=True, stable=True"), ORDER.format("dim=1, descending=True")),
     "in which order visible tiles are listed does not matter"),
    (("block_mask", "stable=True", "stable=False"), "the same"),
    *((("unmask", "score.argsort(dim=-1, descending=True, stable=True)" + old, "score.argsort(" + new), why) for old, new, why in (
        (".argsort(dim=-1)", "dim=-1, descending=True, stable=True).argsort()", ONE),
        (".argsort", "descending=True, stable=True).argsort", ONE),
        (".argsort", "dim=-1, descending=True).argsort", "a sort of a few keeps ties in order, on CPU"))),
    *((("unmask", old, new), ONE) for old, new in (("dim=-1", "dim=1"), ("(..., 0)", "(..., -1)"))),
    (("unmask", "torch.arange(masked.shape[1], device=masked.device).expand_as(masked).float",
      "torch.arange(masked.shape[1], device=masked.device).float"), "masked_fill expands it"),
    (("unmask", "torch.arange(masked.shape[1], device=masked.device).expand_as", "torch.arange(masked.shape[1]).expand_as"), "no other device here"),
    (("unmask", "stable=True", "stable=False"), "a sort of a few keeps ties in order, on CPU"),
    (("join", "pad - 1", "pad - 2"), "a number that no document has"),
    (("log_policy", "logits.to(torch.promote_types(logits.dtype, torch.float32))",
      "logits.to(torch.promote_types(torch.float32, logits.dtype))"), "symmetric"),
    (("C_eps", "torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps_high) * A)",
      "torch.minimum(ratio.clamp(1 - eps, 1 + eps_high) * A, ratio * A)"), "symmetric"),
    (("log_probs", CHECKPOINT.format(", preserve_rng_state=False"), CHECKPOINT.format("")), "nothing random is done there"),
    (("log_probs", "preserve_rng_state=False", "preserve_rng_state=True"), "the same"),
    (("advantage", "A.square().mean(1, keepdim=True).sqrt().clamp_min(1e-08)", "A.square().mean(1, keepdim=True).sqrt().clamp_min(2e-08)"),
     "0 is divided by it, or rewards differ by less than 1e-7"),
    (("eq8", "x.new_zeros(T).index_copy", "x.new_ones(T).index_copy"), "every view has a token, so that all is overwritten")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measurements; the tests run under pytest.")
    parser.add_argument("--bench", action="store_true", help="the authors' layout and ours: tokens, seconds, memory")
    parser.add_argument("--bench-one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--rank-worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--soak", metavar="CHECKPOINT", help="kill and resume RL from this checkpoint on two ranks, over and over")
    parser.add_argument("--one-step", action="store_true", help="one-step log-probabilities against exact ones, RL with both")
    parser.add_argument("--memory", action="store_true", help="gigabytes a GPU, by formula")
    parser.add_argument("--rollouts", action="store_true", help="LMDeploy: tokens/s with and without the hook, weight update")
    parser.add_argument("--mutate", nargs="*", metavar="FUNCTION",
                        help="change one thing in these functions above the cut, or in all, see whether a test fails; and so on")
    given = parser.parse_args()
    if given.bench:
        bench()
    elif given.memory:
        print(memory_table())
    elif given.mutate is not None:
        sys.exit(mutate(given.mutate))
    elif given.one_step:
        one_step()
    elif given.rank_worker:
        rank_worker(*given.rank_worker)
    elif given.soak:
        soak(given.soak)
    elif given.rollouts:
        rollout_table()
    elif given.bench_one:
        bench_one(*given.bench_one)
    else:
        parser.print_help()
