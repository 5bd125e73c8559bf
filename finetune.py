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
    python finetune.py --task=grpo --init_from=out/instruct             # the same, without a critic

The loop is train.train(). A task makes an example of a row of a file, and of examples the terms: a
loss, and whatever else is measured. Read on in this order: LoRA; what all tasks share; the tasks,
from classification to reinforcement learning; files, examples and batches; main. best.pt is a whole
model like any other, LoRA merged.
"""

import collections
import copy
import csv
import io
import json
import math
import pathlib
import re
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gpt import GPT, load_checkpoint, next_token_losses
from prepare_data import (
    build_tokenizer,
    chat_parts,
    chat_prompt,
    clean,
    damaged,
    default_template,
    flag_parser,
    library_docstrings,
    lock,
    position,
    read_json,
    script,
    tokenizer_of,
    write_file,
)
from train import Machine, RunConfig, check_counts, format_metrics, load_run, perplexity, train


@dataclass
class FinetuneConfig(RunConfig):
    task: str = "instruct"  # classify, instruct, choice, dpo, reward, ppo or grpo
    init_from: str = "out"  # the model to start from: a run's folder, gpt2, ...; or resume
    out_dir: str = ""  # folder for checkpoints and results (default: out/TASK)
    data: str = ""  # examples: .jsonl, .json, .csv, .tsv (default: made from Python's manual)
    val: str = ""  # examples for validation (default: a tenth of data)
    test: str = ""  # examples for the test (default: a tenth of data)
    eval_only: bool = False  # measure all examples of data, without training
    train: str = "all"  # weights to train: all, last_block, head (classify, reward) or lora
    lora_rank: int = 8  # rank of the matrices that LoRA adds
    lora_alpha: float = 16.0  # LoRA's product is scaled by alpha / rank
    lora_dropout: float = 0.0  # on the input of LoRA's product
    block_size: int = 0  # another context, whose new positions are trained (0: the model's)
    dropout: float = 0.0  # on embeddings and residual branches
    # where 0 stands, a task has its own default: see DEFAULTS
    batch_size: int = 0  # examples in a micro-batch; for ppo and grpo, prompts in a step
    learning_rate: float = 0.0  # the highest (0: the task's, lower for wider models)
    min_lr: float = 0.0  # the lowest, at the end of the cosine decay
    weight_decay: float = 0.0  # of matrices; it would erase what the examples do not practice
    epochs: float = 0.0  # passes through the examples
    max_iters: int = 0  # steps (0: as many as epochs take)
    eval_interval: int = 0  # steps between evaluations (0: an epoch)
    log_interval: int = 0  # steps between lines of output
    max_new_tokens: int = 0  # the longest answer that is sampled
    # classify
    text_field: str = "text"  # column with the text
    label_field: str = "label"  # column with the label
    lm_weight: float = 0.5  # weight of the next-token loss beside the label's
    balance: bool = False  # train on as many examples of each label as the rarest has
    predict: str = ""  # a text to classify, or for reward an answer to score; trains nothing
    # conversations
    template: str = ""  # of prompts: roles or alpaca (default: roles if the vocabulary has them)
    loss_on_prompt: bool = False  # for instruct: learn the prompts, too
    beta: float = 0.1  # for dpo, ppo, grpo: the cost of leaving the reference model
    reward_model: str = "out/reward"  # for ppo and grpo: a checkpoint of --task=reward
    group_size: int = 8  # for grpo: answers to a prompt
    max_kl: float = 10.0  # ppo and grpo stop at this mean KL from the start, nats an answer


# Learning rates are for models 128 wide; tasks that sample go by max_iters, not by epochs.
DEFAULTS = {
    "classify": {"learning_rate": 1e-3, "epochs": 5},
    "instruct": {"learning_rate": 5e-4, "epochs": 2},
    "choice": {},
    "dpo": {"learning_rate": 1e-4},
    "reward": {"learning_rate": 1e-3},
    "ppo": {"learning_rate": 3e-5, "batch_size": 32, "max_new_tokens": 48},
    "grpo": {"learning_rate": 3e-5, "batch_size": 8, "max_new_tokens": 48},
}
for name in ("ppo", "grpo"):
    DEFAULTS[name] |= {"max_iters": 100, "eval_interval": 10, "log_interval": 1}
SHARED_DEFAULTS = {"batch_size": 8, "epochs": 3, "log_interval": 50, "max_new_tokens": 128}


# --- LoRA -----------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A x, where W stays as it is, and A and B, both small, are trained.

    Hu et al. 2021, "LoRA", section 4.1; A starts as in the authors' code and B as 0, so nothing
    changes at first. Replaces a linear layer, whose weight and bias it shares.
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
        """The one matrix that computes the same."""
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


# --- what all tasks share -------------------------------------------------------------------------


class Task:
    """What train() asks of a task, as far as all of them here answer alike. Each one adds

    encode(row)       a row of a file -> an example: {"rows": [(idx, targets), ...], "group": ...,
                      and more}; rows as in to_row, group as in split_of
    terms(examples)   -> {name: (N,)}; the training loss is the mean of "loss", which comes first,
                      and an evaluation the means of all
    """

    kind = "instruct"  # of manual_examples, if there is no --data
    curves = ("train_loss", "val_loss")  # of loss.png
    outputs = 0  # of a head beside the language model's
    writes = False  # answers held-out prompts before and after training
    lr_scales, stop = None, None  # see train()

    def __init__(self, config, machine, checkpoint):
        self.config, self.machine, self.checkpoint_before = config, machine, checkpoint
        self.spec = tokenizer_of(checkpoint, config.init_from)
        self.tokenizer = build_tokenizer(self.spec)
        self.end = self.tokenizer.eot_token
        with damaged(config.init_from):
            self.gpt = GPT.from_checkpoint(checkpoint, dropout=config.dropout, attn_dropout=0.0)
        self.gpt.resize(min(self.tokenizer.n_vocab, self.gpt.config.vocab_size), config.block_size)
        self.block_size = self.gpt.config.block_size
        self.template = config.template or checkpoint.get("template")
        self.template = self.template or default_template(self.tokenizer)
        self.too_long = 0  # examples that were cut
        self.measured = []  # the terms of training since the last report
        self.splits = {} if config.predict else self.read_examples()
        self.model = nn.ModuleDict({"gpt": self.gpt})
        self.set_up()
        self.model.to(machine.device)

    def set_up(self):
        """For tasks that need more than the model and the examples."""

    def add_head(self, outputs, std):
        """A linear layer that reads the last token of a text, the only one that has seen all of it.
        The head of a checkpoint of the same task is taken over."""
        self.model["head"] = nn.Linear(self.gpt.config.n_embd, outputs)
        nn.init.normal_(self.model["head"].weight, std=std)
        nn.init.zeros_(self.model["head"].bias)
        before, config = self.checkpoint_before, self.config
        if before.get("task") == config.task and len(before["head"]["bias"]) == outputs:
            with damaged(config.init_from):
                self.model["head"].load_state_dict(before["head"])
        elif config.predict or config.eval_only:
            raise ValueError(f"{config.init_from}: no head; --task={config.task} trains one")

    def scores(self, x, last):
        """x (R, T, C), and where each row ends, (R,) -> (R, outputs) in float32."""
        return self.model["head"](x[torch.arange(len(x), device=x.device), last]).float()

    def row(self, messages, learned="all answers"):
        """A conversation -> idx, targets: see to_row."""
        parts = chat_parts(messages, self.tokenizer, self.template)
        self.too_long += sum(len(part) for part, _ in parts) > self.block_size
        return to_row(parts, self.block_size, learned)

    def collate(self, examples):
        """Their rows -> idx (R, T), targets (R, T), and where the last token of each is, (R,).

        Padding comes after a row, where causal attention ignores it.
        """
        rows = [row for example in examples for row in example["rows"]]
        length, last = max(len(idx) for idx, _ in rows), [len(idx) - 1 for idx, _ in rows]
        idx = [idx + [self.end] * (length - len(idx)) for idx, _ in rows]
        targets = [targets + [-100] * (length - len(targets)) for _, targets in rows]
        return self.machine.put(*map(torch.tensor, (idx, targets, last)))

    def prepare(self):
        """Decides which weights are trained, at which rate, in which batches and how many steps."""
        config, gpt = self.config, self.gpt
        gpt.requires_grad_(config.train == "all")
        if config.train == "last_block":
            gpt.transformer.h[-1].requires_grad_(True)
            gpt.transformer.ln_f.requires_grad_(True)
        if config.train == "lora":
            add_lora(gpt, config.lora_rank, config.lora_alpha, config.lora_dropout)
        if self.block_size > self.checkpoint_before["config"]["block_size"]:
            gpt.transformer.wpe.requires_grad_(True)
        self.model.to(self.machine.device).train()
        rate = DEFAULTS[config.task]["learning_rate"] * (3 if config.train == "lora" else 1)
        config.learning_rate = config.learning_rate or rate * (128 / gpt.config.n_embd) ** 1.5
        lengths = [max(len(idx) for idx, _ in e["rows"]) for e in self.splits["train"]]
        self.batches = Batches(lengths, config.batch_size, config.seed)
        per_epoch = math.ceil(self.batches.per_epoch / config.gradient_accumulation_steps)
        config.eval_interval = config.eval_interval or per_epoch
        config.max_iters = config.max_iters or math.ceil(config.epochs * per_epoch)
        check_counts(config)
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        print(
            f"training {trained:,} of {total:,} parameters ({trained / total:.1%}) at "
            f"{config.learning_rate:.1e}, on {self.machine.device} in {config.dtype}"
        )

    def count(self, example):
        """How many elements its "loss" has."""
        return 1

    def updates(self, state):
        """One update a step."""
        yield self.losses(state)

    def losses(self, state):
        """Yields a loss for each micro-batch; their sum is the mean over all elements."""
        config, first = self.config, state["examples"] // self.config.batch_size
        numbers = range(first, first + config.gradient_accumulation_steps)
        batches = [[self.splits["train"][i] for i in self.batches[n]] for n in numbers]
        total = sum(self.count(example) for batch in batches for example in batch)
        for batch in batches:
            with self.machine.autocast():
                loss, *others = (terms := self.terms(batch)).values()
            self.measured.append([term.mean().detach() for term in others])
            self.names = list(terms)[1:]
            yield loss.sum() / total
            state["examples"] += config.batch_size
            state["tokens"] += sum(len(idx) for e in batch for idx, _ in e["rows"])

    @property
    def stats(self):
        """The means of the terms besides the loss since this was last asked for."""
        means = torch.tensor(self.measured).mean(0).tolist()
        self.measured = []
        return dict(zip(self.names, means))

    def in_batches(self, split, function):
        """What function makes of each batch of a split, with dropout off."""
        self.model.eval()
        examples, size = self.splits[split], 2 * self.config.batch_size
        with torch.no_grad(), self.machine.autocast():
            found = [function(examples[i : i + size]) for i in range(0, len(examples), size)]
        self.model.train()
        return found

    def measure(self, split):
        """{name: mean over the split} of the terms."""
        parts = self.in_batches(split, self.terms)
        return {name: torch.cat([p[name] for p in parts]).mean().item() for name in parts[0]}

    def evaluate(self):
        return {f"val_{name}": mean for name, mean in self.measure("val").items()}

    def report(self, folder=None):
        """Prints what the model does on held-out examples; may write files into folder."""
        for split in ("val", "test"):
            if self.splits[split]:
                print(f"{split:5}", format_metrics(self.measure(split)), sep="  ")

    def checkpoint(self):
        return {"model": self.model.state_dict()}

    def best_checkpoint(self):
        head = {"head": self.model["head"].state_dict()} if "head" in self.model else {}
        best = {"config": asdict(self.gpt.config), "model": merged_weights(self.gpt), **head}
        return {**best, "task": self.config.task, "template": self.template, "tokenizer": self.spec}

    def load_best(self, best):
        """Takes over the weights of best.pt. LoRA is in them, so its own part becomes 0."""
        self.gpt.load_state_dict(best["model"], strict=False)
        for name, parameter in self.gpt.named_parameters():
            if name.endswith("lora_B"):
                nn.init.zeros_(parameter)
        if "head" in best:
            self.model["head"].load_state_dict(best["head"])

    def answers(self, gpt, examples, temperature=1.0, generator=None):
        """gpt's answers to the examples' "messages", in tokens, with the end token if they end."""
        prompts = [self.prompt(example) for example in examples]
        same_length, answers = collections.defaultdict(list), {}
        for i, prompt in enumerate(prompts):
            same_length[len(prompt)].append(i)  # one batch: no padding before the answer
        for numbers in same_length.values():
            (idx,) = self.machine.put(torch.tensor([prompts[i] for i in numbers]))
            how = {"temperature": temperature, "stop_token": self.end, "generator": generator}
            steps = gpt.eval().generate(idx, self.config.max_new_tokens, **how)
            for i, tokens in zip(numbers, torch.stack(list(steps), dim=1).tolist()):
                stop = tokens.index(self.end) + 1 if self.end in tokens else len(tokens)
                answers[i] = tokens[:stop]
        self.model.train()
        return [answers[i] for i in range(len(prompts))]

    def prompt(self, example):
        """The tokens of its prompt; of a long one, the end, so that an answer fits the context."""
        limit = max(1, self.block_size - self.config.max_new_tokens)
        return chat_prompt(example["messages"], self.tokenizer, self.template)[-limit:]

    def text(self, answer):
        return self.tokenizer.decode([token for token in answer if token != self.end])

    def held_out_answers(self):
        """The likeliest answers to up to 100 held-out prompts."""
        examples = (self.splits["test"] or self.splits["val"])[:100] if self.writes else []
        return examples, self.answers(self.gpt, examples, temperature=0)

    def write_answers(self, folder, before):
        """Writes responses.jsonl: held-out prompts, with the answers before training and now."""
        examples, now = self.held_out_answers()
        lines = [
            {
                "messages": e["messages"],
                "before": self.text(b),
                "after": self.text(a),
                **e["expected"],
            }
            for e, b, a in zip(examples, before, now)
        ]
        for line in lines[:3]:
            print(f"\n{line['messages'][-1]['content']}\n- {line['before']}\n+ {line['after']}")
        ended = sum(answer[-1] == self.end for answer in now)
        if lines:
            print(f"\n{ended} of {len(lines)} answers end by themselves")
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_file(folder / "responses.jsonl", text.encode())

    def read_examples(self):
        """{"train", "val", "test": examples}: see split_of."""
        config, splits = self.config, {"train": [], "val": [], "test": []}
        files = {"train": config.data, "val": config.val, "test": config.test}
        for file, path in files.items():
            rows = manual_examples(self.kind) if file == "train" and not path else []
            for where, row in read_rows(path, self.header()) if path else rows:
                try:
                    example = self.encode(row)
                except Exception as error:
                    raise ValueError(f"{where}: {error}") from error
                split = "test" if config.eval_only and path else file
                if split == "train":
                    split = split_of(example["group"], config)
                splits[split].append(example)
        held_out = {e["group"] for split in ("val", "test") for e in splits[split]}
        splits["train"] = [e for e in splits["train"] if e["group"] not in held_out]
        counts = {split: len(examples) for split, examples in splits.items()}
        print(f"examples: {counts}; {self.too_long} were too long and are cut")
        needed = ("test",) if config.eval_only else ("train", "val")
        if not all(counts[split] for split in needed):
            raise ValueError(f"{config.data or 'the manual'}: too few examples {counts}")
        return splits

    def header(self):
        """The columns of a .tsv file that has no header line."""
        return ()


def token_log_probs(gpt, idx, targets):
    """log p of each target, (R, T), and 0 where there is none (-100). A row's sum is an answer's."""
    learned = targets != -100
    losses = next_token_losses(gpt.lm_head, gpt.hidden(idx)[learned], targets[learned])
    return torch.zeros(targets.shape, device=idx.device).masked_scatter(learned, -losses)


# --- classification -------------------------------------------------------------------------------


class Classify(Task):
    """Texts to labels: cross-entropy of the label, plus lm_weight times the next-token loss on the
    text, which makes more of few examples (Radford et al. 2018, equation 5)."""

    kind = "classify"
    curves = ("label_loss", "val_loss")

    def set_up(self):
        labels = sorted({e["label"] for e in self.splits.get("train", [])})
        self.labels = labels or self.checkpoint_before.get("labels", [])
        for example in (e for examples in self.splits.values() for e in examples):
            if example["label"] not in self.labels:
                raise ValueError(f"training has no label {example['label']!r}: {example['text']}")
        if self.config.balance and labels:
            self.balance()
        if len(self.labels) < 2:
            raise ValueError(f"nothing to tell apart: the labels are {self.labels}")
        self.add_head(len(self.labels), std=0.02)

    def balance(self):
        counts, kept = collections.Counter(e["label"] for e in self.splits["train"]), []
        for label in self.labels:
            examples = [e for e in self.splits["train"] if e["label"] == label]
            examples.sort(key=lambda e: position(e["text"]))
            kept += examples[: min(counts.values())]
        self.splits["train"] = kept

    def header(self):
        return (self.config.label_field, self.config.text_field)

    def encode(self, row):
        text, label = (text_of(row, name) for name in reversed(self.header()))
        tokens = self.tokenizer.encode_ordinary(text)
        self.too_long += len(tokens) > self.block_size
        rows = [to_row([(tokens, True)], self.block_size, "all")]
        return {"rows": rows, "group": str(row.get("group") or text), "text": text, "label": label}

    def terms(self, examples):
        config, (idx, targets, last) = self.config, self.collate(examples)
        labels = torch.tensor([self.labels.index(e["label"]) for e in examples], device=idx.device)
        x = self.gpt.hidden(idx)
        scores = self.scores(x, last)
        loss = label_loss = F.cross_entropy(scores, labels, reduction="none")
        terms = {"accuracy": (scores.argmax(-1) == labels).float()}
        if self.model.training:
            terms["label_loss"] = label_loss
        if self.model.training and config.lm_weight and config.train != "head":
            losses = next_token_losses(self.gpt.lm_head, x.flatten(0, 1), targets.flatten())
            counts = (targets != -100).sum(1).clamp(min=1)
            loss = label_loss + config.lm_weight * losses.view(targets.shape).sum(1) / counts
        return {"loss": loss, **terms}

    def probabilities(self, examples):
        idx, _, last = self.collate(examples)
        return self.scores(self.gpt.hidden(idx), last).softmax(-1)  # (N, labels)

    def report(self, folder=None):
        """Prints accuracy, macro F1 and the baseline of each split; and writes predictions.csv."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["split", "text", "label", "predicted", "probability"])
        for split in ("val", "test"):
            if not (examples := self.splits[split]):
                continue
            probabilities = torch.cat(self.in_batches(split, self.probabilities)).cpu()
            labels = torch.tensor([self.labels.index(e["label"]) for e in examples])
            n, predicted = len(self.labels), probabilities.argmax(-1)
            confusion = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n)
            right, sums = confusion.diag(), confusion.sum(0) + confusion.sum(1)
            print(
                f"\n{split:5} accuracy {right.sum() / len(labels):.4f}  "
                f"macro F1 {(2 * right / sums)[sums > 0].mean():.4f}  "
                f"(always the commonest label: accuracy {confusion.sum(1).max() / len(labels):.4f})"
            )
            if n <= 12:  # rows: labels, columns: predictions
                for label, counts in zip(self.labels, confusion.tolist()):
                    print(f"{label[:20]:20}", *(f"{count:5}" for count in counts))
            for e, i, p in zip(examples, predicted, probabilities.amax(-1)):
                table.writerow([split, e["text"], e["label"], self.labels[i], f"{p:.4f}"])
        if folder:
            write_file(folder / "predictions.csv", text.getvalue().encode())

    def predict(self, text):
        example = self.encode({self.config.text_field: text, self.config.label_field: "?"})
        self.splits = {"text": [example]}
        probability, i = self.in_batches("text", self.probabilities)[0][0].max(0)
        print(f"{self.labels[i]}  {probability:.4f}")

    def best_checkpoint(self):
        return {**super().best_checkpoint(), "labels": self.labels}


