"""The committed vocabulary: any string comes back, and no special token hides in it."""
from hypothesis import given, settings, strategies as st

from arm.data.text import TextTokenizer, default_tokenizer

@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_comes_back(text):
    ids = default_tokenizer().encode(text)
    assert default_tokenizer().decode(ids) == text and all(0 <= i < 2048 for i in ids)

def test_vocabulary():
    tokenizer = default_tokenizer()
    assert tokenizer.vocab_size == 2048 and not tokenizer.tokenizer.get_added_tokens_decoder()
    assert len(tokenizer.encode("medium-dark skin tone")) == 4

def test_qwen_folder(tmp_path):
    "A folder in Qwen2's form without tokenizer.json loads through transformers and gives the same ids."
    import json
    model = json.loads(default_tokenizer().tokenizer.to_str())["model"]
    (tmp_path/"vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (tmp_path/"merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path/"tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    other = TextTokenizer.from_pretrained(tmp_path)
    for text in ("a large red circle", "set the clock to three-thirty", "مرحبا", "<|im_end|>", "3 o’clock!"):
        assert other.decode(other.encode(text)) == text
        if "<" not in text: assert other.encode(text) == default_tokenizer().encode(text)
