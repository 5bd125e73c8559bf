"""GPT: the model, whole, in one file that needs only PyTorch (2.13, or newer).

    from gpt import GPT, GPTConfig
    model = GPT(GPTConfig(block_size=128, vocab_size=1024, n_layer=4, n_head=4, n_embd=128))
    logits = model(idx)                          # idx (B, T) token ids -> (B, T, vocab_size)
    loss = model(idx, targets)                   # mean cross-entropy, nats per token
    for token in model.generate(idx, 100): ...   # (B,) ids, one step at a time
    model = GPT.from_pretrained("gpt2")          # with the weights that OpenAI has published

The architecture is GPT-2's (Radford et al. 2019): a decoder-only transformer (Vaswani et al. 2017,
"Attention Is All You Need") with LayerNorm before each branch, learned positions and tanh GELU.
Parameters bear the names of Hugging Face's GPT-2, which stores the matrices of attention and MLP
transposed. Shapes in comments: B sequences in a batch, T tokens in each, C = n_embd.
"""

import contextlib
import http.client
import json
import math
import mmap
import os
import pathlib
import sys
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M. Raises ValueError on impossible values."""

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on embeddings and both residual branches
    attn_dropout: float = 0.0  # on attention weights; above 0, CPUs lose the fused kernel
    bias: bool = True  # in Linear and LayerNorm
    tie_weights: bool = True  # lm_head shares the token embedding

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type and not (field.type is float and type(value) is int):
                raise ValueError(f"{field.name} must be {field.type.__name__}, not {value!r}")
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} must be 1 or more, not {value}")
            if field.type is float and not 0 <= value < 1:
                raise ValueError(f"{field.name} must be at least 0 and below 1, not {value}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")


# --- attention ------------------------------------------------------------------------------------


def attention_weights(q, k):
    """softmax(Q Kᵀ / √d_k + M): how much each token attends to itself and to each token before it.

    q and k are (B, n_head, T, head_size); the result is (B, n_head, T, T), rows sum to 1.
    M is the causal mask, -inf on the future (Vaswani et al. 2017, equation 1 and section 3.2.3).
    """
    T = q.size(-2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, n_head, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(scores.masked_fill(future, -math.inf), dim=-1)


def causal_attention(q, k, v):
    """Attention written out; the model uses PyTorch's fused kernel, which computes the same."""
    return attention_weights(q, k) @ v  # (B, n_head, T, head_size)