# --- instructions ---------------------------------------------------------------------------------


class Instruct(Task):
    """Prompts to answers: the next-token loss, on the tokens of the answers alone."""

    writes = True

    def encode(self, row):
        *messages, answer = answered(row, "output")
        learned = "all" if self.config.loss_on_prompt else "all answers"
        rows, expected = [self.row([*messages, answer], learned)], {"expected": answer["content"]}
        return {
            "rows": rows,
            "group": group_of(row, messages),
            "messages": messages,
            "expected": expected,
        }

    def count(self, example):
        return sum(target != -100 for target in example["rows"][0][1])

    def terms(self, examples):
        idx, targets, _ = self.collate(examples)
        return {"loss": -token_log_probs(self.gpt, idx, targets)[targets != -100]}

    def evaluate(self):
        metrics = super().evaluate()
        return {**metrics, "val_perplexity": perplexity(metrics["val_loss"])}


# --- multiple choice ------------------------------------------------------------------------------


class Choice(Task):
    """Which ending of a text is the likeliest? In the format of HellaSwag (Zellers et al. 2019)."""

    def encode(self, row):
        text, endings, label = row["ctx"], row["endings"], int(row["label"])
        if len(endings) < 2 or label not in range(len(endings)):
            raise ValueError(f"label {label}, but {len(endings)} endings")
        start = [self.end, *self.tokenizer.encode_ordinary(clean(text))]
        endings = [" " + ending.strip() for ending in endings]
        parts = [[(start, False), (self.tokenizer.encode_ordinary(e), True)] for e in endings]
        rows = [to_row(part, self.block_size) for part in parts]
        lengths = [len(ending.encode()) for ending in endings]
        return {"rows": rows, "group": text, "label": label, "lengths": lengths}

    def terms(self, examples):
        """Is the right ending the one of the highest log-probability, summed or per byte? (Much
        like acc and acc_norm of the Language Model Evaluation Harness.)"""
        found = {"loss": [], "accuracy": [], "accuracy_per_byte": []}
        for example in examples:
            idx, targets, _ = self.collate([example])
            sums = token_log_probs(self.gpt, idx, targets).sum(1).cpu()
            per_byte = sums / torch.tensor(example["lengths"])
            found["loss"].append(-sums.log_softmax(0)[example["label"]])
            found["accuracy"].append(sums.argmax() == example["label"])
            found["accuracy_per_byte"].append(per_byte.argmax() == example["label"])
        return {name: torch.stack(values).float() for name, values in found.items()}

    def report(self, folder=None):
        super().report(folder)
        n = len(self.splits["test"])
        print(f"standard error of the accuracy: {0.5 / math.sqrt(n):.4f} at most")


