"""Repeated augmentation and exact evaluation, over any number of images and ranks."""

import itertools
import pickle
from collections import Counter

import pytest
from torch.utils.data import DataLoader

from samplers import Deck, EvalBatchSampler, RASampler, SampleIndex, mix_seed

SIZES = [1, 2, 3, 7, 64, 255, 256, 1000]


def epoch_of(num_images, world, epoch, **options):
    ranks = []
    for rank in range(world):
        sampler = RASampler(num_images, world, rank, **options)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return ranks


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_images", SIZES)
def test_repeats_visit_every_image_in_three_epochs(num_images, world):
    seen = set()
    for epoch in range(3):
        ranks = epoch_of(num_images, world, epoch, batch_size=16)
        assert len({len(rank) for rank in ranks}) == 1
        assert num_images <= sum(map(len, ranks)) < num_images + world
        seen.update(*ranks)
    assert seen == set(range(num_images))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [2, 16, 64])
def test_copies_never_follow_each_other_on_a_rank(world, batch_size):
    for epoch in range(3):
        for rank in epoch_of(1000, world, epoch, batch_size=batch_size):
            assert all(a != b for a, b in itertools.pairwise(rank))


def test_copies_are_three_and_distinct():
    draws = [draw for rank in epoch_of(300, 2, 4, batch_size=16) for draw in rank]
    assert set(Counter(draws).values()) == {3}
    assert len({(int(draw), draw.copy) for draw in draws}) == 300
    assert {draw.epoch for draw in draws} == {4}


