"""What `make demo` does: prune a real model, and look at what was lost.

Takes SmolLM2-135M-Instruct from its package, removes a quarter of the MLP neurons of the middle layers with rc-a,
measures perplexity before and after on text that the calibration never saw, and lets both models answer.
"""

from __future__ import annotations

from pathlib import Path

import transformers

import dicer
from dicer.cli.terminal import Bar
from dicer.machine import peak_memory
from dicer.model.source import open_model
from dicer.pipeline import PERPLEXITY_LENGTH, PERPLEXITY_WINDOWS

MODEL = "builtin:smollm2"
OUT = Path("build/smollm2-rc-a-25")
PROMPT = "Explain in one sentence why the sky is blue."


def answer(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Greedy, so that the two models differ by their weights alone."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = model.generate(**chat, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(ids[0, chat["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    """Prune, measure, compare."""
    print(f"Preparing {MODEL} (the first time, its weights are de-quantized into a cache) ...", flush=True)
    source = open_model(MODEL)
    recipe = dicer.Recipe(method="rc-a", ratio=0.25, layers="10-19")
    print("Pruning 25% of the MLP neurons of layers 10 to 19 with rc-a, and measuring perplexity ...", flush=True)
    with Bar() as progress:
        result = dicer.prune(MODEL, recipe, output=OUT, overwrite=True, perplexity_text="builtin", progress=progress)

    before, after = result.before, result.after
    print(f"\n                      {'dense':>14} {'pruned':>14}")
    print(f"parameters            {before.parameters:>14,} {after.parameters:>14,}")
    print(f"  in MLP neurons      {before.mlp:>14,} {after.mlp:>14,}")
    print(f"bytes of weights      {before.nbytes:>14,} {after.nbytes:>14,}")
    print(f"perplexity            {result.perplexities['before']:>14.2f} {result.perplexities['after']:>14.2f}")
    tokens = PERPLEXITY_WINDOWS * PERPLEXITY_LENGTH
    print(f"  (on {tokens:,} tokens of Python's language reference that calibration does not use)")
    print("time                  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items()))
    print(f"peak memory           {peak_memory()['host'] / 1e9:.2f} GB")

    tokenizer = source.tokenizer()
    print(f"\nAsked: {PROMPT}")
    print(f"dense:  {answer(source.load_model(), tokenizer)}")
    print(f"pruned: {answer(dicer.load(OUT), tokenizer)}")
    print(f"\nCheckpoint: {OUT} (its README.md is the model card). Load it anywhere with:")
    print(f'  transformers.AutoModelForCausalLM.from_pretrained("{OUT}", trust_remote_code=True)')
    print(f'or, with dicer imported: dicer.load("{OUT}")')


if __name__ == "__main__":
    main()
