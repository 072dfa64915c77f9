"""`--set a.b.c=value` reaches every key, and says what it cannot do."""

import pytest

from sltrain_ds.config import from_dict
from sltrain_ds.errors import UserError


def test_values_are_json_else_strings(good):
    run = from_dict(
        good,
        [
            "sltrain.steps=100",
            "sltrain.tokenizer=my/tokenizer",
            "zero_optimization.stage=3",
            "optimizer.params.betas=[0.9, 0.95]",
            'sltrain.data.dir={"a": 2, "b": 1}',
            "wall_clock_breakdown=true",
            "tensorboard.enabled=false",
            "sltrain.run_dir=runs/a=b",
        ],
    )
    assert run.sltrain.steps == 100 and run.sltrain.tokenizer == "my/tokenizer"
    assert run.zero_stage == 3 and run.deepspeed["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert run.sltrain.data.dir == {"a": 2.0, "b": 1.0}
    assert run.deepspeed["wall_clock_breakdown"] is True and run.deepspeed["tensorboard"] == {"enabled": False}
    assert str(run.run_dir) == "runs/a=b"


def test_later_wins_and_null_removes(good):
    run = from_dict(good, ["sltrain.seed=1", "sltrain.seed=2", "scheduler=null"])
    assert run.sltrain.seed == 2 and "scheduler" not in run.deepspeed


def test_the_given_dict_stays(good):
    before = str(good)
    from_dict(good, ["zero_optimization.stage=1", "sltrain.method.rank=4"])
    assert str(good) == before


@pytest.mark.parametrize(
    "override, says",
    [
        ("sltrain.steps", "must read key=value"),
        ("=3", "must read key=value"),
        ("sltrain..steps=3", "must read key=value"),
        ("sltrain.stpes=3", "--set sltrain.stpes=3: sltrain.stpes: unknown key; did you mean sltrain.steps?"),
        ("train_batchsize=3", "did you mean train_batch_size?"),
        ("zero_optimization.stag=3", "did you mean zero_optimization.stage?"),
        ("optimizer.params.betta=3", "did you mean optimizer.params.betas?"),
        ("scheduler.params.warmup_num_step=3", "did you mean scheduler.params.warmup_num_steps?"),
        ("rank=3", "it belongs at sltrain.method.rank"),
        ("sltrain.steps.more=3", "sltrain.steps is 11000, not an object; set sltrain.steps as a whole"),
        ("sltrain.steps=many", 'sltrain.steps: must be a whole number; got "many"'),
        ("sltrain.method.alpha=NaN", "sltrain.method.alpha: must be a number"),
        ("sltrain.method.name=full_rank", "method full_rank does not take it"),
        ("gradient_clipping=null", "gradient_clipping: is missing"),
    ],
)
def test_refused(good, override, says):
    with pytest.raises(UserError) as caught:
        from_dict(good, [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)
