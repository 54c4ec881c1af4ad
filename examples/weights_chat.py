"""Turn exported weights into a data set without weights, for trainers that read chats, such as Axolotl.

    python annotate.py loss=var_grouped export=weights.jsonl
    python examples/weights_chat.py weights.jsonl chats.jsonl

A response is repeated in proportion to its weight: ⌊w⌋ times, and once more with probability w − ⌊w⌋, so that the
expected gradient is that of the weights. Its variance is larger, and the trainer applies its own chat template.

By their documentation, Axolotl reads such a file with `type: chat_template`, and LLaMA-Factory with
`formatting: sharegpt` and the tags role, content, user, assistant and system. Neither was tested here.
"""

import json
import random
import sys


def main(source, target, seed=0):
    """Write the chats in a random order."""
    draw = random.Random(seed)
    with open(source) as file:
        rows = [json.loads(line) for line in file]
    chats = []
    for row in rows:
        times = int(row["weight"]) + (draw.random() < row["weight"] % 1)
        chats += [{"messages": [*row["prompt"], {"role": "assistant", "content": row["response"]}]}] * times
    draw.shuffle(chats)
    with open(target, "w") as file:
        file.writelines(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
    print(f"{len(chats)} chats from {len(rows)} responses")


if __name__ == "__main__":
    main(*sys.argv[1:])
