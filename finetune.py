"""Fine-tunes a trained GPT to classify texts, follow instructions, or prefer better answers.

    python finetune.py --task=classify      # which package of the library is a docstring from?
    python finetune.py --task=instruct      # "Explain os.path.join(path, *paths)." -> a sentence
    python finetune.py --task=classify --data=spam.tsv --out_dir=out/spam --train=lora
    python finetune.py --task=classify --init_from=out/spam --predict="You won! Call 09061701461"
    python finetune.py --task=instruct --init_from=gpt2 --data=instructions.json
    python finetune.py --task=choice --data=hellaswag.jsonl             # evaluation only
    python finetune.py --task=dpo --init_from=out/instruct              # prefer the better answer
    python finetune.py --task=reward --init_from=out/instruct           # score answers
    python finetune.py --task=ppo --init_from=out/instruct              # learn to score high
    python finetune.py --task=grpo --init_from=out/instruct             # the same, without a critic

The loop is train.train(). A task turns a row of a file into an example, and a batch of examples
into terms: the loss and any other metrics. best.pt is a complete model, LoRA merged in.
"""

import collections
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import pathlib
import re
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import prepare_data
from gpt import GPT, load_checkpoint, next_token_losses
from prepare_data import ALPACA, clean, damaged, hash_fraction, library_docstrings, write_file
from train import Machine, RunConfig, check_counts, format_metrics, load_run, perplexity, train


@dataclass
class FinetuneConfig(RunConfig):
    task: str = "instruct"  # classify, instruct, choice, dpo, reward, ppo or grpo
    init_from: str = "out"  # the model to start from: a run's folder, gpt2, ...; or resume
    out_dir: str = ""  # folder for checkpoints and results (default: out/TASK)
    data: str = ""  # examples: .jsonl, .json, .csv, .tsv (default: made from Python's manual)
    val: str = ""  # examples for validation (default: a tenth of data)
    test: str = ""  # examples for the test (default: a tenth of data)
    eval_only: bool = False  # evaluate on all of data, without training
    train: str = "all"  # weights to train: all, last_block, head (classify, reward) or lora
    lora_rank: int = 8  # rank of the matrices that LoRA adds
    lora_alpha: float = 16.0  # LoRA's product is scaled by alpha / rank
    lora_dropout: float = 0.0  # on the input of LoRA's product
    block_size: int = 0  # new context length; if longer, wpe is trained, too (0: the model's)
    dropout: float = 0.0  # on embeddings and residual branches
    min_lr: float = 0.0  # final, reached at the end of the decay
    weight_decay: float = 0.0  # of matrices; it would shrink what the examples do not use
    # some tasks have other defaults
    batch_size: int = 8  # examples per micro-batch; for ppo and grpo, prompts per step
    learning_rate: float = 0.0  # peak, reached after warmup (0: the task's, lower for wider models)
    epochs: float = 3.0  # passes through the examples; not for ppo and grpo
    max_iters: int = 0  # steps (0: as many as epochs take)
    eval_interval: int = 0  # steps between evaluations (0: an epoch)
    log_interval: int = 50  # steps between progress lines
    max_new_tokens: int = 128  # maximum length of an answer
    # classify
    text_field: str = "text"  # column with the text
    label_field: str = "label"  # column with the label
    lm_weight: float = 0.5  # weight of the next-token loss, added to the label's
    balance: bool = False  # downsample every label to the size of the rarest
    predict: str = ""  # classify this text, or for reward score this answer, and exit
    # conversations
    template: str = ""  # of prompts: roles or alpaca (default: roles if the vocabulary has them)
    loss_on_prompt: bool = False  # for instruct: learn the prompts, too
    beta: float = 0.1  # for dpo, ppo, grpo: the penalty for drifting from the reference model
    reward_model: str = "out/reward"  # for ppo and grpo: a checkpoint of --task=reward
    group_size: int = 1  # for ppo and grpo: answers per prompt (default for grpo: 8)


# where the tasks differ; the learning rates are for a model that is 128 wide
SAMPLING = {"learning_rate": 1e-4, "max_iters": 100, "eval_interval": 10, "log_interval": 1}
SAMPLING |= {"max_new_tokens": 48}
TASK_DEFAULTS = {
    "classify": {"learning_rate": 1e-3, "epochs": 5.0},
    "instruct": {"learning_rate": 5e-4, "epochs": 2.0},
    "choice": {"eval_only": True},
    "dpo": {"learning_rate": 1e-4},
    "reward": {"learning_rate": 1e-3},
    "ppo": {**SAMPLING, "batch_size": 32},
    "grpo": {**SAMPLING, "group_size": 8},
}


# --- LoRA -----------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A x, where W is frozen and only the small A and B are trained (Hu
    et al. 2021, section 4.1). B starts at zero, so nothing changes at first. Replaces a linear
    layer, whose weight and bias it shares and freezes."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")  # no memory
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (B, T, rank)
        return super().forward(x) + F.linear(self.scale * low, self.lora_B)


def add_lora(gpt, rank, alpha, dropout):
    """Gives each projection of attention and MLP its pair of small matrices."""
    for name, module in list(gpt.transformer.h.named_modules()):
        if isinstance(module, nn.Linear):
            gpt.transformer.h.set_submodule(name, LoRALinear(module, rank, alpha, dropout))


def merged_weights(gpt):
    """The state_dict of the same model without LoRA."""
    weights = {name: w for name, w in gpt.state_dict().items() if "lora_" not in name}
    for name, module in gpt.named_modules():
        if isinstance(module, LoRALinear):
            product = module.scale * module.lora_B @ module.lora_A
            weights[f"{name}.weight"] = (module.weight + product).detach()
    return weights


