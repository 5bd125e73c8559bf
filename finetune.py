"""Teaches a trained GPT a task: to classify texts, follow instructions, prefer better answers.

    python finetune.py --task=classify      # which package of the library is a docstring from?
    python finetune.py --task=instruct      # "Explain os.path.join(path, *paths)." -> a sentence
    python finetune.py --task=classify --data=spam.tsv --out_dir=out/spam --train=lora
    python finetune.py --task=classify --init_from=out/spam --predict="You won! Call 09061701461"
    python finetune.py --task=instruct --init_from=gpt2 --data=instructions.json
    python finetune.py --task=choice --data=hellaswag.jsonl             # only measures
    python finetune.py --task=dpo --init_from=out/instruct              # prefer the better answer
    python finetune.py --task=reward --init_from=out/instruct           # score answers
    python finetune.py --task=ppo --init_from=out/instruct              # write what scores high

The loop is train.py's. A task adds its examples, the batches it makes of them, the loss and what is
measured. Without --data, a task takes the examples that prepare_data.py makes of Python's manual.
best.pt is a whole model, like any other; last.pt has only what was trained, and names the base.
"""

import collections
import copy
import csv
import hashlib
import io
import json
import math
import pathlib
import time
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gpt import GPT, load_checkpoint, next_token_loss, replacing
from prepare_data import (
    build_tokenizer,
    chat_parts,
    chat_prompt,
    clean,
    decode,
    default_template,
    parse_json,
    position,
    read_json,
    replace_text,
    script,
    sole_owner,
    tokenizer_of,
)
from train import (
    Machine,
    RunConfig,
    Trainer,
    explain_out_of_memory,
    format_metrics,
    load_data,
    mean_loss,
    merge_flags,
    option,
    parse_flags,
    seed_dropout,
    set_aside,
)

# --- what can be set ------------------------------------------------------------------------------

MEASURED = 100  # at most so many held-out prompts are answered for a report


@dataclass
class FinetuneConfig(RunConfig):
    task: str = option(
        "instruct",
        "what to learn",
        fixed=True,
        choices=("classify", "instruct", "choice", "dpo", "reward", "ppo"),
    )
    init_from: str = option("out", "the model to begin with: a run's folder, gpt2, ...; or resume")
    out_dir: str | None = option(None, "folder to write (default: out/TASK)")
    data: str | None = option(None, "examples: .jsonl, .json, .csv, .tsv (default: the manual's)")
    val: str | None = option(None, "examples for validation (default: some of data)")
    test: str | None = option(None, "for classify: examples for the test (default: some of data)")
    train: str = option(
        "all", "weights to train", fixed=True, choices=("all", "last_block", "head", "lora")
    )
    lora_rank: int = option(8, "rank of the matrices that LoRA adds", fixed=True)
    lora_alpha: float = option(16.0, "LoRA's part is scaled by alpha / rank", fixed=True)
    lora_dropout: float = option(0.0, "on the input of LoRA's part", fixed=True)
    block_size: int | None = option(
        None, "another context; a longer one trains the position table", fixed=True
    )
    # where None stands, a task has its own default
    dropout: float | None = option(None, "on embeddings and residual branches", fixed=True)
    batch_size: int | None = option(None, "examples in a micro-batch", fixed=True)
    learning_rate: float | None = option(None, "the highest, at the end of warmup")
    epochs: float | None = option(None, "passes through the examples", fixed=True)
    max_iters: int | None = option(None, "steps (default: as many as epochs take)")
    eval_interval: int | None = option(None, "steps between evaluations (default: an epoch's)")
    log_interval: int | None = option(None, "steps between lines of output")
    eval_only: bool = option(False, "measure, without training")
    # classify
    text_field: str = option("text", "column with the text", fixed=True)
    label_field: str = option("label", "column with the label", fixed=True)
    lm_weight: float = option(0.5, "weight of the next-token loss beside the labels'", fixed=True)
    balance: bool = option(False, "keep as many of each label as the rarest has", fixed=True)
    predict: str | None = option(None, "a text to classify or an answer to score, without training")
    # instruct
    template: str | None = option(
        None, "of prompts (default: by the vocabulary)", fixed=True, choices=("roles", "alpaca")
    )
    loss_on_prompt: bool = option(False, "learn the prompts, too", fixed=True)
    max_new_tokens: int | None = option(None, "the longest answer that is sampled")
    # dpo, ppo
    beta: float | None = option(None, "how much it costs to leave the reference", fixed=True)
    reward_model: str = option("out/reward", "for ppo: what --task=reward has made")
    max_kl: float = option(10.0, "ppo stops at this mean KL from its start, nats an answer")

    def __post_init__(self):
        task = TASKS.get(self.task, Task)
        if self.predict is not None and not hasattr(task, "predict"):
            raise ValueError("--predict is for --task=classify and --task=reward")
        if self.test is not None and "test" not in task.fractions:
            raise ValueError("--test is for --task=classify; the others have --val")
        if self.train == "head" and not task.has_head:
            raise ValueError("--train=head is for classify and reward; there is --train=last_block")
        if self.task == "ppo" and (self.epochs is not None or self.gradient_accumulation_steps > 1):
            raise ValueError("--task=ppo goes by --max_iters: no epochs, no accumulation of steps")
        if self.epochs == 0 or self.lora_dropout >= 1:
            raise ValueError("--epochs must be above 0, and --lora_dropout below 1")
        for name, value in {"out_dir": f"out/{self.task}", **task.defaults}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.eval_only |= self.task == "choice"
        if self.task == "choice" and self.data is None:
            raise ValueError("--task=choice: give the questions, --data=FILE")
        if self.task == "choice" and self.val is not None:
            raise ValueError("--task=choice measures --data: it has no --val")
        super().__post_init__()  # the checks of each field


# --- which weights to train -----------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A x, where W stays as it is and A and B, both small, are trained.

    Hu et al. 2021, "LoRA", section 4.1; A begins as in the authors' code, and B as 0, so nothing is
    changed at first. Replaces a linear layer, sharing its weight and bias.
    """

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (B, T, rank)
        return super().forward(x) + F.linear(self.scale * low, self.lora_B)

    def merged(self):
        """The one matrix that does the same."""
        return self.weight + self.scale * self.lora_B @ self.lora_A


def add_lora(gpt, rank, alpha, dropout):
    """Gives each projection of attention and MLP its pair of small matrices."""
    for block in gpt.transformer.h:
        for part in (block.attn, block.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, LoRALinear(linear, rank, alpha, dropout))


def merged_weights(gpt):
    """The state_dict of the same model without LoRA."""
    weights = {name: w for name, w in gpt.state_dict().items() if "lora_" not in name}
    for name, module in gpt.named_modules():
        if isinstance(module, LoRALinear):
            weights[f"{name}.weight"] = module.merged().detach()
    return weights


def freeze(gpt, train):
    """Freezes all of gpt but what --train names; a task's own head lies outside, and learns."""
    gpt.requires_grad_(train == "all")
    if train == "last_block":
        gpt.transformer.h[-1].requires_grad_(True)
        gpt.transformer.ln_f.requires_grad_(True)
    for name, parameter in gpt.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)


