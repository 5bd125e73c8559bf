"""What must hold of this project, on small data made here: no network, no GPU.

python -m pytest -q
"""

import contextlib
import csv
import doctest
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
import sysconfig
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
from gpt import GPT, GPTConfig, KVCache, causal_attention, keep_top_p, load_checkpoint
from prepare_data import SPLIT, bpe_encode, bpe_spec, build_tokenizer, clean, cut, train_bpe

TINY = {"block_size": 16, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16}
torch.set_num_threads(1)  # such small tensors are not worth a second
WORDS = ["the", "a", "cat", "dog", "sees", "hears", "and", "not", "red", "small", "house", "in"]


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed


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


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "story.txt").write_text(story(4000), encoding="utf-8")
    prepare_data.main([f"{folder}/story.txt", f"--out={folder}/data", "--vocab_size=280"])
    return folder / "data"


SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4"]
SMALL += ["--eval_interval=10", "--eval_iters=3", "--warmup_iters=4", "--dropout=0.1"]
SMALL += ["--max_iters=20", "--device=cpu"]


def run_training(data_folder, out_dir, *flags):
    """train.py on a tiny model -> the checkpoint it ends with."""
    train.main([f"--data={data_folder}", f"--out_dir={out_dir}", *SMALL, *flags])
    return load_checkpoint(out_dir / "last.pt")


def column(out_dir, name):
    """What metrics.csv has under a name, without the blanks."""
    with open(out_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="session")
def base(data_folder, tmp_path_factory):
    """A trained model to begin fine-tuning with."""
    folder = tmp_path_factory.mktemp("base") / "out"
    run_training(data_folder, folder, "--dropout=0")
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(n):
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


def run_finetune(base, out_dir, data, *flags):
    """finetune.py for 12 steps -> (last.pt, best.pt)."""
    finetune.main(
        [f"--init_from={base}", f"--out_dir={out_dir}", f"--data={data}", "--max_iters=12"]
        + ["--eval_interval=6", "--device=cpu", "--batch_size=4", "--warmup_iters=2"]
        + ["--max_new_tokens=5", *flags]
    )
    return (torch.load(out_dir / name, weights_only=True) for name in ("last.pt", "best.pt"))


def assert_equal(a, b):
    """Nested dicts and lists with the same tensors, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b


@contextlib.contextmanager
def web_server(answers):
    """A server here that gives answers {path: (bytes, headers)} -> its address, paths asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path in answers else 404)
            content, headers = answers.get(self.path, (b"", {}))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    asked = []
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


# --- the model ------------------------------------------------------------------------------------


def test_a_token_changes_no_output_before_it():
    model, idx = tiny_model(), tokens(2, 16)
    before = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


def test_attention_written_out_computes_what_the_fused_kernel_does():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(causal_attention(q, k, v), fused)


def test_attention_maps_are_those_the_model_uses():
    model, idx = tiny_model(), tokens(2, 12)
    x = model.embed(idx)
    for block, weights in zip(model.transformer.h, model.attention_maps(idx), strict=True):
        _, _, v = block.attn.heads(block.ln_1(x))
        y = block.attn.c_proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(y, block.attn(block.ln_1(x)))
        x = block(x)


def test_reading_in_steps_with_a_cache_is_reading_at_once():
    model, idx = tiny_model(), tokens(3, 16)
    cache = KVCache(model, 3, 16)
    steps = [model.hidden(part, cache) for part in idx.split([5, 1, 4, 6], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model.hidden(idx))
    assert cache.position == 16


def test_when_the_context_is_full_generation_starts_afresh_on_its_last_half():
    model, idx = tiny_model(), tokens(2, 10)
    made = list(model.generate(idx, 40, temperature=0))
    text = torch.cat([idx, torch.stack(made, dim=1)], dim=1)  # (2, 50)
    length = 10  # of what the model has before it when it makes text[:, n]
    for n in range(10, 50):
        if length > 16:
            length = 8
        assert torch.equal(text[:, n], model(text[:, n - length : n])[:, -1].argmax(-1))
        length += 1


def test_a_prompt_longer_than_the_context_keeps_its_end():
    model, idx = tiny_model(), tokens(1, 40)
    a = torch.stack(list(model.generate(idx, 9, temperature=0)))
    assert torch.equal(a, torch.stack(list(model.generate(idx[:, -16:], 9, temperature=0))))


def test_under_autocast_the_loss_keeps_its_precision():
    x, weight, targets = torch.randn(100, 32), torch.randn(9000, 32), tokens(100, vocab_size=9000)
    targets[::3] = -100
    exact = F.cross_entropy(x.bfloat16().float() @ weight.bfloat16().float().T, targets)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            gpt.next_token_loss(x, weight, targets), exact, rtol=0, atol=4e-3
        )


def test_loss_and_gradients_are_those_of_plain_cross_entropy():
    x, weight, targets = torch.randn(700, 16), torch.randn(9000, 16), tokens(700, vocab_size=9000)
    targets[::3] = -100
    results = []
    for loss_of in (gpt.next_token_loss, lambda x, w, t: F.cross_entropy(x @ w.T, t)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = loss_of(*leaves, targets)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_expects_every_token_alike(tied):
    model = GPT(GPTConfig(**{**TINY, "vocab_size": 1000, "n_embd": 64, "tie_weights": tied}))
    loss = model(tokens(8, 16, vocab_size=1000), tokens(8, 16, vocab_size=1000))
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05 if tied else 1e-5)


def test_what_branches_add_begins_as_small_as_there_are_many():
    for n_layer in (1, 8):
        model = GPT(GPTConfig(**{**TINY, "n_layer": n_layer, "n_embd": 64}))
        for name, weight in model.named_parameters():
            if name.endswith("c_proj.weight"):
                assert weight.std().item() == pytest.approx(0.02 / (2 * n_layer) ** 0.5, rel=0.1)


def test_one_batch_can_be_learned_by_heart():
    model, batch = GPT(GPTConfig(**TINY)), tokens(4, 17)
    optimizer = train.configure_optimizer(model, 1e-2, 0.0, (0.9, 0.99))
    for _ in range(150):
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


@pytest.mark.parametrize("name", ["dropout", "attn_dropout"])
def test_dropout_is_off_in_evaluation_and_on_in_training(name):
    model, idx = tiny_model(**{name: 0.3}), tokens(2, 16)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.allclose(model(idx), model(idx))


def test_a_tied_head_is_the_embedding_also_after_loading(tmp_path):
    for tied in (True, False):
        model = tiny_model(tie_weights=tied)
        gpt.save_checkpoint(tmp_path / "a.pt", model.checkpoint())
        loaded = GPT.from_checkpoint(load_checkpoint(tmp_path / "a.pt"))
        assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
        assert_equal(dict(model.state_dict()), dict(loaded.state_dict()))


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary_leaves_the_other_tokens_alone(tied):
    model, idx = tiny_model(tie_weights=tied), tokens(2, 8, vocab_size=30)
    logits = model(idx)
    model.resize_vocab(64)
    assert model(idx).shape == (2, 8, 64)
    torch.testing.assert_close(model(idx)[..., :50], logits)
    model.resize_vocab(30)
    torch.testing.assert_close(model(idx), logits[..., :30])
    assert model.num_params() == GPT(model.config).num_params()


# --- choosing the next token ----------------------------------------------------------------------


