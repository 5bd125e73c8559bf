"""Turns text into tokens: reads text, trains a byte-pair encoding on it and writes token shards.

    python prepare_data.py                                 # Python's manual, into data/
    python prepare_data.py book.txt --out=data/book        # your text
    python prepare_data.py notes/ more.jsonl page.html https://example.org/book.txt --out=data/mine
    python prepare_data.py stories.txt --separator='\\n\\n\\n' --vocab_size=4096
    python prepare_data.py book.txt --tokenizer=gpt2       # GPT-2's vocabulary, from tiktoken
    python prepare_data.py spam.tsv --out=data/spam --held_out=0.2   # examples for finetune.py

Text is read a document at a time (a table, whole): once to train the BPE, once to encode. train.py
reads the result, which is described by meta.json.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import heapq
import html
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import pydoc_data.topics
import re
import shutil
import sys
import traceback
import unicodedata
import urllib.request
from dataclasses import dataclass

import numpy as np
import regex  # knows \p{L}, which re does not
import tiktoken

END_OF_TEXT = "<|endoftext|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]  # for chat; unused before fine-tuning
SHARD_TOKENS = 50_000_000  # per shard, approximately
TABLES = (".jsonl", ".json", ".csv", ".tsv")
SHARD_NAME = re.compile(r"(train|val)_\d{5}\.npy")
HELD_OUT = 0.1  # the share held out for val; finetune.py holds out as much again for the test


@dataclass
class PrepareConfig:
    out: str = "data"  # folder to write to
    tokenizer: str = "bpe"  # bpe (train one), a folder that holds one, or a tiktoken name like gpt2
    vocab_size: int = 1024  # size of the trained vocabulary; 4 special tokens come on top
    bpe_sample_mb: int = 10  # train the vocabulary on about this many MB of the text
    text_field: str = "text"  # column, or JSON field, with the text
    separator: str = END_OF_TEXT  # what separates documents in a text file
    held_out: float = 0.0  # share held out for validation (0: 0.1, or 0.2 of the manual)


# --- documents ------------------------------------------------------------------------------------


def refuse(reason):
    raise ValueError(reason)


def read_documents(inputs, text_field="text", separator=END_OF_TEXT, skip=refuse):
    """Yields (group, text) for every document in files, folders and URLs or, without inputs, in
    Python's manual.

    A text file is one document, or several with separator between them; HTML is stripped of markup.
    Each row of a table, or object of a JSON file, is one, with its text in text_field. Documents of
    a group are held out together: the manual's by module, rows by the column group or else by their
    text. Other documents have the group "". Raises ValueError if an input does not exist; calls
    skip(reason) for each document that cannot be read.
    """
    if not inputs:
        yield from python_manual()
    for path in find_files(inputs, skip):
        kind = path.suffix.lower()
        is_table = kind in TABLES
        try:
            if is_table:
                parts = read_rows(path, ("label", text_field), skip)
            else:
                parts = split_file(path, separator.encode())
            for where, part in parts:
                try:
                    if is_table:
                        text = text_of(part, text_field)
                        yield group_of(part, text), text
                    else:
                        text = decode(part)
                        is_page = kind in (".html", ".htm") or PAGE.match(text)
                        yield "", html_to_text(text) if is_page else text
                except ValueError as error:  # html.unescape raises it, too
                    skip(f"{where}: {error}")
        except (OSError, ValueError) as error:
            skip(str(error))


def decode(data):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "if it is text in another encoding: iconv -f OLD_ENCODING -t utf-8"
        raise ValueError(f"{error}; {hint}") from error


def find_files(inputs, skip=refuse):
    """Expands inputs into a list of paths: downloads URLs; in folders, skips hidden files and what
    belongs to web pages."""
    files = []
    for name in map(str, inputs):
        path = download(name) if re.match("https?://", name) else name
        if os.path.isdir(path):
            for folder, inside, names in os.walk(path, onerror=lambda error: skip(str(error))):
                inside[:] = sorted(name for name in inside if name[0] != ".")
                visible = (pathlib.Path(folder, name) for name in sorted(names) if name[0] != ".")
                for file in filter(pathlib.Path.is_file, visible):  # no pipe, no broken link
                    if file.suffix.lower() in (".css", ".js", ".svg"):
                        skip(f"{file}: part of a web page; to read it, pass the file itself")
                    else:
                        files.append(file)
        elif os.path.isfile(path):
            files.append(pathlib.Path(path))
        else:
            raise ValueError(f"{path or 'an empty name'}: no such file or folder")
    return files


def download(url):
    """Downloads a URL into downloads/, unless it is already there; returns the path."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = pathlib.Path("downloads", f"{digest}_{url.partition('?')[0].rpartition('/')[2]}")
    if path.exists():
        print(f"using {path}; delete it to download {url} again")
        return path
    print(f"downloading {url} to {path}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            write_file(path, response.read())  # raises IncompleteRead if the connection drops
    except Exception as error:
        raise ValueError(f"{url}: cannot be downloaded ({error})") from error
    return path


def read_json(path, skip=refuse):
    """Yields (where, item): each line of JSON Lines, or each item of the list in a .json file."""
    if path.suffix.lower() == ".json":
        data = path.read_bytes()
        # objects on lines of their own, without commas, are JSON Lines, despite the name
        if not re.search(rb"}[ \t\r]*\n\s*{", data):
            with damaged(path):
                whole = json.loads(data)
            items = whole if isinstance(whole, list) else [whole]
            yield from ((f"{path}, item {n}", item) for n, item in enumerate(items, 1))
            return
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield f"{path}, line {n}", json.loads(line)
            except (ValueError, RecursionError) as error:
                skip(f"{path}, line {n}: broken JSON: {error}")


def read_rows(path, columns=(), skip=refuse):
    """Yields (where, row) of a .jsonl, .json, .csv or .tsv file; a row is {column: value}. A .tsv
    file has no header if its first line has as many columns as these but none of their names.
    Calls skip(reason) for each row that cannot be read."""
    path = pathlib.Path(path)
    kind = path.suffix.lower()
    if kind not in TABLES:
        raise ValueError(f"{path}: give a {', '.join(TABLES[:-1])} or {TABLES[-1]} file")
    if kind in (".jsonl", ".json"):
        for where, row in read_json(path, skip):
            if isinstance(row, dict):
                yield where, row
            else:
                skip(f"{where}: a {type(row).__name__}, not an object with columns")
        return
    with damaged(path):
        text = decode(path.read_bytes())
        delimiter = "\t" if kind == ".tsv" else max(",;", key=text.partition("\n")[0].count)
        quoting = csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL
        csv.field_size_limit(2**31 - 1)  # a text may be longer than the default of 131,072
        file = io.StringIO(text, newline=None)
        lines = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        rows = [(f"{path}, line {lines.line_num}", values) for values in lines if values]
    names = [name.strip().lower() for name in rows[0][1]] if rows else []
    if {column.lower() for column in columns}.isdisjoint(names):
        if kind == ".tsv" and len(names) == len(columns):
            names, rows = columns, [("", []), *rows]
        elif columns and names:
            found = ", ".join(name[:40] for name in names)
            raise ValueError(f"{path}: no column {' or '.join(columns)} in {found}; no header?")
    for where, values in rows[1:]:
        if len(values) == len(names):
            yield where, dict(zip(names, values))
        else:
            skip(f"{where}: {len(values)} values, but {len(names)} columns")


def text_of(row, *names):
    """The text in the first of these columns that the row has, cleaned."""
    for name in names:
        value = row.get(name, row.get(name.lower()))
        if value is not None:
            if not isinstance(value, (str, int, float)) or not (text := clean(str(value))):
                raise ValueError(f"{name} must be text and not empty")
            return text
    found = ", ".join(str(name)[:40] for name in row)
    raise ValueError(f"no text in column {' or '.join(names)} (columns: {found})")


def group_of(row, text):
    """The key whose hash decides the split of a row with this text."""
    group = row.get("group")
    return text if group in (None, "") else clean(str(group))


def split_file(path, separator, block_size=1 << 20):
    """Yields (where, bytes) of each part between separators, reading a block at a time."""
    buffer, offset = b"", 0
    with open(path, "rb") as file:
        # each read is as long as the buffer, so that a huge document takes linear time
        while block := file.read(max(block_size, len(buffer))):
            *parts, buffer = (buffer + block).split(separator)
            for part in parts:
                yield f"{path}, document at byte {offset}", part
                offset += len(part) + len(separator)
    yield f"{path}, document at byte {offset}", buffer


PAGE = re.compile(r"(?i)[\s\ufeff]*(<!doctype html|<html)")
# An unclosed element extends to the end of the page, so that any page takes linear time.
UNSEEN = re.compile(
    r"(?is)<!--.*?(-->|\Z)|"
    r"<(script|style|title|template|noscript|svg|iframe)(?=[\s>])(?![^<>]*/>).*?(</\2\s*>|\Z)"
)
PRE = re.compile(r"(?is)(<pre(?=[\s>]).*?(?:</pre\s*>|\Z))")
ATTRIBUTES = r"""(?:[^>=]+|=\s*"[^"]*"?|=\s*'[^']*'?|=)*(?:>|\Z)"""  # a quoted value may hold a >
BLOCK = re.compile(
    r"(?i)<(?:/?(?:h[1-6r]|[dou]l|p|pre|div|table|t(?:head|body|foot)|form|fieldset|main|nav|aside|"
    r"address|blockquote|figure|figcaption|section|article|header|footer|details)|"
    r"br|dd|dt|li|option|td|th|tr)(?=[\s/>])" + ATTRIBUTES
)
TAG = re.compile(r"(?i)<[a-z/!?]" + ATTRIBUTES)


def html_to_text(page):
    """The visible text of a page: one line per block, and <pre> text as it is.

    >>> clean(html_to_text("<h1>Tom &amp; Ann</h1><script>x</script><p>They <b>met</b>.</p>"))
    'Tom & Ann\\n\\nThey met.'
    """
    texts = []
    for part in PRE.split(UNSEEN.sub("", page)):
        is_pre = PRE.match(part)
        part = BLOCK.sub("\n", part if is_pre else part.replace("\n", " "))
        text = html.unescape(TAG.sub("", part))
        if not is_pre:
            text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
        texts.append(text)
    return "".join(texts)


def clean(text):
    """Normalizes text to NFC and line endings to \\n. Removes control characters, byte-order marks,
    lone surrogates, spaces at line ends, repeated blank lines, and blank lines at both ends.

    >>> clean("\\ufeffone \\r\\n\\r\\n\\r\\n\\r\\ntwo\\x00\\n")
    'one\\n\\ntwo'
    """
    # control characters, but not the tab and what splitlines() takes for the end of a line
    text = re.sub(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff]", "", text)
    if not text.isascii():
        # at most 30 marks on a letter, as in Unicode's UAX #15: to sort n of them takes n**2 steps
        text = unicodedata.normalize("NFC", regex.sub(r"(\p{M}{30})\p{M}+", r"\1", text))
    text = "\n".join([line.rstrip(" \t") for line in text.splitlines()])
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip("\n")


# --- the default corpus: Python's manual, which is part of every installation ---------------------


def python_manual():
    """Yields (group, text): pydoc's topics, and a page for each module of the standard library."""
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topic {name}", text
    for module, entries in itertools.groupby(library_docstrings(), key=lambda entry: entry[0]):
        yield module, "\n\n".join(f"# {title}\n\n{text}" for _, title, text in entries)


@functools.cache
def library_docstrings():
    """[(module, signature, docstring)] of the standard library, read with ast, never imported."""
    library, skipped = pathlib.Path(os.__file__).parent, {"test", "tests", "idlelib", "lib2to3"}
    entries = []

    def visit(node, module, name):
        if text := ast.get_docstring(node):  # "" if it has only spaces
            arguments = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            entries.append((module, name + arguments, text))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, module, f"{name}.{child.name}")

    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if skipped.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            module = ".".join(part for part in parts if part != "__init__")
            visit(ast.parse(path.read_bytes()), module, module)
    return entries