# --- reading examples -----------------------------------------------------------------------------


def read_rows(path, columns=()):
    """Yields (where, row) of a .jsonl, .json, .csv or .tsv file; a row is {column: value}.

    A .tsv file of two columns without a header line has these columns.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".jsonl", ".json", ".csv", ".tsv"):
        raise ValueError(f"{path}: give a .jsonl, .json, .csv or .tsv file")
    rows = read_json(path) if "json" in path.suffix else read_table(path, columns)
    for where, row in rows:
        match row:
            case dict():
                yield where, row
            case _:
                raise ValueError(f"{where}: not an object with columns")


def read_table(path, columns):
    text = decode(path.read_bytes(), path).removeprefix("\ufeff")
    if path.suffix == ".tsv":  # in which quotes are plain characters
        table = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        table = csv.reader(io.StringIO(text), strict=True)
    try:
        rows = [(f"{path}, line {table.line_num}", row) for row in table if row]
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num}: {error}") from error
    names = rows[0][1] if rows else []
    if path.suffix == ".tsv" and columns and len(names) == 2 and set(names) != set(columns):
        names = columns
    else:
        del rows[:1]
    for where, row in rows:
        if len(row) != len(names):
            raise ValueError(f"{where}: {len(row)} columns, but {len(names)} names")
        yield where, dict(zip(names, row))


def text_of(row, where, *names):
    """The text in the first of these columns that the row has, cleaned."""
    for name in names:
        if name in row:
            if not isinstance(row[name], (str, int, float)):
                raise ValueError(f"{where}: {name} is not text")
            return clean(str(row[name]))
    raise ValueError(f"{where}: no column {' or '.join(names)} (found: {', '.join(row)})")


def messages_of(row, where):
    """A conversation [{"role", "content"}] from "messages", or from "instruction" and "input"."""
    if "messages" not in row:
        text = text_of(row, where, "instruction", "prompt")
        context = text_of(row, where, "input") if row.get("input") else ""
        text += f"\n\n### Input:\n{context}" if context else ""
        prompt = [{"role": "user", "content": text}]
        return answered(prompt, text_of(row, where, "output")) if "output" in row else prompt
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise ValueError(f"{where}: messages need a role (system, user, assistant) and a content")
    return [{"role": m["role"], "content": clean(m["content"])} for m in messages]


def is_message(item):
    match item:
        case {"role": "system" | "user" | "assistant", "content": str()}:
            return True
    return False


def answered(messages, text):
    """The conversation with this as the assistant's next message."""
    return [*messages, {"role": "assistant", "content": text}]


