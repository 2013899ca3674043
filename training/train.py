"""Train one network for a given time, from the start or from a checkpoint.

    python -m training.train --model fast-2x --bank BANK --seconds 300 --out fast-2x.pt
    python -m training.train --model clean-2x-fast --bank BANK --pairs PAIRS --seconds 400 ...

The learning rate follows the share of `--total` seconds that have been trained: a short warm-up,
then half a cosine down to nearly nothing. A run of fewer `--seconds` stops in between and is
resumed with `--resume`; `--reset` takes the weights alone and begins a schedule of its own. `--span
A B` says instead which part of the schedule, from 0 to 1, this run covers, however long it takes.
On a CUDA device one whole step, from the crop to the optimizer, is one CUDA graph. `--resume` takes
an exported file, too.

`--from-slope S` begins with activations of that slope below zero and leads it to the network's own
over the first half of the schedule. `--int8` trains a nano network as int8 will run it
(`networks.PlaneNet`); its checkpoint holds the float weights.

A checkpoint holds the moving average of the weights and nothing else that a run needs again: the
optimizer forgets within a hundred steps what it held.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from training import degrade
from training.data import Bank
from training.loss import GROUP, Fidelity, loss_of
from training.networks import SPECS, NetSpec, PlaneNet, parameters

EMA_DECAY = 0.999
EASE_S = 3.0  # a run begins without the optimizer's memory, so its first seconds go slowly


class Batch(NamedTuple):
    """Input planes, their truths, both in 0..1, and how many of them, the first, were coded."""

    small: Tensor
    truth: Tensor
    coded: int


def upscale_batches(bank: Bank, count: int, size: int) -> Callable[[], Batch]:
    """Clean pairs for x2: halved crops and the crops, (N, 1, n, n) and (N, 1, 2n, 2n), 0..1."""
    halver = degrade.Halver(size, bank.device, blurred=False)

    def batch() -> Batch:
        crops = bank.crop(count, 2 * size, degrade.MARGIN)["hr"]
        crops = degrade.vary_tone(crops)
        m = degrade.MARGIN
        small = degrade.rounded(halver(crops))
        return Batch(degrade.normalise(small), degrade.normalise(crops[..., m:-m, m:-m]), 0)

    return batch


def restore_double_batches(
    bank: Bank, pairs: Bank, count: int, size: int, share: float
) -> Callable[[], Batch]:
    """A share of coded pairs; the rest halved, a little of it blurred and a fifth with noise."""
    coded = round(share * count)
    halver = degrade.Halver(size, bank.device, blurred=True)

    def batch() -> Batch:
        real = pairs.crop(coded, size)
        crops = degrade.vary_tone(bank.crop(count - coded, 2 * size, degrade.MARGIN)["hr"])
        m = degrade.MARGIN
        draw = torch.rand(2, count - coded, 1, 1, 1, device=bank.device)
        sigma = torch.where(draw[0] < 0.2, 3 + 9 * draw[1], torch.zeros_like(draw[1]))
        small = degrade.rounded(degrade.add_noise(halver(crops), sigma))
        return Batch(
            degrade.normalise(torch.cat((real["lr"], small))),
            degrade.normalise(torch.cat((real["hr"], crops[..., m:-m, m:-m]))),
            coded,
        )

    return batch


def restore_same_batches(
    bank: Bank, double: Bank, same: Bank, count: int, size: int, coded: float
) -> Callable[[], Batch]:
    """A share `coded`, half of it of halved and half of whole pictures; the rest noise only."""
    first = round(coded / 2 * count)
    second = round(coded * count) - first

    def batch() -> Batch:
        a, b = double.crop(first, size), same.crop(second, size)
        crops = degrade.vary_tone(bank.crop(count - first - second, size)["hr"]).round()
        draw = torch.rand(2, crops.shape[0], 1, 1, 1, device=bank.device)
        sigma = torch.where(draw[0] < 0.75, 2 + 18 * draw[1], torch.zeros_like(draw[1]))
        noisy = degrade.rounded(degrade.add_noise(crops, sigma))
        return Batch(
            degrade.normalise(torch.cat((a["lr"], b["lr"], noisy))),
            degrade.normalise(torch.cat((a["clean"], b["clean"], crops))),
            first + second,
        )

    return batch


def batches(
    spec: NetSpec, options: argparse.Namespace, device: torch.device
) -> Callable[[], Batch]:
    """The source of training pairs that suits the network's task."""
    bank = Bank([options.bank], {"hr": 1}, device)
    if spec.task == "upscale":
        return upscale_batches(bank, options.batch, options.size)
    limit = time.monotonic() + options.seconds
    while not (options.pairs / "DONE").exists():
        if time.monotonic() > limit:
            raise RuntimeError(f"{options.pairs}: no pairs after {options.seconds:.0f} s")
        time.sleep(0.5)
    folders = [p for p in sorted(options.pairs.glob("double-*")) if (p / "index.json").exists()]
    if spec.scale == 2:
        pairs = Bank(folders, {"lr": 1, "hr": 2}, device)
        return restore_double_batches(
            bank, pairs, options.batch, options.size, options.coded or 0.66
        )
    own = [p for p in sorted(options.pairs.glob("same-*")) if (p / "index.json").exists()]
    double = Bank(folders, {"lr": 1, "clean": 1}, device)
    same = Bank(own, {"lr": 1, "clean": 1}, device)
    return restore_same_batches(
        bank, double, same, options.batch, options.size, options.coded or 0.82
    )