# --- train and val --------------------------------------------------------------------------------


def hash_fraction(key):
    """A hash of a text, as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def split_documents(files, config, skip, dropped):
    """Yields (split, text) of each distinct document, cleaned; dropped counts the others. A hash of
    its group or text decides the split, as in finetune.py, so that held_out = 0.2 puts the examples
    that finetune.py validates and tests on into val. A document without a group that is longer than
    1/200 of the input is divided: its end goes to val."""
    held_out = config.held_out or (HELD_OUT if files else 2 * HELD_OUT)
    large = max(1 / held_out, sum(path.stat().st_size for path in files) / 200)
    separator = config.separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
    seen = set()  # the hashes of all documents so far, 83 bytes each
    for group, text in read_documents(files, config.text_field, separator or END_OF_TEXT, skip):
        text = clean(text)
        key = hash_fraction(text)
        if not text or key in seen:
            dropped["duplicate" if text else "empty"] += 1
            continue
        seen.add(key)
        if not group and len(text) > large:
            end = round(len(text) * (1 - held_out))
            # cut after a space or newline nearby, so that no word is split; Chinese has none
            near = max(0, end - 100)
            end = max(text.rfind(" ", near, end), text.rfind("\n", near, end)) + 1 or end
            yield "train", text[:end]
            yield "val", text[end:]
        else:
            is_val = (hash_fraction(group) if group else key) < held_out
            yield "val" if is_val else "train", text


# --- byte-pair encoding ---------------------------------------------------------------------------

# GPT-2's rule for cutting text into pieces: endings like 's; words, numbers and punctuation, each
# with the space before it; whitespace. No token crosses a border. (++ is a + without backtracking.)
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
WORD_END = regex.compile(r"(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}])")


def cut(text, length=1 << 16):
    """Yields a text in parts that end at the end of a word or number, which also ends a piece; or
    anywhere, if none ends for as long again, since tiktoken fails at a million spaces in a row."""
    start = 0
    while start < len(text):
        border = WORD_END.search(text, start + length, start + 2 * length)
        end = border.start() if border else start + 2 * length
        yield text[start:end]
        start = end


def count_pieces(texts):
    """The distinct pieces of the texts, and how often each occurs. A piece is represented as a
    string with one character per token, at first per byte, so that str.split and str.join can merge
    a pair."""
    # Counting words first is faster: few are distinct, and splitting each alone gives the same
    # pieces, since no piece continues into the space after a word.
    words, pieces = collections.Counter(), collections.Counter()
    for part in itertools.chain.from_iterable(map(cut, texts)):
        words.update(re.findall(r"\s*\S+|\s+", part))
    split = regex.compile(SPLIT).findall
    for word, count in words.items():
        for piece in split(word):
            pieces[piece] += count
    return [piece.encode().decode("latin-1") for piece in pieces], list(pieces.values())


def train_bpe(texts, vocab_size):
    """Learns a byte-pair encoding (Sennrich et al. 2016; on bytes, as in Radford et al. 2019).

    Merges the most frequent pair of adjacent tokens, at first bytes (in a tie, the smaller ids),
    until there are vocab_size tokens or no pair occurs twice. Returns {token bytes: rank}.

    >>> list(train_bpe(["low lower lowest"], 259))[256:]
    [b'lo', b'low', b' low']
    """
    pieces, counts = count_pieces(texts)
    pair_counts, pieces_with = collections.defaultdict(int), collections.defaultdict(list)
    for i, (piece, count) in enumerate(zip(pieces, counts)):
        for left, right in itertools.pairwise(piece):
            pair_counts[left + right] += count
            pieces_with[left + right].append(i)
    heap = sorted((-count, pair) for pair, count in pair_counts.items())  # a valid heap
    tokens = [bytes([byte]) for byte in range(256)]
    while heap and heap[0][0] < -1 and len(tokens) < vocab_size:  # some pair may occur twice
        minus_count, pair = heapq.heappop(heap)
        if pair_counts[pair] < -minus_count:  # earlier merges used some occurrences: queue it again
            heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        left, right = pair
        new = chr(len(tokens))  # N below: x N y replaces x left right y
        tokens.append(tokens[ord(left)] + tokens[ord(right)])
        new_pairs = collections.defaultdict(list)  # like pieces_with
        for i in [i for i in dict.fromkeys(pieces_with.pop(pair)) if pair in pieces[i]]:
            parts, count = pieces[i].split(pair), counts[i]
            pieces[i] = new.join(parts)
            changes = [(part[-1] + left, part[-1] + new) for part in parts[:-1] if part]  # xN
            changes += [(right + part[0], new + part[0]) for part in parts[1:] if part]  # Ny
            changes += [(right + left, new + new) for part in parts[1:-1] if not part]  # NN
            for lost, gained in changes:
                pair_counts[lost] -= count
                pair_counts[gained] += count
                new_pairs[gained].append(i)
        pieces_with |= new_pairs
        for gained in new_pairs:
            heapq.heappush(heap, (-pair_counts[gained], gained))
    return {token: rank for rank, token in enumerate(tokens)}


def bpe_encode(data, ranks):
    """A piece of text, as bytes -> its tokens, as bytes: what tiktoken does in Rust, written out.
    Keeps joining the two neighbors whose token was learned first.

    >>> bpe_encode(b" lower", train_bpe(["low lower lowest"], 259))
    [b' low', b'e', b'r']
    """
    tokens = [bytes([byte]) for byte in data]
    while pairs := [a + b for a, b in itertools.pairwise(tokens)]:
        earliest = min(pairs, key=lambda pair: ranks.get(pair, math.inf))
        if earliest not in ranks:
            break
        i = pairs.index(earliest)
        tokens[i : i + 2] = [earliest]
    return tokens


def bpe_spec(ranks):
    """A BPE as meta.json and checkpoints store it: its tokens by rank, one character per byte."""
    tokens = [token.decode("latin-1") for token in ranks]
    return {"name": "bpe", "tokens": tokens, "special_tokens": [END_OF_TEXT, *ROLES]}


def build_tokenizer(spec):
    """A spec, {"name": "bpe", "tokens": ...} or {"name": "gpt2"}, -> tiktoken.Encoding."""
    with damaged("tokenizer"):
        name = spec["name"]
        if name == "bpe":
            ranks = {token.encode("latin-1"): rank for rank, token in enumerate(spec["tokens"])}
            special = {token: len(ranks) + i for i, token in enumerate(spec["special_tokens"])}
            if not all(bytes([byte]) in ranks for byte in range(256)) or END_OF_TEXT not in special:
                raise ValueError(f"a byte or {END_OF_TEXT} is missing")
            how = {"pat_str": SPLIT, "mergeable_ranks": ranks, "special_tokens": special}
            return tiktoken.Encoding(name, **how)
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"unknown tokenizer {name!r}: bpe, {', '.join(names)}, or a folder")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        hint = "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bpe"
        raise ValueError(f"tokenizer {name}: tiktoken cannot download it; {hint}") from error


def token_bytes(tokenizer, token):
    """The bytes of a token id; empty for ids that the vocabulary does not use."""
    with contextlib.suppress(KeyError):
        return tokenizer.decode_single_token_bytes(token)
    return b""


def token_label(tokenizer, token):
    """A token in readable form: control characters and parts of characters are escaped."""
    text = token_bytes(tokenizer, token).decode(errors="surrogateescape")
    return repr(text)[1:-1].replace("\\udc", "\\x")  # byte e6 is the surrogate dce6 in text


# --- chat templates -------------------------------------------------------------------------------

ALPACA = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
ALPACA_PREAMBLE = (  # Taori et al. 2023
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_INPUT = ", paired with an input that provides further context"


def default_template(tokenizer):
    """The template "roles" if the vocabulary has its tokens, otherwise the plain-text "alpaca"."""
    return "roles" if tokenizer.special_tokens_set.issuperset(ROLES) else "alpaca"


def chat_parts(messages, tokenizer, template):
    """A conversation, [{"role", "content"}, ...], as [(tokens, is_answer), ...]. An answer ends
    with <|endoftext|> and is encoded separately from the text before it, as the model writes it."""
    parts = []
    for message in messages:
        role, content = message["role"], clean(message["content"])
        is_answer = role == "assistant"
        header = ALPACA[role] if template == "alpaca" else f"<|{role}|>"
        if template == "alpaca" and role == "user" and not parts:  # the conversation starts here
            more = ALPACA_INPUT if "### Input:\n" in content else ""
            header = ALPACA_PREAMBLE.format(more) + header
        if template == "alpaca" and not is_answer:
            content += "\n\n"
        header = tokenizer.encode(header, allowed_special="all")
        end = [tokenizer.eot_token] if is_answer else []
        parts += [(header, False), (tokenizer.encode_ordinary(content) + end, is_answer)]
    return parts


def chat_prompt(messages, tokenizer, template):
    """The tokens of a conversation, up to where the assistant's next answer begins."""
    answered = [*messages, {"role": "assistant", "content": ""}]
    return [t for part, _ in chat_parts(answered, tokenizer, template)[:-1] for t in part]


