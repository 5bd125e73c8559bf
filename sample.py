"""Writes text with a trained GPT.

    python sample.py                                            # from out/, a new document
    python sample.py --init_from=out/book --start="It was a"    # goes on from there
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.7 --top_p=0.9
    python sample.py --init_from=gpt2 --start="It was a"        # OpenAI's GPT-2
    python sample.py --init_from=out/instruct --chat            # a conversation
    python sample.py --start="# os.path." --surprise            # how likely is each token?
    python sample.py --start="# os.path." --attention=attention.png
    python sample.py --init_from=out --save_pretrained=mine     # for transformers and its kin

Reads what train.py and finetune.py have made, and GPT-2 in Hugging Face's or nanoGPT's format.
"""

import codecs
import contextlib
import math
import os
import pathlib
import sys
import time

import numpy as np
import torch

from gpt import GPT, load_checkpoint, pick_device, replacing
from prepare_data import (
    ArgumentParser,
    build_tokenizer,
    chat_prompt,
    count,
    decode,
    default_template,
    save_tokenizer,
    script,
    tokenizer_of,
)


def read_prompt(start):
    """The text of --start; FILE:name stands for the text in that file."""
    if start.startswith("FILE:"):
        path = pathlib.Path(start.removeprefix("FILE:"))
        start = decode(path.read_bytes(), path)
    if not start:
        raise ValueError("--start is empty; omit it to begin a new document")
    return start


class TextDecoder:
    """Tokens to text, one by one: the bytes of a character wait until it is complete."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token):
        try:
            return self.utf8.decode(self.tokenizer.decode_single_token_bytes(token))
        except KeyError:  # some of tiktoken's vocabularies leave ids out
            return ""

    def rest(self):
        return self.utf8.decode(b"", final=True)


def load_model(path, device):
    """-> model, tokenizer, checkpoint, in which "tokenizer" is the spec of the tokenizer.

    A vocabulary that is padded to a round size is cropped, so that no padding is ever sampled.
    """
    checkpoint = load_checkpoint(path)
    try:
        model = GPT.from_checkpoint(checkpoint)
        checkpoint["tokenizer"] = tokenizer_of(checkpoint, path)
        tokenizer = build_tokenizer(checkpoint["tokenizer"])
        model.crop_vocab(tokenizer.n_vocab)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model.to(device), tokenizer, checkpoint


def as_batch(model, sequences):
    """Lists of tokens, all of one length -> (B, T) on the model's device."""
    return torch.tensor(sequences, device=model.transformer.wte.weight.device)


def write_samples(model, tokenizer, prompt, num_samples, how):
    """Prints continuations of prompt, "" for a new document; the first appears as it is made."""
    end, block_size = tokenizer.eot_token, model.config.block_size
    tokens = tokenizer.encode_ordinary(prompt) or [end]
    if len(tokens) > block_size:
        seen = f"of the prompt's {len(tokens)} tokens, the model sees the last {block_size}"
        print(f"note: {seen}", file=sys.stderr)
    decoders = [TextDecoder(tokenizer) for _ in range(num_samples)]
    texts, made, start = [prompt] * num_samples, 0, time.perf_counter()
    print(prompt, end="", flush=True)
    for step in model.generate(as_batch(model, [tokens] * num_samples), **how):
        for i, token in enumerate(step.tolist()):
            if token == end:
                continue
            made += 1
            text = decoders[i].decode(token)
            texts[i] += text
            if i == 0:
                print(text, end="", flush=True)
    print(decoders[0].rest())
    for text, decoder in zip(texts[1:], decoders[1:]):
        print("-" * 80, text + decoder.rest(), sep="\n")
    seconds = time.perf_counter() - start
    print(f"{made} tokens in {seconds:.1f} s: {made / seconds:,.0f} tokens/s", file=sys.stderr)


def fitting_prompt(messages, tokenizer, template, limit):
    """chat_prompt of at most limit tokens: the oldest exchanges are left out, as far as needed."""
    tokens = chat_prompt(messages, tokenizer, template)
    if len(tokens) > limit and len(messages) > 1:
        return fitting_prompt(messages[2:], tokenizer, template, limit)
    return tokens[-limit:]