# --- what all tasks share -------------------------------------------------------------------------


class Task:
    """The part of train()'s interface that all tasks share. Each task adds

    encode(row)       a row of a file -> an example: {"rows": [(idx, targets), ...] as in to_row,
                      "text": the text or prompt, and more}
    terms(examples)   -> {name: (N,)}: training minimizes the mean of "loss"; an evaluation reports
                      the mean of each
    """

    columns = ("output",)  # those that hold a row's answers
    labels = None
    has_head = False  # the result is a label or a score, not text
    curves, lr_scales = ("train_loss", "val_loss"), None  # see train()

    def __init__(self, config, machine, checkpoint):
        self.config, self.machine = config, machine
        self.start = checkpoint  # the model that training starts from
        self.spec, self.tokenizer = prepare_data.load_tokenizer(checkpoint, config.init_from)
        self.end = self.tokenizer.eot_token
        with damaged(config.init_from):
            self.gpt = GPT.from_checkpoint(checkpoint, dropout=config.dropout, attn_dropout=0.0)
        self.gpt.resize(self.tokenizer.n_vocab, config.block_size)
        self.block_size = self.gpt.config.block_size
        default = prepare_data.default_template(self.tokenizer)
        self.template = config.template or checkpoint.get("template") or default
        self.too_long = 0  # rows that were truncated
        self.measured = collections.defaultdict(list)  # values since the last row of metrics.csv
        self.splits = {} if config.predict else self.read_examples()
        self.model = nn.ModuleDict({"gpt": self.gpt})
        self.set_up()
        self.model.to(machine.device)

    def set_up(self):
        """Override to add anything beyond the model and the examples."""

    def read(self, path):
        """Yields (where, row) of a file or, without one, of the default examples."""
        return read_rows(path) if path else manual_answers()

    def encoded(self, path):
        for where, row in self.read(path):
            try:
                example, group = self.encode(row), row.get("group")
            except Exception as error:
                raise ValueError(f"{where}: {error}") from error
            yield {**example, "group": str(example["text"] if group in (None, "") else group)}

    def read_examples(self):
        """{"train", "val", "test": examples}. Files for val and test are kept whole; without them,
        split_of holds out a tenth of data for each. No group or text is in two splits."""
        config, splits = self.config, {"train": [], "val": [], "test": []}
        for example in self.encoded(config.data):
            splits[split_of(example["group"], config)].append(example)
        held_out = set()  # the groups and texts of the splits before
        for split, path in {"test": config.test, "val": config.val, "train": ""}.items():
            new = [e for e in splits[split] if held_out.isdisjoint((e["group"], e["text"]))]
            splits[split] = list(self.encoded(path)) if path and not config.eval_only else new
            held_out |= {e[key] for e in splits[split] for key in ("group", "text")}
        counts = {split: len(examples) for split, examples in splits.items()}
        print(f"examples: {counts}; {self.too_long} rows were truncated to fit the context")
        needed = ("test",) if config.eval_only else ("train", "val")
        if not all(counts[split] for split in needed):
            raise ValueError(f"{config.data or 'the manual'}: too few examples {counts}")
        self.digest = hashlib.sha256(repr(splits).encode()).hexdigest()
        return splits

    def encode(self, row):
        example = conversation_of(row, *self.columns)
        rows = [self.row(example["messages"], example[name]) for name in self.columns]
        return {**example, "rows": rows}

    def row(self, messages, answer):
        """A conversation -> idx, targets: see to_row. Of a preference pair, only the last answer
        is learned."""
        messages = [*messages, {"role": "assistant", "content": answer}]
        parts = prepare_data.chat_parts(messages, self.tokenizer, self.template)
        self.too_long += sum(len(part) for part, _ in parts) > self.block_size
        if len(self.columns) == 2:
            parts = [(part, False) for part, _ in parts[:-1]] + parts[-1:]
        elif self.config.loss_on_prompt:
            parts = [(part, True) for part, _ in parts]
        return to_row(parts, self.block_size)

    def collate(self, examples):
        """The rows of these examples -> idx and targets, (R, T), padded at the end, which causal
        attention ignores, and the index of each row's last token, (R,)."""
        rows = [map(torch.tensor, row) for example in examples for row in example["rows"]]
        idx, targets = zip(*rows)
        last = torch.tensor([len(row) - 1 for row in idx])
        idx = pad_sequence(idx, batch_first=True, padding_value=self.end)
        targets = pad_sequence(targets, batch_first=True, padding_value=-100)
        return self.machine.put(idx, targets, last)

    def batch(self, n):
        numbers = batch_at(n, self.lengths, self.config.batch_size, self.config.seed)
        return [self.splits["train"][i] for i in numbers]

    def add_head(self, outputs, std):
        """A linear layer that reads the last token of a text, whose state has seen the whole text.
        The head of a checkpoint of the same task, with the same labels, is reused."""
        config, start = self.config, self.start
        is_there = (start.get("task"), start.get("labels")) == (config.task, self.labels)
        if self.has_head and not is_there and (config.predict or config.eval_only):
            raise ValueError(f"{config.init_from} has no head for --task={config.task}: train one")
        self.model["head"] = head = nn.Linear(self.gpt.config.n_embd, outputs)
        nn.init.normal_(head.weight, std=std)
        nn.init.zeros_(head.bias)
        if is_there:
            with damaged(config.init_from):
                head.load_state_dict(start["head"])

    def apply_head(self, x):
        """In float32: bfloat16 would round scores to steps of about 0.03."""
        with torch.autocast(x.device.type, enabled=False):
            return self.model["head"](x.float())

    def scores_of(self, examples):
        """The head's output for each row, (R, outputs)."""
        idx, _, last = self.collate(examples)
        return self.apply_head(self.gpt.hidden(idx)[torch.arange(len(idx)), last])

    def prepare(self):
        """Decides which weights are trained, how fast, in which batches, and for how many steps."""
        config, gpt = self.config, self.gpt
        gpt.requires_grad_(config.train == "all")
        if config.train == "last_block":
            gpt.transformer.h[-1].requires_grad_(True)
            gpt.transformer.ln_f.requires_grad_(True)
        if config.train == "lora":
            add_lora(gpt, config.lora_rank, config.lora_alpha, config.lora_dropout)
        if self.block_size > self.start["config"]["block_size"]:
            gpt.transformer.wpe.requires_grad_(True)
        # tuned: for instructions, 5e-4 at width 128 and 3e-5 at GPT-2's 768; LoRA needs more
        rate = TASK_DEFAULTS[config.task]["learning_rate"] * (3 if config.train == "lora" else 1)
        config.learning_rate = config.learning_rate or rate * (128 / gpt.config.n_embd) ** 1.5
        lengths = [max(len(idx) for idx, _ in e["rows"]) for e in self.splits["train"]]
        self.lengths = np.array(lengths)
        per_step = config.batch_size * config.gradient_accumulation_steps
        per_epoch = math.ceil(len(self.lengths) / per_step)
        config.eval_interval = config.eval_interval or per_epoch
        config.max_iters = config.max_iters or math.ceil(config.epochs * per_epoch)
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        print(f"training {trained:,} of {total:,} parameters, learning rate up to", end=" ")
        print(f"{config.learning_rate:.1e}, on {self.machine.device} in {config.dtype}")

    def updates(self, state):
        yield self.micro_losses(state)  # one update per step

    def micro_losses(self, state):
        """Yields a loss for each micro-batch, divided so that they add up to the step's mean."""
        config = self.config
        first = state["examples"] // config.batch_size
        self.model.train()  # evaluation turned dropout off
        batches = [self.batch(first + i) for i in range(config.gradient_accumulation_steps)]
        total = sum(self.count(example) for batch in batches for example in batch)
        for batch in batches:
            with self.machine.autocast():
                terms = self.terms(batch)
            yield terms.pop("loss").sum() / total
            self.record(**terms)
            state["examples"] += config.batch_size
            state["tokens"] += sum(len(idx) for e in batch for idx, _ in e["rows"])

    def count(self, example):
        """The number of losses that terms() returns for this example."""
        return 1

    def record(self, **values):
        for name, value in values.items():
            self.measured[name].append(value.detach().float().mean())

    @property
    def stats(self):
        """The means of what was recorded since this was last asked for."""
        measured, self.measured = self.measured, collections.defaultdict(list)
        return {name: torch.stack(values).mean().item() for name, values in measured.items()}

    def checkpoint(self):
        return {"model": self.model.state_dict(), "examples": self.digest}

    def best_checkpoint(self):
        best = {"config": asdict(self.gpt.config), "model": merged_weights(self.gpt)}
        best |= {"task": self.config.task, "template": self.template, "tokenizer": self.spec}
        if "head" in self.model:
            best |= {"head": self.model["head"].state_dict(), "labels": self.labels}
        return best

    def load_best(self, best):
        """Takes the weights of best.pt, into which LoRA is merged."""
        self.model["gpt"] = self.gpt = GPT.from_checkpoint(best).to(self.machine.device)
        if "head" in best:
            self.model["head"].load_state_dict(best["head"])

    def in_batches(self, examples, function):
        """[function(batch) for each batch], with dropout off and without gradients."""
        self.model.eval()
        size = 2 * self.config.batch_size
        with torch.no_grad(), self.machine.autocast():
            return [function(examples[i : i + size]) for i in range(0, len(examples), size)]

    def measure(self, split):
        parts = self.in_batches(self.splits[split], self.terms)
        return {name: torch.cat([p[name] for p in parts]).mean().item() for name in parts[0]}

    def evaluate(self):
        return {f"val_{name}": mean for name, mean in self.measure("val").items()}

    def report(self, folder=None):
        """Prints metrics on held-out examples; with a folder, may also write files there."""
        for split in filter(self.splits.get, ("val", "test")):
            print(f"{split:5}", format_metrics(self.measure(split)), sep="  ")

    def prompt(self, messages):
        """Tokenizes a conversation, keeping only the end of a long one, to leave room to answer."""
        limit = self.block_size - min(self.config.max_new_tokens, self.block_size // 2)
        return prepare_data.chat_prompt(messages, self.tokenizer, self.template)[-limit:]

    def answers(self, prompts, temperature=1.0):
        """The model's answers to these prompts, in tokens, up to and including the end token."""
        answers = {}
        for length in sorted(set(map(len, prompts))):  # prompts of equal length need no padding
            some = {i: prompt for i, prompt in enumerate(prompts) if len(prompt) == length}
            (idx,) = self.machine.put(torch.tensor([*some.values()]))
            limits = (self.config.max_new_tokens, temperature)
            steps = self.gpt.eval().generate(idx, *limits, stop_token=self.end)
            for i, tokens in zip(some, torch.stack([*steps], dim=1).tolist()):
                end = tokens.index(self.end) + 1 if self.end in tokens else len(tokens)
                answers[i] = tokens[:end]
        return [answers[i] for i in range(len(prompts))]

    def text(self, answer):
        data = (prepare_data.token_bytes(self.tokenizer, t) for t in answer if t != self.end)
        return b"".join(data).decode(errors="replace")

    def write_answers(self, name, folder=None):
        """Greedily answers some held-out prompts and stores each answer as example[name]. With a
        folder, writes the examples to responses.jsonl."""
        if self.has_head:
            return
        examples = up_to_100(self.splits["test"] or self.splits["val"])
        answers = self.answers([self.prompt(e["messages"]) for e in examples], temperature=0)
        for example, answer in zip(examples, answers):
            example[name] = self.text(answer)
        if folder:
            lines = [{k: e[k] for k in e if k not in ("rows", "group", "text")} for e in examples]
            for line in lines[:5]:
                print(f"\n{line['messages'][-1]['content']}\n- {line['before']}\n+ {line['after']}")
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_file(folder / "responses.jsonl", text.encode())


def up_to_100(examples):
    """At most 100 examples, evenly spaced."""
    return examples[:: math.ceil(len(examples) / 100)]


def token_log_probs(gpt, idx, targets):
    """Returns log p of each target, (R, T), 0 where there is none, and the states that predict
    them, (R, T, C). The sum over a row is the log p of its answer."""
    mask = targets != -100
    x = gpt.hidden(idx)
    log_probs = -next_token_losses(gpt.lm_head, x[mask], targets[mask])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, log_probs), x


