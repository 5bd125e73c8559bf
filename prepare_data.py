"""Text to tokens: reads any text, trains a byte-pair encoding on it, writes shards for train.py.

    python prepare_data.py                                 # Python's own manual, into data/
    python prepare_data.py book.txt --out=data/book        # your text
    python prepare_data.py notes/ more.jsonl page.html https://example.org/book.txt --out=data/mine
    python prepare_data.py stories.txt --separator='<|endoftext|>' --vocab_size=4096
    python prepare_data.py book.txt --tokenizer=gpt2       # GPT-2's vocabulary, by tiktoken

The pipeline: documents -> clean -> BPE -> tokens of two splits -> shards, meta.json.
A document must fit in memory, the corpus need not: its clean text lies on disk until it is encoded.
"""

import argparse
import array
import ast
import collections
import concurrent.futures
import contextlib
import difflib
import functools
import hashlib
import heapq
import html.parser
import http.client
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import sys
import sysconfig
import time
import unicodedata
import urllib.parse
import urllib.request

import numpy as np
import regex  # knows \p{L}, which re does not
import tiktoken

FORMAT = 1  # of the data folder
SHARD_TOKENS = 100_000_000
HTML = (".html", ".htm")
READ_BYTES = 1 << 20
PART_CHARS = 1 << 16  # long documents go through the tokenizer in parts of about this length
FEW_DOCUMENTS = 200  # with fewer, a tenth of them would be no fair sample
END_OF_TEXT = "<|endoftext|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]  # for chat, which comes with fine-tuning

# --- documents ------------------------------------------------------------------------------------


def read_documents(inputs, text_field="text", separator=None):
    """Yields (source, text) for every document in files, folders and URLs; none: Python's manual.

    A text file is one document, or many divided by separator; .json and .jsonl hold one in
    text_field of each object; .html is stripped of markup. Raises ValueError or OSError naming
    the file and the place in it.
    """
    if not inputs:
        yield from python_manual()
    for path in find_files(inputs):
        yield from read_file(path, text_field, separator)


def find_files(inputs):
    """The paths that inputs stand for: of a folder its text files, sorted, without hidden ones."""
    files = []
    for name in map(str, inputs):
        is_url = name.startswith(("http://", "https://"))
        path = download(name) if is_url else pathlib.Path(name)
        if not path.is_dir():
            files.append(path)
            continue
        inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
        inside = [p for p in inside if not any(n[0] == "." for n in p.relative_to(path).parts)]
        inside = [p for p in inside if not is_binary(p)]
        if not inside:
            raise ValueError(f"{path}: no text files in this folder")
        files += inside
    return files


def is_binary(path):
    """Whether its beginning holds a NUL byte, which UTF-8 text never does."""
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def read_file(path, text_field, separator):
    """Yields (source, text) of one file, by its extension."""
    if path.exists() and not path.is_file():  # a pipe can be read only once
        raise ValueError(f"{path}: not a regular file; save its contents to one")
    if is_binary(path):
        raise ValueError(f"{path}: a binary file; give text in UTF-8")
    extension = path.suffix.lower()
    if extension in (".json", ".jsonl"):
        for where, item in read_json(path):
            yield where, field_of(item, text_field, where)
    else:
        for offset, document in split_file(path, separator):
            text = decode(document, path, offset)
            yield str(path), html_to_text(text, path) if extension in HTML else text


def read_json(path):
    """Yields (where, item) for each line of a .jsonl file, or each item of a .json file's list."""
    if path.suffix.lower() == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, parse_json(line, where)
    else:
        items = parse_json(path.read_bytes(), path)
        for number, item in enumerate(items if isinstance(items, list) else [items], 1):
            yield f"{path}, item {number}", item


def split_file(path, separator):
    """Yields (byte offset, bytes) of what stands between separators, reading a block at a time."""
    if not separator:
        yield 0, path.read_bytes()
        return
    separator = separator.encode()
    buffer, offset, searched = bytearray(), 0, 0
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            buffer += block
            start = 0
            while (end := buffer.find(separator, max(start, searched))) >= 0:
                yield offset + start, buffer[start:end]
                start = end + len(separator)
            del buffer[:start]
            offset += start
            # a separator can begin only in the last bytes, fewer than it has
            searched = max(0, len(buffer) - len(separator) + 1)
        yield offset, buffer


def decode(data, path, offset=0):
    """UTF-8 bytes -> text; the error names file and byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {offset + error.start}; "
            "convert it, for instance: iconv -f latin1 -t utf-8"
        )


def parse_json(data, where):
    text = decode(data, where).removeprefix("\ufeff")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"{where}{line}: broken JSON: {error.msg}, column {error.colno}")
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deep")
    except ValueError as error:  # a number without end
        raise ValueError(f"{where}: broken JSON: {error}") from error


def field_of(item, field, where):
    """The text in a JSON object's field."""
    text = item.get(field) if isinstance(item, dict) else None
    if isinstance(text, str):
        return text
    found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
    raise ValueError(f"{where}: no text in field {field!r} (found: {found}); see --text_field")


