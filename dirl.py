# SPDX-License-Identifier: MIT
"""DiRL (arXiv 2512.22234) in one file: post-training of block diffusion language models, SFT, then RL (DiPO).

    torchrun dirl.py --stage rl                                               a tiny model: SFT, then DiPO
    torchrun dirl.py --stage sft --model MODEL --data chats.jsonl             SFT of an SDAR checkpoint
    torchrun dirl.py --stage rl --model runs/NAME/sft --data problems.jsonl   DiPO from there
    torchrun dirl.py --stage eval --model runs/NAME/rl --data test.jsonl      the columns of Table 1
    python dirl.py --stage show --model runs/NAME/rl                          one answer, step by step
    python dirl.py --help                                                     the flags, the paper's values

The paper stands above the cut line, in the order of its equations, as functions on plain tensors that import
only torch. The machinery stands below it; rollouts run on stock LMDeploy or on this file's own sampler.

    Eq. 1-2, Fig. 4b   who sees whom, what one forward holds        mask_mod, layout, join
    Eq. 2              log π_θ, the one definition of the policy    log_policy, log_probs
    Eq. 3              noising of a block; the SFT loss             noised_document, sft_loss
    Eq. 4-5            advantage, C_ε, the KL term                  advantage, C_eps, kl_k3
    section 3.2        what the model saw at every decoding step    trajectory_document
    Eq. 6, 7, 8        DiPO                                         trajectory_weights, eq6, eq7, eq8
    section 5.1        static, dynamic, sequential decoding         draw, unmask

Symbols. B block size; k block; t ∈ [0, 1] noise time; s decoding step within a block, from 1 (the paper's
other t); P prompt length; L output length; S = P + L; V views of a document; N tokens of a packed row; R
those of them that a loss reads; G group size; τ a trajectory, |τ| its decoding steps; `threshold` the
confidence threshold of section 5.1 (the paper's other τ); sg[·] stops the gradient: `.detach()`.

Departures: where the paper is silent or contradicts itself, this file chooses.
  - One forward scores a whole trajectory: its clean copy stands once, and each state of a block on the way is
    B more tokens (a view), where Fig. 4b repeats the whole sequence. Same log-probabilities, fewer tokens.
  - w(t) of Eq. 3 is 1/t, the ELBO weight of the linear schedule; t ≥ 1e-3; one t a block, as Eq. 3 is
    written. The sum is divided by the answer tokens of the whole batch.
  - |τ| counts decoding steps, as printed in Eq. 6-8; the authors' code counts tokens (--count tokens). Each
    objective is a mean over the groups of the batch; Eq. 6 has no 1/G, as printed.
  - The advantage is r - mean, as in the equations; section 3.2's words say "normalized" (--adv-std).
  - A position's confidence is its top-1 probability, the paper's words. Engines and the authors' code take
    that of the token drawn there (--confidence drawn): then the objective's gradient is biased.
  - The clip is symmetric, as printed (the authors' code adds 0.08 above: --eps-high 0.28).
  - KL is estimated by k3 times π_θ/sg[π_θ]: its expected gradient is that of KL(π_θ‖π_ref), the printed one;
    the gradient of plain k3 is that of KL(π_ref‖π_θ).
  - [MASK] is never sampled and has probability 0 in the score; the temperature applies to both; there is no
    top-k and no top-p. Both engines draw and commit by the functions of section 5.1 below.
  - The tokens after the stop token in the last block belong to the trajectory: the model drew them.
  - A step with fewer mixed groups than --prompts after --max-attempts rounds trains on those it has. Groups
    of equal rewards are dropped under Eq. 6 and 7 too, and their KL term with them.
"""
import torch
from torch.nn.attention.flex_attention import BlockMask

# ---- Eq. 1-2, Fig. 4b: one forward, and who sees whom in it ------------------------------------------------


def mask_mod(doc, copy, block):
    """Fig. 4b as a FlexAttention mask_mod: one rule for SFT, scoring and decoding.

    doc, copy, block: [N] integers for the tokens of a row: its document; 0 for the clean copy, or the number
    v ≥ 1 of its view; the block index k. Eq. 1 conditions on b^{<k}, the earlier clean blocks, and Eq. 2 on
    b_t^k, the token's own copy of its block."""
    def sees(batch, head, q, kv):
        same_document = doc[q] == doc[kv]
        own_copy_of_block = (copy[q] == copy[kv]) & (block[q] == block[kv])
        earlier_clean_block = (copy[kv] == 0) & (block[kv] < block[q])
        return same_document & (own_copy_of_block | earlier_clean_block)
    return sees


def strips(sees, N, device, tile=128):
    """The mask_mod of one row for scaled_dot_product_attention, where FlexAttention has no backward: for each
    `tile` queries, the keys that any of them sees [K], and which of them sees which [tile, K]."""
    i = torch.arange(N, device=device)
    masks = (sees(0, 0, q[:, None], i) for q in i.split(tile))
    return [(kv := mask.any(0).nonzero()[:, 0], mask[:, kv]) for mask in masks]


def block_mask(sees, N, device, tile=128):
    """The mask_mod of one row as a BlockMask; N is a multiple of `tile`. Made from strips of `tile` queries
    against all keys, so that its memory is tile · N and never N · N."""
    kv = torch.arange(N, device=device)
    counts = [sees(0, 0, q[:, None], kv).view(tile, -1, tile).sum((0, 2)) for q in kv.split(tile)]
    visible = torch.stack(counts)                                # [N/tile, N/tile] visible pairs in each tile
    full = visible == tile * tile
    partial = (visible > 0) & ~full

    def ordered(tiles):                    # FlexAttention wants how many a strip has, and their indices first
        return tiles.sum(1, dtype=torch.int32), tiles.int().argsort(dim=1, descending=True, stable=True).int()
    tiles = [x[None, None] for x in (*ordered(partial), *ordered(full))]
    return BlockMask.from_kv_blocks(*tiles, BLOCK_SIZE=tile, mask_mod=sees)


def layout(clean, blocks, views, B):
    """Fig. 4b's input, one document: the clean copy of a sequence, then views: blocks as they once stood.

    clean: [S] tokens, S a multiple of B; blocks: [V] block index of each view; views: [V, B] its tokens.
    Returns ids, pos, copy: [S + V·B]. A view has the position ids of its block, so that block = pos // B
    everywhere."""
    S, V = len(clean), len(blocks)
    inside = torch.arange(B)
    return {"ids": torch.cat([clean, views.flatten()]),
            "pos": torch.cat([torch.arange(S), (blocks[:, None] * B + inside).flatten()]),
            "copy": torch.cat([torch.zeros_like(clean), torch.arange(1, V + 1).repeat_interleave(B)])}


def join(documents, length=None):
    """Documents → one row of `length` tokens (None: as many as there are); padding is one more document.

    Adds doc: [N]; makes view numbers unique and `reads`, where a loss reads, indices into the row; all else,
    one value a token or one a read, is concatenated as it is."""
    parts, tokens, views = [], 0, 0
    for i, d in enumerate(documents):
        parts.append({**d, "doc": torch.full_like(d["ids"], i), "reads": d["reads"] + tokens,
                      "copy": torch.where(d["copy"] > 0, d["copy"] + views, 0)})
        tokens += len(d["ids"])
        views += int(d["copy"].max())
    pad = torch.zeros((length or tokens) - tokens, dtype=torch.long)
    parts.append({"ids": pad, "pos": torch.arange(len(pad)), "copy": pad, "doc": pad - 1})
    return {name: torch.cat([p[name] for p in parts if name in p]) for name in parts[0]}


# ---- Eq. 2: the policy, and its log-probabilities where a loss reads them ----------------------------------


def log_policy(logits, temperature, mask_id):
    """Eq. 2: log π_θ(· | b_t^k, b^{<k}), [..., vocab], at least float32. The one definition of the policy,
    for sampler and scorer alike: temperature, and [MASK] (mask_id) forbidden."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    forbidden = torch.tensor([mask_id], device=logits.device)
    return logits.index_fill(-1, forbidden, -torch.inf).log_softmax(-1)


def log_probs(hidden, weight, target, temperature, mask_id, chunk=512):
    """Eq. 2, read where a loss needs it: log π_θ(target_r | …) [R] and the entropy of π_θ there [R], nats.

    hidden: [R, d]; weight: [vocab, d], the vocabulary projection; target: [R]. At most chunk · vocab logits
    exist at a time, in the backward too, which computes them again. The entropy carries no gradient."""
    def one(hidden, target):
        log_pi = log_policy(hidden @ weight.T, temperature, mask_id)                    # [chunk, vocab]
        return log_pi.gather(1, target[:, None])[:, 0], torch.special.entr(log_pi.detach().exp()).sum(1)
    parts = [torch.utils.checkpoint.checkpoint(one, h, y, use_reentrant=False, preserve_rng_state=False)
             for h, y in zip(hidden.split(chunk), target.split(chunk))]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


# ---- Eq. 3: SFT --------------------------------------------------------------------------------------------


def noised_document(tokens, P, u, z, B, mask_id):
    """Eq. 3's forward process on one example: each answer token is masked with probability t = 1 - α_t.

    tokens: [S] prompt and answer, S a multiple of B; P: prompt length; u: [K'] uniform, one a block from the
    block P // B on; z: [K', B] uniform, one a token. Prompt tokens in the first of these blocks stay clean
    and carry no loss. A block without a masked token has no loss and gets no view. A position predicts
    itself: nothing is shifted."""
    first = P // B
    t = 1e-3 + (1 - 1e-3) * u                                                           # [K'] noise time
    blocks = torch.arange(first, len(tokens) // B)                                      # [K'] block index k
    clean = tokens.view(-1, B)[first:]                                                  # [K', B] b_0^k
    is_answer = blocks[:, None] * B + torch.arange(B) >= P
    masked = (z < t[:, None]) & is_answer                                           # [K', B] (b_t^k)_j = MASK
    used = masked.any(1)
    document = layout(tokens, blocks[used], torch.where(masked, mask_id, clean)[used], B)
    document["reads"] = len(tokens) + masked[used].flatten().nonzero()[:, 0]             # [R]
    document["target"] = clean[masked]                                                  # [R] (b_0^k)_j
    document["weight"] = (1 / t)[:, None].expand_as(masked)[masked]                     # [R] w(t) = 1/t
    return document


def sft_loss(logp, weight, answer_tokens):
    """Eq. 3: L = Σ_k w(t) Σ_j 1[(b_t^k)_j = MASK] CE(p_θ(· | b_t^k, b^{<k}), (b_0^k)_j), per answer token.

    logp, weight: [R], log p_θ and w(t) of the masked tokens; answer_tokens: the batch's, masked or not."""
    return -(weight * logp).sum() / answer_tokens


# ---- Eq. 4-5: GRPO's parts ---------------------------------------------------------------------------------


def advantage(rewards, divide_by_std=False):
    """Section 2.2: A_i = r_i - (1/G) Σ_j r_j, [groups, G]; section 3.2's "normalized" also divides by the
    group's standard deviation (the population's; a group of equal rewards has A = 0)."""
    A = rewards - rewards.mean(1, keepdim=True)
    return A / A.square().mean(1, keepdim=True).sqrt().clamp_min(1e-8) if divide_by_std else A


def C_eps(ratio, A, eps, eps_high):
    """Eq. 5-8: C_ε(ρ, A) = min(ρ A, clip(ρ, 1-ε, 1+ε) A), elementwise; eps_high: the ε of the upper side."""
    return torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps_high) * A)


def kl_k3(logp, logp_ref):
    """Eq. 5-7: KL[π_θ‖π_ref] of tokens from π_θ, each: π_θ/sg[π_θ] (π_ref/π_θ - 1 - log(π_ref/π_θ)).

    The bracket is k3. The factor before it is 1, and makes the expected gradient that of KL(π_θ‖π_ref)."""
    log_ratio = logp_ref - logp
    return (logp - logp.detach()).exp() * (log_ratio.exp() - 1 - log_ratio)


# ---- section 3.2: a trajectory and what the model saw ------------------------------------------------------


