"""Task sampling against its formula, and as a pure function of (seed, step)."""

import random
from functools import partial

import pytest

from glomo.data import BucketBatches
from glomo.transfer.signal import RoundRobin, TaskSampler, annealed_alpha, task_batches

SIZES = {"a": 1, "b": 16, "c": 4}
# examples of the eight tasks in the published program
GLUE = {
    "cola": 6680,
    "mrpc": 2865,
    "mnli": 306798,
    "rte": 1945,
    "sts": 4491,
    "sst": 52616,
    "qqp": 284257,
    "qnli": 84715,
}


@pytest.mark.parametrize(
    ("alpha", "shares"),
    [
        (1.0, [1 / 21, 16 / 21, 4 / 21]),
        (0.5, [1 / 7, 4 / 7, 2 / 7]),
        (0.0, [1 / 3, 1 / 3, 1 / 3]),
        (2.0, [1 / 273, 256 / 273, 16 / 273]),
    ],
)
def test_shares(alpha, shares):
    found = TaskSampler(SIZES, 10, 0, alpha).shares(epoch=7)
    assert list(found) == ["a", "b", "c"]
    assert list(found.values()) == pytest.approx(shares, rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.2])
def test_shares_of_the_published_sizes(alpha):
    powers = {task: size**alpha for task, size in GLUE.items()}
    expected = {task: power / sum(powers.values()) for task, power in powers.items()}
    assert TaskSampler(GLUE, 2400, 0, alpha).shares(0) == pytest.approx(expected, rel=1e-12)


def test_annealed_alpha():
    assert [annealed_alpha(e, 5) for e in range(7)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    assert annealed_alpha(0, 1) == 1
    assert annealed_alpha(0, 25) == 1
    assert annealed_alpha(24, 25) == pytest.approx(0.2)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("epoch_steps", [1, 5, 97])
def test_every_epoch_has_the_shares(alpha, epoch_steps):
    """Never a whole step more or less than p S."""
    sampler = TaskSampler(SIZES, epoch_steps, seed=3, alpha=alpha)
    for epoch in range(20):
        tasks = [sampler.task(epoch * epoch_steps + place) for place in range(epoch_steps)]
        for task, share in sampler.shares(epoch).items():
            assert abs(tasks.count(task) - share * epoch_steps) < 1


def test_a_rare_task_gets_its_steps_in_the_long_run():
    """p S = 5 / 21 of a step an epoch: rounding to the nearest would never give one."""
    sampler = TaskSampler(SIZES, 5, seed=0, alpha=1.0)
    tasks = [sampler.task(step) for step in range(5 * 2000)]
    assert tasks.count("a") / 2000 == pytest.approx(5 / 21, abs=0.04)
    assert tasks.count("b") / 2000 == pytest.approx(80 / 21, abs=0.04)


def test_shares_follow_the_annealing():
    sampler = TaskSampler(SIZES, 1000, seed=0, alpha=partial(annealed_alpha, epochs=3))
    for epoch, alpha in enumerate([1.0, 0.6, 0.2]):
        tasks = [sampler.task(epoch * 1000 + place) for place in range(1000)]
        total = 1 + 16**alpha + 4**alpha
        assert abs(tasks.count("b") - 1000 * 16**alpha / total) < 1


def test_a_pure_function_of_seed_and_step():
    steps = 7 * 11

    def at(sampler, step):
        return sampler.task(step), sampler.occurrence(step)

    in_order = TaskSampler(SIZES, 7, seed=5)
    expected = [at(in_order, step) for step in range(steps)]
    assert [at(TaskSampler(SIZES, 7, seed=5), step) for step in range(steps)] == expected  # each by a new process
    places, sampler = list(range(steps)), TaskSampler(SIZES, 7, seed=5)
    random.Random(0).shuffle(places)
    assert {step: at(sampler, step) for step in places} == dict(enumerate(expected))
    other = TaskSampler(SIZES, 7, seed=6)
    assert [at(other, step) for step in range(steps)] != expected


def test_order_is_shuffled_anew_every_epoch():
    sampler = TaskSampler({"a": 1, "b": 1}, 40, seed=0)
    first, second = ([sampler.task(epoch * 40 + n) for n in range(40)] for epoch in range(2))
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != sorted(first)


@pytest.mark.parametrize("order", [TaskSampler(SIZES, 13, 1), RoundRobin(["x", "y", "z"])])
def test_occurrence_counts_the_steps_of_the_task_before(order):
    tasks = [order.task(step) for step in range(60)]
    assert [order.occurrence(step) for step in range(60)] == [tasks[:n].count(task) for n, task in enumerate(tasks)]


def test_round_robin():
    order = RoundRobin(["b", "a", "c"])
    assert [order.task(step) for step in range(7)] == ["b", "a", "c", "b", "a", "c", "b"]


def test_one_task():
    sampler = TaskSampler({"only": 3}, 4, 0)
    assert [sampler.task(n) for n in range(9)] == ["only"] * 9
    assert sampler.occurrence(8) == 8


def test_large_sizes_do_not_overflow():
    sampler = TaskSampler({"a": 10**300, "b": 1}, 4, 0, alpha=3.0)
    assert sampler.shares(0) == {"a": 1.0, "b": 0.0}


def test_batches_of_every_task_take_each_example_once_a_pass_and_go_on_after_a_stop():
    sizes = {"small": 6, "large": 24}
    batches = {task: BucketBatches([1] * size, 2, seed=9).batch for task, size in sizes.items()}
    sampler = TaskSampler(sizes, 10, seed=2)
    whole = list(task_batches(sampler, batches, steps=60))
    assert [step for step, _, _ in whole] == list(range(60))
    for task, size in sizes.items():
        examples = [n for _, of, batch in whole if of == task for n in batch]
        passes = [examples[i : i + size] for i in range(0, len(examples) - size + 1, size)]
        assert len(passes) >= 2 - (task == "large")
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert len({tuple(one) for one in passes}) == len(passes)  # shuffled anew
    again = task_batches(TaskSampler(sizes, 10, seed=2), batches, steps=60, first=37)
    assert list(again) == whole[37:]
    assert not list(task_batches(sampler, batches, steps=5, first=5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([("a", 1), ("a", 2)], 5, 0), "two tasks are called 'a'"),
        (({"a": 1, "b": 0}, 5, 0), "task 'b' has 0 examples; at least 1 is needed"),
        (({}, 5, 0), "there is no task"),
        (({"a": 1}, 0, 0), "epoch_steps is 0"),
        (({"a": 1}, 5, 0, -0.5), r"alpha is -0.5 in epoch 0; .* at least 0 is needed"),
        (({"a": 1}, 5, 0, float("nan")), "alpha is nan"),
        (({"a": 1}, 5, 0, float("inf")), "alpha is inf"),
        (({"a": 1}, 5, 0, lambda epoch: -1.0), "alpha is -1"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        TaskSampler(*arguments)


def test_other_mistakes():
    with pytest.raises(ValueError, match="two tasks are called 'a'"):
        RoundRobin(["a", "b", "a"])
    with pytest.raises(ValueError, match="there is no task"):
        RoundRobin([])
    with pytest.raises(ValueError, match="step is -1"):
        TaskSampler(SIZES, 5, 0).task(-1)
    with pytest.raises(ValueError, match="epoch is -1 of 3"):
        annealed_alpha(-1, 3)
    with pytest.raises(ValueError, match="the order has the tasks a, b, and there are batches of b, c"):
        next(task_batches(RoundRobin(["a", "b"]), {"b": int, "c": int}, 3))
