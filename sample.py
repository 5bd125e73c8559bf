"""Generates text from a trained GPT.

python sample.py                                            # from out/, a new document
python sample.py --init_from=out/book --start="It was a"    # goes on from there
python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.7 --top_p=0.9
python sample.py --init_from=gpt2 --start="It was a"        # OpenAI's GPT-2
python sample.py --init_from=out/instruct --chat            # a conversation
python sample.py --start="# os.path." --surprise            # what it expected
python sample.py --start="# os.path." --attention=attention.png
python sample.py --init_from=out --save_pretrained=mine     # for transformers and its kin
"""

import argparse
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
    END_OF_TEXT,
    ArgumentParser,
    build_tokenizer,
    chat_prompt,
    count,
    default_template,
    save_tokenizer,
    script,
    tokenizer_of,
)


def read_prompt(start):
    """--start as text; FILE:name stands for what the file holds."""
    if start.startswith("FILE:"):
        path = pathlib.Path(start.removeprefix("FILE:"))
        try:
            start = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    if not start:
        raise ValueError("--start is empty; omit it to begin a new document")
    return start


def seed(text):
    """An argparse type: a whole number that fits 63 bits."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number below 2**63, not {text!r}")
    return int(text)


class TextDecoder:
    """Tokens to text as they come: bytes of an unfinished character wait for the rest of it."""

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
    """-> model, tokenizer, checkpoint. The model's vocabulary is cropped to the tokenizer's, whose
    spec is checkpoint["tokenizer"]."""
    checkpoint = load_checkpoint(path)
    try:
        model = GPT.from_checkpoint(checkpoint)
        checkpoint["tokenizer"] = tokenizer_of(checkpoint, path)
        tokenizer = build_tokenizer(checkpoint["tokenizer"])
        if model.config.vocab_size < tokenizer.n_vocab:
            known = model.config.vocab_size
            raise ValueError(f"{tokenizer.n_vocab} tokens, of which the model knows {known}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if model.config.vocab_size > tokenizer.n_vocab:
        model.resize_vocab(tokenizer.n_vocab)
    return model.to(device), tokenizer, checkpoint


def new_generator(args, device):
    return torch.Generator(device).manual_seed(args.seed)


def generate(model, prompts, args, end, generator):
    """GPT.generate for prompts of one length, lists of tokens, as the flags say."""
    idx = torch.tensor(prompts, device=model.transformer.wte.weight.device)
    how = (args.temperature, args.top_k, args.top_p, end, generator)
    return model.generate(idx, args.max_new_tokens, *how)


def write_samples(model, tokenizer, prompt, args):
    """Writes args.num_samples continuations of prompt, the first as it is made -> tokens made."""
    device = model.transformer.wte.weight.device
    end = tokenizer.encode_single_token(END_OF_TEXT)
    tokens = tokenizer.encode_ordinary(prompt) if prompt else [end]
    if len(tokens) > model.config.block_size:
        print(
            f"note: of the prompt's {len(tokens)} tokens, the model sees the last "
            f"{model.config.block_size}",
            file=sys.stderr,
        )
    steps = generate(model, [tokens] * args.num_samples, args, end, new_generator(args, device))
    decoders = [TextDecoder(tokenizer) for _ in range(args.num_samples)]
    texts = [prompt or ""] * args.num_samples
    made = 0
    print(texts[0], end="", flush=True)
    for step in steps:
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
    return made


def prompt_of(messages, tokenizer, template, limit):
    """chat_prompt of at most limit tokens: the oldest exchanges are left out, as far as needed."""
    tokens = chat_prompt(messages, tokenizer, template)
    if len(tokens) > limit and len(messages) > 1:
        return prompt_of(messages[2:], tokenizer, template, limit)
    return tokens[-limit:]


def chat(model, tokenizer, template, args):
    """Answers what is typed, line by line. Ctrl-C ends an answer, Ctrl-D the conversation."""
    device, block_size = model.transformer.wte.weight.device, model.config.block_size
    end = tokenizer.encode_single_token(END_OF_TEXT)
    generator, messages = new_generator(args, device), []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        messages.append({"role": "user", "content": text})
        room = min(args.max_new_tokens, block_size // 2)  # for the answer
        prompt = prompt_of(messages, tokenizer, template, block_size - room)
        decoder, answer = TextDecoder(tokenizer), ""
        with contextlib.suppress(KeyboardInterrupt):
            for step in generate(model, [prompt], args, end, generator):
                if int(step) != end:
                    answer += (part := decoder.decode(int(step)))
                    print(part, end="", flush=True)
        print(rest := decoder.rest())
        messages.append({"role": "assistant", "content": answer + rest})


def draw_attention(model, tokenizer, text, path):
    """Draws who looks at whom in text, a panel for each layer and head."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--attention needs matplotlib: pip install matplotlib") from error
    tokens = tokenizer.encode_ordinary(text)[: min(64, model.config.block_size)]
    idx = torch.tensor([tokens], device=model.transformer.wte.weight.device)
    maps = model.attention_maps(idx)[:, 0].cpu().numpy()  # (n_layer, n_head, T, T)
    layers, heads = maps.shape[:2]
    names = [repr(tokenizer.decode([token]))[1:-1] for token in tokens]
    side = max(2, len(tokens) / 7)
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


