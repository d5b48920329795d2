"""A region scorer read as an ordinary classifier."""

from jaxtyping import Float
from torch import Tensor, nn

from bagcert.nets.region_scorer import RegionScorer


class MeanScores(nn.Module):
    """The mean of the region scores as logits: what a linear layer behind global average pooling computes.

    With receptive fields as large as the image this is a residual network like any other.
    """

    def __init__(self, scorer: RegionScorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of images in [0, 1]."""
        return self.scorer(images).mean((2, 3))