def test_greedy_sampling_takes_the_likeliest_token():
    logits = torch.randn(5, 20)
    assert torch.equal(gpt.sample(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(gpt.sample(logits, top_k=1), logits.argmax(-1))
    assert torch.equal(gpt.sample(logits, top_p=1e-6), logits.argmax(-1))


def test_top_k_draws_from_exactly_k_tokens_even_among_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [4.0, 1.0, 2.0, 3.9]])
    drawn = torch.stack([gpt.sample(logits, top_k=2) for _ in range(100)])
    assert len(set(drawn[:, 0].tolist())) == 2
    assert 0 not in drawn[:, 0]
    assert set(drawn[:, 1].tolist()) == {0, 3}
    drawn = torch.stack([gpt.sample(logits, temperature=9, top_k=99) for _ in range(100)])
    assert set(drawn[:, 0].tolist()) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([[0.15, 0.5, 0.3, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert keep_top_p(logits, 0.79).isfinite().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert keep_top_p(logits, 0.81).isfinite().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(20_000, 3)
    drawn = gpt.sample(logits, temperature=0.5).bincount(minlength=3) / 20_000
    squared = torch.tensor([0.01, 0.36, 0.09]) / 0.46
    torch.testing.assert_close(drawn, squared, atol=0.02, rtol=0)


def test_a_sequence_that_met_the_stop_token_goes_on_yielding_it():
    model, idx = tiny_model(), tokens(6, 4)
    free = torch.stack(list(model.generate(idx, 30, temperature=0)), dim=1)
    stop = free[0, 3].item()
    stopped = torch.stack(list(model.generate(idx, 30, temperature=0, stop_token=stop)), dim=1)
    for row, free_row in zip(stopped.tolist(), free.tolist()):
        n = free_row.index(stop) if stop in free_row else 30
        assert row == (free_row[:n] + [stop] * 30)[: len(row)]
    assert list(model.generate(idx[:1], 30, temperature=0, stop_token=stop))[-1].item() == stop
    assert len(list(model.generate(idx[:1], 30, temperature=0, stop_token=stop))) <= 4


# --- text and tokens ------------------------------------------------------------------------------


def naive_bpe(text, vocab_size):
    """Counts every pair anew for every merge."""
    words = [list(piece.encode()) for piece in regex.findall(SPLIT, text)]
    found = [bytes([byte]) for byte in range(256)]
    while len(found) < vocab_size:
        pairs = [pair for word in words for pair in itertools.pairwise(word)]
        counts = {pair: 0 for pair in pairs}
        for pair in pairs:
            counts[pair] += 1
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
    ranks = train_bpe([text], 256 + 60)
    assert list(ranks) == naive_bpe(text, 256 + 60)
    assert list(ranks.values()) == list(range(len(ranks)))


def any_text(rng, n):
    """Letters, blanks, and anything else that Unicode has."""
    kinds = ["ab c\n\t'", "éßñ漢字ไทย", "😀👩‍👩‍👧\u0301", "<|endoftext|>"]
    char = lambda: (
        rng.choice(rng.choice(kinds)) if rng.random() < 0.9 else chr(rng.randrange(0xD7FF))
    )
    return "".join(char() for _ in range(n))


def test_bpe_encode_is_what_tiktoken_does():
    ranks = train_bpe([story(500)], 350)
    tokenizer = build_tokenizer(bpe_spec(ranks))
    rng = random.Random(1)
    for text in [story(50, seed=3), *(any_text(rng, 60) for _ in range(50))]:
        ids = [i for piece in regex.findall(SPLIT, text) for i in bpe_encode(piece, ranks)]
        assert ids == tokenizer.encode_ordinary(text)


def test_any_text_and_any_bytes_come_back():
    tokenizer = build_tokenizer(json.loads(json.dumps(bpe_spec(train_bpe([story(300)], 320)))))
    rng = random.Random(2)
    for _ in range(100):
        text = any_text(rng, 40)
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
        decoder = sample.TextDecoder(tokenizer)
        assert "".join(map(decoder.decode, ids)) + decoder.rest() == text
    for byte in range(256):
        assert bytes([byte]) in tokenizer.token_byte_values()


def test_special_tokens_stand_behind_the_learned_ones_and_only_code_can_write_them():
    tokenizer = build_tokenizer(bpe_spec(train_bpe([story(300)], 300)))
    names = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
    n = tokenizer.n_vocab - 4
    assert [tokenizer.encode_single_token(name) for name in names] == list(range(n, n + 4))
    assert max(tokenizer.encode_ordinary("a <|endoftext|> b")) < n


def test_a_text_encoded_in_parts_gives_the_tokens_of_the_whole():
    rng = random.Random(3)
    text = "".join(
        rng.choices(["word", " ", "  ", "\n", "_", "don't", "12", "é", "漢", "!"], k=9000)
    )
    tokenizer = build_tokenizer(bpe_spec(train_bpe([text], 400)))
    parts = list(cut(text, 100))
    assert "".join(parts) == text
    assert len(parts) > 50
    ids = [i for part in parts for i in tokenizer.encode_ordinary(part)]
    assert ids == tokenizer.encode_ordinary(text)


def test_clean_text_has_no_controls_no_blanks_at_line_ends_and_is_clean():
    rng = random.Random(4)
    for _ in range(300):
        mess = "".join(rng.choices("a \t\n\r\0\x1b\ufeff\u2028", k=20))
        text = clean(mess + any_text(rng, 20) + mess)
        controls = {c for c in text if unicodedata.category(c) == "Cc"}
        assert controls <= {"\n", "\t"} and "\ufeff" not in text
        assert not re.search(r"[ \t]$|\n{3}|\A\n|\n\Z", text, re.MULTILINE)
        assert clean(text) == text
    assert clean("  e\u0301\n\tb") == "  é\n\tb"  # indents stay


# --- the data folder ------------------------------------------------------------------------------


def read_split(meta, split):
    return np.concatenate(meta["splits"][split]["arrays"])


def test_shards_hold_the_whole_text_and_an_end_token(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 100)  # documents larger than a shard
    text = clean(story(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepare_data.main([f"{tmp_path}/a.txt", f"--out={tmp_path}/data", "--vocab_size=280"])
    meta = prepare_data.open_data(tmp_path / "data")
    tokenizer = build_tokenizer(meta["tokenizer"])
    assert len(meta["splits"]["train"]["shards"]) > 3
    halves = [read_split(meta, split).tolist() for split in ("train", "val")]
    assert [half.pop() for half in halves] == [meta["eot_token"]] * 2
    assert "".join(map(tokenizer.decode, halves)) == text
    assert abs(meta["splits"]["val"]["bytes"] / len(text) - 0.1) < 0.01


def test_documents_keep_to_one_split_and_duplicates_are_dropped(tmp_path):
    documents = [f"{story(30, seed=i)} {i}" for i in range(300)]
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        for document in documents + documents[:50]:
            print(json.dumps({"text": document}), file=file)
    found = []
    for threads in (1, 3):
        out = tmp_path / f"data{threads}"
        prepare_data.main([f"{tmp_path}/a.jsonl", f"--out={out}", f"--threads={threads}"])
        meta = prepare_data.open_data(out)
        tokenizer = build_tokenizer(meta["tokenizer"])
        texts = {s: tokenizer.decode(read_split(meta, s)) for s in ("train", "val")}
        found.append({s: t.split("<|endoftext|>")[:-1] for s, t in texts.items()})
    assert found[0] == found[1]
    assert sorted(found[0]["train"] + found[0]["val"]) == sorted(map(clean, documents))
    assert 10 < len(found[0]["val"]) < 60


def test_a_tokenizer_can_be_taken_from_an_earlier_folder(data_folder, tmp_path):
    (tmp_path / "b.txt").write_text(story(500, seed=9), encoding="utf-8")
    prepare_data.main([f"{tmp_path}/b.txt", f"--out={tmp_path}/b", f"--tokenizer={data_folder}"])
    metas = [prepare_data.open_data(folder) for folder in (data_folder, tmp_path / "b")]
    assert metas[0]["tokenizer"] == metas[1]["tokenizer"]


def test_a_vocabulary_above_65536_takes_four_bytes_a_token():
    assert prepare_data.token_dtype(65_536) == np.uint16
    assert prepare_data.token_dtype(65_537) == np.uint32


def test_preparing_anew_replaces_the_folder_and_spares_what_others_keep_there(tmp_path):
    (tmp_path / "a.txt").write_text(story(300), encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".gitignore").write_text("*", encoding="utf-8")
    for out in ("data/inner", "data", "data"):
        prepare_data.main([f"{tmp_path}/a.txt", f"--out={tmp_path}/{out}", "--vocab_size=260"])
    for out in ("data", "data/inner"):
        assert prepare_data.open_data(tmp_path / out)["vocab_size"] == 264
    assert (tmp_path / "data" / ".gitignore").read_text(encoding="utf-8") == "*"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "data"]


def test_files_that_are_not_ours_are_never_removed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(story(300), encoding="utf-8")
    prepare_data.main([f"{tmp_path}/a.txt", f"--out={tmp_path}/data"])
    shutil.copy(tmp_path / "a.txt", tmp_path / "data" / "book.txt")
    line = fails(capsys, prepare_data.main, tmp_path / "a.txt", f"--out={tmp_path}/data")
    assert "book.txt" in line
    line = fails(capsys, prepare_data.main, tmp_path / "data", f"--out={tmp_path}/data/x")
    assert "inputs" in line
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "meta.json").write_text("{}", encoding="utf-8")
    line = fails(capsys, prepare_data.main, tmp_path / "a.txt", f"--out={tmp_path}/site")
    assert "meta.json" in line


@pytest.mark.parametrize("step", ["between the renames", "before the clean-up"])
def test_a_kill_while_the_data_folder_is_replaced_loses_nothing(step, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(story(300), encoding="utf-8")
    flags = [f"{tmp_path}/a.txt", f"--out={tmp_path}/data", "--vocab_size=260"]
    prepare_data.main([f"{tmp_path}/a.txt", f"--out={tmp_path}/data/inner"])
    prepare_data.main(flags)
    if step == "between the renames":
        (tmp_path / "data").rename(tmp_path / ".data.old")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(prepare_data, "finish_install", lambda out: None)
            prepare_data.main(flags)
    assert (tmp_path / ".data.old").exists()
    prepare_data.main(flags)
    prepare_data.open_data(tmp_path / "data")
    prepare_data.open_data(tmp_path / "data" / "inner")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "data"]


# --- training -------------------------------------------------------------------------------------


def test_every_window_comes_once_an_epoch():
    shards = [np.arange(0, 37), np.arange(37, 38), np.arange(38, 120)]
    windows = train.Windows(shards, block_size=8, vocab_size=120, seed=3)
    firsts = []
    for epoch in range(3):
        idx, targets = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        assert torch.equal(idx[:, 1:], targets[:, :-1])
        assert torch.equal(targets, idx + 1)  # right across shards
        starts = sorted(idx[:, 0].tolist())
        assert starts == list(range(starts[0], starts[0] + 8 * windows.per_epoch, 8))
        firsts.append(idx[:, 0].tolist())
    assert firsts[0] != firsts[1] != firsts[2]


def test_a_resumed_run_repeats_no_batch_whatever_its_accumulation(
    data_folder, tmp_path, monkeypatch
):
    numbers, micro_batch = [], train.Pretraining.micro_batch
    record = lambda task, n: numbers.append(n) or micro_batch(task, n)
    monkeypatch.setattr(train.Pretraining, "micro_batch", record)
    run_training(data_folder, tmp_path, "--max_iters=4", "--gradient_accumulation_steps=3")
    resume = ["--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=6", "--device=cpu"]
    train.main([*resume, "--gradient_accumulation_steps=1"])
    assert numbers == list(range(14))


def test_accumulated_micro_batches_are_one_large_batch(data_folder, tmp_path):
    weights = []
    for k in (1, 4):
        batch = [f"--batch_size={8 // k}", f"--gradient_accumulation_steps={k}", "--dropout=0"]
        weights.append(run_training(data_folder, tmp_path / str(k), *batch)["model"])
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


def test_logging_and_evaluating_more_often_changes_no_weight(data_folder, tmp_path):
    seldom = run_training(data_folder, tmp_path / "a", "--eval_interval=20", "--log_interval=20")
    often = run_training(data_folder, tmp_path / "b", "--eval_interval=1", "--log_interval=1")
    assert_equal(seldom["model"], often["model"])


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_minimum():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100)
    rates = [train.learning_rate_at(step, config) for step in range(120)]
    assert rates[0] > 0
    assert rates[10] == 1.0 == max(rates)
    assert rates[99] == pytest.approx(0.1)
    assert rates[119] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    for warmup in (0, 99, 100, 200):  # nothing is divided by zero
        config = train.TrainConfig(learning_rate=1e-3, warmup_iters=warmup, max_iters=100)
        assert all(0 < train.learning_rate_at(step, config) <= 1e-3 for step in range(100))


def test_bits_per_byte_are_those_of_the_text():
    split = {"tokens": 10, "bytes": 40}
    assert math.log(16) * train.bits_per_byte_of(split) == pytest.approx(1)  # 4 bits for 4 bytes


def test_weight_decay_is_on_matrices_alone():
    optimizer = train.configure_optimizer(tiny_model(), 1e-3, 0.1, (0.9, 0.95))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() == 2 else 0.0)


def test_every_step_is_counted_and_the_last_one_evaluated(data_folder, tmp_path):
    flags = ["--max_iters=13", "--eval_interval=5", "--log_interval=2"]
    last = run_training(data_folder, tmp_path, *flags)
    assert last["state"]["step"] == 13
    assert all(state["step"] == 13 for state in last["optimizer"]["state"].values())
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 5, 6, 8, 10, 12, 13]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [5, 10, 13]
    assert [int(row["tokens"]) for row in rows] == [64 * int(row["step"]) for row in rows]
    best = min(float(row["val_loss"]) for row in rows if row["val_loss"])
    assert load_checkpoint(tmp_path)["state"]["best_val_loss"] == pytest.approx(best)


