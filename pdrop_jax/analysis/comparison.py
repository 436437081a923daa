"""The tests of a study: the effect of each drop against that of each rewording, on the same questions."""

from collections.abc import Mapping, Sequence

import numpy as np

from pdrop_jax.analysis.effects import Effect
from pdrop_jax.analysis.metrics import LabelMetrics, label_metrics
from pdrop_jax.analysis.significance import (
    Significance,
    bonferroni,
    directional_regression,
    paired_bootstrap,
    paired_t,
)

Tests = dict[str, list[Significance]]  # by the name of the rewording


def compare(reference: Effect, targets: Sequence[Effect], baselines: Mapping[str, Effect]) -> list[Tests]:
    """The tests of each target against each baseline.

    Labels are the answers; for phi, which needs two of them, whether an answer is right, if that is known. The
    regression is of the expected answer's log-probability, which a target is expected to lower (direction 1). p-values
    are corrected for the number of targets.
    """
    if not baselines:
        return [{} for _ in targets]
    labels = [_labels(reference, effect) for effect in targets]
    found: list[Tests] = [{} for _ in targets]
    for name, baseline in baselines.items():
        own = _labels(reference, baseline)
        tests = [_tests(*pair, baseline, own) for pair in zip(targets, labels, strict=True)]
        columns = [bonferroni(of_metric) for of_metric in zip(*tests, strict=True)]
        for tests_of, row in zip(found, zip(*columns, strict=True), strict=True):
            tests_of[name] = list(row)
    return found


def _labels(reference: Effect, effect: Effect) -> dict[str, LabelMetrics]:
    answers = label_metrics(reference.texts, effect.texts)
    found = dict.fromkeys(("flip rate", "mutual information", "phi"), answers)
    if reference.right is not None and effect.right is not None:
        found["phi"] = label_metrics(
            *(np.where(side > 0, "right", "wrong").tolist() for side in (reference.right, effect.right))
        )
    return found


def _tests(
    target: Effect, labels: Mapping[str, LabelMetrics], baseline: Effect, own: Mapping[str, LabelMetrics]
) -> list[Significance]:
    found = [paired_t("JSD", target.jsd, baseline.jsd), paired_t("KL", target.kl, baseline.kl)]
    found += [paired_bootstrap(name, labels[name], own[name]) for name in labels]
    if target.outcome is not None and baseline.outcome is not None:
        found.append(directional_regression(np.ones(len(target.outcome)), target.outcome - baseline.outcome))
    return found
