"""The paper's regression baseline: an image encoder and one neuron, used as OrdinalCLIP is.

Dims: B images, R ranks, D features.
Copy together with: nothing; needs torch>=2.4.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Regression(nn.Module):
    """The paper's regression baseline: one neuron that gives the rank index, with L1 or L2 loss.

    It starts at the middle rank. `predict` puts the probability on the two ranks beside the answer,
    so that the expected rank is the answer (within 0..R-1) and the most probable one the nearest.
    """

    def __init__(self, image_encoder: nn.Module, dim: int, num_ranks: int, loss_type: str) -> None:
        super().__init__()
        self.image_encoder, self.num_ranks, self.loss_type = image_encoder, num_ranks, loss_type
        self.head = nn.Linear(dim, 1)
        nn.init.constant_(self.head.bias, (num_ranks - 1) / 2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> rank indices (B,), of any size."""
        return self.head(self.image_encoder(images).float())[:, 0]

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        target: str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), rank indices (B,) -> (mean loss, the same, 0).

        With `group` the loss is that of all its processes, and gradients are each one's share, as
        OrdinalCLIP's. `target` is OrdinalCLIP's column target: without columns it has no effect.
        """
        error = self(images) - labels
        error = error.abs() if self.loss_type == "l1" else error.square()
        total = error.mean()
        if group is not None:
            total = total / dist.get_world_size(group)
            global_loss = total.detach().clone()
            dist.all_reduce(global_loss, group=group)
            total = total + (global_loss - total.detach())
        return total, total, torch.zeros_like(total)

    @torch.no_grad()
    def predict(self, images: Tensor, *, impl: str = "auto") -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> dict(rank=nearest (B,), expected=the answer (B,), probs (B, R)).

        `impl` is OrdinalCLIP's choice of kernels and has no effect.
        """
        ranks = torch.arange(self.num_ranks, device=images.device)
        expected = self(images).clamp(0, self.num_ranks - 1)  # (B,)
        probs = (1 - (expected[:, None] - ranks).abs()).clamp_min(0)  # (B, R)
        return dict(rank=probs.argmax(1), expected=expected, probs=probs)

    def export(self) -> nn.Module:
        return self
