"""Trains a GPT on what prepare_data.py has written.

    python train.py                                        # a small GPT on Python's manual
    python train.py --data=data/book --out_dir=out/book    # on your text
    python train.py --init_from=resume                     # continues an interrupted run
    python train.py --init_from=out/book --data=data/more --out_dir=out/more   # from its weights
    python train.py --eval_only --init_from=out            # the validation loss of a checkpoint
    torchrun --nproc_per_node=8 train.py                   # on 8 GPUs

The loop is the function train(). A run writes last.pt (everything needed to continue), best.pt (the
model with the lowest validation loss, for sample.py), metrics.csv and, with matplotlib, loss.png.
With the same seed, a run on one CPU gives bit-identical weights, even if interrupted and resumed.
"""

import contextlib
import csv
import glob
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
from torch import nn

import prepare_data
from gpt import GPT, GPTConfig, load_checkpoint, pick_device, pick_dtype, save_checkpoint
from prepare_data import damaged, flag_parser, lock, open_data, script, write_file

# --- settings: each one is a flag, as in --n_layer=6 ----------------------------------------------


@dataclass
class RunConfig:
    """Settings shared by every kind of training, including fine-tuning."""

    out_dir: str = "out"  # folder for checkpoints and metrics.csv
    batch_size: int = 4  # examples per micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per step, per process
    seed: int = 1337  # for weights, batches and dropout
    max_iters: int = 8000  # steps
    learning_rate: float = 2e-3  # the highest, at the end of warmup
    min_lr: float = 1e-5  # the lowest, at the end of the cosine decay
    warmup_iters: int = 20  # steps in which the learning rate rises
    lr_decay_iters: int = 0  # steps until min_lr (0: max_iters)
    weight_decay: float = 0.1  # of matrices, not of biases and LayerNorm
    beta1: float = 0.9  # decay rate of AdamW's first moment
    beta2: float = 0.99  # decay rate of AdamW's second moment
    grad_clip: float = 1.0  # maximum norm of the gradient (0: no clipping)
    eval_interval: int = 500  # steps between evaluations; each one saves
    patience: int = 0  # stop after this many evaluations without improvement (0: never)
    log_interval: int = 100  # steps between lines of output
    device: str = ""  # cpu, cuda, mps (default: the best available)
    dtype: str = ""  # float32, bfloat16 or float16, for matrix products (default: the fastest)


def check_counts(config):
    """Raises ValueError if one of these counts is 0."""
    for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"):
        if not 1 <= getattr(config, name) < 2**31:
            raise ValueError(f"--{name}={getattr(config, name)}: must be 1 or more, below 2**31")


@dataclass
class TrainConfig(RunConfig):
    data: str = "data"  # folder written by prepare_data.py
    init_from: str = "scratch"  # scratch, resume, or a checkpoint to take the weights from
    eval_only: bool = False  # only print the validation loss
    eval_iters: int = 200  # batches in an evaluation, at most
    compile: bool = True  # use torch.compile, on CUDA
    n_layer: int = 2  # transformer blocks
    n_head: int = 4  # attention heads in a block
    n_embd: int = 128  # width of the residual stream
    block_size: int = 128  # context, tokens
    dropout: float = 0.0  # on embeddings and residual branches
    attn_dropout: float = 0.0  # on attention weights
    bias: bool = True  # biases in Linear and LayerNorm
    tie_weights: bool = False  # the output head shares the token embedding


MODEL_FLAGS = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]


# --- batches --------------------------------------------------------------------------------------