# --- tokenizers in Hugging Face's format ----------------------------------------------------------

# GPT-2's files spell each byte as a visible character: Latin-1's, or if that is a space or a
# control character, the next unused one from 256 on.
OTHER = map(chr, itertools.count(256))
VISIBLE = "".join(c if c.isprintable() and c != " " else next(OTHER) for c in map(chr, range(256)))


def save_tokenizer(spec, folder):
    """Writes tokenizer.json. Its merges are recovered: a token, encoded with only the tokens before
    it, splits into the two that it was merged from."""
    tokenizer = build_tokenizer(spec)
    ranks, special = tokenizer._mergeable_ranks, tokenizer._special_tokens
    if tokenizer._pat_str != SPLIT or len(ranks) + len(special) != tokenizer.n_vocab:
        raise ValueError(f"tokenizer {tokenizer.name}: not GPT-2 style, so it cannot be exported")
    earlier, vocab, merges = {}, {}, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [part.decode("latin-1").translate(VISIBLE) for part in bpe_encode(token, earlier)]
        earlier[token] = vocab["".join(parts)] = rank
        if len(parts) > 1:
            merges.append(parts)
    how = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    added = [{"id": i, "content": name, "special": True, **how} for name, i in special.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab | special, "merges": merges},
    }
    write_file(f"{folder}/tokenizer.json", json.dumps(whole, ensure_ascii=False).encode())


