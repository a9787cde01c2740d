"""A world of ranks in which test_distributed_scion.py trains small modules of odd shapes: RANKS FOLDER DEVICE.

What came of it is FOLDER/RANK.pt. The ranks meet by a file in the folder, and are forked when everything is imported, which takes longest.
"""

import multiprocessing
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from etastar.model.decoder import Decoder
from etastar.optim.distributed_scion import ScionOptimizer, scion_groups
from etastar.recipe import SP, Model

STEPS, VOCAB, LIMIT_SECONDS = 20, 101, 120
PLAIN = {"lr": 0.02, "momentum": 0.1, "weight_decay": 0.1}


class Odd(nn.Module):
    """Next-token logits through matrices that no number of ranks divides, one of fewer rows than ranks, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.norm, self.down = nn.Embedding(VOCAB, 37), nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 37)
        self.few, self.back, self.wide, self.flat = nn.Linear(37, 3), nn.Linear(3, 37), nn.Linear(37, 64), nn.Linear(64, 5)
        self.rise, self.fused, self.join, self.spare = nn.Linear(5, 37), nn.Linear(37, 21), nn.Linear(21, 37), nn.Linear(37, 11)
        self.head = nn.Linear(37, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.table(tokens)
        for inner, outer in ((self.few, self.back), (self.fused, self.join)):
            x = x + outer(inner(x).tanh())
        x = x + self.down(self.norm(self.up(x)).tanh())
        return self.head(x + self.rise(self.flat(self.wide(x).tanh()).tanh()))


class Lone(nn.Module):
    """A single hidden matrix, for more ranks than matrices."""

    def __init__(self):
        super().__init__()
        self.table, self.map, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, VOCAB, bias=False)

    def forward(self, tokens):
        return self.head(self.map(self.table(tokens)).tanh())


class Even(nn.Module):
    """Four hidden matrices of 8 × 8 and nothing else that is trained: what travels can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, 8).requires_grad_(False), nn.Linear(8, VOCAB, bias=False).requires_grad_(False)
        self.maps = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))

    def forward(self, tokens):
        return self.head(self.maps(self.table(tokens)))


def decoder():
    return Decoder(Model(width=24, depth=2, head_dim=6, kv_heads=2, ffn_width=20, context=8, tied=False), VOCAB, SP())


MODULES = {"odd": Odd, "lone": Lone, "even": Even, "decoder": decoder}
CASES = {  # name: (way, module, options, type); "half" is on two of four ranks, the other two doing the same
    "ddp": ("ddp", "odd", PLAIN, torch.float32),
    "fsdp": ("fsdp", "odd", PLAIN, torch.float32),
    "fsdp float64": ("fsdp", "odd", PLAIN | {"dtype": torch.float64}, torch.float64),
    "half ddp": ("half ddp", "odd", PLAIN, torch.float32),
    "half fsdp": ("half fsdp", "odd", PLAIN, torch.float32),
    "hsdp": ("hsdp", "odd", PLAIN, torch.float32),
    "ddp lone, constrained": ("ddp", "lone", {"lr": 0.02, "weight_decay": 1.0, "radius": 2.0}, torch.float32),
    "fsdp lone, constrained": ("fsdp", "lone", {"lr": 0.02, "weight_decay": 1.0, "radius": 2.0}, torch.float32),
    "ddp bf16": ("ddp", "lone", PLAIN | {"dtype": torch.bfloat16}, torch.float32),
    "fsdp bf16": ("fsdp", "lone", PLAIN | {"dtype": torch.bfloat16}, torch.float32),
    "fsdp decoder": ("fsdp", "decoder", PLAIN, torch.float32),
    "ddp even": ("ddp", "even", PLAIN, torch.float32),
    "fsdp even": ("fsdp", "even", PLAIN, torch.float32),
}


def built(kind, dtype, device="cpu"):
    torch.manual_seed(0)
    return MODULES[kind]().to(device=device, dtype=dtype)


