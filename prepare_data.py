"""Text to tokens: reads any text, trains a byte-pair encoding on it, writes shards for train.py.

    python prepare_data.py                                 # Python's own manual, into data/
    python prepare_data.py book.txt --out=data/book        # your text
    python prepare_data.py notes/ more.jsonl page.html https://example.org/book.txt --out=data/mine
    python prepare_data.py stories.txt --separator='<|endoftext|>' --vocab_size=4096
    python prepare_data.py book.txt --tokenizer=gpt2       # GPT-2's vocabulary, by tiktoken

The way: documents -> clean -> BPE -> tokens of two splits -> train_00000.npy, ..., meta.json.
Only a document at a time is in memory; the cleaned text lies on disk until it is encoded.
"""

import argparse
import array
import ast
import collections
import concurrent.futures
import difflib
import functools
import hashlib
import heapq
import html.parser
import itertools
import json
import os
import pathlib
import platform
import pydoc_data.topics
import shutil
import sys
import sysconfig
import time
import unicodedata
import urllib.parse
import urllib.request

import numpy as np
import regex
import tiktoken

FORMAT = 1  # of the data folder
END_OF_TEXT = "<|endoftext|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
SHARD_TOKENS = 100_000_000
READ_BYTES = 1 << 20
PIECE_CHARS = 1 << 16  # long documents go through the tokenizer in pieces of about this length

# --- what the scripts share: flags, errors, progress ----------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse that keeps a script's description as it is and names the flag nearest to a typo."""

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            self.error(f"unknown {flag}" + (f", did you mean {near[0]}?" if near else ""))
        return args

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


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
        try:
            return main(argv)
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


# --- documents ------------------------------------------------------------------------------------


def read_documents(inputs, text_field="text", separator=None):
    """Yields (source, text) for every document in files, folders and URLs; none: Python's manual.

    A text file is one document, or many divided by separator; .json and .jsonl hold one in
    text_field of each object; .html is stripped of markup. Raises ValueError or OSError naming
    the file and the place in it.
    """
    if not inputs:
        print("reading the manual of Python", platform.python_version())
        yield from python_manual()
    for path in find_files(inputs):
        yield from read_file(path, text_field, separator)


def find_files(inputs):
    """The paths of all files in files, folders and URLs; folders give their text files, sorted."""
    files = []
    for name in map(str, inputs):
        is_url = name.startswith(("http://", "https://"))
        path = download(name) if is_url else pathlib.Path(name)
        if path.is_dir():
            inside = [f for f in sorted(path.rglob("*")) if f.is_file() and not is_binary(f)]
            inside = [f for f in inside if "/." not in f"/{f.relative_to(path).as_posix()}"]
            if not inside:
                raise ValueError(f"{path}: no text files in this folder")
            files += inside
        else:
            files.append(path)
    return files


def is_binary(path):
    """Text has no NUL bytes (UTF-16 has: convert it first)."""
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def read_file(path, text_field, separator):
    """Yields (source, text) of one file, by its extension."""
    if is_binary(path):
        raise ValueError(f"{path}: a binary file; give text in UTF-8")
    extension = path.suffix.lower()
    if extension == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, field_of(parse_json(line, where), text_field, where)
    elif extension == ".json":
        items = parse_json(path.read_bytes(), path)
        for number, item in enumerate(items if isinstance(items, list) else [items], 1):
            where = f"{path}, item {number}"
            yield where, field_of(item, text_field, where)
    else:
        for offset, document in split_file(path, separator):
            text = decode(document, path, offset)
            yield str(path), html_to_text(text) if extension in (".html", ".htm") else text


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
            searched = max(0, len(buffer) - len(separator) + 1)  # what is before holds none
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
    try:
        return json.loads(decode(data, where))
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"{where}{line}: broken JSON: {error.msg}, column {error.colno}")
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deep")


def field_of(item, field, where):
    """The text in a JSON object's field."""
    text = item.get(field) if isinstance(item, dict) else None
    if isinstance(text, str):
        return text
    found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
    raise ValueError(f"{where}: no text in field {field!r} (found: {found}); see --text_field")


