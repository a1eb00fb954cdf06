"""Draw the reference subjects of comparisons.

With one reference, half of a query's conversations have a reference with the query's label and half another; if their
number is odd, queries of the same label take the extra one in turn. With several references, all labels occur equally
often among them, give or take one, whatever the query's label: how they are composed gives nothing away. The label of
the last one goes through all labels in turn. If too few subjects have a label, other labels fill up.

References depend on all subjects that can be one.
"""

import random
from collections import defaultdict
from collections.abc import Sequence

from umbrella_jax.study.cases import CaseReader, ShownCase
from umbrella_jax.study.visits import Visit

Person = tuple[str, str]
"""(label, subject)."""
_TRIES = 8
"""Draws before a draw is given up, because nearly all people are used already."""


class ReferencePool:
    """Subjects whose cases can be references, by label."""

    def __init__(self, reader: CaseReader, visits: Sequence[Visit]):
        self._shown: dict[Person, list[tuple[ShownCase, ...]]] = defaultdict(list)
        for case in reader.cases(visits):
            self._shown[reader.label(case), case.subject].append(tuple(reader.shown(case)))
        self.labels = sorted({label for label, _ in self._shown})
        self._everybody = sorted(self._shown)
        self._alike = {label: [person for person in self._everybody if person[0] == label] for label in self.labels}
        self._others = {label: [person for person in self._everybody if person[0] != label] for label in self.labels}

    def draw_shown(self, person: Person, rng: random.Random) -> ShownCase:
        """Return one of a person's cases, with one of the scans that it can show."""
        return rng.choice(rng.choice(self._shown[person]))

    def draw_single(self, label: str, subject: str, number: int, turn: int, rng: random.Random) -> list[Person]:
        """Return `number` references of a query, half of them with its label; fewer if there are not so many.

        Args:
            label: of the query.
            subject: of the query, which is never its own reference.
            number: of references.
            turn: number of earlier queries with this label; an odd reference is alike in every second turn.
            rng: source of the draw.
        """
        used, alike = {subject}, self._alike.get(label, [])
        drawn = _take(alike, (number + turn % 2) // 2, used, rng)
        drawn += _take(self._others.get(label, self._everybody), number - len(drawn), used, rng)
        drawn += _take(alike, number - len(drawn), used, rng)
        rng.shuffle(drawn)
        return drawn

    def draw_several(self, subject: str, number: int, count: int, rng: random.Random) -> list[list[Person]]:
        """Return `number` lists of `count` references of a query; fewer if lists would have the same subjects.

        Args:
            subject: of the query, which is never its own reference.
            number: of lists.
            count: of references in each, all labels as often as each other, give or take one.
            rng: source of the draw.
        """
        lists: dict[frozenset[Person], list[Person]] = {}
        whole, extra = divmod(count, len(self.labels))
        start = rng.randrange(len(self.labels))
        for turn in range(number):
            last = self.labels[(start + turn) % len(self.labels)]
            others = [label for label in self.labels if label != last]
            rest = others * whole + [last] * (whole - 1 if not extra else whole) + rng.sample(others, max(extra - 1, 0))
            for _ in range(_TRIES):
                rng.shuffle(rest)
                used, drawn = {subject}, list[Person]()
                for label in [last, *rest]:
                    drawn += _take(self._alike[label], 1, used, rng)
                drawn += _take(self._everybody, count - len(drawn), used, rng)
                if (key := frozenset(drawn)) not in lists:
                    lists[key] = drawn[::-1]
                    break
        return [*lists.values()]


def _take(people: Sequence[Person], number: int, used: set[str], rng: random.Random) -> list[Person]:
    """Draw up to `number` people whose subjects are not `used`, and add these."""
    drawn: list[Person] = []
    for _ in range(number):
        person = next(
            (p for p in (rng.choice(people) for _ in range(_TRIES if people else 0)) if p[1] not in used), None
        )
        if person is None:  # nearly all are used
            free = [person for person in people if person[1] not in used]
            if not free:
                break
            person = rng.choice(free)
        drawn.append(person)
        used.add(person[1])
    return drawn
