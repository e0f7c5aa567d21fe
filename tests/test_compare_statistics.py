"""The statistics of a comparison against numbers found another way, and what they say in words."""

import itertools
import json
import math
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from comparisons import ERROR
from ewavit.compare.arms import Arm
from ewavit.compare.contrasts import Contrasts
from ewavit.compare.differences import paired_difference, seeds_needed, t_interval
from ewavit.compare.results import ArmRuns, Comparison, Point, Run
from ewavit.compare.statistics import arm_statistics, summarise, time_to_reference
from ewavit.errors import EwavitError
from ewavit.tasks.judge import TOP1

pytestmark = pytest.mark.filterwarnings("error")

T_975 = {1: 12.706204736, 2: 4.30265273, 3: 3.182446305, 4: 2.776445105}  # quantiles from a printed table


@pytest.fixture(autouse=True, scope="module")
def no_garbage_collection():
    """statsmodels collects garbage in every correction, which is slow beside torch and hypothesis."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)
        yield


def run(seed, *metric, labels=None, predictions=None):
    """A run of 100 images and 10 seconds per evaluated epoch."""
    curve = tuple(
        Point(i, 100 * (i + 1), 10.0 * (i + 1), 1.0, 1.0, value, 1e-3, 0.0, {}, None)
        for i, value in enumerate(metric)
    )
    return Run(seed, curve, 50.0 + seed, labels, predictions)


def arm(name, metric, role="method"):
    """An arm of one-epoch runs; None is a failed run."""
    runs = (
        Run(seed, error="out of memory") if value is None else run(seed, value)
        for seed, value in enumerate(metric)
    )
    return ArmRuns(Arm(name, role=role), 1e-3, tuple(runs))


def comparison(*arms, judge=TOP1, **kwargs):
    seeds = tuple(range(max((len(a.runs) for a in arms), default=0)))
    facts = ("test", "ewavit compare", "today", "cpu", {}, "digits", {})
    return Comparison(*facts, seeds, arms, judge, **kwargs)


def dense(metric):
    return arm("dense", metric, "control")


DENSE = [80.0, 81.0, 79.5, 80.5, 82.0]


def shifted(*points):
    return [base + point for base, point in zip(DENSE, points, strict=True)]


def verdict(summary, name):
    return next(v for v in summary.verdicts if v.arm == name)


# --- numbers


def test_an_arms_mean_deviation_and_interval_follow_the_textbook():
    top1 = [80.0, 82.5, 81.0, 83.5, 79.0]
    found = summarise(comparison(arm("dense", top1, "control"))).arms[0]
    half = T_975[4] * statistics.stdev(top1) / math.sqrt(5)
    assert found.mean == pytest.approx(statistics.mean(top1), abs=1e-12)
    assert found.sd == pytest.approx(statistics.stdev(top1), abs=1e-12)
    assert found.interval == pytest.approx((found.mean - half, found.mean + half), abs=1e-7)


def test_costs_are_means_over_finished_runs_and_errors_are_kept():
    runs = (run(3, 70.0, 80.0), Run(4, error="out of memory"), run(5, 80.0))
    found = arm_statistics(*[ArmRuns(Arm("dense"), 2e-3, runs)] * 2, TOP1)
    assert (found.lr, found.seeds, found.errors) == (2e-3, (3, 5), {4: "out of memory"})
    assert (found.seconds, found.images, found.peak_memory_mib) == (15.0, 150.0, 54.0)


def test_mean_class_accuracy_counts_every_class_alike():
    labels, predictions = np.array([0, 0, 0, 0, 3, 5]), np.array([0, 0, 0, 3, 3, 0])
    assert run(0, 50.0, labels=labels, predictions=predictions).mean_class == pytest.approx(175 / 3)
    assert run(0, 50.0).mean_class is None


def test_paired_t_test_and_interval_follow_the_textbook():
    points = [1.0, 0.2, 0.7, -0.1, 0.4]
    found = paired_difference(arm("ewa", shifted(*points)), dense(DENSE))
    error = statistics.stdev(points) / math.sqrt(5)
    assert found.differences == pytest.approx(points)
    assert found.mean == pytest.approx(0.44)
    assert found.interval == pytest.approx((0.44 - T_975[4] * error, 0.44 + T_975[4] * error), abs=1e-7)
    assert found.p_value == pytest.approx(2 * stats.t.sf(0.44 / error, 4), abs=1e-12)


# Tenths of a point, so that sums tie as they do for accuracies on few test images.
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-15, 15), min_size=2, max_size=7))
def test_permutation_p_is_the_share_of_sign_patterns_as_extreme(tenths):
    found = paired_difference(arm("ewa", [80 + t / 10 for t in tenths]), arm("dense", [80.0] * len(tenths)))
    sums = [sum(s * t for s, t in zip(signs, tenths, strict=True)) for signs in patterns(len(tenths))]
    extreme = sum(abs(total) >= abs(sum(tenths)) for total in sums)
    assert found.permutation_p == pytest.approx(extreme / len(sums), abs=1e-12)


def patterns(number):
    return list(itertools.product((1, -1), repeat=number))


def test_permutation_p_of_twenty_seeds_is_near_the_exact_one_and_repeatable():
    points = np.random.default_rng(0).normal(0.3, 0.7, 20).round(2)
    pair = arm("ewa", 80 + points), arm("dense", np.full(20, 80.0))
    found = paired_difference(*pair).permutation_p
    sums = np.zeros(1)
    for point in points:
        sums = np.concatenate([sums + point, sums - point])
    assert found == pytest.approx((np.abs(sums) >= abs(points.sum()) - 1e-9).mean(), abs=0.01)
    assert found == paired_difference(*pair).permutation_p


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(-3, 3))
@example([3.740284076] * 5, 0.0)
def test_swapping_arms_mirrors_the_difference_and_keeps_the_p_values(points, shift):
    base = [80.0 + shift * seed for seed in range(len(points))]
    ours, theirs = arm("ewa", [b + p for b, p in zip(base, points, strict=True)]), arm("dense", base)
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert (there.mean, *there.interval) == pytest.approx((-back.mean, *(-x for x in back.interval[::-1])))
    assert there.p_value == pytest.approx(back.p_value)
    assert there.permutation_p == pytest.approx(back.permutation_p)
    assert there.interval[0] <= there.mean <= there.interval[1]


def test_holm_corrects_over_the_arms_of_one_reference():
    # Against dense p is about 0.0003, 0.02 and 0.4: times 3, 2 and 1.
    points = [(1.0, 1.1, 0.9, 1.2, 1.0), (0.9, 0.1, 0.7, 0.4, 0.5), (0.5, -0.4, 0.3, -0.1, 0.4)]
    arms = [arm(name, shifted(*p)) for name, p in zip("abc", points, strict=True)]
    raw = [paired_difference(a, dense(DENSE)).p_value for a in arms]
    assert raw == sorted(raw)
    found = summarise(comparison(*arms[::-1], dense(DENSE))).against_reference
    assert [d.arm for d in found] == ["c", "b", "a"]
    by_hand = list(itertools.accumulate((min(1.0, p * k) for p, k in zip(raw, (3, 2, 1), strict=True)), max))
    assert [d.holm_p for d in found[::-1]] == pytest.approx(by_hand)


def test_holm_leaves_out_arms_without_a_p_value():
    found = summarise(
        comparison(dense(DENSE), arm("ewa", shifted(1, 2, 1, 2, 1)), arm("rup", [80.0, *[None] * 4]))
    ).against_reference
    assert found[0].holm_p == found[0].p_value
    assert math.isnan(found[1].holm_p)


def test_mcnemar_pools_the_paired_seeds_and_is_binomial():
    labels = np.arange(20) % 4
    right, wrong = labels, (labels + 1) % 4

    def predicting(name, *correct):  # the number of correct predictions from the left, by seed
        where = np.arange(20)
        predictions = [np.where(where < number, right, wrong) for number in correct]
        return ArmRuns(
            Arm(name),
            1e-3,
            tuple(run(s, 80.0 + s, labels=labels, predictions=p) for s, p in enumerate(predictions)),
        )

    found = paired_difference(predicting("ewa", 15, 9, 20), predicting("dense", 8, 11)).mcnemar
    assert (found.only_arm, found.only_reference) == (7, 2)  # the third seed has no pair
    assert found.p_value == pytest.approx(stats.binomtest(2, 9).pvalue)
    same = paired_difference(predicting("ewa", 12), predicting("dense", 12)).mcnemar
    assert (same.only_arm, same.only_reference, same.p_value) == (0, 0, 1.0)
    large = paired_difference(predicting("ewa", *[20] * 50), predicting("dense", *[5] * 50)).mcnemar
    assert large.only_arm == 750
    assert large.p_value == pytest.approx(2.0**-749, rel=1e-6)


def test_mcnemar_needs_predictions_of_the_same_images():
    labels = np.arange(4)
    ours = ArmRuns(Arm("ewa"), 1e-3, (run(0, 80.0, labels=labels, predictions=labels),))
    theirs = ArmRuns(Arm("dense"), 1e-3, (run(0, 80.0, labels=labels[::-1], predictions=labels),))
    with pytest.raises(EwavitError, match=r"ewa and dense .* different data at seed 0; delete"):
        paired_difference(ours, theirs)
    assert paired_difference(ours, arm("dense", [80.0])).mcnemar is None


# --- time to the reference


def test_time_to_the_reference_ends_at_the_first_epoch_as_good_as_the_reference_at_its_end():
    reference = run(0, 60.0, 90.0, 70.0, 80.0)  # 400 images, final 80 although it had 90
    assert time_to_reference(run(0, 50.0, 79.9, 80.0, 70.0), reference, TOP1) == 0.75
    assert time_to_reference(run(0, *[50.0] * 5, 81.0), reference, TOP1) == 1.5
    assert time_to_reference(run(0, 50.0, 79.9), reference, TOP1) is None
    assert time_to_reference(reference, reference, TOP1) == 0.5


def test_mean_time_counts_the_seeds_that_reached_the_reference():
    reference = ArmRuns(Arm("dense"), 1e-3, tuple(run(seed, 60.0, 70.0, 75.0, 80.0) for seed in range(3)))
    ours = ArmRuns(
        Arm("ewa"), 1e-3, (run(0, 80.0), run(1, 60.0, 80.0), run(2, 79.0), Run(3, error="x"), run(4, 99.0))
    )
    found = arm_statistics(ours, reference, TOP1)
    assert (found.time_to_reference, found.reached, found.paired) == (0.375, 2, 3)


# --- pairing, references, degenerate cases


def test_pairs_are_the_seeds_both_arms_finished():
    found = paired_difference(
        arm("ewa", [None, 82.0, 81.0, 84.0]),
        arm("dense", [80.0, 81.0, None, 80.0]),
    )
    assert (found.seeds, found.differences, found.mean) == ((1, 3), (1.0, 4.0), 2.5)


def test_best_control_is_the_best_over_the_seeds_that_all_controls_finished():
    # On its own two seeds ema has the higher mean; on the common seeds swa is better.
    summary = summarise(
        comparison(
            dense([80.0, 70.0, 60.0]),
            arm("ema", [81.0, 71.0, None], "control"),
            arm("swa", [82.0, 72.0, 61.0], "control"),
            arm("ewa", [99.0, 98.0, 97.0]),
        )
    )
    assert summary.best_control == "swa"
    assert [d.arm for d in summary.against_best_control] == ["dense", "ema", "ewa"]
    assert {d.reference for d in summary.against_best_control} == {"swa"}
    assert list(verdict(summary, "ewa").outcomes) == ["swa", "dense"]
    assert list(verdict(summary, "ema").outcomes) == ["dense"]


@pytest.mark.parametrize(
    ("arms", "reference", "best"),
    [
        ([arm("ewa", [1.0, 2.0]), arm("ema", [9.0, 9.0], "control"), dense([1.0, 2.0])], "dense", "ema"),
        (
            [
                arm("ewa", [1.0, 2.0]),
                arm("ema", [1.0, 1.0], "control"),
                arm("swa", [2.0, 2.0], "control"),
            ],
            "ema",
            "swa",
        ),
        ([arm("ewa", [1.0, 2.0]), arm("rup", [1.0, 1.0])], "ewa", None),
        (
            [
                arm("ema", [9.0, None], "control"),
                arm("swa", [None, 8.0], "control"),
                arm("ewa", [1.0, 1.0]),
            ],
            "ema",
            "ema",
        ),
        ([dense([None, None]), arm("ewa", [1.0, 2.0])], "dense", None),
    ],
)
def test_reference_is_dense_else_the_first_control_else_the_first_arm(arms, reference, best):
    summary = summarise(comparison(*arms))
    assert (summary.reference, summary.best_control) == (reference, best)
    assert len(summary.verdicts) == len(arms) - 1


def test_identical_arms_differ_by_nothing_for_sure():
    summary = summarise(comparison(dense(DENSE), arm("ewa", DENSE)))
    found = summary.against_reference[0]
    assert (found.mean, found.interval) == (0.0, (0.0, 0.0))
    assert (found.p_value, found.permutation_p, found.holm_p) == (1.0, 1.0, 1.0)
    assert found.seeds_needed is None
    assert verdict(summary, "ewa").outcome == "untold"
    assert "same at every seed" in verdict(summary, "ewa").sentence


@pytest.mark.parametrize(("seeds", "outcome"), [(2, "untold"), (5, "untold"), (6, "helps"), (20, "helps")])
def test_equal_differences_are_believed_when_a_sign_test_would(seeds, outcome):
    # 80.3 - 80.0 and 70.3 - 70.0 are not equal in floating point; they count as equal.
    base = [80.0 if seed % 2 else 70.0 for seed in range(seeds)]
    summary = summarise(comparison(dense(base), arm("ewa", [value + 0.3 for value in base])))
    found = summary.against_reference[0]
    assert found.interval == ((0.3, 0.3) if outcome == "helps" else (0.0, 0.6))
    assert found.p_value == pytest.approx(2 / 2**seeds, abs=1e-3)
    assert found.seeds_needed == (6 if seeds >= 4 else None)
    assert verdict(summary, "ewa").outcome == outcome


def test_one_pair_has_a_difference_but_no_interval():
    summary = summarise(comparison(dense([80.0]), arm("ewa", [81.0])))
    found = summary.against_reference[0]
    assert found.mean == 1.0
    assert np.isnan([*found.interval, found.p_value, found.permutation_p, found.holm_p]).all()
    assert np.isnan([*summary.arms[0].interval, summary.arms[0].sd]).all()
    told = verdict(summary, "ewa")
    assert (told.outcome, told.seeds_needed) == ("untold", None)
    assert told.sentence.startswith(
        "Whether ewa helps cannot be told with 1 seed: +1.00 points against dense"
    )
    assert "an interval needs at least 2 seeds" in told.sentence


def test_an_arm_without_finished_runs_is_listed_with_its_errors():
    summary = summarise(comparison(dense(DENSE), arm("ewa", [None] * 5), arm("rup", shifted(1, 2, 1, 2, 1))))
    dead = summary.arms[1]
    assert (dead.seeds, dead.errors) == ((), dict.fromkeys(range(5), "out of memory"))
    assert np.isnan([dead.mean, dead.sd, dead.seconds, dead.images, dead.time_to_reference]).all()
    assert verdict(summary, "ewa").sentence == (
        "Whether ewa helps cannot be told with 0 seeds: no seed finished by both it and dense, the best "
        "control; an interval needs at least 2 seeds that both arms finished."
    )
    assert verdict(summary, "rup").outcome == "helps"


def test_a_comparison_without_arms_is_refused():
    with pytest.raises(EwavitError, match="'test' has no arms; give at least one"):
        summarise(comparison())


def test_summary_becomes_strict_json():
    arms = dense([80.0, None]), arm("ewa", [81.0, 82.0])
    found = json.loads(json.dumps(summarise(comparison(*arms)).as_dict(), allow_nan=False))
    assert found["arms"][0]["errors"] == {"1": "out of memory"}
    assert found["against"]["dense"][0]["interval"] == [None, None]
    assert found["verdicts"][0]["outcomes"] == {"dense": "untold"}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_comparison_is_summarised_without_a_warning(data):
    value = st.one_of(st.none(), st.integers(0, 40).map(lambda n: n * 2.5), st.floats(0, 100))
    seeds = data.draw(st.integers(1, 4))
    roles = data.draw(st.lists(st.sampled_from(["control", "method"]), min_size=1, max_size=4))
    arms = [
        arm(
            "dense" if i == 1 else f"arm{i}", data.draw(st.lists(value, min_size=seeds, max_size=seeds)), role
        )
        for i, role in enumerate(roles)
    ]
    summary = summarise(comparison(*arms))
    json.dumps(summary.as_dict(), allow_nan=False)
    assert len(summary.verdicts) == len(arms) - 1
    assert all(v.sentence.endswith(".") and "nan" not in v.sentence for v in summary.verdicts)
    assert all((v.outcome == "untold") == bool(v.would_tell) for v in summary.verdicts)


# --- a metric in steps


def counted(name, right, samples, role="method"):
    """An arm of which every run has so many of its samples right, as files hold it: with four decimals."""
    runs = (
        replace(run(seed, round(100 * count / samples, 4)), samples=samples)
        for seed, count in enumerate(right)
    )
    return ArmRuns(Arm(name, role=role), 1e-3, tuple(runs))


def of_images(samples, differences, **facts):
    """The comparison of ewa with dense where the seeds differ by these numbers of images."""
    base = [samples // 2 + seed % 3 - 1 for seed in range(len(differences))]
    ours = [b + d for b, d in zip(base, differences, strict=True)]
    return summarise(
        comparison(counted("dense", base, samples, "control"), counted("ewa", ours, samples), **facts)
    )


def test_one_image_more_at_each_of_two_seeds_is_no_proof():
    summary = of_images(12, [1, 1], kind="clouds")
    found = summary.against_reference[0]
    half = T_975[1] * 100 / 12 / math.sqrt(6) / math.sqrt(2)  # by the rounding of two accuracies
    assert found.differences == pytest.approx((100 / 12, 100 / 12))
    assert found.step == pytest.approx(100 / 12)
    assert found.interval == pytest.approx((100 / 12 - half, 100 / 12 + half), abs=1e-6)
    assert found.p_value == found.permutation_p == 0.5
    told = verdict(summary, "ewa")
    assert (told.outcome, told.seeds_needed) == ("untold", None)
    assert told.sentence.startswith(
        "Whether ewa helps cannot be told with 2 seeds: +8.33 points against dense"
    )
    assert "; one of the 12 clouds is 8.33 points; at least 4 seeds are needed to estimate" in told.sentence
    assert "seeds would tell" not in told.sentence + summary.sentence


@pytest.mark.parametrize("samples", [3, 12, 30, 2000])
@pytest.mark.parametrize("images", [[1], [-1], [2], [1, 2], [-6, -7]])
@pytest.mark.parametrize(("seeds", "told"), [(2, False), (3, False), (5, False), (6, True), (8, True)])
def test_differences_within_one_step_are_believed_when_a_sign_test_would(samples, images, seeds, told):
    found = of_images(samples, [images[seed % len(images)] for seed in range(seeds)])
    pair = found.against_reference[0]
    assert pair.permutation_p == pytest.approx(2 / 2**seeds)
    assert pair.p_value >= pair.permutation_p
    assert verdict(found, "ewa").outcome == ("untold" if not told else "helps" if images[0] > 0 else "hurts")
    assert verdict(found, "ewa").seeds_needed == (6 if seeds == 5 else None)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 60), st.data())
def test_no_interval_is_narrower_than_a_step_and_it_says_what_p_says(samples, data):
    count = st.integers(0, samples)
    seeds = data.draw(st.integers(2, 9))
    arms = [
        counted(name, data.draw(st.lists(count, min_size=seeds, max_size=seeds)), samples, role)
        for name, role in (("dense", "control"), ("ewa", "method"))
    ]
    summary = summarise(comparison(*arms))
    pair, step = summary.against_reference[0], 100 / samples
    for low, high in (pair.interval, *(one.interval for one in summary.arms)):
        assert high - low >= step * (1 - 1e-9)
    assert 0 < pair.p_value <= 1
    assert 0 < pair.permutation_p <= 1
    low, high = pair.interval
    assert (pair.p_value <= 0.05) == (low > 0 or high < 0)
    assert low <= pair.mean <= high


def test_many_images_leave_the_textbooks_interval_and_p_value():
    images = [17, 5, 21, 9, 12]  # of 2,000
    found = of_images(2000, images).against_reference[0]
    points = [count / 20 for count in images]
    error = statistics.stdev(points) / math.sqrt(5)
    mean = statistics.mean(points)
    assert found.interval == pytest.approx((mean - T_975[4] * error, mean + T_975[4] * error), abs=1e-7)
    assert found.p_value == pytest.approx(2 * stats.t.sf(mean / error, 4), abs=1e-12)
    assert not found.coarse


def test_arms_that_are_equal_on_few_images_differ_by_at_most_a_step_or_more():
    found = of_images(12, [0, 0, 0, 0])
    pair = found.against_reference[0]
    assert (pair.mean, pair.p_value, pair.permutation_p) == (0.0, 1.0, 1.0)
    assert pair.interval[0] == -pair.interval[1] <= -100 / 24
    assert verdict(found, "ewa").sentence.endswith("; the top-1 is the same at every seed.")


def test_differences_that_are_equal_but_for_the_files_rounding_are_equal():
    ours = [50.3001, 60.2999, 55.3]
    found = summarise(comparison(dense([50.0, 60.0, 55.0]), arm("ewa", ours))).against_reference[0]
    assert found.p_value == found.permutation_p == 0.25
    assert found.interval[0] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_fewer_than_four_seeds_estimate_no_number_of_seeds(seeds):
    points = (0.8, -0.4, 0.6, -0.2, 0.7)[:seeds]
    found = summarise(comparison(dense(DENSE[:seeds]), arm("ewa", np.add(DENSE[:seeds], points).tolist())))
    told = verdict(found, "ewa")
    assert told.outcome == "untold"
    estimated = bool(re.search(r"about \d+ seeds would tell", told.sentence))
    assert estimated == (told.seeds_needed is not None) == (seeds >= 4)
    assert ("at least 4 seeds are needed" in found.claim) == (seeds < 4)


def test_no_p_value_is_zero():
    found = summarise(comparison(dense(DENSE), arm("ewa", shifted(*(1e6 + n for n in NOISE)))))
    assert 0 < found.against_reference[0].p_value < 1e-20
    labels = np.zeros(4000, dtype=np.int64)
    ours, theirs = (
        ArmRuns(Arm(name), 1e-3, (run(0, 50.0, labels=labels, predictions=labels + wrong),))
        for name, wrong in (("ewa", 0), ("dense", 1))
    )
    assert 0 < paired_difference(ours, theirs).mcnemar.p_value < 1e-300


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_under_the_null_few_images_give_a_verdict_at_most_one_time_in_twenty(seeds, spread):
    draws = np.random.default_rng(seeds).normal(0, spread, (400, seeds)).round().astype(int)
    patterns, counts = np.unique(np.sort(draws, axis=1), axis=0, return_counts=True)
    wrong = sum(
        count
        for images, count in zip(patterns.tolist(), counts.tolist(), strict=True)
        if verdict(of_images(40, images), "ewa").outcome != "untold"
    )
    assert wrong / len(draws) < 0.07


# --- the second outcome, and contrasts


def with_losses(runs, losses):
    """The same runs with other losses at their end."""
    made = [
        replace(each, curve=(*each.curve[:-1], replace(each.curve[-1], eval_loss=loss)))
        for each, loss in zip(runs.runs, losses, strict=True)
    ]
    return replace(runs, runs=tuple(made))


def test_the_loss_is_a_second_outcome_with_a_paired_t_test_of_its_own():
    points = [-0.02, -0.01, -0.03, -0.02, -0.015]
    base = [1.2, 1.3, 1.25, 1.4, 1.1]
    ewa = with_losses(arm("ewa", DENSE), [b + p for b, p in zip(base, points, strict=True)])
    found = summarise(comparison(with_losses(dense(DENSE), base), ewa))
    loss, error = found.against_reference[0].loss, statistics.stdev(points) / math.sqrt(5)
    assert loss.mean == pytest.approx(statistics.mean(points))
    half = T_975[4] * error
    assert loss.interval == pytest.approx((loss.mean - half, loss.mean + half), abs=1e-7)
    assert loss.p_value == pytest.approx(2 * stats.t.sf(-loss.mean / error, 4), abs=1e-12)
    assert "; loss -0.019, -0.028 to -0.010, lower)" in found.verdicts[0].sentence
    assert found.verdicts[0].outcome == "untold"  # no verdict rests on it


NOISE = (0.1, -0.1, 0.05, -0.05, 0.0)
FOUR = (
    dense(DENSE),
    arm("ema", shifted(*(0.5 - n for n in NOISE)), "control"),
    arm("moe", shifted(*(0.25 + n for n in NOISE))),
    arm("moe+ewa", shifted(*(0.4 + 3 * n for n in NOISE))),
)


def test_every_arm_is_a_reference_and_pairs_mirror_each_other():
    against = summarise(comparison(*FOUR)).against
    assert set(against) == {"dense", "ema", "moe", "moe+ewa"}
    found = {(pair.arm, other): pair for other, pairs in against.items() for pair in pairs}
    assert len(found) == 12
    for (one, other), pair in found.items():
        assert pair.mean == pytest.approx(-found[other, one].mean, abs=1e-9)
        assert pair.p_value == pytest.approx(found[other, one].p_value)


def test_a_named_reference_judges_all_arms_against_it_alone():
    summary = summarise(comparison(*FOUR, contrasts=Contrasts("moe")))
    assert summary.reference == "moe"
    assert {verdict.arm: list(verdict.outcomes) for verdict in summary.verdicts} == {
        "dense": ["moe"], "ema": ["moe"], "moe+ewa": ["moe"],
    }  # fmt: skip
    assert "against moe:" in summary.sentence


def test_holm_corrects_named_contrasts_and_these_alone():
    named = {"moe": "dense", "moe+ewa": "moe"}
    summary = summarise(comparison(*FOUR, contrasts=Contrasts(named=named)))
    assert {verdict.arm: list(verdict.outcomes) for verdict in summary.verdicts} == {
        "moe": ["dense"], "moe+ewa": ["moe"],
    }  # fmt: skip
    p = [next(x for x in summary.against[other] if x.arm == one).p_value for one, other in named.items()]
    assert p[0] < 0.05 / 2
    assert p[1] > 0.05
    assert summary.claim.startswith(
        "moe helps against dense; whether moe+ewa helps against moe cannot be told"
    )


def test_a_primary_contrast_is_judged_first_and_without_a_correction():
    summary = summarise(comparison(*FOUR, contrasts=Contrasts(primary=("moe+ewa", "dense"))))
    p = next(x for x in summary.against["dense"] if x.arm == "moe+ewa").p_value
    assert 0.05 / 3 < p < 0.05  # it would not survive
    first, *others = summary.verdicts
    assert (first.arm, first.primary, first.outcome, first.survives_correction) == (
        "moe+ewa", True, "helps", True,
    )  # fmt: skip
    assert [verdict.arm for verdict in others] == ["ema", "moe"]
    assert summary.claim.startswith("primary contrast: moe+ewa helps against dense; ")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((None, ["moe"], None), "--contrasts moe is no contrast"),
        ((None, ["moe:moe"], None), "--contrasts moe:moe is no contrast"),
        ((None, [], ":moe"), "--primary :moe is no contrast"),
        ((None, ["moe:dense", "moe:ema"], None), "names moe twice"),
        (("dnese", [], None), "dnese is judged and missing in --arms"),
        ((None, ["moe:swa"], None), "swa is judged and missing in --arms"),
        ((None, [], "swa:moe"), "swa is judged and missing in --arms"),
    ],
)
def test_contrasts_of_arms_that_are_not_compared_are_refused(words, named):
    with pytest.raises(EwavitError, match=named):
        Contrasts.parse(*words).check(["dense", "ema", "moe"])


def test_dense_may_be_missing_where_another_reference_is_named():
    for contrasts in (
        Contrasts("moe"),
        Contrasts(named={"moe+ewa": "moe"}),
        Contrasts(primary=("moe+ewa", "moe")),
    ):
        contrasts.check(["moe", "moe+ewa"])
    with pytest.raises(EwavitError, match="dense is missing in --arms"):
        Contrasts().check(["moe", "moe+ewa"])


# --- verdicts


def test_helps_when_the_interval_is_above_zero_against_dense_and_the_best_control():
    ema = arm("ema", shifted(*(0.5 - n for n in NOISE)), "control")
    summary = summarise(comparison(dense(DENSE), ema, arm("ewa", shifted(*(1.5 + n for n in NOISE)))))
    told = verdict(summary, "ewa")
    assert (told.outcome, told.survives_correction, told.seeds_needed) == ("helps", True, None)
    assert told.sentence == (
        "ewa helps: +1.00 points against ema, the best control (95 % interval +0.80 to +1.20, 5 seeds), "
        "and +1.50 points against dense (95 % interval +1.40 to +1.60, 5 seeds)."
    )
    assert summary.sentence == ("On digits with 5 seeds, against dense and the best control, ema: ewa helps.")


def test_hurts_when_the_interval_is_below_zero():
    summary = summarise(comparison(dense(DENSE), arm("full", shifted(*(n - 1.5 for n in NOISE)))))
    told = verdict(summary, "full")
    assert told.outcome == "hurts"
    assert told.sentence == (
        "full hurts: -1.50 points against dense, the best control (95 % interval -1.60 to -1.40, 5 seeds)."
    )
    assert summary.sentence == "On digits with 5 seeds, against dense: full hurts."


def test_cannot_be_told_says_how_many_seeds_would_tell():
    points = (0.8, -0.4, 0.6, -0.2, 0.7)
    both = comparison(dense(DENSE), arm("ewa", shifted(*points)))
    summary = summarise(replace(both, command="ewavit compare --limit 9"))
    told = verdict(summary, "ewa")
    needed = seeds_needed(statistics.mean(points), statistics.stdev(points))
    assert (told.outcome, told.seeds_needed, told.survives_correction) == ("untold", needed, False)
    assert told.sentence.startswith(
        "Whether ewa helps cannot be told with 5 seeds: +0.30 points against dense"
    )
    words = f"about {needed} seeds would tell a difference of the size found against dense."
    assert told.sentence.endswith(f"; {words}")
    assert summary.sentence == (
        "A quick look (--limit): on digits with 5 seeds, against dense: whether ewa helps cannot be told; "
        f"for ewa {words}"
    )


def test_of_two_differences_the_one_that_takes_most_seeds_is_named():
    ema = arm("ema", shifted(*(0.2 + n for n in NOISE)), "control")
    told = verdict(
        summarise(comparison(dense(DENSE), ema, arm("ewa", shifted(0.9, -0.5, 0.7, -0.3, 0.75)))), "ewa"
    )
    assert set(told.outcomes.values()) == {"untold"}
    assert told.seeds_needed > 100
    words = f"about {told.seeds_needed} seeds would tell a difference of the size found against ema"
    assert told.would_tell == words


def test_a_difference_next_to_nothing_needs_more_than_a_thousand_seeds():
    summary = summarise(comparison(dense(DENSE), arm("ewa", shifted(1.0, -1.0, 1.0, -1.0, 0.01))))
    told = verdict(summary, "ewa")
    assert told.seeds_needed is None
    assert "more than 1,000 seeds would be needed" in told.sentence
    assert "more than 1,000 seeds would be needed" in summary.sentence


@pytest.mark.parametrize(
    ("gain", "outcome", "words"),
    [
        (1.0, "untold", "ewa helps against dense but cannot be told from dense-lr: +0.01"),
        (0.5, "hurts", "ewa helps against dense but is worse than dense-lr: -0.49"),
        (0.0, "hurts", "ewa cannot be told from dense but is worse than dense-lr: -0.99"),
    ],
)
def test_a_gain_over_dense_that_a_control_has_too_is_told_as_such(gain, outcome, words):
    tuned = arm("dense-lr", shifted(*(1.0 - n for n in NOISE[::-1])), "control")
    ewa = arm("ewa", shifted(*(gain + n + 0.01 for n in NOISE)))
    summary = summarise(comparison(dense(DENSE), tuned, ewa))
    assert verdict(summary, "ewa").outcome == outcome
    assert verdict(summary, "ewa").sentence.startswith(words)
    assert words.split(":")[0] in summary.sentence


def test_an_interval_above_zero_that_the_correction_does_not_bear_out_is_a_hint():
    points = (0.9, 0.1, 0.7, 0.4, 0.5)  # p is about 0.02
    others = [arm(f"other{i}", shifted(*np.roll((0.5, -0.4, 0.3, -0.1, 0.4), i))) for i in range(4)]
    summary = summarise(comparison(dense(DENSE), arm("ewa", shifted(*points)), *others))
    alone = verdict(summarise(comparison(dense(DENSE), arm("ewa", shifted(*points)))), "ewa")
    told = verdict(summary, "ewa")
    assert (told.outcome, told.survives_correction) == ("helps", False)
    corrected = 5 * summary.against_reference[0].p_value
    assert told.sentence.endswith(f"corrected for the number of arms (Holm) p is {corrected:.2g}.")
    assert "ewa (a hint) helps; whether other0, other1, other2 and other3 help" in summary.sentence
    assert (alone.outcome, alone.survives_correction) == ("helps", True)
    assert "hint" not in alone.sentence


def test_controls_alone_are_not_called_methods():
    summary = summarise(comparison(dense(DENSE), arm("ema", shifted(1, 2, 1, 2, 1), "control")))
    assert summary.sentence == (
        "On digits with 5 seeds, against dense and the best control, ema: no method was judged."
    )
    assert verdict(summary, "ema").sentence.startswith("ema helps: +1.40 points against dense (")


# --- a metric of which less is better


def error(points, name="ewa", role="method"):
    return arm(name, shifted(*points), role)


def test_an_arm_helps_when_its_error_is_lower_and_hurts_when_it_is_higher():
    ema = error([-0.5 - n for n in NOISE], "ema", "control")
    better, worse = error([n - 1.5 for n in NOISE]), error([n + 1.5 for n in NOISE], "full")
    summary = summarise(comparison(dense(DENSE), ema, better, worse, judge=ERROR))
    assert summary.best_control == "ema"  # the control with the lowest error
    assert [verdict(summary, name).outcome for name in ("ema", "ewa", "full")] == ["helps", "helps", "hurts"]
    assert verdict(summary, "ewa").sentence.startswith(
        "ewa helps: -1.00 mm against ema, the best control (95 % interval -1.20 to -0.80, 5 seeds), "
        "and -1.50 mm against dense ("
    )
    assert "ewa helps; full hurts." in summary.sentence or "full hurts; ewa helps." in summary.sentence


def test_negating_a_metric_and_its_direction_keeps_every_outcome_and_mirrors_the_differences():
    controls = [dense(DENSE), error([0.5 - n for n in NOISE], "ema", "control")]
    methods = [error((1.5, 1.4, 1.6, 1.5, 1.4)), error((0.9, -0.5, 0.7, -0.3, 0.75), "rup")]
    arms = [*controls, *methods]
    higher = summarise(comparison(*arms))
    negated = [replace(a, runs=tuple(negative(r) for r in a.runs)) for a in arms]
    lower = summarise(comparison(*negated, judge=ERROR))
    assert higher.best_control == lower.best_control
    for one, other in zip(higher.verdicts, lower.verdicts, strict=True):
        assert (one.outcomes, one.seeds_needed) == (other.outcomes, other.seeds_needed)
    for one, other in zip(higher.against_reference, lower.against_reference, strict=True):
        assert one.mean == -other.mean
        assert one.p_value == pytest.approx(other.p_value)
    times = [[a.time_to_reference for a in summary.arms] for summary in (higher, lower)]
    assert times[0] == pytest.approx(times[1], nan_ok=True)


def negative(one):
    return replace(one, curve=tuple(replace(point, metric=-point.metric) for point in one.curve))


def test_time_to_the_reference_of_an_error_ends_where_it_is_as_low():
    reference = run(0, 40.0, 10.0, 30.0, 20.0)
    assert time_to_reference(run(0, 50.0, 20.1, 20.0, 30.0), reference, ERROR) == 0.75
    assert time_to_reference(run(0, 50.0, 20.1), reference, ERROR) is None


def test_sentences_take_their_words_from_the_judge():
    same = summarise(comparison(dense(DENSE), arm("ewa", DENSE), judge=ERROR)).sentence
    assert "the Chamfer distance is the same at every seed" in same
    bare = replace(ERROR, difference_unit="")
    told = verdict(summarise(comparison(dense(DENSE), error(NOISE), judge=bare)), "ewa").sentence
    assert "+0.00 against dense" in told


# --- calibration, by simulation


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_under_the_null_the_interval_excludes_zero_one_time_in_twenty(seeds):
    draws = np.random.default_rng(seeds).normal(0, 1, (2000, seeds))
    bounds = np.array([t_interval(row.tolist()) for row in draws])
    excluded = ((bounds[:, 0] > 0) | (bounds[:, 1] < 0)).mean()
    assert 0.03 < excluded < 0.07  # four standard errors


def test_under_the_null_a_method_seldom_beats_the_best_of_three_controls():
    # One time in forty against one control; choosing the best control by its own luck makes it rarer.
    rng = np.random.default_rng(0)
    names = [("dense", "control"), ("ema", "control"), ("swa", "control"), ("ewa", "method")]
    helped = sum(
        verdict(summarise(comparison(*(arm(n, rng.normal(80, 1, 4), r) for n, r in names))), "ewa").outcome
        == "helps"
        for _ in range(100)
    )
    assert helped <= 5


@pytest.mark.parametrize(("mean", "sd"), [(1.0, 0.7), (0.5, 0.6), (-0.4, 1.0)])
def test_the_seeds_needed_give_four_chances_in_five(mean, sd):
    needed = seeds_needed(mean, sd)
    rng = np.random.default_rng(0)

    def power(seeds):
        return (stats.ttest_1samp(rng.normal(mean, sd, (20000, seeds)), 0, axis=1).pvalue < 0.05).mean()

    assert power(needed) > 0.79
    assert power(needed - 1) < 0.81


def test_seeds_needed_by_known_cases():
    assert seeds_needed(0.5, 1.0) == 34  # the textbook's effect of medium size
    assert seeds_needed(-0.5, 1.0) == 34
    assert seeds_needed(50.0, 1.0) == 2
    assert seeds_needed(0.01, 1.0) is None
    assert seeds_needed(0.0, 1.0) is None