def prompt_of(row, where):
    """A row's conversation without the answers at its end, as an example."""
    messages = messages_of({name: row[name] for name in row if name != "output"}, where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {"messages": messages, "position": position_of(row, messages, where)}


def position_of(row, prompt, where):
    """From 0 to 1, the same for all rows of a "group" or, where there is none, of a prompt."""
    if not any(message["content"] for message in prompt):
        raise ValueError(f"{where}: there is no prompt")
    return position(group_of(row, "\n".join(message["content"] for message in prompt)))


def group_of(row, default):
    """What no split divides: the row's "group", or where it has none, default."""
    group = row.get("group")
    return default if group in (None, "") else str(group)


def split_examples(files, fractions):
    """{split: examples}. A split that has no file is taken from train: first val, then test get
    their fractions, by the examples' "position" from 0 to 1; the rest stays."""
    splits, start = {"train": [], "val": [], "test": [], **files}, 0.0
    for name, fraction in fractions.items():
        if name not in files:
            end = start + fraction
            splits[name] = [e for e in files["train"] if start <= e["position"] < end]
            start = end
    splits["train"] = [e for e in files["train"] if e["position"] >= start]
    return splits


# --- examples to batches --------------------------------------------------------------------------


def to_row(parts, block_size, loss_on_prompt=False):
    """[(tokens, is_answer), ...] -> idx, targets: lists of one length, at most block_size.

    Only tokens of answers are targets (with loss_on_prompt, all); elsewhere stands -100. What is
    too long is cut: first tokens before the last answer, from the oldest on; if the answer alone is
    still too long, its end.
    """
    tokens = [token for part, _ in parts for token in part]
    learned = [is_answer or loss_on_prompt for part, is_answer in parts for _ in part]
    last_answer = len(tokens) - len(parts[-1][0])
    start = max(0, min(len(tokens) - 1 - block_size, last_answer - 1))
    tokens, learned = (items[start : start + block_size + 1] for items in (tokens, learned))
    targets = [token if learn else -100 for token, learn in zip(tokens[1:], learned[1:])]
    return tokens[:-1], targets


def pad(rows, fill):
    """Lists of numbers -> (B, T). The fill comes after them, where causal attention ignores it."""
    length = max(map(len, rows))
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def pad_and_last(rows, fill):
    """Lists of tokens -> idx (B, T), and where the last token of each is, (B,)."""
    return pad(rows, fill), torch.tensor([len(row) - 1 for row in rows])


class Shuffled:
    """An endless, reproducible sequence of batches, each of examples of about the same length.

    Every epoch shuffles the examples, sorts each 32 batches of them by length, and shuffles the
    batches. The n-th batch depends on seed and n alone, as in train.Windows.
    """

    def __init__(self, lengths, batch_size, seed):
        self.lengths, self.batch_size, self.seed = np.array(lengths), batch_size, seed
        self.per_epoch = math.ceil(len(lengths) / batch_size)
        self.shuffle(0)

    def shuffle(self, epoch):
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        chunks = np.split(order, range(32 * self.batch_size, len(order), 32 * self.batch_size))
        order = np.concatenate([c[np.argsort(self.lengths[c], kind="stable")] for c in chunks])
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        self.epoch, self.batches = epoch, [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, n):
        """The numbers of the examples in batch n."""
        epoch, i = divmod(n, self.per_epoch)
        if epoch != self.epoch:
            self.shuffle(epoch)
        return self.batches[i]

    def padding(self):
        """The share of padding in this epoch's batches."""
        padded = sum(len(batch) * self.lengths[batch].max() for batch in self.batches)
        return 1 - self.lengths.sum() / padded


# --- what the tasks have in common ----------------------------------------------------------------


class Task:
    """What train.Trainer asks of a task, as far as all of them here answer alike.

    Each adds

    defaults            of the config
    parse(row, where)   a row of a file -> an example; split_examples needs its "position"
    encode(example)     -> lists of numbers, of which the first is idx
    collate(encoded)    a list of these -> what model takes; the last tensor has a place for each
                        term of the mean loss, and -100 where there is none
    report(folder)      prints, and writes where there is a folder, what the model does at the end
    """

    columns = ("val_loss",)  # for metrics.csv: what evaluate measures, and stats of the trainer
    bits_per_byte = None
    header = ()  # the columns of a .tsv file without a header line
    trainer = Trainer
    has_head = False  # best.pt has a head, without which it can neither predict nor be measured
    file = "instruct.jsonl"  # the examples, where --data is not given
    fractions: ClassVar = {"val": 0.1}  # of the examples, where no files are given
    defaults: ClassVar = {
        "batch_size": 8,
        "dropout": 0.0,
        "learning_rate": 1e-3,
        "epochs": 3.0,
        "log_interval": 50,
    }

    def __init__(self, config, machine, checkpoint, path):
        kinds = {"task": str, "template": str, "head": dict}
        wrong = [k for k, kind in kinds.items() if not isinstance(checkpoint.get(k, kind()), kind)]
        if wrong:
            raise ValueError(f"{path}: damaged, its {wrong[0]} is of another kind")
        self.config, self.machine = config, machine
        self.spec = tokenizer_of(checkpoint, path)
        self.tokenizer = build_tokenizer(self.spec)
        self.end = self.tokenizer.eot_token
        try:
            self.gpt = GPT.from_checkpoint(checkpoint, dropout=config.dropout, attn_dropout=0.0)
            self.gpt.crop_vocab(self.tokenizer.n_vocab)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.block_size = config.block_size or self.gpt.config.block_size
        self.has_new_positions = self.block_size > self.gpt.config.block_size
        if self.block_size != self.gpt.config.block_size:
            self.gpt.resize_positions(self.block_size)
        default = checkpoint.get("template") or default_template(self.tokenizer)
        self.template = config.template or default
        if self.template == "roles" and default_template(self.tokenizer) != "roles":
            raise ValueError("--template=roles: the model's vocabulary has no tokens for roles")
        self.cut = 0  # texts that were too long
        needs_head = self.has_head and (config.eval_only or config.predict is not None)
        if needs_head and checkpoint.get("task") != config.task:
            raise ValueError(f"{path}: has no head for this; --task={config.task} trains one")
        if config.predict is None:
            self.load()
        self.model = self.make_model()
        if needs_head:
            try:
                self.model.head.load_state_dict(checkpoint["head"])
            except (KeyError, RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: damaged head ({error!r:.90})") from error

    def make_model(self):
        """What is trained: a module that makes the loss of a batch."""
        return self.gpt

    def load(self):
        """Reads the examples and makes numbers of them."""
        config, source = self.config, self.config.data or f"data/{self.file}"
        if config.data is None:
            load_data("data")
            if not pathlib.Path(source).exists():
                raise ValueError("data/ is of your own text: give the examples, --data=FILE")
        paths = {"train": source, "val": config.val, "test": config.test}
        files = {
            split: [self.parse(row, where) for where, row in read_rows(path, self.header)]
            for split, path in paths.items()
            if path
        }
        self.examples = self.split(files)
        self.encoded = {split: list(map(self.encode, e)) for split, e in self.examples.items()}
        self.filled = [split for split, examples in self.examples.items() if examples]
        counts = {split: len(some) for split, some in self.examples.items()}
        if not counts["val"] or not (counts["train"] or config.eval_only):
            raise ValueError(f"{config.data or self.file}: too few examples {counts}")
        print(f"examples: {counts}; texts that were too long, and cut: {self.cut}")
        # by which a resumed run knows that its examples are the same
        self.digest = hashlib.sha256(repr(self.encoded).encode()).hexdigest()

    def split(self, files):
        return split_examples(files, self.fractions)

    def collate(self, encoded):
        """[(idx, targets)] -> (B, T), (B, T)."""
        rows, targets = zip(*encoded)
        return pad(rows, self.end), pad(targets, -100)

    def prepare(self):
        """Decides what is trained, in which batches, and in how many steps."""
        config, gpt = self.config, self.gpt
        if config.train == "lora":
            add_lora(gpt, config.lora_rank, config.lora_alpha, config.lora_dropout)
        freeze(gpt, config.train)
        if self.has_new_positions:
            gpt.transformer.wpe.requires_grad_(True)
        lengths = [len(lists[0]) for lists in self.encoded["train"]]
        self.shuffled = Shuffled(lengths, config.batch_size, config.seed)
        per_epoch = math.ceil(self.shuffled.per_epoch / config.gradient_accumulation_steps)
        config.eval_interval = config.eval_interval or per_epoch
        config.max_iters = config.max_iters or math.ceil(config.epochs * per_epoch)
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.trained().values())
        print(
            f"training {trained:,} of {total:,} parameters ({trained / total:.1%}), padding is "
            f"{self.shuffled.padding():.1%} of a batch, on {self.machine}"
        )

    def micro_batch(self, n):
        return self.collate([self.encoded["train"][i] for i in self.shuffled.batch(n)])

    def batches(self, split):
        """All of a split in batches, in order."""
        lists, size = self.encoded[split], 2 * self.config.batch_size
        return (self.collate(lists[i : i + size]) for i in range(0, len(lists), size))

    @torch.no_grad()
    def outputs(self, split, function):
        """What function makes of each batch of a split, with dropout off: (N, ...), on the CPU."""
        self.model.eval()
        found = []
        for tensors in self.batches(split):
            with self.machine.autocast():
                found.append(function(*self.machine.put(*tensors)).float().cpu())
        self.model.train()
        return torch.cat(found)

    def answers(self, gpt, prompts, temperature=1.0, generator=None):
        """What gpt says to each of the prompts, in tokens, with the end token where it ended."""
        by_length, answers = collections.defaultdict(list), {}
        for i, prompt in enumerate(prompts):
            by_length[len(prompt)].append(i)  # one length, one batch: no padding before the answer
        for same in by_length.values():
            (idx,) = self.machine.put(torch.tensor([prompts[i] for i in same]))
            how = {"stop_token": self.end, "generator": generator}
            steps = gpt.eval().generate(idx, self.config.max_new_tokens, temperature, **how)
            for i, tokens in zip(same, torch.stack(list(steps), dim=1).tolist()):
                stop = tokens.index(self.end) + 1 if self.end in tokens else len(tokens)
                answers[i] = tokens[:stop]
        return [answers[i] for i in range(len(prompts))]

    def row(self, messages, loss_on_prompt=False):
        """A conversation -> idx, targets: see to_row."""
        parts = chat_parts(messages, self.tokenizer, self.template)
        self.cut += sum(len(part) for part, _ in parts) > self.block_size + 1
        return to_row(parts, self.block_size, loss_on_prompt)

    def text(self, answer):
        """The text of an answer's tokens, and whether it ended by itself."""
        ended = answer[-1] == self.end
        return self.tokenizer.decode(answer[:-1] if ended else answer), ended

    def evaluate(self):
        return {"val_loss": mean_loss(self.model, self.machine, self.batches("val"))}

    def trained(self):
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def best(self):
        return {
            "config": asdict(self.gpt.config),
            "model": merged_weights(self.gpt),
            **({"head": self.model.head.state_dict()} if self.has_head else {}),
            "task": self.config.task,
            "template": self.template,
            "tokenizer": self.spec,
        }

    def last(self):
        weights = {name: p.detach() for name, p in self.trained().items()}
        config = asdict(self.gpt.config)
        return {"config": config, "model": weights, "base": self.base, "data_digest": self.digest}

    def resume(self, saved, path):
        """Takes the weights of an interrupted run."""
        if saved.get("data_digest") != self.digest:
            raise ValueError(f"{path}: the examples, or ppo's reward, are not those of that run")
        shapes = {name: p.shape for name, p in self.trained().items()}
        if {name: getattr(w, "shape", None) for name, w in saved["model"].items()} != shapes:
            raise ValueError(f"{path}: damaged, its weights are not those that the run trains")
        self.model.load_state_dict(saved["model"], strict=False)

    def take(self, best):
        """Takes the weights of this run's best.pt."""
        self.gpt.load_state_dict(best["model"], strict=False)
        for name, parameter in self.gpt.named_parameters():
            if name.endswith("lora_B"):  # it is in the weights already
                nn.init.zeros_(parameter)
        if self.has_head:
            self.model.head.load_state_dict(best["head"])


def write_lines(folder, name, objects):
    """Writes JSON Lines; nothing where folder is None."""
    if folder:
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
        replace_text(folder / name, "".join(lines))


class WithHead(nn.Module):
    """GPT with a linear layer of its own in place of the language-modelling head.

    It reads the last token of each text, the only one that has seen all of it.
    """

    def __init__(self, gpt, outputs):
        super().__init__()
        self.gpt, self.head = gpt, nn.Linear(gpt.config.n_embd, outputs)

    def read(self, x, last):
        """Hidden states x (B, T, n_embd), and where each text ends, (B,) -> (B, outputs)."""
        return self.head(x[torch.arange(len(x), device=x.device), last])

    def scores(self, idx, last):
        """The same, of tokens idx (B, T)."""
        return self.read(self.gpt.hidden(idx), last)


def token_log_probs(gpt, idx, targets):
    """log p of each target, (B, T), and 0 where there is none (-100). Sum a row for an answer's."""
    learned = targets != -100
    logits = gpt.lm_head(gpt.hidden(idx)[learned])  # (N, vocab_size)
    log_probs = -F.cross_entropy(logits, targets[learned], reduction="none")
    return torch.zeros(targets.shape, device=idx.device).masked_scatter(learned, log_probs.float())


# --- classification -------------------------------------------------------------------------------


class Classifier(WithHead):
    """Cross-entropy of the label, plus lm_weight times the next-token loss on the text, which makes
    more of few examples: Radford et al. 2018, equation 5."""

    def __init__(self, gpt, outputs, lm_weight):
        super().__init__(gpt, outputs)
        self.lm_weight = lm_weight

    def forward(self, idx, last, labels):
        x = self.gpt.hidden(idx)
        loss = F.cross_entropy(self.read(x, last), labels)
        if self.lm_weight and last.any():  # else there is no next token
            T = torch.arange(idx.size(1), device=idx.device)
            targets = torch.where(T <= last[:, None], idx, -100)[:, 1:]
            x, head = x[:, :-1].flatten(0, 1), self.gpt.lm_head.weight
            loss = loss + self.lm_weight * next_token_loss(x, head, targets.flatten())
        return loss


class Classify(Task):
    """Texts to labels. Its best.pt has the "labels" and their "head", too."""

    defaults: ClassVar = Task.defaults | {"epochs": 5.0}
    columns, has_head = ("val_loss", "val_accuracy"), True
    fractions: ClassVar = {"val": 0.1, "test": 0.2}
    file = "classify.jsonl"

    def __init__(self, config, machine, checkpoint, path):
        self.labels = checkpoint.get("labels", [])
        if type(self.labels) is not list or not all(type(label) is str for label in self.labels):
            raise ValueError(f"{path}: damaged, its labels are no texts")
        self.header = (config.label_field, config.text_field)
        if config.eval_only and self.labels:  # on the same split as in training
            given = {"seed": config.seed, "balance": config.balance}
            config = replace(config, **{k: checkpoint.get(k, v) for k, v in given.items()})
        super().__init__(config, machine, checkpoint, path)

    def make_model(self):
        return Classifier(self.gpt, len(self.labels), self.config.lm_weight)

    def parse(self, row, where):
        text = text_of(row, where, self.config.text_field)
        label = text_of(row, where, self.config.label_field)
        if not text or not label:
            raise ValueError(f"{where}: the {'label' if text else 'text'} is empty")
        return {"text": text, "label": label, "group": group_of(row, text), "where": where}

    def split(self, files):
        """Drops duplicates, and divides each label's examples in the same proportions."""
        config, count = self.config, sum(map(len, files.values()))
        files = drop_duplicates(files)
        print(f"dropped {count - sum(map(len, files.values())):,} examples of a text seen before")
        by_label = collections.defaultdict(list)
        for example in files["train"]:
            by_label[example["label"]].append(example)
        fewest, positions = min(map(len, by_label.values()), default=0), {}
        for examples in by_label.values():
            examples.sort(key=lambda e: position(f"{config.seed} {e['text']}"))
            if config.balance:
                del examples[fewest:]
            set_positions(examples, config.seed, positions)
        splits = split_examples({**files, "train": list(chain(*by_label.values()))}, self.fractions)
        if not config.eval_only:  # else they are the checkpoint's
            self.labels = sorted({example["label"] for example in splits["train"]})
        for example in chain(*splits.values()):
            if example["label"] not in self.labels:
                raise ValueError(f"{example['where']}: training has no label {example['label']!r}")
        if len(self.labels) < 2:
            raise ValueError(f"nothing to tell apart: the only label is {self.labels}")
        return splits

    def encode(self, example):
        tokens = self.tokenizer.encode_ordinary(example["text"])
        self.cut += len(tokens) > self.block_size
        return tokens[: self.block_size], self.labels.index(example["label"])

    def collate(self, encoded):
        """[(tokens, label)] -> idx (B, T), where the last token is (B,), labels (B,)."""
        rows, labels = zip(*encoded)
        return *pad_and_last(rows, self.end), torch.tensor(labels)

    def log_probs(self, split):
        """Of each label, for a split's examples in order: (N, classes)."""
        scores = self.outputs(split, lambda idx, last, labels: self.model.scores(idx, last))
        return scores.log_softmax(-1)

    def labels_of(self, split):
        return torch.tensor([label for _, label in self.encoded[split]])

    def evaluate(self):
        log_probs, labels = self.log_probs("val"), self.labels_of("val")
        accuracy = (log_probs.argmax(-1) == labels).float().mean().item()
        return {"val_loss": F.nll_loss(log_probs, labels).item(), "val_accuracy": accuracy}

    def best(self):
        config = self.config
        how = {"labels": self.labels, "seed": config.seed, "balance": config.balance}
        return {**super().best(), **how}

    def report(self, folder):
        """Prints accuracy, macro F1 and confusion of each split; writes predictions.csv of the
        last, which is the test where there is one."""
        width = max(map(len, self.labels))
        for split in self.filled:
            log_probs, labels, n = self.log_probs(split), self.labels_of(split), len(self.labels)
            cells = labels * n + log_probs.argmax(-1)
            confusion = torch.bincount(cells, minlength=n * n).view(n, n)
            right, sums = confusion.diag(), confusion.sum(0) + confusion.sum(1)
            print(
                f"\n{split:5}  accuracy {right.sum() / len(labels):.4f}  "
                f"macro F1 {(2 * right / sums)[sums > 0].mean():.4f}  "
                "(rows: labels, columns: predictions)"
            )
            for label, row in zip(self.labels, confusion.tolist()):
                print(f"{label:{width}}", *(f"{n:5}" for n in row))
        if folder:
            draw_confusion(confusion, self.labels, folder / "confusion.png")
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["text", "label", "predicted", "probability"])
            for example, row in zip(self.examples[split], log_probs.exp()):
                p, i = row.max(0)
                table.writerow([example["text"], example["label"], self.labels[i], f"{p:.4f}"])
            replace_text(folder / "predictions.csv", text.getvalue())

    def predict(self, text):
        tokens = self.tokenizer.encode_ordinary(clean(text))[: self.block_size]
        if not tokens:
            raise ValueError("--predict: the text is empty")
        idx, last = self.machine.put(torch.tensor([tokens]), torch.tensor([len(tokens) - 1]))
        with torch.no_grad():
            probability, i = self.model.eval().scores(idx, last)[0].softmax(-1).max(0)
        print(f"{self.labels[i]}  {probability:.4f}")


