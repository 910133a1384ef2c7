"""The one place where attention is computed, and the layer that calls it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.models.layers import Identity, Linear

SCORES_AT_ONCE = 2**22
"""Scores in memory at one time, over batch, heads, queries and keys: what a CPU's cache holds."""

SMALLEST_CHUNK = 128
"""Queries that are taken together even if their scores are more than that."""


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
    FlashAttention-2 (https://arxiv.org/abs/2307.08691), eq. 4 and algorithm 2. The layouts are
    those in which every product reads its operands in order.
    """
    return _chunked_forward(q, k, v, causal)[0]


def _scores(q: Array, k_t: Array, start: Array | int, causal: bool) -> Array:
    """Scores [b, h, s, t] of scaled queries from position `start` on, keys [b, h, d, t]."""
    scores = _float32_einsum("bhsd,bhdt->bhst", q, k_t)
    if not causal:
        return scores
    positions = start + jnp.arange(q.shape[2])[:, None]
    return jnp.where(jnp.arange(k_t.shape[3]) <= positions, scores, -jnp.inf)


def _chunked_forward(q: Array, k: Array, v: Array, causal: bool):
    q = q * q.shape[-1] ** -0.5
    k_t = jnp.swapaxes(k, 2, 3)

    def one_chunk(chunk: Array, start: Array | int) -> tuple[Array, Array]:
        scores = _scores(chunk, k_t, start, causal)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        out = _float32_einsum("bhst,bhtd->bhsd", weights.astype(v.dtype), v) / total
        return out.astype(v.dtype), (top + jnp.log(total))[..., 0]

    size = _chunk_size(q, k)
    if size == q.shape[2]:
        out, log_sum = one_chunk(q, 0)
    else:
        out, log_sum = jax.lax.map(lambda chunk: one_chunk(*chunk), _split(q, size))
        out, log_sum = _join(out, q.shape[2]), _join(log_sum, q.shape[2])
    return out, (q, k, v, out, log_sum)


def _chunked_backward(causal: bool, saved: tuple[Array, ...], grad: Array):
    q, k, v, out, log_sum = saved  # q is scaled
    k_t, v_t = jnp.swapaxes(k, 2, 3), jnp.swapaxes(v, 2, 3)
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)  # [b, h, s]

    def one_chunk(carry: tuple[Array, Array], chunk: tuple):
        q_c, grad_c, log_sum_c, delta_c, start = chunk
        weights = jnp.exp(_scores(q_c, k_t, start, causal) - log_sum_c[..., None])
        dweights = _float32_einsum("bhsd,bhdt->bhst", grad_c, v_t)
        dscores = (weights * (dweights - delta_c[..., None])).astype(q.dtype)
        weights = weights.astype(q.dtype)
        dq = _float32_einsum("bhst,bhtd->bhsd", dscores, k)
        dk_t = carry[0] + _float32_einsum("bhds,bhst->bhdt", jnp.swapaxes(q_c, 2, 3), dscores)
        dv_t = carry[1] + _float32_einsum("bhds,bhst->bhdt", jnp.swapaxes(grad_c, 2, 3), weights)
        return (dk_t, dv_t), dq

    sums = jnp.zeros(k_t.shape, jnp.float32), jnp.zeros(v_t.shape, jnp.float32)
    size = _chunk_size(q, k)
    if size == q.shape[2]:
        sums, dq = one_chunk(sums, (q, grad, log_sum, delta, 0))
    else:
        chunks, starts = _split(q, size)
        rest = [_split(x, size)[0] for x in (grad, log_sum, delta)]
        sums, dq = jax.lax.scan(one_chunk, sums, (chunks, *rest, starts))
        dq = _join(dq, q.shape[2])
    dk, dv = (jnp.swapaxes(x, 2, 3) for x in sums)
    scale = q.shape[-1] ** -0.5
    return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_float32_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_chunked.defvjp(_chunked_forward, _chunked_backward)


def _chunk_size(q: Array, k: Array) -> int:
    """Queries of one chunk: all, or a power of two."""
    b, h, s, _ = q.shape
    fitting = SCORES_AT_ONCE // (b * h * k.shape[2])
    return s if fitting >= s else min(s, max(SMALLEST_CHUNK, 1 << fitting.bit_length() >> 1))


def _split(x: Array, size: int) -> tuple[Array, Array]:
    """[b, h, s, …] -> ([chunks, b, h, size, …], start of each); the tail is filled with zeros."""
    b, h, s = x.shape[:3]
    count = -(-s // size)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, count * size - s)] + [(0, 0)] * (x.ndim - 3))
    x = jnp.moveaxis(x.reshape(b, h, count, size, *x.shape[3:]), 2, 0)
    return x, jnp.arange(count) * size


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