def read_tokenizer(folder):
    """The spec of a folder's tokenizer.json; None if it has none."""
    path = pathlib.Path(folder, "tokenizer.json")
    if not path.exists():
        return None
    with damaged(path):
        whole = json.loads(path.read_bytes())
        split = {"use_regex": True, "add_prefix_space": True, **(whole["pre_tokenizer"] or {})}
        how = (split.get("type"), split["use_regex"], split["add_prefix_space"])
        if how != ("ByteLevel", True, False) or whole.get("normalizer"):
            raise ValueError("its pre-tokenizer or normalizer is not GPT-2's")
        vocab = whole["model"]["vocab"] | {t["content"]: t["id"] for t in whole["added_tokens"]}
        merges = ["".join(pair).replace(" ", "") for pair in whole["model"]["merges"]]
        names, count = sorted(vocab, key=vocab.get), 256 + len(merges)
        if names[256:count] != merges or sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("its tokens are not in the order bytes, merges, special tokens")
        tokens = [bytes(map(VISIBLE.index, name)).decode("latin-1") for name in names[:count]]
    return {"name": "bpe", "tokens": tokens, "special_tokens": names[count:]}


def tokenizer_of(checkpoint, path):
    """The spec of a checkpoint's tokenizer: the one in it, or in its folder, or else GPT-2's."""
    if "config" not in checkpoint:  # finetune.py's last.pt
        raise ValueError(f"{path} is for --init_from=resume only: use the best.pt beside it")
    path = pathlib.Path(path)
    folder = path if path.is_dir() else path.parent
    # gpt2 is a name, whose parent would be the current folder
    spec = checkpoint.get("tokenizer") or (path.exists() and read_tokenizer(folder))
    return spec or {"name": "gpt2"}