def test_training_learns_and_sample_writes(data_folder, tmp_path, capsys):
    run_training(data_folder, tmp_path, "--max_iters=150", "--learning_rate=1e-2", "--dropout=0")
    losses = column(tmp_path, "val_loss")
    assert losses[-1] < losses[0] - 1
    capsys.readouterr()
    sample.main([f"--init_from={tmp_path}", "--start=the cat", "--max_new_tokens=40"])
    out, err = capsys.readouterr()
    assert out.startswith("the cat")
    assert sum(word in out for word in WORDS) > 5
    assert "tokens/s" in err


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
    model.resize_vocab(known + 44)
    with torch.no_grad():
        model.lm_head.weight[known:] = 100 * model.lm_head.weight[:44]
    gpt.save_checkpoint(tmp_path / "best.pt", {**checkpoint, **model.checkpoint()})
    assert model(tokens(4, 8)).argmax(-1).max() >= known
    cropped, _, _ = sample.load_model(tmp_path, torch.device("cpu"))
    assert cropped(tokens(4, 8)).size(-1) == known


def test_training_stops_when_patience_has_run_out_and_keeps_the_best(data_folder, tmp_path):
    last = run_training(
        data_folder, tmp_path, "--patience=2", "--learning_rate=0", "--max_iters=90"
    )
    assert last["state"]["step"] == 30  # evaluated at 10, 20 and 30
    train.main(["--init_from=resume", f"--out_dir={tmp_path}", "--patience=4"])
    assert load_checkpoint(tmp_path / "last.pt")["state"]["step"] == 50
    assert load_checkpoint(tmp_path / "best.pt")["state"]["step"] == 10


def test_training_can_begin_with_another_runs_weights(data_folder, tmp_path, capsys):
    first = run_training(data_folder, tmp_path / "a")
    train.main([f"--data={data_folder}", f"--init_from={tmp_path / 'a'}", "--eval_only"])
    assert f"{first['state']['best_val_loss']:.4f}" in capsys.readouterr().out
    second = run_training(data_folder, tmp_path / "b", f"--init_from={tmp_path / 'a'}")
    assert second["state"]["best_val_loss"] < first["state"]["best_val_loss"]


def test_an_earlier_run_in_the_folder_is_kept(data_folder, tmp_path):
    first = run_training(data_folder, tmp_path)
    run_training(data_folder, tmp_path, "--seed=2", "--max_iters=5")
    assert_equal(first["model"], load_checkpoint(tmp_path / "previous" / "last.pt")["model"])
    assert load_checkpoint(tmp_path / "last.pt")["state"]["step"] == 5