def download(url):
    """Fetches a URL into downloads/, once; returns the path."""
    folder = pathlib.Path("downloads")
    name = re.sub(r"[^\w.-]+", "_", url.partition("://")[2]).strip("_")
    suffix = pathlib.Path(urllib.parse.urlsplit(url).path).suffix
    if not name.endswith(suffix):  # as of data.jsonl?download=true
        name += suffix
    for path in (folder / name, folder / f"{name}.html"):
        if path.exists():
            print(f"using {path}; delete it to download {url} again")
            return path
    print(f"downloading {url} to {folder}/")
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{name}.tmp"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
            shutil.copyfileobj(response, file)
            is_html = response.headers.get_content_type() == "text/html"
            missing = int(response.headers.get("Content-Length") or 0) - file.tell()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{url}: cannot be downloaded ({error})")
    if missing > 0:
        raise ValueError(f"{url}: the download broke off, {missing} bytes short; try again")
    has_suffix = pathlib.Path(name).suffix.lower() in HTML
    return temporary.replace(folder / (f"{name}.html" if is_html and not has_suffix else name))


def tags(names):
    return frozenset(names.split())


HIDDEN = tags("script style title template noscript svg iframe")
INLINE = HIDDEN | tags("""a abbr acronym b bdi bdo big button cite code data del dfn em font i img
    ins kbd label mark q s samp small span strong sub sup time tt u var wbr""")
ONE_LINE = tags("br dd dt li option td th tr")  # no blank line after these


class VisibleText(html.parser.HTMLParser):
    """Collects what a person would see of a page: blocks stand apart, preformatted text stays."""

    def __init__(self):
        super().__init__()
        self.parts, self.hidden, self.preformatted = ["\n"], 0, 0

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in HIDDEN
        self.preformatted += tag == "pre"
        if tag not in INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.hidden = max(0, self.hidden - (tag in HIDDEN))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if tag not in INLINE | ONE_LINE:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.preformatted:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self.parts[-1][-1] in " \n" else data
        if data and not self.hidden:
            self.parts.append(data)


def html_to_text(page, path="page"):
    """
    >>> html_to_text("<h1>Tom &amp; Ann</h1><script>x</script><p>They <b>met</b>.</p>").split("\\n")
    ['', '', 'Tom & Ann', '', 'They met.', '']
    """
    parser = VisibleText()
    try:
        parser.feed(page)
        parser.close()
    except AssertionError as error:  # html.parser's answer to some broken declarations
        raise ValueError(f"{path}: broken HTML: {error}")
    return "".join(parser.parts)


LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
JUNK = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]+")
TRAILING_BLANKS = re.compile(r"(?<![ \t])[ \t]+(?=\n|\Z)")  # (?<!) keeps long runs of blanks fast
BLANK_LINES = re.compile(r"\n{3,}")


def clean(text):
    """Text in NFC, with \\n for line ends, no control characters, byte-order marks or halves of
    surrogate pairs, no blanks at line ends, at most one blank line in a row and none at the ends.

    >>> clean("\\ufeffone \\r\\n\\r\\n\\r\\n\\r\\ntwo\\x00\\n")
    'one\\n\\ntwo'
    """
    text = unicodedata.normalize("NFC", JUNK.sub("", LINE_END.sub("\n", text)))
    return BLANK_LINES.sub("\n\n", TRAILING_BLANKS.sub("", text)).strip("\n")


# --- the default corpus: the manual inside every Python installation ------------------------------


def python_manual():
    """Yields (source, text): pydoc's topics, and a page for each module of the standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python comes without its manual (pydoc_data): give a text") from None
    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    for module, entries in itertools.groupby(library_docstrings(), key=lambda entry: entry[0]):
        yield module, "\n\n".join(f"# {title}\n\n{text}" for _, title, text in entries)


@functools.cache
def library_docstrings():
    """[(module, signature, docstring)] of the standard library, read with ast, never imported."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    entries = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if skipped.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            module = ".".join(part for part in parts if part != "__init__")
            tree = ast.parse(path.read_bytes())
            entries += [(module, title, text) for title, text in docstrings(tree, module)]
    return entries


def docstrings(node, name):
    """Yields (signature, docstring) of a module, class or function and of all inside it."""
    text = ast.get_docstring(node)
    if text and text.strip():
        arguments = getattr(node, "args", None)
        yield name + (f"({ast.unparse(arguments)})" if arguments else ""), text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(child, f"{name}.{child.name}")