def drop_duplicates(files):
    """Of examples with the same text the first stays; what is tested is not trained."""
    seen, kept = set(), {}
    for split in [name for name in ("test", "val", "train") if name in files]:
        kept[split] = []
        for example in files[split]:
            if example["text"] not in seen:
                kept[split].append(example)
                seen.add(example["text"])
    return kept


def set_positions(examples, seed, positions):
    """Gives each a "position" from 0 to 1: evenly spread, in random order; but a group has one
    position, that in positions if it is there, as it may have been met with another label."""
    groups, before = collections.defaultdict(list), 0
    for example in examples:
        groups[example["group"]].append(example)
    for group in sorted(groups, key=lambda group: position(f"{seed} {group}")):
        middle = (before + len(groups[group]) / 2) / len(examples)
        for example in groups[group]:
            example["position"] = positions.setdefault(group, middle)
        before += len(groups[group])


def draw_confusion(confusion, labels, path):
    """Draws it as a picture, where there is matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if len(labels) > 40:  # nobody could read that
        return
    figure = Figure(figsize=(2 + len(labels) / 2, 2 + len(labels) / 2), layout="constrained")
    panel = figure.subplots()
    confusion = confusion.numpy()
    panel.imshow(confusion / confusion.sum(1, keepdims=True).clip(1), vmin=0, cmap="Blues")
    for (row, column), count in np.ndenumerate(confusion):
        panel.text(column, row, count, ha="center", va="center", fontsize=8)
    panel.set_xticks(range(len(labels)), labels, rotation=90)
    panel.set_yticks(range(len(labels)), labels)
    panel.set(xlabel="predicted", ylabel="label")
    with replacing(path) as file:
        figure.savefig(file, dpi=100, format="png")


# --- following instructions -----------------------------------------------------------------------


class Instruct(Task):
    """Prompts to answers: the next-token loss, on the answers' tokens alone."""

    defaults: ClassVar = Task.defaults | {
        "learning_rate": 5e-4,
        "epochs": 2.0,
        "max_new_tokens": 128,
    }
    columns = ("val_loss", "val_perplexity")

    def parse(self, row, where):
        messages = messages_of(row, where)
        if not any(m["role"] == "assistant" and m["content"] for m in messages):
            raise ValueError(f"{where}: there is no answer to learn")
        while messages[-1]["role"] != "assistant":  # nothing is learned from what comes after
            messages.pop()
        return {"messages": messages, "position": position_of(row, messages[:-1], where)}

    def encode(self, example):
        return self.row(example["messages"], self.config.loss_on_prompt)

    def evaluate(self):
        metrics = super().evaluate()
        return {**metrics, "val_perplexity": math.exp(metrics["val_loss"])}

    def report(self, folder):
        """Lets the model answer held-out prompts; writes responses.jsonl."""
        print(format_metrics(self.evaluate()))
        conversations = [example["messages"] for example in self.examples["val"][:MEASURED]]
        prompts = [chat_prompt(asked, self.tokenizer, self.template) for *asked, _ in conversations]
        answers, ended = zip(*map(self.text, self.answers(self.gpt, prompts, temperature=0)))
        lines = [
            {"messages": asked, "answer": answer, "expected": expected["content"]}
            for (*asked, expected), answer in zip(conversations, answers)
        ]
        for line in lines[:3]:
            print(f"\n{line['messages'][-1]['content']}\n-> {line['answer']}")
        print(f"\n{sum(ended) / len(lines):.1%} of {len(lines)} answers stop by themselves")
        write_lines(folder, "responses.jsonl", lines)


