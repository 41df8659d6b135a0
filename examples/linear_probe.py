"""The linear probe: logistic regression on the pretrained features, where fine-tuning starts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_DECAYS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)


def linear_probe(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    num_classes: int,
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS,
) -> tuple[nn.Linear, float]:
    """Fits on `train`, chooses the weight decay on `val`; both are (features, labels).

    Weight decay treats all features alike only when they are standardised. That is folded into the
    head, which takes raw features. Cross-entropy decides, as accuracy on few images is coarse.

    Returns:
        the head and its weight decay.
    """
    features, labels = train
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    standardised = (features - mean) / std
    head = nn.Linear(features.shape[1], num_classes, device=features.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)

    best, best_loss, chosen = head, float("inf"), weight_decays[0]
    for weight_decay in sorted(weight_decays, reverse=True):  # each solution starts the next
        _fit(head, standardised, labels, weight_decay)
        candidate = _fold(head, mean, std)
        with torch.inference_mode():
            loss = F.cross_entropy(candidate(val[0]), val[1]).item()
        if loss < best_loss:
            best, best_loss, chosen = candidate, loss, weight_decay
    return best, chosen


def _fit(head: nn.Linear, features: Tensor, labels: Tensor, weight_decay: float) -> None:
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=100, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels)
        loss = loss + 0.5 * weight_decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def _fold(head: nn.Linear, mean: Tensor, std: Tensor) -> nn.Linear:
    folded = nn.Linear(head.in_features, head.out_features, device=mean.device)
    with torch.no_grad():
        folded.weight.copy_(head.weight / std)
        folded.bias.copy_(head.bias - folded.weight @ mean)
    return folded
