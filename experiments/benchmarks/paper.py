"""On paper: what training and annotation cost at sizes that were not run, by formulas; nothing is measured.

    python experiments/benchmarks/paper.py

Prints Markdown: the assumptions of each table above it. Sizes come from conf/model; nothing is loaded.
"""

import argparse
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

MODELS = Path(__file__).parents[2] / "conf" / "model"
QWEN_32B = {  # Qwen2.5-32B's published sizes; this project has no configuration of it
    "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
    "num_key_value_heads": 8, "vocab_size": 152064,
}  # fmt: skip
GIB = 2**30
CHUNK = (
    256  # response tokens whose logits exist at once: var.models.logprobs.HEAD_CHUNK, not imported: torch comes with it
)


def parameters(sizes: dict[str, int]) -> dict[str, int]:
    """A Qwen2 model's, by part; head and embeddings untied, norms and biases left out (under 0.01%)."""
    hidden = sizes["hidden_size"]
    key = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * key + 3 * hidden * sizes["intermediate_size"]
    vocabulary = sizes["vocab_size"] * hidden
    return {"layer": layer, "layers": layer * sizes["num_hidden_layers"], "head": vocabulary, "embeddings": vocabulary}


def checkpointed(sizes: dict[str, int], tokens: int) -> float:
    """Bytes of activations with checkpointing under bf16 autocast: each layer's input, and one layer whole.

    The residual stream is fp32, and so is what the norms keep (6 H); the rest of a layer is bf16: query, attention and
    their concatenation (3 H), key and value, gate, activated gate, up and their product (4 I).
    """
    hidden = sizes["hidden_size"]
    key = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    layer = 4 * 6 * hidden + 2 * (3 * hidden + 2 * key + 4 * sizes["intermediate_size"])
    return tokens * (4 * hidden * sizes["num_hidden_layers"] + layer)


def fsdp(sizes: dict[str, int], options: argparse.Namespace) -> None:
    parts = parameters(sizes)
    root, tokens, width = parts["head"] + parts["embeddings"], options.sequences * options.tokens, options.gather_bytes
    total = parts["layers"] + root
    print(f"""## Qwen2.5-7B under FSDP: {total / 1e9:.2f} G parameters

- fp32 parameters, gradients and AdamW's two moments, sharded evenly; bf16 autocast, its copies of weights left out
- {options.sequences} sequences of {options.tokens} tokens a card, packed; each layer checkpointed; no accumulation
- gathered at once, {width} bytes a number: a layer and the next one, prefetched, and head and embeddings, FSDP's root,
  which stay from forward to backward; their gradients, of root and one layer, whole in fp32 until they are scattered
- logits: {CHUNK} rows in fp32
- wire, of a card: layers gathered for forward and for backward, the root once, gradients scattered in fp32; (n − 1)/n
  of each
- s: seconds of the wire at {options.wire_gb:g} GB/s, and of the arithmetic at {options.card_tflops:g} TFLOP/s; at best
  the longer hides the other
- arithmetic: 8 FLOPs a parameter and token (checkpointing runs the forward twice); attention is left out, and that the
  head runs at response positions only

| cards | parameters | gradients | moments | gathered | their gradients | activations | logits | sum | wire | s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |""")
    for cards in (8, 64):
        shard = 4 * total / cards
        gather_parameters, gradients = width * (2 * parts["layer"] + root), 4 * (parts["layer"] + root)
        cells = [shard, shard, 2 * shard, gather_parameters, gradients, checkpointed(sizes, tokens)]
        cells.append(4 * CHUNK * sizes["vocab_size"])
        wire = (width * (2 * parts["layers"] + root) + 4 * total) * (cards - 1) / cards
        work = 8 * (parts["layers"] + parts["head"]) * tokens
        print(f"| {cards} | {' | '.join(f'{cell / GIB:.1f} GiB' for cell in [*cells, sum(cells), wire])} ", end="")
        print(f"| {wire / options.wire_gb / 1e9:.2f}, {work / options.card_tflops / 1e12:.2f} |")