def trajectory_document(prompt, output, steps, B, mask_id):
    """Section 3.2: a trajectory τ, one document; as a block stood before its step s, τ(1:s-1), it is a view.

    prompt: [P]; output: [L], whole blocks to the end; steps: [L], the step map, the step within its block
    (from 1) at which each output token was committed. The view (k, s) shows the prompt's tokens and those
    committed before s, and [MASK] elsewhere. reads: [L], in the order of the output: where each
    log π_θ(o | τ(1:s-1)) is read. The document has P + L + B Σ_k steps_k tokens. In brackets below: the
    README's example, P P a b c d with steps 1 1 1 2 and B = 2."""
    P, S = len(prompt), len(prompt) + len(output)
    tokens = torch.cat([prompt, output])                                                # [S]
    step = torch.cat([torch.zeros_like(prompt), steps]).view(-1, B)          # [K, B] (0 0 | 1 1 | 1 2)
    count = step.max(1).values                                               # [K] steps_k (0 1 2)
    first = count.cumsum(0) - count                                          # [K] views before it (0 0 1)
    blocks = torch.arange(S // B).repeat_interleave(count)                   # [V] block of each view (1 2 2)
    s = torch.arange(len(blocks)) - first[blocks] + 1                        # [V] its decoding step (1 1 2)
    views = torch.where(step[blocks] < s[:, None], tokens.view(-1, B)[blocks], mask_id)  # [V, B]
    document = layout(tokens, blocks, views, B)
    p = torch.arange(P, S)                                                              # [L] positions of o
    document["reads"] = S + (first[p // B] + steps - 1) * B + p % B          # (6 7 8 11)
    document["target"] = output
    return document


# ---- Eq. 6, 7, 8: DiPO -------------------------------------------------------------------------------------


def trajectory_weights(size, objective):
    """The normaliser of each trajectory [groups, G], from |τ| [groups, G] of the whole batch: a mean over
    the groups of Eq. 6's 1/|τ_i|, or Eq. 7 and 8's 1/Σ_j |τ_j| with j over the same group."""
    return 1 / (size if objective == "eq6" else size.sum(1, keepdim=True).expand_as(size)) / len(size)


def eq6(logp, logp_old, A, w, eps, eps_high):
    """Eq. 6: J = Σ_i 1/|τ_i| Σ_t Σ_{o_k ∈ τ_i(t)} C_ε(π_θ(o_k | τ_i(1:t-1)) / π_old(o_k | τ_i(1:t-1)), A_i).

    All [R], one a committed token; logp_old the sampler's; w = 1/|τ_i|. Returns J and where the clip acts."""
    ratio = (logp - logp_old).exp()
    objective = C_eps(ratio, A, eps, eps_high)
    return (w * objective).sum(), objective < ratio * A


def eq7(logp, logp_old, A, w, eps, eps_high):
    """Eq. 7: J = 1/Σ_i |τ_i| Σ_i Σ_t Σ_{o_k ∈ τ_i(t)} C_ε(π_θ(o_k | τ_i(1:t-1)) / sg[the same], A_i).

    As Eq. 6, with w = 1/Σ_i |τ_i|; logp_old: None for sg[π_θ], or π_θ before the first of several updates."""
    ratio = (logp - (logp.detach() if logp_old is None else logp_old)).exp()
    objective = C_eps(ratio, A, eps, eps_high)
    return (w * objective).sum(), objective < ratio * A


def eq8(logp, logp_old, A, w, eps, eps_high, view):
    """Eq. 8: J = 1/Σ_i |τ_i| Σ_i Σ_t C_ε(π_θ(τ_i(t) | τ_i(1:t-1)) / sg[π_θ(τ_i(t) | τ_i(1:t-1))], A_i).

    As Eq. 7, but the ratio is that of a step's tokens together. view: [R], the number of the token's view in
    the row, from 0 (`join` counts on from document to document): one view, one step, one A and w."""
    log_ratio = logp - (logp.detach() if logp_old is None else logp_old)
    T = int(view.max()) + 1 if len(view) else 0                                    # decoding steps in the row
    ratio = logp.new_zeros(T).index_add(0, view, log_ratio).exp()                 # [T] of joint probabilities
    A, w = (x.new_zeros(T).index_copy(0, view, x) for x in (A, w))            # [T] the same all over a view
    objective = C_eps(ratio, A, eps, eps_high)
    return (w * objective).sum(), objective < ratio * A


# ---- section 5.1: decoding ---------------------------------------------------------------------------------


def draw(log_pi, u):
    """Section 5.1: a token a position from π, its distribution function inverted at u; none with π = 0.

    log_pi: [..., vocab]; u: [...] float64 in [0, 1)."""
    cdf = log_pi.double().exp().cumsum(-1)
    # right: past tokens of π = 0; u ≤ 1 - 2^-53 keeps it below the last value, which rounding leaves near 1
    return torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)[..., 0]


def unmask(log_pi, token, masked, rule, tokens_per_step, threshold, confidence):
    """Section 5.1: which masked positions of a block are committed at this step, bool [n, B].

    log_pi: [n, B, vocab]; token: [n, B], drawn there; masked: [n, B]. static: the tokens_per_step most
    confident; sequential: the leftmost ones; dynamic: all of at least `threshold`, and always the most
    confident one. Confidence is a position's top-1 probability ("top1"), which no draw can change, or the
    drawn token's ("drawn")."""
    top1, drawn = log_pi.max(-1).values, log_pi.gather(-1, token[..., None])[..., 0]    # [n, B]
    score = (top1 if confidence == "top1" else drawn).exp()
    if rule == "sequential":
        score = -torch.arange(masked.shape[1], device=masked.device).expand_as(masked).float()
    score = score.masked_fill(~masked, -torch.inf)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)   # [n, B] 0 the most confident
    chosen = (score >= threshold) | (rank == 0) if rule == "dynamic" else rank < tokens_per_step
    return masked & chosen


# ================================================ cut line ==================================================
# Above: the paper. Below: the machinery.
import argparse
import asyncio
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import wait
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

warnings.filterwarnings("ignore", "torch.distributed is disabled")     # one rank saves its state like many

# ---- 1. Configuration --------------------------------------------------------------------------------------


def flag(default, text, paper=None, choices=None, least=None):
    return field(default=default, metadata={"text": text, "paper": paper, "choices": choices, "least": least})


@dataclass
class Config:
    """The flags. None stands for a value that depends on the model and the stage: PRESETS."""
    stage: str = flag("rl", "sft; rl, which for the tiny model runs sft first; eval; show: one answer",
                      choices=("sft", "rl", "eval", "show"))
    model: str = flag("tiny", "tiny (built here), a folder in SDAR format, or a hub name", "SDAR-8B-Chat")
    data: str = flag(None, ".json or .jsonl: chats (sft), problems (others); else built-in arithmetic")
    out: str = flag(None, "folder of the run: metrics.jsonl, checkpoints; else under runs/")
    recipe: str = flag(None, "paper: its values for the flags not given", choices=("paper",))
    seed: int = flag(0, "of every random draw", least=0)
    steps: int = flag(None, "optimizer steps of sft, rollout steps of rl", "sft 100, rl 40", least=1)
    lr: float = flag(None, "peak learning rate of AdamW", "sft 1e-5, rl 1e-6", least=0)
    schedule: str = flag(None, "learning rate after warm-up", "sft cosine", ("constant", "cosine"))
    warmup: int = flag(None, "steps of linear warm-up", "10 (authors' code)", least=0)
    max_tokens: int = flag(None, "N: most tokens of a packed row; a longer document is its own row", least=1)
    max_length: int = flag(None, "most tokens of an sft example or rl prompt; else skipped", "8192", least=1)
    batch: int = flag(None, "sft: examples a step", "512", least=1)
    prompts: int = flag(None, "rl: prompts (groups) a step", "128", least=1)
    group_size: int = flag(None, "G: trajectories a prompt", "32", least=2)
    max_new_tokens: int = flag(None, "output tokens at which decoding stops", "8192", least=1)
    block_size: int = flag(None, "B: tokens a block, for a model that does not say", "4", least=1)
    unmask: str = flag("dynamic", "section 5.1: which tokens a decoding step commits", "dynamic",
                       ("static", "dynamic", "sequential"))
    tokens_per_step: int = flag(1, "static, sequential: tokens a step, a divisor of B", "1", least=1)
    threshold: float = flag(0.9, "dynamic: commit at this confidence and above", "0.9", least=0)
    confidence: str = flag("top1", "of a position: top-1 probability, or the drawn token's", "top1",
                           ("top1", "drawn"))
    temperature: float = flag(1.0, "of the policy, as sampled and as scored", "1.0", least=1e-3)
    slots: int = flag(None, "sequences decoded at once", least=1)
    engine: str = flag(None, "of rollouts; for a checkpoint on a GPU lmdeploy, else torch", "lmdeploy",
                       ("torch", "lmdeploy"))
    engine_memory: float = flag(0.4, "lmdeploy: share of the free GPU memory for its KV cache", least=0.01)
    max_logp_gap: float = flag(0.1, "stop where sampler and trainer differ by more, mean |Δ log π|", least=0)
    objective: str = flag("eq8", "DiPO: Eq. 6, 7 or 8", "eq8", ("eq6", "eq7", "eq8"))
    count: str = flag("steps", "|τ|: decoding steps, or output tokens", "steps", ("steps", "tokens"))
    eps: float = flag(0.2, "ε of C_ε", "0.2", least=0)
    eps_high: float = flag(None, "ε of C_ε above 1, where it differs", least=0)
    beta: float = flag(0.0, "β of the KL term of Eq. 6 and 7; loads a reference model", "0", least=0)
    adv_std: bool = flag(False, "divide the advantage by the group's standard deviation")
    updates: int = flag(1, "optimizer updates on each batch of rollouts", "1", least=1)
    max_attempts: int = flag(4, "dynamic sampling: rounds of rollouts to find mixed groups", least=1)
    reward: str = flag(None, "module:function(answer, truth) -> number, in place of the built-in check")
    held_out: int = flag(256, "problems kept for evaluation, of a file at most a tenth", least=0)
    eval_data: str = flag(None, "rl: problems for evaluation, in place of held-out ones of --data")
    eval_every: int = flag(None, "rl: evaluate every so many steps, besides before and after", least=1)
    thresholds: list = flag(None, "evaluate static, and dynamic at each of these (rl: besides its own; eval: "
                                  "else at --threshold)", "0.9; Fig. 8: 0.5 to 0.99", least=0)
    samples: int = flag(0, "evaluation: answers a problem, drawn as in rl (show: one); 0: greedy", least=0)
    prompt: str = flag(None, "show: what to ask; else the first problem of --data")
    hsdp: int = flag(None, "ranks that share one copy of the model (a node's); default all", least=1)
    save_every: int = flag(None, "steps between saves of what --resume needs", "10 (authors' code)", least=1)
    resume: bool = flag(False, "continue the stage in --out from its newest saved state")


# tiny: the built-in model; real: a checkpoint on one GPU, at the paper's learning rates; paper: its sizes.
PRESETS = {
    "tiny": dict(max_tokens=512, max_length=384, max_new_tokens=48, prompts=16, group_size=8, slots=256,
                 batch=24),
    "tiny sft": dict(steps=700, lr=3e-3, schedule="cosine", warmup=20, save_every=100),
    "tiny rl": dict(steps=60, lr=2e-4, schedule="constant", warmup=5, save_every=20),
    "real": dict(max_tokens=16384, max_length=2048, max_new_tokens=2048, prompts=8, group_size=8, slots=64,
                 batch=16, save_every=10),
    "real sft": dict(steps=100, lr=1e-5, schedule="cosine", warmup=10),
    "real rl": dict(steps=40, lr=1e-6, schedule="constant", warmup=10),
    "paper": dict(max_length=8192, max_new_tokens=8192, prompts=128, group_size=32, batch=512)}


def fail(message):
    """Bad input: one line, exit code 2. Until the ranks have met all have the same to say: one says it."""
    if dist.is_initialized() or int(os.environ.get("RANK", 0)) == 0:
        print(f"dirl.py: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_flags(argv=None):
    """Flags → namespace, with None for what was not given."""
    parser = argparse.ArgumentParser(prog="dirl.py", allow_abbrev=False, epilog="In brackets: the default.")
    parser.error = fail
    for f in fields(Config):
        name, meta = "--" + f.name.replace("_", "-"), f.metadata
        presets = [f"{kind} {values[f.name]}" for kind, values in PRESETS.items()
                   if f.name in values and "paper" not in kind]
        default = ", ".join(presets) or ("" if f.default is None or f.default is False else f.default)
        text = meta["text"] + f" [{default}]" * (default != "")
        text += f" (paper: {meta['paper']})" if meta["paper"] else ""
        typed = {bool: {"action": "store_true"}, list: {"type": float, "nargs": "+"}}.get(
            f.type, {"type": f.type, "choices": meta["choices"]})
        parser.add_argument(name, default=None, help=text, **typed)
    given = parser.parse_args(argv)
    for f in fields(Config):
        values, least = getattr(given, f.name), f.metadata["least"]
        for value in values if isinstance(values, list) else [values]:
            if least is not None and value is not None and not least <= value < math.inf:
                fail(f"--{f.name.replace('_', '-')} {value}: must be at least {least}")
    return given


def configure(given, stage):
    """The Config of a stage: what was given, else the recipe's value, else the model's."""
    kind = "tiny" if is_tiny(given.model) else "real"
    values = PRESETS[kind] | PRESETS.get(f"{kind} {stage}", {})
    if given.recipe:
        values |= PRESETS["paper"] | PRESETS.get(f"real {stage}", {})
    c = Config(**values | {name: v for name, v in vars(given).items() if v is not None} | {"stage": stage})
    if c.beta > 0 and c.objective == "eq8":
        fail("--beta above 0 with --objective eq8: Eq. 8 has no KL term; take eq6 or eq7, or drop --beta")
    c.engine = c.engine or ("lmdeploy" if lmdeploy_runs() and kind == "real" else "torch")
    if stage != "sft" and c.engine == "lmdeploy" and not lmdeploy_runs():
        fail("--engine lmdeploy: it needs a CUDA GPU and there is none; --engine torch runs anywhere")
    if c.eval_data and not c.data:
        fail("--eval-data without --data: one reward judges both")
    if c.eval_data and given.stage not in (None, "rl"):
        fail(f"--eval-data: it is for --stage rl; --stage {stage} reads --data")
    if stage == "eval" and not given.unmask:
        c.unmask, c.thresholds = "static", c.thresholds or [c.threshold]
    if stage in ("eval", "show") and c.prompt is None and not c.data and not c.held_out:
        fail("--held-out 0: nothing is left of the built-in task; or name a file with --data")
    if c.prompt is not None and c.prompt.encode("utf-8", "ignore").decode() != c.prompt:
        fail("--prompt: not UTF-8 text")
    if stage in ("eval", "show") and c.model == "tiny":
        fail(f"--stage {stage}: say which checkpoint with --model, such as runs/tiny-0/rl")
    if c.engine_memory > 0.95:
        fail(f"--engine-memory {c.engine_memory}: a share of the free memory, at most 0.95")
    if c.model == "tiny":
        c.block_size = c.block_size or 4
        check_block(c, c.block_size)
    return replace(c, eps_high=c.eps if c.eps_high is None else c.eps_high)


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def is_tiny(model):
    """Whether --model is the built-in model or a checkpoint of it."""
    if model in (None, "tiny"):
        return True
    try:
        return read_json(os.path.join(model, "config.json"))["hidden_size"] < 512
    except (OSError, ValueError, KeyError, TypeError):
        return False                                                   # what is wrong, read_config says


def check_block(c, B):
    if B % c.tokens_per_step:
        fail(f"--tokens-per-step {c.tokens_per_step}: must divide the block size {B}")


def lmdeploy_runs():
    return torch.cuda.is_available()


def seed_of(*key):
    """53 bits for a (seed, stage, step, prompt, sample): no draw hangs on global state."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 11


def generator(*key):
    return torch.Generator().manual_seed(seed_of(*key))


# ---- 2. Data and reward ------------------------------------------------------------------------------------

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def read_records(path, name="--data"):
    """A .json list or a .jsonl file → [(where it stands, record)]."""
    try:
        with open(path, encoding="utf-8") as file:
            if path.endswith(".jsonl"):
                records = [(f"{path} line {n}", json.loads(x)) for n, x in enumerate(file, 1) if x.strip()]
            else:
                records = [(f"{path} record {n}", x) for n, x in enumerate(json.load(file), 1)]
    except (OSError, ValueError, TypeError) as error:
        fail(f"{name} {path}: not a readable .json list or .jsonl file ({error})")
    for where, record in records:
        if not isinstance(record, dict):
            fail(f"{where}: expected an object, found {type(record).__name__}")
    return records or fail(f"{name} {path}: no records in it")


def read_problems(path, name="--data"):
    """RL data → [(question, truth)]; the field names are DiRL's, GSM8K's, MATH's or Big-Math's."""
    problems = []
    for where, r in read_records(path, name):
        question = r.get("question", r.get("problem"))
        answers = r.get("ground_truth_answer"), r.get("answer"), last_boxed(str(r.get("solution")))
        truth = next((answer for answer in answers if answer is not None), None)
        truth = str(truth).rsplit("####", 1)[-1].strip() if isinstance(truth, (str, int, float)) else ""
        if not isinstance(question, str) or not truth:
            fail(f"{where}: needs question or problem, and ground_truth_answer, answer, or a solution with "
                 "\\boxed{}")
        problems.append((question, truth))
    return problems


def read_chats(path):
    """SFT data → [messages], each cut after its last assistant message: that is the answer."""
    chats = []
    for where, r in read_records(path):
        try:
            messages = [{"role": str(m["role"]), "content": m["content"] + ""} for m in r["messages"]]
            last = max(i for i, m in enumerate(messages) if i and m["role"] == "assistant")
        except (KeyError, TypeError, ValueError):
            fail(f'{where}: needs "messages": [{{"role", "content"}}, ...], an assistant\'s after the first')
        chats.append(messages[:last + 1])
    return chats


def arithmetic(key, held_out=False):
    """Built-in task: a chain of + and - worked out one by one. Returns (question, demonstration, answer).

    Of eight demonstrations two are right, three stop before the last term and three undo it. SFT imitates
    all, RL finds out where to stop. A question's text says if it is held out, so the sets cannot meet."""
    g = generator("arithmetic", key)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=g))
    while True:
        totals = [integer(0, 10)]
        for _ in range(integer(3, 5)):
            step = integer(1, 3) * (-1) ** integer(0, 2)
            totals.append(totals[-1] + (step if 0 <= totals[-1] + step <= 9 else -step))
        question = str(totals[0]) + "".join(f"{b - a:+d}" for a, b in zip(totals, totals[1:]))
        question += "=" * integer(0, 2)
        shown = (totals[:-1], [*totals, totals[-2]], totals)[integer(0, 8) // 3]
        work = ",".join(f"{a}{b - a:+d}={b}" for a, b in zip(shown, shown[1:]))
        if (hashlib.sha256(question.encode()).digest()[0] < 32) == held_out:
            return question, work, str(totals[-1])


def arithmetic_reward(answer, truth):
    """1.0 if what follows the last "=" is the result."""
    return float(answer.rsplit("=", 1)[-1] == truth)


def last_boxed(text):
    """What stands in the last \\boxed{...} of a text, braces matched; None without one."""
    start, depth = text.rfind("\\boxed{"), 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7:i]


