"""Train Wren: ``python models/recipe/train.py --corpora DIR --out models/wren-6m --minutes 80``.

``--architecture opt`` or ``rwkv`` trains another kind of network from the same documents. With ``--teacher`` it starts
from the weights of a trained Llama Wren where the two have counterparts, and learns from the teacher's guesses too.

The budget is training time, not steps: the learning rate depends on the share of ``--minutes`` that has been used, so
the end is predictable on any machine. A checkpoint with everything needed to go on is written every few minutes to
``--work`` (with token caches), and ``--resume`` goes on from it. Each checkpoint is also exported as a model folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from chatml import END, END_OF_TEXT, PAD, render
from documents import Recipe
from network import Llama, LlamaShape, Network, load_folder
from network_opt import OPT, OPTShape
from network_rwkv import RWKV, RWKVShape
from packing import Batch, TokenSet, batches, fill_rows, make_batch, tokenize
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import save_tokenizer, train_tokenizer

ROWS = (256, 1024)  # lengths of the rows of a batch
IMITATION = (3.0, 0.6)  # weight of the teacher's residual streams at first; share of the budget at which it is nothing
WARM_UP, DECAY = 0.02, 0.5  # shares of the budget in which the learning rate rises, and falls to nothing


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised by a Newton-Schulz iteration.

    ``torch.optim.Muon`` iterates in bfloat16, which is emulated and 80 times slower on processors without it; this one
    stays in float32 and treats all matrices of one shape as one batch.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, members in shapes.items():
                updates = []
                for parameter in members:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(members, orthogonalise(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Matrices [n, rows, columns] with singular values near 1 and the same singular vectors (quintic Newton-Schulz)."""
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.transpose(1, 2) if tall else x


def rate(share: float) -> float:
    """The learning rate, relative to its peak, when ``share`` of the training time has been used."""
    return min(1.0, (share + 1e-3) / WARM_UP, max(0.0, (1 - share) / DECAY))


def build(architecture: str, vocab: int, context: int) -> Network:
    """A new network of the kind that ``--architecture`` names."""
    if architecture == "opt":
        return OPT(OPTShape(vocab=vocab, context=context))
    if architecture == "rwkv":
        return RWKV(RWKVShape(vocab=vocab, context=context))
    return Llama(LlamaShape(vocab=vocab, context=context))


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, TokenSet, dict[str, TokenSet]]:
    """Tokenizer, training set and validation sets, from the cache in ``--work`` where it is there."""
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    vocabulary = work / "tokenizer.json"
    if not vocabulary.exists():
        texts = (render(d) if isinstance(d, str) else " ".join(m["content"] for m in d)
                 for d in Recipe(args.corpora, seed=7).documents(30_000))  # fmt: skip
        texts = (text.removesuffix(END_OF_TEXT) for text in texts)
        train_tokenizer(texts, args.vocab).save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    cache = work / f"train-{args.documents}-{args.seed}.npz"
    if not cache.exists():
        tokenize(Recipe(args.corpora, seed=args.seed).documents(args.documents), tokenizer, args.context).save(cache)
    return tokenizer, TokenSet.load(cache), validation(args, tokenizer)


