"""What a run needs, in closed form and before anything is rented: bytes on a rank and FLOP of a cycle.

Nothing is executed. Each part counts the tensors that autograd keeps and those beside them at the worst
moment of its backward; benchmarks/cost.py and a test hold it against the live tensors of train.py's updates.
Units are bytes and FLOP (a multiply-add is two). Not counted: the allocator's fragments, workspaces of cuDNN
and NCCL, the CUDA context. `b` is the size of a compute element (bf16 2, fp32 4), B the samples at once.
"""

import math
from typing import NamedTuple

import torch

import model
import raft
import vae
from discriminator import MotionDiscriminator

FP32, GIB = 4, 2**30
RAFT_OF = {"toy": "toy", "wan1.3b": "large", "wan14b": "large"}


class Part(NamedTuple):
    """A network on a micro-batch."""
    forward: float      # FLOP
    backward: float     # FLOP, recomputation included
    kept: float         # bytes that autograd keeps from forward to backward
    work: float         # bytes beside those at the worst moment of its backward
    passing: float = 0  # bytes at the worst moment of a forward without gradient


def dit(cfg, B, tokens, b, remat, train=True, layers=None):
    """A WanDiT on B samples of so many tokens. remat: blocks recompute; train: weights take gradients too."""
    layers, n, D, F = layers or cfg.layers, B * tokens, cfg.dim, cfg.ffn_dim
    linear = layers * n * 2 * (6 * D * D + 2 * D * F)         # q k v o, across q o, two of the MLP
    attention = layers * n * 4 * D * (tokens + cfg.text_len)
    text = B * cfg.text_len * 2 * (2 * layers * D * D + cfg.text_dim * D + D * D)  # across k v; the embedding
    ends = n * 2 * 2 * math.prod(cfg.patch) * cfg.in_dim * D  # patches in, head out
    # What a block keeps, in bytes for each of n D elements. fp32: the stream at three norms, inputs of three
    # RMS norms. Compute: q, k, v and output of self-attention, q and output across, the GELU's input.
    kept = 6 * FP32 + (6 + F / D) * b
    work = FP32 + 2 * F / D * b                               # gradients: stream, behind and before the GELU
    if train:  # also two norms' outputs (for the scales), inputs of three linears, three normed q or k, two
        # outputs that are gated, the GELU's output; and the gradient of a matrix of the MLP
        kept += 2 * FP32 + (8 + F / D) * b
        work = max(FP32 + F / D * b, 3 * FP32) + FP32 * F / n
    again = linear + attention - layers * n * 2 * D * F       # the MLP's output is not computed again
    backward = (1 + train) * (linear + ends) + train * 2 * text + 2.5 * attention
    backward += remat * (again + train * text)
    if remat:  # a block keeps its input and, for its gate's gradient, the MLP's output
        inside, kept = kept, FP32 + train * b
        work += inside - kept
    time = train * (b < FP32) * FP32 * (cfg.freq_dim + 7 * D) * D  # matrices of the time path, which computes in fp32
    return Part(linear + attention + text + ends, backward, layers * kept * n * D + time, work * n * D)


def discriminator(cfg, depth, taps, B, tokens, b, remat, train=True):
    """The DiT's first blocks on B clips of motion latents, and heads in fp32."""
    trunk, u = dit(cfg, B, tokens, b, remat, train, depth), B * tokens * cfg.dim
    head = 2 * 2 * u * cfg.dim                                # k and v; the single query is nothing
    # A head keeps k before and after its norm and v; for weight gradients also their input and the normed k.
    # The last head's are gone when the blocks' backward begins.
    held = (5 if train else 3) * FP32 * u
    return Part(trunk.forward + len(taps) * head, trunk.backward + len(taps) * (1 + train) * head,
                trunk.kept + len(taps) * held, max(trunk.work - held, 4 * FP32 * u))


class Layer(NamedTuple):
    """A layer of the VAE in one pass."""
    flop: float
    state: float        # bytes handed to the next pass
    kept: float         # bytes for backward: what enters a norm
    work: float         # bytes of gradients at the worst moment of its backward
    passing: float      # bytes at the worst moment without a gradient, when two frames go through at a time
    spared: float = 0   # FLOP that the forward spares: of neighbouring outputs' six temporal taps it computes four
    handed: float = 0   # bytes of all its frames, where the frame rate changes


