"""Trains a GPT on data written by prepare_data.py.

    python train.py                                        # a small GPT on Python's manual
    python train.py --data=data/book --out_dir=out/book    # on your text
    python train.py --init_from=resume                     # continues an interrupted run
    python train.py --init_from=out/book --data=data/more --out_dir=out/more   # from best.pt
    python train.py --eval_only --init_from=out            # prints its validation loss
    torchrun --nproc_per_node=8 train.py                   # on 8 GPUs

The loop is the function train(). A run writes best.pt (the model with the lowest validation loss,
to use or train further), last.pt (everything needed to resume), metrics.csv, and, with matplotlib,
loss.png. On the same kind of processor, the same --seed, --threads, and --dtype give bit-identical
weights, even if the run is interrupted and resumed.
"""

import bisect
import collections
import contextlib
import ctypes
import io
import math
import os
import pathlib
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

import prepare_data
from gpt import GPT, GPTConfig, load_checkpoint, pick_device, pick_dtype, save_checkpoint
from prepare_data import damaged, flag_parser, lock, open_data, script, write_file

# --- settings: each is a flag, as in --n_layer=6, with its comment as the help text ---------------


@dataclass
class RunConfig:  # shared with finetune.py
    out_dir: str = "out"  # folder for checkpoints and metrics.csv
    batch_size: int = 4  # examples that go through the model at once
    gradient_accumulation_steps: int = 1  # batches whose gradients are added before each update
    seed: int = 1337  # for weights, batches and dropout
    max_iters: int = 8000  # training steps
    learning_rate: float = 2e-3  # peak learning rate, reached after the warmup
    min_lr: float = 1e-5  # learning rate at the end of the decay
    warmup_iters: int = 20  # steps in which the learning rate climbs to its peak
    lr_decay_iters: int = 0  # step at which the decay ends (0: max_iters)
    weight_decay: float = 0.1  # pulls matrices toward 0
    beta1: float = 0.9  # AdamW: how slowly its average of gradients changes
    beta2: float = 0.99  # AdamW: how slowly its average of squared gradients changes
    grad_clip: float = 1.0  # maximum norm of the gradient (0: no clipping)
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    patience: int = 0  # stop after this many evaluations without improvement (0: never)
    log_interval: int = 100  # steps between progress lines
    device: str = ""  # cpu, cuda, mps (default: the best available)
    dtype: str = ""  # float32, bfloat16 or float16, for matrix products (default: the fastest)
    threads: int = 0  # CPU threads (0: one or all, whichever is faster)


def check_counts(config, *names):
    """Raises ValueError if one of these settings, or of those that all tasks have, is below 1."""
    for name in ("batch_size", "gradient_accumulation_steps", "log_interval", *names):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)}: must be 1 or more")


@dataclass
class TrainConfig(RunConfig):
    data: str = "data"  # folder written by prepare_data.py
    init_from: str = "scratch"  # scratch (a new model), resume (continue --out_dir), or a model
    eval_only: bool = False  # only print the validation loss
    eval_iters: int = 200  # maximum batches per evaluation
    compile: bool = False  # use torch.compile (default: on NVIDIA GPUs, unless the model is small)
    n_layer: int = 2  # transformer blocks
    n_head: int = 4  # attention heads in a block
    n_embd: int = 128  # embedding size: numbers per token
    block_size: int = 128  # context length: tokens the model sees at once
    dropout: float = 0.0  # share of values zeroed at random in training, against overfitting
    attn_dropout: float = 0.0  # the same for attention weights
    bias: bool = True  # biases in Linear and LayerNorm
    tie_weights: bool = False  # reuse the token embedding as output layer, as GPT-2 does


# what a run writes into its folder
RUN_FILES = ("metrics.csv", "loss.png", "predictions.csv", "responses.jsonl", "best.pt", "last.pt")
SHAPE = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]

# --- the machine ----------------------------------------------------------------------------------


