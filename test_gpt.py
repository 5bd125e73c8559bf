"""What must hold of this project, on small data made here: no network, no GPU.

python -m pytest -q
"""

import ast
import contextlib
import csv
import doctest
import functools
import http.server
import inspect
import io
import itertools
import json
import linecache
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
import types
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
from gpt import GPT, GPTConfig, load_checkpoint
from prepare_data import SPLIT, bpe_encode, bpe_spec, build_tokenizer, clean, token_label, train_bpe

WORDS = ["the", "a", "cat", "dog", "sees", "hears", "and", "not", "red", "small", "house", "in"]
TINY = {"block_size": 16, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16}
TINY |= {"dropout": 0.1, "attn_dropout": 0.1}  # which must have no effect in evaluation
CPU = "--device=cpu --dtype=float32"
SMALL = f"--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --dropout=0.1 {CPU}"
SMALL += " --max_iters=20 --eval_interval=10 --eval_iters=3 --warmup_iters=4"
FEW = f"--max_iters=12 --eval_interval=6 --batch_size=4 --warmup_iters=2 --max_new_tokens=5 {CPU}"

on_posix = pytest.mark.skipif(os.name != "posix", reason="Windows has other signals and pipes")
assert_close = torch.testing.assert_close
assert_equal = functools.partial(assert_close, rtol=0, atol=0)  # bit for bit, nested dicts too
tokens = functools.partial(torch.randint, 50)  # tokens((B, T))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A folder with the data "prepared", the run "base", and the files that IMPOSSIBLE names."""
    folder = tmp_path_factory.mktemp("session")
    data, text = prepare(folder / "prepared", story(4000)), story(500, seed=9) + "zzz zzz"
    train.main(f"--data={folder}/prepared --out_dir={folder}/base {SMALL} --dropout=0".split())
    for name in ("wild", "mixed"):
        shutil.copytree(folder / "prepared", folder / name)
    shard = np.full(data["splits"]["train"]["tokens"], data["vocab_size"], data["dtype"])
    np.save(folder / "wild" / "train_00000.npy", shard)
    prepare(folder / "other", text)
    shutil.copy(folder / "other" / "train_00000.npy", folder / "mixed")
    prepare(folder / "same", text, f"--tokenizer={folder}/prepared")
    files = {
        "blank.txt": " \n\n\t",
        "binary.txt": b"\x89PNG\0",
        "latin.txt": "café".encode("latin-1"),
        "broken.json": '[{"text": "a"},\n {"text"}]',
        "field.jsonl": [{"body": "a", "id": 1}],
        "list.json": "[1]",
        "empty/.hidden": "a",
        "object/meta.json": "{}",
        "list/meta.json": "[1]",
        "words/meta.json": "not JSON",
        "headless.csv": "a,b\nc,d\n",
        "bird.jsonl": [{"text": "a", "label": "bird"}],
        "cats.jsonl": labeled(40),
        "one_label.jsonl": [{"text": str(i), "label": "b"} for i in range(50)],
    }
    write_files(files, folder)
    return folder


@pytest.fixture(autouse=True)
def a_folder_of_its_own(made_once, tmp_path, monkeypatch):
    """Each test runs in a new folder, so that none reads or writes the user's data/ and out/."""
    monkeypatch.chdir(tmp_path)
    for name in ("prepared", "base"):
        os.symlink(made_once / name, name)
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(train.__file__))  # for python -m train
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    for device in (torch.cuda, torch.backends.mps):  # these tests are about the CPU
        monkeypatch.setattr(device, "is_available", lambda: False)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # such small tensors are not worth a second


def far_from_new(model):
    """In eval mode, with all parameters, also biases, as different as after training."""
    for name, parameter in model.named_parameters():
        parameter.data += torch.randn_like(parameter) * (0.5 if "c_attn.w" in name else 0.1)
    return model.eval()


def tiny_model(**changes):
    return far_from_new(GPT(GPTConfig(**{**TINY, **changes})))


def story(n_words, seed=0):
    chosen = random.Random(seed).choices(WORDS, k=n_words)
    return " ".join(w + ".\n" * (i % 9 == 8) for i, w in enumerate(chosen))


def any_text(rng, n):
    """Letters, spaces, and anything else that Unicode has."""
    kinds = ["ab c\n\t'", "éßñ漢字ไทย", "😀👩‍👩‍👧\u0301", "<|endoftext|>"]
    kinds = [rng.choice([*kinds, chr(rng.randrange(0xD7FF))]) for _ in range(n)]
    return "".join(map(rng.choice, kinds))


def write_files(files, folder="."):
    """Contents are bytes, text, or the rows of a JSON Lines file."""
    for name, content in files.items():
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read_rows(path):
    """The rows of a .csv or .jsonl file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file) if path.endswith(".csv") else map(json.loads, file))


def column(out_dir, name):
    """What metrics.csv has under a name, without the empty cells."""
    return [float(row[name]) for row in read_rows(f"{out_dir}/metrics.csv") if row[name]]


def prepare(folder, text, flags=""):
    """Writes text to a file, prepares folder from it, and opens it."""
    write_files({f"{folder}.txt": text})
    prepare_data.main([f"{folder}.txt", f"--out={folder}", "--vocab_size=280", *flags.split()])
    return prepare_data.open_data(folder)


def documents_in(meta):
    """The text of a data folder, {split: documents}."""
    tokenizer, texts = build_tokenizer(meta["tokenizer"]), {}
    for name, split in meta["splits"].items():
        text = tokenizer.decode(np.concatenate(split["arrays"]).tolist())
        *texts[name], rest = text.split("<|endoftext|>")
        assert rest == ""  # every document has an end token behind it
    return texts


def run_training(out_dir, flags=""):
    """train.py on a tiny model -> the checkpoint it ends with."""
    train.main(f"--data=prepared --out_dir={out_dir} {SMALL} {flags}".split())
    return load_checkpoint(f"{out_dir}/last.pt")


def resume(out_dir, flags=""):
    train.main(f"--init_from=resume --out_dir={out_dir} {flags}".split())
    return load_checkpoint(f"{out_dir}/last.pt")


def assert_same_run(a, b):
    assert_equal([a["model"], a["optimizer"]], [b["model"], b["optimizer"]])
    assert a["state"]["best"] == b["state"]["best"]


def watch(monkeypatch, see, training=True):
    """Calls see(n, idx, loss) for the n-th batch; what it returns, if any, becomes the loss."""
    forward, numbers = GPT.forward, itertools.count(1)

    def watched(model, idx, targets=None):
        loss = forward(model, idx, targets)
        seen = see(next(numbers), idx, loss) if model.training == training else None
        return loss if seen is None else seen

    monkeypatch.setattr(GPT, "forward", watched)


def start(command, **options):
    """A process of its own, on one thread as here."""
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command.split()], text=True, **options)


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not os.path.exists(path):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def copied(module, *names):
    """What these definitions, with imports of other projects and nothing else, make of an empty
    namespace."""
    namespace = {}
    for node in ast.parse(inspect.getsource(module)).body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        name = getattr(node, "name", name)
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        is_ours = is_import and re.search("prepare_data|train|from gpt", ast.unparse(node))
        if name in names or is_import and not is_ours:
            exec(ast.unparse(node), namespace)  # noqa: S102
    return types.SimpleNamespace(**namespace)


@contextlib.contextmanager
def web_server(folder):
    """A server of the files in folder -> its address, and the list of paths asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        log_request = lambda handler, *args: asked.append(handler.path)
        log_error = lambda handler, *args: None

    handler = functools.partial(Handler, directory=folder)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


# --- the model ------------------------------------------------------------------------------------


def test_a_token_changes_no_output_before_it_and_each_one_after_it():
    model, idx = tiny_model(), tokens((1, 16)).repeat(16, 1)
    changed = (idx + torch.eye(16, dtype=torch.int64)) % 50  # in row t, token t is another
    differs = (model(changed) != model(idx)).any(-1)
    assert torch.equal(differs, torch.ones(16, 16, dtype=torch.bool).triu())


@pytest.mark.parametrize("n_new", [9, 4, 1])
def test_attention_copied_alone_computes_what_the_fused_kernel_does(n_new):
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    q = q[:, :, -n_new:]  # the last queries, as with a cache
    mask = torch.ones(n_new, 9, dtype=torch.bool).tril(9 - n_new)
    fused = F.scaled_dot_product_attention(q, k, v, mask)
    code = copied(gpt, "attention_weights", "attention")
    assert_close(code.attention_weights(q, k) @ v, fused)
    assert_close(code.attention(q, k, v), fused)
    written_out = code.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert_close(written_out.float(), fused, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_scales_the_rest_and_draws_anew(dtype):
    model = tiny_model(dropout=0.2, block_size=999, n_embd=100).train()
    model.transformer.update({"h": torch.nn.ModuleList(), "ln_f": torch.nn.Identity()})
    torch.nn.init.constant_(model.transformer.wte.weight, 3.0)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    once, again = model.hidden(tokens((1, 999))), model.hidden(tokens((1, 999)))
    assert (once == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert_close(once[once != 0].unique(), torch.tensor([3 / 0.8]), rtol=1e-4, atol=0)
    assert not torch.equal(once, again)
    # on attention weights
    q, k, v = torch.zeros(3, 1000, 1, 8, 8, dtype=dtype)
    dropped = gpt.attention(q, k, v + torch.eye(8, dtype=dtype), 0.5).float()
    assert ((dropped == 0).float().mean() - 0.72).abs() < 0.03  # 28 of 64 weights, and half of 36
    even = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    assert_close(dropped.mean((0, 1)), even, atol=0.1, rtol=0)
    model, idx = tiny_model(dropout=0).train(), tokens((2, 16))
    assert not torch.allclose(model(idx), model(idx))


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_reading_in_steps_with_a_cache_or_with_packed_weights_is_reading_at_once(dtype, atol):
    model, idx = tiny_model().to(dtype), tokens((3, 16))
    at_once, logits = model.hidden(idx), model(idx)
    cache, parts = model.new_cache(3, 16), zip(idx.split([5, 1, 4, 6], dim=1), [0, 5, 6, 10])
    steps = [model.hidden(part, cache, start) for part, start in parts]
    assert_close(torch.cat(steps, dim=1), at_once, atol=atol, rtol=0)
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        model.hidden(idx[:, :1], cache, 16)
    sample.pack_weights(model)
    model.transformer.h[0].mlp.c_fc.weight.data.zero_()  # only the packed copy is read
    assert_close(model(idx), logits, atol=atol, rtol=0)


@pytest.mark.parametrize("n_prompt", [10, 40])
def test_generation_reads_the_end_of_its_prompt_and_the_last_half_of_a_full_context(n_prompt):
    model, idx = tiny_model(), tokens((2, n_prompt))
    made = list(model.generate(idx, 40, temperature=0))
    assert_equal(list(model.generate(idx, 5, temperature=0)), made[:5])
    text = torch.cat([idx, torch.stack(made, dim=1)], dim=1)
    length = min(n_prompt, 16)  # of what the model has before it when it makes text[:, n]
    for n in range(n_prompt, n_prompt + 40):
        length = 8 if length > 16 else length
        assert torch.equal(text[:, n], model(text[:, n - length : n])[:, -1].argmax(-1))
        length += 1


def test_a_sequence_that_met_the_stop_token_goes_on_yielding_it():
    model, idx = tiny_model(), tokens((6, 4))
    free = torch.stack(list(model.generate(idx, 30, temperature=0)), dim=1)
    stop = free[0, 3].item()
    stopped = torch.stack(list(model.generate(idx, 30, temperature=0, stop_token=stop)), dim=1)
    for row, free_row in zip(stopped.tolist(), free.tolist()):
        n = free_row.index(stop) if stop in free_row else 30
        assert row == (free_row[:n] + [stop] * 30)[: len(row)]
    alone = list(model.generate(idx[:1], 30, temperature=0, stop_token=stop))
    assert len(alone) <= 4 and alone[-1].item() == stop


@pytest.mark.parametrize("vocab_size", [50, 2**20])  # of the larger, 4 rows of logits at once
def test_loss_and_gradients_are_those_of_plain_cross_entropy(vocab_size):
    model = tiny_model(vocab_size=vocab_size, n_embd=2)
    idx, targets = torch.randint(vocab_size, (2, 2, 6))
    targets[0, :3] = -100
    plain = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    loss, weights = model(idx, targets), list(model.parameters())
    assert_close(loss, plain)
    assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(plain, weights))


def test_each_loss_keeps_its_precision_and_logits_that_need_no_gradient_stay_as_they_are():
    head, x = torch.nn.Linear(32, 9000, bias=False), torch.randn(100, 32)
    targets = torch.randint(9000, (100,))
    with torch.autocast("cpu", torch.bfloat16):
        for logits in (head(x), head(x).detach()):
            before = logits.detach().clone()
            losses = gpt.cross_entropy(logits, targets)
            assert_close(losses, -before.float().log_softmax(-1)[range(100), targets])
            assert not torch.equal(losses, losses.bfloat16().float())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_has_weights_of_the_stated_sizes_and_expects_every_token_alike(tied):
    model = GPT(GPTConfig(16, 1000, n_layer=8, n_head=2, n_embd=64, tie_weights=tied))
    sizes = {"c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / 16**0.5, "ln_f": 1}
    sizes |= dict.fromkeys(("wte", "wpe"), 0.02 if tied else 1)
    for name, parameter in model.named_parameters():
        module, kind = name.split(".")[-2:]
        size = 0 if kind == "bias" else sizes.get(module)
        if size is not None:
            assert parameter.square().mean().sqrt().item() == pytest.approx(size, rel=0.1)
    loss = model(*torch.randint(1000, (2, 8, 16)))
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05 if tied else 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_and_loading_keep_the_other_tokens_and_positions_and_a_tied_head(tied):
    model, idx = tiny_model(tie_weights=tied), torch.randint(30, (2, 8))
    logits = model(idx)
    for vocab_size, block_size in [(50, 16), (64, 8), (30, 40)]:
        model.resize(vocab_size, block_size)
        gpt.save_checkpoint("best.pt", model.checkpoint())
        loaded, n = GPT.from_pretrained("."), min(vocab_size, 50)
        assert_close(model(idx)[..., :n], logits[..., :n])
        assert_equal(loaded.state_dict(), model.state_dict())
        for some in (model, loaded):
            assert (some.lm_head.weight is some.transformer.wte.weight) == tied
            assert some(idx[:1, :1].expand(1, block_size)).shape == (1, block_size, vocab_size)
            assert some.num_params() == GPT(model.config).num_params()
        with pytest.raises(ValueError, match="do not fit"):
            model(tokens((1, block_size + 1)))


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_the_faster_dtype_is_picked(fast, monkeypatch):
    threads = []
    seconds = lambda a, b: threads.append(torch.get_num_threads()) or (1 if a.dtype == fast else 5)
    monkeypatch.setattr(torch.Tensor, "__matmul__", seconds)
    monkeypatch.setattr(gpt, "timeit", lambda product, number: product())
    torch.set_num_threads(2)
    assert gpt.pick_dtype.__wrapped__(torch.device("cpu")) == fast
    assert set(threads) == {1} and torch.get_num_threads() == 2


def test_sampling_copied_alone_takes_likely_tokens_no_banned_ones_and_no_bad_logits(monkeypatch):
    choose, logits = copied(gpt, "sample", "keep_top_p").sample, torch.randn(5, 20)
    for how in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}):
        assert torch.equal(choose(logits, **how), logits.argmax(-1))
    for bad in ([1.0, math.nan], [-math.inf, -math.inf], [math.inf, 0.0]):
        for temperature in (0, 1):
            with pytest.raises(ValueError, match="not finite"):
                choose(torch.tensor([[1.0, 2.0], bad]), temperature)
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(50, 3)  # bans two tokens
    for how in ({}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}):
        assert (choose(logits, **how) == 1).all()
    zero = lambda tensor, generator=None: tensor.fill_(-0.0)  # waits of 0, as on MPS
    monkeypatch.setattr(torch.Tensor, "exponential_", zero)
    assert (choose(logits) == 1).all()


