"""Several processes that train together, one a device: started by torchrun, joined by PyTorch's process group.

A single process, without torchrun, has no process group; all operations here then return at once.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset

from utils import checkpoint, device
from utils.errors import UserError

# For machines that stop answering; longer than any normal wait for another process (validation, a slow disk). A
# process that ends is noticed at once: its connections close, and torchrun ends the others.
TIMEOUT = timedelta(minutes=10)
LOST_PROCESS = "another process of this run has ended: its own error, or the signal that torchrun reports, says why"
_group_numbers = itertools.count()  # a process may join several groups, one after the other


class Ranks:
    """The processes of a run, of which this one is number ``rank`` of ``world``.

    ``local`` of ``local_world`` is its number on this machine. All processes must call all methods but `first_to_say`
    and `pick`, in the same order: each call waits for the others.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, local: int = 0, local_world: int = 1, store: dist.Store | None = None
    ):
        self.rank = rank
        self.world = world
        self.local = local
        self.local_world = local_world
        self.store = store
        self.saved = "nothing was saved yet"  # what the run has saved, for error messages
        self.remark = f" and {world - 1} more" if world > 1 else ""  # about the processes, for the log

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes the files."""
        return self.rank == 0

    def pick(self, name: str) -> torch.device:
        """The device that the setting ``device`` names; for a GPU, each process of a machine gets its own."""
        return device.pick(name, self.local, self.local_world)

    def first_to_say(self, text: str) -> bool:
        """Whether this process is the first to say ``text``; also True where that cannot be found out."""
        if self.store is None:
            return True
        try:
            return self.store.add(f"said/{text}", 1) == 1
        except RuntimeError:
            return True

    def all_max(self, *numbers: int) -> list[int]:
        """The largest of each of ``numbers`` over all processes; cheap enough for every step."""
        return list(numbers) if self.world == 1 else self.largest(torch.tensor(numbers)).tolist()

    def largest(self, value: Tensor) -> Tensor:
        """The largest ``value`` of all processes, on its device, without waiting for the device."""
        if self.world > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def all_gather(self, value: Any) -> list:
        """``value`` (plain values and CPU tensors) of every process, by rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def map(self, work: Callable[[Sequence], list], items: Sequence) -> list:
        """The results of ``work`` on ``items``, one for each and in their order; every process does its share."""
        shares = self.all_gather(work(Subset(items, range(self.rank, len(items), self.world))))
        return [shares[k % self.world][k // self.world] for k in range(len(items))]

    def mean(self, figures: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Each figure's mean over all processes, as a number; not finite where one of them is not."""
        gathered = self.all_gather({name: float(value) for name, value in figures.items()})
        return {name: sum(each[name] for each in gathered) / self.world for name in figures}

    def check_same(self, value: Any, file: Path) -> None:
        """Raise `UserError` unless all processes have the same ``value``, read from ``file``."""
        if any(other != value for other in self.all_gather(value)):
            raise UserError(f"{file} is not the same for all processes; use a folder that all machines share")

    def broadcast(self, module: nn.Module) -> None:
        """Give ``module`` the first process's parameters and buffers."""
        if self.world > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def average_statistics(self, module: nn.Module) -> None:
        """Replace the running statistics of batch norm in ``module`` by their means over all processes."""
        if self.world == 1:
            return
        norms = [each for each in module.modules() if getattr(each, "running_mean", None) is not None]
        running = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        if running:
            flat = torch.cat(running) / self.world
            dist.all_reduce(flat)
            torch._foreach_copy_(running, flat.split([len(tensor) for tensor in running]))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients of ``parameters`` by their means over all processes.

        Every process must have gradients of the same parameters.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / self.world
        dist.all_reduce(flat)
        means = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(each) for mean, each in zip(means, gradients, strict=True)])

    def states(self, method: nn.Module) -> dict[str, Any]:
        """The state of each process for a checkpoint: ``random`` states of the first one, and ``others``.

        ``others`` also have the buffers of ``method`` that differ from the first process's: KA-Net's memory of samples.
        """
        random = checkpoint.random_states()
        if self.world == 1:
            return {"random": random}
        first, *others = self.all_gather({"random": random, "buffers": _buffers(method)})
        for other in others:
            kept = {key: value for key, value in other["buffers"].items() if not value.equal(first["buffers"][key])}
            other["buffers"] = kept
        return {"random": first["random"], "others": others}

    def start(self, seed: int, step: int = 0) -> None:
        """Seed every process but the first with a seed of its own; the first has the random numbers of a single one."""
        if not self.first:
            checkpoint.seed(int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0] >> 1))

    def restore(self, state: dict[str, Any], method: nn.Module, seed: int, step: int) -> None:
        """Continue from the `states` in a checkpoint of ``step``; a process without one there is seeded by `start`."""
        self.start(seed, step)
        saved = [{"random": state["random"], "buffers": {}}, *state.get("others", [])]
        if self.rank < len(saved):
            try:
                checkpoint.set_random_states(saved[self.rank]["random"])
                for key, value in saved[self.rank]["buffers"].items():
                    method.get_buffer(key).copy_(value)
            except (KeyError, TypeError, AttributeError, RuntimeError):
                raise UserError(
                    f"the checkpoint's state of process {self.rank} is damaged; take another file"
                ) from None
        if len(saved) != self.world:
            self.remark += f" (until now {len(saved)} in all; new processes have new random seeds)"


@contextlib.contextmanager
def group() -> Iterator[Ranks]:
    """The processes that torchrun started, joined; without it, this one alone.

    A `UserError` is printed once, however many processes raise it, and they exit with status 2. The loss of another
    process is reported in one line in the same way.
    """
    if _environment_integer("WORLD_SIZE", 1) == 1:
        yield Ranks()
        return
    ranks = _join()
    try:
        yield ranks
    except Exception as error:
        # The group is not destroyed, since that would wait for the others, which wait for this process: its exit
        # closes the connections.
        lost = _is_lost_connection(error)
        message = f"{LOST_PROCESS}; {ranks.saved}" if lost else str(error)
        if not (lost or isinstance(error, UserError)):
            raise
        if ranks.first_to_say(message):
            print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    dist.destroy_process_group()


def _join() -> Ranks:
    """Make the process group: NCCL for what is on GPUs, Gloo for the rest."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"run{next(_group_numbers)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot join the other processes: {reason}; start train.py with torchrun, or alone") from None
    return Ranks(rank, world, _environment_integer("LOCAL_RANK", 0), _environment_integer("LOCAL_WORLD_SIZE", 1), store)


def _environment_integer(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def _is_lost_connection(error: Exception) -> bool:
    """Whether ``error`` means that another process is gone; Gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _buffers(method: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers, on the CPU."""
    parameters = dict(method.named_parameters())
    return {key: value.cpu() for key, value in method.state_dict().items() if key not in parameters}
