"""Fine-tunes a trained GPT to classify texts, follow instructions, or prefer better answers.

    python finetune.py --task=classify      # a paragraph of Python's manual -> code or prose
    python finetune.py --task=instruct      # "Explain os.path.join(path, *paths)." -> an answer
    python finetune.py --task=classify --data=spam.tsv --out_dir=out/spam --train=lora
    python finetune.py --task=classify --init_from=out/spam --predict="You won! Call 09061701461"
    python finetune.py --task=instruct --init_from=gpt2 --data=instructions.json
    python finetune.py --task=choice --data=hellaswag.jsonl   # evaluation only
    python finetune.py --task=dpo --init_from=out/instruct    # prefer the better answer
    python finetune.py --task=reward --init_from=out/instruct # learn to score answers
    python finetune.py --task=ppo --init_from=out/instruct    # learn answers that score highly
    python finetune.py --task=grpo --init_from=out/instruct   # the same, without a critic
    python finetune.py --task=grpo --init_from=out/instruct --reward=five.py  # your own reward
    python finetune.py --task=grpo --help                     # the task's settings

Reading order: the objectives, as functions that can be copied; LoRA; the settings; the tasks, each
with its loss; reinforcement learning; files and examples. The loop is train.train(). best.pt is a
complete model, with LoRA merged in.
"""

import argparse
import collections
import copy
import csv
import hashlib
import io
import json
import math
import operator
import pathlib
import re
import runpy
import traceback
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import prepare_data
import train
from gpt import GPT, cross_entropy, load_checkpoint, sample
from prepare_data import HELD_OUT, clean, damaged, hash_fraction, library_docstrings, text_of

# --- objectives -----------------------------------------------------------------------------------

# What the methods below minimize. π is the policy, the model that is being trained; ρ is the
# reference, the model as it was before training (π_ref in the papers).


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1):
    """Direct preference optimization (Rafailov et al. 2023, equation 7): −log σ(margin), where
    margin = β[log π/ρ (chosen) − log π/ρ (rejected)]. Takes the log-probabilities of whole answers,
    (N,), under π and under ρ; returns the losses and the margins, each (N,)."""
    margins = beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
    return -F.logsigmoid(margins), margins


def reward_loss(chosen, rejected):
    """The Bradley-Terry model: −log σ(chosen − rejected), for the scores of both answers, each
    (N,); returns (N,). (Ouyang et al. 2022, equation 1, with K = 2 answers to each prompt.)"""
    return -F.logsigmoid(chosen - rejected)


def group_advantages(scores, group_size):
    """GRPO (Shao et al. 2024, section 4.1.2): A_i = (s_i − mean s) / std s, with the unbiased std,
    over the group_size answers to each prompt, adjacent in scores (N,) -> (N,). Equal scores give
    0."""
    groups = scores.view(-1, group_size)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (Schulman et al. 2016, equation 16). All (B, T), where mask
    marks the answer: A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t, and V = 0 past the
    end. Returns the advantages, 0 outside of the answer."""
    next_values = F.pad(values * mask, (0, 1))[:, 1:]  # V_{t+1}
    deltas = (rewards + gamma * next_values - values) * mask
    advantages = [torch.zeros_like(deltas[:, 0])]
    for delta in deltas.unbind(1)[::-1]:
        advantages.append(delta + gamma * lam * advantages[-1])
    return torch.stack(advantages[:0:-1], dim=1) * mask


def clipped_loss(log_probs, old_log_probs, advantages, clip=0.2):
    """PPO (Schulman et al. 2017, equation 7), negated, for each token: −min(r A, clip(r, 1 ± ε) A),
    where r = π/π_old. Also returns which ratios r were outside the bounds."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio * advantages, clipped * advantages), ratio != clipped


def kl_estimate(log_probs, reference_log_probs):
    """A never-negative estimate of KL(π‖ρ) at each token that π sampled:
    ρ/π − log ρ/π − 1 (Shao et al. 2024, equation 4). Takes log-probabilities of any shape."""
    log_ratio = reference_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1


# --- LoRA -----------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A x, where W is frozen and only the small A and B are trained (Hu
    et al. 2021, section 4.1). B starts at zero, so nothing changes at first; A is initialized as
    in the authors' code (in the paper, from a Gaussian). Replaces a linear layer, whose weight and
    bias it shares and freezes."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")  # no memory yet
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
    """Makes every linear layer in the blocks a LoRALinear. (The paper adapts attention only.)"""
    for name, module in list(gpt.transformer.h.named_modules()):
        if isinstance(module, nn.Linear):
            gpt.transformer.h.set_submodule(name, LoRALinear(module, rank, alpha, dropout))


def merged_weights(gpt):
    """The state_dict of an equivalent plain GPT, with the product of A and B added to each W."""
    weights = {name: w for name, w in gpt.state_dict().items() if "lora_" not in name}
    for name, module in gpt.named_modules():
        if isinstance(module, LoRALinear):
            product = module.scale * module.lora_B @ module.lora_A
            weights[f"{name}.weight"] = (module.weight + product).detach()
    return weights


# --- settings -------------------------------------------------------------------------------------