def load_tokenizer(checkpoint, path):
    """Returns the spec of a checkpoint's tokenizer, and the tokenizer."""
    spec = tokenizer_of(checkpoint, path)
    tokenizer = build_tokenizer(spec)
    with damaged(path):
        if tokenizer.n_vocab > checkpoint["config"]["vocab_size"]:
            raise ValueError(f"{tokenizer.n_vocab} tokens in its tokenizer, fewer in its model")
    return spec, tokenizer


# --- the data folder ------------------------------------------------------------------------------


def encode_all(documents, tokenizer):
    """Yields (split, part, future, is_last) for each part of each document, in order; the future
    has its tokens. Meanwhile threads encode the next parts, as tiktoken releases Python's lock."""
    encode = functools.partial(tokenizer.encode_to_numpy, disallowed_special=())
    queue = collections.deque()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for split, text in documents:
            *parts, last = cut(text)
            queue += ((split, part, pool.submit(encode, part), False) for part in parts)
            queue.append((split, last, pool.submit(encode, last), True))
            while len(queue) > 256:
                yield queue.popleft()
        yield from queue


def write_shards(documents, tokenizer, folder):
    """Encodes documents, (split, text), and writes them as shards, with <|endoftext|> after each.
    Returns what meta.json says about them."""
    dtype = "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"
    splits = {s: {"shards": [], "tokens": 0, "bytes": 0, "documents": 0} for s in ("train", "val")}
    waiting, digest = {split: [] for split in splits}, hashlib.sha256()
    end = np.array([tokenizer.eot_token], dtype)

    def flush(split):
        shard, names = np.concatenate(waiting[split]), splits[split]["shards"]
        names.append(f"{split}_{len(names):05d}.npy")
        np.save(folder / names[-1], shard)
        digest.update(shard)
        waiting[split] = []

    for split, text, future, is_last in encode_all(documents, tokenizer):
        tokens, stats = future.result().astype(dtype), splits[split]
        waiting[split] += [tokens, end] if is_last else [tokens]
        stats["tokens"] += len(tokens) + is_last
        stats["bytes"] += len(text.encode())
        stats["documents"] += is_last
        if stats["tokens"] >= SHARD_TOKENS * (len(stats["shards"]) + 1):
            print(f"{split}: {stats['tokens']:,} tokens so far")
            flush(split)
    for split in splits:
        if waiting[split]:
            flush(split)
    meta = {"format": 2, "vocab_size": tokenizer.n_vocab, "dtype": dtype}
    return {**meta, "digest": digest.hexdigest(), "splits": splits}