def test_sampling_follows_the_probabilities_of_the_k_likeliest_or_the_fewest_that_reach_p():
    def drawn(logits, **how):  # what a hundred draws give for each row
        draws = gpt.sample(logits.repeat(100, 1), **how).view(100, -1)
        return [set(row) for row in draws.T.tolist()]

    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [4.0, 1.0, 2.0, 3.9]])
    equals, others = drawn(logits, top_k=2)
    assert len(equals) == 2 and equals < {1, 2, 3} and others == {0, 3}
    for top_k in (0, 99):  # all
        assert drawn(logits, temperature=9, top_k=top_k) == [{0, 1, 2, 3}] * 2
    logits = torch.tensor([[0.15, 0.5, 0.3, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert drawn(logits, top_p=0.79) == [{1, 2}, {2, 3}]
    assert drawn(logits, top_p=0.81) == [{0, 1, 2}, {1, 2, 3}]
    logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(20_000, 3)
    shares = gpt.sample(logits, temperature=0.5).bincount(minlength=3) / 20_000
    assert_close(shares, torch.tensor([0.01, 0.36, 0.09]) / 0.46, atol=0.02, rtol=0)


# --- other devices, as far as a CPU can tell ------------------------------------------------------


def gpt_on(device):
    """gpt.py with each comparison of a device's type replaced by its outcome on this device."""
    outcome = lambda found: str((found[2] == device) == (found[1] == "=="))
    pattern, module = r'[\w.]+\.type (==|!=) "(\w+)"', types.ModuleType(device)
    exec(re.sub(pattern, outcome, inspect.getsource(gpt)), vars(module))  # noqa: S102
    return module


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_compute_the_same(device):
    model, there = tiny_model(dropout=0, attn_dropout=0), gpt_on(device)
    other = there.GPT(there.GPTConfig(**vars(model.config)))
    other.load_state_dict(model.state_dict())
    idx = tokens((2, 17))
    for some in (model, other):
        some.train()(idx[:, :-1], idx[:, 1:]).backward()
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert_close(ours.grad, theirs.grad)
    texts = [list(some.eval().generate(idx[:, :4], 30, temperature=0)) for some in (model, other)]
    assert_equal(*texts)


def test_two_graphs_serve_all_training():
    there, graphs = gpt_on("cuda"), []
    model = there.GPT(there.GPTConfig(**TINY))
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for length in (16, 16, 8, 4, 12):
        idx = tokens((4, length + 1))
        with torch.autocast("cpu", torch.bfloat16):
            compiled(idx[:, :-1], idx[:, 1:]).backward()
        model.eval(), model.train()  # as an evaluation does
    assert len(graphs) <= 2  # one for the first length, one for any


def test_a_step_and_a_cache_mix_no_devices_and_wait_for_none():  # on meta, both are errors
    model, idx = tiny_model().train().to("meta"), torch.zeros(2, 16, dtype=int, device="meta")
    model(idx, idx).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    cache = model.eval().new_cache(2, 16)
    for start, end in [(0, 5), (5, 8), (8, 9)]:
        model.hidden(idx[:, start:end], cache, start)


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_batches_are_pinned_whole_and_only_cuda_copies_later(device, monkeypatch):
    sent, batch = [], torch.zeros(4, 33, dtype=int)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t.is_contiguous() and t)
    record = lambda tensor, device, non_blocking=False: sent.append(non_blocking)
    monkeypatch.setattr(torch.Tensor, "to", record)
    machine = types.SimpleNamespace(device=torch.device(device))
    train.Machine.put(machine, batch[:, :-1], batch[:, 1:])
    assert sent == [device == "cuda"] * 2


def test_a_device_that_cannot_allocate_is_passed_over_unless_it_is_named(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert gpt.pick_device().type == "cpu"
    with pytest.raises(ValueError, match="mps is not available"):
        gpt.pick_device("mps")


@pytest.mark.parametrize("capability, n_embd, compiles", [(6, 512, 0), (7, 512, 1), (9, 16, 0)])
def test_only_on_cuda_large_models_are_compiled_and_vocabularies_padded(
    capability, n_embd, compiles, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(sys, "platform", "linux")
    meta, config = {"vocab_size": 285}, train.TrainConfig(n_layer=2, n_head=2, n_embd=n_embd)
    for device, size in {"cuda": 320, "cpu": 285}.items():
        machine = types.SimpleNamespace(device=torch.device(device))
        model = train.make_model(config, {}, meta, None, machine.device)
        assert model.config.vocab_size == size
        assert train.Machine.compiles(machine, model) == (device == "cuda" and bool(compiles))


# --- text, tokens, shards -------------------------------------------------------------------------


def naive_bpe(text, vocab_size):
    """Encodes the text and counts every pair anew for every merge."""
    pieces = [piece.encode() for piece in regex.findall(SPLIT, text)]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size:
        words = (bpe_encode(piece, ranks) for piece in pieces)
        pairs = [pair for word in words for pair in itertools.pairwise(word)]
        counts = {(a, b): (-pairs.count((a, b)), ranks[a], ranks[b]) for a, b in set(pairs)}
        if min(counts.values(), default=(0,))[0] > -2:
            break
        ranks[b"".join(min(counts, key=counts.get))] = len(ranks)
    return ranks


@pytest.mark.parametrize("seed", range(8))
def test_the_fast_bpe_learns_what_counting_every_pair_anew_learns(seed):
    kinds = ["ab ", "a", "b", "é", "  ", "\n", "12"][: 3 + seed // 2]
    text = "".join(random.Random(seed).choices(kinds, k=400))
    assert list(train_bpe([text], 256 + 40).items()) == list(naive_bpe(text, 256 + 40).items())


def test_a_bpe_copied_alone_encodes_as_tiktoken_and_any_text_comes_back_without_special_tokens():
    names = "SPLIT WORD_END END_OF_TEXT ROLES cut count_pieces train_bpe bpe_spec damaged"
    code = copied(prepare_data, *names.split(), "build_tokenizer")
    ranks, rng = code.train_bpe([story(500)], 350), random.Random(1)
    tokenizer = code.build_tokenizer(json.loads(json.dumps(code.bpe_spec(ranks))))
    for text in [story(50, seed=3), "a <|endoftext|> b", *(any_text(rng, 60) for _ in range(50))]:
        pieces = (piece.encode() for piece in regex.findall(SPLIT, text))
        ids = [ranks[token] for piece in pieces for token in bpe_encode(piece, ranks)]
        assert ids == tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    assert {bytes([byte]) for byte in range(256)} <= set(ranks)
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
    ids = [tokenizer.encode_single_token(name) for name in special]
    assert ids == [len(ranks) + i for i in range(4)]


@pytest.mark.parametrize("space", [" ", "，"])  # Chinese has no spaces, and is cut, too
def test_a_text_encoded_in_parts_gives_the_tokens_of_the_whole(space):
    pieces = ["word", space, space * 2, "_", "don't", "12", "é", "漢", "!"]
    text = "".join(random.Random(3).choices(pieces, k=9000))
    encode = build_tokenizer(bpe_spec(train_bpe([text], 400))).encode_ordinary
    parts = list(prepare_data.cut(text, 100))
    assert "".join(parts) == text and len(parts) > 50
    assert list(itertools.chain(*map(encode, parts))) == encode(text)
    for text in (f"word{space * 10**6}word", "\n=" * 10**5 + "漢" * 10**6):  # long pieces
        parts = list(prepare_data.cut(text))
        assert "".join(parts) == text and max(map(len, parts)) <= 2**17
        assert all(map(encode, parts))  # tiktoken fails at a million spaces


def test_time_is_linear_in_the_length_of_one_word_or_of_the_accents_on_one_letter():
    start = time.monotonic()
    train_bpe(["".join(random.Random(0).choices("ACGT", k=100_000))], 300)
    text = clean("e" + "\u0301\u0316" * 50_000 + "\n")
    assert text[0] == "é" and 20 < len(text) <= 30 and clean(text) == text
    assert time.monotonic() - start < 4
    zalgo = "Z" + "\u0316" * 14 + "\u0301" * 15  # in the order of NFC
    assert clean(zalgo) == unicodedata.normalize("NFC", zalgo)


def test_clean_text_has_no_controls_no_spaces_at_line_ends_and_is_clean():
    rng = random.Random(4)
    for _ in range(300):
        mess = "".join(rng.choices("a \t\n\r\0\x1b\ufeff\u2028", k=20))
        text = clean(mess + any_text(rng, 20) + mess)
        assert not regex.search(r"[^\P{Cc}\n\t]|\ufeff", text)
        assert not re.search(r"[ \t]$|\n{3}|\A\n|\n\Z", text, re.MULTILINE)
        assert clean(text) == text
    assert clean("  e\u0301\n\tb") == "  é\n\tb"  # indents stay


def test_tokens_that_are_no_characters_or_missing_have_labels():
    class WithHoles:  # it leaves ids out, as some of tiktoken's do
        decode_single_token_bytes = {0: b"a", 1: "漢".encode()[:2], 2: b"\n"}.__getitem__

    labels = [token_label(WithHoles, token) for token in (0, 1, 2, 9)]
    assert labels == ["a", r"\xe6\xbc", r"\n", ""]


def test_novels_among_notes_give_their_last_tenths_which_do_not_choose_the_tokens():
    notes = [f"note {i}" for i in range(299)]
    novels = [clean(story(20_000) + " xy" * 3000), "".join(map(chr, range(0x4E00, 0x9000)))]
    assert len(novels[0]) > 2**16  # which is encoded in parts, but counts once
    meta = prepare("data", "<|endoftext|>".join([*notes, *novels]))  # one has no spaces
    assert sum(split["documents"] for split in meta["splits"].values()) == 299 + 2 * 2
    ends = [document for document in documents_in(meta)["val"] if "note" not in document]
    for novel, end in zip(novels, ends, strict=True):
        assert novel.endswith(end) and 0.09 < len(end) / len(novel) < 0.11
    learned = meta["tokenizer"]["tokens"][256:]
    assert learned and not any("xy" in token for token in learned)


def fail(error):
    raise error


def test_documents_too_short_for_a_tenth_keep_to_one_split_and_duplicates_are_dropped(capsys):
    documents = [f"{clean(story(30, seed=i))} {i}é" for i in range(300)]
    for some in (documents, [f"{i:04}" for i in range(40)]):
        text = "\t\n".join(some + some[:30])
        meta = prepare("data", text, r"--separator=\t\n")  # which may have escapes
        assert "30 duplicates" in capsys.readouterr().out
        found = documents_in(meta)
        assert sorted(found["train"] + found["val"]) == sorted(some)
        assert len(some) / 30 < len(found["val"]) < len(some) / 5
        for split, stats in meta["splits"].items():
            assert stats["documents"] == len(found[split])
            assert stats["bytes"] == sum(len(text.encode()) for text in found[split])


def documents_of(*inputs, **how):
    return [clean(text) for _, text in prepare_data.read_documents(inputs, **how)]


def test_every_kind_of_file_gives_its_documents():
    files = {
        "b.txt": "zero<|endoftext|>one",
        "a/b.jsonl": '{"text": "two"}\n\n{"text": "three", "x": 1}\n',
        "a/c.md": "four",
        "a/d.json": '[{"text": "five"}, {"text": "six"}]',
        "a/e.htm": "<title>n</title><p>seven &eacute;<script>n</script> <b>x</b>y</p><pre> z</pre>",
        "a/f": "\ufeff<!DOCTYPE html><svg>no</svg>eight",
        "a/g.JSON": '{"text": "nine"}\n{"text": "ten"}',  # JSON Lines, whatever the name says
        "a/h.csv": f'text\n"a; b{"c" * 200_000}"\rlast\n',  # one column, a long cell, a lone \r
        "a/site.css": "no",
        "a/.hidden": "no",
        "a/.folder/x": "no",
    }
    write_files(files)
    os.symlink("nowhere", "a/broken")
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo("a/pipe")
    expected = ["zero", "one", "two", "three", "four", "five", "six", "seven é xy\n\n z", "eight"]
    expected += ["nine", "ten", f"a; b{'c' * 200_000}", "last"]
    skipped = []
    assert documents_of("b.txt", "a", skip=skipped.append) == expected
    assert len(skipped) == 1 and "site.css" in skipped[0]
    assert documents_of("a/site.css") == ["no"]  # if named, it is read
    with pytest.raises(ValueError, match="an empty name"):  # not the current folder
        documents_of("")


@pytest.mark.parametrize("before", range(2**20 - 6, 2**20 + 1))  # a file is read in blocks of 2**20
def test_a_separator_divides_a_file_wherever_its_blocks_end(before):
    write_files({"a.txt": "x" * before + "<|x|>twö <|x<|x|><|x|>three"})
    assert documents_of("a.txt", separator="<|x|>") == ["x" * before, "twö <|x", "", "three"]


def test_documents_that_cannot_be_read_are_skipped_counted_and_named(capsys, monkeypatch):
    files = {
        "0.txt": story(300),
        "a.txt": "whole<|endoftext|>café".encode("latin-1"),
        "c.jsonl": '{"text": null}\n{"text"\n{"text": "fine"}',
        "d.png": b"\x89PNG\0",
        "e.json": "[" * 100_000,
        "f.html": f"<p>&#{'9' * 5000};<|endoftext|><p>page",
        "g.txt": "not yours",
    }
    write_files(files, "mixed")
    read, error = prepare_data.split_file, OSError(13, "Permission denied")
    read_some = lambda path, mark: fail(error) if path.name == "g.txt" else read(path, mark)
    monkeypatch.setattr(prepare_data, "split_file", read_some)
    prepare_data.main(["mixed", "--out=data"])
    report = "read 7 files\nskipped 7 .* the first: .*a.txt, document at byte 18.*iconv"
    assert re.search(report, capsys.readouterr().out)
    found = documents_in(prepare_data.open_data("data"))
    assert found["train"].pop(0) + found["val"].pop(0) == clean(story(300))
    assert sorted(found["train"] + found["val"]) == ["fine", "page", "whole"]


def test_a_page_is_downloaded_once_and_kept():
    write_files({"web/page": "<html><p>hello</p>", "web/a.jsonl": [{"text": "one"}]})
    with web_server("web") as (url, asked):
        for _ in range(2):
            assert documents_of(f"{url}/page", f"{url}/a.jsonl?raw=true") == ["hello", "one"]
        with pytest.raises(ValueError, match="404"):
            documents_of(f"{url}/nothing")
    assert asked == ["/page", "/a.jsonl?raw=true", "/nothing"]


def test_shards_hold_the_whole_text_in_the_order_of_its_documents(monkeypatch):
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 100)
    texts = [clean(story(100, seed=i)) for i in range(30)]
    meta = prepare("data", "<|endoftext|>".join(texts))
    assert len(meta["splits"]["train"]["shards"]) > 3
    found = documents_in(meta)
    # each is more than 1/200 of the text and gives its last tenth
    assert [start + end for start, end in zip(found["train"], found["val"])] == texts
    assert meta["splits"]["val"]["bytes"] / len("".join(texts)) == pytest.approx(0.1, abs=0.02)


def test_the_bpe_is_trained_on_a_sample_spread_over_the_training_text(monkeypatch):
    counted = []
    record = lambda texts, n: train_bpe(counted.extend(texts) or counted, n)
    monkeypatch.setattr(prepare_data, "train_bpe", record)
    texts = [clean(story(1000, seed=i)) for i in range(300)]
    meta = prepare("data", "<|endoftext|>".join(texts), "--bpe_sample_mb=1")
    assert 0.75 < len("".join(counted)) / 1e6 / 0.9 < 1.25  # a tenth is held out
    assert set(counted) <= set(documents_in(meta)["train"])
    assert set(counted) & set(texts[:100]) and set(counted) & set(texts[200:])
    is_train = lambda text: prepare_data.hash_fraction(text) >= prepare_data.HELD_OUT
    documents = [("train", text) for text in filter(is_train, map(str, range(9000)))]
    counted.clear()
    prepare_data.train_tokenizer(documents, 2e8, prepare_data.PrepareConfig())
    assert 0.04 < len(counted) / len(documents) < 0.06


@pytest.mark.parametrize("n, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_a_vocabulary_above_65536_takes_four_bytes_a_token(n, dtype):
    shutil.copytree("prepared", "wide")
    meta = json.loads(pathlib.Path("wide/meta.json").read_bytes())
    spec = {**meta["tokenizer"], "special_tokens": ["<|endoftext|>"]}
    spec["tokens"] += [f"{i:06}" for i in range(n - 1 - len(spec["tokens"]))]
    write_files({"wide/meta.json": json.dumps({**meta, "tokenizer": spec, "vocab_size": n})})
    (shard,) = prepare("data", story(300), "--tokenizer=wide")["splits"]["val"]["arrays"]
    assert shard.dtype == dtype and shard[-1] == n - 1


def test_preparing_anew_replaces_its_own_files_and_no_others(monkeypatch):
    others = {"instruct.jsonl", ".gitignore", "train_0.npy", "x.npy", "inner.txt", "mine.npy.tmp"}
    mine = ["thesis.txt", "train_00000.npy", "data/train_00000.npy.tmp"]
    mine += [f"data/{name}" for name in others - {"inner.txt"}]
    write_files({**dict.fromkeys(mine, "mine"), "data/val_00007.npy": "mine"})
    links = {".lock", "meta.json.tmp", "val_00000.npy.tmp"}
    for name in links:
        os.symlink(os.path.abspath("thesis.txt"), f"data/{name}")
    with pytest.raises(ValueError, match="val_00007.npy may be yours.*: move"):
        prepare("data", story(300))
    os.remove("data/val_00007.npy")
    prepare("data/inner", story(300))
    inode, meta = os.stat("data").st_ino, pathlib.Path("data/meta.json")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "SHARD_TOKENS", 100)
        text = "<|endoftext|>".join(story(100, seed=i) for i in range(9))
        assert len(prepare("data", text)["splits"]["train"]["shards"]) > 1
    listed = '["train_00000.npy"'
    meta.write_text(meta.read_text().replace(listed, f'["../train_00000.npy", {listed[1:]}'))
    with pytest.raises(ValueError, match="invalid shard names"):
        prepare_data.open_data("data")
    prepare("data", story(300))
    assert os.stat("data").st_ino == inode  # the folder may be a mount point
    assert {pathlib.Path(name).read_text() for name in mine} == {"mine"}
    prepare_data.open_data("data/inner")
    ours = {"meta.json", "train_00000.npy", "val_00000.npy", "inner"}
    assert set(os.listdir("data")) - {"train_00000.npy.tmp"} - links == ours | others


def test_a_kill_before_any_file_operation_or_a_full_disk_leaves_whole_data_or_none(monkeypatch):
    def before_each_operation(event, args):
        left[0] -= event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if left[0] < 0:
            raise KeyboardInterrupt

    left = [math.inf]
    sys.addaudithook(before_each_operation)  # cannot be removed, but does nothing later
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 150)
    texts = ["<|endoftext|>".join(story(100, seed=n * i) for i in range(n)) for n in (2, 3)]
    whole = [documents_in(prepare("data", text)) for text in texts]
    n, was_killed = 0, True
    while was_killed:
        assert documents_in(prepare("data", texts[0])) == whole[0]
        left[0], n = n, n + 1
        with contextlib.suppress(KeyboardInterrupt):
            prepare("data", texts[1])
        was_killed, left[0] = left[0] < 0, math.inf
        try:
            assert documents_in(prepare_data.open_data("data")) in whole
        except (FileNotFoundError, ValueError) as error:
            assert "prepare_data.py" in str(error)
    assert n > 12
    words = "1000 requested and 4 written"
    monkeypatch.setattr(np, "save", lambda path, shard: path.touch() or fail(OSError(words)))
    with pytest.raises(OSError, match=f"^data could not.*{words}"):
        prepare("data", texts[0])
    assert documents_in(prepare_data.open_data("data")) == whole[1]
    assert not os.path.exists("data/.prepare_data")


def test_what_meta_json_lacks_or_gets_wrong_is_reported_at_once(monkeypatch):
    meta = json.loads(pathlib.Path("prepared/meta.json").read_bytes())
    wrong = [{k: v for k, v in meta.items() if k != key} for key in meta]
    wrong += [{**meta, "tokenizer": spec} for spec in (5, {}, {"name": "gpt9"}, {"name": "bpe"})]
    wrong += [{**meta, "vocab_size": meta["vocab_size"] + n} for n in (-1, 1)]
    shutil.copytree("prepared", "data")
    for meta_now in wrong:
        write_files({"data/meta.json": json.dumps(meta_now)})
        with pytest.raises(ValueError, match="data .run prepare_data.py again"):
            prepare_data.open_data("data")
    monkeypatch.setattr("tiktoken.get_encoding", None)  # it may need the network
    write_files({"data/meta.json": json.dumps({**meta, "tokenizer": {"name": "gpt2"}})})
    prepare_data.open_data("data")


def test_the_default_data_is_made_only_in_an_empty_place(monkeypatch):
    made = []
    monkeypatch.setattr(prepare_data, "main", made.append)
    for file, n_made in {"x": 1, "data/.lock": 2, "data/val_0.npy": 2, "book.txt": 2}.items():
        write_files({file: ""})
        with pytest.raises(FileNotFoundError, match=r"prepare_data.py \S+ --out="):
            train.main(["--data=book.txt" if file == "book.txt" else "--data=data"])
        assert len(made) == n_made


# --- training -------------------------------------------------------------------------------------


def test_every_window_comes_once_an_epoch_and_none_crosses_a_shard():
    ends = [37, 45, 129, 139, 148, 168]  # the last but one is as long as a window and its target
    shards = [np.arange(start, end) for start, end in itertools.pairwise([0, *ends])]
    windows = copied(train, "Windows").Windows(shards, block_size=8, vocab_size=168, seed=3)
    assert windows.per_epoch == 3 + 0 + 9 + 1 + 1 + 1
    shard_of, epochs = lambda ids: np.searchsorted(ends, ids.numpy(), side="right"), []
    for epoch in range(3):
        idx, targets = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        assert torch.equal(targets, idx + 1)
        assert (shard_of(idx) == shard_of(targets)).all()
        assert len(set(targets.flatten().tolist())) == targets.numel()  # none is a target twice
        epochs.append(idx[:, 0].tolist())
    assert epochs[0] != sorted(epochs[0]) != sorted(epochs[1])  # these differ in their phase, too


def test_batches_depend_on_seed_and_number_alone_and_dropout_on_seed_and_step(monkeypatch):
    read, seeds = [], []
    watch(monkeypatch, lambda n, idx, loss: read.extend(idx.tolist()))
    watch(monkeypatch, lambda n, idx, loss: seeds.append(torch.initial_seed()))
    run_training("parts", "--max_iters=4 --gradient_accumulation_steps=3")
    resume("parts", "--max_iters=6 --batch_size=12 --gradient_accumulation_steps=1")
    run_training("whole", f"--max_iters=1 --batch_size={12 * 6}")
    run_training("other", "--max_iters=1 --seed=2")
    parts, whole, other = read[: 12 * 6], read[12 * 6 : -4], read[-4:]
    assert parts == whole and parts[:4] != other
    *parts, whole, other = seeds
    assert len(set(parts)) == 4 + 2 and whole == parts[0] and other not in parts


def test_dividing_a_batch_or_logging_and_evaluating_more_often_changes_no_weight():
    few = "--max_iters=6 --warmup_iters=1"
    once = run_training("once", f"{few} --batch_size=8")
    often = run_training("often", f"{few} --batch_size=8 --eval_interval=1 --log_interval=1")
    assert_equal(once["model"], often["model"])
    whole = run_training("whole", f"{few} --batch_size=8 --dropout=0")
    parts = "--batch_size=2 --gradient_accumulation_steps=4"
    divided = run_training("divided", f"{few} --dropout=0 {parts}")
    assert_close(whole["model"], divided["model"], rtol=1e-3, atol=1e-5)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_minimum():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100)
    rate = copied(train, "learning_rate_at").learning_rate_at
    rates = [rate(step, config) for step in range(120)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0
    assert rates[99:] == pytest.approx([0.1] * 21)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:100]) < 0).all()
    for warmup in (0, 99, 100, 200):  # nothing is divided by zero
        config = train.TrainConfig(learning_rate=1e-3, warmup_iters=warmup, max_iters=100)
        assert all(0 < rate(step, config) <= 1e-3 for step in range(100))