@dataclass
class FinetuneConfig(train.RunConfig):
    task: str = "instruct"  # classify, instruct, choice, dpo, reward, ppo or grpo
    init_from: str = "out"  # the model to start from: a run's folder, gpt2, ...; or resume
    out_dir: str = ""  # folder for checkpoints and results
    data: str = ""  # examples: .jsonl, .json, .csv, .tsv (default: made from Python's manual)
    val: str = ""  # examples for validation (default: a tenth of data)
    test: str = ""  # examples for the test (default: a tenth of data)
    eval_only: bool = False  # evaluate on all of data, without training
    train: str = "all"  # weights to train: all, last_block, head (classify, reward) or lora
    lora_rank: int = 8  # rank of the matrices that LoRA adds
    lora_alpha: float = 16.0  # strength of LoRA: its output times alpha / rank
    lora_dropout: float = 0.0  # share of values zeroed at random in LoRA's input
    block_size: int = 0  # context length; a longer one trains the positions, too (0: the model's)
    dropout: float = 0.0  # share of values zeroed at random in training, against overfitting
    min_lr: float = 0.0  # learning rate at the end of the decay
    weight_decay: float = 0.0  # pulls matrices toward 0; erodes what the examples do not use
    batch_size: int = 8  # examples that go through the model at once; in RL, prompts per step
    learning_rate: float = 0.0  # peak learning rate (0: the task's, lower for wider models)
    epochs: float = 3.0  # passes through the examples (not in RL)
    max_iters: int = 0  # training steps (0: as many as epochs take)
    eval_interval: int = 0  # steps between evaluations (0: an epoch)
    log_interval: int = 50  # steps between progress lines
    max_new_tokens: int = 128  # maximum length of an answer
    # classify
    text_field: str = "text"  # column with the text
    label_field: str = "label"  # column with the label
    lm_weight: float = 0.5  # how much the next-token loss counts beside the label's
    balance: bool = False  # downsample every label to the size of the rarest
    pooling: str = "mean"  # what the head reads: the mean of all tokens, or the last one
    predict: str = ""  # classify this text (reward: score this answer) and exit
    # conversations, and reinforcement learning (RL) on them
    template: str = ""  # prompt format: roles (special tokens) or alpaca (default: the model's)
    loss_on_prompt: bool = False  # for instruct: learn the prompts, too
    beta: float = 0.1  # for dpo and RL: the penalty for drifting from the reference model
    reward: str = "out/reward"  # for RL: a checkpoint of --task=reward, or a program, FILE.py
    group_size: int = 1  # for RL: answers per prompt


# where a task's defaults differ; --task=TASK --help shows them
SAMPLING = {"max_iters": 100, "eval_interval": 10, "log_interval": 1, "max_new_tokens": 48}
TASK_DEFAULTS = {
    "classify": {"epochs": 6.0, "batch_size": 32, "dropout": 0.2},
    "instruct": {"epochs": 2.0},
    "choice": {"eval_only": True},
    "ppo": {**SAMPLING, "batch_size": 32},
    "grpo": {**SAMPLING, "group_size": 8},
}

# --- what all tasks share -------------------------------------------------------------------------


class Task:
    """The part of train()'s interface that all tasks share. A task defines, or overrides,

    encode(row)       a row of a file -> an example: {"rows": [(idx, targets), ...] as in to_row,
                      "text": the text or prompt, and more}; raises ValueError for a bad row
    terms(examples)   -> {name: (N,)}: training minimizes the mean of "loss"; an evaluation reports
                      the mean of each
    """

    rate = 1e-3  # the learning rate for a model that is 128 wide; tuned
    columns = ("output",)  # those that hold a row's answers
    labels = None
    writes_text = True  # the trained model does, rather than giving a label or a score
    curves, lr_scales = ("train_loss", "val_loss"), None  # see train()
    legend = ""  # explains the metrics on the screen

    def __init__(self, config, machine, base, has_examples=True):
        """base is the checkpoint that training starts from."""
        self.config, self.machine, self.base = config, machine, base
        self.spec, self.tokenizer = prepare_data.load_tokenizer(base, config.init_from)
        self.end = self.tokenizer.eot_token
        with damaged(config.init_from):
            self.gpt = GPT.from_checkpoint(base, dropout=config.dropout, attn_dropout=0.0)
        self.gpt.resize(self.tokenizer.n_vocab, config.block_size)
        self.block_size = self.gpt.config.block_size
        self.max_new_tokens = config.max_new_tokens
        default = prepare_data.default_template(self.tokenizer)
        self.template = config.template or base.get("template") or default
        self.too_long = 0  # rows that were truncated
        self.measured = collections.defaultdict(list)  # see train()
        self.splits = read_examples(self) if has_examples else {}
        # digests of what a resumed run reads again, which must not have changed
        self.inputs = {"examples": hashlib.sha256(repr(self.splits).encode()).hexdigest()}
        self.model = nn.ModuleDict({"gpt": self.gpt})
        self.set_up()
        self.model.to(machine.device)
        examples = self.splits.get("train", [])
        self.lengths = np.array([max(len(idx) for idx, _ in e["rows"]) for e in examples])

    def set_up(self):
        """Override to add anything beyond the model and the examples."""

    def read(self, path, skip):
        """Yields (where, row) of a file or, without one, of the default examples."""
        return prepare_data.read_rows(path, skip=skip) if path else manual_answers()

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
        if "rejected" in self.columns:
            parts = [(part, False) for part, _ in parts[:-1]] + parts[-1:]
        elif self.config.loss_on_prompt:
            parts = [(part, True) for part, _ in parts]
        return to_row(parts, self.block_size)

    def prompt(self, messages):
        """Tokenizes a conversation, keeping only the end of a long one, to leave room to answer."""
        limit = self.block_size - min(self.max_new_tokens, self.block_size // 2)
        return prepare_data.chat_prompt(messages, self.tokenizer, self.template)[-limit:]

    def collate(self, examples):
        """The rows of these examples -> idx and targets, (R, T), padded at the end, which causal
        attention ignores, and the index of each row's last token, (R,)."""
        rows = [row for example in examples for row in example["rows"]]
        last = torch.tensor([len(idx) - 1 for idx, _ in rows])
        # a multiple of 16: oneDNN compiles its kernels anew for each length
        length = min(math.ceil(max(len(idx) for idx, _ in rows) / 16) * 16, self.block_size)
        idx = torch.tensor([idx + [self.end] * (length - len(idx)) for idx, _ in rows])
        targets = torch.tensor([learned + [-100] * (length - len(learned)) for _, learned in rows])
        return self.machine.put(idx, targets, last)

    def add_head(self, outputs, std):
        """A linear layer that turns states of the model into labels, or into a score. The head of a
        checkpoint of the same task, with the same labels, is reused."""
        config, base = self.config, self.base
        has_head = (base.get("task"), base.get("labels")) == (config.task, self.labels)
        if not (has_head or self.writes_text) and (config.predict or config.eval_only):
            raise ValueError(f"{config.init_from} has no head for --task={config.task}: train one")
        self.pooling = base.get("pooling", "last") if has_head else config.pooling
        self.model["head"] = head = nn.Linear(self.gpt.config.n_embd, outputs)
        nn.init.normal_(head.weight, std=std)
        nn.init.zeros_(head.bias)
        if has_head:
            with damaged(config.init_from):
                head.load_state_dict(base["head"])

    def apply_head(self, x):
        """In float32: bfloat16 would round scores to steps of about 0.03."""
        with torch.autocast(x.device.type, enabled=False):
            return self.model["head"](x.float())

    def pool(self, x, last):
        """States (R, T, C) -> what the head reads, (R, C): the mean of all tokens, or only the last
        token, whose state has seen the whole text."""
        if self.pooling == "last":
            return x[torch.arange(len(x)), last]
        is_padding = torch.arange(x.shape[1], device=x.device) > last[:, None]
        return x.masked_fill(is_padding[..., None], 0).sum(1) / (last[:, None] + 1)

    def scores_of(self, examples):
        """The head's output for each row, (R, outputs)."""
        idx, _, last = self.collate(examples)
        return self.apply_head(self.pool(self.gpt.hidden(idx), last))

    def batch(self, n):
        numbers = batch_at(n, self.lengths, self.config.batch_size, self.config.seed)
        return [self.splits["train"][i] for i in numbers]

    def updates(self, step):
        """One update, as a list of batches; a batch is a list of examples."""
        count = self.config.gradient_accumulation_steps
        return [[self.batch(step * count + i) for i in range(count)]]

    def loss(self, batch):
        """The sum of the losses; the other terms are recorded for metrics.csv."""
        terms = self.terms(batch)
        loss = terms.pop("loss").sum()
        self.record(**terms)
        return loss

    def count(self, batch):
        return len(batch)

    def tokens(self, batch):
        return sum(len(idx) for example in batch for idx, _ in example["rows"])

    def record(self, **values):
        for name, value in values.items():
            self.measured[name].append(value.detach().float().mean())

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

    def rank(self, row):
        return [row["val_loss"]]

    def report(self, folder=None):
        """Prints metrics on held-out examples; with a folder, may also write files there."""
        for split in filter(self.splits.get, ("val", "test")):
            print(f"{split:5}", train.format_metrics(self.measure(split)), sep="  ")

    def checkpoint(self):
        return {"model": self.model.state_dict(), "inputs": self.inputs}

    def best_checkpoint(self):
        best = {"config": asdict(self.gpt.config), "model": merged_weights(self.gpt)}
        best |= {"task": self.config.task, "template": self.template, "tokenizer": self.spec}
        if self.writes_text:  # for chat: the most questions in one conversation
            said = [[m["role"] for m in e["messages"]] for e in self.splits["train"]]
            asked = [roles.count("user") for roles in said]
            best["turns"] = max(*asked, self.base.get("turns", 0))
        if "head" in self.model:
            head = self.model["head"].state_dict()
            best |= {"head": head, "labels": self.labels, "pooling": self.pooling}
        return best

    def load_best(self, best):
        """Takes the weights of best.pt, into which LoRA is merged."""
        self.model["gpt"] = self.gpt = GPT.from_checkpoint(best).to(self.machine.device)
        if "head" in best:
            self.model["head"].load_state_dict(best["head"])


def token_log_probs(gpt, idx, targets):
    """Returns log p of each target, (R, T), 0 where there is none, and the states that predict
    them, (R, T, C). The sum over a row is the log p of its answer."""
    mask = targets != -100
    x = gpt.hidden(idx)
    log_probs = -cross_entropy(gpt.lm_head(x[mask]), targets[mask])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, log_probs), x