def position(key):
    """A pseudo-random number from 0 to 1 that depends on the key alone; splits go by it."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def first_sentence(docstring):
    """
    >>> first_sentence("Join two\\n    paths.  Blanks too.\\n\\nMore.")
    'Join two paths.'
    """
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.match(r".*?[.!?](?= |$)|.*", paragraph)[0]


def manual_examples():
    """Examples for finetune.py from Python's manual: {task: [{...}]}. Each has its module as its
    "group", which no split divides.

    classify: a docstring, and the package it is from, one of those that have many modules.
    instruct: "Explain NAME(ARGUMENTS).", and the first sentence of its docstring; for every fourth,
    where it is; and for another fourth, what it takes.
    preference: an explanation, and as a worse one that of something in another module.
    """
    packages = collections.defaultdict(lambda: collections.defaultdict(list))
    by_module = collections.defaultdict(list)
    for module, title, text in library_docstrings():
        package = module.split(".")[0]
        example = {"text": clean(text), "group": module, "label": package}
        packages[package][module].append(example)
        name, sentence = title.split("(")[0], first_sentence(clean(text))
        if "._" not in name and 20 <= len(sentence) <= 200 and len(title) <= 100:
            by_module[module].append((title, sentence))
    examples = {"classify": [], "instruct": [], "preference": []}
    for modules in packages.values():
        if len(modules) >= 10 and sum(map(len, modules.values())) >= 150:
            rounds = itertools.zip_longest(*modules.values())  # one of each, again and again
            found = filter(None, itertools.chain.from_iterable(rounds))
            examples["classify"] += itertools.islice(found, 300)
    modules = sorted(by_module, key=position)  # so the other module is in the same split, mostly
    for module, other in zip(modules, modules[1:] + modules[:1]):
        pairs = zip(by_module[module], itertools.cycle(by_module[other]))
        for i, ((title, sentence), (_, worse)) in enumerate(pairs):
            shared = {"group": module, "instruction": f"Explain {title}."}
            examples["instruct"].append({**shared, "output": sentence})
            examples["preference"].append({**shared, "chosen": sentence, "rejected": worse})
            name, _, arguments = title.removesuffix(")").partition("(")
            if i % 4 == 1:
                question, answer = f"Where is {name}?", f"In the module {module}."
                examples["instruct"].append({**shared, "instruction": question, "output": answer})
            elif i % 4 == 3 and arguments:
                question, answer = f"What does {name}({arguments}) take?", f"It takes {arguments}."
                examples["instruct"].append({**shared, "instruction": question, "output": answer})
    return examples


# --- byte-pair encoding ---------------------------------------------------------------------------

# GPT-2's rule for cutting text into pieces, which no token spans: endings like 's, words, numbers,
# other signs, each with the blank before it, and white space. (tiktoken's form: ++ is a + that
# never gives back what it has matched, which is faster and here matches the same.)
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
WORD_END = regex.compile(r"(?<=[\p{L}\p{N}])(?=\s)")


def cut(text, length=PART_CHARS):
    """Yields a long text in parts, cut where white space follows a word. No token crosses such a
    point, so the parts encode exactly as the whole would."""
    start = 0
    while start < len(text):
        border = WORD_END.search(text, start + length)
        end = border.start() if border else len(text)
        yield text[start:end]
        start = end


def count_pieces(texts):
    """Cuts texts by SPLIT and counts the different pieces: {piece: how often}.

    Words with the blanks before them are counted first: few are different, so few are cut.
    """
    words, pieces = collections.Counter(), collections.Counter()
    for part in itertools.chain.from_iterable(map(cut, texts)):
        words.update(re.findall(r"\s*\S+|\s+", part))
    split = regex.compile(SPLIT).findall
    for word, n in words.items():
        for piece in split(word):
            pieces[piece] += n
    return pieces


def train_bpe(texts, vocab_size):
    """Learns a byte-pair encoding (Sennrich et al. 2016; on bytes, as Radford et al. 2019).

    Starts with the 256 bytes and merges the most frequent adjacent pair (of equals, that of the
    smaller ids) again and again, until there are vocab_size tokens or no pair occurs twice.
    Returns {token bytes: rank}.

    >>> list(train_bpe(["low lower lowest"], 259))[256:]
    [b'lo', b'low', b' low']
    """
    pieces = count_pieces(texts)
    counts = list(pieces.values())
    # From here on a piece is a string with one character for each token: byte 65 and token 65 are
    # chr(65). So a pair is a string of two, and merging it is str.replace.
    pieces = [piece.encode().decode("latin-1") for piece in pieces]
    pair_counts, pieces_with = count_pairs(pieces, counts)
    heap = sorted((-count, pair) for pair, count in pair_counts.items())  # sorted is a heap, too
    tokens = [bytes([byte]) for byte in range(256)]
    while heap and len(tokens) < vocab_size:
        queued, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count < -queued:  # other merges have used some up since: queue it again
            heapq.heappush(heap, (-count, pair))
            continue
        if count < 2:
            break
        new = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        new_counts = collections.Counter()
        for i in pieces_with.pop(pair):
            pieces[i] = pieces[i].replace(pair, new)
            for lost, gained in changed_pairs(pieces[i], pair, new):
                pair_counts[lost] -= counts[i]
                new_counts[gained] += counts[i]
                pieces_with[gained].add(i)
        del pair_counts[pair]
        pair_counts.update(new_counts)
        for gained, count in new_counts.items():
            heapq.heappush(heap, (-count, gained))
    return {token: rank for rank, token in enumerate(tokens)}


def count_pairs(pieces, counts):
    """How often each pair of neighbours occurs, and the pieces (their numbers) that have it.

    A piece stays among the latter also when it has lost the pair, which does no harm.
    """
    pair_counts, pieces_with = collections.Counter(), collections.defaultdict(set)
    for i, piece in enumerate(pieces):
        for pair in map(str.__add__, piece, piece[1:]):
            pair_counts[pair] += counts[i]
            pieces_with[pair].add(i)
    return pair_counts, pieces_with


def changed_pairs(piece, pair, new):
    """Yields (pair before, pair now) for the neighbours of new, which has replaced pair in piece.

    >>> list(changed_pairs("xNNy", "ab", "N"))
    [('xa', 'xN'), ('ba', 'NN'), ('by', 'Ny')]
    """
    left, right = pair
    at = piece.find(new)
    while at >= 0:
        if at:
            before = piece[at - 1]
            yield (right if before == new else before) + left, before + new
        at += 1
        if at < len(piece) and piece[at] != new:
            yield right + piece[at], new + piece[at]
        at = piece.find(new, at)


def bpe_encode(piece, ranks):
    """One piece of text -> token ids: what tiktoken does in Rust, written out.

    >>> bpe_encode(" lower", train_bpe(["low lower lowest"], 259))
    [258, 101, 114]
    """
    return [ranks[token] for token in bpe_split(piece.encode(), ranks)]


def bpe_split(data, ranks):
    """Bytes -> tokens (bytes): joins, again and again, the neighbours that were learned first."""
    tokens = [bytes([byte]) for byte in data]
    while True:
        joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(tokens)]
        earliest = min(joined, default=len(ranks))
        if earliest == len(ranks):
            return tokens
        i = joined.index(earliest)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


def bpe_spec(ranks):
    """The JSON-able description of a BPE of ours, for meta.json and checkpoints.

    Tokens stand in order of rank, a character a byte; the special tokens come after them.
    """
    tokens = [token.decode("latin-1") for token in ranks]
    return {"name": "bpe", "tokens": tokens, "special_tokens": [END_OF_TEXT, *ROLES]}


def build_tokenizer(spec):
    """A spec, {"name": "bpe", "tokens": ...} or {"name": "gpt2"}, -> tiktoken.Encoding.

    Raises ValueError where the spec is neither, or tiktoken has to download it and cannot.
    """
    name = spec.get("name") if isinstance(spec, dict) else None
    if name != "bpe":
        if name not in tiktoken.list_encoding_names():
            known = ", ".join(["bpe", *tiktoken.list_encoding_names()])
            raise ValueError(f"unknown tokenizer {name!r}; there are {known}, or a data folder")
        try:
            return tiktoken.get_encoding(name)
        except OSError as error:
            raise ValueError(
                f"tokenizer {name}: tiktoken cannot download it ({type(error).__name__}); set "
                "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bpe"
            )
    try:
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(spec["tokens"])}
        special = {token: len(ranks) + i for i, token in enumerate(spec["special_tokens"])}
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("not all bytes are tokens")
        if len(ranks) < len(spec["tokens"]) or len(special) < len(spec["special_tokens"]):
            raise ValueError("a token twice")
        if END_OF_TEXT not in special or not all(isinstance(token, str) for token in special):
            raise ValueError(f"no {END_OF_TEXT}, or special tokens that are no text")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"damaged tokenizer ({error!r:.90})") from error
    return tiktoken.Encoding("bpe", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)


ALPACA = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}


def default_template(tokenizer):
    """The template that fits: "roles" where they are tokens, else "alpaca", which is plain text."""
    return "roles" if tokenizer.special_tokens_set.issuperset(ROLES) else "alpaca"


def chat_parts(messages, tokenizer, template):
    """A conversation, [{"role", "content"}, ...], in tokens: [(tokens, is_answer), ...].

    An answer, which <|endoftext|> ends, is encoded on its own, never merged with what comes before,
    since that is how the model will write it.
    """
    parts = []
    for message in messages:
        role, content = message["role"], clean(message["content"])
        is_answer = role == "assistant"
        if template == "roles":
            header = [tokenizer.encode_single_token(f"<|{role}|>")]
        else:
            header = tokenizer.encode_ordinary(ALPACA[role])
            content += "" if is_answer else "\n\n"
        tokens = tokenizer.encode_ordinary(content)
        tokens += [tokenizer.encode_single_token(END_OF_TEXT)] if is_answer else []
        parts += [(header, False), (tokens, is_answer)]
    return parts


def chat_prompt(messages, tokenizer, template):
    """The tokens of a conversation, up to where the assistant's next answer begins."""
    answered = [*messages, {"role": "assistant", "content": ""}]
    return [t for part, _ in chat_parts(answered, tokenizer, template)[:-1] for t in part]


