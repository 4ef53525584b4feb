# SPDX-License-Identifier: MIT
"""DiRL (arXiv 2512.22234) in one file: post-training of block diffusion language models, SFT, then RL (DiPO).

    torchrun dirl.py --stage rl                                               a tiny model: SFT, then DiPO
    torchrun dirl.py --stage sft --model MODEL --data chats.jsonl --out OUT   SFT of an SDAR or Qwen3 model
    torchrun dirl.py --stage rl --model OUT/sft --data math.jsonl --out OUT   DiPO from there
    torchrun dirl.py --stage eval --model OUT/rl --data test.jsonl            the columns of Table 1
    python dirl.py --stage show --model OUT/rl --data test.jsonl              one answer, step by step
    python dirl.py --help                                                     the flags, the paper's values

Contents. A reader may stop at the end of any part.
    I    The paper, equation by equation, down to the cut line: functions on plain tensors that import only
         torch. Each names its equation or section; the README has a table of them
    II   DiRL at work: the policy, its sampler, LMDeploy, the SFT loop, the RL loop (Fig. 3), evaluation
    III  The workshop: flags, data and rewards, checkpoints, rows, saving and resuming, main

Symbols. B block size; k block; t ∈ [0, 1] noise time; s decoding step within a block, from 1 (the paper's
other t); P prompt length; L output length; S = P + L; V views of a document; N tokens of a packed row; R
those of them that a loss reads; G group size; τ a trajectory, |τ| its decoding steps; `threshold` the
confidence threshold of section 5.1 (the paper's other τ); sg[·] stops the gradient: `.detach()`.

Departures. Where the paper is silent or contradicts itself, this file chooses. 1 to 11 change the numbers.
   1. The KL term is k3 in value, and its expected gradient is that of the printed KL(π_θ‖π_ref). Plain k3
      has the gradient of KL(π_ref‖π_θ).
   2. β KL is a mean over the tokens of the batch, while J is a mean over its groups of sums divided by |τ|.
   3. |τ| counts decoding steps, as printed; the authors' code takes (most steps of any block) · L / B. Eq. 6
      has no 1/G, as printed.
   4. The advantage is r - mean, as in the equations; section 3.2's words say "normalized" (--adv-std).
   5. A position's confidence is its top-1 probability, as the paper says. Engines and the authors' code take
      that of the token drawn there (--confidence drawn). Which positions are committed then depends on the
      tokens drawn, so π(o) is no longer the probability of committing o, and the gradient is biased.
   6. `dynamic` commits at a confidence equal to the threshold too; the paper says "exceeds".
   7. [MASK] is never sampled and has probability 0 in the score. The temperature applies to both. There is no
      top-k and no top-p.
   8. The clip is symmetric, as printed; the authors' code adds 0.08 above (--eps-high 0.28).
   9. SFT draws one t for every block, as Eq. 3 is written; the authors' code one for every example. t is at
      least 1e-3, w(t) = 1/t is the ELBO's weight, the sum is divided by the answer tokens of the batch.
  10. The tokens after the stop token in the last block belong to the trajectory: the model drew them.
  11. Groups of equal rewards are dropped under Eq. 6 and 7 too, and their KL term with them. A step that has
      fewer mixed groups than --prompts after 4 rounds of rollouts trains on those it has.
  12. --importance C, off by default, corrects Eq. 7 and 8 for a sampler that is not the trainer, as LMDeploy
      in bfloat16 with other kernels is not.
  13. One forward scores a whole trajectory: its clean copy stands once, and each state of a block on the way
      is B more tokens (a view), where Fig. 4b repeats the whole sequence. The numbers are the same.
"""
import torch
from torch.nn.attention.flex_attention import BlockMask

# I. THE PAPER
# A document is one sequence and its views: a view is one block as it once stood, with some tokens masked. A
# row is some documents, one after the other. Both are dicts of these columns, with one value for each token
# [N] or for each token that a loss reads [R]:
#
#   ids         [N]   token ids                                                     layout
#   pos         [N]   position in the sequence; its block k is pos // B             layout
#   view        [N]   0 the clean copy, v ≥ 1 the number of a view                  layout; in a row join
#   doc         [N]   number of the document in the row, -1 what fills the row      join
#   reads       [R]   indices of the tokens where log π_θ is read                   who makes the document
#   target      [R]   the token id whose log π_θ is read there                      who makes the document
#   w_t         [R]   SFT: w(t), the weight of the noise time                       noised_document
#   A, w        [R]   RL: advantage and normaliser of the token's trajectory        dipo_rows
#   logp_sampler, logp_old, logp_ref [R]   RL: the sampler's log π, π_old, π_ref    dipo_rows, train_on
#
# ---- Eq. 1-2, Fig. 4b: one forward, and who sees whom in it ----------------------------------------------

def mask_mod(doc, view, block):
    """Fig. 4b as a FlexAttention mask_mod: one rule for SFT, scoring and decoding.

    doc, view, block: [N] integers for the tokens of a row: its document; 0 for the clean copy, or the number
    v ≥ 1 of its view; the block index k. Eq. 1 conditions on b^{<k}, the earlier clean blocks, and Eq. 2 on
    b_t^k, the token's own copy of its block. Three clean blocks and a view of blocks 1 and 2; a query's line
    has an x under the keys that it sees:

                   clean 0   clean 1   clean 2   view of 1   view of 2
        clean 0       x         .         .          .           .
        clean 1       x         x         .          .           .
        clean 2       x         x         x          .           .
        view of 1     x         .         .          x           .
        view of 2     x         x         .          .           x
    """
    def sees(batch, head, q, kv):
        same_document = doc[q] == doc[kv]
        own_copy_of_block = (view[q] == view[kv]) & (block[q] == block[kv])
        earlier_clean_block = (view[kv] == 0) & (block[kv] < block[q])
        return same_document & (own_copy_of_block | earlier_clean_block)
    return sees


def block_mask(sees, N, device, tile=128):
    """Fig. 4b's mask for FlexAttention; N is a multiple of tile. A BlockMask's blocks are not the model's
    but tiles of pairs (query, key): the kernel skips empty ones, and asks `sees` in partial ones only. Made
    for `tile` queries at a time against all keys: its memory is tile · N and never N · N."""
    kv = torch.arange(N, device=device)
    counts = [sees(0, 0, q[:, None], kv).view(tile, -1, tile).sum((0, 2)) for q in kv.split(tile)]
    visible = torch.stack(counts)                                # [N/tile, N/tile] visible pairs in each tile
    full = visible == tile * tile
    partial = (visible > 0) & ~full

    def listed(tiles):                  # of each row of tiles: how many are set, and all columns, those first
        return tiles.sum(1, dtype=torch.int32), tiles.int().argsort(dim=1, descending=True, stable=True).int()
    tiles = [x[None, None] for x in (*listed(partial), *listed(full))]
    return BlockMask.from_kv_blocks(*tiles, BLOCK_SIZE=tile, mask_mod=sees)


def layout(clean, blocks, views, B):
    """Fig. 4b's input, one document: the clean copy of a sequence, then views: blocks as they once stood.

    clean: [S] tokens, S a multiple of B; blocks: [V] block index of each view; views: [V, B] its tokens.
    Returns ids, pos, view: [S + V·B]. A view has the position ids of its block, so that block = pos // B
    everywhere."""
    S, V = len(clean), len(blocks)
    inside = torch.arange(B)
    return {"ids": torch.cat([clean, views.flatten()]),
            "pos": torch.cat([torch.arange(S), (blocks[:, None] * B + inside).flatten()]),
            "view": torch.cat([torch.zeros_like(clean), torch.arange(1, V + 1).repeat_interleave(B)])}


def join(documents, length=None):
    """Documents of Fig. 4b → one row of `length` tokens (None: as many as there are); what fills it up is a
    last document, number -1.

    Adds doc. View numbers become unique in the row, `reads` indices into it; all else stays as it is. With
    B = 2, "a b | M b" and "c d | M M", two documents of one block and one view of it, become

        ids     a b M b c d M M
        pos     0 1 0 1 0 1 0 1
        view    0 0 1 1 0 0 2 2
        doc     0 0 0 0 1 1 1 1
        reads   2 6 7
    """
    parts, tokens, views = [], 0, 0
    for i, d in enumerate(documents):
        parts.append({**d, "doc": torch.full_like(d["ids"], i), "reads": d["reads"] + tokens,
                      "view": torch.where(d["view"] > 0, d["view"] + views, 0)})
        tokens += len(d["ids"])
        views += int(d["view"].max())
    fill = torch.zeros((length or tokens) - tokens, dtype=torch.long)
    parts.append({"ids": fill, "pos": torch.arange(len(fill)), "view": fill, "doc": fill - 1})
    return {name: torch.cat([p[name] for p in parts if name in p]) for name in parts[0]}


# ---- Eq. 2: the policy, and its log-probabilities where a loss reads them --------------------------------

def log_policy(logits, temperature, mask_id):
    """Eq. 2: log π_θ(· | b_t^k, b^{<k}), [..., vocab], at least float32. The one definition of the policy,
    for sampler and scorer alike: temperature, and [MASK] (mask_id) forbidden."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:                       # a division by 1 would read and write all logits once more
        logits = logits / temperature
    forbidden = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)


def log_probs(hidden, head, target, temperature, mask_id, chunk=512):
    """Eq. 2, read where a loss needs it: log π_θ(target_r | …) [R] and the entropy of π_θ there [R], nats.

    hidden: [R, d]; head: [vocab, d], the vocabulary projection; target: [R]. At most chunk · vocab logits
    exist at a time: the backward computes those of several chunks again. The entropy carries no gradient."""
    def one(hidden, target):
        log_pi = log_policy(hidden @ head.T, temperature, mask_id)                      # [chunk, vocab]
        return log_pi.gather(1, target[:, None])[:, 0], torch.special.entr(log_pi.detach().exp()).sum(1)
    if len(hidden) <= chunk:                               # one chunk: to forget its logits saves no memory
        return one(hidden, target)
    parts = [torch.utils.checkpoint.checkpoint(one, h, y, use_reentrant=False, preserve_rng_state=False)
             for h, y in zip(hidden.split(chunk), target.split(chunk))]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


# ---- Eq. 3: SFT ------------------------------------------------------------------------------------------

def noised_document(tokens, P, u, z, B, mask_id):
    """Eq. 3's forward process on one example: each answer token is masked with probability t = 1 - α_t.

    tokens: [S] prompt and answer, S a multiple of B; P: prompt length; u: [K'] uniform, one a block from the
    block P // B on; z: [K', B] uniform, one a token. Prompt tokens in the first of these blocks stay clean
    and carry no loss. A block without a masked token has no loss and gets no view. A position predicts
    itself: nothing is shifted. With B = 2, P = 1 and the answer's b and d masked, a b c d becomes

        ids    a b c d | a M | c M
        reads            5     7     where b and d, the targets, are predicted
    """
    t = 1e-3 + (1 - 1e-3) * u                                                           # [K'] noise time
    blocks = torch.arange(P // B, len(tokens) // B)                                     # [K'] block index k
    clean = tokens.view(-1, B)[P // B:]                                                 # [K', B] b_0^k
    is_answer = blocks[:, None] * B + torch.arange(B) >= P
    masked = (z < t[:, None]) & is_answer                                           # [K', B] (b_t^k)_j = MASK
    used = masked.any(1)
    document = layout(tokens, blocks[used], torch.where(masked, mask_id, clean)[used], B)
    document["reads"] = len(tokens) + masked[used].flatten().nonzero()[:, 0]             # [R]
    document["target"] = clean[masked]                                                  # [R] (b_0^k)_j
    document["w_t"] = (1 / t)[:, None].expand_as(masked)[masked]                        # [R] w(t) = 1/t
    return document


def sft_loss(logp, w_t, answer_tokens):
    """Eq. 3: L = Σ_k w(t) Σ_j 1[(b_t^k)_j = MASK] CE(p_θ(· | b_t^k, b^{<k}), (b_0^k)_j), per answer token.

    logp, w_t: [R], log p_θ and w(t) of the masked tokens; answer_tokens: the batch's, masked or not."""
    return -(w_t * logp).sum() / answer_tokens


# ---- Eq. 4-5: GRPO's parts -------------------------------------------------------------------------------

def advantage(rewards, divide_by_std=False):
    """Section 2.2: A_i = r_i - (1/G) Σ_j r_j, [groups, G], computed in float64; section 3.2's "normalized"
    also divides by the group's standard deviation (the population's); then A = 0 where rewards are equal but
    for rounding: where the deviation is below 1e-9 of the largest |r|."""
    r = rewards.double()
    A = r - r.mean(1, keepdim=True)
    if divide_by_std:
        std = A.square().mean(1, keepdim=True).sqrt()
        A = torch.where(std > 1e-9 * r.abs().amax(1, keepdim=True), A / std, 0.0)
    return A.to(rewards.dtype)


def prob_ratio(log_ratio, A):
    """Eq. 6-8: ρ = exp(log π_θ - log π_old), for C_ε. Where A ≥ 0 it stops at e^80, long after the clip has
    taken over: at infinity the clipped gradient would be 0 · ∞, not 0. Where A < 0 nothing bounds it."""
    return torch.where(A >= 0, log_ratio.clamp_max(80.0), log_ratio).exp()


def C_eps(ratio, A, eps, eps_high):
    """Eq. 5-8: C_ε(ρ, A) = min(ρ A, clip(ρ, 1-ε, 1+ε) A), elementwise; eps_high: the ε of the upper side."""
    return torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps_high) * A)


