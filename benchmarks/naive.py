"""The naive trial: what a careful user of transformers, peft and lm-eval writes by hand, every trial from scratch.

Nothing here is slow on purpose: attention is the stock fused kernel, batches are of a sensible size, nothing is saved
or reported, datasets are read by the project's own fast loader, and the harness gets its tasks as objects, not through
its index of all tasks, which takes twelve seconds more. Configuration, tokens and items are those of our trial. Layers
are those of Llama and its relatives.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from adasearch import data, streams
from adasearch.config import StudyConfig, TrialConfig
from adasearch.sections import Mix
from adasearch.trial import Clock
from benchmarks import harness
from benchmarks.harness import Logliks, Places, quietly

IMPORTANCES = ("taylor", "wanda_sp")
_CALIBRATION_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of a calibration batch by device: enough to keep it busy, and no larger logits than it can hold."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One trial for the naive way.

    Args:
        folder: checkpoint with weights of `dtype`.
        dtype: number format of weights and activations.
        device: where everything runs.
        study: names tasks, number of items and seed.
        config: calibration, importance and LoRA settings.
        widths: units to keep by group name, as our plan has them, so that both models are of the same size.
        places: document id of each item among those of its harness task, by task spec.
        batch_size: of lm-eval.
        half_adapters: keep adapters in the model's number format, where peft would make them float32: faster, but
            AdamW then steps in bfloat16.
    """

    folder: Path
    dtype: torch.dtype
    device: torch.device
    study: StudyConfig
    config: TrialConfig
    widths: Mapping[str, int]
    places: Places
    batch_size: int
    half_adapters: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What the naive trial gives.

    Args:
        losses: next-token loss of each step of the recovery.
        logliks: log-likelihoods of the choices of every item, by task spec, in the order of the items.
        model_seconds: part of the evaluation that the harness spent in the model and its batches.
    """

    losses: tuple[float, ...]
    logliks: Logliks
    model_seconds: float


def run(job: Job, clock: Clock) -> Outcome:
    """Run one naive trial; the clock has its stages by the names of ours."""
    clock.enter("load")
    model, tokenizer = load(job)
    clock.enter("items")
    objects = harness.load_tasks(job.study)
    clock.enter("calibrate")
    sample = data.token_matrix(tokenizer, job.config.calibration, job.study.data_root).to(job.device)
    statistics = CALIBRATIONS[job.config.importance.type](model, sample)
    clock.enter("plan")
    kept = choose(model, SCORES[job.config.importance.type](model, statistics), job.widths)
    del statistics
    clock.enter("cut")
    cut(model, kept)
    clock.enter("recover")
    model, losses = recover(model, recovery_rows(job, tokenizer), job.config, half_adapters=job.half_adapters)
    clock.enter("evaluate")
    logliks, seconds = harness.evaluate(model, tokenizer, objects, job.places, job.batch_size)
    clock.enter("done")
    return Outcome(losses=losses, logliks=logliks, model_seconds=seconds)


def load(job: Job) -> tuple[Any, Any]:
    """Return model and tokenizer, read from the checkpoint."""
    with quietly():
        model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=job.dtype).to(job.device)
    return model, AutoTokenizer.from_pretrained(job.folder)


# --- calibration and scores: LLM-Pruner's gradients, or activation norms by hooks


def batches(sample: Tensor) -> tuple[Tensor, ...]:
    """Return a calibration sample (N × T) in parts of whole sequences."""
    return sample.split(max(1, _CALIBRATION_TOKENS[sample.device.type] // sample.shape[1]))


def gradients(model: Any, sample: Tensor) -> None:
    """Leave the gradient of the mean next-token loss, summed over batches of `sample` (N × T), in every ``.grad``."""
    model.train()
    for batch in batches(sample):
        model(input_ids=batch, labels=batch).loss.backward()


def input_norms(model: Any, sample: Tensor) -> dict[str, Tensor]:
    """Return the root mean square of what every output projection reads, by module name (float32 vectors)."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].float().pow(2).sum((0, 1))

        return hook

    names = [name for name, _ in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    model.eval()
    with torch.no_grad():
        for batch in batches(sample):
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {name: (total / sample.numel()).sqrt() for name, total in sums.items()}


CALIBRATIONS: Mapping[str, Callable[[Any, Tensor], Any]] = {"taylor": gradients, "wanda_sp": input_norms}


def sublayers(model: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield name, module and number of units of every attention (KV groups) and MLP (channels)."""
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"model.layers.{index}.self_attn", attention, attention.k_proj.out_features // attention.head_dim
        yield f"model.layers.{index}.mlp", mlp, mlp.up_proj.out_features


def _inward(module: Any) -> list[nn.Linear]:
    """Return the projections whose rows belong to units."""
    names = ("gate_proj", "up_proj") if hasattr(module, "up_proj") else ("q_proj", "k_proj", "v_proj")
    return [getattr(module, name) for name in names]


def _outward(module: Any) -> nn.Linear:
    found: nn.Linear = module.down_proj if hasattr(module, "down_proj") else module.o_proj
    return found


@torch.no_grad()
def taylor_scores(model: Any, _: None) -> dict[str, Tensor]:
    """Return the sum of |w g| over all weights of each unit (arXiv 2305.11627, first order, by element)."""
    scores = {}
    for name, module, units in sublayers(model):
        linears = [(linear.weight, 1) for linear in _inward(module)] + [(_outward(module).weight, 0)]
        parts = [(weight * weight.grad).abs().float().sum(dim).view(units, -1).sum(1) for weight, dim in linears]
        scores[name] = torch.stack(parts).sum(0)
    model.zero_grad(set_to_none=True)
    return scores


@torch.no_grad()
def wanda_scores(model: Any, norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of |w| times the norm of what it reads, over each unit's columns (arXiv 2312.11983, Wanda-SP)."""
    scores = {}
    for name, module, units in sublayers(model):
        output = "down_proj" if name.endswith("mlp") else "o_proj"
        columns = _outward(module).weight.abs().float().sum(0) * norms[f"{name}.{output}"]
        scores[name] = columns.view(units, -1).sum(1)
    return scores


SCORES: Mapping[str, Callable[[Any, Any], dict[str, Tensor]]] = {"taylor": taylor_scores, "wanda_sp": wanda_scores}


def choose(model: Any, scores: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the indices of the best units of each sublayer, ascending."""
    return {name: scores[name].topk(widths[name]).indices.sort().values for name, _, _ in sublayers(model)}


# --- the cut


def _slice_rows(linear: nn.Linear, index: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.data[index].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[index].clone())
    linear.out_features = len(index)


def _slice_columns(linear: nn.Linear, index: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.data[:, index].clone())
    linear.in_features = len(index)


def _features(kept: Tensor, size: int) -> Tensor:
    """Return the features of the kept units, `size` of each."""
    return (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()


def cut(model: Any, kept: Mapping[str, Tensor]) -> None:
    """Slice the projections in place to the kept units; attention keeps its ratio of query to key heads."""
    for name, module, units in list(sublayers(model)):
        for linear in _inward(module):
            _slice_rows(linear, _features(kept[name], linear.out_features // units))
        output = _outward(module)
        _slice_columns(output, _features(kept[name], output.in_features // units))
        if name.endswith("mlp"):
            module.intermediate_size = len(kept[name])


# --- recovery: peft and the stock trainer


def recovery_rows(job: Job, tokenizer: Any) -> Tensor:
    """Return the sequences of the recovery in order (N × length)."""
    options = job.config.recovery.options
    text = Mix.of(options.corpus or job.config.calibration.corpus)
    reading = streams.Reading(text=text, tokens=options.tokens, length=options.length, seed=job.config.seed)
    return as_rows(streams.training_text(tokenizer, reading, job.study.data_root).tokens, options)


def as_rows(tokens: Tensor, options: Any) -> Tensor:
    """Return a stream as sequences, as many as whole steps take."""
    steps = max(1, len(tokens) // (options.batch * options.length))
    return tokens[: steps * options.batch * options.length].view(-1, options.length)


class _Curve(TrainerCallback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002 - stock signature
        """Take the loss out of what the trainer logs."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def _schedule(options: Any, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate by step: linear warmup, then a cosine.

    The stock schedule would be the same but for its first step, which it makes at a rate of 0: of six steps that is one
    in six, and the loss curves could not be compared.
    """
    warmup = round(options.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _arguments(options: Any, steps: int, device: torch.device, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        max_steps=steps,
        max_grad_norm=options.grad_clip,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
    )


def _draw(tuned: Any, seed: int) -> None:
    """Draw the first adapters as peft does, but from the seed alone as ours are, so that the loss curves compare."""
    torch.manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


def recover(
    model: Any, rows: Tensor, config: TrialConfig, *, half_adapters: bool = False
) -> tuple[Any, tuple[float, ...]]:
    """Return the model with trained and merged adapters, and the loss of each step.

    Args:
        model: the cut model.
        rows: sequences, N × T, in the order of training.
        config: whose recovery is LoRA.
        half_adapters: as of a job.
    """
    options = config.recovery.options
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=projections,
        task_type="CAUSAL_LM",
    )
    with quietly():
        tuned: Any = peft.get_peft_model(model, adapters, autocast_adapter_dtype=not half_adapters)
    _draw(tuned, config.seed)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps, curve = len(rows) // options.batch, _Curve()
    with tempfile.TemporaryDirectory() as folder, quietly():
        trainer = Trainer(
            model=tuned,
            args=_arguments(options, steps, model.device, folder),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            optimizers=(optimizer, LambdaLR(optimizer, _schedule(options, steps))),
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return tuned.merge_and_unload(), tuple(curve.losses)