def math_reward(answer, truth):
    """1.0 if the answer's last \\boxed{} equals the truth by math-verify (in the main thread only)."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException
    boxed = last_boxed(answer)
    if boxed is None or len(boxed) > 200:                              # no final answer is that long
        return 0.0
    try:
        gold, found = (parse(f"\\boxed{{{x}}}", parsing_timeout=2) for x in (truth, boxed))
        return float(verify(gold, found, timeout_seconds=2))
    except (Exception, TimeoutException):                          # whatever the model wrote, it is no answer
        return 0.0


def load_reward(c):
    """The reward, a function (answer, truth) → number: the flag's, else the one that fits the data."""
    if not c.reward:
        return math_reward if c.data else arithmetic_reward
    sys.path.insert(0, os.getcwd())
    try:
        module, name = c.reward.split(":")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        fail(f"--reward {c.reward}: expected module:function ({error})")


# ---- 3. The model: transformers' Qwen3 under our mask ------------------------------------------------------


def attention(module, query, key, value, mask, scaling, **unused):
    """What Qwen3 calls: FlexAttention under a BlockMask, else SDPA under `strips` or a mask (in decoding)."""
    query, key = query.to(value.dtype), key.to(value.dtype)            # whatever their norms made of them
    if isinstance(mask, BlockMask):
        out = flex_attention()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    else:                                      # under a mask, enable_gqa would leave the fast kernels on CUDA
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        parts = [(slice(None), mask)] if torch.is_tensor(mask) else mask
        queries = query.split(parts[0][1].shape[-2], dim=2)
        sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scaling)
        out = torch.cat([sdpa(q, key[:, :, kv], value[:, :, kv], m) for q, (kv, m) in zip(queries, parts)], 2)
    return out.transpose(1, 2), None


@functools.cache
def flex_attention():
    torch._dynamo.config.recompile_limit = 64                          # one a row length: see padded_length
    return torch.compile(torch.nn.attention.flex_attention.flex_attention, dynamic=False)


def padded_length(n):
    """Row length on CUDA, few in all: a power of two or three quarters of one, so that little is compiled."""
    size = max(512, 1 << (n - 1).bit_length())
    return size * 3 // 4 if n <= size * 3 // 4 else size