# --- learning from preferences --------------------------------------------------------------------


class Preferences(Task):
    """Pairs of answers to a prompt, of which the first is preferred to the second."""

    kind = "preference"

    def encode(self, row):
        *messages, chosen = answered(row, "chosen")
        pair = [chosen["content"], answered(row, "rejected")[-1]["content"]]
        rows = [self.row([*messages, as_answer(text)], "last answer") for text in pair]
        expected = dict(zip(("chosen", "rejected"), pair))
        return {
            "rows": rows,
            "group": group_of(row, messages),
            "messages": messages,
            "expected": expected,
        }


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """Direct preference optimization: Rafailov et al. 2023, equation 7.

    Takes log-probabilities of whole answers, (P,), under the model and under its reference, the
    model at the start. Returns losses and margins, β[log π/ρ of the chosen − log π/ρ of the rejected].
    """
    margins = beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
    return -F.logsigmoid(margins), margins


class DPO(Preferences):
    """Makes the chosen answers likelier than the rejected ones, near the reference."""

    writes = True

    def set_up(self):
        self.reference = copy.deepcopy(self.gpt).to(self.machine.device).requires_grad_(False)

    def terms(self, examples):
        idx, targets, _ = self.collate(examples)  # chosen and rejected answers in turn
        log_probs = token_log_probs(self.gpt, idx, targets).sum(1).view(-1, 2)  # (P, 2)
        with torch.no_grad():
            reference = token_log_probs(self.reference.eval(), idx, targets).sum(1).view(-1, 2)
        losses, margins = dpo_loss(*log_probs.T, *reference.T, self.config.beta)
        accuracy = (margins > 0) + 0.5 * (margins == 0)  # at the start all margins are 0
        chosen, rejected = log_probs.T
        return {
            "loss": losses,
            "accuracy": accuracy,
            "margin": margins,
            "chosen": chosen,
            "rejected": rejected,
        }


