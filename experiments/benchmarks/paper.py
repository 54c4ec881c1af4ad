"""Estimate by formulas what training and annotation cost at sizes that were not run. Nothing is measured.

    python experiments/benchmarks/paper.py

Print Markdown tables, with the assumptions above each. Sizes come from conf/model, and no model is loaded.
"""

import argparse
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

CONF = Path(__file__).parents[2] / "conf"
GIB = 2**30
CHUNK = 256  # response tokens per chunk of logits: var.models.logprobs.HEAD_CHUNK, copied because its import is slow


def read_sizes(name: str) -> dict[str, Any]:
    """Return the architecture of conf/model/{name}.yaml."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return dict(compose(f"model/{name}").model.architecture)


def count_parameters(sizes: dict[str, int]) -> dict[str, int]:
    """Count the parameters of a Qwen2 model by part, with untied embeddings, without norms and biases (under 0.01%)."""
    hidden = sizes["hidden_size"]
    key = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * key + 3 * hidden * sizes["intermediate_size"]
    vocabulary = sizes["vocab_size"] * hidden
    return {"layer": layer, "layers": layer * sizes["num_hidden_layers"], "head": vocabulary, "embeddings": vocabulary}


def count_activation_bytes(sizes: dict[str, int], tokens: int) -> float:
    """Count bytes of activations with checkpointing under bf16 autocast: each layer's input, and one complete layer.

    The residual stream and the tensors that the norms keep (6 H) are fp32. The other tensors of a layer are bf16:
    query, attention and their concatenation (3 H), key and value, gate, activated gate, up and their product (4 I).
    """
    hidden = sizes["hidden_size"]
    key = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    layer = 4 * 6 * hidden + 2 * (3 * hidden + 2 * key + 4 * sizes["intermediate_size"])
    return tokens * (4 * hidden * sizes["num_hidden_layers"] + layer)


def print_fsdp(sizes: dict[str, int], options: argparse.Namespace) -> None:
    """Print the cost of full training under FSDP."""
    parts = count_parameters(sizes)
    root, tokens, width = parts["head"] + parts["embeddings"], options.sequences * options.tokens, options.gather_bytes
    total = parts["layers"] + root
    print(f"""## Qwen2.5-7B under FSDP: {total / 1e9:.2f} G parameters

- Parameters, gradients and AdamW's two moments are fp32 and sharded evenly. Autocast is bf16, and its copies of the
  weights are not counted.
- Each card has {options.sequences} packed sequences of {options.tokens} tokens. Each layer is checkpointed. There is no
  accumulation.
- Gathered at once, at {width} bytes per parameter: a layer and the next one, which is prefetched, and FSDP's root (head
  and embeddings), which stays from forward to backward. The gradients of the root and of one layer are complete in fp32
  until they are scattered.
- Logits are {CHUNK} rows in fp32.
- Network traffic per card: layers are gathered for forward and for backward, the root once, and gradients are scattered
  in fp32, (n − 1)/n of each.
- Seconds: of the network at {options.wire_gb:g} GB/s and of the arithmetic at {options.card_tflops:g} TFLOP/s. At best
  the longer one hides the other.
- Arithmetic is 8 FLOPs per parameter and token, because checkpointing runs the forward twice. It ignores attention, and
  that the head runs at response positions only.

| cards | parameters | gradients | moments | gathered | their gradients | activations | logits | sum | network | s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |""")
    for cards in (8, 64):
        shard = 4 * total / cards
        gathered, gradients = width * (2 * parts["layer"] + root), 4 * (parts["layer"] + root)
        cells = [shard, shard, 2 * shard, gathered, gradients, count_activation_bytes(sizes, tokens)]
        cells.append(4 * CHUNK * sizes["vocab_size"])
        wire = (width * (2 * parts["layers"] + root) + 4 * total) * (cards - 1) / cards
        work = 8 * (parts["layers"] + parts["head"]) * tokens
        print(f"| {cards} | {' | '.join(f'{cell / GIB:.1f} GiB' for cell in [*cells, sum(cells), wire])} ", end="")
        print(f"| {wire / options.wire_gb / 1e9:.2f}, {work / options.card_tflops / 1e12:.2f} |")


def print_lora(sizes: dict[str, int], options: argparse.Namespace) -> None:
    """Print the cost of training LoRA adapters on 4-bit weights by data parallelism."""
    rank, cards, tokens = options.rank, 32, options.sequences * options.tokens
    parts = count_parameters(sizes)
    hidden, intermediate = sizes["hidden_size"], sizes["intermediate_size"]
    key = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    ends = [(hidden, hidden)] * 2 + [(hidden, key)] * 2 + [(hidden, intermediate)] * 3
    adapters = sizes["num_hidden_layers"] * rank * sum(a + b for a, b in ends)
    base = parts["layers"] * (0.5 + 1 / 16) + 2 * (parts["head"] + parts["embeddings"])
    print(f"""
