"""What a run needs, before anything is rented: memory of a rank, work of a cycle, hours as a range.

    python cost.py --preset wan1.3b --ranks 16      # every flag of train.py, and --ranks: processes, one a card

Nothing here knows what a network computes: train.train() itself runs a cycle on the device "meta", whose tensors have
shapes and no numbers, and a dispatch mode sees every operator, the tensors it makes and when they go. What you change
in train.py or in a network is in the figures.

Extrapolated: one micro-batch of each update and one fake-score update are counted and multiplied (a test holds that
against a whole cycle). The sampler's exit and the window's start stand in the middle of their ranges, the average where
their number is odd. FSDP does not run: shards and gathered parameters follow from the networks' sizes, see `held`.
Not counted: fragments of the allocator, workspaces, the CUDA context; the time of collectives, launches, loading,
sample clips and checkpoints; with --no-dmd the rollouts of the discriminator's warm-up.
"""

import argparse
import math
import weakref
from collections import Counter, defaultdict
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import checkpoint
import model
import raft
import train
import vae
from cli import expect, one_line

# ASSUMPTIONS, which no measurement of this code has confirmed: what an H100 or H200 sustains, slow and fast, TFLOP/s;
# TB/s of "memory". NVIDIA's data sheet, H100 SXM, dense: bf16 989, TF32 495, fp32 67 TFLOP/s, 3.35 TB/s (H200: 4.8).
RATES = {
    "matmul": (500, 700),        # bf16 matrix products: what large ones reach, 50 to 70 % of the data sheet
    "attention": (300, 500),     # FlashAttention-2 reaches 350, -3 up to 740 forward (arXiv 2407.08608), less backward
    "conv": (80, 200),           # bf16, the VAE's: a guess, nothing is published for such shapes
    "fp32 matmul": (30, 50),     # without tensor cores, torch's default: the discriminator's heads, RAFT's correlation
    "fp32 conv": (40, 120),      # TF32, torch's default: RAFT's; a guess
    "memory": (1.7, 2.7),        # what all other operators read and write: norms, sums, copies, lookups; 50 to 80 %
}
CARDS, SPARE = (24, 48, 80, 141), 0.1  # GiB; the share of a card that is left for what is not counted
NODE = 8                               # cards that share a copy of the networks, unless --shard says otherwise
UPDATES = {"dmd": "generator, DMD", "fake": "fake score", "gan_g": "generator, flow GAN", "gan_d": "discriminator"}
PHASES = {"fake_warmup": ("fake",), "dmd_warmup": ("dmd", "fake"), "discriminator_warmup": ("fake", "gan_d"),
          "cycles": tuple(UPDATES)}    # the field of Config with their number: the updates of a cycle
GIB, FP32 = 2**30, 4

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu  # fused attention; meta would choose the plain product
FLASH_BACK = aten._scaled_dot_product_flash_attention_for_cpu_backward
CONVOLUTIONS = aten.convolution, aten.convolution_backward
FLOP = {**flop_registry,
        FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
        FLASH_BACK: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)}


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def signature(x):
    """All of an argument that decides what an operator makes, hashable."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.is_meta
    return tuple(map(signature, x)) if isinstance(x, (list, tuple)) else (type(x), x)


def tensors(x):
    """The tensors among an operator's arguments or results."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in tensors(y)] if isinstance(x, (list, tuple)) else []


def kind_and_amount(func, args, kwargs, out):
    """An operator's kind in RATES, and its FLOP or the bytes that it reads and writes."""
    packet, inputs = func._overloadpacket, tensors([*args, *kwargs.values()])
    if packet in FLOP:
        wide = "fp32 " * (inputs[0].itemsize == FP32)
        kind = "attention" if "attention" in func.name() else wide + ("conv" if packet in CONVOLUTIONS else "matmul")
        return kind, FLOP[packet](*args, **kwargs, out_val=out)
    touched = [] if "empty" in func.name() else [*inputs, *tensors(out)]
    return "memory", sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in touched)  # less where it is expanded


