import json
import math

import pytest
from tiny_runs import config, line


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, method) -> a run directory without weights."""

    def make(name="run", method="sltrain", steps=60):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config(method)))
        evals = [{"step": s, "eval_loss": 4 - s / 40, "eval_perplexity": math.exp(4 - s / 40)} for s in (0, 30, 60)]
        lines = [evals[0], *map(line, range(1, steps + 1)), *evals[1:]]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        (folder / "baselines.json").write_text(json.dumps({"unigram": 60.0, "bigram": 20.0}))
        return folder

    return make