def start(*command):
    """A process of its own, on one thread as here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = pathlib.Path(train.__file__).parent
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, env=environment)


def wait_for(process, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_train_as_one_until_a_signal_stops_both_and_one_goes_on(
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
    wait_for(run, lambda: len(column(two, "step")) >= 5)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) != 0
    steps = load_checkpoint(two / "last.pt")["state"]["step"]
    last = f"--max_iters={steps + 10}"
    train.main(["--init_from=resume", f"--out_dir={two}", last, "--gradient_accumulation_steps=2"])
    train.main([*flags, f"--out_dir={one}", last, "--batch_size=8"])
    for name in ("train_loss", "val_loss"):
        assert column(one, name) == pytest.approx(column(two, name), abs=1e-4)
    for name, weight in load_checkpoint(one / "last.pt")["model"].items():
        torch.testing.assert_close(
            weight, load_checkpoint(two / "last.pt")["model"][name], atol=1e-4, rtol=0
        )


# --- any text -------------------------------------------------------------------------------------


def documents_of(*inputs, **options):
    return [text for _, text in prepare_data.read_documents(inputs, **options)]


def test_every_kind_of_file_gives_its_documents(tmp_path):
    files = {
        "b.txt": "one",
        "a/c.md": "two",
        "a/b.jsonl": '{"text": "three"}\n\n{"text": "four", "x": 1}\n',
        "a/d.json": '[{"text": "five"}, {"text": "six"}]',
        "a/e.html": "<title>no</title><p>seven &eacute;<script>no</script> <b>x</b>y</p>"
        "<pre> z\n</pre>",
        "a/.hidden": "no",
        "a/z.png": "no\0",
    }
    (tmp_path / "a").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = list(map(clean, documents_of(tmp_path / "b.txt", tmp_path / "a")))
    assert found == ["one", "three", "four", "two", "five", "six", "seven é xy\n\n z"]


@pytest.mark.parametrize("block", [3, 7, 1 << 20])
def test_a_separator_divides_a_file_wherever_its_blocks_end(tmp_path, block, monkeypatch):
    monkeypatch.setattr(prepare_data, "READ_BYTES", block)
    (tmp_path / "a.txt").write_text("one<|x|>twö <|x<|x|><|x|>three", encoding="utf-8")
    assert documents_of(tmp_path / "a.txt", separator="<|x|>") == ["one", "twö <|x", "", "three"]


def test_a_page_is_downloaded_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (b"<p>hello</p>", {"Content-Type": "text/html; charset=utf-8"})
    lines = (b'{"text": "one"}', {})
    with web_server(
        {"/page": page, "/a.jsonl?raw=true": lines, "/of/http://b.jsonl?raw=1": lines}
    ) as (url, asked):
        for _ in range(2):
            assert [clean(text) for text in documents_of(f"{url}/page")] == ["hello"]
        with pytest.raises(ValueError, match="404"):
            documents_of(f"{url}/nothing")
        for name in ("/a.jsonl?raw=true", "/of/http://b.jsonl?raw=1"):
            assert documents_of(url + name) == ["one"]
    assert len(asked) == 4
    assert len(list((tmp_path / "downloads").iterdir())) == 3


def test_a_sample_for_the_bpe_is_spread_over_all_text():
    texts = [f"{chr(97 + i)} " * 2000 for i in range(20)]
    taken = "".join(prepare_data.spread_sample(texts, 0.2))
    assert 0.15 < len(taken) / sum(map(len, texts)) < 0.3
    assert len(set(taken[: len(taken) // 2])) > 2
    assert "".join(prepare_data.spread_sample(texts, 1)) == "".join(texts)


# --- other people's models ------------------------------------------------------------------------


def far_from_new(model):
    """The model with every parameter, also biases, at a value of its own."""
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 10
    return model.eval()


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_export_and_import_give_the_same_model(bias, tie_weights, tmp_path):
    model = far_from_new(tiny_model(bias=bias, tie_weights=tie_weights))
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_transformers_computes_the_same_logits(bias, tie_weights, tmp_path):
    import transformers

    model, idx = far_from_new(tiny_model(bias=bias, tie_weights=tie_weights)), tokens(2, 16)
    model.save_pretrained(tmp_path, eos_token_id=49)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-5, rtol=0)
    assert theirs.generation_config.eos_token_id == 49


def test_weights_in_half_precision_and_without_the_prefix_are_read_too(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    theirs = far_from_new(transformers.GPT2LMHeadModel(config)).half()
    # the body alone has no "transformer." before its names, as OpenAI's weights have none
    theirs.transformer.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path / "model.safetensors"), tokens(2, 16)
    torch.testing.assert_close(theirs.float()(idx).logits, ours(idx), atol=1e-5, rtol=0)


def test_biases_trained_elsewhere_are_not_lost(tmp_path):
    import transformers

    tiny_model(bias=False).save_pretrained(tmp_path)
    theirs = far_from_new(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    theirs.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path), tokens(2, 16)
    torch.testing.assert_close(theirs(idx).logits, ours(idx), atol=1e-5, rtol=0)


def test_our_safetensors_files_and_the_packages_are_interchangeable(tmp_path):
    import safetensors.torch

    path = tmp_path / "x.safetensors"
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(2, 2).bfloat16(),
        "c": torch.randn(7).half(),
    }
    gpt.write_safetensors(path, tensors)
    assert_equal(safetensors.torch.load_file(path), tensors)
    safetensors.torch.save_file(tensors, path)
    assert_equal(dict(gpt.read_safetensors(path)), tensors)
    data = path.read_bytes()  # one more blank in the header, and nothing is aligned
    size = int.from_bytes(data[:8], "little")
    path.write_bytes(
        (size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :]
    )
    assert_equal(dict(gpt.read_safetensors(path)), tensors)


def test_transformers_makes_the_same_tokens(tmp_path):
    import transformers

    spec = bpe_spec(train_bpe([story(2000), pathlib.Path(__file__).read_text("utf-8")], 700))
    prepare_data.save_tokenizer(spec, tmp_path, 16)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    ours, theirs = build_tokenizer(spec), transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for text in [any_text(rng, rng.randrange(60)) for _ in range(200)]:
        assert theirs(text)["input_ids"] == ours.encode_ordinary(text)
    assert theirs.eos_token_id == ours.eot_token
    assert prepare_data.read_tokenizer(tmp_path) == spec
    theirs.save_pretrained(tmp_path / "again")
    assert prepare_data.read_tokenizer(tmp_path / "again") == spec


def test_a_model_goes_out_and_comes_back_through_the_scripts(data_folder, tmp_path, capsys):
    run_training(data_folder, tmp_path / "out")
    sample.main([f"--init_from={tmp_path}/out", f"--save_pretrained={tmp_path}/hf"])
    texts = []
    for name in ("out", "hf"):
        capsys.readouterr()
        sample.main([f"--init_from={tmp_path}/{name}", "--max_new_tokens=20", "--seed=1"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    prepare_data.main(
        [str(data_folder.parent / "story.txt"), f"--out={tmp_path}/data"]
        + [f"--tokenizer={tmp_path}/hf"]
    )
    train.main(
        [f"--data={tmp_path}/data", f"--init_from={tmp_path}/hf", f"--out_dir={tmp_path}/more"]
        + ["--block_size=8", "--dropout=0.2", "--max_iters=5", "--device=cpu"]
    )
    more = load_checkpoint(tmp_path / "more" / "last.pt")
    assert more["config"]["block_size"] == 8
    assert more["config"]["dropout"] == 0.2
    assert len(more["model"]["transformer.wpe.weight"]) == 8


def test_a_checkpoint_of_nanogpt_is_a_model_too(tmp_path, capsys):
    model, idx = tiny_model(bias=False), tokens(2, 16)
    weights = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    shape = {name: value for name, value in TINY.items()} | {"bias": False, "dropout": 0.0}
    torch.save({"model": weights, "model_args": shape, "iter_num": 5}, tmp_path / "ckpt.pt")
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx), model(idx))
    assert "exact GELU" in capsys.readouterr().err


@pytest.mark.parametrize("block_size", [8, 40])
def test_another_context_leaves_the_old_positions_alone(block_size):
    model, idx = tiny_model(), tokens(2, 8)
    before = model(idx)
    model.resize_positions(block_size)
    assert torch.equal(model(idx), before)
    assert model(tokens(1, block_size)).shape == (1, block_size, 50)
    with pytest.raises(ValueError, match="do not fit"):
        model(tokens(1, block_size + 1))


def safetensors_file(changes=None, data=b"\0" * 8, length=None, **more):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps(
        {"a": entry | (changes or {}), **{name: entry | more[name] for name in more}}
    ).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


BAD_SAFETENSORS = {
    "empty": b"",
    "header longer than the file": safetensors_file(length=10**6),
    "header longer than any file": b"\xff" * 100,
    "data cut off": safetensors_file(data=b"\0" * 7),
    "data left over": safetensors_file(data=b"\0" * 9),
    "out of bounds": safetensors_file({"shape": [4], "data_offsets": [0, 16]}),
    "before the data": safetensors_file({"data_offsets": [-8, 0]}),
    "tensors that overlap": safetensors_file(b={"data_offsets": [4, 12]}, data=b"\0" * 12),
    "a gap": safetensors_file({"data_offsets": [8, 16]}, data=b"\0" * 16),
    "shape and length disagree": safetensors_file({"shape": [3]}),
    "shape that overflows": safetensors_file({"shape": [2**62, 4]}),
    "negative shape": safetensors_file({"shape": [-1, -2]}),
    "offsets of another kind": safetensors_file({"data_offsets": ["0", 8]}),
    "unknown dtype": safetensors_file({"dtype": "F8_E4M3"}),
    "not JSON": (8).to_bytes(8, "little") + b"{{{{{{{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_a_malformed_safetensors_file_is_refused(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_SAFETENSORS[name])
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        list(gpt.read_safetensors(path))


def test_a_model_of_another_architecture_is_refused_with_the_reason(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    good, flag = (tmp_path / "config.json").read_text(), f"--init_from={tmp_path}"
    for old, new, complaint in [
        ('"gpt2"', '"llama"', "model_type is 'llama'"),
        ("gelu_new", "relu", "activation_function is 'relu'"),
        ("1e-05", "1e-12", "layer_norm_epsilon"),
        ('"n_layer": 2', '"n_layer": 3', "Missing key"),
        ('"n_layer": 2', '"n_layer": 1', "Unexpected key"),
        ('"n_embd": 16', '"n_embd": 18', "size mismatch for transformer.wte.weight"),
        ('"n_head": 2', '"n_head": "2"', "n_head must be int"),
        ("{", "[", "not a GPT-2 that can be loaded"),
    ]:
        (tmp_path / "config.json").write_text(good.replace(old, new))
        assert complaint in fails(capsys, sample.main, flag)
    (tmp_path / "config.json").write_text(good)
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors: No such file" in fails(capsys, sample.main, flag)


def test_an_export_into_a_run_does_not_hide_the_run(base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    tiny_model().save_pretrained(tmp_path / "out")
    assert_equal(load_checkpoint(tmp_path / "out")["model"], load_checkpoint(base)["model"])


def test_tokenizers_of_another_kind_are_refused(tmp_path):
    prepare_data.save_tokenizer(bpe_spec(train_bpe([story(200)], 260)), tmp_path, 16)
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    for changed in [
        {name: rank + 1 for name, rank in vocab.items()},
        {name: len(vocab) - 1 - rank for name, rank in vocab.items()},
        {name: rank for name, rank in vocab.items() if rank != 65},
        ["a"],
    ]:
        (tmp_path / "vocab.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(ValueError, match="the tokenizer cannot be read"):
            prepare_data.read_tokenizer(tmp_path)


def test_gpt2_is_downloaded_once_and_only_whole(tmp_path, monkeypatch):
    model, idx = far_from_new(tiny_model()), tokens(2, 16)
    model.save_pretrained(tmp_path / "hub")
    config, weights = (
        (tmp_path / "hub" / name).read_bytes() for name in ("config.json", "model.safetensors")
    )
    answers, at = {}, "/openai-community/gpt2/resolve/main/"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with web_server(answers) as (url, asked):
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(ValueError, match="404"):
            load_checkpoint("gpt2")
        answers[at + "config.json"] = (config, {"Content-Length": len(config)})
        size = {"Content-Length": len(weights)}
        for broken in [
            (weights[: len(weights) // 2], size),  # the connection breaks off
            (weights[:-4], {}),
            (weights + b"more", {}),
            (b"<html>too many requests</html>", {}),
        ]:
            answers[at + "model.safetensors"] = broken
            with pytest.raises(ValueError, match="cannot be downloaded"):
                load_checkpoint("gpt2")
            assert os.listdir(tmp_path / "cache" / "gpt2") == ["config.json"]
        answers[at + "model.safetensors"] = (weights, size)
        for _ in range(2):
            assert torch.equal(GPT.from_pretrained("gpt2")(idx), model(idx))
        assert asked.count(at + "model.safetensors") == 5
        assert asked.count(at + "config.json") == 2


# --- fine-tuning ----------------------------------------------------------------------------------


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
    data = write_rows(tmp_path / "x.jsonl", labelled(60))
    last, best = run_finetune(
        base, tmp_path / "o", data, "--task=classify", f"--train={train_flag}"
    )
    before = load_checkpoint(base)["model"]
    changed = {name for name in before if not torch.equal(before[name], best["model"][name])}
    block = {name for name in before if name.startswith(("transformer.h.0", "transformer.ln_f"))}
    expected = {
        "all": set(before),
        "last_block": block,
        "head": set(),
        "lora": {name for name in before if name.endswith(gpt.TRANSPOSED)},
    }[train_flag]
    assert changed == expected
    trained = len(last["model"])
    assert len(last["optimizer"]["state"]) == trained
    assert trained == {"all": len(before) + 2, "last_block": 16, "head": 2, "lora": 10}[train_flag]
    assert GPT.from_checkpoint(best).config == GPT.from_checkpoint(load_checkpoint(base)).config


def test_the_loss_of_a_conversation_is_on_its_answers_alone():
    tokenizer = build_tokenizer(bpe_spec(train_bpe([story(200)], 260)))
    end = tokenizer.eot_token
    single = [("system", "be short"), ("user", "the cat"), ("assistant", "sees a dog")]
    for turns in (single, single + [("user", "and"), ("assistant", "not a red house")]):
        for template in ("roles", "alpaca"):
            messages = [{"role": role, "content": content} for role, content in turns]
            parts = prepare_data.chat_parts(messages, tokenizer, template)
            idx, targets = finetune.to_row(parts, block_size=1000)
            whole = [*idx, targets[-1]]
            answers = [tokenizer.encode(c) + [end] for role, c in turns if role == "assistant"]
            assert [t for t in targets if t != -100] == list(itertools.chain(*answers))
            for i, target in enumerate(targets):  # the state at i predicts the token at i + 1
                assert target in (-100, whole[i + 1])
            text = tokenizer.decode(whole)
            assert all(content in text for _, content in turns)


def test_an_example_too_long_loses_its_beginning_but_keeps_an_answer():
    parts = [([1] * 10, False), ([2] * 3, True), ([3] * 10, False), ([4] * 5, True)]
    assert finetune.to_row(parts, 100)[1].count(4) == 5
    idx, targets = finetune.to_row(parts, 8)
    assert idx == [3] * 4 + [4] * 4
    assert targets == [-100] * 3 + [4] * 5
    idx, targets = finetune.to_row(parts, 3)  # not even the answer fits: its end goes
    assert idx == [3, 4, 4]
    assert targets == [4, 4, 4]


def test_padding_changes_neither_loss_nor_prediction():
    model = finetune.Classifier(tiny_model(), 3, lm_weight=0).eval()
    rows = [tokens(n).tolist() for n in (3, 9, 16)]
    last = torch.tensor([2, 8, 15])
    together = model.scores(finetune.pad(rows, 7), last)
    for row, scores in zip(rows, together):  # the head reads the last token that is not padding
        hidden = model.gpt.hidden(torch.tensor([row]))[:, -1]
        torch.testing.assert_close(model.head(hidden)[0], scores)
    targets = [[-100, *row[1:]] for row in rows]
    sums = finetune.token_log_probs(model.gpt, finetune.pad(rows, 7), finetune.pad(targets, -100))
    loss = model.gpt(finetune.pad(rows, 7), finetune.pad(targets, -100))
    torch.testing.assert_close(loss, -sums.sum() / (2 + 8 + 15))
    for row, target, log_probs in zip(rows, targets, sums):
        alone = model.gpt(torch.tensor([row]), torch.tensor([target]))
        torch.testing.assert_close(-alone * (len(row) - 1), log_probs.sum())


def test_every_target_weighs_the_same_however_the_step_is_divided(base, tmp_path):
    data = write_rows(tmp_path / "x.jsonl", asked(40))  # answers of unlike length
    runs = [
        run_finetune(base, tmp_path / f"{i}", data, "--max_iters=1", "--epochs=1", *flags)
        for i, flags in enumerate(
            [
                ["--batch_size=40"],
                ["--batch_size=4", "--gradient_accumulation_steps=10"],
            ]
        )
    ]
    (one, _), (many, _) = runs
    for name, weight in one["model"].items():
        torch.testing.assert_close(weight, many["model"][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [["--task=classify"], ["--task=instruct", "--train=lora", "--lora_dropout=0.1"]],
)
def test_resumed_fine_tuning_is_uninterrupted_fine_tuning(flags, base, tmp_path):
    rows = labelled(60) if "--task=classify" in flags else asked(60)
    data, flags = write_rows(tmp_path / "x.jsonl", rows), [*flags, "--dropout=0.1"]
    whole = run_finetune(base, tmp_path / "whole", data, *flags)
    run_finetune(base, tmp_path / "parts", data, *flags, "--max_iters=6", "--lr_decay_iters=12")
    finetune.main(
        [*flags[:1], "--init_from=resume", f"--out_dir={tmp_path}/parts", "--max_iters=12"]
    )
    for a, b in zip(whole, ("last.pt", "best.pt")):
        b = torch.load(tmp_path / "parts" / b, weights_only=True)
        assert_equal(a["model"], b["model"])
        assert_equal(a.get("optimizer"), b.get("optimizer"))
        assert a["state"]["best_val_loss"] == b["state"]["best_val_loss"]


def test_a_classifier_learns_and_answers(base, tmp_path, capsys):
    data = write_rows(tmp_path / "x.jsonl", labelled(200))
    flags = ["--task=classify", "--max_iters=300", "--lm_weight=0.1", "--learning_rate=3e-3"]
    run_finetune(base, tmp_path / "o", data, *flags, "--patience=20", "--eval_interval=20")
    report = capsys.readouterr().out.partition("\ntrain  ")[2]
    again = ["--task=classify", f"--init_from={tmp_path}/o", f"--data={data}", "--eval_only"]
    finetune.main([*again, "--seed=5", "--device=cpu"])  # the split is that of the training
    assert capsys.readouterr().out.partition("\ntrain  ")[2] == report
    with open(tmp_path / "o" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert sum(row["label"] == row["predicted"] for row in rows) >= 30
    for row in rows[:3]:
        capsys.readouterr()
        model = f"--init_from={tmp_path}/o"
        finetune.main(["--task=classify", model, f"--predict={row['text']}", "--device=cpu"])
        label, probability = capsys.readouterr().out.split()
        assert label == row["predicted"]
        assert float(probability) == pytest.approx(float(row["probability"]), abs=1e-3)


def test_a_longer_context_grows_positions_that_are_trained(base, tmp_path):
    rows = [{**row, "text": row["text"] * 4} for row in labelled(60)]
    data = write_rows(tmp_path / "x.jsonl", rows)
    _, best = run_finetune(
        base, tmp_path / "o", data, "--task=classify", "--train=lora", "--block_size=64"
    )
    table = best["model"]["transformer.wpe.weight"]
    assert table.shape == (64, 16)
    before = load_checkpoint(base)["model"]["transformer.wpe.weight"]
    assert (table[:16] != before).all()  # though the rest is frozen


def test_splits_share_no_text_and_no_group(base, tmp_path):
    rows = [
        {"text": f"t{i % 270}", "group": i % 270 // 3, "label": "ab"[i % 2]} for i in range(300)
    ]
    test = [{"text": f"t{261 + i}", "group": f"x{i}", "label": "a"} for i in range(9)]
    config = finetune.FinetuneConfig(
        task="classify",
        data=write_rows(tmp_path / "x.jsonl", rows).as_posix(),
        test=write_rows(tmp_path / "test.jsonl", test).as_posix(),
    )
    task = finetune.Classify(config, train.Machine(config), load_checkpoint(base), base)
    for what in ("text", "group"):
        splits = [{example[what] for example in some} for some in task.examples.values()]
        assert all(splits)
        assert sum(map(len, splits)) == len(set.union(*splits))
    assert len(set.union(*splits)) == 87 + 9  # groups, 0 among them
    assert sum(map(len, task.examples.values())) == 270


def test_a_conversation_forgets_its_oldest_exchanges():
    tokenizer = build_tokenizer(bpe_spec(train_bpe([story(200)], 260)))
    messages = []
    for i in range(6):
        messages.append({"role": "user", "content": f"question {i}"})
        prompt = sample.fitting_prompt(messages, tokenizer, "roles", 60)
        text = tokenizer.decode(prompt)
        assert len(prompt) <= 60
        assert text.startswith("<|user|>")
        assert text.endswith(f"question {i}<|assistant|>")
        messages.append({"role": "assistant", "content": f"answer {i}"})
    assert "question 4" in text
    assert "question 0" not in text


def test_a_chat_answers_line_by_line(base, tmp_path, capsys, monkeypatch):
    rows = [{"instruction": f"say {word}", "output": word} for word in ("red", "dog")] * 10
    data, val = write_rows(tmp_path / "x.jsonl", rows), write_rows(tmp_path / "val.jsonl", rows)
    flags = [f"--val={val}", "--max_iters=300", "--learning_rate=3e-3"]
    run_finetune(base, tmp_path / "o", data, *flags)
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("say dog\nsay red\n"))
    sample.main([f"--init_from={tmp_path}/o", "--chat", "--temperature=0"])
    assert capsys.readouterr().out == "dog\nred\n"


def test_one_word_texts_and_few_prompts_train_too(base, tmp_path, monkeypatch):
    rows = [{"text": "ab"[i % 2] * (i // 2 + 1), "label": "ab"[i % 2]} for i in range(40)]
    data = write_rows(tmp_path / "x.jsonl", rows)
    run_finetune(base, tmp_path / "o", data, "--task=classify", "--batch_size=1")
    flags = ppo_task(base, tmp_path, monkeypatch, share_of_e, "--batch_size=3", "--max_iters=2")
    finetune.main(flags)


def test_preference_accuracy_can_be_measured_without_training(base, tmp_path, capsys):
    data = write_rows(tmp_path / "x.jsonl", preferred(60))
    finetune.main(["--task=dpo", f"--init_from={base}", f"--data={data}", "--eval_only"])
    assert re.search(r"val +loss [\d.]+ +accuracy [\d.]+", capsys.readouterr().out)


def test_multiple_choice_picks_the_likelier_ending(base, tmp_path, capsys):
    rows = [
        {"ctx": "the cat", "endings": ["sees a dog", "\x07 zq#"], "label": i % 2}
        for i in (0, 0, 1, 0)
    ]
    data = write_rows(tmp_path / "x.jsonl", rows)
    finetune.main(["--task=choice", f"--init_from={base}", f"--data={data}"])
    assert capsys.readouterr().out.count("0.7500") == 2


def test_every_kind_of_table_gives_the_same_examples(tmp_path):
    rows = [{"label": "a", "text": 'say "hi", ok'}, {"label": "b", "text": "c"}]
    write_rows(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "x.csv").write_text('label,text\na,"say ""hi"", ok"\nb,c\n', encoding="utf-8")
    (tmp_path / "x.tsv").write_text('label\ttext\na\tsay "hi", ok\nb\tc\n', encoding="utf-8")
    (tmp_path / "y.tsv").write_text('a\tsay "hi", ok\nb\tc\n', encoding="utf-8")
    for name in ("x.jsonl", "x.json", "x.csv", "x.tsv", "y.tsv"):
        read = [row for _, row in finetune.read_rows(tmp_path / name, ("label", "text"))]
        assert read == rows, name


# --- preferences ----------------------------------------------------------------------------------


def preferred(n):
    """Instructions whose better answers are other words than the worse ones."""
    return [
        {"instruction": f"say {i}", "chosen": WORDS[i % 6], "rejected": WORDS[6 + i % 5]}
        for i in range(n)
    ]


def test_dpo_loss_is_its_equation():
    chosen, rejected, ref_chosen, ref_rejected = (-torch.rand(4, 50) * 90).double()
    losses, margins = finetune.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    for i in range(50):
        ratio = (chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i])
        assert losses[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.3 * ratio))))
        assert margins[i].item() == pytest.approx(0.3 * ratio.item())


@pytest.mark.parametrize("train_flag", ["all", "lora"])
def test_dpo_begins_at_ln_2_and_learns_which_answer_is_better(train_flag, base, tmp_path):
    data = write_rows(tmp_path / "x.jsonl", preferred(120))
    flags = [f"--train={train_flag}", "--max_iters=60", "--log_interval=1"]
    run_finetune(base, tmp_path / "o", data, "--task=dpo", *flags)
    assert column(tmp_path / "o", "train_loss")[0] == pytest.approx(math.log(2))
    assert column(tmp_path / "o", "val_loss")[-1] < math.log(2)
    assert column(tmp_path / "o", "val_margin")[-1] > 0


def test_equal_answers_are_dropped_and_counted(base, tmp_path, capsys):
    rows = [*preferred(60), {"instruction": "say", "chosen": "cat", "rejected": "cat"}]
    run_finetune(base, tmp_path / "o", write_rows(tmp_path / "x.jsonl", rows), "--task=dpo")
    assert "dropped 1 pairs" in capsys.readouterr().out


def test_a_reward_model_scores_conversations_around_zero(base, tmp_path, capsys):
    data = write_rows(tmp_path / "x.jsonl", preferred(120))
    run_finetune(base, tmp_path / "o", data, "--task=reward", "--max_iters=60")
    machine = train.Machine(finetune.FinetuneConfig(device="cpu"))
    score, _ = finetune.load_reward(tmp_path / "o", machine)
    scores = []
    for row in preferred(120):
        if prepare_data.position(row["instruction"]) >= 0.1:  # those it was trained on
            for name in ("chosen", "rejected"):
                messages = [
                    {"role": "user", "content": row["instruction"]},
                    {"role": "assistant", "content": row[name]},
                ]
                scores.append(score([messages]).item())
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4)
    together = score([[{"role": "assistant", "content": text}] for text in ("a", "the red dog")])
    capsys.readouterr()  # padding changes no score
    for text, expected in zip(("a", "the red dog"), together.tolist()):
        finetune.main(["--task=reward", f"--init_from={tmp_path}/o", f"--predict={text}"])
        assert float(capsys.readouterr().out) == pytest.approx(expected, abs=1e-3)


def test_advantages_are_their_definition():
    rewards, values = torch.randn(2, 3, 9).double()
    answered = torch.zeros(3, 9, dtype=torch.bool)
    for row, (start, end) in enumerate([(2, 9), (0, 4), (5, 6)]):
        answered[row, start:end] = True
    rewards, values = rewards * answered, values * answered
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


def ppo_task(base, tmp_path, monkeypatch, reward, *flags):
    monkeypatch.setattr(finetune, "load_reward", lambda path, machine: (reward, ""))
    data = write_rows(tmp_path / "x.jsonl", asked(80))
    monkeypatch.setattr(finetune, "MEASURED", 8)
    return [
        "--task=ppo",
        f"--init_from={base}",
        f"--data={data}",
        f"--out_dir={tmp_path}/o",
        "--device=cpu",
        "--max_new_tokens=6",
        "--batch_size=16",
        *flags,
    ]


def share_of_e(conversations):
    """A reward: how much of an answer is the letter e."""
    answers = [conversation[-1]["content"] for conversation in conversations]
    return torch.tensor([answer.count("e") / max(1, len(answer)) for answer in answers])


def test_the_first_update_of_ppo_is_on_policy(base, tmp_path, monkeypatch):
    flags = ppo_task(base, tmp_path, monkeypatch, share_of_e)
    parsed = train.parse_flags(finetune.FinetuneConfig, "", flags)
    config = finetune.FinetuneConfig(**parsed)
    task = finetune.PPO(config, train.Machine(config), load_checkpoint(base), base)
    task.prepare()
    tensors, stats = task.experience(0)
    idx, targets, log_probs, *_ = tensors
    assert stats["kl"] == pytest.approx(0, abs=1e-5)
    assert task.loss(*tensors)[1] == 0  # nothing is clipped
    answered = targets != -100
    torch.testing.assert_close(task.model(idx, targets)[0], log_probs)
    # the state before a token is the one that predicts it
    logits = task.gpt(idx).log_softmax(-1)
    for row, t in answered.nonzero().tolist():
        assert log_probs[row, t] == pytest.approx(logits[row, t, targets[row, t]].item(), abs=1e-5)
        if t + 1 < idx.size(1) and answered[row, t + 1]:
            assert idx[row, t + 1] == targets[row, t]


def test_ppo_finds_the_reward(base, tmp_path, monkeypatch):
    flags = ppo_task(base, tmp_path, monkeypatch, share_of_e, "--beta=0.01", "--max_kl=1e9")
    finetune.main([*flags, "--max_iters=40", "--learning_rate=1e-2"])
    scores = column(tmp_path / "o", "score")
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.2


def test_ppo_with_a_large_penalty_stays_at_the_reference(base, tmp_path, monkeypatch):
    kls = []
    for beta in ("0", "5"):
        flags = ppo_task(base, tmp_path, monkeypatch, share_of_e, f"--beta={beta}", "--max_kl=1e9")
        finetune.main([*flags, "--max_iters=15", "--learning_rate=3e-3"])
        kls.append(sum(column(tmp_path / "o", "kl")))
    assert abs(kls[1]) < kls[0] / 4


def test_ppo_stops_when_it_has_gone_too_far(base, tmp_path, monkeypatch, capsys):
    flags = ppo_task(base, tmp_path, monkeypatch, share_of_e, "--beta=0", "--max_kl=0.05")
    finetune.main([*flags, "--max_iters=30", "--learning_rate=3e-3"])
    assert "--max_kl=0.05" in capsys.readouterr().out
    assert len((tmp_path / "o" / "metrics.csv").read_text().splitlines()) < 30


def test_resumed_ppo_is_uninterrupted_ppo(base, tmp_path, monkeypatch):
    results = []
    for name, steps in (("whole", [8]), ("parts", [4, 8])):
        flags = ppo_task(base, tmp_path, monkeypatch, share_of_e, "--eval_interval=4")
        flags = [*flags, f"--out_dir={tmp_path}/{name}", "--lr_decay_iters=8"]
        finetune.main([*flags, f"--max_iters={steps[0]}"])
        for n in steps[1:]:
            out_dir = f"--out_dir={tmp_path}/{name}"
            finetune.main(["--task=ppo", "--init_from=resume", out_dir, f"--max_iters={n}"])
        results.append(torch.load(tmp_path / name / "last.pt", weights_only=True))
    assert_equal(results[0]["model"], results[1]["model"])
    assert_equal(results[0]["optimizer"], results[1]["optimizer"])


BAD_EXAMPLES = {
    "x.jsonl, line 1: no column text (found: body, label)": (
        "classify",
        [{"body": "a", "label": "b"}],
    ),
    "x.jsonl, line 2: the label is empty": (
        "classify",
        [{"text": "a", "label": "b"}, {"text": "a", "label": " "}],
    ),
    "the only label is ['b']": ("classify", [{"text": str(i), "label": "b"} for i in range(20)]),
    "too few examples": ("classify", [{"text": str(i), "label": str(i)} for i in range(4)]),
    "line 1: not an object": ("classify", [["a", "b"]]),
    "line 1: there is no prompt": (
        "instruct",
        [{"messages": [{"role": "assistant", "content": "a"}]}],
    ),
    "line 1: messages need a role": ("dpo", [{"messages": [], "chosen": "a", "rejected": "b"}]),
    "line 1: there is no answer": ("instruct", [{"instruction": "a", "output": ""}]),
    "no column instruction or prompt": ("instruct", [{"output": "a"}]),
    "messages need a role": ("instruct", [{"messages": [{"role": "robot", "content": "a"}]}]),
    "rejected is empty": ("dpo", [{"prompt": "a", "chosen": "b", "rejected": ""}]),
    "no column rejected (found: prompt, chosen)": ("reward", [{"prompt": "a", "chosen": "b"}]),
    "give ctx, endings": ("choice", [{"ctx": "a", "endings": ["b"], "label": 0}]),
}


@pytest.mark.parametrize("complaint", BAD_EXAMPLES)
def test_a_bad_example_is_refused_with_its_place(complaint, base, tmp_path, capsys):
    task, rows = BAD_EXAMPLES[complaint]
    data = write_rows(tmp_path / "x.jsonl", rows)
    flags = [f"--task={task}", f"--init_from={base}", f"--data={data}", f"--out_dir={tmp_path}/o"]
    line = fails(capsys, finetune.main, *flags)
    assert complaint in line


def test_impossible_fine_tuning_ends_in_one_line_that_says_why(base, tmp_path, capsys):
    data = write_rows(tmp_path / "x.jsonl", labelled(40))
    other = write_rows(tmp_path / "val.jsonl", [{"text": "a", "label": "bird"}])
    good = ["--task=classify", f"--init_from={base}", f"--data={data}", f"--out_dir={tmp_path}/o"]
    for flags, complaint in [
        (["--task=swim"], "--task=swim: unknown; there are classify"),
        (["--train=some"], "--train=some: unknown"),
        (["--task=instruct", "--test=x.jsonl"], "--test is for --task=classify"),
        (["--task=instruct", "--train=head"], "--train=head is for classify and reward"),
        ([f"--val={other}"], "val.jsonl, line 1: training has no label 'bird'"),
        (["--predict=a"], "has no head for this; --task=classify trains one"),
        (["--task=instruct", "--predict=a"], "--predict is for --task=classify"),
        (["--data=none.csv"], "none.csv: No such file"),
        (["--data=none.txt"], "give a .jsonl, .json, .csv or .tsv file"),
        (["--init_from=resume"], "no such checkpoint"),
        (["--task=choice"], "x.jsonl, line 1: give ctx"),
        (["--task=ppo", "--epochs=2"], "--task=ppo goes by --max_iters"),
        (["--epochs=0"], "--epochs must be above 0"),
        (["--batch_size=0"], "batch_size must be 1 or more"),
        ([f"--out_dir={base}"], "holds a model that is needed"),
        (["--text_field=body"], "no column body (found: text, label)"),
        (["--lora_rank=0"], "lora_rank must be 1 or more"),
    ]:
        assert complaint in fails(capsys, finetune.main, *good, *flags)
    run_finetune(base, tmp_path / "o", data, "--task=classify")
    resume = ["--task=classify", "--init_from=resume", f"--out_dir={tmp_path}/o"]
    assert "not --train=lora" in fails(capsys, finetune.main, *resume, "--train=lora")
    write_rows(data, labelled(42))
    assert "not those of that run" in fails(capsys, finetune.main, *resume)
    (tmp_path / "o" / "best.pt").unlink()
    line = fails(capsys, sample.main, f"--init_from={tmp_path}/o")
    assert "only what finetune.py has trained" in line


def test_a_damaged_field_of_a_checkpoint_is_refused(base, tmp_path, capsys):
    whole = {**load_checkpoint(base), "task": "classify", "labels": ["a", "b"]}
    for damage in ({"template": 1}, {"labels": [1]}, {"head": []}, {"head": {}}):
        gpt.save_checkpoint(tmp_path / "best.pt", {**whole, **damage})
        flags = ["--task=classify", f"--init_from={tmp_path}", "--predict=a", "--device=cpu"]
        assert "damaged" in fails(capsys, finetune.main, *flags)


def test_the_default_examples_are_complete_and_name_their_module(tmp_path, monkeypatch):
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    for name in ("asyncio", "email", "json", "unittest"):  # all of it takes seconds
        shutil.copytree(library / name, tmp_path / name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(
        prepare_data, "library_docstrings", prepare_data.library_docstrings.__wrapped__
    )
    examples = prepare_data.manual_examples()
    labels = [example["label"] for example in examples["classify"]]
    assert set(labels) == {"asyncio", "email", "unittest"}  # json has few modules
    assert max(map(labels.count, labels)) <= 300
    for task, columns in [
        ("classify", {"text", "label"}),
        ("instruct", {"instruction", "output"}),
        ("preference", {"instruction", "chosen", "rejected"}),
    ]:
        assert len(examples[task]) > 300
        for example in examples[task]:
            assert example.keys() == columns | {"group"}
            assert all(example.values())
            assert example["group"].split(".")[0] in example.get(
                "label", example.get("instruction")
            )


# --- pictures and plans ---------------------------------------------------------------------------


def test_pictures_are_drawn_where_there_is_matplotlib(
    base, tmp_path, data_folder, monkeypatch, capsys
):
    from PIL import Image

    draw = [f"--init_from={base}", "--start=the cat sees a dog", f"--attention={tmp_path}/a.png"]
    assert "pip install matplotlib" in fails(capsys, sample.main, *draw)
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    run_training(data_folder, tmp_path / "o")
    data = write_rows(tmp_path / "x.jsonl", labelled(60))
    run_finetune(base, tmp_path / "c", data, "--task=classify")
    sample.main(draw)
    pictures = sorted(tmp_path.rglob("*.png"))
    assert [path.name for path in pictures] == ["a.png", "confusion.png", "loss.png", "loss.png"]
    for path in pictures:
        Image.open(path).load()  # decodes all of it, and fails where something is amiss


def test_surprise_is_the_models_own_probability(base, capsys):
    text = "the cat sees a dog"
    sample.main([f"--init_from={base}", f"--start={text}", "--surprise", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert not any("\x1b" in line for line in lines)
    model, tokenizer, _ = sample.load_model(base, torch.device("cpu"))
    idx = torch.tensor([[tokenizer.eot_token, *tokenizer.encode(text)]])
    loss = model(idx[:, :-1], idx[:, 1:]).item() * (idx.size(1) - 1)
    assert len(lines) == idx.size(1) + 1  # a heading, a line a token, and the sum
    assert lines[-1].startswith(f"{loss / math.log(2):.1f} bits in {len(text)} bytes")
    probability = model(idx)[0, 0].softmax(-1)[idx[0, 1]].item()
    assert f"{probability:.4f}" in lines[1]


def test_a_plan_counts_the_models_parameters_and_trains_nothing(
    data_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)  # no need to wait
    monkeypatch.setattr(train, "matrix_rate", lambda machine: 1.0)
    flags = [f"--data={data_folder}", f"--out_dir={tmp_path}/o", "--n_embd=32", "--plan"]
    train.main([*flags, "--device=cpu"])
    out = capsys.readouterr().out
    total = int(re.search(r"parameters: .*= ([\d,]+)", out)[1].replace(",", ""))
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 128, "vocab_size": 284}
    model = GPT(GPTConfig(**shape, tie_weights=False))
    assert total == sum(parameter.numel() for parameter in model.parameters())
    assert not (tmp_path / "o").exists()


def test_progress_is_one_line_on_a_terminal_and_many_in_a_pipe(
    data_folder, tmp_path, capsys, monkeypatch
):
    run_training(data_folder, tmp_path / "a", "--log_interval=2", "--max_iters=8")
    piped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(piped) == 4
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run_training(data_folder, tmp_path / "b", "--log_interval=2", "--max_iters=8")
    shown = capsys.readouterr().out
    assert shown.count("\r\x1b[K") == 4
    assert shown.count("step ") == shown.count("\r\x1b[Kstep")


# --- any accident ---------------------------------------------------------------------------------


def fails(capsys, main, *flags):
    """Runs a script that must end in one line on standard error and exit code 2 -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, flags)))
    lines = capsys.readouterr().err.strip().split("\n")
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