@dataclass
class Policy:
    """A model and all that is needed to speak with it."""
    model: object                # Qwen3ForCausalLM, float32 weights
    tokenizer: object
    folder: str                  # the checkpoint it came from
    B: int                       # block size
    mask_id: int                 # [MASK]
    end_id: int                  # ends a turn in the chat template
    eos_id: int                  # fills the last block of an SFT answer
    temperature: float

    def __post_init__(self):
        self.device, self.stop_ids = self.model.device, torch.tensor([self.end_id, self.eos_id])
        self.base = getattr(self.model, "base", self.model.model)      # see `shard`

    def hidden(self, ids, pos, mask, cache=None):
        """Last hidden states [n, T, d] of ids, pos [n, T]; on CUDA bfloat16 inside, float32 out."""
        return self.base(input_ids=ids, position_ids=pos, attention_mask={"full_attention": mask},
                         past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def score(self, row):
        """log π_θ of every token of a packed row that a loss reads, and the entropy there: [R], [R]."""
        N = len(row["ids"])
        sees = mask_mod(row["doc"], row["copy"], row["pos"] // self.B)
        mask = (block_mask if self.device.type == "cuda" else strips)(sees, N, self.device)
        hidden = self.hidden(row["ids"][None], row["pos"][None], mask)[0, row["reads"]]  # [R, d]
        weight = self.model.lm_head.weight                                              # [vocab, d]
        return log_probs(hidden, weight, row["target"], self.temperature, self.mask_id)

    def named_weights(self):
        """(name in the checkpoint, whole tensor) of all weights, one at a time; for all ranks together."""
        for name, parameter in self.model.named_parameters():
            parameter = parameter.detach()
            yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def prompt(self, messages):
        """Token ids of the messages in the chat template, up to where the assistant speaks."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def example(self, messages):
        """SFT: (tokens [S], P) of a chat; its last message, the answer, ended and filled to a whole block."""
        prompt, text = self.prompt(messages[:-1]), messages[-1]["content"]
        answer = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.end_id]
        fill = -(len(prompt) + len(answer)) % self.B
        return torch.tensor(prompt + answer + [self.eos_id] * fill), len(prompt)


def find_model(name):
    """--model → a local folder. A hub name is fetched: safetensors and small files, no code."""
    if os.path.isdir(name) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name if os.path.isdir(name) else fail(f"--model {name}: no such folder, and not a hub name")
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"])
    except Exception as error:
        fail(f"--model {name}: no such folder, and the hub gave none ({' '.join(str(error).split())[:200]})")


def read_config(folder, c):
    """config.json of a checkpoint as a dict, refused where it is not SDAR's dense architecture."""
    try:
        config = dict(read_json(os.path.join(folder, "config.json")))
    except (OSError, ValueError, TypeError) as error:
        fail(f"--model {folder}: no readable config.json ({error})")
    if config.get("model_type") != "sdar":
        fail(f"--model {folder}: model_type {config.get('model_type')!r} in its config.json; only 'sdar' is "
             "supported (dense)")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "mask_token_id", "eos_token_id")
    config["block_size"] = config.get("block_size") or c.block_size
    for name in sizes + ("block_size",):
        value = config.get(name)
        value = value[0] if name == "eos_token_id" and isinstance(value, list) and value else value
        if type(value) is not int or value < 0:
            or_flag = ", or the flag --block-size" if name == "block_size" else ""
            fail(f"--model {folder}: {name} is {value!r} in its config.json; a number is needed{or_flag}")
    if config["mask_token_id"] >= config["vocab_size"]:
        fail(f"--model {folder}: mask_token_id {config['mask_token_id']} is not below vocab_size "
             f"{config['vocab_size']} in its config.json")
    if c.block_size not in (None, config["block_size"]):
        fail(f"--block-size {c.block_size}: the block size of {folder} is {config['block_size']}")
    check_block(c, config["block_size"])
    return config


def qwen3_config(config):
    """SDAR's dense architecture is Qwen3's: the same fields, and the attention function set to ours."""
    import transformers
    transformers.AttentionInterface.register("dirl", attention)
    ours = {"model_type", "architectures", "auto_map", "attn_implementation", "_attn_implementation",
            "torch_dtype", "dtype"}
    known = {name: value for name, value in config.items() if name not in ours}
    return transformers.Qwen3Config(**known, attn_implementation="dirl")


def load_policy(folder, c, config):
    """A Policy from config.json, safetensors and tokenizer files. No code from the folder is run."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    fast = os.path.exists(os.path.join(folder, "tokenizer.json"))
    Tokenizer = transformers.PreTrainedTokenizerFast if fast else transformers.Qwen2Tokenizer
    try:
        tokenizer = Tokenizer.from_pretrained(folder, local_files_only=True)
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        after = tokenizer.apply_chat_template(chat, tokenize=False).rsplit("b", 1)[1]
        model, info = transformers.Qwen3ForCausalLM.from_pretrained(
            folder, config=qwen3_config(config), dtype=torch.float32, use_safetensors=True,
            local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"--model {folder}: {' '.join(str(error).split())[:300]}")
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            fail(f"--model {folder}: {what.replace('_', ' ')} in its weights: {min(map(str, info[what]))}")
    end_id = tokenizer(after, add_special_tokens=False)["input_ids"][0]
    eos = config["eos_token_id"]
    if model.num_parameters() > 1e8:                                   # memory for time, where memory counts
        model.activation_checkpointing_enable({"use_reentrant": False})
    model = shard(model.to("cuda" if torch.cuda.is_available() else "cpu").train(), c)
    return Policy(model, tokenizer, folder, config["block_size"], config["mask_token_id"], end_id,
                  eos[0] if isinstance(eos, list) else eos, c.temperature)


def save_policy(policy, folder):
    """A checkpoint in SDAR format: the weights, and the source folder's other small files byte for byte.

    It is written aside and renamed, so that a folder of that name is a whole checkpoint."""
    from huggingface_hub import save_torch_state_dict
    config = read_json(os.path.join(policy.folder, "config.json"))
    dtype = getattr(torch, config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    state = {}
    for name, tensor in policy.named_weights():
        if rank() == 0:
            state[name] = tensor.to("cpu", dtype)
    if rank() == 0:
        with written_aside(folder) as aside:
            for file in os.scandir(policy.folder):
                weights = re.search(r"\.(safetensors|bin|pth?|gguf)(\.index\.json)?$", file.name)
                if file.is_file() and not weights and file.stat().st_size < 2**26:
                    shutil.copyfile(file.path, os.path.join(aside, file.name))
            save_torch_state_dict(state, aside)


@contextmanager
def written_aside(folder):
    """A folder to write in, which then takes the place of `folder` as a whole."""
    shutil.rmtree(folder + ".tmp", ignore_errors=True)
    os.makedirs(folder + ".tmp")
    yield folder + ".tmp"
    shutil.rmtree(folder + ".old", ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, folder + ".old")
    os.rename(folder + ".tmp", folder)
    shutil.rmtree(folder + ".old", ignore_errors=True)


def build_tiny(folder, B, seed):
    """The tiny model: random weights and a byte-level tokenizer, with the fields and tensor names of SDAR."""
    import transformers
    from huggingface_hub import save_torch_state_dict
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    special = ["<|endoftext|>", "<|im_end|>", "<|MASK|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level, eos_token=special[0], pad_token=special[0], mask_token=special[2],
        additional_special_tokens=special[1:2] + special[3:])
    tokenizer.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    tokenizer.save_pretrained(folder)
    eos, mask = tokenizer.convert_tokens_to_ids([special[0], special[2]])
    config = dict(
        architectures=["SDARForCausalLM"], model_type="sdar", vocab_size=len(tokenizer), hidden_size=128,
        intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        hidden_act="silu", attention_bias=False, attention_dropout=0.0, rms_norm_eps=1e-6, rope_theta=100.0,
        initializer_range=0.08, max_position_embeddings=4096, rope_scaling=None, sliding_window=None,
        use_sliding_window=False, tie_word_embeddings=False, use_cache=True, torch_dtype="float32",
        bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, mask_token_id=mask, block_size=B)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(qwen3_config(config))
    save_torch_state_dict(model.state_dict(), folder)


# ---- 4. Rollout: the PyTorch sampler -----------------------------------------------------------------------


@dataclass
class Trajectory:
    """Section 3.2's τ. The output is whole blocks, with what follows the stop token."""
    prompt: torch.Tensor         # [P] token ids
    output: torch.Tensor         # [L] token ids, P + L a multiple of B
    steps: torch.Tensor          # [L] step map: the decoding step within its block, from 1
    logp: torch.Tensor           # [L] the sampler's log π(o | τ(1:s-1)) when the token was committed
    answer: torch.Tensor         # what is rewarded: before the first stop token, else max_new_tokens of it
    stopped: bool                # by a stop token
    decoding_steps: int          # of all its blocks, |τ|


def uniform(seed, position, left):
    """The u ∈ [0, 1) to draw the token at `position` [n, B] with while `left` [n] tokens of its block are
    masked (so that a rejected position gets a new one): [n, B] float64. splitmix64 of the two and the
    trajectory's seed [n], with int64 that wraps around."""
    x = seed[:, None] + position * -0x61C8864680B583EB + left[:, None] * -0x2E99A7B4E3D5F9C1
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift & 2**(64 - shift) - 1)) * factor
    return (x >> 11 & 2**53 - 1).double() * 2.0**-53


def denoise(logits, masked, position, seed, temperature, mask_id, c):
    """One decoding step of n blocks: the token drawn at each position, whether it is committed, its log π:
    [n, B] each. logits: [n, B, vocab]; masked, position: [n, B]; seed: [n], -1 for the likeliest tokens."""
    log_pi = log_policy(logits, temperature, mask_id)                                   # [n, B, vocab]
    token = draw(log_pi, uniform(seed, position, masked.sum(1)))
    token = torch.where(seed[:, None] < 0, log_pi.argmax(-1), token)                    # [n, B]
    new = unmask(log_pi, token, masked, c.unmask, c.tokens_per_step, c.threshold, c.confidence)
    return token, new, log_pi.gather(-1, token[..., None])[..., 0]


def trajectory(prompt, output, steps, logp, policy, c):
    """The Trajectory of an output of whole blocks."""
    stops = torch.isin(output[:c.max_new_tokens], policy.stop_ids).nonzero()[:, 0].tolist()
    answer = output[:stops[0] if stops else c.max_new_tokens]
    blocks = torch.cat([torch.zeros_like(prompt), steps]).view(-1, policy.B)            # [K, B]
    return Trajectory(prompt, output, steps, logp, answer, bool(stops), int(blocks.max(1).values.sum()))


class BlockCache:
    """Keys and values, one slot a position. Every pass over a block overwrites its slots and the last one
    leaves those of its clean tokens; until then nobody but the block itself looks at them."""
    def __init__(self, slots):
        self.slots, self.kv, self.pos, self.span = slots, {}, None, 0

    def update(self, k, v, layer):
        """Qwen3 brings k, v: [n, heads, T, head_dim] of positions self.pos, and gets those of all slots."""
        k = k.to(v.dtype)
        if layer not in self.kv:
            self.kv[layer] = [x.new_zeros(*x.shape[:2], self.slots, x.shape[3]) for x in (k, v)]
        index = self.pos[:, None, :, None].expand_as(k)
        return [slots.scatter_(2, index, x)[:, :, :self.span] for slots, x in zip(self.kv[layer], (k, v))]

    def keep(self, rows):
        for kv in self.kv.values():
            kv[:] = [x[rows] for x in kv]


@torch.no_grad()
def rollout(policy, prompts, keys, c, greedy=False):
    """One trajectory for each prompt (token ids) and key (of its generator), --slots of them at a time."""
    policy.model.eval()
    seeds, trajectories = [-1 if greedy else seed_of(*key) for key in keys], []
    for i in range(0, len(prompts), c.slots):
        trajectories += decode(policy, prompts[i:i + c.slots], seeds[i:i + c.slots], c)
    policy.model.train()
    return trajectories


def decode(policy, prompts, seeds, c):
    """Block diffusion decoding of a batch; each sequence is at a block and a step of its own, and ends after
    the first whole block that holds a stop token or brings its output to max_new_tokens."""
    B, n, device = policy.B, len(prompts), policy.device
    P = torch.tensor([len(p) for p in prompts], device=device)                          # [n]
    first, end = P // B, -(-(P + c.max_new_tokens) // B)                            # [n] blocks of the output
    slot = torch.arange(int(end.max()) * B, device=device)                              # [slots] positions
    tokens = torch.full((n, len(slot)), policy.mask_id, device=device)                  # [n, slots]
    for i, prompt in enumerate(prompts):
        tokens[i, :len(prompt)] = torch.tensor(prompt, device=device)
    steps, logp = torch.zeros_like(tokens), torch.zeros(n, len(slot), device=device)    # [n, slots]
    seeds = torch.tensor(seeds, device=device)                                          # [n]
    is_output, stop_ids, cache = slot >= P[:, None], policy.stop_ids.to(device), BlockCache(len(slot))

    def forward(rows, pos):                                                             # [m], [m, T]
        cache.pos, cache.span = pos, int(pos.max()) + 1
        mask = slot[:cache.span] // B <= pos[:, None, :, None] // B                     # [m, 1, T, span]
        return policy.hidden(tokens[rows[:, None], pos], pos, mask, cache)              # [m, T, d]

    live, k, s = torch.arange(n, device=device), first, torch.zeros_like(P)             # [m] each
    if int(first.max()):
        forward(live, slot[:int(first.max()) * B].expand(n, -1))                     # the whole prompt blocks
    while len(live):
        if stop_signal.is_set():
            raise Stopped
        pos = k[:, None] * B + slot[:B]                                                 # [m, B]
        at = live[:, None], pos
        masked = tokens[at] == policy.mask_id
        logits = forward(live, pos) @ policy.model.lm_head.weight.T
        token, new, log_pi = denoise(logits, masked, pos, seeds[live], policy.temperature, policy.mask_id, c)
        s = s + 1
        tokens[at] = torch.where(new, token, tokens[at])
        steps[at] = torch.where(new, s[:, None], steps[at])
        logp[at] = torch.where(new, log_pi, logp[at])
        # B = 4 at 2 tokens a step: passes 1 and 2 commit; now the block is whole, but the cache has keys and
        # values of its [MASK]s; pass 3 (was_whole) leaves those of its tokens, unless the sequence has ended.
        stopped = (torch.isin(tokens[at], stop_ids) & is_output[at]).any(1)
        ended = (masked == new).all(1) & (stopped | (k + 1 == end[live]))
        was_whole = ~masked.any(1)
        k, s = torch.where(was_whole, k + 1, k), torch.where(was_whole, 0, s)
        if ended.any():
            live, k, s = live[~ended], k[~ended], s[~ended]
            cache.keep(~ended)
    tokens, steps, logp = tokens.cpu(), steps.cpu(), logp.cpu()
    S = [int(x.nonzero().max()) + 1 for x in steps]                    # a slot never decoded has step 0
    return [trajectory(tokens[i, :p], tokens[i, p:S[i]], steps[i, p:S[i]], logp[i, p:S[i]], policy, c)
            for i, p in enumerate(P.tolist())]


class TorchEngine:
    """Rollouts by `rollout`, on the trainer's own weights: nothing to update, nothing to put to sleep."""

    def __init__(self, policy, c):
        self.policy, self.c = policy, c

    def generate(self, prompts, keys, greedy=False):
        with gathered(self.policy.model):
            return rollout(self.policy, prompts, keys, self.c, greedy)

    def sleep(self):
        pass

    def update_weights(self):
        pass

    def close(self):
        pass


# ---- 5. Rollout: LMDeploy ----------------------------------------------------------------------------------


