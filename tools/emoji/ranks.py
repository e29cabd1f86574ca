"""One process a GPU: which rank this one is, its device, and the few things ranks tell each other."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the checkpoints and the log."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """Return rank 0's `value` on every rank."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared.item())

    def leave(self) -> None:
        """Wait for the others and close the process group."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


def join() -> Ranks:
    """Join the process group that torchrun describes, or stand alone where there is none."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Ranks(rank=int(os.environ.get("RANK", "0")), world=world, device=device)


def say(ranks: Ranks, text: str) -> None:
    """Print `text` at once, on rank 0 alone."""
    if ranks.first:
        print(text, flush=True)