class Reward(Preferences):
    """Scores answers, the better the higher: Bradley-Terry, −log σ(r_chosen − r_rejected) (Ouyang
    et al. 2022, equation 1). In best.pt the training answers have mean 0 and standard deviation 1.
    """

    def set_up(self):
        # Stiennon et al. 2020, appendix B.1
        self.add_head(1, std=1 / math.sqrt(self.gpt.config.n_embd + 1))

    def scores_of(self, examples):
        idx, _, last = self.collate(examples)
        return self.scores(self.gpt.hidden(idx), last)[:, 0]  # (R,)

    def terms(self, examples):
        chosen, rejected = self.scores_of(examples).view(-1, 2).T
        accuracy = (chosen > rejected) + 0.5 * (chosen == rejected)
        loss = -F.logsigmoid(chosen - rejected)
        return {"loss": loss, "accuracy": accuracy, "chosen": chosen, "rejected": rejected}

    def best_checkpoint(self):
        scores = torch.cat(self.in_batches("train", self.scores_of))
        best, head = super().best_checkpoint(), self.model["head"]
        weight, bias = head.weight.detach(), head.bias.detach()
        std = scores.std()
        return {**best, "head": {"weight": weight / std, "bias": (bias - scores.mean()) / std}}

    def score(self, conversations):
        """Lists of messages -> their scores, (N,), on the CPU."""
        self.splits["asked"] = [{"rows": [self.row(messages)]} for messages in conversations]
        return torch.cat(self.in_batches("asked", self.scores_of)).cpu()

    def predict(self, text):
        """Prints the score of an answer, or of a conversation in JSON, as a line of a file is."""
        messages = [as_answer(clean(text))]
        if text.startswith("{"):
            messages = answered(json.loads(text), "output")
        print(f"{self.score([messages]).item():+.4f}")