BAD_INPUTS = {  # file: (content, flags, what the error must name)
    "empty.txt": (b"", "", ["no text"]),
    "blank.txt": (b" \n\n\t", "", ["no text"]),
    "binary.txt": (b"a\0b", "", ["binary.txt", "binary"]),
    "latin.txt": ("café".encode("latin-1"), "", ["latin.txt", "byte 3"]),
    "second.txt": (b"ok|not \xff", "--separator=|", ["second.txt", "byte 7"]),
    "broken.jsonl": (b'{"text": "a"}\n{"text"\n', "", ["broken.jsonl", "line 2"]),
    "broken.json": (b'[{"text": "a"},\n {"text"}]', "", ["broken.json", "line 2"]),
    "deep.json": (b"[" * 100_000, "", ["deep.json", "nested"]),
    "field.jsonl": (b'{"body": "a", "id": 1}', "", ["field.jsonl", "'text'", "body, id"]),
    "number.json": (b'[{"text": 5}]', "", ["number.json", "item 1"]),
    "list.json": (b"[1]", "", ["list.json", "int"]),
    "short.txt": (b"a", "", ["too little text"]),
    "few.txt": (b"hello hello hello", "--vocab_size=5000", ["5000", "only 2"]),
    "small.txt": (b"hello", "--vocab_size=255", ["255", "256"]),
    "kind.txt": (b"hello", "--tokenizer=gpt9", ["gpt9", "gpt2"]),
    "both.txt": (b"hello", "--tokenizer=gpt2 --vocab_size=300", ["--vocab_size", "gpt2"]),
    "zero.txt": (b"hello", "--vocab_size=0", ["--vocab_size", "0"]),
    "typo.txt": (b"hello", "--vocab-size=300", ["--vocab-size", "--vocab_size?"]),
    "fragment.txt": (b"hello", "--min_chars=10", ["no text"]),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_text_is_refused_with_its_place_and_the_earlier_folder_survives(name, tmp_path, capsys):
    (tmp_path / "good.txt").write_text(story(200), encoding="utf-8")
    prepare_data.main([f"{tmp_path}/good.txt", f"--out={tmp_path}/data"])
    before = sorted(p.name for p in tmp_path.rglob("*"))
    content, flags, words = BAD_INPUTS[name]
    (tmp_path / name).write_bytes(content)
    flags = [f"{tmp_path}/{name}", f"--out={tmp_path}/data", *flags.split()]
    line = fails(capsys, prepare_data.main, *flags)
    assert all(word in line for word in words), line
    prepare_data.open_data(tmp_path / "data")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name != name) == before