def sample_answers(task, prompts, temperature=1.0):
    """The model's answers to these prompts, in tokens, up to and including the end token. Prompts
    of different lengths go through the model side by side: while some are still being read, the
    answers to shorter ones are already being written."""
    start, end = 0, min(map(len, prompts))
    length = min(max(map(len, prompts)) + task.max_new_tokens, task.block_size)
    rows = [prompt + [-1] * (length - len(prompt)) for prompt in prompts]  # -1: still open
    (idx,) = task.machine.put(torch.tensor(rows))  # (B, length)
    cache, gpt = task.gpt.new_cache(len(idx), length), task.gpt.eval()
    ended = torch.zeros_like(idx[:, 0], dtype=torch.bool)
    with torch.inference_mode(), task.machine.autocast():
        while end < length and not ended.all():
            x = gpt.hidden(idx[:, start:end], cache, start)
            token = sample(gpt.lm_head(x[:, -1]), temperature)
            is_open = idx[:, end] < 0
            idx[:, end] = torch.where(is_open, token, idx[:, end])
            ended |= is_open & (token == task.end)
            start, end = end, end + 1
    answers = []
    for prompt, row in zip(prompts, idx.tolist()):
        answer = row[len(prompt) : len(prompt) + task.max_new_tokens]
        stop = answer.index(task.end) + 1 if task.end in answer else len(answer)
        answers.append(answer[:stop])
    return answers


def text_of_answer(task, answer):
    data = (prepare_data.token_bytes(task.tokenizer, t) for t in answer if t != task.end)
    return b"".join(data).decode(errors="replace")


# --- learning from examples -----------------------------------------------------------------------