# --- reinforcement learning -----------------------------------------------------------------------

# Simpler than InstructGPT (Ouyang et al. 2022): PPO's value function is a head on the policy, since
# a model of its own would cost as much again; there is no pretraining loss (PPO-ptx), since the KL
# penalty is enough at this size; its coefficient is fixed; and prompts come from a file.

GAMMA, LAMBDA = 1.0, 0.95  # of the advantages
CLIP, VALUE_WEIGHT = 0.2, 0.1  # of the loss
PASSES, PARTS = 4, 4  # a step goes so often through its answers, in so many parts
UNFINISHED = -1.0  # added to the score of an answer that does not end


def advantages_of(rewards, values, mask):
    """Generalized advantage estimation: Schulman et al. 2016, equation 16.

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


def clipped_loss(log_probs, old_log_probs, advantages):
    """The clipped objective, negated: Schulman et al. 2017, equation 7; and the clipped share."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    losses = -torch.min(ratio * advantages, clipped * advantages)
    return losses.mean(), (ratio != clipped).float().mean()


class Policy(Task):
    """Makes answers likelier that a reward model scores higher, near the reference, the model at
    the start. A step samples answers to some prompts, then trains on them for some passes."""

    kind = "preference"
    curves = ("score", "val_score")
    writes = True
    group_size = 1  # answers to a prompt
    stats = None

    def set_up(self):
        config, machine = self.config, self.machine
        self.reference = copy.deepcopy(self.gpt).to(machine.device).requires_grad_(False).eval()
        how = {"task": "reward", "init_from": config.reward_model, "predict": "-", "batch_size": 16}
        checkpoint = load_checkpoint(config.reward_model)
        self.score = Reward(FinetuneConfig(**how), machine, checkpoint).score

    def encode(self, row):
        messages = prompt_of(row)
        prompt = self.prompt({"messages": messages})
        expected = {"expected": row["output"]} if "output" in row else {}
        group = group_of(row, messages)
        return {"rows": [(prompt, [])], "group": group, "messages": messages, "expected": expected}

    def respond(self, examples, seed):
        """Samples an answer to each: temperature 1 and all tokens, as the policy's distribution is.

        Returns idx, targets (B, T), scores (B,), and whether the answers end, (B,).
        """
        generator = torch.Generator(self.machine.device).manual_seed(seed)
        answers = self.answers(self.gpt, examples, generator=generator)
        asked = [[*e["messages"], as_answer(self.text(a))] for e, a in zip(examples, answers)]
        ended = torch.tensor([answer[-1] == self.end for answer in answers])
        scores = self.score(asked) + UNFINISHED * ~ended
        parts = [[(self.prompt(e), False), (a, True)] for e, a in zip(examples, answers)]
        idx, targets, _ = self.collate([{"rows": [to_row(p, self.block_size)]} for p in parts])
        return idx, targets, *self.machine.put(scores, ended)

    def states(self, gpt, idx, targets):
        """-> log p of the targets, (N,), and the hidden states that predict them, (N, C)."""
        mask = targets != -100
        x = gpt.hidden(idx)[mask]
        return -next_token_losses(gpt.lm_head, x, targets[mask]), x

    def updates(self, state):
        """Samples answers, then yields an update for each part of them in each pass."""
        config, numbers = self.config, self.batches[state["step"]]
        examples = [self.splits["train"][i] for i in numbers for _ in range(self.group_size)]
        seed = int(np.random.SeedSequence((config.seed, state["step"])).generate_state(1)[0])
        idx, targets, scores, ended = self.respond(examples, seed)
        mask = targets != -100
        with torch.no_grad(), self.machine.autocast():
            log_probs, x = self.states(self.gpt, idx, targets)
            reference, _ = self.states(self.reference, idx, targets)
            place = torch.zeros(mask.shape, device=idx.device)
            drift = place.masked_scatter(
                mask, log_probs - reference
            )  # (B, T); its sum estimates KL
            advantages, more = self.judge(scores, drift, mask, x)
        old = place.masked_scatter(mask, log_probs)
        tensors = (idx, targets, old, advantages, more)
        measured, rng = [], np.random.default_rng([config.seed, state["step"]])
        for _ in range(PASSES):
            for part in np.array_split(rng.permutation(len(idx)), min(PARTS, len(idx))):
                with self.machine.autocast():
                    loss, *values = self.loss(
                        *(tensor[torch.from_numpy(part)] for tensor in tensors)
                    )
                measured.append(values)
                yield [loss]
        kl = drift.sum(1).mean().item()
        self.stats = {
            "score": scores.mean().item(),
            "kl": kl,
            "length": mask.sum().item() / len(idx),
        }
        self.stats |= {"ended": ended.float().mean().item()}
        self.stats |= dict(zip(("clipped", "extra_loss"), torch.tensor(measured).mean(0).tolist()))
        self.stop = f"KL {kl:.1f} from the start (--max_kl)" if kl > config.max_kl else None
        state["examples"] += len(examples)
        state["tokens"] += int(mask.sum())

    def evaluate(self):
        """The best checkpoint is that of the highest score, less beta times the KL."""
        metrics = self.measure("val")
        value = metrics["score"] - self.config.beta * metrics["kl"]
        return {"val_loss": -value, "val_score": metrics["score"], "val_kl": metrics["kl"]}

    def measure(self, split):
        idx, targets, scores, _ = self.respond(self.splits[split][:100], seed=0)
        with torch.no_grad(), self.machine.autocast():
            (log_probs, _), (reference, _) = (
                self.states(gpt.eval(), idx, targets) for gpt in (self.gpt, self.reference)
            )
        self.model.train()
        kl = (log_probs - reference).sum().item() / len(idx)
        return {"score": scores.mean().item(), "kl": kl}


