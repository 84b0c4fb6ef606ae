"""The reference set knows distinct images, factor grids and siblings."""

from collections import Counter

import torch

from pipeline.evaluation.reference_set import ReferenceSet, distinct_images


def test_distinct_images_are_found_once():
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randint(256, (3, 3, 4, 4), generator=generator, dtype=torch.uint8)
    rows, own = distinct_images(torch.stack([a, b, a, c, b]))
    assert rows.tolist() == [0, 1, 3]
    assert own.tolist() == [0, 1, 0, 2, 1]


def test_siblings_differ_in_one_factor_and_never_rank_first(references):
    held_out = range(references.n_train, len(references.captions))
    for row in held_out:
        color, shape = references.captions[row].rsplit(" ", 1)
        siblings = [references.captions[i].rsplit(" ", 1) for i in references.siblings(row)]
        assert {s for _, s in siblings} == {shape}
        assert color not in {c for c, _ in siblings}
    siblings = references.siblings(references.n_train)
    shapes = Counter(references.captions[i].rsplit(" ", 1)[1] for i in siblings)
    assert shapes["heart"] == 10
    baseline = references.sibling_baseline(torch.tensor(held_out))
    assert baseline.recall_at_1.k == 0
    assert baseline.recall_at_1.n == 6


def test_siblings_share_all_factors_but_one():
    rows = [
        ("man", "cook"),
        ("woman", "cook"),
        ("man", "judge"),
        ("woman", "judge"),
        ("person", "cook"),
    ]
    metadata = [{"grid": "roles", "factors": {"gender": g, "role": r}} for g, r in rows]
    metadata[1:1] = [{"grid": None, "factors": {}}]
    empty = torch.empty(0)
    references = ReferenceSet(empty, [""] * 6, metadata, 5, empty, empty, torch.arange(6))
    assert references.siblings(5) == [0, 2]  # the cooks; judges differ in two factors
    assert references.siblings(1) == []
    assert references.sibling_baseline(torch.tensor([1])) is None
