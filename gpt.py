"""A complete GPT in one file that needs only PyTorch.

    model = GPT(GPTConfig(block_size=128, vocab_size=1024, n_layer=4, n_head=4, n_embd=128))
    logits = model(idx)                          # idx (B, T) token ids -> (B, T, vocab_size)
    loss = model(idx, targets)                   # mean cross-entropy, nats per token
    for token in model.generate(idx, 100): ...   # (B,) token ids, one step at a time
    model = GPT.from_pretrained("gpt2")          # with the weights that OpenAI published

The architecture is GPT-2's (Radford et al. 2019): a decoder-only transformer (Vaswani et al. 2017,
"Attention Is All You Need") with LayerNorm before each branch, learned positions and tanh GELU.
Parameter names match Hugging Face's GPT-2. Shapes in comments: B sequences in a batch,
T tokens in each, C = n_embd.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import sys
from dataclasses import asdict, dataclass, replace
from timeit import timeit

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M. Raises ValueError on impossible sizes."""

    block_size: int = 1024  # context length: tokens the model sees at once
    vocab_size: int = 50257  # how many different tokens there are
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # embedding size: numbers per token
    dropout: float = 0.0  # on embeddings and on what each block adds to them
    bias: bool = True  # in Linear and LayerNorm
    tie_weights: bool = True  # lm_head is the token embedding
    attn_dropout: float = 0.0  # on attention weights

    def __post_init__(self):
        sizes = (self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd)
        are_possible = all(isinstance(size, int) and 0 < size < 2**31 for size in sizes)
        if not are_possible or self.n_embd % self.n_head:
            raise ValueError(f"sizes must be 1 or more, and n_head must divide n_embd: {self}")
        if not all(0 <= rate < 1 for rate in (self.dropout, self.attn_dropout)):
            raise ValueError(f"dropout must be at least 0 and less than 1: {self}")


# --- attention ------------------------------------------------------------------------------------


def attention_weights(q, k):
    """softmax(Q Kᵀ / √d + M): how much each query attends to each key (Vaswani et al. 2017).

    q (B, n_head, T, d) holds the queries of the last T of S positions, k (B, n_head, S, d) the keys
    of all S. Returns (B, n_head, T, S); rows sum to 1. M is -inf where a key comes after its query.
    """
    T, S = q.size(-2), k.size(-2)
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, n_head, T, S)
    scores += q.new_full((T, S), -math.inf).triu(S - T + 1)  # 0 where the key is not later
    return F.softmax(scores, dim=-1)


def attention(q, k, v, dropout=0.0):
    """softmax(Q Kᵀ / √d + M) V: the mean of the values, weighted by attention_weights. Returns
    (B, n_head, T, d) in the type of q; k and v can come from a cache of another type."""
    T, S, dtype = q.size(-2), k.size(-2), q.dtype
    q = q.to(k.dtype)
    # in bfloat16 on a CPU, up to 512 tokens, the formula is 1.5 to 4 times as fast as the kernel
    kernel_is_slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and S <= 512
    # on MPS, the kernel of PyTorch 2.8 to 2.11 misreads q: github.com/pytorch/pytorch/issues/181133
    if kernel_is_slow or q.device.type == "mps":
        y = F.dropout(attention_weights(q, k), dropout) @ v
    elif T == S:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    else:  # is_causal would take q for the first T positions
        # a single query sees all keys
        mask = None if T == 1 else q.new_ones(T, S, dtype=torch.bool).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    return y.to(dtype)


def remember(cache, start, k, v):
    """Adds keys and values, of the positions from start on, to a block's cache (2, B, n_head,
    capacity, d). Returns those of all positions so far; without a cache, these are k and v."""
    if cache is None:
        return k, v
    end = start + k.size(-2)
    cache[0, :, :, start:end] = k
    cache[1, :, :, start:end] = v
    return cache[:, :, :, :end]


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: see attention()."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout, self.attn_dropout = config.dropout, config.attn_dropout

    def heads(self, x):
        """x (B, T, C) -> queries, keys and values, each (B, n_head, T, C / n_head)."""
        B, T, C = x.shape
        return self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)

    def forward(self, x, cache=None, start=0):
        q, k, v = self.heads(x)
        k, v = remember(cache, start, k, v)
        y = attention(q, k, v, self.attn_dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C): the heads concatenated
        return fast_dropout(self.c_proj(y), self.dropout, self.training)


# --- the transformer ------------------------------------------------------------------------------