def test_weight_decay_is_on_matrices_alone_scales_multiply_the_rate_and_gradients_are_clipped():
    model, seen = tiny_model(), 0
    optimizer = train.configure_optimizer(model, 1e-3, 0.1, (0.9, 0.95), {"wte.weight": 20})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() == 2 else 0.0)
            assert group["lr_scale"] == (20 if parameter is model.transformer.wte.weight else 1)
            seen += parameter.numel()
    assert seen == sum(parameter.numel() for parameter in model.parameters())
    flags = "--max_iters=1 --warmup_iters=0 --learning_rate=0.01 --min_lr=0.01 --beta1=0"
    optimizer = run_training("out", f"{flags} --grad_clip=0.001")["optimizer"]
    rates = {group["lr_scale"]: group["lr"] for group in optimizer["param_groups"]}
    assert rates == {scale: pytest.approx(0.01 * scale) for scale in (1, 4, 20)}
    clipped = sum(state["exp_avg"].square().sum() for state in optimizer["state"].values()).sqrt()
    assert clipped.item() == pytest.approx(0.001, rel=0.01)
    assert column("out", "grad_norm")[0] > 0.01  # before


def test_every_step_is_counted_and_the_last_one_evaluated():
    last = run_training("out", "--max_iters=13 --eval_interval=5 --log_interval=2")
    assert last["state"]["step"] == 13
    assert all(state["step"] == 13 for state in last["optimizer"]["state"].values())
    assert column("out", "step") == [2, 4, 5, 7, 9, 10, 12, 13]  # anew after each evaluation
    assert column("out", "tokens") == [64 * step for step in column("out", "step")]
    losses, val = column("out", "val_loss"), prepare_data.open_data("prepared")["splits"]["val"]
    assert len(losses) == 3 and last["state"]["best"] == [min(losses)]
    assert column("out", "val_perplexity") == pytest.approx(list(map(math.exp, losses)))
    bits = losses[0] / math.log(2) * val["tokens"]
    assert column("out", "val_bpb")[0] == pytest.approx(bits / val["bytes"])
    assert train.perplexity(1e4) == math.inf


def test_training_learns_and_sample_writes(capsys):
    run_training("out", "--max_iters=150 --learning_rate=1e-2 --dropout=0")
    losses = column("out", "val_loss")
    assert losses[-1] < losses[0] - 1
    capsys.readouterr()
    sample.main(["--start=the cat", "--max_new_tokens=40"])
    out, err = capsys.readouterr()
    assert out.startswith("the cat") and sum(word in out for word in WORDS) > 5
    assert re.search(r"^\d+ tokens in [\d.]+ s: [\d,]+ tokens/s$", err.splitlines()[-1])


def test_a_runs_weights_are_evaluated_on_evenly_spaced_windows_and_go_on(capsys, monkeypatch):
    read, best = [], min(column("base", "val_loss"))
    with monkeypatch.context() as patch:
        watch(patch, lambda n, idx, loss: read.extend(idx.tolist()), training=False)
        train.main(f"--data=prepared --init_from=base {SMALL} --eval_only".split())
    assert f"{best:.4f}" in capsys.readouterr().out
    (val,) = prepare_data.open_data("prepared")["splits"]["val"]["arrays"]
    n = (len(val) - 1) // 16 - 1  # for training, a window is left out to make room for the phase
    windows = [val[16 * i : 16 * i + 16].tolist() for i in range(n)]
    numbers = [windows.index(row) for row in read]
    assert numbers == pytest.approx(np.linspace(0, n - 1, 3 * 4), abs=1) and numbers[-1] == n - 1
    run_training("out", "--init_from=base")
    assert min(column("out", "val_loss")) < best


def test_training_stops_when_patience_has_run_out_and_keeps_the_best():
    last = run_training("out", "--patience=2 --learning_rate=0 --max_iters=90")
    assert last["state"]["step"] == 30  # after evaluations at 10, 20 and 30
    assert resume("out", "--patience=4")["state"]["step"] == 50
    assert load_checkpoint("out/best.pt")["step"] == 10


