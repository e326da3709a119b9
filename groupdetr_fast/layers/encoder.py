"""The transformer encoder of DETR (post-norm), used by every single-level detector."""

from collections.abc import Callable

from torch import Tensor, nn

from .attention import SelfAttention
from .mlp import MLP
from .transformer_layer import TransformerLayer, relu_in_place

__all__ = ["TransformerEncoder", "TransformerEncoderLayer"]


class TransformerEncoderLayer(TransformerLayer):
    """Self-attention and feed-forward block, each followed by dropout, residual and layer norm."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        activation: Callable[[], nn.Module] = relu_in_place,
    ):
        super().__init__()
        self.dropout = dropout
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.activation = activation()
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        x = self.norm1(x + self._drop(self.self_attn(x, position, padding)))
        return self.norm2(x + self._feed_forward(x))


class TransformerEncoder(nn.Module):
    """``num_layers`` encoder layers over tokens ``[B, S, d]``; the position embedding enters every layer.

    Args:
        activation: of the feed-forward blocks.
        scale_position: multiply the position embedding, channel by channel, by a function of each layer's input, as
            DAB-DETR does.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        *,
        activation: Callable[[], nn.Module] = relu_in_place,
        scale_position: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(dim, num_heads, dim_feedforward, dropout, activation) for _ in range(num_layers)
        )
        self.query_scale = MLP(dim, dim, dim, 2) if scale_position else None

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        for layer in self.layers:
            scaled = position if self.query_scale is None else position * self.query_scale(x)
            x = layer(x, scaled, padding)
        return x
