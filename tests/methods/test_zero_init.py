import os
import subprocess
import sys

CODE = """
import deepspeed, torch
from transformers import LlamaConfig, LlamaForCausalLM
from sltrain_ds import SLTrainConfig, SLTrainLinear, convert
from sltrain_ds.methods.low_rank_layer import LowRankLinear

deepspeed.init_distributed("gloo", verbose=False)
settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
llama = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)

def build():
    torch.manual_seed(11)
    sltrain = SLTrainLinear(24, 40, rank=5, density=0.2, alpha=10, bias=True, layer_name="a")
    return sltrain, LowRankLinear(24, 40, rank=5, alpha=10)

def same(plain, partitioned):
    for (name, p), (_, q) in zip(plain.named_parameters(), partitioned.named_parameters(), strict=True):
        assert q.shape == (0,) or q.numel() == 0, (name, q.shape)
        with deepspeed.zero.GatheredParameters([q]):
            assert q.dtype == torch.bfloat16 and torch.equal(p.detach().bfloat16(), q.detach()), name

plain = build()
with deepspeed.zero.Init(config_dict_or_path=settings):
    partitioned = build()
for p, q in zip(plain, partitioned, strict=True):
    same(p, q)
    q_parameters = list(q.parameters())
    with deepspeed.zero.GatheredParameters(q_parameters, modifier_rank=0):
        q.reset_parameters(torch.Generator().manual_seed(3))
    p.reset_parameters(torch.Generator().manual_seed(3))
    same(p, q)
assert partitioned[0].support_info() == plain[0].support_info()
with deepspeed.zero.GatheredParameters(list(partitioned[0].parameters())):
    torch.testing.assert_close(partitioned[0].dense_weight(), plain[0].bfloat16().dense_weight())

# a whole model, converted inside the context, through the ZeRO-3 engine's gather and release
with deepspeed.zero.Init(config_dict_or_path=settings):
    model = convert(LlamaForCausalLM(llama), SLTrainConfig(rank=4, density=0.1, alpha=8))
layer = model.model.layers[0].mlp.up_proj
assert layer.A.numel() == 0 and layer.nnz == 153 and (layer.in_features, layer.out_features) == (32, 48)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
settings |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
ids = torch.randint(0, 64, (1, 8))
losses = []
for _ in range(5):
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print("all well")
"""


def test_zero_init_gives_the_plain_values_and_trains(tmp_path):
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    script = tmp_path / "zero_init.py"
    script.write_text(CODE)
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "all well" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
