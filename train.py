"""Trains a GPT on what prepare_data.py has written.

    python train.py                                        # a small GPT on Python's manual
    python train.py --data=data/book --out_dir=out/book    # on your text
    python train.py --init_from=resume                     # goes on where a run was stopped
    python train.py --init_from=out/book --data=data/more --out_dir=out/more   # from its weights
    python train.py --eval_only --init_from=out            # the validation loss of a checkpoint
    python train.py --plan --n_layer=12 --n_embd=768       # what a run would cost
    torchrun --nproc_per_node=8 train.py                   # on 8 GPUs

The loop: batch -> loss -> gradients -> clip -> AdamW, evaluated now and then. A run writes
out_dir/last.pt (all that is needed to go on), best.pt (the model with the lowest validation loss,
for sample.py), metrics.csv and, with matplotlib, loss.png. On a CPU, the same seed and number of
threads give the same weights bit for bit, also when a run is stopped and resumed.
"""

import argparse
import collections
import contextlib
import csv
import itertools
import math
import os
import pathlib
import shutil
import signal
import sys
import time
import typing
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch
from torch import nn

import prepare_data
from gpt import GPT, GPTConfig, load_checkpoint, pick_device, replacing, save_checkpoint
from prepare_data import (
    ArgumentParser,
    open_data,
    replace_text,
    script,
    sole_owner,
    tokenizer_of,
)

# --- what can be set ------------------------------------------------------------------------------


def option(default, help, fixed=False, least=1, choices=()):
    """A config field that is also a flag. A fixed one cannot change when a run is resumed; least is
    the smallest whole number allowed."""
    metadata = {"help": help, "fixed": fixed, "least": least, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """What every kind of training has, fine-tuning too."""

    out_dir: str = option("out", "folder for checkpoints and metrics.csv")
    batch_size: int = option(4, "windows in a micro-batch", fixed=True)
    gradient_accumulation_steps: int = option(1, "micro-batches in a step, in each process")
    seed: int = option(1337, "for weights, batches and dropout", fixed=True, least=0)
    # AdamW, with warmup and cosine decay
    max_iters: int = option(4000, "steps")
    learning_rate: float = option(2e-3, "the highest, at the end of warmup")
    min_lr: float | None = option(
        None, "the lowest, where decay ends (default: a tenth of learning_rate)"
    )
    warmup_iters: int = option(20, "steps in which the learning rate rises", least=0)
    lr_decay_iters: int | None = option(None, "steps until min_lr (default: max_iters)")
    weight_decay: float = option(0.1, "of matrices, not of biases and LayerNorm")
    beta1: float = option(0.9, "AdamW's memory of the gradient")
    beta2: float = option(0.99, "AdamW's memory of its square")
    grad_clip: float = option(1.0, "the highest norm of the gradient (0: no clipping)")
    # evaluation and output
    eval_interval: int = option(500, "steps between evaluations, each of which saves")
    patience: int | None = option(None, "stop after so many evaluations without a better loss")
    log_interval: int = option(100, "steps between lines of output")
    # the machine
    device: str | None = option(None, "cpu, cuda, mps (default: the best there is)")
    dtype: str | None = option(
        None,
        "precision of matrix products (default: on CUDA the best short one)",
        choices=("float32", "bfloat16", "float16"),
    )
    compile: bool | None = option(None, "use torch.compile (default: on CUDA)")

    def __post_init__(self):
        for f in fields(self):
            value, kinds = getattr(self, f.name), kinds_of(f)
            least, choices = f.metadata["least"] if int in kinds else 0, f.metadata["choices"]
            if float in kinds and type(value) is int:
                value = float(value)
            if type(value) not in kinds:
                raise ValueError(f"{f.name} must be {kinds[0].__name__}, not {value!r}")
            if type(value) in (int, float) and not least <= value < math.inf:
                raise ValueError(f"{f.name} must be {least} or more, not {value}")
            if choices and value not in (*choices, None):
                raise ValueError(f"--{f.name}={value}: unknown; there are {', '.join(choices)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, not {self.seed}")
        if self.learning_rate < (self.min_lr or 0):
            raise ValueError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}")