def old_shards(folder):
    """The shards of an earlier run in this folder, to be replaced by new ones. Raises ValueError if
    there are shards that its meta.json does not list: they may be the user's."""
    meta = folder / "meta.json"
    with damaged(f"{meta} (delete it, or name another folder)"):
        splits = json.loads(meta.read_bytes())["splits"].values() if meta.exists() else []
        listed = [name for split in splits for name in split["shards"]]
    shards = [path for path in folder.glob("*.npy") if SHARD_NAME.fullmatch(path.name)]
    if others := [path for path in shards if path.name not in listed]:
        hint = "move or delete it, or name another folder"
        raise ValueError(f"{others[0]} may be yours, as meta.json does not list it: {hint}")
    return shards


def install(meta, new, folder):
    """Moves the shards from the folder new to folder, in place of the old ones. meta.json lists, at
    any moment, every shard that is there; after an interruption it lists one that is missing."""
    for path in old_shards(folder):
        path.unlink()
    write_file(folder / "meta.json", json.dumps(meta).encode())
    for split in meta["splits"].values():
        for name in split["shards"]:
            os.replace(new / name, folder / name)


def open_data(folder):
    """meta.json as a dict; each of its splits gets "arrays", the memory-mapped shards."""
    path = pathlib.Path(folder, "meta.json")
    if not path.exists():
        text, out = (folder, "data/NAME") if os.path.isfile(folder) else ("YOUR_TEXT", folder)
        hint = f"make a data folder with python prepare_data.py {text} --out={out}"
        raise FileNotFoundError(f"--data={folder} has no prepared data (meta.json); {hint}")
    with damaged(f"{folder} (run prepare_data.py again)"):
        meta = json.loads(path.read_bytes())
        if meta["format"] != 2:
            raise ValueError(f"format {meta['format']}, from another version")
        spec, vocab_size, _ = meta["tokenizer"], meta["vocab_size"], meta["digest"]
        # tiktoken would download one of its own, and training needs no tokenizer
        is_ours = spec["name"] not in tiktoken.list_encoding_names()
        if is_ours and build_tokenizer(spec).n_vocab != vocab_size:
            raise ValueError(f"its tokenizer does not have {vocab_size} tokens")
        for split in (meta["splits"]["train"], meta["splits"]["val"]):
            names = split["shards"]
            if not all(map(SHARD_NAME.fullmatch, names)):
                raise ValueError("invalid shard names")
            if missing := [name for name in names if not path.with_name(name).exists()]:
                raise ValueError(f"{missing[0]} is missing")
            arrays = split["arrays"] = [np.load(path.with_name(n), mmap_mode="r") for n in names]
            kinds, tokens = {(a.dtype.name, a.ndim) for a in arrays}, sum(map(len, arrays))
            if kinds != {(meta["dtype"], 1)} or tokens != split["tokens"] or split["bytes"] < 1:
                raise ValueError("the shards are not what meta.json says")
    return meta