class Classify(Task):
    """Texts to labels: cross-entropy of the label, plus lm_weight times the next-token loss on the
    text, which helps when examples are few (Radford et al. 2018, equation 5)."""

    rate = 2e-3
    writes_text = False
    curves = ("label_loss", "val_label_loss")

    def set_up(self):
        examples = self.splits.get("train", [])
        if not self.gpt.config.tie_weights:
            self.lr_scales = {"wte.weight": 10}  # as in pretraining: most tokens are rare
        labels = collections.Counter(example["label"] for example in examples)
        self.labels = sorted(labels) or self.base.get("labels") or []
        if self.config.balance and examples:
            examples.sort(key=lambda example: hash_fraction(example["text"]))
            groups = [[e for e in examples if e["label"] == label] for label in labels]
            self.splits["train"] = [e for group in groups for e in group[: min(labels.values())]]
        self.add_head(len(self.labels), std=0.02)
        if len(self.labels) < 2:
            raise ValueError(f"at least two labels are needed; found {self.labels}")
        found = {e["label"] for split in self.splits.values() for e in split}
        if unknown := found - {*self.labels}:
            raise ValueError(f"no training example has the label {min(unknown)!r}")

    def read(self, path, skip):
        columns = (self.config.label_field, self.config.text_field)
        return prepare_data.read_rows(path, columns, skip) if path else manual_texts()

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
        scores = self.apply_head(self.pool(x, last))
        loss = label_loss = F.cross_entropy(scores, labels, reduction="none")
        accuracy = (scores.argmax(-1) == labels).float()
        if config.lm_weight and config.train != "head":
            losses = cross_entropy(self.gpt.lm_head(x).flatten(0, 1), targets.flatten())
            counts = (targets != -100).sum(1).clamp(min=1)
            loss = label_loss + config.lm_weight * losses.view(targets.shape).sum(1) / counts
        return {"loss": loss, "label_loss": label_loss, "accuracy": accuracy}

    def rank(self, row):
        """The best model is the most accurate; among equals, the one with the lowest loss."""
        return [-row["val_accuracy"], row["val_loss"]]

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
            line = f"\n{split:5} accuracy {accuracy:.4f}  macro F1 {f1:.4f}"
            print(f"{line}  (always predicting the most common label: {common:.4f})")
            if n <= 12:
                print(f"{'label':12} predicted:", *(f"{label[:8]:>8}" for label in self.labels))
                for label, counts in zip(self.labels, confusion.tolist()):
                    print(f"{label[:23]:23}", *(f"{count:8}" for count in counts))
            for e, i, p in zip(examples, predicted, probability):
                rows.append([split, e["text"], e["label"], self.labels[i], f"{p:.4f}"])
        if folder:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            prepare_data.write_file(folder / "predictions.csv", text.getvalue().encode())

    def predict(self, text):
        example = self.encode({self.config.text_field: text, self.config.label_field: "?"})
        (scores,) = self.in_batches([example], self.scores_of)
        probability, i = scores[0].softmax(0).max(0)
        print(f"{self.labels[i]}  {probability:.4f}")


class Instruct(Task):
    """Prompts to answers: the next-token loss, on the tokens of the answers alone."""

    rate = 5e-4  # falls to 3e-5 at GPT-2's width of 768

    def count(self, batch):
        """The number of targets, so that each weighs the same in a step."""
        targets = (target for example in batch for target in example["rows"][0][1])
        return sum(target != -100 for target in targets)

    def terms(self, examples):
        idx, targets, _ = self.collate(examples)
        log_probs, _ = token_log_probs(self.gpt, idx, targets)
        return {"loss": -log_probs[targets != -100]}


class Choice(Task):
    """Which ending of a text is most likely? In the format of HellaSwag (Zellers et al. 2019)."""

    def encode(self, row):
        text, endings, label = text_of(row, "ctx"), row.get("endings"), text_of(row, "label")
        if not isinstance(endings, list) or not all(isinstance(e, str) for e in endings):
            raise ValueError("endings must be a list of texts")
        if label not in map(str, range(len(endings))) or len(endings) < 2:
            raise ValueError(f"label {label}, but {len(endings)} endings")
        start = [self.end, *self.tokenizer.encode_ordinary(text)]
        rows, lengths = [], []
        for ending in endings:
            ending = " " + ending.strip()
            parts = [(start, False), (self.tokenizer.encode_ordinary(ending), True)]
            rows.append(to_row(parts, self.block_size))
            lengths.append(len(ending.encode()))
        return {"rows": rows, "text": text, "label": int(label), "lengths": lengths}

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


class DPO(Task):
    """Makes the chosen answers more likely than the rejected ones, compared to the reference."""

    rate = 1e-4
    columns = ("chosen", "rejected")
    objective = staticmethod(dpo_loss)
    legend = "accuracy: the share of pairs whose margin (see dpo_loss) is above 0"

    def set_up(self):
        self.reference = copy.deepcopy(self.gpt).to(self.machine.device).requires_grad_(False)
        self.inputs["init_from"] = digest(self.gpt)

    def terms(self, examples):
        idx, targets, _ = self.collate(examples)  # chosen and rejected answers in turn
        chosen, rejected = token_log_probs(self.gpt, idx, targets)[0].sum(1).view(-1, 2).T
        with torch.no_grad():
            reference = token_log_probs(self.reference, idx, targets)[0].sum(1).view(-1, 2).T
        loss, margin = self.objective(chosen, rejected, *reference, self.config.beta)
        accuracy = (margin > 0) + 0.5 * (margin == 0)  # at the start all margins are 0
        terms = {"loss": loss, "accuracy": accuracy, "margin": margin}
        return terms | {"chosen": chosen, "rejected": rejected}


class Reward(Task):
    """Scores answers; higher is better. In best.pt, the head is rescaled so that the scores of the
    training answers have mean 0 (as in the paper) and standard deviation 1 (our own choice), which
    gives ppo and grpo a known scale. The final report uses best.pt."""

    columns = ("chosen", "rejected")
    writes_text = False

    def set_up(self):
        # the initialization of Stiennon et al. 2020, appendix B.1
        self.add_head(1, std=1 / math.sqrt(self.gpt.config.n_embd + 1))

    def terms(self, examples):
        chosen, rejected = self.scores_of(examples).view(-1, 2).T
        accuracy = (chosen > rejected) + 0.5 * (chosen == rejected)
        loss = reward_loss(chosen, rejected)
        return {"loss": loss, "accuracy": accuracy, "chosen": chosen, "rejected": rejected}

    def best_checkpoint(self):
        scores = torch.cat(self.in_batches(self.splits["train"], self.scores_of))
        weight, bias = (p.detach() for p in self.model["head"].parameters())
        head = {"weight": weight / scores.std(), "bias": (bias - scores.mean()) / scores.std()}
        return {**super().best_checkpoint(), "head": head}

    def score(self, examples, answers):
        """The scores of answers to the prompts of these examples, (N,), on the CPU."""
        pairs = zip((example["messages"] for example in examples), answers)
        scores = self.in_batches([{"rows": [self.row(*pair)]} for pair in pairs], self.scores_of)
        return torch.cat(scores)[:, 0].cpu()

    def predict(self, text):
        """Prints the score of an answer, or of a conversation given as a line of JSON."""
        example = {"messages": [], "output": text}
        if text.startswith("{"):
            example = conversation_of(json.loads(text), "output")
        print(f"{self.score([example], [example['output']]).item():+.4f}")