def test_an_earlier_run_is_moved_aside_by_the_first_whole_save_of_the_next(monkeypatch):
    first, write = run_training("out", "--max_iters=5")["model"], train.save_checkpoint
    files = {"metrics.csv", "predictions.csv", "responses.jsonl", "best.pt", "last.pt"}
    write_files({"out/predictions.csv": "", "out/responses.jsonl": ""})
    with pytest.raises(ValueError, match="stopped at step"):  # before it saves
        run_training("out", "--learning_rate=1e30 --grad_clip=0")
    assert_equal(first, load_checkpoint("out/last.pt")["model"])
    kill = lambda path, checkpoint: 1 / 0 if path.name == "last.pt" else write(path, checkpoint)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "save_checkpoint", kill)
        run_training("out", "--seed=2 --max_iters=5")
    assert os.path.exists("out/best.pt") and not os.path.exists("out/last.pt")
    run_training("out", "--seed=3 --max_iters=5")
    assert resume("out", "--max_iters=9")["state"]["step"] == 9
    assert set(os.listdir("out/previous")) == files
    for name in ("best.pt", "last.pt"):
        assert_equal(first, load_checkpoint(f"out/previous/{name}")["model"])


BAD_RUNS = [  # what the error must say, what to do to last.pt
    ("", lambda last: last["optimizer"]["state"][0]["exp_avg_sq"].resize_(1)),
    ("", lambda last: last["optimizer"]["state"][0].clear()),
    ("", lambda last: last["optimizer"]["state"][0].update(step=torch.zeros(2))),
    ("batch_size is '4'", lambda last: last["run_config"].update(batch_size="4")),
    ("step is '4'", lambda last: last["state"].update(step="4")),
]


@pytest.mark.parametrize("complaint, change", BAD_RUNS)
def test_a_run_with_moments_settings_or_counts_that_do_not_fit_is_refused(complaint, change):
    last = load_checkpoint("base/last.pt")
    change(last)
    gpt.save_checkpoint("last.pt", last)
    with pytest.raises(ValueError, match=f"last.pt: damaged.*{complaint}"):
        resume(".", "--max_iters=21")


def test_a_resumed_run_keeps_its_settings_and_takes_defaults_for_newer_ones(monkeypatch):
    monkeypatch.setattr(train, "pick_dtype", lambda device: torch.bfloat16)
    last = run_training("out", "--max_iters=1 --dtype= --threads=1")
    del last["run_config"]["patience"]
    moments = last["optimizer"]["state"][0]  # without memory of their own: AdamW needs it
    moments["exp_avg"] = torch.zeros(1).expand(moments["exp_avg"].shape)
    gpt.save_checkpoint("out/last.pt", last)
    monkeypatch.setattr(train, "pick_dtype", lambda device: torch.float32)
    torch.set_num_threads(2)
    config = resume("out", "--max_iters=2")["run_config"]
    assert (config["dtype"], config["patience"]) == ("bfloat16", 0)
    assert torch.get_num_threads() == 1
    resume("out", "--max_iters=3 --dtype=float16")  # which has no scaler to restore


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves(number, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        watch(patch, lambda n, idx, loss: signal.raise_signal(number) if n == 7 else None)
        run_training("parts")
    assert stopped.value.code == 128 + number
    assert load_checkpoint("parts/last.pt")["state"]["step"] == 7
    assert_same_run(resume("parts"), run_training("whole"))


def test_a_killed_run_resumes_to_the_same_bits_and_writes_missing_metrics():
    flags = "--eval_interval=2 --eval_iters=1 --lr_decay_iters=100"
    run = start(f"-m train --data=prepared --out_dir=killed {SMALL} {flags} --max_iters=1000")
    wait_for("killed/last.pt", run)
    run.kill()
    run.wait()
    os.remove("killed/metrics.csv")
    flags += f" --max_iters={load_checkpoint('killed/last.pt')['state']['step'] + 4}"
    assert_same_run(resume("killed", flags), run_training("whole", flags))
    assert column("killed", "val_loss") == column("whole", "val_loss")


@on_posix
def test_two_processes_train_as_one_until_a_signal_stops_both_and_one_continues():
    flags = "--dropout=0 --log_interval=1 --lr_decay_iters=100 --eval_iters=100"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -m train"
    halves = "--batch_size=2 --gradient_accumulation_steps=2 --max_iters=100000"
    run = start(f"{torchrun} --data=prepared --out_dir=two {SMALL} {flags} {halves}")
    wait_for("two/metrics.csv", run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) != 0
    last = f"--max_iters={load_checkpoint('two/last.pt')['state']['step'] + 10}"
    two = resume("two", f"{last} --gradient_accumulation_steps=4")
    one = run_training("one", f"{flags} {last} --batch_size=8")
    for name in ("train_loss", "val_loss"):
        assert column("one", name) == pytest.approx(column("two", name), abs=1e-4)
    assert_close(one["model"], two["model"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_run_shows_its_size_and_a_line_of_progress(is_terminal, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    run_training("out", "--log_interval=2 --max_iters=8")
    *size, progress = capsys.readouterr().out.split("\n", 4)
    replaced = re.findall(r"step +\d.*?\r", progress)  # on a terminal, by the next line
    assert progress.count("step ") == 4 and len(replaced) == 3 * is_terminal
    weights = {name: w.numel() for name, w in GPT.from_pretrained("out").named_parameters()}
    total, n_tokens = sum(weights.values()) - weights["transformer.wpe.weight"], 8 * 4 * 16
    # forward and backward: 6 operations for each weight in a product, and attention's products
    flops = 6 * (total - weights["transformer.wte.weight"]) + 12 * 16 * 16
    epochs = n_tokens / prepare_data.open_data("prepared")["splits"]["train"]["tokens"]
    assert size[0].startswith(f"{total:,} parameters")
    assert size[1] == f"{n_tokens} training tokens: {epochs:.1f} epochs"
    assert f"{flops:,} " in size[2]
    assert size[3].startswith(f"{n_tokens / total:.1f} tokens ")


# --- sampling -------------------------------------------------------------------------------------


def save_sampler(**shape):
    """A model that is not trained, with the tokenizer of base, in best.pt -> the tokenizer."""
    spec = load_checkpoint("base")["tokenizer"]
    tokenizer = build_tokenizer(spec)
    model = GPT(GPTConfig(**{**TINY, "vocab_size": tokenizer.n_vocab, **shape}))
    gpt.save_checkpoint("best.pt", {**model.checkpoint(), "tokenizer": spec})
    return tokenizer


def test_a_seed_writes_the_same_samples_all_of_them_different_and_without_padding_tokens(capsys):
    checkpoint, model = load_checkpoint("base"), GPT.from_pretrained("base")
    known, outputs = model.config.vocab_size, []
    model.resize(vocab_size=known + 44)  # tokens that only pad the vocabulary
    model.lm_head.weight.data[known:] = 100 * model.lm_head.weight[:44]
    assert model(tokens((4, 8))).argmax(-1).max() >= known
    gpt.save_checkpoint("padded.pt", {**checkpoint, **model.checkpoint()})
    for path, seed in [("base", 5), ("padded.pt", 5), ("base", 6)]:
        flags = f"--init_from={path} --num_samples=3 --max_new_tokens=10 --seed={seed}".split()
        sample.main([*flags, f"--start={story(100)}"])
        out, err = capsys.readouterr()
        outputs.append(out)
        assert "the last 16" in err
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(set(outputs[0].split("-" * 80))) == 3


def test_small_models_are_sampled_on_one_thread_and_measured_and_exported_in_float32(monkeypatch):
    dtypes = []
    generate = lambda model, *args, **how: dtypes.append(model.lm_head.weight.dtype) or iter(())
    monkeypatch.setattr(GPT, "generate", generate)
    monkeypatch.setattr(sample, "pick_dtype", lambda device: torch.bfloat16)
    for n_embd, threads in [(256, 1), (512, 2)]:
        save_sampler(n_embd=n_embd, n_layer=1)
        torch.set_num_threads(2)
        sample.main(["--init_from=."])
        assert torch.get_num_threads() == threads
    record = lambda model, *args: dtypes.append(model.lm_head.weight.dtype)
    monkeypatch.setattr(sample, "print_surprise", record)
    sample.main(["--init_from=.", "--start=a", "--surprise"])  # a measurement
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    sample.main(["--init_from=best.pt", "--save_pretrained=hf"])
    idx = tokens((1, 8))
    assert_equal(GPT.from_pretrained("hf")(idx), GPT.from_pretrained("best.pt")(idx))


@pytest.mark.parametrize(("seconds", "n_embd", "threads"), [(0.5, 16, 2), (1, 16, 1), (9, 512, 2)])
def test_a_small_model_is_trained_on_one_thread_where_two_are_no_faster(
    seconds, n_embd, threads, monkeypatch
):
    now = itertools.accumulate(seconds if torch.get_num_threads() == 2 else 1 for _ in range(9))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(now))
    torch.set_num_threads(2)
    assert train.pick_threads(GPT(GPTConfig(**{**TINY, "n_embd": n_embd}))) == threads


BIAS = "transformer.h.0.mlp.c_fc.bias"
BAD_CHECKPOINTS = [  # what the error must say, what to do to a checkpoint
    ("use the best.pt", lambda best: best.pop("config")),
    ("damaged", lambda best: best.update(config=5)),
    ("n_head=2.0", lambda best: best["config"].update(n_head=2.0)),
    ("fewer weights than layers", lambda best: best["config"].update(n_layer=10**6)),
    (
        "285 tokens in its tokenizer, fewer in",
        lambda best: best["tokenizer"]["tokens"].append("zz"),
    ),
    # AdamW would write past its end
    ("damaged.*contiguous", lambda best: best["model"].update({BIAS: torch.ones(1).expand(64)})),
    ("damaged.*plain", lambda best: best["model"].update({BIAS: torch.ones(64).to_sparse()})),
    ("damaged.*plain", lambda best: best["model"].update({BIAS: torch.ones(64, device="meta")})),
]


@pytest.mark.parametrize("complaint, change", BAD_CHECKPOINTS)
def test_a_checkpoint_that_makes_no_model_is_refused(complaint, change):
    best = load_checkpoint("base")
    change(best)
    gpt.save_checkpoint("best.pt", best)
    with pytest.raises(ValueError, match=f"best.pt.*{complaint}"):
        sample.main(["--init_from=best.pt"])


def test_a_character_of_several_tokens_is_written_when_it_is_complete(capsys, monkeypatch):
    end = build_tokenizer(load_checkpoint("base")["tokenizer"]).eot_token
    made = [*"漢a😀".encode(), 0xFF, "漢".encode()[0], end]  # bytes are the first tokens
    generate = lambda *args, **how: (torch.tensor([token, token]) for token in made)
    monkeypatch.setattr(GPT, "generate", generate)
    sample.main(["--init_from=base", "--num_samples=2"])
    out, err = capsys.readouterr()
    assert out.split("\n") == ["漢a😀��", "-" * 80, "漢a😀��", ""]
    assert err.startswith(f"{2 * (len(made) - 1)} tokens in")


def test_surprise_is_the_models_own_probability(capsys):
    model, text = GPT.from_pretrained("base"), story(50)  # longer than the context: 16 tokens count
    tokenizer = build_tokenizer(load_checkpoint("base")["tokenizer"])
    idx = torch.tensor([[tokenizer.eot_token, *tokenizer.encode(text)[:16]]])
    sample.main(["--init_from=base", f"--start={text}", "--surprise", "--device=cpu"])
    _, *lines, summary = capsys.readouterr().out.splitlines()
    bits = model(idx[:, :-1], idx[:, 1:]).item() * 16 / math.log(2)
    n_bytes = len(tokenizer.decode(idx[0, 1:].tolist()))
    assert len(lines) == 16 and summary.startswith(f"{bits:.1f} bits in {n_bytes} bytes")
    probabilities = model(idx[:, :1])[0, 0].softmax(-1)
    rank = (probabilities > probabilities[idx[0, 1]]).sum() + 1
    assert re.search(f"{probabilities[idx[0, 1]]:.2g} +{rank} ", lines[0])


def test_pictures_are_drawn_where_there_is_matplotlib(monkeypatch):
    from matplotlib.axes import Axes
    from PIL import Image

    draw = ["--init_from=base", "--start=the cat sees", "--attention=a.png"]
    monkeypatch.setattr(sample, "token_label", lambda *token: "$_$")  # not a formula
    with pytest.raises(ValueError, match="pip install matplotlib"):
        sample.main(draw)
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    run_training("out")
    sample.main(draw)
    for path in ("a.png", "out/loss.png"):
        Image.open(path).load()  # decodes all of it, and fails where something is amiss
    shown, titles, model = [], [], GPT.from_pretrained("base")
    monkeypatch.setattr(Axes, "imshow", lambda panel, image, **how: shown.append(image))
    monkeypatch.setattr(Axes, "set_title", lambda panel, title, **how: titles.append(title))
    sample.main(draw)
    assert titles == ["layer 1, head 1", "layer 1, head 2"]
    ids = build_tokenizer(load_checkpoint("base")["tokenizer"]).encode("the cat sees")
    x = model.transformer.wte(torch.tensor([ids])) + model.transformer.wpe.weight[: len(ids)]
    block = model.transformer.h[0]
    expected = gpt.attention_weights(*block.attn.heads(block.ln_1(x))[:2])[0]
    assert_close(torch.from_numpy(np.stack(shown)), expected)


@pytest.mark.parametrize("max_new_tokens, room", [(20, 20), (500, 30)])  # at most half the context
def test_a_chat_forgets_its_oldest_exchanges_but_not_the_system_prompt(
    max_new_tokens, room, capsys, monkeypatch
):
    tokenizer, prompts = save_sampler(block_size=60), []
    answer = [[token] for token in (*tokenizer.encode_ordinary("yes"), tokenizer.eot_token)]
    reply = lambda prompt: prompts.extend(prompt.tolist()) or map(torch.tensor, answer)
    monkeypatch.setattr(GPT, "generate", lambda model, idx, *args, **how: reply(idx))
    questions = ["the cat", "the dog", "a house", "a red cat", "not " * 60]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n  \n".join(questions)))  # and empty lines
    chat = ["--init_from=.", "--chat", "--system=be kind"]
    sample.main([*chat, f"--max_new_tokens={max_new_tokens}"])
    out, err = capsys.readouterr()
    assert out.split() == ["yes"] * len(prompts) == ["yes"] * 4
    assert re.fullmatch(rf"too long: \d+ tokens, but only {60 - room} fit\n", err)
    system, said = [{"role": "system", "content": "be kind"}], []
    for question, prompt in zip(questions, prompts):
        said.append({"role": "user", "content": question})
        rests = [system + said[i:] for i in range(0, len(said), 2)]
        whole = [prepare_data.chat_prompt(rest, tokenizer, "roles") for rest in rests]
        assert prompt == next(tokens for tokens in whole if len(tokens) <= 60 - room)
        said.append({"role": "assistant", "content": "yes"})
    # a model of single questions is asked each anew
    gpt.save_checkpoint("best.pt", {**load_checkpoint("."), "turns": 1})
    prompts.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions[:2])))
    sample.main(chat)
    for question, prompt in zip(questions[:2], prompts, strict=True):
        alone = [*system, {"role": "user", "content": question}]
        assert prompt == prepare_data.chat_prompt(alone, tokenizer, "roles")