class Windows:
    """Windows of block_size + 1 consecutive tokens, as an endless, reproducible sequence.

    Each epoch cuts the shards at a random offset (the phase) and shuffles the windows. No window
    crosses a shard, which leaves out fewer than 2 * block_size tokens of each. The n-th window
    depends on seed and n alone, so a run can resume at any step and several processes can share it.
    """

    def __init__(self, arrays, block_size, vocab_size, seed=0):
        self.arrays, self.block_size, self.vocab_size = arrays, block_size, vocab_size
        self.seed, self.epoch = seed, None
        fitting = [(len(array) - 1) // block_size for array in arrays]
        # leaves one window of room for the phase, unless only one fits
        self.first = np.cumsum([0, *(min(fit, max(1, fit - 1)) for fit in fitting)])
        self.per_epoch = int(self.first[-1])

    def read(self, windows, phase=0):
        """Window numbers of an epoch that begins at phase -> idx, targets (B, T), int64: each
        target is the token after its idx."""
        rows = []
        for i in windows:
            shard = np.searchsorted(self.first, i, side="right") - 1
            array, start = self.arrays[shard], phase + (i - self.first[shard]) * self.block_size
            start = min(start, len(array) - self.block_size - 1)  # a lone window cannot shift
            rows.append(array[start : start + self.block_size + 1].astype(np.int64))
        batch = np.stack(rows)
        if batch.max() >= self.vocab_size:
            raise ValueError(f"a shard is damaged: token {batch.max()} of {self.vocab_size}")
        batch = torch.from_numpy(batch)
        return batch[:, :-1], batch[:, 1:]

    def batch(self, first, count):
        """Windows first ... first + count - 1 of the sequence -> idx, targets, (count, T) each."""
        parts, end = [], first + count
        while first < end:
            epoch, i = divmod(first, self.per_epoch)
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.phase = int(rng.integers(self.block_size))
                self.order = rng.permutation(self.per_epoch).astype(np.uint32)
                self.epoch = epoch
            windows = self.order[i : i + end - first]
            parts.append(self.read(windows, self.phase))
            first += len(windows)
        return tuple(map(torch.cat, zip(*parts)))


# --- the machine ----------------------------------------------------------------------------------


class Machine:
    """Device and precision of a run; this process's place among torchrun's.

    Fills in config.dtype, which checkpoints then hold, so that a resumed run keeps it.
    """

    def __init__(self, config):
        self.rank = int(os.environ.get("RANK", "0"))  # torchrun sets these
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        name = config.device
        if self.world_size > 1 and name in ("", "cuda") and torch.cuda.is_available():
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = pick_device(name)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend)
            if self.rank > 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # only rank 0 prints
        config.dtype = config.dtype or str(pick_dtype(self.device)).removeprefix("torch.")
        if config.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype={config.dtype}: must be float32, bfloat16 or float16")
        self.dtype = getattr(torch, config.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        torch.set_float32_matmul_precision("high")  # TF32 where the device has it

    def autocast(self):
        """Matrix products in dtype; float32 stays float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, *tensors):
        """Copies tensors to the device, on CUDA asynchronously."""
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def sum(self, *numbers):
        """The sum of each number over all processes."""
        if self.world_size == 1:
            return numbers
        totals = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(totals)
        return totals.tolist()

    def seed(self, *numbers):
        """Seeds dropout from these numbers and the rank alone."""
        torch.manual_seed(int(np.random.SeedSequence([*numbers, self.rank]).generate_state(1)[0]))


def use_few_threads(model):
    """One thread for under two million parameters, unless OMP_NUM_THREADS is set. On an idle
    machine, two are up to 1.5 times as fast; beside other work they wait for each other, and one
    is three times as fast as two."""
    if sum(p.numel() for p in model.parameters()) < 2e6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


# --- the optimizer --------------------------------------------------------------------------------


def configure_optimizer(model, learning_rate, weight_decay, betas, scales=None):
    """AdamW (Loshchilov & Hutter 2019); weight decay applies to matrices only.

    scales, {end of a parameter's name: factor}, multiplies learning rates; the loop finds the
    factor in each group's "lr_scale".
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = next((s for end, s in (scales or {}).items() if name.endswith(end)), 1)
            decay = weight_decay if parameter.dim() >= 2 else 0.0
            group = {"params": [], "lr": learning_rate * scale, "lr_scale": scale}
            group = groups.setdefault((scale, decay), {**group, "weight_decay": decay})
            group["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), betas=betas, fused=True)


def learning_rate_at(step, config):
    """Rises linearly for warmup_iters steps, then falls along a cosine to min_lr.

    Step warmup_iters has learning_rate; step lr_decay_iters - 1, and all after it, min_lr.
    """
    highest, lowest = config.learning_rate, min(config.learning_rate, config.min_lr)
    if step < config.warmup_iters:
        return highest * (step + 1) / (config.warmup_iters + 1)
    last = (config.lr_decay_iters or config.max_iters) - 1
    done = min(1, (step - config.warmup_iters) / max(1, last - config.warmup_iters))
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * done)) / 2


# --- pretraining ----------------------------------------------------------------------------------


class Pretraining:
    """The task of predicting the next token of a data folder's text: see train()."""

    curves, stats = ("train_loss", "val_loss"), {}  # see train()

    def __init__(self, config, machine, model, meta):
        self.config, self.machine, self.model, self.meta = config, machine, model, meta
        # A row of the token embedding learns only when its token occurs, and its steps, like the
        # head's, need not shrink as the matrices grow (Yang et al. 2022, "Tensor Programs V"). The
        # factors were found by trial. A tied head, which is both at once, gets none.
        self.lr_scales = {} if model.config.tie_weights else {"wte.weight": 20, "lm_head.weight": 4}
        vocab_size, train, val = meta["vocab_size"], meta["splits"]["train"], meta["splits"]["val"]
        self.windows = Windows(train["arrays"], config.block_size, vocab_size, config.seed)
        if not self.windows.per_epoch:
            raise ValueError(f"{config.data}: too little text for --block_size={config.block_size}")
        # a validation split shorter than the context has shorter windows
        block_size = min(config.block_size, max(map(len, val["arrays"])) - 1)
        self.val_windows = Windows(val["arrays"], block_size, vocab_size)
        # from nats per token to bits per byte, which can be compared between tokenizers
        self.bits_per_byte = val["tokens"] / val["bytes"] / math.log(2)
        compiles = config.compile and machine.device.type == "cuda" and sys.platform != "win32"
        self.forward = torch.compile(model) if compiles else model
        if machine.world_size > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)

    def updates(self, state):
        """One update per step. State advances once all losses have been drawn."""
        yield self.losses(state)

    def losses(self, state):
        """Yields the loss of each micro-batch; their sum is the mean over all targets."""
        config, machine = self.config, self.machine
        micro_batches = config.gradient_accumulation_steps
        for i in range(micro_batches):
            first = state["examples"] + (machine.rank * micro_batches + i) * config.batch_size
            idx, targets = machine.put(*self.windows.batch(first, config.batch_size))
            if machine.world_size > 1:  # gradients are averaged over processes once a step
                self.forward.require_backward_grad_sync = i == micro_batches - 1
            with machine.autocast():
                loss = self.forward(idx, targets) / micro_batches
            yield loss
        count = config.batch_size * micro_batches * machine.world_size
        state["examples"] += count
        state["tokens"] += count * config.block_size

    @torch.no_grad()
    def evaluate(self):
        """Mean loss over the same evenly spaced windows each time."""
        config, machine, total, count = self.config, self.machine, 0.0, 0
        n = self.val_windows.per_epoch
        chosen = np.linspace(0, n - 1, min(n, config.eval_iters * config.batch_size)).astype(int)
        self.model.eval()
        for i in range(0, len(chosen), config.batch_size)[machine.rank :: machine.world_size]:
            batch = self.val_windows.read(chosen[i : i + config.batch_size])
            with machine.autocast():
                total += self.model(*machine.put(*batch)).item() * batch[1].numel()
            count += batch[1].numel()
        self.model.train()
        total, count = machine.sum(total, count)
        loss = total / count
        bits = loss * self.bits_per_byte
        return {"val_loss": loss, "val_perplexity": perplexity(loss), "val_bpb": bits}

    def checkpoint(self):
        tokenizer, digest = self.meta["tokenizer"], self.meta["digest"]
        return {**self.model.checkpoint(), "tokenizer": tokenizer, "data_digest": digest}

    best_checkpoint = checkpoint  # finetune.py's differ

    def describe(self):
        """Four lines about the size of the run."""
        config, gpt, total = self.config, self.model.config, self.model.num_params()
        windows = config.batch_size * config.gradient_accumulation_steps * self.machine.world_size
        tokens = windows * config.max_iters * config.block_size
        epochs = windows * config.max_iters / self.windows.per_epoch
        # 2 operations for each weight and token forward, 4 backward; and attention's two products
        matrices = total - (0 if gpt.tie_weights else gpt.vocab_size * gpt.n_embd)
        flops = 6 * matrices + 12 * gpt.n_layer * gpt.n_embd * config.block_size
        print(f"{total:,} parameters, on {self.machine.device} in {config.dtype}")
        print(f"{tokens:,} tokens of training: {epochs:.1f} epochs")
        print(f"{flops * tokens:.1e} floating-point operations: {flops:,} per token")
        print(f"{tokens / total:.1f} tokens per parameter; 20 is optimal (Hoffmann et al. 2022)")