@dataclass
class TrainConfig(RunConfig):
    data: str = option("data", "folder written by prepare_data.py")
    init_from: str = option("scratch", "scratch, resume, or a checkpoint whose weights to take")
    eval_only: bool = option(False, "only print the validation loss")
    plan: bool = option(False, "only print what the run will cost, from a few steps of it")
    eval_iters: int = option(200, "batches in an evaluation, at most")
    # the model: see GPTConfig
    n_layer: int = option(2, "transformer blocks", fixed=True)
    n_head: int = option(4, "attention heads in a block", fixed=True)
    n_embd: int = option(128, "width of the residual stream", fixed=True)
    block_size: int = option(128, "context, tokens", fixed=True)
    dropout: float = option(0.0, "on embeddings and residual branches", fixed=True)
    attn_dropout: float = option(0.0, "on attention weights", fixed=True)
    bias: bool = option(True, "biases in Linear and LayerNorm", fixed=True)
    tie_weights: bool = option(False, "the output head shares the token embedding", fixed=True)


def kinds_of(config_field):
    """The types that a field takes: int | None -> (int, NoneType)."""
    return typing.get_args(config_field.type) or (config_field.type,)


def parse_flags(config_class, description, argv):
    """argv -> {name: value} of the flags that are given. There is a flag for each field."""
    parser = ArgumentParser(description)
    for f in fields(config_class):
        kind, text = kinds_of(f)[0], f.metadata["help"]
        name = "|".join(f.metadata["choices"]) or kind.__name__.upper()
        how = {"type": kind, "metavar": name, "default": argparse.SUPPRESS}
        if kind is bool:
            how |= {"type": parse_bool, "nargs": "?", "const": True}
        if f.default is not None:
            text += f" (default: {f.default})"
        parser.add_argument(f"--{f.name}", help=text, **how)
    return vars(parser.parse_args(argv))