def test_missing_input_is_refused_with_the_reason(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"\0")
    (tmp_path / "a.txt").write_text(story(200), encoding="utf-8")
    prepare = prepare_data.main
    assert "gone.txt" in fails(capsys, prepare, tmp_path / "gone.txt")
    assert "no text files" in fails(capsys, prepare, tmp_path / "empty")
    assert "no text files" in fails(capsys, prepare, tmp_path / "photos")
    monkeypatch.setattr("requests.get", lambda url: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    line = fails(capsys, prepare, tmp_path / "a.txt", "--tokenizer=r50k_base")
    assert "TIKTOKEN_CACHE_DIR" in line
    assert "--tokenizer=bpe" in line


BAD_TRAINING = {  # flags: what the error must name
    "--n_embd=10 --n_head=3": ["n_embd 10", "n_head 3"],
    "--n_layer=0": ["n_layer", "1 or more"],
    "--batch_size=-1": ["batch_size"],
    "--learning_rate=nan": ["learning_rate"],
    "--dropout=1.5": ["dropout"],
    "--n_layer=two": ["--n_layer", "'two'"],
    "--compile=maybe": ["--compile", "maybe"],
    "--n_layers=3": ["--n_layers", "--n_layer?"],
    "--block_size=100000": ["block_size + 1", "100001"],
    "--device=abacus": ["abacus"],
    "--dtype=int3": ["int3", "float32"],
    "--init_from=nowhere": ["nowhere"],
    "--init_from=resume": ["last.pt"],
    "--data=nowhere": ["nowhere", "prepare_data.py"],
}


@pytest.mark.parametrize("flags", BAD_TRAINING)
def test_impossible_training_ends_in_one_line_that_says_why(flags, data_folder, tmp_path, capsys):
    flags = [f"--data={data_folder}", f"--out_dir={tmp_path}/out", "--block_size=16", flags]
    line = fails(capsys, train.main, *" ".join(flags).split())
    assert all(word in line for word in BAD_TRAINING[flags[-1]]), line
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_checkpoint_and_the_flags_must_agree(data_folder, tmp_path, capsys):
    run_training(data_folder, tmp_path / "a", "--max_iters=2")
    resume = [f"--out_dir={tmp_path / 'a'}", "--init_from=resume"]
    line = fails(capsys, train.main, *resume, "--n_layer=7")
    assert "n_layer=1" in line
    assert "n_layer=7" in line
    use = [f"--data={data_folder}", f"--init_from={tmp_path / 'a'}", f"--out_dir={tmp_path / 'b'}"]
    assert "n_head=2" in fails(capsys, train.main, *use, "--n_head=4")
    (tmp_path / "b.txt").write_text(story(500, seed=9) + "zzz zzz", encoding="utf-8")
    prepare_data.main([f"{tmp_path}/b.txt", f"--out={tmp_path}/data"])
    assert "tokenizer" in fails(capsys, train.main, *use, f"--data={tmp_path / 'data'}")
    assert "not the text" in fails(capsys, train.main, *resume, f"--data={tmp_path / 'data'}")


def test_impossible_sampling_ends_in_one_line_that_says_why(base, capsys):
    use = f"--init_from={base}"
    for flag in ("--temperature=-1", "--top_k=-1", "--top_p=0", "--top_p=1.1"):
        assert flag.split("=")[0] in fails(capsys, sample.main, use, flag)
    assert "--max_new_tokens" in fails(capsys, sample.main, use, "--max_new_tokens=0")
    assert "empty" in fails(capsys, sample.main, use, "--start=")
    assert "gone.txt" in fails(capsys, sample.main, use, "--start=FILE:gone.txt")
    assert "abacus" in fails(capsys, sample.main, use, "--device=abacus")
    sample.main([use, f"--start={story(100)}", "--max_new_tokens=5"])
    assert "the last 16" in capsys.readouterr().err


def test_pickled_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "config": {}, "model": {"x": Evil()}}, tmp_path / "best.pt")
    assert "best.pt" in fails(capsys, sample.main, f"--init_from={tmp_path}")
    assert not (tmp_path / "ran").exists()


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


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
    data_folder, tmp_path, capsys
):
    run_training(data_folder, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    flags = ["--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=60", "--eval_interval=60"]
    line = fails(capsys, train.main, *flags, "--learning_rate=1e30", "--grad_clip=0")
    assert re.search(r"step 2\d", line)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_two_runs_do_not_share_a_folder(data_folder, tmp_path, capsys):
    with train.sole_owner(tmp_path):
        flags = [f"--data={data_folder}", f"--out_dir={tmp_path}", "--block_size=16"]
        assert "another run" in fails(capsys, train.main, *flags)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves(number, data_folder, tmp_path, monkeypatch):
    whole = run_training(data_folder, tmp_path / "whole")
    log = train.Trainer.log

    def log_and_kill(self, **metrics):
        log(self, **metrics)
        if self.state["step"] == 7:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Trainer, "log", log_and_kill)
    with pytest.raises(SystemExit) as stopped:
        run_training(data_folder, tmp_path / "parts", "--log_interval=7")
    assert stopped.value.code == 128 + number
    assert load_checkpoint(tmp_path / "parts")["state"]["step"] == 7
    train.main(["--init_from=resume", f"--out_dir={tmp_path / 'parts'}"])
    parts = load_checkpoint(tmp_path / "parts" / "last.pt")
    for part in ("model", "optimizer"):
        assert_equal(whole[part], parts[part])
    assert whole["state"]["best_val_loss"] == parts["state"]["best_val_loss"]