def maker(func, x, given):
    """What makes the result x of an operator once more, on meta; given: the arguments, of which it may be one."""
    if not isinstance(x, torch.Tensor):
        return lambda given: x
    places = [i for i, argument in enumerate(given) if argument is x]
    if places:  # it works in place
        return lambda given: given[places[0]]  # never x itself, which would stay alive
    shape, stride, dtype = x.shape, x.stride(), x.dtype
    clips = [t for t in tensors(given) if t.ndim == 5] if func._overloadpacket in CONVOLUTIONS else []
    if x.ndim == 5 and any(t.stride(1) == 1 for t in clips):  # channels last, which a 3-D convolution forgets on meta
        stride = torch.empty(shape, device="meta", memory_format=torch.channels_last_3d).stride()
    return lambda given: torch.empty_strided(shape, stride, dtype=dtype, device="meta")


class Count(TorchDispatchMode):
    """While it is on: bytes of the live tensors that operators made, `now` and at their `peak`, and `work` by kind.

    Of each signature of meta tensors an operator runs once: torch's shape functions would take most of the time.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.work, self.alive, self.known = 0, 0, Counter(), {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view or torch.Tag.inplace_view in func.tags or func is aten._unsafe_view.default:
            return func(*args, **kwargs)
        given, key = [*args, *kwargs.values()], (func, signature(args), signature(tuple(kwargs.items())))
        if key not in self.known:
            out = func(*args, **kwargs)
            work, several = kind_and_amount(func, args, kwargs, out), isinstance(out, (list, tuple))
            if all(x.is_meta for x in tensors(out)):
                self.known[key] = work, [maker(func, x, given) for x in (out if several else [out])], several
        if key in self.known:
            work, makers, several = self.known[key]
            out = tuple(make(given) for make in makers) if several else makers[0](given)
        self.work[work[0]] += work[1]
        for x in tensors(out):
            self.see(x.untyped_storage())
        return out

    def see(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes(), weakref.ref(storage, lambda _: self.gone(key))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def gone(self, key):
        self.now -= self.alive.pop(key)[0]


def without_files(cfg, device="cpu"):
    """What train.py reads from files, by the names it knows it under: random networks, contexts and clips."""
    dit, flow = model.CONFIGS[cfg.preset], raft.CONFIGS["toy" if cfg.preset == "toy" else "large"]

    def random_dit(*_, **__):
        net = model.WanDiT(dit).init_weights()
        torch.nn.init.normal_(net.head.head.weight, std=0.02)  # it starts at zero: no gradient would pass
        return net

    def random_clips(videos, keys, frames, size, *_):
        return ((torch.randint(256, (len(key), 3, frames, *size), dtype=torch.uint8, device=device),
                 torch.ones(len(key))) for key in keys)

    return {
        "load_dit": random_dit, "load_vae": lambda _: vae.WanVAE(vae.CONFIGS[cfg.preset]).requires_grad_(False),
        "load_raft": lambda _: raft.RAFT(flow).requires_grad_(False), "find_weights": lambda *_: None,
        "encode_prompts": lambda *_: lambda texts: torch.randn(len(texts), dit.text_len, dit.text_dim),
        "read_prompts": lambda _: [""], "real_clips": random_clips}


def counted(cfg, device="meta"):
    """One cycle of train.train(cfg), its warm-ups left out: (networks, optimizers, VAE and RAFT, updates).

    updates: [(key of UPDATES, peak bytes of activations, work by kind)], in the order of the cycle. On another device
    than meta the networks are random and everything is computed.
    """
    cfg = replace(cfg, fake_warmup=0, dmd_warmup=0, discriminator_warmup=0, cycles=1, samples=0)
    count, nets, loaded, optimizers, updates, base = Count(), [], [], [], [], []
    load_networks, mocked = train.load_networks, mock.MagicMock

    def adamw(*_, **__):
        optimizers.append(mocked(state=defaultdict(dict)))
        return optimizers[-1]

    def load(cfg):
        with torch.device(device):
            loaded.extend(load_networks(cfg))
        return loaded

    def shard(net, mesh, dtype, cfg):
        nets.append(net)
        net.reshard = lambda: None
        trunk = getattr(net, "trunk", net).to(dtype)
        for block in trunk.blocks:
            block.checkpointing = cfg.checkpointing
        for p in net.parameters():
            if p.requires_grad:  # a gradient is no activation: it goes as soon as it is complete
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def begin(*_):
        base[:], count.peak = (count.now, Counter(count.work)), count.now
        return mocked()

    def global_means(sums):
        updates.append((next(iter(sums)), count.peak - base[0], count.work - base[1]))
        base[1], count.peak = Counter(count.work), count.now
        return dict.fromkeys(sums, 0.0)

    stand_ins = {
        **without_files(cfg, device), "load_networks": load, "shard": shard, "global_means": global_means,
        "print0": mocked(),
        "setup": lambda *_, **__: (torch.device(device), None), "tqdm": lambda cycles, **_: cycles,
        "checkpoint": mocked(start_of=lambda *_: 0, live_state=checkpoint.live_state, Log=begin)}
    stand_ins = {name: value for name, value in stand_ins.items() if hasattr(train, name)}  # a hack may do without
    with (mock.patch.multiple(train, **stand_ins), mock.patch.object(torch.optim, "AdamW", adamw),
          mock.patch.object(torch.nn.utils, "clip_grad_norm_"),
          mock.patch.object(train.Draw, "choice", lambda _, what, options: options // 2),
          mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **how: FLASH(q, k, v, **how)[0]),
          mock.patch.dict("os.environ", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"), count):
        train.train(cfg)
    return nets, optimizers, [net for net in loaded if net not in nets], updates


# ---------------------------------------------------------------------------------------------------------------------
# A run


def numel(net, trainable=False):
    return sum(p.numel() for p in net.parameters() if p.requires_grad or not trainable)


def held(cfg, share, nets, optimizers, frozen):
    """{what: bytes} that a rank holds beside activations; `share` ranks hold one copy of the networks."""
    trunks = [getattr(net, "trunk", net) for net in nets]
    # FSDP gathers a block ahead of the one at work and leaves the roots gathered; in one piece that is everything.
    unit = max(numel(trunk.blocks[0]) for trunk in trunks)
    gathered = 2 * unit + sum(numel(trunk) - sum(map(numel, trunk.blocks)) for trunk in trunks)
    if cfg.shard == 1:
        unit, gathered = max(map(numel, nets)), sum(map(numel, nets))
    b = trunks[0].patch_embedding.weight.itemsize  # of a parameter as it computes
    moments = sum(t.numel() for o in optimizers for slots in o.state.values() for t in slots.values())
    sizes = " + ".join(f"{numel(net) / 1e6:.0f} M" for net in nets)
    trained = sum(numel(net, True) for net in nets)
    return {
        f"weights, frozen as they compute, else fp32: {sizes}":
            (FP32 * trained + b * (sum(map(numel, nets)) - trained)) / share,
        "AdamW's moments, fp32": FP32 * moments / share,
        "averaged generator, fp32": FP32 * numel(nets[0]) / share * (cfg.ema > 0),
        "gradients of one network, fp32": FP32 * max(numel(net, True) for net in nets) / share,
        "gathered parameters and their gradients": b * gathered + (b + FP32) * unit,  # reduced in fp32
        "VAE and RAFT": sum(p.nbytes for net in frozen for p in net.parameters()),
    }


def plan(cfg, ranks, share):
    """What a rank holds, {what: bytes}; of each update its peak of activations, bytes, and its work a cycle by kind."""
    each = math.ceil(cfg.batch / ranks)  # samples of a rank in an update
    B, clips = min(cfg.micro_batch, each), each * math.ceil(cfg.discriminator_batch / cfg.batch)
    # Without DMD nothing parts the rollouts of update 2 from update 3: they are counted there, all of them.
    fakes = cfg.fake_updates if cfg.dmd else 1
    one = replace(cfg, batch=B, micro_batch=B, discriminator_batch=B, fake_updates=cfg.fake_updates // fakes)
    nets, optimizers, frozen, updates = counted(one)
    z0 = FP32 * B * nets[0].cfg.in_dim * (1 + cfg.frames // 4) * (cfg.height // 8) * (cfg.width // 8)
    waiting = (cfg.fake_updates * math.ceil(each / B) - one.fake_updates) * z0  # rollouts, for the discriminator
    peaks, work = {}, {}
    for key, peak, done in updates:
        times = {"fake": each * fakes, "gan_d": clips}.get(key, each) / B
        peaks[key] = peak + waiting * (key != "dmd")
        work[key] = Counter({kind: amount * times for kind, amount in done.items()})
    return held(cfg, share, nets, optimizers, frozen), peaks, work


def hours(work, cycles):
    """(fast, slow) of so many cycles of this work, by RATES."""
    return [cycles / 3600 * sum(amount / 1e12 / RATES[kind][i] for kind, amount in work.items()) for i in (1, 0)]


def short(x):
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def report(cfg, ranks, share):
    """The lines that main prints."""
    parts, peaks, work = plan(cfg, ranks, share)
    worst = max(peaks, key=peaks.get)
    peak = (sum(parts.values()) + peaks[worst]) / GIB
    fits = ", ".join(f"{card} GB" for card in CARDS if peak <= card * (1 - SPARE)) or f"more than {CARDS[-1]} GB"
    yield (f"{cfg.preset}, {cfg.frames} frames {cfg.height}x{cfg.width}, {cfg.dtype}; a rank of {ranks}, "
           f"{share} to a copy of the networks")
    yield from (f"{size / GIB:8.2f} GiB  {what}" for what, size in parts.items() if size)
    yield from (f"{size / GIB:8.2f} GiB  activations, {UPDATES[key]}" for key, size in peaks.items())
    yield f"{peak:8.2f} GiB  at the peak, {UPDATES[worst]}; with a tenth to spare: cards of {fits}"
    yield f"{'TFLOP, memory TB, a cycle':26}" + "".join(f"{kind:>12}" for kind in RATES) + f"{'seconds':>20}"
    for key, done in [*work.items(), ("all", sum(work.values(), Counter()))]:
        times = " to ".join(short(3600 * x) for x in hours(done, 1))
        amounts = "".join(f"{short(done[kind] / 1e12):>12}" for kind in RATES)
        yield f"{UPDATES.get(key, key):26}{amounts}{times:>20}"
    for phase, keys in PHASES.items():
        cycles, done = getattr(cfg, phase), sum((work[key] for key in keys if key in work), Counter())
        if cycles and cfg.preset != "toy":  # which launches and loading pace, not these rates
            fast, slow = hours(done, cycles)
            yield (f"{cycles} {phase.replace('_', ' ')}: {short(fast)} to {short(slow)} hours, "
                   f"{short(fast * ranks)} to {short(slow * ranks)} card-hours at the rates that cost.py assumes")


def main(argv=None):
    with one_line("cost.py"):
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--ranks", type=int, default=1)
        own, flags = parser.parse_known_args(argv)
        cfg = train.parse_flags(flags)
        share = cfg.shard or min(own.ranks, NODE)
        expect(own.ranks > 0 and own.ranks % share == 0, f"--ranks that --shard {share} divides", own.ranks)
        # CHOICE: auto is bf16 for Wan even where there is no CUDA: nobody plans to train that on a CPU.
        dtype = ("fp32" if cfg.preset == "toy" else "bf16") if cfg.dtype == "auto" else cfg.dtype
        print(*report(replace(cfg, dtype=dtype), own.ranks, share), sep="\n")


if __name__ == "__main__":
    main()