# --- reinforcement learning -----------------------------------------------------------------------


def load_reward(path, machine):
    """What scores answers: a reward model, or the function reward(example, answer) -> float in a
    Python file, where example is the row of the data, with all its columns. Returns a function of
    examples and answers that gives the scores, (N,), and a digest of the model or the file."""
    if not path.endswith(".py"):
        config = FinetuneConfig(task="reward", init_from=path, eval_only=True, batch_size=16)
        task = Reward(config, machine, load_checkpoint(path), has_examples=False)
        return task.score, digest(task.model)
    source, reward = pathlib.Path(path).read_bytes(), runpy.run_path(path).get("reward")
    if reward is None:
        raise ValueError(f"{path} has no function reward(example, answer)")

    def score(examples, answers):
        scores = []
        for row, answer in zip((example["row"] for example in examples), answers):
            try:
                scores.append(float(reward(row, answer)))
            except Exception as error:
                traceback.print_exc()
                raise ValueError(f"{path}: reward() failed (see above) for {row}") from error
            if not math.isfinite(scores[-1]):
                raise ValueError(f"{path}: reward() is {scores[-1]} for {answer!r}, {row}")
        return torch.tensor(scores)

    return score, hashlib.sha256(source).hexdigest()


class Policy(Task):
    """Learns to write answers that earn a high reward, but stays close to the reference, the
    initial model. A step samples answers to some prompts and scores them (rollout), turns the
    scores into an advantage for each token (credit), and trains several times on shuffled parts of
    the rollout (updates, loss).

    Simpler than InstructGPT (Ouyang et al. 2022): PPO's critic is a head on the policy, which
    starts at zero, since a model of its own would double the cost; there is no pretraining loss
    (PPO-ptx), since the KL penalty is enough at this size; and prompts come from a file. As there,
    the penalty's weight β is fixed (Ziegler et al. 2019 adapt it).
    """

    rate = 1e-4
    curves = ("score", "val_score")
    legend = (
        "score: the reward of the sampled answers; kl: how far, in nats, the model has moved; "
        "ended: the share of answers that end; clipped: the share of tokens whose probability "
        "changed by more than a fifth in a step; val_loss: beta * kl - score"
    )
    epochs, minibatches = 4, 4  # passes over a step's answers; updates in each pass
    unfinished = -1.0  # added to the score of an answer that does not end

    def set_up(self):
        self.reward, self.inputs["reward"] = load_reward(self.config.reward, self.machine)
        self.inputs["init_from"] = digest(self.gpt)
        self.reference = None  # needed only for the penalty
        if self.config.beta > 0:
            self.reference = copy.deepcopy(self.gpt).to(self.machine.device).requires_grad_(False)
        # prompt and answer must fit the context together, as the model reads them in training
        self.max_new_tokens = min(self.max_new_tokens, self.block_size // 2)

    def encode(self, row):
        example = conversation_of(row)
        prompt = self.prompt(example["messages"])
        return {**example, "prompt": prompt, "rows": [(prompt, [])]}

    def count(self, batch):
        return int((batch["targets"] != -100).sum())

    tokens = count

    def measure(self, split):
        """On up to 100 prompts. The best checkpoint has the highest score minus beta times KL."""
        torch.manual_seed(0)  # the same samples in every evaluation; train() seeds again
        rollout = self.rollout(evenly_spaced(self.splits[split], 100))
        score, kl = rollout["scores"].mean().item(), rollout["kl"].mean().item()
        return {"loss": self.config.beta * kl - score, "score": score, "kl": kl}

    def rollout(self, examples):
        """Samples an answer to each prompt from π, at temperature 1, and scores it. Returns

        idx, targets           (B, T): prompts with answers; targets are -100 outside the answers
        log_probs, reference   (B, T): log π and log ρ of the targets, 0 elsewhere
        values                 (B, T): what the critic predicts (PPO only)
        scores, ended, kl      (B,): kl is an unbiased estimate of KL(π‖ρ) from one sample
        """
        prompts = [example["prompt"] for example in examples]
        answers = sample_answers(self, prompts)
        ended = torch.tensor([answer[-1] == self.end for answer in answers])
        texts = [text_of_answer(self, answer) for answer in answers]
        scores = self.reward(examples, texts) + self.unfinished * ~ended
        pairs = [[(prompt, False), (a, True)] for prompt, a in zip(prompts, answers)]
        idx, targets, _ = self.collate([{"rows": [to_row(p, self.block_size)]} for p in pairs])
        scores, ended = self.machine.put(scores, ended)
        rollout = {"idx": idx, "targets": targets, "scores": scores, "ended": ended}
        with torch.no_grad(), self.machine.autocast():  # sample_answers() turned dropout off
            log_probs, states = token_log_probs(self.gpt, idx, targets)
            reference = log_probs  # without a reference, kl is 0
            if self.reference:
                reference, _ = token_log_probs(self.reference, idx, targets)
            if "head" in self.model:
                rollout["values"] = self.apply_head(states)[..., 0]
        kl = (log_probs - reference).sum(1)
        return {**rollout, "log_probs": log_probs, "reference": reference, "kl": kl}

    def updates(self, step):
        """The step's answers with their advantages, in minibatches, one for each update."""
        examples = [e for e in self.batch(step) for _ in range(self.config.group_size)]
        rollout = self.rollout(examples)  # reproducible, as train() seeds every step
        rollout |= self.credit(rollout)
        self.record(score=rollout["scores"], kl=rollout["kl"], ended=rollout["ended"])
        self.record(length=(rollout["targets"] != -100).sum(1))
        updates = []
        for _ in range(self.epochs):
            shuffled = torch.randperm(len(examples))
            for rows in shuffled.tensor_split(min(self.minibatches, len(examples))):
                updates.append([{name: tensor[rows] for name, tensor in rollout.items()}])
        return updates


class GRPO(Policy):
    """Group relative policy optimization (Shao et al. 2024, "DeepSeekMath"): samples several
    answers to each prompt and compares each to its group. The paper averages the loss over the
    tokens of each answer, then over answers, and makes one update per rollout; here, every token
    weighs the same, as in DAPO (Yu et al. 2025; the paper's average is lenient with long wrong
    answers: Liu et al. 2025), and there are epochs × minibatches updates."""

    def credit(self, rollout):
        """All tokens of an answer get its advantage."""
        advantages = group_advantages(rollout["scores"], self.config.group_size)
        return {"advantages": advantages[:, None] * (rollout["targets"] != -100)}

    def loss(self, batch):
        """The clipped loss plus β times the KL divergence from the reference."""
        mask = batch["targets"] != -100
        log_probs, _ = token_log_probs(self.gpt, batch["idx"], batch["targets"])
        losses, clipped = clipped_loss(log_probs, batch["log_probs"], batch["advantages"])
        kl_losses = kl_estimate(log_probs, batch["reference"])
        self.record(clipped=clipped[mask], kl_loss=kl_losses[mask])
        return (losses + self.config.beta * kl_losses)[mask].sum()


class PPO(Policy):
    """Proximal policy optimization (Schulman et al. 2017; Ouyang et al. 2022): a critic predicts,
    at each token, the reward still to come, so that each token gets its own advantage. Unlike
    equation 9 of Schulman et al., the loss has no entropy term."""

    def set_up(self):
        super().set_up()
        self.add_head(1, std=0)  # the critic

    def credit(self, rollout):
        """Each token costs β (log π − log ρ); the last one earns the score. The advantages get
        mean 0 and variance 1; the returns are the critic's targets."""
        mask = rollout["targets"] != -100
        rewards = self.config.beta * (rollout["reference"] - rollout["log_probs"])
        last = mask.cumsum(1).argmax(1)  # the count of answer tokens first peaks at the last one
        rewards[torch.arange(len(rewards)), last] += rollout["scores"]
        values = rollout["values"] * mask
        advantages = gae(rewards, values, mask)
        mean, std = advantages[mask].mean(), advantages[mask].std(correction=0)
        whitened = (advantages - mean) / (std + 1e-8) * mask
        return {"advantages": whitened, "returns": advantages + values}

    def loss(self, batch, value_weight=0.05):
        """The clipped loss plus value_weight times the squared error of the critic."""
        mask = batch["targets"] != -100
        log_probs, states = token_log_probs(self.gpt, batch["idx"], batch["targets"])
        losses, clipped = clipped_loss(log_probs, batch["log_probs"], batch["advantages"])
        errors = (self.apply_head(states)[..., 0] - batch["returns"]).square()
        self.record(clipped=clipped[mask], value_loss=errors[mask])
        return (losses + value_weight * errors)[mask].sum()


# --- files, examples, batches ---------------------------------------------------------------------


def manual_texts():
    """Yields (where, row): paragraphs of Python's manual, labeled code or prose. Code follows the
    prompt >>> of an example; prose starts with a capital letter and ends with a period."""
    found = {"code": {}, "prose": {}}  # {paragraph: its document}
    for group, document in prepare_data.python_manual():
        for text in clean(document).split("\n\n"):
            code = "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) (.*)", text, re.MULTILINE))
            label, text = ("code", code) if code else ("prose", text)
            if 20 <= len(text) <= 300 and (code or re.fullmatch(r"(?s)[A-Z].*\.", text)):
                found[label].setdefault(text, group)
    for label, texts in found.items():
        for text in sorted(texts, key=hash_fraction)[:600]:
            yield texts[text], {"text": text, "label": label, "group": texts[text]}


