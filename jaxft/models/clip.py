"""transformers' `CLIPTextModel`, with and without projection: the text encoders.

Radford et al. 2021 (https://arxiv.org/abs/2103.00020). Names are those of SD's files, which
keep the prefix `text_model.`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.errors import UserError
from jaxft.models import options
from jaxft.models.attention import attend
from jaxft.models.layers import Embedding, Linear
from jaxft.models.norms import LayerNorm
from jaxft.shapes import TextStates, TokenIds

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
FREE: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
    "projection_dim": 512,
}
FIXED: dict[str, tuple] = {"model_type": ("clip_text_model",), "attention_dropout": (0.0,)}
IGNORED = (
    "architectures", "bos_token_id", "dropout", "dtype", "initializer_factor",
    "initializer_range", "pad_token_id", "torch_dtype", "transformers_version",
)  # fmt: skip


class CLIPAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int):
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.out_proj = Linear(width, width)
        self.heads = heads

    def __call__(self, x: TextStates) -> TextStates:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).reshape(*x.shape[:2], self.heads, -1) for p in projections)
        return self.out_proj(attend(q, k, v, causal=True).reshape(x.shape))


class CLIPMLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner: int, activation: str):
        self.fc1 = Linear(width, inner)
        self.fc2 = Linear(inner, width)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: TextStates) -> TextStates:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """Attention and MLP, each with pre-norm."""

    def __init__(self, o: Any):
        self.self_attn = CLIPAttention(o.hidden_size, o.num_attention_heads)
        self.layer_norm1 = LayerNorm(o.hidden_size, o.layer_norm_eps)
        self.mlp = CLIPMLP(o.hidden_size, o.intermediate_size, o.hidden_act)
        self.layer_norm2 = LayerNorm(o.hidden_size, o.layer_norm_eps)

    def __call__(self, x: TextStates) -> TextStates:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEmbeddings(nnx.Module):
    """Token and position embeddings, added."""

    def __init__(self, o: Any):
        self.token_embedding = Embedding(o.vocab_size, o.hidden_size)
        self.position_embedding = Embedding(o.max_position_embeddings, o.hidden_size)

    def __call__(self, input_ids: TokenIds, words: Float[Array, "n d"] | None = None) -> TextStates:
        tokens = self.token_embedding(input_ids)
        if words is not None:
            # Beside the table, not behind it: a gradient by the words is as large as they are.
            row = input_ids - self.token_embedding.weight.shape[0]
            own = words[jnp.maximum(row, 0)].astype(tokens.dtype)
            tokens = jnp.where((row >= 0)[..., None], own, tokens)
        return tokens + self.position_embedding(jnp.arange(input_ids.shape[1]))


class CLIPEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, o: Any):
        self.layers = nnx.List([CLIPEncoderLayer(o) for _ in range(o.num_hidden_layers)])


class CLIPTextTransformer(nnx.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, o: Any):
        self.embeddings = CLIPTextEmbeddings(o)
        self.encoder = CLIPEncoder(o)
        self.final_layer_norm = LayerNorm(o.hidden_size, o.layer_norm_eps)


class CLIPTextModel(nnx.Module):
    """Token ids to one state per position.

    Args:
        config: transformers' `text_encoder/config.json`.

    Raises:
        UserError: names each option of the configuration that is not supported.
    """

    def __init__(self, config: Mapping[str, Any]):
        o = read_options(config)
        self.text_model = CLIPTextTransformer(o)
        self.eos_token_id, self.vocab_size = o.eos_token_id, o.vocab_size

    def __call__(
        self,
        input_ids: TokenIds,
        clip_skip: int = 0,
        final_norm: bool = True,
        words: Float[Array, "n d"] | None = None,
    ) -> tuple[TextStates, Float[Array, "b d"]]:
        """States and pooled state of token ids [b, s]; in the dtype of the embeddings.

        Args:
            input_ids: at most `max_position_embeddings` positions; those from `vocab_size` on are
                rows of words.
            clip_skip: layers left out at the end (0: none).
            final_norm: whether the states pass the final norm; the pooled state always does,
                after all layers.
            words: rows of words, unless they lie in the table of tokens
                (`conditioning.add_rows`).
        """
        model = self.text_model
        x = model.embeddings(input_ids, words)
        layers = list(model.encoder.layers)
        states = x
        for i, layer in enumerate(layers):
            x = layer(x)
            if i == len(layers) - 1 - clip_skip:
                states = x
        normed = model.final_layer_norm(x)
        pooled = normed[jnp.arange(len(x)), self._end(input_ids)]
        if not final_norm:
            return states, pooled
        return (normed if clip_skip == 0 else model.final_layer_norm(states)), pooled

    def _end(self, input_ids: TokenIds) -> Array:
        """Position of the end token; the highest id in SD's old configurations (eos 2), but for
        words that were added behind the vocabulary."""
        if self.eos_token_id == 2:
            return jnp.where(input_ids < self.vocab_size, input_ids, -1).argmax(axis=-1)
        return (input_ids == self.eos_token_id).argmax(axis=-1)


class CLIPTextModelWithProjection(CLIPTextModel):
    """The same with a projection of the pooled state: the second encoder of Stable Diffusion XL."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        o = read_options(config)
        self.text_projection = Linear(o.hidden_size, o.projection_dim, bias=False)

    def __call__(
        self,
        input_ids: TokenIds,
        clip_skip: int = 0,
        final_norm: bool = True,
        words: Float[Array, "n d"] | None = None,
    ) -> tuple[TextStates, Float[Array, "b p"]]:
        """As `CLIPTextModel`, the pooled state projected."""
        states, pooled = super().__call__(input_ids, clip_skip, final_norm, words)
        return states, self.text_projection(pooled)


def unused(names: Iterable[str], layers: int, clip_skip: int, final_norm: bool) -> set[str]:
    """Of a text encoder's weights, those without part in its states: of the last layers that are
    left out, and of the final norm where that is."""
    beginnings = [f"text_model.encoder.layers.{n}." for n in range(layers - clip_skip, layers)]
    beginnings += [] if final_norm else ["text_model.final_layer_norm."]
    return {name for name in names if name.startswith((*beginnings, "text_projection."))}


def read_options(config: Mapping[str, Any]) -> Any:
    """The options of a text encoder; raises UserError for those that are not supported."""
    o = options.read("text_encoder", config, FREE, FIXED, IGNORED)
    if o.hidden_act not in ACTIVATIONS:
        choices = ", ".join(ACTIVATIONS)
        raise UserError(f"text_encoder: hidden_act: {o.hidden_act!r} is not one of {choices}")
    return o