# --- other people's models ------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_transformers_computes_the_same_logits(bias, tie_weights):
    import transformers

    model, idx = tiny_model(bias=bias, tie_weights=tie_weights), tokens((2, 16))
    model.save_pretrained("hf", eos_token_id=49)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf")
    assert_close(theirs(idx).logits, model(idx), atol=1e-5, rtol=0)
    assert theirs.config.eos_token_id == 49
    assert torch.equal(GPT.from_pretrained("hf")(idx), model(idx))
    far_from_new(theirs).save_pretrained("hf")  # also biases that were not there
    assert_close(theirs(idx).logits, GPT.from_pretrained("hf")(idx), atol=1e-5, rtol=0)


def test_models_of_any_precision_alignment_and_prefix_are_read():
    import safetensors.torch

    model, path = tiny_model(), pathlib.Path("model.safetensors")
    for dtype in (torch.half, torch.bfloat16, torch.float32):
        model.to(dtype).save_pretrained("ours")
        shutil.copy("ours/config.json", ".")
        weights = safetensors.torch.load_file("ours/model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {dtype}
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}  # OpenAI's
        safetensors.torch.save_file(weights, path)
        assert_equal(dict(GPT.from_pretrained(".").state_dict()), dict(model.float().state_dict()))
    data, end = path.read_bytes(), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    # one more space in the header, and nothing is aligned
    path.write_bytes((end - 7).to_bytes(8, "little") + data[8:end] + b" " + data[end:])
    assert_equal(dict(GPT.from_pretrained(path).state_dict()), dict(model.state_dict()))
    shutil.copy("base/best.pt", ".")  # an export does not hide the run in its folder
    best, base = load_checkpoint("."), load_checkpoint("base")
    assert_equal(best["model"], base["model"])
    for dtype in (torch.double, torch.half):  # mixed precisions are made float32
        best["model"][BIAS] = best["model"][BIAS].to(dtype)
        logits = GPT.from_checkpoint(best)(torch.arange(9)[None])
        assert_close(logits, GPT.from_checkpoint(base)(torch.arange(9)[None]), atol=1e-2, rtol=0)


def safetensors_file(length=None, data=b"\0" * 8, **changes):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    header = json.dumps({"a": entry}).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