def download(url):
    """Fetches a URL into downloads/, once; returns the path."""
    name = regex.sub(r"[^\w.-]+", "_", url.split("://", 1)[1]).strip("_")
    folder = pathlib.Path("downloads")
    for path in (folder / name, folder / f"{name}.html"):
        if path.exists():
            return path
    print(f"downloading {url} to {folder}/", file=sys.stderr)
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{name}.tmp"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
            shutil.copyfileobj(response, file)
            is_html = response.headers.get_content_type() == "text/html"
            missing = int(response.headers.get("Content-Length") or 0) - file.tell()
    except OSError as error:
        raise ValueError(f"{url}: cannot be downloaded ({error})")
    if missing > 0:
        raise ValueError(f"{url}: the download broke off, {missing} bytes short; try again")
    suffix = pathlib.Path(urllib.parse.urlsplit(url).path).suffix.lower()
    path = folder / (f"{name}.html" if is_html and suffix not in (".html", ".htm") else name)
    return temporary.replace(path)


UNSEEN = frozenset(("script", "style", "title", "template", "noscript", "svg", "iframe"))
NEW_LINE = frozenset(("br", "hr", "li", "tr", "dt", "dd", "option"))
BLOCK = frozenset(("address", "article", "aside", "blockquote", "body", "div", "dl", "figure"))
BLOCK |= {"footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "main", "nav", "ol"}
BLOCK |= {"p", "pre", "section", "table", "ul"}


class VisibleText(html.parser.HTMLParser):
    """Collects what a person would see of a page: blocks stand apart, preformatted text stays."""

    def __init__(self):
        super().__init__()
        self.parts, self.unseen, self.preformatted = ["\n"], 0, 0

    def handle_starttag(self, tag, attributes):
        self.unseen += tag in UNSEEN
        self.preformatted += tag == "pre"
        if tag in NEW_LINE | BLOCK:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.unseen = max(0, self.unseen - (tag in UNSEEN))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if tag in BLOCK:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.preformatted:
            data = regex.sub(r"\s+", " ", data)
            data = data.lstrip() if self.parts[-1].endswith("\n") else data
        if data and not self.unseen:
            self.parts.append(data)


def html_to_text(page):
    """
    >>> html_to_text("<h1>Tom &amp; Ann</h1><script>x</script><p>They <b>met</b>.</p>")
    '\\n\\nTom & Ann\\n\\nThey met.\\n'
    """
    parser = VisibleText()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)


INVISIBLE = regex.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]+")
TRAILING_BLANKS = regex.compile(r"(?<![ \t])[ \t]+(?=\n|\Z)")
BLANK_LINES = regex.compile(r"\n{3,}")


