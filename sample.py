"""Generates text from a trained GPT.

python sample.py                                            # from out/, a new document
python sample.py --init_from=out/book --start="It was a"    # goes on from there
python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.7 --top_p=0.9
python sample.py --init_from=gpt2 --start="It was a"        # OpenAI's GPT-2
python sample.py --init_from=out --save_pretrained=mine     # for transformers and its kin
"""

import codecs
import pathlib
import sys
import time

import torch

from gpt import GPT, load_checkpoint, pick_device
from prepare_data import (
    END_OF_TEXT,
    ArgumentParser,
    build_tokenizer,
    count,
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
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}")
    if not start:
        raise ValueError("--start is empty; omit it to begin a new document")
    return start


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
    """A checkpoint -> (model, tokenizer, its spec). The vocabulary is cropped to the tokenizer's."""
    checkpoint = load_checkpoint(path)
    try:
        model = GPT.from_checkpoint(checkpoint)
        spec = tokenizer_of(checkpoint, path)
        tokenizer = build_tokenizer(spec)
        if model.config.vocab_size < tokenizer.n_vocab:
            raise ValueError(f"{tokenizer.n_vocab} tokens, but the model knows fewer")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if model.config.vocab_size > tokenizer.n_vocab:
        model.resize_vocab(tokenizer.n_vocab)
    return model.to(device), tokenizer, spec


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
    idx = torch.tensor([tokens] * args.num_samples, device=device)
    steps = model.generate(
        idx,
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        stop_token=end,
        generator=torch.Generator(device).manual_seed(args.seed),
    )
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


@script
def main(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--init_from", default="out", help="a run's folder, gpt2, a Hugging Face folder")
    add("--start", help="the text to go on from, or FILE:name (default: a new document)")
    add("--num_samples", type=count, default=1, help="how many, made in one batch")
    add("--max_new_tokens", type=count, default=500, help="the most that a sample may have")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top_k", type=int, default=200, help="choose among the k likeliest tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="... among those that reach probability p")
    add("--seed", type=int, default=1337, help="the same seed writes the same text")
    add("--device", help="cpu, cuda, mps (default: the best there is)")
    add("--save_pretrained", metavar="FOLDER", help="write no text, but the model for transformers")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature={args.temperature}: must be 0 or more")
    if args.top_k < 0:
        raise ValueError(f"--top_k={args.top_k}: must be 0 or more")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p={args.top_p}: must be above 0 and at most 1")
    prompt = None if args.start is None else read_prompt(args.start)
    model, tokenizer, spec = load_model(args.init_from, pick_device(args.device))
    if args.save_pretrained:
        save_tokenizer(spec, args.save_pretrained, model.config.block_size)
        model.save_pretrained(args.save_pretrained, tokenizer.encode_single_token(END_OF_TEXT))
        print(f"wrote model and tokenizer to {args.save_pretrained}")
        return
    start = time.perf_counter()
    made = write_samples(model, tokenizer, prompt, args)
    seconds = time.perf_counter() - start
    print(f"{made} tokens in {seconds:.1f} s: {made / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
