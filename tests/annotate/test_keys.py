"""Keys of items: chunks and shared prefixes give the same hashes as each item alone."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.annotators import ROWS, make_sequences, split_tokens
from var.annotate import keys as keys_module
from var.annotate.cache_files import as_keys
from var.annotate.keys import hash_pairs, hash_prompts, hash_sequences, hash_texts
from var.data.messages import prompt_content
from var.utils.provenance import hash_content


@pytest.mark.parametrize("chunk", [4096, 3])
def test_keys_equal_the_hash_of_each_item(make, monkeypatch, chunk):
    monkeypatch.setattr(keys_module, "CHUNK", chunk)
    annotator = make()
    rows = (*ROWS, replace(ROWS[0], id="other", prompt=({"role": "user", "content": 'é "\n\u2028'},)))
    loaded, sequences = make_sequences(annotator, rows)
    tokens = [split_tokens(sequences, i) for i in range(len(sequences))]
    expected = [hash_content(prompt, response) for prompt, response in tokens]
    assert (hash_sequences(sequences, annotator.cache) == as_keys(expected)).all()
    some = np.array([5, 0, 2])
    assert (hash_prompts(sequences, some) == as_keys([hash_content(tokens[i][0], []) for i in some])).all()
    pairs = np.array([(i, j) for i in (3, 1, 7) for j in (0, 3, 6, 8)])
    expected = [hash_content(tokens[i][0], tokens[j][1]) for i, j in pairs]
    assert (hash_pairs(sequences, pairs, annotator.cache) == as_keys(expected)).all()
    assert len(hash_pairs(sequences, pairs[:0], annotator.cache)) == 0
    triples = [(row.prompt, r.text, answer) for row in loaded for r in row.responses for answer in (row.answer, None)]
    keys, lengths = hash_texts(triples, annotator.cache)
    assert (keys == as_keys([hash_content(prompt_content(prompt), *rest) for prompt, *rest in triples])).all()
    assert lengths.tolist() == [
        len(text) + sum(len(part) for message in prompt for part in message.values()) for prompt, text, _ in triples
    ]
