"""The one place where attention is computed, and the layer that calls it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.models.layers import Identity, Linear

QUERY_CHUNK = 512
"""Queries whose scores are in memory at one time, [heads, 512, keys]."""


def attend(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    causal: bool = False,
) -> Float[Array, "b s h d"]:
    """softmax(q · kᵀ / √d) · v, per head; softmax in float32; memory linear in s and t.

    NVIDIA's cuDNN kernel where its rules allow, else query chunks (`_chunked`).
    """
    if _cudnn_allows(q):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    return jnp.swapaxes(_chunked(*heads_first, causal), 1, 2)


def _cudnn_allows(q: Array) -> bool:
    if jax.default_backend() != "gpu" or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    capability = float(getattr(jax.devices()[0], "compute_capability", "0"))
    largest = 256 if capability >= 9 else 128
    return capability >= 8 and q.shape[-1] % 8 == 0 and q.shape[-1] <= largest


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """Attention on [b, h, s, d] that holds one chunk of queries' scores at a time.

    Its gradient saves the log-sum-exp of each row and forms the scores again; Dao 2023,
    FlashAttention-2 (https://arxiv.org/abs/2307.08691), eq. 4 and algorithm 2.
    """
    return _chunked_forward(q, k, v, causal)[0]


def _scores(q: Array, k: Array, start: Array | int, causal: bool) -> Array:
    """Scaled scores of a chunk of queries that begins at position `start`; float32."""
    scores = jnp.einsum("bhsd,bhtd->bhst", q, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5)
    if causal:
        positions = start + jnp.arange(q.shape[2])[:, None]
        scores = jnp.where(jnp.arange(k.shape[2]) <= positions, scores, -jnp.inf)
    return scores


def _chunked_forward(q: Array, k: Array, v: Array, causal: bool):
    def one_chunk(chunk, start):
        scores = _scores(chunk, k, start, causal)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bhst,bhtd->bhsd", weights.astype(v.dtype), v) / total.astype(v.dtype)
        return out, (top + jnp.log(total))[..., 0]

    chunks, starts = _split(q)
    if chunks.shape[0] == 1:
        out, log_sum = one_chunk(q, 0)
    else:
        out, log_sum = jax.lax.map(lambda c: one_chunk(*c), (chunks, starts))
        out, log_sum = _join(out, q.shape[2]), _join(log_sum, q.shape[2])
    return out, (q, k, v, out, log_sum)


def _chunked_backward(causal: bool, saved, grad: Array):
    q, k, v, out, log_sum = saved
    scale = q.shape[-1] ** -0.5
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)  # [b, h, s]

    def one_chunk(carry, chunk):
        q_c, grad_c, log_sum_c, delta_c, start = chunk
        weights = jnp.exp(_scores(q_c, k, start, causal) - log_sum_c[..., None])
        dweights = jnp.einsum("bhsd,bhtd->bhst", grad_c, v, preferred_element_type=jnp.float32)
        dscores = (weights * (dweights - delta_c[..., None]) * scale).astype(q.dtype)
        dq = jnp.einsum("bhst,bhtd->bhsd", dscores, k)
        dk = carry[0] + _float32_einsum("bhst,bhsd->bhtd", dscores, q_c)
        dv = carry[1] + _float32_einsum("bhst,bhsd->bhtd", weights.astype(v.dtype), grad_c)
        return (dk, dv), dq

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    q_chunks, starts = _split(q)
    if q_chunks.shape[0] == 1:
        (dk, dv), dq = one_chunk(zeros, (q, grad, log_sum, delta, 0))
    else:
        chunks = (q_chunks, _split(grad)[0], _split(log_sum)[0], _split(delta)[0], starts)
        (dk, dv), dq = jax.lax.scan(one_chunk, zeros, chunks)
        dq = _join(dq, q.shape[2])
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


_float32_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_chunked.defvjp(_chunked_forward, _chunked_backward)


def _split(x: Array) -> tuple[Array, Array]:
    """[b, h, s, …] -> ([chunks, b, h, chunk, …], start of each); the tail is filled with zeros."""
    b, h, s = x.shape[:3]
    chunk = min(s, QUERY_CHUNK)
    count = -(-s // chunk)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, count * chunk - s)] + [(0, 0)] * (x.ndim - 3))
    x = jnp.moveaxis(x.reshape(b, h, count, chunk, *x.shape[3:]), 2, 0)
    return x, jnp.arange(count) * chunk


def _join(x: Array, s: int) -> Array:
    """Undoes `_split`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :s]


class Attention(nnx.Module):
    """diffusers' `Attention`: self-attention, or cross-attention over `context`."""

    def __init__(self, query_dim: int, context_dim: int, heads: int):
        self.to_q = Linear(query_dim, query_dim, bias=False)
        self.to_k = Linear(context_dim, query_dim, bias=False)
        self.to_v = Linear(context_dim, query_dim, bias=False)
        self.to_out = nnx.List([Linear(query_dim, query_dim), Identity()])
        self.heads = heads

    def __call__(
        self, x: Float[Array, "b s c"], context: Float[Array, "b t d"] | None = None
    ) -> Float[Array, "b s c"]:
        context = x if context is None else context
        q, k, v = (
            project(source).reshape(*source.shape[:2], self.heads, -1)
            for project, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out[0](attend(q, k, v).reshape(x.shape))
