"""The rule of the adaptive plan: which prompts' next groups of rollouts will most likely carry a gradient.

A prompt has features z, ending in a 1 for the bias. Of its rollouts s passed and f failed; older ones fade.

    predicted   mu = clip(z w + 1/2, 0, 1),  where G w = m
    posterior   its pass rate is Beta(a, b),  a = kappa mu + s,  b = kappa (1 - mu) + f
    worth       the chance that of a group of g rollouts some pass and some fail,
                1 - B(a + g, b) / B(a, b) - B(a, b + g) / B(a, b)

A batch is of the prompts of greatest worth + noise * Gumbel (`saerl_fast.plan.choice`) but for a few drawn
uniformly. A step in which groups with pass rates y are observed does

    regression  G <- l G + (1 - l) ridge I + sum z z',  m <- l m + sum z (y - 1/2)
    rollouts    s <- fading s + g y,  f <- fading f + g (1 - y)
    evidence    E(k) <- fading E(k) + sum log(B(a + g y, b + g - g y) / B(a, b)),  a and b with kappa = k
    kappa       the k in 1/2, 1, 2, ..., 128 of greatest E(k) - log2(k / 8)^2 / 2
    guard       n <- fading n + groups,  i <- fading i + those with 0 < y < 1, of chosen and uniform prompts

The regression is recursive least squares with forgetting l, in information form, with a ridge that does not
fade. kappa, how many rollouts a prediction counts for, is empirical Bayes: the beta-binomial evidence of the
groups before they were seen, and a prior. With shares (i + 1) / (n + 2), batches are uniform while that of
the chosen prompts is the lower one by more than a standard error.

Worth is greatest where mu is near 1/2, and grows with doubt. A great kappa leaves the regression alone, a
small one the rollouts. With features=[none] the prior is the same for all prompts, as in MoPPS (Qu et al.,
2025, "Can prompt difficulty be online predicted for accelerating RL finetuning of reasoning models?"), which
chooses the prompts whose draw from the posterior is nearest to 1/2.
"""

from __future__ import annotations

import numpy as np
from scipy.special import betaln

from saerl_fast.config import AdaptiveConfig

KAPPAS = 2.0 ** np.arange(-1, 8)
EXPECTED = -0.5 * np.log2(KAPPAS / 8.0) ** 2  # the logarithm of their prior
TINY = 1e-9
GONE = 0.1  # rollouts left of a prompt's after fading, below which they are forgotten
SHORT = 64  # rollouts of a group up to which a product is faster
LEAST = 8  # uniform groups, older ones faded, before choice and chance are compared
CHOSEN, UNIFORM, OTHER = 0, 1, 2  # how a prompt came into its batch; OTHER: nobody knows