# --- main -----------------------------------------------------------------------------------------


def train_tokenizer(documents, size, config):
    """The spec of a BPE trained on the training split, or on a sample of it if it is large. size is
    that of the input in bytes."""
    fraction = config.bpe_sample_mb * 1e6 / max(1, size)
    texts = (text for split, text in documents if split == "train")
    parts = (part for text in texts for part in cut(text))
    # the hash of a whole document has chosen its split already, so this one must differ
    sample = (part for part in parts if hash_fraction(f"sample {part}") <= fraction)
    ranks = train_bpe(sample, config.vocab_size)
    if len(ranks) < config.vocab_size:
        print(f"vocab_size is {len(ranks)}: no other pair in this text occurs twice")
    return bpe_spec(ranks)


def prepare(inputs, config):
    """Writes the data folder and prints a summary."""
    folder, skipped, dropped = pathlib.Path(config.out), [], collections.Counter()
    old_shards(folder)  # reports a folder that is not ours before any slow work
    files = find_files(inputs, skipped.append)
    if inputs and not files:
        raise ValueError(skipped[0] if skipped else f"{', '.join(inputs)}: no files found")
    if config.tokenizer == "bpe":  # the second pass reports what is skipped and dropped
        print("training the vocabulary", flush=True)
        documents = split_documents(files, config, lambda reason: None, collections.Counter())
        spec = train_tokenizer(documents, sum(path.stat().st_size for path in files), config)
    elif os.path.isdir(config.tokenizer):
        spec = read_tokenizer(config.tokenizer) or open_data(config.tokenizer)["tokenizer"]
    else:
        spec = {"name": config.tokenizer}
    tokenizer = build_tokenizer(spec)
    documents = split_documents(files, config, skipped.append, dropped)
    new = folder / ".prepare_data"
    shutil.rmtree(new, ignore_errors=True)  # of a killed run
    new.mkdir()
    print("encoding the text", flush=True)
    try:
        meta = write_shards(documents, tokenizer, new)
        if not all(split["bytes"] for split in meta["splits"].values()):
            raise ValueError(skipped[0] if skipped else "not enough text to train on and hold out")
        install({**meta, "tokenizer": spec}, new, folder)
    except OSError as error:  # NumPy says only how many items it wrote
        raise OSError(f"{folder} could not be written; is the disk full? ({error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print("read", f"{len(files):,} files" if inputs else "Python's manual")
    if skipped:
        print(f"skipped {len(skipped):,} files or documents, the first: {skipped[0]}")
    print(f"dropped {dropped['duplicate']:,} duplicates and {dropped['empty']:,} empty documents")
    print(f"{'':8}{'documents':>12}{'bytes':>15}{'tokens':>15}{'bytes/token':>13}")
    for split, s in meta["splits"].items():
        ratio = s["bytes"] / s["tokens"]
        print(f"{split:8}{s['documents']:12,}{s['bytes']:15,}{s['tokens']:15,}{ratio:13.2f}")
    start = open_data(folder)["splits"]["train"]["arrays"][0][:60].tolist()
    print("The first tokens:", "|".join(token_label(tokenizer, token) for token in start))


def main(argv=None):
    parser = flag_parser(PrepareConfig(), __doc__)
    parser.add_argument("inputs", nargs="*", help="files, folders, URLs (default: Python's manual)")
    flags = vars(parser.parse_intermixed_args(argv))
    inputs, config = flags.pop("inputs"), PrepareConfig(**flags)
    if config.held_out >= 1:
        raise ValueError(f"--held_out={config.held_out}: must be below 1")
    # a vocabulary has a token for each byte
    for name, least in {"vocab_size": 256, "bpe_sample_mb": 1}.items():
        if getattr(config, name) < least:
            raise ValueError(f"--{name}={getattr(config, name)}: must be {least} or more")
    with lock(config.out):
        prepare(inputs, config)


# --- shared by all scripts: flags, errors, files --------------------------------------------------


def flag_parser(defaults, docs):
    """A parser with a flag for every field of a dataclass, whose comment is the help text; defaults
    is an instance. What is parsed holds only the flags that were given."""
    # without a usage line, errors fit on one line
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=docs, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    source = "".join(inspect.getsource(c) for c in reversed(type(defaults).__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", source, re.MULTILINE))
    for name, default in vars(defaults).items():
        kind, text = type(default), comments[name]
        text += f" (default: {default!r})" if default else ""
        how = {"nargs": "?", "const": True} if kind is bool else {}
        how |= {"type": functools.partial(parse_value, kind), "metavar": kind.__name__.upper()}
        parser.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS, **how)
    return parser


def parse_value(kind, text):
    """The value of a flag, from its text. Numbers are finite and never negative."""
    if kind is str:
        return text
    if kind is bool and text in ("True", "False"):
        return text == "True"
    with contextlib.suppress(ValueError):
        if kind is not bool and 0 <= kind(text) < math.inf:
            return kind(text)
    raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}")


def script(main):
    """Runs main; bad input ends it with one line on standard error and exit code 2. A mistake in
    the code still shows its traceback, as everything does under python -X dev."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (None if the shell closed it)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")  # an unprintable character must not crash it
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141)
    except KeyboardInterrupt:
        raise SystemExit(130)
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        message = str(error) or type(error).__name__
        # PyTorch's error for too little memory is a RuntimeError
        is_bug = isinstance(error, RuntimeError) and not re.search("(?i)memory|overflow", message)
        if is_bug or sys.flags.dev_mode:
            raise
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        print(f"{sys.argv[0]}: {' '.join(message.split())} ({place_of(error)})", file=sys.stderr)
        raise SystemExit(2)


def place_of(error):
    """Where in these scripts an error, or its first cause, was raised: "train.py:181"."""
    while error:
        for frame in traceback.extract_tb(error.__traceback__):
            folder, name = os.path.split(frame.filename)
            if folder == os.path.dirname(__file__):
                place = f"{name}:{frame.lineno}"
        error = error.__cause__
    return place


def lock(folder):
    """Creates the folder if needed; locks it against other runs until the returned file closes."""
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, ".lock"), "a")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is writing there") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


def write_file(path, data):
    """Writes bytes to a temporary file, then renames it, so that path is never half written."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = pathlib.Path(f"{path}.tmp")
    temporary.unlink(missing_ok=True)  # it may be a link, to a file that must stay as it is
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def damaged(path):
    """Turns any error in a file's contents into a ValueError that names it. (As in gpt.py.)"""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path}: damaged, or of another format ({reason:.200})") from error


if __name__ == "__main__":
    script(main)