def validation(args: argparse.Namespace, tokenizer: Tokenizer, count: int = 40) -> dict[str, TokenSet]:
    """Held-out documents by kind. Product and small-talk questions are in words that training never shows."""
    recipe = Recipe(args.corpora, split="valid", seed=args.seed)

    def single(draw: str) -> Iterator[list[dict[str, str]]]:
        for _ in range(count):
            exchange = getattr(recipe, draw)()
            yield [{"role": "user", "content": exchange.question}, {"role": "assistant", "content": exchange.answer}]

    kinds = {"product": single("product"), "chat": single("small_talk"), "story": islice(single("tale"), count // 3),
             "conversation": (recipe.conversation() for _ in range(count // 3)), "tinystories": recipe.tales[: count // 3]}  # fmt: skip
    return {kind: tokenize(documents, tokenizer, args.context) for kind, documents in kinds.items()}


@dataclass
class Lesson:
    """How a batch is learned from: the teacher, if there is one, and how much its residual streams count now."""

    teacher: Llama | None = None
    imitation: float = 0.0
    tokens: int = 1  # of the whole batch


def loss_of(network: Network, batch: Batch) -> Tensor:
    """Weighted sum of the cross-entropy, in nats."""
    where = batch.weights > 0
    losses = F.cross_entropy(network(batch.ids, batch.document, where), batch.targets[where], reduction="none")
    return (losses * batch.weights[where]).sum()


def guided_loss(network: Network, batch: Batch, total: Tensor, lesson: Lesson) -> Tensor:
    """The rows' share of the mean loss with a teacher.

    Half of the target is the next token, half the teacher's distribution (Hinton et al. 2015). The student's residual
    stream is drawn to the teacher's after every layer: that gives each layer a target of its own from the first step.
    """
    assert lesson.teacher is not None
    where = batch.weights > 0
    shown: list[Tensor] = []
    streams: list[Tensor] | None = [] if lesson.imitation else None
    with torch.no_grad():
        guesses = lesson.teacher(batch.ids, batch.document, where, shown).softmax(-1)
    logs = network(batch.ids, batch.document, where, streams).log_softmax(-1)
    losses = -0.5 * ((guesses * logs).sum(-1) + logs.gather(1, batch.targets[where][:, None])[:, 0])
    loss = (losses * batch.weights[where]).sum() / total
    real = batch.document >= 0
    for mine, theirs in zip(streams or [], shown, strict=bool(streams)):
        distance = (mine - theirs)[real].square().sum(-1) / theirs[real].square().sum(-1)
        loss = loss + lesson.imitation * distance.sum() / (len(shown) * lesson.tokens)
    return loss


def backward(network: Network, total: Tensor, lesson: Lesson, batch: Batch) -> float:
    """Add the gradients of these rows; ``total`` is the weight of the whole batch. The rows' share of the mean loss."""
    loss = guided_loss(network, batch, total, lesson) if lesson.teacher else loss_of(network, batch) / total
    loss.backward()
    return loss.item()


@torch.no_grad()
def perplexity(network: Network, data: TokenSet, rows: int = 8, size: int = 1024) -> float:
    """Perplexity per token over the assistant's words (of a chat) or all words (of plain text)."""
    total = weight = 0.0
    groups = fill_rows(data.lengths, np.arange(len(data)), size)
    for start in range(0, len(groups), rows):
        batch = make_batch(data, groups[start : start + rows], size)
        batch.weights = (batch.weights >= 1).float()
        total += float(loss_of(network, batch))
        weight += float(batch.weights.sum())
    return math.exp(total / weight)


def export(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a complete model folder; files already there and not made here (the card) stay."""
    eos = [tokenizer.token_to_id(token) for token in (END, END_OF_TEXT)]
    network.save(folder, eos, tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PAD))
    save_tokenizer(tokenizer, folder, network.shape.context)


def replace_folder(new: Path, target: Path) -> None:
    """Move ``new`` to ``target``, so that readers see the old folder or the new one."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=("llama", "opt", "rwkv"), default="llama")
    parser.add_argument("--teacher", type=Path, help="folder of a trained Llama Wren to start and to learn from")
    parser.add_argument("--corpora", type=Path, required=True, help="folder with tinystories/, personality-chat/, self-dialogue/")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write at the end")
    parser.add_argument("--work", type=Path, default=Path("/tmp/wren"), help="folder of caches and checkpoints")
    parser.add_argument("--minutes", type=float, default=80, help="training time")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint (last.pt) to go on from")
    parser.add_argument("--documents", type=int, default=120_000)
    parser.add_argument("--tokens", type=int, default=6144, help="tokens per step")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon, for the matrices")
    parser.add_argument("--lr-rest", type=float, default=0.003, help="of AdamW, for embeddings and norms")
    parser.add_argument("--every", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer, data, held_out = prepare(args)
    print(f"{len(data)} documents, {len(data.ids) / 1e6:.1f} M tokens", flush=True)
    network = build(args.architecture, args.vocab, args.context)
    lesson = Lesson(load_folder(args.teacher).requires_grad_(False) if args.teacher else None)
    if lesson.teacher and not args.resume:
        network.start_from(lesson.teacher)
    matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and not network.plain.search(name)]
    rest = [p for name, p in network.named_parameters() if p.ndim != 2 or network.plain.search(name)]
    optimizers = [Muon(matrices, lr=args.lr), torch.optim.AdamW(rest, lr=args.lr_rest, betas=(0.9, 0.98), weight_decay=0.0)]
    peaks = [args.lr, args.lr_rest]
    state = {"seconds": 0.0, "step": 0, "tokens": 0}
    if args.resume:
        saved = torch.load(args.resume / "last.pt", weights_only=True)
        network.load_state_dict(saved["network"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        state = saved["state"]

    # Each thread takes some rows of a batch and meets the others once a step. Threads that share every operation are
    # no faster, and wait for each other all the time when the machine is busy.
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    stream = batches(data, ROWS, args.tokens, np.random.default_rng(args.seed + state["step"]))

    def checkpoint() -> None:
        """Save everything, measure, and put the model where others can load it."""
        content = {"network": network.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "state": state}
        torch.save(content, args.work / "new.pt")
        (args.work / "new.pt").replace(args.work / "last.pt")
        scores = {kind: round(perplexity(network, tokens), 3) for kind, tokens in held_out.items()}
        record = {**state, "minutes": round(state["seconds"] / 60, 1), "perplexity": scores}
        with (args.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        export(network, tokenizer, args.work / "hf.new")
        replace_folder(args.work / "hf.new", args.work / "hf")

    budget, next_save = args.minutes * 60, state["seconds"] + args.every * 60
    recent = [0.0]  # so that the first step, which compiles, counts nothing
    while state["seconds"] < budget:
        began = time.monotonic()
        factor = rate(state["seconds"] / budget)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.zero_grad()
        batch = next(stream)
        lesson.imitation = IMITATION[0] * max(0.0, 1 - state["seconds"] / budget / IMITATION[1])
        lesson.tokens = max(1, int((batch.document >= 0).sum()))
        loss = sum(pool.map(partial(backward, network, batch.weights.sum(), lesson), batch.split(args.threads)))
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        state["step"] += 1
        state["tokens"] += int((batch.document >= 0).sum())
        # A step during which the process was stopped (or compiled) counts as an ordinary one.
        taken = time.monotonic() - began
        state["seconds"] += min(taken, 3 * statistics.median(recent[-50:]))
        recent = [*recent[-50:], taken] if recent != [0.0] else [min(taken, 5.0)]
        if state["step"] % 20 == 0:
            print(f"step {state['step']} {state['seconds'] / 60:.1f} min {state['tokens'] / 1e6:.2f} M tokens "
                  f"loss {loss:.3f} lr x{factor:.2f} {taken:.1f} s", flush=True)  # fmt: skip
        if state["seconds"] >= next_save:
            checkpoint()
            next_save += args.every * 60
    checkpoint()
    export(network, tokenizer, args.out)


if __name__ == "__main__":
    main()
