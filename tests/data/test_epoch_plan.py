"""The epoch plan: every conversation once per epoch, few shapes, little padding, and the documented randomness."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella_jax.data import epoch_plan
from umbrella_jax.data.epoch_plan import (
    BatchShape,
    ConversationSizes,
    EpochPlan,
    exact_shape,
    group_by_shared_volumes,
    round_positions,
)
from umbrella_jax.data.ragged import Ragged

PATCHES = {"T1": 27, "dMRI": 30, "rsfMRI": 64}


def sizes(*rows):
    """Make sizes from rows of (length, supervised positions, "T1:0 rsfMRI:3")."""
    names = [text.split() for _, _, text in rows]
    number = {name: i for i, name in enumerate(dict.fromkeys(n for row in names for n in row))}
    return ConversationSizes(
        lengths=np.array([length for length, _, _ in rows]),
        targets=np.array([targets for _, targets, _ in rows]),
        volumes=Ragged.from_rows([number[n] for n in dict.fromkeys(row)] for row in names),
        modality=[name.partition(":")[0] for name in number],
        patches=PATCHES,
    )


@st.composite
def random_sizes(draw):
    """Draw up to 60 conversations: any set of three modalities, few or many lengths, with or without shared volumes."""
    lengths = draw(st.sampled_from([(40, 50), (1, 3000), (900, 1100)]))
    pool = draw(st.sampled_from([1, 4, 100]))
    kinds = draw(st.lists(st.lists(st.sampled_from(sorted(PATCHES)), max_size=3), min_size=1, max_size=9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = []
    for _ in range(draw(st.integers(1, 60))):
        kind = kinds[rng.integers(len(kinds))]
        volumes = " ".join(f"{m}:{rng.integers(pool)}" for m in kind)
        rows.append((int(rng.integers(*lengths)), int(rng.integers(1, 20)), volumes))
    return sizes(*rows)


def test_the_first_step_that_shows_a_modality():
    known = sizes(*[(40, 2, "T1:0")] * 6, (40, 2, "T1:1 rsfMRI:2"), (40, 2, ""))
    plan = EpochPlan(known, batch_size=1, seed=0)
    first_steps = plan.first_steps()
    steps = {
        modality: min(
            s + 1 for s in range(8) if volumes_of(known, [r for m in plan.update(s).rows for r in m])[modality]
        )
        for modality in ("T1", "rsfMRI")
    }
    assert first_steps == steps
    assert EpochPlan(sizes((40, 2, "")), batch_size=1, seed=0).first_steps() == {}


def volumes_of(sizes, rows):
    """Return {modality: number of distinct volumes}, counted differently from the plan."""
    shown = {(sizes.modality[v], v) for row in rows for v in sizes.volumes[row]}
    return Counter(modality for modality, _ in shown)


@settings(deadline=None, max_examples=60)
@given(
    known=random_sizes(),
    rows=st.integers(1, 9),
    accumulate_steps=st.integers(1, 4),
    seed=st.none() | st.integers(0, 5),
    parts=st.sampled_from([1, 2, 8]),
)
def test_invariants_of_every_plan(known, rows, accumulate_steps, seed, parts):
    batch_size = parts * rows if rows <= 3 else parts * -(-rows // parts)  # few and many rows of a part
    sizes = {"batch_size": batch_size, "accumulate_steps": accumulate_steps}
    plan = EpochPlan(known, **sizes, seed=seed, parts=parts)
    epochs = [plan.epoch(e) for e in (0, 1, 7)]
    shapes = {update.shape for updates in epochs for update in updates}
    assert len(shapes) <= 6
    assert shapes <= {shape for of_bucket in plan.shapes for shape in of_bucket}
    assert sum(map(len, plan.shapes)) <= 6
    assert len({len(updates) for updates in epochs}) == 1, "equally many updates in each epoch"
    for updates in epochs:
        rows = [row for update in updates for micro in update.rows for row in micro]
        assert sorted(rows) == list(range(len(known))), "each conversation once"
        for update in updates:
            assert len(update.rows) == accumulate_steps
            assert any(update.rows), "no update is empty"
            assert max(map(len, update.rows)) - min(map(len, update.rows)) <= 1
            room = dict(update.shape.volumes)
            assert list(room) == sorted(room)
            assert all(count % parts == 0 for count in room.values())
            for micro in update.rows:
                assert len(micro) <= batch_size == update.shape.conversations
                assert all(known.lengths[row] <= update.shape.positions for row in micro)
                assert all(known.targets[row] <= update.shape.targets for row in micro)
                for part in np.array_split([*micro, *[None] * (batch_size - len(micro))], parts):
                    shown = volumes_of(known, [row for row in part if row is not None])
                    assert all(count <= room.get(m, 0) // parts for m, count in shown.items())
    assert plan.epoch(7) == epochs[2], "whatever came before"
    again = EpochPlan(known, **sizes, seed=seed, parts=parts)
    assert (again.epoch(7), again.shapes) == (epochs[2], plan.shapes)
    alone = EpochPlan(known, **sizes, seed=seed)
    assert [u.rows for u in alone.epoch(1)] == [u.rows for u in epochs[1]], "on any number of devices"
    positions = sum(accumulate_steps * batch_size * update.shape.positions for update in epochs[1])
    assert plan.cost.padding == pytest.approx(1 - known.lengths.sum() / positions), "of every epoch"


def test_few_shapes_of_lengths_cost_the_least():
    """Three lengths fill 64 batches each. One bound fewer would add 64 · 4 · (208 - 104) positions."""
    known = sizes(*[(length, 1, "") for length in (104, 208, 400) for _ in range(256)])
    plan = EpochPlan(known, batch_size=4, seed=0)
    assert [[s.positions for s in of] for of in plan.shapes] == [[104], [208], [400]]
    assert plan.cost.padding == 0
    assert plan.cost.shapes == 3


def test_bounds_are_the_best_for_many_lengths():
    """No choice of six bounds is cheaper."""
    from itertools import combinations

    rng = np.random.default_rng(0)
    lengths = np.unique(rng.integers(1, 20, 12)) * 8
    counts = rng.integers(1, 9, len(lengths))
    known = sizes(*[(int(n), 1, "") for n, count in zip(lengths, counts, strict=True) for _ in range(count)])
    plan = EpochPlan(known, batch_size=1, seed=0)

    def padded(bounds):
        return sum(int(c) * min(b for b in bounds if b >= n) for n, c in zip(lengths, counts, strict=True))

    best = min(padded((*c, lengths[-1])) for c in combinations(lengths[:-1].tolist(), 5))
    chosen = [s.positions for of in plan.shapes for s in of]
    assert padded(chosen) <= 1.01 * best


def test_modalities_are_not_mixed():
    """No batch mixes modalities that no conversation mixes."""
    rows = [(100, 1, kind.format(i)) for kind in ("T1:{}", "rsfMRI:{}") for i in range(8)]
    plan = EpochPlan(sizes(*rows), batch_size=4, seed=0)
    for update in plan.epoch(0):
        (micro,) = update.rows
        assert len({row < 8 for row in micro}) == 1
        assert update.shape.volumes in [(("T1", 4),), (("rsfMRI", 4),)]


def test_the_remainder_moves_to_a_longer_bucket_with_its_modalities():
    """The 32 conversations make 4 full updates of 8. T1 moves into the longer T1 bucket, never into rsfMRI."""
    known = sizes(
        *[(100, 1, f"T1:{i}") for i in range(13)],
        *[(104, 1, "") for _ in range(3)],
        *[(200, 1, f"T1:{20 + i} T1:{40 + i}") for i in range(8)],
        *[(208, 1, f"rsfMRI:{i}") for i in range(8)],
    )
    plan = EpochPlan(known, batch_size=8, seed=0)
    moved = Counter()
    for epoch in range(60):
        updates = plan.epoch(epoch)
        assert len(updates) == 4
        for update in updates:
            (micro,) = update.rows
            if any(row >= 24 for row in micro):
                assert len(micro) == 8
                assert update.shape.volumes == (("rsfMRI", 8),)
            assert not (any(row < 13 for row in micro) and any(row >= 24 for row in micro))
            if any(16 <= row < 24 for row in micro):
                moved.update(row for row in micro if row < 13)
    assert sum(moved.values()) % 60 == 0, "the number is the same in every epoch"
    if moved:
        assert set(moved) == set(range(13)), "each conversation moves in some epoch"


def test_few_conversations_join_a_bucket_with_more_modalities_if_cheaper():
    """3 long texts and 5 runs make one update of 8, not two. 8 of each make two updates."""
    text, run = [(200, 1, "")], [(104, 1, f"rsfMRI:{i}") for i in range(8)]
    ((update,), apart) = (EpochPlan(sizes(*text * n, *run[: 8 - n]), batch_size=8, seed=0).epoch(0) for n in (3, 0))
    assert update.shape == BatchShape(8, 200, 8, (("rsfMRI", 5),))
    assert [u.shape.positions for u in apart] == [104]
    apart = EpochPlan(sizes(*text * 8, *run), batch_size=8, seed=0).epoch(0)
    assert sorted((u.shape.positions, u.shape.volumes) for u in apart) == [(104, (("rsfMRI", 8),)), (200, ())]


def test_an_update_is_never_nearly_empty():
    """17 conversations in batches of 8 make updates of 6, 6 and 5, not of 8, 8 and 1."""
    known = sizes(*[(100, 1, "")] * 17)
    assert sorted(len(u.rows[0]) for u in EpochPlan(known, batch_size=8, seed=0).epoch(0)) == [5, 6, 6]
    accumulated = EpochPlan(known, batch_size=2, accumulate_steps=4, seed=0).epoch(0)
    assert sorted(sum(map(len, u.rows)) for u in accumulated) == [5, 6, 6]


def test_without_sharing_the_order_is_a_uniform_shuffle():
    """χ² over 4,000 epochs: every conversation is equally likely at every place, and so is every pair in one batch."""
    known = sizes(*[(100, 1, f"T1:{i}") for i in range(6)])
    plan = EpochPlan(known, batch_size=2, seed=0)
    places, pairs = np.zeros((6, 6)), Counter()
    for epoch in range(4000):
        rows = [row for update in plan.epoch(epoch) for row in update.rows[0]]
        places[np.arange(6), rows] += 1
        pairs.update(frozenset(rows[i : i + 2]) for i in (0, 2, 4))
    expected = 4000 / 6
    assert ((places - expected) ** 2 / expected).sum() < 52.6  # 25 degrees of freedom, p = 0.001
    expected = 4000 * 3 / 15
    assert len(pairs) == 15
    assert sum((n - expected) ** 2 / expected for n in pairs.values()) < 36.1  # 14 degrees


def test_seeds_and_epochs_differ():
    known = sizes(*[(100, 1, f"T1:{i % 30}") for i in range(60)])
    orders = {str(EpochPlan(known, batch_size=4, seed=seed).epoch(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_without_a_seed_the_order_of_the_conversations_stays():
    known = sizes(*[(100, 1, f"T1:{i}") for i in range(10)])
    plan = EpochPlan(known, batch_size=4)
    assert [u.rows for u in plan.epoch(0)] == [((0, 1, 2, 3),), ((4, 5, 6),), ((7, 8, 9),)]
    assert plan.epoch(1) == plan.epoch(0)


def test_a_single_pass_has_fewer_shapes():
    """Two buckets are worth it for 100 updates, but not for three updates in a single pass."""
    few, many = (sizes(*[(length, 1, "") for length in (104, 208) for _ in range(n)]) for n in (6, 200))
    for known, seed, buckets in [(many, 0, 2), (many, None, 2), (few, 0, 2), (few, None, 1)]:
        plan = EpochPlan(known, batch_size=4, seed=seed)
        assert len({update.shape for update in plan.epoch(0)}) == buckets


def test_group_by_shared_volumes():
    volumes = [(0, 1), (2, 3), (4, 5), (1, 0), (3, 6), (6, 2), (7,)]
    # 3 needs no more than 0. After 1, both 4 and 5 need the same new volume, so one follows the other.
    assert group([0, 1, 2, 3, 4, 5, 6], volumes, [2, 3, 2]) == [[0, 3], [1, 4, 5], [2, 6]]
    assert group([6, 5, 4, 3, 2, 1, 0], volumes, [1, 3, 3]) == [[6], [5, 4, 1], [3, 0, 2]]
    assert group([2, 0, 1], [(0,), (1,), (2,)], [2, 1]) == [[2, 0], [1]]


def group(order, volumes, sizes):
    return list(group_by_shared_volumes(np.array(order), Ragged.from_rows(volumes), sizes))


def test_the_volume_that_most_others_need_comes_first():
    """After 0 (volumes a b), 1 (a c) would let one more in. Each of 2, 3, 4 adds volume e, which lets two others in."""
    names = ["ab", "ac", "ae", "be", "e", "cd"]
    volumes = [tuple(map(ord, name)) for name in names]
    (batch,) = group([0, 1, 2, 3, 4, 5], volumes, [4])
    assert batch[0] == 0
    assert sorted(batch[1:]) == [2, 3, 4]


def test_a_volume_that_all_show_does_not_slow_the_plan_down():
    """20,000 conversations share a reference. To consider all of them for each batch would take minutes."""
    n = 20_000
    volumes = Ragged.from_rows((0, i) for i in range(1, n + 1))
    known = ConversationSizes(np.full(n, 100), np.ones(n, int), volumes, ["T1"] * (n + 1), PATCHES)
    plan = EpochPlan(known, batch_size=8, seed=0)
    assert plan.cost.volumes == pytest.approx(9 / 8)
    assert plan.cost.shown == 2


def random_rows(seed, number, most, pool, hub=False):
    """Return sizes of conversations that show up to `most` of `pool` volumes of each modality, and one hub."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        shown = [f"{m}:{v}" for m in sorted(PATCHES) for v in rng.integers(pool, size=rng.integers(most + 1))]
        rows.append((int(rng.integers(40, 1500)), int(rng.integers(1, 20)), " ".join(["T1:hub"] * hub + shown)))
    return sizes(*rows)


