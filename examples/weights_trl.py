"""Train on exported weights with TRL's SFTTrainer, which does not support weights: a subclass of 20 lines.

python annotate.py loss=var_grouped export=weights.parquet
python examples/weights_trl.py weights.parquet <folder or name of the model> <folder of the trained model>
"""

import sys

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

IGNORED = -100  # the label of prompts and padding


class Collator(DataCollatorForLanguageModeling):
    """TRL's collator, which keeps the weight of each example."""

    def torch_call(self, examples):
        """Return the padded batch with its weights [B]."""
        weights = torch.tensor([example["weight"] for example in examples])
        return {**super().torch_call(examples), "weights": weights}


class WeightedSFTTrainer(SFTTrainer):
    """SFT with a weight per example: −Σ w · log π over the response tokens, divided by their number."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a micro-batch. `num_items_in_batch` counts the response tokens of the optimizer step."""
        inputs = dict(inputs)
        weights, labels = inputs.pop("weights"), inputs.pop("labels")[:, 1:]
        outputs = model(**inputs, use_cache=False)
        nll = cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
        total = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = (weights[:, None] * nll.view_as(labels)).sum() / total
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which the average over devices divides by
        return (loss, outputs) if return_outputs else loss


def read(path):
    """Return the rows of positive weight, with token ids and labels as TRL's collator reads them."""

    def tokens(row):
        prompt, response = row["prompt_ids"], row["response_ids"]
        return {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}

    rows = Dataset.from_parquet(path).filter(lambda row: row["weight"] > 0)
    return rows.map(tokens, remove_columns=[name for name in rows.column_names if name != "weight"])


def make_trainer(path, model, **options):
    """Return the trainer; `options` are those of SFTConfig."""
    settings = SFTConfig(
        remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, **options
    )
    trainer = WeightedSFTTrainer(model=model, args=settings, train_dataset=read(path))
    trainer.data_collator = Collator(pad_token_id=trainer.processing_class.pad_token_id)
    return trainer


if __name__ == "__main__":
    path, model, out = sys.argv[1:]
    trainer = make_trainer(path, model, output_dir=out, learning_rate=2e-5, per_device_train_batch_size=8)
    trainer.train()
    trainer.save_model(out)
