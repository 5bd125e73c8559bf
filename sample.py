"""Generates text with a trained GPT.

    python sample.py                                            # from out/, a new document
    python sample.py --init_from=out/book --start="It was"      # continues a text
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.7 --top_p=0.9
    python sample.py --init_from=gpt2 --start="It was a"        # OpenAI's GPT-2
    python sample.py --init_from=out/instruct --chat            # chat with it
    python sample.py --start="# os.path." --surprise            # how likely is each token?
    python sample.py --start="# os.path." --attention=attention.png
    python sample.py --init_from=out --save_pretrained=mine     # for Hugging Face transformers

Reads checkpoints from train.py and finetune.py, and GPT-2 models in Hugging Face's format.
"""

import codecs
import contextlib
import io
import math
import pathlib
import sys
import time
from dataclasses import dataclass

import torch

import prepare_data
from gpt import GPT, attention_weights, load_checkpoint, pick_device, pick_dtype
from prepare_data import clean, damaged, read_documents, token_bytes, token_label


@dataclass
class SampleConfig:
    init_from: str = "out"  # a run's folder, a checkpoint, gpt2, or a Hugging Face folder
    start: str = ""  # the text to continue, or FILE:name (default: a new document)
    num_samples: int = 1  # number of samples, generated in one batch
    max_new_tokens: int = 500  # maximum tokens per sample
    temperature: float = 0.8  # below 1 favors likely tokens (0: always take the most likely)
    top_k: int = 200  # choose among the k most likely tokens (0: all)
    top_p: float = 1.0  # of these, keep the likeliest that together reach this probability (1: all)
    seed: int = 1337  # the same seed gives the same text
    device: str = ""  # cpu, cuda, mps (default: the best available)
    dtype: str = ""  # float32, bfloat16, float16 (default: the fastest for the model's size)
    attention: str = ""  # PNG file to draw: which tokens of --start attend to which
    surprise: bool = False  # show how likely each token of --start was
    chat: bool = False  # a conversation with a model from finetune.py
    system: str = ""  # for --chat: the system prompt
    save_pretrained: str = ""  # write the model and its tokenizer as a Hugging Face folder


def load_model(config):
    """Returns the model in float32, its tokenizer, and the checkpoint with the tokenizer's spec."""
    checkpoint = load_checkpoint(config.init_from)
    spec, tokenizer = prepare_data.load_tokenizer(checkpoint, config.init_from)
    with damaged(config.init_from):
        model = GPT.from_checkpoint(checkpoint)
        # drops rows that only pad the vocabulary, so that they are never sampled
        model.resize(vocab_size=tokenizer.n_vocab)
    return model, tokenizer, {**checkpoint, "tokenizer": spec}


