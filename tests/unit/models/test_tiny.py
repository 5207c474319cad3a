"""The tiny fixtures are what the other tests take them for."""

import torch

from tests.fixtures.tiny import save_tiny, tiny_llama, tiny_tokenizer


def test_a_seed_names_one_model_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    first = tiny_llama(seed=1).state_dict()
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    second, other = tiny_llama(seed=1).state_dict(), tiny_llama(seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_any_text_encodes_and_comes_back():
    text = "a = 1\n\n  ½ «été» 漢字"
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(bos=True), tiny_tokenizer(vocab_size=300)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_bos_is_added_only_where_asked_for():
    assert tiny_tokenizer()("ab")["input_ids"] == tiny_tokenizer()("ab", add_special_tokens=False)["input_ids"]
    with_bos = tiny_tokenizer(bos=True)
    assert with_bos("ab")["input_ids"] == [
        with_bos.bos_token_id,
        *with_bos("ab", add_special_tokens=False)["input_ids"],
    ]


def test_save_tiny_leaves_a_safetensors_checkpoint(tmp_path):
    folder = save_tiny(tmp_path / "m", tie_word_embeddings=True)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