class Machine:
    """The device and precision of a run, and this process's rank."""

    def __init__(self, config):
        self.rank = int(os.environ.get("RANK", "0"))  # torchrun sets these variables
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        name = config.device
        if name in ("", "cuda") and torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.device = pick_device(name)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.rank > 0:  # only rank 0 prints
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if config.dtype not in ("", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype={config.dtype}: must be float32, bfloat16 or float16")
        self.dtype = getattr(torch, config.dtype) if config.dtype else pick_dtype(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        torch.set_float32_matmul_precision("high")  # TF32 where the device has it

    def autocast(self):
        """A context in which matrix products run in dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, *tensors):
        """Copies tensors to the device, asynchronously on CUDA. (On MPS, an asynchronous copy can
        read memory that is already freed: github.com/pytorch/pytorch/issues/139550.)"""
        is_cuda = self.device.type == "cuda"
        if is_cuda:  # a view would first be copied to memory that is not pinned
            tensors = [tensor.contiguous().pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=is_cuda) for tensor in tensors]

    def compiles(self, model):
        """Whether to use torch.compile unless told otherwise. Its compiler, Triton, needs Linux and
        a GPU of 2017 or later; a small model is trained before it is compiled."""
        is_cuda = self.device.type == "cuda" and sys.platform != "win32"
        is_new = is_cuda and torch.cuda.get_device_capability(self.device) >= (7, 0)
        return is_new and not is_small(model)

    def sum(self, number):
        """The sum of a number over all processes, which wait for one another."""
        if self.world_size > 1:
            number = torch.tensor(number, dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(number)
        return float(number)

    def seed(self, *numbers):
        """Seeds all random numbers from these and the rank alone."""
        torch.manual_seed(int(np.random.SeedSequence([*numbers, self.rank]).generate_state(1)[0]))


def keep_freed_memory():
    """By default, malloc returns large tensors to the kernel, which clears each page before it
    hands it out again: up to a fifth of a step on a CPU. This keeps them in the process."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl does not have it
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def is_small(model):
    return sum(p.numel() for p in model.parameters()) < 2e6


def pick_threads(model):
    """One thread for a small model, unless all threads multiply matrices at least 1.3 times as
    fast. On a busy machine they do not: they wait for one another in every short operation."""
    threads = torch.get_num_threads()  # as many as there are cores, or OMP_NUM_THREADS
    matrix = torch.ones(512, 256)

    def seconds(count):
        torch.set_num_threads(count)
        matrix.T @ matrix  # starts the threads
        start = time.perf_counter()
        for _ in range(25):
            matrix.T @ matrix
        return time.perf_counter() - start

    if is_small(model) and threads > 1 and seconds(1) < 1.3 * seconds(threads):
        threads = 1
    return threads


def resolve(config, machine, model, **chosen):
    """Returns the config with a value for each setting that was left to be chosen, and sets the
    number of threads. From here on, the config does not change; last.pt keeps it."""
    threads = config.threads or pick_threads(model)
    torch.set_num_threads(threads)
    dtype = str(machine.dtype).removeprefix("torch.")
    return replace(config, threads=threads, dtype=dtype, **chosen)


# --- pretraining ----------------------------------------------------------------------------------


class Windows:
    """An endless, reproducible sequence of windows: block_size + 1 consecutive tokens of a shard.

    An epoch cuts every shard into windows that begin block_size tokens apart, so that no token is
    predicted twice, and shuffles them. It draws a random offset, the phase, at which the first
    window of each shard begins, so that the cuts differ between epochs; up to 2 * block_size tokens
    at the ends of a shard are left out, different ones each time. The n-th window depends on seed
    and n alone: a run can resume at any step, and several processes can share the sequence.
    """

    def __init__(self, arrays, block_size, vocab_size, seed=0):
        self.arrays, self.block_size, self.vocab_size = arrays, block_size, vocab_size
        self.seed, self.epoch = seed, None
        self.offsets = [0]  # the index of each shard's first window; the last entry is the total
        for array in arrays:
            fitting = (len(array) - 1) // block_size
            # one fewer leaves room for the phase; if only one fits, read() limits where it starts
            self.offsets.append(self.offsets[-1] + (fitting - 1 if fitting > 1 else fitting))
        self.per_epoch = self.offsets[-1]

    def batch(self, first, count):
        """Windows first to first + count - 1 of the sequence, as idx and targets: see stack()."""
        windows = []
        for n in range(first, first + count):
            epoch, i = divmod(n, self.per_epoch)
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.phase = int(rng.integers(self.block_size))
                self.order = rng.permutation(self.per_epoch)
                self.epoch = epoch
            windows.append(self.read(self.order[i], self.phase))
        return self.stack(windows)

    def read(self, window, phase=0):
        """The tokens of a window, by its index before shuffling, in an epoch with this phase."""
        shard = bisect.bisect_right(self.offsets, window) - 1  # which shard
        start = (window - self.offsets[shard]) * self.block_size + phase  # where in it
        start = min(start, len(self.arrays[shard]) - self.block_size - 1)
        return self.arrays[shard][start : start + self.block_size + 1]

    def stack(self, windows):
        """Windows -> idx and targets (the next tokens), each (B, T) int64."""
        batch = torch.from_numpy(np.stack(windows).astype(np.int64))
        if batch.max() >= self.vocab_size:
            raise ValueError(f"a shard is damaged: it has token {batch.max()}")
        return batch[:, :-1], batch[:, 1:]


class Pretraining:
    """The task of predicting the next token of a data folder's text: see train()."""

    curves = ("train_loss", "val_loss")

    def __init__(self, config, machine, model, meta):
        self.config, self.machine, self.model, self.meta = config, machine, model, meta
        self.measured = collections.defaultdict(list)
        # windows per step
        self.per_step = config.batch_size * config.gradient_accumulation_steps * machine.world_size
        # Embedding and output head take larger steps than the matrices between them. Yang et al.
        # 2022 derive this for the embedding; both factors were tuned. AdamW's weight decay grows
        # with them. A tied head is both at once and stays small: see GPT.init_weights.
        self.lr_scales = {} if model.config.tie_weights else {"wte.weight": 20, "lm_head.weight": 4}
        vocab_size, train, val = meta["vocab_size"], meta["splits"]["train"], meta["splits"]["val"]
        self.windows = Windows(train["arrays"], config.block_size, vocab_size, config.seed)
        if not self.windows.per_epoch:
            raise ValueError(f"{config.data}: not enough text for --block_size={config.block_size}")
        # a validation split that is shorter than the context is read in shorter windows
        block_size = min(config.block_size, max(map(len, val["arrays"])) - 1)
        self.val_windows = Windows(val["arrays"], block_size, vocab_size)
        # converts nats per token to bits per byte, which are comparable between tokenizers
        self.bits_per_nat = val["tokens"] / val["bytes"] / math.log(2)
        self.forward = torch.compile(model) if config.compile else model
        if machine.world_size > 1:
            self.forward = torch.nn.parallel.DistributedDataParallel(self.forward)

    def updates(self, step):
        """This process's share of the step's windows, as the batches of one update. A run that is
        resumed with another number of windows per step skips or repeats some."""
        size, count = self.config.batch_size, self.config.gradient_accumulation_steps
        first = step * self.per_step + self.machine.rank * count * size
        return [[self.windows.batch(first + i * size, size) for i in range(count)]]

    def loss(self, batch):
        """The cross-entropy of the next token, in nats, summed over the batch."""
        idx, targets = self.machine.put(*batch)
        return self.forward(idx, targets) * idx.numel()  # the model returns the mean

    def count(self, batch):
        return batch[0].numel()

    tokens = count  # every token has a loss; in finetune.py, few have

    @torch.no_grad()
    def evaluate(self):
        """Mean loss over a fixed set of evenly spaced windows."""
        config, machine, n = self.config, self.machine, self.val_windows.per_epoch
        chosen = np.linspace(0, n - 1, min(n, config.eval_iters * config.batch_size)).astype(int)
        total = 0.0
        self.model.eval()
        starts = range(0, len(chosen), config.batch_size)
        for i in starts[machine.rank :: machine.world_size]:  # this process's share
            windows = [self.val_windows.read(n) for n in chosen[i : i + config.batch_size]]
            with machine.autocast():
                loss = self.model(*machine.put(*self.val_windows.stack(windows)))
            total += loss.item() * len(windows)
        loss = machine.sum(total) / len(chosen)
        bpb = loss * self.bits_per_nat
        return {"val_loss": loss, "val_perplexity": perplexity(loss), "val_bpb": bpb}

    def rank(self, row):
        return [row["val_loss"]]

    def checkpoint(self):
        tokenizer, digest = self.meta["tokenizer"], self.meta["digest"]
        return {**self.model.checkpoint(), "tokenizer": tokenizer, "data_digest": digest}

    best_checkpoint = checkpoint  # the same here; with LoRA, finetune.py's differ

    def describe(self):
        """Prints four lines about the size of the run."""
        config, device, total = self.config, self.machine.device, self.model.num_params()
        windows = self.per_step * config.max_iters
        tokens, epochs = windows * config.block_size, windows / self.windows.per_epoch
        # per token: 2 operations for each weight forward and 4 backward, plus attention's two
        # products; an untied token embedding is only looked up
        matrices = total - (0 if config.tie_weights else self.model.transformer.wte.weight.numel())
        flops = 6 * matrices + 12 * config.n_layer * config.n_embd * config.block_size
        print(f"{total:,} parameters, on {device} in {config.dtype}, CPU threads: {config.threads}")
        print(f"{tokens:,} training tokens: {epochs:.1f} epochs")
        print(f"{flops * tokens:.1e} floating-point operations: {flops:,} per token")
        optimum = "about 20 are compute-optimal for large models: Hoffmann et al. 2022"
        print(f"{tokens / total:.1f} tokens per parameter ({optimum})")


def perplexity(loss):
    return torch.tensor(loss).exp().item()  # inf where math.exp would overflow


# --- the loop -------------------------------------------------------------------------------------


def train(config, machine, task, saved=None):
    """Trains task.model for max_iters steps, or until a signal or config.patience ends it. saved is
    the last.pt to resume from; the model already has its weights. A task has

    updates(step)           the updates of a step, each a list of batches whose gradients are added
    loss(batch)             the sum of the batch's losses
    count(batch)            the number of these losses
    tokens(batch)           the number of tokens in the batch
    evaluate()              {"val_loss": ..., and other columns of metrics.csv}
    rank(row)               numbers from an evaluation; best.pt is the model with the lowest list
    checkpoint()            what last.pt holds besides the state of the run
    best_checkpoint()       what best.pt holds
    model, lr_scales        see configure_optimizer()
    measured, curves        {column: [one tensor per update since the last report]}; the columns
                            that loss.png shows
    """
    hyperparameters = (config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    optimizer = configure_optimizer(task.model, *hyperparameters, task.lr_scales)
    state = restore(saved, config, optimizer, machine.scaler)
    clock, logged = time.perf_counter(), state["step"]
    with stop_signals(machine) as signals:
        while state["step"] < config.max_iters:
            if 0 < config.patience <= state["evaluations_since"]:
                print(f"no improvement in {config.patience} evaluations (--patience)")
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(state["step"], config) * group["lr_scale"]
            machine.seed(config.seed, state["step"])
            for batches in task.updates(state["step"]):  # one per step; ppo and grpo make several
                task.model.train()  # evaluating and sampling leave it in eval mode
                count, total = sum(map(task.count, batches)), 0.0
                for batch in batches:  # gradient accumulation
                    if machine.world_size > 1:  # average gradients over processes only at the end
                        task.forward.require_backward_grad_sync = batch is batches[-1]
                    with machine.autocast():
                        loss = task.loss(batch) / count  # loss() returns a sum
                    machine.scaler.scale(loss).backward()
                    total += loss.detach()
                machine.scaler.unscale_(optimizer)
                limit = config.grad_clip or math.inf  # 0: no clipping
                norm = clip_grad_norm_(task.model.parameters(), limit)
                machine.scaler.step(optimizer)  # skipped if float16 gradients overflowed
                machine.scaler.update()
                optimizer.zero_grad(set_to_none=True)
                state["tokens"] += sum(map(task.tokens, batches)) * machine.world_size
                task.measured["train_loss"].append(total)
            state["step"] += 1

            interrupted = machine.sum(len(signals)) > 0  # in any process
            is_last = state["step"] == config.max_iters
            evaluates = is_last or state["step"] % config.eval_interval == 0
            if evaluates or interrupted or state["step"] - logged >= config.log_interval:
                report(config, machine, task, state, norm, clock, evaluates)
                if evaluates or interrupted:
                    save(config, machine, task, optimizer, state)
                clock, logged = time.perf_counter(), state["step"]  # evaluation is not timed
            if interrupted:
                print(f"\nsaved step {state['step']}; --init_from=resume continues from there")
                number = signals[0] if signals else signal.SIGTERM  # if another process caught it
                raise SystemExit(128 + number)


def configure_optimizer(model, learning_rate, weight_decay, betas, scales=None):
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices only. scales maps the end of a
    parameter's name to a factor of its learning rate, kept in its group as "lr_scale"."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = next((s for end, s in (scales or {}).items() if name.endswith(end)), 1)
            decay = weight_decay if parameter.dim() >= 2 else 0.0
            group = {"lr": learning_rate * scale, "lr_scale": scale, "weight_decay": decay}
            group = groups.setdefault((scale, decay), {"params": [], **group})
            group["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), betas=betas, fused=True)


def restore(saved, config, optimizer, scaler):
    """The state of a new run, or the saved run's; also restores the saved run's optimizer."""
    state = {"step": 0, "tokens": 0, "rows": []}
    state |= {"best": [math.inf], "evaluations_since": 0, "has_saved": False}
    if saved:
        with damaged(f"{config.out_dir}/last.pt"):
            # moments come from the file, hyperparameters from config
            all_moments = {"state": saved["optimizer"]["state"]}
            optimizer.load_state_dict(optimizer.state_dict() | all_moments)
            for parameter, moments in optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):  # AdamW writes past the end of a short one
                    moments[name] = moments[name].reshape(parameter.shape).contiguous()
                moments["step"] = moments["step"].reshape(())
            if scaler.is_enabled() and saved["scaler"]:  # empty if dtype was not float16
                scaler.load_state_dict(saved["scaler"])
            check_types(saved["state"], state)
            state |= saved["state"]
    if state["step"] >= config.max_iters:
        print(f"{config.out_dir} is already at step {state['step']}; raise --max_iters to continue")
    return state


def check_types(saved, defaults):
    """Raises ValueError if one of these values is missing or has another type than its default."""
    for name, value in defaults.items():
        if type(saved.get(name)) is not type(value):
            raise ValueError(f"{name} is {saved.get(name)!r:.80}")


def learning_rate_at(step, config):
    """Rises linearly to learning_rate at step warmup_iters, then falls along a cosine to min_lr at
    step lr_decay_iters - 1, and stays there."""
    peak, final = config.learning_rate, min(config.learning_rate, config.min_lr)
    start, end = config.warmup_iters, (config.lr_decay_iters or config.max_iters) - 1
    if step < start:
        return peak * (step + 1) / (start + 1)
    done = min(1, (step - start) / max(1, end - start))
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2


def report(config, machine, task, state, norm, clock, evaluates):
    """Adds a row to metrics.csv for the steps since the last row, timed from clock on, and prints
    it; a terminal overwrites lines without an evaluation. Raises ValueError if the loss or the
    gradient is not finite, before anything is saved."""
    seconds = time.perf_counter() - clock
    means = {name: torch.stack(values).mean().item() for name, values in task.measured.items()}
    task.measured.clear()
    loss = machine.sum(means.pop("train_loss")) / machine.world_size
    norm, step, rows = norm.item(), state["step"], state["rows"]
    if not math.isfinite(loss) or not (math.isfinite(norm) or machine.scaler.is_enabled()):
        what = f"the loss is {loss} and the gradient norm is {norm}"
        raise ValueError(f"stopped at step {step}: {what}; try a lower --learning_rate")
    last = rows[-1] if rows else {"step": 0, "tokens": 0, "seconds": 0}
    row = {"step": step, "tokens": state["tokens"], "seconds": round(last["seconds"] + seconds, 3)}
    row |= {"lr": learning_rate_at(step - 1, config), "train_loss": loss, "grad_norm": norm}
    row |= {"tokens_per_s": round((row["tokens"] - last["tokens"]) / seconds)}
    metrics = means | (task.evaluate() if evaluates else {})
    rows.append(row | metrics)

    left = round((config.max_iters - step) * seconds / (step - last["step"]))
    line = f"step {step:5}/{config.max_iters}  loss {loss:.3f}  {row['tokens_per_s']:,} tokens/s  "
    line += f"{left // 60}:{left % 60:02} left  {format_metrics(metrics)}"
    is_terminal = sys.stdout.isatty()
    line = line.ljust(79) if is_terminal else line.rstrip()  # covers the previous line
    print(line, end="\r" if is_terminal and not evaluates else "\n", flush=True)


def format_metrics(metrics):
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def save(config, machine, task, optimizer, state):
    """Writes best.pt if the model is the best so far (or if there is none yet, so that a run that
    is stopped early leaves a model, too), the metrics, and last.pt with everything needed for the
    next step."""
    row, folder = state["rows"][-1], pathlib.Path(config.out_dir)
    is_best = "val_loss" in row and task.rank(row) < state["best"]
    if is_best:
        state |= {"best": task.rank(row), "evaluations_since": 0}
    elif "val_loss" in row:  # a save after a signal has none
        state["evaluations_since"] += 1
    if machine.rank == 0:
        if not state["has_saved"]:
            set_aside(folder)
        state["has_saved"] = True
        if is_best or state["best"] == [math.inf]:
            save_checkpoint(folder / "best.pt", {**task.best_checkpoint(), "step": state["step"]})
        write_metrics(folder, state["rows"], task.curves)
        last = {**task.checkpoint(), "run_config": asdict(config), "state": state}
        last |= {"optimizer": optimizer.state_dict(), "scaler": machine.scaler.state_dict()}
        save_checkpoint(folder / "last.pt", last)
    machine.sum(0)  # the others wait: torchrun ends all processes as soon as one ends


def set_aside(folder):
    """Moves an earlier run in this folder to previous/, in place of what was there. Only the first
    save of a run does this, so a run that fails early replaces nothing."""
    previous, best, last = folder / "previous", folder / "best.pt", folder / "last.pt"
    # a best.pt alone: its run was killed in its first save, and previous/ holds the one before it
    if last.exists() or (best.exists() and not previous.exists()):
        previous.mkdir(exist_ok=True)
        for name in RUN_FILES:
            (previous / name).unlink(missing_ok=True)
            if (folder / name).exists():
                (folder / name).replace(previous / name)
        print(f"moved the earlier run in {folder} to {previous}")


def write_metrics(folder, rows, curves):
    """Writes metrics.csv and, if matplotlib is installed, loss.png."""
    columns = dict.fromkeys(name for row in rows for name in row)
    text = ",".join(columns) + "\n"
    for row in rows:
        text += ",".join(str(row.get(name, "")) for name in columns) + "\n"
    try:
        write_file(folder / "metrics.csv", text.encode())
    except PermissionError as error:  # on Windows, while a spreadsheet has it open
        print(f"{error}; the next save will try again")
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure

        figure, picture = Figure(figsize=(8, 4), layout="constrained"), io.BytesIO()
        panel = figure.subplots()
        for name in curves:
            points = [(row["step"], row[name]) for row in rows if name in row]
            panel.plot(*zip(*points), label=name, marker="." if "val" in name else None)
        panel.set(xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend()
        figure.savefig(picture, dpi=100, format="png")
        write_file(folder / "loss.png", picture.getvalue())


@contextlib.contextmanager
def stop_signals(machine):
    """Yields a list of the signals caught: the first Ctrl-C or SIGTERM asks for a stop after the
    current step; the second acts at once, except under torchrun, which sends each signal twice."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def catch(number, frame):
        caught.append(number)
        if len(caught) > 1 and machine.world_size == 1:
            raise KeyboardInterrupt

    earlier = [signal.signal(number, catch) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, earlier):
            signal.signal(number, handler)


# --- main -----------------------------------------------------------------------------------------


def load_run(config_class, flags):
    """Returns the config of the run in --out_dir, with these flags applied, and its last.pt."""
    path = pathlib.Path(flags["out_dir"], "last.pt")
    saved, defaults = load_checkpoint(path), vars(config_class())
    with damaged(path):
        config = saved["run_config"]
        if not config.keys() <= defaults.keys():
            raise ValueError("begun by another script (train.py or finetune.py)")
        check_types({**defaults, **config}, defaults)
    return config_class(**{**config, **flags, "init_from": config["init_from"]}), saved


def make_model(config, flags, meta, saved, device):
    """A new model, or a checkpoint's. Raises ValueError if the data or the flags, which are those
    actually given, do not match the checkpoint."""
    if not saved and config.init_from == "scratch":
        torch.manual_seed(config.seed)
        shape, vocab_size = {name: getattr(config, name) for name in SHAPE}, meta["vocab_size"]
        if device.type == "cuda":  # matrix products with odd sizes are up to 25% slower
            vocab_size = math.ceil(vocab_size / 64) * 64
        return GPT(GPTConfig(vocab_size=vocab_size, **shape))
    path = config.out_dir if saved else config.init_from
    checkpoint = saved or load_checkpoint(path)
    if saved and saved.get("data_digest") != meta["digest"]:
        raise ValueError(f"{config.data} is not the data that {path} was trained on")
    spec = prepare_data.tokenizer_of(checkpoint, path)
    if spec != meta["tokenizer"]:  # GPT-2's tokenizer has two: its name, and its files'
        build = prepare_data.build_tokenizer
        if build(spec)._mergeable_ranks != build(meta["tokenizer"])._mergeable_ranks:
            hint = "prepare the text with --tokenizer=FOLDER, its data folder, or --tokenizer=gpt2"
            raise ValueError(f"{config.data} and {path} have different tokenizers: {hint}")
    with damaged(path):
        dropouts = {"dropout": config.dropout, "attn_dropout": config.attn_dropout}
        model = GPT.from_checkpoint(checkpoint, **dropouts)
    if not saved:
        model.resize(block_size=flags.get("block_size"))
    for name in SHAPE:
        has = getattr(model.config, name)
        if flags.get(name, has) != has:
            raise ValueError(f"{path} has {name}={has}, not --{name}={flags[name]}")
    return model


def main(argv=None):
    flags = vars(flag_parser(TrainConfig(), __doc__).parse_args(argv))
    config, saved = TrainConfig(**flags), None
    if config.init_from == "resume":
        config, saved = load_run(TrainConfig, {"out_dir": config.out_dir, **flags})
    check_counts(config, "eval_interval", "eval_iters")
    keep_freed_memory()
    machine = Machine(config)
    has_files = any(path.is_file() for path in pathlib.Path(config.data).glob("[!.]*"))
    if config.data == TrainConfig.data and not has_files and machine.rank == 0:
        print(f"no data in {config.data}/ yet: preparing Python's manual")
        prepare_data.main([f"--out={config.data}"])
    machine.sum(0)  # waits for rank 0
    meta = open_data(config.data)
    model = make_model(config, flags, meta, saved, machine.device).to(machine.device)
    shape = {name: getattr(model.config, name) for name in SHAPE}  # a checkpoint has its own
    compiles = flags.get("compile", machine.compiles(model))
    config = resolve(config, machine, model, compile=compiles, **shape)
    task = Pretraining(config, machine, model, meta)
    if config.eval_only:
        print(format_metrics(task.evaluate()))
    else:
        task.describe()
        if config.compile:
            print("compiling the model, which takes a minute or two: it counts as the first step")
        with lock(config.out_dir) if machine.rank == 0 else contextlib.nullcontext():
            train(config, machine, task, saved)
    if machine.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    script(main)