# --- learning from examples -----------------------------------------------------------------------


class Classify(Task):
    """Texts to labels: cross-entropy of the label, plus lm_weight times the next-token loss on the
    text, which helps when examples are few (Radford et al. 2018, equation 5)."""

    has_head = True
    curves = ("label_loss", "val_loss")

    def set_up(self):
        train = self.splits.get("train", [])
        labels = collections.Counter(example["label"] for example in train)
        self.labels = sorted(labels) or self.start.get("labels", [])
        if self.config.balance and train:
            train.sort(key=lambda example: hash_fraction(example["text"]))
            by_label = [[e for e in train if e["label"] == label] for label in labels]
            self.splits["train"] = [e for some in by_label for e in some[: min(labels.values())]]
        self.add_head(len(self.labels), std=0.02)
        if len(self.labels) < 2:
            raise ValueError(f"at least two labels are needed; found {self.labels}")
        for example in itertools.chain(*self.splits.values()):
            if example["label"] not in self.labels:
                raise ValueError(f"no training example has the label {example['label']!r}")

    def read(self, path):
        columns = (self.config.label_field, self.config.text_field)
        return read_rows(path, columns) if path else manual_texts()

    def encode(self, row):
        text, label = text_of(row, self.config.text_field), text_of(row, self.config.label_field)
        tokens = self.tokenizer.encode_ordinary(text)
        self.too_long += len(tokens) > self.block_size
        rows = [to_row([(tokens, True)], self.block_size)]
        return {"rows": rows, "text": text, "label": label}

    def terms(self, examples):
        config = self.config
        idx, targets, last = self.collate(examples)
        labels = torch.tensor([self.labels.index(e["label"]) for e in examples], device=idx.device)
        x = self.gpt.hidden(idx)
        scores = self.apply_head(x[torch.arange(len(x)), last])
        loss = label_loss = F.cross_entropy(scores, labels, reduction="none")
        accuracy = (scores.argmax(-1) == labels).float()
        if not self.model.training:
            return {"loss": loss, "accuracy": accuracy}
        if config.lm_weight and config.train != "head":
            losses = next_token_losses(self.gpt.lm_head, x.flatten(0, 1), targets.flatten())
            counts = (targets != -100).sum(1).clamp(min=1)
            loss = label_loss + config.lm_weight * losses.view(targets.shape).sum(1) / counts
        return {"loss": loss, "label_loss": label_loss, "accuracy": accuracy}

    def report(self, folder=None):
        rows = [["split", "text", "label", "predicted", "probability"]]
        n = len(self.labels)
        for split in filter(self.splits.get, ("val", "test")):
            examples = self.splits[split]
            scores = torch.cat(self.in_batches(examples, self.scores_of)).cpu()
            probability, predicted = scores.softmax(1).max(1)
            labels = torch.tensor([self.labels.index(e["label"]) for e in examples])
            confusion = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n)
            right, sums = confusion.diag(), confusion.sum(0) + confusion.sum(1)
            accuracy, f1 = right.sum() / len(labels), (2 * right / sums)[sums > 0].mean()
            common = confusion.sum(1).max() / len(labels)
            print(f"\n{split:5} accuracy {accuracy:.4f}  macro F1 {f1:.4f}", end="  ")
            print(f"(always predicting the most common label: {common:.4f})")
            if n <= 12:  # rows: labels, columns: predictions
                for label, counts in zip(self.labels, confusion.tolist()):
                    print(f"{label[:20]:20}", *(f"{count:5}" for count in counts))
            for e, i, p in zip(examples, predicted, probability):
                rows.append([split, e["text"], e["label"], self.labels[i], f"{p:.4f}"])
        if folder:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            write_file(folder / "predictions.csv", text.getvalue().encode())

    def predict(self, text):
        example = self.encode({self.config.text_field: text, self.config.label_field: "?"})
        (scores,) = self.in_batches([example], self.scores_of)
        probability, i = scores[0].softmax(0).max(0)
        print(f"{self.labels[i]}  {probability:.4f}")