def chat(model, tokenizer, template, how):
    """Answers each line that is typed. Ctrl-C ends an answer, Ctrl-D the conversation."""
    block_size = model.config.block_size
    # at least half of the context is for what has been said, the rest for the answer
    limit = block_size - min(how["max_new_tokens"], block_size // 2)
    messages = []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        messages.append({"role": "user", "content": question})
        prompt = fitting_prompt(messages, tokenizer, template, limit)
        decoder, answer = TextDecoder(tokenizer), ""
        with contextlib.suppress(KeyboardInterrupt):
            for token in map(int, model.generate(as_batch(model, [prompt]), **how)):
                if token != tokenizer.eot_token:
                    text = decoder.decode(token)
                    answer += text
                    print(text, end="", flush=True)
        rest = decoder.rest()
        print(rest)
        messages.append({"role": "assistant", "content": answer + rest})


def draw_attention(model, tokenizer, text, path):
    """Draws who looks at whom in text (its first 64 tokens), a panel for each layer and head."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--attention needs matplotlib: pip install matplotlib") from error
    tokens = tokenizer.encode_ordinary(text)[: min(64, model.config.block_size)]
    maps = model.attention_maps(as_batch(model, [tokens]))[:, 0]  # (n_layer, n_head, T, T)
    maps = maps.cpu().numpy()
    layers, heads = maps.shape[:2]
    names = [repr(tokenizer.decode([token]))[1:-1] for token in tokens]
    side = max(2, len(tokens) / 7)  # of a panel, inches
    figure = Figure(figsize=(side * heads, side * layers), layout="constrained")
    for (layer, head), panel in np.ndenumerate(figure.subplots(layers, heads, squeeze=False)):
        panel.imshow(maps[layer, head], vmin=0, cmap="Blues")
        panel.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
        panel.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        panel.set_yticks(range(len(names)), names, fontsize=6)
    figure.supxlabel("is looked at")
    figure.supylabel("looks")
    with replacing(path) as file:
        figure.savefig(file, dpi=100, format="png")


# from grey, expected, to red, a surprise: colours that are legible on black and on white
SHADES = (244, 138, 131, 167, 203, 196)


@torch.no_grad()
def print_surprise(model, tokenizer, text):
    """Prints, for the tokens of text, as many as fit the context: probability, rank, and what was
    expected instead."""
    # a document begins after the end of another
    tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(text)][: model.config.block_size + 1]
    shaded = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"{'token':16}{'probability':>11}{'rank':>7}  expected")
    total = 0.0
    for token, log_probs in zip(
        tokens[1:], model(as_batch(model, [tokens[:-1]]))[0].log_softmax(-1)
    ):
        bits = -log_probs[token].item() / math.log(2)
        total += bits
        rank = int((log_probs > log_probs[token]).sum()) + 1
        expected = " ".join(repr(tokenizer.decode([i])) for i in log_probs.topk(3).indices.tolist())
        line = f"{tokenizer.decode([token])!r:16}{2**-bits:11.4f}{rank:7}  {expected}"
        shade = SHADES[min(int(bits / 2), len(SHADES) - 1)]
        print(f"\x1b[38;5;{shade}m{line}\x1b[0m" if shaded else line)
    length = len(tokenizer.decode_bytes(tokens[1:]))
    print(f"{total:.1f} bits in {length} bytes: {total / length:.2f} bits/byte")


def parse_args(argv):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--init_from", default="out", help="a run's folder, gpt2, a Hugging Face folder")
    add("--start", help="the text to go on from, or FILE:name (default: a new document)")
    add("--num_samples", type=count, default=1, help="how many, made in one batch")
    add("--max_new_tokens", type=count, default=500, help="the most that a sample may have")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top_k", type=int, default=200, help="choose among the k likeliest tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="of these, the fewest that reach probability p")
    add("--seed", type=int, default=1337, help="the same seed writes the same text")
    add("--device", help="cpu, cuda, mps (default: the best there is)")
    add("--attention", metavar="PNG", help="draw who looks at whom in --start")
    add("--surprise", action="store_true", help="show how likely each token of --start was")
    add("--chat", action="store_true", help="a conversation with a model that finetune.py has made")
    add("--save_pretrained", metavar="FOLDER", help="write the model as a Hugging Face folder")
    args = parser.parse_args(argv)
    for name, fits, must in [
        ("temperature", 0 <= args.temperature < math.inf, "be 0 or more, and finite"),
        ("top_k", args.top_k >= 0, "be 0 or more"),
        ("top_p", 0 < args.top_p <= 1, "be above 0 and at most 1"),
        ("seed", 0 <= args.seed < 2**63, "be 0 or more, and below 2**63"),
    ]:
        if not fits:
            raise ValueError(f"--{name}={getattr(args, name)}: must {must}")
    looks = args.attention is not None or args.surprise
    if looks + args.chat + (args.save_pretrained is not None) > 1:
        raise ValueError(
            "--chat, --save_pretrained and --attention or --surprise: only one of them"
        )
    if args.start is not None and (args.chat or args.save_pretrained is not None):
        raise ValueError("--start is for text, not for --chat or --save_pretrained")
    if looks and args.start is None:
        raise ValueError("--attention and --surprise look at a text: give --start")
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    prompt = "" if args.start is None else read_prompt(args.start)
    device = pick_device(args.device)
    model, tokenizer, checkpoint = load_model(args.init_from, device)
    how = {
        name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")
    }
    how |= {"stop_token": tokenizer.eot_token}
    how |= {"generator": torch.Generator(device).manual_seed(args.seed)}
    if args.attention is not None:
        draw_attention(model, tokenizer, prompt, pathlib.Path(args.attention))
    if args.surprise:
        print_surprise(model, tokenizer, prompt)
    elif args.chat:
        chat(model, tokenizer, checkpoint.get("template") or default_template(tokenizer), how)
    elif args.save_pretrained is not None:
        save_tokenizer(checkpoint["tokenizer"], args.save_pretrained, model.config.block_size)
        model.save_pretrained(args.save_pretrained, tokenizer.eot_token)
        print(f"wrote model and tokenizer to {args.save_pretrained}")
    elif args.attention is None:
        write_samples(model, tokenizer, prompt, args.num_samples, how)


if __name__ == "__main__":
    main()