# --- multiple choice ------------------------------------------------------------------------------


class Choice(Task):
    """Which ending of a text is the likeliest? In the format of HellaSwag (Zellers et al. 2019)."""

    def parse(self, row, where):
        match row:
            case {"ctx": str(text), "endings": [_, _, *_] as endings, "label": label}:
                labels = [str(i) for i in range(len(endings))]
                if all(e and isinstance(e, str) for e in endings) and str(label) in labels:
                    return {"text": text, "endings": endings, "label": int(label)}
        raise ValueError(f"{where}: give ctx, endings (two texts at least) and label (0, 1, ...)")

    def split(self, files):
        return {"train": [], "val": files["train"], "test": []}

    def encode(self, example):
        """[(idx, targets)] of the endings."""
        start = [self.end, *self.tokenizer.encode_ordinary(example["text"].rstrip())]
        endings = [self.tokenizer.encode_ordinary(" " + e.strip()) for e in example["endings"]]
        self.cut += max(map(len, endings)) + len(start) > self.block_size + 1
        return [to_row([(start, False), (end, True)], self.block_size) for end in endings]

    @torch.no_grad()
    def report(self, folder):
        """Prints how often the right ending has the highest log-probability, as a sum and per byte
        (much like acc and acc_norm of the Language Model Evaluation Harness)."""
        by_sum = by_byte = 0
        for example, encoded in zip(self.examples["val"], self.encoded["val"]):
            idx, targets = self.machine.put(*self.collate(encoded))
            sums = token_log_probs(self.gpt.eval(), idx, targets).sum(1).cpu()
            lengths = torch.tensor([len(e.strip().encode()) + 1 for e in example["endings"]])
            by_sum += int(sums.argmax()) == example["label"]
            by_byte += int((sums / lengths).argmax()) == example["label"]
        for name, right in {"summed": by_sum, "per byte": by_byte}.items():
            share = right / len(self.examples["val"])
            error = math.sqrt(share * (1 - share) / len(self.examples["val"]))
            print(f"accuracy by log-probability {name}: {share:.4f} ± {error:.4f}")


