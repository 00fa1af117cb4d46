"""Losses of both training stages."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.degradation import Degradation, operators
from miar_monai.errors import ConfigurationError, MissingWeightsError
from miar_monai.networks import MIAR, MSVQVAE
from miar_monai.networks.decoding import Decoding, decode_tokens

__all__ = ["MIARObjective", "ReconstructionLoss", "adaptive_weight", "corrupt_tokens", "token_loss"]


class ReconstructionLoss(nn.Module):
    """Weighted sum of L1, L2 and a perceptual distance between images in about [0, 1].

    Args:
        l1: weight of the mean absolute error.
        l2: weight of the mean squared error.
        perceptual: weight of MONAI's `monai.losses.PerceptualLoss` (LPIPS); 0 needs no weights.
        network: backbone of the perceptual loss: ``"alex"``, ``"squeeze"`` or ``"vgg"``. Its weights come from the
            torch hub folder, or are downloaded there by torchvision.

    Raises:
        MissingWeightsError: if the backbone's weights are neither present nor downloadable.

    Example:
        >>> loss = ReconstructionLoss(l1=1.0, l2=0.0, perceptual=0.0)
        >>> loss(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
        tensor(1.)
    """

    def __init__(self, l1: float = 0.2, l2: float = 1.0, perceptual: float = 1.0, network: str = "alex") -> None:
        super().__init__()
        self.l1, self.l2, self.perceptual = l1, l2, perceptual
        self.perceptual_distance = perceptual_distance(network) if perceptual else None

    def train(self, mode: bool = True) -> ReconstructionLoss:
        """Stay in evaluation mode, whatever ``mode`` is, since LPIPS has dropout."""
        return super().train(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compare images (B, 1, H, W): scalar."""
        loss = self.l1 * F.l1_loss(prediction, target) + self.l2 * F.mse_loss(prediction, target)
        if self.perceptual_distance is not None:
            # LPIPS expects images in [-1, 1]
            loss = loss + self.perceptual * self.perceptual_distance(2 * prediction - 1, 2 * target - 1)
        return loss


def perceptual_distance(network: str) -> nn.Module:
    """Return MONAI's perceptual loss with frozen weights."""
    from monai.losses import PerceptualLoss

    try:
        loss = PerceptualLoss(spatial_dims=2, network_type=network, is_fake_3d=False)
    except (URLError, OSError) as error:
        raise MissingWeightsError(
            f"the weights of the perceptual loss {network!r} are not in {torch.hub.get_dir()}/checkpoints and could not"
            " be downloaded; put the file there (or set TORCH_HOME), or train with --perceptual_weight 0."
        ) from error
    return loss.eval().requires_grad_(False)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 1e4) -> Tensor:
    """Return the adversarial weight that balances the gradient norms of both losses at the last layer (VQGAN).

    Args:
        reconstruction: reconstruction loss, scalar.
        adversarial: generator's adversarial loss, scalar.
        last_layer: weight of the decoder's last convolution.
        limit: maximum weight.

    Returns:
        ‖∇ reconstruction‖ / ‖∇ adversarial‖, without gradient: scalar.

    Reference:
        Esser et al., Taming Transformers, 2021, Eq. 7.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> adaptive_weight((3 * w).sum(), w.sum(), w)
        tensor(2.9998)
    """
    norm = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    adversarial_norm = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (norm / (adversarial_norm + 1e-4)).clamp(max=limit).detach()


def corrupt_tokens(tokens: Tensor, neighbors: Tensor, max_rate: float) -> Tensor:
    """Replace a random fraction of tokens by neighboring codes.

    Args:
        tokens: (B, n · S), int64.
        neighbors: nearest codes of each code, (S, V, N); see `MultiScaleQuantizer.neighbors`.
        max_rate: the fraction of each sample is drawn uniformly from [0, max_rate].

    Returns:
        (B, n · S), int64.

    Example:
        >>> corrupt_tokens(torch.tensor([[0, 1]]), torch.tensor([[[1], [0]]]), max_rate=0.0)
        tensor([[0, 1]])
    """
    rate = max_rate * torch.rand(len(tokens), 1, device=tokens.device)
    choice = torch.randint(neighbors.shape[2], tokens.shape, device=tokens.device)
    books = torch.arange(tokens.shape[1], device=tokens.device) % len(neighbors)
    replacements = neighbors[books, tokens, choice]
    return torch.where(torch.rand(tokens.shape, device=tokens.device) < rate, replacements, tokens)


