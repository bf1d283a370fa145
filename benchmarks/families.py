"""How long finding a family and proving it take at real sizes; no weight of these models is ever there.

    python benchmarks/families.py

The configs are those of the models, built without weights; each is measured in a process of its own, whose imports
and a first small model (which transformers' own caches need) are not counted. `peak GB` is of the whole process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings

CONFIGS = {
    "Llama-3-70B": (
        "llama",
        {
            **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256},
            **{"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192},
        },
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48},
            **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
            **{"num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936},
        },
    ),
    "DeepSeek-V3": ("deepseek_v3", {}),  # the type's default config is the model's
}


def measure(name: str) -> dict[str, object]:
    import transformers
    from transformers import AutoConfig

    from dicer.model.source import ModelSource
    from dicer.model.structure.find import find_family
    from dicer.model.structure.skeleton import build, model_class, on_disk
    from dicer.model.tensors import MemorySource
    from dicer.write.prove import prove

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    small = AutoConfig.for_model("llama", num_hidden_layers=1)
    build(small, model_class(small))
    model_type, sizes = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **sizes)
    kind = model_class(config)
    begun = time.perf_counter()
    family = find_family(config, kind)
    found = time.perf_counter()
    state = on_disk(build(config, kind).model)
    raw = json.loads(json.dumps(config.to_dict(), default=str)) | {"architectures": [kind.__name__]}
    source = ModelSource(name, None, config, raw, family, MemorySource(state))
    seconds = {}
    for axis in ("mlp", "attention", "experts", "block"):
        members = [own for own in family.axes if own.partition(".")[0] == axis]
        if members or axis == "block":
            start = time.perf_counter()
            proofs = prove(source, members or ["block"])
            seconds[axis] = time.perf_counter() - start
            for proof in proofs:
                if not proof.holds:
                    sys.exit(f"{name}: {proof}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"parameters": sum(t.numel() for t in state.values()), "find": found - begun, "prove": seconds, "peak": peak}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    print("| model | parameters | find s | prove s: neurons | heads | experts | blocks | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in CONFIGS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        row = json.loads(done.stdout.splitlines()[-1])
        times = [
            f"{row['prove'][axis]:.1f}" if axis in row["prove"] else "-"
            for axis in ("mlp", "attention", "experts", "block")
        ]
        cells = [name, f"{row['parameters'] / 1e9:.1f} B", f"{row['find']:.1f}", *times, f"{row['peak']:.1f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
