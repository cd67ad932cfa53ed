"""Shards, pools and positives against plain loops, over all kinds of sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tla_service.data.order import CPU, ClassMates, Draw, StepOrder, class_weights
from tla_service.errors import ConfigError
from tla_service.runtime import generator

SIZES = {
    "count": st.integers(8, 200),
    "batch": st.integers(8, 64),
    "world": st.integers(1, 4),
    "epoch": st.integers(0, 5),
}


def orders(count: int, batch: int, world: int, **options: object) -> list[StepOrder]:
    shared = {"seed": 7, "world_size": world, "global_batch_size": batch, **options}
    return [StepOrder(torch.arange(count) % 3, rank=rank, **shared) for rank in range(world)]


@settings(deadline=None, max_examples=60)
@given(**SIZES)
def test_shards_cover_the_epoch_once_in_even_steps(count: int, batch: int, world: int, epoch: int) -> None:
    ranks = [[step.anchors.tolist() for step in order.epoch(epoch)] for order in orders(count, batch, world)]

    assert {len(steps) for steps in ranks} == {-(-count // batch)}
    assert sorted(index for steps in ranks for shard in steps for index in shard) == list(range(count))
    step_sizes = [sum(map(len, shards)) for shards in zip(*ranks, strict=True)]
    assert max(step_sizes) - min(step_sizes) <= 1
    assert max(step_sizes) <= batch
    for shards in zip(*ranks, strict=True):
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
        assert min(map(len, shards)) >= 1


@settings(deadline=None, max_examples=30)
@given(**SIZES)
def test_a_steps_images_do_not_depend_on_the_number_of_workers(count: int, batch: int, world: int, epoch: int) -> None:
    alone = [step.anchors.tolist() for step in orders(count, batch, 1)[0].epoch(epoch)]
    ranks = [[step.anchors.tolist() for step in order.epoch(epoch)] for order in orders(count, batch, world)]

    assert [sum(shards, []) for shards in zip(*ranks, strict=True)] == alone


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(24, 200),
    batch=st.integers(8, 64),
    epoch=st.integers(0, 5),
    # Workers, steps until the next resize, and how many of those come after the checkpoint.
    attempts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9), st.integers(0, 3)), max_size=6),
    last=st.integers(1, 4),
)
def test_an_epoch_on_changing_numbers_of_workers_has_every_image_once(
    count: int, batch: int, epoch: int, attempts: list[tuple[int, int, int]], last: int
) -> None:
    """A pool of 12 images for all workers, as with mining.scope=global, stays the same in every step, too."""
    steps, start = -(-count // batch), 0
    anchors: list[list[int]] = [[] for _ in range(steps)]
    pools: list[list[int]] = [[] for _ in range(steps)]
    for world, length, after_checkpoint in [*attempts, (last, steps, 0)]:
        end = min(start + length, steps)
        ranks = [order.epoch(epoch, start) for order in orders(count, batch, world, pool_size=12 // world)]
        for step in range(start, end):
            found = [next(rank) for rank in ranks]
            anchors[step] = [image for share in found for image in share.anchors.tolist()]
            pools[step] = [image for share in found for image in share.pool.tolist()]
        start = max(start, end - after_checkpoint)
    assert sorted(image for step in anchors for image in step) == list(range(count))
    assert [len(step) for step in anchors] == [count // steps + (step < count % steps) for step in range(steps)]
    alone = list(orders(count, batch, 1, pool_size=12)[0].epoch(epoch))
    assert anchors == [step.anchors.tolist() for step in alone]
    assert pools == [step.pool.tolist() for step in alone]


@settings(deadline=None, max_examples=60)
@given(**SIZES, pool=st.integers(1, 50))
def test_pools_walk_one_permutation_round_and_round(count: int, batch: int, world: int, epoch: int, pool: int) -> None:
    if pool * world > count:
        with pytest.raises(ConfigError, match=rf"mining\.pool_size={pool}: .*use at most {count // world} "):
            orders(count, batch, world, pool_size=pool)
        return
    made = orders(count, batch, world, pool_size=pool)
    ranks = [[step.pool.tolist() for step in order.epoch(epoch)] for order in made]

    walked = [index for step in zip(*ranks, strict=True) for slice_ in step for index in slice_]
    for start in range(0, len(walked), count):
        part = walked[start : start + count]
        assert len(set(part)) == len(part)
        assert part == walked[: len(part)]
    for step in zip(*ranks, strict=True):
        together = sum(step, [])
        assert len(set(together)) == pool * world


def test_the_pools_order_is_not_the_anchors_order() -> None:
    order = orders(64, 64, 1, pool_size=64)[0]
    step = next(order.epoch(0))

    assert step.anchors.tolist() != step.pool.tolist()


@settings(deadline=None, max_examples=40)
@given(**SIZES, start=st.integers(0, 25))
def test_resuming_at_a_step_gives_the_tail(count: int, batch: int, world: int, epoch: int, start: int) -> None:
    def everything(order: StepOrder, first: int) -> list[tuple[list[int], ...]]:
        return [
            (step.anchors.tolist(), step.positives.tolist(), step.pool.tolist()) for step in order.epoch(epoch, first)
        ]

    order = orders(count, batch, world, pool_size=2, same_class_positives=True)[-1]
    start = min(start, order.steps_per_epoch)
    assert everything(order, start) == everything(order, 0)[start:]


def test_epochs_seeds_and_ranks_differ() -> None:
    labels = torch.zeros(50, dtype=torch.int64)

    def first(epoch: int, seed: int) -> list[int]:
        return next(StepOrder(labels, seed=seed, global_batch_size=50).epoch(epoch)).anchors.tolist()

    assert len({tuple(first(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_a_worker_without_images_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.global_batch_size=8"):
        StepOrder(torch.zeros(3, dtype=torch.int64), seed=0, world_size=4, global_batch_size=8)
    with pytest.raises(ConfigError, match=r"training\.global_batch_size"):
        StepOrder(torch.zeros(0, dtype=torch.int64), seed=0, global_batch_size=8)


@settings(deadline=None, max_examples=50)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=40), seed=st.integers(0, 1000))
def test_positives_match_a_plain_loop(labels: list[int], seed: int) -> None:
    classes = torch.tensor(labels)
    anchors = torch.arange(len(labels)).repeat(3)
    found = ClassMates(classes).draw(anchors, generator(CPU, seed)).tolist()

    uniform = torch.rand(len(anchors), generator=generator(CPU, seed), dtype=torch.float64).tolist()
    for anchor, value, positive in zip(anchors.tolist(), uniform, found, strict=True):
        others = [place for place, label in enumerate(labels) if label == labels[anchor] and place != anchor]
        assert positive == (others[int(value * len(others))] if others else anchor)


def test_positives_are_drawn_anew_each_epoch_step_and_rank() -> None:
    labels = torch.zeros(60, dtype=torch.int64)
    for rank in range(2):
        order = StepOrder(labels, seed=3, rank=rank, world_size=2, global_batch_size=20, same_class_positives=True)
        for epoch in range(2):
            for step, found in enumerate(order.epoch(epoch)):
                draws = generator(CPU, Draw.POSITIVES, 3, epoch, step, rank)
                assert torch.equal(found.positives, ClassMates(labels).draw(found.anchors, draws))


def test_positives_are_uniform() -> None:
    labels = torch.tensor([0, 1, 0, 0, 1, 0])
    drawn = ClassMates(labels).draw(torch.full((9000,), 2), generator(CPU, 3))

    counts = drawn.bincount(minlength=6).tolist()
    assert [place for place, count in enumerate(counts) if count] == [0, 3, 5]
    assert all(abs(counts[place] - 3000) < 200 for place in (0, 3, 5))


def test_every_purpose_draws_other_numbers() -> None:
    draws = {tuple(torch.rand(2, generator=generator(CPU, draw, 0, 0, 0, 0)).tolist()) for draw in Draw}
    assert len(draws) == len(Draw)


UNBALANCED = torch.tensor([0] * 360 + [1] * 30 + [3] * 10)


def test_balanced_anchors_come_from_every_class_equally_often_and_from_all_of_its_images() -> None:
    order = StepOrder(UNBALANCED, seed=1, global_batch_size=50, balanced=True)
    drawn = torch.cat([step.anchors for epoch in range(30) for step in order.epoch(epoch)])
    assert len(drawn) == 30 * 400
    # Each class has 4000 of 12000 draws, standard deviation 52; an image of a class of n has 4000 / n.
    assert all(abs(int((UNBALANCED[drawn] == label).sum()) - 4000) < 210 for label in (0, 1, 3))
    for image, count in enumerate(drawn.bincount(minlength=400).tolist()):
        expected = 4000 / {0: 360, 1: 30, 3: 10}[int(UNBALANCED[image])]
        assert abs(count - expected) < 5 * expected**0.5


@pytest.mark.parametrize("world", [2, 3])
def test_balanced_steps_are_shared_out_and_resume_as_others_do(world: int) -> None:
    shared = {"seed": 7, "global_batch_size": 32, "balanced": True}
    alone = [step.anchors.tolist() for step in StepOrder(UNBALANCED, **shared).epoch(2)]
    ranks = [StepOrder(UNBALANCED, rank=rank, world_size=world, **shared) for rank in range(world)]
    shards = [[step.anchors.tolist() for step in order.epoch(2)] for order in ranks]
    assert [sum(step, []) for step in zip(*shards, strict=True)] == alone
    assert [step.anchors.tolist() for step in ranks[1].epoch(2, 5)] == shards[1][5:]
    assert alone != [step.anchors.tolist() for step in StepOrder(UNBALANCED, **shared).epoch(3)]


def test_class_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=UNBALANCED.unique().numpy(), y=UNBALANCED.numpy())
    weights = class_weights(UNBALANCED)
    assert weights[[0, 1, 3]].tolist() == pytest.approx(expected.tolist())
    assert weights[2] == 0
    assert float(weights[UNBALANCED].mean()) == pytest.approx(1)


@settings(deadline=None, max_examples=60)
@given(**SIZES, extra=st.integers(1, 90), share=st.floats(0.1, 0.9), balanced=st.booleans())
def test_each_step_has_its_share_of_extra_images_in_an_order_of_their_own(
    count: int, batch: int, world: int, epoch: int, extra: int, share: float, balanced: bool
) -> None:
    real = max(1, min(batch - 1, round(batch * (1 - share))))
    wanted = batch - real
    if count // -(-count // real) + wanted < world:
        return
    plain = orders(count, real, 1, balanced=balanced)[0]
    made = orders(count, real, world, balanced=balanced, extra=extra, extra_per_step=wanted)
    ranks = [list(order.epoch(epoch)) for order in made]

    # Pass by pass through the extra images, from the first epoch on.
    stream: list[int] = []
    while len(stream) < (epoch + 1) * plain.steps_per_epoch * wanted:
        draws = generator(CPU, Draw.EXTRA_ORDER, 7, len(stream) // extra, 0, 0)
        stream += torch.randperm(extra, generator=draws).tolist()
    before = epoch * plain.steps_per_epoch * wanted
    for step, (alone, *shards) in enumerate(zip(plain.epoch(epoch), *ranks, strict=True)):
        images = [shard.anchors.tolist() for shard in shards]
        assert {shard.global_size for shard in shards} == {len(alone.anchors) + wanted}
        assert sum(([each for each in own if each < count] for own in images), []) == alone.anchors.tolist()
        start = before + step * wanted
        drawn = [each - count for own in images for each in own if each >= count]
        assert sorted(drawn) == sorted(stream[start : start + wanted])
        assert max(map(len, images)) - min(map(len, images)) <= 1
        assert min(map(len, images)) >= 1
        assert all(len(own) in order.sizes for own, order in zip(images, made, strict=True))
    middle = plain.steps_per_epoch // 2
    for order, steps in zip(made, ranks, strict=True):
        resumed = [step.anchors.tolist() for step in order.epoch(epoch, middle)]
        assert resumed == [step.anchors.tolist() for step in steps[middle:]]
