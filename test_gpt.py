"""What must hold of this project, on small data made here: no network, no GPU.

python -m pytest -q
"""

import argparse
import collections
import contextlib
import csv
import doctest
import functools
import http.server
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F

import finetune
import gpt
import prepare_data
import sample
import train
from gpt import GPT, GPTConfig, keep_top_p, load_checkpoint
from prepare_data import SPLIT, bpe_encode, bpe_spec, build_tokenizer, clean, cut, train_bpe

TINY = {"block_size": 16, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16}
torch.set_num_threads(1)  # such small tensors are not worth a second
WORDS = ["the", "a", "cat", "dog", "sees", "hears", "and", "not", "red", "small", "house", "in"]
CPU = torch.device("cpu")

assert_close = torch.testing.assert_close
assert_equal = functools.partial(assert_close, rtol=0, atol=0)  # bit for bit, nested dicts too


@pytest.fixture(autouse=True)
def seeded(monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)  # so that no test reads or writes the user's data/ and out/


def tiny_model(**changes):
    """A model in eval mode whose attention is far from uniform, as it is after training."""
    model = GPT(GPTConfig(**{**TINY, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("c_attn.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens(*shape, vocab_size=50):
    return torch.randint(vocab_size, shape)


def story(n_words, seed=0):
    chosen = random.Random(seed).choices(WORDS, k=n_words)
    return " ".join(w + ".\n" * (i % 9 == 8) for i, w in enumerate(chosen))


def prepare(folder, text, *flags):
    """Writes text to a file, prepares folder from it, and opens it."""
    path = folder.with_suffix(".txt")
    path.write_text(text, encoding="utf-8")
    prepare_data.main([str(path), f"--out={folder}", "--vocab_size=280", *flags])
    return prepare_data.open_data(folder)


def documents_in(meta):
    """The text of a data folder, {split: documents}."""
    tokenizer, texts = build_tokenizer(meta["tokenizer"]), {}
    for name, split in meta["splits"].items():
        text = tokenizer.decode(np.concatenate(split["arrays"]).tolist())
        *texts[name], rest = text.split("<|endoftext|>")
        assert rest == ""  # every document has an end token behind it
    return texts


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(folder, story(4000))
    return folder


SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4"]
SMALL += ["--eval_interval=10", "--eval_iters=3", "--warmup_iters=4", "--dropout=0.1"]
SMALL += ["--max_iters=20", "--device=cpu", "--dtype=float32"]


def run_training(data_folder, out_dir, *flags):
    """train.py on a tiny model -> the checkpoint it ends with."""
    train.main([f"--data={data_folder}", f"--out_dir={out_dir}", *SMALL, *flags])
    return load_checkpoint(out_dir / "last.pt")


def resume(out_dir, *flags):
    train.main(["--init_from=resume", f"--out_dir={out_dir}", *flags])
    return load_checkpoint(out_dir / "last.pt")


def column(out_dir, name):
    """What metrics.csv has under a name, without the empty cells."""
    with open(out_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="session")
def base(data_folder, tmp_path_factory):
    """A trained model, to sample from and to begin fine-tuning with."""
    folder = tmp_path_factory.mktemp("base") / "out"
    run_training(data_folder, folder, "--dropout=0")
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@contextlib.contextmanager
def web_server(folder):
    """A server of the files in folder -> its address, and the list of paths asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *args):
            asked.append(self.path)

        def log_error(self, *args):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def start(*command, **options):
    """A process of its own, on one thread as here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = pathlib.Path(train.__file__).parent
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **options)


def wait_for(process, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


# --- the model ------------------------------------------------------------------------------------


def test_a_token_changes_no_output_before_it_and_each_one_after_it():
    model, idx = tiny_model(), tokens(2, 16)
    before = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        differs = (model(changed) != before).any(-1)
        assert torch.equal(differs, (torch.arange(16) >= t).expand(2, 16))


@pytest.mark.parametrize("n_new", [9, 4, 1])
def test_attention_written_out_computes_what_the_fused_kernel_does(n_new):
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    q = q[:, :, -n_new:]  # the last queries, as with a cache
    mask = torch.ones(n_new, 9, dtype=torch.bool).tril(9 - n_new)
    fused = F.scaled_dot_product_attention(q, k, v, mask)
    assert_close(gpt.attention_weights(q, k) @ v, fused)
    assert_close(gpt.attention(q, k, v), fused)
    written_out = gpt.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert_close(written_out.float(), fused, atol=0.03, rtol=0.03)


def test_fast_dropout_drops_its_share_scales_the_rest_and_draws_anew():
    x = torch.full((100, 999), 3.0)
    once, again = (gpt.fast_dropout(x, 0.2) for _ in range(2))
    assert (once == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert_close(once[once != 0].unique(), torch.tensor([3 / 0.8]), rtol=1e-4, atol=0)
    assert not torch.equal(once, again)
    assert gpt.fast_dropout(x, 0.2, training=False) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_attention_weights_keeps_their_mean(dtype):
    q, k, v = torch.zeros(3, 1000, 1, 8, 8, dtype=dtype)
    dropped = gpt.attention(q, k, v + torch.eye(8, dtype=dtype), 0.5).float()
    assert ((dropped == 0).float().mean() - 0.72).abs() < 0.03  # 28 of 64 weights, and half of 36
    even = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    assert_close(dropped.mean((0, 1)), even, atol=0.1, rtol=0)


def test_reading_in_steps_with_a_cache_is_reading_at_once():
    model, idx = tiny_model(), tokens(3, 16)
    cache, starts = model.new_cache(3, 16), [0, 5, 6, 10]
    parts = zip(idx.split([5, 1, 4, 6], dim=1), starts)
    steps = [model.hidden(part, cache, start) for part, start in parts]
    assert_close(torch.cat(steps, dim=1), model.hidden(idx))
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        model.hidden(idx[:, :1], cache, 16)


def test_when_the_context_is_full_generation_starts_afresh_on_its_last_half():
    model, idx = tiny_model(), tokens(2, 10)
    made = list(model.generate(idx, 40, temperature=0))
    assert_equal(list(model.generate(idx, 5, temperature=0)), made[:5])
    text = torch.cat([idx, torch.stack(made, dim=1)], dim=1)  # (2, 50)
    length = 10  # of what the model has before it when it makes text[:, n]
    for n in range(10, 50):
        length = 8 if length > 16 else length
        assert torch.equal(text[:, n], model(text[:, n - length : n])[:, -1].argmax(-1))
        length += 1


def test_a_prompt_longer_than_the_context_keeps_its_end():
    model, idx = tiny_model(), tokens(1, 40)
    made = [list(model.generate(prompt, 9, temperature=0)) for prompt in (idx, idx[:, -16:])]
    assert_equal(*made)


@pytest.mark.parametrize("at_once", [10**9, 200])  # logits: all of them, or 4 rows
def test_loss_and_gradients_are_those_of_plain_cross_entropy(at_once, monkeypatch):
    monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", at_once)
    model, idx, targets = tiny_model(), tokens(2, 15), tokens(2, 15)
    targets[0, :5] = -100
    plain = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    weights = list(model.parameters())
    loss = model(idx, targets)
    assert_close(loss, plain)
    assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(plain, weights))


def test_under_autocast_each_loss_keeps_its_precision():
    head, x = torch.nn.Linear(32, 9000, bias=False), torch.randn(100, 32)
    targets = tokens(100, vocab_size=9000)
    with torch.autocast("cpu", torch.bfloat16):
        losses = gpt.next_token_losses(head, x, targets)
        exact = F.cross_entropy(head(x).float(), targets, reduction="none")
    assert_close(losses, exact)
    assert not torch.equal(losses, losses.bfloat16().float())


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_has_weights_of_the_stated_sizes_and_expects_every_token_alike(tied):
    shape = {**TINY, "vocab_size": 1000, "n_embd": 64, "n_layer": 8, "tie_weights": tied}
    model = GPT(GPTConfig(**shape))
    sizes = {"c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / 16**0.5, "ln_f": 1}
    sizes |= dict.fromkeys(("wte", "wpe"), 0.02 if tied else 1)
    for name, parameter in model.named_parameters():
        module, kind = name.split(".")[-2:]
        size = 0 if kind == "bias" else sizes.get(module)
        if size is not None:
            assert parameter.square().mean().sqrt().item() == pytest.approx(size, rel=0.1)
    loss = model(tokens(8, 16, vocab_size=1000), tokens(8, 16, vocab_size=1000))
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05 if tied else 1e-5)


@pytest.mark.parametrize("name", ["dropout", "attn_dropout"])
def test_dropout_is_off_in_evaluation_and_on_in_training(name):
    model, idx = tiny_model(**{name: 0.3}), tokens(2, 16)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.allclose(model(idx), model(idx))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding_also_after_loading(tied, tmp_path):
    model = tiny_model(tie_weights=tied)
    gpt.save_checkpoint(tmp_path / "best.pt", model.checkpoint())
    loaded = GPT.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    assert_equal(model.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_leaves_the_other_tokens_and_positions_alone(tied):
    model, idx = tiny_model(tie_weights=tied), tokens(2, 8, vocab_size=30)
    logits = model(idx)
    for vocab_size, block_size in [(64, 8), (30, 40)]:
        model.resize(vocab_size, block_size)
        n = min(vocab_size, 50)
        assert_close(model(idx)[..., :n], logits[..., :n])
        assert model(idx[:1, :1].expand(1, block_size)).shape == (1, block_size, vocab_size)
        assert model.num_params() == GPT(model.config).num_params()
        with pytest.raises(ValueError, match="do not fit"):
            model(tokens(1, block_size + 1))


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_the_faster_dtype_is_picked(fast, monkeypatch):
    clock = [0]

    def product(a, b):
        clock[0] += 1 if a.dtype == fast else 5

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert gpt.pick_dtype.__wrapped__(CPU) == fast


# --- choosing the next token ----------------------------------------------------------------------


def test_greedy_sampling_takes_the_likeliest_token():
    logits = torch.randn(5, 20)
    for how in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}):
        assert torch.equal(gpt.sample(logits, **how), logits.argmax(-1))


def test_top_k_draws_from_exactly_k_tokens_even_among_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [4.0, 1.0, 2.0, 3.9]])
    drawn = torch.stack([gpt.sample(logits, top_k=2) for _ in range(100)])
    assert len(set(drawn[:, 0].tolist())) == 2
    assert 0 not in drawn[:, 0]
    assert set(drawn[:, 1].tolist()) == {0, 3}
    for top_k in (0, 99):  # all
        drawn = torch.stack([gpt.sample(logits, temperature=9, top_k=top_k) for _ in range(100)])
        assert set(drawn[:, 0].tolist()) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([[0.15, 0.5, 0.3, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert keep_top_p(logits, 0.79).isfinite().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert keep_top_p(logits, 0.81).isfinite().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(20_000, 3)
    drawn = gpt.sample(logits, temperature=0.5).bincount(minlength=3) / 20_000
    squared = torch.tensor([0.01, 0.36, 0.09]) / 0.46
    assert_close(drawn, squared, atol=0.02, rtol=0)


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_an_error(temperature):
    with pytest.raises(ValueError, match="not finite"):
        gpt.sample(torch.tensor([[1.0, math.nan]]), temperature)


def test_a_sequence_that_met_the_stop_token_goes_on_yielding_it():
    model, idx = tiny_model(), tokens(6, 4)
    free = torch.stack(list(model.generate(idx, 30, temperature=0)), dim=1)
    stop = free[0, 3].item()
    stopped = torch.stack(list(model.generate(idx, 30, temperature=0, stop_token=stop)), dim=1)
    for row, free_row in zip(stopped.tolist(), free.tolist()):
        n = free_row.index(stop) if stop in free_row else 30
        assert row == (free_row[:n] + [stop] * 30)[: len(row)]
    alone = list(model.generate(idx[:1], 30, temperature=0, stop_token=stop))
    assert alone[-1].item() == stop
    assert len(alone) <= 4


# --- text and tokens ------------------------------------------------------------------------------


def naive_bpe(text, vocab_size):
    """Counts every pair anew for every merge."""
    words = [list(piece.encode()) for piece in regex.findall(SPLIT, text)]
    found = [bytes([byte]) for byte in range(256)]
    while len(found) < vocab_size:
        pairs = [pair for word in words for pair in itertools.pairwise(word)]
        counts = {pair: pairs.count(pair) for pair in set(pairs)}
        if max(counts.values(), default=0) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [len(found)]
                i += 1
        found.append(found[best[0]] + found[best[1]])
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_fast_bpe_learns_what_counting_every_pair_anew_learns(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(["ab ", "a", "b", "é", "  ", "\n", "12"][: 3 + seed // 2], k=400))
    ranks = train_bpe([text], 256 + 40)
    assert list(ranks) == naive_bpe(text, 256 + 40)
    assert list(ranks.values()) == list(range(len(ranks)))


def any_text(rng, n):
    """Letters, spaces, and anything else that Unicode has."""
    kinds = ["ab c\n\t'", "éßñ漢字ไทย", "😀👩‍👩‍👧\u0301", "<|endoftext|>"]
    kinds = [rng.choice([*kinds, chr(rng.randrange(0xD7FF))]) for _ in range(n)]
    return "".join(map(rng.choice, kinds))


def test_bpe_encode_is_what_tiktoken_does_and_any_text_comes_back():
    ranks, rng = train_bpe([story(500)], 350), random.Random(1)
    tokenizer = build_tokenizer(json.loads(json.dumps(bpe_spec(ranks))))
    for text in [story(50, seed=3), *(any_text(rng, 60) for _ in range(50))]:
        pieces = (piece.encode() for piece in regex.findall(SPLIT, text))
        ids = [ranks[token] for piece in pieces for token in bpe_encode(piece, ranks)]
        assert ids == tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    for byte in range(256):
        assert bytes([byte]) in tokenizer.token_byte_values()


def test_special_tokens_stand_behind_the_learned_ones_and_only_code_can_write_them():
    ranks = train_bpe([story(300)], 300)
    tokenizer, n = build_tokenizer(bpe_spec(ranks)), len(ranks)
    names = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert [tokenizer.encode_single_token(name) for name in names] == list(range(n, n + 4))
    assert max(tokenizer.encode_ordinary("a <|endoftext|> b")) < n


@pytest.mark.parametrize("space", [" ", "，"])  # Chinese has no spaces, and is cut, too
def test_a_text_encoded_in_parts_gives_the_tokens_of_the_whole(space):
    pieces = ["word", space, space * 2, "_", "don't", "12", "é", "漢", "!"]
    text = "".join(random.Random(3).choices(pieces, k=9000))
    tokenizer = build_tokenizer(bpe_spec(train_bpe([text], 400)))
    parts = list(cut(text, 100))
    assert "".join(parts) == text
    assert len(parts) > 50
    ids = [i for part in parts for i in tokenizer.encode_ordinary(part)]
    assert ids == tokenizer.encode_ordinary(text)


def test_clean_text_has_no_controls_no_spaces_at_line_ends_and_is_clean():
    rng = random.Random(4)
    for _ in range(300):
        mess = "".join(rng.choices("a \t\n\r\0\x1b\ufeff\u2028", k=20))
        text = clean(mess + any_text(rng, 20) + mess)
        controls = {c for c in text if unicodedata.category(c) == "Cc"}
        assert controls <= {"\n", "\t"} and "\ufeff" not in text
        assert not re.search(r"[ \t]$|\n{3}|\A\n|\n\Z", text, re.MULTILINE)
        assert clean(text) == text
    assert clean("  e\u0301\n\tb") == "  é\n\tb"  # indents stay


class WithHoles:
    """A tokenizer that leaves ids out, as some of tiktoken's do."""

    def decode_single_token_bytes(self, token):
        return {0: b"a", 1: "漢".encode()[:2], 2: b"\n"}[token]


def test_tokens_that_are_no_characters_or_missing_have_labels():
    assert [prepare_data.token_bytes(WithHoles(), token) for token in (0, 9)] == [b"a", b""]
    labels = [prepare_data.token_label(WithHoles(), token) for token in (0, 1, 2, 9)]
    assert labels == ["a", "\\xe6\\xbc", "\\n", ""]


# --- any text -------------------------------------------------------------------------------------


def documents_of(*inputs):
    return [clean(text) for _, text in prepare_data.read_documents(inputs)]


def test_every_kind_of_file_gives_its_documents(tmp_path):
    files = {
        "b.txt": "zero<|endoftext|>one",
        "a/b.jsonl": '{"text": "two"}\n\n{"text": "three", "x": 1}\n',
        "a/c.md": "four",
        "a/d.json": '[{"text": "five"}, {"text": "six"}]',
        "a/e.html": "<title>no</title><p>seven &eacute;<script>no</script> <b>x</b>y</p>"
        "<pre> z\n</pre>",
        "a/f": "<!DOCTYPE html><svg>no</svg>eight",
        "a/g.JSON": '{"text": "nine"}\n{"text": "ten"}',  # JSON Lines, whatever the name says
        "a/.hidden": "no",
    }
    (tmp_path / "a").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    expected = ["zero", "one", "two", "three", "four", "five", "six", "seven é xy\n\n z", "eight"]
    assert documents_of(tmp_path / "b.txt", tmp_path / "a") == [*expected, "nine", "ten"]


@pytest.mark.parametrize("block", [3, 7, 1 << 20])
def test_a_separator_divides_a_file_wherever_its_blocks_end(tmp_path, block):
    data = "one<|x|>twö <|x<|x|><|x|>three".encode()
    (tmp_path / "a.txt").write_bytes(data)
    parts = list(prepare_data.split_file(tmp_path / "a.txt", b"<|x|>", block))
    assert [part.decode() for _, part in parts] == ["one", "twö <|x", "", "three"]
    assert all(data[offset:].startswith(part) for offset, part in parts)


def test_a_separator_may_have_escapes(tmp_path):
    texts = [f"{i} the cat sees a dog" for i in range(500)]
    found = documents_in(prepare(tmp_path / "data", "\t\n".join(texts), r"--separator=\t\n"))
    assert sorted(found["train"] + found["val"]) == sorted(texts)


def test_documents_that_cannot_be_read_are_skipped_counted_and_named(tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_bytes(story(300, seed=1).encode() + b"\xe9t\xe9")
    (folder / "b.txt").write_text(story(300), encoding="utf-8")
    (folder / "c.jsonl").write_text('{"text": null}\n{"text"\n{"text": "fine"}', encoding="utf-8")
    (folder / "d.png").write_bytes(b"\x89PNG\0")
    (folder / "e.json").write_text("[" * 100_000, encoding="utf-8")
    prepare_data.main([str(folder), f"--out={tmp_path}/data"])
    assert re.search("read 5 files; skipped 5 .* the first: .*a.txt", capsys.readouterr().out)
    found = documents_in(prepare_data.open_data(tmp_path / "data"))
    whole = found["train"][0] + found["val"][0]
    assert whole == clean(story(300))
    assert found["train"][1:] + found["val"][1:] == ["fine"]


BAD_INPUTS = {  # file: (content, what the error must name)
    "blank.txt": (b" \n\n\t", "too little text"),
    "binary.txt": (b"\x89PNG\0", "binary.txt.*utf-8"),
    "latin.txt": ("café".encode("latin-1"), "latin.txt.*position 3.*iconv"),
    "broken.json": (b'[{"text": "a"},\n {"text"}]', "broken.json.*line 2"),
    "field.jsonl": (b'{"body": "a", "id": 1}', "field.jsonl, line 1.*'text'.*body"),
    "list.json": (b"[1]", "list.json.*of 1"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_single_bad_input_is_refused_and_the_earlier_folder_survives(name, tmp_path):
    prepare(tmp_path / "data", story(200))
    before = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    content, message = BAD_INPUTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        prepare_data.main([f"{tmp_path}/{name}", f"--out={tmp_path}/data"])
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_missing_input_is_refused_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text(story(200), encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("requests.get", lambda url: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    for flags, message in [
        (["gone.txt"], "no such file"),
        (["empty"], "no files"),
        (["pipe"], "pipe"),
        (["a.txt", "--tokenizer=gpt9"], "gpt9.*gpt2"),
        (["a.txt", "--tokenizer=r50k_base"], r"TIKTOKEN_CACHE_DIR.*--tokenizer=bpe"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare_data.main(flags)


def test_a_page_is_downloaded_once_and_kept(tmp_path):
    (tmp_path / "page").write_text("<html><p>hello</p>")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    with web_server(tmp_path) as (url, asked):
        for _ in range(2):
            assert documents_of(f"{url}/page", f"{url}/a.jsonl?raw=true") == ["hello", "one"]
        with pytest.raises(ValueError, match="404"):
            documents_of(f"{url}/nothing")
    assert asked == ["/page", "/a.jsonl?raw=true", "/nothing"]


# --- the data folder ------------------------------------------------------------------------------


def test_shards_hold_the_whole_text_in_the_order_of_its_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 100)
    texts = [clean(story(100, seed=i)) for i in range(30)]
    meta = prepare(tmp_path / "data", "<|endoftext|>".join(texts))
    assert len(meta["splits"]["train"]["shards"]) > 3
    found = documents_in(meta)
    # each is more than 1/200 of the text and gives its last tenth
    assert [start + end for start, end in zip(found["train"], found["val"])] == texts
    assert abs(meta["splits"]["val"]["bytes"] / len("".join(texts)) - 0.1) < 0.02


def test_a_document_encoded_in_parts_counts_once(tmp_path):
    splits = prepare(tmp_path / "data", story(20_000))["splits"]
    assert len(story(20_000)) > 2**16  # the length of a part
    assert [splits[name]["documents"] for name in ("train", "val")] == [1, 1]


def test_documents_keep_to_one_split_and_duplicates_are_dropped(tmp_path, capsys):
    documents = [f"{clean(story(30, seed=i))} {i}é" for i in range(300)]
    rows = [{"text": document} for document in documents + documents[:50]]
    write_rows(tmp_path / "a.jsonl", rows)
    prepare_data.main([f"{tmp_path}/a.jsonl", f"--out={tmp_path}/data"])
    assert "50 duplicates" in capsys.readouterr().out
    meta = prepare_data.open_data(tmp_path / "data")
    found = documents_in(meta)
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert 10 < len(found["val"]) < 60
    for split, stats in meta["splits"].items():
        assert stats["documents"] == len(found[split])
        assert stats["bytes"] == sum(len(text.encode()) for text in found[split])


def test_a_novel_among_notes_gives_its_last_tenth(tmp_path):
    notes, novel = [f"note {i}" for i in range(299)], clean(story(5000))
    for seed in range(3):  # wherever its hash may fall
        text = novel + f" {seed}"
        found = documents_in(prepare(tmp_path / "data", "<|endoftext|>".join([*notes, text])))
        (end,) = (document for document in found["val"] if "note" not in document)
        assert text.endswith(end)
        assert 0.09 < len(end) / len(text) < 0.11


def test_held_out_text_does_not_choose_the_tokens(tmp_path):
    text = story(1000) + " xyzzy" * 100  # all of these lie in the last tenth
    learned = prepare(tmp_path / "data", text)["tokenizer"]["tokens"][256:]
    assert learned
    assert not any("xy" in token for token in learned)


def test_a_sample_for_the_bpe_is_spread_over_the_training_text(monkeypatch):
    counted = []
    monkeypatch.setattr(prepare_data, "train_bpe", lambda texts, n: counted.extend(texts) or {})
    texts = [story(100, seed=i) for i in range(400)]
    size = len("".join(texts))
    config = prepare_data.PrepareConfig(bpe_sample_mb=size / 5e6)
    documents = [("train", text) for text in texts] + [("val", f"no {i}") for i in range(50)]
    prepare_data.train_tokenizer(documents, size, config)
    assert 50 < len(counted) < 110
    assert set(counted) <= set(texts)
    assert set(counted) & set(texts[:100]) and set(counted) & set(texts[300:])


def test_the_manual_is_held_out_by_module(monkeypatch):
    entries = [(f"m{i}", f"m{i}.f{j}", f"Text {i} {j}.") for i in range(60) for j in range(2)]
    monkeypatch.setattr(prepare_data, "library_docstrings", lambda: entries)
    config, dropped = prepare_data.PrepareConfig(), collections.Counter()
    pages = list(prepare_data.split_documents([], config, None, dropped))
    for module in {module for module, _, _ in entries}:
        (split,) = {split for split, text in pages if f"# {module}.f" in text}
        assert split == ("val" if prepare_data.position(module) < 0.2 else "train")


@pytest.mark.parametrize("n, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_a_vocabulary_above_65536_takes_four_bytes_a_token(n, dtype, tmp_path):
    learned = [*map(chr, range(256)), *(f"{i:06}" for i in range(n - 257))]
    spec = {"name": "bpe", "tokens": learned, "special_tokens": ["<|endoftext|>"]}
    documents = [("train", "a"), ("val", "b")]
    prepare_data.write_shards(documents, build_tokenizer(spec), tmp_path)
    shard = np.load(tmp_path / "val_00000.npy.tmp")
    assert shard.dtype.name == dtype
    assert shard.tolist() == [98, n - 1]


def test_preparing_anew_replaces_its_own_files_and_no_others(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    others = {"instruct.jsonl", ".gitignore", "train_0.npy", "x.npy", "inner.txt"}
    for name in others:
        (folder / name).write_text("mine")
    prepare(folder / "inner", story(300))
    inode = folder.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "SHARD_TOKENS", 100)
        assert len(prepare(folder, story(2000))["splits"]["train"]["shards"]) > 1
    prepare(folder, story(300))
    assert folder.stat().st_ino == inode  # the folder may be a mount point
    assert all((folder / name).read_text() for name in others)
    prepare_data.open_data(folder / "inner")
    ours = {"meta.json", "train_00000.npy", "val_00000.npy", ".lock", "inner"}
    assert {path.name for path in folder.iterdir()} == ours | others


@pytest.mark.parametrize("text", ["{}", "[1]", "not JSON"])
def test_a_meta_json_of_others_is_never_replaced(text, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="meta.json"):
        prepare(tmp_path / "site", story(300))
    assert (tmp_path / "site" / "meta.json").read_text() == text


def test_shards_of_others_are_neither_read_nor_removed(data_folder, tmp_path):
    prepare(tmp_path / "data", story(300))
    shutil.copy(data_folder / "train_00000.npy", tmp_path)
    path = tmp_path / "data" / "meta.json"
    path.write_text(path.read_text().replace('"train_0', '"../train_0'))
    with pytest.raises(ValueError, match="invalid shard names"):
        prepare_data.open_data(tmp_path / "data")
    prepare(tmp_path / "data", story(300))
    shutil.move(tmp_path / "train_00000.npy", tmp_path / "data" / "train_00000.npy")
    with pytest.raises(ValueError, match="the shards are not what meta.json says"):
        prepare_data.open_data(tmp_path / "data")


def test_a_kill_before_any_file_operation_leaves_whole_data_or_none(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def counted(operation):
        def count_down(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return operation(*args, **kwargs)

        return count_down

    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 150)
    texts, left = [story(n, seed=n) for n in (300, 400)], [0]
    whole = [documents_in(prepare(tmp_path / "data", text)) for text in texts]
    for n in range(40):
        left[0] = n
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for owner in (os, pathlib.Path):
                for name in ("replace", "unlink"):
                    patch.setattr(owner, name, counted(getattr(owner, name)))
            prepare(tmp_path / "data", texts[n % 2])
        try:
            assert documents_in(prepare_data.open_data(tmp_path / "data")) in whole
        except FileNotFoundError as error:
            assert "prepare_data.py" in str(error)
        if left[0] >= 0:  # all operations were done
            return
        assert documents_in(prepare(tmp_path / "data", texts[0])) == whole[0]
    raise AssertionError("there are more operations than this test counts")


def test_the_default_data_is_made_only_in_an_empty_place(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(prepare_data, "main", made.append)
    (tmp_path / "book.txt").touch()
    for data, file, is_made in [
        ("data", None, True),
        ("data", "data/.lock", True),
        ("data", "data/train_00000.npy", False),
        ("book.txt", None, False),
    ]:
        if file:
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / file).touch()
        with pytest.raises(FileNotFoundError, match=r"prepare_data.py \S+ --out="):
            train.main([f"--data={data}"])
        assert bool(made) == is_made
        made.clear()


# --- training -------------------------------------------------------------------------------------


def test_every_window_comes_once_an_epoch_and_none_crosses_a_shard():
    ends = [37, 45, 129, 139]
    shards = [np.arange(start, end) for start, end in itertools.pairwise([0, *ends])]
    windows = train.Windows(shards, block_size=8, vocab_size=139, seed=3)
    assert windows.per_epoch == 3 + 0 + 9 + 1
    epochs = []
    for epoch in range(3):
        idx, targets = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        assert torch.equal(targets, idx + 1)
        shard_of = lambda ids: np.searchsorted(ends, ids.numpy(), side="right")
        assert (shard_of(idx) == shard_of(targets)).all()
        assert len(set(targets.flatten().tolist())) == targets.numel()  # none is a target twice
        epochs.append(idx[:, 0].tolist())
    assert epochs[0] != sorted(epochs[0])
    assert sorted(epochs[0]) != sorted(epochs[1])  # epochs differ in their phase, too


def test_windows_are_a_function_of_seed_and_number():
    def first_36(seed, size):
        windows = train.Windows([np.arange(100)], 8, 100, seed)
        return torch.cat([windows.batch(n, size)[0] for n in range(0, 36, size)])

    assert torch.equal(first_36(3, 1), first_36(3, 12))
    assert not torch.equal(first_36(3, 12), first_36(4, 12))
    train.Windows([np.full(100, 7)], 8, vocab_size=8).batch(0, 1)
    with pytest.raises(ValueError, match="shard is damaged"):
        train.Windows([np.full(100, 8)], 8, vocab_size=8).batch(0, 1)


def test_a_resumed_run_repeats_no_window_whatever_its_accumulation(
    data_folder, tmp_path, monkeypatch
):
    numbers, batch = [], train.Windows.batch

    def record(windows, first, count):
        numbers.extend(range(first, first + count))
        return batch(windows, first, count)

    monkeypatch.setattr(train.Windows, "batch", record)
    run_training(data_folder, tmp_path, "--max_iters=4", "--gradient_accumulation_steps=3")
    resume(tmp_path, "--max_iters=6", "--batch_size=2", "--gradient_accumulation_steps=1")
    assert numbers == list(range(4 * 3 * 4 + 2 * 2))


def test_accumulated_micro_batches_are_one_large_batch(data_folder, tmp_path):
    weights = []
    for k in (1, 4):
        batch = [f"--batch_size={8 // k}", f"--gradient_accumulation_steps={k}", "--dropout=0"]
        weights.append(run_training(data_folder, tmp_path / str(k), *batch)["model"])
    assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_dropout_is_drawn_anew_in_every_step(data_folder, tmp_path, monkeypatch):
    seeds, updates = [], train.Pretraining.updates
    record = lambda task, state: seeds.append(torch.initial_seed()) or updates(task, state)
    monkeypatch.setattr(train.Pretraining, "updates", record)
    run_training(data_folder, tmp_path / "a", "--max_iters=6")
    assert len(set(seeds)) == 6
    run_training(data_folder, tmp_path / "b", "--max_iters=6", "--seed=2")
    assert len(set(seeds)) == 12


def test_logging_and_evaluating_more_often_changes_no_weight(data_folder, tmp_path):
    weights = []
    for n in ("20", "1"):
        flags = [f"--eval_interval={n}", f"--log_interval={n}"]
        weights.append(run_training(data_folder, tmp_path / n, *flags)["model"])
    assert_equal(*weights)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_minimum():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100)
    rates = [train.learning_rate_at(step, config) for step in range(120)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[98] > 0.1
    assert rates[99:] == pytest.approx([0.1] * 21)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    for warmup in (0, 99, 100, 200):  # nothing is divided by zero
        config = train.TrainConfig(learning_rate=1e-3, warmup_iters=warmup, max_iters=100)
        assert all(0 < train.learning_rate_at(step, config) <= 1e-3 for step in range(100))


def test_weight_decay_is_on_matrices_alone_and_scales_multiply_the_rate(data_folder, tmp_path):
    model, seen = tiny_model(), 0
    optimizer = train.configure_optimizer(model, 1e-3, 0.1, (0.9, 0.95), {"wte.weight": 20})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() == 2 else 0.0)
            assert group["lr_scale"] == (20 if parameter is model.transformer.wte.weight else 1)
            seen += parameter.numel()
    assert seen == sum(parameter.numel() for parameter in model.parameters())
    flags = ["--max_iters=1", "--warmup_iters=0", "--learning_rate=0.01", "--min_lr=0.01"]
    last = run_training(data_folder, tmp_path, *flags)
    rates = {group["lr_scale"]: group["lr"] for group in last["optimizer"]["param_groups"]}
    assert rates == {scale: pytest.approx(0.01 * scale) for scale in (1, 4, 20)}


def test_the_gradient_is_clipped_to_its_limit(data_folder, tmp_path):
    flags = ["--max_iters=1", "--beta1=0", "--grad_clip=0.001"]
    moments = run_training(data_folder, tmp_path, *flags)["optimizer"]["state"].values()
    clipped = sum(moment["exp_avg"].square().sum() for moment in moments).sqrt()
    assert clipped.item() == pytest.approx(0.001, rel=0.01)
    assert column(tmp_path, "grad_norm")[0] > 0.01  # before


def test_every_step_is_counted_and_the_last_one_evaluated(data_folder, tmp_path):
    flags = ["--max_iters=13", "--eval_interval=5", "--log_interval=2"]
    last = run_training(data_folder, tmp_path, *flags)
    assert last["state"]["step"] == 13
    assert all(state["step"] == 13 for state in last["optimizer"]["state"].values())
    assert column(tmp_path, "step") == [2, 4, 5, 6, 8, 10, 12, 13]
    assert column(tmp_path, "tokens") == [64 * step for step in column(tmp_path, "step")]
    losses = column(tmp_path, "val_loss")
    assert len(losses) == 3
    assert last["state"]["best_val_loss"] == min(losses)
    assert column(tmp_path, "val_perplexity") == pytest.approx(list(map(math.exp, losses)))
    val = prepare_data.open_data(data_folder)["splits"]["val"]
    bits = losses[0] / math.log(2) * val["tokens"]
    assert column(tmp_path, "val_bpb")[0] == pytest.approx(bits / val["bytes"])
    assert train.perplexity(1e4) == math.inf


def test_evaluation_reads_evenly_spaced_windows(data_folder, base, monkeypatch):
    numbers, read = [], train.Windows.read
    record = lambda self, windows: numbers.extend(windows) or read(self, windows)
    monkeypatch.setattr(train.Windows, "read", record)
    train.main([f"--data={data_folder}", f"--init_from={base}", *SMALL, "--eval_only"])
    val = prepare_data.open_data(data_folder)["splits"]["val"]
    last = train.Windows(val["arrays"], 16, 284).per_epoch - 1
    assert numbers == pytest.approx(np.linspace(0, last, 3 * 4), abs=1)
    assert numbers[-1] == last


def test_training_learns_and_sample_writes(data_folder, tmp_path, capsys):
    run_training(data_folder, tmp_path, "--max_iters=150", "--learning_rate=1e-2", "--dropout=0")
    losses = column(tmp_path, "val_loss")
    assert losses[-1] < losses[0] - 1
    capsys.readouterr()
    sample.main([f"--init_from={tmp_path}", "--start=the cat", "--max_new_tokens=40"])
    out, err = capsys.readouterr()
    assert out.startswith("the cat")
    assert sum(word in out for word in WORDS) > 5
    assert re.search(r"^\d+ tokens in [\d.]+ s: [\d,]+ tokens/s$", err.splitlines()[-1])


def test_training_stops_when_patience_has_run_out_and_keeps_the_best(data_folder, tmp_path):
    flags = ["--patience=2", "--learning_rate=0", "--max_iters=90"]
    assert run_training(data_folder, tmp_path, *flags)["state"]["step"] == 30  # after 10, 20, 30
    assert resume(tmp_path, "--patience=4")["state"]["step"] == 50
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 10


def test_training_can_begin_with_another_runs_weights(data_folder, tmp_path, capsys):
    first = run_training(data_folder, tmp_path / "a")
    use = f"--init_from={tmp_path}/a"
    capsys.readouterr()
    train.main([f"--data={data_folder}", use, *SMALL, "--eval_only"])
    assert f"{first['state']['best_val_loss']:.4f}" in capsys.readouterr().out
    second = run_training(data_folder, tmp_path / "b", use)
    assert second["state"]["best_val_loss"] < first["state"]["best_val_loss"]


def test_an_earlier_run_is_moved_aside_by_the_first_save_of_the_next(data_folder, tmp_path):
    first = run_training(data_folder, tmp_path)["model"]
    for _ in range(2):  # runs that never save
        with pytest.raises(ValueError, match="stopped at step"):
            run_training(data_folder, tmp_path, "--learning_rate=1e30", "--grad_clip=0")
        assert_equal(first, load_checkpoint(tmp_path / "last.pt")["model"])
    run_training(data_folder, tmp_path, "--seed=2", "--max_iters=5")
    assert resume(tmp_path, "--max_iters=9")["state"]["step"] == 9
    assert_equal(first, load_checkpoint(tmp_path / "previous" / "last.pt")["model"])


def test_a_resumed_run_keeps_the_dtype_that_it_began_with(data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "pick_dtype", lambda device: torch.bfloat16)
    run_training(data_folder, tmp_path, "--dtype=")
    monkeypatch.setattr(train, "pick_dtype", lambda device: torch.float32)
    assert resume(tmp_path, "--max_iters=25")["run_config"]["dtype"] == "bfloat16"


def assert_same_run(a, b):
    assert_equal([a["model"], a["optimizer"]], [b["model"], b["optimizer"]])
    assert a["state"]["best_val_loss"] == b["state"]["best_val_loss"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves(number, data_folder, tmp_path, monkeypatch):
    updates = train.Pretraining.updates

    def updates_and_kill(task, state):
        yield from updates(task, state)
        if state["step"] == 6:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train.Pretraining, "updates", updates_and_kill)
        run_training(data_folder, tmp_path / "parts")
    assert stopped.value.code == 128 + number
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["state"]["step"] == 7
    assert_same_run(resume(tmp_path / "parts"), run_training(data_folder, tmp_path / "whole"))


def test_a_killed_run_resumes_to_the_same_bits(data_folder, tmp_path):
    out, flags = tmp_path / "killed", ["--eval_interval=2", "--eval_iters=1", "--max_iters=60"]
    run = start("train.py", f"--data={data_folder}", f"--out_dir={out}", *SMALL, *flags)
    wait_for(run, (out / "last.pt").exists)
    run.kill()
    run.wait()
    assert load_checkpoint(out / "last.pt")["state"]["step"] < 60
    assert_same_run(resume(out), run_training(data_folder, tmp_path, *flags))


def test_two_processes_train_as_one_until_a_signal_stops_both_and_one_continues(
    data_folder, tmp_path
):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [f"--data={data_folder}", *SMALL, "--dropout=0", "--log_interval=1"]
    flags += ["--lr_decay_iters=100", "--eval_iters=100"]
    run = start(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"),
        *(*flags, f"--out_dir={two}", "--max_iters=100000"),
    )
    wait_for(run, (two / "metrics.csv").exists)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) != 0
    last = f"--max_iters={load_checkpoint(two / 'last.pt')['state']['step'] + 10}"
    weights = resume(two, last, "--gradient_accumulation_steps=2")["model"]
    train.main([*flags, f"--out_dir={one}", last, "--batch_size=8"])
    for name in ("train_loss", "val_loss"):
        assert column(one, name) == pytest.approx(column(two, name), abs=1e-4)
    assert_close(load_checkpoint(one / "last.pt")["model"], weights, atol=1e-4, rtol=0)


def test_a_run_begins_with_four_lines_about_its_size(data_folder, tmp_path, capsys):
    run_training(data_folder, tmp_path, "--max_iters=2")
    lines = capsys.readouterr().out.splitlines()
    weights = {name: w.numel() for name, w in GPT.from_pretrained(tmp_path).named_parameters()}
    total = sum(weights.values()) - weights["transformer.wpe.weight"]
    n_tokens = 2 * 4 * 16
    # forward and backward: 6 operations for each weight in a product, and attention's products
    flops = 6 * (total - weights["transformer.wte.weight"]) + 12 * 16 * 16
    train_split = prepare_data.open_data(data_folder)["splits"]["train"]
    epochs = n_tokens / train_split["tokens"]
    assert lines[0].startswith(f"{total:,} parameters")
    assert lines[1] == f"{n_tokens} tokens of training: {epochs:.1f} epochs"
    assert f"{flops:,} " in lines[2]
    assert lines[3].startswith(f"{n_tokens / total:.1f} tokens ")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_one_line_on_a_terminal_and_many_in_a_pipe(
    is_terminal, data_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    run_training(data_folder, tmp_path, "--log_interval=2", "--max_iters=8")
    shown = capsys.readouterr().out
    assert shown.count("step ") == 4
    assert len(re.findall(r"step +\d.*?\r", shown)) == 3 * is_terminal


# --- sampling -------------------------------------------------------------------------------------


def load_for_sampling(path):
    """-> model, tokenizer, checkpoint."""
    return sample.load_model(sample.SampleConfig(init_from=str(path), device="cpu"))


def test_the_same_seed_writes_the_same_samples_all_of_them_different(base, capsys):
    flags = [f"--init_from={base}", "--num_samples=3", "--max_new_tokens=10"]
    outputs = []
    for seed in (5, 5, 6):
        sample.main([*flags, f"--seed={seed}"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(set(outputs[0].split("-" * 80))) == 3


def test_tokens_that_only_pad_the_vocabulary_are_never_sampled(base, tmp_path):
    checkpoint = load_checkpoint(base)
    model = GPT.from_checkpoint(checkpoint)
    known = model.config.vocab_size
    model.resize(vocab_size=known + 44)
    model.lm_head.weight.data[known:] = 100 * model.lm_head.weight[:44]
    gpt.save_checkpoint(tmp_path / "best.pt", {**checkpoint, **model.checkpoint()})
    assert model(tokens(4, 8)).argmax(-1).max() >= known
    assert load_for_sampling(tmp_path)[0](tokens(4, 8)).size(-1) == known


def test_a_small_model_is_sampled_on_one_thread(base):
    torch.set_num_threads(2)
    load_for_sampling(base)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("seconds", "n_embd", "threads"), [(0.5, 16, 2), (1, 16, 1), (9, 512, 2)])
def test_a_small_model_is_trained_on_one_thread_where_two_are_no_faster(
    seconds, n_embd, threads, monkeypatch
):
    now = itertools.accumulate(seconds if torch.get_num_threads() == 2 else 1 for _ in range(9))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(now))
    torch.set_num_threads(2)
    assert train.pick_threads(GPT(GPTConfig(**{**TINY, "n_embd": n_embd}))) == threads
    torch.set_num_threads(1)


def test_a_character_of_several_tokens_is_written_when_it_is_complete(base, capsys, monkeypatch):
    model, tokenizer, _ = load_for_sampling(base)
    written = [*"漢a😀".encode(), 0xFF, tokenizer.eot_token]  # bytes are the first tokens
    monkeypatch.setattr(model, "generate", lambda *args: (torch.tensor([t]) for t in written))
    texts, count = sample.write(model, tokenizer, [1], sample.SampleConfig(), None)
    assert texts == ["漢a😀�"]
    assert capsys.readouterr().out == "漢a😀�\n"
    assert count == len(written) - 1


@pytest.mark.parametrize("n_embd, dtype", [(512, torch.bfloat16), (256, torch.float32)])
def test_large_models_are_sampled_in_the_fastest_dtype(n_embd, dtype, base, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "pick_dtype", lambda device: torch.bfloat16)
    model = GPT(GPTConfig(**{**TINY, "n_embd": n_embd, "vocab_size": 284, "n_layer": 1}))
    spec = load_checkpoint(base)["tokenizer"]
    gpt.save_checkpoint(tmp_path / "best.pt", {**model.checkpoint(), "tokenizer": spec})
    assert load_for_sampling(tmp_path)[0].lm_head.weight.dtype == dtype


def test_surprise_is_the_models_own_probability(base, capsys):
    model, tokenizer, _ = load_for_sampling(base)
    text = story(50)  # longer than the context: of its tokens, 16 count
    idx = torch.tensor([[tokenizer.eot_token, *tokenizer.encode(text)[:16]]])
    sample.main([f"--init_from={base}", f"--start={text}", "--surprise", "--device=cpu"])
    _, *lines, summary = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    bits = model(idx[:, :-1], idx[:, 1:]).item() * 16 / math.log(2)
    n_bytes = len(tokenizer.decode(idx[0, 1:].tolist()))
    assert summary.startswith(f"{bits:.1f} bits in {n_bytes} bytes")
    probabilities = model(idx[:, :1])[0, 0].softmax(-1)
    rank = (probabilities > probabilities[idx[0, 1]]).sum() + 1
    assert re.search(f"{probabilities[idx[0, 1]]:.4f} +{rank} ", lines[0])


def test_pictures_are_drawn_where_there_is_matplotlib(base, tmp_path, data_folder, monkeypatch):
    from matplotlib.axes import Axes
    from PIL import Image

    text, shown = "the cat sees", []
    draw = [f"--init_from={base}", f"--start={text}", f"--attention={tmp_path}/a.png"]
    with pytest.raises(ValueError, match="pip install matplotlib"):
        sample.main(draw)
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    run_training(data_folder, tmp_path / "o")
    sample.main(draw)
    for path in (tmp_path / "a.png", tmp_path / "o" / "loss.png"):
        Image.open(path).load()  # decodes all of it, and fails where something is amiss
    monkeypatch.setattr(Axes, "imshow", lambda panel, image, **how: shown.append(image))
    sample.main(draw)
    model, tokenizer, _ = load_for_sampling(base)
    block, idx = model.transformer.h[0], torch.tensor([tokenizer.encode_ordinary(text)])
    x = block.ln_1(model.transformer.wte(idx) + model.transformer.wpe.weight[: idx.size(1)])
    assert_close(
        torch.stack([*map(torch.from_numpy, shown)]),
        gpt.attention_weights(*block.attn.heads(x)[:2])[0],
    )


def test_a_conversation_forgets_its_oldest_exchanges_but_not_the_system_prompt(base):
    _, tokenizer, _ = load_for_sampling(base)
    system = [{"role": "system", "content": "be kind"}]
    said = [{"role": ("user", "assistant")[i % 2], "content": f"word {i}"} for i in range(5)]
    whole = sample.fitting_prompt(system + said, tokenizer, "roles", 10**6)
    assert whole == prepare_data.chat_prompt(system + said, tokenizer, "roles")
    shorter = sample.fitting_prompt(system + said, tokenizer, "roles", len(whole) - 1)
    assert shorter == prepare_data.chat_prompt(system + said[2:], tokenizer, "roles")
    assert sample.fitting_prompt(said[-1:], tokenizer, "roles", 3) == whole[-3:]


def test_a_chat_answers_each_line_but_not_empty_ones(base, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\n  \nthe dog\n"))
    asked = []
    fit = lambda messages, *rest: asked.append([m["content"] for m in messages]) or [1]
    monkeypatch.setattr(sample, "fitting_prompt", fit)
    sample.main([f"--init_from={base}", "--chat", "--max_new_tokens=5", "--system=be kind"])
    first, second = asked
    assert first == ["be kind", "the cat"]
    assert second[:2] + second[3:] == [*first, "the dog"]
    assert second[2] in capsys.readouterr().out


# --- other people's models ------------------------------------------------------------------------


def far_from_new(model):
    """The model with every parameter, also biases, at a value of its own."""
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 10
    return model.eval()


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_transformers_computes_the_same_logits(bias, tie_weights, tmp_path):
    import transformers

    model, idx = far_from_new(tiny_model(bias=bias, tie_weights=tie_weights)), tokens(2, 16)
    model.save_pretrained(tmp_path, eos_token_id=49)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(theirs(idx).logits, model(idx), atol=1e-5, rtol=0)
    assert theirs.config.eos_token_id == 49
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx), model(idx))
    far_from_new(theirs).save_pretrained(tmp_path)  # also biases that were not there
    assert_close(theirs(idx).logits, GPT.from_pretrained(tmp_path)(idx), atol=1e-5, rtol=0)


def test_weights_in_half_precision_and_without_the_prefix_are_read_too(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    theirs = far_from_new(transformers.GPT2LMHeadModel(config)).half()
    # the body alone has no "transformer." before its names, as OpenAI's weights have none
    theirs.transformer.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path / "model.safetensors"), tokens(2, 16)
    assert_close(theirs.float()(idx).logits, ours(idx), atol=1e-5, rtol=0)


def test_our_safetensors_files_and_the_packages_are_interchangeable(tmp_path):
    import safetensors.torch

    path, kinds = tmp_path / "x.safetensors", (torch.half, torch.bfloat16, torch.float32)
    tensors = {str(kind): torch.randn(3, 5).to(kind) for kind in kinds}
    gpt.write_safetensors(path, tensors)
    assert_equal(safetensors.torch.load_file(path), tensors)
    safetensors.torch.save_file(tensors, path)
    assert_equal(gpt.read_safetensors(path), tensors)
    data = path.read_bytes()  # one more space in the header, and nothing is aligned
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size] + b" "
    path.write_bytes((size + 1).to_bytes(8, "little") + header + data[8 + size :])
    assert_equal(gpt.read_safetensors(path), tensors)


def safetensors_file(changes=None, data=b"\0" * 8, length=None):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | (changes or {})
    header = json.dumps({"a": entry}).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


BAD_SAFETENSORS = {
    "empty": b"",
    "header longer than the file": safetensors_file(length=10**6),
    "data cut off": safetensors_file(data=b"\0" * 7),
    "out of bounds": safetensors_file({"shape": [4], "data_offsets": [0, 16]}),
    "before the file": safetensors_file({"data_offsets": [-(10**6), 0]}),
    "shape and length disagree": safetensors_file({"shape": [3]}),
    "shape that overflows": safetensors_file({"shape": [2**62, 4]}),
    "not JSON": (8).to_bytes(8, "little") + b"{{{{{{{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_a_malformed_safetensors_file_is_refused(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_SAFETENSORS[name])
    with pytest.raises(ValueError, match="damaged"):
        gpt.read_safetensors(path)


def test_a_model_of_another_architecture_is_refused_with_the_reason(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    good = (tmp_path / "config.json").read_text()
    for old, new, complaint in [
        ('"gpt2"', '"llama"', "model_type is 'llama'"),
        ("gelu_new", "relu", "activation_function is 'relu'"),
        ("1e-05", "1e-12", "layer_norm_epsilon"),
        ('"n_layer": 2', '"n_layer": 3', "Missing key"),
        ('"n_layer": 2', '"n_layer": 1', "Unexpected key"),
        ('"n_embd": 16', '"n_embd": 18', "size mismatch"),
        ('"n_head": 2', f'"n_head": {2**63}', "damaged"),
        ("{", "[", "config.json: damaged"),
    ]:
        (tmp_path / "config.json").write_text(good.replace(old, new))
        with pytest.raises(ValueError, match=complaint):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        GPT.from_pretrained(tmp_path)


def test_weights_of_a_kind_that_no_product_takes_are_refused_or_made_float32():
    checkpoint, idx, name = tiny_model().checkpoint(), tokens(1, 4), "transformer.h.0.mlp.c_fc.bias"
    good = checkpoint["model"]
    for change in (torch.Tensor.double, torch.Tensor.half):
        mixed = GPT.from_checkpoint({**checkpoint, "model": good | {name: change(good[name])}})
        assert_close(mixed(idx), GPT.from_checkpoint(checkpoint)(idx), atol=1e-2, rtol=0)
    for change in (torch.Tensor.to_sparse, lambda w: w.to("meta")):
        with pytest.raises(ValueError, match="plain"):
            GPT.from_checkpoint({**checkpoint, "model": good | {name: change(good[name])}})


def test_transformers_makes_the_same_tokens(tmp_path):
    import transformers

    spec = bpe_spec(train_bpe([story(2000), pathlib.Path(__file__).read_text("utf-8")], 700))
    prepare_data.save_tokenizer(spec, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    ours, theirs = build_tokenizer(spec), transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for text in [any_text(rng, rng.randrange(60)) for _ in range(200)]:
        assert theirs(text)["input_ids"] == ours.encode_ordinary(text)
    assert theirs.convert_tokens_to_ids("<|endoftext|>") == ours.eot_token
    assert prepare_data.read_tokenizer(tmp_path) == spec
    theirs.save_pretrained(tmp_path / "again")
    assert prepare_data.read_tokenizer(tmp_path / "again") == spec


def test_tokenizers_of_another_kind_are_refused(tmp_path):
    prepare_data.save_tokenizer(bpe_spec(train_bpe([story(200)], 260)), tmp_path)
    path = tmp_path / "tokenizer.json"
    good = path.read_text("utf-8")
    for old, new in [
        ('"use_regex": true', '"use_regex": false'),
        ('"add_prefix_space": false', '"add_prefix_space": true'),
        ('"ByteLevel"', '"Whitespace"'),
        ('"A": 65', '"A": 66'),
        ('"A": 65, ', ""),
        ("{", "["),
    ]:
        assert old in good
        path.write_text(good.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(ValueError, match="tokenizer.json: damaged"):
            prepare_data.read_tokenizer(tmp_path)


def test_a_model_goes_out_and_comes_back_offline(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", None)  # would need the network
    sample.main([f"--init_from={base}", f"--save_pretrained={tmp_path}/hf"])
    texts = []
    for path in (base, f"{tmp_path}/hf", f"{tmp_path}/hf/model.safetensors"):
        capsys.readouterr()
        sample.main([f"--init_from={path}", "--max_new_tokens=20"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    prepare(tmp_path / "data", story(4000), f"--tokenizer={tmp_path}/hf")
    flags = [f"--init_from={tmp_path}/hf", "--block_size=8", "--dropout=0.2", "--max_iters=5"]
    train.main([f"--data={tmp_path}/data", f"--out_dir={tmp_path}/more", *flags])
    more = load_checkpoint(tmp_path / "more" / "last.pt")
    assert (more["config"]["block_size"], more["config"]["dropout"]) == (8, 0.2)
    assert len(more["model"]["transformer.wpe.weight"]) == 8


def test_an_export_into_a_run_does_not_hide_the_run(base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    tiny_model().save_pretrained(tmp_path / "out")
    assert_equal(load_checkpoint(tmp_path / "out")["model"], load_checkpoint(base)["model"])


def test_gpt2_is_downloaded_once_and_only_whole(tmp_path, monkeypatch):
    model, idx = far_from_new(tiny_model()), tokens(2, 16)
    folder = tmp_path / "hub/openai-community/gpt2/resolve/main"
    model.save_pretrained(folder)
    path, cache = folder / "model.safetensors", tmp_path / "cache"
    weights = path.read_bytes()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache))
    with web_server(tmp_path / "hub") as (url, asked):
        monkeypatch.setenv("HF_ENDPOINT", url)
        for broken in (weights[:-4], b"<html>too many requests</html>"):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match="cannot be downloaded"):
                load_checkpoint("gpt2")
            assert not (cache / "gpt2" / "model.safetensors").exists()
        path.write_bytes(weights)
        for _ in range(2):
            assert torch.equal(GPT.from_pretrained("gpt2")(idx), model(idx))
        assert [path.count("safetensors") for path in asked] == [0, 1, 1, 1]


# --- fine-tuning ----------------------------------------------------------------------------------


def labeled(n):
    """Texts that have "cat" or "dog" in them, which is their label."""
    rng = random.Random(1)
    others = [word for word in WORDS if word not in ("cat", "dog")]
    rows = []
    for i in range(n):
        words = rng.choices(others, k=rng.randrange(2, 6)) + [("cat", "dog")[i % 2]]
        rng.shuffle(words)
        rows.append({"text": " ".join(words) + f" {i}", "label": ("cat", "dog")[i % 2]})
    return rows


def asked(n):
    """Instructions with their answers."""
    return [{"instruction": f"say {WORDS[i % 12]} {i}", "output": WORDS[i % 12]} for i in range(n)]


def preferred(n):
    """Instructions whose better answers are other words than the worse ones."""
    rows = [{"chosen": WORDS[i % 6], "rejected": f"{WORDS[6 + i % 5]} {i}"} for i in range(n)]
    return [{"instruction": f"say {i}", **row} for i, row in enumerate(rows)]


FEW = ["--max_iters=12", "--eval_interval=6", "--batch_size=4", "--warmup_iters=2"]
FEW += ["--max_new_tokens=5", "--device=cpu", "--dtype=float32"]


def run_finetune(base, out_dir, rows, *flags):
    """finetune.py for 12 steps -> (last.pt, best.pt)."""
    out_dir.mkdir(parents=True, exist_ok=True)
    data = write_rows(out_dir / "x.jsonl", rows)
    finetune.main([f"--init_from={base}", f"--out_dir={out_dir}", f"--data={data}", *FEW, *flags])
    return [load_checkpoint(out_dir / name) for name in ("last.pt", "best.pt")]


def make_task(base, rows, **settings):
    """A task as main() makes it, ready to train."""
    data = write_rows(pathlib.Path("x.jsonl"), rows)
    settings = {"data": str(data), "device": "cpu", "dtype": "float32", **settings}
    config = finetune.FinetuneConfig(init_from=str(base), **settings)
    finetune.settle(config)
    task = finetune.TASKS[config.task](config, train.Machine(config), load_checkpoint(base))
    task.prepare()
    return task


def lora_model(b=0.0):
    """A tiny model with LoRA, whose B matrices are about b."""
    model = tiny_model()
    finetune.add_lora(model, rank=2, alpha=4.0, dropout=0.0)
    for name, parameter in model.named_parameters():
        if b and name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=b)
    return model


def test_lora_changes_nothing_at_first():
    torch.manual_seed(1)
    plain, idx = tiny_model(), tokens(2, 16)
    torch.manual_seed(1)
    model = lora_model()
    assert torch.equal(plain(idx), model(idx))


def test_lora_adds_its_product_times_alpha_over_rank():
    linear, x = torch.nn.Linear(5, 3), torch.randn(4, 5)
    lora = finetune.LoRALinear(linear, rank=2, alpha=6.0)
    torch.nn.init.normal_(lora.lora_B)
    product = x @ lora.lora_A.T @ lora.lora_B.T
    torch.testing.assert_close(lora(x), linear(x) + 3 * product)


def test_merged_lora_computes_the_same():
    model, idx = lora_model(b=0.3), tokens(2, 16)
    merged = GPT.from_checkpoint({**model.checkpoint(), "model": finetune.merged_weights(model)})
    torch.testing.assert_close(merged(idx), model(idx))
    assert not torch.allclose(merged(idx), lora_model()(idx))


@pytest.mark.parametrize("train_flag", ["all", "last_block", "head", "lora"])
def test_fine_tuning_changes_only_what_the_train_flag_names(train_flag, base, tmp_path):
    flags = ["--task=classify", f"--train={train_flag}"]
    last, best = run_finetune(base, tmp_path / "o", labeled(60), *flags)
    before = load_checkpoint(base)["model"]
    changed = {name for name in before if not torch.equal(before[name], best["model"][name])}
    block = {name for name in before if name.startswith(("transformer.h.0", "transformer.ln_f"))}
    adapted = {name for name in before if name.endswith(gpt.TRANSPOSED)}
    expected = {"all": set(before), "last_block": block, "head": set(), "lora": adapted}
    assert changed == expected[train_flag]
    trained = {"all": len(before) + 2, "last_block": 16, "head": 2, "lora": 10}
    assert len(last["optimizer"]["state"]) == trained[train_flag]
    assert GPT.from_checkpoint(best).config == GPT.from_checkpoint(load_checkpoint(base)).config


def test_fine_tuning_leaves_alone_the_embeddings_of_tokens_that_it_never_reads(base, tmp_path):
    _, best = run_finetune(base, tmp_path / "o", asked(60))
    before, after = (c["model"]["transformer.wte.weight"] for c in (load_checkpoint(base), best))
    unchanged = (before == after).all(dim=1)
    assert unchanged.any() and not unchanged.all()
    assert unchanged[ord("Q")]


def test_the_loss_of_a_conversation_is_on_its_answers_alone(base):
    said = ["be short", "the cat", "sees a dog", "and", "not a red house"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, said)]
    row = {"messages": messages[:-1], "chosen": said[-1], "rejected": "no"}
    for task_name, template in itertools.product(("instruct", "dpo"), ("roles", "alpaca")):
        settings = {"task": task_name, "template": template, "block_size": 1000}
        task = make_task(base, preferred(60) if task_name == "dpo" else asked(60), **settings)
        example = row if task_name == "dpo" else {"messages": messages}
        idx, targets = task.encode(example)["rows"][0]
        answers = ["sees a dog"] * (task_name == "instruct") + ["not a red house"]
        expected = [[*task.tokenizer.encode(answer), task.end] for answer in answers]
        assert [t for t in targets if t != -100] == list(itertools.chain(*expected))
        for i, target in enumerate(targets):  # the state at i predicts the token at i + 1
            assert target == -100 or target == (idx[i + 1 :] or [task.end])[0]
        text = task.tokenizer.decode(idx)
        assert all(content in text for content in said[:-1])
    task = make_task(base, asked(60), loss_on_prompt=True)
    idx, targets = task.encode({"messages": messages})["rows"][0]
    assert targets == [*idx[1:], -100]


def test_an_example_too_long_loses_its_beginning_but_keeps_an_answer():
    parts = [([1] * 10, False), ([2] * 3, True), ([3] * 10, False), ([4] * 5, True)]
    assert finetune.to_row(parts, 100)[1].count(4) == 5
    idx, targets = finetune.to_row(parts, 8)
    assert idx == [3] * 3 + [4] * 5
    assert targets == [-100] * 2 + [4] * 5 + [-100]
    idx, targets = finetune.to_row(parts, 3)  # not even the answer fits: its end goes
    assert idx == [3, 4, 4]
    assert targets == [4, 4, 4]


def test_padding_changes_neither_loss_nor_score(base):
    task = make_task(base, labeled(40), task="classify", lm_weight=0.0)
    examples = [{"rows": [(row, [*row[1:], -100])]} for row in ([5], [1, 2, 3], [9] * 16)]
    task.model.eval()

    def measured(examples):
        idx, targets, _ = task.collate(examples)
        losses = finetune.token_log_probs(task.gpt, idx, targets)[0].sum(1)
        return losses, task.scores_of(examples)

    losses, scores = measured(examples)
    for i, example in enumerate(examples):
        torch.testing.assert_close(measured([example])[0], losses[i : i + 1])
        torch.testing.assert_close(measured([example])[1], scores[i : i + 1])
        ((idx, targets),) = example["rows"]
        logits = task.gpt(torch.tensor([idx]))[0].log_softmax(-1)
        by_hand = sum(logits[t, target].item() for t, target in enumerate(targets[:-1]))
        assert losses[i].item() == pytest.approx(by_hand, abs=1e-4)
    hidden = task.gpt.hidden(torch.tensor([examples[1]["rows"][0][0]]))[0, -1]
    torch.testing.assert_close(task.model["head"](hidden), scores[1])


def test_every_target_weighs_the_same_however_the_step_is_divided(base, tmp_path):
    held_out = write_rows(tmp_path / "v.jsonl", [{"instruction": "say", "output": "a"}])
    flags = ["--max_iters=1", "--eval_interval=1", f"--val={held_out}", f"--test={held_out}"]
    divided = (["--batch_size=40"], ["--batch_size=4", "--gradient_accumulation_steps=10"])
    runs = [
        run_finetune(base, tmp_path / f"{i}", asked(40), *flags, *batches)  # of unlike length
        for i, batches in enumerate(divided)
    ]
    for name, weight in runs[0][0]["model"].items():
        torch.testing.assert_close(weight, runs[1][0]["model"][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--task=classify"],
        ["--task=instruct", "--train=lora", "--lora_dropout=0.1"],
        ["--task=dpo"],
        ["--task=ppo", "--lr_decay_iters=12"],
        ["--task=grpo", "--lr_decay_iters=12", "--group_size=3", "--train=lora"],
    ],
)
def test_resumed_fine_tuning_is_uninterrupted_fine_tuning(flags, base, tmp_path, monkeypatch):
    toy_reward(monkeypatch)
    rows = labeled(60) if "--task=classify" in flags else preferred(60)
    rows = asked(60) if "--task=instruct" in flags else rows
    flags = [*flags, "--dropout=0.1"]
    whole = run_finetune(base, tmp_path / "whole", rows, *flags)
    parts = tmp_path / "parts"
    run_finetune(base, parts, rows, *flags, "--max_iters=6", "--lr_decay_iters=12")
    finetune.main([*flags[:1], "--init_from=resume", f"--out_dir={parts}", "--max_iters=12"])
    for a, name in zip(whole, ("last.pt", "best.pt")):
        b = load_checkpoint(parts / name)
        assert_equal(a["model"], b["model"])
        assert_equal(a.get("optimizer"), b.get("optimizer"))
    assert whole[0]["state"]["best_val_loss"] == b_state(parts)["best_val_loss"]


def b_state(folder):
    return load_checkpoint(folder / "last.pt")["state"]


def test_a_classifier_learns_answers_and_can_be_trained_further(base, tmp_path, capsys):
    flags = ["--task=classify", "--max_iters=300", "--lm_weight=0.1", "--learning_rate=3e-3"]
    run_finetune(base, tmp_path / "o", labeled(200), *flags, "--patience=20", "--eval_interval=20")
    out = capsys.readouterr().out
    assert len(re.findall(r"\n(val|test) +accuracy.*most common label: 0.[456]", out)) == 2
    with open(tmp_path / "o" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    right = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    assert right > 0.75
    assert f"{right:.4f}" in out
    model = ["--task=classify", f"--init_from={tmp_path}/o", "--device=cpu", "--dtype=float32"]
    for row in rows[:3]:
        capsys.readouterr()
        finetune.main([*model, f"--predict={row['text']}"])
        label, probability = capsys.readouterr().out.split()
        assert label == row["predicted"]
        assert float(probability) == pytest.approx(float(row["probability"]), abs=1e-3)
    # --eval_only measures all examples of its file, as one split
    finetune.main([*model, f"--data={write_rows(tmp_path / 't.jsonl', rows)}", "--eval_only"])
    out = capsys.readouterr().out
    assert f"test  accuracy {right:.4f}" in out and "train" not in out.partition("\n")[2]
    # a second training starts from the first one's head, unless its labels are others
    task = make_task(tmp_path / "o", labeled(200), task="classify")
    head = load_checkpoint(tmp_path / "o")["head"]
    assert_equal(task.model["head"].state_dict(), head)
    others = [{**row, "label": row["label"] + "s"} for row in labeled(200)]
    task = make_task(tmp_path / "o", others, task="classify")
    assert not torch.equal(task.model["head"].weight, head["weight"])


def test_a_classifiers_curves_compare_like_with_like(base, tmp_path):
    flags = ["--task=classify", "--log_interval=6", "--learning_rate=1e-9"]
    run_finetune(base, tmp_path / "o", labeled(60), *flags)
    label_loss, val_loss = (column(tmp_path / "o", name) for name in ("label_loss", "val_loss"))
    assert label_loss[0] == pytest.approx(val_loss[0], abs=0.1)  # nothing is learned
    assert column(tmp_path / "o", "train_loss")[0] > label_loss[0] + 0.5
    assert finetune.Classify.curves == ("label_loss", "val_loss")


def test_training_the_head_alone_computes_no_next_token_loss(base, monkeypatch):
    calls, losses = [], finetune.next_token_losses
    record = lambda *args: calls.append(1) or losses(*args)
    monkeypatch.setattr(finetune, "next_token_losses", record)
    for name, count in {"head": 0, "all": 1}.items():
        task = make_task(base, labeled(40), task="classify", train=name)
        task.terms(task.splits["train"][:4])
        assert len(calls) == count


@pytest.mark.parametrize("task_name", ["classify", "reward"])
def test_scores_keep_their_precision_under_autocast(task_name, base):
    rows = labeled(60) if task_name == "classify" else preferred(60)
    task = make_task(base, rows, task=task_name, dtype="bfloat16")
    with task.machine.autocast():
        scores = task.scores_of(task.splits["train"][:16])
    assert not torch.equal(scores, scores.bfloat16().float())


def test_balance_keeps_as_many_of_each_label_as_the_rarest_has(base):
    rows = [row for i, row in enumerate(labeled(120)) if row["label"] == "cat" or i % 3 == 0]
    balanced = make_task(base, rows, task="classify", balance=True).splits
    plain = make_task(base, rows, task="classify").splits
    labels = [example["label"] for example in balanced["train"]]
    rarest = sum(example["label"] == "dog" for example in plain["train"])
    assert labels.count("cat") == labels.count("dog") == rarest
    assert balanced["test"] == plain["test"]


def test_a_longer_context_grows_positions_that_are_trained(base, tmp_path):
    rows = [{**row, "text": row["text"] * 4} for row in labeled(60)]
    flags = ["--task=classify", "--train=lora", "--block_size=64"]
    _, best = run_finetune(base, tmp_path / "o", rows, *flags)
    table = best["model"]["transformer.wpe.weight"]
    assert table.shape == (64, 16)
    before = load_checkpoint(base)["model"]["transformer.wpe.weight"]
    assert (table[:16] != before).all()  # though the rest is frozen


def test_splits_share_no_text_and_no_group(base):
    rows = [{"text": f"t{i % 270}", "group": i % 270 // 3, "label": "a"} for i in range(300)]
    rows += [{"text": f"u{i}", "group": f"u{i}", "label": "b"} for i in range(300)]
    test = [{"text": f"t{i}", "label": "a"} for i in range(9)]
    write_rows(pathlib.Path("test.jsonl"), test)
    for flags in ({}, {"test": "test.jsonl"}):
        splits = make_task(base, rows, task="classify", **flags).splits
        for what in ("text", "group"):
            sets = [{example[what] for example in some} for some in splits.values()]
            assert all(sets)
            assert sum(map(len, sets)) == len(set.union(*sets))
        if not flags:
            for split, share in {"val": 0.1, "test": 0.1}.items():
                assert len(splits[split]) / 600 == pytest.approx(share, abs=0.05)
        else:
            assert len(splits["test"]) == 9


def test_batches_hold_every_example_once_an_epoch_and_mostly_of_one_length():
    lengths = np.random.default_rng(0).integers(1, 100, 203)
    batch = lambda n: finetune.batch_at(n, lengths, 8, seed=1).tolist()
    epochs = [[batch(n) for n in range(e * 26, e * 26 + 26)] for e in range(2)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(203))
        spread = np.mean([np.ptp(lengths[batch]) for batch in epoch])
        assert spread < np.ptp(lengths) / 2
    assert epochs[0] != epochs[1]
    assert [batch(n) for n in range(26)] == epochs[0]


def test_pairs_are_batched_by_their_longer_answer(base):
    rows = [{**row, "rejected": "the " * (i % 9)} for i, row in enumerate(preferred(60))]
    rows = [{**row, "rejected": row["rejected"] or "a"} for row in rows]
    task = make_task(base, rows, task="dpo")
    longest = [max(len(idx) for idx, _ in e["rows"]) for e in task.splits["train"]]
    assert list(task.lengths) == longest


def test_learning_rates_fall_with_the_width_and_are_higher_for_lora(base, tmp_path):
    wide = GPT(GPTConfig(**{**TINY, "vocab_size": 284, "n_embd": 64}))
    spec = {"tokenizer": load_checkpoint(base)["tokenizer"]}
    gpt.save_checkpoint(tmp_path / "best.pt", {**wide.checkpoint(), **spec})
    rates = [
        make_task(model, asked(60), **how).config.learning_rate
        for model, how in ((base, {}), (tmp_path, {}), (base, {"train": "lora"}))
    ]
    assert rates[0] / rates[1] == pytest.approx((64 / 16) ** 1.5)
    assert rates[2] == 3 * rates[0]
    assert make_task(base, asked(60), learning_rate=0.5).config.learning_rate == 0.5


def test_short_texts_and_few_prompts_train_too(base, tmp_path, monkeypatch):
    toy_reward(monkeypatch)
    rows = [{"text": "ab"[i % 2] * (i // 2 + 1), "label": "ab"[i % 2]} for i in range(40)]
    run_finetune(base, tmp_path / "o", rows, "--task=classify", "--batch_size=1")
    run_finetune(base, tmp_path / "p", asked(30), "--task=ppo", "--batch_size=3", "--max_iters=2")


def test_instruction_tuning_is_measured_and_answers_before_and_after(base, tmp_path, capsys):
    flags = ["--max_iters=200", "--learning_rate=3e-3", "--eval_interval=100"]
    rows = [{"instruction": f"say {w} {i}", "output": "red"} for w in WORDS for i in range(8)]
    run_finetune(base, tmp_path / "o", rows, *flags)
    losses = column(tmp_path / "o", "val_loss")
    assert column(tmp_path / "o", "val_perplexity") == pytest.approx(list(map(math.exp, losses)))
    lines = (tmp_path / "o" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    answers = list(map(json.loads, lines))
    assert all(line["after"] == line["output"] == "red" for line in answers)
    assert not any(line["before"] == "red" for line in answers)
    test = {r["instruction"] for r in rows if 0.1 <= prepare_data.position(r["instruction"]) < 0.2}
    assert {line["messages"][0]["content"] for line in answers} == test
    assert re.search(r"\ntest +loss", capsys.readouterr().out)


def test_multiple_choice_picks_the_likelier_ending(base, tmp_path, capsys):
    rows = [
        {"ctx": f"the cat {i}", "endings": ["sees a dog", "\x07 zq#"], "label": label}
        for i, label in enumerate((0, 0, 1, 0))
    ]
    data = write_rows(tmp_path / "x.jsonl", rows)
    finetune.main(["--task=choice", f"--init_from={base}", f"--data={data}", "--device=cpu"])
    out = capsys.readouterr().out
    assert "accuracy 0.7500" in out and "accuracy_per_byte 0.7500" in out


def test_every_kind_of_table_gives_the_same_examples(tmp_path):
    rows = [{"label": "a", "text": 'say "hi", ok'}, {"label": "b", "text": "c"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    quoted = 'a,"say ""hi"", ok"\nb,c\n'
    plain = 'a\tsay "hi", ok\nb\tc\n'
    files = {
        "a.jsonl": lines,
        "b.json": json.dumps(rows),
        "c.json": lines,
        "d.csv": f"label,text\n{quoted}",
        "e.CSV": f"\ufefflabel,text\n{quoted}",
        "f.csv": 'label;text\na;"say ""hi"", ok"\nb;c\n',
        "g.tsv": f"label\ttext\n{plain}",
        "h.tsv": f"Label\tText\n{plain}",
        "i.tsv": plain,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        read = [row for _, row in finetune.read_rows(tmp_path / name, ("label", "text"))]
        assert read == rows, name
    (tmp_path / "j.tsv").write_text(f"label\tsentence\n{plain}", encoding="utf-8")
    assert len(list(finetune.read_rows(tmp_path / "j.tsv", ("label", "text")))) == 2


def test_conversations_come_as_texts_or_as_lists_of_messages():
    user = [{"role": "user", "content": "hi"}]
    said = [{"role": "assistant", "content": "yes"}]
    for row in (
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": user, "chosen": said, "rejected": "no"},
        {"chosen": user + said, "rejected": [*user, {"role": "assistant", "content": "no"}]},
        {"messages": user + said, "chosen": "yes", "rejected": "no"},
    ):
        found = finetune.conversation_of(row, "chosen", "rejected")
        assert found["messages"] == user and found["text"] == "hi"
        assert found["chosen"] == "yes" and found["rejected"] == "no"
    found = finetune.conversation_of({"messages": user + said + user + said + user}, "output")
    assert found["messages"] == user + said + user and found["output"] == "yes"
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    assert "### Input:\n1 2" in finetune.conversation_of(row)["messages"][0]["content"]


BAD_EXAMPLES = {  # what the error must say: task, rows
    "line 1: no column text .found: body, label": ("classify", [{"body": "a", "label": "b"}]),
    "line 1: label is empty": ("classify", [{"text": "a", "label": " "}]),
    "at least two labels": ("classify", [{"text": str(i), "label": "b"} for i in range(50)]),
    "too few examples": ("classify", [{"text": "a", "label": "a"}]),
    "line 1: .*list": ("classify", [["a", "b"]]),
    "there is no prompt": ("instruct", [{"messages": [{"role": "assistant", "content": "a"}]}]),
    "no column output": ("instruct", [{"messages": [{"role": "user", "content": "a"}]}]),
    "output is empty": ("instruct", [{"instruction": "a", "output": ""}]),
    "no column instruction or prompt": ("instruct", [{"output": "a"}]),
    "roles are system": ("instruct", [{"messages": [{"role": "robot", "content": "a"}]}]),
    "no column rejected": ("reward", [{"prompt": "a", "chosen": "b"}]),
    "line 1: label 0, but 1 endings": ("choice", [{"ctx": "a", "endings": ["b"], "label": 0}]),
}


@pytest.mark.parametrize("complaint", BAD_EXAMPLES)
def test_a_bad_example_is_refused_with_its_place(complaint, base):
    name, rows = BAD_EXAMPLES[complaint]
    with pytest.raises(ValueError, match=complaint):
        make_task(base, rows, task=name)


def test_impossible_fine_tuning_is_refused_with_the_reason(base, tmp_path):
    data = write_rows(tmp_path / "x.jsonl", labeled(40))
    write_rows(tmp_path / "val.jsonl", [{"text": "a", "label": "bird"}])
    good = ["--task=classify", f"--init_from={base}", f"--data={data}", f"--out_dir={tmp_path}/o"]
    for flags, complaint in [
        (["--task=swim"], "--task=swim.*classify"),
        (["--train=some"], "--train=some.*lora"),
        (["--template=some"], "--template=some.*alpaca"),
        (["--task=instruct", "--train=head"], "--train=head"),
        (["--val=val.jsonl"], "the label 'bird'"),
        (["--predict=a"], "no head for this task; --task=classify trains one"),
        (["--task=instruct", "--predict=a"], "--predict is for --task=classify"),
        (["--data=none.csv"], "none.csv"),
        (["--data=none.txt"], "give a .jsonl, .json, .csv or .tsv file"),
        (["--init_from=resume"], "no such checkpoint"),
        (["--task=choice", "--data="], "--data=FILE"),
        ([f"--out_dir={base}"], "which this run reads"),
        (["--text_field=body"], "no column body"),
    ]:
        with pytest.raises((ValueError, OSError), match=complaint):
            finetune.main([*good, *FEW, *flags])


def test_the_default_examples_are_complete_and_their_held_out_modules_are_not_pretrained(
    monkeypatch,
):
    text = "Return the {} of this thing. And more."
    entries = [
        (f"{'abcdefghij'[p]}.m{m}", f"{'abcdefghij'[p]}.m{m}.f{i}(x)", text.format(f"{p} {m} {i}"))
        for p in range(10)
        for m in range(12)
        for i in range(1 + p)
    ]
    monkeypatch.setattr(finetune, "library_docstrings", lambda: entries)
    texts, answers = list(finetune.manual_texts()), list(finetune.manual_answers())
    assert {row["label"] for _, row in texts} == set("cdefghij")  # the eight with the most
    assert len(answers) == len(entries)
    config = finetune.FinetuneConfig()
    monkeypatch.setattr(prepare_data, "library_docstrings", lambda: entries)
    counts = prepare_data.collections.Counter()
    pages = prepare_data.split_documents([], prepare_data.PrepareConfig(), None, counts)
    pretrained = "\n".join(text for split, text in pages if split == "train")
    for module, row in texts + answers:
        assert row["group"] == module
        held_out = finetune.split_of(row["group"], config) != "train"
        assert held_out != (f"# {module}.f" in pretrained)
    for _, row in answers:
        assert row["output"] == row["chosen"] != row["rejected"]
        assert row["output"].startswith("Return the ") and row["output"].endswith("thing.")


# --- preferences and reinforcement learning -------------------------------------------------------


def test_dpo_loss_is_its_equation():
    chosen, rejected, ref_chosen, ref_rejected = (-torch.rand(4, 50) * 90).double()
    losses, margins = finetune.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    for i in range(50):
        ratio = (chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i])
        assert losses[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.3 * ratio))))
        assert margins[i].item() == pytest.approx(0.3 * ratio.item())


@pytest.mark.parametrize("train_flag", ["all", "lora"])
def test_dpo_begins_at_ln_2_and_learns_which_answer_is_better(train_flag, base, tmp_path, capsys):
    flags = [f"--train={train_flag}", "--max_iters=60", "--log_interval=1"]
    run_finetune(base, tmp_path / "o", preferred(120), "--task=dpo", *flags)
    assert column(tmp_path / "o", "train_loss")[0] == pytest.approx(math.log(2))
    assert "val_accuracy 0.5000" in capsys.readouterr().out  # all margins are 0
    assert column(tmp_path / "o", "val_loss")[-1] < math.log(2)
    assert column(tmp_path / "o", "val_margin")[-1] > 0
    assert column(tmp_path / "o", "val_accuracy")[-1] > 0.5


def test_dpo_compares_the_log_probabilities_of_the_last_answers_alone(base):
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "the cat"))]
    ask = lambda i: {"role": "user", "content": f"and {i}"}
    rows = [{**row, "prompt": [*messages, ask(i)]} for i, row in enumerate(preferred(60))]
    task = make_task(base, rows, task="dpo")
    (idx, targets), _ = task.splits["train"][0]["rows"]
    answer = [target for target in targets if target != -100]
    assert answer[-1] == task.end
    assert task.text(answer) == task.splits["train"][0]["chosen"]
    found = task.terms(task.splits["train"][:1])
    logits = task.gpt(torch.tensor([idx]))[0].log_softmax(-1)
    by_hand = sum(logits[t, i].item() for t, i in enumerate(targets) if i != -100)
    assert found["chosen"].item() == pytest.approx(by_hand, abs=1e-4)


def test_a_reward_model_prefers_and_its_scores_are_standardized(base, tmp_path, capsys):
    flags = ["--task=reward", "--max_iters=100", "--learning_rate=3e-3"]
    run_finetune(base, tmp_path / "o", preferred(120), *flags)
    assert column(tmp_path / "o", "val_accuracy")[-1] > 0.8
    task = make_task(tmp_path / "o", preferred(120), task="reward")
    scores = torch.cat(task.in_batches(task.splits["train"], task.scores_of))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)
    together = task.score([([], text) for text in ("a", "the red dog")])  # padding changes nothing
    for text, expected in zip(("a", "the red dog"), together.tolist()):
        capsys.readouterr()
        model = [f"--init_from={tmp_path}/o", "--device=cpu", "--dtype=float32"]
        finetune.main(["--task=reward", *model, f"--predict={text}"])
        assert float(capsys.readouterr().out) == pytest.approx(expected, abs=1e-3)


def test_advantages_are_their_definition():
    rewards, values = torch.randn(2, 3, 9).double()
    answered = torch.zeros(3, 9, dtype=torch.bool)
    for row, (start, end) in enumerate([(2, 9), (0, 4), (5, 6)]):
        answered[row, start:end] = True
    rewards = rewards * answered
    found = finetune.advantages_of(rewards, values, answered)
    gamma, lam = finetune.GAMMA, finetune.LAMBDA
    for row in range(3):
        steps = answered[row].nonzero()[:, 0].tolist()
        for t in range(9):
            expected = 0.0
            for later in (s for s in steps if t in steps and s >= t):
                following = values[row, later + 1] if later + 1 in steps else 0
                delta = rewards[row, later] + gamma * following - values[row, later]
                expected += (gamma * lam) ** (later - t) * delta
            assert found[row, t].item() == pytest.approx(float(expected))


def test_whitening_ignores_what_is_not_an_answer():
    values, mask = torch.randn(4, 9) * 3 + 1, torch.rand(4, 9) < 0.5
    white = finetune.whiten(values, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    values[~mask] = 1e9
    assert torch.equal(finetune.whiten(values, mask), white)
    assert not white[~mask].any()


def test_the_clipped_loss_gains_nothing_beyond_its_bounds():
    old = torch.zeros(4)
    new = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    loss, clipped = finetune.clipped_loss(new, old, torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert loss.item() == pytest.approx(-(1.2 - 0.8 - 1.5 + 0.5) / 4)
    assert clipped == 1
    loss.backward()
    assert (new.grad == 0).tolist() == [True, True, False, False]


def toy_reward(monkeypatch):
    """In the place of a reward model: how much of an answer is the letter e."""

    def score(conversations):
        return torch.tensor(
            [answer.count("e") / max(1, len(answer)) for _, answer in conversations]
        )

    def set_up(task):
        task.score = score
        task.reference = finetune.copy.deepcopy(task.gpt).requires_grad_(False)

    monkeypatch.setattr(finetune.GRPO, "set_up", set_up)


def policy(base, monkeypatch, name, **settings):
    toy_reward(monkeypatch)
    settings = {"batch_size": 4, "max_new_tokens": 6, "group_size": 4, **settings}
    return make_task(base, asked(80), task=name, **settings)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_first_update_of_a_policy_is_on_policy(name, base, monkeypatch):
    task = policy(base, monkeypatch, name)
    loss, judge = task.loss, task.judge
    seen = []
    monkeypatch.setattr(task, "judge", lambda *args: seen.append(args) or judge(*args))
    monkeypatch.setattr(task, "loss", lambda *args: seen.append(args) or loss(*args))
    state = {"step": 0, "examples": 0, "tokens": 0}
    (first,) = next(task.updates(state))
    (_, _, log_probs, reference, _), (idx, targets, old_log_probs, _, _) = seen
    assert torch.equal(log_probs, reference)
    assert task.measured["clipped"] == [0] and torch.isfinite(first)
    answered = targets != -100
    logits = task.gpt(idx).log_softmax(-1)  # the state before a token is the one that predicts it
    for row, t in answered.nonzero().tolist():
        by_hand = logits[row, t, targets[row, t]].item()
        assert old_log_probs[row, t] == pytest.approx(by_hand, abs=1e-5)
        if t + 1 < idx.size(1) and answered[row, t + 1]:
            assert idx[row, t + 1] == targets[row, t]


def test_ppo_rewards_the_last_token_with_the_score_and_each_with_its_drift(base, monkeypatch):
    task = policy(base, monkeypatch, "ppo", beta=0.5)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    log_probs, reference = torch.rand(2, 2, 4) * mask
    scores, x = torch.tensor([3.0, -2.0]), torch.randn(2, 4, 16)
    with torch.no_grad():
        task.model["head"].weight.normal_()
        values = task.apply_head(x)[..., 0] * mask
    rewards = 0.5 * (reference - log_probs)
    rewards[0, 2] += 3
    rewards[1, 3] -= 2
    advantages, returns = task.judge(scores, mask, log_probs, reference, x)
    expected = finetune.advantages_of(rewards, values, mask)
    torch.testing.assert_close(returns, expected + values)
    torch.testing.assert_close(advantages, finetune.whiten(expected, mask))


def test_an_answer_that_does_not_end_scores_one_less(base, monkeypatch):
    task = policy(base, monkeypatch, "ppo")
    word = task.tokenizer.encode_ordinary("red")
    monkeypatch.setattr(task, "answers", lambda *args, **how: [word, [*word, task.end]])
    _, _, scores, ended, *_ = task.respond(task.splits["train"][:2])
    assert ended.tolist() == [False, True]
    assert scores[1].item() == pytest.approx(scores[0].item() + 1)


def test_grpo_compares_the_answers_to_one_prompt(base, monkeypatch):
    task = policy(base, monkeypatch, "grpo")
    scores, mask = torch.tensor([1.0, 2, 3, 4, 7, 7, 7, 7]), torch.ones(8, 3, dtype=torch.bool)
    mask[0, 0] = False
    advantages, _ = task.judge(scores, mask, None, None, None)
    assert (advantages[:, 1] == advantages[:, 2]).all() and advantages[0, 0] == 0
    assert advantages[:4, 1].mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages[:4, 1].std().item() == pytest.approx(1, abs=1e-3)
    assert advantages[:4, 1].tolist() == sorted(advantages[:4, 1].tolist())
    assert not advantages[4:].any()  # equal scores teach nothing
    # the KL's estimate is 0 at the reference and positive elsewhere, on either side
    idx, targets, _ = task.collate([{"rows": [([1, 2, 3], [2, 3, -100])]}])
    own = finetune.token_log_probs(task.gpt, idx, targets)[0].detach()
    for drift in (-0.5, 0.0, 0.5):
        loss = task.loss(idx, targets, own, torch.zeros(1, 3), own - drift)
        expected = math.exp(-drift) + drift - 1
        assert task.measured["kl_loss"][-1].item() == pytest.approx(expected, abs=1e-5)
        assert loss.item() == pytest.approx(0.1 * expected, abs=1e-5)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_policies_find_the_reward(name, base, tmp_path, monkeypatch):
    toy_reward(monkeypatch)
    flags = [f"--task={name}", "--beta=0.01", "--max_iters=40", "--log_interval=1"]
    flags += ["--batch_size=16" if name == "ppo" else "--batch_size=4", "--eval_interval=20"]
    run_finetune(base, tmp_path / "o", asked(80), *flags, "--learning_rate=5e-3")
    scores = column(tmp_path / "o", "score")
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.2
    value = [
        0.01 * kl - s for kl, s in zip(*map(column_of(tmp_path / "o"), ("val_kl", "val_score")))
    ]
    assert column(tmp_path / "o", "val_loss") == pytest.approx(value)
    lines = (tmp_path / "o" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    assert any(json.loads(line)["before"] != json.loads(line)["after"] for line in lines)


def column_of(out_dir):
    return lambda name: column(out_dir, name)


def test_a_policy_with_a_large_penalty_stays_at_the_reference(base, tmp_path, monkeypatch):
    toy_reward(monkeypatch)
    kls = []
    for beta in ("0", "5"):
        flags = ["--task=grpo", f"--beta={beta}", "--max_iters=15", "--learning_rate=3e-3"]
        flags += ["--log_interval=1", "--eval_interval=15"]
        run_finetune(base, tmp_path / beta, asked(80), *flags)
        kls.append(sum(map(abs, column(tmp_path / beta, "kl")[-5:])))
    assert kls[1] < kls[0] / 2


def test_ppo_reads_a_reward_model_from_its_checkpoint(base, tmp_path):
    run_finetune(base, tmp_path / "reward", preferred(60), "--task=reward")
    settings = {"reward_model": str(tmp_path / "reward"), "max_new_tokens": 5}
    task = make_task(base, preferred(60), task="ppo", **settings)
    reward = make_task(tmp_path / "reward", preferred(60), task="reward")
    asked = [(e["messages"], e["chosen"]) for e in reward.splits["train"][:5]]
    torch.testing.assert_close(task.score(asked), reward.score(asked))


# --- flags, errors, accidents ---------------------------------------------------------------------

CONFIGS = [prepare_data.PrepareConfig, train.TrainConfig, finetune.FinetuneConfig]


@pytest.mark.parametrize("config_class", [*CONFIGS, sample.SampleConfig])
def test_every_setting_is_a_flag_that_its_comment_explains(config_class):
    parser = prepare_data.flag_parser(config_class, "")
    text = parser.format_help()
    for name, default in vars(config_class()).items():
        assert re.search(rf"--{name} [^-]*[a-z]{{3}}", text)
        value = "True" if isinstance(default, bool) else "1"
        (parsed,) = vars(parser.parse_args([f"--{name}={value}"])).values()
        assert parsed == type(default)(1) and type(parsed) is type(default)
    assert vars(parser.parse_args([])) == {}


def test_a_flag_without_a_value_is_true_and_nonsense_is_refused():
    parser = prepare_data.flag_parser(train.TrainConfig, "")
    assert parser.parse_args(["--compile"]).compile is True
    assert parser.parse_args(["--compile=False"]).compile is False
    parser.exit_on_error = False
    for flag in ("--compile=", "--n_layer=two", "--learning_rate=nan", "--batch_size=-1", "--seed"):
        with pytest.raises(argparse.ArgumentError, match=flag.split("=")[0]):
            parser.parse_args([flag])


BAD_TRAINING = {  # flags: what the error must say
    "--n_embd=10 --n_head=3": "n_head must divide",
    "--n_layer=0": "1 or more",
    "--n_head=0": "1 or more",
    f"--n_embd={2**63}": "1 or more",
    "--batch_size=0": "--batch_size=0",
    "--eval_interval=0": "--eval_interval=0",
    "--block_size=100000": "too little text",
    "--device=abacus": "abacus",
    "--dtype=int3": "int3.*float32",
    "--init_from=nowhere": "nowhere",
    "--init_from=resume": "last.pt",
    "--data=nowhere": "nowhere.*prepare_data.py",
}


@pytest.mark.parametrize("flags", BAD_TRAINING)
def test_impossible_training_is_refused_with_the_reason(flags, data_folder, tmp_path):
    use = [f"--data={data_folder}", f"--out_dir={tmp_path}/out", "--block_size=16"]
    with pytest.raises((ValueError, OSError), match=f"(?s){BAD_TRAINING[flags]}"):
        train.main([*use, *flags.split()])
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_checkpoint_and_the_flags_must_agree(data_folder, base, tmp_path):
    text = story(500, seed=9) + "zzz zzz"
    prepare(tmp_path / "other", text)
    prepare(tmp_path / "same", text, f"--tokenizer={data_folder}")
    shutil.copytree(base, tmp_path / "run")
    resumed = [f"--out_dir={tmp_path}/run", "--init_from=resume", "--max_iters=21"]
    use = [f"--data={data_folder}", f"--init_from={base}", f"--out_dir={tmp_path}/b"]
    for flags, complaint in [
        ([*resumed, "--n_layer=7"], "n_layer=1, not --n_layer=7"),
        ([*resumed, "--block_size=8"], "block_size=16"),
        ([*resumed, "--data=same"], "was trained on"),
        ([*use, "--n_head=4"], "n_head=2"),
        ([*use, "--data=other"], "different tokenizers"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            train.main(flags)


def test_impossible_sampling_is_refused_with_the_reason(base, capsys):
    for flags, complaint in [
        (["--start=FILE:gone.txt"], "gone.txt"),
        (["--surprise"], "--start is empty"),
        (["--dtype=int3"], "int3.*float32"),
        (["--device=abacus"], "abacus"),
        (["--temperature=1e-320"], "temperature"),
    ]:
        with pytest.raises((ValueError, OSError), match=complaint):
            sample.main([f"--init_from={base}", *flags])
    sample.main([f"--init_from={base}", f"--start={story(100)}", "--max_new_tokens=5"])
    assert "the last 16" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train.py --data=nowhere", "prepare_data.py --nowhere=3"])
def test_a_script_ends_bad_input_in_one_line_and_with_code_2(command):
    process = start(*command.split(), stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1 and "nowhere" in err


def test_numbers_that_are_too_large_are_bad_input(data_folder, tmp_path, capsys):
    flags = [f"--data={data_folder}", f"--out_dir={tmp_path}"]
    for cause in (
        lambda: train.main([*flags, f"--seed={'9' * 400}"]),
        lambda: train.main([*flags, f"--max_iters={'9' * 400}"]),
        lambda: train.main([*flags, "--n_embd=10000000"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            prepare_data.script(cause)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_scripts_run_with_closed_streams_and_a_reader_that_leaves(base):
    flags = f"--init_from={base} --max_new_tokens=3000 --temperature=2 --top_k=0"
    command = f"{sys.executable} sample.py {flags} >&- 2>&-"
    subprocess.run(command, shell=True, check=True, cwd=pathlib.Path(train.__file__).parent)
    process = start("sample.py", *flags.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_pickled_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "ran",))

    torch.save({"format": 2, "config": {}, "model": {"x": Evil()}}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="best.pt: damaged"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    torch.save({"format": 1, **tiny_model().checkpoint()}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="format 1"):
        load_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "a.pt"
    gpt.save_checkpoint(path, model.checkpoint())
    before = path.read_bytes()

    def full(checkpoint, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 64 vs 4")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        gpt.save_checkpoint(path, model.checkpoint())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run_before_it_is_saved(
    what, base, tmp_path, monkeypatch
):
    shutil.copytree(base, tmp_path / "out")
    before = (tmp_path / "out" / "last.pt").read_bytes()
    losses = train.Pretraining.losses

    def broken(task, state):
        for loss in losses(task, state):
            if state["step"] == 24:  # the root of 0 has an infinite slope
                loss = loss * math.nan if what == "loss" else loss + (loss * 0).sqrt()
            yield loss

    monkeypatch.setattr(train.Pretraining, "losses", broken)
    with pytest.raises(ValueError, match="stopped at step 25"):
        resume(tmp_path / "out", "--max_iters=25")
    assert (tmp_path / "out" / "last.pt").read_bytes() == before


def test_two_runs_do_not_share_a_folder(data_folder, tmp_path):
    with prepare_data.lock(tmp_path), pytest.raises(ValueError, match="another run"):
        run_training(data_folder, tmp_path)
    assert not (tmp_path / "last.pt").exists()


def mutate(data, rng):
    """Bytes cut off, put in, taken out or changed, somewhere; or numbers made negative."""
    i, n = rng.randrange(len(data)), rng.randrange(1, 50)
    flipped = bytes([data[i] ^ 1 << rng.randrange(8)])
    changed = [b"", rng.randbytes(n) + data[i:], data[i + n :], flipped + data[i + 1 :]]
    if rng.random() < 0.8:
        return data[:i] + rng.choice(changed)
    return re.sub(rb"\d+", lambda m: rng.choice([m[0]] * 9 + [b"-7"]), data[:2000]) + data[2000:]


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "meta.json", "train_00000.npy"])
def test_damaged_files_give_an_error_or_a_working_run(name, base, data_folder, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    shutil.copytree(data_folder, tmp_path / "data")
    path = next(tmp_path.rglob(name))
    whole, refused = path.read_bytes(), 0
    for seed in range(30):
        path.write_bytes(mutate(whole, random.Random(seed)))
        try:
            if name == "best.pt":
                sample.main(["--init_from=run", "--max_new_tokens=3"])
            elif name == "last.pt":
                resume(tmp_path / "run", "--max_iters=21")
            else:
                run_training("data", tmp_path / "other", "--max_iters=1")
        except (ValueError, OSError):
            refused += 1
    assert refused


@pytest.mark.parametrize("module", [gpt, prepare_data, train, finetune, sample])
def test_examples_in_docstrings_are_true(module):
    assert doctest.testmod(module).failed == 0