@torch.no_grad()
def print_surprise(model, tokenizer, text):
    """Prints, for every token of text, its probability, its rank and what was expected instead."""
    end = tokenizer.encode_single_token(END_OF_TEXT)
    tokens = [end, *tokenizer.encode_ordinary(text)][: model.config.block_size + 1]
    idx = torch.tensor([tokens[:-1]], device=model.transformer.wte.weight.device)
    shaded = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"{'token':16}{'probability':>11}{'rank':>7}  expected")
    bits = 0.0
    for token, probs in zip(tokens[1:], model(idx)[0].softmax(-1)):
        p = probs[token].item()
        rank, bits = int((probs > p).sum()) + 1, bits - math.log2(max(p, 1e-45))
        expected = (repr(tokenizer.decode([int(i)])) for i in probs.topk(3).indices)
        line = f"{tokenizer.decode([token])!r:16}{p:11.4f}{rank:7}  {' '.join(expected)}"
        # from dark, expected, to light, a surprise
        print(f"\x1b[38;5;{255 - round(15 * p)}m{line}\x1b[0m" if shaded else line)
    length = len(tokenizer.decode(tokens[1:]).encode())
    print(f"{bits:.1f} bits in {length} bytes: {bits / length:.2f} bits/byte")


def parse_args(argv):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--init_from", default="out", help="a run's folder, gpt2, a Hugging Face folder")
    add("--start", help="the text to go on from, or FILE:name (default: a new document)")
    add("--num_samples", type=count, default=1, help="how many, made in one batch")
    add("--max_new_tokens", type=count, default=500, help="the most that a sample may have")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top_k", type=int, default=200, help="choose among the k likeliest tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="... among those that reach probability p")
    add("--seed", type=seed, default=1337, help="the same seed writes the same text")
    add("--device", help="cpu, cuda, mps (default: the best there is)")
    add("--attention", metavar="PNG", help="draw who looks at whom in --start")
    add("--surprise", action="store_true", help="show how likely each token of --start was")
    add("--chat", action="store_true", help="a conversation with a model that finetune.py has made")
    add("--save_pretrained", metavar="FOLDER", help="write no text, but the model for transformers")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature={args.temperature}: must be 0 or more")
    if args.top_k < 0:
        raise ValueError(f"--top_k={args.top_k}: must be 0 or more")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p={args.top_p}: must be above 0 and at most 1")
    if args.start is not None and (args.chat or args.save_pretrained is not None):
        raise ValueError("--start is for text, not for --chat or --save_pretrained")
    if (args.attention or args.surprise) and args.start is None:
        raise ValueError("--attention and --surprise look at a text: give --start")
    return args


@script
def main(argv=None):
    args = parse_args(argv)
    prompt = None if args.start is None else read_prompt(args.start)
    model, tokenizer, checkpoint = load_model(args.init_from, pick_device(args.device))
    if args.chat:
        chat(model, tokenizer, checkpoint.get("template") or default_template(tokenizer), args)
        return
    if args.save_pretrained is not None:
        save_tokenizer(checkpoint["tokenizer"], args.save_pretrained, model.config.block_size)
        model.save_pretrained(args.save_pretrained, tokenizer.encode_single_token(END_OF_TEXT))
        print(f"wrote model and tokenizer to {args.save_pretrained}")
        return
    if args.attention:
        draw_attention(model, tokenizer, prompt, pathlib.Path(args.attention))
    if args.surprise:
        print_surprise(model, tokenizer, prompt)
    if args.attention or args.surprise:
        return
    start = time.perf_counter()
    made = write_samples(model, tokenizer, prompt, args)
    seconds = time.perf_counter() - start
    print(f"{made} tokens in {seconds:.1f} s: {made / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