class Instruct(Task):
    """Prompts to answers: the next-token loss, on the tokens of the answers alone."""

    def count(self, example):
        return sum(target != -100 for target in example["rows"][0][1])

    def terms(self, examples):
        idx, targets, _ = self.collate(examples)
        log_probs, _ = token_log_probs(self.gpt, idx, targets)
        return {"loss": -log_probs[targets != -100]}

    def evaluate(self):
        metrics = super().evaluate()
        return {**metrics, "val_perplexity": perplexity(metrics["val_loss"])}


class Choice(Task):
    """Which ending of a text is most likely? In the format of HellaSwag (Zellers et al. 2019)."""

    def encode(self, row):
        text, endings, label = text_of(row, "ctx"), row["endings"], int(row["label"])
        if len(endings) < 2 or label not in range(len(endings)):
            raise ValueError(f"label {label}, but {len(endings)} endings")
        start = [self.end, *self.tokenizer.encode_ordinary(text)]
        rows, lengths = [], []
        for ending in endings:
            ending = " " + ending.strip()
            parts = [(start, False), (self.tokenizer.encode_ordinary(ending), True)]
            rows.append(to_row(parts, self.block_size))
            lengths.append(len(ending.encode()))
        return {"rows": rows, "text": text, "label": label, "lengths": lengths}

    def terms(self, examples):
        """Is the right ending the one with the highest log-probability, summed or per byte? (Much
        like acc and acc_norm of the Language Model Evaluation Harness.)"""
        idx, targets, _ = self.collate(examples)
        sums = token_log_probs(self.gpt, idx, targets)[0].sum(1).cpu()
        found = []
        for e, log_probs in zip(examples, sums.split([len(e["rows"]) for e in examples])):
            label, per_byte = e["label"], log_probs / torch.tensor(e["lengths"])
            right = [scores.argmax() == label for scores in (log_probs, per_byte)]
            found.append([-log_probs.log_softmax(0)[label], *right])
        return dict(zip(("loss", "accuracy", "accuracy_per_byte"), torch.tensor(found).T))


