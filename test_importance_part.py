# SPDX-License-Identifier: MIT
"""Issue 20's proofs, to be merged into test_dirl.py: what is imported from there stands there already."""
import copy
import importlib.util
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

import dirl
from test_dirl import (HERE, J_of, changed, disturbed, documents_of, gradient, policies, relative, rollouts,  # noqa: F401
                       toy_log_pi, toy_policy)


# ---- in place of test_importance_gives_the_gradient_of_the_policy_where_another_one_samples ---------------------

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


# ---- new: beside test_importance_weights_come_from_whole_trajectories_and_reach_the_loss ------------------------

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
    for gap in (-60.0, -200.0):      # of W², and of W, nothing is left in float32; fails until `weigh` guards its division
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


# ---- for .github/test_measure.py, where `measured` and `module` stand already -----------------------------------

def measured(option):
    """What measure.py prints."""
    done = subprocess.run([sys.executable, os.path.join(HERE, ".github", "measure.py"), option, "--small"], capture_output=True,
                          text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module(name):
    spec = importlib.util.spec_from_file_location(name, os.path.join(HERE, ".github", name + ".py"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


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