def clean(text):
    """What is done to all text: NFC, Unix line ends, no control characters or byte-order marks,
    no blanks at line ends, no two blank lines in a row, none at the ends.

    >>> clean("\\ufeffone \\r\\n\\r\\n\\r\\n\\r\\ntwo\\x00\\n")
    'one\\n\\ntwo'
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = TRAILING_BLANKS.sub("", INVISIBLE.sub("", text))
    return BLANK_LINES.sub("\n\n", text).strip("\n")


# --- the default corpus: the manual inside every Python installation --------------------------------


def python_manual():
    """Yields (source, text): pydoc's topics, and a page for each module of the standard library.

    The modules are read with ast, never imported.
    """
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topic {name}", text
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not skipped.intersection(parts) and "-" not in path.as_posix()[len(str(library)) :]:
            name = ".".join(part for part in parts if part != "__init__")
            with open(path, "rb") as file:
                entries = list(docstrings(ast.parse(file.read()), name))
            if entries:
                yield name, "\n\n".join(f"# {n}\n\n{text}" for n, text in entries)


def docstrings(node, name):
    """Yields (signature, docstring) of a module, class or function and of all inside it."""
    text = ast.get_docstring(node)
    if text and text.strip():
        arguments = getattr(node, "args", None)
        yield name + (f"({ast.unparse(arguments)})" if arguments else ""), text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(child, f"{name}.{child.name}")


# --- byte-pair encoding ---------------------------------------------------------------------------

# GPT-2's rule for cutting text into pieces, which no token spans: endings like 's, words, numbers,
# other signs, each with the blank before it, and white space (in tiktoken's possessive form).
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
WORD_END = regex.compile(r"(?<=[^\W_])(?=\s)")


def cut(text, length=PIECE_CHARS):
    """Yields a long text in parts that begin at the white space after a word, where no token
    begins earlier: the tokens of the parts are the tokens of the whole, in memory for one part."""
    start = 0
    while start < len(text):
        end = WORD_END.search(text, start + length)
        end = end.start() if end else len(text)
        yield text[start:end]
        start = end


def train_bpe(texts, vocab_size):
    """Learns a byte-pair encoding (Sennrich et al. 2016; on bytes, as Radford et al. 2019).

    Begins with the 256 bytes and, until there are vocab_size tokens, makes one of the two
    neighbours that stand together most often (of equals, the pair of smaller ids). Returns
    {token bytes: rank}; fewer than vocab_size where no pair is left that occurs twice.

    >>> list(train_bpe(["low lower lowest"], 259))[256:]
    [b'lo', b'low', b' low']
    """
    piece_counts = collections.Counter()
    for text in texts:
        for part in cut(text):
            piece_counts.update(regex.findall(SPLIT, part))
    words = [list(piece.encode()) for piece in piece_counts]
    counts = list(piece_counts.values())
    pair_counts = collections.Counter()
    where = collections.defaultdict(set)  # pair -> the words that (may) hold it
    for index, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += counts[index]
            where[pair].add(index)
    heap = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([byte]) for byte in range(256)]
    while heap and len(tokens) < vocab_size:
        negative, pair = heapq.heappop(heap)
        n = pair_counts[pair]
        if n < 2:
            continue
        if n != -negative:  # other merges have eaten into it since: back, at its present count
            heapq.heappush(heap, (-n, pair))
            continue
        left, right = pair
        new = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        changed = set()
        for index in where.pop(pair):
            word, n, i = words[index], counts[index], 0
            while left in word[i:-1]:
                i = word.index(left, i)
                if word[i + 1] == right:
                    word[i : i + 2] = [new]
                    if i > 0:
                        before = word[i - 1]
                        pair_counts[before, left] -= n
                        pair_counts[before, new] += n
                        where[before, new].add(index)
                        changed.add((before, new))
                    if i + 1 < len(word):
                        after = word[i + 1]
                        pair_counts[right, after] -= n
                        pair_counts[new, after] += n
                        where[new, after].add(index)
                        changed.add((new, after))
                i += 1
        del pair_counts[pair]
        for pair in changed:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return {token: rank for rank, token in enumerate(tokens)}


def bpe_encode(piece, ranks):
    """One piece of text -> token ids: what tiktoken does in Rust, written out.

    Begins with single bytes and joins, again and again, the neighbours that were learned first.

    >>> bpe_encode(" lower", {**train_bpe(["low lower lowest"], 259)})
    [258, 101, 114]
    """
    parts = [bytes([byte]) for byte in piece.encode()]
    while True:
        joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        first = min(joined, default=len(ranks))
        if first == len(ranks):
            return [ranks[part] for part in parts]
        i = joined.index(first)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


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
    tokens, special = spec.get("tokens"), spec.get("special_tokens")
    for strings in (tokens, special):
        if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
            raise ValueError("tokenizer: tokens and special_tokens must be lists of text")
    try:
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(tokens)}
    except UnicodeEncodeError:
        raise ValueError("tokenizer: a token holds a character that is no byte")
    if len(ranks) < len(tokens) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("tokenizer: tokens must be distinct and hold all 256 single bytes")
    if END_OF_TEXT not in special or len(set(special)) < len(special):
        raise ValueError(f"tokenizer: special_tokens must be distinct and hold {END_OF_TEXT}")
    ids = {text: len(tokens) + i for i, text in enumerate(special)}
    return tiktoken.Encoding("bpe", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=ids)


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
    folder = pathlib.Path(folder)
    path = folder / "meta.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no prepared data; python prepare_data.py makes it")
    meta = parse_json(path.read_bytes(), path)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path}: not of format {FORMAT}; make the folder anew: prepare_data.py")
    try:
        dtype = token_dtype(meta["vocab_size"])
        if dtype != meta["dtype"] or len(meta["tokenizer"].get("tokens", ())) > meta["vocab_size"]:
            raise ValueError("vocab_size, dtype and tokenizer do not go together")
        for split in ("train", "val"):
            stats = meta["splits"][split]
            stats["arrays"] = [open_shard(folder / name, dtype) for name in stats["shards"]]
            if sum(map(len, stats["arrays"])) != stats["tokens"] or not stats["bytes"] > 0:
                raise ValueError(f"{split} shards do not hold the tokens that are listed")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder}: damaged: {reason}; make it anew: prepare_data.py") from error
    return meta


def open_shard(path, dtype):
    try:
        shard = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing")
    except Exception as error:  # a bad header can raise almost anything
        raise ValueError(f"{path.name} is truncated or not a shard ({error})") from error
    if shard.dtype != dtype or shard.ndim != 1:
        raise ValueError(f"{path.name} is {shard.ndim}-D {shard.dtype}, not 1-D {dtype}")
    return shard


def may_replace(folder):
    """Whether folder is a data folder, or holds nothing but data folders (or nothing at all)."""
    return (folder / "meta.json").exists() or (
        folder.is_dir() and all(map(may_replace, folder.iterdir()))
    )


def install(partial, out):
    """Puts a finished folder in the place of out; folders that lie in out move along."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    if old.exists():
        for entry in old.iterdir():
            if entry.is_dir():
                entry.rename(out / entry.name)
        shutil.rmtree(old)


