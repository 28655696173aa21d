"""PreLoRA's two algorithms line by line, in percent and with loops, as the authors' code computes them (their formulae).

Algorithm 1: over k stored windows, every consecutive pair must satisfy |L_b - L_a| / L_a * 100 <= thr_loss, and for every
family the sum over layers of |n_b - n_a| / n_a * 100, divided by the number of layers, must be < thr_norms.
Algorithm 2: pc = percentage change between the last two windows; x = min-max of pc inside the family;
index = ceil(x * |R|) - 1, or 0 where x = 0.
"""

import math


def percent_change(a, b):
    if abs(a) < 1e-12:
        return 0.0 if abs(b - a) < 1e-12 else float("inf")
    return abs((b - a) / a) * 100


def should_switch(losses, norms, family_of, k, thr_loss, thr_norms):
    """losses: per window; norms: per window {module: norm}; family_of: {module: family}."""
    if len(losses) < k:
        return False
    losses, norms = losses[-k:], norms[-k:]
    for i in range(k - 1):
        if not percent_change(losses[i], losses[i + 1]) <= thr_loss:
            return False
        for family in set(family_of.values()):
            layers = [module for module in family_of if family_of[module] == family]
            total = 0.0
            for module in layers:
                total += percent_change(norms[i][module], norms[i + 1][module])
            if not total / len(layers) < thr_norms:
                return False
    return True


def ranks(v1, v2, family_of, r_min, r_max):
    """v1, v2: {module: value} at the last two windows."""
    R = [r_min]
    while R[-1] < r_max:
        R.append(R[-1] * 2)
    result = {}
    for family in set(family_of.values()):
        pc = {module: percent_change(v1[module], v2[module]) for module in family_of if family_of[module] == family}
        low, high = min(pc.values()), max(pc.values())
        for module, change in pc.items():
            x = (change - low) / (high - low) if high > low else 0.0  # the authors' code divides 0 by 0 here
            result[module] = R[math.ceil(x * len(R)) - 1 if x != 0 else 0]
    return result