## Qwen2.5-32B in 4 bit with LoRA on {cards} cards, by data parallelism

- model=qwen2.5-32b-int4 adapter=lora strategy=ddp is such a run. It was not run at this size.
- Each card has a complete copy of the frozen base: layers in 4 bit with one byte of scale per 16 weights, head and
  embeddings in bf16. The current layer is unpacked to bf16. The head is fp32 where logits are computed.
- LoRA has rank {rank} on all seven matrices of a layer, with 16 bytes per parameter, gradient and moments included.
- Each card has {options.sequences} sequences of {options.tokens} tokens. Each layer is checkpointed. Logits are {CHUNK}
  rows in fp32.
- Network traffic per card: the adapters' gradients, all-reduced in fp32.

| adapters | base | their states | current layer | head in fp32 | activations | logits | sum per card | network |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |""")
    cells = [base, 16 * adapters, 2 * parts["layer"], 4 * parts["head"], count_activation_bytes(sizes, tokens)]
    cells.append(4 * CHUNK * sizes["vocab_size"])
    wire = 2 * 4 * adapters * (cards - 1) / cards
    print(f"| {adapters / 1e6:.0f} M | {' | '.join(f'{cell / GIB:.1f} GiB' for cell in [*cells, sum(cells), wire])} |")


def print_annotation(options: argparse.Namespace) -> None:
    """Print the cost of annotating many rows with a reference and a reward model of 7B."""
    rows, batch, key = options.rows, options.batch, 16  # bytes of an item's content hash
    pair, tree = options.prompt + options.response, options.prompt + batch * options.response
    print(f"""
## Annotation of {rows / 1e6:g} million rows

- A row has one response of {options.response} tokens to a prompt of {options.prompt} tokens.
- On disk, before compression, an item has a key of {key} bytes. Rewards and summed log-probabilities are float64,
  log-probabilities of response tokens float32, with an offset of 4 bytes.
- A reference and a reward model of 7B read {options.rate:,.0f} tokens/s per card, which is an assumption. There are
  {options.cards} cards, which do not wait for one another.
- B×B scores have B = {batch}. The reference reads each prompt once and every response after it. The reward model reads
  each pair completely.

| quantity | on disk | tokens read | hours |
| --- | --- | --- | --- |""")
    for quantity, size, read in (
        ("rewards", key + 8, pair),
        ("reference log-probabilities", key + 4 + 4 * options.response, pair),
        ("B×B reference log-probabilities", batch * (key + 8), tree),
        ("B×B rewards", batch * (key + 8), batch * pair),
    ):
        hours = rows * read / options.rate / options.cards / 3600
        print(f"| {quantity} | {rows * size / GIB:.1f} GiB | {rows * read / 1e9:.0f} G | {hours:.1f} |")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8, help="per card and micro-batch")
    parser.add_argument("--tokens", type=int, default=512, help="per sequence")
    parser.add_argument("--wire-gb", type=float, default=50, help="network, GB/s per card. 50 is one 400 Gbit/s link")
    parser.add_argument("--card-tflops", type=float, default=400, help="per card. 400 is 40%% of an H100's bf16 peak")
    parser.add_argument("--gather-bytes", type=int, default=4, help="per gathered parameter. 4: FSDP gathers fp32")
    parser.add_argument("--rank", type=int, default=16, help="rank of LoRA")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--prompt", type=int, default=200, help="tokens per prompt")
    parser.add_argument("--response", type=int, default=300, help="tokens per response")
    parser.add_argument("--batch", type=int, default=8, help="B of B×B scores")
    parser.add_argument("--rate", type=float, default=20_000, help="tokens/s per card of scoring with a 7B model")
    parser.add_argument("--cards", type=int, default=8, help="cards that annotate")
    options = parser.parse_args()
    print_fsdp(read_sizes("qwen2.5-7b"), options)
    print_lora(read_sizes("qwen2.5-32b-int4"), options)
    print_annotation(options)


if __name__ == "__main__":
    main()