# --- learning from preferences --------------------------------------------------------------------


class Preferences(Task):
    """Pairs of answers to a prompt, of which the first is preferred to the second.

    Each kind adds measure(split) -> {name: (N,)}, about every pair. Their means are its evaluation.
    """

    file = "preference.jsonl"

    def parse(self, row, where):
        pair = {name: text_of(row, where, name) for name in ("chosen", "rejected")}
        for name, text in pair.items():
            if not text:
                raise ValueError(f"{where}: {name} is empty")
        return {**prompt_of(row, where), **pair}

    def split(self, files):
        kept = {
            split: [e for e in examples if e["chosen"] != e["rejected"]]
            for split, examples in files.items()
        }
        dropped = sum(map(len, files.values())) - sum(map(len, kept.values()))
        print(f"dropped {dropped:,} pairs of equal answers")
        return super().split(kept)

    def conversations(self, example):
        """The one that ends with the chosen answer, and that with the rejected one."""
        return [answered(example["messages"], example[name]) for name in ("chosen", "rejected")]

    def means(self, split):
        return {name: values.mean().item() for name, values in self.measure(split).items()}

    def evaluate(self):
        return {f"val_{name}": mean for name, mean in self.means("val").items()}

    def report(self, folder):
        for split in self.filled:
            print(f"{split:5}", format_metrics(self.means(split)), sep="  ")


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """Direct preference optimisation: Rafailov et al. 2023, equation 7.

    Takes log-probabilities of whole answers, (P,), under the model and under its reference, which
    it starts as. Returns losses and margins, β[log π/ρ of the chosen − log π/ρ of the rejected].
    """
    margins = beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
    return -F.logsigmoid(margins), margins


class DPOModel(nn.Module):
    def __init__(self, gpt, beta):
        super().__init__()
        self.gpt, self.beta = gpt, beta

    def forward(self, idx, targets, reference):
        chosen, rejected = token_log_probs(self.gpt, idx, targets).sum(1).chunk(2)
        return dpo_loss(chosen, rejected, *reference.chunk(2), self.beta)[0].mean()


class DPO(Preferences):
    """Makes the chosen answers likelier than the rejected, without going far from the reference,
    which is the model at the start."""

    defaults: ClassVar = Task.defaults | {"learning_rate": 1e-4, "beta": 0.1}
    columns = ("val_loss", "val_accuracy", "val_margin", "val_chosen", "val_rejected")

    def make_model(self):
        return DPOModel(self.gpt, self.config.beta)

    def encode(self, example):
        """idx and targets of the chosen answer, then of the rejected one, and the reference's log p
        of both: 0 until prepare fills them in, and so with --eval_only, whose margins are the
        model's own."""
        chosen, rejected = map(self.row, self.conversations(example))
        return [*chosen, *rejected, 0.0, 0.0]

    def collate(self, encoded):
        """-> idx (2P, T), targets (2P, T), reference (2P,): all chosen, then all rejected."""
        rows = [lists[:2] for lists in encoded] + [lists[2:4] for lists in encoded]
        reference = torch.tensor([lists[4:] for lists in encoded]).T.flatten()
        return *super().collate(rows), reference

    def prepare(self):
        super().prepare()
        for split in self.filled:
            for lists, reference in zip(self.encoded[split], self.log_probs(split).tolist()):
                lists[4:] = reference

    def log_probs(self, split):
        """Log-probabilities of a split's answers, chosen and rejected: (N, 2)."""

        def of_batch(idx, targets, reference):
            return token_log_probs(self.gpt, idx, targets).sum(1).view(2, -1).T

        return self.outputs(split, of_batch)

    def measure(self, split):
        chosen, rejected = self.log_probs(split).T
        reference = torch.tensor([lists[4:] for lists in self.encoded[split]]).T
        losses, margins = dpo_loss(chosen, rejected, *reference, self.config.beta)
        right = (margins > 0).float()
        answers = {"chosen": chosen, "rejected": rejected}
        return {"loss": losses, "accuracy": right, "margin": margins, **answers}


class RewardModel(WithHead):
    """A number for a conversation that ends with an answer: how good that is."""

    def __init__(self, gpt):
        super().__init__(gpt, outputs=1)
        # Stiennon et al. 2020, appendix B.1
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(gpt.config.n_embd + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, idx, last):
        """Bradley-Terry, −log σ(r_chosen − r_rejected): Ouyang et al. 2022, equation 1."""
        chosen, rejected = self.scores(idx, last)[:, 0].chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()


class Reward(Preferences):
    """Scores answers, the better the higher; the mean of those in training is 0."""

    defaults: ClassVar = Task.defaults | {"dropout": 0.2}
    columns, has_head = ("val_loss", "val_accuracy", "val_chosen", "val_rejected"), True

    def make_model(self):
        return RewardModel(self.gpt)

    def encode(self, example):
        """The tokens of the conversation with the chosen answer, then with the rejected one."""
        return list(map(self.tokens, self.conversations(example)))

    def tokens(self, messages):
        parts = chat_parts(messages, self.tokenizer, self.template)
        self.cut += sum(len(part) for part, _ in parts) > self.block_size
        idx, targets = to_row(parts, self.block_size - 1)
        return [*idx, targets[-1]]  # with the end token, where the head reads

    def collate(self, encoded):
        """-> idx (2P, T), where the last token is (2P,): all that are chosen, then the others."""
        chosen, rejected = zip(*encoded)
        return pad_and_last(chosen + rejected, self.end)

    @torch.no_grad()
    def score(self, conversations):
        """Lists of messages -> their scores, (N,)."""
        tensors = pad_and_last(list(map(self.tokens, conversations)), self.end)
        return self.model.eval().scores(*self.machine.put(*tensors))[:, 0].float().cpu()

    def pair_scores(self, split):
        """Scores of a split's answers, chosen and rejected: (N, 2)."""
        return self.outputs(split, lambda idx, last: self.model.scores(idx, last).view(2, -1).T)

    def measure(self, split):
        chosen, rejected = self.pair_scores(split).T
        losses, right = -F.logsigmoid(chosen - rejected), (chosen > rejected).float()
        return {"loss": losses, "accuracy": right, "chosen": chosen, "rejected": rejected}

    def best(self):
        best, mean = super().best(), self.pair_scores("train").mean().to(self.machine.device)
        return {**best, "head": {**best["head"], "bias": best["head"]["bias"] - mean}}

    def predict(self, text):
        """Prints the score of an answer, or of a conversation in JSON, as a line of a file is."""
        messages = answered([], clean(text))
        if text.startswith("{"):
            messages = messages_of(parse_json(text.encode(), "--predict"), "--predict")
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            raise ValueError("--predict: there is no answer to score")
        print(f"{self.score([messages]).item():+.4f}")


