"""What OpenVLA-OFT adds to OpenVLA: a head that reads actions from hidden states, and a token for the robot's state.

Structure and names after Kim et al. 2025 (arXiv:2502.19645) and the files that their training writes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadBlock(nn.Module):
    """Residual block of the action head: x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """[..., width], unchanged shape."""
        out: Tensor = x + self.ffn(x)
        return out


class HeadMlp(nn.Module):
    """LayerNorm, Linear, ReLU, residual blocks, LayerNorm, Linear."""

    def __init__(self, inputs: int, width: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(HeadBlock(width) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        out: Tensor = self.fc2(self.layer_norm2(x))
        return out


class ActionHead(nn.Module):
    """One action of the chunk from the hidden states of its positions, side by side."""

    def __init__(self, width: int, action_dim: int, blocks: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = HeadMlp(width * action_dim, width, action_dim, blocks)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, chunk · action dimension, width] -> normalised actions [b, chunk, action dimension]."""
        out: Tensor = self.model(hidden.reshape(hidden.shape[0], -1, self.action_dim * hidden.shape[2]))
        return out


class ProprioProjector(nn.Module):
    """The robot's normalised state as one token: [b, state dimension] -> [b, 1, width]."""

    def __init__(self, state_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        """Cast to the weights' dtype first, as states come in float32."""
        out: Tensor = self.fc2(F.gelu(self.fc1(state.to(self.fc1.weight.dtype))))
        return out.unsqueeze(1)


def sees_everything(embeddings: Tensor) -> Tensor:
    """An attention mask [b, 1, t, t] that hides nothing, for a language model that is causal by itself.

    In four dimensions, as transformers takes such a mask as it is; zeros are added to the scores.
    """
    batch, tokens, _ = embeddings.shape
    return torch.zeros(batch, 1, tokens, tokens, dtype=embeddings.dtype, device=embeddings.device)