def hook_lmdeploy(policy, c, requests, finished):
    """Our policy in stock LMDeploy, at one patch point: the class returned here takes the place of
    lmdeploy.pytorch.strategies.dllm.DLLMStrategyFactory, which an engine looks up while it is built.

    LMDeploy schedules, batches, runs the model and keeps its cache; what becomes of the logits, `denoise`
    decides, as in `decode`. So the faults of its sampler do not matter: it gives row r the parameters of
    request r % n, so that rollouts of one prompt come out equal, and all tokens of a block one random number.
    requests: {session id: (seed, temperature)}; finished: {session id: (output, steps, logp)}.

    On the device, at every forward: make_extra_inputs [n rows: block state, request] → the model →
    post_sampling (denoise; state MASKED → UNMASKED, and CACHED after the clean pass) → make_extra_outputs.
    StepInputs keeps the rows from one forward to the next. In the scheduler: SequenceStrategy.update_running
    → Sequence, which writes down what became of its block."""
    from lmdeploy.pytorch.consts import DLLM_CACHED, DLLM_MASKED, DLLM_UNMASKED
    from lmdeploy.pytorch.strategies import dllm
    from lmdeploy.pytorch.strategies.dllm import model_agent, sequence, step_inputs
    for owner, names in (
            (model_agent.DLLMModelAgentStrategy, "make_extra_inputs slice_extra_inputs post_sampling"),
            (step_inputs.DLLMStepInputs, "merge_prefill reindex step_decode"),
            (sequence.DLLMSequenceStrategy, "make_sequence update_running"),
            (sequence.SchedulerSequenceDLLM, "_update_token_ids_decode set_stop_pos")):
        for name in names.split():
            getattr(owner, name)                   # what we override must be there, or ours is never called

    @dataclass
    class ExtraInputs(model_agent.DLLMExtraInputs):
        request: torch.Tensor = None               # [n, 2] float64: seed, temperature
        logp: torch.Tensor = None                  # [n, B] of the forward just done

    @dataclass
    class ExtraOutputs(model_agent.DLLMExtraOutputs):
        logp: torch.Tensor = None                  # goes to the scheduler with dllm_mask

    class StepInputs(step_inputs.DLLMStepInputs):
        """The decoding batch on the device; each row keeps its request."""
        def keep(self, request):
            self.extra_inputs = ExtraInputs(self.extra_inputs.dllm_mask, request)

        def merge_prefill(self, inputs, extra_inputs, *rest):
            before = [] if self.model_inputs is None else [self.extra_inputs.request]
            super().merge_prefill(inputs, extra_inputs, *rest)
            self.keep(torch.cat([*before, extra_inputs.request]))

        def reindex(self, delta):
            request = self.extra_inputs.request[delta.indices]
            super().reindex(delta)
            self.keep(request)

        def step_decode(self, inputs, extra_inputs, *rest):
            super().step_decode(inputs, extra_inputs, *rest)
            self.keep(extra_inputs.request)

    class AgentStrategy(model_agent.DLLMModelAgentStrategy):
        """Before and after every forward, on the device."""
        def make_extra_inputs(self, seqs, model_inputs):
            request = torch.tensor([requests[seq.session_id] for seq in seqs], dtype=torch.float64)
            return ExtraInputs(super().make_extra_inputs(seqs, model_inputs).dllm_mask, request)

        def slice_extra_inputs(self, extra_inputs, *rest, **more):
            sliced = super().slice_extra_inputs(extra_inputs, *rest, **more)
            return ExtraInputs(sliced.dllm_mask, extra_inputs.request)

        def post_sampling(self, inputs, logits, next_token_ids, extra_inputs):
            B = self.block_size
            ids = self.slice_outputs(inputs.input_ids.flatten(), inputs.seq_length).view(-1, B)       # [n, B]
            state = extra_inputs.dllm_mask.view(-1, B)
            masked, whole = state == DLLM_MASKED, (state == DLLM_UNMASKED).all(1, keepdim=True)
            start = inputs.history_lengths + inputs.seq_length - B                      # [n] of the block
            position = start[:, None] + torch.arange(B, device=start.device)
            seed, temperature = extra_inputs.request.unbind(1)
            token, new, logp = denoise(logits.view(len(ids), B, -1), masked, position, seed.long(),
                                       temperature.float()[:, None, None], policy.mask_id, c)
            state = torch.where(new, DLLM_UNMASKED, torch.where(whole, DLLM_CACHED, state))
            extra_inputs = ExtraInputs(state.flatten(), extra_inputs.request, logp)
            return torch.where(new, token, ids).flatten(), extra_inputs

        def make_extra_outputs(self, extra_inputs):
            return ExtraOutputs(extra_inputs.dllm_mask, extra_inputs.logp)

    class Sequence(sequence.SchedulerSequenceDLLM):
        """One request, in the scheduler; forward_logp [B] is set before every update."""
        def _update_token_ids_inputs(self, token_ids, dllm_mask):
            super()._update_token_ids_inputs(token_ids, dllm_mask)
            self.output_start_pos = self.input_end_pos         # stock: the padded prompt's end, and a stop
            self.steps, self.logp = {}, {}                     # token in the block it begins was missed

        def _update_token_ids_decode(self, token_ids, dllm_mask):
            span = range(self.num_history_ids, self.num_history_ids + len(dllm_mask))
            before = self.history_dllm_mask[span.start:span.stop]
            step = 1 + max(self.steps.get(p, 0) for p in span)
            for i in ((before == DLLM_MASKED) & (dllm_mask != DLLM_MASKED)).nonzero()[0].tolist():
                self.steps[span[i]], self.logp[span[i]] = step, self.forward_logp[i]
            super()._update_token_ids_decode(token_ids, dllm_mask)

        def set_stop_pos(self, pos):                           # once, at the end, the last block still whole
            span = range(self.input_end_pos, self.num_history_ids + self.dllm_block_length)
            finished[self.session_id] = (self.history_cache[span.start:span.stop].tolist(),
                                         [self.steps[p] for p in span], [self.logp[p] for p in span])
            super().set_stop_pos(pos)

    class SequenceStrategy(sequence.DLLMSequenceStrategy):
        def make_sequence(self, **request):
            return Sequence(**request)

        def update_running(self, running, batched_outputs, **rest):
            for seq, logp in zip(running, batched_outputs.extra_outputs.logp.tolist()):
                seq.forward_logp = logp
            super().update_running(running, batched_outputs, **rest)

    class Factory(dllm.DLLMStrategyFactory):
        def __init__(self, model_config, dllm_config):
            model_config.dllm_mask_token = policy.mask_id      # stock: 151669, whatever config.json says
            super().__init__(model_config, dllm_config)

        def build_sequence_strategy(self):
            return SequenceStrategy(self.dllm_block_length, policy.mask_id)

        def build_model_agent_strategy(self):
            return AgentStrategy(self.dllm_config, policy.mask_id)

        def build_step_inputs(self):
            return StepInputs(_block_size=self.dllm_block_length, _dllm_mask_token=policy.mask_id)
    return Factory


class LMDeployEngine:
    """LMDeploy's PyTorch engine in this process, on this rank's GPU, its loop in a thread of its own.

    Token ids in, trajectories out; `sleep` frees its memory for training, after which `update_weights` also
    wakes it up, weights first, then cache."""
    tested = ("0.18.0",)

    def __init__(self, policy, c, **options):
        os.environ.setdefault("LMDEPLOY_ENABLE_CHECK_ENV", "0")      # the check would start this script again
        self.policy, self.c, self.requests, self.finished = policy, c, {}, {}
        self.asleep, self.session_len = False, -(-(c.max_length + c.max_new_tokens) // policy.B) * policy.B
        try:
            import lmdeploy
            from lmdeploy.pytorch.engine import Engine
            from lmdeploy.pytorch.strategies import dllm
            stock, hooked = dllm.DLLMStrategyFactory, hook_lmdeploy(policy, c, self.requests, self.finished)
        except (ImportError, AttributeError) as error:
            fail(f"--engine lmdeploy: {error}; pip install lmdeploy=={self.tested[-1]}, or --engine torch")
        if lmdeploy.__version__ not in self.tested:
            print(f"warning: lmdeploy {lmdeploy.__version__} is untested: {self.tested} are", file=sys.stderr)
        lmdeploy.utils.get_logger("lmdeploy").setLevel("ERROR")
        from transformers import AutoConfig, Qwen3Config
        AutoConfig.register("sdar", type("SDARConfig", (Qwen3Config,), {"model_type": "sdar"}), exist_ok=True)
        dllm.DLLMStrategyFactory = hooked
        settings = dict(dtype="bfloat16", dllm_block_length=policy.B, session_len=self.session_len,
                        max_batch_size=c.slots, cache_max_entry_count=c.engine_memory, enable_metrics=False)
        config = lmdeploy.PytorchEngineConfig(**settings | options)     # no prefix cache: it outlives updates
        self.engine = Engine.from_pretrained(policy.folder, config)
        dllm.DLLMStrategyFactory = stock
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        if torch.cuda.is_available():
            self.call(torch.cuda.set_device, torch.cuda.current_device())      # a thread has its own
        self.call(self.engine.start_loop)
        self.instance, self.sessions = self.engine.create_instance(), itertools.count()
        self.update_weights()

    def run(self, coroutine, may_stop=False):
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        while not wait([future], timeout=0.5).done:
            if may_stop and stop_signal.is_set() and future.cancel():
                raise Stopped
        return future.result()

    def call(self, function, *args):
        async def in_the_loop():
            return function(*args)
        return self.run(in_the_loop())

    def generate(self, prompts, keys, greedy=False):
        """One trajectory for each prompt (token ids) and key, in their order; raises if one of them fails."""
        from lmdeploy import GenerationConfig
        policy, c, n = self.policy, self.c, len(prompts)
        asked = GenerationConfig(max_new_tokens=c.max_new_tokens, stop_token_ids=policy.stop_ids.tolist(),
                                 temperature=1.0, top_k=1)         # the cheapest: its samples are not used

        async def one(i):
            prompt, session, status = prompts[i], next(self.sessions), "too long"
            self.requests[session] = -1 if greedy else seed_of(*keys[i]), policy.temperature
            if len(prompt) + c.max_new_tokens <= self.session_len:
                stream = self.instance.async_stream_infer(session, list(prompt), gen_config=asked)
                async for response in stream:
                    status = response.status
            del self.requests[session]
            if session not in self.finished:
                raise RuntimeError(f"LMDeploy, request {i} of {n}, prompt of {len(prompt)} tokens: {status}")
            output, steps, logp = map(torch.tensor, self.finished.pop(session))
            return trajectory(torch.tensor(prompt), output, steps, logp, policy, c)

        async def every():
            return await asyncio.gather(*map(one, range(n)))
        return self.run(every(), may_stop=True)

    def sleep(self):
        """Free weights and cache."""
        self.run(self.engine.sleep(2))
        self.asleep = True

    def update_weights(self):
        """Fig. 3's (6): the trainer's weights, one at a time, into the engine's own; some are read back."""
        from lmdeploy.pytorch.weight_loader.model_weight_loader import process_weights_after_loading
        agent, last = self.engine.executor.model_agent, self.policy.model.config.num_hidden_layers - 1
        read_back = ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight",
                     f"model.layers.{last}.mlp.down_proj.weight", "model.norm.weight")
        if self.asleep:
            self.call(self.engine.wakeup, ["weights"])
        model = agent.patched_model.get_model()                      # another one after every wakeup
        for name, tensor in self.policy.named_weights():
            with agent.all_context():
                model.load_weights([(name, tensor)])
                taken = model.get_parameter(name) if name in read_back else None
                if taken is not None and not torch.equal(taken, tensor.to(taken.dtype)):
                    raise RuntimeError(f"LMDeploy did not take the new {name}")
        with agent.all_context():
            process_weights_after_loading(model)
        if torch.cuda.is_available():
            torch.cuda.synchronize()                                   # LMDeploy has a stream of its own
        if self.asleep:
            torch.cuda.empty_cache()
            self.call(self.engine.wakeup, ["kv_cache"])
        self.asleep = False

    def close(self):
        async def stop():
            self.engine.stop()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.run(stop())
        self.engine.close()
        self.loop.call_soon_threadsafe(self.loop.stop)


# ---- 6. Ranks ----------------------------------------------------------------------------------------------