# --- tokenizers in Hugging Face's format ----------------------------------------------------------

# SHA-256 of the tokens of GPT-2, as read_tokenizer joins them
GPT2_DIGEST = "00784030c74dea3434d6e7ea73408a45e82b13c5830e98b7245787c66867d78b"


def byte_characters():
    """The printable character for each byte, as vocab.json spells them: Latin-1's where that is
    visible, else (blanks, controls) the next one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def save_tokenizer(spec, folder, block_size):
    """Writes vocab.json, merges.txt and tokenizer_config.json into folder.

    tiktoken keeps no merges. They are recovered: a token, encoded with only those before it, falls
    into the two that it was merged from. Raises ValueError for tokenizers not of GPT-2's kind.
    """
    tokenizer = build_tokenizer(spec)
    known_ranks = sorted(tokenizer._mergeable_ranks.values())
    if tokenizer._pat_str != SPLIT or known_ranks != list(range(len(known_ranks))):
        raise ValueError(f"tokenizer {tokenizer.name}: not of GPT-2's kind, so there is no export")
    characters, ranks, merges = byte_characters(), {}, ["#version: 0.2"]

    def printable(data):
        return "".join(characters[byte] for byte in data)

    for token, rank in sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            merges.append(" ".join(map(printable, bpe_split(token, ranks))))
        ranks[token] = rank
    special = tokenizer._special_tokens
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "added_tokens_decoder": {
            rank: {"content": name, "special": True, "normalized": False}
            for name, rank in special.items()
        },
    }
    names = {printable(token): rank for token, rank in ranks.items()}
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in [
        ("vocab.json", json.dumps(names | special, ensure_ascii=False)),
        ("merges.txt", "\n".join(merges) + "\n"),
        ("tokenizer_config.json", json.dumps(settings, indent=2)),
    ]:
        replace_text(pathlib.Path(folder, name), text)


def read_tokenizer(folder):
    """The spec of a folder's vocab.json and merges.txt, or tokenizer.json; None if it has neither.

    Raises ValueError where it cuts text in another way than GPT-2's, or its tokens do not stand in
    this order: bytes, merges, special tokens.
    """
    folder = pathlib.Path(folder)
    try:
        if (folder / "vocab.json").exists():
            vocab = parse_json((folder / "vocab.json").read_bytes(), "vocab.json")
            lines = decode((folder / "merges.txt").read_bytes(), "merges.txt").split("\n")
            merges = [line.rstrip("\r").split(" ") for line in lines if line.strip()]
            merges = merges[merges[:1] == [["#version:", "0.2"]] :]
        elif (folder / "tokenizer.json").exists():
            whole = parse_json((folder / "tokenizer.json").read_bytes(), "tokenizer.json")
            before = whole.get("pre_tokenizer") or {"type": None}
            if (before["type"], whole.get("normalizer")) != ("ByteLevel", None):
                raise ValueError("it does not cut text as GPT-2's does")
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
            vocab |= {token["content"]: token["id"] for token in whole["added_tokens"]}
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        else:
            return None
        bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
        names, merged = sorted(vocab, key=vocab.get), ["".join(pair) for pair in merges]
        count = 256 + len(merged)
        in_order = set(names[:256]) == set(bytes_of) and names[256:count] == merged
        if not in_order or [vocab[name] for name in names] != list(range(len(names))):
            raise ValueError("its tokens do not stand in the order bytes, merges, special tokens")
        tokens = [bytes(bytes_of[c] for c in name).decode("latin-1") for name in names[:count]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder}: the tokenizer cannot be read ({error})") from error
    digest = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
    if (digest, names[count:]) == (GPT2_DIGEST, [END_OF_TEXT]):
        return {"name": "gpt2"}
    return {"name": "bpe", "tokens": tokens, "special_tokens": names[count:]}


def tokenizer_of(checkpoint, path):
    """The spec of the tokenizer for a checkpoint that was read from path: the one in it, that of
    the folder in which it lies, or GPT-2's."""
    path = pathlib.Path(path)
    folder = path if path.is_dir() else path.parent
    spec = checkpoint.get("tokenizer")
    if spec is None and path.exists():
        spec = read_tokenizer(folder)
    return {"name": "gpt2"} if spec is None else spec