class CausalSelfAttention(nn.Module):
    """Every token asks (q) itself and all before it (k), and takes a mean of what they offer (v),
    weighted by how well they match."""

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.layer = config.n_head, layer
        self.dropout, self.attn_dropout = config.dropout, config.attn_dropout

    def heads(self, x):
        """x (B, T, C) -> q, k and v as (3, B, n_head, T, head_size), a view: nothing is copied."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(self, x, cache=None):
        q, k, v = qkv = self.heads(x)
        if cache is not None:
            k, v = cache.extend(self.layer, qkv[1:])
        T, S = q.size(2), k.size(2)  # the T queries are the last of S tokens
        mask = None
        if 1 < T < S:  # is_causal would give the first query the first key alone
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        dropout = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=T == S)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C): the heads side by side
        return F.dropout(self.c_proj(y), self.dropout, self.training)


# --- the transformer ------------------------------------------------------------------------------


class MLP(nn.Module):
    """What a token does with what it has gathered: four times wider, GELU, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP; each reads the residual stream through a LayerNorm and adds to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids in, logits of each next token out. See the top of this file for its use."""

    def __init__(self, config):
        super().__init__()
        self.config = config

        def table(rows):  # nn.Embedding(rows, n_embd) draws numbers, which init_weights does, too
            return nn.Embedding.from_pretrained(torch.empty(rows, config.n_embd), freeze=False)

        self.transformer = nn.ModuleDict(
            {
                "wte": table(config.vocab_size),
                "wpe": table(config.block_size),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:  # meta tensors hold nothing: see from_checkpoint
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: N(0, 0.02), zero biases (Radford et al. 2018, section 4.1; 2019, section 2.3).

        A tied wte is the output head, too, and must be small for the first logits to be small.
        Where they are two, this project's own choice: tokens begin at N(0, 1), which the first
        updates cannot swamp; positions as sinusoids (Vaswani et al. 2017, section 3.5), so that
        near and far differ from the start; the head at zero, so that the first loss is
        ln(vocab_size).
        """
        config, transformer = self.config, self.transformer
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 n_layer branches add up in the residual stream
                parameter.normal_(std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.zero_()
        if not config.tie_weights:
            transformer.wte.weight.normal_()
            transformer.wpe.weight.copy_(sinusoids(config.block_size, config.n_embd))
            self.lm_head.weight.zero_()

    def tie_weights(self):
        """Makes lm_head and wte one tensor, if the config says so."""
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def embed(self, idx, start=0):
        """idx (B, T), the first at position start -> (B, T, n_embd): which token, and where."""
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start:end]
        return F.dropout(x, self.config.dropout, self.training)

    def hidden(self, idx, cache=None):
        """idx (B, T) int64 -> (B, T, n_embd) after the final LayerNorm: what any head builds on.

        With a KVCache, idx continues the tokens read before, and is added to them. Raises
        ValueError if there are more than block_size.
        """
        start = 0 if cache is None else cache.position
        x = self.embed(idx, start)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.position = start + idx.size(1)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, vocab_size); with targets (B, T) -> scalar loss in nats.

        The loss is the mean over targets that are not -100 (nan if every target is).
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        return next_token_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

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
        """Yields the next token of each of the sequences idx (B, T), as (B,) int64, step by step.

        temperature 0 takes the likeliest token; otherwise one is drawn from softmax(logits /
        temperature), restricted to the top_k likeliest, then to the fewest that reach probability
        top_p. A sequence that has met stop_token repeats it; when all have, the iterator ends.
        Call eval() first, or dropout is on. All n at once: torch.stack(list(...), dim=1).
        Learned positions cannot slide: when the context is full, the model reads its last half
        again, as if the text began there. Of a longer prompt only the last block_size are read.
        """
        block_size = self.config.block_size
        context = idx[:, -block_size:]  # the tokens since position 0
        cache = KVCache(self, idx.size(0), min(block_size, context.size(1) + max_new_tokens))
        stopped = torch.zeros_like(idx[:, 0], dtype=torch.bool)  # (B,)
        for _ in range(max_new_tokens):
            if cache.position == block_size:
                context = context[:, -max(1, block_size // 2) :]
                cache.position = 0
            with torch.inference_mode():
                x = self.hidden(context[:, cache.position :], cache)  # reads only what is new
                logits = self.lm_head(x[:, -1])  # (B, vocab_size)
                token = sample(logits, temperature, top_k, top_p, generator)
            token = token.clone()  # leaves inference mode, whose tensors autograd refuses
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped = token == stop_token
            yield token
            if stopped.all():
                return
            context = torch.cat([context, token[:, None]], dim=1)

    @torch.no_grad()
    def attention_maps(self, idx):
        """idx (B, T) -> (n_layer, B, n_head, T, T): who looks at whom, by the written-out formula.

        Call eval() first, or dropout is on.
        """
        maps = []
        x = self.embed(idx)
        for block in self.transformer.h:
            q, k, _ = block.attn.heads(block.ln_1(x))
            maps.append(attention_weights(q, k))
            x = block(x)
        return torch.stack(maps)

    def num_params(self):
        """Parameters without the position table, as nanoGPT counts; shared ones count once."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    @torch.no_grad()
    def resize_vocab(self, vocab_size):
        """Crops the vocabulary to its first vocab_size tokens, or grows it by random new ones.

        Parameters are replaced: make optimizers after this.
        """
        self.config = replace(self.config, vocab_size=vocab_size)
        wte = self.transformer.wte
        for module in (wte, self.lm_head):
            module.weight = with_rows(module.weight, vocab_size)
        wte.num_embeddings = self.lm_head.out_features = vocab_size
        self.tie_weights()

    def crop_vocab(self, vocab_size):
        """Leaves out tokens that only pad the vocabulary. Raises ValueError if it is smaller."""
        if self.config.vocab_size < vocab_size:
            raise ValueError(f"{vocab_size} tokens, but the model knows {self.config.vocab_size}")
        if self.config.vocab_size > vocab_size:
            self.resize_vocab(vocab_size)

    @torch.no_grad()
    def resize_positions(self, block_size):
        """Crops the context to block_size tokens, or grows it by positions still to be trained.

        The table is replaced: make optimizers after this.
        """
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = with_rows(wpe.weight, block_size)
        wpe.num_embeddings = block_size

    def save_pretrained(self, folder, eos_token_id=None):
        """Writes the model as Hugging Face's GPT-2; eos_token_id is the one that ends a text."""
        save_huggingface(pathlib.Path(folder), self, eos_token_id)

    @classmethod
    def from_pretrained(cls, name_or_path, **changes):
        """The model that load_checkpoint(name_or_path) finds; changes as in from_checkpoint."""
        return cls.from_checkpoint(load_checkpoint(name_or_path), **changes)

    def checkpoint(self):
        """What from_checkpoint makes a model of: {"config", "model"}."""
        return {"config": asdict(self.config), "model": self.state_dict()}

    @classmethod
    def from_checkpoint(cls, checkpoint, **changes):
        """The model in what load_checkpoint returned, in eval mode, sharing its tensors.

        changes override its config, as in dropout=0.1. Raises ValueError if the weights do not fit.
        """
        if "base" in checkpoint:
            raise ValueError("only what finetune.py has trained; the whole model is in best.pt")
        try:
            config = GPTConfig(**{**checkpoint["config"], **changes})
        except TypeError as error:
            raise ValueError(f"unknown config: {error}") from error
        weights = checkpoint["model"]
        if config.n_layer > len(weights):  # a damaged number must not build a billion blocks
            raise ValueError(f"config has n_layer {config.n_layer} but there are fewer tensors")
        try:
            with torch.device("meta"):  # the shapes alone: no memory, no random numbers
                model = cls(config)
            model.load_state_dict(weights, assign=True)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"weights do not fit their config: {error}") from error
        model.tie_weights()
        return model.eval()


def with_rows(weight, rows):
    """The first rows of a table, and where it has fewer, N(0, 0.02) after them."""
    table = weight.new_empty(rows, weight.size(1)).normal_(std=0.02)
    kept = min(rows, len(weight))
    table[:kept] = weight[:kept]
    return nn.Parameter(table, weight.requires_grad)


def sinusoids(length, n_embd):
    """(length, n_embd): sines and cosines of positions, of wavelengths from 2π to 10,000 · 2π.

    Scaled to a mean square of 1, where Vaswani et al. 2017, section 3.5, have 1/2.
    """
    frequencies = 10_000 ** (-torch.arange(0, n_embd, 2) / n_embd)
    angles = torch.arange(length)[:, None] * frequencies
    pairs = torch.stack([angles.sin(), angles.cos()], dim=2)  # (length, n_embd / 2, 2)
    return math.sqrt(2) * pairs.flatten(1)[:, :n_embd]


# --- the loss -------------------------------------------------------------------------------------


def next_token_loss(x, weight, targets):
    """Mean cross-entropy, in nats, of logits = x weightᵀ over the targets that are not -100.

    x (N, C), weight (vocab_size, C), targets (N,). With GPT-2's vocabulary the logits would be the
    largest tensor of all: then they and their gradient are computed 512 rows at a time.
    """
    if weight.size(0) < 8192:  # small: the plain way is faster
        return F.cross_entropy(F.linear(x, weight), targets)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return F.linear_cross_entropy(x, weight, targets, options=options)
    # The fused function ignores autocast, and would round its mean to the short type.
    dtype = torch.get_autocast_dtype(device)
    losses = F.linear_cross_entropy(
        x.to(dtype), weight.to(dtype), targets, reduction="none", options=options
    )
    return losses.float().sum() / (targets != -100).sum()


# --- generating: the cache, and the choice of the next token --------------------------------------


class KVCache:
    """Keys and values of the tokens read so far, so that each new token costs one short step.

    Memory: 2 · n_layer · batch_size · length · n_embd numbers.
    """

    def __init__(self, model, batch_size, length):
        config, weight = model.config, model.transformer.wte.weight
        shape = (2, batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.layers = [weight.new_empty(shape) for _ in range(config.n_layer)]
        self.position = 0  # tokens read so far, counted by GPT.hidden

    def extend(self, layer, keys_values):
        """Stores those of new tokens, (2, B, n_head, T, head_size); returns those of all so far."""
        stored, end = self.layers[layer], self.position + keys_values.size(3)
        stored[:, :, :, self.position : end] = keys_values
        return stored[:, :, :, :end]


def keep_top_p(logits, p):
    """Of logits (B, n), leaves the fewest likeliest whose probability reaches p; -inf elsewhere.

    Nucleus sampling: Holtzman et al. 2020.
    """
    values, order = logits.sort(descending=True)
    probs = F.softmax(values, dim=-1)
    before = probs.cumsum(-1) - probs  # probability of all likelier tokens: 0 for the likeliest
    kept = values.masked_fill(before >= p, -math.inf)
    kept[:, 0] = values[:, 0]  # one at least, however small p is
    return torch.empty_like(logits).scatter(-1, order, kept)


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws a token for each row: logits (B, vocab_size) -> (B,) int64. See GPT.generate."""
    logits = logits.float() / (temperature or 1)
    if not logits.isfinite().all():
        raise ValueError("logits are not finite: damaged weights, or too small a temperature")
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:  # from here on (B, k), exactly k even with ties; tokens says which they are
        logits, tokens = logits.topk(min(top_k, logits.size(-1)))
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    drawn = torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)  # (B, 1)
    return (tokens.gather(-1, drawn) if top_k else drawn)[:, 0]


# --- the machine ----------------------------------------------------------------------------------


def pick_device(name=None):
    """ "cpu", "cuda:1", "mps" ... or None for the best there is -> torch.device, tried out.

    Raises ValueError if it is not available.
    """
    name = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name} is not available here ({error!s:.90})") from error
    return device


# --- checkpoints ----------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Opens a file to write that takes path's place when it is complete, and only then."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    os.replace(temporary, path)


def save_checkpoint(path, checkpoint):
    """Writes GPT.checkpoint(), plus any other tensors and plain values, all or nothing."""
    try:
        with replacing(pathlib.Path(path)) as file:
            torch.save({"format": 1, **checkpoint}, file)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{path} could not be written; is the disk full?") from error


def load_checkpoint(path):
    """What save_checkpoint wrote: {"config", "model", ...}, tensors on the CPU.

    path is a file or a run's folder (its best.pt, or last.pt while there is none). Also reads, into
    the same dict, GPT-2 by name (see HUB_MODELS), a folder of Hugging Face's, nanoGPT's ckpt.pt.
    Nothing in a file is executed. Raises OSError, or ValueError if it is none of these.
    """
    if str(path) in HUB_MODELS and not os.path.exists(path):
        path = download_gpt2(str(path))
    path = pathlib.Path(path)
    if path.is_dir():
        names = ("best.pt", "last.pt", "ckpt.pt", "model.safetensors", "config.json")
        path = next((path / name for name in names if (path / name).exists()), path / names[0])
    if path.name in ("model.safetensors", "config.json"):
        return load_huggingface(path.parent)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; train.py and finetune.py write them")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint, or damaged ({error!r:.90})") from error
    match checkpoint:
        # int(): a damaged file may have a tensor here, and comparing that gives no bool
        case {"format": int(version), "config": dict(), "model": dict()} if version == 1:
            return checkpoint
        case {"model": dict(weights), "model_args": dict(config)}:
            return from_nanogpt(weights, config)
    raise ValueError(f"{path}: not a checkpoint of this project (format 1)")


def from_nanogpt(weights, config):
    """nanoGPT's weights and model_args -> a checkpoint like ours; names are the same."""
    print("note: nanoGPT trains with the exact GELU; this is GPT-2's, by tanh", file=sys.stderr)
    weights = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}
    return {"config": {**config, "tie_weights": True}, "model": weights}


# --- Hugging Face's format ------------------------------------------------------------------------

HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUGGING_FACE_NAMES = {  # a field of GPTConfig: its name in config.json
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "tie_weights": "tie_word_embeddings",
    "bias": "bias",  # our addition: others ignore it and read biases of zero
}
ARCHITECTURE = {  # settings that GPTConfig lacks: the only values that this file can compute
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "n_inner": None,
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,  # this and the next: in causal masks, which are skipped
    "BOOL": torch.bool,
}


def load_huggingface(folder):
    """A folder with config.json and model.safetensors -> a checkpoint like ours, in float32.

    Dropouts belong to a training, not to its result, and are not taken over.
    """
    path = folder / "config.json"
    try:
        settings = {"tie_word_embeddings": True, **json.loads(path.read_bytes())}
        if settings.get("n_inner") == 4 * settings.get("n_embd", 0):
            del settings["n_inner"]  # only says what is the default
        for name, value in ARCHITECTURE.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{name} is {settings[name]!r}; only {value!r} is known here")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a GPT-2 that can be loaded ({error})") from error
    names = HUGGING_FACE_NAMES.items()
    config = {ours: settings[theirs] for ours, theirs in names if theirs in settings}
    weights = {}
    for name, tensor in read_safetensors(folder / "model.safetensors").items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask
            continue
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if name.endswith(TRANSPOSED):
            tensor = tensor.mT  # a view: the file's layout suits the processor as well
        weights[name] = tensor.float()
    if config["tie_weights"] and "transformer.wte.weight" in weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    if config.get("bias") is False:  # save_huggingface wrote zeros, but others may have trained
        biases = {name for name in weights if name.endswith(".bias")}
        if any(weights[name].any() for name in biases):
            config["bias"] = True
        else:
            weights = {name: weights[name] for name in weights if name not in biases}
    return {"config": config, "model": weights}