class PPO(Policy):
    """Proximal policy optimization (Schulman et al. 2017; Ouyang et al. 2022). A critic says what
    score it expects of each token, so credit goes to single tokens."""

    def set_up(self):
        super().set_up()
        self.critic = self.model["head"] = nn.Linear(self.gpt.config.n_embd, 1)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)

    def judge(self, scores, drift, mask, x):
        """-> whitened advantages and returns, (B, T). Each token costs β (log π − log ρ); the last
        one earns the score."""
        values = torch.zeros_like(drift).masked_scatter(mask, self.critic(x)[:, 0].float())
        rewards = -self.config.beta * drift
        last = mask.size(1) - 1 - mask.int().flip(1).argmax(1)  # where each answer ends
        rewards[torch.arange(len(rewards)), last] += scores
        advantages = advantages_of(rewards, values, mask)
        return whiten(advantages, mask), advantages + values

    def loss(self, idx, targets, old_log_probs, advantages, returns):
        """-> loss, clipped share, value loss."""
        mask = targets != -100
        log_probs, x = self.states(self.gpt, idx, targets)
        loss, clipped = clipped_loss(log_probs, old_log_probs[mask], advantages[mask])
        value_loss = (self.critic(x)[:, 0].float() - returns[mask]).square().mean() / 2
        return loss + VALUE_WEIGHT * value_loss, clipped, value_loss.detach()


