"""Constant factors of each sample's terms: the functions of `objectives.FACTORS`, and the state that some keep.

Shape suffixes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.common.lookup import look_up
from engine.config import RunConfig
from engine.kernels import Term, distill_loss
from engine.system.distributed import World

Logits = Mapping[str, Tensor]

_SCALE = 5.0  # of the entropies, in the published code of SAAD
_HALF = 0.5  # MTARD's weight of the natural term at the beginning


class Factors:
    """The factors of a run. Of MTARD's weights it keeps the state: `state_dict` is for a checkpoint.

    The state is [w, first robust loss, first natural loss, 1 once these are known], on the device in float64.
    """

    def __init__(self, config: RunConfig, world: World, device: torch.device) -> None:
        self._config, self._world = config, world
        self.balance = torch.tensor([_HALF, 0.0, 0.0, 0.0], dtype=torch.float64, device=device)

    @torch.no_grad()
    def __call__(
        self, names: Iterable[str], logits: Logits, labels: Tensor, lr_part: float | Tensor
    ) -> dict[str, Tensor]:
        """The factors of that name, (B,) each. lr_part: the learning rate as a part of the run's highest."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in found:
                found |= look_up("factor", name, _MAKERS)(self, logits, labels, lr_part)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        return {"balance": self.balance}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.balance.copy_(state["balance"])

    def _entropies(self, logits: Logits, labels: Tensor, lr_part: float | Tensor) -> dict[str, Tensor]:
        """SAAD: 5 (H - min H), and 1 - (H - min H) / (max H - min H), over the batch of all processes."""
        scaled_B = _SCALE * entropy(logits["t_at_adv"], self._config.loss.entropy_order)
        both_2B = torch.stack((-scaled_B, scaled_B))
        ends = F.pad(both_2B, (0, 1), value=-torch.inf).amax(dim=1)  # padded: a process may have no image
        self._world.max_in_place(ends)
        weight_B = scaled_B + ends[0]
        return {"entropy": weight_B, "certainty": 1 - weight_B / (ends.sum() + 1e-8)}

    def _shares(self, logits: Logits, labels: Tensor, lr_part: float | Tensor) -> dict[str, Tensor]:
        """MTARD: w <- w - g (w - r_nat / (r_adv + r_nat)), with r a term relative to the run's first."""
        tau = self._config.loss.tau
        terms = [
            Term("kl", "s_adv", "t_at_adv", temperature=tau),
            Term("kl", "s_nat", "t_st_nat", temperature=tau),
        ]
        means = distill_loss(logits, labels, terms).terms.double()
        if floor := self._config.loss.balance_floor:
            means = means + torch.stack([_of_floor(logits[str(term.target)] / tau, floor) for term in terms])
        sums = torch.cat((means * len(labels), means.new_full((1,), len(labels))))
        self._world.sum_in_place([sums])
        adv, nat = (sums[:2] / sums[2]).unbind()
        share, first_adv, first_nat, known = self.balance.unbind()
        first_adv, first_nat = torch.where(known > 0, first_adv, adv), torch.where(known > 0, first_nat, nat)
        of_adv, of_nat = adv / first_adv, nat / first_nat
        rate = self._config.loss.balance_rate * lr_part
        share = share - rate * (share - of_nat / (of_adv + of_nat))
        self.balance.copy_(torch.stack((share, first_adv, first_nat, torch.ones_like(known))))
        dtype = logits["s_adv"].dtype
        return {
            "robust_share": (1 - share).to(dtype).expand(len(labels)),
            "natural_share": share.to(dtype).expand(len(labels)),
        }


_MAKERS: dict[str, Callable[[Factors, Logits, Tensor, float | Tensor], dict[str, Tensor]]] = {
    "entropy": Factors._entropies,
    "certainty": Factors._entropies,
    "robust_share": Factors._shares,
    "natural_share": Factors._shares,
}


def _of_floor(target_BC: Tensor, floor: float) -> Tensor:
    """Mean of sum p (log(p + floor) - log p), p = softmax(target): a floor's part of a divergence, in float64."""
    log_p_BC = F.log_softmax(target_BC.double(), dim=1)
    p_BC = log_p_BC.exp()
    return (p_BC * (torch.log(p_BC + floor) - log_p_BC)).sum() / max(len(p_BC), 1)


def entropy(logits_BC: Tensor, order: float) -> Tensor:
    """Renyi entropy of softmax(logits), (B,), in nats: log(sum p^order) / (1 - order); order 1: -sum p log p."""
    log_p_BC = F.log_softmax(logits_BC, dim=1)
    if order == 1:
        return -(log_p_BC.exp() * log_p_BC).sum(dim=1)
    return torch.logsumexp(order * log_p_BC, dim=1) / (1 - order)