def parse_bool(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return text == "True"


def merge_flags(config_class, checkpoint, flags, path):
    """The config of a resumed run: the saved one, with those flags that may change mid-run."""
    try:
        saved = config_class(**checkpoint["train_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a run that can be resumed ({error!r})")
    for f in fields(config_class):
        before = getattr(saved, f.name)
        if f.metadata["fixed"] and flags.get(f.name, before) != before:
            raise ValueError(f"{path} has {f.name}={before}, not --{f.name}={flags[f.name]}")
    here = {"out_dir": str(path.parent)}  # it may have been moved
    return replace(saved, **{**flags, **here})


# --- batches --------------------------------------------------------------------------------------


class Windows:
    """Windows of block_size + 1 consecutive tokens, as an endless, reproducible sequence.

    Every epoch cuts the tokens anew, at a phase of its own, and shuffles the windows. So no token
    is a target twice in an epoch; fewer than 2 block_size are left out. The n-th window depends on
    seed and n alone: a run can resume at any step, and several processes can share the work.
    """

    def __init__(self, arrays, block_size, vocab_size, seed=0):
        self.arrays, self.block_size, self.seed = arrays, block_size, seed
        self.vocab_size = vocab_size
        self.starts = np.cumsum([0, *map(len, arrays)])  # where each shard begins
        self.tokens = int(self.starts[-1])
        # one fewer than fit, so that the phase can shift them by 0 ... block_size - 1
        self.per_epoch = max(1, (self.tokens - 1) // block_size - 1)
        self.epoch = None

    def read(self, start):
        """The block_size + 1 tokens from position start, int64, also across shards."""
        end, parts = start + self.block_size + 1, []
        for i in range(np.searchsorted(self.starts, start, side="right") - 1, len(self.arrays)):
            parts.append(self.arrays[i][max(0, start - self.starts[i]) : end - self.starts[i]])
            if end <= self.starts[i + 1]:
                break
        window = np.concatenate(parts).astype(np.int64)
        if window.max() >= self.vocab_size:
            raise ValueError(f"a shard is damaged: token {window.max()} of {self.vocab_size}")
        return window

    def shuffle(self, epoch):
        rng = np.random.default_rng([self.seed, epoch])
        slack = self.tokens - 1 - self.per_epoch * self.block_size
        self.phase = int(rng.integers(min(slack + 1, self.block_size)))
        self.order = np.arange(self.per_epoch, dtype=np.uint32)
        rng.shuffle(self.order)
        self.epoch = epoch

    def batch(self, first, count):
        """Windows first ... first + count - 1 of the sequence -> idx, targets, (count, T) each."""
        windows = []
        for n in range(first, first + count):
            epoch, i = divmod(n, self.per_epoch)
            if epoch != self.epoch:
                self.shuffle(epoch)
            windows.append(self.read(self.phase + int(self.order[i]) * self.block_size))
        return split_targets(windows)

    def fixed_batches(self, batch_size, max_batches):
        """The same batches each time: evenly spaced windows, in which no target occurs twice."""
        n = (self.tokens - 1) // self.block_size
        chosen = np.linspace(0, n - 1, min(n, max_batches * batch_size)).astype(int)
        for i in range(0, len(chosen), batch_size):
            picked = chosen[i : i + batch_size]
            yield split_targets([self.read(int(w) * self.block_size) for w in picked])


def split_targets(windows):
    """Windows of T + 1 tokens -> idx, targets (B, T): each target is the token after its idx."""
    batch = torch.from_numpy(np.stack(windows))
    return batch[:, :-1], batch[:, 1:]


def seed_dropout(device, seed, step, rank=0):
    """Makes dropout, too, depend on the step alone."""
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    if device.type == "cpu":  # torch.manual_seed is slow: it goes through all other devices, too
        torch.default_generator.manual_seed(number)
    else:
        torch.get_device_module(device).manual_seed(number)


# --- the machine ----------------------------------------------------------------------------------


class Machine:
    """Device and precision of a run, checked against what is there; which of torchrun's processes
    this is, and how they talk."""

    def __init__(self, config):
        self.rank = int(os.environ.get("RANK", "0"))  # torchrun sets these
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = pick_device(config.device)
        cuda = self.device.type == "cuda"
        if self.world_size > 1:
            if cuda:
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            torch.distributed.init_process_group("nccl" if cuda else "gloo")
            if self.rank > 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # one speaks for all
        has_bfloat16 = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
        best = ("bfloat16" if has_bfloat16 else "float16") if cuda else "float32"
        name = config.dtype or best
        if name == "bfloat16" and not has_bfloat16:
            raise ValueError(f"dtype {name} is not available on {self.device}; float16 is")
        self.dtype = getattr(torch, name)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=name == "float16")
        self.compile = cuda if config.compile is None else config.compile
        torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing

    def __str__(self):
        return f"{self.device} in {str(self.dtype).removeprefix('torch.')}"

    def autocast(self):
        """float32 stays float32; otherwise matrix products are done in the shorter type."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def put(self, *tensors):
        return [tensor.to(self.device) for tensor in tensors]

    def sum(self, *numbers):
        """Of each number, the sum over all processes."""
        if self.world_size == 1:
            return numbers
        totals = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(totals)
        return totals.tolist()

    @contextlib.contextmanager
    def first_process_first(self):
        """What is in this block, the process of rank 0 does before the others."""
        if self.rank > 0:
            torch.distributed.barrier()
        yield
        if self.world_size > 1 and self.rank == 0:
            torch.distributed.barrier()


# --- one step -------------------------------------------------------------------------------------


def configure_optimizer(model, learning_rate, weight_decay, betas):
    """AdamW (Loshchilov & Hutter 2019); weights decay where they are matrices, and only there.

    A group's "lr_scale" multiplies the learning rate. A row of the token embedding learns only
    when its token comes by, and its steps, like the head's, need not shrink as the matrices grow
    (Yang et al. 2022, "Tensor Programs V"): both bear, and want, larger steps than the matrices
    between them; how much larger was found by trial. A tied head, which is both at once, does not.
    """
    scales = {"wte.weight": 20, "lm_head.weight": 4}
    tied = not any(name.endswith("lm_head.weight") for name, _ in model.named_parameters())
    found = {}  # (lr_scale, weight_decay): parameters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 1 if tied else scales.get(".".join(name.split(".")[-2:]), 1)
            decay = weight_decay if parameter.dim() >= 2 else 0.0
            found.setdefault((scale, decay), []).append(parameter)
    groups = [
        {"params": group, "lr": learning_rate * scale, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), group in found.items()
    ]
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def learning_rate_at(step, config):
    """Rises linearly for warmup_iters steps, then falls along a cosine to min_lr.

    Step warmup_iters has learning_rate; step lr_decay_iters - 1, and all after it, min_lr.
    """
    highest = config.learning_rate
    lowest = highest / 10 if config.min_lr is None else config.min_lr
    if step < config.warmup_iters:
        return highest * (step + 1) / (config.warmup_iters + 1)
    last = (config.lr_decay_iters or config.max_iters) - 1
    done = min(1, (step - config.warmup_iters) / max(1, last - config.warmup_iters))
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * done)) / 2


def count_targets(tensors):
    """How many terms a batch's mean loss has; the last of its tensors are the targets."""
    return int((tensors[-1] != -100).sum())


@torch.no_grad()
def mean_loss(model, machine, batches):
    """Mean loss per target, in nats, with dropout off."""
    total = count = 0
    model.eval()
    for tensors in itertools.islice(batches, machine.rank, None, machine.world_size):
        with machine.autocast():
            total += model(*machine.put(*tensors)).item() * count_targets(tensors)
        count += count_targets(tensors)
    model.train()
    total, count = machine.sum(total, count)
    return total / count


# --- the run --------------------------------------------------------------------------------------


def set_aside(folder):
    """Moves an earlier run's checkpoints and metrics to folder/previous, replacing those there."""
    earlier = [folder / name for name in ("last.pt", "best.pt", "metrics.csv")]
    earlier = [path for path in earlier if path.exists()]
    if earlier:
        shutil.rmtree(folder / "previous", ignore_errors=True)
        (folder / "previous").mkdir()
        for path in earlier:
            path.replace(folder / "previous" / path.name)
        print(f"the earlier run in {folder} is now in {folder / 'previous'}")


STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_signals(ignore_repeats=False):
    """Yields a list of the signals caught: the first Ctrl-C or SIGTERM asks for a stop after this
    step; a second one acts at once, if repeats are not ignored (torchrun sends a signal twice)."""
    caught = []

    def catch(number, frame):
        if not ignore_repeats:
            signal.signal(number, earlier[number])
        caught.append(number)

    earlier = {number: signal.signal(number, catch) for number in STOPS}
    try:
        yield caught
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def explain_out_of_memory():
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "out of memory: try a smaller --batch_size; in train.py, half of it with twice the "
            "--gradient_accumulation_steps trains the same"
        ) from error


def format_seconds(seconds):
    """
    >>> format_seconds(75), format_seconds(3700)
    ('1:15', '1:01:40')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_metrics(metrics):
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


class Trainer:
    """The loop that every kind of training shares. What differs is the task:

    task.model(*tensors)     the mean loss over targets
    task.micro_batch(n)      the tensors of the run's n-th micro-batch: idx (B, T) ..., targets
    task.evaluate()          {"val_loss": ..., and others}
    task.columns             the names of these, for metrics.csv
    task.best(), task.last() the contents of best.pt, and of last.pt without the run's state
    task.bits_per_byte       what a nat of loss is in bits per byte, or None

    saved is the checkpoint to resume from, whose weights the model has already.
    """

    def __init__(self, config, machine, task, saved=None):
        self.config, self.machine, self.task, self.model = config, machine, task, task.model
        self.out_dir = pathlib.Path(config.out_dir)
        betas = (config.beta1, config.beta2)
        self.optimizer = configure_optimizer(
            self.model, config.learning_rate, config.weight_decay, betas
        )
        self.forward = torch.compile(self.model) if machine.compile else self.model
        if machine.world_size > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)
        self.state = {"step": 0, "micro_batches": 0, "tokens": 0, "seconds": 0.0}
        self.state |= {"best_val_loss": math.inf, "evaluations_since": 0}
        if saved:
            self.restore(saved)
        self.logged = dict(self.state)  # at the last line of output
        self.losses = []  # of the steps since then
        self.norm = math.nan  # of the last gradient
        self.stats = {}  # what else a kind of training reports of its last step
        self.draw_after = 0.0
        self.unfinished_line = False

    def restore(self, saved):
        fresh = self.optimizer.state_dict()  # its settings are the config's, not the file's
        try:
            self.optimizer.load_state_dict({**fresh, "state": saved["optimizer"]["state"]})
            for parameter, moments in self.optimizer.state.items():
                shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                if {name: tensor.shape for name, tensor in moments.items()} != shapes:
                    raise ValueError("optimizer state of another shape")
            if saved["scaler"] and self.machine.scaler.is_enabled():  # else it is not float16
                self.machine.scaler.load_state_dict(saved["scaler"])
            self.state = {name: type(v)(saved["state"][name]) for name, v in self.state.items()}
            threads = saved["threads"]
        except Exception as error:
            raise ValueError(f"{self.out_dir}/last.pt: damaged ({error!r:.90})") from error
        if threads != torch.get_num_threads():
            print(
                f"note: the run had {threads} threads and now has {torch.get_num_threads()}, so it "
                "will not be the same bit for bit; the variable OMP_NUM_THREADS sets them"
            )

    def run(self):
        """Trains to max_iters, or until a signal or a reason_to_stop."""
        config, state, reason = self.config, self.state, None
        if state["step"] >= config.max_iters:
            print(f"{self.out_dir} is at step {state['step']} already; --max_iters=N goes further")
        stop = 0  # the number of a signal that has reached any of the processes
        if self.machine.rank == 0:
            self.metrics = Metrics(self.out_dir / "metrics.csv", state["step"], self.task.columns)
        try:
            with stop_signals(ignore_repeats=self.machine.world_size > 1) as caught:
                while state["step"] < config.max_iters and not stop:
                    if reason := self.reason_to_stop():
                        break
                    self.take_step()
                    at_end = state["step"] == config.max_iters
                    if state["step"] % config.eval_interval == 0 or at_end:
                        metrics = self.task.evaluate()
                        self.log(**metrics)
                        self.save(metrics["val_loss"])
                    elif state["step"] % config.log_interval == 0:
                        self.log()
                    stop = self.agree(caught)
        finally:
            if self.unfinished_line:
                print()
        if reason:
            print("stopped:", reason)
        if stop:
            self.save()
            print(f"stopped after step {state['step']}; --init_from=resume goes on from there")
            raise SystemExit(128 + stop)

    def agree(self, caught):
        """The number of a signal that one of the processes has caught, or 0: the same in all."""
        counts = self.machine.sum(*(float(number in caught) for number in STOPS))
        return max((number for number, n in zip(STOPS, counts) if n), default=0)

    def reason_to_stop(self):
        """Why to stop before max_iters, or None."""
        since, patience = self.state["evaluations_since"], self.config.patience
        if patience is not None and since >= patience:
            return f"no better validation loss in {since} evaluations, --patience={patience}"

    def take_step(self):
        """One update of the weights. Raises ValueError before it, if loss or gradient is not
        finite."""
        config, state = self.config, self.state
        start = time.perf_counter()
        self.set_learning_rate()
        rank, world_size = self.machine.rank, self.machine.world_size
        seed_dropout(self.machine.device, config.seed, state["step"], rank)
        accumulation = config.gradient_accumulation_steps
        # the processes share the micro-batches that one would take in world_size times the number
        first = state["micro_batches"] + rank * accumulation
        batches = [self.task.micro_batch(first + i) for i in range(accumulation)]
        targets, loss = sum(map(count_targets, batches)), 0.0
        for tensors in batches:
            if world_size > 1:  # gradients are averaged over processes once, at the last of these
                self.forward.require_backward_grad_sync = tensors is batches[-1]
            with self.machine.autocast():
                mean = self.forward(*self.machine.put(*tensors))
                part = mean * (count_targets(tensors) / targets)  # each target weighs the same
            self.machine.scaler.scale(part).backward()
            loss += part.detach()
            state["tokens"] += tensors[0].numel() * world_size
        loss = self.machine.sum(loss.item() / world_size)[0]
        self.update(loss)
        self.losses.append(loss)
        state["micro_batches"] += accumulation * world_size
        state["step"] += 1
        state["seconds"] += time.perf_counter() - start

    def set_learning_rate(self):
        rate = learning_rate_at(self.state["step"], self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def update(self, loss):
        """Clips the gradients and changes the weights by them."""
        scaler = self.machine.scaler
        scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise ValueError(
                f"step {self.state['step']}: stopped, the loss is {loss} and the gradient's norm "
                f"{norm}; saved checkpoints are whole; a lower --learning_rate may help"
            )
        scaler.step(self.optimizer)  # leaves the weights alone where float16 has overflowed
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.norm = norm

    def log(self, **metrics):
        """A line of output and a row of metrics.csv, about the steps since the last one."""
        config, state = self.config, self.state
        logged, losses = self.logged, self.losses
        self.logged, self.losses = dict(state), []
        if self.machine.rank > 0:
            return
        metrics = {**self.stats, **metrics}
        loss, bits_per_byte = sum(losses) / len(losses), self.task.bits_per_byte
        seconds = state["seconds"] - logged["seconds"]
        tokens_per_s = (state["tokens"] - logged["tokens"]) / seconds
        self.metrics.add(
            {
                "step": state["step"],
                "tokens": state["tokens"],
                "seconds": round(state["seconds"], 3),
                "lr": learning_rate_at(state["step"] - 1, config),
                "train_loss": loss,
                "grad_norm": self.norm,
                "tokens_per_s": round(tokens_per_s),
                **metrics,
            }
        )
        left = (config.max_iters - state["step"]) * seconds / len(losses)
        parts = [
            f"step {state['step']:5}/{config.max_iters}",
            f"loss {loss:.3f}",
            f"{loss * bits_per_byte:.3f} bits/byte" if bits_per_byte else "",
            f"{tokens_per_s:,.0f} tokens/s",
            f"{format_seconds(left)} left",
            format_metrics(metrics),
        ]
        # a terminal has one line that changes, and keeps those with an evaluation
        live = sys.stdout.isatty()
        self.unfinished_line = live and "val_loss" not in metrics
        line = ("\r\x1b[K" if live else "") + "  ".join(filter(None, parts))
        print(line, end="" if self.unfinished_line else "\n", flush=True)
        if "val_loss" in metrics:
            self.draw()

    def draw(self):
        """loss.png, but not so often that it would slow down training."""
        start = time.monotonic()
        if start > self.draw_after or self.state["step"] == self.config.max_iters:
            draw_loss(self.metrics.path)
            self.draw_after = start + 20 * (time.monotonic() - start)

    def save(self, val_loss=math.inf):
        """best.pt where the validation loss has never been lower; always last.pt, with all that
        the next step depends on. One process writes for all."""
        is_best = val_loss < self.state["best_val_loss"]
        if is_best:
            self.state |= {"best_val_loss": val_loss, "evaluations_since": 0}
        elif val_loss < math.inf:
            self.state["evaluations_since"] += 1
        if self.machine.rank > 0:
            return
        if is_best:
            save_checkpoint(self.out_dir / "best.pt", {**self.task.best(), "state": self.state})
        run = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.machine.scaler.state_dict(),
            "state": self.state,
            "train_config": asdict(self.config),
            "threads": torch.get_num_threads(),
        }
        save_checkpoint(self.out_dir / "last.pt", {**self.task.last(), **run})


class Metrics:
    """out_dir/metrics.csv, row by row. When a run is resumed, rows after its step are dropped."""

    def __init__(self, path, step, evaluated):
        self.columns = ["step", "tokens", "seconds", "lr", "train_loss", *evaluated]
        self.columns += ["grad_norm", "tokens_per_s"]
        lines = [",".join(self.columns)]
        if step and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                number = line.split(",")[0]
                if number.isdecimal() and int(number) <= step:
                    lines.append(line)
        replace_text(path, "\n".join(lines) + "\n")
        self.path = path

    def add(self, row):
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)


def draw_loss(path):
    """Draws a metrics.csv as loss.png beside it; does nothing where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 4), layout="constrained")
    has_bits = "val_bpb" in rows[0]
    panels = figure.subplots(1, 1 + has_bits, squeeze=False)[0]
    curves = [(panels[0], "train_loss", "training"), (panels[0], "val_loss", "validation")]
    curves += [(panels[-1], "val_bpb", "validation")] * has_bits
    for panel, column, label in curves:
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        panel.plot(*zip(*points), label=label, marker="." if label == "validation" else None)
    for panel, unit in zip(panels, ("loss, nats" if has_bits else "loss", "bits/byte")):
        panel.set(xlabel="step", ylabel=unit)
        panel.grid(alpha=0.3)
        panel.legend()
    with replacing(path.with_name("loss.png")) as file:
        figure.savefig(file, dpi=100, format="png")