def posterior(kappa: float | np.ndarray, mu: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b, float64; ``seen``, rollouts passed and failed, has one more dimension than mu, of two."""
    a, b = kappa * mu + seen[..., 0], kappa * (1 - mu) + seen[..., 1]
    return np.maximum(a, TINY), np.maximum(b, TINY)


def worth(a: np.ndarray, b: np.ndarray, group: int) -> np.ndarray:
    """float64: the chance that ``group`` rollouts differ, under Beta(a, b)."""
    if group <= SHORT:  # B(a + g, b) / B(a, b) = prod over i < g of (a + i) / (a + b + i)
        passed, failed, total = a / (a + b), b / (a + b), a + b
        for i in range(1, group):
            passed, failed = passed * ((a + i) / (total + i)), failed * ((b + i) / (total + i))
    else:
        known = betaln(a, b)
        passed, failed = np.exp(betaln(a + group, b) - known), np.exp(betaln(a, b + group) - known)
    return np.clip(1.0 - passed - failed, 0.0, 1.0)


class Rule:
    """What a run has shown, in five float64 arrays, of which all else follows.

    ``gram`` [d + 1, d + 1] and ``moment`` [d + 1], G and m; ``evidence`` [len(KAPPAS)]; ``groups`` [2, 2],
    n and i of chosen and of uniform prompts; ``counts`` [n, 4] of prompts that have rollouts: row, ascending;
    step of the last group; passed and failed ones until then.
    """

    STATE = ("gram", "moment", "evidence", "groups", "counts")

    def __init__(self, cfg: AdaptiveConfig, width: int, group: int) -> None:
        self.cfg, self.group = cfg, group
        self.gram: np.ndarray = np.eye(width) * cfg.ridge
        self.moment, self.evidence = np.zeros(width), np.zeros(len(KAPPAS))
        self.groups, self.counts = np.zeros((2, 2)), np.zeros((0, 4))
        self.solve()

    def solve(self) -> None:
        """Follow ``gram`` and ``moment``."""
        self.weights = np.linalg.solve(self.gram, self.moment).astype(np.float32)

    def predicted(self, z: np.ndarray) -> np.ndarray:
        """float32 [n], mu of z float32 [n, d + 1]."""
        return np.clip(z @ self.weights + np.float32(0.5), 0.0, 1.0)

    @property
    def kappa(self) -> float:
        """As set, or the one that the evidence speaks for."""
        return self.cfg.kappa or float(KAPPAS[np.argmax(self.evidence + EXPECTED)])

    def worth(self, rows: np.ndarray, z: np.ndarray, step: int) -> np.ndarray:
        """float64 [n], of ``rows`` int64 [n], whose features are z, in a step."""
        predicted = self.predicted(z).astype(np.float64)
        return worth(*posterior(self.kappa, predicted, self.rollouts(rows, step)), self.group)

    def known(self) -> np.ndarray:
        """int64, the rows that have rollouts, ascending."""
        return self.counts[:, 0].astype(np.int64)

    def rollouts(self, rows: np.ndarray, step: int) -> np.ndarray:
        """float64 [n, 2]: passed and failed rollouts of ``rows`` that count in a step."""
        at, found = np.searchsorted(self.counts[:, 0], rows), np.zeros((len(rows), 2))
        held = np.append(self.counts[:, 0], -1)[at] == rows
        entries = self.counts[at[held]]
        found[held] = entries[:, 2:] * self.cfg.fading ** (step - entries[:, 1:2])
        return found

    def observe(self, rows: np.ndarray, z: np.ndarray, rates: np.ndarray, how: np.ndarray, step: int) -> None:
        """A step's groups: their rows, features and pass rates float64 [n], CHOSEN, UNIFORM or OTHER [n]."""
        fading, passed = self.cfg.fading, self.group * rates
        a, b = posterior(KAPPAS, self.predicted(z)[:, None], self.rollouts(rows, step)[:, None])
        likely = betaln(a + passed[:, None], b + self.group - passed[:, None]) - betaln(a, b)
        self.evidence = fading * self.evidence + likely.sum(axis=0)

        informative = (rates > 0) & (rates < 1)
        self.groups *= fading
        for kind in (CHOSEN, UNIFORM):
            self.groups[kind] += (how == kind).sum(), ((how == kind) & informative).sum()

        each, place = np.unique(rows, return_inverse=True)
        counts, age = self.rollouts(each, step), (step - self.counts[:, 1]).astype(np.int64)
        left = (self.counts[:, 2] + self.counts[:, 3]) * (fading ** np.arange(age.max(initial=0) + 1))[age]
        left[np.searchsorted(self.counts[:, 0], each[counts.any(axis=1)])] = 0  # those seen again
        np.add.at(counts, place, np.stack([passed, self.group * (1 - rates)], axis=1))
        stay = self.counts.take(np.flatnonzero(left > GONE), axis=0)
        together = np.concatenate([stay, np.column_stack([each, np.full(len(each), step), counts])])
        self.counts = together.take(np.argsort(together[:, 0], kind="stable"), axis=0)
        self.gram *= self.cfg.forgetting
        self.gram.flat[:: len(self.gram) + 1] += (1 - self.cfg.forgetting) * self.cfg.ridge
        self.moment *= self.cfg.forgetting
        self.add(z, rates)

    def add(self, z: np.ndarray, rates: np.ndarray) -> None:
        """Pass rates [n] of prompts to the regression alone, without forgetting."""
        z, rates = z.astype(np.float64), rates.astype(np.float64)
        self.gram += z.T @ z
        self.moment += z.T @ (rates - 0.5)
        self.solve()

    def holds(self) -> bool:
        """Whether the guard lets the choice be made; False: batches are uniform."""
        if self.groups[UNIFORM, 0] < LEAST:
            return True
        share = (self.groups[:, 1] + 1) / (self.groups[:, 0] + 2)
        error = np.sqrt((share * (1 - share) / (self.groups[:, 0] + 3)).sum())
        return bool(share[CHOSEN] + error >= share[UNIFORM])