# --- the data folder ------------------------------------------------------------------------------


class SplitWriter:
    """Writes one split's tokens as NumPy files of SHARD_TOKENS at most, in a stream."""

    def __init__(self, folder, split, dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.stats = {"shards": [], "tokens": 0, "bytes": 0, "documents": 0}
        self.room = 0  # tokens that still go into the last shard

    def write(self, tokens):
        while len(tokens):
            if self.room == 0:
                self.close()
                self.stats["shards"].append(f"{self.split}_{len(self.stats['shards']):05d}.npy")
                self.room = SHARD_TOKENS
                self.write_header("xb")
            part, tokens = tokens[: self.room], tokens[self.room :]
            with open(self.folder / self.stats["shards"][-1], "ab") as file:
                file.write(part.astype(self.dtype).tobytes())
            self.room -= len(part)
            self.stats["tokens"] += len(part)

    def write_header(self, mode):
        """NumPy leaves room in its header for any length, so it can be corrected at the end."""
        header = {"descr": self.dtype.str, "fortran_order": False}
        with open(self.folder / self.stats["shards"][-1], mode) as file:
            shape = (SHARD_TOKENS - self.room,)
            np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})

    def close(self):
        if self.stats["shards"]:
            self.write_header("r+b")


def token_dtype(vocab_size):
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def open_data(folder):
    """meta.json as a dict; each of its splits gets "arrays", the memory-mapped shards.

    Raises FileNotFoundError or ValueError where the folder is not there, not ours or not whole.
    """
    path = pathlib.Path(folder, "meta.json")
    if not path.exists():
        raise FileNotFoundError(
            f"{folder}: no prepared data; prepare_data.py --out={folder} makes it"
        )
    meta = parse_json(path.read_bytes(), path)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path}: not of format {FORMAT}; run prepare_data.py again")
    try:
        dtype = token_dtype(meta["vocab_size"])
        if dtype != meta["dtype"] or len(meta["tokenizer"].get("tokens", ())) > meta["vocab_size"]:
            raise ValueError("vocab_size, dtype and tokenizer disagree")
        for split in (meta["splits"]["train"], meta["splits"]["val"]):
            shards = [np.load(path.with_name(name), mmap_mode="r") for name in split["shards"]]
            if any(shard.dtype != dtype or shard.ndim != 1 for shard in shards):
                raise ValueError(f"the shards are not 1-D {dtype}")
            if sum(map(len, shards)) != split["tokens"] or not split["bytes"] > 0:
                raise ValueError("the shards do not hold the tokens that are listed")
            split["arrays"] = shards
        if not isinstance(meta["digest"], str):
            raise TypeError("digest is not text")
    except Exception as error:  # a bad header in a shard can raise almost anything
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder}: damaged ({reason}); run prepare_data.py again") from error
    return meta


