"""Trains a GPT on data written by prepare_data.py.

    python train.py                                        # a small GPT on Python's manual
    python train.py --data=data/book --out_dir=out/book    # on your text
    python train.py --init_from=resume                     # continues an interrupted run
    python train.py --init_from=out/book --data=data/more --out_dir=out/more   # from best.pt
    python train.py --eval_only --init_from=out            # prints its validation loss
    torchrun --nproc_per_node=8 train.py                   # on 8 GPUs

The loop is the function train(). A run writes last.pt (everything needed to continue), best.pt (the
model with the lowest validation loss, for sample.py), metrics.csv and, with matplotlib, loss.png.
With the same --seed and --threads, a run on one CPU gives bit-identical weights, even if
interrupted and resumed.
"""

import contextlib
import io
import math
import os
import pathlib
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields

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
    batch_size: int = 4  # examples per micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per step, per process
    seed: int = 1337  # for weights, batches and dropout
    max_iters: int = 8000  # steps
    learning_rate: float = 2e-3  # peak, reached after warmup
    min_lr: float = 1e-5  # final, reached at the end of the decay
    warmup_iters: int = 20  # steps of linear warmup
    lr_decay_iters: int = 0  # step at which the decay ends (0: max_iters)
    weight_decay: float = 0.1  # applied to matrices, not to biases and LayerNorm
    beta1: float = 0.9  # decay rate of AdamW's first moment
    beta2: float = 0.99  # decay rate of AdamW's second moment
    grad_clip: float = 1.0  # maximum norm of the gradient (0: no clipping)
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    patience: int = 0  # stop after this many evaluations without improvement (0: never)
    log_interval: int = 100  # steps between progress lines
    device: str = ""  # cpu, cuda, mps (default: the best available)
    dtype: str = ""  # float32, bfloat16 or float16, for matrix products (default: the fastest)
    threads: int = 0  # CPU threads (0: chosen at the start)


def check_counts(config, *names):
    """Raises ValueError if one of these settings, or of those that all tasks have, is below 1."""
    for name in ("batch_size", "gradient_accumulation_steps", "log_interval", *names):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)}: must be 1 or more")


@dataclass
class TrainConfig(RunConfig):
    data: str = "data"  # folder written by prepare_data.py
    init_from: str = "scratch"  # scratch, resume, or a checkpoint to take the weights from
    eval_only: bool = False  # only print the validation loss
    eval_iters: int = 200  # maximum batches per evaluation
    compile: bool = True  # use torch.compile, on CUDA
    n_layer: int = 2  # transformer blocks
    n_head: int = 4  # attention heads in a block
    n_embd: int = 128  # width of the residual stream
    block_size: int = 128  # context length, tokens
    dropout: float = 0.0  # on embeddings and residual branches
    attn_dropout: float = 0.0  # on attention weights
    bias: bool = True  # biases in Linear and LayerNorm
    tie_weights: bool = False  # the output head shares the token embedding


# --- the machine ----------------------------------------------------------------------------------