def groups(module):
    return scion_groups(module, splits={"fused": (7, 7, 7)} if any("fused" in name for name, _ in module.named_parameters()) else None)


def train(module, optimizer, rank=0, ranks=1, steps=range(STEPS), device="cpu"):
    """Every rank takes its share of a batch of 16 sequences of 8 tokens."""
    for step in steps:
        tokens = torch.randint(VOCAB, (16, 9), generator=torch.Generator().manual_seed(step))[rank::ranks].to(device)
        optimizer.zero_grad()
        F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def shared(way, module, meshes):
    """(module, rank, ranks, process group of the plain parameters) as the way has it."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = meshes["half" if way.startswith("half") else "all"]
    if way.endswith("ddp"):
        group = mesh.get_group()
        return DistributedDataParallel(module, process_group=group, find_unused_parameters=True), mesh.get_local_rank(), mesh.size(), group
    fully_shard(module, mesh=meshes["both"] if way == "hsdp" else mesh)
    return module, mesh.get_local_rank(), mesh.size(), mesh.get_group()


def outcome(name, meshes, device):
    """(parameters as they are in one process, bytes) of one case; the optimizer is another, from the state of the first, halfway."""
    way, kind, options, dtype = CASES[name]
    module, rank, ranks, group = shared(way, built(kind, dtype, device), meshes)
    first = ScionOptimizer(groups(module), process_group=group, **options)
    train(module, first, rank, ranks, range(STEPS // 2), device)
    second = ScionOptimizer(groups(module), process_group=group, **options | {"lr": 9.0, "momentum": 0.9})
    second.load_state_dict(first.state_dict())
    train(module, second, rank, ranks, range(STEPS // 2, STEPS), device)
    whole = {name.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in module.named_parameters()}
    moved = {kind: dict(count) for kind, count in second.communicated_bytes.items()}
    return {name: p.detach().cpu().clone() for name, p in whole.items()}, moved


def refusals(rank, meshes, device):
    """What each rank is told where they do not agree, and where rows are torn."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    told = {}
    for what, (options, width, bias) in {"options": ({"radius": 2.0}, 6, True), "shapes": ({}, 7, True), "names": ({}, 6, False)}.items():
        module = (nn.Linear(width, 6, bias) if rank == 1 else nn.Linear(6, 6)).to(device)
        optimizer = ScionOptimizer(scion_groups(module), lr=0.1, **options if rank == 1 else {})
        told[what] = said(optimizer.step)
    torn = nn.Linear(8, 8, bias=False).to(device)
    fully_shard(torn, mesh=meshes["all"], shard_placement_fn=lambda p: Shard(1))
    told["torn"] = said(lambda: ScionOptimizer(scion_groups(torn), lr=0.1))
    return told


def said(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def work(rank, ranks, folder, device):
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group({"cpu": "gloo", "cuda": "nccl"}[device], init_method=f"file://{folder}/meet", rank=rank, world_size=ranks,
                            timeout=timedelta(seconds=60))
    meshes = {"all": init_device_mesh(device, (ranks,))}
    if ranks == 4:
        meshes["both"] = init_device_mesh(device, (2, 2), mesh_dim_names=("copies", "rows"))
        meshes["half"] = meshes["both"]["rows"]
    names = [name for name, (way, *_) in CASES.items() if ranks == 4 or not way.startswith(("half", "hsdp"))]
    found = {name: outcome(name, meshes, device) for name in names}
    torch.save({"cases": found, "refusals": refusals(rank, meshes, device)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main(ranks, folder, device):
    import torch.distributed.fsdp  # noqa: F401

    world = [multiprocessing.get_context("fork").Process(target=work, args=(rank, ranks, folder, device)) for rank in range(ranks)]
    for process in world:
        process.start()
    for process in world:
        process.join(LIMIT_SECONDS)
        process.terminate()
        process.join()
    return max(abs(process.exitcode or 0) for process in world)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