OUR_FILES = r"meta\.json|(train|val)_\d{5}\.npy|(classify|instruct|preference)\.jsonl"


def check_replaceable(out):
    """Raises ValueError where out is a file, or a folder with files that are not ours. Hidden ones
    and folders may lie in it: they stay."""
    if out.is_file():
        raise ValueError(f"--out={out}: a file of that name is there; name another folder")
    files = [entry.name for entry in out.glob("[!.]*") if entry.is_file()]
    foreign = [name for name in files if not re.fullmatch(OUR_FILES, name)]
    ours = "meta.json" in files and b'"splits"' in (out / "meta.json").read_bytes()
    if foreign or (files and not ours):
        name = (foreign or files)[0]
        raise ValueError(f"--out={out}: {name} in it is not ours, so it stays; name another folder")


def install(partial, out):
    """Puts a finished folder in the place of out. A kill at any moment leaves the old one or the
    new one whole: finish_install, which every run begins with, ends what was begun."""
    if out.exists():
        out.rename(out.with_name(f".{out.name}.old"))
    partial.rename(out)
    finish_install(out)


def finish_install(out):
    """Brings back the old folder where there is no new one; else removes it, but for what is not
    ours."""
    old = out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        old.rename(out)
    elif old.exists():
        for entry in old.iterdir():
            if entry.is_dir() or entry.name.startswith("."):
                entry.rename(out / entry.name)
        shutil.rmtree(old)


# --- shared by the scripts: flags, errors, progress -----------------------------------------------