class Machine:
    """The device and precision of a run, and this process's rank. Fills in config.dtype, which is
    saved with the config, so that a resumed run keeps it."""

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
        config.dtype = config.dtype or str(pick_dtype(self.device)).removeprefix("torch.")
        if config.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype={config.dtype}: must be float32, bfloat16 or float16")
        self.dtype = getattr(torch, config.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        torch.set_float32_matmul_precision("high")  # TF32 where the device has it

    def autocast(self):
        """A context in which matrix products run in dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, *tensors):
        """Copies tensors to the device, asynchronously on CUDA."""
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def sum(self, number):
        """The sum of a number over all processes, which wait for one another."""
        if self.world_size > 1:
            number = torch.tensor(number, dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(number)
        return float(number)

    def seed(self, *numbers):
        """Seeds dropout from only these numbers and the rank."""
        torch.manual_seed(int(np.random.SeedSequence([*numbers, self.rank]).generate_state(1)[0]))


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

    is_small = sum(p.numel() for p in model.parameters()) < 2e6
    if is_small and threads > 1 and seconds(1) < 1.3 * seconds(threads):
        threads = 1
    return threads


# --- pretraining ----------------------------------------------------------------------------------


class Windows:
    """An endless, reproducible sequence of windows of block_size + 1 consecutive tokens. Each epoch
    cuts the shards at a random offset (the phase) and shuffles the windows. A window lies within
    one shard, so an epoch skips up to 2 * block_size tokens of each. The n-th window depends only
    on seed and n, so a run can resume at any step and several processes can share it."""

    def __init__(self, arrays, block_size, vocab_size, seed=0):
        self.arrays, self.block_size, self.vocab_size = arrays, block_size, vocab_size
        self.seed, self.epoch = seed, None
        self.last_start = np.array([len(array) - block_size - 1 for array in arrays])
        fitting = self.last_start // block_size + 1
        # the phase needs room for one window; if only one fits, read() keeps it in place
        self.first = np.cumsum([0, *(fitting - (fitting > 1))])
        self.per_epoch = int(self.first[-1])

    def batch(self, first, count):
        """Windows first ... first + count - 1 of the sequence -> idx, targets: see read()."""
        windows, phases = [], []
        for n in range(first, first + count):
            epoch, i = divmod(n, self.per_epoch)
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.phase = int(rng.integers(self.block_size))
                self.order = rng.permutation(self.per_epoch)
                self.epoch = epoch
            windows.append(self.order[i])
            phases.append(self.phase)
        return self.read(np.array(windows), np.array(phases))

    def read(self, windows, phases=0):
        """The windows of an epoch with these numbers (B,), shifted by phases (B,) -> idx, targets
        (the next tokens), each (B, T) int64."""
        shards = np.searchsorted(self.first, windows, side="right") - 1
        starts = (windows - self.first[shards]) * self.block_size + phases
        starts = np.minimum(starts, self.last_start[shards])
        rows = [self.arrays[shard][i : i + self.block_size + 1] for shard, i in zip(shards, starts)]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        if batch.max() >= self.vocab_size:
            raise ValueError(f"a shard is damaged: token {batch.max()} of {self.vocab_size}")
        return batch[:, :-1], batch[:, 1:]


class Pretraining:
    """The task of predicting the next token of a data folder's text: see train()."""

    curves, stats = ("train_loss", "val_loss"), {}

    def __init__(self, config, machine, model, meta):
        self.config, self.machine, self.model, self.meta = config, machine, model, meta
        self.per_step = config.batch_size * config.gradient_accumulation_steps * machine.world_size
        # Embedding and output head take larger steps than the matrices between them, whose best
        # learning rate falls with the width (Yang et al. 2022, "Tensor Programs V"). The factors
        # were tuned. A tied head is both at once and stays small: see GPT.init_weights.
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
        compiles = config.compile and machine.device.type == "cuda" and sys.platform != "win32"
        self.forward = torch.compile(model) if compiles else model
        if machine.world_size > 1:
            self.forward = torch.nn.parallel.DistributedDataParallel(self.forward)

    def updates(self, state):
        yield self.micro_losses(state)  # one update per step

    def micro_losses(self, state):
        """Yields each micro-batch's share of the mean loss; after the last, advances the state."""
        config, machine = self.config, self.machine
        count = config.gradient_accumulation_steps
        for i in range(count):
            first = state["examples"] + (machine.rank * count + i) * config.batch_size
            idx, targets = machine.put(*self.windows.batch(first, config.batch_size))
            if machine.world_size > 1:  # gradients are averaged over processes once per step
                self.forward.require_backward_grad_sync = i == count - 1
            with machine.autocast():
                loss = self.forward(idx, targets) / count
            yield loss
        state["examples"] += self.per_step
        state["tokens"] += self.per_step * config.block_size

    @torch.no_grad()
    def evaluate(self):
        """Mean loss over a fixed set of evenly spaced windows."""
        config, machine, n = self.config, self.machine, self.val_windows.per_epoch
        chosen = np.linspace(0, n - 1, min(n, config.eval_iters * config.batch_size)).astype(int)
        total = 0.0
        self.model.eval()
        starts = range(0, len(chosen), config.batch_size)
        for i in starts[machine.rank :: machine.world_size]:  # this process's share
            windows = chosen[i : i + config.batch_size]
            with machine.autocast():
                loss = self.model(*machine.put(*self.val_windows.read(windows)))
            total += loss.item() * len(windows)
        self.model.train()
        loss = machine.sum(total) / len(chosen)
        bpb = loss * self.bits_per_nat
        return {"val_loss": loss, "val_perplexity": perplexity(loss), "val_bpb": bpb}

    def checkpoint(self):
        tokenizer, digest = self.meta["tokenizer"], self.meta["digest"]
        return {**self.model.checkpoint(), "tokenizer": tokenizer, "data_digest": digest}

    best_checkpoint = checkpoint  # the same here; with LoRA, finetune.py's differ

    def describe(self):
        """Prints four lines about the size of the run."""
        config, total = self.config, self.model.num_params()
        windows = self.per_step * config.max_iters
        tokens, epochs = windows * config.block_size, windows / self.windows.per_epoch
        # per token: 2 operations for each weight forward and 4 backward, plus attention's two
        # products; an untied token embedding is only looked up
        matrices = total - (0 if config.tie_weights else self.model.transformer.wte.weight.numel())
        flops = 6 * matrices + 12 * config.n_layer * config.n_embd * config.block_size
        print(f"{total:,} parameters, on {self.machine.device} in {config.dtype}")
        print(f"{tokens:,} training tokens: {epochs:.1f} epochs")
        print(f"{flops * tokens:.1e} floating-point operations: {flops:,} per token")
        print(f"{tokens / total:.1f} tokens per parameter; 20 is optimal (Hoffmann et al. 2022)")


def perplexity(loss):
    return torch.tensor(loss).exp().item()  # inf where math.exp would overflow


# --- the loop -------------------------------------------------------------------------------------


def train(config, machine, task, saved=None):
    """Trains task.model for max_iters steps, or until a signal or config.patience ends it. saved is
    the last.pt to resume from; the model has its weights already.

    task.updates(state)     iterates over the updates of one step. Each is an iterator over the
                            losses of its micro-batches, whose gradients are added up. Counts
                            state["examples"] and state["tokens"].
    task.evaluate()         {"val_loss": ..., and other columns of metrics.csv}
    task.checkpoint()       what last.pt holds besides the state of the run
    task.best_checkpoint()  what best.pt holds
    task.stats              other columns; task.curves names those that loss.png shows
    """
    rates = (config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    optimizer = configure_optimizer(task.model, *rates, task.lr_scales)
    state = restore(saved, config, optimizer, machine.scaler)
    losses, clock = [], time.perf_counter()
    config.threads = config.threads or pick_threads(task.model)
    torch.set_num_threads(config.threads)
    with stop_signals(machine) as signals:
        while state["step"] < config.max_iters:
            if 0 < config.patience <= state["evaluations_since"]:
                print(f"no improvement in {config.patience} evaluations (--patience)")
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(state["step"], config) * group["lr_scale"]
            machine.seed(config.seed, state["step"])
            for micro_losses in task.updates(state):
                losses.append(0.0)
                for loss in micro_losses:
                    machine.scaler.scale(loss).backward()
                    losses[-1] += loss.detach()
                machine.scaler.unscale_(optimizer)
                norm = clip_grad_norm_(task.model.parameters(), config.grad_clip or math.inf)
                machine.scaler.step(optimizer)  # skipped if float16 gradients overflowed
                machine.scaler.update()
                optimizer.zero_grad(set_to_none=True)
            state["step"] += 1

            interrupted = machine.sum(len(signals)) > 0  # in any process
            is_last = state["step"] == config.max_iters
            evaluates = is_last or state["step"] % config.eval_interval == 0
            if evaluates or interrupted or state["step"] % config.log_interval == 0:
                report(config, machine, task, state, losses, norm, clock, evaluates)
                if evaluates or interrupted:
                    save(config, machine, task, optimizer, state)
                losses, clock = [], time.perf_counter()  # evaluation is not timed
            if interrupted:
                print(f"\nsaved step {state['step']}; --init_from=resume continues from there")
                raise SystemExit(128 + (signals or [signal.SIGTERM])[0])


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
    state = {"step": 0, "examples": 0, "tokens": 0, "rows": []}
    state |= {"best_val_loss": math.inf, "evaluations_since": 0, "has_saved": False}
    if saved:
        with damaged(f"{config.out_dir}/last.pt"):
            # moments come from the file, hyperparameters from config
            moments = {"state": saved["optimizer"]["state"]}
            optimizer.load_state_dict(optimizer.state_dict() | moments)
            if scaler.is_enabled():
                scaler.load_state_dict(saved["scaler"])
            state |= saved["state"]
    if state["step"] >= config.max_iters:
        print(f"{config.out_dir} is already at step {state['step']}; raise --max_iters to continue")
    return state


def learning_rate_at(step, config):
    """Rises linearly to learning_rate at step warmup_iters, then falls along a cosine to min_lr at
    step lr_decay_iters - 1, and stays there."""
    peak, final = config.learning_rate, min(config.learning_rate, config.min_lr)
    start, end = config.warmup_iters, (config.lr_decay_iters or config.max_iters) - 1
    if step < start:
        return peak * (step + 1) / (start + 1)
    done = min(1, (step - start) / max(1, end - start))
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2


def report(config, machine, task, state, losses, norm, clock, evaluates):
    """Adds a row to metrics.csv for the steps since the last row, which began at time clock, and
    prints it; a terminal overwrites lines without an evaluation. Raises ValueError if the loss or
    the gradient is not finite, before anything is saved."""
    loss = machine.sum(torch.stack(losses).mean().item()) / machine.world_size
    norm, step, rows = norm.item(), state["step"], state["rows"]
    if not math.isfinite(loss) or not (math.isfinite(norm) or machine.scaler.is_enabled()):
        what = f"the loss is {loss} and the gradient norm is {norm}"
        raise ValueError(f"stopped at step {step}: {what}; try a lower --learning_rate")
    last = rows[-1] if rows else {"tokens": 0, "seconds": 0}
    seconds = time.perf_counter() - clock
    row = {"step": step, "tokens": state["tokens"], "seconds": round(last["seconds"] + seconds, 3)}
    row |= {"lr": learning_rate_at(step - 1, config), "train_loss": loss, "grad_norm": norm}
    row |= {"tokens_per_s": round((row["tokens"] - last["tokens"]) / seconds)}
    metrics = task.stats | (task.evaluate() if evaluates else {})
    rows.append(row | metrics)

    left = round((config.max_iters - step) * row["seconds"] / step)
    line = f"step {step:5}/{config.max_iters}  loss {loss:.3f}  {row['tokens_per_s']:,} tokens/s  "
    line += f"{left // 60}:{left % 60:02} left  {format_metrics(metrics)}"
    is_terminal = sys.stdout.isatty()
    line = line.ljust(79) if is_terminal else line.rstrip()  # covers the previous line
    print(line, end="\r" if is_terminal and not evaluates else "\n", flush=True)


def format_metrics(metrics):
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def save(config, machine, task, optimizer, state):
    """Writes best.pt if the validation loss is the lowest so far, then last.pt with everything
    needed for the next step. An earlier run in this folder is moved to previous/, in place of what
    was there, by the first save and not before: a run that fails early replaces nothing."""
    row, folder = state["rows"][-1], pathlib.Path(config.out_dir)
    is_best = row.get("val_loss", math.inf) < state["best_val_loss"]
    if is_best:
        state |= {"best_val_loss": row["val_loss"], "evaluations_since": 0}
    elif "val_loss" in row:  # a save after a signal has none
        state["evaluations_since"] += 1
    if machine.rank > 0:
        return
    if not state["has_saved"] and any((folder / f).exists() for f in ("best.pt", "last.pt")):
        (folder / "previous").mkdir(exist_ok=True)
        for name in ("metrics.csv", "loss.png", "best.pt", "last.pt"):
            if (folder / name).exists():
                (folder / name).replace(folder / "previous" / name)
        print(f"moved the earlier run in {folder} to {folder / 'previous'}")
    state["has_saved"] = True
    if is_best:
        save_checkpoint(folder / "best.pt", {**task.best_checkpoint(), "step": state["step"]})
    run = {"optimizer": optimizer.state_dict(), "scaler": machine.scaler.state_dict()}
    run |= {"state": state, "run_config": asdict(config)}
    save_checkpoint(folder / "last.pt", {**task.checkpoint(), **run})
    write_metrics(folder, state["rows"], task.curves)


def write_metrics(folder, rows, curves):
    """Writes metrics.csv and, if matplotlib is installed, loss.png."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    text = "".join(",".join(map(str, line)) + "\n" for line in table)
    write_file(folder / "metrics.csv", text.encode())
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
    caught = []

    def catch(number, frame):
        caught.append(number)
        if machine.world_size == 1:
            handlers.close()  # puts the earlier ones back

    with contextlib.ExitStack() as handlers:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers.callback(signal.signal, number, signal.signal(number, catch))
        yield caught


# --- main -----------------------------------------------------------------------------------------


def load_run(config_class, flags):
    """Returns the config of the run in --out_dir, with these flags applied, and its last.pt."""
    path = pathlib.Path(flags["out_dir"], "last.pt")
    saved = load_checkpoint(path)
    with damaged(path):
        config = saved["run_config"]
    if not config.keys() <= vars(config_class()).keys():
        raise ValueError(f"{path} was begun by another script (train.py or finetune.py)")
    return config_class(**{**config, **flags, "init_from": config["init_from"]}), saved


def make_model(config, flags, meta, saved):
    """A new model, or a checkpoint's, whose shape is then copied into config. Raises ValueError if
    the data or the flags, which are those actually given, do not match the checkpoint."""
    names = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]
    if not saved and config.init_from == "scratch":
        torch.manual_seed(config.seed)
        shape = {name: getattr(config, name) for name in names}
        return GPT(GPTConfig(vocab_size=meta["vocab_size"], **shape))
    path = config.out_dir if saved else config.init_from
    checkpoint = saved or load_checkpoint(path)
    if saved and saved["data_digest"] != meta["digest"]:
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
    for name in names:
        has = getattr(model.config, name)
        if flags.get(name, has) != has:
            raise ValueError(f"{path} has {name}={has}, not --{name}={flags[name]}")
        setattr(config, name, has)  # overrides the default
    return model


def main(argv=None):
    flags = vars(flag_parser(TrainConfig(), __doc__).parse_args(argv))
    config, saved = TrainConfig(**flags), None
    if config.init_from == "resume":
        config, saved = load_run(TrainConfig, {"out_dir": config.out_dir, **flags})
    check_counts(config, "eval_interval", "eval_iters")
    machine = Machine(config)
    has_files = any(path.is_file() for path in pathlib.Path(config.data).glob("[!.]*"))
    if config.data == TrainConfig.data and not has_files and machine.rank == 0:
        print(f"no data in {config.data}/ yet: preparing the manual that comes with Python")
        prepare_data.main([f"--out={config.data}"])
    machine.sum(0)  # waits for rank 0
    meta = open_data(config.data)
    model = make_model(config, flags, meta, saved).to(machine.device).train()
    task = Pretraining(config, machine, model, meta)
    if config.eval_only:
        print(format_metrics(task.evaluate()))
    else:
        task.describe()
        with lock(config.out_dir) if machine.rank == 0 else contextlib.nullcontext():
            train(config, machine, task, saved)
    if machine.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    script(main)