class GRPO(Policy):
    """Group relative policy optimization (Shao et al. 2024, "DeepSeekMath"). Several answers to the
    same prompt judge each other: A_i = (s_i − mean s) / std s. Take it when scores come once an
    answer and sampling is cheap; take PPO when answers are long or samples dear, since its critic
    learns from every answer what to expect."""

    def set_up(self):
        super().set_up()
        self.group_size = self.config.group_size

    def judge(self, scores, drift, mask, x):
        """-> advantages, the same for all tokens of an answer, and the reference's drift, (B, T)."""
        groups = scores.view(-1, self.group_size)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        return advantages.view(-1, 1) * mask, drift

    def loss(self, idx, targets, old_log_probs, advantages, drift):
        """-> loss, clipped share, KL: ρ/π − log ρ/π − 1, an estimate that is never negative."""
        mask = targets != -100
        log_probs, _ = self.states(self.gpt, idx, targets)
        loss, clipped = clipped_loss(log_probs, old_log_probs[mask], advantages[mask])
        log_ratio = (old_log_probs - drift)[mask] - log_probs  # log ρ/π
        kl = (log_ratio.exp() - log_ratio - 1).mean()
        return loss + self.config.beta * kl, clipped, kl.detach()


# --- files, examples, batches ---------------------------------------------------------------------


def manual_examples(kind):
    """Yields (module, row) from the docstrings of Python's library, grouped by module.

    classify: a docstring, and the package it is from, one of those that have many modules.
    instruct: "Explain NAME(ARGUMENTS).", and the first sentence of its docstring; for every fourth,
    also where it is. preference: an explanation, and as a worse one that of something else.
    """
    entries = [(module, title, clean(text)) for module, title, text in library_docstrings()]
    if kind == "classify":
        modules = collections.Counter(module.split(".")[0] for module in {m for m, _, _ in entries})
        sizes = collections.Counter(module.split(".")[0] for module, _, _ in entries)
        entries.sort(key=lambda entry: position(entry[1]))
        taken = collections.Counter()
        for module, _, text in entries:
            label = module.split(".")[0]
            taken[label] += 1
            if modules[label] >= 10 and sizes[label] >= 150 and taken[label] <= 300 and text:
                yield module, {"text": text, "label": label, "group": module}
        return
    # neighbors are of the same split, so that no explanation stands in two
    entries.sort(key=lambda entry: position(entry[0]))
    explained = []
    for module, title, text in entries:
        paragraph = " ".join(text.split("\n\n")[0].split())
        sentence = re.match(r".*?[.!?](?= |$)|.*", paragraph)[0]
        if "._" not in title.split("(")[0] and 20 <= len(sentence) <= 200 and len(title) <= 100:
            explained.append((module, title, sentence))
    for i, (module, title, sentence) in enumerate(explained):
        row = {"group": module, "instruction": f"Explain {title}."}
        if kind == "preference":
            worse = explained[i - 50][2]
            yield module, {**row, "chosen": sentence, "rejected": worse}
            continue
        yield module, {**row, "output": sentence}
        if i % 4 == 1:
            question = f"Where is {title.split('(')[0]}?"
            yield module, {**row, "instruction": question, "output": f"In the module {module}."}


def split_of(group, config):
    """The split of a row without a file of its own: a hash of its "group" or its prompt decides, so
    equal ones fall on one side. The manual's pages of these modules are held out by the same rule.
    """
    place = position(group)
    if place < 0.1 and not config.val:
        return "val"
    return "test" if 0.1 <= place < 0.2 and not config.test else "train"


def read_rows(path, columns=()):
    """Yields (where, row) of a .jsonl, .json, .csv or .tsv file; a row is {column: value}.

    A .tsv file of two columns with neither of these names in its first line has no header.
    """
    path = pathlib.Path(path)
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json"):
        yield from read_json(path)
    elif kind not in (".csv", ".tsv"):
        raise ValueError(f"{path}: give a .jsonl, .json, .csv or .tsv file")
    else:
        with damaged(path):
            text = path.read_bytes().decode("utf-8-sig")
            first = text.partition("\n")[0]
            delimiter = "\t" if kind == ".tsv" else ";" if "," not in first else ","
            quoting = csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL
            lines = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
            rows = [(f"{path}, line {lines.line_num}", row) for row in lines if row]
        names = [name.strip().lower() for name in rows[0][1]] if rows else []
        if kind == ".tsv" and len(names) == len(columns) and not {*names} & {*columns}:
            names = columns
        else:
            del rows[:1]
        for where, row in rows:
            if len(row) != len(names):
                raise ValueError(f"{where}: {len(row)} columns, but {len(names)} names")
            yield where, dict(zip(names, row))


def text_of(row, *names):
    """The text in the first of these columns that the row has, cleaned."""
    for name in names:
        value = row.get(name, row.get(name.lower()))
        if value is not None:
            if not isinstance(value, (str, int, float)) or not (text := clean(str(value))):
                raise ValueError(f"{name} is empty or not text")
            return text
    found = ", ".join(str(name)[:40] for name in row)
    raise ValueError(f"no column {' or '.join(names)} (found: {found})")


def as_answer(text):
    return {"role": "assistant", "content": text}


def prompt_of(row):
    """The conversation before the answer, [{"role", "content"}, ...]: from "messages", "prompt" or
    "chosen", lists of messages, or from the texts "instruction" (or "prompt") and "input"."""
    for name in ("messages", "prompt", "chosen"):
        if isinstance(row.get(name), list):
            messages = [{"role": m["role"], "content": clean(m["content"])} for m in row[name]]
            if any(m["role"] not in ("system", "user", "assistant") for m in messages):
                raise ValueError("roles are system, user and assistant")
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            break
    else:
        text = text_of(row, "instruction", "prompt")
        text += f"\n\n### Input:\n{text_of(row, 'input')}" if row.get("input") else ""
        messages = [{"role": "user", "content": text}]
    if not any(message["content"] for message in messages):
        raise ValueError("there is no prompt")
    return messages