class Stopped(Exception):
    """SIGTERM came: the step in progress is given up, on all ranks."""


stop_signal = threading.Event()


def start_ranks():
    """torchrun's ranks become one process group. One rank on a GPU is a group of its own, without a port."""
    n, cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if dist.is_initialized() or (n == 1 and not cuda):
        return
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if n == 1 else {}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def gather(items):
    """The lists of all ranks, one after the other. Raises Stopped on all of them if one was told to stop."""
    lists = [None] * world()
    if world() > 1:
        dist.all_gather_object(lists, (stop_signal.is_set(), items))
    else:
        lists = [(stop_signal.is_set(), items)]
    if any(stop for stop, _ in lists):
        raise Stopped
    return [item for _, items in lists for item in items]


def all_sum(tensor):
    """Over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def shard(model, c):
    """FSDP2: each layer, and the rest, sharded over the ranks or groups of --hsdp of them. On CUDA layers
    compute in bfloat16, gradients are averaged in float32. model.base: the forward to the hidden states."""
    device = model.device.type
    if dist.is_initialized():
        n = c.hsdp or world()
        mesh = init_device_mesh(device, (world() // n, n), mesh_dim_names=("replicate", "shard"))
        mesh = mesh["shard"] if n == world() else mesh
        precision = (torch.bfloat16, torch.float32) if device == "cuda" else ()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(*precision))
        fully_shard(model, mesh=mesh, reshard_after_forward=False)     # lm_head is read after the forward
    model.base = lambda **inputs: model.model(**inputs)
    register_fsdp_forward_method(model, "base")
    return model


@contextmanager
def gathered(model):
    """The whole model on every rank: for rollouts, in which ranks take different numbers of forwards."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in modules:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in modules:
            m.set_reshard_after_forward(m is not model, recurse=False)
            m.reshard()


def pack(lengths, max_tokens):
    """Documents into rows of at most max_tokens, longest first, each into the first row with room; one that
    is longer gets a row of its own. Returns a list of lists of document indices."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = next((r for r in range(len(rows)) if lengths[i] <= room[r]), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[r].append(i)
        room[r] -= lengths[i]
    return rows


def deal(lengths, max_tokens):
    """Documents of these lengths → (rows of document indices for this rank, imbalance).

    The longest goes first, to the rank with least. All ranks get as many rows, the last ones may be empty.
    Imbalance: tokens of the fullest rank over the mean, minus 1."""
    hands, loads = [[] for _ in range(world())], [0] * world()
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = loads.index(min(loads))
        hands[r].append(i)
        loads[r] += lengths[i]
    packed = [pack([lengths[i] for i in hand], max_tokens) for hand in hands]
    rows = [[[hand[j] for j in row] for row in rows] for hand, rows in zip(hands, packed)]
    most = max(map(len, rows))
    return rows[rank()] + [[]] * (most - len(rows[rank()])), max(loads) / max(1, sum(loads)) * world() - 1


# ---- 7. What both training loops use -----------------------------------------------------------------------


@contextmanager
def clock(seconds, phase):
    """Add the seconds of a phase of a step to a dict."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0) + time.perf_counter() - start


def make_rows(policy, lengths, document, c):
    """document(i), of lengths[i] tokens, for all i → (this rank's packed rows on its device, imbalance).

    A document has the columns that its loss needs; that of an empty row has no place where a loss reads."""
    nothing = dict.fromkeys(("reads", "target"), torch.zeros(0, dtype=torch.long))
    nothing |= dict.fromkeys(("weight", "A", "w", "logp_sampler"), torch.zeros(0))
    nothing |= {"ids": torch.zeros(policy.B, dtype=torch.long), "pos": torch.arange(policy.B)}
    nothing["copy"], (plan, imbalance), rows = nothing["ids"], deal(lengths, c.max_tokens), []
    for indices in plan:
        chosen = [document(i) for i in indices] or [nothing]
        length = padded_length(sum(len(d["ids"]) for d in chosen)) if policy.device.type == "cuda" else None
        rows.append({name: x.to(policy.device) for name, x in join(chosen, length).items()})
    return rows, imbalance


def backward(loss, may_stop=True):
    """A row's part of the gradient. FSDP averages over the ranks; the loss is a sum over them. As long as no
    weight has moved, the ranks first agree whether one of them was told to stop."""
    if may_stop and all_sum(torch.tensor(float(stop_signal.is_set()))):
        raise Stopped
    (loss * world()).backward()


def make_optimizer(policy, c):
    return torch.optim.AdamW(policy.model.parameters(), lr=c.lr, betas=(0.9, 0.95), weight_decay=0.0)


def learning_rate(c, step):
    """Of step 1, 2, ...: linear warm-up, then constant, or a cosine that is 0 one step after the last."""
    if step <= c.warmup:
        return c.lr * step / c.warmup
    progress = (step - 1 - c.warmup) / max(1, c.steps - c.warmup)
    return c.lr * (0.5 * (1 + math.cos(math.pi * progress)) if c.schedule == "cosine" else 1)


def optimizer_step(policy, optimizer, c, step, progress):
    """(5d) Clip the gradient, move, forget it. Returns its norm before the clip. One that is not finite moves
    nothing; the third in a row is an end."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(c, step)
    if math.isfinite(norm):
        optimizer.step()
        progress["bad"] = 0
    else:
        progress["bad"], progress["skipped"] = progress["bad"] + 1, progress["skipped"] + 1
    optimizer.zero_grad()
    if progress["bad"] == 3:
        fail(f"step {step}: the third gradient in a row that is not finite; the last saved state is in "
             f"{state_folder(c)}")
    return norm


def write_metrics(c, line):
    """One JSON object a step, and one an evaluation, in OUT/metrics.jsonl; what is not finite is null."""
    line = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in line.items()}
    line = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in line.items()}
    if rank() == 0:
        with open(os.path.join(c.out, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def state_folder(c):
    return os.path.join(c.out, c.stage + ".state")


@contextmanager
def saved_when_stopped(policy, optimizer, c, progress):
    """The steps of a stage: if one is given up, the state after the last one is saved."""
    try:
        yield
    except Stopped:
        optimizer.zero_grad()
        if progress["step"] not in (0, *saved_states(c)):
            save_state(policy, optimizer, c, progress)
        raise


def save_state(policy, optimizer, c, progress):
    """What --resume needs, in OUT/STAGE.state/N for step N, written aside and renamed; the last two stay."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    folder = os.path.join(state_folder(c), str(progress["step"]))
    model, moments = get_state_dict(policy.model, optimizer)
    with written_aside(folder) if rank() == 0 else nullcontext():
        all_sum(torch.zeros(1))                                        # the folder is there
        dcp.save({"model": model, "optimizer": moments}, checkpoint_id=folder + ".tmp")
        if rank() == 0:
            with open(os.path.join(folder + ".tmp", "progress.json"), "w", encoding="utf-8") as file:
                json.dump(progress, file)
    if rank() == 0:
        for old in saved_states(c)[:-2]:
            shutil.rmtree(os.path.join(state_folder(c), str(old)))
    all_sum(torch.zeros(1))


def saved_states(c):
    """Steps of the whole states in OUT/STAGE.state, in order."""
    names = os.listdir(state_folder(c)) if os.path.isdir(state_folder(c)) else []
    return sorted(int(name) for name in names if name.isdigit())


def resume(policy, optimizer, c):
    """The progress of a stage. With --resume its newest saved state is loaded; metrics after it are cut."""
    progress = {"step": 0, "position": 0, "rewards": [], "idle": 0, "bad": 0, "skipped": 0,
                "evaluated": -1, "accuracy": [], "done": False}
    steps = saved_states(c) if c.resume else []
    if steps:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        folder = os.path.join(state_folder(c), str(steps[-1]))
        model, moments = get_state_dict(policy.model, optimizer)
        dcp.load({"model": model, "optimizer": moments}, checkpoint_id=folder)
        set_state_dict(policy.model, optimizer, model_state_dict=model, optim_state_dict=moments)
        progress |= read_json(os.path.join(folder, "progress.json"))
        say(f"{c.stage}: resuming after step {progress['step']}")
    os.makedirs(state_folder(c), exist_ok=True)                        # from now on the stage is begun
    for name in os.listdir(state_folder(c)) if rank() == 0 else []:
        if not name.isdigit():                                         # of a save that was interrupted
            shutil.rmtree(os.path.join(state_folder(c), name))
    last = {c.stage: progress["step"], f"{c.stage} eval": progress["evaluated"]}
    for name in ("metrics.jsonl", "eval.jsonl"):                   # which may hold lines of other stages, too
        keep_lines(os.path.join(c.out, name),
                   lambda line: line["stage"] not in last or line["step"] <= last[line["stage"]])
    return progress


def keep_lines(path, wanted):
    """Of a .jsonl file, if there is one, the wanted lines; the last may have been cut short and goes too."""
    def stays(line):
        try:
            return wanted(json.loads(line))
        except ValueError:
            return False
    if rank() == 0 and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines(keepends=True)
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(filter(stays, lines))
        os.replace(path + ".tmp", path)


def usable(policy, c, path, encoded, what):
    """Of (token ids, ...), those that are short enough and free of [MASK]; says how many are not."""
    kept = [x for x in encoded if len(x[0]) <= c.max_length and policy.mask_id not in x[0]]
    if len(kept) < len(encoded):
        say(f"{path}: skipped {len(encoded) - len(kept)} of {len(encoded)} {what}: longer than "
            f"--max-length {c.max_length}, or with a mask token in them")
    return kept or fail(f"{path}: none of its {what} is within --max-length {c.max_length} tokens")


@functools.cache
def order(n, *key):
    """A random order of n items."""
    return torch.randperm(n, generator=generator(*key)).tolist()


def nth(items, n, *key):
    """The n-th item of an endless walk through a list, in a new order every epoch."""
    epoch, i = divmod(n, len(items))
    return items[order(len(items), *key, epoch)[i]]


def memory(c, config, ranks, cuda):
    """(weights of a model, bytes that a rank needs to load, to train and to roll out), by formula.

    AdamW in float32, sharded; whole layers in bfloat16 on CUDA; hidden states, kept layer by layer; the cache
    of all sequences, or of one with LMDeploy, which takes what is free for more."""
    d, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    q, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer = d * (2 * q + 2 * kv + 3 * config["intermediate_size"])
    ends = vocab * d * (1 if config.get("tie_word_embeddings") else 2)
    weights, width = layers * layer + ends, 2 if cuda else 4                            # bytes a number
    sharded = cuda or ranks > 1
    share, reference = 4 * weights / (c.hsdp or ranks), c.stage == "rl" and c.beta > 0
    kept = (4 if reference else 3) * share + 4 * ends * (reference and sharded)         # with AdamW's moments
    views = c.max_new_tokens * (1 + config["block_size"]) if c.stage == "rl" else c.max_length
    row = max(c.max_tokens, c.max_length + views) * layers * d * 4 + 3 * 512 * vocab * 4   # a chunk of logits
    gathered = 2 * (4 * ends + width * layer) * sharded                                 # with their gradients
    training = kept + share + max(gathered + row, share * cuda)                         # or AdamW's update
    sequence = (c.max_length + c.max_new_tokens) * layers * 2 * kv * width
    rollout = kept + sequence * c.slots
    rollout += (4 * ends + width * layers * layer) * sharded
    if c.engine == "lmdeploy":
        rollout = kept + 2 * weights + sequence
    return weights, {"loading": weights * 4, "training": training, "rollout": rollout * (c.stage == "rl")}


def announce(c, config):
    """One line before anything is loaded: what a step asks for, in tokens and memory."""
    cuda, ranks = torch.cuda.is_available(), world()
    weights, bytes_of = memory(c, config, ranks, cuda)
    need = max(bytes_of.values())
    what, ceiling = f"{c.batch} examples", c.batch * c.max_length
    if c.stage == "rl":
        n = c.prompts * c.group_size
        what, ceiling = f"{c.prompts} prompts x {c.group_size} = {n} trajectories", n * c.max_new_tokens
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    there /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    there = torch.cuda.mem_get_info()[1] if cuda else there
    what = f"{what} a step, at most {ceiling:,} tokens; {weights / 1e6:,.1f}M weights"
    if need > there:
        fail(f"{what}: about {need / 1e9:,.0f} GB of memory a rank, and {there / 1e9:.0f} GB are there; "
             "lower --slots, --max-new-tokens or --max-tokens, or take more ranks")
    say(f"{c.stage}: {what}, about {need / 1e9:.1f} GB of memory a rank")