def read_safetensors(path):
    """A safetensors file -> {name: tensor}; the tensors are mapped into memory, not read.

    The file is: the length of the header in 8 bytes; the header, JSON, {name: {"dtype", "shape",
    "data_offsets": [start, end]}}; the data, without a gap. Raises ValueError if it is not.
    """
    tensors = {}
    with open(path, "rb") as file:
        try:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # changes stay our own
            position = data_start = 8 + int.from_bytes(memory[:8], "little")
            if data_start > len(memory):
                raise ValueError(f"the header should end at byte {data_start} of {len(memory)}")
            entries = json.loads(memory[8:data_start])
            entries.pop("__metadata__", None)
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                if not all(type(n) is int and n > 0 for n in entry["shape"]):
                    raise ValueError(f"{name} has an impossible shape")
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
                dtype, count = DTYPES[entry["dtype"]], math.prod(entry["shape"])
                end = position + count * dtype.itemsize
                if entry["data_offsets"] != [position - data_start, end - data_start]:
                    raise ValueError(f"{name} does not lie where it should")
                tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=position)
                aligned = tensor if position % dtype.itemsize == 0 else tensor.clone()
                tensors[name] = aligned.view(entry["shape"])
                position = end
            if position != len(memory):
                raise ValueError(f"its tensors end at byte {position} of {len(memory)}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged, or no safetensors file ({error!s:.200})") from error
    return tensors


