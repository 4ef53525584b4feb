# SPDX-License-Identifier: MIT
"""Measurements of dirl.py, behind the README's figures; on a CPU all of them run too, smaller.

    python .github/measure.py --bench       the authors' layout and ours: tokens, seconds, memory, differences
    python .github/measure.py --rollouts    LMDeploy as it is and with the hook; weight updates awake and after sleep
    python .github/measure.py --one-step    one-step log-probabilities against exact ones, RL with both
    python .github/measure.py --mismatch    RL whose sampler is not the trainer, with and without --importance
    python .github/measure.py --memory      peak memory a GPU and FLOPs of a training step, simulated without a GPU
    python .github/measure.py --gpu         what one 80 GB GPU must tell, within nine minutes
    ... --small                             the same in its smallest form, for the tests

Without a GPU, LMDeploy runs on the stand-ins of stand_ins.py."""
import argparse
import asyncio
import concurrent.futures
import contextlib
import copy
import io
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import torch

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)

import dirl

CUDA, SMALL = torch.cuda.is_available(), "--small" in sys.argv
FULL, DEVICE, B = CUDA and not SMALL, "cuda" if CUDA else "cpu", 4
NAME = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"

# What config.json has in place of the tiny model's values: of SDAR-1.7B, and of the model of --bench on a CPU.
SDAR = dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, rope_theta=1e6, initializer_range=0.02, torch_dtype="bfloat16",
            max_position_embeddings=32768)
MEDIUM = dict(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
              num_key_value_heads=4, head_dim=64, rope_theta=1e6, initializer_range=0.02, max_position_embeddings=32768)


# ---- what all of them use --------------------------------------------------------------------------------------------


def flags(*argv):
    return dirl.parse_flags([str(x) for x in argv])


def changed(c, **values):
    """A copy of the flags with other values."""
    return argparse.Namespace(**vars(c) | values)