def to_device(model, config):
    """Moves the model to the device, in the type that is fastest there for its size."""
    device = pick_device(config.device)
    # A small model gains nothing from bfloat16, and little from threads, which stall when the
    # machine is busy. Pictures and probabilities are computed in float32.
    is_small = model.config.n_embd < 512
    if is_small:
        torch.set_num_threads(1)
    exact = is_small or config.surprise or config.attention
    fastest = torch.float32 if exact else pick_dtype(device)
    if config.dtype not in ("", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype={config.dtype}: must be float32, bfloat16 or float16")
    model.to(device, getattr(torch, config.dtype) if config.dtype else fastest)
    if device.type == "cpu" and model.lm_head.weight.dtype == torch.bfloat16 == fastest:
        pack_weights(model)


def pack_weights(model):
    """Stores the weights in oneDNN's own layout too, so that it does not rearrange them for every
    token: in bfloat16 on a CPU, GPT-2 124M generates 1.3 times as fast."""
    product = torch.ops.mkldnn._linear_pointwise
    for linear in model.modules():
        if isinstance(linear, torch.nn.Linear):
            weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
            linear.forward = lambda x, w=weight, b=linear.bias: product(x, w, b, "none", [], "")


def write(model, tokenizer, tokens, config, generator, num_samples=1):
    """Continues tokens num_samples times and prints the first text as it is generated. Returns the
    texts and the number of tokens. Ctrl-C stops generation."""
    block_size, end = model.config.block_size, tokenizer.eot_token
    if len(tokens) > block_size:
        print(f"the model sees only the last {block_size} of {len(tokens)} tokens", file=sys.stderr)
    # holds back the bytes of a character that is split across tokens until it is complete
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    written, count = [b""] * num_samples, 0
    idx = torch.tensor([tokens] * num_samples, device=model.lm_head.weight.device)
    options = (config.temperature, config.top_k, config.top_p)
    with contextlib.suppress(KeyboardInterrupt):
        for step in model.generate(idx, config.max_new_tokens, *options, end, generator):
            for i, token in enumerate(step.tolist()):
                if token != end:  # a sample that has ended keeps yielding it
                    count += 1
                    data = token_bytes(tokenizer, token)
                    written[i] += data
                    if i == 0:
                        print(decoder.decode(data), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return [data.decode(errors="replace") for data in written], count


def write_samples(model, tokenizer, prompt, config, generator):
    """Prints num_samples continuations of prompt and the generation speed."""
    # a new document starts after an end-of-text token
    tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    texts, count = write(model, tokenizer, tokens, config, generator, config.num_samples)
    seconds = time.perf_counter() - start
    for text in texts[1:]:
        print("-" * 80, prompt + text, sep="\n")
    print(f"{count} tokens in {seconds:.1f} s: {count / seconds:,.0f} tokens/s", file=sys.stderr)


def chat(model, tokenizer, checkpoint, config, generator):
    """Replies to each line typed. When the conversation no longer fits the context, its oldest
    exchanges are forgotten. With a model trained on single questions, each starts a conversation.
    Ctrl-C ends a reply, Ctrl-D the conversation."""
    template = checkpoint.get("template") or prepare_data.default_template(tokenizer)
    block_size = model.config.block_size
    # leaves room for the reply, at most half of the context
    limit = block_size - min(config.max_new_tokens, block_size // 2)
    system = [{"role": "system", "content": config.system}] if config.system else []
    messages = []
    with contextlib.suppress(EOFError):
        while True:
            question = input("> " if sys.stdin.isatty() else "").strip()
            if not question:
                continue
            messages.append({"role": "user", "content": question})
            prompt = prepare_data.chat_prompt(system + messages, tokenizer, template)
            while len(prompt) > limit and len(messages) > 1:
                del messages[:2]  # the oldest question and its answer
                prompt = prepare_data.chat_prompt(system + messages, tokenizer, template)
            if len(prompt) > limit:
                print(f"too long: {len(prompt)} tokens, but only {limit} fit", file=sys.stderr)
                messages.clear()
                continue
            (answer,), _ = write(model, tokenizer, prompt, config, generator)
            messages.append({"role": "assistant", "content": answer})
            if checkpoint.get("turns") == 1:
                messages.clear()


@torch.no_grad()
def draw_attention(model, tokenizer, text, path):
    """Draws the attention among the first 24 tokens of text, one panel per layer and head."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--attention needs matplotlib: pip install matplotlib") from error
    tokens = tokenizer.encode_ordinary(text)[: min(24, model.config.block_size)]
    maps = []  # one (T, T) tensor for each layer and head

    def record(attn, inputs):
        q, k, _ = attn.heads(inputs[0])
        maps.extend(attention_weights(q, k)[0])

    for block in model.transformer.h:
        block.attn.register_forward_pre_hook(record)
    model.hidden(torch.tensor([tokens], device=model.lm_head.weight.device))
    layers, heads = model.config.n_layer, model.config.n_head
    names = [token_label(tokenizer, token) for token in tokens]
    side = max(2, len(tokens) / 6)  # width and height of a panel, in inches
    figure = Figure(figsize=(side * heads, side * layers), layout="constrained")
    for i, panel in enumerate(figure.subplots(layers, heads, squeeze=False).flat):
        panel.imshow(maps[i].float().cpu().numpy(), vmin=0, cmap="Blues")
        panel.set_title(f"layer {i // heads + 1}, head {i % heads + 1}", fontsize=9)
        panel.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
        panel.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    figure.supxlabel("key")
    figure.supylabel("query")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    prepare_data.write_file(path, picture.getvalue())


@torch.no_grad()
def print_surprise(model, tokenizer, text):
    """Prints the probability and rank of each token of text that fits the context, and the three
    most likely tokens."""
    tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(text)][: model.config.block_size + 1]
    idx = torch.tensor([tokens[:-1]], device=model.lm_head.weight.device)
    print(f"{'token':16}{'probability':>11}{'rank':>7}  most likely")
    total, n_bytes = 0.0, 0
    for token, log_probs in zip(tokens[1:], model(idx)[0].float().log_softmax(-1)):
        log_prob = log_probs[token].item()
        rank = int((log_probs > log_prob).sum()) + 1
        label = f"'{token_label(tokenizer, token)}'"
        likely = (f"'{token_label(tokenizer, t)}'" for t in log_probs.topk(3).indices.tolist())
        print(f"{label:16}{math.exp(log_prob):11.2g}{rank:7}  {' '.join(likely)}")
        total -= log_prob / math.log(2)
        n_bytes += len(token_bytes(tokenizer, token))
    print(f"{total:.1f} bits in {n_bytes} bytes: {total / n_bytes:.2f} bits/byte")


def main(argv=None):
    parser = prepare_data.flag_parser(SampleConfig(), __doc__)
    config = SampleConfig(**vars(parser.parse_args(argv)))
    if config.num_samples < 1:
        raise ValueError(f"--num_samples={config.num_samples}: must be 1 or more")
    if config.top_p > 1:
        raise ValueError(f"--top_p={config.top_p}: must be from 0 to 1")
    if config.chat and sys.stdin is None:
        raise ValueError("--chat reads standard input, which is closed")
    prompt = config.start
    if prompt.startswith("FILE:"):
        documents = read_documents([prompt.removeprefix("FILE:")])
        prompt = clean("".join(text for _, text in documents))
    if not prompt and (config.attention or config.surprise or config.start):
        raise ValueError("--start is empty: give it some text")
    model, tokenizer, checkpoint = load_model(config)
    if config.save_pretrained:
        # written last, so that an export that is cut short is not taken for a model
        pathlib.Path(config.save_pretrained, "config.json").unlink(missing_ok=True)
        prepare_data.save_tokenizer(checkpoint["tokenizer"], config.save_pretrained)
        model.save_pretrained(config.save_pretrained, tokenizer.eot_token)
        print(f"wrote the model and its tokenizer to {config.save_pretrained}")
        return
    to_device(model, config)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(config.seed)
    if config.attention:
        draw_attention(model, tokenizer, prompt, config.attention)
    if config.surprise:
        print_surprise(model, tokenizer, prompt)
    if config.chat:
        chat(model, tokenizer, checkpoint, config, generator)
    elif not (config.attention or config.surprise):
        write_samples(model, tokenizer, prompt, config, generator)


if __name__ == "__main__":
    prepare_data.script(main)
