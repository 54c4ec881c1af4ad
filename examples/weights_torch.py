"""Train on exported weights with PyTorch and transformers alone.

python annotate.py loss=var_grouped export=weights.parquet
python examples/weights_torch.py weights.parquet <folder or name of the model> <folder of the trained model>
"""

import sys

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100  # the label of prompts and padding


def collate(rows):
    """Return token ids and labels [B, T], and weights [B]."""
    ids = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in rows]
    labels = [torch.tensor([IGNORED] * len(row["prompt_ids"]) + row["response_ids"]) for row in rows]
    padded = pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return *padded, torch.tensor([row["weight"] for row in rows])


def compute_loss(logits, labels, weights):
    """Return −Σ w · log π over the response tokens, divided by their number."""
    nll = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    return (weights[:, None] * nll.view(len(labels), -1)).sum() / (labels[:, 1:] != IGNORED).sum()


def main(path, name, out, batch=8, learning_rate=2e-5, epochs=2):
    """Train the model on the rows of positive weight."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    rows = [row for row in Dataset.from_parquet(path) if row["weight"] > 0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(epochs):
        for ids, labels, weights in torch.utils.data.DataLoader(rows, batch, shuffle=True, collate_fn=collate):
            # padding is on the right and has no labels, so that causal attention needs no mask
            loss = compute_loss(model(ids.to(device)).logits, labels.to(device), weights.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"loss {loss.item():.4f}", flush=True)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(name).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