class MLP(nn.Module):
    """At each position independently: widens to 4C, applies GELU, projects back to C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return fast_dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP; each reads the residual stream through a LayerNorm and adds to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids in, logits of the next token at each position out: see the top of this file."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # skips nn.Embedding's own initialization, which is slow and would be overwritten
        tables = (torch.empty(n, config.n_embd) for n in (config.vocab_size, config.block_size))
        wte, wpe = (nn.Embedding.from_pretrained(table, freeze=False) for table in tables)
        blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict({"wte": wte, "wpe": wpe, "h": blocks, "ln_f": ln_f})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:  # where from_checkpoint puts weights instead
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialization (Radford et al. 2018, section 4.1; 2019, section 2.3; OpenAI's
        code has 0.01 for wpe).

        A tied wte is also the output head and must be small, or the first logits would be large.
        An untied model starts differently, by our own choice: tokens from N(0, 1), so that the
        first updates are small beside them; positions as sinusoids, so that near and far differ;
        the head at zero, so that the first loss is ln(vocab_size).
        """
        n_layer, tied = self.config.n_layer, self.config.tie_weights
        for name, parameter in self.named_parameters():
            match name.split(".")[-2:]:  # like ["c_fc", "weight"]; the first match wins
                case ["wte", _]:
                    parameter.normal_(std=0.02 if tied else 1)
                case ["wpe", _] if not tied:
                    parameter.copy_(sinusoids(*parameter.shape))
                case ["c_attn" | "c_fc" | "wpe", "weight"]:
                    parameter.normal_(std=0.02)
                case ["c_proj", "weight"]:
                    parameter.normal_(std=0.02 / math.sqrt(2 * n_layer))
                case ["lm_head", _] | [_, "bias"]:
                    parameter.zero_()
                case ["ln_1" | "ln_2" | "ln_f", "weight"]:
                    parameter.fill_(1)
                case _:
                    raise AssertionError(f"no initialization for {name}")

    def tie_weights(self):
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def hidden(self, idx, cache=None, start=0):
        """idx (B, T) int64 -> (B, T, C) after the last LayerNorm: the input of lm_head or any head.

        cache, from new_cache(), holds the keys and values of the start tokens that precede idx;
        those of idx are added to it. Raises ValueError if the total exceeds block_size.
        """
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size {self.config.block_size}")
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        pos_emb = self.transformer.wpe.weight[start:end]  # (T, C)
        x = fast_dropout(tok_emb + pos_emb, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[i], start)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, vocab_size); with targets (B, T) -> the mean loss in nats
        over the targets that are not -100 (nan if there are none)."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        losses = cross_entropy(self.lm_head(x.flatten(0, 1)), targets.flatten())
        return losses.sum() / (targets != -100).sum()

    def generate(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        stop_token=None,
        generator=None,
    ):
        """At each step, yields the next token of each sequence in idx (B, T), as (B,) int64.

        Call eval() first. sample() describes how tokens are drawn. A sequence that has produced
        stop_token keeps yielding it; the iterator ends when all have stopped. When the text no
        longer fits the context, only the last half of it is kept and read again, as if the text
        began there.
        """
        block_size = self.config.block_size
        context = idx[:, -block_size:]  # what the model sees, from position 0 on
        capacity = min(block_size, context.size(1) + max_new_tokens)
        cache, start = self.new_cache(len(idx), capacity), 0  # start: tokens in the cache so far
        stopped = torch.zeros_like(idx[:, 0], dtype=torch.bool)  # (B,)
        for _ in range(max_new_tokens):
            if start == block_size:
                context, start = context[:, -max(1, block_size // 2) :], 0
            with torch.inference_mode():
                x = self.hidden(context[:, start:], cache, start)  # reads only what is new
                logits = self.lm_head(x[:, -1])  # (B, vocab_size)
                token = sample(logits, temperature, top_k, top_p, generator)
            start = context.size(1)
            token = token.clone()  # outside of inference_mode: a tensor that autograd accepts
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped = token == stop_token
            yield token
            if stop_token is not None and stopped.all():
                return
            context = torch.cat([context, token[:, None]], dim=1)

    def new_cache(self, batch_size, capacity):
        """Memory for the keys and values of each block for up to capacity tokens, so that each new
        token needs only a short forward pass: (n_layer, 2, B, n_head, capacity, d)."""
        config, weight = self.config, self.lm_head.weight
        d = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, capacity, d)
        # on CPUs, the attention of a single query is 3 to 6 times as fast in float32
        on_cpu = weight.device.type == "cpu"
        return weight.new_empty(shape, dtype=torch.float32 if on_cpu else weight.dtype)

    def num_params(self):
        """The number of parameters without wpe, as in nanoGPT; shared ones count once."""
        return sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name)

    @torch.no_grad()
    def resize(self, vocab_size=None, block_size=None):
        """Crops the vocabulary or the context, or adds rows from N(0, 0.02), to be trained. This
        replaces parameters, so create the optimizer afterward."""
        vocab_size = vocab_size or self.config.vocab_size
        block_size = block_size or self.config.block_size
        self.config = replace(self.config, vocab_size=vocab_size, block_size=block_size)
        tables = ((self.transformer.wte, vocab_size), (self.lm_head, vocab_size))
        for module, rows in (*tables, (self.transformer.wpe, block_size)):
            old = module.weight
            if rows != len(old):
                new = old.new_empty(rows, old.size(1)).normal_(std=0.02)
                new[: len(old)] = old[:rows]
                module.weight = nn.Parameter(new, old.requires_grad)
        self.tie_weights()

    def checkpoint(self):
        """What from_checkpoint needs to rebuild the model: {"config", "model"}."""
        return {"config": asdict(self.config), "model": self.state_dict()}

    @classmethod
    def from_checkpoint(cls, checkpoint, **dropout):
        """Builds the model from what load_checkpoint returned, in float32 and eval mode; dropout
        and attn_dropout can be replaced. Float32 weights are shared, not copied. A damaged
        checkpoint can raise any exception."""
        config, weights = {**checkpoint["config"], **dropout}, checkpoint["model"]
        if config["n_layer"] > len(weights):  # building a million layers would take minutes
            raise ValueError("it has fewer weights than layers")
        # AdamW would write past the end of a tensor that repeats its memory
        for weight in weights.values():
            if weight.layout != torch.strided or weight.is_meta or not weight.is_contiguous():
                raise ValueError("the weights are not plain (contiguous) tensors")
        with torch.device("meta"):  # shapes alone: no memory, no random numbers
            model = cls(GPTConfig(**config))
        model.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
        model.tie_weights()
        return model.eval()

    @classmethod
    def from_pretrained(cls, name_or_path):
        """Loads the model that load_checkpoint(name_or_path) finds, in eval mode."""
        checkpoint = load_checkpoint(name_or_path)
        with damaged(name_or_path):
            return cls.from_checkpoint(checkpoint)

    def save_pretrained(self, folder, eos_token_id=None):
        """Writes the model as Hugging Face's GPT-2; eos_token_id is the token that ends a text."""
        save_huggingface(pathlib.Path(folder), self, eos_token_id)