def replace_text(path, text):
    """Writes a file all or nothing, as everything is written here: under another name at first."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that shows a script's docstring as it is and names the flag nearest to a typo."""

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_intermixed_args(argv, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            self.error(f"unknown {flag}" + (f", did you mean {near[0]}?" if near else ""))
        return args

    def error(self, message):
        raise ValueError(message)


def count(text):
    """An argparse type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def script(main):
    """Decorates a script's main: bad input ends it in one line on standard error and exit code 2.

    Bad input is a ValueError or OSError, whose text says what is wrong and what to do about it.
    """

    @functools.wraps(main)
    def run(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a notebook's streams lack it
                stream.reconfigure(errors="replace")  # so that no character ends a script
        try:
            main(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output has left, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141)
        except KeyboardInterrupt:
            raise SystemExit(130)
        except (ValueError, OSError) as error:
            message = str(error)
            if isinstance(error, OSError) and error.strerror:
                message = ": ".join(filter(None, (error.filename, error.strerror)))
            print(f"{pathlib.Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
            raise SystemExit(2)

    return run


@contextlib.contextmanager
def sole_owner(folder):
    """Makes the folder, and keeps a second run from writing there at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: no guard, and no open file, which would keep folder in its place
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is writing there")
        yield


class Progress:
    """How far a long job is, on standard error: a line that updates, or one now and then."""

    def __init__(self, label, total):
        self.label, self.total = label, total  # total in bytes; 0 where nobody knows
        self.live = sys.stderr.isatty()
        self.start = self.shown = time.monotonic()

    def update(self, done):
        now = time.monotonic()
        if now - self.shown > (0.2 if self.live else 10):
            self.shown, rate = now, done / (now - self.start)
            left = max(0, self.total - done) / rate
            line = f"{self.label}: {done / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
            line += f", {left:.0f} s left" if self.total else ""
            start, end = ("\r\x1b[K", "") if self.live else ("", "\n")
            print(start + line, end=end, file=sys.stderr, flush=True)

    def done(self):
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# --- the whole way --------------------------------------------------------------------------------


def gather(args, spool):
    """Writes all documents, cleaned, to the file spool, a NUL byte after each.

    Returns 64 bits for each document, which stand for its text, and how many were too short.
    """
    files = find_files(args.inputs)
    progress = Progress("reading", sum(path.stat().st_size for path in files))
    digests, too_short = array.array("Q"), 0
    with open(spool, "wb") as file:
        for _, text in read_documents(files, args.text_field, args.separator):
            text = clean(text)
            if len(text) < args.min_chars:
                too_short += 1
                continue
            data = text.encode()
            digests.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))
            file.write(data + b"\0")  # clean() leaves no NUL in a text
            progress.update(file.tell())
    progress.done()
    if not digests:
        raise ValueError(f"no text in {', '.join(args.inputs)}")
    return np.frombuffer(digests, np.uint64), too_short


def mark_first(digests):
    """Which of the digests are the first of their value: an array of bool.

    Only those with the same low byte are compared at a time, in 256 rounds: to sort all at once
    would take five times their memory.
    """
    is_first, one_byte = np.zeros(len(digests), bool), digests.view(np.uint8)[::8]
    for byte in range(256):
        some = np.flatnonzero(one_byte == byte)
        is_first[some[np.unique(digests[some], return_index=True)[1]]] = True
    return is_first


def distinct_texts(spool, digests, is_first, label):
    """Yields (digest, text) of the gathered documents that are the first with their text."""
    progress = Progress(label, spool.stat().st_size)
    # zip leaves off the empty text after the last NUL
    for digest, first, (offset, data) in zip(digests, is_first, split_file(spool, "\0")):
        if first:
            yield int(digest), data.decode()
        progress.update(offset + len(data))
    progress.done()


def spread_sample(texts, fraction):
    """Yields about this fraction of the text, in parts taken evenly from beginning to end."""
    seen = taken = 0
    for part in itertools.chain.from_iterable(map(cut, texts)):
        if taken <= seen * fraction:
            taken += len(part)
            yield part
        seen += len(part)


def given_tokenizer(args):
    """The spec of the tokenizer that --tokenizer names, or None where one is to be trained."""
    if args.tokenizer == "bpe":
        return None
    if args.vocab_size:
        raise ValueError(f"--vocab_size is for --tokenizer=bpe; {args.tokenizer} has its own")
    spec = {"name": args.tokenizer}
    is_name = args.tokenizer in tiktoken.list_encoding_names()
    if not is_name and pathlib.Path(args.tokenizer).is_dir():
        spec = read_tokenizer(args.tokenizer) or open_data(args.tokenizer)["tokenizer"]
    build_tokenizer(spec)  # complains before the long work, not after it
    return spec


def trained_tokenizer(args, texts, fraction):
    """The spec of a BPE trained on that fraction of the texts."""
    vocab_size = args.vocab_size or 1024
    ranks = train_bpe(spread_sample(texts, fraction), vocab_size)
    if len(ranks) < vocab_size:
        if args.vocab_size:
            raise ValueError(f"--vocab_size={vocab_size}: this text gives only {len(ranks)} tokens")
        print(f"vocab_size is {len(ranks)}: this text gives no more tokens")
    return bpe_spec(ranks)


def split_texts(texts, by_document):
    """Turns (digest, text) into (split, text). A tenth of the documents is held out, by their
    digests, so whatever their order and neighbours; or, where there are few, a tenth of each."""
    for digest, text in texts:
        if by_document:
            yield ("val" if digest % 10 == 0 else "train"), text
        else:
            tenth = len(text) * 9 // 10
            border = max(text.rfind(" ", 0, tenth), text.rfind("\n", 0, tenth)) + 1 or tenth
            yield "train", text[:border]
            yield "val", text[border:]


