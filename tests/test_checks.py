"""What a person reads when what they typed cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_nemo.checks import did_you_mean, nearest_multiples, require, require_divisible, require_files


def test_a_mistake_has_the_type_a_library_user_expects() -> None:
    require(True, "never seen")
    with pytest.raises(ValueError, match="too small"):
        require(False, "too small")
    with pytest.raises(FileNotFoundError, match="not there"):
        require(False, "not there", FileNotFoundError)


def test_a_size_that_does_not_split_is_answered_with_those_that_do() -> None:
    require_divisible("ffn_hidden_size", 9216, "trainer.tensor_model_parallel_size", 8)
    with pytest.raises(ValueError) as refusal:
        require_divisible("ffn_hidden_size", 9217, "trainer.tensor_model_parallel_size", 8)
    assert str(refusal.value) == (
        "ffn_hidden_size=9217 cannot be split over trainer.tensor_model_parallel_size=8. "
        "Nearest that can: 9216, 9224. Change ffn_hidden_size or trainer.tensor_model_parallel_size."
    )


@pytest.mark.parametrize(("value", "divisor", "nearest"), [(9, 4, "8, 12"), (3, 4, "4"), (8, 4, "8, 12")])
def test_the_nearest_sizes_are_positive(value: int, divisor: int, nearest: str) -> None:
    assert nearest_multiples(value, divisor) == nearest


def test_the_file_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").touch()
    require_files(tmp_path, ["plan.json"], "pruning plan", "Run the prune stage.")
    with pytest.raises(FileNotFoundError, match=r"holds no pruning plan: plan\.pt is missing\. Run the prune stage\."):
        require_files(tmp_path, ["plan.json", "plan.pt"], "pruning plan", "Run the prune stage.")


def test_a_word_close_to_a_known_one_is_asked_about_and_any_other_gets_the_list() -> None:
    known = {"prune", "distill", "evaluate"}
    assert did_you_mean("distil", known) == "did you mean distill?"
    assert did_you_mean("xyz", known) == "known: distill, evaluate, prune."
