# SPDX-License-Identifier: MIT
"""Stand-ins for CUDA, so that what runs on a GPU runs on a CPU too, in tests and in measure.py.

lmdeploy_on_cpu: LMDeploy's engine with plain PyTorch in the place of its kernels and streams. fast_interpreter and
flex_kernels_on_cpu: Triton's interpreter runs LMDeploy's own kernels, and those that torch.compile generates for
FlexAttention, on CPU tensors. What they patch stays patched: each is for a process of its own, or does no harm."""
import contextlib
import functools
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import torch

import dirl


# ---- LMDeploy's engine without its CUDA pieces ----------------------------------------------------------------------


class PagedAttention:
    """What LMDeploy's kernel computes: block-causal attention over a paged cache; sequences of equal lengths together."""
    def __init__(self, spec):
        self.scale, self.B = spec.scale or spec.head_dim**-0.5, spec.block_sparse_size

    def forward(self, query, key, value, key_cache, value_cache, attn_metadata, **unused):
        lengths, pages = torch.stack([attn_metadata.q_seqlens, attn_metadata.kv_seqlens], 1), attn_metadata.block_offsets
        page_size, out, start = key_cache.shape[1], torch.empty_like(query), lengths[:, 0].cumsum(0) - lengths[:, 0]
        for n, kv in lengths.unique(dim=0).tolist():
            members, position = (lengths == torch.tensor([n, kv])).all(1), torch.arange(kv)
            at, rows = (pages[members][:, position // page_size], position % page_size), start[members, None] + torch.arange(n)
            for cache, new in ((key_cache, key), (value_cache, value)):
                cache[at[0][:, kv - n:], at[1][kv - n:]] = new[rows].to(cache.dtype)
            q, k, v = (x.transpose(1, 2) for x in (query[rows], key_cache[at], value_cache[at]))   # [members, heads, tokens, dim]
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            mask = position // self.B <= position[kv - n:, None] // self.B
            out[rows] = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=self.scale).transpose(1, 2)
        return out


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
            return PagedAttention(spec) if isinstance(spec, attention.PagedAttentionBuildSpec) else super().build_op(spec, **more)

        @classmethod
        def update_step_context(cls, context):
            fields = ("is_decoding", "block_offsets", "q_start_loc", "q_seqlens", "kv_seqlens")
            context.attn_metadata = attention.AttentionMetadata(*(getattr(context, name) for name in fields))
            return context

    def on_cpu(self, *args, **more):
        init(self, *args, **more)
        self.device = "cpu"

    def in_float32(*args, **more):
        made = update(*args, **more)
        made.dtype = torch.float32
        return made
    init, update, allocate = agent.BaseModelAgent.__init__, config._update_torch_dtype, BlockCachePlan.allocate
    agent.BaseModelAgent.__init__, config._update_torch_dtype = on_cpu, in_float32
    BlockCachePlan.allocate = lambda self, num_logical_blocks, device: allocate(self, num_logical_blocks, "cpu")
    agent._try_to_cuda = lambda x, non_blocking=False: x.to_device("cpu") if hasattr(x, "to_device") else x
    agent.get_gpu_memory = lambda *args: (2**31, 2**31)
    selector._get_backend = lambda: Backend
    config.is_bf16_supported = lambda *args: True
    torch._dynamo.config.disable = True                             # LMDeploy compiles small functions: 20 s for nothing here;
    dirl.ThreadPoolExecutor = functools.partial(ThreadPoolExecutor, initializer=setattr,       # each thread has its own config
                                                initargs=(torch._dynamo.config, "disable", True))
    torch.cuda.Stream = torch.cuda.Event = type("Done", (), {"__init__": lambda self, *args, **more: None} | {
        name: lambda self, *args: True for name in ("record", "wait", "query", "synchronize", "wait_stream", "wait_event")})
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("current_stream", "synchronize", "empty_cache"):   # not one function: torch.compile wants them different
        setattr(torch.cuda, name, lambda *args: None)
    torch.cuda.current_device = lambda: "cpu"
    torch._C._cuda_clearCublasWorkspaces = lambda: None


# ---- Triton's interpreter -------------------------------------------------------------------------------------------


def fast_interpreter(capability):
    """Triton's interpreter, on a GPU of this capability as far as anybody asks, and faster: it patches triton's
    language once instead of at every call, and does not look for integers that overflow."""
    import triton
    from triton.runtime import interpreter
    language = triton.language
    if not hasattr(interpreter, "patched"):                         # before LMDeploy's kernels keep tl.exp2
        interpreter.patched = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
        interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
        interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    target = triton.backends.compiler.GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    return interpreter


@functools.cache
def flex_kernels_on_cpu():
    """torch.compile(flex_attention) as on sm_90: inductor's Triton templates, forward and backward, on CPU tensors. For a process
    of its own: all this stays patched."""
    import numpy as np
    import torch._inductor.lowering                                 # registers what is lowered
    from torch._dynamo.device_interface import CpuInterface
    from torch._inductor import choices, config
    from torch._inductor.kernel.flex import flex_attention as lowering
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
    interpreter = fast_interpreter((9, 0))
    import triton.language as tl
    config.cpu_backend, config.fx_graph_cache = "triton", False
    torch.nn.attention.flex_attention._validate_device = lambda *tensors: None
    CpuInterface.raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    choices.InductorChoices.get_config_heuristics = lambda self, device_type="cuda": CUDAConfigHeuristic()
    source, options = inspect.getsource(lowering.flex_attention), lowering._sanitize_kernel_options_for_triton
    assert source.count('.type == "cpu"') == 1                      # lowered as for any other device, and with what the
    exec(source.replace('.type == "cpu"', '.type == "none"'), vars(lowering))                  # backward needs:
    lowering._sanitize_kernel_options_for_triton = lambda given: options({**given, "OUTPUT_LOGSUMEXP": True})
    # The interpreter holds bfloat16 as its bits: dot would multiply those, and a cast would not round to nearest.
    Builder, tensor = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = Builder.create_dot, Builder.cast_impl

    def wide(x):
        return tensor((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def cast_rounding(self, x, to):
        kinds = x.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(x.data).view(np.uint32)
            return tensor((bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16), tl.bfloat16)
        return wide(x) if kinds == (tl.bfloat16, tl.float32) else cast(self, x, to)
    Builder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    Builder.cast_impl = cast_rounding