# --- reinforcement learning -----------------------------------------------------------------------

# Simpler than InstructGPT's (Ouyang et al. 2022): the value function is a head on the policy's
# trunk, since a model of its own would cost as much again; there is no pretraining term (PPO-ptx),
# since the KL penalty is enough at this size; the penalty's coefficient is fixed, so that a run can
# be understood; and prompts come from a file, not from people.

GAMMA, LAMBDA = 1.0, 0.95  # of the advantages
CLIP, VALUE_WEIGHT = 0.2, 0.1  # of the loss
EPOCHS, PARTS = 4, 4  # an iteration goes so often through its answers, in so many parts
UNFINISHED = -1.0  # added to the score of an answer that does not end


def advantages_of(rewards, values, mask):
    """Generalised advantage estimation: Schulman et al. 2016, equation 16.

    All (B, T): at t the state that predicts token t + 1; mask marks those whose token belongs to
    the answer. A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t, and V = 0 at the end.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])  # both 0 outside the answer
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        next_advantage = (delta + GAMMA * LAMBDA * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages


def whiten(values, mask):
    """Mean 0 and variance 1 over the places of mask; 0 elsewhere."""
    chosen = values[mask]
    return torch.where(mask, (values - chosen.mean()) / (chosen.std(correction=0) + 1e-8), 0)


def ppo_loss(log_probs, old_log_probs, advantages, mask):
    """The clipped objective, negated: Schulman et al. 2017, equation 7. Also the clipped share."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    losses = -torch.min(ratio * advantages, clipped * advantages)
    return losses[mask].mean(), (ratio != clipped)[mask].float().mean()


class ActorCritic(WithHead):
    """A GPT that also says what score it expects."""

    def __init__(self, gpt):
        super().__init__(gpt, outputs=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, idx, targets):
        """-> log p of the targets, entropy and value of the states before them, (B, T) each; 0
        where there is no target."""
        mask = targets != -100
        x = self.gpt.hidden(idx)
        all_log_probs = self.gpt.lm_head(x[mask]).float().log_softmax(-1)  # (N, vocab_size)
        log_probs = all_log_probs.gather(-1, targets[mask][:, None])[:, 0]
        entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
        values = self.head(x[mask])[:, 0].float()
        empty = torch.zeros(targets.shape, device=idx.device)
        return tuple(empty.masked_scatter(mask, found) for found in (log_probs, entropy, values))


class PPOTrainer(Trainer):
    """The same loop, with an iteration of PPO for a step."""

    def take_step(self):
        config, state, task = self.config, self.state, self.task
        start = time.perf_counter()
        self.set_learning_rate()
        seed_dropout(self.machine.device, config.seed, state["step"])
        tensors, self.stats = task.experience(state["step"])
        rng = np.random.default_rng([config.seed, state["step"]])
        n, measured = len(tensors[0]), []
        for _ in range(EPOCHS):
            for part in np.array_split(rng.permutation(n), min(PARTS, n)):
                with self.machine.autocast():
                    loss, *more = task.loss(*(tensor[torch.from_numpy(part)] for tensor in tensors))
                self.machine.scaler.scale(loss).backward()
                self.update(loss.item())
                measured.append([loss.item(), *more])
        loss, *means = np.mean(measured, axis=0).tolist()
        self.losses.append(loss)
        self.stats |= dict(zip(("clipped", "value_loss"), means))
        state["step"] += 1
        state["tokens"] += int((tensors[1] != -100).sum())
        state["seconds"] += time.perf_counter() - start

    def reason_to_stop(self):
        kl, max_kl = self.stats.get("kl", 0.0), self.config.max_kl
        if kl > max_kl:
            return f"the KL from the start is {kl:.1f} nats, --max_kl={max_kl}"
        return super().reason_to_stop()


