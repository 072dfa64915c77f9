"""Train, load, fingerprint and apply tokenizers.

Training gives a sentencepiece BPE with LLaMA's settings (byte fallback, single digits, no normalisation, <unk> <s> </s>
= 0 1 2, no padding token) but without LLaMA's prefix space, so decode(encode(text)) == text for every text without
U+2581, which encodes a space inside the pieces.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from sltrain_ds.data.sources import reason
from sltrain_ds.errors import UserError

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
MAX_TRAIN_CHARACTERS = 500_000_000  # sentencepiece keeps all sentences in memory
MAX_SENTENCE_CHARACTERS = 2048  # longer lines are split: sentencepiece skips sentences above 4,192 bytes
# distinguishes tokenizers of equal vocabulary: prefix spaces, digits, normalisation, newlines, unknown characters
PROBE = "The  fox\tate 1234 ﬁgs.\n\n Été — 日本 \u00a0\x07🙂 </s> Cafe\u0301"


def train(texts: Iterable[str], vocab_size: int, out: str | Path) -> int:
    """Train a tokenizer on `texts` and save it in the directory `out`; returns the number of characters read.

    At most `MAX_TRAIN_CHARACTERS` are read. Deterministic: the same texts give the same files. UserError if the size
    does not fit the texts, or if `out` holds anything but the same tokenizer.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    out = Path(out)
    _check_out(out)
    counter = _Counter(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(counter),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if not counter.characters:
            raise UserError("--input: no text in it to train a tokenizer on") from error
        told = reason(error).rsplit("] ", 1)[-1].split(" Increase vocab_size", 1)[0]
        raise UserError(f"--vocab-size {vocab_size}: does not fit this text: {told}") from error
    before = out / "tokenizer.model"
    if out.is_dir() and any(out.iterdir()) and not (before.is_file() and before.read_bytes() == model.getvalue()):
        raise UserError(f"--out {out}: holds another tokenizer, which data may need; name a new directory or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        (scratch / "raw").mkdir()
        (scratch / "raw" / "tokenizer.model").write_bytes(model.getvalue())
        # only from_pretrained reads vocabulary and merges; vocab_file= silently gives three tokens
        LlamaTokenizer.from_pretrained(scratch / "raw", add_prefix_space=False).save_pretrained(scratch / "out")
        shutil.copy(scratch / "raw" / "tokenizer.model", scratch / "out")
        if out.exists():
            shutil.rmtree(out)
        os.replace(scratch / "out", out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return counter.characters


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a directory")
    known = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"}
    strangers = sorted({entry.name for entry in out.iterdir()} - known) if out.is_dir() else []
    if strangers:
        raise UserError(f"--out {out}: holds {strangers[0]}, which is not a tokenizer file; name a new directory")


class _Counter:
    """Lines for sentencepiece, split to the length it accepts; counts characters and stops at the limit."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            for line in text.split("\n"):
                for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                    # a NUL would end the sentence inside sentencepiece; byte fallback covers it anyway
                    yield line[start : start + MAX_SENTENCE_CHARACTERS].replace("\0", " ")
            self.characters += len(text)
            if self.characters >= MAX_TRAIN_CHARACTERS:
                print(f"tokenizer: trained on the first {self.characters:,} characters, which is enough")
                return


def load(directory: str | Path):
    """Load the tokenizer in `directory`: saved by transformers, or a bare tokenizer.model (LLaMA) or spiece.model (T5).

    UserError if the directory is missing or damaged, or if its tokenizer has no end-of-sequence token.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"tokenizer {directory}: no such directory; make one with `sltrain-ds tokenizer train`")
    from transformers import AutoTokenizer, LlamaTokenizer, T5Tokenizer

    there = {entry.name for entry in directory.iterdir()}
    if "tokenizer_config.json" in there or "tokenizer.json" in there:
        kind = AutoTokenizer
    elif "tokenizer.model" in there:
        kind = LlamaTokenizer
    elif "spiece.model" in there:
        kind = T5Tokenizer
    else:
        raise UserError(f"tokenizer {directory}: holds no tokenizer.json, tokenizer.model or spiece.model")
    if "tokenizer_config.json" in there and not there & {"tokenizer.json", "tokenizer.model", "spiece.model"}:
        raise UserError(f"tokenizer {directory}: holds tokenizer_config.json, but no vocabulary file")
    try:
        tokenizer = kind.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # each reader raises exceptions of its own
        raise UserError(f"tokenizer {directory}: damaged: {reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {directory}: no eos_token; documents are joined by it (tokenizer_config.json)")
    if len(tokenizer) < 4:
        raise UserError(f"tokenizer {directory}: only {len(tokenizer)} tokens, so its vocabulary was not read")
    return tokenizer


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text: no BOS or EOS added, and a literal "</s>" in a text stays text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        return [tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    # bypasses the Python wrapper, without offsets and masks: 1.7 times as fast
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def vocab_size(tokenizer) -> int:
    """Largest id that text or EOS can produce, plus one. T5's 100 sentinels do not count: no text produces them."""
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    return 1 + max(id for id in tokenizer.get_vocab().values() if id not in special)


def sha256(tokenizer) -> str:
    """Hex digest of what determines the encoding: ids, merges or scores, EOS, and the encoding of a probe text.

    It does not hash the files, which depend on the library that writes them.
    """
    model = {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else []
    parts = [sorted(tokenizer.get_vocab().items()), merges, scores, tokenizer.eos_token_id, encode(tokenizer, [PROBE])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tokenizer_sha256(directory: str | Path) -> str:
    """`sha256` of the tokenizer in `directory`."""
    return sha256(load(directory))