# --- pretraining ----------------------------------------------------------------------------------


def load_data(folder):
    """The data folder; the default one is made where it is missing."""
    if folder == TrainConfig.data and not pathlib.Path(folder, "meta.json").exists():
        print(f"no {folder}/ yet: preparing the default, the manual that comes with Python")
        prepare_data.main([f"--out={folder}"])
    return open_data(folder)


MODEL_FLAGS = [f.name for f in fields(GPTConfig) if f.name != "vocab_size"]


def make_model(config, flags, meta, checkpoint):
    """A new model, or that of a checkpoint, with which the flags and the data must agree."""
    if checkpoint is None:
        torch.manual_seed(config.seed)
        shape = {name: getattr(config, name) for name in MODEL_FLAGS}
        return GPT(GPTConfig(vocab_size=meta["vocab_size"], **shape))
    path = config.out_dir if config.init_from == "resume" else config.init_from
    if tokenizer_of(checkpoint, path) != meta["tokenizer"]:
        raise ValueError(
            f"{config.data} and {path} have different tokenizers; prepare the text with "
            "--tokenizer=gpt2 for GPT-2, or --tokenizer=FOLDER, the data folder that the "
            "checkpoint was trained on"
        )
    given = {name: flags[name] for name in MODEL_FLAGS if name in flags}
    free = {name: given[name] for name in ("dropout", "attn_dropout") if name in given}
    model = GPT.from_checkpoint(checkpoint, **free)
    if given.get("block_size", math.inf) < model.config.block_size:
        model.resize_positions(given["block_size"])
    for name, value in given.items():
        has = getattr(model.config, name)
        if has != value:
            raise ValueError(f"{path} has {name}={has}, not --{name}={value}")
    return model