@pytest.mark.parametrize(
    ("known", "options", "digest"),
    [
        (random_rows(0, 300, 1, 100), {"batch_size": 8, "seed": 1}, "03bd1e7f800f8b31"),
        (random_rows(1, 200, 2, 40, hub=True), {"batch_size": 8, "accumulate_steps": 2, "seed": 2}, "8308a535682dc5a6"),
        (random_rows(2, 200, 7, 60), {"batch_size": 4, "parts": 2, "seed": 3}, "c4f35150693756c0"),
        (random_rows(3, 200, 9, 5, hub=True), {"batch_size": 2}, "b1049b3ce8d5d139"),
    ],
    ids=["few", "hub", "many", "many of few"],
)
def test_plans_are_those_of_earlier_versions(known, options, digest):
    """A resumed run must continue with the same batches. The digests are of the plans of version 0.1."""
    plan = EpochPlan(known, **options)
    text = repr([(u.rows, str(u.shape)) for epoch in (0, 5) for u in plan.epoch(epoch)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("pool", [10, 300])
def test_grouping_with_numpy_changes_nothing(pool, monkeypatch):
    volumes = [dict.fromkeys([0, *row]) for row in np.random.default_rng(0).integers(1, pool, (400, 6)).tolist()]
    batches = []
    for few in (0, 100):
        monkeypatch.setattr(epoch_plan, "_FEW", few)
        monkeypatch.setattr(epoch_plan, "_COUNTED", 2)
        batches.append(group(range(400), volumes, [4, 6] * 40))
    assert batches[0] == batches[1]


def test_shared_volumes_come_together():
    """Every pair of 20 subjects is compared. Eight random pairs would show 11 volumes or more."""
    pairs = [(i, j) for i in range(20) for j in range(i)]
    known = sizes(*[(100, 1, f"T1:{i} T1:{j}") for i, j in pairs])
    plan = EpochPlan(known, batch_size=8, seed=0)
    assert sum(map(len, plan.shapes)) > 1, "batches that share more have a smaller shape"
    for epoch in (0, 50):
        volumes = [dict(u.shape.volumes)["T1"] for u in plan.epoch(epoch)]
        assert sum(volumes) / len(pairs) < 0.9
    assert plan.cost.volumes == pytest.approx(sum(dict(u.shape.volumes)["T1"] for u in plan.epoch(0)) / len(pairs))
    apart = Ragged.from_rows((2 * i, 2 * i + 1) for i in range(len(pairs)))
    apart = replace(known, volumes=apart, modality=["T1"] * 2 * len(pairs))
    plan = EpochPlan(apart, batch_size=8, seed=0)
    assert plan.shapes == ((BatchShape(8, 104, 8, (("T1", 16),)),),)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "accumulate_steps", "steps"),
    [(1, 2, 1, 50), (0.07, 1, 1, 7), (2.5, 6, 1, 43), (3, 6, 4, 15), (0.001, 8, 1, 1)],
)
def test_num_steps(epochs, batch_size, accumulate_steps, steps):
    """0.07 · 100 conversations is above 7 in floating point."""
    plan = EpochPlan(sizes(*[(9, 1, "")] * 100), batch_size=batch_size, accumulate_steps=accumulate_steps, seed=0)
    assert plan.num_steps(epochs) == steps


@pytest.mark.parametrize(
    ("length", "positions"),
    [
        (1, 8),
        (8, 8),
        (9, 16),
        (505, 512),
        (512, 512),
        (513, 528),
        (1025, 1056),
        (3000, 3008),
        (4097, 4224),
        (9999, 10112),
    ],
)
def test_positions(length, positions):
    assert round_positions(length) == positions


def test_exact_shape():
    known = sizes((65, 9, "T1:0 rsfMRI:0 T1:1"), (10, 1, "T1:1"), (3, 0, ""))
    assert exact_shape(known) == BatchShape(3, 72, 16, (("T1", 2), ("rsfMRI", 1)))
    assert exact_shape(sizes((8, 0, ""))) == BatchShape(1, 8, 8, ())


def test_cost_as_text():
    plan = EpochPlan(sizes((90, 1, "T1:0"), (74, 1, "T1:0 T1:1")), batch_size=4, seed=0)
    # B · T = 4 · 96 positions, 164 of them used; M = 2
    assert str(plan.cost) == (
        "1 shape to compile, 57.3% of positions padded\n      1.50 images per conversation, 1.00 encoded after sharing"
    )
