"""Generation in batches: against transformers' own `generate` one prompt at a time, and a slow sampler."""

from collections import Counter
from functools import wraps

import numpy as np
import pytest
import torch

from qeval.backends.decoding import Greedy, Sampling
from qeval.backends.generation import Generation
from qeval.backends.torch import TorchSession
from qeval.errors import QevalError
from tests.fixtures.families import tiny_family

COUNT = 12
PROMPTS = [
    tuple(int(t) for t in np.random.default_rng(length).integers(0, 256, size=length)) for length in (9, 3, 17, 9, 30)
]


def alone(model, prompt, count=COUNT):
    """The tokens that transformers goes on with after one prompt, without any padding."""
    made = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return tuple(made[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mistral", "GPT2", "Mixtral"])
def test_a_batch_of_any_lengths_says_what_each_prompt_says_alone(family):
    model = tiny_family(family)
    said = TorchSession(model).generate(PROMPTS, COUNT, Greedy(), ())
    assert said == [alone(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
def test_what_prompts_begin_with_alike_is_run_once_and_rows_leave_when_they_are_done(family):
    """Gemma 2's layers of a sliding window keep too little of a beginning, so there every prompt is run whole."""
    model, beginning = tiny_family(family), PROMPTS[4]
    prompts = [(*beginning, *prompt) for prompt in PROMPTS]
    free = [alone(model, prompt) for prompt in prompts]
    ends = {free[0][:3], free[2][:7]}
    inner, shapes = model.base_model.forward, []

    @wraps(inner)
    def forward(input_ids, **others):
        shapes.append(tuple(input_ids.shape))
        return inner(input_ids=input_ids, **others)

    session = TorchSession(model)
    model.base_model.forward = forward
    said = session.generate(prompts, COUNT, Greedy(), (), lambda tokens: tuple(tokens) in ends)
    assert said == [next((t[:n] for n in range(1, COUNT) if t[:n] in ends), t) for t in free]
    assert ((1, len(beginning)) in shapes) == (family != "Gemma2")
    steps = [rows for rows, columns in shapes if columns == 1]
    assert steps[-1] < max(steps) or len(set(map(len, said))) == 1


def test_a_model_that_reads_its_padding_is_batched_by_length():
    """Its forward pass ignores the mask, so what is padded would be read as text."""
    model = tiny_family("Llama")
    logits, inner, rows = TorchSession(model).logits, model.base_model.forward, []

    def forward(input_ids, attention_mask=None, **others):
        rows.append((input_ids.shape[0], input_ids.shape[1]))
        return inner(input_ids=input_ids, **others)

    model.base_model.forward = forward
    said = Generation(model, logits, keeps=True).run(PROMPTS, COUNT, Greedy())
    assert said == [alone(tiny_family("Llama"), prompt) for prompt in PROMPTS]
    assert {shape for shape in rows if shape[0] > 1} == {(2, 9), (2, 1)}


def test_an_answer_ends_with_its_first_stop_token_and_no_other_row_is_cut():
    model = tiny_family("Llama")
    free = TorchSession(model).generate(PROMPTS, COUNT, Greedy(), ())
    stop = free[0][4]
    ended = TorchSession(model).generate(PROMPTS, COUNT, Greedy(), [stop])
    assert ended[0][-1] == stop
    assert len(ended[0]) == free[0].index(stop) + 1
    for short, long in zip(ended, free, strict=True):
        assert short == (long[: long.index(stop) + 1] if stop in long else long)


def test_samples_depend_on_their_seed_and_on_no_other_row():
    session = TorchSession(tiny_family("Llama"))
    together = session.generate(PROMPTS, COUNT, Sampling(0.8, (1, 2, 3, 4, 5)), ())
    for row, prompt in enumerate(PROMPTS):
        assert session.generate([prompt], COUNT, Sampling(0.8, (row + 1,)), ()) == [together[row]]
    assert session.generate(PROMPTS, COUNT, Sampling(0.8, (6, 7, 8, 9, 10)), ()) != together


def test_a_sampler_draws_each_token_as_often_as_its_probability_says():
    logits, temperature, draws = torch.tensor([0.0, 1.0, 2.0, -1.0]), 0.7, 4000
    counts = Counter(int(Sampling(temperature, (seed,)).pick(logits[None], [0], 0)[0]) for seed in range(draws))
    expected = torch.softmax(logits / temperature, dim=-1)
    for token, p in enumerate(expected.tolist()):
        assert abs(counts[token] / draws - p) < 4 * (p * (1 - p) / draws) ** 0.5


def test_a_prompt_without_room_for_its_answer_is_refused():
    session = TorchSession(tiny_family("Llama"))
    with pytest.raises(QevalError, match="longer than the context of 256"):
        session.generate([PROMPTS[0], PROMPTS[0] * 28], COUNT, Greedy(), ())