class Pretraining:
    """The Trainer's task of predicting the next token of a data folder's text."""

    columns = ("val_loss", "val_bpb")

    def __init__(self, config, machine, model, meta):
        self.config, self.machine, self.model, self.meta = config, machine, model, meta
        self.train_split, self.val_split = meta["splits"]["train"], meta["splits"]["val"]
        self.bits_per_byte = bits_per_byte_of(self.train_split)
        if self.train_split["tokens"] <= config.block_size:
            raise ValueError(
                f"{config.data}: {self.train_split['tokens']} tokens to train on do not fill one "
                f"window of block_size + 1 = {config.block_size + 1}; use more text or a smaller "
                "--block_size"
            )
        arrays, vocab_size = self.train_split["arrays"], meta["vocab_size"]
        self.windows = Windows(arrays, config.block_size, vocab_size, config.seed)

    def micro_batch(self, n):
        return self.windows.batch(n * self.config.batch_size, self.config.batch_size)

    def evaluate(self):
        """Loss in nats per token and in bits per byte of text, on the same windows every time."""
        config, split = self.config, self.val_split
        block_size = min(config.block_size, split["tokens"] - 1)
        windows = Windows(split["arrays"], block_size, self.meta["vocab_size"])
        batches = windows.fixed_batches(config.batch_size, config.eval_iters)
        loss = mean_loss(self.model, self.machine, batches)
        return {"val_loss": loss, "val_bpb": loss * bits_per_byte_of(split)}

    def best(self):
        tokenizer, digest = self.meta["tokenizer"], self.meta["digest"]
        return {**self.model.checkpoint(), "tokenizer": tokenizer, "data_digest": digest}

    last = best


