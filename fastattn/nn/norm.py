"""Layer normalisation as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fastattn.functional import layer_norm


class LayerNorm(nn.LayerNorm):
    """Normalise the last dimensions of a tensor; a drop-in for `torch.nn.LayerNorm`.

    ``y = (x − mean(x)) / sqrt(var(x) + eps) · weight + bias``, mean and (biased) variance taken over
    ``normalized_shape``, in fp32 for half-precision x.

    Args:
        normalized_shape: int or ints, the sizes of the dimensions normalised over, which are the last ones of x.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and a bias, both of shape ``normalized_shape``.
        bias: False leaves only the weight.
        device, dtype: of the parameters.

    Returns of a call: ``module(x)``, x of shape (…, *normalized_shape), is a tensor of x's shape.

    Raises:
        ArgumentError: a call whose x does not end in ``normalized_shape``.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization"; interface of torch.nn.LayerNorm.

    >>> norm = LayerNorm(64)
    >>> norm(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, callers pass it by keyword
        if input.is_nested:
            return super().forward(input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