def test_a_killed_run_resumes_to_the_same_bits(data_folder, tmp_path):
    out, flags = tmp_path / "killed", ["--eval_interval=2", "--eval_iters=1", "--max_iters=60"]
    run = start("train.py", f"--data={data_folder}", f"--out_dir={out}", *SMALL, *flags)
    wait_for(run, (out / "last.pt").exists)
    run.kill()
    run.wait()
    assert load_checkpoint(out / "last.pt")["state"]["step"] < 60
    train.main(["--init_from=resume", f"--out_dir={out}"])
    killed, whole = load_checkpoint(out / "last.pt"), run_training(data_folder, tmp_path, *flags)
    for part in ("model", "optimizer"):
        assert_equal(whole[part], killed[part])


def test_a_reader_that_leaves_ends_sampling_quietly(base):
    flags = [f"--init_from={base}", "--max_new_tokens=3000", "--temperature=2", "--top_k=0"]
    process = subprocess.Popen(
        [sys.executable, sample.__file__, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def mutate(data, rng):
    """Bytes cut off, put in, taken out or changed, somewhere."""
    i, n = rng.randrange(len(data)), rng.randrange(1, 50)
    return rng.choice(
        [
            data[:i],
            data[:i] + rng.randbytes(n) + data[i:],
            data[:i] + data[i + n :],
            data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :],
            re.sub(rb"\d+", lambda m: m[0] if rng.random() < 0.9 else b"-7", data[:2000])
            + data[2000:],
        ]
    )


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "meta.json", "train_00000.npy"])
def test_damaged_files_give_an_error_line_or_a_working_run(name, data_folder, tmp_path, capsys):
    run_training(data_folder, tmp_path / "run")
    shutil.copytree(data_folder, tmp_path / "data")
    path = next(tmp_path.rglob(name))
    whole, codes = path.read_bytes(), []
    for seed in range(40):
        path.write_bytes(mutate(whole, random.Random(seed)))
        capsys.readouterr()
        try:
            if name == "best.pt":
                sample.main([f"--init_from={tmp_path / 'run'}", "--max_new_tokens=3"])
            elif name == "last.pt":
                flags = ["--init_from=resume", f"--out_dir={tmp_path / 'run'}", "--max_iters=21"]
                train.main([*flags, f"--data={data_folder}"])
            else:
                run_training(tmp_path / "data", tmp_path / "other", "--max_iters=1")
            codes.append(0)
        except SystemExit as stopped:
            codes.append(stopped.code)
            assert len(capsys.readouterr().err.strip().split("\n")) == 1
    assert set(codes) <= {0, 2}
    assert 2 in codes


@pytest.mark.parametrize("module", [gpt, prepare_data, train, finetune, sample])
def test_examples_in_docstrings_are_true(module):
    assert doctest.testmod(module).failed == 0