# --- the whole way --------------------------------------------------------------------------------


def gather(args, spool):
    """Reads and cleans all documents and writes them to the file spool, a NUL byte after each.

    -> 64 bits for each document, which stand for its text, and how many were too short.
    """
    progress = Progress("reading", sum(path.stat().st_size for path in find_files(args.inputs)))
    digests, too_short = array.array("Q"), 0
    with open(spool, "wb") as file:
        for _, text in read_documents(args.inputs, args.text_field, args.separator):
            text = clean(text)
            if len(text) < args.min_chars:
                too_short += 1
                continue
            data = text.encode()
            digests.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))
            file.write(data + b"\0")  # which clean() leaves in no text
            progress.update(file.tell())
    progress.done()
    if not digests:
        raise ValueError(f"no text in {', '.join(args.inputs)}")
    return np.frombuffer(digests, np.uint64), too_short


def distinct_texts(spool, digests, label):
    """Yields (digest, text) of the gathered documents, each text once."""
    progress = Progress(label, spool.stat().st_size)
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    for digest, is_first, (offset, data) in zip(digests.tolist(), first, split_file(spool, "\0")):
        if is_first:
            yield digest, data.decode()
        progress.update(offset)
    progress.done()


def spread_sample(texts, fraction):
    """Yields about that fraction of the text, in parts taken evenly from beginning to end."""
    seen = taken = 0
    for part in itertools.chain.from_iterable(map(cut, texts)):
        if taken <= seen * fraction:
            taken += len(part)
            yield part
        seen += len(part)


def choose_tokenizer(args, spool, digests):
    """The spec of the tokenizer that --tokenizer names; a BPE is trained on the gathered text."""
    if pathlib.Path(args.tokenizer).is_dir():
        return open_data(args.tokenizer)["tokenizer"]
    if args.tokenizer != "bpe":
        return {"name": args.tokenizer}
    vocab_size = args.vocab_size or 1024
    texts = (text for _, text in distinct_texts(spool, digests, "learning tokens from"))
    fraction = min(1, args.bpe_sample_mb * 1e6 / spool.stat().st_size)
    ranks = train_bpe(spread_sample(texts, fraction), vocab_size)
    if len(ranks) < vocab_size:
        if args.vocab_size:
            raise ValueError(f"--vocab_size={vocab_size}: this text gives only {len(ranks)} tokens")
        print(f"vocab_size is {len(ranks)}: this text gives no more tokens")
    return bpe_spec(ranks)


