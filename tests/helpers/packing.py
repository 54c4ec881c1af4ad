"""Read packed batches back."""

from bisect import bisect_right

from var.models.packing import Packed


def unpack_sequences(batch: Packed) -> tuple[list[list[int]], list[int]]:
    """Return a packed batch as lists of tokens, prompt and response, and the index at which each response starts."""
    tokens, ids, starts = batch.input_ids.tolist(), [], []
    prompt_starts = [segment.start for segment in batch.segments if not segment.prefix_stop]
    prompt_ends = batch.predictor[batch.length.cumsum(0) - batch.length].tolist()  # each prompt's last token
    for end, response in zip(prompt_ends, batch.target.split(batch.length.tolist()), strict=True):
        prompt = tokens[prompt_starts[bisect_right(prompt_starts, end) - 1] : end + 1]
        ids.append([*prompt, *response.tolist()])
        starts.append(len(prompt))
    return ids, starts