def answered(row, name):
    """prompt_of and the answer: the text in this column, or the last message."""
    value = row.get(name, row.get("messages"))
    if isinstance(value, list):
        answers = [clean(m["content"]) for m in value if m["role"] == "assistant"]
        if not answers or not answers[-1]:
            raise ValueError("there is no answer to learn")
        return [*prompt_of(row), as_answer(answers[-1])]
    return [*prompt_of(row), as_answer(text_of(row, name))]


def group_of(row, messages):
    """What no split divides: the row's "group", or the prompt."""
    return str(row.get("group") or "\n".join(message["content"] for message in messages))


def to_row(parts, block_size, learned="all answers"):
    """[(tokens, is_answer), ...] -> idx, targets: lists of one length, at most block_size.

    A target is the token after its idx, or -100 where that is not learned: learned is "all answers",
    "last answer" or "all". What is too long is cut: first the tokens before the last answer, from
    the oldest on; if the answer alone is still too long, its end.
    """
    tokens = [token for part, _ in parts for token in part]
    last_answer = len(tokens) - len(parts[-1][0])
    flags = [is_answer or learned == "all" for part, is_answer in parts for _ in part]
    if learned == "last answer":
        flags = [i >= last_answer for i in range(len(tokens))]
    targets = [token if flag else -100 for token, flag in zip(tokens[1:], flags[1:])] + [-100]
    start = max(0, min(len(tokens) - block_size, last_answer - 1))
    return tokens[start : start + block_size], targets[start : start + block_size]


class Batches:
    """An endless, reproducible sequence of batches, each of examples of about the same length.

    Every epoch shuffles the examples, sorts each 32 batches of them by length, and shuffles the
    batches. batches[n], the numbers of the examples in it, depends on seed and n alone.
    """

    def __init__(self, lengths, batch_size, seed):
        self.lengths, self.batch_size, self.seed = np.array(lengths), batch_size, seed
        self.per_epoch, self.epoch = math.ceil(len(lengths) / batch_size), None

    def __getitem__(self, n):
        epoch, i = divmod(n, self.per_epoch)
        if epoch != self.epoch:
            rng, size = np.random.default_rng([self.seed, epoch]), self.batch_size
            order = rng.permutation(len(self.lengths))
            chunks = np.split(order, range(32 * size, len(order), 32 * size))
            order = np.concatenate([c[np.argsort(self.lengths[c], kind="stable")] for c in chunks])
            batches = np.split(order, range(size, len(order), size))
            self.batches = [batches[i] for i in rng.permutation(len(batches))]
            self.epoch = epoch
        return self.batches[i]


# --- main -----------------------------------------------------------------------------------------

TASKS = {"classify": Classify, "instruct": Instruct, "choice": Choice}
TASKS |= {"dpo": DPO, "reward": Reward, "ppo": PPO, "grpo": GRPO}


def settle(config):
    """Fills in the task's defaults and refuses what does not go together."""
    task = TASKS.get(config.task)
    if task is None:
        raise ValueError(f"--task={config.task}: there are {', '.join(TASKS)}")
    has_head = task in (Classify, Reward)
    weights = ("all", "last_block", "lora") + (("head",) if has_head else ())
    for flag, choices in {"train": weights, "template": ("", "roles", "alpaca")}.items():
        if getattr(config, flag) not in choices:
            raise ValueError(f"--{flag}={getattr(config, flag)}: give {', '.join(choices)}")
    if config.predict and not has_head:
        raise ValueError("--predict is for --task=classify and --task=reward")
    if config.task == "choice" and not config.data:
        raise ValueError("--task=choice: give the questions, --data=FILE")
    config.eval_only |= task is Choice
    config.out_dir = config.out_dir or f"out/{config.task}"
    for name, value in {**SHARED_DEFAULTS, **DEFAULTS[config.task]}.items():
        if not getattr(config, name):
            setattr(config, name, value)
    models = [config.init_from] + [config.reward_model] * issubclass(task, Policy)
    for model in map(pathlib.Path, models):
        needed = (model.resolve(), model.resolve().parent)
        if not config.predict and pathlib.Path(config.out_dir).resolve() in needed:
            raise ValueError(f"--out_dir={config.out_dir} holds {model}, which is needed")


def main(argv=None):
    flags = vars(flag_parser(FinetuneConfig, __doc__).parse_args(argv))
    config, saved = FinetuneConfig(**flags), None
    if config.init_from == "resume":
        out_dir = config.out_dir or f"out/{config.task}"
        config, saved = load_run(FinetuneConfig, {**flags, "out_dir": out_dir})
    settle(config)
    machine = Machine(config)
    if machine.world_size > 1:
        raise ValueError("finetune.py runs as one process: start it without torchrun")
    checkpoint = load_checkpoint(config.init_from)
    torch.manual_seed(config.seed)
    task = TASKS[config.task](config, machine, checkpoint)
    if config.predict:
        return task.predict(config.predict)
    if config.eval_only:
        return task.report()
    folder = pathlib.Path(config.out_dir)
    with lock(folder):
        task.prepare()
        _, before = task.held_out_answers()
        if saved:
            with damaged(folder / "last.pt"):
                task.model.load_state_dict(saved["model"])
        else:
            print("before:", format_metrics(task.evaluate()), sep="  ")
        train(config, machine, task, saved)
        if (folder / "best.pt").exists():
            task.load_best(load_checkpoint(folder / "best.pt"))
        task.report(folder)
        task.write_answers(folder, before)


if __name__ == "__main__":
    script(main)