def part(name, *args, seconds=None):
    """Runs a function of this file in a process of its own, which prints as it goes. Whether it ended well, in time. With
    --small, and without a time limit, in this process: an import takes longer than the work."""
    if SMALL and seconds is None:
        globals()[name](*args)
        return True
    command = [sys.executable, __file__, "--part", name, *map(str, args), *["--small"] * SMALL]
    try:
        return subprocess.run(command, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {seconds:.0f} s")
        return False


def random_model(folder, kind):
    """A checkpoint of random weights: tiny, medium (for --bench on a CPU), or as large as SDAR-1.7B."""
    import transformers
    from huggingface_hub import save_torch_state_dict
    dirl.build_tiny(folder, B, 0)
    if kind != "tiny":
        path = os.path.join(folder, "config.json")
        config = dirl.read_json(path) | {"medium": MEDIUM, "1.7B": SDAR}[kind] | {"tiny": False}
        dirl.write_json(path, config)
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = transformers.Qwen3ForCausalLM(dirl.qwen3_config(config))
        save_torch_state_dict(model.to(getattr(torch, config["torch_dtype"])).state_dict(), folder)


@contextlib.contextmanager
def folder_with_model(kind):
    """A folder for files, and a random model in it: SDAR-1.7B's size on a GPU, tiny with --small, else of this kind."""
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.join(folder, "model")
        if not part("random_model", model, "1.7B" if FULL else "tiny" if SMALL else kind):
            sys.exit("no random model")
        yield folder, model


def memory(reset=False):
    """The most memory that this process has had, in bytes: of the GPU, since the last reset, or resident."""
    if not CUDA:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def random_trajectory(g, P, L, per_step):
    """(prompt, output, step map): about P + L random tokens, in whole blocks, committed in random order."""
    S = (P + L) // B * B
    steps = torch.zeros(S, dtype=torch.long)
    for k in range(P // B, S // B):
        order = [p for p in (torch.randperm(B, generator=g) + B * k).tolist() if p >= P]
        steps[order] = torch.arange(len(order)) // per_step + 1
    tokens = torch.randint(0, 200, (S,), generator=g)
    return tokens[:P], tokens[P:], steps[P:]


# ---- --bench: what a forward and backward costs ----------------------------------------------------------------------

# Table 1's mean output lengths of DiRL-8B: MATH500 and GSM8K, with static decoding (1 token a step) and dynamic (about 2).
TABLE_1 = {1: (1917, 707), 2: (2001, 730)}
LAYOUTS = {"authors": "the authors' layout", "no fakes": "without fake samples", "ours": "one forward (ours)"}
SCALE = 1 if FULL else 128 if SMALL else 16


def bench_trajectories(lengths, per_step):
    """The trajectories of a case: "paper" has one of 1024 + 8192 tokens, "Table 1" one of MATH500's mean output length and
    one of GSM8K's, after prompts of 200 tokens, a number one of 1024 + as many, all in 1/SCALE."""
    g, known = torch.Generator().manual_seed(1), {"paper": [(1024, 8192)], "Table 1": [(200, L) for L in TABLE_1[per_step]]}
    return [random_trajectory(g, P // SCALE, (P + L) // SCALE - P // SCALE, per_step)
            for P, L in known.get(lengths) or [(1024, int(lengths))]]


def authors_rows(trajectory, padded, fakes, mask_id):
    """Rows of the authors' layout (train/dapo.py, models/sdar/modeling_sdar.py of OpenMOSS/DiRL, batch_size_lm 1): one
    sample for each round, round s in all blocks at once, a noisy and a clean copy of the whole padded sequence; every
    masked position goes through the vocabulary projection; rounds that did not occur are filled up to B with fake ones."""
    prompt, output, steps = trajectory
    tokens, P = torch.cat([prompt, output]), len(prompt)
    step = torch.cat([torch.zeros_like(prompt), steps])
    for s in range(1, B + 1 if fakes else int(steps.max()) + 1):
        masked = step >= s
        document = dirl.layout(tokens, torch.arange(len(tokens) // B), torch.where(masked, mask_id, tokens).view(-1, B), B)
        document["reads"] = len(tokens) + masked.nonzero()[:, 0]
        document["target"], document["at"] = tokens[masked], masked.nonzero()[:, 0] - P      # at: which output token
        document["kept"] = step[masked] == s
        yield dirl.join([document], length=2 * padded)


def bench_rows(policy, trajectories, layout):
    documents, rows = [], []
    for i, (prompt, output, steps) in enumerate(trajectories):
        if layout == "ours":
            at = torch.arange(len(output))
            document = dirl.trajectory_document(prompt, output, steps, B, policy.mask_id)
            documents.append(document | {"at": at, "kept": at >= 0, "which": torch.full_like(at, i)})
        else:
            for row in authors_rows((prompt, output, steps), (1024 + 8192) // SCALE, layout == "authors", policy.mask_id):
                row["which"] = torch.full_like(row["at"], i)
                rows.append({name: x.to(policy.device) for name, x in row.items()})
    c = flags("--max-tokens", 16384 // SCALE)
    return rows or dirl.make_rows(policy, [len(d["ids"]) for d in documents], documents.__getitem__, c)


def bench_policy(model):
    """The random model in training, its logits a few nats apart as a trained model's."""
    dirl.start_ranks()
    policy = dirl.load_policy(model, flags("--model", model, "--engine", "torch"))
    with torch.no_grad():
        policy.model.lm_head.weight *= 4
    return policy


def bench_one(policy, layout, lengths, per_step, repetitions):
    """Tokens, seconds and gigabytes of a layout in a case, its log-probabilities and gradients."""
    trajectories = bench_trajectories(lengths, per_step)
    rows, total = bench_rows(policy, trajectories, layout), sum(len(output) for _, output, _ in trajectories)
    A = torch.randn(len(trajectories), generator=torch.Generator().manual_seed(2)).to(DEVICE) / total
    found = [torch.zeros(len(output), device=DEVICE) for _, output, _ in trajectories]

    def forward_and_backward(rows):
        policy.model.zero_grad()
        start = time.perf_counter()
        for row in rows:
            logp, _ = policy.score(row)                             # a fake sample's is empty, its backward is not
            (A[row["which"]] * row["kept"] * logp).sum().backward()
            for i in row["which"].unique().tolist():
                chosen = row["kept"] & (row["which"] == i)
                found[i][row["at"][chosen]] = logp.detach()[chosen]
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() - start
    before = memory(reset=True)
    forward_and_backward(rows[:1])                                  # compiles, and touches memory
    seconds = statistics.median(forward_and_backward(rows) for _ in range(repetitions))
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in policy.model.parameters()]
    return {"tokens": sum(len(row["ids"]) for row in rows), "seconds": seconds, "gigabytes": (memory() - before) / 1e9,
            "logp": torch.cat(found), "grads": grads}


def bench_in_file(model, file, layout, lengths, per_step):
    torch.save(bench_one(bench_policy(model), layout, lengths, int(per_step), 1 if SMALL else 3), file)


def bench_table(cases, layouts, result_of):
    """Prints the table of all cases in these layouts, a line as soon as result_of(layout, lengths, per_step) knows it."""
    print(f"{NAME}. Lengths of the paper / {SCALE}; the authors' rows padded to (1024 + 8192) / {SCALE}. Seconds: forward and "
          "backward.\nMemory: the process's peak above the model. Differences: to the authors' layout.\n")
    print(f"{'lengths':8} {'tokens/step':>11}  {'layout':22} {'forward tokens':>14} {'seconds':>8} {'ratio':>6} "
          f"{'peak GB':>8} {'max |Δ log π|':>13} {'rel. Δ gradient':>15}")
    for lengths, per_step in cases:
        first = None
        for layout in layouts:
            result = result_of(layout, lengths, per_step)
            first = first or result
            gap = (result["logp"] - first["logp"]).abs().max()
            error = sum(float((a - b).square().sum()) for a, b in zip(result["grads"], first["grads"]))**0.5
            norm = sum(float(b.square().sum()) for b in first["grads"])**0.5
            print(f"{lengths:8} {per_step:11}  {LAYOUTS[layout]:22} {result['tokens']:14,} {result['seconds']:8.2f} "
                  f"{result['seconds'] / first['seconds']:6.2f} {result['gigabytes']:8.2f} {gap:13.1e} {error / norm:15.1e}")


def bench():
    """Each line in a process of its own: resident memory does not fall again."""
    cases = [*itertools.product(("paper", "Table 1"), (1, 2)), *((str(L), 2) for L in (1024, 2048, 4096, 8192))]
    with folder_with_model("medium") as (folder, model):
        file = os.path.join(folder, "result")

        def result_of(*case):
            if not part("bench_in_file", model, file, *case):
                sys.exit(f"no result of {case}")
            return torch.load(file, map_location=DEVICE)
        bench_table([("1024", 2)] if SMALL else cases, LAYOUTS, result_of)


# ---- --rollouts: LMDeploy, and what the hook and a weight update cost ------------------------------------------------


def lmdeploy_engine(policy, c, **options):
    if CUDA:
        return dirl.LMDeployEngine(policy, c, **options)
    import stand_ins
    stand_ins.lmdeploy_on_cpu()
    return dirl.LMDeployEngine(policy, c, num_gpu_blocks=64, block_size=16, eager_mode=True, **options)


def stock(engine):
    """In place of dirl.hook_lmdeploy: LMDeploy's own strategies, with the checkpoint's mask token."""
    from lmdeploy.pytorch.strategies import dllm

    class Factory(dllm.DLLMStrategyFactory):
        def __init__(self, model_config, dllm_config):
            model_config.dllm_mask_token = engine.policy.mask_id
            super().__init__(model_config, dllm_config)
    return Factory


def stock_tokens(engine, prompts, new):
    """Output tokens of LMDeploy as it is, on the same settings: its own sampler, with top-k off."""
    from lmdeploy import GenerationConfig

    async def one(i):
        asked = GenerationConfig(max_new_tokens=new, temperature=1.0, top_k=0, random_seed=i, ignore_eos=True)
        async for response in engine.instance.async_stream_infer(next(engine.sessions), list(prompts[i]), asked):
            tokens = len(response.token_ids)
        return tokens

    async def every():
        return sum(await asyncio.gather(*map(one, range(len(prompts)))))
    return engine.call(engine.loop.run, every())


def rollouts(model=None):
    """Tokens a second, logp_gap, weight updates: a line each, as soon as it is known; in a process of its own."""
    if model is None:
        with folder_with_model("tiny") as (_, model):
            sys.exit(not part("rollouts", model))
    P, new, sizes = (200, 256, (64, 256)) if FULL else (20, 16, (4, 8))
    c = flags("--model", model, "--engine", "torch", "--max-new-tokens", new, "--max-length", P, "--slots", max(sizes),
              "--unmask", "static", "--max-tokens", 16384)
    prompts = torch.randint(0, 200, (max(sizes), P), generator=torch.Generator().manual_seed(0)).tolist()
    dirl.start_ranks()
    policy, rates, hook = dirl.load_policy(model, c), {}, dirl.hook_lmdeploy
    policy.stop_ids = torch.tensor([], dtype=torch.long)            # every output is as long
    print(f"{NAME}{'' if CUDA else ', stand-ins for the kernels'}; prompts of {P} tokens, {new} new ones, 1 token a step")
    for name in ("stock", "ours"):                                  # in this order: the hook also changes LMDeploy's class
        dirl.hook_lmdeploy = stock if name == "stock" else hook
        before = in_use()
        engine = lmdeploy_engine(policy, c, dllm_unmasking_strategy="low_confidence_static")
        for n, length in [(min(sizes), 2 * B), *((n, new) for n in sizes)]:            # the first warms up
            start = time.perf_counter()
            if name == "stock":
                tokens = stock_tokens(engine, prompts[:n], length)
            else:
                engine.c = changed(c, max_new_tokens=length)
                found = engine.generate(prompts[:n], [(0, i) for i in range(n)])
                tokens = sum(len(t.output) for t in found)
            rate = rates[name, n, length] = tokens / (time.perf_counter() - start)
            if length == new:
                ratio = f", {rate / rates['stock', n, length]:.3f} of stock" if name == "ours" else ""
                print(f"rollout, {n:3} at once, {name:5}: {rate:9,.1f} tokens/s{ratio}")
        if name == "stock":
            engine.close()
    documents = [dirl.trajectory_document(t.prompt, t.output, t.steps, B, policy.mask_id) | {"sampled": t.logp}
                 for t in found[:4]]
    row, *_ = dirl.make_rows(policy, [len(d["ids"]) for d in documents], documents.__getitem__, c)
    with torch.no_grad():
        gap = (policy.score(row)[0] - row["sampled"]).abs()
    print(f"logp_gap of sampler and trainer: mean {gap.mean():.1e}, largest {gap.max():.1e}")
    weight_updates(engine, before)
    engine.close()


def in_use():
    """Gigabytes of the GPU's memory, whoever holds them."""
    return (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 1e9 if CUDA else 0.0


def weight_updates(engine, before):
    size = sum(w.numel() * w.element_size() for _, w in engine.policy.named_weights(torch.bfloat16 if CUDA else torch.float32))
    awake = in_use()
    for state in ("awake", "awake", "after sleep"):
        if state != "awake":
            engine.sleep()                                          # drops weights, cache and CUDA graphs
            asleep = in_use()
        start = time.perf_counter()
        engine.update_weights()
        seconds = time.perf_counter() - start
        print(f"weight update, {state}: {size / 1e9:.3f} GB, {seconds:.3f} s, {size / 1e9 / seconds:.2f} GB/s")
    print(f"GPU memory in use: before the engine {before:.1f} GB, awake {awake:.1f} GB, asleep {asleep:.1f} GB")


# ---- --one-step: log-probabilities that are not those of the decoding ------------------------------------------------

TRAJECTORY_DOCUMENT = dirl.trajectory_document


def one_step_document(prompt, output, steps, B, mask_id):
    """diffu-GRPO's estimate (d1), for blocks: every token is scored as if its whole block had been committed at once."""
    return TRAJECTORY_DOCUMENT(prompt, output, torch.ones_like(steps), B, mask_id)


def last_line(*argv):
    """Of dirl.py with these flags, in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO() if SMALL else sys.stderr):
        dirl.main([str(x) for x in argv])
    return printed.getvalue().splitlines()[-1].split("; ")[0]


def one_step_errors(folder, seed, rule, reward):
    """Of the committed tokens of 32 groups sampled from a checkpoint: one-step against exact log-probabilities."""
    c = flags("--model", folder, "--seed", seed, "--prompts", 2 if SMALL else 32, "--unmask", rule, "--max-tokens", 1)
    policy = dirl.load_policy(folder, c)
    walk = dirl.Walk(policy, c, "the built-in task", dirl.built_in("rl", seed))
    problems = dict(next(walk) for _ in range(c.prompts))
    groups = list(dirl.roll_out(policy, dirl.TorchEngine(policy, c), c, problems, c.group_size, ("rl", 0), reward).values())
    logp, gradients = [], []
    for score_as in (TRAJECTORY_DOCUMENT, one_step_document):
        dirl.trajectory_document = score_as
        rows, _ = dirl.dipo_rows(policy, c, groups)                 # one trajectory a row, the longest first
        dirl.trajectory_document = TRAJECTORY_DOCUMENT
        values = [policy.score(row)[0] for row in rows]
        J = sum(dirl.eq7(value, None, row["A"], row["w"], 0.2, 0.2)[0] for value, row in zip(values, rows))
        logp.append(torch.cat(values).detach())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(J, list(policy.model.parameters()))]))
    trajectories = [t for group in groups for t in group.trajectories]
    order = sorted(trajectories, key=lambda t: -len(t.prompt) - len(t.output) - B * t.decoding_steps)
    steps, error = torch.cat([t.steps for t in order]), (logp[1] - logp[0]).abs()
    for s in steps.unique().tolist():
        e = error[steps == s]
        print(f"    committed at step {s}: {len(e) / len(error):4.0%} of the tokens; |one-step - exact| log π in nats: "
              f"mean {e.mean():.3f}, median {e.median():.3f}, 90% {e.quantile(0.9):.3f}, max {e.max():.3f}")
    exact, ours = gradients
    scaled = (ours @ exact) / (ours @ ours) * ours
    print(f"    gradient of Eq. 7 on them: relative error {float((ours - exact).norm() / exact.norm()):.2f}, "
          f"after the best scaling {float((scaled - exact).norm() / exact.norm()):.2f}")


def one_step():
    """RL with both; MAX_LOGP_GAP would stop the one with one-step log-probabilities, and rightly."""
    dirl.MAX_LOGP_GAP, alternating = float("inf"), itertools.cycle((0.0, 1.0))
    short = []
    if SMALL:                                  # after two steps of SFT no answer is right
        dirl.arithmetic_reward = lambda answer, truth: next(alternating)
        dirl.HELD_OUT, short = 4, ["--steps", 2, "--max-new-tokens", 8]
    for seed in (0,) if SMALL else (0, 1, 2):
        with tempfile.TemporaryDirectory() as folder:
            last_line("--stage", "sft", "--seed", seed, "--out", folder, *short)
            sft = os.path.join(folder, "sft")
            for rule in ("dynamic", "static"):
                print(f"seed {seed}, --unmask {rule}, trajectories of the model after SFT")
                one_step_errors(sft, seed, rule, dirl.arithmetic_reward)
                for name, score_as in (("exact", TRAJECTORY_DOCUMENT), ("one-step", one_step_document)):
                    dirl.trajectory_document, out = score_as, os.path.join(folder, f"{rule} {name}")
                    line = last_line("--seed", seed, "--unmask", rule, "--model", sft, "--out", out, *short)
                    with open(os.path.join(out, "rl.metrics.jsonl"), encoding="utf-8") as file:
                        gaps = [float(x) for x in re.findall(r'"logp_gap": ([\d.e+-]+)', file.read())]
                    print(f"    RL with {name} log-probabilities: {line}, largest logp_gap {max(gaps):.1e}")
                dirl.trajectory_document = TRAJECTORY_DOCUMENT


# ---- --mismatch: RL with a sampler that is not the trainer ------------------------------------------------------------


def rounded(grain):
    """The sampler's logits become multiples of `grain` nats, as those of a coarser number format; greedy answers do not."""
    denoise = dirl.denoise

    def coarse(logits, masked, u, *rest):
        return denoise(logits if u is None else (logits / grain).round() * grain, masked, u, *rest)
    return {"denoise": coarse}


def stale(age):
    """The sampler's weights are those of `age` steps ago, at first those of the start; greedy answers come from today's."""
    class Stale(dirl.TorchEngine):
        def __init__(self, policy, c):
            super().__init__(policy, c)
            self.history = []
            self.update_weights()

        def generate(self, prompts, keys, greedy=False):
            if greedy:
                return super().generate(prompts, keys, greedy)
            self.policy.model.load_state_dict(self.history[0])
            made = super().generate(prompts, keys)
            self.policy.model.load_state_dict(self.history[-1])
            return made

        def update_weights(self):
            self.history = self.history[-age:] + [copy.deepcopy(self.policy.model.state_dict())]
    return {"TorchEngine": Stale}


# Number formats are finer (bfloat16: 1/16 nat for logits of 8 to 16), so that what shows here bounds what they do.
SAMPLERS = {"the trainer": {}, "logits in steps of 1": rounded(1.0), "logits in steps of 4": rounded(4.0),
            "weights 8 steps old": stale(8)}


def mismatch(*seeds):
    """RL of the tiny model after SFT by samplers that differ from the trainer; a line a run, then its rewards, step by step."""
    short = ["--steps", 3, "--max-new-tokens", 8, "--prompts", 2, "--group-size", 2] if SMALL else []
    dirl.MAX_LOGP_GAP = float("inf")           # it would end these runs, and rightly
    if SMALL:                                  # after three steps of SFT no answer is right
        alternating = itertools.cycle((0.0, 1.0))
        dirl.arithmetic_reward, dirl.HELD_OUT = lambda answer, truth: next(alternating), 4
    print("                                         ------- mean reward -------  accuracy  mean       --importance's weights\n"
          "sampler               --importance seed  first 5    all  last 10      at end  logp_gap    mean  at cap  eff. share")
    for seed in map(int, seeds or ((0,) if SMALL else (0, 1, 2))):
        with tempfile.TemporaryDirectory() as folder:
            last_line("--stage", "sft", "--seed", seed, "--out", folder, *short)
            for name, C in [("the trainer", None), *itertools.product(list(SAMPLERS)[1:], (None, 3))]:
                mismatch_run(folder, seed, name, C, short or ["--steps", 40])


def mismatch_run(folder, seed, name, C, short):
    out, before = os.path.join(folder, f"{name} {C}"), {x: getattr(dirl, x) for x in SAMPLERS[name]}
    vars(dirl).update(SAMPLERS[name])
    last_line("--seed", seed, "--model", os.path.join(folder, "sft"), "--out", out, *short, *["--importance", C] * bool(C))
    vars(dirl).update(before)
    with open(os.path.join(out, "rl.metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rewards, accuracy = [line["reward"] for line in lines if "reward" in line], lines[-1]["accuracy"]

    def mean(column):
        values = [line[column] for line in lines if line.get(column) is not None]
        return statistics.mean(values) if values else float("nan")
    weights = "  {:6.3f} {:7.3f} {:11.3f}".format(*map(mean, ("importance", "importance_capped", "importance_ess")))
    print(f"{name:21} {C or '-':12} {seed:4} {statistics.mean(rewards[:5]):8.3f} {statistics.mean(rewards):6.3f} "
          f"{statistics.mean(rewards[-10:]):8.3f} {accuracy:11.3f} {mean('logp_gap'):9.3f}{weights if C else ''}")
    print("    rewards " + " ".join(f"{reward:.3f}" for reward in rewards))


# ---- --memory: a training step in fake tensors -----------------------------------------------------------------------

# 4B and 8B: training/model/SDAR-*-Chat/config.json of github.com/JetAstra/SDAR, c2041a8. None ties its embeddings.
SIZES = {"1.7B": SDAR, "tiny": {},
         "4B": SDAR | dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
         "8B": SDAR | dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32)}
CARD, DENSE_BF16, UTILISATION = 80e9, 989e12, 0.6          # bytes; FLOP/s of an H100 or H200; a guess
LONGEST = 8192 + 8192 + B * 8192                           # --recipe paper: prompt, answer, a view for every token
KINDS = {"weights": ("sharded_param",), "reference": ("inp",), "gathered": ("unsharded_param",), "moments": ("opt",),
         "gradients": ("sharded_grad", "unsharded_grad"), "activations": ("act", "buffer"),
         "temporary": ("temp", "all_gather", "reduce_scatter")}                             # the tracker's kinds


class KeepsWhatFlexKeeps(torch.autograd.Function):
    """FlexAttention's memory: it saves q, k, v, its output and a log-sum-exp a query and head, never the scores."""
    @staticmethod
    def forward(context, q, k, v):
        out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        context.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(context, gradient):
        return tuple(torch.empty_like(x) for x in context.saved_tensors[:3])


def simulated(size, gpus, N, R, beta, compute=torch.bfloat16, checkpointing=True, count=False):
    """dirl.train_on in fake tensors, which have a shape and no content: of one rank of `gpus`, in nodes of 8, on two
    rows of N tokens, R of them read. Returns bytes by kind at the peak, and `kept`, of the activations that await a
    backward; matrix FLOPs of a row, if they are to be counted; weights. What is not as in a run of dirl:
      - the process group is torch's fake one; the mesh is made beforehand, since that asks tensors for values
      - Module.to does nothing: fake weights are float32 on their device from the start
      - model.base is the root's own forward, which the tracker wants, ending with the hidden states
      - attention is KeepsWhatFlexKeeps; the mask is left out, tiles of some megabytes
      - what the host asks a tensor for, it is told: decoding steps (each read is one), norm, metrics
      - rows hold zeros and come from no trajectories
      - DTensor tries an operation on whole tensors to learn shapes: the tracker, which would count them, is off"""
    import transformers
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import _disable_current_modes
    from torch.utils.flop_counter import FlopCounterMode
    with tempfile.TemporaryDirectory() as folder:
        dirl.build_tiny(folder, B, 0)
        config = dirl.read_json(os.path.join(folder, "config.json")) | SIZES[size]
    node, c = min(gpus, 8), flags("--beta", beta, "--objective", "eq7" if beta else "eq8")
    os.environ |= {"WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": str(node), "RANK": "0"}
    torch.distributed.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    mesh = dirl.init_device_mesh("cpu", (gpus // node, node), mesh_dim_names=("replicate", "shard"))
    mesh["shard"]                                          # cut now: it asks for values too
    own_score, own_shapes, kept = dirl.Policy.score, ShardingPropagator._propagate_tensor_meta_non_cached, []

    def attention(module, query, key, value, mask, scaling, **unused):
        return KeepsWhatFlexKeeps.apply(query.to(value.dtype), key.to(value.dtype), value).transpose(1, 2), None

    def score(policy, row):
        if policy is trained:
            tracker.reset_mod_stats()                      # it expects one forward of the root
        result = own_score(policy, row)
        kept.append(tracked("current")["act"])
        return result

    def shapes(*args):
        with _disable_current_modes():
            return own_shapes(*args)

    def tracked(when):
        snapshot = tracker.get_tracker_snapshot(when)[torch.device("cpu")]
        return {kind.name.lower(): size for kind, size in snapshot.items() if kind != "Total"}

    def policy():
        model = transformers.Qwen3ForCausalLM(dirl.qwen3_config(config))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        dirl.shard(model, compute).base = model.__call__
        return dirl.Policy(model.train(), None, "", config, 0, [0], 1.0)
    transformers.Qwen3ForCausalLM.forward = lambda self, **inputs: self.model(**inputs)
    torch.nn.Module.to = lambda self, *args, **more: self
    FakeTensor.__int__ = lambda self: R - 1                # Eq. 8's last decoding step
    ShardingPropagator._propagate_tensor_meta_non_cached = shapes
    told = argparse.Namespace(item=lambda: 1.0, tolist=lambda: [1.0] * 6)
    vars(dirl).update(init_device_mesh=lambda *args, **more: mesh, attention=attention, full=lambda norm: told,
                      all_sum=lambda sums: told, mask_mod=lambda *columns: lambda *pair: torch.zeros(1),
                      dipo_rows=lambda *args: (rows, 2 * N))
    dirl.Policy.score = score
    mixed = [argparse.Namespace(trajectories=[argparse.Namespace(output=range(2 * R))])]
    with FakeTensorMode():
        integers = {"ids": N, "pos": N, "view": N, "doc": N, "reads": R, "target": R}
        rows = [{name: torch.zeros(n, dtype=torch.long) for name, n in integers.items()}
                | {name: torch.zeros(R) for name in ("A", "w", "logp_sampler")} for _ in range(2)]
        trained, reference = policy(), policy() if beta else None
        optimizer = dirl.make_optimizer(trained, c)
        tracker = FSDPMemTracker(trained.model, optimizer)
        if beta:
            tracker.track_inputs(tuple(reference.model.parameters()))
        with tracker:
            dirl.train_on(trained, reference, optimizer, c, mixed, 1)
        with FlopCounterMode(display=False) as flops:      # not in the tracker: it would keep tensors alive
            if count:
                dirl.train_on(trained, reference, optimizer, c, mixed, 2)
    n = sum(weight.numel() for weight in trained.model.parameters())
    return tracked("peak") | {"kept": max(kept)}, flops.get_total_flops() // 2, n


def visible_pairs(P, L, views, fill=0):
    """Pairs (query, key) of a trajectory with so many views a block and of what fills its row."""
    whole, prompt, rest = (S * (S + B) // 2 for S in (P + L, P, fill))
    return whole + views * (whole - prompt) + rest


def memory_case(size, gpus, N, R, beta):
    """A line of the table, in GB of 10^9 bytes."""
    N, beta = int(N), float(beta)
    peak, _, n = simulated(size, int(gpus), N, int(R), beta)
    parts = {name: sum(peak[kind] for kind in kinds) / 1e9 for name, kinds in KINDS.items()}
    total, engine = sum(parts.values()), 2 * n / 1e9       # LMDeploy's weights are bfloat16 and whole
    free = CARD / 1e9 - parts["weights"] - parts["reference"] - engine     # as it starts: before moments and gradients
    left = CARD / 1e9 - total - engine - 0.4 * free, CARD / 1e9 - total, 0.3 * free - parts["moments"]
    print(f"{size:5}{gpus:>4}{N:8,}{'yes' if beta else 'no':>5}"
          + "".join(f"{x:12.1f}" for x in (*parts.values(), total))
          + " |" + "".join(f"{x:9.1f}" for x in (engine, 0.4 * free, *left)))


def memory_flops(size):
    """Training in Fig. 6's set-up, 4 trajectories a GPU of 1024 + 8192 tokens, each a row. The simulated row's FLOPs
    are scaled in two parts, layers by tokens and vocabulary projection by reads; attention's come by formula: 4 a pair
    and channel forward, as many recomputed, 2.5 times that backward."""
    config, N, R = SIZES[size], 16384, 8192
    read = 4 * 2 * config["vocab_size"] * config["hidden_size"]            # forward, recomputed, two gradients
    token = (simulated(size, 8, N, R, 0, count=True)[1] - read * R) / N
    pair = 4.5 * 4 * config["num_attention_heads"] * config["head_dim"] * config["num_hidden_layers"]
    for views in (2, 4):
        tokens = 1024 + 8192 + views * 8192
        power = 1 << (tokens - 1).bit_length()
        before = power * 3 // 4 if tokens <= power * 3 // 4 else power
        for padding, N in (("none", tokens), ("before", before), ("now", dirl.row_length(tokens, 16384))):
            parts = [4 * x for x in (token * N, read * 8192, pair * visible_pairs(1024, 8192, views, N - tokens))]
            print(f"{B // views} a step, padding {padding:6}: rows of {N:6,}; PFLOP: layers {parts[0] / 1e15:5.2f}, "
                  f"vocabulary {parts[1] / 1e15:.2f}, attention {parts[2] / 1e15:.2f}; "
                  f"{sum(parts) / DENSE_BF16 / UTILISATION:5.1f} s")


def memory_table():
    if SMALL:                                              # in float32 without checkpointing, as a real run on this CPU
        peak, flops, n = simulated("tiny", 1, 512, 128, 0, torch.float32, False, True)
        return print(json.dumps(peak | {"flops": flops, "weights": n}))
    start = time.perf_counter()

    def finished(case):
        command = [sys.executable, __file__, "--part", *map(str, case)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        return done.stdout or f"{case}: {done.stderr[-300:]}\n"
    print("Peak of a training step, GB a GPU, simulated (gathered: whole parameters). On the right, by formula:\n"
          "LMDeploy's weights, its cache at --engine-memory 0.4, what 80 GB have left at the peak, LMDeploy awake or\n"
          "asleep, and in roll-outs with --sleep and 0.7. CUDA, NCCL, graphs and fragments are not in it.\n")
    print("model GPUs    row beta" + "".join(f"{name:>12}" for name in (*KINDS, "total"))
          + " |" + "".join(f"{name:>9}" for name in ("LMDeploy", "cache", "awake", "asleep", "roll-out")))
    cases = [("memory_case", *case[:2], *case[2], case[3]) for case in itertools.product(
        ("1.7B", "4B", "8B"), (1, 4, 8, 64), ((16384, 8192), (LONGEST, 8192)), (0, 0.1))]
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for line in pool.map(finished, cases):
            print(line, end="")
        print(f"\nTraining of SDAR-8B in Fig. 6's set-up: matrix FLOPs at {UTILISATION:.0%} of {DENSE_BF16 / 1e12:.0f} "
              "TFLOP/s, a bound and not\na measurement; the paper reports 167 s. Tokens decoded a step:")
        print(finished(("memory_flops", "8B")), end="")
    print(f"all in {time.perf_counter() - start:.0f} s")


# ---- --gpu: what one 80 GB GPU must tell -----------------------------------------------------------------------------


def versions():
    """The card, its compiler and the packages."""
    print(NAME, f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}" if CUDA else "")
    for name in ("torch", "triton", "transformers", "lmdeploy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            print(f"{name} {metadata.version(name)}", end=", ")
    from triton import knobs
    print(f"ptxas {knobs.nvidia.ptxas.version} of {knobs.nvidia.ptxas.path}")


def attention():
    """dirl.attention under the mask of a packed row against a softmax written out in float64: out, and the gradients of
    q, k, v. In bfloat16 as in training; in float32 a single wrong pair shows."""
    N, heads, share = (4608, 16, 1) if FULL else (640, 4, 8)
    g, documents = torch.Generator().manual_seed(0), []
    for P, L, per_step in ((1000, 500, 2), (300, 200, 1), (130, 46, 2), (41, 55, 1)):
        documents.append(dirl.trajectory_document(*random_trajectory(g, P // share, L // share, per_step), B, 999))
    row = dirl.join(documents, length=N)
    row, i = {name: x.to(DEVICE) for name, x in row.items()}, torch.arange(N, device=DEVICE)
    sees = dirl.mask_mod(row["doc"], row["view"], row["pos"] // B)
    dense = sees(0, 0, i[:, None], i)
    mask = dirl.block_mask(sees, N, DEVICE) if CUDA else dense[None, None]             # as Policy.score has it
    kind = "FlexAttention" if CUDA else "SDPA"
    print(f"{kind} against float64, {N} tokens, {heads} heads, {heads // 2} of keys: relative errors")
    wrong = []
    for dtype, D in itertools.product((torch.bfloat16, torch.float32), (32, 64, 128)):
        shapes = [(1, N, h, D) for h in (heads, heads // 2, heads // 2)]
        q, k, v = (torch.randn(s, generator=g).to(DEVICE, dtype).transpose(1, 2).requires_grad_() for s in shapes)
        d_out = torch.randn(shapes[0], generator=g).to(DEVICE, dtype)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        try:
            out, _ = dirl.attention(None, q, k, v, mask, D**-0.5)
            got = [out, *torch.autograd.grad(out, (q, k, v), d_out)]
        except Exception as error:
            wrong.append(f"{dtype}, D = {D}: {' '.join(str(error).split())[:300]}")
            print(wrong[-1])
            continue
        keys, values = (x.repeat_interleave(2, 1) for x in exact[1:])
        scores = (exact[0] @ keys.mT * D**-0.5).masked_fill(~dense, -torch.inf)
        out = (scores.softmax(-1) @ values).transpose(1, 2)
        pairs = list(zip(got, [out, *torch.autograd.grad(out, exact, d_out.double())]))
        errors = [float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in pairs]
        good = max(errors) < (1e-2 if dtype == torch.bfloat16 else 1e-4)
        wrong += [] if good else [f"{dtype}, D = {D}"]
        print(f"{str(dtype)[6:]:8} D = {D:3}: out {{:.1e}}, dq {{:.1e}}, dk {{:.1e}}, dv {{:.1e}}  {{}}".format(
            *errors, "ok" if good else "WRONG"))
    sys.exit(bool(wrong))


def layouts(model):
    """--bench at the paper's and Table 1's lengths, in one process, which on a GPU can set its peak memory back."""
    policy, cases = bench_policy(model), itertools.product(("paper", "Table 1"), (1, 2))
    bench_table(cases, ("authors", "ours"), lambda *case: bench_one(policy, *case, 1))


def rl(model):
    """Three steps of DiPO with LMDeploy: seconds and peak memory of each phase. Rewards alternate, so that all groups are
    mixed."""
    sizes = dict(prompts=4, group_size=8, max_new_tokens=256) if FULL else dict(prompts=2, group_size=2, max_new_tokens=8)
    c = flags("--model", model, "--engine", "torch", "--max-length", 384, "--slots", 64, "--engine-memory", 0.3)
    c, peaks, alternating = changed(c, **sizes, steps=3, out=model, save_every=10**6), {}, itertools.cycle((0.0, 1.0))

    def with_peak(phase, function):
        def call(*args, **more):
            memory(reset=True)
            result = function(*args, **more)
            peaks[phase] = memory() / 1e9
            return result
        return call
    dirl.start_ranks()
    policy = dirl.load_policy(model, c)
    engine = lmdeploy_engine(policy, c)
    dirl.roll_out, dirl.train_on = with_peak("rollout", dirl.roll_out), with_peak("training", dirl.train_on)
    engine.update_weights = with_peak("weights", engine.update_weights)
    dirl.save = lambda *args: None
    dirl.write_lines = lambda c, name, lines: [print_step(line, peaks) for line in lines]
    walk = dirl.Walk(policy, c, "the built-in task", dirl.built_in("rl", 0))
    dirl.train_rl(policy, None, engine, c, walk, lambda *_: next(alternating), [])
    engine.close()


def print_step(line, peaks):
    print(f"step {line['step']}: {line['seconds']:.2f} s, {line['forward_tokens']:,} forward tokens, logp_gap "
          f"{line['logp_gap']:.1e}, gradient norm {line['grad_norm']:.2g}")
    phases = (f"{phase} {line['seconds_' + phase]:.2f} s ({peaks[phase]:.1f} GB)" for phase in ("rollout", "training", "weights"))
    print("    " + ", ".join(phases))


def gpu():
    """Every part in a process of its own with a time limit: one that fails or hangs costs no other its result."""
    start, failed = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.join(folder, "model")
        parts = (("versions", 60), ("attention", 120), ("random_model", 60, model, "1.7B" if FULL else "tiny"),
                 ("layouts", 170, model), ("rollouts", 150, model), ("rl", 120, model))
        for name, seconds, *args in parts:
            begun = time.perf_counter()
            print(f"==== {name}")
            if not part(name, *args, seconds=max(1, min(seconds, 535 + start - begun))):
                failed.append(name)
            print(f"==== {name}: {'failed' if name in failed else 'done'} after {time.perf_counter() - begun:.0f} s\n")
    print(f"all in {time.perf_counter() - start:.0f} s; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    for function in (bench, rollouts, one_step, mismatch, memory_table, gpu):
        name = function.__name__
        option = {"memory_table": "memory"}.get(name, name.replace("_", "-"))
        choice.add_argument("--" + option, action="store_const", const=[name], dest="part")
    choice.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true")
    name, *args = parser.parse_args().part
    globals()[name](*args)
