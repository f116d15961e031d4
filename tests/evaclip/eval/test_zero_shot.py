import pytest
import torch
from eval_fakes import ColorModel

from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions
from evaclip.eval.zero_shot import build_classifier, evaluate


def test_the_classifier_is_the_normalised_mean_of_normalised_prompts() -> None:
    model = ColorModel()
    templates = ["{}", "red and {}", "a {} {}"]
    with torch.no_grad():
        model.scale.copy_(torch.tensor([1.0, 3.0, 0.5]))

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text), 40 + text.count("e") * 50, 300] for text in texts])

    classifier = build_classifier(model, tokenizer, ["green", "blue"], templates, FeatureOptions(2, progress=False))
    for row, name in zip(classifier, ["green", "blue"], strict=True):
        prompts = [template.replace("{}", name) for template in templates]
        one_by_one = [model.encode_text(tokenizer([prompt]), normalize=True)[0] for prompt in prompts]
        mean = torch.stack(one_by_one).mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)


def test_accuracies_are_counted_as_by_hand() -> None:
    # Class scores per picture are the rows themselves.
    features = torch.tensor(
        [
            [0.9, 0.5, 0.4, 0.3, 0.2, 0.1],  # right at once
            [0.9, 0.5, 0.4, 0.3, 0.2, 0.1],  # label 4: fifth
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.9],  # label 0: last
            [0.9, 0.1, 0.1, 0.1, 0.1, 0.1],  # label 0
        ]
    )
    names = list("abcdef")
    result = evaluate(features, torch.tensor([0, 4, 0, 0]), torch.eye(6), names)
    assert (result.top1, result.top5) == (0.5, 0.75)
    assert result.mean_per_class == pytest.approx((2 / 3 + 0) / 2)
    assert (result.chance_top1, result.chance_top5) == (1 / 6, 5 / 6)
    by_name = {entry.name: entry for entry in result.per_class}
    assert list(by_name) == ["a", "e"]
    assert (by_name["a"].samples, by_name["a"].mistaken_for) == (3, "f")
    assert (by_name["e"].top1, by_name["e"].top5, by_name["e"].mistaken_for) == (0.0, 1.0, "a")


def test_equal_scores_prefer_the_lower_label() -> None:
    result = evaluate(torch.ones(4, 3), torch.arange(4), torch.ones(4, 3), list("abcd"))
    assert [entry.top1 for entry in result.per_class] == [1.0, 0.0, 0.0, 0.0]
    assert result.top1 == result.chance_top1


def test_nothing_to_classify_is_an_error() -> None:
    with pytest.raises(UserError, match="no labelled pictures"):
        evaluate(torch.ones(0, 3), torch.ones(0, dtype=torch.int64), torch.eye(3), list("abc"))
    with pytest.raises(ValueError, match="expected 3 class names, got 2"):
        evaluate(torch.ones(1, 3), torch.zeros(1, dtype=torch.int64), torch.eye(3), list("ab"))