def test_copies_share_a_step():
    (rank,) = epoch_of(3000, 1, 0, batch_size=63)
    batches = [set(rank[i : i + 63]) for i in range(0, 3000 - 63, 63)]
    assert all(len(batch) == 21 for batch in batches[:-1])
    ranks = epoch_of(3000, 3, 0, batch_size=64)
    assert all(a == b == c for a, b, c in zip(*ranks, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_without_repeats_an_epoch_is_a_permutation(world):
    ranks = epoch_of(1000, world, 0, num_repeats=1)
    assert Counter(draw for rank in ranks for draw in rank) == Counter(range(1000))
    assert ranks[0] != sorted(ranks[0])
    assert ranks != epoch_of(1000, world, 1, num_repeats=1)
    assert ranks == epoch_of(1000, world, 0, num_repeats=1)
    assert ranks != epoch_of(1000, world, 0, num_repeats=1, seed=1)


@pytest.mark.parametrize(
    ("build", "value"),
    [
        (lambda: RASampler(0), "0"),
        (lambda: RASampler(5, 2, 2), "2"),
        (lambda: RASampler(5, 2, -1), "-1"),
        (lambda: RASampler(10, shards=[4, 5]), r"\b9\b.*\b10\b"),
        (lambda: RASampler(10, shards=[4, 6], window=0), r"\b0\b"),
        (lambda: EvalBatchSampler(10, 0), "0"),
        (lambda: EvalBatchSampler(10, 5, 3, 3), "3"),
    ],
)
def test_impossible_samplers_raise(build, value):
    with pytest.raises(ValueError, match=value):
        build()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("num_images", [*SIZES, 500, 501])
def test_evaluation_deals_the_batches_of_one_process(num_images, world):
    whole = list(EvalBatchSampler(num_images, 96))
    parts = [EvalBatchSampler(num_images, 96, world, rank) for rank in range(world)]
    dealt = [list(part) for part in parts]
    assert [len(part) for part in parts] == [len(batches) for batches in dealt]
    assert sorted(batch for batches in dealt for batch in batches) == whole
    assert [i for batch in whole for i in batch] == list(range(num_images))


def test_draw_is_an_index_that_crosses_processes():
    draw = pickle.loads(pickle.dumps(SampleIndex(2, epoch=5, copy=1)))
    assert (["a", "b", "c"][draw], draw.epoch, draw.copy) == ("c", 5, 1)
    sampler = RASampler(6, batch_size=2)
    batches = list(DataLoader(list("abcdef"), batch_size=2, sampler=sampler, num_workers=1))
    assert len(batches) == 3


def test_mixed_seeds_differ():
    seeds = {
        mix_seed(s, e, i, c) for s in range(3) for e in range(9) for i in range(99) for c in (0, 1)
    }
    assert len(seeds) == 3 * 9 * 99 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("num_images", [7, 64, 255, 1000])
def test_an_epoch_resumes_where_it_stopped(num_images, repeats):
    options = {"batch_size": 2, "num_repeats": repeats, "seed": 5}
    for rank in range(3):
        whole = RASampler(num_images, 3, rank, **options)
        whole.set_epoch(4)
        samples = [(int(draw), draw.epoch, draw.copy) for draw in whole]
        for steps in (0, 1, len(samples) // 2):
            state = pickle.loads(pickle.dumps(whole.state_dict(steps)))
            other = RASampler(num_images, 3, rank, **options)
            other.load_state_dict(state)
            assert not other.is_continued_elsewhere and other.steps_done == steps
            rest = [(int(draw), draw.epoch, draw.copy) for draw in other]
            assert rest == samples[2 * steps :]
            assert len(rest) == len(other)
            other.set_epoch(4)
            assert len(other) == len(samples)


@pytest.mark.parametrize(
    ("num_images", "plan", "sharded"),
    [(1000, [(4, 8, 10), (3, 16, 5), (1, 4, None)], False),
     (300, [(2, 4, 9), (3, 4, 5), (1, 4, None)], True)],
)  # fmt: skip
def test_other_ranks_resume_with_the_samples_no_rank_has_seen(num_images, plan, sharded):
    """Several ranks, then others, then 1: every sample of the epoch comes once."""
    dealt, state = [], None
    options = {"num_repeats": 3, "seed": 1}
    options |= {"shards": tuple(odd_shards(num_images)), "window": 2} if sharded else {}
    for world, batch_size, steps in plan:
        samplers = [RASampler(num_images, world, r, batch_size, **options) for r in range(world)]
        for sampler in samplers:
            sampler.set_epoch(2)
            if state is not None:
                sampler.load_state_dict(pickle.loads(pickle.dumps(state)))
                assert sampler.is_continued_elsewhere
        assert len({len(sampler) for sampler in samplers}) == 1
        stop = None if steps is None else steps * batch_size
        for sampler in samplers:
            dealt += [(int(draw), draw.copy) for draw in itertools.islice(sampler, stop)]
        state = samplers[0].state_dict(steps or 0)
    whole = Deck(num_images, num_replicas=plan[0][0], batch_size=plan[0][1], **options)
    assert sorted(dealt) == sorted((int(draw), draw.copy) for draw in whole.samples(2))


def test_the_state_of_another_dataset_is_an_error():
    state = RASampler(10).state_dict(1)
    with pytest.raises(ValueError, match=r"\b11\b.*\b10\b"):
        RASampler(11).load_state_dict(state)


def odd_shards(num_images, size=13):
    """Numbers of images in shards of up to ``size``, one of which is empty."""
    full, rest = divmod(num_images, size)
    return [*[size] * (full // 2), rest, 0, *[size] * (full - full // 2)]


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_images", SIZES)
def test_images_of_shards_come_as_often_as_others(num_images, world, repeats, window):
    shards, options = odd_shards(num_images), {"batch_size": 4, "num_repeats": repeats}
    seen = Counter()
    for epoch in range(repeats):
        ranks = epoch_of(num_images, world, epoch, shards=shards, window=window, **options)
        seen.update(draw for rank in ranks for draw in rank)
        plain = epoch_of(num_images, world, epoch, **options)
        assert [len(rank) for rank in ranks] == [len(rank) for rank in plain]
        copies = Counter(Counter(draw for rank in ranks for draw in rank).values())
        assert copies == Counter(Counter(draw for rank in plain for draw in rank).values())
    assert seen.keys() == set(range(num_images))


def test_a_window_of_shards_is_shuffled_together():
    """Each shard is read in one stretch of the order, and mixed with those of its window."""
    sizes = [13] * 76 + [12]
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    orders = []
    for epoch in range(2):
        (order,) = epoch_of(1000, 1, epoch, num_repeats=1, shards=sizes, window=5)
        orders.append([shard_of[draw] for draw in order])
        stretches, start = [], 0
        while start < 1000:
            shards = set(itertools.islice(dict.fromkeys(orders[-1][start:]), 5))
            count = sum(shard in shards for shard in shard_of)
            assert set(orders[-1][start : start + count]) == shards
            assert orders[-1][start : start + count] != sorted(orders[-1][start : start + count])
            stretches.append(shards)
            start += count
        assert len(stretches) == 16
        assert sum(len(shards) for shards in stretches) == 77
    assert orders[0] != orders[1]


def test_the_order_without_shards_is_fixed():
    (order,) = epoch_of(10, 1, 0, batch_size=2, num_repeats=1, seed=7)
    assert order == [7, 1, 2, 6, 9, 8, 0, 4, 3, 5]
    sampler = RASampler(12, 2, 1, 2, 3, 7)
    sampler.set_epoch(1)
    expected = [(image, copy) for copy in range(3) for image in (0, 4)]
    assert [(int(draw), draw.copy) for draw in sampler] == expected


def test_states_without_shards_still_load():
    state = RASampler(10, batch_size=2).state_dict(1)
    old = {key: value for key, value in state.items() if key not in ("shards", "window")}
    sampler = RASampler(10, batch_size=2)
    sampler.load_state_dict(old)
    assert (sampler.dealt, sampler.is_continued_elsewhere) == (2, False)
    with pytest.raises(ValueError, match=r"\b2 shards \(4 to 6"):
        RASampler(10, shards=[4, 6]).load_state_dict(old)
    listed = RASampler(10, shards=[4, 6]).state_dict(1) | {"shards": [4, 6]}
    RASampler(10, shards=[4, 6]).load_state_dict(listed)
    with pytest.raises(ValueError, match=r"\b3 shards .*\b2 shards"):
        RASampler(10, shards=[4, 3, 3]).load_state_dict(listed)
