import json
import shutil

import pytest
import sentencepiece
from transformers import AutoTokenizer

from sltrain_ds.data import tokenizer as tokenizers
from sltrain_ds.errors import UserError

TEXTS = [
    "the cat",
    "  two spaces before, one behind ",
    " ",
    "\n\n\tline\r\nline\x0b\x0c\u2028end\n",
    "".join(map(chr, range(1, 256))),
    "\x00 nul",
    "日本語 🙂👩‍👩‍👧 e\u0301 é ﬁ \u00a0\ufeff\U0010ffff",
    "</s> <s> <unk> <0x0A> are text",
    "1234567890 3.14",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return tokenizers.load(tokenizer_dir)


@pytest.fixture(scope="module")
def t5_dir(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("t5")
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=file,
            model_type="unigram",
            vocab_size=60,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_of_any_text(tokenizer, text):
    (ids,) = tokenizers.encode(tokenizer, [text])
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)  # special tokens come from us alone


def test_encoding_is_that_of_transformers(tokenizer, t5_dir):
    for one in (tokenizer, tokenizers.load(t5_dir)):
        assert tokenizers.encode(one, TEXTS) == [
            one(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in TEXTS
        ]


def test_truncation_saved_with_a_tokenizer_is_not_applied(tokenizer_dir, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path / "bpe")
    saved = json.loads((tmp_path / "bpe" / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "bpe" / "tokenizer.json").write_text(json.dumps(saved))
    text = "the cat sees a house and a tree"
    assert tokenizers.encode(tokenizers.load(tmp_path / "bpe"), [text]) == tokenizers.encode(
        tokenizers.load(tokenizer_dir), [text]
    )


def test_special_ids_and_size(tokenizer, tokenizer_dir):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id is None
    assert len(tokenizer) == tokenizers.vocab_size(tokenizer) == 320
    again = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert (
        again("the cat  sleeps 12", add_special_tokens=False).input_ids
        == tokenizers.encode(tokenizer, ["the cat  sleeps 12"])[0]
    )


def test_digits_are_single_and_unknown_characters_are_bytes(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizers.encode(tokenizer, ["2024é"])[0])
    assert pieces == ["2", "0", "2", "4", "<0xC3>", "<0xA9>"]


def test_training_is_deterministic_and_replaces_only_the_same_tokenizer(documents, tokenizer_dir, tmp_path):
    out = tmp_path / "bpe"
    for _ in range(2):
        assert tokenizers.train(iter(documents), 320, out) == sum(map(len, documents))
        for file in tokenizer_dir.iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["bpe"]  # no scratch left
    with pytest.raises(UserError, match=r"bpe: holds another tokenizer, which data may need"):
        tokenizers.train(documents, 330, out)
    assert (out / "tokenizer.model").read_bytes() == (tokenizer_dir / "tokenizer.model").read_bytes()
    (out / "thesis.doc").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.doc"):
        tokenizers.train(documents, 320, out)
    assert (out / "thesis.doc").exists()


@pytest.mark.parametrize(
    ("size", "message"), [(100, "--vocab-size 100: .*smaller"), (10**5, "--vocab-size 100000: .*too high"), (0, "0")]
)
def test_vocabulary_that_does_not_fit(documents, tmp_path, size, message):
    with pytest.raises(UserError, match=message) as error:
        tokenizers.train(documents, size, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_no_text(tmp_path):
    with pytest.raises(UserError, match="no text"):
        tokenizers.train([], 300, tmp_path / "out")


def test_long_lines_are_learned_from(tmp_path):
    # sentencepiece by itself skips a line above 4,192 bytes
    tokenizers.train(["zebra quagga " * 2000], 280, tmp_path / "out")
    pieces = tokenizers.load(tmp_path / "out").get_vocab()
    assert any("zebr" in piece or "quag" in piece for piece in pieces)


def test_t5_unigram_loads(t5_dir, tmp_path):
    tokenizer = tokenizers.load(t5_dir)
    assert tokenizer.eos_token_id == 1
    assert len(tokenizer) == 160 and tokenizers.vocab_size(tokenizer) == 60  # its 100 sentinels never come out of text
    text = "the cat sleeps under a tree"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(t5_dir / "spiece.model"))
    assert tokenizers.encode(tokenizer, [text]) == [processor.encode(text)]
    tokenizer.save_pretrained(tmp_path)
    assert tokenizers.tokenizer_sha256(tmp_path) == tokenizers.tokenizer_sha256(t5_dir)


def test_sha256_is_of_the_encoding_not_of_the_files(tokenizer_dir, documents, tmp_path, t5_dir):
    wanted = tokenizers.tokenizer_sha256(tokenizer_dir)
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer_dir, copy)
    (copy / "tokenizer.json").write_text(json.dumps(json.loads((copy / "tokenizer.json").read_text()), indent=3))
    (copy / "tokenizer.model").unlink()
    assert tokenizers.tokenizer_sha256(copy) == wanted

    tokenizers.train(documents[:100], 320, tmp_path / "other")
    model = json.loads((copy / "tokenizer.json").read_text())
    vocab = model["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (copy / "tokenizer.json").write_text(json.dumps(model))
    others = [tokenizers.tokenizer_sha256(folder) for folder in (copy, tmp_path / "other", t5_dir)]
    assert len({wanted, *others}) == 4


def test_load_refuses(tokenizer_dir, tmp_path):
    def copy(name, *names):
        folder = tmp_path / name
        folder.mkdir()
        for file in names:
            shutil.copy(tokenizer_dir / file, folder)
        return folder

    everything = ("tokenizer.json", "tokenizer_config.json")
    damaged = copy("damaged", *everything)
    (damaged / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text()[:2000])
    model = copy("model")
    (model / "tokenizer.model").write_bytes(b"not a model")
    for folder, message in [
        (tmp_path / "nowhere", "no such directory"),
        (copy("empty"), "holds no tokenizer"),
        (copy("config", "tokenizer_config.json"), "no vocabulary file"),
        (damaged, "damaged"),
        (model, "damaged"),
        (copy("json", "tokenizer.json"), "no eos_token"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            tokenizers.load(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