def lora(options: argparse.Namespace) -> None:
    sizes, rank, cards, tokens = QWEN_32B, options.rank, 32, options.sequences * options.tokens
    parts = parameters(sizes)
    hidden, intermediate = sizes["hidden_size"], sizes["intermediate_size"]
    key = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    ends = [(hidden, hidden)] * 2 + [(hidden, key)] * 2 + [(hidden, intermediate)] * 3
    adapters = sizes["num_hidden_layers"] * rank * sum(a + b for a, b in ends)
    base = parts["layers"] * (0.5 + 1 / 16) + 2 * (parts["head"] + parts["embeddings"])
    print(f"""
## Qwen2.5-32B in 4 bit with LoRA on {cards} cards, by data parallelism

- what such a run would take: this project reads adapters and trains none, and has no weights in 4 bit
- each card holds the whole base: layers in 4 bit with one byte of scale for 16 weights, head and embeddings in bf16,
  frozen; the layer at work unpacked to bf16; the head in fp32 where logits are made
- LoRA of rank {rank} on all seven matrices of a layer; 16 bytes a parameter with gradient and moments
- {options.sequences} sequences of {options.tokens} tokens a card, each layer checkpointed; logits: {CHUNK} rows in fp32
- wire, of a card: the adapters' gradients, all-reduced in fp32

| adapters | base | their states | layer at work | head in fp32 | activations | logits | sum of a card | wire |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |""")
    cells = [base, 16 * adapters, 2 * parts["layer"], 4 * parts["head"], checkpointed(sizes, tokens)]
    cells.append(4 * CHUNK * sizes["vocab_size"])
    wire = 2 * 4 * adapters * (cards - 1) / cards
    print(f"| {adapters / 1e6:.0f} M | {' | '.join(f'{cell / GIB:.1f} GiB' for cell in [*cells, sum(cells), wire])} |")


def annotation(options: argparse.Namespace) -> None:
    rows, batch, key = options.rows, options.batch, 16  # bytes of an item's content hash
    whole, tree = options.prompt + options.response, options.prompt + batch * options.response
    print(f"""
## Annotation of {rows / 1e6:g} million rows

- one response of {options.response} tokens to a prompt of {options.prompt}
- on disk, before compression: a key of {key} bytes an item; rewards and summed log-probabilities in float64; those of
  each response token in float32, with an offset of 4 bytes
- a reference and a reward model of 7B read {options.rate:,.0f} tokens/s a card, assumed; {options.cards} cards,
  which need not wait for one another
- B×B, B = {batch}: the reference reads each prompt once and every response under it; the reward model each pair whole

| what | on disk | tokens read | hours |
| --- | --- | --- | --- |""")
    for what, size, read in (
        ("rewards", key + 8, whole),
        ("reference log-probabilities", key + 4 + 4 * options.response, whole),
        ("B×B reference log-probabilities", batch * (key + 8), tree),
        ("B×B rewards", batch * (key + 8), batch * whole),
    ):
        hours = rows * read / options.rate / options.cards / 3600
        print(f"| {what} | {rows * size / GIB:.1f} GiB | {rows * read / 1e9:.0f} G | {hours:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8, help="of a card's micro-batch")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--wire-gb", type=float, default=50, help="GB/s a card; 50: one 400 Gbit/s link")
    parser.add_argument("--card-tflops", type=float, default=400, help="reached by a card; 400: 40%% of an H100's bf16")
    parser.add_argument(
        "--gather-bytes", type=int, default=4, help="of a gathered number; 4: var/training/module.py has no policy"
    )
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=300, help="tokens of a response")
    parser.add_argument("--batch", type=int, default=8, help="B of B×B scores")
    parser.add_argument("--rate", type=float, default=20_000, help="tokens/s that a card scores with a 7B model")
    parser.add_argument("--cards", type=int, default=8, help="that annotate")
    options = parser.parse_args()
    with initialize_config_dir(str(MODELS), version_base="1.3"):
        sizes: dict[str, Any] = dict(compose("qwen2.5-7b").architecture)
    fsdp(sizes, options)
    lora(options)
    annotation(options)


if __name__ == "__main__":
    main()