def split_texts(texts, by_document):
    """(digest, text) -> (split, text). A tenth of the documents is held out, by their digests, so
    that nothing else matters; where there are few, the last tenth of each."""
    for digest, text in texts:
        if by_document:
            yield ("val" if digest % 10 == 0 else "train"), text
        else:
            border = WORD_END.search(text, len(text) * 9 // 10)
            border = border.start() if border else len(text) * 9 // 10
            yield "train", text[:border]
            yield "val", text[border:].lstrip("\n")


def in_order(function, items, threads):
    """map(function, items) on threads, with few items under way: memory stays flat."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending = collections.deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def encode_texts(texts, tokenizer, folder, threads):
    """(split, text) -> shards in folder, every text followed by <|endoftext|>. -> {split: stats}"""
    end = np.array([tokenizer.encode_single_token(END_OF_TEXT)])
    dtype = token_dtype(tokenizer.n_vocab)
    writers = {split: SplitWriter(folder, split, dtype) for split in ("train", "val")}

    def groups():
        """Lists of (split, part of a text or, at its end, ""), enough work for a thread's turn."""
        group, size = [], 0
        for split, text in texts:
            for part in [*cut(text), ""] if text else []:
                group.append((split, part))
                size += len(part)
                if size >= PIECE_CHARS:
                    yield group
                    group, size = [], 0
        yield group

    def encode(group):
        encode_part = functools.partial(tokenizer.encode_to_numpy, disallowed_special=())
        return [(split, part, encode_part(part) if part else end) for split, part in group]

    for group in in_order(encode, groups(), threads):
        for split, part, tokens in group:
            writers[split].write(tokens)
            writers[split].stats["bytes"] += len(part.encode())
            writers[split].stats["documents"] += not part
    for writer in writers.values():
        writer.close()
        if not writer.stats["bytes"]:
            raise ValueError("too little text to hold out a tenth of it")
    return {split: writer.stats for split, writer in writers.items()}


def report(meta, tokenizer, out):
    """What was made, in numbers, and a look at it."""
    print(f"{'':8}{'documents':>12}{'bytes':>15}{'tokens':>15}{'bytes/token':>13}")
    for split, s in meta["splits"].items():
        print(f"{split:8}{s['documents']:12,}{s['bytes']:15,}{s['tokens']:15,}", end="")
        print(f"{s['bytes'] / s['tokens']:13.2f}")
    start = open_data(out)["splits"]["train"]["arrays"][0][:60].tolist()
    tokens = "|".join(tokenizer.decode([token]) for token in start)
    print("The first tokens:", tokens.replace("\n", "\\n"))


def prepare(args, partial):
    """Makes the data folder partial, complete but for its final name. -> meta, tokenizer"""
    spool = partial / "text"
    digests, too_short = gather(args, spool)
    spec = choose_tokenizer(args, spool, digests)
    tokenizer = build_tokenizer(spec)
    distinct = len(np.unique(digests))
    texts = split_texts(distinct_texts(spool, digests, "encoding"), by_document=distinct >= 200)
    meta = {
        "format": FORMAT,
        "tokenizer": spec,
        "vocab_size": tokenizer.n_vocab,
        "eot_token": tokenizer.encode_single_token(END_OF_TEXT),
        "dtype": token_dtype(tokenizer.n_vocab).name,
        "splits": encode_texts(texts, tokenizer, partial, args.threads),
        "sources": args.inputs or [f"the manual of Python {platform.python_version()}"],
        "digest": hashlib.sha256(digests).hexdigest(),  # of all text
    }
    spool.unlink()
    (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    print(f"{len(digests) - distinct:,} duplicates and {too_short:,} short documents dropped")
    return meta, tokenizer


@script
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", help="files, folders, URLs; none: the manual that Python comes with")
    add("--out", default="data", help="folder to write")
    add("--tokenizer", default="bpe", help="bpe: trained here; a tiktoken name; a data folder")
    add("--vocab_size", type=count, help="bytes and merges of the trained BPE (default: 1024)")
    add("--bpe_sample_mb", type=count, default=40, help="text that the BPE is trained on, MB")
    add("--text_field", default="text", help="where a JSON object has its text")
    add("--separator", help="what divides the documents in a text file, e.g. '<|endoftext|>'")
    add("--min_chars", type=count, default=1, help="shorter documents are dropped")
    add("--threads", type=count, default=os.cpu_count(), help="for encoding")
    args = parser.parse_args(argv)
    if args.vocab_size and args.vocab_size < 256:
        raise ValueError(f"--vocab_size={args.vocab_size}: 256 at least, one for every byte")
    if args.tokenizer != "bpe" and not pathlib.Path(args.tokenizer).is_dir():
        build_tokenizer({"name": args.tokenizer})  # complain before the long work, not after it
    out = pathlib.Path(args.out)
    if out.exists() and not may_replace(out):
        raise ValueError(f"--out={out}: not a data folder of ours; it stays as it is, name another")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        meta, tokenizer = prepare(args, partial)
        install(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(meta, tokenizer, out)


if __name__ == "__main__":
    main()
