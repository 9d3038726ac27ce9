"""How a batch compares with the critical one: the size from which larger batches save few steps.

Estimates for orientation, never part of the choice of a plan: both formulas are fits to other
people's runs, on other data.
"""

from __future__ import annotations

import math
from typing import Any

CRITICAL_TOKENS, CRITICAL_EXPONENT = 2e8, 0.21
"""Kaplan et al. 2020, "Scaling laws for neural language models", eq. 1.4: B* and alpha_B of
B_crit = B* / L^(1 / alpha_B), the loss in nats a token of a vocabulary of 50257."""
ENTROPY, BY_PARAMETERS, BY_TOKENS = 1.69, (406.4, 0.34), (410.7, 0.28)
"""Hoffmann et al. 2022, "Training compute-optimal large language models", eq. 10: the loss of
N parameters after D tokens is E + A / N^alpha + B / D^beta."""
LEAST_VOCABULARY = 10_000
"""A token of bytes or of a small vocabulary carries less, so neither fit says anything of it."""


def critical_batch_tokens(loss: float) -> float:
    """Tokens at which a step's noise and its signal are of one size, at this loss."""
    return CRITICAL_TOKENS / loss ** (1 / CRITICAL_EXPONENT)


def expected_loss(parameters: int, tokens: int, vocab: int) -> float | None:
    """Nats a token at the end of a run; None where the fit says nothing."""
    if vocab < LEAST_VOCABULARY:
        return None
    of_parameters = BY_PARAMETERS[0] / parameters ** BY_PARAMETERS[1]
    loss = ENTROPY + of_parameters + BY_TOKENS[0] / tokens ** BY_TOKENS[1]
    return loss if loss < math.log(vocab) else None


def batch_object(
    tokens_per_step: int, given: float | None, parameters: int, tokens: int | None, vocab: int
) -> dict[str, Any]:
    """given: the loss that the spec expects. tokens: of the whole run, None when not known."""
    loss, source = given, "given"
    if loss is None and tokens is not None:
        loss, source = expected_loss(parameters, tokens, vocab), "parameters and tokens"
    if loss is None:
        keys = ("loss", "loss_from", "critical_tokens", "share_of_critical")
        return {"tokens_per_step": tokens_per_step, **dict.fromkeys(keys)}
    critical = critical_batch_tokens(loss)
    return {
        "tokens_per_step": tokens_per_step,
        "loss": round(loss, 3),
        "loss_from": source,
        "critical_tokens": round(critical),
        "share_of_critical": round(tokens_per_step / critical, 3),
    }