def perplexity(loss):
    """exp(loss): inf where Python's own exp would overflow."""
    return torch.tensor(loss).exp().item()


# --- the loop -------------------------------------------------------------------------------------


def train(config, machine, task, saved=None):
    """Trains task.model for max_iters steps, or until a signal or config.patience ends it.

    task.updates(state)     yields generators of losses, each of which makes one update;
                            adds to state["examples"] and state["tokens"]
    task.evaluate()         {"val_loss": ..., and other columns of metrics.csv}
    task.checkpoint()       what last.pt holds besides the state of the run
    task.best_checkpoint()  what best.pt holds
    task.stats              other columns; task.curves names those that loss.png shows

    saved is the last.pt to resume from; the model has its weights already.
    """
    rates = (config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    optimizer = configure_optimizer(task.model, *rates, task.lr_scales)
    state = restore(saved, config, optimizer, machine.scaler)
    losses, clock = [], time.perf_counter()
    use_few_threads(task.model)
    with stop_signals(machine) as signals:
        while state["step"] < config.max_iters:
            if 0 < config.patience <= state["evaluations_since"]:
                print(f"no improvement in {config.patience} evaluations (--patience)")
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(state["step"], config) * group["lr_scale"]
            machine.seed(config.seed, state["step"])
            for micro_batches in task.updates(state):
                losses.append(0.0)
                for loss in micro_batches:
                    machine.scaler.scale(loss).backward()
                    losses[-1] += loss.detach()
                machine.scaler.unscale_(optimizer)
                limit = config.grad_clip or math.inf
                norm = nn.utils.clip_grad_norm_(task.model.parameters(), limit)
                machine.scaler.step(optimizer)  # does nothing where float16 has overflowed
                machine.scaler.update()
                optimizer.zero_grad(set_to_none=True)
            state["step"] += 1

            interrupted = machine.sum(len(signals))[0] > 0  # in any process
            is_last = state["step"] == config.max_iters
            evaluates = is_last or state["step"] % config.eval_interval == 0
            if evaluates or interrupted or state["step"] % config.log_interval == 0:
                row = summarize(config, machine, state, losses, norm, clock)
                metrics = task.stats | (task.evaluate() if evaluates else {})
                state["rows"].append(row | metrics)
                print_progress(row, metrics, config)
                if evaluates or interrupted:
                    save(config, machine, task, optimizer, state)
                losses, clock = [], time.perf_counter()  # evaluation is not timed
            if interrupted:
                print(f"saved step {state['step']}; --init_from=resume continues from there")
                raise SystemExit(128 + max(signals, default=signal.SIGTERM))


def restore(saved, config, optimizer, scaler):
    """The state of a new run, or of the run in saved, whose optimizer it also restores."""
    state = {"step": 0, "examples": 0, "tokens": 0, "seconds": 0.0, "rows": []}
    state |= {"best_val_loss": math.inf, "evaluations_since": 0, "has_saved": False}
    if saved:
        with damaged(f"{config.out_dir}/last.pt"):
            # hyperparameters come from config, moments from the file
            settings = optimizer.state_dict()
            optimizer.load_state_dict({**settings, "state": saved["optimizer"]["state"]})
            if saved["scaler"] and scaler.is_enabled():
                scaler.load_state_dict(saved["scaler"])
            state |= saved["state"]
    if state["step"] >= config.max_iters:
        print(f"{config.out_dir} is already at step {state['step']}: see --max_iters")
    return state


def summarize(config, machine, state, losses, norm, clock):
    """The row of metrics.csv for the steps since the previous one; clock is when they began. Raises
    ValueError if losses or gradients are not finite, so that no such weights are ever saved."""
    loss = machine.sum(torch.stack(losses).mean().item())[0] / machine.world_size
    norm = norm.item()
    if not math.isfinite(loss) or not (math.isfinite(norm) or machine.scaler.is_enabled()):
        what = f"the loss is {loss}, the norm of the gradient {norm}"
        raise ValueError(f"stopped at step {state['step']}: {what}; try a lower --learning_rate")
    seconds = time.perf_counter() - clock
    state["seconds"] += seconds
    earlier = state["rows"][-1]["tokens"] if state["rows"] else 0
    return {
        "step": state["step"],
        "tokens": state["tokens"],
        "seconds": round(state["seconds"], 3),
        "lr": learning_rate_at(state["step"] - 1, config),
        "train_loss": loss,
        "grad_norm": norm,
        "tokens_per_s": round((state["tokens"] - earlier) / seconds),
    }


def print_progress(row, metrics, config):
    """Prints a line; on a terminal, the next one replaces it unless it has an evaluation."""
    left = (config.max_iters - row["step"]) * row["seconds"] / row["step"]
    line = f"step {row['step']:5}/{config.max_iters}  loss {row['train_loss']:.3f}  "
    line += f"{row['tokens_per_s']:,} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left  "
    is_live = sys.stdout.isatty() and "val_loss" not in metrics
    print(line + format_metrics(metrics), end="\r" if is_live else "\n", flush=True)


def format_metrics(metrics):
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def save(config, machine, task, optimizer, state):
    """Writes best.pt if the validation loss is the lowest so far, then last.pt with everything
    needed for the next step. The first save of a run, not its start, moves an earlier run aside:
    a run that fails before it replaces nothing."""
    val_loss = state["rows"][-1].get("val_loss", math.nan)  # nan: a signal, without an evaluation
    is_best = val_loss < state["best_val_loss"]
    if is_best:
        state |= {"best_val_loss": val_loss, "evaluations_since": 0}
    elif val_loss >= state["best_val_loss"]:
        state["evaluations_since"] += 1
    if machine.rank > 0:
        return
    folder = pathlib.Path(config.out_dir)
    if not state["has_saved"]:
        set_aside(folder)
    state["has_saved"] = True
    if is_best:
        save_checkpoint(folder / "best.pt", {**task.best_checkpoint(), "step": state["step"]})
    run = {"optimizer": optimizer.state_dict(), "scaler": machine.scaler.state_dict()}
    run |= {"state": state, "run_config": asdict(config)}
    save_checkpoint(folder / "last.pt", {**task.checkpoint(), **run})
    write_metrics(folder, state["rows"], task.curves)


def set_aside(folder):
    """Moves the files of an earlier run to folder/previous, where they replace those there."""
    if (folder / "best.pt").exists() or (folder / "last.pt").exists():
        (folder / "previous").mkdir(exist_ok=True)
        for name in ("metrics.csv", "loss.png", "best.pt", "last.pt"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(folder / name, folder / "previous" / name)
        print(f"the earlier run in {folder} is now in {folder / 'previous'}")


def write_metrics(folder, rows, curves):
    """Writes metrics.csv and, if matplotlib is installed, loss.png."""
    text, columns = io.StringIO(), dict.fromkeys(name for row in rows for name in row)
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_file(folder / "metrics.csv", text.getvalue().encode())
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
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
        if machine.world_size == 1:
            signal.signal(number, earlier[number])
        caught.append(number)

    earlier = {n: signal.signal(n, catch) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


# --- main -----------------------------------------------------------------------------------------


def load_run(config_class, flags):
    """-> the config of the run in --out_dir, changed by these flags, and its last.pt."""
    path = pathlib.Path(flags["out_dir"], "last.pt")
    saved = load_checkpoint(path)
    with damaged(path):
        init_from = saved["run_config"]["init_from"]
        return config_class(**{**saved["run_config"], **flags, "init_from": init_from}), saved


def load_data(folder):
    """Opens the data folder; creates the default one if it is missing or empty."""
    if folder == TrainConfig.data and not glob.glob(f"{folder}/*"):
        print(f"no {folder}/ yet: preparing the default, the manual that comes with Python")
        prepare_data.main([f"--out={folder}"])
    return open_data(folder)


def make_model(config, flags, meta, checkpoint, resumes):
    """A new model, or that of a checkpoint, with which the flags and the data must agree."""
    if checkpoint is None:
        torch.manual_seed(config.seed)
        shape = {name: getattr(config, name) for name in MODEL_FLAGS}
        return GPT(GPTConfig(vocab_size=meta["vocab_size"], **shape))
    path = config.out_dir if resumes else config.init_from
    spec = prepare_data.tokenizer_of(checkpoint, path)
    if spec != meta["tokenizer"]:  # the same tokenizer can have two specs, as GPT-2's does
        build = prepare_data.build_tokenizer
        if build(spec)._mergeable_ranks != build(meta["tokenizer"])._mergeable_ranks:
            hint = "prepare the text with --tokenizer=FOLDER, its data folder, or --tokenizer=gpt2"
            raise ValueError(f"{config.data} and {path} have different tokenizers: {hint}")
    with damaged(path):
        dropouts = {"dropout": config.dropout, "attn_dropout": config.attn_dropout}
        model = GPT.from_checkpoint(checkpoint, **dropouts)
    if "block_size" in flags and not resumes:
        model.resize(block_size=config.block_size)
    for name in MODEL_FLAGS:
        has = getattr(model.config, name)
        if flags.get(name, has) != has:
            raise ValueError(f"{path} has {name}={has}, not --{name}={flags[name]}")
    return model


def main(argv=None):
    flags = vars(flag_parser(TrainConfig, __doc__).parse_args(argv))
    config, checkpoint, saved = TrainConfig(**flags), None, None
    if config.init_from == "resume":
        config, saved = load_run(TrainConfig, {"out_dir": config.out_dir, **flags})
    elif config.init_from != "scratch":
        checkpoint = load_checkpoint(config.init_from)
    check_counts(config)
    machine = Machine(config)
    if machine.rank == 0:
        load_data(config.data)  # which may prepare it, while the others wait
    machine.sum(0)  # waits for rank 0
    meta = load_data(config.data)
    if saved and saved["data_digest"] != meta["digest"]:
        raise ValueError(f"{config.data}: not the data that {config.out_dir} was trained on")
    model = make_model(config, flags, meta, saved or checkpoint, resumes=bool(saved))
    model.to(machine.device).train()
    # the shape of a loaded model overrides the defaults
    config = replace(config, **{name: getattr(model.config, name) for name in MODEL_FLAGS})
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