class PPO(Task):
    """Makes answers likelier that score higher, without going far from the reference, which is the
    model at the start. A step of the trainer is an iteration: answers to a batch of prompts, then
    some epochs on them."""

    defaults: ClassVar = {
        "batch_size": 32,
        "dropout": 0.0,
        "learning_rate": 3e-5,
        "max_iters": 100,
        "eval_interval": 10,
        "log_interval": 1,
        "beta": 0.1,
        "max_new_tokens": 48,
    }
    trainer = PPOTrainer
    stats = ("score", "kl", "entropy", "clipped", "value_loss", "length", "ended")
    columns = ("val_loss", "val_score", "val_kl", *stats)
    file = "preference.jsonl"

    def make_model(self):
        self.reference = copy.deepcopy(self.gpt).to(self.machine.device).requires_grad_(False)
        self.score, digest = load_reward(self.config.reward_model, self.machine)
        self.digest += digest  # a resumed run must have the same
        return ActorCritic(self.gpt)

    def parse(self, row, where):
        return prompt_of(row, where)

    def encode(self, example):
        prompt = chat_prompt(example["messages"], self.tokenizer, self.template)
        limit = self.block_size - self.config.max_new_tokens
        if limit < 1:
            raise ValueError(f"--max_new_tokens: below the context's {self.block_size}, please")
        self.cut += len(prompt) > limit
        return (prompt[-limit:],)

    def respond(self, gpt, split, numbers, seed):
        """Samples an answer of gpt to each of these prompts: temperature 1 and all tokens, so that
        gpt is the distribution they come from.

        Returns idx, targets (B, T), scores (B,), where the answers ended by themselves (B,), texts.
        """
        prompts = [self.encoded[split][i][0] for i in numbers]
        generator = torch.Generator(self.machine.device).manual_seed(seed)
        answers = self.answers(gpt, prompts, generator=generator)
        texts, ended = zip(*map(self.text, answers))
        asked = [self.examples[split][i]["messages"] for i in numbers]
        ended = torch.tensor(ended)
        scores = self.score(list(map(answered, asked, texts))) + UNFINISHED * ~ended
        rows = [to_row([(p, False), (a, True)], self.block_size) for p, a in zip(prompts, answers)]
        return *self.machine.put(*self.collate(rows), scores), ended, texts

    @torch.no_grad()
    def experience(self, iteration):
        """Answers to an iteration's prompts: what loss takes, (B, T) each, and statistics."""
        numbers = self.shuffled.batch(iteration)
        seed = int(np.random.SeedSequence((self.config.seed, iteration)).generate_state(1)[0])
        idx, targets, scores, ended, _ = self.respond(self.gpt, "train", numbers, seed)
        mask = targets != -100
        self.model.eval()
        with self.machine.autocast():
            log_probs, entropy, values = self.model(idx, targets)
            reference = token_log_probs(self.reference, idx, targets)
        self.model.train()
        drift = log_probs - reference  # its sum over an answer is, in the mean, the KL
        rewards = -self.config.beta * drift
        last = mask.size(1) - 1 - mask.int().flip(1).argmax(1)  # where each answer ends
        rewards[torch.arange(len(idx)), last] += scores
        advantages = advantages_of(rewards, values, mask)
        stats = {
            "score": scores.mean().item(),
            "kl": drift.sum(1).mean().item(),
            "entropy": entropy[mask].mean().item(),
            "length": mask.sum(1).float().mean().item(),
            "ended": ended.float().mean().item(),
        }
        return (idx, targets, log_probs, whiten(advantages, mask), advantages + values), stats

    def loss(self, idx, targets, old_log_probs, advantages, returns):
        """-> loss, clipped share, value loss."""
        mask = targets != -100
        log_probs, _, values = self.model(idx, targets)
        loss, clipped = ppo_loss(log_probs, old_log_probs, advantages, mask)
        value_loss = (values - returns)[mask].square().mean() / 2
        return loss + VALUE_WEIGHT * value_loss, clipped.item(), value_loss.item()

    @torch.no_grad()
    def held_out(self, gpt):
        """What gpt answers to held-out prompts: scores, their KL from the reference, texts."""
        numbers = range(len(self.encoded["val"]))[:MEASURED]
        idx, targets, scores, _, texts = self.respond(gpt, "val", numbers, seed=0)
        with self.machine.autocast():
            drift = token_log_probs(gpt, idx, targets)
            drift -= token_log_probs(self.reference, idx, targets)
        self.model.train()
        return scores, drift.sum(1).mean().item(), texts

    def evaluate(self):
        scores, kl, _ = self.held_out(self.gpt)
        score = scores.mean().item()
        return {"val_loss": -score, "val_score": score, "val_kl": kl}

    def report(self, folder):
        """Writes held-out answers of the reference and of the model, side by side."""
        old_scores, _, old_texts = self.held_out(self.reference)
        scores, kl, texts = self.held_out(self.gpt)
        print(
            f"held out: mean score {old_scores.mean():+.3f} -> {scores.mean():+.3f} at KL {kl:.2f}"
        )
        pairs = zip(old_scores.tolist(), scores.tolist())
        lines = [
            {"messages": example["messages"], "before": old, "after": new, "scores": pair}
            for example, old, new, pair in zip(self.examples["val"], old_texts, texts, pairs)
        ]
        for line in lines[:5]:
            print(f"\n{line['messages'][-1]['content']}\n- {line['before']}\n+ {line['after']}")
        write_lines(folder, "responses.jsonl", lines)


def load_reward(path, machine):
    """A checkpoint of --task=reward -> the function from conversations to scores, and a digest."""
    checkpoint = load_checkpoint(path)
    # a text to predict, though none is predicted, means: load the head, and no examples
    reward = Reward(FinetuneConfig(task="reward", predict=""), machine, checkpoint, path)
    reward.model.to(machine.device)
    return reward.score, weights_digest(checkpoint)


# --- the whole way --------------------------------------------------------------------------------

TASKS = {"classify": Classify, "instruct": Instruct, "choice": Choice}
TASKS |= {"dpo": DPO, "reward": Reward, "ppo": PPO}


def weights_digest(checkpoint):
    """Stands for the weights of a model, and of its head."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**checkpoint["model"], **checkpoint.get("head", {})}.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def resumed_run(flags):
    """The config and the last.pt of a run that is to go on."""
    task = flags.get("task", FinetuneConfig.task)
    path = pathlib.Path(flags.get("out_dir", f"out/{task}"), "last.pt")
    saved = load_checkpoint(path)
    config = merge_flags(FinetuneConfig, saved, flags, path)
    if config.eval_only or config.predict is not None:
        raise ValueError(f"--init_from=resume is for training; --init_from={path.parent} measures")
    match saved:
        case {"base": {"path": str()}}:
            return config, saved
    raise ValueError(f"{path}: damaged, or not a run of finetune.py")


def check_out_dir(out_dir, models):
    """Raises ValueError where one of the models that are needed would be moved aside."""
    for model in models:
        path = pathlib.Path(model).resolve()
        if out_dir.resolve() in (path, *path.parents):
            raise ValueError(f"--out_dir={out_dir}: holds a model that is needed; name another one")


@script
@explain_out_of_memory()
def main(argv=None):
    flags = parse_flags(FinetuneConfig, __doc__, argv)
    if flags.get("init_from") == "resume":
        config, saved = resumed_run(flags)
        path = saved["base"]["path"]
    else:
        config, saved = FinetuneConfig(**flags), None
        path = config.init_from
    out_dir = pathlib.Path(config.out_dir)
    machine, start = Machine(config), load_checkpoint(path)
    if machine.world_size > 1:
        raise ValueError("finetune.py runs as one process: start it without torchrun")
    path = str(pathlib.Path(path).resolve()) if pathlib.Path(path).exists() else path
    torch.manual_seed(config.seed)
    task = TASKS[config.task](config, machine, start, path)
    task.base = {"path": path, "digest": weights_digest(start)}
    if saved and saved["base"] != task.base:
        raise ValueError(f"{path}: not the model any more that {out_dir}/last.pt was begun with")
    task.model.to(machine.device)
    if config.predict is not None:
        task.predict(config.predict)
        return
    if config.eval_only:
        task.report(None)
        return
    check_out_dir(out_dir, [path, config.reward_model] if config.task == "ppo" else [path])
    task.prepare()
    if saved:
        task.resume(saved, out_dir / "last.pt")
    task.model.train()
    trainer = task.trainer(config, machine, task, saved)
    with sole_owner(out_dir):
        if not saved:
            set_aside(out_dir)
            metrics = task.evaluate()
            print("before:", format_metrics(metrics), sep="  ")
            trainer.save(metrics["val_loss"])  # so that best.pt is never worse than the start
        trainer.run()
        task.take(load_checkpoint(out_dir / "best.pt"))
        task.report(out_dir)


if __name__ == "__main__":
    main()
