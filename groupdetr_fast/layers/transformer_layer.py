"""What the layers of all encoders and decoders share: dropout and the feed-forward block."""

from torch import Tensor, nn

from ..ops._dropout import dropout

__all__ = ["TransformerLayer", "relu_in_place"]


class TransformerLayer(nn.Module):
    """Base of the layers, which make these modules, in the order and under the names of the original repositories.

    Attributes:
        dropout: probability.
        linear1, activation, linear2: the feed-forward block.
    """

    dropout: float
    linear1: nn.Linear
    activation: nn.Module
    linear2: nn.Linear

    def _feed_forward(self, x: Tensor) -> Tensor:
        # One axis of rows: of more, a linear layer returns a view, whose change in place autograd pays for with copies.
        rows = x.flatten(0, -2)
        rows = self._drop(self.linear2(self._drop(self.activation(self.linear1(rows)))))
        return rows.unflatten(0, x.shape[:-1])

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout) if self.training else x


def relu_in_place() -> nn.ReLU:
    """The activation of most layers. Nobody else sees its input, the largest tensor of a layer."""
    return nn.ReLU(inplace=True)
