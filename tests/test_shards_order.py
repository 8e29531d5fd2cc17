"""The order of samples: permutations and mixtures are functions of integers, and their shares are exact."""

from collections import Counter

import pytest

from blip3o.data.order import Order, permuted


def test_permutations() -> None:
    for n in (1, 2, 3, 4, 5, 16, 17, 100, 1000):
        for seed, epoch in ((0, 0), (0, 1), (1, 0)):
            assert sorted(permuted(i, n, seed, epoch) for i in range(n)) == list(range(n))
    orders = {tuple(permuted(i, 100, seed, epoch) for i in range(100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    # Every place is as likely for every sample, and neighbours do not stay neighbours: chi-square, 99.99 % quantiles.
    places = Counter((i, permuted(i, 7, 0, epoch)) for epoch in range(7000) for i in (0, 3))
    assert sum((places[i, k] - 1000) ** 2 / 1000 for i in (0, 3) for k in range(7)) < 2 * 27.9
    steps = Counter((permuted(1, 11, 0, epoch) - permuted(0, 11, 0, epoch)) % 11 for epoch in range(10_000))
    assert sum((steps[k] - 1000) ** 2 / 1000 for k in range(1, 11)) < 33.7
    with pytest.raises(ValueError, match=r"0\.\.6"):
        permuted(7, 7, 0, 0)


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [3, 1, 2], [0.5, 0.125, 0.375]])
def test_mixture_shares_are_exact(weights: list[float]) -> None:
    sizes = [40, 15, 23]
    order = Order(sizes, weights, seed=9)
    blocks = 60
    drawn = [order[p] for p in range(blocks * order.period)]
    for k in range(blocks):
        counts = Counter(source for source, _ in drawn[k * order.period : (k + 1) * order.period])
        assert [counts[source] / order.period for source in range(3)] == pytest.approx(
            [weight / sum(weights) for weight in weights], abs=1e-12
        )
    for source, share in enumerate(order.shares):
        places = sorted(order.source(p)[1] for p in range(blocks * order.period) if drawn[p][0] == source)
        assert places == list(range(blocks * share))
        for epoch in range(blocks * share // sizes[source]):  # each sample once in each epoch of its source
            numbers = {order.sample(source, epoch * sizes[source] + k) for k in range(sizes[source])}
            assert numbers == set(range(sizes[source]))
    assert len({tuple(s for s, _ in drawn[k * order.period : (k + 1) * order.period]) for k in range(blocks)}) > 1


def test_mixture_refuses() -> None:
    for weights in ([1], [1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(ValueError, match="2 positive"):
            Order([3, 4], weights, seed=0)
    with pytest.raises(ValueError, match="round them"):
        Order([3, 4], [0.123456789, 1], seed=0)
    with pytest.raises(ValueError, match="with samples"):
        Order([3, 0], [1, 1], seed=0)