def manual_answers():
    """Yields (where, row): "Explain NAME(ARGUMENTS).", with the first sentence of its docstring as
    the answer. The rejected answer explains something else: the entry 50 places before, which is
    mostly in the same split, since both are ordered by the hash of the module."""
    explained = []
    for module, title, text in sorted(library_docstrings(), key=lambda doc: hash_fraction(doc[0])):
        paragraph = " ".join(clean(text).split("\n\n")[0].split())
        sentence = re.match(r".*?[.!?](?= |$)|.*", paragraph)[0]
        if "._" not in title.split("(")[0] and 20 <= len(sentence) <= 200 and len(title) <= 100:
            explained.append((module, title, sentence))
    for i, (module, title, sentence) in enumerate(explained):
        answers = {"output": sentence, "chosen": sentence, "rejected": explained[i - 50][2]}
        yield module, {"group": module, "instruction": f"Explain {title}.", **answers}


def read_examples(task):
    """{"train", "val", "test": examples} of a task's files. Files for val and test are kept whole;
    without them, split_of holds out a tenth of data for each. No group or text is in two splits."""
    config, splits = task.config, {"train": [], "val": [], "test": []}
    for example in encoded(task, config.data):
        splits[split_of(example["group"], config)].append(example)
    held_out = set()  # the groups and texts of the splits before
    for split, path in {"test": config.test, "val": config.val, "train": ""}.items():
        new = [e for e in splits[split] if held_out.isdisjoint((e["group"], e["text"]))]
        splits[split] = encoded(task, path) if path and not config.eval_only else new
        held_out |= {e[key] for e in splits[split] for key in ("group", "text")}
    counts = {split: len(examples) for split, examples in splits.items()}
    many = task.too_long > sum(counts.values()) / 2
    hint = f" (try --block_size={4 * task.block_size})" if many else ""
    print(f"examples: {counts}; {task.too_long} rows were truncated to fit the context{hint}")
    needed = ("test",) if config.eval_only else ("train", "val")
    if not all(counts[split] for split in needed):
        raise ValueError(f"{config.data or 'the manual'}: too few examples {counts}")
    return splits


def encoded(task, path):
    """The examples of a file. Rows that cannot be used are skipped and counted."""
    examples, skipped = [], []
    for where, row in task.read(path, skipped.append):
        try:
            example = task.encode(row)
            group = prepare_data.group_of(row, example["text"])
            examples.append({**example, "group": group, "row": row})
        except ValueError as error:
            skipped.append(f"{where}: {error}")
    if skipped and not examples:
        raise ValueError(skipped[0])
    if skipped:
        print(f"skipped {len(skipped):,} rows of {path}, the first: {skipped[0]}")
    return examples


