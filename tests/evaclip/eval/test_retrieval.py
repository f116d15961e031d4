from math import comb

import pytest
import torch

from evaclip.errors import UserError
from evaclip.eval.retrieval import evaluate


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """20 pictures with 1 to 5 captions each, in mixed order; captions resemble their picture a little."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(20, 6, generator=generator)
    counts = torch.randint(1, 6, (20,), generator=generator)
    owner = torch.arange(20).repeat_interleave(counts)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    texts = images[owner] + 1.5 * torch.randn(len(owner), 6, generator=generator)
    return torch.nn.functional.normalize(images, dim=-1), torch.nn.functional.normalize(texts, dim=-1), owner


def brute_force(images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor) -> dict[str, list[int]]:
    scores = images.double() @ texts.double().T
    texts_of = [[text for text, image in enumerate(owner.tolist()) if image == i] for i in range(len(images))]
    rows = [row.argsort(descending=True).tolist() for row in scores]
    columns = [column.argsort(descending=True).tolist() for column in scores.T]
    return {
        "image_to_text": [min(map(row.index, own)) for row, own in zip(rows, texts_of, strict=True)],
        "text_to_image": [column.index(own) for column, own in zip(columns, owner.tolist(), strict=True)],
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [3, 1000])
def test_recalls_and_ranks_equal_brute_force(seed: int, block: int) -> None:
    images, texts, owner = random_case(seed)
    result = evaluate(images, texts, owner, block=block)
    recalls = []
    for name, ranks in brute_force(images, texts, owner).items():
        direction = getattr(result, name)
        for k in (1, 5, 10):
            expected = sum(rank < k for rank in ranks) / len(ranks)
            assert direction.recall[k] == pytest.approx(expected)
            recalls.append(expected)
        assert direction.mean_rank == pytest.approx(sum(ranks) / len(ranks) + 1)
        assert direction.median_rank == pytest.approx(float(torch.tensor(ranks).double().quantile(0.5)) + 1)
        assert direction.queries == len(ranks)
    assert result.mean_recall == pytest.approx(sum(recalls) / 6)


def test_chance_of_several_captions_follows_from_counting() -> None:
    images, texts, owner = random_case(0)
    own, total = torch.bincount(owner).tolist(), len(texts)
    expected = sum(1 - comb(total - n, 5) / comb(total, 5) for n in own) / len(own)
    result = evaluate(images, texts, owner)
    assert result.image_to_text.chance[5] == pytest.approx(expected)
    assert result.text_to_image.chance[5] == 5 / 20


def test_chance_is_one_where_everything_is_within_reach_and_json_keys_are_texts() -> None:
    result = evaluate(torch.eye(3), torch.eye(3), torch.arange(3))
    assert result.text_to_image.chance[10] == result.image_to_text.chance[10] == 1.0
    assert result.to_dict()["text_to_image"]["recall"] == {"1": 1.0, "5": 1.0, "10": 1.0}


def test_pictures_without_captions_are_refused() -> None:
    with pytest.raises(UserError, match="1 of 3 pictures have no caption"):
        evaluate(torch.eye(3), torch.eye(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"\[0, 2\), got 2"):
        evaluate(torch.eye(2, 3), torch.eye(3), torch.tensor([0, 1, 2]))