# --- learning from preferences --------------------------------------------------------------------


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """Rafailov et al. 2023, equation 7: log-probabilities of whole answers, (P,), under the model π
    and the reference ρ -> losses, and margins β[(log π/ρ)(chosen) − (log π/ρ)(rejected)]."""
    margins = beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
    return -F.logsigmoid(margins), margins


class DPO(Task):
    """Makes the chosen answers more likely than the rejected, but stays close to the reference."""

    columns = ("chosen", "rejected")

    def set_up(self):
        self.reference = copy.deepcopy(self.gpt).to(self.machine.device).requires_grad_(False)

    def terms(self, examples):
        idx, targets, _ = self.collate(examples)  # chosen and rejected answers in turn
        log_probs = token_log_probs(self.gpt, idx, targets)[0].sum(1).view(-1, 2)  # (P, 2)
        with torch.no_grad():
            reference = token_log_probs(self.reference, idx, targets)[0].sum(1).view(-1, 2)
        loss, margin = dpo_loss(*log_probs.T, *reference.T, self.config.beta)
        accuracy = (margin > 0) + 0.5 * (margin == 0)  # at the start all margins are 0
        terms = {"loss": loss, "accuracy": accuracy, "margin": margin}
        return {**terms, "chosen": log_probs[:, 0], "rejected": log_probs[:, 1]}


class Reward(Task):
    """Scores answers; higher is better: Bradley-Terry, −log σ(r_chosen − r_rejected) (Ouyang
    et al. 2022, equation 1). In best.pt, and so in the final report, the scores of the training
    answers have mean 0 and standard deviation 1, which gives ppo and grpo a known scale."""

    columns = ("chosen", "rejected")
    has_head = True

    def set_up(self):
        # the initialization of Stiennon et al. 2020, appendix B.1
        self.add_head(1, std=1 / math.sqrt(self.gpt.config.n_embd + 1))

    def terms(self, examples):
        chosen, rejected = self.scores_of(examples).view(-1, 2).T
        accuracy = (chosen > rejected) + 0.5 * (chosen == rejected)
        loss = -F.logsigmoid(chosen - rejected)
        return {"loss": loss, "accuracy": accuracy, "chosen": chosen, "rejected": rejected}

    def best_checkpoint(self):
        scores = torch.cat(self.in_batches(self.splits["train"], self.scores_of))
        weight, bias = (p.detach() for p in self.model["head"].parameters())
        head = {"weight": weight / scores.std(), "bias": (bias - scores.mean()) / scores.std()}
        return {**super().best_checkpoint(), "head": head}

    def score(self, conversations):
        """[(messages, answer), ...] -> their scores, (N,), on the CPU."""
        examples = [{"rows": [self.row(*conversation)]} for conversation in conversations]
        return torch.cat(self.in_batches(examples, self.scores_of))[:, 0].cpu()

    def predict(self, text):
        """Prints the score of an answer, or of a conversation given as a line of JSON."""
        example = {"messages": [], "output": text}
        if text.startswith("{"):
            example = conversation_of(json.loads(text), "output")
        print(f"{self.score([(example['messages'], example['output'])]).item():+.4f}")


# --- reinforcement learning -----------------------------------------------------------------------

# Simpler than InstructGPT (Ouyang et al. 2022): PPO's value function is a head on the policy, since
# a separate model would double the cost; there is no pretraining loss (PPO-ptx), since the KL
# penalty is enough at this size; its coefficient is fixed; and prompts come from a file.

GAMMA, LAMBDA = 1.0, 0.95  # of the advantages
CLIP, VALUE_WEIGHT = 0.2, 0.1  # of the loss
PASSES, PARTS = 4, 4  # passes over a step's answers; updates in each pass
UNFINISHED = -1.0  # added to the score of an answer that does not end