def split_of(group, config):
    """The split of a row of data: a hash of its group decides, so that duplicates share a split. By
    the same rule, prepare_data.py holds out the modules of the default examples."""
    if config.eval_only and config.data:
        return "test"
    place = hash_fraction(group)
    if place < HELD_OUT and not config.val:
        return "val"
    return "test" if HELD_OUT <= place < 2 * HELD_OUT and not config.test else "train"


# other names of the columns messages, instruction, input and output
MESSAGES = ("messages", "conversations")
PROMPT = ("instruction", "prompt", "question")
INPUT = ("input", "context")
OUTPUT = ("output", "response", "completion", "answer")


def conversation_of(row, *answers):
    """A row -> {"messages": the prompt, [{"role", "content"}, ...]; "text": the same as one string;
    and each of these answers}. These rows are equivalent; all can have a column system:

    {"instruction": "add", "input": "1 2", "output": "3"}
    {"messages": [a user's message, the assistant's answer]}
    {"prompt": [a user's message], "output": "3"}             or "chosen" and "rejected"
    {"chosen": [a user's message, the assistant's answer], "rejected": ...}
    """
    row = {name: value for name, value in row.items() if value not in (None, "", [])}
    said, prompt, chosen = first_of(row, *MESSAGES), first_of(row, *PROMPT), first_of(row, "chosen")
    names = {name: OUTPUT if name == "output" else (name,) for name in answers}
    found = {name: first_of(row, *names[name]) for name in answers}
    if said is None and isinstance(chosen, list) and chosen[0]["role"] != "assistant":
        said = chosen
    if isinstance(said, list):
        # a list that ends with a question is all prompt, if the answers have their own columns
        is_prompt = said[-1]["role"] != "assistant" and None not in found.values()
        messages = said if is_prompt else said[: last_answer(said)]
    elif isinstance(prompt, list):
        messages = prompt
    elif isinstance(chosen, str) and prompt is None:
        raise ValueError("no prompt beside chosen: put both into columns, or lists of messages")
    else:
        text = text_of(row, *PROMPT)
        text += f"\n\n### Input:\n{text_of(row, *INPUT)}" if first_of(row, *INPUT) else ""
        messages = [{"role": "user", "content": text}]
    if "system" in row:
        messages = [{"role": "system", "content": text_of(row, "system")}, *messages]
    text = "\n".join(message["content"] for message in messages)
    if not text.strip():
        raise ValueError("there is no prompt")
    example = {"messages": messages, "text": text}
    for name, value in found.items():
        value = said if name == "output" and value is None else value
        if isinstance(value, list):
            value = next((m["content"] for m in value[last_answer(value) :]), None)
        example[name] = text_of(row if value is None else {name: value}, name)
    return example


def first_of(row, *names):
    """What the first of these columns holds that the row has; a list is one of messages."""
    value = next((row[name] for name in names if name in row), None)
    return list(map(message_of, value)) if isinstance(value, list) else value


def message_of(message):
    """A message as {"role", "content"}, from these keys or ShareGPT's "from" and "value"; content
    may be a list of parts. Raises ValueError if it has another role, or is not text."""
    message = message if type(message) is dict else {}
    role = str(message.get("role", message.get("from")))
    role = {"human": "user", "gpt": "assistant"}.get(role, role)
    if role not in prepare_data.ALPACA:
        raise ValueError(f"a message has the role {role}; drop it, or use system, user, assistant")
    content = message.get("content", message.get("value"))
    parts = content if type(content) is list else [{"text": content}]
    texts = [part.get("text") if type(part) is dict else None for part in parts]
    if not all(type(text) is str for text in texts):
        raise ValueError("a message must be text, or a list of parts of type text")
    return {"role": role, "content": clean("".join(texts))}


def last_answer(messages):
    """The index of the assistant's last message, or past the end if there is none."""
    answers = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    return max(answers, default=len(messages))


def to_row(parts, block_size):
    """[(tokens, is_learned), ...] -> idx, targets: lists of one length, at most block_size. A
    target is the token after its idx, or -100 if that one is not learned. A row that is too long
    loses its start, but keeps its last part; if that alone is too long, it loses its end, too."""
    tokens = [token for part, _ in parts for token in part]
    learned = [token if is_learned else -100 for part, is_learned in parts for token in part]
    # the state that predicts the last part's first token is the one before it
    start = max(0, min(len(tokens) - block_size, len(tokens) - len(parts[-1][0]) - 1))
    end = start + block_size
    return tokens[start:end], [*learned[1:], -100][start:end]


def evenly_spaced(examples, count):
    """At most count examples."""
    return examples[:: math.ceil(len(examples) / count)]


