"""Conversion of region scorers to ordinary classifiers."""

from jaxtyping import Float
from torch import Tensor, nn

from bagcert.errors import UsageError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.scores import require_sum


class MeanScores(nn.Module):
    """Classifier whose logits are the mean of the region scores, as with global average pooling and a linear layer.

    If the receptive fields are as large as the image, this is an ordinary residual network.

    Raises:
        UsageError: the network pools regions by attention.
    """

    def __init__(self, scorer: RegionScorer) -> None:
        super().__init__()
        require_sum(scorer.readout, "a mean of region scores")
        self.scorer = scorer

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Compute the logits of images in [0, 1]."""
        return self.scorer(images).mean((2, 3))


def in_sequence(scorer: RegionScorer) -> nn.Sequential:
    """Convert `MeanScores` to one sequence of layers, for layer-by-layer bounds.

    The mean over regions is moved before the last 1x1 convolution, which becomes a linear layer. Weights are copied.

    Raises:
        UsageError: the network is not a sequence that ends with a 1x1 convolution, or pools regions by attention.
    """
    require_sum(scorer.readout, "a mean of region scores")
    *layers, last = scorer.net.children() if isinstance(scorer.net, nn.Sequential) else [nn.Identity()]
    if not isinstance(last, nn.Conv2d) or last.kernel_size != (1, 1) or last.groups != 1:
        raise UsageError("a network read layer by layer must be a sequence that ends with a 1x1 convolution")
    linear = nn.Linear(last.in_channels, last.out_channels, bias=last.bias is not None)
    linear.weight.data.copy_(last.weight.data[:, :, 0, 0])
    if last.bias is not None:
        linear.bias.data.copy_(last.bias.data)
    pooling = nn.AvgPool2d(scorer.grid().map_size)
    return nn.Sequential(scorer.normalize, *layers, pooling, nn.Flatten(), linear.to(scorer.device))