def encode_texts(texts, tokenizer, folder, threads):
    """Writes (split, text) to shards in folder, <|endoftext|> after each; returns their stats."""
    end = tokenizer.encode_single_token(END_OF_TEXT)
    dtype = token_dtype(tokenizer.n_vocab)
    writers = {split: SplitWriter(folder, split, dtype) for split in ("train", "val")}

    def parts():
        for split, text in texts:
            parts_of_text = list(cut(text))
            for number, part in enumerate(parts_of_text, 1):
                yield split, part, number == len(parts_of_text)

    def encode(item):
        _, part, is_last = item
        tokens = tokenizer.encode_to_numpy(part, disallowed_special=())
        return np.append(tokens, end) if is_last else tokens

    todo = parts()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        while batch := list(itertools.islice(todo, 512)):
            encoded = list(pool.map(encode, batch))
            for split, writer in writers.items():
                mine = [i for i, item in enumerate(batch) if item[0] == split]
                if mine:
                    writer.write(np.concatenate([encoded[i] for i in mine]))
                writer.stats["bytes"] += sum(len(batch[i][1].encode()) for i in mine)
                writer.stats["documents"] += sum(batch[i][2] for i in mine)
    for writer in writers.values():
        writer.close()
        if not writer.stats["bytes"]:
            raise ValueError("too little text to hold out a tenth of it")
    return {split: writer.stats for split, writer in writers.items()}


def prepare(args, spec, folder):
    """Makes the data folder, complete but for its final name. Returns meta and tokenizer."""
    spool = folder / "text"
    digests, too_short = gather(args, spool)
    is_first = mark_first(digests)
    if spec is None:
        texts = distinct_texts(spool, digests, is_first, "learning tokens")
        fraction = min(1, args.bpe_sample_mb * 1e6 / spool.stat().st_size)
        spec = trained_tokenizer(args, (text for _, text in texts), fraction)
    tokenizer = build_tokenizer(spec)
    texts = distinct_texts(spool, digests, is_first, "encoding")
    texts = split_texts(texts, by_document=is_first.sum() >= FEW_DOCUMENTS)
    meta = {
        "format": FORMAT,
        "tokenizer": spec,
        "vocab_size": tokenizer.n_vocab,
        "eot_token": tokenizer.encode_single_token(END_OF_TEXT),
        "dtype": token_dtype(tokenizer.n_vocab).name,
        "splits": encode_texts(texts, tokenizer, folder, args.threads),
        "sources": args.inputs or [f"the manual of Python {platform.python_version()}"],
        "digest": hashlib.sha256(digests).hexdigest(),  # of all the text
    }
    spool.unlink()
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if not args.inputs:
        for task, examples in manual_examples().items():
            lines = "".join(json.dumps(example) + "\n" for example in examples)
            (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")
    print(f"dropped {(~is_first).sum():,} duplicates and {too_short:,} short documents")
    return meta, tokenizer


def report(meta, tokenizer, folder):
    """Shows what was made, in numbers, and a look at it."""
    print(f"{'':8}{'documents':>12}{'bytes':>15}{'tokens':>15}{'bytes/token':>13}")
    for split, s in meta["splits"].items():
        print(f"{split:8}{s['documents']:12,}{s['bytes']:15,}{s['tokens']:15,}", end="")
        print(f"{s['bytes'] / s['tokens']:13.2f}")
    start = open_data(folder)["splits"]["train"]["arrays"][0][:60].tolist()
    tokens = "|".join(tokenizer.decode([token]) for token in start)
    print("The first tokens:", tokens.replace("\n", "\\n"))


@script
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", help="files, folders, URLs; none: the manual that Python comes with")
    add("--out", default="data", help="folder to write")
    add("--tokenizer", default="bpe", help="bpe: trained here; a tiktoken name; a folder with one")
    add("--vocab_size", type=count, help="bytes and merges of the trained BPE (default: 1024)")
    add("--bpe_sample_mb", type=count, default=40, help="text that the BPE is trained on, MB")
    add("--text_field", default="text", help="where a JSON object has its text")
    add("--separator", help="what divides the documents in a text file, e.g. '<|endoftext|>'")
    add("--min_chars", type=count, default=1, help="shorter documents are dropped")
    add("--threads", type=count, default=os.cpu_count(), help="for encoding")
    args = parser.parse_args(argv)
    if args.vocab_size and args.vocab_size < 256:
        raise ValueError(f"--vocab_size={args.vocab_size}: 256 at least, one for every byte")
    out = pathlib.Path(args.out).resolve()
    if any(out.is_relative_to(pathlib.Path(name).resolve()) for name in args.inputs):
        raise ValueError(f"--out={args.out} lies in one of the inputs; name another folder")
    partial = out.with_name(f".{out.name}.partial")
    with sole_owner(partial):
        try:
            for leftover in partial.glob("[!.]*"):  # of a run that was killed
                leftover.unlink()
            finish_install(out)
            check_replaceable(out)
            spec = given_tokenizer(args)
            if not args.inputs:
                print("reading the manual of Python", platform.python_version())
            meta, tokenizer = prepare(args, spec, partial)
            (partial / ".lock").unlink(missing_ok=True)
            install(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    report(meta, tokenizer, out)


if __name__ == "__main__":
    main()
