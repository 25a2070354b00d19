"""BAM: a gate from the product of a channel branch and of a spatial branch with dilated convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism


class BAM(MapMechanism):
    """x * (1 + s(channel(x) * spatial(x))), for the places between the stages of a network (Park et al. 2018).

    channel(x) [b, C, 1, 1] is an MLP of the means with batch norms; spatial(x) [b, 1, H, W] is a bottleneck with
    dilated 3x3 convolutions and batch norms. The paper's eq. 2 adds the two; the authors' networks multiply, as here.
    Reads the grid. At the start the gate is about 1.5. The MLP's batch norm needs at least 2 samples in training.

    Args:
        dim: channels C. reduction: hidden channels of both branches are max(1, C // reduction).
        num_layers: hidden layers of the MLP. num_dilated: dilated convolutions. dilation: theirs.
    """

    def __init__(self, dim: int, reduction: int = 16, *, num_layers: int = 1, num_dilated: int = 2, dilation: int = 4):
        super().__init__()
        width = max(1, dim // reduction)
        layers: list[nn.Module] = []
        for i in range(num_layers):
            layers += [nn.Linear(width if i else dim, width), nn.BatchNorm1d(width), nn.ReLU()]
        self.channel = nn.Sequential(*layers, nn.Linear(width if num_layers else dim, dim))
        layers = [nn.Conv2d(dim, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(num_dilated):
            conv = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.spatial = nn.Sequential(*layers, nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        channel = self.channel(x.mean((2, 3)))[:, :, None, None]
        return x * (1 + (channel * self.spatial(x)).sigmoid())
