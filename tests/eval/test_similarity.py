"""Cosine similarities in blocks against one matrix product in float64."""

import pytest
import torch
from torch import Tensor

from fastdino.eval.similarity import check_lengths, largest, similarities


def matrix(query: Tensor, gallery: Tensor | None) -> Tensor:
    others = query if gallery is None else gallery
    x, y = (z.double() / z.double().norm(dim=1, keepdim=True) for z in (query, others))
    product = x @ y.T
    return product if gallery is not None else product.masked_fill(torch.eye(len(x)).bool(), -torch.inf)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("rows", [range(9), range(2, 7), range(4, 4)], ids=str)
@pytest.mark.parametrize("step", [1, 4, 100])
@pytest.mark.parametrize("columns", [1, 4, 9, 100])
def test_the_blocks_are_those_of_the_whole_matrix(alone: bool, rows: range, step: int, columns: int) -> None:
    query, gallery = 7 * torch.randn(9, 5), None if alone else torch.randn(11, 5).bfloat16()
    chunks = similarities(query, gallery, rows=rows, step=step, columns=columns, device=torch.device("cpu"))
    seen, parts = [], [torch.empty(0, 9 if alone else 11)]
    for chunk, blocks in chunks:
        seen += chunk
        firsts, found = zip(*blocks, strict=True)
        assert firsts == tuple(range(0, 9 if alone else 11, columns))
        assert all(block.shape[0] == len(chunk) <= step and block.shape[1] <= columns for block in found)
        parts.append(torch.cat(found, dim=1))
    assert seen == list(rows)
    expected = matrix(query, gallery)[rows.start : rows.stop]
    torch.testing.assert_close(torch.cat(parts).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("columns", [1, 2, 5, 20])
def test_the_largest_of_all_blocks_are_found(k: int, columns: int) -> None:
    whole = torch.stack([torch.randperm(20) for _ in range(6)]).float()  # without equals
    blocks = ((i, part) for i, part in zip(range(0, 20, columns), whole.split(columns, dim=1), strict=True))
    values, index = largest(blocks, k)
    assert torch.equal(values, whole.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(whole.gather(1, index), values)


def test_features_and_labels_of_other_lengths_are_named() -> None:
    good, bad = (torch.randn(3, 2), torch.zeros(3)), (torch.randn(3, 2), torch.zeros(2))
    check_lengths(query=good, gallery=good)
    with pytest.raises(ValueError, match=r"^gallery: features \(3, 2\) and labels \(2,\) do not match$"):
        check_lengths(query=good, gallery=bad)