def kl_term(logp, logp_ref):
    """Eq. 5-7: KL[π_θ‖π_ref] of tokens from π_θ, each: π_ref/π_θ - 1 - log(π_ref/π_θ), the estimator k3, with
    the gradient log(π_θ/π_ref) ∇ log π_θ.

    That is the gradient of π_θ/sg[π_θ] · k3, whose expectation is ∇ KL(π_θ‖π_ref), without its large terms
    that cancel."""
    log_ratio = (logp_ref - logp).detach()
    return log_ratio.expm1() - log_ratio - log_ratio * (logp - logp.detach())


# ---- section 3.2: a trajectory and what the model saw ----------------------------------------------------

def trajectory_document(prompt, output, steps, B, mask_id):
    """Section 3.2: a trajectory τ, one document; as a block stood before its step s, τ(1:s-1), it is a view.

    prompt: [P]; output: [L], whole blocks to the end; steps: [L], the step map, the step within its block
    (from 1) at which each output token was committed. The view (k, s) shows the prompt's tokens and those
    committed before s, and [MASK] elsewhere. reads: [L], in the order of the output: where each
    log π_θ(o | τ(1:s-1)) is read. The document has P + L + B Σ_k steps_k tokens. One forward of it replaces

        for k in the blocks of the output:
            for s in 1 to the last step of block k:
                seen = tokens[:(k + 1) * B]                  # what the model saw: the earlier blocks, whole,
                seen[the positions of block k committed at s or later] = mask_id
                log_pi = log_policy(model(seen))             # one forward for every decoding step
                read log_pi of the tokens committed at step s

    Example, in brackets below: B = 2, prompt P P P, output a b c with steps 1 1 2. Blocks: P P | P a | b c.
    The document is P P P a b c, then the views P M | M M | b M, in which a, b and c are read."""
    P, S = len(prompt), len(prompt) + len(output)
    tokens = torch.cat([prompt, output]).long()                                         # [S]
    step = torch.cat([torch.zeros_like(prompt), steps]).view(-1, B)          # [K, B] (0 0 | 0 1 | 1 2)
    count = step.max(1).values                                               # [K] steps_k (0 1 2)
    before = count.cumsum(0) - count                                         # [K] views before it (0 0 1)
    blocks = torch.arange(S // B).repeat_interleave(count)                   # [V] block of each view (1 2 2)
    s = torch.arange(len(blocks)) - before[blocks] + 1                       # [V] its decoding step (1 1 2)
    views = torch.where(step[blocks] < s[:, None], tokens.view(-1, B)[blocks], mask_id)  # [V, B]
    document = layout(tokens, blocks, views, B)
    p = torch.arange(P, S)                                                   # [L] positions of o (3 4 5)
    document["reads"] = S + (before[p // B] + steps - 1) * B + p % B         # [L] (7 8 11)
    document["target"] = tokens[P:]
    return document


# ---- Eq. 6, 7, 8: DiPO -----------------------------------------------------------------------------------
#           the ratio is that of    π_old, its denominator        w, over the number of groups    KL term
#   eq6     a token                 the sampler's, as recorded    1/|τ_i|                         β KL
#   eq7     a token                 sg[π_θ]                       1/Σ_j |τ_j| of its group        β KL
#   eq8     a step: its tokens      sg[π_θ]                       1/Σ_j |τ_j| of its group        none
#
# With one update a batch the ratios of Eq. 7 and 8 are 1 and the clip is idle: both have the gradient of
# Σ w A log π_θ. With several updates, their π_old is π_θ before the first.

def trajectory_weights(decoding_steps, objective):
    """The normaliser w of each trajectory [groups, G], from |τ| [groups, G] of the whole batch: Eq. 6's
    1/|τ_i|, or Eq. 7 and 8's 1/Σ_j |τ_j| with j over the same group; over the number of groups: a mean."""
    of_group = decoding_steps.sum(1, keepdim=True).expand_as(decoding_steps)
    return 1 / (decoding_steps if objective == "eq6" else of_group) / len(decoding_steps)


def importance_weights(logp, logp_sampler, trajectory, cap):
    """Departure 12: min(C, Π π_θ(o | τ(1:s-1)) / π_sampler(o | τ(1:s-1))) of each token's trajectory, [R]: a
    factor of its w, so that tokens from the sampler stand for tokens that π_θ would draw in the same order.

    logp: [R] log π_θ before the update; logp_sampler: [R]; trajectory: [R] its number in the row, from 0. The
    probabilities of committing here or there cancel in the ratio, unless what was drawn decides it."""
    n = int(trajectory.max()) + 1 if len(trajectory) else 0
    log_weight = logp.new_zeros(n).index_add(0, trajectory, logp - logp_sampler)                    # [n]
    return log_weight.exp().clamp_max(cap)[trajectory]


def eq6(logp, logp_old, A, w, eps, eps_high):
    """Eq. 6: J = Σ_i 1/|τ_i| Σ_t Σ_{o_k ∈ τ_i(t)} C_ε(π_θ(o_k | τ_i(1:t-1)) / π_old(o_k | τ_i(1:t-1)), A_i).

    All [R], one a committed token; logp_old: the sampler's; w: 1/|τ_i| over the number of groups. Returns J,
    a mean over the groups of the batch, and where the clip acts."""
    ratio = prob_ratio(logp - logp_old, A)
    objective = C_eps(ratio, A, eps, eps_high)
    return (w * objective).sum(), objective < ratio * A


def eq7(logp, logp_old, A, w, eps, eps_high):
    """Eq. 7: J = 1/Σ_i |τ_i| Σ_i Σ_t Σ_{o_k ∈ τ_i(t)} C_ε(π_θ(o_k | τ_i(1:t-1)) / sg[the same], A_i).

    As Eq. 6, line by line, but for logp_old: None for sg[π_θ], or π_θ's before the first of several updates;
    and w: 1/Σ_i |τ_i| over the number of groups."""
    ratio = prob_ratio(logp - (logp.detach() if logp_old is None else logp_old), A)
    objective = C_eps(ratio, A, eps, eps_high)
    return (w * objective).sum(), objective < ratio * A


def eq8(logp, logp_old, A, w, eps, eps_high, step):
    """Eq. 8: J = 1/Σ_i |τ_i| Σ_i Σ_t C_ε(π_θ(τ_i(t) | τ_i(1:t-1)) / sg[π_θ(τ_i(t) | τ_i(1:t-1))], A_i).

    As Eq. 7, but the ratio is that of a decoding step's tokens together. step: [R], the number in the row of
    the decoding step that committed the token, from 0; all tokens of a step have one A and one w. Returns J
    and, for every step, whether the clip acts."""
    log_ratio = logp - (logp.detach() if logp_old is None else logp_old)
    T = int(step.max()) + 1 if len(step) else 0                                    # decoding steps in the row
    A, w = (x.new_zeros(T).index_copy(0, step, x) for x in (A, w))                                  # [T]
    ratio = prob_ratio(logp.new_zeros(T).index_add(0, step, log_ratio), A)        # [T] of joint probabilities
    objective = C_eps(ratio, A, eps, eps_high)
    return (w * objective).sum(), objective < ratio * A


# ---- section 5.1: decoding -------------------------------------------------------------------------------

def draw(log_pi, u):
    """Section 5.1: a token a position from π, its distribution function inverted at u; none with π = 0.

    log_pi: [..., vocab]; u: [...] of the same dtype, in [0, 1)."""
    cdf = log_pi.exp().cumsum(-1)
    # right: past tokens of π = 0; u < 1 keeps it below the last value, which rounding leaves near 1
    return torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)[..., 0]


def unmask(top1, drawn, masked, rule, tokens_per_step, threshold, confidence):
    """Section 5.1: which masked positions of a block are committed at this step, bool [n, B].

    top1, drawn: [n, B] log π of the likeliest token of each position and of the one drawn there; masked:
    [n, B]. static: the tokens_per_step most confident; sequential: the leftmost ones; dynamic: all of at
    least `threshold`, and always the most confident one. Confidence is a position's top-1 probability
    ("top1"), which no draw can change, or the drawn token's ("drawn", see departure 5)."""
    score = (top1 if confidence == "top1" else drawn).exp()
    if rule == "sequential":
        score = -torch.arange(masked.shape[1], device=masked.device).expand_as(masked).float()
    score = score.masked_fill(~masked, -torch.inf)
    place = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # [n, B] 0 the most confident
    chosen = (score >= threshold) | (place == 0) if rule == "dynamic" else place < tokens_per_step
    return masked & chosen


# ================================================ cut line ==================================================
# Above: the paper. Below: II. DiRL AT WORK
# `c` holds the flags of the run, such as c.group_size (`parse_flags`, in part III). A Policy is a model and
# all that is needed to speak with it. An engine makes rollouts: generate(prompts, keys, greedy) returns
# Trajectories, update_weights() gives it the trainer's weights, sleep() frees its memory until then, close()
# ends it. Every rank runs all of this file, on its own share of the prompts and rows.
import argparse
import asyncio
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

# ---- ranks, and what they say ----------------------------------------------------------------------------

PATIENCE = timedelta(days=1)     # for which a rank waits for the others: a rollout or a reward may be slow


def rank():
    return int(os.environ.get("RANK", 0))                              # torchrun's, known from the start


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def gather(items):
    """The lists of all ranks, one after the other."""
    lists = [items] * world()
    if world() > 1:
        dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def all_sum(tensor):
    """Over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier():
    all_sum(torch.zeros(1))


def say(text):
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def fail(message, common=False):
    """Bad input: one line, exit code 2. common: all ranks find this error, and rank 0 says it; so it is
    before they have met."""
    if rank() == 0 or not (common or not dist.is_initialized()):
        print(f"dirl.py: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(10)                           # or torchrun ends rank 0 before it speaks
    sys.exit(2)


# ---- the policy: transformers' Qwen3 under our mask ------------------------------------------------------

@dataclass
class Policy:
    """A model and all that is needed to speak with it."""
    model: object                # Qwen3ForCausalLM, float32 weights
    tokenizer: object
    folder: str                  # the checkpoint it came from
    config: dict                 # its config.json, in SDAR's format
    end_id: int                  # ends a turn in the chat template
    eos_ids: list                # of config.json and generation_config.json
    temperature: float
    thinking: bool = True        # False: the prompt closes the template's <think>
    added_mask: bool = False     # to the tokenizer, which had none

    def __post_init__(self):
        self.B, self.mask_id = self.config["block_size"], self.config["mask_token_id"]
        self.eos_id = self.eos_ids[0]                                  # fills the last block of an SFT answer
        self.stop_ids = torch.tensor(sorted({self.end_id, *self.eos_ids}))
        self.device = self.model.device

    def hidden(self, ids, pos, mask, cache=None):
        """Last hidden states [n, T, d] of ids, pos [n, T]; on CUDA the layers are bfloat16. A mask that comes
        in a dict bypasses transformers' own mask code; `cache` reaches `attention` as it is."""
        forward = self.model.base if hasattr(self.model, "base") else self.model.model
        return forward(input_ids=ids, position_ids=pos, attention_mask={"full_attention": mask},
                       use_cache=False, cache=cache).last_hidden_state

    def score(self, row):
        """log π_θ of every token of a packed row that a loss reads, and the entropy there: [R], [R].

        FlexAttention runs the mask on CUDA; on CPU, where it has no backward, the same rule is one dense
        mask."""
        N = len(row["ids"])
        sees = mask_mod(row["doc"], row["view"], row["pos"] // self.B)
        if self.device.type == "cuda":
            mask = block_mask(sees, N, self.device)
        else:
            i = torch.arange(N)
            mask = sees(0, 0, i[:, None], i)[None, None]                                # [1, 1, N, N]
        hidden = self.hidden(row["ids"][None], row["pos"][None], mask)[0, row["reads"]]  # [R, d]
        return log_probs(hidden, self.model.lm_head.weight, row["target"], self.temperature, self.mask_id)

    def prompt(self, messages):
        """Token ids of the messages in the chat template, up to where the assistant speaks. Raises ValueError
        for a message of which the template takes nothing: more of it would leave the text as it is."""
        options = {} if self.thinking else {"enable_thinking": False}
        render = functools.partial(self.tokenizer.apply_chat_template, tokenize=False,
                                   add_generation_prompt=True, **options)
        text = render(messages)
        for i, m in enumerate(messages):
            if render([*messages[:i], m | {"content": m["content"] + "?"}, *messages[i + 1:]]) == text:
                raise ValueError(f"the chat template leaves out a message of role {m['role']}")
        return self.ids(text)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def example(self, messages):
        """SFT: (tokens [S], P) of a chat; its last message, the answer, ended and filled to a whole block."""
        prompt, answer = self.prompt(messages[:-1]), self.ids(messages[-1]["content"]) + [self.end_id]
        fill = -(len(prompt) + len(answer)) % self.B
        return torch.tensor(prompt + answer + [self.eos_id] * fill), len(prompt)

    def named_weights(self, dtype):
        """(name in the checkpoint, whole tensor of that dtype) of all weights, one at a time; all ranks call
        it together. Each casts its shard first: half as much to gather for bfloat16."""
        for name, parameter in self.model.named_parameters():
            yield name, full(parameter.detach().to(dtype))


def attention(module, query, key, value, mask, scaling, cache=None, **unused):
    """What Qwen3 calls: FlexAttention under a BlockMask, else SDPA under a bool mask (CPU, decoding)."""
    query, key = query.to(value.dtype), key.to(value.dtype)            # whatever their norms made of them
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    if isinstance(mask, BlockMask):
        out = flex_attention()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    else:                                      # under a mask, enable_gqa would leave the fast kernels on CUDA
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.transpose(1, 2), None


@functools.cache
def flex_attention():
    """Compiled for each row length (`row_length`), with and without gradient. Past the limit fullgraph=True
    raises an error; without it torch falls back, silently, to attention with the whole N x N score matrix."""
    return torch.compile(torch.nn.attention.flex_attention.flex_attention, dynamic=False, fullgraph=True,
                         recompile_limit=64)


def shard(model, compute=None):
    """FSDP2: each layer, and the rest, sharded over the ranks of a node; every node holds the whole. Layers
    compute in the dtype `compute` (bfloat16 on CUDA, else float32), gradients are averaged in float32. A part
    becomes float32, on its device, just before it is cut, so that no rank ever holds the whole. A single rank
    on a CPU has no process group: FSDP's hooks would cost it a quarter of its time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = compute or (torch.bfloat16 if device == "cuda" else torch.float32)
    if not dist.is_initialized():
        return model.to(device, torch.float32)
    n = int(os.environ.get("LOCAL_WORLD_SIZE", 1))                     # ranks of this node
    mesh = init_device_mesh(device, (world() // n, n), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(PATIENCE, group)         # else half an hour
    mesh, precision = mesh["shard"] if n == world() else mesh, MixedPrecisionPolicy(compute, torch.float32)
    for layer in model.model.layers:
        fully_shard(layer.to(device, torch.float32), mesh=mesh, mp_policy=precision)
    # the rest stays whole after the forward, since lm_head is read then
    fully_shard(model.to(device, torch.float32), mesh=mesh, reshard_after_forward=False)
    model.base = lambda **inputs: model.model(**inputs)                # the forward to the hidden states; it
    register_fsdp_forward_method(model, "base")                        # gathers what it needs, as model's own
    return model


def full(tensor):
    """The whole of a sharded tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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


# ---- rollout: the PyTorch sampler ------------------------------------------------------------------------

def seed_of(*key):
    """53 bits for a (seed, stage, step, prompt, sample): no draw hangs on global state."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 11


def generator(*key):
    return torch.Generator().manual_seed(seed_of(*key))


@dataclass
class Trajectory:
    """Section 3.2's τ, in small integers, since ranks send it to each other."""
    prompt: torch.Tensor         # [P] int32 token ids
    output: torch.Tensor         # [L] int32 whole blocks, with what follows the stop token: P + L = K · B
    steps: torch.Tensor          # [L] int16 step map: the decoding step within its block, from 1
    logp: torch.Tensor           # [L] the sampler's log π(o | τ(1:s-1)) when the token was committed
    length: int                  # of the answer
    stopped: bool                # by a stop token
    decoding_steps: int          # |τ|, of all its blocks

    @property
    def answer(self):
        """What is rewarded: the tokens before the first stop token, else max_new_tokens of them."""
        return self.output[:self.length]


def finish(prompt, output, steps, logp, policy, c):
    """The Trajectory of an output of whole blocks."""
    stops = torch.isin(output[:c.max_new_tokens], policy.stop_ids).nonzero()[:, 0].tolist()
    length = stops[0] if stops else min(len(output), c.max_new_tokens)
    step = torch.cat([torch.zeros_like(prompt), steps]).view(-1, policy.B)              # [K, B]
    return Trajectory(prompt.int(), output.int(), steps.short(), logp, length, bool(stops),
                      int(step.amax(1).sum()))


def denoise(logits, masked, u, policy, c):
    """One decoding step of n blocks: the token drawn at each position, whether it is committed, its log π:
    [n, B] each.

    logits: [n, B, vocab]; masked: [n, B]; u: [n, B] in [0, 1), None for the likeliest tokens. All positions
    are drawn, the masked ones are used: to pick those first, the host would have to wait for the device."""
    log_pi = log_policy(logits, policy.temperature, policy.mask_id)                     # [n, B, vocab]
    top1, token = log_pi.max(-1)                                                        # [n, B]
    if u is not None:
        token = draw(log_pi, u)
    drawn = log_pi.gather(-1, token[..., None])[..., 0]
    new = unmask(top1, drawn, masked, c.unmask, c.tokens_per_step, c.threshold, c.confidence)
    return token, new, drawn


@torch.no_grad()
def decode(policy, prompts, keys, c, greedy=False):
    """Block diffusion decoding of a batch: for every block, for every step. One trajectory for each prompt
    (token ids). Empty slots (·) on the left bring prompts to equally many whole blocks, so that all sequences
    are at the same block. B = 2, M is [MASK], before the first step:

        slots    0 1 | 2 3 | 4 5 | 6 7
                 · · | p p | p M | M M      3 tokens: pad 2, start 5. The first block decoded, slots 4 and 5,
                 p p | p p | M M | M M      4 tokens: pad 0, start 4. may begin with a prompt's last tokens.

    A sequence leaves the batch after the first whole block that holds a stop token or brings its output to
    max_new_tokens. Its random numbers, one for every position and step, are drawn beforehand from the
    generator of its key: a sample depends on nothing else."""
    from transformers import DynamicCache
    B, n, device = policy.B, len(prompts), policy.device
    K = max(1, *(len(p) // B for p in prompts))    # blocks of prompt: at least one, or the prefill is empty
    K_out = -(-c.max_new_tokens // B) + 1                # one more, since a prompt may reach into the first
    pad = torch.tensor([(K - len(p) // B) * B for p in prompts], device=device)         # [n] empty slots
    start = pad + torch.tensor([len(p) for p in prompts], device=device)                # [n]
    tokens = torch.full((n, (K + K_out) * B), policy.mask_id)                           # [n, slots]
    for i, prompt in enumerate(prompts):
        tokens[i, pad[i]:start[i]] = torch.tensor(prompt)
    u = torch.stack([torch.rand(K_out, B, B, generator=generator(*key)) for key in keys])
    tokens, u = tokens.to(device), u.to(device)                            # u: [n, block, position, step]
    steps, logp = torch.zeros_like(tokens), torch.zeros(tokens.shape, device=device)    # [n, slots]
    slot, stop_ids = torch.arange(tokens.shape[1], device=device), policy.stop_ids.to(device)
    live, cache = torch.arange(n, device=device), DynamicCache()           # [m] indices of live sequences

    def forward(a, b):                                   # the slots a to b of the live ones → [m, b - a, d]
        q, pads = slot[a:b], pad[live][:, None]
        mask = (slot[:b] // B <= q[:, None] // B) & (slot[:b] >= pads[..., None])       # mask_mod's rule
        mask = mask | (slot[:b] == q[:, None])           # an empty slot sees itself, lest it see nothing
        return policy.hidden(tokens[live, a:b], (q - pads).clamp_min(0), mask[:, None], cache)

    forward(0, K * B)                                                          # the prompts' whole blocks
    for k in range(K, K + K_out):
        a, b = k * B, k * B + B
        for s in range(1, B + 1):
            masked = tokens[live, a:b] == policy.mask_id                                # [m, B]
            if not masked.any():
                break
            logits = forward(a, b) @ policy.model.lm_head.weight.T                      # [m, B, vocab]
            cache.crop(-B)                               # these keys and values are not the clean block's
            u_step = None if greedy else u[live, k - K, :, s - 1]                       # [m, B]
            token, new, drawn = denoise(logits, masked, u_step, policy, c)              # [m, B]
            tokens[live, a:b] = torch.where(new, token, tokens[live, a:b])
            steps[live, a:b] = torch.where(new, s, steps[live, a:b])
            logp[live, a:b] = torch.where(new, drawn, logp[live, a:b])
        is_stop = torch.isin(tokens[live, a:b], stop_ids) & (slot[a:b] >= start[live][:, None])
        goes_on = ~is_stop.any(1) & (b < start[live] + c.max_new_tokens)                # [m]
        if not goes_on.all():
            live = live[goes_on]
            cache.batch_select_indices(goes_on)
        if not len(live):
            break
        forward(a, b)                                    # the block is whole: its clean keys and values stay
    found, trajectories = [x.cpu() for x in (tokens, steps, logp)], []
    for i, prompt in enumerate(prompts):
        decoded = found[1][i].nonzero()[:, 0]                                  # [L] slots that have a step
        trajectories.append(finish(torch.tensor(prompt), *(x[i, decoded] for x in found), policy, c))
    return trajectories


class TorchEngine:
    """Rollouts by `decode`, --slots at a time, on the trainer's own weights."""

    def __init__(self, policy, c):
        self.policy, self.c = policy, c

    def generate(self, prompts, keys, greedy=False):
        """One trajectory for each prompt (token ids) and key (of its generator), in their order."""
        n, model, trajectories = self.c.slots, self.policy.model, []
        model.eval()
        with gathered(model):
            for i in range(0, len(prompts), n):
                trajectories += decode(self.policy, prompts[i:i + n], keys[i:i + n], self.c, greedy)
        model.train()
        return trajectories

    def update_weights(self):
        """Nothing: they are the trainer's. Nor is there anything to put to sleep or to close."""
    sleep = close = update_weights


# ---- rollout: LMDeploy -----------------------------------------------------------------------------------

def hook_lmdeploy(engine):
    """Our policy in stock LMDeploy: returns the strategy factory that `LMDeployEngine` puts in the place of
    LMDeploy's own while it builds an engine; and, for good, SDAR's model hands out its logits in float32.

    LMDeploy schedules, batches, runs the model and keeps its cache; what becomes of the logits `denoise`
    decides, as in `decode`. So the faults of its sampler do not matter: there rollouts of one prompt come
    out equal. The life of a block of B = 4, the last one of its sequence, into which the prompt's p reaches:

        tokens      state     MASKED, UNMASKED or CACHED, as the forward sees it
        p [M][M][M] U M M M   forward, step 1: `post_sampling` commits b, on the device
        p [M] b [M] U M U M   forward, step 2: it commits a and c
        p  a  b  c  U U U U   whole. If it ends the sequence, that is now, and it is never cached; else a
                              forward that commits nothing and leaves the clean block's keys and values:
        p  a  b  c  C C C C   the scheduler appends a block of [MASK]s, which begins with the first line

    After every forward `update_running`, in the scheduler, is told the state after it, where the sequence
    still holds the state before: what was masked and no more is was committed. In both, the block is the last
    B of the sequence's num_all_ids tokens. engine.finished gets {session id: (output, steps, logp)}."""
    from lmdeploy.pytorch.consts import DLLM_CACHED, DLLM_MASKED, DLLM_UNMASKED
    from lmdeploy.pytorch.messages import MessageStatus
    from lmdeploy.pytorch.models.sdar import SDARForCausalLM
    from lmdeploy.pytorch.strategies import dllm
    from lmdeploy.pytorch.strategies.dllm import model_agent, sequence
    policy, c, B = engine.policy, engine.c, engine.policy.B

    def get_logits(self, hidden):              # stock: rounded to bfloat16, 0.125 apart between 16 and 32
        flat, head = hidden.flatten(0, -2), self.lm_head.weight                         # [tokens, d]
        if flat.dtype == torch.float32:
            return (flat @ head.T).view(*hidden.shape[:-1], -1)
        return torch.mm(flat, head.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
    SDARForCausalLM.get_logits = get_logits

    @dataclass
    class ExtraOutputs(model_agent.DLLMExtraOutputs):
        logp: torch.Tensor                         # [n, B] goes to the scheduler with the state of the blocks

    class AgentStrategy(model_agent.DLLMModelAgentStrategy):
        """On the device, after every forward of n blocks."""
        def post_sampling(self, inputs, logits, next_token_ids, extra_inputs):
            ids = self.slice_outputs(inputs.input_ids.flatten(), inputs.seq_length).view(-1, B)       # [n, B]
            state = extra_inputs.dllm_mask.view_as(ids)
            masked, whole = state == DLLM_MASKED, (state == DLLM_UNMASKED).all(1, keepdim=True)
            u = None
            if engine.generator:
                u = torch.rand(ids.shape, generator=engine.generator, device=ids.device)
            token, new, self.logp = denoise(logits.view(*ids.shape, -1), masked, u, policy, c)
            state = torch.where(new, DLLM_UNMASKED, torch.where(whole, DLLM_CACHED, state))
            extra_inputs.dllm_mask = state.flatten()
            return torch.where(new, token, ids).flatten(), extra_inputs

        def make_extra_outputs(self, extra_inputs):                    # called right after post_sampling
            return ExtraOutputs(extra_inputs.dllm_mask, self.logp)

        def make_stopping_criteria(self, seqs):
            for seq in seqs:           # stock looks for stop tokens after the padded prompt only, and so
                seq.output_start_pos = seq.input_end_pos       # misses one in the block the prompt begins
            return super().make_stopping_criteria(seqs)

    class SequenceStrategy(sequence.DLLMSequenceStrategy):
        """In the scheduler, after every forward: writes down which tokens it committed to each sequence."""
        def update_running(self, running, batched_outputs, **rest):
            extra = batched_outputs.extra_outputs
            masked_after = (extra.dllm_mask.view(-1, B) == DLLM_MASKED).numpy()         # [n, B]
            blocks = zip(running, masked_after, extra.logp.tolist())
            live = [block for block in blocks if block[0].status == MessageStatus.RUNNING]
            for seq, masked, logp in live:
                new = (seq.all_dllm_mask[-B:] == DLLM_MASKED) & ~masked                 # [B]
                positions = range(seq.num_all_ids - B, seq.num_all_ids)
                committed = engine.committed.setdefault(seq.session_id, {})    # {position: (step, log π)}
                step = 1 + max((committed[p][0] for p in positions if p in committed), default=0)
                committed |= {positions[j]: (step, logp[j]) for j in new.nonzero()[0].tolist()}
            super().update_running(running, batched_outputs, **rest)   # writes the state after; who is done?
            for seq, *_ in live:
                if seq.status != MessageStatus.RUNNING:
                    start, end = seq.input_end_pos, seq.num_all_ids            # of the output, whole blocks
                    committed = engine.committed.pop(seq.session_id)
                    steps, logp = zip(*(committed[p] for p in range(start, end)))
                    engine.finished[seq.session_id] = seq.history_cache[start:end].tolist(), steps, logp

    class Factory(dllm.DLLMStrategyFactory):
        def __init__(self, model_config, dllm_config):
            model_config.dllm_mask_token = policy.mask_id      # stock: 151669, whatever config.json says
            super().__init__(model_config, dllm_config)

        def build_sequence_strategy(self):
            return SequenceStrategy(B, policy.mask_id)

        def build_model_agent_strategy(self):
            return AgentStrategy(self.dllm_config, policy.mask_id)
    return Factory


class LMDeployEngine:
    """LMDeploy's PyTorch engine in this process, on this rank's GPU; it stays awake while the model trains,
    with its cache and CUDA graphs, unless `sleep` frees them. Its tasks (`call`) run in a thread of their
    own, for which we wait, because they leave it in inference mode and on another CUDA stream."""

    def __init__(self, policy, c, **options):
        os.environ.setdefault("LMDEPLOY_ENABLE_CHECK_ENV", "0")      # the check would start this script again
        self.policy, self.c, self.generator, self.asleep = policy, c, None, False
        self.committed, self.finished = {}, {}                         # see `hook_lmdeploy`
        session_len = -(-(c.max_length + c.max_new_tokens) // policy.B) * policy.B
        try:
            import lmdeploy
            from lmdeploy.pytorch.engine import Engine
            from lmdeploy.pytorch.strategies import dllm
            factory = hook_lmdeploy(self)
        except (ImportError, AttributeError) as error:
            fail(f"--engine lmdeploy: {error}; pip install lmdeploy==0.18.0, or --engine torch")
        lmdeploy.utils.get_logger("lmdeploy").setLevel("ERROR")
        from transformers import AutoConfig, Qwen3Config
        AutoConfig.register("sdar", type("SDARConfig", (Qwen3Config,), {"model_type": "sdar"}), exist_ok=True)
        settings = dict(dtype="bfloat16", dllm_block_length=policy.B, session_len=session_len,
                        max_batch_size=c.slots, cache_max_entry_count=c.engine_memory, enable_metrics=False)
        config = lmdeploy.PytorchEngineConfig(**settings | options)     # no prefix cache: it outlives updates
        with tempfile.TemporaryDirectory() as folder:                  # the checkpoint as LMDeploy wants it
            policy.tokenizer.save_pretrained(folder)
            write_json(os.path.join(folder, "config.json"), {**policy.config, "auto_map": {}})
            for name in os.listdir(policy.folder):
                if name.endswith((".safetensors", ".safetensors.index.json")):
                    os.symlink(os.path.abspath(os.path.join(policy.folder, name)), os.path.join(folder, name))
            stock, dllm.DLLMStrategyFactory = dllm.DLLMStrategyFactory, factory
            try:
                self.engine = Engine.from_pretrained(folder, config)
            finally:
                dllm.DLLMStrategyFactory = stock
        self.thread, self.loop, self.sessions = ThreadPoolExecutor(1), asyncio.Runner(), itertools.count()
        if torch.cuda.is_available():
            self.call(torch.cuda.set_device, torch.cuda.current_device())      # a thread has its own
        self.instance = self.engine.create_instance()
        self.update_weights()

    def call(self, function, *args):
        return self.thread.submit(function, *args).result()

    def generate(self, prompts, keys, greedy=False):
        """One trajectory for each prompt (token ids), in their order; raises an error if one fails. The first
        of the keys seeds the draws of all."""
        from lmdeploy import GenerationConfig
        if not prompts:
            return []
        policy, c = self.policy, self.c
        self.generator = None if greedy else torch.Generator(policy.device).manual_seed(seed_of(*keys[0]))
        asked = GenerationConfig(max_new_tokens=c.max_new_tokens, stop_token_ids=policy.stop_ids.tolist(),
                                 temperature=1.0, top_k=1)         # the cheapest: its samples are not used

        async def one(prompt):
            session, space = next(self.sessions), self.engine.max_session_len - len(prompt)
            status = f"room for {space} more, --max-new-tokens is {c.max_new_tokens}"
            if c.max_new_tokens <= space:                                      # else LMDeploy cuts the output
                async for response in self.instance.async_stream_infer(session, list(prompt), asked):
                    status = response.status
            if session not in self.finished:
                raise RuntimeError(f"LMDeploy, a prompt of {len(prompt)} tokens: {status}")
            output, steps, logp = map(torch.tensor, self.finished.pop(session))
            return finish(torch.tensor(prompt), output, steps, logp, policy, c)

        async def every():
            return await asyncio.gather(*map(one, prompts))
        return self.call(self.loop.run, every())

    def sleep(self):
        """Free weights, cache and CUDA graphs, until `update_weights` builds and captures them again."""
        self.call(self.loop.run, self.engine.sleep(2))
        self.asleep = True

    def update_weights(self):
        """Fig. 3's (6): the trainer's weights, one at a time, into the engine's own; what keeps its name
        there is read back. After sleep the engine wakes up, weights first, then cache."""
        from lmdeploy.pytorch.weight_loader.model_weight_loader import process_weights_after_loading
        if self.asleep:
            self.call(self.engine.wakeup, ["weights"])
            torch.cuda.synchronize()                                   # it made them on a stream of its own
        agent = self.engine.executor.model_agent
        model = agent.patched_model.get_model()                        # another one after every wakeup
        own = dict(model.named_parameters())
        for name, tensor in self.policy.named_weights(own["model.norm.weight"].dtype):
            with agent.all_context():
                model.load_weights([(name, tensor)])
                if name in own and not torch.equal(own[name], tensor.to(own[name].device)):
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
        self.call(self.engine.close)
        self.call(self.loop.close)
        self.thread.shutdown()


# ---- what both training loops use ------------------------------------------------------------------------

WARMUP = 10                      # steps in which the learning rate rises (the authors' code)


def make_optimizer(policy, c):
    """AdamW, its moments made here: torch would make them in the first step, or, with a step that counts,
    when a state is saved or loaded before it."""
    weights = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(weights, c.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for w in weights:
        step = torch.zeros((), device=w.device)
        optimizer.state[w] = {"step": step, "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
    return optimizer


def learning_rate(c, step):
    """Of step 1, 2, ...: linear warm-up, then constant in rl, in sft a cosine that is 0 after the last."""
    if step <= WARMUP:
        return c.lr * step / WARMUP
    progress = (step - 1 - WARMUP) / max(1, c.steps - WARMUP)
    return c.lr * (0.5 * (1 + math.cos(math.pi * progress)) if c.stage == "sft" else 1)


def optimizer_step(policy, optimizer, c, step):
    """(5d) Clip the gradient, move, forget it. Returns its norm before the clip. One that is not finite moves
    nothing."""
    norm = full(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)).item()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(c, step)
    if math.isfinite(norm):
        optimizer.step()
    else:
        say(f"step {step}: a gradient that is not finite, which moves nothing")
    optimizer.zero_grad()
    return norm


# ---- the SFT loop ----------------------------------------------------------------------------------------

def train_sft(policy, c, examples):
    """Eq. 3 on a Walk through examples, each (tokens [S], P)."""
    optimizer = make_optimizer(policy, c)
    done = resume(policy, optimizer, c, examples)
    bar = tqdm(total=c.steps, desc="sft", initial=done, disable=rank() > 0)
    for step in range(done + 1, c.steps + 1):
        start = time.perf_counter()

        # noise the step's examples, each block of an answer at a t of its own
        documents, answer_tokens = [], 0
        for _ in range(c.batch):
            i, (tokens, P) = next(examples)
            g, blocks = generator(c.seed, "sft", step, i, 0), len(tokens) // policy.B - P // policy.B
            u, z = torch.rand(blocks, generator=g), torch.rand(blocks, policy.B, generator=g)
            documents.append(noised_document(tokens, P, u, z, policy.B, policy.mask_id))
            answer_tokens += len(tokens) - P                           # end tokens and padding included

        # forward and backward of this rank's rows
        lengths, total = [len(d["ids"]) for d in documents], torch.zeros((), device=policy.device)
        for row in make_rows(policy, lengths, documents.__getitem__, c):
            logp, _ = policy.score(row)                                                 # [R]
            loss = sft_loss(logp, row["w_t"], answer_tokens)
            (loss * world()).backward()                                # FSDP takes a mean over ranks
            total += loss.detach()

        norm = optimizer_step(policy, optimizer, c, step)
        loss = all_sum(total).item()
        write_lines(c, "sft.metrics.jsonl", [{
            "step": step, "loss": loss, "lr": learning_rate(c, step), "grad_norm": norm,
            "forward_tokens": sum(lengths), "passed_over": examples.passed_over,
            "seconds": time.perf_counter() - start}])
        bar.set_postfix(loss=f"{loss:.3f}")
        bar.update()
        if step % c.save_every == 0 or step == c.steps:
            save(policy, optimizer, c, step, examples)


# ---- the RL loop, its phases numbered as in Fig. 3 -------------------------------------------------------

MAX_LOGP_GAP = 0.1               # mean |Δ log π| of sampler and trainer above which RL stops: not calibrated
MAX_ROUNDS = 4                   # on a GPU. Rounds of rollouts in search of mixed groups, in a step of RL


class Problem(NamedTuple):
    prompt: list                 # token ids, to where the assistant speaks
    truth: str
    question: str


class Group(NamedTuple):
    """The samples of one problem, G in training."""
    trajectories: tuple
    answers: tuple               # their texts
    rewards: tuple


def train_rl(policy, reference, engine, c, problems, reward, held_out):
    """DiPO on a Walk through problems, evaluated on those held out before, on the way and after."""
    optimizer = make_optimizer(policy, c)
    if c.resume and c.sleep:
        engine.sleep()                                                 # loading allocates gradients as well
    done = resume(policy, optimizer, c, problems)
    if c.resume:
        engine.update_weights()                                        # it was built before they were resumed
    if held_out and not done:
        write_lines(c, "rl.metrics.jsonl", [{"step": 0} | evaluate(policy, engine, c, held_out, reward, 0)])
    bar = tqdm(total=c.steps, desc="rl", initial=done, disable=rank() > 0)
    for step in range(done + 1, c.steps + 1):
        start = time.perf_counter()

        # (1) fetch prompts, (2) iterate over them, (3) request, (4) rollout: groups, until --prompts of them
        # are mixed, that is, until their rewards differ (DAPO's dynamic sampling)
        mixed, every = [], []
        for _ in range(MAX_ROUNDS):
            fetched = dict(next(problems) for _ in range(c.prompts - len(mixed)))
            every += roll_out(policy, engine, c, fetched, c.group_size, ("rl", step), reward).values()
            mixed = [group for group in every if is_mixed(group.rewards)]
            if len(mixed) == c.prompts:
                break
        if c.sleep:
            engine.sleep()
        rolled = time.perf_counter()

        # (5) train on the mixed groups
        trained = train_on(policy, reference, optimizer, c, mixed, step)
        moved = time.perf_counter()

        # (6) update the engine's weights
        engine.update_weights()
        end = time.perf_counter()

        line = {"step": step, **rollout_metrics(mixed, every), **trained, "lr": learning_rate(c, step),
                "passed_over": problems.passed_over, "seconds": end - start,
                "seconds_rollout": rolled - start, "seconds_training": moved - rolled,
                "seconds_weights": end - moved}
        bar.set_postfix(reward=f"{line['reward']:.3f}")
        bar.update()
        if held_out and (step == c.steps or c.eval_every and step % c.eval_every == 0):
            line |= evaluate(policy, engine, c, held_out, reward, step)
        write_lines(c, "rl.metrics.jsonl", [line])
        gap = line["logp_gap"]
        if gap is not None and not gap <= MAX_LOGP_GAP:                # nor is it so if it is not a number
            fail(f"step {step}: log π of the {c.engine} engine and of the trainer differ by {gap:.3g} on "
                 f"average, above MAX_LOGP_GAP = {MAX_LOGP_GAP}: their weights, masks or temperatures differ")
        if step % c.save_every == 0 or step == c.steps:
            save(policy, optimizer, c, step, problems)


def roll_out(policy, engine, c, problems, samples, key, reward, greedy=False):
    """(3), (4): so many samples of each problem, {index: Problem}, made and rewarded by all ranks together.

    Returns {index: Group} of all of them on every rank. A reward that is not a finite number, in float32,
    ends the run: a group without it would be another group."""
    mine = [(i, g) for i in problems for g in range(samples)][rank()::world()]
    keys, made = [(c.seed, *key, i, g) for i, g in mine], []
    for (i, g), t in zip(mine, engine.generate([problems[i].prompt for i, _ in mine], keys, greedy)):
        answer = policy.tokenizer.decode(t.answer)
        value = float(reward(answer, problems[i].truth))
        if not abs(value) <= torch.finfo(torch.float32).max:
            fail(f"--reward: {value} for the answer {answer[-200:]!r} to {problems[i].question[:200]!r}")
        made.append((i, g, t, answer, value))
    groups = {i: [] for i in problems}
    for i, _, *sample in sorted(gather(made), key=lambda x: x[:2]):
        groups[i].append(sample)
    return {i: Group(*zip(*found)) for i, found in groups.items()}


def is_mixed(rewards):
    """Whether rewards differ by more than rounding."""
    return max(rewards) - min(rewards) > 1e-9 * max(map(abs, rewards))


def rollout_metrics(mixed, every):
    """Of everything sampled in a step, groups of equal rewards included."""
    trajectories = [t for group in every for t in group.trajectories]
    n, decoding_steps = len(trajectories), sum(t.decoding_steps for t in trajectories)
    distinct = sum(len({tuple(t.answer.tolist()) for t in group.trajectories}) for group in every)
    return {"reward": sum(sum(group.rewards) for group in every) / n,
            "tokens_per_step": sum(len(t.output) for t in trajectories) / decoding_steps,
            "output_length": sum(t.length for t in trajectories) / n,
            "truncated": sum(not t.stopped for t in trajectories) / n,
            "groups_dropped": len(every) - len(mixed), "duplicates": 1 - distinct / n}


def dipo_rows(policy, c, groups):
    """Mixed groups → (this rank's rows with the columns of Eq. 6-8, forward tokens of all ranks).

    Weights and advantages come from the whole batch here, before anything is dealt or cut."""
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    A = advantage(rewards, c.adv_std).float()                                           # [groups, G]
    decoding_steps = torch.tensor([[t.decoding_steps for t in group.trajectories] for group in groups])
    w = trajectory_weights(decoding_steps, c.objective)                                 # [groups, G]
    trajectories, A, w = [t for group in groups for t in group.trajectories], A.flatten(), w.flatten()
    lengths = [len(t.prompt) + len(t.output) + policy.B * t.decoding_steps for t in trajectories]

    def document(i):
        t, L = trajectories[i], len(trajectories[i].output)
        columns = {"A": A[i].expand(L), "w": w[i].expand(L), "logp_sampler": t.logp}
        return trajectory_document(t.prompt, t.output, t.steps, policy.B, policy.mask_id) | columns
    return make_rows(policy, lengths, document, c), sum(lengths)


def train_on(policy, reference, optimizer, c, mixed, step):
    """(5): --updates of the policy on mixed groups. Returns their part of the metrics, null without any."""
    weighed = ("importance", "importance_capped", "importance_ess") if c.importance else ()
    metrics = dict.fromkeys(("loss", "kl", "entropy", "clip_fraction", "logp_gap", "grad_norm", *weighed))
    if not mixed:
        return metrics | {"forward_tokens": 0}
    rows, metrics["forward_tokens"] = dipo_rows(policy, c, mixed)
    tokens = sum(len(t.output) for group in mixed for t in group.trajectories)
    for row in rows:
        with torch.no_grad():          # π_old of Eq. 7, 8: None for sg[π_θ], or π_θ before the first update
            old = c.objective != "eq6" and (c.updates > 1 or c.importance)
            row["logp_old"] = policy.score(row)[0] if old else None
            row["logp_ref"] = reference.score(row)[0] if reference else None
    if reference and isinstance(reference.model, FSDPModule):
        reference.model.reshard()                                      # as a backward would
    if c.importance:
        rows, found = weigh(rows, c.importance)
        metrics |= found
    for update in range(c.updates):
        sums = torch.zeros(6, device=policy.device)
        for row in rows:
            logp, entropy = policy.score(row)                                  # (5a)   [R], [R]
            if c.objective == "eq6":                                           # (5b)
                J, clipped = eq6(logp, row["logp_sampler"], row["A"], row["w"], c.eps, c.eps_high)
            elif c.objective == "eq7":
                J, clipped = eq7(logp, row["logp_old"], row["A"], row["w"], c.eps, c.eps_high)
            else:
                number = row["view"][row["reads"]] - 1                # [R] every view is one decoding step
                J, clipped = eq8(logp, row["logp_old"], row["A"], row["w"], c.eps, c.eps_high, number)
            kl = kl_term(logp, row["logp_ref"]).sum() / tokens if reference else torch.zeros_like(J)
            loss = -J + c.beta * kl
            (loss * world()).backward()                                        # (5c)   FSDP takes a mean
            gap, ratios = (logp - row["logp_sampler"]).abs().sum() / tokens, torch.tensor(len(clipped))
            seen = loss, kl, entropy.sum() / tokens, gap, clipped.sum(), ratios
            sums += torch.stack([x.detach().to(sums) for x in seen])
        norm = optimizer_step(policy, optimizer, c, step)                      # (5d)
        loss, kl, entropy, gap, clipped, ratios = all_sum(sums).tolist()
        gap = gap if update == 0 else metrics["logp_gap"]                      # later θ has moved on
        metrics |= {"loss": loss, "kl": kl if reference else None, "entropy": entropy,
                    "clip_fraction": clipped / ratios, "logp_gap": gap, "grad_norm": norm}
    return metrics


def weigh(rows, cap):
    """--importance: (rows with w times their trajectories' importance weights, metrics of those of all ranks:
    the mean, the share at the cap, and the effective share of the sample, (Σ W)² / (n Σ W²))."""
    sums, weighted = torch.zeros(4, device=rows[0]["w"].device), []
    for row in rows:
        trajectory = row["doc"][row["reads"]]                                           # [R] ascending
        weights = importance_weights(row["logp_old"], row["logp_sampler"], trajectory, cap)         # [R]
        weighted.append(row | {"w": row["w"] * weights})
        W = weights[trajectory.diff(prepend=trajectory[:1] - 1) > 0]           # one for each trajectory
        sums += torch.stack([torch.ones_like(W), W, W.square(), (W >= cap).float()]).sum(1)
    n, total, squares, capped = all_sum(sums).tolist()
    return weighted, {"importance": total / n, "importance_capped": capped / n,
                      "importance_ess": total**2 / (n * squares) if squares else 0.0}


# ---- evaluation ------------------------------------------------------------------------------------------

def evaluate(policy, engine, c, problems, reward, step=None):
    """Table 1's columns, printed and returned, by all ranks; every answer goes to OUT/eval.jsonl, or with
    the step of RL to OUT/rl.eval.jsonl."""
    groups = roll_out(policy, engine, c, dict(enumerate(problems)), max(1, c.samples), ("eval", 0), reward,
                      greedy=c.samples == 0)
    lines = [{
        "step": step, "problem": i, "sample": g, "question": problems[i].question,
        "truth": problems[i].truth, "answer": answer, "reward": value, "truncated": not t.stopped,
        "length": t.length, "tokens": len(t.output), "decoding_steps": t.decoding_steps}
        for i, group in groups.items() for g, (t, answer, value) in enumerate(zip(*group))]
    write_lines(c, "eval.jsonl" if step is None else "rl.eval.jsonl", lines)
    columns = table_1(lines)
    say(f"{c.model if step is None else f'rl, step {step}'}: {len(problems)} problems, "
        + (f"{c.samples} sampled answers each" if c.samples else "one greedy answer each"))
    say("decoding         accuracy    s.e.  tokens/step  length  truncated")
    name = f"{c.unmask} {c.threshold if c.unmask == 'dynamic' else c.tokens_per_step}"
    say("{:14} {:10.3f} {:7.3f} {:12.2f} {:7.1f} {:10.3f}".format(name, *columns.values()))
    for line in [line for line in lines if line["sample"] == 0][:5]:
        say("    {question!r:.40} -> {answer!r:.60}, truth {truth!r}, reward {reward:g}".format(**line))
    return columns


def table_1(lines):
    """One row of Table 1, from lines of eval.jsonl in the order of the problems, equally many of each. The
    standard error is that of a mean over problems."""
    n = lines[-1]["problem"] + 1
    means = torch.tensor([line["reward"] for line in lines], dtype=torch.float64).view(n, -1).mean(1)
    sums = {x: sum(line[x] for line in lines) for x in ("tokens", "decoding_steps", "length", "truncated")}
    return {"accuracy": means.mean().item(),
            "standard_error": means.std().item() / n**0.5 if n > 1 else math.nan,
            "eval_tokens_per_step": sums["tokens"] / sums["decoding_steps"],
            "eval_length": sums["length"] / len(lines), "eval_truncated": sums["truncated"] / len(lines)}


def show(policy, engine, c, problem):
    """One answer as it is decoded: a line a decoding step, with the probabilities of what it commits, the
    sampler's and the trainer's, who has them all from one forward."""
    t, = engine.generate([problem.prompt], [(c.seed, "show", 0, 0, 0)], greedy=c.samples == 0)
    document = trajectory_document(t.prompt, t.output, t.steps, policy.B, policy.mask_id)
    row, *_ = make_rows(policy, [len(document["ids"])], lambda i: document, c)
    with torch.no_grad():
        scored = policy.score(row)[0].cpu()                                             # [L]
    if rank() > 0:                                                     # it has no document
        return
    P, B = len(t.prompt), policy.B
    words = [repr(policy.tokenizer.decode(token))[1:-1] for token in [*t.prompt, *t.output]]
    step, width = [0] * P + t.steps.tolist(), max(map(len, words[P // B * B:]))
    say(f"{problem.question}\n\nblock step  {'the block after it':{B * width + 3 * B - 3}}  "
        "committed, π when sampled, as scored")
    for k in range(P // B, len(words) // B):
        block = range(k * B, k * B + B)
        for s in range(1, max(step[p] for p in block) + 1):
            shown = " | ".join(f"{words[p] if step[p] <= s else '·':{width}}" for p in block)
            new = (f"{words[p]!r} {t.logp[p - P].exp():.3f} {scored[p - P].exp():.3f}"
                   for p in block if step[p] == s)
            say(f"{k:5} {s:4}  {shown}  {', '.join(new)}")
    gap = (scored - t.logp).abs().max()
    say(f"\n{len(t.output)} tokens in {t.decoding_steps} decoding steps. One forward of "
        f"{len(document['ids'])} tokens scores them all; largest |Δ log π| {gap:.1e}")


# ============================================================================================================
# III. THE WORKSHOP
# ---- flags -----------------------------------------------------------------------------------------------

# Defaults that depend on the model and the stage. tiny: the built-in model; real: a checkpoint on one GPU, at
# the paper's learning rates; paper: its sizes, which --recipe paper puts on top of real.
PRESETS = {
    "tiny": dict(max_tokens=512, max_length=384, max_new_tokens=48, prompts=16, group_size=8, slots=256,
                 batch=12, save_every=50),
    "tiny sft": dict(steps=1000, lr=2e-3),
    "tiny rl": dict(steps=50, lr=2.5e-4),
    "real": dict(max_tokens=16384, max_length=2048, max_new_tokens=2048, prompts=8, group_size=8, slots=64,
                 batch=16, save_every=10),
    "real sft": dict(steps=100, lr=1e-5),
    "real rl": dict(steps=40, lr=1e-6),
    "paper": dict(max_length=8192, max_new_tokens=8192, prompts=128, group_size=32, batch=512, slots=256)}


def parse_flags(argv=None):
    """The command line → `c`, a namespace with the value of every flag: what was given, else the default for
    this model and stage. What cannot be meant ends the run here."""
    parser = all_flags()
    known, _ = parser.parse_known_args(argv)
    kind = "tiny" if is_tiny(known.model) else "real"
    defaults = PRESETS[kind] | PRESETS.get(f"{kind} {known.stage}", {})
    if known.recipe:
        defaults |= PRESETS["paper"] | PRESETS.get(f"real {known.stage}", {})
    if known.model == "tiny":
        defaults["block_size"] = 4
    defaults["engine"] = known.engine or ("lmdeploy" if kind == "real" and gpu_memory() else "torch")
    if known.recipe and known.stage == "rl" and defaults["engine"] == "lmdeploy" and gpu_memory() < 100e9:
        defaults |= {"sleep": True, "engine_memory": 0.7}              # an 8B trained beside it fills 80 GB
    parser.set_defaults(**defaults)
    parser.add_argument("--help", action="help", help="this text; defaults are those under the flags given")
    c = parser.parse_args(argv)
    c.eps_high = c.eps if c.eps_high is None else c.eps_high
    if c.beta > 0 and c.objective == "eq8":
        fail("--beta above 0 with --objective eq8: Eq. 8 has no KL term; take eq6 or eq7, or drop --beta")
    if c.importance and (c.objective == "eq6" or c.confidence == "drawn"):
        fail("--importance: it is for --objective eq7 or eq8 (Eq. 6 has the sampler in its ratio) with "
             "--confidence top1 (else the draw decides what is committed)")
    if c.engine == "lmdeploy" and c.stage != "sft" and not gpu_memory():
        fail("--engine lmdeploy: it needs a CUDA GPU and there is none; --engine torch runs anywhere")
    if c.sleep and c.engine != "lmdeploy":
        fail("--sleep: it is for --engine lmdeploy")
    if c.engine_memory >= 1:
        fail(f"--engine-memory {c.engine_memory}: a share of the free GPU memory, below 1")
    if c.eval_data and not (c.stage == "rl" and c.data):
        fail("--eval-data: it is for --stage rl with --data")
    if c.stage in ("eval", "show") and c.model == "tiny":
        fail(f"--stage {c.stage}: say which checkpoint with --model, such as runs/tiny-0/rl")
    if c.resume and not c.out:
        fail("--resume: say which run with --out")
    if c.block_size and c.block_size % c.tokens_per_step:
        fail(f"--tokens-per-step {c.tokens_per_step}: must divide the block size {c.block_size}")
    return c


def all_flags():
    """The parser of the flags. Defaults that depend on others are in PRESETS."""
    parser = argparse.ArgumentParser("dirl.py", add_help=False, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    add, count = parser.add_argument, number(int, 1)
    add("--stage", default="rl", choices=("sft", "rl", "eval", "show"), help="tiny rl runs sft first")
    add("--model", default="tiny", help="tiny (built here), or a folder: SDAR, A2D, Qwen3; paper: SDAR-8B")
    add("--data", help=".json or .jsonl: chats (sft), problems (others); else built-in arithmetic")
    add("--out", help="folder of the run: metrics, checkpoints, states; else under runs/")
    add("--recipe", choices=("paper",), help="paper: its values for the flags not given")
    add("--seed", type=number(int, 0), default=0, help="of every random draw")
    add("--steps", type=count, help="optimizer steps of sft, rollout steps of rl; paper: sft 100, rl 40")
    add("--lr", type=number(float, 0), help="after warm-up; sft: then a cosine; paper: sft 1e-5, rl 1e-6")
    add("--max-tokens", type=count, help="N: most tokens of a packed row; a longer document is its own row")
    add("--max-length", type=count, help="most tokens of an sft example or rl prompt; paper: 8192")
    add("--batch", type=count, help="sft: examples a step; paper: 512")
    add("--prompts", type=count, help="rl: prompts (groups) a step; paper: 128")
    add("--group-size", type=number(int, 2), help="G: trajectories a prompt; paper: 32")
    add("--max-new-tokens", type=count, help="output tokens at which decoding stops; paper: 8192")
    add("--block-size", type=count, help="B: tokens a block, for a model that does not say; paper: 4")
    add("--no-thinking", action="store_true", help="enable_thinking=False: the prompt closes <think>")
    add("--unmask", choices=("static", "dynamic", "sequential"), default="dynamic", help="see section 5.1")
    add("--tokens-per-step", type=count, default=1, help="static, sequential: a divisor of B; paper: 1")
    add("--threshold", type=number(float, 0), default=0.9, help="dynamic: commit from it on; paper: 0.9")
    add("--confidence", choices=("top1", "drawn"), default="top1", help="which token's; paper: top1")
    add("--temperature", type=number(float, 1e-3), default=1.0, help="as sampled and as scored; paper: 1")
    add("--slots", type=count, help="sequences decoded at once")
    add("--engine", choices=("torch", "lmdeploy"), help="of rollouts; for checkpoints on a GPU lmdeploy")
    add("--engine-memory", type=number(float, 0.01), default=0.4, help="lmdeploy: cache, of free GPU memory")
    add("--sleep", action="store_true", help="lmdeploy: free its weights and cache while the model trains")
    add("--objective", choices=("eq6", "eq7", "eq8"), default="eq8", help="DiPO: Eq. 6, 7 or 8; paper: eq8")
    add("--eps", type=number(float, 0), default=0.2, help="ε of C_ε; paper: 0.2")
    add("--eps-high", type=number(float, 0), help="ε of C_ε above 1; else that of --eps")
    add("--beta", type=number(float, 0), default=0.0, help="β of the KL term of Eq. 6 and 7; paper: 0")
    add("--adv-std", action="store_true", help="divide the advantage by the group's standard deviation")
    add("--importance", type=number(float, 1e-6), help="C: weigh trajectories by π_θ/π_sampler, at most by C")
    add("--updates", type=count, default=1, help="optimizer updates on each batch of rollouts; paper: 1")
    add("--reward", help="module:function(answer, truth) -> number, in place of the built-in check")
    add("--eval-data", help="rl: problems for evaluation, in place of held-out ones of --data")
    add("--eval-every", type=count, help="rl: evaluate every so many steps, besides before and after")
    add("--samples", type=number(int, 0), default=0, help="evaluation: answers a problem; 0: one greedy")
    add("--prompt", help="show: what to ask; else the first problem of --data")
    add("--save-every", type=count, help="steps between saves of what --resume needs; authors' code: 10")
    add("--resume", action="store_true", help="continue the stage in --out from its newest saved state")
    return parser


def number(kind, least):
    """argparse's type for finite numbers of a kind that are at least so large."""
    def parse(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value
    parse.__name__ = kind.__name__                                     # argparse: "invalid int value"
    return parse


def is_tiny(model):
    """Whether --model is the built-in model, or a checkpoint of it: its config.json says so."""
    config = Path(model, "config.json")
    with in_one_line(f"--model {model}"):
        return model == "tiny" or config.is_file() and b'"tiny": true' in config.read_bytes()


def gpu_memory():
    """Bytes of this rank's GPU, 0 without one."""
    gpu = int(os.environ.get("LOCAL_RANK", 0))
    return torch.cuda.get_device_properties(gpu).total_memory if torch.cuda.is_available() else 0


@contextmanager
def in_one_line(where):
    """What goes wrong in files and libraries is said in one line: where, and what."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:                     # torch's CheckpointException is no Exception, and its
        if hasattr(error, "failures"):                 # text is a traceback: say the first rank's failure
            error, _ = next(iter(error.failures.values()))
        fail(f"{where}: {' '.join(str(error).split())[:300] or type(error).__name__}")


# ---- data and rewards ------------------------------------------------------------------------------------

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
HELD_OUT = 256                   # problems kept for evaluation, of a file at most a tenth
EXAMPLES = 2**13                 # of the built-in task, for sft; a quarter as many problems for rl
NEEDS = {"sft": 'needs "messages": [{"role", "content"}, ...], the last an assistant\'s',
         "rl": "needs question or problem, and ground_truth_answer, answer, or a solution with \\boxed{}"}


def read_data(c):
    """(records of the stage, those that rl evaluates on) from files, --prompt or the built-in task."""
    if c.stage == "show" and c.prompt is not None:
        with in_one_line("--prompt"):
            c.prompt.encode()                                          # a lone surrogate is no text
        return [(c.prompt, "")], []
    if not c.data:
        held_out = built_in("held out", c.seed) if c.stage != "sft" else []
        return (held_out, []) if c.stage in ("eval", "show") else (built_in(c.stage, c.seed), held_out)
    eval_records = read_records(c.eval_data, "--eval-data", "rl") if c.eval_data else []
    records = read_records(c.data, "--data", "sft" if c.stage == "sft" else "rl")
    return split(records, eval_records) if c.stage == "rl" else (records, [])


def split(records, held_out):
    """(records to train on, records held out): those given, else those of the questions with the smallest
    hashes, a tenth of all distinct ones. No question that is held out is trained on, in any copy of it."""
    def question(record):
        return " ".join(record[0].split())
    if not held_out:
        distinct = {question(record): record for record in reversed(records)}
        smallest = sorted(distinct, key=lambda text: hashlib.sha256(text.encode()).digest())
        held_out = [distinct[text] for text in smallest[:min(HELD_OUT, len(distinct) // 10)]]
    asked = set(map(question, held_out))
    kept = [record for record in records if question(record) not in asked]
    return kept or fail("--data: all its questions are in --eval-data too"), held_out


def read_records(path, name, stage):
    """The good records of a .json list or a .jsonl file: chats, or (question, truth). Bad ones are skipped
    and counted; a file with as many bad as good ones, or more, is refused."""
    with in_one_line(f"{name} {path}: not a readable .json list or .jsonl file"):
        with open(path, encoding="utf-8-sig") as file:
            records = [x for x in file if x.strip()] if path.endswith(".jsonl") else list(json.load(file))
    good, bad = [], []
    for n, record in enumerate(records, 1):
        try:
            record = json.loads(record) if path.endswith(".jsonl") else record
            good.append(read_chat(record) if stage == "sft" else read_problem(record))
        except (ValueError, TypeError, LookupError, AttributeError, StopIteration, RecursionError):
            bad.append(n)
    found = f"{name} {path}: {len(bad)} of {len(records)} records are bad, the first is number {[*bad, 0][0]}"
    if len(good) <= len(bad):
        fail(f"{found}; each {NEEDS[stage]}" if bad else f"{name} {path}: no records in it")
    if bad:
        say(f"{found}; they are skipped")
    return good


def read_problem(record):
    """(question, truth) of a record of RL; the field names are DiRL's, GSM8K's, MATH's or Big-Math's. Of each
    the first that says something counts: a text or, for the truth, a finite number."""
    questions = record.get("question"), record.get("problem")
    question = next(x for x in questions if isinstance(x, str) and x.strip())
    question.encode()                                                  # a lone surrogate is no text
    answers = record.get("ground_truth_answer"), record.get("answer"), last_boxed(str(record.get("solution")))
    answers = [x for x in answers if isinstance(x, str) or isinstance(x, (int, float)) and math.isfinite(x)]
    truths = (str(x).rsplit("####", 1)[-1].strip() for x in answers)
    return question, next(truth for truth in truths if truth)


def read_chat(record):
    """The messages of a record of SFT, cut after the last assistant's: that is the answer. Only role and
    content are handed on, so text under other keys (tool calls, thoughts) makes it a bad record."""
    def text_in(value):
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return bool(value.strip()) if isinstance(value, str) else any(map(text_in, inside))
    last = max(i for i, m in enumerate(record["messages"]) if i and m["role"] == "assistant")
    messages = []
    for m in record["messages"][:last + 1]:
        messages.append({"role": str(m["role"]), "content": m["content"]})
        m["content"].encode()                                          # a lone surrogate is no text
        if text_in([value for key, value in m.items() if key not in ("role", "content")]):
            raise ValueError("text that would get lost")
    if not messages[-1]["content"].strip():
        raise ValueError("an empty answer")
    return messages


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


def built_in(stage, seed):
    """The records of the built-in task, as from a file: chats for sft, (question, truth) for the others."""
    if stage == "sft":
        made = (arithmetic((seed, "sft", i)) for i in range(EXAMPLES))
        return [[{"role": "user", "content": question}, {"role": "assistant", "content": work}]
                for question, work, _ in made]
    made = [arithmetic(("held out", i), True) for i in range(HELD_OUT)] if stage == "held out" else \
           [arithmetic((seed, "rl", i)) for i in range(EXAMPLES // 4)]
    return [(question, truth) for question, _, truth in made]


def arithmetic_reward(answer, truth):
    """1.0 if what follows the last "=" is the result."""
    return float(answer.rsplit("=", 1)[-1] == truth)


def last_boxed(text):
    """What stands in the last \\boxed{...} of a text, braces matched, or after a bare \\boxed; else None."""
    start, depth = text.rfind("\\boxed"), 0
    rest = text[start + 6:].lstrip() if start >= 0 else ""
    if not rest.startswith("{"):
        bare = re.match(r"\s+([^\s${}]+)", text[start + 6:]) if start >= 0 else None
        return bare and bare[1]
    for i, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:i]


SIGNS = {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ",
         "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "⟨": "(", "⟩": ")",
         r"\langle": "(", r"\rangle": ")", "{,}": ",", r"\%": "%", "°": " ", r"\degree": ""}
FORMS = (                        # (pattern, what takes its place), in this order
    (r"\\(left|right|[bB]igg?[lr]?|displaystyle|!)(?![a-z])|\\?\$", ""), (r"(?<!\\)\\[,;: ]|[~\s]", " "),
    (r"\\[dtc]frac", r"\\frac"), (r"\\[lc]?dots[bc]?(?![a-z])", "..."), (r"\^\{?\\circ\}?|degrees?", ""),
    (r"\\(text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \2 "), (r"\*\*", "^"),
    (r"%", r"\\%"), (r"\*", r"\\cdot "), (r"\^\{(-?\d+)\}|\^(-?\d+)", r"^{\1\2}"),
    (r"(?<![\d.,({\[])[1-9]\d{0,2}((,\d{3})+|( \d{3})+)(?![\d,/]| [\d/])",
     lambda number: re.sub("[ ,]", "", number[0])),                                     # 1 234 and 1,234
    (r"(?<![\w.])(\d+\.?\d*)[eE]([+-]?)0*(\d+)(?!\w)", r"\1\\times 10^{\2\3}"),         # 6.02e23
    (r"(?<=\d)_\{?(\d+)\}?$", r" base^{\1}"), (r"(?<![\\a-z])(sqrt|pi|infty)(?![a-z])", r"\\\1 "),
    (r"(?<![\\a-z])infinity(?![a-z])", r"\\infty "),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"\\sqrt\s+([\w.]+)", r"\\sqrt{\1}"),
    (r"(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),                      # 2\frac{1}{4}
    (r"(?<![\d./])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d./])", r"(\1+\\frac{\2}{\3})"))        # 2 1/4
UNIT = r"(?!and |or |to |mod )(?:[A-Za-z]{2}|[mgshLKNJWVAC](?![A-Za-z]))(?:[A-Za-z /.-]|\^\{-?\d+\})*"
UNITS = (("per ", "/"), (r"(\w\w)s\b", r"\1"), ("kilo", "k"), ("centi", "c"), ("milli", "m"), ("gram", "g"),
         ("met(er|re)", "m"), ("hour|hr", "h"), ("minute", "min"), ("second", "s"), ("feet|foot", "ft"),
         ("inche?", "in"), ("mile", "mi"), ("kmph", "km/h"), ("mph", "mi/h"), ("celsiu", "c"),
         (r"squ?a?r?e?\.? (\w+)", r"\1^{2}"), (r"cubic (\w+)", r"\1^{3}"), (" ", ""))


def plain(text):
    """(value, unit) of a final answer, brought to one form: two ways to type an answer become one text."""
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", re.sub("[²³¹⁰-⁹]+", r"^{\g<0>}", text))
    text = unicodedata.normalize("NFKC", text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, word)
    for pattern, form in FORMS:
        text = re.sub(pattern, form, text)
    text = re.sub(r"(?<![\\A-Za-z])([A-Za-z]{3,}|No)", lambda word: word[0].lower(), " ".join(text.split()))
    text = text if text.endswith("..") else text.rstrip(". ")
    number = re.fullmatch(rf"(.*[\d)}}])\s+({UNIT})", text)
    value, unit = number.groups() if number else (text, "")
    unit = unit.lower()
    for pattern, form in UNITS:
        unit = re.sub(pattern, form, unit)
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", value), unit


def close(gold, found):
    """Whether values that math-verify calls equal are so relatively too: it takes what is near 0 for 0."""
    if getattr(gold, "is_number", False) and getattr(found, "is_number", False):
        gold, found = gold.evalf(), found.evalf()
        return bool(abs(gold - found) <= 1e-5 * max(abs(gold), abs(found)))
    parts = [list(x.flat() if hasattr(x, "flat") else getattr(x, "args", ())) for x in (gold, found)]
    return type(gold) is not type(found) or len(parts[0]) != len(parts[1]) or all(map(close, *parts))


def math_reward(answer, truth):
    """1.0 if the answer's last \\boxed{} equals the truth: as a text in one form, or else by math-verify (in
    the main thread only). An added unit is no fault, another unit is one."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException
    boxed = last_boxed(answer)
    if boxed is None or len(boxed) > 200 + 2 * len(truth):             # no final answer is that long
        return 0.0
    (gold, gold_unit), (found, found_unit) = plain(truth), plain(boxed)
    if gold_unit and found_unit and gold_unit != found_unit:
        return 0.0
    if re.sub(r"(?<!\d) | (?!\d)", "", gold) == re.sub(r"(?<!\d) | (?!\d)", "", found):
        return 1.0
    both = f"{gold} {found}"
    if "..." in both or gold.lower() == found.lower() or re.search(r"(?<![\\a-z{])[a-z]{4}", both):
        return 0.0                                                 # sequences, choices, words: as they stand
    try:
        gold, found = (parse(f"\\boxed{{{x}}}", parsing_timeout=2) for x in (gold, found))
        equal = verify(gold, found, timeout_seconds=2)
        return float(equal and ("%" in both or close(gold[0], found[0])))      # 50% is 50 and 0.5
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


def encode(policy, c, record):
    """A record as the stage wants it, (tokens [S], P) of a chat or a Problem, asked as the paper asks; None
    if it cannot be used: too long, with a [MASK] in it, or with a message that the template leaves out."""
    from jinja2 import TemplateError
    try:
        if c.stage == "sft":
            item = policy.example(record)
        else:
            question, truth = record
            asked = [{"role": "user", "content": question + (INSTRUCTION if c.data else "")}]
            item = Problem(policy.prompt(asked), truth, question)
    except (ValueError, TemplateError):
        return None
    return item if len(item[0]) <= c.max_length and policy.mask_id not in item[0] else None


class Walk:
    """Iterates over records for ever, in a new order every epoch: (number, encoded record). Each is encoded
    when its turn comes; those that cannot be used are passed over and counted. `position` counts them too, so
    the walk is the same on any number of ranks, and goes on anywhere."""

    def __init__(self, policy, c, source, records):
        self.policy, self.c, self.source, self.records = policy, c, source, records
        self.position = self.passed_over = 0

    def __next__(self):
        n = len(self.records)
        while True:
            epoch, i = divmod(self.position, n)
            item = encode(self.policy, self.c, self.records[order(n, self.c.seed, self.c.stage, epoch)[i]])
            self.position += 1
            if item is not None:
                return self.position - 1, item
            self.passed_over += 1
            if self.passed_over == self.position >= n:
                fail(f"{self}; nothing is left", common=True)

    def once(self):
        """All that can be used, in the order of the file."""
        items = [encode(self.policy, self.c, record) for record in self.records]
        self.position, self.passed_over = len(items), sum(item is None for item in items)
        return [item for item in items if item is not None]

    def __str__(self):
        return (f"{self.source}: {self.passed_over} of {self.position} records passed over: longer than "
                f"--max-length {self.c.max_length}, with a mask token in them, or with a message that the "
                "chat template leaves out")


@functools.lru_cache(2)
def order(n, *key):
    """A random order of n items."""
    return torch.randperm(n, generator=generator(*key)).tolist()


# ---- checkpoints -----------------------------------------------------------------------------------------

def read_config(folder, c):
    """config.json of a checkpoint as a dict in SDAR's format: the same dense Qwen3 under any of its names,
    newer transformers' fields under their older ones. mask_token_id may be missing: see `load_tokenizer`."""
    with in_one_line(f"--model {folder}: config.json"):
        config = dict(read_json(os.path.join(folder, "config.json")))
        kind = config.get("model_type")
        if kind not in ("sdar", "a2d-qwen3", "qwen3") or any("expert" in name for name in config):
            raise ValueError(f"model_type {kind!r}; only dense Qwen3: 'sdar', 'a2d-qwen3', 'qwen3'")
        layers = set(config.pop("layer_types", None) or [])
        if layers - {"full_attention"} or config.get("use_sliding_window"):
            raise ValueError("sliding windows are not supported")
        rope = config.pop("rope_parameters", None) or {}
        config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: x for name, x in rope.items() if name != "rope_theta"}
        scaling = config.get("rope_scaling") or {}
        scaling = scaling.get("rope_type", scaling.get("type", "default"))
        if scaling not in ("default", "linear", "yarn", "llama3"):     # dynamic, longrope: sampler and scorer
            raise ValueError(f"rope_type {scaling!r}, which depends on the length seen")        # would differ
        config["torch_dtype"] = config.pop("dtype", None) or config.get("torch_dtype") or "bfloat16"
        if not isinstance(getattr(torch, config["torch_dtype"]), torch.dtype):
            raise ValueError(f"torch_dtype {config['torch_dtype']!r}, which torch does not know")
        if kind == "a2d-qwen3" and not (config.get("block_size") or c.block_size):
            raise ValueError("it has no block_size: give --block-size (4 for OPDLM's, 32 for dllm's)")
        config["block_size"] = int(config.get("block_size") or c.block_size or 4)
        eos, mask = eos_ids(folder, config), config.get("mask_token_id")
        if not eos or not all(type(x) is int and 0 <= x < config["vocab_size"] for x in [*eos, mask or 0]):
            raise ValueError(f"eos_token_id {eos}, mask_token_id {mask!r}: ids below vocab_size are needed")
        qwen3_config(config)                                           # transformers checks the other fields
    if c.block_size not in (None, config["block_size"]):
        fail(f"--block-size {c.block_size}: the block size of {folder} is {config['block_size']}")
    if config["block_size"] % c.tokens_per_step:
        fail(f"--tokens-per-step {c.tokens_per_step}: must divide the block size {config['block_size']}")
    code = re.findall(r"'([^']+)\.\w+'", str(list((config.get("auto_map") or {}).values())))
    if kind != "sdar" or not all(os.path.exists(os.path.join(folder, name + ".py")) for name in code):
        config.pop("auto_map", None)
    return config | {"model_type": "sdar", "architectures": ["SDARForCausalLM"]}


def eos_ids(folder, config):
    """The end tokens of config.json, then those of generation_config.json: decoding stops at all."""
    path = os.path.join(folder, "generation_config.json")
    generation = read_json(path).get("eos_token_id") if os.path.exists(path) else None
    found = config["eos_token_id"], [] if generation is None else generation
    return [x for ids in found for x in (ids if isinstance(ids, list) else [ids])]


def qwen3_config(config):
    """SDAR's dense architecture is Qwen3's: the same fields, and the attention function set to ours."""
    import transformers
    transformers.AttentionInterface.register("dirl", attention)
    ours = {"model_type", "architectures", "auto_map", "attn_implementation", "_attn_implementation",
            "torch_dtype", "tiny"}
    known = {name: value for name, value in config.items() if name not in ours}
    return transformers.Qwen3Config(**known, attn_implementation="dirl")


def load_tokenizer(folder, config):
    """(tokenizer, id that ends a turn, whether [MASK] was added). Sets config's mask_token_id where it is
    missing: the tokenizer's mask token, else a new one, of the next id, if the embedding has room for it.
    AutoTokenizer refuses folders with a tokenizer class of their own, and gives some of them other ids."""
    import transformers
    files = set(os.listdir(folder))
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise ValueError("no tokenizer in it: neither tokenizer.json nor vocab.json and merges.txt")
    name = "PreTrainedTokenizerFast" if "tokenizer.json" in files else "Qwen2Tokenizer"
    tokenizer = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    add_mask = config.get("mask_token_id") is None and tokenizer.mask_token_id is None
    if add_mask:
        tokenizer.add_special_tokens({"mask_token": "<|MASK|>"})
    if config.get("mask_token_id") is None:
        config["mask_token_id"] = tokenizer.mask_token_id
    if tokenizer.mask_token_id not in (None, config["mask_token_id"]):
        raise ValueError(f"its mask_token_id is {config['mask_token_id']}, its tokenizer's mask token "
                         f"{tokenizer.mask_token} has id {tokenizer.mask_token_id}")
    largest = max(config["mask_token_id"], *tokenizer.get_vocab().values())
    if largest >= config["vocab_size"]:
        raise ValueError(f"token id {largest}: the embedding has room for {config['vocab_size']}")
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the-answer"}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).rsplit("the-answer", 1)[1]
    return tokenizer, tokenizer(after, add_special_tokens=False)["input_ids"][0], add_mask


def load_policy(folder, c):
    """A Policy from config.json, safetensors and tokenizer files. No code from the folder is run. The weights
    stay in the file's dtype until `shard` turns one part after the other to float32."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config, before = read_config(folder, c), read_json(os.path.join(folder, "config.json"))
    with in_one_line(f"--model {folder}"):
        tokenizer, end_id, add_mask = load_tokenizer(folder, config)
        model, info = transformers.Qwen3ForCausalLM.from_pretrained(
            folder, config=qwen3_config(config), dtype="auto", use_safetensors=True, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[what]:
                raise ValueError(f"{what.replace('_', ' ')} in its weights: {min(map(str, info[what]))}")
    config.pop("quantization_config", None)                            # what is loaded is quantised no more
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    chosen = [f"{x} {config[x]}" for x in ("mask_token_id", "block_size") if before.get(x) is None]
    if chosen:
        say(f"{folder}: its config.json does not say, so chosen here: {', '.join(chosen)}")
    if before["model_type"] == "qwen3" and c.stage != "sft":
        say(f"warning: {folder} is a plain Qwen3, no block diffusion model yet: SFT comes first")
    if model.num_parameters() > 1e8:                                   # memory for time, where memory counts
        model.activation_checkpointing_enable({"use_reentrant": False})
    temperature = 1.0 if c.stage == "sft" else c.temperature           # Eq. 3 is about p_θ itself
    return Policy(shard(model).train(), tokenizer, folder, config, end_id, eos_ids(folder, config),
                  temperature, not c.no_thinking, add_mask)


def save_policy(policy, folder):
    """A checkpoint in SDAR's format: config.json, the weights in its dtype, and the source folder's other
    small files as they are."""
    from huggingface_hub import save_torch_state_dict
    state = {}
    for name, tensor in policy.named_weights(getattr(torch, policy.config["torch_dtype"])):
        if rank() == 0:
            state[name] = tensor.to("cpu", copy=True)          # a gathered one is a slice of padded storage
    with written_aside(folder) as aside:
        if rank() > 0:
            return
        for file in os.scandir(policy.folder):
            weights = re.search(r"\.(safetensors|bin|pth?|gguf)(\.index\.json)?$", file.name)
            if file.is_file() and not weights and file.stat().st_size < 2**26:
                shutil.copyfile(file.path, os.path.join(aside, file.name))
        write_json(os.path.join(aside, "config.json"), policy.config)
        if policy.added_mask:
            save_tokenizer(policy.tokenizer, aside)
        save_torch_state_dict(state, aside)
        for file in os.scandir(aside):                         # safetensors are written for the owner only
            shutil.copymode(os.path.join(aside, "config.json"), file.path)


def save_tokenizer(tokenizer, folder):
    """As transformers 4 reads it too, which knows no list of extra_special_tokens and not the class."""
    tokenizer.save_pretrained(folder)
    path = os.path.join(folder, "tokenizer_config.json")
    config = read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
    write_json(path, config)


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


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
    save_tokenizer(tokenizer, folder)
    eos, mask = tokenizer.convert_tokens_to_ids([special[0], special[2]])
    config = dict(
        architectures=["SDARForCausalLM"], model_type="sdar", vocab_size=len(tokenizer), hidden_size=128,
        intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        hidden_act="silu", attention_bias=False, attention_dropout=0.0, rms_norm_eps=1e-6, rope_theta=30.0,
        initializer_range=0.08, max_position_embeddings=4096, rope_scaling=None, sliding_window=None,
        use_sliding_window=False, tie_word_embeddings=False, use_cache=True, torch_dtype="float32",
        bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, mask_token_id=mask, block_size=B, tiny=True)
    write_json(os.path.join(folder, "config.json"), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(qwen3_config(config))
    save_torch_state_dict(model.state_dict(), folder)


# ---- rows: documents packed, and dealt to the ranks ------------------------------------------------------

def make_rows(policy, lengths, document, c):
    """document(i), of lengths[i] tokens, for all i → this rank's packed rows on its device. A rank makes its
    own documents only. All ranks get equally many rows, because FSDP's collectives want them to run equally
    many forwards; an empty row is a dummy: a document's first block, of which nothing is read."""
    dealt, capacity = deal(lengths, c.max_tokens)
    rows = []
    for indices in dealt:
        documents = [document(i) for i in indices]
        if not indices:
            tokens = ("ids", "pos", "view")
            documents = [{name: x[:policy.B] if name in tokens else x[:0] for name, x in document(0).items()}]
        n = sum(lengths[i] for i in indices)
        length = row_length(n, capacity) if policy.device.type == "cuda" else None
        rows.append({name: x.to(policy.device) for name, x in join(documents, length).items()})
    return rows


def deal(lengths, max_tokens):
    """Documents of these lengths → (this rank's rows, lists of document indices; capacity: most tokens of a
    packed row). A small batch makes shorter rows, of a power of two or three quarters of one, lest ranks be
    idle; the last row may be empty."""
    share = max(-(-sum(lengths) // world()), *lengths, 512)
    power = 1 << (share - 1).bit_length()
    capacity = min(max_tokens, power * 3 // 4 if share <= power * 3 // 4 else power)
    rows = pack(lengths, capacity)
    mine = rows[rank()::world()]
    return mine + [[]] * (-(-len(rows) // world()) - len(mine)), capacity


def pack(lengths, capacity):
    """Documents into rows of at most so many tokens, longest first, each into the first row where it fits; a
    longer one gets a row of its own. Returns a list of lists of document indices."""
    rows, left = [], []                                                # left: tokens that still fit in a row
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = next((r for r in range(len(rows)) if lengths[i] <= left[r]), len(rows))
        if r == len(rows):
            rows.append([])
            left.append(capacity)
        rows[r].append(i)
        left[r] -= lengths[i]
    return rows


def row_length(n, capacity):
    """Length on CUDA of a row with n tokens. Few lengths in all, since FlexAttention is compiled for each:
    the capacity for packed rows, a multiple of 4,096 for a longer document."""
    return -(-capacity // 128) * 128 if n <= capacity else -(-n // 4096) * 4096


# ---- saving and resuming ---------------------------------------------------------------------------------
# OUT/STAGE is the newest checkpoint, OUT/STAGE.metrics.jsonl one line a step. OUT/STAGE.state/N holds what
# --resume needs after step N: weights, moments, and how far the Walk through the data has come. A resumed
# stage begins at the newest state; lines of later steps are cut from its files (`begin`), and then everything
# is done again as it was, because every draw has a generator of its own, whose key says its step.

def write_lines(c, name, lines):
    """Append lines to OUT/name, one JSON object each; a number that is not finite is null."""
    if rank() == 0:
        path = os.path.join(c.out, name)
        with in_one_line(f"cannot write {path}"), open(path, "a", encoding="utf-8") as file:
            for line in lines:
                finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x
                          for key, x in line.items()}
                file.write(json.dumps(finite, allow_nan=False) + "\n")


@contextmanager
def written_aside(folder):
    """A folder for all ranks to write in, which then takes the place of `folder` as a whole: so a folder of
    that name is never a part of one."""
    if rank() == 0:
        shutil.rmtree(folder + ".tmp", ignore_errors=True)
        os.makedirs(folder + ".tmp")
    barrier()                                                          # it is there for all ranks
    yield folder + ".tmp"
    barrier()                                                          # all have written
    if rank() == 0:
        shutil.rmtree(folder + ".old", ignore_errors=True)
        if os.path.isdir(folder):
            os.rename(folder, folder + ".old")
        os.rename(folder + ".tmp", folder)
        shutil.rmtree(folder + ".old", ignore_errors=True)


def saved_states(c):
    """The whole states OUT/STAGE.state/N, in the order of their steps N."""
    folders = Path(c.out, c.stage + ".state").glob("*")
    return sorted((x for x in folders if x.name.isdigit()), key=lambda x: int(x.name))


def save(policy, optimizer, c, step, walk):
    """The checkpoint OUT/STAGE and the state OUT/STAGE.state/STEP; the last two states stay."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    with in_one_line(f"cannot save in {c.out}"):
        save_policy(policy, os.path.join(c.out, c.stage))
        model, moments = get_state_dict(policy.model, optimizer)
        with written_aside(os.path.join(c.out, c.stage + ".state", str(step))) as folder:
            dcp.save({"model": model, "optimizer": moments, "position": walk.position,
                      "passed_over": walk.passed_over}, checkpoint_id=folder)
        for old in saved_states(c)[:-2] if rank() == 0 else []:
            shutil.rmtree(old)


def resume(policy, optimizer, c, walk):
    """The steps done of a stage. With --resume its newest state is loaded: weights, moments, walk."""
    if not c.resume or not saved_states(c):
        return 0
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    folder = saved_states(c)[-1]
    with in_one_line(f"--resume: {folder}"):
        model, moments = get_state_dict(policy.model, optimizer)
        state = {"model": model, "optimizer": moments, "position": 0, "passed_over": 0}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(policy.model, optimizer, model_state_dict=model, optim_state_dict=moments)
        walk.position, walk.passed_over = state["position"], state["passed_over"]
    say(f"{c.stage}: resuming after step {folder.name}")
    return int(folder.name)


def begin(c):
    """Refuse a stage of which OUT holds lines or states, unless --resume continues it: then cut the lines of
    the steps after its newest state, half-written ones too. OUT/STAGE.run.json keeps flags and versions."""
    from importlib.metadata import version
    files = [path for path in Path(c.out).glob(c.stage + ".*jsonl") if path.stat().st_size]
    last = max((int(state.name) for state in saved_states(c)), default=-1)
    if not c.resume and (files or last >= 0):
        fail(f"--out {c.out}: it holds {c.stage} up to step {max(last, 0)}: --resume continues it, another "
             "--out starts anew")
    if c.steps and last > c.steps:
        fail(f"--steps {c.steps}: {c.out} holds {c.stage} up to step {last} already")
    for path in files:
        with open(path, "rb+") as file:
            keep, line = 0, file.readline()
            while last >= 0 and line.endswith(b"\n") and json.loads(line)["step"] <= last:
                keep, line = keep + len(line), file.readline()
            file.truncate(keep)
    installed = [name for name in ("torch", "transformers", "lmdeploy") if importlib.util.find_spec(name)]
    write_json(os.path.join(c.out, c.stage + ".run.json"),
               {"flags": vars(c), "versions": {name: version(name) for name in installed}})


def lock(out):
    """OUT/.lock, open: OUT is one run's while its process lives, as a rank may after kill -9 of torchrun."""
    with in_one_line(f"--out {out}"):
        os.makedirs(out, exist_ok=True)
        file = open(os.path.join(out, ".lock"), "w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--out {out}: another run is writing there; wait for it, or end it (pgrep -f dirl.py)")
    return file


# ---- main ------------------------------------------------------------------------------------------------

def start_ranks():
    """torchrun's ranks become one process group. One rank on a GPU is a group of its own, without a port; one
    on a CPU needs none, see `shard`."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")                     # TF32, for the vocabulary projection
        torch.backends.cuda.enable_cudnn_sdp(False)                    # it plans for every shape of `decode`
    if dist.is_initialized() or (world() == 1 and not cuda):
        return
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world() == 1 else {}
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, **alone)
    ranks = gather([int(os.environ.get("LOCAL_WORLD_SIZE", 1))])
    if len(set(ranks)) > 1:
        fail(f"nodes of {set(ranks)} ranks: every node needs equally many, --nproc_per_node", common=True)


def run_stage(c, records, reward=None, eval_records=()):
    """One stage on the checkpoint in the folder c.model; sft and rl leave theirs in OUT/sft and OUT/rl."""
    if c.stage != "show" and rank() == 0:
        begin(c)
    policy = load_policy(c.model, c)
    source = "--prompt" if c.prompt is not None else c.data or "the built-in task"
    walk, held_out = Walk(policy, c, source, records), Walk(policy, c, c.eval_data or source, eval_records)
    if c.stage == "sft":
        train_sft(policy, c, walk)
    else:
        asked = held_out if c.stage == "rl" else walk
        problems = asked.once()
        if not problems and (c.stage != "rl" or c.eval_data):
            fail(f"{asked}; nothing is left", common=True)
        reference = load_policy(c.model, c) if c.stage == "rl" and c.beta else None
        with closing({"torch": TorchEngine, "lmdeploy": LMDeployEngine}[c.engine](policy, c)) as engine:
            if c.stage == "show":
                show(policy, engine, c, problems[0])
            elif c.stage == "eval":
                evaluate(policy, engine, c, problems, reward)
            else:
                train_rl(policy, reference, engine, c, walk, reward, problems)
    for passed in (walk, held_out):
        if passed.passed_over:
            say(str(passed))


def summary(c):
    """What a run of RL came to, from its metrics."""
    with open(os.path.join(c.out, "rl.metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rewards = [line["reward"] for line in lines if "reward" in line]
    accuracy = [line["accuracy"] for line in lines if "accuracy" in line]
    first, last = (sum(r) / len(r) for r in (rewards[:5], rewards[-10:]))
    how = "sampled" if c.samples else "greedy"
    evaluated = f"{how} accuracy {accuracy[0]:.3f} -> {accuracy[-1]:.3f}, " if accuracy else ""
    return f"{evaluated}reward {first:.3f} (first 5 steps) -> {last:.3f} (last 10); "


def main(argv=None):
    # what was asked: an error in it ends the run before anything is written
    c = parse_flags(argv)
    records, eval_records = read_data(c)
    reward = load_reward(c) if c.stage in ("rl", "eval") else None
    if c.model != "tiny":
        read_config(c.model, c)
    start_ranks()

    # where: OUT, one folder for all ranks, and this run's alone
    name = "eval" if c.stage == "eval" else os.path.basename(c.model.rstrip("/"))
    fresh = (f"runs/{name}-{n}" for n in itertools.count())
    c.out, *_ = gather([c.out or next(out for out in fresh if not os.path.exists(out))])
    with lock(c.out) if rank() == 0 and c.stage != "show" else nullcontext():
        barrier()

        # the tiny model is built, and its RL begins with a whole stage of SFT
        if c.model == "tiny":
            c.model = os.path.join(c.out, "init")
            if rank() == 0 and not os.path.exists(os.path.join(c.model, "model.safetensors")):
                build_tiny(c.model, c.block_size, c.seed)
            barrier()                                                  # it is there for all ranks
            if c.stage == "rl":
                sft = parse_flags(["--stage", "sft"])
                for flag in "model out seed block_size batch max_tokens save_every resume".split():
                    setattr(sft, flag, getattr(c, flag))
                if not saved_states(sft) or int(saved_states(sft)[-1].name) < sft.steps:
                    run_stage(sft, built_in("sft", c.seed))
                c.model = os.path.join(c.out, "sft")
        run_stage(c, records, reward, eval_records)
    if c.stage != "show":
        say(f"{c.stage}: {summary(c) if c.stage == 'rl' else ''}all of it is in {c.out}")
    if world() > 1:                      # Python's own end can abort gloo's threads, and with them torchrun
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