def batch_at(n, lengths, batch_size, seed):
    """The n-th of an endless, reproducible sequence of batches, as indices of examples. In each
    epoch they are sorted by length, with ±20% of random jitter, so a batch needs little padding."""
    per_epoch = math.ceil(len(lengths) / batch_size)
    epoch, i = divmod(n, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    order = np.argsort(lengths * rng.uniform(0.8, 1.2, len(lengths)))
    first = rng.permutation(per_epoch)[i] * batch_size
    return order[first : first + batch_size]


def digest(model):
    """The SHA-256 of a model's weights."""
    found = hashlib.sha256()
    for weight in model.state_dict().values():
        found.update(weight.cpu().numpy())
    return found.hexdigest()


# --- main -----------------------------------------------------------------------------------------

TASKS = {"classify": Classify, "instruct": Instruct, "choice": Choice}
TASKS |= {"dpo": DPO, "reward": Reward, "ppo": PPO, "grpo": GRPO}


def read_flags(argv):
    """The config of a run with these flags: those that are not given are the task's defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=FinetuneConfig.task)
    name = first.parse_known_args(argv)[0].task
    if name not in TASKS:
        raise ValueError(f"--task={name}: choose from {', '.join(TASKS)}")
    defaults = FinetuneConfig(task=name, out_dir=f"out/{name}", **TASK_DEFAULTS.get(name, {}))
    flags = vars(prepare_data.flag_parser(defaults, __doc__).parse_args(argv))
    return replace(defaults, **flags), flags


def check(config):
    """Raises ValueError for incompatible settings."""
    train.check_counts(config, "max_new_tokens", "group_size", "lora_rank")
    task = TASKS[config.task]
    weights = ["all", "last_block", "lora"] + ([] if task.writes_text else ["head"])
    allowed = {"train": weights, "template": ["", "roles", "alpaca"], "pooling": ["mean", "last"]}
    for flag, choices in allowed.items():
        if (value := getattr(config, flag)) not in choices:
            raise ValueError(f"--{flag}={value}: choose from {', '.join(choices)}")
    if config.predict and task.writes_text:
        raise ValueError("--predict is for --task=classify and --task=reward")
    if task is Choice and not (config.data and config.eval_only):
        raise ValueError("--task=choice only evaluates, and needs a file of questions: --data=FILE")
    if issubclass(task, GRPO) and config.group_size < 2:
        raise ValueError(f"--group_size={config.group_size}: must be 2 or more, to compare answers")
    if config.predict or config.eval_only:  # writes nothing
        return
    out_dir = pathlib.Path(config.out_dir).resolve()
    models = [config.init_from] + ([config.reward] if issubclass(task, Policy) else [])
    for model in models:
        path = pathlib.Path(model).resolve()
        if out_dir == (path if path.is_dir() else path.parent) and path.suffix != ".py":
            raise ValueError(f"--out_dir={config.out_dir} would overwrite {model}, which is read")


def choose_weights(task):
    """Decides which weights are trained."""
    config, gpt = task.config, task.gpt
    gpt.requires_grad_(config.train == "all")
    if config.train == "last_block":
        gpt.transformer.h[-1].requires_grad_(True)
        gpt.transformer.ln_f.requires_grad_(True)
    if config.train == "lora":
        add_lora(gpt, config.lora_rank, config.lora_alpha, config.lora_dropout)
    if task.block_size > task.base["config"]["block_size"]:
        gpt.transformer.wpe.requires_grad_(True)


def choose_settings(task):
    """The config with values for how fast, how often and how long to train."""
    config, machine, parameters = task.config, task.machine, list(task.model.parameters())
    rate = task.rate * (3 if config.train == "lora" else 1)
    rate *= (128 / task.gpt.config.n_embd) ** 1.5
    per_step = config.batch_size * config.gradient_accumulation_steps
    per_epoch = math.ceil(len(task.lengths) / per_step)
    chosen = {
        "learning_rate": config.learning_rate or rate,
        "eval_interval": config.eval_interval or per_epoch,
        "max_iters": config.max_iters or math.ceil(config.epochs * per_epoch),
    }
    config = train.resolve(config, machine, task.model, **chosen)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    print(f"training {trained:,} of {total:,} parameters, on {machine.device} in {config.dtype}")
    print(f"peak learning rate: {config.learning_rate:.1e}")
    return config


def restore_model(task, saved, path):
    """Gives the model the weights of a last.pt, if the run read the same examples and models."""
    for name, found in task.inputs.items():
        if saved.get("inputs", {}).get(name) != found:
            raise ValueError(f"{path.parent}: {name} differs from what the run started with")
    with damaged(path):
        task.model.load_state_dict(saved["model"])


def answer_held_out(task):
    """The model's likeliest answers to held-out prompts: (examples, texts). At most 100, or more if
    they are short: at most 12,800 tokens in all."""
    if not task.writes_text:
        return [], []
    held_out = task.splits["test"] or task.splits["val"]
    examples = evenly_spaced(held_out, max(100, 12800 // task.max_new_tokens))
    answers, size = [], 100  # prompts that go through the model at once
    for i in range(0, len(examples), size):
        prompts = [task.prompt(e["messages"]) for e in examples[i : i + size]]
        answers += sample_answers(task, prompts, temperature=0)
    return examples, [text_of_answer(task, answer) for answer in answers]


def write_answers(folder, examples, before, after):
    """Prints a few answers from before and after training and how many equal those of the data, and
    writes all to responses.jsonl."""
    if not examples:
        return
    lines, hidden = [], ("rows", "row", "group", "text", "prompt")
    for example, old, new in zip(examples, before, after):
        fields = {key: example[key] for key in example if key not in hidden}
        lines.append(json.dumps({**fields, "before": old, "after": new}, ensure_ascii=False) + "\n")
    prepare_data.write_file(folder / "responses.jsonl", "".join(lines).encode())
    print(f"\nfrom {folder}/responses.jsonl, answers before (-) and after (+) training:")
    for example, old, new in list(zip(examples, before, after))[:5]:
        print(f"\n{example['messages'][-1]['content']}\n- {old}\n+ {new}")
    expected = [example.get("output", example["row"].get("output")) for example in examples]
    same = [sum(map(operator.eq, answers, expected)) for answers in (before, after)]
    if any(same):
        print(f"\nequal to the data's output: {same[0]} before, {same[1]} after, of {len(lines)}")


def main(argv=None):
    config, flags = read_flags(argv)
    if flags.get("predict") == "":
        raise ValueError("--predict is empty: give it some text")
    saved = None
    if config.init_from == "resume":
        config, saved = train.load_run(FinetuneConfig, {**flags, "out_dir": config.out_dir})
        if config.eval_only or config.predict:
            raise ValueError(f"to use the model of that run: --init_from={config.out_dir}")
    check(config)
    train.keep_freed_memory()
    machine = train.Machine(config)
    if machine.world_size > 1:
        raise ValueError("finetune.py runs as a single process: start it without torchrun")
    base = load_checkpoint(config.init_from)
    torch.manual_seed(config.seed)
    task = TASKS[config.task](config, machine, base, has_examples=not config.predict)
    if config.predict:
        return task.predict(config.predict)
    if config.eval_only:
        return task.report()
    folder = pathlib.Path(config.out_dir)
    with prepare_data.lock(folder):
        print(task.legend, end="\n" if task.legend else "")
        choose_weights(task)
        config = choose_settings(task)
        examples, before = answer_held_out(task)
        if saved:
            restore_model(task, saved, folder / "last.pt")
        else:
            print("before:", train.format_metrics(task.evaluate()), sep="  ")
        train.train(config, machine, task, saved)
        best = load_checkpoint(folder / "best.pt")
        task.load_best(best)
        print(f"\n{folder}/best.pt, from step {best['step']}:")
        task.report(folder)
        write_answers(folder, examples, before, answer_held_out(task)[1])


if __name__ == "__main__":
    prepare_data.script(main)
