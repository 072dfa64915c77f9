"""train_batch_size = micro-batch x accumulation x GPUs, each derived from the others."""

import pytest

from sltrain_ds.config import from_dict
from sltrain_ds.config.batch import triangle
from sltrain_ds.errors import UserError

TOTAL, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@pytest.mark.parametrize("world, accumulation", [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_one_file_on_many_worlds(good, world, accumulation):
    run = from_dict(good, world_size=world)
    assert (run.train_batch_size, run.micro_batch_size, run.accumulation) == (512, 32, accumulation)
    assert run.deepspeed[STEPS] == accumulation and run.tokens_per_step == 512 * 256


@pytest.mark.parametrize(
    "given, world, expected",
    [
        ({TOTAL: 64, MICRO: 4, STEPS: 2}, 8, (64, 4, 2)),
        ({TOTAL: 64, MICRO: 4}, 8, (64, 4, 2)),
        ({TOTAL: 64, MICRO: 4, STEPS: "auto"}, 8, (64, 4, 2)),
        ({TOTAL: 64, STEPS: 2}, 8, (64, 4, 2)),
        ({TOTAL: 64, STEPS: 2, MICRO: "auto"}, 8, (64, 4, 2)),
        ({MICRO: 4, STEPS: 2}, 8, (64, 4, 2)),
        ({TOTAL: "auto", MICRO: 4, STEPS: 2}, 1, (8, 4, 2)),
    ],
)
def test_what_is_missing_is_derived(given, world, expected):
    assert triangle(given, world) == expected


@pytest.mark.parametrize(
    "given, world, says",
    [
        (
            {TOTAL: 512, MICRO: 32},
            3,
            "512 is not train_micro_batch_size_per_gpu 32 x gradient_accumulation_steps N x 3 GPUs",
        ),
        ({TOTAL: 512, MICRO: 32}, 3, "works on 1 or 2 or 4 GPUs"),
        ({TOTAL: 512, MICRO: 32}, 3, "train_batch_size 480 or 576"),
        ({TOTAL: 512, MICRO: 32}, 32, "train_micro_batch_size_per_gpu 8 or 16"),
        ({TOTAL: 4, MICRO: 8}, 1, "train_batch_size 8"),
        (
            {TOTAL: 512, MICRO: 32, STEPS: 3},
            1,
            "leave gradient_accumulation_steps out: it is derived at every start (here 16)",
        ),
        ({TOTAL: 500, STEPS: 3}, 2, "set train_batch_size to 498 or 504"),
        ({TOTAL: 2, STEPS: 3}, 2, "set train_batch_size to 6"),
        ({TOTAL: 512}, 2, "train_micro_batch_size_per_gpu: cannot be derived with train_batch_size 512 alone"),
        ({MICRO: 8}, 2, "train_batch_size: is missing"),
        ({}, 2, "cannot be derived from nothing"),
    ],
)
def test_what_does_not_fit(given, world, says):
    with pytest.raises(UserError) as caught:
        triangle(given, world)
    assert says in str(caught.value)


@pytest.mark.parametrize("total, micro, world", [(512, 32, 3), (512, 32, 24), (500, 32, 1), (4, 8, 1), (30, 7, 4)])
def test_the_advice_is_right(total, micro, world):
    """Whatever numbers the line offers do work."""
    with pytest.raises(UserError) as caught:
        triangle({TOTAL: total, MICRO: micro}, world)
    advice = str(caught.value).split("; works ")[1]
    offers = 0
    for part in advice.split(", or "):
        numbers = [int(word) for word in part.split() if word.isdigit()]
        for number in numbers:
            offers += 1
            if part.startswith("on "):
                triangle({TOTAL: total, MICRO: micro}, number)
            elif MICRO in part:
                triangle({TOTAL: total, MICRO: number}, world)
            else:
                triangle({TOTAL: number, MICRO: micro}, world)
    assert offers >= 1


@pytest.mark.parametrize("world", [0, -1, True, 2.0])
def test_a_world_that_is_none(good, world):
    with pytest.raises(UserError, match="number of GPUs"):
        from_dict(good, world_size=world)


def test_one_gpu_is_no_plural():
    data = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
    with pytest.raises(UserError, match="works on 1 GPU, or with"):
        triangle(data, 2)