def save_huggingface(folder, model, eos_token_id):
    """Writes model.safetensors, generation_config.json and config.json: see load_huggingface."""
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_weights:
            continue
        tensors[name] = tensor.mT if name.endswith(TRANSPOSED) else tensor
        if not config.bias and "wte" not in name and "wpe" not in name and "lm_head" not in name:
            tensors[name.replace(".weight", ".bias")] = tensor.new_zeros(len(tensor))
    write_safetensors(folder / "model.safetensors", tensors)
    ends = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        **ARCHITECTURE,
        **{theirs: getattr(config, ours) for ours, theirs in HUGGING_FACE_NAMES.items()},
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attn_dropout,
        **ends,
    }
    for name, content in {"generation_config.json": ends, "config.json": settings}.items():
        with replacing(folder / name) as file:
            file.write(json.dumps(content, indent=2).encode())


def write_safetensors(path, tensors):
    """Writes {name: tensor} as read_safetensors describes."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": dtype_names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # so that the data is aligned
    with replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            data = bytearray(tensor.nbytes)
            torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
            file.write(data)


def download_gpt2(name):
    """Fetches one of HUB_MODELS into torch.hub's folder, where it is not there; returns its folder.

    The variable HF_ENDPOINT names a mirror of the hub.
    """
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    folder = pathlib.Path(torch.hub.get_dir(), name)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        path, partial = folder / file, folder / f"{file}.partial"
        url = f"{hub}/openai-community/{name}/resolve/main/{file}"
        if path.exists():
            continue
        print(f"downloading {url} to {folder}", file=sys.stderr)
        try:
            torch.hub.download_url_to_file(url, str(partial))  # may miss a broken connection, so:
            if file == "config.json":
                json.loads(partial.read_bytes())
            else:
                read_safetensors(partial)
        except (OSError, ValueError, http.client.HTTPException) as error:
            partial.unlink(missing_ok=True)
            raise ValueError(
                f"{url}: cannot be downloaded ({error}); or copy it to {folder}"
            ) from error
        partial.replace(path)
    return folder