# ---- 8. The SFT loop ---------------------------------------------------------------------------------------


def sft_step(policy, optimizer, c, example, step, progress):
    """One step of Eq. 3. Returns its line of metrics."""
    documents, answer_tokens, loss = [], 0, torch.zeros(1, device=policy.device)
    for i in range((step - 1) * c.batch, step * c.batch):
        tokens, P = example(i)
        g, blocks = generator(c.seed, "sft", step, i, 0), len(tokens) // policy.B - P // policy.B
        u, z = torch.rand(blocks, generator=g), torch.rand(blocks, policy.B, generator=g)
        documents.append(noised_document(tokens, P, u, z, policy.B, policy.mask_id))
        answer_tokens += len(tokens) - P                               # end tokens and padding included
    lengths = [len(d["ids"]) for d in documents]
    rows, imbalance = make_rows(policy, lengths, documents.__getitem__, c)
    for row in rows:
        logp, _ = policy.score(row)                                                     # [R]
        row_loss = sft_loss(logp, row["weight"], answer_tokens)
        backward(row_loss)
        loss += row_loss.detach()
    norm = optimizer_step(policy, optimizer, c, step, progress)
    progress["step"] = step
    return {"stage": "sft", "step": step, "loss": all_sum(loss).item(), "lr": learning_rate(c, step),
            "grad_norm": norm, "forward_tokens": sum(lengths), "imbalance": imbalance,
            "skipped": progress["skipped"]}


def train_sft(policy, c, example):
    """Eq. 3 on example(i) → (tokens [S], P)."""
    optimizer = make_optimizer(policy, c)
    progress = resume(policy, optimizer, c)
    with saved_when_stopped(policy, optimizer, c, progress):
        bar = tqdm(range(c.steps), "sft", initial=progress["step"], disable=rank() > 0)
        for step in range(progress["step"] + 1, c.steps + 1):
            start = time.perf_counter()
            line = sft_step(policy, optimizer, c, example, step, progress)
            write_metrics(c, line | {"seconds": time.perf_counter() - start})
            bar.set_postfix(loss=f"{line['loss']:.3f}")
            bar.update()
            progress["done"] = step == c.steps
            if progress["done"]:
                save_policy(policy, os.path.join(c.out, "sft"))
            if step % c.save_every == 0 or progress["done"]:
                save_state(policy, optimizer, c, progress)


# ---- 9. The RL loop, its phases numbered as in Fig. 3 ------------------------------------------------------


def dynamic_sampling(policy, engine, c, problem, reward, step, position, seconds):
    """DAPO: roll out groups until --prompts of them are mixed (their rewards differ) or --max-attempts rounds
    are over.

    Returns the mixed groups and all of them, each (G trajectories, G rewards), and the next data position."""
    mixed, every = [], []
    for _ in range(c.max_attempts):
        indices = range(position, position + c.prompts - len(mixed))
        position += len(indices)
        mine, groups = indices[rank()::world()], []
        with suppress(Stopped):                                        # `gather` tells the other ranks
            with clock(seconds, "seconds_rollout"):
                # (1) fetch prompts, (2) iterate over them
                fetched = [problem(i) for i in mine]                          # (prompt ids, truth, question)
                # (3) request, (4) rollout
                prompts = [prompt for prompt, *_ in fetched for _ in range(c.group_size)]
                keys = [(c.seed, "rl", step, i, g) for i in mine for g in range(c.group_size)]
                flat = engine.generate(prompts, keys)
            with clock(seconds, "seconds_reward"):
                for j, (_, truth, _) in enumerate(fetched):
                    group = flat[j * c.group_size:(j + 1) * c.group_size]
                    answers = [policy.tokenizer.decode(t.answer) for t in group]
                    groups.append((mine[j], group, [float(reward(answer, truth)) for answer in answers]))
        every += [(group, r) for _, group, r in sorted(gather(groups), key=lambda found: found[0])]
        mixed = [(group, r) for group, r in every if max(r) > min(r)]
        if len(mixed) == c.prompts:
            break
    return mixed, every, position


def dipo_rows(policy, c, groups):
    """Mixed groups → (this rank's rows with the columns of Eq. 6-8, imbalance, tokens of all ranks).

    Weights and advantages come from the whole batch here, before anything is dealt or cut."""
    A = advantage(torch.tensor([r for _, r in groups]), c.adv_std)                      # [groups, G]
    size = torch.tensor([[t.decoding_steps if c.count == "steps" else len(t.output) for t in group]
                         for group, _ in groups])                                       # [groups, G] |τ|
    w, A = trajectory_weights(size, c.objective).flatten(), A.flatten()              # [groups · G]
    trajectories = [t for group, _ in groups for t in group]
    lengths = [len(t.prompt) + len(t.output) + policy.B * t.decoding_steps for t in trajectories]

    def document(i):
        t, L = trajectories[i], len(trajectories[i].output)
        columns = {"A": A[i].expand(L), "w": w[i].expand(L), "logp_sampler": t.logp}
        return trajectory_document(t.prompt, t.output, t.steps, policy.B, policy.mask_id) | columns
    return *make_rows(policy, lengths, document, c), sum(lengths)


def rollout_metrics(mixed, every):
    """Of everything sampled in a step, dropped groups included."""
    trajectories = [t for group, _ in every for t in group]
    n, steps = len(trajectories), sum(t.decoding_steps for t in trajectories)
    distinct = sum(len({tuple(t.answer.tolist()) for t in group}) for group, _ in every)
    return {"reward": sum(sum(r) for _, r in every) / n,
            "tokens_per_step": sum(len(t.output) for t in trajectories) / steps,
            "output_length": sum(len(t.answer) for t in trajectories) / n,
            "truncated": sum(not t.stopped for t in trajectories) / n,
            "groups_dropped": len(every) - len(mixed), "duplicates": 1 - distinct / n}


def rl_step(policy, reference, engine, optimizer, c, problem, reward, step, progress):
    """One step of DiPO. Returns its line of metrics, with the seconds of its phases."""
    # (1)-(4) prompts, rollouts, rewards
    seconds, position = {}, progress["position"]
    mixed, every, position = dynamic_sampling(policy, engine, c, problem, reward, step, position, seconds)
    engine.sleep()
    line = {"stage": "rl", "step": step, "loss": None, "lr": learning_rate(c, step), "grad_norm": None}
    line |= rollout_metrics(mixed, every) | dict.fromkeys(("kl", "entropy", "clip_fraction", "logp_gap"))
    rows, line["imbalance"], line["forward_tokens"] = dipo_rows(policy, c, mixed) if mixed else ([], 0.0, 0)
    tokens = sum(len(t.output) for group, _ in mixed for t in group)            # committed, each read once
    # π_old: the sampler's in Eq. 6; in Eq. 7, 8 sg[π_θ] (None), or π_θ before the first of the updates
    for row in rows:
        with torch.no_grad(), clock(seconds, "seconds_forward"):
            row["logp_old"] = row["logp_sampler"] if c.objective == "eq6" else None
            if c.objective != "eq6" and c.updates > 1:
                row["logp_old"], _ = policy.score(row)
            row["logp_ref"] = reference.score(row)[0] if reference else None
    for update in range(c.updates if rows else 0):
        total = torch.zeros(6, device=policy.device)
        for row in rows:
            with clock(seconds, "seconds_forward"):                            # (5a)
                logp, entropy = policy.score(row)                                       # [R], [R]
            terms = [logp, row["logp_old"], row["A"], row["w"], c.eps, c.eps_high]  # (5b)
            if c.objective == "eq8":
                terms.append(row["copy"][row["reads"]] - 1)                             # [R] a view is a step
            J, clipped = {"eq6": eq6, "eq7": eq7, "eq8": eq8}[c.objective](*terms)
            kl = kl_k3(logp, row["logp_ref"]).sum() / tokens if reference else logp.new_zeros(())
            loss = -J + c.beta * kl
            with clock(seconds, "seconds_backward"):                           # (5c)
                backward(loss, may_stop=update == 0)
            gap = (logp - row["logp_sampler"]).abs().sum() / tokens
            ratios = logp.new_tensor(len(clipped))
            parts = loss, entropy.sum() / tokens, kl, gap, clipped.sum(), ratios
            total += torch.stack([x.detach().float() for x in parts])
        with clock(seconds, "seconds_update"):                                 # (5d)
            line["grad_norm"] = optimizer_step(policy, optimizer, c, step, progress)
        line["loss"], line["entropy"], kl, gap, clipped, ratios = all_sum(total).tolist()
        line |= {"kl": kl if reference else None, "clip_fraction": clipped / ratios}
        line["logp_gap"] = gap if update == 0 else line["logp_gap"]        # later, the trainer has moved on
    with clock(seconds, "seconds_weights"):                                    # (6)
        engine.update_weights()
    progress |= {"step": step, "position": position, "idle": 0 if rows else progress["idle"] + 1}
    progress["rewards"].append(line["reward"])
    return line | {"skipped": progress["skipped"]} | seconds


def train_rl(policy, reference, engine, c, problem, reward, held_out):
    """DiPO on problem(i) → (prompt ids, truth, question). Returns its progress, with every step's reward."""
    optimizer = make_optimizer(policy, c)
    progress = resume(policy, optimizer, c)
    if progress["step"]:
        engine.update_weights()                                        # it was built before they were resumed
    with saved_when_stopped(policy, optimizer, c, progress):
        begun = progress["step"]
        bar = tqdm(range(c.steps), "rl", initial=begun, disable=rank() > 0)
        for step in range(begun, c.steps + 1):
            due = step in (0, c.steps) or (c.eval_every and step % c.eval_every == 0)
            if held_out and due and progress["evaluated"] < step:
                rows = evaluate(policy, engine, c, held_out, reward, step)
                progress["accuracy"] = progress["accuracy"][:1] + [rows[0]["accuracy"]]     # first, last
                progress["evaluated"] = step
            progress["done"] = step == c.steps
            if step > begun and step % c.save_every == 0 or progress["done"]:
                save_policy(policy, os.path.join(c.out, "rl"))
                save_state(policy, optimizer, c, progress)
            if progress["done"]:
                break
            step, start = step + 1, time.perf_counter()
            line = rl_step(policy, reference, engine, optimizer, c, problem, reward, step, progress)
            write_metrics(c, line | {"seconds": time.perf_counter() - start})
            bar.set_postfix(reward=f"{line['reward']:.3f}", loss=f"{line['loss'] or 0:.4f}")
            bar.update()
            if line["logp_gap"] is not None and not line["logp_gap"] <= c.max_logp_gap:
                fail(f"step {step}: log π of the {c.engine} engine and of the trainer differ by "
                     f"{line['logp_gap']:.3g} on average, above --max-logp-gap {c.max_logp_gap}: their "
                     "weights, masks or temperatures are not the same")
            if progress["idle"] == 20:
                say("20 steps in a row without a group of unequal rewards, so nothing to learn from: try "
                    "easier or harder problems, a larger --group-size, or more SFT")
    return progress


# ---- 10. Evaluation ----------------------------------------------------------------------------------------