def vae_layers(cfg, decoder, latents, first, B, h, w, b):
    """Every layer of the frozen VAE for a pass of so many latents; first: for a clip's single first frame."""
    dims = [cfg.dim * m for m in cfg.dim_mult]
    T, area, taps = (1 if decoder else 4) * latents, (1 if decoder else 64) * h * w, 27
    if first:  # before it all is zero: one temporal tap, no resampling in time
        T, taps = 1, 9

    def conv(C, O, taps=taps):  # FLOP; bytes of the state, and of the input behind two past frames
        return 2 * taps * C * O * B * T * area, 2 * b * C * B * area, b * C * B * (T + 2) * area

    def part():  # of a pass that goes through at a time without a gradient
        return min(T, 2) / T

    def spare(flop):
        return flop / 3 * (b == FP32 and T > 1 and not first)

    def res(C, O):
        x, y, skip = b * B * C * T * area, b * B * O * T * area, (C != O) * 2 * C * O * B * T * area
        (f1, s1, _), (f2, s2, in2) = conv(C, O), conv(O, O)
        kept = x + y + 2 * b * B * T * area                   # its input, the first convolution's output, their lengths
        work = 2 * y + in2                                    # at the last convolution
        passing = (x + y) * part() + b * O * B * (2 + min(T, 2)) * area
        return Layer(f1 + f2 + skip, s1 + s2, kept, work, passing, spare(f1 + f2))

    def attention(C):
        x = b * B * C * T * area
        return Layer(8 * C * C * B * T * area + 4 * C * B * T * area**2, 0, 6 * x, 4 * x, 6 * x * part())

    def up(C, temporal):
        nonlocal T, area
        x, flop, state, spared = b * B * C * T * area, 0, 0, 0
        if temporal and not first:
            flop, state, _ = conv(C, 2 * C, taps=3)
            spared, T, x = spare(flop), 2 * T, 2 * x
        elif temporal:
            state = 2 * x
        flop += 2 * 16 * C * (C // 2) * B * T * area
        area *= 4
        passing = 5 * x * (min(T, 4) / T if temporal else part())            # what it gives is twice x
        return Layer(flop, state, 0, 3 * x, passing, spared, 2 * x * temporal)

    def down(C, temporal):
        nonlocal T, area
        x, flop, state = b * B * C * T * area, 2 * 9 * C * C * B * T * area / 4, 0
        area, small = area / 4, x / 4
        if temporal:
            state, T = b * B * C * area, T if first else T / 2
            flop += (not first) * 2 * 3 * C * C * B * T * area
        passing = 2 * x * min(T, 2) / T
        return Layer(flop, state, 0, x + small, passing, 0, small * temporal)

    def end(C, O, normed):
        flop, state, entered = conv(C, O)
        x = b * B * C * T * area
        kept = normed * (x + b * B * T * area)
        return Layer(flop, state, kept, entered, (x + entered) * part(), spare(flop))

    middle = lambda: [res(dims[-1], dims[-1]), attention(dims[-1]), res(dims[-1], dims[-1])]
    C = dims[-1] if decoder else cfg.dim
    yield end(cfg.z_dim if decoder else 3, C, False)
    if decoder:
        yield from middle()
    for i in range(len(dims)):
        O = dims[-1 - i] if decoder else dims[i]
        for j in range(cfg.res_blocks + decoder):
            yield res(C, O)
            C = O
        if i < len(cfg.temporal_down):
            yield up(C, cfg.temporal_down[-1 - i]) if decoder else down(C, cfg.temporal_down[i])
            C = C // 2 if decoder else C
    if not decoder:
        yield from middle()
    yield end(C, 3 if decoder else 2 * cfg.z_dim, True)


def coder(cfg, decoder, latents, B, h, w, b, per_pass, remat, first):
    """The frozen VAE's decoder, or encoder, over so many latents. first: a clip starts with them."""
    layers = list(vae_layers(cfg, decoder, per_pass, False, B, h, w, b))
    opening = list(vae_layers(cfg, decoder, per_pass, True, B, h, w, b)) if first else []
    passes = (latents - first) / per_pass

    def over(field):  # the sum over layers and passes
        return passes * sum(getattr(x, field) for x in layers) + sum(getattr(x, field) for x in opening)

    flop, state = over("flop"), sum(x.state for x in layers)
    forward = flop - over("spared")
    kept = passes * state if remat else over("kept")
    # A pass works from its last layer to its first: what lies behind is freed, what lies ahead is kept.
    ahead, work = 0, 0
    for layer in layers:
        work = max(work, remat * (ahead + layer.kept) + layer.work)
        ahead += layer.kept
    if remat:  # a recomputed pass makes its state anew
        work = max(work, ahead + state)
    passing = state + max(layer.passing for layer in layers) + max(layer.handed for layer in layers)
    return Part(forward, flop + remat * forward, kept, work, passing)


def flow(cfg, B, frames, H, W, iters, group):
    """The frozen RAFT between the frames of B clips, in fp32."""
    cells, pairs, taps = H * W / cfg.stride**2, B * (frames - 1), sum(kh * kw for kh, kw in cfg.gru_kernels)
    D, hidden, context, motion = cfg.fnet_dim, cfg.hidden, cfg.context, cfg.motion

    def encoder(out, normed):  # FLOP and bytes kept of a frame: what enters a norm, what leaves a ReLU
        area, C = H * W / cfg.strides[0]**2, cfg.widths[0]
        flop, kept = 2 * 49 * 3 * C * area, (1 + normed) * C * area
        for width, stride in zip(cfg.widths, cfg.strides[1:]):
            for step in [stride] + [1] * (cfg.blocks - 1):
                wide, area = area, area / step**2
                mid = width // 4
                convs = [(C, width, 9, area), (width, width, 9, area)]
                if cfg.bottleneck:
                    convs = [(C, mid, 1, wide), (mid, mid, 9, area), (mid, width, 1, area)]
                flop += sum(2 * taps * a * c * at for a, c, taps, at in convs)
                kept += sum((1 + normed) * c * at for _, c, _, at in convs) + width * area
                if step != 1 or C != width:
                    flop, kept = flop + 2 * C * width * area, kept + normed * width * area
                C = width
        return flop + 2 * C * out * area, FP32 * kept

    (flop_f, kept_f), (flop_c, kept_c) = encoder(D, True), encoder(hidden + context, cfg.context_norm)
    pyramid = FP32 * cells**2 * sum(0.25**level for level in range(cfg.levels))
    looked = cfg.levels * (2 * cfg.radius + 1)**2
    corr, flows = [looked, *cfg.corr_dims], cfg.flow_dims
    # FLOP of a pair: matching and the context's share once; an iteration's part with and without a gradient.
    once = 2 * D * pyramid / FP32 + 2 * cells * taps * context * 3 * hidden
    graph = 2 * cells * (corr[0] * corr[1] + (9 * corr[1] * corr[2] if len(corr) > 2 else 0)
                         + 9 * (corr[-1] + flows[1]) * (motion - 2) + taps * (hidden + motion) * 3 * hidden)
    loose = 2 * cells * (49 * 2 * flows[0] + 9 * flows[0] * flows[1])  # of the flow before, which is detached
    head = 2 * cells * 9 * (hidden + 2) * cfg.head_dim        # only the last one's has a gradient
    mask = 2 * cells * (9 * hidden + 9 * cfg.stride**2) * cfg.mask_dim
    pair, back = once + iters * (graph + loose + head) + mask, 2 * once + iters * graph + head + mask
    # Bytes of a pair: an iteration keeps coordinates, what it looked up, each convolution's input and ReLU,
    # and of a GRU the two inputs, the gates, tanh and the new state.
    step = FP32 * cells * (3 * looked + sum(cfg.corr_dims) + corr[-1] + flows[1] + 2 * motion
                           + len(cfg.gru_kernels) * (2 * (hidden + motion) + 4 * hidden))
    up = FP32 * cells * (cfg.mask_dim + 9 * cfg.stride**2)
    match = pyramid + FP32 * cells * (2 * D + hidden + context) + iters * step + up
    grads = max(1.75 * pyramid - step, 3 * up)                # of two lookups; or of the upsampling
    stem = 3 * FP32 * cfg.widths[0] * H * W / cfg.strides[0]**2  # three of its outputs, the widest there are
    pieces = (B * frames, kept_f, stem), (pairs, kept_c, stem), (pairs, match, grads)
    features = FP32 * cells * (B * frames * D + pairs * (hidden + context))
    kept, work = features + (B > 1) * 2 * FP32 * cells * pairs * D, 0  # of several clips, pairs are copies
    for count, held, extra in pieces:
        kept += count * held * (count <= group)
        work = max(work, count * extra if count <= group else group * (held + extra))
    forward, again = (B * frames * flop_f, pairs * flop_c, pairs * pair), (B * frames, pairs, pairs)
    backward = B * frames * flop_f + pairs * (flop_c + back)
    backward += sum(flop for flop, count in zip(forward, again) if count > group)
    passing = features + max(min(group, B * frames) * stem, min(group, pairs) * (pyramid + step))
    return Part(sum(forward), backward, kept, work, passing)


def updates(cfg, dit_cfg, vae_cfg, raft_cfg, b, samples):
    """{update: (FLOP of a sample, peak bytes of activations)}; samples: a rank's share of the batch."""
    B, f, h, w = cfg.micro_batch, 1 + (cfg.frames - 1) // 4, cfg.height // 8, cfg.width // 8
    seen = f if cfg.latent_gan else cfg.window + 1
    tokens, motion_tokens = f * h * w // 4, seen * h * w // 4
    net = dit(dit_cfg, B, tokens, b, cfg.checkpointing)
    z = FP32 * B * dit_cfg.in_dim * f * h * w                 # a latent clip
    pixels = FP32 * B * (1 + 4 * cfg.window) * cfg.height * cfg.width  # a channel of a window
    noise, rollouts = (len(cfg.timesteps) + 1) * z, cfg.fake_steps * math.ceil(samples / B) * z
    rollout = (len(cfg.timesteps) - 1) / 2 * net.forward      # what precedes the returned call, on average
    start = 0 if cfg.window_start == "first" else (f - 1 - cfg.window) / 2  # on average

    def vae_of(decoder, latents, B, first):
        return coder(vae_cfg, decoder, latents, B, h, w, b, cfg.latents_per_pass, cfg.remat, first)

    decode = vae_of(True, cfg.window + (start == 0), B, start == 0)
    before = vae_of(True, start + 1, B, True).forward if start else 0  # latents that only make the state
    encode = vae_of(False, cfg.window + 1, B, True)
    flows = flow(raft_cfg, B, 1 + 4 * cfg.window, cfg.height, cfg.width, cfg.raft_iters, cfg.raft_group)
    judge = discriminator(dit_cfg, cfg.depth, cfg.taps, B, motion_tokens, b, cfg.checkpointing, False)
    # Channels in fp32: the clip, the flow, its length, two factors and o; o as the encoder takes it.
    flows = flows._replace(kept=flows.kept + 11 * pixels)
    encode = encode._replace(kept=encode.kept + 3 * b / FP32 * pixels)
    tower = [net, judge] if cfg.latent_gan else [net, decode, flows, encode, judge]
    out = {}
    if not cfg.no_dmd:  # the final call has a gradient; teacher twice and fake score have none
        out["generator, DMD"] = rollout + 4 * net.forward + net.backward, noise + 5 * z + net.kept + net.work
    fake = (0, 0) if cfg.no_dmd else (net.forward + net.backward, net.kept + net.work)
    out["fake score"] = cfg.fake_steps * (rollout + net.forward + fake[0]), rollouts + noise + 2 * z + fake[1]
    peak, kept = 0, 0
    for part in tower:  # its backward comes while all before it is kept
        kept += part.kept
        peak = max(peak, kept + part.work)
    flop = rollout + sum(part.forward + part.backward for part in tower) + (not cfg.latent_gan) * before
    out["generator, flow GAN"] = flop, rollouts + noise + peak
    # The discriminator sees real and generated, each once more with noise; what leads to it has no gradient.
    inputs, both = (2 if cfg.no_r else 4) * B, vae_of(False, cfg.window + 1, 2 * B, True)
    judge = discriminator(dit_cfg, cfg.depth, cfg.taps, inputs, motion_tokens, b, cfg.checkpointing)
    flop, peak = judge.forward + judge.backward, judge.kept + judge.work
    if cfg.latent_gan:
        encode = vae_of(False, f, B, True)
        flop, peak = flop + encode.forward, max(peak, 3 * FP32 * B * cfg.frames * 64 * h * w + encode.passing)
    else:
        flop += before + decode.forward + 2 * flows.forward
        flop += both.forward * (1 + (cfg.r_space == "pixel" and not cfg.no_r))
        flop += cfg.real_roundtrip * sum(vae_of(x, cfg.window + 1, B, True).forward for x in (False, True))
        # Channels: the clip and one motion while the other's flow is sought; both, and as the encoder takes them.
        peak = max(peak, 6 * pixels + flows.passing, 6 * (1 + b / FP32) * pixels + both.passing)
    out["discriminator"] = flop, rollouts + peak
    return {name: (flop / B, peak) for name, (flop, peak) in out.items()}


def resident(cfg, share, b):
    """{what: bytes} that a rank holds beside activations; `share` ranks hold one copy of the networks."""
    config = model.CONFIGS[cfg.preset]
    with torch.device("meta"):
        net, judge = model.WanDiT(config), MotionDiscriminator(config, cfg.depth, cfg.taps)
        frozen = vae.WanVAE(vae.CONFIGS[cfg.preset]), raft.RAFT(raft.CONFIGS[RAFT_OF[cfg.preset]])
    n, d, block, v, r = (sum(p.numel() for p in x.parameters()) for x in (net, judge, net.blocks[0], *frozen))
    # FSDP gathers a block ahead of the one at work and leaves the four roots gathered; in one piece that is all.
    unit, gathered = block, 2 * block + 4 * (n - len(net.blocks) * block)
    if not cfg.shard_blocks:
        unit, gathered = max(n, d), 3 * n + d
    return {
        f"weights, fp32: three of {n / 1e6:.0f} M, discriminator {d / 1e6:.0f} M": FP32 * (3 * n + d) / share,
        "AdamW's moments, fp32": 2 * FP32 * (2 * n + d + cfg.gan_optimizer * n) / share,
        "averaged generator, fp32": FP32 * n / share * (cfg.ema > 0),
        "gradients of one network, fp32": FP32 * max(n, d) / share,
        "gathered parameters and their gradients": b * gathered + (b + FP32) * unit,  # reduced in fp32
        "VAE and RAFT": b * v + FP32 * r,
    }


def plan(cfg, ranks, share):
    """For a preset: what a rank holds, peak bytes and TFLOP a cycle and rank of each update, and b."""
    # CHOICE: auto is bf16 for Wan even where there is no CUDA: nobody plans to train that on a CPU.
    cuda = cfg.preset != "toy" or torch.cuda.is_available()
    b = 2 if cfg.dtype == "bf16" or cfg.dtype == "auto" and cuda else 4
    samples = math.ceil(cfg.batch / ranks)
    clips = samples * math.ceil(cfg.discriminator_batch / cfg.batch)
    preset = model.CONFIGS[cfg.preset], vae.CONFIGS[cfg.preset], raft.CONFIGS[RAFT_OF[cfg.preset]]
    steps = updates(cfg, *preset, b, samples)
    tflop = {name: flop * (clips if name == "discriminator" else samples) / 1e12
             for name, (flop, _) in steps.items()}
    return resident(cfg, share, b), {name: peak for name, (_, peak) in steps.items()}, tflop, b


def report(cfg, ranks, share):
    """The lines of --dry_run."""
    held, peaks, tflop, b = plan(cfg, ranks, share)
    worst, cycle = max(peaks, key=peaks.get), sum(tflop.values())
    yield (f"a rank of {ranks}, the networks shared by {share}, compute in {'bf16' if b == 2 else 'fp32'}"
           f"{' (assumed)' if cfg.dtype == 'auto' else ''}, from formulas:")
    yield from (f"{size / GIB:9.2f} GiB  {name}" for name, size in held.items() if size)
    yield from (f"{peak / GIB:9.2f} GiB  activations of {name}, {tflop[name]:,.2f} TFLOP a cycle"
                for name, peak in peaks.items())
    yield (f"{(sum(held.values()) + peaks[worst]) / GIB:9.2f} GiB  at the peak, in {worst}; leave a tenth "
           "for the allocator")
    yield (f"{cycle:,.2f} TFLOP a cycle and rank, {cycle * ranks:,.2f} in all: {cfg.steps} cycles take "
           f"{cycle * cfg.steps / 400 / 3600:.3g} hours if a card sustains 400 TFLOP/s")
