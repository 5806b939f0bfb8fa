"""Is a difference between two models real? Paired tests over the same documents or windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from pydantic import BaseModel

_RESAMPLES = 9999


class Difference(BaseModel):
    """A model's score minus the dense model's, over the same `documents`: `better` and `worse` count documents with a
    higher and a lower score. `p_value` is two-sided, for the null hypothesis of no difference; nothing corrects it
    for the number of comparisons in a table."""

    task: str
    metric: str
    difference: float
    standard_error: float | None
    p_value: float
    test: str
    documents: int
    better: int
    worse: int


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947; exact form: a sign test of the documents on which the models differ).

    Under the null hypothesis `better` is Binomial(better + worse, 1/2).
    """
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided paired permutation test of a mean of 0 (Fisher 1935): each difference could as well have had the other
    sign. All sign patterns where they are few, else 9999 seeded ones."""
    import numpy as np
    from scipy.stats import permutation_test

    if not any(differences):
        return 1.0
    result = permutation_test(
        (np.asarray(differences, dtype=np.float64),),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def paired_difference(task: str, metric: str, dense: Mapping[str, float], other: Mapping[str, float]) -> Difference:
    """Compare document scores (document -> score): McNemar where all are 0 or 1, else a sign-flip permutation test.

    Raises ValueError when the two have no document in common.
    """
    shared = [document for document in dense if document in other]
    if not shared:
        raise ValueError(f"{task}: the two results have no document in common")
    differences = [other[document] - dense[document] for document in shared]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    binary = all(scores[document] in (0.0, 1.0) for scores in (dense, other) for document in shared)
    return Difference(
        task=task,
        metric=metric,
        difference=fmean(differences),
        standard_error=stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None,
        p_value=mcnemar(better, worse) if binary else sign_flip(differences),
        test="McNemar, exact" if binary else "sign-flip permutation",
        documents=len(shared),
        better=better,
        worse=worse,
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent `values` and its standard error (None for one value)."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