def token_loss(logits: Tensor, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of tokens (B, n) given logits (B, n, V), optionally weighted by ``weight`` (n,)."""
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
    return loss.mean() if weight is None else (loss * weight).mean() / weight.mean()


class MIARObjective(nn.Module):
    """Losses of stage 2: cross-entropy of the tokens, and image losses of the decoder's two output maps.

    The target tokens are those of the HR image, encoded by the frozen tokenizer. Some tokens in the inputs of the
    transformer are replaced, and the targets of the next scales correct these errors (self-correction). The decoder is
    trained on tokens predicted by the transformer, with their errors; optionally its perceptual map is also trained on
    the target tokens, which contain detail that the LR image does not.

    Args:
        network: the network to train.
        tokenizer: trained tokenizer.
        reconstruction: loss of the perceptual output map.
        self_correction: maximum fraction of replaced tokens; 0 for no self-correction.
        num_neighbors: number of nearest codes from which a replacement is drawn.
        scale_weight_power: tokens of scale k have the weight (L_K / L_k)^power: 0 for equal weights, 0.5 for higher
            weights of coarse scales (Infinity).
        image_weight: weight of both image losses. With 0, the paper's, only tokens are learned, and the decoder remains
            that of the tokenizer.
        teacher_forcing: fraction of the images whose perceptual map is decoded from the target tokens.
        degradations: degradations of the LR images; only the network's by default.

    Reference:
        Paper Sec. 3.1–3.2; Han et al., Infinity, 2024, Sec. 3.4 (bitwise self-correction).
    """

    neighbors: Tensor
    scale_weight: Tensor

    def __init__(
        self,
        network: MIAR,
        tokenizer: MSVQVAE,
        reconstruction: nn.Module,
        self_correction: float = 0.3,
        num_neighbors: int = 10,
        scale_weight_power: float = 0.0,
        image_weight: float = 30.0,
        teacher_forcing: float = 0.0,
        degradations: Sequence[Degradation] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.teacher_forcing = teacher_forcing
        self.degradations = tuple(degradations or [network.degradation])
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.reconstruction = reconstruction
        self.self_correction = self_correction
        self.num_neighbors = num_neighbors
        self.image_weight = image_weight
        lengths = torch.tensor([side**2 for side in tokenizer.schedule.sides], dtype=torch.float32)
        weight = (lengths[-1] / lengths) ** scale_weight_power
        weight = weight[tokenizer.schedule.levels()].repeat_interleave(tokenizer.quantizer.num_codebooks)  # (L · S,)
        self.register_buffer("scale_weight", weight, persistent=False)
        self.register_buffer("neighbors", tokenizer.quantizer.neighbors(num_neighbors), persistent=False)

    def prepare(self) -> None:
        """Update to the current codebook, whose weights may have been loaded after construction; for the trainer.

        Raises:
            ConfigurationError: if network and tokenizer have different codebooks.
        """
        if not torch.equal(self.network.quantizer.codebook, self.tokenizer.quantizer.codebook):
            raise ConfigurationError(
                "the network and the tokenizer have different codebooks, but training needs the same one;"
                " call network.load_tokenizer(tokenizer) before training."
            )
        self.neighbors.copy_(self.tokenizer.quantizer.neighbors(self.num_neighbors))

    def train(self, mode: bool = True) -> MIARObjective:
        """Set the mode of the network; tokenizer and codebook stay in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        self.network.quantizer.eval()
        return self

    @torch.no_grad()
    def teacher_targets(self, hr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the target tokens (B, L · S), transformer inputs (B, L - 1, C) and latents (B, C, G, G) of HR images.

        In training, inputs and latents are sums of codes some of which are replaced.
        """
        quantizer = self.network.quantizer
        corrupt = None
        if self.training and self.self_correction > 0:

            def corrupt(tokens: Tensor) -> Tensor:
                return corrupt_tokens(tokens, self.neighbors, self.self_correction)

        f = self.tokenizer.encoder(hr)
        steps = list(quantizer.residual_steps(f.to(quantizer.codebook.dtype), corrupt))
        inputs = [quantizer.to_scale(step.f_hat, k + 1) for k, step in enumerate(steps[:-1])]
        return torch.cat([step.tokens for step in steps], dim=1), torch.cat(inputs, dim=1), steps[-1].f_hat

    def forward(self, lr: Tensor, hr: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """Return the named losses of a batch; ``"loss"`` is the sum.

        Args:
            lr: LR images, (B, 1, h, w).
            hr: their HR images, (B, 1, H, W).
            index: index of the degradation of each image in ``degradations``, (B,), int64; that of the network by
                default.
        """
        tokens, inputs, target_f_hat = self.teacher_targets(hr)
        operator = None
        if index is not None:
            shapes = (hr.shape[2], hr.shape[3]), (lr.shape[2], lr.shape[3])
            operator = operators(self.degradations, *shapes, lr).select(index)
        observed = self.network.observe(lr, operator)
        features = self.network.features(observed.linear, observed.condition)
        context = self.network.transformer.context(features.f_lr)
        logits = self.network.transformer(inputs, context)  # (B, L · S, V)
        parts = {"token_loss": token_loss(logits, tokens, self.scale_weight)}
        parts["token_accuracy"] = (logits.argmax(dim=-1) == tokens).float().mean()
        if self.image_weight == 0:
            return parts | {"loss": parts["token_loss"]}
        with torch.no_grad():
            predicted = decode_tokens(self.network.transformer, self.network.quantizer, context, Decoding())
            rate = self.teacher_forcing if self.training else 0.0
            forced = torch.rand(len(hr), 1, 1, 1, device=hr.device) < rate
        f_hat = torch.where(forced, target_f_hat, predicted.f_hat)
        maps = self.network.correct(self.network.decode(f_hat, features), observed)
        perceptual, faithful = maps.float().split(1, dim=1)
        # the faithful map is trained on predicted tokens only; others count as zero in the mean
        parts["faithful_loss"] = ((faithful - hr).abs() * ~forced).mean()
        parts["perceptual_loss"] = self.reconstruction(perceptual, hr)
        image_loss = parts["faithful_loss"] + parts["perceptual_loss"]
        return parts | {"loss": parts["token_loss"] + self.image_weight * image_loss}
