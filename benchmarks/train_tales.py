#!/usr/bin/env python3
"""Train a small Llama-architecture language model on gzipped JSONL text and export it in Hugging Face form.

How assets/tales7m was made; see docs/training-tales.md.

    python train_tales.py --data corpus --out tales7m --minutes 50
    python train_tales.py ... --device cuda --hidden 512 --layers 12 --heads 8 --kv-heads 8 --inter 1376 --batch 64

Needs torch. Reads <data>/train_books.jsonl.gz, train_stories.jsonl.gz, valid.jsonl.gz (fields title, source, text).
Trains a byte-level BPE tokenizer if <out>/hf/tokenizer.json is missing. Writes <out>/hf/* and <out>/log.csv.
Muon (orthogonalised momentum) for the matrices inside the blocks, AdamW for the embedding and the norms; bf16
autocast over float32 weights; the learning rate follows the clock and ends at zero when the minutes are up.
On CPU set THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 and --compile 1.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

BOS, EOS, PAD = 0, 1, 2


# data
def read(path):
    return [json.loads(line)["text"] for line in gzip.open(path)]


def make_tokenizer(texts, vocab, folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    t.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            dict(
                tokenizer_class="PreTrainedTokenizerFast",
                model_max_length=1024,
                clean_up_tokenization_spaces=False,
                **names,
            ),
            indent=1,
        )
    )


def encode(tok, texts):
    return [np.array([BOS, *e.ids, EOS], np.uint16) for e in tok.encode_batch(texts, add_special_tokens=False)]


class Stream:
    """Documents in a new random order each pass, joined end to end, cut to any length asked for."""

    def __init__(self, docs, rng):
        self.docs, self.rng, self.buf, self.at, self.passes = docs, rng, np.empty(0, np.uint16), 0, 0.0
        self.total = sum(map(len, docs))

    def take(self, n):
        if self.at + n > len(self.buf):
            order = self.rng.permutation(len(self.docs))
            self.buf = np.concatenate([self.buf[self.at :]] + [self.docs[i] for i in order])
            self.at = 0
        self.at += n
        self.passes += n / self.total
        return self.buf[self.at - n : self.at]


# model
class Block(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.h, self.kv, self.hd = a.heads, a.kv_heads, a.hidden // a.heads
        self.sizes = [a.hidden, self.kv * self.hd, self.kv * self.hd]
        self.n1, self.n2 = nn.Parameter(torch.ones(a.hidden)), nn.Parameter(torch.ones(a.hidden))
        self.qkv = nn.Linear(a.hidden, sum(self.sizes), bias=False)
        self.o = nn.Linear(a.hidden, a.hidden, bias=False)
        self.gu = nn.Linear(a.hidden, 2 * a.inter, bias=False)
        self.down = nn.Linear(a.inter, a.hidden, bias=False)
        for w in (self.qkv, self.gu):
            nn.init.normal_(w.weight, std=a.hidden**-0.5 * 0.6)
        for w in (self.o, self.down):
            nn.init.normal_(w.weight, std=w.in_features**-0.5 * 0.6 / math.sqrt(2 * a.layers))

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        qk, v = (
            self.qkv(F.rms_norm(x, (d,), self.n1.to(x.dtype), 1e-5))
            .view(b, t, -1, self.hd)
            .split([self.h + self.kv, self.kv], 2)
        )
        c, e = qk.chunk(2, -1)  # half-split rotary, as in Hugging Face Llama
        q, k = torch.cat((c * cos - e * sin, e * cos + c * sin), -1).split([self.h, self.kv], 2)
        k, v = (y.repeat_interleave(self.h // self.kv, 2) for y in (k, v))
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
        g, u = self.gu(F.rms_norm(x, (d,), self.n2.to(x.dtype), 1e-5)).chunk(2, -1)
        return x + self.down(F.silu(g) * u)


def attend(q, k, v):
    b, h, t, d = q.shape
    if q.is_cuda or t > 256:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    q, k, v = (
        y.reshape(b * h, t, d) for y in (q, k, v)
    )  # short sequences on CPU: plain products beat the fused kernel
    mask = torch.full((t, t), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    s = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=d**-0.5)
    return torch.bmm(torch.softmax(s, -1, dtype=torch.float32).to(v.dtype), v).view(b, h, t, d)


class Model(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.emb = nn.Embedding(a.vocab, a.hidden)
        nn.init.normal_(self.emb.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.layers))
        self.norm = nn.Parameter(torch.ones(a.hidden))
        hd = a.hidden // a.heads
        ang = torch.outer(torch.arange(a.max_pos).float(), 10000.0 ** (-torch.arange(0, hd, 2).float() / hd))
        self.register_buffer("cos", ang.cos().bfloat16()[:, None], persistent=False)
        self.register_buffer("sin", ang.sin().bfloat16()[:, None], persistent=False)

    def forward(self, ids, target):
        t = ids.shape[1]
        x = self.emb(ids).bfloat16()
        for blk in self.blocks:
            x = blk(x, self.cos[:t], self.sin[:t])
        x = F.rms_norm(x, (x.shape[-1],), self.norm.to(x.dtype), 1e-5)
        return F.cross_entropy(F.linear(x, self.emb.weight).flatten(0, 1), target.flatten())


# optimizer
def orthogonalise(g, steps=5):  # Newton-Schulz iteration on a stack of matrices
    x = g.bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon:
    def __init__(self, blocks, momentum=0.95):
        self.mu, self.groups = momentum, {}
        for b in blocks:
            for w, sizes in ((b.qkv, b.sizes), (b.o, None), (b.gu, [b.down.in_features] * 2), (b.down, None)):
                w.weight.mom = torch.zeros_like(w.weight)
                at = 0
                for n in sizes or [w.weight.shape[0]]:  # each sub-matrix of a fused weight stands alone
                    self.groups.setdefault((n, w.weight.shape[1]), []).append((w.weight, at, at + n))
                    at += n

    @torch.no_grad()
    def step(self, lr):
        for w in {id(w): w for g in self.groups.values() for w, _, _ in g}.values():
            w.mom.lerp_(w.grad, 1 - self.mu)
            w.grad.lerp_(w.mom, self.mu)
        for (r, c), items in self.groups.items():
            u = orthogonalise(torch.stack([w.grad[i:j] for w, i, j in items]))
            for (w, i, j), d in zip(items, u, strict=False):
                w[i:j].add_(d, alpha=-lr * max(1, r / c) ** 0.5)


# export
def export(model, a, folder):
    from safetensors.torch import save_file

    sd = {"model.embed_tokens.weight": model.emb.weight, "model.norm.weight": model.norm}
    for i, b in enumerate(model.blocks):
        p = f"model.layers.{i}."
        for n, w in zip("qkv", b.qkv.weight.split(b.sizes), strict=False):
            sd[p + f"self_attn.{n}_proj.weight"] = w
        gate, up = b.gu.weight.chunk(2)
        sd.update(
            {
                p + "self_attn.o_proj.weight": b.o.weight,
                p + "mlp.gate_proj.weight": gate,
                p + "mlp.up_proj.weight": up,
                p + "mlp.down_proj.weight": b.down.weight,
                p + "input_layernorm.weight": b.n1,
                p + "post_attention_layernorm.weight": b.n2,
            }
        )
    save_file(
        {k: v.detach().float().cpu().contiguous().clone() for k, v in sd.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    cfg = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": a.vocab,
        "hidden_size": a.hidden,
        "intermediate_size": a.inter,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.hidden // a.heads,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_pos,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(cfg, indent=1))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}, indent=1)
    )


# training
def main():
    p = argparse.ArgumentParser()
    p.add_argument("--data", default="corpus")
    p.add_argument("--out", default="tales7m")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--minutes", type=float, default=50)
    p.add_argument("--compile", type=int, default=0)
    for name, v in {
        "hidden": 256,
        "layers": 8,
        "heads": 8,
        "kv_heads": 4,
        "inter": 688,
        "vocab": 4096,
        "max_pos": 1024,
        "seq": 256,
        "batch": 32,
        "micro": 8,
        "long_seq": 1024,
        "eval_every": 100,
        "warmup": 40,
        "seed": 1,
    }.items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=v)
    for name, v in {
        "lr": 4e-3,
        "muon_lr": 0.02,
        "wd": 0.01,
        "stories0": 0.2,
        "stories1": 0.45,
        "long_from": 0.85,
    }.items():
        p.add_argument(
            "--" + name.replace("_", "-"), type=float, default=v
        )  # stories0/1: share of stories, start and end
    p.add_argument("--optim", default="muon", choices=["muon", "adamw"])
    a = p.parse_args()
    torch.manual_seed(a.seed)
    torch.set_num_threads(a.threads)
    rng, data, hf = np.random.default_rng(a.seed), Path(a.data), Path(a.out) / "hf"
    hf.mkdir(parents=True, exist_ok=True)
    books, stories = read(data / "train_books.jsonl.gz"), read(data / "train_stories.jsonl.gz")
    if not (hf / "tokenizer.json").exists():
        make_tokenizer(books + 2 * stories, a.vocab, hf)
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(hf / "tokenizer.json"))
    sb, ss = Stream(encode(tok, books), rng), Stream(encode(tok, stories), rng)
    vs = Stream(encode(tok, read(data / "valid.jsonl.gz")), np.random.default_rng(0))
    val = torch.from_numpy(vs.take(min(vs.total // 257, 96) * 257).astype(np.int64).reshape(-1, 257))
    model = Model(a).to(a.device)
    small = [q for n, q in model.named_parameters() if q.ndim < 2 or n.startswith("emb")]
    mats = [q for b in model.blocks for q in (b.qkv.weight, b.o.weight, b.gu.weight, b.down.weight)]
    muon = Muon(model.blocks) if a.optim == "muon" else None
    adam = torch.optim.AdamW(
        small if muon else small + mats, lr=a.lr, betas=(0.9, 0.95), weight_decay=0.0 if muon else 0.1, fused=True
    )
    loss_fn = torch.compile(model) if a.compile else model

    def auto():
        return torch.autocast(torch.device(a.device).type, torch.bfloat16)

    print(
        f"parameters {sum(q.numel() for q in model.parameters()):,}; tokens books {sb.total:,} stories {ss.total:,}",
        flush=True,
    )

    def batch(share, n, t):
        x = np.stack([(ss if rng.random() < share else sb).take(t + 1) for _ in range(n)])
        return torch.from_numpy(x.astype(np.int64)).to(a.device)

    def evaluate():
        with torch.no_grad(), auto():
            return float(np.mean([model(v[:, :-1], v[:, 1:]).item() for v in val.to(a.device).split(a.micro)]))

    log = (Path(a.out) / "log.csv").open("w")
    log.write("step,tokens,train_loss,val_loss,seconds\n")
    start = last_save = time.time()
    step, tokens, run = 0, 0, []
    while True:
        if (done := (time.time() - start) / (60 * a.minutes)) >= 1:
            break
        lr = min(1, (step + 1) / a.warmup) * max(0.5 * (1 + math.cos(math.pi * done)), 0.0)
        long = done > a.long_from and a.long_seq > a.seq
        t, n, m = (
            (a.long_seq, a.batch * a.seq // a.long_seq, a.micro * a.seq // a.long_seq)
            if long
            else (a.seq, a.batch, a.micro)
        )
        share, loss = a.stories0 + (a.stories1 - a.stories0) * done, 0.0
        with auto():  # one context: each weight is cast to bf16 once a step
            for x in batch(share, n, t).split(m):
                part = (model if long else loss_fn)(x[:, :-1], x[:, 1:]) * len(x) / n
                part.backward()
                loss += part.detach()
        for g in adam.param_groups:
            g["lr"] = a.lr * lr
        nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        adam.step()
        if muon:
            muon.step(a.muon_lr * lr)
            for w in mats:
                w.data.mul_(1 - a.muon_lr * lr * a.wd)
        model.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + n * t
        run += [float(loss)]
        if step % a.eval_every == 0 or step == 10:
            v, s = evaluate(), time.time() - start
            print(
                f"step {step} tokens {tokens:,} train {np.mean(run):.4f} val {v:.4f} lr {lr:.3f} {s:.0f}s {tokens / s:.0f} tok/s",
                flush=True,
            )
            log.write(f"{step},{tokens},{np.mean(run):.4f},{v:.4f},{s:.1f}\n")
            log.flush()
            run.clear()
        if time.time() - last_save > 600:
            last_save = time.time()
            export(model, a, hf)
    v, s = evaluate(), time.time() - start
    log.write(f"{step},{tokens},{np.mean(run or [0]):.4f},{v:.4f},{s:.1f}\n")
    log.close()
    print(
        f"end: step {step} tokens {tokens:,} val {v:.4f} {s:.0f}s; passes books {sb.passes:.2f} stories {ss.passes:.2f}"
    )
    export(model, a, hf)


if __name__ == "__main__":
    main()