def evaluate(policy, engine, c, problems, reward, step=None):
    """Table 1 on (prompt ids, truth, question): its rows, printed, and every answer in OUT/eval.jsonl.

    One row for the run's own decoding and, with --thresholds, for static and for dynamic at each of them.
    step: of RL, whose rows also go to OUT/metrics.jsonl."""
    what = {"stage": "eval" if step is None else "rl eval", "step": step}
    own, rows = (c.unmask, c.threshold), []
    answers = f"{c.samples} sampled answers" if c.samples else "one greedy answer"
    say(f"{c.model if step is None else f'rl, step {step}'}: {len(problems)} problems, {answers} each\n"
        "decoding         accuracy    s.e.  tokens/step  tokens/forward  length  truncated")
    swept = [("static", c.threshold), *(("dynamic", x) for x in c.thresholds)] if c.thresholds else []
    for rule, threshold in dict.fromkeys([own, *swept]):
        c.unmask, c.threshold = rule, threshold                        # both engines look there at every step
        name = f"{rule} {threshold if rule == 'dynamic' else c.tokens_per_step}"
        lines = [what | {"decoding": name} | x for x in answer(policy, engine, c, problems, reward)]
        rows.append({"decoding": name} | table_1(lines))
        say("{:14} {:10.3f} {:7.3f} {:12.2f} {:15.2f} {:7.1f} {:10.3f}".format(*rows[-1].values()))
        if rank() == 0:
            with open(os.path.join(c.out, "eval.jsonl"), "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        if step is not None:
            write_metrics(c, what | rows[-1])
    for line in [line for line in lines if line["sample"] == 0][:5]:
        say("    {question!r:.40} -> {answer!r:.60}, truth {truth!r}, reward {reward:g}".format(**line))
    c.unmask, c.threshold = own
    return rows


def answer(policy, engine, c, problems, reward):
    """Answers to all problems, by all ranks, and what they took: one dict each, in order.

    forwards: the decoding steps, and one pass for the clean keys and values of every block but the last; not
    the prompt's."""
    mine = [(i, g) for i in range(len(problems)) for g in range(max(1, c.samples))][rank()::world()]
    keys, lines = [(c.seed, "eval", 0, i, g) for i, g in mine], []
    with suppress(Stopped):                                            # `gather` tells the other ranks
        found = engine.generate([problems[i][0] for i, _ in mine], keys, greedy=c.samples == 0)
        for (i, g), t in zip(mine, found):
            prompt, truth, question = problems[i]
            text = policy.tokenizer.decode(t.answer)
            blocks = (len(prompt) + len(t.output)) // policy.B - len(prompt) // policy.B
            lines.append({
                "problem": i, "sample": g, "question": question, "truth": truth, "answer": text,
                "reward": float(reward(text, truth)), "truncated": not t.stopped, "length": len(t.answer),
                "tokens": len(t.output), "steps": t.decoding_steps,
                "forwards": t.decoding_steps + blocks - 1})
    return sorted(gather(lines), key=lambda line: (line["problem"], line["sample"]))


def table_1(lines):
    """One row of Table 1, from the answers. The standard error is that of a mean over problems."""
    def total(name):
        return sum(line[name] for line in lines)
    by_problem = {}
    for line in lines:
        by_problem.setdefault(line["problem"], []).append(line["reward"])
    means = torch.tensor([sum(r) / len(r) for r in by_problem.values()], dtype=torch.float64)
    error = means.std().item() / len(means)**0.5 if len(means) > 1 else math.nan
    return {"accuracy": means.mean().item(), "standard_error": error,
            "tokens_per_step": total("tokens") / total("steps"),
            "tokens_per_forward": total("tokens") / total("forwards"),
            "output_length": total("length") / len(lines), "truncated": total("truncated") / len(lines)}


def show(policy, engine, c, problem):
    """One answer as it is decoded: a line a decoding step, with the probabilities of what it commits, the
    sampler's and the trainer's, who has them all from one forward."""
    prompt, _, question = problem
    with suppress(Stopped):                                            # `gather` tells the other ranks
        t, = engine.generate([prompt], [(c.seed, "show", 0, 0, 0)], greedy=c.samples == 0)
    gather([])
    document = trajectory_document(t.prompt, t.output, t.steps, policy.B, policy.mask_id)
    (row, *_), _ = make_rows(policy, [len(document["ids"])], lambda i: document, c)
    with torch.no_grad():
        scored = policy.score(row)[0].cpu()                                             # [L]
    if rank() > 0:                                                     # it has no document
        return
    P, B = len(prompt), policy.B
    words = [repr(policy.tokenizer.decode(token))[1:-1] for token in [*prompt, *t.output]]
    steps, width = [0] * P + t.steps.tolist(), max(map(len, words[P // B * B:]))
    say(f"{question}\n\nblock step  {'the block after it':{B * width + 3 * B - 3}}  "
        "committed, π when sampled, as scored")
    for k in range(P // B, len(words) // B):
        block = range(k * B, k * B + B)
        for s in range(1, max(steps[p] for p in block) + 1):
            shown = " | ".join(f"{words[p] if steps[p] <= s else '·':{width}}" for p in block)
            new = (f"{words[p]!r} {t.logp[p - P].exp():.3f} {scored[p - P].exp():.3f}"
                   for p in block if steps[p] == s)
            say(f"{k:5} {s:4}  {shown}  {', '.join(new)}")
    gap = (scored - t.logp).abs().max()
    say(f"\n{len(t.output)} tokens in {t.decoding_steps} decoding steps. One forward of "
        f"{len(document['ids'])} tokens scores them all; largest |Δ log π| {gap:.1e}")


# ---- 11. The stages ----------------------------------------------------------------------------------------


def sft_examples(policy, c, chats):
    """example(i) → (tokens [S], P), from chats or, without them, from the built-in task."""
    if chats:
        examples = usable(policy, c, c.data, [policy.example(chat) for chat in chats], "examples")
        return lambda i: nth(examples, i, c.seed, "sft")

    def example(i):
        question, work, _ = arithmetic((c.seed, "sft", i))
        return policy.example([{"role": "user", "content": question}, {"role": "assistant", "content": work}])
    return example


def built_in(policy, key, held_out=False):
    """(prompt ids, truth, question) of the built-in task."""
    question, _, truth = arithmetic(key, held_out)
    return policy.prompt([{"role": "user", "content": question}]), truth, question


def from_file(policy, c, path, records):
    """[(prompt ids, truth, question)] of the problems in a file, asked as the paper asks."""
    asked = [[{"role": "user", "content": question + INSTRUCTION}] for question, _ in records]
    encoded = [(policy.prompt(chat), truth, question) for chat, (question, truth) in zip(asked, records)]
    return usable(policy, c, path, encoded, "prompts")


def eval_problems(policy, c, path, records):
    """What stage eval evaluates, and RL with --eval-data or on the built-in task."""
    if records:
        return from_file(policy, c, path, records)
    return [built_in(policy, ("held out", i), True) for i in range(c.held_out)]


def rl_problems(policy, c, records, eval_records=None):
    """problem(i) → (prompt ids, truth, question), and a list of those that are only evaluated."""
    if not records:
        return (lambda i: built_in(policy, (c.seed, "rl", i))), eval_problems(policy, c, None, None)
    problems = from_file(policy, c, c.data, records)
    if eval_records:
        return (lambda i: nth(problems, i, c.seed, "rl")), eval_problems(policy, c, c.eval_data, eval_records)
    problems = [nth(problems, i, c.seed, "split") for i in range(len(problems))]
    n = min(c.held_out, len(problems) // 10)
    held_out, training = problems[:n], problems[n:]
    return (lambda i: nth(training, i, c.seed, "rl")), held_out


def run_stage(c, folder, records, reward, eval_records=None):
    """One stage on the checkpoint in folder; sft and rl leave theirs in OUT/sft and OUT/rl."""
    config = read_config(folder, c)
    if c.stage in ("sft", "rl"):
        announce(c, config)
    if c.stage == "sft":
        policy = load_policy(folder, replace(c, temperature=1.0), config)    # Eq. 3 is about p_θ itself
        train_sft(policy, c, sft_examples(policy, c, records))
        return say(f"sft: {c.steps} steps; checkpoint: {os.path.join(c.out, 'sft')}")
    policy = load_policy(folder, c, config)
    reference = load_policy(folder, c, config) if c.stage == "rl" and c.beta else None
    with closing({"torch": TorchEngine, "lmdeploy": LMDeployEngine}[c.engine](policy, c)) as engine:
        if c.stage == "show" and c.prompt is not None:
            prompt = policy.prompt([{"role": "user", "content": c.prompt}])
            show(policy, engine, c, *usable(policy, c, "--prompt", [(prompt, "", c.prompt)], "prompts"))
        elif c.stage == "show":
            show(policy, engine, c, eval_problems(policy, c, c.data, records)[0])
        elif c.stage == "eval":
            evaluate(policy, engine, c, eval_problems(policy, c, c.data, records), reward)
            say(f"every answer: {os.path.join(c.out, 'eval.jsonl')}")
        else:
            problem, held_out = rl_problems(policy, c, records, eval_records)
            if not held_out:
                say("rl: no problems are held out, so that nothing is evaluated; see --held-out, --eval-data")
            progress = train_rl(policy, reference, engine, c, problem, reward, held_out)
            accuracy = " -> ".join(f"{x:.3f}" for x in progress["accuracy"])
            accuracy = f"{'sampled' if c.samples else 'greedy'} accuracy {accuracy}, " if accuracy else ""
            rewards = progress["rewards"]
            first, last = (sum(r) / max(1, len(r)) for r in (rewards[:5], rewards[-10:]))
            say(f"rl: {accuracy}reward {first:.3f} (first 5 steps) -> {last:.3f} (last 10); checkpoint: "
                f"{os.path.join(c.out, 'rl')}")


def choose_out(c):
    """--out, or a fresh folder for the tiny model and for eval, and one for each checkpoint trained."""
    if c.out:
        return c.out
    if c.model != "tiny" and c.stage != "eval":
        parent, name = os.path.split(c.model.rstrip("/"))
        return parent if name in ("sft", "rl") and parent else os.path.join("runs", name)
    name = "eval" if c.stage == "eval" else "tiny"
    return next(out for out in (f"runs/{name}-{n}" for n in itertools.count()) if not os.path.exists(out))


def finished(c):
    """Whether OUT has this stage already. Refuses an OUT that holds it half done, or cannot be written."""
    if c.stage == "eval" and os.path.exists(os.path.join(c.out, "eval.jsonl")):
        fail(f"{os.path.join(c.out, 'eval.jsonl')} exists: name a new folder with --out")
    states, target = saved_states(c), os.path.join(c.out, c.stage)
    begun = c.stage in ("sft", "rl") and os.path.isdir(state_folder(c))
    done = c.stage in ("sft", "rl") and os.path.isdir(target)
    if begun and done:
        last = os.path.join(state_folder(c), str(max(states, default=0)), "progress.json")
        done = max(states, default=0) >= c.steps and read_json(last).get("done", True)
    if begun and not done and not c.resume:
        fail(f"{state_folder(c)} holds the stage up to step {max(states, default=0)} of {c.steps}: --resume "
             "continues it, another --out starts anew")
    try:
        os.makedirs(c.out, exist_ok=True)
        with tempfile.TemporaryFile(dir=c.out):
            pass
    except OSError as error:
        fail(f"--out {c.out}: {error}")
    return done


def main(argv=None):
    given = parse_flags(argv)
    c = configure(given, given.stage or "rl")
    if int(os.environ.get("WORLD_SIZE", 1)) % (c.hsdp or 1):
        fail(f"--hsdp {c.hsdp}: must divide the number of ranks, {os.environ.get('WORLD_SIZE', 1)}")
    if c.resume and c.model == "tiny" and not c.out:
        fail("--resume: say which run with --out")
    stop_signal.clear()
    records = c.data and (read_chats if c.stage == "sft" else read_problems)(c.data)
    eval_records = c.eval_data and read_problems(c.eval_data, "--eval-data")
    reward = load_reward(c) if c.stage in ("rl", "eval") else None
    start_ranks()
    tiny, (c.out, *_) = c.model == "tiny", gather([choose_out(c)])         # one folder for all ranks
    start = os.path.join(c.out, "init") if tiny else find_model(c.model)
    if not tiny:
        read_config(start, c)                                          # refuses before anything is written
    if c.stage != "show" and finished(c):
        say(f"{os.path.join(c.out, c.stage)} exists: this stage is finished. Name a new folder with --out")
        return
    # The tiny model's rl begins with sft on the built-in task, unless OUT has that; a checkpoint's does not.
    not_for_sft = dict.fromkeys(("steps", "lr", "schedule", "warmup", "data", "max_length", "eval_data"))
    sft = replace(configure(argparse.Namespace(**vars(given) | not_for_sft), "sft"), out=c.out)
    sft_first = tiny and c.stage == "rl" and not finished(sft)
    signal.signal(signal.SIGTERM, lambda *_: stop_signal.set())
    if tiny and rank() == 0 and not os.path.exists(os.path.join(start, "model.safetensors")):
        build_tiny(start, c.block_size, c.seed)
    all_sum(torch.zeros(1))                                            # it is there for all ranks
    try:
        if sft_first:
            run_stage(sft, start, None, None)
        start = os.path.join(c.out, "sft") if tiny and c.stage == "rl" else start
        run_stage(c, start, records, reward, eval_records)
    except Stopped:
        say(f"stopped by SIGTERM; --resume --out {c.out} goes on after the last completed step"
            if c.stage in ("sft", "rl") else "stopped by SIGTERM")
        sys.exit(143)


if __name__ == "__main__":
    main()