def learning_rate(peak: float, progress: float) -> float:
    """Warm-up over the first 2%, then half a cosine from `peak` to a hundredth of it."""
    if progress < 0.02:
        return peak * (0.05 + 0.95 * progress / 0.02)
    fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98))
    return peak * (0.01 + 0.99 * fall)


def state_of(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a checkpoint holds, or the same of an exported file, which knows of no time or steps."""
    if path.suffix != ".onnx":
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return state
    model = onnx.load(path)
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in model.graph.initializer}
    weights = {k: v.to(device) for k, v in tensors.items() if k.endswith((".weight", ".bias"))}
    weights.pop("cubic.weight", None)  # is not trained
    return {"model": model.graph.name, "average": weights, "trained_s": 0.0, "steps": 0}


class Trainer:
    """Network, optimizer and moving average, with one step as a repeatable piece of work."""

    def __init__(self, options: argparse.Namespace, spec: NetSpec, device: torch.device) -> None:
        self.options, self.spec, self.device = options, spec, device
        self.cuda = device.type == "cuda"
        self.net = PlaneNet(spec, coded=options.int8).to(device)
        if self.cuda:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.weights = list(self.net.parameters())
        self.average = [w.detach().clone() for w in self.weights]
        rate = torch.tensor(options.lr, device=device) if self.cuda else options.lr
        self.optimizer = torch.optim.Adam(
            self.weights, lr=rate, betas=(0.9, 0.99), fused=self.cuda, capturable=self.cuda
        )
        self.fidelity = Fidelity(spec.scale * options.size, device)
        self.trained_s = 0.0
        self.steps = 0
        self.loss_sum = torch.zeros((), device=device)

    def resume(self, path: Path) -> None:
        """Take up the averaged weights of a checkpoint, and the time trained unless reset."""
        state = state_of(path, self.device)
        names = [name for name, _ in self.net.named_parameters()]
        with torch.no_grad():
            for weight, average, name in zip(self.weights, self.average, names, strict=True):
                if name in state["average"]:
                    weight.copy_(state["average"][name])
                    average.copy_(state["average"][name])
        if not self.options.reset:
            self.trained_s, self.steps = state["trained_s"], state["steps"]

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        names = [name for name, _ in self.net.named_parameters()]
        average = {
            name: value.detach().to("cpu", torch.float32).contiguous()
            for name, value in zip(names, self.average, strict=True)
            if name != "steps"
        }
        state = {"model": self.spec.name, "average": average}
        part = path.with_suffix(".part")
        torch.save(state | {"trained_s": self.trained_s, "steps": self.steps}, part)
        part.replace(path)

    def step(self, source: Callable[[], Batch], forward: Callable[[Batch], Tensor]) -> None:
        """One update. Holds no host synchronisation, so that a CUDA graph can record it."""
        with torch.no_grad():
            batch = source()
        loss = forward(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 0.5, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [w.detach() for w in self.weights], 1 - EMA_DECAY)
        self.loss_sum += loss.detach()

    def forward(self, batch: Batch) -> Tensor:
        """The loss of one batch; inner layers in bfloat16 on a CUDA device."""
        small = batch.small
        if self.cuda:
            small = small.contiguous(memory_format=torch.channels_last)
        strength = torch.ones(1, device=self.device) if self.spec.strength else None
        with torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.cuda and not self.options.int8,  # which is finer than bfloat16
            cache_enabled=False,
        ):
            out = self.net(small, strength)
        loss = loss_of(self.options.loss, out, batch.truth, batch.coded, batch.small)
        if self.options.fidelity:
            # Where a part is coded the rest, clean, has little to gain and keeps its decibels.
            part = batch.coded // GROUP * GROUP or out.shape[0]
            lost = self.fidelity(out[:part], batch.truth[:part])
            loss = loss + self.options.fidelity * part / out.shape[0] * lost
        return loss

    def recorded(self, source: Callable[[], Batch]) -> Callable[[], None]:
        """A callable that does one step: compiled and recorded where the options say so."""
        forward = torch.compile(self.forward) if self.options.compile else self.forward
        if not (self.cuda and self.options.graph):
            return lambda: self.step(source, forward)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(5):
                self.step(source, forward)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step(source, forward)
        return graph.replay

    def set_rate(self, rate: float) -> None:
        """Change the learning rate, in place where a graph holds its address."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def set_slope(self, progress: float) -> None:
        """Lead the activations' slope below zero to the network's own, in place."""
        start, own = self.options.from_slope, self.spec.slope
        if start is not None:
            self.net.slope.fill_(own + (start - own) * max(0.0, 1 - 2 * progress))

    def run(self, source: Callable[[], Batch], deadline: float) -> None:
        """Train until the monotonic clock reads `deadline` or the schedule is at its end."""
        options = self.options
        total = options.total or options.seconds
        self.set_rate(0.05 * options.lr)
        self.set_slope(0.0)
        if options.int8:
            self.net.calibrate(source().small)
        step = self.recorded(source)
        self.loss_sum.zero_()
        begun = last = said = saved = time.monotonic()
        before, chunk, since, said_steps = self.trained_s, 20, 0, self.steps
        while time.monotonic() < deadline and (options.span or self.trained_s < total):
            if options.max_steps and self.steps >= options.max_steps:
                break
            for _ in range(chunk):
                step()
            self.steps += chunk
            since += chunk
            mean = float(self.loss_sum) / since  # waits for the device
            now = time.monotonic()
            self.trained_s = before + now - begun
            if options.max_steps:
                progress = self.steps / options.max_steps
            elif options.span:
                first, end = options.span
                progress = first + (end - first) * (now - begun) / max(deadline - begun, 1.0)
            else:
                progress = self.trained_s / total
            ease = min(1.0, 0.05 + (now - begun) / EASE_S)
            self.set_rate(ease * learning_rate(options.lr, progress))
            self.set_slope(progress)
            # Few enough steps between two looks at the clock, many enough not to wait often.
            chunk = max(1, min(200, int(chunk * 0.5 / max(now - last, 1e-3)) + 1))
            last = now
            if not math.isfinite(mean):
                raise RuntimeError(f"{self.spec.name}: the loss is {mean} at step {self.steps}")
            if now - said > options.log_s:
                pace = (self.steps - said_steps) / (now - said)
                print(
                    f"{self.spec.name} {self.trained_s:6.0f} s {self.steps:7d} steps "
                    f"{pace:6.1f}/s loss {mean:.5f}",
                    flush=True,
                )
                said, said_steps, since = now, self.steps, 0
                self.loss_sum.zero_()
            if now - saved > options.save_s:
                self.save(options.out)
                saved = now


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(SPECS), required=True)
    parser.add_argument("--bank", type=Path, required=True, help="folder of training.data")
    parser.add_argument("--pairs", type=Path, help="folder of training.codec, for clean networks")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--resume", type=Path, help="checkpoint or exported file to start from")
    parser.add_argument("--reset", action="store_true", help="resume the weights only")
    parser.add_argument(
        "--seconds", type=float, required=True, help="wall time of this run, at most"
    )
    parser.add_argument("--total", type=float, help="trained seconds that the schedule spans")
    parser.add_argument(
        "--span", type=float, nargs=2, help="first and last share of the schedule, in this run"
    )
    parser.add_argument("--int8", action="store_true", help="train for int8; nano networks only")
    parser.add_argument(
        "--from-slope", type=float, help="slope below zero to begin with, such as 0.1"
    )
    parser.add_argument("--max-steps", type=int, help="let steps instead of time set the schedule")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=96, help="crop size in input pixels, even")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--loss",
        choices=["charbonnier", "mse", "log", "contrast", "relative"],
        default="charbonnier",
    )
    parser.add_argument(
        "--coded", type=float, help="share of coded crops; 0.66 for clean-2x, 0.82 for clean-1x"
    )
    parser.add_argument(
        "--fidelity", type=float, default=0.0, help="weight of one lost point of VMAF-NEG"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-s", type=float, default=20.0)
    parser.add_argument("--save-s", type=float, default=45.0, help="time between checkpoints")
    options = parser.parse_args()
    if options.fidelity and options.batch % GROUP:
        parser.error(f"--batch is {options.batch}: --fidelity needs a multiple of {GROUP}")
    return options


def main() -> None:
    """Command line."""
    options = arguments()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True
    spec = SPECS[options.model]
    trainer = Trainer(options, spec, device)
    if options.resume:
        trainer.resume(options.resume)
    print(f"{spec.name}: {parameters(trainer.net)} parameters, {spec.macs_per_block} MAC/block")
    trainer.run(batches(spec, options, device), deadline)
    trainer.save(options.out)
    print(f"{spec.name}: {trainer.steps} steps, {trainer.trained_s:.0f} s trained", flush=True)


if __name__ == "__main__":
    main()