def clipped_loss(log_probs, old_log_probs, advantages):
    """Schulman et al. 2017, equation 7, negated; and the fraction that was clipped."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    losses = -torch.min(ratio * advantages, clipped * advantages)
    return losses.mean(), (ratio != clipped).float().mean()


class GRPO(Task):
    """Group relative policy optimization (Shao et al. 2024, "DeepSeekMath"): learns to write
    answers that a reward model scores high, but stays close to the reference, the initial model.
    Several answers to a prompt are sampled and compared: A_i = (s_i − mean s) / std s. GRPO suits
    cheap sampling; PPO, whose critic learns from every answer, suits expensive answers."""

    curves = ("score", "val_score")

    def set_up(self):
        path = self.config.reward_model  # with predict, it loads its head and reads no examples
        reward = FinetuneConfig(task="reward", init_from=path, predict="-", batch_size=16)
        self.score = Reward(reward, self.machine, load_checkpoint(path)).score
        self.reference = copy.deepcopy(self.gpt).to(self.machine.device).requires_grad_(False)

    def encode(self, row):
        # prompt and answer must fit the context together, as the model reads them in training
        self.config.max_new_tokens = min(self.config.max_new_tokens, self.block_size // 2)
        example = conversation_of(row)
        return {**example, "rows": [(self.prompt(example["messages"]), [])]}

    def respond(self, examples):
        """Samples an answer to each from the policy π, without top_k or top_p. Returns idx and
        targets, (B, T); scores, whether the answers ended, and kl, (B,); log π and log ρ of the
        targets, (B, T), where ρ is the reference; and the states of π, (B, T, C)."""
        prompts = [e["rows"][0][0] for e in examples]
        answers = self.answers(prompts)
        ended = torch.tensor([answer[-1] == self.end for answer in answers])
        texts = [(e["messages"], self.text(answer)) for e, answer in zip(examples, answers)]
        scores = self.score(texts) + UNFINISHED * ~ended
        parts = [[(prompt, False), (a, True)] for prompt, a in zip(prompts, answers)]
        idx, targets, _ = self.collate([{"rows": [to_row(p, self.block_size)]} for p in parts])
        with torch.no_grad(), self.machine.autocast():  # answers() turned dropout off
            log_probs, x = token_log_probs(self.gpt, idx, targets)
            reference, _ = token_log_probs(self.reference, idx, targets)
        (scores,) = self.machine.put(scores)
        kl = (log_probs - reference).sum(1)  # an estimate; its mean over samples is the KL
        sampled = {"idx": idx, "targets": targets, "scores": scores, "ended": ended, "kl": kl}
        return sampled | {"log_probs": log_probs, "reference": reference, "x": x}

    def updates(self, state):
        examples = [e for e in self.batch(state["step"]) for _ in range(self.config.group_size)]
        sampled = self.respond(examples)  # reproducible, as train() seeds every step
        mask = sampled["targets"] != -100
        tensors = (sampled["idx"], sampled["targets"], sampled["log_probs"])
        tensors += self.credit(mask, **sampled)
        self.model.train()
        for _ in range(PASSES):
            for part in torch.randperm(len(mask)).tensor_split(min(PARTS, len(mask))):
                with self.machine.autocast():
                    yield [self.loss(*(tensor[part] for tensor in tensors))]
        self.record(score=sampled["scores"], kl=sampled["kl"])
        self.record(length=mask.sum(1), ended=sampled["ended"])
        state["examples"] += len(examples)
        state["tokens"] += int(mask.sum())

    def measure(self, split):
        """On up to 100 prompts. The best checkpoint has the highest score minus beta times KL."""
        torch.manual_seed(0)  # the same samples in every evaluation; train() seeds again
        sampled = self.respond(up_to_100(self.splits[split]))
        score, kl = sampled["scores"].mean().item(), sampled["kl"].mean().item()
        return {"loss": self.config.beta * kl - score, "score": score, "kl": kl}

    def policy_loss(self, idx, targets, old_log_probs, advantages):
        """Returns the clipped loss and, for all N targets, log π (N,) and the states that predict
        them (N, C)."""
        mask = targets != -100
        log_probs, x = token_log_probs(self.gpt, idx, targets)
        loss, clipped = clipped_loss(log_probs[mask], old_log_probs[mask], advantages[mask])
        self.record(clipped=clipped)
        return loss, log_probs[mask], x[mask]

    def credit(self, mask, scores, reference, **sampled):
        """Returns the last arguments of loss(), (B, T): advantages, equal for all tokens of an
        answer, and log ρ."""
        groups = scores.view(-1, self.config.group_size)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        return advantages.view(-1, 1) * mask, reference

    def loss(self, idx, targets, old_log_probs, advantages, reference):
        """The clipped loss plus β times the KL from the reference, in an estimate that is never
        negative (equation 4)."""
        loss, log_probs, _ = self.policy_loss(idx, targets, old_log_probs, advantages)
        log_ratio = reference[targets != -100] - log_probs  # log ρ/π
        kl_loss = (log_ratio.exp() - log_ratio - 1).mean()
        self.record(kl_loss=kl_loss)
        return loss + self.config.beta * kl_loss


def advantages_of(rewards, values, mask):
    """Generalized advantage estimation: Schulman et al. 2016, equation 16. All (B, T), where mask
    marks the answer: A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t, and V = 0 past the
    end."""
    next_values = F.pad(values * mask, (0, 1))[:, 1:]  # V_{t+1}
    deltas = (rewards + GAMMA * next_values - values) * mask
    advantages = [torch.zeros_like(deltas[:, 0])]
    for delta in deltas.unbind(1)[::-1]:
        advantages.append(delta + GAMMA * LAMBDA * advantages[-1])
    return torch.stack(advantages[:0:-1], dim=1) * mask


class PPO(GRPO):
    """Proximal policy optimization (Schulman et al. 2017; Ouyang et al. 2022): like GRPO, but a
    critic predicts the expected score at each token, so credit is assigned per token."""

    def set_up(self):
        super().set_up()
        self.add_head(1, std=0)

    def credit(self, mask, scores, log_probs, reference, x, **sampled):
        """Returns the last arguments of loss(), (B, T): advantages, with mean 0 and variance 1, and
        returns. Each token costs β (log π − log ρ); the last one earns the score."""
        with torch.no_grad():
            values = self.apply_head(x)[..., 0] * mask
        rewards = self.config.beta * (reference - log_probs)
        last = mask.cumsum(1).argmax(1)  # where each answer ends
        rewards[torch.arange(len(rewards)), last] += scores
        advantages = advantages_of(rewards, values, mask)
        mean, std = advantages[mask].mean(), advantages[mask].std(correction=0)
        return (advantages - mean) / (std + 1e-8) * mask, advantages + values

    def loss(self, idx, targets, old_log_probs, advantages, returns):
        """The clipped loss plus half the squared error of the critic (Schulman et al. 2017,
        equation 9)."""
        loss, _, x = self.policy_loss(idx, targets, old_log_probs, advantages)
        value_loss = (self.apply_head(x)[:, 0] - returns[targets != -100]).square().mean() / 2
        self.record(value_loss=value_loss)
        return loss + VALUE_WEIGHT * value_loss


# --- files, examples, batches ---------------------------------------------------------------------


def manual_texts():
    """Yields (where, row): docstrings of Python's library, labeled with the package that they are
    from, for the eight packages with the most docstrings, up to 300 of each."""
    found = collections.defaultdict(list)  # package -> [(module, docstring)]
    for module, title, text in sorted(library_docstrings(), key=lambda e: hash_fraction(e[1])):
        if "." in module and clean(text):
            found[module.split(".")[0]].append((module, text))
    for label in sorted(found, key=lambda label: len(found[label]), reverse=True)[:8]:
        for module, text in found[label][:300]:
            yield module, {"text": text, "label": label, "group": module}


def manual_answers():
    """Yields (where, row): "Explain NAME(ARGUMENTS).", with the first sentence of its docstring as
    the answer. The rejected answer explains something else, mostly of a module nearby."""
    explained = []
    for module, title, text in sorted(library_docstrings(), key=lambda e: hash_fraction(e[0])):
        paragraph = " ".join(clean(text).split("\n\n")[0].split())
        sentence = re.match(r".*?[.!?](?= |$)|.*", paragraph)[0]
        if "._" not in title.split("(")[0] and 20 <= len(sentence) <= 200 and len(title) <= 100:
            explained.append((module, title, sentence))
    for i, (module, title, sentence) in enumerate(explained):
        answers = {"output": sentence, "chosen": sentence, "rejected": explained[i - 50][2]}
        yield module, {"group": module, "instruction": f"Explain {title}.", **answers}


def split_of(group, config):
    """The split of a row of data: a hash of its group decides, so that duplicates share a split. By
    the same rule, prepare_data.py holds out the modules of the default examples."""
    if config.eval_only and config.data:
        return "test"
    place = hash_fraction(group)
    if place < 0.1 and not config.val:
        return "val"
    return "test" if 0.1 <= place < 0.2 and not config.test else "train"


def read_rows(path, columns=()):
    """Yields (where, row) of a .jsonl, .json, .csv or .tsv file; a row is {column: value}. A .tsv
    file has no header if its first line has as many columns as these but none of their names."""
    path = pathlib.Path(path)
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json"):
        yield from prepare_data.read_json(path)
        return
    if kind not in (".csv", ".tsv"):
        raise ValueError(f"{path}: give a .jsonl, .json, .csv or .tsv file")
    with damaged(path):
        text = path.read_bytes().decode("utf-8-sig")
        delimiter = "\t" if kind == ".tsv" else "," if "," in text.partition("\n")[0] else ";"
        quoting = csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL
        lines = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
        rows = [(f"{path}, line {lines.line_num}", values) for values in lines if values]
    names = [name.strip().lower() for name in rows[0][1]] if rows else []
    is_headerless = kind == ".tsv" and len(names) == len(columns)
    if is_headerless and {column.lower() for column in columns}.isdisjoint(names):
        names = columns
    else:
        rows = rows[1:]
    for where, values in rows:
        if len(values) != len(names):
            raise ValueError(f"{where}: {len(values)} values, but {len(names)} columns")
        yield where, dict(zip(names, values))


def text_of(row, *names):
    """The text in the first of these columns that the row has, cleaned."""
    for name in names:
        value = row.get(name, row.get(name.lower()))
        if value is not None:
            if not isinstance(value, (str, int, float)) or not (text := clean(str(value))):
                raise ValueError(f"{name} must be text and not empty")
            return text
    found = ", ".join(str(name)[:40] for name in row)
    raise ValueError(f"no text in column {' or '.join(names)} (columns: {found})")


def conversation_of(row, *answers):
    """A row -> {"messages": the prompt, [{"role", "content"}, ...]; "text": the same as one string;
    and each of these answers}. These rows are equivalent:

    {"instruction": "add", "input": "1 2", "output": "3"}     or "prompt" for "instruction"
    {"messages": [a user's message, the assistant's answer]}
    {"prompt": [a user's message], "output": "3"}             or "chosen" and "rejected"
    {"chosen": [a user's message, the assistant's answer], "rejected": ...}
    """
    messages, said = row.get("prompt"), row.get("messages") or row.get("chosen")
    if not isinstance(messages, list) and isinstance(said, list):
        ends = [i for i, message in enumerate(said) if message["role"] == "assistant"]
        # what ends with a question is all prompt, if the answers have columns of their own
        holds_answer = said[-1]["role"] == "assistant" or not row.keys() >= {*answers}
        messages = said[: ends[-1]] if ends and holds_answer else said
    if not isinstance(messages, list):
        text = text_of(row, "instruction", "prompt")
        text += f"\n\n### Input:\n{text_of(row, 'input')}" if row.get("input") else ""
        messages = [{"role": "user", "content": text}]
    for message in messages:
        if message["role"] not in ALPACA or not isinstance(message["content"], str):
            raise ValueError(f"a message needs a role ({', '.join(ALPACA)}) and text in content")
    example = {"messages": messages, "text": "\n".join(clean(m["content"]) for m in messages)}
    if not example["text"].strip():
        raise ValueError("there is no prompt")
    for name in answers:
        value = row.get(name, row.get("messages"))
        if isinstance(value, list):  # of which the answer is the assistant's last message
            value = next((m["content"] for m in value[::-1] if m["role"] == "assistant"), None)
        example[name] = text_of({name: value} if value else row, name)
    return example


def to_row(parts, block_size):
    """[(tokens, is_learned), ...] -> idx, targets: lists of one length, at most block_size. A
    target is the token after its idx, or -100 if that one is not learned. A row that is too long
    loses its start, but not that of its last part; if that alone is too long, also its end."""
    tokens = [token for part, _ in parts for token in part]
    learned = [token if is_learned else -100 for part, is_learned in parts for token in part]
    # the state that predicts the last part's first token is the one before it
    start = max(0, min(len(tokens) - block_size, len(tokens) - len(parts[-1][0]) - 1))
    end = start + block_size
    return tokens[start:end], [*learned[1:], -100][start:end]


def batch_at(n, lengths, batch_size, seed):
    """The n-th of an endless, reproducible sequence of batches, as indices of examples. In each
    epoch they are sorted by length, with ±20% of random jitter, so a batch needs little padding."""
    per_epoch = math.ceil(len(lengths) / batch_size)
    epoch, i = divmod(n, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    order = np.argsort(lengths * rng.uniform(0.8, 1.2, len(lengths)))
    first = rng.permutation(per_epoch)[i] * batch_size
    return order[first : first + batch_size]


# --- main -----------------------------------------------------------------------------------------

TASKS = {"classify": Classify, "instruct": Instruct, "choice": Choice}
TASKS |= {"dpo": DPO, "reward": Reward, "ppo": PPO, "grpo": GRPO}


def settings(flags):
    """The config of a run with these flags."""
    name = flags.get("task", FinetuneConfig.task)
    if name not in TASKS:
        raise ValueError(f"--task={name}: choose from {', '.join(TASKS)}")
    if flags.get("predict") == "":
        raise ValueError("--predict is empty: give it some text")
    defaults = TASK_DEFAULTS[name] | {"learning_rate": 0.0}  # see Task.prepare
    return FinetuneConfig(**{"out_dir": f"out/{name}", **defaults, **flags})


def check(config):
    """Raises ValueError for incompatible settings."""
    check_counts(config, "max_new_tokens", "group_size", "lora_rank")
    task = TASKS[config.task]
    weights = ["all", "last_block", "lora"] + (["head"] if task.has_head else [])
    for flag, choices in {"train": weights, "template": ["", "roles", "alpaca"]}.items():
        if (value := getattr(config, flag)) not in choices:
            raise ValueError(f"--{flag}={value}: choose from {', '.join(choices)}")
    if config.predict and not task.has_head:
        raise ValueError("--predict is for --task=classify and --task=reward")
    if task is Choice and not config.data:
        raise ValueError("--task=choice needs a file of questions: --data=FILE")
    if task is GRPO and config.group_size < 2:
        raise ValueError(f"--group_size={config.group_size}: must be 2 or more, to compare answers")
    if config.predict or config.eval_only:  # writes nothing
        return
    reads = [config.init_from] + ([config.reward_model] if issubclass(task, GRPO) else [])
    for name in reads:
        model, out_dir = (pathlib.Path(path).resolve() for path in (name, config.out_dir))
        if out_dir in (model, model.parent):
            raise ValueError(f"--out_dir={config.out_dir} would overwrite {name}, which is read")


def main(argv=None):
    flags = vars(prepare_data.flag_parser(FinetuneConfig(), __doc__).parse_args(argv))
    config, saved = settings(flags), None
    if config.init_from == "resume":
        config, saved = load_run(FinetuneConfig, {**flags, "out_dir": config.out_dir})
    check(config)
    machine = Machine(config)
    if machine.world_size > 1:
        raise ValueError("finetune.py runs as a single process: start it without torchrun")
    checkpoint = load_checkpoint(config.init_from)
    torch.manual_seed(config.seed)
    task = TASKS[config.task](config, machine, checkpoint)
    if config.predict:
        return task.predict(config.predict)
    if config.eval_only:
        return task.report()
    folder = pathlib.Path(config.out_dir)
    with prepare_data.lock(folder):
        task.prepare()
        task.write_answers("before")
        if saved:
            if saved.get("examples") != task.digest:
                raise ValueError(f"{folder}: the examples differ from those the run started with")
            with damaged(folder / "last.pt"):
                task.model.load_state_dict(saved["model"])
        else:
            print("before:", format_metrics(task.evaluate()), sep="  ")
        train(config, machine, task, saved)
        task.load_best(load_checkpoint(folder / "best.pt"))
        task.report(folder)
        task.write_answers("after", folder)


if __name__ == "__main__":
    prepare_data.script(main)
