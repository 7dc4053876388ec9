"""What a scope reports: gathered from its parts, as they are now."""

from ..checks.padding import PaddingCheck
from ..checks.self_check import SelfCheck
from ..privacy.accounting.meter import PrivacyMeter
from ..privacy.accounting.opacus import spent_by
from ..privacy.clipping.base import ClippingFunction
from ..privacy.noise.noise import Noise
from ..privacy.report import BY_ORDER, RELATION, PrivacyReport, not_covered, relation_of
from ..privacy.sampling.collate_probe import CollateFacts
from ..privacy.sampling.plan import POISSON, SEQUENTIAL, SamplingPlan
from .nonprivate_statistics import NonprivateStatistics
from .optimizer import PrivateOptimizer


def report_of(
    delta: float,
    *,
    plan: SamplingPlan,
    meter: PrivacyMeter,
    clipping: tuple[str, ClippingFunction],
    noise: Noise,
    collate: CollateFacts,
    padding: PaddingCheck | None,
    check: SelfCheck | None,
    optimizer: PrivateOptimizer | None,
    mode: str,
    target_delta: float | None,
    statistics: NonprivateStatistics | None,
) -> PrivacyReport:
    """Return the report at ``delta`` of the scope with these parts; ``clipping`` with the name that it was asked for by."""
    spent = spent_by(meter.accountant, delta)
    name, function = clipping
    return PrivacyReport(
        epsilon=spent.epsilon,
        epsilon_remark=spent.remark,
        delta=delta,
        accountant=meter.accountant.mechanism(),
        sampling="Poisson, of units" if plan.units else {POISSON: "Poisson", SEQUENTIAL: BY_ORDER}.get(plan.sampling, plan.name),
        sample_rate=1.0 if plan.sampling == SEQUENTIAL else plan.sample_rate,
        noise_multiplier=meter.noise_multiplier,
        max_grad_norm=function.max_grad_norm,
        sensitivity=function.sensitivity,
        clipping=name,
        clipping_details=function.details(meter.noise_multiplier),
        steps=meter.steps,
        expected_batch_size=plan.expected_batch_size,
        dataset_size=plan.examples,
        relation=RELATION if plan.units is None else relation_of(plan.units.name),
        units=None if plan.units is None else plan.units.count,
        max_examples_per_unit=None if plan.units is None else plan.units.limit,
        expected_units=None if plan.units is None else plan.expected_protected,
        foreign_steps=meter.foreign_steps,
        written_steps=0 if optimizer is None else optimizer.writes.steps,
        collate=collate.remark or _padding_remark(collate, padding),
        model_verified=check is not None and check.model_verified,
        loss_verified=check is not None and check.loss_verified,
        grad_sample_mode=mode,
        history=tuple(meter.accountant.history),
        target_epsilon=None if meter.budget is None else meter.budget.epsilon,
        target_delta=target_delta,
        nonprivate_statistics=None if statistics is None else statistics.as_dict(),
        random_numbers=noise.random_numbers,
        not_covered=not_covered(secure=noise.is_secure),
    )


def _padding_remark(collate: CollateFacts, padding: PaddingCheck | None) -> str:
    if not collate.padded or (padding is not None and padding.paddings and not padding.waiting):
        return ""
    return "rows are made of one example each, but whether the model leaves padding out has not been seen"