BAD_SAFETENSORS = {
    "empty": b"",
    "header longer than the file": safetensors_file(length=10**6),
    "data cut off": safetensors_file(data=b"\0" * 7),
    "out of bounds": safetensors_file(shape=[4], data_offsets=[0, 16]),
    "before the file": safetensors_file(data_offsets=[-(10**6), 0]),
    "shape and length disagree": safetensors_file(shape=[3]),
    "shape that overflows": safetensors_file(shape=[2**62, 4]),
    "not JSON": (8).to_bytes(8, "little") + b"{{{{{{{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_a_malformed_safetensors_file_is_refused(name):
    tiny_model().save_pretrained(".")  # which has a config.json
    write_files({"good.safetensors": safetensors_file(), "bad.safetensors": BAD_SAFETENSORS[name]})
    assert load_checkpoint("good.safetensors")
    with pytest.raises(ValueError, match="bad.safetensors: damaged"):
        load_checkpoint("bad.safetensors")


ANOTHER_KIND = [  # a file, text in it, other text, what the error must say
    ("config.json", '"gpt2"', '"llama"', "model_type is 'llama'"),
    ("config.json", "gelu_new", "relu", "activation_function is 'relu'"),
    ("config.json", "1e-05", "1e-12", "layer_norm_epsilon"),
    ("config.json", '"n_layer": 2', '"n_layer": 3', "Missing key"),
    ("config.json", '"n_layer": 2', '"n_layer": 1', "Unexpected key"),
    ("config.json", '"n_embd": 16', '"n_embd": 18', "size mismatch"),
    ("config.json", '"n_head": 2', f'"n_head": {2**63}', "damaged"),
    ("config.json", "{", "[", "config.json: damaged"),
    ("tokenizer.json", '"use_regex": true', '"use_regex": false', "tokenizer.json: damaged"),
    ("tokenizer.json", '_space": false', '_space": true', "tokenizer.json: damaged"),
    ("tokenizer.json", '"ByteLevel"', '"Whitespace"', "tokenizer.json: damaged"),
    ("tokenizer.json", '"A": 65', '"A": 66', "tokenizer.json: damaged"),
    ("tokenizer.json", '"A": 65, ', "", "tokenizer.json: damaged"),
    ("tokenizer.json", "{", "[", "tokenizer.json: damaged"),
]


@pytest.mark.parametrize("file, old, new, complaint", ANOTHER_KIND)
def test_a_model_or_tokenizer_of_another_kind_is_refused(file, old, new, complaint):
    save_sampler()
    sample.main(["--init_from=best.pt", "--save_pretrained=hf"])
    good = pathlib.Path("hf", file).read_text("utf-8")
    assert old in good
    write_files({f"hf/{file}": good.replace(old, new, 1)})
    with pytest.raises(ValueError, match=complaint):
        sample.main(["--init_from=hf"])


@pytest.mark.parametrize("n_files", range(3))
def test_an_export_over_another_that_is_cut_short_is_not_loaded(n_files, monkeypatch):
    save_sampler()
    export, left = ["--init_from=best.pt", "--save_pretrained=hf"], [0] * n_files
    sample.main(export)
    monkeypatch.setattr(os, "fsync", lambda file: left.pop())  # an error if none is left
    with pytest.raises(IndexError):
        sample.main(export)
    with pytest.raises(OSError, match="config.json"):
        GPT.from_pretrained("hf")


def test_transformers_makes_the_same_tokens():
    import transformers

    spec = bpe_spec(train_bpe([story(2000), pathlib.Path(__file__).read_text("utf-8")], 700))
    prepare_data.save_tokenizer(spec, "hf")
    write_files({"hf/config.json": '{"model_type": "gpt2"}'})
    ours, theirs = build_tokenizer(spec), transformers.AutoTokenizer.from_pretrained("hf")
    for text in (any_text(random.Random(n), n % 60) for n in range(200)):
        assert theirs(text)["input_ids"] == ours.encode_ordinary(text)
    assert theirs.convert_tokens_to_ids("<|endoftext|>") == ours.eot_token
    theirs.save_pretrained("again")
    assert prepare_data.read_tokenizer("hf") == prepare_data.read_tokenizer("again") == spec


def test_a_model_goes_out_and_comes_back_offline(capsys, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", None)  # would need the network
    sample.main(["--init_from=base", "--save_pretrained=hf"])
    texts = []
    for path in ("base", "hf", "hf/model.safetensors"):
        capsys.readouterr()
        sample.main([f"--init_from={path}", "--max_new_tokens=20"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    prepare("data", story(4000), "--tokenizer=hf")
    train.main(["--init_from=hf", "--block_size=8", "--dropout=0.2", "--max_iters=5"])
    more = load_checkpoint("out/last.pt")
    assert (more["config"]["block_size"], more["config"]["dropout"]) == (8, 0.2)
    assert len(more["model"]["transformer.wpe.weight"]) == 8


def test_gpt2_is_downloaded_once_and_only_whole(monkeypatch):
    model, idx = tiny_model(), tokens((2, 16))
    path = pathlib.Path("hub/openai-community/gpt2/resolve/main/model.safetensors")
    model.save_pretrained(path.parent)
    weights = path.read_bytes()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "cache")
    with web_server("hub") as (url, asked):
        monkeypatch.setenv("HF_ENDPOINT", url)
        for broken in (weights[:-4], b"<html>too many requests</html>"):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match="cannot be downloaded"):
                load_checkpoint("gpt2")
            assert not os.path.exists("cache/gpt2/model.safetensors")
        path.write_bytes(weights)
        for _ in range(2):
            assert torch.equal(GPT.from_pretrained("gpt2")(idx), model(idx))
        assert [path.count("safetensors") for path in asked] == [0, 1, 1, 1]


# --- fine-tuning ----------------------------------------------------------------------------------


def labeled(n):
    """Texts that have "cat" or "dog" in them, which is their label."""
    rng, others, rows = random.Random(1), sorted({*WORDS} - {"cat", "dog"}), []
    for i in range(n):
        words = [*rng.choices(others, k=rng.randrange(2, 6)), ("cat", "dog")[i % 2]]
        rng.shuffle(words)
        rows.append({"text": f"{' '.join(words)} {i}", "label": ("cat", "dog")[i % 2]})
    return rows


def asked(n):  # instructions with their answers
    return [{"instruction": f"say {WORDS[i % 12]} {i}", "output": WORDS[i % 12]} for i in range(n)]


def preferred(n):  # instructions whose better answers are other words than the worse ones
    rows = [{"chosen": WORDS[i % 6], "rejected": f"{WORDS[6 + i % 5]} {i}"} for i in range(n)]
    return [{"instruction": f"say {i}", **row} for i, row in enumerate(rows)]


def finetune_flags(name, flags, rows):
    """The flags of 12 steps on these rows, or on 60 that suit the task."""
    kind = {"classify": labeled, "dpo": preferred, "reward": preferred}.get(name, asked)
    write_files({f"{name}.jsonl": rows or kind(60)})
    files = f"--init_from=base --data={name}.jsonl --out_dir={name}"
    return f"--task={name} {files} {FEW} {flags}".split()


def run_finetune(name, flags="", rows=None, folder=None):
    """finetune.py, into a folder named as the task -> (last.pt, best.pt)."""
    finetune.main(finetune_flags(name, flags, rows))
    return [load_checkpoint(f"{folder or name}/{file}") for file in ("last.pt", "best.pt")]


def make_task(name, flags="", rows=None):
    """A task as finetune.py makes it, ready to train."""
    config, _ = finetune.read_flags(finetune_flags(name, f"--out_dir=new {flags}", rows))
    task = finetune.TASKS[name](config, train.Machine(config), load_checkpoint(config.init_from))
    finetune.choose_weights(task)
    return task


@pytest.fixture
def toy_reward(monkeypatch):
    """In the place of out/reward: how much of an answer is the letter e."""
    os.makedirs("out/reward")
    head = {"task": "reward", "head": torch.nn.Linear(16, 1).state_dict()}
    gpt.save_checkpoint("out/reward/best.pt", {**load_checkpoint("base"), **head})
    share = lambda text: text.count("e") / max(1, len(text))
    score = lambda task, prompts, answers: torch.tensor([*map(share, answers)])
    monkeypatch.setattr(finetune.Reward, "score", score)


def test_lora_begins_at_nothing_adds_its_scaled_product_and_can_be_merged():
    model, idx = tiny_model(), tokens((2, 16))
    before = model(idx)
    finetune.add_lora(model, rank=2, alpha=6.0, dropout=0.0)
    assert torch.equal(model(idx), before)
    far_from_new(model)
    merged = GPT.from_checkpoint({**model.checkpoint(), "model": finetune.merged_weights(model)})
    assert_close(merged(idx), model(idx))
    alone = copied(finetune, "LoRALinear").LoRALinear(torch.nn.Linear(4, 5), rank=2, alpha=6.0)
    for linear in (model.transformer.h[0].mlp.c_fc, far_from_new(alone)):
        trained = [name for name, weight in linear.named_parameters() if weight.requires_grad]
        assert trained == ["lora_A", "lora_B"]
        x = torch.randn(3, linear.in_features)
        product = x @ linear.lora_A.T @ linear.lora_B.T
        assert_close(linear(x), F.linear(x, linear.weight, linear.bias) + 3 * product)


@pytest.mark.parametrize("weights", ["all", "last_block", "head", "lora"])
def test_fine_tuning_changes_only_what_the_train_flag_names(weights, monkeypatch):
    calls, losses = [], finetune.cross_entropy
    record = lambda *args: calls.append(1) or losses(*args)
    monkeypatch.setattr(finetune, "cross_entropy", record)
    last, best = run_finetune("classify", f"--train={weights} --dropout=0")
    before = load_checkpoint("base")["model"]
    changed = {name for name in before if not torch.equal(before[name], best["model"][name])}
    block = {name for name in before if name.startswith(("transformer.h.0", "transformer.ln_f"))}
    adapted = {name for name in block if re.search(r"c_\w+\.weight", name)}
    expected = {"all": {*before}, "last_block": block, "head": set(), "lora": adapted}
    assert changed == expected[weights]
    n_trained = {"all": len(before) + 2, "last_block": 16, "head": 2, "lora": 10}
    assert len(last["optimizer"]["state"]) == n_trained[weights]
    assert GPT.from_checkpoint(best).config == GPT.from_pretrained("base").config
    assert bool(calls) == (weights != "head")  # the head learns nothing from next tokens


@pytest.mark.parametrize("template", ["roles", "alpaca"])
@pytest.mark.parametrize("name", ["instruct", "dpo"])
def test_the_loss_of_a_conversation_is_on_its_answers_alone(name, template):
    said = ["be short", "the cat", "sees a dog", "and", "not a red house"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, said)]
    row, answers = {"messages": messages}, [said[2], said[4]]
    if name == "dpo":  # on the last answer alone
        row, answers = {"prompt": messages[:-1], "chosen": said[4], "rejected": "no"}, [said[4]]
    flags = f"--template={template} --block_size=1000"
    task = make_task(name, flags)
    example = task.encode(row)
    idx, targets = example["rows"][0]
    places = [i for i, target in enumerate(targets) if target != -100]
    learned = [targets[i] for i in places]
    assert learned == [[*idx[1:], task.end][i] for i in places]
    expected = [[*task.tokenizer.encode(answer), task.end] for answer in answers]
    assert learned == list(itertools.chain(*expected))
    assert all(content in task.tokenizer.decode(idx) for content in said[:-1])
    log_probs = task.gpt(torch.tensor([idx]))[0].log_softmax(-1)[places, learned]
    if name == "dpo":
        assert_close(task.terms([example])["chosen"][0], log_probs.sum())
    else:
        assert_close(task.terms([example])["loss"], -log_probs)
        task = make_task(name, f"{flags} --loss_on_prompt")
        assert task.encode(row)["rows"][0] == (idx, [*idx[1:], -100])


def test_an_example_too_long_loses_its_beginning_but_keeps_an_answer():
    parts = [([1] * 10, False), ([2] * 3, True), ([3] * 10, False), ([4] * 5, True)]
    assert finetune.to_row(parts, 100)[1].count(4) == 5
    assert finetune.to_row(parts, 8) == ([3] * 3 + [4] * 5, [-100] * 2 + [4] * 5 + [-100])
    assert finetune.to_row(parts, 3) == ([3, 4, 4], [4, 4, 4])  # the end of the answer goes, too


@pytest.mark.parametrize("name", ["classify", "reward"])
def test_padding_is_to_few_lengths_and_changes_neither_loss_nor_score_nor_precision(name):
    task, rows = make_task(name, "--block_size=40 --dtype=bfloat16"), [[5], [1, 2, 3], [9] * 16]
    task.model.eval()
    examples = [{"rows": [(row, [*row[1:], -100])]} for row in rows]
    idx, targets, _ = task.collate(examples)
    log_probs, _ = finetune.token_log_probs(task.gpt, idx, targets)
    for i, row in enumerate(rows):
        x = task.gpt.hidden(torch.tensor([row]))[0]
        by_hand = task.gpt.lm_head(x).log_softmax(-1)[range(len(row) - 1), row[1:]]
        assert_close(log_probs[i], F.pad(by_hand, (0, 16 - len(by_hand))))
        task.pooling = "mean"
        assert_close(task.scores_of(examples)[i], task.apply_head(x.mean(0)))
        task.pooling = "last"
        assert_close(task.scores_of(examples)[i], task.apply_head(x[-1]))
    with task.machine.autocast():
        scores = task.scores_of(examples)
    assert not torch.equal(scores, scores.bfloat16().float())
    widths = {task.collate([{"rows": [([1] * n, [1] * n)]}])[0].size(1) for n in range(1, 41)}
    assert widths == {16, 32, 40}


def test_targets_weigh_the_same_in_any_division_and_tokens_never_read_stay_as_they_are():
    write_files({"v.jsonl": [{"instruction": "say", "output": "a"}]})
    flags = "--max_iters=1 --eval_interval=1 --val=v.jsonl --test=v.jsonl --batch_size="
    whole, _ = run_finetune("instruct", f"{flags}40", asked(40))
    divided, _ = run_finetune("instruct", f"{flags}4 --gradient_accumulation_steps=10", asked(40))
    assert_close(whole["model"], divided["model"], atol=1e-5, rtol=1e-4)
    (after,) = (w for name, w in whole["model"].items() if name.endswith("wte.weight"))
    unchanged = (load_checkpoint("base")["model"]["transformer.wte.weight"] == after).all(dim=1)
    assert unchanged[ord("Q")] and not unchanged.all()


RESUMED = ["classify", "classify --lm_weight=0", "instruct --train=lora", "dpo", "reward", "ppo"]


@pytest.mark.parametrize("flags", [*RESUMED, "grpo --train=lora --group_size=3"])
def test_resumed_fine_tuning_is_uninterrupted_fine_tuning(flags, toy_reward):
    name, _, flags = f"{flags} --dropout=0.1 --lora_dropout=0.1".partition(" ")
    whole = run_finetune(name, flags)
    run_finetune(name, f"{flags} --max_iters=6 --lr_decay_iters=12")
    finetune.main(f"--task={name} --init_from=resume --out_dir={name} --max_iters=12".split())
    assert_same_run(whole[0], load_checkpoint(f"{name}/last.pt"))
    assert_equal(whole[1]["model"], load_checkpoint(f"{name}/best.pt")["model"])


def test_a_run_stopped_before_its_first_evaluation_leaves_a_model_and_resumes(monkeypatch):
    clip, steps = train.clip_grad_norm_, itertools.count(1)
    stopping = lambda *args: (
        (next(steps) == 3 and signal.raise_signal(signal.SIGINT)) or clip(*args)
    )
    whole, _ = run_finetune("instruct", "--out_dir=whole", folder="whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "clip_grad_norm_", stopping)
        run_finetune("instruct")
    assert load_checkpoint("instruct/best.pt")["step"] == 3
    sample.main(["--init_from=instruct", "--max_new_tokens=3"])
    finetune.main(["--task=instruct", "--init_from=resume", "--out_dir=instruct"])
    assert_same_run(whole, load_checkpoint("instruct/last.pt"))


@pytest.mark.parametrize(
    "name, folder", [("dpo", "start"), ("ppo", "start"), ("ppo", "out/reward")]
)
def test_a_run_is_not_resumed_on_other_models_than_it_began_with(name, folder, toy_reward):
    shutil.copytree("base", "start")
    run_finetune(name, "--init_from=start --max_iters=6")
    model = load_checkpoint(folder)
    model["model"]["transformer.ln_f.bias"][0] += 1
    gpt.save_checkpoint(f"{folder}/best.pt", model)
    changed = {"start": "init_from", "out/reward": "reward"}[folder]
    with pytest.raises(ValueError, match=f"{changed} differs"):
        finetune.main(f"--task={name} --init_from=resume --out_dir={name} --max_iters=12".split())


def test_a_classifier_learns_answers_and_can_be_trained_further(capsys):
    flags = "--max_iters=150 --lm_weight=0.1 --learning_rate=6e-3 --patience=20 --eval_interval=30"
    _, best = run_finetune("classify", flags, labeled(200))
    out = capsys.readouterr().out
    assert len(re.findall(r"\n(val|test) +accuracy.*most common label: 0.[456]", out)) == 2
    rows = [row for row in read_rows("classify/predictions.csv") if row["split"] == "test"]
    right = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    assert right > 0.75 and f"{right:.4f}" in out
    use = finetune_flags("classify", "--init_from=classify", rows)
    for row in rows[:3]:
        finetune.main([*use, f"--predict={row['text']}"])
        label, probability = capsys.readouterr().out.split()
        assert label == row["predicted"]
        assert float(probability) == pytest.approx(float(row["probability"]), abs=1e-3)
    finetune.main([*use, "--eval_only"])  # measures all examples of its file, as one split
    out = capsys.readouterr().out
    assert f"test  accuracy {right:.4f}" in out and "train" not in out.partition("\n")[2]
    # a second training starts from the first one's head, unless its labels are others
    head_for = lambda rows: make_task("classify", "--init_from=classify", rows).model["head"]
    assert_equal(dict(head_for(labeled(60)).state_dict()), dict(best["head"]))
    others = [{**row, "label": row["label"] + "s"} for row in labeled(60)]
    assert not torch.equal(head_for(others).weight, best["head"]["weight"])


def test_a_classifiers_curves_compare_like_with_like():
    run_finetune("classify", "--log_interval=6 --learning_rate=1e-9")  # nothing is learned
    for name in ("label_loss", "train_loss"):
        val = column("classify", f"val_{name}".replace("train_", ""))[0]
        assert column("classify", name)[0] == pytest.approx(val, abs=0.1)
    assert finetune.Classify.curves == ("label_loss", "val_label_loss")


def test_a_longer_context_grows_positions_that_are_trained():
    rows = [{**row, "text": row["text"] * 4} for row in labeled(60)]
    _, best = run_finetune("classify", "--train=lora --block_size=64", rows)
    before, after = (c["model"]["transformer.wpe.weight"] for c in (load_checkpoint("base"), best))
    assert after.shape == (64, 16) and (after[:16] != before).all()  # though the rest is frozen


def test_splits_share_no_text_and_no_group_and_can_be_balanced():
    rows = [{"text": f"t{i % 270}", "group": i % 270 // 3, "label": "a"} for i in range(300)]
    rows += [{"text": f"u{i}", "group": f"u{i}", "label": "b"} for i in range(100)]
    write_files({"test.jsonl": [{"text": f"t{i}", "label": "a"} for i in range(9)]})
    splits_for = lambda flag, rows=rows: make_task("classify", flag, rows).splits
    plain, with_test, balanced = map(splits_for, ("", "--test=test.jsonl", "--balance"))
    group_of = {row["text"]: row["group"] for row in rows}
    for splits in (plain, with_test):
        texts = [{example["text"] for example in some} for some in splits.values()]
        groups = [{group_of[text] for text in some} for some in texts]
        for sets in (texts, groups):
            assert all(sets) and sum(map(len, sets)) == len(set.union(*sets))
    assert len(plain["val"]) == pytest.approx(40, abs=20) == len(plain["test"])
    assert len(with_test["test"]) == 9 and balanced["test"] == plain["test"]
    n_rarest = sum(example["label"] == "b" for example in plain["train"])
    labels = [example["label"] for example in balanced["train"]]
    assert labels.count("a") == labels.count("b") == n_rarest  # as many as the rarest label has
    kept, kept_of_turned = (
        {example["text"] for example in splits["train"]}
        for splits in (balanced, splits_for("--balance", rows[::-1]))
    )
    assert kept == kept_of_turned  # in whatever order the file has them


def test_batches_hold_every_example_once_an_epoch_and_mostly_of_one_length():
    lengths = np.random.default_rng(0).integers(1, 100, 203)
    batch = lambda n: finetune.batch_at(n, lengths, 8, seed=1).tolist()
    epochs = [[batch(n) for n in range(e * 26, e * 26 + 26)] for e in range(2)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(203))
        assert np.mean([np.ptp(lengths[batch]) for batch in epoch]) < np.ptp(lengths) / 2
    assert epochs[1] != epochs[0] == [batch(n) for n in range(26)]
    rows = [{**row, "rejected": "a" + " the" * (i % 9)} for i, row in enumerate(preferred(60))]
    task = make_task("dpo", rows=rows)  # of a pair, the longer answer counts
    longest = [max(len(idx) for idx, _ in e["rows"]) for e in task.splits["train"]]
    assert list(task.lengths) == longest


def test_settings_that_are_not_given_depend_on_the_data_the_width_and_lora():
    save_sampler(n_embd=64)
    chosen = lambda flags="": finetune.choose_settings(make_task("instruct", flags))
    rate = lambda flags="": chosen(flags).learning_rate
    assert rate() / rate("--init_from=.") == pytest.approx((64 / 16) ** 1.5)
    assert rate("--train=lora") == 3 * rate() and rate("--learning_rate=0.5") == 0.5
    config = chosen("--max_iters=0 --eval_interval=0 --epochs=2.5 --batch_size=4")
    n = math.ceil(len(make_task("instruct").splits["train"]) / 4)
    assert config.eval_interval == n > 9 and config.max_iters == math.ceil(2.5 * n)


def test_short_texts_and_few_prompts_train_too(toy_reward):
    rows = [{"text": "ab"[i % 2] * (i // 2 + 1), "label": "ab"[i % 2]} for i in range(40)]
    run_finetune("classify", "--batch_size=1", rows)
    run_finetune("ppo", "--batch_size=3 --max_iters=2", asked(30))


def test_instruction_tuning_is_measured_and_answers_before_and_after(capsys):
    rows = [{"instruction": f"say {w} {i}", "output": "red"} for w in WORDS for i in range(8)]
    run_finetune("instruct", "--max_iters=200 --learning_rate=3e-3 --eval_interval=100", rows)
    answers = read_rows("instruct/responses.jsonl")
    assert all(line["after"] == line["output"] == "red" != line["before"] for line in answers)
    places = {r["instruction"]: prepare_data.hash_fraction(r["instruction"]) for r in rows}
    test = {instruction for instruction, place in places.items() if 0.1 <= place < 0.2}
    assert {line["messages"][0]["content"] for line in answers} == test
    out = capsys.readouterr().out
    assert re.search(r"\ninstruct/best.pt, from step \d00:\n(.*\n)*test +loss", out)
    assert f"equal to the data's output: 0 before, {len(answers)} after" in out
    assert load_checkpoint("instruct/best.pt")["turns"] == 1
    assert finetune.evenly_spaced(range(250), 100) == range(0, 250, 3)  # over all


def test_multiple_choice_picks_the_likelier_ending(capsys):
    rows = []
    for i, label in enumerate((1, 0, 0, 0)):  # the likelier one is the second, first, second, first
        endings = ["\x07 zq#", "sees a dog"][:: -1 if i % 2 else 1]
        rows.append({"ctx": f"the cat {i}", "endings": endings, "label": label})
    finetune.main(finetune_flags("choice", "", rows))
    out = capsys.readouterr().out
    assert "accuracy 0.7500" in out and "accuracy_per_byte 0.7500" in out


def test_every_kind_of_table_gives_the_same_examples():
    rows = [{"label": "a", "text": 'say "hi", ok'}, {"label": "b", "text": "c"}]
    quoted = 'a,"say ""hi"", ok"\nb,c\n'
    plain = 'a\tsay "hi", ok\nb\tc\n'
    files = {
        "a.jsonl": rows,
        "b.json": json.dumps(rows),
        "c.json": rows,
        "d.csv": f"label,text\n{quoted}",
        "e.CSV": f"\ufefflabel,text\n{quoted}",
        "f.csv": 'text;label\n"say ""hi"", ok";a\nc;b\n',
        "g.tsv": f"label\ttext\n{plain}",
        "h.tsv": f"Label\tText\n{plain}",
        "i.tsv": plain,
    }
    write_files({**files, "other.tsv": f"label\tsentence\n{plain}"})
    read = lambda name: [row for _, row in prepare_data.read_rows(name, ("label", "text"))]
    for name in files:
        assert read(name) == rows, name
    assert len(read("other.tsv")) == 2  # the first line is a header


def test_rows_that_cannot_be_used_are_skipped_counted_and_named(capsys):
    plain = "".join(f"{'ab'[i % 2]}\t{story(5, i)}\n" for i in range(60))
    write_files({"e.tsv": f"a\tfine\nb\t \na\tb\tc\n{plain}"})
    examples = make_task("classify", "--data=e.tsv").splits
    assert sum(map(len, examples.values())) == 61
    says = r"skipped 2 rows of e.tsv, the first: e.tsv, line 2: text must be text and not empty"
    assert re.search(says, capsys.readouterr().out)
    make_task(
        "classify", rows=[{"text": f"{i} {story(99)}", "label": "ab"[i % 2]} for i in range(60)]
    )
    assert "truncated to fit the context (try --block_size=" in capsys.readouterr().out


def test_conversations_come_as_texts_or_as_lists_of_messages():
    user, said = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yes"}]
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in "hi"]}]
    for row in (
        {"instruction": "hi", "response": "yes"},
        {"question": "hi", "answer": "yes"},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": parts, "completion": said},
        {"messages": user + said},
        {"conversations": shared},
    ):
        found = finetune.conversation_of({**row, "id": ["another", "list"]}, "output")
        assert found == {"messages": user, "text": "hi", "output": "yes"}
    dolly = {"instruction": "hi", "input": "", "context": "1 2", "response": "yes"}
    assert "1 2" in finetune.conversation_of(dolly, "output")["text"]
    orca = {"system": "be kind", "question": "hi", "chosen": "yes", "rejected": "no"}
    system = {"role": "system", "content": "be kind"}
    assert finetune.conversation_of(orca, "chosen")["messages"] == [system, *user]
    turns = [*user, *said, {"role": "user", "content": "and?"}]  # chosen has more than prompt
    whole = {"prompt": "hi", "chosen": turns + said, "rejected": turns + said}
    assert finetune.conversation_of(whole, "chosen", "rejected")["messages"] == turns
    for row in (
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": user, "chosen": said, "rejected": "no"},
        {"chosen": user + said, "rejected": [*user, {"role": "assistant", "content": "no"}]},
        {"messages": user + said, "chosen": "yes", "rejected": "no"},
    ):
        found = finetune.conversation_of(row, "chosen", "rejected")
        assert found == {"messages": user, "text": "hi", "chosen": "yes", "rejected": "no"}
    found = finetune.conversation_of({"messages": user + said + user + said + user}, "output")
    assert found["messages"] == user + said + user and found["output"] == "yes"
    tokenizer = build_tokenizer(load_checkpoint("base")["tokenizer"])
    for given in ({"input": "1 2"}, {}):  # Alpaca's prompt announces an input where there is one
        said = finetune.conversation_of({"instruction": "add", **given})["messages"]
        prompt = tokenizer.decode(prepare_data.chat_prompt(said, tokenizer, "alpaca"))
        assert ("### Input:\n1 2" in prompt) == ("paired with an input" in prompt) == bool(given)


USER = {"role": "user", "content": "a"}
BAD_EXAMPLES = {  # what the error must say: task, row
    "line 1: no text in column text ": ("classify", {"body": "a", "label": "b"}),
    "line 1: no text in column label": ("classify", {"text": "a", "label": None}),
    "line 1: label must be text": ("classify", {"text": "a", "label": " "}),
    "too few examples": ("classify", {"text": "a", "label": "a"}),
    "line 1: .*list": ("classify", ["a", "b"]),
    "there is no prompt": ("instruct", {"messages": [{**USER, "role": "assistant"}]}),
    "no text in column output": ("instruct", {"messages": [USER]}),
    "output must be text": ("instruct", {"instruction": "a", "output": " "}),
    "no text in column instruction or prompt": ("instruct", {"output": "a"}),
    "line 1: a message has the role robot; ": (
        "instruct",
        {"messages": [{**USER, "role": "robot"}]},
    ),
    "no text in column rejected": ("reward", {"prompt": "a", "chosen": "b"}),
    "no text in column chosen": ("dpo", {"messages": [USER, {**USER, "role": "assistant"}]}),
    "no prompt beside chosen": ("dpo", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}),
    "has the role tool; drop it": ("instruct", {"messages": [{**USER, "role": "tool"}]}),
    "a list of parts of type text": ("instruct", {"messages": [{**USER, "content": [{"a": 1}]}]}),
    "line 1: label 0, but 1 endings": ("choice", {"ctx": "a", "endings": ["b"], "label": 0}),
}


@pytest.mark.parametrize("complaint", BAD_EXAMPLES)
def test_a_bad_example_is_refused_with_its_place(complaint):
    name, row = BAD_EXAMPLES[complaint]
    with pytest.raises(ValueError, match=complaint):
        run_finetune(name, rows=[row])


def test_pretraining_and_fine_tuning_hold_out_the_same_modules_of_the_manual(monkeypatch):
    modules = [f"{letter}.m{m}" for letter in "abcdefghij" for m in range(12)]
    text = "Return {}, a thing. More.\n\n>>> print('go to {}')\nsee {}\n\nindented:\n   It.".format
    entries = [(m, f"{m}.f{i}(x)", text(*3 * [f"{m} {i}"])) for m in modules for i in range(3)]
    for script in (finetune, prepare_data):
        monkeypatch.setattr(script, "library_docstrings", lambda: entries)
    monkeypatch.setattr("pydoc_data.topics.topics", {})
    prepare_data.main(["--out=data"])
    pages = documents_in(prepare_data.open_data("data"))
    texts, answers = list(finetune.manual_texts()), list(finetune.manual_answers())
    labels = {row["text"]: row["label"] for _, row in texts}
    assert labels["print('go to a.m0 0')"] == "code"
    assert labels["Return a.m0 0, a thing. More."] == "prose"
    assert len(labels) == len(texts) == 2 * len(entries) and len(answers) == len(entries)
    for module, row in texts + answers:
        assert row["group"] == module
        (split,) = {split for split in pages if f"# {module}.f" in "\n".join(pages[split])}
        is_held_out = finetune.split_of(module, finetune.FinetuneConfig()) != "train"
        assert is_held_out == (split == "val")
    for _, row in answers:
        assert row["output"] == row["chosen"] != row["rejected"]
        assert row["output"].startswith("Return ") and row["output"].endswith("thing.")


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_pretraining_on_examples_holds_out_what_fine_tuning_measures(kind):
    rows = [
        {"label": "ab"[i % 2], "text": f"{story(9, i)} ", "group": f"g{i // 4}"} for i in range(400)
    ]
    if kind == "tsv":  # no header, and no groups
        write_files({"e.tsv": "".join(f"{row['label']}\t{row['text']}\n" for row in rows)})
    else:
        lines = [",".join(rows[0]), *('"' + '","'.join(row.values()) + '"' for row in rows), ""]
        write_files({"e.jsonl": rows, "e.csv": "\n".join(lines)})
    prepare_data.main([f"e.{kind}", "--out=data", "--held_out=0.2", "--vocab_size=270"])
    pages = documents_in(prepare_data.open_data("data"))
    splits = make_task("classify", f"--data=e.{kind}").splits
    texts = {split: {e["text"] for e in examples} for split, examples in splits.items()}
    assert set(pages["val"]) == texts["val"] | texts["test"]
    assert set(pages["train"]) == texts["train"] and all(map(len, texts.values()))


def test_objectives_copied_alone_are_their_equations():
    alone = lambda name: getattr(copied(finetune, name), name)
    chosen, rejected, ref_chosen, ref_rejected = (-torch.rand(4, 50) * 9).double()
    losses, margins = alone("dpo_loss")(chosen, rejected, ref_chosen, ref_rejected, beta=3)
    ratio = (chosen - ref_chosen) - (rejected - ref_rejected)
    assert_close([losses, margins], [-(1 / (1 + (-3 * ratio).exp())).log(), 3 * ratio])
    losses = alone("reward_loss")(chosen, rejected)
    assert_close(losses, -(chosen.exp() / (chosen.exp() + rejected.exp())).log())
    # the clipped loss gains nothing beyond its bounds
    new = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    losses, clipped = alone("clipped_loss")(new, torch.zeros(5), advantages)
    assert_close(losses, -torch.tensor([1.2, -0.8, -1.5, 0.5, 1.1]))
    assert clipped.tolist() == [True] * 4 + [False]
    losses.sum().backward()
    assert (new.grad == 0).tolist() == [True, True, False, False, False]
    # the estimate of the KL is never negative, and its mean is the KL
    (p, q), kl_estimate = torch.rand(2, 5).softmax(-1).double(), alone("kl_estimate")
    estimates = kl_estimate(p.log(), q.log())
    assert (estimates >= 0).all() and not kl_estimate(p.log(), p.log()).any()
    assert_close((p * estimates).sum(), F.kl_div(q.log(), p, reduction="sum"))


@pytest.mark.parametrize("weights", ["all", "lora"])
def test_dpo_begins_at_ln_2_and_learns_which_answer_is_better(weights, capsys):
    run_finetune("dpo", f"--train={weights} --max_iters=60 --log_interval=1", preferred(120))
    assert column("dpo", "train_loss")[0] == pytest.approx(math.log(2))
    assert "val_accuracy 0.5000" in capsys.readouterr().out  # all margins are 0
    assert column("dpo", "val_loss")[-1] < math.log(2)
    assert column("dpo", "val_margin")[-1] > 0 and column("dpo", "val_accuracy")[-1] > 0.5


def test_a_reward_model_prefers_and_its_scores_are_standardized_and_what_ppo_reads(capsys):
    run_finetune("reward", "--max_iters=100 --learning_rate=3e-3", preferred(120))
    assert column("reward", "val_accuracy")[-1] > 0.8
    task = make_task("reward", "--init_from=reward", preferred(120))
    scores = torch.cat(task.in_batches(task.splits["train"], task.scores_of))
    assert (scores.mean().item(), scores.std().item()) == pytest.approx((0, 1), abs=1e-4)
    answers, examples = ["a", "the red dog"], 2 * [{"messages": []}]
    together = task.score(examples, answers)  # padding changes nothing
    assert_close(make_task("ppo", "--reward=reward").reward(examples, answers), together)
    for text, score in zip(answers, together.tolist()):
        capsys.readouterr()
        use = finetune_flags("reward", "--init_from=reward", None)
        finetune.main([*use, f"--predict={text}"])
        assert float(capsys.readouterr().out) == pytest.approx(score, abs=1e-3)


def test_advantages_are_their_definition():
    rewards, values = torch.randn(2, 3, 9).double()
    spans, answered = [(2, 9), (0, 4), (5, 6)], torch.zeros(3, 9, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        answered[row, start:end] = True
    gae = copied(finetune, "gae").gae
    found = gae(rewards * answered, values, answered, gamma=0.9, lam=0.8)
    assert not found[~answered].any()
    for row, (start, end) in enumerate(spans):
        following = F.pad(values[row, start + 1 : end], (0, 1))
        deltas = rewards[row, start:end] + 0.9 * following - values[row, start:end]
        for t in range(end - start):
            decay = (0.9 * 0.8) ** torch.arange(end - start - t)
            assert_close(found[row, start + t], (decay * deltas[t:]).sum())


def test_a_model_that_was_not_taught_to_score_scores_no_answers():
    with pytest.raises(ValueError, match="base has no head for --task=reward"):
        make_task("ppo", "--reward=base")


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_first_update_of_a_policy_is_on_policy(name, toy_reward, monkeypatch):
    task, rollouts = make_task(name), []
    rollout = task.rollout
    monkeypatch.setattr(task, "rollout", lambda some: rollouts.append(rollout(some)) or rollouts[0])
    updates = task.updates(0)
    assert len(updates) == 16 and all(len(batches) == 1 for batches in updates)
    (batch,), (sampled,) = updates[0], rollouts
    assert torch.equal(sampled["log_probs"], sampled["reference"])
    assert torch.isfinite(task.loss(batch)) and task.measured["clipped"] == [0]
    idx, targets = batch["idx"], batch["targets"]
    answered = targets != -100
    by_hand = task.gpt(idx).log_softmax(-1)[answered].gather(1, targets[answered][:, None])
    assert_close(batch["log_probs"][answered], by_hand[:, 0], atol=1e-5, rtol=0)
    both = answered[:, :-1] & answered[:, 1:]  # a target is the token that is read next
    assert torch.equal(targets[:, :-1][both], idx[:, 1:][both])
    # each pass goes through all answers once
    n_targets = int((sampled["targets"] != -100).sum())
    counts = [task.count(batch) for (batch,) in updates]
    assert [sum(counts[i : i + 4]) for i in (0, 4, 8, 12)] == [n_targets] * 4


def test_ppo_rewards_the_last_token_with_the_score_and_each_with_its_drift(toy_reward):
    task = make_task("ppo", "--beta=0.5")
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    log_probs, reference = torch.rand(2, 2, 4) * mask
    scores, values = torch.tensor([3.0, -2.0]), torch.randn(2, 4)
    rollout = {"log_probs": log_probs, "reference": reference, "scores": scores, "values": values}
    rewards, values = 0.5 * (reference - log_probs), values * mask
    rewards[[0, 1], [2, 3]] += scores
    credit = task.credit({"targets": torch.where(mask, 1, -100), **rollout})
    expected = finetune.gae(rewards, values, mask)
    assert_close(credit["returns"], expected + values)
    mean, std = expected[mask].mean(), expected[mask].std(correction=0)
    # whitened over the answers alone
    assert_close(credit["advantages"], (expected - mean) / std * mask)


def test_a_critic_takes_a_tenth_of_a_squared_error_and_an_unended_answer_scores_one_less(
    toy_reward, monkeypatch
):
    task = make_task("ppo")
    batch = task.updates(0)[0][0] | {"advantages": torch.zeros(1)}
    errors = (batch["values"] - batch["returns"])[batch["targets"] != -100]
    assert_close(task.loss(batch), 0.1 * errors.square().sum() / 2)
    word = task.tokenizer.encode_ordinary("red")
    answers = lambda *args, **how: [word, [*word, task.end]]
    monkeypatch.setattr(finetune, "sample_answers", answers)
    sampled = task.rollout(task.splits["train"][:2])
    assert sampled["ended"].tolist() == [False, True]
    assert sampled["scores"].diff().item() == pytest.approx(1)


def test_prompts_of_all_lengths_are_answered_as_if_each_were_alone():
    task = make_task("instruct", "--max_new_tokens=9")
    said = [task.tokenizer.encode(story(n))[:6] + [task.end, n] for n in (1, 2, 3)]
    prompts = [said[0][:n] for n in (1, 3, 5)] + said
    answers = finetune.sample_answers(task, prompts, temperature=0)
    for prompt, answer in zip(prompts, answers):
        idx, limit = torch.tensor([prompt]), min(9, 16 - len(prompt))
        alone = task.gpt.generate(idx, limit, temperature=0, stop_token=task.end)
        assert answer[:limit] == [token.item() for token in alone]
    assert len({len(answer) for answer in answers}) > 1 or len(answers[0]) == 9


def test_grpo_compares_the_answers_to_one_prompt(toy_reward):
    scores = torch.tensor([1.0, 2, 3, 4, 7, 7, 7, 7])
    advantages = copied(finetune, "group_advantages").group_advantages(scores, 4)
    assert_close(advantages[:4], (scores[:4] - 2.5) / scores[:4].std(), atol=1e-3, rtol=0)
    assert not advantages[4:].any()  # equal scores teach nothing
    task, targets = make_task("grpo", "--group_size=4"), torch.ones(8, 3, dtype=torch.int64)
    targets[0, 0] = -100
    credit = task.credit({"scores": scores, "targets": targets})["advantages"]
    assert_close(credit, advantages[:, None] * (targets != -100))
    # the penalty is 0 at the reference and positive elsewhere, on either side
    idx, targets, _ = task.collate([{"rows": [([1, 2, 3], [2, 3, -100])]}])
    own = finetune.token_log_probs(task.gpt, idx, targets)[0].detach()
    batch = {"idx": idx, "targets": targets, "log_probs": own, "advantages": 0 * own}
    for drift in (-0.5, 0.0, 0.5):
        loss = task.loss({**batch, "reference": own - drift})
        expected = math.exp(-drift) + drift - 1
        assert task.measured["kl_loss"][-1].item() == pytest.approx(expected, abs=1e-5)
        assert loss.item() == pytest.approx(2 * 0.1 * expected, abs=1e-5)


def test_a_program_scores_answers_and_its_mistakes_are_shown(capsys):
    write_files({"r.py": "import math\n\ndef reward(example, answer):\n    return WANTED"})
    program = pathlib.Path("r.py").read_text()
    rewrite = lambda wanted: pathlib.Path("r.py").write_text(program.replace("WANTED", wanted))
    rows = [{"prompt": f"say {i}", "best": "e", "id": i} for i in range(80)]
    flags = "--reward=r.py --beta=0 --max_iters=40 --batch_size=4 --learning_rate=5e-3"
    rewrite("answer.count(example['best']) / math.hypot(len(answer), 1)")
    run_finetune("grpo", flags, rows)
    scores = column("grpo", "score")
    assert sum(scores[-5:]) > sum(scores[:5]) + 1
    task = make_task("grpo", "--reward=r.py --beta=0", rows)
    rollout = task.rollout(task.splits["train"][:3])
    assert task.reference is None and not rollout["kl"].any()
    for wanted, says in {"example['none']": "failed", "math.nan": "nan", "None": "failed"}.items():
        rewrite(wanted)
        with pytest.raises(ValueError, match=f"r.py: reward.*{says}.*'best': 'e'"):
            make_task("grpo", "--reward=r.py", rows).measure("val")
        assert ('r.py", line 4, in reward' in capsys.readouterr().err) == (wanted[0] == "e")
    with pytest.raises(ValueError, match="reward differs"):
        finetune.main(["--task=grpo", "--init_from=resume", "--out_dir=grpo", "--max_iters=41"])


@pytest.mark.parametrize("name, batch_size", [("ppo", 16), ("grpo", 4)])
def test_policies_find_the_reward(name, batch_size, toy_reward):
    flags = f"--beta=0.01 --max_iters=40 --batch_size={batch_size} --eval_interval=20"
    run_finetune(name, f"{flags} --log_interval=1 --learning_rate=5e-3", asked(80))
    scores = column(name, "score")
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.2
    costs = 0.01 * np.array(column(name, "val_kl")) - column(name, "val_score")
    assert column(name, "val_loss") == pytest.approx(costs)
    assert any(row["before"] != row["after"] for row in read_rows(f"{name}/responses.jsonl"))


# --- flags, errors, accidents ---------------------------------------------------------------------


CONFIGS = [prepare_data.PrepareConfig, train.TrainConfig, finetune.FinetuneConfig]


@pytest.mark.parametrize("config_class", [*CONFIGS, sample.SampleConfig])
def test_every_setting_is_a_flag_that_its_comment_explains(config_class):
    parser = prepare_data.flag_parser(config_class(), "")
    text = parser.format_help()
    for name, default in vars(config_class()).items():
        assert re.search(rf"--{name} [^-]*[a-z]{{3}}", text)
        kind = type(default)
        forms = {"": True, "=True": True, "=False": False} if kind is bool else {"=1": kind(1)}
        for form, value in forms.items():
            (parsed,) = vars(parser.parse_args([f"--{name}{form}"])).values()
            assert parsed == value and type(parsed) is kind
    assert vars(parser.parse_args([])) == {}


def test_help_shows_the_defaults_of_the_task(capsys):
    for form, value in {"--task=grpo": "8", "--task ppo": "1"}.items():
        with pytest.raises(SystemExit) as stopped:
            finetune.main(f"{form} --help".split())
        found = re.search(r"--group_size [^-]*\(default:\s+(\d+)\)", capsys.readouterr().out)
        assert stopped.value.code == 0 and found[1] == value
    for task, values in finetune.TASK_DEFAULTS.items():
        config, _ = finetune.read_flags([f"--task={task}"])
        assert vars(config).items() >= values.items() and config.out_dir == f"out/{task}"
        assert finetune.read_flags([f"--task={task}", "--batch_size=3"])[0].batch_size == 3


ALONE = """
import sys
sys.modules["numpy"] = None
import torch
from alone import GPT, GPTConfig
model = GPT(GPTConfig(8, 20, n_layer=1, n_head=2, n_embd=8, dropout=0.1))
idx = torch.randint(20, (4, 8))
model(idx, idx).backward()
model.eval().save_pretrained(".")
assert torch.equal(GPT.from_pretrained(".")(idx), model(idx))
assert len(list(model.generate(idx, 9, top_k=5, top_p=0.9))) == 9
"""


def test_the_model_alone_needs_nothing_but_torch():
    shutil.copy(gpt.__file__, "alone.py")
    write_files({"run.py": ALONE})
    assert start("run.py").wait(60) == 0


LARGE = "9" * 400
IMPOSSIBLE = [  # script, what the error must say, flags of one run or more
    (prepare_data, "not enough text", "blank.txt"),
    (prepare_data, "binary.txt.*utf-8", "binary.txt"),
    (prepare_data, "latin.txt.*position 3.*iconv", "latin.txt"),
    (prepare_data, "broken.json.*line 2", "broken.json"),
    (prepare_data, "field.jsonl, line 1.* column text .*body", "field.jsonl"),
    (prepare_data, "list.json, item 1: a int", "list.json"),
    (prepare_data, "FLAG: no (such file|files)", "gone.txt", "empty", "pipe"),
    (prepare_data, "gpt9.*gpt2", "other.txt --tokenizer=gpt9"),
    (prepare_data, "TIKTOKEN_CACHE_DIR.*--tokenizer=bpe", "other.txt --tokenizer=r50k_base"),
    (prepare_data, "meta.json", "--out=object", "--out=list", "--out=words"),
    (prepare_data, "another run", "other.txt --out=locked"),
    (prepare_data, "FLAG=100: must be 256 or more", "--vocab_size=100"),
    (prepare_data, "FLAG=0: must be 1 or more", "--bpe_sample_mb=0"),
    (prepare_data, "FLAG=1.0: must be below 1", "--held_out=1"),
    (train, "another run", "--out_dir=locked"),
    (train, "", f"--seed={LARGE}", f"--max_iters={LARGE}", "--n_embd=10000000"),
    (train, "argument FLAG: invalid", "--compile=", "--n_layer=two", "--learning_rate=nan"),
    (train, "argument FLAG: ", "--batch_size=-1", "--seed"),
    (train, "FLAG=0: must be 1 or more", "--batch_size=0", "--eval_interval=0", "--eval_iters=0"),
    (train, "must be 1 or more", "--n_layer=0", "--n_head=0", f"--n_embd={2**63}"),
    (train, "n_head must divide", "--n_embd=10 --n_head=3"),
    (train, "dropout must be", "--dropout=20", "--attn_dropout=1"),
    (train, "not enough text", "--block_size=100000"),
    (train, "abacus|int3.*float32", "--device=abacus", "--dtype=int3"),
    (train, "(nowhere|last.pt): no such checkpoint", "--init_from=nowhere", "--init_from=resume"),
    (train, "nowhere.*prepare_data.py", "--data=nowhere"),
    (train, "shard is damaged", "--data=wild"),
    (train, "the shards are not what meta.json says", "--data=mixed"),
    (train, "n_layer=1, not --n_layer=7", "--out_dir=base --init_from=resume --n_layer=7"),
    (train, "block_size=16", "--out_dir=base --init_from=resume --block_size=8"),
    (train, "was trained on", "--out_dir=base --init_from=resume --data=same"),
    (train, "n_head=2", "--init_from=base --n_head=4"),
    (train, "different tokenizers", "--init_from=base --data=other"),
    (finetune, "FLAG=swim.*classify", "--task=swim"),
    (finetune, "FLAG=some.*(lora|alpaca)", "--train=some", "--template=some"),
    (finetune, "FLAG=0: must be 1 or more", "--batch_size=0", "--max_new_tokens=0"),
    (finetune, "FLAG=0: must be 1 or more", "--group_size=0", "--lora_rank=0"),
    (finetune, "--train=head", "--task=instruct --train=head"),
    (finetune, "the label 'bird'", "--val=bird.jsonl"),
    (finetune, "at least two labels", "--data=one_label.jsonl"),
    (finetune, "base has no head for --task=classify: train one", "--predict=a"),
    (finetune, "--predict is empty", "--predict="),
    (finetune, "begun by another script", "--out_dir=base --init_from=resume"),
    (finetune, "headless.csv: no column label or text in a, b; no header", "--data=headless.csv"),
    (finetune, "--predict is for --task=classify", "--task=instruct --predict=a"),
    (finetune, "none.csv", "--data=none.csv"),
    (finetune, "give a .jsonl, .json, .csv or .tsv file", "--data=none.txt"),
    (finetune, "no such checkpoint", "--init_from=resume"),
    (finetune, "--data=FILE", "--task=choice --data="),
    (finetune, "would overwrite base", "--out_dir=base"),
    (finetune, "no text in column body", "--text_field=body"),
    (sample, "gone.txt", "--start=FILE:gone.txt"),
    (sample, "--start is empty", "--surprise"),
    (sample, "must be 1 or more", "--num_samples=0"),
    (sample, "--top_p=2.0: must be from 0 to 1", "--top_p=2"),
    (sample, "latin.txt.*iconv", "--start=FILE:latin.txt"),
    (sample, "abacus|int3.*float32", "--device=abacus", "--dtype=int3"),
    (sample, "temperature", "--temperature=1e-320"),
]
if os.name != "posix":  # there are no locks
    IMPOSSIBLE = [row for row in IMPOSSIBLE if row[1] != "another run"]
IMPOSSIBLE = [(script, line, flags) for script, line, *runs in IMPOSSIBLE for flags in runs]
ALWAYS = {  # the flags of every run, before its own
    prepare_data: "--out=prepared",
    train: "--data=prepared --out_dir=out --block_size=16",
    finetune: f"--task=classify --init_from=base --data=cats.jsonl --out_dir=out {FEW}",
    sample: "--init_from=base",
}


@pytest.mark.parametrize("script, says, flags", IMPOSSIBLE)
def test_the_impossible_is_refused_and_changes_no_file(script, says, flags, capsys, monkeypatch):
    files = lambda: {path: path.read_bytes() for path in pathlib.Path().rglob("[!.]*.*")}
    shutil.copytree(pathlib.Path("base").resolve().parent, "copy")
    monkeypatch.chdir("copy")
    if hasattr(os, "mkfifo"):  # elsewhere, there is no such file either
        os.mkfifo("pipe")
    monkeypatch.setattr("requests.get", lambda url: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    before = files()
    with prepare_data.lock("locked"), pytest.raises(SystemExit) as stopped:
        prepare_data.script(lambda: script.main(f"{ALWAYS[script]} {flags}".split()))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(says.replace("FLAG", flags.partition("=")[0]), line)
    assert re.search(r" error: argument | \(\w+\.py:\d+\)$", line)
    assert files() == before


def test_scripts_end_bad_input_with_code_2_and_show_the_traceback_to_developers():
    commands = ["-m train --data=nowhere", "-m prepare_data --nowhere=3"]
    commands.append("-X dev -m prepare_data nowhere")
    processes = [start(command, stderr=subprocess.PIPE) for command in commands]
    *errors, traceback = [process.communicate(timeout=60)[1] for process in processes]
    for process, error in zip(processes, errors):
        (line,) = error.splitlines()
        assert "nowhere" in line and process.returncode == 2
    assert re.search("(?s)Traceback.*Error: nowhere", traceback)


@on_posix
def test_sample_runs_with_closed_streams_and_a_reader_that_leaves():
    command = "-m sample --init_from=base --max_new_tokens=3000 --temperature=2 --top_k=0"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    in_shell = functools.partial(subprocess.Popen, shell=True, text=True, **streams)
    without_outputs = in_shell(f"'{sys.executable}' {command} --max_new_tokens=9 >&- 2>&-")
    without_input = in_shell(f"'{sys.executable}' {command} --chat <&-")
    left = start(command, **streams)
    left.stdout.read(1)
    left.stdout.close()
    assert left.stderr.read() == "" and left.wait() == 141
    assert without_outputs.wait() == 0
    assert len(without_input.communicate()[1].splitlines()) == 1 and without_input.returncode == 2


def test_the_line_ends_with_the_place_where_reading_failed(capsys):
    write_files({"data/meta.json": "[]"})
    with pytest.raises(SystemExit):
        prepare_data.script(lambda: prepare_data.open_data("data"))
    place = re.search(r"TypeError.* \(prepare_data.py:(\d+)\)$", capsys.readouterr().err)
    assert 'meta["format"]' in linecache.getline(prepare_data.__file__, int(place[1]))
    error = ValueError("bad")
    error.__cause__ = OSError()  # which a library caught, so that none of our lines is in it
    with pytest.raises(SystemExit):
        prepare_data.script(lambda: fail(error))
    assert re.search(r": bad \(test_gpt.py:\d+\)$", capsys.readouterr().err)


MISTAKES = [KeyError, IndexError, TypeError, AttributeError, AssertionError, NotImplementedError]
ACCIDENTS = [ValueError, MemoryError, OverflowError, OSError, torch.OutOfMemoryError]


@pytest.mark.parametrize("kind", [*MISTAKES, RuntimeError, *ACCIDENTS])
def test_a_mistake_in_the_code_keeps_its_traceback(kind):
    with pytest.raises(SystemExit if kind in ACCIDENTS else kind):
        prepare_data.script(lambda: fail(kind("out of memory" if kind in ACCIDENTS else "")))


def test_notebooks_and_file_systems_without_locks_do_no_harm(monkeypatch):
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=len, flush=int))
    monkeypatch.setattr("fcntl.flock", lambda *_: fail(OSError(38, "ENOSYS")))
    prepare_data.script(prepare_data.lock("folder").close)


def test_a_checkpoint_runs_no_code_and_replaces_only_another_and_only_whole(monkeypatch):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, ("ran",))

    def full(checkpoint, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 64 vs 4")

    for checkpoint, complaint in {(1, "good"): "format 1", (2, Evil()): "a.pt: damaged"}.items():
        torch.save(dict(zip(("format", "model"), checkpoint)), "a.pt")
        with pytest.raises(ValueError, match=complaint):
            load_checkpoint("a.pt")
    assert not os.path.exists("ran")
    write_files({"thesis": "mine"})
    os.makedirs("out")
    os.symlink("../thesis", "out/a.pt.tmp")
    gpt.save_checkpoint("out/a.pt", {"model": 1})
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        gpt.save_checkpoint("out/a.pt", {"model": 2})
    assert load_checkpoint("out/a.pt")["model"] == 1 and os.listdir("out") == ["a.pt"]
    assert pathlib.Path("thesis").read_text() == "mine"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run_before_it_is_saved(what, monkeypatch):
    shutil.copytree("base", "out")
    before = pathlib.Path("out/last.pt").read_bytes()
    # the root of 0 has an infinite slope
    broken = {"loss": lambda loss: loss * math.nan, "gradient": lambda loss: (loss * 0).sqrt()}
    watch(monkeypatch, lambda n, idx, loss: broken[what](loss) if n == 5 else None)
    with pytest.raises(ValueError, match="stopped at step 25"):
        resume("out", "--max_iters=25")
    assert pathlib.Path("out/last.pt").read_bytes() == before


def mutate(data, rng):
    """Bytes cut off, put in, taken out or changed, somewhere; or numbers made negative."""
    i, n = rng.randrange(len(data)), rng.randrange(1, 50)
    flipped = bytes([data[i] ^ 1 << rng.randrange(8)])
    changed = [b"", rng.randbytes(n) + data[i:], data[i + n :], flipped + data[i + 1 :]]
    if rng.random() < 0.8:
        return data[:i] + rng.choice(changed)
    return re.sub(rb"\d+", lambda m: rng.choice([m[0]] * 9 + [b"-7"]), data[:2000]) + data[2000:]


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "meta.json", "train_00000.npy"])
def test_damaged_files_give_an_error_or_a_working_run(name):
    for folder in ("base", "prepared"):
        shutil.copytree(folder, "all", dirs_exist_ok=True)
    whole, refused = pathlib.Path("all", name).read_bytes(), 0
    for seed in range(30):
        write_files({f"all/{name}": mutate(whole, random.Random(seed))})
        try:
            if name == "best.pt":
                sample.main(["--init_from=all", "--max_new_tokens=3"])
            elif name == "last.pt":
                resume("all", "--max_iters=21")
            else:
                run_training("other", "--data=all --max_iters=1")
        except (ValueError, OSError):
            refused += 1
    assert refused


@pytest.mark.parametrize("module", [gpt, prepare_data, train, finetune, sample])
def test_examples_in_docstrings_are_true(module):
    assert doctest.testmod(module).failed == 0