def bits_per_byte_of(split):
    """What one nat per token is in bits per byte, the unit in which tokenizers compare."""
    return split["tokens"] / split["bytes"] / math.log(2)


def windows_a_step(config, machine):
    return config.batch_size * config.gradient_accumulation_steps * machine.world_size


def matrix_rate(machine):
    """What this device does in a matrix product: floating-point operations a second."""
    n = 2048
    a, b = torch.randn(2, n, n, device=machine.device).to(machine.dtype)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the result
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(device):
    """The most that was in use so far, bytes: of the GPU, or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_plan(trainer):
    """What a run costs: sizes, and times from a few steps of it, which are thrown away."""
    config, machine, task = trainer.config, trainer.machine, trainer.task
    gpt = task.model.config
    parts = collections.Counter()
    for name, parameter in task.model.named_parameters():
        kind = next((k for k in ("wte", "wpe", "attn", "mlp", "lm_head") if k in name), "LayerNorm")
        parts[kind] += parameter.numel()
    total = parts.total()
    print("parameters:", ", ".join(f"{kind} {n:,}" for kind, n in parts.items()), f"= {total:,}")
    per_step = windows_a_step(config, machine) * config.block_size
    tokens, corpus = per_step * config.max_iters, task.windows.tokens
    print(
        f"tokens: {per_step:,} a step, {tokens:,} in all, {tokens / corpus:.1f} times the data; "
        f"compute-optimal for this model are {20 * total:,} (20 a parameter, Hoffmann et al. 2022)"
    )
    # for each weight and token 2 operations forward, 4 backward; on top, attention's two products
    matrices = total - parts["wpe"] - (0 if gpt.tie_weights else parts["wte"])
    flops = 6 * matrices + 12 * gpt.n_layer * gpt.n_embd * config.block_size
    trainer.take_step()  # the first one prepares things
    state, start = trainer.state, dict(trainer.state)
    # as long in all processes, whose clocks differ
    while state["step"] < 6 or machine.sum(state["seconds"] - start["seconds"])[0] < 3:
        trainer.take_step()
    step = (state["seconds"] - start["seconds"]) / (state["step"] - start["step"])
    rate, peak = flops * per_step / step, machine.world_size * matrix_rate(machine)
    print(f"work: {flops * tokens:.2e} floating-point operations, {flops:,} a token")
    print(
        f"on {machine}: {step * 1e3:.0f} ms a step, {format_seconds(step * config.max_iters)} for "
        f"all but evaluation; {rate / 1e9:,.0f} GFLOP/s, {rate / peak:.0%} of what a matrix "
        f"product reaches; peak memory {peak_memory(machine.device) / 1e6:,.0f} MB"
    )


@script
@explain_out_of_memory()
def main(argv=None):
    flags = parse_flags(TrainConfig, __doc__, argv)
    config, checkpoint, resumed = TrainConfig(**flags), None, None
    out_dir = pathlib.Path(config.out_dir)
    if config.init_from == "resume":
        checkpoint = resumed = load_checkpoint(out_dir / "last.pt")
        config = merge_flags(TrainConfig, resumed, flags, out_dir / "last.pt")
    elif config.init_from != "scratch":
        checkpoint = load_checkpoint(config.init_from)
    machine = Machine(config)
    with machine.first_process_first():
        meta = load_data(config.data)
    if resumed and resumed.get("data_digest") != meta["digest"]:
        raise ValueError(f"{config.data}: not the text that {out_dir} was trained on")
    model = make_model(config, flags, meta, checkpoint).to(machine.device).train()
    # a loaded model's shape overrides the defaults
    config = replace(config, **{name: getattr(model.config, name) for name in MODEL_FLAGS})
    task = Pretraining(config, machine, model, meta)
    if config.eval_only:
        print(format_metrics(task.evaluate()))
        return
    trainer = Trainer(config, machine, task, resumed)
    if config.plan:
        print_plan(trainer)
        return
    epochs = config.max_iters * windows_a_step(config, machine) / task.windows.per_epoch
    print(
        f"{model.num_params():,} parameters besides positions; {task.windows.tokens:,} tokens, "
        f"seen {epochs:.1f} times; on {machine}"
    )
    first = machine.rank == 0
    with sole_owner(out_dir) if first else contextlib.nullcontext():
        if first and not resumed:
            set_aside(out_dir)
        trainer.run()


if __name__ == "__main__":
    main()