def sinusoids(length, n_embd):
    """(length, n_embd): sines and cosines of positions, with wavelengths from 2π to 10,000 · 2π
    (Vaswani et al. 2017, section 3.5, times √2, so that the mean square is 1)."""
    angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, n_embd, 2) / n_embd)
    pairs = torch.stack([angles.sin(), angles.cos()], dim=2)  # (length, n_embd / 2, 2)
    return math.sqrt(2) * pairs.flatten(1)[:, :n_embd]


def cross_entropy(logits, targets):
    """-log p of each target, in nats: logits (N, vocab_size), targets (N,) -> (N,), 0 where it is
    -100. In training on a CPU, the logits are overwritten: see CrossEntropy."""
    if logits.device.type == "cpu" and logits.requires_grad:
        return CrossEntropy.apply(logits, targets)
    return F.cross_entropy(logits.float(), targets, reduction="none")


# --- the choice of the next token -----------------------------------------------------------------


def keep_top_p(logits, p):
    """Nucleus sampling (Holtzman et al. 2020): keeps the smallest set of most likely tokens whose
    total probability reaches p; the other logits (B, n) become -inf."""
    probs, order = F.softmax(logits, dim=-1).sort(descending=True)
    dropped = (probs.cumsum(-1) - probs) >= p  # the more likely tokens already reach p
    dropped[:, 0] = False  # always keep the most likely
    # back in the order of logits
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws a token for each row of logits (B, vocab_size) -> (B,) int64.

    Temperature 0 takes the most likely token; otherwise one is drawn from softmax(logits /
    temperature), restricted to the top_k most likely (None or 0: all), then to the fewest whose
    total probability reaches top_p (None or 1: all).
    """
    logits = logits.float() / (temperature or 1)
    if not logits.amax(-1).isfinite().all():  # -inf bans a token, but a row must not ban all
        raise ValueError("logits are not finite: damaged weights or too low a temperature")
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:  # logits become (B, k), exactly k even with ties; tokens holds their ids
        logits, tokens = logits.topk(min(top_k, logits.size(-1)))
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    probs = F.softmax(logits, dim=-1)
    # the argmax of p / Exp(1) is a draw from p; this takes half as long as torch.multinomial
    waits = torch.empty_like(probs).exponential_(generator=generator)
    waits.clamp_(min=1e-30)  # on MPS some are 0, and argmax would pick 0 / 0, which is nan
    drawn = (probs / waits).argmax(-1, keepdim=True)  # (B, 1)
    return (tokens.gather(-1, drawn) if top_k else drawn)[:, 0]


# --- faster versions for CPUs ---------------------------------------------------------------------


def fast_dropout(x, p, training=True):
    """Like F.dropout, but on CPUs it draws 16 random bits per element instead of a float: training
    with dropout is 1.4 times as fast on two cores."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = round(p * 2**16)  # how many of the 2**16 values mean dropped
    # four 16-bit numbers in each 64-bit number
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept * (2**16 / (2**16 - dropped))


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits.float(), targets, reduction="none") for CPUs. forward() overwrites the
    logits (N, V) with their gradient, softmax minus one-hot, which backward() then scales, once
    only: no second (N, V) tensor is needed, and a step of GPT-2 124M is 1.4 times as fast."""

    @staticmethod
    def forward(ctx, logits, targets):
        losses, rows = [], max(1, 2**22 // logits.size(1))  # 16 MB at a time in float32
        for x, target in zip(logits.split(rows), targets.split(rows)):
            log_probs = x.float().log_softmax(-1)
            losses.append(F.nll_loss(log_probs, target, reduction="none"))  # 0 where it is -100
            probs = log_probs.exp_()
            probs[torch.arange(len(x)), target.clamp(min=0)] -= 1
            x.copy_(probs)
            x[target == -100] = 0
        ctx.save_for_backward(logits)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad[:, None].to(gradient.dtype)), None


# --- the machine ----------------------------------------------------------------------------------


def pick_device(name=""):
    """The torch.device of this name, or for "" the best. Raises ValueError if it does not work."""
    for candidate in [name] if name else ["cuda", "mps", "cpu"]:
        try:  # is_available() is not enough: in a virtual machine, MPS cannot allocate memory
            return torch.zeros(1, device=candidate).device
        except (RuntimeError, AssertionError) as error:
            reason = error
    raise ValueError(f"device {name} is not available here ({reason!s:.90})") from reason


@functools.cache
def pick_dtype(device):
    """The fastest type for matrix products on this torch.device: bfloat16, float32 or, on old GPUs,
    float16. On CPUs it is measured: with AVX512_BF16 or AMX, bfloat16 is about 4 times as fast."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type != "cpu":
        return torch.float32
    matrices = torch.ones(512, 512, dtype=torch.bfloat16), torch.ones(512, 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # times the processor, not how busy it is
    times = [[timeit(lambda a=a: a @ a, number=1) for a in matrices] for _ in range(10)]  # seconds
    torch.set_num_threads(threads)
    bfloat16, float32 = map(min, zip(*times))
    return torch.bfloat16 if 1.5 * bfloat16 < float32 else torch.float32


# --- checkpoints ----------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Opens a temporary file, which is renamed to path once it is complete."""
    temporary = pathlib.Path(f"{path}.tmp")
    temporary.unlink(missing_ok=True)  # it may be a link to another file
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def damaged(path):
    """Turns any error caused by a file's contents into a ValueError that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path}: damaged, or of another format ({reason:.200})") from error


def save_checkpoint(path, checkpoint):
    """Writes GPT.checkpoint(), plus any other tensors and plain values, all or nothing."""
    try:
        with replacing(path) as file:
            torch.save({"format": 2, **checkpoint}, file)
    except RuntimeError as error:  # how torch.save reports a full disk
        raise OSError(f"{path} could not be written; is the disk full?") from error


def load_checkpoint(path):
    """What save_checkpoint wrote, {"config", "model", ...}, on the CPU. Code in it is never run.

    path is a file, a run's folder (its best.pt, or last.pt if there is none), a folder in Hugging
    Face's format, or one of HUB_MODELS. Raises OSError, or ValueError if it is none of these.
    """
    if str(path) in HUB_MODELS and not os.path.exists(path):
        path = download_gpt2(str(path))
    path = pathlib.Path(path)
    if path.is_dir():
        names = ("best.pt", "last.pt", "model.safetensors")
        path = next((path / name for name in names if (path / name).exists()), path / "best.pt")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return load_huggingface(path)
    with damaged(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != 2:
            raise ValueError(f"format {checkpoint['format']}, from another version: train again")
    return checkpoint


# --- GPT-2's weights in and out (skip on a first reading) -----------------------------------------

HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUGGING_FACE_NAMES = {"block_size": "n_positions", "tie_weights": "tie_word_embeddings"}
HUGGING_FACE_NAMES |= {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
ARCHITECTURE = {  # settings that GPTConfig lacks: the only values supported here
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_huggingface(path):
    """model.safetensors and the config.json beside it -> a checkpoint like ours. Its dropout is not
    read: it belongs to the run that made the model."""
    with damaged(path.with_name("config.json")):
        text = path.with_name("config.json").read_bytes()
        settings = {"tie_word_embeddings": True, **json.loads(text)}
        for name, value in ARCHITECTURE.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{name} is {settings[name]!r}; only {value!r} is supported")
        config = {ours: settings[theirs] for ours, theirs in HUGGING_FACE_NAMES.items()}
    weights = {}
    for name, tensor in read_safetensors(path).items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # stored causal masks
            # contiguous: products with a transposed view are up to 1.5 times as slow
            weights[name] = tensor.mT.contiguous() if name.endswith(TRANSPOSED) else tensor
    if config["tie_weights"]:
        weights["lm_head.weight"] = weights.get("transformer.wte.weight")
    return {"config": config, "model": weights}


def read_safetensors(path):
    """A safetensors file -> {name: tensor}, floating-point ones only, memory-mapped.

    Layout: the length of the header (8 bytes); the header, as JSON: {name: {"dtype", "shape",
    "data_offsets": [start, end]}}; the data. Offsets outside the file raise an error.
    """
    tensors = {}
    with damaged(path), open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        data = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
        for name, entry in json.loads(header).items():
            if (dtype := DTYPES.get(entry.get("dtype"))) is not None:
                start, end = (8 + len(header) + offset for offset in entry["data_offsets"])
                part = data[start:end] if start % dtype.itemsize == 0 else data[start:end].clone()
                tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors


def save_huggingface(folder, model, eos_token_id):
    """Writes model.safetensors and config.json: see load_huggingface."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # without it, half a model is not loaded
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_weights:
            continue
        tensors[name] = tensor.mT if name.endswith(TRANSPOSED) else tensor
        if not config.bias and name.startswith(("transformer.h.", "transformer.ln_f")):
            tensors[name.replace(".weight", ".bias")] = tensor.new_zeros(len(tensor))
    write_safetensors(folder / "model.safetensors", tensors)
    settings = {theirs: getattr(config, ours) for ours, theirs in HUGGING_FACE_NAMES.items()}
    settings |= {"architectures": ["GPT2LMHeadModel"], **ARCHITECTURE}
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"), eos_token_id)
    settings |= dict.fromkeys(("embd_pdrop", "resid_pdrop"), config.dropout)
    settings["attn_pdrop"] = config.attn_dropout
    with replacing(folder / "config.json") as file:
        file.write(json.dumps(settings, indent=2).encode())


def write_safetensors(path, tensors):
    """Writes {name: tensor} in the layout described in read_safetensors."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        entry = {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [position, position + tensor.nbytes]}
        position += tensor.nbytes
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # aligns the data
    with replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            data = bytearray(tensor.nbytes)
            torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
            file.write(data)


def download_gpt2(name):
    """Downloads one of HUB_MODELS, unless it is already in torch.hub's folder; returns its folder.
    HF_ENDPOINT can name a mirror of Hugging Face's hub."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    folder = pathlib.Path(torch.hub.get_dir(), name)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        url, path = f"{hub}/openai-community/{name}/resolve/main/{file}", folder / file
        if not path.exists():
            print(f"downloading {url} to {folder}", file=sys.stderr)
            try:
                torch.hub.download_url_to_file(url, f"{path}.partial")
                if file == "model.safetensors":  # reading it detects a truncated download
                    read_safetensors(f"{path}.partial")
                os.replace(f"{path}.partial", path)
            except Exception as error:
                reason = f"{error}; you can also copy the file to {folder}"
                raise ValueError(f"{url} cannot be downloaded: {reason}") from error
    return folder
